"""ReLU and its kin for NumPy arrays and arrays on a GPU, compiled by Numba."""

from fastrelu import (
    _interpreter,  # noqa: F401 - before anything is imported
    activations,
)
from fastrelu.activations import *
from fastrelu.cpu import get_default_memory_pool as get_default_memory_pool
from fastrelu.mask import Mask as Mask

__version__ = "0.1.0"

__all__ = ["Mask", "get_default_memory_pool"]
__all__ += activations.__all__  # as type checkers read it
