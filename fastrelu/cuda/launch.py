"""Compile a kernel, keep its code on the disk, and queue it on a stream.

Numba's own launcher takes 20 to 90 microseconds for arrays of other libraries, and its
disk cache never hits for kernels that are made by functions.  So the code is kept here,
by its content, and `cuda.core` launches it with bare addresses.
"""

import contextlib
import functools
import hashlib
import importlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from fastrelu._digest import digest, settings, sources, user_folder
from fastrelu._dispatch import HINT
from fastrelu._functions import bound  # with it kernels take in what a formula calls
from fastrelu.cpu.shield import shielded
from fastrelu.cuda.config import SIMULATED, THREADS

# Errors that another toolkit may not have: none, an old one, or one that is too new.
_NOT_FOR_THIS = "DynamicLibNotFoundError", "NvvmSupportError", "CCSupportError"
_PACKAGES = "numba-cuda", "cuda-core", "cuda-bindings"
SOURCES = sources(__package__)  # before anybody can change them


class Kernel:
    """A template and its options, compiled for each kind of device.

    To build it, which imports all that compiles, waits until its code is not at hand.
    """

    def __init__(
        self, build: Callable[..., Any], template: str, options: dict[str, Any]
    ) -> None:
        self.build, self.template, self.options = build, template, options
        self.loaded: dict[int, Any] = {}

    def function(self, capability: tuple[int, int]) -> tuple[Callable[..., Any], Any]:
        """Return what Numba compiles, and the types of its arguments."""
        made: tuple[Callable[..., Any], Any]
        made = self.build(self.template, self.options, capability)
        return made

    def digest(self, capability: tuple[int, int]) -> str | None:
        """Name all that the compiled code depends on; None if that cannot be known.

        The kernels themselves are not looked at, for they would have to be built.  They
        are made of the sources and the options alone.
        """
        made_of = self.template, tuple(sorted(self.options.items())), capability
        around = THREADS, SIMULATED, settings(), _versions(), SOURCES, bound
        return digest(*made_of, *around) if SOURCES else None


@functools.cache
def _versions() -> str:
    return " ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)


@shielded
def compile_ptx(kernel: Kernel, capability: tuple[int, int]) -> tuple[str, str]:
    """Return a kernel's PTX and the name of its entry; this needs no GPU."""
    from numba import cuda

    function, signature = kernel.function(capability)
    ptx = cuda.compile_ptx(function, signature, cc=capability)[0]
    match = re.search(r"\.visible \.entry (\w+)", ptx)
    assert match is not None
    return ptx, match.group(1)


def link(ptx: str, capability: tuple[int, int]) -> bytes:
    """Return the machine code of a PTX text; this needs no GPU either.

    Drivers take machine code of their CUDA's later releases, but not their PTX.
    """
    from cuda.core import Linker, LinkerOptions, ObjectCode

    options = LinkerOptions(arch="sm_{}{}".format(*capability))
    linked = Linker(ObjectCode.from_ptx(ptx.encode()), options=options)
    return bytes(linked.link("cubin").code)


# The cache on the disk ----------------------------------------------------------------


def folder() -> Path:
    """Return where compiled code is kept."""
    if named := os.environ.get("FASTRELU_CACHE_DIR"):
        return Path(named)
    if numba_named := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(numba_named) / "fastrelu-cuda"
    return user_folder()


def _read(name: str) -> tuple[str, bytes] | None:
    """Return (entry, code) as they were written, or None."""
    try:
        content = (folder() / name).read_bytes()
    except (OSError, RuntimeError):  # there may be no home either
        return None
    check, payload = content[:32], content[32:]
    if hashlib.sha256(payload).digest() != check:
        return None
    entry, _, code = payload.partition(b"\0")
    return entry.decode(), code


def _write(name: str, entry: str, code: bytes) -> None:
    """Keep the code if that is possible; a reader finds all of it or nothing."""
    payload = entry.encode() + b"\0" + code
    with contextlib.suppress(OSError, RuntimeError):
        place = folder()
        place.mkdir(parents=True, exist_ok=True)
        handle, new = tempfile.mkstemp(dir=place)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(payload).digest() + payload)
            os.replace(new, place / name)
        except OSError:
            os.unlink(new)
            raise


def machine_code(kernel: Kernel, capability: tuple[int, int]) -> tuple[str, bytes]:
    """Return a kernel's entry and machine code, from the disk if it is there."""
    name = kernel.digest(capability)
    kept = _read(name) if name else None
    if kept is None:
        try:
            ptx, entry = compile_ptx(kernel, capability)
            kept = entry, link(ptx, capability)
        except Exception as error:
            if type(error).__name__ not in _NOT_FOR_THIS:
                raise
            msg = f"fastrelu cannot compile for the GPU ({error}): {HINT}"
            raise RuntimeError(msg) from error
        if name:
            _write(name, *kept)
    return kept


