"""The kernels and quick calls as Python, by way of twins.py: the same values, line by line.

What the compiler makes of them is tested everywhere else.  Here every index is checked,
every place on the stack is full of rubbish before it is written, and what no machine at
hand compiles is run too: half floats converted bit by bit.
"""

import ctypes
import random
import sys
from itertools import product

import numpy as np
import pytest
import reference
import test_paths
import twins
from conftest import FLOATS, each, gradient_of, normal, place, sample, slopes_for
from reference import assert_same, assert_weight_gradient
from test_paths import (
    LEFT_CALLS,
    LEFT_GRADIENTS,
    QUICK_CALLS,
    QUICK_GRADIENTS,
    cube,
    ready_for_float32,
    ready_for_gradients,
)

import fastrelu as F
from fastrelu import activations
from fastrelu.activations import ACTIVATIONS
from fastrelu.cpu import calls, lanes, loops, pool, threads

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
SIZES = 0, 1, 8, 64, 77, 1158  # the last one is past the cache


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setattr(threads, "CACHE", 1 << 11)
    return twins.interpret(monkeypatch)


@pytest.mark.parametrize("size", SIZES)
@each(*FLOATS, "int8", "uint32")
def test_forward_and_backward(name, dtype, size):
    row = ACTIVATIONS[name]
    x, g = sample((size,), dtype), sample((size,), dtype, seed=1)
    slopes = slopes_for(name, x)
    y = reference.forward(name, x, **slopes)
    dx = reference.backward(name, g, x, **slopes)
    assert_same(row.forward(x, **slopes), y)
    assert_same(gradient_of(name, g, x, **slopes), dx)
    for values, expected, call in (
        (x, y, lambda a: row.forward(a, inplace=True, **slopes)),
        (g, dx, lambda a: gradient_of(name, a, x, inplace=True, **slopes)),
        (g, y, lambda a: row.forward(x, out=a, **slopes)),
    ):
        given, memory = place(values, "c")
        assert call(given) is given
        assert_same(memory, place(expected, "c")[1])


@pytest.mark.parametrize("size", SIZES)
@each(*FLOATS, "int8", "uint32", where=lambda row: row.parameter != "weight")
def test_masks(name, dtype, size):
    row = ACTIVATIONS[name]
    x, g = sample((size,), dtype), sample((size,), dtype, seed=1)
    for skew, slope in product((0, 1), (0.2, -0.3)):
        slopes = slopes_for(name, x, slope)
        y = reference.forward(name, x, **slopes)
        dx = reference.backward(name, g, x, **slopes)
        out = off_line(g, skew)
        _, mask = row.forward(x, out=out, return_mask=True, **slopes)
        assert_same(out, y)
        assert_same(mask.bits, reference.mask_bits(x))
        given = off_line(x, skew)
        _, mask = row.forward(given, inplace=True, return_mask=True, **slopes)
        assert_same(given, y)
        assert_same(mask.bits, reference.mask_bits(x))
        assert_same(row.backward(g, mask, out=given, **slopes), dx)
        given[...] = g
        row.backward(given, mask, inplace=True, **slopes)
        assert_same(given, dx)


