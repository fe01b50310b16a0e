"""Quick calls: from the arguments to the loop without a line of Python.

At a thousand elements, asking an array what it is takes Python longer than the loop
takes, and at a hundred thousand still a third as long.  Here compiled code asks, and
reads the objects where they lie: the layout of NumPy's arrays is part of its C
interface.  It takes arrays of any layout, and works on them where they lie.  What it
does not take it leaves to Python: every check with its error message is there.

A call is a built-in function with a *table*, an array of words that holds what is known
once the process runs: the addresses of types, of C functions, and of compiled loops.
The first arguments are always (x or grad_output, inplace, out).  The table says what
kinds of operands follow.
"""

import functools
from typing import Any

import numpy as np
from numba import types

from fastrelu._dtypes import is_accepted, row_of
from fastrelu._spec import ARRAY, BITS, NUMBER, WEIGHT, Operation
from fastrelu.cpu import abi, build, loops, pool, sums, threads
from fastrelu.cpu.abi import (
    ALIGNED,
    ANY_ORDER,
    C_ORDER,
    DATA,
    DTYPE,
    FLAGS,
    KEEP_ORDER,
    KIND,
    NDIM,
    SHAPE,
    STRIDES,
    TYPE,
    WRITEABLE,
)
from fastrelu.cpu.jit import (
    Function,
    array_at,
    built_in,
    calling,
    compile_and_keep,
    inlined,
    keep_for_ever,
    pointer_to,
    shielded,
)
from fastrelu.cpu.lanes import buffer, lane_of
from fastrelu.cpu.pool import SMALLEST
from fastrelu.cpu.walk import FLAT, LOOK_SIGNATURE, SIMPLE, look, walk

_BRIEF = 1 << 15  # bytes: releasing the GIL would take longer than the work

# Words of what a built-in function is given: who takes what it leaves, and the table.
_FALLBACK, _TABLE = range(2)

# Words of a table.
_NONE, _FALSE, _TRUE, _ARRAY, _INT, _TUPLE, _BYTE, _EMPTY_LIKE, _POOL = range(9)
_CACHE, _MISSING, _STREAMS, _KNOWN, _LOOK, _WALK = range(9, 15)
_COUNT, _KINDS = 15, 16  # of the operands, and their kinds
_MOST_OPERANDS = 4
_NUMBERS = _KINDS + _MOST_OPERANDS  # the types of numbers, the floats first
_CODES = "dfebBhHiIlLqQ"
_TYPES = float, *(np.dtype(code).type for code in _CODES), int
_FLOATS, _FLOAT_CODES = 4, 3  # how many of them are floats
_SCALARS = _NUMBERS + len(_TYPES)  # dtypes of 0-d arrays
_ROWS = _SCALARS + len(_CODES)
# A row is what is known of one dtype, which comes first; its loops are 0 until needed.
_ITEM, _WEIGHT, _WIDEN, _ROUND, _SINGLE, _LOOP = range(1, 7)
_PLAIN, _PAST_CACHE, _IN_PLACE = range(len(build.KINDS))  # added to _LOOP, as is
_COLUMNS, _EACH = len(build.KINDS), 2 * len(build.KINDS)
_ROW = _LOOP + 3 * len(build.KINDS)
_MOST = 32  # rows: there are fewer dtypes

# Kinds of operands, and what may be missing besides a loop.
_AN_ARRAY, _SOME_BITS, _A_WEIGHT, _AN_AXIS, _A_NUMBER, _NO_MASK = range(6)
_A_DTYPE, _THREADS, _A_POOL, _LAYOUTS = -1, -2, -3, -4
_TRIES = 8  # more than there are kinds of what may be missing

_BEYOND_SINGLE = 2.0**128 - 2.0**103  # rounded to float32, an infinity
_INEXACT = 2.0**53  # integers from here on may be no float64

