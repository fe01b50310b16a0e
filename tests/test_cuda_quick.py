"""Quick calls for arrays on a GPU: what they take, what they leave, and what they keep.

All is done twice, by compiled code and by the same code as Python, on the machine of
gpu.py.  That what they launch is what the longer ways do is tested in test_cuda_host.py.
"""

import contextlib
import gc
import importlib
import math
import pickle
import re
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import reference
import twins
from conftest import normal
from reference import assert_same, assert_weight_gradient

import fastrelu as F
from fastrelu import _dispatch, activations, cpu

pytest.importorskip("numba_cuda", reason="needs numba-cuda: see the extra cuda13")
import gpu as machines
from test_cuda_host import FLOAT32, Plain

from fastrelu.cpu import abi
from fastrelu.cuda import arrays, launch

on_gpu = pytest.importorskip("fastrelu.cuda.quick")
pytestmark = [
    pytest.mark.filterwarnings("ignore::numba.NumbaPerformanceWarning"),
    pytest.mark.skipif(launch.SIMULATED, reason="the simulator has no compiled calls"),
    pytest.mark.skipif(not cpu.is_fast(), reason="portable loops have none"),
]


@pytest.fixture(scope="module")
def real_torch():
    """PyTorch, imported before the machine has one of its own"""
    with contextlib.suppress(ImportError):
        return importlib.import_module("torch")


@pytest.fixture(
    params=["compiled", pytest.param("interpreted", marks=pytest.mark.model)],
    autouse=True,
)
def how(request, monkeypatch, real_torch):
    if request.param == "interpreted":
        request.getfixturevalue("gpu")  # which ends after this
        return twins.interpret_gpu(monkeypatch)
    return None


@pytest.fixture
def plain(gpu, put, how):
    gpu.only = lambda blocks: ()
    return Plain(put)


def with_offset(p, a, offset=1):
    """An array that starts so many elements after another one"""
    memory = p.put(np.zeros(a.size + 8, a.dtype))
    return memory[offset : offset + a.size].reshape(a.shape)


def changed(p, **attributes):
    mask = F.Mask(p.mask.bits, p.mask.shape)
    for name, value in attributes.items():
        if value is None:
            delattr(mask, name)
        else:
            setattr(mask, name, value)
    return mask


def with_size(a, size):
    a.size = size
    return a


def with_other_bits(p):
    """A mask that is made of bits of another class than CuPy's arrays"""
    cupy = sys.modules["cupy"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cupy, "ndarray", lambda shape, dtype: Mine(np.empty(shape, dtype))
        )
        return F.relu(p.x, return_mask=True)


class Mine(machines.ndarray):
    """An array of another class than CuPy's own"""

    __module__ = "cupy"


