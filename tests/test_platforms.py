"""What other machines and systems do, which none at hand does by itself."""

import _thread
import contextlib
import ctypes
import importlib
import sys
import threading
import time
import types

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir
from numba.core import config
from numba.core.compiler_lock import global_compiler_lock
from test_threads import EVERYTHING, PRELUDE, run, several_threads

from fastrelu import _interpreter, activations
from fastrelu._spec import ARRAY, Operation
from fastrelu.cpu import calls, fast, shield, threads, vector
from fastrelu.cpu.quick import Call

HINTS = {
    "x86_64-unknown-linux-gnu": "@llvm.x86.sse2.pause()",
    "amd64-portbld-freebsd": "@llvm.x86.sse2.pause()",
    "aarch64-unknown-linux-gnu": "@llvm.aarch64.hint(i32 1)",
    "arm64-apple-darwin": "@llvm.aarch64.hint(i32 1)",
    "riscv64-unknown-linux-gnu": None,
    "ppc64le-unknown-linux-gnu": None,
}


@pytest.mark.parametrize("triple", HINTS)
def test_how_a_processor_is_given_a_moment(triple, monkeypatch):
    monkeypatch.setattr(llvm, "get_process_triple", lambda: triple)
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), []), "wait")
    builder = ir.IRBuilder(function.append_basic_block())
    _, codegen = threads._look_away._defn(None)
    codegen(types.SimpleNamespace(get_dummy_value=bool), builder, None, ())
    builder.ret_void()
    calls = [line for line in str(module).splitlines() if "call" in line]
    llvm.parse_assembly(str(module)).verify()
    assert len(calls) == (HINTS[triple] is not None)
    assert all(HINTS[triple].replace("@", '@"').replace("(", '"(') in c for c in calls)


@pytest.mark.parametrize(
    ("triple", "features", "expected"),
    [
        ("x86_64-unknown-linux-gnu", "+avx2,+f16c", True),
        ("x86_64-unknown-linux-gnu", "+sse2", False),
        ("arm64-apple-darwin", "", True),
        ("riscv64-unknown-linux-gnu", "", False),
    ],
)
def test_who_converts_half_floats(triple, features, expected, monkeypatch):
    monkeypatch.setattr(llvm, "get_process_triple", lambda: triple)
    monkeypatch.setattr(config, "CPU_FEATURES", features)
    assert vector._has_half_instructions() is expected


def test_half_floats_on_the_simplest_processor():
    script = """
    import numpy as np
    import fastrelu as F
    from fastrelu.cpu import vector
    assert vector._half_to_float is vector._half_to_float_by_bits
    x = np.arange(2**16, dtype=np.uint16).view(np.float16)
    with np.errstate(all="ignore"):
        product = (np.float32(-0.37) * x.astype(np.float32)).astype(np.float16)
    expected = np.where(x > 0, x, product)
    got = F.leaky_relu(x, -0.37)
    same = got.view(np.uint16) == expected.view(np.uint16)
    print((same | np.isnan(got) & np.isnan(expected)).all())
    """
    simplest = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    assert run(script, **simplest) == "True\n"


def test_another_interpreter_is_refused(monkeypatch):
    """Whoever comes from the main one has passed; here one is told that it is another."""
    monkeypatch.setattr(ctypes.pythonapi, "PyInterpreterState_Get", lambda: -1)
    with pytest.raises(ImportError, match="main interpreter only"):
        importlib.reload(_interpreter)


# Threads and signals ------------------------------------------------------------------


BLOCKED = """
    def blocked(thread):
        with open(f"/proc/self/task/{thread}/status") as file:
            line = next(line for line in file if line.startswith("SigBlk"))
        return int(line.split()[1], 16)
"""


@several_threads
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_members_leave_signals_to_their_host():
    script = """
    import signal
    assert works()
    words = threads._MEMBER + threads._MEMBER_SIZE + threads._ID
    mine, members = (blocked(t) for t in (os.getpid(), int(threads._memory[words])))
    signals = signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1
    print([(mine >> s - 1 & 1, members >> s - 1 & 1) for s in signals])
    """
    assert run(PRELUDE + BLOCKED + script) == f"{[(0, 1)] * 4}\n"


