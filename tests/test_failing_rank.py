"""One process of two fails: it prints why and leaves, and the other one ends with it."""

import json
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist

from data.samplers import TrainBatchSampler
from models import Captioner
from tests.runs import finish, make_scenes, start, write_config
from utils import UserError


def fail(rank: int, error: Exception | None) -> None:
    """Plants an error into the second process's third forward pass."""
    dist.destroy_process_group = lambda: time.sleep(600)  # as NCCL, while the other computes
    forward, calls = Captioner.forward, []

    def failing(self, *inputs):
        calls.append(1)
        if len(calls) == 3 and error and rank == 1:
            raise error
        return forward(self, *inputs)

    Captioner.forward = failing


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (KeyError("a bug"), 1, "KeyError: 'a bug'"),
        (torch.OutOfMemoryError("no memory left"), 1, "OutOfMemoryError: no memory left"),
        (UserError("this will not do"), 2, "error (rank 1): this will not do"),
        (None, 2, "error (rank 1): cannot read image {victim}"),
    ],
)
def test_a_failing_rank_prints_and_ends_the_job(error, code, printed, tmp_path):
    scenes = make_scenes(tmp_path / "scenes", train=12)
    config = write_config(tmp_path / "c.yaml", scenes, num_workers=1)
    argv = ["--config", config, "--output_dir", str(tmp_path), "--final_threshold", "1"]
    records = json.loads((scenes / "annotation/coco_karpathy_train.json").read_text())
    batches = list(TrainBatchSampler(len(records), 2, 42, rank=1, world_size=2))
    victim = scenes / "images" / records[batches[2][0][0]]["image"]
    if error is None:
        victim.write_bytes(victim.read_bytes()[:100])
    log = tmp_path / "log"
    codes = finish(start(argv, 2, log=log, before=partial(fail, error=error)), timeout=60)
    assert codes[1] == code and codes[0] not in (0, None)
    assert printed.format(victim=victim) in log.read_text()
