"""The portable loops: what they compute as Python, on threads, and in any mode.

That they give the results of the fast ones on every host, the other tests show: they
pass with FASTRELU_ENGINE=portable, too.
"""

import functools
import platform
import threading

import numba
import numpy as np
import pytest
import reference
import twins
from conftest import (
    ACTIVATIONS,
    FLOATS,
    TYPICAL,
    each,
    gradient_of,
    normal,
    place,
    sample,
    slopes_for,
)
from reference import assert_same, assert_weight_gradient
from test_threads import needs_fork, run

import fastrelu as F
from fastrelu import cpu
from fastrelu.cpu import halves, portable, shield

SIZES = 0, 1, 8, 77, 1158


@pytest.fixture(autouse=True)
def loops(monkeypatch):
    """Have NumPy arrays take the portable loops, whichever there are."""
    for name in ("_loops", "_why"):
        monkeypatch.setattr(cpu, name, getattr(cpu, name))
    cpu.give_up("a test asks for it")
    for function in twins.public_functions():
        monkeypatch.setattr(function, "call", function.left)
        if hasattr(function, "quick_with_bits"):
            monkeypatch.setattr(function, "quick_with_bits", portable.quick_call(None))


@pytest.fixture
def interpreted(monkeypatch):
    """The loops as the Python that they are, line by line"""

    def names(row):
        plain = (portable._itself, portable._itself)
        load, store = portable._HALVES.get(row.name, plain)
        compute = getattr(np, row.compute)
        share = portable.share_of
        return {"load": load, "store": store, "compute": compute, "share": share}

    def compile_(function, kinds, **options):
        return function

    @functools.cache
    def loop(template, operation, row, kinds):
        open_ = names(row) | {
            "formula": operation.function,
            "active": operation.active,
            "kept": portable._KEEP[operation.kept],
        }
        get = portable._GET[operation.arrays - 1]
        open_["get"] = portable.rebuild(get, "get", open_)
        bound = portable.rebuild(template, "twin", open_)
        shared = portable._shared
        if template is portable._prelu_backward:
            shared = portable._shared_sums
        open_ = {"body": bound, "mode": portable._mode}
        return bound, lambda: portable.rebuild(shared, "twin", open_)

    monkeypatch.setattr(portable, "_loop", loop)
    monkeypatch.setattr(portable, "_adder", lambda *_: portable._add_up)
    monkeypatch.setattr(portable, "_is_shared", lambda: True)
    monkeypatch.setattr(portable, "PART", 64)
    monkeypatch.setattr(portable, "SUMMED", 64)
    with np.errstate(all="ignore"):
        yield


@pytest.mark.parametrize("size", SIZES)
@each(*FLOATS, "int8", "uint32", names=TYPICAL)
def test_forward_and_backward(name, dtype, size, interpreted):
    row = ACTIVATIONS[name]
    x, g = sample((size,), dtype), sample((size,), dtype, seed=1)
    slopes = slopes_for(name, x)
    y = reference.forward(name, x, **slopes)
    dx = reference.backward(name, g, x, **slopes)
    assert_same(row.forward(x, **slopes), y)
    assert_same(gradient_of(name, g, x, **slopes), dx)
    for values, expected, call in (
        (x, y, lambda a: row.forward(a, inplace=True, **slopes)),
        (g, dx, lambda a: gradient_of(name, a, x, inplace=True, **slopes)),
    ):
        given, memory = place(values, "c")
        assert call(given) is given
        assert_same(memory, place(expected, "c")[1])


@pytest.mark.parametrize("size", SIZES)
@each(*FLOATS, "int8", "uint32", where=lambda row: row.takes_mask, names=TYPICAL)
def test_masks(name, dtype, size, interpreted):
    row = ACTIVATIONS[name]
    x, g = sample((size,), dtype), sample((size,), dtype, seed=1)
    slopes = slopes_for(name, x)
    y, mask = row.forward(x, return_mask=True, **slopes)
    assert_same(y, reference.forward(name, x, **slopes))
    assert_same(mask.bits, reference.mask_bits(x, name, **slopes))
    assert_same(
        row.backward(g, mask, **slopes), reference.backward(name, g, x, **slopes)
    )
    given = x.copy()
    row.forward(given, inplace=True, return_mask=True, **slopes)
    assert_same(given, y)


SHAPES = (1, 1, 1), (7, 5, 1), (3, 4, 60), (40, 3, 7), (200, 1, 3), (1, 200, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS, indirect=True)
def test_weights(dtype, shape, interpreted):
    values = normal if dtype == float else sample  # the reference splits doubles
    x, g = values(shape, dtype), values(shape, dtype, seed=1)
    for weight in (normal(shape[1], dtype), normal(1, dtype)):
        assert_same(F.prelu(x, weight), reference.forward("prelu", x, weight=weight))
        dx, dw = F.prelu_backward(g, x, weight)
        assert_same(dx, reference.backward("prelu", g, x, weight=weight))
        assert_weight_gradient(dw, g, x, weight)


