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
            result.seconds = [seconds]
        results[-1].error = "no luck"
        return results


def bench(*arguments):
    return cli.main(["bench", "--peers", "numpy", "--size", "1k", *arguments])


def test_a_table_shows_losses_and_errors(monkeypatch, capsys):
    monkeypatch.setattr(cli.bench, "Team", Team)
    assert bench() == 1
    output, errors = capsys.readouterr()
    rows = [re.split(r"  +", line) for line in output.splitlines()[:2]]
    assert rows[0] == ["operation", "size", "fastrelu", "GB/s", "numpy", "c", "d", "e"]
    assert rows[1] == (
        ["relu fresh", "1k", "2.00 ms", "0.0", "< 0.50x", "2.5x", "15x", "error"]
    )
    assert "fastrelu bench: e, relu-fresh-float32-1k: no luck" in errors


def test_peers_that_could_not_be_measured(monkeypatch, capsys):
    case = Case.parse("relu-fresh-float32-1k")
    ours = Result(case, "fastrelu", error="no luck")
    other = Result(case, "numpy", seconds=[1e-6])
    _, row, *_ = cli.bench.bench_table([[ours, other]])
    assert row.split() == ["relu", "fresh", "1k", "error", "-"]
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

    monkeypatch.setattr(cli.train, "draw", full)
    file = tmp_path / "curves.png"
    file.write_bytes(b"what was there")
    with pytest.raises(SystemExit) as ended:
        train("--plot", file)
    assert ended.value.code == 2
    assert "No space left on device" in capsys.readouterr().err
    assert file.read_bytes() == b"what was there"


def test_an_interrupt_before_the_first_epoch_is_done(monkeypatch, tmp_path, capsys):
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