TAKEN = {
    "fresh": lambda p: F.relu(p.x),
    "in place": lambda p: F.relu(p.x, inplace=True),
    "out": lambda p: F.relu(p.x, out=p.y),
    "out is x": lambda p: F.relu(p.x, out=p.x),
    "out looks like x": lambda p: F.relu(p.x, out=p.x[:]),
    "0-d": lambda p: F.relu(p.x[0, :1].reshape(()), inplace=True),
    "an integer": lambda p: F.leaky_relu(p.x, 3, out=p.y),
    "a 0-d array": lambda p: F.leaky_relu(p.x, np.array(0.5), out=p.y),
    "a double": lambda p: F.leaky_relu(p.double, 0.1, inplace=True),
    "two numbers": lambda p: F.threshold(p.x, 0.5, -1.0, out=p.y),
    "no mask ever": lambda p: F.squared_relu(p.x, out=p.y),
    "saved": lambda p: F.leaky_relu_backward(p.g, p.x, 0.5, out=p.y),
    "onto the saved": lambda p: F.relu_backward(p.g, p.x, out=p.x),
    "mask": lambda p: F.relu(p.x, return_mask=True),
    "mask in place": lambda p: F.threshold(p.x, 0.5, 0.0, True, return_mask=True),
    "from a mask": lambda p: F.leaky_relu_backward(p.g, p.mask, 0.1, out=p.y),
    "from the mask of two bounds": lambda p: F.relu6_backward(
        p.g, F.Mask(p.mask.bits, p.mask.shape, None, "0 < x < 6"), out=p.y
    ),
    "from bits at an odd address": lambda p: F.relu_backward(
        p.g, changed(p, bits=with_offset(p, p.mask.bits)), inplace=True
    ),
    "columns": lambda p: F.prelu(p.x, p.w, out=p.y),
    "columns from behind": lambda p: F.prelu(p.x, p.w, axis=-1, out=p.y),
    "columns, in part": lambda p: F.prelu(
        p.x.reshape((240,))[:222].reshape((6, 37)), p.w[:37], inplace=True
    ),
    "rows": lambda p: F.prelu(p.x, p.short, axis=0, inplace=True),
    "rows in part": lambda p: F.prelu(
        p.x.reshape((240,))[:222].reshape((6, 37)), p.short, axis=-2, inplace=True
    ),
    "rows within": lambda p: F.prelu(p.first[0], p.channels, out=p.first[1]),
    "one": lambda p: F.prelu(p.x, p.one, out=p.y),
    "a weight of two axes": lambda p: F.prelu(p.x, p.w.reshape((1, 40)), out=p.y),
    "a weight of three": lambda p: F.prelu(
        p.last, p.channels.reshape((16, 1, 1)), axis=7
    ),
    "one of two axes": lambda p: F.prelu(p.x, p.one.reshape((1, 1)), axis=7),
    "one of no axis": lambda p: F.prelu(p.x, p.one.reshape(()), out=p.y),
    "one for one axis": lambda p: F.prelu(p.w, p.one, out=p.dw),
    "both of columns": lambda p: F.prelu_backward(p.g, p.x, p.w),
    "both of two axes": lambda p: F.prelu_backward(p.g, p.x, p.w.reshape((1, 40))),
    "both of rows": lambda p: F.prelu_backward(p.g, p.x, p.short, axis=0, out=p.y),
    "both of one": lambda p: F.prelu_backward(p.g, p.x, p.one, inplace=True),
    "both into arrays": lambda p: F.prelu_backward(p.g, p.x, p.w, out=(p.y, p.dw)),
    "both onto inputs": lambda p: F.prelu_backward(p.g, p.x, p.w, out=(p.x, p.w)),
    "both, one into an array": lambda p: F.prelu_backward(
        p.g, p.x, p.w, out=(None, p.dw)
    ),
    "both, in place and an array": lambda p: F.prelu_backward(
        p.g, p.g, p.w, out=(p.g, None)
    ),
    "both of weights at an odd place": lambda p: F.prelu_backward(
        p.g, p.x, with_offset(p, p.w), out=(p.y, with_offset(p, p.w, 3))
    ),
    "both of four": lambda p: F.prelu_backward(p.g[:4], p.x[:4], p.w),
    "both within": lambda p: F.prelu_backward(*p.first[:2], p.channels, out=p.first[2]),
    "columns first": lambda p: F.relu(p.x.transpose((1, 0))),
    "columns first, in place": lambda p: F.relu(p.x.transpose((1, 0)), inplace=True),
    "columns first, saved": lambda p: F.leaky_relu_backward(
        *(a.transpose((1, 0)) for a in (p.g, p.x)), out=p.y.transpose((1, 0))
    ),
    "columns first, a weight": lambda p: F.prelu(
        p.x.transpose((1, 0)), p.w, axis=0, out=p.y.transpose((1, 0))
    ),
    "columns first, rows": lambda p: F.prelu(p.x.transpose((1, 0)), p.short),
    "columns first, one": lambda p: F.prelu(p.x.transpose((1, 0)), p.one),
    "channels last": lambda p: F.prelu(p.last, p.channels),
    "both, channels last": lambda p: F.prelu_backward(p.last, p.last, p.channels),
    "both into arrays, columns first": lambda p: F.prelu_backward(
        *(a.transpose((1, 0)) for a in (p.g, p.x)),
        p.w,
        axis=0,
        out=(p.y.transpose((1, 0)), p.dw),
    ),
}
LEFT = {
    "another start": lambda p: F.relu(with_offset(p, p.x), inplace=True),
    "another start of the result": lambda p: F.relu(p.x, out=with_offset(p, p.x)),
    "another start of the saved": lambda p: F.relu_backward(p.g, with_offset(p, p.x)),
    "another start of a weight": lambda p: F.prelu(p.x, with_offset(p, p.w), out=p.y),
    "apart": lambda p: F.relu(p.x[:, ::2], inplace=True),
    "columns first beside rows": lambda p: F.relu(
        p.square.transpose((1, 0)), out=p.square
    ),
    "rows beside columns": lambda p: F.relu_backward(
        p.square, p.square[:].transpose((1, 0))
    ),
    "other orders": lambda p: F.relu(
        p.cube.transpose((1, 2, 0)), out=p.cube.transpose((2, 0, 1))
    ),
    "columns first with a mask": lambda p: F.relu(
        p.x.transpose((1, 0)), return_mask=True
    ),
    "a mask of columns first": lambda p: F.relu_backward(
        p.g.transpose((1, 0)),
        F.relu(p.x.transpose((1, 0)), return_mask=True)[1],
        inplace=True,
    ),
    "columns first, with a gap": lambda p: F.relu(
        p.x.transpose((1, 0))[:, :4][:20], inplace=True
    ),
    "backwards": lambda p: F.relu(p.x[::-1], inplace=True),
    "both, a weight of every second": lambda p: F.prelu_backward(
        p.g, p.x, p.w, out=(p.y, p.block[:80][::2])
    ),
    "no elements": lambda p: F.relu(p.x[:0], inplace=True),
    "another dtype": lambda p: F.relu(p.put(np.zeros(8)), inplace=True),
    "bits of another class": lambda p: with_other_bits(p),
    "another dtype of a weight": lambda p: F.prelu(p.half, p.w, inplace=True),
    "part of x": lambda p: F.relu(p.x[:4], out=p.x[2:]),
    "part of the saved": lambda p: F.relu_backward(p.g[:4], p.x[:4], out=p.x[2:]),
    "part of the weight": lambda p: F.prelu(p.x, p.x[2], inplace=True),
    "bits within": lambda p: F.relu_backward(
        p.g, changed(p, bits=p.g.view("u1").reshape((960,))[:30]), inplace=True
    ),
    "a mask of other axes": lambda p: F.relu_backward(
        p.g.reshape((40, 6)),
        F.Mask(p.mask.bits, (40, 6), (1, 0)),
        out=p.y.reshape((40, 6)),
    ),
    "a weight for each element": lambda p: F.prelu(p.x, p.g, out=p.y),
    "both, a weight for each element": lambda p: F.prelu_backward(p.g, p.x, p.y),
    "too many elements": lambda p: F.prelu(
        with_size(p.block[40:280].reshape((6, 40)), 2**31), p.block[:40], inplace=True
    ),
    "both, another start": lambda p: F.prelu_backward(p.g, with_offset(p, p.x), p.w),
    "both, apart": lambda p: F.prelu_backward(p.g[:, ::2], p.x[:, ::2], p.w[:20]),
    "both, another view": lambda p: F.prelu_backward(p.g[:3], p.x[:3], p.w),
    "both, unlike views": lambda p: F.prelu_backward(
        p.thin, p.thin, p.short[:5], axis=0
    ),
    "both, part of grad": lambda p: F.prelu_backward(
        p.g[:4], p.x[:4], p.w, out=p.g[2:]
    ),
    "both, part of x": lambda p: F.prelu_backward(p.g[:4], p.x[:4], p.w, out=p.x[2:]),
    "both, part of the weight": lambda p: F.prelu_backward(
        p.g, p.x, p.g[2], inplace=True
    ),
    "both, no elements": lambda p: F.prelu_backward(p.g[:0], p.x[:0], p.w),
    "both, an odd byte of a weight": lambda p: F.prelu_backward(
        p.g, p.x, p.odd, out=p.y
    ),
    "rows that are too short": lambda p: F.prelu(p.thin, p.channels, out=p.thin),
    "a saved array of another dtype": lambda p: F.relu_backward(p.g, p.half, out=p.y),
}
# Errors, with the argument that they name.
WRONG = {
    "inplace": (lambda p: F.relu(p.x, 1), TypeError, "inplace"),
    "out and inplace": (lambda p: F.relu(p.x, True, out=p.y), ValueError, "out="),
    "an array of NumPy's": (
        lambda p: F.relu(p.x, out=np.zeros((6, 40), "f4")),
        TypeError,
        "out",
    ),
    "out's shape": (lambda p: F.relu(p.x, out=p.w), ValueError, "out"),
    "out's axes": (lambda p: F.relu(p.x, out=p.y.reshape((40, 6))), ValueError, "out"),
    "out's rank": (lambda p: F.relu(p.x, out=p.x.reshape((240,))), ValueError, "out"),
    "out's dtype": (lambda p: F.relu(p.x, out=p.half), TypeError, "out"),
    "return_mask": (lambda p: F.relu(p.x, return_mask=1), TypeError, "return_mask"),
    "a slope": (lambda p: F.leaky_relu(p.x, math.inf), ValueError, "negative_slope"),
    "a large one": (lambda p: F.leaky_relu(p.x, 1e39), ValueError, "negative_slope"),
    "a flag for one": (lambda p: F.leaky_relu(p.x, True), TypeError, "negative_slope"),
    "saved's shape": (lambda p: F.relu_backward(p.g, p.w), ValueError, "saved"),
    "a mask's shape": (lambda p: F.relu_backward(p.w, p.mask), ValueError, "saved"),
    "a mask without": (
        lambda p: F.relu_backward(p.g, changed(p, shape=None)),
        TypeError,
        "saved",
    ),
    "a mask's list": (
        lambda p: F.relu_backward(p.g, changed(p, shape=[6, 40])),
        TypeError,
        "saved",
    ),
    "no bits": (
        lambda p: F.relu_backward(p.g, changed(p, bits=None)),
        TypeError,
        "saved",
    ),
    "bits that are none": (
        lambda p: F.relu_backward(p.g, changed(p, bits=7)),
        TypeError,
        "saved",
    ),
    "bits of another activation": (
        lambda p: F.relu_backward(
            p.g, F.Mask(p.mask.bits, p.mask.shape, None, "0 < x < 6")
        ),
        ValueError,
        "saved",
    ),
    "few bits": (
        lambda p: F.relu_backward(p.g, changed(p, bits=p.mask.bits[:29])),
        ValueError,
        "saved",
    ),
    "signed bits": (
        lambda p: F.relu_backward(p.g, changed(p, bits=p.mask.bits.view("i1"))),
        TypeError,
        "saved",
    ),
    "square bits": (
        lambda p: F.relu_backward(p.g, changed(p, bits=p.mask.bits.reshape((6, 5)))),
        ValueError,
        "saved",
    ),
    "axis": (lambda p: F.prelu(p.x, p.w, axis=2), ValueError, "axis"),
    "an axis for one": (lambda p: F.prelu(p.x, p.one, axis=2), ValueError, "axis"),
    "a large axis": (lambda p: F.prelu(p.x, p.w, axis=2**70), ValueError, "axis"),
    "a bool": (lambda p: F.prelu(p.x, p.short, axis=False), TypeError, "axis"),
    "weight": (lambda p: F.prelu(p.x, p.w, axis=0), ValueError, "weight"),
    "a list": (lambda p: F.prelu(p.x, [0.5]), TypeError, "weight"),
    "a weight of too many axes": (
        lambda p: F.prelu(p.x, p.one.reshape((1, 1, 1))),
        ValueError,
        "weight",
    ),
    "a weight of two axes, another length": (
        lambda p: F.prelu(p.x, p.channels.reshape((1, 16))),
        ValueError,
        "weight",
    ),
    "an axis that is none": (
        lambda p: F.prelu(p.x, p.w.reshape((1, 40)), axis=1.5),
        TypeError,
        "axis",
    ),
    "both, a list": (
        lambda p: F.prelu_backward(p.g, p.x, p.w, out=[p.y, p.dw]),
        TypeError,
        "out",
    ),
    "both, three": (
        lambda p: F.prelu_backward(p.g, p.x, p.w, out=(p.y, p.dw, p.w)),
        ValueError,
        "out",
    ),
    "both, one memory": (
        lambda p: F.prelu_backward(p.g, p.x, p.w, out=(p.y, p.y[2])),
        ValueError,
        "out",
    ),
    "both, another length": (
        lambda p: F.prelu_backward(p.g, p.x, p.w, out=(p.y, p.short)),
        ValueError,
        "out",
    ),
    "both, another out": (
        lambda p: F.prelu_backward(p.g, p.x, p.w, out=(p.w, p.dw)),
        ValueError,
        "out",
    ),
    "both, x": (lambda p: F.prelu_backward(p.g, p.w, p.w), ValueError, "x"),
    "both, axis": (
        lambda p: F.prelu_backward(p.g, p.x, p.w, axis=0),
        ValueError,
        "weight",
    ),
    "both, inplace": (
        lambda p: F.prelu_backward(p.g, p.x, p.w, inplace=1),
        TypeError,
        "inplace",
    ),
}


