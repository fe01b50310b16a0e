"""ReLU, Leaky ReLU and PReLU for NumPy arrays, compiled by Numba."""

from fastrelu import activations
from fastrelu.activations import *  # noqa: F403
from fastrelu.cpu.pool import get_default_memory_pool
from fastrelu.mask import Mask

__version__ = "0.1.0"

__all__ = sorted(["Mask", "get_default_memory_pool", *activations.__all__])
