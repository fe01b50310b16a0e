"""What fastrelu is measured against, and how: each peer in a process of its own.

Thread pools and allocators of several libraries in one process would disturb each
other, so each peer has a worker process.  On every case the workers take short turns:
what slows the machine for a while slows them all.
"""

import contextlib
import ctypes.util
import importlib.metadata
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np

from fastrelu import activations

Array = Any

DTYPES = ("float16", "bfloat16", "float32", "float64")
MODES = ("fresh", "out", "inplace")

TURNS = 5
SAMPLE = 1e-3  # seconds that a sample should last at least
TURN = 0.02  # seconds that the samples of a turn should last together
CHECKED = 1 << 16  # elements on which a peer is checked
BLOCK = 1 << 20  # random numbers that repeat in a large array

SLOPE = 0.25


# Cases --------------------------------------------------------------------------------


class Op(NamedTuple):
    """One row: a function, which way it is used, and on what shape."""

    activation: str
    passes: str  # "forward", "backward" or "both"
    layout: str = "flat"
    mask: bool = False
    slope: float | None = None  # where the activation fixes it

    @property
    def modes(self) -> tuple[str, ...]:
        """Where the result can go."""
        return MODES[:1] if self.passes == "both" else MODES


# The end of a name says where the channels are, or that they share one weight.
LAYOUTS = {"": "first", "_last": "last", "_rows": "rows", "_shared": "shared"}

