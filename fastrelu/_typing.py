"""The types that public functions speak of."""

from typing import Any, Protocol, SupportsFloat, TypeVar

from fastrelu.mask import Mask


class Array(Protocol):
    """An array of any library, or a scalar of NumPy's."""

    @property
    def shape(self) -> Any:
        """The lengths of the axes."""

    @property
    def dtype(self) -> Any:
        """The type of the elements."""


A = TypeVar("A", bound=Array)
B = TypeVar("B", bound=Array)

Real = float | SupportsFloat  # Python's numbers, NumPy's, fractions
Numbers = float | list[Any] | tuple[Any, ...]  # what arrays are made of
Weight = Array | Numbers
Saved = Array | Mask