_words, _floats = loops.words, loops.floats
_singles = pointer_to(types.CPointer(types.float32))
_strides = buffer(64, types.int64)  # NumPy has no more axes
_call_loop, _call_look = calling(loops.SIGNATURE), calling(LOOK_SIGNATURE)
_call_sums = calling(sums.SIGNATURE)
_call_weights = calling(sums.WEIGHTS_SIGNATURE)
_address = types.int64
_call_empty_like = calling(_address(_address, types.intc, _address, types.intc))
_incref = types.ExternalFunction("Py_IncRef", types.void(_address))
_save_thread = types.ExternalFunction("PyEval_SaveThread", _address())
_restore_thread = types.ExternalFunction("PyEval_RestoreThread", types.void(_address))
_as_float = types.ExternalFunction("PyFloat_AsDouble", types.float64(_address))
_as_integer = types.ExternalFunction("PyLong_AsSsize_t", types.intp(_address))
_failed = types.ExternalFunction("PyErr_Occurred", _address())
_forget = types.ExternalFunction("PyErr_Clear", types.void())
_decref = types.ExternalFunction("Py_DecRef", types.void(_address))
_new_tuple = types.ExternalFunction("PyTuple_New", _address(types.intp))
_length = types.ExternalFunction("PyTuple_Size", types.intp(_address))
_item = types.ExternalFunction("PyTuple_GetItem", _address(_address, types.intp))
_set_item = types.ExternalFunction(
    "PyTuple_SetItem", types.intc(_address, types.intp, _address)
)
_malloc = types.ExternalFunction("PyMem_RawMalloc", _address(types.intp))
_free = types.ExternalFunction("PyMem_RawFree", types.void(_address))
_vectorcall = types.ExternalFunction(
    "PyObject_Vectorcall", _address(_address, _address, types.intp, _address)
)


# Questions ----------------------------------------------------------------------------


@inlined
def _ndim(x):
    return _words(x)[NDIM] & 0xFFFFFFFF


@inlined
def _kind(x):
    return _words(_words(x)[DTYPE])[KIND]


@inlined
def _is_plain(table, x):
    """Say whether something is an array of NumPy's own class, its elements aligned."""
    return _words(x)[TYPE] == table[_ARRAY] and _words(x)[FLAGS] & ALIGNED != 0


@inlined
def _size(x):
    size, shape = 1, _words(_words(x)[SHAPE])
    for axis in range(_ndim(x)):
        size *= shape[axis]
    return size


@inlined
def _is_like(x, y):
    """Say whether two arrays have one dtype and one shape."""
    if _kind(x) != _kind(y) or _ndim(x) != _ndim(y):
        return False
    shape, other = _words(_words(x)[SHAPE]), _words(_words(y)[SHAPE])
    for axis in range(_ndim(x)):
        if shape[axis] != other[axis]:
            return False
    return True


@inlined
def _row(table, x):
    """Return where the row of an array's dtype starts, or 0."""
    kind = _kind(x)
    for row in range(_ROWS, _ROWS + table[_KNOWN] * _ROW, _ROW):
        if table[row] == kind:
            return row
    return 0


@inlined
def _is_number(table, value):
    """Say whether a value is a number (1), perhaps a rounded one (2), or none (0)."""
    kind = _words(value)[TYPE]
    first, floats, stop = _NUMBERS, _FLOATS, _SCALARS
    if kind == table[_ARRAY]:
        if _ndim(value) != 0:
            return 0
        kind, first, floats, stop = _kind(value), _SCALARS, _FLOAT_CODES, _ROWS
    for place in range(first, stop):
        if table[place] == kind:
            return 1 if place < first + floats else 2
    return 0


@inlined
def _number(table, row, value):
    """Return a finite number that becomes that of the products in one rounding, or NaN.

    Only numbers of Python and NumPy are asked, which run no other code.
    """
    certainty = _is_number(table, value)
    if certainty == 0:
        return np.nan
    number = _as_float(value)
    if number == -1.0 and _failed() != 0:  # an integer that no float64 can hold
        _forget()
        return np.nan
    bound = _BEYOND_SINGLE if table[row + _SINGLE] != 0 else np.inf
    if certainty == 2 and _INEXACT < bound:
        bound = _INEXACT
    return number if abs(number) < bound else np.nan


@inlined
def _meet(start, length, other, other_length):
    """Say whether two pieces of memory have a byte in common."""
    return start < other + other_length and other < start + length


