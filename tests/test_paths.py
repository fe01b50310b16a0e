"""The quick ways: that they are taken, that they give the same bits, and the pool."""

import ctypes
import functools
import gc
import os
import pickle
import platform
import re
import subprocess
import sys
import threading
import types
import weakref
from itertools import product

import numba
import numpy as np
import pytest
import twins
from conftest import FLOATS, normal, place, sample
from reference import assert_same

import fastrelu as F
from fastrelu import _dispatch, activations, cpu
from fastrelu._spec import ARRAY, BITS, NUMBER, WEIGHT, Operation
from fastrelu.cpu import (
    build,
    calls,
    fast,
    jit,
    loops,
    pool,
    quick,
    shield,
    sums,
    threads,
)
from fastrelu.cpu.vector import format_of

float32 = np.dtype(np.float32)
LARGE = pool.SMALLEST // 4 + 3
X86 = platform.machine().lower() in ("x86_64", "amd64")
BLOCKS = loops.to_bits, loops.from_bits, loops.rows, loops.columns
LONG = pytest.mark.long
SUMS = [body.__name__ for body in sums.PARTS]
several_threads = pytest.mark.skipif(
    numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads"
)


LOOP = ctypes.CFUNCTYPE(None, ctypes.c_int64)
SUMMING_LOOP = ctypes.CFUNCTYPE(
    ctypes.c_int64, *[ctypes.c_int64] * 6, *[ctypes.c_ssize_t] * 4
)


@pytest.fixture
def taken(monkeypatch):
    """The loops that were run: body and target"""
    runs, kept, compiled = [], [], build.compiled

    def record(body, operation, fmt, target=build.PLAIN):
        loop = compiled(body, operation, fmt, target)

        def run(*arguments):
            runs.append((body.__name__, target))
            return loop.ctypes(*arguments)

        kept.append((SUMMING_LOOP if body in sums.PARTS else LOOP)(run))
        address = ctypes.cast(kept[-1], ctypes.c_void_p).value
        return types.SimpleNamespace(address=address, ctypes=run)

    monkeypatch.setattr(build, "compiled", record)
    # What the long way keeps would outlive the callbacks.
    monkeypatch.setattr(fast, "quick_call", functools.cache(quick.Call))
    monkeypatch.setattr(threads, "CACHE", 1 << 24)
    ask_for_loops_again()
    yield runs
    monkeypatch.undo()
    ask_for_loops_again()


def ask_for_loops_again():
    for call in list(twins.quick_calls()):
        call.table[calls.CACHE] = threads.CACHE
        for row in call.rows:
            call.table[row + calls.LOOP : row + calls.ROW] = 0


@pytest.fixture
def fresh_pool():
    gc.collect()  # what earlier tests left in cycles
    default = F.get_default_memory_pool()
    default.free_all_blocks()
    yield default
    default.free_all_blocks()


# That they are taken ------------------------------------------------------------------


def test_which_loop_runs(taken):
    middle, large = normal(1 << 20, float32), normal(1 << 22, float32)
    weight = normal(16, float32)
    F.relu(middle)
    F.relu(large.copy(), inplace=True)
    F.relu(large)
    F.relu(large, return_mask=True)
    F.relu_backward(middle, middle)
    F.relu_backward(large, large)
    F.leaky_relu(large.reshape(2048, 2048).T)
    F.prelu(middle.reshape(-1, 16), weight)
    F.prelu(large.reshape(-1, 16), weight)
    F.prelu(middle.reshape(16, 16, -1), weight)
    F.prelu(large.reshape(16, 16, -1), weight)
    F.prelu(middle.reshape(-1, 16), weight, out=middle.reshape(-1, 16))
    for x in (middle, large):
        rows, columns = x.reshape(16, 16, -1), x.reshape(-1, 16)
        F.prelu_backward(rows, rows, weight)
        F.prelu_backward(columns, columns, weight)
        F.prelu_backward(columns, columns, weight[None][:, ::-1])  # the long way
    F.prelu_backward(large.copy(), large, weight[:1], inplace=True)
    assert taken == [
        ("plain", "plain"),
        ("plain", "in_place"),
        ("plain", "past_cache"),
        ("to_bits", "past_cache"),
        ("plain", "plain"),
        ("plain", "past_cache"),
        ("plain", "past_cache"),
        ("columns", "plain"),
        ("columns", "past_cache"),
        ("rows", "plain"),
        ("rows", "past_cache"),
        ("columns", "in_place"),
        ("prelu_backward_rows", "plain"),
        ("prelu_backward_columns", "plain"),
        ("prelu_backward_columns", "plain"),
        ("prelu_backward_rows", "past_cache"),
        ("prelu_backward_columns", "past_cache"),
        ("prelu_backward_columns", "past_cache"),
        ("prelu_backward_rows", "in_place"),
    ]


def test_short_rows_are_columns_where_rows_cost_more(taken):
    images, weight = normal((256, 64, 8, 8), float32), normal(64, float32)
    few, large = images[:16], normal((256, 64, 16, 16), float32)
    by_axes = weight[::-1, None, None]  # for the long way
    F.prelu(images[:2], weight)
    F.prelu(few, weight)
    F.prelu(few, by_axes)
    F.prelu(images[:2].reshape(2, 128, 8, 4), np.resize(weight, 128))
    F.prelu(large, weight)
    F.prelu(large.reshape(-1, 64, 8, 8), weight)
    F.prelu_backward(few[1:], few[1:], weight)
    F.prelu_backward(few[1:], few[1:], by_axes)
    F.prelu_backward(few, few, weight)
    F.prelu_backward(images, images, by_axes)
    assert taken == [
        ("rows", "plain"),
        ("columns", "plain"),
        ("columns", "plain"),
        ("columns", "plain"),
        ("rows", "past_cache"),
        ("columns", "past_cache"),
        ("prelu_backward_rows", "plain"),
        ("prelu_backward_rows", "plain"),
        ("prelu_backward_columns", "plain"),
        ("prelu_backward_columns", "plain"),
    ]


def cube(order="C"):
    return np.asarray(normal((4, 6, 8), float32), order=order)


def padded(y, x):
    """What was made of a part of x, as long as x"""
    return y if y is None else np.resize(y, x.size)


def padded_pair(pair, x):
    """The same for the first of two"""
    return pair if pair is None else (padded(pair[0], x).reshape(x.shape), pair[1])


def unpickled(x):
    return pickle.loads(pickle.dumps(x))


def with_weight_before_out(f, x):
    memory = np.ones(8 + x.size, float32)
    out = memory[8:].reshape(x.shape)
    return f.by_channel(x, False, out, memory[:8], -1)


