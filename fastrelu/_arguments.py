"""Every check and every error message.  What passes here cannot fail below.

Messages name the argument, what was expected and what came.  A wrong kind of thing is
a TypeError, a wrong value of the right kind a ValueError.
"""

import contextlib
import functools
import math
import numbers
import operator
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from fastrelu.mask import Mask

Array = Any

FLOATS = "float16, bfloat16, float32 or float64"
REALS = f"{FLOATS}, or an integer dtype"
_FLOAT_CODES = frozenset("efd")
_REAL_CODES = frozenset("bBhHiIlLqQefd")
_FLOAT_NAMES = frozenset(["float16", "bfloat16", "float32", "float64"])
_INTEGER_NAMES = frozenset(np.dtype(code).name for code in "bBhHiIlLqQ")


def _is(value: object, kind: type | tuple[type, ...]) -> bool:
    """Ask the type alone: an object may claim another class, or fail when asked."""
    return issubclass(type(value), kind)


def _kind(value: object) -> str:
    """Name the type of a value, and the dtype where it has one."""
    name = type(value).__name__
    with contextlib.suppress(Exception):  # of a broken property
        dtype = getattr(value, "dtype", None)
        return name if dtype is None else f"{name} of dtype {dtype}"
    return name


def _shown(value: object) -> str:
    """Return a value as text, or its kind where that fails: too many digits, say."""
    with contextlib.suppress(Exception):
        return str(value)
    return f"a value of type {_kind(value)}"


def is_accepted(dtype: np.dtype[Any] | str, integers: bool) -> bool:
    if isinstance(dtype, str):  # of an array that is not NumPy's
        return dtype in _FLOAT_NAMES or (integers and dtype in _INTEGER_NAMES)
    codes = _REAL_CODES if integers else _FLOAT_CODES
    return dtype.char in codes or (
        dtype.name == "bfloat16" and dtype.type.__module__.startswith("ml_dtypes")
    )


@functools.lru_cache(256)
def _may_be_on_gpu(kind: type) -> bool:
    names = "__cuda_array_interface__", "__dlpack_device__"
    return kind is not np.ndarray and any(hasattr(kind, name) for name in names)


def is_on_gpu(value: Any) -> bool:
    """Say whether a value is an array in a GPU's memory, of whichever library."""
    kind: Any = type(value)
    if not _may_be_on_gpu(kind):
        return False
    with contextlib.suppress(Exception):  # of a broken method: NumPy will complain
        if hasattr(kind, "__dlpack_device__"):
            return int(value.__dlpack_device__()[0]) in _CUDA
        return value.__cuda_array_interface__ is not None
    return False


_CUDA = 2, 13  # DLPack's kinds of devices: CUDA's own memory, and managed memory


def array(
    name: str, value: Any, engine: ModuleType, *, integers: bool = False
) -> Array:
    """Return value as an array of the engine, native and of an accepted dtype."""
    if hasattr(engine, "as_array"):
        result = _foreign(name, value, engine)
    else:
        result = _native(name, value)
    if not is_accepted(result.dtype, integers):
        expected = REALS if integers else FLOATS
        came = f"{type(value).__name__} of dtype {result.dtype}"
        msg = f"{name} must have dtype {expected}, got {came}"
        raise TypeError(msg)
    if isinstance(result, np.ndarray) and not result.dtype.isnative:
        result = result.astype(result.dtype.newbyteorder("="))
    return result


def _foreign(name: str, value: Any, engine: ModuleType) -> Array:
    """Return value as an array of an engine that is not NumPy's."""
    try:
        result = engine.as_array(value)
    except TypeError as error:
        msg = f"{name} must be {engine.KIND}: {error}"
        raise TypeError(msg) from error
    if not result.is_aligned:
        msg = f"{name} must start and step at multiples of {result.itemsize} bytes"
        raise ValueError(msg)
    return result


def _native(name: str, value: Any) -> Array:
    """Return value as a numpy.ndarray."""
    if _is(value, np.ma.MaskedArray):
        msg = f"{name} must be a plain array, got a MaskedArray: fill its gaps first"
        raise TypeError(msg)
    if is_on_gpu(value):
        msg = (
            f"{name} must be in the host's memory as the others are, got {_kind(value)}"
        )
        raise TypeError(msg)
    try:
        return np.asarray(value)
    except MemoryError:
        raise
    except Exception as error:
        msg = f"{name} must be an array of numbers, got {_kind(value)}: {_shown(error)}"
        raise TypeError(msg) from error


def same_device(name: str, x: Array, other_name: str, other: Array) -> None:
    """Refuse arrays on two devices."""
    if x.device != other.device:
        msg = f"{name} must be on {other_name}'s device {other.device}, got {x.device}"
        raise ValueError(msg)


def like(
    name: str, value: Any, other_name: str, other: Array, engine: ModuleType
) -> Array:
    """Return value as an array of the dtype and shape of another argument."""
    result = array(name, value, engine, integers=True)
    if result.dtype != other.dtype:
        msg = (
            f"{name} must have the dtype of {other_name}, {other.dtype}, "
            f"got {result.dtype}"
        )
        raise TypeError(msg)
    if result.shape != other.shape:
        msg = (
            f"{name} must have the shape of {other_name}, {other.shape}, "
            f"got {result.shape}"
        )
        raise ValueError(msg)
    same_device(name, result, other_name, other)
    return result


def flag(name: str, value: object) -> bool:
    """Return a bool that is one."""
    if not _is(value, (bool, np.bool_)):
        msg = f"{name} must be True or False, got {_kind(value)}"
        raise TypeError(msg)
    return bool(value)


