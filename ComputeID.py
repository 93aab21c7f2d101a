"""Measures the intrinsic dimension (ID) of every layer of a captioner, an NLVR2 model or CLIP.

    python ComputeID.py -n 2000 --Path ID/Blip_coco --cpu          # or --gpu 0
    python ComputeID.py -n 500 --Path ID/demo --config configs/caption_demo.yaml
    python -m torch.distributed.run --nproc_per_node=2 ComputeID.py -n 2000 --Path ID/Blip_coco
    python ComputeID.py --hf openai/clip-vit-base-patch32 --images pictures --texts captions.txt
    python ComputeID.py -s --Path ID/Blip_coco --fraction 0.9      # after --save_distances

Writes to --Path: profile.json (for --id_profile of the training scripts), the original's ID.txt,
result_id.txt, result_bar.txt and dim.txt, and figures. A run that was stopped goes on where it was
when the same command is given again, but for one with --hf. That measures any model of Hugging
Face's, by its name or in a folder, on pictures and, where it takes texts, on a text for each.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from configs import load_config
from engine.profile_flags import check_profile_flags, parse_profile_flags
from utils import UserError, available_cpus, launch

if __name__ == "__main__":  # before what takes seconds to import, for mistakes do not wait for it
    ARGS = parse_profile_flags(__doc__)
    launch(check_profile_flags, ARGS)

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from data.image_dataset import ImageDataset
from data.images import find_pictures
from dimension.any_model import choose_layers
from dimension.any_model import measure as measure_any
from dimension.budget import default_budget, plan_capture, share_layers
from dimension.capture import Capture, Samples, counted_positions, trace_stages
from dimension.figures import plot_comparison, plot_depth, plot_scale, save_figure
from dimension.profile import (
    IDProfile,
    LayerID,
    PartialProfile,
    block_permutations,
    clear_distances,
    load_distances,
    load_kinds,
    load_profile,
    make_remarks,
    measure_layer,
    model_hash,
    partial_profiles,
    save_distances,
)
from dimension.twonn import ENOUGH_POINTS
from engine.processes import (
    Process,
    barrier,
    free_memory,
    init_distributed,
    keep_freed_memory,
    main_process_first,
)
from engine.tasks import TASKS
from models.checkpoint import load_trained
from models.hub import HubInputs, check_forward, layer_kinds, open_hub_model, read_texts
from models.layers import modality, prunable_layers
from models.weight_files import fetch

# of a config: what the representations depend on
MODEL_AND_DATA_KEYS = (
    "task vit clip image_size tokenizer image_root ann_root prompt max_words max_tokens"
).split()
HUB_BATCH_SIZE = 8
PATIENCE_S = 86400.0  # a process may wait so long for the others, which have layers of their own


class Images(Sequence):
    """One image of each of some samples of a data set, transformed as for evaluation."""

    def __init__(self, dataset: Dataset, indices: list[int], which: int):
        """Reads nothing yet.

        Args:
            dataset: training set without augmentation.
            indices: of the samples.
            which: 0, or 1 for the second image of a pair.
        """
        self.dataset, self.indices, self.which = dataset, indices, which

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.indices)

    def __getitem__(self, position: int) -> Tensor:
        """Reads an image (3, S, S)."""
        paths = self.dataset.image_paths(self.indices[position])
        return self.dataset.open(paths[self.which])


def choose_samples(dataset: ImageDataset, n: int, seed: int) -> tuple[list[int], int]:
    """Indices of n random samples, and how many had to be passed over for them.

    With `dataset.skip_bad_images` the images are read once for it: a sample with one that cannot
    be read gives way to the next of the random order.

    Raises:
        UserError: there are fewer samples.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator).tolist()
    chosen = order[:n]
    seen = len(chosen)
    if dataset.skip_bad_images:
        chosen, seen = [], 0
        with ThreadPoolExecutor(available_cpus()) as pool:
            while len(chosen) < n and seen < len(order):
                tried = order[seen : seen + n - len(chosen)]
                good = pool.map(dataset.is_readable, tried)
                chosen += [index for index, ok in zip(tried, good, strict=True) if ok]
                seen += len(tried)
    if len(chosen) < n:
        bad = len(order) - len(chosen) if dataset.skip_bad_images else 0
        damaged = f", of which {bad} have images that cannot be read" if bad else ""
        raise UserError(f"-n {n}: the training set has only {len(order)} samples{damaged}")
    return chosen, seen - n