def windows(x):
    """A writeable array whose elements share memory"""
    return np.lib.stride_tricks.as_strided(x, (4, 8), (4, 4))


# What a call takes, and the same with something that it leaves to Python.
QUICK_CALLS = {
    "integer slope": lambda f, x: f.flat(x, False, None, 2),
    "negative slope": lambda f, x: f.flat(x, False, None, -1),
    "large slope": lambda f, x: f.flat(x, False, None, 2**53 - 1),
    "float64 slope": lambda f, x: f.flat(x, False, None, np.float64(0.5)),
    "float32 slope": lambda f, x: f.flat(x, False, None, np.float32(0.5)),
    "float16 slope": lambda f, x: f.flat(x, False, None, np.float16(0.5)),
    "int64 slope": lambda f, x: f.flat(x, False, None, np.int64(2)),
    "uint8 slope": lambda f, x: f.flat(x, False, None, np.uint8(2)),
    "slope of an array": lambda f, x: f.flat(x, False, None, np.array(0.5)),
    "slope of integers": lambda f, x: f.flat(x, False, None, np.array(3, np.int16)),
    "every second": lambda f, x: padded(f.flat(x[:, ::2], False, None, 0.5), x),
    "reversed": lambda f, x: f.flat(x[::-1, :, ::-1], False, None, 0.5),
    "crop in place": lambda f, x: padded(f.flat(x[1:, 2:], True, None, 0.5), x),
    "to Fortran's order": lambda f, x: f.flat(x, False, cube("F"), 0.5),
    "permuted": lambda f, x: f.flat(x.transpose(1, 2, 0), False, None, 0.5),
    "permuted mask": lambda f, x: f.masked(
        x.transpose(1, 2, 0), False, None, np.zeros(24, np.uint8), 0.5
    ),
    "saved in F": lambda f, x: f.gradient(x, False, None, cube("F"), 0.5),
    "weight (1, C)": lambda f, x: f.by_channel(x, False, None, x[1, :1] + 0, 1),
    "weight (C, 1)": lambda f, x: f.by_channel(x, False, None, x[0, :, :1] + 0, 1),
    "weight (1, 1, 1)": lambda f, x: f.by_channel(x, False, None, x[:1, :1, :1] + 0, 1),
    "weight of all": lambda f, x: f.by_channel(x, False, None, x + 0, 1),
    "weight spread": lambda f, x: f.by_channel(x, False, None, x[:, :1] + 0, 1),
    "channels permuted": lambda f, x: f.by_channel(
        x.transpose(0, 2, 1), False, None, np.ones(8, float32), 1
    ),
    "channels strided": lambda f, x: f.by_channel(
        x[::-1], False, None, np.ones(6, float32), 1
    ),
    "fresh": lambda f, x: f.flat(x, False, None, 0.5),
    "inplace": lambda f, x: f.flat(x, True, None, 0.5),
    "out": lambda f, x: f.flat(x, False, np.empty_like(x), 0.5),
    "out is x": lambda f, x: f.flat(x, False, x, 0.5),
    "mask": lambda f, x: f.masked(x, False, None, np.zeros(24, np.uint8), 0.5),
    "rows": lambda f, x: f.by_channel(
        x.reshape(3, 1, 64), False, None, x.ravel()[:3], 0
    ),
    "columns": lambda f, x: f.by_channel(x, True, None, x[0, 0].copy(), -1),
    "shared": lambda f, x: f.by_channel(x, False, None, x.ravel()[:1].copy(), 1),
    "saved": lambda f, x: f.gradient(x, False, None, x.copy(), 0.5),
    "out is saved": lambda f, x: f.gradient(x.copy(), False, x, x, 0.5),
}
QUICK_CALLS |= {
    "no mask": lambda f, x: f.forward(x, False, None, False, 0.5),
    "mask made": lambda f, x: with_mask(f.forward(x, False, None, True, 0.5)),
    "mask made permuted": lambda f, x: with_mask(
        f.forward(x.transpose(1, 2, 0), False, None, True, 0.5)
    ),
    "mask made of an axis of length 1": lambda f, x: padded(
        with_mask(f.forward(x[:1].transpose(0, 2, 1), False, None, True, 0.5)), x
    ),
    "mask made in place": lambda f, x: with_mask(f.forward(x, True, None, True, 0.5)),
    "not taken": lambda f, x: f.backward(x, False, None, x.copy(), 0.5),
    "mask taken": lambda f, x: f.backward(x, False, None, mask_of(x), 0.5),
    "mask taken in place": lambda f, x: f.backward(x, True, None, mask_of(x), 0.5),
    "mask taken permuted": lambda f, x: f.backward(
        x.transpose(1, 2, 0), False, None, mask_of(x.transpose(1, 2, 0)), 0.5
    ),
    "mask made of a strided array": lambda f, x: padded(
        with_mask(f.forward(x[:, ::2], False, None, True, 0.5)), x
    ),
    "mask made of a reversed array": lambda f, x: with_mask(
        f.forward(x[::-1, :, ::-1], False, None, True, 0.5)
    ),
    "mask made of a crop in place": lambda f, x: padded(
        with_mask(f.forward(x[1:, 2:], True, None, True, 0.5)), x
    ),
    "mask made in another order": lambda f, x: with_mask(
        f.forward(x, False, cube("F"), True, 0.5)
    ),
    "mask taken by a strided gradient": lambda f, x: padded(
        f.backward(x[:, ::2], False, None, mask_of(x[:, ::2]), 0.5), x
    ),
    "mask taken by a gradient of one row": lambda f, x: padded(
        f.backward(x[:, :1, ::2], False, None, mask_of(x[:, :1, ::2].copy()), 0.5), x
    ),
    "mask taken by a crop in place": lambda f, x: padded(
        f.backward(x[1:, 2:], True, None, mask_of(x[1:, 2:]), 0.5), x
    ),
    "mask told by an equal predicate": lambda f, x: f.backward(
        x,
        False,
        None,
        F.Mask(np.zeros(24, np.uint8), x.shape, None, " ".join("x>0")),
        1.0,
    ),
}


def with_mask(answer):
    y, mask = answer
    assert type(mask) is F.Mask
    assert_same(mask.unpack(), y > 0)
    return y


def mask_of(x, **changes):
    """A mask of x, some of whose attributes were replaced, or deleted"""
    mask = F.relu(x, return_mask=True)[1]
    for name, value in changes.items():
        setattr(mask, name, value)
        if value is None:
            delattr(mask, name)
    return mask


