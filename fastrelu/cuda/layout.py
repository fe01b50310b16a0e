"""How arrays lie in memory, said by shapes and by strides in elements."""

import functools
import math
from collections.abc import Sequence

Axes = tuple[int, ...]


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

    Those of length 1, whose strides say nothing, come first; but an array in C order has
    all its axes in order.
    """
    order = tuple(range(len(shape)))
    if is_flat(order, shape, strides):
        return order
    return tuple(sorted(order, key=lambda k: (shape[k] != 1, -abs(strides[k]))))


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


def channels_of(
    order: Sequence[int],
    shape: Sequence[int],
    weight: Sequence[int],
    strides: Sequence[int],
) -> tuple[int, int, int] | None:
    """Return (outer, channels, inner) of what is flat in this order, or None.

    The axes along which the weight varies must be one run, and it flat along them.  Its
    shape and strides have an axis for each of the array's.
    """
    lengths = [shape[axis] for axis in order]
    sizes = [weight[axis] for axis in order]
    vary = [k for k, size in enumerate(sizes) if size > 1]
    first, last = (vary[0], vary[-1] + 1) if vary else (0, 0)
    run = order[first:last]
    if sizes[first:last] != lengths[first:last]:
        return None
    if not is_flat(
        range(len(run)), *([of[axis] for axis in run] for of in (weight, strides))
    ):
        return None
    parts = lengths[:first], lengths[first:last], lengths[last:]
    outer, channels, inner = (math.prod(part) for part in parts)
    return outer, channels, inner
