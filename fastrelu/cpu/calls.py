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

import numpy as np
from numba import types

from fastrelu.cpu import build, loops, objects, sums, threads
from fastrelu.cpu.abi import ANY_ORDER, DATA, FLAGS, SHAPE, STRIDES, TYPE
from fastrelu.cpu.jit import array_at, calling, inlined, pointer_to
from fastrelu.cpu.loops import floats, words
from fastrelu.cpu.objects import (
    bits_of,
    decref,
    dtype_of,
    empty_bytes,
    failed,
    incref,
    integer_of,
    is_c_order,
    is_like,
    is_plain,
    is_pool_ready,
    is_writeable,
    ndim_of,
    none,
    number_of,
    one_of,
    overlap,
    pair_of,
    reference_to,
    release_gil,
    size_of,
    take_gil,
    with_mask,
)
from fastrelu.cpu.pool import SMALLEST
from fastrelu.cpu.vector import buffer
from fastrelu.cpu.walk import (
    FLAT,
    LOOK_SIGNATURE,
    ORDERED,
    SIMPLE,
    VIEW_SIGNATURE,
    axes_buffer,
)

# Words of what a built-in function is given: who takes what it leaves, and the table.
FALLBACK, TABLE = range(2)

# Words of a table, behind those that `objects` knows.
CACHE, MISSING, KNOWN, LOOK, WALK, PREDICATE, COUNT, KINDS = range(
    objects.LENGTH, objects.LENGTH + 8
)  # COUNT: of the operands, whose kinds follow
MOST_OPERANDS = 4
ROWS = KINDS + MOST_OPERANDS
# A row is what is known of one dtype, which comes first; its loops are 0 until needed.
ITEM, WEIGHT, WIDEN, ROUND, SINGLE, LOOP = range(1, 7)
PLAIN, PAST_CACHE, IN_PLACE = range(len(build.TARGETS))  # added to LOOP, as is
# the place of a body: of one for bits, for columns, and for elements of any weight.
WITH_BITS = COLUMNS = len(build.TARGETS)
EACH = APART = 2 * len(build.TARGETS)  # APART: sums' loops for rows, and columns
ROW = LOOP + 3 * len(build.TARGETS)

# Kinds of operands, and what may be missing besides a loop.
AN_ARRAY, SAVED, SOME_BITS, A_WEIGHT, AN_AXIS, A_NUMBER, NO_MASK, MAKE_MASK = range(8)
A_DTYPE, THREADS, A_POOL, LAYOUTS = -1, -2, -3, -4

NO_AXIS = -(1 << 63)
BEYOND_SINGLE = 2.0**128 - 2.0**103  # rounded to float32, an infinity

singles = pointer_to(types.CPointer(types.float32))
_MOST_AXES = 64  # of NumPy's arrays
_strides = buffer(_MOST_AXES, types.int64)
_layout = buffer((2 + loops.MOST_ARRAYS) * _MOST_AXES, types.int64)
_call_loop, _call_look = calling(loops.SIGNATURE), calling(LOOK_SIGNATURE)
_call_sums, _call_view = calling(sums.SIGNATURE), calling(VIEW_SIGNATURE)
_call_weights = calling(sums.WEIGHTS_SIGNATURE)
_address = types.int64
_malloc = types.ExternalFunction("PyMem_RawMalloc", _address(types.intp))
_free = types.ExternalFunction("PyMem_RawFree", types.void(_address))
vectorcall = types.ExternalFunction(
    "PyObject_Vectorcall", _address(_address, _address, types.intp, _address)
)


# Questions ----------------------------------------------------------------------------


@inlined
def _row(table, x):
    """Return where the row of an array's dtype starts, or 0."""
    dtype = dtype_of(x)
    for row in range(ROWS, ROWS + table[KNOWN] * ROW, ROW):
        if table[row] == dtype:
            return row
    return 0


@inlined
def _first_byte(w, start, strides):
    """Return the address of the first byte of an array that is not empty."""
    for axis in range(w[loops.NDIM]):
        step = words(strides)[axis]
        if step < 0:
            start += step * (words(w[loops.SHAPE])[axis] - 1)
    return start


@inlined
def _reach(w, strides, itemsize):
    """Return how many bytes there are from the first to the last one of an array."""
    reach = itemsize
    for axis in range(w[loops.NDIM]):
        step = words(strides)[axis] * (words(w[loops.SHAPE])[axis] - 1)
        reach += step if step > 0 else -step
    return reach


