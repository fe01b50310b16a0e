"""``python -m fastrelu`` or ``fastrelu``: the command line in a process of its own."""

import signal
import sys

from fastrelu.cli import main
from fastrelu.cli.interrupts import leave


def run() -> int:
    """Run a command as the whole process does; return the exit status."""
    signal.signal(signal.SIGINT, leave)
    if hasattr(signal, "SIGPIPE"):
        # End without a word where nobody reads on, as in `... | head`.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    return main()


if __name__ == "__main__":
    sys.exit(run())
