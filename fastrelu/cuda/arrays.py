"""Arrays on a GPU, whichever library they belong to.

What is asked of a library is where an array lies, the stream that its work is queued
on, and memory of its own for results.
"""

import functools
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastrelu import _torch
from fastrelu._arguments import kind_of
from fastrelu._dtypes import name_of
from fastrelu._layout import c_strides
from fastrelu.cpu import between
from fastrelu.cuda import launch
from fastrelu.cuda.config import SIMULATED

Place = tuple[int, int, tuple[int, ...]]  # address, device and order, see `look`


class Array:
    """An array as the engine sees it: where its elements lie, and of what they are.

    Attributes
    ----------
    given : object
        What the caller gave, of its own library.
    """

    def __init__(
        self,
        library: "Library",
        given: Any,
        dtype: str,
        device: int,
        pointer: int,
        shape: Sequence[int],
        strides: Sequence[int] | None,
        itemsize: int,
        *,
        writeable: bool = True,
    ) -> None:
        self.library, self.given, self.dtype = library, given, dtype
        self.device, self.writeable = device, writeable
        self.pointer, self.itemsize = pointer, itemsize
        self.shape = tuple(shape)
        self.ndim, self.size = len(self.shape), math.prod(self.shape)
        if strides is None:
            strides = c_strides(self.shape, itemsize)
        self.strides = tuple(strides)
        self.kept: Any = None  # what must live as long as the array is used

    @functools.cached_property
    def addresses(self) -> Any:
        """The NumPy array of the same shape and strides at the same address.

        To slice and to compare: its elements are on the GPU, and nothing may read them.
        """
        return np.asarray(_Addresses(self))

    @functools.cached_property
    def bounds(self) -> tuple[int, int]:
        """The first address and the one behind the last."""
        reach = [(n - 1) * s for s, n in zip(self.strides, self.shape, strict=True)]
        low = self.pointer + sum(r for r in reach if r < 0)
        high = self.pointer + sum(r for r in reach if r > 0) + self.itemsize
        return (low, high) if self.size else (low, low)

    @property
    def is_aligned(self) -> bool:
        """Whether every element lies at a multiple of its size, as GPUs need it."""
        steps = [s for s, n in zip(self.strides, self.shape, strict=True) if n > 1]
        return all(n % self.itemsize == 0 for n in (self.pointer, *steps))

    def in_bytes(self) -> "Array":
        """Return a view of the elements' bytes, along one more axis."""
        shape, strides = (*self.shape, self.itemsize), (*self.strides, 1)
        lies = self.device, self.pointer, shape, strides, 1
        return Array(self.library, self.given, "uint8", *lies)

    def as_bytes(self) -> "Array":
        """Return a view of bools as the bytes that they are."""
        view = self._like(self.shape, self.strides)
        view.dtype = "uint8"
        return view

    def meets(self, other: "Array") -> bool:
        """Say whether the memory of two arrays may have a byte in common."""
        (low, high), (other_low, other_high) = self.bounds, other.bounds
        return low < other_high and other_low < high

    def spread(self, shape: Sequence[int]) -> "Array":
        """Return a view that repeats the array along new and longer axes."""
        ahead = len(shape) - self.ndim
        lengths = zip(shape[ahead:], self.shape, self.strides, strict=True)
        strides = [step if size == n else 0 for n, size, step in lengths]
        return self._like(shape, [0] * ahead + strides)

    def reshape(self, shape: Sequence[int]) -> "Array":
        """Return a view with axes of one element put in or left out."""
        lengths = zip(self.strides, self.shape, strict=True)
        strides = iter([stride for stride, size in lengths if size != 1])
        return self._like(shape, [next(strides) if n != 1 else 0 for n in shape])

    def _like(self, shape: Sequence[int], strides: Sequence[int]) -> "Array":
        lies = self.device, self.pointer, shape, strides, self.itemsize
        writeable = self.writeable
        return Array(self.library, self.given, self.dtype, *lies, writeable=writeable)


class _Addresses:
    def __init__(self, x: Array) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (x.pointer, not x.writeable),
            "shape": x.shape,
            "strides": x.strides,
            "typestr": f"|V{x.itemsize}",
        }


class Questions(NamedTuple):
    """What compiled code asks of arrays; the names of methods end in ()."""

    model: type  # of the arrays
    facts: dict[str, Any]  # what a plain array answers
    owner: str  # of the address and the device, where that is not the array
    start: str
    device: str
    size: str
    contiguous: str  # whether the order is C's
    strides: str
    unit: str  # of the strides, in bytes, where they do not count elements
    stream: Any  # called with the device
    handle: str  # of what that returns, where that is not the handle
    make: Any  # called with a shape and a dtype for an array in C order, or None
    empty_like: Any  # called with an array
    written: Any  # called with an array of the caller's that was written to, or None
    uint8: Any
    around: tuple[Any, str, Any] | None  # a module, its attribute, what that must be
    captures: bool  # whether memory that a graph's calls lent must be kept


