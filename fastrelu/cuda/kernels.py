"""From a formula to the functions that Numba compiles for the GPU.

Each function below returns a kernel and the types of its arguments.  Arrays come as
pointers, sizes and strides as int64 that count elements, and tuples of them flat.

What is computed for a vector is an *element*:

    element(a, i, b, j, s, end)

`a` is the array whose shape the result has (x, or the gradient) and `i` the place in
it; `b` and `j` are what goes with it (the saved array, mask bits, the weight), `s` is
the slope, or how a weight is laid out.  Elements made `part` stop before `end`.

Every thread reads all that it needs before it writes, so that the result may go where
an input is.
"""

from typing import Any

import numpy as np
from numba import cuda, types

from fastrelu.cuda.lanes import (
    Function,
    Lane,
    dot,
    each,
    inlined,
    lane_of,
    load,
    multiply,
    pack,
    put_flags,
    spill,
    store,
    unpack,
    unravel,
)
from fastrelu.cuda.launch import THREADS

Kernel = tuple[Function, tuple[Any, ...]]

DOWN = 8 if THREADS == 256 else 4  # rows that a block of columns works on at once
ACROSS = THREADS // DOWN

_int64, _bits = types.int64, types.CPointer(types.uint8)


# Elements -----------------------------------------------------------------------------


def of_input(formula, lane, width, part):
    get = load(lane, width, part=part)
    apply = each(formula, lane.compute, width)

    def element(a, i, b, j, s, end):
        return apply(get(a, i, end), s)

    return inlined(element), lane.pointer, lane.compute


def of_gradient(gradient, lane, width, part):
    get = load(lane, width, part=part)
    apply = each(gradient, lane.compute, width)

    def element(a, i, b, j, s, end):
        return apply(get(a, i, end), get(b, j, end), s)

    return inlined(element), lane.pointer, lane.compute


def of_flag(gradient, lane, width, part):
    get, flags = load(lane, width, part=part), unpack(width, part=part)
    apply = each(gradient, lane.compute, width)

    def element(a, i, b, j, s, end):
        return apply(get(a, i, end), flags(b, j, end), s)

    return inlined(element), _bits, lane.compute


