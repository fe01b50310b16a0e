"""Laws that hold for any array: of any type, shape, strides and values."""

import numpy as np
import pytest
import reference
from conftest import (
    ACTIVATIONS,
    INTEGERS,
    LAYOUTS,
    TYPICAL,
    dtype_of,
    floats_here,
    place,
    slopes_for,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.lib.stride_tricks import as_strided
from reference import assert_same, assert_weight_gradient

import fastrelu as F

# Compiling a kernel within an example would break any deadline.
law = settings(deadline=None, derandomize=True, database=None, max_examples=60)
each_activation = pytest.mark.parametrize("name", TYPICAL)
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)
slopes = st.floats(-8, 8) | st.sampled_from([0.0, -0.0, 1.0, 0.01, 1e-30])
dtypes = st.sampled_from(floats_here()).map(dtype_of)
numbers = dtypes | st.sampled_from(INTEGERS).map(dtype_of)


def any_bits(dtype, shape):
    """Arrays of every value that the type has"""
    unsigned = hnp.arrays(f"u{dtype.itemsize}", shape)
    return unsigned.map(lambda a: a.view(dtype))


@st.composite
def windows(draw, dtypes=dtypes):
    """Arrays as slicing and transposing leave them"""
    shape = draw(shapes)
    array = draw(any_bits(draw(dtypes), shape))
    window = np.asarray(array[draw(hnp.basic_indices(shape, allow_newaxis=True))])
    return window.transpose(draw(st.permutations(range(window.ndim))))


@st.composite
def pairs(draw, dtypes=dtypes):
    """An array, and a gradient of its shape and type"""
    x = draw(windows(dtypes))
    return x, draw(any_bits(x.dtype, x.shape))


def powers(dtype, shape):
    """Numbers that may be scaled a little without leaving the normal ones, and 0"""
    values = st.floats(2.0**-5, 2.0**5, width=16)
    return hnp.arrays(
        dtype, shape, elements=values | values.map(lambda v: -v) | st.just(0)
    )


def arguments(name, x, slope):
    if ACTIVATIONS[name].parameter == "weight":
        with np.errstate(all="ignore"):
            return {"weight": np.array([slope]).astype(x.dtype)}
    return slopes_for(name, x, slope)


@each_activation
@law
@given(windows(), slopes)
def test_forward_is_what_it_is_defined_as(name, x, slope):
    more = arguments(name, x, slope)
    y = ACTIVATIONS[name].forward(x, **more)
    assert_same(y, reference.forward(name, x, **more))


@each_activation
@law
@given(pairs(), slopes)
def test_backward_is_what_it_is_defined_as(name, pair, slope):
    x, g = pair
    more = arguments(name, x, slope)
    dx = ACTIVATIONS[name].backward(g, x, **more)
    dx = dx[0] if ACTIVATIONS[name].parameter == "weight" else dx
    assert_same(dx, reference.backward(name, g, x, **more))


@law
@given(pairs(numbers))
def test_relu_of_every_type(pair):
    x, g = pair
    assert_same(F.relu(x), reference.forward("relu", x))
    assert_same(F.relu_backward(g, x), reference.backward("relu", g, x))


@law
@given(windows(numbers), st.sampled_from([n for n in LAYOUTS if n != "broadcast"]))
def test_the_layout_does_not_matter(x, layout):
    if layout == "swapped" and x.dtype.kind not in "iuf":
        layout = "c"
    placed, _ = place(x, layout)
    assert_same(F.relu(placed), F.relu(np.ascontiguousarray(x).reshape(x.shape)))


@law
@given(pairs(numbers))
def test_masks(pair):
    x, g = pair
    y, mask = F.relu(x, return_mask=True)
    assert_same(mask.unpack(), reference.active(x))
    if x.flags.c_contiguous:
        assert_same(mask.bits, reference.mask_bits(x))
    expected = F.relu_backward(g, x)
    assert_same(F.relu_backward(g, y), expected)
    assert_same(F.relu_backward(g, mask), expected)


