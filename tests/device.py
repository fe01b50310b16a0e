"""More of CuPy on the machine of gpu.py: what networks and benchmarks ask of it.

Every function and operator refuses arrays of the host.  `asarray` is the only way in;
what leads out, `get`, `item` and `tolist`, waits for the device and is counted.
"""

import contextlib
import functools
import importlib.machinery
import itertools
import re
import threading
import time
import types

import gpu
import numpy as np

FUNCTIONS = (
    *("empty", "empty_like", "zeros", "zeros_like", "ones", "full", "arange"),
    *("stack", "where", "sum", "exp", "log", "maximum", "multiply", "matmul"),
    *("array_split", "tile", "unpackbits"),
)
METHODS = (
    *("all", "any", "argmax", "astype", "copy", "fill", "max", "mean", "min"),
    *("repeat", "sum"),
)


class ndarray(gpu.ndarray, np.lib.mixins.NDArrayOperatorsMixin):
    __module__ = "cupy"

    def __init__(self, shape, dtype=0, memptr=None, strides=None):
        host, device = shape, dtype
        if memptr is not None:
            place = memptr.ptr - memptr.memory.ctypes.data
            host = np.ndarray(shape, dtype, memptr.memory, place, strides)
        elif isinstance(shape, tuple):
            host = self.machine.empty(shape, dtype)
        if host is not shape:
            device = self.machine.device
        super().__init__(host, device)
        self.ndim = host.ndim
        memory = root(host)
        self.data = Pointer(memory, host.ctypes.data, device)
        self.device = types.SimpleNamespace(id=device)
        self.machine.own(memory)

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        return run(getattr(ufunc, method), *inputs, **options)

    def __array_function__(self, function, kinds, inputs, options):
        return run(function, *inputs, **options)

    def __getattr__(self, name):
        if name not in METHODS:
            raise AttributeError(name)
        return functools.partial(run, getattr(self.host, name))

    @property
    def T(self):
        return ndarray(self.host.T, self.device.id)

    def __getitem__(self, key):
        return run(self.host.__getitem__, self.wrapped(key))

    def __setitem__(self, key, value):
        run(self.host.__setitem__, self.wrapped(key), value)

    def wrapped(self, key):
        """What CuPy makes of indices beyond the end"""
        keys = zip(key, self.shape, strict=True) if isinstance(key, tuple) else ()
        return tuple(k % n if isinstance(k, ndarray) else k for k, n in keys) or key

    def __len__(self):
        return len(self.host)

    def view(self, dtype):
        return run(self.host.view, dtype)

    def reshape(self, *shape):
        return run(self.host.reshape, *shape)

    def transpose(self, axes):
        return run(self.host.transpose, axes)

    def item(self):
        self.machine.synchronised += 1
        return self.host.item()

    def tolist(self):
        self.machine.synchronised += 1
        return self.host.tolist()

    def get(self):
        self.machine.synchronised += 1
        return self.host.copy()

    def __bool__(self):
        return bool(self.item())

    def __int__(self):
        return int(self.item())


class Pointer:
    def __init__(self, memory, ptr, device_id):
        self.memory, self.ptr, self.device_id = memory, ptr, device_id

    def __add__(self, distance):
        return Pointer(self.memory, self.ptr + distance, self.device_id)


def root(host):
    while isinstance(host.base, np.ndarray):
        host = host.base
    return host


def run(function, *inputs, **options):
    """Call NumPy's function on what lies on the device"""
    options_ = {name: on_host(value) for name, value in options.items()}
    result = function(*map(on_host, inputs), **options_)
    out = options.get("out")
    if out is not None:
        return out[0] if isinstance(out, tuple) else out
    return on_device(result)


def on_host(value):
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, (tuple, list)):
        return type(value)(map(on_host, value))
    return value.host if isinstance(value, gpu.ndarray) else value


def on_device(result):
    if isinstance(result, (np.ndarray, np.generic)):
        return ndarray(np.asarray(result))
    return list(map(on_device, result)) if isinstance(result, list) else result


