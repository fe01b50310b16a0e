"""``python -m fastrelu info``: what fastrelu runs on."""

import argparse
import ctypes
import importlib.metadata
import importlib.util
import platform
import shutil
import sys
import textwrap
from typing import Any

from fastrelu import __version__, cpu

PACKAGES = ("NumPy", "Numba", "llvmlite")

# What LLVM calls the features that decide how wide and how fast the loops are.
FEATURES = (
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl"),
    *("avx512fp16", "avx512bf16", "neon", "fullfp16", "bf16", "sve", "sve2"),
)


def add(commands: Any) -> None:
    """Add this command to those of a parser."""
    command = commands.add_parser("info", help="print what fastrelu runs on")
    command.set_defaults(run=info)


def info(args: argparse.Namespace) -> int:
    """Print what fastrelu runs on; return the exit status."""
    import llvmlite.binding
    import numba

    found = llvmlite.binding.get_host_cpu_features()
    features = [name for name in FEATURES if found.get(name)]
    lines = {
        "fastrelu": __version__,
        "Python": f"{platform.python_version()} ({platform.platform()})",
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "CPU": f"{llvmlite.binding.get_host_cpu_name()}, {platform.machine()}",
        "features": " ".join(features) or "none of those that matter here",
        "threads": str(numba.config.NUMBA_NUM_THREADS),
        "loops": ", because ".join(filter(None, cpu.engine())),
        "CUDA": cuda(),
    }
    width = max(map(len, lines)) + 2
    columns = max(shutil.get_terminal_size().columns, 40)
    for name, text in lines.items():
        label = name.ljust(width)
        print(
            textwrap.fill(
                text, columns, initial_indent=label, subsequent_indent=" " * width
            )
        )
    return 0


def cuda() -> str:
    """Say what is there to compute on a GPU with, and the first thing that is not."""
    try:
        driver = ctypes.CDLL("nvcuda" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "no NVIDIA driver found"
    count, version = ctypes.c_int(), ctypes.c_int()
    error = (
        driver.cuInit(0)
        or driver.cuDeviceGetCount(ctypes.byref(count))
        or driver.cuDriverGetVersion(ctypes.byref(version))
    )
    if error:
        return f"the NVIDIA driver answers with error {error}"
    devices = f"{count.value} GPU" + "s" * (count.value != 1)
    release = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    found = f"found {devices} and a driver for {release}"
    if importlib.util.find_spec("numba_cuda") is None:
        return f'{found}; numba-cuda is missing: pip install "fastrelu[cuda13]"'
    return f"{found}, and numba-cuda"
