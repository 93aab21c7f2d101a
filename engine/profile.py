"""What ComputeID.py does: samples, a share of the layers for each process, resuming, files."""

import argparse
import os
import tempfile
import textwrap
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from data.image_dataset import ImageDataset
from data.images import find_pictures
from dimension import any_model
from dimension.budget import StageShape, default_budget, plan_capture, share_layers
from dimension.capture import Capture, Samples, counted_positions, trace_stages
from dimension.figures import draw_profile
from dimension.profile import (
    Estimation,
    IDProfile,
    LayerID,
    PartialProfile,
    TooFewPoints,
    clear_distances,
    load_distances,
    load_profile,
    make_remarks,
    partial_profiles,
    save_distances,
)
from dimension.twonn import FEWEST_POINTS
from engine.digests import content_hash, data_digests, model_hash
from engine.processes import (
    Process,
    barrier,
    free_memory,
    gather_from_processes,
    init_distributed,
    keep_freed_memory,
    main_process_first,
)
from engine.tasks import TASKS
from models.checkpoint import load_trained
from models.hub import HubInputs, layer_kinds, open_hub_model, read_texts
from models.layers import modality, prunable_layers
from models.weight_files import fetch
from utils import UserError, available_cpus

# keys of a config that the representations depend on
MODEL_AND_DATA_KEYS = (
    "task vit clip image_size tokenizer image_root ann_root prompt max_words max_tokens"
).split()
HUB_BATCH_SIZE = 8
OF_OUTPUTS = "kind same_length by_chance largest_channel".split()  # what -s leaves as it was
USUAL_SAMPLES = 2000
PATIENCE_S = 86400.0  # a process may wait so long for the others, which have layers of their own


