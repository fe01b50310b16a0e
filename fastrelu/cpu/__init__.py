"""The NumPy engine: lays arrays flat and hands them to the right loop."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastrelu._arguments import is_on_gpu, kind_of, shown
from fastrelu.cpu import loops, threads
from fastrelu.cpu.calls import Call, kind_of_loop
from fastrelu.cpu.lanes import Lane, lane_of
from fastrelu.cpu.pool import SMALLEST, empty_bytes, empty_like

Array = Any  # numpy.ndarray of any dtype; its own generic type says nothing more here
Function = Callable[..., Any]

__all__ = [
    "KIND",
    "SMALLEST",
    "Call",
    "as_array",
    "backward",
    "backward_mask",
    "channel_call",
    "empty_bytes",
    "empty_like",
    "flat_call",
    "forward",
    "lane_of",
    "mask_call",
    "prelu",
    "prelu_backward",
]

KIND = "an array in the host's memory"


# The protocol of the arguments' checks ------------------------------------------------


def as_array(value: Any, *, convert: bool = True) -> Array:
    """Return a value as a numpy.ndarray: itself, or what NumPy makes of it."""
    is_array = issubclass(type(value), np.ndarray)
    if is_array and issubclass(type(value), np.ma.MaskedArray):
        msg = "got a MaskedArray: fill its gaps first"
        raise TypeError(msg)
    if is_on_gpu(value):
        msg = f"as the others are, got {kind_of(value)} on a GPU"
        raise TypeError(msg)
    if not convert and not is_array:
        msg = f"a numpy.ndarray, to be written to, got {kind_of(value)}"
        raise TypeError(msg)
    try:
        return np.asarray(value)
    except MemoryError:
        raise
    except Exception as error:
        msg = f"got {kind_of(value)}: {shown(error)}"
        raise TypeError(msg) from error


# Quick calls --------------------------------------------------------------------------


@functools.cache
def flat_call(formula: Function, *, gradient: bool) -> Call:
    """Return ``call(x, slope, inplace, out)`` or ``call(g, slope, ..., saved)``."""
    return Call(formula, loops.backward if gradient else loops.forward)


@functools.cache
def mask_call(formula: Function, *, gradient: bool) -> Call:
    """Return the same with a mask's bits, which are written or for a gradient read."""
    return Call(formula, loops.backward_mask if gradient else loops.forward_mask)


@functools.cache
def channel_call(formula: Function, *, gradient: bool) -> Call:
    """Return ``call(x, weight, inplace, out, axis)`` or ``call(g, ..., axis, x)``."""
    if gradient:
        return Call(formula, loops.prelu_backward_rows, loops.prelu_backward_columns)
    return Call(formula, loops.rows, loops.columns)


# Layout -------------------------------------------------------------------------------


def _memory_order(x: Array) -> list[int]:
    """Return the axes from the one with the largest stride to the smallest."""
    return sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))


def _flat(x: Array, order: Sequence[int]) -> Array | None:
    """Return x as a 1-D view along `order`, or None if it does not lie so."""
    x = x.transpose(order)
    if not x.flags.c_contiguous or not x.flags.aligned:
        return None
    # NumPy has two names for some integers, which calls would take for two dtypes.
    return x.reshape(-1).view(x.dtype if x.dtype.kind == "V" else x.dtype.str)


