"""Recycled memory for large results.

A fresh large array costs more in page faults than the arithmetic that fills it.  Blocks
of arrays that are gone are kept and handed out again, as CuPy's memory pool does on a
GPU.

NumPy lets the memory of an array come from elsewhere (NEP 49) and gives it back when
the array goes.  So a result owns its block as any other array does, and every view of
it, in whatever library, holds on to the array.  NumPy asks for memory and gives it back
under the interpreter's lock, and what answers (`handler`, from `blocks`) is compiled: no
signal, finalizer, thread or fork can come between.

What is kept must not be missed elsewhere:

- No more is held than was in use at once lately.  Where a fresh block would be too much,
  one that is too large is cut, those that adjoin are joined, or the stalest go.  So
  results of ever-varying sizes hold what they would without a pool.
- Where the process's address space or data is limited, nothing is kept, and memory comes
  from malloc as without a pool.  Nor is anything kept without the janitor (below).
- After a second without use, the system may take a block's pages whenever it is short
  of memory (MADV_FREE).  At once would be a third of a relu over 1 MiB.
- After ten seconds, a block goes back.  That and the second are counted by a thread of
  the pool, its janitor, which never touches Python and sleeps while nothing is idle.

The janitor works beside those who hold the interpreter's lock, so the list of idle
blocks has a lock of its own.  Nobody waits for it who makes or drops an array: whoever
finds it taken for more than a moment does without the list.  So a fork may hold it too,
and a child that was forked behind Python's back, with the lock taken for ever, works.
"""

import ctypes
import importlib
import mmap
import operator
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from fastrelu.cpu import blocks, handler, host
from fastrelu.cpu.abi import (
    DEFAULT_HANDLER,
    HANDLER_CAPSULE,
    SET_HANDLER,
    Handler,
    asks_for_huge_pages,
    capsule_pointer,
    numpy_api,
)
from fastrelu.cpu.jit import built_in, keep_for_ever, shielded
from fastrelu.cpu.shield import (
    NO_THREAD,
    new_lock,
    new_thread,
    signals_elsewhere,
    sufficient_stack,
    take_lock,
)

_resource = importlib.import_module("resource") if os.name == "posix" else None

_STACK = 1 << 18  # bytes of the janitor's
SMALLEST = 1 << 20  # bytes; what is smaller, malloc recycles by itself

_new_capsule = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.POINTER(Handler), ctypes.c_char_p, ctypes.c_void_p
)(("PyCapsule_New", ctypes.pythonapi))


def _sources() -> dict[int, int]:
    """Return where memory comes from and goes to, for the words of a pool."""
    default = ctypes.py_object.from_address(numpy_api(DEFAULT_HANDLER)).value
    keep_for_ever(default)
    source = Handler.from_address(capsule_pointer(default, HANDLER_CAPSULE))
    found = {
        blocks.CONTEXT: source.context or 0,
        blocks.MALLOC: source.malloc,
        blocks.FREE: source.free,
    }
    if _resource is None:
        return found
    library = ctypes.CDLL(None)
    for word, name in {
        blocks.MAP: "mmap",
        blocks.UNMAP: "munmap",
        blocks.ADVISE: "madvise",
        blocks.GET_LIMIT: "getrlimit",
    }.items():
        function = ctypes.cast(getattr(library, name), ctypes.c_void_p)
        found[word] = function.value or 0
    found[blocks.ACCESS] = mmap.PROT_READ | mmap.PROT_WRITE
    found[blocks.FLAGS] = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    found[blocks.HUGE_PAGES] = (
        getattr(mmap, "MADV_HUGEPAGE", 0) if asks_for_huge_pages() else 0
    )
    found[blocks.TAKEABLE] = getattr(mmap, "MADV_FREE", 0)
    found[blocks.DATA] = _resource.RLIMIT_DATA
    found[blocks.SPACE] = getattr(_resource, "RLIMIT_AS", _resource.RLIMIT_DATA)
    found[blocks.NO_LIMIT] = _resource.RLIM_INFINITY
    return found


