"""Options, the machine's description, and how workers and pytest-benchmark meet."""

import os
import platform
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from fastrelu.cli.peers import libraries
from fastrelu.cli.peers.cases import Case
from fastrelu.cli.peers.team import Team

sys.path.insert(0, str(Path(__file__).parent))
import roof

PEERS = {**libraries.PEERS, "c": roof.Roof}


def pytest_addoption(parser):
    group = parser.getgroup("fastrelu")
    group.addoption("--full", action="store_true", help="the whole grid")
    group.addoption("--peers", help="names with commas (default: what is installed)")


def pytest_configure(config):
    given = config.getoption("--peers")
    names = given.split(",") if given else list(PEERS)
    for name in names:
        if name not in PEERS:
            msg = f"--peers: unknown {name!r}; there are {', '.join(PEERS)}"
            raise pytest.UsageError(msg)
        if given and (reason := PEERS[name].missing()):
            msg = f"--peers: {reason}"
            raise pytest.UsageError(msg)
    peers = [PEERS[name] for name in names if not PEERS[name].missing()]
    config.stash[SESSION] = Session(peers)


class Session:
    """Who takes part, and what was learned on the way."""

    def __init__(self, peers):
        self.peers = peers
        self.versions = {}


SESSION = pytest.StashKey[Session]()


@pytest.fixture(scope="session")
def session(pytestconfig):
    return pytestconfig.stash[SESSION]


@pytest.fixture(scope="session")
def limit():
    """Return the bytes the hardware copies, in 10^9 a second; None without C."""
    if roof.Roof.missing():
        return None
    with Team([roof.Roof]) as team:
        (result,) = team.measure(roof.LIMIT)
    return None if result.error else result.gb_per_s


def pytest_generate_tests(metafunc):
    """Run a test of workers on all that its module wants and its peers can do.

    A module says `cases(full)`, a list of names, and may say `PEERS`, who takes part
    if not everybody.
    """
    if "measured" not in metafunc.fixturenames:
        return
    config, module = metafunc.config, metafunc.module
    pairs = [
        (case, peer.name)
        for case in module.cases(config.getoption("--full"))
        for peer in peers_of(module, config)
        if not peer.lacks(Case.parse(case))
    ]
    metafunc.parametrize(("case", "peer"), pairs, ids=map("-".join, pairs))


def peers_of(module, config):
    wanted = getattr(module, "PEERS", None)
    if wanted is None:
        return config.stash[SESSION].peers
    return [peer for peer in wanted if not peer.missing()]


@pytest.fixture(scope="module")
def team(request):
    with Team(peers_of(request.module, request.config)) as team:
        yield team


@pytest.fixture
def measured(case, peer, team, request):
    """Return the result of a peer; the first to ask has all measured, in turn."""
    key = request.module, case
    if key not in MEASURED:
        MEASURED.clear()
        params = [
            item.callspec.params
            for item in request.session.items
            if item.module is request.module and hasattr(item, "callspec")
        ]
        names = [p["peer"] for p in params if p["case"] == case]
        results = team.measure(Case.parse(case), names)
        MEASURED[key] = {result.peer: result for result in results}
    return MEASURED[key][peer]


MEASURED = {}  # the latest case: the tests of a case follow one another


class Clock:
    """A clock that only goes on when it is told to."""

    now = 0.0

    def read(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


CLOCK = Clock()


def pytest_itemcollected(item):
    # pytest-benchmark times a call in this process, all rounds of one test before the
    # next.  What counts here is timed in the workers, where the peers take turns.  So
    # its clock stands still, and each round moves it by a sample that a worker took:
    # the statistics and the files are pytest-benchmark's, the times are the workers'.
    item.add_marker(pytest.mark.benchmark(timer=CLOCK.read))


@pytest.fixture
def replay(request):
    """Return what makes a sequence of seconds the rounds of this test."""

    def function(seconds, group, **extra_info):
        # Not before there is something to replay: it complains where it goes unused.
        benchmark = request.getfixturevalue("benchmark")
        benchmark.group = group
        benchmark.extra_info.update(extra_info)
        CLOCK.now = 0.0
        rest = iter(seconds)
        benchmark.pedantic(lambda: CLOCK.advance(next(rest)), rounds=len(seconds))

    return function


@pytest.fixture
def report(replay, session, limit):
    """Return what makes a result of the workers the result of this test."""

    def function(result, prefix=""):
        if result.cannot:
            pytest.skip(result.cannot)
        assert not result.error, f"{result.peer}: {result.error}"
        session.versions[result.peer] = result.version
        case = result.case
        replay(
            result.seconds,
            prefix + case.name,
            op=case.op,
            mode=case.mode,
            dtype=case.dtype,
            n=case.n,
            peer=result.peer,
            peer_version=result.version,
            bytes=case.bytes,
            gb_per_s=result.gb_per_s,
            limit_gb_per_s=limit,
        )

    return function


def pytest_benchmark_update_machine_info(config, machine_info):
    # Not all that pytest-benchmark says of the machine is for publication.
    machine_info.pop("node", None)
    arguments = config.invocation_params.args
    machine_info["fastrelu"] = {
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "numba": numba.__version__,
            **config.stash[SESSION].versions,
        },
        "command": " ".join(["pytest", *map(str, arguments)]),
    }


def machine():
    """Describe the machine in a line."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    parts = [model, f"{os.cpu_count()} cores"]
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        parts.append(f"{memory / 2**30:.0f} GiB")
    return ", ".join([*parts, f"{platform.system()} {platform.release()}"])
