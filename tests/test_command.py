"""The command line within this process: what a run of it seldom meets."""

import contextlib
import ctypes
import importlib
import importlib.util
import io
import os
import re
import signal
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest

import fastrelu
from fastrelu import __main__ as process
from fastrelu import _command, cli
from fastrelu.cli.peers.cases import Case
from fastrelu.cli.peers.libraries import NumExpr
from fastrelu.cli.peers.team import Result

pytest.importorskip("rich")


# info ---------------------------------------------------------------------------------


class Driver:
    """What libcuda answers"""

    def __init__(self, status=0, devices=1):
        self.status, self.devices = status, devices

    def cuInit(self, flags):
        return self.status

    def cuDeviceGetCount(self, pointer):
        pointer._obj.value = self.devices
        return 0

    def cuDriverGetVersion(self, pointer):
        pointer._obj.value = 13010
        return 0


@pytest.mark.parametrize(
    ("driver", "installed", "expected"),
    [
        (None, True, "no NVIDIA driver found"),
        (Driver(status=100), True, "the NVIDIA driver answers with error 100"),
        (Driver(), True, "found 1 GPU and a driver for CUDA 13.1, and numba-cuda"),
        (
            Driver(devices=2),
            False,
            (
                "found 2 GPUs and a driver for CUDA 13.1; numba-cuda is missing: "
                'pip install "fastrelu[cuda13]"'
            ),
        ),
    ],
)
def test_what_there_is_of_cuda(driver, installed, expected, monkeypatch):
    def load(name):
        if driver is None:
            raise OSError
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: installed or None)
    assert cli.info.cuda() == expected


# bench --------------------------------------------------------------------------------


class Team:
    """Peers whose times are known"""

    ends = None

    def __init__(self, peers):
        self.names = [peer.name for peer in peers]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def measure(self, case):
        if self.ends is not None:
            raise self.ends
        results = [Result(case, name) for name in (*self.names, "c", "d", "e")]
        for result, seconds in zip(results, (2e-3, 1e-3, 5e-3, 3e-2), strict=False):
            result.seconds = result.turns = [seconds] * 5
        results[-1].error = "no luck"
        return results


def bench(*arguments):
    return cli.main(["bench", "--peers", "numpy", "--size", "1k", *arguments])


@pytest.fixture
def known(monkeypatch):
    """Peers whose times are known, and a machine with nothing else to do"""
    monkeypatch.setattr(cli.bench, "Team", Team)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.25, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setenv("COLUMNS", "100")


def test_a_table_shows_losses_and_errors(known, capsys):
    assert bench() == 1
    output, errors = capsys.readouterr()
    header, operation, row = output.splitlines()[:3]
    assert header.split() == ["size", "fastrelu", "GB/s", "numpy", "c", "d", "e"]
    assert operation == "relu fresh"
    assert re.split(r"  +", row.strip()) == [
        *("1k", "2.00 ms", "0.0"),
        *("< 0.50x (0.50-0.50)", "2.5x (2.5-2.5)", "15x (15-15)", "error"),
    ]
    assert "The load was 0.2 before and 0.2 after, on 4 cores." in output
    assert "WARNING" not in output
    assert "fastrelu bench: e, relu-fresh-float32-1k: no luck" in errors


@pytest.mark.parametrize("columns", [60, 80])
def test_a_table_fits_the_terminal(columns, known, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert bench() == 1
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    headers = [line.split() for line in lines if line.startswith("  size")]
    assert all(header[:3] == ["size", "fastrelu", "GB/s"] for header in headers)
    assert [name for header in headers for name in header[3:]] == [
        *("numpy", "c", "d", "e")
    ]
    assert len(headers) == {60: 2, 80: 1}[columns]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [(100, [[0, 1, 2, 3, 4, 5]]), (40, [[0, 1, 2, 3], [0, 1, 2, 4, 5]]), (1, None)],
)
def test_what_stands_side_by_side(columns, expected):
    alone = [[0, 1, 2, i] for i in (3, 4, 5)]
    found = cli.bench.blocks([5, 10, 5, 15, 10, 10], columns)
    assert found == (expected or alone)


def test_nothing_to_compare_with():
    assert cli.bench.blocks([5, 10, 5], 80) == [[0, 1, 2]]


def result_of(peer, *turns):
    case = Case.parse("relu-fresh-float32-1k")
    return Result(case, peer, seconds=[*turns], turns=[*turns])


