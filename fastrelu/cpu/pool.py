"""Recycled memory for large results.

A fresh large array costs more in page faults than the arithmetic that fills it.  Blocks
of arrays that are gone are kept and handed out again, as CuPy's memory pool does on a
GPU.

NumPy lets the memory of an array come from elsewhere (NEP 49) and gives it back when
the array goes.  So a result owns its block as any other array does, and every view of
it, in whatever library, holds on to the array.  NumPy asks for memory and gives it back
under the interpreter's lock, and what answers here is compiled: no signal, finalizer,
thread or fork can come between.

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

import contextlib
import ctypes
import functools
import importlib
import itertools
import mmap
import operator
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numba import types
from numba.extending import intrinsic

from fastrelu.cpu.abi import (
    DATA,
    DEFAULT_HANDLER,
    HANDLER_CAPSULE,
    SET_HANDLER,
    Handler,
    asks_for_huge_pages,
    capsule_pointer,
    numpy_api,
)
from fastrelu.cpu.jit import (
    built_in,
    calling,
    compile_and_keep,
    inlined,
    keep_for_ever,
    larger,
    pointer_to,
    shielded,
    smaller,
)
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
_HUGE = 1 << 22  # bytes from which on NumPy asks for huge pages
_PAGE = mmap.PAGESIZE
# A block starts with a page, and what it lends 2 KiB into it.  A load seems to be one of
# what was just stored if the two addresses differ by whole pages, and then it waits.
# Large arrays of malloc's start 16 bytes into a page: results that start 48 bytes further
# into theirs take half as long again, 240 a sixth, 1,000 and more nothing.
_HEAD = 2048
_MORE = _HEAD + _PAGE  # bytes of malloc's not lent: a block's head, and what aligns it

# Words of a block's head: where malloc's memory starts, or 0, how much is lent, and the next of
# a chain of blocks on their way back to the system.
_START, _SIZE, _NEXT = range(3)

# Words of a pool.
HANDLER, _SET_HANDLER = 0, 1  # NumPy's handle of the pool, or 0, and who takes it
_CONTEXT, _MALLOC, _FREE = 2, 3, 4  # where memory comes from that is not mapped
_MAP, _UNMAP, _ADVISE = 5, 6, 7  # the system's functions, or 0
_ACCESS, _FLAGS, _HUGE_PAGES, _TAKEABLE = range(8, 12)  # for them
_GET_LIMIT, _SPACE, _DATA, _NO_LIMIT = range(12, 16)  # getrlimit, and for it
_ANSWER, _JANITORS = 16, 18  # its two words, under the interpreter's lock or not
_LIMIT, _USED, _IDLE = 20, 21, 22  # bytes
_PEAK, _EARLIER = 23, 24  # the most in use at once in this stretch of time and the last
_LOCK = 25  # 1 while somebody has the list
_BELL, _ASLEEP = 26, 27  # what the janitor sleeps on, and 1 while it does till it rings
_PERIOD, _PERIODS = 28, 29  # of the janitor, in microseconds, and how many there were
_LENDER, _TAKER = 30, 31  # malloc and free, below
_COUNT, _LIST = 32, 33  # idle blocks, and where they are listed, the stalest first
# Words of an entry.  The blocks themselves are cold.
_BLOCK, _LENDS, _SINCE, _OFFERED = range(4)
_ENTRY, _MOST = 4, 1024

_TRIES = 50  # a microsecond or two, which is longer than most of what the janitor does
_SECOND = 1_000_000
_AGE = 10  # periods that a block is kept, and a peak remembered

_word = types.int64
_words = pointer_to(types.CPointer(_word))
_bytes = pointer_to(types.CPointer(types.uint8))
_call_malloc = calling(_word(_word, _word))
_call_free = calling(types.void(_word, _word, _word))
_call_lend, _call_take_back = _call_malloc, _call_free
_call_map = calling(_word(*[_word] * 6))
_call_unmap = calling(types.intc(_word, _word))
_call_advise = calling(types.intc(_word, _word, _word))
_call_get_limit = calling(types.intc(_word, _word))
_set_handler = calling(_word(_word))
_vectorcall = types.ExternalFunction(
    "PyObject_Vectorcall", _word(_word, _word, types.intp, _word)
)
_let_go = types.ExternalFunction("Py_DecRef", types.void(_word))
_sleep = types.ExternalFunction(
    "PyThread_acquire_lock_timed", types.intc(_word, _word, types.intc)
)
_wake = types.ExternalFunction("PyThread_release_lock", types.void(_word))


@intrinsic
def _exchange(typingctx, words, i, value):
    """Store a word that several threads read and write, and return what it was."""

    def codegen(context, builder, signature, args):
        place = builder.gep(args[0], [args[1]])
        return builder.atomic_rmw("xchg", place, args[2], "seq_cst")

    return _word(types.CPointer(_word), types.intp, _word), codegen


# Blocks -------------------------------------------------------------------------------


@inlined
def _keeps(pool, answer):
    """Say whether anything may be idle: there is a janitor, and memory is not limited.

    The process's limits of address space and data may change at any time.  The answer
    goes to two words that nobody else uses meanwhile.
    """
    words = _words(pool)
    if words[_GET_LIMIT] != 0:
        for what in (words[_SPACE], words[_DATA]):
            _call_get_limit(words[_GET_LIMIT], (what, pool + 8 * answer))
            if words[answer] != words[_NO_LIMIT]:
                return False
    return words[_BELL] != 0


@inlined
def _fresh(pool, size):
    """Return a block, or 0.

    The system maps what may be kept.  The rest is malloc's, as without a pool: of what
    is not large, malloc keeps some itself, without the page faults.
    """
    words, start = _words(pool), 0
    if words[_MAP] == 0 or words[_LIMIT] < size or not _keeps(pool, _ANSWER):
        start = _call_malloc(words[_MALLOC], (words[_CONTEXT], size + _MORE))
        block = (start + _PAGE - 1) & -_PAGE
    else:
        length = size + _PAGE
        access, flags = words[_ACCESS], words[_FLAGS]
        block = _call_map(words[_MAP], (0, length, access, flags, -1, 0))
        if block == -1:
            block = 0
        elif size >= _HUGE and words[_HUGE_PAGES] != 0:
            _call_advise(words[_ADVISE], (block, length, words[_HUGE_PAGES]))
    if block != 0:
        _words(block)[_START], _words(block)[_SIZE] = start, size
    return block


@inlined
def _hand_back(pool, chain):
    """Hand a chain of blocks back to the system."""
    words = _words(pool)
    while chain != 0:
        block, head = chain, _words(chain)
        start, size, chain = head[_START], head[_SIZE], head[_NEXT]
        if start != 0:
            _call_free(words[_FREE], (words[_CONTEXT], start, size + _MORE))
        else:
            _call_unmap(words[_UNMAP], (block, size + _PAGE))


# The list of idle blocks --------------------------------------------------------------


@inlined
def _enter(pool):
    """Take the list unless somebody has it, and goes on having it; say whether."""
    for _ in range(_TRIES):
        if _exchange(_words(pool), _LOCK, 1) == 0:
            return True
    return False


@inlined
def _leave(pool):
    _exchange(_words(pool), _LOCK, 0)


@inlined
def _entry(number):
    return _LIST + _ENTRY * number


@inlined
def _add(pool, block, size):
    """Add a block to the list, which has room for one more than it keeps."""
    words = _words(pool)
    entry = _entry(words[_COUNT])
    words[entry + _BLOCK], words[entry + _LENDS] = block, size
    words[entry + _SINCE], words[entry + _OFFERED] = words[_PERIODS], 0
    words[_COUNT] += 1
    words[_IDLE] += size


@inlined
def _take_out(pool, first, stop):
    """Take these blocks out of the list; return them as a chain."""
    words, chain = _words(pool), 0
    for number in range(first, stop):
        entry = _entry(number)
        block, size = words[entry + _BLOCK], words[entry + _LENDS]
        _words(block)[_SIZE], _words(block)[_NEXT] = size, chain
        words[_IDLE] -= size
        chain = block
    for i in range(_entry(stop), _entry(words[_COUNT])):
        words[i - _ENTRY * (stop - first)] = words[i]
    words[_COUNT] -= stop - first
    return chain


@inlined
def _shrink(pool, most):
    """Take out the stalest blocks until no more bytes than that are idle."""
    words, number = _words(pool), 0
    idle = words[_IDLE]
    while idle > most or words[_COUNT] - number > _MOST:
        idle -= words[_entry(number) + _LENDS]
        number += 1
    return _take_out(pool, 0, number)


@inlined
def _smallest(pool, size):
    """Return the number of the smallest block that lends so much, or -1.

    Of several, the newest is warmest.
    """
    words, best, least = _words(pool), -1, sys.maxsize
    for number in range(words[_COUNT] - 1, -1, -1):
        lends = words[_entry(number) + _LENDS]
        if size <= lends < least:
            best, least = number, lends
            if lends == size:
                break
    return best


@inlined
def _wastes(pool, number, size):
    """Say whether more than an eighth would be lent with these bytes."""
    return _words(pool)[_entry(number) + _LENDS] - size > size >> 3


@inlined
def _cut(pool, number, size):
    """Return a block's first part, or all of it; the rest stays in the list."""
    words, entry = _words(pool), _entry(number)
    rest = words[entry + _LENDS] - size - _PAGE
    if rest <= 0:
        return _take_out(pool, number, number + 1)
    block = words[entry + _BLOCK]
    words[entry + _BLOCK], words[entry + _LENDS] = block + size + _PAGE, rest
    words[_IDLE] -= size + _PAGE
    _words(block)[_SIZE] = size
    _words(block + size + _PAGE)[_START] = 0
    return block


