"""Is it right on the GPU?  Every check compares with the engine for the CPU.

A check is a function of the device and a library; it raises what is wrong.
"""

import functools
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from gpu_device import Twin, put

import fastrelu as F

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))
from conftest import (
    ACTIVATIONS,
    FLOATS,
    INTEGERS,
    LAYOUTS,
    dtype_of,
    gradient_of,
    normal,
    place,
    sample,
)
from reference import assert_same, assert_weight_gradient

SIZES = [0, 1, 3, 8, 17, 1023, 4099, 65537]
HEADS = [1, 3, 5]
SHAPE = 3, 4, 5
CHANNELS = {  # shapes of x and of the weight, and the axis
    "rows": ((3, 5, 264), (5,), 1),
    "images": ((4, 7, 15, 17), (7,), 1),
    "short rows": ((33, 5, 3), (5,), 1),
    "columns": ((129, 72), (72,), 1),
    "odd columns": ((130, 7), (7,), 1),
    "last": ((2, 9, 9, 24), (24,), -1),
    "shared": ((3, 7, 331), (1,), 1),
    "two axes": ((6, 3, 4), (3, 4), 1),
    "a gap": ((6, 3, 4), (6, 1, 4), 1),
}
RUNS = 20
LONG = 300_000
ROUNDS = 20
THREADS = 8
BEYOND = 2**31 + 2**20 + 5


class Skip(Exception):
    """A check cannot be made here; the message says what it needs."""


def told(error):
    """Return an error's words, and where it came from on the lines below."""
    last = traceback.extract_tb(error.__traceback__)[-1].line
    first = str(error) or last
    if not isinstance(error, AssertionError):
        first = f"{type(error).__name__}: {error}"
    return clip(f"{first}\n{''.join(traceback.format_tb(error.__traceback__))}")


def clip(text, length=3000):
    """Return a text, or the beginning and the end of one that is too long."""
    half = length // 2
    return text if len(text) <= length else f"{text[:half]}\n[...]\n{text[-half:]}"


# Values -------------------------------------------------------------------------------


def compare(library, function, *given, **more):
    """Call a function on the host and on the device; compare results and memories.

    The last of PReLU's two gradients only has to be near.
    """
    twins = {}

    def on_device(value):
        if not isinstance(value, np.ndarray):
            return value
        if id(value) not in twins:
            twins[id(value)] = Twin(library, value)
        return twins[id(value)].array

    got = function(*map(on_device, given), **{k: on_device(v) for k, v in more.items()})
    if more.get("inplace"):
        first = got[0] if isinstance(got, tuple) else got
        assert first is twins[id(given[0])].array
    expected = function(*given, **more)
    pairs = [(got, expected)]
    if function is F.prelu_backward:
        pairs = [(got[0], expected[0])]
        assert_weight_gradient(library.get(got[1]), *given, more["axis"])
    elif isinstance(expected, tuple):
        masks = [result[1] for result in (got, expected)]
        pairs = [(got[0], expected[0]), [mask.unpack() for mask in masks]]
        in_order = masks[1].unpack().transpose(masks[0].axes)
        pairs.append((masks[0].bits, np.packbits(in_order, bitorder="little")))
    for a, b in pairs:
        assert_same(library.get(a), b)
    for twin in twins.values():
        assert_same(*twin.memories())


def check_values(name, dtype, device, library):
    """Sizes, places in 16 bytes, layouts, `out=`, in place and masks."""
    dtype, row = dtype_of(dtype), ACTIVATIONS[name]
    backward = functools.partial(gradient_of, name)
    for shape, layout, out_layout in places(library):
        x, g = sample(shape, dtype), sample(shape, dtype, 1)
        ways = ["fresh", "out"] + ["inplace"] * (layout != "broadcast")
        for way, slope in itertools.product(ways, slopes(row, dtype)):
            options = {"inplace": True} if way == "inplace" else {}
            if way == "out":
                options["out"] = lay(x, out_layout)
            call = functools.partial(compare, library, **slope, **options)
            call(row.forward, lay(x, layout))
            call(backward, lay(g, layout), lay(x, layout))
            if not row.takes_mask:
                continue
            call(row.forward, lay(x, layout), return_mask=True)
            if way == "fresh":
                check_mask(library, row, slope, *(lay(a, layout) for a in (x, g)))
    if row.parameter == "weight":
        for kind in {dtype, np.dtype("f4")} if dtype.itemsize == 2 else {dtype}:
            check_channels(library, dtype, kind)


def slopes(row, dtype):
    if row.parameter == "weight":
        return [{"weight": normal(1, dtype, 9)}]
    if row.parameter == "slopes":
        return [{"lower": 0.2, "upper": 0.2, "slopes": 0.2}]
    examples = list(zip(*row.examples.values(), strict=False))[:2]
    return [dict(zip(row.examples, each, strict=True)) for each in examples] or [{}]


