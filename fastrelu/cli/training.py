"""A network of 14 layers, and how it learns handwritten digits."""

import argparse
import contextlib
import importlib
import math
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from fastrelu import nn
from fastrelu.activations import relu
from fastrelu.mask import Mask

Array = Any

WIDTHS = (1024,) * 5 + (512,) * 8
CLASSES = 10

# How to make each activation, and the slope that the weights before it are drawn for.
ACTIVATIONS: dict[str, tuple[Callable[..., nn.Layer], float]] = {
    "relu": (nn.ReLU, 0.0),
    "leaky_relu": (nn.LeakyReLU, 0.01),
    "prelu": (nn.PReLU, 0.25),
}


class Digits(NamedTuple):
    """Images as rows of 64 numbers around 0, and the digits they show."""

    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array


def load_digits(seed: int) -> Digits:
    """Return scikit-learn's digits, a fifth of each class kept for the test."""
    from sklearn import datasets, model_selection

    x, y = datasets.load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = model_selection.train_test_split(
        x.astype(np.float32), y, test_size=0.2, stratify=y, random_state=seed
    )
    # One scale for all pixels: those at the rim hardly vary and carry only noise.
    mean, std = train_x.mean(axis=0), train_x.std()
    return Digits((train_x - mean) / std, train_y, (test_x - mean) / std, test_y)


def array_module(device: str) -> ModuleType:
    """Return NumPy, or CuPy once it has computed something on the GPU."""
    if device == "cpu":
        return np
    cupy = importlib.import_module("cupy")
    x = cupy.ones((2, 2), dtype=np.float32)
    relu(x @ x).sum().item()
    return cupy


def network(
    activation: str, rng: np.random.Generator, xp: ModuleType = np
) -> nn.Sequential:
    """Return the network: 13 hidden layers with an activation each, and the scores."""
    make, slope = ACTIVATIONS[activation]
    own = {"xp": xp} if make is nn.PReLU else {}
    options: dict[str, Any] = {"rng": rng, "xp": xp}
    layers: list[nn.Layer] = []
    features = 64
    for width in WIDTHS:
        dense = nn.Dense(features, width, negative_slope=slope, **options)
        layers += [dense, make(**own)]
        features = width
    return nn.Sequential(
        *layers, nn.Dense(features, CLASSES, negative_slope=1, **options)
    )


class Epoch(NamedTuple):
    """The means over one epoch, and what the network made of the test set after it.

    `inactive` has the share of each layer's outputs that were inactive in training, and
    `dead` how many of its units were so all the time.
    """

    loss: float
    accuracy: float
    test_loss: float
    test_accuracy: float
    inactive: list[float]
    dead: list[int]


class Activity:
    """How often the units of each layer have been active while training."""

    def __init__(self, model: nn.Sequential) -> None:
        self.layers = [a for a in model.layers if isinstance(a, nn.Activation)]
        self.start()

    def start(self) -> None:
        """Begin to count, from 0."""
        self.rows = 0
        self.times: list[Array] = [0] * len(self.layers)

    def count(self) -> None:
        """Count in a batch between its forward and its backward pass.

        What the one has saved for the other says which units are active: a mask, or the
        input.
        """
        for i, layer in enumerate(self.layers):
            saved = layer._saved
            active = saved.unpack() if isinstance(saved, Mask) else saved > 0
            self.times[i] = self.times[i] + active.sum(axis=0, dtype=np.int32)
        self.rows += len(active)

    def read(self) -> tuple[list[float], list[int]]:
        """Return each layer's share of inactive outputs, and number of dead units."""
        figures = [times.mean() for times in self.times]
        figures += [(times == 0).sum() for times in self.times]
        # Together, so that a GPU is waited for once.
        numbers = nn.get_array_module(figures[0]).stack(figures).tolist()
        means, dead = numbers[: len(self.times)], numbers[len(self.times) :]
        return [1 - mean / self.rows for mean in means], list(map(int, dead))