@inlined
def _join(pool):
    """Make one block of each two that adjoin."""
    words, number = _words(pool), 0
    while number < words[_COUNT]:
        block = words[_entry(number) + _BLOCK]
        end = block + words[_entry(number) + _LENDS] + _PAGE
        other = 0
        while other < words[_COUNT] and words[_entry(other) + _BLOCK] != end:
            other += 1
        if other == words[_COUNT]:
            number += 1
            continue
        older, newer = smaller(number, other), larger(number, other)
        more = words[_entry(older) + _LENDS] + _PAGE
        words[_entry(newer) + _BLOCK] = block
        words[_entry(newer) + _LENDS] += more
        _take_out(pool, older, older + 1)
        words[_IDLE] += more
        if other < number:
            number -= 1  # where that block is now, to be looked at again


@inlined
def _room(pool, used):
    """Return how much may be idle beside so much in use."""
    words = _words(pool)
    peak = larger(larger(words[_PEAK], words[_EARLIER]), used)
    return smaller(words[_LIMIT], peak - used)


# Lending ------------------------------------------------------------------------------


@inlined
def _recycled(pool, size):
    """Return an idle block that suits, or 0: then there is room for a fresh one.

    A block that is much too large is cut only if a fresh one would be too much: other
    blocks would have to go for it, and the pages of this one are there.
    """
    words, block, stale = _words(pool), 0, 0
    if not _enter(pool):
        return 0
    room = _room(pool, words[_USED] + size)
    cuts = words[_IDLE] > room and words[_MAP] != 0
    number = _smallest(pool, size)
    if number < 0 and cuts:
        _join(pool)
        number = _smallest(pool, size)
    if number >= 0 and not _wastes(pool, number, size):
        block = _take_out(pool, number, number + 1)
    elif number >= 0 and cuts:
        block = _cut(pool, number, size)
    else:
        stale = _shrink(pool, room)
    _leave(pool)
    _hand_back(pool, stale)
    return block


