"""From pytest-benchmark's JSON to the README's table and the pictures.

    pytest bench --benchmark-json results.json
    python bench/report.py results.json [more.json ...]

writes a short table between two markers of the README, a file with all of them, two
pictures, and a compact copy of the figures from which all of it can be made again.
`--check` writes nothing and fails where a rival is faster. What bench/gpu.py keeps has
markers and pictures of its own.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import geometric_mean
from textwrap import fill
from typing import NamedTuple

from fastrelu.cli.peers.cases import ARGUMENTS

BENCH = Path(__file__).resolve().parent
OURS, ROOF = "fastrelu", "c"  # the roof is no rival: it shows what the machine can do
ALONE = "torch-tcmalloc"  # a rival that also gets a line of its own
TOLERANCE = 0.95  # a loss below this ratio is more than noise
NAMED = 5  # so many losses are named in the README; --check names all
MODES = {"inplace": "in place"}
# What is drawn: for each line the first op and mode that match.
PANELS = ("relu fresh", "relu out", "relu inplace", "relu_backward *")
PANELS += ("prelu*backward* *",)
# What the README's table has.
ROWS = ("relu fresh", "relu inplace", "relu_backward fresh", "relu_backward_mask fresh")
ROWS += ("leaky_relu fresh", "leaky_relu_backward fresh")
ROWS += ("prelu fresh", "prelu_backward fresh")
# The grey and the colours have a contrast of 3 or more on white and on GitHub's dark
# #0d1117, and stay apart for the colour-blind; the markers help.
GREY = "#768089"
GPU_PICTURES = """

![Time against size](bench/results/gpu-time.svg)

![Bandwidth against that of a copy](bench/results/gpu-bandwidth.svg)"""
STYLES = {
    OURS: {"color": "#d55e00", "marker": "o", "linewidth": 2.6, "zorder": 4},
    "numpy": {"color": "#00936b", "marker": "s"},
    "numexpr": {"color": "#9a7d0a", "marker": "v"},
    "torch": {"color": "#2380cc", "marker": "D"},
    ALONE: {"color": "#2380cc", "marker": "x", "linestyle": ":"},
    "onnxruntime": {"color": "#c46a9c", "marker": "^"},
    "cupy": {"color": "#00936b", "marker": "s"},
    "cupy.maximum": {"color": "#00936b", "marker": "x", "linestyle": ":"},
    "triton": {"color": "#9a7d0a", "marker": "v"},
    "jax": {"color": "#c46a9c", "marker": "^"},
    ROOF: {
        "color": GREY,
        "linestyle": "--",
        "zorder": 5,
    },  # over ours, which it is near
}
OTHER = {"color": "#8f6fd0", "marker": "P"}
LIMIT = {"color": GREY, "linewidth": 2, "zorder": 1}
LIMIT["linestyle"] = (0, (7, 3))
GREYED = ("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color")
GREYED += ("xtick.color", "ytick.color")
STYLE = dict.fromkeys(GREYED, GREY) | {"svg.hashsalt": "fastrelu"}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}


class Place(NamedTuple):
    """What differs between the report of a CPU and that of a GPU."""

    marker: str  # of the README's part
    prefix: str  # of the pictures' names
    rivals: tuple[str, ...]  # in the README's table
    few: tuple[int, ...]  # sizes there
    columns: tuple[int, ...]  # sizes in the long table
    limit: str  # what the limit is called
    about_limit: str
    names: dict[str, str]  # of peers, in pictures


CPU = Place(
    "bench",
    "",
    ("numpy", "torch"),
    (1 << 10, 1 << 20, 1 << 24),
    (1, 1 << 10, 1 << 17, 1 << 20, 1 << 24, 1 << 26),
    "memory's limit",
    """The last column is for the largest size of which memory's limit
is known; it was measured once, so that more than 100% says that memory had become faster.""",
    {"numpy": "NumPy", "torch": "PyTorch", ROOF: "hand-written C"},
)
GPU = Place(
    "gpu",
    "gpu-",
    ("torch", "triton"),
    (1 << 10, 1 << 20, 1 << 26),
    (1 << 10, 1 << 14, 1 << 20, 1 << 24, 1 << 26, 1 << 30),
    "a copy on the device",
    """Times are of the kernels alone. The last column is for the largest
