"""From a function and the kinds of its operands to what Numba compiles for the GPU.

Each template below returns a kernel and the types of its arguments.  Arrays come as
pointers, sizes and strides as int64 that count elements, and tuples of them flat.

The pointers are those of the operands that lie in memory, in their order.

Every thread reads all that it needs before it writes, so that the result may go where
an input is.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numba import cuda, types

from fastrelu import _sums
from fastrelu._spec import ARRAY, BITS, NUMBER, WEIGHT
from fastrelu.cuda.config import DOWN, THREADS
from fastrelu.cuda.vector import (
    Format,
    Function,
    bits_reader,
    each,
    element,
    format_of,
    inlined,
    load,
    multiply,
    offsets,
    pack,
    put_flags,
    reader,
    spill,
    store,
    unravel,
)

Kernel = tuple[Function, tuple[Any, ...]]
Kinds = tuple[str, ...]

ACROSS = THREADS // DOWN

_int64, _bits = types.int64, types.CPointer(types.uint8)


# Operands -----------------------------------------------------------------------------


def _tuple(kinds: Iterable[Any]) -> Any:
    return types.BaseTuple.from_types(tuple(kinds))


def _pointers(kinds: Kinds, fmt: Format, weight: Format | None) -> Any:
    """Return the type of the operands' pointers."""
    of = {ARRAY: fmt.pointer, BITS: _bits}
    if weight is not None:
        of[WEIGHT] = weight.pointer
    return _tuple(of[kind] for kind in kinds if kind in of)


def _numbers(kinds: Kinds, fmt: Format) -> Any:
    return _tuple(fmt.compute for kind in kinds if kind == NUMBER)


def _readers(kinds, fmt, width, *, part=False, weight=None):
    """Return how each operand is read; None for what comes with the numbers."""
    of = {
        ARRAY: reader(fmt, width, part=part),
        BITS: bits_reader(width, part=part),
    }
    if weight is not None:
        of[WEIGHT] = reader(weight, 1)
    return [of.get(kind) for kind in kinds]


# A weight of the view (outer, channel, inner), where all lies flat; `view` is (inner,
# channels).


def _of_one(weight, fmt, width, *, wide):
    """Return `slopes(p, i, view)` where all channels share one."""
    get = load(weight, 1)

    def slopes(p, i, view):
        return get(p, 0, 0)[0]

    return inlined(slopes)


def _of_whole_rows(weight, fmt, width, *, wide):
    """The same where rows are whole vectors: one channel is all that a vector meets."""
    index, get = np.int64 if wide else np.uint32, load(weight, 1)

    def slopes(p, i, view):
        inner, channels = view
        row = index(i) // index(inner)
        return get(p, np.int64(index(row) % index(channels)), 0)[0]

    return inlined(slopes)


def _of_whole_columns(weight, fmt, width, *, wide):
    """The same where inner is 1 and the channels are whole vectors, as x's are."""
    index, get = np.int64 if wide else np.uint32, load(weight, width)

    def slopes(p, i, view):
        return get(p, np.int64(index(i) % index(view[1])), 0)

    return inlined(slopes)


