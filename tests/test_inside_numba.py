"""The public functions in functions that users have Numba compile, and as Python."""

import os
import platform
import re
import sys
import textwrap
from types import SimpleNamespace

import numba
import numpy as np
import pytest
import reference
import twins
from conftest import (
    LAYOUTS,
    OUT_LAYOUTS,
    in_turn,
    normal,
    place,
    run_command,
    sample,
    slopes_for,
    taken,
)
from numba import types
from numba.core.errors import TypingError
from reference import assert_same, assert_weight_gradient

import fastrelu as F
from fastrelu import _functions, _overloads
from fastrelu.activations import ACTIVATIONS as ROWS
from fastrelu.cpu import build, sums, threads, vector

njit = numba.njit
TYPES = "float32", "float64"
KNOWN = [name for name in LAYOUTS if name != "swapped"]  # to Numba
SHAPES = (), (1,), (17,), (3, 0, 2), (2, 3, 4)


def bits_of(name, x, **more):
    return reference.mask_bits(x, name, **more)


def first(result):
    return result[0] if isinstance(result, tuple) else result


# As Python: what a function of a user's would be compiled to, line by line -------------


def type_of(value):
    if isinstance(value, (bool, np.bool_)):
        return types.literal(value)
    return types.none if value is None else numba.typeof(value)


@pytest.fixture
def plainly(monkeypatch):
    """With the loops in plain Numba alone"""
    monkeypatch.setattr(_overloads.cpu, "is_fast", lambda: False)


@pytest.fixture
def in_strips(monkeypatch):
    """With the fast loops as Python, for which nothing fits the cache"""
    twins.interpret(monkeypatch)
    monkeypatch.setattr(threads, "CACHE", 0)
    monkeypatch.setattr(build, "inside", build.inside.__wrapped__)
    monkeypatch.setattr(_overloads, "_strips", _overloads._strips.__wrapped__)
    format_of = vector.format_of
    twin = lambda dtype: twins.twin_of(format_of(dtype))
    monkeypatch.setattr(vector, "format_of", twin)


@pytest.fixture
def inside(monkeypatch):
    """From a public function to what Numba would compile for a call of it"""
    typed = {}
    monkeypatch.setattr(
        _overloads,
        "_kept",
        lambda template, names: _functions.rebuild(template, "t", dict(names)),
    )
    monkeypatch.setattr(_overloads, "_of", _overloads._of.__wrapped__)
    monkeypatch.setattr(
        _overloads,
        "overload",
        lambda public, **_: lambda function: typed.update({public: function}),
    )
    for row in ROWS.values():
        _overloads._register_row(row)

    def inside(public):
        def call(*args, **given):
            kinds = [type_of(a) for a in args]
            named = {key: type_of(value) for key, value in given.items()}
            with np.errstate(all="ignore"):
                return typed[public](*kinds, **named)(*args, **given)

        return call

    return inside


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ROWS)
@in_turn("layout", KNOWN)
@in_turn("shape", SHAPES)
def test_as_python_it_computes_the_same(name, dtype, layout, shape, plainly, inside):
    row, x = ROWS[name], sample(shape, np.dtype(dtype))
    x = place(x, layout)[0]
    g = place(sample(x.shape, x.dtype, 1), "c")[0]
    slopes = slopes_for(name, x)
    forward, backward = taken(row.forward, slopes), taken(row.backward, slopes)
    expected = row.forward(x, **forward)
    assert_same(inside(row.forward)(x, **forward), expected)
    dx = row.backward(g, x, **backward)
    got = inside(row.backward)(g, x, **backward)
    if row.parameter == "weight":
        got, dw = got
        dx, weight_gradient = dx
        assert np.allclose(dw, weight_gradient, equal_nan=True)
    assert_same(got, dx)
    if row.takes_mask:
        y, bits = inside(row.forward)(x, return_mask=True, **forward)
        assert_same(y, expected)
        numbers = {n: slopes[n] for n in row.spec.numbers_kept}
        assert (bits == bits_of(name, x, **numbers)).all()
        assert_same(inside(row.backward)(g, bits, **backward), dx)


