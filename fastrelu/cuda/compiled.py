"""Quick calls for arrays on a GPU: from the arguments to the launch in compiled code.

A driver queues a kernel in two or three microseconds, and Python takes longer than that
to ask the arrays what they are.  Here compiled code asks them, through Python's own
interface for C: how a library lays out its objects it need not know.  It takes arrays in
C order that start with a whole vector, and launches kernels that `calls` has launched
before.  All else it leaves to `calls`, and to the checks behind those.

As on the CPU, a call is a built-in function with a *table*, and the same kinds of
operands follow (x or grad_output, inplace, out).
"""

import numpy as np
from numba import types

from fastrelu.cpu import objects
from fastrelu.cpu.abi import (
    DATA,
    MASK_AXES,
    MASK_BITS,
    MASK_PREDICATE,
    MASK_SHAPE,
    TYPE,
)
from fastrelu.cpu.calls import (
    A_NUMBER,
    A_WEIGHT,
    AN_ARRAY,
    AN_AXIS,
    BEYOND_SINGLE,
    FALLBACK,
    MAKE_MASK,
    MOST_OPERANDS,
    NO_AXIS,
    SAVED,
    TABLE,
    singles,
    vectorcall,
)
from fastrelu.cpu.jit import (
    array_at,
    calling,
    inlined,
)
from fastrelu.cpu.loops import floats, words
from fastrelu.cpu.objects import (
    as_integer,
    decref,
    failed,
    from_integer,
    incref,
    integer_of,
    new_mask,
    none,
    number_of,
    overlap,
    pair_of,
    restore_thread,
    save_thread,
    tuple_item,
    tuple_size,
)
from fastrelu.cpu.vector import buffer
from fastrelu.cuda.config import BYTES, THREADS
from fastrelu.cuda.work import (
    INT32,
    LAYOUTS,
    PLAIN,
    WITH_BITS,
    blocks_of,
    layout_of,
)

# Words of a table, behind those that `objects` knows: objects and functions,
LAUNCH, CURRENT, PREDICATE, MODEL, UINT8, STREAM, HANDLE, MAKE, LIKE, EMPTY_BYTES = (
    range(objects.LENGTH, objects.LENGTH + 10)
)
# how many rows, operands and facts there are, and the operands' kinds,
KNOWN, COUNT, FACTS, KINDS = range(EMPTY_BYTES + 1, EMPTY_BYTES + 5)
# questions, each of them a name and whether it is a method's,
OWNER, START, DEVICE, DTYPE, SHAPE, SIZE, FACT = range(
    KINDS + MOST_OPERANDS, KINDS + MOST_OPERANDS + 14, 2
)
# facts, which are questions with the answer of a plain array,
MOST_FACTS = 5
# and rows: what is known of two dtypes, x's and a weight's, on one device.
ROWS = FACT + 3 * MOST_FACTS
OF_X, OF_WEIGHT, ON, CONTEXT, NUMBER, ITEM, WEIGHT_ITEM, SINGLE, KERNEL = range(9)
ROW = KERNEL + len(LAYOUTS)  # or one with bits, and one without

# Words of a call: where x, what lies beside it and the result are, each in three words,
_X, _BESIDE, _Y = 0, 3, 6
_ON, _OF = 1, 2  # the device and the dtype, behind the address
# what is known of them, arguments for Python's functions, and those of the kernel.
_SHAPE, _ELEMENTS, _BYTES, _BESIDE_BYTES, _CHANNELS, _INNER, _BITS = range(9, 16)
_PLACE, _MAKES_BITS, _FIRST, _SECOND, _ARGUMENTS = range(16, 21)
_POINTERS = _ARGUMENTS + 12
SPACE = _POINTERS + 12
_space = buffer(SPACE, types.int64)

