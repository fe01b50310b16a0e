"""PReLU's weight: its shapes and axes, and its gradient, whose tolerance is derived."""

import ml_dtypes
import numba
import numpy as np
import pytest
import reference
from conftest import (
    FLOATS,
    LAYOUTS,
    OUT_LAYOUTS,
    dtype_of,
    normal,
    place,
    sample,
)
from reference import assert_same, assert_weight_gradient
from test_threads import run

import fastrelu as F
from fastrelu.cpu import build, sums
from fastrelu.cpu.vector import format_of

FLOAT32 = np.dtype(np.float32)
inf, nan = np.inf, np.nan

# "data / weight / axis"; no axis is the default one, and several dimensions need none.
SHAPES = [
    "/ /",
    "/ 1 /",
    "0 / /",
    "1 / 1 /",
    "17 / /",
    "17 / 1 /",
    "17 / 17 / 0",
    "17 / 17 / -1",
    "17 / 1 / 0",
    "2 3 / 3 /",
    "2 3 / 2 / 0",
    "2 3 / 2 / -2",
    "2 3 / /",
    "2 3 / 1 / 0",
    "2 3 / 1 1 /",
    "3 3 / 3 /",
    "3 3 / 3 / 0",
    "2 3 3 / 3 /",
    "2 3 3 / 3 / -1",
    "2 3 3 / 3 / -2",
    "4 4 4 4 / 4 / 0",
    "4 4 4 4 / 4 /",
    "4 4 4 4 / 4 / 2",
    "4 4 4 4 / 4 / -1",
    "2 3 5 7 / 3 /",
    "2 3 5 7 / 7 / -1",
    "2 3 5 7 / 5 / 2",
    "2 3 5 7 / 1 /",
    "2 1 5 / 1 /",
    "5 1 / 1 /",
    "1 5 / 5 /",
    "300 2 / 2 /",
    "2 300 / 300 /",
    "2 2 300 / 2 /",
    "2 2 16385 / 2 /",
    "3 2500 / 2500 /",
    "1001 3 / 3 /",
    "130 1100 / 1100 /",
    "1500 900 / 900 /",
    "1001 3 2 / 3 /",
    "2 5 3 70 / 2 1 3 1 /",
    "2 3 5 70 / 3 1 70 /",
    "2 3 5 7 / 3 1 1 /",
    "2 3 5 7 / 1 3 1 1 /",
    "2 3 5 7 / 7 /  3",
    "2 3 5 7 / 5 7 /",
    "2 3 5 7 / 5 1 /",
    "2 3 5 7 / 3 1 7 /",
    "2 3 5 7 / 3 5 7 /",
    "2 3 5 7 / 1 7 /",
    "2 3 5 7 / 2 1 1 7 /",
    "2 3 5 7 / 2 1 5 1 /",
    "2 3 5 7 / 2 3 5 7 /",
    "4 4 4 / 4 1 4 /",
    "4 4 4 / 4 4 /",
    "1 3 1 5 / 3 1 1 /",
    "0 3 / 3 /",
    "0 3 4 / 3 / 1",
    "2 0 4 / 0 /",
    "2 3 0 / 3 /",
    "0 3 4 / 3 4 /",
    "2 0 4 / 0 1 /",
]


def read(shapes):
    x, weight, axis = shapes.split("/")
    x, weight = (tuple(map(int, part.split())) for part in (x, weight))
    return x, weight, {"axis": int(axis)} if axis.strip() else {}


def check(g, x, weight, **axis):
    """Forward and backward; returns the gradients"""
    expected = reference.forward("prelu", x, weight=weight, **axis)
    assert_same(F.prelu(x, weight, **axis), expected)
    dx, dw = F.prelu_backward(g, x, weight, **axis)
    assert_same(dx, reference.backward("prelu", g, x, weight=weight, **axis))
    assert type(dw) is np.ndarray
    assert_weight_gradient(dw, g, x, weight, **axis)
    return dx, dw


@pytest.mark.parametrize("shapes", SHAPES)
def test_shapes(shapes):
    shape, weight, axis = read(shapes)
    check(*(normal(shape, FLOAT32, i) for i in (0, 1)), normal(weight, FLOAT32), **axis)


