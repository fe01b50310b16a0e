"""How arrays lie in memory: orders of axes, overlap, and the channels of a weight.

An order names the axes from the one with the largest stride to the smallest.  Strides
are in elements, or, where all of a function's are, in bytes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastrelu._dtypes import row_of

Array = Any  # numpy.ndarray of any dtype; its own generic type says nothing more here
Axes = tuple[int, ...]


# Shapes and strides -------------------------------------------------------------------


def c_strides(shape: Sequence[int], itemsize: int = 1) -> list[int]:
    """Return the strides of an array in C order."""
    strides, step = [], itemsize
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return strides[::-1]


@functools.lru_cache(1024)
def memory_order(shape: Axes, strides: Axes) -> Axes:
    """Return the axes from the one with the largest stride to the smallest.

    Those of length 1, whose strides say nothing, come first.
    """
    steps = [
        math.inf if length == 1 else abs(stride)
        for length, stride in zip(shape, strides, strict=True)
    ]
    return tuple(sorted(range(len(steps)), key=lambda axis: -steps[axis]))


def is_flat(order: Sequence[int], shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Say whether the elements follow one another in this order of the axes."""
    steps = c_strides([shape[axis] for axis in order])
    pairs = zip(order, steps, strict=True)
    flat = all(shape[axis] == 1 or strides[axis] == step for axis, step in pairs)
    return flat or 0 in shape


def strides_of(order: Sequence[int], shape: Sequence[int]) -> list[int]:
    """Return the strides of what is flat in this order of the axes."""
    strides = [0] * len(shape)
    steps = c_strides([shape[axis] for axis in order])
    for axis, step in zip(order, steps, strict=True):
        strides[axis] = step
    return strides


def collapse(
    order: Sequence[int], shape: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[int, list[int]]:
    """Merge axes that lie behind one another in every array; there is at least one.

    Return how many are left, and their lengths and each array's strides in one list.
    """
    merged: list[list[int]] = []  # [length, stride, stride, ...]
    for axis in order:
        length = shape[axis]
        if length == 1:
            continue
        steps = [stride[axis] for stride in strides]
        if merged and all(
            before == step * length
            for before, step in zip(merged[-1][1:], steps, strict=True)
        ):
            merged[-1] = [merged[-1][0] * length, *steps]
        else:
            merged.append([length, *steps])
    if not merged:
        merged = [[1] + [0] * len(strides)]
    columns = zip(*merged, strict=True)
    return len(merged), [number for column in columns for number in column]


# NumPy's arrays ----------------------------------------------------------------------


def flat(x: Array, order: Sequence[int]) -> Array | None:
    """Return x as a 1-D view along `order`, or None if it does not lie so."""
    x = x.transpose(order)
    if not x.flags.c_contiguous or not x.flags.aligned:
        return None
    # NumPy has two names for some integers, which calls would take for two dtypes.
    return x.reshape(-1).view(x.dtype if x.dtype.kind == "V" else x.dtype.str)


def lay_flat(
    y: Array,
    inputs: Sequence[Array],
    empty_like: Callable[..., Array],
    order: Sequence[int] | None = None,
    *,
    may_wait: bool = True,
) -> tuple[Array, Axes, list[Array], list[tuple[Array, Array]]]:
    """Return where to write, its order of axes, and y and the inputs flat along it.

    The order is that of y's memory, if none is given.
    An input that lies exactly where y does becomes the same object as flat y.  What is
    laid out otherwise, or overlaps y in part, is worked on in a copy.  That of the
    first input may wait where its result will be: the last value has what to copy,
    (to, from), when nothing can fail any more, for until then y must not change.
    """
    given, order = order, tuple(order or memory_order(y.shape, y.strides))
    flat_y = flat(y, order)
    on_y = [x is y or lies_on(x, y) for x in inputs]
    if flat_y is None or any(
        np.may_share_memory(x, y)
        for x, same in zip(inputs, on_y, strict=True)
        if not same
    ):
        if given is None:
            y = empty_like(y)
            order = memory_order(y.shape, y.strides)
        else:
            back = sorted(range(y.ndim), key=order.__getitem__)
            y = empty_like(y.transpose(order), "C").transpose(back)
        flat_y = flat(y, order)
        on_y = [False] * len(inputs)
    flats, waiting = [flat_y], []
    for x, same in zip(inputs, on_y, strict=True):
        flat_x = flat_y if same else flat(x, order)
        if flat_x is None and x is inputs[0] and not any(on_y) and may_wait:
            flat_x = flat_y
            waiting.append((y, x))
        elif flat_x is None:
            copy = empty_like(y)
            np.copyto(copy, x)
            flat_x = flat(copy, order)
        flats.append(flat_x)
    return y, order, flats, waiting


def lies_on(x: Array, y: Array) -> bool:
    """Say whether two arrays are the same elements of the same memory."""
    return bool(
        np.may_share_memory(x, y)
        and x.ctypes.data == y.ctypes.data
        and x.dtype == y.dtype
        and (x.strides == y.strides or (x.flags.c_contiguous and y.flags.c_contiguous))
    )


def is_simple(x: Array) -> bool:
    """Say whether each axis steps over all that the finer ones reach."""
    reach = x.itemsize
    for axis in reversed(memory_order(x.shape, x.strides)):
        if x.shape[axis] != 1:
            if abs(x.strides[axis]) < reach:
                return False
            reach += abs(x.strides[axis]) * (x.shape[axis] - 1)
    return True


# A weight for each channel ------------------------------------------------------------


class Channels(NamedTuple):
    """An array seen as (outer, channel, inner), with one weight a channel.

    The channels are the axes from the first to the last along which the weight varies.
    An axis between them along which it does not, in `spread`, is counted with them.
    """

    axes: slice
    span: tuple[int, ...]  # the lengths of these axes
    spread: tuple[int, ...]  # places in `span`
    channels: int
    inner: int


@functools.lru_cache(1024)
def channels_of(shape: tuple[int, ...], weight: tuple[int, ...]) -> Channels:
    """Return the view for a weight of as many axes, each as long as x's or 1."""
    vary = [axis for axis, size in enumerate(weight) if size > 1]
    first, last = (vary[0], vary[-1] + 1) if vary else (0, 0)
    span = shape[first:last]
    spread = tuple(
        axis - first
        for axis in range(first, last)
        if weight[axis] == 1 and shape[axis] > 1
    )
    channels, inner = math.prod(span), math.prod(shape[last:])
    return Channels(slice(first, last), span, spread, channels, inner)


def parts_of(
    order: Axes, shape: Axes, weight: Axes, strides: Axes
) -> tuple[int, int, int] | None:
    """Return (outer, channels, inner) of what is flat in this order, or None.

    The axes along which the weight varies must be one run, and it flat along them.
    """
    lengths = tuple(shape[axis] for axis in order)
    view = channels_of(lengths, tuple(weight[axis] for axis in order))
    if view.spread or not is_flat(order[view.axes], weight, strides):
        return None
    return math.prod(lengths[: view.axes.start]), view.channels, view.inner


def slopes_of(weight: Array, view: Channels, x: Array) -> Array:
    """Return a copy with one weight for each channel, in the type of x's products."""
    if view.spread:
        weight = weight.reshape(weight.shape[view.axes])
        weight = np.broadcast_to(weight, view.span)
    row = row_of(x.dtype)
    assert row is not None
    return np.array(weight, row.product, order="C").reshape(-1)
