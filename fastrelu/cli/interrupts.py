"""What Ctrl-C does: end the process, wait for the end of a step, or raise."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

INTERRUPTED = 128 + signal.SIGINT  # the exit status


def leave(*_: object) -> None:
    """Answer Ctrl-C where there is nothing to keep.

    An exception would get lost in the callbacks of a compiler, and go on from there.
    """
    os.write(2, b"\n" * sys.stderr.isatty() + b"fastrelu: interrupted\n")
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Turn Ctrl-C into an event, so that it never falls into the middle of a step."""
    event = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def raised_interrupt() -> Iterator[None]:
    """Have Ctrl-C raise where a process only waits for others, which end with it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
