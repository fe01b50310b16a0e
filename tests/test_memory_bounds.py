"""Compiled code beside memory that it must not touch.

Every array lies in pages of its own between two that nobody may read or write, as near
to one of them as its alignment allows, and the bytes between are canaries.  A violation
kills the process, so this runs in one of its own, which keeps note of where it is:
``python tests/test_memory_bounds.py STEP NOTE [DTYPE...]``.
"""

import ctypes
import itertools
import json
import math
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
from conftest import dtype_of, floats_here, normal, sample
from reference import assert_same
from test_paths import LOOPS, run_loop, without_numbers

from fastrelu import activations
from fastrelu.cpu import build, loops, sums, threads, walk
from fastrelu.cpu.vector import format_of

CANARY = 0xA5
PAGE = mmap.PAGESIZE
TAILS = 131
MOST = loops.TILE + TAILS  # elements: the team shares what is longer than a tile


class Fenced:
    """Memory between two pages that nobody may touch"""

    def __init__(self, nbytes):
        pages = -(-nbytes // PAGE) + 1
        self.map = mmap.mmap(-1, (pages + 2) * PAGE)
        whole = np.frombuffer(self.map, np.uint8)
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        for place in (0, (pages + 1) * PAGE):
            address = ctypes.c_void_p(whole.ctypes.data + place)
            assert protect(address, ctypes.c_size_t(PAGE), 0) == 0, ctypes.get_errno()
        self.memory = whole[PAGE:-PAGE]

    def put(self, values, alignment, at_end):
        """A copy of flat values, so many bytes after a cache line, by one fence"""
        start = alignment
        if at_end:
            start = (
                self.memory.size - values.nbytes - alignment
            ) // 64 * 64 + alignment
        self.memory[:] = CANARY
        self.place = start, start + values.nbytes
        window = self.memory[slice(*self.place)]
        window[:] = values.view(np.uint8)
        return window.view(values.dtype)

    def holds(self, values):
        """Say whether just these values are there, and canaries around them"""
        start, stop = self.place
        return (
            self.memory[start:stop].tobytes() == values.tobytes()
            and not (self.memory[:start] != CANARY).any()
            and not (self.memory[stop:] != CANARY).any()
        )


BELIEVED = 0, threads.MUCH  # bytes that a loop is told it will move
ROW = 50  # elements that share a weight


def places(step, dtype, aligned):
    """Sizes, alignments and fences: every step-th of all"""
    item = dtype.itemsize
    offsets = [a for a in range(64) if (a % item == 0) == aligned]
    yield from itertools.islice(
        itertools.product(range(TAILS), offsets, (False, True)), 0, None, step
    )


def walk_loops(dtype, step, note):
    """Loops as they are, in every way that they run, with the values that one gave"""
    fmt = format_of(dtype)
    x, other = sample((MOST,), dtype), sample((MOST,), dtype, seed=1)
    random = np.random.default_rng(0).integers(0, 256, -(-MOST // 8), np.uint8)
    fences = [Fenced(MOST * max(8, dtype.itemsize)) for _ in range(4)]
    for name, (body, operation) in LOOPS.items():
        if body in sums.PARTS:
            continue
        if dtype.kind == "i":
            if name in ("rows", "columns"):
                continue
            operation = without_numbers(operation)
        more = {"numbers": [0.37] * operation.numbers}
        arrays = [x.view(fmt.storage), other.view(fmt.storage)][: operation.arrays]
        beside = random.copy()
        if name in ("rows", "columns"):
            weights, more["inner"] = (7, ROW) if name == "rows" else (ROW, 1)
            beside = np.linspace(-1, 2, weights).astype(fmt.product)
        whole = np.zeros_like(arrays[0])
        run_loop(build.compiled(body, operation, fmt), arrays, whole, beside, **more)
        check(name, dtype, x, other, beside, whole.view(dtype))
        for target, moved in itertools.product(build.TARGETS, BELIEVED):
            loop = build.compiled(body, operation, fmt, target)
            for tail, alignment, at_end in places(step, dtype, True):
                n = tail + (loops.TILE if moved else 0)
                note(dtype.name, name, target, moved, n)
                note.place(alignment, at_end)
                kept = beside[: -(-n // 8) if "bits" in name else beside.size].copy()
                if name == "to_bits" and n % 8:
                    kept[-1] &= (1 << n % 8) - 1
                given = [
                    fence.put(a[:n], alignment, at_end)
                    for fence, a in zip(fences, arrays, strict=False)
                ]
                second = fences[3].put(kept, alignment, at_end)
                if target == build.IN_PLACE:
                    run_loop(loop, given, given[0], second, moved=moved, **more)
                    assert fences[0].holds(whole[:n])
                else:
                    y = fences[2].put(np.zeros_like(whole[:n]), alignment, at_end)
                    run_loop(loop, given, y, second, moved=moved, **more)
                    assert fences[0].holds(arrays[0][:n])
                    assert fences[2].holds(whole[:n])
                assert len(arrays) == 1 or fences[1].holds(arrays[1][:n])
                assert fences[3].holds(kept)


COLUMNS = 2, sums.BLOCK_ROWS + 1  # rows: of one body, and of more than one


def walk_gradients(dtype, step, note):
    """PReLU's backward loops; their totals must have the bits that one thread gave"""
    fmt = format_of(dtype)
    most = max(6 * MOST, COLUMNS[1] * 2 * TAILS)
    x, g = normal((most,), dtype), normal((most,), dtype, seed=1)
    weights = np.linspace(-1, 2, TAILS).astype(fmt.product)
    fences = [Fenced(most * dtype.itemsize) for _ in range(5)]
    axes = np.zeros(walk.RANK + 1, np.int64)

    def run(target, sign, grad, saved, w, y, totals, inner, moved):
        """Run a loop over arrays that lie as they come, or from back to front."""
        loop = build.compiled(*LOOPS[driver.__name__], fmt, target)
        axes[:4], axes[walk.RANK] = (grad.size, *[sign * dtype.itemsize] * 3), 1
        grad, saved, y = (a[::sign] for a in (grad, saved, y))
        places = [a.ctypes.data for a in (grad, saved, w, y, totals, axes)]
        assert loop.ctypes(*places, grad.size, w.size, inner, moved) == 0

    for driver in sums.PARTS:
        right = {}  # by shape
        ways = [(target, 1) for target in (*build.TARGETS, build.APART)]
        ways.append((build.APART, -1))
        for (target, sign), moved in itertools.product(ways, BELIEVED):
            in_place = target == build.IN_PLACE
            for tail, alignment, at_end in places(step, dtype, True):
                if driver is sums.prelu_backward_rows:
                    shape = 2, 3, tail + (loops.TILE if moved else 0)
                else:
                    shape = COLUMNS[moved > 0], tail, 1 + tail % 2
                size, (_, channels, inner) = math.prod(shape), shape
                if size == 0:
                    continue
                grad, saved = (a[:size].view(fmt.storage) for a in (g, x))
                w = weights[:channels]
                if shape not in right:
                    y, totals = np.zeros_like(grad), np.zeros((2, channels))
                    run(build.PLAIN, 1, grad, saved, w, y, totals, inner, 0)
                    check_gradient(shape, y.view(dtype), totals, x, g, w)
                    right[shape] = y, totals
                y, totals = right[shape]
                grad, saved, y = (a[::sign].copy() for a in (grad, saved, y))
                note(dtype.name, driver.__name__, target, moved, *shape)
                note.place(alignment, at_end)
                put = [
                    fence.put(a, start, at_end)
                    for fence, a, start in (
                        (fences[0], grad, alignment),
                        (fences[1], saved, alignment),
                        (fences[2], w, alignment // 8 * 8),
                        (fences[3], np.zeros_like(y), alignment),
                        (fences[4], np.zeros(totals.size), 0),
                    )
                ]
                if in_place:
                    put[3] = put[0]
                run(target, sign, *put, inner, moved)
                assert fences[0 if in_place else 3].holds(y)
                assert in_place or fences[0].holds(grad)
                assert fences[1].holds(saved)
                assert fences[2].holds(w)
                assert fences[4].holds(totals.ravel())


def check_gradient(shape, got, totals, x, g, w):
    """Against the definition, and NumPy's sum in as many places as a float has"""
    x, g = (a[: got.size].reshape(shape) for a in (x, g))
    more = {"weight": w, "axis": 1}
    assert_same(got.reshape(shape), reference.backward("prelu", g, x, **more))
    products = np.where(x > 0, 0, x.astype(np.float64) * g.astype(np.float64))
    assert np.allclose(totals.sum(0), products.sum((0, 2)), rtol=1e-12, atol=1e-12)


def check(name, dtype, x, other, b, got):
    """Against the definition, once for all the prefixes that follow"""
    if name == "to_bits":
        assert b.tobytes() == reference.mask_bits(x).tobytes()
    target = {} if dtype.kind == "i" else {"negative_slope": 0.37}
    activation = "relu" if dtype.kind == "i" else "leaky_relu"
    if name in ("forward", "to_bits"):
        expected = reference.forward(activation, x, **target)
    elif name in ("rows", "columns"):
        places = np.arange(MOST)
        places = places // ROW % b.size if name == "rows" else places % b.size
        expected = reference.forward("prelu", x, weight=b[places], axis=0)
    else:
        if name == "from_bits":
            flags = np.unpackbits(b, count=MOST, bitorder="little")
            other = flags.astype(dtype)
        expected = reference.backward(activation, x, other, **target)
    assert_same(got, expected)


def walk_functions(dtype, step, note):
    """Public functions, aligned or not: small arrays, and PReLU's two passes"""
    x, g = sample((TAILS * 4,), dtype), sample((TAILS * 4,), dtype, seed=1)
    fences = [Fenced(5 * TAILS * dtype.itemsize) for _ in range(4)]
    weights = np.linspace(-1, 2, 4).astype(dtype)
    for aligned in (True, False):
        for n, alignment, at_end in places(step, dtype, aligned):
            for name in ("relu", "prelu"):
                if name == "prelu" and dtype.kind == "i":
                    continue
                note(dtype.name, name, "aligned" if aligned else "misaligned", n)
                note.place(alignment, at_end)
                # prelu's weights are one for all, one a row, or one a column
                shape = (
                    (n,) if name == "relu" else [(1, 4, n), (n, 4), (1, 1, n)][n % 3]
                )
                channels = 1 if name == "relu" else shape[1]
                size = n * channels
                u, v = x[:size], g[:size]
                put = [
                    fence.put(a, alignment, at_end)
                    for fence, a in zip(
                        fences,
                        (u, v, np.zeros_like(u), weights[:channels]),
                        strict=True,
                    )
                ]
                a, b, y = (array.reshape(shape) for array in put[:3])
                more = {} if name == "relu" else {"weight": put[3]}
                row = activations.ACTIVATIONS[name]
                got = row.forward(a, out=y, **more)
                assert got is y
                fresh = {} if name == "relu" else {"weight": weights[:channels].copy()}
                expected = row.forward(u.copy().reshape(shape), **fresh)
                assert_same(
                    expected, reference.forward(name, u.reshape(shape), **fresh)
                )
                assert fences[2].holds(expected.ravel())
                assert_same(row.forward(a, **more), expected)
                expected = row.backward(
                    v.copy().reshape(shape), u.reshape(shape), **fresh
                )
                both = row.backward(b, a, out=y, **more)
                if name == "prelu":
                    assert both[1].tobytes() == expected[1].tobytes()
                    expected = expected[0]
                want = reference.backward(
                    name, v.reshape(shape), u.reshape(shape), **fresh
                )
                assert_same(expected, want)
                assert fences[2].holds(expected.ravel())
                assert fences[0].holds(u)
                assert fences[1].holds(v)
                assert fences[3].holds(weights[:channels])
                row.backward(b, a, inplace=True, **more)
                assert fences[1].holds(expected.ravel())
                row.forward(a, inplace=True, **more)
                assert fences[0].holds(reference_of(row, u, shape, fresh))


def reference_of(row, u, shape, more):
    return row.forward(u.copy().reshape(shape), **more).ravel()


class Note:
    """Where we are, in a file that outlives the process"""

    def __init__(self, path):
        path.write_bytes(bytes(PAGE))
        with path.open("r+b") as file:
            self.map = mmap.mmap(file.fileno(), PAGE)

    def __call__(self, *where):
        self.where = where

    def place(self, *where):
        text = json.dumps([*self.where, *where]).encode()
        self.map[: len(text) + 1] = text + b"\0"


def main(step, path, dtypes):
    note = Note(path)
    threads.ready()
    for dtype in map(dtype_of, dtypes or [*floats_here(), "int8"]):
        walk_loops(dtype, step, note)
        if dtype.kind != "i":
            walk_gradients(dtype, step, note)
        walk_functions(dtype, step, note)


@pytest.mark.skipif(os.name != "posix", reason="protects pages by mprotect")
@pytest.mark.parametrize("step", [59, pytest.param(1, marks=pytest.mark.long)])
def test_beside_guarded_pages(step, tmp_path):
    note = tmp_path / "note"
    command = [sys.executable, __file__, str(step), str(note)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    where = note.read_bytes().partition(b"\0")[0].decode()
    assert done.returncode == 0, f"at {where}:\n{done.stderr}"


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