@pytest.mark.parametrize("types", [*FLOATS, "float16 float32", "bfloat16 float32"])
@pytest.mark.parametrize(
    "shapes",
    ["2 3 5 7 / 3 /", "4 4 4 / 4 / -1", "40 / /", "2 3 5 7 / 3 1 7 /", "0 2 / 2 /"],
)
def test_types(shapes, types):
    shape, weight, axis = read(shapes)
    data, *own = map(dtype_of, types.split())
    g, x = (normal(shape, data, i) for i in (0, 1))
    check(g, x, normal(weight, *own or [data], 2), **axis)


@pytest.mark.parametrize("shapes", ["4 5 6 / 5 /", "4 5 6 / 6 / -1", "4 5 6 / 4 1 6 /"])
@pytest.mark.parametrize("dtype", ["float16", "float32"], indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, shapes):
    shape, weight, axis = read(shapes)
    values = [normal(shape, dtype, i) for i in (0, 1)]
    g, x = (place(a, layout)[0] for a in values)
    w, _ = place(normal(weight, dtype, 2), layout)
    dx, _ = check(g, x, w, **axis)
    check(values[0], x, w, **axis)
    check(g, values[1], w, **axis)
    if layout in OUT_LAYOUTS:
        given, memory = place(normal(weight, dtype, 3), layout)
        pair = place(values[0], layout)[0], given
        result = F.prelu_backward(pair[0], x, w, **axis, out=pair)
        assert result[0] is pair[0]
        assert result[1] is given
        assert_same(pair[0], dx)
        assert_weight_gradient(given, g, x, w, **axis)
        assert_same(memory, place(np.array(given), layout)[1])


@pytest.mark.parametrize("how", ["inplace", "out", "pair", "own", "own pair", "weight"])
@pytest.mark.parametrize("layout", ["c", "step"])
def test_where_the_gradients_go(how, layout):
    shape = (2, 3, 4)
    g, x, w = normal(shape, FLOAT32, 1), normal(shape, FLOAT32, 2), normal(3, FLOAT32)
    x, _ = place(x, layout)
    expected = F.prelu_backward(g, x, w)
    dx, dw = np.empty_like(x), np.empty_like(w)
    more = {
        "inplace": {"inplace": True},
        "out": {"out": dx},
        "pair": {"out": (dx, dw)},
        "own": {"out": g},
        "own pair": {"out": (g, dw)},
        "weight": {"out": (None, dw)},
    }[how]
    result = F.prelu_backward(g, x, w, **more)
    assert isinstance(result, tuple)
    if how == "weight":
        assert result[0] is not g
    else:
        assert result[0] is (dx if how in ("out", "pair") else g)
    assert (result[1] is dw) == ("pair" in how or how == "weight")
    for got, want in zip(result, expected, strict=True):
        assert_same(got, want)


def test_the_axis_is_never_guessed():
    x = -np.ones((2, 3, 3), np.float32)
    w = np.array([1, 2, 3], np.float32)
    assert_same(F.prelu(x, w), np.broadcast_to(-w[:, None], x.shape))
    assert_same(F.prelu(x, w, axis=-1), np.broadcast_to(-w, x.shape))
    g = np.arange(18, dtype=np.float32).reshape(x.shape)
    assert_same(F.prelu_backward(g, x, w)[1], -g.sum((0, 2)))
    assert_same(F.prelu_backward(g, x, w, axis=2)[1], -g.sum((0, 1)))
    assert_same(F.prelu(x, w, axis=np.int64(1)), F.prelu(x, w))


def test_a_half_weight_is_not_rounded_to_the_data():
    x = -np.ones((1, 2), np.float16)
    w = np.array([1 + 2**-12, 0.1], np.float32)
    g = np.array([[1024, 2048]], np.float16)
    dx, dw = F.prelu_backward(g, x, w)
    assert_same(dx, np.array([[1024.25, 204.8]], np.float16))
    assert_same(dw, np.array([-1024, -2048], np.float32))