WITHOUT = {
    "locks": ("", "threads.new_lock = lambda: None"),
    "threads": ("", "threads.new_thread = lambda *_: threads.NO_THREAD"),
    "masks of signals": ("", "import signal; del signal.pthread_sigmask"),
    "a function of Linux": ("", "threads._LINUX = {threads._PLACE: 'none_of_these'}"),
    "Linux": ("", "import types; threads.sys = types.SimpleNamespace(platform='none')"),
    "forks": ("import os; del os.fork, os.register_at_fork", ""),
}


@pytest.mark.parametrize("what", WITHOUT)
def test_a_system_without(what):
    """No more members than locks and threads; the team can do without the others."""
    before, after = WITHOUT[what]
    output = run(
        f"    {before}\n{PRELUDE}\n    {after}\n"
        "    print(np.array_equal(F.relu(x), expected))\n"
        "    print(threads._memory[threads._WORKERS] > 0, loops() > 0)"
    )
    several = config.NUMBA_NUM_THREADS > 1 and what not in ("locks", "threads")
    assert output == f"True\n{several} {several}\n"


def test_a_fork_has_the_locks_of_compilers(monkeypatch):
    """Of a child that has no threads, the team's memory is empty."""
    memory, log = np.ones(9, np.int64), []

    class Lock:
        def __enter__(self):
            log.append("taken")

        def __exit__(self, *_):
            log.append("given back")

    monkeypatch.setattr(threads, "_memory", memory)
    monkeypatch.setattr(shield, "_waited_for", (Lock(), Lock()))
    shield._before_fork()
    shield._after_fork()
    assert log == ["taken"] * 2 + ["given back"] * 2
    assert memory.all()
    threads._after_fork_in_child()
    assert not memory.any()


@pytest.mark.parametrize("which", ["thread", "child", "none"])
def test_what_is_compiled_elsewhere(which, monkeypatch):
    """In another thread, in a child's own, or where no thread can be had, in this."""
    here, start = threading.get_ident(), _thread.start_new_thread

    def gone(*_):
        """What a child of fork has of its parent's threads"""
        shield._thread.start_new_thread = start
        shield.os.getpid = lambda: 0

    first = gone if which == "child" else start
    bare = types.SimpleNamespace(start_new_thread=first)
    monkeypatch.setattr(shield, "_thread", bare)
    monkeypatch.setattr(shield, "os", types.SimpleNamespace(getpid=lambda: 1))
    monkeypatch.setattr(shield, "_tasks", tasks := {})
    work = shield.shielded(lambda a, b: (a / b, threading.get_ident() == here))
    before = threading.stack_size(1 << 46 if which == "none" else 0)  # nobody has that
    try:
        assert work(6, 2) == (3, which == "none")
        with pytest.raises(ZeroDivisionError):
            work(6, 0)
    finally:
        threading.stack_size(before)
    assert [key[0] for key in tasks] == [1] * (which == "child")  # the parent's
    shield._finish()


def test_what_is_compiled_elsewhere_may_take_long():
    """Whoever waits looks every second whether it is a child's, which has nobody."""
    assert shield.shielded(lambda: time.sleep(1.1) or "done")() == "done"


def test_what_is_compiled_elsewhere_can_be_debugged(monkeypatch):
    traced, task = [], shield._Task(list, ())
    monkeypatch.setattr(shield, "sys", types.SimpleNamespace(settrace=traced.append))
    task.run_elsewhere()
    assert traced == [threading.gettrace()]
    assert task.wait()
    assert task.result == []


def test_what_a_handler_raises_while_a_thread_starts(monkeypatch):
    """It is no refusal of the system's, whatever it is; the next call does it all."""

    def interrupted(*_):
        raise RuntimeError("can't start new thread")

    work = shield.shielded(lambda a: a + 1)
    with monkeypatch.context() as patch:
        start = types.SimpleNamespace(start_new_thread=interrupted)
        patch.setattr(shield, "_thread", start)
        with pytest.raises(RuntimeError, match="can't start"):
            work(1)
    assert work(1) == 2