@inlined
def _first_byte(w, start, strides):
    """Return the address of the first byte of an array that is not empty."""
    for axis in range(w[loops.NDIM]):
        step = _words(strides)[axis]
        if step < 0:
            start += step * (_words(w[loops.SHAPE])[axis] - 1)
    return start


@inlined
def _reach(w, strides, itemsize):
    """Return how many bytes there are from the first to the last one of an array."""
    reach = itemsize
    for axis in range(w[loops.NDIM]):
        step = _words(strides)[axis] * (_words(w[loops.SHAPE])[axis] - 1)
        reach += step if step > 0 else -step
    return reach


@inlined
def _have_same(w, strides, other):
    """Say whether two arrays of one shape have the same strides, as far as they matter."""
    for axis in range(w[loops.NDIM]):
        steps, length = _words(strides)[axis], _words(w[loops.SHAPE])[axis]
        if length > 1 and steps != _words(other)[axis]:
            return False
    return True


@inlined
def _target(table, x, inplace, out):
    """Return the array to write to, 0 for a fresh one, or -1 to leave it to Python."""
    if out != table[_NONE]:
        if inplace != table[_FALSE] or not _is_plain(table, out):
            return -1
        if not _is_like(out, x) or not _words(out)[FLAGS] & WRITEABLE:
            return -1
        return out
    if inplace == table[_TRUE]:
        return x if _words(x)[FLAGS] & WRITEABLE else -1
    return 0 if inplace == table[_FALSE] else -1


def kind_of_loop(cache: int, moved: int, in_place: bool) -> int:
    """Return the kind, a place in `build.KINDS`, that suits so many bytes."""
    if in_place:
        return _IN_PLACE
    return _PAST_CACHE if moved > cache else _PLAIN


def block_of(many: int, size: int, channels: int, inner: int) -> int:
    """Return 1 if columns suit weights better than rows, else 0.

    Each row starts a loop over it, which costs something, and so does each column, whose
    weight is laid out or whose products are summed apart: that pays if there are many
    rows of each weight.
    """
    short = loops.SHORT if size >= many * channels * inner else loops.NARROW
    return channels > 1 and inner < short


_kind_of_loop, _block_of = inlined(kind_of_loop), inlined(block_of)


# Weights ------------------------------------------------------------------------------


@inlined
def _fits(table, row, weight):
    """Say whether a weight has the type of the products, or that of half floats."""
    kind = _kind(weight)
    return kind == table[row] or kind == table[row + _WEIGHT]


@inlined
def _weight_size(table, row, weight):
    """Return how many bytes each element of a weight has that fits."""
    return table[row + _ITEM] if _kind(weight) == table[row] else 4


@inlined
def _widen(table, row, weight, channels):
    """Return the address of a copy in the type of the products, 0 if none is needed.

    -1 says that there is no memory for it.
    """
    if _kind(weight) == table[row + _WEIGHT]:
        return 0
    wide = _malloc(channels * 4)
    if wide == 0:
        return -1
    _call_weights(table[row + _WIDEN], (_words(weight)[DATA], wide, channels))
    return wide


@inlined
def _channels(table, row, x, weight, axis, size, w, strides):
    """Find out which weight goes with which element; return 0 to leave it to Python.

    1 says that for a flat x the weights go with (outer, channel, inner), whose sizes are
    among the words then; 2, that they only have strides, which are there for both.
    """
    if not _is_plain(table, weight) or not _words(weight)[FLAGS] & C_ORDER:
        return 0
    if not _fits(table, row, weight) or _words(axis)[TYPE] != table[_INT]:
        return 0
    place = _as_integer(axis)
    if place == -1 and _failed() != 0:
        _forget()
        return 0
    ndim, more, channels = _ndim(x), _ndim(weight), _size(weight)
    shape, lengths = _words(_words(x)[SHAPE]), _words(_words(weight)[SHAPE])
    steps, itemsize = _words(_words(x)[STRIDES]), table[row + _ITEM]
    w[loops.CHANNELS], w[loops.INNER] = channels, size
    if more < 2:
        inside = -ndim <= place < ndim
        if not inside and (channels != 1 or place != 1):  # the default may not matter
            return 0
        place += ndim if place < 0 else 0
    elif more > ndim:
        return 0
    for k in range(ndim):
        strides[k] = 0
    wide, inner, reach, answer = w[loops.WEIGHT_SIZE], 0, 0, 1
    for k in range(more - 1, -1, -1):
        length = lengths[k]
        if length == 1:
            continue
        along = place if more == 1 else ndim - more + k
        if shape[along] != length:
            return 0
        strides[along] = wide
        wide *= length
        if inner == 0:
            inner = steps[along] // itemsize
        elif steps[along] != reach:
            answer = 2
        reach = steps[along] * length
    if inner != 0:
        w[loops.INNER] = inner
    return answer