@inlined
def _free_idle(pool, most):
    """Free the stalest blocks until no more is idle; say whether the list was free."""
    if not _enter(pool):
        return False
    stale = _shrink(pool, most)
    _leave(pool)
    _hand_back(pool, stale)
    return True


@inlined
def _lend(pool, nbytes):
    """Return the address of at least so many bytes, or 0."""
    words = _words(pool)
    if nbytes < 0 or nbytes > sys.maxsize - _PAGE - _MORE:
        return 0
    size = larger(-(-nbytes // _PAGE), 1) * _PAGE
    block = _recycled(pool, size)
    if block == 0:
        block = _fresh(pool, size)
    if block == 0 and _free_idle(pool, 0):
        block = _fresh(pool, size)
    if block == 0:
        return 0
    words[_USED] += _words(block)[_SIZE]
    if words[_USED] > words[_PEAK]:  # noqa: PLR1730 - the janitor may just set it lower
        words[_PEAK] = words[_USED]
    return block + _HEAD


@inlined
def _take_back(pool, address):
    if address == 0:
        return
    words, block = _words(pool), address - _HEAD
    size = _words(block)[_SIZE]
    words[_USED] -= size
    malloced = words[_MAP] != 0 and _words(block)[_START] != 0
    if malloced or not _enter(pool):
        _words(block)[_NEXT] = 0
        _hand_back(pool, block)
        return
    _add(pool, block, size)
    room = _room(pool, words[_USED]) if _keeps(pool, _ANSWER) else 0
    stale = _shrink(pool, room)
    rings = words[_ASLEEP] != 0 and words[_COUNT] > 0
    if rings:
        words[_ASLEEP] = 0
    _leave(pool)
    if rings:
        _wake(words[_BELL])
    _hand_back(pool, stale)


# The janitor --------------------------------------------------------------------------


@inlined
def _rest(pool):
    """Sleep until a period has passed in which something was idle."""
    words = _words(pool)
    while not _enter(pool):
        _sleep(words[_BELL], _SECOND // 1000, 0)
    idle = words[_COUNT] > 0
    words[_ASLEEP] = 0 if idle else 1
    _leave(pool)
    if not idle:
        _sleep(words[_BELL], -1, 0)
    _sleep(words[_BELL], words[_PERIOD], 0)


@inlined
def _offer(pool):
    """Let the system take a block's pages if it must; say whether there was one."""
    words, offered = _words(pool), False
    if words[_TAKEABLE] == 0 or not _enter(pool):
        return False
    for number in range(words[_COUNT]):
        entry = _entry(number)
        waits = words[_PERIODS] - words[entry + _SINCE] > 1
        if waits and words[entry + _OFFERED] == 0:
            start = words[entry + _BLOCK] + _PAGE  # the first page has the head
            given = start, words[entry + _LENDS], words[_TAKEABLE]
            _call_advise(words[_ADVISE], given)
            words[entry + _OFFERED] = 1
            offered = True
            break
    _leave(pool)
    return offered


@inlined
def _tend(pool):
    """Do what is due at the end of a period."""
    words, number = _words(pool), 0
    if not _enter(pool):
        return
    words[_PERIODS] += 1
    if words[_PERIODS] % _AGE == 0:
        words[_EARLIER], words[_PEAK] = words[_PEAK], words[_USED]
    keeps, last = _keeps(pool, _JANITORS), words[_PERIODS] - _AGE
    while number < words[_COUNT] and (
        not keeps or words[_entry(number) + _SINCE] < last
    ):
        number += 1
    stale = _take_out(pool, 0, number)
    _leave(pool)
    _hand_back(pool, stale)
    while _offer(pool):
        pass


def janitor(pool):
    while True:
        _rest(pool)
        _tend(pool)


# What NumPy calls ---------------------------------------------------------------------


def malloc(pool, nbytes):
    return _lend(pool, nbytes)


def free(pool, address, nbytes):
    _take_back(pool, address)


# What it seldom calls has no code of its own to lend and to take back, which would be a
# quarter of all that is compiled here.


def calloc(pool, items, itemsize):
    nbytes = items * itemsize
    address = _call_lend(_words(pool)[_LENDER], (pool, nbytes))
    if address != 0:
        for i in range(nbytes):
            _bytes(address)[i] = 0
    return address


def realloc(pool, address, nbytes):
    new = _call_lend(_words(pool)[_LENDER], (pool, nbytes))
    if new != 0 and address != 0:
        for i in range(smaller(nbytes, _words(address - _HEAD)[_SIZE])):
            _bytes(new)[i] = _bytes(address)[i]
        _call_take_back(_words(pool)[_TAKER], (pool, address, 0))
    return new


# What Python calls --------------------------------------------------------------------


def shrink(pool, most):
    """Free the stalest blocks until no more is idle; say whether the list was free."""
    return 1 if _free_idle(pool, most) else 0


def hold(pool):
    """Take the list for a fork; say whether it was free."""
    return 1 if _enter(pool) else 0


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
    shrink: _word(_word, _word),
    hold: _word(_word),
    call: _word(_word, _word, types.intp),
    janitor: types.void(_word),
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


_new_capsule = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.POINTER(Handler), ctypes.c_char_p, ctypes.c_void_p
)(("PyCapsule_New", ctypes.pythonapi))


def _sources() -> dict[int, int]:
    """Return where memory comes from and goes to, for the words of a pool."""
    default = ctypes.py_object.from_address(numpy_api(DEFAULT_HANDLER)).value
    keep_for_ever(default)
    source = Handler.from_address(capsule_pointer(default, HANDLER_CAPSULE))
    found = {_CONTEXT: source.context or 0, _MALLOC: source.malloc, _FREE: source.free}
    if _resource is None:
        return found
    library = ctypes.CDLL(None)
    for word, name in {
        _MAP: "mmap",
        _UNMAP: "munmap",
        _ADVISE: "madvise",
        _GET_LIMIT: "getrlimit",
    }.items():
        function = ctypes.cast(getattr(library, name), ctypes.c_void_p)
        found[word] = function.value or 0
    found[_ACCESS] = mmap.PROT_READ | mmap.PROT_WRITE
    found[_FLAGS] = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    found[_HUGE_PAGES] = (
        getattr(mmap, "MADV_HUGEPAGE", 0) if asks_for_huge_pages() else 0
    )
    found[_TAKEABLE] = getattr(mmap, "MADV_FREE", 0)
    found[_DATA] = _resource.RLIMIT_DATA
    found[_SPACE] = getattr(_resource, "RLIMIT_AS", _resource.RLIMIT_DATA)
    found[_NO_LIMIT] = _resource.RLIM_INFINITY
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
        words = np.zeros(_LIST + _ENTRY * (_MOST + 1), np.int64)
        self._words = keep_for_ever(words)
        self.address = self._words.ctypes.data
        # -1 is the default, which is found out when it is first needed.
        self._words[_LIMIT] = -1 if limit is None else _checked("limit", limit)
        self._words[_PERIOD] = _SECOND
        self._handler = 0  # NumPy's handle of the pool, once it is made
        self._call: Any = None

    def ready(self) -> None:
        """Have all compiled that NumPy calls: before the first large result."""
        if not self._words[HANDLER]:
            self.get_limit()
            self._make()

    @shielded
    def _make(self) -> None:
        if self._words[HANDLER]:
            return
        functions = _compiled()
        if not self._handler:
            for word, value in {
                **_sources(),
                _SET_HANDLER: numpy_api(SET_HANDLER),
            }.items():
                self._words[word] = value
            answers = [functions[f].address for f in (malloc, calloc, realloc, free)]
            self._words[[_LENDER, _TAKER]] = answers[0], answers[3]
            handler = Handler(b"fastrelu", 1, self.address, *answers)
            capsule = _new_capsule(handler, HANDLER_CAPSULE, None)
            keep_for_ever((handler, capsule))
            self._call = built_in(functions[call], self._words)
            self._handler = id(capsule)
            _made.append(self)
        self._start()
        self._words[HANDLER] = self._handler

    def _start(self) -> None:
        """Start the janitor.

        There is none where the system grants no thread.  Nor is there where memory is
        limited: its stack might be missed, and it would have nothing to do.
        """
        lock = None if _is_told_a_limit() else new_lock()
        if lock is not None:
            take_lock(lock, 0)
            self._words[_BELL] = lock
            with signals_elsewhere(), sufficient_stack(_STACK):
                ident = new_thread(_compiled()[janitor].address, self.address)
            if ident == NO_THREAD:
                self._words[_BELL] = 0

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
        """Return the bytes kept for the next results.

        The system may have taken back what was idle for a second.
        """
        return int(self._words[_IDLE])

    def total_bytes(self) -> int:
        """Return the bytes in use and kept."""
        return self.used_bytes() + self.free_bytes()

    def free_all_blocks(self) -> None:
        """Hand all idle memory back to the system, which sees it at once."""
        self._shrink(0)

    def get_limit(self) -> int:
        """Return the most bytes kept idle."""
        if self._words[_LIMIT] < 0:
            self._words[_LIMIT], complaint = _default_limit()
            if complaint:  # which may be made an error, once
                warnings.warn(complaint, RuntimeWarning, stacklevel=2)
        return int(self._words[_LIMIT])

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
        self._words[_LIMIT] = limit
        self._shrink(limit)

    def _shrink(self, most: int) -> None:
        if self.free_bytes() > most:
            self._try(shrink, most)

    def _hold(self) -> bool:
        return self._try(hold)

    def _try(self, function: Callable[..., Any], *arguments: int) -> bool:
        """Have something done once the list is free; say whether that was soon."""
        # Not a CFUNCTYPE: the interpreter's lock guards the pool.
        kind = ctypes.PYFUNCTYPE(*[ctypes.c_int64] * (len(arguments) + 2))
        call = kind(_compiled()[function].address)
        for _ in range(1000):
            if call(self.address, *arguments):
                return True
            time.sleep(0.001)  # the janitor has it, for less than that
        return False


def _checked(name: str, size: Any) -> int:
    """Return a number of bytes that is one, and fits a word."""
    try:
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
_ROOT = Path("/")


def _default_limit() -> tuple[int, str]:
    """Return the most bytes to keep idle, and what is wrong with the variable."""
    given, complaint = os.environ.get(_VARIABLE, ""), ""
    digits = given.strip()
    if digits.isdecimal():
        # Python refuses to read thousands of digits; with twenty it is clamped.
        return _checked(_VARIABLE, int(digits.lstrip("0")[:20] or 0)), ""
    if digits:
        complaint = f"{_VARIABLE} must be a whole number of bytes, got {given!r}"
    return min(min(_memory(), default=_MOST_IDLE) // 4, _MOST_IDLE), complaint


def _memory() -> Iterator[int]:
    """Yield the machine's memory, and what the process's control groups may use of it.

    Each group is bound by those that it is in.  In a container, the paths may be those
    outside it, which are not to be found; its own group is the root then.
    """
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not on Windows
        yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    groups = _ROOT / "sys/fs/cgroup"
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = (_ROOT / "proc/self/cgroup").read_text(errors="replace").splitlines()
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            files = [groups / "memory.max", groups / "unified/memory.max"]
        elif "memory" in kinds.split(","):
            files = [groups / "memory/memory.limit_in_bytes"]
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for file, each in itertools.product(files, (group, *group.parents)):
            with contextlib.suppress(OSError, ValueError):  # "max"
                yield int((file.parent / each / file.name).read_text())


# The pools of the process -------------------------------------------------------------

_made: list[MemoryPool] = []
_held: list[MemoryPool] = []  # whose list a fork has


def _before_fork() -> None:
    _held[:] = [pool for pool in _made if pool._hold()]


def _after_fork() -> None:
    for pool in _held:
        pool._words[_LOCK] = 0


def _after_fork_in_child() -> None:
    """Keep nothing until there is a janitor again, and nothing that is the parent's.

    Whoever wrote to it would copy it first.
    """
    _after_fork()
    for pool in _made:
        pool._words[[HANDLER, _BELL, _ASLEEP]] = 0
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
