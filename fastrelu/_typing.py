"""The types that public functions speak of."""

from typing import Any, Protocol, SupportsFloat, TypeVar

import numpy as np

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

Numbers = float | list[Any] | tuple[Any, ...]  # what arrays are made of
Real = SupportsFloat  # one number: Python's, NumPy's, an array without dimensions
Input = Array | Numbers
Saved = Array | Mask
Spread = Numbers | np.generic  # a gradient that may not have the result's type
