"""Recycled memory for large results.

A fresh large array costs more in page faults than the arithmetic that fills it.  Blocks
of arrays that are gone are kept and handed out again, as CuPy's memory pool does on a
GPU.

NumPy lets the memory of an array come from elsewhere (NEP 49) and gives it back when
the array goes.  So a result owns its block as any other array does, and every view of
it, in whatever library, holds on to the array.  NumPy asks for memory and gives it back
under the interpreter's lock, and what answers here is compiled: no signal, finalizer,
thread or fork can come between.
"""

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numba import types

from fastrelu.cpu.jit import (
    DATA,
    built_in,
    calling,
    capsule_pointer,
    compile_and_keep,
    inlined,
    keep_for_ever,
    larger,
    numpy_api,
    pointer_to,
    shielded,
    smaller,
)

SMALLEST = 1 << 20  # bytes; what is smaller, malloc recycles by itself
_PAGE = 4096
# A block starts with a page, and what it lends in the middle of one.  A load seems to be
# one of what was just stored if the two addresses differ by whole pages, and then it
# waits.  Large arrays of malloc's start 16 bytes into a page: results that start 48 bytes
# further into theirs take half as long again, 240 a sixth, 1,000 and more nothing.
_HEAD = _PAGE // 2
_MORE = _HEAD + _PAGE  # bytes that are not lent: a block's head, and what aligns it

# Words of a block's head: where its memory starts, how much it lends, and while it is
# idle, the blocks given back before and after it.
_START, _SIZE, _OLDER, _NEWER = range(4)

# Words of a pool.  It is part of the ring of idle blocks: older than it is the newest.
HANDLER, _SET_HANDLER = 0, 1  # NumPy's handle of the pool, or 0, and who takes it
_CONTEXT, _MALLOC, _FREE = 4, 5, 6  # where the blocks' memory comes from
_LIMIT, _USED, _IDLE = 7, 8, 9  # bytes

_word = types.int64
_words = pointer_to(types.CPointer(_word))
_bytes = pointer_to(types.CPointer(types.uint8))
_call_malloc = calling(_word(_word, _word))
_call_free = calling(types.void(_word, _word, _word))
_set_handler = calling(_word(_word))
_vectorcall = types.ExternalFunction(
    "PyObject_Vectorcall", _word(_word, _word, types.intp, _word)
)
_let_go = types.ExternalFunction("Py_DecRef", types.void(_word))


# Blocks -------------------------------------------------------------------------------


@inlined
def _take_out(pool, block):
    """Take a block out of the ring."""
    older, newer = _words(block)[_OLDER], _words(block)[_NEWER]
    _words(older)[_NEWER], _words(newer)[_OLDER] = newer, older
    _words(pool)[_IDLE] -= _words(block)[_SIZE]


@inlined
def _shrink(pool, limit):
    """Free the stalest blocks until no more bytes than that are idle."""
    words = _words(pool)
    while words[_IDLE] > limit:
        block = words[_NEWER]
        _take_out(pool, block)
        start, size = _words(block)[_START], _words(block)[_SIZE]
        _call_free(words[_FREE], (words[_CONTEXT], start, size + _MORE))


