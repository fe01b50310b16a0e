"""Blocks of memory: how they are lent, taken back, listed while idle, cut and joined.

All of it is compiled, and works on the words of a pool: see `pool`.  Whoever lends or
takes back holds the interpreter's lock.  The janitor does not, and so the list of idle
blocks has a lock of its own.
"""

import mmap
import sys

from numba import types
from numba.extending import intrinsic

from fastrelu.cpu.jit import calling, inlined, larger, pointer_to, smaller

_HUGE = 1 << 22  # bytes from which on NumPy asks for huge pages
_PAGE = mmap.PAGESIZE
# A block starts with a page, and what it lends 2 KiB into it.  A load seems to be one of
# what was just stored if the two addresses differ by whole pages, and then it waits.
# Large arrays of malloc's start 16 bytes into a page: results that start 48 bytes further
# into theirs take half as long again, 240 a sixth, 1,000 and more nothing.
HEAD = 2048
_MORE = HEAD + _PAGE  # bytes of malloc's not lent: a block's head, and what aligns it

# Words of a block's head: where malloc's memory starts, or 0, how much is lent, and the next of
# a chain of blocks on their way back to the system.
START, SIZE, NEXT = range(3)

# Words of a pool.
HANDLER, SET_HANDLER = 0, 1  # NumPy's handle of the pool, or 0, and who takes it
CONTEXT, MALLOC, FREE = 2, 3, 4  # where memory comes from that is not mapped
MAP, UNMAP, ADVISE = 5, 6, 7  # the system's functions, or 0
ACCESS, FLAGS, HUGE_PAGES, TAKEABLE = range(8, 12)  # for them
GET_LIMIT, SPACE, DATA, NO_LIMIT = range(12, 16)  # getrlimit, and for it
ANSWER, JANITORS = 16, 18  # its two words, under the interpreter's lock or not
LIMIT, USED, IDLE = 20, 21, 22  # bytes
PEAK, EARLIER = 23, 24  # the most in use at once in this stretch of time and the last
LOCK = 25  # 1 while somebody has the list
BELL, ASLEEP = 26, 27  # what the janitor sleeps on, and 1 while it does till it rings
PERIOD, PERIODS = 28, 29  # of the janitor, in microseconds, and how many there were
LENDER, TAKER = 30, 31  # malloc and free, as NumPy calls them
COUNT, LIST = 32, 33  # idle blocks, and where they are listed, the stalest first
# Words of an entry.  The blocks themselves are cold.
_BLOCK, _LENDS, _SINCE, _OFFERED = range(4)
ENTRY, MOST = 4, 1024

_TRIES = 50  # a microsecond or two, which is longer than most of what the janitor does
SECOND = 1_000_000
_AGE = 10  # periods that a block is kept, and a peak remembered

_word = types.int64
_words = pointer_to(types.CPointer(_word))
_call_malloc = calling(_word(_word, _word))
_call_free = calling(types.void(_word, _word, _word))
_call_map = calling(_word(*[_word] * 6))
_call_unmap = calling(types.intc(_word, _word))
_call_advise = calling(types.intc(_word, _word, _word))
_call_get_limit = calling(types.intc(_word, _word))
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
    if words[GET_LIMIT] != 0:
        for what in (words[SPACE], words[DATA]):
            _call_get_limit(words[GET_LIMIT], (what, pool + 8 * answer))
            if words[answer] != words[NO_LIMIT]:
                return False
    return words[BELL] != 0


@inlined
def _fresh(pool, size):
    """Return a block, or 0.

    The system maps what may be kept.  The rest is malloc's, as without a pool: of what
    is not large, malloc keeps some itself, without the page faults.
    """
    words, start = _words(pool), 0
    if words[MAP] == 0 or words[LIMIT] < size or not _keeps(pool, ANSWER):
        start = _call_malloc(words[MALLOC], (words[CONTEXT], size + _MORE))
        block = (start + _PAGE - 1) & -_PAGE
    else:
        length = size + _PAGE
        access, flags = words[ACCESS], words[FLAGS]
        block = _call_map(words[MAP], (0, length, access, flags, -1, 0))
        if block == -1:
            block = 0
        elif size >= _HUGE and words[HUGE_PAGES] != 0:
            _call_advise(words[ADVISE], (block, length, words[HUGE_PAGES]))
    if block != 0:
        _words(block)[START], _words(block)[SIZE] = start, size
    return block


