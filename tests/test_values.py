"""Every activation and its gradient, bit for bit, over the grid of conftest.py."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import reference
from conftest import (
    ACTIVATIONS,
    FLOATS,
    INTEGERS,
    LARGE,
    LAYOUTS,
    OUT_LAYOUTS,
    PAST_CACHE,
    SHAPES,
    SLOPES,
    TYPICAL,
    each,
    gradient_of,
    in_turn,
    normal,
    place,
    sample,
    slopes_for,
    specials,
    strides,
)
from reference import assert_same, bits

import fastrelu as F

SIZES = ("float16", "float32", "float64", "int8")


def has_mask(row):
    return row.takes_mask


each_activation = pytest.mark.parametrize("name", ACTIVATIONS)
each_masked = pytest.mark.parametrize(
    "name", [name for name, row in ACTIVATIONS.items() if has_mask(row)]
)
each_float = pytest.mark.parametrize("dtype", FLOATS, indirect=True)
each_shape = in_turn("shape", SHAPES)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_out_layout = pytest.mark.parametrize("layout", OUT_LAYOUTS)
each_slope = pytest.mark.parametrize("slope", SLOPES)


def check_forward(name, library, shape, dtype, layout):
    x, memory = place(sample(SHAPES[shape], dtype), layout)
    before = memory.tobytes()
    slopes = slopes_for(name, x)
    given = library.put(x)
    y = ACTIVATIONS[name].forward(given, **slopes)
    assert type(y) is library.array_type
    y = library.get(y)
    assert_same(y, reference.forward(name, x, **slopes))
    assert strides(y) == strides(np.empty_like(x, order="K", subok=False))
    assert not np.shares_memory(y, memory)
    assert y.flags.behaved
    assert memory.tobytes() == before


def check_backward(name, library, shape, dtype, layout):
    g, g_memory = place(sample(SHAPES[shape], dtype, seed=1), layout)
    x, x_memory = place(sample(SHAPES[shape], dtype, seed=2), layout)
    before = g_memory.tobytes() + x_memory.tobytes()
    slopes = slopes_for(name, x)
    dx = gradient_of(name, library.put(g), library.put(x), **slopes)
    assert type(dx) is library.array_type
    dx = library.get(dx)
    assert_same(dx, reference.backward(name, g, x, **slopes))
    assert strides(dx) == strides(np.empty_like(g, order="K", subok=False))
    assert not np.shares_memory(dx, g_memory)
    assert not np.shares_memory(dx, x_memory)
    assert g_memory.tobytes() + x_memory.tobytes() == before


@each_shape
@each(*FLOATS, *INTEGERS)
def test_forward_of_every_type(name, library, shape, dtype):
    check_forward(name, library, shape, dtype, "c")


@each_shape
@each(*FLOATS, *INTEGERS)
def test_backward_of_every_type(name, library, shape, dtype):
    check_backward(name, library, shape, dtype, "c")


@each_shape
@each_layout
@each(*SIZES, names=TYPICAL)
def test_forward_of_every_layout(name, library, shape, dtype, layout):
    check_forward(name, library, shape, dtype, layout)


@each_shape
@each_layout
@each(*SIZES, names=TYPICAL)
def test_backward_of_every_layout(name, library, shape, dtype, layout):
    check_backward(name, library, shape, dtype, layout)


@in_turn("size", range(130))
@each("bfloat16", "float32")
def test_every_tail(name, dtype, size):
    x, g = sample((size,), dtype), sample((size,), dtype, seed=1)
    slopes = slopes_for(name, x)
    out, memory = place(g, "c")
    ACTIVATIONS[name].forward(x, out=out, **slopes)
    assert_same(memory, place(reference.forward(name, x, **slopes), "c")[1])
    gradient_of(name, g, x, out=out, **slopes)
    assert_same(memory, place(reference.backward(name, g, x, **slopes), "c")[1])


@each_shape
@each_out_layout
@each(*SIZES, names=TYPICAL)
def test_out(name, shape, dtype, layout):
    row = ACTIVATIONS[name]
    x, g = sample(SHAPES[shape], dtype), sample(SHAPES[shape], dtype, seed=1)
    slopes = slopes_for(name, x)
    out, memory = place(g, layout)
    assert row.forward(x, out=out, **slopes) is out
    assert_same(memory, place(reference.forward(name, x, **slopes), layout)[1])
    assert gradient_of(name, g, x, out=out, **slopes) is out
    assert_same(memory, place(reference.backward(name, g, x, **slopes), layout)[1])


@pytest.mark.parametrize("how", ["inplace", "out"])
@each_shape
@each_out_layout
@each(*SIZES, names=TYPICAL)
def test_in_place(name, shape, dtype, layout, how):
    def onto(a):
        return {"inplace": True} if how == "inplace" else {"out": a}

    values, g = sample(SHAPES[shape], dtype), sample(SHAPES[shape], dtype, seed=1)
    slopes = slopes_for(name, values)
    x, memory = place(values, layout)
    assert ACTIVATIONS[name].forward(x, **slopes, **onto(x)) is x
    y = reference.forward(name, values, **slopes)
    assert_same(memory, place(y, layout)[1])
    dx, memory = place(g, layout)
    assert gradient_of(name, dx, values, **slopes, **onto(dx)) is dx
    expected = reference.backward(name, g, values, **slopes)
    assert_same(memory, place(expected, layout)[1])


@pytest.mark.parametrize("layout", ["step", "negative", "fortran"])
@each_activation
def test_arrays_of_different_layouts(name, layout):
    float32 = np.dtype(np.float32)
    g, values = sample((5, 6, 7), float32), sample((5, 6, 7), float32, seed=1)
    x, _ = place(values, layout)
    slopes = slopes_for(name, x)
    expected = reference.backward(name, g, values, **slopes)
    assert_same(gradient_of(name, g, x, **slopes), expected)
    assert_same(
        gradient_of(name, x, g, **slopes), reference.backward(name, x, g, **slopes)
    )
    out, memory = place(values, "permuted")
    gradient_of(name, g, x, out=out, **slopes)
    assert_same(memory, place(expected, "permuted")[1])


@pytest.mark.parametrize("layout", ["c", "step", "fortran", "misaligned"])
@each("float16", "float32", names=TYPICAL)
def test_large(name, dtype, layout):
    row = ACTIVATIONS[name]
    values = sample((LARGE // 3, 3), dtype)
    slopes = slopes_for(name, values)
    y = reference.forward(name, values, **slopes)
    g = sample(values.shape, dtype, seed=1)
    dx = reference.backward(name, g, values, **slopes)
    x, _ = place(values, layout)
    assert_same(row.forward(x, **slopes), y)
    assert_same(gradient_of(name, place(g, layout)[0], x, **slopes), dx)
    out, memory = place(values, layout)
    row.forward(values, out=out, **slopes)
    assert_same(memory, place(y, layout)[1])
    out, memory = place(g, layout)
    gradient_of(name, out, x, inplace=True, **slopes)
    assert_same(memory, place(dx, layout)[1])


@each("float16", "float32", where=has_mask, names=TYPICAL)
def test_large_with_a_mask(name, dtype):
    row = ACTIVATIONS[name]
    x, g = sample((LARGE,), dtype), sample((LARGE,), dtype, seed=1)
    slopes = slopes_for(name, x)
    y, mask = row.forward(x, return_mask=True, **slopes)
    assert_same(y, reference.forward(name, x, **slopes))
    assert_same(mask.bits, reference.mask_bits(x, name, **slopes))
    assert_same(
        row.backward(g, mask, **slopes), reference.backward(name, g, x, **slopes)
    )


@pytest.mark.parametrize("skew", ["0", "13"])
@each("float32", names=TYPICAL)
def test_past_the_cache(name, dtype, skew):
    row = ACTIVATIONS[name]
    n = PAST_CACHE // dtype.itemsize - 5
    memory = np.resize(sample((1021, 3), dtype), (n // 3 + 9, 3))
    x = memory.reshape(-1)[int(skew) :][: n // 3 * 3].reshape(-1, 3)
    slopes = slopes_for(name, x)
    y, dx = (
        reference.forward(name, x, **slopes),
        reference.backward(name, x, x, **slopes),
    )
    assert_same(row.forward(x, **slopes), y)
    out = np.empty_like(memory).reshape(-1)[int(skew) // 2 :][: x.size].reshape(x.shape)
    assert row.forward(x, out=out, **slopes) is out
    assert_same(out, y)
    gradient_of(name, x, x, out=out, **slopes)
    assert_same(out, dx)
    if has_mask(row):
        _, mask = row.forward(x, out=out, return_mask=True, **slopes)
        assert_same(out, y)
        assert_same(mask.bits, reference.mask_bits(x, name, **slopes))
        assert_same(row.backward(x, mask, **slopes), dx)
    gradient_of(name, x, x, inplace=True, **slopes)
    assert_same(x, dx)


def test_definitions_by_hand():
    inf, nan, tiny = np.inf, np.nan, 5e-324
    x = np.array([nan, -inf, -2.0, -tiny, -0.0, 0.0, tiny, 2.0, inf])
    assert_same(F.relu(x), np.array([nan, 0, 0, 0, 0, 0, tiny, 2, inf]))
    expected = np.array([nan, -inf, -6, -3 * tiny, -0.0, 0, tiny, 2, inf])
    assert_same(F.leaky_relu(x, 3), expected)
    assert_same(F.prelu(x, np.array(3.0)), expected)
    expected = np.array([nan, nan, -0.0, -0.0, -0.0, 0, tiny, 2, inf])
    assert_same(F.leaky_relu(x, 0), expected)
    expected = np.array([nan, inf, 1, 0, 0, -0.0, tiny, 2, inf])
    assert_same(F.leaky_relu(x, -0.5), expected)

    g = np.array([7.0, nan, inf, 1, -1, 1, 5, nan, -inf])
    assert_same(F.relu_backward(g, x), np.array([0, 0, 0, 0, 0, 0, 5, nan, -inf]))
    expected = np.array([21, nan, inf, 3, -3, 3, 5, nan, -inf])
    assert_same(F.leaky_relu_backward(g, x, 3), expected)
    dx, dw = F.prelu_backward(g, x, np.array(3.0))
    assert_same(dx, expected)
    assert np.isnan(dw)


@each(*FLOATS)
def test_where_a_formula_bends(name, dtype):
    """At the numbers that it compares with, at those next to them, and at specials"""
    row = ACTIVATIONS[name]
    for numbers in itertools.product(*row.examples.values()):
        at = np.array([0, 6, *numbers], dtype)
        next_to = [np.nextafter(at, dtype.type(limit)) for limit in (-np.inf, np.inf)]
        x = np.concatenate([at, *next_to, specials(dtype)])
        x, g = np.meshgrid(x, specials(dtype))
        more = slopes_for(name, x) | dict(zip(row.examples, numbers, strict=True))
        assert_same(row.forward(x, **more), reference.forward(name, x, **more))
        expected = reference.backward(name, g, x, **more)
        assert_same(gradient_of(name, g, x, **more), expected)
        if has_mask(row):
            y, mask = row.forward(x, return_mask=True, **more)
            assert_same(mask.unpack(), reference.active(x, name, **more))
            assert_same(row.backward(g, mask, **more), expected)
            if row.output_tells(*numbers):
                assert_same(row.backward(g, y, **more), expected)


@each_slope
@each_float
def test_every_pair_of_specials_and_every_slope(dtype, slope):
    x, g = (a.ravel() for a in np.meshgrid(specials(dtype), specials(dtype)))
    leaky = {"negative_slope": float(slope)}
    shared = {"weight": np.array(float(slope)).astype(dtype)}
    assert_same(F.leaky_relu(x, **leaky), reference.forward("leaky_relu", x, **leaky))
    assert_same(F.prelu(x, **shared), reference.forward("prelu", x, **shared))
    expected = reference.backward("leaky_relu", g, x, **leaky)
    assert_same(F.leaky_relu_backward(g, x, **leaky), expected)
    expected = reference.backward("prelu", g, x, **shared)
    assert_same(F.prelu_backward(g, x, **shared)[0], expected)
    assert_same(F.relu_backward(g, x), reference.backward("relu", g, x))


@pytest.mark.parametrize("slope", [*SLOPES, "3.3", "0.3333333333333333", "-1e4"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"], indirect=True)
def test_every_half_float(dtype, slope):
    x = np.arange(2**16, dtype=np.uint16).view(dtype)
    assert_same(F.relu(x), reference.forward("relu", x))
    with np.errstate(all="ignore"):
        product = (np.float32(slope) * x.astype(np.float32)).astype(dtype)
    y = np.where(reference.active(x), x, product)
    weight = np.array([slope], np.float32)
    assert_same(F.leaky_relu(x, float(slope)), y)
    assert_same(F.prelu(x, weight), y)
    inactive = np.full_like(x, -1)
    assert_same(F.leaky_relu_backward(x, inactive, float(slope)), product)
    assert_same(F.prelu_backward(x, inactive, weight)[0], product)


@pytest.mark.parametrize("slope", ["1e-45", "3e38", "0.1", "-7"])
@each_float
def test_the_slope_is_rounded_to_the_compute_type(slope, dtype):
    x = -np.geomspace(1e-4, 1e4, 33).astype(dtype)
    expected = reference.forward("leaky_relu", x, negative_slope=float(slope))
    assert_same(F.leaky_relu(x, float(slope)), expected)


@pytest.mark.parametrize("kind", ["int", "float32", "float64", "int8", "Fraction"])
def test_any_real_number_is_a_slope(kind):
    make = {"int": int, "Fraction": Fraction}.get(kind) or np.dtype(kind).type
    x, g = np.array([-1.5, 2.0, -0.0]), np.array([1.0, 1.0, 3.0])
    assert_same(F.leaky_relu(x, make(2)), np.array([-3.0, 2.0, -0.0]))
    assert_same(F.leaky_relu_backward(g, x, make(2)), np.array([2.0, 1.0, 6.0]))


@pytest.mark.parametrize("dtype", INTEGERS, indirect=True)
def test_integers_at_their_limits(dtype):
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    x = np.array([low, 0, 1, high // 2, high // 2 + 1 if low == 0 else -1, high], dtype)
    y = [int(v) if v > 0 else 0 for v in x.tolist()]
    assert_same(F.relu(x), np.array(y, dtype))
    g = np.array([high, high, high, low, high, low], dtype)
    dx = [a if b > 0 else 0 for a, b in zip(g.tolist(), x.tolist(), strict=True)]
    assert_same(F.relu_backward(g, x), np.array(dx, dtype))
    y, mask = F.relu(x, return_mask=True)
    assert_same(mask.unpack(), reference.active(x))
    assert_same(F.relu_backward(g, mask), np.array(dx, dtype))


@each_slope
@each_out_layout
@each_masked
def test_what_may_be_saved(name, layout, slope):
    slopes = slopes_for(name, np.zeros(1), float(slope))
    float32 = np.dtype(np.float32)
    values, g = sample((3, 4, 5), float32), sample((3, 4, 5), float32, seed=1)
    expected = reference.backward(name, g, values, **slopes)
    x, _ = place(values, layout)
    y, mask = ACTIVATIONS[name].forward(x, return_mask=True, **slopes)
    assert_same(y, reference.forward(name, values, **slopes))
    assert_same(ACTIVATIONS[name].forward(x, **slopes), y)
    told = [x, mask]
    if ACTIVATIONS[name].output_tells(*slopes.values()):
        told.append(y)
    for saved in told:
        assert_same(ACTIVATIONS[name].backward(g, saved, **slopes), expected)
        out, memory = place(g, layout)
        assert ACTIVATIONS[name].backward(out, saved, inplace=True, **slopes) is out
        assert_same(memory, place(expected, layout)[1])


@each_masked
def test_the_output_may_receive_the_gradient(name):
    float32 = np.dtype(np.float32)
    x, g = sample((LARGE,), float32), sample((LARGE,), float32, seed=1)
    slopes = slopes_for(name, x)
    y = ACTIVATIONS[name].forward(x, **slopes)
    assert ACTIVATIONS[name].backward(g, y, out=y, **slopes) is y
    assert_same(y, reference.backward(name, g, x, **slopes))


@each_shape
@each(*FLOATS, *INTEGERS, where=has_mask)
def test_mask(name, shape, dtype):
    x = sample(SHAPES[shape], dtype)
    slopes = slopes_for(name, x)
    y, mask = ACTIVATIONS[name].forward(x, return_mask=True, **slopes)
    assert_same(y, reference.forward(name, x, **slopes))
    assert isinstance(mask, F.Mask)
    assert type(mask.bits) is np.ndarray
    assert_same(mask.bits, reference.mask_bits(x, name, **slopes))
    assert mask.nbytes == mask.bits.nbytes == -(-x.size // 8)
    assert mask.shape == x.shape
    assert_same(mask.unpack(), reference.active(x, name, **slopes))


@pytest.mark.parametrize("how", ["out", "inplace"])
@each_shape
@each(*SIZES, where=has_mask)
def test_mask_beside_a_given_output(name, shape, how, dtype):
    x = sample(SHAPES[shape], dtype)
    slopes = slopes_for(name, x)
    target = x.copy()
    if how == "out":
        result = ACTIVATIONS[name].forward(x, out=target, return_mask=True, **slopes)
    else:
        result = ACTIVATIONS[name].forward(
            target, inplace=True, return_mask=True, **slopes
        )
    assert result[0] is target
    assert_same(target, reference.forward(name, x, **slopes))
    assert_same(result[1].bits, reference.mask_bits(x, name, **slopes))


@each_layout
@each_masked
def test_mask_of_another_layout(name, layout):
    float32 = np.dtype(np.float32)
    values, g = sample((5, 6, 7), float32), sample((5, 6, 7), float32, seed=1)
    slopes = slopes_for(name, values)
    for mine, other in ((layout, "c"), ("fortran", layout), (layout, layout)):
        x, grad = place(values, mine)[0], place(g, other)[0]
        y, mask = ACTIVATIONS[name].forward(x, return_mask=True, **slopes)
        assert_same(y, reference.forward(name, x, **slopes))
        assert_same(mask.unpack(), reference.active(x, name, **slopes))
        expected = reference.backward(name, grad, x, **slopes)
        assert_same(ACTIVATIONS[name].backward(grad, mask, **slopes), expected)
        if mine in OUT_LAYOUTS:
            _, mask = ACTIVATIONS[name].forward(
                x, inplace=True, return_mask=True, **slopes
            )
            assert_same(x, y)
            assert_same(mask.unpack(), reference.active(values, name, **slopes))


def test_a_mask_outlives_its_array():
    x = normal(LARGE, np.float32)
    active = x > 0
    y, mask = F.relu(x, inplace=True, return_mask=True)
    y[...] = -1
    assert_same(mask.unpack(), active)


def test_fresh_results_never_share_memory():
    x = normal(4 * LARGE, np.float32)
    y = F.relu(x)
    kept, expected = y[5:7], y[5:7].copy()
    del y
    later = [F.relu(-x) for _ in range(4)]
    assert_same(kept, expected)
    assert len({y.ctypes.data for y in later}) == 4
    assert all(np.array_equal(bits(y), bits(later[0])) for y in later)
