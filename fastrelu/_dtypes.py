"""The dtypes that are accepted: one row each, told by identity.

Other packages reuse NumPy's letters, names and sizes for dtypes of their own (float8,
int4, quaternions).  So a dtype is what its type number says, which no two have in
common, and what is not in the table is not accepted.
"""

import functools
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

FLOATS = "float16, bfloat16, float32 or float64"
REALS = f"{FLOATS}, or an integer dtype"


@dataclass(frozen=True, eq=False)  # told apart by identity, which is quick
class Row:
    """One accepted dtype."""

    name: str
    kind: str  # "f", "i" or "u"
    compute: str  # the type of every product
    storage: np.dtype[Any]  # what loops index: the dtype itself, or uint16

    @property
    def product(self) -> np.dtype[Any]:
        """The dtype of every product."""
        return np.dtype(self.compute)


def _row(dtype: np.dtype[Any]) -> Row:
    kind = dtype.kind
    if kind == "f" and dtype.itemsize == 2:
        return Row(dtype.name, kind, "float32", np.dtype(np.uint16))
    return Row(dtype.name, kind, dtype.name if kind == "f" else "float64", dtype)


_CODES = "bBhHiIlLqQefd"  # NumPy has two numbers for some integers of one name
_BFLOAT16 = Row("bfloat16", "f", "float32", np.dtype(np.uint16))
BY_NAME = {np.dtype(code).name: _row(np.dtype(code)) for code in _CODES}
_BY_NUMBER = {np.dtype(code).num: BY_NAME[np.dtype(code).name] for code in _CODES}
BY_NAME["bfloat16"] = _BFLOAT16


def row_of(dtype: np.dtype[Any]) -> Row | None:
    """Return the row of a dtype, of either byte order, or None."""
    row = _BY_NUMBER.get(dtype.num)
    return _BFLOAT16 if row is None and _is_bfloat16(dtype) else row


def _is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Say whether a dtype is that of ml_dtypes, which whoever has one has imported."""
    scalar = getattr(sys.modules.get("ml_dtypes"), "bfloat16", None)
    return scalar is not None and dtype.type is scalar and dtype == np.dtype(scalar)


@functools.lru_cache(256)
def name_of(dtype: Any) -> str:
    """Return the name of a dtype of NumPy or PyTorch: only an accepted one has a row's.

    NumPy makes its names anew each time.
    """
    if not isinstance(dtype, np.dtype):
        return str(dtype).removeprefix("torch.")
    row = row_of(dtype)
    if row is None:
        return dtype.name if dtype.name not in BY_NAME else repr(dtype.type)
    return row.name if dtype.isnative else f"byte-swapped {row.name}"


def is_accepted(row: Row | None, *, integers: bool) -> bool:
    """Say whether functions take a dtype; `integers` says that they take those, too."""
    return row is not None and (row.kind == "f" or integers)


def rounded(given: Any, dtype: np.dtype[Any]) -> Any:
    """Return an array of float64 or of integers in a dtype, rounded once."""
    if dtype.kind != "V":
        return given.astype(dtype)
    # bfloat16 is rounded from float32, whose last bit says if something was lost.
    single = given.astype(np.float32)
    bits = single.view(np.uint32)
    bits -= np.abs(single) > np.abs(given)
    bits |= single != given
    return single.astype(dtype)