def known(plain):
    """Have all kernels known, and return the arrays"""
    plain.half = plain.put(np.ones((6, 40), "f2"))
    plain.double = plain.put(np.ones((6, 40)))
    plain.block = plain.put(np.ones(280, "f4"))
    plain.odd = plain.put(np.zeros(164, "u1"))[1:161].view("f4")
    plain.thin = plain.put(np.ones((5, 16, 2), "f4"))
    plain.square = plain.put(np.ones((8, 8), "f4"))
    plain.cube = plain.put(np.ones((8, 8, 8), "f4"))
    plain.last = plain.put(np.ones((2, 5, 5, 16), "f4")).transpose((0, 3, 1, 2))
    for call in TAKEN.values():
        call(plain)
    return plain


@pytest.mark.parametrize("case", TAKEN)
def test_what_is_taken(case, gpu, plain):
    call = TAKEN[case]
    known(plain)
    before = gpu.quick
    result = call(plain)
    launches = 2 if "both" in case else 1
    assert gpu.quick == before + launches
    y, *more = result if isinstance(result, tuple) else (result,)
    assert type(y) is machines.ndarray
    expected = machines.ndarray if launches == 2 else F.Mask
    assert all(type(each) is expected for each in more)


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left(case, gpu, plain):
    call = LEFT[case]
    known(plain)
    before = gpu.quick
    call(plain)
    assert gpu.quick == before
    assert case == "no elements" or gpu.launches


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong(case, gpu, plain):
    known(plain)
    gpu.launches.clear()
    call, error, name = WRONG[case]
    with pytest.raises(error, match=name):
        call(plain)
    assert not gpu.launches


