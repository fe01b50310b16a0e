"""Dask's arrays: every public function on blocks, under every scheduler, on a cluster."""

import doctest
import importlib.util
import math
import os
import pickle
import re
import signal
import sys
import threading
import types
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import reference
from conftest import (
    ACTIVATIONS,
    each,
    gradient_of,
    in_turn,
    normal,
    run_command,
    sample,
    slopes_for,
)
from reference import assert_same, assert_weight_gradient

import fastrelu as F
from fastrelu import activations, cpu
from fastrelu.cpu import shield

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
from dask.highlevelgraph import HighLevelGraph

from fastrelu import _dask

CHECKOUT = Path(__file__).parents[1]
FLOAT32 = np.dtype(np.float32)
X, G = sample((30, 8, 5), FLOAT32), sample((30, 8, 5), FLOAT32, seed=1)
I = sample((30, 8, 5), np.dtype(np.int32))
CHUNKS = (16, 3, 5)  # six blocks


@pytest.fixture(autouse=True)
def scheduler():
    with dask.config.set(scheduler="threads", num_workers=4):
        yield


def lazy(a, chunks=CHUNKS):
    return da.from_array(a, chunks)


def has_dtype(y, dtype):
    """A graph says what its blocks are, and that is what they are."""
    block = y.blocks[(0,) * y.ndim].compute()
    return y.dtype == y._meta.dtype == block.dtype == dtype and y._meta.ndim == y.ndim


# Values -------------------------------------------------------------------------------


@each("float32")
def test_forward_and_backward(name, dtype):
    check(name, dtype)


def check(name, dtype):
    row = ACTIVATIONS[name]
    x, g = sample((9, 6, 5), dtype), sample((9, 6, 5), dtype, seed=1)
    slopes = slopes_for(name, x)
    blocks, grads = lazy(x, (4, 4, 5)), lazy(g, (9, 2, 3))
    y, dx = row.forward(blocks, **slopes), gradient_of(name, grads, blocks, **slopes)
    assert has_dtype(y, dtype)
    assert has_dtype(dx, dtype)
    assert y.chunks == blocks.chunks
    assert dx.chunks == ((4, 4, 1), (2, 2, 2), (3, 2))
    expected = reference.backward(name, g, x, **slopes)
    assert_same(y.compute(), reference.forward(name, x, **slopes))
    assert_same(dx.compute(), expected)
    for given in ((g, blocks), (grads, x)):  # the other one in memory
        assert_same(gradient_of(name, *given, **slopes).compute(), expected)
    if row.takes_mask:
        y, mask = row.forward(blocks, return_mask=True, **slopes)
        assert has_dtype(y, dtype)
        assert_same(y.compute(), reference.forward(name, x, **slopes))
        assert_same(mask.compute().bits, reference.mask_bits(x, name, **slopes))
        for gradient in (g, lazy(g, (4, 4, 5)), grads):
            assert_same(row.backward(gradient, mask, **slopes).compute(), expected)
    if row.parameter == "weight":
        _, dw = row.backward(grads, blocks, **slopes)
        assert has_dtype(dw, dtype)
        assert_weight_gradient(dw.compute(), g, x, slopes["weight"])


def weights():
    w = normal(8, FLOAT32)
    yield from (
        0.25,
        np.float32(-0.5),
        [0.5] * 8,
        w,
        w[:1],
        w[:, None],
        w[None, :, None],
    )
    yield from (lazy(w, 4), lazy(w[:1], 1), lazy(w[:, None], (4, 1)), lazy(w[0], ()))
    yield normal((30, 1, 5), FLOAT32)
    yield lazy(normal(X.shape, FLOAT32), (30, 2, 2))


@in_turn("weight", list(weights()))
def test_weights(weight):
    plain = np.asarray(weight) if hasattr(weight, "compute") else weight
    for x in (lazy(X), X) if hasattr(weight, "compute") else (lazy(X),):
        assert_same(F.prelu(x, weight).compute(), F.prelu(X, plain))
        dx, dw = F.prelu_backward(lazy(G, (10, 8, 2)), x, weight)
        expected, sums = F.prelu_backward(G, X, plain)
        assert_same(dx.compute(), expected)
        assert dw.shape == sums.shape
        of_dtype = np.asarray(plain, FLOAT32)
        assert_weight_gradient(np.asarray(dw.compute()), G, X, of_dtype)
        assert_same(F.prelu_backward(G, x, weight)[0].compute(), expected)


