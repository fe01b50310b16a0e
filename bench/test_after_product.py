"""Right after a matrix product or convolution, in one process: where activations are called.

The threads of the product's library are still awake then, and look for work.  Each round
times one call of each contender, each on what a product has just made.
"""

import time
from functools import partial
from itertools import product

import numpy as np
import pytest

from fastrelu.cli.peers.cases import Case
from fastrelu.cli.peers.libraries import FastRelu, NumPy, Torch
from fastrelu.cli.peers.worker import SLOPE

PRODUCTS = {
    "torch.mm": (FastRelu, Torch),
    "torch.conv1d": (FastRelu, Torch),
    "@": (FastRelu, NumPy, Torch),
}
OPS = ("relu", "relu_backward"), ("fresh", "out", "inplace")
SIZES = ("1k", "16k", "128k", "1M", "16M")
MODES = {"inplace": "in place"}
# Where an array happens to lie makes a difference: each contender has several sets.
SETS, UNCOUNTED, ROUNDS, SECONDS = 5, 10, 31, 1.5
INNER = 64
CHANNELS, WIDTH = 8, 9


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("--full")
    sizes = SIZES if full else ("1M",)
    pairs = [
        (f"{op}-{mode}-float32-{n}", after, peer)
        for after, op, mode, n in product(PRODUCTS, *OPS, sizes)
        for peer in PRODUCTS[after]
        if not peer.missing() and not Torch.missing()
    ]
    names = [f"{case}-{after}-{peer.name}" for case, after, peer in pairs]
    metafunc.parametrize(("case", "after", "peer"), pairs, ids=names)


def product_into(target, after):
    """Return a call that makes an array, as rows, of a product"""
    import torch

    rows = np.asarray(target).reshape(-1, min(target.size, 1024))
    rng = np.random.default_rng(0)
    a = rng.standard_normal((len(rows), INNER), np.float32)
    b = rng.standard_normal((INNER, rows.shape[1]), np.float32)
    if after == "@":
        return lambda: np.matmul(a, b, out=rows)
    a, b, rows = map(torch.from_numpy, (a, b, rows))
    return lambda: torch.mm(a, b, out=rows)


def convolution_like(target):
    """Return a call that returns a convolution's result, a new array each time"""
    import torch

    rng = np.random.default_rng(0)
    a = rng.standard_normal((1, CHANNELS, target.size // CHANNELS), np.float32)
    b = rng.standard_normal((CHANNELS, CHANNELS, WIDTH), np.float32)
    a, b = map(torch.from_numpy, (a, b))
    convolve = partial(torch.conv1d, a, b, padding=WIDTH // 2)
    return lambda: convolve().numpy().reshape(target.shape)


class Contender:
    """A peer and what it takes right after a product: of its input, or of its gradient"""

    def __init__(self, peer, case, after):
        self.peer, self.case, self.data = peer, case, peer.data(case, SLOPE)
        self.given = "g" if case.row.passes == "backward" else "x"
        target = getattr(self.data, self.given)
        if after == "torch.conv1d":
            self.product = convolution_like(target)
        else:
            multiply = product_into(target, after)
            self.product = lambda: (multiply(), target)[1]

    def give(self, array):
        setattr(self.data, self.given, array)
        if self.case.mode == "inplace":
            self.data.target = array

    def time(self):
        self.give(None)  # as in a network, where the next product takes its memory
        self.give(self.product())
        call = self.peer.call(self.case, self.data)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


@pytest.fixture
def times(case, after):
    """Return the seconds of each, which the first to ask has measured, in turns"""
    if (case, after) not in MEASURED:
        MEASURED.clear()
        peers = [peer for peer in PRODUCTS[after] if not peer.missing()]
        seconds = {peer.name: [] for peer in peers}
        for turn in range(SETS):
            order = peers[turn % len(peers) :] + peers[: turn % len(peers)]
            made = [Contender(peer(), Case.parse(case), after) for peer in order]
            end = time.monotonic() + SECONDS
            for count in range(UNCOUNTED + ROUNDS):
                for each in made:
                    taken = each.time()
                    if count >= UNCOUNTED:
                        seconds[each.peer.name].append(taken)
                if count > UNCOUNTED and time.monotonic() > end:
                    break
        MEASURED[case, after] = seconds
    return MEASURED[case, after]


MEASURED = {}


def test_after_product(case, after, peer, times, replay, session):
    seconds, found = times[peer.name], Case.parse(case)
    mode = f"{MODES.get(found.mode, found.mode)} after {after}"
    session.versions[peer.name] = peer().version
    replay(
        seconds,
        f"{found.op}-{mode}-{found.dtype}-{found.n}",
        op=found.op,
        mode=mode,
        dtype=found.dtype,
        n=found.n,
        peer=peer.name,
        peer_version=peer().version,
        bytes=found.bytes,
        gb_per_s=found.bytes / float(np.median(seconds)) / 1e9,
        limit_gb_per_s=None,
    )