def test_no_reference_is_lost(gpu, plain, monkeypatch, request):
    """Neither one too few nor one too many, of all that a call meets"""
    gc.freeze()  # what is there already takes its time to be looked at
    request.addfinalizer(gc.unfreeze)
    p, cupy = known(plain), sys.modules["cupy"]
    monkeypatch.setattr(gpu, "own", lambda a: a)  # it would keep them
    held = [p.x, p.y, p.g, p.w, p.dw, p.one, p.short, p.half, p.mask, p.mask.bits]
    held += [p.mask.shape, p.x.shape, p.x.dtype, p.x.data, p.half.dtype]
    held += [p.last, p.last.shape, p.last.strides, p.channels]
    held += [cupy.cuda.get_current_stream(0), machines.ndarray, F.Mask]
    held += [None, True, False, "data", "ptr", (6, 40)]

    def counts():
        gpu.launches.clear()
        gc.collect()
        return [sys.getrefcount(each) for each in held]

    def run(call):
        for _ in range(20):
            try:
                call(p)
            except (TypeError, ValueError):
                pass

    for case, (call, *_) in {
        **{case: (call,) for case, call in {**TAKEN, **LEFT}.items()},
        **WRONG,
    }.items():
        run(call)
        before = counts()
        run(call)
        for each, a, b in zip(held, before, counts(), strict=True):
            assert abs(a - b) < 15, (case, each)


# What may go wrong on the way ---------------------------------------------------------


class Error(Exception):
    """One that comes of another library"""


def broken(*arguments):
    raise Error("as it was raised")


ASKED = "data", "ptr", "device_id", "dtype", "shape", "size", "_c_contiguous", "stream"
ASKED = [(name, (0, 1)) for name in ASKED] + [("strides", (1, 0)), ("itemsize", (1, 0))]


