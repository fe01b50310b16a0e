"""How the CUDA engine meets arrays: checks, libraries, streams, the cache, launches.

Nothing here needs a GPU.  Where calls are made twice, the first of its kind goes the
long way, the second one the short way for plain arrays.
"""

import ctypes
import functools
import hashlib
import math
import sys
import textwrap
import threading
import types
from subprocess import DEVNULL, PIPE

import numpy as np
import pytest
import reference
from conftest import FLOATS, PATIENCE, normal, place, run_command, sample, started
from reference import assert_same
from twins import public_functions

import fastrelu as F
from fastrelu import _arguments, _digest, _dispatch, activations
from fastrelu._layout import parts_of
from fastrelu.activations import _leaky_relu
from fastrelu.cpu import jit

pytest.importorskip("numba_cuda", reason="needs numba-cuda: see the extra cuda13")
import gpu as machines

from fastrelu.cuda import arrays, calls, launch, work

pytestmark = pytest.mark.filterwarnings("ignore::numba.NumbaPerformanceWarning")
emulated = pytest.mark.skipif(
    launch.SIMULATED, reason="the simulator is not what is compiled"
)
FLOAT32 = np.dtype("f4")


class Plain:
    """Arguments that leave the short way no question"""

    def __init__(self, put, dtype=FLOAT32):
        self.put, shape = put, (6, 40)
        self.x, self.g, self.y = (put(normal(shape, dtype, k)) for k in range(3))
        self.w, self.dw = (put(normal(40, dtype, k)) for k in (3, 4))
        self.short, self.one = put(normal(6, dtype, 5)), put(normal(1, dtype, 6))
        bits = reference.mask_bits(normal(shape, dtype))
        self.mask = F.Mask(put(bits), shape)
        images = [normal((2, 4, 5, 16), dtype, k) for k in range(3)]
        self.last = [put(a.transpose(0, 3, 1, 2)) for a in images]  # the channels
        self.first = [put(a.reshape(2, 16, 4, 5)) for a in images]
        self.channels, self.dchannels = (put(normal(16, dtype, k)) for k in (7, 8))


CALLS = {
    "relu": lambda p: F.relu(p.x, out=p.y),
    "leaky_relu in place": lambda p: F.leaky_relu(p.x, 0.5, inplace=True),
    "relu_backward": lambda p: F.relu_backward(p.g, p.x, out=p.y),
    "onto the saved": lambda p: F.relu_backward(p.g, p.x, out=p.x),
    "leaky_relu_backward": lambda p: F.leaky_relu_backward(p.g, p.x, 0.5, inplace=True),
    "from a mask": lambda p: F.relu_backward(p.g, p.mask, inplace=True),
    "prelu of rows": lambda p: F.prelu(p.x, p.short, axis=0, out=p.y),
    "prelu of columns": lambda p: F.prelu(p.x, p.w, axis=-1, inplace=True),
    "prelu of one": lambda p: F.prelu(p.x, p.one, out=p.y),
    "an integer": lambda p: F.leaky_relu(p.x, 1, out=p.y),
    "a NumPy float": lambda p: F.leaky_relu(p.x, np.float64(0.1), out=p.y),
    "a half": lambda p: F.leaky_relu(p.x, np.float16(0.1), out=p.y),
    "a byte": lambda p: F.leaky_relu_backward(p.g, p.mask, np.int8(-128), out=p.y),
    "another order": lambda p: F.relu_backward(*p.last[:2], out=p.last[2]),
}
WEIGHTS = (16,), (1, 16, 1, 1), (16, 1, 1), (1, 1), ()


def weighted(order, shape, backward):
    """A call that meets a weight of this shape"""

    def call(p):
        *arrays, y = getattr(p, order)
        w, dw = p.channels, p.dchannels
        if math.prod(shape) == 1:
            w, dw = w[:1], dw[:1]
        w, dw = w.reshape(shape), dw.reshape(shape)
        if backward:
            return F.prelu_backward(*arrays, w, out=(y, dw))
        return F.prelu(arrays[0], w, out=y)

    return call


for order in ("first", "last"):
    for shape in WEIGHTS:
        CALLS[f"prelu, {order}, {shape}"] = weighted(order, shape, False)
LENDING = {
    "relu with a mask": lambda p: F.relu(p.x, return_mask=True, out=p.y),
    "prelu_backward": lambda p: F.prelu_backward(p.g, p.x, p.w, out=(p.y, p.dw)),
    "prelu_backward of rows": lambda p: F.prelu_backward(
        p.g, p.x, p.short, axis=0, out=p.y
    ),
    "fresh": lambda p: F.relu(p.x),
    "a mask in another order": lambda p: F.relu(p.last[0], return_mask=True),
}
for order in ("first", "last"):
    for shape in WEIGHTS:
        LENDING[f"prelu_backward, {order}, {shape}"] = weighted(order, shape, True)
ALL_CALLS = CALLS | LENDING


def in_python(patch):
    for function in public_functions():
        patch.setattr(function, "call", function.left)


def long_way(patch):
    in_python(patch)
    for name in ("forward", "backward", "by_channel", "by_channel_backward"):
        patch.setattr(calls.Calls, name, lambda *arguments: None)


def short_way(patch):
    in_python(patch)

    def refuse(*arguments, **more):
        raise AssertionError("a plain array went the long way")

    patch.setattr(_arguments, "accepted", refuse)


# The short way ------------------------------------------------------------------------


IN_PYTHON = "mask in another order"  # which compiled code does not take


