"""Runs cells one after another in one process, through the training scripts' functions."""

import argparse
import contextlib
import json
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

import train_caption
import train_nlvr
from configs import SCHEMAS, Place, read_med_config
from data.caption_dataset import CaptionTrainDataset
from data.records import read_references
from dimension.profile import load_profile
from engine.loading import move
from engine.loop import train
from engine.run import Run, Task, prepare_run, start
from engine.state import content_hash, vocabulary_hash
from engine.tasks import CAPTION, NLVR, ground_truth
from evaluation import metrics
from evaluation.captions import generate_captions
from evaluation.nlvr import count_correct
from evaluation.ptb import ptb_tokenize
from models.layers import prunable_layers
from pruners.sparsity import sparsity_report
from studies.grid import DENSE, Cell, Setting, Study, trainer_flags
from studies.weightings import write_weighting
from utils import UserError, write_json

CACHE_BYTES = 300e6  # of decoded images; cells of one seed read the same ones
TRAINERS = {"caption": (CAPTION, train_caption), "nlvr": (NLVR, train_nlvr)}


@dataclass
class Bench:
    """What the cells of a task share, so that it is loaded once.

    Attributes:
        model: on its device; each cell starts from `weights`.
        weights: the state_dict that cells start from, a copy.
        train_set: whose seed each cell sets.
        splits: held-out sets by name.
        validation: the part of the first one that scores cells.
        digests: of the content of what cells are computed from.
    """

    model: nn.Module
    weights: dict[str, torch.Tensor]
    train_set: Dataset
    splits: dict[str, Dataset]
    validation: Dataset
    digests: dict[str, str]


