"""The command line: ``python -m fastrelu train``, ``bench`` and ``info``."""

import argparse
import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import itertools
import math
import os
import platform
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from fastrelu import __version__, _peers, cpu, nn
from fastrelu.activations import relu

Array = Any

WIDTHS = (1024,) * 5 + (512,) * 8
CLASSES = 10

# How to make each activation, and the slope that the weights before it are drawn for.
ACTIVATIONS: dict[str, tuple[Callable[..., nn.Layer], float]] = {
    "relu": (nn.ReLU, 0.0),
    "leaky_relu": (nn.LeakyReLU, 0.01),
    "prelu": (nn.PReLU, 0.25),
}

PACKAGES = ("NumPy", "Numba", "llvmlite")

# What LLVM calls the features that decide how wide and how fast the loops are.
FEATURES = (
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl"),
    *("avx512fp16", "avx512bf16", "neon", "fullfp16", "bf16", "sve", "sve2"),
)

INTERRUPTED = 128 + signal.SIGINT


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> Any:
        """Print the message and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser() -> Parser:
    """Return the parser of the whole command line."""
    top = Parser(
        prog="fastrelu", description="ReLU, Leaky ReLU and PReLU for NumPy arrays."
    )
    top.add_argument("--version", action="version", version=f"fastrelu {__version__}")
    commands = top.add_subparsers(metavar="command", required=True)

    command = commands.add_parser(
        "train",
        help="train a network of 14 layers on handwritten digits",
        description="Train a network of 14 layers on the handwritten digits that "
        "scikit-learn ships.",
    )
    command.add_argument(
        "--activation",
        choices=ACTIVATIONS,
        default="relu",
        help="after each hidden layer (default: %(default)s)",
    )
    command.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda takes CuPy and a GPU (default: %(default)s)",
    )
    command.add_argument(
        "--epochs",
        type=whole(1),
        default=15,
        metavar="N",
        help="passes over the training images (default: %(default)s)",
    )
    command.add_argument(
        "--batch-size",
        type=whole(1),
        default=64,
        metavar="N",
        help="images a step learns from (default: %(default)s)",
    )
    command.add_argument(
        "--learning-rate",
        type=positive,
        default=0.005,
        metavar="X",
        help="its highest value on the way (default: %(default)s)",
    )
    command.add_argument(
        "--seed",
        type=whole(0, 2**32 - 1),
        default=0,
        metavar="N",
        help="of the split, the weights and the batches (default: %(default)s)",
    )
    command.add_argument(
        "--plot",
        type=plot_file,
        metavar="FILE",
        help="draw loss and accuracy as PNG, PDF or SVG",
    )
    command.set_defaults(run=train, fail=command.error)

    command = commands.add_parser(
        "bench",
        help="measure the speed beside other libraries",
        description="Measure the speed beside the libraries that are installed.  Each "
        "runs in a process of its own, and they take turns.",
    )
    command.add_argument(
        "--peers",
        type=several(peer),
        metavar="NAMES",
        help=f"of {', '.join(_peers.PEERS)}; with commas (default: what is installed)",
    )
    command.add_argument(
        "--size",
        type=several(size),
        default="1k,1M,16M",
        metavar="SIZES",
        help="elements, 1k for 1024 and 1M for 1024k (default: %(default)s)",
    )
    command.add_argument(
        "--dtype",
        choices=_peers.DTYPES,
        default="float32",
        help="(default: %(default)s)",
    )
    command.set_defaults(run=bench, fail=command.error)

    command = commands.add_parser("info", help="print what fastrelu runs on")
    command.set_defaults(run=info)
    return top


def whole(low: int, high: float = math.inf) -> Callable[[str], int]:
    """Return the reader of an integer argument from ``low`` to ``high``."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            limits = f"at least {low}" if high == math.inf else f"{low} to {high}"
            msg = f"expected a whole number, {limits}, got {text!r}"
            raise argparse.ArgumentTypeError(msg)
        return number

    return read


