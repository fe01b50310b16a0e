"""How the text of an argument becomes a number, or a list."""

import argparse
import math
from collections.abc import Callable
from typing import Any


def whole(low: int, high: float = math.inf) -> Callable[[str], int]:
    """Return the reader of an integer argument from ``low`` to ``high``."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            limits = f"at least {low}" if high == math.inf else f"{low} to {high}"
            msg = f"expected a whole number, {limits}, got {text!r}"
            raise argparse.ArgumentTypeError(msg)
        return number

    return read


def positive(text: str) -> float:
    """Read a positive, finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        msg = f"expected a positive number, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return number


def several(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Return the reader of a list with commas."""
    return lambda text: [read(part) for part in text.split(",")]