def slope(value: Any) -> float:
    """Return a finite real slope as a float."""
    real = _is(value, (numbers.Real, np.floating, np.integer))
    if not real or _is(value, (bool, np.timedelta64)):
        msg = f"negative_slope must be a real number, got {_kind(value)}"
        raise TypeError(msg)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except Exception as error:
        msg = f"negative_slope must be a real number, got {_kind(value)}"
        raise TypeError(msg) from error
    if not math.isfinite(number):
        msg = f"negative_slope must be finite, got {_shown(value)}"
        raise ValueError(msg)
    return number


def output(
    inplace: object,
    out: Any,
    name: str,
    original: Any,
    checked: Array,
    engine: ModuleType,
) -> tuple[Any, Array | None]:
    """Return the object to give back and the array to write to; None for a fresh one.

    `original` is the first argument as it came, `checked` what `array` made of it.
    """
    if flag("inplace", inplace):
        if out is not None:
            msg = "inplace=True and out= were both given; out= the first array is in place"
            raise ValueError(msg)
        expected = "must be an array in place"
        return original, writeable(name, original, checked, expected, engine)
    if out is None:
        return None, None
    return out, writeable("out", out, checked, "must be an array", engine)


def writeable(
    name: str, value: Any, model: Array, expected: str, engine: ModuleType
) -> Array:
    """Return value as an array that can take a result shaped and typed like model."""
    result = value
    if hasattr(engine, "as_array"):
        # In place, what `array` made of it serves again.
        same = getattr(model, "given", None) is value
        result = model if same else _foreign(name, value, engine)
    elif not _is(value, np.ndarray) or _is(value, np.ma.MaskedArray):
        msg = f"{name} {expected} (numpy.ndarray), got {_kind(value)}"
        raise TypeError(msg)
    else:
        result = np.asarray(value)  # a subclass may have attributes of its own
    native = isinstance(result.dtype, str) or result.dtype.isnative
    if result.dtype != model.dtype or not native:
        came = result.dtype if native else f"byte-swapped {result.dtype}"
        msg = f"{name} must have the native dtype {model.dtype}, got {came}"
        raise TypeError(msg)
    if result.shape != model.shape:
        msg = f"{name} must have shape {model.shape}, got {result.shape}"
        raise ValueError(msg)
    if not getattr(result, "flags", result).writeable:
        msg = f"{name} must be writeable, got a read-only array"
        raise ValueError(msg)
    same_device(name, result, "the result", model)
    if _shares_elements(_places(result)):
        msg = (
            f"{name} must not share memory between its own elements, got shape "
            f"{result.shape} with strides {result.strides}"
        )
        raise ValueError(msg)
    return result


def _places(x: Array) -> Array:
    """Return the NumPy array that has the addresses of x's elements."""
    return getattr(x, "addresses", x)


def _shares_elements(x: Array) -> bool:
    """Say whether two elements of x have a byte in common."""
    if x.size < 2 or x.flags.c_contiguous:
        return False
    reach = x.itemsize
    for stride, size in sorted(
        (abs(stride), size)
        for stride, size in zip(x.strides, x.shape, strict=True)
        if size > 1
    ):
        if stride < reach:
            break
        reach += stride * (size - 1)
    else:
        return False  # each axis steps over all that the finer ones reach
    # Rare and crafted: compare the slices along one axis after another, exactly.
    axis = max(range(x.ndim), key=lambda i: x.shape[i])
    if x.shape[axis] < 2:
        return False
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


def saved(value: Any, name: str, model: Array, engine: ModuleType) -> Array | Mask:
    """Return the saved state: a mask of the right shape, or an array like model."""
    if not _is(value, Mask):
        return like("saved", value, name, model, engine)
    try:
        mask = Mask(value.bits, value.shape)  # both may have been changed since
    except MemoryError:
        raise
    except Exception as error:
        msg = f"saved must be a mask that is still as it was made: {_shown(error)}"
        raise (ValueError if _is(error, ValueError) else TypeError)(msg) from error
    if mask.shape != model.shape:
        msg = (
            f"saved must be a mask of shape {model.shape}, as {name} is, "
            f"got one of shape {mask.shape}"
        )
        raise ValueError(msg)
    if hasattr(engine, "as_array"):
        same_device("saved", _foreign("saved", mask.bits, engine), name, model)
    elif not _is(mask.bits, np.ndarray):
        msg = f"saved must be in the host's memory as {name} is, got a mask on a GPU"
        raise TypeError(msg)
    return mask


def weight(value: Any, x: Array, axis: Any, engine: ModuleType) -> tuple[Array, Array]:
    """Return the weight as an array, and reshaped to broadcast against x."""
    given = array("weight", value, engine)
    same_device("weight", given, "x", x)
    mixed = str(given.dtype) == "float32" and x.itemsize == 2
    if given.dtype != x.dtype and not mixed:
        expected = f"{x.dtype} or float32" if x.itemsize == 2 else str(x.dtype)
        msg = f"weight must have the dtype of x, {expected}, got {given.dtype}"
        raise TypeError(msg)
    if _is(axis, (bool, np.bool_)):
        msg = f"axis must be an integer, got {_kind(axis)}"
        raise TypeError(msg)
    try:
        position = operator.index(axis)
    except Exception as error:
        msg = f"axis must be an integer, got {_kind(axis)}"
        raise TypeError(msg) from error
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
        if position == 1:
            msg = (
                f"weight must have one element where x has {x.ndim} dimensions and no "
                f"other axis is named, got shape {given.shape}"
            )
        else:
            msg = f"axis must be in [{-x.ndim}, {x.ndim}), got {_shown(position)}"
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