@pytest.mark.parametrize(("name", "axes"), ASKED)
@pytest.mark.parametrize("which", ["x", "out"])
def test_an_error_of_the_library_arrives(which, name, axes, gpu, plain, monkeypatch):
    """Whatever is asked, and nothing is launched"""
    p = known(plain)
    x, out = (a.transpose(axes) for a in (p.x, p.y))
    owner = x if which == "x" else out
    gpu.launches.clear()
    if name in ("ptr", "device_id"):
        names = {"ptr": 1 << 20, "device_id": 0, name: property(broken)}
        owner.data = type("Pointer", (), names)()
    elif name == "stream":
        stream = sys.modules["cupy"].cuda.get_current_stream(0)
        monkeypatch.delattr(stream, "ptr")
        for call in (F.relu, lambda x, out: F.prelu_backward(p.g, x, p.w, out=out)):
            with pytest.raises(AttributeError, match="ptr"):
                call(x, out=out)
        return
    elif which == "out" and name in ("size", "itemsize"):
        return  # which are x's, for they have one shape and one dtype
    else:
        values = {key: vars(owner).pop(key) for key in (name,) if key in vars(owner)}
        plainly = property(
            lambda a: broken() if a is owner else vars(a).get(name, True)
        )
        monkeypatch.setattr(machines.ndarray, name, plainly, raising=False)
        assert len(values) == (name != "_c_contiguous")
    with pytest.raises(Error, match="as it was raised"):
        F.relu(x, out=out)
    assert not gpu.launches


SHAPED = {
    "bits": lambda p: (p.mask.bits, lambda: F.relu_backward(p.g, p.mask, out=p.y)),
    "weight": lambda p: (p.w, lambda: F.prelu(p.x, p.w, out=p.y)),
    "mask": lambda p: (p.x, lambda: F.relu(p.x, inplace=True, return_mask=True)),
    "fresh": lambda p: (p.x, lambda: F.relu(p.x)),
    "both": lambda p: (p.w, lambda: F.prelu_backward(p.g, p.x, p.w, out=(p.y, p.dw))),
    "both, fresh": lambda p: (p.w, lambda: F.prelu_backward(p.g, p.x, p.w)),
    "channels last": lambda p: (p.last, lambda: F.prelu(p.last, p.channels)),
}


@pytest.mark.parametrize("time", [1, 2])
@pytest.mark.parametrize("case", SHAPED)
def test_a_shape_that_raises(case, time, gpu, plain, monkeypatch):
    """The first time that it is asked for, or the next; no output has been touched."""
    p, times = known(plain), 0
    a, call = SHAPED[case](p)

    def get(each):
        nonlocal times
        times += each is a
        return broken() if times == time else vars(each)["shape"]

    shape = property(get, lambda each, value: vars(each).update(shape=value))
    monkeypatch.setattr(machines.ndarray, "shape", shape, raising=False)
    gpu.launches.clear()
    try:
        call()
    except Error:
        assert not gpu.launches
    assert times == time or (time == 2 and gpu.launches)


ODD = {
    "fewer": {"strides": (4, 4)},
    "more": {"strides": (200, 4, 40, 8, 800)},
    "floats": {"strides": (1600.0, 4.0, 320.0, 64.0)},
    "one twice": {"strides": (4, 4, 4, 4)},
    "in no unit": {"itemsize": 0},
    "in another": {"itemsize": 8},
}


@pytest.mark.parametrize("case", ODD)
def test_odd_strides(case, gpu, plain, monkeypatch):
    """Whatever a library may say of an array that is not in C order, it is left"""
    p, left = known(plain), []
    calls = activations._relu_forward.on_gpu[machines.ndarray]
    monkeypatch.setattr(calls, "forward", lambda x, *_: left.append(x) or x)
    x = p.last[:]
    vars(x).update(ODD[case])
    F.relu(x)
    F.relu(x, inplace=True)
    assert len(left) == 2
    before = gpu.quick
    F.relu(p.last, inplace=True)
    assert gpu.quick == before + 1


@pytest.mark.parametrize("wrong", [(1, 0), (0, 1)])
def test_a_result_in_another_order(wrong, gpu, plain, monkeypatch):
    """What a library makes may lie otherwise: that is for the long way"""
    p, cupy = known(plain), sys.modules["cupy"]
    x, before = p.square.transpose((1, 0)), gpu.quick
    new = lambda shape, dtype, *more: gpu.array(np.empty(shape, dtype)).transpose(wrong)
    monkeypatch.setattr(cupy, "ndarray", new)
    y = F.relu(x)
    assert gpu.quick == before + (wrong == (1, 0))
    assert y.strides == ((4, 32) if wrong == (1, 0) else (32, 4))


NEW = {
    "mask": (lambda p: F.relu(p.x, return_mask=True), [(6, 40), (30,)]),
    "both": (lambda p: F.prelu_backward(p.g, p.x, p.w), [(6, 40), (40,), (320,)]),
    "columns first": (lambda p: F.relu(p.x.transpose((1, 0))), [960]),
}


@pytest.mark.parametrize(
    ("case", "enough"),
    [(case, k) for case, (_, shapes) in NEW.items() for k in range(len(shapes))],
)
def test_a_library_without_memory(case, enough, gpu, plain, monkeypatch):
    """For a result, or for what is beside it"""
    p, made = known(plain), []
    call, shapes = NEW[case]

    def empty(shape, dtype):
        if len(made) == enough:
            raise MemoryError(shape)
        made.append(shape)
        return np.empty(shape, dtype)

    gpu.launches.clear()
    monkeypatch.setattr(gpu, "empty", empty)
    with pytest.raises(MemoryError, match=re.escape(str(shapes[enough]))):
        call(p)
    assert len(made) == enough
    assert not gpu.launches