class Library:
    """What is asked of a library.  This one is any with an array interface or DLPack."""

    def describe(self, given: Any) -> Array:
        """Return an array as the engine sees it."""
        if not hasattr(given, "__cuda_array_interface__"):
            return self._describe_capsule(given)
        interface = given.__cuda_array_interface__
        if interface.get("mask") is not None:
            msg = "got an array with a mask of gaps: fill them first"
            raise TypeError(msg)
        dtype = np.dtype(interface["typestr"])
        own = getattr(given, "dtype", None)  # which may say what a letter cannot
        name = name_of(own if isinstance(own, np.dtype) else dtype)
        if str(own).endswith("bfloat16") and dtype.itemsize == 2:
            name = "bfloat16"
        pointer, read_only = interface["data"]
        if not pointer and math.prod(interface["shape"]):
            msg = f"got {kind_of(given)} that has no memory"
            raise TypeError(msg)
        if hasattr(given, "__dlpack_device__"):
            device = int(given.__dlpack_device__()[1])
        else:
            device = launch.device_of(pointer) if pointer else 0
        immutable = type(given).__module__.partition(".")[0] in ("jax", "jaxlib")
        return Array(
            self,
            given,
            name,
            device,
            pointer or 0,
            interface["shape"],
            interface.get("strides"),
            dtype.itemsize,
            writeable=not (read_only or immutable),
        )

    def _describe_capsule(self, given: Any) -> Array:
        from cuda.core.utils import StridedMemoryView

        view = StridedMemoryView.from_dlpack(given, stream_ptr=1)  # 1: the legacy one
        size, strides = view.dtype.itemsize, view.strides
        if strides is not None:
            strides = [stride * size for stride in strides]
        array = Array(
            self,
            given,
            name_of(view.dtype),
            view.device_id,
            view.ptr,
            view.shape,
            strides,
            size,
            writeable=not view.readonly,
        )
        array.kept = view
        return array

    def look(self, given: Any) -> Place | None:
        """Return (address, device, order) of a plain array, or None for any other.

        It lies in one piece, and nothing about it asks for a refusal.  The order is ()
        if it is C's, else the strides.
        """

    def address(self, given: Any) -> int:
        """Return the address of the first element."""
        return self.describe(given).pointer

    def questions(self, type_: Any) -> Questions | None:
        """Return what compiled code is to ask arrays of a type, if that is known."""

    def stream(self, given: Any, device: int) -> int:
        """Return the handle of the stream on which an array's work is queued."""
        interface = getattr(given, "__cuda_array_interface__", {})
        return _handle(interface.get("stream"))

    def empty_like(self, given: Any) -> Any:
        """Return an array of the same shape, dtype and memory order."""
        msg = f"out must be given: fastrelu cannot make a {type(given).__name__}"
        raise TypeError(msg)

    def uniform(self, given: Any, lower: float, upper: float, rng: Any) -> Any:
        """Return an array like another of random numbers, in the type of products."""
        msg = f"training must be False: fastrelu cannot draw a {type(given).__name__}"
        raise TypeError(msg)

    def empty_bytes(self, size: int, given: Any) -> Any:
        """Return a one-dimensional array of uint8 on the same device."""
        msg = (
            "return_mask must be False: fastrelu cannot make a "
            f"{type(given).__name__} for the mask"
        )
        raise TypeError(msg)

    def lend(self, size: int, given: Any, device: int, stream: int) -> tuple[int, Any]:
        """Return the address of bytes for a while, and what gives them back."""
        memory = launch.scratch(size, stream, device)
        close = functools.partial(memory.close, launch.stream_of(stream))
        return int(memory.handle), close

    def keep(self, memory: Any, stream: int) -> None:
        """Take note of an array that a call has for itself on a stream."""

    def written(self, given: Any) -> None:
        """Take note that an array of the caller's was written to."""

    def unpack(self, bits: Any, size: int) -> Any:
        """Return the first bits of a mask as bools."""
        msg = f"fastrelu cannot make a {type(bits).__name__} of bools: see Mask.bits"
        raise TypeError(msg)

    def transpose(self, given: Any, order: Any) -> Any:
        """Return a view with its axes in another order."""
        return given.transpose(order)


class _Pooled(Library):
    """A library whose pool lends memory in the order of its stream, in graphs too."""

    def lend(self, size: int, given: Any, device: int, stream: int) -> tuple[int, Any]:
        memory = self.empty_bytes(size, given)
        self.keep(memory, stream)
        return self.address(memory), functools.partial(id, memory)


