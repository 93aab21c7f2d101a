"""A checkout as a whole: help and mistakes of all scripts, the README's code, benchmarks."""

import contextlib
import io
import json
import math
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import compat

import numpy as np
import pytest
import safetensors
import torch

from models import compressed
from tests.conftest import ROOT

# --- help and mistakes are answered before anything that takes seconds to import


# all that take a tenth of a second or more, and torch, which most of them import
HEAVY = "torch torchvision transformers timm open_clip numba matplotlib tensorboard scipy".split()
# scripts that read a config: its task, and flags
SCRIPTS = {
    "train_caption.py": ("caption", ""),
    "train_nlvr.py": ("nlvr", ""),
    "train_clip_flickr30k.py": ("retrieval", ""),
    "ComputeID.py": ("caption", ""),
    "export.py": ("caption", "--pruned run --report"),
    "prune.py": ("caption", "--sparsity 0.5 --out new"),
    "study.py": ("caption", "--id_profile ids.json"),
    "caption.py": ("caption", "tests/some.jpg"),
}
ALL = [*SCRIPTS, "reports.report", "data.scenes"]
MISTAKES = {
    "train_caption.py --pruned run": "--pruned goes with --evaluate",
    "train_nlvr.py --config no.yaml": "cannot read the config no.yaml",
    "train_nlvr.py --config configs/nlvr_demo.yaml --useID": "names no id_profile",
    "export.py --config configs/nlvr_demo.yaml --pruned run": "nothing to do",
    "caption.py tests/some.jpg --pruned run": "--pruned goes with --config",
    "prune.py --hf x --sparsity 0.5 --nm 2:4 --out new": "give --sparsity, or --nm",
    "reports.report tests": "tests holds no run",
}
RUN = """
import contextlib, io, json, runpy, sys
heavy, commands = json.load(sys.stdin)
answers = {}
for command in commands:
    script, *sys.argv[1:] = command.split()
    sys.argv[0] = script
    before, out, err = set(sys.modules), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if script.endswith(".py"):
                runpy.run_path(script, run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code
        except Exception as error:
            code = repr(error)
    imported = sorted((set(sys.modules) - before) & set(heavy))
    answers[command] = code, imported, out.getvalue() + err.getvalue()
print(json.dumps(answers))
"""


def test_help_and_mistakes_import_nothing_heavy(tmp_path):
    expected = {f"{name} --help": (0, "usage:") for name in ALL}
    expected |= {f"{name} --no_such_flag": (2, "usage:") for name in ALL}
    expected |= {command: (2, f"error: .*{said}") for command, said in MISTAKES.items()}
    for script, (task, flags) in SCRIPTS.items():
        config, text = f"{tmp_path}/{script}.yaml", Path(f"configs/{task}_demo.yaml").read_text()
        Path(config).write_text(re.sub("(?m)^init_lr.*", "init_lr: fast", text))
        expected[f"{script} {flags} --config {config}"] = (2, f"error: {config}: init_lr is 'fast'")
    answers = subprocess.check_output(
        [sys.executable, "-c", RUN], input=json.dumps([HEAVY, [*expected]]), text=True, timeout=60
    )
    for command, (code, imported, printed) in json.loads(answers).items():
        assert (code, imported) == (expected[command][0], []), command
        assert re.search(expected[command][1], printed), command


# --- the README's code runs as it stands


README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def code(heading: str) -> str:
    """The first indented block under a heading that begins with an import."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    block = re.search(r"(?:^    import .*\n)(?:^(?:    .*)?\n)+", section, re.MULTILINE)
    return re.sub(r"^    ", "", block.group(), flags=re.MULTILINE)


def test_the_loop_for_any_model_prunes_what_it_says():
    """60 steps end at 0.2 remaining; of some 100,000 parameters the last to go may be missing."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code("Any model"), "README.md", "exec"), {})
    assert abs(float(printed.getvalue().splitlines()[-1]) - 0.8) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_reader_of_compressed_files_reads_every_type(tmp_path, dtype):
    weight = (torch.randn(30, 21) * (torch.rand(30, 21) < 0.2)).to(dtype)
    compressed.write(tmp_path / "x.safetensors", [("layer", weight)])
    (reader,) = re.findall(r"(?:^    (?:f|shapes|bits|dense) = .*\n){4}", README, re.MULTILINE)
    reader = reader.replace("    ", "").replace("blip80", f"{tmp_path}/x")
    names = dict(json=json, math=math, np=np, safetensors=safetensors, NAME="layer")
    exec(reader, names)
    assert np.array_equal(names["dense"], weight.float().numpy())


# --- the benchmarks find what they import: nothing else runs them


NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_can_be_imported(name):
    assert import_module(f"benchmarks.{name}").__doc__


# --- torchvision beside a CPU-only torch


def test_operators_are_declared_only_where_the_compiled_ones_do_not_load(monkeypatch):
    def broken(library):
        raise OSError("no CUDA")

    declared = []
    monkeypatch.setattr(compat.torch.library, "define", lambda name, _: declared.append(name))
    monkeypatch.setattr(compat.torch.ops, "load_library", lambda library: None)
    assert compat.declare_missing_operators() is False and declared == []
    monkeypatch.setattr(compat.torch.ops, "load_library", broken)
    assert compat.declare_missing_operators() is True
    assert declared == ["torchvision::nms", "torchvision::qnms"]
