"""The benchmark's peers, their workers, and the command that shows them."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import PATIENCE, floats_here, run_command, started

from fastrelu.cli.peers.base import Peer, Unsupported
from fastrelu.cli.peers.cases import COMMON, OPS, Case, Data, size
from fastrelu.cli.peers.libraries import PEERS, NumPy
from fastrelu.cli.peers.team import Team, Worker
from fastrelu.cli.peers.worker import check, serve, settle

# The benchmark has the others in float32 only.
EVERY_DTYPE = [
    op
    for op, row in OPS.items()
    if row.activation in ("relu", "leaky_relu", "prelu") and row.arguments == "plain"
]
CASES = [
    Case(op, mode, dtype, n)
    for op, row in OPS.items()
    for mode in row.modes
    for dtype in (floats_here() if op in EVERY_DTYPE else ["float32"])
    for n in (1, 1000)
]
SMALL = Case("relu", "fresh", "float32", 1000)


@pytest.mark.parametrize("name", ["relu-fresh-float32-1M", "prelu_last-out-float16-1"])
def test_a_case_has_a_name(name):
    assert Case.parse(name).name == name


def test_every_case_comes_back_from_its_name():
    assert [Case.parse(case.name) for case in CASES] == CASES


@pytest.mark.parametrize(
    "name",
    [
        "swish-fresh-float32-1",
        "relu-here-float32-1",
        "relu-fresh-int8-1",
        "relu-fresh-float32-0",
        "relu-fresh-float32-1T",
        "prelu_both-out-float32-1",
        "squared_relu-inplace-float32-1",
        "relu:crop-fresh-float32-1",
        "relu:prelu-fresh-float32-1",
    ],
)
def test_there_is_no_such_case(name):
    with pytest.raises(ValueError, match=r"unknown|has no|expected"):
        Case.parse(name)


def test_bytes():
    n = size("1M")
    expected = {
        "relu-fresh-float32-1M": 8 * n,
        "relu-inplace-float16-1M": 4 * n,
        "relu_mask-fresh-float32-1M": 8 * n + n // 8,
        "leaky_relu_backward-out-float32-1M": 12 * n,
        "relu_backward_mask-fresh-float64-1M": 16 * n + n // 8,
        "prelu_backward_rows-fresh-float32-1M": 12 * n,
        "prelu_both-fresh-float32-1M": 20 * n,
        "relu6_mask-fresh-float32-1M": 8 * n + n // 8,
        "rrelu-fresh-float32-1M": 8 * n,
        "rrelu_backward-fresh-float32-1M": 16 * n,
        "relu:strided-fresh-float32-1M": 8 * n,
    }
    assert {name: Case.parse(name).bytes for name in expected} == expected


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_computes_the_right_thing(name):
    if missing := PEERS[name].missing():
        pytest.skip(missing)
    can = [case for case in CASES if not PEERS[name].lacks(case)]
    assert can
    if name == "torch-tcmalloc":  # torch in another environment
        return
    peer = PEERS[name]()
    for case in can:
        check(peer, case)


SPOILT = {
    "dtype": (
        lambda y: y.astype(np.float64),
        "result 0 is float64 .* expected float32",
    ),
    "shape": (lambda y: y[:-1], "expected float32 of shape"),
    "value": (lambda y: y + (y == y.max()), r"result 0 is .* at \(\d+,\), expected"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_wrong_result_is_noticed(what):
    spoil, message = SPOILT[what]

    class Odd(NumPy):
        def arrays(self, case, result):
            return [spoil(array) for array in super().arrays(case, result)]

    with pytest.raises(AssertionError, match=message):
        check(Odd(), SMALL)


ACTIVE = {
    "relu6_mask-fresh-float32-1000": lambda x: x > 0,
    "threshold_mask-fresh-float32-1000": lambda x: x > 0,
    "relu_mask:nhwc-fresh-float32-1000": lambda x: x > 0.5,
}


@pytest.mark.parametrize("name", ACTIVE)
def test_a_mask_of_another_predicate_is_noticed(name):
    case = Case.parse(name)

    class Odd(NumPy):
        def array(self, case, result):
            array = super().array(case, result)
            return ACTIVE[name](Data(case, 0.25).x) if array.dtype == bool else array

    check(NumPy(), case)
    with pytest.raises(AssertionError, match=r"result 1 is [01] at"):
        check(Odd(), case)


# For 1k: the shape, and the strides in elements.
LAID_OUT = {
    "relu:columns": ((2, 512), (1024, 1)),
    "relu:strided": ((1024,), (2,)),
    "relu:transposed": ((2, 512), (1, 2)),
    "relu_mask:nhwc": ((1, 4, 4, 64), (1024, 4, 1, 16)),
    "relu:crop": ((1, 64, 4, 4), (64 * 36, 36, 6, 1)),
}


@pytest.mark.parametrize("op", LAID_OUT)
def test_how_arrays_lie(op):
    data = Data(Case(op, OPS[op].modes[-1], "float32", 1024), 0.25)
    assert (data.x.shape, tuple(s // 4 for s in data.x.strides)) == LAID_OUT[op]
    if OPS[op].modes[-1] == "out":
        assert data.target.flags.c_contiguous


def test_what_slopes_and_weights_are():
    assert type(Data(Case.parse("leaky_relu:int-fresh-float32-8"), 0.25).slope) is int
    scalar = Data(Case.parse("leaky_relu:scalar-fresh-float64-8"), 0.25).slope
    assert type(scalar) is np.float64
    assert Data(Case.parse("prelu:broadcast-fresh-float32-1k"), 0.25).w.ndim == 4
    slopes = Data(Case.parse("rrelu_backward-fresh-float32-1k"), 0.25).slope
    assert slopes.shape == (1024,)


def test_a_peer_without_a_call():
    with pytest.raises(NotImplementedError):
        Peer().call(SMALL, None)


def test_what_onnxruntime_does_not_have(monkeypatch):
    runtime = pytest.importorskip("onnxruntime")
    missing = runtime.capi.onnxruntime_pybind11_state.NotImplemented

    def session(*_, **__):
        raise missing("no kernel")

    monkeypatch.setattr(runtime, "InferenceSession", session)
    peer = PEERS["onnxruntime"]()
    with pytest.raises(Unsupported, match="no relu for float32"):
        peer.call(SMALL, peer.data(SMALL, 0.2))


@pytest.mark.parametrize("busy", [0, 3, 1000])
def test_how_long_a_worker_settles(busy, monkeypatch):
    slept, times = [], itertools.count()
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(
        time, "process_time", lambda: next(times) if len(slept) <= busy else 0
    )
    settle()
    assert len(slept) == min(busy + 1, 200)


def test_a_worker_that_fails_in_its_turn(monkeypatch):
    """It gets no other turn; one that cannot has none at all."""
    asked = []

    class Worker:
        version = "1"

        def __init__(self, peer):
            self.peer, self.name = peer, peer.name

        def revive(self):
            pass

        def end(self):
            pass

        def ask(self, *request):
            asked.append((self.name, request[0]))
            if self.name == "cannot":
                return {"cannot": "no relu"}
            if request[0] == "turn" and self.name == "fails":
                return {"error": "no luck"}
            return {"seconds": [1.0, 5.0, 3.0]} if request[0] == "turn" else {}

    monkeypatch.setattr("fastrelu.cli.peers.team.Worker", Worker)
    peers = [type(name, (NumPy,), {"name": name}) for name in ("works", "fails")]
    peers.append(type("cannot", (NumPy,), {"name": "cannot"}))
    peers.append(type("lacks", (NumPy,), {"name": "lacks", "dtypes": ("float64",)}))
    with Team(peers) as team:
        works, fails, cannot, lacks = team.measure(SMALL, turns=2)
    assert (works.seconds, works.error) == ([1.0, 5.0, 3.0] * 2, "")
    assert works.turns == [3.0, 3.0]
    assert (fails.seconds, fails.turns, fails.error) == ([], [], "no luck")
    assert cannot.seconds == lacks.seconds == []
    assert lacks.cannot
    assert "lacks" not in [name for name, _ in asked]
    assert asked.count(("fails", "turn")) == 1


def test_a_request_that_a_peer_cannot_do(monkeypatch, capfd):
    class Odd(NumPy):
        def call(self, case, data):
            raise Unsupported("not this one")

    request = json.dumps(["open", SMALL.name])
    monkeypatch.setattr(sys, "stdin", [request])
    kept = os.dup(1), os.dup(2)
    try:
        serve(Odd())
    finally:
        for number, handle in enumerate(kept, 1):
            os.dup2(handle, number)
            os.close(handle)
    assert json.loads(capfd.readouterr().out.splitlines()[1]) == {
        "cannot": "not this one"
    }


def worker(body):
    """A peer that is NumPy but for what its worker does."""

    class Odd(NumPy):
        name = "odd"

        @classmethod
        def command(cls):
            start = "import os, sys\nimport numpy as np\n"
            start += "from fastrelu.cli.peers.libraries import NumPy\n"
            start += "from fastrelu.cli.peers.worker import serve\n"
            start += "class Odd(NumPy):\n  def call(self, case, data):\n"
            return [sys.executable, "-c", f"{start}    {body}\nserve(Odd())"]

    return Odd


def test_the_peers_take_turns(monkeypatch):
    order = []
    ask = Worker.ask

    def spy(self, *request):
        order.append((self.peer.name, request[0]))
        return ask(self, *request)

    monkeypatch.setattr(Worker, "ask", spy)
    with Team([PEERS["fastrelu"], NumPy]) as team:
        results = team.measure(SMALL, turns=2)
    requests = ["open", "turn", "turn", "close"]
    assert order == [(n, r) for r in requests for n in ("fastrelu", "numpy")]
    for result in results:
        assert not result.error
        assert len(result.seconds) >= 6
        assert 0 < result.median < 1
        assert result.version


def measured(peers, *cases):
    with Team(peers) as team:
        return [result for case in cases for result in team.measure(case, turns=1)]


def test_what_a_library_prints_does_no_harm():
    noisy = worker(
        "os.system('echo hello'); print('hello'); return lambda: data.x * (data.x > 0)"
    )
    (result,) = measured([noisy], SMALL)
    assert not result.error
    assert result.seconds


def test_a_worker_answers_until_there_are_no_more_requests():
    requests = [
        ["turn"],
        ["open", SMALL.name],
        ["turn"],
        ["open", "relu-fresh-float32-0"],
        ["close"],
        ["turn"],
    ]
    done = subprocess.run(
        [sys.executable, "-m", "fastrelu.cli.peers.worker", "numpy"],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        check=True,
    )
    version, *answers = map(json.loads, done.stdout.splitlines())
    assert version == {"version": np.__version__}
    assert len(answers[2].pop("seconds")) >= 3
    assert "expected a size" in answers[3].pop("error")
    assert answers == [{}] * len(requests)
    assert done.stderr == ""


def test_torch_with_tcmalloc_where_it_is(monkeypatch):
    peer = PEERS["torch-tcmalloc"]
    monkeypatch.setattr("sys.platform", "linux")
    for found, missing in ((None, "libtcmalloc is not"), ("libtcmalloc.so.4", "")):
        monkeypatch.setattr("ctypes.util.find_library", {"tcmalloc": found}.get)
        monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
        assert peer.missing().startswith(missing)
    assert peer.missing() == ""
    assert peer.environment() == {"LD_PRELOAD": "libtcmalloc.so.4"}
    monkeypatch.setattr("sys.platform", "win32")
    assert peer.missing()


ERRORS = {
    "sys.exit('so long')": "status 1: so long",
    "os._exit(3)": "status 3",
    "raise RuntimeError('no luck')": "RuntimeError: no luck",
    "return lambda: data.x + 1": "AssertionError: result 0 is",
    "return lambda: np.maximum(data.x, 0).astype('f8')": "is float64",
}


@pytest.mark.parametrize("body", ERRORS)
def test_a_bad_peer_is_told_and_the_others_go_on(body):
    odd, ours = measured([worker(body), NumPy], SMALL)
    assert ERRORS[body] in odd.error
    assert not odd.seconds
    assert ours.seconds


def test_a_worker_that_died_is_back_for_the_next_case():
    bad = worker(
        "return sys.exit(1) if case.n == 1000 else lambda: np.maximum(data.x, 0)"
    )
    other = Case("relu", "fresh", "float32", 64)
    first, second = measured([bad], SMALL, other)
    assert first.error
    assert second.seconds


def test_the_workers_end_with_the_team():
    with Team([NumPy]) as team:
        team.measure(SMALL, turns=1)
        processes = [worker.process for worker in team.workers.values()]
    assert all(process.returncode is not None for process in processes)


COMMAND = [sys.executable, "-m", "fastrelu", "bench"]


def call(*arguments, cwd):
    return run_command([*COMMAND, *arguments], cwd=cwd)


def test_the_command_prints_a_table(tmp_path):
    done = call("--peers", "numpy", "--size", "64,1k", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = [line.split() for line in done.stdout.partition("\n\n")[0].splitlines()]
    assert table[0] == ["size", "fastrelu", "GB/s", "numpy"]
    expected = [line for op, mode in COMMON for line in ([op, mode], ["64"], ["1k"])]
    wanted = zip(table[1:], expected, strict=True)
    assert all(line[: len(start)] == start for line, start in wanted)
    rows = [line for line in table[1:] if line[0] in ("64", "1k")]
    assert all(re.fullmatch(r"\(.*-.*\)", row[-1]) for row in rows)
    assert all(row[-2].endswith("x") for row in rows)
    assert len(done.stderr.splitlines()) == len(rows)


WRONG = {
    "--peers abacus": "abacus",
    "--peers": "--peers",
    "--size 0": "--size",
    "--size 1k,big": "big",
    "--dtype int8": "int8",
    "--turns 3": "--turns",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_a_wrong_argument_is_one_line(arguments, tmp_path):
    done = call(*arguments.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert WRONG[arguments] in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_shows_what_there_is(tmp_path):
    command = [*COMMAND, "--peers", "numpy", "--size", "64"]
    with started(command, cwd=tmp_path) as process:
        for line in process.stderr:
            if line.startswith("3/"):
                break
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "fastrelu bench: interrupted"
    assert "relu out" in output
