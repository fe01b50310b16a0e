"""Launches by the real cuda.core and cuda-bindings, over a driver without a device.

The emulator of test_cuda.py stands in for all of them.  Here all is real down to the
driver's functions, which libcuda.c answers: it notes what would have reached a device.
"""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import run_command

pytest.importorskip("numba_cuda")
pytest.importorskip("cuda.core")
from fastrelu.cuda import launch

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or not shutil.which("cc"),
        reason="its driver is built by a C compiler",
    ),
    pytest.mark.skipif(launch.SIMULATED, reason="the simulator asks no driver"),
]

PRELUDE = """
    import ctypes, warnings
    import numpy as np
    import fastrelu as F
    from fastrelu.cuda import launch
    warnings.simplefilter("ignore")
    stub = ctypes.CDLL("libcuda.so.1")
    def word(name, type_=ctypes.c_long):
        return type_.in_dll(stub, f"stub_{name}")
    def count(name):
        return word(name).value
    class Array:
        stream, device = 5, 0
        def __init__(self, *shape, dtype="f4", step=1):
            memory = np.zeros((*shape[:-1], shape[-1] * step), dtype)
            self.held = memory[..., ::step]
            self.dtype = self.held.dtype
        @property
        def __cuda_array_interface__(self):
            held = self.held
            return {"shape": held.shape, "strides": held.strides, "version": 3,
                    "typestr": held.dtype.str, "data": (held.ctypes.data, False),
                    "stream": self.stream}
        def __dlpack_device__(self):
            return 2, self.device
    x, y = Array(1000), Array(1000)
    image, weight = Array(4, 6, 10), Array(6)
    def both():
        F.prelu_backward(image, image, weight, out=(Array(4, 6, 10), Array(6)))
"""

