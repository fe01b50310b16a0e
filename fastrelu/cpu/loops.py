"""From a formula to compiled loops.

A *block* applies a formula to a part of flat arrays: in place, or to others, by way of
the cache or past it.  A *driver* spreads the parts over the team of threads.  Every
combination is compiled when it is first needed and kept in Numba's disk cache.

All blocks have one signature, so that one set of drivers serves them all:

    block(a, b, y, slope, start)

`a` is the part from `start` on of the array whose shape the result has (x, or the
gradient), `b` all of what goes with it (the saved array, mask bits, channel weights, or
`a` again), and `y` receives the results.
"""

import functools
from typing import Any

import numba
import numpy as np
from numba import types

from fastrelu._functions import rebuild
from fastrelu.cpu.jit import (
    Function,
    array_at,
    compile_and_keep,
    inlined,
    larger,
    piece,
    shielded,
    smaller,
)
from fastrelu.cpu.lanes import (
    WORD,
    Lane,
    buffer,
    fence,
    put_word,
    round_to_odd,
    store_word,
    stream_halves,
    stream_word,
    unpack,
)
from fastrelu.cpu.threads import spread

TILE = 4096  # elements that are not shared: what is, is cut at their multiples
SUMMED = 512  # elements that are summed before the rest is done
MASKED = 1024  # elements whose bits are unpacked before the rest is done
LANES = 32  # running sums kept side by side, so that a row's sum is vector work
FEW, FEW_ROWS = 4, 8  # products that are summed without compensation, and rows of them
SEGMENT = 1 << 14  # elements of a row summed on their own
BLOCK_ROWS = 64  # rows summed together where channels are the last axis, or more:
BLOCK = 1 << 17  # up to so many elements,
BLOCKS = 16  # while there are so many blocks
SEGMENT_COLUMNS = 1024
NARROW = 64  # rows of a weight shorter than this are better treated as columns,
SHORT, MANY, MANY_SUMMED = 256, 4, 16  # or than this, if there are many of each weight;
WIDE = 2048  # columns whose weights are laid out at once,
TOGETHER = 256  # and those of short rows that are summed together

# Where a loop writes: to another array, to one beyond the cache, or where it reads.
KINDS = PLAIN, PAST_CACHE, IN_PLACE = "plain", "past_cache", "in_place"

_malloc = types.ExternalFunction("PyMem_RawMalloc", types.int64(types.intp))
_free = types.ExternalFunction("PyMem_RawFree", types.void(types.int64))
word_buffer, rest_buffer = buffer(WORD), buffer(WORD)
flag_buffer = buffer(MASKED + 2 * WORD, numba.uint8)
sum_buffer = buffer(LANES, numba.float64)
column_buffer = buffer(SEGMENT_COLUMNS + WORD, numba.float64)
weight_buffer = buffer(WIDE)

# The names the blocks and drivers below leave open; `rebuild` binds them.
formula: Any
block: Any
part: Any
beside: Any
load: Any
store: Any
compute: Any
storage: Any
active: Any
element: Any
lead_of: Any
finished: Any
product: Any
add_up: Any
write_word: Any


# Elements -----------------------------------------------------------------------------
#
# What is written at i: `b` holds what goes with each element, `s` what all share.


def of_input(x, b, s, i):
    return store(formula(load(x[i]), s))


def of_gradient(grad, saved, s, i):
    return store(formula(load(grad[i]), load(saved[i]), s))


def of_flag(grad, flags, s, i):
    return store(formula(load(grad[i]), flags[i], s))


def of_weight(x, weights, s, i):
    return store(formula(load(x[i]), weights[i]))


def of_both(grad, saved, weights, i):
    return store(formula(load(grad[i]), load(saved[i]), weights[i]))


@inlined
def _before_line(y):
    """Return how many elements lie before a cache line."""
    return -y.ctypes.data % 64 // y.itemsize


def _to_line(y):
    """Return how many elements lie before a cache line, or 0 for a short array.

    Vectors that cross lines cost a tenth, less than one more loop over a short array.
    """
    return np.uintp(_before_line(y) if y.size >= TILE else 0)


def _at_once(y):
    """Return 0, for what comes in short pieces: no loop is made that never runs."""
    return np.uintp(0)


