"""The tasks. A new one is its own files, its keys in `configs.SCHEMAS`, and one record here."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module


def later(place: str) -> Callable:
    """The function "module:name", imported when it is called: mistakes do not wait for torch."""
    module, name = place.split(":")
    return lambda *args, **options: getattr(import_module(module), name)(*args, **options)


@dataclass(frozen=True)
class Task:
    """What sets one task apart from another.

    Attributes:
        build_datasets: (config, seed) -> training set and the two held-out sets.
        build_model: config -> model with random weights. `model.prepare(*inputs)` turns a training
            batch into the arguments of `model(...)`, which returns the mean loss, and counts its
            terms; `model.count_cut(texts)` counts the texts longer than `model.max_tokens`.
            Optional: `model.on_step(epochs done, parts)` comes before each step,
            `model.check_batch(samples)` with the global batch before the first.
        evaluate: (model in eval mode, held-out set, its name, `engine.loading.EvalOptions`) ->
            report with "scores" by name on the main process at least, and "notes" (sentences).
    """

    name: str  # key of `configs.SCHEMAS`
    script: str  # file that trains and evaluates it
    config: str  # default of --config
    warmups: tuple[int, int]  # defaults of --initial_warmup and --final_warmup
    held_out: tuple[str, str]  # names of the held-out splits; the first validates
    best_by: str  # score, the higher the better, that chooses among the epochs' weights
    results: tuple[str, str]  # file of an evaluation, "" for none; its one score, "" for all
    images: tuple[str, ...]  # names of the model's image inputs
    tokens: int | None  # text length of the published multiply-adds; None: `context_length`
    build_datasets: Callable
    build_model: Callable
    evaluate: Callable


CAPTION = Task(
    name="caption",
    script="train_caption.py",
    config="configs/caption_coco.yaml",
    warmups=(1, 1),
    held_out=("val", "test"),
    best_by="CIDEr",
    results=("", ""),
    images=("image",),
    tokens=15,
    build_datasets=later("data.caption_dataset:build_caption_datasets"),
    build_model=later("models.captioner:build_captioner"),
    evaluate=later("evaluation.captions:evaluate_captions"),
)
NLVR = Task(
    name="nlvr",
    script="train_nlvr.py",
    config="configs/nlvr.yaml",
    warmups=(0, 5),
    held_out=("dev", "test"),
    best_by="accuracy",
    results=("accuracy.json", "accuracy"),
    images=("image0", "image1"),
    tokens=36,
    build_datasets=later("data.nlvr_dataset:build_nlvr_datasets"),
    build_model=later("models.nlvr:build_nlvr"),
    evaluate=later("evaluation.nlvr:evaluate_statements"),
)
RETRIEVAL = Task(
    name="retrieval",
    script="train_clip_flickr30k.py",
    config="configs/retrieval_flickr_clip.yaml",
    warmups=(0, 2),
    held_out=("val", "test"),
    best_by="r_mean",
    results=("recalls.json", ""),
    images=("image",),
    tokens=None,
    build_datasets=later("data.flickr_dataset:build_flickr_datasets"),
    build_model=later("models.clip:build_clip"),
    evaluate=later("evaluation.retrieval:evaluate_retrieval"),
)
TASKS = {task.name: task for task in (CAPTION, NLVR, RETRIEVAL)}