def of_weight(weight, *, layout, wide):
    """Return the element that meets a weight for each channel.

    The layout says how: "strided" has an index j of its own.  Otherwise `s` is (inner,
    channels) of the view (outer, channel, inner): "rows" are no shorter than a vector,
    and for "columns" inner is 1 and the channels are no fewer than its elements.
    """
    index = np.int64 if wide else np.uint32
    get_weight = load(weight, 1)

    def of_weight(formula, lane, width, part):
        get = load(lane, width, part=part)
        apply = each(formula, lane.compute, width)
        lanes = tuple(range(width))

        def element(a, i, b, j, s, end):
            return apply(get(a, i, end), get_weight(b, j, end)[0])

        def choose(k, to_next, this, following):
            return this if k < to_next else following

        chosen = each(choose, lane.compute, width)

        def row_element(a, i, b, j, s, end):
            inner, channels = s
            row = np.int64(index(i) // index(inner))
            channel = np.int64(index(row) % index(channels))
            following = channel + 1 if channel + 1 < channels else 0
            this = get_weight(b, channel, end)[0]
            after = get_weight(b, following, end)[0]
            slopes = chosen(lanes, (row + 1) * inner - i, this, after)
            return apply(get(a, i, end), slopes)

        def weight_at(k, channel, channels, b):
            k += channel
            return get_weight(b, k if k < channels else k - channels, 0)[0]

        gather = each(weight_at, lane.compute, width)

        def column_element(a, i, b, j, s, end):
            channel = np.int64(index(i) % index(s[1]))
            return apply(get(a, i, end), gather(lanes, channel, s[1], b))

        elements = {"strided": element, "rows": row_element, "columns": column_element}
        shape = types.UniTuple(_int64, 2)
        return (
            inlined(elements[layout]),
            weight.pointer,
            lane.compute if layout == "strided" else shape,
        )

    return of_weight


# Element by element -------------------------------------------------------------------


def flat(element: Function, formula: Function, lane: Lane) -> Kernel:
    """Arrays that lie in one piece, with equal places in their 16 bytes.

    A thread does two vectors.  What lies before the first whole one and after the last
    is done in parts.
    """
    width = lane.width
    of_vector, b, s = element(formula, lane, width, False)
    of_part, _, _ = element(formula, lane, width, True)
    put, put_part = store(lane, width), store(lane, width, part=True)

    def flat(a, b, y, head, vectors, size, s):
        thread = np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        i = np.int64(cuda.blockIdx.x) * (2 * THREADS) + cuda.threadIdx.x
        first = head + i * width
        second = first + THREADS * width
        if i + THREADS < vectors:
            y0 = of_vector(a, first, b, first, s, size)
            y1 = of_vector(a, second, b, second, s, size)
            put(y, first, size, y0)
            put(y, second, size, y1)
        elif i < vectors:
            put(y, first, size, of_vector(a, first, b, first, s, size))
        if thread < 2:
            first = 0 if thread == 0 else head + vectors * width
            end = head if thread == 0 else size
            if first < end:
                put_part(y, first, end, of_part(a, first, b, first, s, end))

    return flat, (lane.pointer, b, lane.pointer, _int64, _int64, _int64, s)


def flat_mask(formula: Function, lane: Lane) -> Kernel:
    """Also write the mask bits.  All that lies in memory starts at 16 bytes."""
    width = lane.width
    get, get_part = load(lane, width), load(lane, width, part=True)
    put, put_part = store(lane, width), store(lane, width, part=True)
    apply, active = each(formula, lane.compute, width), pack(lane)
    put_bits = put_flags(width)

    def flat_mask(x, y, bits, vectors, size, slope):
        i = np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        first = i * width
        flags = np.int32(0)
        if i < vectors:
            values = get(x, first, size)
            put(y, first, size, apply(values, slope))
            flags = active(values)
        elif first < size:
            values = get_part(x, first, size)
            put_part(y, first, size, apply(values, slope))
            flags = active(values)
        put_bits(bits, first, size, flags)

    return flat_mask, (lane.pointer, lane.pointer, _bits, _int64, _int64, lane.compute)


def strided(
    element: Function, formula: Function, lane: Lane, *, rank: int, wide: bool
) -> Kernel:
    """Arrays of any layout, an element a thread."""
    of_one, b, s = element(formula, lane, 1, False)
    put = store(lane, 1)
    unravelled, offset = unravel(rank, wide=wide), dot(rank)

    def strided(a, b, y, shape, a_strides, b_strides, y_strides, size, s):
        i = np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        if i < size:
            place = unravelled(i, shape)
            value = of_one(
                a, offset(place, a_strides), b, offset(place, b_strides), s, size
            )
            put(y, offset(place, y_strides), size, value)

    axes = types.UniTuple(_int64, rank)
    arrays = lane.pointer, b, lane.pointer
    return strided, (*arrays, axes, axes, axes, axes, _int64, s)


def strided_gradient(
    gradient: Function, lane: Lane, weight: Lane, *, rank: int, wide: bool
) -> Kernel:
    """The gradient towards x where a weight is spread in any way."""
    get, get_weight, put = load(lane, 1), load(weight, 1), store(lane, 1)
    apply = each(gradient, lane.compute, 1)
    unravelled, offset = unravel(rank, wide=wide), dot(rank)

    def strided_gradient(
        grad, x, weight, y, shape, grad_strides, x_strides, weight_strides, y_strides,
        size,
    ):  # fmt: skip
        i = np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        if i < size:
            place = unravelled(i, shape)
            slope = get_weight(weight, offset(place, weight_strides), size)[0]
            g = get(grad, offset(place, grad_strides), size)
            value = apply(g, get(x, offset(place, x_strides), size), slope)
            put(y, offset(place, y_strides), size, value)

    axes = types.UniTuple(_int64, rank)
    arrays = lane.pointer, lane.pointer, weight.pointer, lane.pointer
    return strided_gradient, (*arrays, axes, axes, axes, axes, axes, _int64)


def strided_mask(formula: Function, lane: Lane, *, rank: int, wide: bool) -> Kernel:
    """Also write the mask bits, in the order of the axes: a byte a thread."""
    get, put = load(lane, 1), store(lane, 1)
    apply = each(formula, lane.compute, 1)
    put_byte = put_flags(8)
    unravelled, offset = unravel(rank, wide=wide), dot(rank)

    def strided_mask(x, y, bits, shape, x_strides, y_strides, size, slope):
        first = (np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x) * 8
        flags = np.int32(0)
        for k in range(8):
            if first + k < size:
                place = unravelled(first + k, shape)
                value = get(x, offset(place, x_strides), size)
                put(y, offset(place, y_strides), size, apply(value, slope))
                flags |= np.int32(value[0] > 0) << np.int32(k)
        put_byte(bits, first, size, flags)

    axes = types.UniTuple(_int64, rank)
    arrays = lane.pointer, lane.pointer, _bits
    return strided_mask, (*arrays, axes, axes, axes, _int64, lane.compute)


# The gradient towards a weight --------------------------------------------------------
#
# Each sum is a pair, the plain sum and what its roundings lost, so that its error does
# not grow with the number of terms.  Which terms meet in which order follows from the
# shape alone: arrays that are not aligned are cut into the same vectors.  Blocks leave
# their pairs in `sums`, one after another as (split, channel, place within the channel),
# and `finish` adds them up.


def _add(a, b):
    return a + b


def _lost(a, b, total):
    """What rounding lost of the exact sum of a and b [Knuth, TAOCP 4.2.2]."""
    of_b = total - a
    return (a - (total - of_b)) + (b - of_b)


def _share(lane):
    """Return the formula of an element's share in its channel's gradient."""
    product = multiply(lane)

    def share(g, x):
        return type(x)(0) if x > 0 else product(x, g)

    return share


def _adder(lane: Lane, width: int) -> Any:
    """Return `add(pair, g, x)` for vectors."""
    share = each(_share(lane), lane.compute, width)
    plus = each(_add, lane.compute, width)
    lost = each(_lost, lane.compute, width)

    def add(pair, g, x):
        terms = share(g, x)
        total = plus(pair[0], terms)
        return total, plus(pair[1], lost(pair[0], terms, total))

    return inlined(add)


def _reducer(lane: Lane, length: int) -> Any:
    """Return a tree over so many pairs of a block, until `remain` are left."""
    lost = each(_lost, lane.compute, 1)

    def reduce(totals, losses, remain):
        thread = cuda.threadIdx.x
        half = length // 2
        while half >= remain:
            cuda.syncthreads()
            k = thread
            while k < half:
                a, b = totals[k], totals[k + half]
                total = a + b
                losses[k] += losses[k + half] + lost(a, b, total)[0]
                totals[k] = total
                k += THREADS
            half //= 2
        cuda.syncthreads()

    return inlined(reduce)


def _store_pair(lane: Lane) -> Any:
    put = store(lane, 1)

    def store_pair(sums, at, total, lost):
        put(sums, 2 * at, 0, (total,))
        put(sums, 2 * at + 1, 0, (lost,))

    return inlined(store_pair)


def _sum_lane(lane: Lane) -> Lane:
    return Lane(str(lane.compute), lane.compute, lane.compute)


def prelu_rows(
    gradient: Function,
    lane: Lane,
    weight: Lane,
    *,
    vectors: bool,
    aligned: bool,
    wide: bool,
) -> Kernel:
    """Both gradients for the view (outer, channel, inner): a block has one channel.

    With vectors, rows are whole ones; only a single row may end between.
    """
    width = lane.width if vectors else 1
    index = np.int64 if wide else np.uint32
    get, get_part = load(lane, width, aligned=aligned), load(lane, width, part=True)
    put, put_part = store(lane, width, aligned=aligned), store(lane, width, part=True)
    get_weight = load(weight, 1)
    apply = each(gradient, lane.compute, width)
    add, reduce = _adder(lane, width), _reducer(lane, THREADS * width)
    put_vector, put_pair = spill(lane, width), _store_pair(_sum_lane(lane))
    compute, length = lane.compute, THREADS * width
    zeros = (lane.scalar(0),) * width

    def prelu_rows(grad, x, weight, y, sums, outer, channels, inner, splits):
        totals = cuda.shared.array(length, compute)
        losses = cuda.shared.array(length, compute)
        thread, block = cuda.threadIdx.x, np.int64(cuda.blockIdx.x)
        split = np.int64(index(block) // index(channels))
        channel = block - split * channels
        slope = get_weight(weight, channel, 0)[0]
        pair = zeros, zeros
        in_row = inner // width
        q = split * THREADS + thread
        while q < outer * in_row:
            row = np.int64(index(q) // index(in_row))
            i = (row * channels + channel) * inner + (q - row * in_row) * width
            g, v = get(grad, i, 0), get(x, i, 0)
            put(y, i, 0, apply(g, v, slope))
            pair = add(pair, g, v)
            q += splits * THREADS
        if split == 0 and thread == 0 and in_row * width < inner:
            i = in_row * width
            g, v = get_part(grad, i, inner), get_part(x, i, inner)
            put_part(y, i, inner, apply(g, v, slope))
            pair = add(pair, g, v)
        put_vector(totals, thread * width, pair[0])
        put_vector(losses, thread * width, pair[1])
        reduce(totals, losses, 1)
        if thread == 0:
            put_pair(sums, block, totals[0], losses[0])

    arrays = lane.pointer, lane.pointer, weight.pointer, lane.pointer
    sums = types.CPointer(lane.compute)
    return prelu_rows, (*arrays, sums, _int64, _int64, _int64, _int64)


def prelu_columns(
    gradient: Function,
    lane: Lane,
    weight: Lane,
    *,
    vectors: bool,
    aligned: bool,
    wide: bool,
) -> Kernel:
    """The same where rows are short: a thread keeps to its columns of (outer, columns).

    With vectors, the rows of all channels together are whole ones.
    """
    width = lane.width if vectors else 1
    index = np.int64 if wide else np.uint32
    get, put = load(lane, width, aligned=aligned), store(lane, width, aligned=aligned)
    get_weight = load(weight, 1)
    apply = each(gradient, lane.compute, width)
    add, reduce = _adder(lane, width), _reducer(lane, THREADS * width)
    put_vector, put_pair = spill(lane, width), _store_pair(_sum_lane(lane))
    compute, length = lane.compute, THREADS * width
    zeros, lanes = (lane.scalar(0),) * width, tuple(range(width))
    strip = ACROSS * width  # columns of a block

    def weight_at(k, column, inner, weight):
        channel = index(column + k) // index(inner)
        return get_weight(weight, np.int64(channel), 0)[0]

    gather = each(weight_at, lane.compute, width)

    def prelu_columns(grad, x, weight, y, sums, outer, columns, inner, splits):
        totals = cuda.shared.array(length, compute)
        losses = cuda.shared.array(length, compute)
        thread, block = cuda.threadIdx.x, np.int64(cuda.blockIdx.x)
        split = np.int64(index(block) % index(splits))
        start = np.int64(index(block) // index(splits)) * strip
        column = start + thread % ACROSS * width
        pair = zeros, zeros
        if column < columns:
            slopes = gather(lanes, column, inner, weight)
            row = split * DOWN + thread // ACROSS
            while row < outer:
                i = row * columns + column
                g, v = get(grad, i, 0), get(x, i, 0)
                put(y, i, 0, apply(g, v, slopes))
                pair = add(pair, g, v)
                row += splits * DOWN
        put_vector(totals, thread * width, pair[0])
        put_vector(losses, thread * width, pair[1])
        reduce(totals, losses, strip)
        k = np.int64(thread)
        while k < strip and start + k < columns:
            put_pair(sums, split * columns + start + k, totals[k], losses[k])
            k += THREADS

    arrays = lane.pointer, lane.pointer, weight.pointer, lane.pointer
    sums = types.CPointer(lane.compute)
    return prelu_columns, (*arrays, sums, _int64, _int64, _int64, _int64)


def strided_sum(lane: Lane, *, kept: int, summed: int) -> Kernel:
    """The sums alone, for any layout of both arrays and of the weight.

    A block adds up along the axes that are summed, for one place along those that are
    kept.
    """
    get, add, reduce = load(lane, 1), _adder(lane, 1), _reducer(lane, THREADS)
    put_pair = _store_pair(_sum_lane(lane))
    kept_place, kept_offset = unravel(kept, wide=True), dot(kept)
    summed_place, summed_offset = unravel(summed, wide=True), dot(summed)
    compute, zeros = lane.compute, (lane.scalar(0),)

    def strided_sum(
        grad, x, sums, kept, kept_grad, kept_x, summed, summed_grad, summed_x,
        channels, size, splits,
    ):  # fmt: skip
        totals = cuda.shared.array(THREADS, compute)
        losses = cuda.shared.array(THREADS, compute)
        thread, block = cuda.threadIdx.x, np.int64(cuda.blockIdx.x)
        split = block // channels
        place = kept_place(block - split * channels, kept)
        grad_start, x_start = kept_offset(place, kept_grad), kept_offset(place, kept_x)
        pair = zeros, zeros
        q = split * THREADS + thread
        while q < size:
            place = summed_place(q, summed)
            g = get(grad, grad_start + summed_offset(place, summed_grad), 0)
            v = get(x, x_start + summed_offset(place, summed_x), 0)
            pair = add(pair, g, v)
            q += splits * THREADS
        totals[thread] = pair[0][0]
        losses[thread] = pair[1][0]
        reduce(totals, losses, 1)
        if thread == 0:
            put_pair(sums, block, totals[0], losses[0])

    sums = types.CPointer(lane.compute)
    a, b = types.UniTuple(_int64, kept), types.UniTuple(_int64, summed)
    numbers = a, a, a, b, b, b, _int64, _int64, _int64
    return strided_sum, (lane.pointer, lane.pointer, sums, *numbers)


def finish(lane: Lane) -> Kernel:
    """Add up the pairs of each channel, with a team of 1, 2, 4 ... threads for each."""
    pairs = _sum_lane(lane)
    get, put = load(pairs, 1), store(lane, 1)
    lost = each(_lost, lane.compute, 1)
    compute, zero = lane.compute, lane.scalar(0)

    def finish(sums, weight, splits, channels, inner, team):
        totals = cuda.shared.array(THREADS, compute)
        losses = cuda.shared.array(THREADS, compute)
        thread = np.int64(cuda.threadIdx.x)
        channel = (np.int64(cuda.blockIdx.x) * THREADS + thread) // team
        member = thread % team
        total, loss = zero, zero
        if channel < channels:
            q = member
            while q < splits * inner:
                split = q // inner
                at = 2 * ((split * channels + channel) * inner + (q - split * inner))
                term = get(sums, at, 0)[0]
                following = total + term
                loss += lost(total, term, following)[0] + get(sums, at + 1, 0)[0]
                total = following
                q += team
        totals[thread] = total
        losses[thread] = loss
        half = team // 2
        while half > 0:
            cuda.syncthreads()
            if member < half:
                a, b = totals[thread], totals[thread + half]
                total = a + b
                losses[thread] += losses[thread + half] + lost(a, b, total)[0]
                totals[thread] = total
            half //= 2
        if member == 0 and channel < channels:
            total, loss = totals[thread], losses[thread]
            if loss - loss == zero:  # else an infinity or NaN is in the sum itself
                total += loss
            put(weight, channel, 0, (total,))

    return finish, (
        types.CPointer(lane.compute), lane.pointer, _int64, _int64, _int64, _int64
    )  # fmt: skip


# By name ------------------------------------------------------------------------------

_ELEMENTS = {"input": of_input, "gradient": of_gradient, "flag": of_flag}


def build(
    template: str, options: dict[str, Any], capability: tuple[int, int]
) -> Kernel:
    """Return a kernel of this module, whose options name lanes and the element."""
    options = dict(options)
    for name in {"lane", "weight"} & options.keys():
        options[name] = lane_of(options[name], capability)
    if "element" in options:
        element = options["element"]
        if element in _ELEMENTS:
            options["element"] = _ELEMENTS[element]
        else:
            options["element"] = of_weight(
                options.pop("weight"), layout=element, wide=options["wide"]
            )
        if template == "flat":
            del options["wide"]
    made: Kernel = globals()[template](**options)
    return made
