"""The team: threads that share a loop, and the decision when it is worth their while.

Numba's own layers do not do for a library that lives in other people's processes.  The
workqueue layer aborts the process when two threads enter it at once, GNU OpenMP kills
a forked child, and TBB takes a microsecond and a half to start, a third of what there
is to do in a loop over 100,000 elements.  The team here is started at the first large
array.  Its members spin for some microseconds until the next loop comes, and then sleep.
Six rules keep it harmless:

- Whoever brings a loop works on it, so it ends without the others too: each has a part
  of the range, takes pieces from its front, and when it has none left, from the back of
  somebody else's.
- Nobody waits for the team.  While it is busy, a loop runs on the thread it came from.
  So does that of a thread whose host has others for all processors (Dask's).
- Where PyTorch's threads look for work, after one of its products, members would have to
  share processors with them: there they are the team (see `openmp`).
- All pieces of a loop are worked on in the floating-point mode of whoever brings it:
  rounding, and what becomes of subnormals, do not depend on who takes which piece.
- A member never touches Python, so the interpreter may end at any time.
- After a fork the child has no team, and starts its own when it needs one.
"""

import contextlib
import ctypes
import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastrelu.cpu import host, openmp
from fastrelu.cpu.abi import cgutils, config, parallel
from fastrelu.cpu.jit import (
    COPY,
    array_at,
    calling,
    compile_and_keep,
    inlined,
    keep_for_ever,
    larger,
    shielded,
    smaller,
)
from fastrelu.cpu.shield import (
    ALONE,
    NO_THREAD,
    new_lock,
    new_thread,
    signals_elsewhere,
    sufficient_stack,
    take_lock,
)


def _cache_size(level: int, default: int) -> int:
    """Return the bytes of a level of cache, or a usual size where nothing tells."""
    size = default
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        with contextlib.suppress(OSError, ValueError):
            if int((folder / "level").read_text()) == level:
                text = (folder / "size").read_text().strip()
                size = int(text.removesuffix("K")) << 10
    return size


def _last_level(size: int, private: int, processors: int) -> int:
    """Return the bytes of the last level of cache that are ours to use.

    A virtual machine is shown all of a cache that it shares with others.  On one that
    saw 65 times its private caches, a result that was written to memory and read again
    came sooner than by way of the cache from 16 times on.
    """
    return max(private, min(size, 16 * private * processors))


# What is beyond the last level goes to memory; what fits the second is one thread's.
PRIVATE_CACHE = _cache_size(2, 1 << 20)
CACHE = _last_level(_cache_size(3, 1 << 25), PRIVATE_CACHE, os.cpu_count() or 1)

# In bytes read and written.  A loop over less than two shares stays with one thread:
# the others' caches would first have to fetch it.  Waking somebody who sleeps takes
# some 10 microseconds of the waker and 50 until it is there; that pays in any case for
# a loop over much, 100 to 300 microseconds on one thread, and otherwise if more loops
# follow soon.
SHARE = PRIVATE_CACHE // 4
MUCH = 8 << 20
# For PyTorch's threads a loop is not done before each of them has come.
ENOUGH = 1 << 20

_STACK = 1 << 20  # bytes of a member's, many times what the loops' buffers take
# Of each member's part, what another may take over: at least so many, and at most so many
# of two shares each.  Of loops that compute much, the last of four took longer than the
# others' patience; each costs a sixth of a microsecond.
_PIECES, _MOST_PIECES = 4, 16
# Seconds that a thread looks for work before it sleeps: as long as waking it takes.  The
# others' last pieces must be done in less: a team that falls asleep between the loops of
# a burst made each take twice as long.
_PATIENCE = 75e-6
_SOON = 8  # loops that a member must have found awake for its waking to have paid
_LONGEST_PAUSE = 63  # loops that are left alone after wakings that did not

# Loops on PyTorch's threads: see `_are_awake` and `_learn`.
_FEW, _MANY = 8, 512  # in a row for which all came, until clocks are read now and then
_AGAIN = 16  # from one such time to the next
_PAID = 512  # that saved what one loses for which somebody came late
_DOUBTFUL = 64  # for which clocks must say more, after that
_FORGOTTEN = 64  # of other threads than their owner's, until it is another's turn
_GRACE = 8  # who has not come after this part of the owner's patience is late

