"""The NumPy engine: lays arrays flat and hands them to the right loop."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastrelu.cpu import loops, threads
from fastrelu.cpu.lanes import Lane, lane_of
from fastrelu.cpu.pool import SMALLEST, empty_bytes, empty_like
from fastrelu.cpu.threads import ready
from fastrelu.cpu.ufuncs import ufunc

Array = Any  # numpy.ndarray of any dtype; its own generic type says nothing more here
Function = Callable[..., Any]

__all__ = [
    "SMALLEST",
    "Plain",
    "backward",
    "backward_mask",
    "empty_bytes",
    "empty_like",
    "forward",
    "prelu",
    "prelu_backward",
    "ready",
]

_COLUMN_WISE = 64  # rows of a weight shorter than this are better treated as columns
_WIDTH = 256  # columns are repeated up to about this many,
_WIDE = 1024  # or this many where nothing is summed


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
    """What plain arrays of one dtype need: those that lie flat, in C order.

    `ufunc` is for small ones, the methods are for all.  Their arrays are clear of each
    other or the same.
    """

    def __init__(
        self, formula: Function, dtype: np.dtype[Any], *, gradient: bool
    ) -> None:
        self.formula, self.lane = formula, lane_of(dtype)
        # Larger ones are worth sharing.
        self.small = 2 * threads.SHARE // (3 if gradient else 2) - 1
        self.dtype, self.gradient = dtype, gradient
        self.ufunc = self._first_call
        self.block, self.masked_block = (
            (loops.backward, loops.backward_mask)
            if gradient
            else (loops.forward, loops.forward_mask)
        )
        self.masked, self.masked_inplace = (
            loops.compiled(driver, self.masked_block, formula, self.lane)
            for driver in (loops.straight, loops.inplace_by_tile)
        )
        self.storage = None if self.lane.storage == dtype else self.lane.storage
        self.compute = self.lane.product
        # The last one, and as an array: most calls repeat theirs.
        self.slope: tuple[float, Any] = 0.0, np.zeros((), self.compute)

    def _first_call(self, *operands: Array) -> Array:
        # Compiled when it is needed: a weight's gradient, say, does without.
        self.ufunc = ufunc(self.formula, self.dtype, gradient=self.gradient)
        return self.ufunc(*operands)

    def run(self, a: Array, b: Array, slope: tuple[float, Any], y: Array) -> None:
        """Write the formula of a, and of b for a gradient, into y."""
        if y is a or (3 if self.gradient else 2) * a.nbytes <= threads.CACHE:
            threads.ready()
            operands = (a, b) if self.gradient else (a,)
            self.ufunc(*operands, slope[1], y)
            return
        flat = self._flat(a)
        _run(
            self.block,
            self.formula,
            self.lane,
            self._flat(y),
            flat,
            flat if b is a else self._flat(b),
            slope[0],
        )

    def run_masked(self, a: Array, bits: Array, slope: float, y: Array) -> None:
        """Also write the mask, or for a gradient read it."""
        flat = self._flat(a)
        flat_y = flat if y is a else self._flat(y)
        if a.nbytes > self.small:
            _run(self.masked_block, self.formula, self.lane, flat_y, flat, bits, slope)
        elif y is a:
            self.masked_inplace(flat, bits, slope, 2 * a.nbytes)
        else:
            self.masked(flat, bits, flat_y, slope, 2 * a.nbytes)

    def run_channels(self, x: Array, weight: Array, axis: int, y: Array) -> None:
        """Take a weight for each index of an axis, or one for all."""
        view = _along(x.shape, weight.size, axis)
        flat = self._flat(x)
        flat_y = flat if y is x else self._flat(y)
        _run_channels(self.formula, self.lane, flat_y, flat, weight, view)

    def run_channels_backward(
        self,
        grad: Array,
        x: Array,
        weight: Array,
        axis: int,
        y: Array,
        total: Array,
    ) -> None:
        """Also write the gradient towards the weight into total."""
        view = _along(x.shape, weight.size, axis)
        flat = self._flat(grad)
        flat_y = flat if y is grad else self._flat(y)
        _run_channels_backward(
            self.formula, self.lane, flat_y, flat, self._flat(x), weight, view, total
        )

    def _flat(self, x: Array) -> Array:
        return x.ravel() if self.storage is None else x.ravel().view(self.storage)


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
    threads.ready()
    moved = a.nbytes + y.nbytes
    if b is not a and b.size == a.size:  # not the weights of channels, nor bits
        moved += b.nbytes
    if y is not a:
        past_cache = moved > threads.CACHE
        loop = loops.compiled(loops.straight, block, formula, lane, past_cache)
        loop(a, b, y, slope, moved)
    else:
        driver = loops.inplace if block in _WHOLE else loops.inplace_by_tile
        loops.compiled(driver, block, formula, lane)(a, b, slope, moved)


_WHOLE = loops.forward, loops.backward  # blocks that do not cut their arrays up


def forward(
    formula: Function, x: Array, slope: float, out: Array, *, want_mask: bool
) -> Array | None:
    """Write formula(x, slope) into out; return the mask bits if they are wanted."""
    lane = lane_of(x.dtype)
    y, _, (flat_y, flat_x) = _lay_flat(out, [x], c_order=want_mask)
    bits = empty_bytes(-(-x.size // 8)) if want_mask else None
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


class _Channels(NamedTuple):
    """An array seen as (outer, channel, inner), with one weight a channel.

    The channels are the axes from the first to the last along which the weight varies.
    An axis between them along which it does not, in `spread`, is counted with them.
    """

    axes: slice
    span: tuple[int, ...]  # the lengths of these axes
    spread: tuple[int, ...]  # places in `span`
    channels: int
    inner: int
    by_column: bool  # short rows are better treated as columns,
    repeats: int  # so many rows at once


@functools.lru_cache(1024)
def _channels(shape: tuple[int, ...], weight: tuple[int, ...]) -> _Channels:
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
    outer = math.prod(shape[:first])
    by_column = inner < _COLUMN_WISE and channels > 1
    repeats = max(1, min(_WIDTH // (channels * inner), outer)) if by_column else 1
    axes = slice(first, last)
    return _Channels(axes, span, spread, channels, inner, by_column, repeats)


@functools.lru_cache(1024)
def _along(shape: tuple[int, ...], size: int, axis: int) -> _Channels:
    """Return the view for a weight of so many elements along an axis, or along none."""
    weight = [1] * len(shape)
    if size != 1:
        weight[axis] = size
    return _channels(shape, tuple(weight))


def _widen(weight: Array, view: _Channels, lane: Lane) -> Array:
    """Return a copy with one weight for each channel, in the type of the products."""
    if view.spread:
        weight = weight.reshape(weight.shape[view.axes])
        weight = np.broadcast_to(weight, view.span)
    return np.array(weight, lane.product, order="C").reshape(-1)


def prelu(formula: Function, x: Array, weight: Array, out: Array) -> None:
    """Write formula(x, weight of x's channel) into out."""
    y, order, (flat_y, flat_x) = _lay_flat(out, [x])
    if x.size == 0:
        return
    lane = lane_of(x.dtype)
    weight = weight.transpose(order)
    view = _channels(y.transpose(order).shape, weight.shape)
    _run_channels(formula, lane, flat_y, flat_x, _widen(weight, view, lane), view)
    if y is not out:
        np.copyto(out, y)


def _run_channels(
    formula: Function, lane: Lane, y: Array, x: Array, weight: Array, view: _Channels
) -> None:
    if view.channels == 1:
        _run(loops.forward, formula, lane, y, x, x, float(weight[0]))
    elif view.by_column:
        width = view.channels * view.inner
        repeats = max(min(_WIDE, x.size // 8) // width, 1)
        if repeats * width > weight.size:
            wide = np.empty(repeats * width, weight.dtype)
            loops.widen(weight, view.inner, wide)
            weight = wide
        _run(loops.columns, formula, lane, y, x, weight, 0)
    else:
        _run(loops.rows, formula, lane, y, x, weight, view.inner)


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
    weight = weight.transpose(order)
    view = _channels(y.transpose(order).shape, weight.shape)
    wide = _widen(weight, view, lane)
    simple = out_weight.dtype in _SIMPLE
    total = np.empty(weight.shape, out_weight.dtype if simple else np.float64)
    flats = flat_y, flat_grad, flat_x
    _run_channels_backward(gradient, lane, *flats, wide, view, total.reshape(-1))
    if y is not out:
        np.copyto(out, y)
    total = total.transpose(np.argsort(order)).reshape(out_weight.shape)
    with np.errstate(all="ignore"):  # a sum beyond a half float is an infinity
        out_weight[...] = total


_SIMPLE = np.dtype(np.float32), np.dtype(np.float64)  # dtypes that Numba rounds to


def _run_channels_backward(
    gradient: Function,
    lane: Lane,
    y: Array,
    grad: Array,
    x: Array,
    weight: Array,
    view: _Channels,
    total: Array,
) -> None:
    """Write the gradient towards x into y and that towards the weight into total."""
    driver = (
        loops.prelu_backward_columns if view.by_column else loops.prelu_backward_rows
    )
    sums = np.empty((2, view.channels))
    moved = grad.nbytes + x.nbytes + y.nbytes
    past_cache = y is not grad and moved > threads.CACHE

    loop = loops.compiled(driver, None, gradient, lane)
    threads.ready()
    loop(grad, x, weight, y, view.inner, view.repeats, sums, past_cache, moved)
    shape = 2, 1, view.channels
    if view.spread:  # add up along the axes that were counted with the channels
        sums = sums.reshape(2, *view.span)
        places = range(1, 1 + len(view.spread))
        sums = np.moveaxis(sums, [1 + place for place in view.spread], places)
        shape = 2, view.channels // total.size, total.size
    loops.finish(np.ascontiguousarray(sums).reshape(shape), total)
