"""From addresses and sizes to launches: what arrays of any library come down to."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastrelu.cuda import launch
from fastrelu.cuda.config import BLOCKS, BYTES, DOWN, THREADS

Function = Callable[..., Any]

INT32 = 2**31  # sizes from here on need wide indices
_LEAST = 4  # vectors that a thread adds up before its block's sum is worth its cost
_SHORT = 64  # rows of a weight up to here are better treated as columns


# Kernels ------------------------------------------------------------------------------


def build(template: str, options: dict[str, Any], capability: tuple[int, int]) -> Any:
    """Return a kernel and the types of its arguments."""
    from fastrelu.cuda import kernels

    return kernels.build(template, options, capability)


_kernels: dict[Any, launch.Kernel] = {}


def kernel(template: str, **options: Any) -> launch.Kernel:
    """Return the one kernel of these options, in whichever order they come."""
    key = template, frozenset(options.items())
    found = _kernels.get(key)
    return found or _kernels.setdefault(key, launch.Kernel(build, template, options))


# Elementwise --------------------------------------------------------------------------


class Work:
    """A call's device, stream and temporary memory."""

    def __init__(self, library: Any, given: Any, device: int) -> None:
        self.library, self.given, self.device = library, given, device
        self.stream: int = library.stream(given, device)
        self.memory: list[Callable[[], Any]] = []

    def run(self, kernel: launch.Kernel, threads: int, *arguments: Any) -> None:
        """Queue a kernel of so many threads."""
        blocks = max(1, -(-threads // THREADS))
        launch.launch(kernel, self.device, self.stream, blocks, *arguments)

    def queue(self, plan: "Launch", *pointers: int) -> None:
        """Queue a kernel with these pointers."""
        given = *pointers, *plan.sizes
        launch.launch(plan.kernel, self.device, self.stream, plan.blocks, *given)

    def lend(self, size: int) -> int:
        """Return the address of bytes for the duration of the call."""
        where = self.given, self.device, self.stream
        pointer, give_back = self.library.lend(max(1, size), *where)
        self.memory.append(give_back)
        return int(pointer)

    def close(self) -> None:
        """Give the memory back."""
        for give_back in self.memory:
            give_back()


def compute_of(dtype: str) -> Any:
    """Return the type of products."""
    return np.float32 if dtype in ("float16", "bfloat16") else getattr(np, dtype)


def head_of(size: int, itemsize: int, first: int, *others: int) -> int | None:
    """Return the elements before the first whole vector, or None: places differ."""
    offset = first % BYTES
    for place in others:  # in a hurry: a generator would cost more than all the rest
        if place % BYTES != offset:
            return None
    if offset == 0:
        return 0
    return None if offset % itemsize else min(size, (BYTES - offset) // itemsize)


def split_flat(size: int, itemsize: int) -> tuple[int, int]:
    """Return the whole vectors of so many elements, and the blocks that do them."""
    vectors = size // (BYTES // itemsize)
    return vectors, blocks_of(vectors)


def blocks_of(vectors: int, more: int = 0) -> int:
    """Return the blocks with a thread for each vector and so many more, one at least."""
    blocks = (vectors + more + THREADS - 1) // THREADS
    return blocks if blocks > 0 else 1


def run_flat(
    kernel: launch.Kernel,
    device: int,
    stream: int,
    itemsize: int,
    size: int,
    head: int,
    pointers: Sequence[int],
    *last: Any,
) -> None:
    """Queue a kernel `flat`.

    Last come the numbers, and for a weight the inner size and the number of channels.
    """
    vectors, blocks = split_flat(size - head, itemsize)
    sizes = head, vectors, size
    launch.launch(kernel, device, stream, blocks, *pointers, *sizes, *last)


def run_mask(
    kernel: launch.Kernel,
    device: int,
    stream: int,
    itemsize: int,
    size: int,
    pointers: Sequence[int],
    *numbers: Any,
) -> None:
    """Queue a kernel `flat_mask`: a thread does a vector, and one does the rest."""
    vectors = size // (BYTES // itemsize)
    blocks = blocks_of(vectors, 1)
    launch.launch(kernel, device, stream, blocks, *pointers, vectors, size, *numbers)


# Where an operation's kernel stands among those of its kind: bits are made or taken, or
# a weight is laid out so.
PLAIN, WITH_BITS = range(2)
LAYOUTS = "one", "columns", "whole columns", "rows", "whole rows"


def layout_of(channels: int, inner: int, width: int, head: int, whole: bool) -> int:
    """Return the place in LAYOUTS of what meets a weight; -1: its rows are too short.

    Vectors have so many elements, and if `whole`, some of the weight's can be read as one.
    """
    if channels == 1:
        return 0
    if inner == 1 and channels >= width:
        return 2 if whole and head == 0 and channels % width == 0 else 1
    if inner < width:
        return -1
    return 4 if head == 0 and inner % width == 0 else 3


def weight_layout(
    channels: int, inner: int, itemsize: int, head: int, weight: int | None
) -> str | None:
    """Return the element of `flat` that meets such a weight; None: rows too short.

    The weight is an address if it is of x's dtype, else None.
    """
    whole = weight is not None and weight % BYTES == 0
    place = layout_of(channels, inner, BYTES // itemsize, head, whole)
    return LAYOUTS[place] if place >= 0 else None


# Both gradients for the view (outer, channels, inner) ---------------------------------


class Launch(NamedTuple):
    """A kernel, its blocks, and the sizes that come behind its pointers."""

    kernel: launch.Kernel
    blocks: int
    sizes: tuple[int, ...]


class Sums(NamedTuple):
    """Pairs that blocks leave in memory, as (splits, channels, inner)."""

    pointer: int
    splits: int
    channels: int
    inner: int


class Both(NamedTuple):
    """How both gradients are made: a launch, and what it leaves in memory."""

    first: Launch
    pairs: int  # in bytes
    splits: int
    channels: int
    inner: int


@functools.lru_cache(1024)
def plan_both(
    gradient: Function,
    dtypes: tuple[str, str],
    itemsize: int,
    view: tuple[int, int, int],
    aligned: bool,
) -> Both:
    """Return how the gradients are made for dtypes of x and the weight.

    How the work is cut up, and so the sums' last bits, follows from the view alone.
    """
    outer, channels, inner = view
    size = outer * channels * inner
    width = BYTES // itemsize
    fmt, weight = dtypes
    if channels == 1 or inner > _SHORT:
        single = outer * channels == 1
        vectors = (single or inner % width == 0) and inner >= width
        in_row = inner // width if vectors else inner
        most = -(-outer * in_row // (_LEAST * THREADS))
        splits = max(1, min(most, BLOCKS // channels))
        template, blocks = "prelu_rows", splits * channels
        sums = splits, channels, 1
        sizes = outer, channels, inner, splits
    else:
        columns = channels * inner
        vectors = columns % width == 0
        strips = -(-columns // (THREADS // DOWN * (width if vectors else 1)))
        splits = max(1, min(-(-outer // (_LEAST * DOWN)), BLOCKS // strips))
        template, blocks = "prelu_columns", strips * splits
        sums = splits, channels, inner
        sizes = outer, columns, inner, splits
    code = kernel(
        template,
        function=gradient,
        fmt=fmt,
        weight=weight,
        wide=size >= INT32,
        vectors=vectors,
        aligned=aligned or not vectors,
    )
    return Both(Launch(code, blocks, sizes), _pairs(fmt, math.prod(sums)), *sums)


def both(
    work: Work,
    gradient: Function,
    dtypes: tuple[str, str],
    itemsize: int,
    pointers: tuple[int, int, int, int],
    view: tuple[int, int, int],
) -> Sums:
    """Write the gradient towards x, and return sums of that towards the weight.

    The dtypes are x's and the weight's, the pointers (grad, x, weight, result).
    """
    grad, x, _, y = pointers
    aligned = head_of(math.prod(view), itemsize, grad, x, y) == 0
    plan = plan_both(gradient, dtypes, itemsize, view, aligned)
    pairs = work.lend(plan.pairs)
    work.queue(plan.first, *pointers, pairs)
    return Sums(pairs, plan.splits, plan.channels, plan.inner)


def _pairs(dtype: str, number: int) -> int:
    """Return the bytes of so many pairs of sums."""
    return 2 * number * int(np.dtype(compute_of(dtype)).itemsize)


def pairs(work: Work, dtype: str, number: int) -> int:
    """Return the address of memory for so many pairs of sums."""
    return work.lend(_pairs(dtype, number))


def splits_of(size: int, channels: int) -> int:
    """Return in how many parts to sum so many elements of each channel."""
    return max(1, min(-(-size // THREADS), BLOCKS // max(1, channels)))


@functools.lru_cache(1024)
def plan_finish(
    dtype: str, size: int, splits: int, channels: int, inner: int
) -> Launch:
    """Return how the sums are added up into a dense array of so many elements."""
    team = 1
    while team < min(splits * inner, THREADS):
        team *= 2
    blocks = max(1, -(-size * team // THREADS))
    return Launch(kernel("finish", fmt=dtype), blocks, (splits, channels, inner, team))


def finish(work: Work, dtype: str, pointer: int, size: int, sums: Sums) -> None:
    """Add up the sums of each channel into a dense array."""
    if size:
        work.queue(plan_finish(dtype, size, *sums[1:]), sums.pointer, pointer)