def test_gradients_of_other_layouts(interpreted):
    x, g = normal((4, 6, 5), np.float32), normal((4, 6, 5), np.float32, seed=1)
    weight = normal(6, np.float32, seed=2)
    expected, sums = F.prelu_backward(g, x, weight)
    wide, out = np.repeat(x, 2, -1)[..., ::2], np.zeros((4, 6, 10), np.float32)
    for into in None, (out[..., ::2], None):
        dx, dw = F.prelu_backward(g, wide, weight, out=into)
        assert_same(np.array(dx), expected)
        assert_same(dw, sums)


def test_every_half_float(interpreted):
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(np.float16).astype(np.float32)
    got = np.array([halves.half_to_float(half) for half in bits])
    assert_same(got, values)


# Numba's threads ----------------------------------------------------------------------


@pytest.fixture
def shared():
    """Numba's own threads, if this host has a layer that two threads may enter"""
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)  # which starts them
    if not portable._is_shared():
        pytest.skip(f"{numba.threading_layer()}, or one thread")


def test_parts_on_several_threads(shared, monkeypatch):
    for name in ("PART", "SUMMED"):
        monkeypatch.setattr(portable, name, 1 << 10)
    dtype = np.dtype(np.float32)
    x, g = sample((40, 500), dtype), sample((40, 500), dtype, seed=1)
    for name in TYPICAL:
        row = ACTIVATIONS[name]
        slopes = slopes_for(name, x)
        assert_same(row.forward(x, **slopes), reference.forward(name, x, **slopes))
        expected = reference.backward(name, g, x, **slopes)
        assert_same(gradient_of(name, g, x, **slopes), expected)
        if row.takes_mask:
            _, mask = row.forward(x, return_mask=True, **slopes)
            assert_same(mask.bits, reference.mask_bits(x, name, **slopes))
            assert_same(row.backward(g, mask, **slopes), expected)


def test_a_thread_that_is_alone_shares_nothing(shared):
    with shield.alone():
        assert not portable._is_shared()
    assert portable._is_shared()


def test_the_weight_gradient_has_the_same_bits_on_any_number_of_threads(
    shared, monkeypatch
):
    monkeypatch.setattr(portable, "SUMMED", 1 << 10)
    x, w = normal((300, 70), np.float32), normal((70,), np.float32)
    _, several = F.prelu_backward(x, x, w)
    monkeypatch.setattr(portable, "_is_shared", lambda: False)
    _, alone = F.prelu_backward(x, x, w)
    assert_same(several, alone)


