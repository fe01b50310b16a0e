"""The peers: this package, and the libraries that it is measured against."""

import ctypes.util
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import numpy as np

from fastrelu import activations
from fastrelu.cli.peers.base import Peer, Unsupported
from fastrelu.cli.peers.cases import (
    ARGUMENTS,
    FUNCTIONS,
    THRESHOLD,
    VALUE,
    Case,
    Data,
    dtype_of,
)

Array = Any


class FastRelu(Peer):
    """The public functions of this package."""

    name = "fastrelu"
    modules = ("fastrelu",)
    activations = tuple(FUNCTIONS)
    arguments = tuple(ARGUMENTS)
    masks = True

    def call(self, case: Case, data: Data) -> Callable[[], Any]:
        """Return a call, or a forward and a backward one."""
        row, w = case.row, data.w
        more: dict[str, Any] = {} if w is None else {"axis": data.axis}
        if case.mode == "inplace":
            more["inplace"] = True
        elif case.mode == "out":
            more["out"] = data.target
        numbers = {
            "leaky_relu": [data.slope],
            "prelu": [w],
            "threshold": [THRESHOLD, VALUE],
            "rrelu": [data.lower, data.upper],
        }
        given = numbers.get(row.activation, [])
        numbers |= {"threshold": [THRESHOLD], "rrelu": [data.slope]}
        kept = numbers.get(row.activation, [])
        function = getattr(activations, row.activation)
        if row.mask and row.passes == "forward":
            more["return_mask"] = True
        forward = partial(function, data.x, *given, **more)
        if row.passes == "forward":
            return forward
        saved = data.x
        if row.mask:
            _, saved = function(data.x, *given, return_mask=True)
        if w is not None and case.mode == "out":
            more["out"] = data.target, data.target_w
        function = getattr(activations, f"{row.activation}_backward")
        backward = partial(function, data.g, saved, *kept, **more)
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
    activations = tuple(FUNCTIONS)
    arguments = tuple(ARGUMENTS)
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

        def squared_relu() -> Array:
            y = np.maximum(x, 0, out=target)
            return np.multiply(y, y, out=y)

        def squared_relu_backward() -> Array:
            gradient = np.maximum(x, 0, out=target)
            gradient *= 2
            gradient *= g
            return gradient

        def threshold() -> Array:
            if case.mode == "fresh":
                return np.where(x > THRESHOLD, x, VALUE)
            if case.mode == "out":
                np.copyto(target, x)
            np.copyto(target, VALUE, where=x <= THRESHOLD)
            return target

        into = {} if target is None else {"out": target}
        active = row.function.active

        def gate() -> Array:
            return np.multiply(g, active(x), **into)

        calls: dict[tuple[str, str], Callable[[], Any]] = {
            ("relu", "forward"): partial(np.maximum, x, 0, **into),
            ("relu", "backward"): gate,
            ("leaky_relu", "forward"): leaky_relu,
            ("leaky_relu", "backward"): lambda: choose(g),
            ("prelu", "forward"): lambda: choose(x),
            ("prelu", "backward"): prelu_backward,
            ("prelu", "both"): lambda: (choose(x), prelu_backward()),
            ("relu6", "forward"): partial(np.clip, x, 0, 6, **into),
            ("relu6", "backward"): gate,
            ("squared_relu", "forward"): squared_relu,
            ("squared_relu", "backward"): squared_relu_backward,
            ("threshold", "forward"): threshold,
            ("threshold", "backward"): gate,
            ("rrelu", "forward"): leaky_relu,
            ("rrelu", "backward"): lambda: choose(g),
        }
        call = calls[row.activation, row.passes]

        def masked() -> Any:
            bits = np.packbits(active(x), bitorder="little")
            return call(), bits  # in place there is no x any more

        def chosen() -> Any:
            mask = active(x)
            return np.where(mask, x, 0), mask

        if row.arguments == "nhwc":  # packbits would first copy bools to C order
            return chosen if g is None else partial(np.where, active(x), g, 0)
        return masked if row.mask and g is None else call

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

    # Products are twice as fast as its where(), which branches, and its maximum() is
    # for float64 only.
    _leaky = "x * ((x > 0) + s * (x <= 0))", "g * ((x > 0) + s * (x <= 0))"
    expressions: ClassVar = {
        "relu": ("x * (x > 0)", "g * (x > 0)"),
        "leaky_relu": _leaky,
        "prelu": _leaky,
        "relu6": ("x * ((x > 0) & (x < 6)) + 6 * (x >= 6)", "g * ((x > 0) & (x < 6))"),
        "squared_relu": ("x * x * (x > 0)", "2 * x * g * (x > 0)"),
        "threshold": ("x * (x > t) + v * (x <= t)", "g * (x > t)"),
        "rrelu": _leaky,
    }
    activations = tuple(expressions)

    def call(self, case: Case, data: Data) -> Callable[[], Any]:
        """Return the evaluation of an expression."""
        import numexpr

        # A Python number would make the whole expression float64.
        numbers = {"s": data.slope, "t": THRESHOLD, "v": VALUE}
        names = {k: np.asarray(v, data.x.dtype) for k, v in numbers.items()}
        names |= {"x": data.x, "g": data.g}

        def evaluate(expression: str, out: Array = None) -> Array:
            return numexpr.evaluate(expression, names, {}, out=out)

        forward, backward = self.expressions[case.row.activation]

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
    activations = tuple(FUNCTIONS)
    arguments = tuple(ARGUMENTS)

    @classmethod
    def lacks(cls, case: Case) -> str:
        """Say so for what only makes new tensors."""
        only_fresh = "prelu", "squared_relu_backward", "rrelu_backward"
        if case.mode != "fresh" and case.op.startswith(only_fresh):
            return f"torch only makes new tensors for {case.op}"
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
                ("relu6", "fresh"): partial(functions.relu6, x),
                ("relu6", "out"): partial(torch.clamp, x, 0, 6, out=target),
                ("relu6", "inplace"): partial(functions.relu6_, x),
                ("squared_relu", "fresh"): lambda: torch.relu(x).square_(),
                ("squared_relu", "out"): lambda: torch.clamp_min(
                    x, 0, out=target
                ).square_(),
                ("threshold", "fresh"): partial(torch.threshold, x, THRESHOLD, VALUE),
                ("threshold", "out"): partial(
                    torch.threshold, x, THRESHOLD, VALUE, out=target
                ),
                ("threshold", "inplace"): partial(
                    torch.threshold_, x, THRESHOLD, VALUE
                ),
                ("rrelu", "fresh"): partial(torch.rrelu, x, data.lower, data.upper),
                ("rrelu", "out"): partial(functions.leaky_relu, x, slope, out=target),
                ("rrelu", "inplace"): partial(torch.rrelu_, x, data.lower, data.upper),
            }
            if case.row.arguments == "broadcast":  # it wants one dimension
                return lambda: torch.prelu(x, w.flatten())
            return calls[case.row.activation, case.mode]
        if case.row.activation == "squared_relu":
            # A composition, whose gradient autograd composes.
            y = torch.relu(x.requires_grad_()).square()
            return partial(torch.autograd.grad, y, x, g, retain_graph=True)
        if case.row.activation == "prelu":
            # No name for this gradient is public: this is what runs in training.
            inputs = x.requires_grad_(), w.requires_grad_()
            y = torch.prelu(x, w.flatten())
            if case.row.passes == "backward":
                return partial(torch.autograd.grad, y, inputs, g, retain_graph=True)

            def both() -> Any:
                y = torch.prelu(x, w)
                return y, torch.autograd.grad(y, inputs, g)

            return both
        gradients: dict[str, tuple[Any, ...]] = {
            "relu": (torch.ops.aten.threshold_backward, 0),
            "leaky_relu": (torch.ops.aten.leaky_relu_backward, slope, False),
            "relu6": (torch.ops.aten.hardtanh_backward, 0, 6),
            "threshold": (torch.ops.aten.threshold_backward, THRESHOLD),
        }
        if case.row.activation == "rrelu":
            # What its forward pass keeps is a slope of 1 where x is positive.
            kept = torch.where(x > 0, 1, seen(slope)).to(x.dtype)
            function = torch.ops.aten.rrelu_with_noise_backward.default
            return partial(function, g, x, kept, data.lower, data.upper, True, False)
        function, *more = gradients[case.row.activation]
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

    # The operator, and its attribute that is the slope, if there is one.
    operators: ClassVar = {
        "relu": ("Relu", ""),
        "leaky_relu": ("LeakyRelu", "alpha"),
        "prelu": ("PRelu", ""),
        "relu6": ("Clip", ""),
        "rrelu": ("LeakyRelu", "alpha"),
    }
    activations = tuple(operators)

    def call(self, case: Case, data: Data) -> Callable[[], Any]:
        """Return a run of the model."""
        import onnx
        import onnxruntime
        from onnx import helper, numpy_helper

        type_ = helper.np_dtype_to_tensor_dtype(data.x.dtype)
        operator, attribute = self.operators[case.row.activation]
        options = {attribute: data.slope} if attribute else {}
        weights = {}
        if data.w is not None:
            # PRelu broadcasts from the last axis.
            after = data.slope.shape[1:] if data.slope.ndim > 1 else data.slope.shape
            weights["w"] = data.w.reshape(after)
        elif operator == "Clip":
            weights = {str(end): np.array(end, data.x.dtype) for end in (0, 6)}
        graph = helper.make_graph(
            [helper.make_node(operator, ["x", *weights], ["y"], **options)],
            "activation",
            [helper.make_tensor_value_info("x", type_, data.x.shape)],
            [helper.make_tensor_value_info("y", type_, data.x.shape)],
            [numpy_helper.from_array(array, name) for name, array in weights.items()],
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
