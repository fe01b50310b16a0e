"""The NumPy engine: lays arrays flat and hands them to loops.

There are two kinds of loops.  Those of `fast` rest on facts about CPython, NumPy and
Numba, which are proven once in each process.  Where one does not hold, those of
`portable`, plain Numba, give the same results.
"""

import functools
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from fastrelu._arguments import is_on_gpu, kind_of, shown
from fastrelu.cpu import abi, portable
from fastrelu.cpu.layout import added_up, channels_of, flat, lay_flat, slopes_of
from fastrelu.mask import ANSWERS

Array = Any  # numpy.ndarray of any dtype; its own generic type says nothing more here
Function = Callable[..., Any]
F = TypeVar("F", bound=Function)

KIND = "an array in the host's memory"


# Which loops --------------------------------------------------------------------------


def _choose() -> tuple[ModuleType, str]:
    """Return the loops to use, and why they are not the fast ones."""
    asked = os.environ.get("FASTRELU_ENGINE", "").strip().lower()
    if asked == "portable":
        return portable, "FASTRELU_ENGINE asks for it"
    if asked not in ("", "fast"):
        msg = f"FASTRELU_ENGINE must be fast or portable, got {asked!r}"
        warnings.warn(msg, RuntimeWarning, stacklevel=2)
    doubt = abi.doubt()
    if doubt:
        return portable, doubt
    try:
        from fastrelu.cpu import fast
    except ANSWERS_OF_NUMBA as error:
        return portable, f"{type(error).__name__}: {error}"
    return fast, ""


ANSWERS_OF_NUMBA = (*ANSWERS, ImportError, AssertionError)

_loops, _why = _choose()


def engine() -> tuple[str, str]:
    """Return the name of the loops in use, and why they are not the fast ones."""
    return _loops.__name__.rpartition(".")[2], _why


def is_fast() -> bool:
    """Say whether the fast loops are in use."""
    return _loops is not portable


def give_up(error: abi.Unproven) -> None:
    """From here on use the portable loops for what is not compiled yet."""
    global _loops, _why
    _loops, _why = portable, f"at first use, {error}"


def get_default_memory_pool() -> Any:
    """Return the pool that large results come from.

    Returns
    -------
    MemoryPool

    Examples
    --------
    >>> import fastrelu
    >>> fastrelu.get_default_memory_pool().used_bytes() >= 0
    True
    """
    return _pool_of()


_pool_of = _loops.get_default_memory_pool


def _or_portable(function: F) -> F:
    """Have a function, which has done nothing until its loops are ready, try again."""

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except abi.Unproven as error:
            give_up(error)
            return function(*arguments, **options)

    return run  # type: ignore[return-value]


# The protocol of the arguments' checks ------------------------------------------------


def read(value: Any, *, convert: bool = True) -> Array:
    """Return a value as a numpy.ndarray: itself, or what NumPy makes of it."""
    is_array = issubclass(type(value), np.ndarray)
    if is_array and issubclass(type(value), np.ma.MaskedArray):
        msg = "got a MaskedArray: fill its gaps first"
        raise TypeError(msg)
    if is_on_gpu(value):
        msg = f"as the others are, got {kind_of(value)} on a GPU"
        raise TypeError(msg)
    if is_array:
        return value
    if not convert:
        msg = f"a numpy.ndarray, to be written to, got {kind_of(value)}"
        raise TypeError(msg)
    try:
        return np.asarray(value)
    except ANSWERS as error:
        msg = f"got {kind_of(value)}: {shown(error)}"
        raise TypeError(msg) from error


def hold(x: Array) -> Array:
    """Return a view that is ours alone: nobody else can give it another shape."""
    return np.ndarray.view(x, np.ndarray)


@_or_portable
def empty_like(x: Array) -> Array:
    """Return a new array of x's shape, dtype and memory order."""
    return _loops.empty_like(x)


# Quick calls, made when the catalogue is ----------------------------------------------

flat_call, mask_call = _loops.flat_call, _loops.mask_call
channel_call, empty_bytes = _loops.channel_call, _loops.empty_bytes


