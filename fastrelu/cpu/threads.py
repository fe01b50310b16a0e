"""Which loop may run now: the only file that knows Numba's threading layers.

Numba picks a layer at a process's first parallel call and keeps it.  Each has a way to
take its host down: workqueue aborts the process when two threads enter it at once, and
GNU OpenMP kills a forked child at its first parallel call if the parent made one.
TBB does neither and copes best with a busy machine, so it is helped to be found.
"""

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numba
from numba.core import config


def _cache_size(level: int, default: int) -> int:
    """Return the bytes of a level of cache, or a usual size where nothing tells."""
    sizes = [default]
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        with contextlib.suppress(OSError, ValueError):
            if int((folder / "level").read_text()) == level:
                size = (folder / "size").read_text().strip()
                sizes = [int(size.removesuffix("K")) << 10]
    return max(sizes)


# What is beyond the last level goes to memory; what fits the second is one thread's.
PRIVATE_CACHE = _cache_size(2, 1 << 20)
CACHE = max(_cache_size(3, 1 << 25), PRIVATE_CACHE)

# Bytes moved from which waking the other threads pays.  A second core brings a second
# private cache and the bandwidth behind it; before that it saves less than it costs to
# wake.  The workqueue layer takes a hundred times longer to wake than the others.
_WORTH_IT = {
    "tbb": PRIVATE_CACHE + 1,
    "omp": PRIVATE_CACHE + 1,
    "workqueue": 32 * PRIVATE_CACHE,
}

_SMALLEST_WORTH_IT = min(_WORTH_IT.values())

_launch = threading.Lock()
_one_at_a_time = threading.Lock()
_layer: str | None = None  # None: not asked yet, "": none can be used here


def threading_layer() -> str:
    """Return the layer parallel loops run on, or "" where they must not run."""
    global _layer
    if _layer is None:
        with _launch:
            if _layer is None:
                _layer = _start()
    return _layer


def _start() -> str:
    if config.THREADING_LAYER in ("default", "tbb", "safe", "threadsafe", "forksafe"):
        _preload_tbb()
    try:
        numba.get_num_threads()  # launches the layer
        return str(numba.threading_layer())
    except (ValueError, ImportError):  # the layer asked for is not to be had
        return ""


def _preload_tbb() -> None:
    """Load the TBB that pip installs: it lies where no dynamic linker looks."""
    name = "tbb12.dll" if sys.platform == "win32" else "libtbb.so.12"
    try:
        for file in metadata.files("tbb") or ():
            if file.name == name:
                ctypes.CDLL(str(file.locate()), mode=ctypes.RTLD_GLOBAL)
                return
    except (metadata.PackageNotFoundError, OSError):
        return  # Numba looks for another layer


def _forked() -> None:
    global _layer, _launch, _one_at_a_time
    _launch, _one_at_a_time = threading.Lock(), threading.Lock()
    try:
        launched = numba.threading_layer()
    except ValueError:  # not by anybody: the child may launch its own
        return
    if launched == "omp":
        _layer = ""


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def run(task: Callable[[int], None], moved: int) -> None:
    """Call task(team) with as many threads as pay and are safe, 1 among them.

    `moved` is how many bytes the task reads and writes.
    """
    if moved >= _SMALLEST_WORTH_IT:
        layer = threading_layer()
        team = numba.get_num_threads() if layer else 1
        if team > 1 and moved >= _WORTH_IT[layer]:
            if layer != "workqueue":
                task(team)
                return
            if _one_at_a_time.acquire(blocking=False):
                try:
                    task(team)
                finally:
                    _one_at_a_time.release()
                return
    task(1)
