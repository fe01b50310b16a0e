"""The NumPy engine: lays arrays flat and hands them to the right loop."""

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastrelu.cpu import loops, threads
from fastrelu.cpu.lanes import Lane, lane_of
from fastrelu.cpu.pool import empty_like
from fastrelu.cpu.ufuncs import ufunc

Array = Any  # numpy.ndarray of any dtype; its own generic type says nothing more here
Function = Callable[..., Any]

__all__ = [
    "Plain",
    "backward",
    "backward_mask",
    "empty_like",
    "forward",
    
    "prelu",
    "prelu_backward",
]

_COLUMN_WISE = 64  # rows of a weight shorter than this are better treated as columns
_WIDTH = 256  # columns are repeated up to about this many


def _cache_size() -> int:
    """Return the bytes of the largest cache, or a usual size where nothing tells."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(file.read_text().strip().removesuffix("K")) << 10)
    return max(sizes, default=1 << 25)


CACHE = _cache_size()


# Layout -------------------------------------------------------------------------------


def _memory_order(x: Array) -> list[int]:
    """Return the axes from the one with the largest stride to the smallest."""
    return sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))


def _flat(x: Array, order: Sequence[int]) -> Array | None:
    """Return x as a writeable 1-D view along `order`, or None if it does not lie so."""
    x = x.transpose(order)
    if not x.flags.c_contiguous or not x.flags.aligned:
        return None
    if not x.flags.writeable:  # another type to Numba, which would compile it anew
        x = np.asarray(_Writeable(x))
    return x.reshape(-1).view(lane_of(x.dtype).storage)


class _Writeable:
    """Shows read-only memory, which no loop writes, as writeable."""

    def __init__(self, x: Array) -> None:
        x = x.view(lane_of(x.dtype).storage)  # NumPy alone knows no bfloat16
        interface = x.__array_interface__
        self.x = x
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _lay_flat(
    y: Array, inputs: Sequence[Array], *, c_order: bool = False
) -> tuple[Array, list[int], list[Array]]:
    """Return where to write, its order of axes, and y and the inputs flat along it.

    An input that lies exactly where y does becomes the same object as flat y.  What is
    laid out otherwise, or overlaps y in part, is worked on in a copy.
    """
    order = list(range(y.ndim)) if c_order else _memory_order(y)
    flat_y = _flat(y, order)
    on_y = [x is y or _lies_on(x, y) for x in inputs]
    if flat_y is None or any(
        np.may_share_memory(x, y)
        for x, same in zip(inputs, on_y, strict=True)
        if not same
    ):
        y = empty_like(y, "C" if c_order else "K")
        order = list(range(y.ndim)) if c_order else _memory_order(y)
        flat_y = _flat(y, order)
        on_y = [False] * len(inputs)
    flats = [flat_y]
    for x, same in zip(inputs, on_y, strict=True):
        flat = flat_y if same else _flat(x, order)
        if flat is None:
            # The first input may wait where its result will be.
            in_place = x is inputs[0] and not any(on_y)
            copy = y if in_place else empty_like(y)
            np.copyto(copy, x)
            flat = flat_y if in_place else _flat(copy, order)
        flats.append(flat)
    return y, order, flats


def _lies_on(x: Array, y: Array) -> bool:
    """Say whether two arrays are the same elements of the same memory."""
    return bool(
        np.may_share_memory(x, y)
        and x.ctypes.data == y.ctypes.data
        and x.dtype == y.dtype
        and (x.strides == y.strides or (x.flags.c_contiguous and y.flags.c_contiguous))
    )


# Elementwise --------------------------------------------------------------------------


class Plain:
    """What small plain arrays of one dtype need.

    `masked` and `masked_inplace` take arrays viewed as `storage`, or as they are where
    it is None.
    """

    __slots__ = ("compute", "masked", "masked_inplace", "slope", "storage", "ufunc")

    def __init__(
        self, formula: Function, dtype: np.dtype[Any], *, gradient: bool
    ) -> None:
        lane = lane_of(dtype)
        block = loops.backward_mask if gradient else loops.forward_mask
        self.ufunc = ufunc(formula, dtype, gradient=gradient)
        self.masked = loops.compiled(loops.serial, block, formula, lane)
        self.masked_inplace = loops.compiled(loops.serial_inplace, block, formula, lane)
        self.storage = None if lane.storage == dtype else lane.storage
        self.compute = np.dtype(str(lane.compute))
        self.slope = 0.0, np.zeros((), self.compute)  # the last one, also as an array


def _run(
    block: Function,
    formula: Function,
    lane: Lane,
    y: Array,
    a: Array,
    b: Array,
    slope: Any,
) -> None:
    """Run a block over flat arrays with the driver that suits their size and place."""
    if a.size == 0:
        return
    moved = a.nbytes + y.nbytes + (0 if b is a else b.nbytes)
    past_cache = y is not a and moved > CACHE

    def task(team: int) -> None:
        driver: Function
        args: tuple[Any, ...]
        if y is a or past_cache:
            driver, args = loops.parallel_by_tile, (a, b, y, slope, past_cache, team)
        elif team > 1:
            driver, args = loops.parallel, (a, b, y, slope, team)
        else:
            driver, args = loops.serial, (a, b, y, slope)
        loops.compiled(driver, block, formula, lane, team > 1)(*args)

    threads.run(task, moved)


def forward(
    formula: Function, x: Array, slope: float, out: Array, *, want_mask: bool
) -> Array | None:
    """Write formula(x, slope) into out; return the mask bits if they are wanted."""
    lane = lane_of(x.dtype)
    y, _, (flat_y, flat_x) = _lay_flat(out, [x], c_order=want_mask)
    bits = np.empty(-(-x.size // 8), np.uint8) if want_mask else None
    block = loops.forward_mask if want_mask else loops.forward
    _run(block, formula, lane, flat_y, flat_x, flat_x if bits is None else bits, slope)
    if y is not out:
        np.copyto(out, y)
    return bits


def backward(
    gradient: Function, grad: Array, saved: Array, slope: float, out: Array
) -> None:
    """Write gradient(grad, saved, slope) into out."""
    y, _, (flat_y, flat_grad, flat_saved) = _lay_flat(out, [grad, saved])
    lane = lane_of(grad.dtype)
    _run(loops.backward, gradient, lane, flat_y, flat_grad, flat_saved, slope)
    if y is not out:
        np.copyto(out, y)


def backward_mask(
    gradient: Function, grad: Array, bits: Array, slope: float, out: Array
) -> None:
    """Write gradient(grad, 1 or 0, slope) into out; the bits are in C order."""
    if np.may_share_memory(bits, out):
        bits = bits.copy()
    y, _, (flat_y, flat_grad) = _lay_flat(out, [grad], c_order=True)
    flat_bits = _flat(bits, [0])
    lane = lane_of(grad.dtype)
    _run(loops.backward_mask, gradient, lane, flat_y, flat_grad, flat_bits, slope)
    if y is not out:
        np.copyto(out, y)


# A weight for each channel ------------------------------------------------------------


class _Channels:
    """An array seen as (outer, channel, inner), with one weight a channel.

    `weight` has as many axes as the array, each as long as the array's or 1.  The
    channels are the axes from the first to the last along which the weight varies; an
    axis between them along which it does not is spread out.
    """

    def __init__(self, weight: Array, shape: tuple[int, ...], lane: Lane) -> None:
        vary = [axis for axis, size in enumerate(weight.shape) if size > 1]
        first, last = (vary[0], vary[-1] + 1) if vary else (0, 0)
        self.span = shape[first:last]
        self.spread = tuple(
            axis
            for axis in range(first, last)
            if weight.shape[axis] == 1 and shape[axis] > 1
        )
        self.outer = math.prod(shape[:first])
        self.inner = math.prod(shape[last:])
        self.first = first
        self.shape = weight.shape
        narrow = weight.reshape(weight.shape[first:last])
        compute = np.dtype(str(lane.compute))
        wide = np.broadcast_to(narrow, self.span).astype(compute)
        self.weight = np.ascontiguousarray(wide).reshape(-1)
        self.channels = self.weight.size
        # Short rows are treated as columns: the weight is repeated along the row, and
        # again until the loops over it are worth starting.
        self.by_column = self.inner < _COLUMN_WISE and self.channels > 1
        self.repeats = 1
        if self.by_column:
            width = self.channels * self.inner
            self.repeats = max(1, min(_WIDTH // width, self.outer))
            self.weight = np.tile(np.repeat(self.weight, self.inner), self.repeats)

    def sum(self, partial: Array) -> Array:
        """Add partial sums (2, before, channels * after) up to the weight's shape."""
        before = partial.shape[1] * self.repeats
        size = partial.shape[2] // self.repeats
        partial = partial.reshape(2, before, *self.span, size // self.channels)
        axes = [2 + axis - self.first for axis in self.spread]
        partial = np.moveaxis(partial, axes, range(1, 1 + len(axes)))
        kept = math.prod(self.span) // math.prod(self.span[a - 2] for a in axes)
        after = partial.shape[-1]
        partial = np.ascontiguousarray(partial).reshape(2, -1, kept, after)
        result = np.empty(kept)
        loops.compiled(loops.prelu_finish, None, None, lane_of(result.dtype))(
            partial, result
        )
        return result.reshape(self.shape)


def prelu(formula: Function, x: Array, weight: Array, out: Array) -> None:
    """Write formula(x, weight of x's channel) into out."""
    y, order, (flat_y, flat_x) = _lay_flat(out, [x])
    if x.size == 0:
        return
    lane = lane_of(x.dtype)
    view = _Channels(weight.transpose(order), y.transpose(order).shape, lane)
    if view.channels == 1:
        slope = float(view.weight[0])
        _run(loops.forward, formula, lane, flat_y, flat_x, flat_x, slope)
    else:
        block = loops.columns if view.by_column else loops.rows
        _run(block, formula, lane, flat_y, flat_x, view.weight, view.inner)
    if y is not out:
        np.copyto(out, y)


def prelu_backward(
    gradient: Function,
    grad: Array,
    x: Array,
    weight: Array,
    out: Array,
    out_weight: Array,
) -> None:
    """Write the gradient towards x into out and that towards weight into out_weight."""
    if x.size == 0:
        out_weight[...] = 0
        return
    y, order, (flat_y, flat_grad, flat_x) = _lay_flat(out, [grad, x])
    lane = lane_of(x.dtype)
    view = _Channels(weight.transpose(order), y.transpose(order).shape, lane)
    if view.by_column:
        driver = loops.prelu_backward_columns
        blocks = -(-x.size // (view.weight.size * loops.BLOCK_ROWS))
        partial = np.empty((2, blocks, view.weight.size))
    else:
        driver = loops.prelu_backward_rows
        segments = -(-view.inner // loops.SEGMENT)
        partial = np.empty((2, view.outer * view.channels * segments))
    moved = flat_grad.nbytes + flat_x.nbytes + flat_y.nbytes
    past_cache = flat_y is not flat_grad and moved > CACHE

    def task(team: int) -> None:
        loop = loops.compiled(driver, None, gradient, lane, team > 1)
        where = (view.weight, flat_y, view.inner, partial, past_cache, team)
        loop(flat_grad, flat_x, *where)

    threads.run(task, moved)
    if y is not out:
        np.copyto(out, y)
    if not view.by_column:
        partial = partial.reshape(2, view.outer, -1)
    total = view.sum(partial).transpose(np.argsort(order))
    with np.errstate(all="ignore"):  # a sum beyond a half float is an infinity
        out_weight[...] = total.reshape(out_weight.shape)
