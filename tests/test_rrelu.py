"""Randomised leaky ReLU in training: a slope of its own for each element."""

import ml_dtypes
import numpy as np
import pytest
import reference
from conftest import FLOATS, LARGE, LAYOUTS, OUT_LAYOUTS, normal, place, sample
from reference import assert_same

import fastrelu as F

each_float = pytest.mark.parametrize("dtype", FLOATS, indirect=True)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 4, 5), (LARGE,)])
@each_float
def test_each_element_has_its_slope(dtype, shape):
    x, g = sample(shape, dtype), sample(shape, dtype, seed=1)
    y, slopes = F.rrelu(x, 0.25, 0.5, training=True, rng=1)
    assert (slopes.dtype, slopes.shape) == (x.dtype, x.shape)
    assert ((slopes >= 0.25) & (slopes <= 0.5)).all()
    assert len(np.unique(slopes)) >= min(slopes.size, 100) * 3 // 5
    assert_same(y, reference.forward("rrelu", x, slopes=slopes))
    expected = reference.backward("rrelu", g, x, slopes=slopes)
    assert_same(F.rrelu_backward(g, x, slopes), expected)
    given = g.copy()
    assert F.rrelu_backward(given, x, slopes, inplace=True) is given
    assert_same(given, expected)
    assert F.rrelu_backward(g, x, slopes, out=slopes) is slopes
    assert_same(slopes, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slopes_hang_on_the_seed_and_not_on_the_layout(layout):
    values = normal((4, 5, 6), np.dtype(np.float32))
    x, _ = place(values, layout)
    _, expected = F.rrelu(values, training=True, rng=7)
    y, slopes = F.rrelu(x, training=True, rng=np.random.default_rng(7))
    assert_same(np.ascontiguousarray(slopes), expected)
    assert_same(y, reference.forward("rrelu", x, slopes=expected))
    _, others = F.rrelu(x, training=True)
    assert (others != expected).any()


@pytest.mark.parametrize("layout", OUT_LAYOUTS)
def test_where_it_is_written(layout):
    values = normal((4, 5, 6), np.dtype(np.float32))
    x, memory = place(values, layout)
    y, slopes = F.rrelu(x, 0.1, 0.9, True, True, rng=3)
    assert y is x
    expected = reference.forward("rrelu", values, slopes=slopes)
    assert_same(memory, place(expected, layout)[1])
    out, memory = place(values, layout)
    y, slopes = F.rrelu(values, 0.1, 0.9, training=True, out=out, rng=3)
    assert y is out
    assert_same(memory, place(expected, layout)[1])


@each_float
def test_the_mean_without_training(dtype):
    x = sample((3, 70), dtype)
    expected = reference.forward("leaky_relu", x, negative_slope=0.375)
    assert_same(F.rrelu(x, 0.25, 0.5), expected)
    assert_same(F.rrelu(x, 1 / 4, 0.5, np.False_), expected)
    g = sample((3, 70), dtype, seed=1)
    expected = reference.backward("leaky_relu", g, x, negative_slope=0.375)
    for slope in (0.375, np.float32(0.375), np.array(0.375)):
        assert_same(F.rrelu_backward(g, x, slope), expected)


def test_lists_are_welcome():
    y, slopes = F.rrelu([-1.0, 2.0], training=True, rng=0)
    assert y[0] == -slopes[0]
    assert F.rrelu_backward([1.0, 1.0], [-1.0, 2.0], [0.5, 0.25]).tolist() == [0.5, 1.0]


def drawn(dtype, lower, upper):
    """What 99 slopes are of a generator seeded with 0, in the type of products"""
    product = np.float64 if dtype == np.float64 else np.float32
    values = np.random.default_rng(0).random(99, product)
    with np.errstate(all="ignore"):
        return (values * product(upper - lower) + product(lower)).astype(dtype)


@pytest.mark.parametrize(
    "bounds", [(0.25, 0.5), (0, 1e-8), (1e-45, 1e-40), (1e-60, 1e-50), (0, 65504)]
)
@each_float
def test_what_a_cast_loses_is_no_error(dtype, bounds):
    with np.errstate(all="raise"):
        _, slopes = F.rrelu(np.ones(99, dtype), *bounds, training=True, rng=0)
    assert_same(slopes, drawn(dtype, *bounds))


@pytest.mark.parametrize(("dtype", "high"), [("float32", 3e38), ("float64", 1e308)])
def test_bounds_whose_difference_is_no_number(dtype, high):
    x = np.full(99, -1, dtype)
    with np.errstate(all="raise"):
        y, slopes = F.rrelu(x, -high, high, training=True, rng=0)
        assert not F.rrelu(x, -high, high).any()
    assert_same(y, -slopes)
    assert (np.abs(slopes - drawn(x.dtype, -1, 1) * high) <= high * 1e-6).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_bounds_must_be_finite_in_the_type_of_products(dtype, training):
    for lower, upper, name in (0, 1e39, "upper"), (-1e39, 0, "lower"):
        said = rf"{name} must be finite in float32, got -?1e\+39"
        with pytest.raises(ValueError, match=said):
            F.rrelu(np.ones(3, dtype), lower, upper, training)
        assert np.isfinite(F.rrelu([-1.0, 2.0], lower, upper, training)).all()


@pytest.mark.parametrize(
    ("dtype", "most"), [("float16", 65504.0), ("bfloat16", 3.3895313892515355e38)]
)
def test_bounds_must_fit_the_slopes_that_are_drawn(dtype, most):
    dtype = getattr(ml_dtypes, dtype, dtype)
    x = np.array([-1, 0], dtype)
    y, slopes = F.rrelu(x, -most, most, training=True, rng=0)
    assert np.isfinite(slopes.astype(np.float64)).all()
    assert y[1] == 0
    beyond = np.nextafter(np.float32(most), np.float32(np.inf)).item()
    for lower, upper, name in (0, beyond, "upper"), (-beyond, 0, "lower"):
        said = rf"{name} must fit {np.dtype(dtype)}"
        with pytest.raises(ValueError, match=said):
            F.rrelu(x, lower, upper, training=True)
        assert F.rrelu(x, lower, upper)[1] == 0  # of which none is kept


WRONG = {
    "lower above upper": (ValueError, "lower", {"lower": 0.5, "upper": 0.25}),
    "infinite": (ValueError, "upper", {"upper": np.inf}),
    "a string": (TypeError, "lower", {"lower": "0.1"}),
    "no flag": (TypeError, "training", {"training": 1}),
    "no generator": (TypeError, "rng", {"rng": "seed", "training": True}),
    "no generator, no training": (TypeError, "rng", {"rng": "seed"}),
    "negative seed": (ValueError, "rng", {"rng": -1, "training": True}),
    "integers": (TypeError, "x", {"x": np.arange(3), "training": True}),
    "another shape": (ValueError, "out", {"out": np.empty(4), "training": True}),
}


@pytest.mark.parametrize("which", WRONG)
def test_what_is_refused(which):
    error, argument, given = WRONG[which]
    more = {name: value for name, value in given.items() if name != "x"}
    with pytest.raises(error, match=rf"\b{argument}\b"):
        F.rrelu(given.get("x", np.ones(3)), **more)


@pytest.mark.parametrize("slopes", [np.ones(4), np.ones(3, np.float32), ["a"], None])
def test_slopes_that_do_not_fit(slopes):
    x = np.ones(3)
    with pytest.raises((TypeError, ValueError), match="slopes"):
        F.rrelu_backward(x, x, slopes)
