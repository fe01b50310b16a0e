"""Type checkers see what the functions take and return, in a user's file."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FILE = Path(__file__).parent / "typed.py"
WRONG = [
    n for n, line in enumerate(FILE.read_text().splitlines(), 1) if "# wrong" in line
]


def run(command, folder):
    shutil.copy(FILE, folder)  # away from this project's settings
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout


@pytest.mark.skipif(find_spec("mypy") is None, reason="needs mypy")
def test_mypy(tmp_path):
    output = run(["mypy", "--strict", "--no-error-summary", FILE.name], tmp_path)
    found = {
        int(line)
        for line in re.findall(r"^typed\.py:(\d+): error", output, re.MULTILINE)
    }
    assert sorted(found) == WRONG, output


@pytest.mark.skipif(find_spec("pyright") is None, reason="needs pyright")
def test_pyright(tmp_path):
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    report = json.loads(run(["pyright", "--outputjson", FILE.name], tmp_path))
    found = {
        each["range"]["start"]["line"] + 1
        for each in report["generalDiagnostics"]
        if each["severity"] == "error"
    }
    assert sorted(found) == WRONG, report


def test_what_is_right_runs(tmp_path):
    right = [line for line in FILE.read_text().splitlines() if "# wrong" not in line]
    (tmp_path / FILE.name).write_text("\n".join(right))
    runpy.run_path(tmp_path / FILE.name)