# Memory -------------------------------------------------------------------------------


@inlined
def _none(table):
    _incref(table[_NONE])
    return table[_NONE]


@inlined
def _leave(own, table, arguments, number):
    """Have Python answer the call, or return None where nobody is there to do it."""
    if own[_FALLBACK] == 0:
        return _none(table)
    return _vectorcall(own[_FALLBACK], arguments, number, 0)


@inlined
def _may_make(table, result, nbytes):
    """Say whether a fresh array of so many bytes can be made, or none is needed."""
    if result == 0 and nbytes >= SMALLEST and not _is_pool_ready(table):
        table[_MISSING] = _A_POOL
        return False
    return True


@inlined
def _is_pool_ready(table):
    return _words(table[_POOL])[pool.HANDLER] != 0


@inlined
def _empty_like(table, x, nbytes):
    """Return a new array, or 0."""
    arguments = x, KEEP_ORDER, 0, 0
    if nbytes < SMALLEST:
        return _call_empty_like(table[_EMPTY_LIKE], arguments)
    before = pool.borrow(table[_POOL])
    if before == 0:
        return 0
    result = _call_empty_like(table[_EMPTY_LIKE], arguments)
    return pool.restore(table[_POOL], before, result)


@inlined
def _own(table, x, result, nbytes):
    """Return a new reference to the result, or to an array like x if it is to be made.

    Where there is no memory for it, 0, and a MemoryError is on its way.
    """
    if result == 0:
        return _empty_like(table, x, nbytes)
    _incref(result)
    return result


@inlined
def _release_gil(moved):
    """Release the GIL for a loop, unless that is brief; return what takes it again."""
    return _save_thread() if moved >= _BRIEF else 0


@inlined
def _take_gil(thread):
    if thread != 0:
        _restore_thread(thread)


@inlined
def _loop(table, place, moved):
    """Return the address of a loop; 0 where there is none, or something is missing."""
    if place == 0:
        return 0
    if moved >= 2 * threads.SHARE and not threads.is_ready():
        table[_MISSING] = _THREADS
        return 0
    if table[place] == 0:
        table[_MISSING] = place
    return table[place]


# From operands to a loop --------------------------------------------------------------

# Words of ours behind those of a loop: the orders in which all arrays lie flat by their
# flags, how weights go with elements, and a weight or bits as an object.
_ORDER, _VIEW, _OBJECT = range(loops.LENGTH, loops.LENGTH + 3)
_operands = buffer(loops.LENGTH + 3, types.int64)


