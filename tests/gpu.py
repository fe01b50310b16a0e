"""A machine with GPUs, all in the host's memory, and libraries of arrays for it.

`fastrelu` sees arrays of a library named cupy, or torch, or Numba's, and its kernels
run in the emulator of ptx.py, or in Numba's simulator where that is switched on.
"""

import contextlib
import ctypes
import functools
import sys
import types

import numpy as np
import ptx
from conftest import Library

from fastrelu import _dispatch
from fastrelu.cuda import launch

CAPABILITY = 9, 0


class ndarray:
    """What CuPy shows of an array"""

    __module__ = "cupy"

    def __init__(self, host, device=0):
        self.host = host
        self.data = types.SimpleNamespace(ptr=host.ctypes.data, device_id=device)
        self.shape, self.strides, self.dtype = host.shape, host.strides, host.dtype
        self.itemsize, self.flags = host.itemsize, host.flags

    def __dlpack_device__(self):
        return 2, self.data.device_id

    @property
    def _c_contiguous(self):
        return self.flags.c_contiguous

    @property
    def __cuda_array_interface__(self):
        return {**self.host.__array_interface__, "stream": 1}

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __getitem__(self, key):
        return ndarray(self.host[key], self.data.device_id)

    def view(self, dtype):
        return ndarray(self.host.view(dtype), self.data.device_id)

    def reshape(self, shape):
        return ndarray(self.host.reshape(shape), self.data.device_id)

    def transpose(self, axes):
        return ndarray(self.host.transpose(axes), self.data.device_id)


class Drawn(ndarray):
    """Random numbers, with what CuPy's arrays can do to make others of them"""

    def __init__(self, machine, host):
        super().__init__(host)
        self.machine = machine

    def __imul__(self, number):
        self.host *= number
        return self

    def __iadd__(self, number):
        self.host += number
        return self

    def astype(self, dtype, copy):
        return self.machine.array(self.host.astype(dtype, copy=copy))


def draw(machine, shape, dtype):
    return Drawn(machine, np.random.default_rng(0).random(shape, dtype))


def module(machine):
    cupy = types.ModuleType("cupy")
    cupy.ndarray = ndarray
    cupy.empty_like = lambda x: machine.array(np.empty_like(x.host))
    cupy.empty = lambda shape, dtype: machine.array(np.empty(shape, dtype))
    cupy.unpackbits = lambda x, bitorder: ndarray(
        np.unpackbits(x.host, bitorder=bitorder)
    )
    cupy.random = types.SimpleNamespace(Generator=np.random.Generator)
    cupy.random.random = functools.partial(draw, machine)
    stream = types.SimpleNamespace(ptr=machine.stream)
    cupy.cuda = types.SimpleNamespace(get_current_stream=lambda device: stream)
    return cupy


class Dtype:
    """What PyTorch shows of a dtype"""

    def __init__(self, dtype):
        self.name, self.itemsize = dtype.name, dtype.itemsize

    def __str__(self):
        return f"torch.{self.name}"

    def __eq__(self, other):
        return str(self) == str(other)

    def __hash__(self):
        return hash(self.name)


class Tensor:
    """What PyTorch shows of a tensor"""

    __module__ = "torch"
    layout, is_cuda, device = "strided", True, "cuda:0"

    def __init__(self, host, requires_grad=False):
        self.host, self.requires_grad = host, requires_grad
        self.shape, self.dtype = host.shape, Dtype(host.dtype)
        self.data_ptr, self.is_neg = lambda: host.ctypes.data, lambda: False
        self.element_size, self.get_device = lambda: host.itemsize, lambda: 0
        self.is_contiguous = lambda: host.flags.c_contiguous

    def __dlpack_device__(self):
        return 2, 0

    def stride(self):
        return tuple(s // self.host.itemsize for s in self.host.strides)


def torch_module(machine):
    library = types.ModuleType("torch")
    library.Tensor, library.strided, library.uint8 = Tensor, "strided", "uint8"
    library.empty_like = lambda x: Tensor(machine.own(np.empty_like(x.host)))
    library.empty = lambda n, dtype, device: Tensor(machine.own(np.empty(n, dtype)))
    streams = {0: 11}
    library._C = types.SimpleNamespace(_cuda_getCurrentRawStream=streams.get)
    return library


def numba_array(machine, host):
    """What Numba's cuda.to_device returns; `host` is kept beside it"""
    if launch.SIMULATED:
        from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

        array = FakeCUDAArray(host)
    else:
        from numba.cuda.cudadrv.devicearray import DeviceNDArray

        address = ctypes.c_size_t(machine.own(host).ctypes.data)
        data = types.SimpleNamespace(device_ctypes_pointer=address)
        array = DeviceNDArray(host.shape, host.strides, host.dtype, gpu_data=data)
    array.host = host
    return array


class Machine:
    """What happened on it: launches, waits, switches, and memory that was lent"""

    stream, device = 7, 0
    only = range  # which blocks of a launch are run, from their number

    def __init__(self):
        self.memory, self.launches, self.waits, self.lent = ptx.Memory(), [], [], []
        self.switches = []

    def own(self, a):
        """Let kernels touch an array's memory"""
        self.memory.add(a)
        return a

    def array(self, host):
        """An array of CuPy's on the current device"""
        return ndarray(self.own(host), self.device)

    def launch(self, kernel, device, stream, blocks, *arguments):
        self.launches.append((kernel, device, stream, blocks, *arguments))
        which = self.only(blocks)
        if launch.SIMULATED and which:
            simulate(kernel, device, stream, blocks, *arguments)
        elif which:
            program, size = compiled(kernel), (blocks, launch.THREADS)
            program.run(*size, arguments, self.memory, which)

    @contextlib.contextmanager
    def on(self, device):
        before, self.device = self.device, device
        self.switches.append(device)
        yield
        self.device = before

    def wait(self, stream, other):
        self.waits.append((stream, other))

    def scratch(self, size, stream, device):
        memory = Scratch(self, size)
        self.lent.append(memory)
        return memory


class Scratch:
    def __init__(self, machine, size):
        self.bytes = machine.own(np.full(size, 0xCB, np.uint8))
        self.handle, self.open = self.bytes.ctypes.data, True

    def close(self, stream):
        self.open = False


simulate = launch.launch


@functools.cache
def compiled(kernel):
    return ptx.Program(launch.compile_ptx(kernel, CAPABILITY)[0])


@contextlib.contextmanager
def machine(monkeypatch):
    """Put the machine in the driver's place"""
    made = Machine()
    monkeypatch.setattr(launch, "launch", made.launch)
    monkeypatch.setattr(launch, "is_current", lambda device: device == made.device)
    monkeypatch.setattr(launch, "current", made.on)
    monkeypatch.setattr(launch, "scratch", made.scratch)
    monkeypatch.setattr(launch, "wait", made.wait)
    monkeypatch.setattr(launch, "stream_of", lambda handle: handle)
    monkeypatch.setattr(launch, "device_of", lambda pointer: 0)
    monkeypatch.setitem(sys.modules, "cupy", module(made))
    _dispatch._ON_GPU.add(ndarray)  # the short way is open from the first call on
    monkeypatch.setitem(sys.modules, "torch", torch_module(made))
    yield made
    assert not any(memory.open for memory in made.lent)


def library(machine):
    """A library for the tests that are written for any"""

    def put(a):
        base = a
        while base.base is not None and isinstance(base.base, np.ndarray):
            base = base.base
        machine.own(base)
        return ndarray(a)

    return Library(put, lambda a: a.host, ndarray)
