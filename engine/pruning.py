"""What `prune.py` does: calibration samples, the pruned model's folder, and the record in it."""

import argparse
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dimension.any_model import left_out_remarks
from dimension.profile import load_kinds, load_profile
from engine.checkpoints import save_weights
from engine.processes import choose_device, free_memory
from engine.profile import choose_samples, read_inputs
from engine.tasks import TASKS
from models.checkpoint import load_trained
from models.hub import OTHER_FORMATS, HubInputs, layer_kinds, local_folder, open_hub_model
from models.layers import modality
from models.weight_files import fetch, open_weights, weight_files
from pruners import oneshot
from pruners.sparsity import sparsity_report
from reports.runs import PRUNED_FILE, PRUNING_FILE
from utils import UserError, whole_folder, write_json

HELD_OUT = 8  # calibration samples for each sample that is held out
SETTINGS = "argv method sparsity nm allocation sequential seed".split()
Places = dict[str, tuple[str, str]]  # layer to the file and the name of its weight there


class Subject(NamedTuple):
    """A model to prune, on its device in eval mode, and what belongs to it."""

    model: nn.Module
    rows: tuple[list[int], list[int]]  # samples that calibrate, and that are held out
    batch: Callable[[list[int]], dict[str, Tensor]]  # made of some samples
    run: Callable[[dict], object] | None  # what a pass does with a batch; None calls the model
    untrained: dict[str, str]  # layers whose weights the checkpoint lacks, with this reason
    kinds: Callable[[list[str]], dict[str, str]]  # modality of layers
    write: Callable[[Path], None]  # fills the folder of the pruned model
    next: str  # what the user does then


def prune(args: argparse.Namespace, config: dict | None) -> None:
    """Opens the model, prunes it and writes --out; `config` is None with --hf."""
    profile, allocation = read_allocation(args, config)
    device = choose_device(args.device, 1)
    subject = open_hub(args, device) if args.hf else open_task(args, config, device)
    model, skip = subject.model, [*args.skip, *subject.untrained]
    layers, left_out = oneshot.find_layers(model, None, skip)
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    weights = sum(p.nbytes for p in model.parameters())
    peak = weights + sum(sizes.values()) / 8 + oneshot.WORKING_BYTES * max(sizes.values())
    print(
        f"{len(layers)} linear layers with {sum(sizes.values()):,} weights; embeddings, norms and "
        "biases stay",
        *left_out_remarks(left_out | subject.untrained),
        f"memory: {weights / 1e9:.2f} GB of weights, {peak / 1e9:.2f} GB at the peak, beside a "
        f"batch's activations; {free_memory(device) / 1e9:.2f} GB are free",
        "{} samples calibrate, {} are held out".format(*map(len, subject.rows)),
        sep="\n",
        flush=True,
    )
    batches, held_out = (
        DataLoader(rows, args.batch_size, collate_fn=subject.batch) if rows else []
        for rows in subject.rows
    )
    flags = {"nm": args.nm, "sequential": args.sequential, "skip": skip, "run": subject.run}
    found = oneshot.prune_(
        model, batches, args.sparsity, args.method, allocation, held_out=held_out, **flags
    )
    layers, errors = {name: layers[name] for name in found["layers"]}, found["errors"]
    kinds = subject.kinds(list(layers))
    uncalled = {n: why for n, why in found["left_out"].items() if n not in left_out}
    record = {name: getattr(args, name) for name in SETTINGS} | {
        "calibration": {
            "images": args.images,
            "texts": args.texts,
            "samples": len(subject.rows[0]),
            "held_out": len(subject.rows[1]),
        },
        "left_out": found["left_out"] | subject.untrained,
        "layers": {
            name: {"kind": kinds[name], "weights": sizes[name], "zeros": zeros}
            | ({"error": errors[name]} if name in errors else {})
            for name, zeros in found["layers"].items()
        },
        "config": config or {},  # as the record of a run has them
        "flags": {"output_dir": str(args.out.parent), "model_dir": args.out.name}
        | {"id_profile": profile},
    }
    weights_alone = {name: nn.ParameterList([layer.weight]) for name, layer in layers.items()}
    with whole_folder(args.out) as folder:
        subject.write(folder)
        write_json(folder / PRUNING_FILE, record)
        write_json(folder / "sparsity.json", sparsity_report(weights_alone, kinds))
    for line in left_out_remarks(uncalled):
        print(line)
    if errors:
        worst = max(errors, key=errors.get)
        mean = sum(errors.values()) / len(errors)
        print(
            f"relative error of the layers' outputs: {mean:.3f} in the mean, at most "
            f"{errors[worst]:.3f} ({worst})"
        )
    print(f"{args.out}: {found['sparsity']:.2%} of these weights are zero; {subject.next}")