@pytest.mark.parametrize("case", ALL_CALLS)
@pytest.mark.parametrize("dtype", FLOATS, indirect=True)
def test_all_ways_queue_the_same(case, dtype, gpu, put, monkeypatch):
    plain, gpu.only, new = Plain(put, dtype), lambda blocks: (), {}
    ALL_CALLS[case](plain)
    for name in ("empty", "empty_like"):  # fresh memory is now the same each time

        def same(make, like, *more):
            size = getattr(like, "shape", like)
            return new.setdefault(size, make(like, *more))

        monkeypatch.setattr(gpu, name, functools.partial(same, getattr(gpu, name)))
    queued = []
    for way in (in_python, long_way, short_way, lambda patch: None):
        gpu.launches.clear()
        gpu.quick = 0
        with monkeypatch.context() as patch:
            way(patch)
            ALL_CALLS[case](plain)
        queued.append(gpu.launches[:])
    assert queued[1:] == queued[:1] * 3
    assert len(queued[0]) == (2 if "prelu_backward" in case else 1)
    is_left = launch.SIMULATED or IN_PYTHON in case
    assert gpu.quick == (0 if is_left else len(queued[0]))


@pytest.mark.parametrize("case", ALL_CALLS)
def test_a_call_can_be_captured_in_a_graph(case, gpu, put, monkeypatch):
    """It only launches: it waits for nothing, and has memory of its library alone"""
    plain, gpu.only = Plain(put), lambda blocks: ()
    ALL_CALLS[case](plain)

    def refuse(*arguments):
        raise AssertionError("a graph cannot capture this")

    for name in ("wait", "scratch", "current", "device_of", "stream_of"):
        monkeypatch.setattr(launch, name, refuse)
    if case in CALLS:
        for name in ("empty", "empty_like"):
            monkeypatch.setattr(gpu, name, refuse)
    before = len(gpu.launches)
    ALL_CALLS[case](plain)
    assert len(gpu.launches) == before + (2 if "prelu_backward" in case else 1)
    assert {launched[2] for launched in gpu.launches} == {gpu.stream}


NUMBERS = {
    "float16": (
        0.5,
        1,
        np.float32(0.1),
        np.uint64(3),
        2.0**128 - 2.0**104,
        -(2**53) + 1,
    ),
    "float64": (1e300, np.int64(7), np.finfo("f8").max),
}
NOT_PLAIN = {
    "float16": (2.0**128 - 2.0**103, 2**53, np.longdouble(1), True, "1", math.nan),
    "float64": (-math.inf, 2**53, None),
}


@pytest.mark.parametrize("dtype", NUMBERS)
def test_numbers_that_are_plain(dtype):
    compute = work.compute_of(dtype)
    for number in NUMBERS[dtype]:
        (scalar,) = calls._scalars((number,), compute)
        assert type(scalar) is compute
        assert scalar == compute(float(number))
        assert math.isfinite(scalar)
    for number in NOT_PLAIN[dtype]:
        assert calls._scalars((0.5, number), compute) is None
    assert calls._scalars((1.0,), np.int8) is None


def test_masks_meet_gradients_of_any_order(gpu, put, monkeypatch):
    """Those of the same order the short way, others the long one"""
    x, g = (normal((2, 4, 5, 16), FLOAT32, k).transpose(0, 3, 1, 2) for k in (0, 1))
    expected = reference.backward("relu", g, x)
    for _ in "12":
        y, mask = F.relu(put(x), return_mask=True)
        assert mask.axes == (0, 2, 3, 1)
        assert y.host.strides == x.strides
        assert_same(mask.bits.host, reference.mask_bits(x.transpose(mask.axes)))
        assert_same(F.relu_backward(put(g), mask).host, expected)
        assert gpu.launches[-1][0].template == "flat"
    dx = F.relu_backward(put(np.ascontiguousarray(g)), mask)
    assert_same(dx.host, expected)
    assert gpu.launches[-1][0].template == "strided"
    short_way(monkeypatch)
    y, mask = F.relu(put(x), return_mask=True)
    assert_same(F.relu_backward(put(g), mask).host, expected)


def other_bits(p):
    mask = F.Mask(p.mask.bits, p.mask.shape)
    mask.bits = p.put(np.zeros(31, np.uint8))
    return mask


def other_shape(p):
    mask = F.Mask(p.mask.bits, p.mask.shape)
    mask.shape = np.array(p.mask.shape)  # which is not compared to one bool
    return mask


def far_bits(p):
    bits = p.mask.bits.host
    return F.Mask(machines.ndarray(bits, device=1), p.mask.shape)


