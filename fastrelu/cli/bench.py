"""``python -m fastrelu bench``: the speed beside other libraries."""

import argparse
import contextlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from fastrelu.cli.arguments import several
from fastrelu.cli.interrupts import INTERRUPTED, raised_interrupt
from fastrelu.cli.peers.base import Peer
from fastrelu.cli.peers.cases import COMMON, DTYPES, Case, size, size_name
from fastrelu.cli.peers.libraries import PEERS, FastRelu
from fastrelu.cli.peers.team import Result, Team


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


def bench_table(rows: list[list[Result]]) -> Iterator[str]:
    """Yield the lines of the table: our time, and that of others as a multiple."""
    ours, *peers = (result.peer for result in rows[0])
    table = [["operation", "size", ours, "GB/s", *peers]]
    for own, *others in rows:
        case = own.case
        cells = ["error", ""]
        if own.seconds:
            cells = [duration(own.median), f"{own.gb_per_s:.1f}"]
        cells += [times_ours(result, own) for result in others]
        table.append([f"{case.op} {case.mode}", size_name(case.n), *cells])
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


def times_ours(result: Result, own: Result) -> str:
    """Return a peer's time as a multiple of ours, marked where that is a loss."""
    if result.error:
        return "error"
    if not result.seconds or not own.seconds:
        return "-"
    ratio = result.median / own.median
    return (
        f"{'< ' * (ratio < 1)}{ratio:.{0 if ratio >= 10 else 1 if ratio >= 1 else 2}f}x"
    )
