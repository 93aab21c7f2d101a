"""What a run is: its task, its flags and config, and the command as it was typed."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from configs import SCHEMAS, load_config, place
from engine.flags import IGNORED, check_flags
from engine.tasks import TASKS, Task, later
from reports.runs import CHECKPOINTS, REPORT_FILE
from utils import UserError, write_json

if TYPE_CHECKING:  # which imports torch
    from engine.processes import Process

OVERRIDES = ("pretrained", "init_lr", "max_epoch", "batch_size", "num_workers")  # flags and keys
# What may change between a stop and a resume: places, speed, evaluation, what is printed and kept;
# files count by their content, --max_steps and the like by the number of steps, batch_size and
# processes by the samples of a step. Every other flag and key, a new one too, must stay the same.
FREE_FLAGS = """
    config output_dir model_dir device check resume checkpoint_steps keep_checkpoints compile
    deterministic skip_bad_images evaluate split eval_samples pruned sparse eval_epochs eval_test
    spice score_only pretrained init_lr max_epoch batch_size num_workers max_steps warmup_steps
    gradient_accumulation_steps useID id_profile
""".split()
FREE_FLAGS += IGNORED.split()
FREE_KEYS = """
    med_config max_epoch batch_size eval_batch_size num_workers vit_grad_ckpt vit_ckpt_layer
    max_length min_length num_beams length_normalization
""".split()  # and all places


@dataclass(frozen=True)
class Run:
    """The record of a run, and once it has begun this process's part in it."""

    task: Task
    argv: tuple[str, ...]  # the script and its flags as they were typed
    flags: argparse.Namespace
    config: dict  # with the flags' values in place of its own
    process: "Process | None" = None
    bf16: bool = False  # products in bfloat16 autocast

    @property
    def id_profile(self) -> str:
        """Path of the profile that weights scores; "" for none."""
        return self.flags.id_profile or (self.config["id_profile"] if self.flags.useID else "")

    @property
    def folder(self) -> Path:
        """Folder of the results: the evaluated run's own where --model_dir names no other.

        Other folders that --pruned may name (of Hugging Face, a cache) are not written to.
        """
        flags, pruned = self.flags, self.flags.pruned
        if flags.model_dir is None and pruned and Path(pruned, REPORT_FILE).is_file():
            if os.access(pruned, os.W_OK):
                return Path(pruned)
        return Path(flags.output_dir, flags.model_dir or Path(flags.config).stem)

    def write(self, path: Path, **more) -> None:
        """Writes the record. Call it once all checks have passed."""
        record = {"config": self.config, "flags": vars(self.flags), "argv": self.argv}
        write_json(path, record | more)

    def identity(self) -> dict:
        """Flags and keys that a resumed run must share with the one it goes on from."""
        schema = SCHEMAS[self.task.name].items()
        free = FREE_KEYS + [key for key, (rule, _) in schema if rule is place]
        keys = {key: value for key, value in self.config.items() if key not in free}
        flags = {name: value for name, value in vars(self.flags).items() if name not in FREE_FLAGS}
        return keys | flags

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / CHECKPOINTS

    @property
    def samples_per_step(self) -> int:
        """Training samples of all processes and accumulated batches at one optimizer step."""
        batches = self.process.world_size * self.flags.gradient_accumulation_steps
        return self.config["batch_size"] * batches

    def say(self, message: str) -> None:
        """Prints on the main process only; lines begin with the run, as several share a screen."""
        if self.process.is_main:
            lines = [f"{self.folder.name}: {line}" for line in message.split("\n")]
            print("\n".join(lines), flush=True)


def read_experiment(args: argparse.Namespace, task: str) -> Run:
    """Checks flags and config, without anything heavy; `task` is a key of TASKS."""
    check_flags(args)
    config = load_config(args.config, {key: getattr(args, key) for key in OVERRIDES}, task)
    flags = {name: value for name, value in vars(args).items() if name != "argv"}
    run = Run(TASKS[task], tuple(args.argv), argparse.Namespace(**flags), config)
    if args.useID and not run.id_profile:
        raise UserError(f"--useID: {args.config} names no id_profile; give --id_profile")
    return run


def run_trainer(args: argparse.Namespace, task: str) -> None:
    """What a training script does with its flags."""
    later("engine.main:run_task")(read_experiment(args, task))