def positive(text: str) -> float:
    """Read a positive, finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        msg = f"expected a positive number, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return number


def plot_file(text: str) -> Path:
    """Read the name of a picture that can be written, which is tried at once."""
    path = Path(text)
    if path.suffix.lower() not in {".png", ".pdf", ".svg"}:
        msg = f"expected a name that ends in .png, .pdf or .svg, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    is_new = not os.path.lexists(path)
    try:
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        msg = f"cannot write {text!r}: {error.strerror}"
        raise argparse.ArgumentTypeError(msg) from error
    return path


def several(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Return the reader of a list with commas."""
    return lambda text: [read(part) for part in text.split(",")]


def size(text: str) -> int:
    """Read a number of elements."""
    try:
        return _peers.size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(error) from error


def peer(name: str) -> type[_peers.Peer]:
    """Read the name of a library that is installed."""
    found = _peers.PEERS.get(name)
    if found is None:
        msg = f"unknown peer {name!r}, expected some of {', '.join(_peers.PEERS)}"
        raise argparse.ArgumentTypeError(msg)
    if missing := found.missing():
        raise argparse.ArgumentTypeError(missing)
    return found


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
    """The means over one epoch, and what the network made of the test set after it."""

    loss: float
    accuracy: float
    test_loss: float
    test_accuracy: float


class Run:
    """A training run on arrays of `xp`, which can be left after any step.

    Nothing in a step waits for a GPU: losses stay there until they are shown.
    """

    def __init__(
        self, args: argparse.Namespace, digits: Digits, xp: ModuleType = np
    ) -> None:
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
        self.test()

    def split(self, order: Array) -> list[Array]:
        """Return the rows of each batch, which are on the device from the start."""
        batches: list[Array] = self.xp.array_split(self.xp.asarray(order), self.batches)
        return batches

    def __iter__(self) -> Iterator[Array]:
        """Train; yield the mean loss and accuracy of the epoch after each step."""
        for _ in range(self.epochs):
            seen, means = 0, self.xp.zeros(2)
            order = self.rng.permutation(len(self.digits.train_x))
            for rows in self.split(order):
                seen += len(rows)
                means += (self.step(rows) - means) * len(rows) / seen
                if seen == len(order):
                    self.history.append(Epoch(*read(means), *read(self.test())))
                yield means

    def step(self, rows: Array) -> Array:
        """Learn from some rows; return the loss and the accuracy before that."""
        x, labels = self.digits.train_x[rows], self.digits.train_y[rows]
        logits = self.model.forward(x)
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


