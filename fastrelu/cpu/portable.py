"""Loops in plain Numba: slower than `fast`, with the same results, on any host.

They see arrays as Numba does: no object's memory is read, nothing of Numba is used that
is not public.  Each is a function of a range, made of a formula of the catalogue, that
compiled code may call as well.  A twin for several threads calls it for parts of the
range.

As in `fast`, each function here makes all ready, and returns what cannot fail.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from numba.extending import is_jitted

from fastrelu._digest import digest
from fastrelu._dtypes import Row, row_of
from fastrelu._functions import bound, rebuild
from fastrelu._layout import channels_of, lay_flat, slopes_of
from fastrelu._spec import ARRAY, BITS, NUMBER, WEIGHT, Operation
from fastrelu._sums import lost
from fastrelu.cpu import halves
from fastrelu.cpu.shield import is_alone, shielded

Array = Any
Function = Callable[..., Any]
Run = Callable[[], None]

PART = 1 << 15  # elements that a thread takes at once
SUMMED = 1 << 16  # elements at least whose products are summed together,
PARTS = 64  # and the most parts with sums of their own

# The names that the loops below leave open; `rebuild` binds them.
formula: Any
active: Any
get: Any
kept: Any
load: Any
store: Any
body: Any
mode: Any
share: Any


# Loops --------------------------------------------------------------------------------
#
# All have one signature: `a` is a tuple of arrays, `b` what else goes with them (mask
# bits or weights), `s` a tuple of numbers, `inner` how many elements in a row have one
# weight.


def _plain(a, b, y, s, inner, start, stop):
    for i in range(start, stop):
        y[i] = store(formula(*(get(a, i) + s)))


def _to_bits(a, bits, y, s, inner, start, stop):
    """Go over bytes of the mask: the bits are read before y, which may be x."""
    for byte in range(start, stop):
        flags = np.uint8(0)
        for i in range(8 * byte, min(8 * byte + 8, y.size)):
            if active(*(get(a, i) + kept(s))):
                flags |= np.uint8(1) << np.uint8(i & 7)
            y[i] = store(formula(*(get(a, i) + s)))
        bits[byte] = flags


def _from_bits(a, bits, y, s, inner, start, stop):
    for i in range(start, stop):
        passes = (bits[i >> 3] >> np.uint8(i & 7)) & np.uint8(1)
        y[i] = store(formula(*(get(a, i) + (passes,) + s)))


def _rows(a, weights, y, s, inner, start, stop):
    """Go over rows of one weight."""
    for row in range(start, stop):
        w = weights[row % weights.size]
        for i in range(row * inner, row * inner + inner):
            y[i] = store(formula(*(get(a, i) + (w,) + s)))


def share_of(grad, value):
    """Return what an element adds to its channel's gradient."""
    product = np.float64(value) * np.float64(grad)
    return 0.0 if value > 0 else product