@pytest.mark.parametrize("name", ROWS)
@in_turn("layout", OUT_LAYOUTS)
@in_turn("way", ["out", "inplace", "shifted"])
def test_as_python_it_writes_where_it_is_told(name, layout, way, plainly, inside):
    written_where_told(name, layout, way, (4, 3), inside)


@pytest.mark.parametrize("name", ROWS)
@in_turn("shape", [(4, 3), (33, 7), (3, 100)])
@in_turn("layout", ["c", "fortran"])
@in_turn("way", ["out", "inplace", "shifted"])
def test_in_strips_it_writes_where_it_is_told(
    name, layout, way, shape, in_strips, inside
):
    written_where_told(name, layout, way, shape, inside)


def written_where_told(name, layout, way, shape, inside):
    row, dtype = ROWS[name], np.dtype("float32")
    x, g = sample(shape, dtype), sample(shape, dtype, 1)
    slopes = slopes_for(name, x)
    forward, backward = taken(row.forward, slopes), taken(row.backward, slopes)
    calls = [(row.forward, (x,), forward), (row.backward, (g, x), backward)]
    if row.takes_mask:
        bits = bits_of(name, x, **{n: slopes[n] for n in row.spec.numbers_kept})
        calls.append((row.backward, (g, bits), backward))
        calls.append((row.forward, (x,), forward | {"return_mask": True}))
    for function, arrays, more in calls:
        given = list(arrays)
        expected = first(inside(function)(*given, **more))
        memory = place(np.zeros(shape, dtype), layout)[0]
        if way == "shifted":  # what is written next is still to be read
            which = -1 if arrays[-1].ndim > 1 else 0
            rows, length = shape
            wide = place(np.zeros((rows, length + 1), dtype), layout)[0]
            memory, given[which] = wide[:, 1:], wide[:, :-1]
            given[which][...] = arrays[which]
        if way == "inplace":
            memory[...] = arrays[0]
            given[0] = memory
            result = first(inside(function)(*given, inplace=True, **more))
        else:
            result = first(inside(function)(*given, out=memory, **more))
        assert result is memory
        assert_same(np.array(memory), np.array(expected))


def test_as_python_what_lies_flat_and_overlaps(plainly, inside):
    flat_and_overlapping(inside)


def test_in_strips_what_lies_flat_and_overlaps(in_strips, inside):
    flat_and_overlapping(inside)


def test_in_strips_without_memory(in_strips, inside, monkeypatch):
    monkeypatch.setattr(sums, "_malloc", lambda size: 0)
    for shape in (4, 3), (2, 3, 100):
        x = normal(shape, np.float32)
        with pytest.raises(MemoryError):
            inside(F.prelu_backward)(x, x, normal(3, np.float32))


def test_in_strips_rows_of_one_weight(in_strips, inside):
    x, g = normal((2, 3, 100), np.float32), normal((2, 3, 100), np.float32, 1)
    weight = normal(3, np.float32, 2)
    assert_same(inside(F.prelu)(x, weight), F.prelu(x, weight))
    dx, dw = inside(F.prelu_backward)(g, x, weight)
    expected = F.prelu_backward(g, x, weight)
    assert_same(dx, expected[0])
    assert_same(dw, expected[1])


def flat_and_overlapping(inside):
    memory, g = sample((9, 3), np.dtype(np.float32)), normal((8, 3), np.float32)
    x = memory[1:].copy()
    bits = inside(F.relu)(memory[1:], out=memory[:-1], return_mask=True)[1]
    assert (bits == bits_of("relu", x)).all()
    assert_same(memory[:-1], F.relu(x))
    memory[1:] = x
    weight = normal(3, np.float32, 1)
    got = inside(F.prelu_backward)(g, memory[1:], weight, out=memory[:-1])
    assert got[0].base is memory
    assert_same(memory[:-1], F.prelu_backward(g, x, weight)[0])
    memory[1:] = x
    assert_same(
        inside(F.prelu)(memory[1:], weight, out=memory[:-1]), F.prelu(x, weight)
    )
    for cut in np.s_[:0, ::2], np.s_[:1, ::2]:  # nothing, and an axis that says nothing
        y = memory[cut]
        assert inside(F.relu)(np.array(y), out=y) is y