OPS = {
    "relu": Op("relu", "forward", slope=0.0),
    "relu_mask": Op("relu", "forward", mask=True, slope=0.0),
    "relu_backward": Op("relu", "backward", slope=0.0),
    "relu_backward_mask": Op("relu", "backward", mask=True, slope=0.0),
    "leaky_relu": Op("leaky_relu", "forward"),
    "leaky_relu_backward": Op("leaky_relu", "backward"),
    "leaky_relu_backward_mask": Op("leaky_relu", "backward", mask=True),
    **{
        f"prelu{'' if passes == 'forward' else f'_{passes}'}{suffix}": Op(
            "prelu", passes, layout
        )
        for passes in ("forward", "backward", "both")
        for suffix, layout in LAYOUTS.items()
    },
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


class Data:
    """The arrays of a case.

    `w` is the weight, None for an activation without, and `slope` what multiplies the
    inactive elements: a number, or the weight in a shape that broadcasts.  `target` is
    the array that a call must write, `target_w` the one for the weight's gradient, None
    for fresh ones.
    """

    def __init__(self, case: Case, slope: float) -> None:
        row, shape, dtype = case.row, case.shape, dtype_of(case.dtype)
        self.x = self.normal(shape, dtype, seed=0)
        self.g: Array = (
            None if row.passes == "forward" else self.normal(shape, dtype, seed=1)
        )
        self.slope: Any = slope if row.slope is None else row.slope
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
        first = self.x if self.g is None else self.g
        self.target: Array = None if case.mode == "fresh" else first
        self.target_w: Array = None
        if case.mode == "out":
            self.target = self.empty_like(first)
            self.target_w = None if self.w is None else self.empty_like(self.w)

    def normal(self, shape: tuple[int, ...], dtype: np.dtype[Any], seed: int) -> Array:
        """Return normal numbers; a large array repeats a block."""
        size = min(math.prod(shape), BLOCK)
        block = np.random.default_rng(seed).standard_normal(size)
        return np.resize(block.astype(dtype), shape)

    put = get = staticmethod(np.asarray)
    empty_like = staticmethod(np.empty_like)

    def expected(self, case: Case) -> Iterator[tuple[Array, Any]]:
        """Yield the results and how far off each may be, from obvious definitions."""
        eps = float(np.spacing(self.x.dtype.type(1)))
        x, slope = self.x.astype(np.float64), np.asarray(self.slope, np.float64)
        if case.row.passes != "backward":
            yield np.where(x > 0, x, slope * x), eps / 1024
        if self.g is not None:
            g = self.g.astype(np.float64)
            yield np.where(x > 0, g, slope * g), eps / 1024
            if self.w is not None:
                terms = np.where(x > 0, 0, x * g)
                # What is lost by a plain sum in the array's own type.
                scale = np.abs(terms).sum(self.others).reshape(self.w.shape)
                error = eps * math.sqrt(x.size / self.w.size) * scale
                yield terms.sum(self.others).reshape(self.w.shape), error
        elif case.row.mask:
            yield x > 0, 0


# Peers --------------------------------------------------------------------------------


class Unsupported(Exception):
    """A peer has no way to do a case; the message is the reason."""


class Peer:
    """A library and how it does the cases.

    The class says what can be said without the library, which an instance imports.
    """

    name: str
    modules: tuple[str, ...]  # the first is the one whose version counts
    activations: tuple[str, ...] = ("relu", "leaky_relu", "prelu")
    passes: tuple[str, ...] = ("forward", "backward", "both")
    modes: tuple[str, ...] = MODES
    dtypes: tuple[str, ...] = DTYPES
    masks = False  # can a forward pass keep a bit an element?

    @classmethod
    def missing(cls) -> str:
        """Say what is not installed, or nothing."""
        for module in cls.modules:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
        return ""

    @classmethod
    def lacks(cls, case: Case) -> str:
        """Say why the peer cannot do a case, or nothing."""
        for wanted, known, what in (
            (case.row.activation, cls.activations, case.row.activation),
            (case.row.passes, cls.passes, "backward pass"),
            (case.mode, cls.modes, f"mode {case.mode!r}"),
            (case.dtype, cls.dtypes, case.dtype),
        ):
            if wanted not in known:
                return f"{cls.name} has no {what}"
        if case.row.mask and case.row.passes == "forward" and not cls.masks:
            return f"{cls.name} keeps no mask"
        if case.dtype == "bfloat16" and importlib.util.find_spec("ml_dtypes") is None:
            return "ml_dtypes is not installed"
        return ""

    @classmethod
    def command(cls) -> list[str]:
        """Return the command that starts a worker."""
        return [sys.executable, "-m", "fastrelu._peers", cls.name]

    @classmethod
    def environment(cls) -> dict[str, str]:
        """Return what a worker's environment has more than ours."""
        return {}

    @property
    def version(self) -> str:
        """The version of the library."""
        return importlib.metadata.version(self.modules[0])

    def data(self, case: Case, slope: float) -> Data:
        """Return the arrays of a case where this library works."""
        return Data(case, slope)

    def call(self, case: Case, data: Data) -> Callable[[], Any]:
        """Return what is timed."""
        raise NotImplementedError

    def array(self, case: Case, result: Any) -> Array:
        """Return one result of a call as a NumPy array."""
        return result

    def arrays(self, case: Case, result: Any) -> list[Array]:
        """Return the results of a call as NumPy arrays."""
        if isinstance(result, tuple):
            return [a for part in result for a in self.arrays(case, part)]
        return [self.array(case, result)]


class FastRelu(Peer):
    """The public functions of this package."""

    name = "fastrelu"
    modules = ("fastrelu",)
    masks = True

    def call(self, case: Case, data: Data) -> Callable[[], Any]:
        """Return a call, or a forward and a backward one."""
        row = case.row
        more: dict[str, Any] = {"axis": data.axis} if row.activation == "prelu" else {}
        if case.mode == "inplace":
            more["inplace"] = True
        elif case.mode == "out":
            more["out"] = data.target
        if row.activation == "relu":
            slopes: tuple[Any, ...] = ()
        else:
            slopes = (data.slope if data.w is None else data.w,)
        function = getattr(activations, row.activation)
        if row.mask and row.passes == "forward":
            more["return_mask"] = True
        forward = partial(function, data.x, *slopes, **more)
        if row.passes == "forward":
            return forward
        saved = data.x
        if row.mask:
            _, saved = activations.relu(data.x, return_mask=True)
        if data.w is not None and case.mode == "out":
            more["out"] = data.target, data.target_w
        function = getattr(activations, f"{row.activation}_backward")
        backward = partial(function, data.g, saved, *slopes, **more)
        if row.passes == "backward":
            return backward
        return lambda: (forward(), backward())

    def array(self, case: Case, result: Any) -> Array:
        """Return an array as it is and a mask unpacked."""
        return result.unpack() if hasattr(result, "unpack") else result


class NumPy(Peer):
    """The quickest idioms that are widely known, written with ``out`` where it helps.

    Those for ReLU and Leaky ReLU do less than we do: the product gives NaN for an
    infinite gradient, and ``maximum`` holds for slopes from 0 to 1 only.
    """

    name = "numpy"
    modules = ("numpy",)
    dtypes = ("float16", "float32", "float64")
    masks = True

    def call(self, case: Case, data: Data) -> Callable[[], Any]:
        """Return an idiom."""
        x, g, slope, target = data.x, data.g, data.slope, data.target
        row = case.row

        def choose(a: Array) -> Array:
            if case.mode == "fresh":
                return np.where(x > 0, a, slope * a)
            if case.mode == "inplace":
                return np.multiply(a, slope, out=a, where=x <= 0)
            np.multiply(a, slope, out=target)
            np.copyto(target, a, where=x > 0)
            return target

        def leaky_relu() -> Array:
            product = np.multiply(x, slope, out=target if case.mode == "out" else None)
            return np.maximum(x, product, out=target)

        def prelu_backward() -> Any:
            sums = np.sum(np.where(x > 0, 0, x * g), axis=data.others)
            return choose(g), sums.reshape(data.w.shape)

        into = {} if target is None else {"out": target}

        def relu_mask() -> Any:
            bits = np.packbits(x > 0, bitorder="little")
            return np.maximum(x, 0, **into), bits

        calls: dict[tuple[str, str], Callable[[], Any]] = {
            ("relu", "forward"): partial(np.maximum, x, 0, **into),
            ("relu", "backward"): lambda: np.multiply(g, x > 0, **into),
            ("leaky_relu", "forward"): leaky_relu,
            ("leaky_relu", "backward"): lambda: choose(g),
            ("prelu", "forward"): lambda: choose(x),
            ("prelu", "backward"): prelu_backward,
            ("prelu", "both"): lambda: (choose(x), prelu_backward()),
        }
        if row.mask and row.passes == "forward":
            return relu_mask
        return calls[row.activation, row.passes]

    def array(self, case: Case, result: Any) -> Array:
        """Return an array as it is and bits unpacked."""
        if result.dtype != np.uint8:
            return result
        flags = np.unpackbits(result, count=math.prod(case.shape), bitorder="little")
        return flags.view(np.bool_)


class NumExpr(Peer):
    """numexpr, which computes an expression block by block on several threads."""

    name = "numexpr"
    modules = ("numexpr",)
    dtypes = ("float32", "float64")

    def call(self, case: Case, data: Data) -> Callable[[], Any]:
        """Return the evaluation of an expression."""
        import numexpr

        # A Python number would make the whole expression float64.
        names = {"x": data.x, "g": data.g, "s": np.asarray(data.slope, data.x.dtype)}

        def evaluate(expression: str, out: Array = None) -> Array:
            return numexpr.evaluate(expression, names, {}, out=out)

        # Products are twice as fast as its where(), which branches, and its maximum()
        # is for float64 only.
        factor = "(x > 0)"
        if case.row.activation != "relu":
            factor = "((x > 0) + s * (x <= 0))"
        forward, backward = f"x * {factor}", f"g * {factor}"

        def prelu_backward() -> Any:
            sums = evaluate("x * g * (x <= 0)").sum(data.others)
            return evaluate(backward, data.target), sums.reshape(data.w.shape)

        if case.row.passes == "both":
            return lambda: (evaluate(forward), prelu_backward())
        if case.row.passes == "forward":
            return partial(evaluate, forward, data.target)
        if data.w is not None:
            return prelu_backward
        return partial(evaluate, backward, data.target)


class Torch(Peer):
    """PyTorch on its default number of threads."""

    name = "torch"
    modules = ("torch",)

    @classmethod
    def lacks(cls, case: Case) -> str:
        """Say so for prelu anywhere but in a fresh array."""
        if case.row.activation == "prelu" and case.mode != "fresh":
            return "torch.prelu only makes new tensors"
        return super().lacks(case)

    def call(self, case: Case, data: Data) -> Callable[[], Any]:
        """Return a call of the function, or of what autograd calls for its gradient."""
        import torch

        def seen(array: Array) -> Any:
            if array is None:
                return None
            result = self.tensor(case, array)
            # A channels-last tensor still counts its channels as the second axis.
            return result.permute(0, 3, 1, 2) if _is_last(case, result) else result

        x, g, w, target = map(seen, (data.x, data.g, data.w, data.target))
        slope = data.slope
        functions = torch._C._nn
        if case.row.passes == "forward":
            calls: dict[tuple[str, str], Callable[[], Any]] = {
                ("relu", "fresh"): partial(torch.relu, x),
                ("relu", "out"): partial(torch.clamp_min, x, 0, out=target),
                ("relu", "inplace"): partial(torch.relu_, x),
                ("leaky_relu", "fresh"): partial(functions.leaky_relu, x, slope),
                ("leaky_relu", "out"): partial(
                    functions.leaky_relu, x, slope, out=target
                ),
                ("leaky_relu", "inplace"): partial(functions.leaky_relu_, x, slope),
                ("prelu", "fresh"): partial(torch.prelu, x, w),
            }
            return calls[case.row.activation, case.mode]
        if case.row.activation == "prelu":
            # No name for this gradient is public: this is what runs in training.
            inputs = x.requires_grad_(), w.requires_grad_()
            y = torch.prelu(x, w)
            if case.row.passes == "backward":
                return partial(torch.autograd.grad, y, inputs, g, retain_graph=True)

            def both() -> Any:
                y = torch.prelu(x, w)
                return y, torch.autograd.grad(y, inputs, g)

            return both
        if case.row.activation == "relu":
            name, more = "threshold_backward", [0]
        else:
            name, more = "leaky_relu_backward", [slope, False]
        function = getattr(torch.ops.aten, name)
        if target is None:
            return partial(function.default, g, x, *more)
        return partial(function.grad_input, g, x, *more, grad_input=target)

    def tensor(self, case: Case, array: Array) -> Any:
        """Return an array's memory as a tensor."""
        import torch

        if case.dtype == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def array(self, case: Case, result: Any) -> Array:
        """Return a tensor's memory as an array."""
        import torch

        if _is_last(case, result):
            result = result.permute(0, 2, 3, 1)
        result = result.detach()
        if result.dtype == torch.bfloat16:
            return result.view(torch.int16).numpy().view(dtype_of("bfloat16"))
        return result.numpy()


def _is_last(case: Case, tensor: Any) -> bool:
    return case.row.layout == "last" and tensor.ndim == 4


class TorchTcmalloc(Torch):
    """PyTorch with an allocator that keeps large blocks, a recipe of its tuning guide.

    glibc's malloc gives them back to the system, and their pages are new every time.
    """

    name = "torch-tcmalloc"

    @classmethod
    def missing(cls) -> str:
        """Say what is not installed, or nothing."""
        if not cls._library():
            return "libtcmalloc is not installed"
        return super().missing()

    @classmethod
    def environment(cls) -> dict[str, str]:
        """Return the setting that loads the allocator first."""
        return {"LD_PRELOAD": cls._library()}

    @staticmethod
    def _library() -> str:
        if not sys.platform.startswith("linux"):
            return ""
        found = map(ctypes.util.find_library, ("tcmalloc", "tcmalloc_minimal"))
        return next(filter(None, found), "")


class OnnxRuntime(Peer):
    """A model of one node in ONNX Runtime, with default options."""

    name = "onnxruntime"
    modules = ("onnxruntime", "onnx")
    passes = ("forward",)
    modes = ("fresh", "out")
    dtypes = ("float16", "float32", "float64")

    def call(self, case: Case, data: Data) -> Callable[[], Any]:
        """Return a run of the model."""
        import onnx
        import onnxruntime
        from onnx import helper, numpy_helper

        kind = helper.np_dtype_to_tensor_dtype(data.x.dtype)
        inputs, weights, options = ["x"], [], {}
        if data.w is not None:
            inputs.append("w")
            # PRelu broadcasts from the last axis.
            after = data.slope.shape[1:] if data.slope.ndim > 1 else data.slope.shape
            weights.append(numpy_helper.from_array(data.w.reshape(after), "w"))
        elif case.row.activation == "leaky_relu":
            options["alpha"] = data.slope
        name = {"relu": "Relu", "leaky_relu": "LeakyRelu", "prelu": "PRelu"}
        graph = helper.make_graph(
            [helper.make_node(name[case.row.activation], inputs, ["y"], **options)],
            "activation",
            [helper.make_tensor_value_info("x", kind, data.x.shape)],
            [helper.make_tensor_value_info("y", kind, data.x.shape)],
            weights,
        )
        model = helper.make_model(
            graph, opset_imports=[onnx.OperatorSetIdProto(version=17)], ir_version=8
        )
        try:
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), providers=["CPUExecutionProvider"]
            )
        except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
            msg = f"onnxruntime has no {case.op} for {case.dtype}"
            raise Unsupported(msg) from error
        value = onnxruntime.OrtValue.ortvalue_from_numpy
        if case.mode == "fresh":
            return partial(session.run_with_ort_values, ["y"], {"x": value(data.x)})
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", value(data.x))
        binding.bind_ortvalue_output("y", value(data.target))
        return partial(session.run_with_iobinding, binding)

    def arrays(self, case: Case, result: Any) -> list[Array]:
        """Return the output; a bound one is in its place already."""
        return [None] if result is None else [result[0].numpy()]


PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (FastRelu, NumPy, NumExpr, Torch, TorchTcmalloc, OnnxRuntime)
}


# In the worker ------------------------------------------------------------------------


def check(peer: Peer, case: Case) -> None:
    """Compare a peer's results on a small copy of a case with the obvious ones.

    Raises
    ------
    AssertionError
        If they differ by more than rounding.
    """
    case = replace(case, n=min(case.n, CHECKED))
    data, given = Data(case, SLOPE), peer.data(case, SLOPE)
    expected = list(data.expected(case))
    results = peer.arrays(case, peer.call(case, given)())
    if given.target is not None:
        results[0] = given.get(given.target)
    for i, (result, (wanted, error)) in enumerate(zip(results, expected, strict=False)):
        kind = data.x.dtype if wanted.dtype == np.float64 else wanted.dtype
        if (result.dtype, result.shape) != (kind, wanted.shape):
            msg = (
                f"result {i} is {result.dtype} of shape {result.shape}, "
                f"expected {kind} of shape {wanted.shape}"
            )
            raise AssertionError(msg)
        got = result.astype(np.float64)
        relative = 4 * float(np.spacing(data.x.dtype.type(1)))
        wrong = ~np.isclose(got, wanted, relative, error, equal_nan=True)
        if wrong.any():
            at = tuple(np.argwhere(wrong)[0].tolist())
            msg = f"result {i} is {got[at]:g} at {at}, expected {wanted[at]:g}"
            raise AssertionError(msg)


