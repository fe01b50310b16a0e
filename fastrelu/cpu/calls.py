"""Quick calls: from the arguments to the loop without a line of Python.

At a thousand elements, asking an array what it is takes Python longer than the loop
takes, and at a hundred thousand still a third as long.  Here compiled code asks, and
reads the objects where they lie: the layout of NumPy's arrays is part of its C
interface.  What it cannot answer for plain arrays it leaves to Python, by returning
None: every check with its error message is there.

A call is a built-in function with a *table*, an array of words that holds what is known
once the process runs: the addresses of types, of C functions, and of compiled loops.
"""

import functools
from typing import Any

import numpy as np
from numba import types

from fastrelu.cpu import abi, loops, pool, threads
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
    TYPE,
    WRITEABLE,
)
from fastrelu.cpu.jit import (
    Function,
    built_in,
    calling,
    compile_and_keep,
    inlined,
    pointer_to,
    shielded,
)
from fastrelu.cpu.lanes import lane_of
from fastrelu.cpu.pool import SMALLEST

_BRIEF = 1 << 15  # bytes: releasing the GIL would take longer than the work

# Words of a table.  A row is what is known of one dtype; its loops are 0 until needed.
_NONE, _FALSE, _TRUE, _ARRAY, _FLOAT, _INT, _TUPLE, _BYTE, _EMPTY_LIKE = range(9)
_POOL, _BESIDE, _CACHE, _KNOWN, _ROWS = range(9, 14)
_ITEM, _WEIGHT, _WIDEN, _ROUND, _SINGLE, _LOOP = range(1, 7)  # the dtype comes first
_PLAIN, _PAST_CACHE, _IN_PLACE = range(len(loops.KINDS))  # added to _LOOP, as is
_COLUMNS = len(loops.KINDS)
_ROW = _LOOP + 2 * _COLUMNS
_MOST = 32  # rows: there are fewer dtypes
_BEYOND_SINGLE = 2.0**128 - 2.0**103  # rounded to float32, an infinity

_NOTHING, _SAVED, _BITS = range(3)  # what lies beside the first array

_words = pointer_to(types.CPointer(types.int64))
_floats = pointer_to(types.CPointer(types.float64))
_singles = pointer_to(types.CPointer(types.float32))
_call_loop = calling(loops.SIGNATURE)
_call_backward = calling(loops.BACKWARD_SIGNATURE)
_call_weights = calling(loops.WEIGHTS_SIGNATURE)
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


# Questions ----------------------------------------------------------------------------


@inlined
def _ndim(x):
    return _words(x)[NDIM] & 0xFFFFFFFF


@inlined
def _kind(x):
    return _words(_words(x)[DTYPE])[KIND]


@inlined
def _order(table, x):
    """Return the flags of the orders in which a plain array lies flat, if any."""
    if _words(x)[TYPE] != table[_ARRAY] or not _words(x)[FLAGS] & ALIGNED:
        return 0
    return _words(x)[FLAGS] & ANY_ORDER


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
def _meet(start, length, other, other_length):
    """Say whether two pieces of memory have a byte in common."""
    return start < other + other_length and other < start + length


@inlined
def _target(table, x, order, nbytes, inplace, out):
    """Return the array to write to, 0 for a fresh one, or -1 to leave it to Python."""
    if out != table[_NONE]:
        if inplace != table[_FALSE] or not _order(table, out) & order:
            return -1
        if not _is_like(out, x) or not _words(out)[FLAGS] & WRITEABLE:
            return -1
        start, target = _words(x)[DATA], _words(out)[DATA]
        return -1 if start != target and _meet(start, nbytes, target, nbytes) else out
    if inplace == table[_TRUE]:
        return x if _words(x)[FLAGS] & WRITEABLE else -1
    if inplace != table[_FALSE] or (nbytes >= SMALLEST and not _is_pool_ready(table)):
        return -1
    return 0


@inlined
def _is_pool_ready(table):
    return _words(table[_POOL])[pool.HANDLER] != 0


def kind_of_loop(cache: int, moved: int, in_place: bool) -> int:
    """Return the kind, a place in `loops.KINDS`, that suits so many bytes."""
    if in_place and moved > 0:  # of nothing, any two lie at one place
        return _IN_PLACE
    return _PAST_CACHE if moved > cache else _PLAIN