_address = types.int64
_layout_of, _blocks_of = inlined(layout_of), inlined(blocks_of)
_call_current = calling(types.intc(_address))
_call_launch = calling(
    types.intc(_address, *(7 * [types.uint32]), _address, _address, _address)
)
_attribute = types.ExternalFunction("PyObject_GetAttr", _address(_address, _address))
_method = types.ExternalFunction(
    "PyObject_VectorcallMethod", _address(_address, _address, types.intp, _address)
)
_tuple = types.ExternalFunction("PySequence_Tuple", _address(_address))


# Questions ----------------------------------------------------------------------------


@inlined
def _ask(table, question, value, w):
    """Return an attribute, or what a method returns, as a new reference, or 0."""
    if table[question + 1] == 0:
        return _attribute(value, table[question])
    w[_FIRST] = value
    return _method(table[question], w.ctypes.data + 8 * _FIRST, 1, 0)


@inlined
def _integer(value):
    """Return an integer whose reference is given away, or -1."""
    if value == 0:
        return -1
    number = as_integer(value)
    decref(value)
    return number


@inlined
def _look(table, value, w, place):
    """Write where an array is, and of which dtype; say whether it is plain."""
    if words(value)[TYPE] != table[MODEL]:
        return False
    for k in range(table[FACTS]):
        fact = FACT + 3 * k
        answer = _ask(table, fact, value, w)
        decref(answer)  # the one that is looked for lives on
        if answer != table[fact + 2]:
            return False
    owner = value
    if table[OWNER] != 0:
        owner = _ask(table, OWNER, value, w)
    else:
        incref(owner)
    if owner == 0:
        return False
    w[place] = _integer(_ask(table, START, owner, w))
    w[place + _ON] = _integer(_ask(table, DEVICE, owner, w)) if w[place] >= 0 else -1
    decref(owner)
    if w[place + _ON] < 0:
        return False
    w[place + _OF] = _ask(table, DTYPE, value, w)
    decref(w[place + _OF])  # what equals one of a row lives on
    return w[place + _OF] != 0


@inlined
def _shape_of_x(table, x, w):
    """Return x's shape, or 0; it is asked for once."""
    if w[_SHAPE] == 0:
        w[_SHAPE] = _ask(table, SHAPE, x, w)
    return w[_SHAPE]


@inlined
def _item(table, shape, axis):
    return integer_of(table, tuple_item(shape, axis), -1)


@inlined
def _have_same_items(table, shape, other):
    """Say whether two tuples hold the same integers."""
    ndim = tuple_size(shape)
    if tuple_size(other) != ndim:
        return False
    for axis in range(ndim):
        if _item(table, shape, axis) != _item(table, other, axis):
            return False
    return True


@inlined
def _is_beside_x(table, value, w, place):
    """Say whether an array is plain and on x's device; write where it is."""
    return _look(table, value, w, place) and w[place + _ON] == w[_X + _ON]


@inlined
def _is_like_x(table, value, x, w, place):
    """Say the same, and whether it has x's dtype and shape."""
    if not _is_beside_x(table, value, w, place) or w[place + _OF] != w[_X + _OF]:
        return False
    shape = _ask(table, SHAPE, value, w) if _shape_of_x(table, x, w) != 0 else 0
    if shape == 0:
        return False
    same = _have_same_items(table, w[_SHAPE], shape)
    decref(shape)
    return same


@inlined
def _take_bits(table, mask, x, w):
    """Say whether a mask is one of an array like x; write where its bits are.

    Each attribute may have been replaced or deleted since it was made.
    """
    shape, bits = words(mask)[MASK_SHAPE], words(mask)[MASK_BITS]
    if words(mask)[MASK_PREDICATE] != table[PREDICATE] or bits == 0:
        return False
    if words(mask)[MASK_AXES] != table[objects.NONE]:
        return False
    if shape == 0 or words(shape)[TYPE] != table[objects.TUPLE]:
        return False
    if _shape_of_x(table, x, w) == 0 or not _have_same_items(table, w[_SHAPE], shape):
        return False
    incref(bits)  # which others may take out of the mask
    w[_BITS] = bits
    if not _is_beside_x(table, bits, w, _BESIDE) or w[_BESIDE + _OF] != table[UINT8]:
        return False
    lengths = _ask(table, SHAPE, bits, w)
    if lengths == 0:
        return False
    w[_BESIDE_BYTES] = _item(table, lengths, 0) if tuple_size(lengths) == 1 else -1
    decref(lengths)
    return w[_BESIDE_BYTES] == (w[_ELEMENTS] + 7) >> 3


