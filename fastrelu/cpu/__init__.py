"""The NumPy engine: which loops run, and what the checks ask of arrays.

There are two kinds of loops.  Those of `fast` rest on facts about CPython, NumPy and
Numba, which are proven once in each process.  Where one does not hold, those of
`portable`, plain Numba, give the same results.
"""

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from fastrelu._arguments import generator, is_on_gpu, kind_of, shown
from fastrelu._dtypes import rounded, row_of
from fastrelu._foreign import ANSWERS
from fastrelu._layout import channels_of, memory_order, slopes_of
from fastrelu._sums import added_up
from fastrelu.cpu import abi, libraries, portable
from fastrelu.cpu.shield import alone as alone

Array = Any  # numpy.ndarray of any dtype; its own generic type says nothing more here
Function = Callable[..., Any]
Operands = Sequence[tuple[str, Any]]
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
        With CuPy's names: `used_bytes`, `free_bytes`, `total_bytes`, `free_all_blocks`,
        `get_limit` and `set_limit`.

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
    """Return a value as a numpy.ndarray: itself, its memory, or what NumPy makes of it."""
    if type(value) is np.ndarray:
        return value
    libraries.refuse(value)
    if is_on_gpu(value):
        msg = f"as the others are, got {kind_of(value)} on a GPU"
        raise TypeError(msg)
    if issubclass(type(value), np.ndarray):
        return value
    theirs = libraries.read(value, not convert)
    if theirs is not None:
        return theirs
    if not convert:
        msg = f"one that can be written to, got {kind_of(value)}"
        raise TypeError(msg)
    try:
        if type(value) in libraries.LISTS:
            libraries.refuse_within(value)
        return np.asarray(value)
    except ANSWERS as error:
        msg = f"got {kind_of(value)}: {shown(error)}"
        raise TypeError(msg) from error


as_came = libraries.as_came
written = libraries.written
has_array, array_on = libraries.has_array, libraries.array_on


def lend(*arrays: Array) -> None:
    """Take note of arrays that a call has for itself: they live as long as it does."""


def hold(x: Array) -> Array:
    """Return a view that is ours alone: nobody else can give it another shape."""
    return np.ndarray.view(x, np.ndarray)


@_or_portable
def empty_like(x: Array) -> Array:
    """Return a new array of x's shape, dtype and memory order."""
    return _loops.empty_like(x)


def uniform(x: Array, lower: float, upper: float, rng: Any) -> Array:
    """Return an array like x of numbers drawn in C order, in the type of products."""
    row = row_of(x.dtype)
    assert row is not None
    drawn = generator(rng).random(x.shape, row.product)
    with np.errstate(all="ignore"):
        drawn = between(drawn, lower, upper, row.compute)
        return np.asarray(drawn).astype(x.dtype, copy=False)


def between(drawn: Array, lower: float, upper: float, dtype: str) -> Array:
    """Return numbers drawn from 0 to 1, which are lost, as numbers from lower to upper."""
    if upper - lower > float(np.finfo(dtype).max):
        return lower * (1 - drawn) + upper * drawn
    drawn *= upper - lower
    drawn += lower
    return drawn


quick_call = _loops.quick_call


# Elementwise --------------------------------------------------------------------------


@_or_portable
def elementwise(function: Function, operands: Operands, out: Array) -> None:
    """Write a function of the operands into out."""
    _loops.elementwise(function, operands, out)


@_or_portable
def elementwise_mask(
    function: Function, active: Function, kept: int, operands: Operands, out: Array
) -> tuple[Array, tuple[int, ...]]:
    """Write a function of the operands into out; return mask bits and their order."""
    bits, order = _loops.elementwise_mask(function, active, kept, operands, out)
    return bits, order


# Both gradients of PReLU ------------------------------------------------------------


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
    order = memory_order(out.shape, out.strides)
    weight = weight.transpose(order)
    view = channels_of(out.transpose(order).shape, weight.shape)
    slopes = slopes_of(weight, view, x)
    sums = np.empty((2, view.channels))
    # Nothing may fail once out is written: what takes memory later is for another array.
    apart = view.spread or out_weight.dtype.kind == "V"
    finite = None if apart else np.empty(view.span, bool)
    y = _loops.empty_like(out) if apart else out
    operands = grad, x, slopes, y, order, view.inner, sums
    _loops.weight_sums(gradient, *operands)()
    axes = sorted(range(x.ndim), key=order.__getitem__)
    with np.errstate(all="ignore"):
        sums = added_up(sums.reshape(2, *view.span), view.spread)
        # Past an infinity or a NaN the errors are NaN and say nothing.
        total, errors = sums[0, ...], sums[1, ...]
        np.add(total, errors, out=total, where=np.isfinite(total, out=finite))
        total = total.reshape(weight.shape).transpose(axes).reshape(out_weight.shape)
        if out_weight.dtype.kind == "V":
            total = rounded(total, out_weight.dtype)
        if y is not out:
            np.copyto(out, y)
        out_weight[...] = total  # beyond a half float it is an infinity
