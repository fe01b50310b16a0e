"""The fast loops for arrays that the checks have let through.

Quick calls work on arrays of any layout.  What is left to do here is to copy what they do
not take: elements that are not aligned, or that are written to while they are read.
Nothing is written before all is ready, and then nothing can fail.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastrelu._layout import collapse, flat, is_simple, lay_flat, lies_on
from fastrelu._spec import ARRAY, BITS, NUMBER, WEIGHT, Operation
from fastrelu.cpu import build, calls, pool, sums, threads, walk
from fastrelu.cpu.loops import APART, MANY_SUMMED, TARGETS
from fastrelu.cpu.pool import empty_bytes, empty_like
from fastrelu.cpu.quick import Call
from fastrelu.cpu.vector import format_of

Array = Any
Function = Callable[..., Any]
Operands = Sequence[tuple[str, Any]]

__all__ = [
    "elementwise",
    "elementwise_mask",
    "empty_bytes",
    "empty_like",
    "get_default_memory_pool",
    "quick_call",
    "weight_sums",
]

get_default_memory_pool = pool.get_default_memory_pool


@functools.cache
def quick_call(operation: Operation, **options: Any) -> Call:
    """Return the quick calls of an operation."""
    return Call(operation, **options)


def _run(call: Call, x: Array, y: Array, *others: Any) -> None:
    """Make a quick call that checked arrays leave no question."""
    if call.run(x, False, y, *others) is None:
        msg = "a quick call left checked arrays to Python: this is a bug of fastrelu"
        raise RuntimeError(msg)


def _run_over(
    call: Call, x: Array, y: Array, waiting: Any, bits: Array, *numbers: float
) -> None:
    """Do the same for flat arrays once what waits is copied to y, if anything does."""
    if waiting:  # then x is y; for an empty array no loop would be compiled
        one = np.zeros(1, y.dtype)
        _run(call, one, one, np.zeros(1, np.uint8), *numbers)
        threads.ready(2 * y.nbytes)
    for pair in waiting:
        np.copyto(*pair)
    _run(call, x, y, bits, *numbers)


def _taken(x: Array, y: Array | None = None) -> Array:
    """Return an array as quick calls take it: y if it is that, and else aligned."""
    if y is not None and lies_on(x, y):
        return y
    if not x.flags.aligned:
        copy = empty_like(x)
        np.copyto(copy, x)
        x = copy
    # NumPy has two names for some integers, which calls would take for two dtypes.
    return x if x.dtype.kind == "V" else x.view(x.dtype.str)


def _is_written_to(out: Array, inputs: Sequence[Array]) -> bool:
    """Say whether a loop may write to `out` itself: nothing lies on it in part."""
    if not out.flags.aligned or not is_simple(out):
        return False
    return all(lies_on(x, out) or not np.may_share_memory(x, out) for x in inputs)


def _of_kind(kind: str, operands: Operands) -> list[Any]:
    return [value for each, value in operands if each == kind]


def elementwise(function: Function, operands: Operands, out: Array) -> None:
    """Write a function of the operands into out."""
    call = quick_call(Operation(function, tuple(kind for kind, _ in operands)))
    arrays, numbers = _of_kind(ARRAY, operands), _of_kind(NUMBER, operands)
    if masks := _of_kind(BITS, operands):
        [(bits, axes)] = masks
        y, _, (flat_y, x), waiting = lay_flat(out, arrays, empty_like, axes)
        # A copy where they lie on the result, or not one after another.
        own = np.array(bits) if np.may_share_memory(bits, out) else bits
        own = np.ascontiguousarray(own)
        _run_over(call, x, flat_y, waiting, own, *numbers)
    else:
        y = _taken(out if _is_written_to(out, arrays) else empty_like(out))
        first, *others = [_taken(x, y) for x in arrays]
        for weight in _of_kind(WEIGHT, operands):
            others += [np.array(weight, order="C"), 0 if weight.ndim == 1 else 1]
        _run(call, first, y, *others, *numbers)
    if not np.may_share_memory(y, out):
        np.copyto(out, y)


def elementwise_mask(
    function: Function, active: Function, kept: int, operands: Operands, out: Array
) -> tuple[Array, tuple[int, ...]]:
    """Write a function of the operands into out; return mask bits and their order."""
    kinds = tuple(kind for kind, _ in operands)
    call = quick_call(Operation(function, kinds, active, kept))
    arrays, numbers = _of_kind(ARRAY, operands), _of_kind(NUMBER, operands)
    y, order, (flat_y, x), waiting = lay_flat(out, arrays, empty_like)
    bits = empty_bytes(-(-y.size // 8))
    _run_over(call, x, flat_y, waiting, bits, *numbers)
    if y is not out:
        np.copyto(out, y)
    return bits, order


def weight_sums(
    gradient: Function,
    grad: Array,
    x: Array,
    slopes: Array,
    out: Array,
    order: Sequence[int],
    inner: int,
    result: Array,
) -> Callable[[], None]:
    """Return what writes the gradient towards x into out, and sums and their errors.

    The slopes go with (outer, slope, inner) in this order of the axes, that of out.
    """
    y = out if _is_written_to(out, [grad, x]) else empty_like(out)
    arrays = y, *(_taken(each, y) for each in (grad, x))
    operation = Operation(gradient, (ARRAY, ARRAY, WEIGHT))
    moved = 3 * x.nbytes
    number = calls.suits_columns(MANY_SUMMED, x.size, slopes.size, inner)
    target = TARGETS[calls.target_of(threads.CACHE, moved, arrays[1] is y)]
    axes = np.empty(walk.RANK + 1, np.int64)
    if any(flat(each, order) is None for each in arrays):
        target = APART
        rank, known = collapse(order, x.shape, [each.strides for each in arrays])
        for place, value in enumerate(known):
            field, axis = divmod(place, rank)
            axes[axis * walk.FIELDS + field] = value
        axes[walk.RANK] = rank
    driver = tuple(sums.PARTS)[number]
    loop = build.compiled(driver, operation, format_of(x.dtype), target)
    threads.ready(moved)
    given = *arrays[1:], slopes, y, result, axes

    def run() -> None:
        places = [each.ctypes.data for each in given]
        if loop.ctypes(*places, x.size, slopes.size, inner, moved):
            raise MemoryError
        if y is not out:
            np.copyto(out, y)

    return run
