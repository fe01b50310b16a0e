"""Processes: fork and spawn, signals, the interpreter's end, and the cache on disk."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import llvmlite.binding as llvm
import numba
import pytest
from conftest import PATIENCE, run_command, started
from test_threads import EVERYTHING, PRELUDE, needs_fork, run

import fastrelu

COLD = """
    import numpy as np
    import fastrelu as F
    x = np.linspace(-1, 1, 1000).astype(np.float32)
    print(np.array_equal(F.relu(x), np.maximum(x, 0)))
"""


# After this, whatever is not on the disk fails.
ONLY_LOAD = """
    from numba.core.ccallback import CFunc
    CFunc._compile_uncached = None
"""


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


# The cache on disk --------------------------------------------------------------------


def cut(data):
    return data[: len(data) // 2]


def flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


DAMAGES = lambda data: b"", cut, flip, lambda data: bytes(range(256)) * 8


def test_damaged_files_are_compiled_anew(tmp_path):
    """With two functions, whose files are damaged in all ways, two at a time."""
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    assert run(COLD, **cache) == "True\n"
    kept = files(tmp_path)
    whole = [path.read_bytes() for path in kept]
    assert len(kept) == 2
    for damages in (DAMAGES[:2], DAMAGES[2:]):
        for path, data, damage in zip(kept, whole, damages, strict=True):
            path.write_bytes(damage(data))
        assert run(COLD, **cache) == "True\n"
    assert files(tmp_path) == kept
    before = [path.stat().st_mtime_ns for path in kept]
    assert run(COLD, **cache) == "True\n"  # and that is kept
    assert [path.stat().st_mtime_ns for path in kept] == before


def test_from_the_disk_nothing_is_loaded_that_compiles(tmp_path):
    """That would be a third of a second at the start of each process."""
    script = (
        COLD
        + """
    import sys
    print("numba.np.arraymath" in sys.modules)
    """
    )
    for compiles in (True, False):
        assert run(script, NUMBA_CACHE_DIR=str(tmp_path)) == f"True\n{compiles}\n"


def test_machine_code_alone_is_kept(tmp_path):
    """LLVM's took half the time of a first call to read, and nobody wants it."""
    assert run(COLD, NUMBA_CACHE_DIR=str(tmp_path)) == "True\n"
    for path in files(tmp_path):
        (_, kind, (code, module)), *_ = pickle.loads(path.read_bytes()[32:])
        assert kind == "object"
        functions = [each.name for each in llvm.parse_bitcode(module).functions]
        assert [name.startswith("cfunc.") for name in functions] == [True]
        assert functions[0].encode() in code


@pytest.mark.long
def test_a_cache_of_another_version(tmp_path):
    """Both are kept: two versions may share a folder."""
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    other = '    import numba\n    numba.__version__ = "0.0"\n'
    assert run(other + COLD, **cache) == "True\n"
    before = {path: path.read_bytes() for path in files(tmp_path)}
    assert run(COLD, **cache) == "True\n"
    after = {path: path.read_bytes() for path in files(tmp_path)}
    assert len(after) == 2 * len(before)
    assert before.items() < after.items()
    for script in (other + ONLY_LOAD + COLD, ONLY_LOAD + COLD):
        assert run(script, **cache) == "True\n"


@pytest.mark.long
def test_settings_of_numba(tmp_path):
    """Not optimised, code is as right, and is kept beside the other."""
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    first = (
        COLD
        + """
    assert np.isclose(F.prelu_backward(x, x, x[:1].copy())[1][0], (x[x < 0] ** 2).sum())
    """
    )
    for script in (first, ONLY_LOAD + first):
        assert run(script, NUMBA_OPT="0", **cache) == "True\n"
    before = len(files(tmp_path))
    assert run(COLD, **cache) == "True\n"
    assert len(files(tmp_path)) == before + 2


def archive(folder, changed="", *change):
    """The package in a file, with a text of one of its sources replaced"""
    home, path = Path(fastrelu.__file__).parent, folder / "library.zip"
    with zipfile.ZipFile(path, "w") as file:
        for source in home.rglob("*.py"):
            text, name = source.read_text(), source.relative_to(home).as_posix()
            if name == changed:
                assert text.count(change[0]) == 1
                text = text.replace(*change)
            file.writestr(f"fastrelu/{name}", text)
    return str(path)


