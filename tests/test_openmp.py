"""Loops on PyTorch's threads, which are awake after one of its products."""

import sys

import pytest
from test_threads import run

from fastrelu import cpu

pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not cpu.is_fast(),
    reason="only Linux tells who is awake, and only fast loops ask",
)

# A loop says how many threads took part as PyTorch's: 0 if it was not theirs.
PRELUDE = """
    import os, threading, time
    import numpy as np, torch
    import fastrelu as F
    from fastrelu.cpu import threads
    torch.set_num_threads(2)
    words = threads._memory
    # Not of torch.ones, which has threads: beside the main thread's, OpenMP lets another
    # thread's look for work for a moment only.
    weights = torch.from_numpy(np.ones((512, 512), np.float32))
    x = np.linspace(-1, 1, 1 << 20, dtype=np.float32)
    y, expected = np.empty_like(x), np.maximum(x, 0)
    def loop():
        words[threads._JOINED] = 0
        y[:] = 7
        F.relu(x, out=y)
        assert (y == expected).all()
        return int(words[threads._JOINED])
    def after_product():
        torch.mm(weights, weights)
        return loop()
    def until(call):
        # On a busy machine they may be without a processor for a while.
        end = time.monotonic() + 60
        while not (result := call()) and time.monotonic() < end:
            pass
        return result
    def know():
        words[threads._UNTIL] = 0
        after_product()
        return int(words[threads._THEIRS])
    def never(call=after_product):
        return not any(call() for _ in range(50))
"""


def ask(script):
    return run(PRELUDE + script, NUMBA_NUM_THREADS="2")


def test_who_is_counted():
    """Who looks for work, and none who sleeps, or ends meanwhile."""
    script = """
    from fastrelu.cpu import openmp
    here = threading.get_native_id()
    time.sleep(0.1)
    print(openmp.running({here}))
    def product():
        torch.mm(weights, weights)
        return openmp.running({here})
    print(until(product))
    time.sleep(0.1)
    # So many that one is asked before all of those that there are.
    real, gone = openmp.os.listdir, [str(here + 100_000 + i) for i in range(64)]
    openmp.os.listdir = lambda folder: [*real(folder), *gone]
    print(openmp.running({here}))
    """
    assert ask(script) == "0\n1\n0\n"


def test_after_a_product():
    script = """
    print(until(know))
    print(until(after_product))
    time.sleep(0.1)
    print(loop())  # they sleep
    """
    assert ask(script) == "2\n2\n0\n"


def test_small_loops_are_not_worth_it():
    script = """
    print(until(know))
    x = x[: threads.ENOUGH // 8 - 1]
    y, expected = np.empty_like(x), np.maximum(x, 0)
    print(never())
    """
    assert ask(script) == "2\nTrue\n"


def test_a_process_without_products():
    """Whoever asks runs, but is none of them."""
    script = """
    time.sleep(0.1)  # PyTorch has made arrays
    print(never(loop), int(words[threads._THEIRS]))
    """
    assert ask(script) == "True 0\n"


def test_a_number_of_threads_is_respected():
    script = """
    print(until(know))
    torch.set_num_threads(1)
    print(never())
    torch.set_num_threads(2)
    print(until(after_product))
    torch.set_num_threads(3)  # there is one more now, whose clock nobody knows
    print(never())
    """
    assert ask(script) == "2\nTrue\n2\nTrue\n"


def test_each_thread_has_others_of_its_own():
    script = """
    print(until(know))
    other = threading.Thread(target=lambda: print(never()))
    other.start()
    other.join()
    """
    assert ask(script) == "2\nTrue\n"


def test_a_thread_that_is_not_the_main_one():
    """Its own are got to know, and another's once most loops come from there."""
    script = """
    def serve():
        print(until(know), until(after_product))
        print(words[threads._OWNER] == threading.get_ident())
    other = threading.Thread(target=serve)
    other.start()
    other.join()
    for _ in range(threads._FORGOTTEN):
        loop()
    print(int(words[threads._THEIRS]))
    serve()
    """
    assert ask(script) == "2 2\nTrue\n0\n2 2\nTrue\n"


def test_a_thread_without_products_is_given_no_threads():
    """While another's are awake: OpenMP makes some for whoever asks."""
    script = """
    met, real, stop = [], threads._meet, threading.Event()
    def meet(*arguments):
        met.append(real(*arguments))
    threads._meet = meet
    def multiply():
        while not stop.is_set():
            torch.mm(weights, weights)
    other = threading.Thread(target=multiply)
    other.start()
    loop()
    time.sleep(0.1)
    before = set(os.listdir("/proc/self/task"))
    def ask():
        words[threads._UNTIL] = -1
        threads.ready()
        return len(met) > 2
    print(until(ask), int(words[threads._THEIRS]))
    stop.set()
    other.join()
    end = time.monotonic() + 60
    while not set(os.listdir("/proc/self/task")) <= before and time.monotonic() < end:
        pass
    print(set(os.listdir("/proc/self/task")) <= before)
    """
    assert ask(script) == "True 0\nTrue\n"


