"""The engine for arrays on a GPU: from any layout to kernels, and the result back.

Work is queued on the stream of the first array's library and nothing waits for it.
Arrays of dense layouts are worked on as flat memory, whatever the order of their axes;
all others element by element, through their strides.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fastrelu._arguments import is_on_gpu
from fastrelu.cuda import arrays, launch
from fastrelu.cuda.arrays import Array
from fastrelu.cuda.launch import THREADS, kernel

Function = Callable[..., Any]

__all__ = [
    "KIND",
    "as_array",
    "backward",
    "backward_mask",
    "empty_like",
    "forward",
    "prelu",
    "prelu_backward",
]

KIND = "an array on a GPU"
_BYTES = 16  # the widest access
_BLOCKS = 1056  # enough for any GPU, where a sum is split
_SHORT = 64  # rows of a weight up to here are better treated as columns
_DOWN = 8 if THREADS == 256 else 4  # rows that a block of columns works on at once
_INT32 = 2**31


# The protocol of the arguments' checks ------------------------------------------------


def as_array(value: Any) -> Array:
    """Return a value as an array of this engine, or raise a TypeError."""
    if not is_on_gpu(value):
        msg = f"got a {type(value).__name__} in the host's memory, and others on a GPU"
        raise TypeError(msg)
    return arrays.library_of(value).describe(value)


def empty_like(x: Array) -> Any:
    """Return a new array of x's library, device, shape and dtype."""
    with launch.current(x.device):
        return x.library.empty_like(x)


# Streams and memory -------------------------------------------------------------------


class _Work:
    """A call's device, stream and temporary memory."""

    def __init__(self, first: Array) -> None:
        self.first, self.device = first, first.device
        self.stream = first.library.stream(first)
        self.memory: list[Any] = []

    def run(self, kernel: launch.Kernel, threads: int, *arguments: Any) -> None:
        """Queue a kernel of so many threads."""
        blocks = max(1, -(-threads // THREADS))
        launch.launch(kernel, self.device, self.stream, blocks, *arguments)

    def empty(self, shape: tuple[int, ...], dtype: str, itemsize: int) -> Array:
        """Return a dense array for the duration of the call."""
        size = max(1, math.prod(shape)) * itemsize
        pointer, give_back = self.first.library.scratch(size, self.first, self.stream)
        self.memory.append(give_back)
        lies = arrays.addresses(pointer, shape, None, itemsize)
        return Array(self.first.library, None, dtype, self.device, lies)

    def copy(self, x: Array, y: Array | None = None) -> Array:
        """Write x to y, or to a dense array for the duration of the call."""
        y = self.empty(x.shape, x.dtype, x.itemsize) if y is None else y
        _elementwise(self, "input", _itself, x, x, y, 0.0)
        return y


@contextlib.contextmanager
def _work(first: Array, *others: Array) -> Iterator[_Work]:
    """Queue on the first array's stream, in order with the others' streams."""
    with launch.current(first.device):
        work = _Work(first)
        streams = {x.library.stream(x) for x in others} - {work.stream}
        for stream in streams:
            launch.wait(work.stream, stream)
        try:
            yield work
        finally:
            for give_back in work.memory:
                give_back()
            for stream in streams:
                launch.wait(stream, work.stream)


def _itself(x: Any, slope: Any) -> Any:
    return x


# Layout -------------------------------------------------------------------------------


def _memory_order(x: Array) -> list[int]:
    """Return the axes from the one with the largest stride to the smallest."""
    return sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))


def _is_flat(x: Array, order: Sequence[int]) -> bool:
    return bool(x.addresses.transpose(order).flags.c_contiguous)


def _overlaps(x: Array, y: Array) -> bool:
    """Say whether some element of x lies on another one of y."""
    if not np.may_share_memory(x.addresses, y.addresses):
        return False
    same = x.pointer == y.pointer and x.shape == y.shape and x.itemsize == y.itemsize
    return not (same and _steps(x) == _steps(y))


def _steps(x: Array) -> list[int]:
    """Return the strides that say anything."""
    return [s for s, n in zip(x.strides, x.shape, strict=True) if n > 1]


def _compute(dtype: str) -> Any:
    """Return the type of products."""
    return np.float32 if dtype in ("float16", "bfloat16") else getattr(np, dtype)