WEIGHTS = {  # the shapes of weights for x of shape (4, 3, 5), and an axis
    "shared": ((), 1),
    "one": ((1,), 1),
    "channels": ((3,), 1),
    "last": ((5,), -1),
    "first": ((4,), 0),
    "rows": ((3, 1), 1),
    "spread": ((4, 1, 5), 1),
    "each": ((4, 3, 5), 1),
}


@pytest.mark.parametrize("layout", ["c", "fortran", "step"])
@in_turn("kind", WEIGHTS)
def test_as_python_weights_of_all_shapes(kind, layout, plainly, inside):
    shape, axis = WEIGHTS[kind]
    x, g = (place(normal((4, 3, 5), np.float32, seed), layout)[0] for seed in (0, 1))
    weight = np.array(normal(shape, np.float32, 2))
    got = inside(F.prelu)(x, weight, axis=axis)
    assert_same(got, F.prelu(x, weight, axis=axis))
    dx, dw = inside(F.prelu_backward)(g, x, weight, axis=axis)
    assert_same(dx, F.prelu_backward(g, x, weight, axis=axis)[0])
    assert_weight_gradient(dw, g, x, weight, axis)
    into = np.empty_like(x), np.empty_like(weight.T).T
    got = inside(F.prelu_backward)(g, x, weight, axis=axis, out=into)
    assert got[0] is into[0]
    assert got[1] is into[1]
    assert_same(np.array(into[0]), np.array(dx))
    assert_same(np.array(into[1]), np.array(dw))


def test_as_python_a_number_for_a_weight(plainly, inside):
    x, g = normal((4, 3), np.float32), normal((4, 3), np.float32, 1)
    assert_same(inside(F.prelu)(x, 0.3), F.prelu(x, 0.3))
    dx, dw = inside(F.prelu_backward)(g, x, 0.3)
    expected = F.prelu_backward(g, x, 0.3)
    assert_same(dx, expected[0])
    assert (type(dw), np.isclose(dw, expected[1])) == (np.float32, True)
    zero = inside(F.prelu)(x[0, 0], np.float32(0.3))
    assert zero == F.prelu(x[0, 0], np.float32(0.3))


SAVED = {
    "bool": lambda x: x > 0,
    "float64": lambda x: x.astype(np.float64),
    "int8": lambda x: np.sign(x).astype(np.int8),
    "uint8": lambda x: (x > 0).astype(np.uint8),  # of two dimensions: no bits
}


@pytest.mark.parametrize("kind", SAVED)
@in_turn("name", ["relu", "leaky_relu"])
def test_as_python_what_may_be_saved(kind, name, plainly, inside):
    row, x, g = ROWS[name], *(normal((3, 4), np.float32, seed) for seed in (0, 1))
    saved = SAVED[kind](x)
    assert_same(inside(row.backward)(g, saved), row.backward(g, saved))
    assert_same(inside(row.backward)(1.0, x), row.backward(1.0, x))
    assert_same(inside(row.backward)(g[0, 0], x), row.backward(g[0, 0], x))
    y = np.empty_like(x)
    assert inside(row.backward)(2.0, x, out=y) is y
    assert_same(y, row.backward(2.0, x))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "uint64"])
def test_as_python_integers(dtype, plainly, inside):
    x, g = sample((9,), np.dtype(dtype)), sample((9,), np.dtype(dtype), 1)
    assert_same(inside(F.relu)(x), F.relu(x))
    assert_same(inside(F.relu_backward)(g, x), F.relu_backward(g, x))  # uint8: no bits
    assert inside(F.relu)(x[0]) == F.relu(x[0])
    assert inside(F.relu_backward)(1, x).tolist() == F.relu_backward(1, x).tolist()


def test_as_python_slopes_of_each_element(plainly, inside):
    x, g, slopes = (normal((3, 4), np.float32, seed) for seed in range(3))
    expected = F.rrelu_backward(g, x, slopes)
    assert_same(inside(F.rrelu_backward)(g, x, slopes), expected)
    y = slopes[::-1]
    assert inside(F.rrelu_backward)(g, x, slopes, out=y) is y  # slopes are still read
    assert_same(np.array(y), expected)


