"""What quick calls ask of Python's and NumPy's objects, and how they make new ones.

Compiled code reads the objects where they lie: `abi` has the facts and their proof.  What
it has to know of this process, the addresses of types and of C functions, comes in the
first words of a call's *table*.
"""

from typing import Any

import numpy as np
from numba import types

from fastrelu.cpu import abi, pool
from fastrelu.cpu.abi import (
    ALIGNED,
    C_ORDER,
    DTYPE,
    FLAGS,
    KEEP_ORDER,
    KIND,
    LARGEST,
    MASK_AXES,
    MASK_BITS,
    MASK_PREDICATE,
    MASK_SHAPE,
    NDIM,
    SHAPE,
    STRIDES,
    TYPE,
    UINT8,
    WRITEABLE,
)
from fastrelu.cpu.jit import calling, inlined
from fastrelu.cpu.loops import words
from fastrelu.cpu.pool import SMALLEST
from fastrelu.mask import Mask

# Words of a table.
NONE, FALSE, TRUE, ARRAY, INT, TUPLE, BYTE, MASK, POOL = range(9)
_EMPTY_LIKE, _NEW_ARRAY = 9, 10
_NUMBERS = 11  # the types of numbers, the floats first
_CODES = "dfebBhHiIlLqQ"
_TYPES = float, *(np.dtype(code).type for code in _CODES), int
_FLOATS, _FLOAT_CODES = 4, 3  # how many of them are floats
_SCALARS = _NUMBERS + len(_TYPES)  # dtypes of 0-d arrays
LENGTH = _SCALARS + len(_CODES)

_BRIEF = 1 << 15  # bytes: releasing the GIL would take longer than the work
_INEXACT = 2.0**53  # integers from here on may be no float64

_address = types.int64
_call_empty_like = calling(_address(_address, types.intc, _address, types.intc))
_call_new_array = calling(
    _address(
        *(_address, types.intc, _address, types.intc, _address, _address),
        *(types.intc, types.intc, _address),
    )
)
incref = types.ExternalFunction("Py_IncRef", types.void(_address))
decref = types.ExternalFunction("Py_DecRef", types.void(_address))  # or nothing, of 0
save_thread = types.ExternalFunction("PyEval_SaveThread", _address())
restore_thread = types.ExternalFunction("PyEval_RestoreThread", types.void(_address))
_as_float = types.ExternalFunction("PyFloat_AsDouble", types.float64(_address))
as_integer = types.ExternalFunction("PyLong_AsSsize_t", types.intp(_address))
from_integer = types.ExternalFunction("PyLong_FromSsize_t", _address(types.intp))
failed = types.ExternalFunction("PyErr_Occurred", _address())
forget = types.ExternalFunction("PyErr_Clear", types.void())
new_tuple = types.ExternalFunction("PyTuple_New", _address(types.intp))
tuple_size = types.ExternalFunction("PyTuple_Size", types.intp(_address))
tuple_item = types.ExternalFunction("PyTuple_GetItem", _address(_address, types.intp))
set_item = types.ExternalFunction(
    "PyTuple_SetItem", types.intc(_address, types.intp, _address)
)
_new_object = types.ExternalFunction(
    "PyType_GenericAlloc", _address(_address, types.intp)
)


def dtype_word(dtype: Any) -> int:
    """Return the word by which compiled code knows a dtype."""
    return abi.word(np.dtype(dtype), KIND)


def known() -> list[int]:
    """Return the first words of a table."""
    return [
        *map(id, (None, False, True, np.ndarray, int, tuple)),
        dtype_word(np.uint8),
        id(Mask),
        pool.ADDRESS,
        abi.numpy_api(abi.NEW_LIKE_ARRAY),
        abi.numpy_api(abi.NEW_ARRAY),
        *map(id, _TYPES),
        *map(dtype_word, _CODES),
    ]


# Arrays -------------------------------------------------------------------------------


@inlined
def ndim_of(x):
    return words(x)[NDIM] & 0xFFFFFFFF


@inlined
def dtype_of(x):
    return words(words(x)[DTYPE])[KIND]


@inlined
def is_plain(table, x):
    """Say whether something is an array of NumPy's own class, its elements aligned."""
    return words(x)[TYPE] == table[ARRAY] and words(x)[FLAGS] & ALIGNED != 0