# The team's memory, in words of 8 bytes; what several threads write has a cache line
# (8 words) of its own.
_BUSY = 0  # 1 while somebody's loop runs
_PENDING = 8  # pieces of it not done yet
_WAITING = 9  # 1 while its owner sleeps until they are
_LOOPS = 16  # how many there have been
_FUNCTION, _ARGUMENTS, _SIZE, _PIECE, _MEMBERS, _MODE = range(24, 30)  # the loop
_WORKERS = 32  # members besides the owner
_LIMIT = 33  # the address of Numba's get_num_threads, or 0
_PAUSE, _LEFT_ALONE, _AWAKE = 34, 35, 36  # see _may_wake
_PLACE, _GET_PLACES, _SET_PLACES, _THREAD = range(37, 41)  # see _LINUX; or 0
_SHARE = 41  # the address of `_share`, or 0 while there is no team
_NUMBA, _LAUNCHED, _TRUE = 42, 43, 44  # see `is_ready`
_PROCESS = 45  # its number, which is its main thread's to Linux
_ALONE = 46  # the key of the word that says whether a thread's loops stay with it
_MASK, _MAIN, _PLACES = 48, 64, 16  # see `_keep_away`: 16 words of a bit a processor
# PyTorch's threads: how many there are with their owner, or 0; who that is; when it is
# to be looked for them; what is called; their clocks, and what these showed last.
_THEIRS, _OWNER, _UNTIL, _JOINED = 80, 81, 82, 88
_FORK, _GET_MOST, _GET_PLACE, _GET_TIME, _JOIN = range(83, 88)
_MODULES, _TORCH = 89, 90  # see `is_ready`
_TIME = 91  # and 92: seconds and nanoseconds
_CLOCKS, _CLOCK_SIZE = 96, 3  # a clock, what it showed last, and when
# Loops on them: in a row for which all came, and how many there must be; for how many it
# counts that somebody came late; and other threads' since the last.
_WELL, _NEEDED, _DOUBT, _OTHERS = range(108, 112)
_LOOKS = 112  # how often one looks for work in `_PATIENCE`
_MEMBER, _MEMBER_SIZE = 128, 32  # the first member's words; the next has the next 32
_ASLEEP, _LOCK = 8, 9  # after its part: (first piece << 32) + the piece after the last
_ID, _FORBIDDEN = 10, 11  # to Linux, and the processor it must not use, or -1
_OURS = 16  # the mask that was set for it then
_MOST = 256  # members