@inlined
def _hand_back(pool, chain):
    """Hand a chain of blocks back to the system."""
    words = _words(pool)
    while chain != 0:
        block, head = chain, _words(chain)
        start, size, chain = head[START], head[SIZE], head[NEXT]
        if start != 0:
            _call_free(words[FREE], (words[CONTEXT], start, size + _MORE))
        else:
            _call_unmap(words[UNMAP], (block, size + _PAGE))


# The list of idle blocks --------------------------------------------------------------


@inlined
def enter(pool):
    """Take the list unless somebody has it, and goes on having it; say whether."""
    for _ in range(_TRIES):
        if _exchange(_words(pool), LOCK, 1) == 0:
            return True
    return False


@inlined
def _leave(pool):
    _exchange(_words(pool), LOCK, 0)


@inlined
def _entry(number):
    return LIST + ENTRY * number


@inlined
def _add(pool, block, size):
    """Add a block to the list, which has room for one more than it keeps."""
    words = _words(pool)
    entry = _entry(words[COUNT])
    words[entry + _BLOCK], words[entry + _LENDS] = block, size
    words[entry + _SINCE], words[entry + _OFFERED] = words[PERIODS], 0
    words[COUNT] += 1
    words[IDLE] += size


@inlined
def _take_out(pool, first, stop):
    """Take these blocks out of the list; return them as a chain."""
    words, chain = _words(pool), 0
    for number in range(first, stop):
        entry = _entry(number)
        block, size = words[entry + _BLOCK], words[entry + _LENDS]
        _words(block)[SIZE], _words(block)[NEXT] = size, chain
        words[IDLE] -= size
        chain = block
    for i in range(_entry(stop), _entry(words[COUNT])):
        words[i - ENTRY * (stop - first)] = words[i]
    words[COUNT] -= stop - first
    return chain


@inlined
def _shrink(pool, most):
    """Take out the stalest blocks until no more bytes than that are idle."""
    words, number = _words(pool), 0
    idle = words[IDLE]
    while idle > most or words[COUNT] - number > MOST:
        idle -= words[_entry(number) + _LENDS]
        number += 1
    return _take_out(pool, 0, number)


@inlined
def _smallest(pool, size):
    """Return the number of the smallest block that lends so much, or -1.

    Of several, the newest is warmest.
    """
    words, best, least = _words(pool), -1, sys.maxsize
    for number in range(words[COUNT] - 1, -1, -1):
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
    words[IDLE] -= size + _PAGE
    _words(block)[SIZE] = size
    _words(block + size + _PAGE)[START] = 0
    return block


@inlined
def _join(pool):
    """Make one block of each two that adjoin."""
    words, number = _words(pool), 0
    while number < words[COUNT]:
        block = words[_entry(number) + _BLOCK]
        end = block + words[_entry(number) + _LENDS] + _PAGE
        other = 0
        while other < words[COUNT] and words[_entry(other) + _BLOCK] != end:
            other += 1
        if other == words[COUNT]:
            number += 1
            continue
        older, newer = smaller(number, other), larger(number, other)
        more = words[_entry(older) + _LENDS] + _PAGE
        words[_entry(newer) + _BLOCK] = block
        words[_entry(newer) + _LENDS] += more
        _take_out(pool, older, older + 1)
        words[IDLE] += more
        if other < number:
            number -= 1  # where that block is now, to be looked at again


@inlined
def _room(pool, used):
    """Return how much may be idle beside so much in use."""
    words = _words(pool)
    peak = larger(larger(words[PEAK], words[EARLIER]), used)
    return smaller(words[LIMIT], peak - used)


# Lending ------------------------------------------------------------------------------


