"""The grid that the tests walk: library x dtype x shape x layout; their processes."""

import contextlib
import ctypes
import functools
import importlib.util
import inspect
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import reference

from fastrelu import activations

FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
SLOPES = ("-0.5", "-0.0", "0", "1e-30", "0.01", "1", "2")
SHAPES = {
    "0d": (),
    "empty": (0,),
    "one": (1,),
    "17": (17,),
    "3x0x2": (3, 0, 2),
    "2x3": (2, 3),
    "4x4x4x4": (4, 4, 4, 4),
    "2x3x5x7": (2, 3, 5, 7),
}
LARGE = 300_001  # elements: more than one thread's share
PAST_CACHE = 1 << 25  # bytes of one array: with another more than most caches hold


# Processes ----------------------------------------------------------------------------

PATIENCE = 600  # seconds: nothing takes so long on a busy machine; it hangs
SOON = 10  # seconds: for what is about to end by itself
os.environ["PYTHONFAULTHANDLER"] = "1"  # whoever crashes says where

# Where this is ignored, as by nohup or after a shell's &, it is in what tests start, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What the processes that tests start leave behind becomes a child of this one.
if sys.platform == "linux":
    PR_SET_CHILD_SUBREAPER = 36
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@contextlib.contextmanager
def started(command, **more):
    """A process in a group of its own, which ends with the block at the latest"""
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE) | {"text": True}
    posix = os.name == "posix"
    with subprocess.Popen(command, start_new_session=posix, **pipes | more) as process:
        try:
            yield process
        except BaseException:
            if posix and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            raise


def run_command(command, *, timeout=PATIENCE, **more):
    """What a process printed and how it ended; with it ends what it started.

    If it hangs, a note of the error says where each of these processes was.
    """
    with started(command, **more) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as hangs:
            if os.name == "posix":
                os.killpg(process.pid, signal.SIGABRT)
                hangs.add_note(process.communicate(timeout=SOON)[1])
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def words_of(number):
    return Path(f"/proc/{number}/cmdline").read_text().split("\0")


def children():
    """The states of the processes that are this one's, by number.

    Without what Python starts for locks, of Numba's threads, say, and ends by itself.
    """
    found = {}
    with contextlib.suppress(ChildProcessError):  # there is none
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
                state, parent, *_ = file.read().rpartition(")")[2].split()
                own = int(parent) == os.getpid()
                if own and "resource_tracker" not in " ".join(words_of(name)):
                    found[int(name)] = state
    return found


@pytest.fixture(autouse=True)
def no_process_is_left():
    """What a test starts has ended when the test has, or soon after."""
    if sys.platform != "linux":
        yield
        return
    before = children()
    yield
    end, left = time.monotonic() + SOON, []
    while rest := {k: v for k, v in children().items() if k not in before}:
        late = time.monotonic() > end
        for number, state in rest.items():
            if state != "Z" and late:
                left.append(words_of(number))
                os.kill(number, signal.SIGKILL)
            if state == "Z" or late:
                os.waitpid(number, 0)
        time.sleep(0.01)
    assert left == [], "processes that a test has left"


# The grid -----------------------------------------------------------------------------


class Tested(NamedTuple):
    """A row of the catalogue, whose functions leave out what they do not take"""

    row: object

    def __getattr__(self, name):
        return getattr(self.row, name)

    def forward(self, *arrays, **given):
        return self.row.forward(*arrays, **taken(self.row.forward, given))

    def backward(self, *arrays, **given):
        return self.row.backward(*arrays, **taken(self.row.backward, given))


def taken(function, given):
    """What a function takes of these keyword arguments"""
    known = inspect.signature(function).parameters
    return {name: value for name, value in given.items() if name in known}


ACTIVATIONS = {name: Tested(row) for name, row in activations.ACTIVATIONS.items()}


class Library(NamedTuple):
    """How a NumPy array becomes an array of the library, and comes back"""

    put: Callable
    get: Callable
    array_type: type


def _read_only(a):
    a = a.view()
    a.flags.writeable = False
    return a


LIBRARIES = {
    "numpy": Library(lambda a: a, lambda a: a, np.ndarray),
    "numpy-readonly": Library(_read_only, lambda a: a, np.ndarray),
}


@pytest.fixture(params=LIBRARIES)
def library(request):
    return LIBRARIES[request.param]


def dtype_of(name):
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(name)


@pytest.fixture
def dtype(request):
    return dtype_of(request.param)


# One for each kind of operands: loops and calls of the others are made of the same parts.
TYPICAL = "relu", "leaky_relu", "prelu", "threshold"


def each(*dtypes, where=lambda row: True, names=tuple(ACTIVATIONS)):
    """Run a test for every activation and each of these types that it takes"""
    pairs = [
        (name, dtype)
        for name in names
        for dtype in dtypes
        if where(ACTIVATIONS[name])
        and (dtype in FLOATS or reference.DEFINITIONS[name].integers)
    ]
    return pytest.mark.parametrize(("name", "dtype"), pairs, indirect=["dtype"])


def in_turn(name, values):
    """Run a test for each of these values as one test, whose error names the value"""

    def decorate(test):
        @functools.wraps(test)
        def run(**given):
            for value in values:
                try:
                    test(**given, **{name: value})
                except Exception as error:
                    error.add_note(f"with {name} = {value!r}")
                    raise

        signature = inspect.signature(test)
        rest = [p for p in signature.parameters.values() if p.name != name]
        run.__signature__ = signature.replace(parameters=rest)
        return run

    return decorate


