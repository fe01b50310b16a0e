"""From a public function to its engine: the quick call, or else the long way.

A quick call asks an array the few questions that say that no check could fail.  Each
public function has one; whatever it does not take, it hands on to the function's `left`
here: the first call of a kind, which makes something ready, what comes to a quick call
with other arguments (tensors, memory maps, bools, Python's numbers), arrays on a GPU, and
all that needs the long way, with its checks and error messages.
"""

import functools
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy import ndarray

from fastrelu import _arguments, cpu
from fastrelu._arguments import is_on_gpu
from fastrelu._dtypes import is_accepted, row_of
from fastrelu._spec import ARRAY, BITS, NUMBER, WEIGHT, Operation, Spec
from fastrelu.cpu.abi import Unproven
from fastrelu.mask import Mask

HINT = 'pip install "fastrelu[cuda13]", or "fastrelu[cuda12]" for a driver of CUDA 12'

Array = Any
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
        msg = f"fastrelu needs numba-cuda for arrays on a GPU: {HINT}"
        raise ImportError(msg)
    return importlib.import_module(f"{__package__}.cuda")


def lazily(*values: Any) -> ModuleType | None:
    """Return what takes Dask's arrays, if one of the values is one.

    It is imported when the first one comes.
    """
    if not any(hasattr(type(value), "__dask_graph__") for value in values):
        return None
    if "dask.array" not in sys.modules:  # another library's objects may have that name
        return None
    engine = importlib.import_module(f"{__package__}._dask")
    return engine if any(map(engine.is_lazy, values)) else None


# The long way -------------------------------------------------------------------------


def _fresh(engine: ModuleType, x: Array) -> tuple[Any, Array]:
    """Return a new array like x, and what the engine sees of it."""
    y = engine.empty_like(x)
    return y, engine.read(y)


def _target(
    engine: ModuleType,
    name: str,
    objects: tuple[Any, Any],
    views: tuple[Array, Array],
    model: Array,
    overwrite: bool,
) -> tuple[Any, Array]:
    """Return the object to give back, and the array to write to.

    `objects` are the first argument and `out` as they came, `views` what was read.
    """
    if overwrite:
        return objects[0], _arguments.writeable(name, views[0], model)
    if views[1] is not None:
        return objects[1], _arguments.writeable("out", views[1], model)
    return _fresh(engine, model)


def _given_back(engine: ModuleType, y: Any, is_given: bool, *came: Any) -> Any:
    """Return the caller's array, whose library hears of it, or a new one as they came."""
    if not is_given:
        return engine.as_came(y, *came)
    engine.written(y)
    return y


Named = tuple[str, Any]


def _elementwise(
    spec: Spec,
    function: Callable[..., Any],
    first: Named,
    inplace: Any,
    out: Any,
    others: Sequence[Named] = (),
    numbers: Sequence[Named] = (),
    mask: Mask | None = None,
    return_mask: Any = False,
) -> Any:
    """Return what comes of arguments that are not plain, each with its name.

    The others are arrays, or a mask's bits if there is a mask.
    """
    name, x = first
    engine = engine_of(x)
    rounded = [_arguments.number(*each) for each in numbers]
    want_mask = _arguments.flag("return_mask", return_mask)
    out = _arguments.single(out)
    overwrite = _arguments.in_place(inplace, out)
    arrays = first, *others, ("out", out)
    given, *more, target = _arguments.read(engine, *arrays, in_place=overwrite)
    checked = _arguments.accepted(name, given, integers=spec.integers)
    values = [(NUMBER, number.of(checked)) for number in rounded]
    operands: list[tuple[str, Any]] = [(ARRAY, checked)]
    for (other, _), array in zip(others, more, strict=True):
        if mask is not None:
            bits = _arguments.bits_of(mask, array, spec.predicate, name, checked)
            operands.append((BITS, (bits, mask.axes)))
        elif other == "saved":
            saved = _arguments.active(other, array, name, checked)
            if saved.dtype == checked.dtype:
                operands.append((ARRAY, saved))
                continue
            function = spec.gradient
            is_bool = str(array.dtype) == "bool"
            bits = _active_bits(engine, spec, saved, rounded, is_bool)
            operands.append((BITS, bits))
        else:
            operands.append((ARRAY, _arguments.like(other, array, name, checked)))
    operands += values
    y, target = _target(engine, name, (x, out), (given, target), checked, overwrite)
    if not want_mask:
        engine.elementwise(function, operands, target)
    else:
        kept = spec.active, len(spec.numbers_kept)
        bits, axes = engine.elementwise_mask(function, *kept, operands, target)
    beside = [value for _, value in others if mask is None]
    y = _given_back(engine, y, overwrite or out is not None, x, *beside)
    if not want_mask:
        return y
    return y, Mask._make(bits, checked.shape, axes, spec.predicate)


