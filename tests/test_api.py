"""What the package shows, and what importing and calling it costs."""

import doctest
import importlib
import importlib.metadata
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from reference import assert_same

import fastrelu as F
from fastrelu import activations

PACKAGE = Path(F.__file__).parent
CHECKOUT = Path(__file__).parents[1]
README = (CHECKOUT / "README.md").read_text()

# fmt: off
SIGNATURES = {
    "relu":
        lambda x, /, inplace=False, *, out=None, return_mask=False: ...,
    "leaky_relu":
        lambda x, /, negative_slope=0.01, inplace=False, *, out=None,
        return_mask=False: ...,
    "prelu":
        lambda x, /, weight, *, axis=1, inplace=False, out=None: ...,
    "relu_backward":
        lambda grad_output, saved, /, *, inplace=False, out=None: ...,
    "leaky_relu_backward":
        lambda grad_output, saved, /, negative_slope=0.01, *, inplace=False,
        out=None: ...,
    "prelu_backward":
        lambda grad_output, x, /, weight, *, axis=1, inplace=False, out=None: ...,
    "relu6":
        lambda x, /, inplace=False, *, out=None, return_mask=False: ...,
    "relu6_backward":
        lambda grad_output, saved, /, *, inplace=False, out=None: ...,
    "squared_relu":
        lambda x, /, inplace=False, *, out=None: ...,
    "squared_relu_backward":
        lambda grad_output, x, /, *, inplace=False, out=None: ...,
    "threshold":
        lambda x, /, threshold, value, inplace=False, *, out=None,
        return_mask=False: ...,
    "threshold_backward":
        lambda grad_output, saved, /, threshold, *, inplace=False, out=None: ...,
    "rrelu":
        lambda x, /, lower=1/8, upper=1/3, training=False, inplace=False, *,
        rng=None, out=None: ...,
    "rrelu_backward":
        lambda grad_output, x, /, slopes, *, inplace=False, out=None: ...,
}
# fmt: on


def parameters(function):
    values = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in values]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    assert parameters(getattr(F, name)) == parameters(SIGNATURES[name])


def test_all():
    assert F.__all__ == sorted(F.__all__)
    assert {*SIGNATURES, "Mask"} <= {*F.__all__}
    modules = {name for name, value in vars(F).items() if inspect.ismodule(value)}
    public = {name for name in vars(F) if not name.startswith("_")}
    assert public - modules == {*F.__all__} - modules - {"__version__"}
    assert {"nn", *public} <= {*dir(F)}


@pytest.mark.parametrize("name", sorted({*F.__all__} - {"__version__"}))
def test_docstrings(name):
    public = getattr(F, name)
    assert inspect.getdoc(public)
    if inspect.isfunction(public):
        assert public.__module__.startswith("fastrelu")
        assert public.__qualname__ == name
    if name in SIGNATURES:
        assert "Examples\n--------\n>>> " in inspect.getdoc(public)


@pytest.mark.parametrize("name", ["activations", "mask", "nn"])
def test_examples(name):
    """They run as they are copied, with their own imports."""
    module = importlib.import_module(f"fastrelu.{name}")
    failed, tried = doctest.testmod(module, globs={})
    assert tried
    assert not failed


def test_calls_written_for_pytorch():
    x = np.array([-1.0, 2.0])
    for function, given in ((F.relu, (True,)), (F.leaky_relu, (0.2, True))):
        expected = function(x, *given[:-1])
        y = x.copy()
        assert function(y, *given) is y
        assert_same(y, expected)


def test_version():
    try:
        assert F.__version__ == importlib.metadata.version("fastrelu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fastrelu is not installed here")


@pytest.fixture(scope="module")
def project():
    """What pyproject.toml says of the package"""
    return tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]


def test_the_python_versions(project):
    """The same ones for installers, for an index and for readers."""
    named = re.findall(r"Python :: 3\.(\d+)", "\n".join(project["classifiers"]))
    oldest, newest = int(named[0]), int(named[-1])
    assert list(map(int, named)) == list(range(oldest, newest + 1))
    assert project["requires-python"] == f">=3.{oldest}"
    assert f"**Python** 3.{oldest} to 3.{newest}" in README
    for name in project["dependencies"]:
        library, _, version = name.partition(">=")
        assert f"{library} {version} or newer" in README.lower()


def test_the_extras(project):
    installing = README.partition("## Installing")[2].partition("\n## ")[0]
    named = re.findall(r"fastrelu\[(\w+)\]", installing)
    assert sorted(named) == sorted(project["optional-dependencies"])