def read_allocation(
    args: argparse.Namespace, config: dict | None
) -> tuple[str, dict[str, float] | None]:
    """Path of the profile, "" for none; and what --allocation makes of it."""
    if args.allocation == "uniform":
        return "", None
    if args.allocation not in ("modality", "inverse"):
        return args.allocation, load_profile(args.allocation)
    path = args.id_profile or config["id_profile"]
    profile = load_profile(path)
    if args.allocation == "inverse":
        return path, oneshot.inverse(profile)
    kinds = load_kinds(path)
    kinds = {name: kinds.get(name) or modality(name) for name in profile}
    return path, oneshot.modality_means(profile, kinds)


def open_hub(args: argparse.Namespace, device: torch.device) -> Subject:
    """Opens a model of Hugging Face's in the type of its files, and prepares its samples."""
    folder = local_folder(args.hf)
    if folder.resolve() in args.out.resolve().parents:
        raise UserError(f"--out: {args.out} lies in the folder of --hf; choose another")
    files = weight_files(folder)
    require_room(args, files, device)
    pictures, lines = read_inputs(args)
    hub = open_hub_model(str(folder), "auto")
    model, rows, make = hub.model, ([], []), None
    untrained = dict.fromkeys(hub.untrained, "the checkpoint lacks its weights")
    chosen, _ = oneshot.find_layers(model, None, [*args.skip, *untrained])
    places = stored_places(args, files, chosen)
    if args.n and not (args.method == "Magnitude" and pictures is lines is None):
        inputs = HubInputs(hub, pictures, lines, args.batch_size)
        generator = torch.Generator().manual_seed(args.seed)
        order = torch.randperm(inputs.samples(), generator=generator).tolist()
        parts = split(args.n, order)
        if inputs.lengths:  # texts of one length side by side need little padding
            for part in parts:
                part.sort(key=inputs.lengths.__getitem__)
        inputs.take(sum(parts, []))
        numbers = list(range(inputs.samples()))
        rows = numbers[: len(parts[0])], numbers[len(parts[0]) :]
        make = partial(short_batch, inputs)
    model.to(device)
    write = partial(write_folder, folder, files, places, model)
    then = (
        f"next: evaluate it as before (from_pretrained({str(args.out)!r})), run it on the CPU with "
        f"sparse.sparsify_(model), draw it with python -m reports.report {args.out}"
    )
    return Subject(model, rows, make, None, untrained, partial(layer_kinds, model), write, then)


def split(n: int, order: list[int]) -> tuple[list[int], list[int]]:
    """The samples that calibrate, n at most, and those that are held out, of a random order."""
    held_out = min(max(1, n // HELD_OUT), len(order) // 2)
    if not held_out:
        raise UserError("one sample is too few: one calibrates, another is held out")
    chosen = order[: n + held_out]
    return chosen[:-held_out], chosen[-held_out:]


def short_batch(inputs: HubInputs, rows: list[int]) -> dict[str, Tensor]:
    """A batch whose texts are padded to its own longest only."""
    batch = inputs.batch(rows)
    mask = batch.get("attention_mask", torch.ones(0, 0))
    longest = int(mask.sum(1).max()) if len(mask) else 0
    return {
        name: value[:, :longest] if value.shape[:2] == mask.shape else value
        for name, value in batch.items()
    }


def require_room(args: argparse.Namespace, files: list[Path], device: torch.device) -> None:
    """Refuses weights for which memory or disk has no room, before they are read."""
    size, free = sum(file.stat().st_size for file in files), free_memory(device)
    if size > free:
        raise UserError(
            f"the weights of {files[0].parent} take {size / 1e9:.2f} GB of memory, and "
            f"{free / 1e9:.2f} GB are free ({device}): take a machine or a --device with more"
        )
    there = next(place for place in args.out.absolute().parents if place.exists())
    disk = shutil.disk_usage(there).free
    if size > disk or not os.access(there, os.W_OK):
        raise UserError(
            f"cannot write {size / 1e9:.2f} GB to {args.out} ({disk / 1e9:.2f} GB are free): make "
            "room, or choose another --out"
        )


def stored_places(
    args: argparse.Namespace, files: list[Path], layers: dict[str, nn.Module]
) -> Places:
    """Where the weight of each layer is stored: by value, because transformers renames some.

    Of equal tensors it is the one whose name ends most like the layer's.
    """
    places: Places = {}
    for file in files:
        stored = open_weights(file)
        for key in list(stored):
            tensor = stored.pop(key)  # which frees what was read of the file
            parts = key.removesuffix(".weight").split(".")[::-1]

            def alike(name: str, parts=parts) -> int:
                pairs = zip(parts, name.split(".")[::-1], strict=False)
                return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))

            for name in sorted(layers.keys() - places.keys(), key=alike, reverse=True):
                weight = layers[name].weight
                if weight.shape == tensor.shape and torch.equal(weight, tensor.to(weight.dtype)):
                    places[name] = file.name, key
                    break
    if lost := [name for name in layers if name not in places]:
        raise UserError(
            f"--hf {args.hf}: no stored tensor is the weight of {lost[0]}, which transformers "
            f"makes of others: leave it out (--skip {lost[0]!r})"
        )
    return places