class OwnMask(F.Mask):
    """What may do anything when it is asked for its bits"""


LEFT_CALLS = {
    "flag 1": lambda f, x: f.forward(x, False, None, 1, 0.5),
    "mask with a bad slope": lambda f, x: f.forward(x, False, None, True, np.nan),
    "mask of another order": lambda f, x: f.backward(
        x, False, None, mask_of(np.asfortranarray(x)), 0.5
    ),
    "mask of C order": lambda f, x: f.backward(
        x.transpose(1, 2, 0), False, None, mask_of(x.transpose(1, 2, 0).copy()), 0.5
    ),
    "mask of C order, a gradient in F": lambda f, x: f.backward(
        x.transpose(2, 1, 0)[::2], False, None, mask_of(cube()[::2].T.copy()), 0.5
    ),
    "mask of F order, a strided gradient": lambda f, x: f.backward(
        x[:, ::2], False, None, mask_of(np.asfortranarray(x[:, ::2])), 0.5
    ),
    "mask of an array that lies otherwise than out": lambda f, x: f.backward(
        x, False, cube("F"), mask_of(x), 0.5
    ),
    "mask of a broadcast gradient": lambda f, x: f.backward(
        np.broadcast_to(x[:1], x.shape), False, None, mask_of(x), 0.5
    ),
    "mask in another order": lambda f, x: f.backward(
        x.transpose(1, 2, 0),
        False,
        None,
        mask_of(np.asfortranarray(x.transpose(1, 2, 0))),
        0.5,
    ),
    "mask of another shape": lambda f, x: f.backward(x, False, None, mask_of(x[1:]), 1),
    "mask of fewer axes": lambda f, x: f.backward(x, False, None, mask_of(x[0]), 0.5),
    "mask with another predicate": lambda f, x: f.backward(
        x, False, None, mask_of(x, predicate="x > 1"), 0.5
    ),
    "mask of other bits": lambda f, x: f.backward(
        x, False, None, mask_of(x, bits=np.zeros(25, np.uint8)), 0.5
    ),
    "mask with a bool": lambda f, x: f.backward(
        x[:1], False, None, mask_of(x[:1], shape=(True, 6, 8)), 0.5
    ),
    "mask with a long shape": lambda f, x: f.backward(
        x, False, None, mask_of(x, shape=(4, 6, 2**64 + 8)), 0.5
    ),
    "mask with a list": lambda f, x: f.backward(
        x, False, None, mask_of(x, shape=[4, 6, 8]), 0.5
    ),
    "mask with a list of axes": lambda f, x: f.backward(
        x.T, False, None, mask_of(x.T, _axes=[2, 1, 0]), 0.5
    ),
    **{
        f"mask without {name}": lambda f, x, name=name: f.backward(
            x, False, None, mask_of(x, **{name: None}), 0.5
        )
        for name in F.Mask.__slots__
    },
    "mask of a class of one's own": lambda f, x: f.backward(
        x, False, None, OwnMask(np.zeros(24, np.uint8), x.shape), 0.5
    ),
    "rounded slope": lambda f, x: f.flat(x, False, None, 2**53 + 1),
    "huge slope": lambda f, x: f.flat(x, False, None, 10**400),
    "true slope": lambda f, x: f.flat(x, False, None, True),
    "slope in an array": lambda f, x: f.flat(x, False, None, np.array([0.5])),
    "slope of another dtype": lambda f, x: f.flat(x, False, None, np.longdouble(0.5)),
    "slope of an array of bools": lambda f, x: f.flat(x, False, None, np.array(True)),
    "slope beyond float32": lambda f, x: f.flat(x, False, None, 1e39),
    "infinite slope": lambda f, x: f.flat(x, False, None, np.inf),
    "infinite slope below": lambda f, x: f.flat(x, False, None, -np.inf),
    "nan slope": lambda f, x: f.flat(x, False, None, np.nan),
    "both": lambda f, x: f.flat(x, True, x, 0.5),
    "one": lambda f, x: f.flat(x, 1, None, 0.5),
    "dtype": lambda f, x: f.flat(x, False, x.astype(np.float64), 0.5),
    "shape": lambda f, x: f.flat(x, False, np.empty((4, 6, 7), float32), 0.5),
    "ndim": lambda f, x: f.flat(x, False, np.empty((1, 4, 6, 8), float32), 0.5),
    "swapped": lambda f, x: f.flat(x, False, x.astype(">f4"), 0.5),
    "subclass": lambda f, x: f.flat(x.view(np.memmap), False, None, 0.5),
    "misaligned": lambda f, x: f.flat(place(x, "misaligned")[0], False, None, 0.5),
    "overlap": lambda f, x: f.flat(x[1:], False, x[:-1], 0.5),
    "overlap ahead": lambda f, x: f.flat(x[:-1], False, x[1:], 0.5),
    "dimensions": lambda f, x: f.flat(x, False, np.empty((4, 6), float32), 0.5),
    "bits": lambda f, x: f.masked(x, False, None, np.zeros(25, np.uint8), 0.5),
    "bits' dtype": lambda f, x: f.masked(x, False, None, np.zeros(24, "i1"), 0.5),
    "axis": lambda f, x: f.by_channel(x, False, None, x.ravel()[:8], 3),
    "huge axis": lambda f, x: f.by_channel(x, False, None, x.ravel()[:8], 2**70),
    "true axis": lambda f, x: f.by_channel(x, False, None, x.ravel()[:6], True),
    "channels": lambda f, x: f.by_channel(x, False, None, x.ravel()[:7], -1),
    "weight's dtype": lambda f, x: f.by_channel(x, False, None, np.ones(8), -1),
    "weight's shape": lambda f, x: f.by_channel(x, False, None, x[0, :1, :7] + 0, 1),
    "weight grows x": lambda f, x: f.by_channel(x, False, None, x[None], 1),
    "weight strided": lambda f, x: f.by_channel(x, False, None, x[0, 0, ::2], -1),
    "bits strided": lambda f, x: f.masked(x, False, None, np.zeros(48, "u1")[::2], 0.5),
    "overlap of strided": lambda f, x: f.flat(x[:, 1:], False, x[:, :-1], 0.5),
    "onto its transpose": lambda f, x: f.flat(x[0, :, :6], False, x[0, :, :6].T, 0.5),
    "own overlap": lambda f, x: f.flat(windows(x), True, None, 0.5),
    "unknown dtype": lambda f, x: f.flat(x.astype("F"), False, None, 0.5),
    "saved's dtype": lambda f, x: f.gradient(x, False, None, x.view(np.int32), 0.5),
    "saved's shape": lambda f, x: f.gradient(x, False, None, x[:2].copy(), 0.5),
    "saved in part": lambda f, x: f.gradient(x[:3], True, None, x[1:], 0.5),
    "channels' out": lambda f, x: f.by_channel(
        x, False, np.empty((4, 6, 9), float32), x.ravel()[:8], -1
    ),
    "weight in out": lambda f, x: f.by_channel(x, True, None, x.ravel()[:8], -1),
}