# Elementwise --------------------------------------------------------------------------


def _finish(run: Function, waiting: Any, y: Array, out: Array) -> None:
    """Copy what waited until nothing can fail any more, and run a loop over y."""
    for pair in waiting:
        np.copyto(*pair)
    run()
    if y is not out:
        np.copyto(out, y)


@_or_portable
def forward(
    formula: Function, x: Array, slope: float, out: Array, *, want_mask: bool
) -> Array | None:
    """Write formula(x, slope) into out; return the mask bits if they are wanted."""
    laid = lay_flat(out, [x], _loops.empty_like, c_order=want_mask)
    y, _, (flat_y, flat_x), waiting = laid
    bits = None
    if want_mask:
        bits = _loops.empty_bytes(-(-x.size // 8))
        run = _loops.forward_mask(formula, flat_x, slope, flat_y, bits)
    else:
        run = _loops.forward(formula, flat_x, slope, flat_y)
    _finish(run, waiting, y, out)
    return bits


@_or_portable
def backward(
    gradient: Function, grad: Array, saved: Array, slope: float, out: Array
) -> None:
    """Write gradient(grad, saved, slope) into out."""
    laid = lay_flat(out, [grad, saved], _loops.empty_like)
    y, _, (flat_y, flat_grad, flat_saved), waiting = laid
    run = _loops.backward(gradient, flat_grad, slope, flat_y, flat_saved)
    _finish(run, waiting, y, out)


@_or_portable
def backward_mask(
    gradient: Function, grad: Array, bits: Array, slope: float, out: Array
) -> None:
    """Write gradient(grad, 1 or 0, slope) into out; the bits are in C order."""
    if np.may_share_memory(bits, out):
        bits = bits.copy()
    laid = lay_flat(out, [grad], _loops.empty_like, c_order=True)
    y, _, (flat_y, flat_grad), waiting = laid
    bits = np.ascontiguousarray(bits)
    run = _loops.backward_mask(gradient, flat_grad, slope, flat_y, bits)
    _finish(run, waiting, y, out)


# A weight for each channel ------------------------------------------------------------


@_or_portable
def prelu(formula: Function, x: Array, weight: Array, out: Array) -> None:
    """Write formula(x, weight of x's channel) into out."""
    y, order, (flat_y, flat_x), waiting = lay_flat(out, [x], _loops.empty_like)
    if x.size == 0:
        return
    weight = weight.transpose(order)
    view = channels_of(y.transpose(order).shape, weight.shape)
    slopes = slopes_of(weight, view, x)
    run = _loops.prelu(formula, flat_x, slopes, flat_y, view.inner)
    _finish(run, waiting, y, out)


@_or_portable
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
    laid = lay_flat(out, [grad, x], _loops.empty_like, may_wait=False)
    y, order, (flat_y, flat_grad, flat_x), _ = laid
    weight = weight.transpose(order)
    view = channels_of(y.transpose(order).shape, weight.shape)
    slopes = slopes_of(weight, view, x)
    sums = np.empty((2, view.channels))
    # Nothing may fail once out is written, so that sums of sums are for another array.
    finite = None if view.spread else np.empty(view.span, bool)
    if view.spread and y is out:
        y = _loops.empty_like(y)
        flat_y = flat(y, order)
    operands = flat_grad, flat_x, slopes, flat_y, view.inner, sums
    _loops.prelu_backward(gradient, *operands)()
    axes = sorted(range(x.ndim), key=order.__getitem__)
    with np.errstate(all="ignore"):
        sums = added_up(sums.reshape(2, *view.span), view.spread)
        # Past an infinity or a NaN the errors are NaN and say nothing.
        total, errors = sums[0, ...], sums[1, ...]
        np.add(total, errors, out=total, where=np.isfinite(total, out=finite))
        total = total.reshape(weight.shape).transpose(axes).reshape(out_weight.shape)
        if y is not out:
            np.copyto(out, y)
        out_weight[...] = total  # beyond a half float it is an infinity
