"""``python -m fastrelu bench``: the speed beside other libraries."""

import argparse
import contextlib
import importlib.util
import itertools
import math
import os
import shutil
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastrelu.cli.arguments import several
from fastrelu.cli.interrupts import INTERRUPTED, raised_interrupt
from fastrelu.cli.peers.base import Peer
from fastrelu.cli.peers.cases import COMMON, DTYPES, Case, size, size_name
from fastrelu.cli.peers.libraries import PEERS, FastRelu
from fastrelu.cli.peers.team import TURNS, Result, Team
from fastrelu.cpu import host

GIB = 1 << 30
MEMORY = Path("/proc/meminfo")


def add(commands: Any) -> None:
    """Add this command to those of a parser."""
    command = commands.add_parser(
        "bench",
        help="measure the speed beside other libraries",
        description="Measure the speed beside the libraries that are installed.  Each "
        "runs in a process of its own, and they take turns.",
    )
    command.add_argument(
        "--peers",
        type=several(read_peer),
        metavar="NAMES",
        help=f"of {', '.join(PEERS)}; with commas (default: what is installed)",
    )
    command.add_argument(
        "--size",
        type=several(read_size),
        default="1k,1M,16M",
        metavar="SIZES",
        help="elements, 1k for 1024 and 1M for 1024k (default: %(default)s)",
    )
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="(default: %(default)s)",
    )
    command.set_defaults(run=bench, fail=command.error)


def read_size(text: str) -> int:
    """Read a number of elements."""
    try:
        return size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(error) from error


def read_peer(name: str) -> type[Peer]:
    """Read the name of a library that is installed."""
    found = PEERS.get(name)
    if found is None:
        msg = f"unknown peer {name!r}, expected some of {', '.join(PEERS)}"
        raise argparse.ArgumentTypeError(msg)
    if missing := found.missing():
        raise argparse.ArgumentTypeError(missing)
    return found


def bench(args: argparse.Namespace) -> int:
    """Measure the common ways beside the peers; return the exit status."""
    peers = args.peers or [p for p in PEERS.values() if not p.missing()]
    peers = list(dict.fromkeys([FastRelu, *peers]))
    cases = [Case(op, mode, args.dtype, n) for op, mode in COMMON for n in args.size]
    if lack := FastRelu.lacks(cases[0]):
        args.fail(f"argument --dtype: {lack}")
    largest = max(cases, key=lambda case: case.bytes)
    # What a call reads and writes, and as much again for what NumPy puts aside.
    if (needed := 2 * largest.bytes) > (free := free_memory()):
        args.fail(
            f"argument --size: {size_name(largest.n)} takes {needed / GIB:.1f} GiB of "
            f"memory, and there are {free / GIB:.1f}"
        )
    before = load()
    rows: list[list[Result]] = []
    with raised_interrupt():
        try:
            with Team(peers) as team, countdown(len(cases)) as show:
                for case in cases:
                    show(case.name)
                    rows.append(team.measure(case))
        except KeyboardInterrupt:
            print("fastrelu bench: interrupted", file=sys.stderr)
    if rows:
        columns = shutil.get_terminal_size().columns
        table = "\n".join(bench_table(rows, columns))
        print(table)
        for text in remarks(table.count("?"), before, load()):
            print(textwrap.fill(text, columns))
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


def free_memory() -> float:
    """Return the bytes of memory that can be had, infinite where nothing tells."""
    found = list(host.memory())
    with contextlib.suppress(OSError):  # not on Linux
        for line in MEMORY.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) << 10)
    return min(found, default=math.inf)


def load() -> float:
    """Return how many programs wanted to run in the last minute, 0 if nothing tells."""
    with contextlib.suppress(AttributeError, OSError):  # not on Windows
        return os.getloadavg()[0]
    return 0.0


def bench_table(rows: list[list[Result]], columns: int) -> Iterator[str]:
    """Yield the lines of the table: our time, and that of others as a multiple.

    Others for whom a line has no room have a table of their own below.
    """
    ours, *peers = (result.peer for result in rows[0])
    table = [["size", ours, "GB/s", *peers]]
    for own, *others in rows:
        cells = ["error", ""]
        if own.seconds:
            time = ("? " if varies(own.turns) else "") + duration(own.median)
            cells = [time, f"{own.gb_per_s:.1f}"]
        cells += [times_ours(result, own) for result in others]
        table.append([size_name(own.case.n), *cells])
    widths = [max(map(len, column)) + 2 for column in zip(*table, strict=True)]
    for block in blocks(widths, columns):
        header, *lines = [
            "".join(cells[i].rjust(widths[i]) for i in block) for cells in table
        ]
        yield header
        operation = ""
        for (own, *_), line in zip(rows, lines, strict=True):
            if operation != (operation := f"{own.case.op} {own.case.mode}"):
                yield operation
            yield line
        yield ""


def blocks(widths: list[int], columns: int) -> list[list[int]]:
    """Return which columns stand side by side: the first three, and some others."""
    room = left = columns - sum(widths[:3])
    found = [[0, 1, 2]]
    for i, width in enumerate(widths[3:], start=3):
        if width > left and len(found[-1]) > 3:
            found.append([0, 1, 2])
            left = room
        found[-1].append(i)
        left -= width
    return found


def remarks(doubtful: int, before: float, after: float) -> Iterator[str]:
    """Yield what the table means, and why some of it or all is not to be trusted."""
    yield (
        "Medians. The last columns are the times of others as multiples of ours, and "
        f"their range over {TURNS} turns; < marks where others are faster."
    )
    cores = os.cpu_count() or 1
    yield f"The load was {before:.1f} before and {after:.1f} after, on {cores} cores."
    if doubtful:
        yield (
            f"WARNING: do not trust figures with ?, {doubtful} here. They varied more "
            "than twofold from turn to turn."
        )
    if max(before, after) > cores:
        yield (
            "WARNING: other programs took the cores meanwhile. Measure again when the "
            "machine has nothing else to do."
        )


def varies(figures: list[float]) -> bool:
    """Say whether figures vary too much for their median to mean much."""
    return max(figures) > 2 * min(figures)


def duration(seconds: float) -> str:
    """Return a time with a unit that suits it."""
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.2f} us"


def times_ours(result: Result, own: Result) -> str:
    """Return a peer's time as a multiple of ours, and its range over the turns."""
    if result.error:
        return "error"
    if not result.seconds or not own.seconds:
        return "-"
    turns = [a / b for a, b in zip(result.turns, own.turns, strict=True)]
    ratio = statistics.median(turns)
    mark = "? " if varies(turns) else "< " if ratio < 1 else ""
    return f"{mark}{short(ratio)}x ({short(min(turns))}-{short(max(turns))})"


def short(ratio: float) -> str:
    """Return a ratio with two digits that mean something."""
    return f"{ratio:.{0 if ratio >= 10 else 1 if ratio >= 1 else 2}f}"
