"""The tasks. A new one is an entry of TASKS."""

from pathlib import Path

from torch import nn
from torch.utils.data import Dataset

from data.caption_dataset import build_caption_datasets
from data.flickr_dataset import build_flickr_datasets
from data.nlvr_dataset import build_nlvr_datasets
from engine.loading import EvalBatches
from engine.processes import sum_over_processes
from engine.run import Run, Task
from evaluation.captions import caption_split
from evaluation.nlvr import count_correct
from evaluation.retrieval import recalls, retrieval_features
from evaluation.scoring import score_results
from models.captioner import build_captioner
from models.clip import build_clip
from models.nlvr import build_nlvr


def evaluate_captions(run: Run, model: nn.Module, dataset: Dataset, split: str) -> dict:
    """Captions a split over all processes, writes the captions, then scores them.

    Args:
        run: of `prepare_run`.
        model: captioner in eval mode, not wrapped.
        dataset: the split.
        split: "val" or "test".

    Returns:
        The report of `evaluation.score_results`; on processes other than the main one no scores.
    """
    results = results_path(run, split)
    with run.autocast():
        caption_split(model, EvalBatches(run, dataset), run.config, run.process.device, results)
    if not run.process.is_main:
        return {"scores": {}}
    slow = run.args.evaluate  # METEOR takes seconds to start; a validation goes without
    return score_results(results, ground_truth(run.config, split), run.args.spice, meteor=slow)


def results_path(run: Run, split: str) -> Path:
    """The file of a split's captions."""
    return run.folder / "results" / f"{split}.json"


def ground_truth(config: dict, split: str) -> Path:
    """The file of a split's references."""
    return Path(config["coco_gt_root"], f"coco_karpathy_{split}_gt.json")


def evaluate_statements(run: Run, model: nn.Module, dataset: Dataset, split: str) -> dict:
    """The share of a split's statements that are judged correctly, counted over all processes.

    Args:
        run: of `prepare_run`.
        model: NLVR2 model in eval mode, not wrapped.
        dataset: the split; each statement is judged by one process, however uneven the shares.
        split: "dev" or "test".

    Returns:
        `{"scores": {"accuracy": fraction in [0, 1]}}`, the same on every process.
    """
    with run.autocast():
        correct = count_correct(model, EvalBatches(run, dataset), run.process.device)
    (all_correct,) = sum_over_processes([correct])
    return {"scores": {"accuracy": all_correct / len(dataset)}}


def evaluate_retrieval(run: Run, model: nn.Module, dataset: Dataset, split: str) -> dict:
    """Recalls among all images and all texts of a split.

    Args:
        run: of `prepare_run`.
        model: CLIP in eval mode, not wrapped.
        dataset: the split's images and texts; each is encoded by one process.
        split: "val" or "test".

    Returns:
        `{"scores": ...}` of `evaluation.retrieval.recalls`, the same on every process.
    """
    images, texts = EvalBatches(run, dataset), EvalBatches(run, dataset.texts)
    with run.autocast():
        image, text = retrieval_features(model, images, texts, run.process.device)
    return {"scores": recalls(image @ text.T, dataset.image_of_text)}


CAPTION = Task(
    name="caption",
    script="train_caption.py",
    build_datasets=build_caption_datasets,
    held_out=("val", "test"),
    build_model=build_captioner,
    images=("image",),
    evaluate=evaluate_captions,
    best_by="CIDEr",
)
NLVR = Task(
    name="nlvr",
    script="train_nlvr.py",
    build_datasets=build_nlvr_datasets,
    held_out=("dev", "test"),
    build_model=build_nlvr,
    images=("image0", "image1"),
    evaluate=evaluate_statements,
    best_by="accuracy",
)
RETRIEVAL = Task(
    name="retrieval",
    script="train_clip_flickr30k.py",
    build_datasets=build_flickr_datasets,
    held_out=("val", "test"),
    build_model=build_clip,
    images=("image",),
    evaluate=evaluate_retrieval,
    best_by="r_mean",
)
TASKS = {task.name: task for task in (CAPTION, NLVR, RETRIEVAL)}