def _active_bits(
    engine: ModuleType, spec: Spec, saved: Array, rounded: Sequence[Any], is_bool: bool
) -> tuple[Array, Any]:
    """Return a mask's bits, and their order, of a saved array of another dtype.

    What was active is asked in the dtype of the forward pass; bools say it themselves.
    """
    active, kept = (_is_set, 0) if is_bool else (spec.active, len(spec.numbers_kept))
    operands = [(ARRAY, saved)]
    _, scratch = _fresh(engine, saved)
    if is_bool:
        scratch = _arguments.as_bytes(scratch)
    else:
        decide = spec.numbers_decide
        operands += [
            (NUMBER, number.of(saved) if decide else 0.0) for number in rounded
        ]
    given, axes = engine.elementwise_mask(_itself, active, kept, operands, scratch)
    bits = engine.read(given)
    engine.lend(scratch, bits)
    return bits, axes


def _itself(x: Any, *numbers: Any) -> Any:
    return x


def _is_set(x: Any) -> Any:
    return x > 0


def _prelu(spec: Spec, x: Any, inplace: Any, out: Any, weight: Any, axis: Any) -> Any:
    engine = engine_of(x)
    position = _arguments.index("axis", axis)
    out = _arguments.single(out)
    overwrite = _arguments.in_place(inplace, out)
    arrays = ("x", x), ("weight", weight), ("out", out)
    given, slopes, target = _arguments.read(engine, *arrays, in_place=overwrite)
    checked = _arguments.accepted("x", given)
    _, broadcast = _arguments.weight(weight, slopes, checked, position)
    y, target = _target(engine, "x", (x, out), (given, target), checked, overwrite)
    operands = (ARRAY, checked), (WEIGHT, broadcast)
    engine.elementwise(spec.formula, operands, target)
    return _given_back(engine, y, overwrite or out is not None, x)


def _prelu_backward(
    spec: Spec,
    grad_output: Any,
    inplace: Any,
    out: Any,
    x: Any,
    weight: Any,
    axis: Any,
    *,
    exact: bool = False,
) -> Any:
    """Return both gradients; if they are to be exact, sums as they were formed."""
    engine = engine_of(grad_output)
    position = _arguments.index("axis", axis)
    out_input, out_weight = _arguments.pair(out)
    overwrite = _arguments.in_place(inplace, out_input)
    given, saved, slopes, target, sums = _arguments.read(
        engine,
        ("grad_output", grad_output),
        ("x", x),
        ("weight", weight),
        ("out", out_input),
        ("out[1]", out_weight),
        in_place=overwrite,
    )
    grad = _arguments.accepted("grad_output", given)
    checked = _arguments.like("x", saved, "grad_output", grad)
    slopes, broadcast = _arguments.weight(weight, slopes, checked, position)
    objects, views = (grad_output, out_input), (given, target)
    if sums is not None:
        _arguments.writeable("out[1]", sums, slopes)
        written = given if overwrite else target
        if written is not None:
            _arguments.distinct("out[0]", written, "out[1]", sums)
        dw = out_weight
    else:
        dw, sums = _fresh(engine, slopes.astype(np.float64) if exact else slopes)
    dx, target = _target(engine, "grad_output", objects, views, grad, overwrite)
    engine.prelu_backward(spec.of_saved, grad, checked, broadcast, target, sums)
    given_dx = overwrite or out_input is not None
    dx = _given_back(engine, dx, given_dx, grad_output, x)
    return dx, _given_back(engine, dw, out_weight is not None, weight)


def prelu_backward_exactly(
    spec: Spec, grad_output: Array, x: Array, weight: Array, axis: int
) -> Any:
    """Return both gradients of arrays in the host's memory, sums as they were formed."""
    given = grad_output, False, None, x, weight, axis
    return _prelu_backward(spec, *given, exact=True)


# One object for each public function --------------------------------------------------


_made: dict[tuple[str, ...], "_Function"] = {}


def _made_as(*names: str) -> "_Function":
    """Return the one that has these names in another process."""
    importlib.import_module(names[0])
    return _made[names]


