"""Binds what the templates of loops leave open, and has them compiled."""

import functools
from typing import Any

from fastrelu import _functions
from fastrelu._functions import rebuild
from fastrelu._spec import Operation
from fastrelu.cpu import loops, sums
from fastrelu.cpu.jit import Function, compile_and_keep, inlined, shielded
from fastrelu.cpu.loops import APART, IN_PLACE, PAST_CACHE, PLAIN, TARGETS
from fastrelu.cpu.vector import (
    Format,
    fence,
    store_strip,
    store_to_nearest,
    stream_halves,
    stream_strip,
)

__all__ = ["APART", "IN_PLACE", "PAST_CACHE", "PLAIN", "TARGETS", "bound", "compiled"]


def _of_format(fmt: Format) -> dict[str, Any]:
    return {
        "load": fmt.load,
        "store": fmt.store,
        "compute": fmt.compute,
        "storage": fmt.storage.type,
    }


def _names(
    body: Function, operation: Operation, fmt: Format, target: str
) -> dict[str, Any]:
    """Return the names that a body leaves open, or one of the drivers in `sums.PARTS`."""
    stream = stream_halves if fmt.name == "float16" else stream_strip
    names: dict[str, Any] = {
        **_of_format(fmt),
        "finished": fence if target == PAST_CACHE else loops.nothing,
        "write_strip": stream if target == PAST_CACHE else store_strip,
        "formula": _functions.bound(operation.function, inlined),
    }

    def bind(name: str, template: Any) -> None:
        """Bind one more name; the template may use those before it."""
        names[name] = inlined(rebuild(template, name, names))

    arrays = operation.arrays - 1
    bind("get", loops.GET[arrays])
    bind("cut", loops.CUT[arrays])
    bind(
        "lead_of",
        loops.to_line if body in (loops.plain, loops.rows) else loops.at_once,
    )
    if body in sums.PARTS:
        bind("element", sums.ELEMENT_OF[body])
        bind("fill", loops.FILLING[target])
        part, apart, add_up = sums.PARTS[body]
        bind("product", sums.product_at)
        bind("add_up", add_up)
        bind("part", apart if target == APART else part)
        return names
    bind("element", loops.ELEMENT_OF[body])
    bind("fill", loops.FILLING[target])
    if operation.active is not None:
        names["active"] = _functions.bound(operation.active, inlined)
        bind("kept", loops.KEEP[operation.kept])
        bind("bit", loops.bit_at)
    bind("body", body)
    return names


def bound(body: Function, operation: Operation, fmt: Format, target: str) -> Function:
    """Return a driver whose open names are bound, for Numba to compile.

    In the place of a body may be one of the drivers in `sums.PARTS`, which have none.
    """
    names = _names(body, operation, fmt, target)
    name = f"{body.__name__}_{operation.function.__name__}_{fmt.name}_{target}"
    if body in sums.PARTS:
        return rebuild(body, name, names)
    more: dict[str, Function] = {
        "numbers_of": loops.OF_NUMBERS[operation.numbers],
        "arrays_of": loops.OF_ARRAYS[operation.arrays - 1],
        "beside": loops.BESIDE_OF[body],
        "part": loops.flat_part,
    }
    for each, template in more.items():
        names[each] = inlined(rebuild(template, each, names))
    return rebuild(loops.flat, name, names)


@functools.cache
def inside(body: Function, operation: Operation, fmt: Format) -> Any:
    """Return a body, or a driver of sums, for a thread that works on all of it alone.

    It writes to other arrays or in place.
    """
    names = _names(body, operation, fmt, IN_PLACE)
    if body not in sums.PARTS:
        return names["body"]
    names["spread"] = inlined(_on_one_thread)
    return inlined(rebuild(body, body.__name__, names))


def _on_one_thread(part, operands, size, grain, moved):  # type: ignore[no-untyped-def]
    part(*operands, 0, size)


# The outer cache answers at once.  The inner one knows what came of a call that was
# interrupted, and hands what two threads want at once to both.
@functools.cache
@shielded
@functools.cache
def compiled(
    body: Function, operation: Operation, fmt: Format, target: str = PLAIN
) -> Any:
    """Return one compiled loop, a C function."""
    signature = sums.SIGNATURE if body in sums.PARTS else loops.SIGNATURE
    return compile_and_keep(bound(body, operation, fmt, target), signature)


@functools.cache
@shielded
@functools.cache
def compiled_for(fmt: Format, template: Function) -> Any:
    """Return a C function that converts a format's weights."""
    name = f"{template.__name__}_{fmt.name}"
    names = {**_of_format(fmt), "store": store_to_nearest(fmt)}
    template = rebuild(template, name, names)
    return compile_and_keep(template, sums.WEIGHTS_SIGNATURE)