def test_a_weight_in_memory_along_an_axis_of_several_blocks():
    """It is cut as the axis is, so that a task has no more than it needs."""
    y = F.prelu(lazy(X), np.ones(8, np.float32), axis=-2)
    names = {key[0] for key in y.dask if isinstance(key, tuple)}
    assert any(name.startswith("rechunk") for name in names)
    single = F.prelu(lazy(X, (16, 8, 5)), np.ones(8, np.float32))
    assert len(single.dask.layers) == 2


@pytest.mark.parametrize("dtype", ["float16", "float64"], indirect=True)
def test_other_dtypes_with_weights(dtype):
    check("prelu", dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"], indirect=True)
def test_other_dtypes(dtype):
    check("relu", dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"], indirect=True)
def test_half_floats_are_rounded_once_for_all_blocks(dtype):
    """The sums of blocks stay in float64 until all are added up."""
    x, g = -np.ones((4096, 2), dtype), np.full((4096, 2), 1.5, dtype)
    x[::2] = 1e-3
    x[0], g[0] = -300, 200  # whose product alone is beyond a float16
    x[-1], g[-1] = -300, -200
    for weight in (np.ones(2, dtype), np.ones(2, np.float32)):
        _, dw = F.prelu_backward(lazy(g, 64), lazy(x, 64), weight)
        assert_weight_gradient(dw.compute(), g, x, weight)


def test_a_slope_goes_with_the_gradient_and_not_with_what_was_saved():
    grad, signs = (lazy(each, 2) for each in (np.ones(4), np.float32([-1, 0, 1, 2])))
    expected = np.array([1e39, 1e39, 1, 1])
    assert_same(F.leaky_relu_backward(grad, signs, 1e39).compute(), expected)
    with pytest.raises(ValueError, match="threshold must be finite in float32"):
        F.threshold_backward(grad, signs, 1e39)


def test_a_sum_of_blocks_is_rounded_once():
    """Rounded to float32 first, it would be a tie."""
    bfloat16 = ml_dtypes.bfloat16
    x = np.array([-1, -(2**-8), -(2**-20)], bfloat16)
    g = np.array([-1, -1, -(2**-20)], bfloat16)
    for size in 1, 3:
        both = lazy(g, size), lazy(x, size)
        _, dw = F.prelu_backward(*both, np.ones(1, bfloat16), axis=0)
        assert dw.compute()[0] == 1 + 2**-7


def test_infinities_in_blocks():
    x, g = -np.ones((8, 3), np.float32), np.ones((8, 3), np.float32)
    x[2, 0], x[1, 1], x[5, 1], x[6, 2] = -np.inf, -np.inf, np.nan, np.inf
    _, dw = F.prelu_backward(lazy(g, 2), lazy(x, 2), np.ones(3, np.float32))
    assert_same(dw.compute(), np.array([-np.inf, np.nan, -7], np.float32))


def test_one_number_for_all_gradients():
    x = lazy(X)
    for given, saved in ((1.0, x), (np.float64(2), x), (1, x > 0), (1, lazy(I))):
        dx = F.relu_backward(given, saved)
        expected = F.relu_backward(given, saved.compute())
        assert_same(dx.compute(), expected)
        assert has_dtype(dx, expected.dtype)
    _, mask = F.relu(x, return_mask=True)
    assert_same(F.relu_backward(1.0, mask).compute(), F.relu_backward(1.0, X > 0))
    weight = normal(8, FLOAT32)
    for w in (weight, lazy(weight, 8)):
        dx, dw = F.prelu_backward(1.0, x if w is weight else X, w)
        expected, _ = F.prelu_backward(1.0, X, weight)
        assert_same(dx.compute(), expected)
        assert_weight_gradient(dw.compute(), np.ones_like(X), X, weight)


@in_turn("shape", [(), (0,), (1,), (3, 0, 2)])
def test_no_dimensions_and_no_elements(shape):
    x = sample(shape, FLOAT32)
    blocks, axis = lazy(x, -1), 0 if len(shape) == 1 else 1
    y, mask = F.relu(blocks, return_mask=True)
    assert_same(np.asarray(y.compute()), F.relu(x))
    assert mask.compute().shape == shape
    assert_same(np.asarray(F.relu_backward(y, mask).compute()), F.relu(x))
    for weight in (0.5, np.full(1, 0.5, np.float32), lazy(np.full(1, 0.5, "f4"), 1)):
        plain = np.asarray(weight, np.float32)
        assert_same(
            np.asarray(F.prelu(blocks, weight, axis=axis).compute()),
            F.prelu(x, plain, axis=axis),
        )
        _, dw = F.prelu_backward(blocks, blocks, weight, axis=axis)
        assert_weight_gradient(np.asarray(dw.compute()), x, x, plain)
    training, slopes = F.rrelu(blocks, training=True, rng=0)
    assert training.compute().shape == slopes.compute().shape == shape


EMPTY, ONE = np.ones(0, np.float32), np.ones(1, np.float32)


@in_turn("weight", [EMPTY, lazy(EMPTY, 1), lazy(ONE, ((1, 0),))])
def test_weights_with_empty_chunks(weight):
    x = sample((5, 0, 2) if weight.size == 0 else (5, 3, 2), FLOAT32)
    blocks, plain = lazy(x, 2), np.asarray(weight)
    assert_same(F.prelu(blocks, weight).compute(), F.prelu(x, plain))
    dx, dw = dask.compute(*F.prelu_backward(blocks, blocks, weight))
    expected, sums = F.prelu_backward(x, x, plain)
    assert_same(dx, expected)
    assert dw.shape == sums.shape
    assert_weight_gradient(dw, x, x, plain)


def test_unknown_chunk_sizes():
    keep = X[:, 0, 0] > 0
    x, g = lazy(X)[lazy(keep, 16)], lazy(G)[lazy(keep, 16)]
    assert math.isnan(x.shape[0])
    y, mask = F.relu(x, return_mask=True)
    assert_same(y.compute(), F.relu(X[keep]))
    assert_same(mask.compute().bits, F.relu(X[keep], return_mask=True)[1].bits)
    for saved in (x, mask, x > 0):
        got = F.relu_backward(g, saved).compute()
        assert_same(got, F.relu_backward(G[keep], X[keep]))
    w = normal(8, FLOAT32)
    for weight in (w, lazy(w, 2)):
        assert_same(F.prelu(x, weight).compute(), F.prelu(X[keep], w))
        _, dw = F.prelu_backward(g, x, weight)
        assert_weight_gradient(dw.compute(), G[keep], X[keep], w)
    with pytest.raises(ValueError, match="weight must have one element, or 8"):
        F.prelu(x, w[:3])
    with pytest.raises(ValueError, match="weight must have known chunk sizes"):
        F.prelu(x, lazy(w, 4)[lazy(w, 4) > 0])
    with pytest.raises(ValueError, match=r"x must have known .* the axes of weight"):
        F.prelu(x, np.ones(len(X), "f4"), axis=0)
    with pytest.raises(ValueError, match="as many blocks as the other"):
        F.relu_backward(g, x.rechunk({1: 8}))
    one = lazy(X[:, 0, 0], -1)
    one = one[one > 0]  # of one block, which one in memory has, too
    assert_same(F.relu_backward(X[keep, 0, 0], one).compute(), X[keep, 0, 0])
    slopes = normal(keep.sum(), FLOAT32)
    for weight in (slopes, lazy(slopes, 2)):
        y = F.prelu(-one, weight, axis=0)
        assert_same(y.compute(), F.prelu(-X[keep, 0, 0], slopes, axis=0))


def test_saved_in_other_ways():
    x, g = lazy(X), lazy(G)
    _, mask = F.relu(X, return_mask=True)
    expected = F.relu_backward(G, X)
    for saved in (mask, X > 0, x > 0, X.astype("f8"), F.relu(x)):
        assert_same(F.relu_backward(g, saved).compute(), expected)


def test_what_was_active_is_asked_in_the_dtype_of_the_forward_pass():
    """A number is rounded to it, and to that of the gradient, each time once."""
    third = Fraction(1, 3)
    nearest = np.nextafter(float(third), 1), float(np.float32(third))
    x = np.array([*nearest, 0, 1])
    assert_same(
        F.threshold_backward(lazy(G[0, 0, :4], 3), lazy(x, 3), third).compute(),
        F.threshold_backward(G[0, 0, :4], x, third),
    )


def test_random_slopes():
    """A seed and the chunks fix them, and no two blocks have the same."""
    x = lazy(X)
    y, slopes = F.rrelu(x, training=True, rng=3)
    assert has_dtype(slopes, X.dtype)
    values = slopes.compute(scheduler="synchronous")
    again, same = dask.compute(*F.rrelu(x, training=True, rng=3))
    assert_same(same, values)
    assert_same(y.compute(), again)
    assert_same(again, reference.forward("rrelu", X, slopes=values))
    assert 1 / 8 <= values.min() < values.max() < 1 / 3
    assert len(np.unique(values)) > 0.999 * values.size
    assert_same(
        F.rrelu_backward(G, x, slopes).compute(), F.rrelu_backward(G, X, values)
    )
    assert_same(
        F.rrelu_backward(G, X, slopes).compute(), F.rrelu_backward(G, X, values)
    )
    for grad, given, own in ((1.0, slopes, values), (2.0, 0.5, 0.5), (G, 0.5, 0.5)):
        dx = F.rrelu_backward(grad, x, given).compute()
        assert_same(dx, F.rrelu_backward(grad, X, own))
    assert_same(F.rrelu(x).compute(), F.rrelu(X))
    rng = np.random.default_rng(3)
    first, second = (F.rrelu(x, training=True, rng=rng)[1].compute() for _ in "12")
    assert_same(first, values)
    assert not np.array_equal(first, second)
    other = F.rrelu(x, training=True)[1].compute()
    assert not np.array_equal(other, values)


# Masks --------------------------------------------------------------------------------


def blocks_of(mask):
    return dask.compute(*mask.array.to_delayed().ravel())


def test_a_lazy_mask():
    y, mask = F.relu(lazy(X), return_mask=True)
    assert (mask.shape, mask.dtype, mask.chunks) == (X.shape, bool, y.chunks)
    assert repr(mask).startswith("DaskMask(shape=(30, 8, 5), chunksize=(16, 3, 5)")
    assert dask.is_dask_collection(mask)
    whole, eager = mask.compute(), F.relu(X, return_mask=True)[1]
    assert (type(whole), whole.predicate) == (F.Mask, eager.predicate)
    assert_same(whole.bits, eager.bits)
    assert_same(mask.unpack().compute(), X > 0)
    assert_same(np.asarray(mask), X > 0)
    assert mask.count().compute() == (X > 0).sum()
    assert_same(mask.count(axis=0).compute(), (X > 0).sum(0))
    assert mask.nbytes == sum(block.bits.nbytes for block in blocks_of(mask))
    assert_same(da.asarray(mask).compute(), X > 0)
    for where in (da.where, np.where):
        y = where(mask, lazy(X), 0)
        assert isinstance(y, da.Array)
        assert_same(y.compute(), np.where(X > 0, X, 0))
    for name in ("bits", "axes"):
        with pytest.raises(AttributeError, match=rf"take compute\(\)\.{name}"):
            getattr(mask, name)
    with pytest.raises(AttributeError, match=r"'DaskMask' .* no attribute 'colour'"):
        _ = mask.colour
    with pytest.raises(ValueError, match=r"use mask\.count\(\)"):
        bool(mask)
    for call, name in (
        (lambda: F.relu_backward(mask, lazy(X)), "grad_output"),
        (lambda: F.prelu_backward(lazy(X), mask, 0.1), "x"),
        (lambda: F.prelu(lazy(X), mask), "weight"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be .*, got a mask"):
            call()
    kept = mask.persist()
    assert type(kept) is type(mask)
    blocks = blocks_of(kept)
    assert {type(block) for block in blocks} == {F.Mask}
    assert sum(block.bits.nbytes for block in blocks) < X.nbytes // 32 + len(blocks)
    assert_same(F.relu_backward(lazy(G), kept).compute(), F.relu_backward(G, X))
    same = pickle.loads(pickle.dumps(kept))
    assert_same(same.compute().bits, eager.bits)
    assert dask.base.tokenize(mask) == dask.base.tokenize(kept)
    assert dask.delayed(F.Mask.count)(mask).compute() == (X > 0).sum()
    graph = HighLevelGraph.from_collections("one", {"one": 1}, [mask])
    assert graph.dependencies["one"] == {mask.array.name}


def test_lazy_bools_give_a_lazy_mask():
    x = lazy(X)
    of_bools = F.Mask.pack(x > 0)
    assert (type(of_bools), of_bools.chunks) == (_dask.DaskMask, x.chunks)
    again = F.Mask.pack(of_bools, "0 < x < 6")  # a mask is an array of bools, too
    assert again.predicate == again.compute().predicate == "0 < x < 6"
    for mask in (of_bools, again):
        assert_same(mask.compute().bits, F.relu(X, return_mask=True)[1].bits)
    assert_same(F.relu_backward(lazy(G), of_bools).compute(), F.relu_backward(G, X))
    for bools, predicate, said in (
        (x, "x > 0", "bools must be an array of bool, got float32"),
        ((x > 0).map_blocks(np.ma.masked_array), "x > 0", "bools must be .* its gaps"),
        (x > 0, 0, "predicate must be a string"),
    ):
        with pytest.raises(TypeError, match=said):
            F.Mask.pack(bools, predicate)


def test_a_mask_is_made_in_the_same_pass(monkeypatch):
    """An array and its mask that are computed together cost one call for a block."""
    calls, run = [], _dask._run
    monkeypatch.setattr(_dask, "_run", lambda *a: calls.append(1) or run(*a))
    y, mask = dask.compute(*F.relu(lazy(X), return_mask=True))
    assert len(calls) == 6
    assert_same(y[mask.unpack()], X[X > 0])


# What is refused ----------------------------------------------------------------------


def test_nothing_is_written_to():
    x, g, w = lazy(X), lazy(G), lazy(normal(8, FLOAT32), 8)
    _, mask = F.relu(x, return_mask=True)
    for name, call in {
        "inplace": lambda **given: F.relu(x, **given),
        "backward": lambda **given: F.relu_backward(G, mask, **given),
        "prelu": lambda **given: F.prelu(X, w, **given),
        "prelu_backward": lambda **given: F.prelu_backward(g, x, w, **given),
        "rrelu": lambda **given: F.rrelu(x, **given),
        "training": lambda **given: F.rrelu(x, training=True, **given),
        "rrelu_backward": lambda **given: F.rrelu_backward(g, X, 0.5, **given),
    }.items():
        with pytest.raises(TypeError, match="inplace must not be given with Dask"):
            call(inplace=True)
        for out in (x, X, (X,), (X, X)):
            with pytest.raises(TypeError, match="out must not be given with Dask"):
                call(out=out)
        assert name
    with pytest.raises(TypeError, match="out must not be given with Dask"):
        F.relu(X, out=x)


REFUSED = [
    (lambda x: F.leaky_relu(x.astype("i4")), TypeError, "x must have dtype"),
    (lambda x: F.relu(x > 0), TypeError, "x must have dtype"),
    (lambda x: F.leaky_relu(x, 1e39), ValueError, "negative_slope must be finite"),
    (
        lambda x: F.threshold_backward(x.astype("f8"), x, 1e39),
        ValueError,
        "threshold must be finite in float32",
    ),
    (lambda x: F.leaky_relu(x, "a"), TypeError, "negative_slope must be a real"),
    (lambda x: F.relu(x, 2), TypeError, "inplace must be True or False"),
    (lambda x: F.relu(x, return_mask=2), TypeError, "return_mask must be True"),
    (lambda x: F.relu_backward(x, x[1:]), ValueError, "saved must have the shape"),
    (lambda x: F.prelu(x, x[0].astype("f8")), TypeError, "weight must have the dt"),
    (lambda x: F.prelu(x, [1, 2]), ValueError, "weight must have one element, or 8"),
    (lambda x: F.prelu(x, F.Mask.pack(x > 0)), TypeError, "weight must be .*a mask"),
    (lambda x: F.prelu(x, 1, axis=3), ValueError, "axis must be in"),
    (lambda x: F.prelu(x[0, 0, 0], [1, 2]), ValueError, "weight must have one"),
    (lambda x: F.prelu_backward(x, x.astype("f8"), 1), TypeError, "x must have the"),
    (lambda x: F.rrelu(x, training=True, rng="a"), TypeError, "rng must be"),
    (lambda x: F.rrelu(x, rng="a"), TypeError, "rng must be"),
    (lambda x: F.rrelu(x, 0, 1e39, True), ValueError, "upper must be finite in fl"),
    (lambda x: F.rrelu(x, -1e39, 0), ValueError, "lower must be finite in float32"),
    (lambda x: F.rrelu_backward(x, x, x[1:]), ValueError, "slopes must have the s"),
    (lambda x: F.rrelu_backward(1.0, x, x[1:]), ValueError, "slopes must have the s"),
    (lambda x: F.squared_relu_backward(x, x.astype("f8")), TypeError, "x must have"),
    (
        lambda x: F.squared_relu_backward(x, F.relu(x, return_mask=True)[1]),
        TypeError,
        "x must be the input",
    ),
    (
        lambda x: F.relu6_backward(x, F.relu(x, return_mask=True)[1]),
        ValueError,
        "saved must be a mask of 0 < x < 6",
    ),
    (
        lambda x: F.relu(x.map_blocks(np.ma.masked_array)),
        TypeError,
        "x must be .* fill its gaps",
    ),
    (
        lambda x: F.relu(dask.delayed(np.ones)(3)),
        TypeError,
        "x must be .*from_delayed",
    ),
]


def test_blocks_are_of_a_library_that_dask_knows():
    torch = pytest.importorskip("torch")
    blocks = lazy(X).map_blocks(torch.asarray, meta=torch.ones(0, 0, 0))
    for name, call in {
        "x": lambda: F.relu(blocks),
        "weight": lambda: F.prelu(lazy(X), blocks),
        "bools": lambda: F.Mask.pack(blocks),
    }.items():
        said = f"{name} must be made of arrays of NumPy or CuPy, got Tensor of dtype"
        with pytest.raises(TypeError, match=said):
            call()


@in_turn("case", REFUSED)
def test_bad_arguments(case):
    """They are told when the graph is made, not when it is computed."""
    call, error, said = case
    with pytest.raises(error, match=said):
        call(lazy(X))


# The graph ----------------------------------------------------------------------------


def tasks(collection):
    (optimised,) = dask.optimize(collection)
    return len(dict(optimised.__dask_graph__()))


def test_layers_fuse_with_their_neighbours():
    x = da.ones((64, 8, 5), chunks=(8, 8, 5), dtype="f4")
    weight = np.ones(8, np.float32)
    for call, arrays in (
        (F.relu, 1),
        (lambda x: F.leaky_relu(x, 0.1), 1),
        (lambda x: F.prelu(x, weight), 1),
        (lambda x: F.relu(x, return_mask=True)[1].unpack(), 1),
        (lambda x: F.relu_backward(x * 3, x), 1),
        (lambda x: F.rrelu(x, training=True, rng=0)[0], 1),
    ):
        ours = tasks((call(x + 1) * 2).sum())
        theirs = tasks((np.negative(x + 1) * 2).sum())
        assert ours <= theirs + 8 * (arrays - 1)


def test_to_make_a_graph_computes_nothing(monkeypatch):
    def fail(*arguments):
        raise AssertionError

    for module, name in ((_dask, "_run"), (cpu, "elementwise"), (cpu, "uniform")):
        monkeypatch.setattr(module, name, fail)
    block = dask.delayed(fail)()
    x = da.from_delayed(block, (1 << 40, 8), np.float32)  # more than any memory
    w = da.from_delayed(block, (8,), np.float32)
    y, mask = F.relu(x, return_mask=True)
    for made in (y, mask, F.relu_backward(x, mask), *F.prelu_backward(x, x, w)):
        assert dask.is_dask_collection(made)
    for made in (*F.rrelu(x, training=True, rng=0), F.rrelu_backward(x, x, 0.5)):
        assert made.shape == x.shape


def test_names_follow_from_what_is_computed():
    x = lazy(X)
    one, two = F.leaky_relu(x, 0.1), F.leaky_relu(x, 0.2)
    assert one.name == F.leaky_relu(x, 0.1).name != two.name
    assert one.name.startswith("leaky_relu-")
    assert F.prelu(x, 0.1).name.startswith("prelu-")
    assert F.relu(x).name != F.relu6(x).name
    names = [F.rrelu(x, training=True, rng=seed)[1].name for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    assert names[0].startswith("rrelu_slopes-")
    for function in (activations._prelu_forward, activations._leaky_relu_forward):
        assert pickle.loads(pickle.dumps(function)) is function


def test_other_objects_of_that_name(monkeypatch):
    """Where nobody has imported Dask's arrays, they are no reason to do so."""
    kind = type("Theirs", (), {"__dask_graph__": None, "__array__": lambda *_: X})
    assert_same(F.relu(kind()), F.relu(X))
    monkeypatch.delitem(sys.modules, "dask.array")
    assert_same(F.relu(kind()), F.relu(X))


# Where it runs ------------------------------------------------------------------------


def test_the_sums_are_those_of_the_chunks():
    """Neither the scheduler nor the number of workers changes a bit."""
    x, g = normal((999, 70), np.float32), normal((999, 70), np.float32, seed=1)
    options = [{"scheduler": "synchronous"}]
    options += [{"scheduler": "threads", "num_workers": n} for n in (1, 2, 7)]
    for w in (np.float32(0.5), normal(70, np.float32)):
        _, dw = F.prelu_backward(lazy(g, (40, 33)), lazy(x, (40, 33)), w)
        first, *others = (np.asarray(dw.compute(**each)) for each in options)
        assert_weight_gradient(first, g, x, w)
        for other in others:
            assert_same(other, first)


def test_a_thread_of_a_pool_has_its_loops_to_itself():
    assert not _dask._run(shield.is_alone)  # by the one who called: no pool
    x = da.ones(4, chunks=1)
    assert x.map_blocks(lambda b: _dask._run(shield.is_alone) & (b > 0)).all().compute()
    assert not shield.is_alone()
    found = []
    run = threading.Thread(target=lambda: found.append(_dask._run(shield.is_alone)))
    run.start()
    run.join()
    assert found == [True]


def test_a_worker_s_limit_is_heeded(monkeypatch):
    """Once for each worker, and never made larger."""
    pool, workers = F.get_default_memory_pool(), []

    def get_worker():
        if not workers:
            raise ValueError
        manager = types.SimpleNamespace(memory_limit=workers[-1])
        return types.SimpleNamespace(address=len(workers), memory_manager=manager)

    module = types.SimpleNamespace(get_worker=get_worker)
    monkeypatch.setitem(sys.modules, "distributed.worker", module)
    monkeypatch.setattr(_dask, "_known_workers", set())
    before = pool.get_limit()
    try:
        for limit, expected in (None, 1 << 20), (1 << 22, 1 << 18), (1 << 30, 1 << 18):
            pool.set_limit(min(pool.get_limit(), 1 << 20))
            assert _dask._run(pool.get_limit) == min(pool.get_limit(), 1 << 20)
            workers.append(limit)
            assert _dask._run(pool.get_limit) == expected
        pool.set_limit(1 << 19)  # by somebody who knows better
        assert _dask._run(pool.get_limit) == 1 << 19
    finally:
        pool.set_limit(before)


def test_a_block_may_be_shared_where_there_is_no_pool():
    threads = pytest.importorskip("fastrelu.cpu.threads")
    if not (cpu.is_fast() and len(os.sched_getaffinity(0)) > 1):
        pytest.skip("needs the team")
    x = da.ones(1 << 24, np.float32, chunks=1 << 23)
    F.relu(x.compute())  # there is a team
    loops = []
    for scheduler in ("threads", "synchronous"):
        before = threads._memory[threads._LOOPS]
        F.relu(x).compute(scheduler=scheduler)
        loops.append(threads._memory[threads._LOOPS] - before)
    assert loops[0] == 0 < loops[1]


PROCESSES = """
import dask, dask.array as da
import numpy as np
import fastrelu as F

if __name__ == "__main__":
    x = np.random.default_rng(0).standard_normal((40, 6)).astype("f4")
    a, w = da.from_array(x, (20, 3)), np.full(6, 0.25, "f4")
    y, mask = F.relu(a, return_mask=True)
    results = y, mask, *F.prelu_backward(a, a, w), *F.rrelu(a, training=True, rng=0)
    one = dask.compute(*results, scheduler="processes", num_workers=1)
    two = dask.compute(*results, scheduler="synchronous")
    for a, b in zip(one, two):
        print(np.array_equal(*(getattr(r, "bits", r) for r in (a, b))))
"""


def test_processes(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(PROCESSES)
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    done = run_command([sys.executable, file], env=environment)
    assert done.stdout == "True\n" * 6, done.stderr


# A cluster ----------------------------------------------------------------------------

LIMIT = 480 << 20  # bytes of a worker, a bare one of which has some 200


def started(**options):
    """A cluster of two processes with a thread each"""
    distributed = pytest.importorskip("distributed")
    options |= {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0"}
    return distributed.LocalCluster(memory_limit=LIMIT, **options)


@pytest.fixture(scope="module")
def client():
    distributed = pytest.importorskip("distributed")
    with started() as cluster, distributed.Client(cluster) as client:
        yield client


def about():
    """What a worker's process says of itself"""
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    return os.getpid(), peak, F.get_default_memory_pool().get_limit()


def test_a_cluster_gives_the_same_bits(client):
    x, g, w = lazy(X), lazy(G, (10, 8, 2)), normal(8, FLOAT32)
    y, mask = F.relu(x, return_mask=True)
    results = [y, F.relu_backward(g, mask), *F.prelu_backward(g, x, w)]
    results += F.rrelu(x, training=True, rng=0)
    ours = dask.compute(*results, mask, scheduler=client)
    here = dask.compute(*results, mask, scheduler="synchronous")
    for a, b in zip(ours[:-1], here[:-1], strict=True):
        assert_same(a, b)
    assert_same(ours[-1].bits, here[-1].bits)
    assert client.submit(_dask._run, shield.is_alone).result()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_more_than_the_workers_may_hold(client):
    """It streams through: no worker is paused for long, ended, or near its limit."""
    before = client.run(about)
    x = da.full(1 << 28, -0.5, dtype=np.float32, chunks=1 << 22)
    assert x.nbytes > 2 * LIMIT
    y, mask = F.relu(x + np.float32(1), return_mask=True)
    assert y.sum().compute(scheduler=client) == x.size / 2
    dx = F.relu_backward(x, client.persist(mask))  # which is a 32nd of it
    assert dx.sum().compute(scheduler=client) == -x.size / 2
    after = client.run(about)
    assert after.keys() == before.keys()
    for worker, (number, peak, limit) in after.items():
        assert number == before[worker][0]  # it was not started anew
        assert peak < LIMIT
        assert limit <= LIMIT // _dask._PART


def bench(name):
    file = CHECKOUT / "bench" / f"{name}.py"
    if not file.exists():
        pytest.skip("bench is not installed")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_training_over_a_cluster(client):
    """The losses are those of one process."""
    pytest.importorskip("sklearn")
    training = bench("dask_training")
    client.upload_file(str(CHECKOUT / "bench" / "dask_training.py"))
    losses = []
    for scheduler in (None, client.scheduler.address):
        with training.cluster(0, scheduler) as give:
            losses.append(list(training.train(give, "prelu", steps=2, parts=3)))
    assert losses[0] == losses[1]
    assert len({*losses[0]}) == 2


def test_what_a_lost_worker_had_is_computed_again(client):
    """To the same bits."""
    distributed = pytest.importorskip("distributed")
    x = da.random.default_rng(0).standard_normal((64, 8), chunks=(4, 8))
    results = [*F.prelu_backward(x, x, 0.25), *F.rrelu(x, training=True, rng=0)]
    expected = dask.compute(*results, scheduler="synchronous")
    kept = client.persist(results)
    distributed.wait(kept)
    lost = next(iter(client.run(os.getpid).values()))
    os.kill(lost, signal.SIGKILL)
    for a, b in zip(client.gather(client.compute(kept)), expected, strict=True):
        assert_same(np.asarray(a), np.asarray(b))
    assert lost not in client.run(os.getpid).values()
    client.cluster.close()  # which has started another one


def test_the_benchmark_runs(monkeypatch):
    blocks = bench("dask_blocks")
    monkeypatch.setattr(blocks, "BLOCKS", 4)
    found = blocks.overhead(1)
    assert {len(each) for each in found.values()} == {1}


# What readers are shown ---------------------------------------------------------------


def test_examples():
    pytest.importorskip("xarray")
    failed, tried = doctest.testmod(_dask, globs={})
    assert tried > 8
    assert not failed


def test_what_the_readme_shows(tmp_path, monkeypatch):
    zarr = pytest.importorskip("zarr")
    section = (CHECKOUT / "README.md").read_text().partition("\n## On Dask\n")[2]
    code = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    monkeypatch.chdir(tmp_path)
    x = normal((300, 20), FLOAT32)
    zarr.save_array("x.zarr", x)
    exec("\n".join(code), {"F": F})  # noqa: S102
    assert_same(zarr.load("y.zarr"), F.relu(x))


# A GPU --------------------------------------------------------------------------------


class Drawn:
    """A generator of CuPy's"""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def random(self, shape, dtype):
        return sys.modules["cupy"].asarray(self.rng.random(shape, dtype))


Drawn.Generator = Drawn.default_rng = Drawn


def test_blocks_on_a_gpu(monkeypatch):
    """One that is made up: what comes of CuPy's blocks are CuPy's."""
    pytest.importorskip("numba_cuda", reason="needs numba-cuda: see the extra cuda13")
    import device

    with device.machine(monkeypatch), dask.config.set(scheduler="synchronous"):
        cupy = sys.modules["cupy"]
        cupy.random = Drawn
        x, g = (
            lazy(a).map_blocks(cupy.asarray, meta=cupy.empty((0, 0, 0), "f4"))
            for a in (X, G)
        )
        y, mask = F.relu(x, return_mask=True)
        weight = normal(8, FLOAT32)
        dx, dw = F.prelu_backward(g, x, cupy.asarray(weight))
        training, slopes = F.rrelu(x, training=True, rng=0)
        results = y, F.relu_backward(g, mask), mask.unpack(), dx, training
        drawn = slopes.blocks[0, 0, 0].compute().get()
        first = [a[:16, :3] for a in (X, G)]
        expected = [F.relu(first[0]), F.relu_backward(*first[::-1]), first[0] > 0]
        expected.append(F.prelu_backward(*first[::-1], weight[:3])[0])
        expected.append(reference.forward("rrelu", first[0], slopes=drawn))
        for result, values in zip(results, expected, strict=True):
            assert type(result._meta) is cupy.ndarray
            block = result.blocks[0, 0, 0].compute()
            assert type(block) is cupy.ndarray
            assert_same(block.get(), values)
        assert_same(mask.compute().bits.get(), F.relu(X, return_mask=True)[1].bits)
        of = G[:, :3], X[:, :3], weight[:3]
        assert_weight_gradient(dw.blocks[0].compute().get(), *of)
        half = lazy(np.clip(X, -9, 9).astype("f2"))
        half = half.map_blocks(cupy.asarray, meta=cupy.empty((0, 0, 0), "f2"))
        _, dw = F.prelu_backward(half, half, cupy.asarray(weight.astype("f2")))
        of = *[np.clip(X, -9, 9).astype("f2")[:, :3]] * 2, weight.astype("f2")[:3]
        assert_weight_gradient(dw.blocks[0].compute().get(), *of)
