"""Functions that Numba compiles: kept on disk, and the threads that run them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache


def kept_on_disk(decorator: Callable, function: Callable, *arguments, **options):
    """Compiles a function once for all processes, or in each where no folder can be written.

    Args:
        decorator: `numba.njit` or `numba.cfunc`.
        function: compiled anew when its file has changed, or the processor; it must call no
            compiled function of another file.
        arguments: of the decorator.
        options: of the decorator.

    Returns:
        What the decorator makes of the function.
    """
    try:
        return decorator(*arguments, cache=True, **options)(function)
    except RuntimeError:  # Numba finds no folder for its cache
        return decorator(*arguments, **options)(function)


@lru_cache
def thread_pool(threads: int) -> ThreadPoolExecutor:
    """Threads for loops that let go of the GIL, started once: that takes longer than a piece."""
    return ThreadPoolExecutor(threads)