def off_line(values, skew):
    """A copy that starts so many elements after a cache line does"""
    memory = np.zeros(values.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + skew * values.itemsize
    a = memory[start:][: values.nbytes].view(values.dtype)
    a[...] = values
    return a


@pytest.mark.parametrize("cache", [1 << 11, 1 << 30])
@each("float32")
def test_parts(name, dtype, cache, monkeypatch):
    """What the team shares: all but the first parts start somewhere else."""
    monkeypatch.setattr(threads, "CACHE", cache)
    row, n = ACTIVATIONS[name], 3 * loops.TILE + 77
    x, g = sample((n,), dtype), sample((n,), dtype, seed=1)
    if row.parameter == "weight":
        shapes = (11, 1), (3, 150), (3, 300), (100, 30), (20, 150), (500, 24)
        for size, inner in shapes:
            values = np.resize(x, (n // (size * inner), size, inner))
            weight = normal(size, dtype)
            expected = reference.forward("prelu", values, weight=weight)
            assert_same(F.prelu(values, weight), expected)
            assert_same(F.prelu(values, weight, inplace=True), expected)
        return
    slopes = slopes_for(name, x)
    expected, bits = reference.forward(name, x, **slopes), reference.mask_bits(x)
    for given, more in (x, {"out": off_line(g, 1)}), (x.copy(), {"inplace": True}):
        y, mask = row.forward(given, return_mask=True, **more, **slopes)
        assert_same(y, expected)
        assert_same(mask.bits, bits)
    expected = reference.backward(name, g, x, **slopes)
    assert_same(row.backward(g, x, **slopes), expected)
    assert_same(row.backward(g, mask, **slopes), expected)
    assert_same(row.backward(g.copy(), mask, inplace=True, **slopes), expected)
    for saved in (x, mask):
        assert_same(row.backward(g, saved, out=off_line(x, 1), **slopes), expected)
        given = off_line(g, 1)
        assert_same(row.backward(given, saved, inplace=True, **slopes), expected)


# x's shape, the weight's, and which loop they need.
CHANNELS = {
    "rows": ((2, 3, 100), (3,)),
    "long rows": ((1, 2, loops.SEGMENT + 70), (2,)),
    "columns": ((130, 7), (7,)),
    "many columns": ((70, 133), (133,)),
    "many short rows": ((400, 7), (7,)),
    "narrow rows": ((5, 6, 3), (6,)),
    "many narrow rows": ((2500, 5, 3), (5,)),
    "wide columns": ((3, loops.SEGMENT_COLUMNS + 9), (loops.SEGMENT_COLUMNS + 9,)),
    "wide narrow rows": ((2, loops.WIDE // 2, 3), (loops.WIDE // 2,)),
    "spread": ((2, 3, 4, 5), (3, 1, 5)),
    "shared": ((4, 70), ()),
}


@pytest.mark.parametrize("which", CHANNELS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"], indirect=True)
def test_channels(dtype, which):
    shape, weights = CHANNELS[which]
    x, g = normal(shape, dtype), normal(shape, dtype, seed=1)
    weight = normal(weights, dtype, seed=2)
    assert_same(F.prelu(x, weight), reference.forward("prelu", x, weight=weight))
    expected = reference.backward("prelu", g, x, weight=weight)
    dx, dw = F.prelu_backward(g, x, weight)
    assert_same(dx, expected)
    assert_weight_gradient(dw, g, x, weight)
    dx, again = F.prelu_backward(g, x, weight, inplace=True)
    assert_same(dx, expected)
    assert_same(again, dw)
    y = F.prelu(x, weight, out=x)
    assert y is x


@pytest.fixture
def leaky(monkeypatch):
    monkeypatch.setattr(threads, "CACHE", 1 << 20)
    return ready_for_float32()


@pytest.mark.parametrize("name", QUICK_CALLS)
def test_quick_calls(name, leaky):
    test_paths.test_plain_arrays_take_the_quick_call(name, leaky)


@pytest.mark.parametrize("name", LEFT_CALLS)
def test_what_is_left_to_python(name, leaky):
    test_paths.test_other_arguments_are_left_to_python(name, leaky)


def test_large_results_come_from_the_pool(leaky, interpreter, monkeypatch):
    asked, x = [], cube()
    F.get_default_memory_pool().ready()
    monkeypatch.setattr(calls, "SMALLEST", x.nbytes)
    monkeypatch.setattr(pool, "borrow", lambda own: asked.append(own) or 7)
    monkeypatch.setattr(
        pool, "restore", lambda own, before, y: asked.append(before) or y
    )
    y = leaky.flat.call(x, 0.5, False, None)
    assert_same(y, reference.forward("leaky_relu", x, negative_slope=0.5))
    assert asked == [pool.ADDRESS, 7]
    leaky.flat.call(x[1:], 0.5, False, None)
    leaky.flat.call(x, 0.5, False, x.copy())
    assert len(asked) == 2
    monkeypatch.setattr(pool, "borrow", lambda own: 0)
    interpreter.error = MemoryError()
    with pytest.raises(MemoryError):
        leaky.flat.call(x, 0.5, False, None)
    interpreter.error = None


def test_a_second_dtype(leaky):
    leaky.flat.prepare(np.dtype(np.float64), 0, in_place=False)
    for dtype in (np.float32, np.float64):
        x = cube().astype(dtype)
        expected = reference.forward("leaky_relu", x, negative_slope=0.5)
        assert_same(leaky.flat.call(x, 0.5, False, None), expected)


def test_a_large_array_waits_for_the_team(monkeypatch, leaky):
    monkeypatch.setattr(threads, "SHARE", 64)
    monkeypatch.setattr(threads, "is_ready", lambda: False)
    assert leaky.flat.call(cube(), 0.5, False, None) is None
    assert leaky.flat.call(cube()[0, 0], 0.5, False, None) is not None


def test_when_the_team_is_ready(monkeypatch):
    """Once it is started, and if Numba's threads are new to it, it knows of them."""
    memory, name, launched = np.zeros_like(threads._memory), "launched", {}
    monkeypatch.setattr(threads, "_memory", memory)
    memory[threads._NUMBA], memory[threads._LAUNCHED] = id(launched), id(name)
    memory[threads._TRUE] = id(True)
    launched[name] = False
    assert not threads.is_ready()
    memory[threads._SHARE] = 1
    assert threads.is_ready()
    launched[name] = True
    assert not threads.is_ready()
    memory[threads._LIMIT] = 12345
    assert threads.is_ready()
    memory[threads._SHARE] = 0
    assert not threads.is_ready()


def test_no_memory_for_a_result(interpreter, monkeypatch, leaky):
    def none(*_):
        interpreter.error = MemoryError()
        return 0

    monkeypatch.setattr(calls, "_call_empty_like", none)
    with pytest.raises(MemoryError):
        leaky.flat.call(cube(), 0.5, False, None)


@pytest.fixture
def gradients():
    return ready_for_gradients()


@pytest.mark.parametrize("name", QUICK_GRADIENTS)
def test_quick_calls_of_gradients(name, gradients, interpreter):
    test_paths.test_plain_arrays_take_the_quick_call_of_gradients(name, gradients)
    assert not interpreter.given


@pytest.mark.parametrize("name", LEFT_GRADIENTS)
def test_gradients_that_are_left_to_python(name, gradients, interpreter):
    test_paths.test_other_gradients_are_left_to_python(name, gradients)
    assert not interpreter.given


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"], indirect=True)
def test_weights_of_half_floats(dtype, interpreter):
    shape = 3, 5, 70
    g, x = sample(shape, dtype, seed=1), sample(shape, dtype)
    for weight in (normal((5,), dtype), normal((5,), np.dtype(np.float32))):
        expected = reference.forward("prelu", x, weight=weight)
        assert_same(F.prelu(x, weight), expected)
        dx, dw = F.prelu_backward(g, x, weight)
        assert_same(dx, reference.backward("prelu", g, x, weight=weight))
        assert_weight_gradient(dw, g, x, weight)
    assert not interpreter.given


@pytest.mark.parametrize("enough", range(3))
def test_no_memory_for_sums(enough, interpreter):
    """Nothing is lost, nothing is kept, and no output changes."""
    weight = normal((8,), np.dtype(np.float16))
    for shape, axis in (((4, 6, 8), -1), ((3, 64), 0)):  # columns, and rows
        x = cube().astype(np.float16).reshape(shape)
        w = weight[: shape[axis]]
        F.prelu_backward(x, x, w, axis=axis)
        out = np.full_like(x, 7)
        interpreter.left = enough
        with pytest.raises(MemoryError):
            F.prelu_backward(x, x, w, axis=axis, out=out)
        assert (out == 7).all()
        assert not interpreter.given
        interpreter.left = 1 << 60
    x = cube().astype(np.float16)
    F.prelu(x, weight, axis=-1)
    interpreter.left = 0
    assert (
        activations._leaky_relu_calls.by_channel.call(x, weight, False, None, -1)
        is None
    )


def test_no_memory_for_both_gradients(interpreter, monkeypatch, gradients):
    g, w = cube(), normal((8,), np.dtype(np.float32))
    empty_like, new_tuple, left = calls._call_empty_like, calls._new_tuple, [0]

    def scarce(function):
        def call(*arguments):
            left[0] -= 1
            if left[0] < 0:
                interpreter.error = MemoryError()
                return 0
            return function(*arguments)

        return call

    monkeypatch.setattr(calls, "_call_empty_like", scarce(empty_like))
    monkeypatch.setattr(calls, "_new_tuple", scarce(new_tuple))
    for enough in range(3):
        left[0], interpreter.error = enough, None
        with pytest.raises(MemoryError):
            gradients(g, w, False, None, -1, g)
        assert not interpreter.given


# The pool -----------------------------------------------------------------------------


class Books:
    """A simple model of the pool: sizes, and what the memory behind them amounts to."""

    def __init__(self, limit, left):
        self.limit, self.left, self.idle = limit, left, []

    def lend(self, size):
        if size in self.idle:
            self.idle.reverse()
            self.idle.remove(size)  # the newest
            self.idle.reverse()
            return True
        if size + pool._MORE > self.left:
            self.shrink(0)
        if size + pool._MORE > self.left:
            return False
        self.left -= size + pool._MORE
        return True

    def take_back(self, size):
        self.idle.append(size)
        self.shrink(self.limit)

    def shrink(self, limit):
        while sum(self.idle) > limit:
            self.left += self.idle.pop(0) + pool._MORE


def test_the_pool(monkeypatch):
    limit, enough, rng = 1 << 16, 1 << 18, random.Random(0)
    memory = twins.interpret_pool(monkeypatch, enough)
    tested, books, lent = pool.MemoryPool(limit), Books(limit, enough), {}
    address = tested.address
    assert pool.malloc(address, -1) == pool.malloc(address, sys.maxsize) == 0

    def keep(place, nbytes, start):
        """Mark what was lent, from its start on, as nobody else's."""
        mark = bytes([rng.randrange(1, 256)])
        assert place % 64 == 0
        ctypes.memset(place + start, mark[0], nbytes - start)
        lent[place] = nbytes, ctypes.string_at(place, nbytes)

    for _ in range(3000):
        nbytes = rng.choice([0, 1, 4096, 5000, 1 << 14, 1 << 15])
        size = max(1, -(-nbytes // 4096)) * 4096
        what = rng.choice(["malloc", "calloc", "realloc", "free", "free"])
        if what in ("malloc", "calloc") or not lent:
            place = pool.malloc(address, nbytes)
            if what == "calloc":
                if books.lend(size):  # and is full of what calloc must not show
                    ctypes.memset(place, 0xA5, nbytes)
                    books.take_back(size)
                pool.free(address, place, nbytes)
                place = pool.calloc(address, nbytes, 1)
                assert not any(ctypes.string_at(place, nbytes) if place else b"")
            assert bool(place) == books.lend(size)
            if place:
                keep(place, nbytes, 0)
            continue
        place = rng.choice(list(lent))
        length, content = lent.pop(place)
        assert ctypes.string_at(place, length) == content
        before = max(1, -(-length // 4096)) * 4096
        if what == "free":
            pool.free(address, place, length)
            books.take_back(before)
        else:
            new = pool.realloc(address, place, nbytes)
            assert bool(new) == books.lend(size)
            if new:
                start = min(length, nbytes)
                assert ctypes.string_at(new, start) == content[:start]
                books.take_back(before)
                keep(new, nbytes, start)
            else:
                lent[place] = length, content
        assert tested.free_bytes() == sum(books.idle)
        used = sum(max(1, -(-length // 4096)) * 4096 for length, _ in lent.values())
        assert tested.used_bytes() == used
        assert memory.left == books.left
    for place, (length, _) in lent.items():
        pool.free(address, place, length)
    assert pool.realloc(address, 0, 10) != 0
    pool.free(address, 0, 0)
    pool.shrink(address, 0)
    assert tested.free_bytes() == 0


@pytest.mark.parametrize("fails", [None, "before", "call", "after", "call and after"])
def test_a_call_from_the_pool(fails, monkeypatch):
    """NumPy's handler is the pool's for one call; who holds what is counted."""
    count = {"own": 0, "before": 0, "result": 0}
    names = {7: "own", 8: "before", 9: "result"}
    failing = (fails or "").split(" and ")
    handlers = [7 if "after" not in failing else 0, 8 if "before" not in failing else 0]

    def set_handler(where, values):
        old = handlers.pop()
        if old:
            count[names[old]] += 1
        return old

    def let_go(address):
        count[names[address]] -= 1

    def call(function, arguments, number, names):
        count["result"] += "call" not in failing
        return 9 if "call" not in failing else 0

    twins.interpret_pool(monkeypatch, 0)
    for name, twin in {
        "_set_handler": set_handler,
        "_let_go": let_go,
        "_vectorcall": call,
    }.items():
        monkeypatch.setattr(pool, name, twin)
    tested = pool.MemoryPool()
    given = (ctypes.py_object * 2)(np.empty, 3)
    result = pool.call(id(tested._words), ctypes.addressof(given), 2)
    assert result == (9 if fails is None else 0)
    assert count == {"own": 0, "before": 0, "result": int(fails is None)}


def test_every_half_float():
    bits = np.arange(2**16, dtype=np.uint16)
    with np.errstate(all="ignore"):
        got = np.array([lanes._half_to_float_by_bits(half) for half in bits])
        assert_same(got, bits.view(np.float16).astype(np.float32))
        back = np.array([lanes._float_to_half_by_bits(value) for value in got])
    assert_same(back.view(np.float16), bits.view(np.float16))


@pytest.mark.parametrize("value", [65519, 65520, 65536, 7e4, 131071, 131072, 3e38])
def test_numbers_beyond_half_floats(value):
    got = lanes._float_to_half_by_bits(np.float32(value))
    with np.errstate(over="ignore"):
        assert got == np.float16(value).view(np.uint16)


def test_every_way_to_round_to_half():
    """All that lies between two half floats: just above the first, half way, below."""
    for low in (
        np.arange(0x7C00, dtype=np.uint16)[::7],
        np.arange(20, dtype=np.uint16),
    ):
        a, b = (half.view(np.float16).astype(np.float32) for half in (low, low + 1))
        b[np.isinf(b)] = 65536
        middle = (a + b) / 2
        for value in (
            a,
            np.nextafter(a, b),
            np.nextafter(middle, a),
            middle,
            np.nextafter(middle, b),
            np.nextafter(b, a),
        ):
            with np.errstate(all="ignore"):
                got = [lanes._float_to_half_by_bits(-v) for v in value]
                expected = (-value).astype(np.float16)
            assert_same(np.array(got, np.uint16).view(np.float16), expected)