class _Function:
    """A public function's quick call for NumPy arrays, and what takes the rest.

    `call` is ``call(x, inplace, out, *operands)``, and `way` names what does the same for
    arrays of Dask's, and if it is plain for arrays on a GPU.
    """

    way: str

    def __init__(self, spec: Spec, operation: Operation, **options: Any) -> None:
        self.spec = spec
        self.quick = cpu.quick_call(operation, **options)
        self.call: Any = self.left
        self.asks_numpy = False  # in compiled code
        self.on_gpu: dict[type, Any] = {}
        self.names = spec.formula.__module__, spec.name, type(self).__name__
        _made.setdefault(self.names, self)

    def __reduce__(self) -> Any:
        return _made_as, self.names

    def __dask_tokenize__(self) -> Any:
        return self.names

    def left(self, x: Any, inplace: Any, out: Any, /, *operands: Any) -> Any:
        """Take what the quick call does not."""
        given = x, inplace, out, *operands
        if type(x) is ndarray:
            plain = self._plainly(x, operands)
            # What the call has just missed it may not miss twice: threads, for one.
            again = self._again if plain is operands else self._quickly
            y = again(x, inplace, out, *plain)
        elif cpu.has_array(x):
            y = self._by_arrays(*given)
        else:
            calls = self.on_gpu.get(type(x)) or self._elsewhere(x)
            y = calls and getattr(calls, self.way)(*given)
        if y is not None:
            return y
        engine = lazily(x, out, *operands)
        if engine is not None:
            return getattr(engine, self.way)(self, *given)
        return self.long(*given)

    def _quickly(self, x: ndarray, *others: Any) -> Any:
        """Make the quick call, and again if something was missing, or return None."""
        y = self.quick.call(x, *others)
        return self._again(x, *others) if y is None else y

    def _again(self, x: ndarray, *others: Any) -> Any:
        """Make ready what the last quick call missed, and make it again, or return None."""
        if not cpu.is_fast():
            return None
        try:
            y = self.quick.again(x, *others, integers=self.spec.integers)
        except Unproven as error:
            cpu.give_up(error)
            return None
        if self.quick.rows and not self.asks_numpy:
            self._chain()
        return y

    def _by_arrays(self, x: Any, inplace: Any, out: Any, *operands: Any) -> Any:
        """Make the quick call with arrays on tensors in the host's memory, or return None."""
        came = {}  # arrays, too: one that is gone leaves its id to others

        def array_on(value: Any) -> Any:
            array = cpu.array_on(value)
            came[id(array)] = array, value
            return array

        def back(y: Any, *models: Any) -> Any:
            if type(y) is not ndarray:  # a mask, or nothing: the call was left
                return y
            if id(y) not in came:
                return cpu.as_came(y, *models)
            _, given = came[id(y)]
            cpu.written(given)
            return given

        array = array_on(x)
        if type(array) is not ndarray:
            return None
        out = tuple(map(array_on, out)) if type(out) is tuple else array_on(out)
        plain = self._plainly(array, tuple(map(array_on, operands)))
        results = self._quickly(array, inplace, out, *plain)
        if type(results) is not tuple:
            return back(results, x)
        y, other = results  # a mask, or the gradient towards a weight
        return back(y, x), back(other, *operands[1:2])

    def _plainly(self, x: ndarray, operands: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return operands as quick calls take them, where that is plain."""
        return operands

    def _elsewhere(self, x: Any) -> Any:
        """Return the calls for a type of arrays on a GPU, from its second array on."""
        if type(x) not in _ON_GPU or not hasattr(_cuda().Calls, self.way):
            return None
        kinds = self.quick.kinds if cpu.is_fast() else ()
        both = self.way == "by_channel_backward"
        calls = _cuda().Calls(type(x), self.spec, kinds, both)
        calls = self.on_gpu.setdefault(type(x), calls)
        self._chain()
        return calls

    def _chain(self) -> None:
        """Have compiled code take what it can, NumPy's arrays first.

        Another thread may do so at the same time and know more: who is last, looks again.
        """
        known: Any = None
        while known != (now := (bool(self.quick.rows), *self.on_gpu.values())):
            known = now
            call: Any = self.left
            for calls in now[1:]:
                call = calls.before(call)
            self.asks_numpy = now[0]
            self.call = self.quick.before(call) if self.asks_numpy else call

    def long(self, *arguments: Any) -> Any:
        """Take any call."""

    def _spread(
        self, name: str, grad: Any, inplace: Any, out: Any, saved: Any, *others: Any
    ) -> Any:
        """Take one number for the gradient of each element, without an array of them."""
        came = saved
        if issubclass(type(saved), Mask):
            model = np.broadcast_to(True, _arguments.unchanged(saved).shape)
        else:
            (saved,) = _arguments.read(cpu, (name, saved))  # once
            model = saved
            if model.dtype != np.bool_:
                model = _arguments.accepted(name, model, integers=True)
        spread = _arguments.spread("grad_output", grad, model)
        if out is not None:
            return self.long(spread, inplace, out, saved, *others)
        y = cpu.empty_like(model if model.dtype == spread.dtype else spread)
        y[...] = spread
        result = self.call(y, True, None, saved, *others)
        y = cpu.as_came(y, came)
        return (y, result[1]) if type(result) is tuple else y


def _stands_for_all(grad: Any, inplace: Any, saved: Any) -> bool:
    """Say whether one number is the gradient of each element of an array."""
    if not _arguments.is_number(grad) or _arguments.is_number(saved):
        return False
    return not _arguments.flag("inplace", inplace)


class _Forward(_Function):
    """``call(x, inplace, out, return_mask, *numbers)``."""

    way = "forward"

    def __init__(self, spec: Spec) -> None:
        kinds = ARRAY, *(NUMBER for _ in spec.numbers)
        super().__init__(
            spec,
            Operation(spec.formula, kinds),
            flag=True,
            **_masked(spec, spec.to_bits),
        )

    def long(
        self, x: Any, inplace: Any, out: Any, return_mask: Any, *numbers: Any
    ) -> Any:
        named = list(zip(self.spec.numbers, numbers, strict=True))
        return _elementwise(
            self.spec,
            self.spec.formula,
            ("x", x),
            inplace,
            out,
            numbers=named,
            return_mask=return_mask,
        )


class _Backward(_Function):
    """``call(grad_output, inplace, out, saved, *numbers)``."""

    way = "backward"

    def __init__(self, spec: Spec, forward: _Forward) -> None:
        numbers = tuple(NUMBER for _ in spec.numbers_kept)
        super().__init__(
            spec,
            Operation(spec.of_saved, (ARRAY, ARRAY, *numbers)),
            **_masked(spec, spec.from_bits),
        )
        self.forward = forward

    def _plainly(self, grad: ndarray, operands: tuple[Any, ...]) -> tuple[Any, ...]:
        saved, *numbers = operands
        mask = self._mask_of(grad, saved, numbers)
        return operands if mask is None else (mask, *numbers)

    def _mask_of(self, grad: Any, saved: Any, numbers: Any) -> Mask | None:
        """Return the mask of a plain saved array of another dtype, or None.

        Quick calls take it, where the long way would cost small arrays many times more.
        """
        if type(saved) is not ndarray:
            return None
        if saved.dtype == grad.dtype or saved.shape != grad.shape:
            return None
        if self.spec.active is None:
            return None
        if saved.dtype == np.bool_:
            if not grad.flags.c_contiguous:
                return Mask.pack(saved, self.spec.predicate)
            bits = np.packbits(saved, None, "little")
            return Mask._make(bits, saved.shape, None, self.spec.predicate)
        if not _is_native(saved, integers=self.spec.integers):
            return None
        kept = numbers if self.spec.numbers_decide else ()
        more = len(self.spec.numbers) - len(kept)
        given = *kept, *(more * (0.0,))  # of which a mask does not depend
        mask: Mask = self.forward.call(saved, False, None, True, *given)[1]
        return mask

    def long(self, grad: Any, inplace: Any, out: Any, saved: Any, *numbers: Any) -> Any:
        spec, mask, function, name = self.spec, None, self.spec.of_saved, "saved"
        if spec.active is None:
            name = "x"
        if _stands_for_all(grad, inplace, saved):
            return self._spread(name, grad, inplace, out, saved, *numbers)
        if issubclass(type(saved), Mask):
            _arguments.tells_enough(name, spec)
            mask = _arguments.unchanged(saved)
            function, saved = spec.gradient, mask.bits
        return _elementwise(
            spec,
            function,
            ("grad_output", grad),
            inplace,
            out,
            [(name, saved)],
            list(zip(spec.numbers_kept, numbers, strict=True)),
            mask,
        )


def _masked(spec: Spec, operation: Operation) -> dict[str, Any]:
    """Return what a quick call is told of masks."""
    if spec.active is None:
        return {}
    return {"masked": operation, "predicate": spec.predicate}


def _is_native(x: ndarray, *, integers: bool) -> bool:
    """Say whether loops take an array's dtype as it is."""
    return is_accepted(row_of(x.dtype), integers=integers) and x.dtype.isnative


def _weight_of(weight: Any, x: Any) -> Any:
    """Return a weight; of Python's numbers, as an array of x's dtype, rounded once."""
    if not _arguments.is_weak(weight) or type(x) is not ndarray:
        return weight
    if not _is_native(x, integers=False):
        return weight
    (given,) = _arguments.read(cpu, ("weight", weight))
    return _arguments.weakly("weight", given, x.dtype)


class _ByChannel(_Function):
    """``call(x, inplace, out, weight, axis)``."""

    way = "by_channel"

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec, Operation(spec.formula, (ARRAY, WEIGHT)))

    def _plainly(self, x: ndarray, operands: tuple[Any, ...]) -> tuple[Any, ...]:
        weight, axis = operands
        slopes = _weight_of(weight, x)
        return operands if slopes is weight else (slopes, axis)

    def long(self, x: Any, *others: Any) -> Any:
        return _prelu(self.spec, x, *others)


