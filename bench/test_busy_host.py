"""Beside other programs: one busy process per core, and what is left of the speed.

`fastrelu-serial` is the same loop on one thread.  A parallel loop that waits for a
thread which does not get a core can take many times as long.
"""

import os
import subprocess
import sys

import pytest
from variants import variant

from fastrelu.cli.peers.cases import MODES
from fastrelu.cli.peers.libraries import FastRelu, Torch

PEERS = [
    FastRelu,
    variant("fastrelu-serial", NUMBA_NUM_THREADS="1"),
    Torch,
]


def cases(full):
    sizes = ("128k", "1M", "16M") if full else ("1M",)
    return [f"relu-{mode}-float32-{n}" for n in sizes for mode in MODES]


@pytest.fixture(scope="module")
def busy(limit):  # which is measured before, while the machine is idle
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(os.cpu_count())]
    yield
    for process in processes:
        with process:
            process.kill()


def test_busy_host(busy, measured, report):
    report(measured, "busy-")
