"""From a formula to compiled loops.

A *block* applies a formula to a part of flat arrays.  A *driver* decides who runs which
blocks: one thread, all threads, in place, or past the cache.
Every combination is compiled when it is first needed and kept in Numba's disk cache.

All blocks have one signature, so that one set of drivers serves them all:

    block(a, b, y, slope, start)

`a` is the part from `start` on of the array whose shape the result has (x, or the
gradient), `b` all of what goes with it (the saved array, mask bits, channel weights, or
`a` again), and `y` receives the results.  Blocks are inlined before they are optimised:
where a driver names one array twice, for in place, the compiler sees that it is one and
still makes vector code.
"""

import functools
import hashlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import carray, njit, prange
from numpy.lib.stride_tricks import as_strided

from fastrelu.cpu import lanes
from fastrelu.cpu.lanes import WORD, Lane, fence, stream, unpack

TILE = 4096  # elements worked on at a time where a second pass must find them in L1
LANES = 32  # running sums kept side by side, so that a row's sum is vector work
SEGMENT = 1 << 14  # elements of a row summed on their own
BLOCK_ROWS = 64  # rows summed together where channels are the last axis
SEGMENT_COLUMNS = 1024

Function = Callable[..., Any]

# The names the blocks and drivers below leave open; `_rebuild` binds them.
formula: Any
block: Any
load: Any
store: Any
compute: Any
storage: Any
pack: Any
step: Any
one_weight: Any
own_weights: Any


# Blocks -------------------------------------------------------------------------------


def forward(x, b, y, slope, start):
    rounded = compute(slope)
    for i in range(x.size):
        y[i] = store(formula(load(x[i]), rounded))


def backward(grad, b, y, slope, start):
    saved = b[start : start + grad.size]
    rounded = compute(slope)
    for i in range(grad.size):
        y[i] = store(formula(load(grad[i]), load(saved[i]), rounded))


