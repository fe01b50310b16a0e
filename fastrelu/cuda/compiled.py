"""Quick calls for arrays on a GPU: from the arguments to the launch in compiled code.

A driver queues a kernel in two or three microseconds, and Python takes longer than that
to ask the arrays what they are.  Here compiled code asks them, through Python's own
interface for C: how a library lays out its objects it need not know.  It takes arrays
that lie in one piece and start with a whole vector, and launches kernels that `calls` has
launched before.  All else it leaves to `calls`, and to the checks behind those.

As on the CPU, a call is a built-in function with a *table*, and the same kinds of
operands follow (x or grad_output, inplace, out).
"""

import numpy as np
from numba import types

from fastrelu.cpu import objects
from fastrelu.cpu.abi import (
    DATA,
    KIND,
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
from fastrelu.cpu.jit import array_at, calling, inlined
from fastrelu.cpu.loops import floats, words
from fastrelu.cpu.objects import (
    decref,
    failed,
    from_integer,
    incref,
    integer_of,
    new_mask,
    none,
    number_of,
    one_of,
    overlap,
    pair_of,
    restore_thread,
    save_thread,
    tuple_item,
    tuple_size,
)
from fastrelu.cpu.vector import buffer
from fastrelu.cuda.config import BYTES, THREADS
from fastrelu.cuda.work import INT32, PLAIN, WITH_BITS, blocks_of, layout_of

# Words of a table, behind those that `objects` knows: functions of the driver and objects,
LAUNCH, CURRENT, CAPTURING, MODEL, UINT8, PREDICATE, STREAM, HANDLE, REFUSED = range(
    objects.LENGTH, objects.LENGTH + 9
)
MAKE, EMPTY_LIKE, EMPTY_BYTES, WRITTEN = range(REFUSED + 1, REFUSED + 5)
# a module with an attribute and what that is where arrays are plain, and whether dtypes
# are NumPy's,
AROUND, LEVEL, OUTSIDE, NUMPY_DTYPES = range(WRITTEN + 1, WRITTEN + 5)
# how many rows, operands and facts there are, and the operands' kinds,
KNOWN, COUNT, FACTS, KINDS = range(NUMPY_DTYPES + 1, NUMPY_DTYPES + 5)
# questions, each of them a name and whether it is a method's,
OWNER, START, DEVICE, DTYPE, SHAPE, SIZE, CONTIGUOUS, STRIDES, UNIT, FACT = range(
    KINDS + MOST_OPERANDS, KINDS + MOST_OPERANDS + 20, 2
)
# facts, which are questions with the answer of a plain array,
MOST_FACTS = 5
# and rows: what is known of two dtypes, x's and a weight's, on one device.
ROWS = FACT + 3 * MOST_FACTS
OF_X, OF_WEIGHT, ON, CONTEXT, NUMBER, ITEM, WEIGHT_ITEM, SINGLE, KERNEL = range(9)
# A kernel for each layout of a weight follows, or one without and one with bits. Or, for
# both gradients of PReLU, how x is seen, the bytes of the sums' pairs, and two launches,
# each a kernel, its blocks and four sizes.
VIEW, PAIRS, FIRST, LAST = KERNEL, KERNEL + 3, KERNEL + 4, KERNEL + 10
SIZES = 4
ROW = LAST + 2 + SIZES
NO_INTEGER = -1

# Words of a call: where arrays are, each in four words: x, what lies beside it and the
# result, and for both gradients a weight, its gradient and the sums' pairs,
_X, _BESIDE, _Y, _WEIGHT, _TOTAL, _SUMS = range(0, 24, 4)
_ON, _OF, _IN_C = 1, 2, 3  # behind the address: device, dtype, whether in C order
# what is known of them, arguments for Python's functions, and those of the kernel.
_SHAPE, _STEPS, _UNIT, _ELEMENTS, _BYTES, _BESIDE_BYTES, _BITS = range(24, 31)
_CHANNELS, _INNER, _PLACE, _MAKES_BITS, _FIRST, _SECOND, _ARGUMENTS = range(31, 38)
_POINTERS = _ARGUMENTS + 12
SPACE = _POINTERS + 12
_space = buffer(SPACE, types.int64)

_address = types.int64
_layout_of, _blocks_of = inlined(layout_of), inlined(blocks_of)
_call_current = calling(types.intc(_address))
_call_capturing = calling(types.intc(_address, _address))
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
def _integer(table, value):
    """Return an int, whose reference is given away, or -1 for anything else."""
    if value == 0:
        return NO_INTEGER
    number = integer_of(table, value, NO_INTEGER)
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
    w[place] = _integer(table, _ask(table, START, owner, w))
    w[place + _ON] = (
        _integer(table, _ask(table, DEVICE, owner, w)) if w[place] > 0 else -1
    )
    decref(owner)
    if w[place + _ON] < 0:
        return False
    dtype = _ask(table, DTYPE, value, w)
    if dtype == 0:
        return False
    w[place + _OF] = words(dtype)[KIND] if table[NUMPY_DTYPES] != 0 else dtype
    decref(dtype)  # what equals one of a row lives on
    in_c = _ask(table, CONTIGUOUS, value, w)
    decref(in_c)
    w[place + _IN_C] = in_c == table[objects.TRUE]
    return in_c != 0


@inlined
def _shape_of_x(table, x, w):
    """Return x's shape, or 0; it is asked for once."""
    if w[_SHAPE] == 0:
        w[_SHAPE] = _ask(table, SHAPE, x, w)
    return w[_SHAPE]


@inlined
def _item(table, shape, axis):
    return integer_of(table, tuple_item(shape, axis), NO_INTEGER)


@inlined
def _have_same_items(table, shape, other):
    """Say whether two tuples hold the same integers."""
    ndim = tuple_size(shape)
    if tuple_size(other) != ndim:
        return False
    for axis in range(ndim):
        length = _item(table, shape, axis)
        if length == NO_INTEGER or length != _item(table, other, axis):
            return False
    return True


@inlined
def _has_items(table, question, value, items, w):
    """Say whether an array's shape, or strides, are these; 0 stands for none."""
    own = _ask(table, question, value, w) if items != 0 else 0
    same = own != 0 and _have_same_items(table, items, own)
    decref(own)
    return same


@inlined
def _is_dense(table, x, w):
    """Say whether x lies in one piece in an order that is not C's; write its strides.

    From the innermost axis on, a stride is the length of all that is within.
    """
    shape, unit = _shape_of_x(table, x, w), 1
    w[_STEPS] = _ask(table, STRIDES, x, w) if shape != 0 else 0
    if w[_STEPS] != 0 and table[UNIT] != 0:
        unit = _integer(table, _ask(table, UNIT, x, w))
    if w[_STEPS] == 0 or unit <= 0 or tuple_size(w[_STEPS]) != tuple_size(shape):
        return False
    w[_UNIT], step = unit, unit
    for _ in range(tuple_size(shape)):
        for axis in range(tuple_size(shape)):
            length = _item(table, shape, axis)
            if length != 1 and _item(table, w[_STEPS], axis) == step:
                step *= length
                break
    return step == unit * w[_ELEMENTS]


@inlined
def _is_beside_x(table, value, w, place):
    """Say whether an array is plain and on x's device; write where it is."""
    return _look(table, value, w, place) and w[place + _ON] == w[_X + _ON]


@inlined
def _is_in_c(table, value, w, place):
    """Say the same, and whether its order is C's."""
    return _is_beside_x(table, value, w, place) and w[place + _IN_C] != 0


@inlined
def _lies_like(table, value, w, place, model):
    """Say whether an array lies in memory as another one does: x, or one in C order."""
    if w[place + _IN_C] != w[model + _IN_C]:
        return False
    return w[model + _IN_C] != 0 or _has_items(table, STRIDES, value, w[_STEPS], w)


@inlined
def _is_like_x(table, value, x, w, place):
    """Say whether an array is plain and like x; write where it is."""
    if not _is_beside_x(table, value, w, place) or w[place + _OF] != w[_X + _OF]:
        return False
    if not _has_items(table, SHAPE, value, _shape_of_x(table, x, w), w):
        return False
    return _lies_like(table, value, w, place, _X)


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
    if not _is_in_c(table, bits, w, _BESIDE) or w[_BESIDE + _OF] != table[UINT8]:
        return False
    lengths = _ask(table, SHAPE, bits, w)
    if lengths == 0:
        return False
    w[_BESIDE_BYTES] = _item(table, lengths, 0) if tuple_size(lengths) == 1 else -1
    decref(lengths)
    return w[_BESIDE_BYTES] == (w[_ELEMENTS] + 7) >> 3


@inlined
def _inner(table, axis, w):
    """Return how many elements of a channel lie side by side."""
    if w[_X + _IN_C] == 0:
        return _item(table, w[_STEPS], axis) // w[_UNIT]
    inner = 1
    for k in range(axis + 1, tuple_size(w[_SHAPE])):
        inner *= _item(table, w[_SHAPE], k)
    return inner


@inlined
def _axis_of(table, lengths, axis, w):
    """Write how many channels a weight of a shape has; return their axis of x, or -1.

    A weight of more than one axis says by its shape which one of x's is meant.
    """
    ndim, more, found = tuple_size(w[_SHAPE]), tuple_size(lengths), 0
    w[_CHANNELS] = 1
    if more < 2:
        if more == 1:
            w[_CHANNELS] = _item(table, lengths, 0)
        if not -ndim <= axis < ndim:  # the default may not matter
            return 0 if w[_CHANNELS] == 1 and axis == 1 else -1
        return axis + ndim if axis < 0 else axis
    if more > ndim or axis == NO_AXIS:
        return -1
    for k in range(more):
        length = _item(table, lengths, k)
        if length != 1 and w[_CHANNELS] != 1:
            return -1
        if length != 1:
            w[_CHANNELS], found = length, ndim - more + k
    return found


@inlined
def _take_weight(table, value, given_axis, x, w, place):
    """Say whether a weight has one element for each channel; write what is known."""
    axis = integer_of(table, given_axis, NO_AXIS)
    if not _is_in_c(table, value, w, place) or _shape_of_x(table, x, w) == 0:
        return False
    lengths = _ask(table, SHAPE, value, w)
    if lengths == 0:
        return False
    axis = _axis_of(table, lengths, axis, w)
    decref(lengths)
    if axis < 0 or w[_ELEMENTS] >= INT32:
        return False
    if w[_CHANNELS] == 1:
        w[_INNER] = w[_ELEMENTS]
        return True
    w[_INNER] = _inner(table, axis, w)
    return w[_CHANNELS] == _item(table, w[_SHAPE], axis)


# From operands to a kernel ------------------------------------------------------------


@inlined
def _take_x(table, x, w):
    """Write what is known of the first array; say whether it is taken."""
    if table[AROUND] != 0:
        level = _attribute(table[AROUND], table[LEVEL])
        decref(level)
        if level != table[OUTSIDE]:
            return False
    if not _look(table, x, w, _X):
        return False
    w[_ELEMENTS] = _integer(table, _ask(table, SIZE, x, w))
    return w[_ELEMENTS] > 0 and (w[_X + _IN_C] != 0 or _is_dense(table, x, w))


@inlined
def _take(table, given, w):
    """Write what is known of x and the operands; say whether all of them are taken.

    Numbers are looked at when they are written for the kernel.
    """
    x = given[0]
    if not _take_x(table, x, w):
        return False
    for k in range(table[COUNT]):
        kind, value = table[KINDS + k], given[3 + k]
        if kind == SAVED and words(value)[TYPE] == table[objects.MASK]:
            if not _take_bits(table, value, x, w):
                return False
            w[_PLACE] = WITH_BITS
        elif kind == SAVED or kind == AN_ARRAY:
            if not _is_like_x(table, value, x, w, _BESIDE):
                return False
        elif kind == A_WEIGHT:
            if not _take_weight(table, value, given[4 + k], x, w, _BESIDE):
                return False
        elif kind == MAKE_MASK and value == table[objects.TRUE]:
            w[_PLACE], w[_MAKES_BITS] = WITH_BITS, 1
            w[_BESIDE_BYTES] = (w[_ELEMENTS] + 7) >> 3
        elif kind != A_NUMBER and kind != AN_AXIS and value != table[objects.FALSE]:
            return False
    return w[_PLACE] == PLAIN or w[_X + _IN_C] != 0  # here masks are in C order


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
    handle = _integer(table, stream)
    return 0 if handle == 1 else handle  # the legacy stream has both


@inlined
def _is_captured(table, stream, w):
    """Say whether memory must be kept for the graph that a stream may be captured in."""
    w[_FIRST] = 0
    if table[CAPTURING] == 0:
        return False
    if _call_capturing(table[CAPTURING], (stream, w.ctypes.data + 8 * _FIRST)) != 0:
        return True
    return w[_FIRST] != 0


# Memory -------------------------------------------------------------------------------


@inlined
def _target(table, x, inplace, out, w):
    """Return the array to write to, 0 for a fresh one, or -1 to leave it to Python."""
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
def _made(table, like, w):
    """Return a new array in C order of another's shape and dtype, or 0."""
    shape, y = _ask(table, SHAPE, like, w), 0
    dtype = _ask(table, DTYPE, like, w) if shape != 0 else 0
    w[_FIRST], w[_SECOND] = shape, dtype
    if dtype != 0:
        y = vectorcall(table[MAKE], w.ctypes.data + 8 * _FIRST, 2, 0)
    decref(shape)
    decref(dtype)
    return y


@inlined
def _reference_to(table, like, result, w, model, place):
    """Return a new reference to a result, or a new array like another one, or 0.

    Write where a new one is.
    """
    if result != 0:
        incref(result)
        return result
    if table[MAKE] == 0 or w[model + _IN_C] == 0:
        w[_FIRST] = like
        y = vectorcall(table[EMPTY_LIKE], w.ctypes.data + 8 * _FIRST, 1, 0)
    else:
        y = _made(table, like, w)
    if y == 0:
        return 0
    if not _look(table, y, w, place) or not _lies_like(table, y, w, place, model):
        decref(y)
        return 0
    return y


@inlined
def _bytes(table, x, number, w, place):
    """Return a new array of so many bytes on x's device, or 0, and write where it is."""
    size, made = from_integer(number), 0
    w[_FIRST], w[_SECOND] = size, x
    if size != 0:
        made = vectorcall(table[EMPTY_BYTES], w.ctypes.data + 8 * _FIRST, 2, 0)
    decref(size)
    if made != 0 and not _look(table, made, w, place):
        decref(made)
        return 0
    return made


@inlined
def _with_mask(table, x, y, w):
    """Return (y, mask) with bits that are still to be written, or 0; y is given away."""
    bits, shape = _bytes(table, x, w[_BESIDE_BYTES], w, _BESIDE), 0
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
def _queue(table, kernel, blocks, count, stream, w):
    """Queue a kernel with so many arguments; return what the driver says, 0 for yes."""
    for k in range(count):
        w[_POINTERS + k] = w.ctypes.data + 8 * (_ARGUMENTS + k)
    one, zero = np.uint32(1), np.uint32(0)
    grid = np.uint32(blocks), one, one, np.uint32(THREADS), one, one
    pointers = w.ctypes.data + 8 * _POINTERS
    thread = save_thread()  # for the driver waits where its queue is full
    result = _call_launch(table[LAUNCH], (kernel, *grid, zero, stream, pointers, 0))
    restore_thread(thread)
    return result


@inlined
def _is_written(table, array, w):
    """Let the library know of an array of the caller's, if any; say if it took that."""
    if array == 0 or table[WRITTEN] == 0:
        return True
    w[_FIRST] = array
    answer = vectorcall(table[WRITTEN], w.ctypes.data + 8 * _FIRST, 1, 0)
    decref(answer)
    return answer != 0


@inlined
def _launch(table, row, kernel, stream, given, w):
    """Launch a kernel for the operands; say whether the driver took it."""
    width = BYTES // table[row + ITEM]
    count = _arguments(table, row, given, width, w)
    blocks = _blocks_of(w[_ELEMENTS] // width, w[_MAKES_BITS])
    return count != 0 and _queue(table, kernel, blocks, count, stream, w) == 0


@inlined
def _answer(table, given, w):
    """Return the result, 0 where an error is on its way, or -1 to leave it to Python."""
    x = given[0]
    row = _row(table, w) if _take(table, given, w) else 0
    kernel = _kernel(table, row, w) if row != 0 else 0
    if kernel == 0 or not _is_current(table, row, w):
        return -1
    stream = _stream(table, row, w)
    target = _target(table, x, given[1], given[2], w) if stream >= 0 else -1
    y = _reference_to(table, x, target, w, _X, _Y) if target != -1 else 0
    if y == 0:
        return -1
    if w[_MAKES_BITS] != 0:
        y = _with_mask(table, x, y, w)
    taken = y != 0 and _lie_well(w)
    taken = taken and _launch(table, row, kernel, stream, given, w)
    if taken and _is_written(table, target, w):
        return y
    decref(y)
    return -1


@inlined
def _begin(arguments):
    """Return the words of a call, with nothing found yet."""
    w = _space(array_at(arguments, 1, np.int64))
    w[_SHAPE] = w[_STEPS] = w[_BITS] = 0
    w[_CHANNELS] = w[_BESIDE] = w[_PLACE] = w[_MAKES_BITS] = 0
    return w


@inlined
def _end(own, arguments, number, answer):
    """Return an answer, or that of who takes what is left."""
    if answer == -1 and failed() == 0:
        return vectorcall(own[FALLBACK], arguments, number, 0)
    return answer if answer != -1 else 0


def call(self, arguments, number):
    """Take (x, inplace, out, operands...) and return the result."""
    own = words(words(self)[DATA])
    table, given = words(own[TABLE]), words(arguments)
    answer = -1
    if words(given[0])[TYPE] == table[MODEL]:
        w = _begin(arguments)
        answer = _answer(table, given, w)
        decref(w[_SHAPE])
        decref(w[_STEPS])
        decref(w[_BITS])
    return _end(own, arguments, number, answer)


# Both gradients of PReLU --------------------------------------------------------------


@inlined
def _row_of_view(table, w):
    """Return where the row for the dtypes, the device and the view of x starts, or 0."""
    outer = w[_ELEMENTS] // (w[_CHANNELS] * w[_INNER])
    for row in range(ROWS, ROWS + table[KNOWN] * ROW, ROW):
        is_of_x = table[row + OF_X] == w[_X + _OF] and table[row + ON] == w[_X + _ON]
        is_of_both = is_of_x and table[row + OF_WEIGHT] == w[_WEIGHT + _OF]
        channels, inner = table[row + VIEW + 1], table[row + VIEW + 2]
        is_seen_so = channels == w[_CHANNELS] and inner == w[_INNER]
        if is_of_both and is_seen_so and table[row + VIEW] == outer:
            return row
    return 0


@inlined
def _take_both(table, given, w):
    """Write what is known of (grad_output, x, weight); return their row, or 0."""
    grad = given[0]
    if not _take_x(table, grad, w) or not _is_like_x(table, given[3], grad, w, _BESIDE):
        return 0
    if not _take_weight(table, given[4], given[5], grad, w, _WEIGHT):
        return 0
    return _row_of_view(table, w)


@inlined
def _total(table, weight, out, w):
    """Return the array for the weight's gradient, 0 for a fresh one, or -1."""
    if out == table[objects.NONE]:
        return 0
    if not _is_in_c(table, out, w, _TOTAL) or w[_TOTAL + _OF] != w[_WEIGHT + _OF]:
        return -1
    shape = _ask(table, SHAPE, weight, w)
    is_like = _has_items(table, SHAPE, out, shape, w)
    decref(shape)
    return out if is_like else -1


@inlined
def _both_lie_well(table, row, w):
    """Say whether vectors start where arrays do, and none meets another in part."""
    start, saved, target = w[_X], w[_BESIDE], w[_Y]
    length = w[_CHANNELS] * table[row + WEIGHT_ITEM]
    nbytes = w[_ELEMENTS] * table[row + ITEM]
    if (start | saved | target) % BYTES != 0:
        return False
    if (w[_WEIGHT] | w[_TOTAL]) % table[row + WEIGHT_ITEM] != 0:
        return False
    if start != target and overlap(start, nbytes, target, nbytes):
        return False
    if saved != target and overlap(saved, nbytes, target, nbytes):
        return False
    if overlap(w[_WEIGHT], length, target, nbytes):
        return False
    return not overlap(w[_TOTAL], length, target, nbytes)


@inlined
def _put_sizes(table, plan, count, w):
    """Write a launch's sizes behind its pointers, and return how many there are now."""
    for k in range(SIZES):
        count = _put(w, count, table[plan + 2 + k])
    return count


@inlined
def _launch_both(table, row, stream, w):
    """Launch both kernels; return -1 if the driver took neither, else what it says."""
    first, last, pairs = row + FIRST, row + LAST, w[_SUMS]
    count = _put(w, 0, w[_X])
    count = _put(w, count, w[_BESIDE])
    count = _put(w, count, w[_WEIGHT])
    count = _put(w, count, w[_Y])
    count = _put_sizes(table, first, _put(w, count, pairs), w)
    if _queue(table, table[first], table[first + 1], count, stream, w) != 0:
        return -1
    count = _put_sizes(table, last, _put(w, _put(w, 0, pairs), w[_TOTAL]), w)
    return _queue(table, table[last], table[last + 1], count, stream, w)


@inlined
def _refused(table, result, w):
    """Raise what is told where a driver took only the first of two kernels."""
    w[_FIRST] = from_integer(result)
    if w[_FIRST] != 0:
        decref(vectorcall(table[REFUSED], w.ctypes.data + 8 * _FIRST, 1, 0))
        decref(w[_FIRST])
    return 0


@inlined
def _answer_both(table, given, w):
    """Return both gradients, 0 where an error is on its way, or -1."""
    grad, weight = given[0], given[4]
    out, out_weight = one_of(table, given[2], 0), one_of(table, given[2], 1)
    row = _take_both(table, given, w) if out != 0 else 0
    if row == 0 or not _is_current(table, row, w):
        return -1
    stream, result, total = _stream(table, row, w), -1, -1
    if stream >= 0 and not _is_captured(table, stream, w):
        result = _target(table, grad, given[1], out, w)
    if result != -1:
        total = _total(table, weight, out_weight, w)
    if total == -1:
        return -1
    y = _reference_to(table, grad, result, w, _X, _Y)
    dw = _reference_to(table, weight, total, w, _WEIGHT, _TOTAL) if y != 0 else 0
    pairs = _bytes(table, grad, table[row + PAIRS], w, _SUMS) if dw != 0 else 0
    if pairs == 0 or not _both_lie_well(table, row, w):
        decref(pairs)
        decref(dw)
        decref(y)
        return -1
    both = pair_of(y, dw)
    taken = _launch_both(table, row, stream, w) if both != 0 else -1
    decref(pairs)  # which its library lends in the order of the stream
    if taken == 0:
        if _is_written(table, result, w) and _is_written(table, total, w):
            return both
        taken = -1
    decref(both)
    return -1 if taken == -1 else _refused(table, taken, w)


def call_both(self, arguments, number):
    """Take (grad_output, inplace, out, x, weight, axis) and return both gradients."""
    own = words(words(self)[DATA])
    table, given = words(own[TABLE]), words(arguments)
    answer = -1
    if words(given[0])[TYPE] == table[MODEL]:
        w = _begin(arguments)
        answer = _answer_both(table, given, w)
        decref(w[_SHAPE])
        decref(w[_STEPS])
    return _end(own, arguments, number, answer)
