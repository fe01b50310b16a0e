"""The command line, run as users run it."""

import contextlib
import itertools
import os
import re
import signal
import sys
import types

import numpy as np
import pytest
from conftest import PATIENCE, run_command, started

from fastrelu import nn
from fastrelu.cli import main, parser, training
from fastrelu.cli.train import draw
from fastrelu.cli.training import Epoch, Run, load_digits
from fastrelu.cpu import host

pytest.importorskip("sklearn")
pytest.importorskip("rich")
Figure = pytest.importorskip("matplotlib.figure").Figure

COMMAND = [sys.executable, "-m", "fastrelu"]
# A file gets no control characters, not even for FORCE_COLOR.
ENVIRONMENT = {**os.environ, "FORCE_COLOR": "1"}

# Layers of a network that learns in a moment, and how fast it may.
WIDTHS = 64, 32, 32
RATE = "0.05"


def call(*arguments, cwd):
    return run_command([*COMMAND, *arguments], cwd=cwd, env=ENVIRONMENT)


@pytest.fixture
def small(monkeypatch, capsys):
    """Train the small network in this process; return what was printed"""
    monkeypatch.setattr(training, "WIDTHS", WIDTHS)

    def train(*arguments, status=0):
        assert main(["train", "--learning-rate", RATE, *arguments]) == status
        return capsys.readouterr()

    return train


def rows_of(output):
    """The rows of the table of layers"""
    rows = [line.split() for line in output.splitlines()]
    return [row for row in rows if len(row) >= 5 and row[0].isdecimal()]


def accuracy_of(output):
    return float(output.partition("Test accuracy ")[2].partition("%")[0])


def test_a_short_run(tmp_path):
    done = call("train", "--epochs", "3", "--plot", "curves.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    epochs = [line for line in done.stdout.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 3
    assert accuracy_of(done.stdout) > 85
    assert "slope" not in done.stdout
    assert "NumPy" in done.stdout
    rows = rows_of(done.stdout)
    units = [(i, 1024 if i <= 5 else 512) for i in range(1, 14)]
    assert [(int(layer), int(n)) for layer, n, *_ in rows] == units
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    # Rectified numbers of either sign: about half of them, and few units for ever.
    assert all(30 < float(inactive.rstrip("%")) < 70 for _, _, inactive, *_ in rows)
    dead = sum(int(dead) for _, _, _, dead, _ in rows)
    assert epochs[-1].endswith(f" dead {dead}")
    assert dead < 1000


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "prelu"])
def test_each_activation_learns(activation, small):
    output = small("--activation", activation, "--epochs", "3").out
    assert accuracy_of(output) > 85
    slopes = [float(slope) for *_, slope in rows_of(output)]
    if activation == "prelu":
        assert all(slope != 0.25 and abs(slope) < 1 for slope in slopes)
    else:
        assert "slope" not in output
    assert [int(units) for _, units, *_ in rows_of(output)] == list(WIDTHS)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "prelu"])
def test_what_is_told_of_units(activation, monkeypatch):
    """Where nothing is learned, every epoch is one look at the training images."""
    monkeypatch.setattr(training, "WIDTHS", WIDTHS)
    options = ["--activation", activation, "--learning-rate", "1e-30", "--epochs", "2"]
    run = Run(parser().parse_args(["train", *options]), load_digits(0))
    for layer in run.model.layers[::2]:
        layer.bias.value[:3] = -1e3
    list(run)
    h, inactive = run.digits.train_x, []
    for layer in run.model.layers:
        if isinstance(layer, nn.Activation):
            inactive.append((h <= 0).mean())
        h = layer.forward(h, training=False)
    dead = [sum(units) for units in nn.dead_units(run.model, run.digits.train_x)]
    assert min(dead) >= 3
    assert len(run.history) == 2
    for epoch in run.history:
        np.testing.assert_allclose(epoch.inactive, inactive, atol=1e-4)
        assert epoch.dead == dead


