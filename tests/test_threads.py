"""The team: every index once, whoever calls, and nothing that takes its host down."""

import os
import platform
import sys
import textwrap
import threading
import types
from pathlib import Path

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
from conftest import PATIENCE, run_command
from llvmlite import ir

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


def run(script, timeout=PATIENCE, **environment):
    """What a script prints, in a process of its own that must end well."""
    done = run_command(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        timeout=timeout,
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
        words = (threads._MEMBER + k * threads._MEMBER_SIZE for k in range(1, members))
        known = [int(threads._memory[word + threads._ID]) for word in words]
        # Who has not run yet has not said its number.
        return not os.path.isdir(tasks) or {*map(str, known)} <= {"0", *os.listdir(tasks)}
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


def test_bits_that_are_dropped_while_they_are_used():
    """They stay until the loop is done, also if their mask has lost them by then."""
    script = """
    bits, y, done = F.relu(x, return_mask=True)[1].bits, np.empty_like(x), 0
    for i in range(100):
        mask = F.Mask(bits.copy(), x.shape)  # in pages of its own
        def drop():
            time.sleep(i * 2e-5)
            mask.bits = None
        other = threading.Thread(target=drop)
        other.start()
        try:
            F.relu_backward(x, mask, out=y)
        except TypeError as error:  # they were gone before
            assert "as it was made" in str(error)
        else:
            done += np.array_equal(y, expected)
        other.join()
    print(done > 10)
    """
    pages = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    assert run(PRELUDE + script, **pages) == "True\n"


def test_shapes_that_others_change_meanwhile():
    """The loop has its own copy: what NumPy frees is another array's at once."""
    script = """
    import warnings
    if hasattr(os, "sched_setaffinity"):  # on one processor, they are in each other's way
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    warnings.simplefilter("ignore")
    x = np.linspace(-1, 1, 1 << 17).astype(np.float32).reshape(256, 512)[:, ::2]
    y, expected = np.zeros((256, 256), np.float32), np.maximum(x, 0)
    F.relu(x, out=y)
    end, answers = time.monotonic() + 4, []
    def change():
        while time.monotonic() < end:
            x.shape = 256, 256, 1
            others = [np.zeros((1, 2)) for _ in range(3)]  # which get its place
            x.shape = 256, 256
    other = threading.Thread(target=change)
    other.start()
    while time.monotonic() < end:
        y.fill(-1)
        try:
            F.relu(x, out=y)
        except ValueError:  # of another shape at that moment
            continue
        answers.append(np.array_equal(y, expected))
    other.join()
    print(len(answers) > 10, all(answers))
    """
    assert run(PRELUDE + script) == "True True\n"


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
    threads.new_thread = lambda *_: threads.NO_THREAD
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
    odd = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype)  # which is copied
    odd[:] = x
    F.relu(odd)
    copyto = np.copyto
    def copy_and_launch(*arguments, **more):
        copyto(*arguments, **more)
        parallel._launch_threads()
    np.copyto = copy_and_launch
    assert not parallel._is_initialized
    print(np.array_equal(F.relu(odd), expected), parallel._is_initialized)
    """
    assert run(PRELUDE + script) == "True True\n"


# The floating-point mode --------------------------------------------------------------


# Of the processor's register: what is set beside nothing.
if platform.machine() in ("x86_64", "AMD64"):
    REGISTER, NOTHING = ("llvm.x86.sse.stmxcsr", "llvm.x86.sse.ldmxcsr"), 0x1F80
    MODES = {
        "results flushed": 0x8000,
        "subnormals are zeros": 0x40,
        "both": 0x8040,
        "upward": 0x4000,
        "toward zero": 0x6000,
    }
elif platform.machine() in ("aarch64", "arm64"):
    REGISTER, NOTHING = ("llvm.aarch64.get.fpcr", "llvm.aarch64.set.fpcr"), 0
    MODES = {"both": 1 << 24, "upward": 1 << 22, "toward zero": 3 << 22}
else:
    REGISTER, NOTHING, MODES = (), 0, {}
EVERY_MODE = [NOTHING, *(NOTHING | mode for mode in MODES.values())]
needs_modes = pytest.mark.skipif(not MODES, reason="needs a processor that is known")

SET_MODE = f"""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic
    read, write = {REGISTER}
    def register(builder, name, value=None):
        word, none = ir.IntType(64), ir.VoidType()
        if name.startswith("llvm.aarch64"):
            kind = ir.FunctionType(word, []) if value is None else \\
                ir.FunctionType(none, [word])
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            return builder.call(function, [] if value is None else [value])
        place = builder.alloca(word)
        builder.store(word(0) if value is None else value, place)
        kind = ir.FunctionType(none, [cgutils.voidptr_t])
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        builder.call(function, [builder.bitcast(place, cgutils.voidptr_t)])
        return builder.load(place)
    @intrinsic
    def get(typingctx):
        return types.int64(), lambda c, b, s, a: register(b, read)
    @intrinsic
    def put(typingctx, mode):
        def codegen(c, b, s, a):
            register(b, write, a[0])
            return c.get_dummy_value()
        return types.void(types.int64), codegen
    @numba.njit("i8()")
    def get_mode():
        return get() & ~{0x3F if NOTHING else 0}  # which tell what happened
    @numba.njit("void(i8)")
    def set_mode(mode):
        put(mode)
    def values(letter):
        a = np.random.default_rng(1).standard_normal(1 << 20).astype(letter)
        a[::2] *= np.finfo(a.dtype).smallest_normal  # half of them are subnormal
        return a.reshape(8, 16, -1), np.linspace(0.1, 1.3, 16).astype(letter)
    arrays = [values(letter) for letter in "efd"]
    functions = lambda: [
        result
        for a, w in arrays
        for result in (F.relu(a), F.leaky_relu(a, 0.37), F.prelu(a, w),
                       F.leaky_relu_backward(a, a, 0.37), *F.prelu_backward(a, a, w))
    ]
    bits = lambda results: [hash(result.tobytes()) for result in results]
    def alone():
        numba.set_num_threads(1)
        results = bits(functions())
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
        return results
