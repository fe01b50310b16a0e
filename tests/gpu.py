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
from twins import public_functions

from fastrelu import _dispatch
from fastrelu.cpu import jit
from fastrelu.cuda import launch

CAPABILITY = 9, 0
CONTEXTS, FAILED = 1 << 20, 719  # the first device's; CUDA_ERROR_LAUNCH_FAILED


class ndarray:
    """What CuPy shows of an array"""

    __module__ = "cupy"
    machine = None  # of the latest module: new arrays find their memory by it

    def __init__(self, host, device=0, memory=None, strides=None):
        """An array of the host's on a device, or a new one of a shape and a dtype"""
        if strides is not None:
            host, device = np.ndarray(host, device, memory, 0, strides), 0
        elif isinstance(host, tuple):
            host, device = self.machine.empty(host, device), self.machine.device
        self.host = host
        self.data = types.SimpleNamespace(ptr=host.ctypes.data, device_id=device)
        self.shape, self.strides, self.dtype = host.shape, host.strides, host.dtype
        self.itemsize, self.flags = host.itemsize, host.flags
        self.size, self.nbytes = host.size, host.nbytes

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
    cupy.ndarray, ndarray.machine = ndarray, machine
    cupy.empty_like = lambda x: machine.array(machine.empty_like(x.host))
    cupy.empty = lambda shape, dtype: machine.array(machine.empty(shape, dtype))
    cupy.unpackbits = lambda x, bitorder: ndarray(
        np.unpackbits(x.host, bitorder=bitorder)
    )
    cupy.random = types.SimpleNamespace(Generator=np.random.Generator)
    cupy.random.random = functools.partial(draw, machine)
    stream = types.SimpleNamespace(ptr=machine.stream)
    cupy.cuda = types.SimpleNamespace(get_current_stream=lambda device: stream)
    cupy.cuda.alloc = lambda nbytes: machine.empty(nbytes, "u1")
    return cupy


@functools.cache  # there is one of each
class Dtype:
    """What PyTorch shows of a dtype"""

    def __init__(self, dtype):
        self.name, self.itemsize = dtype.name, dtype.itemsize

    def __str__(self):
        return f"torch.{self.name}"