class MemoryPool:
    """Memory for results, with the names of CuPy's ``MemoryPool``.

    A block is handed out again only when no array, view, ``memoryview`` or DLPack
    capsule refers to it any more, and to results that need all of it but an eighth at
    most.  Idle blocks and blocks in use together are never more than were lately in use
    at once.  What is idle for a second is the system's to take when it is short of
    memory, and after ten seconds it is handed back.  A process whose address space or
    data is limited (``ulimit -v``, ``ulimit -d``) keeps nothing.

    Parameters
    ----------
    limit : int, optional
        The most bytes kept idle.  The default is a quarter of the memory that the
        process may use (the machine's, or less in a container), at most 1 GiB; the
        environment variable ``FASTRELU_POOL_LIMIT`` (bytes) sets another.

    Raises
    ------
    TypeError
        If `limit` is not an integer.
    ValueError
        If `limit` is negative.

    Examples
    --------
    >>> import fastrelu
    >>> pool = fastrelu.get_default_memory_pool()
    >>> pool.free_all_blocks()
    >>> pool.free_bytes()
    0
    """

    def __init__(self, limit: int | None = None) -> None:
        words = np.zeros(blocks.LIST + blocks.ENTRY * (blocks.MOST + 1), np.int64)
        self._words = keep_for_ever(words)
        self.address = self._words.ctypes.data
        # -1 is the default, which is found out when it is first needed.
        self._words[blocks.LIMIT] = -1 if limit is None else _checked("limit", limit)
        self._words[blocks.PERIOD] = blocks.SECOND
        self._handler = 0  # NumPy's handle of the pool, once it is made
        self._call: Any = None

    def __reduce__(self) -> Any:
        """Have copies and pickles mean the pool of the process that they are in."""
        if self is not _DEFAULT:
            msg = "a pool belongs to its process: only the default one can be copied"
            raise TypeError(msg)
        from fastrelu import cpu  # whose pool may be another one there

        return cpu.get_default_memory_pool, ()

    def ready(self) -> None:
        """Have all compiled that NumPy calls: before the first large result."""
        if not self._words[blocks.HANDLER]:
            self.get_limit()
            self._make()

    @shielded
    def _make(self) -> None:
        if self._words[blocks.HANDLER]:
            return
        functions = handler.compiled()
        if not self._handler:
            for word, value in {
                **_sources(),
                blocks.SET_HANDLER: numpy_api(SET_HANDLER),
            }.items():
                self._words[word] = value
            answers = [
                functions[f].address
                for f in (handler.malloc, handler.calloc, handler.realloc, handler.free)
            ]
            self._words[[blocks.LENDER, blocks.TAKER]] = answers[0], answers[3]
            made = Handler(b"fastrelu", 1, self.address, *answers)
            capsule = _new_capsule(made, HANDLER_CAPSULE, None)
            keep_for_ever((made, capsule))
            self._call = built_in(functions[handler.call], self._words)
            self._handler = id(capsule)
            _made.append(self)
        self._start()
        self._words[blocks.HANDLER] = self._handler

    def _start(self) -> None:
        """Start the janitor.

        There is none where the system grants no thread.  Nor is there where memory is
        limited: its stack might be missed, and it would have nothing to do.
        """
        lock = None if _is_told_a_limit() else new_lock()
        if lock is not None:
            take_lock(lock, 0)
            self._words[blocks.BELL] = lock
            with signals_elsewhere(), sufficient_stack(_STACK):
                ident = new_thread(
                    handler.compiled()[blocks.janitor].address, self.address
                )
            if ident == NO_THREAD:
                self._words[blocks.BELL] = 0

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
        return int(self._words[blocks.USED])

    def free_bytes(self) -> int:
        """Return the bytes kept for the next results.

        The system may have taken back what was idle for a second.
        """
        return int(self._words[blocks.IDLE])

    def total_bytes(self) -> int:
        """Return the bytes in use and kept."""
        return self.used_bytes() + self.free_bytes()

    def free_all_blocks(self) -> None:
        """Hand all idle memory back to the system, which sees it at once."""
        self._shrink(0)

    def get_limit(self) -> int:
        """Return the most bytes kept idle."""
        if self._words[blocks.LIMIT] < 0:
            self._words[blocks.LIMIT], complaint = _default_limit()
            if complaint:  # which may be made an error, once
                warnings.warn(complaint, RuntimeWarning, stacklevel=2)
        return int(self._words[blocks.LIMIT])

    def set_limit(self, size: int) -> None:
        """Change the most bytes kept idle; 0 keeps none.

        What is idle beyond that is handed back to the system.

        Parameters
        ----------
        size : int
            Bytes.

        Raises
        ------
        TypeError
            If `size` is not an integer.
        ValueError
            If `size` is negative.
        """
        limit = _checked("size", size)
        self._words[blocks.LIMIT] = limit
        self._shrink(limit)

    def _shrink(self, most: int) -> None:
        if self.free_bytes() > most:
            self._try(handler.shrink, most)

    def _hold(self) -> bool:
        return self._try(handler.hold)

    def _try(self, function: Callable[..., Any], *arguments: int) -> bool:
        """Have something done once the list is free; say whether that was soon."""
        # Not a CFUNCTYPE: the interpreter's lock guards the pool.
        function_type = ctypes.PYFUNCTYPE(*[ctypes.c_int64] * (len(arguments) + 2))
        call = function_type(handler.compiled()[function].address)
        for _ in range(1000):
            if call(self.address, *arguments):
                return True
            time.sleep(0.001)  # the janitor has it, for less than that
        return False


