"""Every check and every error message.  What passes here cannot fail below.

Messages name the argument, what was expected and what came.  A wrong kind of thing is
a TypeError, a wrong value of the right kind a ValueError.

Other people's code (``__array__``, ``__index__``, properties) runs first, in `read`,
`index` and `number`.  What they return is ours alone, so that what is checked after them
is what is used, whatever becomes of the arguments meanwhile.
"""

import contextlib
import ctypes
import functools
import math
import numbers
import operator
import struct
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from fastrelu import _torch
from fastrelu._dtypes import (
    BY_NAME,
    FLOATS,
    REALS,
    Row,
    is_accepted,
    name_of,
    rounded,
    row_of,
)
from fastrelu._foreign import ANSWERS, is_foreign
from fastrelu._layout import is_simple
from fastrelu._spec import Spec
from fastrelu.mask import Mask

Array = Any


def _is(value: object, types: type | tuple[type, ...]) -> bool:
    """Ask the type alone: an object may claim another class, or fail when asked."""
    return issubclass(type(value), types)


def kind_of(value: object) -> str:
    """Name the type of a value, and the dtype where it has one."""
    name = type(value).__name__
    with contextlib.suppress(*ANSWERS):  # of a broken property
        dtype = getattr(value, "dtype", None)
        return name if dtype is None else f"{name} of dtype {dtype}"
    return name


def shown(value: object) -> str:
    """Return a value as text, or its kind where that fails: too many digits, say."""
    with contextlib.suppress(*ANSWERS):
        return str(value)
    return f"a value of type {kind_of(value)}"


_may_be_on_gpu = functools.lru_cache(256)(is_foreign)


def is_on_gpu(value: Any) -> bool:
    """Say whether a value is an array in a GPU's memory, of whichever library."""
    type_: Any = type(value)
    if not _may_be_on_gpu(type_):
        return False
    with contextlib.suppress(*ANSWERS):  # of a broken method: NumPy will complain
        if hasattr(type_, "is_cuda"):  # PyTorch's compiler cannot follow the other way
            return bool(value.is_cuda)
        if hasattr(type_, "__dlpack_device__"):
            return int(value.__dlpack_device__()[0]) in _CUDA
        # Numba's own arrays are told by a mark: its simulator's have no interface.
        mark = hasattr(type_, "__cuda_ndarray__")
        return mark or value.__cuda_array_interface__ is not None
    return False


_CUDA = 2, 13  # DLPack's kinds of devices: CUDA's own memory, and managed memory


# Arrays -------------------------------------------------------------------------------


def read(
    engine: ModuleType, *given: tuple[str, Any], in_place: bool = False
) -> list[Array]:
    """Return arguments, each with its name, as arrays of the engine; None stays None.

    Those that are written to, which are called `out`, and the first one in place, must
    be arrays already.
    """
    arrays: list[Array] = []
    for i, (name, value) in enumerate(given):
        if value is None and name.startswith("out"):
            arrays.append(None)
            continue
        if _is(value, Mask):
            raise no_mask(name)
        convert = not (name.startswith("out") or (in_place and i == 0))
        try:
            arrays.append(engine.read(value, convert=convert))
        except (TypeError, ValueError) as error:
            msg = f"{name} must be {engine.KIND}, {error}"
            raise (TypeError if _is(error, TypeError) else ValueError)(msg) from error
    return [x if x is None else engine.hold(x) for x in arrays]


def no_mask(name: str) -> TypeError:
    """Return what is raised of a mask for anything but `saved`."""
    needed = "the input" if name == "x" else "an array"
    return TypeError(f"{name} must be {needed}, got a mask, which does not tell enough")


def _row(x: Array) -> Row | None:
    return BY_NAME.get(x.dtype) if isinstance(x.dtype, str) else row_of(x.dtype)


def accepted(name: str, x: Array, *, integers: bool = False) -> Array:
    """Return an array as a native one; its dtype must be one that is accepted."""
    if not is_accepted(_row(x), integers=integers):
        expected = REALS if integers else FLOATS
        msg = f"{name} must have dtype {expected}, got {x.dtype}"
        raise TypeError(msg)
    if isinstance(x, np.ndarray) and not x.dtype.isnative:
        x = x.astype(x.dtype.newbyteorder("="))
    return x


def same_device(name: str, x: Array, other_name: str, other: Array) -> None:
    """Refuse arrays on two devices."""
    if x.device != other.device:
        msg = f"{name} must be on {other_name}'s device {other.device}, got {x.device}"
        raise ValueError(msg)