def test_two_threads_at_once(shared):
    x = sample((1 << 18,), np.dtype(np.float32))
    expected, wrong = reference.forward("relu", x), []

    def call():
        for _ in range(20):
            if not np.array_equal(F.relu(x), expected, equal_nan=True):
                wrong.append(True)

    team = [threading.Thread(target=call) for _ in range(4)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert wrong == []


def test_parts_of_threads_in_another_mode_are_done_by_the_caller(
    interpreted, monkeypatch
):
    """Each thread says in which mode it is; here every second part is in another."""
    modes, again, real = iter([0] + [1, 0, 2] * 1000), [], portable._loop
    monkeypatch.setattr(portable, "_mode", lambda probe: next(modes))

    def counted(*given):
        loop, twin = real(*given)
        return lambda *operands: again.append(loop(*operands)), twin

    monkeypatch.setattr(portable, "_loop", counted)
    real.cache_clear()
    x = sample((1000,), np.dtype(np.float32))
    assert_same(F.relu(x), reference.forward("relu", x))
    assert len(again) > 5
    modes = iter([0] + [1, 0, 2] * 1000)
    again.clear()
    weight = normal(1, np.float32)
    dx, dw = F.prelu_backward(x, x, weight)
    assert_same(dx, reference.backward("prelu", x, x, weight=weight))
    assert_weight_gradient(dw, x, x, weight)
    assert len(again) > 5
    real.cache_clear()


MODE = """
    import ctypes, os
    import numba
    import numpy as np
    from numba.extending import intrinsic
    from numba import types
    from llvmlite import ir
    from fastrelu.cpu import portable
    mode = numba.njit(portable._mode)
    @intrinsic
    def set_mxcsr(context, value):
        def codegen(context, builder, signature, args):
            from numba.core import cgutils
            kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer()])
            place = cgutils.alloca_once_value(builder, args[0])
            function = cgutils.get_or_insert_function(
                builder.module, kind, "llvm.x86.sse.ldmxcsr")
            builder.call(function, [builder.bitcast(place, kind.args[0])])
            return context.get_dummy_value()
        return types.void(types.uint32), codegen
    @numba.njit
    def modes(probe, value):
        set_mxcsr(value)
        found = mode(probe)
        set_mxcsr(np.uint32(0x1F80))
        return found
    default, subnormals = 0x1F80, (0, 0x40, 0x8000, 0x8040)
    values = [default | a | b for a in subnormals for b in (0, 0x2000, 0x4000, 0x6000)]
    found = [modes(portable.PROBE, np.uint32(value)) for value in values]
    print(len(set(found)), found[0] == mode(portable.PROBE))
"""


def test_every_mode_is_told_from_the_others():

    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("sets the modes of x86")
    assert run(MODE) == "16 True\n"


@needs_fork
def test_a_child_does_not_use_threads_that_it_has_not():
    script = """
    import os, warnings
    warnings.simplefilter("ignore")
    import numba
    import numpy as np
    import fastrelu as F
    from fastrelu.cpu import portable
    before = portable._is_shared()
    numba.set_num_threads(2)
    x = np.linspace(-1, 1, 1 << 20).astype(np.float32)
    expected = np.maximum(x, 0)
    fine = np.array_equal(F.relu(x), expected)
    child = os.fork()
    if child == 0:
        os._exit(not (np.array_equal(F.relu(x), expected) and not portable._is_shared()))
    print(before, fine, os.waitpid(child, 0)[1])
    """
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("needs two threads")
    assert run(script, FASTRELU_ENGINE="portable") == "False True 0\n"


def test_the_ways_without_quick_calls():
    call = portable.quick_call(None)
    assert call.call() is None
    assert call.again(integers=True) is None
    pool = portable.get_default_memory_pool()
    pool.set_limit(1)
    pool.free_all_blocks()
    assert pool.used_bytes() == pool.free_bytes() == pool.total_bytes() == 0
    assert pool.get_limit() == 0


def test_loops_of_two_dtypes_are_kept_apart(tmp_path):
    """float16 and bfloat16 are both stored as uint16; each process reads what one kept."""
    script = """
    import ml_dtypes
    import numpy as np
    import fastrelu as F
    for dtype in (np.float16, ml_dtypes.bfloat16):
        print(F.leaky_relu(np.array([-1, 3]).astype(dtype), 0.5).tolist())
    """
    pytest.importorskip("ml_dtypes")
    portable_ = {"FASTRELU_ENGINE": "portable", "NUMBA_CACHE_DIR": str(tmp_path)}
    for _ in range(2):
        assert run(script, **portable_) == "[-0.5, 3.0]\n[-0.5, 3.0]\n"


def test_for_those_who_debug_kernels_of_their_own():
    """Without a compiler all is slow, and right."""
    script = """
    import numpy as np
    import fastrelu as F
    x = np.arange(-3, 4).astype(np.float16)
    print(F.leaky_relu(x, 0.5).tolist(), F.prelu_backward(x, x, x[:1])[1].tolist())
    """
    expected = "[-1.5, -1.0, -0.5, 0.0, 1.0, 2.0, 3.0] [14.0]\n"
    assert run(script, FASTRELU_ENGINE="portable", NUMBA_DISABLE_JIT="1") == expected


def test_no_file_to_keep_the_code_beside(monkeypatch):
    """As in an archive: it is compiled for this process."""
    real, caches = numba.njit, []

    def njit(function, **options):
        caches.append(options.get("cache"))
        if options.get("cache"):
            raise RuntimeError
        return real(function, **options)

    monkeypatch.setattr(numba, "njit", njit)
    loop = portable._compile(portable._itself, (numba.intp,))
    assert loop(3) == 3
    assert caches == [True, None]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_formula(name, interpreted):
    row, dtype = ACTIVATIONS[name], np.dtype(np.float32)
    x, g = 3 * sample((6, 13), dtype), sample((6, 13), dtype, seed=1)
    slopes = slopes_for(name, x)
    assert_same(row.forward(x, **slopes), reference.forward(name, x, **slopes))
    expected = reference.backward(name, g, x, **slopes)
    assert_same(gradient_of(name, g, x, **slopes), expected)
    out = np.empty((6, 26), dtype)[:, ::2]
    gradient_of(name, g, x, out=out, **slopes)
    assert_same(out, expected)
    slopes = sample(x.shape, dtype, seed=2)
    expected = reference.backward("rrelu", g, x, slopes=slopes)
    assert_same(F.rrelu_backward(g, x, slopes), expected)


def test_a_mask_of_two_numbers(interpreted):
    x = sample((77,), np.dtype(np.float32))
    y, operands = np.empty_like(x), [("array", x), ("number", -0.5), ("number", 0.5)]
    bits, _ = portable.elementwise_mask(twins.clipped, twins.within, 2, operands, y)
    assert_same(bits, np.packbits((x > -0.5) & (x < 0.5), bitorder="little"))
    assert y[np.isfinite(y)].max() == 0.5
