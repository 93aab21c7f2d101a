"""Atomic files, downloads, and how a script ends."""

import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.runs import finish, processes
from utils import UserError, atomic_write, download, launch, mistaken_for


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
    done = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        note = lambda *args, n=name, c=call: (done.append(n), c(*args))  # noqa: E731
        monkeypatch.setattr(os, name, note)
    with atomic_write(tmp_path / "file") as file:
        file.write("new")
    assert done == ["fsync", "replace"]


SAFETENSORS = struct.pack("<Q", 0x3C20) + b'{"a":{"dtype":"F32"'  # its length reads " <"


def test_what_is_no_data_is_known_at_a_glance(tmp_path):
    for content, clause in {
        b"": "empty",
        b" \n": "empty",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n": "git lfs pull",
        b"\xef\xbb\xbf\r\n<!DOCTYPE html>": "page",
        b"<?xml version='1.0'?><Error>": "page",
        b"PK\3\4": "unpack",
        b"\x1f\x8b\x08": "unpack",
    }.items():
        (tmp_path / "file").write_bytes(content)
        assert clause in mistaken_for(tmp_path / "file")
    for data in (b"[1]", b"[PAD]\n", b"\x80\x02}", b"\x89PNG", SAFETENSORS):
        (tmp_path / "file").write_bytes(data)
        assert mistaken_for(tmp_path / "file") == mistaken_for(tmp_path / "absent") == ""


def test_downloads_are_whole_files_and_no_pages(tmp_path):
    answers = {"/weights": SAFETENSORS, "/page": b"\r\n<html>", "/cut": b"half"}

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", len(answers[self.path]) + 4 * (self.path == "/cut"))
            self.end_headers()
            self.wfile.write(answers[self.path])

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("localhost", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://localhost:{server.server_port}"
        download(f"{address}/weights", tmp_path / "weights")
        for name, why in (("page", "is a page"), ("cut", "broke after 4 of 8|IncompleteRead")):
            with pytest.raises(OSError, match=why):
                download(f"{address}/{name}", tmp_path / name)
        server.shutdown()
    assert (tmp_path / "weights").read_bytes() == SAFETENSORS
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


# --- how a script ends ---------------------------------------------------------------------------


def fail(error):
    raise error


def test_a_users_mistake_is_a_sentence_that_names_its_rank(capsys, monkeypatch):
    for rank, where in (("", ""), ("0", ""), ("3", " (rank 3)")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            launch(fail, UserError("no such file"))
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"error{where}: no such file\n"


def test_other_errors_stay_what_they_are():
    """Also a ValueError, which many mistakes of users are."""
    for error in (ValueError("ours"), RuntimeError("ours"), KeyboardInterrupt(), SystemExit(75)):
        with pytest.raises(type(error)) as raised:
            launch(fail, error)
        assert raised.value is error


class KilledDataset(torch.utils.data.Dataset):
    """Its loading process is killed, as for want of memory."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def load_killed(args):
    list(torch.utils.data.DataLoader(KilledDataset(), num_workers=1))


def test_the_death_of_a_loading_process_is_a_sentence(capfd):
    with pytest.raises(SystemExit) as stop:
        launch(load_killed, None)
    assert stop.value.code == 2
    assert "error: an image loading process died" in capfd.readouterr().err


def test_a_screen_that_lacks_a_letter_ends_no_run():
    script = "from utils import launch\nlaunch(lambda args: print('caf\xe9'), None)"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment)
    assert (done.returncode, done.stdout) == (0, b"caf\\xe9\n")


def test_the_process_group_ends_with_a_script_that_succeeds(tmp_path):
    def main(args):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)

    launch(main, None)
    assert not dist.is_initialized()


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


def test_figures_do_without_the_backend_of_a_notebook(monkeypatch):
    """Matplotlib refuses a backend that is not installed when it is imported."""
    monkeypatch.setenv("MPLBACKEND", "module://of_a_notebook.backend")
    command = [sys.executable, "-c", "import matplotlib; print(matplotlib.get_backend())"]
    seen = []
    launch(lambda args: seen.append(subprocess.run(command, capture_output=True, text=True)), None)
    assert seen[0].stdout == "agg\n"
