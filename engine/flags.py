"""The flags of the training scripts."""

import argparse
import sys

from configs import COUNT, FROM_ZERO, RATE, Number
from engine.tasks import TASKS
from utils import UserError, script_parser, user_path

FRACTION = Number(float, 0, 1)
# accepted for the original's scripts, and for older launchers'; torchrun's variables count
IGNORED = "n_gpu world_size dist_url distributed local_rank local-rank use_ceph w_sp_attn w_sp_mlp"


def trainer_parser(
    task: str, description: str
) -> tuple[argparse.ArgumentParser, argparse._ArgumentGroup]:
    """The flags that all training scripts have, and the group of the evaluation flags."""
    parser = script_parser(description, TASKS[task].script)
    add, on = parser.add_argument_group("the run").add_argument, {"action": "store_true"}
    add("--config", type=user_path, default=TASKS[task].config, help="YAML file of the experiment")
    add("--output_dir", type=user_path, default="output", help="parent folder of all runs")
    folder = "folder of this run, below --output_dir (default: the config's name)"
    add("--model_dir", type=user_path, help=folder)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps or xpu")
    add("--check", **on, help="list of what is missing or wrong, without a run")
    resume = "checkpoint to go on from: auto (the newest), off, or a file"
    add("--resume", type=user_path, default="auto", help=resume)
    add("--skip_bad_images", **on, help="next sample in place of one with an unreadable image")
    add("--compile", **on, help="torch.compile of the model")
    add("--deterministic", **on, help="deterministic algorithms of torch, slower on GPUs")
    amp = "bf16 autocast; auto: on accelerators that compute bf16"
    add("--amp", choices=["auto", "bf16", "off"], default="auto", help=amp)
    add("--seed", type=FROM_ZERO, default=42, help="random seed")
    interval = "optimizer steps between checkpoints; 0: every ten minutes, and at epochs' ends"
    add("--checkpoint_steps", type=FROM_ZERO, default=0, help=interval)
    kept = "number of newest checkpoints that stay; 0: none after the end of training"
    add("--keep_checkpoints", type=FROM_ZERO, default=2, help=kept)
    parts = "batches of each process in an optimizer step"
    add("--gradient_accumulation_steps", type=COUNT, default=1, help=parts)
    add("--max_steps", type=COUNT, help="optimizer steps (default: max_epoch epochs)")

    evaluation = parser.add_argument_group("evaluation")
    add = evaluation.add_argument
    add("--evaluate", **on, help="scores of the held-out splits, without training")
    add("--split", choices=TASKS[task].held_out, help="with --evaluate: this split alone")
    add("--eval_samples", type=FROM_ZERO, default=0, help="first samples of a split; 0: all")
    add("--pruned", type=user_path, help="with --evaluate: weights, or the folder of a run")
    add("--sparse", **on, help="with --evaluate: products with the nonzeros alone, on the CPU")
    add("--eval_epochs", type=FROM_ZERO, default=1, help="epochs between validations; 0: none")
    add("--eval_test", **on, help="validation on the test split, too")

    add = parser.add_argument_group("in place of the config's values").add_argument
    add("--pretrained", type=user_path, help="weights to start from; '': random ones")
    add("--init_lr", "--lr", type=RATE, help="initial learning rate")
    add("--max_epoch", "--epoch", type=COUNT, help="epochs of training")
    add("--batch_size", type=COUNT, help="training samples per process and batch")
    add("--num_workers", type=FROM_ZERO, help="image loading processes per process")

    add, warmups = parser.add_argument_group("pruning").add_argument, TASKS[task].warmups
    score = {"choices": ["PLATON", "Taylor", "Magnitude"], "default": "PLATON"}
    add("--pruner_name", **score, help="importance score")
    add("--beta1", type=FRACTION, default=0.85, help="decay of the importance")
    add("--beta2", type=FRACTION, default=0.95, help="decay of the uncertainty")
    add("--deltaT", type=COUNT, default=10, help="steps of PLATON's window, and between masks")
    remains = "fraction of weights that remains; 1: no pruning"
    add("--initial_threshold", type=FRACTION, default=1.0, help=f"initial {remains}")
    add("--final_threshold", type=FRACTION, default=0.2, help=f"final {remains}")
    add("--warmup_steps", type=FROM_ZERO, help="steps of a warm-up (default: one epoch)")
    before, after = "phase before pruning, in warm-ups", "phase at the final sparsity, in warm-ups"
    add("--initial_warmup", type=FROM_ZERO, default=warmups[0], help=before)
    add("--final_warmup", type=FROM_ZERO, default=warmups[1], help=after)
    add("--useID", **on, help="scores weighted by the IDs of the config's id_profile")
    add("--id_profile", type=user_path, help="profile or folder of ComputeID.py; implies --useID")
    for flag in IGNORED.split():
        parser.add_argument(f"--{flag}", nargs="?", help=argparse.SUPPRESS)
    return parser, evaluation


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