class Threads:
    """Those of the matrix products: one or all, whichever makes steps quicker meanwhile.

    All are quicker where they are alone.  But OpenBLAS's spin while they wait for each
    other: beside one other busy program, two take ten times as long as one.
    """

    STEPS = 64  # until it is measured again, at the latest
    SLOW = 2  # times as long as it was measured: somebody else has come

    def __init__(self, number: int | None = None) -> None:
        from threadpoolctl import ThreadpoolController

        self.libraries = ThreadpoolController().select(user_api="blas").lib_controllers
        most = max((library.num_threads for library in self.libraries), default=1)
        self.number = number or most
        self.both = [] if number or most == 1 else [1, most, 1, most]
        self.seconds: dict[int, float] = {}
        self.turns = [*self.both]  # to measure
        self.steps = 0
        self.use(self.number)

    def use(self, number: int) -> None:
        """Have products take so many."""
        for library in self.libraries:
            library.set_num_threads(number)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Give a step the threads that are best for it, or measure."""
        if not self.both:
            yield
            return
        number = self.turns[0] if self.turns else self.number
        self.use(number)
        start = time.perf_counter()
        yield
        self.note(number, time.perf_counter() - start)

    def note(self, number: int, seconds: float) -> None:
        """Learn from what a step took."""
        if self.turns:
            self.seconds[number] = min(seconds, self.seconds.get(number, seconds))
            del self.turns[0]
            self.number = min(self.seconds, key=self.seconds.__getitem__)
            self.steps = 0
            return
        self.steps += 1
        slow = number > 1 and seconds > self.SLOW * self.seconds[number]
        if slow or self.steps >= self.STEPS:
            self.turns, self.seconds = [*self.both], {}


class Run:
    """A training run on arrays of `xp`, which can be left after any step.

    Nothing in a step waits for a GPU: losses stay there until they are shown.
    """

    def __init__(
        self, args: argparse.Namespace, digits: Digits, xp: ModuleType = np
    ) -> None:
        self.threads = Threads(args.threads if xp is np else 1)
        self.xp = xp
        self.digits = Digits(*map(xp.asarray, digits))
        self.rng = np.random.default_rng(args.seed)
        self.model = network(args.activation, self.rng, xp)
        self.optimiser = nn.SGD(self.model.parameters, args.learning_rate, momentum=0.9)
        self.learning_rate: float = args.learning_rate
        self.epochs: int = args.epochs
        # As many batches as the size asks for, but even ones: a small rest would
        # weigh as much as a full batch.
        self.batches: int = math.ceil(len(digits.train_x) / args.batch_size)
        self.activity = Activity(self.model)
        self.history: list[Epoch] = []
        self.steps = 0

    @property
    def epoch(self) -> int:
        """The epoch of the latest step, from 1."""
        return max(1, -(-self.steps // self.batches))

    def warm_up(self) -> None:
        """Compile every loop that training needs; learn nothing."""
        rows = self.split(np.arange(len(self.digits.train_x)))[0]
        self.model.backward(self.model.forward(self.digits.train_x[rows]))
        self.model.zero_grad()
        self.test()

    def split(self, order: Array) -> list[Array]:
        """Return the rows of each batch, which are on the device from the start."""
        batches: list[Array] = self.xp.array_split(self.xp.asarray(order), self.batches)
        return batches

    def __iter__(self) -> Iterator[Array]:
        """Train; yield the mean loss and accuracy of the epoch after each step."""
        for _ in range(self.epochs):
            seen, means = 0, self.xp.zeros(2)
            self.activity.start()
            order = self.rng.permutation(len(self.digits.train_x))
            for rows in self.split(order):
                seen += len(rows)
                with self.threads.step():
                    scores = self.step(rows)
                means += (scores - means) * len(rows) / seen
                if seen == len(order):
                    told = *read(means), *read(self.test())
                    self.history.append(Epoch(*told, *self.activity.read()))
                yield means

    def step(self, rows: Array) -> Array:
        """Learn from some rows; return the loss and the accuracy before that."""
        x, labels = self.digits.train_x[rows], self.digits.train_y[rows]
        logits = self.model.forward(x)
        self.activity.count()
        scores, grad = judge(logits, labels)
        self.model.backward(grad)
        # Up for two epochs, which a deep network without normalisation needs, then
        # half a cosine down.
        up = min(1.0, (self.steps + 1) / (2 * self.batches))
        down = (1 + math.cos(math.pi * self.steps / (self.epochs * self.batches))) / 2
        self.optimiser.lr = self.learning_rate * up * down
        self.optimiser.step()
        self.steps += 1
        return scores

    def test(self) -> Array:
        """Return the loss and the accuracy on the test set."""
        logits = self.model.forward(self.digits.test_x, training=False)
        return judge(logits, self.digits.test_y)[0]


def judge(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Return an array of the loss and the accuracy, and the gradient of the loss."""
    loss, grad = nn.softmax_cross_entropy(logits, labels)
    accuracy = (logits.argmax(axis=1) == labels).mean()
    return nn.get_array_module(logits).stack([loss, accuracy]), grad


def read(scores: Array) -> tuple[float, float]:
    """Return the loss and the accuracy as numbers, for which a GPU is waited for.

    Raises
    ------
    FloatingPointError
        If the loss is not finite.
    """
    loss, accuracy = scores.tolist()
    if not math.isfinite(loss):
        msg = f"the loss is {loss}"
        raise FloatingPointError(msg)
    return loss, accuracy