def block_of(many: int, size: int, channels: int, inner: int) -> int:
    """Return the block that suits rows of one weight: 0, or 1 for them as columns.

    Each row costs something, and so does each column, whose weight is laid out or whose
    products are summed apart: that pays if there are many rows of each weight.
    """
    short = loops.SHORT if size >= many * channels * inner else loops.NARROW
    return channels > 1 and inner < short


_kind_of_loop, _block_of = inlined(kind_of_loop), inlined(block_of)


@inlined
def _loop(table, row, block, moved, in_place):
    """Return the address of a loop, or 0 if Python must make something ready first."""
    if moved >= 2 * threads.SHARE and not threads.is_ready():
        return 0
    return table[row + _LOOP + block + _kind_of_loop(table[_CACHE], moved, in_place)]


@inlined
def _none(table):
    _incref(table[_NONE])
    return table[_NONE]


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
def _run(table, loop, x, other, result, size, channels, inner, slope, nbytes, moved):
    """Run a loop; return a new reference to its result, or 0."""
    start = _words(x)[DATA]
    result = _own(table, x, result, nbytes)
    if result == 0:
        return 0
    target = _words(result)[DATA]
    thread = _release_gil(moved)
    _call_loop(loop, (start, other, target, size, channels, inner, slope, moved))
    _take_gil(thread)
    return result


# Answers ------------------------------------------------------------------------------


def call_flat(self, arguments, number):
    """Take (a, slope, inplace, out), and b if there is something beside a."""
    table, given = _words(_words(self)[DATA]), _words(arguments)
    a, slope, inplace, out = given[0], given[1], given[2], given[3]
    order = _order(table, a)
    if order == 0 or _words(slope)[TYPE] != table[_FLOAT]:
        return _none(table)
    factor = _as_float(slope)
    row = _row(table, a)
    if row == 0:
        return _none(table)
    beyond = _BEYOND_SINGLE if table[row + _SINGLE] != 0 else np.inf
    if not abs(factor) < beyond:
        return _none(table)
    size = _size(a)
    nbytes = size * table[row + _ITEM]
    start = other = _words(a)[DATA]
    length, moved = 0, 2 * nbytes
    if table[_BESIDE] != _NOTHING:
        b = given[4]
        order &= _order(table, b)
        if table[_BESIDE] == _BITS:
            order &= C_ORDER
        if order == 0:
            return _none(table)
        other, length = _words(b)[DATA], nbytes
        if table[_BESIDE] == _SAVED:
            moved += nbytes
            if not _is_like(b, a):
                return _none(table)
        else:
            length = (size + 7) >> 3
            if _kind(b) != table[_BYTE] or _ndim(b) != 1 or _size(b) != length:
                return _none(table)
    result = _target(table, a, order, nbytes, inplace, out)
    if result == -1:
        return _none(table)
    target = _words(result)[DATA] if result != 0 else 0
    if target != other and _meet(target, nbytes, other, length):
        return _none(table)
    loop = _loop(table, row, 0, moved, target == start)
    if loop == 0:
        return _none(table)
    return _run(table, loop, a, other, result, size, 1, size, factor, nbytes, moved)


@inlined
def _inner(table, x, size, weight, channels, axis):
    """Return how many elements of x in a row have one weight, or 0 to leave it."""
    if _words(axis)[TYPE] != table[_INT] or _ndim(weight) != 1:
        return 0
    place = _as_integer(axis)
    if place == -1 and _failed() != 0:
        _forget()
        return 0
    ndim, inner = _ndim(x), size or 1
    if -ndim <= place < ndim:
        shape = _words(_words(x)[SHAPE])
        place += ndim if place < 0 else 0
        if channels != 1:
            if shape[place] != channels or size == 0:
                return 0
            inner = 1
            for later in range(place + 1, ndim):
                inner *= shape[later]
    elif channels != 1 or place != 1:  # the default, where it is of no matter
        return 0
    return inner


@inlined
def _fits(table, row, weight):
    """Say whether a weight has the type of the products, or that of half floats."""
    kind = _kind(weight)
    if kind == table[row]:
        return True
    return kind == table[row + _WEIGHT]


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
def _round(table, row, total, result, channels, half):
    """Round sums to the weight's type."""
    if half:
        _call_weights(table[row + _ROUND], (total, result, channels))
        return
    sums = _floats(total)
    for channel in range(channels):
        value = loops.total_of(sums[channel], sums[channels + channel])
        if table[row + _ITEM] == 8:
            _floats(result)[channel] = value
        else:
            _singles(result)[channel] = value


