"""What goes into the functions of users that Numba compiles: templates.

Those with a name that is left open are bound to a formula of the catalogue, to loops, or to
each other, as the types of the arguments want it: `_overloads` does.  Where one is called
that leaves nothing open, its name is all that it takes.
"""

from typing import Any

import numpy as np

from fastrelu.cpu.portable import _add_up as add_up
from fastrelu.cpu.portable import _get_one as get_one
from fastrelu.cpu.portable import share_of

# The names that the templates below leave open.
active: Any
apart: Any
at: Any
body: Any
cache: Any
check: Any
columns: Any
copied: Any
copy: Any
copy_in: Any
copy_out: Any
copy_too: Any
fence: Any
finite: Any
fits: Any
first_out: Any
formula: Any
get: Any
gradient: Any
lay: Any
like: Any
load: Any
loop: Any
many: Any
meets_any: Any
message: Any
middle: Any
moved: Any
passes: Any
plain: Any
result: Any
reverse: Any
rounded: Any
rows: Any
run: Any
scalar: Any
second_out: Any
store: Any
store_strip: Any
stream_strip: Any
strip_buffer: Any
strip_size: Any
suits_columns: Any
take: Any
take_weight: Any
value_of: Any
view: Any


# Numbers ------------------------------------------------------------------------------


def of_number(x, out, numbers):
    return store(formula(*((load(x),) + rounded(numbers))))


def number_backward(g, saved, out, numbers):
    return store(gradient(*((load(g), passes(saved, numbers)) + rounded(numbers))))


def number_prelu_backward(g, x, weight, axis, out):
    grad, value = load(g), load(x)
    total = share_of(grad, value)
    dw = store(scalar(total if total != 0 else 0.0))  # a sum is no -0
    return store(gradient(grad, passes(x, ()), scalar(value_of(weight)))), dw


# What a gradient is told of the saved number.


def is_active(saved, numbers):
    return active(*((load(saved),) + rounded(numbers)))


def is_told(saved, numbers):
    return load(saved)


# As many numbers as there are, in the type of products.


def round_none(numbers):
    return ()


def round_one(numbers):
    return (scalar(numbers[0]),)


def round_two(numbers):
    return scalar(numbers[0]), scalar(numbers[1])


ROUND = round_none, round_one, round_two


def any_number(numbers):
    pass


def finite_one(numbers):
    if not np.isfinite(numbers[0]):
        raise ValueError(message)


def finite_two(numbers):
    if not (np.isfinite(numbers[0]) and np.isfinite(numbers[1])):
        raise ValueError(message)


FINITE = any_number, finite_one, finite_two


def fits_float(value, number):
    if np.isfinite(np.float64(number)) and not np.isfinite(value):
        raise ValueError(message)


def fits_integer(value, number):
    if value != number:
        raise ValueError(message)


# Where arrays lie ---------------------------------------------------------------------


def like_c(x):
    return np.empty(x.shape, scalar)


def like_fortran(x):
    return np.empty(x.shape[::-1], scalar).T


def bounds(x):
    low = high = np.intp(x.ctypes.data)
    for length, stride in zip(x.shape, x.strides):
        if length == 0:
            return low, low
        reach = (length - 1) * stride
        low, high = low + min(reach, 0), high + max(reach, 0)
    return low, high + x.itemsize


def overlap(x, y):
    x_low, x_high = bounds(x)
    y_low, y_high = bounds(y)
    return x_low < y_high and y_low < x_high


def meets(x, y):
    """Say whether two arrays may overlap other than element on element."""
    same = x.ctypes.data == y.ctypes.data and x.itemsize == y.itemsize
    return overlap(x, y) and not (same and x.strides == y.strides)


def may_share(x):
    """Say whether an axis, from the finest on, steps into what finer ones reach."""
    lengths, reach = np.empty(x.ndim, np.intp), x.itemsize
    for k in range(x.ndim):
        lengths[k] = x.shape[k]
    for _ in range(x.ndim):
        finest = -1
        for k in range(x.ndim):
            step = abs(x.strides[k])
            if lengths[k] != 1 and (finest < 0 or step < abs(x.strides[finest])):
                finest = k
        if finest >= 0:
            if abs(x.strides[finest]) < reach:
                return x.size > 1
            reach += abs(x.strides[finest]) * (lengths[finest] - 1)
            lengths[finest] = 1
    return False


