"""Quick calls: for plain arrays, from the arguments to the launch.

To ask every array all that could be wrong with it takes Python ten times as long as to
queue the work.  Here a few questions say that no other check could fail, as they do on
the CPU, and what they leave open is left to the long way: a call then returns None.

Nothing here waits for the device, and all memory comes from the library that an array
belongs to, so that what is queued can be captured in a graph.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastrelu import cpu
from fastrelu._dtypes import BY_NAME, is_accepted, name_of
from fastrelu._foreign import ANSWERS
from fastrelu._layout import Axes, c_strides, memory_order, parts_of
from fastrelu._spec import ARRAY, BITS, NUMBER, WEIGHT, Spec
from fastrelu.cpu.abi import Unproven
from fastrelu.cuda import launch
from fastrelu.cuda.arrays import Place, library_of
from fastrelu.cuda.config import BYTES, SIMULATED
from fastrelu.cuda.work import (
    INT32,
    LAYOUTS,
    PLAIN,
    WITH_BITS,
    Work,
    both,
    compute_of,
    finish,
    head_of,
    kernel,
    plan_both,
    plan_finish,
    run_mask,
    split_flat,
    weight_layout,
)
from fastrelu.mask import Mask

_View = tuple[int, int, int]  # (outer, channels, inner)
_Plan = tuple[launch.Kernel, Any, int]  # with numbers' type and an element's bytes
_Ready = tuple[_Plan, int, int, int]  # and elements, vectors, blocks
_ReadyWeight = tuple[_Plan, int, int, int, int, int, _View]  # the layout's place first
_MANY = 4096  # shapes that are kept


class Calls:
    """The quick calls of one activation for the arrays of one type."""

    def __init__(
        self, type_: type, spec: Spec, kinds: Sequence[int], both: bool
    ) -> None:
        self.type: Any = type_
        self.library = library_of(type_)
        self.spec = spec
        self.quick = _quick(type_, spec, kinds, both)
        self.plans: dict[Any, _Plan | None] = {}
        self.ready: dict[Any, _Ready] = {}  # by dtype and shape
        self.ready_weight: dict[Any, _ReadyWeight] = {}

    def before(self, fallback: Any) -> Any:
        """Return compiled code that takes what it knows, and hands on the rest."""
        return self.quick.before(fallback) if self.quick else fallback

    def _learn(self, place: int, plan: Any, device: int, *dtypes: Any) -> None:
        """Have compiled code launch the kernel of a plan from here on."""
        if self.quick is not None:
            self.quick.learn(place, plan, device, *dtypes)

    def forward(
        self, x: Any, inplace: Any, out: Any, return_mask: Any, *numbers: Any
    ) -> Any:
        """Return y, or (y, mask)."""
        if return_mask is False:
            return self._elementwise("forward", x, None, numbers, inplace, out)
        place = self.library.look(x)
        plan = place and self._plan("mask", x.dtype)
        if return_mask is not True or not place or not plan:
            return None
        start, device, order = place
        code, compute, itemsize = plan
        scalars = numbers and _scalars(numbers, compute)
        if start % BYTES or scalars is None:
            return None
        size = math.prod(x.shape)
        y, target = self._target(x, place, size * itemsize, inplace, out)
        if not target or target % BYTES:
            return None
        bits = self.library.empty_bytes((size + 7) >> 3, x)
        pointers = start, target, self.library.address(bits)
        stream = self.library.stream(x, device)
        run_mask(code, device, stream, itemsize, size, pointers, *scalars)
        self._learn(WITH_BITS, plan, device, x.dtype)
        self._written(y, inplace, out)
        axes = _axes(x.shape, order) if order else None
        return y, Mask._make(bits, tuple(x.shape), axes, self.spec.predicate)

    def backward(
        self, grad: Any, inplace: Any, out: Any, saved: Any, *numbers: Any
    ) -> Any:
        """Return the gradient towards x."""
        what = "bits" if type(saved) is Mask else "saved"
        return self._elementwise(what, grad, saved, numbers, inplace, out)

    def _elementwise(
        self, what: str, a: Any, b: Any, numbers: Any, inplace: Any, out: Any
    ) -> Any:
        place = self.library.look(a)
        if place is None:
            return None
        key = what, a.dtype, a.shape
        ready = self.ready.get(key) or self._make_ready(key)
        if ready is None:
            return None
        plan, size, vectors, blocks = ready
        code, compute, itemsize = plan
        scalars = numbers and _scalars(numbers, compute)
        if scalars is None:
            return None
        start, device, _ = place
        nbytes = length = size * itemsize
        other = beside = start
        if what == "saved":  # the result may go where the saved array is
            other = beside = self._beside(b, a, place)
        elif what == "bits":
            beside, length = 0, (size + 7) >> 3  # a vector starts where a byte does
            other = self._bits(b, length, a, place)
        if not other:
            return None
        y, target = self._target(a, place, nbytes, inplace, out)
        if not target:
            return None
        if what == "forward":
            pointers: tuple[int, ...] = start, target
        else:
            pointers = start, other, target
            if target != beside and _meet(target, nbytes, other, length):
                return None
        if (start | target | beside) % BYTES:
            head = head_of(size, itemsize, start, target, beside)
            if head is None:
                return None
            vectors, blocks = split_flat(size - head, itemsize)
        else:
            head = 0
        stream = self.library.stream(a, device)
        sizes = head, vectors, size
        launch.launch(code, device, stream, blocks, *pointers, *sizes, *scalars)
        self._learn(WITH_BITS if what == "bits" else PLAIN, plan, device, a.dtype)
        self._written(y, inplace, out)
        return y

    def by_channel(self, x: Any, inplace: Any, out: Any, weight: Any, axis: Any) -> Any:
        """Return y, with the weight of an element's channel for the number."""
        place = self.library.look(x)
        if place is None or type(weight) is not self.type or type(axis) is not int:
            return None
        lies = self.library.look(weight)
        if lies is None or lies[1] != place[1] or lies[2]:
            return None
        start, device, order = place
        key = x.dtype, x.shape, order, weight.dtype, weight.shape, axis
        ready = self.ready_weight.get(key) or self._make_ready_weight(key)
        if ready is None:
            return None
        plan, place_of, size, vectors, blocks, length, (_, channels, inner) = ready
        code, _, itemsize = plan
        y, target = self._target(x, place, size * itemsize, inplace, out)
        other, head = lies[0], 0
        if not target or _meet(target, size * itemsize, other, length):
            return None
        if (start | target | other) % BYTES:
            found = head_of(size, itemsize, start, target)
            if found is None or other % weight.dtype.itemsize:
                return None
            head, vector = found, other if weight.dtype == x.dtype else None
            layout = weight_layout(channels, inner, itemsize, head, vector)
            other_plan = layout and self._plan(layout, x.dtype, weight.dtype)
            assert other_plan  # as there is one for arrays that begin with a vector
            code = other_plan[0]
            vectors, blocks = split_flat(size - head, itemsize)
        stream = self.library.stream(x, device)
        given = start, other, target, head, vectors, size, inner, channels
        launch.launch(code, device, stream, blocks, *given)
        if code is plan[0]:
            self._learn(place_of, plan, device, x.dtype, weight.dtype)
        self._written(y, inplace, out)
        return y

    def by_channel_backward(
        self, grad: Any, inplace: Any, out: Any, x: Any, weight: Any, axis: Any
    ) -> Any:
        """Return the gradients towards x and the weight."""
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
        given_dw = dw
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
            of_saved = self.spec.of_saved
            pairs = both(work, of_saved, dtypes, itemsize, pointers, view)
            finish(work, dtypes[1], sums, view[1], pairs)
        finally:
            work.close()
        if self.quick is not None and (start | saved | target) % BYTES == 0:
            plan = plan_both(of_saved, dtypes, itemsize, view, True)
            last = plan_finish(dtypes[1], view[1], *plan[2:])
            launches = plan.pairs, plan.first, last
            self.quick.learn_both(view, launches, device, grad.dtype, weight.dtype)
        self._written(y, inplace, out)
        self._written(dw, False, given_dw)
        return y, dw

    def _written(self, y: Any, inplace: Any, out: Any) -> None:
        """Take note of a result that is an array of the caller's."""
        if inplace or out is not None:
            self.library.written(y)

    # Questions: 0 and None say that the matter is for the long way

    def _plan(self, what: str, dtype: Any, weight: Any = None) -> _Plan | None:
        key = what, dtype, weight
        plan = self.plans.get(key)
        if plan is None and key not in self.plans:
            plan = self.plans[key] = self._make_plan(*key)
        return plan

    def _make_ready(self, key: Any) -> _Ready | None:
        """Return the plan for a dtype and a shape, with how it is cut up."""
        what, dtype, shape = key
        plan = self._plan(what, dtype)
        if plan is None:
            return None
        if len(self.ready) >= _MANY:
            self.ready.clear()
        size = math.prod(shape)
        ready = self.ready[key] = plan, size, *split_flat(size, plan[2])
        return ready

    def _make_ready_weight(self, key: Any) -> _ReadyWeight | None:
        """Return the same for an array and a weight, both at multiples of 16 bytes."""
        dtype, shape, order, of_weight, sizes, axis = key
        view, size = _view(shape, order, sizes, axis), math.prod(shape)
        if not view or not size or size >= INT32 or not self._dtypes(dtype, of_weight):
            return None
        itemsize, length = dtype.itemsize, view[1] * of_weight.itemsize
        vector = 0 if of_weight == dtype else None
        layout = weight_layout(*view[1:], itemsize, 0, vector)
        plan = layout and self._plan(layout, dtype, of_weight)
        if not layout or not plan:
            return None
        if len(self.ready_weight) >= _MANY:
            self.ready_weight.clear()
        cut = split_flat(size, itemsize)
        ready = plan, LAYOUTS.index(layout), size, *cut, length, view
        self.ready_weight[key] = ready
        return ready

    def _make_plan(self, what: str, dtype: Any, weight: Any) -> _Plan | None:
        names = self._dtypes(dtype, dtype if weight is None else weight)
        spec = self.spec
        options: dict[str, Any] = {}
        if names is None or (spec.active is None and what in ("mask", "bits")):
            return None
        function, kinds, numbers = spec.formula, [ARRAY], spec.numbers
        kept = spec.numbers_kept
        if what == "mask":
            options = {"active": spec.active, "kept": len(kept)}
        elif what == "saved":
            function, kinds, numbers = spec.of_saved, [ARRAY, ARRAY], kept
        elif what == "bits":
            function, kinds, numbers = spec.gradient, [ARRAY, BITS], kept
        elif weight is not None:
            kinds, numbers = [ARRAY, WEIGHT], ()
            options = {"weight": names[1], "layout": what, "wide": False}
        options["kinds"] = (*kinds, *(len(numbers) * [NUMBER]))
        template = "flat_mask" if what == "mask" else "flat"
        code = kernel(template, function=function, fmt=names[0], **options)
        return code, compute_of(names[0]), dtype.itemsize

    def _dtypes(self, dtype: Any, weight: Any) -> tuple[str, str] | None:
        """Return the names of two dtypes if they go together."""
        name, other = (name_of(of) for of in (dtype, weight))
        mixed = other == "float32" and dtype.itemsize == 2
        taken = is_accepted(BY_NAME.get(name), integers=self.spec.integers)
        return (name, other) if taken and (other == name or mixed) else None

    def _beside(self, b: Any, a: Any, place: Place) -> int:
        """Return the address of an array if it is like another and lies as that does."""
        if type(b) is not self.type or b.dtype != a.dtype or b.shape != a.shape:
            return 0
        other = self.library.look(b)
        alike = other and other[1] == place[1] and other[2] == place[2]
        return other[0] if other and alike else 0

    def _bits(self, mask: Any, length: int, a: Any, place: Place) -> int:
        """Return the address of a mask's bits if they lie in an array's order."""
        _, device, order = place
        tells = _axes(a.shape, order) if order else None, self.spec.predicate
        try:
            same = mask.shape == a.shape and (mask._axes, mask.predicate) == tells
            bits: Any = mask.bits if same else None
        except (*ANSWERS, MemoryError):  # changed since it was made, it may be anything
            return 0
        if type(bits) is not self.type or tuple(bits.shape) != (length,):
            return 0
        lies = self.library.look(bits)
        uint8 = name_of(bits.dtype) == "uint8"
        return lies[0] if uint8 and lies and lies[1:] == (device, ()) else 0

    def _weight(
        self, weight: Any, x: Any, place: Place, axis: Any
    ) -> tuple[int, int, _View] | None:
        """Return a weight's address and bytes, and how x is seen."""
        _, device, order = place
        if type(weight) is not self.type or type(axis) is not int:
            return None
        lies, itemsize = self.library.look(weight), weight.dtype.itemsize
        if not lies or lies[1:] != (device, ()) or lies[0] % itemsize:
            return None
        view = _view(x.shape, order, weight.shape, axis)
        return view and (lies[0], view[1] * itemsize, view)

    def _target(
        self, a: Any, place: Place, nbytes: int, inplace: Any, out: Any
    ) -> tuple[Any, int]:
        """Return the array to write to and its address."""
        if not nbytes or not launch.is_current(place[1]):
            return None, 0
        if out is None and inplace is False:
            out = self.library.empty_like(a)
            if not place[2] and type(out) is self.type:  # new memory, in C order too
                return out, self.library.address(out)
        elif out is None and inplace is True:
            out = a
        elif inplace is not False:
            return None, 0
        if out is a:
            return a, place[0]
        target = self._beside(out, a, place)
        apart = not _meet(place[0], nbytes, target, nbytes)
        return (out, target) if apart or target == place[0] else (None, 0)