def write_folder(
    source: Path, files: list[Path], places: Places, model: nn.Module, folder: Path
) -> None:
    """Copies the model's folder, and writes zeros into its files of weights where the model's are.

    All else stays to the bit: shards, types, tensors that the model does not read. Weights of other
    formats, which would stay dense, are left out.
    """
    read = {file.name for file in files}

    def others(place: str, names: list[str]) -> list[str]:
        weights = [name for name in names if name.endswith((*OTHER_FORMATS, ".safetensors"))]
        unread = {*weights} - read | {"onnx", "openvino", ".git", ".cache"}
        return [name for name in names if name in unread and Path(place) == source]

    copy = {"copy_function": shutil.copyfile, "dirs_exist_ok": True}
    shutil.copytree(source, folder, ignore=others, **copy)
    for file in files:
        stored = open_weights(file)
        with open(folder / file.name, "r+b") as raw:
            start = int.from_bytes(raw.read(8), "little") + 8  # behind the header, which is JSON
            header = json.loads(raw.read(start - 8))
            for name, key in [(name, key) for name, (of, key) in places.items() if of == file.name]:
                zeros = model.get_submodule(name).weight.cpu() == 0
                values = stored.pop(key).masked_fill(zeros, 0).view(-1).view(torch.uint8)
                raw.seek(start + header[key]["data_offsets"][0])
                raw.write(values.numpy().data)


def open_task(args: argparse.Namespace, config: dict, device: torch.device) -> Subject:
    """Builds one of this project's models; samples of its training set calibrate."""
    if not config["pretrained"]:
        raise UserError("nothing to prune: give --pretrained")
    task, path = TASKS[config["task"]], fetch(config["pretrained"])
    require_room(args, [path] if path.is_file() else weight_files(path), device)
    rows, dataset = ([], []), None
    if args.n:
        dataset = task.build_datasets(config, args.seed)[0]
        dataset.check()
        rows = split(args.n, choose_samples(dataset, len(dataset), args.seed)[0])
    model = task.build_model(config)
    print(load_trained(model, str(path)), flush=True)
    model.to(device).eval()

    def make(rows: list[int]) -> dict[str, Tensor]:
        columns = zip(*(dataset.image_paths(row) for row in rows), strict=True)
        images = [torch.stack([dataset.open(path) for path in paths]) for paths in columns]
        ids, mask = model.tokenize([dataset.text(row) for row in rows])
        texts = {"input_ids": ids, "attention_mask": mask}
        return dict(zip(task.images, images, strict=True)) | texts

    def run(batch: dict[str, Tensor]) -> None:
        """The chain of stages, which needs no labels."""
        states = {name: value.to(device) for name, value in batch.items()}
        for stage in model.stages():
            states[stage.writes] = stage.run(*(states[name] for name in stage.reads))

    def kinds(names: list[str]) -> dict[str, str]:
        return {name: modality(name) for name in names}

    def write(folder: Path) -> None:
        save_weights(model, folder / PRUNED_FILE)

    flags = f"--config {args.config}"
    then = (
        f"next: python {task.script} {flags} --evaluate --pruned {args.out}, with --sparse on the "
        f"CPU; a small file: python export.py {flags} --pruned {args.out} --to compressed "
        f"--out {args.out}.safetensors"
    )
    return Subject(model, rows, make, run, {}, kinds, write, then)
