"""The command line, run as users run it."""

import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

COMMAND = [sys.executable, "-m", "fastrelu"]
# The threads of the matrix products spin, which on a busy machine takes minutes.
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def call(*arguments, cwd):
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=ENVIRONMENT,
        check=False,
    )


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "prelu"])
def test_a_short_run(activation, tmp_path):
    done = call("train", "--activation", activation, "--epochs", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    epochs = [line for line in done.stdout.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 4
    accuracy = float(done.stdout.partition("Test accuracy ")[2].partition("%")[0])
    assert accuracy > 85
    assert ("slope" in done.stdout) == (activation == "prelu")
    assert "NumPy" in done.stdout
    rows = [line.split()[:2] for line in done.stdout.splitlines()]
    assert all([str(i), "1024" if i <= 5 else "512"] in rows for i in range(1, 14))


def test_the_same_seed_gives_the_same_run(tmp_path):
    first, again, other = (
        call("train", "--epochs", "1", "--seed", seed, cwd=tmp_path).stdout
        for seed in ("3", "3", "4")
    )
    line = first.partition("epoch ")[2].partition("\n")[0]
    assert line in again
    assert line not in other


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


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_ends_with_what_was_learned(tmp_path):
    with subprocess.Popen(
        [*COMMAND, "train", "--epochs", "2000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=ENVIRONMENT,
    ) as process:
        for line in process.stdout:
            if line.startswith("epoch    2"):
                break
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert time.monotonic() - start < 20
    assert process.returncode == 130
    assert "Interrupted in epoch" in output
    assert "Test accuracy" in output
    assert errors == ""


def test_info(tmp_path):
    done = call("info", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("fastrelu", "NumPy", "Numba", "threads", "layer", "CUDA"):
        assert word in done.stdout
