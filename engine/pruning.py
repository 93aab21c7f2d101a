"""What `prune.py` does: calibration samples, the pruned model's folder, and the record in it."""

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
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
from utils import UserError, atomic_folder, write_json

HELD_OUT = 16  # calibration samples for each that is held out: its tokens are many, and cost time
SETTINGS = "argv method sparsity nm allocation sequential seed".split()


class Subject(NamedTuple):
    """A model to prune, on its device in eval mode, and what belongs to it."""

    model: nn.Module
    rows: tuple[list[int], list[int]]  # samples that calibrate, and that are held out
    batch: Callable[[list[int]], dict[str, Tensor]]  # made of some samples
    run: Callable[[dict], object] | None  # what a pass does with a batch; None calls the model
    untrained: dict[str, str]  # layers whose weights the checkpoint lacks, with this reason
    places: dict[str, tuple[Path, str]]  # with --hf: layer to the file and name of its weight


def prune(args: argparse.Namespace, config: dict | None) -> None:
    """Opens the model, prunes it and writes --out; `config` is None with --hf."""
    profile, allocation = read_allocation(args, config)
    device = choose_device(args.device, 1)
    subject = open_hub(args, device) if args.hf else open_task(args, config, device)
    model, skip = subject.model, [*args.skip, *subject.untrained]
    layers, left_out = oneshot.find_layers(model, None, skip)
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    weights, total = sum(p.nbytes for p in model.parameters()), sum(sizes.values())
    peak = weights + total + oneshot.WORKING_BYTES * max(sizes.values())
    samples, held = map(len, subject.rows)
    print(
        f"{len(layers)} linear layers with {total:,} weights; embeddings, norms and biases stay",
        *left_out_remarks(left_out | subject.untrained),
        f"memory: {weights / 1e9:.2f} GB of weights, {peak / 1e9:.2f} GB at the peak, beside a "
        f"batch's activations; {free_memory(device) / 1e9:.2f} GB are free",
        f"{samples} samples calibrate, {held} are held out",
        sep="\n",
        flush=True,
    )
    batches, held_out = (
        DataLoader(rows, args.batch_size, collate_fn=subject.batch) if rows else []
        for rows in subject.rows
    )
    flags = {"skip": skip, "nm": args.nm, "sequential": args.sequential, "run": subject.run}
    found = oneshot.prune_(
        model, batches, args.sparsity, args.method, allocation, held_out=held_out, **flags
    )
    layers = {name: nn.ParameterList([layers[name].weight]) for name in found["layers"]}
    kinds = layer_kinds(model, [*layers]) if args.hf else {name: modality(name) for name in layers}
    errors = found["errors"]
    record = {name: getattr(args, name) for name in SETTINGS} | {
        "calibration": {"samples": samples, "held_out": held},
        "layers": {
            name: {"kind": kinds[name], "zeros": zeros, "weights": sizes[name]}
            | {"error": errors.get(name)}
            for name, zeros in found["layers"].items()
        },
        "left_out": found["left_out"] | subject.untrained,
        "config": config or {},  # this and the flags as a run's record has them
        "flags": {"output_dir": str(args.out.parent), "model_dir": args.out.name}
        | {"id_profile": profile},
    }
    with atomic_folder(args.out) as folder:
        if args.hf:
            write_folder(model, subject.places, folder)
        else:
            save_weights(model, folder / PRUNED_FILE)
        write_json(folder / PRUNING_FILE, record)
        write_json(folder / "sparsity.json", sparsity_report(layers, kinds))
    uncalled = {name: why for name, why in found["left_out"].items() if name not in left_out}
    print(*left_out_remarks(uncalled), end="\n" * bool(uncalled))
    if errors:
        worst = max(errors, key=errors.get)
        print(
            f"relative error of the layers' outputs: {fmean(errors.values()):.3f} in the mean, at "
            f"most {errors[worst]:.3f} ({worst})"
        )
    print(
        f"{args.out}: {found['sparsity']:.2%} of these weights are zero\n{next_step(args, config)}"
    )


def next_step(args: argparse.Namespace, config: dict | None) -> str:
    """What the user does with the pruned model."""
    if args.hf:
        return (
            f"next: evaluate it as before (from_pretrained({str(args.out)!r})), run it on the CPU "
            f"with sparse.sparsify_(model), draw it with python -m reports.report {args.out}"
        )
    flags = f"--config {args.config}"
    return (
        f"next: python {TASKS[config['task']].script} {flags} --evaluate --pruned {args.out}, with "
        f"--sparse on the CPU; a small file: python export.py {flags} --pruned {args.out} "
        f"--to compressed --out {args.out}.safetensors"
    )


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
        return path, {name: 1 / value for name, value in profile.items()}
    kinds = {name: modality(name) for name in profile} | load_kinds(path)
    return path, oneshot.modality_means(profile, kinds)


