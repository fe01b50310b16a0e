"""What is measured: functions, the ways to call them, and arrays to call them with."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np

Array = Any

DTYPES = ("float16", "bfloat16", "float32", "float64")
MODES = ("fresh", "out", "inplace")

BLOCK = 1 << 20  # random numbers that repeat in a large array


# Functions ----------------------------------------------------------------------------


THRESHOLD, VALUE = 0.5, -0.25  # of `threshold`


def _leaky_relu(x: Array, slope: Any) -> Array:
    return np.where(x > 0, x, slope * x)


def _leaky_relu_gradient(g: Array, x: Array, slope: Any) -> Array:
    return np.where(x > 0, g, slope * g)


# What the end of a name says: the passes, and whether a mask is kept or read.
WAYS = {
    "": ("forward", False),
    "_mask": ("forward", True),
    "_backward": ("backward", False),
    "_backward_mask": ("backward", True),
    "_both": ("both", False),
}
MASKED = "", "_mask", "_backward", "_backward_mask"

# Behind that, where the channels of a weight are, or that they share one.
FLAT = {"": "flat"}
LAYOUTS = {"": "first", "_last": "last", "_rows": "rows", "_shared": "shared"}


class Function(NamedTuple):
    """A function: the ways to call it, and its obvious definition, Leaky ReLU's if none."""

    ways: tuple[str, ...]  # of WAYS
    value: Callable[[Array, Any], Array] = _leaky_relu
    gradient: Callable[[Array, Array, Any], Array] = _leaky_relu_gradient
    active: Callable[[Array], Array] = lambda x: x > 0  # what a mask keeps
    layouts: Mapping[str, str] = FLAT
    modes: tuple[str, ...] = MODES


FUNCTIONS = {
    "relu": Function(
        MASKED,
        lambda x, _: np.where(x > 0, x, 0),
        lambda g, x, _: np.where(x > 0, g, 0),
    ),
    "leaky_relu": Function(("", "_backward", "_backward_mask")),
    "prelu": Function(("", "_backward", "_both"), layouts=LAYOUTS),
    "relu6": Function(
        MASKED,
        lambda x, _: np.where(x > 0, np.where(x < 6, x, 6), 0),
        lambda g, x, _: np.where((x > 0) & (x < 6), g, 0),
        lambda x: (x > 0) & (x < 6),
    ),
    "squared_relu": Function(
        ("", "_backward"),
        lambda x, _: np.where(x > 0, x * x, 0),
        lambda g, x, _: np.where(x > 0, 2 * x * g, 0),
        # In place, again and again, products by x would end in 0 and inf.
        modes=MODES[:2],
    ),
    "threshold": Function(
        MASKED,
        lambda x, _: np.where(x > THRESHOLD, x, VALUE),
        lambda g, x, _: np.where(x > THRESHOLD, g, 0),
        lambda x: x > THRESHOLD,
    ),
    # Forward as where nothing is trained; backward with a slope for each element.
    "rrelu": Function(("", "_backward")),
}


# Arguments ----------------------------------------------------------------------------


class Arguments(NamedTuple):
    """Arguments one step off the plainest: who gets them, and what they are.

    Arrays are the `view` of one in C order whose shape is `memory` of theirs.
    """

    words: str
    calls: Mapping[str, tuple[str, ...]]  # modes of rows with plain arguments
    layout: str = ""  # if not the row's
    memory: Callable[..., tuple[int, ...]] = lambda *shape: shape
    view: Callable[[Array], Array] = lambda array: array
    number: Callable[[float, Any], Any] = lambda slope, dtype: slope


FRESH, OUT, INPLACE = ((mode,) for mode in MODES)

