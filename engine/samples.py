"""A few pictures of an evaluated split with their captions, and the dense model's beside them."""

import json
from pathlib import Path

from torch.utils.data import DataLoader, Dataset, Subset

from engine.processes import main_process_first
from engine.run import Run
from engine.tasks import results_path
from evaluation.captions import generate_captions
from models.checkpoint import load_checkpoint
from models.weight_files import fetch
from reports.figures import contact_sheet


def find_dense(run: Run) -> Path | None:
    """The dense weights whose captions stand beside the pruned ones', if there are any.

    All processes call it, before the work: a download must not keep the others waiting later.
    """
    if not (run.args.pruned and run.config["pretrained"]):
        return None
    with main_process_first():
        return fetch(run.config["pretrained"])


def draw_samples(run: Run, dataset: Dataset, split: str, dense: Path | None) -> None:
    """Draws a few images of a split with their captions, and with the dense model's beside them.

    Args:
        run: of `prepare_run`, on the main process.
        dataset: the split, evaluated before.
        split: "val" or "test".
        dense: weights of `find_dense`.
    """
    samples = min(run.args.samples, len(dataset))
    captions = {"pruned": json.loads(results_path(run, split).read_text())}
    if dense is not None:
        model = run.task.build_model(run.config).eval().to(run.process.device)
        load_checkpoint(model, dense)
        drawn = Subset(dataset, [place * len(dataset) // samples for place in range(samples)])
        batches = DataLoader(drawn, run.config["eval_batch_size"])
        with run.autocast():
            of_dense = generate_captions(model, batches, run.config, run.process.device)
        captions = {"dense": of_dense, **captions}
    sheet = run.folder / "results" / f"{split}_samples.png"
    contact_sheet(dataset, captions, sheet, samples)
    print(f"samples: {sheet}", flush=True)
