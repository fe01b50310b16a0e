"""The 1-bit saved state of an activation."""

import math
import operator
from typing import Any

import numpy as np

from fastrelu._dtypes import name_of

__all__ = ["Mask"]

# What other people's code raises where it cannot answer.  Anything else that comes
# while it runs is not its answer but a signal handler's, say, and passes unchanged.
ANSWERS = (
    TypeError,
    ValueError,
    ArithmeticError,
    AttributeError,
    BufferError,
    LookupError,
    RuntimeError,
    Warning,  # which may be made an error
)


def is_foreign(kind: type) -> bool:
    """Say whether objects of a type may be arrays of another library."""
    names = "__cuda_array_interface__", "__dlpack_device__", "__cuda_ndarray__"
    return kind is not np.ndarray and any(hasattr(kind, name) for name in names)


class Mask:
    """Which units were active, ``x > 0``, one bit each.

    All that a backward pass of ReLU or Leaky ReLU needs to know, in 1/32 of the memory
    of a float32 input.  ``relu(x, return_mask=True)`` makes one in the same pass.

    Parameters
    ----------
    bits : array of uint8, of NumPy or on a GPU
        One-dimensional, of ``ceil(prod(shape) / 8)`` bytes: the elements in C order,
        the first in the lowest bit, as ``numpy.packbits(..., bitorder="little")``.
        Not copied.
    shape : int or tuple of int
        The shape of the array the mask was made from.

    Raises
    ------
    TypeError
        If `bits` is not an array of uint8, or `shape` holds something else than
        integers.
    ValueError
        If no array has that `shape`, or `bits` another than `shape` asks for.

    Examples
    --------
    >>> import numpy as np
    >>> import fastrelu
    >>> y, mask = fastrelu.relu(np.array([-1.0, 2.0, 3.0]), return_mask=True)
    >>> mask.bits
    array([6], dtype=uint8)
    >>> mask.unpack()
    array([False,  True,  True])
    """

    __slots__ = ("bits", "shape")

    bits: Any
    shape: tuple[int, ...]

    def __init__(self, bits: Any, shape: Any) -> None:
        kind = type(bits)
        plain = bits
        if issubclass(kind, np.ndarray) and not issubclass(kind, np.ma.MaskedArray):
            plain = np.asarray(bits)  # a subclass may have attributes of its own
        elif not is_foreign(kind) or not hasattr(bits, "dtype"):
            msg = f"bits must be an array of uint8, got {kind.__name__}"
            raise TypeError(msg)
        if name_of(plain.dtype) != "uint8":
            msg = f"bits must be an array of uint8, got {plain.dtype}"
            raise TypeError(msg)
        try:
            lengths = shape if issubclass(type(shape), tuple) else (shape,)
            checked = tuple(operator.index(length) for length in lengths)
        except ANSWERS as error:
            msg = f"shape must be an integer or a tuple of integers: {error}"
            raise TypeError(msg) from error
        try:
            np.broadcast_to(True, checked)
        except ValueError as error:
            msg = f"shape must be that of an array: {error}"
            raise ValueError(msg) from error
        size = -(-math.prod(checked) // 8)
        if tuple(plain.shape) != (size,):
            msg = (
                f"bits must have shape ({size},) for a mask of shape {checked}, "
                f"got {plain.shape}"
            )
            raise ValueError(msg)
        self.bits, self.shape = plain, checked

    @property
    def nbytes(self) -> int:
        """The bytes that the bits take."""
        return -(-math.prod(self.shape) // 8)

    def unpack(self) -> Any:
        """Return the mask as a bool array of its shape.

        Returns
        -------
        array of bool
            True where the unit was active; of the library that the bits are of.

        Raises
        ------
        TypeError
            If that library is not one that arrays can be asked of.
        """
        if not isinstance(self.bits, np.ndarray):
            from fastrelu.cuda import arrays

            return arrays.unpack(self.bits, self.shape)
        size = math.prod(self.shape)
        flags = np.unpackbits(self.bits, count=size, bitorder="little")
        return flags.view(np.bool_).reshape(self.shape)

    def __repr__(self) -> str:
        return f"Mask(shape={self.shape}, nbytes={self.nbytes})"
