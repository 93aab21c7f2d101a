"""The README's code runs as it stands."""

import contextlib
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

from models import compressed

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