def floats_here():
    """The float types that need nothing that is not installed"""
    missing = importlib.util.find_spec("ml_dtypes") is None
    return [name for name in FLOATS if not (missing and name == "bfloat16")]


class Layout(NamedTuple):
    """A window of the wanted shape on a dense array of another shape"""

    outer: Callable  # the window's shape -> the dense array's shape
    window: Callable  # (the dense array, the window's shape) -> the window


def _every(cut, ndim):
    return (..., *[cut] * ndim)  # the ellipsis keeps a 0-d array an array


def _same(shape):
    return shape


LAYOUTS = {
    "c": Layout(_same, lambda b, s: b),
    "fortran": Layout(lambda s: s[::-1], lambda b, s: b.T),
    "permuted": Layout(
        lambda s: s[1:] + s[:1], lambda b, s: np.moveaxis(b, -1, 0) if s else b
    ),
    "transposed": Layout(
        lambda s: s[:-2] + s[-2:][::-1],
        lambda b, s: b.swapaxes(-1, -2) if len(s) > 1 else b,
    ),
    "step": Layout(
        lambda s: tuple(2 * n for n in s),
        lambda b, s: b[_every(slice(None, None, 2), len(s))],
    ),
    "negative": Layout(_same, lambda b, s: b[_every(slice(None, None, -1), len(s))]),
    "offset": Layout(
        lambda s: tuple(n + 2 for n in s), lambda b, s: b[_every(slice(1, -1), len(s))]
    ),
    "broadcast": Layout(
        lambda s: tuple(min(n, 1) for n in s[:1]) + s[1:],
        lambda b, s: np.broadcast_to(b, s),
    ),
    "misaligned": Layout(_same, lambda b, s: b),
    "swapped": Layout(_same, lambda b, s: b),
}
OUT_LAYOUTS = [name for name in LAYOUTS if name not in ("broadcast", "swapped")]
GUARD = 64


def place(values, layout, dtype=None):
    """An array of this layout with these values, and the guarded memory it lies in.

    What a broadcast array repeats is the first of the values along its first axis.
    """
    outer, window = LAYOUTS[layout]
    dtype = values.dtype if dtype is None else dtype
    if layout == "swapped":
        if dtype.kind not in "iuf":
            pytest.skip(f"{dtype} has one byte order")
        dtype = dtype.newbyteorder()
    shape = outer(values.shape)
    size = 2 * GUARD + math.prod(shape)
    skew = int(layout == "misaligned")
    memory = np.zeros(size * dtype.itemsize + skew, np.uint8)[skew:].view(dtype)
    memory[:] = np.arange(size) % 5 + 1
    dense = memory[GUARD : size - GUARD].reshape(shape)
    array = window(dense, values.shape)
    if layout == "broadcast":
        dense[...] = values[:1] if values.ndim else values
    else:
        array[...] = values
    return array, memory


def sample(shape, dtype, seed=0):
    """Random numbers, and among them every kind of number that is special"""
    rng = np.random.default_rng(seed)
    if dtype.kind in "iu":
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        values = rng.integers(low, high, shape, dtype, endpoint=True)
        special = np.array([low, high, 0, 1, high // 2 + 1], dtype)
    else:
        values = rng.standard_normal(shape).astype(dtype)
        special = specials(dtype)
    odd = rng.random(shape) < 0.4
    return np.where(odd, rng.choice(special, shape), values)


def specials(dtype):
    """Infinities, NaN, both zeros, the largest, the subnormal, and two plain numbers"""
    one = dtype.type
    tiny, huge = np.spacing(one(0)), np.nextafter(one(np.inf), one(0))
    positive = np.array([np.inf, np.nan, 0, huge, tiny, 3 * tiny, 1, 1.5], dtype)
    return np.concatenate([positive, -positive])


def normal(shape, dtype, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def slopes_for(name, x, slope=0.2, seed=9):
    """The keyword arguments that activation `name` takes beside the array x"""
    row = ACTIVATIONS[name]
    if row.parameter == "weight":
        channels = x.shape[1] if x.ndim > 1 else 1
        return {"weight": normal(channels, reference.native(x.dtype), seed)}
    if row.parameter == "slopes":
        return {"lower": slope, "upper": slope, "slopes": slope}
    numbers = {number: values[0] for number, values in row.examples.items()}
    return (
        numbers | {"negative_slope": slope} if "negative_slope" in numbers else numbers
    )


def gradient_of(name, *arrays, **more):
    """The gradient towards x, without the weight's"""
    result = ACTIVATIONS[name].backward(*arrays, **more)
    return result[0] if ACTIVATIONS[name].parameter == "weight" else result


def strides(a):
    """Those that say anything"""
    return [s for s, n in zip(a.strides, a.shape, strict=True) if n > 1 and a.size]


@pytest.fixture
def gpu(monkeypatch):
    """A machine with GPUs that records what happens on it"""
    import gpu as machines

    with machines.machine(monkeypatch) as machine:
        yield machine


@pytest.fixture
def put(gpu):
    """From an array of NumPy to one of that machine's library"""
    import gpu as machines

    return machines.library(gpu).put
