"""How long the first call of a function takes in a process that has called another.

With `warm`, the loops come from Numba's disk cache; with `empty`, they are compiled.
The very first call, of whatever function, also starts Numba: `start` is that one.
"""

import os
import subprocess
import sys

import pytest

CALLS = {
    "start": "relu(x.astype(np.int8))",
    "relu": "relu(x)",
    "relu_backward": "relu_backward(x, x)",
    "leaky_relu": "leaky_relu(x)",
    "leaky_relu_backward": "leaky_relu_backward(x, x)",
    "prelu": "prelu(x, w)",
    "prelu_backward": "prelu_backward(x, x, w)",
}

SCRIPT = """
import time
import numpy as np
import fastrelu
x, w = np.ones((16, 64), np.float32), np.ones(64, np.float32)
{}
start = time.perf_counter()
fastrelu.{}
print(time.perf_counter() - start)
"""


def first_call(function, folder):
    """Return the seconds of the first call with the disk cache in this folder."""
    before = "" if function == "start" else f"fastrelu.{CALLS['start']}"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(before, CALLS[function])],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"NUMBA_CACHE_DIR": str(folder)},
    )
    return float(done.stdout)


@pytest.fixture(scope="module")
def times(tmp_path_factory, pytestconfig):
    """Return the seconds for each function and state of the cache, taken in turn."""
    turns = 3 if pytestconfig.getoption("--full") else 1
    times = {(name, cache): [] for name in CALLS for cache in ("empty", "warm")}
    for _ in range(turns):
        folders = {name: tmp_path_factory.mktemp("cache") for name in CALLS}
        for name, folder in folders.items():
            times[name, "empty"].append(first_call(name, folder))
        for _ in range(3):
            for name, folder in folders.items():
                times[name, "warm"].append(first_call(name, folder))
    return times


@pytest.mark.parametrize("cache", ["warm", "empty"])
@pytest.mark.parametrize("function", CALLS)
def test_first_call(function, cache, times, replay):
    seconds = times[function, cache]
    replay(seconds, f"first-call-{cache}", function=function, cache=cache)