# What graphs write to, as long as the process lives: nobody tells of a graph's end.
_captured: list[Any] = []


class _CuPy(_Pooled):
    def keep(self, memory: Any, stream: int) -> None:
        # A graph writes to it at each replay, and its pool would lend it to others.
        if launch.is_capturing(stream):
            _captured.append(memory)

    def describe(self, given: Any) -> Array:
        if _carries_more(given):
            msg = (
                f"got {type(given).__name__}, which carries more than numbers: take its "
                ".view(cupy.ndarray)"
            )
            raise TypeError(msg)
        data, name = given.data, name_of(given.dtype)
        lies = data.ptr, given.shape, given.strides, given.itemsize
        return Array(self, given, name, data.device_id, *lies)

    def look(self, given: Any) -> Place | None:
        if _carries_more(given):
            return None
        data = given.data
        order: tuple[int, ...] | None = ()
        plain = getattr(given, "_c_contiguous", None)
        if plain is None:  # these flags are an object, which takes five times as long
            plain = given.flags.c_contiguous
        if not plain:
            order = _order(given.shape, given.strides, given.itemsize)
        return None if order is None else (data.ptr, data.device_id, order)

    def address(self, given: Any) -> int:
        return int(given.data.ptr)

    def questions(self, type_: Any) -> Questions | None:
        cupy = sys.modules["cupy"]
        if type_ is not cupy.ndarray or not hasattr(type_, "_c_contiguous"):
            return None
        return Questions(
            model=type_,
            facts={},
            owner="data",
            start="ptr",
            device="device_id",
            size="size",
            contiguous="_c_contiguous",
            strides="strides",
            unit="itemsize",
            stream=cupy.cuda.get_current_stream,
            handle="ptr",
            make=type_,
            empty_like=self.empty_like,
            written=None,
            uint8=np.dtype(np.uint8),
            around=None,
            captures=True,
        )

    def stream(self, given: Any, device: int) -> int:
        handle: int = sys.modules["cupy"].cuda.get_current_stream(device).ptr
        return 0 if handle == 1 else handle

    def empty_like(self, given: Any) -> Any:
        cupy = sys.modules["cupy"]
        if given.flags.c_contiguous:  # in less than half of empty_like's time
            return cupy.ndarray(given.shape, given.dtype)
        strides = _order(given.shape, given.strides, given.itemsize)
        if strides is None:
            return cupy.empty_like(given)
        memory = cupy.cuda.alloc(given.nbytes)  # in a third of it
        return cupy.ndarray(given.shape, given.dtype, memory, strides)

    def uniform(self, given: Any, lower: float, upper: float, rng: Any) -> Any:
        random = sys.modules["cupy"].random
        if rng is not None and not isinstance(rng, random.Generator):
            msg = f"rng must be a cupy.random.Generator or None, got {kind_of(rng)}"
            raise TypeError(msg)
        dtype = "float64" if given.itemsize == 8 else "float32"
        drawn = (rng or random).random(given.shape, dtype)
        return between(drawn, lower, upper, dtype).astype(given.dtype, copy=False)

    def empty_bytes(self, size: int, given: Any) -> Any:
        return sys.modules["cupy"].ndarray((size,), np.uint8)

    def unpack(self, bits: Any, size: int) -> Any:
        flags = sys.modules["cupy"].unpackbits(bits, bitorder="little")
        return flags[:size].view("bool")


def _carries_more(given: Any) -> bool:
    """Say whether an array is of a class that says for itself what results are."""
    type_, plain, name = type(given), sys.modules["cupy"].ndarray, "__array_finalize__"
    if type_ is plain:
        return False
    return getattr(type_, name, None) is not getattr(plain, name, None)


class _Numba(Library):
    def describe(self, given: Any) -> Array:
        place, name = self._place(given), name_of(given.dtype)
        lies = given.shape, given.strides, given.dtype.itemsize
        return Array(self, given, name, place[1], place[0], *lies)

    def look(self, given: Any) -> Place | None:
        if given.stream:  # of its own: it may be another one for each array
            return None
        order: tuple[int, ...] | None = ()
        if not given.is_c_contiguous():
            order = _order(given.shape, given.strides, given.dtype.itemsize)
        return None if order is None else (*self._place(given), order)

    @staticmethod
    def _place(given: Any) -> tuple[int, int]:
        """Return the address and the device."""
        if SIMULATED:
            return given.ctypes.data, 0
        pointer = given.device_ctypes_pointer.value or 0
        return pointer, launch.device_of(pointer) if pointer else 0

    def stream(self, given: Any, device: int) -> int:
        return _handle(int(given.stream) if given.stream else None)

    def empty_like(self, given: Any) -> Any:
        from numba import cuda

        # Numba lays out C and Fortran order only.
        order = "C" if given.is_c_contiguous() or not given.is_f_contiguous() else "F"
        return cuda.device_array(given.shape, given.dtype, order=order)

    def empty_bytes(self, size: int, given: Any) -> Any:
        from numba import cuda

        return cuda.device_array(size, np.uint8)