@inlined
def one_of(table, out, which):
    """Return one of the two arrays to write to, None, or 0 for what is no pair."""
    if out == table[NONE]:
        return out
    if words(out)[TYPE] != table[TUPLE]:
        return out if which == 0 else table[NONE]
    return tuple_item(out, which) if tuple_size(out) == 2 else 0


@inlined
def is_c_order(x):
    return words(x)[FLAGS] & C_ORDER != 0


@inlined
def is_writeable(x):
    return words(x)[FLAGS] & WRITEABLE != 0


@inlined
def size_of(x):
    size, shape = 1, words(words(x)[SHAPE])
    for axis in range(ndim_of(x)):
        size *= shape[axis]
    return size


@inlined
def is_like(x, y):
    """Say whether two arrays have one dtype and one shape."""
    if dtype_of(x) != dtype_of(y) or ndim_of(x) != ndim_of(y):
        return False
    shape, other = words(words(x)[SHAPE]), words(words(y)[SHAPE])
    for axis in range(ndim_of(x)):
        if shape[axis] != other[axis]:
            return False
    return True


@inlined
def overlap(start, nbytes, other, other_nbytes):
    """Say whether two pieces of memory have a byte in common."""
    return start < other + other_nbytes and other < start + nbytes


@inlined
def _step(x, axis):
    """Return how far an axis goes in memory, further than any other for length 1."""
    if words(words(x)[SHAPE])[axis] == 1:
        return LARGEST
    stride = words(words(x)[STRIDES])[axis]
    return stride if stride > 0 else -stride


@inlined
def memory_order(x, order):
    """Write the axes from the one with the largest stride to the smallest.

    That is `_layout.memory_order`.
    """
    for axis in range(ndim_of(x)):
        place, step = axis, _step(x, axis)
        while place > 0 and _step(x, order[place - 1]) < step:
            order[place] = order[place - 1]
            place -= 1
        order[place] = axis


# Numbers ------------------------------------------------------------------------------


@inlined
def integer_of(table, value, otherwise):
    """Return an int of Python's, or something else where it is none, or too large."""
    if words(value)[TYPE] != table[INT]:
        return otherwise
    number = as_integer(value)
    if number == -1 and failed() != 0:
        forget()
        return otherwise
    return number


@inlined
def _is_number(table, value):
    """Say whether a value is a number (1), perhaps a rounded one (2), or none (0)."""
    type_of = words(value)[TYPE]
    first, floats, stop = _NUMBERS, _FLOATS, _SCALARS
    if type_of == table[ARRAY]:
        if ndim_of(value) != 0:
            return 0
        type_of, first, floats, stop = dtype_of(value), _SCALARS, _FLOAT_CODES, LENGTH
    for place in range(first, stop):
        if table[place] == type_of:
            return 1 if place < first + floats else 2
    return 0


@inlined
def number_of(table, value, bound):
    """Return a number below a bound that is rounded once at most, or NaN.

    Only numbers of Python and NumPy are asked, which run no other code.
    """
    certainty = _is_number(table, value)
    if certainty == 0:
        return np.nan
    answer = _as_float(value)
    if answer == -1.0 and failed() != 0:  # an integer that no float64 can hold
        forget()
        return np.nan
    if certainty == 2 and _INEXACT < bound:
        bound = _INEXACT
    return answer if abs(answer) < bound else np.nan


# Tuples and masks ---------------------------------------------------------------------


@inlined
def _is_tuple_of(table, value, numbers, count):
    """Say whether something is a tuple of just these integers, each of Python's type."""
    if value == 0 or words(value)[TYPE] != table[TUPLE] or tuple_size(value) != count:
        return False
    for k in range(count):
        if integer_of(table, tuple_item(value, k), -1) != words(numbers)[k]:
            return False
    return True


@inlined
def _tuple_of(numbers, count):
    """Return a new tuple of integers, or 0."""
    made = new_tuple(count)
    for k in range(count if made != 0 else 0):
        value = from_integer(words(numbers)[k])
        if value == 0:
            decref(made)
            return 0
        set_item(made, k, value)
    return made


@inlined
def _is_ascending(x, order):
    """Say whether an order of the axes is C order: those of length 1 do not matter."""
    last = -1
    for k in range(ndim_of(x)):
        axis = order[k]
        if words(words(x)[SHAPE])[axis] != 1:
            if axis < last:
                return False
            last = axis
    return True