def test_figures_that_vary_are_marked():
    ours = result_of("fastrelu", 1e-3, 1e-3, 2e-3)
    steady = result_of("numpy", 3e-3, 3.5e-3, 6e-3)
    other = result_of("torch", 5e-3, 7.5, 3e-3)
    assert cli.bench.times_ours(steady, ours) == "3.0x (3.0-3.5)"
    assert cli.bench.times_ours(other, ours) == "? 5.0x (1.5-7500)"
    _, _, row, _ = cli.bench.bench_table([[ours, steady]], 80)
    assert row.split()[1:3] == ["1.00", "ms"]
    ours.turns[2] = 2.1e-3
    _, _, row, _ = cli.bench.bench_table([[ours, steady]], 80)
    assert row.split()[1:4] == ["?", "1.00", "ms"]


@pytest.mark.parametrize(
    ("doubtful", "before", "after", "expected"),
    [
        (0, 4.0, 4.0, []),
        (3, 0.0, 4.0, ["figures with ?, 3 here"]),
        (0, 4.1, 1.0, ["other programs took the cores"]),
        (1, 0.0, 4.1, ["figures with ?, 1 here", "other programs took the cores"]),
    ],
)
def test_what_is_said_of_a_busy_machine(known, doubtful, before, after, expected):
    warnings = list(cli.bench.remarks(doubtful, before, after))[2:]
    assert all(text.startswith("WARNING: ") for text in warnings)
    for text, what in zip(warnings, expected, strict=True):
        assert what in text


def test_a_machine_that_tells_no_load(monkeypatch):
    monkeypatch.delattr(os, "getloadavg", raising=False)
    assert cli.bench.load() == 0


def test_a_size_that_memory_cannot_hold(known, monkeypatch, capsys):
    # 5 arrays of float32, and as much again for what is put aside.
    monkeypatch.setattr(cli.bench, "free_memory", lambda: 2 * 5 * 4 * 1024)
    assert bench() == 1
    capsys.readouterr()
    monkeypatch.setattr(cli.bench, "free_memory", lambda: 2 * 5 * 4 * 1024 - 1)
    fails_with("argument --size: 1k takes 0.0 GiB of memory", bench, capsys)
    monkeypatch.setattr(cli.bench, "free_memory", lambda: 24 << 30)
    call = lambda: cli.main(["bench", "--size", "1k,16G"])
    fails_with("16G takes 640.0 GiB of memory, and there are 24.0", call, capsys)


def test_how_much_memory_there_is(monkeypatch, tmp_path):
    told = tmp_path / "meminfo"
    told.write_text("MemTotal: 64 kB\nMemAvailable:      16 kB\nCached: 8 kB\n")
    monkeypatch.setattr(cli.bench, "MEMORY", told)
    monkeypatch.setattr(cli.bench.host, "memory", lambda: iter([1 << 20]))
    assert cli.bench.free_memory() == 16 << 10
    told.unlink()
    assert cli.bench.free_memory() == 1 << 20
    monkeypatch.setattr(cli.bench.host, "memory", lambda: iter([]))
    assert cli.bench.free_memory() == float("inf")


def test_peers_that_could_not_be_measured():
    case = Case.parse("relu-fresh-float32-1k")
    ours = Result(case, "fastrelu", error="no luck")
    other = result_of("numpy", 1e-6)
    _, operation, row, _ = cli.bench.bench_table([[ours, other]], 80)
    assert operation == "relu fresh"
    assert row.split() == ["1k", "error", "-"]
    assert cli.bench.times_ours(Result(case, "numpy"), other) == "-"


def test_an_interrupted_benchmark_without_a_row(monkeypatch, capsys):
    interrupted = type("Team", (Team,), {"ends": KeyboardInterrupt})
    monkeypatch.setattr(cli.bench, "Team", interrupted)
    assert bench() == 128 + signal.SIGINT
    assert capsys.readouterr().out == ""


def fails_with(message, call, capsys):
    """The call ends the process with one line that says so"""
    with pytest.raises(SystemExit) as ended:
        call()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_dtype_that_is_not_installed(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: (name != "ml_dtypes" and find(name)) or None,
    )
    fails_with("ml_dtypes", lambda: bench("--dtype", "bfloat16"), capsys)


def test_a_peer_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(NumExpr, "modules", ("no_such_module",))
    call = lambda: cli.main(["bench", "--peers", "numexpr"])
    fails_with("no_such_module is not installed", call, capsys)