def places(library):
    """Yield shapes, and how an input and an output lie: so far in, or by a layout."""
    for size in SIZES:
        yield (size,), 0, 0
    for head in HEADS:
        yield (1000,), head, head
        yield (1000,), head, 0
    for layout in LAYOUTS:
        can = layout not in ("negative", "misaligned") or library.any_layout
        if can and layout != "swapped":  # which no GPU reads
            yield SHAPE, layout, "step" if layout == "broadcast" else layout


def lay(values, layout):
    """Return an array with these values that lies so."""
    if isinstance(layout, str):
        return place(values, layout)[0]
    memory = np.zeros(layout + values.size + 16, values.dtype)
    memory[layout : layout + values.size] = values
    return memory[layout : layout + values.size]


def check_mask(library, row, slope, x, g):
    """The gradient from a mask that was made on the same side."""

    def through_mask(x, g, **options):
        _, mask = row.forward(x, **slope, return_mask=True)
        return row.backward(g, mask, **slope, **options)

    compare(library, through_mask, x, g)
    compare(library, through_mask, x, g, out=np.zeros_like(g))
    if g.flags.writeable:
        compare(library, through_mask, x, g, out=g)


def check_channels(library, dtype, kind):
    for shape, sizes, axis in CHANNELS.values():
        w = normal(sizes, kind, 2)
        for layout in ("c", "permuted", "step"):
            x, g = (place(normal(shape, dtype, k), layout)[0] for k in (0, 1))
            compare(library, F.prelu, x, w, axis=axis)
            compare(library, F.prelu_backward, g, x, w, axis=axis)


