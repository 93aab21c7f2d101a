"""What every script needs: atomic files, downloads, CPUs, users' mistakes, exit codes.

Nothing here imports torch, so that mistakes in flags and configs are found before it is.
"""

import argparse
import errno
import importlib
import io
import json
import multiprocessing
import os
import re
import select
import shutil
import sys
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

# errors of a file system, unlike those of a network whose answer is being written
_FILE_ERRORS = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES}
_FILE_ERRORS |= {errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}
ANSWER_SECONDS = 30  # that a download waits for its server


class UserError(ValueError):
    """A mistake in what the user gave (flags, config, files, data); the message has the remedy.

    `launch` ends a script with this sentence and exit code 2. Docstrings name the error only where
    a caller handles it.
    """


def lazy_names(places: dict[str, str]) -> Callable[[str], object]:
    """A package's `__getattr__` (PEP 562): names that import their module when first used."""

    def find(name: str):
        if name not in places:
            raise AttributeError(f"no {name!r} here; there are {', '.join(sorted(places))}")
        return getattr(importlib.import_module(places[name]), name)

    return find


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator:
    """Opens a file that appears under its name whole, on disk, or not at all; links stay links."""
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        cause = error if isinstance(error, OSError) else error.__context__  # of torch.save's error
        if isinstance(cause, OSError) and cause.errno in _FILE_ERRORS:
            raise UserError(f"cannot write {path}: {cause.strerror}") from error
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """The folder to fill, which appears under its name whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.rename(path)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError):
            remedy = "make room, or choose another --out"
            raise UserError(f"cannot write {path} ({error}): {remedy}") from error
        raise


class _Help(argparse.RawDescriptionHelpFormatter):
    """A script's docstring as it is written, and the default of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        known = type(action.default) in (str, int, float) and action.default != argparse.SUPPRESS
        return f"{action.help}{' (default: %(default)s)' * known}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return action.dest.rpartition("_")[2].upper()


def script_parser(docstring: str, prog: str | None = None) -> argparse.ArgumentParser:
    """A parser of a script's flags, with the docstring in its help."""
    return argparse.ArgumentParser(prog=prog, description=docstring, formatter_class=_Help)


def user_path(text: str) -> str:
    """A flag's path, address or empty text; shells leave the `~` of `--flag=~/x` to us."""
    return os.path.expanduser(text)


def listed(items: list, most: int = 5) -> str:
    """The first of some items, for a message; of files, their names."""
    names = [item.name if isinstance(item, Path) else str(item) for item in items[:most]]
    return ", ".join(names) + (", ..." if len(items) > most else "")


def mistaken_for(path: str | Path) -> str:
    """What lies where data was expected, and the remedy; "" if its first bytes do not show it."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError:
        return ""
    if not start.strip():
        return "it is empty: copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is git-lfs's pointer to the file: run `git lfs pull` where it was cloned"
    if _is_page(start):
        return "it is a page (HTML or XML), as a server or proxy answers: download the file itself"
    if start.startswith((b"PK\3\4", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf")):
        return "it is an archive: unpack it"
    return ""


def _is_page(start: bytes) -> bool:
    """Whether a file's first bytes are text that begins with a tag."""
    return b"\0" not in start[:64] and start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")


def available_cpus() -> int:
    """Number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # macOS has none
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write_json(path: str | Path, content) -> None:
    """Writes indented JSON atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1) + "\n")


def download(url: str, path: str | Path) -> None:
    """Downloads a file; `path` appears once it is whole. Any failure is an OSError.

    A page in place of the file is a failure, too. Long downloads show a progress bar.
    """
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
            bar = tqdm(total=size or None, unit="B", unit_scale=True, desc=str(path), delay=5.0)
            with bar, atomic_write(path, "wb") as file:
                while chunk := answer.read(2**20):
                    if not file.tell() and _is_page(chunk):
                        raise OSError("the answer is a page and not the file; is it a proxy's?")
                    file.write(chunk)
                    bar.update(len(chunk))
                if file.tell() < size:
                    raise OSError(f"the connection broke after {file.tell()} of {size} bytes")
    except (OSError, HTTPException) as error:
        raise OSError(str(error) or type(error).__name__) from error


def launch(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Runs a script's `main`; a user's mistake ends it with its sentence instead of a traceback.

    Exit codes: 0 done; 1 a fault of the program; 2 a `UserError`, or the death of an image loading
    process; 75 (`engine.stopping.EXIT_STOPPED`) a signal stopped training.

    Of several processes, one that fails leaves at once: the end of its process group would wait for
    the others, which wait for it.
    """
    os.environ["MPLBACKEND"] = "agg"  # figures go to files; a notebook's backend may be missing
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's is not
            stream.reconfigure(errors="backslashreplace")  # no name that is printed ends a run
    try:
        main(args)
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            error = SystemExit(141)  # what a shell reports of SIGPIPE
        if sentence := _mistake(error):
            rank = os.environ.get("RANK") or "0"
            where = "" if rank == "0" else f" (rank {rank})"
            print(f"error{where}: {sentence}", file=sys.stderr, flush=True)
            error = SystemExit(2)
        if _process_group():
            if not isinstance(error, SystemExit):
                traceback.print_exception(error)
            for child in multiprocessing.active_children():  # which load images
                child.terminate()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.code if isinstance(error, SystemExit) else 1)
        raise error from (None if isinstance(error, SystemExit) else error.__cause__)
    if dist := _process_group():
        dist.destroy_process_group()


def _mistake(error: BaseException) -> str:
    """The sentence of a user's mistake; "" for any other error."""
    if isinstance(error, UserError):
        return str(error)
    died = r"^DataLoader worker|shared memory\(shm\)"  # raised here, or in the loading process
    if not isinstance(error, RuntimeError) or not re.search(died, str(error)):
        return ""
    return (
        f"an image loading process died ({str(error).strip().splitlines()[-1]}): memory or shared "
        "memory ran out. Take fewer processes (--num_workers), or give the container more (docker "
        "run --shm-size)"
    )


def _process_group():
    """torch.distributed where this process has joined others."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_initialized() else None


def _reader_left() -> bool:
    """Whether `head`, say, has closed the pipe of standard output, which is then discarded."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not output.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True
