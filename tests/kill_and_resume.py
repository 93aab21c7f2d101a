"""Kills training runs at random moments and resumes them: the weights must come out bit-equal.

python tests/kill_and_resume.py --kills 20 --processes 1
python tests/kill_and_resume.py --kills 10 --processes 2
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.runs import (
    finish,
    make_scenes,
    result,
    same,
    saved_steps,
    start,
    wait_for_step,
    write_config,
)


def kill_and_resume(
    config: str,
    folder: Path,
    world_size: int,
    kills: int,
    seed: int = 0,
    script: str = "train_caption",
) -> list[dict]:
    """Runs once undisturbed; then kills runs at random moments, resumes them and compares.

    Of several processes one is killed; the others must end by themselves within a minute.

    Returns:
        Of each killed run: the `step` of its newest checkpoint when it was dead, the seconds until
        all its processes had `ended`, and whether its result was `equal` in the end.
    """
    chance = random.Random(seed)
    argv = ["--config", config, "--output_dir", str(folder), "--warmup_steps", "4"]
    argv += ["--final_threshold", "0.3", "--checkpoint_steps", "3", "--eval_epochs", "0"]
    assert finish(start([*argv, "--model_dir", "whole"], world_size, script)) == [0] * world_size
    last_step = saved_steps(folder / "whole")[-1]
    expected, trials = result(folder / "whole"), []
    for number in range(kills):
        killed = folder / f"killed{number}"
        started = start([*argv, "--model_dir", killed.name], world_size, script)
        step, delay = chance.randint(0, last_step), chance.uniform(0, 0.5)
        victim = started[chance.randrange(world_size)]
        wait_for_step(killed, victim, step)
        time.sleep(delay)
        victim.kill()
        began = time.monotonic()
        assert None not in finish(started, timeout=60), "a process outlived the killed one"
        ended = time.monotonic() - began
        step = max(saved_steps(killed), default=0)
        codes = finish(start([*argv, "--model_dir", killed.name], world_size, script))
        equal = codes == [0] * world_size and same(result(killed), expected)
        trials.append({"step": step, "ended": round(ended, 1), "equal": equal})
    return trials


def main() -> None:
    """Prints the trials and their count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = write_config(folder / "config.yaml", make_scenes(folder / "scenes"), num_workers=1)
        trials = kill_and_resume(config, folder, args.processes, args.kills, args.seed)
    for trial in trials:
        print(trial)
    print(f"{sum(trial['equal'] for trial in trials)} of {len(trials)} resumed bit-equal")


if __name__ == "__main__":
    main()