def build_samples(
    dataset: Dataset,
    indices: list[int],
    tokenize: Callable[[list[str]], tuple[Tensor, Tensor]],
    images: tuple[str, ...],
    batch_size: int,
    keep_padding: bool,
    num_workers: int,
) -> Samples:
    """Some samples of a training set as a model's inputs.

    Args:
        dataset: training set without augmentation.
        indices: of the samples.
        tokenize: from texts to token ids and attention mask, both (n, L).
        images: names of the model's image inputs.
        batch_size: in samples.
        keep_padding: see `counted_positions`.
        num_workers: processes that read images.
    """
    ids, mask = tokenize([dataset.text(index) for index in indices])
    return Samples(
        tensors={"input_ids": ids, "attention_mask": mask},
        images={name: Images(dataset, indices, which) for which, name in enumerate(images)},
        counted=counted_positions(mask, batch_size, keep_padding),
        batch_size=batch_size,
        num_workers=num_workers,
    )


def require_writable(folder: Path) -> None:
    """Makes the folder of the results and tries to write to it, before the work for them begins.

    Raises:
        UserError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write to --Path {folder}: {error}; choose another") from error


def chosen_device(cpu: bool, gpu: int | None) -> str:
    """The device for `init_distributed`, from --cpu and --gpu.

    Raises:
        UserError: one GPU is named for several processes.
    """
    if cpu:
        return "cpu"
    if gpu is None:
        return "auto"
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UserError(f"--gpu {gpu}: torchrun gives every process a GPU; leave --gpu out")
    present = torch.accelerator.current_accelerator(check_available=True)
    return f"{present.type if present else 'cuda'}:{gpu}"


def print_once(process: Process, text: str) -> None:
    """Prints on the main process."""
    if process.is_main:
        print(text, flush=True)


def plan_share(
    process: Process, model: nn.Module, samples: Samples, done: set[str], memory_gb: float | None
) -> Capture:
    """Plans this process's share of the layers that are not done, and prints the plan.

    Args:
        process: this one.
        model: in eval mode, on the process's device.
        samples: what it sees.
        done: names of layers.
        memory_gb: for activations, states and matrices; None: a share of what is free.
    """
    layers, device = prunable_layers(model), process.device
    if memory_gb is None:
        free = free_memory(device)
        memory_gb = default_budget(device) / 1e9
        print_once(process, f"--memory_gb {memory_gb:.2f} of {free / 1e9:.2f} GB free per process")
    shapes = trace_stages(model.stages(), layers, samples, device)
    share = share_layers(shapes, set(layers) - done, process.world_size)[process.rank]
    n, budget = len(samples), int(memory_gb * 1e9)
    plan = plan_capture(shapes, share, samples.sizes(), n, samples.batch_size, budget)
    print_once(
        process,
        f"{n} samples, {len(layers)} layers, {len(done)} of them done before, "
        f"{len(share)} for this process of {process.world_size}\n{plan}",
    )
    return Capture(plan, layers, samples, device, progress=process.is_main)


def clear_other_runs(process: Process, partial: PartialProfile, distances: bool) -> None:
    """Removes what a run with other settings left, unless this run goes on where it was.

    Args:
        process: of which the main one removes, while the others wait.
        partial: what was found of this run.
        distances: whether to remove kept distances, which this run will replace.
    """
    barrier()  # all processes have read what is there
    if process.is_main and not partial.found:
        partial.clear()
        if distances:
            clear_distances(partial.folder)
    barrier()  # before any process writes


def estimate(
    capture: Capture, permutations: Tensor, fraction: float, partial: PartialProfile, keep: bool
) -> dict[str, LayerID]:
    """Measures the layers of a capture, and writes each as soon as it is finished.

    Args:
        capture: of this process's share.
        permutations: (20, n), see `block_analysis`.
        fraction: of the points, see `estimate_id`.
        partial: gets the layers.
        keep: whether to keep distances in its folder.

    Returns:
        These layers and those that were found finished.
    """
    for layer, distances in capture:
        measured = measure_layer(layer.name, layer.features, distances, fraction, permutations)
        if keep:
            save_distances(partial.folder, layer.name, distances)
        partial.add(layer.name, measured)
    return partial.found | partial.mine


def gather_layers(process: Process, mine: dict[str, LayerID]) -> dict[str, LayerID]:
    """The layers of all processes."""
    if process.world_size == 1:
        return mine
    everyone: list = [None] * process.world_size
    dist.all_gather_object(everyone, mine)
    return {name: layer for one in everyone for name, layer in one.items()}


def measure(
    folder: Path,
    config: dict,
    weights: str,
    device: str,
    *,
    n: int,
    batch_size: int,
    fraction: float,
    keep_padding: bool,
    skip_bad_images: bool,
    keep_distances: bool,
    memory_gb: float | None,
    seed: int,
) -> IDProfile | None:
    """Measures the layers of trained or pruned weights, with the samples of a training set.

    Args:
        folder: of the results.
        config: of the model and its data.
        weights: a file, the folder of a run, or an address.
        device: see `init_distributed`.
        n: samples.
        batch_size: samples in a forward pass.
        fraction: of the points, see `estimate_id`.
        keep_padding: see `counted_positions`.
        skip_bad_images: whether other samples stand for those that cannot be read.
        keep_distances: whether to keep all layers' distances for `estimate_again`.
        memory_gb: see `plan_share`.
        seed: of the choice of samples and of the blocks.

    Returns:
        The profile, which is written, on the main process; None on the others.
    """
    require_writable(folder)
    process = init_distributed(device, timeout_s=PATIENCE_S)
    keep_freed_memory(process.device)
    task = TASKS[config["task"]]
    dataset = task.build_datasets(config, seed)[0]
    dataset.skip_bad_images = skip_bad_images
    dataset.check()
    indices, bad = choose_samples(dataset, n, seed)
    model = task.build_model(config)
    with main_process_first():  # which downloads, where it is an address
        fetch(weights)
    print_once(process, str(load_trained(model, weights)))
    model.to(process.device).eval()
    samples = build_samples(
        dataset,
        indices,
        model.tokenize,
        task.images,
        batch_size,
        keep_padding,
        config["num_workers"],
    )
    settings = {  # all that the IDs depend on
        "nsamples": n,
        "bad_images": bad,
        "seed": seed,
        "fraction": fraction,
        "enough_points": ENOUGH_POINTS,
        "keep_padding": keep_padding,
        "batch_size": batch_size,
        "device": process.device.type,
        "dtype": "float32",
        "save_distances": keep_distances,
        "config": {key: config[key] for key in MODEL_AND_DATA_KEYS if key in config},
        "checkpoint": weights,
        "checkpoint_sha256": model_hash(model),
    }
    partial = PartialProfile(folder, settings, process.rank)
    capture = plan_share(process, model, samples, set(partial.found), memory_gb)
    clear_other_runs(process, partial, keep_distances)
    permutations = block_permutations(n, seed)
    found = estimate(capture, permutations, fraction, partial, keep_distances)
    found = gather_layers(process, found)
    if not process.is_main:
        return None
    layers = {name: found[name] for name in prunable_layers(model)}
    profile = IDProfile(settings, layers, make_remarks(n, layers, bad))
    profile.write(folder)
    partial.clear()
    return profile


def measure_hub(
    folder: Path,
    name: str,
    images: str | None,
    texts: str | None,
    device: str,
    *,
    n: int,
    batch_size: int,
    fraction: float,
    memory_gb: float | None,
    seed: int,
) -> IDProfile:
    """Measures the linear layers of any model of Hugging Face's.

    Args:
        folder: of the results.
        name: of a folder, or on the hub.
        images: folder of pictures; None for a model of texts.
        texts: file with a text on each line; None for a model of images.
        device: see `init_distributed`.
        n: samples at most; of more, random ones are taken.
        batch_size: samples in a forward pass.
        fraction: of the points, see `estimate_id`.
        memory_gb: see `dimension.measure`.
        seed: of the choice of samples and of the blocks.

    Returns:
        The profile, which is written.

    Raises:
        UserError: there are several processes, or see `HubInputs`.
    """
    process = init_distributed(device)
    if process.world_size > 1:
        raise UserError("--hf runs in one process: start it without torchrun")
    require_writable(folder)
    pictures = None
    if images is not None:
        if not Path(images).is_dir():
            raise UserError(f"--images: there is no folder {images}")
        pictures = find_pictures([Path(images)])
    lines = None if texts is None else read_texts(texts)
    keep_freed_memory(process.device)
    hub = open_hub_model(name)
    inputs = HubInputs(hub, name, pictures, lines, batch_size)
    count = min(n, inputs.samples())
    generator = torch.Generator().manual_seed(seed)
    inputs.take(sorted(torch.randperm(inputs.samples(), generator=generator)[:count].tolist()))
    check_forward(hub, inputs, name)
    layers = [x for x in choose_layers(hub.model) if x not in hub.untrained]
    model = hub.model.to(process.device)
    profile = measure_any(model, inputs, layers, memory_gb, count, fraction, seed)
    own = {"hf": name, "images": images, "texts": texts, "batch_size": batch_size}
    own["checkpoint_sha256"] = model_hash(model)
    kinds = layer_kinds(model, list(profile.layers))
    found = {x: replace(layer, kind=kinds[x]) for x, layer in profile.layers.items()}
    profile = replace(profile, settings=profile.settings | own, layers=found)
    if hub.untrained:
        left_out = f"left out, for the checkpoint lacks them: {', '.join(hub.untrained)}"
        profile.remarks.append(left_out)
    profile.write(folder)
    return profile


def estimate_again(folder: Path, fraction: float, seed: int) -> IDProfile:
    """Other IDs from the distances that an earlier run kept, without the model.

    Args:
        folder: of that run; its profile is replaced.
        fraction: of the points, see `estimate_id`.
        seed: of the blocks.

    Raises:
        UserError: it kept none, or a later run has begun to replace them.
    """
    before = IDProfile.read(folder)
    if any(profile.settings["save_distances"] for _, profile in partial_profiles(folder)):
        raise UserError(
            f"a later run in {folder} has not finished and may have replaced distances: give "
            "its command again, then -s"
        )
    if not before.settings.get("save_distances"):  # any that are there belong to another run
        raise UserError(f"-s needs a profile measured with --save_distances; {folder} is not")
    require_writable(folder)
    n = before.settings["nsamples"]
    permutations = block_permutations(n, seed)
    layers = {
        name: measure_layer(
            name, layer.features, load_distances(folder, name), fraction, permutations
        )
        for name, layer in before.layers.items()
    }
    changes = {"fraction": fraction, "block_seed": seed, "enough_points": ENOUGH_POINTS}
    settings = before.settings | changes
    remarks = make_remarks(n, layers, settings.get("bad_images", 0))
    profile = replace(before, settings=settings, layers=layers, remarks=remarks)
    profile.write(folder)
    return profile


def draw(profile: IDProfile, folder: Path, compare: list[str]) -> list[str]:
    """Draws the figures of a profile.

    Args:
        profile: just written.
        folder: of the files.
        compare: paths of other profiles, to be drawn into one figure with this one.

    Returns:
        The names of the files.
    """
    figures = {"ID.png": plot_depth(profile), "scale.png": plot_scale(profile)}
    if compare:
        own = {name: layer.id for name, layer in profile.layers.items()}
        others = {path: load_profile(path) for path in compare}
        kinds = {path: load_kinds(path) for path in compare} | {str(folder): profile.kinds()}
        figures["compare.png"] = plot_comparison({str(folder): own} | others, kinds)
    for name, figure in figures.items():
        save_figure(figure, folder / name)
    return list(figures)


def summary(profile: IDProfile) -> str:
    """Lines with the mean ID of each modality, and the remarks."""
    ids: dict[str, list[float]] = {}
    for name, layer in profile.layers.items():
        ids.setdefault(layer.kind or modality(name), []).append(layer.id)
    lines = [f"{k}: {len(v)} layers, mean ID {sum(v) / len(v):.2f}" for k, v in ids.items()]
    return "\n".join([*lines, *(f"remark: {remark}" for remark in profile.remarks)])


def main(args: argparse.Namespace) -> None:
    """Measures or estimates again, then draws."""
    for path in args.compare:
        load_profile(path)  # a mistake here must not wait for the end
    folder = Path(args.Path)
    if args.skip:
        profile = estimate_again(folder, args.fraction, args.seed)
    elif args.hf:
        profile = measure_hub(
            folder,
            args.hf,
            args.images,
            args.texts,
            chosen_device(args.cpu, args.gpu),
            n=args.nsamples,
            batch_size=args.batch_size or HUB_BATCH_SIZE,
            fraction=args.fraction,
            memory_gb=args.memory_gb,
            seed=args.seed,
        )
    else:
        config = load_config(args.config, {"pretrained": args.pretrained, "augment": False})
        weights = args.pruned or config["pretrained"]
        if not weights:
            raise UserError("nothing to measure: give --pretrained or --pruned")
        profile = measure(
            folder,
            config,
            weights,
            chosen_device(args.cpu, args.gpu),
            n=args.nsamples,
            batch_size=args.batch_size or config["eval_batch_size"],
            fraction=args.fraction,
            keep_padding=args.keep_padding,
            skip_bad_images=args.skip_bad_images,
            keep_distances=args.save_distances,
            memory_gb=args.memory_gb,
            seed=args.seed,
        )
    if profile is not None:
        figures = draw(profile, folder, args.compare)
        print(summary(profile))
        print(f"wrote to {folder}: profile.json, {', '.join(figures)}")
        if not args.hf:
            print(f"prune with these IDs: --id_profile {folder}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    return parse_profile_flags(__doc__, argv)


if __name__ == "__main__":
    launch(main, ARGS)