def train(args: argparse.Namespace) -> int:
    """Train the network and report on it; return the exit status."""
    try:
        for name in ("sklearn", "rich", "matplotlib"):
            importlib.import_module(name)
        threadpoolctl = importlib.import_module("threadpoolctl")
    except ModuleNotFoundError as error:
        args.fail(f'{error}; it comes with pip install "fastrelu[demo]"')
    from rich.console import Console

    # One thread for the matrix products: those of OpenBLAS spin while they wait for
    # each other, and beside one other busy program two take ten times as long as one.
    # It also makes a seed's run the same on every number of cores.
    threadpoolctl.threadpool_limits(1, user_api="blas")
    # Control characters are for terminals only, whatever FORCE_COLOR says.
    console = Console(
        force_terminal=sys.stdout.isatty(),
        # Room at the end of a line for the ^C that a terminal writes.
        width=max(shutil.get_terminal_size().columns - 2, 20),
        markup=False,
        emoji=False,
        highlight=False,
    )
    with busy(console, "Loading the digits, compiling ..."):
        try:
            xp = array_module(args.device)
        except Exception as error:  # noqa: BLE001 - whatever it is, there is no GPU
            reason = str(error).partition("\n")[0]
            if isinstance(error, ModuleNotFoundError):
                reason += '; CuPy comes with pip install "cupy-cuda13x[ctk]"'
            args.fail(f"argument --device: no GPU to compute on: {reason}")
        digits = load_digits(args.seed)
        if args.batch_size > len(digits.train_x):
            args.fail(
                "argument --batch-size: expected at most the number of training "
                f"images, {len(digits.train_x)}, got {args.batch_size}"
            )
        run = Run(args, digits, xp)
        run.warm_up()
    size = sum(p.value.size for p in run.model.parameters)
    console.print(
        f"A network of {len(WIDTHS) + 1} layers and {size / 1e6:.1f} million weights "
        f"with {args.activation} learns {len(digits.train_x)} images of handwritten "
        f"digits; {len(digits.test_x)} others test it."
    )
    if xp is not np:
        about = xp.cuda.runtime.getDeviceProperties(xp.cuda.Device().id)
        console.print(f"It runs on {about['name'].decode()}.")

    with deferred_interrupt() as interrupted:
        start = time.perf_counter()
        try:
            with (
                progress(console, run) as show,
                # A diverging run overflows before its loss does; it is told once.
                np.errstate(over="ignore", invalid="ignore"),
            ):
                for means in run:
                    show(means)
                    if interrupted.is_set():
                        break
                _, accuracy = read(run.test())
        except FloatingPointError as error:
            print(
                f"fastrelu train: training diverged in epoch {run.epoch}: {error}; "
                f"try a --learning-rate below {args.learning_rate:g}",
                file=sys.stderr,
            )
            return 1
        seconds = time.perf_counter() - start

        if interrupted.is_set():
            console.print(f"Interrupted in epoch {run.epoch} of {run.epochs}. So far:")
        console.print(
            f"Test accuracy {accuracy:.1%} after {run.steps} steps in {seconds:.1f} s."
        )
        console.print("\nUnits that no test image activates\n")
        console.print(layer_table(run))
        if args.plot is not None and run.history:
            try:
                draw(args.plot, run.history)
            except OSError as error:
                args.fail(f"cannot write {str(args.plot)!a}: {error.strerror}")
            console.print(f"\nLoss and accuracy are drawn in {str(args.plot)!a}.")
        elif args.plot is not None:
            console.print("\nNo epoch was completed: there is nothing to draw.")
        if interrupted.is_set():
            return INTERRUPTED
    with busy(console, "Comparing with the usual idioms ..."):
        times = time_activations(run)
    console.print("\nTime in activations while training\n")
    console.print(time_table(times))
    return 0


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Turn Ctrl-C into an event, so that it never falls into the middle of a step."""
    event = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def busy(console: Any, what: str) -> Iterator[None]:
    """Say what takes its time, on a line that is wiped away afterwards."""
    if console.is_interactive:
        console.print(what, end="\r")
    try:
        yield
    finally:
        if console.is_interactive:
            console.print(" " * len(what), end="\r")


@contextlib.contextmanager
def progress(console: Any, run: Run) -> Iterator[Callable[[Array], None]]:
    """Yield what shows the progress of a run: a bar, or in a file a line an epoch."""
    digits = len(str(run.epochs))
    if not console.is_interactive:

        def show(means: Array) -> None:
            if run.steps % run.batches == 0:
                latest = run.history[-1]
                console.print(
                    f"epoch {run.epoch:{digits}}/{run.epochs}  "
                    f"loss {latest.loss:.4f}  accuracy {latest.accuracy:.1%}  "
                    f"test {latest.test_accuracy:.1%}"
                )

        yield show
        return

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [
        TextColumn("{task.description}"),
        BarColumn(None),
        TextColumn("{task.fields[means]}"),
    ]
    if console.width >= 64:
        columns.append(TimeElapsedColumn())
    with Progress(*columns, console=console, expand=True) as bar:
        task = bar.add_task(
            f"epoch {1:{digits}}/{run.epochs}", total=run.epochs * run.batches, means=""
        )
        due = time.monotonic()

        def show(means: Array) -> None:
            nonlocal due
            fields: dict[str, Any] = {}
            if time.monotonic() >= due or run.steps % run.batches == 0:
                loss, accuracy = read(means)
                fields["means"] = f"loss {loss:.4f} accuracy {accuracy:.1%}"
                due = time.monotonic() + 0.1  # nobody reads faster
            bar.update(
                task,
                completed=run.steps,
                description=f"epoch {run.epoch:{digits}}/{run.epochs}",
                **fields,
            )

        yield show


def layer_table(run: Run) -> Any:
    """Return a table of the units that are never active on the test set."""
    from rich import box
    from rich.table import Table

    activations = [a for a in run.model.layers if isinstance(a, nn.Activation)]
    slopes = [a.weight.value.item() for a in activations if isinstance(a, nn.PReLU)]
    table = Table(box=box.SIMPLE, show_edge=False)
    for header in ("layer", "units", "never active", *(["slope"] if slopes else [])):
        table.add_column(header, justify="right")
    dead = nn.dead_units(run.model, run.digits.test_x)
    for i, units in enumerate(dead):
        row = [i + 1, units.size, int(units.sum())]
        table.add_row(*map(str, row), *(f"{a:.3f}" for a in slopes[i : i + 1]))
    return table


def draw(path: Path, history: list[Epoch]) -> None:
    """Draw loss and accuracy over the epochs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots(1, 2)
    epochs = range(1, len(history) + 1)
    for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
        for label, field in (("training", name), ("test", f"test_{name}")):
            values = [getattr(epoch, field) for epoch in history]
            axis.plot(epochs, values, marker=".", label=label)
        axis.set(xlabel="epoch", ylabel=name)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend()
    axes[0].set_yscale("log")
    axes[1].yaxis.set_major_formatter(PercentFormatter(1))
    figure.savefig(path)


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
        x = self._take()
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


