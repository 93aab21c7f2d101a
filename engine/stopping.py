"""Stopping on signals: after the step, with a checkpoint and an exit code of its own."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal, run again to go on


@contextmanager
def stop_signals_to(handler: Callable) -> Iterator[None]:
    """Inside the block SIGTERM, SIGINT and SIGHUP call `handler(number, frame)`."""
    numbers = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup
        numbers.remove(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def exit_stopped(number: int, frame: FrameType | None) -> None:
    """A handler of signals: ends the process with EXIT_STOPPED."""
    raise SystemExit(EXIT_STOPPED)


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Inside the block these signals are appended to the list; then they end the process."""
    signals = []
    with stop_signals_to(lambda number, frame: signals.append(number)):
        yield signals
    if signals:
        raise SystemExit(EXIT_STOPPED)
