"""The roof over all peers: C code made for this machine, with no checks at all.

It is a measure of what the hardware can do and no rival, so it is not shipped.  Run as
a script it is a worker.
"""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import timeit
from functools import partial
from pathlib import Path

from fastrelu.cli.peers.base import Peer
from fastrelu.cli.peers.cases import FUNCTIONS, OPS, Case, Function, Op
from fastrelu.cli.peers.worker import serve

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
SMALLEST = 1 << 14  # elements below which ctypes takes longer than the loop

FUNCTIONS["copy"], OPS["copy"] = Function((), lambda x, _: x), Op("copy", "forward")
LIMIT = Case("copy", "out", "float32", 1 << 26)


class Roof(Peer):
    """The quickest of its own variants at every size."""

    name = "c"
    modules = ()
    activations = ("relu", "copy")
    passes = ("forward", "backward")
    modes = ("out", "inplace")
    dtypes = ("float32",)

    @classmethod
    def missing(cls):
        return "" if shutil.which("cc") else "there is no C compiler"

    @classmethod
    def lacks(cls, case):
        if case.n < SMALLEST:
            return "the call would take longer than the loop"
        if case.op == "copy" and case.mode == "inplace":
            return "a copy in place is none"
        return super().lacks(case)

    @classmethod
    def command(cls):
        return [sys.executable, __file__]

    def __init__(self):
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, "roof.so")
            subprocess.run(["cc", *FLAGS, str(SOURCE), "-o", library], check=True)
            self.library = ctypes.CDLL(str(library))

    @property
    def version(self):
        command = ["cc", "-dumpfullversion", "-dumpversion"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return f"{done.stdout.strip()}, {platform.machine()}"

    def call(self, case, data):
        function = getattr(self.library, case.op.removesuffix("_mask"))
        function.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_ssize_t]
        function.argtypes += [ctypes.c_int] * 2
        function.restype = None
        arrays = (data.target, data.x, data.x if data.g is None else data.g)
        pointers = [array.ctypes for array in arrays]  # they keep the arrays alive
        # In place the cache has just read the line: there is nothing to go past.
        streams = (0,) if case.mode == "inplace" else (0, 1)
        calls = [
            partial(function, *pointers, data.x.size, threads, stream)
            for threads in sorted({1, len(os.sched_getaffinity(0))})
            for stream in streams
        ]
        rounds = max(2, (1 << 22) // case.n)
        return min(calls, key=lambda f: min(timeit.repeat(f, repeat=3, number=rounds)))

    def arrays(self, case, result):
        return [None]


if __name__ == "__main__":
    serve(Roof())