WITHOUT_DIMENSIONS = {  # numbers of the forward and of the backward pass
    "leaky_relu": [(0.25,), (0.25,)],
    "threshold": [(0.5, -1.0), (0.5,)],
    "rrelu": [(0.25, 0.5), (0.375,)],
}


@pytest.mark.parametrize("name", WITHOUT_DIMENSIONS)
def test_as_python_arrays_without_dimensions_for_numbers(name, plainly, inside):
    row, (forward, backward) = ROWS[name], WITHOUT_DIMENSIONS[name]
    x, g = (normal((3, 4), np.float32, seed) for seed in range(2))
    got = inside(row.forward)(x, *map(np.array, forward))
    assert_same(got, row.forward(x, *forward))
    for grad in g, 1.0:
        got = inside(row.backward)(grad, x, *map(np.array, backward))
        assert_same(got, row.backward(grad, x, *backward))


def test_as_python_a_number_in_the_output_is_read_before_it_is_written(plainly, inside):
    x, y = (np.array(values, np.float32) for values in ([0.4, 0.3, 0.7], [0.5, 0, 0]))
    inside(F.threshold_backward)(1.0, x, y[0, ...], out=y)
    assert y.tolist() == [0, 0, 1]


def numbers_of(name, x):
    return ROWS[name], slopes_for(name, x)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ROWS)
def test_as_python_numbers(name, dtype, inside):
    row, more = numbers_of(name, np.zeros((), dtype))
    if "weight" in more:
        more["weight"] = 0.2
    for x in sample((40,), np.dtype(dtype)):
        g = x.dtype.type(1.5)
        got = inside(row.forward)(x, **taken(row.forward, more))
        expected = row.forward(x, **taken(row.forward, more))
        assert_same(np.asarray(got), np.asarray(expected))
        got = inside(row.backward)(g, x, **taken(row.backward, more))
        expected = row.backward(g, x, **taken(row.backward, more))
        for a, b in zip(np.atleast_1d(got), np.atleast_1d(expected), strict=True):
            assert_same(np.asarray(a), np.asarray(b))


# Errors -------------------------------------------------------------------------------

X = np.ones((2, 3), np.float32)
TYPING = [  # what is wrong from the types alone
    (lambda x: F.relu(x > 0), "x must have dtype float16, .* got bool"),
    (lambda x: F.relu(x * 1j), "x must have dtype float16, .* got complex128"),
    (lambda x: F.relu6(x.size), "x must have dtype float16, .* got int64"),
    (lambda x: F.relu([1.0]), "x must be an array or a number, got .*list"),
    (lambda x: F.relu(x=x), "positional only"),
    (lambda x: F.relu(x, False, x), "too many positional arguments"),
    (lambda x: F.relu(x, x.size > 2), "inplace must be written out as True or False"),
    (lambda x: F.relu(x, 1), "inplace must be True or False, got int"),
    (lambda x: F.relu(x, True, out=x), "inplace=True and out= were both given"),
    (lambda x: F.relu(x, out=x[0]), "out must be an array of 2 dimensions and float32"),
    (lambda x: F.relu(x, out=(x,)), "out must be an array of 2 dimensions and float32"),
    (lambda x: F.relu(x.size, True), "x must be an array with inplace"),
    (lambda x: F.relu(x.size, return_mask=True), "x must be an array with inplace"),
    (lambda x: F.leaky_relu(x, 1j), "negative_slope must be a real number, got compl"),
    (lambda x: F.leaky_relu(x, x[0]), "negative_slope must be a real number, got arr"),
    (lambda x: F.rrelu(x, np.array(False)), "lower must be a real number, got bool"),
    (lambda x: F.relu_backward(x, x[0]), "saved must have the shape of grad_output"),
    (lambda x: F.relu_backward(x, 1.0), "saved must be an array as grad_output is"),
    (lambda x: F.relu_backward(x, 1j * x), "saved must have dtype float16, .* complex"),
    (
        lambda x: F.squared_relu_backward(x, x + 1.0),
        "x must have the dtype of grad_out",
    ),
    (lambda x: F.prelu(x, x[0] + 1.0), "weight must have the dtype of x, float32, got"),
    (lambda x: F.prelu(x[0, 0], x[0]), "weight must be a number as x is"),
    (lambda x: F.prelu(x, x[0], axis=1.0), "axis must be an integer, got float64"),
    (lambda x: F.prelu(x[0], x), "weight must broadcast against x without growing it"),
    (lambda x: F.prelu_backward(x, x[0], x[0]), "x must have the shape of grad_output"),
    (lambda x: F.prelu_backward(x, x, x[0], out=(x, x, x)), "out must be one array or"),
    (lambda x: F.prelu_backward(x, x, 0.5, out=(x, x)), r"out\[1\] must be None where"),
    (lambda x: F.rrelu(x, training=True), "training must be False within Numba"),
    (lambda x: F.rrelu(x, 1j), "lower must be a real number, got complex128"),
    (lambda x: F.relu(x.T, out=np.broadcast_to(x.T, (3, 2))), "out must be writeable"),
]


