"""The 1-bit saved state of an activation."""

import math
import operator
import sys
from typing import Any

import numpy as np

from fastrelu._dtypes import name_of
from fastrelu._foreign import ANSWERS, has_gaps, is_foreign
from fastrelu._layout import memory_order

__all__ = ["Mask"]


class Mask:
    """Where a gradient passes, one bit each: for ReLU and Leaky ReLU, where ``x > 0``.

    All that their backward pass needs to know, in 1/32 of the memory of a float32 input.
    ``relu(x, return_mask=True)`` makes one in the same pass.

    Parameters
    ----------
    bits : array of uint8, in the host's memory or on a GPU
        One-dimensional, of ``ceil(prod(shape) / 8)`` bytes: the elements in the order of
        `axes`, the first in the lowest bit, as ``numpy.packbits(..., bitorder="little")``.
        Not copied.  What lies in the host's memory becomes an array of NumPy's.
    shape : int or tuple of int
        The shape of the array the mask was made from.
    axes : tuple of int, optional
        The axes of the array, from the one that varies slowest among the bits to the one
        that varies fastest; the default is C order.
    predicate : str
        What a bit says of an element: a backward pass refuses the mask of another one.

    Raises
    ------
    TypeError
        If `bits` is not an array of uint8, `shape` or `axes` holds something else than
        integers, or `predicate` is not a string.
    ValueError
        If no array has that `shape`, `bits` another than `shape` asks for, or `axes` are
        not all of its axes.

    Notes
    -----
    ``numpy.asarray(mask)`` is ``mask.unpack()``, so that a mask goes where NumPy takes
    an array.  Masks can be pickled and copied.

    Examples
    --------
    >>> import numpy as np
    >>> import fastrelu
    >>> y, mask = fastrelu.relu(np.array([-1.0, 2.0, 3.0]), return_mask=True)
    >>> mask.bits
    array([6], dtype=uint8)
    >>> mask.unpack()
    array([False,  True,  True])
    >>> mask.count()
    2
    """

    __slots__ = ("_axes", "bits", "predicate", "shape")

    bits: Any
    shape: tuple[int, ...]
    predicate: str
    _axes: tuple[int, ...] | None  # None is C order

    def __init__(
        self, bits: Any, shape: Any, axes: Any = None, predicate: str = "x > 0"
    ) -> None:
        type_ = type(bits)
        plain = bits
        if issubclass(type_, np.ndarray) and not has_gaps(type_):
            plain = np.asarray(bits)  # a subclass may have attributes of its own
        elif not is_foreign(type_) or not hasattr(bits, "dtype"):
            msg = f"bits must be an array of uint8, got {type_.__name__}"
            raise TypeError(msg)
        else:
            from fastrelu import _arguments, cpu

            if not _arguments.is_on_gpu(bits):
                (plain,) = _arguments.read(cpu, ("bits", bits))
        if name_of(plain.dtype) != "uint8":
            msg = f"bits must be an array of uint8, got {plain.dtype}"
            raise TypeError(msg)
        checked = _integers("shape", shape)
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
        order = None if axes is None else _integers("axes", axes)
        if order is not None and sorted(order) != list(range(len(checked))):
            msg = (
                f"axes must be all of 0 to {len(checked) - 1} in any order, got {order}"
            )
            raise ValueError(msg)
        if type(predicate) is not str:
            msg = f"predicate must be a string, got {type(predicate).__name__}"
            raise TypeError(msg)
        self.bits, self.shape, self.predicate = plain, checked, sys.intern(predicate)
        self._axes = _unless_c_order(order, checked)

    @classmethod
    def pack(cls, bools: Any, predicate: str = "x > 0") -> "Mask":
        """Return the mask of a bool array.

        Parameters
        ----------
        bools : array of bool
            True where the gradient passes.  Of NumPy, or what ``numpy.asarray`` makes
            such an array of.  One of Dask's gives a mask that is not computed yet.
        predicate : str
            What True says of an element.

        Returns
        -------
        Mask
            Its bits in the order in which `bools` lies in memory.

        Raises
        ------
        TypeError
            If `bools` is not of bools, lies on a GPU or carries more than bools, or
            `predicate` is not a string.

        Examples
        --------
        >>> from fastrelu import Mask
        >>> Mask.pack([True, False, True]).bits
        array([5], dtype=uint8)
        """
        from fastrelu import _arguments, _dispatch, cpu

        engine = _dispatch.lazily(bools)
        if engine is not None:
            lazy: Mask = engine.pack(bools, predicate)
            return lazy
        if _arguments.is_on_gpu(bools):
            msg = f"bools must be in the host's memory, got {type(bools).__name__}"
            raise TypeError(msg)
        (array,) = _arguments.read(cpu, ("bools", bools))
        if array.dtype != np.bool_:
            msg = f"bools must be an array of bool, got {array.dtype}"
            raise TypeError(msg)
        order = memory_order(array.shape, array.strides)
        bits = np.packbits(array.transpose(order), None, "little")
        return cls(bits, array.shape, order, predicate)

    @classmethod
    def _make(
        cls,
        bits: Any,
        shape: tuple[int, ...],
        axes: tuple[int, ...] | None,
        predicate: str,
    ) -> "Mask":
        """Make a mask without its checks: they could still want memory."""
        mask = cls.__new__(cls)
        mask.bits, mask.shape, mask._axes = bits, shape, _unless_c_order(axes, shape)
        mask.predicate = sys.intern(predicate)
        return mask

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes, from the one that varies slowest among the bits to the fastest."""
        return tuple(range(len(self.shape))) if self._axes is None else self._axes

    @property
    def nbytes(self) -> int:
        """The bytes that the bits take."""
        return -(-math.prod(self.shape) // 8)

    def unpack(self) -> Any:
        """Return the mask as a bool array of its shape.

        Returns
        -------
        array of bool
            True where the gradient passes; of the library that the bits are of, and in
            memory as the bits are.

        Raises
        ------
        TypeError
            If that library is not one that arrays can be asked of.

        Examples
        --------
        >>> from fastrelu import Mask
        >>> Mask.pack([[True, False], [False, False]]).unpack()
        array([[ True, False],
               [False, False]])
        """
        axes = self.axes
        lengths = tuple(self.shape[axis] for axis in axes)
        back = sorted(range(len(axes)), key=axes.__getitem__)
        if not isinstance(self.bits, np.ndarray):
            from fastrelu.cuda import arrays

            return arrays.unpack(self.bits, lengths, back)
        size = math.prod(self.shape)
        flags = np.unpackbits(self.bits, count=size, bitorder="little")
        return flags.view(np.bool_).reshape(lengths).transpose(back)

    def count(self, axis: int | tuple[int, ...] | None = None) -> Any:
        """Return how many elements have their bit set, which for ReLU are the active ones.

        Parameters
        ----------
        axis : int or tuple of int, optional
            The axes to count along; the default is all of them.

        Returns
        -------
        int or array of int
            An array where an axis is named, or where the bits lie on a GPU.

        Raises
        ------
        TypeError
            If `axis` is no integer, nor a tuple of them.
        ValueError
            If `axis` is none of the array's.

        Examples
        --------
        >>> from fastrelu import Mask
        >>> mask = Mask.pack([[True, False, True], [True, False, False]])
        >>> mask.count(), mask.count(axis=0)
        (3, array([2, 0, 1]))
        """
        if axis is not None:
            axis = _integers("axis", axis)
        if axis is not None or not isinstance(self.bits, np.ndarray):
            return self.unpack().sum(axis)
        whole, rest = divmod(math.prod(self.shape), 8)
        total = int(np.bitwise_count(self.bits[:whole]).sum(dtype=np.intp))
        if rest:  # what is behind the last element may be anything
            total += (int(self.bits[whole]) & ((1 << rest) - 1)).bit_count()
        return total

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """Return what `unpack` does, for NumPy."""
        if not isinstance(self.bits, np.ndarray):
            msg = "the bits of this mask are on a GPU: unpack it there"
            raise TypeError(msg)
        if copy is False:
            msg = "a mask has one bit each: an array of bools is always a copy"
            raise ValueError(msg)
        return self.unpack().astype(dtype or np.bool_, copy=False)

    def __bool__(self) -> bool:
        msg = "a mask has one bit for each element, not one for all: use mask.count()"
        raise ValueError(msg)

    def __reduce__(self) -> Any:
        return type(self), (self.bits, self.shape, self.axes, self.predicate)

    def __repr__(self) -> str:
        return f"Mask(shape={self.shape}, nbytes={self.nbytes})"


def _unless_c_order(
    axes: tuple[int, ...] | None, shape: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Return axes, or None where they are in C order but for those of length 1."""
    longer = [axis for axis in axes or () if shape[axis] != 1]
    return axes if longer != sorted(longer) else None


def _integers(name: str, value: Any) -> tuple[int, ...]:
    try:
        items = value if issubclass(type(value), tuple) else (value,)
        if any(issubclass(type(item), (bool, np.bool_)) for item in items):
            msg = "a bool is none"
            raise TypeError(msg)
        return tuple(operator.index(item) for item in items)
    except ANSWERS as error:
        msg = f"{name} must be an integer or a tuple of integers: {error}"
        raise TypeError(msg) from error