@inlined
def _take(table, row, given, w, strides):
    """Write what is known of the operands; say whether all of them are taken."""
    x = given[0]
    w[loops.SIZE] = size = _size(x)
    w[loops.MOVED] = table[_STREAMS] * size * table[row + _ITEM]
    w[loops.NDIM], w[loops.SHAPE] = _ndim(x), _words(x)[SHAPE]
    w[loops.ARRAYS], w[loops.STRIDES] = _words(x)[DATA], _words(x)[STRIDES]
    w[loops.BESIDE] = w[loops.BESIDE_STRIDES] = w[loops.INNER] = w[loops.LOOP] = 0
    w[loops.COUNT], w[loops.ITEMSIZE] = table[_STREAMS] - 1, table[row + _ITEM]
    w[loops.WEIGHT_SIZE] = 8 if table[row + _SINGLE] == 0 else 4
    w[_ORDER], w[_VIEW], w[_OBJECT] = _words(x)[FLAGS] & ANY_ORDER, 1, 0
    arrays, numbers, address = 1, 0, w.ctypes.data
    for k in range(arrays, loops.MOST_ARRAYS):
        w[loops.STRIDES + k] = 0
    for k in range(table[_COUNT]):
        kind, value = table[_KINDS + k], given[3 + k]
        if kind == _NO_MASK:
            if value != table[_FALSE]:
                return False
        elif kind == _AN_ARRAY:
            if not _is_plain(table, value) or not _is_like(value, x):
                return False
            w[loops.ARRAYS + arrays] = _words(value)[DATA]
            w[loops.STRIDES + arrays] = _words(value)[STRIDES]
            w[_ORDER] &= _words(value)[FLAGS]
            arrays += 1
        elif kind == _SOME_BITS:
            if not _is_plain(table, value) or not _words(value)[FLAGS] & C_ORDER:
                return False
            if _kind(value) != table[_BYTE] or _ndim(value) != 1:
                return False
            if _size(value) != (size + 7) >> 3:
                return False
            w[loops.BESIDE], w[_OBJECT] = _words(value)[DATA], value
        elif kind == _A_WEIGHT:
            view = _channels(table, row, x, value, given[4 + k], size, w, strides)
            if view == 0:
                return False
            w[loops.BESIDE], w[_OBJECT], w[_VIEW] = _words(value)[DATA], value, view
        elif kind == _A_NUMBER:
            number = _number(table, row, value)
            if np.isnan(number):
                return False
            _floats(address)[loops.NUMBERS + numbers] = number
            numbers += 1
    return True


@inlined
def _plan(table, row, y, fresh, many, w, strides):
    """Write how y lies, and return the place of the loop to run, or 0 to leave it.

    The word LOOP says whether the loop is for lines.
    """
    itemsize, arrays = table[row + _ITEM], table[_STREAMS] - 1
    nbytes, start = w[loops.SIZE] * itemsize, w[loops.ARRAYS]
    w[loops.Y], w[loops.Y_STRIDES] = _words(y)[DATA], _words(y)[STRIDES]
    flat, target = w[_ORDER] & _words(y)[FLAGS] & ANY_ORDER != 0, w[loops.Y]
    low, reach = target, nbytes
    if table[_WALK] == 0 and (not flat or w[_VIEW] == 2):
        table[_MISSING] = _LAYOUTS
        return 0
    if not flat:
        found = _call_look(table[_LOOK], (w.ctypes.data,))
        flat = found & FLAT != 0
        if not fresh and found & SIMPLE == 0:
            return 0
        low = _first_byte(w, target, w[loops.Y_STRIDES])
        reach = _reach(w, w[loops.Y_STRIDES], itemsize)
    for k in range(0 if fresh else arrays):
        other, steps = w[loops.ARRAYS + k], w[loops.STRIDES + k]
        if flat:
            if other != target and _meet(other, nbytes, target, nbytes):
                return 0
        elif other != target or not _have_same(w, steps, w[loops.Y_STRIDES]):
            first = _first_byte(w, other, steps)
            if _meet(first, _reach(w, steps, itemsize), low, reach):
                return 0
    beside = w[_OBJECT]
    if beside != 0:
        length = _size(beside)
        if _kind(beside) != table[_BYTE]:
            length *= _weight_size(table, row, beside)
        if _meet(low, reach, w[loops.BESIDE], length):
            return 0
        if _kind(beside) == table[_BYTE] and not flat:
            return 0
    in_place = target == start and not fresh
    block, weighted = 0, beside != 0 and _kind(beside) != table[_BYTE]
    if not flat or w[_VIEW] == 2:
        w[loops.LOOP] = 1
        block = _EACH if weighted else 0
        w[loops.BESIDE_STRIDES] = strides.ctypes.data if weighted else 0
        return row + _LOOP + block + (_IN_PLACE if in_place else _PLAIN)
    if weighted:
        channels = w[loops.CHANNELS]
        block = _COLUMNS * _block_of(many, w[loops.SIZE], channels, w[loops.INNER])
    kind = _kind_of_loop(table[_CACHE], w[loops.MOVED], in_place)
    return row + _LOOP + block + kind


