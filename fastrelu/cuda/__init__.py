"""The engine for arrays on a GPU: from any layout to kernels, and the result back.

Work is queued on the stream of the first array's library and nothing waits for it.
Arrays of dense layouts are worked on as flat memory, whatever the order of their axes;
all others element by element, through their strides.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastrelu._arguments import is_on_gpu, kind_of
from fastrelu.cuda import arrays, launch
from fastrelu.cuda.arrays import Array, c_strides
from fastrelu.cuda.calls import Calls
from fastrelu.cuda.launch import THREADS, kernel
from fastrelu.cuda.work import (
    INT32,
    Sums,
    Work,
    both,
    compute_of,
    finish,
    head_of,
    pairs,
    run_flat,
    run_mask,
    splits_of,
    weight_layout,
)

Function = Callable[..., Any]

__all__ = [
    "KIND",
    "Calls",
    "backward",
    "backward_mask",
    "empty_like",
    "forward",
    "hold",
    "prelu",
    "prelu_backward",
    "read",
]

KIND = "an array on a GPU"


# The protocol of the arguments' checks ------------------------------------------------


def read(value: Any, *, convert: bool = True) -> Array:
    """Return a value as an array of this engine; none can be made of another thing."""
    if not is_on_gpu(value):
        msg = f"as the others are, got {kind_of(value)} in the host's memory"
        raise TypeError(msg)
    return arrays.library_of(type(value)).describe(value)


def hold(x: Array) -> Array:
    """Return what `read` returned: it is ours alone already."""
    return x


def empty_like(x: Array) -> Any:
    """Return a new array of x's library, device, shape and dtype."""
    with launch.current(x.device):
        return x.library.empty_like(x.given)


# Streams and memory -------------------------------------------------------------------


@contextlib.contextmanager
def _work(first: Array, *others: Array) -> Iterator[Work]:
    """Queue on the first array's stream, in order with the others' streams."""
    with launch.current(first.device):
        work = Work(first.library, first.given, first.device)
        streams = {x.library.stream(x.given, x.device) for x in others} - {work.stream}
        for stream in streams:
            launch.wait(work.stream, stream)
        try:
            yield work
        finally:
            work.close()
            for stream in streams:
                launch.wait(stream, work.stream)


def _empty(work: Work, shape: tuple[int, ...], dtype: str, itemsize: int) -> Array:
    """Return a dense array for the duration of the call."""
    pointer = work.lend(math.prod(shape) * itemsize)
    lies = pointer, shape, None, itemsize
    return Array(work.library, None, dtype, work.device, *lies)


def _copy(work: Work, x: Array, y: Array | None = None) -> Array:
    """Write x to y, or to a dense array for the duration of the call."""
    y = _empty(work, x.shape, x.dtype, x.itemsize) if y is None else y
    a, b = (x, y) if x.is_aligned and y.is_aligned else (x.in_bytes(), y.in_bytes())
    _elementwise(work, "input", _itself, a, a, b, 0.0)
    return y


def _itself(x: Any, slope: Any) -> Any:
    return x


def _aligned(work: Work, *inputs: Array) -> list[Array]:
    """Return arrays that a GPU can read: copies of those whose elements it cannot."""
    return [x if x.is_aligned else _copy(work, x) for x in inputs]


# Layout -------------------------------------------------------------------------------


def _memory_order(x: Array) -> list[int]:
    """Return the axes from the one with the largest stride to the smallest."""
    return sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))


def _is_flat(x: Array, order: Sequence[int]) -> bool:
    """Say whether the elements follow one another in this order of the axes."""
    shape = [x.shape[axis] for axis in order]
    steps = zip(order, shape, c_strides(shape, x.itemsize), strict=True)
    return not x.size or all(n == 1 or x.strides[axis] == s for axis, n, s in steps)


def _overlaps(x: Array, y: Array) -> bool:
    """Say whether some element of x lies on another one of y."""
    if not x.meets(y):
        return False
    same = x.pointer == y.pointer and x.shape == y.shape and x.itemsize == y.itemsize
    return not (same and _steps(x) == _steps(y))


def _steps(x: Array) -> list[int]:
    """Return the strides that say anything."""
    return [s for s, n in zip(x.strides, x.shape, strict=True) if n > 1]


