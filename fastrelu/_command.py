"""Lets Ctrl-C end the command line quietly while NumPy and Numba are imported.

They take a second.  Both ``python -m fastrelu`` and the script ``fastrelu`` import this
package before any other line of the command line runs, so it has to ask who imports it.
"""

import contextlib
import signal
import sys
from pathlib import PurePath


def is_command(argv: list[str], all_of_it: list[str]) -> bool:
    """Say whether ``sys.argv`` and ``sys.orig_argv`` are those of the command line."""
    if argv[:1] == ["-m"]:  # Python is on its way to the module with that name
        return all_of_it[-len(argv)].removeprefix("-m") == "fastrelu"
    return PurePath(*argv[:1]).stem == "fastrelu"


def end_on_interrupt() -> None:
    """Have Ctrl-C end the process, unless somebody has decided otherwise."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with contextlib.suppress(ValueError):  # in a thread that may not decide it
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if is_command(sys.argv, sys.orig_argv):
    end_on_interrupt()
