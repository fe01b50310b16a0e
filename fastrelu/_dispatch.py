"""From the type of an array to its engine, found without importing anything."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from numpy import may_share_memory, ndarray

from fastrelu import cpu
from fastrelu._arguments import is_accepted
from fastrelu.mask import Mask

_HUGE = 3.4e38  # a slope beyond is not finite, or not in float32
_FEW = 1 << 16  # bytes up to which NumPy is quick at meeting elements with slopes,
_RUNS = 256  # and the inner loops that it may take to do so


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
    """The short way for plain NumPy arrays.

    At a thousand elements the checks cost more than the work, and at a hundred thousand
    still a third, so this class asks the few questions that say that no other check
    could fail.  Whatever gives it pause, it leaves to the long way and its error
    messages: its methods then return None.
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
        if type(x) is not ndarray or not x.ndim:
            return None
        plain = self.by_dtype.get(x.dtype) or self._add(x.dtype)
        if plain is None:
            return None
        known = plain.slope
        if known[0] is not slope:
            learnt = _know(slope, plain)
            if learnt is None:
                return None
            known = learnt
        if return_mask is not False:
            return _with_mask(plain, x, slope, inplace, out, return_mask)
        if x.nbytes > plain.small:
            if x.nbytes >= cpu.SMALLEST:
                return _large(plain, x, x, known, inplace, out)
            cpu.ready()
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

    def backward(
        self, grad: Any, saved: Any, slope: Any, inplace: Any, out: Any
    ) -> Any:
        if type(grad) is not ndarray or not grad.ndim:
            return None
        plain = self.by_dtype.get(grad.dtype) or self._add(grad.dtype)
        if plain is None:
            return None
        known = plain.slope
        if known[0] is not slope:
            learnt = _know(slope, plain)
            if learnt is None:
                return None
            known = learnt
        if type(saved) is Mask:
            return _from_mask(plain, grad, saved, slope, inplace, out)
        if (
            type(saved) is not ndarray
            or saved.dtype is not grad.dtype
            or saved.shape != grad.shape
            or not (saved.ndim == 1 or saved.flags.c_contiguous)
        ):
            return None
        if grad.nbytes > plain.small:
            if grad.nbytes >= cpu.SMALLEST:
                return _large(plain, grad, saved, known, inplace, out)
            cpu.ready()
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

    def channels(self, x: Any, weight: Any, axis: Any, inplace: Any, out: Any) -> Any:
        """Take one slope for each index of an axis, or one for all."""
        if type(x) is not ndarray or not x.ndim:
            return None
        plain = self.by_dtype.get(x.dtype) or self._add(x.dtype)
        if plain is None:
            return None
        slopes = _slopes(weight, plain, x, axis)
        if slopes is None:
            return None
        run = x.size  # elements that meet one row of slopes, or one slope
        if slopes.size != 1:
            after = x.ndim - 1 - axis if axis >= 0 else -1 - axis
            run = math.prod(x.shape[-after:]) if after else slopes.size
        small = plain.small if run == x.size else _FEW
        if x.nbytes <= small and x.size <= _RUNS * run:
            if slopes.size != 1 and after:
                slopes = slopes.reshape(slopes.size, *(1,) * after)
            if out is None and inplace is False and x.flags.c_contiguous:
                return plain.ufunc(x, slopes)
            y = _target(x, x, inplace, out)
            return None if y is None else plain.ufunc(x, slopes, y)
        y = _target(x, x, inplace, out)
        if y is None or may_share_memory(y, weight):
            return None
        plain.run_channels(x, slopes, axis, y)
        return y

    def channels_backward(
        self, grad: Any, x: Any, weight: Any, axis: Any, inplace: Any, out: Any
    ) -> Any:
        """Return both gradients."""
        if type(grad) is not ndarray or not grad.size or not grad.ndim:
            return None
        plain = self.by_dtype.get(grad.dtype) or self._add(grad.dtype)
        if (
            plain is None
            or type(x) is not ndarray
            or x.dtype is not grad.dtype
            or x.shape != grad.shape
        ):
            return None
        slopes = _slopes(weight, plain, x, axis)
        if slopes is None:
            return None
        out_weight = None
        if type(out) is tuple and len(out) == 2:
            out, out_weight = out
        y = _target(grad, x, inplace, out)
        if y is None or may_share_memory(y, weight):
            return None
        if out_weight is not None and (
            not fits(out_weight, weight) or may_share_memory(y, out_weight)
        ):
            return None
        half = slopes is not weight  # and is rounded once, from float64
        total = np.empty(weight.shape, np.float64 if half else weight.dtype)
        plain.run_channels_backward(grad, x, slopes, axis, y, total)
        if half:
            with np.errstate(all="ignore"):  # a sum beyond its type is an infinity
                total = total.astype(weight.dtype)
        if out_weight is not None:
            out_weight[...] = total
            total = out_weight
        return y, total


def _slopes(weight: Any, plain: cpu.Plain, x: Any, axis: Any) -> Any:
    """Return a one-dimensional weight in the type of the products, or None."""
    if type(weight) is not ndarray or weight.ndim != 1 or type(axis) is not int:
        return None
    if not weight.flags.carray:
        return None
    if not -x.ndim <= axis < x.ndim:
        if weight.size != 1 or axis != 1:  # the default, where it is of no matter
            return None
    elif weight.size != 1 and weight.size != x.shape[axis]:
        return None
    if weight.dtype is plain.compute:
        return weight
    return weight.astype(plain.compute) if weight.dtype is x.dtype else None


def _know(slope: Any, plain: cpu.Plain) -> tuple[float, Any] | None:
    """Return (slope, slope as an array) and keep them for the next call."""
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
    if return_mask is not True:
        return None
    y = _target(x, x, inplace, out)
    if y is None:
        return None
    mask = Mask.__new__(Mask)
    mask.shape = x.shape
    mask.bits = bits = cpu.empty_bytes((x.size + 7) >> 3)
    plain.run_masked(x, bits, slope, y)
    return y, mask


def _from_mask(
    plain: cpu.Plain, grad: Any, mask: Mask, slope: float, inplace: Any, out: Any
) -> Any:
    bits = mask.bits
    if type(bits) is not ndarray or mask.shape != grad.shape:
        return None
    fresh = out is None and inplace is False and plain.storage is None
    if fresh and grad.nbytes <= plain.small and grad.flags.carray and bits.flags.carray:
        dx = np.empty_like(grad)  # the most common case, without further calls
        plain.masked(grad.ravel(), bits, dx.ravel(), slope, 0)
        return dx
    y = _target(grad, bits, inplace, out)
    if y is not None:
        plain.run_masked(grad, bits, slope, y)
    return y


def _large(
    plain: cpu.Plain,
    a: Any,
    b: Any,
    slope: tuple[float, Any],
    inplace: Any,
    out: Any,
) -> Any:
    y = _target(a, b, inplace, out)
    if y is not None:
        plain.run(a, b, slope, y)
    return y


def _target(a: Any, b: Any, inplace: Any, out: Any) -> Any:
    """Return where to write, or None if an array lies in another way than flat."""
    if not a.flags.carray or not (b is a or b.flags.carray):
        return None
    if out is None:
        if inplace is False:
            return cpu.empty_like(a)
        if inplace is not True:
            return None
        y = a
    elif inplace is not False:
        return None
    elif out is a or (fits(out, a) and not may_share_memory(out, a)):
        y = out
    else:
        return None
    return y if b is a or b is y or not may_share_memory(y, b) else None
