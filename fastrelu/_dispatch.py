"""From the type of an array to its engine, found without importing anything."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from numpy import empty_like, ndarray

from fastrelu import cpu
from fastrelu._arguments import is_accepted
from fastrelu.mask import Mask

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


class PlainCalls(dict[np.dtype[Any], Any]):
    """The short way for small, contiguous NumPy arrays: dtype -> compiled loops.

    At a thousand elements the checks cost more than the work, so this class asks the
    few questions that say that no other check could fail.  Whatever gives it pause, it
    leaves to the long way and its error messages.
    """

    def __init__(
        self, formula: Callable[..., Any], *, gradient: bool, integers: bool
    ) -> None:
        self.formula, self.gradient, self.integers = formula, gradient, integers

    def __missing__(self, dtype: np.dtype[Any]) -> Any:
        if not is_accepted(dtype, self.integers) or not dtype.isnative:
            return None
        loops = cpu.plain(self.formula, dtype, gradient=self.gradient)
        self[dtype] = loops
        return loops

    def run(
        self, a: Any, b: Any, slope: Any, inplace: Any, out: Any, return_mask: Any
    ) -> Any:
        """Return the result, or None for the long way.

        `b` is the saved state, or `a` again where there is none.
        """
        if type(a) is not ndarray or a.nbytes > PLAIN or not a.flags.carray:
            return None
        loops = self[a.dtype]
        if loops is None or type(slope) is not float or slope - slope != 0.0:
            return None
        if inplace is True and out is None:
            out = a
        elif inplace is not False or not (out is None or out is a or _fits(out, a)):
            return None
        (serial, serial_inplace), masked, storage = loops
        flat = a.ravel() if storage is None else a.ravel().view(storage)
        mask = None
        if return_mask is True:
            mask = Mask.__new__(Mask)
            mask.shape = a.shape
            mask.bits = other = np.empty((a.size + 7) >> 3, np.uint8)
            serial, serial_inplace = masked
        elif return_mask is not False:
            return None
        elif b is a:
            other = flat
        elif type(b) is Mask and b.shape == a.shape and type(b.bits) is ndarray:
            other = b.bits
            if not other.flags.carray:
                return None
            serial, serial_inplace = masked
        elif _fits(b, a):
            other = b.ravel() if storage is None else b.ravel().view(storage)
        else:
            return None
        if out is a:
            ran = serial_inplace(flat, other, slope)
        else:
            if out is None:
                out = empty_like(a)
            target = out.ravel() if storage is None else out.ravel().view(storage)
            ran = serial(flat, other, target, slope)
        if not ran:  # the arrays overlap
            return None
        return out if mask is None else (out, mask)


def _fits(x: Any, a: Any) -> bool:
    return (
        type(x) is ndarray
        and x.dtype is a.dtype
        and x.shape == a.shape
        and x.flags.carray
    )
