"""Templates: functions whose open names are bound later."""

import types
from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]


def rebuild(
    template: Function, name: str, names: dict[str, Any] | None = None
) -> Function:
    """Return a copy of a template whose open names are bound as globals."""
    globals_ = {**template.__globals__, **(names or {})}
    copy = types.FunctionType(template.__code__, globals_, name)
    copy.__qualname__, copy.__module__ = name, template.__module__
    return copy


def bound(function: Function, jit: Function) -> Any:
    """Return a function compiled by `jit`, and with it the functions that it calls."""
    held = function.__globals__
    names = {
        name: bound(held[name], jit)
        for name in function.__code__.co_names
        if type(held.get(name)) is types.FunctionType
    }
    return jit(rebuild(function, function.__name__, names) if names else function)
