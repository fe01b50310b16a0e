"""Recycled memory for large results.

A fresh large array costs more in page faults than the arithmetic that fills it.  Blocks
behind results that nobody can see any more are kept and handed out again, as CuPy's
memory pool does on a GPU.
"""

import os
import sys
import threading
import weakref
from collections import OrderedDict
from functools import partial
from typing import Any, Literal

import numpy as np

SMALLEST = 1 << 20  # bytes; what is smaller, malloc recycles by itself
_PAGE = 4096
_LINE = 64


class _Block(np.ndarray[Any, Any]):
    """Memory.  A type of its own, or NumPy would skip `_Lent` as the base of a view."""

    @classmethod
    def of(cls, nbytes: int) -> "_Block":
        memory = cls(nbytes + _LINE, np.uint8)
        start = -memory.ctypes.data % _LINE
        return memory[start : start + nbytes].view(cls)


class _Lent(np.ndarray[Any, Any]):
    """A block while any view of it lives: the base of every view leads here."""

    base: Any = None  # and no further: nobody may keep the block itself, or resize it
    pool: Any = None  # that of a part of it, which has a base of its own to hold on to
    block: Any = None

    def __del__(self) -> None:
        # The collector may run this in the middle of any line, the pool's included:
        # an append is atomic, and _drain does not wait for what is interrupted.
        if self.pool is not None:
            self.pool._returned.append(self.block)
            self.pool._drain()


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
        self._lock = threading.Lock()
        self._idle: OrderedDict[int, list[_Block]] = (
            OrderedDict()
        )  # by size, stalest first
        self._returned: list[_Block] = []
        self._blocks: dict[tuple[int, int], Any] = {}  # all that live: (id, size)
        self._free = 0
        self._limit = _default_limit() if limit is None else limit

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
            return np.empty_like(x, order=order, subok=False)
        memory = self._take(x.nbytes)
        plain = order == "C" or x.flags.c_contiguous
        strides = None if plain else np.empty_like(x, subok=False).strides
        return np.ndarray(x.shape, x.dtype, memory, 0, strides)

    def empty_bytes(self, size: int) -> Any:
        """Return a one-dimensional array of uint8, not initialised."""
        if size < SMALLEST:
            return np.empty(size, np.uint8)
        return np.ndarray(size, np.uint8, self._take(size))

    def _take(self, nbytes: int) -> Any:
        """Return at least so many bytes; they come back when no view is left."""
        if nbytes > sys.maxsize - 2 * _PAGE:  # to NumPy, a wrong shape
            msg = f"cannot allocate {nbytes} bytes"
            raise MemoryError(msg)
        size = -(-nbytes // _PAGE) * _PAGE
        block = None
        if not self._lock.locked():  # this very thread may be in the midst of it
            with self._lock:
                if self._returned:
                    self._collect()
                blocks = self._idle.get(size)
                if blocks:
                    self._idle.move_to_end(size)
                    block = blocks[-1]
                    del blocks[-1]
                    self._free -= size
        if block is None:
            block = self._new_block(size)
        lent = block.view(_Lent)
        lent.pool, lent.block = self, block
        return lent

    def _new_block(self, size: int) -> _Block:
        try:
            block = _Block.of(size)
        except MemoryError:
            self.free_all_blocks()
            block = _Block.of(size)
        # A block that dies takes its key along: pop(key, the dead reference).
        key = id(block), size
        self._blocks[key] = weakref.ref(block, partial(self._blocks.pop, key))
        return block

    def used_bytes(self) -> int:
        """Return the bytes behind arrays that are still in use."""
        return self.total_bytes() - self._free

    def free_bytes(self) -> int:
        """Return the bytes kept for the next results."""
        self._drain()
        return self._free

    def total_bytes(self) -> int:
        """Return the bytes in use and kept."""
        self._drain()
        return sum(size for _, size in list(self._blocks))

    def free_all_blocks(self) -> None:
        """Hand all idle memory back to the system."""
        self._drain(0)

    def get_limit(self) -> int:
        """Return the most bytes kept idle."""
        return self._limit

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
        self._limit = size
        self._drain(size)

    # A collector, a finalizer or a signal's handler may run at any call here, need the
    # pool itself, or raise.  So nobody waits for the lock where this thread may have it;
    # no line without a call is parted from the next; and a block that gets lost in
    # between is nobody's, and dies.

    def _drain(self, limit: int | None = None) -> None:
        """Take back what was returned, unless someone is at it already."""
        while (self._returned or limit is not None) and not self._lock.locked():
            with self._lock:
                self._collect(limit)
            limit = None

    def _collect(self, limit: int | None = None) -> None:
        """Take back what was returned and keep to the limit.  The lock is held."""
        while self._returned:
            block = self._returned.pop()
            size = block.nbytes
            blocks = self._idle.setdefault(size, [])
            self._idle.move_to_end(size)
            blocks += [block]
            self._free += size
        if limit is None:
            limit = self._limit
        while self._free > limit:
            size, blocks = next(iter(self._idle.items()))
            if blocks:
                del blocks[-1]
                self._free -= size
            else:
                del self._idle[size]

    def _after_fork(self) -> None:
        self._lock = threading.Lock()  # its holder may not exist in the child


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
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_DEFAULT._after_fork)


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
