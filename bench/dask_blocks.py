"""Dask arrays: what a block costs beside NumPy's, and what a second worker is worth.

    pip install ".[dask]" distributed
    python bench/dask_blocks.py

Overhead is that of small blocks in the threaded scheduler: the time of ours less that of
NumPy's own functions for the same, in turns, for each block.  A mask is a second result,
such as numpy.modf has.  Scaling is that of blocks beyond the cache in processes of one
thread each: the time of one worker over that of two, where blocks are made where they are
needed, and no result leaves its worker.
"""

import argparse
import statistics
import time

import dask
import dask.array as da
import numpy as np

import fastrelu

BLOCKS = 1000
CHUNK = 1 << 24  # bytes
SCALED = {"relu": fastrelu.relu, "numpy.maximum": lambda x: np.maximum(x, 0)}


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def calls(x, g):
    """Each with NumPy's own for it, by name"""
    weight = np.full(x.shape[1], 0.25, np.float32)
    masked = fastrelu.relu(x, return_mask=True)
    return {
        "relu": (fastrelu.relu(x), np.maximum(x, 0)),
        "relu_backward": (fastrelu.relu_backward(g, x), g * (x > 0)),
        "prelu": (fastrelu.prelu(x, weight), np.maximum(x, 0.25 * x)),
        "relu with a mask": (masked, da.modf(x)),
        "prelu_backward": (
            fastrelu.prelu_backward(g, x, weight),
            (np.where(x > 0, g, 0.25 * g), np.where(x > 0, 0, x * g).sum(0)),
        ),
    }


def overhead(turns):
    """Microseconds for a block, ours less NumPy's, by name"""
    x = da.ones((16 * BLOCKS, 64), dtype=np.float32, chunks=(16, 64)).persist()
    found = {}
    for name, (ours, theirs) in calls(x, x).items():
        pairs = []
        for _ in range(turns + 1):
            pairs.append([seconds(lambda y=y: dask.persist(y)) for y in (ours, theirs)])
        found[name] = [1e6 * (a - b) / BLOCKS for a, b in pairs[1:]]
    return found


def scaling(turns):
    """How many times as fast two workers are as one, by whose function it is"""
    from distributed import Client, LocalCluster

    times = {}
    x = da.random.default_rng(0).random(
        (64, CHUNK // 4), dtype=np.float32, chunks=(1, -1)
    )
    for workers in (1, 2):
        options = {"n_workers": workers, "threads_per_worker": 1}
        with LocalCluster(**options, dashboard_address=":0") as own, Client(own):
            kept = (x - np.float32(0.5)).persist()
            for name, relu in SCALED.items():
                y = relu(relu(kept) - kept)[:, ::4096].sum()
                y.compute()
                times[name, workers] = [seconds(y.compute) for _ in range(turns)]
    return {
        name: [a / b for a, b in zip(times[name, 1], times[name, 2], strict=True)]
        for name in SCALED
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=9)
    args = parser.parse_args()
    print("| a block of 1,024 elements, beside NumPy's | overhead |\n|---|---:|")
    for name, found in overhead(args.turns).items():
        print(f"| `{name}` | {statistics.median(found):.0f} µs |", flush=True)
    print("\n| 64 blocks of 16 MiB | two workers for one | from | to |")
    print("|---|---:|---:|---:|")
    for name, found in scaling(args.turns).items():
        middle = statistics.median(found)
        print(f"| `{name}` | {middle:.2f}x | {min(found):.2f} | {max(found):.2f} |")


if __name__ == "__main__":
    main()
