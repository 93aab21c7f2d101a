"""The flags of the training scripts, and the experiment that they and a config come to."""

import argparse
import os
import shlex
from pathlib import Path

from configs import COUNT, FROM_ZERO, RATE, Number, load_config
from utils import UserError

FRACTION = Number(float, 0, 1)
# by task: defaults of --config, and of --initial_warmup and --final_warmup (in --warmup_steps)
DEFAULTS = {
    "caption": ("configs/caption_coco.yaml", 1, 1),
    "nlvr": ("configs/nlvr.yaml", 0, 5),
    "retrieval": ("configs/retrieval_flickr_clip.yaml", 0, 2),
}


def add_flags(parser: argparse.ArgumentParser, task: str):
    """Adds the flags that all training scripts have; returns the group of evaluation.

    Args:
        parser: gets them.
        task: a key of DEFAULTS.
    """
    config, *warmups = DEFAULTS[task]
    run = parser.add_argument_group("the run")
    run.add_argument("--config", default=config, help="YAML file of the experiment")
    run.add_argument(
        "--output_dir",
        type=os.path.expanduser,  # which shells leave to us in --output_dir=~/results
        default="output",
        help="results go to OUTPUT_DIR/MODEL_DIR",
    )
    run.add_argument("--model_dir", help="folder of this run's results; default: the config's name")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps or xpu")
    run.add_argument("--seed", type=FROM_ZERO, default=42, help="default: 42")
    run.add_argument("--check", action="store_true", help="only say what is missing or wrong")
    run.add_argument("--resume", default="auto", help="auto (newest checkpoint), off, or a file")
    run.add_argument(
        "--checkpoint_steps",
        type=FROM_ZERO,
        default=0,
        help="optimizer steps between checkpoints; 0: at the end of each epoch, and every ten "
        "minutes, or less often, so that writing takes at most a twentieth of the time",
    )
    run.add_argument("--keep_checkpoints", type=COUNT, default=2, help="how many stay")
    run.add_argument(
        "--skip_bad_images",
        action="store_true",
        help="in training, take the next sample in place of one whose image cannot be read",
    )
    run.add_argument(
        "--amp",
        choices=["auto", "bf16", "off"],
        default="auto",
        help="bf16 autocast; auto: on a GPU only, though CPUs with AMX gain from it too",
    )
    run.add_argument("--compile", action="store_true", help="torch.compile the model")
    run.add_argument(
        "--gradient_accumulation_steps",
        type=COUNT,
        default=1,
        metavar="BATCHES",
        help="batches of each process in an optimizer step; default: 1",
    )
    run.add_argument("--max_steps", type=COUNT, help="optimizer steps, in place of max_epoch")

    scores = parser.add_argument_group("evaluation")
    scores.add_argument("--evaluate", action="store_true", help="no training: score held-out data")
    scores.add_argument("--pruned", help="with --evaluate: weights, or the folder of a run")
    scores.add_argument(
        "--sparse",
        action="store_true",
        help="with --evaluate: compute on the CPU, without the weights that are zero",
    )
    scores.add_argument(
        "--eval_epochs", type=FROM_ZERO, default=1, help="epochs between validations; 0: none"
    )
    scores.add_argument("--eval_test", action="store_true", help="validate on the test split, too")

    override = parser.add_argument_group("in place of the config's values")
    override.add_argument("--pretrained", help="weights to start from; '' starts from random ones")
    override.add_argument("--init_lr", "--lr", type=RATE, help="learning rate at first")
    override.add_argument("--max_epoch", "--epoch", type=COUNT, help="epochs of training")
    override.add_argument("--batch_size", type=COUNT, help="training samples of one process")
    override.add_argument("--num_workers", type=FROM_ZERO, help="image loading processes")

    _add_pruning_flags(parser.add_argument_group("pruning"), *warmups)
    for flag in ("--n_gpu", "--world_size", "--dist_url", "--distributed", "--local_rank"):
        # accepted, as scripts of the original code pass them; torchrun says what they said
        parser.add_argument(flag, nargs="?", help=argparse.SUPPRESS)
    # torch.distributed.launch passes it, and sets torchrun's variables too
    parser.add_argument("--local-rank", help=argparse.SUPPRESS)
    return scores


