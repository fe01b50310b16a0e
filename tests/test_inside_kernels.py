"""The public functions in CUDA kernels of users: compiled and emulated, and simulated."""

from types import SimpleNamespace

import numpy as np
import ptx
import pytest
from conftest import dtype_of, sample
from reference import assert_same

import fastrelu as F

pytest.importorskip("numba_cuda", reason="needs numba-cuda: see the extra cuda13")

from numba import cuda, types
from numba.core.errors import TypingError

from fastrelu.cuda import launch

compiled = pytest.mark.skipif(launch.SIMULATED, reason="nothing is compiled there")
THREADS = 64
FLOATS = "float16", "bfloat16", "float32", "float64"


@pytest.fixture(autouse=True)
def without_a_device(monkeypatch):
    """Numba asks for the device that is in use before it compiles what is called."""
    if not launch.SIMULATED:
        device = SimpleNamespace(compute_capability=(9, 0))
        monkeypatch.setattr("numba.cuda.dispatcher.get_current_device", lambda: device)


def kind_of(dtype):
    return getattr(cuda.types if dtype.name == "bfloat16" else types, dtype.name)


def run(kernel, *arrays):
    """Run a kernel, a thread for an element"""
    if launch.SIMULATED:
        return cuda.jit(kernel)[1, THREADS](*arrays)
    signature = tuple(kind_of(a.dtype)[::1] for a in arrays)
    code, _ = cuda.compile_ptx(kernel, signature, cc=(9, 0))
    memory, arguments = ptx.Memory(), []
    for a in arrays:
        memory.add(a)
        address, size = a.ctypes.data, a.itemsize
        arguments += [0, 0, a.size, size, address, a.size, size]
    ptx.Program(code).run(1, THREADS, arguments, memory)
    return None


def forward(x, y):
    i = cuda.grid(1)
    if i < x.size:
        y[i] = F.leaky_relu(x[i], 0.1)


def others(x, a, b, c, d, e):
    i = cuda.grid(1)
    if i < x.size:
        a[i] = F.relu(x[i])
        b[i] = F.relu6(x[i])
        c[i] = F.squared_relu(x[i])
        d[i] = F.threshold(x[i], 0.5, -1.0)
        e[i] = F.rrelu(x[i])


def backward(g, x, a, b, c, d):
    i = cuda.grid(1)
    if i < x.size:
        a[i] = F.relu_backward(g[i], x[i])
        b[i] = F.leaky_relu_backward(g[i], x[i], 0.3)
        c[i], d[i] = F.prelu_backward(g[i], x[i], g[i])


def given(dtype, seed=0):
    if launch.SIMULATED and dtype.name == "bfloat16":
        pytest.skip("the simulator's arrays have no bfloat16")
    return sample((60,), dtype, seed)


@pytest.mark.parametrize("name", FLOATS)
def test_forward_has_the_bits_of_the_cpu(name):
    x = given(dtype_of(name))
    y, *more = (np.zeros_like(x) for _ in range(6))
    with np.errstate(all="ignore"):
        run(forward, x, y)
        run(others, x, *more)
        assert_same(y, F.leaky_relu(x, 0.1))
        for got, function in zip(more, (F.relu, F.relu6, F.squared_relu), strict=False):
            assert_same(got, function(x))
        assert_same(more[3], F.threshold(x, 0.5, -1.0))
        assert_same(more[4], F.rrelu(x))


@pytest.mark.parametrize("name", FLOATS)
def test_backward_has_the_bits_of_the_cpu(name):
    x, g = given(dtype_of(name)), given(dtype_of(name), 1)
    a, b, c, d = (np.zeros_like(x) for _ in range(4))
    with np.errstate(all="ignore"):
        run(backward, g, x, a, b, c, d)
        assert_same(a, F.relu_backward(g, x))
        assert_same(b, F.leaky_relu_backward(g, x, 0.3))
        assert_same(c, F.prelu_backward(g, x, g, axis=0)[0])
        assert_same(d, F.prelu_backward(g, x, g, axis=0)[1])  # a channel for each


@pytest.mark.parametrize("name", ["int8", "uint64"])
def test_integers(name):
    def kernel(x, y):
        i = cuda.grid(1)
        if i < x.size:
            y[i] = F.relu(x[i])

    x = sample((60,), np.dtype(name))
    y = np.zeros_like(x)
    run(kernel, x, y)
    assert_same(y, F.relu(x))


@compiled
def test_arrays_are_for_the_host():
    def kernel(x):
        F.relu(x)

    with pytest.raises(TypingError, match="x must be a number in a kernel"):
        cuda.compile_ptx(kernel, (types.float32[::1],), cc=(9, 0))
