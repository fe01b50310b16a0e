"""How functions become machine code, and where it is kept."""

import types
from collections.abc import Callable
from typing import Any

from numba import cfunc, njit
from numba.core import ccallback  # noqa: F401 (see below)

Function = Callable[..., Any]


def compile_(function: Function, **options: Any) -> Any:
    """Compile what other compiled functions call, or what is not worth keeping."""
    return njit(nogil=True, error_model="numpy", **options)(function)


def compile_and_keep(function: Function, signature: Any = None) -> Any:
    """Compile an entry point, and keep its code in Numba's cache on the disk.

    With a signature it is one that C code calls.
    """

    def compiler(**options: Any) -> Any:
        if signature is None:
            return compile_(function, **options)
        return cfunc(signature, error_model="numpy", **options)(function)

    # cfunc imports ccallback only now, if nobody has: a child that was forked in that
    # moment would wait for ever for the import's lock.
    try:
        return compiler(cache=True)
    except RuntimeError:  # there is no folder that can be written
        return compiler()


def rebuild(template: Function, name: str, names: dict[str, Any]) -> Function:
    """Return a copy of a template whose open names are bound as globals.

    Numba's disk cache never hits for a closure over a compiled function; globals do
    not trouble it (numba#6264).  It does not look at them either, so the name of a
    kept function must say all that the function is made of.
    """
    globals_ = {**template.__globals__, **names}
    copy = types.FunctionType(template.__code__, globals_, name)
    copy.__qualname__, copy.__module__ = name, template.__module__
    return copy