@in_turn("case", TYPING)
def test_what_types_tell_is_a_typing_error(case):
    function, message = case
    with pytest.raises(TypingError, match=f"TypingError: .*{message}"):
        njit(function)(X + np.float32(0))


def test_half_floats_are_refused_on_the_cpu():
    for x in np.ones(3, np.float16), np.float16(1):
        with pytest.raises(TypingError, match="Numba has none on the CPU"):
            njit(lambda x: F.relu(x))(x)


SHARED = np.lib.stride_tricks.as_strided(np.ones(9, np.float32), (3, 3), (4, 4))
RAISED = [
    (lambda x, y: F.relu(x, out=y), (X, X[:1]), "out must have the shape of x"),
    (lambda x, y: F.relu(x, inplace=y), (SHARED, True), "x must not share memory"),
    (lambda x, y: F.relu_backward(x, y), (X, X[:1]), "saved must have the shape of gr"),
    (lambda x, y: F.relu_backward(x, y), (X, np.zeros(2, "u1")), "saved must be bits"),
    (
        lambda x, y: F.leaky_relu(x, y),
        (X, np.inf),
        "negative_slope must be finite in f",
    ),
    (lambda x, y: F.leaky_relu(x, y), (X, 1e39), "negative_slope must be finite in fl"),
    (lambda x, y: F.threshold(x, y, 1.0), (X, np.nan), "threshold and value must be"),
    (lambda x, y: F.prelu(x, y), (X, X[0, :2]), "weight must have one element, or as"),
    (lambda x, y: F.prelu(x, y, axis=2), (X, X[0]), "weight must have one element, or"),
    (lambda x, y: F.prelu(x, y), (X[0], X[0]), "weight must have one element, or as m"),
    (lambda x, y: F.prelu(x, y), (X[0, :1].reshape(()), X[0]), "weight must have one"),
    (lambda x, y: F.prelu(x, y), (X, X[:, :2]), "weight must broadcast against x"),
    (lambda x, y: F.prelu_backward(x, y, 0.5), (X, X[:1]), "x must have the shape of"),
    (
        lambda x, y: F.prelu_backward(x, x, y, out=(x, y)),
        (X, X[0]),
        "must not share mem",
    ),
    (lambda x, y: F.rrelu_backward(x, x, y), (X, X[:1]), "x must have the shape of gr"),
    (lambda x, y: F.rrelu(x, y, 1.0), (X, 2.0), "lower must not be above upper"),
    (lambda x, y: F.rrelu(x, y, 1.0), (X, -np.inf), "lower and upper must be finite"),
    (lambda x, y: F.rrelu(x, y, 1.0), (X, -1e39), "lower and upper must be finite in"),
    (lambda x, y: F.prelu(x, y), (X, 1e39), "weight must fit float32"),
    (lambda x, y: F.prelu_backward(x, x, y), (X, -1e39), "weight must fit float32"),
    (lambda x, y: F.relu_backward(y, x), (X, 1e39), "grad_output must fit float32"),
    (
        lambda x, y: F.relu_backward(y, x),
        (X.astype("u1"), np.int64(300)),
        "grad_output must fit uint8",
    ),
]


