"""Arrays of any layout: each is read and written where it lies.

Axes that lie behind one another in every array are merged.  What is left is gone over
line by line, along the innermost axis: each line is given to a loop over flat arrays.
Elements that are not contiguous go by way of a buffer that fits the first cache.  Where
the order matters, of a mask's bits and of sums, all elements do, in that order.
"""

import numpy as np
from numba import types

from fastrelu.cpu.jit import array_at, calling, inlined, smaller
from fastrelu.cpu.loops import (
    ARRAYS,
    BESIDE,
    BESIDE_STRIDES,
    CHANNELS,
    COUNT,
    INNER,
    ITEMSIZE,
    LENGTH,
    LOOP,
    MOST_ARRAYS,
    MOST_NUMBERS,
    MOVED,
    NDIM,
    NUMBERS,
    SHAPE,
    SIGNATURE,
    SIZE,
    TILE,
    WEIGHT_SIZE,
    Y_STRIDES,
    Y,
    words,
)
from fastrelu.cpu.threads import spread
from fastrelu.cpu.vector import buffer

LINE = 128  # elements of a line that go through the buffers at once
LONG_LINE = 512  # and of all lines together, where their order matters
BRIEF = 16  # an axis shorter than this is no line if there is a longer one
MOST_AXES = 48  # longer than 1: with more, an array would have 2^48 elements
# What is known of an axis: its length, and the strides of y, the arrays, and the weights.
STRIDE = 1
FIELDS = STRIDE + 1 + MOST_ARRAYS + 1
_BESIDE = FIELDS - 1

RANK = MOST_AXES * FIELDS  # how many axes there are, behind what is known of them
axes_buffer = buffer(RANK + 1, types.int64)
counts_buffer, _places = buffer(MOST_AXES, types.int64), buffer(FIELDS, types.int64)
_words = buffer(LENGTH, types.int64)
_lines = buffer((FIELDS - STRIDE) * LINE, types.int64)
_long_lines = buffer((1 + MOST_ARRAYS) * LONG_LINE, types.int64)
_call_loop = calling(SIGNATURE)


@inlined
def _magnitude(stride):
    return stride if stride > 0 else -stride


@inlined
def _copy(axes, source, target):
    for k in range(FIELDS):
        axes[target * FIELDS + k] = axes[source * FIELDS + k]


@inlined
def _merge(address, axes):
    """Write the axes to go along, the largest stride of y first; return how many."""
    w, rank = words(address), 0
    for axis in range(w[NDIM]):
        length = words(w[SHAPE])[axis]
        if length == 1:
            continue
        place, stride = rank, _magnitude(words(w[Y_STRIDES])[axis])
        while place > 0 and _magnitude(axes[(place - 1) * FIELDS + STRIDE]) < stride:
            _copy(axes, place - 1, place)
            place -= 1
        axes[place * FIELDS] = length
        for k in range(FIELDS - STRIDE):
            strides = w[Y_STRIDES + k]
            stride = words(strides)[axis] if strides != 0 else 0
            axes[place * FIELDS + STRIDE + k] = stride
        rank += 1
    last = 0
    for axis in range(1, rank):
        together, length = True, axes[axis * FIELDS]
        for k in range(STRIDE, FIELDS):
            reach = axes[axis * FIELDS + k] * length
            together = together and axes[last * FIELDS + k] == reach
        if together:
            length *= axes[last * FIELDS]
        else:
            last += 1
        _copy(axes, axis, last)
        axes[last * FIELDS] = length
    return last + 1 if rank > 0 else 0


@inlined
def _move_as(dtype, width, source, step, target, to_step, count):
    """Copy elements of a dtype that is so many bytes wide."""
    if step == width and to_step == width:
        values, copies = array_at(source, count, dtype), array_at(target, count, dtype)
        for i in range(np.uintp(count)):
            copies[i] = values[i]
    else:
        for i in range(count):
            value = array_at(source + i * step, 1, dtype)[0]
            array_at(target + i * to_step, 1, dtype)[0] = value


@inlined
def _move(source, step, target, to_step, count, itemsize):
    """Copy elements of so many bytes from one line to another."""
    if itemsize == 4:
        _move_as(np.uint32, 4, source, step, target, to_step, count)
    elif itemsize == 8:
        _move_as(np.uint64, 8, source, step, target, to_step, count)
    elif itemsize == 2:
        _move_as(np.uint16, 2, source, step, target, to_step, count)
    else:
        _move_as(np.uint8, 1, source, step, target, to_step, count)