def test_the_picture_shows_every_epoch(monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    history = [
        Epoch(2.0, 0.3, 2.5, 0.2, [0.5, 0.6, 0.7], [0, 1, 2]),
        Epoch(1.0, 0.6, 1.5, 0.4, [0.4, 0.5, 0.6], [3, 4, 5]),
    ]
    draw("curves.png", history)
    panels = {
        axis.get_ylabel(): [line.get_ydata().tolist() for line in axis.lines]
        for axis in drawn[0].axes
    }
    assert panels == {
        "loss": [[2.0, 1.0], [2.5, 1.5]],
        "accuracy": [[0.3, 0.6], [0.2, 0.4]],
        "inactive outputs": [[0.5, 0.4], [0.6, 0.5], [0.7, 0.6]],
        "dead units": [[0, 3], [1, 4], [2, 5]],
    }
    names = [text.get_text() for text in drawn[0].axes[-1].get_legend().get_texts()]
    assert names == ["layer 1", "layer 3"]


def test_the_same_seed_gives_the_same_run(monkeypatch):
    monkeypatch.setattr(training, "WIDTHS", WIDTHS)

    def scores(seed):
        options = ["train", "--seed", str(seed), "--threads", "1"]
        run = Run(parser().parse_args(options), load_digits(seed))
        return np.concatenate(list(itertools.islice(map(np.copy, run), 3)))

    np.testing.assert_array_equal(scores(3), scores(3))
    assert (scores(3) != scores(4)).any()


class Blas:
    """A library of matrix products, and how long steps take with its threads"""

    num_threads = 4

    def __init__(self, monkeypatch, **seconds):
        self.now, self.seconds = 0.0, seconds
        monkeypatch.setattr(training.time, "perf_counter", lambda: self.now)

    def set_num_threads(self, number):
        self.number = number

    def steps(self, threads, count):
        """The threads that each of some steps was given"""
        given = []
        threads.libraries = [self]
        for _ in range(count):
            with threads.step():
                given.append(self.number)
                self.now += self.seconds["one" if self.number == 1 else "all"]
        return given


def threads_of(monkeypatch, number=None):
    import threadpoolctl

    class Controller:
        def select(self, user_api):
            assert user_api == "blas"
            return types.SimpleNamespace(lib_controllers=[Blas(monkeypatch)])

    monkeypatch.setattr(threadpoolctl, "ThreadpoolController", Controller)
    return training.Threads(number)


@pytest.mark.parametrize(("seconds", "best"), [((2, 1), 4), ((1, 2), 1)])
def test_products_take_the_threads_that_make_steps_quicker(seconds, best, monkeypatch):
    threads = threads_of(monkeypatch)
    blas = Blas(monkeypatch, one=seconds[0], all=seconds[1])
    rest = [best] * threads.STEPS
    assert blas.steps(threads, 2 * (4 + len(rest))) == 2 * [1, 4, 1, 4, *rest]


def test_products_give_way_to_who_comes_later(monkeypatch):
    threads = threads_of(monkeypatch)
    blas = Blas(monkeypatch, one=2, all=1)
    assert blas.steps(threads, 6) == [1, 4, 1, 4, 4, 4]
    blas.seconds = {"one": 3, "all": 30}
    assert blas.steps(threads, 7) == [4, 1, 4, 1, 4, 1, 1]


def test_products_take_the_threads_that_were_asked_for(monkeypatch):
    threads = threads_of(monkeypatch, 3)
    assert threads.libraries[0].number == 3
    blas = Blas(monkeypatch)
    blas.number = None
    threads.libraries = [blas]
    with threads.step():
        assert blas.number is None


WRONG = {
    "--threads 0": "0",
    "--activation swish": "swish",
    "--epochs 0": "--epochs",
    "--epochs ten": "--epochs",
    "--batch-size -1": "--batch-size",
    "--batch-size 100000": "--batch-size",
    "--learning-rate nan": "--learning-rate",
    "--learning-rate 0": "--learning-rate",
    "--seed -1": "--seed",
    "--plot no/such/folder/curves.png": "--plot",
    "--plot curves.txt": "--plot",
    "--plot curves.png --epochs 0": "--epochs",
    "--depth 3": "--depth",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_a_wrong_argument_is_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["train", *arguments.split()])
    assert ended.value.code == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert len(errors.splitlines()) == 1
    assert "error" in errors
    assert WRONG[arguments] in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("affinity", [True, False])
def test_no_more_threads_than_processors(affinity, monkeypatch, capsys):
    """OpenBLAS's would spin for each other"""
    if affinity:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 5, 7}, raising=False)
    else:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(host, "_limits", lambda *_: ["max"])
    assert parser().parse_args(["train", "--threads", "3"]).threads == 3
    for argument, said in (("--threads=4", "1 to 3, got '4'"), ("--help", "use, 3")):
        with pytest.raises(SystemExit):
            main(["train", argument])
        assert said in " ".join("".join(capsys.readouterr()).split())
    monkeypatch.setattr(host, "_limits", lambda *_: ["150000 100000"])
    with pytest.raises(SystemExit):
        main(["train", "--threads", "3"])
    assert "1 to 2, got '3'" in capsys.readouterr().err


def test_a_run_that_diverges_says_so(small):
    output = small("--learning-rate", "1e9", "--epochs", "2", status=1)
    assert "diverged" in output.err
    assert len(output.err.splitlines()) == 1


def test_a_missing_part_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(SystemExit) as ended:
        main(["train"])
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert len(output.err.splitlines()) == 1
    assert 'pip install "fastrelu[demo]"' in output.err


def no_device(*_, **__):
    raise RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected\nmore")