@pytest.mark.parametrize("nan", ["7fffffff", "ffffffff", "7f800001", "7fc00000"])
@pytest.mark.parametrize("dtype", FLOATS, indirect=True)
def test_a_weight_may_be_any_nan(dtype, nan):
    """The digits that a half float does not have must not carry over into its sign."""
    w = np.array([int(nan, 16)], np.uint32).view(np.float32)
    x = np.array([-1, 1], dtype)
    with np.errstate(invalid="ignore"):  # of the signalling one
        w = w.astype(dtype) if dtype.itemsize > 2 else w
    assert_same(F.prelu(x, w), np.array([np.nan, 1], dtype))
    assert_same(F.prelu_backward(x, x, w)[0], np.array([np.nan, 1], dtype))


SPECIAL_SUMS = {  # x, g -> the weight gradient of one channel
    "NaN x": ([nan, -1, 1], [1, 2, 3], nan),
    "NaN x without gradient": ([nan, -1], [0, 2], nan),
    "+inf adds nothing": ([inf, -1], [5, 2], -2),
    "+inf with an infinite gradient": ([inf, -1], [-inf, 2], -2),
    "-inf": ([-inf, -1], [1, 2], -inf),
    "-inf and a negative gradient": ([-inf, -1], [-1, 2], inf),
    "-inf without gradient": ([-inf, -1], [0, 2], nan),
    "both infinities": ([-inf, -inf], [1, -1], nan),
    "active NaN gradient": ([2, -1], [nan, 2], -2),
    "inactive NaN gradient": ([-2, -1], [nan, 2], nan),
    "active infinite gradient": ([2, -1], [inf, 2], -2),
    "inactive infinite gradient": ([-2, -1], [inf, 2], -inf),
    "infinite gradient at zero": ([0, -1], [inf, 2], nan),
    "zeros": ([0, -0.0], [3, 4], 0),
    "none inactive": ([1, 2], [3, 4], 0),
}


@pytest.mark.parametrize("size", [3, 100, 5000])
@pytest.mark.parametrize("dtype", FLOATS, indirect=True)
@pytest.mark.parametrize("case", SPECIAL_SUMS)
def test_special_sums_stay_in_their_channel(case, dtype, size):
    xs, gs, total = SPECIAL_SUMS[case]
    x, g = np.ones((3, size), dtype), np.ones((3, size), dtype)
    x[0], x[2] = -1, -0.5
    x[1, -len(xs) :], g[1, -len(xs) :] = xs, gs
    dw = F.prelu_backward(g, x, np.ones(3, dtype), axis=0)[1]
    expected = np.array([-size, total, -size / 2]).astype(dtype)
    assert_same(dw + dtype.type(0), expected)  # the sign of a zero sum is left open