@pytest.mark.long
@pytest.mark.parametrize(
    ("where", "change", "result"),
    [
        (
            "NUMBA_CACHE_DIR",
            (
                "cpu/vector.py",
                "_same(value):\n    return ",
                "_same(value):\n    return 2 * ",
            ),
            "36.0",
        ),
        ("XDG_CACHE_HOME", ("cpu/jit.py", "passes.add_sroa_pass()", "pass"), "9.0"),
    ],
)
def test_from_an_archive(where, change, result, tmp_path):
    """Another process compiles nothing, unless something in the archive is new."""
    cache = {"NUMBA_CACHE_DIR": "", where: str(tmp_path / "cache")}
    cache["LOCALAPPDATA"] = cache[where]
    start = f"""
    import sys
    sys.path.insert(0, {archive(tmp_path)!r})
    """
    script = """
    import numpy as np, fastrelu as F
    assert F.__file__.startswith(sys.path[0])
    print(F.relu(np.ones(9)).sum(), F.relu(np.ones(9, "f4")).sum())
    """
    assert run(start + script, **cache) == "9.0 9.0\n"
    assert len(files(tmp_path / "cache")) == 3
    assert run(start + ONLY_LOAD + script, **cache) == "9.0 9.0\n"
    archive(tmp_path, *change)
    assert run(start + script, **cache) == f"{result} {result}\n"
    assert len(files(tmp_path / "cache")) == 6


def test_processes_that_start_at_once(tmp_path):
    script = textwrap.dedent(COLD)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                started([sys.executable, "-c", script], env=environment)
            )
            for _ in range(3)
        ]
        ends = [process.communicate(timeout=PATIENCE) for process in processes]
    assert ends == [("True\n", "")] * 3
    assert {path.suffix for path in files(tmp_path)} == {".nbc"}


