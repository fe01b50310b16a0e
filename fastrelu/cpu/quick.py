"""The quick calls of a public function, and all that they need made ready."""

import functools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from numba import types

from fastrelu._dtypes import is_accepted, row_of
from fastrelu._spec import ARRAY, BITS, NUMBER, WEIGHT, Operation
from fastrelu.cpu import build, calls, loops, objects, pool, sums, threads
from fastrelu.cpu.jit import (
    Function,
    built_in,
    compile_and_keep,
    keep_for_ever,
    shielded,
)
from fastrelu.cpu.objects import dtype_word
from fastrelu.cpu.vector import format_of
from fastrelu.cpu.walk import LOOK_SIGNATURE, VIEW_SIGNATURE, look, view, walk

_MOST = 32  # rows: there are fewer dtypes
_TRIES = 8  # more than there are kinds of what may be missing
_SIGNATURE = types.int64(types.int64, types.int64, types.intp)
_KINDS_OF = {
    ARRAY: [calls.AN_ARRAY],
    BITS: [calls.SOME_BITS],
    WEIGHT: [calls.A_WEIGHT, calls.AN_AXIS],
    NUMBER: [calls.A_NUMBER],
}


class Call:
    """The quick calls of one operation.

    They are ``call(x, inplace, out, *operands)``, with an axis behind a weight.

    `masked` is the same operation with a mask's bits, which are told by `predicate`.
    Where `flag` says so, the first operand is a `return_mask`, and masks are made;
    otherwise they are taken in the place of the second array.  Where `sums` says so, both
    gradients of PReLU are made.
    """

    __slots__ = (
        "call",
        "kinds",
        "loops",
        "operation",
        "options",
        "predicate",
        "rows",
        "table",
    )

    def __init__(
        self,
        operation: Operation,
        *,
        masked: Operation | None = None,
        predicate: str = "",
        flag: bool = False,
        sums: bool = False,
    ) -> None:
        self.options: dict[str, Any] = {"masked": masked, "predicate": predicate}
        self.options |= {"flag": flag, "sums": sums}
        self.operation = operation
        self.loops = list(_loops_of(operation, sums))
        if masked is not None:
            self.loops += _loops_of(masked, False)
        self.table = np.zeros(calls.ROWS + _MOST * calls.ROW, np.int64)
        self.rows: dict[int, np.dtype[Any]] = {}  # by where they start
        self.predicate = sys.intern(predicate)  # told by identity
        operands = list(operation.kinds[1:])
        if operation.active is not None:
            operands.insert(0, BITS)
        self.kinds = [kind for each in operands for kind in _KINDS_OF[each]]
        if flag:
            self.kinds.insert(0, calls.MAKE_MASK if masked else calls.NO_MASK)
        elif masked:
            self.kinds[0] = calls.SAVED
        self.call: Any = _leave_it

    def make_ready(self, dtype: np.dtype[Any], *, integers: bool) -> bool:
        """Make ready what the last call missed; say whether that was something."""
        missing = int(self.table[calls.MISSING]) if self.rows else calls.A_DTYPE
        self.table[calls.MISSING] = 0
        if missing == calls.A_DTYPE:
            known = is_accepted(row_of(dtype), integers=integers) and dtype.isnative
            if known:
                self._add(dtype)
            return known
        if missing == calls.THREADS:
            threads.ready()
        elif missing == calls.A_POOL:
            pool.ready()
        elif missing == calls.LAYOUTS:
            self.table[calls.LOOK] = _compiled(look, LOOK_SIGNATURE).address
            if self.options["sums"]:
                self.table[calls.WALK] = _compiled(view, VIEW_SIGNATURE).address
            else:
                self.table[calls.WALK] = _compiled(walk, loops.SIGNATURE).address
        elif missing:
            row = missing - (missing - calls.ROWS) % calls.ROW
            body, operation, target = self.loops[missing - row - calls.LOOP]
            fmt = format_of(self.rows[row])
            self.table[missing] = build.compiled(body, operation, fmt, target).address
        return missing != 0

    def again(self, x: Any, *others: Any, integers: bool) -> Any:
        """Return what a call does once all that the last one missed is there, or None."""
        for _ in range(_TRIES):
            if not self.make_ready(x.dtype, integers=integers):
                break
            result = self.call(x, *others)
            if result is not None:
                return result
        return None

    def run(self, x: Any, *others: Any) -> Any:
        """Return what a call does, after it was made ready, or None."""
        result = self.call(x, *others)
        return self.again(x, *others, integers=True) if result is None else result

    def before(self, fallback: Function) -> Any:
        """Return the same call with somebody to take what it leaves."""
        return _make(self.options["sums"], self.table, keep_for_ever(fallback))

    @shielded
    def _add(self, dtype: np.dtype[Any]) -> None:
        """Add the row of a dtype; with the first, make the call."""
        word, table = dtype_word(dtype), self.table
        row = calls.ROWS + calls.ROW * len(self.rows)
        if word in table[calls.ROWS : row : calls.ROW]:
            return
        fmt = format_of(dtype)
        table[row : row + calls.WIDEN] = word, dtype.itemsize, dtype_word(fmt.product)
        table[row + calls.SINGLE] = fmt.product == np.float32
        if WEIGHT in self.operation.kinds and fmt.product != fmt.storage:
            for place, template in _OF_HALVES.items():
                table[row + place] = build.compiled_for(fmt, template).address
        if not self.rows:
            table[: objects.LENGTH] = objects.known()
            table[calls.CACHE] = threads.CACHE
            table[calls.PREDICATE] = id(self.predicate)
            table[calls.COUNT] = len(self.kinds)
            table[calls.KINDS : calls.KINDS + len(self.kinds)] = self.kinds
            self.call = _make(self.options["sums"], table, None)
        table[calls.KNOWN] = len(self.rows) + 1
        self.rows[row] = dtype  # from here on nobody asks again


def _loops_of(operation: Operation, summed: bool) -> Iterator[tuple[Any, ...]]:
    """Go over what loops are made of, in the order of a row of the table."""
    for body in _bodies_of(operation, summed):
        for target in build.TARGETS:
            yield body, operation, target
    for driver in sums.PARTS if summed else ():
        yield driver, operation, build.APART


def _bodies_of(operation: Operation, summed: bool) -> tuple[Function, ...]:
    """Return the bodies, or what stands in their place, at COLUMNS and EACH, too."""
    if summed:
        return tuple(sums.PARTS)
    if WEIGHT in operation.kinds:
        return loops.rows, loops.columns, loops.each
    if operation.active is not None:
        return (loops.to_bits,)
    if BITS in operation.kinds:
        return (loops.from_bits,)
    return (loops.plain,)


_OF_HALVES = {calls.WIDEN: sums.widen_weights, calls.ROUND: sums.round_sums}


def _leave_it(*arguments: Any) -> None:
    """Stand in for a call that is not made yet."""


def _make(summed: bool, table: Any, fallback: Any) -> Any:
    """Return a built-in function."""
    own = np.array([0 if fallback is None else id(fallback), table.ctypes.data])
    keep_for_ever(table)
    return built_in(
        _compiled(calls.call_sums if summed else calls.call, _SIGNATURE), own
    )


@functools.cache  # all operations share them
@shielded
def _compiled(template: Function, signature: Any) -> Any:
    return compile_and_keep(template, signature)