# Each launch is compared with what the driver found where a kernel has its arguments.
COMPARED = """
    sizes, found = word("sizes", ctypes.c_long * 32), word("bytes", ctypes.c_ubyte * 256)
    real = launch.launch
    def compare(kernel, device, stream, blocks, *arguments):
        flat = []
        for type_ in kernel.function((9, 0))[1]:
            flat += type_ if hasattr(type_, "count") else [type_]
        names = ["uint64" if str(t).endswith("*") else str(t) for t in flat]
        dtypes = [np.dtype(name) for name in names]
        assert len(dtypes) == len(arguments)
        sizes[: len(dtypes) + 1] = [*(dtype.itemsize for dtype in dtypes), 0]
        before = count("launches")
        real(kernel, device, stream, blocks, *arguments)
        assert count("launches") == before + 1
        raw = bytes(found)
        for i, (dtype, argument) in enumerate(zip(dtypes, arguments)):
            (arrived,) = np.frombuffer(raw, dtype, 1, 8 * i)
            assert arrived == dtype.type(argument), (names, i, arrived, argument)
        assert (count("grid"), count("block")) == (blocks, launch.THREADS)
        assert (count("stream"), count("device")) == (stream, device)
    launch.launch = compare
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """The folder of the driver"""
    folder = tmp_path_factory.mktemp("stub")
    source = Path(__file__).with_name("libcuda.c")
    command = ["cc", "-D_GNU_SOURCE", "-shared", "-fPIC", source, "-ldl"]
    subprocess.run([*command, "-o", folder / "libcuda.so.1"], check=True)
    return folder


@pytest.fixture
def ask(stub):
    def run(*scripts):
        script = "".join(map(textwrap.dedent, (PRELUDE, *scripts)))
        environment = {**os.environ, "LD_LIBRARY_PATH": str(stub)}
        result = run_command([sys.executable, "-c", script], env=environment)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def test_what_reaches_the_driver(ask):
    script = """
    for dtype in ("f4", "f8", "f2"):
        x, y, g = (Array(1000, dtype=dtype) for _ in "123")
        for _ in "12":
            F.relu(x, out=y)
        F.leaky_relu(x, 0.1, out=y)
        F.threshold(x, 0.5, -2.0, inplace=True)
        F.relu_backward(g, x, out=y)
        F.leaky_relu_backward(g, x, 0.1, inplace=True)
        F.relu(Array(50, dtype=dtype, step=3), out=Array(50, dtype=dtype, step=2))
        image, result = (Array(4, 6, 10, dtype=dtype) for _ in "12")
        weight, total = (Array(6, dtype=dtype) for _ in "12")
        F.prelu(image, weight, out=result)
        F.prelu_backward(image, image, weight, out=(result, total))
        F.prelu(Array(40, 6, dtype=dtype), weight, axis=-1, inplace=True)
    print(count("launches") >= 33, count("taken"))
    """
    assert ask(COMPARED, script) == "True 0\n"


def test_what_compiled_calls_launch(ask):
    """What Python launched for the same arguments, byte by byte"""
    script = """
    import sys
    sys.path.insert(0, %r)
    import functools, cuda.core, gpu

    class Machine:
        stream, device = 7, 0
        def array(self, a):
            return gpu.ndarray(a)
        empty = staticmethod(functools.cache(np.empty))  # each time the same

    sys.modules["cupy"] = gpu.module(Machine())
    cuda.core.Device(0).set_current()
    in_python = 0
    def counted(*arguments):
        global in_python
        in_python += 1
        compare(*arguments)
    launch.launch = counted
    for dtype in ("f4", "f8", "f2"):
        x, y, g = (gpu.ndarray(np.zeros((6, 64), dtype)) for _ in "123")
        image, result = (gpu.ndarray(np.zeros((4, 6, 16), dtype)) for _ in "12")
        weight, total = (gpu.ndarray(np.zeros(6, dtype)) for _ in "12")
        bits = F.Mask(gpu.ndarray(np.zeros(48, "u1")), (6, 64))
        for call in (
            lambda: F.relu(x, inplace=True),
            lambda: F.leaky_relu(x, 0.1, out=y),
            lambda: F.threshold(x, 0.5, -2.0, out=y),
            lambda: F.leaky_relu_backward(g, x, 0.1, out=y),
            lambda: F.leaky_relu_backward(g, bits, 0.1, out=y),
            lambda: F.prelu(image, weight, out=result),
            lambda: F.prelu_backward(image, image, weight, out=(result, total)),
        ):
            before = in_python
            call()
            launches = in_python - before
            call()
            before, expected = (in_python, count("launches")), bytes(found)
            told = [count(name) for name in ("grid", "block", "stream", "device")]
            found[:] = [0] * 256
            call()
            assert in_python == before[0]
            assert count("launches") == before[1] + launches
            assert bytes(found) == expected
            names = "grid", "block", "stream", "device"
            assert [count(name) for name in names] == told
    word("fails", ctypes.c_char * 64).value = b"cuLaunchKernel"
    word("error", ctypes.c_int).value = 719
    F.relu(x, inplace=True)
    assert in_python == before[0] + 1
    print(in_python)
    """
    assert int(ask(COMPARED, script % str(Path(__file__).parent))) >= 19


def test_streams_and_devices(ask):
    """Each stream waits for the other's, and what was current is so afterwards."""
    script = """
    F.relu(x, out=y)
    assert count("waits") == 0
    y.stream = 9
    F.relu(x, out=y)
    assert count("waits") == 2
    a, b = Array(1000), Array(1000)
    a.device = b.device = 1
    F.relu(a, out=b)
    current = ctypes.c_void_p()
    stub.cuCtxGetCurrent(ctypes.byref(current))
    print(count("device"), current.value)
    try:
        F.relu(x, out=b)
    except ValueError as error:
        print(error)
    """
    number, message = ask(COMPARED, script).splitlines()
    assert number == "1 None"
    assert "device" in message


@pytest.mark.parametrize(
    ("name", "error", "call", "told"),
    [
        ("cuInit", 100, "F.relu(x, out=y)", "no CUDA-capable devices"),
        ("cuLibraryLoadData", 209, "F.relu(x, out=y)", "CUDA_ERROR_STUB"),
        ("cuLaunchKernelEx", 719, "F.relu(x, out=y)", "CUDA_ERROR_STUB"),
        ("cuMemAllocFromPoolAsync", 2, "both()", "CUDA_ERROR_STUB|allocate memory"),
        ("cuDevicePrimaryCtxRetain", 2, "F.relu(x, out=y)", "CUDA"),
    ],
)
def test_a_driver_that_fails(ask, name, error, call, told):
    """Its error is told as it is, and the next call finds everything in its place."""
    script = f"""
    word("fails", ctypes.c_char * 64).value = b"{name}"
    word("error", ctypes.c_int).value = {error}
    try:
        {call}
    except Exception as raised:
        print(type(raised).__name__, raised)
    word("fails", ctypes.c_char * 64).value = b""
    {call}
    print(count("launches") > 0, count("taken"))
    """
    *message, last = ask(script).splitlines()
    assert re.search(told, "\n".join(message))
    assert "AttributeError" not in message[0]
    assert last == "True 0"


def test_memory_while_a_graph_is_captured(ask):
    """Only pools of libraries lend any; what needs none can be captured."""
    script = """
    both()
    word("capturing", ctypes.c_int).value = 1
    F.relu(x, out=y)
    try:
        both()
    except RuntimeError as error:
        print(error)
    """
    assert "capturing" in ask(script)
