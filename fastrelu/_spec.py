"""What an engine is told of an activation: formulas travel down as arguments."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastrelu._functions import rebuild

Function = Callable[..., Any]


# The kinds of operands.  The first one of an operation is always an array.
ARRAY = "array"  # of the result's shape and dtype
BITS = "bits"  # of a mask, one for each element
WEIGHT = "weight"  # an array that broadcasts against the result
NUMBER = "number"


@dataclass(frozen=True)
class Operation:
    """A function of scalars, and the kinds of its operands in their order.

    Arrays come first, then bits or a weight, then numbers.  With `active`, a mask's bits are
    written, too: it gets the first array and the first `kept` numbers.
    """

    function: Function
    kinds: tuple[str, ...]
    active: Function | None = None
    kept: int = 0

    @property
    def arrays(self) -> int:
        """How many arrays there are."""
        return self.kinds.count(ARRAY)

    @property
    def numbers(self) -> int:
        """How many numbers there are."""
        return self.kinds.count(NUMBER)


@dataclass(frozen=True, eq=False)  # told apart by identity, which is quick
class Spec:
    """One activation."""

    name: str
    formula: Function  # y = formula(x, *numbers)
    gradient: Function  # dx = gradient(g, passes, *numbers), see `active`
    # active(x, *numbers) says where the gradient passes, which is a mask's bit and what
    # `gradient` gets.  Where that is not enough, there is none: `gradient` gets x.
    active: Function | None
    predicate: str = ""  # `active` in words, for masks and messages
    numbers: tuple[str, ...] = ()  # their names, as the public function has them
    kept: int | None = None  # how many of them the gradient needs; None: all
    integers: bool = False  # whether integer dtypes are taken

    @property
    def numbers_kept(self) -> tuple[str, ...]:
        """The names of the numbers that `gradient` and `active` take."""
        return self.numbers[: self.kept]

    @property
    def numbers_decide(self) -> bool:
        """Whether it depends on numbers what is active."""
        return any(name in self.predicate for name in self.numbers)

    @property
    def to_bits(self) -> Operation:
        """The formula, with the bits of a mask."""
        kinds = ARRAY, *(NUMBER for _ in self.numbers)
        return Operation(self.formula, kinds, self.active, len(self.numbers_kept))

    @property
    def from_bits(self) -> Operation:
        """The gradient as a function of g, a mask's bits and the numbers."""
        kinds = ARRAY, BITS, *(NUMBER for _ in self.numbers_kept)
        return Operation(self.gradient, kinds)

    @functools.cached_property
    def of_saved(self) -> Function:
        """The gradient as a function of g, the saved array and the numbers."""
        if self.active is None:
            return self.gradient
        names = {"gradient": self.gradient, "active": self.active}
        return rebuild(_of_saved, f"{self.gradient.__name__}_of_saved", names)


gradient: Any
active: Any


def _of_saved(g: Any, x: Any, *numbers: Any) -> Any:
    return gradient(g, active(x, *numbers), *numbers)