@inlined
def _lend(pool, nbytes):
    """Return the address of at least so many bytes, or 0."""
    words = _words(pool)
    if nbytes < 0 or nbytes > sys.maxsize - _PAGE - _MORE:
        return 0
    size = larger(-(-nbytes // _PAGE), 1) * _PAGE
    block = words[_OLDER]
    while block != pool and _words(block)[_SIZE] != size:
        block = _words(block)[_OLDER]
    if block != pool:
        _take_out(pool, block)
    else:
        request = words[_CONTEXT], size + _MORE
        start = _call_malloc(words[_MALLOC], request)
        if start == 0:
            _shrink(pool, 0)
            start = _call_malloc(words[_MALLOC], request)
            if start == 0:
                return 0
        block = (start + _PAGE - 1) & -_PAGE
        _words(block)[_START], _words(block)[_SIZE] = start, size
    words[_USED] += size
    return block + _HEAD


@inlined
def _take_back(pool, address):
    if address != 0:
        words, block = _words(pool), address - _HEAD
        newest, size = words[_OLDER], _words(block)[_SIZE]
        _words(block)[_OLDER], _words(block)[_NEWER] = newest, pool
        words[_OLDER] = _words(newest)[_NEWER] = block
        words[_USED] -= size
        words[_IDLE] += size
        _shrink(pool, words[_LIMIT])


# What NumPy calls ---------------------------------------------------------------------


def malloc(pool, nbytes):
    return _lend(pool, nbytes)


def calloc(pool, items, itemsize):
    nbytes = items * itemsize
    address = _lend(pool, nbytes)
    if address != 0:
        for i in range(nbytes):
            _bytes(address)[i] = 0
    return address


def realloc(pool, address, nbytes):
    new = _lend(pool, nbytes)
    if new != 0 and address != 0:
        for i in range(smaller(nbytes, _words(address - _HEAD)[_SIZE])):
            _bytes(new)[i] = _bytes(address)[i]
        _take_back(pool, address)
    return new


def free(pool, address, nbytes):
    _take_back(pool, address)


# What Python calls --------------------------------------------------------------------


def shrink(pool, limit):
    _shrink(pool, limit)


@inlined
def borrow(pool):
    """Let NumPy take memory from the pool; return where it did before, or 0."""
    return _set_handler(_words(pool)[_SET_HANDLER], (_words(pool)[HANDLER],))


@inlined
def restore(pool, before, result):
    """Let NumPy take memory where it did before; return the result, or 0."""
    own = _set_handler(_words(pool)[_SET_HANDLER], (before,))
    _let_go(before)
    if own != 0:
        _let_go(own)
    elif result != 0:
        _let_go(result)
        result = 0
    return result


def call(self, arguments, number):
    """Call arguments[0] of the others, a function of NumPy that makes an array."""
    pool = _words(self)[DATA]
    before = borrow(pool)
    if before == 0:
        return 0
    result = _vectorcall(_words(arguments)[0], arguments + 8, number - 1, 0)
    return restore(pool, before, result)


_SIGNATURES: dict[Callable[..., Any], Any] = {
    malloc: _word(_word, _word),
    calloc: _word(_word, _word, _word),
    realloc: _word(_word, _word, _word),
    free: types.void(_word, _word, _word),
    shrink: types.void(_word, _word),
    call: _word(_word, _word, types.intp),
}


@functools.cache
def _compiled() -> dict[Callable[..., Any], Any]:
    # For ever: an array may outlive all modules.
    return keep_for_ever(
        {
            function: compile_and_keep(function, signature)
            for function, signature in _SIGNATURES.items()
        }
    )


# The pool -----------------------------------------------------------------------------


class _Handler(ctypes.Structure):  # PyDataMem_Handler
    _fields_ = [
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("context", ctypes.c_void_p),
        ("malloc", ctypes.c_void_p),
        ("calloc", ctypes.c_void_p),
        ("realloc", ctypes.c_void_p),
        ("free", ctypes.c_void_p),
    ]


_CAPSULE = b"mem_handler"
_SET, _DEFAULT_HANDLER = 304, 306  # PyDataMem_..., in NumPy's table
_new_capsule = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.POINTER(_Handler), ctypes.c_char_p, ctypes.c_void_p
)(("PyCapsule_New", ctypes.pythonapi))


class MemoryPool:
    """Memory for results, with the names of CuPy's ``MemoryPool``.

    A block is handed out again only when no array, view, ``memoryview`` or DLPack
    capsule refers to it any more.

    Parameters
    ----------
    limit : int, optional
        The most bytes kept idle.  The default is a quarter of the machine's memory, at
        most 1 GiB; the environment variable ``FASTRELU_POOL_LIMIT`` (bytes) sets
        another.

    Examples
    --------
    >>> import fastrelu
    >>> pool = fastrelu.get_default_memory_pool()
    >>> pool.free_all_blocks()
    >>> pool.free_bytes()
    0
    """

    def __init__(self, limit: int | None = None) -> None:
        self._words = keep_for_ever(np.zeros(_IDLE + 1, np.int64))
        self.address = self._words.ctypes.data
        self._words[[_OLDER, _NEWER]] = self.address
        self._words[_LIMIT] = _default_limit() if limit is None else limit
        self._call: Any = None

    def ready(self) -> None:
        """Have all compiled that NumPy calls: before the first large result."""
        if not self._words[HANDLER]:
            self._make()

    @shielded
    def _make(self) -> None:
        if self._words[HANDLER]:
            return
        functions = _compiled()
        default = ctypes.py_object.from_address(numpy_api(_DEFAULT_HANDLER)).value
        source = _Handler.from_address(capsule_pointer(default, _CAPSULE))
        words = {
            _CONTEXT: source.context or 0,
            _MALLOC: source.malloc,
            _FREE: source.free,
            _SET_HANDLER: numpy_api(_SET),
        }
        for word, value in words.items():
            self._words[word] = value
        answers = [functions[f].address for f in (malloc, calloc, realloc, free)]
        handler = _Handler(b"fastrelu", 1, self.address, *answers)
        capsule = _new_capsule(handler, _CAPSULE, None)
        keep_for_ever((default, handler, capsule))
        self._call = built_in(functions[call], self._words)
        self._words[HANDLER] = id(capsule)

    def _borrow(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self.ready()
        return self._call(function, *arguments)

    def empty_like(self, x: Any, order: Literal["K", "C"] = "K") -> Any:
        """Return an array as ``numpy.empty_like(x, order=order)`` would make it.

        Parameters
        ----------
        x : numpy.ndarray
            Gives the shape and the dtype.
        order : {"K", "C"}
            The memory order: that of x, or C.

        Returns
        -------
        numpy.ndarray
            Not initialised.
        """
        if x.nbytes < SMALLEST:
            return np.empty_like(x, None, order, False)
        return self._borrow(np.empty_like, x, None, order, False)

    def empty_bytes(self, size: int) -> Any:
        """Return a one-dimensional array of uint8, not initialised."""
        if size < SMALLEST:
            return np.empty(size, np.uint8)
        return self._borrow(np.empty, size, np.uint8)

    def used_bytes(self) -> int:
        """Return the bytes behind arrays that are still in use."""
        return int(self._words[_USED])

    def free_bytes(self) -> int:
        """Return the bytes kept for the next results."""
        return int(self._words[_IDLE])

    def total_bytes(self) -> int:
        """Return the bytes in use and kept."""
        return self.used_bytes() + self.free_bytes()

    def free_all_blocks(self) -> None:
        """Hand all idle memory back to the system."""
        self._shrink(0)

    def get_limit(self) -> int:
        """Return the most bytes kept idle."""
        return int(self._words[_LIMIT])

    def set_limit(self, size: int) -> None:
        """Change the most bytes kept idle; 0 keeps none.

        Parameters
        ----------
        size : int
            Bytes.

        Raises
        ------
        ValueError
            If `size` is negative.
        """
        if size < 0:
            msg = f"size must be at least 0, got {size}"
            raise ValueError(msg)
        self._words[_LIMIT] = min(size, sys.maxsize)
        self._shrink(size)

    def _shrink(self, limit: int) -> None:
        if self.free_bytes() > limit:
            # Not a CFUNCTYPE: the interpreter's lock guards the pool.
            kind = ctypes.PYFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)
            kind(_compiled()[shrink].address)(self.address, limit)


def _default_limit() -> int:
    given = os.environ.get("FASTRELU_POOL_LIMIT")
    if given is not None:
        if not given.isdecimal():
            msg = f"FASTRELU_POOL_LIMIT must be a number of bytes, got {given!r}"
            raise ValueError(msg)
        return int(given)
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return 1 << 28
    return min(memory // 4, 1 << 30)


_DEFAULT = MemoryPool()


def get_default_memory_pool() -> MemoryPool:
    """Return the pool that large results come from.

    Returns
    -------
    MemoryPool

    Examples
    --------
    >>> import fastrelu
    >>> fastrelu.get_default_memory_pool().get_limit() > 0
    True
    """
    return _DEFAULT


empty_like, empty_bytes = _DEFAULT.empty_like, _DEFAULT.empty_bytes
ready, ADDRESS = _DEFAULT.ready, _DEFAULT.address