def time_table(times: dict[str, tuple[float, float]]) -> Any:
    """Return a table of the time in activations."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_edge=False)
    table.add_column("activations by")
    for header in ("ms per step", "share of step"):
        table.add_column(header, justify="right")
    for name, (seconds, step) in times.items():
        table.add_row(name, f"{seconds * 1e3:.2f}", f"{seconds / step:.1%}")
    return table


def bench(args: argparse.Namespace) -> int:
    """Measure the common ways beside the peers; return the exit status."""
    peers = args.peers or [p for p in _peers.PEERS.values() if not p.missing()]
    peers = list(dict.fromkeys([_peers.FastRelu, *peers]))
    cases = [
        _peers.Case(op, mode, args.dtype, n)
        for op, mode in _peers.COMMON
        for n in args.size
    ]
    if lack := _peers.FastRelu.lacks(cases[0]):
        args.fail(f"argument --dtype: {lack}")
    rows: list[list[_peers.Result]] = []
    # This process only waits: an exception ends that at once, and with it the workers.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with _peers.Team(peers) as team, countdown(len(cases)) as show:
            for case in cases:
                show(case.name)
                rows.append(team.measure(case))
    except KeyboardInterrupt:
        print("fastrelu bench: interrupted", file=sys.stderr)
    finally:
        signal.signal(signal.SIGINT, before)
    if rows:
        print("\n".join(bench_table(rows)))
    errors = [result for row in rows for result in row if result.error]
    for result in errors:
        print(
            f"fastrelu bench: {result.peer}, {result.case.name}: {result.error}",
            file=sys.stderr,
        )
    if len(rows) < len(cases):
        return INTERRUPTED
    return 1 if errors else 0


@contextlib.contextmanager
def countdown(total: int) -> Iterator[Callable[[str], None]]:
    """Yield what shows which step is next: in a bar, or on a line of its own."""
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        steps = itertools.count(1)
        yield lambda name: print(f"{next(steps)}/{total} {name}", file=sys.stderr)
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(None), MofNCompleteColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, expand=True, transient=True) as bar:
        task = bar.add_task("", total=total, completed=-1)
        yield lambda name: bar.update(task, advance=1, description=name)


def bench_table(rows: list[list[_peers.Result]]) -> Iterator[str]:
    """Yield the lines of the table: our time, and that of others as a multiple."""
    ours, *peers = (result.peer for result in rows[0])
    table = [["operation", "size", ours, "GB/s", *peers]]
    for own, *others in rows:
        case = own.case
        cells = ["error", ""]
        if own.seconds:
            cells = [duration(own.median), f"{own.gb_per_s:.1f}"]
        cells += [times_ours(result, own) for result in others]
        table.append([f"{case.op} {case.mode}", _peers.size_name(case.n), *cells])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        first, *rest = map(str.ljust, cells, widths)
        yield "  ".join([first, *(c.strip().rjust(len(c)) for c in rest)])
    yield ""
    yield (
        f"Medians, {rows[0][0].case.dtype}. The last columns are the times of others as "
        "multiples of ours; < marks where they are faster."
    )


def duration(seconds: float) -> str:
    """Return a time with a unit that suits it."""
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.2f} us"


def times_ours(result: _peers.Result, own: _peers.Result) -> str:
    """Return a peer's time as a multiple of ours, marked where that is a loss."""
    if result.error:
        return "error"
    if not result.seconds or not own.seconds:
        return "-"
    ratio = result.median / own.median
    return (
        f"{'< ' * (ratio < 1)}{ratio:.{0 if ratio >= 10 else 1 if ratio >= 1 else 2}f}x"
    )