def test_a_bar_counts_the_cases(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with cli.bench.countdown(2) as show:
        show("the first")
        show("the second")
    text = re.sub(r"\x1b\[[?\d;]*\w", "", sys.stderr.getvalue())
    assert "1/2 the second" in text


def test_an_interrupt_where_there_is_nothing_to_keep(monkeypatch, capfd):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    cli.interrupts.leave(signal.SIGINT, None)
    assert ended == [128 + signal.SIGINT]
    assert capfd.readouterr().err.strip() == "fastrelu: interrupted"


# train --------------------------------------------------------------------------------


def train(*arguments):
    pytest.importorskip("sklearn")
    return cli.main(["train", "--epochs", "1", *map(str, arguments)])


def test_a_picture_that_cannot_be_written_in_the_end(monkeypatch, tmp_path, capsys):
    def full(path, history):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli.training, "WIDTHS", (16, 8))
    monkeypatch.setattr(cli.train, "draw", full)
    file = tmp_path / "curves.png"
    file.write_bytes(b"what was there")
    with pytest.raises(SystemExit) as ended:
        train("--plot", file)
    assert ended.value.code == 2
    assert "No space left on device" in capsys.readouterr().err
    assert file.read_bytes() == b"what was there"


def test_an_interrupt_before_the_first_epoch_is_done(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli.training, "WIDTHS", (16, 8))

    @contextlib.contextmanager
    def interrupted():
        event = threading.Event()
        event.set()
        yield event

    monkeypatch.setattr(cli.train, "deferred_interrupt", interrupted)
    assert train("--plot", tmp_path / "curves.png") == 128 + signal.SIGINT
    output = capsys.readouterr().out
    assert "Interrupted in epoch 1 of 1" in output
    assert "there is nothing to draw" in output
    assert re.search(r"2 +8 +- +- +\d", output)  # the second layer, without an epoch
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rate", ["fast", "-1", "inf"])
def test_a_learning_rate_that_is_none(rate, capsys):
    call = lambda: cli.main(["train", "--learning-rate", rate])
    fails_with("expected a positive number", call, capsys)


# The process --------------------------------------------------------------------------


def test_no_command_shows_the_commands(capsys):
    assert cli.main([]) == 0
    output, errors = capsys.readouterr()
    assert output.startswith("usage: fastrelu")
    assert f"\n{fastrelu.__doc__}\n" in output
    assert all(f"    {command} " in output for command in ("train", "bench", "info"))
    assert errors == ""


def test_an_import_runs_nothing():
    before = signal.getsignal(signal.SIGINT)
    importlib.import_module("fastrelu.__main__")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_system_without_broken_pipes():
    script = (
        "import runpy, signal, sys; del signal.SIGPIPE; sys.argv[1:] = ['--version']"
    )
    run = "; runpy.run_module('fastrelu', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", script + run], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("fastrelu ")


@pytest.fixture
def handlers():
    """What answers signals, which is put back"""
    numbers = [signal.SIGINT, getattr(signal, "SIGPIPE", signal.SIGINT)]
    before = {number: signal.getsignal(number) for number in numbers}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_script_does_what_the_module_does(handlers, monkeypatch):
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    module, name = project["project"]["scripts"]["fastrelu"].split(":")
    script = getattr(importlib.import_module(module), name)
    assert script is process.run
    monkeypatch.setattr(process, "main", lambda: 7)
    assert script() == 7
    assert signal.getsignal(signal.SIGINT) is cli.interrupts.leave
    assert {*map(signal.getsignal, handlers)} <= {cli.interrupts.leave, signal.SIG_DFL}


@pytest.mark.parametrize(
    ("argv", "all_of_it", "expected"),
    [
        (["-m", "train"], ["python", "-u", "-m", "fastrelu", "train"], True),
        (["-m"], ["python", "-mfastrelu"], True),
        (["-m"], ["python", "-m", "fastrelu.cli.peers.worker"], False),
        (["-m", "fastrelu"], ["python", "-m", "other", "fastrelu"], False),
        (["/usr/bin/fastrelu"], ["python", "/usr/bin/fastrelu"], True),
        (["fastrelu.exe", "info"], ["fastrelu.exe", "info"], True),
        (["train.py", "-m", "fastrelu"], ["python", "train.py"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_who_imports_the_package(argv, all_of_it, expected):
    assert _command.is_command(argv, all_of_it) is expected


def test_an_interrupt_of_the_imports_ends_the_process(handlers):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=_command.end_on_interrupt)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    _command.end_on_interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _command.end_on_interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