class _ByChannelBackward(_Function):
    """``call(grad_output, inplace, out, x, weight, axis)``."""

    way = "by_channel_backward"

    def __init__(self, spec: Spec) -> None:
        super().__init__(
            spec, Operation(spec.of_saved, (ARRAY, ARRAY, WEIGHT)), sums=True
        )

    def left(self, grad: Any, inplace: Any, out: Any, /, *operands: Any) -> Any:
        results = super().left(grad, inplace, out, *operands)
        if type(grad) is not ndarray or not _arguments.is_number(operands[1]):
            return results
        dx, dw = results
        return dx, dw if _arguments.pair(out)[1] is not None else dw[()]

    def _plainly(self, grad: ndarray, operands: tuple[Any, ...]) -> tuple[Any, ...]:
        x, weight, axis = operands
        slopes = _weight_of(weight, x)
        return operands if slopes is weight else (x, slopes, axis)

    def long(self, grad: Any, *others: Any) -> Any:
        if _stands_for_all(grad, others[0], others[2]):
            return self._spread("x", grad, *others)
        return _prelu_backward(self.spec, grad, *others)


class _ByElement(_Function):
    """``call(x, inplace, out, slopes)``."""

    way = "by_element"

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec, Operation(spec.formula, (ARRAY, ARRAY)))

    def long(self, x: Any, inplace: Any, out: Any, slopes: Any) -> Any:
        others = [("slopes", slopes)]
        return _elementwise(
            self.spec, self.spec.formula, ("x", x), inplace, out, others
        )