def like(name: str, x: Array, other_name: str, other: Array) -> Array:
    """Return an array that must have the dtype and shape of another argument's floats."""
    x = accepted(name, x)
    if x.dtype != other.dtype:
        msg = (
            f"{name} must have the dtype of {other_name}, {other.dtype}, got {x.dtype}: "
            f"convert one of them"
        )
        raise TypeError(msg)
    return shaped_like(name, x, other_name, other)


def shaped_like(name: str, x: Array, other_name: str, other: Array) -> Array:
    """Return an array that must have the shape of another argument."""
    if x.shape != other.shape:
        msg = (
            f"{name} must have the shape of {other_name}, {other.shape}, got {x.shape}"
        )
        raise ValueError(msg)
    same_device(name, x, other_name, other)
    return x


def as_bytes(x: Array) -> Array:
    """Return bools as the bytes that they are."""
    return x.view(np.uint8) if isinstance(x, np.ndarray) else x.as_bytes()


def active(name: str, x: Array, other_name: str, other: Array) -> Array:
    """Return an array that tells which units were active, of any real dtype or of bools.

    Those are returned as bytes.
    """
    if str(x.dtype) == "bool":
        x = as_bytes(x)
    return shaped_like(name, accepted(name, x, integers=True), other_name, other)


# Flags and numbers --------------------------------------------------------------------


def flag(name: str, value: object) -> bool:
    """Return a bool that is one."""
    if not _is(value, (bool, np.bool_)):
        msg = f"{name} must be True or False, got {kind_of(value)}"
        raise TypeError(msg)
    return bool(value)


def index(name: str, value: Any) -> int:
    """Return an integer that is none but an integer."""
    if type(value) is int:
        return value
    if not _is(value, (bool, np.bool_)):
        with contextlib.suppress(*ANSWERS):
            return operator.index(value)
    msg = f"{name} must be an integer, got {kind_of(value)}"
    raise TypeError(msg)


class Number(NamedTuple):
    """A real number, rounded once to each type that products are computed in."""

    name: str
    float64: float
    float32: float

    def of(self, x: Array) -> float:
        """Return the number that goes with an array."""
        row = _row(x)
        compute = "float64" if row is None else row.compute
        value: float = getattr(self, compute)
        if not math.isfinite(value):
            msg = f"{self.name} must be finite in {compute}, got {self.float64}"
            raise ValueError(msg)
        return value

    def kept_in(self, x: Array) -> float:
        """Return the number that goes with an array, which can hold it."""
        row, value = _row(x), self.of(x)
        if row is not None and abs(value) > _LARGEST.get(row.name, math.inf):
            msg = f"{self.name} must fit {row.name}, got {self.float64}"
            raise ValueError(msg)
        return value


_LARGEST = {"float16": 65504.0, "bfloat16": 2.0**128 - 2.0**120}  # computed in float32


def number(name: str, value: Any) -> Number:
    """Return a finite real number as it is rounded to float64 and to float32."""
    if type(value) is float:
        nearest = value
    else:
        value = real_number(name, value)
        try:
            nearest = float(value)
        except OverflowError:
            nearest = math.inf
        except ANSWERS as error:
            msg = f"{name} must be a real number, got {kind_of(value)}"
            raise TypeError(msg) from error
    if not math.isfinite(nearest):
        msg = f"{name} must be finite, got {shown(value)}"
        raise ValueError(msg)
    return Number(name, nearest, ctypes.c_float(_odd(nearest, value)).value)


def real_number(name: str, value: Any) -> Any:
    """Return a real number that compares with floats exactly, or refuse it."""
    if _is(value, np.ndarray):
        value = value[()] if value.ndim == 0 else value
    elif _torch.is_tensor(value):
        value = _number_in(name, value)
    elif hasattr(type(value), "__dlpack__"):
        with contextlib.suppress(*ANSWERS):  # it may be on a GPU
            value = np.asarray(value)[()] if value.shape == () else value
    if _is(value, np.generic):
        row = row_of(value.dtype)
        real = row is not None or _is(value, np.longdouble)
        if row is not None:  # exact: NumPy would round an integer to compare it
            value = float(value) if row.kind == "f" else int(value)
    else:
        real = _is(value, numbers.Real) and not _is(value, bool)
    if not real:
        msg = f"{name} must be a real number, got {kind_of(value)}"
        raise TypeError(msg)
    return value


def _number_in(name: str, tensor: Any) -> Any:
    """Return the number of a tensor in the host's memory, or the tensor if it is none."""
    try:
        _torch.refuse(tensor)
    except TypeError as error:
        msg = f"{name} must be a real number, {error}"
        raise TypeError(msg) from error
    if tensor.device.type != "cpu" or tensor.ndim or tensor.is_complex():
        return tensor
    return tensor.item()