def split(n: int, order: list[int]) -> tuple[list[int], list[int]]:
    """The samples that calibrate, n at most, and those that are held out, of a random order."""
    held_out = min(max(1, n // HELD_OUT), len(order) // 2)
    if not held_out:
        raise UserError("one sample is too few: one calibrates, another is held out")
    return order[held_out:][:n], order[:held_out]


def require_memory(files: list[Path], device: torch.device) -> None:
    """Refuses weights that do not fit into the free memory, before they are read."""
    size, free = sum(file.stat().st_size for file in files), free_memory(device)
    if size > free:
        raise UserError(
            f"the weights in {files[0].parent} take {size / 1e9:.2f} GB of memory, and "
            f"{free / 1e9:.2f} GB are free ({device}): take a machine or a --device with more"
        )


def open_hub(args: argparse.Namespace, device: torch.device) -> Subject:
    """Opens a model of Hugging Face's in the type of its files, and prepares its samples."""
    folder = local_folder(args.hf)
    if folder.resolve() in args.out.resolve().parents:
        raise UserError(f"--out: {args.out} lies in the folder of --hf; choose another")
    files = weight_files(folder)
    require_memory(files, device)
    pictures, lines = read_inputs(args)
    hub = open_hub_model(str(folder), "auto")
    untrained = dict.fromkeys(hub.untrained, "the checkpoint lacks its weights")
    chosen, _ = oneshot.find_layers(hub.model, None, [*args.skip, *untrained])
    places, rows, batch = stored_places(files, chosen), ([], []), None
    if args.method == "Wanda" or pictures or lines:
        inputs = HubInputs(hub, pictures, lines, args.batch_size)
        generator = torch.Generator().manual_seed(args.seed)
        parts = split(args.n, torch.randperm(inputs.samples(), generator=generator).tolist())
        if lines:  # neighbours of like length need little padding
            parts = [sorted(part, key=inputs.lengths.__getitem__) for part in parts]
        inputs.take([*parts[0], *parts[1]])
        inputs.padded = None  # to one length
        numbers, batch = list(range(inputs.samples())), inputs.batch
        rows = numbers[: len(parts[0])], numbers[len(parts[0]) :]
    return Subject(hub.model.to(device), rows, batch, None, untrained, places)


def stored_places(files: list[Path], layers: dict[str, nn.Module]) -> dict[str, tuple[Path, str]]:
    """Where the weight of each layer is stored: by value, because transformers renames some.

    Of equal tensors it is the one whose name ends most like the layer's.
    """
    places: dict[str, tuple[Path, str]] = {}
    for file in files:
        stored = open_weights(file)
        for key in list(stored):
            tensor = stored.pop(key)  # which frees what was read of the file
            alike = {x: os.path.commonprefix([f"{x}.weight"[::-1], key[::-1]]) for x in layers}
            for name in sorted(layers.keys() - places.keys(), key=lambda x: -len(alike[x])):
                weight = layers[name].weight
                if weight.shape == tensor.shape and torch.equal(weight, tensor.to(weight.dtype)):
                    places[name] = file, key
                    break
    if lost := [name for name in layers if name not in places]:
        raise UserError(
            f"no stored tensor is the weight of {lost[0]}, which transformers makes of others: "
            f"leave it out (--skip {lost[0]!r})"
        )
    return places


def write_folder(model: nn.Module, places: dict[str, tuple[Path, str]], folder: Path) -> None:
    """Copies the model's folder, and writes zeros into its files of weights where the model's are.

    All else stays to the bit: shards, types, tensors that the model does not read. Weights of other
    formats, which would stay dense, are left out.
    """
    source = next(iter(places.values()))[0].parent
    files = weight_files(source)

    def others(place: str, names: list[str]) -> list[str]:
        ends, read = (*OTHER_FORMATS, ".safetensors"), [file.name for file in files]
        unread = {name for name in names if name.endswith(ends) and name not in read}
        return unread | {"onnx", "openvino", ".git", ".cache"} if Path(place) == source else ()

    copy = {"copy_function": shutil.copyfile, "dirs_exist_ok": True}
    shutil.copytree(source, folder, ignore=others, **copy)
    for file in files:
        with open(folder / file.name, "r+b") as raw:
            start = int.from_bytes(raw.read(8), "little") + 8  # behind the header, which is JSON
            header = json.loads(raw.read(start - 8))
            for name, (_, key) in [item for item in places.items() if item[1][0] == file]:
                kept = (model.get_submodule(name).weight.flatten().cpu() != 0).numpy()
                first, end = header[key]["data_offsets"]
                raw.seek(start + first)
                stored = np.frombuffer(raw.read(end - first), f"u{(end - first) // len(kept)}")
                raw.seek(start + first)
                raw.write(stored * kept)  # in every type zero is zero bytes


def open_task(args: argparse.Namespace, config: dict, device: torch.device) -> Subject:
    """Builds one of this project's models; samples of its training set calibrate."""
    if not config["pretrained"]:
        raise UserError("nothing to prune: give --pretrained")
    task, path = TASKS[config["task"]], fetch(config["pretrained"])
    require_memory([path] if path.is_file() else weight_files(path), device)
    dataset = task.build_datasets(config, args.seed)[0]
    dataset.check()
    rows = split(args.n, choose_samples(dataset, len(dataset), args.seed)[0])
    model = task.build_model(config)
    print(load_trained(model, str(path)), flush=True)
    model.to(device).eval()

    def batch(rows: list[int]) -> dict[str, Tensor]:
        columns = zip(*(dataset.image_paths(row) for row in rows), strict=True)
        images = [torch.stack([dataset.open(path) for path in paths]) for paths in columns]
        ids, mask = model.tokenize([dataset.text(row) for row in rows])
        texts = {"input_ids": ids, "attention_mask": mask}
        return dict(zip(task.images, images, strict=True)) | texts

    def run(states: dict[str, Tensor]) -> None:
        """The chain of stages, which needs no labels."""
        states = {name: value.to(device) for name, value in states.items()}
        for stage in model.stages():
            states[stage.writes] = stage.run(*(states[name] for name in stage.reads))

    return Subject(model, rows, batch, run, {}, {})