class Stopwatch:
    """A case of a peer, and how many calls make a sample.

    Every turn has new arrays: how they lie in memory, and in the caches, can make a
    tenth of the time, and more than that where it happens to suit or not to suit.
    """

    def __init__(self, peer: Peer, case: Case) -> None:
        check(peer, case)
        self.peer, self.case = peer, case
        timer = self.timer()
        self.number = 1
        timer.timeit(2)
        while (seconds := timer.timeit(self.number)) < SAMPLE:
            self.number *= 2
        self.samples = max(3, min(10, round(TURN / seconds)))

    def timer(self) -> timeit.Timer:
        """Return what times a call on new arrays."""
        # Products in place, again and again, would end in subnormals, which are slow
        # for everybody.
        slope = 1.0 if self.case.mode == "inplace" else SLOPE
        data = self.peer.data(self.case, slope)
        return timeit.Timer(self.peer.call(self.case, data))

    def turn(self) -> list[float]:
        """Warm up; return seconds per call."""
        timer = self.timer()
        timer.timeit(max(2, self.number))
        times = timer.repeat(self.samples, self.number)
        return [seconds / self.number for seconds in times]


def settle() -> None:
    """Wait until the other threads sleep, or for a second.

    Thread pools spin for a while in the hope of more work, ONNX Runtime's for 30 ms.
    On the cores that the next peer needs, that would make it look slow.
    """
    for _ in range(200):
        before = time.process_time()
        time.sleep(0.005)
        if time.process_time() - before < 0.0005:
            return


