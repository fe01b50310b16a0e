"""What a fresh result costs: from the pool, without it, and beside `out=`."""

import json
import subprocess
import sys

import pytest
from variants import variant

from fastrelu.cli.peers.libraries import FastRelu, NumPy

PEERS = [FastRelu, variant("fastrelu-no-pool", FASTRELU_POOL_LIMIT="0"), NumPy]

# Resident bytes after the first call and after the last.
RESIDENT = """
import json, sys, time
import numpy as np, psutil
import fastrelu
x = np.ones(1 << 24, np.float32)
memory, seconds, resident = psutil.Process().memory_info, [], []
for _ in range(int(sys.argv[1])):
    start = time.perf_counter()
    y = fastrelu.relu(x)
    seconds.append(time.perf_counter() - start)
    resident.append(memory().rss)
print(json.dumps([seconds, resident]))
"""


def cases(full):
    sizes = ("128k", "1M", "16M", "64M") if full else ("16M",)
    return [f"relu-{mode}-float32-{n}" for n in sizes for mode in ("fresh", "out")]


def test_allocation(measured, report):
    report(measured, "allocation-")


def test_resident_memory(replay):
    pytest.importorskip("psutil")
    calls = 100
    command = [sys.executable, "-c", RESIDENT, str(calls)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, resident = json.loads(done.stdout)
    array = 4 << 24
    # While a result is made the one before is still held: two blocks in all.
    assert resident[-1] - resident[1] < array
    replay(
        seconds,
        "resident-memory",
        calls=calls,
        array_bytes=array,
        resident_bytes=[resident[0], resident[1], resident[-1]],
    )