@inlined
def bits_of(table, predicate, mask, x, order):
    """Return the bits of a mask that was made of an array that lies as x, or 0.

    Each attribute may have been replaced or deleted since.
    """
    if words(mask)[MASK_PREDICATE] != predicate:
        return 0
    shape, axes = words(mask)[MASK_SHAPE], words(mask)[MASK_AXES]
    if not _is_tuple_of(table, shape, words(x)[SHAPE], ndim_of(x)):
        return 0
    if is_c_order(x):
        return words(mask)[MASK_BITS] if axes == table[NONE] else 0
    memory_order(x, order)
    if axes == table[NONE]:
        return words(mask)[MASK_BITS] if _is_ascending(x, order) else 0
    if not _is_tuple_of(table, axes, order.ctypes.data, ndim_of(x)):
        return 0
    return words(mask)[MASK_BITS]


@inlined
def new_mask(table, predicate, shape, axes, bits):
    """Return a mask, or 0; the last three, each of which may be 0, are given away."""
    mask = 0
    if shape != 0 and axes != 0 and bits != 0:
        mask = _new_object(table[MASK], 0)
    if mask == 0:
        decref(shape)
        decref(axes)
        decref(bits)
        return 0
    incref(predicate)
    words(mask)[MASK_PREDICATE], words(mask)[MASK_SHAPE] = predicate, shape
    words(mask)[MASK_AXES], words(mask)[MASK_BITS] = axes, bits
    return mask


@inlined
def with_mask(table, predicate, y, bits, order):
    """Return (y, mask), or 0 where there is no memory; y and bits are given away.

    Other threads find every object there is as soon as the GIL is released, or while the
    next one is made: each is whole by then.
    """
    axes, shape = 0, _tuple_of(words(y)[SHAPE], ndim_of(y))
    if shape != 0 and is_c_order(y):
        axes = none(table)
    elif shape != 0:
        memory_order(y, order)
        axes = _tuple_of(order.ctypes.data, ndim_of(y))
    mask = new_mask(table, predicate, shape, axes, bits)
    if mask == 0:
        decref(y)
        return 0
    return pair_of(y, mask)


@inlined
def pair_of(first, second):
    """Return a tuple of two objects that are given away, or 0."""
    pair = new_tuple(2)
    if pair == 0:
        decref(first)
        decref(second)
        return 0
    set_item(pair, 0, first)
    set_item(pair, 1, second)
    return pair


# Memory -------------------------------------------------------------------------------


@inlined
def none(table):
    incref(table[NONE])
    return table[NONE]


@inlined
def is_pool_ready(table):
    return words(table[POOL])[pool.HANDLER] != 0


@inlined
def _empty_like(table, x, nbytes):
    """Return a new array, or 0."""
    arguments = x, KEEP_ORDER, 0, 0
    if nbytes < SMALLEST:
        return _call_empty_like(table[_EMPTY_LIKE], arguments)
    before = pool.borrow(table[POOL])
    if before == 0:
        return 0
    result = _call_empty_like(table[_EMPTY_LIKE], arguments)
    return pool.restore(table[POOL], before, result)


@inlined
def empty_bytes(table, size):
    """Return a new array of so many bytes, words(size)[0], or 0."""
    arguments = table[ARRAY], 1, size, UINT8, 0, 0, 0, 0, 0
    if words(size)[0] < SMALLEST:
        return _call_new_array(table[_NEW_ARRAY], arguments)
    before = pool.borrow(table[POOL])
    if before == 0:
        return 0
    result = _call_new_array(table[_NEW_ARRAY], arguments)
    return pool.restore(table[POOL], before, result)


@inlined
def reference_to(table, x, result, nbytes):
    """Return a new reference to the result, or to an array like x if it is to be made.

    Where there is no memory for it, 0, and a MemoryError is on its way.
    """
    if result == 0:
        return _empty_like(table, x, nbytes)
    incref(result)
    return result


@inlined
def release_gil(moved):
    """Release the GIL for a loop, unless that is brief; return what takes it again."""
    return save_thread() if moved >= _BRIEF else 0


@inlined
def take_gil(thread):
    """Take the GIL again, if it was released."""
    if thread != 0:
        restore_thread(thread)