def serve(peer: Peer) -> None:
    """Answer the requests on stdin, a line of JSON each, until there are no more."""
    # What libraries print must not get between the answers: it goes with the errors.
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        print(json.dumps({"version": peer.version}), file=answers)
        stopwatch = None
        for line in sys.stdin:
            request, *arguments = json.loads(line)
            answer: dict[str, Any] = {}
            try:
                if request == "open":
                    stopwatch = Stopwatch(peer, Case.parse(*arguments))
                elif request == "close":
                    stopwatch = None
                elif stopwatch is not None:
                    answer["seconds"] = stopwatch.turn()
            except Unsupported as error:
                answer["cannot"] = str(error)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is told
                answer["error"] = f"{type(error).__name__}: {error}"
            settle()
            print(json.dumps(answer), file=answers)


# Beside the workers -------------------------------------------------------------------


@dataclass
class Result:
    """What came of a case with a peer.

    `seconds` are those of a call, one number per sample.  If there are none, `cannot`
    says why the peer does not do the case, or `error` what went wrong.
    """

    case: Case
    peer: str
    version: str = ""
    seconds: list[float] = field(default_factory=list)
    cannot: str = ""
    error: str = ""

    @property
    def median(self) -> float:
        """The median of the seconds."""
        return statistics.median(self.seconds)

    @property
    def gb_per_s(self) -> float:
        """The bytes that have to be moved, in 10^9 a second."""
        return self.case.bytes / self.median / 1e9