size; the limit is what the device copies at that size.""",
    {
        "cupy": "CuPy's ElementwiseKernel",
        "jax": "JAX",
        "torch": "PyTorch",
        "triton": "Triton",
    },
)


def place(results):
    return GPU if "gpu" in results.about else CPU


class Cell(NamedTuple):
    """What the peers compete in."""

    op: str
    mode: str
    dtype: str
    n: int

    def __str__(self):
        return f"{in_words(self.op, self.mode)} {self.dtype} {size(self.n)}"


class Outcome(NamedTuple):
    """What came of it: for each peer the median and the quartiles in seconds."""

    bytes: int
    limit: float | None  # of memory, in GB/s
    seconds: dict[str, list[float]]

    def gb_per_s(self, peer):
        return self.bytes / self.seconds[peer][0] / 1e9


class Duel(NamedTuple):
    """A rival's median over ours: above 1 we are faster."""

    ratio: float
    rival: str
    cell: Cell

    def __str__(self):
        return f"{self.cell} {times(self.ratio)} {self.rival}"


class Results(NamedTuple):
    about: dict  # name, machine, date, versions, commands
    cells: dict[Cell, Outcome]


# Reading and keeping


def load(paths: Iterable[Path]) -> Results:
    """Merge files of pytest-benchmark and compact copies; a later file wins."""
    about, cells = {"name": None, "date": "", "versions": {}, "commands": []}, {}
    for path in paths:
        data = json.loads(path.read_text(encoding="utf-8"))
        new, found = from_copy(data) if "cells" in data else from_pytest(data, path)
        if about.setdefault("machine", new["machine"]) != new["machine"]:
            sys.exit(f"{path}: times of another machine cannot be compared")
        about["name"] = about["name"] or new.get("name")
        about |= {"gpu": new["gpu"]} if "gpu" in new else {}
        about["date"] = max(about["date"], new["date"])
        about["versions"] |= new["versions"]
        about["commands"] += [c for c in new["commands"] if c not in about["commands"]]
        for cell, outcome in found.items():
            seconds = cells[cell].seconds if cell in cells else {}
            cells[cell] = outcome._replace(seconds=seconds | outcome.seconds)
    if not cells:
        sys.exit("no benchmark here has an op in its extra_info")
    about["name"] = about["name"] or slug(about["machine"][:40], about["date"])
    return Results(about, cells)


def slug(*words):
    """Return the name of a file with these words."""
    return "-".join(re.findall("[a-z0-9]+", " ".join(words).lower()))


def from_pytest(data, path):
    info = data["machine_info"].get("fastrelu")
    if info is None:
        sys.exit(f"{path}: machine_info has no fastrelu; is it of `pytest bench`?")
    versions, cells = dict(info["versions"]), {}
    for benchmark in data["benchmarks"]:
        extra, stats = benchmark["extra_info"], benchmark["stats"]
        # Other suites, too, say what they measured, under groups of their own.
        if not (benchmark.get("group") or "").startswith(f"{extra.get('op')}-"):
            continue
        peer, cell = extra["peer"], Cell(*(extra[field] for field in Cell._fields))
        new = Outcome(extra["bytes"], extra["limit_gb_per_s"], {})
        seconds = cells.setdefault(cell, new).seconds
        if peer in seconds:  # one of the two would be lost
            sys.exit(f"{path}: {peer} is there twice for {cell}")
        # Rounded here, so that the compact copy gives the very same report.
        seconds[peer] = [float(f"{stats[q]:.4g}") for q in ("median", "q1", "q3")]
        if extra.get("peer_version"):
            versions.setdefault(peer, extra["peer_version"])
    about = {"machine": info["machine"], "date": data["datetime"][:10]}
    return about | {"versions": versions, "commands": [info["command"]]}, cells


def from_copy(data):
    names = data["peers"]
    cells = {}
    for *cell, work, limit, timings in data["cells"]:
        seconds = {p: t for p, t in zip(names, timings, strict=True) if t}
        cells[Cell(*cell)] = Outcome(work, limit, seconds)
    return data["about"], cells