def check_repeats(device, library):
    """The weight gradient has the same bits in every run."""
    for dtype, (shape, size) in itertools.product(
        FLOATS, [((LONG // 60, 60), 60), ((LONG // 600, 60, 10), 60), ((LONG,), 1)]
    ):
        kind = dtype_of(dtype)
        x, g, w = (normal(s, kind, k) for k, s in enumerate([shape, shape, size]))
        given = [put(library, a) for a in (g, x, w)]
        results = [F.prelu_backward(*given)[1] for _ in range(RUNS)]
        first, *others = (library.get(dw).tobytes() for dw in results)
        assert all(other == first for other in others), f"{dtype} {shape}"


def check_beyond(device, library):
    """Elements beyond the reach of 32 bits."""
    if device.free < 4 * BEYOND:
        raise Skip(f"needs {4 * BEYOND / 2**30:.0f} GiB of free memory")
    x = library.upload(np.zeros(1, np.uint8)).repeat(BEYOND)
    x = x.view("int8") if library.name == "cupy" else x.view(library.module.int8)
    library.fill(x, -3)
    places = [0, 2**31 - 1, 2**31, BEYOND - 1]
    for place_ in places:
        x[place_] = 5
    y, mask = F.relu(x, return_mask=True)
    dx = F.relu_backward(y, mask, inplace=True)
    assert int((dx != 0).sum()) == len(places)
    assert all(int(dx[p]) == 5 for p in places)


# Streams, graphs, threads, processes --------------------------------------------------


def check_streams(device, library):
    """A producer that comes late, and a consumer that may not come early."""
    host = sample((LONG + 3,), np.dtype(np.float32))
    source, x = put(library, host), put(library, np.zeros_like(host))
    kept = library.empty_like(x)
    F.relu(x)  # the code is loaded
    expected = F.relu(host)
    device.synchronize()
    for _ in range(ROUNDS):
        library.fill(x, 7)
        library.fill(kept, 7)
        device.synchronize()
        with library.stream() as stream:
            device.hold(stream, 0.005)
            library.set(x, source)
            y = F.relu(x)
            library.fill(x, 7)
            library.set(kept, y)
            library.fill(y, 7)
        assert_same(library.get(kept), expected)


def check_graphs(device, library):
    """Captured once, replayed on other numbers; fresh results and masks too."""
    dtype = np.dtype(np.float32)
    g, w = normal((64, 33), dtype, 1), normal(33, dtype, 2)
    x, y = (put(library, np.zeros_like(g)) for _ in "12")
    grad, weight = put(library, g), put(library, w)
    sums = put(library, np.zeros_like(w))

    def work():
        middle, mask = F.leaky_relu(x, 0.1, return_mask=True)
        dx = F.leaky_relu_backward(grad, mask, 0.1)
        F.prelu_backward(dx, middle, weight, out=(y, sums))

    with library.stream():
        work()
        device.synchronize()
        replay = library.capture(work)
        for seed in range(ROUNDS):
            host = normal(g.shape, dtype, seed)
            library.set(x, put(library, host))
            replay()
            device.synchronize()
            middle = F.leaky_relu(host, 0.1)
            dx = F.leaky_relu_backward(g, host, 0.1)
            assert_same(library.get(y), F.prelu_backward(dx, middle, w)[0])
            assert_weight_gradient(library.get(sums), dx, middle, w)


def check_memory_of_graphs(device, library):
    """What a captured call lends for itself is no other array's afterwards."""
    dtype = np.dtype(np.float32)
    x, g, y = (put(library, normal((64, 33), dtype, k)) for k in (1, 2, 3))
    w, sums = (put(library, normal(33, dtype, k)) for k in (4, 5))

    def work():
        F.prelu_backward(g, x, w, out=(y, sums))

    with library.stream():
        work()
        device.synchronize()
        replay = library.capture(work)
        others = [put(library, np.full(2**k, 7, dtype)) for k in range(14)]
        replay()
        device.synchronize()
        for other in others:
            assert_same(library.get(other), np.full(other.shape, 7, dtype))


def check_threads(device, library):
    """Threads with streams of their own."""
    barrier = threading.Barrier(THREADS)

    def work(seed):
        host = sample((LONG // 30 + 7,), np.dtype(np.float32), seed)
        expected = F.leaky_relu(host, 0.1)
        barrier.wait()
        for _ in range(ROUNDS):
            with library.stream():
                y = F.leaky_relu(put(library, host), 0.1)
            assert_same(library.get(y), expected)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))


CALL = """
import sys, time
import numpy as np
import fastrelu
x = np.array([-1.0, 2.0], np.float32)
if sys.argv[1] == "cupy":
    import cupy
    x = cupy.asarray(x)
else:
    import torch
    x = torch.from_numpy(x).to(device)
x.tolist()
start = time.perf_counter()
y = fastrelu.relu(x)
seconds = time.perf_counter() - start
assert y.tolist() == [0.0, 2.0]
print(seconds)
"""


def first_call(library, folder, before="", tool=(), **environment):
    """Start a process that makes one call with this folder of compiled code."""
    paths = [str(Path(__file__).parent), *sys.path]
    environment["FASTRELU_CACHE_DIR"] = folder
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return subprocess.Popen(
        [*tool, sys.executable, "-c", START + before + CALL, library],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


START = 'device = "cuda"\n'  # what a process does first; tests have their own


def seconds_of(process):
    output, errors = process.communicate(timeout=120)
    last = errors.strip().rpartition("\n")[2]
    assert process.returncode == 0, f"{last}\n{errors}"
    return float(output)


def check_processes(device, library):
    """Two at once on an empty folder of compiled code; a third compiles nothing."""
    with tempfile.TemporaryDirectory() as folder:
        both = [first_call(library.name, folder) for _ in "12"]
        for process in both:
            seconds_of(process)
        before = "from fastrelu.cuda import launch; launch.compile_ptx = None"
        seconds_of(first_call(library.name, folder, before))


def check_sanitizer(device, library):
    """NVIDIA's own tool for accesses out of bounds, on a few calls."""
    if not shutil.which("compute-sanitizer"):
        raise Skip("compute-sanitizer is not on the PATH")
    # Libraries ask the driver for what may not be there: such errors are not meant.
    tool = "compute-sanitizer", "--report-api-errors", "no", "--error-exitcode", "9"
    with tempfile.TemporaryDirectory() as folder:
        # Pools would hide what lies beside an array; CuPy's is switched off there.
        plain = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        process = first_call(library.name, folder, ODD, tool, **plain)
        output, errors = process.communicate(timeout=120)
    words = "Invalid", "Error", "ERROR", "fault"
    lines = (output + errors).splitlines()
    found = [line for line in lines if any(word in line for word in words)][:3]
    assert process.returncode == 0, "\n".join(["; ".join(found), *lines])


ODD = """
import sys
import numpy as np
import gpu_device, fastrelu as F
library = gpu_device.LIBRARIES[sys.argv[1]]()
if library.name == "cupy":
    library.module.cuda.set_allocator(None)
for n in (1, 7, 1001):
    for dtype in ("float16", "float32", "float64"):
        x = np.linspace(-1, 1, 3 * n).astype(dtype).reshape(n, 3)
        x, w = gpu_device.put(library, x), gpu_device.put(library, x[0])
        y, mask = F.relu(x, return_mask=True)
        F.relu_backward(x, mask)
        F.relu(x[1:, 1:])
        F.prelu_backward(x, F.prelu(x, w), w)
"""


def checks(libraries):
    """Return every check by its name, the short ones first."""
    found = {}
    each = {
        "streams": check_streams,
        "graphs": check_graphs,
        "memory of graphs": check_memory_of_graphs,
        "threads": check_threads,
        "weight gradient": check_repeats,
        "processes": check_processes,
        "beyond 2^31": check_beyond,
        "sanitizer": check_sanitizer,
    }
    for library in libraries:
        for name, dtype in values():
            function = functools.partial(check_values, name, dtype)
            found[f"{name} {dtype} {library}"] = function, library
        for name, function in each.items():
            found[f"{name} {library}"] = function, library
    return found


def values():
    """Yield activations with the dtypes that they take."""
    for name, row in ACTIVATIONS.items():
        for dtype in FLOATS + INTEGERS * row.spec.integers:
            yield name, dtype