class _PyTorch(_Pooled):
    def describe(self, given: Any) -> Array:
        _torch.refuse(given)
        if given.is_neg():
            msg = "got a tensor of the negatives of its memory: take its .resolve_neg()"
            raise TypeError(msg)
        size, name = given.element_size(), name_of(given.dtype)
        strides = [stride * size for stride in given.stride()]
        lies = given.data_ptr(), given.shape, strides, size
        return Array(self, given, name, given.get_device(), *lies)

    def look(self, given: Any) -> Place | None:
        if not given.is_cuda or not _torch.is_plain(given) or given.is_neg():
            return None
        order = () if given.is_contiguous() else _order(given.shape, given.stride(), 1)
        return None if order is None else (given.data_ptr(), given.get_device(), order)

    def address(self, given: Any) -> int:
        return int(given.data_ptr())

    def written(self, given: Any) -> None:
        _torch.written(given)

    def questions(self, type_: Any) -> Questions | None:
        torch = sys.modules["torch"]
        facts = {
            "is_cuda": True,
            "requires_grad": False,
            "layout": torch.strided,
            "is_neg()": False,
            "is_nested": False,
        }
        return Questions(
            model=type_,
            facts=facts,
            owner="",
            start="data_ptr()",
            device="get_device()",
            size="numel()",
            contiguous="is_contiguous()",
            strides="stride()",
            unit="",
            stream=torch._C._cuda_getCurrentRawStream,
            handle="",
            make=None,
            empty_like=torch.empty_like,
            written=torch.autograd.graph.increment_version,
            uint8=torch.uint8,
            around=(_torch.forward_mode(), _torch.LEVEL, -1),
            captures=False,
        )

    def stream(self, given: Any, device: int) -> int:
        # The public current_stream makes an object, which takes longer than a launch.
        handle: int = sys.modules["torch"]._C._cuda_getCurrentRawStream(device)
        return 0 if handle == 1 else handle

    def empty_like(self, given: Any) -> Any:
        return sys.modules["torch"].empty_like(given)

    def uniform(self, given: Any, lower: float, upper: float, rng: Any) -> Any:
        torch = sys.modules["torch"]
        if rng is not None and not isinstance(rng, torch.Generator):
            msg = f"rng must be a torch.Generator or None, got {kind_of(rng)}"
            raise TypeError(msg)
        dtype = "float64" if given.element_size() == 8 else "float32"
        options = {"generator": rng, "device": given.device}
        drawn = torch.rand(given.shape, dtype=getattr(torch, dtype), **options)
        return between(drawn, lower, upper, dtype).to(given.dtype)

    def empty_bytes(self, size: int, given: Any) -> Any:
        torch = sys.modules["torch"]
        return torch.empty(size, dtype=torch.uint8, device=given.device)

    def unpack(self, bits: Any, size: int) -> Any:
        torch = sys.modules["torch"]
        places = torch.arange(8, dtype=torch.uint8, device=bits.device)
        flags = (bits[:, None] >> places) & 1
        return flags.to(torch.bool).reshape(-1)[:size]

    def transpose(self, given: Any, order: Any) -> Any:
        return given.permute(order)


_LIBRARIES = {"cupy": _CuPy(), "numba": _Numba(), "torch": _PyTorch()}
_ANY = Library()


def library_of(type_: type) -> Library:
    """Return the library that arrays of a type belong to."""
    for base in type_.__mro__:
        name = base.__module__.partition(".")[0].replace("numba_cuda", "numba")
        if name in _LIBRARIES:
            return _LIBRARIES[name]
    return _ANY


@functools.lru_cache(1024)
def _order(
    shape: Sequence[int], strides: Sequence[int], itemsize: int
) -> tuple[int, ...] | None:
    """Return the strides of an array that lies in one piece, or None."""
    step = itemsize
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if length != 1:
            if stride != step:
                return None
            step *= length
    return tuple(strides)


def _handle(stream: Any) -> int:
    """Return one handle for each stream: the legacy one has two, 0 and 1."""
    return 0 if stream in (None, 1) else int(stream)


def unpack(bits: Any, shape: tuple[int, ...], order: Any = None) -> Any:
    """Return a mask's bits as bools of this shape, and its axes then in an order."""
    library = library_of(type(bits))
    flags = library.unpack(bits, math.prod(shape)).reshape(shape)
    return flags if order is None else library.transpose(flags, order)
