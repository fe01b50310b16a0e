"""What the README says to do is done: its recipe on a copy, its first lines, its matrix."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ACTIVATIONS, run_command

import fastrelu as F
from fastrelu import cpu

TESTS = Path(__file__).parent
NAME = "clipped_relu"

# What the recipe promises of an activation that is added so.
PROMISES = """
import types

import numpy as np
import pytest

import fastrelu as F
from fastrelu import activations, cpu

assert cpu.engine()[0] == ENGINE
row = activations.ACTIVATIONS[NAME]
forward, backward = getattr(F, NAME), getattr(F, f"{NAME}_backward")
assert {NAME, f"{NAME}_backward"} <= {*F.__all__}
assert (row.forward, row.backward) == (forward, backward)

x = np.array([[-1, np.nan, 3], [6, 6.5, -0.0]], np.float32)
g = np.full_like(x, np.inf)
expected = np.array([[0, np.nan, 3], [6, 6, 0]], np.float32)
y = forward(x, 6)
np.testing.assert_array_equal(y, expected)
assert not np.signbit(y).any()
y, mask = forward(x.T, 6.0, return_mask=True)
np.testing.assert_array_equal(y, expected.T)
for saved in (x.T, y, mask):
    assert backward(g.T, saved, 6).T.tolist() == [[0, 0, np.inf], [0, 0, 0]]

calls = [getattr(activations, f"_{NAME}_{way}").call for way in ("forward", "backward")]
quick = [isinstance(call, types.BuiltinFunctionType) for call in calls]
assert quick == [ENGINE == "fast"] * 2

_, other = F.relu(x, return_mask=True)
with pytest.raises(ValueError, match=f"a mask of {row.spec.predicate}, got .* x > 0"):
    backward(g, other, 6)
with pytest.raises(ValueError, match=f"a mask of x > 0, got .* {row.spec.predicate}"):
    F.relu_backward(g.T, mask)
with pytest.raises(ValueError, match="^ceiling must be finite"):
    forward(x, np.inf)
with pytest.raises(TypeError, match="^ceiling must be a real number"):
    backward(g, x, "6")
"""

# Of the grid, what needs each kind of loop, if not for every type.
GRID = {
    "fast": "(float32 or may_be_saved or another_layout) and not past_the_cache"
    " or float16 and every_type or bends",
    "portable": "float32 and (every_type or test_mask or bends) or may_be_saved",
}


def section(heading):
    text = (TESTS.parent / "README.md").read_text()
    _, found, rest = text.partition(f"\n## {heading}\n")
    assert found, heading
    return rest.partition("\n## ")[0]


def blocks_of_code(heading):
    found = re.findall(
        r"^```(?:python)?\n([^`].*?)^```$", section(heading), re.MULTILINE | re.DOTALL
    )
    assert found, heading
    return found


def insert(path, mark, more, *, before=False):
    first, found, last = path.read_text().partition(mark)
    assert found, mark
    path.write_text("".join((first, *((more, mark) if before else (mark, more)), last)))


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """A copy of the package and the tests, with the recipe's edits and no others"""
    folder = tmp_path_factory.mktemp("recipe")
    left_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(F.__file__).parent, folder / "fastrelu", ignore=left_out)
    shutil.copytree(TESTS, folder / "tests", ignore=left_out)
    shutil.copy(TESTS.parent / "pyproject.toml", folder)
    block, names, row, definition = blocks_of_code("Adding an activation")
    catalogue = folder / "fastrelu" / "activations.py"
    assert NAME not in catalogue.read_text()
    insert(catalogue, "# The table ---", f"{block}\n\n", before=True)
    insert(catalogue, "\n__all__ = [\n", names)
    insert(catalogue, "\nACTIVATIONS = {\n", row)
    insert(folder / "tests" / "reference.py", "\nDEFINITIONS = {\n", definition)
    return folder


@pytest.mark.parametrize(
    "engine", ["fast", pytest.param("portable", marks=pytest.mark.long)]
)
def test_a_new_activation(edited, engine):
    if engine == "fast" and not cpu.is_fast():
        pytest.skip("the fast loops do not run here")
    known = f"NAME, ENGINE = {NAME!r}, {engine!r}\n"
    grid = ["tests/test_values.py", "-k", f"{NAME} and ({GRID[engine]})"]
    environment = {"PYTHONPATH": str(edited), "FASTRELU_ENGINE": engine}
    for command in (["-c", known + PROMISES], ["-m", "pytest", "-q", *grid]):
        done = run_command(
            [sys.executable, "-W", "error", *command],
            cwd=edited,
            env=os.environ | environment,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\n\d+ passed, \d+ deselected in ", done.stdout), done.stdout


def test_the_first_lines():
    (lines,) = blocks_of_code("Sixty seconds")
    given = {}
    exec(lines.replace("(64, 128, 28, 28)", "(2, 128, 9, 9)"), given)  # noqa: S102
    assert given["dw"].shape == (128,)
    assert given["x"].min() == 0


def test_the_matrix():
    head, _, *rows = re.findall(
        r"^\|(.*)\|$", section("What works on what"), re.MULTILINE
    )
    columns = [name.strip() for name in head.split("|")]
    told = [[cell.strip() for cell in row.split("|")] for row in rows]
    assert len(told) > 1
    for cells in told:
        works = dict(zip(columns, cells, strict=True))
        name = works[""].partition(",")[0].strip("`")
        row = ACTIVATIONS[name]
        assert works[""] == f"`{name}`, `{name}_backward`"
        assert works["integers"] == ("signed, unsigned" if row.spec.integers else "no")
        assert (works["1-bit mask"] == "yes") == row.takes_mask
        others = {*columns[1:]} - {"integers", "1-bit mask"}
        assert {works[name] for name in others} == {"yes"}
