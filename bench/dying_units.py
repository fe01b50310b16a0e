"""What kills units, and what revives them: the network of fourteen layers, taught too fast.

    pip install ".[demo]"
    python bench/dying_units.py

A unit of ReLU that is active for no image passes no gradient on, so nothing that is learned
moves its weights any more: it is dead.  One step that is too long is enough.  Here ReLU
learns with steps of several lengths.  The network that has lost most of its units then
goes on with usual steps, with ReLU and, from the same weights, with Leaky ReLU and PReLU,
whose gradient is never zero.
"""

import argparse
from pathlib import Path

import numpy as np

from fastrelu import nn
from fastrelu.cli import parser
from fastrelu.cli.training import ACTIVATIONS, Run, load_digits

RATES = 0.005, 0.02, 0.05  # the highest on the way; the first one is the usual
TAUGHT, REVIVED = 5, 15  # epochs
COLORS = {"relu": "#d55e00", "leaky_relu": "#2380cc", "prelu": "#00936b"}
MARKERS = {"relu": "o", "leaky_relu": "s", "prelu": "D"}
GREY = "#768089"


def start(activation, rate, epochs):
    options = ["--activation", activation, "--learning-rate", str(rate)]
    options += ["--epochs", str(epochs), "--threads", "1"]  # the same each time
    return Run(parser().parse_args(["train", *options]), load_digits(0))


def learn(run):
    """Return how the epochs went; a run that diverges ends before."""
    with np.errstate(over="ignore", invalid="ignore"):
        try:
            for _ in run:
                pass
        except FloatingPointError:
            pass
    return run.history


def dense(run):
    """Return the parameters that networks of all activations have."""
    layers = (layer for layer in run.model.layers if isinstance(layer, nn.Dense))
    return [p for layer in layers for p in layer.parameters]


def revive(killed, activation):
    """Go on from the weights of a network with another activation."""
    run = start(activation, RATES[0], REVIVED)
    for new, old in zip(dense(run), dense(killed), strict=True):
        new.value[...] = old.value
    return learn(run)


def row(epoch):
    share = np.mean(epoch.inactive)
    return f"{sum(epoch.dead):,} | {share:.0%} | {epoch.test_accuracy:.1%} |"


def draw(histories, path):
    """Draw dead units and accuracy over the epochs, as a telephone shows it."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = "text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color"
    style = dict.fromkeys((*names, "ytick.color", "grid.color"), GREY)
    style |= {"svg.hashsalt": "fastrelu"}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        picture = Figure(figsize=(5.4, 2.6), layout="constrained")
        dead, accuracy = picture.subplots(1, 2)
        for name, history in histories.items():
            look = {"color": COLORS[name], "marker": MARKERS[name], "markersize": 3}
            epochs = range(1, len(history) + 1)
            dead.plot(epochs, [sum(e.dead) for e in history], label=name, **look)
            accuracy.plot(epochs, [e.test_accuracy for e in history], **look)
        for ax, title in ((dead, "dead units"), (accuracy, "accuracy on the test set")):
            ax.set_title(title, loc="left", fontsize=10)
            ax.set_xlabel("epochs since")
            ax.grid(alpha=0.25, linewidth=0.6)
        dead.set_ylim(0)
        accuracy.set_ylim(0, 1)
        dead.legend(frameon=False, fontsize=8)
        picture.savefig(path, transparent=True, metadata={"Date": None})


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    folder = Path(__file__).resolve().parent / "results"
    options.add_argument("--plot", type=Path, default=folder / "dying-units.svg")
    args = options.parse_args()
    print("| ReLU, highest learning rate | dead units | inactive | accuracy |")
    print("|---|---:|---:|---:|")
    for rate in RATES:
        killed = start("relu", rate, TAUGHT)
        print(f"| {rate} | {row(learn(killed)[-1])}", flush=True)
    units = sum(layer.bias.value.size for layer in killed.model.layers[:-1:2])
    print(f"\nof {units:,} units, after {TAUGHT} epochs\n")
    print(f"| from there with {RATES[0]} | dead units | inactive | accuracy |")
    print("|---|---:|---:|---:|")
    histories = {}
    for activation in ACTIVATIONS:
        histories[activation] = revive(killed, activation)
        print(f"| {activation} | {row(histories[activation][-1])}", flush=True)
    draw(histories, args.plot)


if __name__ == "__main__":
    main()