@inlined
def _take_weight(table, value, given_axis, x, w):
    """Say whether a weight has one element for each channel; write what is known."""
    axis = integer_of(table, given_axis, NO_AXIS)
    if not _is_beside_x(table, value, w, _BESIDE) or _shape_of_x(table, x, w) == 0:
        return False
    lengths = _ask(table, SHAPE, value, w)
    if lengths == 0:
        return False
    ndim, more, channels = tuple_size(w[_SHAPE]), tuple_size(lengths), 1
    if more == 1:
        channels = _item(table, lengths, 0)
    decref(lengths)
    inside, inner = -ndim <= axis < ndim, w[_ELEMENTS]
    if more > 1 or w[_ELEMENTS] >= INT32:
        return False
    if channels == 1:
        if not inside and axis != 1:  # the default may not matter
            return False
    else:
        axis += ndim if axis < 0 else 0
        if not inside or channels != _item(table, w[_SHAPE], axis):
            return False
        inner = 1
        for k in range(axis + 1, ndim):
            inner *= _item(table, w[_SHAPE], k)
    w[_CHANNELS], w[_INNER] = channels, inner
    return True


# From operands to a kernel ------------------------------------------------------------


@inlined
def _take(table, given, w):
    """Write what is known of x and the operands; say whether all of them are taken.

    Numbers are looked at when they are written for the kernel.
    """
    x = given[0]
    if not _look(table, x, w, _X):
        return False
    w[_ELEMENTS] = _integer(_ask(table, SIZE, x, w))
    for k in range(table[COUNT] if w[_ELEMENTS] > 0 else 0):
        kind, value = table[KINDS + k], given[3 + k]
        if kind == SAVED and words(value)[TYPE] == table[objects.MASK]:
            if not _take_bits(table, value, x, w):
                return False
            w[_PLACE] = WITH_BITS
        elif kind == SAVED or kind == AN_ARRAY:
            if not _is_like_x(table, value, x, w, _BESIDE):
                return False
        elif kind == A_WEIGHT:
            if not _take_weight(table, value, given[4 + k], x, w):
                return False
        elif kind == MAKE_MASK and value == table[objects.TRUE]:
            w[_PLACE], w[_MAKES_BITS] = WITH_BITS, 1
            w[_BESIDE_BYTES] = (w[_ELEMENTS] + 7) >> 3
        elif kind != A_NUMBER and kind != AN_AXIS and value != table[objects.FALSE]:
            return False
    return w[_ELEMENTS] > 0


@inlined
def _row(table, w):
    """Return where the row for the dtypes on the device starts, or 0."""
    weight = w[_BESIDE + _OF] if w[_CHANNELS] != 0 else 0
    for row in range(ROWS, ROWS + table[KNOWN] * ROW, ROW):
        is_of_x = table[row + OF_X] == w[_X + _OF] and table[row + ON] == w[_X + _ON]
        if is_of_x and table[row + OF_WEIGHT] == weight:
            return row
    return 0


@inlined
def _kernel(table, row, w):
    """Return the kernel for the operands, or 0; write how many bytes there are."""
    itemsize, place = table[row + ITEM], w[_PLACE]
    w[_BYTES] = w[_ELEMENTS] * itemsize
    if w[_CHANNELS] != 0:
        w[_BESIDE_BYTES] = w[_CHANNELS] * table[row + WEIGHT_ITEM]
        alike = table[row + OF_X] == table[row + OF_WEIGHT]
        width = BYTES // itemsize
        place = _layout_of(w[_CHANNELS], w[_INNER], width, 0, alike)
    elif place == PLAIN:
        w[_BESIDE_BYTES] = w[_BYTES]
    return table[row + KERNEL + place] if place >= 0 else 0


