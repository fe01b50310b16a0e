"""The benchmark on a GPU: first whether it is right, then how fast, then the report.

    pip install ".[cuda13,bench]" "cupy-cuda13x[ctk]"  # and torch, triton, jax if you like
    python bench/gpu.py

It takes at most eight minutes and drops what does not fit.  What it finds is in
bench/results/, as far as it came, after every step.  The exit status is 1 if anything
was wrong; what failed is not timed.
"""

import argparse
import collections
import contextlib
import datetime
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path

import report

from fastrelu.cli.bench import countdown
from fastrelu.cli.interrupts import INTERRUPTED, raised_interrupt
from fastrelu.cli.peers.cases import COMMON, Case
from fastrelu.cli.peers.team import Worker, WorkerError

BENCH = Path(__file__).resolve().parent
WORKER = [sys.executable, str(BENCH / "gpu_worker.py")]
PATIENCE = 150  # seconds for one request
REST = 0.4  # of the time is left to what follows the checks
TURNS = 3
STRIKES = 3
BACKWARD = [("relu_backward", "out"), ("relu_backward", "inplace")]
LAYOUTS = [
    (f"prelu{passes}_{layout}", "fresh")
    for layout in ("last", "rows", "shared")
    for passes in ("", "_backward")
]
HOST = ["relu-inplace", "relu-out", "relu-fresh", "relu_backward-fresh", "prelu-fresh"]
HOST += ["relu_mask-fresh", "prelu_backward-fresh"]
TUNED = ["relu-out-float32", "relu-fresh-float32", "relu-out-float16"]
TUNED += ["relu_backward-fresh-float32", "leaky_relu_backward-fresh-float16"]
TUNED += ["relu_mask-fresh-float32", "prelu-fresh-float32"]
TUNED += ["prelu_backward-fresh-float32", "prelu_backward_rows-fresh-float32"]
# What else the engine's constants might be, and whose times that may change.
VARIANTS = {"": "*", "THREADS=128": "*", "THREADS=512": "*"}
VARIANTS |= {"BLOCKS=1056": "prelu_backward*", "BLOCKS=4224": "prelu_backward*"}
RIVALS = ["torch", "triton"]


def cases():
    """Return the names of all that is timed, the most important first."""
    rows = [
        *product(COMMON, ["float32"], ["64M", "1M"]),
        *product(LAYOUTS, ["float32"], ["64M", "1M"]),
        *product(COMMON, ["float32"], ["1k", "16M"]),
        *product(COMMON, ["float16", "bfloat16", "float64"], ["64M"]),
        *product(COMMON, ["float32"], ["16k", "1G"]),
        *product(BACKWARD, ["float32"], ["64M", "1M"]),
        *product(COMMON, ["float16", "bfloat16"], ["1M", "1G"]),
    ]
    return [f"{op}-{mode}-{dtype}-{n}" for (op, mode), dtype, n in rows]


class Gpu:
    """The process that works on the GPU, as Worker wants to know it."""

    def __init__(self, command, **environment):
        self.command = lambda: command
        self.environment = lambda: environment


