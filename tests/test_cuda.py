"""The CUDA engine without a GPU: its compiled code in an emulator, its calls recorded.

With NUMBA_ENABLE_CUDASIM=1 the same tests run the kernels in Numba's simulator.
"""

import functools
import gc
import math
import mmap
import re
import subprocess
import sys
import weakref

import numpy as np
import ptx
import pytest
import reference
from conftest import (
    ACTIVATIONS,
    FLOATS,
    LAYOUTS,
    OUT_LAYOUTS,
    TYPICAL,
    each,
    gradient_of,
    normal,
    place,
    sample,
    slopes_for,
)
from reference import assert_same, assert_weight_gradient
from test_arguments import OVERLAPS

import fastrelu as F
from fastrelu._spec import Spec

pytest.importorskip("numba_cuda", reason="needs numba-cuda: see the extra cuda13")

from fastrelu import cuda
from fastrelu.cuda import launch, work

pytestmark = pytest.mark.filterwarnings("ignore::numba.NumbaPerformanceWarning")
emulated = pytest.mark.skipif(
    launch.SIMULATED, reason="the simulator is not what is compiled"
)
ALL = (*FLOATS, "int8", "uint8", "int16", "int32", "uint64")
SIZES = {"float16": 8, "bfloat16": 8, "float32": 4, "float64": 2}
FEW = (0, 1, 5, 17, 70) if launch.SIMULATED else (0, 1, 5, 8, 17, 1051)
NATIVE = [name for name in LAYOUTS if name != "swapped"]


def on_device(put, slopes):
    """The same keyword arguments, with a weight where the machine finds it"""
    return {key: put(v) if key == "weight" else v for key, v in slopes.items()}


def used(gpu):
    return [launched[0].template for launched in gpu.launches]


@emulated
def test_the_emulator_knows_what_may_be_touched():
    memory, whole = ptx.Memory(), np.zeros(64, np.uint8)
    memory.add(whole[16:24])
    memory.add(whole[:56])
    memory.add(whole[32:40])
    freed = weakref.ref(whole)
    start = whole.ctypes.data
    del whole
    gc.collect()
    assert freed() is not None  # or another array could come to lie there
    for at in (0, 20, 28, 36, 54):
        found, places = memory.find(np.array([start + at]), 2)
        assert found.size == 56
        assert places.tolist() == [[at, at + 1]]
    for at, says in ((-2, "out of bounds"), (56, "out of bounds"), (1, "misaligned")):
        with pytest.raises(AssertionError, match=says):
            memory.find(np.array([start + at]), 2)


# Values -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", FEW)
@each(*ALL)
def test_forward_and_backward(name, dtype, size, put):
    x, g = sample((size,), dtype), sample((size,), dtype, 1)
    slopes = slopes_for(name, x)
    given = on_device(put, slopes)
    y = ACTIVATIONS[name].forward(put(x), **given)
    assert_same(y.host, reference.forward(name, x, **slopes))
    dx = gradient_of(name, put(g), put(x), **given)
    assert_same(dx.host, reference.backward(name, g, x, **slopes))


@pytest.mark.parametrize("head", [0, 1, 3])
@each(*FLOATS, "int8", names=TYPICAL)
def test_in_place_from_anywhere(name, dtype, head, gpu, put):
    memory = sample((head + 40,), dtype)
    x = memory[head:]
    slopes = slopes_for(name, x)
    given = on_device(put, slopes)
    expected = reference.forward(name, x, **slopes)
    before = memory[:head].copy()
    given_x = put(x)
    assert ACTIVATIONS[name].forward(given_x, inplace=True, **given) is given_x
    assert_same(x, expected)
    assert_same(memory[:head], before)
    assert used(gpu) == ["flat"]
    if not launch.SIMULATED:
        assert gpu.memory.widest == 16


@each("float16", "float32", "float64", names=TYPICAL)
def test_pointers_that_differ_within_16_bytes(name, dtype, gpu, put):
    x = sample((41,), dtype)
    out = np.zeros_like(x)
    slopes = slopes_for(name, x)
    given = on_device(put, slopes)
    ACTIVATIONS[name].forward(put(x[1:]), out=put(out[:-1]), **given)
    assert_same(out[:-1], reference.forward(name, x[1:], **slopes))
    assert used(gpu) == ["strided"]


