"""``python -m fastrelu train``: train a network, show how it goes, report on it."""

import argparse
import contextlib
import importlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastrelu import nn
from fastrelu.cli.arguments import positive, whole
from fastrelu.cli.idioms import time_activations
from fastrelu.cli.interrupts import INTERRUPTED, deferred_interrupt
from fastrelu.cli.training import (
    ACTIVATIONS,
    Epoch,
    Run,
    array_module,
    load_digits,
    read,
)
from fastrelu.cpu import host

Array = Any


def add(commands: Any) -> None:
    """Add this command to those of a parser."""
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
        "--threads",
        type=whole(1, most := processors()),
        metavar="N",
        help="of matrix products on the CPU, at most one for each processor that this "
        f"process may use, {most} (default: one or all, whichever is quicker "
        "meanwhile); with a number, a seed's run is the same each time",
    )
    command.add_argument(
        "--plot",
        type=plot_file,
        metavar="FILE",
        help="draw loss, accuracy, inactive outputs and dead units over the epochs, "
        "as PNG, PDF or SVG",
    )
    command.set_defaults(run=train, fail=command.error)


def processors() -> int:
    """Return how many this process may use: with more threads, products take minutes.

    OpenBLAS's wait for each other by spinning.
    """
    try:
        found = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        found = os.cpu_count() or 1
    return host.processors(found)


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


def train(args: argparse.Namespace) -> int:
    """Train the network and report on it; return the exit status."""
    try:
        for name in ("sklearn", "rich", "matplotlib", "threadpoolctl"):
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        args.fail(f'{error}; it comes with pip install "fastrelu[demo]"')
    from rich.console import Console

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
    layers = sum(isinstance(layer, nn.Dense) for layer in run.model.layers)
    size = sum(p.value.size for p in run.model.parameters)
    console.print(
        f"A network of {layers} layers and {size / 1e6:.1f} million weights "
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
        console.print(
            "\nOutputs that were inactive in the last epoch, units that always were, and "
            "units that no test image activates\n"
        )
        console.print(layer_table(run))
        if args.plot is not None and run.history:
            try:
                draw(args.plot, run.history)
            except OSError as error:
                args.fail(f"cannot write {str(args.plot)!a}: {error.strerror}")
            console.print(f"\nThe epochs are drawn in {str(args.plot)!a}.")
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
                    f"test {latest.test_accuracy:.1%}  dead {sum(latest.dead)}"
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
    """Return a table of how active the units of each layer are."""
    from rich import box
    from rich.table import Table

    layers = run.activity.layers
    slopes = [a.weight.value.item() for a in layers if isinstance(a, nn.PReLU)]
    table = Table(box=box.SIMPLE, show_edge=False, collapse_padding=True)
    headers = ["layer", "units", "inactive", "dead", "in test"]
    for header in [*headers, "slope"] if slopes else headers:
        table.add_column(header, justify="right")
    test = nn.dead_units(run.model, run.digits.test_x)
    for i, units in enumerate(test):
        trained = ["-", "-"]
        if run.history:
            latest = run.history[-1]
            trained = [f"{latest.inactive[i]:.1%}", str(latest.dead[i])]
        row = [str(i + 1), str(units.size), *trained, str(int(units.sum()))]
        table.add_row(*row, *(f"{a:.3f}" for a in slopes[i : i + 1]))
    return table


def draw(path: Path, history: list[Epoch]) -> None:
    """Draw what the epochs of a run came to, and how active each layer was."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(8, 6.5), layout="constrained")
    loss, accuracy, inactive, dead = figure.subplots(2, 2).flat
    epochs = range(1, len(history) + 1)
    for axis, name in ((loss, "loss"), (accuracy, "accuracy")):
        for label, field in (("training", name), ("test", f"test_{name}")):
            values = [getattr(epoch, field) for epoch in history]
            axis.plot(epochs, values, marker=".", label=label)
        axis.set_ylabel(name)
    layers = len(history[0].dead)
    for axis, name in ((inactive, "inactive"), (dead, "dead")):
        for i in range(layers):
            values = [getattr(epoch, name)[i] for epoch in history]
            # From dark to light; the first and the last layer say which is which.
            colour = colormaps["viridis"](0.9 * i / layers)
            label = f"layer {i + 1}" if i in (0, layers - 1) else ""
            axis.plot(epochs, values, marker=".", color=colour, label=label)
    inactive.set_ylabel("inactive outputs")
    dead.set_ylabel("dead units")
    for axis in (loss, accuracy, inactive, dead):
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend()
    loss.set_yscale("log")
    for axis in (accuracy, inactive):
        axis.yaxis.set_major_formatter(PercentFormatter(1))
    dead.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path)


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