def _odd(number: float, value: Any) -> float:
    """Return the double nearest to a value so that it may be rounded once more.

    Where something was lost, the last bit is odd: a tie that is none cannot arise.
    """
    if number == value:
        return number
    other = math.nextafter(number, math.inf if number < value else -math.inf)
    return number if struct.pack("<d", number)[0] & 1 else other


def is_weak(value: Any) -> bool:
    """Say whether a value is a number of Python's, or a list of them, perhaps nested."""
    if _is(value, (list, tuple)):
        return all(map(is_weak, value))
    return _is(value, (int, float)) and not _is(value, (bool, np.generic))


def is_number(value: Any) -> bool:
    """Say whether a value is a number of Python's or NumPy's, no array."""
    return _is(value, (int, float, np.generic))


def weakly(name: str, given: Array, dtype: np.dtype[Any]) -> Array:
    """Return what was made of Python's numbers in a dtype, rounded once."""
    if given.dtype.kind not in "iuf":
        msg = f"{name} must be real numbers of at most 64 bits, got {shown(given)}"
        raise TypeError(msg)
    with np.errstate(all="ignore"):
        value = rounded(given, dtype)
        fits = np.isfinite(value) == np.isfinite(given)
        if dtype.kind in "iu":
            fits = value == given
    if not np.all(fits):
        msg = f"{name} must fit {dtype}, got {shown(given)}"
        raise ValueError(msg)
    return value


def spread(name: str, value: Any, model: Array) -> Array:
    """Return one number as an array of model's shape, which takes no memory."""
    given = np.asarray(value)
    if is_weak(value):
        row = _row(model)
        is_float = row is not None and row.kind == "f"
        dtype = model.dtype
        if not is_float:
            zero = 0.0 if _is(value, float) else 0  # of no subclass: it may be an enum
            dtype = np.result_type(zero, dtype)
        given = weakly(name, given, dtype)
    return np.broadcast_to(given, model.shape)


def single(out: Any) -> Any:
    """Return the one array of an `out` that may be a tuple of it, as NumPy's is."""
    return out[0] if _is(out, tuple) and len(out) == 1 else out


def is_scalar(value: Any) -> bool:
    """Say whether a value stands for one number, not for one of each element."""
    if _is(value, np.ndarray):
        return bool(value.ndim == 0)
    return _is(value, (np.generic, numbers.Real))


def bounds(lower: Any, upper: Any) -> tuple[Number, Number]:
    """Return two finite numbers, the first not above the second."""
    low, high = number("lower", lower), number("upper", upper)
    if low.float64 > high.float64:
        msg = f"lower must not be above upper, {shown(upper)}, got {shown(lower)}"
        raise ValueError(msg)
    return low, high


def generator(rng: Any) -> np.random.Generator:
    """Return what numbers are drawn from."""
    try:
        return np.random.default_rng(rng)
    except ANSWERS as error:
        msg = (
            "rng must be a numpy.random.Generator or a seed of one, "
            f"got {kind_of(rng)}: {shown(error)}"
        )
        raise (ValueError if _is(error, ValueError) else TypeError)(msg) from error


# What is written to -------------------------------------------------------------------


def in_place(inplace: object, out: Any) -> bool:
    """Say whether the first array is to be overwritten."""
    overwrite = flag("inplace", inplace)
    if overwrite and out is not None:
        msg = "inplace=True and out= were both given; out= the first array is in place"
        raise ValueError(msg)
    return overwrite


def writeable(name: str, x: Array, model: Array) -> Array:
    """Return an array that can take a result shaped and typed like model."""
    native = isinstance(x.dtype, str) or x.dtype.isnative
    if x.dtype != model.dtype or not native:
        came = x.dtype if native else f"byte-swapped {x.dtype}"
        msg = f"{name} must have the native dtype {model.dtype}, got {came}"
        raise TypeError(msg)
    if x.shape != model.shape:
        msg = f"{name} must have shape {model.shape}, got {x.shape}"
        raise ValueError(msg)
    places = _places(x)
    if not places.flags.writeable:
        msg = f"{name} must be writeable, got a read-only array"
        raise ValueError(msg)
    same_device(name, x, "the result", model)
    if _shares_elements(places):
        msg = (
            f"{name} must not share memory between its own elements, got shape "
            f"{x.shape} with strides {x.strides}"
        )
        raise ValueError(msg)
    return x


def _places(x: Array) -> Array:
    """Return the NumPy array that has the addresses of x's elements."""
    return getattr(x, "addresses", x)


