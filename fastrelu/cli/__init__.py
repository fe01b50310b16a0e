"""The command line: ``fastrelu train``, ``bench`` and ``info``."""

import argparse
from typing import Any

from fastrelu import __version__
from fastrelu.cli import bench, info, train


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> Any:
        """Print the message and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser() -> Parser:
    """Return the parser of the whole command line."""
    top = Parser(
        prog="fastrelu", description="ReLU, Leaky ReLU and PReLU for NumPy arrays."
    )
    top.add_argument("--version", action="version", version=f"fastrelu {__version__}")
    commands = top.add_subparsers(title="commands", metavar="command")
    for command in (train, bench, info):
        command.add(commands)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a command; return the exit status."""
    top = parser()
    args = top.parse_args(argv)
    if "run" not in args:
        top.print_help()
        return 0
    status: int = args.run(args)
    return status
