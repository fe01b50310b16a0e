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
from fastrelu._layout import (
    Axes,
    collapse,
    is_flat,
    memory_order,
    parts_of,
    strides_of,
)
from fastrelu._spec import ARRAY, BITS, NUMBER, WEIGHT
from fastrelu.cuda import arrays, launch
from fastrelu.cuda.arrays import Array
from fastrelu.cuda.calls import Calls
from fastrelu.cuda.config import THREADS
from fastrelu.cuda.work import (
    INT32,
    Sums,
    Work,
    both,
    compute_of,
    finish,
    head_of,
    kernel,
    pairs,
    run_flat,
    run_mask,
    splits_of,
    weight_layout,
)

Function = Callable[..., Any]
Operands = Sequence[tuple[str, Any]]  # kinds and values: of bits (array, axes)

__all__ = [
    "KIND",
    "Calls",
    "elementwise",
    "elementwise_mask",
    "empty_like",
    "hold",
    "lend",
    "prelu_backward",
    "read",
    "uniform",
    "written",
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


def as_came(y: Any, *given: Any) -> Any:
    """Return a result, which is of the first argument's library already."""
    return y


def written(given: Any) -> None:
    """Let an array's library know that its memory was written to."""
    arrays.library_of(type(given)).written(given)


def lend(*given: Array) -> None:
    """Take note of arrays that a call has for itself: a captured graph needs them."""
    for x in given:
        x.library.keep(x.given, x.library.stream(x.given, x.device))


def empty_like(x: Array) -> Any:
    """Return a new array of x's library, device, shape and dtype."""
    with launch.current(x.device):
        return x.library.empty_like(x.given)


def uniform(x: Array, lower: float, upper: float, rng: Any) -> Any:
    """Return an array like x of numbers that its library draws."""
    with launch.current(x.device):
        return x.library.uniform(x.given, lower, upper, rng)


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
    _run(work, _itself, [(ARRAY, a)], b)
    return y


def _itself(x: Any) -> Any:
    return x


def _aligned(work: Work, x: Array) -> Array:
    """Return an array that a GPU can read: a copy of one whose elements it cannot."""
    return x if x.is_aligned else _copy(work, x)


# Layout -------------------------------------------------------------------------------


def _steps(x: Array) -> Axes:
    """Return the strides in elements."""
    return tuple(stride // x.itemsize for stride in x.strides)


def _order(x: Array) -> Axes:
    return memory_order(x.shape, _steps(x))


def _head(order: Sequence[int], *flat: Array) -> int | None:
    """Return the elements before the first whole vector, or None: not flat alike."""
    if not all(is_flat(order, x.shape, _steps(x)) for x in flat):
        return None
    first = flat[0]
    return head_of(first.size, first.itemsize, *(x.pointer for x in flat))


def _overlaps(x: Array, y: Array) -> bool:
    """Say whether some element of x lies on another one of y."""
    if not x.meets(y):
        return False
    same = x.pointer == y.pointer and x.shape == y.shape and x.itemsize == y.itemsize
    lengths = zip(x.shape, x.strides, y.strides, strict=True) if same else ()
    return not (same and all(n == 1 or a == b for n, a, b in lengths))


def _target(work: Work, out: Array, *inputs: Array) -> Array:
    """Return where to write: another array if an input overlaps `out` in part.

    Or if a GPU cannot write to its elements.
    """
    if not out.is_aligned or any(_overlaps(x, out) for x in inputs):
        return _empty(work, out.shape, out.dtype, out.itemsize)
    return out


def _view(order: Axes, weight: Array, *flat: Array) -> tuple[int, int, int] | None:
    """Return (outer, channels, inner) if all lie so in memory, else None."""
    if not all(is_flat(order, x.shape, _steps(x)) for x in flat):
        return None
    return parts_of(order, flat[0].shape, weight.shape, _steps(weight))


# Elementwise --------------------------------------------------------------------------


def elementwise(function: Function, operands: Operands, out: Array) -> None:
    """Write the function of the operands into out."""
    with _work(*_in_memory(operands), out) as work:
        operands, y = _lay(work, operands, out)
        _run(work, function, operands, y)
        if y is not out:
            _copy(work, y, out)


def elementwise_mask(
    function: Function,
    active: Function,
    kept: int,
    operands: Operands,
    out: Array,
) -> tuple[Any, Axes]:
    """Also return the bits of what is active, in the order of the result's memory.

    The operands are an array and numbers, of which the first `kept` decide.
    """
    _, x = operands[0]
    with _work(x, out) as work:
        operands, y = _lay(work, operands, out)
        bits, order = x.library.empty_bytes(-(-x.size // 8), x.given), _order(out)
        to = y, x.library.address(bits)
        _run_mask(work, function, active, kept, operands, order, *to)
        if y is not out:
            _copy(work, y, out)
    return bits, order


def _in_memory(operands: Operands) -> list[Array]:
    """Return the operands that lie in memory."""
    return [
        value[0] if kind == BITS else value
        for kind, value in operands
        if kind != NUMBER
    ]


def _lay(work: Work, operands: Operands, out: Array) -> tuple[Operands, Array]:
    """Return the operands as a GPU can read them, and where to write."""
    laid: list[tuple[str, Any]] = [
        (kind, _aligned(work, value) if kind in (ARRAY, WEIGHT) else value)
        for kind, value in operands
    ]
    y = _target(work, out, *(value for kind, value in laid if kind == ARRAY))
    for k, (kind, value) in enumerate(laid):
        # Several threads read the same byte or slope, some of them after another's write.
        if kind == WEIGHT and value.meets(y):
            laid[k] = kind, _copy(work, value)
        elif kind == BITS:
            bits, order = value
            if bits.meets(y) or not is_flat([0], bits.shape, _steps(bits)):
                laid[k] = kind, (_copy(work, bits), order)
    return laid, y


def _numbers(operands: Operands, y: Array) -> list[Any]:
    """Return the numbers among the operands in the type of products."""
    compute = compute_of(y.dtype)
    return [compute(value) for kind, value in operands if kind == NUMBER]


def _run(work: Work, function: Function, operands: Operands, y: Array) -> None:
    """Write the function of the operands into y."""
    if y.size == 0:
        return
    kinds = tuple(kind for kind, _ in operands)
    options: dict[str, Any] = {"function": function, "kinds": kinds, "fmt": y.dtype}
    options |= {kind: x.dtype for kind, x in operands if kind == WEIGHT}
    pointers = *(x.pointer for x in _in_memory(operands)), y.pointer
    numbers, order = _numbers(operands, y), _order(y)
    flat = _flat(order, operands, y)
    if flat:
        head, more, view = flat
        code, where = kernel("flat", **options, **more), (work.device, work.stream)
        run_flat(code, *where, y.itemsize, y.size, head, pointers, *numbers, *view)
        return
    strides = [_strides(kind, x, y) for kind, x in operands if kind != NUMBER]
    rank, axes = collapse(order, y.shape, [*strides, _steps(y)])
    code = kernel("strided", rank=rank, wide=y.size >= INT32, **options)
    work.run(code, y.size, *pointers, *axes, y.size, *numbers)


def _flat(
    order: Axes, operands: Operands, y: Array
) -> tuple[int, dict[str, Any], Axes] | None:
    """Return the head, and what is to be known of a weight, if all lie so in memory."""
    head = _head(order, y, *(x for kind, x in operands if kind == ARRAY))
    if head is None:
        return None
    options: dict[str, Any] = {}
    view: Axes = ()
    for kind, value in operands:
        if kind == BITS:  # of which a vector's start where a byte does
            if head or not is_flat(order, y.shape, _strides(kind, value, y)):
                return None
        elif kind == WEIGHT:
            seen = parts_of(order, y.shape, value.shape, _steps(value))
            vector = value.pointer if value.dtype == y.dtype else None
            layout = seen and weight_layout(*seen[1:], y.itemsize, head, vector)
            if not seen or not layout:
                return None
            options, view = {"layout": layout, "wide": y.size >= INT32}, seen[:0:-1]
    return head, options, view


def _strides(kind: str, value: Any, y: Array) -> Sequence[int]:
    """Return an operand's strides along y's axes: in elements, those of a mask in bits."""
    if kind == BITS:
        return strides_of(value[1], y.shape)
    return _steps(value if kind == ARRAY else value.spread(y.shape))


def _run_mask(
    work: Work,
    function: Function,
    active: Function,
    kept: int,
    operands: Operands,
    order: Axes,
    y: Array,
    bits: int,
) -> None:
    """Write the function of the operands into y, and the bits of what is active."""
    if y.size == 0:
        return
    x, numbers = operands[0][1], _numbers(operands, y)
    options = {"function": function, "active": active, "kept": kept, "fmt": y.dtype}
    kinds = tuple(kind for kind, _ in operands)
    pointers = x.pointer, y.pointer, bits
    if _head(order, x, y) == 0:
        code = kernel("flat_mask", kinds=kinds, **options)
        where = work.device, work.stream
        run_mask(code, *where, y.itemsize, y.size, pointers, *numbers)
        return
    rank, axes = collapse(order, y.shape, [_steps(x), _steps(y)])
    options |= {"rank": rank, "wide": y.size >= INT32}
    code = kernel("strided_mask", kinds=kinds, **options)
    work.run(code, -(-y.size // 8), *pointers, *axes, y.size, *numbers)


# The gradients of a weight for each channel -------------------------------------------


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
        grad, x, weight = (_aligned(work, array) for array in (grad, x, weight))
        y = _target(work, out, grad, x)
        if weight.meets(y):
            weight = _copy(work, weight)
        total, axes = out_weight, range(out_weight.ndim)
        if not total.is_aligned or not is_flat(axes, total.shape, _steps(total)):
            total = _empty(work, total.shape, total.dtype, total.itemsize)
        order = _order(y)
        vary = [axis for axis, size in enumerate(weight.shape) if size > 1]
        view = _view(order, weight, grad, x, y)
        if view and x.size and [axis for axis in order if axis in vary] == vary:
            pointers = grad.pointer, x.pointer, weight.pointer, y.pointer
            dtypes = x.dtype, weight.dtype
            sums = both(work, gradient, dtypes, x.itemsize, pointers, view)
        else:
            sums = _sum(work, grad, x, weight)
            operands = (ARRAY, grad), (ARRAY, x), (WEIGHT, weight)
            _run(work, gradient, operands, y)
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
    strides = _steps(grad), _steps(x)
    channels = math.prod(x.shape[axis] for axis in kept)
    size = math.prod(x.shape[axis] for axis in summed)
    splits = splits_of(size, channels)
    pointer = pairs(work, x.dtype, splits * channels)
    if x.size == 0:
        return Sums(pointer, 0, weight.size, 1)
    kept_rank, kept_axes = collapse(kept, x.shape, strides)
    summed_rank, summed_axes = collapse(summed, x.shape, strides)
    code = kernel("strided_sum", fmt=x.dtype, kept=kept_rank, summed=summed_rank)
    threads = splits * channels * THREADS
    pointers = grad.pointer, x.pointer, pointer
    work.run(code, threads, *pointers, *kept_axes, *summed_axes, channels, size, splits)
    return Sums(pointer, splits, channels, 1)