@in_turn("case", RAISED)
def test_as_python_wrong_values_are_errors(case, inside):
    function, arguments, message = case
    functions = {name: inside(getattr(F, name)) for name in F.activations.__all__}
    module = SimpleNamespace(**functions)
    function = _functions.rebuild(function, "function", {"F": module})
    before = X.copy()
    with pytest.raises(ValueError, match=message):
        function(*arguments)
    assert (before == X).all()


def test_compiled_numbers_that_do_not_fit():
    spread = njit(lambda g, x: F.relu_backward(g, x))
    for g, dtype in (300, "uint8"), (-1, "uint64"), (1e39, "float32"):
        with pytest.raises(ValueError, match=f"grad_output must fit {dtype}"):
            spread(g, np.ones((2, 2), dtype))


def test_interleaved_axes_share_nothing(inside):
    memory = np.arange(64, dtype=np.float32)
    x = np.lib.stride_tricks.as_strided(memory, (3, 2), (8, 12))  # 0 12, 8 20, 16 28
    assert inside(F.leaky_relu)(x, 2.0, True) is x


# Compiled, as users write it ----------------------------------------------------------


@njit
def train(x, weight, bias, slope, target):
    """A dense layer with PReLU and ReLU, forward and backward, in one function"""
    z = np.empty((x.shape[0], weight.shape[1]), x.dtype)
    for i in range(z.shape[0]):
        for j in range(z.shape[1]):
            z[i, j] = bias[j]
            for k in range(x.shape[1]):
                z[i, j] += x[i, k] * weight[k, j]
    a = F.prelu(z, slope)
    y, bits = F.relu(a, return_mask=True)
    grad = F.relu_backward(y - target, bits)
    grad, slope_grad = F.prelu_backward(grad, z, slope)
    return z, y, grad, slope_grad


def test_a_dense_layer():
    x, weight, target = (normal((7, 7), np.float32, seed) for seed in range(3))
    bias, slope = normal(7, np.float32, 3), normal(7, np.float32, 4)
    z, y, grad, slope_grad = train(x, weight, bias, slope, target)
    a = F.prelu(z, slope)
    expected, mask = F.relu(a, return_mask=True)
    assert_same(y, expected)
    dy = F.relu_backward(y - target, mask)
    assert_same(grad, F.prelu_backward(dy, z, slope)[0])
    assert_weight_gradient(slope_grad, dy, z, slope)


@njit
def fused(x, b, y):
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            y[i, j] = F.relu(x[i, j] + b[j])


def test_fused_by_the_user_and_vectorised():
    x, b = sample((5, 33), np.dtype(np.float32)), normal(33, np.float32)
    y = np.empty_like(x)
    fused(x, b, y)
    with np.errstate(invalid="ignore"):
        assert_same(y, F.relu(x + b))
    if platform.machine() in ("x86_64", "AMD64"):
        (code,) = fused.inspect_asm().values()
        assert re.search(r"\bv?addps\b", code)
        assert re.search(r"\bv?cmp\w*ps\b|\bv?maxps\b", code)


@njit(parallel=True, nogil=True)
def by_rows(x, slopes, y):
    for i in numba.prange(x.shape[0]):
        F.leaky_relu(x[i], slopes[i], out=y[i])
        y[i, 0] = F.relu6(y[i, 0])


def test_rows_in_parallel():
    x, slopes = sample((64, 50), np.dtype(np.float64)), normal(64, np.float64)
    y = np.empty_like(x)
    by_rows(x, slopes, y)
    expected = np.stack([F.leaky_relu(*each) for each in zip(x, slopes, strict=True)])
    expected[:, 0] = F.relu6(expected[:, 0])
    assert_same(y, expected)


def test_universal_functions():
    slope = np.float32(0.25)
    one = numba.vectorize(["float32(float32)"])(lambda x: F.leaky_relu(x, slope))
    x = sample((3, 40), np.dtype(np.float32))
    with np.errstate(all="ignore"):
        assert_same(one(x), F.leaky_relu(x, slope))
        assert_same(lines(x), F.squared_relu(x))


@numba.guvectorize(["(float32[:], float32[:])"], "(n)->(n)")
def lines(x, y):
    F.squared_relu(x, out=y)


