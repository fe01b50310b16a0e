"""Quick calls: for plain arrays, from the arguments to the launch.

To ask every array all that could be wrong with it takes Python ten times as long as to
queue the work.  Here a few questions say that no other check could fail, as they do on
the CPU, and what they leave open is left to the long way: a call then returns None.

Nothing here waits for the device, and all memory comes from the library that an array
belongs to, so that what is queued can be captured in a graph.
"""

import math
from collections.abc import Callable
from typing import Any

from fastrelu._dtypes import BY_NAME, is_accepted, name_of
from fastrelu.cuda import launch
from fastrelu.cuda.arrays import Place, library_of
from fastrelu.cuda.launch import kernel
from fastrelu.cuda.work import (
    BYTES,
    INT32,
    Work,
    both,
    compute_of,
    finish,
    head_of,
    run_flat,
    run_mask,
    weight_layout,
)
from fastrelu.mask import ANSWERS, Mask

_Plan = tuple[launch.Kernel, Any, int]  # with the slope's type and an element's bytes
_View = tuple[int, int, int]  # (outer, channels, inner)


class Calls:
    """The quick calls of one formula for the arrays of one type."""

    def __init__(
        self, kind: type, formula: Callable[..., Any], *, integers: bool
    ) -> None:
        self.kind: Any = kind
        self.library = library_of(kind)
        self.formula, self.integers = formula, integers
        self.plans: dict[Any, _Plan | None] = {}

    def forward(
        self, x: Any, slope: Any, inplace: Any, out: Any, return_mask: Any
    ) -> Any:
        """Return y, or (y, mask)."""
        if return_mask is False:
            return self._elementwise("input", x, x, slope, inplace, out)
        place = self.library.look(x)
        plan = place and self._plan("mask", x.dtype)
        if return_mask is not True or not place or not plan or not _is_number(slope):
            return None
        start, device, order = place
        code, compute, itemsize = plan
        size = math.prod(x.shape)
        if order or start % BYTES:
            return None
        y, target = self._target(x, place, size * itemsize, inplace, out)
        if not target or target % BYTES:
            return None
        bits = self.library.empty_bytes((size + 7) >> 3, x)
        pointers = start, target, self.library.address(bits)
        stream = self.library.stream(x, device)
        run_mask(code, device, stream, itemsize, size, *pointers, compute(slope))
        mask = Mask.__new__(Mask)
        mask.shape, mask.bits = tuple(x.shape), bits
        return y, mask

    def backward(
        self, grad: Any, saved: Any, slope: Any, inplace: Any, out: Any
    ) -> Any:
        """Return the gradient towards x."""
        if type(saved) is not Mask:
            return self._elementwise("gradient", grad, saved, slope, inplace, out)
        try:
            bits = saved.bits if saved.shape == grad.shape else None
        except (*ANSWERS, MemoryError):  # changed since it was made, it may be anything
            return None
        return self._elementwise("flag", grad, bits, slope, inplace, out)

    def _elementwise(
        self, element: str, a: Any, b: Any, slope: Any, inplace: Any, out: Any
    ) -> Any:
        place = self.library.look(a)
        plan = place and self._plan(element, a.dtype)
        if not place or not plan or not _is_number(slope):
            return None
        start, device, order = place
        code, compute, itemsize = plan
        size = math.prod(a.shape)
        nbytes = length = size * itemsize
        other = beside = start
        if element == "gradient":  # whose result may go where the saved array is
            other = beside = self._beside(b, a, place)
        elif element == "flag":
            beside, length = 0, (size + 7) >> 3  # a vector starts where a byte does
            other = 0 if order else self._bits(b, length, device)
        if not other:
            return None
        y, target = self._target(a, place, nbytes, inplace, out)
        head = head_of(size, itemsize, start, target, beside)
        if not target or head is None:
            return None
        if target != beside and _meet(target, nbytes, other, length):
            return None
        s, stream = compute(slope), self.library.stream(a, device)
        run_flat(code, device, stream, itemsize, size, head, start, other, target, s)
        return y

    def channels(
        self, a: Any, weight: Any, axis: Any, inplace: Any, out: Any, *x: Any
    ) -> Any:
        """Take one slope for each index of an axis, or one for all.

        For the gradients, `a` is that of the output, and `x` follows.
        """
        if x:
            (saved,) = x
            return self._gradients(a, saved, weight, axis, inplace, out)
        return self._by_channel(a, weight, axis, inplace, out)

    def _by_channel(
        self, x: Any, weight: Any, axis: Any, inplace: Any, out: Any
    ) -> Any:
        place = self.library.look(x)
        seen = place and self._weight(weight, x, place, axis)
        if not place or not seen:
            return None
        start, device, _ = place
        other, length, (_, channels, inner) = seen
        element = weight_layout(channels, inner, x.dtype.itemsize)
        plan = element and self._plan(element, x.dtype, weight.dtype)
        size = math.prod(x.shape)
        if not plan or size >= INT32:
            return None
        code, _, itemsize = plan
        y, target = self._target(x, place, size * itemsize, inplace, out)
        head = head_of(size, itemsize, start, target)
        if not target or head is None or _meet(target, size * itemsize, other, length):
            return None
        where = device, self.library.stream(x, device)
        pointers = start, other, target
        run_flat(code, *where, itemsize, size, head, *pointers, inner, channels)
        return y

    def _gradients(
        self, grad: Any, x: Any, weight: Any, axis: Any, inplace: Any, out: Any
    ) -> Any:
        place = self.library.look(grad)
        seen = place and self._weight(weight, grad, place, axis)
        dtypes = seen and self._dtypes(grad.dtype, weight.dtype)
        if not place or not seen or not dtypes:
            return None
        start, device, _ = place
        slopes, length, view = seen
        itemsize = grad.dtype.itemsize
        nbytes = math.prod(grad.shape) * itemsize
        out, dw = out if type(out) is tuple and len(out) == 2 else (out, None)
        saved = self._beside(x, grad, place)
        sums = slopes if dw is None else self._beside(dw, weight, (slopes, device, ()))
        if not saved or not sums or sums % weight.dtype.itemsize:
            return None
        y, target = self._target(grad, place, nbytes, inplace, out)
        if not target or (start | saved | target) % itemsize:
            return None
        written = target, nbytes
        if _meet(*written, slopes, length) or _meet(*written, sums, length):
            return None
        if saved != target and _meet(*written, saved, nbytes):
            return None
        if dw is None:
            dw = self.library.empty_like(weight)
            sums = self.library.address(dw)
        work = Work(self.library, grad, device)
        pointers = start, saved, slopes, target
        try:
            pairs = both(work, self.formula, dtypes, itemsize, pointers, view)
            finish(work, dtypes[1], sums, view[1], pairs)
        finally:
            work.close()
        return y, dw

    # Questions: 0 and None say that the matter is for the long way

    def _plan(self, element: str, dtype: Any, weight: Any = None) -> _Plan | None:
        key = element, dtype, weight
        plan = self.plans.get(key)
        if plan is None and key not in self.plans:
            plan = self.plans[key] = self._make_plan(*key)
        return plan

    def _make_plan(self, element: str, dtype: Any, weight: Any) -> _Plan | None:
        names = self._dtypes(dtype, dtype if weight is None else weight)
        if names is None:
            return None
        options = {"formula": self.formula, "lane": names[0]}
        if element == "mask":
            code = kernel("flat_mask", **options)
        else:
            if weight is not None:
                options["weight"] = names[1]
            code = kernel("flat", element=element, wide=False, **options)
        return code, compute_of(names[0]), dtype.itemsize

    def _dtypes(self, dtype: Any, weight: Any) -> tuple[str, str] | None:
        """Return the names of two dtypes if they go together."""
        name, other = (name_of(of) for of in (dtype, weight))
        mixed = other == "float32" and dtype.itemsize == 2
        taken = is_accepted(BY_NAME.get(name), integers=self.integers)
        return (name, other) if taken and (other == name or mixed) else None

    def _beside(self, b: Any, a: Any, place: Place) -> int:
        """Return the address of an array if it is like another and lies as that does."""
        if type(b) is not self.kind or b.dtype != a.dtype or b.shape != a.shape:
            return 0
        other = self.library.look(b)
        return other[0] if other and other[1:] == place[1:] else 0

    def _bits(self, bits: Any, length: int, device: int) -> int:
        """Return the address of a mask's bits."""
        if type(bits) is not self.kind or tuple(bits.shape) != (length,):
            return 0
        place = self.library.look(bits)
        uint8 = name_of(bits.dtype) == "uint8"
        return place[0] if uint8 and place and place[1:] == (device, ()) else 0

    def _weight(
        self, weight: Any, x: Any, place: Place, axis: Any
    ) -> tuple[int, int, _View] | None:
        """Return a one-dimensional weight's address and bytes, and how x is seen."""
        _, device, order = place
        if type(weight) is not self.kind or type(axis) is not int or order:
            return None
        other, shape = self.library.look(weight), x.shape
        if not other or other[1:] != (device, ()) or len(weight.shape) != 1:
            return None
        channels, itemsize = weight.shape[0], weight.dtype.itemsize
        if other[0] % itemsize:
            return None
        inside = -len(shape) <= axis < len(shape)
        if channels == 1 and (inside or axis == 1):
            view = 1, 1, math.prod(shape)
        elif inside and shape[axis] == channels:
            axis %= len(shape)
            view = math.prod(shape[:axis]), channels, math.prod(shape[axis + 1 :])
        else:
            return None
        return other[0], channels * itemsize, view

    def _target(
        self, a: Any, place: Place, nbytes: int, inplace: Any, out: Any
    ) -> tuple[Any, int]:
        """Return the array to write to and its address."""
        if not nbytes or not launch.is_current(place[1]):
            return None, 0
        if out is None and inplace is False:
            out = self.library.empty_like(a)
        elif out is None and inplace is True:
            out = a
        elif inplace is not False:
            return None, 0
        if out is a:
            return a, place[0]
        target = self._beside(out, a, place)
        apart = not _meet(place[0], nbytes, target, nbytes)
        return (out, target) if apart or target == place[0] else (None, 0)


def _is_number(slope: Any) -> bool:
    return type(slope) is float and abs(slope) < math.inf


def _meet(start: int, length: int, other: int, other_length: int) -> bool:
    """Say whether two pieces of memory have a byte in common."""
    return start < other + other_length and other < start + length
