"""Beside the processes of the peers: who takes a turn when, and what came of it."""

import contextlib
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

from fastrelu.cli.peers.base import Peer
from fastrelu.cli.peers.cases import Case

TURNS = 5


@dataclass
class Result:
    """What came of a case with a peer.

    `seconds` are those of a call, one number per sample, `turns` the median of each
    turn.  If there are none, `cannot` says why the peer does not do the case, or `error`
    what went wrong.
    """

    case: Case
    peer: str
    version: str = ""
    seconds: list[float] = field(default_factory=list)
    turns: list[float] = field(default_factory=list)
    cannot: str = ""
    error: str = ""

    @property
    def median(self) -> float:
        """The median of the seconds."""
        return statistics.median(self.seconds)

    @property
    def gb_per_s(self) -> float:
        """The bytes that have to be moved, in 10^9 a second."""
        return self.case.bytes / self.median / 1e9


class WorkerError(Exception):
    """A worker has ended; the message says how."""


class Worker:
    """The process of one peer, started anew for the next case if it has ended."""

    def __init__(self, peer: type[Peer]) -> None:
        self.peer = peer
        self.version = ""
        self.start()

    def start(self) -> None:
        """Start the process and do not wait for it."""
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.is_new = True
        self.process = subprocess.Popen(
            self.peer.command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | self.peer.environment(),
            process_group=0,  # Ctrl-C is ours; the process ends when we do
        )

    def ask(self, *request: str) -> dict[str, Any]:
        """Send a request; return the answer.

        Raises
        ------
        WorkerError
            If there is none.
        """
        if self.is_new:
            self.is_new = False
            self.version = self._answer()["version"]
        with contextlib.suppress(OSError):  # it has ended: there will be no answer
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        status = self.process.wait()
        self.errors.seek(0)
        last = self.errors.read().strip().rpartition("\n")[2]
        msg = f"its process ended with status {status}" + (last and f": {last}")
        raise WorkerError(msg)

    def revive(self) -> None:
        """Start the process again if it has ended."""
        if self.process.poll() is not None:
            self.end()
            self.start()

    def end(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError), self.process:
            self.process.kill()
        self.errors.close()


class Team:
    """A worker for each peer; a context manager that ends them.

    Parameters
    ----------
    peers : iterable of Peer classes
        In the order of their turns.
    """

    def __init__(self, peers: Iterable[type[Peer]]) -> None:
        self.peers = list(peers)

    def __enter__(self) -> Self:
        self.workers = {peer.name: Worker(peer) for peer in self.peers}
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.end()

    def measure(
        self, case: Case, names: Iterable[str] | None = None, turns: int = TURNS
    ) -> list[Result]:
        """Measure a case.

        Parameters
        ----------
        case : Case
            What to measure.
        names : iterable of str, optional
            Who takes part, if not all.
        turns : int
            How often each takes its turn.

        Returns
        -------
        list of Result
            One per peer.
        """
        names = list(self.workers if names is None else names)
        results = {name: Result(case, name) for name in names}
        opened = [name for name in names if self._open(results[name])]
        for _ in range(turns):
            for name in opened:
                if not results[name].error:
                    self._ask(results[name], "turn")
        for name in opened:
            self._ask(results[name], "close")
        return list(results.values())

    def _open(self, result: Result) -> bool:
        worker = self.workers[result.peer]
        result.cannot = worker.peer.lacks(result.case)
        if not result.cannot:
            worker.revive()
            self._ask(result, "open", result.case.name)
            result.version = worker.version
        return not result.cannot and not result.error

    def _ask(self, result: Result, *request: str) -> None:
        try:
            answer = self.workers[result.peer].ask(*request)
        except WorkerError as error:
            answer = {"error": str(error)}
        if seconds := answer.get("seconds"):
            result.seconds += seconds
            result.turns.append(statistics.median(seconds))
        result.cannot = answer.get("cannot", "")
        result.error = result.error or answer.get("error", "")
        if result.error:
            result.seconds.clear()
            result.turns.clear()