def to_copy(results: Results) -> str:
    """Return JSON with a line per cell: small, and git can diff it."""
    names = peers(results)
    lines = [
        [*cell, out.bytes, out.limit, [out.seconds.get(peer) for peer in names]]
        for cell, out in results.cells.items()
    ]
    lines = ",\n".join(json.dumps(line, separators=(",", ":")) for line in lines)
    about = f'"about": {json.dumps(results.about)},\n"peers": {json.dumps(names)}'
    return f'{{{about},\n"cells": [\n{lines}\n]}}\n'


# Words and figures


def in_words(op, mode):
    return f"`{op}` {MODES.get(mode, mode)}"


def size(n):
    """Return 1, 64, 1k, 1M or 1G: the letters are powers of two, as the sizes are."""
    for unit, letter in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "k")):
        if n >= unit:
            return f"{n / unit:.4g}{letter}"
    return str(n)


def short(value):
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def duration(seconds):
    for unit, name in ((1e-9, "ns"), (1e-6, "µs"), (1e-3, "ms")):
        if seconds < 999.5 * unit:
            return f"{short(seconds / unit)} {name}"
    return f"{short(seconds)} s"


def times(ratio):
    """Return 6.4x; a loss is rounded down and never reads as 1.00x."""
    return f"{int(ratio * 100 + 1e-9) / 100:.2f}x" if ratio < 1 else f"{short(ratio)}x"


def mean(found):
    return times(geometric_mean(duel.ratio for duel in found)) if found else "-"


# Who is faster


def peers(results: Results, but: tuple[str, ...] = ()) -> list[str]:
    """Return who took part: first those with a style, in its order."""
    found = {peer for outcome in results.cells.values() for peer in outcome.seconds}
    known = [*STYLES, *sorted(found - STYLES.keys())]
    return [peer for peer in known if peer in found and peer not in but]


def duel(cell: Cell, outcome: Outcome, rival: str | None = None) -> Duel | None:
    """Compare us with one rival or with the fastest; None if somebody is missing."""
    medians = {p: s[0] for p, s in outcome.seconds.items() if p not in (OURS, ROOF)}
    rival = rival or min(medians, key=medians.get, default=None)
    if OURS not in outcome.seconds or rival not in medians:
        return None
    return Duel(medians[rival] / outcome.seconds[OURS][0], rival, cell)


def duels(results: Results, rival: str | None = None, dtype: str = "*") -> list[Duel]:
    """Return the duels in all cells, our worst first."""
    cells = [c for c in results.cells.items() if fnmatchcase(c[0].dtype, dtype)]
    return sorted(filter(None, (duel(*cell, rival) for cell in cells)))


def losses(found: list[Duel]) -> list[Duel]:
    return [duel for duel in found if duel.ratio < TOLERANCE]


# The README's part


def in_short(results: Results) -> str:
    """Return what the README has room for."""
    results, _ = by_arguments(results)
    about = results.about
    rest = f"bench/results/{about['name']}.md"
    pictures = "" if place(results) is CPU else GPU_PICTURES
    return f"""\
How many times as long others take, float32, the medians:

{short_table(results)}

**Bold: the other is faster.** {about["machine"]}, {about["date"]}.
[All ways to call, dtypes and sizes, with times]({rest}).

All of them against the fastest rival: {digest(duels(results))}{pictures}{gpu_part(about)}"""


def short_table(results):
    known = {cell.n for cell in results.cells if cell.dtype == "float32"}
    sizes = [n for n in place(results).few if n in known]
    rivals = [rival for rival in place(results).rivals if rival in peers(results)]
    head = ["float32"]
    for rival in rivals:
        name = place(results).names.get(rival, rival)
        head += [f"{name}, {size(n)}" if n == sizes[0] else size(n) for n in sizes]
    rows = []
    for series in all_series(results):
        if " ".join(series) in ROWS:
            cells = [Cell(*series, "float32", n) for n in sizes]
            found = [ratio(results, cell, rival) for rival in rivals for cell in cells]
            rows.append([in_words(*series).removesuffix(" fresh"), *found])
    return table(head, *rows)


