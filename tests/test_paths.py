"""The quick ways: that they are taken, that they give the same bits, and the pool."""

import ctypes
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
from conftest import FLOATS, normal, place, run_loop, sample
from reference import assert_same

import fastrelu as F
from fastrelu import activations
from fastrelu.cpu import calls, fast, loops, pool, threads
from fastrelu.cpu.lanes import lane_of

float32 = np.dtype(np.float32)
LARGE = pool.SMALLEST // 4 + 3
X86 = platform.machine().lower() in ("x86_64", "amd64")
BLOCKS = ["forward", "backward", "forward_mask", "backward_mask", "rows", "columns"]
SUMS = [block.__name__ for block in loops.PARTS]
several_threads = pytest.mark.skipif(
    numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads"
)


PLAIN = activations._relu_calls, activations._leaky_relu_calls
GRADIENTS = activations._relu_backward_calls, activations._leaky_relu_backward_calls
QUICK = [
    call
    for row in (*PLAIN, *GRADIENTS)
    for call in (row.flat, row.masked, row.by_channel)
]
LOOP = ctypes.CFUNCTYPE(
    None, *[ctypes.c_int64] * 3, *[ctypes.c_ssize_t] * 3, ctypes.c_double, ctypes.c_long
)
BACKWARD_LOOP = ctypes.CFUNCTYPE(
    ctypes.c_int64, *[ctypes.c_int64] * 5, *[ctypes.c_ssize_t] * 4
)


@pytest.fixture
def taken(monkeypatch):
    """The loops that were run: block and kind"""
    runs, kept, compiled = [], [], loops.compiled

    def record(block, formula, lane, kind=loops.PLAIN):
        loop = compiled(block, formula, lane, kind)

        def run(*arguments):
            runs.append((block.__name__, kind))
            return loop.ctypes(*arguments)

        kept.append((BACKWARD_LOOP if block in loops.PARTS else LOOP)(run))
        address = ctypes.cast(kept[-1], ctypes.c_void_p).value
        return types.SimpleNamespace(address=address, ctypes=run)

    monkeypatch.setattr(loops, "compiled", record)
    monkeypatch.setattr(threads, "CACHE", 1 << 24)
    ask_for_loops_again()
    yield runs
    monkeypatch.undo()
    ask_for_loops_again()


