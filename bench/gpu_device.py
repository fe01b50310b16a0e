"""What is asked of the GPU itself, and of the libraries that own arrays on it."""

import contextlib
import functools
import importlib.metadata
import shutil
import subprocess
import sys

import numpy as np

from fastrelu.cuda import launch

HOLD = """
extern "C" __global__ void hold(long long nanoseconds) {
    long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    while (now - start < nanoseconds);
}
"""


def ok(result):
    """Return what a call of the driver gave."""
    error, *values = result
    if error:
        msg = f"the CUDA driver says {error.name}"
        raise RuntimeError(msg)
    return values[0] if len(values) == 1 else values


class Device:
    """The first GPU.  Times are those of its legacy stream, where libraries start."""

    def __init__(self):
        from cuda import core
        from cuda.bindings import driver

        self.driver, self.device = driver, core.Device(0)
        self.device.set_current()

    @functools.cached_property
    def holding(self):
        from cuda import core

        options = core.ProgramOptions(std="c++17", arch=f"sm_{self.device.arch}")
        code = core.Program(HOLD, "c++", options).compile("cubin")
        return core.LaunchConfig(grid=1, block=1), code.get_kernel("hold")

    def hold(self, stream, seconds):
        """Keep a stream busy."""
        from cuda import core

        core.launch(launch.stream_of(stream), *self.holding, int(seconds * 1e9))

    def record(self):
        event = ok(self.driver.cuEventCreate(0))
        ok(self.driver.cuEventRecord(event, 0))
        return event

    def seconds(self, start, end):
        """Wait for the later event; return the seconds between the two."""
        ok(self.driver.cuEventSynchronize(end))
        milliseconds = ok(self.driver.cuEventElapsedTime(start, end))
        for event in (start, end):
            ok(self.driver.cuEventDestroy(event))
        return milliseconds / 1e3

    def copy(self, target, source, size):
        ok(self.driver.cuMemcpyDtoDAsync(target, source, size, 0))

    def synchronize(self):
        ok(self.driver.cuCtxSynchronize())

    @property
    def free(self):
        return ok(self.driver.cuMemGetInfo())[0]

    def about(self):
        """Return the GPU's name and the driver's version."""
        version = ok(self.driver.cuDriverGetVersion())
        found = f"CUDA {version // 1000}.{version % 1000 // 10}"
        if tool := shutil.which("nvidia-smi"):
            command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            found = f"{done.stdout.split()[0]}, {found}" if done.stdout else found
        total = ok(self.driver.cuMemGetInfo())[1]
        return f"{self.device.name}, {total / 2**30:.0f} GiB, driver {found}"


def version(package):
    """Return a package's version, whatever its distribution is called."""
    module = sys.modules.get(package)
    if hasattr(module, "__version__"):
        return module.__version__
    return importlib.metadata.version(package)


# Libraries ----------------------------------------------------------------------------


class CuPy:
    name = "cupy"
    any_layout = True

    def __init__(self):
        import cupy

        self.module = cupy

    def upload(self, memory):
        """Return bytes of the host on the device."""
        return self.module.asarray(memory)

    def view(self, memory, offset, shape, strides, dtype):
        """Return an array that lies in bytes on the device."""
        return self.module.ndarray(shape, dtype, memory.data + offset, strides)

    def address(self, array):
        return array.data.ptr

    def bits(self, array):
        """Return the elements as integers, which compare whatever the dtype."""
        return array.view(f"i{array.itemsize}")

    def get(self, array):
        return array.get()

    def empty_like(self, array):
        return self.module.empty_like(array)

    def tile(self, memory, times):
        return self.module.tile(memory, times)

    def take(self, array):
        """Return an array of any library as one of this."""
        return array if self.owns(array) else self.module.from_dlpack(array)

    def owns(self, array):
        return isinstance(array, self.module.ndarray)

    def release(self):
        """Give idle memory back to the device."""
        self.module.get_default_memory_pool().free_all_blocks()

    @contextlib.contextmanager
    def stream(self):
        """Make a new stream the current one; yield its handle."""
        stream = self.module.cuda.Stream(non_blocking=True)
        with stream:
            yield stream.ptr
        stream.synchronize()

    def capture(self, function):
        """Return what replays the work of a function on the current stream."""
        stream = self.module.cuda.get_current_stream()
        stream.begin_capture()
        function()
        graph = stream.end_capture()
        return functools.partial(graph.launch, stream)

    def fill(self, array, value):
        array.fill(value)

    def set(self, target, source):
        target[...] = source


class PyTorch:
    name = "torch"
    any_layout = False  # no negative strides, no elements at odd addresses
    device = "cuda"

    def __init__(self):
        import torch

        self.module = torch

    def upload(self, memory):
        return self.module.from_numpy(memory.copy()).to(self.device)

    def view(self, memory, offset, shape, strides, dtype):
        size = dtype.itemsize
        typed = memory.view(getattr(self.module, dtype.name))
        steps = [stride // size for stride in strides]
        return typed.as_strided(shape, steps, offset // size)

    def address(self, array):
        return array.data_ptr()

    def bits(self, array):
        return array.view(getattr(self.module, f"int{8 * array.element_size()}"))

    def get(self, array):
        array = array.detach().cpu()
        name = str(array.dtype).removeprefix("torch.")
        if name == "bfloat16":
            import ml_dtypes

            return array.view(self.module.int16).numpy().view(ml_dtypes.bfloat16)
        return array.numpy()

    def empty_like(self, array):
        return self.module.empty_like(array)

    def tile(self, memory, times):
        return memory.repeat(times)

    def take(self, array):
        return array if self.owns(array) else self.module.from_dlpack(array)

    def owns(self, array):
        return isinstance(array, self.module.Tensor)

    def release(self):
        self.module.cuda.empty_cache()

    @contextlib.contextmanager
    def stream(self):
        stream = self.module.cuda.Stream()
        with self.module.cuda.stream(stream):
            yield stream.cuda_stream
        stream.synchronize()

    def capture(self, function):
        graph = self.module.cuda.CUDAGraph()
        with self.module.cuda.graph(graph):
            function()
        return graph.replay

    def fill(self, array, value):
        array.fill_(value)

    def set(self, target, source):
        target.copy_(source)


LIBRARIES = {library.name: library for library in (CuPy, PyTorch)}


def put(library, a):
    """Return a copy of an array on the device, laid out as it is."""
    return Twin(library, a).array


class Twin:
    """An array of the host, and its copy on the device with all the memory around."""

    def __init__(self, library, host):
        self.library, self.host, self.memory = library, host, memory_of(host)
        # A GPU has no addresses for nothing.
        whole = self.memory if self.memory.size else np.zeros(16, np.uint8)
        self.bytes = library.upload(whole)
        self.offset = host.ctypes.data - self.memory.ctypes.data if host.size else 0
        self.array = library.view(
            self.bytes, self.offset, host.shape, host.strides, host.dtype
        )

    def memories(self):
        """Return all of the memory, on the device and on the host."""
        theirs, dtype = self.library.get(self.bytes), self.host.dtype
        first = self.offset % dtype.itemsize
        count = (self.memory.size - first) // dtype.itemsize
        whole = slice(first, first + count * dtype.itemsize)
        return theirs[whole].view(dtype), self.memory[whole].view(dtype)


def memory_of(a):
    """Return the memory that an array is a view of, as bytes."""
    while isinstance(a.base, np.ndarray):
        a = a.base
    order = sorted(range(a.ndim), key=lambda axis: -a.strides[axis])
    return a.transpose(order).reshape(-1).view(np.uint8)
