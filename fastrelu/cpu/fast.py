"""The fast loops, by way of quick calls over flat arrays.

Each function makes all ready that a loop needs, and returns what runs it: that cannot
fail any more.
"""

import functools
from collections.abc import Callable
from typing import Any

from fastrelu.cpu import loops, pool, threads
from fastrelu.cpu.calls import Call, kind_of_loop
from fastrelu.cpu.lanes import lane_of
from fastrelu.cpu.pool import empty_bytes, empty_like

Array = Any
Function = Callable[..., Any]
Run = Callable[[], None]

__all__ = [
    "Call",
    "backward",
    "backward_mask",
    "channel_call",
    "empty_bytes",
    "empty_like",
    "flat_call",
    "forward",
    "forward_mask",
    "get_default_memory_pool",
    "mask_call",
    "prelu",
    "prelu_backward",
]

get_default_memory_pool = pool.get_default_memory_pool


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


def _run(call: Call, *arguments: Any) -> None:
    """Make a quick call that flat arrays leave no question."""
    if call.call(*arguments) is None:
        threads.ready()  # no more: Numba may have started its own threads just now
        if call.call(*arguments) is None:  # an answer left out is no result
            msg = "a quick call left flat arrays to Python: this is a bug of fastrelu"
            raise RuntimeError(msg)


def _flat(call: Call, a: Array, slope: float, y: Array, *b: Array) -> Run:
    call.prepare(a.dtype, a.nbytes, in_place=y is a)
    return functools.partial(_run, call, a, slope, False, y, *b)


def forward(formula: Function, x: Array, slope: float, y: Array) -> Run:
    """Write formula(x, slope) into y."""
    return _flat(flat_call(formula, gradient=False), x, slope, y)


def forward_mask(
    formula: Function, x: Array, slope: float, y: Array, bits: Array
) -> Run:
    """Write formula(x, slope) into y, and which are active into bits."""
    return _flat(mask_call(formula, gradient=False), x, slope, y, bits)


def backward(
    gradient: Function, grad: Array, slope: float, y: Array, saved: Array
) -> Run:
    """Write gradient(grad, saved, slope) into y."""
    return _flat(flat_call(gradient, gradient=True), grad, slope, y, saved)


def backward_mask(
    gradient: Function, grad: Array, slope: float, y: Array, bits: Array
) -> Run:
    """Write gradient(grad, 1 or 0, slope) into y."""
    return _flat(mask_call(gradient, gradient=True), grad, slope, y, bits)


def prelu(formula: Function, x: Array, slopes: Array, y: Array, inner: int) -> Run:
    """Write formula(x, slope of x's channel) into y."""
    call = channel_call(formula, gradient=False)
    block = call.block_of(x, slopes.size, inner)
    call.prepare(x.dtype, x.nbytes, in_place=y is x, block=block)
    shape = -1, slopes.size, inner
    arguments = x.reshape(shape), slopes, False, y.reshape(shape), 1
    return functools.partial(_run, call, *arguments)


def prelu_backward(
    gradient: Function,
    grad: Array,
    x: Array,
    slopes: Array,
    y: Array,
    inner: int,
    sums: Array,
) -> Run:
    """Write the gradient towards x into y, and sums and their errors into sums."""
    call = channel_call(gradient, gradient=True)
    moved = call.streams * x.nbytes
    driver = call.blocks[call.block_of(x, slopes.size, inner)]
    kind = loops.KINDS[kind_of_loop(threads.CACHE, moved, y is grad)]
    loop = loops.compiled(driver, gradient, lane_of(x.dtype), kind)
    threads.ready(moved)
    addresses = [a.ctypes.data for a in (grad, x, slopes, y, sums)]

    def run() -> None:
        if loop.ctypes(*addresses, x.size, slopes.size, inner, moved):
            raise MemoryError

    return run