def test_no_folder_for_the_cache(tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert run(COLD, NUMBA_CACHE_DIR=str(file)) == "True\n"


def test_a_disk_that_takes_nothing(tmp_path):
    script = """
    from pathlib import Path
    def full(*_):
        raise OSError(28, "No space left on device")
    Path.write_bytes = full
    """
    output = run(script + COLD, NUMBA_CACHE_DIR=str(tmp_path))
    assert output == "True\n"
    assert files(tmp_path) == []


# Copies -------------------------------------------------------------------------------

SECOND = {
    "another name": "",
    "the same name": """
    F.relu(x)
    for name in [*sys.modules]:
        if name.partition(".")[0] == "fastrelu":
            del sys.modules[name]
    """,
}


@pytest.mark.long
@pytest.mark.parametrize("under", SECOND)
def test_a_second_copy_under(under, tmp_path):
    """Each has its own team, in turns and at once, and finds its own code on the disk."""
    name = "fastrelu"
    if under == "another name":
        name, home = "vendor.fastrelu", Path(fastrelu.__file__).parent
        for source in home.rglob("*.py"):
            path = tmp_path / "vendor" / "fastrelu" / source.relative_to(home)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source.read_text().replace("from fastrelu", f"from {name}"))
    script = f"""
    import sys, threading
    import numba, numpy as np
    import fastrelu as F
    from fastrelu.cpu import threads
    x = np.random.default_rng(0).standard_normal((64, 1 << 15)).astype(np.float32)
    positive, weight = np.maximum(x, 0), np.full(64, 0.5, np.float32)
    gradient = np.where(x > 0, x, x / 2)
    {SECOND[under]}
    sys.path.insert(0, {str(tmp_path)!r})
    import {name} as G
    from {name}.cpu import threads as other
    wrong = []
    def call(k):
        for i in range(20):
            copy = (F, G)[(i + k) % 2]
            fine = np.array_equal(copy.relu(x), positive)
            dx, _ = copy.prelu_backward(x, x, weight, axis=0)
            if not fine or not np.array_equal(dx, gradient):
                wrong.append((k, i))
    for k in range(2):
        call(k)
    team = [threading.Thread(target=call, args=(k,)) for k in range(4)]
    for thread in team: thread.start()
    for thread in team: thread.join()
    def loops():
        return np.array([int(t._memory[t._LOOPS]) for t in (threads, other)])
    for copy in (F, G):
        before = loops()
        copy.leaky_relu(x)
        print(loops() - before, wrong)
    """
    script = script.replace("\n    \n", "\n")
    several = int(numba.config.NUMBA_NUM_THREADS > 1)
    for start in ("", ONLY_LOAD):
        printed = run(start + script, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
        assert printed == f"[{several} 0] []\n[0 {several}] []\n"


# Fork and spawn -----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocessing(method, tmp_path):
    """Workers that import the script, after and beside parallel calls."""
    if sys.platform == "win32" and method != "spawn":
        pytest.skip("needs fork")
    file = tmp_path / "script.py"
    main = f"""
    import multiprocessing, warnings
    warnings.simplefilter("ignore")
    def work(n):
        return works() and float(F.relu(x[:n]).sum())
    if __name__ == "__main__":
        context = multiprocessing.get_context("{method}")
        assert works()
        with context.Pool(2) as pool:
            wanted = [float(F.relu(x[:n]).sum()) for n in (10, 1 << 18, 1 << 22)]
            assert pool.map(work, (10, 1 << 18, 1 << 22)) == wanted
            assert works()
            pool.close()
            pool.join()
        print("done")
    """
    file.write_text(textwrap.dedent(PRELUDE) + textwrap.dedent(main))
    done = run_command([sys.executable, file])
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@needs_fork
def test_a_fork_in_the_midst_of_first_calls(tmp_path):
    script = """
    import warnings
    warnings.simplefilter("ignore")
    def call(first):
        for dtype in ("f2", "f4", "f8", "i1", "i2", "i4")[first:]:
            F.relu(x.astype(dtype), return_mask=True)
            F.get_default_memory_pool().free_all_blocks()
    team = [threading.Thread(target=call, args=(k,)) for k in range(3)]
    for thread in team: thread.start()
    forks = 0
    while any(thread.is_alive() for thread in team) or forks < 5:
        child = os.fork()
        if child == 0:
            fine = works() and F.get_default_memory_pool().used_bytes() >= 0
            os._exit(not fine)
        assert os.waitpid(child, 0)[1] == 0
        forks += 1
    print(works())
    """
    output = run(PRELUDE + script, NUMBA_CACHE_DIR=str(tmp_path))
    assert output == "True\n"


TORCH = """
    import torch
    ramp = torch.linspace(-1, 1, 1 << 20)
    clipped = torch.relu(ramp)  # on threads of its own, which live on
"""


@needs_fork
@pytest.mark.parametrize("when", ["before", "after"])
def test_pytorch_imported(when):
    """It brings an OpenMP of its own, which after a fork is of no more use to itself."""
    pytest.importorskip("torch")
    start = TORCH + EVERYTHING if when == "before" else EVERYTHING + TORCH
    script = """
    import os, warnings
    warnings.simplefilter("ignore")
    def others():
        while not storm.ended.is_set():
            if not torch.equal(torch.relu(ramp), clipped):
                storm.wrong.append("torch")
    storm = everything.Storm(calls, 4)
    storm.team.append(threading.Thread(target=others))
    statuses = []
    with storm:
        for k in range(4):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    status = not all(call() for _, call in calls[k :: len(calls) // 8])
                finally:
                    os._exit(status)
            statuses.append(os.waitpid(child, 0)[1])
    print(storm.wrong[:3], statuses)
    """
    assert run(start + script) == "[] [0, 0, 0, 0]\n"


# Signals ------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT from outside")
def test_an_interrupt_from_outside():
    script = """
    pool = F.get_default_memory_pool()
    works()
    used = pool.used_bytes()
    try:
        print("ready", flush=True)
        while True:
            F.relu(x)
    except KeyboardInterrupt:
        pass
    assert pool.used_bytes() == used
    print(works())
    """
    script = textwrap.dedent(PRELUDE) + textwrap.dedent(script)
    with started([sys.executable, "-c", script]) as process:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=PATIENCE) == ("True\n", "")