def _collapse(
    order: Sequence[int], shape: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[int, list[int]]:
    """Merge axes that lie behind one another in every array; there is at least one.

    Return how many are left, and their lengths and each array's strides in one list.
    """
    merged: list[list[int]] = []  # [length, stride, stride, ...]
    for axis in order:
        length = shape[axis]
        if length == 1:
            continue
        steps = [stride[axis] for stride in strides]
        if merged and all(
            before == step * length
            for before, step in zip(merged[-1][1:], steps, strict=True)
        ):
            merged[-1] = [merged[-1][0] * length, *steps]
        else:
            merged.append([length, *steps])
    if not merged:
        merged = [[1] + [0] * len(strides)]
    columns = zip(*merged, strict=True)
    return len(merged), [number for column in columns for number in column]


def _head(order: Sequence[int], *flat: Array) -> int | None:
    """Return the elements before the first whole vector, or None: not flat alike."""
    if not all(_is_flat(x, order) for x in flat):
        return None
    first = flat[0]
    return head_of(first.size, first.itemsize, *(x.pointer for x in flat))


def _in_elements(x: Array) -> list[int]:
    """Return the strides in elements."""
    return [stride // x.itemsize for stride in x.strides]


# Elementwise --------------------------------------------------------------------------


def _elementwise(
    work: Work, element: str, formula: Function, a: Array, b: Array, y: Array, s: float
) -> None:
    """Write the formula of a, and of b or the slope s, into y of the same shape.

    For "flag", b holds mask bits in C order; for "strided", weights that are spread.
    """
    if a.size == 0:
        return
    scalar = compute_of(a.dtype)(s)
    order = list(range(y.ndim)) if element == "flag" else _memory_order(y)
    flat = (a, y, b) if element == "gradient" else (a, y)
    head = None if element == "strided" else _head(order, *flat)
    pointers = a.pointer, b.pointer, y.pointer
    options: dict[str, Any] = {"element": element, "formula": formula, "lane": a.dtype}
    if head == 0 or (head is not None and element != "flag"):
        code = kernel("flat", wide=False, **options)
        where = work.device, work.stream
        run_flat(code, *where, a.itemsize, a.size, head, *pointers, scalar)
        return
    if element == "strided":
        options["weight"] = b.dtype
    strides = [_in_elements(x) for x in (a, b, y)]
    if element == "flag":
        strides[1] = c_strides(a.shape, 1)
    rank, axes = _collapse(order, a.shape, strides)
    code = kernel("strided", rank=rank, wide=a.size >= INT32, **options)
    work.run(code, a.size, *pointers, *axes, a.size, scalar)


def _target(work: Work, out: Array, *inputs: Array) -> Array:
    """Return where to write: another array if an input overlaps `out` in part.

    Or if a GPU cannot write to its elements.
    """
    if not out.is_aligned or any(_overlaps(x, out) for x in inputs):
        return _empty(work, out.shape, out.dtype, out.itemsize)
    return out


def forward(
    formula: Function, x: Array, slope: float, out: Array, *, want_mask: bool
) -> Any:
    """Write formula(x, slope) into out; return the mask bits if they are wanted."""
    with _work(x, out) as work:
        (x,) = _aligned(work, x)
        y = _target(work, out, x)
        bits = None
        if want_mask:
            bits = x.library.empty_bytes(-(-x.size // 8), x.given)
            _with_mask(work, formula, x, slope, y, x.library.address(bits))
        else:
            _elementwise(work, "input", formula, x, x, y, slope)
        if y is not out:
            _copy(work, y, out)
    return bits


def _with_mask(
    work: Work, formula: Function, x: Array, slope: float, y: Array, bits: int
) -> None:
    if x.size == 0:
        return
    scalar = compute_of(x.dtype)(slope)
    order = range(x.ndim)
    pointers = x.pointer, y.pointer, bits
    if _head(order, x, y) == 0:
        code = kernel("flat_mask", formula=formula, lane=x.dtype)
        where = work.device, work.stream
        run_mask(code, *where, x.itemsize, x.size, *pointers, scalar)
        return
    rank, axes = _collapse(order, x.shape, [_in_elements(x), _in_elements(y)])
    options = {"rank": rank, "wide": x.size >= INT32}
    code = kernel("strided_mask", formula=formula, lane=x.dtype, **options)
    work.run(code, -(-x.size // 8), *pointers, *axes, x.size, scalar)


def backward(
    gradient: Function, grad: Array, saved: Array, slope: float, out: Array
) -> None:
    """Write gradient(grad, saved, slope) into out."""
    with _work(grad, saved, out) as work:
        grad, saved = _aligned(work, grad, saved)
        y = _target(work, out, grad, saved)
        _elementwise(work, "gradient", gradient, grad, saved, y, slope)
        if y is not out:
            _copy(work, y, out)


def backward_mask(
    gradient: Function, grad: Array, bits: Array, slope: float, out: Array
) -> None:
    """Write gradient(grad, 1 or 0, slope) into out; the bits are in C order."""
    with _work(grad, bits, out) as work:
        (grad,) = _aligned(work, grad)
        if not _is_flat(bits, [0]) or bits.meets(out):
            bits = _copy(work, bits)
        y = _target(work, out, grad)
        _elementwise(work, "flag", gradient, grad, bits, y, slope)
        if y is not out:
            _copy(work, y, out)


# A weight for each channel ------------------------------------------------------------


def _view(
    order: Sequence[int], weight: Array, *flat: Array
) -> tuple[int, int, int] | None:
    """Return (outer, channels, inner) if all lie so in memory, else None."""
    if not all(_is_flat(x, order) for x in flat):
        return None
    shape = [flat[0].shape[axis] for axis in order]
    lengths = [weight.shape[axis] for axis in order]
    vary = [k for k, size in enumerate(lengths) if size > 1]
    first, last = (vary[0], vary[-1] + 1) if vary else (0, 0)
    channels = shape[first:last]
    if lengths[first:last] != channels or not _is_flat(weight, order[first:last]):
        return None
    return math.prod(shape[:first]), math.prod(channels), math.prod(shape[last:])


def prelu(formula: Function, x: Array, weight: Array, out: Array) -> None:
    """Write formula(x, weight of x's channel) into out."""
    with _work(x, weight, out) as work:
        x, weight = _aligned(work, x, weight)
        y = _target(work, out, x)
        if weight.meets(y):
            weight = _copy(work, weight)
        _meet(work, formula, x, weight, y)
        if y is not out:
            _copy(work, y, out)


def _meet(work: Work, formula: Function, x: Array, weight: Array, y: Array) -> None:
    """Write the formula of x and its channel's weight into y."""
    if x.size == 0:
        return
    order = _memory_order(y)
    view, head = _view(order, weight, x, y), _head(order, x, y)
    element = None if view is None else weight_layout(*view[1:], x.itemsize)
    if view is None or head is None or element is None:
        spread = weight.spread(x.shape)
        _elementwise(work, "strided", formula, x, spread, y, 0.0)
        return
    _, channels, inner = view
    options = {"formula": formula, "lane": x.dtype, "weight": weight.dtype}
    code = kernel("flat", element=element, wide=x.size >= INT32, **options)
    pointers = x.pointer, weight.pointer, y.pointer
    where = work.device, work.stream
    run_flat(code, *where, x.itemsize, x.size, head, *pointers, inner, channels)


def prelu_backward(
    gradient: Function,
    grad: Array,
    x: Array,
    weight: Array,
    out: Array,
    out_weight: Array,
) -> None:
    """Write the gradient towards x into out and that towards weight into out_weight."""
    with _work(grad, x, weight, out, out_weight) as work:
        grad, x, weight = _aligned(work, grad, x, weight)
        y = _target(work, out, grad, x)
        if weight.meets(y):
            weight = _copy(work, weight)
        total = out_weight
        if not total.is_aligned or not _is_flat(total, range(total.ndim)):
            total = _empty(work, total.shape, total.dtype, total.itemsize)
        order = _memory_order(y)
        vary = [axis for axis, size in enumerate(weight.shape) if size > 1]
        view = _view(order, weight, grad, x, y)
        if view and x.size and [axis for axis in order if axis in vary] == vary:
            pointers = grad.pointer, x.pointer, weight.pointer, y.pointer
            dtypes = x.dtype, weight.dtype
            sums = both(work, gradient, dtypes, x.itemsize, pointers, view)
        else:
            sums = _sum(work, grad, x, weight)
            _gradient(work, gradient, grad, x, weight, y)
        # Last, because the result may go where an input is.
        finish(work, total.dtype, total.pointer, total.size, sums)
        if y is not out:
            _copy(work, y, out)
        if total is not out_weight:
            _copy(work, total, out_weight)


def _sum(work: Work, grad: Array, x: Array, weight: Array) -> Sums:
    """Return the sums of arrays of any layout."""
    kept = [axis for axis, size in enumerate(weight.shape) if size > 1]
    summed = [axis for axis in range(x.ndim) if axis not in kept]
    strides = _in_elements(grad), _in_elements(x)
    channels = math.prod(x.shape[axis] for axis in kept)
    size = math.prod(x.shape[axis] for axis in summed)
    splits = splits_of(size, channels)
    pointer = pairs(work, x.dtype, splits * channels)
    if x.size == 0:
        return Sums(pointer, 0, weight.size, 1)
    kept_rank, kept_axes = _collapse(kept, x.shape, strides)
    summed_rank, summed_axes = _collapse(summed, x.shape, strides)
    code = kernel("strided_sum", lane=x.dtype, kept=kept_rank, summed=summed_rank)
    threads = splits * channels * THREADS
    pointers = grad.pointer, x.pointer, pointer
    work.run(code, threads, *pointers, *kept_axes, *summed_axes, channels, size, splits)
    return Sums(pointer, splits, channels, 1)


def _gradient(
    work: Work, gradient: Function, grad: Array, x: Array, weight: Array, y: Array
) -> None:
    """Write the gradient towards x of arrays of any layout."""
    if x.size == 0:
        return
    every = grad, x, weight.spread(x.shape), y
    strides = [_in_elements(array) for array in every]
    rank, axes = _collapse(_memory_order(y), x.shape, strides)
    options = {"rank": rank, "wide": x.size >= INT32}
    dtypes = {"lane": x.dtype, "weight": weight.dtype}
    code = kernel("strided_gradient", gradient=gradient, **dtypes, **options)
    work.run(code, x.size, *(a.pointer for a in every), *axes, x.size)