def test_two_threads_that_look_at_once():
    """One does, and the other goes on; who comes in between finds what it found."""
    script = """
    from fastrelu.cpu import openmp
    loop()
    real = openmp.running
    def meanwhile(ours):
        words[threads._UNTIL] = -1
        threads.ready()
        print(int(words[threads._THEIRS]))
        return real(ours)
    openmp.running = meanwhile
    torch.mm(weights, weights)
    words[threads._UNTIL] = -1
    threads.ready()
    openmp.running = real
    print(until(know))
    words[threads._UNTIL] = -1
    openmp.running = meanwhile  # is not asked
    threads.ready()
    """
    assert ask(script) == "0\n2\n"


def test_whoever_takes_a_piece_has_the_mode_of_whoever_brought_the_loop():
    """And after it that of its own: PyTorch's results are the same as before."""
    script = """
    small = np.full(1 << 20, 1e-40, np.float32)
    mine = np.empty_like(small)
    tensor = torch.full((1 << 20,), 1e-40)
    def product_with(slope):
        torch.mm(weights, weights)
        words[threads._JOINED] = 0
        F.leaky_relu(-small, slope, out=mine)
        return int(words[threads._JOINED])
    print(until(know))
    assert torch.set_flush_denormal(True)
    def flushed():
        shared = product_with(0.5)
        assert (mine == 0).all()
        return shared
    print(until(flushed))
    torch.set_flush_denormal(False)
    for _ in range(20):
        halves = tensor * 0.5
        assert (halves > 0).all()
    """
    assert ask(script) == "2\n2\n"


def test_a_child_leaves_them_alone():
    """Those of OpenMP do not come with it; to call them would be to wait for ever."""
    script = """
    print(until(know))
    child = os.fork()
    if child == 0:
        fine = never(loop) and words[threads._UNTIL] == threads._NEVER
        os._exit(not fine)
    print(os.waitpid(child, 0)[1], until(after_product))
    """
    assert ask(
        "    import warnings\n    warnings.simplefilter('ignore')\n" + script
    ) == ("2\n0 2\n")


def test_a_child_that_is_forked_while_threads_end():
    """It can compile: nobody held the lock that is taken to find a thread's frames.

    Half a million were made known just before, so that to sort them takes a while.
    """
    script = """
    import ctypes, warnings
    from fastrelu.cpu import openmp
    warnings.simplefilter("ignore")
    common = bytes.fromhex("1000000000000000017a52000178100100000000")
    frames = np.zeros(500_000, "u4, u4, (2,)u8, u4")
    frames["f0"] = frames.itemsize - 4
    frames["f1"] = 20 + 4 + frames.itemsize * np.arange(frames.size)  # back to common
    frames["f2"] = 16  # somewhere: nobody's code is there
    known = ctypes.create_string_buffer(common + frames.tobytes() + bytes(4))
    compiler = ctypes.CDLL("libgcc_s.so.1")
    pause, ready = openmp.functions()[-2], threading.Event()
    F.relu(x)
    def end():
        torch.mm(weights, weights)
        compiler.__register_frame(known)
        ready.set()
        openmp.dismiss(pause)
    for _ in range(4):
        thread = threading.Thread(target=end)
        thread.start()
        ready.wait()
        ready.clear()
        time.sleep(0.001)
        child = os.fork()
        if child == 0:
            F.relu(x.astype(np.float64))
            os._exit(0)
        print(os.waitpid(child, 0)[1])
        thread.join()
        compiler.__deregister_frame(known)
    """
    assert ask(script) == "0\n" * 4


def test_from_many_threads_meanwhile():
    script = """
    print(until(know))
    wrong, stop = [], threading.Event()
    def others():
        z = np.empty_like(x)
        while not stop.is_set():
            F.relu(x, out=z)
            if not (z == expected).all():
                wrong.append(z)
    team = [threading.Thread(target=others) for _ in range(3)]
    for thread in team:
        thread.start()
    for _ in range(100):
        after_product()
    stop.set()
    for thread in team:
        thread.join()
    print(len(wrong))
    """
    assert ask(script) == "2\n0\n"


def test_torch_that_has_no_openmp():
    script = """
    real = torch.__file__
    for wrong in (None, "/nowhere/__init__.py"):
        torch.__file__ = wrong
        assert not any(know() for _ in range(20))
    torch.__file__ = real
    print(until(know))
    """
    assert ask(script) == "2\n"


def test_fewer_threads_than_were_asked_for():
    """As where OpenMP has a limit."""
    script = """
    import ctypes
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_uint] * 2)
    nobody = kind(lambda *arguments: None)
    loop()
    words[threads._FORK] = ctypes.cast(nobody, ctypes.c_void_p).value
    threads._meet(2, 0)
    print(int(words[threads._THEIRS]), until(know))
    """
    assert ask(script) == "0 2\n"


def test_threads_that_ended_are_forgotten():
    script = """
    print(until(know))
    words[threads._CLOCKS] = -9  # the clock of nobody
    torch.mm(weights, weights)
    print(loop(), int(words[threads._THEIRS]))
    print(until(know))
    """
    assert ask(script) == "2\n0 0\n2\n"