@inlined
def _recycled(pool, size):
    """Return an idle block that suits, or 0: then there is room for a fresh one.

    A block that is much too large is cut only if a fresh one would be too much: other
    blocks would have to go for it, and the pages of this one are there.
    """
    words, block, stale = _words(pool), 0, 0
    if not enter(pool):
        return 0
    room = _room(pool, words[USED] + size)
    cuts = words[IDLE] > room and words[MAP] != 0
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
def free_idle(pool, most):
    """Free the stalest blocks until no more is idle; say whether the list was free."""
    if not enter(pool):
        return False
    stale = _shrink(pool, most)
    _leave(pool)
    _hand_back(pool, stale)
    return True


@inlined
def lend(pool, nbytes):
    """Return the address of at least so many bytes, or 0."""
    words = _words(pool)
    if nbytes < 0 or nbytes > sys.maxsize - _PAGE - _MORE:
        return 0
    size = larger(-(-nbytes // _PAGE), 1) * _PAGE
    block = _recycled(pool, size)
    if block == 0:
        block = _fresh(pool, size)
    if block == 0 and free_idle(pool, 0):
        block = _fresh(pool, size)
    if block == 0:
        return 0
    words[USED] += _words(block)[SIZE]
    if words[USED] > words[PEAK]:  # noqa: PLR1730 - the janitor may just set it lower
        words[PEAK] = words[USED]
    return block + HEAD


@inlined
def take_back(pool, address):
    """List a block that is no longer in use, or hand it back to the system."""
    if address == 0:
        return
    words, block = _words(pool), address - HEAD
    size = _words(block)[SIZE]
    words[USED] -= size
    malloced = words[MAP] != 0 and _words(block)[START] != 0
    if malloced or not enter(pool):
        _words(block)[NEXT] = 0
        _hand_back(pool, block)
        return
    _add(pool, block, size)
    room = _room(pool, words[USED]) if _keeps(pool, ANSWER) else 0
    stale = _shrink(pool, room)
    rings = words[ASLEEP] != 0 and words[COUNT] > 0
    if rings:
        words[ASLEEP] = 0
    _leave(pool)
    if rings:
        _wake(words[BELL])
    _hand_back(pool, stale)


# The janitor --------------------------------------------------------------------------


@inlined
def _rest(pool):
    """Sleep until a period has passed in which something was idle."""
    words = _words(pool)
    while not enter(pool):
        _sleep(words[BELL], SECOND // 1000, 0)
    idle = words[COUNT] > 0
    words[ASLEEP] = 0 if idle else 1
    _leave(pool)
    if not idle:
        _sleep(words[BELL], -1, 0)
    _sleep(words[BELL], words[PERIOD], 0)


@inlined
def _offer(pool):
    """Let the system take a block's pages if it must; say whether there was one."""
    words, offered = _words(pool), False
    if words[TAKEABLE] == 0 or not enter(pool):
        return False
    for number in range(words[COUNT]):
        entry = _entry(number)
        waits = words[PERIODS] - words[entry + _SINCE] > 1
        if waits and words[entry + _OFFERED] == 0:
            start = words[entry + _BLOCK] + _PAGE  # the first page has the head
            given = start, words[entry + _LENDS], words[TAKEABLE]
            _call_advise(words[ADVISE], given)
            words[entry + _OFFERED] = 1
            offered = True
            break
    _leave(pool)
    return offered


@inlined
def _tend(pool):
    """Do what is due at the end of a period."""
    words, number = _words(pool), 0
    if not enter(pool):
        return
    words[PERIODS] += 1
    if words[PERIODS] % _AGE == 0:
        words[EARLIER], words[PEAK] = words[PEAK], words[USED]
    keeps, last = _keeps(pool, JANITORS), words[PERIODS] - _AGE
    while number < words[COUNT] and (
        not keeps or words[_entry(number) + _SINCE] < last
    ):
        number += 1
    stale = _take_out(pool, 0, number)
    _leave(pool)
    _hand_back(pool, stale)
    while _offer(pool):
        pass


def janitor(pool):
    """Look after what is idle, for ever."""
    while True:
        _rest(pool)
        _tend(pool)