ARGUMENTS = {
    "plain": Arguments("arrays in C order, slopes of type float", {}),
    "int": Arguments(
        "the slope is an integer",
        {"leaky_relu": FRESH},
        number=lambda slope, dtype: math.ceil(slope),
    ),
    "scalar": Arguments(
        "the slope is NumPy's scalar",
        {"leaky_relu": FRESH},
        number=lambda slope, dtype: (
            dtype.type(slope) if dtype.kind == "f" else np.float32(slope)
        ),
    ),
    "broadcast": Arguments(
        "the weight has shape `(1, C, 1, 1)`",
        {"prelu": FRESH, "prelu_backward": FRESH},
    ),
    "columns": Arguments(
        "`x[:, :k]` of an array twice as wide",
        {"relu": MODES},
        "rows",
        lambda rows, k: (rows, 2 * k),
        lambda array: array[:, : array.shape[1] // 2],
    ),
    "strided": Arguments(
        "`x[::2]`",
        {"relu": MODES},
        memory=lambda n: (2 * n,),
        view=lambda array: array[::2],
    ),
    "transposed": Arguments(
        "`x.T`, `out` in C order",
        {"relu": FRESH + OUT},
        "rows",
        lambda rows, k: (k, rows),
        np.transpose,
    ),
    "nhwc": Arguments(
        "`x.transpose(0, 2, 3, 1)` of NCHW",
        {"relu_mask": FRESH, "relu_backward_mask": FRESH},
        "last",
        lambda images, height, width, channels: (images, channels, height, width),
        lambda array: array.transpose(0, 2, 3, 1),
    ),
    "crop": Arguments(
        "`x[..., 1:-1, 1:-1]`",
        {"relu": INPLACE},
        "first",
        lambda *shape: (*shape[:2], shape[2] + 2, shape[3] + 2),
        lambda array: array[..., 1:-1, 1:-1],
    ),
}


# Rows ---------------------------------------------------------------------------------


class Op(NamedTuple):
    """One row: a function, which way it is used, on what shape and what arguments."""

    activation: str
    passes: str  # "forward", "backward" or "both"
    layout: str = "flat"
    mask: bool = False
    modes: tuple[str, ...] = MODES  # where the result can go
    arguments: str = "plain"  # of ARGUMENTS

    @property
    def function(self) -> Function:
        """The row of the function."""
        return FUNCTIONS[self.activation]


OPS = {
    f"{name}{way}{place}": Op(
        name, passes, layout, mask, FRESH if passes == "both" else function.modes
    )
    for name, function in FUNCTIONS.items()
    for way, (passes, mask) in WAYS.items()
    if way in function.ways
    for place, layout in function.layouts.items()
}
OPS |= {
    f"{op}:{name}": OPS[op]._replace(
        layout=arguments.layout or OPS[op].layout, modes=modes, arguments=name
    )
    for name, arguments in ARGUMENTS.items()
    for op, modes in arguments.calls.items()
}

# What a quick look is made of.
COMMON = (
    *(("relu", mode) for mode in MODES),
    ("relu_mask", "fresh"),
    ("relu_backward", "fresh"),
    ("relu_backward_mask", "fresh"),
    ("leaky_relu", "fresh"),
    ("leaky_relu_backward", "fresh"),
    ("prelu", "fresh"),
    ("prelu_backward", "fresh"),
    ("prelu_both", "fresh"),
)


# Cases --------------------------------------------------------------------------------


UNITS = {"G": 1 << 30, "M": 1 << 20, "k": 1 << 10}


def size_name(n: int) -> str:
    """Return how a number of elements is written: 1k is 1024, 1M is 1024k."""
    for letter, unit in UNITS.items():
        if n % unit == 0:
            return f"{n // unit}{letter}"
    return str(n)


def size(text: str) -> int:
    """Return the number of elements that is written so.

    Raises
    ------
    ValueError
        If it is not a positive whole number, with k, M or G or without.
    """
    unit = UNITS.get(text[-1:], 1)
    digits = text[:-1] if unit > 1 else text
    if not digits.isdecimal() or int(digits) == 0:
        msg = f"expected a size such as 64, 16k or 1M, got {text!r}"
        raise ValueError(msg)
    return int(digits) * unit


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Parameters
    ----------
    op : str
        A name of `OPS`.
    mode : {"fresh", "out", "inplace"}
        Where the result goes.
    dtype : str
        One of `DTYPES`.
    n : int
        Elements; an array of several dimensions may have a few less.

    Raises
    ------
    ValueError
        If there is no such case.
    """

    op: str
    mode: str
    dtype: str
    n: int

    def __post_init__(self) -> None:
        for name, known in (("op", OPS), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                msg = f"unknown {name} {getattr(self, name)!r}"
                raise ValueError(msg)
        if self.mode not in self.row.modes:
            msg = f"{self.op} has no mode {self.mode!r}"
            raise ValueError(msg)

    @classmethod
    def parse(cls, name: str) -> Self:
        """Return the case with this name."""
        op, mode, dtype, n = name.split("-")
        return cls(op, mode, dtype, size(n))

    @property
    def name(self) -> str:
        """The case as one word, such as ``relu-fresh-float32-1M``."""
        return f"{self.op}-{self.mode}-{self.dtype}-{size_name(self.n)}"

    @property
    def row(self) -> Op:
        """The row of the operation."""
        return OPS[self.op]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the input: of images, of rows, or flat."""
        if self.row.layout in ("flat", "shared"):
            return (self.n,)
        if self.row.layout == "rows":
            channels = min(self.n, 512)
            return (self.n // channels, channels)
        channels = min(self.n, 64)
        pixels = min(self.n // channels, 32 * 32)
        height = 1 << (pixels.bit_length() - 1) // 2
        width = pixels // height
        images = self.n // (channels * height * width)
        if self.row.layout == "last":
            return (images, height, width, channels)
        return (images, channels, height, width)

    @property
    def bytes(self) -> int:
        """The bytes that a call has to read and write, whoever does it."""
        n = math.prod(self.shape)
        arrays = {"forward": 2, "backward": 3, "both": 5}[self.row.passes]
        arrays += self.op == "rrelu_backward"  # the slopes
        # A forward pass writes the mask too; a backward pass reads it in place of x.
        arrays -= self.row.mask and self.row.passes == "backward"
        bits = -(-n // 8) if self.row.mask else 0
        return arrays * n * int(dtype_of(self.dtype).itemsize) + bits


def dtype_of(name: str) -> Any:
    """Return the dtype with this name."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def block(n: int, seed: int) -> Array:
    """Return normal numbers for an array that repeats them; 1 in 44 is above 6."""
    return 3 * np.random.default_rng(seed).standard_normal(min(n, BLOCK))


class Data:
    """The arrays of a case.

    `w` is the weight, None for an activation without, and `slope` what multiplies the
    inactive elements: a number, the weight in a shape that broadcasts, or an array with
    one for each element, which lie from `lower` to `upper`.  `target` is the array that
    a call must write, `target_w` the one for the weight's gradient, None for fresh ones.
    """

    def __init__(self, case: Case, slope: float) -> None:
        row, shape, dtype = case.row, case.shape, dtype_of(case.dtype)
        arguments = ARGUMENTS[row.arguments]
        memory = arguments.memory(*shape)
        self.x = arguments.view(self.normal(memory, dtype, seed=0))
        self.g: Array = None
        if row.passes != "forward":
            self.g = arguments.view(self.normal(memory, dtype, seed=1))
        self.slope: Any = arguments.number(slope, dtype)
        # Their mean is the slope, and at a slope of 1 there is no other.
        self.lower, self.upper = slope * slope, slope * (2 - slope)
        self.w: Array = None
        self.axis = -1 if row.layout == "last" else min(1, len(shape) - 1)
        self.others: tuple[int, ...] = tuple(range(len(shape)))
        if row.activation == "prelu":
            channels = 1 if row.layout == "shared" else shape[self.axis]
            self.w = self.put(np.linspace(slope, 1, channels).astype(dtype))
            self.slope = self.w
            if row.layout != "shared":
                self.others = tuple(np.delete(self.others, self.axis).tolist())
                axes = range(len(shape))
                self.slope = self.w.reshape(
                    [1 if i in self.others else -1 for i in axes]
                )
            if row.arguments == "broadcast":
                self.w = self.slope
        elif case.op == "rrelu_backward":
            slopes = np.linspace(self.lower, self.upper, BLOCK).astype(dtype)
            self.slope = self.put(np.resize(slopes, shape))
        first = self.x if self.g is None else self.g
        self.target: Array = None if case.mode == "fresh" else first
        self.target_w: Array = None
        if case.mode == "out":
            self.target = self.empty_like(first)
            self.target_w = None if self.w is None else self.empty_like(self.w)

    def normal(self, shape: tuple[int, ...], dtype: np.dtype[Any], seed: int) -> Array:
        """Return normal numbers; a large array repeats a block."""
        return np.resize(block(math.prod(shape), seed).astype(dtype), shape)

    put = get = staticmethod(np.asarray)
    empty_like = staticmethod(partial(np.empty_like, order="C"))

    def expected(self, case: Case) -> Iterator[tuple[Array, Any]]:
        """Yield the results and how far off each may be, from obvious definitions."""
        function = case.row.function
        eps = float(np.spacing(self.x.dtype.type(1)))
        x, slope = self.x.astype(np.float64), np.asarray(self.slope, np.float64)
        if case.row.passes != "backward":
            yield function.value(x, slope), eps / 1024
        if self.g is not None:
            g = self.g.astype(np.float64)
            yield function.gradient(g, x, slope), eps / 1024
            if self.w is not None:
                terms = np.where(x > 0, 0, x * g)
                # What is lost by a plain sum in the array's own type.
                scale = np.abs(terms).sum(self.others).reshape(self.w.shape)
                error = eps * math.sqrt(x.size / self.w.size) * scale
                yield terms.sum(self.others).reshape(self.w.shape), error
        elif case.row.mask:
            yield function.active(x), 0
