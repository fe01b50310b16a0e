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
import os
import signal
import statistics
import sys
import tempfile
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
TUNED = ["relu-out-float32", "relu-out-float16", "relu_backward-out-float32"]
TUNED += ["relu_mask-fresh-float32", "prelu_backward-fresh-float32"]
TUNED += ["prelu_backward_rows-fresh-float32"]
THREADS = [128, 256, 512, 1024]


def cases():
    """Return the names of all that is timed, the most important first."""
    rows = [
        *product(COMMON, ["float32"], ["64M", "1k", "1M", "1G"]),
        *product(COMMON, ["float16", "bfloat16", "float64"], ["64M"]),
        *product(LAYOUTS, ["float32"], ["64M", "1M"]),
        *product(COMMON, ["float32"], ["16M", "16k"]),
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
        self.gpu["absent"], self.peers = about["absent"], about["peers"]
        self.path = self.options.out / f"{self.results.about['name']}.json"
        steps = [(self.check, name) for name in about["checks"]]
        steps += [(self.first, "first call")]
        steps += [(self.host, f"host {name}-float32-1k") for name in HOST]
        steps += [(self.measure, name) for name in self.options.cases]
        wanted = self.options.only
        return [step for step in steps if any(fnmatchcase(step[1], w) for w in wanted)]

    def go(self):
        steps = self.begin()
        with countdown(len(steps)) as show:
            for function, name in steps:
                last = self.last_check if function == self.check else self.deadline
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
        answer = self.ask("check", name)
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
        answer = self.ask("measure", name, self.peers, TURNS)
        if "error" in answer:
            self.error(name, answer["error"], ours=True)
            return
        seconds = {}
        for peer, result in answer["results"].items():
            if result["error"]:
                self.error(f"{name} {peer}", result["error"], ours=peer == report.OURS)
                self.strikes[peer] += 1
            elif result["seconds"] and not (peer == report.OURS and self.wrong(case)):
                seconds[peer] = summary(result["seconds"])
        for peer in set(self.peers) - {report.OURS}:
            if self.strikes[peer] == STRIKES:  # each costs a new process
                self.peers.remove(peer)
                self.gpu["absent"][peer] = f"left out after {STRIKES} errors"
        if seconds:
            cell = report.Cell(case.op, case.mode, case.dtype, case.n)
            outcome = report.Outcome(case.bytes, answer["limit"], seconds)
            self.results.cells[cell] = outcome

    def wrong(self, case):
        """Say whether a check that this case depends on failed, or was dropped."""
        own = [f"{case.row.activation} {case.dtype} "]
        if case.row.activation == "prelu" and case.row.passes != "forward":
            own.append("weight gradient ")
        names = [*self.failed, *self.gpu["dropped"]]
        return any(name.startswith(tuple(own)) for name in names)


def summary(seconds):
    """Return the median and the quartiles."""
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    return [float(f"{value:.4g}") for value in (median, q1, q3)]


def tune(options, command):
    """Print what blocks of other sizes reach, in 10^9 bytes a second."""
    names = [f"{name}-{options.size}" for name in TUNED]
    print("threads a block".ljust(44), *(f"{n:>7}" for n in THREADS))
    reached = {}
    for threads in THREADS:
        with tempfile.TemporaryDirectory() as folder:
            gpu = Gpu([*command, "--threads", str(threads)], FASTRELU_CACHE_DIR=folder)
            worker = Worker(gpu)
            for name in names:
                with contextlib.suppress(WorkerError):
                    answer = worker.ask("measure", name, [report.OURS], TURNS)
                    result = answer.get("results", {}).get(report.OURS, {})
                    if seconds := result.get("seconds"):
                        median = statistics.median(seconds)
                        rate = Case.parse(name).bytes / median / 1e9
                        reached[name, threads] = rate
                worker.revive()
            worker.end()
    for name in names:
        rates = [reached.get((name, n)) for n in THREADS]
        shown = ("      -" if rate is None else f"{rate:7.1f}" for rate in rates)
        print(name.ljust(44), *shown)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--minutes", type=float, default=7.5, help="of the whole run (%(default)s)")
    add("--only", nargs="+", default=["*"], metavar="PATTERN", help="of steps' names")
    add("--cases", nargs="+", default=cases(), metavar="CASE", help="what is timed")
    add("--tune", action="store_true", help="only try other sizes of blocks")
    add("--size", default="64M", help="of what --tune times (%(default)s)")
    add("--name", help="of the results (default: from the GPU and the date)")
    add("--readme", type=Path, default=BENCH.parent / "README.md")
    add("--out", type=Path, default=BENCH / "results")
    options = parser.parse_args(arguments)
    options.given = sys.argv[1:] if arguments is None else []
    for name in ("--out", "--readme"):  # where figures go is not what they depend on
        if name in options.given:
            at = options.given.index(name)
            del options.given[at : at + 2]
    return options


def main(arguments=None, command=WORKER):
    options = parse(arguments)
    if options.tune:
        tune(options, command)
        return 0
    run, status = Run(options, command), 0
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
