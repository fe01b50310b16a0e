"""The time that activations take in training, beside that of the usual idioms."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fastrelu import nn
from fastrelu.cli.training import Run, judge

Array = Any


class Idiom(nn.Layer):
    """An activation as it is commonly written in NumPy or CuPy."""

    def __init__(self, layer: Any, xp: Any) -> None:
        self.layer, self.xp = layer, xp

    def forward(self, x: Array, /, *, training: bool = True, out: Any = None) -> Array:
        """Return a new array; ``out`` goes unused."""
        self._saved = x
        if isinstance(self.layer, nn.ReLU):
            return self.xp.maximum(x, 0)
        return self.xp.where(x > 0, x, self.slope * x)

    def backward(self, grad_output: Array, /, *, out: Any = None) -> Array:
        """Return a new array; ``out`` goes unused."""
        with self._take() as x:
            if isinstance(self.layer, nn.ReLU):
                return grad_output * (x > 0)
            if isinstance(self.layer, nn.PReLU):
                terms = self.xp.where(x > 0, 0, x * grad_output)
                self.layer.weight.grad[:] = self.xp.sum(terms)
            return self.xp.where(x > 0, grad_output, self.slope * grad_output)

    @property
    def slope(self) -> Any:
        """The slope below 0."""
        if isinstance(self.layer, nn.PReLU):
            return self.layer.weight.value
        return self.layer.negative_slope


def moment(xp: Any) -> Any:
    """Return the time, or an event that a GPU reaches when it has come so far."""
    if xp is np:
        return time.perf_counter()
    event = xp.cuda.Event()
    event.record()
    return event


def seconds_between(xp: Any, start: Any, end: Any) -> float:
    """Return the seconds between two moments."""
    if xp is np:
        return float(end - start)
    end.synchronize()
    return float(xp.cuda.get_elapsed_time(start, end)) / 1e3


class Timed(nn.Layer):
    """A layer with a stopwatch."""

    def __init__(self, layer: nn.Layer, xp: Any) -> None:
        self.layer, self.xp = layer, xp
        self.inplace = layer.inplace
        self.moments: list[tuple[Any, Any]] = []

    def forward(self, x: Array, /, **options: Any) -> Array:
        """Time the layer's forward pass."""
        start = moment(self.xp)
        y = self.layer.forward(x, **options)
        self.moments.append((start, moment(self.xp)))
        return y

    def backward(self, grad_output: Array, /, **options: Any) -> Array:
        """Time the layer's backward pass."""
        start = moment(self.xp)
        grad = self.layer.backward(grad_output, **options)
        self.moments.append((start, moment(self.xp)))
        return grad


def time_activations(run: Run, steps: int = 30) -> dict[str, tuple[float, float]]:
    """Return the seconds in activations and in all of a step, for us and for idioms.

    Whole training steps are repeated, on the network as trained and on the same
    batches, because an activation's time depends on what the matrix products left in
    the caches.  The two networks share every layer but the activations, and they take
    turns, so that both see the same machine.  The learning rate is 0: the work is
    that of training, the weights stay.  Medians of ``steps`` steps, after one that is
    not counted.
    """
    xp, library = run.xp, "NumPy" if run.xp is np else "CuPy"
    wraps: dict[str, Callable[[nn.Layer], nn.Layer]] = {
        "fastrelu": lambda layer: Timed(layer, xp),
        f"{library} idioms": lambda layer: Timed(Idiom(layer, xp), xp),
    }
    networks = {
        name: nn.Sequential(
            *(wrap(a) if isinstance(a, nn.Activation) else a for a in run.model.layers)
        )
        for name, wrap in wraps.items()
    }
    optimiser = nn.SGD(run.model.parameters, lr=0.0, momentum=0.9)
    batches = run.split(np.arange(len(run.digits.train_x)))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in networks}
    for i in range(steps + 1):
        rows = batches[i % len(batches)]
        x, labels = run.digits.train_x[rows], run.digits.train_y[rows]
        for name, model in networks.items():
            watches = [a for a in model.layers if isinstance(a, Timed)]
            start = moment(xp)
            model.backward(judge(model.forward(x), labels)[1])
            optimiser.step()
            whole_step = seconds_between(xp, start, moment(xp))
            spans = [span for watch in watches for span in watch.moments]
            times[name].append(
                (sum(seconds_between(xp, *s) for s in spans), whole_step)
            )
            for watch in watches:
                watch.moments.clear()
    return {name: tuple(np.median(t[1:], axis=0)) for name, t in times.items()}