WRONG = {
    "infinite": (lambda p: F.leaky_relu(p.x, math.inf), ValueError, "negative_slope"),
    "text": (lambda p: F.leaky_relu(p.x, "1"), TypeError, "negative_slope"),
    "inplace": (lambda p: F.relu(p.x, 1), TypeError, "inplace"),
    "return_mask": (lambda p: F.relu(p.x, return_mask=1), TypeError, "return_mask"),
    "both": (lambda p: F.relu(p.x, True, out=p.y), ValueError, "out="),
    "saved": (lambda p: F.relu_backward(p.g, p.w), ValueError, "saved"),
    "kind": (lambda p: F.relu_backward(p.g, p.mask.bits), ValueError, "saved"),
    "shape": (lambda p: F.relu_backward(p.w, p.mask), ValueError, "saved"),
    "bits": (lambda p: F.relu_backward(p.g, other_bits(p)), ValueError, "saved"),
    "far bits": (lambda p: F.relu_backward(p.g, far_bits(p)), ValueError, "saved"),
    "axis": (lambda p: F.prelu(p.x, p.w, axis=2), ValueError, "axis"),
    "a bool": (lambda p: F.prelu(p.x, p.short, axis=False), TypeError, "axis"),
    "a bool, backward": (
        lambda p: F.prelu_backward(p.g, p.x, p.short, axis=False),
        TypeError,
        "axis",
    ),
    "weight": (lambda p: F.prelu(p.x, p.w, axis=0), ValueError, "weight"),
    "changed": (lambda p: F.relu_backward(p.g, other_shape(p)), TypeError, "saved"),
    "integers": (lambda p: F.prelu(p.x, p.mask.bits), TypeError, "weight"),
    "dw": (
        lambda p: F.prelu_backward(p.g, p.x, p.w, out=(p.y, p.short)),
        ValueError,
        "out",
    ),
    "one memory": (
        lambda p: F.prelu_backward(p.g, p.x, p.w, out=(p.y, p.y[0])),
        ValueError,
        "out",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_of_arrays_that_look_plain(case, gpu, put):
    plain, gpu.only = Plain(put), lambda blocks: ()
    for known in ALL_CALLS.values():
        known(plain)
    gpu.launches.clear()
    call, error, name = WRONG[case]
    for _ in "12":
        with pytest.raises(error, match=name):
            call(plain)
    assert not gpu.launches


@pytest.mark.parametrize("offset", [1, 40, 239])
@pytest.mark.parametrize("which", ["x", "saved"])
def test_an_output_that_lies_on_a_part_of_an_input(which, offset, put):
    memory = normal(480, FLOAT32)
    other = normal(240, FLOAT32, 1)
    part, out = memory[:240], memory[offset : offset + 240]
    if which == "x":
        expected = reference.forward("relu", part.copy())
        F.relu(put(part), out=put(out))
    else:
        expected = reference.backward("relu", other, part.copy())
        F.relu_backward(put(other), put(part), out=put(out))
    assert_same(out, expected)


def test_another_device_than_the_current_one(gpu, put):
    x = normal(40, FLOAT32)
    given = put(x.copy())
    F.relu(given)
    gpu.device, gpu.switches[:] = 1, []
    assert_same(F.relu(given).host, reference.forward("relu", x))
    assert F.leaky_relu(given, 0.5, inplace=True) is given
    assert_same(given.host, reference.forward("leaky_relu", x, negative_slope=0.5))
    assert set(gpu.switches) == {0}
    assert gpu.device == 1


def test_orders_of_one_piece_go_the_short_way(gpu, put, monkeypatch):
    for shape, order in (
        ((3, 1, 5), (2, 1, 0)),
        ((3, 4, 5), (0, 2, 1)),
        ((3, 4, 5), (2, 1, 0)),
    ):
        x = normal(shape, FLOAT32)
        dense = np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))
        F.relu(put(dense))
        with monkeypatch.context() as patch:
            short_way(patch)
            y = F.relu(put(dense))
        assert_same(y.host, reference.forward("relu", x))
        assert y.host.strides == dense.strides
    short_way(monkeypatch)
    monkeypatch.delattr(machines.ndarray, "_c_contiguous")  # which is CuPy's own affair
    machines.forget()
    for order in "CF":
        y = F.relu(put(np.asarray(x, order=order)))
        assert_same(y.host, reference.forward("relu", x))
    with pytest.raises(AssertionError):
        F.relu(put(dense), out=put(x))  # in another order


# Arguments ----------------------------------------------------------------------------


def test_host_and_device_do_not_mix(put):
    x, host = put(np.ones(4, "f4")), np.ones(4, "f4")
    for call, name in (
        (lambda: F.relu(x, out=host), "out"),
        (lambda: F.relu(host, out=x), "out"),
        (lambda: F.relu_backward(x, host), "saved"),
        (lambda: F.relu_backward(host, x), "saved"),
        (lambda: F.relu_backward(host, F.relu(x, return_mask=True)[1]), "saved"),
        (lambda: F.relu_backward(x, F.relu(host, return_mask=True)[1]), "saved"),
        (lambda: F.prelu(x, host[:1]), "weight"),
    ):
        with pytest.raises(TypeError, match=name):
            call()


def test_two_devices(put):
    x, other = put(np.ones(4, "f4")), machines.ndarray(np.ones(4, "f4"), device=1)
    for call, name in (
        (lambda: F.relu(x, out=other), "out"),
        (lambda: F.relu_backward(x, other), "saved"),
        (lambda: F.prelu(x, machines.ndarray(np.ones(1, "f4"), device=1)), "weight"),
    ):
        with pytest.raises(ValueError, match=name):
            call()


@pytest.mark.parametrize("dtype", ["complex64", "bool"])
def test_dtypes(dtype, put):
    with pytest.raises(TypeError, match=f"x must have dtype .* got .*{dtype}"):
        F.relu(put(np.ones(3, dtype)))


@pytest.mark.parametrize("argument", ["x", "g", "y", "w", "dw"])
def test_elements_that_no_gpu_can_read(argument, gpu, put):
    """Arrays that start between multiples of an element's size go by way of a copy."""
    plain, gpu.only = Plain(put), lambda blocks: ()
    for call in ALL_CALLS.values():
        call(plain)
    gpu.launches.clear()
    odd, _ = place(getattr(plain, argument).host, "misaligned")
    setattr(plain, argument, put(odd))
    for call in ALL_CALLS.values():
        call(plain)
    touched = [k for k, *rest in gpu.launches if odd.ctypes.data in rest]
    assert touched
    assert {kernel.options["fmt"] for kernel in touched} == {"uint8"}


def test_outputs(gpu, put):
    x = put(np.ones((2, 3), "f4"))
    for out, error in (
        (np.ones((2, 3)), TypeError),
        (np.ones((3, 2), "f4"), ValueError),
        (np.broadcast_to(np.ones(3, "f4"), (2, 3)), ValueError),
    ):
        with pytest.raises(error, match="out"):
            F.relu(x, out=put(out))
    assert not gpu.launches


