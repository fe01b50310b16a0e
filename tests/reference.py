"""The obvious definitions, to compare fastrelu with: one line per activation.

Every definition is applied in the compute type (float32 for float16, bfloat16 and
float32; float64 for float64; integers as they are), where NumPy rounds each operation
correctly, and its result is rounded once to the array's type.
"""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Definition(NamedTuple):
    value: Callable  # (x, parameters...) -> y
    gradient: Callable  # (g, x, parameters...) -> the gradient towards x
    active: Callable | None = None  # (x, parameters...) -> what a mask's bits are
    integers: bool = False


def positive(x):
    return x > 0


LEAKY = Definition(
    lambda x, negative_slope: np.where(x > 0, x, negative_slope * x),
    lambda g, x, negative_slope: np.where(x > 0, g, negative_slope * g),
    positive,
)
DEFINITIONS = {
    "relu": Definition(
        lambda x: np.where(x <= 0, 0, x),
        lambda g, x: np.where(x > 0, g, 0),
        positive,
        True,
    ),
    "leaky_relu": LEAKY,
    "prelu": LEAKY,
    "relu6": Definition(
        lambda x: np.where(x <= 0, 0, np.where(x >= 6, 6, x)),
        lambda g, x: np.where((0 < x) & (x < 6), g, 0),
        lambda x: (0 < x) & (x < 6),
    ),
    "squared_relu": Definition(
        lambda x: np.where(x <= 0, 0, x * x), lambda g, x: np.where(x > 0, 2 * x * g, 0)
    ),
    "threshold": Definition(
        lambda x, threshold, value: np.where(x <= threshold, value, x),
        lambda g, x, threshold: np.where(x > threshold, g, 0),
        lambda x, threshold: x > threshold,
    ),
    "rrelu": Definition(
        lambda x, slopes: np.where(x > 0, x, slopes * x),
        lambda g, x, slopes: np.where(x > 0, g, slopes * g),
    ),
}


def native(dtype):
    return dtype if dtype.isnative else dtype.newbyteorder("=")


def compute_type(dtype):
    dtype = native(dtype)
    return dtype if dtype.kind in "iu" else np.result_type(dtype, np.float32)


def spread(weight, shape, axis=1):
    """The weight that each element of an array of this shape meets."""
    weight = np.asarray(weight)
    if weight.size == 1:
        weight = weight.reshape(())
    elif weight.ndim == 1:
        weight = np.moveaxis(weight.reshape(-1, *[1] * (len(shape) - 1)), 0, axis)
    return np.broadcast_to(weight, shape)


def _apply(function, arrays, weight=None, axis=1, **parameters):
    arrays = [np.asarray(a) for a in arrays]
    dtype, wide = native(arrays[0].dtype), compute_type(arrays[0].dtype)
    if weight is not None:
        parameters["negative_slope"] = spread(weight, arrays[0].shape, axis)
    names = list(inspect.signature(function).parameters)[len(arrays) :]
    numbers = [np.asarray(parameters[name]).astype(wide) for name in names]
    with np.errstate(all="ignore"):
        return function(*(a.astype(wide) for a in arrays), *numbers).astype(dtype)


def forward(name, x, **parameters):
    return _apply(DEFINITIONS[name].value, [x], **parameters)


def backward(name, g, x, **parameters):
    return _apply(DEFINITIONS[name].gradient, [g, x], **parameters)


def active(x, name="relu", **parameters):
    """Where the gradient passes; where a signalling NaN is told, that says nothing"""
    wide, function = compute_type(x.dtype), DEFINITIONS[name].active
    names = list(inspect.signature(function).parameters)[1:]
    with np.errstate(invalid="ignore"):
        return function(x.astype(wide), *(wide.type(parameters[n]) for n in names))


def mask_bits(x, name="relu", **parameters):
    return np.packbits(active(x, name, **parameters), bitorder="little")


def _halves(a):
    """Veltkamp's splitting: two numbers of at most 26 bits whose sum is `a`."""
    big = a * (2.0**27 + 1)
    high = big - (big - a)
    return high, a - high


def _exact_sum(x, g):
    """The sum of x * g, rounded once; what IEEE arithmetic says if not all is finite"""
    plain = x * g
    if not np.isfinite(plain).all():
        return plain.sum()
    products = np.concatenate([p * q for p in _halves(x) for q in _halves(g)])
    return math.fsum(products[products != 0].tolist())


def weight_gradient(g, x, weight, axis=1):
    """PReLU's exact weight gradient, and the sum of magnitudes its error scales with"""
    weight = np.asarray(weight)
    channel = np.arange(weight.size).reshape(weight.shape)
    channel = spread(channel, x.shape, axis).ravel()
    inactive = ~active(x).ravel()
    order = np.flatnonzero(inactive)[np.argsort(channel[inactive], kind="stable")]
    ends = np.bincount(channel[inactive], minlength=weight.size).cumsum()[:-1]
    pairs = [np.split(a.astype(np.float64).ravel()[order], ends) for a in (x, g)]
    with np.errstate(all="ignore"):
        sums = [_exact_sum(xs, gs) for xs, gs in zip(*pairs, strict=True)]
        scale = [np.abs(xs * gs).sum() for xs, gs in zip(*pairs, strict=True)]
    return tuple(np.reshape(a[: weight.size], weight.shape) for a in (sums, scale))


def bits(a):
    """The bits of every element in C order, all NaNs made one"""
    a = np.array(a, native(a.dtype), order="C")
    if a.dtype.kind not in "iu":
        a[np.isnan(a)] = np.nan
    return a.ravel().view(f"u{a.dtype.itemsize}")


def assert_same(got, expected):
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    wrong = np.flatnonzero(bits(got) != bits(expected))
    if wrong.size:
        i = wrong[0]
        got, expected = got.ravel()[i], expected.ravel()[i]
        raise AssertionError(f"{wrong.size} differ; at {i}: {got!r}, not {expected!r}")


def eps(dtype):
    return float(np.spacing(native(dtype).type(1)))


def assert_weight_gradient(got, g, x, weight, axis=1):
    """Within 2 eps of the array's type, plus 4 eps of the accumulator times the scale.

    The bounds are rounded as the result is: rounding is monotonic, so they hold in the
    subnormal range and up to infinity too.
    """
    weight = np.asarray(weight)
    exact, scale = weight_gradient(g, x, weight, axis)
    dtype = native(weight.dtype)
    assert (got.dtype, got.shape) == (dtype, weight.shape)
    with np.errstate(all="ignore"):
        error = 2 * eps(dtype) * np.abs(exact) + 4 * eps(compute_type(x.dtype)) * scale
        error = np.where(np.isfinite(exact), error, 0)
        low = np.asarray(exact - error).astype(dtype).astype(np.float64)
        high = np.asarray(exact + error).astype(dtype).astype(np.float64)
        got = got.astype(np.float64)
    within = (low <= got) & (got <= high) | np.isnan(exact) & np.isnan(got)
    assert within.all(), f"{got[~within]} is not in [{low[~within]}, {high[~within]}]"
