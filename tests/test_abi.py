"""What the fast loops rest on: it is proven, and where it does not hold, others run."""

import ctypes
import importlib
import sys
import timeit
import types

import numpy as np
import pytest
from numba.core.types import ExternalFunction
from reference import assert_same
from test_threads import run

import fastrelu as F
from fastrelu import _arguments, _dispatch, _dtypes, activations, cpu
from fastrelu.cpu import abi, jit, portable, vector

pytestmark = pytest.mark.skipif(
    cpu.engine()[0] != "fast", reason="nothing is taken for proven"
)


def test_all_is_proven_here_and_quickly():
    assert abi.doubt() == ""
    assert min(timeit.repeat(abi.doubt, number=1, repeat=20)) < 2e-3


# What is changed, to what, and what is said then.
WRONG = {
    "another implementation": (
        "sys.implementation",
        type("Other", (), {"name": "pypy"}),
        "this is pypy",
    ),
    "no GIL": ("sys._is_gil_enabled", lambda: False, "without the GIL"),
    "a longer head": ("HEAD", 32, "the GIL"),
    "short pointers": ("ctypes.sizeof", lambda _: 4, "8 bytes"),
    "the other byte order": ("sys.byteorder", "big", "8 bytes"),
    "NumPy 3": ("np.__version__", "3.0.0", "this is 3.0.0"),
    "no function": ("FUNCTIONS", ("PyNone_Such",), "PyNone_Such"),
    "the type": ("TYPE", 0, "the type of a float"),
    "the data": ("DATA", 3, "the data of an array"),
    "the base": ("BASE", 3, "the base of an array"),
    "the dtype": ("DTYPE", 6, "the dtype of an array"),
    "the strides": ("STRIDES", 4, "the strides of an array"),
    "the dimensions": ("NDIM", 4, "dimensions"),
    "the flags": ("FLAGS", 4, "the flags"),
    "too few words": ("FLAGS", 64, "the words that are read"),
    "the type number": ("KIND", 2, "the number of a dtype"),
    "the ABI": ("ABI_VERSION", 1, "NumPy 2"),
    "the API's version": ("C_API_VERSION", 211, "ABI has version"),
    "the bits of a mask": ("MASK_BITS", 4, "the attributes of a mask"),
    "the words of a mask": (
        "Mask",
        type("Mask", (F.Mask,), {}),
        "words that are written",
    ),
    "a new array": ("UINT8", 1, "makes arrays elsewhere"),
    "no table": ("numpy_api", lambda _: {}[0], "KeyError"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_hold_is_said(what, monkeypatch):
    name, value, said = WRONG[what]
    owner, _, attribute = name.rpartition(".")
    owners = {"": abi, "sys": sys, "ctypes": ctypes, "np": np}
    monkeypatch.setattr(owners[owner], attribute, value, raising=False)
    assert said in abi.doubt()


def test_every_function_that_is_called_is_looked_for():
    from fastrelu.cuda import compiled  # the one part that nothing has imported

    ours = [module for name, module in sys.modules.items() if name[:9] == "fastrelu."]
    assert compiled in ours
    called = {
        value.symbol
        for module in ours
        for value in vars(module).values()
        if isinstance(value, ExternalFunction) and value.symbol.startswith("Py")
    }
    assert called <= set(abi.FUNCTIONS)
    assert len(called) > 15


def test_functions_that_do_something_else(monkeypatch):
    """An array of another order, and a handler that is not the one that was set."""
    real = abi.numpy_api
    with monkeypatch.context() as patch:
        patch.setattr(abi, "KEEP_ORDER", 0)
        assert "makes arrays elsewhere" in abi.doubt()
    version = ctypes.CFUNCTYPE(ctypes.c_uint)(lambda: 0x03000000)
    address = ctypes.cast(version, ctypes.c_void_p).value
    with monkeypatch.context() as patch:
        patch.setattr(abi, "numpy_api", lambda i: address if i == 0 else real(i))
        assert "0x3000000" in abi.doubt()
    handlers = []
    kind = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)
    keep = kind(lambda handler: handlers.append(handler) or None)
    other = ctypes.cast(keep, ctypes.c_void_p).value
    with monkeypatch.context() as patch:
        patch.setattr(
            abi, "numpy_api", lambda i: other if i == abi.SET_HANDLER else real(i)
        )
        assert "takes memory handlers elsewhere" in abi.doubt()
    assert len(handlers) == 2


def test_dtypes_that_are_told_apart_by_other_words(monkeypatch):
    real, order = abi.word, 0xFF << 16

    def word(value, place):
        return real(value, place) & ~(order if place == abi.KIND else 0)

    monkeypatch.setattr(abi, "word", word)
    monkeypatch.setattr(abi, "_arrays", list)
    assert "two dtypes are told apart" in abi.doubt()


# Which engine -------------------------------------------------------------------------

SCRIPT = """
    import numpy as np
    import fastrelu as F
    from fastrelu import cpu
    x = np.linspace(-1, 1, 9).astype(np.float32)
    assert F.relu(x).tolist() == np.maximum(x, 0).tolist()
    dx, dw = F.prelu_backward(x, x, x[:1])
    assert dw.tolist() == [(x[x < 0] ** 2).sum()]
    F.get_default_memory_pool().set_limit(1 << 20)
    F.get_default_memory_pool().free_all_blocks()
    print(*cpu.engine(), F.get_default_memory_pool().total_bytes(), sep="; ")
"""


def test_the_engine_that_is_asked_for():
    said = "portable; FASTRELU_ENGINE asks for it; 0\n"
    assert run(SCRIPT, FASTRELU_ENGINE="portable") == said
    assert run(SCRIPT, FASTRELU_ENGINE=" FAST ") == "fast; ; 0\n"
    assert run(SCRIPT, FASTRELU_ENGINE="") == "fast; ; 0\n"
    nonsense = "    import warnings; warnings.simplefilter('ignore')\n" + SCRIPT
    assert run(nonsense, FASTRELU_ENGINE="quick") == "fast; ; 0\n"


LACKING = {
    "a pass": "numba.core.typed_passes.PreLowerStripPhis",
    "another pass": "numba.core.untyped_passes.ReconstructSSA",
}


@pytest.mark.parametrize("what", LACKING)
def test_a_numba_that_lacks(what):
    """It is no ImportError of ours: plain Numba has all that is needed."""
    module, _, name = LACKING[what].rpartition(".")
    missing = f"""
    import importlib
    import numba
    module = importlib.import_module({module!r})
    there = module.{name}
    del module.{name}
    import fastrelu.cuda  # which needs no more than that
    module.{name} = there  # Numba compiles with it
    """
    output = run(missing + SCRIPT)
    assert output.startswith("portable; ")
    assert name in output


def test_a_numba_that_has_no_lock_to_take():
    """Compiling is shielded from signals and small stacks all the same."""
    missing = """
    import sys
    import numba
    import numba.core.entrypoints
    sys.modules["numba.core.entrypoints"] = None
    """
    forks = """
    import os, threading
    threading.stack_size(1 << 15)
    thread = threading.Thread(target=lambda: print(F.leaky_relu(x, 2)[0]))
    thread.start()
    thread.join()
    if hasattr(os, "fork"):
        child = os.fork()
        if child == 0:
            os._exit(int(F.leaky_relu(x.astype(float), 2)[0] != -2))
        assert os.waitpid(child, 0)[1] == 0
    """
    output = run(missing + SCRIPT + forks)
    assert output.startswith("portable; ")
    assert output.endswith("\n-2.0\n")


def test_a_numba_that_has_changed():
    """What was there at import fails at first use."""
    changed = """
    from numba.core.ccallback import CFunc
    def compile(self, signature):
        self.signature = signature
    CFunc.compile = compile
    """
    said = "portable; at first use, TypeError: "
    assert run(changed + SCRIPT).startswith(said)


def test_a_misaligned_array_where_numba_has_changed(monkeypatch):
    """Which no quick call takes: nothing is written before loops are there."""
    for name in ("_loops", "_why"):
        monkeypatch.setattr(cpu, name, getattr(cpu, name))

    def changed(*_):
        raise abi.Unproven("Numba has changed")

    fast = importlib.import_module("fastrelu.cpu.fast")
    monkeypatch.setattr(fast, "elementwise", changed)
    x = np.linspace(-1, 1, 9).astype(np.float32)
    odd = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype)
    odd[:] = x
    assert_same(F.relu(odd), np.maximum(x, 0))
    assert cpu.engine() == ("portable", "at first use, Numba has changed")