def run(args: argparse.Namespace, config: dict | None) -> None:
    """Measures or estimates again, then writes and draws; `config` is None with --hf and -s."""
    for path in args.compare:
        load_profile(path)  # a mistake here must not wait for the end
    estimation, folder = Estimation(args.fraction, args.seed, args.estimator), Path(args.Path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write to --Path {folder}: {error}; choose another") from error
    if args.skip:
        profile = estimate_again(folder, estimation)
    else:
        process = init_distributed(chosen_device(args.cpu, args.gpu), timeout_s=PATIENCE_S)
        keep_freed_memory(process.device)
        profile = measure_hub(args, process) if args.hf else measure_task(args, process, config)
        if not process.is_main:
            return
    profile.write(folder)
    if not args.skip:
        PartialProfile(folder, profile.settings).clear()
    figures = draw_profile(profile, folder, args.compare)
    print(summary(profile))
    print(f"wrote to {folder}: profile.json, {', '.join(figures)}")
    if not args.hf:
        print(f"prune with these IDs: --id_profile {folder}")


def chosen_device(cpu: bool, gpu: int | None) -> str:
    """The device for `init_distributed`, from --cpu and --gpu."""
    if cpu or gpu is None:
        return "cpu" if cpu else "auto"
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UserError(f"--gpu {gpu}: torchrun gives every process a GPU; leave --gpu out")
    present = torch.accelerator.current_accelerator(check_available=True)
    return f"{present.type if present else 'cuda'}:{gpu}"


def measure_task(args: argparse.Namespace, process: Process, config: dict) -> IDProfile:
    """Measures the layers of trained or pruned weights, with samples of the training set."""
    weights = args.pruned or config["pretrained"]
    if not weights:
        raise UserError("nothing to measure: give --pretrained or --pruned")
    task, n = TASKS[config["task"]], args.nsamples or USUAL_SAMPLES
    dataset = task.build_datasets(config, args.seed)[0]
    dataset.skip_bad_images = args.skip_bad_images
    dataset.check()
    model, order, length = task.build_model(config), range(len(dataset)), None
    if args.one_length is not None:
        parts = [order[start : start + 1000] for start in order[::1000]]
        texts = [[dataset.text(index) for index in part] for part in parts]
        lengths = [x for part in texts for x in model.tokenize(part)[1].sum(1).tolist()]
        order, length = of_one_length(dict(enumerate(lengths)), args.one_length, n)
    indices, bad = choose_samples(dataset, n, args.seed, order)
    with main_process_first():  # which downloads, where it is an address
        fetch(weights)
    report = load_trained(model, weights)
    if process.is_main:
        print(report, flush=True)
    model.to(process.device).eval()
    batch_size = args.batch_size or config["eval_batch_size"]
    ids, mask = model.tokenize([dataset.text(index) for index in indices])
    samples = Samples(
        tensors={"input_ids": ids, "attention_mask": mask},
        images={name: Images(dataset, indices, which) for which, name in enumerate(task.images)},
        text=counted_positions(mask, batch_size, args.keep_padding),
        batch_size=batch_size,
        num_workers=config["num_workers"],
    )
    layers = prunable_layers(model)
    shapes = trace_stages(model.stages(), layers, samples, process.device)
    settings = {
        "bad_images": bad,
        "one_length": length,
        "keep_padding": args.keep_padding,
        "batch_size": batch_size,
        "config": {key: config[key] for key in MODEL_AND_DATA_KEYS if key in config},
        "checkpoint": weights,
        "checkpoint_sha256": model_hash(model),
        "contents": data_digests(config, dataset.records),
    }
    settings, measured, _ = measure_share(args, process, settings, n, shapes, layers, samples)
    found = {name: measured[name] for name in layers}
    return IDProfile(settings, found, make_remarks(n, found, bad))


def read_inputs(args: argparse.Namespace) -> tuple[list[Path] | None, list[str] | None]:
    """The files of --images, and the lines of --texts; None for a flag that is not given."""
    pictures = None
    if args.images is not None:
        if not Path(args.images).is_dir():
            raise UserError(f"--images: there is no folder {args.images}")
        pictures = find_pictures([Path(args.images)])
    return pictures, None if args.texts is None else read_texts(args.texts)


def measure_hub(args: argparse.Namespace, process: Process) -> IDProfile:
    """Measures the linear layers of any model of Hugging Face's."""
    pictures, lines = read_inputs(args)
    decoder_lines = read_texts(args.decoder_texts) if args.decoder_texts else None
    with main_process_first():
        hub = open_hub_model(args.hf)
    batch_size = args.batch_size or HUB_BATCH_SIZE
    inputs = HubInputs(hub, pictures, lines, batch_size, decoder_lines, alone=True)
    lengths, length, remarks = dict(enumerate(inputs.lengths)), None, []
    if args.max_tokens:
        lengths = {i: tokens for i, tokens in lengths.items() if tokens <= args.max_tokens}
        cut = inputs.samples() - len(lengths)
        remarks.append(f"{cut} samples have longer texts than --max_tokens {args.max_tokens}")
        if len(lengths) < FEWEST_POINTS:
            raise UserError(f"--max_tokens {args.max_tokens} leaves {len(lengths)} samples")
    order = list(lengths) if lines else range(inputs.samples())
    if args.one_length is not None:
        order, length = of_one_length(lengths, args.one_length, args.nsamples or FEWEST_POINTS)
    n = min(args.nsamples or USUAL_SAMPLES, len(order))
    generator = torch.Generator().manual_seed(args.seed)
    inputs.take(sorted(order[i] for i in torch.randperm(len(order), generator=generator)[:n]))
    if process.is_main:
        print("\n".join([*remarks, *inputs.padding()]), flush=True)
    model = hub.model.to(process.device)
    batches = any_model.Batches(model, inputs, n, args.seed)
    settings = {
        "model": type(model).__name__,
        "hf": args.hf,
        "images": args.images,
        "texts": args.texts,
        "max_tokens": args.max_tokens,
        "one_length": length,
        "batch_size": batch_size,
        "checkpoint_sha256": model_hash(model),
        "contents": {
            "names of the pictures": content_hash([path.name for path in inputs.images or []]),
            "texts": content_hash([inputs.texts, inputs.decoder_texts]),
            "config": content_hash(str(model.config)),
            "first batch": any_model.checksums(batches.first),  # as tokenizer and pictures make it
        },
    }
    modules = any_model.choose_layers(model)
    modules = {name: module for name, module in modules.items() if name not in hub.untrained}
    with any_model.prepared(model, process.device):
        shape, left_out, sentences, changed = any_model.trace_forward(inputs.runs, modules, batches)
        settings, measured, dropped = measure_share(
            args, process, settings, n, [shape], modules, batches
        )
        dropped |= changed()
    left_out |= dropped | dict.fromkeys(hub.untrained, "the checkpoint lacks its weights")
    remarks += sentences + any_model.left_out_remarks(left_out)
    kept = measured.keys() - left_out.keys()
    names = dict.fromkeys(layer.name for layer in shape.layers if layer.name in kept)
    any_model.require_layers(names, remarks)
    kinds = layer_kinds(model, list(names))
    found = {name: replace(measured[name], kind=kinds[name]) for name in names}
    return IDProfile(settings, found, make_remarks(n, found) + remarks)


@dataclass
class Images(Sequence):
    """The first or second (`which` 1) image (3, S, S) of some samples, each read when asked for."""

    dataset: ImageDataset
    indices: list[int]
    which: int

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.indices)

    def __getitem__(self, position: int) -> Tensor:
        """Reads an image."""
        paths = self.dataset.image_paths(self.indices[position])
        return self.dataset.open(paths[self.which])


def of_one_length(lengths: dict[int, int], length: int, n: int) -> tuple[list[int], int]:
    """The n or more indices of texts of a length, or with 0 of the commonest; and the length."""
    counts = Counter(lengths.values())
    length = length or max(counts, key=lambda x: (counts[x], -x))
    if counts[length] < n:
        common = ", ".join(f"{count} have {x}" for x, count in counts.most_common(3))
        raise UserError(
            f"--one_length: {counts[length]} texts have {length} tokens, and {n} samples are asked "
            f"for; give a smaller -n, or another length ({common})"
        )
    return [index for index, other in lengths.items() if other == length], length