@inlined
def _have_same(w, strides, other):
    """Say whether two arrays of one shape have the same strides, as far as they matter."""
    for axis in range(w[loops.NDIM]):
        steps, length = words(strides)[axis], words(w[loops.SHAPE])[axis]
        if length > 1 and steps != words(other)[axis]:
            return False
    return True


@inlined
def _target(table, x, inplace, out):
    """Return the array to write to, 0 for a fresh one, or -1 to leave it to Python."""
    if out != table[objects.NONE]:
        if inplace != table[objects.FALSE] or not is_plain(table, out):
            return -1
        if not is_like(out, x) or not is_writeable(out):
            return -1
        return out
    if inplace == table[objects.TRUE]:
        return x if is_writeable(x) else -1
    return 0 if inplace == table[objects.FALSE] else -1


def target_of(cache: int, moved: int, in_place: bool) -> int:
    """Return where to write so many bytes, as a place in `build.TARGETS`."""
    if in_place:
        return IN_PLACE
    return PAST_CACHE if moved > cache else PLAIN


def suits_columns(many: int, size: int, channels: int, inner: int) -> int:
    """Return 1 if columns suit weights better than rows, else 0.

    Each row starts a loop over it, which costs something, and so does each column, whose
    weight is laid out or whose products are summed apart: that pays if there are many
    rows of each weight.
    """
    short = loops.SHORT if size >= many * channels * inner else loops.NARROW
    return channels > 1 and inner < short


_target_of, _suits_columns = inlined(target_of), inlined(suits_columns)


# Weights ------------------------------------------------------------------------------


@inlined
def _fits(table, row, weight):
    """Say whether a weight has the type of the products, or that of half floats."""
    dtype = dtype_of(weight)
    return dtype == table[row] or dtype == table[row + WEIGHT]


@inlined
def _weight_size(table, row, weight):
    """Return how many bytes each element of a weight has that fits."""
    return table[row + ITEM] if dtype_of(weight) == table[row] else 4


@inlined
def _widen(table, row, weight, channels):
    """Return the address of a copy in the type of the products, 0 if none is needed.

    -1 says that there is no memory for it.
    """
    if dtype_of(weight) == table[row + WEIGHT]:
        return 0
    wide = _malloc(channels * 4)
    if wide == 0:
        return -1
    _call_weights(table[row + WIDEN], (words(weight)[DATA], wide, channels))
    return wide


@inlined
def _channels(table, row, x, weight, axis, size, w, strides):
    """Find out which weight goes with which element; return 0 to leave it to Python.

    1 says that for a flat x the weights go with (outer, channel, inner), whose sizes are
    among the words then; 2, that they only have strides, which are there for both.
    """
    if not is_plain(table, weight) or not is_c_order(weight):
        return 0
    place = integer_of(table, axis, NO_AXIS)
    if not _fits(table, row, weight) or place == NO_AXIS:
        return 0
    ndim, more, channels = ndim_of(x), ndim_of(weight), size_of(weight)
    shape, lengths = words(words(x)[SHAPE]), words(words(weight)[SHAPE])
    steps, itemsize = words(words(x)[STRIDES]), table[row + ITEM]
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
def _leave(own, table, arguments, number):
    """Have Python answer the call, or return None where nobody is there to do it."""
    if own[FALLBACK] == 0:
        return none(table)
    return vectorcall(own[FALLBACK], arguments, number, 0)


@inlined
def _may_make(table, result, nbytes):
    """Say whether a fresh array of so many bytes can be made, or none is needed."""
    if result == 0 and nbytes >= SMALLEST and not is_pool_ready(table):
        table[MISSING] = A_POOL
        return False
    return True


@inlined
def _loop(table, place, moved):
    """Return the address of a loop; 0 where there is none, or something is missing."""
    if place == 0:
        return 0
    if moved >= 2 * threads.SHARE and not threads.is_ready():
        table[MISSING] = THREADS
        return 0
    if table[place] == 0:
        table[MISSING] = place
    return table[place]


# From operands to a loop --------------------------------------------------------------