NO_GPU = {
    "no CuPy": (None, "cupy.*pip install .*cupy"),
    "no device": (types.SimpleNamespace(ones=no_device), "cudaErrorNoDevice: no CUDA-"),
}


@pytest.mark.parametrize("what", NO_GPU)
def test_a_machine_without_a_gpu_is_one_line(what, monkeypatch, capsys):
    module, message = NO_GPU[what]
    monkeypatch.setitem(sys.modules, "cupy", module)  # None: it cannot be imported
    with pytest.raises(SystemExit) as exit:
        main(["train", "--device", "cuda"])
    assert exit.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert "--device" in line
    assert re.search(message, line)


def small_command(*arguments, before=""):
    """The command, after a statement in its process, with the small network"""
    source = f"""
import os, runpy, signal, sys
import sklearn.datasets
from fastrelu.cli import training
training.WIDTHS = {WIDTHS}
{before}
sys.argv[1:] = ["train", "--learning-rate", "{RATE}", *{arguments}]
runpy.run_module("fastrelu", run_name="__main__")
"""
    return [sys.executable, "-c", source]


posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


@posix
def test_ctrl_c_before_training_is_one_line(tmp_path):
    interrupt = "lambda **_: os.kill(os.getpid(), signal.SIGINT)"
    before = f"sklearn.datasets.load_digits = {interrupt}"
    done = run_command(small_command(before=before), cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 130
    assert done.stdout == ""
    assert done.stderr == "fastrelu: interrupted\n"


SCRIPT = """
import sys
from fastrelu.__main__ import run
sys.exit(run())
"""


@posix
@pytest.mark.parametrize("module", ["fastrelu._command", "numpy.", "numba."])
@pytest.mark.parametrize("way", ["module", "script"])
def test_ctrl_c_while_modules_are_imported_is_silent(way, module, tmp_path):
    script = tmp_path / "fastrelu"
    script.write_text(SCRIPT)
    what = ["-m", "fastrelu"] if way == "module" else [str(script)]
    command = [sys.executable, "-X", "importtime", *what, "info"]
    with started(command, cwd=tmp_path, env=ENVIRONMENT) as process:
        next(line for line in process.stderr if module in line)
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
        assert process.stdout.read() == ""
    assert process.returncode == -signal.SIGINT
    assert all(line.startswith("import time:") for line in errors.splitlines())


def read_until(process, start):
    for line in process.stdout:
        if line.startswith(start):
            return
    pytest.fail(f"no line starts with {start!r}")


def start(cwd, *arguments):
    command = small_command("--epochs", "2000", *arguments)
    return started(command, cwd=cwd, env=ENVIRONMENT)


@posix
def test_ctrl_c_ends_with_what_was_learned(tmp_path):
    with start(tmp_path, "--plot", "curves.png") as process:
        read_until(process, "epoch    2")
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "Interrupted in epoch" in output
    assert "Test accuracy" in output
    assert errors == ""
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@posix
def test_a_reader_may_leave(tmp_path):
    with start(tmp_path) as process:
        read_until(process, "epoch    1")
        process.stdout.close()
        assert process.wait(timeout=PATIENCE) == -signal.SIGPIPE
        assert process.stderr.read() == ""


FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


@pytest.mark.parametrize("command", [["train"], ["info"], ["--help"]])
@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("&-", "standard output is closed"),
        pytest.param("/dev/full", "No space left on device", marks=FULL),
    ],
)
@posix
def test_output_that_cannot_be_written(command, to, said, tmp_path):
    """One line, and no second one when the process ends"""
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "PYTHONUNBUFFERED"}
    shell = ["sh", "-c", f'"$@" >{to}', "sh", *COMMAND, *command]
    done = run_command(shell, cwd=tmp_path, env=environment)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("fastrelu: error: ")
    assert line.endswith(said)


@posix
@pytest.mark.parametrize("columns", [50, 120])
def test_a_terminal_gets_a_bar(tmp_path, columns):
    import pty

    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns)}
    command = small_command("--epochs", "1")
    pipes = {"stdout": theirs, "stderr": None}
    with started(command, cwd=tmp_path, env=environment, **pipes) as process:
        os.close(theirs)
        output = b""
        # Linux answers with an error where the other end is closed.
        with contextlib.suppress(OSError):
            while part := os.read(ours, 4096):
                output += part
    os.close(ours)
    assert process.returncode == 0
    frames = re.split(r"[\r\n]+", re.sub(r"\x1b\[[?\d;]*\w", "", output.decode()))
    assert max(map(len, frames)) <= columns
    bars = [frame for frame in frames if frame.startswith("epoch 1/1 ━")]
    assert "accuracy" in bars[-1]


def test_info(tmp_path):
    done = call("info", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("fastrelu", "NumPy", "Numba", "threads", "CUDA"):
        assert word in done.stdout