def _collapse(
    shape: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Merge axes that lie behind one another in every array; there is at least one."""
    merged: list[list[int]] = []  # [length, stride, stride, ...]
    for axis, length in enumerate(shape):
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
    columns = [tuple(column) for column in zip(*merged, strict=True)]
    return columns[0], columns[1:]


def _in_elements(x: Array, addresses: Any = None) -> list[int]:
    """Return the strides of x, or of a view of it, in elements."""
    strides = (x.addresses if addresses is None else addresses).strides
    return [stride // x.itemsize for stride in strides]


def _c_strides(shape: Sequence[int]) -> list[int]:
    """Return the strides, in elements, of an array in C order."""
    lengths = [*shape[1:], 1]
    return [math.prod(lengths[axis:]) for axis in range(len(shape))]


def _head(size: int, *flat: Array) -> int | None:
    """Return the elements before the first whole vector, or None: places differ."""
    offset, itemsize = flat[0].pointer % _BYTES, flat[0].itemsize
    if any(x.pointer % _BYTES != offset for x in flat) or offset % itemsize:
        return None
    return min(size, -offset % _BYTES // itemsize)


# Elementwise --------------------------------------------------------------------------


def _elementwise(
    work: _Work, element: str, formula: Function, a: Array, b: Array, y: Array, s: float
) -> None:
    """Write the formula of a, and of b or the slope s, into y of the same shape.

    For "flag", b holds mask bits in C order; for "strided", weights that are spread.
    """
    if a.size == 0:
        return
    scalar = _compute(a.dtype)(s)
    order = list(range(y.ndim)) if element == "flag" else _memory_order(y)
    flat = element != "strided" and _is_flat(a, order) and _is_flat(y, order)
    flat = flat and (element != "gradient" or _is_flat(b, order))
    head = None
    if flat:
        head = _head(a.size, a, y, *([b] if element == "gradient" else []))
    if head is not None and not (element == "flag" and head):
        vectors = (a.size - head) // (_BYTES // a.itemsize)
        code = kernel(
            "flat", element=element, formula=formula, lane=a.dtype, wide=False
        )
        pointers = a.pointer, b.pointer, y.pointer
        threads = -(-vectors // 2)
        work.run(code, threads, *pointers, head, vectors, a.size, scalar)
        return
    strides = [_in_elements(x) for x in (a, b if element != "flag" else a, y)]
    if element == "flag":
        strides[1] = _c_strides(a.shape)
    shape = [a.shape[axis] for axis in order]
    axes, steps = _collapse(
        shape, [[stride[axis] for axis in order] for stride in strides]
    )
    options: dict[str, Any] = {"weight": b.dtype} if element == "strided" else {}
    code = kernel(
        "strided",
        element=element,
        formula=formula,
        lane=a.dtype,
        rank=len(axes),
        wide=a.size >= _INT32,
        **options,
    )
    pointers = a.pointer, b.pointer, y.pointer
    work.run(code, a.size, *pointers, axes, *steps, a.size, scalar)


def _target(work: _Work, out: Array, *inputs: Array) -> Array:
    """Return where to write: another array if an input overlaps `out` in part."""
    if any(_overlaps(x, out) for x in inputs):
        return work.empty(out.shape, out.dtype, out.itemsize)
    return out


def forward(
    formula: Function, x: Array, slope: float, out: Array, *, want_mask: bool
) -> Any:
    """Write formula(x, slope) into out; return the mask bits if they are wanted."""
    with _work(x, out) as work:
        y = _target(work, out, x)
        bits = None
        if want_mask:
            bits = x.library.empty_bytes(-(-x.size // 8), x)
            _with_mask(work, formula, x, slope, y, as_array(bits))
        else:
            _elementwise(work, "input", formula, x, x, y, slope)
        if y is not out:
            work.copy(y, out)
    return bits


def _with_mask(
    work: _Work, formula: Function, x: Array, slope: float, y: Array, bits: Array
) -> None:
    if x.size == 0:
        return
    scalar = _compute(x.dtype)(slope)
    order = list(range(x.ndim))
    pointers = x.pointer, y.pointer, bits.pointer
    flat = _is_flat(x, order) and _is_flat(y, order)
    if flat and x.pointer % _BYTES == y.pointer % _BYTES == 0:
        width = _BYTES // x.itemsize
        vectors = x.size // width
        code = kernel("flat_mask", formula=formula, lane=x.dtype)
        work.run(code, vectors + 1, *pointers, vectors, x.size, scalar)
        return
    axes, steps = _collapse(x.shape, [_in_elements(x), _in_elements(y)])
    code = kernel(
        "strided_mask",
        formula=formula,
        lane=x.dtype,
        rank=len(axes),
        wide=x.size >= _INT32,
    )
    work.run(code, -(-x.size // 8), *pointers, axes, *steps, x.size, scalar)


def backward(
    gradient: Function, grad: Array, saved: Array, slope: float, out: Array
) -> None:
    """Write gradient(grad, saved, slope) into out."""
    with _work(grad, saved, out) as work:
        y = _target(work, out, grad, saved)
        _elementwise(work, "gradient", gradient, grad, saved, y, slope)
        if y is not out:
            work.copy(y, out)


def backward_mask(
    gradient: Function, grad: Array, bits: Any, slope: float, out: Array
) -> None:
    """Write gradient(grad, 1 or 0, slope) into out; the bits are in C order."""
    packed = as_array(bits)
    with _work(grad, packed, out) as work:
        if not _is_flat(packed, [0]) or np.may_share_memory(
            packed.addresses, out.addresses
        ):
            packed = work.copy(packed)
        y = _target(work, out, grad)
        _elementwise(work, "flag", gradient, grad, packed, y, slope)
        if y is not out:
            work.copy(y, out)


# A weight for each channel ------------------------------------------------------------


def _channels(
    shape: Sequence[int], weight: Any, itemsize: int
) -> tuple[int, int, int] | None:
    """Return (outer, channels, inner) if the weight lies so, one for each channel."""
    vary = [axis for axis, size in enumerate(weight.shape) if size > 1]
    first, last = (vary[0], vary[-1] + 1) if vary else (0, 0)
    step = itemsize
    for axis in reversed(range(first, last)):
        if weight.shape[axis] != shape[axis]:
            return None
        if shape[axis] > 1 and weight.strides[axis] != step:
            return None
        step *= shape[axis]
    outer, inner = math.prod(shape[:first]), math.prod(shape[last:])
    return outer, math.prod(shape[first:last]), inner


def _view(order: Sequence[int], weight: Array, *flat: Array) -> Any:
    """Return (outer, channels, inner) if all lie so in memory, else None."""
    if not all(_is_flat(x, order) for x in flat):
        return None
    shape = flat[0].addresses.transpose(order).shape
    lies = weight.addresses.transpose(order)
    return _channels(shape, lies, weight.itemsize)


def prelu(formula: Function, x: Array, weight: Array, out: Array) -> None:
    """Write formula(x, weight of x's channel) into out."""
    with _work(x, weight, out) as work:
        y = _target(work, out, x)
        if np.may_share_memory(weight.addresses, y.addresses):
            weight = work.copy(weight)
        _meet(work, formula, x, weight, y)
        if y is not out:
            work.copy(y, out)


def _meet(work: _Work, formula: Function, x: Array, weight: Array, y: Array) -> None:
    """Write the formula of x and its channel's weight into y."""
    if x.size == 0:
        return
    view = _view(_memory_order(y), weight, x, y)
    head = None if view is None else _head(x.size, x, y)
    if view is not None and head is not None:
        _, channels, inner = view
        width = _BYTES // x.itemsize
        columns = inner == 1 and channels >= width
        if columns or inner >= width:
            vectors = (x.size - head) // width
            code = kernel(
                "flat",
                element="columns" if columns else "rows",
                formula=formula,
                lane=x.dtype,
                weight=weight.dtype,
                wide=x.size >= _INT32,
            )
            pointers = x.pointer, weight.pointer, y.pointer
            layout = inner, channels
            threads = -(-vectors // 2)
            work.run(code, threads, *pointers, head, vectors, x.size, layout)
            return
    spread = weight.like(np.broadcast_to(weight.addresses, x.shape))
    _elementwise(work, "strided", formula, x, spread, y, 0.0)


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
        y = _target(work, out, grad, x)
        if np.may_share_memory(weight.addresses, y.addresses):
            weight = work.copy(weight)
        dense = _is_flat(out_weight, range(out_weight.ndim))
        total = out_weight
        if not dense:
            total = work.empty(out_weight.shape, out_weight.dtype, out_weight.itemsize)
        sums = _both(work, gradient, grad, x, weight, y)
        if sums is None:
            sums = _sum(work, grad, x, weight)
            _gradient(work, gradient, grad, x, weight, y)
        # Last, because the result may go where an input is.
        _finish(work, total, *sums)
        if y is not out:
            work.copy(y, out)
        if total is not out_weight:
            work.copy(total, out_weight)


_Sums = tuple[Array, int, int, int]  # pairs of (splits, channels, inner)


def _both(
    work: _Work,
    gradient: Function,
    grad: Array,
    x: Array,
    weight: Array,
    y: Array,
) -> _Sums | None:
    """Write the gradient towards x and return sums, where all lies flat, or None."""
    order = _memory_order(y)
    vary = [axis for axis, size in enumerate(weight.shape) if size > 1]
    view = _view(order, weight, grad, x, y)
    if view is None or not x.size or [axis for axis in order if axis in vary] != vary:
        return None
    outer, channels, inner = view
    aligned = _head(x.size, grad, x, y) == 0
    width = _BYTES // x.itemsize
    options = {
        "gradient": gradient,
        "lane": x.dtype,
        "weight": weight.dtype,
        "wide": x.size >= _INT32,
    }
    pointers = grad.pointer, x.pointer, weight.pointer, y.pointer
    if channels == 1 or inner > _SHORT:
        single = outer * channels == 1
        vectors = aligned and (single or inner % width == 0) and inner >= width
        in_row = inner // width if vectors else inner
        most = -(-outer * in_row // THREADS)
        splits = max(1, min(most, -(-_BLOCKS // channels)))
        sums = _pairs(work, x, splits * channels)
        code = kernel("prelu_rows", vectors=vectors, **options)
        sizes = outer, channels, inner, splits
        threads = splits * channels * THREADS
        work.run(code, threads, *pointers, sums.pointer, *sizes)
        return sums, splits, channels, 1
    columns = channels * inner
    vectors = aligned and columns % width == 0
    strips = -(-columns // (THREADS // _DOWN * (width if vectors else 1)))
    splits = max(1, min(-(-outer // _DOWN), -(-_BLOCKS // strips)))
    sums = _pairs(work, x, splits * columns)
    code = kernel("prelu_columns", vectors=vectors, **options)
    sizes = outer, columns, inner, splits
    work.run(code, strips * splits * THREADS, *pointers, sums.pointer, *sizes)
    return sums, splits, channels, inner


def _pairs(work: _Work, x: Array, number: int) -> Array:
    compute = np.dtype(_compute(x.dtype))
    return work.empty((2 * number,), compute.name, compute.itemsize)


def _sum(work: _Work, grad: Array, x: Array, weight: Array) -> _Sums:
    """Return the sums of arrays of any layout."""
    kept = [axis for axis, size in enumerate(weight.shape) if size > 1]
    summed = [axis for axis in range(x.ndim) if axis not in kept]
    strides = _in_elements(grad), _in_elements(x)

    def along(axes: list[int]) -> Any:
        shape = [x.shape[axis] for axis in axes]
        return _collapse(shape, [[step[axis] for axis in axes] for step in strides])

    channels = math.prod(x.shape[axis] for axis in kept)
    size = math.prod(x.shape[axis] for axis in summed)
    splits = max(1, min(-(-size // THREADS), -(-_BLOCKS // max(1, channels))))
    sums = _pairs(work, x, splits * channels)
    if x.size == 0:
        return sums, 0, weight.size, 1
    (kept_axes, kept_steps), (summed_axes, summed_steps) = along(kept), along(summed)
    code = kernel(
        "strided_sum", lane=x.dtype, kept=len(kept_axes), summed=len(summed_axes)
    )
    pointers = grad.pointer, x.pointer, sums.pointer
    layout = kept_axes, *kept_steps, summed_axes, *summed_steps
    threads = splits * channels * THREADS
    work.run(code, threads, *pointers, *layout, channels, size, splits)
    return sums, splits, channels, 1


def _gradient(
    work: _Work,
    gradient: Function,
    grad: Array,
    x: Array,
    weight: Array,
    y: Array,
) -> None:
    """Write the gradient towards x of arrays of any layout."""
    if x.size == 0:
        return
    order = _memory_order(y)
    spread = _in_elements(weight, np.broadcast_to(weight.addresses, x.shape))
    strides = [_in_elements(grad), _in_elements(x), spread, _in_elements(y)]
    axes, steps = _collapse(
        [x.shape[axis] for axis in order],
        [[step[axis] for axis in order] for step in strides],
    )
    code = kernel(
        "strided_gradient",
        gradient=gradient,
        lane=x.dtype,
        weight=weight.dtype,
        rank=len(axes),
        wide=x.size >= _INT32,
    )
    pointers = grad.pointer, x.pointer, weight.pointer, y.pointer
    work.run(code, x.size, *pointers, axes, *steps, x.size)


def _finish(
    work: _Work, total: Array, sums: Array, splits: int, channels: int, inner: int
) -> None:
    """Add up the sums of each channel into a dense array."""
    if not total.size:
        return
    team = 1
    while team < min(splits * inner, THREADS // 2):
        team *= 2
    sizes = splits, channels, inner, team
    code = kernel("finish", lane=total.dtype)
    work.run(code, total.size * team, sums.pointer, total.pointer, *sizes)
