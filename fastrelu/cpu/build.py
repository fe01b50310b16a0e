"""Binds what the templates of loops leave open, and has them compiled."""

import functools
from typing import Any

from fastrelu import _functions
from fastrelu._functions import rebuild
from fastrelu._spec import Operation
from fastrelu.cpu import loops, sums
from fastrelu.cpu.jit import Function, compile_and_keep, inlined, shielded
from fastrelu.cpu.lanes import (
    Lane,
    fence,
    store_to_nearest,
    store_word,
    stream_halves,
    stream_word,
)
from fastrelu.cpu.loops import IN_PLACE, KINDS, PAST_CACHE, PLAIN

__all__ = ["IN_PLACE", "KINDS", "PAST_CACHE", "PLAIN", "bound", "compiled"]


def _of_lane(lane: Lane) -> dict[str, Any]:
    return {
        "load": lane.load,
        "store": lane.store,
        "compute": lane.compute,
        "storage": lane.storage.type,
    }


def bound(block: Function, operation: Operation, lane: Lane, kind: str) -> Function:
    """Return a driver whose open names are bound, for Numba to compile.

    In the place of a block may be one of the drivers in `sums.PARTS`, which have none.
    """
    stream = stream_halves if lane.name == "float16" else stream_word
    names: dict[str, Any] = {
        **_of_lane(lane),
        "finished": fence if kind == PAST_CACHE else loops.nothing,
        "write_word": stream if kind == PAST_CACHE else store_word,
        "formula": _functions.bound(operation.function, inlined),
    }
    parts = block.__name__, operation.function.__name__, lane.name, kind

    def bind(name: str, template: Any) -> None:
        """Bind one more name; the template may use those before it."""
        names[name] = inlined(rebuild(template, name, names))

    def build(driver: Function) -> Function:
        return rebuild(driver, "_".join(parts), names)

    arrays = operation.arrays - 1
    bind("get", loops.GET[arrays])
    bind("cut", loops.CUT[arrays])
    bind(
        "lead_of",
        loops.to_line if block in (loops.plain, loops.rows) else loops.at_once,
    )
    if block in sums.PARTS:
        bind("element", sums.ELEMENT_OF[block])
        bind("fill", loops.FILLING[kind])
        part, add_up = sums.PARTS[block]
        bind("product", sums.product_at)
        bind("add_up", add_up)
        bind("part", part)
        return build(block)
    bind("numbers_of", loops.OF_NUMBERS[operation.numbers])
    bind("element", loops.ELEMENT_OF[block])
    bind("fill", loops.FILLING[kind])
    bind("arrays_of", loops.OF_ARRAYS[arrays])
    bind("beside", loops.BESIDE_OF[block])
    if operation.active is not None:
        names["active"] = _functions.bound(operation.active, inlined)
        bind("kept", loops.KEEP[operation.kept])
        bind("bit", loops.bit_at)
    bind("block", block)
    bind("part", loops.flat_part)
    return build(loops.flat)


# The outer cache answers at once.  The inner one knows what came of a call that was
# interrupted, and hands what two threads want at once to both.
@functools.cache
@shielded
@functools.cache
def compiled(
    block: Function, operation: Operation, lane: Lane, kind: str = PLAIN
) -> Any:
    """Return one compiled loop, a C function."""
    signature = sums.SIGNATURE if block in sums.PARTS else loops.SIGNATURE
    return compile_and_keep(bound(block, operation, lane, kind), signature)


@functools.cache
@shielded
@functools.cache
def compiled_for(lane: Lane, template: Function) -> Any:
    """Return a C function that converts a lane's weights."""
    name = f"{template.__name__}_{lane.name}"
    names = {**_of_lane(lane), "store": store_to_nearest(lane)}
    template = rebuild(template, name, names)
    return compile_and_keep(template, sums.WEIGHTS_SIGNATURE)