def ready_for_float32():
    """The calls of leaky_relu, each made ready until only arguments can be amiss"""
    spec = activations._LEAKY_RELU
    kinds, weighted = (ARRAY, NUMBER), (ARRAY, WEIGHT)
    operations = {
        "flat": Operation(spec.formula, kinds),
        "masked": Operation(spec.formula, kinds, spec.active, 1),
        "by_channel": Operation(spec.formula, weighted),
        "gradient": Operation(spec.of_saved, (ARRAY, ARRAY, NUMBER)),
    }
    ready = {name: quick.Call(operation).run for name, operation in operations.items()}
    of_mask = Operation(spec.gradient, (ARRAY, BITS, NUMBER))
    for name, plain, masked in (
        ("forward", operations["flat"], operations["masked"]),
        ("backward", operations["gradient"], of_mask),
    ):
        options = {"masked": masked, "predicate": "x > 0", "flag": name == "forward"}
        ready[name] = quick.Call(plain, **options).run
    return types.SimpleNamespace(**ready)


leaky = pytest.fixture(ready_for_float32, scope="module")


@pytest.mark.parametrize("name", QUICK_CALLS)
def test_plain_arrays_take_the_quick_call(name, leaky):
    x = cube()
    y = QUICK_CALLS[name](leaky, x)
    assert (type(y), y.size) == (np.ndarray, x.size)


@pytest.mark.parametrize("name", LEFT_CALLS)
def test_other_arguments_are_left_to_python(name, leaky):
    x = cube()
    before = x.copy()
    assert LEFT_CALLS[name](leaky, x) is None
    assert np.array_equal(x, before)


def test_a_call_that_gives_no_answer_passes_for_no_result():
    with pytest.raises(RuntimeError, match="a bug of fastrelu"):
        fast._run(types.SimpleNamespace(run=lambda *arguments: None), None, None)


def test_the_quick_call_knows_a_dtype_by_what_it_is(leaky):
    x = unpickled(cube())
    assert x.dtype is not float32
    assert leaky.flat(x, False, None, 0.5) is not None
    x = np.zeros(4, np.dtype(float32, metadata={"unit": "m"}))
    assert leaky.flat(x, False, None, 0.5) is not None


@pytest.mark.parametrize("first", ["misaligned", "swapped"])
def test_a_first_call_that_is_left_spoils_no_later_one(first):
    leaky_relu, x = _dispatch._Forward(activations._LEAKY_RELU), cube()
    for given in (place(x, first)[0], x, x):
        assert_same(
            leaky_relu.call(given, False, None, False, 0.5), F.leaky_relu(x, 0.5)
        )
    assert type(leaky_relu.call) is types.BuiltinFunctionType


def test_the_quick_call_keeps_the_memory_order(leaky):
    y = leaky.flat(cube("F"), False, None, 0.5)
    assert y.flags.f_contiguous
    assert_same(y, F.leaky_relu(cube(), 0.5))


def test_the_quick_call_refers_to_what_it_returns(leaky):
    """Neither does a result live for ever, nor is None or an argument given up."""
    x, out, predicate = cube(), cube(), sys.intern("x > 0")

    def call_all():
        leaky.flat(x, False, None, 0.5)
        leaky.flat(x, True, None, 0.5)
        leaky.flat(x, False, out, 0.5)
        leaky.flat(x[::2], False, None, 0.5)
        leaky.by_channel(x, False, out, x.ravel()[:8], -1)
        assert leaky.flat(x[1:], False, x[:-1], 0.5) is None
        for y in (x, x.T):
            _, mask = leaky.forward(y, False, None, True, 0.5)
            leaky.backward(y, False, None, mask, 0.5)
            leaky.backward(y[1:], False, None, mask, 0.5)

    call_all()  # what is compiled refers to None
    counts = [sys.getrefcount(a) for a in (x, out, None, predicate)]
    for _ in range(1000):
        call_all()
    later = [sys.getrefcount(a) for a in (x, out, None, predicate)]
    assert all(abs(a - b) < 50 for a, b in zip(counts, later, strict=True))
    y, mask = leaky.forward(x, False, None, True, 0.5)
    leaky.backward(x, False, None, mask, 0.5)
    gone = weakref.ref(y), weakref.ref(mask.bits)
    assert sys.getrefcount(mask) <= 2  # the name's, and the call's
    del y, mask
    assert [each() for each in gone] == [None, None]