def _of_rows(weight, fmt, width, *, wide):
    """The same where rows are no shorter than a vector."""
    index = np.int64 if wide else np.uint32
    get, lanes = load(weight, 1), tuple(range(width))

    def choose(k, to_next, this, following):
        return this if k < to_next else following

    chosen = each(choose, fmt.compute, width)

    def slopes(p, i, view):
        inner, channels = view
        row = np.int64(index(i) // index(inner))
        channel = np.int64(index(row) % index(channels))
        following = channel + 1 if channel + 1 < channels else 0
        this, after = get(p, channel, 0)[0], get(p, following, 0)[0]
        return chosen((lanes, (row + 1) * inner - i, this, after))

    return inlined(slopes)


def _of_columns(weight, fmt, width, *, wide):
    """The same where inner is 1 and the channels are no fewer than a vector has."""
    index = np.int64 if wide else np.uint32
    get, lanes = load(weight, 1), tuple(range(width))

    def weight_at(k, channel, channels, p):
        k += channel
        return get(p, k if k < channels else k - channels, 0)[0]

    gather = each(weight_at, fmt.compute, width)

    def slopes(p, i, view):
        channel = np.int64(index(i) % index(view[1]))
        return gather((lanes, channel, view[1], p))

    return inlined(slopes)


_LAYOUTS = {
    "one": _of_one,
    "rows": _of_rows,
    "columns": _of_columns,
    "whole rows": _of_whole_rows,
    "whole columns": _of_whole_columns,
}


def _value(function, fmt, kinds, width, *, slopes=None, part=False):
    """Return `value(pointers, i, numbers, view, end)` for arrays that lie flat."""
    apply = element(
        function, fmt.compute, width, _readers(kinds, fmt, width, part=part)
    )

    def value(pointers, i, numbers, view, end):
        return apply(pointers, i, numbers, end)

    def value_with_weight(pointers, i, numbers, view, end):
        met = slopes(pointers[-1], i, view)
        return apply(pointers, i, (met,) + numbers, end)

    return inlined(value if slopes is None else value_with_weight)


# Element by element -------------------------------------------------------------------


def flat(
    function: Function,
    fmt: Format,
    *,
    kinds: Kinds,
    weight: Format | None = None,
    layout: str | None = None,
    wide: bool = False,
) -> Kernel:
    """Arrays that lie in one piece, with equal places in their 16 bytes.

    A thread does one vector.  What lies before the first whole one and after the last
    is done in parts.
    """
    width = fmt.width
    slopes = layout and _LAYOUTS[layout](weight, fmt, width, wide=wide)
    of_vector, of_part = (
        _value(function, fmt, kinds, width, slopes=slopes, part=part)
        for part in (False, True)
    )
    put, put_part = store(fmt, width), store(fmt, width, part=True)

    def flat(pointers, y, head, vectors, size, numbers, view):
        thread = np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        if thread < vectors:
            first = head + thread * width
            put(y, first, size, of_vector(pointers, first, numbers, view, size))
        if thread < 2:
            first = 0 if thread == 0 else head + vectors * width
            end = head if thread == 0 else size
            if first < end:
                put_part(y, first, end, of_part(pointers, first, numbers, view, end))

    sizes = (
        _int64,
        _int64,
        _int64,
        _numbers(kinds, fmt),
        _tuple([_int64] * 2 * bool(layout)),
    )
    return flat, (_pointers(kinds, fmt, weight), fmt.pointer, *sizes)


def flat_mask(
    function: Function, fmt: Format, *, kinds: Kinds, active: Function, kept: int
) -> Kernel:
    """Also write the mask bits.  All that lies in memory starts at 16 bytes.

    The operands are an array and numbers, so many of which `active` takes, too.
    """
    width = fmt.width
    get, get_part = load(fmt, width), load(fmt, width, part=True)
    put, put_part = store(fmt, width), store(fmt, width, part=True)
    apply = each(function, fmt.compute, width)
    passes, flags_of = each(active, types.boolean, width, takes=1 + kept), pack(width)
    put_bits = put_flags(width)

    def flat_mask(x, y, bits, vectors, size, numbers):
        i = np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        first = i * width
        flags = np.int32(0)
        if i < vectors:
            operands = (get(x, first, size),) + numbers
            put(y, first, size, apply(operands))
            flags = flags_of(passes(operands))
        elif first < size:
            operands = (get_part(x, first, size),) + numbers
            put_part(y, first, size, apply(operands))
            within = np.int32((1 << (size - first)) - 1)  # zeros beyond may pass
            flags = flags_of(passes(operands)) & within
        put_bits(bits, first, size, flags)

    arrays = fmt.pointer, fmt.pointer, _bits
    return flat_mask, (*arrays, _int64, _int64, _numbers(kinds, fmt))


def strided(
    function: Function,
    fmt: Format,
    *,
    kinds: Kinds,
    rank: int,
    wide: bool,
    weight: Format | None = None,
) -> Kernel:
    """Arrays of any layout, an element a thread; the strides of the result come last.

    Those of a mask count bits.
    """
    readers = _readers(kinds, fmt, 1, weight=weight)
    of_one, put = element(function, fmt.compute, 1, readers), store(fmt, 1)
    pointers = _pointers(kinds, fmt, weight)
    arrays = len(pointers) + 1
    unravelled, at = unravel(rank, wide=wide), offsets(rank, arrays)

    def strided(pointers, y, shape, strides, size, numbers):
        i = np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        if i < size:
            places = at(unravelled(i, shape), strides)
            put(y, places[-1], size, of_one(pointers, places, numbers, size))

    axes = types.UniTuple(_int64, rank), types.UniTuple(_int64, rank * arrays)
    return strided, (pointers, fmt.pointer, *axes, _int64, _numbers(kinds, fmt))


def strided_mask(
    function: Function,
    fmt: Format,
    *,
    kinds: Kinds,
    active: Function,
    kept: int,
    rank: int,
    wide: bool,
) -> Kernel:
    """Also write the mask bits, in the order of the axes: a byte a thread."""
    get, put = load(fmt, 1), store(fmt, 1)
    apply = each(function, fmt.compute, 1)
    passes, flags_of = each(active, types.boolean, 1, takes=1 + kept), pack(1)
    put_byte = put_flags(8)
    unravelled, at = unravel(rank, wide=wide), offsets(rank, 2)

    def strided_mask(x, y, bits, shape, strides, size, numbers):
        first = (np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x) * 8
        flags = np.int32(0)
        for k in range(8):
            if first + k < size:
                places = at(unravelled(first + k, shape), strides)
                operands = (get(x, places[0], size),) + numbers
                put(y, places[1], size, apply(operands))
                flags |= flags_of(passes(operands)) << np.int32(k)
        put_byte(bits, first, size, flags)

    axes = types.UniTuple(_int64, rank), types.UniTuple(_int64, 2 * rank)
    arrays = fmt.pointer, fmt.pointer, _bits
    return strided_mask, (*arrays, *axes, _int64, _numbers(kinds, fmt))


# The gradient towards a weight --------------------------------------------------------
#
# Each sum is a pair, the plain sum and what its roundings lost, so that its error does
# not grow with the number of terms.  Which terms meet in which order follows from the
# shape alone: arrays that are not aligned are cut into the same vectors.  Blocks leave
# their pairs in `sums`, one after another as (split, channel, place within the channel),
# and `finish` adds them up.


def _add(a, b):
    return a + b


def _share(fmt):
    """Return the formula of an element's share in its channel's gradient."""
    product = multiply(fmt)

    def share(g, x):
        return type(x)(0) if x > 0 else product(x, g)

    return share


def _adder(fmt: Format, width: int) -> Any:
    """Return `add(pair, g, x)` for vectors."""
    share = each(_share(fmt), fmt.compute, width)
    plus = each(_add, fmt.compute, width)
    lost = each(_sums.lost, fmt.compute, width)

    def add(pair, g, x):
        terms = share((g, x))
        total = plus((pair[0], terms))
        return total, plus((pair[1], lost((pair[0], terms, total))))

    return inlined(add)


def _folder(fmt: Format, width: int) -> Any:
    """Return `fold(pair)`: the pair of a vector's lanes, added up in a tree."""
    if width == 1:
        return inlined(lambda pair: (pair[0][0], pair[1][0]))
    half, rest = width // 2, _folder(fmt, width // 2)
    plus, lost = (each(of, fmt.compute, half) for of in (_add, _sums.lost))

    def fold(pair):
        a, b = pair[0][:half], pair[0][half:]
        total, losses = plus((a, b)), plus((pair[1][:half], pair[1][half:]))
        return rest((total, plus((losses, lost((a, b, total))))))

    return inlined(fold)


def _reducer(fmt: Format, length: int) -> Any:
    """Return a tree over so many pairs of a block, until `remain` are left."""
    lost = each(_sums.lost, fmt.compute, 1)

    def reduce(totals, losses, remain):
        thread = cuda.threadIdx.x
        half = length // 2
        while half >= remain:
            cuda.syncthreads()
            k = thread
            while k < half:
                a, b = totals[k], totals[k + half]
                total = a + b
                losses[k] += losses[k + half] + lost((a, b, total))[0]
                totals[k] = total
                k += THREADS
            half //= 2
        cuda.syncthreads()

    return inlined(reduce)


def _store_pair(fmt: Format) -> Any:
    put = store(fmt, 1)

    def store_pair(sums, at, total, lost):
        put(sums, 2 * at, 0, (total,))
        put(sums, 2 * at + 1, 0, (lost,))

    return inlined(store_pair)


def _sum_format(fmt: Format) -> Format:
    return Format(str(fmt.compute), fmt.compute, fmt.compute)


def _one_and_two(get: Any, put: Any, apply: Any, add: Any) -> tuple[Any, Any]:
    """Return what writes the gradient at one place, or two, and adds to a pair of sums.

    Two are read before either is written, for more loads on their way.
    """

    def one(arrays, i, slopes, pair):
        grad, x, y = arrays
        g, v = get(grad, i, 0), get(x, i, 0)
        put(y, i, 0, apply((g, v, slopes)))
        return add(pair, g, v)

    def two(arrays, i, j, slopes, pair):
        grad, x, y = arrays
        g, v = get(grad, i, 0), get(x, i, 0)
        h, w = get(grad, j, 0), get(x, j, 0)
        put(y, i, 0, apply((g, v, slopes)))
        put(y, j, 0, apply((h, w, slopes)))
        return add(add(pair, g, v), h, w)

    return inlined(one), inlined(two)


def prelu_rows(
    function: Function,
    fmt: Format,
    weight: Format,
    *,
    vectors: bool,
    aligned: bool,
    wide: bool,
) -> Kernel:
    """Both gradients for the view (outer, channel, inner): a block has one channel.

    With vectors, rows are whole ones; only a single row may end between.
    """
    width = fmt.width if vectors else 1
    index = np.int64 if wide else np.uint32
    get, get_part = load(fmt, width, aligned=aligned), load(fmt, width, part=True)
    put, put_part = store(fmt, width, aligned=aligned), store(fmt, width, part=True)
    get_weight = load(weight, 1)
    apply = each(function, fmt.compute, width)
    add, fold, reduce = (
        _adder(fmt, width),
        _folder(fmt, width),
        _reducer(fmt, THREADS),
    )
    one, two = _one_and_two(get, put, apply, add)
    put_pair, compute = _store_pair(_sum_format(fmt)), fmt.compute
    zeros = (fmt.scalar(0),) * width

    def place(q, channel, channels, inner):
        in_row = inner // width
        row = np.int64(index(q) // index(in_row))
        return (row * channels + channel) * inner + (q - row * in_row) * width

    place = inlined(place)

    def prelu_rows(grad, x, weight, y, sums, outer, channels, inner, splits):
        totals = cuda.shared.array(THREADS, compute)
        losses = cuda.shared.array(THREADS, compute)
        thread, block = cuda.threadIdx.x, np.int64(cuda.blockIdx.x)
        split = np.int64(index(block) // index(channels))
        channel = block - split * channels
        slope = get_weight(weight, channel, 0)[0]
        pair = zeros, zeros
        in_row = inner // width
        q, step, end = split * THREADS + thread, splits * THREADS, outer * in_row
        while q + step < end:
            i = place(q, channel, channels, inner)
            j = place(q + step, channel, channels, inner)
            pair = two((grad, x, y), i, j, slope, pair)
            q += 2 * step
        if q < end:
            i = place(q, channel, channels, inner)
            pair = one((grad, x, y), i, slope, pair)
        if split == 0 and thread == 0 and in_row * width < inner:
            i = in_row * width
            g, v = get_part(grad, i, inner), get_part(x, i, inner)
            put_part(y, i, inner, apply((g, v, slope)))
            pair = add(pair, g, v)
        totals[thread], losses[thread] = fold(pair)
        reduce(totals, losses, 1)
        if thread == 0:
            put_pair(sums, block, totals[0], losses[0])

    arrays = fmt.pointer, fmt.pointer, weight.pointer, fmt.pointer
    sums = types.CPointer(fmt.compute)
    return prelu_rows, (*arrays, sums, _int64, _int64, _int64, _int64)


def prelu_columns(
    function: Function,
    fmt: Format,
    weight: Format,
    *,
    vectors: bool,
    aligned: bool,
    wide: bool,
) -> Kernel:
    """The same where rows are short: a thread keeps to its columns of (outer, columns).

    With vectors, the rows of all channels together are whole ones.
    """
    width = fmt.width if vectors else 1
    index = np.int64 if wide else np.uint32
    get, put = load(fmt, width, aligned=aligned), store(fmt, width, aligned=aligned)
    get_weight = load(weight, 1)
    apply = each(function, fmt.compute, width)
    add, reduce = _adder(fmt, width), _reducer(fmt, THREADS * width)
    one, two = _one_and_two(get, put, apply, add)
    put_vector, put_pair = spill(fmt, width), _store_pair(_sum_format(fmt))
    compute, length = fmt.compute, THREADS * width
    zeros, lanes = (fmt.scalar(0),) * width, tuple(range(width))
    strip = ACROSS * width  # columns of a block

    def weight_at(k, column, inner, weight):
        channel = index(column + k) // index(inner)
        return get_weight(weight, np.int64(channel), 0)[0]

    gather = each(weight_at, fmt.compute, width)

    def prelu_columns(grad, x, weight, y, sums, outer, columns, inner, splits):
        totals = cuda.shared.array(length, compute)
        losses = cuda.shared.array(length, compute)
        thread, block = cuda.threadIdx.x, np.int64(cuda.blockIdx.x)
        # Blocks one after another do strips side by side: they share the memory's pages.
        strips = (columns + (strip - 1)) // strip
        split = np.int64(index(block) // index(strips))
        start = (block - split * strips) * strip
        column = start + thread % ACROSS * width
        pair = zeros, zeros
        if column < columns:
            slopes = gather((lanes, column, inner, weight))
            row, step = split * DOWN + thread // ACROSS, splits * DOWN
            while row + step < outer:
                i = row * columns + column
                pair = two((grad, x, y), i, i + step * columns, slopes, pair)
                row += 2 * step
            if row < outer:
                i = row * columns + column
                pair = one((grad, x, y), i, slopes, pair)
        put_vector(totals, thread * width, pair[0])
        put_vector(losses, thread * width, pair[1])
        reduce(totals, losses, strip)
        k = np.int64(thread)
        while k < strip and start + k < columns:
            put_pair(sums, split * columns + start + k, totals[k], losses[k])
            k += THREADS

    arrays = fmt.pointer, fmt.pointer, weight.pointer, fmt.pointer
    sums = types.CPointer(fmt.compute)
    return prelu_columns, (*arrays, sums, _int64, _int64, _int64, _int64)


def strided_sum(fmt: Format, *, kept: int, summed: int) -> Kernel:
    """The sums alone, for any layout of both arrays and of the weight.

    A block adds up along the axes that are summed, for one place along those that are
    kept.
    """
    get, add, reduce = load(fmt, 1), _adder(fmt, 1), _reducer(fmt, THREADS)
    put_pair = _store_pair(_sum_format(fmt))
    kept_place, kept_at = unravel(kept, wide=True), offsets(kept, 2)
    summed_place, summed_at = unravel(summed, wide=True), offsets(summed, 2)
    compute, zeros = fmt.compute, (fmt.scalar(0),)

    def strided_sum(
        grad, x, sums, kept, kept_strides, summed, summed_strides, channels, size,
        splits,
    ):  # fmt: skip
        totals = cuda.shared.array(THREADS, compute)
        losses = cuda.shared.array(THREADS, compute)
        thread, block = cuda.threadIdx.x, np.int64(cuda.blockIdx.x)
        split = block // channels
        place = kept_place(block - split * channels, kept)
        grad_start, x_start = kept_at(place, kept_strides)
        pair = zeros, zeros
        q = split * THREADS + thread
        while q < size:
            grad_place, x_place = summed_at(summed_place(q, summed), summed_strides)
            g, v = get(grad, grad_start + grad_place, 0), get(x, x_start + x_place, 0)
            pair = add(pair, g, v)
            q += splits * THREADS
        totals[thread] = pair[0][0]
        losses[thread] = pair[1][0]
        reduce(totals, losses, 1)
        if thread == 0:
            put_pair(sums, block, totals[0], losses[0])

    sums = types.CPointer(fmt.compute)
    lengths = kept, 2 * kept, summed, 2 * summed
    axes = [types.UniTuple(_int64, length) for length in lengths]
    numbers = *axes, _int64, _int64, _int64
    return strided_sum, (fmt.pointer, fmt.pointer, sums, *numbers)


def finish(fmt: Format) -> Kernel:
    """Add up the pairs of each channel, with a team of 1, 2, 4 ... threads for each."""
    pairs = _sum_format(fmt)
    get, put = load(pairs, 1), store(fmt, 1)
    lost = each(_sums.lost, fmt.compute, 1)
    compute, zero = fmt.compute, fmt.scalar(0)

    def finish(sums, weight, splits, channels, inner, team):
        totals = cuda.shared.array(THREADS, compute)
        losses = cuda.shared.array(THREADS, compute)
        thread = np.int64(cuda.threadIdx.x)
        seat = np.int64(np.uint32(thread) // np.uint32(team))
        seats = np.int64(np.uint32(THREADS) // np.uint32(team))
        channel = cuda.blockIdx.x * seats + seat
        member = thread - seat * team
        total, loss = zero, zero
        if channel < channels:
            q = member
            while q < splits * inner:
                split = np.int64(np.uint32(q) // np.uint32(inner))
                at = 2 * ((split * channels + channel) * inner + (q - split * inner))
                term = get(sums, at, 0)[0]
                following = total + term
                loss += lost((total, term, following))[0] + get(sums, at + 1, 0)[0]
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
                losses[thread] += losses[thread + half] + lost((a, b, total))[0]
                totals[thread] = total
            half //= 2
        if member == 0 and channel < channels:
            total, loss = totals[thread], losses[thread]
            if loss - loss == zero:  # else an infinity or NaN is in the sum itself
                total += loss
            put(weight, channel, 0, (total,))

    return finish, (
        types.CPointer(fmt.compute), fmt.pointer, _int64, _int64, _int64, _int64
    )  # fmt: skip


# By name ------------------------------------------------------------------------------


def build(
    template: str, options: dict[str, Any], capability: tuple[int, int]
) -> Kernel:
    """Return a kernel of this module, whose options name formats."""
    options = dict(options)
    for name in {"fmt", "weight"} & options.keys():
        options[name] = format_of(options[name], capability)
    made: Kernel = globals()[template](**options)
    return made
