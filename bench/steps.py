"""Whole training steps: what activations are worth in a network.

    python bench/steps.py            # some minutes; prints the table of the README
    python bench/steps.py --seconds 1

Each network is written in NumPy once and run with two sets of activations, NumPy's idioms
and fastrelu's; PyTorch has the same layers, if it is installed.  Each contender has a
process of its own, all take turns, and what is compared is the ratio within a turn.
"""

import argparse
import itertools
import multiprocessing
import statistics
import time
from importlib.util import find_spec

import numpy as np

import fastrelu

BATCH = 64
WIDTHS = 784, *[1024] * 5, *[512] * 8, 10


# Activations: (forward(z, slope) -> (y, saved), backward(g, saved, slope) -> gradients) --


def numpy_relu(z, slope):
    return np.maximum(z, 0), z


def numpy_relu_backward(g, z, slope):
    return g * (z > 0), None


def numpy_prelu(z, slope):
    return np.where(z > 0, z, slope * z), z


def numpy_prelu_backward(g, z, slope):
    axes = tuple(range(z.ndim - 1))
    return np.where(z > 0, g, slope * g), np.where(z > 0, 0, z * g).sum(axes)


def ours_relu(z, slope):
    y, mask = fastrelu.relu(z, inplace=True, return_mask=True)
    return y, mask


def ours_relu_backward(g, mask, slope):
    return fastrelu.relu_backward(g, mask, inplace=True), None


def ours_prelu(z, slope):
    return fastrelu.prelu(z, slope, axis=-1), z


def ours_prelu_backward(g, z, slope):
    return fastrelu.prelu_backward(g, z, slope, axis=-1, inplace=True)


ACTIVATIONS = {
    ("numpy", "relu"): (numpy_relu, numpy_relu_backward),
    ("numpy", "prelu"): (numpy_prelu, numpy_prelu_backward),
    ("fastrelu", "relu"): (ours_relu, ours_relu_backward),
    ("fastrelu", "prelu"): (ours_prelu, ours_prelu_backward),
}


# Layers in NumPy ----------------------------------------------------------------------


def patches(x):
    """The 3 x 3 surroundings of each pixel of an NHWC array, as rows of a matrix"""
    n, h, w, c = x.shape
    wide = np.zeros((n, h + 2, w + 2, c), x.dtype)
    wide[:, 1:-1, 1:-1] = x
    views = np.lib.stride_tricks.sliding_window_view(wide, (3, 3), (1, 2))
    return views.transpose(0, 1, 2, 4, 5, 3).reshape(n * h * w, 9 * c)


def spread(columns, shape):
    """The gradient of `patches`"""
    n, h, w, c = shape
    wide = np.zeros((n, h + 2, w + 2, c), columns.dtype)
    columns = columns.reshape(n, h, w, 3, 3, c)
    for i in range(3):
        for j in range(3):
            wide[:, i : i + h, j : j + w] += columns[:, :, :, i, j]
    return wide[:, 1:-1, 1:-1]


class Network:
    """Layers of products, each but the last with an activation, and plain SGD"""

    def __init__(self, library, kind, widths, image):
        rng = np.random.default_rng(0)
        self.forward, self.backward = ACTIVATIONS[library, kind]
        self.image = image  # the shape of one image, or None for dense layers
        rows = 9 if image else 1
        self.weights = [
            (rng.standard_normal((rows * m, n)) / np.sqrt(rows * m)).astype(np.float32)
            for m, n in itertools.pairwise(widths)
        ]
        self.slopes = [np.full(n, 0.25, np.float32) for n in widths[1:-1]]
        shape = (BATCH if image is None else BATCH // 8, *(image or ()), widths[0])
        self.x = rng.standard_normal(shape).astype(np.float32)

    def __call__(self):
        x, kept = self.x, []
        for k, weight in enumerate(self.weights):
            rows = patches(x) if self.image else x
            z = (rows @ weight).reshape(*x.shape[:-1], -1)
            last = k == len(self.slopes)
            y, saved = (z, None) if last else self.forward(z, self.slopes[k])
            kept.append((rows, x.shape, saved))
            x = y
        g = x * np.float32(1 / x.size)  # of the mean square
        for k in reversed(range(len(self.weights))):
            rows, shape, saved = kept[k]
            weight = self.weights[k]
            if saved is not None:
                g, of_slope = self.backward(g, saved, self.slopes[k])
                if of_slope is not None:
                    self.slopes[k] -= 1e-3 * of_slope
            flat = g.reshape(-1, weight.shape[1])
            g = flat @ weight.T if k else None
            if k and self.image:
                g = spread(g, shape)
            elif k:
                g = g.reshape(shape)
            weight -= 1e-3 * (rows.T @ flat)


def torch_network(kind, widths, image):
    import torch

    torch.manual_seed(0)
    layers = []
    for k, (m, n) in enumerate(itertools.pairwise(widths)):
        if image:
            layers.append(torch.nn.Conv2d(m, n, 3, padding=1, bias=False))
        else:
            layers.append(torch.nn.Linear(m, n, bias=False))
        if k < len(widths) - 2:
            relu = torch.nn.ReLU(inplace=True)
            layers.append(relu if kind == "relu" else torch.nn.PReLU(n))
    model = torch.nn.Sequential(*layers)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(BATCH // 8, widths[0], *image) if image else torch.randn(BATCH, 784)

    def step():
        optimiser.zero_grad()
        (model(x).square().mean() / 2).backward()
        optimiser.step()

    return step


# Who takes which turn -----------------------------------------------------------------

NETWORKS = {
    "14 dense layers, ReLU": ("relu", WIDTHS, None),
    "14 dense layers, PReLU": ("prelu", WIDTHS, None),
    "convolutions, ReLU": ("relu", (3, 32, 32, 64, 10), (28, 28)),
    "super-resolution, PReLU": ("prelu", (1, 32, 32, 32, 32, 1), (48, 48)),
}


def serve(library, network, pipe):
    """Run steps for as long as it is told, in a process of its own"""
    kind, widths, image = NETWORKS[network]
    if library == "torch":
        step = torch_network(kind, widths, image)
    else:
        step = Network(library, kind, widths, image)
    step()
    while seconds := pipe.recv():
        times, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        pipe.send(statistics.median(times))


def measure(network, libraries, seconds, turns):
    context, pipes = multiprocessing.get_context("spawn"), {}
    for library in libraries:
        pipes[library], end = context.Pipe()
        context.Process(target=serve, args=(library, network, end), daemon=True).start()
    found = {library: [] for library in libraries}
    for turn in range(turns + 1):  # the first one warms up
        for library, pipe in pipes.items():
            pipe.send(seconds)
            median = pipe.recv()
            if turn:
                found[library].append(median)
    for pipe in pipes.values():
        pipe.send(0)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each turn")
    parser.add_argument("--turns", type=int, default=9)
    args = parser.parse_args()
    libraries = ["fastrelu", "numpy"] + ["torch"] * (find_spec("torch") is not None)
    print("| a training step | fastrelu | NumPy's idioms | PyTorch |")
    print("|---|---:|---:|---:|")
    for network in NETWORKS:
        found = measure(network, libraries, args.seconds, args.turns)
        ours = found["fastrelu"]
        cells = [f"{1e3 * statistics.median(ours):.1f} ms"]
        for library in libraries[1:]:
            ratios = [b / a for a, b in zip(ours, found[library], strict=True)]
            low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
            cells.append(f"{middle:.2f}x ({low:.2f} to {high:.2f})")
        cells += ["-"] * (4 - 1 - len(cells))
        print(f"| {network} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