def test_nonsense_is_named(monkeypatch):
    monkeypatch.setenv("FASTRELU_ENGINE", "quick")
    with pytest.warns(RuntimeWarning, match="FASTRELU_ENGINE must be .* got 'quick'"):
        cpu._choose()


def test_a_doubt_at_import(monkeypatch):
    monkeypatch.setattr(abi, "doubt", lambda: "the moon is full")
    assert cpu._choose() == (portable, "the moon is full")


def test_a_doubt_at_first_use(monkeypatch):
    """What cannot be compiled is run by plain Numba, from the first call on."""
    for name in ("_loops", "_why"):
        monkeypatch.setattr(cpu, name, getattr(cpu, name))
    fail = abi.Unproven("Numba has changed")

    def make_ready(*_, **__):
        raise fail

    x = np.linspace(-1, 1, 9).astype(np.float32)
    leaky_relu = _dispatch._Forward(activations._LEAKY_RELU)
    monkeypatch.setattr(type(leaky_relu.quick), "make_ready", make_ready)
    for _ in range(2):
        y = leaky_relu.call(x, False, None, False, 0.5)
        assert_same(y, np.where(x > 0, x, x / 2))
        assert cpu.engine() == ("portable", "at first use, Numba has changed")
    fast = importlib.import_module("fastrelu.cpu.fast")
    cpu._loops = fast
    monkeypatch.setattr(fast, "quick_call", type(leaky_relu.quick))  # none is ready
    odd = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype)  # which goes the long way
    odd[:] = x
    assert_same(F.relu(odd), np.maximum(x, 0))
    assert cpu.engine()[0] == "portable"