# Words of ours behind those of a loop: the orders in which all arrays lie flat by their
# flags, how weights go with elements, a weight or bits as an object, the place of the
# body, and how many bytes the bits of a mask have that is to be made, or -1.
_ORDER, _VIEW, _OBJECT, _BODY, _NEW_BITS = range(loops.LENGTH, loops.LENGTH + 5)
_operands = buffer(loops.LENGTH + 5, types.int64)


@inlined
def _take(table, row, given, w, strides):
    """Write what is known of the operands; say whether all of them are taken."""
    x = given[0]
    w[loops.SIZE] = size = size_of(x)
    w[loops.NDIM], w[loops.SHAPE] = ndim_of(x), words(x)[SHAPE]
    w[loops.ARRAYS], w[loops.STRIDES] = words(x)[DATA], words(x)[STRIDES]
    w[loops.BESIDE] = w[loops.BESIDE_STRIDES] = w[loops.LOOP] = 0
    w[loops.CHANNELS] = w[loops.INNER] = 0
    w[loops.ITEMSIZE] = table[row + ITEM]
    w[loops.WEIGHT_SIZE] = 8 if table[row + SINGLE] == 0 else 4
    w[_ORDER], w[_VIEW], w[_OBJECT] = words(x)[FLAGS] & ANY_ORDER, 1, 0
    w[_BODY], w[_NEW_BITS] = 0, -1
    arrays, numbers, address = 1, 0, w.ctypes.data
    bound = BEYOND_SINGLE if table[row + SINGLE] != 0 else np.inf
    for k in range(arrays, loops.MOST_ARRAYS):
        w[loops.STRIDES + k] = 0
    for k in range(table[COUNT]):
        kind, value = table[KINDS + k], given[3 + k]
        if kind == SAVED:
            kind = AN_ARRAY
            if words(value)[TYPE] == table[objects.MASK]:
                value = bits_of(table, table[PREDICATE], value, x, strides)
                if value == 0:
                    return False
                kind, w[_BODY] = SOME_BITS, WITH_BITS
        if kind == AN_ARRAY:
            if not is_plain(table, value) or not is_like(value, x):
                return False
            w[loops.ARRAYS + arrays] = words(value)[DATA]
            w[loops.STRIDES + arrays] = words(value)[STRIDES]
            w[_ORDER] &= words(value)[FLAGS]
            arrays += 1
        elif kind == SOME_BITS:
            if not is_plain(table, value) or not is_c_order(value):
                return False
            if dtype_of(value) != table[objects.BYTE] or ndim_of(value) != 1:
                return False
            if size_of(value) != (size + 7) >> 3:
                return False
            w[loops.BESIDE], w[_OBJECT] = words(value)[DATA], value
        elif kind == A_WEIGHT:
            view = _channels(table, row, x, value, given[4 + k], size, w, strides)
            if view == 0:
                return False
            w[loops.BESIDE], w[_OBJECT], w[_VIEW] = words(value)[DATA], value, view
        elif kind == A_NUMBER:
            number = number_of(table, value, bound)
            if np.isnan(number):
                return False
            floats(address)[loops.NUMBERS + numbers] = number
            numbers += 1
        elif kind == MAKE_MASK and value == table[objects.TRUE]:
            w[_BODY], w[_NEW_BITS] = WITH_BITS, (size + 7) >> 3
        elif kind != AN_AXIS and value != table[objects.FALSE]:
            return False
    w[loops.COUNT] = arrays
    w[loops.MOVED] = (arrays + 1) * size * table[row + ITEM]
    return True