def test_the_changelog_has_this_version():
    (first, *_) = re.findall(
        r"^## (\S+),", (CHECKOUT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert first == F.__version__


@pytest.mark.parametrize(
    "page", ["README.md", ".github/CONTRIBUTING.md", ".github/SECURITY.md"]
)
def test_what_a_page_links_to_is_there(page):
    links = re.findall(r"\]\(([^)#:]+)\)", (CHECKOUT / page).read_text())
    missing = [
        link for link in links if not (CHECKOUT / page).parent.joinpath(link).exists()
    ]
    assert missing == []
    assert page != "README.md" or len(links) > 4


def test_an_output_does_not_tell_of_every_activation():
    rows = activations.ACTIVATIONS
    assert not rows["squared_relu"].output_tells()
    assert rows["relu"].output_tells()


def test_a_mask_says_what_it_is():
    mask = F.Mask(np.zeros(3, np.uint8), (4, 5))
    assert repr(mask) == "Mask(shape=(4, 5), nbytes=3)"


# Other processes

CALL_ALL = """
import numpy as np
import fastrelu as F

x, g, w = -np.ones((2, 3), np.float32), np.ones((2, 3), np.float32), np.ones(3, np.float32)
for function in (F.relu, F.leaky_relu):
    y, mask = function(x, return_mask=True)
    function(x, out=y)
    function(y, inplace=True)
assert (F.prelu(x, w) == -1).all()
for saved in (x, mask):
    assert (F.relu_backward(g, saved) == 0).all()
    assert (F.leaky_relu_backward(g, saved, 0.5) == 0.5).all()
dx, dw = F.prelu_backward(g, x, w)
assert (dx == 1).all()
assert (dw == -2).all()
assert F.relu(x.astype(np.int8)).max() == 0
"""
CALL_ONE = """
import numpy as np
import fastrelu as F

assert F.relu(np.array([-1.0, 2.0])).tolist() == [0.0, 2.0]
"""
COUNT_COMPILATIONS = f"""
from numba.core import event

with event.install_recorder("numba:compile") as recorder:
{"".join(f"    {line}" for line in CALL_ALL.splitlines(keepends=True))}
print(len(recorder.buffer))
"""
OTHERS = (
    "torch", "cupy", "dask", "sklearn", "matplotlib", "rich", "ml_dtypes", "numba.cuda"
)  # fmt: skip
NAME_LOADED = f"""
import sys
import fastrelu

print(*(name for name in {OTHERS} if name in sys.modules))
"""


LOAD_NETWORKS = """
import sys
import fastrelu

assert "nn" in dir(fastrelu)
assert "fastrelu.nn" not in sys.modules
assert fastrelu.nn.ReLU() is not None
assert fastrelu.nn is sys.modules["fastrelu.nn"]
"""


def python(script, folder, home=PACKAGE.parent, **environment):
    environment = os.environ | {"PYTHONPATH": str(home)} | environment
    command = [sys.executable, "-W", "error", "-c", script]
    run = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout.strip()


def test_import_loads_no_other_library(tmp_path):
    assert python(NAME_LOADED, tmp_path) == ""


def test_networks_are_imported_when_they_are_asked_for(tmp_path):
    assert python(LOAD_NETWORKS, tmp_path) == ""


def test_a_name_that_is_none():
    with pytest.raises(AttributeError, match="'fastrelu' has no attribute 'nm'"):
        F.nm  # noqa: B018


def test_the_second_process_compiles_nothing(tmp_path):
    cache = str(tmp_path / "cache")
    counts = [
        int(python(COUNT_COMPILATIONS, tmp_path, NUMBA_CACHE_DIR=cache)) for _ in "12"
    ]
    assert counts[0] > 0
    assert counts[1] == 0


def test_no_folder_for_the_cache(tmp_path):
    # Files where folders would have to be stop even a user who may write anywhere.
    package = tmp_path / "site" / "fastrelu"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [package, *(p for p in package.rglob("*") if p.is_dir())]:
        (folder / "__pycache__").touch()
    file = tmp_path / "file"
    file.touch()
    names = ("NUMBA_CACHE_DIR", "HOME", "USERPROFILE", "XDG_CACHE_HOME", "LOCALAPPDATA")
    nowhere = dict.fromkeys(names, str(file / "below"))
    assert python(CALL_ONE, tmp_path, home=package.parent, **nowhere) == ""
