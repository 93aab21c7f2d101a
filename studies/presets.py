"""Which cells a study has: the one that comes with the repository, and those of a command line."""

import argparse

from configs import load_config
from engine.flags import add_flags
from studies.grid import CELL_FLAGS, DENSE, Cell, Setting, Study, grid, trainer_flags
from studies.statistics import RULE, SCORES
from studies.weightings import ID, NONE, SHUFFLED, WEIGHTINGS, check_weighting
from utils import UserError

SEEDS, DECISIVE_SEEDS = range(8), range(10)
DECISIVE = (
    "The comparisons that decide are ID against none and ID against shuffled by validation loss, "
    "captions, PLATON, each seed's mean over 90 and 95 % sparsity. The others are many."
)
PILOT = (
    "Seeds 100 to 103, captions, PLATON, 90 %: the paired differences of ID to none had a standard "
    "deviation s of 0.0056 in loss and 0.11 in CIDEr. If the two fractions' differences are "
    "independent, the mean over both finds a difference of one s by the rule with a probability of "
    "about 0.8 from 10 seeds, 0.5 from 8. So the cells that decide have 10 seeds, the others 8. At "
    "a single sparsity 8 seeds find a difference of one s with a probability of about 0.25, of two "
    "s with about 0.8."
)
STEPS = 130
SHORT = [
    *(f"--max_steps={STEPS}", f"--warmup_steps={STEPS // 5}"),
    *("--num_workers=0", "--device=cpu"),
]


def embedded() -> Study:
    """Captions and statements of the embedded scenes, for two cores."""
    settings = {
        "caption": Setting(
            "configs/caption_demo.yaml",
            "configs/id/scenes_caption.json",
            validation=250,
            flags=[*SHORT, "--batch_size=32", "--init_lr=5e-4"],
        ),
        "nlvr": Setting(
            "configs/nlvr_demo.yaml",
            "configs/id/scenes_nlvr.json",
            validation=500,
            flags=[*SHORT, "--final_warmup=1"],
        ),
    }
    few = (NONE, ID, SHUFFLED)
    cells = [
        Cell("caption", DENSE, 1.0, NONE, 0),
        *grid("caption", ["PLATON"], [0.1, 0.05], WEIGHTINGS, DECISIVE_SEEDS),
        *grid("caption", ["PLATON"], [0.1], ["ID^0.5", "ID^2"], SEEDS),
        *grid("caption", ["PLATON"], [0.2, 0.025], WEIGHTINGS, SEEDS),
        *grid("caption", ["Magnitude"], [0.2, 0.1], few, SEEDS),
        Cell("nlvr", DENSE, 1.0, NONE, 0),
        *grid("nlvr", ["PLATON"], [0.1, 0.05], few, SEEDS),
    ]
    notes = {"rule": RULE, "decisive": DECISIVE, "pilot": PILOT}
    return Study(settings, cells, notes=notes, pooled=[0.1, 0.05])


PRESETS = {"embedded": embedded}


def of_config(args: argparse.Namespace) -> Study:
    """The study of a config, as the flags of `study.py` say.

    Raises:
        UserError: the config or a weighting is wrong, a value is there twice, or a flag is the
            cells' own.
        SystemExit: a flag of the training script is wrong.
    """
    for name in ("methods", "remaining", "weightings"):
        if len(set(values := getattr(args, name))) < len(values):
            raise UserError(f"--{name} names a value twice: {' '.join(map(str, values))}")
    for weighting in args.weightings:
        check_weighting(weighting)
    task = load_config(args.config)["task"]
    if task not in SCORES:
        raise UserError(f"--config {args.config}: a study knows the tasks {', '.join(SCORES)}")
    setting = Setting(args.config, args.id_profile, args.validation, args.flags)
    cells = grid(task, args.methods, args.remaining, args.weightings, range(args.seeds))
    dense = Cell(task, DENSE, 1.0, NONE, 0)
    parser = argparse.ArgumentParser(prog="study.py: the training script", add_help=False)
    add_flags(parser, task)
    given = parser.parse_args(args.flags, argparse.Namespace(**dict.fromkeys(CELL_FLAGS)))
    for name in CELL_FLAGS:
        if getattr(given, name) is not None:
            raise UserError(f"--{name} after --: each cell has its own; leave it out")
    for cell in {cell.method: cell for cell in (dense, *cells)}.values():
        parser.parse_args(trainer_flags(cell, setting, args.output_dir, None))
    return Study({task: setting}, [dense, *cells], notes={"rule": RULE}, pooled=args.remaining)