def test_two_who_want_the_same():
    """The second one waits for the work of the first, even if that gave up waiting."""
    gate, begun, ran = threading.Event(), threading.Event(), []

    def function(a):
        ran.append(a)
        begun.set()
        gate.wait()
        return a + 1

    work, results = shield.shielded(function), []
    team = [threading.Thread(target=lambda: results.append(work(1))) for _ in range(3)]
    team[0].start()
    begun.wait()
    for other in team[1:]:
        other.start()
    while len(next(iter(shield._tasks.values())).waiting) < 3:
        threading.Event().wait(0.001)
    gate.set()
    for each in team:
        each.join()
    assert (ran, results) == ([1], [2] * 3)


def test_what_is_compiled_elsewhere_for_other_threads():
    """Compiling takes more stack than some threads have."""
    ident, answers = shield.shielded(threading.get_ident), []

    def ask():
        answers.append(ident() == threading.get_ident())

    ask()
    other = threading.Thread(target=ask)
    other.start()
    other.join()
    with global_compiler_lock:  # what was begun here ends here
        ask()
    assert answers == [False, False, True]


@pytest.mark.parametrize("size", [0, 1 << 16, 1 << 26])
def test_a_sufficient_stack(size):
    def now():
        found = threading.stack_size()  # which sets it to 0
        threading.stack_size(found)
        return found

    before = threading.stack_size(size)
    try:
        with shield.sufficient_stack():
            assert now() == max(size, 1 << 24)
            with shield.sufficient_stack(1 << 18):
                assert now() == max(size, 1 << 24)
            assert now() == max(size, 1 << 24)
        assert now() == size
        with contextlib.suppress(ZeroDivisionError), shield.sufficient_stack():
            now(1 / 0)
        assert now() == size
    finally:
        threading.stack_size(before)


@pytest.mark.long
@pytest.mark.parametrize("size", [1 << 15, 1 << 16])
def test_first_calls_where_stacks_are_small(size, tmp_path):
    script = f"""
    import threading
    threading.stack_size({size})
    def call(dtype):
        row = np.ones(1024, dtype)
        for x in (np.ones((3, 1024), dtype), np.ones((3000, 1024), dtype)):
            assert np.array_equal(F.relu(x), x)
            assert np.array_equal(F.prelu(x, row, axis=-1), x)
            F.prelu_backward(x, x, row, axis=-1)
            F.prelu_backward(x, x, row[:3] if len(x) == 3 else row[:1], axis=0)
            assert np.array_equal(F.relu_backward(x, F.relu(x, return_mask=True)[1]), x)
    call("f4")
    other = threading.Thread(target=call, args=("f8",))
    other.start()
    other.join()
    print(threading.stack_size())
    """
    assert run(PRELUDE + script, NUMBA_CACHE_DIR=str(tmp_path)) == f"{size}\n"


STARTS = {
    "two threads": """
    from numba.core.compiler_lock import global_compiler_lock
    other = threading.Thread(target=threads.ready)
    with global_compiler_lock:
        other.start()
        time.sleep(0.05)  # the other waits for the lock
        threads.ready()
    other.join()
    """,
    "a signal's handler": """
    compiling = threads.compile_and_keep
    def interrupted(function, signature):
        result = compiling(function, signature)
        if function is threads._member and not threads._memory[threads._SHARE]:
            threads.compile_and_keep = compiling
            threads.ready()
        return result
    threads.compile_and_keep = interrupted
    threads.ready()
    """,
}


def test_for_those_who_debug_kernels_of_their_own():
    """Numba then leaves them Python, and makes none of its own functions."""
    script = "print([what for what, call in calls if not call()])"
    assert run(EVERYTHING + "    " + script, NUMBA_DISABLE_JIT="1") == "[]\n"


@several_threads
def test_there_is_no_team_before_a_large_array():
    """Nor is its code compiled; a loop that was made before is shared from then on."""
    script = """
    def state():
        return len(threads._functions), bool(threads._memory[threads._SHARE]), loops()
    small = x[:1000].copy()
    assert np.array_equal(F.relu(small, inplace=True), expected[:1000])
    print(state())
    F.relu(x, inplace=True)
    print(state(), np.array_equal(x, expected))
    """
    assert run(PRELUDE + script) == "(0, False, 0)\n(3, True, 1) True\n"


