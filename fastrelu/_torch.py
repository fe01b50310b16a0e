"""Tensors of PyTorch's: what they carry beside numbers, and who is told of a change.

PyTorch is not imported here: whoever has a tensor has it.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

LEVEL = "_current_level"  # of forward-mode differentiation: -1 outside


def forward_mode() -> Any:
    """Return PyTorch's module of forward-mode differentiation."""
    return sys.modules["torch"].autograd.forward_ad


def is_tensor(value: Any) -> bool:
    """Ask the type alone."""
    type_: Any = type(value)
    return _is_of_tensors(type_)


@functools.lru_cache(256)
def _is_of_tensors(type_: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and issubclass(type_, getattr(torch, "Tensor", ()))


def is_plain(tensor: Any) -> bool:
    """Say whether a tensor is no more than numbers that lie in memory."""
    return _fault(tensor) is None


def refuse(tensor: Any) -> None:
    """Refuse a tensor that is more than numbers in memory, or less."""
    if fault := _fault(tensor):
        msg = "got {}: {}".format(*fault)
        raise TypeError(msg)


def _fault(tensor: Any) -> Sequence[str] | None:
    """Return what a tensor is, and what to write instead, or None if it is plain."""
    torch, type_ = sys.modules["torch"], type(tensor)
    if type_ is not torch.Tensor and _decides(type_):
        remedy = "take its .as_subclass(torch.Tensor), or the tensor in it"
        return f"{type_.__name__}, which carries more than numbers", remedy
    if tensor.is_nested:
        return "a nested tensor", "call this for each of its .unbind()"
    if tensor.is_quantized:
        return "a tensor of quantized numbers", "take its .dequantize()"
    if tensor.layout is not torch.strided:
        return f"a tensor of layout {tensor.layout}", "take its .to_dense()"
    if _is_followed(tensor):
        remedy = "take its .detach(), or call this within torch.no_grad()"
        return "a tensor whose gradient would be lost", remedy
    if torch.jit.is_tracing() or _is_recorded():
        return "a tensor where PyTorch traces, which would lose sight of it", _OUTSIDE
    if _address(tensor) == 0 and tensor.numel():
        return f"a {type_.__name__} that has no memory of its own", _OUTSIDE
    return None


_OUTSIDE = "call this where the numbers are there, outside of what PyTorch transforms"


def _decides(type_: Any) -> bool:
    """Say whether a class says for itself what becomes of its tensors."""
    plain = sys.modules["torch"]._C._disabled_torch_function_impl  # as a Parameter's
    return type_.__torch_function__ is not plain


def _is_followed(tensor: Any) -> bool:
    """Say whether a result would lose a gradient, of either mode."""
    if tensor.requires_grad and sys.modules["torch"].is_grad_enabled():
        return True
    forward = forward_mode()
    if getattr(forward, LEVEL) < 0:
        return False
    return forward.unpack_dual(tensor).tangent is not None


def _is_recorded() -> bool:
    """Say whether what is called is recorded, to be called again."""
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return tracer is not None and tracer.get_proxy_mode() is not None


def _address(tensor: Any) -> int:
    try:
        return int(tensor.data_ptr())
    except (RuntimeError, Warning):  # where PyTorch transforms functions
        return 0


def written(tensor: Any) -> None:
    """Let PyTorch know that a tensor's memory was written to.

    A backward pass that needs what was there before then refuses to run.
    """
    sys.modules["torch"].autograd.graph.increment_version(tensor)