class _ByElementBackward(_Function):
    """``call(grad_output, inplace, out, x, slopes)``; slopes may be one number."""

    way = "by_element_backward"

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec, Operation(spec.of_saved, (ARRAY, ARRAY, ARRAY)))

    def long(self, grad: Any, inplace: Any, out: Any, x: Any, slopes: Any) -> Any:
        if _stands_for_all(grad, inplace, x):
            return self._spread("x", grad, inplace, out, x, slopes)
        spec, others, numbers = self.spec, [("x", x)], [("slopes", slopes)]
        if not _arguments.is_scalar(slopes):
            others, numbers = others + numbers, []
        first = "grad_output", grad
        return _elementwise(spec, spec.of_saved, first, inplace, out, others, numbers)


def elementwise(spec: Spec) -> tuple[_Function, _Function]:
    """Return the functions of an activation with numbers, or none, for parameters."""
    forward = _Forward(spec)
    return forward, _Backward(spec, forward)


def by_channel(spec: Spec) -> tuple[_Function, _Function]:
    """Return those whose one number is a weight for each channel."""
    return _ByChannel(spec), _ByChannelBackward(spec)


def by_element(spec: Spec) -> tuple[_Function, _Function]:
    """Return those whose one number is an array's, one for each element."""
    return _ByElement(spec), _ByElementBackward(spec)


def middle(low: Any, high: Any) -> Any:
    """Return the mean of two bounds, whose difference may be beyond all numbers."""
    width = high - low
    return low + width / 2 if math.isfinite(width) else low / 2 + high / 2


def slopes(x: Any, lower: Any, upper: Any, training: Any, rng: Any) -> Any:
    """Return a slope for each element of x in training, and their mean otherwise."""
    bounds = _arguments.bounds(lower, upper)
    low, high = (bound.float64 for bound in bounds)
    draw = _arguments.flag("training", training)
    fit = all(math.isfinite(bound.float32) for bound in bounds)  # whatever x is
    if fit and rng is None and not draw:
        return middle(low, high)
    engine, lazy = engine_of(x), lazily(x)
    model = x if lazy else _arguments.read(engine, ("x", x))[0]
    model = _arguments.accepted("x", model)
    for bound in bounds:
        bound.kept_in(model) if draw else bound.of(model)
    if not draw:
        if engine is cpu and rng is not None:
            _arguments.generator(rng)
        return middle(low, high)
    if lazy is not None:
        return lazy.slopes(x, low, high, rng)
    drawn = engine.uniform(model, low, high, rng)
    return engine.as_came(drawn, x)