@pytest.mark.parametrize("by", STARTS)
def test_a_team_is_started_once_by(by):
    script = """
    from fastrelu.cpu import blocks, pool
    print(works(), len(threads._functions))
    if sys.platform == "linux":  # members, and a janitor, are those without signals
        members = sum(blocked(task) >> 1 & 1 for task in os.listdir("/proc/self/task"))
        members -= pool._DEFAULT._words[blocks.BELL] != 0
        assert members == threads._memory[threads._WORKERS]
    """
    assert run(PRELUDE + BLOCKED + STARTS[by] + script) == "True 3\n"


def test_a_call_that_leaves_checked_arrays_to_python():
    """Numba may have started threads just now: once that is known, it must not."""
    call, x = Call(Operation(activations._relu, (ARRAY,))), np.ones(3, np.float32)
    answers, ready = [None, None, "done"], [True, True, False]
    call.call = lambda *arguments: answers.pop(0)
    type(call).make_ready, before = lambda *_, **__: ready.pop(0), Call.make_ready
    try:
        fast._run(call, x, x)
        assert answers == []
        answers.append(None)
        with pytest.raises(RuntimeError, match="this is a bug of fastrelu"):
            fast._run(call, x, x)
    finally:
        Call.make_ready = before


def test_a_call_is_made_once_by_two_threads():
    """Whoever comes second finds it made."""
    call = Call(Operation(activations._relu, (ARRAY,)))
    dtype = np.dtype(np.float32)
    other = threading.Thread(target=lambda: call._add(dtype))
    with global_compiler_lock:
        other.start()
        threading.Event().wait(0.05)  # the other waits for the lock
        call._add(dtype)
        made = call.call
    other.join()
    assert len(call.rows) == 1
    assert call.call is made
    assert call.table[calls.KNOWN] == 1


# Memory -------------------------------------------------------------------------------


def test_caches_that_nobody_tells_of(monkeypatch, tmp_path):
    def caches(**files):
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        return threads._cache_size(2, 123)

    monkeypatch.setattr(
        threads, "Path", lambda _: types.SimpleNamespace(glob=lambda _: [tmp_path])
    )
    assert caches() == 123
    assert caches(level="2\n") == 123
    assert caches(size="?") == 123
    assert caches(size="512K\n") == 512 << 10
    assert caches(level="3\n") == 123


@pytest.mark.parametrize(
    ("size", "private", "processors", "ours"),
    [
        (32 << 20, 1 << 20, 8, 32 << 20),
        (260 << 20, 2 << 20, 2, 64 << 20),  # a virtual machine's part of a large one
        (8 << 20, 16 << 20, 4, 16 << 20),  # none but the private ones
    ],
)
def test_a_last_level_that_others_use_too(size, private, processors, ours):
    assert threads._last_level(size, private, processors) == ours


MODES = {
    "x86_64-unknown-linux-gnu": ("stmxcsr", "ldmxcsr"),
    "aarch64-unknown-linux-gnu": ("get.fpcr", "set.fpcr"),
    "riscv64-unknown-linux-gnu": (None, None),
}


@pytest.mark.parametrize("triple", MODES)
def test_how_a_processor_is_asked_for_its_mode(triple, monkeypatch):
    """Where nobody knows how, the answer is that no loop is shared."""
    monkeypatch.setattr(llvm, "get_process_triple", lambda: triple)
    word, context = ir.IntType(64), types.SimpleNamespace(get_dummy_value=bool)
    for intrinsic, expected in zip(
        (threads._mode, threads._set_mode), MODES[triple], strict=True
    ):
        module = ir.Module()
        function = ir.Function(module, ir.FunctionType(word, [word]), "mode")
        builder = ir.IRBuilder(function.append_basic_block())
        asked = (None,) if intrinsic is threads._mode else (None, None)
        _, codegen = intrinsic._defn(*asked)
        answer = codegen(context, builder, None, function.args)
        builder.ret(answer or word(0))
        llvm.parse_assembly(str(module)).verify()
        assert ("call" in str(module)) == (expected is not None)
        assert (expected or "i64 -1") in str(module) or intrinsic is threads._set_mode
        if expected:
            assert expected in str(module)