# Launch -------------------------------------------------------------------------------


@functools.cache
def _core() -> Any:
    return importlib.import_module("cuda.core")


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    major, minor = _core().Device(device).compute_capability
    return major, minor


def _load(kernel: Kernel, device: int) -> Any:
    entry, code = machine_code(kernel, _capability(device))
    loaded = _core().ObjectCode.from_cubin(code).get_kernel(entry)
    kernel.loaded[device] = loaded
    return loaded


@functools.lru_cache(4096)
def _blocks(number: int) -> Any:
    return _core().LaunchConfig(grid=number, block=THREADS)


@functools.lru_cache(4096)
def stream_of(handle: int) -> Any:
    """Return the object of cuda.core for a stream's handle."""
    return _core().Stream.from_handle(handle)


def launch(
    kernel: Kernel, device: int, stream: int, blocks: int, *arguments: Any
) -> None:
    """Queue a kernel; the device's context must be the current one.

    What is a tuple in the kernel comes element by element.
    """
    if SIMULATED:
        from numba import cuda

        function, types_ = kernel.function((9, 0))
        flat = iter(arguments)
        grouped = [
            tuple(next(flat) for _ in type_) if hasattr(type_, "count") else next(flat)
            for type_ in types_
        ]
        cuda.jit(function)[blocks, THREADS](*grouped)
        return
    loaded = kernel.loaded.get(device) or _load(kernel, device)
    _core().launch(stream_of(stream), _blocks(blocks), loaded, *arguments)


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


@functools.cache
def _context(device: int) -> Any:
    """Return the context that all libraries share, and keep it as they do."""
    error, context = _driver().cuDevicePrimaryCtxRetain(device)
    if error:
        msg = f"the CUDA driver gives no access to device {device}: {error}"
        raise RuntimeError(msg)
    return context


def context_of(device: int) -> int:
    """Return the handle of the context that all libraries share."""
    return int(_context(device))


def refused(error: int) -> None:
    """Raise what is to be told of a kernel whose other half was queued."""
    msg = f"the CUDA driver refused a call's second kernel: error {error}"
    raise RuntimeError(msg)


def functions() -> list[int]:
    """Return the addresses of the driver's functions that compiled code calls."""
    driver, found = _driver(), []
    flags = driver.CUdriverProcAddress_flags.CU_GET_PROC_ADDRESS_LEGACY_STREAM
    for name in ("cuLaunchKernel", "cuCtxGetCurrent", "cuStreamIsCapturing"):
        error, address, _ = driver.cuGetProcAddress(name.encode(), 12000, flags)
        if error:
            msg = f"the CUDA driver has no {name}: {error}"
            raise RuntimeError(msg)
        found.append(int(address))
    return found


def is_capturing(stream: int) -> bool:
    """Say whether a graph is being made of what is queued on a stream."""
    if SIMULATED:
        return False
    error, status = _driver().cuStreamIsCapturing(stream)
    return not error and bool(int(status))  # an error where another one captures


_primary: dict[int, Any] = {}  # each device's context that all libraries share


def is_current(device: int) -> bool:
    """Say whether the device is the current one of this thread."""
    if SIMULATED:
        return True
    error, now = _driver().cuCtxGetCurrent()
    if not error and now == _primary.get(device):
        return True
    if error or not int(now):  # to ask on would be an error that tools report
        return False
    error, number = _driver().cuCtxGetDevice()
    if error or int(number) != device:
        return False
    if now == _context(device):
        _primary[device] = now
    return True


@contextlib.contextmanager
def current(device: int) -> Iterator[None]:
    """Make the device the current one of this thread for a while.

    A thread that has none yet keeps the first one, as by the first call of a runtime.
    """
    if is_current(device):
        yield
        return
    driver, context = _driver(), _context(device)
    error, now = driver.cuCtxGetCurrent()
    stays = not error and not int(now) and device == 0
    (error,) = (driver.cuCtxSetCurrent if stays else driver.cuCtxPushCurrent)(context)
    if error:
        msg = f"the CUDA driver cannot make device {device} the current one: {error}"
        raise RuntimeError(msg)
    try:
        yield
    finally:
        if not stays:
            driver.cuCtxPopCurrent()


def device_of(pointer: int) -> int:
    """Return the device on which memory lies."""
    driver = _driver()
    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    error, device = driver.cuPointerGetAttribute(attribute, pointer)
    if error:
        msg = f"the CUDA driver does not know the array's memory: {error}"
        raise ValueError(msg)
    return int(device)


def wait(stream: int, other: int) -> None:
    """Let a stream wait for what is queued on another one now."""
    stream_of(stream).wait(stream_of(other))


def scratch(size: int, stream: int, device: int) -> Any:
    """Return memory from the driver's pool, with `handle` and `close(stream)`."""
    return (
        _core().Device(device).memory_resource.allocate(size, stream=stream_of(stream))
    )