class Run:
    """What was asked so far and what came of it, kept in a file after every step."""

    def __init__(self, options, command):
        self.deadline = time.monotonic() + 60 * options.minutes
        self.last_check = self.deadline - REST * 60 * options.minutes
        self.worker = Worker(Gpu(command))
        self.options, self.path = options, None
        self.gpu = {"checks": [], "absent": {}, "dropped": [], "errors": [], "host": {}}
        self.gpu[
            "unchecked"
        ] = []  # what was timed, though no time was left to check it
        self.results = report.Results({"gpu": self.gpu}, {})
        self.failed = []  # names of checks, and of what of ours could not be timed
        self.strikes = collections.Counter()  # of peers

    def ask(self, *request):
        """Send a request; return the answer, which may be an error."""
        left = self.deadline - time.monotonic()
        limit = min(PATIENCE, max(left, 1))
        pid = self.worker.process.pid
        timer = threading.Timer(limit, os.killpg, [pid, signal.SIGKILL])
        timer.start()
        try:
            answer = self.worker.ask(*request)
        except WorkerError as error:
            late = f" after {limit:.0f} s" * (not timer.is_alive())
            answer = {"error": f"{error}{late}"}
        finally:
            timer.cancel()
        results = answer.get("results", {}).values()
        if "error" in answer or any(result["error"] for result in results):
            # An error may leave a process that cannot use the GPU any more.
            self.worker.end()
            self.worker.start()
        return answer

    def begin(self):
        """Learn what there is; return the steps."""
        about = self.ask("about")
        if "error" in about:
            sys.exit(f"bench/gpu.py: there is no GPU to work on: {about['error']}")
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        name = report.slug(about["device"].partition(",")[0], date)
        command = " ".join(["python bench/gpu.py", *self.options.given])
        self.results.about.update(
            name=self.options.name or name,
            machine=about["device"],
            date=date,
            versions=about["versions"],
            commands=[command],
        )
        self.gpu["absent"] = about["absent"]
        wanted = [report.OURS, *(self.options.peers or about["peers"])]
        self.peers = [peer for peer in about["peers"] if peer in wanted]
        self.checked = dict(
            known for file in self.options.checked for known in of(file)
        )
        self.path = self.options.out / f"{self.results.about['name']}.json"
        steps = [(self.check, name) for name in about["checks"]]
        steps += [(self.host, f"host {name}-float32-1k") for name in HOST]
        steps += [(self.measure, name) for name in self.options.cases]
        steps += [(self.first, "first call")]
        wanted = self.options.only
        return [step for step in steps if any(fnmatchcase(step[1], w) for w in wanted)]

    def go(self):
        steps = self.begin()
        with countdown(len(steps)) as show:
            for function, name in steps:
                last = self.last_check if function == self.check else self.deadline
                last = math.inf if name in self.checked else last
                if time.monotonic() > last:
                    self.gpu["dropped"].append(name)
                    continue
                show(name)
                function(name)
                self.keep()
        self.keep()

    def keep(self):
        self.options.out.mkdir(parents=True, exist_ok=True)
        whole = self.path.with_suffix(".part")
        whole.write_text(report.to_copy(self.results), encoding="utf-8", newline="\n")
        whole.replace(self.path)

    def fail(self, name, why):
        print(f"\nbench/gpu.py: {name}: {why}", file=sys.stderr)

    def check(self, name):
        answer = self.checked.get(name) or self.ask("check", name)
        verdict = answer.get("verdict", "failed")
        why = answer.get("why") or answer.get("error", "")
        self.gpu["checks"].append([name, verdict, why.strip()])
        if verdict == "failed":
            self.fail(name, why)
            self.failed.append(name)

    def first(self, name):
        answer = self.ask("first")
        if "error" in answer:
            self.error(name, answer["error"], ours=True)
        else:
            self.gpu["first"] = answer

    def host(self, name):
        answer = self.ask("host", name.removeprefix("host "), self.peers)
        if "error" in answer:
            self.error(name, answer["error"], ours=True)
            return
        op, mode, *_ = name.removeprefix("host ").split("-")
        for peer, problem in answer.pop("errors").items():
            self.error(f"{name} {peer}", problem, ours=peer.startswith(report.OURS))
        self.gpu["host"][f"{op} {mode}"] = {p: summary(s) for p, s in answer.items()}

    def error(self, name, why, *, ours):
        self.gpu["errors"].append(f"{name}: {why}")
        if ours:  # others may fail, but not unseen
            self.failed.append(name)
        self.fail(name, why)

    def measure(self, name):
        case = Case.parse(name)
        wrong = speak_for(case, self.failed)
        answer = self.ask("measure", name, self.peers, TURNS)
        if "error" in answer:
            self.error(name, answer["error"], ours=True)
            return
        seconds = {}
        for peer, result in answer["results"].items():
            if result["error"]:
                self.error(f"{name} {peer}", result["error"], ours=peer == report.OURS)
                self.strikes[peer] += 1
            elif result["seconds"] and not (peer == report.OURS and wrong):
                seconds[peer] = summary(result["seconds"])
        for peer in set(self.peers) - {report.OURS}:
            if self.strikes[peer] == STRIKES:  # each costs a new process
                self.peers.remove(peer)
                self.gpu["absent"][peer] = f"left out after {STRIKES} errors"
        if seconds:
            cell = report.Cell(case.op, case.mode, case.dtype, case.n)
            outcome = report.Outcome(case.bytes, answer["limit"], seconds)
            self.results.cells[cell] = outcome
            if report.OURS in seconds and speak_for(case, self.gpu["dropped"]):
                self.gpu["unchecked"].append(name)