def ratio(results, cell, rival):
    """Return a rival's time over ours, or a dash."""
    found = cell in results.cells and duel(cell, results.cells[cell], rival)
    if not found:
        return "-"
    return f"**{times(found.ratio)}**" if found.ratio < 1 else times(found.ratio)


def markdown(results: Results) -> str:
    """Return all tables."""
    results, others = by_arguments(results)
    about, rivals = results.about, peers(results, but=(OURS, ROOF))
    versions = ", ".join(" ".join(pair) for pair in about["versions"].items())
    commands = ", ".join(f"`{command}`" for command in about["commands"])
    each = ", ".join(f"{mean(duels(results, rival))} {rival}" for rival in rivals)
    alone = f"\nAgainst {ALONE} alone: {digest(duels(results, ALONE))}\n"
    return f"""\
{about["machine"]}, {about["date"]}; {versions}. Made by {commands}.

{float32_table(results, all_series(results))}

A cell has our median time, and how many times as long the fastest rival takes. **Bold:
the rival is faster.** {place(results).about_limit}
The times of a cell were taken in turns; those of another cell at another time, when the
machine may have been slower or faster. That is how one element can take longer than a
thousand.

All dtypes and sizes against the fastest rival: {digest(duels(results))} 
Against each rival: {each or "-"}.
{alone if ALONE in rivals else ""}
{dtype_table(results, rivals)}{arguments_part(others)}{gpu_part(about)}"""


def by_arguments(results):
    """Return the results with the plainest arguments, and those with others."""
    plain = {cell: o for cell, o in results.cells.items() if ":" not in cell.op}
    rest = {cell: o for cell, o in results.cells.items() if ":" in cell.op}
    return results._replace(cells=plain), results._replace(cells=rest)


def arguments_part(results):
    """Return what only a report of other arguments has: their table and what they are."""
    if not results.cells:
        return ""
    names = dict.fromkeys(cell.op.partition(":")[2] for cell in results.cells)
    words = "; ".join(f"`{name}`: {ARGUMENTS[name].words}" for name in names)
    return f"""

Arguments one step off the plainest. {words}.

{float32_table(results, all_series(results))}

Against the fastest rival: {digest(duels(results))}"""