_memory = np.zeros(_MEMBER + _MOST * _MEMBER_SIZE + 8, np.int64)
_memory = _memory[-_memory.ctypes.data % 64 // 8 :]
keep_for_ever(_memory)  # members outlive this module
_NAME = f"{COPY}.team"  # to LLVM, which knows one of a name in a process
llvm.add_symbol(_NAME, _memory.ctypes.data)


# Words that several threads read and write -------------------------------------------

_WORD, _INT = ir.IntType(64), ir.IntType(32)
_WORDS = types.CPointer(types.int64)
_word = types.int64


@intrinsic
def _team(typingctx):
    """Return the address of the team's memory."""

    def codegen(context, builder, signature, args):
        return _team_of(builder.module)

    return _WORDS(), codegen


def _team_of(module: Any) -> Any:
    try:
        return module.get_global(_NAME)
    except KeyError:
        return ir.GlobalVariable(module, _WORD, _NAME)


def _on_word(result: types.Type, operands: int, emit: Any) -> Any:
    """Return codegen and signature of an atomic operation on the word at an index."""

    def codegen(context, builder, signature, args):
        done = emit(builder, builder.gep(args[0], [args[1]]), *args[2:])
        return context.get_dummy_value() if result == types.void else done

    return result(_WORDS, types.intp, *[_word] * operands), codegen


@intrinsic
def _load(typingctx, words, i):
    return _on_word(_word, 0, lambda b, p: b.load_atomic(p, "seq_cst", 8))


@intrinsic
def _store(typingctx, words, i, value):
    return _on_word(types.void, 1, lambda b, p, v: b.store_atomic(v, p, "seq_cst", 8))


@intrinsic
def _add(typingctx, words, i, value):
    """Return what the word was before."""
    return _on_word(_word, 1, lambda b, p, v: b.atomic_rmw("add", p, v, "seq_cst"))


@intrinsic
def _swap(typingctx, words, i, old, new):
    """Say whether the word was old, and is new now."""

    def emit(b, p, old, new):
        return b.extract_value(b.cmpxchg(p, old, new, "seq_cst", "seq_cst"), 1)

    return _on_word(types.boolean, 2, emit)


@intrinsic
def _address(typingctx, words, i):
    def codegen(context, builder, signature, args):
        return builder.ptrtoint(builder.gep(args[0], [args[1]]), _WORD)

    return _word(_WORDS, types.intp), codegen


_X86, _ARM = ("x86_64", "i686", "amd64"), ("aarch64", "arm64")


def _emit(builder: Any, name: str, result: Any, *operands: Any) -> Any:
    """Return code that calls one of LLVM's own functions."""
    function_type = ir.FunctionType(result, [operand.type for operand in operands])
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(function, operands)


@intrinsic
def _look_away(typingctx):
    """Give the processor a moment."""

    def codegen(context, builder, signature, args):
        triple = llvm.get_process_triple()
        if triple.startswith(_X86):
            _emit(builder, "llvm.x86.sse2.pause", ir.VoidType())
        elif triple.startswith(_ARM):
            _emit(builder, "llvm.aarch64.hint", ir.VoidType(), ir.IntType(32)(1))
        return context.get_dummy_value()

    return types.void(), codegen


# The floating-point mode --------------------------------------------------------------

_FLAGS = 0x3F  # of x86's register: what happened so far, which is no part of the mode


@intrinsic
def _mode(typingctx):
    """Return the thread's mode, or -1 where a loop must not be shared.

    That is where nothing is known of the processor's mode, and where an operation may
    trap: its signal must reach the thread that asked for it.
    """

    def codegen(context, builder, signature, args):
        triple = llvm.get_process_triple()
        if triple.startswith(_X86):
            place = cgutils.alloca_once(builder, _INT)
            pointer = builder.bitcast(place, cgutils.voidptr_t)
            _emit(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), pointer)
            word = builder.zext(builder.load(place), _WORD)
            mode = builder.and_(word, _WORD(~_FLAGS))
            traps = builder.and_(builder.not_(mode), _WORD(0x1F80))  # a 1 masks one
        elif triple.startswith(_ARM):
            mode = _emit(builder, "llvm.aarch64.get.fpcr", _WORD)
            traps = builder.and_(mode, _WORD(0x9F00))
        else:
            return _WORD(-1)
        may_trap = builder.icmp_unsigned("!=", traps, _WORD(0))
        return builder.select(may_trap, _WORD(-1), mode)

    return _word(), codegen


@intrinsic
def _set_mode(typingctx, mode):
    """Give the thread a mode that `_mode` returned."""

    def codegen(context, builder, signature, args):
        triple = llvm.get_process_triple()
        if triple.startswith(_X86):
            word = builder.trunc(args[0], _INT)
            place = cgutils.alloca_once_value(builder, word)
            pointer = builder.bitcast(place, cgutils.voidptr_t)
            _emit(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), pointer)
        elif triple.startswith(_ARM):
            _emit(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), args[0])
        return context.get_dummy_value()

    return types.void(_word), codegen


_call_loop = calling(types.intc(_word, _word, _word))
_call_int = calling(types.intc())
_call_fork = calling(types.void(_word, _word, _word, _word))
_call_clock = calling(types.intc(_word, _word))

# Python's locks are the one way to sleep that every platform has; they do not need its
# interpreter, and another thread may release them.
_sleep = types.ExternalFunction("PyThread_acquire_lock", types.intc(_word, types.intc))
_wake = types.ExternalFunction("PyThread_release_lock", types.void(_word))
_own_number = types.ExternalFunction("PyThread_get_thread_ident", _word())
_own_word = types.ExternalFunction("PyThread_tss_get", _word(_word))
_dict_item = types.ExternalFunction("PyDict_GetItem", _word(_word, _word))