def speak_for(case, checks):
    """Say whether one of these checks is of what a case times."""
    own = [f"{case.row.activation} {case.dtype} "]
    if case.row.activation == "prelu" and case.row.passes != "forward":
        own.append("weight gradient ")
    return any(name.startswith(tuple(own)) for name in checks)


def summary(seconds):
    """Return the median and the quartiles."""
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    return [float(f"{value:.4g}") for value in (median, q1, q3)]


def of(file):
    """Yield each check that an earlier run made, and what came of it."""
    for name, verdict, why in json.loads(file.read_text())["about"]["gpu"]["checks"]:
        yield name, {"verdict": verdict, "why": why}


def tune(options, command):
    """Print the microseconds of each case with other constants, and those of rivals."""
    names = [f"{name}-{size}" for size in options.size for name in TUNED]
    reached = collections.defaultdict(dict)
    deadline = time.monotonic() + 60 * options.minutes
    for variant, pattern in VARIANTS.items():
        settings = ["--set", *variant.split(",")] if variant else []
        worker = Worker(Gpu([*command, *settings]))
        peers = [report.OURS] if variant else [report.OURS, *RIVALS]
        for name in names:
            if not fnmatchcase(name, pattern) or time.monotonic() > deadline:
                continue
            with contextlib.suppress(WorkerError):
                answer = worker.ask("measure", name, peers, TURNS)
                for peer, result in answer.get("results", {}).items():
                    if seconds := result.get("seconds"):
                        of_variant = variant or "as it is"
                        column = of_variant if peer == report.OURS else peer
                        reached[column][name] = 1e6 * statistics.median(seconds)
            worker.revive()
        worker.end()
    print("microseconds".ljust(40), *(f"{column:>22}" for column in reached))
    for name in names:
        found = (times.get(name) for times in reached.values())
        shown = ("-" if time is None else f"{time:.2f}" for time in found)
        print(name.ljust(40), *(f"{time:>22}" for time in shown))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "tune.json").write_text(json.dumps(reached))


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--minutes", type=float, default=7.5, help="of the whole run (%(default)s)")
    add("--only", nargs="+", default=["*"], metavar="PATTERN", help="of steps' names")
    add("--cases", nargs="+", default=cases(), metavar="CASE", help="what is timed")
    add("--tune", action="store_true", help="only try other constants of the engine")
    add("--size", nargs="+", default=["64M"], help="of what --tune times")
    add("--set", nargs="+", metavar="NAME=VALUE", help="constants of the engine")
    add("--peers", nargs="+", metavar="PEER", help="the rivals (default: all)")
    earlier = "results of runs on this machine, whose checks are not made again"
    add("--checked", nargs="+", default=[], type=Path, metavar="JSON", help=earlier)
    add("--name", help="of the results (default: from the GPU and the date)")
    add("--readme", type=Path, default=BENCH.parent / "README.md")
    add("--out", type=Path, default=BENCH / "results")
    options = parser.parse_args(arguments)
    options.given = sys.argv[1:] if arguments is None else []
    for name in ("--out", "--readme", "--checked"):  # places change no figures
        if name in options.given:
            at = options.given.index(name)
            more = options.given[at + 1 :]
            end = next(
                (k for k, word in enumerate(more) if word[:2] == "--"), len(more)
            )
            options.given[at:] = more[end:]
    return options


def main(arguments=None, command=WORKER):
    options = parse(arguments)
    if options.tune:
        tune(options, command)
        return 0
    settings = ["--set", *options.set] if options.set else []
    run, status = Run(options, [*command, *settings]), 0
    with raised_interrupt():
        try:
            run.go()
        except KeyboardInterrupt:
            print("bench/gpu.py: interrupted", file=sys.stderr)
            status = INTERRUPTED
        finally:
            run.worker.end()
    if run.path is not None and run.path.exists():
        if run.results.cells:
            given = ["--readme", str(options.readme), "--out", str(options.out)]
            report.main([str(run.path), *given])
        print("\n".join(report.gpu_lines(run.gpu)))
    return status or int(bool(run.failed))


if __name__ == "__main__":
    sys.exit(main())
