"""The team: every index once, whoever calls, and nothing that takes its host down."""

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numba
import numpy as np
import pytest

from fastrelu.cpu import threads
from fastrelu.cpu.jit import inlined

float32 = np.dtype(np.float32)
several_threads = pytest.mark.skipif(
    numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads"
)
NUMBAS_LAYERS = pytest.mark.parametrize(
    ("layer", "module"),
    [("tbb", "tbbpool"), ("omp", "omppool"), ("workqueue", "workqueue")],
)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def count():
    """count(hits, size, grain, moved): add 1 for each index that the team was given."""
    threads.ready()
    spread = threads.spread

    @inlined
    def add(hits, step, start, stop):
        for i in range(start, stop):
            hits[i] += step

    @numba.njit(nogil=True)
    def count(hits, size, grain, moved):
        spread(add, (hits, 1), size, grain, moved)

    return count


@pytest.mark.parametrize("moved", [0, threads.SHARE, 2 * threads.SHARE, threads.MUCH])
@pytest.mark.parametrize("grain", [1, 7, 4096])
@pytest.mark.parametrize("size", [0, 1, 6, 7, 8, 100, 4096, 100_003])
def test_every_index_once(count, size, grain, moved):
    hits = np.zeros(size + 2, np.int64)
    for times in range(1, 30):
        count(hits[1:-1], size, grain, moved)
        assert (hits[1:-1] == times).all()
    assert hits[0] == hits[-1] == 0