# What else is looked at ---------------------------------------------------------------


def test_words_that_point_elsewhere(monkeypatch):
    real, numbers = abi.word, (ctypes.c_int64 * 8)()
    place = ctypes.addressof(numbers)

    def word(value, i):
        ndim = getattr(value, "ndim", 0)
        return {abi.SHAPE: place, abi.STRIDES: place + 8 * ndim}.get(i) or real(
            value, i
        )

    with monkeypatch.context() as patch:
        patch.setattr(abi, "word", word)
        patch.setattr(abi, "_ARRAY_API", 1.5)
        assert "the shape of an array" in abi.doubt()

    def more(value, i):
        return real(value, i) + bool(getattr(value, "metadata", None))

    with monkeypatch.context() as patch:
        patch.setattr(abi, "word", more)
        patch.setattr(abi, "_arrays", list)
        assert "the same dtype has two numbers" in abi.doubt()
    other = types.SimpleNamespace(version=2, malloc=1, free=1)
    handler = types.SimpleNamespace(from_address=lambda _: other)
    monkeypatch.setattr(abi, "Handler", handler)
    assert "memory handler is another one" in abi.doubt()


def test_fast_loops_that_cannot_be_imported(monkeypatch):
    monkeypatch.delattr(cpu, "fast")
    monkeypatch.setitem(sys.modules, "fastrelu.cpu.fast", None)
    loops, why = cpu._choose()
    assert loops is portable
    assert "fastrelu.cpu" in why


@pytest.mark.parametrize("error", [MemoryError, abi.Unproven])
def test_what_is_no_change_of_numbas(error):
    def function():
        raise error

    with pytest.raises(error):
        jit.shielded(function)()


def test_loops_of_a_dtype_that_is_not_accepted():
    with pytest.raises(TypeError, match="no loops are known for dtype"):
        vector.format_of(np.dtype("S4"))
    assert _dtypes.name_of(np.dtype("S4")) == "bytes32"


def test_bits_that_change_after_they_were_checked():
    mask, grad = F.Mask(np.zeros(1, np.uint8), 8), np.zeros(8)
    with pytest.raises(ValueError, match="stay as they are"):
        _arguments.bits_of(mask, np.zeros(2, np.uint8), "x > 0", "grad_output", grad)