# The same for PReLU's gradients.
QUICK_GRADIENTS = {
    "rows": lambda f, g, w: f(g, False, None, g, w[:4], 0),
    "columns": lambda f, g, w: f(g, False, None, g, w, -1),
    "shared": lambda f, g, w: f(g, False, None, g, w[:1], 1),
    "inplace": lambda f, g, w: f(g, True, None, g.copy(), w, -1),
    "out": lambda f, g, w: f(g, False, np.empty_like(g), g, w, -1),
    "pair": lambda f, g, w: f(g, False, (np.empty_like(g), w + 0), g, w, -1),
    "halves of a pair": lambda f, g, w: f(g, False, (None, w + 0), g, w, -1),
    "out is x": lambda f, g, w: f(g + 0, False, g, g, w, -1),
    "weight is out": lambda f, g, w: f(g, False, (None, w), g, w, -1),
    "x in F": lambda f, g, w: f(g, False, None, cube("F"), w, -1),
    "g in F": lambda f, g, w: f(cube("F"), False, None, g, w, -1),
    "out in F": lambda f, g, w: f(g, False, cube("F"), g, w[:6], 1),
    "strided": lambda f, g, w: padded_pair(f(g[::2], False, None, g[::2], w, -1), g),
    "reversed": lambda f, g, w: f(g[::-1, :, ::-1], False, None, g, w[:4], 0),
    "crop in place": lambda f, g, w: padded_pair(
        f(g[:, 1:5], True, None, cube()[:, 2:], w, -1), g
    ),
    "one weight": lambda f, g, w: f(g, False, None, cube("F"), w[:1], 1),
    "weights of two axes": lambda f, g, w: f(
        g, False, None, g[::-1], cube()[0].copy(), -1
    ),
    "weight (1, C, 1)": lambda f, g, w: f(
        g, False, None, g[:, ::-1], cube()[:1, :, :1].copy(), -1
    ),
}
LEFT_GRADIENTS = {
    "shape": lambda f, g, w: f(g, False, None, g.reshape(6, 4, 8), w, -1),
    "dtype": lambda f, g, w: f(g, False, None, g.astype(np.float64), w, -1),
    "weight spread": lambda f, g, w: f(g, False, None, g, g[:, :1].copy(), -1),
    "weight spread, x in F": lambda f, g, w: f(
        g, False, None, cube("F"), g[:, :1].copy(), -1
    ),
    "weight in C, g and x in F": lambda f, g, w: f(
        cube("F"), False, None, cube("F"), g[0].copy(), -1
    ),
    "weight in C, g in F, x strided": lambda f, g, w: f(
        cube("F"), False, None, g[::-1], g[0].copy(), -1
    ),
    "sum in a strided result": lambda f, g, w: f(
        g, False, (wide := np.repeat(g, 2, 2)[..., ::2], wide.base[3, 5, 1:9]), g, w, -1
    ),
    "weight's dtype": lambda f, g, w: f(g, False, None, g, w.astype("f8"), -1),
    "half weight": lambda f, g, w: f(g, False, None, g, w.astype("f2"), -1),
    "list": lambda f, g, w: f(g, False, [g, w], g, w, -1),
    "triple": lambda f, g, w: f(g, False, (g, w, w), g, w, -1),
    "both": lambda f, g, w: f(g, True, (g, w), g, w, -1),
    "overlap": lambda f, g, w: f(g[1:], False, g[:-1], g[1:], w, -1),
    "x overlaps": lambda f, g, w: f(g[1:] + 0, False, g[:-1], g[1:], w, -1),
    "weight in out": lambda f, g, w: f(g, True, None, g + 0, g[0, 0], -1),
    "one in the other": lambda f, g, w: f(g, False, (g, g[0, 0]), g, w, -1),
    "read-only": lambda f, g, w: f(g, False, (None, frozen(w)), g, w, -1),
    "empty": lambda f, g, w: f(g[:0], False, None, g[:0], w, -1),
}