# Libraries ----------------------------------------------------------------------------


class Interface:
    """An array of a library that is known by its interface alone"""

    def __init__(self, a, stream=None, **more):
        self.a, self.dtype, self.shape = a, a.dtype, a.shape
        self.__dict__["more"] = {"stream": stream, **more}

    @property
    def __cuda_array_interface__(self):
        return {**self.a.__array_interface__, **self.more}


def test_any_array_with_an_interface(gpu, put):
    x, out = np.array([-1, 2], "f4"), np.zeros(2, "f4")
    put(x), put(out)
    given = Interface(out)
    assert F.relu(Interface(x), out=given) is given
    assert_same(out, np.array([0, 2], "f4"))
    memory = gpu.own(np.array([1, -1, 3], "f4"))
    F.relu(Interface(memory[:-1]), out=Interface(memory[1:]))
    assert_same(memory, np.array([1, 1, 0], "f4"))
    assert gpu.lent
    with pytest.raises(TypeError, match="out must be given"):
        F.relu(Interface(x))
    with pytest.raises(TypeError, match=r"training must be False: .* a Interface"):
        F.rrelu(Interface(x), training=True)
    with pytest.raises(ValueError, match="out must be writeable"):
        F.relu(Interface(x), out=Interface(out, data=(out.ctypes.data, True)))


def test_what_an_interface_tells(gpu, put):
    """Gaps, no memory, a dtype that NumPy has no letters for, and the device."""
    x = gpu.own(np.array([-1, 2], "f4"))
    with pytest.raises(TypeError, match=r"x must be .* has no memory"):
        F.relu(Interface(x, data=(0, False)), out=put(x))
    with pytest.raises(TypeError, match="mask of gaps"):
        F.relu(Interface(x, mask=Interface(x)), out=put(x))
    describe = arrays.Library().describe
    array = Interface(gpu.own(np.zeros(2, "u2")))
    array.dtype = "bfloat16"
    assert describe(array).dtype == "bfloat16"
    assert describe(put(x)).device == 0
    bits = F.Mask(Interface(gpu.own(np.zeros(1, "u1"))), 8)
    with pytest.raises(TypeError, match="cannot make a Interface of bools"):
        bits.unpack()


class Capsule:
    """An array of a library that is known by DLPack alone"""

    def __init__(self, a, strides=True):
        self.a, self.strides, self.streams = a, strides, []

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, *, stream=None, max_version=None, **more):
        self.streams.append(stream)
        capsule = self.a.__dlpack__(max_version=max_version)
        ask = ctypes.pythonapi
        ask.PyCapsule_GetName.restype = ctypes.c_char_p
        ask.PyCapsule_GetPointer.restype = ctypes.c_void_p
        name = ask.PyCapsule_GetName(ctypes.py_object(capsule))
        tensor = ask.PyCapsule_GetPointer(ctypes.py_object(capsule), name)
        tensor += 32 if b"versioned" in name else 0
        ctypes.c_int32.from_address(tensor + 8).value = 2  # on a GPU, it says
        if not self.strides:  # as old versions had it where an array is C's
            ctypes.c_void_p.from_address(tensor + 32).value = None
        return capsule


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"], indirect=True)
def test_any_array_with_dlpack(dtype, gpu):
    x, g = (gpu.own(sample((4, 6), dtype, k)) for k in (0, 1))
    out = gpu.own(np.empty((4, 6), dtype, order="F"))
    for _ in "12":
        given = Capsule(out)
        assert F.relu(Capsule(x, strides=False), out=given) is given
        assert_same(out, reference.forward("relu", x))
        assert given.streams == [1]  # the legacy one, which the kernel is queued on
        assert gpu.launches[-1][2] == 0
    F.relu_backward(Capsule(g), Capsule(x), out=given)
    assert_same(out, reference.backward("relu", g, x))
    bits = F.relu_backward(
        Capsule(g),
        F.Mask(machines.ndarray(gpu.own(reference.mask_bits(x))), x.shape),
        out=given,
    )
    assert bits is given
    assert_same(out, reference.backward("relu", g, x))
    before = x.copy()
    given = Capsule(x)
    assert F.relu(given, inplace=True) is given
    assert_same(x, reference.forward("relu", before))


def test_what_dlpack_cannot_do(gpu):
    x = gpu.own(normal(4, FLOAT32))
    with pytest.raises(TypeError, match="out must be given"):
        F.relu(Capsule(x))
    with pytest.raises(TypeError, match="return_mask"):
        F.relu(Capsule(x), out=Capsule(x), return_mask=True)
    with pytest.raises(TypeError, match="dtype"):
        F.relu(Capsule(x > 0), out=Capsule(x))
    locked = x.view()
    locked.flags.writeable = False
    with pytest.raises(ValueError, match="x must be writeable"):
        F.relu(Capsule(locked), inplace=True)