# The loop -----------------------------------------------------------------------------


@inlined
def _work(team, me, mode):
    """Do pieces of the loop until none is left.

    Take the floating-point mode that the thread has, and return the one it has then: to
    read it for each piece would wait for all that the processor computes.
    """
    members = _load(team, _MEMBERS)
    for other in range(members):
        part = _MEMBER + (me + other) % members * _MEMBER_SIZE
        while True:
            pieces = _load(team, part)
            first, stop = pieces >> 32, pieces & 0xFFFFFFFF
            if first >= stop:
                break
            if other == 0:
                mine, rest = first, (first + 1) << 32 | stop
            else:
                mine, rest = stop - 1, first << 32 | (stop - 1)
            # A piece is taken before the loop is looked at, which therefore cannot
            # end, and give way to another, before that piece is done.
            if _swap(team, part, pieces, rest):
                if team[_MODE] != mode:
                    mode = team[_MODE]
                    _set_mode(mode)
                start = mine * team[_PIECE]
                stop = smaller(start + team[_PIECE], team[_SIZE])
                _call_loop(team[_FUNCTION], (team[_ARGUMENTS], start, stop))
                if _add(team, _PENDING, -1) == 1 and _swap(team, _WAITING, 1, 0):
                    _wake(team[_MEMBER + _LOCK])
    return mode


@inlined
def _may_wake(team, asleep):
    """Say whether to wake members for a loop that alone would not be worth it.

    Where wakings did not pay, more and more loops are left alone between them.
    """
    if asleep == 0:
        team[_AWAKE] += 1
        return False
    if team[_LEFT_ALONE] > 0:
        team[_LEFT_ALONE] -= 1
        return False
    paid = team[_AWAKE] >= _SOON
    team[_PAUSE] = 0 if paid else smaller(2 * team[_PAUSE] + 1, _LONGEST_PAUSE)
    team[_LEFT_ALONE] = team[_PAUSE]
    team[_AWAKE] = 0
    return True


@inlined
def _get_places(team, thread, mask):
    """Write the processors that a thread may use; say whether that is known."""
    arguments = thread, 8 * _PLACES, _address(team, mask)
    return _call_loop(team[_GET_PLACES], arguments) >= 0


@inlined
def _keep_away(team, member):
    """Before a member is woken, forbid it the processor that the loop comes from.

    Linux would often wake it there, where it has to wait for the loop's owner.  The
    processor that it was forbidden before is put back, but only if its mask is still
    what was set here and the main thread may use that processor: what an administrator
    changes stays changed.
    """
    words = _MEMBER + member * _MEMBER_SIZE
    here, before = _call_int(team[_PLACE], ()), team[words + _FORBIDDEN]
    if here == before or here < 0 or here >= 64 * _PLACES:
        return
    ours = words + _OURS
    if not _get_places(team, team[words + _ID], _MASK):
        return
    for i in range(_PLACES):
        if team[_MASK + i] != team[ours + i]:
            before = -1
    team[words + _FORBIDDEN] = before
    if before >= 0:
        # Where it cannot be put back, no other is taken: in the end there would be one.
        word, bit = before >> 6, 1 << (before & 63)
        if not _get_places(team, team[_PROCESS], _MAIN) or not team[_MAIN + word] & bit:
            return
        team[_MASK + word] |= bit
    team[_MASK + (here >> 6)] &= ~(1 << (here & 63))
    arguments = team[words + _ID], 8 * _PLACES, _address(team, _MASK)
    if _call_loop(team[_SET_PLACES], arguments) == 0:  # or there is no other
        team[words + _FORBIDDEN] = here
        for i in range(_PLACES):
            team[ours + i] = team[_MASK + i]


@inlined
def _time_of(team, clock):
    """Return how long a thread has had a processor, or -1 if there is none any more."""
    if _call_clock(team[_GET_TIME], (clock, _address(team, _TIME))) != 0:
        return -1
    return team[_TIME] * 1_000_000_000 + team[_TIME + 1]


