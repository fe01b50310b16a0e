"""From the type of an array to its engine, found without importing anything."""

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from numpy import ndarray

from fastrelu import cpu
from fastrelu._arguments import is_on_gpu
from fastrelu._dtypes import is_accepted, row_of
from fastrelu.cpu.abi import Unproven
from fastrelu.mask import ANSWERS, Mask

_ON_GPU: set[type] = set()  # the types of arrays on a GPU that came so far


def engine_of(value: object) -> ModuleType:
    """Return the engine for an array: all that NumPy can read runs on the CPU."""
    if not is_on_gpu(value):
        return cpu
    engine = _cuda()
    _ON_GPU.add(type(value))
    return engine


@functools.cache
def _cuda() -> ModuleType:
    """Return the engine for arrays on a GPU, imported when the first one comes."""
    if importlib.util.find_spec("numba_cuda") is None:
        msg = (
            "fastrelu needs numba-cuda for arrays on a GPU: "
            'pip install "fastrelu[cuda13]", or "fastrelu[cuda12]" for a driver of '
            "CUDA 12"
        )
        raise ImportError(msg)
    return importlib.import_module(f"{__package__}.cuda")


def _is_plain(mask: Mask) -> bool:
    """Say whether to compare a mask's shape runs no code of other people."""
    shape = getattr(mask, "shape", None)
    return type(shape) is tuple and all(type(length) is int for length in shape)


class PlainCalls:
    """The short way for plain arrays.

    At a thousand elements the checks cost more than the work, so the engine has calls
    that ask the few questions that say that no other check could fail.  Here is what
    these leave to Python: the first of its kind, and masks.  Whatever gives a method
    pause, it leaves to the long way and its error messages: it then returns None.
    """

    def __init__(
        self, formula: Callable[..., Any], *, gradient: bool, integers: bool
    ) -> None:
        self.formula, self.integers = formula, integers
        self.flat = cpu.flat_call(formula, gradient=gradient)
        self.masked = cpu.mask_call(formula, gradient=gradient)
        self.by_channel = cpu.channel_call(formula, gradient=gradient)
        self.on_gpu: dict[type, Any] = {}

    def _elsewhere(self, x: Any) -> Any:
        """Return the calls for a type of arrays on a GPU, from its second array on."""
        if type(x) not in _ON_GPU:
            return None
        calls = _cuda().Calls(type(x), self.formula, integers=self.integers)
        return self.on_gpu.setdefault(type(x), calls)

    def forward(
        self, x: Any, slope: Any, inplace: Any, out: Any, return_mask: Any
    ) -> Any:
        if return_mask is False:
            y = self.flat.call(x, slope, inplace, out)
            if y is not None:
                return y
        if type(x) is not ndarray:
            calls = self.on_gpu.get(type(x)) or self._elsewhere(x)
            return calls and calls.forward(x, slope, inplace, out, return_mask)
        if return_mask is False:
            return self._again(self.flat, x, slope, inplace, out)
        if return_mask is not True:
            return None
        shape = x.shape
        try:
            bits = cpu.empty_bytes((x.size + 7) >> 3)
        except (MemoryError, Unproven):  # another argument may be wrong as well
            return None
        y = self.masked.call(x, slope, inplace, out, bits)
        if y is None:
            y = self._again(self.masked, x, slope, inplace, out, bits)
            if y is None:
                return None
        mask = Mask.__new__(Mask)
        mask.shape, mask.bits = shape, bits
        return y, mask

    def backward(
        self, grad: Any, saved: Any, slope: Any, inplace: Any, out: Any
    ) -> Any:
        if type(grad) is not ndarray:
            calls = self.on_gpu.get(type(grad)) or self._elsewhere(grad)
            return calls and calls.backward(grad, saved, slope, inplace, out)
        call = self.flat
        if type(saved) is Mask:
            try:
                if saved.shape != grad.shape:
                    return None
                call, saved = self.masked, saved.bits
            except (*ANSWERS, MemoryError):
                if _is_plain(saved):  # a signal's handler has raised that
                    raise
                return None  # what was changed since it was made may be anything
        dx = call.call(grad, slope, inplace, out, saved)
        return self._again(call, grad, slope, inplace, out, saved) if dx is None else dx

    def _again(
        self,
        call: Any,
        a: Any,
        slope: Any,
        inplace: Any,
        out: Any,
        *others: Any,
        block: int = 0,
    ) -> Any:
        """Call once more with what was missing, if that is why nothing came of it."""
        if not cpu.is_fast() or type(a) is not ndarray:
            return None
        if not a.flags.forc or not self._takes(a.dtype):
            return None
        target = out[0] if type(out) is tuple and out else out
        in_place = inplace is True or target is a
        try:
            call.prepare(a.dtype, a.nbytes, in_place=in_place, block=block)
        except Unproven as error:
            cpu.give_up(error)
            return None
        return call.call(a, slope, inplace, out, *others)

    def _takes(self, dtype: np.dtype[Any]) -> bool:
        return is_accepted(row_of(dtype), integers=self.integers) and dtype.isnative

    def channels(
        self, a: Any, weight: Any, axis: Any, inplace: Any, out: Any, *x: Any
    ) -> Any:
        """Take one slope for each index of an axis, or one for all.

        For the gradients, `a` is that of the output, and `x` follows.
        """
        call = self.by_channel
        y = call.call(a, weight, inplace, out, axis, *x)
        if y is not None:
            return y
        if type(a) is not ndarray:
            calls = self.on_gpu.get(type(a)) or self._elsewhere(a)
            return calls and calls.channels(a, weight, axis, inplace, out, *x)
        if not self._takes(a.dtype):
            return None
        if type(weight) is not ndarray or type(axis) is not int:
            return None
        block = 0
        if weight.size != 1 and -a.ndim <= axis < a.ndim:
            inner = math.prod(a.shape[axis + 1 :] if axis != -1 else ())
            block = call.block_of(a, weight.size, inner)
        return self._again(call, a, weight, inplace, out, axis, *x, block=block)