def ask_for_loops_again():
    for call in QUICK:
        call.table[calls._CACHE] = threads.CACHE
        for row in call.rows.values():
            call.table[row + calls._LOOP : row + calls._ROW] = 0


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
        F.prelu_backward(columns, columns, weight[None])  # the long way
    F.prelu_backward(large.copy(), large, weight[:1], inplace=True)
    assert taken == [
        ("forward", "plain"),
        ("forward", "in_place"),
        ("forward", "past_cache"),
        ("forward_mask", "past_cache"),
        ("backward", "plain"),
        ("backward", "past_cache"),
        ("forward", "past_cache"),
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
    by_axes = weight[:, None, None]  # for the long way
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


def unpickled(x):
    return pickle.loads(pickle.dumps(x))


def with_weight_before_out(f, x):
    memory = np.ones(8 + x.size, float32)
    out = memory[8:].reshape(x.shape)
    return f.by_channel.call(x, memory[:8], False, out, -1)


# What a call takes, and the same with something that it leaves to Python.
QUICK_CALLS = {
    "fresh": lambda f, x: f.flat.call(x, 0.5, False, None),
    "inplace": lambda f, x: f.flat.call(x, 0.5, True, None),
    "out": lambda f, x: f.flat.call(x, 0.5, False, np.empty_like(x)),
    "out is x": lambda f, x: f.flat.call(x, 0.5, False, x),
    "mask": lambda f, x: f.masked.call(x, 0.5, False, None, np.zeros(24, np.uint8)),
    "rows": lambda f, x: f.by_channel.call(
        x.reshape(3, 1, 64), x.ravel()[:3], False, None, 0
    ),
    "columns": lambda f, x: f.by_channel.call(x, x[0, 0].copy(), True, None, -1),
    "shared": lambda f, x: f.by_channel.call(x, x.ravel()[:1].copy(), False, None, 1),
    "saved": lambda f, x: f.gradient.call(x, 0.5, False, None, x.copy()),
    "out is saved": lambda f, x: f.gradient.call(x.copy(), 0.5, False, x, x),
}
LEFT_CALLS = {
    "integer slope": lambda f, x: f.flat.call(x, 1, False, None),
    "infinite slope": lambda f, x: f.flat.call(x, np.inf, False, None),
    "nan slope": lambda f, x: f.flat.call(x, np.nan, False, None),
    "both": lambda f, x: f.flat.call(x, 0.5, True, x),
    "one": lambda f, x: f.flat.call(x, 0.5, 1, None),
    "dtype": lambda f, x: f.flat.call(x, 0.5, False, x.astype(np.float64)),
    "shape": lambda f, x: f.flat.call(x, 0.5, False, np.empty((4, 6, 7), float32)),
    "ndim": lambda f, x: f.flat.call(x, 0.5, False, np.empty((1, 4, 6, 8), float32)),
    "swapped": lambda f, x: f.flat.call(x, 0.5, False, x.astype(">f4")),
    "list": lambda f, x: f.flat.call(x.tolist(), 0.5, False, None),
    "subclass": lambda f, x: f.flat.call(x.view(np.memmap), 0.5, False, None),
    "strided": lambda f, x: f.flat.call(x[::2], 0.5, False, None),
    "misaligned": lambda f, x: f.flat.call(place(x, "misaligned")[0], 0.5, False, None),
    "order": lambda f, x: f.flat.call(x, 0.5, False, cube("F")),
    "overlap": lambda f, x: f.flat.call(x[1:], 0.5, False, x[:-1]),
    "overlap ahead": lambda f, x: f.flat.call(x[:-1], 0.5, False, x[1:]),
    "dimensions": lambda f, x: f.flat.call(x, 0.5, False, np.empty((4, 6), float32)),
    "bits": lambda f, x: f.masked.call(x, 0.5, False, None, np.zeros(25, np.uint8)),
    "bits' dtype": lambda f, x: f.masked.call(x, 0.5, False, None, np.zeros(24, "i1")),
    "bits in F": lambda f, x: f.masked.call(
        cube("F"), 0.5, False, None, np.zeros(24, np.uint8)
    ),
    "axis": lambda f, x: f.by_channel.call(x, x.ravel()[:8], False, None, 3),
    "huge axis": lambda f, x: f.by_channel.call(x, x.ravel()[:8], False, None, 2**70),
    "true axis": lambda f, x: f.by_channel.call(x, x.ravel()[:6], False, None, True),
    "channels": lambda f, x: f.by_channel.call(x, x.ravel()[:7], False, None, -1),
    "weight's dtype": lambda f, x: f.by_channel.call(x, np.ones(8), False, None, -1),
    "weight's ndim": lambda f, x: f.by_channel.call(x, x[0], False, None, -1),
    "unknown dtype": lambda f, x: f.flat.call(x.astype("F"), 0.5, False, None),
    "saved's dtype": lambda f, x: f.gradient.call(
        x, 0.5, False, None, x.view(np.int32)
    ),
    "saved's shape": lambda f, x: f.gradient.call(x, 0.5, False, None, x[:2].copy()),
    "saved in F": lambda f, x: f.gradient.call(x, 0.5, False, None, cube("F")),
    "saved in part": lambda f, x: f.gradient.call(x[:3], 0.5, True, None, x[1:]),
    "channels in F": lambda f, x: f.by_channel.call(
        cube("F"), x.ravel()[:8], False, None, -1
    ),
    "channels' out": lambda f, x: f.by_channel.call(
        x, x.ravel()[:8], False, np.empty((4, 6, 9), float32), -1
    ),
    "weight in out": lambda f, x: f.by_channel.call(x, x.ravel()[:8], True, None, -1),
}


def ready_for_float32():
    """The calls of leaky_relu"""
    row, gradients = (
        activations._leaky_relu_calls,
        activations._leaky_relu_backward_calls,
    )
    calls = {
        "flat": row.flat,
        "masked": row.masked,
        "by_channel": row.by_channel,
        "gradient": gradients.flat,
    }
    for call in calls.values():
        for block in range(len(call.blocks)):
            for in_place in (False, True):
                call.prepare(float32, 4, in_place=in_place, block=block)
    return types.SimpleNamespace(**calls)


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
        fast._run(types.SimpleNamespace(call=lambda: None))


def test_the_quick_call_knows_a_dtype_by_what_it_is(leaky):
    x = unpickled(cube())
    assert x.dtype is not float32
    assert leaky.flat.call(x, 0.5, False, None) is not None
    x = np.zeros(4, np.dtype(float32, metadata={"unit": "m"}))
    assert leaky.flat.call(x, 0.5, False, None) is not None


def test_the_quick_call_keeps_the_memory_order(leaky):
    y = leaky.flat.call(cube("F"), 0.5, False, None)
    assert y.flags.f_contiguous
    assert_same(y, F.leaky_relu(cube(), 0.5))


def test_the_quick_call_refers_to_what_it_returns(leaky):
    """Neither does a result live for ever, nor is None or an argument given up."""
    x, out = cube(), cube()
    counts = [sys.getrefcount(a) for a in (x, out, None)]
    for _ in range(1000):
        leaky.flat.call(x, 0.5, False, None)
        leaky.flat.call(x, 0.5, True, None)
        leaky.flat.call(x, 0.5, False, out)
        leaky.flat.call(x[::2], 0.5, False, None)
        leaky.by_channel.call(x, x.ravel()[:8], False, out, -1)
    later = [sys.getrefcount(a) for a in (x, out, None)]
    assert all(abs(a - b) < 50 for a, b in zip(counts, later, strict=True))
    y = leaky.flat.call(x, 0.5, False, None)
    gone = weakref.ref(y)
    del y
    assert gone() is None


# The same for PReLU's gradients.
QUICK_GRADIENTS = {
    "rows": lambda f, g, w: f(g, w[:4], False, None, 0, g),
    "columns": lambda f, g, w: f(g, w, False, None, -1, g),
    "shared": lambda f, g, w: f(g, w[:1], False, None, 1, g),
    "inplace": lambda f, g, w: f(g, w, True, None, -1, g.copy()),
    "out": lambda f, g, w: f(g, w, False, np.empty_like(g), -1, g),
    "pair": lambda f, g, w: f(g, w, False, (np.empty_like(g), w + 0), -1, g),
    "halves of a pair": lambda f, g, w: f(g, w, False, (None, w + 0), -1, g),
    "out is x": lambda f, g, w: f(g + 0, w, False, g, -1, g),
    "weight is out": lambda f, g, w: f(g, w, False, (None, w), -1, g),
}
LEFT_GRADIENTS = {
    "shape": lambda f, g, w: f(g, w, False, None, -1, g.reshape(6, 4, 8)),
    "dtype": lambda f, g, w: f(g, w, False, None, -1, g.astype(np.float64)),
    "x in F": lambda f, g, w: f(g, w, False, None, -1, cube("F")),
    "weight's dtype": lambda f, g, w: f(g, w.astype("f8"), False, None, -1, g),
    "half weight": lambda f, g, w: f(g, w.astype("f2"), False, None, -1, g),
    "list": lambda f, g, w: f(g, w, False, [g, w], -1, g),
    "triple": lambda f, g, w: f(g, w, False, (g, w, w), -1, g),
    "both": lambda f, g, w: f(g, w, True, (g, w), -1, g),
    "overlap": lambda f, g, w: f(g[1:], w, False, g[:-1], -1, g[1:]),
    "x overlaps": lambda f, g, w: f(g[1:] + 0, w, False, g[:-1], -1, g[1:]),
    "weight in out": lambda f, g, w: f(g, g[0, 0], True, None, -1, g + 0),
    "one in the other": lambda f, g, w: f(g, w, False, (g, g[0, 0]), -1, g),
    "read-only": lambda f, g, w: f(g, w, False, (None, frozen(w)), -1, g),
    "empty": lambda f, g, w: f(g[:0], w, False, None, -1, g[:0]),
}


def frozen(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def ready_for_gradients():
    """The call of PReLU's gradients"""
    call = activations._leaky_relu_backward_calls.by_channel
    # Parts of the cube may need another loop: all that is left must be for a reason.
    for x, block, in_place in product((cube(), cube()[1:]), (0, 1), (False, True)):
        call.prepare(float32, x.nbytes, in_place=in_place, block=block)
    return call.call


gradients = pytest.fixture(ready_for_gradients, scope="module")


@pytest.mark.parametrize("name", QUICK_GRADIENTS)
def test_plain_arrays_take_the_quick_call_of_gradients(name, gradients):
    g, w = cube(), normal((8,), float32, seed=1)
    dx, dw = QUICK_GRADIENTS[name](gradients, g, w)
    assert dx.shape == g.shape
    assert dw.size in (1, 4, 8)


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
    counted = g, w, *pair, None
    counts = [sys.getrefcount(a) for a in counted]
    for _ in range(1000):
        gradients(g, w, False, None, -1, g)
        gradients(g, w, True, None, -1, g)
        dx, dw = gradients(g, w, False, pair, -1, g)
        assert (dx is pair[0], dw is pair[1]) == (True, True)
        gradients(g, w, True, (None, w), -1, g)
    later = [sys.getrefcount(a) for a in counted]
    assert all(abs(a - b) < 50 for a, b in zip(counts, later, strict=True))
    gone = [weakref.ref(a) for a in gradients(g, w, False, None, -1, g)]
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


@pytest.mark.parametrize("order", [(2, 0, 1), (2, 1, 0), (0, 2, 1)])
def test_other_layouts_of_dense_arrays_are_not_copied(order, taken, fresh_pool):
    x = normal(1 << 20, float32).reshape(64, 128, 128).transpose(order)
    before = fresh_pool.used_bytes()
    y = F.leaky_relu(x)
    assert fresh_pool.used_bytes() - before == y.nbytes
    assert y.strides == x.strides
    assert len(taken) == 1


def assembly(block, formula, dtype, kind=loops.PLAIN):
    """The part of a loop that the team shares"""
    lane = lane_of(np.dtype(dtype))
    python = loops.bound(block, formula, lane, kind)
    loop = numba.njit(error_model="numpy")(python)
    sums = block in loops.PARTS
    loop.compile((loops.BACKWARD_SIGNATURE if sums else loops.SIGNATURE).args)
    (text,) = loop.inspect_asm().values()
    (part,) = re.split(r"^fastrelu_part[.\d]*:$", text, flags=re.MULTILINE)[1:]
    return part


@pytest.mark.skipif(not X86, reason="reads the assembly language of x86")
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int8"])
@pytest.mark.parametrize("block", ["forward", "backward", "forward_mask", *SUMS])
def test_stores_past_the_cache(block, dtype):
    if block in SUMS and dtype == "int8":
        pytest.skip("a weight is a float")
    formula = activations._relu_gradient if "backward" in block else activations._relu
    block = getattr(loops, block)
    stores = r"v?movnt(ps|pd|dq)"
    assert re.search(stores, assembly(block, formula, dtype, loops.PAST_CACHE))
    for kind in (loops.PLAIN, loops.IN_PLACE):
        assert not re.search(stores, assembly(block, formula, dtype, kind))


@pytest.mark.skipif(not X86, reason="reads the assembly language of x86")
@pytest.mark.parametrize("kind", loops.KINDS)
@pytest.mark.parametrize("block", [*BLOCKS, *SUMS])
def test_vector_code(block, kind):
    formula = activations._leaky_relu
    if "backward" in block:
        formula = activations._leaky_relu_gradient
    code = assembly(getattr(loops, block), formula, np.float32, kind)
    assert re.search(r"v?mulps", code)
    assert block not in SUMS or re.search(r"v?mulpd", code)


@pytest.mark.skipif(not X86, reason="reads the assembly language of x86")
@pytest.mark.parametrize("block", SUMS)
def test_no_load_waits_for_another(block):
    """No mask made of x leaves out what of g is in no sum: memory would answer later."""
    formula = activations._leaky_relu_gradient
    code = assembly(getattr(loops, block), formula, np.float32)
    masked = r"vmaskmovp[sd]\t[^%]*\(|vmov[au]p[sd]\t[^%]*\([^)]*\), %[xyz]mm\d+ \{%k"
    assert not re.search(masked, code)


@pytest.mark.skipif(not X86, reason="reads the assembly language of x86")
def test_simplest_vectors():
    """Where nothing can be loaded under a mask, as on ARM, loops are vector code too."""
    simplest = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "vector_code"]
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
@pytest.mark.parametrize("block", ["forward", "backward"])
def test_in_place_all_is_stored(block, dtype):
    """No mask leaves out what does not change, which is slower from memory."""
    formula = activations._relu_gradient if block == "backward" else activations._relu
    code = assembly(getattr(loops, block), formula, dtype, loops.IN_PLACE)
    masked = r"vmaskmovp[sd]\t%.*\(|vmov[au]p[sd]\t%.*\([^)]*\) \{%k"
    # But for the elements before a line, on their way by the stack.
    assert not [line for line in re.findall(masked, code) if "(%rsp" not in line]


# That they give the same bits ---------------------------------------------------------


def arguments(block, dtype, n):
    """Flat arrays, and what the block takes beside them."""
    lane = lane_of(dtype)
    a = sample((n,), dtype).view(lane.storage)
    if block == "backward":
        return a, sample((n,), dtype, seed=1).view(lane.storage), 0.37
    if block == "backward_mask":
        return a, np.random.default_rng(0).integers(0, 256, -(-n // 8), np.uint8), 0.37
    if block == "forward_mask":
        return a, np.zeros(-(-n // 8), np.uint8), 0.37
    if block == "forward":
        return a, a, 0.37
    weights = np.linspace(-1, 2, 7 if block == "rows" else 96).astype(lane.product)
    return a, weights, 50 if block == "rows" else 2


@pytest.mark.parametrize("n", [1, 63, 64, 200, 4096, 13_001])
@pytest.mark.parametrize("dtype", FLOATS, indirect=True)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_path_gives_the_same_bits(block, dtype, n):
    formula = activations._leaky_relu
    if "backward" in block:
        formula = activations._leaky_relu_gradient
    lane, function = lane_of(dtype), getattr(loops, block)
    a, b, slope = arguments(block, dtype, n)
    expected = np.zeros_like(a)
    run_loop(loops.compiled(function, formula, lane), a, b, expected, slope)
    expected, mask = expected.view(dtype), b.copy()
    memory = np.zeros(a.nbytes + 128, np.uint8)
    threads.ready()
    for moved, kind in product((0, threads.MUCH), (loops.PLAIN, loops.PAST_CACHE)):
        loop = loops.compiled(function, formula, lane, kind)
        for offset in range(0, 72, 8):
            memory[:] = 0xA5
            y = memory[offset:][: a.nbytes].view(lane.storage)
            if block == "forward_mask":
                b[:] = 0xFF
            run_loop(loop, a, b, y, slope, moved)
            assert_same(y.view(dtype), expected)
            assert block != "forward_mask" or np.array_equal(b, mask)
            assert (memory[:offset] == 0xA5).all()
            assert (memory[offset + a.nbytes :] == 0xA5).all()
    loop = loops.compiled(function, formula, lane, loops.IN_PLACE)
    for moved in (0, threads.MUCH):
        y = a.copy()
        run_loop(loop, y, y if b is a else b, y, slope, moved)
        assert_same(y.view(dtype), expected)
        assert block != "forward_mask" or np.array_equal(b, mask)


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
