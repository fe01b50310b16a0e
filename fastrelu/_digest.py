"""One name for all that compiled code is made of, under which it is kept on the disk.

A function is its bytecode and constants, its defaults, and what its names stand for:
the cells of its closure, its globals, and what it may read of modules; other functions
among these are walked likewise.  What a library of a known version holds goes by its
name.  Anything else, as what may change in place, cannot be known, and code that is made
of it is not kept.

Names of attributes are not told from those of globals, nor whose attributes they are: a
digest may hold more than a function reads, but not less.
"""

import contextlib
import functools
import hashlib
import importlib.util
import operator
import os
import pkgutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import llvmlite
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, is_jitted

_LIBRARIES = {*sys.stdlib_module_names, "numpy", "numba", "llvmlite"}
_PLAIN = frozenset((bool, int, str, bytes))
_NUMBERS = frozenset((bool, int, float, str))


class _Unknown(Exception):
    """An object has come up that may hold anything."""


def digest(*parts: Any) -> str | None:
    """Return a name for functions and values, or None if one cannot be known.

    It changes with this copy of the package and with whatever compiles.
    """
    versions = [each.__version__ for each in (numba, np, llvmlite)]
    own = getattr(sys.modules.get(__package__), "__version__", None)
    try:
        return _hash((__name__, own, sys.version, versions, _Walk().known(parts)))
    except (_Unknown, AttributeError):  # what Numba has may change
        return None


_SETTINGS = (  # of Numba, which decide what it makes of a function
    "BOUNDSCHECK",
    "CUDA_DEBUGINFO_DEFAULT",
    "DEBUGINFO_DEFAULT",
    "DISABLE_INTEL_SVML",
    "ENABLE_PROFILING",
    "EXTEND_VARIABLE_LIFETIMES",
    "LOOP_VECTORIZE",
    "OPT",
    "SLP_VECTORIZE",
)


def settings() -> str:
    """Return what a digest must hold besides functions."""
    return repr([(name, getattr(numba.config, name, None)) for name in _SETTINGS])


def user_folder() -> Path:
    """Return the folder for what can be made anew."""
    windows = sys.platform == "win32"
    base = os.environ.get("LOCALAPPDATA" if windows else "XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache") / "fastrelu"


def sources(package: str) -> str | None:
    """Return a digest of a package's files, or None if they cannot be read.

    They are asked of whoever loads them, as from an archive.  Where they were installed
    without their sources, they are bytecode.
    """
    found = hashlib.blake2s()
    try:
        modules = pkgutil.iter_modules(sys.modules[package].__path__)
        names = sorted(module.name for module in modules)
        for name in names:
            spec: Any = importlib.util.find_spec(f"{package}.{name}")
            found.update(spec.loader.get_data(spec.origin))
    except (AttributeError, ImportError, OSError, ValueError):
        return None
    return found.hexdigest() if names else None


def _hash(known: Any) -> str:
    return hashlib.blake2s(repr(known).encode()).hexdigest()


class _Node(NamedTuple):
    """What is known of a function, which other functions may use, too."""

    names: list[str]
    values: list[Any]  # what they stood for, and all else that it is made of
    inner: list[tuple[FunctionType, str]]  # functions among these
    digest: str


_nodes: WeakKeyDictionary[FunctionType, _Node] = WeakKeyDictionary()
_jitted: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


