"""PyTorch's threads: those of OpenMP that its products and convolutions run on.

After a product they look for work for milliseconds.  A loop that comes then has only
them to share with: members of a team of its own would wait for their processors.  But
whoever calls them waits until the last of them has come, which takes milliseconds where
one sleeps and another program has its processor.  So they are asked only while each of
them runs, which Linux tells by the time that a thread has had a processor.

OpenMP gives each thread that calls it others of its own.  One thread's are known at a
time: those of whoever brings loops.  A thread that had none is given some when it calls,
and then all of the process's look for work more briefly: they are dismissed again.
"""

import ctypes
import os
import sys
import time
from pathlib import Path

from fastrelu.cpu.shield import no_fork

ASKED = 4  # of their clocks, at most: the others are taken to be like these
WALL = getattr(time, "CLOCK_MONOTONIC", 1)  # the clock that always goes
_GOMP = (
    "GOMP_parallel",
    "omp_get_max_threads",
    "omp_get_thread_num",
    "omp_pause_resource_all",
)
_SOFT = 1  # to OpenMP: threads end, settings stay


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def functions() -> list[int]:
    """Return where OpenMP's and Linux's functions are, or nothing while they are not."""
    try:
        file = Path(sys.modules["torch"].__file__ or "").parent / "lib/libtorch_cpu.so"
        library = ctypes.CDLL(str(file), os.RTLD_NOLOAD | os.RTLD_NOW)
        found = [getattr(library, name) for name in _GOMP]
        found.append(ctypes.CDLL(None).clock_gettime)
    except (AttributeError, KeyError, OSError):
        return []
    return [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in found]


def threads() -> set[int]:
    """Return what Linux calls the threads of this process."""
    return {int(name) for name in os.listdir("/proc/self/task")}


def dismiss(pause: int) -> None:
    """Have OpenMP's threads for this one end, by its function for that.

    Who ends a thread takes a lock of the compiler's library.  A child that was forked
    meanwhile would wait for it for ever, as soon as it compiles or loads anything.
    """
    with no_fork:
        ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(pause)(_SOFT)


def clock_of(thread: int) -> int:
    """Return Linux's number of the clock that goes while a thread has a processor."""
    return ~thread << 3 | 6


def running(ours: set[int]) -> int:
    """Return how many threads of this process, but ours, never leave their processors.

    Those that look for work do not, for much longer than this takes.
    """
    read, time_ = ctypes.CDLL(None).clock_gettime, _Time()
    others = threads() - ours

    def now(thread: int) -> float:
        if read(ctypes.c_int(clock_of(thread)), ctypes.byref(time_)) != 0:
            return 0  # it has ended
        return float(time_.seconds) + float(time_.nanoseconds) / 1e9

    start, before = time.monotonic(), {thread: now(thread) for thread in others}
    time.sleep(0.0005)
    half = (time.monotonic() - start) / 2
    return sum(now(thread) - was > half for thread, was in before.items())
