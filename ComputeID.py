"""Measures the intrinsic dimension (ID) of every layer of a captioner or an NLVR2 model.

    python ComputeID.py -n 2000 --Path ID/Blip_coco --cpu          # or --gpu 0
    python ComputeID.py -n 500 --Path ID/demo --config configs/caption_demo.yaml
    python -m torch.distributed.run --nproc_per_node=2 ComputeID.py -n 2000 --Path ID/Blip_coco
    python ComputeID.py -s --Path ID/Blip_coco --fraction 0.9      # after --save_distances

Writes to --Path: profile.json (for --id_profile of the training scripts), the original's ID.txt,
result_id.txt, result_bar.txt and dim.txt, and figures. A run that was stopped goes on where it was
when the same command is given again.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data import build_caption_datasets, build_nlvr_datasets
from dimension.budget import Plan, make_plan, share_layers
from dimension.capture import Capture, Samples, counted_positions, trace_stages
from dimension.figures import plot_comparison, plot_depth, plot_scale
from dimension.profile import (
    IDProfile,
    LayerID,
    PartialProfile,
    clear_distances,
    load_distances,
    load_profile,
    measure_layer,
    model_hash,
    partial_profiles,
    save_distances,
)
from dimension.twonn import draw_permutations
from engine.run import launch
from models import build_captioner, build_nlvr, load_checkpoint, prunable_layers
from utils import Process, UserError, barrier, init_distributed, keep_freed_memory, load_config

DATA_KEYS = ("image_root", "ann_root", "image_size", "prompt", "max_words", "tokenizer")
TASKS = {
    "caption": (build_caption_datasets, build_captioner, ("image",), "batch_size"),
    "nlvr": (build_nlvr_datasets, build_nlvr, ("image0", "image1"), "batch_size_test"),
}
SHARE_OF_FREE = {"cpu": 0.5, "cuda": 0.8}
A_DAY = 86400.0  # seconds for which a process may wait for the others


class Images(Sequence):
    """One image of each of some samples of a data set, transformed as for evaluation."""

    def __init__(self, dataset, indices: list[int], which: int):
        """Args: a training set without augmentation; the samples; 0 or, of a pair, 1."""
        self.dataset, self.indices, self.which = dataset, indices, which

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.indices)

    def __getitem__(self, position: int) -> Tensor:
        """(3, S, S)."""
        paths = self.dataset.image_paths(self.indices[position])
        return self.dataset.open(paths[self.which])


def build_samples(
    args: argparse.Namespace, config: dict, model: nn.Module, dataset, images: tuple[str, ...]
) -> Samples:
    """A seeded random choice of samples, as the model's inputs.

    Args:
        args: flags.
        config: of the model and its data.
        model: its tokenizer is used.
        dataset: training set.
        images: names of the model's image inputs.

    Raises:
        ValueError: the data set has fewer samples.
    """
    if args.nsamples > len(dataset):
        raise UserError(f"-n {args.nsamples}: the training set has only {len(dataset)} samples")
    generator = torch.Generator().manual_seed(args.seed)
    indices = torch.randperm(len(dataset), generator=generator)[: args.nsamples].tolist()
    ids, mask = model.tokenize([dataset.text(index) for index in indices])
    return Samples(
        tensors={"input_ids": ids, "attention_mask": mask},
        images={name: Images(dataset, indices, which) for which, name in enumerate(images)},
        counted=counted_positions(mask, args.batch_size, args.keep_padding),
        batch_size=args.batch_size,
        num_workers=config["num_workers"],
    )


def free_memory(device: torch.device) -> int:
    """Bytes free on the device; on the CPU, for each of this machine's processes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    return kilobytes * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def estimate(
    args: argparse.Namespace, capture: Capture, partial: PartialProfile
) -> dict[str, LayerID]:
    """Runs this process's share; returns its layers and those found finished."""
    permutations = block_permutations(args)
    for layer, distances in capture:
        features = layer.tokens * layer.width
        measured = measure_layer(layer.name, features, distances, args.fraction, permutations)
        if args.save_distances:
            save_distances(args.Path, layer.name, distances)
        partial.add(layer.name, measured)
    return partial.found | partial.mine


