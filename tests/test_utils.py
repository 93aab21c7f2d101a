"""Atomic files, devices, and what a launcher sets."""

import os
import random

import numpy as np
import pytest
import torch

from engine.processes import seed_everything
from utils import atomic_write, mistaken_for


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with atomic_write(path) as file:
        file.write("old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else a machine that loses its power may leave the name with nothing behind it."""
    done = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        note = lambda *args, n=name, c=call: (done.append(n), c(*args))  # noqa: E731
        monkeypatch.setattr(os, name, note)
    with atomic_write(tmp_path / "file") as file:
        file.write("new")
    assert done == ["fsync", "replace"]


def test_a_file_is_as_readable_as_any_other(tmp_path):
    with atomic_write(tmp_path / "atomic") as file:
        file.write("new")
    (tmp_path / "plain").write_text("new")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_one_seed_for_all_generators():
    draws = []
    for seed in (1, 1, 2):
        seed_everything(seed)
        draws.append((random.random(), np.random.rand(), float(torch.rand(()))))
    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(draws[0], draws[2], strict=True))


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git lfs pull"),
        (b"\xef\xbb\xbf\r\n<!DOCTYPE html>", "page"),
        (b"<?xml version='1.0'?><Error>", "page"),
        (b"PK\3\4", "unpack"),
        (b"\x1f\x8b\x08", "unpack"),
    ],
)
def test_what_is_no_data_is_known_at_a_glance(content, told, tmp_path):
    (tmp_path / "file").write_bytes(content)
    assert told in mistaken_for(tmp_path / "file")


@pytest.mark.parametrize("content", [b"[1]", b"[PAD]\n", b"\x80\x02}", b"\x89PNG\r\n"])
def test_nothing_is_said_of_other_files(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    assert mistaken_for(tmp_path / "file") == mistaken_for(tmp_path / "absent") == ""
