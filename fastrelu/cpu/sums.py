"""PReLU's backward pass: both gradients at once.

The weight gradient is summed in float64.  A few products are added up as they are, and
their sum with Neumaier's compensation (doi:10.1002/zamm.19740540106, in Knuth's
branch-free form), so that the error does not grow with the number of elements.  Which
of them are summed together follows from the shape alone: neither the number of
threads nor the width of the processor's vectors can change a bit.

These drivers, too, take addresses; at `total` go the sums, a float64 for each channel,
and behind them what each has lost.  They return 0, or 1 where there is no memory for
partial sums.

A piece of a row is summed and then, while it is in the first cache, gone over again for
the other gradient, with the loops that write all other results.  Where each column has
a sum of its own, a strip's two gradients are made together.  Elements that do not lie
one after another go by way of buffers, in the order in which those do that lie so.
"""

from typing import Any

import numba
import numpy as np
from numba import types

from fastrelu._sums import lost
from fastrelu.cpu.jit import array_at, inlined, larger, piece, smaller
from fastrelu.cpu.loops import (
    before_line,
    end_of_line,
    repeat,
    strip_buffer,
    with_each,
    with_one,
)
from fastrelu.cpu.threads import spread
from fastrelu.cpu.vector import STRIP, buffer, round_to_odd
from fastrelu.cpu.walk import RANK, carry

SUMMED = 512  # elements that are summed before the rest is done
LANES = 32  # running sums kept side by side, so that a row's sum is vector work
FEW, FEW_ROWS = 4, 8  # products that are summed without compensation, and rows of them
SEGMENT = 1 << 14  # elements of a row summed on their own
BLOCK_ROWS = 64  # rows summed together where channels are the last axis, or more:
BLOCK = 1 << 17  # up to so many elements,
BLOCKS = 16  # while there are so many blocks
SEGMENT_COLUMNS = 1024
TOGETHER = 256  # columns of short rows that are summed together

SIGNATURE = types.int64(*[types.int64] * 6, *[types.intp] * 4)
WEIGHTS_SIGNATURE = types.void(types.int64, types.int64, types.intp)

_malloc = types.ExternalFunction("PyMem_RawMalloc", types.int64(types.intp))
_free = types.ExternalFunction("PyMem_RawFree", types.void(types.int64))
sum_buffer = buffer(LANES, numba.float64)
column_buffer = buffer(SEGMENT_COLUMNS + STRIP, numba.float64)
line_buffer = buffer(SUMMED)

# The names that are bound later.
element: Any
fill: Any
cut: Any
product: Any
add_up: Any
part: Any
finished: Any
write_strip: Any
load: Any
store: Any
compute: Any
storage: Any


_lost = inlined(lost)


@inlined
def _add(sums, errors, i, value, error):
    """Add a sum and its error to sum i; an error of -0.0 costs nothing."""
    total = sums[i] + value
    errors[i] += _lost(sums[i], value, total) + error
    sums[i] = total


def product_at(g, x, i):
    """Return the part of element i in its weight's gradient."""
    value = load(x[i])
    product = numba.float64(value) * numba.float64(load(g[i]))
    if value > 0:  # Python 3.14 makes two ways of a conditional expression here
        product = 0.0
    return product


def one_weight(g, x, sums, errors):
    """Add a row, or a piece of one, to LANES sums."""
    lanes = np.uintp(LANES)
    groups = x.size // (FEW * LANES)
    for group in range(np.uintp(groups)):
        for j in range(lanes):
            i = group * np.uintp(FEW * LANES) + j
            few = product(g, x, i) + product(g, x, i + lanes)
            i += lanes + lanes
            few += product(g, x, i) + product(g, x, i + lanes)
            _add(sums, errors, j, few, -0.0)
    for start in range(np.uintp(groups * FEW * LANES), np.uintp(x.size), lanes):
        for j in range(smaller(lanes, np.uintp(x.size) - start)):
            _add(sums, errors, j, product(g, x, start + j), -0.0)


def own_weights(g, x, weights, sums, results, at, column, count):
    """Add so many elements to their columns' sums, and make the other gradient."""
    grad, saved = piece(g, at, at + count), piece(x, at, at + count)
    slopes = piece(weights, column, column + count)
    here = piece(sums, column, column + count)
    for i in range(np.uintp(count)):
        here[i] += product(grad, saved, i)
    for i in range(np.uintp(count)):
        results[i] = element((grad, saved), slopes, (), i)


@inlined
def _gather(axes, k, array, at, count, line):
    """Copy elements of array number k from the place `at` on to a line."""
    known, item = array_at(axes, RANK + 1, np.int64), line.itemsize
    carry(known, k, array.ctypes.data, at, count, line.ctypes.data, item, False)


@inlined
def _scatter(axes, y, at, count, line):
    """Copy a line to y, from the place `at` on."""
    known, item = array_at(axes, RANK + 1, np.int64), line.itemsize
    carry(known, 0, y.ctypes.data, at, count, line.ctypes.data, item, True)