FIRST_CALL = """
    import os, signal, sys, threading, time, warnings
    import numpy as np
    import fastrelu as F
    from fastrelu.cpu import jit
    jit._folders = lambda: ()
    x = np.random.default_rng(0).standard_normal((60, 70)).astype(np.float32)
    weight = np.full(70, 0.5, np.float32)
    halved = np.where(x > 0, x, x / 2)
    def use():
        assert np.array_equal(F.relu(x), np.maximum(x, 0))
        assert np.array_equal(F.prelu_backward(x, x, weight)[0], halved)
    # Where `use` is, and nowhere beside it, however late the timer is.
    inside, signalled = False, []
    def interrupt(*_):
        global inside
        if inside:
            inside = False
            signalled.append(time.perf_counter())
            raise KeyboardInterrupt
    def use_or_not():
        global inside
        try:
            inside = True
            use()
            inside = False
            return True
        except KeyboardInterrupt:
            return False
    signal.signal(signal.SIGALRM, interrupt)
"""
needs_timer = pytest.mark.skipif(
    not hasattr(signal, "setitimer"), reason="needs a timer"
)


@needs_timer
def test_interruptions_while_numba_compiles():
    """Each ends the call at once and none the work: twenty a second do not stop it."""
    script = """
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    start, delays = time.perf_counter(), []
    while not use_or_not():
        delays.append(time.perf_counter() - signalled[-1])
    total = time.perf_counter() - start
    signal.setitimer(signal.ITIMER_REAL, 0)
    use()
    # Nothing of what is compiled, a good part of the whole each, was waited for.
    print(len(delays) > 5, sorted(delays)[len(delays) // 2] < total / 30)
    """
    assert run(FIRST_CALL + script) == "True True\n"


@needs_fork
@needs_timer
@pytest.mark.long
def test_a_handler_forks_while_numba_compiles():
    """The child goes on with a call whose compiling thread it does not have."""
    script = """
    warnings.simplefilter("ignore")
    forked = []
    signal.signal(signal.SIGALRM, lambda *_: forked.append(os.fork()))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    use()
    if forked == [0]:
        os._exit(0)
    print(os.waitpid(forked[0], 0)[1])
    """
    assert run(FIRST_CALL + script) == "0\n"


@needs_fork
@pytest.mark.long
def test_an_interruption_at_any_moment_of_the_first_call():
    script = """
    warnings.simplefilter("ignore")
    statuses = []
    for moment in np.random.default_rng(0).uniform(0.001, 3, 120):
        child = os.fork()
        if child == 0:
            status = 2
            try:
                signal.setitimer(signal.ITIMER_REAL, moment)
                status = 0 if use_or_not() else 1
                use()
            except BaseException as error:
                print(moment, repr(error), flush=True)
                status = 3
            finally:
                os._exit(status)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(set(statuses) <= {0, 1}, statuses.count(1) > 60)
    """
    assert run(FIRST_CALL + script, timeout=1200) == "True True\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a signal from outside")
@pytest.mark.parametrize(
    "size", [1 << 26, pytest.param(1 << 29, marks=pytest.mark.long)]
)
def test_an_interruption_of_one_long_call(size):
    """It comes as soon as the call is over, and the result is whole."""
    script = f"""
    import numba, os, signal, threading, time
    import numpy as np
    import fastrelu as F
    numba.set_num_threads(1)
    F.leaky_relu(-np.ones((1 << 22)), 0.5, inplace=True)
    x = np.full({size}, -1.0)
    start = time.perf_counter()
    F.leaky_relu(x, 0.5, inplace=True)
    usual = time.perf_counter() - start
    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        sent.append(time.perf_counter())
    for calls in range(2, 50):
        sent, ended = [], None
        timer = threading.Timer(usual / 4, interrupt)
        try:
            timer.start()
            F.leaky_relu(x, 0.5, inplace=True)
            ended = time.perf_counter()
            time.sleep(600)
        except KeyboardInterrupt:
            pass
        timer.join()
        assert x.min() == x.max() == -(0.5**calls)
        if ended is None or sent[0] < ended:
            break  # or this thread was too late for the call
    print(ended is None, F.relu(x[:9]).max() == 0)
    """
    assert run(script) == "True True\n"


