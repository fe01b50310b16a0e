"""Other libraries: which arrays are theirs, and what their code raises."""

import sys

import numpy as np

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


def has_gaps(type_: type) -> bool:
    """Say whether a type is numpy.ma's, which is not imported for that."""
    masked = sys.modules.get("numpy.ma")
    return masked is not None and issubclass(type_, masked.MaskedArray)


def is_foreign(type_: type) -> bool:
    """Say whether objects of a type may be arrays of another library."""
    names = "__cuda_array_interface__", "__dlpack_device__", "__cuda_ndarray__"
    return type_ is not np.ndarray and any(hasattr(type_, name) for name in names)