@several_threads
def test_from_many_threads_at_once(count):
    wrong = []

    def call(seed):
        rng = np.random.default_rng(seed)
        for _ in range(1000):
            size, grain = int(rng.integers(1, 20_000)), int(rng.integers(1, 300))
            hits = np.zeros(size, np.int64)
            count(hits, size, grain, threads.MUCH)
            if not (hits == 1).all():
                wrong.append((size, grain))

    team = [threading.Thread(target=call, args=(k,)) for k in range(16)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert wrong == []
    assert threads._memory[threads._BUSY] == threads._memory[threads._PENDING] == 0


@several_threads
def test_wakings_that_do_not_pay_become_rare(count):
    """Where calls are far apart, they soon leave the others asleep."""
    hits, shared = np.zeros(1 << 16, np.int64), []
    for _ in range(300):
        before = int(threads._memory[threads._LOOPS])
        count(hits, hits.size, 64, 2 * threads.SHARE)
        shared.append(int(threads._memory[threads._LOOPS]) - before)
        threading.Event().wait(0.001)
    assert (hits == 300).all()
    assert sum(shared[100:]) < 50


def run(script, timeout=300, **environment):
    """What a script prints, in a process of its own that must end well.

    All that it may compile has five minutes: on a busy machine that took more than one.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


PRELUDE = """
    import os, sys, threading, time
    import numba, numpy as np
    import fastrelu as F
    from fastrelu.cpu import threads
    x = np.random.default_rng(0).standard_normal(1 << 22).astype(np.float32)
    expected = np.maximum(x, 0)
    def loops():
        return int(threads._memory[threads._LOOPS])
    def works():
        before = loops()
        fine = np.array_equal(F.relu(x), expected)
        return fine and (loops() > before) == (numba.config.NUMBA_NUM_THREADS > 1)
"""

EVERYTHING = f"""
    import random, sys, threading, time
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    import numba, numpy as np
    import everything
    everything.lower_the_last_threshold()
    calls = everything.calls()
"""


@needs_fork
def test_a_child_has_a_team_of_its_own():
    script = """
    import warnings
    warnings.simplefilter("ignore")  # Python's own, at every fork beside threads
    def has_team():
        members = threads._memory[threads._WORKERS] + 1
        assert members == numba.config.NUMBA_NUM_THREADS
        tasks = "/proc/self/task"
        return not os.path.isdir(tasks) or len(os.listdir(tasks)) >= members
    assert works() and has_team()
    for _ in range(20):
        child = os.fork()
        if child == 0:
            grandchild = os.fork()
            fine = works() and works() and has_team()
            if grandchild:
                fine = fine and os.waitpid(grandchild, 0)[1] == 0
            os._exit(not fine)
        assert os.waitpid(child, 0)[1] == 0
        assert works()
    print("done")
    """
    assert run(PRELUDE + script) == "done\n"


@needs_fork
@pytest.mark.parametrize("forks", [6, pytest.param(300, marks=pytest.mark.long)])
def test_forks_in_the_midst_of_every_function(forks):
    """From three threads, beside eight that call: children and parents go on."""
    script = f"""
    import os, warnings
    warnings.simplefilter("ignore")
    def fork(seed):
        rng = random.Random(seed)
        for _ in range({forks} // 3):
            mine = rng.sample(calls, 8)
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    status = not all(call() for _, call in mine)
                finally:
                    os._exit(status)
            statuses.append(os.waitpid(child, 0)[1])
    statuses = []
    with everything.Storm(calls, 8) as storm:
        team = [threading.Thread(target=fork, args=(k,)) for k in range(3)]
        for thread in team: thread.start()
        for thread in team: thread.join()
        after = storm.number
        while storm.number < after + 16: time.sleep(0.01)
    print(storm.wrong[:3], statuses == [0] * {forks})
    """
    assert run(EVERYTHING + script) == "[] True\n"


def test_the_interpreter_ends_in_the_midst_of_daemon_threads_loops():
    script = """
    def call():
        while True:
            F.relu(x)
    for _ in range(3):
        threading.Thread(target=call, daemon=True).start()
    time.sleep(0.2)
    print("end")
    """
    for _ in range(3):
        assert run(PRELUDE + script) == "end\n"


@pytest.mark.parametrize("number", [1, 2, 3, 300])
def test_any_number_of_threads(number):
    script = "\n    print(all(works() for _ in range(20)), threads._memory[32])"
    output = run(PRELUDE + script, NUMBA_NUM_THREADS=str(number))
    assert output == f"True {min(number, threads._MOST) - 1}\n"


def test_the_first_call_may_take_the_long_way():
    script = "import fastrelu as F; print(F.relu([1.5, -2.0]).tolist())"
    assert run(script) == "[1.5, 0.0]\n"


def test_without_further_threads():
    """As many as the system grants are enough, and none is too."""
    script = """
    threads._new_thread = lambda *_: threads._NONE
    print(np.array_equal(F.relu(x), expected), loops())
    """
    assert run(PRELUDE + script) == "True 0\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
@several_threads
def test_members_keep_off_the_callers_processor():
    script = """
    for _ in range(200):
        F.relu(x)
        time.sleep(0.001)
    words = threads._MEMBER + threads._MEMBER_SIZE
    member = int(threads._memory[words + threads._ID])
    forbidden = int(threads._memory[words + threads._FORBIDDEN])
    print(forbidden in os.sched_getaffinity(member), len(os.sched_getaffinity(0)) -
          len(os.sched_getaffinity(member)))
    """
    assert run(PRELUDE + script) == "False 1\n"


@NUMBAS_LAYERS
def test_beside_numbas_own_threads(layer, module):
    """Whatever layer another library's kernels run on, ours do not meet it."""
    pytest.importorskip(f"numba.np.ufunc.{module}", exc_type=ImportError)
    script = """
    @numba.njit(parallel=True)
    def double(a):
        for i in numba.prange(a.size):
            a[i] *= 2
    double(x.copy())
    stop, wrong = threading.Event(), []
    def call():
        while not stop.is_set():
            if not np.array_equal(F.relu(x), expected):
                wrong.append(1)
    team = [threading.Thread(target=call) for _ in range(4)]
    for thread in team: thread.start()
    for _ in range(100):
        double(x.copy())
    stop.set()
    for thread in team: thread.join()
    numba.set_num_threads(1)
    before = loops()
    F.relu(x)
    print(numba.threading_layer(), wrong, loops() - before)
    """
    output = run(PRELUDE + script, NUMBA_THREADING_LAYER=layer)
    assert output == f"{layer} [] 0\n"


@several_threads
@NUMBAS_LAYERS
@pytest.mark.parametrize("seconds", [1.5, pytest.param(60, marks=pytest.mark.long)])
def test_every_function_from_many_threads(seconds, layer, module):
    """Beside kernels of another library, on as many threads as their layer bears."""
    pytest.importorskip(f"numba.np.ufunc.{module}", exc_type=ImportError)
    script = f"""
    @numba.njit(parallel=True)
    def double(a):
        for i in numba.prange(a.size):
            a[i] *= 2
    ones = np.ones(1 << 20)
    def others():
        while not storm.ended.is_set():
            a = ones.copy()
            double(a)
            if a.min() != 2 or a.max() != 2:
                storm.wrong.append("double")
    double(ones.copy())  # compiled before anything is timed
    storm = everything.Storm(calls)
    for _ in range(1 if "{layer}" == "workqueue" else 3):
        storm.team.append(threading.Thread(target=others))
    with storm:
        time.sleep({seconds})
        while min(storm.counts) < 1:  # on a busy machine; for ever, if one waits so
            time.sleep(0.1)
    print(numba.threading_layer(), storm.wrong[:3])
    """
    output = run(EVERYTHING + script, NUMBA_THREADING_LAYER=layer)
    assert output == f"{layer} []\n"


POOLS = {
    "executor": """
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(16) as pool:
        fine = list(pool.map(lambda row: row[1](), work))
    """,
    "dask": """
    import dask
    tasks = [dask.delayed(call, pure=False)() for _, call in work]
    fine = dask.compute(*tasks, scheduler="threads", num_workers=16)
    """,
}


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.long)])
@pytest.mark.parametrize("pool", POOLS)
def test_every_function_from_a_pool_of_threads(pool, rounds):
    if pool == "dask":
        pytest.importorskip("dask")
    script = f"""
    work = calls * {rounds}
    random.Random(0).shuffle(work)
    {POOLS[pool]}
    print([what for (what, _), right in zip(work, fine, strict=True) if not right])
    """
    assert run(EVERYTHING + script) == "[]\n"


def test_numba_starts_its_threads_in_the_midst_of_a_call():
    """Which from then on may be asked to be fewer: there is something to make ready."""
    script = """
    from numba.np.ufunc import parallel
    F.relu(x[::2])
    copyto = np.copyto
    def copy_and_launch(*arguments, **more):
        copyto(*arguments, **more)
        parallel._launch_threads()
    np.copyto = copy_and_launch
    assert not parallel._is_initialized
    print(np.array_equal(F.relu(x[::2]), expected[::2]), parallel._is_initialized)
    """
    assert run(PRELUDE + script) == "True True\n"
