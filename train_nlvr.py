r"""Prunes BLIP's NLVR2 model while it is fine-tuned, and measures its accuracy.

    python -m torch.distributed.run --nproc_per_node=2 train_nlvr.py \
        --final_threshold 0.2 --model_dir nlvr/PLATON80 --pruner_name PLATON --useID
    python -m torch.distributed.run --nproc_per_node=2 train_nlvr.py \
        --pruned output/nlvr/PLATON80 --evaluate

On one CPU or GPU `python train_nlvr.py ...` does; `--config configs/nlvr_demo.yaml` takes the
embedded scenes.
"""

import argparse

from engine.flags import add_flags, read_experiment
from utils import launch, write_json


def main(args: argparse.Namespace) -> None:
    """Trains and prunes, or with --evaluate measures the accuracy of weights."""
    read_experiment(args, "nlvr")  # its mistakes do not wait for what takes seconds to import
    from engine.run import prepare_run
    from engine.tasks import NLVR

    run, model, train_set, splits = prepare_run(args, NLVR)
    if not args.evaluate:
        from engine.loop import train

        train(run, model, train_set, splits)
        return
    model.eval()
    accuracy = {
        split: NLVR.evaluate(run, model, dataset, split)["scores"]["accuracy"]
        for split, dataset in splits.items()
    }
    results = run.folder / "results" / "accuracy.json"
    if run.process.is_main:
        write_json(results, accuracy)
    run.say(f"accuracy: dev {accuracy['dev']:.4f}, test {accuracy['test']:.4f}\nwrote {results}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, "nlvr")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(main, parse_args())