# Answers ------------------------------------------------------------------------------


def call(self, arguments, number):
    """Take (x, inplace, out, operands...) and return the result."""
    own = _words(_words(self)[DATA])
    table, given = _words(own[_TABLE]), _words(arguments)
    like = array_at(arguments, 1, np.int64)
    w, strides = _operands(like), _strides(like)
    x, row, result = given[0], 0, -1
    table[_MISSING] = 0
    if _is_plain(table, x):
        row = _row(table, x)
        if row == 0:
            table[_MISSING] = _A_DTYPE
        elif _take(table, row, given, w, strides):
            result = _target(table, x, given[1], given[2])
    if result == -1:
        return _leave(own, table, arguments, number)
    nbytes = w[loops.SIZE] * table[row + _ITEM]
    if not _may_make(table, result, nbytes):
        return _leave(own, table, arguments, number)
    y = _own(table, x, result, nbytes)
    if y == 0 or nbytes == 0:
        return y
    place = _plan(table, row, y, result == 0, loops.MANY, w, strides)
    loop = _loop(table, place, w[loops.MOVED])
    wide = 0
    if loop != 0 and w[_OBJECT] != 0 and _kind(w[_OBJECT]) != table[_BYTE]:
        wide = _widen(table, row, w[_OBJECT], w[loops.CHANNELS])
    if loop == 0 or wide == -1:
        _decref(y)
        return _leave(own, table, arguments, number)
    if wide != 0:
        w[loops.BESIDE] = wide
    if w[loops.LOOP] != 0:
        w[loops.LOOP], loop = loop, table[_WALK]
    thread = _release_gil(w[loops.MOVED])
    _call_loop(loop, (w.ctypes.data,))
    _take_gil(thread)
    _free(wide)
    return y


@inlined
def _round(table, row, total, result, channels, half):
    """Round sums to the weight's type."""
    if half:
        _call_weights(table[row + _ROUND], (total, result, channels))
        return
    for channel in range(channels):
        lost = _floats(total)[channels + channel]
        value = sums.total_of(_floats(total)[channel], lost)
        if table[row + _ITEM] == 8:
            _floats(result)[channel] = value
        else:
            _singles(result)[channel] = value


@inlined
def _pair(table, out, which):
    """Return one of the two arrays to write to, None, or 0 for what is no pair."""
    if out == table[_NONE]:
        return out
    if _words(out)[TYPE] == table[_ARRAY]:
        return out if which == 0 else table[_NONE]
    if _words(out)[TYPE] != table[_TUPLE] or _length(out) != 2:
        return 0
    return _item(out, which)