@inlined
def _goes_on(team, k):
    """Say whether the thread whose clock is at word k has a processor right now.

    If the clock has not moved since it was last read, it sleeps; else it must move now.
    In doubt, it must have gone all the time: others who look for work, too, leave the
    thread its processor half of the time, and it may be about to lose it.
    """
    before, seen, now = team[k + 1], team[k + 2], _time_of(team, team[k])
    if now < 0:
        team[_THEIRS] = 0  # it has ended: there may be others
    if now < 0 or now == before:
        return False
    team[k + 1] = _time_of(team, team[k])
    team[k + 2] = _time_of(team, openmp.WALL)
    passed = team[k + 2] - seen
    if team[_DOUBT] > 0 and team[k + 1] - before < passed - (passed >> 3):
        return False
    return team[k + 1] > now


@inlined
def _are_awake(team):
    """Say whether each of PyTorch's threads has a processor, as far as that is known.

    They work for their owner alone, who is here: so they look for work.  To read a clock
    twice takes 7 microseconds after a product, which has had the caches to itself, and a
    loop over `ENOUGH` takes 15.  So once all came to some in a row, clocks are read now
    and then only.
    """
    if _own_number() != team[_OWNER]:
        team[_OTHERS] += 1
        if team[_OTHERS] >= _FORGOTTEN:
            team[_THEIRS] = 0
        return False
    team[_OTHERS] = 0
    if _call_int(team[_GET_MOST], ()) != team[_THEIRS]:
        return False
    sure = team[_WELL] - team[_NEEDED]
    if sure >= 0 and sure % _AGAIN != 0:
        return True
    for k in range(_CLOCKS, _CLOCKS + openmp.ASKED * _CLOCK_SIZE, _CLOCK_SIZE):
        if team[k] != 0 and not _goes_on(team, k):
            team[_WELL] = 0
            return False
    return True


@inlined
def _learn(team, late):
    """Note whether somebody came late to a loop on PyTorch's threads.

    Whoever came late slept, or somebody else had its processor: another program, or
    OpenBLAS after a product of NumPy's.  For that the owner has waited, for milliseconds
    at worst.  If no clock was read, more loops must go well before that is so again.
    """
    if not late:
        team[_WELL] += 1
        if team[_DOUBT] > 0:
            team[_DOUBT] -= 1
        return
    if team[_WELL] >= _PAID:
        team[_NEEDED] = _FEW
    elif team[_WELL] >= team[_NEEDED]:
        team[_NEEDED] = smaller(8 * team[_NEEDED], _MANY)
    team[_WELL], team[_DOUBT] = 0, _DOUBTFUL


def _join(address):
    """Work on the loop, as one of PyTorch's threads.

    In the order in which these work on a product, whose parts are in their caches.
    """
    team = _team()
    me, mode = _call_int(team[_GET_PLACE], ()), _mode()
    _add(team, _JOINED, 1)
    if me < _load(team, _MEMBERS) and mode >= 0:
        after = _work(team, me, mode)
        if after != mode:  # it is theirs again
            _set_mode(mode)
    if me == 0:  # the owner, who has found no piece left, and must wait for all
        looks = team[_LOOKS] // _GRACE
        while looks > 0 and _load(team, _JOINED) < team[_THEIRS]:
            looks -= 1
            _look_away()
        _learn(team, _load(team, _JOINED) < team[_THEIRS])


def _tell(address):
    """Write what Linux calls this thread to the next word there."""
    team = _team()
    me = _add(team, _JOINED, 1)
    if me < _MOST:
        array_at(address, _MOST, np.int64)[me] = _call_int(team[_THREAD], ())