@inlined
def _plan(table, row, y, fresh, many, w, strides):
    """Write how y lies, and return the place of the loop to run, or 0 to leave it.

    The word LOOP says whether the loop is for lines.
    """
    itemsize, arrays = table[row + ITEM], w[loops.COUNT]
    nbytes, start = w[loops.SIZE] * itemsize, w[loops.ARRAYS]
    w[loops.Y], w[loops.Y_STRIDES] = words(y)[DATA], words(y)[STRIDES]
    flat, target = w[_ORDER] & words(y)[FLAGS] & ANY_ORDER != 0, w[loops.Y]
    in_order = True
    low, reach = target, nbytes
    if table[WALK] == 0 and (not flat or w[_VIEW] == 2):
        table[MISSING] = LAYOUTS
        return 0
    if not flat:
        found = _call_look(table[LOOK], (w.ctypes.data,))
        flat, in_order = found & FLAT != 0, found & ORDERED != 0
        if not fresh and found & SIMPLE == 0:
            return 0
        low = _first_byte(w, target, w[loops.Y_STRIDES])
        reach = _reach(w, w[loops.Y_STRIDES], itemsize)
    for k in range(0 if fresh else arrays):
        other, steps = w[loops.ARRAYS + k], w[loops.STRIDES + k]
        if flat:
            if other != target and overlap(other, nbytes, target, nbytes):
                return 0
        elif other != target or not _have_same(w, steps, w[loops.Y_STRIDES]):
            first = _first_byte(w, other, steps)
            if overlap(first, _reach(w, steps, itemsize), low, reach):
                return 0
    beside, weighted = w[_OBJECT], w[loops.CHANNELS] != 0
    if beside != 0:
        length = size_of(beside)
        if weighted:
            length *= _weight_size(table, row, beside)
        elif w[_NEW_BITS] < 0 and not in_order:  # those of a mask lie as x does
            return 0
        if overlap(low, reach, w[loops.BESIDE], length):
            return 0
    in_place = target == start and not fresh
    body = w[_BODY]
    if not flat or w[_VIEW] == 2:
        w[loops.LOOP] = 1
        body = EACH if weighted else body
        w[loops.BESIDE_STRIDES] = strides.ctypes.data if weighted else 0
        return row + LOOP + body + (IN_PLACE if in_place else PLAIN)
    if weighted:
        channels = w[loops.CHANNELS]
        body = COLUMNS * _suits_columns(many, w[loops.SIZE], channels, w[loops.INNER])
    target = _target_of(table[CACHE], w[loops.MOVED], in_place)
    return row + LOOP + body + target


@inlined
def _keep_layout(w, kept):
    """Copy shape and strides, which others may change while the loop runs."""
    start = kept.ctypes.data
    for place in range(loops.SHAPE, loops.BESIDE_STRIDES):
        if w[place] != 0:
            for axis in range(w[loops.NDIM]):
                words(start)[axis] = words(w[place])[axis]
            w[place] = start
        start += 8 * _MOST_AXES


# Answers ------------------------------------------------------------------------------


def call(self, arguments, number):
    """Take (x, inplace, out, operands...) and return the result."""
    own = words(words(self)[DATA])
    table, given = words(own[TABLE]), words(arguments)
    like = array_at(arguments, 1, np.int64)
    w, strides, layout = _operands(like), _strides(like), _layout(like)
    x, row, result = given[0], 0, -1
    table[MISSING] = 0
    if is_plain(table, x):
        row = _row(table, x)
        if row == 0:
            table[MISSING] = A_DTYPE
        elif _take(table, row, given, w, strides):
            result = _target(table, x, given[1], given[2])
    if result == -1:
        return _leave(own, table, arguments, number)
    nbytes = w[loops.SIZE] * table[row + ITEM]
    if not _may_make(table, result, nbytes) or not _may_make(table, 0, w[_NEW_BITS]):
        return _leave(own, table, arguments, number)
    y, bits = reference_to(table, x, result, nbytes), 0
    if y != 0 and w[_NEW_BITS] >= 0:
        bits = empty_bytes(table, w.ctypes.data + 8 * _NEW_BITS)
        if bits == 0:
            decref(y)
            y = 0
        else:
            w[loops.BESIDE], w[_OBJECT] = words(bits)[DATA], bits
    if y == 0:
        return 0
    loop = wide = 0
    if nbytes != 0:
        place = _plan(table, row, y, result == 0, loops.MANY, w, strides)
        loop = _loop(table, place, w[loops.MOVED])
        if w[loops.LOOP] != 0:
            _keep_layout(w, layout)
        if loop != 0 and w[loops.CHANNELS] != 0:
            wide = _widen(table, row, w[_OBJECT], w[loops.CHANNELS])
        if loop == 0 or wide == -1:
            decref(bits)
            decref(y)
            return _leave(own, table, arguments, number)
    beside = w[_OBJECT]
    incref(beside)  # which others may take out of a mask while the loop runs
    if bits != 0:
        y = with_mask(table, table[PREDICATE], y, bits, strides)
    if y != 0 and loop != 0:
        if wide != 0:
            w[loops.BESIDE] = wide
        if w[loops.LOOP] != 0:
            w[loops.LOOP], loop = loop, table[WALK]
        thread = release_gil(w[loops.MOVED])
        _call_loop(loop, (w.ctypes.data,))
        take_gil(thread)
    decref(beside)
    _free(wide)
    return y