@pytest.fixture
def numba_array(gpu, monkeypatch):
    def device_array(shape, dtype, order="C"):
        return machines.numba_array(gpu, np.empty(shape, dtype, order=order))

    monkeypatch.setattr("numba.cuda.device_array", device_array)
    return lambda host: machines.numba_array(gpu, host)


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_numba(order, gpu, numba_array):
    x, g = (np.array(normal((4, 6), FLOAT32, k), order=order) for k in (0, 1))
    w = normal(6, FLOAT32, 2)
    a, b, weight = numba_array(x), numba_array(g), numba_array(w)
    for _ in "12":
        y = F.relu(a)
        assert type(y) is type(a)
        assert y.is_c_contiguous() == (order == "C")
        assert_same(y.host, reference.forward("relu", x))
        assert gpu.launches[-1][2] == 0
        y, mask = F.leaky_relu(a, 0.5, return_mask=True)
        assert_same(mask.bits.host, reference.mask_bits(x.transpose(mask.axes)))
        dx = F.leaky_relu_backward(b, mask, 0.5)
        expected = reference.backward("leaky_relu", g, x, negative_slope=0.5)
        assert_same(dx.host, expected)
        assert_same(F.prelu(a, weight).host, reference.forward("prelu", x, weight=w))
        dx, dw = F.prelu_backward(b, a, weight)
        assert_same(dx.host, reference.backward("prelu", g, x, weight=w))
        reference.assert_weight_gradient(dw.host, g, x, w)
    assert gpu.lent
    before = x.copy()
    assert F.relu(a, inplace=True) is a
    assert_same(x, reference.forward("relu", before))


def test_numba_streams(gpu, numba_array):
    class Stream:
        def __int__(self):
            return 9

    x, out = numba_array(normal(20, FLOAT32)), numba_array(np.empty(20, "f4"))
    bound = x.bind(Stream())
    F.relu(x, out=out)
    assert not gpu.waits
    for _ in "12":
        F.relu(bound, out=out)
        assert gpu.launches[-1][2] == 9
    assert gpu.waits == 2 * [(9, 0), (0, 9)]
    F.relu(x, out=bound)
    assert gpu.waits[4:] == [(0, 9), (9, 0)]


@emulated
def test_numba_arrays_without_elements(gpu, numba_array):
    x = numba_array(normal(3, FLOAT32))
    x.shape, x.size, x.gpu_data = (0,), 0, None
    assert F.relu(x, inplace=True) is x
    assert not gpu.launches


@pytest.mark.parametrize("dtype", FLOATS, indirect=True)
def test_tensors(dtype, gpu):
    x = gpu.own(sample((4, 6), dtype))
    y = F.relu(machines.Tensor(x.T))
    assert type(y) is machines.Tensor
    assert_same(y.host, reference.forward("relu", x.T))
    assert gpu.launches[-1][2] == 11
    with pytest.raises(TypeError, match=r"x .*detach\(\)"):
        F.relu(machines.Tensor(x, requires_grad=True))


def test_streams_wait_for_one_another(gpu, put):
    x, out = normal(5, np.dtype("f4")), np.empty(5, "f4")
    F.relu(put(x), out=put(out))
    assert not gpu.waits
    F.relu(put(x), out=machines.Tensor(out))
    assert gpu.waits == [(7, 11), (11, 7)]
    assert gpu.launches[-1][2] == 7


def test_a_machine_without_the_extra(monkeypatch, put):
    class First(machines.ndarray):
        """An array of a type that none came of"""

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _dispatch._cuda.cache_clear()
    with pytest.raises(ImportError, match=r"fastrelu\[cuda13\]"):
        F.relu(First(np.ones(3, "f4")))


def test_tensors_that_are_not_plain(gpu):
    x = gpu.own(normal((4, 6), FLOAT32))
    good = machines.Tensor(x)
    F.relu(good, inplace=True)
    for change, text in (
        ({"requires_grad": True}, "detach"),
        ({"layout": "sparse"}, "to_dense"),
        ({"is_neg": lambda: True}, "resolve_neg"),
    ):
        bad = machines.Tensor(x)
        bad.__dict__.update(change)
        for call, name in (
            (lambda bad=bad: F.relu(bad), "x"),
            (lambda bad=bad: F.relu(bad, inplace=True), "x"),
            (lambda bad=bad: F.relu(good, out=bad), "out"),
            (lambda bad=bad: F.relu_backward(good, bad), "saved"),
        ):
            with pytest.raises(TypeError, match=rf"{name} .*{text}"):
                call()


def test_results_and_masks_are_tensors(gpu, monkeypatch):
    x, g = (gpu.own(normal((4, 6), FLOAT32, k)) for k in (0, 1))
    torch = sys.modules["torch"]
    torch.bool = "bool"
    for _ in "12":  # the long way and the short one
        y, mask = F.relu(machines.Tensor(x), return_mask=True)
        assert_same(y.host, reference.forward("relu", x))
        assert_same(mask.bits.host, reference.mask_bits(x))
        dx = F.relu_backward(machines.Tensor(g), mask)
        assert_same(dx.host, reference.backward("relu", g, x))
    monkeypatch.setattr(machines.Tensor, "reshape", lambda t, shape: t, raising=False)
    torch.arange = lambda n, dtype, device: np.arange(n, dtype=dtype.name)

    class Bits:
        device = "cuda:0"

        def __getitem__(self, key):
            return Flags(mask.bits.host[key])

    class Flags(np.ndarray):
        def __new__(cls, values):
            return np.asarray(values).view(cls)

        def to(self, dtype):
            return self.astype(dtype)

    flags = arrays.library_of(machines.Tensor).unpack(Bits(), x.size)
    assert_same(np.asarray(flags).reshape(x.shape), x > 0)


