"""What kills units, and what brings them back: a walk through a network of 14 layers.

    python bench/dying_units.py      # two minutes on two cores; needs the extra demo

A ReLU unit whose inputs are negative for every image gives 0 for all of them and passes
no gradient, so nothing that it learns from can ever change it: it is dead.  A step too
large does that.  The same steps are taken here at several learning rates, then the
network with the most dead units goes on at a good rate four ways: with ReLU, and from
the same weights with slopes that pass a gradient where a unit is inactive.
"""

import argparse
import copy
from pathlib import Path

import numpy as np

from fastrelu import nn
from fastrelu.cli.training import Threads, load_digits, network

BATCH, GOOD = 64, 0.005
ACTIVATIONS = {
    "ReLU": nn.ReLU,
    "Leaky ReLU, slope 0.01": nn.LeakyReLU,
    "Leaky ReLU, slope 0.1": lambda: nn.LeakyReLU(0.1),
    "PReLU, slopes from 0.25": nn.PReLU,
}


def with_activation(model, make):
    """Return the same weights with another activation"""
    layers = copy.deepcopy(model.layers)
    made = [make() if isinstance(a, nn.Activation) else a for a in layers]
    return nn.Sequential(*made)


class Walk:
    """Training runs on the same digits, and what they came to"""

    def __init__(self, seed):
        self.digits, self.seed = load_digits(seed), seed
        self.threads = Threads()

    def look(self, model):
        """Return the accuracy on the test images, and each layer's dead units"""
        logits = model.forward(self.digits.test_x, training=False)
        accuracy = (logits.argmax(axis=1) == self.digits.test_y).mean()
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
                    logits = model.forward(x[rows])
                    model.backward(nn.softmax_cross_entropy(logits, labels[rows])[1])
                    optimiser.step()
            yield self.look(model)


def main():
    """Run, print the tables, and draw"""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--epochs", type=int, nargs=2, default=(3, 12))
    parser.add_argument("--plot", type=Path, help="a picture, as PNG, PDF or SVG")
    args = parser.parse_args()
    walk = Walk(args.seed)
    models = {}
    print(f"learning rate   test accuracy   dead units, {args.epochs[0]} epochs")
    for rate in args.rates:
        model = network("relu", np.random.default_rng(args.seed))
        *_, (accuracy, dead) = walk.train(model, rate, args.epochs[0])
        models[rate] = model, sum(dead)
        print(f"{rate:13g} {accuracy:15.1%} {sum(dead):12,}")


RATES = [GOOD, 0.02, 0.05, 0.1, 0.2]

if __name__ == "__main__":
    main()
