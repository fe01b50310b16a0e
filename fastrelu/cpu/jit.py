"""How functions become machine code, where it is kept, and how it calls C."""

import types as python_types
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import (
    ccallback,  # noqa: F401 (see below)
    cgutils,
)
from numba.extending import intrinsic

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
    copy = python_types.FunctionType(template.__code__, globals_, name)
    copy.__qualname__, copy.__module__ = name, template.__module__
    return copy


# Addresses ----------------------------------------------------------------------------


def pointer_to(kind: types.Type) -> Any:
    """Return an intrinsic that makes a pointer to this type of an address."""

    @intrinsic  # type: ignore[untyped-decorator]
    def at(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(kind))

        return kind(types.int64), codegen

    return at


def calling(signature: Any) -> Any:
    """Return an intrinsic that calls the C function of a signature at an address."""

    @intrinsic  # type: ignore[untyped-decorator]
    def call(typingctx: Any, address: Any, values: Any) -> Any:
        def codegen(context: Any, builder: Any, _: Any, args: Any) -> Any:
            operands = [context.get_value_type(kind) for kind in signature.args]
            result = context.get_value_type(signature.return_type)
            if signature.return_type == types.void:
                result = ir.VoidType()
            function = ir.FunctionType(result, operands).as_pointer()
            returned = builder.call(
                builder.inttoptr(args[0], function),
                cgutils.unpack_tuple(builder, args[1]),
            )
            if signature.return_type == types.void:
                return context.get_dummy_value()
            return returned

        return signature.return_type(types.int64, types.Tuple(signature.args)), codegen

    return call