@inlined
def carry(axes, k, start, at, count, line, itemsize, back):
    """Copy elements from the place `at` on to a line, or back from it.

    Places are counted in the order of the axes.  The array is number k, and y number 0.
    """
    counts = counts_buffer(axes)
    last = (axes[RANK] - 1) * FIELDS
    length, step = axes[last], axes[last + STRIDE + k]
    column, row = at % length, at // length
    for axis in range(last - FIELDS, -1, -FIELDS):
        counts[axis // FIELDS] = row % axes[axis]
        start += row % axes[axis] * axes[axis + STRIDE + k]
        row //= axes[axis]
    done = 0
    while done < count:
        few = smaller(length - column, count - done)
        here, there = start + column * step, line + done * itemsize
        if back:
            _move(there, itemsize, here, step, few, itemsize)
        else:
            _move(here, step, there, itemsize, few, itemsize)
        done += few
        column = 0
        for axis in range(last - FIELDS, -1, -FIELDS):
            start += axes[axis + STRIDE + k]
            counts[axis // FIELDS] += 1
            if counts[axis // FIELDS] < axes[axis]:
                break
            start -= counts[axis // FIELDS] * axes[axis + STRIDE + k]
            counts[axis // FIELDS] = 0


# What `look` finds, added up.
FLAT, SIMPLE, ORDERED = 1, 2, 4


def look(address):
    """Say how all arrays lie: flat along y, and in its order as far as the first does.

    SIMPLE says that each axis of y steps over the finer ones.

    A C function of its own, so that its memory on the stack is not a loop's caller's.
    """
    w = words(address)
    axes = axes_buffer(array_at(address, LENGTH, np.int64))
    rank, itemsize, found = _merge(address, axes), w[ITEMSIZE], FLAT
    if rank > 1:
        found = 0
    for k in range(w[COUNT] + 1 if rank == 1 else 0):
        if axes[STRIDE + k] != itemsize:
            found = 0
    reach, beyond, simple, ordered = itemsize, 0, SIMPLE, ORDERED
    for axis in range(rank - 1, -1, -1):
        stride = _magnitude(axes[axis * FIELDS + STRIDE])
        if stride < reach:
            simple = 0
        reach += stride * (axes[axis * FIELDS] - 1)
        stride = _magnitude(axes[axis * FIELDS + STRIDE + 1])
        if stride <= beyond:
            ordered = 0
        beyond = stride
    return found + simple + ordered


LOOK_SIGNATURE = types.int64(types.int64)


@inlined
def _choose_line(axes, rank):
    """Make a longer axis the innermost one if that is a short one."""
    last = rank - 1
    if axes[last * FIELDS] >= BRIEF:
        return
    longest = last
    for axis in range(rank):
        if axes[axis * FIELDS] > axes[longest * FIELDS]:
            longest = axis
    for k in range(FIELDS):
        first, second = longest * FIELDS + k, last * FIELDS + k
        axes[first], axes[second] = axes[second], axes[first]


def walk(address):
    w = words(address)
    axes = axes_buffer(array_at(address, LENGTH, np.int64))
    axes[RANK] = rank = _merge(address, axes)
    if w[BESIDE] != 0 and w[BESIDE_STRIDES] == 0:
        spread(walk_along_bits, (address, axes), w[SIZE], TILE, w[MOVED])
        return
    _choose_line(axes, rank)
    spread(walk_part, (address, axes, rank), w[SIZE], TILE, w[MOVED])


@inlined
def walk_along_bits(address, axes, start, stop):
    """Go along the bits of a mask, which are in the order of the axes."""
    w, itemsize = words(address), words(address)[ITEMSIZE]
    line, lines = _words(axes), _long_lines(axes)
    for k in range(MOST_NUMBERS):
        line[NUMBERS + k] = w[NUMBERS + k]
    line[MOVED], line[INNER], line[Y] = 0, 1, lines.ctypes.data
    for k in range(w[COUNT]):
        line[ARRAYS + k] = lines.ctypes.data + (1 + k) * 8 * LONG_LINE
    for at in range(start, stop, LONG_LINE):
        count = smaller(stop - at, LONG_LINE)
        line[SIZE] = line[CHANNELS] = count
        line[BESIDE] = w[BESIDE] + at // 8
        for k in range(w[COUNT]):
            source, target = w[ARRAYS + k], line[ARRAYS + k]
            carry(axes, 1 + k, source, at, count, target, itemsize, False)
        _call_loop(w[LOOP], (line.ctypes.data,))
        carry(axes, 0, w[Y], at, count, line[Y], itemsize, True)


def view(address, place):
    """Write the axes to `place`, and among the words with which elements weights go.

    That is (outer, channel, inner), all in the order of y.  Return 0 where there is no
    such view: the axes along which the weight varies are apart, or in another order.
    """
    w, axes = words(address), words(place)
    axes[RANK] = rank = _merge(address, axes)
    channels, inner = 1, 1
    for axis in range(rank - 1, -1, -1):
        length, step = axes[axis * FIELDS], axes[axis * FIELDS + _BESIDE]
        if step != 0:
            if step != channels * w[WEIGHT_SIZE]:
                return 0
            channels *= length
        elif channels == 1:
            inner *= length
        elif channels < w[CHANNELS]:
            return 0
    w[INNER] = inner
    return 1


VIEW_SIGNATURE = types.int64(types.int64, types.int64)


@inlined
def walk_part(address, axes, rank, start, stop):
    """Go along lines; `places` says where the present one starts in each array."""
    w, itemsize = words(address), words(address)[ITEMSIZE]
    counts, places, line, lines = (
        counts_buffer(axes),
        _places(axes),
        _words(axes),
        _lines(axes),
    )
    last = (rank - 1) * FIELDS
    length, row = axes[last], start // axes[last]
    column, at = start % length, start
    places[STRIDE], places[_BESIDE] = w[Y], w[BESIDE]
    for k in range(MOST_ARRAYS):
        places[STRIDE + 1 + k] = w[ARRAYS + k]
    for k in range(MOST_NUMBERS):
        line[NUMBERS + k] = w[NUMBERS + k]
    line[MOVED], line[INNER] = 0, 1
    for axis in range(rank - 2, -1, -1):
        counts[axis] = row % axes[axis * FIELDS]
        row //= axes[axis * FIELDS]
        for k in range(STRIDE, FIELDS):
            places[k] += counts[axis] * axes[axis * FIELDS + k]
    most = LINE
    if axes[last + STRIDE] == itemsize and w[BESIDE] == 0:
        most = length
        for k in range(w[COUNT]):
            if axes[last + STRIDE + 1 + k] != itemsize:
                most = LINE
    while at < stop:
        count = smaller(smaller(length - column, stop - at), most)
        line[SIZE] = line[CHANNELS] = count
        for k in range(w[COUNT]):
            step = axes[last + STRIDE + 1 + k]
            source = places[STRIDE + 1 + k] + column * step
            if step != itemsize:
                copy = lines.ctypes.data + (1 + k) * 8 * LINE
                _move(source, step, copy, itemsize, count, itemsize)
                source = copy
            line[ARRAYS + k] = source
        if w[BESIDE] != 0:
            step, width = axes[last + _BESIDE], w[WEIGHT_SIZE]
            source = places[_BESIDE] + column * step
            if step != width:
                copy = lines.ctypes.data + (1 + MOST_ARRAYS) * 8 * LINE
                _move(source, step, copy, width, count, width)
                source = copy
            line[BESIDE] = source
        step = axes[last + STRIDE]
        target = places[STRIDE] + column * step
        line[Y] = target if step == itemsize else lines.ctypes.data
        _call_loop(w[LOOP], (line.ctypes.data,))
        if step != itemsize:
            _move(line[Y], itemsize, target, step, count, itemsize)
        at += count
        column += count
        if column < length:
            continue
        column = 0
        axis = rank - 2
        while axis >= 0:
            counts[axis] += 1
            for k in range(STRIDE, FIELDS):
                places[k] += axes[axis * FIELDS + k]
            if counts[axis] < axes[axis * FIELDS]:
                break
            for k in range(STRIDE, FIELDS):
                places[k] -= counts[axis] * axes[axis * FIELDS + k]
            counts[axis] = 0
            axis -= 1
