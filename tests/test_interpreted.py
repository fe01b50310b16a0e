"""The kernels and quick calls as Python, by way of twins.py: the same values, line by line.

What the compiler makes of them is tested everywhere else.  Here every index is checked,
every place on the stack is full of rubbish before it is written, and what no machine at
hand compiles is run too: half floats converted bit by bit.
"""

import ctypes
import gc
import itertools
import random
import sys
from itertools import product

import numpy as np
import pytest
import reference
import test_paths
import twins
from conftest import (
    ACTIVATIONS,
    FLOATS,
    TYPICAL,
    each,
    gradient_of,
    normal,
    place,
    sample,
    slopes_for,
)
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
from fastrelu._spec import ARRAY, NUMBER, Operation
from fastrelu.cpu import (
    blocks,
    calls,
    halves,
    handler,
    loops,
    objects,
    pool,
    quick,
    sums,
    threads,
)

pytestmark = [
    pytest.mark.model,
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),
]
SIZES = 0, 1, 8, 64, 77, 1158  # the last one is past the cache


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setattr(threads, "CACHE", 1 << 11)
    return twins.interpret(monkeypatch)


@pytest.mark.parametrize("size", SIZES)
@each(*FLOATS, "int8", "uint32", names=TYPICAL)
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
@each(*FLOATS, "int8", "uint32", where=lambda row: row.takes_mask, names=TYPICAL)
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
        assert_same(mask.bits, reference.mask_bits(x, name, **slopes))
        given = off_line(x, skew)
        _, mask = row.forward(given, inplace=True, return_mask=True, **slopes)
        assert_same(given, y)
        assert_same(mask.bits, reference.mask_bits(x, name, **slopes))
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
@each("float32", names=TYPICAL)
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
    expected, bits = (
        reference.forward(name, x, **slopes),
        reference.mask_bits(x, name, **slopes),
    )
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
    "long rows": ((1, 2, sums.SEGMENT + 70), (2,)),
    "columns": ((130, 7), (7,)),
    "many columns": ((70, 133), (133,)),
    "many short rows": ((400, 7), (7,)),
    "narrow rows": ((5, 6, 3), (6,)),
    "many narrow rows": ((2500, 5, 3), (5,)),
    "wide columns": ((3, sums.SEGMENT_COLUMNS + 9), (sums.SEGMENT_COLUMNS + 9,)),
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
    dx, again = F.prelu_backward(g, np.repeat(x, 2, -1)[..., ::2], weight)
    assert_same(dx, expected)
    assert_same(again, dw)
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
    for module in (calls, objects):
        monkeypatch.setattr(module, "SMALLEST", x.nbytes)
    monkeypatch.setattr(pool, "borrow", lambda own: asked.append(own) or 7)
    monkeypatch.setattr(
        pool, "restore", lambda own, before, y: asked.append(before) or y
    )
    leaky.flat(x, False, None, 0.5)  # which makes the loop ready
    asked.clear()
    y = leaky.flat(x, False, None, 0.5)
    assert_same(y, reference.forward("leaky_relu", x, negative_slope=0.5))
    assert asked == [pool.ADDRESS, 7]
    leaky.flat(x[1:], False, None, 0.5)
    leaky.flat(x, False, x.copy(), 0.5)
    assert len(asked) == 2
    for module in (calls, objects):
        monkeypatch.setattr(module, "SMALLEST", x.size // 8)
    asked.clear()
    _, mask = leaky.forward(x, False, None, True, 0.5)
    assert_same(mask.unpack(), x > 0)
    assert asked[-4:] == [pool.ADDRESS, 7, pool.ADDRESS, 7]
    lent = iter([7, 0])
    monkeypatch.setattr(pool, "borrow", lambda own: next(lent))
    interpreter.error = MemoryError()
    with pytest.raises(MemoryError):
        leaky.forward(x, False, None, True, 0.5)
    monkeypatch.setattr(pool, "borrow", lambda own: 0)
    with pytest.raises(MemoryError):
        leaky.flat(x, False, None, 0.5)
    interpreter.error = None


def test_shapes_that_others_change_meanwhile(leaky, monkeypatch):
    x, out = sample((6, 8, 4), np.dtype("f4"))[::2, :, ::2], np.zeros((3, 8, 2), "f4")
    expected = reference.forward("leaky_relu", x, negative_slope=0.5)
    places = [objects.words(id(array))[objects.SHAPE] for array in (x, out)]
    layouts = [(ctypes.c_int64 * 6).from_address(place) for place in places]
    before = [list(layout) for layout in layouts]

    def give_up(moved):
        """As NumPy frees them if another thread assigns a shape, and others get them"""
        for layout in layouts:
            layout[:] = [1] * 6
        return 0

    leaky.flat(x, False, out, 0.5)  # which makes the loop ready
    out[...] = 7
    with monkeypatch.context() as patch:
        patch.setattr(calls, "release_gil", give_up)
        leaky.flat(x, False, out, 0.5)
    assert list(layouts[0]) == [1] * 6
    for layout, words in zip(layouts, before, strict=True):
        layout[:] = words
    assert_same(out, expected)


def test_a_second_dtype(leaky):
    for dtype in (np.float32, np.float64):
        x = cube().astype(dtype)
        expected = reference.forward("leaky_relu", x, negative_slope=0.5)
        assert_same(leaky.flat(x, False, None, 0.5), expected)


def test_a_large_array_waits_for_the_team(monkeypatch, leaky):
    monkeypatch.setattr(threads, "SHARE", 64)
    monkeypatch.setattr(threads, "is_ready", lambda: False)
    assert leaky.flat(cube(), False, None, 0.5) is None
    assert leaky.flat(cube()[0, 0], False, None, 0.5) is not None


def test_when_the_team_is_ready(monkeypatch):
    """Once it is started, and if Numba's threads are new to it, it knows of them."""
    memory, name, launched = np.zeros_like(threads._memory), "launched", {}
    monkeypatch.setattr(threads, "_memory", memory)
    memory[threads._NUMBA], memory[threads._LAUNCHED] = id(launched), id(name)
    memory[threads._TRUE] = id(True)
    modules, torch = {}, "torch"
    memory[threads._MODULES], memory[threads._TORCH] = id(modules), id(torch)
    launched[name] = False
    assert not threads.is_ready()
    memory[threads._SHARE] = 1
    assert threads.is_ready()
    launched[name] = True
    assert not threads.is_ready()
    memory[threads._LIMIT] = 12345
    assert threads.is_ready()
    # Once PyTorch is there, its threads are to be looked for.
    modules[torch] = True
    memory[threads._UNTIL] = 1
    assert [threads.is_ready() for _ in "12"] == [True, False]
    memory[threads._UNTIL], memory[threads._THEIRS] = 0, 2
    assert threads.is_ready()
    memory[threads._SHARE] = 0
    assert not threads.is_ready()


def test_no_memory_for_a_result(interpreter, leaky):
    interpreter.objects = 0
    with pytest.raises(MemoryError):
        leaky.flat(cube(), False, None, 0.5)


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
    assert test_paths.ready_for_float32().by_channel(x, False, None, weight, -1) is None


def test_no_memory_for_both_gradients(interpreter, gradients):
    g, w = cube(), normal((8,), np.dtype(np.float32))
    gradients(g, False, None, g, w, -1)  # which makes the loop ready
    for enough in range(3):
        interpreter.objects, interpreter.error = enough, None
        with pytest.raises(MemoryError):
            gradients(g, False, None, g, w, -1)
        assert not interpreter.given


@pytest.mark.parametrize("order", ["C", "F"])
def test_no_memory_for_a_mask(order, interpreter, leaky, request):
    """Whatever was made by then goes."""

    def found():
        things = gc.get_objects()
        triples = sum(type(thing) is tuple and len(thing) == 3 for thing in things)
        return triples, sum(type(thing) is F.Mask for thing in things)

    x, enough = cube(order), 0
    gc.collect()
    gc.disable()  # which would lose sight of tuples of integers
    request.addfinalizer(gc.enable)
    while True:
        before = found()
        for _ in range(10):
            interpreter.objects, interpreter.error = enough, None
            try:
                y, mask = leaky.forward(x, False, None, True, 0.5)
            except MemoryError:
                y = None
        if y is not None:
            break
        assert [array for array in interpreter.arrays if array() is not None] == []
        assert all(b - a < 10 for a, b in zip(before, found(), strict=True))
        enough += 1
    # The result, bits, tuples of three integers each, the mask, and the pair.
    assert enough == (8 if order == "C" else 12)
    assert_same(y, reference.forward("leaky_relu", x, negative_slope=0.5))
    assert_same(mask.unpack(), x > 0)


# The pool -----------------------------------------------------------------------------


class Shadow:
    """What is known of a pool from outside: who has which memory, and what is in it."""

    def __init__(self, monkeypatch, source, limit, enough):
        self.sources = dict(
            zip(
                ("malloc", "mmap"),
                twins.interpret_pool(monkeypatch, enough),
                strict=True,
            )
        )
        self.source, self.enough = self.sources[source], enough
        self.pool = pool.MemoryPool(limit)
        self.words, self.address = self.pool._words, self.pool.address
        self.words[blocks.MAP] = source == "mmap"
        self.words[blocks.BELL] = 1
        self.lent, self.peak, self.rng = {}, 0, random.Random(0)

    def idle(self):
        """Where idle blocks start, and how much they lend, the stalest first"""
        entries = self.words[blocks.LIST :].reshape(-1, blocks.ENTRY)
        return entries[: self.words[blocks.COUNT], : blocks._LENDS + 1].tolist()

    def check(self):
        idle, used = self.idle(), 0
        pieces = [(block, block + lends + blocks._PAGE) for block, lends in idle]
        for lent in self.lent:
            block = lent - blocks.HEAD
            size = blocks._words(block)[blocks.SIZE]
            pieces.append((block, block + size + blocks._PAGE))
            used += size
        pieces.sort()
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(pieces))
        self.peak = max(self.peak, used)
        assert self.pool.used_bytes() == used
        assert self.pool.free_bytes() == sum(lends for _, lends in idle)
        assert self.pool.free_bytes() <= self.pool.get_limit()
        # What is joined lends the page of a head as well.
        assert self.pool.total_bytes() <= self.peak + 4 * blocks._PAGE
        head = blocks._MORE if self.source is self.sources["malloc"] else blocks._PAGE
        held = self.pool.total_bytes() + head * len(pieces)
        assert self.source.left == self.enough - held
        assert self.words[blocks.LOCK] == 0

    def keep(self, place, nbytes, start=0):
        """Mark what was lent, from its start on, as nobody else's."""
        mark = self.rng.randrange(1, 256)
        assert place % 4096 == 2048
        ctypes.memset(place + start, mark, nbytes - start)
        self.lent[place] = nbytes, ctypes.string_at(place, nbytes)

    def lend(self, nbytes):
        size = max(1, -(-nbytes // blocks._PAGE)) * blocks._PAGE
        fitting = [
            (lends, -i, block)
            for i, (block, lends) in enumerate(self.idle())
            if size <= lends <= size + size // 8
        ]
        place = handler.malloc(self.address, nbytes)
        if fitting:
            assert place == min(fitting)[2] + blocks.HEAD
        elif not place:
            assert self.pool.free_bytes() == 0
        if place:
            lends = blocks._words(place - blocks.HEAD)[blocks.SIZE]
            assert size <= lends <= size + max(size // 8, blocks._PAGE)
            self.keep(place, nbytes)
        return place

    def some(self):
        place = self.rng.choice(list(self.lent))
        nbytes, content = self.lent.pop(place)
        assert ctypes.string_at(place, nbytes) == content
        return place, nbytes, content


@pytest.mark.parametrize("source", ["malloc", "mmap"])
def test_the_pool(source, monkeypatch):
    page = blocks._PAGE
    shadow = Shadow(monkeypatch, source, 30 * page, 60 * page)
    address, rng = shadow.address, shadow.rng
    assert handler.malloc(address, -1) == handler.malloc(address, sys.maxsize) == 0
    refused = 0
    for _ in range(1500):
        nbytes = rng.choice([0, 1, page, 5000, *(k * page for k in (4, 8, 9, 12))])
        what = rng.choice(4 * ["malloc", "free"] + ["calloc", "realloc"])
        if what == "malloc" or not shadow.lent:
            refused += not shadow.lend(nbytes)
        elif what == "calloc":
            place = handler.calloc(address, nbytes, 1)
            assert not any(ctypes.string_at(place, nbytes) if place else b"")
            if place:
                shadow.keep(place, nbytes)
        elif what == "free":
            place, length, _ = shadow.some()
            handler.free(address, place, length)
        else:
            place, length, content = shadow.some()
            before = blocks._words(place - blocks.HEAD)[blocks.SIZE]
            new = handler.realloc(address, place, nbytes)
            if new:
                start = min(length, nbytes)
                assert ctypes.string_at(new, start) == content[:start]
                used = shadow.pool.used_bytes() + before  # both were in use
                shadow.peak = max(shadow.peak, used)
                shadow.keep(new, nbytes, start)
            else:
                shadow.lent[place] = length, content
        shadow.check()
    assert refused > 10
    for place, (length, _) in shadow.lent.items():
        handler.free(address, place, length)
    assert handler.realloc(address, 0, 10) != 0
    handler.free(address, 0, 0)
    assert handler.shrink(address, 0) == 1
    assert shadow.pool.free_bytes() == 0


def test_a_list_that_is_full(monkeypatch):
    """The stalest block makes room."""
    page = blocks._PAGE
    shadow = Shadow(monkeypatch, "mmap", 100 * page, 100 * page)
    monkeypatch.setattr(blocks, "MOST", 3)
    places = [shadow.lend(page) for _ in range(5)]
    for lent in places:
        handler.free(shadow.address, lent, page)
    idle = [block + blocks.HEAD for block, _ in shadow.idle()]
    assert idle == places[2:]


def test_a_list_that_somebody_has(monkeypatch):
    """Nobody waits: memory comes from the system and goes back to it."""
    page = blocks._PAGE
    shadow = Shadow(monkeypatch, "mmap", 100 * page, 10 * page)
    first, second = shadow.lend(page), shadow.lend(page)
    handler.free(shadow.address, second, page)
    assert handler.hold(shadow.address) == 1
    assert handler.hold(shadow.address) == handler.shrink(shadow.address, 0) == 0
    before = shadow.source.left
    third = handler.malloc(shadow.address, page)
    assert third not in (0, second)
    handler.free(shadow.address, first, page)
    assert shadow.source.left == before
    assert handler.malloc(shadow.address, 7 * page) == 0  # nor can idle blocks go
    shadow.words[blocks.LOCK] = 0
    assert shadow.pool.free_bytes() == page
    handler.free(shadow.address, third, page)
    assert handler.malloc(shadow.address, 7 * page) != 0


@pytest.mark.parametrize("asked", [0, 14])
def test_huge_pages_are_asked_for(asked, monkeypatch):
    monkeypatch.setattr(blocks, "_HUGE", 4 * blocks._PAGE)
    shadow = Shadow(monkeypatch, "mmap", 1 << 20, 1 << 16)
    shadow.words[blocks.HUGE_PAGES] = asked
    handler.malloc(shadow.address, 3 * blocks._PAGE)
    assert shadow.source.advice == []
    place = handler.malloc(shadow.address, 4 * blocks._PAGE)
    advice = place - blocks.HEAD, 5 * blocks._PAGE, 14
    assert shadow.source.advice == ([advice] if asked else [])


@pytest.mark.parametrize("why", ["the limit", "no janitor", "limited memory"])
def test_what_is_not_kept_is_mallocs(why, monkeypatch):
    page = blocks._PAGE
    shadow = Shadow(monkeypatch, "mmap", 8 * page, 100 * page)
    words, malloc = shadow.words, shadow.sources["malloc"]
    words[[blocks.GET_LIMIT, blocks.SPACE, blocks.DATA, blocks.NO_LIMIT]] = 1, 9, 2, -1
    size = 9 if why == "the limit" else 8
    words[blocks.BELL] = why != "no janitor"
    shadow.source.limits = {9: 1 << 30} if why == "limited memory" else {}
    place = handler.malloc(shadow.address, size * page)
    assert malloc.left == 100 * page - size * page - blocks._MORE
    words[blocks.BELL], shadow.source.limits = 1, {}
    handler.free(shadow.address, place, size * page)
    assert malloc.left == shadow.source.left == 100 * page
    assert shadow.pool.total_bytes() == 0
    handler.malloc(shadow.address, 8 * page)
    assert shadow.source.left == 91 * page


class Over(Exception):
    """Ends a janitor."""


def test_the_janitor(monkeypatch):
    page = blocks._PAGE
    shadow = Shadow(monkeypatch, "mmap", 100 * page, 100 * page)
    words, address, source = shadow.words, shadow.address, shadow.source
    words[[blocks.TAKEABLE, blocks.GET_LIMIT, blocks.SPACE, blocks.DATA]] = 8, 1, 9, 2
    words[blocks.NO_LIMIT] = -1
    naps, rung, script = [], [], []

    def sleep(bell, timeout, interruptible):
        assert (bell, interruptible) == (1, 0)
        naps.append(timeout)
        if not script:
            raise Over
        script.pop(0)()

    monkeypatch.setattr(blocks, "_sleep", sleep)
    monkeypatch.setattr(blocks, "_wake", rung.append)

    def live(*steps):
        naps.clear()
        script[:] = steps
        with pytest.raises(Over):
            blocks.janitor(address)
        return naps

    def release():
        words[blocks.LOCK] = 0

    def hold():
        words[blocks.LOCK] = 1

    def nothing():
        pass

    period = words[blocks.PERIOD]
    places = [shadow.lend((i + 1) * page) for i in range(3)]

    def free():
        handler.free(address, places[0], 0)

    # While nothing is idle, it sleeps until somebody rings.
    assert live() == [-1]
    assert words[blocks.ASLEEP] == 1
    assert live(free) == [-1, period]
    assert (rung, words[blocks.ASLEEP]) == ([1], 0)
    # A list that somebody has is waited for, and left alone at the end of a period.
    hold()
    assert live(release) == [blocks.SECOND // 1000, period]
    assert live(hold) == [period, blocks.SECOND // 1000]
    assert words[blocks.PERIODS] == 0
    release()
    # After a period or two, the system may have the pages; once.
    assert live(nothing) == [period] * 2
    assert source.advice == []
    handler.free(address, places[1], 0)
    assert rung == [1]
    live(nothing, nothing, nothing)
    assert source.advice == [
        (place - blocks.HEAD + page, (i + 1) * page, 8)
        for i, place in enumerate(places[:2])
    ]
    # After ten, it is gone, the stalest first.
    live(*[nothing] * 6)
    assert (words[blocks.PERIODS], shadow.pool.free_bytes()) == (10, 3 * page)
    assert (words[blocks.EARLIER], words[blocks.PEAK]) == (6 * page, 3 * page)
    live(nothing)
    assert shadow.pool.free_bytes() == 2 * page
    live(nothing)
    assert shadow.pool.free_bytes() == 0
    # A peak is remembered for two stretches of time.
    handler.free(address, places[2], 0)
    assert shadow.pool.free_bytes() == 3 * page
    live(*[nothing] * 8)
    assert (words[blocks.EARLIER], words[blocks.PEAK]) == (3 * page, 0)
    # Under a limit nothing is kept, whoever finds it.
    live(*[nothing] * 10)
    for what in (9, 2):
        words[blocks.PEAK] = 100 * page
        place, other = (handler.malloc(address, page) for _ in range(2))
        handler.free(address, place, 0)
        source.limits = {what: 1 << 30}
        live(nothing)
        assert shadow.pool.total_bytes() == page
        handler.free(address, other, 0)
        assert shadow.pool.total_bytes() == 0
        source.limits = {}
    assert source.left == 100 * page


def test_a_janitor_whose_system_takes_no_pages(monkeypatch):
    shadow = Shadow(monkeypatch, "malloc", 1 << 20, 1 << 20)
    handler.free(shadow.address, shadow.lend(10), 0)
    shadow.words[blocks.PERIODS] = 5
    blocks._tend(shadow.address)
    assert shadow.sources["mmap"].advice == []
    assert shadow.pool.free_bytes() == blocks._PAGE


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
        monkeypatch.setattr(handler, name, twin)
    tested = pool.MemoryPool()
    given = (ctypes.py_object * 2)(np.empty, 3)
    result = handler.call(id(tested._words), ctypes.addressof(given), 2)
    assert result == (9 if fails is None else 0)
    assert count == {"own": 0, "before": 0, "result": int(fails is None)}


def test_every_half_float():
    bits = np.arange(2**16, dtype=np.uint16)
    with np.errstate(all="ignore"):
        got = np.array([halves.half_to_float(half) for half in bits])
        assert_same(got, bits.view(np.float16).astype(np.float32))
        back = np.array([halves.float_to_half(value) for value in got])
    assert_same(back.view(np.float16), bits.view(np.float16))


@pytest.mark.parametrize("value", [65519, 65520, 65536, 7e4, 131071, 131072, 3e38])
def test_numbers_beyond_half_floats(value):
    got = halves.float_to_half(np.float32(value))
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
                got = [halves.float_to_half(-v) for v in value]
                expected = (-value).astype(np.float16)
            assert_same(np.array(got, np.uint16).view(np.float16), expected)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_formula(name):
    row, dtype = ACTIVATIONS[name], np.dtype(np.float32)
    x, g = 3 * sample((6, 13), dtype), sample((6, 13), dtype, seed=1)
    slopes = slopes_for(name, x)
    assert_same(row.forward(x, **slopes), reference.forward(name, x, **slopes))
    expected = reference.backward(name, g, x, **slopes)
    assert_same(gradient_of(name, g, x, **slopes), expected)
    if row.takes_mask:
        _, mask = row.forward(x, return_mask=True, **slopes)
        assert_same(row.backward(g, mask, **slopes), expected)


@pytest.mark.parametrize("dtype", [*FLOATS, "int8"], indirect=True)
def test_lines(dtype):
    """Axes that merge and that do not, short and long ones, by steps of any sign"""
    for cut in (np.s_[::2, ::-1], np.s_[:, 1:, ::2], np.s_[:, :, :3], np.s_[::-1]):
        x, g = sample((6, 5, 40), dtype)[cut], sample((6, 5, 40), dtype, seed=1)[cut]
        assert_same(F.relu(x), reference.forward("relu", x))
        assert_same(F.relu_backward(g, x), reference.backward("relu", g, x))
        out = sample((6, 5, 40), dtype, seed=2)[cut]
        assert F.relu(x, out=out) is out
        assert_same(out, reference.forward("relu", x))
        if dtype.kind != "i":
            slopes = normal(x.shape, dtype, seed=3)
            expected = reference.backward("rrelu", g, x, slopes=slopes)
            assert_same(F.rrelu_backward(g, x, slopes), expected)
            weight = normal((x.shape[1], 1), dtype, seed=4)
            assert_same(
                F.prelu(x, weight), reference.forward("prelu", x, weight=weight)
            )


@pytest.mark.parametrize("shape", [(700,), (6, 1, 5, 40)])
def test_long_lines_and_axes_of_one(shape):
    dtype = np.dtype(np.float32)
    x = sample(shape, dtype)[..., ::2]
    out = sample(shape, dtype, seed=1)[..., 1::2]
    assert_same(F.relu(x), reference.forward("relu", x))
    F.relu(x, out=out)
    assert_same(out, reference.forward("relu", x))


def test_a_weight_that_its_gradient_overlaps(gradients):
    g, memory = cube(), normal((9,), np.dtype(np.float32))
    assert gradients(g, False, (None, memory[1:]), g, memory[:8], -1) is None


@pytest.mark.parametrize("dtype", ["float64", "bool", "int8"])
def test_saved_arrays_of_another_dtype(dtype):
    g, x = normal((77,), np.dtype(np.float32)), np.arange(-38, 39)
    expected = np.where(x > 0, g, np.float32(0))
    saved = x > 0 if dtype == "bool" else x.astype(dtype)
    for grad in (g, g.astype(">f4")):  # the quick way, and the long one
        assert_same(F.relu_backward(grad, saved), expected)


def test_a_mask_of_two_numbers():
    operation = Operation(twins.clipped, (ARRAY, NUMBER, NUMBER), twins.within, 2)
    x, bits = sample((77,), np.dtype(np.float32)), np.empty(10, np.uint8)
    y = quick.Call(operation).run(x, False, None, bits, -0.5, 0.5)
    assert_same(
        y, np.where(x <= -0.5, np.float32(-0.5), np.where(x >= 0.5, np.float32(0.5), x))
    )
    assert_same(bits, np.packbits((x > -0.5) & (x < 0.5), bitorder="little"))


def test_what_is_not_ready(monkeypatch, leaky, gradients):
    """The pool, and a dtype: each is told, and asked for once."""
    x, w = cube(), normal((8,), np.dtype(np.float32))
    monkeypatch.setattr(calls, "SMALLEST", 1)
    monkeypatch.setattr(calls, "is_pool_ready", lambda table: False)
    assert leaky.flat(x, False, None, 0.5) is None
    assert gradients(x, False, None, x, w, -1) is None


def test_a_second_dtype_of_gradients(gradients):
    for dtype in (np.float32, np.float64):
        g, w = cube().astype(dtype), np.ones(8, dtype)
        assert gradients(g, False, None, g, w, -1)[1].dtype == dtype