class Runner:
    """Runs cells; what cells of a task share is loaded for the first of them."""

    def __init__(self, study: Study, folder: Path, flags: Sequence[str] = ()):
        """Args: gets its digests; where the runs' folders go; the machine's flags of trainers."""
        self.study, self.folder, self.flags = study, folder, flags
        self.benches: dict[str, Bench] = {}

    def run_cell(self, cell: Cell) -> dict:
        """Trains and prunes, or goes on where a run of this cell was stopped; then scores.

        Returns:
            `loss` (mean over the validation's tokens or statements) and `CIDEr` or `accuracy`;
            `sparsity`: shares of zeros, overall, of vision and of language; `seconds` of the last
            sitting; and what `machine_of` tells.

        Raises:
            UserError: the setting, the data or the weights are wrong, or have changed.
            FloatingPointError: the training diverged.
            SystemExit: of `engine.loop.train`, after a signal; or a flag is wrong.
        """
        begun = time.monotonic()
        folder = self.folder / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        args = self.trainer_args(cell)  # argparse's message goes to the terminal
        with (
            open(folder / "output.txt", "a", buffering=1) as output,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            run, bench = self.prepare(cell, args)
            own = machine_of(run.process.device)
            start_anew_elsewhere(run, own)
            if cell.method != DENSE:
                train(run, bench.model, bench.train_set, bench.splits)
            scores = score(run, bench)
        sparsity = sparsity_report(prunable_layers(bench.model))
        return {
            **scores,
            "sparsity": {"overall": sparsity["overall"], **sparsity["by_modality"]},
            "seconds": round(time.monotonic() - begun, 3),
            **own,
        }

    def trainer_args(self, cell: Cell) -> argparse.Namespace:
        """The cell's flags as the training script reads them; writes its weighting's profile."""
        setting = self.study.settings[cell.task]
        path = self.folder / cell.name / "weighting.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        ids = load_profile(setting.id_profile)
        profile = write_weighting(path, cell.weighting, ids, cell.seed)
        _, script = TRAINERS[cell.task]
        return script.parse_args([*trainer_flags(cell, setting, self.folder, profile), *self.flags])

    def prepare(self, cell: Cell, args: argparse.Namespace) -> tuple[Run, Bench]:
        """The cell's run, and its task's bench with the model at the weights cells start from."""
        task, _ = TRAINERS[cell.task]
        if cell.task not in self.benches:
            self.benches[cell.task] = build_bench(args, task, self.study.settings[cell.task])
        bench = self.benches[cell.task]
        self.study.keep_digests(cell.task, bench.digests)
        run = start(args, task)
        run.layer_id = load_profile(run.id_profile) if run.id_profile else None
        bench.model.load_state_dict(bench.weights)
        bench.model.zero_grad()  # a cell that diverged leaves gradients that are NaN
        bench.train_set.seed = cell.seed
        return run, bench


def build_bench(args: argparse.Namespace, task: Task, setting: Setting) -> Bench:
    """Loads what the cells of a task share.

    Layers that the starting weights lack are drawn under one seed, so that cells start from the
    same weights whichever of them a process runs first.

    Args:
        args: of one of the cells.
        task: of the cells.
        setting: of the task.

    Raises:
        UserError: the setting, the data or the weights are wrong, or there are several processes.
    """
    args = argparse.Namespace(**vars(args) | {"seed": 0})
    run, model, train_set, splits = prepare_run(args, task)
    if run.process.world_size > 1:
        raise UserError("a cell runs in one process: give each a share with --cells I/N")
    cache_images(run, train_set, *splits.values())
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    validation = validation_set(run, splits[task.held_out[0]], setting.validation)
    digests = digests_of(run, setting, train_set, validation)
    return Bench(model, weights, train_set, splits, validation, digests)


def digests_of(
    run: Run, setting: Setting, train_set: Dataset, validation: Subset
) -> dict[str, str]:
    """What cells are computed from, to the digest of its content; places and machines aside.

    Args:
        run: of `prepare_run`.
        setting: of the task.
        train_set: with its records.
        validation: part of a held-out split.
    """
    places = {key for key, (rule, _) in SCHEMAS[run.task.name].items() if isinstance(rule, Place)}
    config = {k: v for k, v in run.config.items() if k not in places | {"num_workers"}}
    config["med_config"] = sorted(read_med_config(config["med_config"]).items())
    annotations = [*train_set.records, *validation.dataset.records]
    if run.task is CAPTION:
        annotations += read_references(ground_truth(run.config, run.task.held_out[0])).items()
    contents = {
        f"the config {setting.config}": sorted(config.items()),
        f"the ID profile {setting.id_profile}": sorted(load_profile(setting.id_profile).items()),
        "the annotations": annotations,
        "the tokenizer": vocabulary_hash(run.config["tokenizer"]),
    }
    digests = {name: content_hash(content) for name, content in contents.items()}
    if run.weights is not None and run.weights.is_file():
        digest = sha256()
        with open(run.weights, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        digests["the starting weights"] = digest.hexdigest()
    return digests


def machine_of(device: torch.device) -> dict:
    """On what the last digits depend: `processor`, `torch` and, of a CPU, `threads`."""
    machine = {"processor": processor_name(device), "torch": torch.__version__}
    return machine | ({"threads": torch.get_num_threads()} if device.type == "cpu" else {})


def start_anew_elsewhere(run: Run, machine: dict) -> None:
    """Removes the checkpoints of a run that another machine began, for a result is of one.

    Args:
        run: of a cell.
        machine: this one; written to the run's folder.
    """
    file = run.folder / "machine.json"
    if not file.exists() or json.loads(file.read_text()) != machine:
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        write_json(file, machine)


def cache_images(run: Run, train_set: Dataset, *held_out: Dataset) -> None:
    """Lets data sets keep the images that they decoded last, where one process reads them.

    Seeds and not cells choose the images, so that most are read many times. A training set does so
    only where images are not augmented: each look at one is another.
    """
    if run.loading_processes:
        return
    kept = int(CACHE_BYTES / (3 * run.config["image_size"] ** 2 * 4))
    for dataset in held_out if run.config["augment"] else (train_set, *held_out):
        dataset.open = lru_cache(maxsize=kept)(dataset.open)


def validation_set(run: Run, dataset: Dataset, samples: int) -> Dataset:
    """The first samples of a held-out split; 0 takes all."""
    return Subset(dataset, range(min(samples or len(dataset), len(dataset))))


@torch.no_grad()
def score(run: Run, bench: Bench) -> dict[str, float]:
    """Scores a model on the bench's validation samples; see `Runner.run_cell`."""
    bench.model.eval()
    device = run.process.device
    batch_size, workers = run.config["eval_batch_size"], run.loading_processes
    loader = partial(DataLoader, batch_size=batch_size, num_workers=workers)
    with run.autocast():
        if run.task is NLVR:
            correct = count_correct(bench.model, loader(bench.validation), device)
            loss = mean_loss(bench.model, loader(bench.validation), device)
            return {"loss": loss, "accuracy": correct / len(bench.validation)}
        results = generate_captions(bench.model, loader(bench.validation), run.config, device)
        references = read_references(ground_truth(run.config, run.task.held_out[0]))
        references = {r["image_id"]: references[r["image_id"]] for r in results}
        captioned = with_references(run, bench.validation, references)
        loss = mean_loss(bench.model, loader(captioned), device)
    return {"loss": loss, "CIDEr": cider(results, references)}


def with_references(run: Run, validation: Subset, references: dict) -> CaptionTrainDataset:
    """Each image of the validation once with each of its references, for the loss."""
    images = validation.dataset
    records = [
        {"image": images.records[index]["image"], "caption": caption}
        for index in validation.indices
        for caption in references[images.records[index]["image_id"]]
    ]
    prompt, words = run.config["prompt"], run.config["max_words"]
    pairs = CaptionTrainDataset(records, images.image_root, images.transform, prompt, words)
    pairs.open = images.open  # which keeps decoded images
    return pairs


@torch.no_grad()
def mean_loss(model: nn.Module, batches: DataLoader, device: torch.device) -> float:
    """The mean loss over all predicted tokens or statements of a data set.

    Args:
        model: in eval mode.
        batches: of inputs as in training.
        device: where the model is.
    """
    total, terms = 0.0, 0
    for batch in batches:
        inputs, of_batch = model.prepare(*batch)
        total += model(*move(inputs, device)).item() * of_batch
        terms += of_batch
    return total / terms


def cider(results: list[dict], references: dict[int, list[str]]) -> float:
    """CIDEr with the tokenizer in Python, so that machines with and without Java agree.

    Args:
        results: of `generate_captions`.
        references: by image id, in the order of the results.
    """
    tokens = {image: list(map(ptb_tokenize, texts)) for image, texts in references.items()}
    captions = {r["image_id"]: [ptb_tokenize(r["caption"])] for r in results}
    return metrics.cider(tokens, captions)["scores"]["CIDEr"]


def processor_name(device: torch.device) -> str:
    """What computes: its model, and the instructions that torch chose on a CPU."""
    if device.type != "cpu":
        return torch.get_device_module(device).get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"
