"""From a formula to loops over arrays.

A *body* applies a function of the catalogue to a part of flat arrays.  A *driver* reads
what it is called with and spreads the parts over the team of threads.  All drivers are
called with the address of one row of *words* (below), so that the number and the kinds
of operands are data.  Every combination is compiled when it is first needed and kept on
the disk.

All bodies have one signature, so that one set of drivers serves them all:

    body(a, b, y, s, inner, start)

`a` is a tuple with the part from `start` on of each array of the result's shape (x, or
the gradient and what was saved), `b` all of what else goes with them (mask bits or
weights), `s` the tuple of numbers, `inner` how many elements in a row have one weight,
and `y` receives the results.
"""

from typing import Any

import numba
import numpy as np
from numba import types

from fastrelu.cpu.jit import (
    array_at,
    first_of,
    inlined,
    larger,
    piece,
    pointer_to,
    second_of,
    smaller,
    third_of,
)
from fastrelu.cpu.threads import spread
from fastrelu.cpu.vector import STRIP, buffer, pack, put_word, unpack, unsigned

TILE = 4096  # elements that are not shared: what is, is cut at their multiples
MASKED = 1024  # elements whose bits are unpacked before the rest is done
NARROW = 64  # rows of a weight shorter than this are better treated as columns,
SHORT, MANY, MANY_SUMMED = 256, 4, 16  # or than this, if there are many of each weight;
WIDE = 2048  # columns whose weights are laid out at once

# Where a loop writes: to another array, to one beyond the cache, or where it reads.
TARGETS = PLAIN, PAST_CACHE, IN_PLACE = "plain", "past_cache", "in_place"
APART = "apart"  # by way of a buffer to elements that are not contiguous: sums only

# The words that a driver is called with.  Arrays are addresses, numbers float64.
Y, SIZE, MOVED, BESIDE, CHANNELS, INNER, NUMBERS = range(7)  # BESIDE: bits or weights
MOST_NUMBERS, MOST_ARRAYS = 2, 3
ARRAYS = NUMBERS + MOST_NUMBERS
# What has no flat layout also says how it lies, strides in bytes, of weights too, and
# which loop takes its lines.
_MORE = ARRAYS + MOST_ARRAYS
COUNT, ITEMSIZE, WEIGHT_SIZE, LOOP, NDIM, SHAPE, Y_STRIDES = range(_MORE, _MORE + 7)
STRIDES = Y_STRIDES + 1
BESIDE_STRIDES = STRIDES + MOST_ARRAYS
LENGTH = BESIDE_STRIDES + 1

SIGNATURE = types.void(types.int64)

words = pointer_to(types.CPointer(types.int64))
floats = pointer_to(types.CPointer(types.float64))
strip_buffer, rest_buffer = buffer(STRIP), buffer(STRIP)
flag_buffer = buffer(MASKED + 2 * STRIP, numba.uint8)
bit_buffer = buffer(STRIP, unsigned)
weight_buffer = buffer(WIDE)

# The names the bodies and drivers below leave open; `build` binds them.
formula: Any
active: Any
body: Any
part: Any
beside: Any
arrays_of: Any
numbers_of: Any
kept: Any
get: Any
cut: Any
load: Any
store: Any
compute: Any
storage: Any
element: Any
lead_of: Any
finished: Any
write_strip: Any
fill: Any


# Operands -----------------------------------------------------------------------------
#
# Tuples have one length each to the compiler: a template for each.


def no_numbers(address):
    return ()


def one_number(address):
    return (compute(floats(address)[NUMBERS]),)


def two_numbers(address):
    return compute(floats(address)[NUMBERS]), compute(floats(address)[NUMBERS + 1])


def keep_none(s):
    return ()


def keep_one(s):
    return (s[0],)


def keep_two(s):
    return s[0], s[1]


def one_array(address, size):
    return (array_at(words(address)[ARRAYS], size, storage),)


def two_arrays(address, size):
    first = array_at(words(address)[ARRAYS], size, storage)
    return first, array_at(words(address)[ARRAYS + 1], size, storage)


def three_arrays(address, size):
    first = array_at(words(address)[ARRAYS], size, storage)
    second = array_at(words(address)[ARRAYS + 1], size, storage)
    return first, second, array_at(words(address)[ARRAYS + 2], size, storage)


def get_one(a, i):
    return (load(first_of(a)[i]),)


def get_two(a, i):
    return load(first_of(a)[i]), load(second_of(a)[i])


def get_three(a, i):
    return load(first_of(a)[i]), load(second_of(a)[i]), load(third_of(a)[i])


def cut_one(a, start, stop):
    return (piece(first_of(a), start, stop),)


def cut_two(a, start, stop):
    return piece(first_of(a), start, stop), piece(second_of(a), start, stop)


