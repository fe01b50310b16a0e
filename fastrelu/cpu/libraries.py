"""Arrays of other libraries in the host's memory: read without a copy, and given back.

What is more than numbers (labels, units, masks, laziness, gradients) is refused, with the
line to write instead.  No library is imported here: whoever has its arrays has it.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from fastrelu import _torch
from fastrelu._arguments import is_number, is_on_gpu
from fastrelu._dtypes import name_of
from fastrelu._foreign import has_gaps
from fastrelu._torch import is_tensor
from fastrelu.mask import Mask

Array = Any

# What to write instead, by the package that a type is of, or for one type of it.
_REMEDIES = {
    "astropy": "take its .value",
    "awkward": "take awkward.to_numpy of it",
    "dask": "take its .to_dask_array(), or dask.array.from_delayed of it",
    "jax": "call this by way of jax.pure_callback where JAX traces",
    "pandas": "take its .to_numpy()",
    "pint": "take its .magnitude",
    "polars": "take its .to_numpy()",
    "polars.LazyFrame": "take its .collect().to_numpy()",
    "pyarrow": "take its .to_numpy()",
    "pyarrow.RecordBatch": "take the .to_numpy() of each column",
    "pyarrow.Table": "take the .to_numpy() of each column",
    "quantities": "take its .magnitude",
    "sparse": "take its .todense()",
    "scipy": "take its .toarray()",
    "tensorflow": "take its .numpy()",
    "unyt": "take its .value",
    "xarray": "take its .to_numpy(), or use xarray.apply_ufunc(fastrelu.relu, x)",
}


def refuse(value: Any) -> None:
    """Refuse what carries more than numbers, which a result would not have."""
    _refuse(type(value))


def refuse_within(items: Any) -> None:
    """Refuse it in lists, of which NumPy would take the numbers alone."""
    types = set(map(type, items))
    for type_ in types:
        _refuse(type_)
    if not types.isdisjoint(LISTS):
        for each in items:
            if type(each) in LISTS:
                refuse_within(each)


LISTS = list, tuple


def _refuse(type_: Any) -> None:
    package = str(type_.__module__).partition(".")[0]
    remedy = _REMEDIES.get(f"{package}.{type_.__name__}", _REMEDIES.get(package))
    if has_gaps(type_):
        remedy = "fill its gaps first"
    elif issubclass(type_, np.ndarray) and remedy is None:
        if type_ in (np.ndarray, np.memmap) or not _carries_more(type_):
            return
        remedy = "take numpy.asarray of it"
    if remedy is not None:
        msg = f"got {type_.__name__}, which carries more than numbers: {remedy}"
        raise TypeError(msg)


def _carries_more(type_: type) -> bool:
    """Say whether a subclass of NumPy's array says for itself what results are."""
    names = "__array_finalize__", "__array_ufunc__", "__array_wrap__"
    theirs = [getattr(type_, name) is not getattr(np.ndarray, name) for name in names]
    return any(theirs) and type_.__module__.partition(".")[0] != "numpy"


def read(value: Any, to_write: bool) -> Array | None:
    """Return the NumPy array on an array of another library, or None for all else."""
    if is_tensor(value):
        return _read_tensor(value, to_write)
    if _namespace_of(value) is not None:
        with contextlib.suppress(BufferError, RuntimeError, TypeError):
            return np.from_dlpack(value)
        with contextlib.suppress(RuntimeError):  # a dtype that has no such name
            return np.asarray(value)
    return None


def _namespace_of(value: Any) -> Callable[[Any], Any] | None:
    """Return what gives the namespace of an array that follows the array API."""
    type_ = type(value)
    found: Any = getattr(type_, "__array_namespace__", None)
    return found if hasattr(type_, "__dlpack__") else None


_AS_THEY_ARE = frozenset((np.ndarray, type(None), bool, float, int, Mask))


def has_array(value: Any) -> bool:
    """Say whether a value is of another class, with an array on memory of the host's."""
    return type(value) is np.memmap or (is_tensor(value) and not is_on_gpu(value))


def array_on(value: Any) -> Any:
    """Return the array on what is plainly of another class; all else as it came."""
    if type(value) in _AS_THEY_ARE:  # nearly all
        return value
    if type(value) is np.memmap:
        return np.ndarray.view(value, np.ndarray)
    if not (is_tensor(value) and _torch.is_plain(value) and value.is_cpu):
        return value
    array = None if _is_lazily_negative(value) else _on_tensor(value)
    return value if array is None else array


def as_came(y: Array, *given: Any) -> Any:
    """Return a result as what the arguments were: a number, or of their library."""
    if all(map(is_number, given)):
        return y[()]
    return _giving_back(given[0])(y)


def written(value: Any) -> None:
    """Let an array's library know that its memory was written to."""
    if is_tensor(value):
        _torch.written(value)


def _giving_back(value: Any) -> Callable[[Array], Any]:
    if issubclass(type(value), np.ndarray):
        return np.asarray
    if is_tensor(value):
        return _tensor
    namespace = _namespace_of(value)
    if namespace is None:
        return np.asarray
    found = namespace(value)
    return lambda y: found.from_dlpack(y) if y.dtype.kind != "V" else found.asarray(y)


# PyTorch ------------------------------------------------------------------------------


def _read_tensor(value: Any, to_write: bool) -> Array:
    _torch.refuse(value)
    if to_write and _is_lazily_negative(value):
        msg = "got a tensor of the negatives of its memory: take its .resolve_neg()"
        raise TypeError(msg)
    array = _on_tensor(value.resolve_conj().resolve_neg())
    if array is None:
        needed = ", for which NumPy needs the package ml_dtypes"
        more = needed if value.dtype is sys.modules["torch"].bfloat16 else ""
        msg = f"got a tensor of {name_of(value.dtype)}{more}"
        raise TypeError(msg)
    return array


def _is_lazily_negative(tensor: Any) -> bool:
    return bool(tensor.is_neg() or tensor.is_conj())


def _on_tensor(tensor: Any) -> Array | None:
    """Return the array on a tensor's memory, or None where NumPy has no such dtype."""
    torch: Any = sys.modules["torch"]
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype is not torch.bfloat16:
        with contextlib.suppress(TypeError):
            return tensor.numpy()
        return None
    with contextlib.suppress(ImportError):
        bfloat16 = importlib.import_module("ml_dtypes").bfloat16
        return tensor.view(torch.int16).numpy().view(bfloat16)
    return None


def _tensor(y: Array) -> Any:
    torch: Any = sys.modules["torch"]
    if y.dtype.kind == "V":
        return torch.from_numpy(y.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(y)
