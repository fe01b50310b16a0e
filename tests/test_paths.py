"""The quick ways: that they are taken, that they give the same bits, and the pool."""

import gc
import os
import platform
import re
import threading

import numba
import numpy as np
import pytest
import reference
from conftest import FLOATS, normal, sample
from reference import assert_same

import fastrelu as F
from fastrelu import activations
from fastrelu.cpu import loops, pool, threads
from fastrelu.cpu.jit import compile_
from fastrelu.cpu.lanes import lane_of
from fastrelu.cpu.ufuncs import ufunc

float32 = np.dtype(np.float32)
LARGE = pool.SMALLEST // 4 + 3
X86 = platform.machine().lower() in ("x86_64", "amd64")
BLOCKS = ["forward", "backward", "forward_mask", "backward_mask", "rows", "columns"]
several_threads = pytest.mark.skipif(
    numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads"
)


@pytest.fixture
def taken(monkeypatch):
    """The loops that were run: their driver, block, and whether past the cache."""
    runs = []
    compiled = loops.compiled

    def record(driver, block, formula, lane, past_cache=False):
        loop = compiled(driver, block, formula, lane, past_cache)

        def run(*args):
            names = [f.__name__ for f in (driver, block) if f is not None]
            runs.append((*names, past_cache))
            return loop(*args)

        return run

    monkeypatch.setattr(loops, "compiled", record)
    return runs


@pytest.fixture
def fresh_pool():
    gc.collect()  # what earlier tests left in cycles
    default = F.get_default_memory_pool()
    default.free_all_blocks()
    yield default
    default.free_all_blocks()


# That they are taken ------------------------------------------------------------------


def test_which_loop_runs(taken, monkeypatch):
    monkeypatch.setattr(threads, "CACHE", 1 << 24)
    middle, large = normal(1 << 20, float32), normal(1 << 22, float32)
    F.relu(middle)
    F.relu(middle.copy(), inplace=True)
    F.relu_backward(middle, middle)
    F.relu(large.copy(), inplace=True)
    assert taken == []  # a ufunc is all they need
    F.relu(large)
    F.relu(large, return_mask=True)
    F.leaky_relu(large.reshape(2048, 2048).T)
    assert taken == [
        ("straight", "forward", True),
        ("straight", "forward_mask", True),
        ("straight", "forward", True),
    ]


def test_a_small_array_takes_a_ufunc(taken):
    x = normal(1000, float32)
    F.relu(x)
    F.leaky_relu(x.reshape(10, 100), 0.5, out=x.reshape(10, 100))
    F.leaky_relu_backward(x, x, 0.5, inplace=True)
    F.prelu(x.reshape(10, 100), normal(100, float32))
    assert taken == []


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


def assembly(driver, block, formula, dtype, past_cache=False):
    lane = lane_of(np.dtype(dtype))
    python = loops.bound(driver, block, formula, lane, "seen", past_cache)
    loop = compile_(python)
    a = np.zeros(1 << 12, lane.storage)
    b = np.zeros(1 << 9, np.uint8) if "mask" in block.__name__ else a.copy()
    y = a.copy()
    args = (a, b, 0.5, 0) if "inplace" in driver.__name__ else (a, b, y, 0.5, 0)
    loop(*args)
    (text,) = loop.inspect_asm().values()
    return text


@pytest.mark.skipif(not X86, reason="reads the assembly language of x86")
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int8"])
@pytest.mark.parametrize("block", ["forward", "backward", "forward_mask"])
def test_stores_past_the_cache(block, dtype):
    formula = activations._relu_gradient if block == "backward" else activations._relu
    block = getattr(loops, block)
    stores = r"v?movnt(ps|pd|dq)"
    assert re.search(stores, assembly(loops.straight, block, formula, dtype, True))
    assert not re.search(stores, assembly(loops.straight, block, formula, dtype))