def frozen(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def ready_for_gradients():
    """The call of PReLU's gradients"""
    kinds = ARRAY, ARRAY, WEIGHT
    operation = Operation(activations._LEAKY_RELU.of_saved, kinds)
    return quick.Call(operation, sums=True).run


gradients = pytest.fixture(ready_for_gradients, scope="module")


@pytest.mark.parametrize("name", QUICK_GRADIENTS)
def test_plain_arrays_take_the_quick_call_of_gradients(name, gradients):
    g, w = cube(), normal((8,), float32, seed=1)
    dx, dw = QUICK_GRADIENTS[name](gradients, g, w)
    assert dx.shape == g.shape
    assert dw.size in (1, 4, 6, 8, 48)


@pytest.mark.parametrize("name", LEFT_GRADIENTS)
def test_other_gradients_are_left_to_python(name, gradients):
    g, w = cube(), normal((8,), float32, seed=1)
    before = g.copy(), w.copy()
    assert LEFT_GRADIENTS[name](gradients, g, w) is None
    assert np.array_equal(g, before[0])
    assert np.array_equal(w, before[1])


def test_the_quick_call_of_gradients_refers_to_what_it_returns(gradients):
    g, w = cube(), normal((8,), float32, seed=1)
    pair = np.empty_like(g), w.copy()

    def call_all():
        gradients(g, False, None, g, w, -1)
        gradients(g, True, None, g, w, -1)
        dx, dw = gradients(g, False, pair, g, w, -1)
        assert (dx is pair[0], dw is pair[1]) == (True, True)
        gradients(g, True, (None, w), g, w, -1)
        gradients(g[::2], False, None, g[::2], w, -1)
        assert gradients(g[1:], False, g[:-1], g[1:], w, -1) is None
        assert gradients(g, False, None, g[::-1], g[:, :1].copy(), -1) is None

    call_all()
    counted = g, w, *pair, None
    counts = [sys.getrefcount(a) for a in counted]
    for _ in range(1000):
        call_all()
    later = [sys.getrefcount(a) for a in counted]
    assert all(abs(a - b) < 50 for a, b in zip(counts, later, strict=True))
    gone = [weakref.ref(a) for a in gradients(g, False, None, g, w, -1)]
    assert [a() for a in gone] == [None, None]


def test_other_threads_go_on():
    """While a loop runs, and here at no other time, the interpreter is another's."""
    x, gate, log = normal(1 << 22, float32), threading.Lock(), []
    out = np.empty_like(x)
    F.relu(x, out=out)  # compiled and started: that would let others go on, too
    gate.acquire()
    other = threading.Thread(target=lambda: (gate.acquire(), log.append("gone on")))
    other.start()
    threading.Event().wait(0.05)  # the other waits at the gate
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        gate.release()
        for _ in range(100):
            F.relu(x, out=out)
            if log:
                break
        gone_on = bool(log)
    finally:
        sys.setswitchinterval(interval)
    other.join()
    assert gone_on


def shared():
    return int(threads._memory[threads._LOOPS])


@several_threads
@pytest.mark.parametrize("n", [1 << 20, 1 << 24])
def test_a_large_array_is_shared(n):
    x = normal(n, float32)
    _, mask = F.relu(x, return_mask=True)
    weight = normal(16, float32)
    for call in (
        lambda: F.relu(x),
        lambda: F.relu(x.copy(), inplace=True),
        lambda: F.relu(x, return_mask=True),
        lambda: F.relu_backward(x, x),
        lambda: F.relu_backward(x, mask),
        lambda: F.prelu(x.reshape(16, 16, -1), weight),
        lambda: F.prelu_backward(x.reshape(16, 16, -1), x.reshape(16, 16, -1), weight),
        lambda: F.prelu_backward(x.reshape(-1, 16), x.reshape(-1, 16), weight),
    ):
        before = shared()
        for _ in range(threads._LONGEST_PAUSE + 2):
            call()
            if shared() > before:
                break
        assert shared() > before


@several_threads
def test_one_thread_where_one_was_asked_for():
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    x, loops_before = normal(1 << 24, float32), shared()
    try:
        F.relu(x)
        F.relu_backward(x, x)
    finally:
        numba.set_num_threads(before)
    assert shared() == loops_before
    F.relu(x)
    assert shared() > loops_before


@several_threads
def test_a_thread_that_is_alone_shares_nothing():
    x = normal(1 << 24, float32)
    F.relu(x)
    loops_before = shared()
    with shield.alone(), shield.alone():
        F.relu(x)
    assert shared() == loops_before
    F.relu(x)
    assert shared() > loops_before


@pytest.mark.parametrize("order", [(2, 0, 1), (2, 1, 0), (0, 2, 1)])
def test_other_layouts_of_dense_arrays_are_not_copied(order, taken, fresh_pool):
    x = normal(1 << 20, float32).reshape(64, 128, 128).transpose(order)
    before = fresh_pool.used_bytes()
    y = F.leaky_relu(x)
    assert fresh_pool.used_bytes() - before == y.nbytes
    assert y.strides == x.strides
    assert len(taken) == 1


def apart(x):
    """A copy with a gap after each element, and a wider one after each row"""
    n = x.shape[-1]
    y = np.zeros((*x.shape[:-1], 2 * n + 3), x.dtype)[..., : 2 * n : 2]
    y[...] = x
    return y


def test_masks_of_other_layouts_are_not_copied(taken, fresh_pool):
    x, g = (normal((64, 64, 250), float32, seed=s) for s in (0, 1))
    wide, turned = apart(x), g.transpose(0, 2, 1).copy()
    right, (_, bits) = F.relu_backward(g, x), F.relu(x, return_mask=True)
    for saved, grad in ((wide, g), (x, apart(g)), (wide, turned)):
        y = None
        del taken[:]
        fresh_pool.free_all_blocks()
        before = fresh_pool.total_bytes()
        y, mask = F.relu(saved, return_mask=True)
        assert fresh_pool.total_bytes() - before < 1.1 * y.nbytes
        assert mask.bits.tobytes() == bits.bits.tobytes()
        if grad is not turned:
            assert_same(F.relu_backward(grad, mask), right)
        else:
            F.relu_backward(grad.transpose(0, 2, 1), mask, out=y)
            assert_same(y, right)
        assert {body for body, _ in taken} == {"to_bits", "from_bits"}


@pytest.mark.parametrize("shape", [(40, 32, 30, 25), (1 << 14, 60)])
def test_gradients_of_other_layouts_are_not_copied(shape, taken, fresh_pool):
    g, x = (normal(shape, float32, seed=s) for s in (0, 1))
    wide, weight = apart(x), normal(shape[1], float32)
    right, sums = F.prelu_backward(g, x, weight)
    del taken[:]
    dx = None
    for saved, w in ((wide, weight), (wide, weight[::-1])):
        del dx
        fresh_pool.free_all_blocks()
        before = fresh_pool.total_bytes()
        dx, dw = F.prelu_backward(g, saved, w)
        assert fresh_pool.total_bytes() - before < 1.1 * dx.nbytes
        assert w is not weight or dw.tobytes() == sums.tobytes()
        assert w is not weight or dx.tobytes() == right.tobytes()
    name = "prelu_backward_rows" if len(shape) == 4 else "prelu_backward_columns"
    assert taken == [(name, "apart")] * 2


def operation_of(body):
    """A formula of leaky_relu with the operands that a body takes"""
    spec = activations._LEAKY_RELU
    if body in sums.PARTS:
        return Operation(spec.of_saved, (ARRAY, ARRAY, WEIGHT))
    if body is loops.from_bits:
        return Operation(spec.gradient, (ARRAY, BITS, NUMBER))
    if body is loops.to_bits:
        return Operation(spec.formula, (ARRAY, NUMBER), spec.active, 1)
    if body in (loops.rows, loops.columns):
        return Operation(spec.formula, (ARRAY, WEIGHT))
    return Operation(spec.formula, (ARRAY, NUMBER))


GRADIENT = Operation(activations._LEAKY_RELU.of_saved, (ARRAY, ARRAY, NUMBER))


LOOPS = {
    "forward": (loops.plain, operation_of(loops.plain)),
    "backward": (loops.plain, GRADIENT),
    **{body.__name__: (body, operation_of(body)) for body in BLOCKS},
    **{body.__name__: (body, operation_of(body)) for body in sums.PARTS},
}


def without_numbers(operation):
    """The same operands for relu"""
    spec, active = activations._RELU, operation.active
    function = spec.of_saved if operation.arrays == 2 else spec.formula
    if BITS in operation.kinds:
        function = spec.gradient
    if WEIGHT in operation.kinds:
        return operation
    kinds = tuple(kind for kind in operation.kinds if kind != NUMBER)
    return Operation(function, kinds, active, 0)


def assembly(body, operation, dtype, target=build.PLAIN):
    """The part of a loop that the team shares"""
    fmt = format_of(np.dtype(dtype))
    python = build.bound(body, operation, fmt, target)
    signature = sums.SIGNATURE if body in sums.PARTS else loops.SIGNATURE
    options = {"error_model": "numpy"}
    loop = jit.CFunc(
        python,
        jit.sigutils.normalize_signature(signature),
        {},
        options,
        pipeline_class=jit._Compiler,  # as loops are compiled
    )
    loop.compile()
    text = loop._library.get_asm_str()
    (part,) = re.split(r"^fastrelu_part[.\d]*:$", text, flags=re.MULTILINE)[1:]
    return part


@pytest.mark.skipif(not X86, reason="reads the assembly language of x86")
@pytest.mark.parametrize(
    "dtype",
    ["float32", "float16", *(pytest.param(d, marks=LONG) for d in ("float64", "int8"))],
)
@pytest.mark.parametrize("which", ["forward", "backward", "to_bits", *SUMS])
def test_stores_past_the_cache(which, dtype):
    if which in SUMS and dtype == "int8":
        pytest.skip("a weight is a float")
    body, operation = LOOPS[which]
    operation = without_numbers(operation)
    stores = r"v?movnt(ps|pd|dq)"
    assert re.search(stores, assembly(body, operation, dtype, build.PAST_CACHE))
    for target in (build.PLAIN, build.IN_PLACE):
        assert not re.search(stores, assembly(body, operation, dtype, target))


@pytest.mark.skipif(not X86, reason="reads the assembly language of x86")
@pytest.mark.parametrize("target", [*build.TARGETS, build.APART])
@pytest.mark.parametrize("which", [*LOOPS])
def test_vector_code(which, target):
    if target == build.APART and which not in SUMS:
        pytest.skip("other loops have lines given to them")
    body, operation = LOOPS[which]
    code = assembly(body, operation, np.float32, target)
    assert re.search(r"v?mulps", code)
    assert which not in SUMS or re.search(r"v?mulpd", code)


@pytest.mark.skipif(not X86, reason="reads the assembly language of x86")
def test_vector_code_where_others_keep_code_on_the_disk(tmp_path):
    """Numba counts references then, even to what is part of a tuple."""
    (tmp_path / "others.py").write_text("def function(a):\n    return a + 1\n")
    script = f"""if True:
        import sys
        sys.path[:0] = [{str(tmp_path)!r}, {os.path.dirname(__file__)!r}]
        import numba, others, test_paths
        numba.njit(others.function, cache=True).compile((numba.float32,))
        code = test_paths.assembly(*test_paths.LOOPS["forward"], "float32")
        print("mulps" in code, "NRT" in code)
    """
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == "True False\n", done.stderr


@pytest.mark.skipif(not X86, reason="reads the assembly language of x86")
@pytest.mark.parametrize("which", SUMS)
def test_no_load_waits_for_another(which):
    """No mask made of x leaves out what of g is in no sum: memory would answer later."""
    code = assembly(*LOOPS[which], np.float32)
    masked = r"vmaskmovp[sd]\t[^%]*\(|vmov[au]p[sd]\t[^%]*\([^)]*\), %[xyz]mm\d+ \{%k"
    assert not re.search(masked, code)


@pytest.mark.long
@pytest.mark.skipif(not X86, reason="reads the assembly language of x86")
def test_simplest_vectors():
    """Where nothing can be loaded under a mask, as on ARM, loops are vector code too."""
    simplest = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    which = "vector_code and plain"
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", which]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        env=os.environ | simplest,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not X86, reason="reads the assembly language of x86")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_in_place_all_is_stored(which, dtype):
    """No mask leaves out what does not change, which is slower from memory."""
    body, operation = LOOPS[which]
    code = assembly(body, without_numbers(operation), dtype, build.IN_PLACE)
    masked = r"vmaskmovp[sd]\t%.*\(.*|vmov[au]p[sd]\t%.*\([^)]*\) \{%k"
    # But for the elements before a line, on their way by the stack.
    assert not [line for line in re.findall(masked, code) if "(%rsp" not in line]


# That they give the same bits ---------------------------------------------------------


def run_loop(loop, a, y, beside=None, inner=1, moved=0, numbers=()):
    """Call a loop on flat arrays"""
    words = np.zeros(loops.LENGTH, np.int64)
    words[loops.ARRAYS : loops.ARRAYS + len(a)] = [each.ctypes.data for each in a]
    words[[loops.Y, loops.SIZE, loops.MOVED]] = y.ctypes.data, y.size, moved
    if beside is not None:
        words[loops.BESIDE], words[loops.CHANNELS] = beside.ctypes.data, beside.size
    words[loops.INNER] = inner
    words[loops.NUMBERS :].view(np.float64)[: len(numbers)] = numbers
    loop.ctypes(words.ctypes.data)


def operands(which, dtype, n):
    """Flat arrays, what lies beside them, and how many elements have one weight"""
    fmt = format_of(dtype)
    arrays = [sample((n,), dtype, seed).view(fmt.storage) for seed in (0, 1)]
    if which != "backward":
        del arrays[1]
    if which in ("rows", "columns"):
        weights = np.linspace(-1, 2, 7 if which == "rows" else 96).astype(fmt.product)
        return arrays, weights, 50 if which == "rows" else 2
    return arrays, np.random.default_rng(0).integers(0, 256, -(-n // 8), np.uint8), 1


@pytest.mark.parametrize("n", [1, 63, 64, 200, 4096, 13_001])
@pytest.mark.parametrize("dtype", FLOATS, indirect=True)
@pytest.mark.parametrize("which", [name for name in LOOPS if name not in SUMS])
def test_every_path_gives_the_same_bits(which, dtype, n):
    fmt, (body, operation) = format_of(dtype), LOOPS[which]
    a, beside, inner = operands(which, dtype, n)
    more = {"beside": beside, "inner": inner, "numbers": [0.37] * operation.numbers}
    expected = np.zeros_like(a[0])
    run_loop(build.compiled(body, operation, fmt), a, expected, **more)
    expected, mask = expected.view(dtype), beside.copy()
    memory = np.zeros(expected.nbytes + 128, np.uint8)
    threads.ready()
    for moved, target in product((0, threads.MUCH), (build.PLAIN, build.PAST_CACHE)):
        loop = build.compiled(body, operation, fmt, target)
        for offset in range(0, 72, 8):
            memory[:] = 0xA5
            y = memory[offset:][: expected.nbytes].view(fmt.storage)
            if which == "to_bits":
                beside[:] = 0xFF
            run_loop(loop, a, y, moved=moved, **more)
            assert_same(y.view(dtype), expected)
            assert np.array_equal(beside, mask)
            assert (memory[:offset] == 0xA5).all()
            assert (memory[offset + expected.nbytes :] == 0xA5).all()
    loop = build.compiled(body, operation, fmt, build.IN_PLACE)
    for moved in (0, threads.MUCH):
        y = a[0].copy()
        run_loop(loop, [y, *a[1:]], y, moved=moved, **more)
        assert_same(y.view(dtype), expected)
        assert np.array_equal(beside, mask)


def test_a_quick_call_warns_of_nothing():
    x = np.array([np.nan, -np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45], float32)
    for _ in range(3):  # warnings are errors here
        F.leaky_relu(x, 1e30)
        F.leaky_relu_backward(x, x, 1e30)
        F.relu(x)


def test_threads_that_use_other_slopes():
    x, wrong = normal(100, float32), []

    def call(slope):
        expected = np.where(x > 0, x, np.float32(slope) * x)
        for _ in range(3000):
            if not np.array_equal(F.leaky_relu(x, slope), expected):
                wrong.append(slope)

    team = [threading.Thread(target=call, args=(k / 8,)) for k in range(4)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert wrong == []


def test_signed_zero_slopes_are_two():
    x = np.array([-1.0], float32)
    assert not np.signbit(F.leaky_relu(x, -0.0))[0]
    assert np.signbit(F.leaky_relu(x, 0.0))[0]
    assert not np.signbit(F.leaky_relu(x, -0.0))[0]


# The pool -----------------------------------------------------------------------------


def test_memory_is_recycled(fresh_pool):
    x = normal(LARGE, float32)
    before = fresh_pool.used_bytes()
    y = F.relu(x)
    size = fresh_pool.used_bytes() - before
    assert y.nbytes <= size < y.nbytes + 4096
    place = y.ctypes.data
    assert place % 4096 == 2048
    del y
    assert fresh_pool.free_bytes() == size
    assert F.relu(x).ctypes.data == place
    assert fresh_pool.total_bytes() == before + size
    fresh_pool.free_all_blocks()
    assert fresh_pool.total_bytes() == before


def test_a_large_mask_is_recycled_too(fresh_pool):
    x = normal(8 * pool.SMALLEST, np.dtype(np.int8))
    before = fresh_pool.used_bytes()
    _, mask = F.relu(x, return_mask=True)
    assert fresh_pool.used_bytes() - before == x.nbytes + mask.nbytes
    bits = mask.bits[5:]
    del mask, _
    assert fresh_pool.used_bytes() - before == x.nbytes // 8
    assert np.array_equal(bits, np.packbits(x > 0, bitorder="little")[5:])


def test_idle_memory_is_bounded(fresh_pool):
    x = normal(LARGE, float32)
    limit = fresh_pool.get_limit()
    try:
        fresh_pool.set_limit(3 * x.nbytes)
        results = [F.relu(x) for _ in range(6)]
        del results
        assert 0 < fresh_pool.free_bytes() <= 3 * x.nbytes
        fresh_pool.set_limit(0)
        assert fresh_pool.free_bytes() == 0
        F.relu(x)
        assert fresh_pool.free_bytes() == 0
        with pytest.raises(ValueError, match="size"):
            fresh_pool.set_limit(-1)
    finally:
        fresh_pool.set_limit(limit)


def from_torch(y):
    torch = pytest.importorskip("torch")
    return torch.from_numpy(y)[3:]


def from_dlpack(y):
    return np.from_dlpack(y)[3:]


def from_dlpack_to_torch(y):
    torch = pytest.importorskip("torch")
    return torch.from_dlpack(y)[3:]


ALIASES = {
    "view": lambda y: y[3:],
    "reshape": lambda y: y.reshape(1, -1).T[3:],
    "dtype": lambda y: y.view(np.uint8)[12:],
    "memoryview": lambda y: memoryview(y)[3:],
    "frombuffer": lambda y: np.frombuffer(y, float32)[3:],
    "dlpack": from_dlpack,
    "torch": from_torch,
    "torch_dlpack": from_dlpack_to_torch,
}


@pytest.mark.parametrize("alias", ALIASES)
def test_no_block_is_handed_out_twice(alias, fresh_pool):
    x = normal(LARGE, float32)
    kept = ALIASES[alias](F.relu(x))
    before = np.asarray(kept).tobytes()
    later = [F.relu(-x) for _ in range(3)]
    gc.collect()
    assert np.asarray(kept).tobytes() == before
    assert all(not np.shares_memory(np.asarray(kept), y) for y in later)
    del later
    place = np.asarray(kept).__array_interface__["data"][0] - 12
    del kept
    gc.collect()
    again = [F.relu(x) for _ in range(4)]
    assert place in [y.ctypes.data for y in again]  # and then it is


def test_a_cycle_gives_its_block_back(fresh_pool):
    x = normal(LARGE, float32)
    before = fresh_pool.used_bytes()
    cycle = [F.relu(x)]
    cycle.append(cycle)
    assert fresh_pool.used_bytes() > before
    del cycle
    gc.collect()
    assert fresh_pool.used_bytes() == before


def test_threads_share_the_pool(fresh_pool):
    """Canaries: whoever gets a block that somebody still holds overwrites it."""
    x, wrong = normal(LARGE, float32), []

    def call(seed):
        held = []
        for i in range(60):
            value = np.float32(seed * 1000 + i + 1)
            y = F.relu(x)
            y[...] = value
            held.append((y[::1000], value))
            if i % 3 == 0:
                held.pop(0)
            wrong.extend(value for view, value in held if (view != value).any())

    team = [threading.Thread(target=call, args=(k,)) for k in range(4)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert wrong == []
    assert fresh_pool.used_bytes() == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_gets_a_pool_that_works(fresh_pool):
    x = normal(1000, float32)
    pid = os.fork()
    if pid == 0:
        fine = False
        try:
            y = np.empty_like(normal(LARGE, float32))
            kept = pool.empty_like(y)
            kept[...] = 1
            fine = fresh_pool.used_bytes() >= kept.nbytes and F.relu(x).shape == x.shape
        finally:
            os._exit(0 if fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


BESIDE = {
    "bools": lambda x, g: F.relu_backward(g, x > 0),
    "bools into an array": lambda x, g: F.leaky_relu_backward(g, x > 0, 0.5, out=x),
    "bools of columns": lambda x, g: F.relu6_backward(g, np.asfortranarray(x > 0)),
    "columns and bools of columns": lambda x, g: F.relu_backward(g.T, x.T > 0),
    "another float": lambda x, g: F.leaky_relu_backward(g, x.astype("f8"), 0.5),
    "integers": lambda x, g: F.relu_backward(g, x.astype("i1"), inplace=True),
    "of two numbers": lambda x, g: F.threshold_backward(g, x.astype("f8"), 0.5),
    "a number's gradient": lambda x, g: F.relu_backward(1.0, x),
    "an int's": lambda x, g: F.leaky_relu_backward(2, x, 0.5),
    "a number's weight": lambda x, g: F.prelu(x, 0.25),
    "a list": lambda x, g: F.prelu(x, [0.25] * 9, inplace=True),
    "both": lambda x, g: F.prelu_backward(g, x, 0.25),
    "both into arrays": lambda x, g: F.prelu_backward(g, x, [0.25], out=(x, g[0, :1])),
    "both, of a number": lambda x, g: F.prelu_backward(1.0, x, [0.25]),
}


@pytest.mark.skipif(not cpu.is_fast(), reason="portable loops have no quick calls")
@pytest.mark.parametrize("case", BESIDE)
def test_what_is_beside_the_plainest_is_quick_too(case, monkeypatch):
    """Small arrays would take twenty times as long on the long way"""
    x, g = (normal((7, 9), np.float32, seed) for seed in (1, 2))
    with monkeypatch.context() as patch:
        for function in twins.public_functions():
            patch.setattr(function, "call", function.left)
            patch.setattr(function, "asks_numpy", True)  # and stays so
            patch.setattr(function, "_quickly", lambda *_: None)
            patch.setattr(function, "_again", lambda *_: None)
        expected = BESIDE[case](x.copy(), g.copy())
    BESIDE[case](x.copy(), g.copy())

    def refuse(*arguments, **more):
        raise AssertionError("the long way")

    for way in ("_elementwise", "_prelu", "_prelu_backward"):
        monkeypatch.setattr(_dispatch, way, refuse)
    found = BESIDE[case](x.copy(), g.copy())
    pairs = zip(found, expected) if isinstance(found, tuple) else [(found, expected)]
    for a, b in pairs:
        assert_same(a, b)
