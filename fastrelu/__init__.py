"""ReLU and its kin for NumPy arrays and arrays on a GPU, compiled by Numba."""

import typing

from fastrelu import (
    _command,  # noqa: F401 - before anything that takes its time
    _interpreter,  # noqa: F401 - before NumPy is imported
    _overloads,  # noqa: F401 - for functions that Numba compiles
    activations,
)
from fastrelu.activations import *
from fastrelu.cpu import get_default_memory_pool as get_default_memory_pool
from fastrelu.mask import Mask as Mask

__version__ = "0.1.0"

__all__ = ["Mask", "get_default_memory_pool"]
__all__ += activations.__all__  # as type checkers read it

if typing.TYPE_CHECKING:
    from fastrelu import nn as nn
else:  # imported when it is first asked for

    def __getattr__(name: str) -> typing.Any:
        if name != "nn":
            msg = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(msg)
        import importlib

        return importlib.import_module("fastrelu.nn")

    def __dir__() -> list[str]:
        return sorted({*globals(), "nn"})