# The objects that are made: the number of bytes, a mask, and the pair.
@pytest.mark.parametrize(("case", "objects"), [("mask", 3), ("both", 2)])
def test_no_memory_for_objects(case, objects, gpu, plain, how):
    """Whatever was made by then goes, and the error arrives."""
    if how is None:
        pytest.skip("only the interpreter's memory can be told to end")
    (call, _), p, enough = NEW[case], known(plain), 0
    gpu.own = lambda a: a

    def found():
        gc.collect()
        things = gc.get_objects()
        return sum(type(thing) in (F.Mask, machines.ndarray) for thing in things)

    while True:
        before, result = found(), None
        how.objects = enough
        try:
            result = call(p)
        except MemoryError:
            assert found() == before
        if result is not None:
            break
        enough += 1
    how.objects = 1 << 60
    assert enough == objects


@pytest.mark.parametrize("name", ["cuLaunchKernel", "cuCtxGetCurrent"])
def test_a_driver_that_fails(name, gpu, plain):
    """Python tries again, and tells of the error if it meets one."""
    p = known(plain)
    before, gpu.broken = gpu.quick, {name}
    y = F.relu(p.x, return_mask=True)[0]
    assert gpu.launches[-1][5] == y.data.ptr
    y = F.prelu_backward(p.g, p.x, p.w, inplace=True)[0]
    assert gpu.launches[-2][7] == y.data.ptr
    assert gpu.quick == before


@pytest.mark.parametrize("enough", [0, 1])
def test_a_driver_that_fails_half_way(enough, gpu, plain, monkeypatch, how):
    """Where the gradient is in place, to start again would be wrong."""
    p, real = known(plain), gpu.launch

    def fails(kernel, *arguments):
        real(kernel, *arguments)
        if kernel.template == "finish":
            raise Error

    monkeypatch.setattr(gpu, "launch", fails)
    gpu.launches.clear()
    if how is not None:
        how.objects = 2 + enough  # and perhaps one for the number of the error
    is_told = enough or how is None
    error, text = (RuntimeError, "refused") if is_told else (MemoryError, "^$")
    with pytest.raises(error, match=text):
        F.prelu_backward(p.g, p.x, p.w, inplace=True)
    assert len(gpu.launches) == 1


def test_another_device(gpu, plain):
    p = known(plain)
    before, gpu.device = gpu.quick, 1
    F.relu(p.x, inplace=True)
    assert gpu.quick == before
    assert gpu.switches[-1] == 0
    far = machines.ndarray(p.y.host, 1)
    for _ in "12":
        F.relu(far, inplace=True)
    assert gpu.quick == before + 1
    gpu.device = 0
    F.relu(p.x, inplace=True)
    assert gpu.quick == before + 2
    with pytest.raises(ValueError, match=r"out .*device"):
        F.relu(p.x, out=far)


def test_the_legacy_stream_has_two_handles(gpu, plain, monkeypatch):
    p = known(plain)
    monkeypatch.setattr(sys.modules["cupy"].cuda.get_current_stream(0), "ptr", 1)
    before = gpu.quick
    F.relu(p.x, inplace=True)
    assert gpu.quick == before + 1
    assert gpu.launches[-1][2] == 0


def test_more_dtypes_than_there_are_rows(gpu, put, monkeypatch):
    monkeypatch.setattr(on_gpu, "_MOST", 2)
    gpu.only = lambda blocks: ()
    for dtype, is_taken in (("f4", True), ("f2", True), ("f8", False)):
        x = put(np.ones(64, dtype))
        for _ in range(3):
            before = gpu.quick
            F.relu(x, inplace=True)
        assert gpu.quick == before + is_taken
    for rows, is_taken in ((2, True), (3, True), (4, False)):
        x, w = put(np.ones((rows, 64))), put(np.ones(64))
        for _ in range(3):
            before = gpu.quick
            F.prelu_backward(x, x, w)
        assert gpu.quick == before + 2 * is_taken


def test_threads_that_learn_at_once(plain):
    """Each row is one thread's, and none waits for another."""
    p = known(plain)
    quick = activations._relu_forward.on_gpu[machines.ndarray].quick
    key, rows = (0, np.dtype("f2"), None), dict(quick.rows)
    with quick.lock:
        assert quick._row(key, 2, *key) == 0
    assert quick.rows == rows
    row = quick._row(key, 2, *key)
    assert row not in rows.values()
    assert quick._row(key, 2, *key) == row
    assert quick.table[on_gpu.compiled.KNOWN] == len(rows) + 1
    F.relu(p.x, inplace=True)


def test_a_chain_that_is_overtaken(how):
    """What another thread came to know meanwhile is asked, too"""
    if how is not None:
        pytest.skip("compiled code has no part in it")

    class Taking:
        def __init__(self, *meanwhile):
            self.meanwhile = [*meanwhile]

        def before(self, fallback):
            while self.meanwhile:
                self.meanwhile.pop()()
            return self, fallback

    function = _dispatch._Forward(activations._RELU)
    function.quick = types.SimpleNamespace(rows=())
    first, second = Taking(lambda: chain(int, second)), Taking()

    def chain(type_, calls):
        function.on_gpu[type_] = calls
        function._chain()

    chain(float, first)
    assert function.call == (second, (first, function.left))


def test_threads(gpu, plain, put, how):
    """Each call has words of its own while the GIL is released."""
    if how is not None:
        pytest.skip("the interpreter's twin is for one thread")
    known(plain)
    gpu.launches.clear()

    def run(seed):
        x, y = (put(normal((6, 40), FLOAT32, seed + k)) for k in (0, 1))
        for k in range(200):
            F.leaky_relu(x, seed + k / 256, out=y)
        return [
            (x.data.ptr, y.data.ptr, np.float32(seed + k / 256)) for k in range(200)
        ]

    before = gpu.quick
    with ThreadPoolExecutor(4) as pool:
        expected = [each for made in pool.map(run, range(0, 40, 10)) for each in made]
    assert gpu.quick > before
    launched = [(given[4], given[5], given[-1]) for given in gpu.launches]
    assert sorted(launched) == sorted(expected)


