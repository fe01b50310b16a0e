"""From the type of an array to its engine, found without importing anything."""

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from numpy import may_share_memory, ndarray

from fastrelu import cpu
from fastrelu._arguments import is_accepted, is_on_gpu
from fastrelu.mask import Mask

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
    return importlib.import_module("fastrelu.cuda")


class PlainCalls:
    """The short way for plain arrays.

    At a thousand elements the checks cost more than the work, so the engine has calls
    that ask the few questions that say that no other check could fail.  Here is what
    these leave to Python: the first of its kind, memory from the pool, masks.  Whatever
    gives a method pause, it leaves to the long way and its error messages: it then
    returns None.
    """

    def __init__(
        self, formula: Callable[..., Any], *, gradient: bool, integers: bool
    ) -> None:
        self.formula, self.integers = formula, integers
        self.flat = cpu.flat_call(formula, gradient=gradient)
        self.masked = cpu.mask_call(formula, gradient=gradient)
        self.by_channel = cpu.channel_call(formula)
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
        bits = cpu.empty_bytes((x.size + 7) >> 3)
        y = self.masked.call(x, slope, inplace, out, bits)
        if y is None:
            y = self._again(self.masked, x, slope, inplace, out, bits)
            if y is None:
                return None
        mask = Mask.__new__(Mask)
        mask.shape, mask.bits = x.shape, bits
        return y, mask

    def backward(
        self, grad: Any, saved: Any, slope: Any, inplace: Any, out: Any
    ) -> Any:
        if type(grad) is not ndarray:
            calls = self.on_gpu.get(type(grad)) or self._elsewhere(grad)
            return calls and calls.backward(grad, saved, slope, inplace, out)
        call = self.flat
        if type(saved) is Mask:
            try:  # what was changed since the mask was made may be anything
                if saved.shape != grad.shape:
                    return None
                call, saved = self.masked, saved.bits
            except Exception:  # noqa: BLE001
                return None
        dx = call.call(grad, slope, inplace, out, saved)
        return self._again(call, grad, slope, inplace, out, saved) if dx is None else dx

    def _again(
        self, call: cpu.Call, a: Any, slope: Any, inplace: Any, out: Any, *b: Any
    ) -> Any:
        """Call once more with what was missing, if that is why nothing came of it."""
        if type(a) is not ndarray or not a.flags.forc or not self._takes(a.dtype):
            return None
        call.prepare(a.dtype, a.nbytes, in_place=inplace is True or out is a)
        if out is None and inplace is False and a.nbytes >= cpu.SMALLEST:
            out = cpu.empty_like(a)
        return call.call(a, slope, inplace, out, *b)

    def _takes(self, dtype: np.dtype[Any]) -> bool:
        return is_accepted(dtype, self.integers) and dtype.isnative

    def channels(self, x: Any, weight: Any, axis: Any, inplace: Any, out: Any) -> Any:
        """Take one slope for each index of an axis, or one for all."""
        call = self.by_channel
        y = call.call(x, weight, axis, inplace, out)
        if y is not None:
            return y
        if type(x) is not ndarray:
            calls = self.on_gpu.get(type(x)) or self._elsewhere(x)
            return calls and calls.channels(x, weight, axis, inplace, out)
        if not self._takes(x.dtype):
            return None
        slopes = _slopes(weight, x, axis)
        if slopes is None or not x.flags.c_contiguous:
            return None
        narrow = False
        if slopes.size != 1:
            after = x.ndim - 1 - axis if axis >= 0 else -1 - axis
            narrow = math.prod(x.shape[x.ndim - after :]) < cpu.NARROW
        in_place = inplace is True or out is x
        call.prepare(x.dtype, x.nbytes, in_place=in_place, block=int(narrow))
        if out is None and inplace is False and x.nbytes >= cpu.SMALLEST:
            out = cpu.empty_like(x)
        return call.call(x, slopes, axis, inplace, out)

    def channels_backward(
        self, grad: Any, x: Any, weight: Any, axis: Any, inplace: Any, out: Any
    ) -> Any:
        """Return both gradients."""
        if type(grad) is not ndarray:
            calls = self.on_gpu.get(type(grad)) or self._elsewhere(grad)
            return calls and calls.channels_backward(
                grad, x, weight, axis, inplace, out
            )
        if (
            type(x) is not ndarray
            or not grad.size
            or x.dtype != grad.dtype
            or x.shape != grad.shape
            or not self._takes(x.dtype)
        ):
            return None
        slopes = _slopes(weight, x, axis)
        if slopes is None:
            return None
        out_weight = None
        if type(out) is tuple and len(out) == 2:
            out, out_weight = out
        y = _target(grad, x, inplace, out)
        if y is None or may_share_memory(y, weight):
            return None
        if out_weight is not None and (
            not _fits(out_weight, weight) or may_share_memory(y, out_weight)
        ):
            return None
        half = slopes is not weight  # and is rounded once, from float64
        total = np.empty(weight.shape, np.float64 if half else weight.dtype)
        cpu.channel_gradients(self.formula, grad, x, slopes, axis, y, total)
        if half:
            with np.errstate(all="ignore"):  # a sum beyond its type is an infinity
                total = total.astype(weight.dtype)
        if out_weight is not None:
            out_weight[...] = total
            total = out_weight
        return y, total


def _slopes(weight: Any, x: Any, axis: Any) -> Any:
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
    product = cpu.lane_of(x.dtype).product
    if weight.dtype == product:
        return weight
    return weight.astype(product) if weight.dtype == x.dtype else None


def _fits(y: Any, x: Any) -> bool:
    """Say whether y can take x's result without another question."""
    return (
        type(y) is ndarray
        and y.dtype == x.dtype
        and y.shape == x.shape
        and y.flags.carray
    )


def _target(a: Any, b: Any, inplace: Any, out: Any) -> Any:
    """Return where to write, or None if an array lies in another way than flat."""
    if not a.flags.carray or not b.flags.carray:
        return None
    if out is None:
        if inplace is False:
            return cpu.empty_like(a)
        if inplace is not True:
            return None
        y = a
    elif inplace is not False:
        return None
    elif out is a or (_fits(out, a) and not may_share_memory(out, a)):
        y = out
    else:
        return None
    return y if b is y or not may_share_memory(y, b) else None
