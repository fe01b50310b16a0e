"""What a peer is: a library that does some of the cases."""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from fastrelu.cli.peers.cases import DTYPES, MODES, Case, Data

Array = Any


class Unsupported(Exception):
    """A peer has no way to do a case; the message is the reason."""


class Peer:
    """A library and how it does the cases.

    The class says what can be said without the library, which an instance imports.
    """

    name: str
    modules: tuple[str, ...]  # the first is the one whose version counts
    activations: tuple[str, ...] = ("relu", "leaky_relu", "prelu")
    passes: tuple[str, ...] = ("forward", "backward", "both")
    modes: tuple[str, ...] = MODES
    dtypes: tuple[str, ...] = DTYPES
    arguments: tuple[str, ...] = ("plain",)
    masks = False  # can a forward pass keep a bit an element?

    @classmethod
    def missing(cls) -> str:
        """Say what is not installed, or nothing."""
        for module in cls.modules:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
        return ""

    @classmethod
    def lacks(cls, case: Case) -> str:
        """Say why the peer cannot do a case, or nothing."""
        for wanted, known, what in (
            (case.row.activation, cls.activations, case.row.activation),
            (case.row.passes, cls.passes, "backward pass"),
            (case.mode, cls.modes, f"mode {case.mode!r}"),
            (case.dtype, cls.dtypes, case.dtype),
            (case.row.arguments, cls.arguments, f"arguments {case.row.arguments!r}"),
        ):
            if wanted not in known:
                return f"{cls.name} has no {what}"
        if case.row.mask and case.row.passes == "forward" and not cls.masks:
            return f"{cls.name} keeps no mask"
        if case.dtype == "bfloat16" and importlib.util.find_spec("ml_dtypes") is None:
            return "ml_dtypes is not installed"
        return ""

    @classmethod
    def command(cls) -> list[str]:
        """Return the command that starts a worker."""
        return [sys.executable, "-m", "fastrelu.cli.peers.worker", cls.name]

    @classmethod
    def environment(cls) -> dict[str, str]:
        """Return what a worker's environment has more than ours."""
        return {}

    @property
    def version(self) -> str:
        """The version of the library."""
        return importlib.metadata.version(self.modules[0])

    def data(self, case: Case, slope: float) -> Data:
        """Return the arrays of a case where this library works."""
        return Data(case, slope)

    def call(self, case: Case, data: Data) -> Callable[[], Any]:
        """Return what is timed."""
        raise NotImplementedError

    def array(self, case: Case, result: Any) -> Array:
        """Return one result of a call as a NumPy array."""
        return result

    def arrays(self, case: Case, result: Any) -> list[Array]:
        """Return the results of a call as NumPy arrays."""
        if isinstance(result, tuple):
            return [a for part in result for a in self.arrays(case, part)]
        return [self.array(case, result)]