def test_code_that_cannot_be_compiled(gpu, put, monkeypatch):
    def unproven(template):
        raise abi.Unproven("a test")

    given_up = []
    monkeypatch.setattr(on_gpu, "_compiled", unproven)
    monkeypatch.setattr(cpu, "give_up", given_up.append)
    x = normal((6, 40), FLOAT32)
    for _ in range(4):
        y = F.relu(put(x))
    assert_same(y.host, reference.forward("relu", x))
    assert gpu.quick == 0
    assert [str(error) for error in given_up] == ["a test"]


def test_whom_nobody_asks(gpu):
    assert arrays.library_of(Mine).questions(Mine) is None
    x = normal((6, 40), FLOAT32)
    for _ in range(4):
        F.relu(Mine(gpu.own(x)), inplace=True)
    assert gpu.quick == 0


# PyTorch's tensors --------------------------------------------------------------------


def test_tensors(gpu):
    x, g = (gpu.own(normal((6, 40), FLOAT32, k)) for k in (0, 1))
    first, w = gpu.array(x.copy()), gpu.own(normal(40, FLOAT32))
    for _ in range(3):  # who is asked before they are
        F.relu(first, return_mask=True)
        F.prelu_backward(first, first, gpu.array(w.copy()))
    given, grad = machines.Tensor(x), machines.Tensor(g)
    for _ in range(4):
        before = gpu.quick
        y, mask = F.relu(given, return_mask=True)
        dx = F.relu_backward(grad, mask)
        both = F.prelu_backward(grad, given, machines.Tensor(w))
        assert gpu.launches[-1][2] == 11
    assert gpu.quick == before + 4
    assert_same(both[0].host, reference.backward("prelu", g, x, weight=w, axis=1))
    assert_weight_gradient(both[1].host, g, x, w)
    assert type(y) is type(dx) is type(mask.bits) is machines.Tensor
    assert_same(y.host, reference.forward("relu", x))
    assert_same(mask.bits.host, reference.mask_bits(x))
    assert_same(dx.host, reference.backward("relu", g, x))
    for change in ({"requires_grad": True}, {"layout": "sparse"}):
        bad = machines.Tensor(x)
        bad.__dict__.update(change)
        with pytest.raises(TypeError, match="tensor"):
            F.relu(bad, return_mask=True)
    whole = F.relu(machines.Tensor(x.T), return_mask=True)[0]
    assert_same(whole.host, reference.forward("relu", x.T))
    assert gpu.quick == before + 4


def test_what_is_written_to_is_told(gpu):
    """PyTorch counts how often a tensor's memory was written to"""
    x, g, y, dx = (
        machines.Tensor(gpu.own(normal((6, 40), FLOAT32, k))) for k in range(4)
    )
    w, dw = (machines.Tensor(gpu.own(normal(40, FLOAT32, k))) for k in (5, 6))
    long = machines.Tensor(gpu.own(normal((6, 80), FLOAT32))[:, ::2])
    expected = dict.fromkeys((y, dx, dw, g, long), 0)
    for _ in range(4):
        for call, written in (
            (lambda: F.relu(x), ()),
            (lambda: F.relu(x, out=y), (y,)),
            (lambda: F.relu(x, out=y, return_mask=True), (y,)),
            (lambda: F.relu_backward(g, x, inplace=True), (g,)),
            (lambda: F.prelu(x, w, out=y), (y,)),
            (lambda: F.prelu_backward(g, x, w), ()),
            (lambda: F.prelu_backward(g, x, w, out=(dx, dw)), (dx, dw)),
            (lambda: F.relu(long, inplace=True), (long,)),
            (lambda: F.relu(long, out=w), ()),
        ):
            with contextlib.suppress(ValueError):
                call()
            for each in written:
                expected[each] += 1
            assert {each: each.version for each in expected} == expected
    assert gpu.quick > 0


def test_an_error_of_who_is_told_arrives(gpu, monkeypatch):
    told = []

    def tell(tensor):
        told.append(tensor)
        raise Error

    x, w = (machines.Tensor(gpu.own(normal(n, FLOAT32))) for n in ((6, 40), 40))
    graph = sys.modules["torch"].autograd.graph
    monkeypatch.setattr(graph, "increment_version", tell)
    for _ in range(3):
        F.relu(x), F.prelu_backward(x, x, w)  # which tell nobody
    gpu.launches.clear()
    for call in (
        lambda: F.relu(x, inplace=True),
        lambda: F.prelu_backward(x, x, w, inplace=True),
        lambda: F.prelu_backward(x, x, w, out=(None, w)),
    ):
        before = gpu.quick
        with pytest.raises(Error):
            call()
        assert gpu.quick > before
    assert told == [x, x, w]


