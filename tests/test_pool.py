"""The pool beside all that a host may do: signals, finalizers, no memory, odd owners."""

import contextlib
import ctypes
import functools
import gc
import signal
import sys
import threading

import numpy as np
import pytest
from conftest import normal
from numba.core.compiler_lock import global_compiler_lock
from test_threads import run

import fastrelu as F
from fastrelu.cpu import pool
from fastrelu.cpu.jit import numpy_api

float32 = np.dtype(np.float32)
LARGE = pool.SMALLEST // 4 + 3


@pytest.fixture
def empty_pool():
    return pool.MemoryPool(1 << 26)


def test_a_result_owns_its_block(empty_pool):
    """So NumPy resizes it as any other array, and nobody else has hold of the block."""
    y = empty_pool.empty_like(normal(LARGE, float32))
    assert y.flags.owndata
    assert y.base is None
    assert y.flags.writeable
    y[...] = np.arange(LARGE)
    y.resize(2 * LARGE, refcheck=False)
    assert (y[:LARGE] == np.arange(LARGE)).all()
    assert (y[LARGE:] == 0).all()
    assert empty_pool.used_bytes() >= y.nbytes
    y.resize(10, refcheck=False)
    assert (y == np.arange(10)).all()
    assert empty_pool.used_bytes() == 4096
    del y
    assert empty_pool.used_bytes() == 0


def test_a_pool_is_made_once_by_two_threads(empty_pool):
    """Whoever comes second finds it made."""
    other = threading.Thread(target=empty_pool.ready)
    with global_compiler_lock:
        other.start()
        threading.Event().wait(0.05)  # the other waits for the lock
        empty_pool.ready()
        made = empty_pool._words[pool.HANDLER]
    other.join()
    assert made
    assert empty_pool._words[pool.HANDLER] == made


def test_what_numpy_may_ask_for(empty_pool):
    """Zeros in memory that was something else, and nothing at all."""
    empty_pool.empty_bytes(1 << 22)[...] = 255
    zeros = empty_pool._borrow(np.zeros, 1 << 22, np.uint8)
    assert empty_pool.free_bytes() == 0
    assert not zeros.any()
    nothing = empty_pool._borrow(np.empty, 0)
    assert nothing.size == 0
    assert empty_pool.used_bytes() > zeros.nbytes
    for size in (1 << 62, (1 << 63) - 1):
        with pytest.raises(MemoryError):
            empty_pool.empty_bytes(size)


def test_numpy_has_its_own_memory_again(empty_pool):
    handler = np._core.multiarray.get_handler_name
    before = handler()
    y = empty_pool.empty_like(normal(LARGE, float32))
    with pytest.raises(TypeError):
        empty_pool._borrow(np.empty, "no shape")
    assert handler(y) == "fastrelu"
    assert handler(F.relu(y)) == "fastrelu"
    assert handler() == before
    assert handler(np.empty(1 << 22)) == before


def test_a_loop_may_be_ready_before_the_pool():
    script = """
    import numpy as np
    import fastrelu as F
    x = np.ones(1 << 20, np.float32)
    F.relu(x[:10])  # the loop
    F.relu(x.copy(), inplace=True)  # the team
    print(np._core.multiarray.get_handler_name(F.relu(x)))
    """
    assert run(script) == "fastrelu\n"


def test_the_stalest_blocks_go_first(empty_pool):
    sizes = [(i + 1) << 20 for i in range(4)]
    held = [empty_pool.empty_bytes(size) for size in sizes]
    for i in (2, 0, 3, 1):
        held[i] = None
    assert empty_pool.free_bytes() == sum(sizes)
    empty_pool.set_limit(sum(sizes) - 1)
    assert empty_pool.free_bytes() == sum(sizes) - sizes[2]
    empty_pool.set_limit(sizes[1])
    assert empty_pool.free_bytes() == sizes[1]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer")