@pytest.mark.parametrize("weight", ["same", "float32"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"], indirect=True)
def test_half_products_are_not_rounded(dtype, weight):
    w = np.ones(2, dtype if weight == "same" else weight)
    n = 1024
    large, small = np.full(n, 2.0**9), np.full(n, 2.0**-14)
    one = 1 + reference.eps(dtype)
    x = np.stack([-large, -small]).astype(dtype)
    g = np.stack([large * np.resize([1, -1], n), small]).astype(dtype)
    expected = [0, -n * 2.0**-28]  # 2**18 is no float16 and 2**-28 is none either
    assert_same(F.prelu_backward(g, x, w, axis=0)[1], np.array(expected, w.dtype))
    # The squares differ from 1 + 2 eps only in digits that the type does not have.
    x = np.array([[-one, 1], [-one, -1]], dtype)
    g = np.array([[one, 1], [one, -(1 + 2 * reference.eps(dtype))]], dtype)
    expected = [-(one**2), 1 + 2 * reference.eps(dtype) - one**2]
    assert_same(F.prelu_backward(g, x, w, axis=0)[1], np.array(expected, w.dtype))


@pytest.mark.parametrize("own", ["float16", "float32"])
@pytest.mark.parametrize("into", ["fresh", "out"])
def test_a_weight_gradient_beyond_its_type_is_infinite(into, own):
    x, g = np.full((2, 4000), -30, np.float16), np.full((2, 4000), 30, np.float16)
    g[1] = 1
    w = np.ones(2, own)
    more = {"out": (np.empty_like(x), np.empty_like(w))} if into == "out" else {}
    expected = [-3_600_000, -120_000] if own == "float32" else [-inf, -inf]
    dw = F.prelu_backward(g, x, w, axis=0, **more)[1]
    assert_same(dw, np.array(expected, own))


LARGE = [
    "8 64 64 64 / 64 /",
    "8 64 128 128 / 64 /",
    "20000 300 / 300 /",
    "2048 1000 / 1000 /",
    "8 64 64 64 / 64 / -1",
    "2000003 / /",
    "2 3 350000 / 3 /",
    "350000 6 / 6 /",
    "1 2000 1000 / 2000 /",
    "2 8 40 3000 / 8 1 3000 /",
    "100 20000 / 20000 /",
]


@pytest.mark.parametrize("dtype", ["float16", "float32"], indirect=True)
@pytest.mark.parametrize("shapes", LARGE)
def test_large_and_the_same_for_every_number_of_threads(shapes, dtype, all_threads):
    shape, weight, axis = read(shapes)
    g, x = (normal(shape, dtype, i) for i in (0, 1))
    w = normal(weight, dtype, 2)
    dx, dw = check(g, x, w, **axis)
    for threads in [*all_threads, all_threads[-1]]:
        numba.set_num_threads(threads)
        again = F.prelu_backward(g, x, w, **axis)
        assert_same(again[0], dx)
        assert_same(again[1], dw)
    assert F.prelu_backward(g, x, w, **axis, inplace=True)[0] is g
    assert_same(g, dx)


@pytest.fixture
def all_threads():
    before = numba.get_num_threads()
    yield range(1, numba.config.NUMBA_NUM_THREADS + 1)
    numba.set_num_threads(before)


@pytest.mark.parametrize("layout", ["c", "fortran", "step", "negative", "misaligned"])
def test_weight_gradient_bits_repeat_in_every_layout(layout, all_threads):
    g, x = (place(normal((60, 50, 100), FLOAT32, i), layout)[0] for i in (0, 1))
    w = normal(50, FLOAT32, 2)
    _, dw = check(g, x, w)
    for threads in all_threads:
        numba.set_num_threads(threads)
        assert_same(F.prelu_backward(g, x, w)[1], dw)


@pytest.mark.parametrize("shape", [(400, 131), (99, 5, 13), (70, 1100), (3, 4, 700)])
def test_gradients_have_the_same_bits_wherever_they_start(shape):
    """Lines are where they are: words begin elsewhere in each, and rows within them."""
    double = np.dtype(np.float64)
    g, x = (normal(shape, double, i) for i in (0, 1))
    w = normal(shape[1], double, 2)
    dx, dw = check(g, x, w)
    memory = np.zeros(g.size + 9)
    for start in range(9):
        y = memory[start:][: g.size].reshape(shape)
        for more in ({"out": y}, {"inplace": True}):
            y[...] = g
            got = F.prelu_backward(y if "inplace" in more else g, x, w, **more)
            assert_same(got[0], dx)
            assert_same(got[1], dw)


@pytest.mark.parametrize("cancels", ["grows", "cancels"])
@pytest.mark.parametrize("dtype", FLOATS, indirect=True)
def test_long_sums(dtype, cancels):
    # The running sum outgrows the digits of an accumulator that adds one by one.
    n = 2**18
    x, g = -np.ones(n, dtype), np.full(n, 0.1).astype(dtype)
    if cancels == "cancels":
        g[n // 2 :] = -g[: n // 2]
    w = np.ones((), np.result_type(dtype, np.float32))
    assert_weight_gradient(F.prelu_backward(g, x, w)[1], g, x, w)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"], indirect=True)
@pytest.mark.parametrize("shape", [(3, 5), (16, 64, 9, 9), (9, 1024), (2, 3000)])
def test_half_weights_have_the_same_bits_in_any_layout(dtype, shape):
    """The quick call widens and rounds them in compiled code, the other in NumPy's."""
    g, x = sample(shape, dtype, seed=1), sample(shape, dtype)
    for weight in (normal(shape[1:2], dtype), np.full(1, 0.3, dtype)):
        strided = np.zeros((*shape, 2), dtype)[..., 0]
        strided[...] = x
        assert_same(F.prelu(x, weight), F.prelu(strided, weight))
        for a, b in zip(
            F.prelu_backward(g, x, weight),
            F.prelu_backward(g, strided, weight),
            strict=True,
        ):
            assert_same(a, b)


@pytest.mark.parametrize("bits", [11, 8], ids=["float16", "bfloat16"])
def test_a_sum_is_rounded_once(bits):
    """Ties, and what is just beside them, of numbers that a half float cannot hold."""
    rng = np.random.default_rng(0)
    halves = rng.integers(1 << bits - 1, 1 << bits, 2000).astype(np.float64)
    near = np.array([0.5, 0.5 + 2.0**-40, 0.5 - 2.0**-40, 0.3, 0.0])
    values = np.ldexp((halves[:, None] + near).ravel(), -bits)
    fmt = format_of(np.dtype("float16" if bits == 11 else ml_dtypes.bfloat16))
    totals = np.stack([values, np.zeros_like(values)])
    result = np.empty(values.size, fmt.storage)
    compiled = build.compiled_for(fmt, sums.round_sums)
    compiled.ctypes(totals.ctypes.data, result.ctypes.data, values.size)
    dtype = np.float16 if bits == 11 else ml_dtypes.bfloat16
    expected = np.ldexp(np.round(np.ldexp(values, bits)), -bits)  # ties to even
    assert np.array_equal(result.view(dtype).astype(np.float64), expected)
    extremes = np.array([[1e300, -1e300, np.inf, np.nan, 1e-320], [0.0] * 5])
    result = np.empty(5, fmt.storage)
    compiled.ctypes(extremes.ctypes.data, result.ctypes.data, 5)
    expected = np.array([np.inf, -np.inf, np.inf, np.nan, 0.0])
    assert_same(result.view(dtype), expected.astype(dtype))


@pytest.mark.parametrize("engine", ["fast", "portable"])
def test_a_sum_is_rounded_once_the_long_way(engine):
    """Rounded to float32 first, it would be a tie."""
    script = """
    import ml_dtypes
    import numpy as np
    import fastrelu as F
    rows = np.zeros((2, 7), "u1")
    g, x = (row[1:].view(ml_dtypes.bfloat16) for row in rows)  # nothing is aligned
    g[:], x[:] = [-1, -1, -(2**-20)], [-1, -(2**-8), -(2**-20)]
    weight = np.ones(1, g.dtype)
    out = np.zeros(3, g.dtype), np.zeros(1, g.dtype)
    for y in F.prelu_backward(g, x, weight, axis=0), F.prelu_backward(g, x, weight, axis=0, out=out):
        print(y[1][0] == 1 + 2**-7, y[0].tolist() == g.tolist(), end=" ")
    """
    assert run(script, FASTRELU_ENGINE=engine) == "True True True True "


def test_other_threads_find_no_pair_that_is_not_whole():
    """The garbage collector knows every tuple there is while the loop runs."""
    script = """
    import gc, threading
    import numpy as np
    import fastrelu as F
    x = np.linspace(-1, 1, 1 << 20).astype(np.float32)
    weight = np.full(1, 0.5, np.float32)
    F.prelu_backward(x, x, weight)  # or it is compiled beside a thread that rests never
    gc.collect()
    gc.freeze()  # what was there before
    ended, seen = threading.Event(), set()
    def walk():
        while not ended.is_set():
            for pair in [t for t in gc.get_objects() if type(t) is tuple and len(t) == 2]:
                seen.add(tuple(map(type, pair)))
    walker = threading.Thread(target=walk)
    walker.start()
    for _ in range(300):
        dx, dw = F.prelu_backward(x, x, weight)
    ended.set()
    walker.join()
    print((np.ndarray, np.ndarray) in seen)
    """
    assert run(script) == "True\n"