def call_sums(self, arguments, number):
    """Take (grad_output, inplace, out, x, weight, axis) and return both gradients."""
    own = _words(_words(self)[DATA])
    table, given = _words(own[_TABLE]), _words(arguments)
    like = array_at(arguments, 1, np.int64)
    w, strides = _operands(like), _strides(like)
    grad, weight, row, result, total = given[0], given[4], 0, -1, -1
    first, second = _pair(table, given[2], 0), _pair(table, given[2], 1)
    table[_MISSING] = 0
    if _is_plain(table, grad) and first != 0:
        row = _row(table, grad)
        if row == 0:
            table[_MISSING] = _A_DTYPE
        elif _take(table, row, given, w, strides) and w[loops.SIZE] != 0:
            result = _target(table, grad, given[1], first)
            total = _target(table, weight, table[_FALSE], second)
    if result == -1 or total == -1 or (total != 0 and not _is_c_order(total)):
        return _leave(own, table, arguments, number)
    nbytes, channels = w[loops.SIZE] * table[row + _ITEM], w[loops.CHANNELS]
    length = channels * _weight_size(table, row, weight)
    if not _may_make(table, result, nbytes) or not _may_make(table, total, length):
        return _leave(own, table, arguments, number)
    # Each only if there is no MemoryError on its way already.
    y = _own(table, grad, result, nbytes)
    dw = _own(table, weight, total, length) if y != 0 else 0
    place = loop = memory = wide = 0
    if dw != 0:
        place = _plan(table, row, y, result == 0, loops.MANY_SUMMED, w, strides)
        target, into, slopes = w[loops.Y], _words(dw)[DATA], w[loops.BESIDE]
        if w[loops.LOOP] != 0 or _meet(target, nbytes, into, length):
            place = 0
        if into != slopes and _meet(slopes, length, into, length):
            place = 0
        loop = _loop(table, place, w[loops.MOVED])
    if loop != 0:
        wide = _widen(table, row, weight, channels)
        memory = _malloc(2 * channels * 8) if wide != -1 else 0
    pair = _new_tuple(2) if memory != 0 else 0
    failed = 1
    if pair != 0:
        # Whole before the GIL is released: other threads find every tuple there is.
        _set_item(pair, 0, y)
        _set_item(pair, 1, dw)
        start, saved = w[loops.ARRAYS], w[loops.ARRAYS + 1]
        target, into, slopes = w[loops.Y], _words(dw)[DATA], w[loops.BESIDE]
        if wide != 0:
            slopes = wide
        size, inner, moved = w[loops.SIZE], w[loops.INNER], w[loops.MOVED]
        operands = start, saved, slopes, target, memory, size, channels, inner, moved
        thread = _release_gil(moved)
        failed = _call_sums(loop, operands)
        _take_gil(thread)
        if failed == 0:
            _round(table, row, memory, into, channels, wide != 0)
    _free(memory)
    if wide != -1:
        _free(wide)
    if failed == 0:
        return pair
    if pair != 0:
        _decref(pair)
    else:
        for thing in (y, dw):
            if thing != 0:
                _decref(thing)
    if _failed() != 0:
        return 0
    return _leave(own, table, arguments, number)


@inlined
def _is_c_order(x):
    return _words(x)[FLAGS] & C_ORDER != 0


# Building -----------------------------------------------------------------------------


def _kind_of(dtype: Any) -> int:
    return abi.word(np.dtype(dtype), KIND)


_KNOWN_WORDS = {
    _NONE: id(None),
    _FALSE: id(False),
    _TRUE: id(True),
    _ARRAY: id(np.ndarray),
    _INT: id(int),
    _TUPLE: id(tuple),
    _BYTE: _kind_of(np.uint8),
    _EMPTY_LIKE: abi.numpy_api(abi.NEW_LIKE_ARRAY),
    _POOL: pool.ADDRESS,
}
_SIGNATURE = _address(_address, _address, types.intp)
_KINDS_OF = {
    ARRAY: [_AN_ARRAY],
    BITS: [_SOME_BITS],
    WEIGHT: [_A_WEIGHT, _AN_AXIS],
    NUMBER: [_A_NUMBER],
}