@inlined
def _is_current(table, row, w):
    """Say whether the device is the current one of this thread."""
    if _call_current(table[CURRENT], (w.ctypes.data + 8 * _FIRST,)) != 0:
        return False
    return w[_FIRST] == table[row + CONTEXT]


@inlined
def _stream(table, row, w):
    """Return the handle of the current stream, or -1."""
    w[_FIRST] = table[row + NUMBER]
    stream = vectorcall(table[STREAM], w.ctypes.data + 8 * _FIRST, 1, 0)
    if table[HANDLE] != 0 and stream != 0:
        handle = _attribute(stream, table[HANDLE])
        decref(stream)
        stream = handle
    handle = _integer(stream)
    return 0 if handle == 1 else handle  # the legacy stream has both


# Memory -------------------------------------------------------------------------------


@inlined
def _target(table, given, w):
    """Return the array to write to, 0 for a fresh one, or -1 to leave it to Python."""
    x, inplace, out = given[0], given[1], given[2]
    if out != table[objects.NONE]:
        if inplace != table[objects.FALSE]:
            return -1
    elif inplace == table[objects.TRUE]:
        out = x
    else:
        return 0 if inplace == table[objects.FALSE] else -1
    if out != x:
        return out if _is_like_x(table, out, x, w, _Y) else -1
    w[_Y] = w[_X]
    return x


@inlined
def _fresh(table, x, w):
    """Return a new array like x, or 0, and write where it is."""
    number = 1
    if table[LIKE] != 0:
        w[_FIRST] = x
    else:
        number = 2 if _shape_of_x(table, x, w) != 0 else 0
        w[_FIRST], w[_SECOND] = w[_SHAPE], w[_X + _OF]
    y = vectorcall(table[MAKE], w.ctypes.data + 8 * _FIRST, number, 0) if number else 0
    if y != 0 and not _look(table, y, w, _Y):
        decref(y)
        return 0
    return y


@inlined
def _new_bits(table, x, w):
    """Return a new array for a mask's bits, or 0, and write where it is."""
    size = from_integer(w[_BESIDE_BYTES])
    w[_FIRST], w[_SECOND] = size, x
    bits = 0
    if size != 0:
        bits = vectorcall(table[EMPTY_BYTES], w.ctypes.data + 8 * _FIRST, 2, 0)
    decref(size)
    if bits != 0 and not _look(table, bits, w, _BESIDE):
        decref(bits)
        return 0
    return bits


@inlined
def _with_mask(table, x, y, w):
    """Return (y, mask) with bits that are still to be written, or 0; y is given away."""
    bits, shape = _new_bits(table, x, w), 0
    if bits != 0 and _shape_of_x(table, x, w) != 0:
        shape = _tuple(w[_SHAPE])
    mask = new_mask(table, table[PREDICATE], shape, none(table), bits)
    if mask == 0:
        decref(y)
        return 0
    return pair_of(y, mask)


# Launches -----------------------------------------------------------------------------


@inlined
def _lie_well(w):
    """Say whether arrays start with whole vectors, and none meets another in part."""
    start, target, beside = w[_X], w[_Y], w[_BESIDE]
    if (start | target) % BYTES != 0:
        return False
    if w[_PLACE] != WITH_BITS and beside % BYTES != 0:
        return False
    if start != target and overlap(start, w[_BYTES], target, w[_BYTES]):
        return False
    if w[_BESIDE] == 0 or (beside == target and w[_PLACE] == PLAIN):
        return w[_CHANNELS] == 0
    return not overlap(beside, w[_BESIDE_BYTES], target, w[_BYTES])


