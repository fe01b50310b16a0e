"""A machine with GPUs, all in the host's memory, and a library of arrays for it.

`fastrelu` sees arrays of a library named cupy, and its kernels run in the emulator of
ptx.py, or in Numba's simulator where that is switched on.
"""

import contextlib
import functools
import sys
import types

import numpy as np
import ptx
from conftest import Library

from fastrelu.cuda import launch

CAPABILITY = 9, 0


class ndarray:
    """What CuPy shows of an array"""

    __module__ = "cupy"

    def __init__(self, host, device=0):
        self.host, self.device = host, types.SimpleNamespace(id=device)
        self.data = types.SimpleNamespace(ptr=host.ctypes.data)
        self.shape, self.strides, self.dtype = host.shape, host.strides, host.dtype
        self.itemsize = host.itemsize

    def __dlpack_device__(self):
        return 2, self.device.id

    @property
    def __cuda_array_interface__(self):
        return {**self.host.__array_interface__, "stream": 1}

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __getitem__(self, key):
        return ndarray(self.host[key], self.device.id)

    def view(self, dtype):
        return ndarray(self.host.view(dtype), self.device.id)

    def reshape(self, shape):
        return ndarray(self.host.reshape(shape), self.device.id)


def module(machine):
    cupy = types.ModuleType("cupy")
    cupy.ndarray = ndarray
    cupy.empty_like = lambda x: ndarray(machine.own(np.empty_like(x.host)), x.device.id)
    cupy.empty = lambda n, dtype: ndarray(machine.own(np.empty(n, dtype)))
    cupy.unpackbits = lambda x, bitorder: ndarray(
        np.unpackbits(x.host, bitorder=bitorder)
    )
    stream = types.SimpleNamespace(ptr=machine.stream)
    cupy.cuda = types.SimpleNamespace(get_current_stream=lambda: stream)
    return cupy


class Machine:
    """What happened on it: launches, waits, and memory that was lent"""

    stream = 7

    def __init__(self):
        self.memory, self.launches, self.waits, self.lent = ptx.Memory(), [], [], []

    def own(self, a):
        """Let kernels touch an array's memory"""
        self.memory.add(a)
        return a

    def launch(self, kernel, device, stream, blocks, *arguments):
        self.launches.append((kernel, device, stream, blocks))
        if launch.SIMULATED:
            simulate(kernel, device, stream, blocks, *arguments)
            return
        flat = []
        for argument in arguments:
            flat += argument if isinstance(argument, tuple) else (argument,)
        compiled(kernel).run(blocks, launch.THREADS, flat, self.memory)

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
    monkeypatch.setattr(launch, "current", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(launch, "scratch", made.scratch)
    monkeypatch.setattr(launch, "wait", made.wait)
    monkeypatch.setattr(launch, "stream_of", lambda handle: handle)
    monkeypatch.setattr(launch, "device_of", lambda pointer: 0)
    monkeypatch.setitem(sys.modules, "cupy", module(made))
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
