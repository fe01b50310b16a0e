"""``python -m fastrelu``: the command line in a process of its own."""

import signal
import sys

from fastrelu.cli import main
from fastrelu.cli.interrupts import leave

if __name__ == "__main__":
    signal.signal(signal.SIGINT, leave)
    if hasattr(signal, "SIGPIPE"):
        # End without a word where nobody reads on, as in `... | head`.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