def table(*rows: list[str]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---|" + "---:|" * (len(rows[0]) - 1), *body])


def gpu_part(about):
    """Return what only a report of a GPU has, as the last lines."""
    if "gpu" not in about:
        return ""
    gpu = about["gpu"]
    peers = dict.fromkeys(peer for row in gpu["host"].values() for peer in row)
    rows = []
    for way, times_ in gpu["host"].items():
        medians = (times_[peer][0] if peer in times_ else None for peer in peers)
        rows.append(
            [
                in_words(*way.split()),
                *("-" if m is None else duration(m) for m in medians),
            ]
        )
    host = table(["a call on the host", *peers], *rows) if rows else ""
    return "\n\n" + "\n".join(filter(None, [host, *gpu_lines(gpu)]))


def gpu_lines(gpu):
    """Yield what was checked, and all that is missing."""
    verdicts = [verdict for _, verdict, _ in gpu["checks"]]
    counts = (f"{verdicts.count(v)} {v}" for v in ("ok", "failed", "skipped"))
    yield f"\nChecks on the device: {', '.join(counts)}."
    if first := gpu.get("first"):
        yield (
            f"The first call of a process: {duration(first['warm'])}, or "
            f"{duration(first['empty'])} if the code has to be compiled."
        )
    for name, verdict, why in gpu["checks"]:
        if verdict != "ok":
            yield f"- {name}: {verdict}, {why.splitlines()[0] if why else ''}"
    for peer, why in gpu["absent"].items():
        yield f"- without {peer}: {why}"
    yield from (f"- {error.splitlines()[0]}" for error in gpu["errors"])
    if unchecked := gpu.get("unchecked"):
        yield f"- timed, but not checked: {', '.join(unchecked)}"
    if gpu["dropped"]:
        yield f"- no time was left for {', '.join(gpu['dropped'])}"


def float32_table(results, series_of_rows):
    known = {cell.n for cell in results.cells if cell.dtype == "float32"}
    columns = [n for n in place(results).columns if n in known]
    rows = []
    for series in series_of_rows:
        cells = [Cell(*series, "float32", n) for n in columns]
        figures = [figure(cell, results.cells.get(cell)) for cell in cells]
        rows.append([in_words(*series), *figures, bandwidth(points(results, *series))])
    return table(["float32", *map(size, columns), "GB/s, of the limit"], *rows)


def all_series(results):
    """Return each op and mode that has float32, in the order of the measurement."""
    found = (
        cell[:2]
        for cell, outcome in results.cells.items()
        if cell.dtype == "float32" and outcome.seconds.keys() != {ROOF}
    )
    return list(dict.fromkeys(found))


def points(results, op, mode, peer=OURS):
    """Return a peer's sizes and outcomes for float32."""
    wanted = (op, mode, "float32")
    found = ((c.n, o) for c, o in sorted(results.cells.items()) if c[:3] == wanted)
    return [(n, outcome) for n, outcome in found if peer in outcome.seconds]


def figure(cell, outcome):
    if outcome is None or OURS not in outcome.seconds:
        return "-"
    found = duel(cell, outcome)
    against = f"{times(found.ratio)} {found.rival}" if found else "-"
    text = f"{duration(outcome.seconds[OURS][0])} · {against}"
    return f"**{text}**" if found and found.ratio < 1 else text


def bandwidth(points):
    for n, outcome in reversed(points):
        if outcome.limit:
            reached = outcome.gb_per_s(OURS)
            return f"{reached:.1f}, {reached / outcome.limit:.0%} ({size(n)})"
    return "-"


def digest(found: list[Duel]) -> str:
    """Return the mean, the worst cells, and how many are lost."""
    if not found:
        return "nothing to compare."
    lost = losses(found)
    worst = ", ".join(map(str, (lost or found[:1])[:NAMED]))
    return (
        f"{mean(found)} as the geometric mean, {len(found)} cells, "
        f"{len(lost)} of them below {TOLERANCE}. Worst: {worst}."
    )


def dtype_table(results, rivals):
    rows = []
    for dtype in dict.fromkeys(cell.dtype for cell in results.cells):
        found = duels(results, dtype=dtype)
        each = [mean(duels(results, rival, dtype)) for rival in rivals]
        worst = str(found[0]).replace(f" {dtype} ", " ") if found else "-"
        lost = str(len(losses(found)))
        rows.append([dtype, str(len(found)), mean(found), *each, lost, worst])
    head = ["geometric means", "cells", "fastest rival", *rivals]
    return table([*head, f"below {TOLERANCE}", "worst"], *rows)


def insert(path: Path, text: str, marker: str = CPU.marker) -> None:
    """Replace what is between the markers and nothing else."""
    old = path.read_bytes().decode()  # bytes, so that no line end changes
    first, last = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    before, begin, rest = old.partition(first)
    _, end, after = rest.partition(last)
    if not end or (old.count(first), old.count(last)) != (1, 1):
        sys.exit(f"{path}: wants {first} and later {last}, once each")
    path.write_bytes(f"{before}{begin}\n\n{text}\n\n{end}{after}".encode())


# Pictures


def draw(results: Results, folder: Path) -> None:
    """Write time.svg and bandwidth.svg, with the same bytes for the same figures."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        for name, plot in (("time", plot_time), ("bandwidth", plot_bandwidth)):
            picture = panels(results, plot)
            path = folder / f"{place(results).prefix}{name}.svg"
            picture.savefig(path, transparent=True, metadata={"Date": None})


def plot_time(ax, peer, points, place):
    nanoseconds = [[s * 1e9 / n for s in out.seconds[peer]] for n, out in points]
    median, q1, q3 = zip(*nanoseconds, strict=True)
    n, style = [n for n, _ in points], look(peer, place)
    ax.plot(n, median, **style)
    ax.fill_between(n, q1, q3, color=style["color"], alpha=0.2, linewidth=0)
    ax.set_ylabel("ns per element")


def plot_bandwidth(ax, peer, points, place):
    points = [(n, out) for n, out in points if n >= 1 << 10]  # below: the call's cost
    reached = [out.gb_per_s(peer) for _, out in points]
    ax.plot([n for n, _ in points], reached, **look(peer, place))
    ax.set_ylabel("GB/s")
    ax.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    limits = [(n, out.limit) for n, out in points if out.limit]
    if peer == OURS and limits and place is CPU:
        ax.axhline(limits[-1][1], label=place.limit, **LIMIT)
    elif peer == OURS and limits:
        ax.plot(*zip(*limits, strict=True), label=place.limit, **LIMIT)


def look(peer, place):
    label = place.names.get(peer, peer)
    own = STYLES.get(peer, OTHER)
    return {"label": label, "linewidth": 1.4, "markersize": 4} | own


def panels(results, plot):
    """Return a figure with a panel for each op and the legend in the last place."""
    from matplotlib.figure import Figure

    known = all_series(results)
    matches = ([s for s in known if fnmatchcase(" ".join(s), p)] for p in PANELS)
    shown = [found[0] for found in matches if found]
    rows = len(shown) // 2 + 1
    # As wide as a telephone shows it, so that words stay legible there.
    picture = Figure(figsize=(5.4, 2.4 * rows + 0.4), layout="constrained")
    grid = {"sharex": True, "sharey": True, "squeeze": False}
    grid["subplot_kw"] = {"xscale": "log", "yscale": "log"}
    axes = list(picture.subplots(rows, 2, **grid).flat)
    legend = {}
    for ax, series in zip(axes, shown, strict=False):
        for peer in peers(results):
            if found := points(results, *series, peer):
                plot(ax, peer, found, place(results))
        dress(ax, in_words(*series).replace("`", ""))
        handles, labels = ax.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    for ax in axes[len(shown) :]:
        ax.axis("off")
    axes[-1].legend(legend.values(), legend, loc="center", frameon=False)
    about = f"float32, {results.about['machine']}, {results.about['date']}"
    picture.supxlabel(fill(about, 70), fontsize=8)
    return picture


def dress(ax, title):
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_xlabel("elements")
    ax.grid(alpha=0.25, linewidth=0.6)
    low, high = ax.get_xlim()
    ax.set_xticks([1 << k for k in range(0, 40, 10) if low <= 1 << k <= high])
    ax.xaxis.set_major_formatter(lambda n, _: size(round(n)))
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
    ax.minorticks_off()
    ax.tick_params(labelbottom=True, labelleft=True)  # on the inner panels too


# The command line


def check(results: Results) -> None:
    """Name the cells where a rival is faster, and exit with 1 if there are any."""
    found = duels(results)
    if not found:
        sys.exit("no cell has both our time and a rival's")
    lost = losses(found)
    for each in lost:
        print(str(each).replace("`", ""))
    print(f"{len(lost)} of {len(found)} cells are below {TOLERANCE}")
    sys.exit(bool(lost))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("results", nargs="+", type=Path, help="of pytest-benchmark, or compact copies")
    add("--check", action="store_true", help="only fail if a rival is faster by 5 %%")
    add("--readme", type=Path, default=BENCH.parent / "README.md")
    add("--out", type=Path, default=BENCH / "results", help="where the rest goes")
    add("--name", help="of the compact copy (default: from the machine and the date)")
    options = parser.parse_args(arguments)
    for paths in by_place(options.results):
        publish(load(paths), options)


def by_place(paths: list[Path]) -> list[list[Path]]:
    """Return the files of CPUs and those of GPUs."""
    groups: dict[bool, list[Path]] = {}
    for path in paths:
        about = json.loads(path.read_text(encoding="utf-8")).get("about", {})
        groups.setdefault("gpu" in about, []).append(path)
    return list(groups.values())


def publish(results: Results, options: argparse.Namespace) -> None:
    if options.check:
        check(results)
    results.about["name"] = options.name or results.about["name"]
    insert(options.readme, in_short(results), place(results).marker)
    options.out.mkdir(parents=True, exist_ok=True)
    copy = options.out / f"{results.about['name']}.json"
    copy.write_text(to_copy(results), encoding="utf-8", newline="\n")
    text = f"# {results.about['name']}\n\n{markdown(results)}\n"
    copy.with_suffix(".md").write_text(text, encoding="utf-8", newline="\n")
    draw(results, options.out)


if __name__ == "__main__":
    main()