@pytest.mark.parametrize("layout", NATIVE)
@each("float16", "float32", names=TYPICAL)
def test_layouts(name, dtype, layout, put):
    x, x_memory = place(sample((3, 4, 5), dtype), layout)
    g, _ = place(sample((3, 4, 5), dtype, 1), layout)
    before = x_memory.copy()
    slopes = slopes_for(name, x)
    given = on_device(put, slopes)
    y = ACTIVATIONS[name].forward(put(x), **given)
    assert_same(y.host, reference.forward(name, x, **slopes))
    dx = gradient_of(name, put(g), put(x), **given)
    assert_same(dx.host, reference.backward(name, g, x, **slopes))
    assert_same(x_memory, before)


@pytest.mark.parametrize("layout", OUT_LAYOUTS)
@each("float32", names=TYPICAL)
def test_out(name, dtype, layout, put):
    x, g = sample((3, 4, 5), dtype), sample((3, 4, 5), dtype, 1)
    out, memory = place(g, layout)
    slopes = slopes_for(name, x)
    given = on_device(put, slopes)
    ACTIVATIONS[name].forward(put(x), out=put(out), **given)
    assert_same(memory, place(reference.forward(name, x, **slopes), layout)[1])
    gradient_of(name, put(g), put(x), out=put(out), **given)
    assert_same(memory, place(reference.backward(name, g, x, **slopes), layout)[1])


@pytest.mark.parametrize(
    ("size", "layout"),
    [(size, "c") for size in FEW]
    + [(17, layout) for layout in ("fortran", "step", "offset")],
)
@each(*ALL, where=lambda row: row.takes_mask)
def test_masks(name, dtype, size, layout, put):
    x, g = sample((size, 3), dtype), sample((size, 3), dtype, 1)
    slopes = slopes_for(name, x)
    lies, _ = place(x, layout)
    y, mask = ACTIVATIONS[name].forward(put(lies), return_mask=True, **slopes)
    assert_same(y.host, reference.forward(name, x, **slopes))
    passes = reference.active(x, name, **slopes)
    packed = np.packbits(passes.transpose(mask.axes), bitorder="little")
    assert_same(mask.bits.host, packed)
    assert mask.nbytes == mask.bits.host.nbytes
    assert_same(mask.unpack().host, passes)
    lies, _ = place(g, layout)
    dx = ACTIVATIONS[name].backward(put(lies), mask, **slopes)
    assert_same(dx.host, reference.backward(name, g, x, **slopes))


@pytest.mark.parametrize("saved", ["float16", "float64", "int8", "bool"])
@pytest.mark.parametrize("name", ["relu", "relu6"])
def test_saved_arrays_of_another_dtype(name, saved, put):
    """Also in another order than the gradient"""
    g = sample((3, 4, 5), np.dtype(np.float32), 1)
    x = (
        np.linspace(-2, 7, 60)
        .reshape(3, 4, 5)
        .astype("int8" if saved == "int8" else "f4")
    )
    expected = reference.backward(name, g, x.astype(np.float32))
    told = (
        (x > 0) & ((x < 6) | (name == "relu")) if saved == "bool" else x.astype(saved)
    )
    for given in (told, np.asfortranarray(told), told[:, ::-1].copy()[:, ::-1]):
        assert_same(ACTIVATIONS[name].backward(put(g), put(given)).host, expected)


@pytest.mark.parametrize("how", OVERLAPS)
def test_overlap(how, gpu, put):
    memory = normal(400, np.dtype(np.float32), 5)
    x, out = OVERLAPS[how](memory)
    expected = reference.forward("leaky_relu", x.copy(), negative_slope=0.5)
    F.leaky_relu(put(x), 0.5, out=put(out))
    assert_same(out, expected)


@pytest.mark.parametrize("start", [0, 8])
def test_bits_within_the_output(start, put):
    g = normal(64, np.dtype(np.float32))
    x = normal(64, np.dtype(np.float32), 1)
    bits = g.view(np.uint8)[start : start + 8]
    bits[:] = reference.mask_bits(x)
    expected = reference.backward("relu", g, x)
    F.relu_backward(put(g), F.Mask(put(bits), 64), inplace=True)
    assert_same(g, expected)


# Operations of any kind ---------------------------------------------------------------


def clip(x, low, high):
    if x < low:
        return low
    return high if x > high else x  # noqa: FURB136 - a NaN comes through


def within(x, low):
    return x > low