def test_within_forward_mode(gpu):
    """A tangent that a tensor may have there would be lost: Python asks for it"""
    x = machines.Tensor(gpu.own(normal((6, 40), FLOAT32)))
    for _ in range(3):
        F.relu(x)
    before, forward = gpu.quick, sys.modules["torch"].autograd.forward_ad
    forward._current_level = 0
    forward.unpack_dual = lambda tensor: tensor
    x.tangent = None
    F.relu(x)
    x.tangent = x
    with pytest.raises(TypeError, match="gradient would be lost"):
        F.relu(x)
    assert gpu.quick == before
    del forward._current_level
    with pytest.raises(AttributeError, match="_current_level"):
        F.relu(x)


def test_numbers_that_are_no_ints(gpu, plain):
    """As where PyTorch traces: they are for Python's checks"""
    p, before = known(plain), gpu.quick
    for name in ("size", "shape"):
        x = p.x[:]
        value = vars(x)[name]
        new = np.int64(value) if name == "size" else (np.int64(6), 40)
        setattr(x, name, new)
        setattr(y := p.y[:], name, new)
        F.relu(x, out=y)
    assert gpu.quick == before


def test_dtypes_that_came_from_elsewhere(gpu, plain):
    """Pickled ones are other objects, and mean the same"""
    p, before = known(plain), gpu.quick
    x = p.x[:]
    x.dtype = pickle.loads(pickle.dumps(np.dtype([("a", "f4")])))["a"]
    assert x.dtype is not p.x.dtype
    F.relu(x, out=p.y)
    F.relu_backward(p.g, x, inplace=True)
    assert gpu.quick == before + 2


def test_what_a_graph_needs_is_kept(gpu, plain, monkeypatch):
    """What a call lends for itself, its graph uses at each replay"""
    p = known(plain)
    monkeypatch.setattr(arrays, "_captured", captured := [])
    for call, number in (
        (lambda: F.prelu_backward(p.g, p.x, p.w, out=(p.y, p.dw)), 1),
        (lambda: F.prelu_backward(p.g, p.x, p.g, out=(p.y, p.y[:])), 0),
        (lambda: F.relu(p.g[:4], out=p.g[2:]), 1),
        (lambda: F.relu_backward(p.g, p.double, out=p.y), 2),
        (lambda: F.relu(p.x, out=p.y), 0),
        (lambda: F.relu(p.x, return_mask=True), 0),
    ):
        for capturing in (False, True):
            gpu.capturing = capturing
            before = len(captured)
            with contextlib.suppress(ValueError):
                call()
            assert len(captured) == before + capturing * number
    gpu.capturing, gpu.broken = False, {"cuStreamIsCapturing"}
    before = gpu.quick
    F.prelu_backward(p.g, p.x, p.w, out=(p.y, p.dw))
    assert gpu.quick == before


def test_subclasses_that_carry_more(gpu):
    class Units(machines.ndarray):
        __module__ = "cupy"

        def __array_finalize__(self, other):
            self.unit = other.unit

    for _ in range(3):
        with pytest.raises(TypeError, match=r"x must be .*Units.*view\(cupy.ndarray\)"):
            F.relu(Units(gpu.own(normal((6, 40), FLOAT32))))


def test_memory_of_another_type(gpu):
    class Parameter(machines.Tensor):
        """A tensor whose like are plain tensors"""

    x = normal((6, 40), FLOAT32)
    for _ in range(4):
        before = gpu.quick
        F.relu(Parameter(gpu.own(x.copy())), inplace=True)
    assert gpu.quick == before + 1
    y = F.relu(Parameter(gpu.own(x)))
    assert type(y) is machines.Tensor
    assert_same(y.host, reference.forward("relu", x))
    assert gpu.quick == before + 1


def test_real_tensors(gpu, monkeypatch, real_torch):
    if real_torch is None:
        pytest.skip("needs PyTorch, if without a GPU")
    torch = real_torch
    monkeypatch.setitem(sys.modules, "torch", torch)
    current = lambda device: 11
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", current, raising=False)

    class Tensor(torch.Tensor):
        """One in the host's memory that says it is on a GPU"""

        __torch_function__ = torch._C._disabled_torch_function_impl
        is_cuda = True

        def get_device(self):
            return 0

        def __dlpack_device__(self):
            return 2, 0

    def tensor(a):
        return torch.from_numpy(gpu.own(a)).as_subclass(Tensor)

    images = np.ones((2, 5, 5, 16), "f4")  # with their channels last
    for _ in range(4):
        before = gpu.quick
        last, y = (
            tensor(images.copy()).permute(0, 3, 1, 2).as_subclass(Tensor) for _ in "12"
        )
        assert last.is_contiguous(memory_format=torch.channels_last)
        F.relu(last, out=y)
        F.relu_backward(last, y, inplace=True)
    assert gpu.quick == before + 2
    x, g, w = (normal(n, FLOAT32, k) for k, n in enumerate(((6, 40), (6, 40), 40)))
    for _ in range(4):
        y, dx = tensor(np.empty_like(x)), tensor(np.empty_like(x))
        F.leaky_relu(tensor(x), 0.5, out=y)
        F.leaky_relu_backward(tensor(g), tensor(x), 0.5, out=dx)
        z, before = tensor(x.copy()), gpu.quick
        assert F.prelu(z, tensor(w), inplace=True) is z
    assert gpu.quick == before + 1
    assert before >= 5
    slope = {"negative_slope": 0.5}
    assert_same(y.numpy(), reference.forward("leaky_relu", x, **slope))
    assert_same(dx.numpy(), reference.backward("leaky_relu", g, x, **slope))
    assert_same(z.numpy(), reference.forward("prelu", x, weight=w))