def _checked(name: str, size: Any) -> int:
    """Return a number of bytes that is one, and fits a word."""
    try:
        if type(size) is bool:
            raise TypeError
        number: int = operator.index(size)
    except TypeError:
        msg = f"{name} must be an integer, got {size!r} ({type(size).__name__})"
        raise TypeError(msg) from None
    if number < 0:
        msg = f"{name} must be at least 0, got {number}"
        raise ValueError(msg)
    return min(number, sys.maxsize)


# The janitor's thread -----------------------------------------------------------------


def _is_told_a_limit() -> bool:
    """Say whether the process's address space or data is limited."""
    if _resource is None:
        return False
    kinds = (
        _resource.RLIMIT_DATA,
        getattr(_resource, "RLIMIT_AS", _resource.RLIMIT_DATA),
    )
    return any(_resource.getrlimit(k)[0] != _resource.RLIM_INFINITY for k in kinds)


# How much may be kept -----------------------------------------------------------------

_VARIABLE = "FASTRELU_POOL_LIMIT"
_MOST_IDLE = 1 << 30


def _default_limit() -> tuple[int, str]:
    """Return the most bytes to keep idle, and what is wrong with the variable."""
    given, complaint = os.environ.get(_VARIABLE, ""), ""
    digits = given.strip()
    if digits.isdecimal():
        # Python refuses to read thousands of digits; with twenty it is clamped.
        return _checked(_VARIABLE, int(digits.lstrip("0")[:20] or 0)), ""
    if digits:
        complaint = f"{_VARIABLE} must be a whole number of bytes, got {given!r}"
    return min(min(host.memory(), default=_MOST_IDLE) // 4, _MOST_IDLE), complaint


# The pools of the process -------------------------------------------------------------

_made: list[MemoryPool] = []
_held: list[MemoryPool] = []  # whose list a fork has


def _before_fork() -> None:
    _held[:] = [pool for pool in _made if pool._hold()]


def _after_fork() -> None:
    for pool in _held:
        pool._words[blocks.LOCK] = 0


def _after_fork_in_child() -> None:
    """Keep nothing until there is a janitor again, and nothing that is the parent's.

    Whoever wrote to it would copy it first.
    """
    _after_fork()
    for pool in _made:
        pool._words[[blocks.HANDLER, blocks.BELL, blocks.ASLEEP]] = 0
    for pool in _held:
        pool._shrink(0)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork,
        after_in_child=_after_fork_in_child,
    )

_DEFAULT = MemoryPool()


def get_default_memory_pool() -> MemoryPool:
    """Return the pool that large results come from."""
    return _DEFAULT


empty_like, empty_bytes = _DEFAULT.empty_like, _DEFAULT.empty_bytes
ready, ADDRESS = _DEFAULT.ready, _DEFAULT.address
HANDLER, borrow, restore = blocks.HANDLER, handler.borrow, handler.restore
