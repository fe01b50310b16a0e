"""The CUDA engine without a GPU: its compiled code in an emulator, its calls recorded.

With NUMBA_ENABLE_CUDASIM=1 the same tests run the kernels in Numba's simulator.
"""

import functools
import re
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import reference
from conftest import (
    FLOATS,
    LAYOUTS,
    OUT_LAYOUTS,
    each,
    gradient_of,
    normal,
    place,
    sample,
    slopes_for,
)
from reference import assert_same, assert_weight_gradient
from test_arguments import OVERLAPS

import fastrelu as F
from fastrelu import _dispatch
from fastrelu.activations import ACTIVATIONS, _leaky_relu

pytest.importorskip("numba_cuda", reason="needs numba-cuda: see the extra cuda13")
import gpu as machines

from fastrelu.cuda import arrays, launch

pytestmark = pytest.mark.filterwarnings("ignore::numba.NumbaPerformanceWarning")
emulated = pytest.mark.skipif(
    launch.SIMULATED, reason="the simulator is not what is compiled"
)
ALL = (*FLOATS, "int8", "uint8", "int16", "int32", "uint64")
SIZES = {"float16": 8, "bfloat16": 8, "float32": 4, "float64": 2}
FEW = (0, 1, 5, 17, 70) if launch.SIMULATED else (0, 1, 5, 8, 17, 1051)
STRIDED = [name for name in LAYOUTS if name not in ("misaligned", "swapped")]


@pytest.fixture
def gpu(monkeypatch):
    with machines.machine(monkeypatch) as machine:
        yield machine


@pytest.fixture
def put(gpu):
    return machines.library(gpu).put


def used(gpu):
    return [kernel.template for kernel, *_ in gpu.launches]


# Values -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", FEW)
@each(*ALL)
def test_forward_and_backward(name, dtype, size, put):
    x, g = sample((size,), dtype), sample((size,), dtype, 1)
    slopes = slopes_for(name, x)
    given = {key: put(v) if key == "weight" else v for key, v in slopes.items()}
    y = ACTIVATIONS[name].forward(put(x), **given)
    assert_same(y.host, reference.forward(name, x, **slopes))
    dx = gradient_of(name, put(g), put(x), **given)
    assert_same(dx.host, reference.backward(name, g, x, **slopes))


@pytest.mark.parametrize("head", [0, 1, 3])
@each(*FLOATS, "int8")
def test_in_place_from_anywhere(name, dtype, head, gpu, put):
    memory = sample((head + 40,), dtype)
    x = memory[head:]
    slopes = slopes_for(name, x)
    given = {key: put(v) if key == "weight" else v for key, v in slopes.items()}
    expected = reference.forward(name, x, **slopes)
    before = memory[:head].copy()
    given_x = put(x)
    assert ACTIVATIONS[name].forward(given_x, inplace=True, **given) is given_x
    assert_same(x, expected)
    assert_same(memory[:head], before)
    assert used(gpu) == ["flat"]
    if not launch.SIMULATED:
        assert gpu.memory.widest == 16


@each("float16", "float32", "float64")
def test_pointers_that_differ_within_16_bytes(name, dtype, gpu, put):
    x = sample((41,), dtype)
    out = np.zeros_like(x)
    slopes = slopes_for(name, x)
    given = {key: put(v) if key == "weight" else v for key, v in slopes.items()}
    ACTIVATIONS[name].forward(put(x[1:]), out=put(out[:-1]), **given)
    assert_same(out[:-1], reference.forward(name, x[1:], **slopes))
    assert used(gpu) == ["strided"]


@pytest.mark.parametrize("layout", STRIDED)
@each("float16", "float32")
def test_layouts(name, dtype, layout, put):
    x, x_memory = place(sample((3, 4, 5), dtype), layout)
    g, _ = place(sample((3, 4, 5), dtype, 1), layout)
    before = x_memory.copy()
    slopes = slopes_for(name, x)
    given = {key: put(v) if key == "weight" else v for key, v in slopes.items()}
    y = ACTIVATIONS[name].forward(put(x), **given)
    assert_same(y.host, reference.forward(name, x, **slopes))
    dx = gradient_of(name, put(g), put(x), **given)
    assert_same(dx.host, reference.backward(name, g, x, **slopes))
    assert_same(x_memory, before)


