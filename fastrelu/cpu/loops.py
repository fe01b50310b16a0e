"""From a formula to compiled loops.

A *block* applies a formula to the elements [start, stop) of flat arrays.  A *driver*
decides who runs which blocks: one thread, all threads, in place, or past the cache.
Every combination is compiled when it is first needed and kept in Numba's disk cache.

All blocks have one signature, so that one set of drivers serves them all:

    block(a, b, y, slope, start, stop)

`a` is the array whose shape the result has (x, or the gradient), `b` what goes with it
(the saved array, mask bits, channel weights, or `a` again), and `y` receives the
results of [start, stop) at its own start.
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
LANES = 64  # running sums kept side by side, so that a row's sum is vector work
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
by_tile: Any
step: Any
one_weight: Any
own_weights: Any


# Blocks -------------------------------------------------------------------------------


def forward(a, b, y, slope, start, stop):
    x = a[start:stop]
    rounded = compute(slope)
    for i in range(x.size):
        y[i] = store(formula(load(x[i]), rounded))


def backward(a, b, y, slope, start, stop):
    grad = a[start:stop]
    saved = b[start:stop]
    rounded = compute(slope)
    for i in range(grad.size):
        y[i] = store(formula(load(grad[i]), load(saved[i]), rounded))


def forward_mask(a, b, y, slope, start, stop):
    rounded = compute(slope)
    for first in range(start, stop, TILE):
        x = a[first : min(first + TILE, stop)]
        words = x.size // WORD
        bits = b[first // 8 :]
        # Before the results are written: they may go where x is.
        pack(x, bits, words)
        for i in range(words * WORD, x.size, 8):
            byte = np.uint8(0)
            for j in range(min(8, x.size - i)):
                byte |= np.uint8(load(x[i + j]) > 0) << np.uint8(j)
            bits[i // 8] = byte
        result = y[first - start :]
        for i in range(x.size):
            result[i] = store(formula(load(x[i]), rounded))


def backward_mask(a, b, y, slope, start, stop):
    rounded = compute(slope)
    flags = np.empty(min(TILE, stop - start), np.uint8)
    for first in range(start, stop, TILE):
        grad = a[first : min(first + TILE, stop)]
        words = grad.size // WORD
        bits = b[first // 8 :]
        unpack(bits, flags, words)
        for i in range(words * WORD, grad.size):
            flags[i] = (bits[i // 8] >> np.uint8(i % 8)) & np.uint8(1)
        result = y[first - start :]
        for i in range(grad.size):
            result[i] = store(formula(load(grad[i]), flags[i], rounded))


def rows(a, b, y, slope, start, stop):
    """One weight a row of `slope` elements, as in (N, C, H, W)."""
    first = start
    while first < stop:
        row = first // slope
        last = min((row + 1) * slope, stop)
        weight = b[row % b.size]
        x = a[first:last]
        result = y[first - start : last - start]
        for i in range(x.size):
            result[i] = store(formula(load(x[i]), weight))
        first = last


def columns(a, b, y, slope, start, stop):
    """One weight a column, as in (N, C)."""
    first = start
    while first < stop:
        column = first % b.size
        last = min(first + b.size - column, stop)
        x = a[first:last]
        weights = b[column : column + x.size]
        result = y[first - start : last - start]
        for i in range(x.size):
            result[i] = store(formula(load(x[i]), weights[i]))
        first = last


# Drivers ------------------------------------------------------------------------------


@njit(nogil=True, error_model="numpy", forceinline=True)
def _overlap(y, x):
    """Say whether two arrays share memory without being the same."""
    first_y = y.ctypes.data
    first_x = x.ctypes.data
    last_y = first_y + y.size * y.itemsize
    last_x = first_x + x.size * x.itemsize
    return first_y != first_x and first_y < last_x and first_x < last_y


def serial(a, b, y, slope):
    """Return whether it ran: `y` must lie on an input or clear of it."""
    if _overlap(y, a) or _overlap(y, b):
        return False
    block(a, b, y, slope, 0, a.size)
    return True


def serial_inplace(a, b, slope):
    """Return whether it ran: `b` must be `a` or clear of it."""
    if _overlap(a, b):
        return False
    by_tile(a, b, a, slope, 0, a.size, False)
    return True


def parallel(a, b, y, slope, team):
    chunk = -(-a.size // team // TILE) * TILE
    for k in prange(-(-a.size // chunk)):
        stop = min((k + 1) * chunk, a.size)
        block(a, b, y[k * chunk : stop], slope, k * chunk, stop)


def parallel_by_tile(a, b, y, slope, past_cache, team):
    """Work in place, where `y` is `a`, or send the results past the cache."""
    chunk = -(-a.size // team // TILE) * TILE
    for k in prange(-(-a.size // chunk)):
        stop = min((k + 1) * chunk, a.size)
        by_tile(a, b, y, slope, k * chunk, stop, past_cache)


def _by_tile(a, b, y, slope, start, stop, past_cache):
    """Apply the block tile by tile in L1; `y` is all of the result.

    The compiler makes vector code only where it can tell reading from writing.  In
    place it cannot, so the detour through the tile pays there too.
    """
    tile = np.empty(min(TILE, stop - start), y.dtype)
    for first in range(start, stop, TILE):
        last = min(first + TILE, stop)
        block(a, b, tile, slope, first, last)
        _put(tile, y[first:last], past_cache)
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
    if strides[0] == x.itemsize == strides[2] and strides[1] == 0:
        if x.ctypes.data == y.ctypes.data:
            for i in range(size):  # the same name twice: else it is scalar code
                y[i] = store(formula(load(y[i]), slopes[0]))
        else:
            block(x, x, y, slopes[0], 0, size)
    else:
        x = as_strided(x, (size,), (strides[0],))
        slopes = as_strided(slopes, (size,), (strides[1],))
        y = as_strided(y, (size,), (strides[2],))
        for i in range(size):
            y[i] = store(formula(load(x[i]), slopes[i]))
    return 0


def ufunc_backward(context, data, dimensions, strides, extra):
    size = dimensions[0]
    grad = carray(data[0], size, storage)
    saved = carray(data[1], size, storage)
    slopes = carray(data[2], size, compute)
    y = carray(data[3], size, storage)
    item = y.itemsize
    if strides[0] == strides[1] == strides[3] == item and strides[2] == 0:
        if grad.ctypes.data == y.ctypes.data:
            for i in range(size):
                y[i] = store(formula(load(y[i]), load(saved[i]), slopes[0]))
        else:
            block(grad, saved, y, slopes[0], 0, size)
    else:
        grad = as_strided(grad, (size,), (strides[0],))
        saved = as_strided(saved, (size,), (strides[1],))
        slopes = as_strided(slopes, (size,), (strides[2],))
        y = as_strided(y, (size,), (strides[3],))
        for i in range(size):
            y[i] = store(formula(load(grad[i]), load(saved[i]), slopes[i]))
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


def prelu_backward_rows(g, x, w, y, inner, partial, past_cache, team):
    """One weight a row of `inner` elements; partial is (2, rows * segments)."""
    segments = -(-inner // SEGMENT)
    cells = partial.shape[1]
    chunk = -(-cells // team)
    for k in prange(-(-cells // chunk)):
        tile = np.empty(TILE, y.dtype)
        sums = np.empty(LANES)
        errors = np.empty(LANES)
        for cell in range(k * chunk, min((k + 1) * chunk, cells)):
            row = cell // segments
            weight = w[row % w.size]
            sums[:] = 0.0
            errors[:] = 0.0
            begin = row * inner + cell % segments * SEGMENT
            end = min(begin + SEGMENT, (row + 1) * inner)
            for start in range(begin, end, TILE):
                stop = min(start + TILE, end)
                one_weight(g[start:stop], x[start:stop], weight, tile, sums, errors)
                _put(tile, y[start:stop], past_cache)
            half = LANES // 2
            while half > 0:
                for i in range(half):
                    total = sums[i] + sums[i + half]
                    lost = _error(sums[i], sums[i + half], total)
                    errors[i] += errors[i + half] + lost
                    sums[i] = total
                half //= 2
            partial[0, cell] = sums[0]
            partial[1, cell] = errors[0]
        if past_cache:
            fence()


def prelu_backward_columns(g, x, w, y, inner, partial, past_cache, team):
    """One weight a column of w.size; partial is (2, blocks of rows, w.size)."""
    size = w.size
    across = -(-size // SEGMENT_COLUMNS)
    cells = partial.shape[1] * across
    chunk = -(-cells // team)
    for k in prange(-(-cells // chunk)):
        tile = np.empty(SEGMENT_COLUMNS, y.dtype)
        for cell in range(k * chunk, min((k + 1) * chunk, cells)):
            place = cell // across
            left = cell % across * SEGMENT_COLUMNS
            right = min(left + SEGMENT_COLUMNS, size)
            weights = w[left:right]
            sums = partial[0, place, left:right]
            errors = partial[1, place, left:right]
            sums[:] = 0.0
            errors[:] = 0.0
            for row in range(place * BLOCK_ROWS, (place + 1) * BLOCK_ROWS):
                start = min(row * size + left, g.size)
                stop = min(row * size + right, g.size)
                own_weights(g[start:stop], x[start:stop], weights, tile, sums, errors)
                _put(tile, y[start:stop], past_cache)
        if past_cache:
            fence()


def prelu_finish(partial, result):
    """Sum partial (2, before, channels, after) into result (channels,), in order."""
    errors = np.zeros(result.size)
    result[:] = 0.0
    for before in range(partial.shape[1]):
        for channel in range(partial.shape[2]):
            for after in range(partial.shape[3]):
                value = partial[0, before, channel, after]
                total = result[channel] + value
                lost = _error(result[channel], value, total)
                errors[channel] += lost + partial[1, before, channel, after]
                result[channel] = total
    for channel in range(result.size):
        # Past an infinity or a NaN the errors are NaN and say nothing.
        if np.isfinite(result[channel]):
            result[channel] += errors[channel]


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
        templates: dict[str, Function] = {"block": inner_block, "by_tile": _by_tile}
    else:
        templates = {
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