"""


@several_threads
@needs_modes
@pytest.mark.parametrize("first", ["nothing", "both"])
def test_every_piece_is_worked_on_in_the_callers_mode(first):
    """Also where the team was started in another, and the caller's stays what it is."""
    script = f"""
    modes = {[NOTHING | MODES.get(first, 0), *EVERY_MODE]}
    set_mode(modes[0])
    first = bits(functions())  # which starts the team
    expected = {{}}
    for mode in modes + modes[::-1]:
        set_mode(mode)
        before = loops()
        expected.setdefault(mode, alone())
        assert loops() == before and get_mode() == mode
        for _ in range(2):
            assert bits(functions()) == expected[mode], hex(mode)
        assert loops() > before and get_mode() == mode
    print(first == expected[modes[0]], len(set(map(tuple, expected.values()))))
    """
    assert run(PRELUDE + SET_MODE + script) == f"True {len(MODES) + 1}\n"


@needs_modes
def test_both_ways_give_the_same_bits_in_every_mode():
    """Which one a first call takes may depend on what other threads do meanwhile."""
    script = f"""
    def misaligned(a):
        whole = np.empty(a.nbytes + 1, np.uint8)
        odd = whole[1:].view(a.dtype).reshape(a.shape)
        odd[...] = a
        return odd
    plain = arrays
    odd = [(misaligned(a), w) for a, w in plain]
    for mode in {EVERY_MODE}:
        found = []
        for arrays in (plain, odd):
            set_mode(mode)
            found.append(bits(functions()))
            set_mode({NOTHING})
        print(hex(mode), [i for i in range(len(found[0])) if found[0][i] != found[1][i]])
    """
    expected = "".join(f"{hex(mode)} []\n" for mode in EVERY_MODE)
    assert run(PRELUDE + SET_MODE + script) == expected