class Tensor:
    """What PyTorch shows of a tensor"""

    __module__ = "torch"
    layout, is_cuda, device = "strided", True, "cuda:0"
    is_nested, is_quantized, version = False, False, 0
    __torch_function__ = None

    def __init__(self, host, requires_grad=False):
        self.host, self.requires_grad = host, requires_grad
        self.shape, self.dtype = host.shape, Dtype(host.dtype)
        self.data_ptr, self.is_neg = lambda: host.ctypes.data, lambda: False
        self.element_size, self.get_device = lambda: host.itemsize, lambda: 0
        self.is_contiguous = lambda: host.flags.c_contiguous
        self.numel = lambda: host.size

    def __dlpack_device__(self):
        return 2, 0

    def count(self):
        self.version += 1

    def stride(self):
        return tuple(s // self.host.itemsize for s in self.host.strides)


def torch_module(machine):
    library = types.ModuleType("torch")
    library.Tensor, library.strided = Tensor, Tensor.layout
    library.uint8 = Dtype(np.dtype("u1"))
    library.empty_like = lambda x: Tensor(machine.empty_like(x.host))
    library.empty = lambda n, dtype, device: Tensor(machine.empty(n, dtype.name))
    streams = {0: 11}
    library._C = types.SimpleNamespace(
        _cuda_getCurrentRawStream=streams.get, _disabled_torch_function_impl=None
    )
    library.is_grad_enabled = lambda: True
    library.jit = types.SimpleNamespace(is_tracing=lambda: False)
    library.autograd = types.SimpleNamespace(
        forward_ad=types.SimpleNamespace(_current_level=-1),
        graph=types.SimpleNamespace(increment_version=Tensor.count),
    )
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

    stream, device, quick = 7, 0, 0  # and how many launches compiled code made
    capturing = False  # a graph is being made
    broken = ()  # functions of the driver
    only = range  # which blocks of a launch are run, from their number

    def __init__(self):
        self.memory, self.launches, self.waits, self.lent = ptx.Memory(), [], [], []
        self.switches = []

    def own(self, a):
        """Let kernels touch an array's memory"""
        self.memory.add(a)
        return a

    def empty(self, shape, dtype):
        """New memory"""
        return self.own(np.empty(shape, dtype))

    def empty_like(self, host):
        return self.own(np.empty_like(host))

    def array(self, host):
        """An array of CuPy's on the current device"""
        return ndarray(self.own(host), self.device)

    def launch(self, kernel, device, stream, blocks, *arguments):
        kernel.loaded[device] = Loaded(kernel)
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

    @functools.cached_property
    def functions(self):
        """The driver's functions that compiled code calls"""
        word, number, function = ctypes.c_void_p, ctypes.c_uint, ctypes.CFUNCTYPE
        return (
            function(ctypes.c_int, word, *(7 * [number]), *(3 * [word]))(self.queue),
            function(ctypes.c_int, word)(self.tell),
            function(ctypes.c_int, word, word)(self.tell_of_graph),
        )

    def queue(self, handle, *given):
        """What cuLaunchKernel does"""
        if "cuLaunchKernel" in self.broken:
            return FAILED
        blocks, *ones, stream, pointers, extra = given
        assert (*ones, extra) == (1, 1, launch.THREADS, 1, 1, 0, None)
        kernel, arguments = kernels[handle], []
        for k, type_ in enumerate(flat_types(kernel)):
            place = ctypes.c_void_p.from_address(pointers + 8 * k).value
            value = np.frombuffer(ctypes.string_at(place, type_.itemsize), type_)[0]
            arguments.append(value if value.dtype.kind == "f" else int(value))
        self.quick += 1
        try:
            self.launch(kernel, self.device, stream or 0, blocks, *arguments)
        except Exception:  # noqa: BLE001 - Python will meet it, too
            del self.launches[-1]
            return FAILED
        return 0

    def tell(self, place):
        """What cuCtxGetCurrent does"""
        if "cuCtxGetCurrent" in self.broken:
            return FAILED
        ctypes.c_void_p.from_address(place).value = CONTEXTS + self.device
        return 0

    def tell_of_graph(self, stream, place):
        """What cuStreamIsCapturing does"""
        if "cuStreamIsCapturing" in self.broken:
            return FAILED
        ctypes.c_int.from_address(place).value = self.capturing
        return 0


class Loaded:
    """A kernel's code on a device; its handle tells which"""

    def __init__(self, kernel):
        self.handle = id(kernel)
        kernels[self.handle] = kernel


kernels = {}  # by their handles


@functools.cache
def flat_types(kernel):
    """NumPy's types of a kernel's arguments, those of a tuple one by one"""
    flat = []
    for type_ in kernel.function(CAPABILITY)[1]:
        flat += type_ if hasattr(type_, "count") else [type_]
    names = [str(type_) for type_ in flat]
    return [np.dtype("u8" if name.endswith("*") else name) for name in names]


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
    monkeypatch.setattr(launch, "context_of", lambda device: CONTEXTS + device)
    monkeypatch.setattr(launch, "is_capturing", lambda stream: made.capturing)
    addresses = [ctypes.cast(f, ctypes.c_void_p).value for f in made.functions]
    monkeypatch.setattr(launch, "functions", lambda: addresses)
    jit.keep_for_ever(made.functions)  # tables have their addresses
    monkeypatch.setitem(sys.modules, "cupy", module(made))
    _dispatch._ON_GPU.add(ndarray)  # the short way is open from the first call on
    monkeypatch.setitem(sys.modules, "torch", torch_module(made))
    yield made
    forget()
    for kernel in kernels.values():
        kernel.loaded.clear()
    assert not any(memory.open for memory in made.lent)


def forget():
    """Have nothing known of any type of arrays, and no compiled code for them"""
    for function in public_functions():
        function.on_gpu.clear()
        function._chain()


def library(machine):
    """A library for the tests that are written for any"""

    def put(a):
        base = a
        while base.base is not None and isinstance(base.base, np.ndarray):
            base = base.base
        machine.own(base)
        return ndarray(a)

    return Library(put, lambda a: a.host, ndarray)