@inlined
def _put(w, count, value):
    """Write the next argument of a kernel, and return how many there are now."""
    w[_ARGUMENTS + count] = value
    return count + 1


@inlined
def _arguments(table, row, given, width, w):
    """Write a kernel's arguments and return their number; 0 leaves them to Python."""
    count = _put(w, 0, w[_X])
    if w[_BESIDE] != 0 and w[_MAKES_BITS] == 0:
        count = _put(w, count, w[_BESIDE])
    count = _put(w, count, w[_Y])
    # A head of no elements, or the bits: with these there is none.
    count = _put(w, count, w[_BESIDE] if w[_MAKES_BITS] != 0 else 0)
    count = _put(w, count, w[_ELEMENTS] // width)
    count = _put(w, count, w[_ELEMENTS])
    if w[_CHANNELS] != 0:
        count = _put(w, count, w[_INNER])
        count = _put(w, count, w[_CHANNELS])
    address, bound = w.ctypes.data, np.inf
    if table[row + SINGLE] != 0:
        bound = BEYOND_SINGLE
    for k in range(table[COUNT]):
        if table[KINDS + k] == A_NUMBER:
            number = number_of(table, given[3 + k], bound)
            if np.isnan(number):
                return 0
            if table[row + SINGLE] != 0:
                singles(address)[2 * (_ARGUMENTS + count)] = number
            else:
                floats(address)[_ARGUMENTS + count] = number
            count += 1
    return count


@inlined
def _launch(table, row, kernel, stream, given, w):
    """Queue a kernel; say whether the driver took it."""
    width = BYTES // table[row + ITEM]
    count = _arguments(table, row, given, width, w)
    if count == 0:
        return False
    for k in range(count):
        w[_POINTERS + k] = w.ctypes.data + 8 * (_ARGUMENTS + k)
    vectors = w[_ELEMENTS] // width
    blocks = _blocks_of(vectors, w[_MAKES_BITS])
    one, zero = np.uint32(1), np.uint32(0)
    grid = np.uint32(blocks), one, one, np.uint32(THREADS), one, one
    pointers = w.ctypes.data + 8 * _POINTERS
    thread = save_thread()  # for the driver waits where its queue is full
    result = _call_launch(table[LAUNCH], (kernel, *grid, zero, stream, pointers, 0))
    restore_thread(thread)
    return result == 0


@inlined
def _answer(table, given, w):
    """Return the result, 0 where an error is on its way, or -1 to leave it to Python."""
    x = given[0]
    row = _row(table, w) if _take(table, given, w) else 0
    kernel = _kernel(table, row, w) if row != 0 else 0
    if kernel == 0 or not _is_current(table, row, w):
        return -1
    stream = _stream(table, row, w)
    y = _target(table, given, w) if stream >= 0 else -1
    if y == 0:
        y = _fresh(table, x, w)
    elif y != -1:
        incref(y)
    if y == 0 or y == -1:
        return -1
    if w[_MAKES_BITS] != 0:
        y = _with_mask(table, x, y, w)
    if y != 0 and _lie_well(w) and _launch(table, row, kernel, stream, given, w):
        return y
    decref(y)
    return -1


def call(self, arguments, number):
    """Take (x, inplace, out, operands...) and return the result."""
    own = words(words(self)[DATA])
    table, given = words(own[TABLE]), words(arguments)
    answer = -1
    if words(given[0])[TYPE] == table[MODEL]:
        w = _space(array_at(arguments, 1, np.int64))
        w[_SHAPE] = w[_CHANNELS] = w[_BESIDE] = w[_BITS] = 0
        w[_PLACE] = w[_MAKES_BITS] = 0
        answer = _answer(table, given, w)
        decref(w[_SHAPE])
        decref(w[_BITS])
    if answer == -1 and failed() == 0:
        return vectorcall(own[FALLBACK], arguments, number, 0)
    return answer if answer != -1 else 0