@several_threads
@needs_modes
def test_threads_with_modes_of_their_own():
    script = f"""
    F.relu(x)
    wrong = []
    def call(mode):
        set_mode(mode)
        expected = alone()
        for _ in range(8):
            wrong.extend([mode] * (bits(functions()) != expected))
        wrong.extend([mode] * (get_mode() != mode))
    modes = {EVERY_MODE}
    team = [threading.Thread(target=call, args=(mode,)) for mode in modes]
    for thread in team: thread.start()
    for thread in team: thread.join()
    print(wrong)
    """
    assert run(PRELUDE + SET_MODE + script) == "[]\n"


@several_threads
@pytest.mark.skipif(not MODES or NOTHING == 0, reason="needs traps that can be set")
def test_where_an_operation_may_trap_no_loop_is_shared():
    """Its signal would come to a thread that its host does not know."""
    script = f"""
    assert works()
    before = loops()
    set_mode({NOTHING & ~0x200})  # divisions by zero
    fine = np.array_equal(F.relu(x), expected)
    alone = loops() == before
    set_mode({NOTHING})
    print(fine, alone, works())
    """
    assert run(PRELUDE + SET_MODE + script) == "True True True\n"


CHANGES = {
    "fesetround": """
    import ctypes
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    change = lambda: libm.fesetround(0xC00)  # FE_TOWARDZERO on x86
    back = lambda: libm.fesetround(0)
    """,
    "torch": """
    import torch
    change = lambda: torch.set_flush_denormal(True)
    back = lambda: torch.set_flush_denormal(False)
    """,
}


@several_threads
@needs_modes
@pytest.mark.skipif(sys.platform != "linux", reason="knows Linux's libraries")
@pytest.mark.parametrize("by", CHANGES)
def test_other_libraries_change_the_mode(by):
    if by == "torch":
        pytest.importorskip("torch")
    elif platform.machine() != "x86_64":
        pytest.skip("knows the numbers of x86")
    script = f"""
    import ctypes.util
    functions()
    {CHANGES[by]}
    usual = alone()
    change()
    changed = alone()
    fine = [bits(functions()) == changed for _ in range(4)]
    back()
    fine += [bits(functions()) == usual for _ in range(4)]
    print(all(fine), usual != changed)
    """
    assert run(PRELUDE + SET_MODE + script) == "True True\n"


PROCESSORS = {
    "x86_64-unknown-linux-gnu": ("llvm.x86.sse.stmxcsr", "llvm.x86.sse.ldmxcsr"),
    "aarch64-unknown-linux-gnu": ("llvm.aarch64.get.fpcr", "llvm.aarch64.set.fpcr"),
    "arm64-apple-darwin": ("llvm.aarch64.get.fpcr", "llvm.aarch64.set.fpcr"),
    "riscv64-unknown-linux-gnu": (),  # its loops are not shared
}


@pytest.mark.parametrize("triple", PROCESSORS)
def test_how_a_mode_is_read_and_written(triple, monkeypatch):
    monkeypatch.setattr(llvm, "get_process_triple", lambda: triple)
    word = ir.IntType(64)
    found = []
    for what, operands in ((threads._mode, 0), (threads._set_mode, 1)):
        module = ir.Module()
        kind = ir.FunctionType(word, [word] * operands)
        function = ir.Function(module, kind, "mode")
        builder = ir.IRBuilder(function.append_basic_block())
        _, codegen = what._defn(None, *[None] * operands)
        context = types.SimpleNamespace(get_dummy_value=lambda: word(0))
        builder.ret(codegen(context, builder, None, function.args))
        llvm.parse_assembly(str(module)).verify()
        found.append([f.name for f in module.functions if f.is_declaration])
        if operands == 0 and not PROCESSORS[triple]:
            assert "ret i64 -1" in str(module)
    assert found == ([[name] for name in PROCESSORS[triple]] or [[], []])


# What an administrator changes --------------------------------------------------------