@inlined
def _clear(sums):
    for i in range(sums.size):
        sums[i] = 0.0


def prelu_backward_rows(g, x, w, y, total, axes, size, channels, inner, moved):
    """One weight a row of `inner` elements."""
    grad, saved = array_at(g, size, storage), array_at(x, size, storage)
    result = array_at(y, size, storage)
    weights = array_at(w, channels, compute)
    segments = -(-inner // SEGMENT)
    cells = size // inner * segments
    memory = _malloc(2 * cells * 8)
    if memory == 0:
        return 1
    sums = array_at(memory, cells, np.float64)
    errors = array_at(memory + cells * 8, cells, np.float64)
    operands = grad, saved, weights, result, axes, inner, segments, sums, errors
    spread(part, operands, cells, 1, moved)
    totals = array_at(total, channels, np.float64)
    lost = array_at(total + channels * 8, channels, np.float64)
    _clear(totals)
    _clear(lost)
    for cell in range(cells):
        channel = cell // segments % channels
        _add(totals, lost, channel, sums[cell], errors[cell])
    _free(memory)
    return 0


@inlined
def _segment(cell, inner, segments):
    """Return where a segment of a row begins and ends."""
    row = cell // segments
    begin = row * inner + cell % segments * SEGMENT
    return begin, smaller(begin + SEGMENT, (row + 1) * inner)


@inlined
def _fold(many, lost):
    """Add up the sums that were kept side by side."""
    half = LANES // 2
    while half > 0:
        for i in range(half):
            _add(many, lost, i, many[i + half], lost[i + half])
        half //= 2


def _rows(g, x, w, y, axes, inner, segments, sums, errors, first, last):
    many, lost = sum_buffer(y), sum_buffer(y)
    for cell in range(first, last):
        begin, end = _segment(cell, inner, segments)
        weight = w[cell // segments % w.size]
        _clear(many)
        _clear(lost)
        grad, saved = piece(g, begin, end), piece(x, begin, end)
        result = piece(y, begin, end)
        done = 0
        for start in range(0, end - begin, SUMMED):
            stop = smaller(start + SUMMED, end - begin)
            add_up(piece(grad, start, stop), piece(saved, start, stop), many, lost)
            stop = end_of_line(result, stop)  # a line waits until all of it is there
            whole = piece(result, done, stop)
            fill(whole, cut((grad, saved), done, stop), weight, ())
            done = stop
        _fold(many, lost)
        sums[cell], errors[cell] = many[0], lost[0]
    finished()


def _rows_apart(g, x, w, y, axes, inner, segments, sums, errors, first, last):
    many, lost = sum_buffer(y), sum_buffer(y)
    grads, saved, results = line_buffer(y), line_buffer(y), line_buffer(y)
    for cell in range(first, last):
        begin, end = _segment(cell, inner, segments)
        weight = w[cell // segments % w.size]
        _clear(many)
        _clear(lost)
        for start in range(begin, end, SUMMED):
            count = smaller(SUMMED, end - start)
            _gather(axes, 1, g, start, count, grads)
            _gather(axes, 2, x, start, count, saved)
            both = cut((grads, saved), 0, count)
            add_up(piece(grads, 0, count), piece(saved, 0, count), many, lost)
            fill(piece(results, 0, count), both, weight, ())
            _scatter(axes, y, start, count, results)
        _fold(many, lost)
        sums[cell], errors[cell] = many[0], lost[0]


def prelu_backward_columns(g, x, w, y, total, axes, size, channels, inner, moved):
    """One weight for each `inner` columns; the rows are `channels * inner` long.

    Short ones are taken together until the loops over them are worth starting.
    """
    grad, saved = array_at(g, size, storage), array_at(x, size, storage)
    result = array_at(y, size, storage)
    weights = array_at(w, channels, compute)
    length = channels * inner
    width = (smaller(TOGETHER, size) // length or 1) * length
    columns = smaller(width, SEGMENT_COLUMNS)
    rows = larger(BLOCK_ROWS, smaller(size // BLOCKS, BLOCK) // columns)
    cells = -(-size // (rows * width)) * width
    copies = 2 if columns == width else 1  # where a strip may end in the next row
    memory = _malloc((2 * cells + copies * width) * 8 + 64)
    if memory == 0:
        return 1
    start = -(-memory // 64) * 64
    sums = array_at(start, cells, np.float64)
    errors = array_at(start + cells * 8, cells, np.float64)
    wide = array_at(start + cells * 16, copies * width, compute)
    repeat(weights, inner, wide)
    operands = grad, saved, wide, result, axes, width, rows, sums, errors
    spread(part, operands, cells // width * -(-width // columns), 1, moved)
    totals, lost = piece(sums, 0, length), piece(errors, 0, length)
    for first in range(length, cells, length):
        more, behind = piece(sums, first, cells), piece(errors, first, cells)
        for column in range(length):
            _add(totals, lost, column, more[column], behind[column])
    answer = array_at(total, 2 * channels, np.float64)
    for channel in range(channels):
        first = channel * inner
        value, error = totals[first], lost[first]  # in registers: memory is a long way
        for column in range(first + 1, first + inner):
            before = value
            value += totals[column]
            error += _lost(before, totals[column], value) + lost[column]
        answer[channel], answer[channels + channel] = value, error
    _free(memory)
    return 0


@inlined
def _keep(few, totals, errors):
    """Add sums of a few products, and start them anew."""
    for i in range(totals.size):
        _add(totals, errors, i, few[i], -0.0)
        few[i] = 0.0


def _columns(g, x, wide, y, axes, width, rows, sums, errors, first, last):
    """Go from strip to strip, and across the ends of rows.

    What a strip has of the next row waits behind the sums of this one.
    """
    few = piece(column_buffer(y), 0, smaller(width, SEGMENT_COLUMNS) + STRIP)
    _clear(few)
    buffer = strip_buffer(y)
    segments = -(-width // SEGMENT_COLUMNS)
    for cell in range(first, last):
        block, left = cell // segments, cell % segments * SEGMENT_COLUMNS
        right = smaller(left + SEGMENT_COLUMNS, width)
        columns = right - left
        weights = piece(wide, left, wide.size)
        totals = piece(sums, block * width + left, block * width + right)
        lost = piece(errors, block * width + left, block * width + right)
        _clear(totals)
        _clear(lost)
        at = block * rows * width + left
        end = smaller((block + 1) * rows * width, g.size) - width + right
        column = done = 0
        while at < end:
            room = end - at if segments == 1 else columns - column
            # Those before the first line are no strip, nor are the last ones.
            count = room if room < STRIP else before_line(piece(y, at, end))
            if count > 0:
                add_up(g, x, weights, few, buffer, at, column, count)
                for j in range(np.uintp(count)):
                    y[np.uintp(at) + j] = buffer[j]
                at += count
                column += count
            strips = smaller((room - count) // STRIP, -(-(columns - column) // STRIP))
            for _ in range(strips):
                add_up(g, x, weights, few, buffer, at, column, STRIP)
                write_strip(y, np.uintp(at), buffer)
                at += STRIP
                column += STRIP
            if column >= columns:
                done += 1
                if done % FEW_ROWS == 0:
                    _keep(few, totals, lost)
                column -= columns
                for i in range(column):
                    few[i] += few[columns + i]
                    few[columns + i] = 0.0
                at += width - columns
        _keep(few, totals, lost)
    finished()


def _columns_apart(g, x, wide, y, axes, width, rows, sums, errors, first, last):
    few = piece(column_buffer(y), 0, smaller(width, SEGMENT_COLUMNS))
    grads, saved, results = line_buffer(y), line_buffer(y), line_buffer(y)
    _clear(few)
    segments = -(-width // SEGMENT_COLUMNS)
    for cell in range(first, last):
        block, left = cell // segments, cell % segments * SEGMENT_COLUMNS
        right = smaller(left + SEGMENT_COLUMNS, width)
        weights = piece(wide, left, wide.size)
        totals = piece(sums, block * width + left, block * width + right)
        lost = piece(errors, block * width + left, block * width + right)
        _clear(totals)
        _clear(lost)
        end = smaller((block + 1) * rows * width, g.size)
        for done, row in enumerate(range(block * rows * width, end, width)):
            last_one = smaller(row + right, end)
            for start in range(row + left, last_one, SUMMED):
                count = smaller(SUMMED, last_one - start)
                _gather(axes, 1, g, start, count, grads)
                _gather(axes, 2, x, start, count, saved)
                column = start - row - left
                add_up(grads, saved, weights, few, results, 0, column, count)
                _scatter(axes, y, start, count, results)
            if (done + 1) % FEW_ROWS == 0:
                _keep(few, totals, lost)
        _keep(few, totals, lost)


# What works on a part of flat arrays, on one of others, and what adds up.
PARTS = {
    prelu_backward_rows: (_rows, _rows_apart, one_weight),
    prelu_backward_columns: (_columns, _columns_apart, own_weights),
}
ELEMENT_OF = {prelu_backward_rows: with_one, prelu_backward_columns: with_each}


@inlined
def total_of(total, error):
    """Return a sum with what it has lost."""
    # Past an infinity or a NaN the errors are NaN and say nothing.
    return total + error if np.isfinite(total) else total


# Half floats' weights, for calls from compiled code: WEIGHTS_SIGNATURE.


def widen_weights(weights, slopes, channels):
    """Write the slopes in the type of the products."""
    given = array_at(weights, channels, storage)
    wide = array_at(slopes, channels, compute)
    for channel in range(channels):
        wide[channel] = load(given[channel])


def round_sums(total, result, channels):
    """Round sums, and behind them what they have lost, once to half floats."""
    sums = array_at(total, 2 * channels, np.float64)
    halves = array_at(result, channels, storage)
    for channel in range(channels):
        halves[channel] = store(
            round_to_odd(total_of(sums[channel], sums[channels + channel]))
        )
