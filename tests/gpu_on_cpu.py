"""Runs what bench/gpu.py starts on a GPU, on the machine of device.py instead.

PyTorch's tensors are the CPU's, which say that they are on a GPU; Triton interprets
its kernels.  Nothing but the hardware and the driver is left out.  What the environment
names in GPU_ON_CPU_WITHOUT is not there.
"""

import ctypes
import functools
import importlib.util
import os
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
BENCH = HERE.parent / "bench"
sys.path[:0] = [str(HERE), str(BENCH)]
os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
import device
import gpu
import ptx

from fastrelu.cuda import launch

WITHOUT = os.environ.get("GPU_ON_CPU_WITHOUT", "").split()


class Absent:
    """A finder that finds that modules are not there"""

    def find_spec(self, name, path=None, target=None):
        if name in WITHOUT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def is_there(name):
    return name not in WITHOUT and importlib.util.find_spec(name) is not None


class Device:
    """The driver's part"""

    free = 1 << 28

    def about(self):
        return "NVIDIA None, 0 GiB, driver 0.0"

    def hold(self, stream, seconds):
        assert 0 <= seconds < 1

    def record(self):
        return time.perf_counter()

    def seconds(self, start, end):
        return max(end - start, 1e-9)

    def copy(self, target, source, size):
        device.ndarray.machine.memory.find(np.array([target]), 1)
        ctypes.memmove(target, source, size)

    def synchronize(self):
        pass


def install():
    """Put everything in its place, for the rest of the process"""
    patch = pytest.MonkeyPatch()
    machine = device.machine(patch)
    install.kept = machine  # a generator that is collected ends
    before = sys.modules.get("torch")
    made = machine.__enter__()
    if sys.modules.get("torch") is not before:  # that is made up too: not here
        del sys.modules["torch"]
    gpu.compiled = compiled
    sys.meta_path.insert(0, Absent())
    if is_there("torch"):
        pretend(made)
    if is_there("jax"):
        import jax

        jax.dlpack.from_dlpack = lambda a: jax.numpy.asarray(device.on_host(a))
    return made


@functools.cache
def compiled(kernel):
    """Keep PTX beside the machine code that a GPU of this machine may have"""
    name = f"{kernel.digest(gpu.CAPABILITY)}.ptx"
    kept = launch._read(name)
    if kept is None:
        text, entry = launch.compile_ptx(kernel, gpu.CAPABILITY)
        kept = entry, text.encode()
        launch._write(name, *kept)
    return ptx.Program(kept[1].decode())


def pretend(machine):
    """Let PyTorch's tensors say that they are on a GPU, and lend their memory"""
    import torch

    data_ptr, numpy = torch.Tensor.data_ptr, torch.from_numpy

    def lent(tensor):
        memory = tensor.detach().untyped_storage()
        whole = (ctypes.c_ubyte * memory.nbytes()).from_address(memory.data_ptr())
        machine.own(np.asarray(whole)) if memory.nbytes() else None
        if machine.captured:
            machine.kept.append(tensor)
        return data_ptr(tensor)

    def from_dlpack(a):
        if a.dtype.name == "bfloat16":
            return numpy(a.host.view(np.int16)).view(torch.bfloat16)
        return numpy(a.host)

    class Graph:
        pass

    class Capture:
        def __init__(self, graph):
            self.graph = graph

        def __enter__(self):
            device.now().begin_capture()

        def __exit__(self, *_):
            self.graph.replay = device.now().end_capture().launch

    torch.Tensor.data_ptr = lent
    torch.Tensor.__dlpack_device__ = lambda tensor: (2, 0)
    torch.Tensor.get_device = lambda tensor: 0
    torch.Tensor.is_cuda = True
    torch._C._cuda_getCurrentRawStream = lambda device_: device.now().ptr
    torch.from_dlpack = from_dlpack
    torch.cuda = types.SimpleNamespace(
        Stream=device.Stream,
        stream=lambda stream: stream,
        current_stream=lambda device_=None: device.now(),
        CUDAGraph=Graph,
        empty_cache=lambda: None,
        graph=Capture,
    )


def main():
    install()
    import gpu_checks
    import gpu_device
    import gpu_peers
    import gpu_worker

    gpu_worker.configure(sys.argv[1:])
    gpu_device.PyTorch.device = "cpu"
    gpu_peers.Jax.backend, gpu_peers.Jax.smallest = "cpu", 0
    gpu_peers.is_there = is_there
    gpu_peers.CALLS = gpu_peers.LAUNCHES = gpu_peers.SAMPLES = 2
    gpu_checks.START = 'import gpu_on_cpu; gpu_on_cpu.install(); device = "cpu"\n'
    gpu_checks.SIZES = [0, 17]
    gpu_checks.HEADS = [1]
    gpu_checks.CHANNELS = {
        "rows": ((2, 3, 16), (3,), 1),
        "last": ((4, 3, 8), (8,), -1),
    }
    gpu_checks.RUNS = gpu_checks.ROUNDS = gpu_checks.THREADS = 2
    gpu_checks.LONG = 600
    for layout in ("fortran", "transposed", "offset"):
        del gpu_checks.LAYOUTS[layout]
    found = gpu_worker.libraries()
    gpu_worker.serve(gpu_worker.Worker(Device(), *found))


if __name__ == "__main__":
    main()