def _prelu_backward(g, x, weights, y, sums, inner, rows, start, stop):
    """Go over parts of so many rows of all channels; each has sums of its own.

    Every addition is compensated (Neumaier's sum, doi:10.1002/zamm.19740540106).
    """
    for part in range(start, stop):
        first = part * rows * weights.size
        last = min(first + rows * weights.size, x.size // inner)
        for row in range(first, last):
            channel = row % weights.size
            w = weights[channel]
            total, error = sums[0, part, channel], sums[1, part, channel]
            for i in range(row * inner, row * inner + inner):
                grad, value = load(g[i]), load(x[i])
                product = share(grad, value)
                before = total
                total = before + product
                error += lost(before, product, total)
                y[i] = store(formula(grad, value, w))
            sums[0, part, channel], sums[1, part, channel] = total, error


def _add_up(parts, sums):
    """Add up the sums of all parts, compensated as they are."""
    for channel in range(sums.shape[1]):
        total, error = 0.0, 0.0
        for part in range(parts.shape[1]):
            before, more = total, parts[0, part, channel]
            total = before + more
            error += lost(before, more, total)
            error += parts[1, part, channel]
        sums[0, channel], sums[1, channel] = total, error


def _shared(a, b, y, s, inner, size, probe, done):
    """Give parts to threads that compute in the caller's mode; say which are done."""
    ours = mode(probe)
    part = -(-size // done.size)
    for i in numba.prange(done.size):
        if mode(probe) == ours:
            body(a, b, y, s, inner, min(i * part, size), min(i * part + part, size))
            done[i] = True


def _shared_sums(g, x, weights, y, sums, inner, rows, probe, done):
    ours = mode(probe)
    for i in numba.prange(done.size):
        if mode(probe) == ours:
            body(g, x, weights, y, sums, inner, rows, i, i + 1)
            done[i] = True


# Numbers whose products and sums tell the floating-point mode of a thread: the smallest
# subnormal and normal ones, and what is lost beside 1.
PROBE = np.array([5e-324, 2.2250738585072014e-308, 2.0**-60])


def _mode(probe):
    """Return the floating-point mode: subnormals as operands, as results, rounding."""
    operand = probe[0] * 2.0**100 != 0
    result = np.float64(probe[1] * 0.5).view(np.int64) != 0
    up, down = 1.0 + probe[2] != 1.0, -1.0 - probe[2] != -1.0
    nearest = 1.0 + (2.0**-52 - probe[2]) != 1.0
    return operand + 2 * result + 4 * up + 8 * down + 16 * nearest


# Tuples have one length each to the compiler: a template for each.


def _get_one(a, i):
    return (load(a[0][i]),)


def _get_two(a, i):
    return load(a[0][i]), load(a[1][i])


def _get_three(a, i):
    return load(a[0][i]), load(a[1][i]), load(a[2][i])


_GET = _get_one, _get_two, _get_three


def _keep_none(s):
    return ()


def _keep_one(s):
    return (s[0],)


def _keep_two(s):
    return s[0], s[1]


_KEEP = _keep_none, _keep_one, _keep_two


# Building -----------------------------------------------------------------------------


def _itself(value):
    return value


@shielded
def _compile(function: Function, kinds: tuple[Any, ...], parallel: bool = False) -> Any:
    """Compile a function for arguments of these types, and keep it if that can be.

    Numba's cache goes by a function's name, which therefore says what it is made of.
    """
    name = digest(function, kinds, parallel)
    function = rebuild(function, f"{function.__name__}_{name}")
    options = {**_OPTIONS, "nogil": True, "parallel": parallel}
    try:
        loop = numba.njit(function, cache=name is not None, **options)
    except RuntimeError:  # there is no file that Numba could keep it beside
        loop = numba.njit(function, **options)
    if is_jitted(loop):
        loop.compile(kinds)
        return loop
    # NUMBA_DISABLE_JIT is set, as by people who debug kernels of their own.
    return np.errstate(all="ignore")(loop)


_OPTIONS: dict[str, Any] = {"error_model": "numpy"}
_inlined = functools.cache(functools.partial(numba.njit, **_OPTIONS))
_BY_BITS = {
    name: _inlined(getattr(halves, name)) for name in ("float_bits", "bits_float")
}
_LOST = {"lost": _inlined(lost)}
_HALVES = {
    "float16": (halves.half_to_float, halves.float_to_half),
    "bfloat16": (halves.bfloat16_to_float, halves.float_to_bfloat16),
}


@functools.cache
def _names(row: Row) -> dict[str, Any]:
    """Return what a dtype binds."""
    load, store = (
        _inlined(rebuild(template, template.__name__, _BY_BITS))
        for template in _HALVES.get(row.name, (_itself, _itself))
    )
    return {"load": load, "store": store, "share": _inlined(share_of), **_LOST}


@functools.cache
def _loop(
    template: Function, operation: Operation, row: Row, kinds: tuple[Any, ...]
) -> tuple[Any, Function]:
    """Return a compiled loop, and what gives its twin for several threads."""
    names = {**_names(row), "formula": bound(operation.function, _inlined)}
    names["get"] = _inlined(rebuild(_GET[operation.arrays - 1], "get", names))
    if operation.active is not None:
        names["active"] = bound(operation.active, _inlined)
        names["kept"] = _inlined(_KEEP[operation.kept])
    own = rebuild(template, template.__name__, names)
    shared = _shared_sums if template is _prelu_backward else _shared

    @functools.cache
    def twin() -> Any:
        names = {"body": _inlined(own), "mode": _inlined(_mode)}
        both = rebuild(shared, f"{template.__name__}{shared.__name__}", names)
        more = () if template is _prelu_backward else (numba.intp,)
        last = map(numba.typeof, (PROBE, np.empty(1, bool)))
        return _compile(both, (*kinds[:-2], *more, *last), True)

    return _compile(own, kinds), twin


@functools.cache
def _adder(*kinds: Any) -> Any:
    return _compile(rebuild(_add_up, "_add_up", _LOST), kinds)


_forked: list[bool] = []  # not empty in a child: GNU OpenMP ends it if it goes parallel

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _forked.append(True))


def _is_shared() -> bool:
    """Say whether Numba's threads may be used.

    They must have been started by somebody who uses them: with GNU OpenMP, that alone
    forbids a child of a fork to use its own.  And workqueue ends the process if two
    threads enter it at once.
    """
    try:
        layer = numba.threading_layer()
    except ValueError:  # none is started
        return False
    may = layer in ("omp", "tbb") and not _forked and not is_alone()
    return may and numba.get_num_threads() > 1


def _plan(
    template: Function,
    operation: Operation,
    row: Row,
    operands: tuple[Any, ...],
    size: int,
    grain: int,
) -> Run:
    """Return what runs a loop over range(size), in parts of `grain` if that is shared."""
    kinds = *map(numba.typeof, operands), numba.intp, numba.intp
    loop, twin = _loop(template, operation, row, kinds)
    parts = -(-size // grain)
    if parts < 2 or not _is_shared():
        return functools.partial(loop, *operands, 0, size)
    shared, done = twin(), np.zeros(parts, np.bool_)
    sizes = () if template is _prelu_backward else (size,)

    def run() -> None:
        shared(*operands, *sizes, PROBE, done)
        part = -(-size // parts)
        for i in range(parts):
            if not done[i]:  # it fell to a thread in another mode
                loop(*operands, min(i * part, size), min(i * part + part, size))

    return run


def _row(x: Array) -> Row:
    row = row_of(x.dtype)
    assert row is not None
    return row


def _stored(x: Array) -> Array:
    return x.view(_row(x).storage)


# What the engine asks for -------------------------------------------------------------


def empty_like(x: Array, order: Any = "K") -> Array:
    """Return an array as ``numpy.empty_like`` would make it."""
    return np.empty_like(x, None, order, False)


def empty_bytes(size: int) -> Array:
    """Return a one-dimensional array of uint8, not initialised."""
    return np.empty(size, np.uint8)


def elementwise(
    function: Function, operands: Sequence[tuple[str, Any]], out: Array
) -> None:
    """Write a function of the operands into out."""
    operation = Operation(function, tuple(kind for kind, _ in operands))
    _elementwise(operation, operands, out)


def elementwise_mask(
    function: Function,
    active: Function,
    kept: int,
    operands: Sequence[tuple[str, Any]],
    out: Array,
) -> tuple[Array, tuple[int, ...]]:
    """Write a function of the operands into out; return mask bits and their order."""
    kinds = tuple(kind for kind, _ in operands)
    bits = empty_bytes(-(-out.size // 8))
    operation = Operation(function, kinds, active, kept)
    return bits, _elementwise(operation, operands, out, bits)


def _elementwise(
    operation: Operation,
    operands: Sequence[tuple[str, Any]],
    out: Array,
    bits: Array | None = None,
) -> tuple[int, ...]:
    """Lay arrays flat, run a loop over them, and return the order of the axes."""
    arrays = [value for kind, value in operands if kind == ARRAY]
    beside = dict(operands)
    x, template, axes, unit, inner = arrays[0], _plain, None, 1, 1
    b: Array = np.empty(0, np.uint8)
    if bits is not None:
        template, b, unit = _to_bits, bits, 8
    elif BITS in beside:
        (given, axes), template = beside[BITS], _from_bits
        b = np.array(given)  # it may lie on the result
    y, order, (flat_y, *flats), waiting = lay_flat(out, arrays, empty_like, axes)
    if not x.size:
        return order
    if WEIGHT in beside:
        weight = beside[WEIGHT].transpose(order)
        view = channels_of(y.transpose(order).shape, weight.shape)
        template, b, unit, inner = (
            _rows,
            slopes_of(weight, view, x),
            view.inner,
            view.inner,
        )
    row = _row(x)
    number = getattr(np, row.compute)
    numbers = tuple(number(value) for kind, value in operands if kind == NUMBER)
    given = tuple(map(_stored, flats)), b, _stored(flat_y), numbers, inner
    size = -(-x.size // unit)
    run = _plan(template, operation, row, given, size, max(1, PART // unit))
    for pair in waiting:
        np.copyto(*pair)
    run()
    if y is not out:
        np.copyto(out, y)
    return order


def weight_sums(
    gradient: Function,
    grad: Array,
    x: Array,
    slopes: Array,
    out: Array,
    order: Sequence[int],
    inner: int,
    sums: Array,
) -> Run:
    """Return what writes the gradient towards x into out, and sums and their errors.

    The slopes go with (outer, slope, inner) in this order of the axes, that of out.
    """
    laid = lay_flat(out, [grad, x], empty_like, order, may_wait=False)
    own, _, (y, grad, x), _ = laid
    if slopes.size == 1:
        inner = 1  # any piece of one channel is a row
    width = slopes.size * inner
    outer = x.size // width
    rows = max(-(-SUMMED // width), -(-outer // PARTS))
    parts = np.zeros((2, -(-outer // rows), slopes.size))
    operands = _stored(grad), _stored(x), slopes, _stored(y), parts, inner, rows
    operation = Operation(gradient, (ARRAY, ARRAY, WEIGHT))
    loop = _plan(_prelu_backward, operation, _row(x), operands, parts.shape[1], 1)
    add_up = _adder(numba.typeof(parts), numba.typeof(sums))

    def run() -> None:
        loop()
        add_up(parts, sums)
        if own is not out:
            np.copyto(out, own)

    return run


class MemoryPool:
    """No pool: results are ordinary arrays.  The names are those of the fast loops'."""

    def used_bytes(self) -> int:
        """Return 0."""
        return 0

    free_bytes = total_bytes = get_limit = used_bytes

    def free_all_blocks(self) -> None:
        """Have nothing to give back."""

    def set_limit(self, size: int) -> None:
        """Take a limit that is never reached."""


_DEFAULT = MemoryPool()


def get_default_memory_pool() -> Any:
    """Return a pool that holds nothing."""
    return _DEFAULT


class _NoCall:
    """Stands for a quick call, and leaves all to Python."""

    rows = ()

    def call(self, *_: Any) -> None:
        """Answer nothing."""

    def again(self, *_: Any, integers: bool) -> None:
        """Answer nothing, either."""


_NO_CALL = _NoCall()


def quick_call(operation: Operation, **options: Any) -> Any:
    """Return what leaves all to Python."""
    return _NO_CALL
