"""Stopping on SIGTERM and SIGINT: after the step, with a checkpoint and an exit code of its own."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal, run again to go on


@dataclass
class StopRequest:
    """Whether a signal has asked the process to stop."""

    requested: bool = False


@contextmanager
def stop_signals_to(handler: Callable) -> Iterator[None]:
    """Inside the block SIGTERM and SIGINT call `handler(number, frame)`."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def exit_stopped(number: int, frame: FrameType | None) -> None:
    """A handler of signals: ends the process with EXIT_STOPPED."""
    raise SystemExit(EXIT_STOPPED)


@contextmanager
def listen_for_stop() -> Iterator[StopRequest]:
    """Inside the block SIGTERM and SIGINT are noted, for the block to look at after each step.

    Raises:
        SystemExit: with EXIT_STOPPED at the end of the block, after a signal.
    """
    stop = StopRequest()

    def note(number, frame):
        stop.requested = True

    with stop_signals_to(note):
        yield stop
    if stop.requested:
        raise SystemExit(EXIT_STOPPED)
