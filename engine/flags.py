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
    """The flags that all training scripts have, and the group of the evaluation flags."""
    parser = argparse.ArgumentParser(
        prog=TASKS[task].script,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run = parser.add_argument_group("the run")
    add, on = run.add_argument, {"action": "store_true"}
    add("--config", type=PLACE, default=TASKS[task].config, help="YAML file of the experiment")
    add("--output_dir", type=PLACE, default="output", help="results: OUTPUT_DIR/MODEL_DIR")
    add("--model_dir", help="folder of this run's results (default: the config's name)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps or xpu (default: auto)")
    add("--check", **on, help="list what is missing or wrong, and stop")
    add("--resume", type=PLACE, default="auto", help="auto (newest checkpoint), off, or a file")
    add("--skip_bad_images", **on, help="next sample for an unreadable image")
    add("--compile", **on, help="torch.compile the model")
    add("--deterministic", **on, help="deterministic algorithms of torch, slower on GPUs")
    amp = "bf16 autocast; auto: on accelerators that compute bf16 (default: auto)"
    add("--amp", choices=["auto", "bf16", "off"], default="auto", help=amp)
    _number(run, "--seed", FROM_ZERO, 42, "seed")
    interval = "optimizer steps between checkpoints; 0: every ten minutes, and at epochs' ends"
    _number(run, "--checkpoint_steps", FROM_ZERO, 0, interval)
    _number(run, "--keep_checkpoints", COUNT, 2, "checkpoints that stay")
    parts = "batches of each process in an optimizer step"
    _number(run, "--gradient_accumulation_steps", COUNT, 1, parts)
    _number(run, "--max_steps", COUNT, None, "optimizer steps, in place of max_epoch")

    evaluation = parser.add_argument_group("evaluation")
    add = evaluation.add_argument
    add("--evaluate", **on, help="score the held-out splits, without training")
    add("--split", choices=TASKS[task].held_out, help="with --evaluate: this split alone")
    add("--eval_samples", type=FROM_ZERO, default=0, help="first samples of a split; 0: all")
    add("--pruned", type=PLACE, help="with --evaluate: weights, or the folder of a run")
    add("--sparse", **on, help="with --evaluate: on the CPU, nonzeros alone")
    _number(evaluation, "--eval_epochs", FROM_ZERO, 1, "epochs between validations; 0: none")
    add("--eval_test", **on, help="validate on the test split, too")

    override = parser.add_argument_group("in place of the config's values").add_argument
    override("--pretrained", type=PLACE, help="weights to start from; '': random ones")
    override("--init_lr", "--lr", type=RATE, help="initial learning rate")
    override("--max_epoch", "--epoch", type=COUNT, help="epochs of training")
    override("--batch_size", type=COUNT, help="training samples per process")
    override("--num_workers", type=FROM_ZERO, help="image loading processes")

    prune = parser.add_argument_group("pruning")
    add, warmups = prune.add_argument, TASKS[task].warmups
    score = {"choices": ["PLATON", "Taylor", "Magnitude"], "default": "PLATON"}
    add("--pruner_name", **score, help="importance score (default: PLATON)")
    _number(prune, "--beta1", FRACTION, 0.85, "decay of the importance")
    _number(prune, "--beta2", FRACTION, 0.95, "decay of the uncertainty")
    _number(prune, "--deltaT", COUNT, 10, "PLATON's window, and steps between masks")
    remains = "fraction of weights that remains; 1: no pruning"
    _number(prune, "--initial_threshold", FRACTION, 1.0, f"initial {remains}")
    _number(prune, "--final_threshold", FRACTION, 0.2, f"final {remains}")
    add("--warmup_steps", type=FROM_ZERO, help="steps of a warm-up (default: one epoch)")
    units = "in units of --warmup_steps"
    _number(prune, "--initial_warmup", FROM_ZERO, warmups[0], f"steps before pruning, {units}")
    final = f"steps at the final sparsity, {units}"
    _number(prune, "--final_warmup", FROM_ZERO, warmups[1], final)
    add("--useID", **on, help="weight scores by the IDs of the config's id_profile")
    add("--id_profile", type=PLACE, help="profile or folder of ComputeID.py; implies --useID")
    for flag in ("--n_gpu", "--world_size", "--dist_url", "--distributed", "--local_rank"):
        # scripts of the original code pass them; torchrun's variables count
        parser.add_argument(flag, nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--local-rank", help=argparse.SUPPRESS)  # of torch.distributed.launch
    return parser, evaluation


def _number(group, flag: str, kind: Number, default: float | None, what: str) -> None:
    """A flag that is a number, with its default in the help."""
    known = "" if default is None else f" (default: {default})"
    metavar = flag.strip("-").rpartition("_")[2].upper()
    group.add_argument(flag, type=kind, default=default, metavar=metavar, help=f"{what}{known}")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The flags, and the command as it was typed as `argv`."""
    args = parser.parse_args(argv)
    args.argv = [parser.prog, *(sys.argv[1:] if argv is None else argv)]
    return args


def check_flags(args: argparse.Namespace) -> None:
    """Refuses flags that would be ignored."""
    if args.pruned and not args.evaluate:
        raise UserError("--pruned goes with --evaluate; training starts from --pretrained")
    mode, other, flags = "training", "--evaluate", ("sparse", "split", "spice")
    if args.evaluate:
        mode, other, flags = "--evaluate", "training", ("eval_test", "check", "compile")
    for flag in flags:
        if getattr(args, flag, None):
            raise UserError(f"--{flag} goes with {other}, not with {mode}")
    if args.sparse and args.amp == "bf16":
        raise UserError("--sparse computes in float32: leave out --amp bf16")
    if args.sparse and args.device not in ("auto", "cpu"):
        raise UserError(f"--sparse computes on the CPU: leave out --device {args.device}")
