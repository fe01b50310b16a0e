"""What kills units, and what brings them back: a walk through a network of 14 layers.

    python bench/dying_units.py      # two minutes on two cores; needs the extra demo

A ReLU unit whose inputs are negative for every image gives 0 for all of them and passes
no gradient, so nothing that it learns from can ever change it: it is dead.  A step too
large does that.  The same steps are taken here at several learning rates, then a damaged
network goes on with careful steps in four ways: with ReLU, and from the same weights with
slopes that pass a gradient where a unit is inactive.
"""

import argparse
import copy
from pathlib import Path

import numpy as np
from report import STYLE

from fastrelu import nn
from fastrelu.cli.training import Threads, judge, load_digits, network

BATCH, GOOD, CAREFUL = 64, 0.005, 0.002
ACTIVATIONS = {
    "ReLU": nn.ReLU,
    "Leaky ReLU, slope 0.01": nn.LeakyReLU,
    "Leaky ReLU, slope 0.1": lambda: nn.LeakyReLU(0.1),
    "PReLU, slopes from 0.25": nn.PReLU,
}
LOOKS = ("o", "#2380cc"), ("s", "#9a7d0a"), ("D", "#00936b"), ("^", "#d55e00")


def with_activation(model, make):
    """Return the same weights with another activation"""
    layers = copy.deepcopy(model.layers)
    made = [make() if isinstance(a, nn.Activation) else a for a in layers]
    return nn.Sequential(*made)


class Walk:
    """Training runs on the same digits, and what they came to"""

    def __init__(self, seed):
        self.digits, self.seed = load_digits(seed), seed
        self.threads = Threads(1)  # the same each time

    def look(self, model):
        """Return the accuracy on the test images, and each layer's dead units"""
        logits = model.forward(self.digits.test_x, training=False)
        (_, accuracy), _ = judge(logits, self.digits.test_y)
        dead = nn.dead_units(model, self.digits.train_x)
        return accuracy, [int(units.sum()) for units in dead]

    def train(self, model, rate, epochs):
        """Yield how a model looks before any step, and after each epoch"""
        rng = np.random.default_rng(self.seed)
        optimiser = nn.SGD(model.parameters, rate, momentum=0.9)
        x, labels = self.digits.train_x, self.digits.train_y
        yield self.look(model)
        for _ in range(epochs):
            order = rng.permutation(len(x))
            for rows in np.array_split(order, len(x) // BATCH):
                with self.threads.step(), np.errstate(over="ignore", invalid="ignore"):
                    _, grad = judge(model.forward(x[rows]), labels[rows])
                    model.backward(grad)
                    optimiser.step()
            yield self.look(model)


def is_finite(model):
    return all(np.isfinite(p.value).all() for p in model.parameters)


def draw(path, histories):
    """Draw dead units and accuracy over the epochs of each activation"""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(5, 6), layout="constrained")
    dead, accuracy = figure.subplots(2, 1, sharex=True)
    for (name, history), (marker, color) in zip(histories.items(), LOOKS, strict=True):
        look = {"marker": marker, "color": color, "label": name}
        accuracy.plot([of for of, _ in history], **look)
        dead.plot([sum(units) for _, units in history], **look)
    dead.set_ylabel("dead units")
    dead.set_yscale("log")
    accuracy.legend(frameon=False)
    accuracy.set_ylabel("test accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    accuracy.set_xlabel(f"epochs at learning rate {CAREFUL}")
    date = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, transparent=True, metadata=date)


def main():
    """Run, print the tables, and draw"""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--revive", type=float, default=0.05, help="one of the rates")
    parser.add_argument("--epochs", type=int, nargs=2, default=(3, 12))
    parser.add_argument("--plot", type=Path, help="a picture, as PNG, PDF or SVG")
    args = parser.parse_args()
    walk = Walk(args.seed)
    first, more = args.epochs
    print(f"After {first} epochs with ReLU\n")
    print(
        "| learning rate | test accuracy | dead units | in the first and last layer |"
    )
    print("|---:|---:|---:|---:|")
    for rate in args.rates:
        model = network("relu", np.random.default_rng(args.seed))
        *_, (accuracy, dead) = walk.train(model, rate, first)
        found = f"{sum(dead):,} | {dead[0]} and {dead[-1]}"
        if not is_finite(model):
            found = "diverged | "
        print(f"| {rate:g} | {accuracy:.1%} | {found} |", flush=True)
        if rate == args.revive:
            damaged = model
    print(f"\nFrom those of {args.revive:g}, {more} epochs at {CAREFUL}\n")
    print("| | dead at first | and then | test accuracy at first | and then |")
    print("|---|---:|---:|---:|---:|")
    histories = {}
    for name, make in ACTIVATIONS.items():
        model = with_activation(damaged, make)
        histories[name] = history = list(walk.train(model, CAREFUL, more))
        (before, dead), (after, left) = history[0], history[-1]
        left = f"{sum(left):,}" if is_finite(model) else "diverged"
        found = f"{sum(dead):,} | {left} | {before:.1%} | {after:.1%}"
        print(f"| {name} | {found} |", flush=True)
    if args.plot:
        import matplotlib as mpl

        with mpl.rc_context(STYLE):
            draw(args.plot, histories)


RATES = [GOOD, 0.02, 0.05, 0.1, 0.2]

if __name__ == "__main__":
    main()
