"""Whether IDs help to prune at once: Magnitude and Wanda, by profiles of IDs and by their controls.

    python -m benchmarks.oneshot texts --hf MINILM --captions CAPTIONS1 CAPTIONS2 \
        --ids ID/minilm --one_length ID/minilm_one          # line n of both is of one picture
    python -m benchmarks.oneshot pictures --hf DINO --pictures FOLDER --ids ID/dino
    python -m benchmarks.oneshot captions --ids configs/id/scenes_caption.json
    python -m benchmarks.oneshot retrieval --ids ID/clip    # embedded models, on drawn scenes

Each variant starts from the dense weights, is pruned by `pruners.oneshot.prune_` with 128 samples,
and is scored on others, sample by sample: "texts" by R@1, caption 1 of a picture finding its
caption 2; "pictures", averaged down to 112 pixels, by whether the nearest neighbour is the dense
model's; "captions" by CIDEr; "retrieval" by R@1, the mean of both directions. Intervals are of
95 %, over bootstrap samples of the samples; differences are paired. "shuffled" is the mean over
shuffles of the IDs over the layers. Scores are in percent; CIDEr, too. The last line is one JSON
document.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import compat  # noqa: F401

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoTokenizer

import prune
from benchmarks.timing import print_document
from configs import load_config
from data.images import find_pictures, open_image
from dimension.profile import load_profile
from engine import pruning
from engine.loading import EvalOptions
from engine.tasks import TASKS
from evaluation.captions import evaluate_captions
from models.hub import read_texts
from models.layers import modality
from pruners import oneshot

CALIBRATION = 144  # samples: 128, and 16 that are held out for the errors of the outputs
RESAMPLES = 4000
CONFIGS = {"captions": "configs/caption_demo.yaml", "retrieval": "configs/retrieval_demo.yaml"}
Batches = list[dict[str, Tensor]]
Evaluate = Callable[[], Tensor]  # a score of each sample (n,)
Work = tuple[pruning.Subject, Batches, Batches, Evaluate]  # batches: calibration, held out


def opened(*flags: str | Path) -> tuple[pruning.Subject, Batches, Batches]:
    """The model and the samples that prune.py takes with these flags."""
    others = ["-n", "256", "--sparsity", "0.5", "--out", "unused"]  # 16 of 256 are held out
    args = prune.parse_args([*map(str, flags), *others])
    config = None if args.hf else load_config(args.config, {"augment": False})
    device = torch.device("cpu")
    subject = pruning.open_hub(args, device) if args.hf else pruning.open_task(args, config, device)
    first, second = (list(DataLoader(rows, 8, collate_fn=subject.batch)) for rows in subject.rows)
    return subject, first[:16], second  # 128 samples calibrate


def texts(args: argparse.Namespace) -> Work:
    """A text encoder with mean pooling; pictures behind those that calibrate are the queries."""
    captions, apart = [read_texts(path) for path in args.captions], CALIBRATION // 2
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "captions.txt")
        file.write_text("\n".join([*captions[0][:apart], *captions[1][:apart]]))
        subject, *batches = opened("--hf", args.hf, "--texts", file)
    tokenizer = AutoTokenizer.from_pretrained(args.hf)
    both = [text for lines in captions for text in lines[: apart + args.samples]]
    order = sorted(range(len(both)), key=lambda i: len(tokenizer(both[i])["input_ids"]))
    ready = [
        tokenizer([both[i] for i in order[at : at + 32]], padding=True, return_tensors="pt")
        for at in range(0, len(order), 32)
    ]

    def evaluate() -> Tensor:
        found = []
        for batch in ready:
            mask = batch["attention_mask"][..., None]
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                states = subject.model(**batch).last_hidden_state.float()
            found.append(F.normalize((states * mask).sum(1)))
        first, second = torch.cat(found)[torch.tensor(order).argsort()].chunk(2)
        return ((first @ second.T).argmax(1) == torch.arange(len(first)))[apart:].double()

    return subject, *batches, evaluate


def pictures(args: argparse.Namespace) -> Work:
    """A vision transformer, by the nearest neighbours of its class tokens."""
    files = find_pictures([args.pictures])
    random.Random(0).shuffle(files)
    with tempfile.TemporaryDirectory() as folder:
        for file in files[:CALIBRATION]:
            Path(folder, file.name).symlink_to(file.resolve())
        subject, *batches = opened("--hf", args.hf, "--images", folder)
    for batch in (*batches[0], *batches[1]):
        batch["pixel_values"] = F.avg_pool2d(batch["pixel_values"], 2)
    processor = AutoImageProcessor.from_pretrained(args.hf)
    others = [open_image(file, on_white=True) for file in files[CALIBRATION:][: args.samples]]
    made = (processor(image, return_tensors="pt")["pixel_values"] for image in others)
    ready = torch.cat([F.avg_pool2d(pixels, 2) for pixels in made]).split(32)

    def nearest() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            found = [subject.model(part).last_hidden_state[:, 0] for part in ready]
        features = F.normalize(torch.cat(found).float())
        return (features @ features.T).fill_diagonal_(-1).argmax(1)

    dense: list[Tensor] = []

    def evaluate() -> Tensor:
        found = nearest()
        dense[:] = dense or [found]  # the first call's
        return (found == dense[0]).double()

    return subject, *batches, evaluate


def captions(args: argparse.Namespace) -> Work:
    """The embedded captioner."""
    work = opened("--config", CONFIGS["captions"])
    config = load_config(CONFIGS["captions"], {"num_workers": 0})
    dataset = TASKS["caption"].build_datasets(config)[2]
    dataset.keep_first(args.samples)

    def evaluate() -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            options = EvalOptions(config, results=Path(folder), samples=args.samples)
            evaluate_captions(work[0].model, dataset, "test", options)
            found = json.loads(Path(folder, "test_images.json").read_text())
        return torch.tensor([image["CIDEr"] for image in found]).double()

    return *work, evaluate


def retrieval(args: argparse.Namespace) -> Work:
    """The embedded CLIP; a sample is a picture with its texts."""
    work = opened("--config", CONFIGS["retrieval"])
    dataset = TASKS["retrieval"].build_datasets(load_config(CONFIGS["retrieval"], {}))[2]
    dataset.keep_first(args.samples)
    model, owner = work[0].model, dataset.image_of_text
    ids = model.tokenize([text for text, _ in dataset.texts])[0]
    images = torch.stack([dataset.load(row)[0] for row in range(len(dataset))])

    def evaluate() -> Tensor:
        seen = torch.cat([F.normalize(model.encode_image(part)) for part in images.split(64)])
        read = torch.cat([F.normalize(model.encode_text(part)) for part in ids.split(64)])
        similar = seen @ read.T
        of_images = owner[similar.argmax(1)] == torch.arange(len(seen))
        of_texts = (similar.argmax(0) == owner).double()
        of_texts = torch.zeros(len(seen)).double().index_add_(0, owner, of_texts)
        return (of_images + of_texts / owner.bincount()) / 2

    return *work, evaluate


def allocations(args: argparse.Namespace, names: list[str]) -> dict[str, list[dict | None]]:
    """Profiles by what they are; the score of an allocation is the mean over its profiles."""
    ids = {name: value for name, value in load_profile(args.ids).items() if name in names}
    found = {"uniform": [None], "ID": [ids]}
    if args.one_length:
        found["ID, one length"] = [load_profile(args.one_length)]
    found["1/ID"] = [{name: 1 / value for name, value in ids.items()}]
    kinds = {name: modality(name) for name in ids}
    if args.subject in CONFIGS:
        found["modality"] = [oneshot.modality_means(ids, kinds)]
    shuffled = [random.Random(n).sample([*ids.values()], len(ids)) for n in range(args.shuffles)]
    if shuffled:
        found["shuffled"] = [dict(zip(ids, values, strict=True)) for values in shuffled]
    return found


def interval(values: Tensor) -> list[float]:
    """The mean (n,), in percent, and the ends of its interval."""
    draws = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.manual_seed(0))
    ends = values[draws].mean(1).quantile(torch.tensor([0.025, 0.975]).double())
    return [round(100 * float(x), 2) for x in (values.mean(), *ends)]


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    """Scores the variants, and prints the document."""
    subject, batches, held_out, evaluate = SUBJECTS[args.subject](args)
    model, skip = subject.model, [*subject.untrained]
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    names = [*oneshot.find_layers(model, None, skip)[0]]
    profiles, rows = allocations(args, names), []
    start = evaluate()
    print(f"{len(names)} layers, {len(start)} samples, dense {interval(start)}", flush=True)
    options = {"skip": skip, "held_out": held_out, "run": subject.run}
    for percent in args.sparsities:
        for method in oneshot.METHODS:
            found: dict[str, Tensor] = {}
            for allocation, members in profiles.items():
                scores, errors = [], []
                for profile in members:
                    model.load_state_dict(dense)
                    pruned = oneshot.prune_(
                        model, batches, percent / 100, method, profile, **options
                    )
                    errors.append(fmean(pruned["errors"].values()))
                    scores.append(evaluate())
                found[allocation] = torch.stack(scores).mean(0)
                means = [round(100 * float(score.mean()), 2) for score in scores]
                row = {"sparsity": percent, "method": method, "allocation": allocation}
                row |= {"score": interval(found[allocation]), "error": round(fmean(errors), 4)}
                row |= {"range": [min(means), max(means)]} if len(means) > 1 else {}
                row["minus uniform"] = interval(found[allocation] - found["uniform"])
                if allocation == "shuffled":
                    row["ID minus shuffled"] = interval(found["ID"] - found["shuffled"])
                rows.append(row)
                print(json.dumps(row), flush=True)
    results = {"subject": args.subject, "model": Path(args.hf or CONFIGS[args.subject]).name}
    print_document("oneshot", **results, samples=len(start), dense=interval(start), rows=rows)


SUBJECTS = {work.__name__: work for work in (texts, pictures, captions, retrieval)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("subject", choices=SUBJECTS)
    add("--hf", help="texts, pictures: folder of the model")
    add("--captions", nargs=2, help="texts: two files, with a caption of each picture")
    add("--pictures", type=Path, help="pictures: their folder")
    add("--ids", required=True, help="profile of IDs")
    add("--one_length", help="profile of texts of one length")
    add("--samples", type=int, default=10**6, help="samples that are scored at most (all)")
    add("--sparsities", type=int, nargs="+", default=[30, 50, 60, 70], help="percent")
    add("--bf16", action="store_true", help="score in bfloat16; pruning stays in the model's type")
    add("--shuffles", type=int, default=8, help="shuffled profiles (8)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