def block_permutations(args: argparse.Namespace) -> Tensor:
    """The same blocks for all layers; samples and blocks have different random numbers."""
    return draw_permutations(args.nsamples, torch.Generator().manual_seed(args.seed + 1))


def measure(args: argparse.Namespace) -> IDProfile | None:
    """Measures a model; returns its profile on the main process, None on the others."""
    config = load_config(args.config, {"pretrained": args.pretrained, "augment": False})
    process = init_distributed(chosen_device(args), timeout_s=A_DAY)
    keep_freed_memory(process.device)
    build_datasets, build_model, images, batch_key = TASKS[config["task"]]
    args.batch_size = args.batch_size or config[batch_key]
    dataset = build_datasets(config, args.seed)[0]
    dataset.check()
    model = build_model(config)
    weights = load_weights(model, args.pruned or config["pretrained"])
    say(process, weights)
    model.to(process.device).eval()
    samples = build_samples(args, config, model, dataset, images)
    settings = {
        "nsamples": args.nsamples,
        "seed": args.seed,
        "fraction": args.fraction,
        "keep_padding": args.keep_padding,
        "batch_size": args.batch_size,
        "save_distances": args.save_distances,
        "config": {key: config[key] for key in ("task", "vit", *DATA_KEYS) if key in config},
        "checkpoint": args.pruned or config["pretrained"],
        "checkpoint_sha256": model_hash(model),
    }
    partial = PartialProfile(args.Path, settings, process.rank)
    capture = prepare(args, process, model, samples, partial)
    barrier()  # all have read what an earlier run left
    if process.is_main and not partial.found:  # nothing of a run with other settings may stay
        partial.clear()
        if args.save_distances:
            clear_distances(args.Path)
    barrier()  # before any process writes
    try:
        results = estimate(args, capture, partial)
    except ValueError as error:
        if not process.is_main:  # whose layers are its own; `launch` speaks for the main one only
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise
    if process.world_size > 1:
        everyone: list = [None] * process.world_size
        dist.all_gather_object(everyone, results)
        results = {name: layer for one in everyone for name, layer in one.items()}
    if not process.is_main:
        return None
    profile = IDProfile(settings, {name: results[name] for name in prunable_layers(model)})
    profile.write(args.Path)
    partial.clear()
    return profile


def load_weights(model: nn.Module, path: str) -> str:
    """Loads trained weights; returns a line that says what became of them."""
    if not path:
        raise UserError("nothing to measure: give --pretrained or --pruned")
    report = load_checkpoint(model, path)
    if report.initialised:
        raise UserError(f"{path} is a start for training: it lacks {report.initialised}")
    return str(report)


def prepare(
    args: argparse.Namespace,
    process: Process,
    model: nn.Module,
    samples: Samples,
    partial: PartialProfile,
) -> Capture:
    """Plans this process's share of the layers that are not finished, and prints the plan."""
    layers = prunable_layers(model)
    budget = args.memory_gb and int(args.memory_gb * 1e9)
    if budget is None:
        free = free_memory(process.device)
        budget = int(SHARE_OF_FREE[process.device.type] * free)
        say(process, f"--memory_gb {budget / 1e9:.2f} of {free / 1e9:.2f} GB free for a process")
    shapes = trace_stages(model.stages(), layers, samples, process.device)
    todo = set(layers) - set(partial.found)
    share = share_layers(shapes, todo, process.world_size)[process.rank]
    plan: Plan = make_plan(shapes, share, samples.sizes(), len(samples), samples.batch_size, budget)
    say(
        process,
        f"{len(samples)} samples, {len(layers)} layers, {len(partial.found)} of them done before, "
        f"{len(share)} for this process of {process.world_size}\n{plan}",
    )
    return Capture(plan, layers, samples, process.device, progress=process.is_main)


