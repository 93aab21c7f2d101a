"""Atomic files, downloads, and how a script ends."""

import io
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
from contextlib import nullcontext, suppress

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.runs import finish, processes
from utils import UserError, atomic_write, download, launch, mistaken_for, write_json


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with atomic_write(path) as file:
        file.write("old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # as readable as any other


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else a machine that loses its power may leave the name with nothing behind it."""
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (sync(file), synced.extend(tmp_path.iterdir())))
    with atomic_write(tmp_path / "file") as file:
        file.write("new")
    assert synced and tmp_path / "file" not in synced


def test_a_file_behind_a_link_is_written_where_it_lies(tmp_path):
    """A link to a file, one to nothing yet, and one of a folder."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store/old").touch()
    for link, place in {"a": "store/old", "b": "store/new/b", "folder": "store"}.items():
        (tmp_path / link).symlink_to(place)
    for name in ("a", "b", "folder/x"):
        write_json(tmp_path / name, name)
    for place, name in {"old": "a", "new/b": "b", "x": "folder/x"}.items():
        assert (tmp_path / "store" / place).read_text() == f'"{name}"\n'
    assert all((tmp_path / link).is_symlink() for link in ("a", "b", "folder"))


SAFETENSORS = struct.pack("<Q", 0x3C20) + b'{"a":{"dtype":"F32"'  # its length reads " <"


@pytest.mark.parametrize(
    ("content", "clause"),
    [
        (b" \n", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git lfs pull"),
        (b"\xef\xbb\xbf\r\n<!DOCTYPE html>", "page"),
        (b"<?xml version='1.0'?><Error>", "page"),
        (b"PK\3\4", "unpack"),
        (b"\x1f\x8b\x08", "unpack"),
        *((data, "") for data in (b"[1]", b"[PAD]\n", b"\x80\x02}", b"\x89PNG", SAFETENSORS)),
    ],
)
def test_what_is_no_data_is_known_at_a_glance(tmp_path, content, clause):
    (tmp_path / "file").write_bytes(content)
    found = mistaken_for(tmp_path / "file")
    assert clause in found and bool(found) == bool(clause)
    assert mistaken_for(tmp_path / "absent") == ""


@pytest.mark.parametrize(
    ("content", "size", "why"),
    [
        (SAFETENSORS, len(SAFETENSORS), ""),
        (b"\r\n<html>", 8, "is a page"),
        (b"half", 8, "broke after 4 of 8"),
    ],
)
def test_downloads_are_whole_files_and_no_pages(tmp_path, monkeypatch, content, size, why):
    answer = io.BytesIO(content)
    answer.headers = {"Content-Length": str(size)}
    monkeypatch.setattr("urllib.request.urlopen", lambda address, timeout: answer)
    with pytest.raises(OSError, match=why) if why else nullcontext():
        download("http://x/file", tmp_path / "file")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [content] * (not why)


# --- how a script ends ---------------------------------------------------------------------------


def fail(error):
    raise error


@pytest.mark.parametrize(("rank", "where"), [("", ""), ("0", ""), ("3", " (rank 3)")])
def test_a_users_mistake_is_a_sentence_that_names_its_rank(capsys, monkeypatch, rank, where):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit, match="2"):
        launch(fail, UserError("no such file"))
    assert capsys.readouterr().err == f"error{where}: no such file\n"


@pytest.mark.parametrize(
    "error",
    [ValueError("ours"), RuntimeError(), KeyboardInterrupt(), SystemExit(75), BrokenPipeError()],
)
def test_other_errors_stay_what_they_are(error, monkeypatch, tmp_path):
    """Also a ValueError, which many mistakes of users are; and a pipe that is not the output's."""
    monkeypatch.setattr(sys, "stdout", open(tmp_path / "out", "w"))
    with pytest.raises(type(error)) as raised:
        launch(fail, error)
    assert raised.value is error


class KilledDataset(torch.utils.data.Dataset):
    """Its loading process is killed, as for want of memory."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_death_of_a_loading_process_is_a_sentence(capfd):
    loader = torch.utils.data.DataLoader(KilledDataset(), num_workers=1)
    with pytest.raises(SystemExit, match="2"):
        launch(list, loader)
    assert "error: an image loading process died" in capfd.readouterr().err


def test_a_screen_without_a_letter_and_a_missing_backend_end_no_run():
    """Matplotlib refuses a notebook's backend that is not installed when it is imported."""
    show = "print('caf\xe9', __import__('matplotlib').get_backend())"
    script = f"from utils import launch\nlaunch(lambda args: {show}, None)"
    wrong = {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://of_a_notebook.backend"}
    printed = subprocess.check_output([sys.executable, "-c", script], env=os.environ | wrong)
    assert printed == b"caf\\xe9 agg\n"


def one_of_several(error, folder):
    """A process in a group whose destruction waits for the others, as NCCL's does."""
    os.dup2(os.open(folder / "log", os.O_CREAT | os.O_WRONLY), 2)
    dist.is_initialized = lambda: True
    dist.destroy_process_group = lambda: time.sleep(600)

    def main(args):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        child.start()
        (folder / "child").write_text(str(child.pid))
        raise error

    launch(main, None)


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (UserError("cannot read image x.png"), 2, "error: cannot read image x.png\n"),
        (KeyError("a bug"), 1, "KeyError: 'a bug'\n"),
        (torch.OutOfMemoryError("no memory"), 1, "OutOfMemoryError: no memory\n"),
        (SystemExit(75), 75, ""),
    ],
)
def test_a_failing_process_of_several_prints_and_leaves_at_once(error, code, printed, tmp_path):
    process = processes.Process(target=one_of_several, args=(error, tmp_path))
    process.start()
    assert finish([process], timeout=60) == [code]
    said = (tmp_path / "log").read_text()
    assert said.endswith(printed) and ("Traceback" in said) == (code == 1)
    child = int((tmp_path / "child").read_text())
    with suppress(psutil.NoSuchProcess):
        for _ in range(100):
            if psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
                return  # until the process that adopted it buries it
            time.sleep(0.05)
        pytest.fail("a loading process outlived its trainer")