def call_channels(self, arguments, number):
    """Take (x, weight, inplace, out, axis); the weight is one-dimensional."""
    table, given = _words(_words(self)[DATA]), _words(arguments)
    x, weight, inplace, out, axis = given[0], given[1], given[2], given[3], given[4]
    if not _order(table, x) & _order(table, weight) & C_ORDER:
        return _none(table)
    row = _row(table, x)
    if row == 0 or not _fits(table, row, weight):
        return _none(table)
    size, channels = _size(x), _size(weight)
    inner = _inner(table, x, size, weight, channels, axis)
    if inner == 0:
        return _none(table)
    nbytes = size * table[row + _ITEM]
    length = channels * _weight_size(table, row, weight)
    moved = 2 * nbytes
    block = _COLUMNS * _block_of(loops.MANY, size, channels, inner)
    result = _target(table, x, C_ORDER, nbytes, inplace, out)
    if result == -1:
        return _none(table)
    start, other = _words(x)[DATA], _words(weight)[DATA]
    target = _words(result)[DATA] if result != 0 else 0
    if _meet(target, nbytes, other, length):
        return _none(table)
    loop = _loop(table, row, block, moved, target == start)
    if loop == 0:
        return _none(table)
    wide = _widen(table, row, weight, channels)
    if wide == -1:
        return _none(table)
    if wide != 0:
        other = wide
    y = _run(table, loop, x, other, result, size, channels, inner, 0.0, nbytes, moved)
    _free(wide)
    return y


def call_channels_backward(self, arguments, number):
    """Take (grad, weight, inplace, out, axis, x); return both gradients."""
    table, given = _words(_words(self)[DATA]), _words(arguments)
    grad, weight, inplace = given[0], given[1], given[2]
    out, axis, x = given[3], given[4], given[5]
    if not _order(table, grad) & _order(table, weight) & _order(table, x) & C_ORDER:
        return _none(table)
    row = _row(table, grad)
    if row == 0 or not _fits(table, row, weight) or not _is_like(x, grad):
        return _none(table)
    size, channels = _size(grad), _size(weight)
    inner = _inner(table, grad, size, weight, channels, axis)
    if inner == 0 or size == 0:
        return _none(table)
    first = second = table[_NONE]
    if out != table[_NONE]:
        if _words(out)[TYPE] == table[_ARRAY]:
            first = out
        elif _words(out)[TYPE] == table[_TUPLE] and _length(out) == 2:
            first, second = _item(out, 0), _item(out, 1)
        else:
            return _none(table)
    nbytes = size * table[row + _ITEM]
    length = channels * _weight_size(table, row, weight)
    result = _target(table, grad, C_ORDER, nbytes, inplace, first)
    total = _target(table, weight, C_ORDER, length, table[_FALSE], second)
    if result == -1 or total == -1:
        return _none(table)
    start, saved, slopes = _words(grad)[DATA], _words(x)[DATA], _words(weight)[DATA]
    target = _words(result)[DATA] if result != 0 else 0
    if target != saved and _meet(target, nbytes, saved, nbytes):
        return _none(table)
    if _meet(target, nbytes, slopes, length):
        return _none(table)
    if total != 0 and _meet(target, nbytes, _words(total)[DATA], length):
        return _none(table)
    moved = 3 * nbytes
    block = _COLUMNS * _block_of(loops.MANY_SUMMED, size, channels, inner)
    loop = _loop(table, row, block, moved, target == start)
    if loop == 0:
        return _none(table)

    wide = _widen(table, row, weight, channels)
    memory = _malloc(2 * channels * 8) if wide != -1 else 0
    if memory == 0:
        if wide != -1:
            _free(wide)
        return _none(table)
    if wide != 0:
        slopes = wide
    # Each only if there is no MemoryError on its way already.
    result = _own(table, grad, result, nbytes)
    total = _own(table, weight, total, length) if result != 0 else 0
    pair = _new_tuple(2) if total != 0 else 0
    failed = 1
    if pair != 0:
        # Whole before the GIL is released: other threads find every tuple there is.
        _set_item(pair, 0, result)
        _set_item(pair, 1, total)
        target, into = _words(result)[DATA], _words(total)[DATA]
        operands = start, saved, slopes, target, memory, size, channels, inner, moved
        thread = _release_gil(moved)
        failed = _call_backward(loop, operands)
        _take_gil(thread)
        if failed == 0:
            _round(table, row, memory, into, channels, wide != 0)
    _free(memory)
    _free(wide)
    if failed == 0:
        return pair
    if pair != 0:
        _decref(pair)
    else:
        for thing in (result, total):
            if thing != 0:
                _decref(thing)
    if _failed() != 0:
        return 0
    return _none(table)