def shares_elements(x):
    """Say whether two elements of x have a byte in common: mark those of each."""
    low, high = bounds(x)
    marks, base = np.zeros(high - low, np.bool_), np.intp(x.ctypes.data) - low
    for where in np.ndindex(x.shape):
        first = base
        for k, stride in zip(where, x.strides):
            first += k * stride
        for byte in range(first, first + x.itemsize):
            if marks[byte]:
                return True
            marks[byte] = True
    return False


def check_any(y):
    if may_share(y) and shares_elements(y):
        raise ValueError(message)


def check_none(y):
    pass


def take_fresh(x, out):
    return like(x)


def take_first(x, out):
    check(x)
    return x


def take_out(x, out):
    if out.shape != x.shape:
        raise ValueError(message)
    check(out)
    return out


# What a loop is given of its operands at a time: all that lies flat, or a line.


def flat_c(x, where):
    return x.reshape(x.size)


def flat_fortran(x, where):
    return x.T.reshape(x.size)


def line(x, where):
    return x[where]


def whole(x, where):
    return x


def at_once(a, y, s):
    plain(lay(a, 0), None, at(y, 0), s, 1, 0, y.size)


def by_strips(a, y, s):
    """Write cache lines made in a buffer: to memory, past a cache that they do not fit.

    Where y is one of the arrays that are read, the compiler would store each element on
    a condition without the buffer, which takes three times as long.
    """
    parts, flat = lay(a, 0), at(y, 0)
    lead = min(-flat.ctypes.data % 64 // flat.itemsize, flat.size)
    whole, past = (flat.size - lead) // strip_size, moved * flat.nbytes > cache
    plain(parts, None, flat, s, 1, 0, lead)
    buffer = strip_buffer(flat)
    for strip in range(np.uintp(whole)):
        first = np.uintp(lead) + strip * np.uintp(strip_size)
        for j in range(np.uintp(strip_size)):
            buffer[j] = store(formula(*(get(parts, first + j) + s)))
        if past:
            stream_strip(flat, first, buffer)
        else:
            store_strip(flat, first, buffer)
    if past:
        fence()
    plain(parts, None, flat, s, 1, lead + whole * strip_size, flat.size)


def by_lines(a, y, s):
    for where in np.ndindex(y.shape[:-1]):
        plain(lay(a, where), None, at(y, where), s, 1, 0, y.shape[-1])


def apart_from_result(a, y, s):
    """Do not write what is still to be read."""
    if meets_any(a, y):
        z = like(y)
        run(a, z, s)
        copy((z,), y, ())
    else:
        run(a, y, s)


# The operands: how they are laid, what a loop gets of them, and which meet the result.


def lay_one(a, where):
    return (at(a[0], where),)


def meets_one(a, y):
    return meets(a[0], y)


def lay_saved(a, where):
    return at(a[0], where), at(a[1], where), a[2]


def get_saved(a, i):
    return load(a[0][i]), passes(a[1][i], a[2])


def meets_two(a, y):
    return meets(a[0], y) or meets(a[1], y)


def lay_spread(a, where):
    return a[0], at(a[1], where), a[2]


def get_spread(a, i):
    return a[0], passes(a[1][i], a[2])


def meets_second(a, y):
    return meets(a[1], y)


def lay_slopes(a, where):
    return at(a[0], where), at(a[1], where), at(a[2], where)


def get_slopes(a, i):
    return load(a[0][i]), passes(a[1][i], ()), load(a[2][i])


def meets_three(a, y):
    return meets(a[0], y) or meets(a[1], y) or meets(a[2], y)


ONE = lay_one, get_one, meets_one
SAVED = lay_saved, get_saved, meets_two
SPREAD = lay_spread, get_spread, meets_second
SLOPES = lay_slopes, get_slopes, meets_three


# Elementwise --------------------------------------------------------------------------


def forward(x, out, numbers):
    s = rounded(numbers)
    finite(s)
    y = take(x, out)
    apart((x,), y, s)
    return y


def backward(g, saved, out, numbers):
    s = rounded(numbers)
    finite(s)
    if saved.shape != g.shape:
        raise ValueError(message)
    y = take(g, out)
    apart((g, saved, numbers), y, s)
    return y


def backward_spread(g, saved, out, numbers):
    s = rounded(numbers)
    finite(s)
    grad = scalar(g)
    fits(grad, g)
    y = take(saved, out)
    apart((grad, saved, numbers), y, s)
    return y


def backward_slopes(g, x, out, slopes):
    if x.shape != g.shape or slopes[0].shape != g.shape:
        raise ValueError(message)
    y = take(g, out)
    apart((g, x, slopes[0]), y, ())
    return y


def mean_number(x, out, bounds):
    return run(x, out, (middle(np.float64(bounds[0]), np.float64(bounds[1])),))


def mean(x, out, bounds):
    finite(rounded(bounds))
    low, high = np.float64(bounds[0]), np.float64(bounds[1])
    if low > high:
        raise ValueError(message)
    return run(x, out, (middle(low, high),))


# With mask bits: they are those of elements in C order.


def forward_bits(x, out, numbers):
    s = rounded(numbers)
    finite(s)
    y = take(x, out)
    bits = np.empty((x.size + 7) >> 3, np.uint8)
    run(x, bits, y, s, bits.size)
    return y, bits


def backward_bits(g, bits, out, numbers):
    s = rounded(numbers)
    finite(s)
    if bits.size != (g.size + 7) >> 3:
        raise ValueError(message)
    y = take(g, out)
    run(g, bits, y, s, g.size)
    return y


def bits_at_once(x, bits, y, s, size):
    loop((x.reshape(x.size),), bits, y.reshape(y.size), s, 1, 0, size)


def bits_in_strips(x, bits, y, s, size):
    body((x.reshape(x.size),), bits, y.reshape(y.size), s, 1, 0)


def bits_of_copy(x, bits, y, s, size):
    z = like(x)
    copy_in((x,), z, ())
    run(z, bits, z, s, size)
    copy_out((z,), y, ())


def bits_apart(x, bits, y, s, size):
    if meets(x, y) or overlap(bits, y):
        copied(x, bits, y, s, size)
    else:
        run(x, bits, y, s, size)


# Weights ------------------------------------------------------------------------------
#
# A view of a weight is an array of one slope for each channel, in the order of memory,
# the places of these in the weight, and how many elements in a row have one slope.


def view_number(x, weight, axis):
    slopes, value = np.empty(1, scalar), value_of(weight)
    slopes[0] = scalar(value)
    fits(slopes[0], value)
    return slopes, np.zeros(1, np.intp), x.size


def view_one_element(x, weight, axis):
    if weight.size != 1:
        raise ValueError(message)
    return view_number(x, weight[0], axis)


def view_axis(x, weight, axis):
    steps = np.zeros(x.ndim, np.intp)
    within = -x.ndim <= axis < x.ndim
    if not within and (weight.size != 1 or axis != 1):
        raise ValueError(message)
    if weight.size != 1:
        if weight.size != x.shape[axis % x.ndim]:
            raise ValueError(message)
        steps[axis % x.ndim] = 1
    return channels_of(x, weight, steps)


def view_broadcast(x, weight, axis):
    steps, step = np.zeros(x.ndim, np.intp), 1
    for k in range(1, weight.ndim + 1):
        length = weight.shape[weight.ndim - k]
        if length != 1 and length != x.shape[x.ndim - k]:
            raise ValueError(message)
        if length > 1:
            steps[x.ndim - k] = step
        step *= length
    return channels_of(x, weight, steps)


def channels_of(x, weight, steps):
    """Return the view of a weight, given how far along it each axis of x goes."""
    lengths, along = np.empty(x.ndim, np.intp), np.empty(x.ndim, np.intp)
    first, end = x.ndim, 0
    for k in range(x.ndim):
        axis = x.ndim - 1 - k if reverse else k
        lengths[k], along[k] = x.shape[axis], steps[axis]
        if along[k]:
            first, end = min(first, k), k + 1
    inner = channels = 1
    for k in range(x.ndim):
        if k >= end:
            inner *= lengths[k]
        elif k >= first:
            channels *= lengths[k]
    values, slopes = np.empty(weight.size, scalar), np.empty(channels, scalar)
    for place, value in enumerate(weight.flat):
        values[place] = value
    places = np.zeros(channels, np.intp)
    for channel in range(channels):
        rest = channel
        for k in range(end - 1, first - 1, -1):
            places[channel] += rest % lengths[k] * along[k]
            rest //= lengths[k]
        slopes[channel] = values[places[channel]]
    return slopes, places, inner


def prelu_number(x, weight, axis, out):
    value = value_of(weight)
    fits(scalar(value), value)
    return run(x, out, (value,))


def prelu(x, weight, axis, out):
    slopes, _, inner = view(x, weight, axis)
    y = take(x, out)
    if x.size > 0:
        run(x, y, slopes, inner)
    return y


def weighted(x, y, slopes, inner):
    flat, flat_y = at(x, 0), at(y, 0)
    if inner > 1:
        rows((flat,), slopes, flat_y, (), inner, 0, y.size // inner)
    else:
        size = slopes.size
        for first in range(0, y.size, size):
            part, part_y = flat[first : first + size], flat_y[first : first + size]
            plain((part, slopes), None, part_y, (), 1, 0, size)


def weighted_in_strips(x, y, slopes, inner):
    flat, flat_y = (at(x, 0),), at(y, 0)
    if suits_columns(many, y.size, slopes.size, inner):
        columns(flat, slopes, flat_y, (), inner, 0)
    else:
        rows(flat, slopes, flat_y, (), inner, 0)


def weighted_copy(x, y, slopes, inner):
    z = like(x)
    copy_in((x,), z, ())
    run(z, z, slopes, inner)
    copy_out((z,), y, ())


def weighted_apart(x, y, slopes, inner):
    if meets(x, y):
        copied(x, y, slopes, inner)
    else:
        run(x, y, slopes, inner)


# Both gradients of PReLU --------------------------------------------------------------


def prelu_backward(g, x, weight, axis, out):
    if x.shape != g.shape:
        raise ValueError(message)
    slopes, places, inner = view(x, weight, axis)
    y = take(g, first_out(out))
    dw = take_weight(weight, second_out(out))
    check(y, dw)
    sums = np.zeros((2, 1, slopes.size))
    if x.size > 0:
        run(g, x, slopes, inner, y, sums)
    put(dw, total(sums, places, dw.size))
    return y, result(dw)


def both(g, x, slopes, inner, y, sums):
    outer = y.size // (inner * slopes.size)
    loop(at(g, 0), at(x, 0), slopes, at(y, 0), sums, inner, outer, 0, 1)


def both_in_strips(g, x, slopes, inner, y, sums):
    where = (
        np.int64(at(g, 0).ctypes.data),
        np.int64(at(x, 0).ctypes.data),
        np.int64(slopes.ctypes.data),
        np.int64(at(y, 0).ctypes.data),
        np.int64(sums.ctypes.data),
    )
    if suits_columns(many, y.size, slopes.size, inner):
        failed = columns(*where, 0, y.size, slopes.size, inner, 0)
    else:
        failed = rows(*where, 0, y.size, slopes.size, inner, 0)
    if failed:
        raise MemoryError


def both_copies(g, x, slopes, inner, y, sums):
    grad, value = like(g), like(x)
    copy_in((g,), grad, ())
    copy_too((x,), value, ())
    run(grad, value, slopes, inner, grad, sums)
    copy_out((grad,), y, ())


def both_apart(g, x, slopes, inner, y, sums):
    if meets(g, y) or meets(x, y):
        copied(g, x, slopes, inner, y, sums)
    else:
        run(g, x, slopes, inner, y, sums)


def total(sums, places, size):
    """Return the sums of each place of a weight, of all channels that it is for."""
    parts = np.zeros((2, places.size // max(size, 1), size))
    count = np.zeros(size, np.intp)
    for channel in range(places.size):
        place = places[channel]
        for k in range(2):
            parts[k, count[place], place] = sums[k, 0, channel]
        count[place] += 1
    pairs = np.zeros((2, size))
    add_up(parts, pairs)
    for place in range(size):
        if np.isfinite(pairs[0, place]):  # past infinity, an error says nothing
            pairs[0, place] += pairs[1, place]
    return pairs[0]


# Small parts ---------------------------------------------------------------------------


def itself(value):
    return value


def element_of(x):
    return x.item()


def first_of(x):
    return x[0]


def second_of(x):
    return x[1]


def nothing(x):
    return None


def one_element(weight, out):
    return np.empty(1, scalar)


def put(y, values):
    for place, where in enumerate(np.ndindex(y.shape)):
        y[where] = values[place]


def no_check(y, dw):
    pass


def check_apart(y, dw):
    if overlap(y, dw):
        raise ValueError(message)