def _share(function, arguments, size, grain, moved):
    """Call function(arguments, start, stop) for pieces of range(size).

    All but the last are multiples of `grain`; the loop reads and writes `moved` bytes.
    """
    team = _team()
    members = smaller(team[_WORKERS] + 1, smaller(moved // SHARE, -(-size // grain)))
    if members > 1 and team[_LIMIT] != 0:
        members = smaller(members, _call_int(team[_LIMIT], ()))
    if members > 1 and _own_word(team[_ALONE]) != 0:
        members = 1
    mode = _mode() if members > 1 else -1
    if mode < 0 or not _swap(team, _BUSY, 0, 1):
        _call_loop(function, (arguments, 0, size))
        return
    awake = moved >= ENOUGH and team[_THEIRS] > 1 and _are_awake(team)
    if awake:
        members = smaller(members, team[_THEIRS])
    asleep = 0
    for member in range(1, members):
        asleep += _load(team, _MEMBER + member * _MEMBER_SIZE + _ASLEEP)
    wake = not awake and (moved >= MUCH or _may_wake(team, asleep))
    if asleep == members - 1 and not wake and not awake:
        _store(team, _BUSY, 0)
        _call_loop(function, (arguments, 0, size))
        return
    each = larger(smaller(moved // (2 * members * SHARE), _MOST_PIECES), _PIECES)
    piece = -(-size // (each * members * grain)) * grain
    pieces = -(-size // piece)
    team[_FUNCTION], team[_ARGUMENTS] = function, arguments
    team[_SIZE], team[_PIECE], team[_MODE] = size, piece, mode
    _store(team, _MEMBERS, members)
    _store(team, _PENDING, pieces)
    for member in range(members):
        first, stop = pieces * member // members, pieces * (member + 1) // members
        _store(team, _MEMBER + member * _MEMBER_SIZE, first << 32 | stop)
    if awake:
        _store(team, _JOINED, 0)
        _call_fork(team[_FORK], (team[_JOIN], 0, team[_THEIRS], 0))
    else:
        _add(team, _LOOPS, 1)
        for member in range(1, members if wake else 1):
            if _load(team, _PENDING) == 0:  # those before have done it all
                break
            words = _MEMBER + member * _MEMBER_SIZE
            if _load(team, words + _ASLEEP) == 1 and team[words + _ID] != 0:
                _keep_away(team, member)
            if _swap(team, words + _ASLEEP, 1, 0):
                _wake(team[words + _LOCK])
        _work(team, 0, mode)
    # Members may still be at it, after theirs, too: who came late to the loop before.
    looks = team[_LOOKS]
    while _load(team, _PENDING) > 0:
        if looks > 0:
            looks -= 1
            _look_away()
            continue
        _store(team, _WAITING, 1)
        if _load(team, _PENDING) > 0 or not _swap(team, _WAITING, 1, 0):
            _sleep(team[_MEMBER + _LOCK], 1)
    _store(team, _BUSY, 0)


@inlined
def _look(team, seen, looks):
    """Wait for a loop after so many, but no longer than for so many looks."""
    while looks > 0 and _load(team, _LOOPS) == seen:
        looks -= 1
        _look_away()


def _look_in_vain(looks):
    """Wait for the first loop, before there is a team: to see how long that takes."""
    _look(_team(), 0, looks)


def _member(me):
    """Work on every loop that comes, for ever."""
    team = _team()
    words = _MEMBER + me * _MEMBER_SIZE
    if team[_THREAD] != 0:
        team[words + _ID] = _call_int(team[_THREAD], ())
    seen, mode = 0, -1  # whatever it was started in
    patience = team[_LOOKS]
    while True:
        _look(team, seen, patience)
        loops = _load(team, _LOOPS)
        if loops != seen:
            seen = loops
            if me < _load(team, _MEMBERS):
                mode = _work(team, me, mode)
            continue
        _store(team, words + _ASLEEP, 1)
        # Whoever brings a loop between these lines may have taken the 1 already: then
        # the lock is free, or will be in a moment.
        if _load(team, _LOOPS) == seen or not _swap(team, words + _ASLEEP, 1, 0):
            _sleep(team[words + _LOCK], 1)


@intrinsic
def spread(typingctx, body, arguments, size, grain, moved):
    """Call body(*arguments, start, stop) for all of range(size), with the team's help.

    `body` is compiled and allocates nothing.  See `_share` for the rest.  Until there is
    a team, it need not be compiled: half a second of a process's very first call.
    """

    def codegen(context, builder, signature, args):
        operands = *arguments.types, types.intp, types.intp
        body.dispatcher.compile(operands)
        compiled = body.dispatcher.overloads[operands]
        context.add_linking_libs([compiled.library])
        function_type = ir.FunctionType(ir.IntType(32), [_WORD] * 3)
        name = builder.module.get_unique_name("fastrelu_part")
        function = ir.Function(builder.module, function_type, name)
        function.linkage = "internal"
        # LLVM takes half of them on Intel, for clocks that older processors slowed down;
        # a fifth of PReLU's backward pass.  Its list of attributes lacks this one.
        set.add(function.attributes, '"prefer-vector-width"="512"')
        function.attributes.add("noinline")  # its address is taken: that would be twice
        packed = cgutils.alloca_once_value(builder, args[1])

        inside = ir.IRBuilder(function.append_basic_block())
        address = inside.inttoptr(function.args[0], packed.type)
        values = cgutils.unpack_tuple(inside, inside.load(address))
        status, _ = context.call_internal_no_propagate(
            inside, compiled.fndesc, compiled.signature, (*values, *function.args[1:])
        )
        with inside.if_then(status.is_error, likely=False):
            # Only an index that Numba was told to check: there is nobody to tell.
            _emit(inside, "llvm.trap", ir.VoidType())
        inside.ret(ir.IntType(32)(0))

        team = _team_of(builder.module)
        where = [builder.ptrtoint(p, _WORD) for p in (function, packed)]
        share = builder.load(builder.gep(team, [_WORD(_SHARE)]))
        has_team = builder.icmp_unsigned("!=", share, _WORD(0))
        with builder.if_else(has_team, likely=True) as (together, alone):
            with together:
                function_type = ir.FunctionType(ir.VoidType(), [_WORD] * 5).as_pointer()
                builder.call(
                    builder.inttoptr(share, function_type), [*where, *args[2:]]
                )
            with alone:
                builder.call(function, [where[1], _WORD(0), args[2]])
        return context.get_dummy_value()

    return types.void(body, arguments, types.intp, types.intp, types.intp), codegen


@inlined
def is_ready():
    """Say whether a large array may be shared, or `ready` has something to do first.

    Needs the interpreter's lock: it looks at a global name of Numba's.
    """
    team = _team()
    if team[_SHARE] == 0:
        return False
    unknown = team[_THEIRS] == 0 and team[_UNTIL] >= 0
    if unknown and _dict_item(team[_MODULES], team[_TORCH]) != 0:
        team[_UNTIL] -= 1
        if team[_UNTIL] < 0:
            return False
    return team[_LIMIT] != 0 or _dict_item(team[_NUMBA], team[_LAUNCHED]) != team[_TRUE]


_LINUX = {  # the last one says that all are there
    _PLACE: "sched_getcpu",
    _GET_PLACES: "sched_getaffinity",
    _SET_PLACES: "sched_setaffinity",
    _THREAD: "gettid",
}


# The team itself ----------------------------------------------------------------------

_functions: list[Any] = []  # must never be freed


def ready(moved: int = 2 * SHARE) -> None:
    """Start the team, if it is not, before a loop that it may share."""
    if moved < 2 * SHARE:
        return
    if not _memory[_SHARE]:
        _start()
    elif _memory[_UNTIL] == -1:
        _look_for_theirs()
    if not _memory[_LIMIT] and parallel._is_initialized:
        # From here on somebody may have asked Numba for fewer threads.
        _memory[_LIMIT] = llvm.address_of_symbol("get_num_threads") or 0
        _memory[_TRUE] = 0  # there is no more to look for


_launched, _torch = sys.intern("_is_initialized"), sys.intern("torch")
_modules = sys.modules
_NEVER = -2  # is there anything to look for
_looking = threading.Lock()


def _look_for_theirs() -> None:
    """Get to know PyTorch's threads, if they are awake; else look again, ever later."""
    global _pause
    _memory[_UNTIL] = _pause = min(2 * _pause + 1, 1023)
    found = openmp.functions()
    if not found or not _looking.acquire(blocking=False):
        return
    try:
        ours = {*_memory[_MEMBER + _ID :: _MEMBER_SIZE].tolist()}
        ours.add(threading.get_native_id())
        *called, pause, clock = found
        number = ctypes.CFUNCTYPE(ctypes.c_int)(called[1])()
        if not _memory[_THEIRS] and 1 < number <= _MOST:  # another thread's, by now
            _memory[[_FORK, _GET_MOST, _GET_PLACE, _GET_TIME]] = *called, clock
            if openmp.running(ours) >= number - 1:
                _meet(number, pause)
    finally:
        _looking.release()


def _meet(number: int, pause: int) -> None:
    """Have so many threads tell what Linux calls them, and keep some of their clocks."""
    _memory[_JOIN], tell = _for_theirs()
    told, known = np.zeros(_MOST, np.int64), openmp.threads()
    _memory[_JOINED] = 0
    fork = ctypes.CFUNCTYPE(
        None, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_uint] * 2
    )
    fork(int(_memory[_FORK]))(tell, told.ctypes.data, number, 0)
    others = [int(i) for i in told[told > 0] if i != threading.get_native_id()]
    if not known.issuperset(others):  # those awake are another thread's
        openmp.dismiss(pause)
    elif len(others) == number - 1:
        clocks = [openmp.clock_of(i) for i in others[:: -(-number // openmp.ASKED)]]
        _memory[_CLOCKS : _OTHERS + 1] = 0
        _memory[_CLOCKS : _CLOCKS + len(clocks) * _CLOCK_SIZE : _CLOCK_SIZE] = clocks
        _memory[_NEEDED] = _FEW
        _memory[_OWNER], _memory[_THEIRS] = threading.get_ident(), number


@functools.cache
@shielded
def _for_theirs() -> tuple[int, int]:
    """Return what PyTorch's threads are to call: for a loop, and to tell who they are."""
    made = [compile_and_keep(f, types.void(_word)) for f in (_join, _tell)]
    _functions.extend(made)
    return made[0].address, made[1].address


_pause, _was_forked = 0, False


def _count_looks(look: Callable[[int], None]) -> int:
    """Return how often one looks for work in `_PATIENCE`.

    What tells a processor to give way for a moment costs up to 140 cycles, or just one.
    """
    seconds, number = [], 1000
    for _ in range(3):
        start = time.perf_counter()
        look(number)
        seconds.append(time.perf_counter() - start)
    return max(100, int(number * _PATIENCE / max(min(seconds), 1e-6)))


@shielded
def _start() -> None:
    if _memory[_SHARE]:  # by another thread, while this one waited
        return
    share = compile_and_keep(_share, types.void(*[_word] * 5))
    member = compile_and_keep(_member, types.void(_word))
    look = compile_and_keep(_look_in_vain, types.void(_word))
    if _memory[_SHARE]:  # by a signal's handler, while that was compiled
        return
    _functions.extend((share, member, look))
    _memory[_LOOKS] = _count_looks(
        ctypes.PYFUNCTYPE(None, ctypes.c_int64)(look.address)
    )
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        with contextlib.suppress(AttributeError):  # one that lacks a function
            for word, name in _LINUX.items():
                function = ctypes.cast(getattr(library, name), ctypes.c_void_p)
                _memory[word] = function.value or 0
    _memory[_PROCESS] = os.getpid()
    members = min(config.NUMBA_NUM_THREADS, _MOST)
    if "NUMBA_NUM_THREADS" not in os.environ:
        members = host.processors(members)
    for me in range(members):
        words = _MEMBER + me * _MEMBER_SIZE
        lock = new_lock()
        if lock is None:
            break
        take_lock(lock, 0)
        _memory[words + _LOCK], _memory[words + _FORBIDDEN] = lock, -1
        if me > 0:
            with sufficient_stack(_STACK), signals_elsewhere():
                if new_thread(member.address, me) == NO_THREAD:
                    break
            _memory[_WORKERS] = me
    _memory[_NUMBA], _memory[_LAUNCHED] = id(vars(parallel)), id(_launched)
    _memory[_TRUE] = id(True)
    _memory[_ALONE] = ALONE
    _memory[_MODULES], _memory[_TORCH] = id(_modules), id(_torch)
    if not _memory[_THREAD] or _was_forked:
        _memory[_UNTIL] = _NEVER
    _memory[_SHARE] = share.address


def _after_fork_in_child() -> None:
    global _was_forked
    _memory[:], _was_forked = 0, True  # a child's OpenMP waits for threads it has not


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