@inlined
def _round(table, row, total, result, channels, half):
    """Round sums to the weight's type."""
    if half:
        _call_weights(table[row + ROUND], (total, result, channels))
        return
    for channel in range(channels):
        lost = floats(total)[channels + channel]
        value = sums.total_of(floats(total)[channel], lost)
        if table[row + ITEM] == 8:
            floats(result)[channel] = value
        else:
            singles(result)[channel] = value


@inlined
def _plan_apart(table, row, w, axes):
    """Return the place of the loop for sums of elements that lie apart, or 0."""
    if _call_view(table[WALK], (w.ctypes.data, axes.ctypes.data)) == 0:
        return 0
    many, channels, inner = loops.MANY_SUMMED, w[loops.CHANNELS], w[loops.INNER]
    return row + LOOP + APART + _suits_columns(many, w[loops.SIZE], channels, inner)


def call_sums(self, arguments, number):
    """Take (grad_output, inplace, out, x, weight, axis) and return both gradients."""
    own = words(words(self)[DATA])
    table, given = words(own[TABLE]), words(arguments)
    like = array_at(arguments, 1, np.int64)
    w, strides = _operands(like), _strides(like)
    grad, weight, row, result, total = given[0], given[4], 0, -1, -1
    first, second = one_of(table, given[2], 0), one_of(table, given[2], 1)
    table[MISSING] = 0
    if is_plain(table, grad) and first != 0:
        row = _row(table, grad)
        if row == 0:
            table[MISSING] = A_DTYPE
        elif _take(table, row, given, w, strides) and w[loops.SIZE] != 0:
            result = _target(table, grad, given[1], first)
            total = _target(table, weight, table[objects.FALSE], second)
    if result == -1 or total == -1 or (total != 0 and not is_c_order(total)):
        return _leave(own, table, arguments, number)
    nbytes, channels = w[loops.SIZE] * table[row + ITEM], w[loops.CHANNELS]
    length = channels * _weight_size(table, row, weight)
    if not _may_make(table, result, nbytes) or not _may_make(table, total, length):
        return _leave(own, table, arguments, number)
    # Each only if there is no MemoryError on its way already.
    y = reference_to(table, grad, result, nbytes)
    dw = reference_to(table, weight, total, length) if y != 0 else 0
    place = loop = memory = wide = apart = 0
    axes = axes_buffer(like)
    if dw != 0:
        place = _plan(table, row, y, result == 0, loops.MANY_SUMMED, w, strides)
        target, into, slopes = w[loops.Y], words(dw)[DATA], w[loops.BESIDE]
        reach = nbytes
        if place != 0 and w[loops.LOOP] != 0:
            place, apart = _plan_apart(table, row, w, axes), axes.ctypes.data
            target = _first_byte(w, target, w[loops.Y_STRIDES])
            reach = _reach(w, w[loops.Y_STRIDES], table[row + ITEM])
        if overlap(target, reach, into, length):
            place = 0
        if into != slopes and overlap(slopes, length, into, length):
            place = 0
        loop = _loop(table, place, w[loops.MOVED])
    if loop != 0:
        wide = _widen(table, row, weight, channels)
        memory = _malloc(2 * channels * 8) if wide != -1 else 0
    pair, is_done = 0, False
    if memory != 0:
        # Whole before the GIL is released: other threads find every tuple there is.
        pair = pair_of(y, dw)
        if pair == 0:
            y = dw = 0
    if pair != 0:
        start, saved = w[loops.ARRAYS], w[loops.ARRAYS + 1]
        target, into, slopes = w[loops.Y], words(dw)[DATA], w[loops.BESIDE]
        if wide != 0:
            slopes = wide
        size, inner, moved = w[loops.SIZE], w[loops.INNER], w[loops.MOVED]
        arrays = start, saved, slopes, target, memory, apart
        operands = *arrays, size, channels, inner, moved
        thread = release_gil(moved)
        is_done = _call_sums(loop, operands) == 0
        take_gil(thread)
        if is_done:
            _round(table, row, memory, into, channels, wide != 0)
    _free(memory)
    if wide != -1:
        _free(wide)
    if is_done:
        return pair
    if pair != 0:
        decref(pair)
    else:
        decref(y)
        decref(dw)
    if failed() != 0:
        return 0
    return _leave(own, table, arguments, number)