@pytest.mark.skipif(not X86, reason="reads the assembly language of x86")
@pytest.mark.parametrize("driver", ["straight", "inplace"])
@pytest.mark.parametrize("block", ["forward", "backward"])
def test_vector_code(block, driver):
    formula = activations._leaky_relu
    if block == "backward":
        formula = activations._leaky_relu_gradient
    text = assembly(getattr(loops, driver), getattr(loops, block), formula, np.float32)
    assert re.search(r"v?mulps", text)


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
    weights = np.linspace(-1, 2, 7 if block == "rows" else 96).astype(lane.product)
    return a, (a if block == "forward" else weights), 0.37 if block == "forward" else 50


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
    loops.compiled(loops.straight, function, formula, lane)(a, b, expected, slope, 0)
    expected, mask = expected.view(dtype), b.copy()
    memory = np.zeros(a.nbytes + 128, np.uint8)
    threads.ready()
    for moved, past_cache in [
        (0, False),
        (threads.MUCH, False),
        (0, True),
        (threads.MUCH, True),
    ]:
        loop = loops.compiled(loops.straight, function, formula, lane, past_cache)
        for offset in range(0, 72, 8):
            memory[:] = 0xA5
            y = memory[offset:][: a.nbytes].view(lane.storage)
            if block == "forward_mask":
                b[:] = 0xFF
            loop(a, b, y, slope, moved)
            assert_same(y.view(dtype), expected)
            assert block != "forward_mask" or np.array_equal(b, mask)
            assert (memory[:offset] == 0xA5).all()
            assert (memory[offset + a.nbytes :] == 0xA5).all()
    drivers = [loops.inplace_by_tile]
    if block in ("forward", "backward"):
        drivers.append(loops.inplace)
    for driver in drivers:
        for moved in (0, threads.MUCH):
            y = a.copy()
            other = y if b is a else b
            loop = loops.compiled(driver, function, formula, lane)
            loop(y, other, slope, moved)
            assert_same(y.view(dtype), expected)
            assert block != "forward_mask" or np.array_equal(b, mask)


@pytest.mark.parametrize("dtype", FLOATS, indirect=True)
def test_a_ufunc_walks_every_layout(dtype):
    x, g = sample((12, 14), dtype), sample((12, 14), dtype, seed=1)
    product = lane_of(dtype).product
    value = ufunc(activations._leaky_relu, dtype, gradient=False)
    gradient = ufunc(activations._leaky_relu_gradient, dtype, gradient=True)
    one, many = np.array(0.37, product), np.linspace(-1, 2, 14).astype(product)
    wide = np.repeat(many, 2)
    # NumPy looks for floating-point errors of its own copies of ml_dtypes' numbers.
    with np.errstate(all="ignore"):
        walk_every_layout(x, g, value, gradient, (one, many, wide))


def walk_every_layout(x, g, value, gradient, slopes):
    one, many, wide = slopes
    for view in (np.s_[:], np.s_[::-1], np.s_[:, ::2], np.s_[::3, ::-1], np.s_[2:3]):
        a, b = x[view], g[view]
        columns = a.shape[1]
        for slope in (one, many[:columns], many[:columns][::-1], wide[::2][:columns]):
            expected = reference.forward("prelu", a, weight=slope, axis=1)
            assert_same(value(a, slope), expected)
            into = np.zeros((12, 28), x.dtype)[: a.shape[0], 1::2][:, :columns]
            assert_same(value(a, slope, into), expected)
            expected = reference.backward("prelu", b, a, weight=slope, axis=1)
            assert_same(gradient(b, a, slope), expected)


def test_a_ufunc_warns_of_nothing():
    x = np.array([np.nan, -np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45], float32)
    for _ in range(3):  # warnings are errors here
        F.leaky_relu(x, 1e30)
        F.leaky_relu_backward(x, x, 1e30)
        F.relu(x)


def test_threads_that_use_other_slopes():
    """A slope is remembered between calls; each call must still get its own."""
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
    assert place % 64 == 0
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