CLIP = Spec(  # whose predicate takes the first of its numbers
    "clip",
    clip,
    lambda g, passes, low: g if passes else low * g,
    within,
    "x > low",
    numbers=("low", "high"),
    kept=1,
)
RELU = Spec(
    "relu",
    lambda x: type(x)(0) if x <= 0 else x,
    lambda g, passes: g if passes else type(g)(0),
    lambda x: x > 0,
    integers=True,
)


def joined(a, b, c, s, t):
    return a if b > s else t if c > s else c


def scaled(x, slope):
    return x if x > 0 else slope * x


def by_numpy(function, dtype, *operands):
    wide = reference.compute_type(dtype).type
    parts = [a.astype(wide) if isinstance(a, np.ndarray) else wide(a) for a in operands]
    with np.errstate(all="ignore"):
        return np.vectorize(function, otypes=[wide])(*parts).astype(dtype)


def placed(put, layout, *arrays):
    return [cuda.read(put(place(a, layout)[0])) for a in arrays]


@pytest.mark.parametrize("layout", ["c", "permuted", "step", "broadcast", "misaligned"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"], indirect=True)
def test_three_arrays_and_two_numbers(dtype, layout, gpu, put):
    host = [sample((5, 3, 7), dtype, seed) for seed in range(3)]
    if layout == "broadcast":
        host = [np.broadcast_to(a[:1], a.shape) for a in host]
    arrays = [("array", x) for x in placed(put, layout, *host)]
    numbers = [("number", 0.25), ("number", -3.0)]
    y = cuda.empty_like(arrays[0][1])
    cuda.elementwise(joined, [*arrays, *numbers], cuda.read(y))
    assert_same(y.host, by_numpy(joined, dtype, *host, 0.25, -3.0))
    spread = layout in ("step", "broadcast")
    assert used(gpu)[-1] == ("strided" if spread else "flat")


@pytest.mark.parametrize("layout", ["c", "fortran", "permuted", "step"])
@pytest.mark.parametrize("dtype", FLOATS, indirect=True)
def test_a_mask_of_any_predicate_in_the_order_of_memory(dtype, layout, gpu, put):
    x, g = (sample((3, 5, 6), dtype, seed) for seed in (0, 1))
    operands = *(("array", a) for a in placed(put, layout, x)), *LIMITS
    y = cuda.empty_like(operands[0][1])
    functions = CLIP.formula, CLIP.active, CLIP.kept
    bits, axes = cuda.elementwise_mask(*functions, operands, cuda.read(y))
    passes = by_numpy(within, dtype, x, -0.5).astype(bool)
    assert used(gpu) == ["flat_mask" if layout in DENSE else "strided_mask"]
    assert axes == ORDERS[layout]
    assert_same(y.host, by_numpy(clip, dtype, x, -0.5, 1.0))
    packed = np.packbits(passes.transpose(axes), bitorder="little")
    assert_same(bits.host, packed)
    expected = by_numpy(CLIP.gradient, dtype, g, passes.astype("f4"), -0.5)
    for other in {layout, "c", "negative"}:
        gpu.launches.clear()
        (grad,) = placed(put, other, g)
        dx = cuda.empty_like(grad)
        mask = "bits", (cuda.read(bits), axes)
        operands = ("array", grad), mask, LIMITS[0]
        cuda.elementwise(CLIP.gradient, operands, cuda.read(dx))
        assert_same(dx.host, expected)
        flat = other in DENSE and axes == ORDERS[other]
        assert used(gpu) == ["flat" if flat else "strided"]


DENSE = {"c": (0, 1, 2), "fortran": (2, 1, 0), "permuted": (1, 2, 0)}
ORDERS = {**DENSE, "step": (0, 1, 2), "negative": (0, 1, 2)}
LIMITS = ("number", -0.5), ("number", 1.0)


@pytest.mark.parametrize("layout", ["c", "permuted", "step"])
def test_the_predicate_within_a_gradient(layout, put):
    dtype = np.dtype(np.float32)
    g, x = (sample((3, 5, 6), dtype, seed) for seed in (0, 1))
    operands = [("array", a) for a in placed(put, layout, g, x)]
    y = cuda.empty_like(operands[0][1])
    cuda.elementwise(CLIP.of_saved, [*operands, LIMITS[0]], cuda.read(y))
    assert_same(y.host, by_numpy(CLIP.of_saved, dtype, g, x, -0.5))


@pytest.mark.parametrize("layout", ["c", "step"])
@pytest.mark.parametrize("dtype", ["float16", "float64"], indirect=True)
def test_slopes_that_are_drawn(dtype, layout, put):
    x, g = (sample((5, 7), dtype, seed) for seed in (0, 1))
    lies, grad = (put(place(a, layout)[0]) for a in (x, g))
    y, slopes = F.rrelu(lies, 0.25, 0.5, training=True)
    assert (slopes.dtype, slopes.shape) == (x.dtype, x.shape)
    assert ((slopes.host >= 0.25) & (slopes.host <= 0.5)).all()
    assert len({*slopes.host.ravel().tolist()}) > 5
    assert_same(y.host, reference.forward("rrelu", x, slopes=slopes.host))
    dx = F.rrelu_backward(grad, lies, slopes)
    assert_same(dx.host, reference.backward("rrelu", g, x, slopes=slopes.host))
    with pytest.raises(TypeError, match=r"rng must be a cupy\.random\.Generator .*int"):
        F.rrelu(lies, training=True, rng=0)


# PReLU's weights ----------------------------------------------------------------------

SHAPES = {
    "rows": ((2, 3, 72), 3),
    "rows of vectors": ((3, 2, 136), 2),
    "short rows": ((9, 3, 5), 3),
    "columns": ((37, 24), 24),
    "few columns": ((37, 3), 3),
    "shared": ((3, 7, 33), 1),
    "one row": ((1, 2, 700), 2),
    "empty": ((0, 3), 3),
}
WEIGHTS = {
    "two axes": ((2, 3, 4), (3, 4)),
    "a gap": ((2, 3, 4), (2, 1, 4)),
    "keras": ((2, 3, 4, 5), (3, 1, 1)),
    "all": ((2, 3), (2, 3)),
}


def check_prelu(put, x, g, w, **axis):
    y = F.prelu(put(x), put(w), **axis)
    assert_same(y.host, reference.forward("prelu", x, weight=w, **axis))
    results = [F.prelu_backward(put(g), put(x), put(w), **axis) for _ in "12"]
    (dx, dw), (_, again) = results
    assert_same(dx.host, reference.backward("prelu", g, x, weight=w, **axis))
    assert_weight_gradient(dw.host, g, x, w, **axis)
    assert dw.host.tobytes() == again.host.tobytes()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS, indirect=True)
def test_weights_along_an_axis(dtype, shape, put):
    shape, size = SHAPES[shape]
    x, g, w = normal(shape, dtype), normal(shape, dtype, 1), normal(size, dtype, 2)
    check_prelu(put, x, g, w)
    if dtype.itemsize == 2:
        check_prelu(put, x, g, w.astype(np.float32))


@pytest.mark.parametrize("layout", ["fortran", "permuted", "step", "negative"])
@pytest.mark.parametrize("shape", ["rows", "columns", "shared"])
def test_weights_in_every_layout(layout, shape, put):
    shape, size = SHAPES[shape]
    float32 = np.dtype(np.float32)
    x, g = (place(normal(shape, float32, k), layout)[0] for k in (0, 1))
    check_prelu(put, x, g, normal(size, float32, 2))


@pytest.mark.parametrize("shape", ["rows of vectors", "columns", "shared", "one row"])
@pytest.mark.parametrize("dtype", ["float16", "float32"], indirect=True)
def test_sums_do_not_depend_on_where_arrays_lie(dtype, shape, put):
    shape, size = SHAPES[shape]
    x, g, w = sample(shape, dtype), sample(shape, dtype, 1), normal(size, dtype, 2)
    dx, dw = (a.host for a in F.prelu_backward(put(g), put(x), put(w)))
    for skew in (1, 3):
        memory = np.zeros((3, skew + x.size), dtype)
        moved = [row[skew:].reshape(shape) for row in memory]
        moved[0][...], moved[1][...] = g, x
        given = [put(a) for a in moved]
        _, again = F.prelu_backward(*given[:2], put(w), out=given[2])
        assert_same(moved[2], dx)
        assert again.host.tobytes() == dw.tobytes()


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_broadcast(case, put):
    shape, size = WEIGHTS[case]
    x, g, w = (
        normal(s, np.dtype(np.float32), k) for k, s in enumerate([shape, shape, size])
    )
    dx, dw = F.prelu_backward(put(g), put(x), put(w))
    host_dx, host_dw = F.prelu_backward(g, x, w)
    assert_same(dx.host, host_dx)
    np.testing.assert_allclose(dw.host, host_dw, rtol=1e-5, atol=1e-6)
    assert_same(F.prelu(put(x), put(w)).host, F.prelu(x, w))


@pytest.mark.parametrize("special", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("shape", ["rows", "columns"])
def test_weight_gradient_of_what_is_not_finite(shape, special, put):
    shape, size = SHAPES[shape]
    x, g, w = normal(shape, np.dtype("f4")), np.ones(shape, "f4"), np.ones(size, "f4")
    x[1, 1] = float(special)
    _, dw = F.prelu_backward(put(g), put(x), put(w))
    assert_weight_gradient(dw.host, g, x, w)


@pytest.mark.parametrize("argument", ["weight", "x", "grad"])
def test_weight_gradient_onto_an_input(argument, put):
    arrays = {
        k: normal((30, 7), np.dtype("f4"), i) for i, k in enumerate(["x", "grad"])
    }
    arrays["weight"] = normal(7, np.dtype("f4"), 5)
    x, grad, w = (arrays[k].copy() for k in ("x", "grad", "weight"))
    target = arrays[argument] if argument == "weight" else arrays[argument][2]
    given = {key: put(a) for key, a in arrays.items()}
    dx = put(np.empty_like(x))
    F.prelu_backward(given["grad"], given["x"], given["weight"], out=(dx, put(target)))
    assert_same(dx.host, reference.backward("prelu", grad, x, weight=w))
    assert_weight_gradient(target, grad, x, w)


@pytest.mark.parametrize("row", [0, 3])
def test_weight_within_the_output(row, put):
    x = normal((30, 7), np.dtype("f4"))
    expected = reference.forward("prelu", x.copy(), weight=x[row].copy())
    F.prelu(put(x), put(x[row]), inplace=True)
    assert_same(x, expected)


@emulated
def test_the_error_of_a_long_sum_does_not_grow(put):
    x = -np.abs(normal((1, 1, 1 << 18), np.dtype("f4")))
    g = np.abs(normal(x.shape, x.dtype, 1)) + np.float32(1e-3)
    w = np.ones(1, x.dtype)
    _, dw = F.prelu_backward(put(g), put(x), put(w))
    exact, scale = reference.weight_gradient(g, x, w)
    assert abs(dw.host - exact) <= (reference.eps(x.dtype) * scale)


# More elements than 32 bits count -----------------------------------------------------


def reserve(shape, dtype="f2"):
    """Zeros, of which only the pages that are touched take memory"""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    unreserved = 0x4000  # MAP_NORESERVE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | unreserved
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype).reshape(shape)


MET = {  # shape, axis, elements that x and the weight lie behind 16 bytes
    "one": ((1, 3, 7), 0, 1, 0),
    "whole rows": ((2, 5, 16), 1, 0, 1),
    "rows": ((2, 5, 16), 1, 1, 0),
    "rows that end between": ((2, 5, 17), 1, 0, 0),
    "whole columns": ((9, 16), 1, 0, 0),
    "columns": ((9, 16), 1, 0, 1),
    "columns behind": ((9, 16), 1, 1, 0),
    "columns that end between": ((9, 17), 1, 0, 0),
}


@pytest.mark.parametrize("dtype", FLOATS, indirect=True)
@pytest.mark.parametrize("case", MET)
def test_how_vectors_meet_a_weight(case, dtype, gpu, put):
    shape, axis, *starts = MET[case]
    x, w = (
        normal(size + 32, dtype, size)
        for size in (math.prod(shape), math.prod(shape[axis : axis + 1]))
    )
    x, w = (a[(-a.ctypes.data % 16) // a.itemsize :] for a in (x, w))
    x = x[starts[0] :][: math.prod(shape)].reshape(shape)
    w = w[starts[1] :][: shape[axis]]
    expected = reference.forward("prelu", x, weight=w, axis=axis)
    for _ in "12":  # the long way and the short one
        y = put(np.zeros_like(np.resize(x, x.size + 16)))
        y = y[(-y.host.ctypes.data % 16) // x.itemsize + starts[0] :][: x.size]
        F.prelu(put(x), put(w), axis=axis, out=y.reshape(shape))
        assert_same(y.host.reshape(shape), expected)
        layout = case.partition(" that ")[0].removesuffix(" behind")
        assert gpu.launches[-1][0].options["layout"] == layout
    mixed = normal(shape[axis], np.dtype("f4"))
    if dtype.itemsize == 2:
        expected = reference.forward("prelu", x, weight=mixed, axis=axis)
        assert_same(F.prelu(put(x), put(mixed), axis=axis).host, expected)


ROWS, COLUMNS = (1 << 22, 1025), (40, 1 << 27)  # beyond 2 ** 32
CORNERS = np.s_[:1, :200], np.s_[-1:, -200:]
EDGES = np.s_[:, :200], np.s_[:, -200:]
WIDE = {
    "relu": ("flat", ROWS, 0),
    "relu of a part": ("strided", ROWS, 0),
    "relu_backward": ("flat", ROWS, 0),
    "relu_backward of a part": ("strided", ROWS, 0),
    "mask": ("flat_mask", ROWS, 0),
    "mask of a part": ("strided_mask", ROWS, 0),
    "from a mask": ("flat", ROWS, 0),
    "from a mask of a part": ("strided", ROWS, 0),
    "prelu of rows": ("flat", ROWS, 0),
    "prelu of columns": ("flat", ROWS, 1),
    "prelu of a part": ("strided", ROWS, 1),
    "prelu_backward of rows": ("prelu_rows", ROWS, 0),
    "prelu_backward of columns": ("prelu_columns", COLUMNS, 1),
    "prelu_backward of a part": ("strided", ROWS, 0),
}


@emulated
@pytest.mark.skipif(sys.platform != "linux", reason="needs memory without a reserve")
@pytest.mark.parametrize("case", WIDE)
def test_first_and_last_of_more_than_32_bits_count(case, gpu, put):
    template, shape, axis = WIDE[case]
    windows = CORNERS if shape is ROWS else EDGES
    gap = 3 if "part" in case else 0
    x, g, y = (reserve((shape[0], shape[1] + gap))[:, : shape[1]] for _ in range(3))
    for k, window in enumerate(windows):
        part = x[window].shape
        x[window], g[window] = (sample(part, x.dtype, 2 * k + j) for j in (0, 1))
    w, dw = reserve((shape[axis],)), reserve((shape[axis],))
    w[:200], w[-200:] = normal(200, w.dtype), normal(200, w.dtype, 1)
    gpu.only = lambda blocks: sorted({k % blocks for k in (0, 1, -3, -2, -1)})
    given = put(x), put(g), put(w)
    name = case.split()[0]
    if name == "relu":
        F.relu(given[0], out=put(y))
    elif name == "relu_backward":
        F.relu_backward(given[1], given[0], out=put(y))
    elif name == "mask":
        _, mask = F.relu(given[0], out=put(y), return_mask=True)
        for window, some in zip(windows, (np.s_[:25], np.s_[-25:]), strict=True):
            assert_same(mask.bits.host[some], reference.mask_bits(x[window]))
    elif name == "from":
        bits = reserve((math.prod(shape) // 8,), "u1")
        for window, some in zip(windows, (np.s_[:25], np.s_[-25:]), strict=True):
            bits[some] = reference.mask_bits(x[window])
        F.relu_backward(given[1], F.Mask(put(bits), shape), out=put(y))
    elif name == "prelu":
        F.prelu(given[0], given[2], axis=axis, out=put(y))
    else:
        F.prelu_backward(given[1], *given[::2], axis=axis, out=(put(y), put(dw)))
    assert template in used(gpu)
    ends = (np.s_[:1], np.s_[-1:]) if axis == 0 else (np.s_[:200], np.s_[-200:])
    for window, end in zip(windows, ends, strict=True):
        slopes = {}
        if name.startswith("prelu"):
            slopes = {"weight": w[end], "axis": axis}
        kind = "relu" if name in ("mask", "from") else name.removesuffix("_backward")
        if "backward" in case or name == "from":
            expected = reference.backward(kind, g[window], x[window], **slopes)
        else:
            expected = reference.forward(kind, x[window], **slopes)
        assert_same(y[window], expected)
        if name == "prelu_backward":
            assert_weight_gradient(dw[end], g[window], x[window], w[end], axis=axis)


# Compiled code ------------------------------------------------------------------------

CAPABILITIES = (7, 5), (8, 0), (9, 0), (10, 0)
NEWEST = [
    *(pytest.param(each, marks=pytest.mark.long) for each in CAPABILITIES[:-1]),
    CAPABILITIES[-1],
]
FEW = "float16", "float32"
compiled = functools.cache(launch.compile_ptx)


def kernels(floats=FLOATS):
    """Every kind of kernel, by name"""
    array, number = ("array",), ("number",)
    for dtype in floats:
        for function, kinds in (
            (CLIP.formula, array + 2 * number),
            (CLIP.of_saved, 2 * array + number),
            (CLIP.gradient, (*array, "bits", *number)),
            (joined, 3 * array + 2 * number),
        ):
            options = {"function": function, "kinds": kinds, "fmt": dtype}
            yield "flat", options
            yield "strided", {**options, "wide": False, "rank": 2}
        weighted = {"fmt": dtype, "weight": dtype, "wide": False}
        options = {**weighted, "function": scaled, "kinds": ("array", "weight")}
        for layout in ("one", "rows", "columns", "whole rows", "whole columns"):
            yield "flat", {**options, "layout": layout}
        yield "strided", {**options, "rank": 2}
        for template in ("prelu_rows", "prelu_columns"):
            options = {**weighted, "function": CLIP.of_saved}
            yield template, {**options, "vectors": True, "aligned": True}
            yield template, {**options, "vectors": True, "aligned": False}
        yield from masks(CLIP, dtype)
        yield "strided_sum", {"fmt": dtype, "kept": 1, "summed": 2}
        yield "finish", {"fmt": dtype}
    for dtype in ("int8", "uint16", "int32", "int64"):
        yield "flat", {"function": RELU.formula, "kinds": array, "fmt": dtype}
        yield from masks(RELU, dtype)


def masks(spec, dtype):
    kinds = ("array", *len(spec.numbers) * ["number"])
    options = {"function": spec.formula, "kinds": kinds, "fmt": dtype}
    options |= {"active": spec.active, "kept": len(spec.numbers_kept)}
    yield "flat_mask", options
    yield "strided_mask", {**options, "rank": 2, "wide": True}


def has_vectors(template, options):
    whole = template.startswith(("flat", "prelu"))
    return whole and options.get("aligned", True)


@emulated
@pytest.mark.parametrize(
    "floats", [FEW, pytest.param(FLOATS, marks=pytest.mark.long)], ids=["few", "all"]
)
@pytest.mark.parametrize("capability", NEWEST)
def test_code(capability, floats):
    for template, options in kernels(floats):
        text, entry = compiled(work.kernel(template, **options), capability)
        code = text[text.index(entry) :]
        assert ".local" not in code, (template, options)
        assert "call" not in code, (template, options)
        for access in ("ld.global.v", "st.global.v"):
            assert (access in code) == has_vectors(template, options)
        if options["fmt"] != "float64":
            assert ".f64" not in code, (template, options)
        assert "fma.rn" not in code, (template, options)
        assert "atom" not in code


@emulated
@pytest.mark.parametrize("capability", NEWEST)
def test_machine_code(capability, tmp_path):
    from cuda import pathfinder

    program = pathfinder.find_nvidia_binary_utility("nvdisasm")
    if program is None:
        pytest.skip("needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    for template, options in kernels(FEW):
        if options["fmt"] not in FEW:
            continue
        kernel = work.kernel(template, **options)
        text = disassemble(program, kernel, capability, tmp_path / "code")
        assert not [op for op in ("LDL", "STL") if op in text], (template, options)
        registers = max(map(int, re.findall(r"\bR(\d+)\b", text)), default=0) + 1
        summing = template in ("prelu_rows", "prelu_columns", "strided_sum", "finish")
        assert registers <= (96 if summing else 48), (template, options, registers)
        for access in ("LDG.E.128", "STG.E.128"):
            assert (access in text) == has_vectors(template, options)


def disassemble(program, kernel, capability, file):
    file.write_bytes(launch.link(compiled(kernel, capability)[0], capability))
    run = subprocess.run(
        [program, "-c", str(file)], check=True, capture_output=True, text=True
    )
    return run.stdout


def test_a_digest_for_each_kernel_and_device():
    kernels_ = [launch.Kernel(work.build, t, o) for t, o in kernels()]
    digests = [k.digest(c) for k in kernels_ for c in CAPABILITIES]
    assert len({*digests}) == len(digests)