def cut_three(a, start, stop):
    x, saved = piece(first_of(a), start, stop), piece(second_of(a), start, stop)
    return x, saved, piece(third_of(a), start, stop)


# By how many there are; the first is that for none, or for one array.
OF_NUMBERS, KEEP = (
    (no_numbers, one_number, two_numbers),
    (keep_none, keep_one, keep_two),
)
OF_ARRAYS = one_array, two_arrays, three_arrays
GET, CUT = (get_one, get_two, get_three), (cut_one, cut_two, cut_three)


# Elements -----------------------------------------------------------------------------
#
# What is written at i: `b` is nothing, a number for all, or holds one for each element.


def of_arrays(a, b, s, i):
    return store(formula(*(get(a, i) + s)))


def with_one(a, b, s, i):
    return store(formula(*(get(a, i) + (b,) + s)))


def with_each(a, b, s, i):
    return store(formula(*(get(a, i) + (b[i],) + s)))


@inlined
def before_line(y):
    """Return how many elements lie before a cache line."""
    return -y.ctypes.data % 64 // y.itemsize


def to_line(y):
    """Return how many elements lie before a cache line, or 0 for a short array.

    Vectors that cross lines cost a tenth, less than one more loop over a short array.
    """
    return np.uintp(before_line(y) if y.size >= TILE else 0)


def at_once(y):
    """Return 0, for what comes in short pieces: no loop is made that never runs."""
    return np.uintp(0)


def fill_plain(y, a, b, s):
    lead = lead_of(y)
    for i in range(lead):
        y[i] = element(a, b, s, i)
    for i in range(lead, np.uintp(y.size)):
        y[i] = element(a, b, s, i)


def fill_past_cache(y, a, b, s):
    """Write whole cache lines to memory and leave the cache to others.

    They are made in registers, by way of a small buffer that the compiler sees through.
    """
    lead = smaller(before_line(y), y.size)
    for i in range(lead):
        y[i] = element(a, b, s, i)
    buffer = strip_buffer(y)
    whole = (y.size - lead) // STRIP
    for strip in range(np.uintp(whole)):  # unsigned: an index from the end is no option
        first = np.uintp(lead) + strip * np.uintp(STRIP)
        for j in range(np.uintp(STRIP)):
            buffer[j] = element(a, b, s, first + j)
        write_strip(y, first, buffer)
    for i in range(lead + whole * STRIP, y.size):
        y[i] = element(a, b, s, i)


def fill_in_place(y, a, b, s):
    """Write where an array is that is read: a strip is read before it is written.

    The compiler could not tell that it is y, or would leave out what a formula keeps.
    """
    lead, size = lead_of(y), np.uintp(y.size)
    whole = (size - lead) // np.uintp(STRIP)
    rest = rest_buffer(y)
    for first, stop in ((np.uintp(0), lead), (lead + whole * np.uintp(STRIP), size)):
        for j in range(stop - first):
            rest[j] = element(a, b, s, first + j)
        for j in range(stop - first):
            y[first + j] = rest[j]
    buffer = strip_buffer(y)
    for strip in range(whole):
        first = lead + strip * np.uintp(STRIP)
        for j in range(np.uintp(STRIP)):
            buffer[j] = element(a, b, s, first + j)
        write_strip(y, first, buffer)


FILLING = {
    PLAIN: fill_plain,
    PAST_CACHE: fill_past_cache,
    IN_PLACE: fill_in_place,
    APART: fill_plain,
}


# Bodies ------------------------------------------------------------------------------------


def plain(a, b, y, s, inner, start):
    fill(y, a, b, s)


@inlined
def end_of_line(y, stop):
    """Return the last place, not after stop, at which a cache line of y ends."""
    if stop >= y.size:
        return y.size
    return stop - (y.ctypes.data + stop * y.itemsize) % 64 // y.itemsize


def bit_at(a, s, i):
    return np.uint64(1 if active(*((load(first_of(a)[i]),) + kept(s))) else 0)


bit: Any  # bit_at, bound


