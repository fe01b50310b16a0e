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

from fastrelu.cli import main, parser
from fastrelu.cli.training import Run, load_digits

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

COMMAND = [sys.executable, "-m", "fastrelu"]
# A file gets no control characters, not even for FORCE_COLOR.
ENVIRONMENT = {**os.environ, "FORCE_COLOR": "1"}


def call(*arguments, cwd):
    return run_command([*COMMAND, *arguments], cwd=cwd, env=ENVIRONMENT)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "prelu"])
def test_a_short_run(activation, tmp_path):
    done = call("train", "--activation", activation, "--epochs", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    epochs = [line for line in done.stdout.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 3
    accuracy = float(done.stdout.partition("Test accuracy ")[2].partition("%")[0])
    assert accuracy > 85
    assert ("slope" in done.stdout) == (activation == "prelu")
    assert "NumPy" in done.stdout
    rows = [line.split()[:2] for line in done.stdout.splitlines()]
    assert all([str(i), "1024" if i <= 5 else "512"] in rows for i in range(1, 14))


def test_the_same_seed_gives_the_same_run():
    def scores(seed):
        options = ["train", "--seed", str(seed)]
        run = Run(parser().parse_args(options), load_digits(seed))
        return np.concatenate(list(itertools.islice(map(np.copy, run), 3)))

    np.testing.assert_array_equal(scores(3), scores(3))
    assert (scores(3) != scores(4)).any()


def test_the_plot_is_a_picture(tmp_path):
    done = call("train", "--epochs", "1", "--plot", "curves.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


WRONG = {
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
def test_a_wrong_argument_is_one_line(arguments, tmp_path):
    done = call("train", *arguments.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "error" in done.stderr
    assert WRONG[arguments] in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_diverges_says_so(tmp_path):
    done = call("train", "--learning-rate", "1e6", "--epochs", "2", cwd=tmp_path)
    assert done.returncode == 1
    assert "diverged" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_part_is_one_line(tmp_path):
    done = run_with("sys.modules['rich'] = None", tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert 'pip install "fastrelu[demo]"' in done.stderr


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


def run_with(statement, cwd):
    """Run the training after a statement in the same process."""
    source = f"""
import os, runpy, signal, sys
import sklearn.datasets
{statement}
sys.argv[1:] = ["train", "--epochs", "1"]
runpy.run_module("fastrelu", run_name="__main__")
"""
    return run_command([sys.executable, "-c", source], cwd=cwd, env=ENVIRONMENT)


posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


@posix
def test_ctrl_c_before_training_is_one_line(tmp_path):
    interrupt = "lambda **_: os.kill(os.getpid(), signal.SIGINT)"
    done = run_with(f"sklearn.datasets.load_digits = {interrupt}", tmp_path)
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
    command = [*COMMAND, "train", "--epochs", "2000", *arguments]
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


@posix
@pytest.mark.parametrize("columns", [50, 120])
def test_a_terminal_gets_a_bar(tmp_path, columns):
    import pty

    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns)}
    command = [*COMMAND, "train", "--epochs", "1"]
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