def _lay_flat(
    y: Array, inputs: Sequence[Array], *, c_order: bool = False, may_wait: bool = True
) -> tuple[Array, list[int], list[Array], list[tuple[Array, Array]]]:
    """Return where to write, its order of axes, and y and the inputs flat along it.

    An input that lies exactly where y does becomes the same object as flat y.  What is
    laid out otherwise, or overlaps y in part, is worked on in a copy.  That of the
    first input may wait where its result will be: the last value has what to copy,
    (to, from), when nothing can fail any more, for until then y must not change.
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
    flats, waiting = [flat_y], []
    for x, same in zip(inputs, on_y, strict=True):
        flat = flat_y if same else _flat(x, order)
        if flat is None and x is inputs[0] and not any(on_y) and may_wait:
            flat = flat_y
            waiting.append((y, x))
        elif flat is None:
            copy = empty_like(y)
            np.copyto(copy, x)
            flat = _flat(copy, order)
        flats.append(flat)
    return y, order, flats, waiting


def _lies_on(x: Array, y: Array) -> bool:
    """Say whether two arrays are the same elements of the same memory."""
    return bool(
        np.may_share_memory(x, y)
        and x.ctypes.data == y.ctypes.data
        and x.dtype == y.dtype
        and (x.strides == y.strides or (x.flags.c_contiguous and y.flags.c_contiguous))
    )


# Elementwise --------------------------------------------------------------------------


def _run(call: Call, waiting: Any, a: Array, slope: float, y: Array, *b: Array) -> None:
    """Run a call over flat arrays, which leave it no question."""
    call.prepare(a.dtype, a.nbytes, in_place=y is a)
    _call(call, waiting, a, slope, False, y, *b)


def _call(call: Call, waiting: Any, *arguments: Any) -> None:
    """Copy what waited until nothing can fail any more, and call."""
    for pair in waiting:
        np.copyto(*pair)
    if call.call(*arguments) is None:
        threads.ready()  # no more: Numba may have started its own threads just now
        if call.call(*arguments) is None:  # an answer left out is no result
            msg = "a quick call left flat arrays to Python: this is a bug of fastrelu"
            raise RuntimeError(msg)


def forward(
    formula: Function, x: Array, slope: float, out: Array, *, want_mask: bool
) -> Array | None:
    """Write formula(x, slope) into out; return the mask bits if they are wanted."""
    y, _, (flat_y, flat_x), waiting = _lay_flat(out, [x], c_order=want_mask)
    bits = None
    if want_mask:
        bits = empty_bytes(-(-x.size // 8))
        call = mask_call(formula, gradient=False)
        _run(call, waiting, flat_x, slope, flat_y, bits)
    else:
        _run(flat_call(formula, gradient=False), waiting, flat_x, slope, flat_y)
    if y is not out:
        np.copyto(out, y)
    return bits


def backward(
    gradient: Function, grad: Array, saved: Array, slope: float, out: Array
) -> None:
    """Write gradient(grad, saved, slope) into out."""
    y, _, (flat_y, flat_grad, flat_saved), waiting = _lay_flat(out, [grad, saved])
    call = flat_call(gradient, gradient=True)
    _run(call, waiting, flat_grad, slope, flat_y, flat_saved)
    if y is not out:
        np.copyto(out, y)


def backward_mask(
    gradient: Function, grad: Array, bits: Array, slope: float, out: Array
) -> None:
    """Write gradient(grad, 1 or 0, slope) into out; the bits are in C order."""
    if np.may_share_memory(bits, out):
        bits = bits.copy()
    y, _, (flat_y, flat_grad), waiting = _lay_flat(out, [grad], c_order=True)
    bits = np.ascontiguousarray(bits)
    call = mask_call(gradient, gradient=True)
    _run(call, waiting, flat_grad, slope, flat_y, bits)
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
    return _Channels(slice(first, last), span, spread, channels, inner)


def _widen(weight: Array, view: _Channels, lane: Lane) -> Array:
    """Return a copy with one weight for each channel, in the type of the products."""
    if view.spread:
        weight = weight.reshape(weight.shape[view.axes])
        weight = np.broadcast_to(weight, view.span)
    return np.array(weight, lane.product, order="C").reshape(-1)


def prelu(formula: Function, x: Array, weight: Array, out: Array) -> None:
    """Write formula(x, weight of x's channel) into out."""
    y, order, (flat_y, flat_x), waiting = _lay_flat(out, [x])
    if x.size == 0:
        return
    weight = weight.transpose(order)
    view = _channels(y.transpose(order).shape, weight.shape)
    slopes = _widen(weight, view, lane_of(x.dtype))
    call = channel_call(formula, gradient=False)
    inner = view.inner
    block = call.block_of(x, view.channels, inner)
    call.prepare(x.dtype, x.nbytes, in_place=flat_y is flat_x, block=block)
    shape = -1, slopes.size, inner
    flat_x, flat_y = flat_x.reshape(shape), flat_y.reshape(shape)
    _call(call, waiting, flat_x, slopes, False, flat_y, 1)
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
    laid = _lay_flat(out, [grad, x], may_wait=False)
    y, order, (flat_y, flat_grad, flat_x), _ = laid
    lane = lane_of(x.dtype)
    weight = weight.transpose(order)
    view = _channels(y.transpose(order).shape, weight.shape)
    slopes = _widen(weight, view, lane)
    sums = np.empty((2, view.channels))
    # Nothing may fail once out is written, so that sums of sums are for another array.
    finite = None if view.spread else np.empty(view.span, bool)
    if view.spread and y is out:
        y = empty_like(y)
        flat_y = _flat(y, order)
    call = channel_call(gradient, gradient=True)
    moved = call.streams * x.nbytes
    driver = call.blocks[call.block_of(x, view.channels, view.inner)]
    kind = loops.KINDS[kind_of_loop(threads.CACHE, moved, flat_y is flat_grad)]
    loop = loops.compiled(driver, gradient, lane, kind)
    threads.ready(moved)
    operands = flat_grad, flat_x, slopes, flat_y, sums
    if loop.ctypes(
        *[a.ctypes.data for a in operands], x.size, view.channels, view.inner, moved
    ):
        raise MemoryError
    axes = sorted(range(x.ndim), key=order.__getitem__)
    with np.errstate(all="ignore"):
        sums = _added_up(sums.reshape(2, *view.span), view.spread)
        # Past an infinity or a NaN the errors are NaN and say nothing.
        total, errors = sums[0, ...], sums[1, ...]
        np.add(total, errors, out=total, where=np.isfinite(total, out=finite))
        total = total.reshape(weight.shape).transpose(axes).reshape(out_weight.shape)
        if y is not out:
            np.copyto(out, y)
        out_weight[...] = total  # beyond a half float it is an infinity


def _added_up(sums: Array, spread: Sequence[int]) -> Array:
    """Return compensated sums, (2, ...), added up along the axes in `spread`."""
    for axis in sorted(spread, reverse=True):
        parts = np.moveaxis(sums, 1 + axis, 0)
        total, errors = parts[0]
        for more, error in parts[1:]:
            before, total = total, total + more
            shadow = total - before
            errors = errors + ((before - (total - shadow)) + (more - shadow) + error)
        sums = np.stack([total, errors])
    return sums
