"""The 1-bit saved state of an activation."""

import math
import operator
from typing import Any

import numpy as np

__all__ = ["Mask"]


class Mask:
    """Which units were active, ``x > 0``, one bit each.

    All that a backward pass of ReLU or Leaky ReLU needs to know, in 1/32 of the memory
    of a float32 input.  ``relu(x, return_mask=True)`` makes one in the same pass.

    Parameters
    ----------
    bits : numpy.ndarray of uint8
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
        If `bits` has another shape than `shape` asks for.

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
        if not isinstance(bits, np.ndarray) or bits.dtype != np.uint8:
            came = getattr(bits, "dtype", type(bits).__name__)
            msg = f"bits must be an array of uint8, got {came}"
            raise TypeError(msg)
        try:
            lengths = shape if isinstance(shape, tuple) else (shape,)
            self.shape = tuple(operator.index(length) for length in lengths)
        except TypeError as error:
            msg = f"shape must be an integer or a tuple of integers, got {shape!r}"
            raise TypeError(msg) from error
        size = -(-math.prod(self.shape) // 8)
        if min(self.shape, default=0) < 0 or bits.shape != (size,):
            msg = (
                f"bits must have shape ({size},) for a mask of shape {self.shape}, "
                f"got {bits.shape}"
            )
            raise ValueError(msg)
        self.bits = bits

    @property
    def nbytes(self) -> int:
        """The bytes that the bits take."""
        return int(self.bits.nbytes)

    def unpack(self) -> Any:
        """Return the mask as a bool array of its shape.

        Returns
        -------
        numpy.ndarray of bool
            True where the unit was active.
        """
        size = math.prod(self.shape)
        flags = np.unpackbits(self.bits, count=size, bitorder="little")
        return flags.view(np.bool_).reshape(self.shape)

    def __repr__(self) -> str:
        return f"Mask(shape={self.shape}, nbytes={self.nbytes})"
