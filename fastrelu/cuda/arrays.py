"""Arrays on a GPU, whichever library they belong to.

What is asked of a library is where an array lies, the stream that its work is queued
on, and memory of its own for results.  PyTorch is named here alone.
"""

import functools
import math
import sys
from typing import Any

import numpy as np

from fastrelu.cuda import launch


class _Addresses:
    """Lets NumPy compute with the addresses of elements."""

    def __init__(self, **interface: Any) -> None:
        self.__array_interface__ = {"version": 3, **interface}


class Array:
    """An array as the engine sees it.

    Attributes
    ----------
    addresses : numpy.ndarray
        Of the same shape and strides at the same address, to slice and to compare.
        Its elements are on the GPU: nothing may read them.
    """

    def __init__(
        self,
        library: "Library",
        given: Any,
        dtype: str,
        device: int,
        addresses: Any,
        *,
        writeable: bool = True,
    ) -> None:
        self.library, self.given, self.dtype = library, given, dtype
        self.device, self.addresses, self.writeable = device, addresses, writeable
        self.shape: tuple[int, ...] = addresses.shape
        self.strides: tuple[int, ...] = addresses.strides
        self.ndim: int = addresses.ndim
        self.size: int = addresses.size
        self.itemsize: int = addresses.itemsize
        self.nbytes: int = addresses.nbytes

    @functools.cached_property
    def pointer(self) -> int:
        """The address of the first element."""
        return int(self.addresses.__array_interface__["data"][0])

    @property
    def is_aligned(self) -> bool:
        """Whether every element lies at a multiple of its size, as GPUs need it."""
        steps = [s for s, n in zip(self.strides, self.shape, strict=True) if n > 1]
        return all(n % self.itemsize == 0 for n in (self.pointer, *steps))

    def like(self, addresses: Any) -> "Array":
        """Return another view of the same memory."""
        return Array(
            self.library,
            self.given,
            self.dtype,
            self.device,
            addresses,
            writeable=self.writeable,
        )

    def reshape(self, shape: tuple[int, ...]) -> "Array":
        """Return a view with axes of one element put in or left out."""
        strides = iter(
            stride
            for stride, size in zip(self.strides, self.shape, strict=True)
            if size != 1
        )
        spread = tuple(next(strides) if size != 1 else 0 for size in shape)
        return self.like(addresses(self.pointer, shape, spread, self.itemsize))


def addresses(pointer: int, shape: tuple[int, ...], strides: Any, itemsize: int) -> Any:
    """Return the array that has these addresses; strides are in bytes, or None."""
    return np.asarray(
        _Addresses(
            data=(pointer, False),
            shape=tuple(shape),
            strides=strides,
            typestr=f"|V{itemsize}",
        )
    )


class Library:
    """What is asked of a library.  This one is any with an array interface."""

    def describe(self, given: Any) -> Array:
        """Return an array as the engine sees it."""
        if not hasattr(given, "__cuda_array_interface__"):
            return self._describe_capsule(given)
        interface = given.__cuda_array_interface__
        if interface.get("mask") is not None:
            msg = "got an array with a mask of gaps: fill them first"
            raise TypeError(msg)
        dtype = np.dtype(interface["typestr"])
        name = dtype.name if dtype.isnative else f"byte-swapped {dtype.name}"
        if "bfloat16" in str(getattr(given, "dtype", "")):
            name = "bfloat16"
        pointer, read_only = interface["data"]
        shape, strides = tuple(interface["shape"]), interface.get("strides")
        immutable = type(given).__module__.partition(".")[0] in ("jax", "jaxlib")
        return Array(
            self,
            given,
            name,
            _device(given, pointer),
            addresses(pointer or 0, shape, strides, dtype.itemsize),
            writeable=not (read_only or immutable),
        )

    def _describe_capsule(self, given: Any) -> Array:
        from cuda.core.utils import StridedMemoryView

        view = StridedMemoryView.from_dlpack(given, stream_ptr=1)  # 1: the legacy one
        strides = view.strides
        if strides is not None:
            strides = tuple(stride * view.dtype.itemsize for stride in strides)
        shape = tuple(view.shape)
        lies = addresses(view.ptr, shape, strides, view.dtype.itemsize)
        name = view.dtype.name
        return Array(
            self, view, name, view.device_id, lies, writeable=not view.readonly
        )

    def stream(self, array: Array) -> int:
        """Return the handle of the stream on which the array's work is queued."""
        interface = getattr(array.given, "__cuda_array_interface__", {})
        return _handle(interface.get("stream"))

    def empty_like(self, array: Array) -> Any:
        """Return an array of the same shape, dtype and memory order."""
        msg = f"out must be given: fastrelu cannot make a {type(array.given).__name__}"
        raise TypeError(msg)

    def empty_bytes(self, size: int, array: Array) -> Any:
        """Return a one-dimensional array of uint8 on the same device."""
        msg = (
            "return_mask must be False: fastrelu cannot make a "
            f"{type(array.given).__name__} for the mask"
        )
        raise TypeError(msg)

    def scratch(self, size: int, array: Array, stream: int) -> tuple[int, Any]:
        """Return the address of bytes for a while, and what gives them back."""
        memory = launch.scratch(size, stream, array.device)
        close = functools.partial(memory.close, launch.stream_of(stream))
        return int(memory.handle), close

    def unpack(self, bits: Any, size: int) -> Any:
        """Return the first bits of a mask as bools."""
        msg = f"fastrelu cannot make a {type(bits).__name__} of bools: see Mask.bits"
        raise TypeError(msg)


