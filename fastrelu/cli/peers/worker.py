"""In the process of a peer: whether it is right, and how long it takes."""

import json
import os
import sys
import time
import timeit
from dataclasses import replace
from typing import Any

import numpy as np

from fastrelu.cli.peers.base import Peer, Unsupported
from fastrelu.cli.peers.cases import Case, Data
from fastrelu.cli.peers.libraries import PEERS

SAMPLE = 1e-3  # seconds that a sample should last at least
TURN = 0.02  # seconds that the samples of a turn should last together
CHECKED = 1 << 16  # elements on which a peer is checked

SLOPE = 0.25


def check(peer: Peer, case: Case) -> None:
    """Compare a peer's results on a small copy of a case with the obvious ones.

    Raises
    ------
    AssertionError
        If they differ by more than rounding.
    """
    case = replace(case, n=min(case.n, CHECKED))
    data, given = Data(case, SLOPE), peer.data(case, SLOPE)
    expected = list(data.expected(case))
    results = peer.arrays(case, peer.call(case, given)())
    if given.target is not None:
        results[0] = given.get(given.target)
    for i, (result, (wanted, error)) in enumerate(zip(results, expected, strict=False)):
        type_ = data.x.dtype if wanted.dtype == np.float64 else wanted.dtype
        if (result.dtype, result.shape) != (type_, wanted.shape):
            msg = (
                f"result {i} is {result.dtype} of shape {result.shape}, "
                f"expected {type_} of shape {wanted.shape}"
            )
            raise AssertionError(msg)
        got = result.astype(np.float64)
        relative = 4 * float(np.spacing(data.x.dtype.type(1)))
        wrong = ~np.isclose(got, wanted, relative, error, equal_nan=True)
        if wrong.any():
            at = tuple(np.argwhere(wrong)[0].tolist())
            msg = f"result {i} is {got[at]:g} at {at}, expected {wanted[at]:g}"
            raise AssertionError(msg)


class Stopwatch:
    """A case of a peer, and how many calls make a sample.

    Every turn has new arrays: how they lie in memory, and in the caches, can make a
    tenth of the time, and more than that where it happens to suit or not to suit.
    """

    def __init__(self, peer: Peer, case: Case) -> None:
        check(peer, case)
        self.peer, self.case = peer, case
        timer = self.timer()
        self.number = 1
        timer.timeit(2)
        while (seconds := timer.timeit(self.number)) < SAMPLE:
            self.number *= 2
        self.samples = max(3, min(10, round(TURN / seconds)))

    def timer(self) -> timeit.Timer:
        """Return what times a call on new arrays."""
        # Products in place, again and again, would end in subnormals, which are slow
        # for everybody.
        slope = 1.0 if self.case.mode == "inplace" else SLOPE
        data = self.peer.data(self.case, slope)
        return timeit.Timer(self.peer.call(self.case, data))

    def turn(self) -> list[float]:
        """Warm up; return seconds per call."""
        timer = self.timer()
        timer.timeit(max(2, self.number))
        times = timer.repeat(self.samples, self.number)
        return [seconds / self.number for seconds in times]


def settle() -> None:
    """Wait until the other threads sleep, or for a second.

    Thread pools spin for a while in the hope of more work, ONNX Runtime's for 30 ms.
    On the cores that the next peer needs, that would make it look slow.
    """
    for _ in range(200):
        before = time.process_time()
        time.sleep(0.005)
        if time.process_time() - before < 0.0005:
            return


def serve(peer: Peer) -> None:
    """Answer the requests on stdin, a line of JSON each, until there are no more."""
    # What libraries print must not get between the answers: it goes with the errors.
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        print(json.dumps({"version": peer.version}), file=answers)
        stopwatch = None
        for line in sys.stdin:
            request, *arguments = json.loads(line)
            answer: dict[str, Any] = {}
            try:
                if request == "open":
                    stopwatch = Stopwatch(peer, Case.parse(*arguments))
                elif request == "close":
                    stopwatch = None
                elif stopwatch is not None:
                    answer["seconds"] = stopwatch.turn()
            except Unsupported as error:
                answer["cannot"] = str(error)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is told
                answer["error"] = f"{type(error).__name__}: {error}"
            settle()
            print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    serve(PEERS[sys.argv[1]]())