def test_what_real_tensors_draw_and_how_they_turn():
    torch = pytest.importorskip("torch", reason="needs PyTorch, if without a GPU")
    library = arrays.library_of(torch.Tensor)
    for dtype in (torch.bfloat16, torch.float64):
        x = torch.ones((30, 4), dtype=dtype)
        drawn, again = (
            library.uniform(x, 0.25, 0.5, torch.Generator().manual_seed(1))
            for _ in "12"
        )
        assert (drawn.dtype, drawn.shape) == (x.dtype, x.shape)
        assert bool(((drawn >= 0.25) & (drawn <= 0.5)).all())
        assert bool((drawn == again).all())
        assert not bool((drawn == library.uniform(x, 0.25, 0.5, None)).all())
        assert bool(library.uniform(x, -3e38, 3e38, None).isfinite().all())
    with pytest.raises(TypeError, match=r"rng must be a torch\.Generator .* got int"):
        library.uniform(x, 0.25, 0.5, 0)
    x = np.random.default_rng(0).random((2, 3, 5)) < 0.5
    bits = torch.from_numpy(np.packbits(x, bitorder="little"))
    flags = arrays.unpack(bits, x.shape, (1, 2, 0))
    assert (flags.numpy() == x.transpose(1, 2, 0)).all()


def test_a_weight_within_the_gradient(put):
    """Or what is saved, in part: neither is overwritten before it is read."""
    x, g = normal((30, 7), FLOAT32), normal((30, 7), FLOAT32, 1)
    for _ in "12":
        grad, saved = g.copy(), x.copy()
        expected = F.prelu_backward(grad, x, g[3].copy())
        given = put(grad)
        F.prelu_backward(given, put(saved), put(grad[3]), inplace=True)
        assert_same(grad, expected[0])
        memory = np.concatenate([x.ravel(), np.zeros(7, "f4")])
        saved, out = memory[:-7].reshape(30, 7), memory[7:].reshape(30, 7)
        expected = F.prelu_backward(g, x, x[0].copy())
        F.prelu_backward(put(g), put(saved), put(x[0].copy()), out=put(out))
        assert_same(out, expected[0])


def test_weights_that_are_left_to_the_long_way(put):
    x, g, weights = (normal(shape, FLOAT32, 1) for shape in ((4, 8), (4, 8), 16))
    w = weights[::2]
    expected, _ = F.prelu_backward(g, x, w)
    for _ in "12":
        dx, _ = F.prelu_backward(put(g), put(x), put(w))
        assert_same(dx.host, expected)


def test_shapes_do_not_pile_up(put, monkeypatch):
    monkeypatch.setattr(calls, "_MANY", 2)
    w = put(np.ones(8, "f4"))
    for rows in range(1, 7):
        x = put(np.ones((rows, 8), "f4"))
        F.relu(x)
        F.prelu(x, w)
    for function, ready in (
        (activations._relu_forward, "ready"),
        (activations._prelu_forward, "ready_weight"),
    ):
        assert 0 < len(getattr(function.on_gpu[type(x)], ready)) <= 2


def test_no_channels_at_all(put):
    w, x = put(np.zeros(0, "f4")), put(np.zeros((3, 0), "f4"))
    for _ in "12":
        dx, dw = F.prelu_backward(x, x, w)
        assert (dx.shape, dw.shape) == ((3, 0), (0,))


def test_arrays_in_the_hosts_memory(gpu):
    """Of a type whose others are on the GPU"""
    x = normal(5, FLOAT32)
    F.relu(machines.Tensor(gpu.own(x)))

    class Host:
        is_cuda = False

        def __init__(self, host):
            self.host = host

        def __dlpack_device__(self):
            return 1, 0

        def __array__(self, dtype=None, copy=None):
            return self.host

    _dispatch._ON_GPU.add(Host)
    before = len(gpu.launches)
    assert_same(F.relu(Host(x)), reference.forward("relu", x))
    assert len(gpu.launches) == before


def test_what_real_tensors_show():
    torch = pytest.importorskip("torch", reason="needs PyTorch, if without a GPU")

    class Tensor(torch.Tensor):
        """One in the host's memory that says it is on a GPU"""

        __torch_function__ = torch._C._disabled_torch_function_impl
        is_cuda = True

        def get_device(self):
            return 0

    library = arrays.library_of(Tensor)
    images = torch.ones(2, 3, 4, 5)
    last = images.contiguous(memory_format=torch.channels_last)
    for x, plain in (
        (images, True),
        (last, True),
        (images.permute(3, 1, 0, 2), True),
        (images[:, 1:], False),
        (images.expand(7, 2, 3, 4, 5), False),
        (torch.ones(()), True),
        *((torch.ones(3, dtype=getattr(torch, name)), True) for name in FLOATS),
        (torch.ones(3, dtype=torch.uint8), True),
    ):
        seen = library.describe(x.as_subclass(Tensor))
        size = x.element_size()
        assert seen.dtype == str(x.dtype)[6:]
        assert seen.shape == tuple(x.shape)
        assert (seen.pointer, seen.itemsize) == (x.data_ptr(), size)
        assert seen.strides == tuple(size * stride for stride in x.stride())
        order = () if x.is_contiguous() else x.stride()
        place = library.look(x.as_subclass(Tensor))
        assert place == ((x.data_ptr(), 0, order) if plain else None)
    assert library.look(images) is None  # for it is not on a GPU
    negative = torch.ones(3, dtype=torch.cfloat).conj().imag  # of what is in its memory
    for bad in (torch.ones(3, requires_grad=True), negative):
        assert library.look(bad.as_subclass(Tensor)) is None
        with pytest.raises(TypeError, match="got a tensor"):
            library.describe(bad.as_subclass(Tensor))


# The cache on the disk ----------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTRELU_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fresh(function=_leaky_relu, fmt="float32", wide=False):
    options = {"function": function, "fmt": fmt, "wide": wide}
    return launch.Kernel(work.build, "flat", {**options, "kinds": ("array", "number")})


@emulated
def test_code_is_compiled_once(cache, monkeypatch):
    made = launch.machine_code(fresh(), (9, 0))
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(launch, "compile_ptx", None)
    assert launch.machine_code(fresh(), (9, 0)) == made