@several_threads
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_members_stay_where_an_administrator_puts_them():
    """As `taskset -ap` does; not even a processor that was forbidden here comes back."""
    script = """
    x = x[: 1 << 20]
    y = np.empty_like(x)
    every = os.sched_getaffinity(0)
    def masks():
        return [os.sched_getaffinity(int(t)) for t in os.listdir("/proc/self/task")]
    def members():
        words = (threads._MEMBER + me * threads._MEMBER_SIZE for me in team)
        return [os.sched_getaffinity(threads._memory[w + threads._ID]) for w in words]
    def work():
        for _ in range(30):
            F.relu(x, out=y)
            time.sleep(0.001)
    def after(places):
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), places)
        work()
        return masks()
    work()
    team = range(1, threads._memory[threads._WORKERS] + 1)
    wrong = []
    for _ in range(3):
        for place in sorted(every)[:4]:
            wrong += [mask for mask in after({place}) if mask != {place}]
        wrong += [mask for mask in after(every) if len(mask) < len(every) - 1]
        while every in members():  # until each was woken, and kept off a processor
            work()
        for places in members():
            wrong += [mask for mask in after(places) if not mask <= places]
    print(wrong, len(team))
    """
    assert run(PRELUDE + script, NUMBA_NUM_THREADS="3") == "[] 2\n"


# Small stacks -------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
@pytest.mark.parametrize(
    ("asked", "given"), [(1 << 15, 1 << 20), (1 << 16, 1 << 20), (1 << 22, 1 << 22)]
)
def test_a_member_has_a_sufficient_stack(asked, given):
    script = f"""
    import ctypes
    from numba.core.compiler_lock import global_compiler_lock
    libc, members, start = ctypes.CDLL(None), [], threads.new_thread
    def new_thread(*arguments):
        members.append(start(*arguments))
        return members[-1]
    threads.new_thread = new_thread
    threading.stack_size({asked})
    with global_compiler_lock:  # this thread compiles, whose stack is the usual one
        threads.ready()
    stack, place, size = ctypes.create_string_buffer(256), *map(ctypes.c_size_t, (0, 0))
    libc.pthread_getattr_np.argtypes = ctypes.c_ulong, ctypes.c_void_p
    sizes = set()
    for member in members:
        assert libc.pthread_getattr_np(member, stack) == 0
        libc.pthread_attr_getstack(stack, ctypes.byref(place), ctypes.byref(size))
        sizes.add(size.value)
    print(sizes, threading.stack_size())
    """
    output = run(PRELUDE + script, NUMBA_NUM_THREADS="3")
    assert output == f"{{{given}}} {asked}\n"


@pytest.mark.parametrize(
    "size", [1 << 15, pytest.param(1 << 16, marks=pytest.mark.long)]
)
def test_every_function_from_a_thread_with_a_small_stack(size):
    """With the loops that need most of it: columns wider than what is laid out at once."""
    script = f"""
    import itertools
    import fastrelu as F
    def wide(shape, t):
        x = np.random.default_rng(0).standard_normal(shape).astype(t)
        w = np.linspace(-1, 2, shape[1]).astype(t)
        def same(y, dx, dw):
            got = (F.prelu(x, w), *F.prelu_backward(x, x, w))
            inplace = F.prelu(x.copy(), w, inplace=True)
            return all(map(np.array_equal, (*got, inplace), (y, dx, dw, y)))
        expected = (F.prelu(x, w), *F.prelu_backward(x, x, w))
        return lambda: same(*expected)
    for shape, t in itertools.product(((300, 2100), (3, 2057, 100), (900, 700, 3)), "efd"):
        calls.append(((shape, t), wide(shape, t)))
    def work():
        wrong.extend(what for what, call in calls if not call())
        ends.append("done")
    wrong, ends = [], []
    work()
    threading.stack_size({size})
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    print(wrong, ends)
    """
    assert run(EVERYTHING + script) == "[] ['done', 'done']\n"