class _Pooled(Library):
    """A library whose pool lends memory in the order of its stream, in graphs too."""

    def scratch(self, size: int, array: Array, stream: int) -> tuple[int, Any]:
        memory = self.empty_bytes(size, array)
        return self.describe(memory).pointer, functools.partial(id, memory)


class _CuPy(_Pooled):
    def describe(self, given: Any) -> Array:
        lies = addresses(given.data.ptr, given.shape, given.strides, given.itemsize)
        return Array(self, given, given.dtype.name, given.device.id, lies)

    def stream(self, array: Array) -> int:
        return _handle(sys.modules["cupy"].cuda.get_current_stream().ptr)

    def empty_like(self, array: Array) -> Any:
        return sys.modules["cupy"].empty_like(array.given)

    def empty_bytes(self, size: int, array: Array) -> Any:
        return sys.modules["cupy"].empty(size, "uint8")

    def unpack(self, bits: Any, size: int) -> Any:
        flags = sys.modules["cupy"].unpackbits(bits, bitorder="little")
        return flags[:size].view("bool")


class _Numba(Library):
    def empty_like(self, array: Array) -> Any:
        from numba import cuda

        # Numba lays out C and Fortran order only.
        order = "F" if array.addresses.flags.f_contiguous and array.ndim > 1 else "C"
        return cuda.device_array(array.shape, np.dtype(array.dtype), order=order)

    def empty_bytes(self, size: int, array: Array) -> Any:
        from numba import cuda

        return cuda.device_array(size, np.uint8)


class _PyTorch(_Pooled):
    def describe(self, given: Any) -> Array:
        if given.requires_grad:
            msg = "got a tensor that requires a gradient: detach() it first"
            raise TypeError(msg)
        torch = sys.modules["torch"]
        if given.layout is not torch.strided or given.is_neg():
            msg = "got a tensor that is not plain: call to_dense() and resolve_neg()"
            raise TypeError(msg)
        size = given.element_size()
        strides = tuple(stride * size for stride in given.stride())
        lies = addresses(given.data_ptr(), tuple(given.shape), strides, size)
        name = str(given.dtype).removeprefix("torch.")
        return Array(self, given, name, given.get_device(), lies)

    def stream(self, array: Array) -> int:
        torch = sys.modules["torch"]
        return _handle(torch.cuda.current_stream(array.device).cuda_stream)

    def empty_like(self, array: Array) -> Any:
        return sys.modules["torch"].empty_like(array.given)

    def empty_bytes(self, size: int, array: Array) -> Any:
        torch = sys.modules["torch"]
        return torch.empty(size, dtype=torch.uint8, device=array.given.device)

    def unpack(self, bits: Any, size: int) -> Any:
        torch = sys.modules["torch"]
        places = torch.arange(8, dtype=torch.uint8, device=bits.device)
        flags = (bits[:, None] >> places) & 1
        return flags.to(torch.bool).reshape(-1)[:size]


_LIBRARIES = {"cupy": _CuPy(), "numba": _Numba(), "torch": _PyTorch()}
_ANY = Library()


def library_of(given: Any) -> Library:
    """Return the library that an array belongs to."""
    name = type(given).__module__.partition(".")[0]
    if name not in _LIBRARIES:
        for base in type(given).__mro__:
            if base.__module__.partition(".")[0] in _LIBRARIES:
                name = base.__module__.partition(".")[0]
                break
    return _LIBRARIES.get(name.replace("numba_cuda", "numba"), _ANY)


def _device(given: Any, pointer: int) -> int:
    if hasattr(given, "__dlpack_device__"):
        return int(given.__dlpack_device__()[1])
    return launch.device_of(pointer) if pointer else 0


def _handle(stream: Any) -> int:
    """Return one handle for each stream: the legacy one has two, 0 and 1."""
    return 0 if stream in (None, 1) else int(stream)


def unpack(bits: Any, shape: tuple[int, ...]) -> Any:
    """Return a mask's bits as bools of its shape."""
    return library_of(bits).unpack(bits, math.prod(shape)).reshape(shape)
