"""The pool beside all that a host may do: signals, finalizers, no memory, odd owners."""

import copy
import gc
import pickle
import signal
import sys

import numpy as np
import pytest
from conftest import normal
from test_threads import needs_fork, run

import fastrelu as F
from fastrelu.cpu import pool

float32 = np.dtype(np.float32)
LARGE = pool.SMALLEST // 4 + 3


@pytest.fixture
def empty_pool():
    return pool.MemoryPool(1 << 26)


COPIES = {
    "copy": lambda base: base.copy(),
    "view": lambda base: base.view(),
    "slice": lambda base: base[5:],
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda base: pickle.loads(pickle.dumps(base)),
    "empty_like": lambda base: np.empty_like(base, subok=True),
    "masked": lambda base: np.ma.array(base),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_block_comes_back_once(how, empty_pool):
    y = empty_pool.empty_like(normal(LARGE, float32))
    place = y.ctypes.data
    other = COPIES[how](y.base)
    del y, other
    gc.collect()
    assert empty_pool.used_bytes() == 0
    again = [empty_pool.empty_like(normal(LARGE, float32)) for _ in range(2)]
    assert [y.ctypes.data for y in again].count(place) == 1
    assert not np.shares_memory(*again)


def test_a_base_leads_to_no_block(empty_pool):
    """Or somebody could keep what is handed out again, or free it by a resize."""
    y = empty_pool.empty_like(normal(LARGE, float32))
    y[...] = 1
    base = y.base
    assert base.base is None
    with pytest.raises(ValueError, match="resize"):
        base.resize(5)
    base.setflags(write=False)
    kept = base[64:]
    del y, base
    later = empty_pool.empty_like(normal(LARGE, float32))
    later[...] = 2
    assert (kept[:4000].view(float32) == 1).all()
    del kept, later
    assert all(
        empty_pool.empty_like(normal(LARGE, float32)).flags.writeable for _ in range(3)
    )


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer")
def test_whatever_a_signal_interrupts(empty_pool, monkeypatch):
    """A handler that uses the pool and raises, at thousands of moments."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # of finalizers
    x, rng = np.empty(LARGE, float32), np.random.default_rng(0)

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
    assert not empty_pool._lock.locked()
    assert empty_pool.used_bytes() == 0
    idle = sum(size * len(blocks) for size, blocks in empty_pool._idle.items())
    assert empty_pool.free_bytes() == empty_pool.total_bytes() == idle


def test_a_handler_in_the_midst_of_the_pool(empty_pool):
    with empty_pool._lock:  # as a signal finds it, or the collector
        y = empty_pool.empty_like(normal(LARGE, float32))
        del y
        empty_pool.free_all_blocks()
    assert empty_pool.used_bytes() == 0


@needs_fork
def test_a_child_of_a_pool_in_use():
    """Forked while another thread held the pool's lock, it has one that works."""
    script = """
    import os, warnings
    import numpy as np
    import fastrelu as F
    from fastrelu.cpu import pool
    warnings.simplefilter("ignore")
    x, default = np.empty(pool.SMALLEST), F.get_default_memory_pool()
    with default._lock:
        child = os.fork()
        if child == 0:
            place = pool.empty_like(x).ctypes.data
            os._exit(pool.empty_like(x).ctypes.data != place or default.used_bytes())
    print(os.waitpid(child, 0)[1])
    """
    assert run(script) == "0\n"


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
def test_no_memory():
    script = """
    import resource
    import numpy as np
    import fastrelu as F
    x = np.random.default_rng(0).standard_normal(1 << 22).astype(np.float32)
    expected, copied = np.maximum(x, 0), x.copy()
    calls = [
        lambda: F.relu(x), lambda: F.relu(x, return_mask=True),
        lambda: F.relu_backward(x, x), lambda: F.prelu(x, np.ones(1, np.float32)),
        lambda: F.relu(x.reshape(2048, -1)[:, ::2]),
    ]
    for call in calls: call()
    pool = F.get_default_memory_pool()
    pool.free_all_blocks()
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limit = resource.getrlimit(resource.RLIMIT_AS)
    for call in calls:
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), limit[1]))
        try:
            call()
        except MemoryError:
            pass
        else:
            print("enough")
        resource.setrlimit(resource.RLIMIT_AS, limit)
        assert pool.total_bytes() == 0
        assert np.array_equal(x, copied)
    print(np.array_equal(F.relu(x), expected))
    """
    assert run(script) == "True\n"


def test_idle_memory_makes_room(empty_pool, monkeypatch):
    x, of = normal(LARGE, float32), pool._Block.of
    empty_pool.empty_like(x)
    assert empty_pool.free_bytes() > 0

    def scarce(nbytes):
        if empty_pool.free_bytes():
            raise MemoryError
        return of(nbytes)

    monkeypatch.setattr(pool._Block, "of", scarce)
    y = empty_pool.empty_like(normal(2 * LARGE, float32))
    assert empty_pool.total_bytes() == empty_pool.used_bytes() >= y.nbytes


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