# Building -----------------------------------------------------------------------------


def _kind_of(dtype: np.dtype[Any]) -> int:
    return abi.word(dtype, KIND)


_known = {
    _NONE: id(None),
    _FALSE: id(False),
    _TRUE: id(True),
    _ARRAY: id(np.ndarray),
    _FLOAT: id(float),
    _INT: id(int),
    _TUPLE: id(tuple),
    _BYTE: _kind_of(np.dtype(np.uint8)),
    _EMPTY_LIKE: abi.numpy_api(abi.NEW_LIKE_ARRAY),
    _POOL: pool.ADDRESS,
}
_SIGNATURE = _address(_address, _address, types.intp)


class Call:
    """The quick call of one formula, over one block or, for PReLU, over either of two.

    It is ``call(a, slope, inplace, out)``, with ``b`` at the end if the block has
    something beside `a`; or with a weight for the slope and an axis, and for both
    gradients x, at the end.  It returns the result, or None where it leaves the matter
    to Python.
    """

    __slots__ = ("blocks", "call", "formula", "rows", "streams", "sums", "table")

    def __init__(self, formula: Function, *blocks: Function) -> None:
        self.formula, self.blocks = formula, blocks
        self.sums = blocks[0] in loops.PARTS
        self.streams = 3 if self.sums or blocks[0] is loops.backward else 2  # arrays
        self.call: Any = _leave_it
        self.table = np.zeros(_ROWS + _MOST * _ROW, np.int64)
        self.rows: dict[int, int] = {}  # where the row of a kind of dtype starts

    def prepare(
        self, dtype: np.dtype[Any], nbytes: int, *, in_place: bool, block: int = 0
    ) -> None:
        """Make ready what a call needs for plain arrays of so many bytes."""
        row = self.rows.get(_kind_of(dtype)) or self._add(dtype)
        moved = self.streams * nbytes
        kind = kind_of_loop(self.table[_CACHE], moved, in_place)
        place = row + _LOOP + _COLUMNS * block + kind
        if not self.table[place]:
            loop = loops.compiled(
                self.blocks[block], self.formula, lane_of(dtype), loops.KINDS[kind]
            )
            self.table[place] = loop.address
        threads.ready(moved)
        if nbytes >= SMALLEST and not in_place:
            pool.ready()

    def block_of(self, x: np.ndarray, channels: int, inner: int) -> int:
        """Return the place in `blocks` of the one that suits an array like x."""
        many = loops.MANY_SUMMED if self.sums else loops.MANY
        return block_of(many, x.size, channels, inner)

    @shielded
    def _add(self, dtype: np.dtype[Any]) -> int:
        """Add the row of a dtype; with the first, make the call."""
        kind = _kind_of(dtype)
        if kind in self.rows:
            return self.rows[kind]
        table, row = self.table, _ROWS + _ROW * len(self.rows)
        lane = lane_of(dtype)
        table[row : row + _WIDEN] = kind, dtype.itemsize, _kind_of(lane.product)
        table[row + _SINGLE] = lane.product == np.float32
        if len(self.blocks) > 1 and lane.product != lane.storage:
            for word, template in _OF_HALVES.items():
                table[row + word] = loops.compiled_for(lane, template).address
        if not self.rows:
            for word, value in _known.items():
                table[word] = value
            table[_BESIDE] = _BESIDES.get(self.blocks[0], _NOTHING)
            table[_CACHE] = threads.CACHE
            template = call_channels if len(self.blocks) > 1 else call_flat
            if self.sums:
                template = call_channels_backward
            self.call = _compile(template, table)
        table[_KNOWN] = len(self.rows) + 1
        self.rows[kind] = row  # from here on nobody asks again
        return row


_BESIDES = {
    loops.backward: _SAVED,
    loops.forward_mask: _BITS,
    loops.backward_mask: _BITS,
}


_OF_HALVES = {_WIDEN: loops.widen_weights, _ROUND: loops.round_sums}


def _leave_it(*arguments: Any) -> None:
    """Stand in for a call that is not made yet."""


def _compile(template: Function, table: Any) -> Any:
    return built_in(_compiled(template), table)


@functools.cache  # all formulas share it
def _compiled(template: Function) -> Any:
    return compile_and_keep(template, _SIGNATURE)