class ElementwiseKernel:
    """Knows operations with one question in them"""

    def __init__(self, inputs, outputs, operation, name):
        self.names = re.findall(r"T (\w+)", inputs)
        self.parts = re.fullmatch(r"y = (.*) \? (.*) : (.*)", operation).groups()

    def __call__(self, *arrays):
        inputs = list(map(on_host, arrays))
        names = dict(zip(self.names, inputs, strict=False))
        names["T"] = lambda a: np.asarray(a).astype(inputs[0].dtype)
        result = np.where(*(eval(part, names) for part in self.parts))
        if len(arrays) == len(self.names):
            return on_device(result)
        arrays[-1].host[...] = result
        return arrays[-1]


class Event:
    def record(self, stream=None):
        self.at = time.perf_counter()

    def synchronize(self):
        ndarray.machine.synchronised += 1


class Stream:
    """Makes itself the current one; what is captured waits to be launched"""

    handles = itertools.count(100)
    current = threading.local()

    def __init__(self, ptr=None, *, non_blocking=True):
        self.ptr = self.cuda_stream = next(self.handles) if ptr is None else ptr

    def __enter__(self):
        self.before = now()
        self.current.stream = self
        return self

    def __exit__(self, *_):
        self.current.stream = self.before

    def synchronize(self):
        ndarray.machine.synchronised += 1

    def begin_capture(self):
        ndarray.machine.captured[self.ptr] = []

    def end_capture(self):
        launches = ndarray.machine.captured.pop(self.ptr)

        def launch(stream=None):
            for launch in launches:
                ndarray.machine.launch(*launch)

        return types.SimpleNamespace(launch=launch)


def now(device=0):
    default = Stream(gpu.Machine.stream)
    return getattr(Stream.current, "stream", default)


class Machine(gpu.Machine):
    """Counts what waits for it and what comes from the host, and captures launches"""

    def __init__(self):
        super().__init__()
        self.synchronised = self.transferred = 0
        self.captured, self.kept = {}, []
        self.lock = threading.RLock()

    def own(self, a):
        with self.lock:
            start, end = np.lib.array_utils.byte_bounds(a)
            for other in [*self.memory.arrays]:  # what lay there before is gone
                first, last = other.ctypes.data, other.ctypes.data + other.size
                if first < end and start < last and (first, last) != (start, end):
                    place = self.memory.starts.index(first)
                    del self.memory.starts[place], self.memory.arrays[place]
            if self.captured:
                self.kept.append(a)  # a graph's memory stays its own
            return super().own(a)

    def launch(self, kernel, device, stream, blocks, *arguments):
        with self.lock:
            if stream in self.captured:
                call = kernel, device, stream, blocks, *arguments
                self.captured[stream].append(call)
            else:
                super().launch(kernel, device, stream, blocks, *arguments)


plain_module = gpu.module


def module(machine):
    ndarray.machine = machine
    cupy = plain_module(machine)
    cupy.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    cupy.__version__ = "0.0"
    cupy.ndarray, cupy.ElementwiseKernel = ndarray, ElementwiseKernel
    for name in FUNCTIONS:
        setattr(cupy, name, functools.partial(run, getattr(np, name)))

    def asarray(a, dtype=None):
        if isinstance(a, ndarray):
            return a if dtype in (None, a.dtype) else a.astype(dtype)
        machine.transferred += 1
        return ndarray(np.array(a, dtype))

    def properties(device):
        return {"name": b"a GPU that is none", "major": 9, "minor": 0}

    def alloc(nbytes):
        memory = machine.empty(nbytes, np.uint8)
        return Pointer(memory, memory.ctypes.data, machine.device)

    pool = types.SimpleNamespace(free_all_blocks=lambda: None)
    cupy.get_default_memory_pool = lambda: pool
    cupy.asarray = asarray
    cupy.cuda.Device = lambda: types.SimpleNamespace(id=0)
    cupy.cuda.alloc = alloc
    cupy.cuda.Event, cupy.cuda.Stream = Event, Stream
    cupy.cuda.get_current_stream = now
    cupy.cuda.get_elapsed_time = lambda a, b: (b.at - a.at) * 1e3
    cupy.cuda.runtime = types.SimpleNamespace(getDeviceProperties=properties)
    return cupy


@contextlib.contextmanager
def machine(monkeypatch):
    """Put the machine in the driver's place, and this module in CuPy's"""
    monkeypatch.setattr(gpu, "Machine", Machine)
    monkeypatch.setattr(gpu, "module", module)
    with gpu.machine(monkeypatch) as made:
        yield made