@pytest.mark.parametrize("layout", OUT_LAYOUTS[:-1])
@each("float32")
def test_out(name, dtype, layout, put):
    x, g = sample((3, 4, 5), dtype), sample((3, 4, 5), dtype, 1)
    out, memory = place(g, layout)
    slopes = slopes_for(name, x)
    given = {key: put(v) if key == "weight" else v for key, v in slopes.items()}
    ACTIVATIONS[name].forward(put(x), out=put(out), **given)
    assert_same(memory, place(reference.forward(name, x, **slopes), layout)[1])
    gradient_of(name, put(g), put(x), out=put(out), **given)
    assert_same(memory, place(reference.backward(name, g, x, **slopes), layout)[1])


@pytest.mark.parametrize("layout", ["c", "fortran", "step", "offset"])
@pytest.mark.parametrize("size", FEW)
@each(*ALL, where=lambda row: row.parameter != "weight")
def test_masks(name, dtype, size, layout, put):
    x, g = sample((size, 3), dtype), sample((size, 3), dtype, 1)
    slopes = slopes_for(name, x)
    lies, _ = place(x, layout)
    y, mask = ACTIVATIONS[name].forward(put(lies), return_mask=True, **slopes)
    assert_same(y.host, reference.forward(name, x, **slopes))
    assert_same(mask.bits.host, reference.mask_bits(x))
    assert mask.nbytes == mask.bits.host.nbytes
    assert_same(mask.unpack().host, reference.active(x))
    lies, _ = place(g, layout)
    dx = ACTIVATIONS[name].backward(put(lies), mask, **slopes)
    assert_same(dx.host, reference.backward(name, g, x, **slopes))


@pytest.mark.parametrize("how", OVERLAPS)
def test_overlap(how, gpu, put):
    if how == "one byte":
        pytest.skip("GPUs do not read across the size of an element")
    memory = normal(400, np.dtype(np.float32), 5)
    x, out = OVERLAPS[how](memory)
    expected = reference.forward("leaky_relu", x.copy(), negative_slope=0.5)
    F.leaky_relu(put(x), 0.5, out=put(out))
    assert_same(out, expected)


def test_bits_within_the_output(put):
    g = normal(64, np.dtype(np.float32))
    x = normal(64, np.dtype(np.float32), 1)
    bits = g.view(np.uint8)[8:16]
    bits[:] = reference.mask_bits(x)
    expected = reference.backward("relu", g, x)
    F.relu_backward(put(g), F.Mask(put(bits), 64), inplace=True)
    assert_same(g, expected)


# PReLU's weights ----------------------------------------------------------------------

SHAPES = {
    "rows": ((2, 3, 72), 3),
    "rows of vectors": ((3, 2, 136), 2),
    "short rows": ((9, 3, 5), 3),
    "columns": ((37, 24), 24),
    "few columns": ((37, 3), 3),
    "shared": ((3, 7, 33), 1),
    "one row": ((1, 2, 700), 2),
    "empty": ((0, 3), 3),
}
WEIGHTS = {
    "two axes": ((2, 3, 4), (3, 4)),
    "a gap": ((2, 3, 4), (2, 1, 4)),
    "keras": ((2, 3, 4, 5), (3, 1, 1)),
    "all": ((2, 3), (2, 3)),
}


def check_prelu(put, x, g, w, **axis):
    y = F.prelu(put(x), put(w), **axis)
    assert_same(y.host, reference.forward("prelu", x, weight=w, **axis))
    results = [F.prelu_backward(put(g), put(x), put(w), **axis) for _ in "12"]
    (dx, dw), (_, again) = results
    assert_same(dx.host, reference.backward("prelu", g, x, weight=w, **axis))
    assert_weight_gradient(dw.host, g, x, w, **axis)
    assert dw.host.tobytes() == again.host.tobytes()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS, indirect=True)
