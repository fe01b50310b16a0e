"""ReLU and its kin for NumPy arrays and arrays on a GPU, compiled by Numba."""

from fastrelu import (
    _command,  # noqa: F401 - before anything that takes its time
    _interpreter,  # noqa: F401 - before NumPy is imported
    activations,
)
from fastrelu.activations import *
from fastrelu.cpu import get_default_memory_pool as get_default_memory_pool
from fastrelu.mask import Mask as Mask

__version__ = "0.1.0"

__all__ = sorted(  # noqa: PLE0605
    ["Mask", "get_default_memory_pool", *activations.__all__]
)
