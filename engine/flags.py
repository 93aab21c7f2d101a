"""The flags of the training scripts."""

import argparse
import os
import sys

from configs import COUNT, FROM_ZERO, RATE, Number
from engine.tasks import TASKS
from utils import UserError

FRACTION = Number(float, 0, 1)
PLACE = os.path.expanduser  # shells leave the ~ of --output_dir=~/results to us


def trainer_parser(
    task: str, description: str
) -> tuple[argparse.ArgumentParser, argparse._ArgumentGroup]:
    """The flags that all training scripts have.

    Args:
        task: key of TASKS.
        description: of the script.

    Returns:
        The parser, and its group of evaluation flags.
    """
    parser = argparse.ArgumentParser(
        prog=TASKS[task].script,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run = parser.add_argument_group("the run").add_argument
    run("--config", type=PLACE, default=TASKS[task].config, help="YAML file of the experiment")
    run("--output_dir", type=PLACE, default="output", help="results: OUTPUT_DIR/MODEL_DIR")
    run("--model_dir", help="folder of this run's results (default: the config's name)")
    run("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps or xpu (default: auto)")
    run("--seed", type=FROM_ZERO, default=42, help="seed (default: 42)")
    run("--check", action="store_true", help="list what is missing or wrong, and stop")
    run("--resume", type=PLACE, default="auto", help="auto (newest checkpoint), off, or a file")
    run(
        "--checkpoint_steps",
        type=FROM_ZERO,
        default=0,
        help="optimizer steps between checkpoints; 0: each epoch's end and every ten minutes, or "
        "less often, so that writing takes at most a twentieth of the time (default: 0)",
    )
    run("--keep_checkpoints", type=COUNT, default=2, help="checkpoints that stay (default: 2)")
    run("--skip_bad_images", action="store_true", help="next sample for an unreadable image")
    run(
        "--amp",
        choices=["auto", "bf16", "off"],
        default="auto",
        help="bf16 autocast; auto: on accelerators that compute it (default: auto)",
    )
    run("--compile", action="store_true", help="torch.compile the model")
    run(
        "--gradient_accumulation_steps",
        type=COUNT,
        default=1,
        metavar="BATCHES",
        help="batches of each process in an optimizer step (default: 1)",
    )
    run("--max_steps", type=COUNT, help="optimizer steps, in place of max_epoch")

    evaluation = parser.add_argument_group("evaluation")
    add = evaluation.add_argument
    add("--evaluate", action="store_true", help="score the held-out splits, without training")
    add("--split", choices=TASKS[task].held_out, help="with --evaluate: this split alone")
    add("--pruned", type=PLACE, help="with --evaluate: weights, or the folder of a run")
    add("--sparse", action="store_true", help="with --evaluate: on the CPU, nonzeros alone")
    add("--eval_epochs", type=FROM_ZERO, default=1, help="epochs between validations; 0: none")
    add("--eval_test", action="store_true", help="validate on the test split, too")

    override = parser.add_argument_group("in place of the config's values").add_argument
    override("--pretrained", help="weights to start from; '': random ones")
    override("--init_lr", "--lr", type=RATE, help="initial learning rate")
    override("--max_epoch", "--epoch", type=COUNT, help="epochs of training")
    override("--batch_size", type=COUNT, help="training samples per process")
    override("--num_workers", type=FROM_ZERO, help="image loading processes")

    _add_pruning_flags(parser.add_argument_group("pruning").add_argument, *TASKS[task].warmups)
    for flag in ("--n_gpu", "--world_size", "--dist_url", "--distributed", "--local_rank"):
        # accepted, as scripts of the original code pass them; torchrun's variables count
        parser.add_argument(flag, nargs="?", help=argparse.SUPPRESS)
    # torch.distributed.launch passes it, and sets torchrun's variables too
    parser.add_argument("--local-rank", help=argparse.SUPPRESS)
    return parser, evaluation


def _add_pruning_flags(add, initial_warmup: int, final_warmup: int) -> None:
    add(
        "--pruner_name",
        choices=["PLATON", "Taylor", "Magnitude"],
        default="PLATON",
        help="importance score (default: PLATON)",
    )
    add("--beta1", type=FRACTION, default=0.85, help="decay of the importance (default: 0.85)")
    add("--beta2", type=FRACTION, default=0.95, help="decay of the uncertainty (default: 0.95)")
    add("--deltaT", type=COUNT, default=10, help="PLATON's window, steps between masks (10)")
    add(
        "--initial_threshold",
        type=FRACTION,
        default=1.0,
        help="initial fraction of weights that remains (default: 1)",
    )
    add(
        "--final_threshold",
        type=FRACTION,
        default=0.2,
        help="final fraction of weights that remains; 1: no pruning (default: 0.2)",
    )
    add("--warmup_steps", type=FROM_ZERO, help="steps of a warm-up (default: one epoch)")
    add(
        "--initial_warmup",
        type=FROM_ZERO,
        default=initial_warmup,
        help=f"steps before pruning, in units of --warmup_steps (default: {initial_warmup})",
    )
    add(
        "--final_warmup",
        type=FROM_ZERO,
        default=final_warmup,
        help=f"steps at the final sparsity, in units of --warmup_steps (default: {final_warmup})",
    )
    add("--useID", action="store_true", help="weight scores by the IDs of the config's id_profile")
    add("--id_profile", type=PLACE, help="profile or folder of ComputeID.py; implies --useID")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The flags, and the command as it was typed as `argv`."""
    args = parser.parse_args(argv)
    args.argv = [parser.prog, *(sys.argv[1:] if argv is None else argv)]
    return args


def check_flags(args: argparse.Namespace) -> None:
    """Refuses flags that would be ignored.

    Raises:
        UserError: names the flag and what it goes with.
    """
    if args.pruned and not args.evaluate:
        raise UserError("--pruned goes with --evaluate; training starts from --pretrained")
    for flag in ("sparse", "split", "spice"):
        if getattr(args, flag, None) and not args.evaluate:
            raise UserError(f"--{flag} goes with --evaluate, not with training")
    for flag in ("eval_test", "check", "compile"):
        if getattr(args, flag) and args.evaluate:
            raise UserError(f"--{flag} goes with training, not with --evaluate")
    if args.sparse and args.amp == "bf16":
        raise UserError("--sparse computes in float32: leave out --amp bf16")
    if args.sparse and args.device not in ("auto", "cpu"):
        raise UserError(f"--sparse computes on the CPU: leave out --device {args.device}")