def test_weights_along_an_axis(dtype, shape, put):
    shape, size = SHAPES[shape]
    x, g, w = normal(shape, dtype), normal(shape, dtype, 1), normal(size, dtype, 2)
    check_prelu(put, x, g, w)
    if dtype.itemsize == 2:
        check_prelu(put, x, g, w.astype(np.float32))


@pytest.mark.parametrize("layout", ["fortran", "permuted", "step", "negative"])
@pytest.mark.parametrize("shape", ["rows", "columns", "shared"])
def test_weights_in_every_layout(layout, shape, put):
    shape, size = SHAPES[shape]
    float32 = np.dtype(np.float32)
    x, g = (place(normal(shape, float32, k), layout)[0] for k in (0, 1))
    check_prelu(put, x, g, normal(size, float32, 2))


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_broadcast(case, put):
    shape, size = WEIGHTS[case]
    x, g, w = (
        normal(s, np.dtype(np.float32), k) for k, s in enumerate([shape, shape, size])
    )
    dx, dw = F.prelu_backward(put(g), put(x), put(w))
    host_dx, host_dw = F.prelu_backward(g, x, w)
    assert_same(dx.host, host_dx)
    np.testing.assert_allclose(dw.host, host_dw, rtol=1e-5, atol=1e-6)
    assert_same(F.prelu(put(x), put(w)).host, F.prelu(x, w))