# The interpreter's end ----------------------------------------------------------------

ENDS = {
    "a global": "y = F.relu(x)",
    "an exit handler": """
    import atexit
    atexit.register(lambda: print(works()))
    """,
    "a finalizer": """
    class Last:
        def __init__(self): self.y = F.relu(x)
        def __del__(self): self.y[...] = 1
    last = Last()
    """,
    "daemon threads": """
    def call():
        while True:
            F.relu(x)
            F.relu(x, return_mask=True)
    for _ in range(3): threading.Thread(target=call, daemon=True).start()
    y = F.relu(x)
    time.sleep(0.05)
    """,
    "a cycle": "y = [F.relu(x)]; y.append(y)",
    "a first call": """
    import atexit
    @atexit.register
    def call():
        assert F.relu(x[:9].astype("i2")).size == 9
        assert F.prelu(x[:9], x[:1]).size == 9
    """,
    "an unfinished first call": """
    import signal
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        F.prelu_backward(x, x, x[:1])
        time.sleep(600)
    except KeyboardInterrupt:
        pass
    """,
}


IMPORT = f"""
import sys
sys.path[:] = {sys.path!r}
try:
    import fastrelu
except ImportError as error:
    print(error, flush=True)
"""


@pytest.mark.parametrize("first", ["main", "other"])
def test_sub_interpreters(first):
    """They get an ImportError, and do the main interpreter no harm."""
    script = f"""
    try:
        import _xxsubinterpreters as interpreters
    except ImportError:
        import _interpreters as interpreters
    def use():
        import numpy as np
        import fastrelu as F
        x = np.linspace(-1, 1, 1 << 20).astype(np.float32)
        assert np.array_equal(F.relu(x), np.maximum(x, 0))
        F.prelu_backward(x, x, x[:1].copy())
    if "{first}" == "main":
        use()
    for _ in range(2):
        other = interpreters.create()
        interpreters.run_string(other, {IMPORT!r})
        interpreters.destroy(other)
    use()
    """
    refused = (
        "fastrelu works in the main interpreter only: its threads outlive any other\n"
    )
    assert run(script) == 2 * refused


@pytest.mark.parametrize("end", ENDS)
def test_the_end_with(end):
    script = textwrap.dedent(PRELUDE) + textwrap.dedent(ENDS[end])
    assert run(script) == ("True\n" if end == "an exit handler" else "")


# What tests leave ---------------------------------------------------------------------

LEAVING = """
import subprocess
import conftest
from conftest import no_process_is_left
conftest.SOON = 0.1

def test_a_child():
    subprocess.Popen(["sleep", "1000"])

def test_a_grandchild():
    subprocess.run(["sh", "-c", "sleep 1000 &"], check=True)

def test_nothing():
    subprocess.run(["sleep", "0"], check=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_process_that_a_test_leaves(tmp_path):
    (tmp_path / "test_leaving.py").write_text(LEAVING)
    options = ["-p", "no:cacheprovider", "-W", "ignore"]
    done = run_command(
        [sys.executable, "-m", "pytest", *options, "test_leaving.py"],
        env={**os.environ, "PYTHONPATH": os.path.dirname(__file__)},
        cwd=tmp_path,
    )
    assert "3 passed, 2 errors" in done.stdout
    assert done.stdout.count("processes that a test has left") >= 2
    with pytest.raises(subprocess.TimeoutExpired):  # and both are gone, or this fails
        run_command(["sh", "-c", "sleep 1000 & sleep 1000"], timeout=0.1)


@pytest.mark.skipif(os.name != "posix", reason="needs SIGABRT")
def test_a_process_that_hangs_says_where():
    script = "import time\ndef wait():\n    time.sleep(1000)\nwait()"
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        run_command([sys.executable, "-S", "-c", script], timeout=3)
    assert "in wait" in caught.value.__notes__[0]