def fill(y, x, b, s):
    lead = lead_of(y)
    for i in range(lead):
        y[i] = element(x, b, s, i)
    for i in range(lead, np.uintp(x.size)):
        y[i] = element(x, b, s, i)


def fill_past_cache(y, x, b, s):
    """Write whole cache lines to memory and leave the cache to others.

    They are made in registers, by way of a small buffer that the compiler sees through.
    """
    lead = smaller(_before_line(y), x.size)
    for i in range(lead):
        y[i] = element(x, b, s, i)
    buffer = word_buffer(y)
    words = (x.size - lead) // WORD
    for word in range(np.uintp(words)):  # unsigned: an index from the end is no option
        first = np.uintp(lead) + word * np.uintp(WORD)
        for j in range(np.uintp(WORD)):
            buffer[j] = element(x, b, s, first + j)
        write_word(y, first, buffer)
    for i in range(lead + words * WORD, x.size):
        y[i] = element(x, b, s, i)


def fill_in_place(y, x, b, s):
    """Write where x is: a word is read before it is written.

    The compiler could not tell that x is y, or would leave out what a formula keeps.
    """
    lead, size = lead_of(y), np.uintp(x.size)
    words = (size - lead) // np.uintp(WORD)
    rest = rest_buffer(y)
    for first, stop in ((np.uintp(0), lead), (lead + words * np.uintp(WORD), size)):
        for j in range(stop - first):
            rest[j] = element(x, b, s, first + j)
        for j in range(stop - first):
            y[first + j] = rest[j]
    buffer = word_buffer(y)
    for word in range(words):
        first = lead + word * np.uintp(WORD)
        for j in range(np.uintp(WORD)):
            buffer[j] = element(x, b, s, first + j)
        write_word(y, first, buffer)


FILLING = {PLAIN: fill, PAST_CACHE: fill_past_cache, IN_PLACE: fill_in_place}


# Blocks -------------------------------------------------------------------------------


def forward(x, b, y, slope, start):
    fill(y, x, b, compute(slope))


def backward(grad, b, y, slope, start):
    fill(y, grad, piece(b, start, start + grad.size), compute(slope))


@inlined
def _end_of_line(y, stop):
    """Return the last place, not after stop, at which a cache line of y ends."""
    if stop >= y.size:
        return y.size
    return stop - (y.ctypes.data + stop * y.itemsize) % 64 // y.itemsize


