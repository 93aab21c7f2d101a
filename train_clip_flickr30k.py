r"""Prunes CLIP while it is fine-tuned for retrieval, and measures its recalls.

    python -m torch.distributed.run --nproc_per_node=2 train_clip_flickr30k.py \
        --final_threshold 0.2 --model_dir flickr_clip/PLATONID80 --pruner_name PLATON --useID
    python -m torch.distributed.run --nproc_per_node=2 train_clip_flickr30k.py \
        --pruned output/flickr_clip/PLATONID80 --evaluate

On one CPU or GPU `python train_clip_flickr30k.py ...` does; `--config
configs/retrieval_demo.yaml` takes the embedded scenes.
"""

import argparse
import json

from engine.flags import add_flags, read_experiment
from utils import launch, write_json


def main(args: argparse.Namespace) -> None:
    """Trains and prunes, or with --evaluate measures the recalls of weights."""
    read_experiment(args, "retrieval")  # its mistakes do not wait for what takes seconds to import
    from engine.run import prepare_run
    from engine.tasks import RETRIEVAL

    run, model, train_set, splits = prepare_run(args, RETRIEVAL)
    if not args.evaluate:
        from engine.loop import train

        train(run, model, train_set, splits)
        return
    model.eval()
    scores = {
        split: RETRIEVAL.evaluate(run, model, dataset, split)["scores"]
        for split, dataset in splits.items()
    }
    results = run.folder / "results" / "recalls.json"
    if run.process.is_main:
        write_json(results, scores)
    for split, recalls in scores.items():
        run.say(f"{split}: {json.dumps(recalls)}")
    run.say(f"wrote {results}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, "retrieval")
    for flag in (
        "--use_ceph",
        "--w_sp_attn",
        "--w_sp_mlp",
    ):  # of the original, where they do nothing
        parser.add_argument(flag, nargs="?", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(main, parse_args())