def to_bits(a, b, y, s, inner, start):
    """Make the mask's bits together with the results, before these: y may be x.

    The lines of y start `lead` elements after the words of the mask.
    """
    lead = smaller(before_line(y), y.size)
    bits = piece(b, start // 8, b.size)
    shift, rest = np.uint64(lead), np.uint64(STRIP - lead)
    carry = np.uint64(0)
    for i in range(lead):
        carry |= bit(a, s, i) << np.uint64(i)
        y[i] = element(a, b, s, i)
    buffer, ones = strip_buffer(y), bit_buffer(y)
    whole = (y.size - lead) // STRIP
    for strip in range(np.uintp(whole)):
        first = np.uintp(lead) + strip * np.uintp(STRIP)
        for j in range(np.uintp(STRIP)):
            ones[j] = bit(a, s, first + j)
        for j in range(np.uintp(STRIP)):
            buffer[j] = element(a, b, s, first + j)
        flags = pack(ones)
        put_word(bits, strip, carry | flags << shift)
        carry = flags >> rest if lead > 0 else np.uint64(0)
        write_strip(y, first, buffer)
    first = lead + whole * STRIP
    flags = np.uint64(0)
    for i in range(first, y.size):
        flags |= bit(a, s, i) << np.uint64(i - first)
        y[i] = element(a, b, s, i)
    for place in range(-(-(y.size - whole * STRIP) // 8)):
        word = carry | flags << shift if place < 8 else flags >> rest
        bits[whole * 8 + place] = np.uint8(word >> np.uint64(place % 8 * 8))


def from_bits(a, b, y, s, inner, start):
    flags = flag_buffer(y)
    done = 0
    for first in range(0, y.size, MASKED):
        stop = end_of_line(y, smaller(first + MASKED, y.size))
        base = done // STRIP * STRIP
        whole = smaller(-(-(stop - base) // STRIP), (y.size - base) // STRIP)
        bits = piece(b, (start + base) // 8, b.size)
        unpack(bits, flags, whole)
        for i in range(whole * STRIP, stop - base):
            flags[i] = (bits[i // 8] >> np.uint8(i % 8)) & np.uint8(1)
        passes = piece(flags, done - base, flags.size)
        fill(piece(y, done, stop), cut(a, done, stop), passes, s)
        done = stop


@inlined
def repeat(w, inner, wide):
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


def rows(a, b, y, s, inner, start):
    """One weight a row of `inner` elements, as in (N, C, H, W)."""
    first = 0
    while first < y.size:
        row = (start + first) // inner
        last = smaller((row + 1) * inner - start, y.size)
        fill(piece(y, first, last), cut(a, first, last), b[row % b.size], s)
        first = last


def columns(a, b, y, s, inner, start):
    """One weight for each `inner` columns, as in (N, C).

    Short rows are taken together until a loop over them is worth starting, and long ones
    piece by piece.  Each part lays out its weights, at most WIDE at once: lines of another
    processor's cache would be slow to come.
    """
    width = b.size * inner
    length = (smaller(WIDE, y.size // 8) // width or 1) * width
    step = length
    if length > WIDE and inner > 1:
        channels = WIDE // inner
        channels = channels // 16 * 16 or channels  # whole cache lines, if it can be
        step = channels * inner
    for left in range(0, length, step):
        right = smaller(left + step, length)
        row = -(start % length)
        if row + right <= 0:  # the part begins behind this piece of its first row,
            row += length
        if row + left >= y.size:  # and ends before that of the next
            continue
        weights = b
        if length > b.size:
            weights = piece(weight_buffer(b), 0, right - left)
            repeat(piece(b, left // inner, b.size), inner, weights)
        for base in range(row + left, y.size, length):
            first, last = larger(base, 0), smaller(base + right - left, y.size)
            fit = piece(weights, first - base, last - base)
            fill(piece(y, first, last), cut(a, first, last), fit, s)


def each(a, b, y, s, inner, start):
    """Take a weight for each element, as a line has that is walked along."""
    fill(y, a, piece(b, start, start + y.size), s)


# The driver for flat arrays -----------------------------------------------------------
#
# A C function, called without the interpreter's lock.  The word MOVED says how many
# bytes it will read and write in all.  A part allocates nothing, so that nothing in it
# can fail.


@inlined
def nothing():
    pass


def flat(address):
    w = words(address)
    y = array_at(w[Y], w[SIZE], storage)
    operands = arrays_of(address, w[SIZE]), beside(address), y, numbers_of(address)
    spread(part, (*operands, w[INNER]), w[SIZE], TILE, w[MOVED])


def flat_part(a, b, y, s, inner, start, stop):
    body(cut(a, start, stop), b, piece(y, start, stop), s, inner, start)
    finished()


def beside_nothing(address):
    return 0


def beside_bits(address):
    w = words(address)
    return array_at(w[BESIDE], (w[SIZE] + 7) >> 3, np.uint8)


def beside_weights(address):
    w = words(address)
    return array_at(w[BESIDE], w[CHANNELS], compute)


# What lies beside the arrays, and what is written at each place.
BESIDE_OF = {
    plain: beside_nothing,
    to_bits: beside_bits,
    from_bits: beside_bits,
    rows: beside_weights,
    columns: beside_weights,
    each: beside_weights,
}
ELEMENT_OF = {
    plain: of_arrays,
    to_bits: of_arrays,
    from_bits: with_each,
    rows: with_one,
    columns: with_each,
    each: with_each,
}