class WorkerError(Exception):
    """A worker has ended; the message says how."""


class Worker:
    """The process of one peer, started anew for the next case if it has ended."""

    def __init__(self, peer: type[Peer]) -> None:
        self.peer = peer
        self.version = ""
        self.start()

    def start(self) -> None:
        """Start the process and do not wait for it."""
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.is_new = True
        self.process = subprocess.Popen(
            self.peer.command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | self.peer.environment(),
            process_group=0,  # Ctrl-C is ours; the process ends when we do
        )

    def ask(self, *request: str) -> dict[str, Any]:
        """Send a request; return the answer.

        Raises
        ------
        WorkerError
            If there is none.
        """
        if self.is_new:
            self.is_new = False
            self.version = self._answer()["version"]
        with contextlib.suppress(OSError):  # it has ended: there will be no answer
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        status = self.process.wait()
        self.errors.seek(0)
        last = self.errors.read().strip().rpartition("\n")[2]
        msg = f"its process ended with status {status}" + (last and f": {last}")
        raise WorkerError(msg)

    def revive(self) -> None:
        """Start the process again if it has ended."""
        if self.process.poll() is not None:
            self.end()
            self.start()

    def end(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError), self.process:
            self.process.kill()
        self.errors.close()


class Team:
    """A worker for each peer; a context manager that ends them.

    Parameters
    ----------
    peers : iterable of Peer classes
        In the order of their turns.
    """

    def __init__(self, peers: Iterable[type[Peer]]) -> None:
        self.peers = list(peers)

    def __enter__(self) -> Self:
        self.workers = {peer.name: Worker(peer) for peer in self.peers}
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.end()

    def measure(
        self, case: Case, names: Iterable[str] | None = None, turns: int = TURNS
    ) -> list[Result]:
        """Measure a case.

        Parameters
        ----------
        case : Case
            What to measure.
        names : iterable of str, optional
            Who takes part, if not all.
        turns : int
            How often each takes its turn.

        Returns
        -------
        list of Result
            One per peer.
        """
        names = list(self.workers if names is None else names)
        results = {name: Result(case, name) for name in names}
        opened = [name for name in names if self._open(results[name])]
        for _ in range(turns):
            for name in opened:
                if not results[name].error:
                    self._ask(results[name], "turn")
        for name in opened:
            self._ask(results[name], "close")
        return list(results.values())

    def _open(self, result: Result) -> bool:
        worker = self.workers[result.peer]
        result.cannot = worker.peer.lacks(result.case)
        if not result.cannot:
            worker.revive()
            self._ask(result, "open", result.case.name)
            result.version = worker.version
        return not result.cannot and not result.error

    def _ask(self, result: Result, *request: str) -> None:
        try:
            answer = self.workers[result.peer].ask(*request)
        except WorkerError as error:
            answer = {"error": str(error)}
        result.seconds += answer.get("seconds", [])
        result.cannot = answer.get("cannot", "")
        result.error = result.error or answer.get("error", "")
        if result.error:
            result.seconds.clear()


def measure(
    cases: Iterable[Case], peers: Iterable[type[Peer]], turns: int = TURNS
) -> Iterator[Result]:
    """Measure every case with every peer, in turn.

    Parameters
    ----------
    cases : iterable of Case
        What to measure.
    peers : iterable of Peer classes
        Who takes part; see `PEERS`.
    turns : int
        How often each takes its turn.

    Yields
    ------
    Result
        One per case and peer.
    """
    with Team(peers) as team:
        for case in cases:
            yield from team.measure(case, turns=turns)


if __name__ == "__main__":
    serve(PEERS[sys.argv[1]]())