@emulated
@pytest.mark.parametrize("content", [b"", b"short", b"x" * 5000])
def test_a_damaged_file_is_made_again(cache, content):
    launch.machine_code(fresh(), (9, 0))
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for damage in (content, whole[:-1], whole + b"x"):
        file.write_bytes(damage)
        made = launch.machine_code(fresh(), (9, 0))
        assert made[1][:4] == b"\x7fELF"
        assert launch._read(file.name) == made


@emulated
def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTRELU_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert launch.machine_code(fresh(), (9, 0))[0]


def test_two_writers(cache):
    payload = bytes(range(256)) * 100
    threads = [
        threading.Thread(target=launch._write, args=("name", "entry", payload))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert launch._read("name") == ("entry", payload)
    assert [file.name for file in cache.iterdir()] == ["name"]


LIMIT = np.array([6.0])  # whose content may change


@emulated
def test_what_cannot_be_known_is_not_kept(cache, monkeypatch):
    kernel = fresh(lambda x, slope: x if x < LIMIT[0] else type(x)(LIMIT[0]))
    assert kernel.digest((9, 0)) is None
    assert launch.machine_code(kernel, (9, 0))[0]
    assert not cache.exists()
    monkeypatch.setattr(launch, "SOURCES", None)
    assert fresh().digest((9, 0)) is None


def test_whatever_a_kernel_is_made_of_is_in_its_digest(monkeypatch):
    def below(limit):
        return lambda x, slope: x if x < limit else type(x)(limit)

    def digest(function=_leaky_relu, capability=(9, 0), **more):
        return fresh(function, **more).digest(capability)

    names = [digest()]
    names += [digest(below(limit)) for limit in (5, 6)]
    names += [digest(capability=(8, 0)), digest(wide=True), digest(fmt="float64")]
    for module, name, value in (
        (launch, "THREADS", 64),
        (launch, "SIMULATED", not launch.SIMULATED),
        (launch, "SOURCES", "others"),
        (launch, "_versions", lambda: "others"),
        (jit.config, "OPT", 12345),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            names.append(digest())
    assert None not in names
    assert len({*names}) == len(names)
    assert digest() == names[0]
    assert digest(below(6)) == names[2]


COLD = """
    import hashlib, sys
    from fastrelu.activations import _leaky_relu
    from fastrelu.cuda import launch, work
    options = {"function": _leaky_relu, "kinds": ("array", "number")}
    kernel = work.kernel("flat", fmt="float32", wide=False, **options)
    print("ready", flush=True)
    sys.stdin.readline()
    entry, code = launch.machine_code(kernel, (9, 0))
    print(entry, hashlib.sha256(code).hexdigest(), "numba.cuda" in sys.modules)
"""


@emulated
def test_two_processes_at_once_on_an_empty_cache(cache, monkeypatch):
    command = [sys.executable, "-c", textwrap.dedent(COLD)]
    with started(command, stdin=PIPE) as one, started(command, stdin=PIPE) as other:
        pair = one, other
        assert [process.stdout.readline() for process in pair] == 2 * ["ready\n"]
        for process in pair:
            process.stdin.write("\n")
            process.stdin.flush()
        results = [process.communicate(timeout=PATIENCE)[0].split() for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    (file,) = cache.iterdir()
    monkeypatch.setattr(launch, "compile_ptx", None)
    entry, code = launch.machine_code(fresh(), (9, 0))
    assert file.name == fresh().digest((9, 0))
    assert [entry, hashlib.sha256(code).hexdigest(), "True"] in results
    assert {name for name, *_ in results} == {entry}
    warm = run_command(command, stdin=DEVNULL)
    assert warm.returncode == 0, warm.stderr
    assert warm.stdout.split()[-1] == "False"  # nothing is imported that compiles


# The driver ---------------------------------------------------------------------------


class Driver:
    """What is asked of cuda.core and of the driver, and in which order"""

    def __init__(self, current=None):
        self.calls, self.now, self.error, self.refusal = [], current, 0, 0
        self.other, self.asked = 0, 0  # a context that is nobody's first

    def cuCtxGetCurrent(self):
        return 0, 0 if self.now is None else self.other or 100 + self.now

    def cuCtxGetDevice(self):
        assert self.now is not None, "an error that a sanitizer reports"
        self.asked += 1
        return 0, self.now

    def cuDevicePrimaryCtxRetain(self, device):
        return self.error, 100 + device

    class CUpointer_attribute:
        CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL = 9

    def cuPointerGetAttribute(self, attribute, pointer):
        return self.error, pointer - 4096 - attribute

    class CUdriverProcAddress_flags:
        CU_GET_PROC_ADDRESS_LEGACY_STREAM = 1

    def cuGetProcAddress(self, name, version, flags):
        names = b"cuLaunchKernel", b"cuCtxGetCurrent", b"cuStreamIsCapturing"
        return self.error, 4096 * names.index(name) + flags, 0

    def cuStreamIsCapturing(self, stream):
        return self.error, stream == 3

    def cuCtxPushCurrent(self, context):
        self.calls.append(context)
        return (self.refusal,)

    def cuCtxSetCurrent(self, context):
        self.calls.append(("set", context))
        return (self.refusal,)

    def cuCtxPopCurrent(self):
        self.calls.append("pop")

    def stream(self, handle):
        class Stream(str):
            def wait(stream, other):
                self.calls.append(f"{stream} waits for {other}")

        return Stream(f"stream {handle}")

    def core(self):
        core = types.ModuleType("cuda.core")
        memory = types.SimpleNamespace(
            allocate=lambda size, stream: self.calls.append((size, stream)) or size
        )
        core.Device = lambda i: types.SimpleNamespace(
            compute_capability=(9, 0), memory_resource=memory
        )
        core.LaunchConfig = lambda grid, block: (grid, block)
        core.Stream = types.SimpleNamespace(from_handle=self.stream)
        code = types.SimpleNamespace(get_kernel=lambda entry: f"kernel {entry}")
        core.ObjectCode = types.SimpleNamespace(from_cubin=lambda code_: code)
        core.launch = lambda *arguments: self.calls.append(arguments)
        return core


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setitem(sys.modules, "cuda.core", made.core())
    monkeypatch.setattr(launch, "_driver", lambda: made)
    monkeypatch.setattr(launch, "machine_code", lambda kernel, cc: ("entry", b""))
    caches = [launch._core, launch._capability, launch._blocks, launch.stream_of]
    caches.append(launch._context)
    monkeypatch.setattr(launch, "_primary", {})
    for cache in caches:
        cache.cache_clear()
    yield made
    for cache in caches:
        cache.cache_clear()


@emulated
def test_a_launch_has_bare_addresses(driver):
    kernel = fresh()
    for _ in "12":
        launch.launch(kernel, 0, 5, 3, 4096, 1, np.float32(0.5))
    call = "stream 5", (3, launch.THREADS), "kernel entry", 4096, 1, np.float32(0.5)
    assert driver.calls == [call] * 2


@emulated
@pytest.mark.parametrize("now", [None, 0, 1])
def test_the_device_of_the_array_is_current(driver, now):
    driver.now = now
    with launch.current(1):
        driver.calls.append("work")
    around = ["work"] if now == 1 else [101, "work", "pop"]
    assert driver.calls == around


@emulated
def test_a_thread_without_a_current_device_keeps_the_first_one(driver):
    """As it does after the first call of a runtime: else each call would change it"""
    with launch.current(0):
        driver.calls.append("work")
    assert driver.calls == [("set", 100), "work"]
    driver.refusal = 999
    for device in (0, 1):
        message = f"device {device} the current one: 999"
        with pytest.raises(RuntimeError, match=message), launch.current(device):
            pass


@emulated
def test_whether_a_device_is_current_is_one_question_to_the_driver(driver):
    driver.now = 1
    for _ in "123":
        assert launch.is_current(1)
    assert driver.asked == 1
    assert not launch.is_current(0)
    driver.other = 55  # another context of the device, which a program made itself
    assert launch.is_current(1)
    assert not launch.is_current(0)
    driver.now = 0
    assert not launch.is_current(1)
    driver.now = None
    assert not launch.is_current(1)


@pytest.mark.skipif(not launch.SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM=1")
def test_a_simulated_device_is_always_current():
    assert launch.is_current(3)
    assert not launch.is_capturing(3)


@emulated
def test_what_else_is_asked_of_the_driver(driver):
    assert launch.device_of(4096 + 9 + 1) == 1
    launch.wait(5, 6)
    assert launch.scratch(64, 5, 0) == 64
    assert driver.calls == ["stream 5 waits for stream 6", (64, "stream 5")]
    assert launch.functions() == [1, 4096 + 1, 8192 + 1]
    assert [launch.is_capturing(stream) for stream in (3, 5)] == [True, False]
    assert launch.context_of(1) == 101
    driver.error = 999
    assert not launch.is_capturing(3)
    with pytest.raises(RuntimeError, match="has no cuLaunchKernel: 999"):
        launch.functions()
    with pytest.raises(ValueError, match="does not know the array's memory: 999"):
        launch.device_of(4096)
    with pytest.raises(RuntimeError, match="no access to device 3: 999"):
        launch._context(3)


def test_the_driver_is_imported_when_it_is_asked(monkeypatch):
    bindings = types.ModuleType("cuda.bindings")
    bindings.driver = object()
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    assert launch._driver.__wrapped__() is bindings.driver


NO_TOOLKIT = type("NvvmSupportError", (Exception,), {})


@pytest.mark.parametrize("error", [NO_TOOLKIT, ZeroDivisionError])
def test_a_machine_without_a_compiler(error, cache, monkeypatch):
    def fail(*_):
        raise error("no libnvvm")

    monkeypatch.setattr(launch, "compile_ptx", fail)
    told = RuntimeError if error is NO_TOOLKIT else error
    with pytest.raises(told, match="libnvvm"):
        launch.machine_code(fresh(), (9, 0))
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize("windows", [False, True])
def test_where_code_is_kept_if_nobody_says(windows, monkeypatch, tmp_path):
    for name in ("FASTRELU_CACHE_DIR", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        _digest, "sys", types.SimpleNamespace(platform="win32" if windows else "linux")
    )
    named = "LOCALAPPDATA" if windows else "XDG_CACHE_HOME"
    monkeypatch.setenv(named, str(tmp_path))
    assert launch.folder() == tmp_path / "fastrelu"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "numba"))
    assert launch.folder() == tmp_path / "numba" / "fastrelu-cuda"
    monkeypatch.setenv("FASTRELU_CACHE_DIR", str(tmp_path / "ours"))
    assert launch.folder() == tmp_path / "ours"


def test_a_disk_that_is_full(cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(launch.os, "replace", full)
    launch._write("digest", "entry", b"code")
    assert list(cache.iterdir()) == []


def test_handles_of_the_legacy_stream():
    assert {arrays._handle(stream) for stream in (None, 0, 1)} == {0}


def test_weights_that_do_not_lie_one_behind_another():
    """Though they vary along two axes that do"""
    order, shape, weight = (0, 1, 2), (2, 3, 4), (1, 3, 4)
    assert parts_of(order, shape, weight, (0, 4, 1)) == (2, 12, 1)
    assert parts_of(order, shape, weight, (0, 1, 3)) is None