def _shares_elements(x: Array) -> bool:
    """Say whether two elements of x have a byte in common."""
    if x.size < 2 or x.flags.c_contiguous or is_simple(x):
        return False
    # Rare and crafted: compare the slices along one axis after another, exactly.
    axis = max(range(x.ndim), key=lambda i: x.shape[i])
    slices = np.moveaxis(x, axis, 0)
    first = slices[0, ...]
    for i in range(1, len(slices)):
        if not np.may_share_memory(first, slices[i, ...]):
            break
        if np.shares_memory(first, slices[i, ...]):
            return True
    return _shares_elements(first)


def distinct(first_name: str, first: Array, second_name: str, second: Array) -> None:
    """Refuse two outputs in the same memory."""
    if np.shares_memory(_places(first), _places(second)):
        msg = f"{first_name} and {second_name} must not share memory"
        raise ValueError(msg)


def pair(value: Any) -> Sequence[Any]:
    """Return prelu_backward's out as (grad_input, grad_weight)."""
    if _is(value, tuple):
        if len(value) != 2:
            msg = (
                f"out must be one array or (grad_input, grad_weight), got {len(value)}"
            )
            raise ValueError(msg)
        return tuple(value)
    return value, None


# What goes with an array --------------------------------------------------------------


def unchanged(mask: Mask) -> Mask:
    """Return a mask that is still as it was made, as one of our own."""
    try:
        return Mask(mask.bits, mask.shape, mask._axes, mask.predicate)
    except ANSWERS as error:
        msg = f"saved must be a mask that is still as it was made: {shown(error)}"
        raise (ValueError if _is(error, ValueError) else TypeError)(msg) from error


def tells_enough(name: str, spec: Spec) -> None:
    """Refuse a mask where one bit is not enough for the gradient."""
    if spec.active is None:
        raise no_mask(name)


def same_predicate(mask: Any, predicate: str) -> None:
    """Refuse the mask of another activation."""
    if mask.predicate != predicate:
        msg = f"saved must be a mask of {predicate}, got one of {mask.predicate}"
        raise ValueError(msg)


def bits_of(mask: Mask, bits: Array, predicate: str, name: str, model: Array) -> Array:
    """Return a mask's bits, which must be those of an array like model."""
    same_predicate(mask, predicate)
    if mask.shape != model.shape:
        msg = (
            f"saved must be a mask of shape {model.shape}, as {name} is, "
            f"got one of shape {mask.shape}"
        )
        raise ValueError(msg)
    bits = accepted("saved", bits, integers=True)
    if name_of(bits.dtype) != "uint8" or bits.shape != (mask.nbytes,):
        msg = "saved must be a mask whose bits stay as they are during the call"
        raise ValueError(msg)
    same_device("saved", bits, name, model)
    return bits


def weight(value: Any, given: Array, x: Array, position: int) -> tuple[Array, Array]:
    """Return the weight as a native array, and reshaped to broadcast against x.

    `value` is the argument, `given` what was read of it.
    """
    if is_weak(value):
        given = weakly("weight", given, x.dtype)
    given = accepted("weight", given)
    same_device("weight", given, "x", x)
    mixed = str(given.dtype) == "float32" and x.itemsize == 2
    if given.dtype != x.dtype and not mixed:
        expected = f"{x.dtype} or float32" if x.itemsize == 2 else str(x.dtype)
        msg = (
            f"weight must have the dtype of x, {expected}, got {given.dtype}: "
            f"take weight.{'to' if _torch.is_tensor(value) else 'astype'}(x.dtype)"
        )
        raise TypeError(msg)
    if given.ndim > 1:
        lengths = zip(given.shape[::-1], x.shape[::-1], strict=False)
        grows = any(size not in (1, length) for size, length in lengths)
        if given.ndim > x.ndim or grows:
            msg = (
                f"weight must broadcast against x, of shape {x.shape}, without growing "
                f"it, got shape {given.shape}"
            )
            raise ValueError(msg)
        return given, given.reshape((1,) * (x.ndim - given.ndim) + given.shape)
    shared = given.size == 1
    if not -x.ndim <= position < x.ndim and not (shared and position == 1):
        if position == 1 or x.ndim == 0:
            other = " and no other axis is named" if x.ndim else ""
            msg = (
                f"weight must have one element where x has {x.ndim} dimensions{other}, "
                f"got shape {given.shape} and axis {shown(position)}"
            )
        else:
            msg = f"axis must be in [{-x.ndim}, {x.ndim}), got {shown(position)}"
        raise ValueError(msg)
    shape = [1] * x.ndim
    if not shared:
        if given.size != x.shape[position]:
            msg = (
                f"weight must have one element, or {x.shape[position]} as x has along "
                f"axis {position}, got {given.size}"
            )
            raise ValueError(msg)
        shape[position] = given.size
    return given, given.reshape(shape)