class Call:
    """The quick calls of one operation.

    They are ``call(x, inplace, out, *operands)``, with an axis behind a weight.  Where
    `flag` says so, the first operand is a `return_mask` that must be False; where `sums`
    does, both gradients of PReLU are made.
    """

    __slots__ = ("blocks", "call", "kinds", "operation", "rows", "sums", "table")

    def __init__(
        self, operation: Operation, *, flag: bool = False, sums: bool = False
    ) -> None:
        self.operation, self.sums = operation, sums
        self.blocks = _blocks_of(operation, sums)
        self.table = np.zeros(_ROWS + _MOST * _ROW, np.int64)
        self.rows: dict[int, np.dtype[Any]] = {}  # by where they start
        operands = list(operation.kinds[1:])
        if operation.active is not None:
            operands.insert(0, BITS)
        kinds = [_NO_MASK] if flag else []
        self.kinds = [*kinds, *(kind for each in operands for kind in _KINDS_OF[each])]
        self.call: Any = _leave_it

    def make_ready(self, dtype: np.dtype[Any], *, integers: bool) -> bool:
        """Make ready what the last call missed; say whether that was something."""
        missing = int(self.table[_MISSING]) if self.rows else _A_DTYPE
        self.table[_MISSING] = 0
        if missing == _A_DTYPE:
            known = is_accepted(row_of(dtype), integers=integers) and dtype.isnative
            if known:
                self._add(dtype)
            return known
        if missing == _THREADS:
            threads.ready()
        elif missing == _A_POOL:
            pool.ready()
        elif missing == _LAYOUTS:
            self.table[_LOOK] = _compiled(look, LOOK_SIGNATURE).address
            self.table[_WALK] = _compiled(walk, loops.SIGNATURE).address
        elif missing:
            row = missing - (missing - _ROWS) % _ROW
            number, kind = divmod(missing - row - _LOOP, len(build.KINDS))
            made_of = self.blocks[number], self.operation, lane_of(self.rows[row])
            loop = build.compiled(*made_of, build.KINDS[kind])
            self.table[missing] = loop.address
        return missing != 0

    def again(self, x: Any, *others: Any, integers: bool) -> Any:
        """Return what a call does once all that the last one missed is there, or None."""
        for _ in range(_TRIES):
            if not self.make_ready(x.dtype, integers=integers):
                break
            result = self.call(x, *others)
            if result is not None:
                return result
        return None

    def run(self, x: Any, *others: Any) -> Any:
        """Return what a call does, after it was made ready, or None."""
        result = self.call(x, *others)
        return self.again(x, *others, integers=True) if result is None else result

    def before(self, fallback: Function) -> Any:
        """Return the same call with somebody to take what it leaves."""
        return _make(self.sums, self.table, keep_for_ever(fallback))

    @shielded
    def _add(self, dtype: np.dtype[Any]) -> None:
        """Add the row of a dtype; with the first, make the call."""
        kind, table, row = _kind_of(dtype), self.table, _ROWS + _ROW * len(self.rows)
        if kind in table[_ROWS:row:_ROW]:
            return
        lane = lane_of(dtype)
        table[row : row + _WIDEN] = kind, dtype.itemsize, _kind_of(lane.product)
        table[row + _SINGLE] = lane.product == np.float32
        if WEIGHT in self.operation.kinds and lane.product != lane.storage:
            for word, template in _OF_HALVES.items():
                table[row + word] = build.compiled_for(lane, template).address
        if not self.rows:
            for word, value in _KNOWN_WORDS.items():
                table[word] = value
            table[_NUMBERS : _NUMBERS + len(_TYPES)] = [id(kind) for kind in _TYPES]
            table[_SCALARS : _SCALARS + len(_CODES)] = [
                _kind_of(code) for code in _CODES
            ]
            table[_CACHE], table[_STREAMS] = threads.CACHE, self.operation.arrays + 1
            table[_COUNT] = len(self.kinds)
            table[_KINDS : _KINDS + len(self.kinds)] = self.kinds
            self.call = _make(self.sums, table, None)
        table[_KNOWN] = len(self.rows) + 1
        self.rows[row] = dtype  # from here on nobody asks again


def _blocks_of(operation: Operation, summed: bool) -> tuple[Function, ...]:
    """Return the blocks, or what stands in their place, at _COLUMNS and _EACH, too."""
    if summed:
        return tuple(sums.PARTS)
    if WEIGHT in operation.kinds:
        return loops.rows, loops.columns, loops.each
    if operation.active is not None:
        return (loops.to_bits,)
    if BITS in operation.kinds:
        return (loops.from_bits,)
    return (loops.plain,)


_OF_HALVES = {_WIDEN: sums.widen_weights, _ROUND: sums.round_sums}


def _leave_it(*arguments: Any) -> None:
    """Stand in for a call that is not made yet."""


def _make(summed: bool, table: Any, fallback: Any) -> Any:
    """Return a built-in function."""
    own = np.array([0 if fallback is None else id(fallback), table.ctypes.data])
    keep_for_ever(table)
    return built_in(_compiled(call_sums if summed else call, _SIGNATURE), own)


@functools.cache  # all operations share them
@shielded
def _compiled(template: Function, signature: Any) -> Any:
    return compile_and_keep(template, signature)