def _quick(type_: type, spec: Spec, kinds: Sequence[int], both: bool) -> Any:
    """Return compiled calls for the arrays of a type, or None where there are none."""
    library = library_of(type_)
    questions = library.questions(type_) if kinds and not SIMULATED else None
    if questions is None:
        return None
    from fastrelu.cuda.quick import Quick

    try:
        return Quick(library, questions, kinds, spec.predicate, both)
    except Unproven as error:
        cpu.give_up(error)
        return None


_FLOATS = frozenset((float, np.float64, np.float32, np.float16))
_INTEGERS = frozenset((int, *(np.dtype(code).type for code in "bBhHiIlLqQ")))
_EXACT = 2**53  # integers below it are floats
_LIMITS = {np.float32: 2.0**128 - 2.0**103, np.float64: math.inf}  # of what is finite


def _scalars(numbers: Any, compute: Any) -> list[Any] | None:
    """Return numbers in the type of products if all are plain and finite in it."""
    found, limit = [], _LIMITS.get(compute, 0)
    for number in numbers:
        type_ = type(number)
        if type_ is not float:
            if type_ in _INTEGERS and abs(int(number)) >= _EXACT:
                return None
            if type_ not in _INTEGERS and type_ not in _FLOATS:
                return None
            number = float(number)
        if not abs(number) < limit:
            return None
        found.append(compute(number))
    return found


@functools.lru_cache(1024)
def _axes(shape: Axes, order: Axes) -> Axes:
    """Return the axes in the order of memory."""
    return memory_order(shape, order or tuple(c_strides(shape)))


@functools.lru_cache(1024)
def _view(shape: Axes, order: Axes, weight: Axes, axis: int) -> _View | None:
    """Return (outer, channels, inner) for a weight in C order."""
    rank = len(shape)
    sizes = [1] * (rank - len(weight)) + [*weight]
    if len(weight) < 2:
        inside, size = -rank <= axis < rank, math.prod(weight)
        if not inside and (size, axis) != (1, 1):
            return None
        sizes = [1] * rank
        if inside:
            sizes[axis] = size
    lengths = zip(sizes, shape, strict=False)
    if len(sizes) != rank or any(size not in (1, length) for size, length in lengths):
        return None
    return parts_of(_axes(shape, order), shape, tuple(sizes), tuple(c_strides(sizes)))


def _meet(start: int, length: int, other: int, other_length: int) -> bool:
    """Say whether two pieces of memory have a byte in common."""
    return start < other + other_length and other < start + length
