"""Processes: fork and spawn, signals, the interpreter's end, and the cache on disk."""

import os
import subprocess
import sys
import textwrap

import pytest
from test_threads import PRELUDE, needs_fork, run

COLD = """
    import numpy as np
    import fastrelu as F
    x = np.linspace(-1, 1, 1000).astype(np.float32)
    print(np.array_equal(F.relu(x), np.maximum(x, 0)))
"""


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


# The cache on disk --------------------------------------------------------------------


def cut(data):
    return data[: len(data) // 2]


def flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


DAMAGES = {
    "empty": lambda data: b"",
    "cut": cut,
    "flipped": flip,
    "noise": lambda data: bytes(range(256)) * 8,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_compiled_anew(damage, tmp_path):
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    assert run(COLD, **cache) == "True\n"
    kept = files(tmp_path)
    whole = [path.read_bytes() for path in kept]
    for path, data in zip(kept, whole, strict=True):
        path.write_bytes(DAMAGES[damage](data))
    assert run(COLD, **cache) == "True\n"
    assert files(tmp_path) == kept
    before = [path.stat().st_mtime_ns for path in kept]
    assert run(COLD, **cache) == "True\n"  # and that is kept
    assert [path.stat().st_mtime_ns for path in kept] == before


def test_a_cache_of_another_version(tmp_path):
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    other = '    import numba\n    numba.__version__ = "0.0"\n'
    assert run(other + COLD, **cache) == "True\n"
    before = [path.read_bytes() for path in files(tmp_path)]
    assert run(COLD, **cache) == "True\n"
    after = [path.read_bytes() for path in files(tmp_path)]
    assert len(after) == len(before)
    assert all(a != b for a, b in zip(after, before, strict=True))


def test_processes_that_start_at_once(tmp_path):
    script = textwrap.dedent(COLD)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    assert [p.communicate(timeout=120) for p in started] == [("True\n", "")] * 3
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
    done = subprocess.run(
        [sys.executable, file], capture_output=True, text=True, timeout=100, check=False
    )
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


# Signals ------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT from outside")
def test_an_interrupt_from_outside():
    script = """
    pool = F.get_default_memory_pool()
    works()
    used = pool.used_bytes()
    print("ready", flush=True)
    try:
        while True:
            F.relu(x)
    except KeyboardInterrupt:
        pass
    assert pool.used_bytes() == used
    print(works())
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(2)
    assert process.communicate(timeout=60) == ("True\n", "")


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
}


@pytest.mark.parametrize("end", ENDS)
def test_the_end_with(end):
    script = textwrap.dedent(PRELUDE) + textwrap.dedent(ENDS[end])
    assert run(script) == ("True\n" if end == "an exit handler" else "")
