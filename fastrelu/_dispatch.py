"""From the type of an array to its engine, found without importing anything."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from numpy import empty_like, ndarray

from fastrelu import cpu
from fastrelu._arguments import is_accepted
from fastrelu.mask import Mask

_HUGE = 3.4e38  # a slope beyond is not finite, or not in float32
PLAIN = 1 << 18  # bytes up to which one thread is quickest and the pool not asked


def engine_of(name: str, value: object) -> ModuleType:
    """Return the engine for an argument: all that NumPy can read runs on the CPU."""
    if hasattr(value, "__cuda_array_interface__"):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        msg = (
            f"{name} must be in the host's memory, got a {kind} on a GPU: this version "
            "has no CUDA engine"
        )
        raise TypeError(msg)
    return cpu


class PlainCalls:
    """The short way for small NumPy arrays.

    At a thousand elements the checks cost more than the work, so this class asks the
    few questions that say that no other check could fail.  Whatever gives it pause, it
    leaves to the long way and its error messages: its methods then return None.
    """

    def __init__(
        self, formula: Callable[..., Any], *, gradient: bool, integers: bool
    ) -> None:
        self.formula, self.gradient, self.integers = formula, gradient, integers
        self.by_dtype: dict[np.dtype[Any], cpu.Plain] = {}

    def _add(self, dtype: np.dtype[Any]) -> cpu.Plain | None:
        if not is_accepted(dtype, self.integers) or not dtype.isnative:
            return None
        plain = cpu.Plain(self.formula, dtype, gradient=self.gradient)
        return self.by_dtype.setdefault(dtype, plain)

    def forward(
        self, x: Any, slope: Any, inplace: Any, out: Any, return_mask: Any
    ) -> Any:
        if type(x) is not ndarray or x.nbytes > PLAIN or not x.ndim:
            return None
        plain = self.by_dtype.get(x.dtype) or self._add(x.dtype)
        if plain is None:
            return None
        known = plain.slope
        if known[0] is not slope and (known := _know(slope, plain)) is None:
            return None
        if return_mask is not False:
            return _with_mask(plain, x, slope, inplace, out, return_mask)
        if out is None:
            if inplace is False and (x.ndim == 1 or x.flags.c_contiguous):
                return plain.ufunc(x, known[1])
            if inplace is True and x.flags.carray:
                if x.size > 1:
                    return plain.ufunc(x, known[1], x)
                x[...] = plain.ufunc(x, known[1])  # quicker than onto itself
                return x
        elif inplace is False and fits(out, x):
            return plain.ufunc(x, known[1], out)
        return None

    def backward(self, grad: Any, saved: Any, slope: Any, inplace: Any, out: Any) -> Any:
        if type(grad) is not ndarray or grad.nbytes > PLAIN or not grad.ndim:
            return None
        plain = self.by_dtype.get(grad.dtype) or self._add(grad.dtype)
        if plain is None:
            return None
        known = plain.slope
        if known[0] is not slope and (known := _know(slope, plain)) is None:
            return None
        if type(saved) is Mask:
            return _from_mask(plain, grad, saved, slope, inplace, out)
        if (
            type(saved) is not ndarray
            or saved.dtype is not grad.dtype
            or saved.shape != grad.shape
        ):
            return None
        if out is None:
            if inplace is False and (grad.ndim == 1 or grad.flags.c_contiguous):
                return plain.ufunc(grad, saved, known[1])
            if inplace is True and grad.flags.carray:
                if grad.size > 1:
                    return plain.ufunc(grad, saved, known[1], grad)
                grad[...] = plain.ufunc(grad, saved, known[1])
                return grad
        elif inplace is False and fits(out, grad):
            return plain.ufunc(grad, saved, known[1], out)
        return None


def _know(slope: Any, plain: cpu.Plain) -> tuple[float, Any] | None:
    """Return (slope, slope as an array) and keep them: most calls repeat theirs."""
    if type(slope) is not float or not -_HUGE < slope < _HUGE:
        return None
    plain.slope = known = slope, np.asarray(slope, plain.compute)
    return known


def fits(y: Any, x: Any) -> bool:
    """Say whether y can take x's result without another question."""
    return (
        type(y) is ndarray
        and y.dtype is x.dtype
        and y.shape == x.shape
        and y.flags.carray
    )


def _with_mask(
    plain: cpu.Plain, x: Any, slope: float, inplace: Any, out: Any, return_mask: Any
) -> Any:
    if return_mask is not True or not x.flags.carray:
        return None
    mask = Mask.__new__(Mask)
    mask.shape = x.shape
    mask.bits = bits = np.empty((x.size + 7) >> 3, np.uint8)
    y = _run_masked(plain, x, bits, slope, inplace, out)
    return None if y is None else (y, mask)


def _from_mask(
    plain: cpu.Plain, grad: Any, mask: Mask, slope: float, inplace: Any, out: Any
) -> Any:
    if mask.shape != grad.shape or not grad.flags.carray:
        return None
    bits = mask.bits
    if type(bits) is not ndarray or not bits.flags.carray:
        return None
    return _run_masked(plain, grad, bits, slope, inplace, out)


def _run_masked(
    plain: cpu.Plain, a: Any, bits: Any, slope: float, inplace: Any, out: Any
) -> Any:
    if inplace is True and out is None:
        out = a
    elif inplace is not False or not (out is None or out is a or fits(out, a)):
        return None
    storage = plain.storage
    flat = a.ravel() if storage is None else a.ravel().view(storage)
    if out is a:
        return a if plain.masked_inplace(flat, bits, slope) else None
    if out is None:
        out = empty_like(a)
    target = out.ravel() if storage is None else out.ravel().view(storage)
    return out if plain.masked(flat, bits, target, slope) else None