def _add_pruning_flags(prune, initial: int, final: int) -> None:
    prune.add_argument(
        "--pruner_name",
        choices=["PLATON", "Taylor", "Magnitude"],
        default="PLATON",
        help="importance scores; default: PLATON",
    )
    prune.add_argument(
        "--beta1", type=FRACTION, default=0.85, help="decay of the importance; default: 0.85"
    )
    prune.add_argument(
        "--beta2", type=FRACTION, default=0.95, help="decay of the uncertainty; default: 0.95"
    )
    prune.add_argument(
        "--deltaT", type=COUNT, default=10, help="steps between mask events; default: 10"
    )
    prune.add_argument(
        "--initial_threshold",
        type=FRACTION,
        default=1.0,
        help="fraction that remains at first; default: 1",
    )
    prune.add_argument(
        "--final_threshold",
        type=FRACTION,
        default=0.2,
        help="fraction of the weights that remains at last; 1: no pruning; default: 0.2",
    )
    prune.add_argument(
        "--warmup_steps", type=FROM_ZERO, help="steps of a warm-up; default: one epoch of the data"
    )
    prune.add_argument(
        "--initial_warmup",
        type=FROM_ZERO,
        default=initial,
        help=f"warm-ups before pruning begins; default: {initial}",
    )
    prune.add_argument(
        "--final_warmup",
        type=FROM_ZERO,
        default=final,
        help=f"warm-ups at the final sparsity; default: {final}",
    )
    prune.add_argument(
        "--useID",
        action="store_true",
        help="weight scores by intrinsic dimension, of --id_profile or the config's id_profile",
    )
    prune.add_argument("--id_profile", help="profile or folder of ComputeID.py; implies --useID")


def check_flags(args: argparse.Namespace) -> None:
    """Refuses flags that would be ignored.

    Raises:
        UserError: names the flag and what it goes with.
    """
    if args.pruned and not args.evaluate:
        raise UserError("--pruned goes with --evaluate; training starts from --pretrained")
    if args.sparse and not args.evaluate:
        raise UserError("--sparse goes with --evaluate; training needs all weights")
    if args.sparse and args.amp == "bf16":
        raise UserError("--sparse computes in float32: leave out --amp bf16")
    if args.sparse and args.device not in ("auto", "cpu"):
        raise UserError(f"--sparse computes on the CPU: leave out --device {args.device}")
    for flag in ("eval_test", "check", "compile"):
        if args.evaluate and getattr(args, flag):
            raise UserError(f"--{flag} goes with training, not with --evaluate")


def read_experiment(args: argparse.Namespace, task: str) -> tuple[dict, str]:
    """The config with the flags' values in place of its own, and the ID profile.

    Args:
        args: of `add_flags`.
        task: a key of `configs.SCHEMAS`.

    Returns:
        The config of `load_config`, and the path of the profile that weights scores or "".

    Raises:
        UserError: a flag or the config is wrong.
    """
    check_flags(args)
    keys = ("pretrained", "init_lr", "max_epoch", "batch_size", "num_workers")
    config = load_config(args.config, {key: getattr(args, key) for key in keys}, task)
    id_profile = args.id_profile or (config["id_profile"] if args.useID else "")
    if args.useID and not id_profile:
        raise UserError(f"--useID: {args.config} names no id_profile; give --id_profile")
    return config, id_profile


def results_folder(args: argparse.Namespace) -> Path:
    """--model_dir; without it the folder of the evaluated run, or one of the config's name."""
    if args.model_dir is None and args.pruned and Path(args.pruned).is_dir():
        return Path(args.pruned)
    return Path(args.output_dir, args.model_dir or Path(args.config).stem)


def command_line(script: str, task: str, flags: dict) -> str:
    """The command that gives a script these flags, without those that are as by default.

    Args:
        script: of the task.
        task: a key of DEFAULTS.
        flags: `vars` of the script's parsed flags.
    """
    parser = argparse.ArgumentParser()
    add_flags(parser, task)
    defaults = vars(parser.parse_args([]))
    words = ["python", script]
    for name, value in flags.items():
        # a script's flags of its own are off by default
        if value == defaults[name] if name in defaults else not value:
            continue
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(words)