def estimate_again(args: argparse.Namespace) -> IDProfile:
    """Other IDs from the distances that an earlier run kept, without the model.

    Raises:
        ValueError: it kept none, or a later run has begun to replace them.
    """
    before = IDProfile.read(args.Path)
    if any(profile.settings["save_distances"] for _, profile in partial_profiles(args.Path)):
        raise UserError(
            f"a later run in {args.Path} has not finished and may have replaced distances: give "
            "its command again, then -s"
        )
    if not before.settings.get("save_distances"):  # any that are there belong to another run
        raise UserError(f"-s needs a profile measured with --save_distances; {args.Path} is not")
    args.nsamples = before.settings["nsamples"]
    permutations = block_permutations(args)
    layers = {
        name: measure_layer(
            name, layer.features, load_distances(args.Path, name), args.fraction, permutations
        )
        for name, layer in before.layers.items()
    }
    settings = before.settings | {"fraction": args.fraction, "block_seed": args.seed}
    profile = replace(before, settings=settings, layers=layers)
    profile.write(args.Path)
    return profile


def chosen_device(args: argparse.Namespace) -> str:
    """The device for `init_distributed`; under torchrun every process has a GPU of its own."""
    if args.cpu:
        return "cpu"
    if args.gpu is None:
        return "auto"
    return "cuda" if "WORLD_SIZE" in os.environ else f"cuda:{args.gpu}"


def say(process: Process, text: str) -> None:
    """Prints on the main process."""
    if process.is_main:
        print(text, flush=True)


def draw(args: argparse.Namespace, profile: IDProfile) -> None:
    """Draws the figures and says where they are."""
    folder = Path(args.Path)
    plot_depth(profile, folder / "ID.png")
    plot_scale(profile, folder / "scale.png")
    if args.compare:
        others = {path: load_profile(path) for path in args.compare}
        mine = {name: layer.id for name, layer in profile.layers.items()}
        plot_comparison({str(folder): mine} | others, folder / "compare.png")
    for kind in ("visual_encoder", "text_"):
        ids = [layer.id for name, layer in profile.layers.items() if name.startswith(kind)]
        print(f"{kind.rstrip('_')}: {len(ids)} layers, mean ID {sum(ids) / len(ids):.2f}")
    print(f"wrote {folder}/profile.json, ID.png, scale.png")


def main(args: argparse.Namespace) -> None:
    """Measures or estimates again, then draws."""
    for path in args.compare:
        load_profile(path)  # a mistake here must not wait for the end
    profile = estimate_again(args) if args.skip else measure(args)
    if profile is not None:
        draw(args, profile)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-n", "--nsamples", type=int, default=2000, help="samples of the training set")
    add("--Path", default="ID/Blip_coco", help="folder for the results")
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--cpu", action="store_true")
    device.add_argument("--gpu", type=int, metavar="N", help="which GPU; default: one if present")
    add("-s", "--skip", action="store_true", help="no model: estimate again from kept distances")
    add("--save_distances", action="store_true", help="keep distances for -s, 4 n^2 bytes a layer")
    add("--fraction", type=float, default=1.0, help="of the points that is fitted, in (0, 1]")
    add("--keep_padding", action="store_true", help="as the original: a batch's padding counts")
    add("--memory_gb", type=float, help="for activations, states and matrices of each process")
    add("--compare", nargs="+", default=[], metavar="PROFILE", help="profiles to overlay")
    add("--batch_size", type=int, help="samples in a forward pass; default: the config's")
    add("--seed", type=int, default=0, help="of samples and blocks")
    add("--config", default="configs/caption_coco.yaml")
    add("--pretrained", help="weights instead of the config's")
    add("--pruned", help="measure pruned weights (a file, or the folder of a pruning run)")
    args = parser.parse_args(argv)
    if args.nsamples < 3:
        parser.error("-n: three samples are the least that have an ID, and 2000 are usual")
    if not 0 < args.fraction <= 1:
        parser.error("--fraction is a share of the points, in (0, 1]")
    if args.batch_size is not None and args.batch_size < 1:
        parser.error("--batch_size must be at least 1")
    return args


if __name__ == "__main__":
    launch(main, parse_args())
