"""From the type of an array to its engine, found without importing anything."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from numpy import empty_like, ndarray

from fastrelu import cpu
from fastrelu._arguments import is_accepted

PLAIN = 1 << 13  # elements up to which a call costs more than its loop


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

    def run(self, a: Any, b: Any, slope: Any, inplace: Any, out: Any) -> Any:
        """Return the result, or None for the long way."""
        if type(a) is not ndarray or a.size > PLAIN or not a.flags.carray:
            return None
        dtype = a.dtype
        loops = self[dtype]
        if loops is None or type(slope) is not float or slope - slope != 0.0:
            return None
        flat = a.ravel()
        if b is a:
            other = flat
        elif _fits(b, a):
            other = b.ravel()
        else:
            return None
        serial, serial_inplace, storage = loops
        if storage is not None:
            flat = flat.view(storage)
            other = flat if b is a else other.view(storage)
        if inplace is False:
            if out is None:
                out = empty_like(a)
            elif not _fits(out, a):
                return None
            target = out.ravel() if storage is None else out.ravel().view(storage)
            return out if serial(flat, other, target, slope) else None
        if inplace is not True or out is not None:
            return None
        serial_inplace(flat, other, slope)
        return a


def _fits(x: Any, a: Any) -> bool:
    return (
        type(x) is ndarray
        and x.dtype is a.dtype
        and x.shape == a.shape
        and x.flags.carray
    )