def info(args: argparse.Namespace) -> int:
    """Print what fastrelu runs on; return the exit status."""
    import llvmlite.binding
    import numba

    found = llvmlite.binding.get_host_cpu_features()
    features = [name for name in FEATURES if found.get(name)]
    lines = {
        "fastrelu": __version__,
        "Python": f"{platform.python_version()} ({platform.platform()})",
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "CPU": f"{llvmlite.binding.get_host_cpu_name()}, {platform.machine()}",
        "features": " ".join(features) or "none of those that matter here",
        "threads": str(numba.config.NUMBA_NUM_THREADS),
        "loops": ", because ".join(filter(None, cpu.engine())),
        "CUDA": cuda(),
    }
    width = max(map(len, lines)) + 2
    columns = max(shutil.get_terminal_size().columns, 40)
    for name, text in lines.items():
        label = name.ljust(width)
        print(
            textwrap.fill(
                text, columns, initial_indent=label, subsequent_indent=" " * width
            )
        )
    return 0


def cuda() -> str:
    """Say what is there to compute on a GPU with, and the first thing that is not."""
    try:
        driver = ctypes.CDLL("nvcuda" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "no NVIDIA driver found"
    count, version = ctypes.c_int(), ctypes.c_int()
    error = (
        driver.cuInit(0)
        or driver.cuDeviceGetCount(ctypes.byref(count))
        or driver.cuDriverGetVersion(ctypes.byref(version))
    )
    if error:
        return f"the NVIDIA driver answers with error {error}"
    devices = f"{count.value} GPU" + "s" * (count.value != 1)
    release = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    found = f"found {devices} and a driver for {release}"
    if importlib.util.find_spec("numba_cuda") is None:
        return f'{found}; numba-cuda is missing: pip install "fastrelu[cuda13]"'
    return f"{found}, and numba-cuda"


def main(argv: list[str] | None = None) -> int:
    """Run a command; return the exit status."""
    args = parser().parse_args(argv)
    status: int = args.run(args)
    return status


def leave(*_: object) -> None:
    """Answer Ctrl-C where there is nothing to keep.

    An exception would get lost in the callbacks of a compiler, and go on from there.
    """
    os.write(2, b"\n" * sys.stderr.isatty() + b"fastrelu: interrupted\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, leave)
    if hasattr(signal, "SIGPIPE"):
        # End without a word where nobody reads on, as in `... | head`.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