def forward_mask(x, b, y, slope, start):
    """Make the bits in the same breath, before the results: they may go where x is.

    The lines of y start `lead` elements after the words of the mask.
    """
    rounded = compute(slope)
    lead = smaller(_before_line(y), x.size)
    bits = piece(b, start // 8, b.size)
    shift, rest = np.uint64(lead), np.uint64(WORD - lead)
    carry = np.uint64(0)
    for i in range(lead):
        carry |= np.uint64(load(x[i]) > 0) << np.uint64(i)
        y[i] = element(x, b, rounded, i)
    buffer = word_buffer(y)
    words = (x.size - lead) // WORD
    for word in range(np.uintp(words)):
        first = np.uintp(lead) + word * np.uintp(WORD)
        for j in range(np.uintp(WORD)):
            buffer[j] = element(x, b, rounded, first + j)
        flags = active(x, first)
        put_word(bits, word, carry | flags << shift)
        carry = flags >> rest if lead > 0 else np.uint64(0)
        write_word(y, first, buffer)
    first = lead + words * WORD
    flags = np.uint64(0)
    for i in range(first, x.size):
        flags |= np.uint64(load(x[i]) > 0) << np.uint64(i - first)
        y[i] = element(x, b, rounded, i)
    for place in range(-(-(x.size - words * WORD) // 8)):
        word = carry | flags << shift if place < 8 else flags >> rest
        bits[words * 8 + place] = np.uint8(word >> np.uint64(place % 8 * 8))


def backward_mask(grad, b, y, slope, start):
    rounded = compute(slope)
    flags = flag_buffer(y)
    done = 0
    for first in range(0, grad.size, MASKED):
        stop = _end_of_line(y, smaller(first + MASKED, grad.size))
        base = done // WORD * WORD
        words = smaller(-(-(stop - base) // WORD), (grad.size - base) // WORD)
        bits = piece(b, (start + base) // 8, b.size)
        unpack(bits, flags, words)
        for i in range(words * WORD, stop - base):
            flags[i] = (bits[i // 8] >> np.uint8(i % 8)) & np.uint8(1)
        active = piece(flags, done - base, flags.size)
        fill(piece(y, done, stop), piece(grad, done, stop), active, rounded)
        done = stop


@inlined
def widen(w, inner, wide):
    """Repeat each weight `inner` times, and all of them until `wide` is full."""
    if inner == 1:
        for start in range(0, wide.size, w.size):
            for channel in range(np.uintp(w.size)):
                wide[np.uintp(start) + channel] = w[channel]
        return
    for row in range(wide.size // inner):
        weight = w[row % w.size]
        for column in range(np.uintp(inner)):
            wide[np.uintp(row * inner) + column] = weight


def rows(x, b, y, slope, start):
    """One weight a row of `slope` elements, as in (N, C, H, W)."""
    first = 0
    while first < x.size:
        row = (start + first) // slope
        last = smaller((row + 1) * slope - start, x.size)
        fill(piece(y, first, last), piece(x, first, last), b, b[row % b.size])
        first = last


def columns(x, b, y, slope, start):
    """One weight for each `slope` columns, as in (N, C).

    Short rows are taken together until a loop over them is worth starting, and long ones
    piece by piece.  Each part lays out its weights, at most WIDE at once: lines of another
    processor's cache would be slow to come.
    """
    width = b.size * slope
    length = (smaller(WIDE, x.size // 8) // width or 1) * width
    step = length
    if length > WIDE and slope > 1:
        channels = WIDE // slope
        channels = channels // 16 * 16 or channels  # whole cache lines, if it can be
        step = channels * slope
    for left in range(0, length, step):
        right = smaller(left + step, length)
        row = -(start % length)
        if row + right <= 0:  # the part begins behind this piece of its first row,
            row += length
        if row + left >= x.size:  # and ends before that of the next
            continue
        weights = b
        if length > b.size:
            weights = piece(weight_buffer(b), 0, right - left)
            widen(piece(b, left // slope, b.size), slope, weights)
        for base in range(row + left, x.size, length):
            first, last = larger(base, 0), smaller(base + right - left, x.size)
            fit = piece(weights, first - base, last - base)
            fill(piece(y, first, last), piece(x, first, last), fit, slope)


# Drivers ------------------------------------------------------------------------------
#
# C functions: they take the addresses of their arrays and spread their part over the
# team.  `moved` says how many bytes they will read and write in all.  A part allocates
# nothing, so that nothing in it can fail.


@inlined
def _nothing():
    pass


def flat(a, b, y, size, channels, inner, slope, moved):
    x, result = array_at(a, size, storage), array_at(y, size, storage)
    spread(part, (x, beside(b, x), result, slope), size, TILE, moved)


def by_channel(a, w, y, size, channels, inner, slope, moved):
    """One weight for each row of `inner` elements, or for as many columns."""
    x, result = array_at(a, size, storage), array_at(y, size, storage)
    weights = array_at(w, channels, compute)
    spread(part, (x, weights, result, inner), size, TILE, moved)


def _part(a, b, y, slope, start, stop):
    block(piece(a, start, stop), b, piece(y, start, stop), slope, start)
    finished()


def _itself(b, x):
    return x


def _saved(b, x):
    return array_at(b, x.size, storage)


def _bits(b, x):
    return array_at(b, (x.size + 7) >> 3, np.uint8)


# What lies at `b`.
BESIDE: dict[Any, Function] = {
    backward: _saved,
    forward_mask: _bits,
    backward_mask: _bits,
}

SIGNATURE = types.void(*[types.int64] * 3, *[types.intp] * 3, types.float64, types.intp)
WEIGHTS_SIGNATURE = types.void(types.int64, types.int64, types.intp)
BACKWARD_SIGNATURE = types.int64(*[types.int64] * 5, *[types.intp] * 4)
DRIVERS = {rows: by_channel, columns: by_channel}  # flat for the others


# PReLU's backward pass ----------------------------------------------------------------
#
# The weight gradient is summed in float64.  A few products are added up as they are, and
# their sum with Neumaier's compensation (doi:10.1002/zamm.19740540106, in Knuth's
# branch-free form), so that the error does not grow with the number of elements.  Which
# of them are summed together follows from the shape alone: neither the number of
# threads nor the width of the processor's vectors can change a bit.
#
# These drivers, too, take addresses; at `total` go the sums, a float64 for each channel,
# and behind them what each has lost.  They return 0, or 1 where there is no memory for
# partial sums.
#
# A piece of a row is summed and then, while it is in the first cache, gone over again for
# the other gradient, with the loops that write all other results.  Where each column has
# a sum of its own, a word's two gradients are made together.


@inlined
def _error(a, b, total):
    """Return what was lost in total = a + b."""
    shadow = total - a
    return (a - (total - shadow)) + (b - shadow)


@inlined
def _add(sums, errors, i, value, error):
    """Add a sum and its error to sum i; an error of -0.0 costs nothing."""
    total = sums[i] + value
    errors[i] += _error(sums[i], value, total) + error
    sums[i] = total


def _product(g, x, i):
    """Return the part of element i in its weight's gradient."""
    value = load(x[i])
    product = numba.float64(value) * numba.float64(load(g[i]))
    if value > 0:  # Python 3.14 makes two ways of a conditional expression here
        product = 0.0
    return product


def _one_weight(g, x, sums, errors):
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


def _own_weights(g, x, weights, sums, results, at, column, count):
    """Add so many elements to their columns' sums, and make the other gradient."""
    grad, saved = piece(g, at, at + count), piece(x, at, at + count)
    slopes = piece(weights, column, column + count)
    here = piece(sums, column, column + count)
    for i in range(np.uintp(count)):
        here[i] += product(grad, saved, i)
    for i in range(np.uintp(count)):
        results[i] = element(grad, saved, slopes, i)


@inlined
def _clear(sums):
    for i in range(sums.size):
        sums[i] = 0.0


def prelu_backward_rows(g, x, w, y, total, size, channels, inner, moved):
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
    operands = grad, saved, weights, result, inner, segments, sums, errors
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


def _prelu_backward_rows(g, x, w, y, inner, segments, sums, errors, first, last):
    many, lost = sum_buffer(y), sum_buffer(y)
    for cell in range(first, last):
        row = cell // segments
        weight = w[row % w.size]
        _clear(many)
        _clear(lost)
        begin = row * inner + cell % segments * SEGMENT
        end = smaller(begin + SEGMENT, (row + 1) * inner)
        grad, saved = piece(g, begin, end), piece(x, begin, end)
        result = piece(y, begin, end)
        done = 0
        for start in range(0, end - begin, SUMMED):
            stop = smaller(start + SUMMED, end - begin)
            add_up(piece(grad, start, stop), piece(saved, start, stop), many, lost)
            stop = _end_of_line(result, stop)  # a line waits until all of it is there
            whole = piece(result, done, stop)
            fill(whole, piece(grad, done, stop), piece(saved, done, stop), weight)
            done = stop
        half = LANES // 2
        while half > 0:
            for i in range(half):
                _add(many, lost, i, many[i + half], lost[i + half])
            half //= 2
        sums[cell], errors[cell] = many[0], lost[0]
    finished()


def prelu_backward_columns(g, x, w, y, total, size, channels, inner, moved):
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
    copies = 2 if columns == width else 1  # where a word may end in the next row
    memory = _malloc((2 * cells + copies * width) * 8 + 64)
    if memory == 0:
        return 1
    start = -(-memory // 64) * 64
    sums = array_at(start, cells, np.float64)
    errors = array_at(start + cells * 8, cells, np.float64)
    wide = array_at(start + cells * 16, copies * width, compute)
    widen(weights, inner, wide)
    operands = grad, saved, wide, result, width, rows, sums, errors
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
            error += _error(before, totals[column], value) + lost[column]
        answer[channel], answer[channels + channel] = value, error
    _free(memory)
    return 0


@inlined
def _gather(few, totals, errors):
    """Add sums of a few products, and start them anew."""
    for i in range(totals.size):
        _add(totals, errors, i, few[i], -0.0)
        few[i] = 0.0


def _prelu_backward_columns(g, x, wide, y, width, rows, sums, errors, first, last):
    """Go from word to word, and across the ends of rows.

    What a word has of the next row waits behind the sums of this one.
    """
    few = piece(column_buffer(y), 0, smaller(width, SEGMENT_COLUMNS) + WORD)
    _clear(few)
    buffer = word_buffer(y)
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
            # Those before the first line are no word, nor are the last ones.
            count = room if room < WORD else _before_line(piece(y, at, end))
            if count > 0:
                add_up(g, x, weights, few, buffer, at, column, count)
                for j in range(np.uintp(count)):
                    y[np.uintp(at) + j] = buffer[j]
                at += count
                column += count
            words = smaller((room - count) // WORD, -(-(columns - column) // WORD))
            for _ in range(words):
                add_up(g, x, weights, few, buffer, at, column, WORD)
                write_word(y, np.uintp(at), buffer)
                at += WORD
                column += WORD
            if column >= columns:
                done += 1
                if done % FEW_ROWS == 0:
                    _gather(few, totals, lost)
                column -= columns
                for i in range(column):
                    few[i] += few[columns + i]
                    few[columns + i] = 0.0
                at += width - columns
        _gather(few, totals, lost)
    finished()


PARTS: dict[Function, tuple[Function, Function]] = {
    prelu_backward_rows: (_prelu_backward_rows, _one_weight),
    prelu_backward_columns: (_prelu_backward_columns, _own_weights),
}
ELEMENTS = {
    forward: of_input,
    backward: of_gradient,
    forward_mask: of_input,
    backward_mask: of_flag,
    rows: of_input,
    columns: of_weight,
    prelu_backward_rows: of_gradient,
    prelu_backward_columns: of_both,
}


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


# Building -----------------------------------------------------------------------------


def _names(lane: Lane) -> dict[str, Any]:
    """Return what a lane binds."""
    return {
        "load": lane.load,
        "store": lane.store,
        "compute": lane.compute,
        "storage": lane.storage.type,
        "active": lane.active,
    }


def bound(block: Function, formula: Function, lane: Lane, kind: str) -> Function:
    """Return a driver whose open names are bound, for Numba to compile.

    In the place of a block may be one of the drivers in `PARTS`, which have none.
    """
    driver = block if block in PARTS else DRIVERS.get(block, flat)
    stream = stream_halves if lane.name == "float16" else stream_word
    names = {
        **_names(lane),
        "finished": fence if kind == PAST_CACHE else _nothing,
        "write_word": stream if kind == PAST_CACHE else store_word,
        "formula": inlined(formula),
    }
    parts = *(part.__name__ for part in (driver, block, formula)), lane.name, kind

    def bind(name: str, template: Any) -> None:
        """Bind one more name; the template may use those before it."""
        names[name] = inlined(rebuild(template, name, names))

    bind("element", ELEMENTS[block])
    bind("lead_of", _to_line if block in (forward, backward, rows) else _at_once)
    bind("fill", FILLING[kind])
    if driver is block:
        template, loop = PARTS[driver]
        bind("product", _product)
        bind("add_up", loop)
        bind("part", template)
    else:
        bind("beside", BESIDE.get(block, _itself))
        bind("block", block)
        bind("part", _part)
    return rebuild(driver, "_".join(parts), names)


# The outer cache answers at once.  The inner one knows what came of a call that was
# interrupted, and hands what two threads want at once to both.
@functools.cache
@shielded
@functools.cache
def compiled(block: Function, formula: Function, lane: Lane, kind: str = PLAIN) -> Any:
    """Return one compiled loop, a C function."""
    return compile_and_keep(
        bound(block, formula, lane, kind),
        BACKWARD_SIGNATURE if block in PARTS else SIGNATURE,
    )


@functools.cache
@shielded
@functools.cache
def compiled_for(lane: Lane, template: Function) -> Any:
    """Return a C function that converts a lane's weights."""
    name = f"{template.__name__}_{lane.name}"
    return compile_and_keep(rebuild(template, name, _names(lane)), WEIGHTS_SIGNATURE)
