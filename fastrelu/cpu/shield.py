"""Compilation, and threads, that no signal, small stack or fork can break.

All that is asked of Numba here is its lock, and to load what extends it.  The portable
loops need this, too, so that where there is none of that, it is done without.
"""

import _thread
import atexit
import contextlib
import ctypes
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

try:
    from llvmlite.binding import ffi
    from numba.core.compiler_lock import global_compiler_lock
    from numba.core.entrypoints import init_all
except ImportError:  # then a fork waits for no compilation but ours
    global_compiler_lock, ffi = threading.RLock(), None

    def init_all() -> None:
        """Have nothing to load."""


Function = Callable[..., Any]

_STACK = 1 << 24  # bytes, twice what threads have by default on Linux

# A fork waits for whoever holds this, who waits for nobody.
no_fork = threading.RLock()


@contextlib.contextmanager
def sufficient_stack(size: int = _STACK) -> Iterator[None]:
    """Have threads that are started meanwhile begin with so much stack at least.

    Whatever the host has set is there again afterwards.
    """
    with no_fork:  # a child needs the usual size
        before = threading.stack_size(size)  # to ask alone would set it to 0
        try:
            threading.stack_size(max(before, size))
            yield
        finally:
            threading.stack_size(before)


# A thread that never runs Python, and the lock that it sleeps on.  Python's are the ones
# that every platform has; they do not need its interpreter.
_python = ctypes.pythonapi
new_lock = _python.PyThread_allocate_lock
new_lock.restype = ctypes.c_void_p
take_lock = _python.PyThread_acquire_lock
take_lock.argtypes = ctypes.c_void_p, ctypes.c_int
new_thread = _python.PyThread_start_new_thread
new_thread.argtypes = ctypes.c_void_p, ctypes.c_void_p
new_thread.restype = ctypes.c_ulong
NO_THREAD = ctypes.c_ulong(-1).value

# A word that each thread has of its own, which compiled code may read without Python's
# interpreter: 1 while the thread's loops are to stay with it.
_new_key = _python.PyThread_tss_alloc
_new_key.restype = ctypes.c_void_p
_create_key = _python.PyThread_tss_create
_create_key.argtypes = (ctypes.c_void_p,)
_get_word = _python.PyThread_tss_get
_get_word.argtypes, _get_word.restype = (ctypes.c_void_p,), ctypes.c_void_p
_set_word = _python.PyThread_tss_set
_set_word.argtypes = ctypes.c_void_p, ctypes.c_void_p
ALONE = _new_key()
_create_key(ALONE)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Have this thread's loops stay with it: others have work of their own."""
    before = _get_word(ALONE)
    _set_word(ALONE, 1)
    try:
        yield
    finally:
        _set_word(ALONE, before)


def is_alone() -> bool:
    """Say whether this thread's loops are to stay with it."""
    return _get_word(ALONE) is not None


@contextlib.contextmanager
def signals_elsewhere() -> Iterator[None]:
    """Start threads that leave signals to those that were there before."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Task:
    """One call of a function that compiles, for all who wait for it."""

    def __init__(self, function: Function, arguments: tuple[Any, ...]) -> None:
        self.key = os.getpid(), function, arguments
        self.result: Any = None
        self.error: BaseException | None = None
        self.is_done = False
        self.waiting: list[Any] = []  # a lock each: who is interrupted may keep its own

    def run(self) -> None:
        _, function, arguments = self.key
        with global_compiler_lock:
            try:
                self.result = function(*arguments)
            except BaseException as error:  # noqa: BLE001
                self.error = error
        self.forget()
        self.is_done = True
        for lock in self.waiting:
            lock.release()

    def forget(self) -> None:
        """Have others ask anew."""
        if _tasks.get(self.key) is self:
            del _tasks[self.key]

    def run_elsewhere(self) -> None:
        """Run on a bare thread, which debuggers and coverage would not know."""
        sys.settrace(threading.gettrace())
        self.run()

    def start(self) -> None:
        """Have the work done, here if no thread can be had.

        Not by a `threading.Thread`: whoever is interrupted while one starts may leave it
        waiting for ever.
        """
        try:
            with sufficient_stack():
                _thread.start_new_thread(self.run_elsewhere, ())
        except RuntimeError as error:
            if error.__traceback__ is not None and error.__traceback__.tb_next:
                raise  # a signal's handler has raised that
            self.run()

    def wait(self) -> bool:
        """Wait until it is done; say whether it is, or this is a child without it."""
        lock = threading.Lock()
        lock.acquire()
        self.waiting.append(lock)
        while not self.is_done and not lock.acquire(timeout=1):
            if os.getpid() != self.key[0]:
                return False
        return True


_tasks: dict[Any, _Task] = {}


@atexit.register
def _finish() -> None:
    """Let what is begun end before the interpreter does."""
    for task in [*_tasks.values()]:
        task.wait()


def shielded(function: Function) -> Function:
    """Make a function one that compiles: one at a time, and never stopped midway.

    A signal's handler that raises, as Ctrl-C's does, would break Numba for the rest of
    the process: what it had taken from its lists and not used yet would be lost.  Only
    the main thread runs handlers, so another one compiles, and the main thread waits.
    An interruption ends the waiting; the work goes on, and whoever calls next waits for
    the same or finds it done.

    To compile also takes more stack than the threads of some hosts have, so that it is
    done elsewhere for them, too.
    """

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        if (
            getattr(global_compiler_lock, "is_locked", bool)()  # by this very thread
            or sys.is_finalizing()  # no other thread runs any more
        ):
            with global_compiler_lock:  # a fork waits for it
                return function(*arguments)
        # What extends Numba is imported here: this thread may be importing it already.
        init_all()
        own = _Task(function, arguments)
        try:
            task = _tasks.setdefault(own.key, own)
            if task is own:
                own.start()
        except BaseException:  # it may not have been started
            own.forget()
            raise
        if not task.wait():
            return run(*arguments)
        if task.error is not None:
            raise task.error
        return task.result

    return run


# A child that was forked while another thread compiled, or made something ready, would
# wait for ever for these locks of Numba and llvmlite at its first new function.
_llvmlite = getattr(ffi, "lib", None)
_waited_for = (
    global_compiler_lock,
    getattr(_llvmlite, "_lock", contextlib.nullcontext()),
    no_fork,  # the last: whoever compiles may take it
)


def _before_fork() -> None:
    for lock in _waited_for:
        lock.__enter__()


def _after_fork() -> None:
    for lock in reversed(_waited_for):
        lock.__exit__(None, None, None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork
    )
