"""Sums that keep what rounding loses: Neumaier's, doi:10.1002/zamm.19740540106."""

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = Any


def lost(a: Any, b: Any, total: Any) -> Any:
    """Return what total = a + b has lost, exactly, without a branch (Knuth's TwoSum)."""
    of_b = total - a
    return (a - (total - of_b)) + (b - of_b)


def added_up(sums: Array, spread: Sequence[int]) -> Array:
    """Return sums and what each has lost, (2, ...), added up along the axes in `spread`."""
    for axis in sorted(spread, reverse=True):
        parts = np.moveaxis(sums, 1 + axis, 0)
        total, errors = parts[0]
        for more, error in parts[1:]:
            before, total = total, total + more
            errors = errors + (lost(before, more, total) + error)
        sums = np.stack([total, errors])
    return sums
