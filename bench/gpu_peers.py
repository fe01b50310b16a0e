"""The peers of fastrelu/cli/peers/ on a GPU, in one process, on the same arrays."""

import importlib.util
import math
import os
import statistics
import time
from functools import partial

import numpy as np
from gpu_device import CuPy, PyTorch, version

from fastrelu.cli.peers import base, cases, libraries
from fastrelu.cli.peers.base import Unsupported
from fastrelu.cli.peers.cases import BLOCK, block
from fastrelu.cli.peers.team import Result
from fastrelu.cli.peers.worker import SLOPE, check

SAMPLES = 5  # in a turn
LAUNCHES = 100  # in a sample at most: what queues of drivers hold, with room
SAMPLE = 5e-4  # seconds that a sample should last at least
CALLS = 200  # of which the host's time is taken
FLOATS = ("float16", "float32", "float64")


class Data(cases.Data):
    """The arrays of a case on the device."""

    def __init__(self, library, case, slope):
        self.library = library
        super().__init__(case, slope)

    def normal(self, shape, dtype, seed):
        return self.put(block(math.prod(shape), seed).astype(dtype), shape)

    def put(self, a, shape=None):
        """Return a copy on the device, or of this shape what repeats it."""
        memory = self.library.upload(a.reshape(-1).view(np.uint8))
        shape = a.shape if shape is None else shape
        memory = self.library.tile(memory, math.prod(shape) // a.size)
        strides = [a.itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return self.library.view(memory, 0, shape, strides, a.dtype)

    def get(self, array):
        return self.library.get(array)

    def empty_like(self, array):
        return self.library.empty_like(array)


class Peer(base.Peer):
    """A library on a GPU.

    Parameters
    ----------
    library : CuPy or PyTorch
        Whose arrays the cases are made of.
    """

    from_host = False  # is a call timed by the host's clock, until the device is done?

    def __init__(self, library):
        self.library = library

    def data(self, case, slope):
        return Data(self.library, case, slope)

    def array(self, case, result):
        for library in (self.library, self.own):
            if library.owns(result):
                return library.get(result)
        return np.asarray(result)

    @property
    def version(self):
        return version(self.modules[0])

    @property
    def own(self):
        """The library that this peer's arrays are of."""
        return self.library


class FastRelu(Peer, libraries.FastRelu):
    def array(self, case, result):
        return Peer.array(self, case, libraries.FastRelu.array(self, case, result))


class FastReluCuPy(FastRelu):
    name = "fastrelu on CuPy"


class FastReluTorch(FastRelu):
    name = "fastrelu on PyTorch"


class Torch(Peer, libraries.Torch):
    """PyTorch as it comes."""

    def __init__(self, library):
        self.library, self.torch = library, PyTorch()

    @property
    def own(self):
        return self.torch

    def tensor(self, case, array):
        return self.torch.take(array).detach()  # autograd's marks stay off the others'

    def array(self, case, result):
        if self.torch.owns(result):
            return libraries.Torch.array(self, case, result.detach().cpu())
        return Peer.array(self, case, result)


class OnCuPy(Peer):
    modules = ("cupy",)
    dtypes = FLOATS

    def __init__(self, library):
        self.library, self.cupy = library, CuPy()

    @property
    def own(self):
        return self.cupy


class Kernel(OnCuPy):
    """A kernel of CuPy's for each formula; PReLU's second gradient is its sum."""

    name = "cupy"

    def call(self, case, data):
        cupy, take, row = self.cupy.module, self.cupy.take, case.row
        x, slope = take(data.x), data.slope
        if data.w is not None:
            slope = take(slope)
        elif row.activation == "leaky_relu":
            slope = x.dtype.type(slope)
        other = "T(0)" if row.activation == "relu" else "T(s * {})"
        forward = cupy.ElementwiseKernel(
            "T x, T s", "T y", f"y = x > T(0) ? x : {other.format('x')}", "forward"
        )
        backward = cupy.ElementwiseKernel(
            "T g, T x, T s",
            "T y",
            f"y = x > T(0) ? g : {other.format('g')}",
            "backward",
        )
        slope = x.dtype.type(0) if row.activation == "relu" else slope
        to = () if data.target is None else (take(data.target),)
        if row.passes == "forward":
            return partial(forward, x, slope, *to)
        g = take(data.g)
        if data.w is None:
            return partial(backward, g, x, slope, *to)

        def both():
            sums = cupy.where(x > 0, 0, x * g).sum(data.others)
            return backward(g, x, slope, *to), sums.reshape(data.w.shape)

        if row.passes == "backward":
            return both
        return lambda: (forward(x, slope), both())


class Maximum(OnCuPy):
    """The function that most write."""

    name = "cupy.maximum"
    activations = ("relu",)
    passes = ("forward",)

    def call(self, case, data):
        to = () if data.target is None else (self.cupy.take(data.target),)
        return partial(self.cupy.module.maximum, self.cupy.take(data.x), 0, *to)


class Triton(Torch):
    """Kernels as its tutorials write them: see gpu_triton.py."""

    name = "triton"
    modules = ("triton", "torch")
    activations, arguments = base.Peer.activations, base.Peer.arguments

    @classmethod
    def lacks(cls, case):
        if case.row.activation == "prelu" and case.row.passes != "forward":
            return "triton has no kernel for both gradients"
        return super(libraries.Torch, cls).lacks(case)  # it knows more than PyTorch

    def array(self, case, result):
        return Peer.array(self, case, result)

    def call(self, case, data):
        import gpu_triton

        take, row = self.torch.take, case.row
        x, g, w, target = (
            None if a is None else take(a)
            for a in (data.x, data.g, data.w, data.target)
        )
        inner = 1
        if w is not None and w.numel() > 1:
            inner = math.prod(case.shape[data.axis :][1:]) if data.axis >= 0 else 1
        slope = 0.0 if row.activation == "relu" else data.slope
        return partial(gpu_triton.call, x, g, w, target, slope, inner)


class Jax(Peer):
    """Compiled by XLA, which only makes new arrays."""

    name = "jax"
    modules = ("jax",)
    modes = ("fresh",)
    from_host = True
    backend = "gpu"
    smallest = 1 << 24  # below, the clock would show how XLA starts its kernels

    @classmethod
    def lacks(cls, case):
        if case.row.activation == "prelu" and case.row.passes != "forward":
            return "jax has no function for both gradients"
        if case.n < cls.smallest:
            return "jax's streams cannot be timed, and its calls take longer than this"
        return super().lacks(case)

    def call(self, case, data):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax
        import jax.numpy as jnp

        if jax.default_backend() != self.backend:
            msg = "jax sees no GPU"
            raise Unsupported(msg)
        if case.dtype == "float64":
            msg = "jax has float64 only by a setting of the whole process"
            raise Unsupported(msg)
        x, g, w = (
            None if a is None else jax.dlpack.from_dlpack(a)
            for a in (data.x, data.g, data.slope if data.w is not None else None)
        )
        number = 0.0 if case.row.activation == "relu" else data.slope
        slope = w if w is not None else jnp.asarray(number, x.dtype)

        @jax.jit
        def forward(x, slope):
            return jnp.where(x > 0, x, slope * x)

        @jax.jit
        def backward(g, x, slope):
            return jnp.where(x > 0, g, slope * g)

        if case.row.activation == "relu" and case.row.passes == "forward":
            return partial(jax.jit(jax.nn.relu), x)
        if case.row.passes == "forward":
            return partial(forward, x, slope)
        return partial(backward, g, x, slope)


PEERS = {peer.name: peer for peer in (FastRelu, Torch, Kernel, Maximum, Triton, Jax)}


def missing(peer):
    """Say what is not installed, or nothing."""
    for module in peer.modules:
        if not is_there(module):
            return f"{module} is not installed"
    return ""


def is_there(module):
    return importlib.util.find_spec(module) is not None


class Stopwatch:
    """The time of a call's kernels, between two events.

    While the launches are queued a kernel holds the device up, so that what it then
    does, one launch after another, has not waited for the host.
    """

    def __init__(self, device, call, *, from_host=False):
        self.device, self.call, self.from_host = device, call, from_host
        self.number, self.ahead = 1, 0.0
        self.sample()
        of_call = max(min(self.sample() for _ in "123"), 1e-7)  # one may come late
        self.number = min(LAUNCHES, max(1, round(SAMPLE / of_call)))
        start = time.perf_counter()
        for _ in range(self.number):
            call()
        host = time.perf_counter() - start
        device.synchronize()
        if of_call * self.number < 4 * host:
            self.ahead = min(0.1, 1.5 * host)

    def sample(self):
        """Return the seconds of a call."""
        if self.from_host:
            self.device.synchronize()
            start = time.perf_counter()
            for _ in range(self.number):
                result = self.call()
            result.block_until_ready()
            return (time.perf_counter() - start) / self.number
        if self.ahead:
            self.device.hold(0, self.ahead)
        start = self.device.record()
        for _ in range(self.number):
            self.call()
        return self.device.seconds(start, self.device.record()) / self.number

    def turn(self):
        self.sample()
        return [self.sample() for _ in range(SAMPLES)]


def start(device, peer, case, data):
    """Return a stopwatch for a case, if the peer does it right."""
    check(peer, case)
    call = peer.call(case, data)
    result = call()
    if isinstance(peer, FastRelu):
        check_all(case, data, result)
    del result
    return Stopwatch(device, call, from_host=peer.from_host)


def check_all(case, data, result):
    """The numbers of a large array repeat, and so must the results."""
    y = result[0] if isinstance(result, tuple) else result
    y = y if data.target is None else data.target
    size = math.prod(case.shape)
    if size <= BLOCK or case.row.passes == "both":
        return
    bits = data.library.bits(y).reshape(-1, BLOCK)
    assert bool((bits == bits[:1]).all()), "far elements differ from near ones"


def measure(device, peers, case, limit, turns):
    """Return the result of each peer for a case, in turn; peers by their names."""
    results = {name: Result(case, name) for name in peers}
    watches, kept = {}, None
    for name, peer in peers.items():
        result = results[name]
        result.cannot = peer.lacks(case)
        if result.cannot:
            continue
        result.version = peer.version
        try:
            if needed(case) > device.free and kept is None:
                msg = f"{case.name} needs {needed(case) / 2**30:.0f} GiB"
                raise Unsupported(msg)
            # Products in place, again and again, would end in subnormals.
            slope = 1.0 if case.mode == "inplace" else SLOPE
            kept = kept or peer.data(case, slope)
            watches[name] = start(device, peer, case, kept)
        except Unsupported as error:
            result.cannot = str(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told
            result.error = f"{type(error).__name__}: {error}".partition("\n")[0]
    for _ in range(turns):
        for name, watch in watches.items():
            results[name].seconds += watch.turn()
    if kept is not None and limit is None:
        limit = copy_limit(device, kept)
    return results, limit


def needed(case):
    """Return the bytes that a case takes, with a fresh result or two."""
    return int(case.bytes * 1.7)


def copy_limit(device, data):
    """Return the bytes that the device copies, in 10^9 a second, at this size."""
    source = data.x
    target = data.empty_like(source)
    a, b = map(data.library.address, (source, target))
    watch = Stopwatch(device, partial(device.copy, b, a, source.nbytes))
    seconds = statistics.median(watch.turn() + watch.turn())
    return 2 * source.nbytes / seconds / 1e9


def host_seconds(device, peer, case):
    """Return what a call takes on the host, while the device keeps up."""
    call = peer.call(case, peer.data(case, SLOPE))
    samples = []
    for _ in range(1 + SAMPLES):
        device.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        samples.append((time.perf_counter() - start) / CALLS)
    device.synchronize()
    return samples[1:]