def forward_mask(x, b, y, slope, start):
    rounded = compute(slope)
    for first in range(0, x.size, TILE):
        tile = x[first : first + TILE]
        words = tile.size // WORD
        bits = b[(start + first) // 8 :]
        # Before the results are written: they may go where x is.
        pack(tile, bits, words)
        for i in range(words * WORD, tile.size, 8):
            byte = np.uint8(0)
            for j in range(min(8, tile.size - i)):
                byte |= np.uint8(load(tile[i + j]) > 0) << np.uint8(j)
            bits[i // 8] = byte
        result = y[first : first + TILE]
        for i in range(tile.size):
            result[i] = store(formula(load(tile[i]), rounded))


def backward_mask(grad, b, y, slope, start):
    rounded = compute(slope)
    flags = np.empty(min(TILE, grad.size), np.uint8)
    for first in range(0, grad.size, TILE):
        tile = grad[first : first + TILE]
        words = tile.size // WORD
        bits = b[(start + first) // 8 :]
        unpack(bits, flags, words)
        for i in range(words * WORD, tile.size):
            flags[i] = (bits[i // 8] >> np.uint8(i % 8)) & np.uint8(1)
        result = y[first : first + TILE]
        for i in range(tile.size):
            result[i] = store(formula(load(tile[i]), flags[i], rounded))


def rows(x, b, y, slope, start):
    """One weight a row of `slope` elements, as in (N, C, H, W)."""
    first = 0
    while first < x.size:
        row = (start + first) // slope
        last = min((row + 1) * slope - start, x.size)
        weight = b[row % b.size]
        part = x[first:last]
        result = y[first:last]
        for i in range(part.size):
            result[i] = store(formula(load(part[i]), weight))
        first = last


def columns(x, b, y, slope, start):
    """One weight a column, as in (N, C)."""
    first = 0
    while first < x.size:
        column = (start + first) % b.size
        last = min(first + b.size - column, x.size)
        part = x[first:last]
        result = y[first:last]
        weights = b[column : column + part.size]
        for i in range(part.size):
            result[i] = store(formula(load(part[i]), weights[i]))
        first = last


# Drivers ------------------------------------------------------------------------------


def straight(a, b, y, slope, team):
    chunk = -(-a.size // team // TILE) * TILE
    for k in prange(-(-a.size // chunk)):
        start = k * chunk
        block(a[start : start + chunk], b, y[start : start + chunk], slope, start)


def inplace(a, b, slope, team):
    """Work in place, for blocks that do not cut their arrays up further."""
    chunk = -(-a.size // team // TILE) * TILE
    for k in prange(-(-a.size // chunk)):
        start = k * chunk
        x = a[start : start + chunk]
        block(x, b, x, slope, start)


def by_tile(a, b, y, slope, past_cache, team):
    """Take a detour through L1: for in place, where `y` is `a`, or past the cache."""
    chunk = -(-a.size // team // TILE) * TILE
    for k in prange(-(-a.size // chunk)):
        tile = np.empty(TILE, y.dtype)
        for start in range(k * chunk, min((k + 1) * chunk, a.size), TILE):
            stop = min(start + TILE, a.size)
            block(a[start:stop], b, tile, slope, start)
            _put(tile, y[start:stop], past_cache)
        if past_cache:
            fence()


@njit(nogil=True, error_model="numpy", forceinline=True)
def _put(tile, target, past_cache):
    """Copy a tile to where it belongs, its whole cache lines past the cache."""
    lead = done = 0
    if past_cache:
        lead = min(-target.ctypes.data % 64 // target.itemsize, target.size)
        lines = (target.size - lead) * target.itemsize // 64
        stream(target[lead:], tile[lead:], lines)
        done = lead + lines * 64 // target.itemsize
    for i in range(lead):
        target[i] = tile[i]
    rest = target[done:]
    kept = tile[done:]
    for i in range(rest.size):
        rest[i] = kept[i]


# Drivers that NumPy calls ------------------------------------------------------------
#
# The inner loop of a ufunc: `data` holds the addresses of the inputs, the slopes among
# them, and of the result; `strides` says how far apart their elements are, in bytes.


def ufunc_forward(context, data, dimensions, strides, extra):
    size = dimensions[0]
    x = carray(data[0], size, storage)
    slopes = carray(data[1], size, compute)
    y = carray(data[2], size, storage)
    dense = strides[0] == x.itemsize and strides[2] == y.itemsize
    if dense and strides[1] == slopes.itemsize:
        for i in range(size):
            y[i] = store(formula(load(x[i]), slopes[i]))
    elif not dense or strides[1] != 0:
        x = as_strided(x, (size,), (strides[0],))
        slopes = as_strided(slopes, (size,), (strides[1],))
        y = as_strided(y, (size,), (strides[2],))
        for i in range(size):
            y[i] = store(formula(load(x[i]), slopes[i]))
    elif x.ctypes.data == y.ctypes.data:
        block(x, x, x, slopes[0], 0)
    else:
        block(x, x, y, slopes[0], 0)
    return 0


def ufunc_backward(context, data, dimensions, strides, extra):
    size = dimensions[0]
    grad = carray(data[0], size, storage)
    saved = carray(data[1], size, storage)
    slopes = carray(data[2], size, compute)
    y = carray(data[3], size, storage)
    item = y.itemsize
    if not strides[0] == strides[1] == strides[3] == item or strides[2] != 0:
        grad = as_strided(grad, (size,), (strides[0],))
        saved = as_strided(saved, (size,), (strides[1],))
        slopes = as_strided(slopes, (size,), (strides[2],))
        y = as_strided(y, (size,), (strides[3],))
        for i in range(size):
            y[i] = store(formula(load(grad[i]), load(saved[i]), slopes[i]))
    elif grad.ctypes.data == y.ctypes.data:
        block(grad, saved, grad, slopes[0], 0)
    else:
        block(grad, saved, y, slopes[0], 0)
    return 0


# PReLU's backward pass ----------------------------------------------------------------
#
# The weight gradient is summed in float64 with Neumaier's compensation (doi:10.1002/
# zamm.19740540106, in Knuth's branch-free form): one rounding in all, however long the
# sum.  Which elements are summed together follows from the shape alone, so neither the
# number of threads nor the width of the processor's vectors can change a bit.  The
# pass is bound by memory, and the compensation hides behind it.


@njit(nogil=True, error_model="numpy", forceinline=True)
def _error(a, b, total):
    """Return what was lost in total = a + b."""
    shadow = total - a
    return (a - (total - shadow)) + (b - shadow)


def _step(g, x, weight, y, sums, errors, i, j):
    """Do element i and add its part of the weight gradient to sum j."""
    value = load(x[i])
    grad = load(g[i])
    y[i] = store(formula(grad, value, weight))
    product = 0.0 if value > 0 else numba.float64(value) * numba.float64(grad)
    total = sums[j] + product
    errors[j] += _error(sums[j], product, total)
    sums[j] = total


def _one_weight(g, x, weight, y, sums, errors):
    whole = x.size // LANES * LANES
    for i in range(0, whole, LANES):
        for j in range(LANES):
            step(g, x, weight, y, sums, errors, i + j, j)
    for j in range(x.size - whole):
        step(g, x, weight, y, sums, errors, whole + j, j)


def _own_weights(g, x, weights, y, sums, errors):
    for i in range(x.size):
        step(g, x, weights[i], y, sums, errors, i, i)


@njit(nogil=True, error_model="numpy", forceinline=True)
def _add(sums, errors, i, value, error):
    """Add a sum and its error to sum i."""
    total = sums[i] + value
    errors[i] += _error(sums[i], value, total) + error
    sums[i] = total


def prelu_backward_rows(g, x, w, y, inner, repeats, sums, past_cache, team):
    """One weight a row of `inner` elements; sums is (2, channels)."""
    segments = -(-inner // SEGMENT)
    cells = x.size // inner * segments
    partial = np.empty((2, cells))
    chunk = -(-cells // team)
    for k in prange(-(-cells // chunk)):
        tile = np.empty(TILE, y.dtype)
        totals = np.empty(LANES)
        errors = np.empty(LANES)
        for cell in range(k * chunk, min((k + 1) * chunk, cells)):
            row = cell // segments
            weight = w[row % w.size]
            totals[:] = 0.0
            errors[:] = 0.0
            begin = row * inner + cell % segments * SEGMENT
            end = min(begin + SEGMENT, (row + 1) * inner)
            for start in range(begin, end, TILE):
                stop = min(start + TILE, end)
                one_weight(g[start:stop], x[start:stop], weight, tile, totals, errors)
                _put(tile, y[start:stop], past_cache)
            half = LANES // 2
            while half > 0:
                for i in range(half):
                    _add(totals, errors, i, totals[i + half], errors[i + half])
                half //= 2
            partial[0, cell] = totals[0]
            partial[1, cell] = errors[0]
        if past_cache:
            fence()
    sums[:] = 0.0
    for cell in range(cells):
        channel = cell // segments % w.size
        _add(sums[0], sums[1], channel, partial[0, cell], partial[1, cell])


def prelu_backward_columns(g, x, w, y, inner, repeats, sums, past_cache, team):
    """One weight for each `inner` columns; sums is (2, channels).

    The rows are (repeats, channels, inner) long: short ones are taken together until
    the loops over them are worth starting.
    """
    size = repeats * w.size * inner
    wide = w if size == w.size else np.empty(size, w.dtype)
    for column in range(size if size > w.size else 0):
        wide[column] = w[column // inner % w.size]
    blocks = -(-x.size // (size * BLOCK_ROWS))
    partial = np.empty((2, blocks, size))
    across = -(-size // SEGMENT_COLUMNS)
    cells = blocks * across
    chunk = -(-cells // team)
    for k in prange(-(-cells // chunk)):
        tile = np.empty(SEGMENT_COLUMNS, y.dtype)
        for cell in range(k * chunk, min((k + 1) * chunk, cells)):
            place = cell // across
            left = cell % across * SEGMENT_COLUMNS
            right = min(left + SEGMENT_COLUMNS, size)
            weights = wide[left:right]
            totals = partial[0, place, left:right]
            errors = partial[1, place, left:right]
            totals[:] = 0.0
            errors[:] = 0.0
            for row in range(place * BLOCK_ROWS, (place + 1) * BLOCK_ROWS):
                start = min(row * size + left, g.size)
                stop = min(row * size + right, g.size)
                own_weights(g[start:stop], x[start:stop], weights, tile, totals, errors)
                _put(tile, y[start:stop], past_cache)
        if past_cache:
            fence()
    totals, errors = partial[0, 0], partial[1, 0]
    for place in range(1, blocks):
        values, more = partial[0, place], partial[1, place]
        for column in range(size):
            _add(totals, errors, column, values[column], more[column])
    sums[:] = 0.0
    column = 0
    for _ in range(repeats):
        for channel in range(w.size):
            for _ in range(inner):
                _add(sums[0], sums[1], channel, totals[column], errors[column])
                column += 1


def prelu_finish(partial, result):
    """Sum partial (2, before, channels, after) into result (channels,), in order."""
    sums = np.zeros(result.size)
    errors = np.zeros(result.size)
    for before in range(partial.shape[1]):
        for channel in range(partial.shape[2]):
            for after in range(partial.shape[3]):
                value = partial[0, before, channel, after]
                _add(sums, errors, channel, value, partial[1, before, channel, after])
    for channel in range(result.size):
        # Past an infinity or a NaN the errors are NaN and say nothing.
        if np.isfinite(sums[channel]):
            sums[channel] += errors[channel]
        result[channel] = sums[channel]


# Building -----------------------------------------------------------------------------


def _sources() -> bytes:
    """Return what compiled code depends on besides its formula and Numba's version."""
    try:
        return b"".join(Path(m).read_bytes() for m in (__file__, lanes.__file__))
    except OSError:  # run from an archive: such files do not change under our feet
        return b""


_SOURCES = _sources()


def _compile(function: Function, **options: Any) -> Any:
    """Call numba.njit, which has no types of its own."""
    return njit(nogil=True, error_model="numpy", **options)(function)


def _rebuild(template: Function, name: str, names: dict[str, Any]) -> Function:
    """Return a copy of a template whose open names are bound as globals.

    Numba's disk cache never hits for a closure over a compiled function; globals do
    not trouble it (numba#6264).  It does not look at them either, so the name of a
    cached function must say all that the function is made of.
    """
    copy = types.FunctionType(template.__code__, {**globals(), **names}, name)
    copy.__qualname__, copy.__module__ = name, __name__
    return copy


def bound(
    driver: Function,
    inner_block: Function | None,
    inner_formula: Function | None,
    lane: Lane,
    kind: str,
) -> Function:
    """Return a driver whose open names are bound, for Numba to compile."""
    names: dict[str, Any] = {
        "load": lane.load,
        "store": lane.store,
        "compute": lane.compute,
        "storage": lane.storage.type,
        "pack": lane.pack,
    }
    parts = [driver.__name__, lane.name, kind]
    digest = hashlib.sha256(_SOURCES)
    if inner_formula is not None:
        code = inner_formula.__code__
        digest.update(repr((code.co_code, code.co_consts, code.co_names)).encode())
        names["formula"] = _compile(inner_formula, forceinline=True)
        parts.append(inner_formula.__name__)
    if inner_block is not None:
        parts.append(inner_block.__name__)
        copy = _rebuild(inner_block, "block", names)
        names["block"] = _compile(copy, inline="always")
    else:
        templates: dict[str, Function] = {
            "step": _step,
            "one_weight": _one_weight,
            "own_weights": _own_weights,
        }
        for name, template in templates.items():  # each may use those before it
            copy = _rebuild(template, name, names)
            names[name] = _compile(copy, forceinline=True)
    return _rebuild(driver, "_".join([*parts, digest.hexdigest()[:12]]), names)


@functools.cache
def compiled(
    driver: Function,
    inner_block: Function | None,
    inner_formula: Function | None,
    lane: Lane,
    parallel: bool = False,
) -> Any:
    """Return one compiled loop; its machine code is made when it is first called."""
    kind = "parallel" if parallel else "single"
    function = bound(driver, inner_block, inner_formula, lane, kind)
    try:
        return _compile(function, parallel=parallel, cache=True)
    except RuntimeError:  # no folder to keep compiled code in
        return _compile(function, parallel=parallel)


def finish(partial: Any, result: Any) -> None:
    """Add partial sums up into a float32 or float64 result."""
    compiled(prelu_finish, None, None, lanes.lane_of(np.dtype(np.float64)))(
        partial, result
    )