@pytest.mark.parametrize("special", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("shape", ["rows", "columns"])
def test_weight_gradient_of_what_is_not_finite(shape, special, put):
    shape, size = SHAPES[shape]
    x, g, w = normal(shape, np.dtype("f4")), np.ones(shape, "f4"), np.ones(size, "f4")
    x[1, 1] = float(special)
    _, dw = F.prelu_backward(put(g), put(x), put(w))
    assert_weight_gradient(dw.host, g, x, w)


@pytest.mark.parametrize("argument", ["weight", "x", "grad"])
def test_weight_gradient_onto_an_input(argument, put):
    arrays = {
        k: normal((30, 7), np.dtype("f4"), i) for i, k in enumerate(["x", "grad"])
    }
    arrays["weight"] = normal(7, np.dtype("f4"), 5)
    x, grad, w = (arrays[k].copy() for k in ("x", "grad", "weight"))
    target = arrays[argument] if argument == "weight" else arrays[argument][2]
    given = {key: put(a) for key, a in arrays.items()}
    dx = put(np.empty_like(x))
    F.prelu_backward(given["grad"], given["x"], given["weight"], out=(dx, put(target)))
    assert_same(dx.host, reference.backward("prelu", grad, x, weight=w))
    assert_weight_gradient(target, grad, x, w)


def test_weight_within_the_output(put):
    x = normal((30, 7), np.dtype("f4"))
    expected = reference.forward("prelu", x.copy(), weight=x[3].copy())
    F.prelu(put(x), put(x[3]), inplace=True)
    assert_same(x, expected)


@emulated
def test_the_error_of_a_long_sum_does_not_grow(put):
    x = -np.abs(normal((1, 1, 1 << 18), np.dtype("f4")))
    g = np.abs(normal(x.shape, x.dtype, 1)) + np.float32(1e-3)
    w = np.ones(1, x.dtype)
    _, dw = F.prelu_backward(put(g), put(x), put(w))
    exact, scale = reference.weight_gradient(g, x, w)
    assert abs(dw.host - exact) <= (reference.eps(x.dtype) * scale)


# Arguments ----------------------------------------------------------------------------


def test_host_and_device_do_not_mix(put):
    x, host = put(np.ones(4, "f4")), np.ones(4, "f4")
    for call, name in (
        (lambda: F.relu(x, out=host), "out"),
        (lambda: F.relu(host, out=x), "out"),
        (lambda: F.relu_backward(x, host), "saved"),
        (lambda: F.relu_backward(host, x), "saved"),
        (lambda: F.relu_backward(host, F.relu(x, return_mask=True)[1]), "saved"),
        (lambda: F.relu_backward(x, F.relu(host, return_mask=True)[1]), "saved"),
        (lambda: F.prelu(x, host[:1]), "weight"),
    ):
        with pytest.raises(TypeError, match=name):
            call()


def test_two_devices(put):
    x, other = put(np.ones(4, "f4")), machines.ndarray(np.ones(4, "f4"), device=1)
    for call, name in (
        (lambda: F.relu(x, out=other), "out"),
        (lambda: F.relu_backward(x, other), "saved"),
        (lambda: F.prelu(x, machines.ndarray(np.ones(1, "f4"), device=1)), "weight"),
    ):
        with pytest.raises(ValueError, match=name):
            call()


@pytest.mark.parametrize("dtype", ["complex64", "bool"])
def test_dtypes(dtype, put):
    with pytest.raises(TypeError, match=f"x must have dtype .* got .*{dtype}"):
        F.relu(put(np.ones(3, dtype)))


def test_memory_that_no_gpu_can_read(put):
    x, _ = place(normal(8, np.dtype("f4")), "misaligned")
    with pytest.raises(ValueError, match="x must start"):
        F.relu(put(x))


def test_outputs(gpu, put):
    x = put(np.ones((2, 3), "f4"))
    for out, error in (
        (np.ones((2, 3)), TypeError),
        (np.ones((3, 2), "f4"), ValueError),
        (np.broadcast_to(np.ones(3, "f4"), (2, 3)), ValueError),
    ):
        with pytest.raises(error, match="out"):
            F.relu(x, out=put(out))
    assert not gpu.launches


class Interface:
    """An array of a library that is known by its interface alone"""

    def __init__(self, a, stream=None, **more):
        self.a, self.dtype, self.shape = a, a.dtype, a.shape
        self.__dict__["more"] = {"stream": stream, **more}

    @property
    def __cuda_array_interface__(self):
        return {**self.a.__array_interface__, **self.more}


def test_any_array_with_an_interface(gpu, put):
    x, out = np.array([-1, 2], "f4"), np.zeros(2, "f4")
    put(x), put(out)
    given = Interface(out)
    assert F.relu(Interface(x), out=given) is given
    assert_same(out, np.array([0, 2], "f4"))
    memory = gpu.own(np.array([1, -1, 3], "f4"))
    F.relu(Interface(memory[:-1]), out=Interface(memory[1:]))
    assert_same(memory, np.array([1, 1, 0], "f4"))
    assert gpu.lent
    with pytest.raises(TypeError, match="out must be given"):
        F.relu(Interface(x))
    with pytest.raises(ValueError, match="out must be writeable"):
        F.relu(Interface(x), out=Interface(out, data=(out.ctypes.data, True)))


class Tensor:
    """What PyTorch shows of a tensor"""

    __module__ = "torch"
    layout = "strided"

    def __init__(self, host, requires_grad=False):
        self.host, self.requires_grad = host, requires_grad
        self.shape, self.dtype = host.shape, f"torch.{host.dtype.name}"
        self.data_ptr, self.is_neg = lambda: host.ctypes.data, lambda: False
        self.element_size, self.get_device = lambda: host.itemsize, lambda: 0

    def __dlpack_device__(self):
        return 2, 0

    def stride(self):
        return tuple(s // self.host.itemsize for s in self.host.strides)


@pytest.fixture
def torch(gpu, monkeypatch):
    library = types.ModuleType("torch")
    library.strided = "strided"
    library.empty_like = lambda x: Tensor(gpu.own(np.empty_like(x.host)))
    stream = types.SimpleNamespace(cuda_stream=11)
    library.cuda = types.SimpleNamespace(current_stream=lambda device: stream)
    monkeypatch.setitem(sys.modules, "torch", library)
    return library


@pytest.mark.parametrize("dtype", FLOATS, indirect=True)
def test_tensors(dtype, gpu, torch):
    x = gpu.own(sample((4, 6), dtype))
    y = F.relu(Tensor(x.T))
    assert type(y) is Tensor
    assert_same(y.host, reference.forward("relu", x.T))
    assert gpu.launches[-1][2] == 11
    with pytest.raises(TypeError, match=r"x .*detach\(\)"):
        F.relu(Tensor(x, requires_grad=True))


def test_streams_wait_for_one_another(gpu, torch, put):
    x, out = normal(5, np.dtype("f4")), np.empty(5, "f4")
    F.relu(put(x), out=put(out))
    assert not gpu.waits
    F.relu(put(x), out=Tensor(out))
    assert gpu.waits == [(7, 11), (11, 7)]
    assert gpu.launches[-1][2] == 7


def test_a_machine_without_the_extra(monkeypatch, put):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _dispatch._cuda.cache_clear()
    with pytest.raises(ImportError, match=r"fastrelu\[cuda13\]"):
        F.relu(put(np.ones(3, "f4")))


# Compiled code ------------------------------------------------------------------------

CAPABILITIES = (7, 5), (8, 0), (9, 0), (10, 0)
compiled = functools.cache(launch.compile_ptx)


def kernels():
    """Every kind of kernel, by name"""
    relu = ACTIVATIONS["relu"].forward.__globals__["_relu"]
    gradient = ACTIVATIONS["relu"].forward.__globals__["_leaky_relu_gradient"]
    for dtype in FLOATS:
        for element in ("input", "gradient", "flag"):
            formula = _leaky_relu if element == "input" else gradient
            options = {"element": element, "lane": dtype, "formula": formula}
            yield "flat", {**options, "wide": False}
            yield "strided", {**options, "wide": False, "rank": 2}
        for element in ("rows", "columns"):
            options = {"element": element, "lane": dtype, "formula": _leaky_relu}
            yield "flat", {**options, "weight": dtype, "wide": False}
        yield "flat_mask", {"formula": relu, "lane": dtype}
        both = {"gradient": gradient, "lane": dtype, "weight": dtype, "wide": False}
        for template in ("prelu_rows", "prelu_columns"):
            yield template, {**both, "vectors": True}
        yield "strided_gradient", {**both, "rank": 2}
        yield "strided_mask", {"formula": relu, "lane": dtype, "rank": 2, "wide": True}
        yield "strided_sum", {"lane": dtype, "kept": 1, "summed": 2}
        yield "finish", {"lane": dtype}
    for dtype in ("int8", "uint16", "int32", "int64"):
        options = {"element": "input", "lane": dtype, "formula": relu, "wide": False}
        yield "flat", options
        yield "flat_mask", {"formula": relu, "lane": dtype}


@emulated
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_code(capability):
    for template, options in kernels():
        text, entry = compiled(launch.kernel(template, **options), capability)
        code = text[text.index(entry) :]
        assert ".local" not in code, (template, options)
        if not template.startswith("strided") and template != "finish":
            assert "ld.global.v" in code, (template, options)
            assert "st.global.v" in code, (template, options)
        if options["lane"] != "float64":
            assert ".f64" not in code, (template, options)
        assert "fma.rn" not in code, (template, options)
        assert "atom" not in code


@emulated
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_machine_code(capability, tmp_path):
    from cuda import pathfinder

    program = pathfinder.find_nvidia_binary_utility("nvdisasm")
    if program is None:
        pytest.skip("needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    for template, options in kernels():
        if options["lane"] not in ("float32", "float16"):
            continue
        kernel = launch.kernel(template, **options)
        text = disassemble(program, kernel, capability, tmp_path / "code")
        assert not [op for op in ("LDL", "STL") if op in text], (template, options)
        registers = max(map(int, re.findall(r"\bR(\d+)\b", text)), default=0) + 1
        summing = template in ("prelu_rows", "prelu_columns", "strided_sum", "finish")
        assert registers <= (80 if summing else 48), (template, options, registers)
        if not template.startswith("strided") and template != "finish":
            assert "LDG.E.128" in text, (template, options)
            assert "STG.E.128" in text, (template, options)


def disassemble(program, kernel, capability, file):
    file.write_bytes(launch.link(compiled(kernel, capability)[0], capability))
    run = subprocess.run(
        [program, "-c", str(file)], check=True, capture_output=True, text=True
    )
    return run.stdout


# The cache on the disk ----------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTRELU_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fresh():
    options = {"element": "input", "formula": _leaky_relu, "lane": "float32"}
    return launch.Kernel("flat", {**options, "wide": False})


@emulated
def test_code_is_compiled_once(cache, monkeypatch):
    made = launch.machine_code(fresh(), (9, 0))
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(launch, "compile_ptx", None)
    assert launch.machine_code(fresh(), (9, 0)) == made


@emulated
@pytest.mark.parametrize("content", [b"", b"short", b"x" * 5000])
def test_a_damaged_file_is_made_again(cache, content):
    launch.machine_code(fresh(), (9, 0))
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for damage in (content, whole[:-1], whole + b"x"):
        file.write_bytes(damage)
        made = launch.machine_code(fresh(), (9, 0))
        assert made[1][:4] == b"\x7fELF"
        assert launch._read(file.name) == made


@emulated
def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTRELU_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert launch.machine_code(fresh(), (9, 0))[0]


def test_a_digest_for_each_kernel_and_device():
    kernels_ = [launch.Kernel(t, o) for t, o in kernels()]
    digests = [k.digest(c) for k in kernels_ for c in CAPABILITIES]
    assert len({*digests}) == len(digests)


def test_two_writers(cache):
    payload = bytes(range(256)) * 100
    threads = [
        threading.Thread(target=launch._write, args=("name", "entry", payload))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert launch._read("name") == ("entry", payload)
    assert [file.name for file in cache.iterdir()] == ["name"]


class Driver:
    """What is asked of cuda.core and of the driver, and in which order"""

    def __init__(self, current=None):
        self.calls, self.now = [], current

    def cuCtxGetDevice(self):
        return (201, None) if self.now is None else (0, self.now)

    def cuDevicePrimaryCtxRetain(self, device):
        return 0, f"context {device}"

    def cuCtxPushCurrent(self, context):
        self.calls.append(context)

    def cuCtxPopCurrent(self):
        self.calls.append("pop")

    def core(self):
        core = types.ModuleType("cuda.core")
        core.Device = lambda i: types.SimpleNamespace(compute_capability=(9, 0))
        core.LaunchConfig = lambda grid, block: (grid, block)
        core.Stream = types.SimpleNamespace(from_handle=lambda h: f"stream {h}")
        code = types.SimpleNamespace(get_kernel=lambda entry: f"kernel {entry}")
        core.ObjectCode = types.SimpleNamespace(from_cubin=lambda code_: code)
        core.launch = lambda *arguments: self.calls.append(arguments)
        return core


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setitem(sys.modules, "cuda.core", made.core())
    monkeypatch.setattr(launch, "_driver", lambda: made)
    monkeypatch.setattr(launch, "machine_code", lambda kernel, cc: ("entry", b""))
    caches = launch._capability, launch._blocks, launch.stream_of, launch._context
    for cache in caches:
        cache.cache_clear()
    yield made
    for cache in caches:
        cache.cache_clear()


@emulated
def test_a_launch_has_bare_addresses(driver):
    kernel = fresh()
    for _ in "12":
        launch.launch(kernel, 0, 5, 3, 4096, (1, 2), np.float32(0.5))
    call = "stream 5", (3, launch.THREADS), "kernel entry", 4096, 1, 2, np.float32(0.5)
    assert driver.calls == [call] * 2


@emulated
@pytest.mark.parametrize("now", [None, 0, 1])
def test_the_device_of_the_array_is_current(driver, now):
    driver.now = now
    with launch.current(1):
        driver.calls.append("work")
    around = ["work"] if now == 1 else ["context 1", "work", "pop"]
    assert driver.calls == around


def test_handles_of_the_legacy_stream():
    assert {arrays._handle(stream) for stream in (None, 0, 1)} == {0}