class _Walk:
    """One look at everything; what was seen before need only be the same still."""

    def __init__(self) -> None:
        self.done: dict[FunctionType, str] = {}
        self.open: dict[FunctionType, int] = {}  # those around, and how deep each lies
        self.reach = 0  # the outermost of them that is called again from within
        self.inner: list[tuple[FunctionType, str]] = []

    def function(self, function: FunctionType) -> str:
        """Return a function's digest."""
        if function in self.open:
            self.reach = min(self.reach, self.open[function])
            return f"{len(self.open) - self.open[function]} outside"
        if function in self.done:
            return self.done[function]
        depth = self.open[function] = len(self.open)
        reach, self.reach = self.reach, depth
        node = _nodes.get(function)
        if node is None or not self._holds(function, node):
            node = self._look(function)
        del self.open[function]
        if self.reach >= depth:  # else its digest says from where it was called
            self.done[function], _nodes[function] = node.digest, node
        self.reach = min(reach, self.reach)
        return node.digest

    def _holds(self, function: FunctionType, node: _Node) -> bool:
        values = [value for _, value in _uses(function, node.names)]
        return (
            len(values) == len(node.values)
            and all(map(operator.is_, values, node.values))
            and all(self.function(inner) == digest for inner, digest in node.inner)
        )

    def _look(self, function: FunctionType) -> _Node:
        outer, self.inner = self.inner, []
        names = list(dict.fromkeys(_names(function.__code__)))
        uses = _uses(function, names)
        digest = _hash([(name, self.known(value)) for name, value in uses])
        node = _Node(names, [value for _, value in uses], self.inner, digest)
        self.inner = outer
        return node

    def known(self, value: Any) -> Any:
        """Return what says all of a value when it is printed.

        Lists stand for tuples, so that no tuple passes for what is made here.
        """
        type_ = type(value)
        if type_ in _PLAIN or value is None or value is Ellipsis:
            return value
        if type_ is tuple:
            return [self.known(each) for each in value]
        if type_ is CodeType:
            return self._code(value)
        if type_ is FunctionType and not _is_of_a_library(value):
            found = self.function(value)
            self.inner.append((value, found))
            return "function", found
        return getattr(self, _sort(type_))(value)  # type: ignore[arg-type]

    def _code(self, code: CodeType) -> Any:
        return (
            hashlib.blake2s(code.co_code + b" " + code.co_exceptiontable).digest(),
            (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount),
            code.co_flags,
            (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars),
            self.known(code.co_consts),
        )

    def _float(self, value: complex) -> Any:
        both = complex(value)
        return value, struct.pack("dd", both.real, both.imag)  # the bits of a NaN, too

    def _set(self, value: frozenset[Any]) -> Any:
        return "set", sorted(repr(self.known(each)) for each in value)

    def _slice(self, value: slice) -> Any:
        return "slice", self.known((value.start, value.stop, value.step))

    def _module(self, value: ModuleType) -> Any:
        return "module", value.__name__

    def _named(self, value: Any) -> Any:
        if not _is_of_a_library(value):
            raise _Unknown
        return "library", *_place(value)

    def _intrinsic(self, value: Any) -> Any:
        options = value._prefer_literal, tuple(value._ctor_kwargs.items())
        return "intrinsic", self.known((value._defn, *options))

    def _scalar(self, value: np.generic) -> Any:
        return self._dtype(value.dtype), value.tobytes()

    def _dtype(self, value: np.dtype[Any]) -> Any:
        if value.isbuiltin != 1:
            raise _Unknown
        return "dtype", value.str

    def _type(self, value: types.Type) -> Any:
        if not _is_in_a_library(type(value).__module__):
            raise _Unknown
        key = value.key
        more = None if key == value.name else self.known(key)
        return type(value).__qualname__, value.name, more

    def _signature(self, value: Any) -> Any:
        return "signature", self.known((value.return_type, value.args))

    def _llvm(self, value: ir.Type) -> Any:
        return "llvm", str(value)

    def _asm(self, value: ir.InlineAsm) -> Any:
        return "asm", str(value.function_type), value.get_reference()

    def _other(self, value: Any) -> Any:
        """Take compiled functions: they stay what they are, whatever their globals do."""
        if not is_jitted(value):
            raise _Unknown
        options = self.known(tuple(sorted(value.targetoptions.items())))
        inside = self.known(value.py_func)
        if _jitted.setdefault(value, repr(inside)) != repr(inside):
            raise _Unknown
        return type(value).__qualname__, options, inside


_EXACTLY = {
    float: "_float",
    complex: "_float",
    frozenset: "_set",
    slice: "_slice",
    type(types.void()): "_signature",
    type(intrinsic(lambda typingctx: None)): "_intrinsic",
    ir.InlineAsm: "_asm",
    FunctionType: "_named",
    BuiltinFunctionType: "_named",
    np.ufunc: "_named",
}
_KINDS_OF: list[tuple[Any, str]] = [
    (ModuleType, "_module"),
    (type, "_named"),
    (np.generic, "_scalar"),
    (np.dtype, "_dtype"),
    (types.Type, "_type"),
    (ir.IdentifiedStructType, "_other"),  # which may change
    (ir.Type, "_llvm"),
]


@functools.cache
def _sort(type_: type) -> str:
    """Return the method of a walk for objects of a class."""
    if type_ in _EXACTLY:
        return _EXACTLY[type_]
    for base, name in _KINDS_OF:
        if base in type_.__mro__:  # which asks no abstract class for all it has
            return name
    return "_other"


def _is_in_a_library(module: str) -> bool:
    return module.partition(".")[0] in _LIBRARIES


def _place(value: Any) -> tuple[Any, str]:
    """Return the module of a function or class, and its name there."""
    if isinstance(value, np.ufunc):  # some of NumPy's do not say
        return "numpy", value.__name__
    return getattr(value, "__module__", None), getattr(value, "__qualname__", "<")


def _is_of_a_library(value: Any) -> bool:
    """Say whether a function or class is what a library has under its name."""
    module, name = _place(value)
    if type(module) is not str or not _is_in_a_library(module):
        return False
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is value


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if type(constant) is CodeType:
            yield from _names(constant)


def _uses(function: FunctionType, names: list[str]) -> list[tuple[str, Any]]:
    """Return all that a function is made of, by name."""
    code, globals_ = function.__code__, function.__globals__
    uses: list[tuple[str, Any]] = [("", code), ("defaults", function.__defaults__)]
    uses += (function.__kwdefaults__ or {}).items()
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # an empty one
            uses.append((name, cell.cell_contents))
    uses += [(name, globals_[name]) for name in names if name in globals_]
    modules = [value for _, value in uses if isinstance(value, ModuleType)]
    for module in modules:  # which grow
        held, is_ours = vars(module), not _is_in_a_library(module.__name__)
        if is_ours and "__getattr__" in held:
            raise _Unknown
        for name in names:
            value = held.get(name, uses)
            if isinstance(value, ModuleType):
                if value not in modules:
                    modules.append(value)
            elif value is not uses and (is_ours or type(value) in _NUMBERS):
                uses.append((f"{module.__name__}.{name}", value))
    return uses