def test_whatever_a_signal_interrupts(empty_pool, monkeypatch):
    """A handler that uses the pool and raises, at thousands of moments."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # of finalizers
    x, rng = np.empty(LARGE, float32), np.random.default_rng(0)
    empty_pool.ready()  # compiled while nobody interrupts

    class Raised(Exception):
        pass

    def handler(*_):
        empty_pool.empty_like(x)
        raise Raised

    before = signal.signal(signal.SIGALRM, handler)
    held = []
    try:
        for _ in range(5000):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 1e-4))
                for _ in range(100):  # one that a finalizer met is gone
                    held.append(empty_pool.empty_like(x))
                    del held[:-3]
            except Raised:
                pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    held.clear()
    assert empty_pool.used_bytes() == 0
    idle = empty_pool.free_bytes()
    assert idle > 0
    size = -(-x.nbytes // 4096) * 4096
    held = [empty_pool.empty_like(x) for _ in range(idle // size)]
    assert empty_pool.free_bytes() == 0  # all of them could be found


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
def test_no_memory():
    script = """
    import resource
    import numpy as np
    import fastrelu as F
    x = np.random.default_rng(0).standard_normal(1 << 24).astype(np.float32)
    expected, copied = np.maximum(x, 0), x.copy()
    calls = [
        lambda: F.relu(x), lambda: F.relu(x, return_mask=True),
        lambda: F.relu_backward(x, x), lambda: F.prelu(x, np.ones(1, np.float32)),
        lambda: F.relu(x.reshape(2048, -1)[:, ::-1]),
    ]
    for call in calls: call()
    pool = F.get_default_memory_pool()
    pool.free_all_blocks()
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limit = resource.getrlimit(resource.RLIMIT_AS)
    for call in calls:
        pool.free_all_blocks()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), limit[1]))
        try:
            call()
        except MemoryError:
            pass
        else:
            print("enough")
        resource.setrlimit(resource.RLIMIT_AS, limit)
        assert pool.used_bytes() == 0
        assert np.array_equal(x, copied)
    print(np.array_equal(F.relu(x), expected))
    """
    assert run(script) == "True\n"


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
def test_idle_memory_makes_room():
    script = """
    import resource
    import numpy as np
    import fastrelu as F
    pool = F.get_default_memory_pool()
    pool.set_limit(1 << 30)
    held = [pool.empty_bytes(1 << 24) for _ in range(16)]
    del held
    assert pool.free_bytes() == 1 << 28
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), hard))
    y = pool.empty_bytes(1 << 27)
    print(pool.total_bytes() == y.nbytes)
    """
    assert run(script) == "True\n"


# Memory that ends at any moment -------------------------------------------------------

_pointer, _size = ctypes.c_void_p, ctypes.c_size_t
_MALLOC = ctypes.CFUNCTYPE(_pointer, _pointer, _size)
_CALLOC = ctypes.CFUNCTYPE(_pointer, _pointer, _size, _size)


class Scarce:
    """Has NumPy make so many arrays and no more"""

    def __init__(self):
        default = ctypes.py_object.from_address(numpy_api(pool._DEFAULT_HANDLER)).value
        place = pool.capsule_pointer(default, pool._CAPSULE)
        source = pool._Handler.from_address(place)
        self.left = 0
        self.made = [
            kind(functools.partial(self._answer, kind(address)))
            for kind, address in ((_MALLOC, source.malloc), (_CALLOC, source.calloc))
        ]
        malloc, calloc = (ctypes.cast(function, _pointer) for function in self.made)
        rest = source.realloc, source.free
        self.handler = pool._Handler(
            b"scarce", 1, source.context, malloc.value, calloc.value, *rest
        )
        self.capsule = pool._new_capsule(self.handler, pool._CAPSULE, None)
        kind = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)
        self.set_handler = kind(numpy_api(pool._SET))

    def _answer(self, function, *arguments):
        self.left -= 1
        return function(*arguments) if self.left >= 0 else None

    @contextlib.contextmanager
    def allow(self, number):
        before = self.set_handler(self.capsule)
        self.left = number
        try:
            yield
        finally:
            self.set_handler(before)


SCARCE = Scarce()


def spaced(x):
    """The same values, one in two places."""
    wide = np.zeros((*x.shape, 2), x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def skewed(x):
    memory = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    memory[...] = x
    return memory


LAYOUTS = {"flat": np.copy, "spaced": spaced, "skewed": skewed, "F": np.asfortranarray}
SHAPE = 4, 3, 5
MASK = F.Mask(np.full(8, 0xA5, np.uint8), SHAPE)
WEIGHTS = {
    "a channel": np.array([-1, 0.5, 2]),
    "shared": np.array(0.5),
    "by two axes": np.linspace(-1, 2, 20).reshape(4, 1, 5),
}
FAILING = {
    "relu": lambda x, g, w, **out: F.relu(x, **out),
    "mask": lambda x, g, w, **out: F.relu(x, return_mask=True, **out),
    "prelu": lambda x, g, w, **out: F.prelu(x, w, **out),
    "relu_backward": lambda x, g, w, **out: F.relu_backward(x, g, **out),
    "from a mask": lambda x, g, w, **out: F.relu_backward(x, MASK, **out),
    "prelu_backward": lambda x, g, w, **out: F.prelu_backward(x, g, w, **out),
}


@pytest.mark.parametrize("saved", ["flat", "spaced"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "weight", "dtype"),
    [
        (name, weight, dtype)
        for name in FAILING
        for weight in (WEIGHTS if "prelu" in name else ["shared"])
        for dtype in (["float32", "float16"] if "prelu_" in name else ["float32"])
    ],
)
def test_memory_that_ends_anywhere(name, weight, dtype, layout, saved):
    """Whichever array cannot be had: a MemoryError, and what was given is unchanged."""
    call, dtype = FAILING[name], np.dtype(dtype)
    x, g = normal(SHAPE, dtype), normal(SHAPE, dtype, seed=1)
    weight = WEIGHTS[weight].astype(dtype)
    for where in ("out", "inplace", "fresh"):
        for number in range(30):
            arrays = LAYOUTS[layout](x), LAYOUTS[saved](g), weight.copy()
            out = LAYOUTS[layout](np.full_like(x, 7))
            more = {"out": {"out": out}, "inplace": {"inplace": True}, "fresh": {}}
            try:
                with SCARCE.allow(number):
                    call(*arrays, **more[where])
            except MemoryError:
                assert (out == 7).all()
                for array, before in zip(arrays, (x, g, weight), strict=True):
                    assert np.array_equal(array, before)
            else:
                break
        else:
            pytest.fail("nothing was ever enough")
        assert number > 0 or where != "fresh"


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
@pytest.mark.parametrize(
    "calls", [20_000, pytest.param(1_000_000, marks=pytest.mark.long)]
)
def test_the_resident_set_stays_flat(calls):
    rng = np.random.default_rng(0)
    xs = [normal(int(4.0**k) + 3, float32) for k in (0, 2, 5, 7, 8, 9)]
    weight, after = np.full(1, 0.5, float32), []
    for i in range(calls):
        x = xs[rng.integers(len(xs))]
        which = i % 7
        if which == 0:
            F.relu(x)
        elif which == 1:
            _, mask = F.relu(x, return_mask=True)
            F.relu_backward(x, mask)
        elif which == 2:
            F.leaky_relu(x, 0.1, out=x)
        elif which == 3:
            F.prelu_backward(x, x, weight)
        elif which == 4:
            F.relu_backward(x, x, inplace=True)
        elif which == 5:
            with pytest.raises(ValueError, match="out"):
                F.relu(x, out=np.empty(x.size + 1, float32))
        else:
            F.prelu(x, weight, inplace=True)
        if i % (calls // 10) == calls // 20:
            gc.collect()
            after.append(resident())
    assert max(after[5:]) < max(after[:5]) + (8 << 20)