def test_fastmath_of_the_caller_is_not_ours():
    x = np.array([np.nan, -0.0, -np.inf, np.inf])
    each = njit(fastmath=True)(lambda x: (F.relu(x), F.leaky_relu(x[2], 0.0)))
    y, nan = each(x)
    assert_same(y, F.relu(x))
    assert np.isnan(nan)


CASES = {
    "layouts": lambda x, f, w: (F.relu(x), F.relu(f), F.relu(x[:, ::2])),
    "in place": lambda x, f, w: (F.leaky_relu(x + w, 0.1, True), F.relu6(f, out=x)),
    "masks": lambda x, f, w: F.threshold(f, 0.5, -1.0, return_mask=True),
    "shifted": lambda x, f, w: (F.relu(x[1:], out=x[:-1]), F.relu_backward(1.0, f)),
    "weights": lambda x, f, w: (F.prelu(f, w[:4], axis=0), F.prelu(x, x[:, :1])),
    "slopes": lambda x, f, w: (F.rrelu(x), F.rrelu_backward(x, x, x)),
    "sums": lambda x, f, w: F.prelu_backward(f, x, w),
    "numbers": lambda x, f, w: (F.prelu(x, np.inf), F.leaky_relu(f, ONE_SLOPE)),
    "nan": lambda x, f, w: (F.prelu(x, np.nan), F.relu_backward(-np.inf, f)),
    "bounds": lambda x, f, w: (F.rrelu(x, -3e38, 3e38), F.rrelu(x, ONE_SLOPE, 1.0)),
}
ONE_SLOPE = np.array(0.25)


@pytest.mark.parametrize("case", CASES)
def test_compiled_it_computes_the_same(case):
    x, w = sample((4, 6), np.dtype(np.float32)), normal(6, np.float32, 2)
    given = x, np.asfortranarray(sample((4, 6), x.dtype, 1)), w
    copies = [np.array(a, order="K") for a in given]
    with np.errstate(all="ignore"):
        expected = CASES[case](*copies)
        got = njit(CASES[case])(*given)
    for a, b in zip(got, expected, strict=True):
        if isinstance(b, F.Mask):  # bits in C order
            assert (a == np.packbits(b.unpack(), bitorder="little")).all()
        elif case == "sums" and b.ndim == 1:
            assert np.allclose(a, b, equal_nan=True)
        else:
            assert_same(a, b)
    if case == "layouts":
        assert got[1].flags.f_contiguous
        assert got[2].flags.c_contiguous
    for a, b in zip(given, copies, strict=True):
        assert_same(a, b)


# Processes ----------------------------------------------------------------------------

USER = """
    import numba, numpy as np, os, sys
    import fastrelu as F
    from fastrelu import _overloads

    @numba.njit(cache=True, nogil=True)
    def layer(x):
        y, bits = F.relu(x, return_mask=True)
        return F.leaky_relu(y - 1.0, 0.5), bits

    def threads():
        tasks = "/proc/self/task"
        return len(os.listdir(tasks)) if os.path.exists(tasks) else 1

    if __name__ == "__main__":
        assert _overloads._kept.cache_info().currsize == 0  # nothing is made in advance
        assert "numba.cuda" not in sys.modules
        numba.njit(lambda x: x)(1)  # which starts one of LLVM's
        x, before = np.linspace(-1, 2, 1 << 20), threads()
        y, bits = layer(x)
        z = np.maximum(x, 0) - 1
        assert (bits == np.packbits(x > 0, bitorder="little")).all()
        assert (y == np.maximum(z, z / 2)).all()
        try:
            numba.threading_layer()
        except ValueError:
            print(threads() - before, sum(layer.stats.cache_hits.values()))
"""


def test_a_cached_function_in_two_processes_starts_no_threads(tmp_path):
    script = tmp_path / "user.py"
    script.write_text(textwrap.dedent(USER))
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("NUMBA_CACHE_DIR", None)  # it is kept beside the script
    for hits in (0, 1):
        done = run_command([sys.executable, script], env=environment)
        assert (done.stdout, done.stderr) == (f"0 {hits}\n", "")