@law
@given(pairs(), slopes)
def test_what_was_saved_does_not_matter(pair, slope):
    x, g = pair
    y, mask = F.leaky_relu(x, slope, return_mask=True)
    expected = F.leaky_relu_backward(g, x, slope)
    assert_same(F.leaky_relu_backward(g, mask, slope), expected)
    if slope >= 0:
        assert_same(F.leaky_relu_backward(g, y, slope), expected)


@law
@given(windows(numbers))
def test_relu_twice_is_relu_once(x):
    y = F.relu(x)
    assert_same(F.relu(y), y)


@law
@given(shapes.flatmap(lambda s: powers("f4", s)), slopes, st.integers(-9, 9))
def test_powers_of_two_go_through(x, slope, power):
    scale = np.float32(2) ** power
    assert_same(F.relu(x * scale), F.relu(x) * scale)
    slope = 0.0 if abs(slope) < 2.0**-60 else slope
    assert_same(F.leaky_relu(x * scale, slope), F.leaky_relu(x, slope) * scale)


@law
@given(windows())
def test_slope_0_is_relu_but_for_signed_zeros_and_infinities(x):
    finite = np.isfinite(x)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(F.leaky_relu(x, 0)[finite], F.relu(x)[finite])


@law
@given(pairs(), st.floats(-8, 8, width=16))
def test_equal_weights_are_a_slope(pair, slope):
    x, g = map(np.atleast_1d, pair)
    weight = np.full(x.shape[-1:], slope).astype(x.dtype)
    slope = float(x.dtype.type(slope))
    assert_same(F.prelu(x, weight, axis=-1), F.leaky_relu(x, slope))
    dx, _ = F.prelu_backward(g, x, weight, axis=-1)
    assert_same(dx, F.leaky_relu_backward(g, x, slope))


@st.composite
def weighted(draw):
    dtype, shape = (
        draw(dtypes),
        draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=9)),
    )
    own = (
        draw(st.sampled_from([dtype, np.dtype("f4")])) if dtype.itemsize == 2 else dtype
    )
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    kinds = [(), (1,), (shape[axis],)]
    if len(shape) > 1:
        kinds.append(tuple(n if draw(st.booleans()) else 1 for n in shape))
    values = [powers("f8", s) for s in (shape, shape, draw(st.sampled_from(kinds)))]
    g, x, weight = map(draw, values)
    return g.astype(dtype), x.astype(dtype), weight.astype(own), axis


@law
@given(weighted(), st.sampled_from([n for n in LAYOUTS if n != "swapped"]))
def test_weight_gradient(case, layout):
    g, x, weight, axis = case
    x, g = place(x, layout)[0], place(g, layout)[0]
    dx, dw = F.prelu_backward(g, x, weight, axis=axis)
    assert_same(dx, reference.backward("prelu", g, x, weight=weight, axis=axis))
    assert_weight_gradient(dw, g, x, weight, axis)


@st.composite
def two_windows(draw):
    """A shape, and for each of two windows on some memory its strides and its start"""
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4))
    step = draw(st.sampled_from([1, 4, 8]))
    steps = st.integers(-9, 9).map(lambda n: n * step)
    return shape, [(draw(st.tuples(*[steps] * len(shape))), draw(steps)) for _ in "xy"]


@each_activation
@settings(law, max_examples=300)
@given(two_windows(), st.sampled_from(["f4", "f8"]).map(np.dtype))
def test_out_may_lie_anywhere_but_on_itself(name, windows, dtype):
    shape, placed = windows
    memory = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)
    before = memory.copy()

    def window(memory, strides, start):
        element = memory[2048 + start :][: dtype.itemsize].view(dtype)
        return as_strided(element, shape, strides)

    x, out = (window(memory, *where) for where in placed)
    more = arguments(name, x, 0.3)
    expected = reference.forward(name, x.copy(), **more)
    places = np.sort(placed[1][0] @ np.indices(shape).reshape(len(shape), x.size))
    if np.diff(places).min(initial=dtype.itemsize) < dtype.itemsize:
        with pytest.raises(ValueError, match="out"):
            ACTIVATIONS[name].forward(x, out=out, **more)
    else:
        ACTIVATIONS[name].forward(x, out=out, **more)
        assert_same(out, expected)
        out[...] = window(before, *placed[1])
    assert_same(memory, before)
