"""The command line: ``fastrelu train``, ``bench`` and ``info``."""

import argparse
import os
import sys
from typing import Any

from fastrelu import __doc__ as about
from fastrelu import __version__
from fastrelu.cli import bench, info, train


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> Any:
        """Print the message and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser() -> Parser:
    """Return the parser of the whole command line."""
    top = Parser(prog="fastrelu", description=about)
    top.add_argument("--version", action="version", version=f"fastrelu {__version__}")
    commands = top.add_subparsers(title="commands", metavar="command")
    for command in (train, bench, info):
        command.add(commands)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a command; return the exit status."""
    if sys.stdout is None:
        return failed("standard output is closed")
    try:
        try:
            return run(argv)
        finally:  # or its error comes when the process ends
            sys.stdout.flush()
    except OSError as error:
        # What is still in the buffer goes nowhere: to try again would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return failed(error)


def failed(why: object) -> int:
    """Say on one line why a command could not do its work; return the exit status."""
    print(f"fastrelu: error: {why}", file=sys.stderr)
    return 1


def run(argv: list[str] | None) -> int:
    """Run a command whose output can be written; return the exit status."""
    top = parser()
    args = top.parse_args(argv)
    if "run" not in args:
        top.print_help()
        return 0
    status: int = args.run(args)
    return status