def choose_samples(
    dataset: ImageDataset, n: int, seed: int, among: Sequence[int] | None = None
) -> tuple[list[int], int]:
    """Indices of n random samples, and how many were passed over for them.

    With `dataset.skip_bad_images` all images are read first: a sample with an unreadable one gives
    way to the next of the random order. `among` are the indices to choose from (all).
    """
    generator = torch.Generator().manual_seed(seed)
    among = range(len(dataset)) if among is None else among
    order = [among[place] for place in torch.randperm(len(among), generator=generator)]
    chosen, seen = order[:n], len(order[:n])
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


def measure_share(
    args: argparse.Namespace,
    process: Process,
    settings: dict,
    n: int,
    shapes: list[StageShape],
    layers: dict[str, nn.Module],
    inputs: Samples | any_model.Batches,
) -> tuple[dict, dict[str, LayerID], dict[str, str]]:
    """Measures a process's share of the layers that are not done, and writes each when it is.

    Returns:
        All settings that the IDs depend on; the layers of all processes; and, for any model's
        layers, name to reason if left out.
    """
    estimation = Estimation(args.fraction, args.seed, args.estimator)
    common = {"nsamples": n, "seed": args.seed, "device": process.device.type}
    common |= {"dtype": "float32", "save_distances": args.save_distances}
    settings = common | estimation.settings | settings
    partial = PartialProfile(args.Path, settings, process.rank)
    foreign = isinstance(inputs, any_model.Batches)
    names = {x.name for shape in shapes for x in shape.layers} - partial.found.keys()
    share = share_layers(shapes, names, process.world_size)[process.rank]
    free, budget = free_memory(process.device), default_budget(process.device)
    if args.memory_gb is not None:
        budget = int(args.memory_gb * 1e9)
    plan = plan_capture(shapes, share, inputs, n, budget, to_the_end=foreign)
    if process.is_main:
        print(
            f"--memory_gb {budget / 1e9:.2f} of {free / 1e9:.2f} GB free per process\n"
            f"{n} samples, {len(layers)} layers, {len(partial.found)} of them done before, "
            f"{len(share)} for this process of {process.world_size}\n{plan}",
            flush=True,
        )
    barrier()  # all processes have read what is there
    if process.is_main and not partial.found:  # another run's files
        partial.clear()
        if args.save_distances:
            clear_distances(args.Path)
    barrier()  # before any process writes
    capture = Capture(plan, layers, inputs, process.device, progress=process.is_main)
    for name, features, distances in capture:
        try:
            measured = estimation.measure(name, features, distances)
        except TooFewPoints as error:
            if not foreign:
                raise
            capture.left_out[name] = str(error)
            continue
        if args.save_distances:
            save_distances(args.Path, name, distances)
        partial.add(name, replace(measured, **capture.beside(name, distances)))
    found, left_out = {}, {}
    for layers, reasons in gather_from_processes((partial.found | partial.mine, capture.left_out)):
        found, left_out = found | layers, left_out | reasons
    found = {name: layer for name, layer in found.items() if name not in left_out}
    return settings, found, left_out


def estimate_again(folder: Path, estimation: Estimation) -> IDProfile:
    """Other IDs from the distances that an earlier run kept, without the model."""
    before = IDProfile.read(folder)
    if any(profile.settings["save_distances"] for _, profile in partial_profiles(folder)):
        raise UserError(
            f"a later run in {folder} has not finished and may have replaced distances: give "
            "its command again, then -s"
        )
    if not before.settings.get("save_distances"):  # any that are there belong to another run
        raise UserError(f"-s needs a profile measured with --save_distances; {folder} is not")
    layers = {}
    for name, layer in before.layers.items():
        measured = estimation.measure(name, layer.features, load_distances(folder, name))
        layers[name] = replace(measured, **{key: getattr(layer, key) for key in OF_OUTPUTS})
    settings = before.settings | estimation.settings | {"block_seed": estimation.seed}
    remarks = make_remarks(settings["nsamples"], layers, settings.get("bad_images", 0))
    remarks += [x for x in before.remarks if x.startswith(("left out", "not looked at"))]
    return replace(before, settings=settings, layers=layers, remarks=remarks)


def summary(profile: IDProfile) -> str:
    """Lines with the mean ID of each modality, and the remarks."""
    ids: dict[str, list[float]] = {}
    for name, layer in profile.layers.items():
        ids.setdefault(layer.kind or modality(name), []).append(layer.id)
    lines = [f"{k}: {len(v)} layers, mean ID {sum(v) / len(v):.2f}" for k, v in ids.items()]
    more = " ... (whole in profile.json)"
    remarks = (textwrap.shorten(remark, 400, placeholder=more) for remark in profile.remarks)
    return "\n".join([*lines, *(f"remark: {remark}" for remark in remarks)])
