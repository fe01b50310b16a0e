"""Every public function on both sides of every threshold, with its right result.

For tests that call from many threads, after a fork, or beside another library.
"""

import random
import threading

import numpy as np
import reference
from conftest import ACTIVATIONS, TYPICAL, dtype_of, normal, slopes_for

from fastrelu.cpu import objects, pool, threads
from fastrelu.mask import Mask

SOME = 64  # elements: as near to a threshold as every shape below allows
CHANNELS = 16


def lower_the_last_threshold():
    """Before the first call: or only arrays of tens of megabytes are past the cache."""
    threads.CACHE = threads.MUCH * 3 // 2


def sizes(itemsize, arrays):
    """Numbers of elements on both sides of each threshold of so many arrays."""
    yield 1
    moved = objects._BRIEF, 2 * threads.SHARE, threads.MUCH, threads.CACHE
    for nbytes in (*(m // arrays for m in moved), pool.SMALLEST):
        n = nbytes // itemsize // SOME * SOME
        yield from (n - SOME, n + SOME)


def calls(dtypes=("float32", "float16")):
    """A list of (what, call); a call says whether all its results are right."""
    result = []
    for dtype in map(dtype_of, dtypes):
        for arrays, make in ((2, _forward), (3, _backward)):
            for n in sizes(dtype.itemsize, arrays):
                x, g = normal((n,), dtype), normal((n,), dtype, seed=1)
                x[::7] = -0.0
                for name in TYPICAL:
                    row = ACTIVATIONS[name]
                    shapes = CHANNEL_SHAPES if row.parameter == "weight" else [(-1,)]
                    for shape in shapes if n > 1 else [(n,)]:
                        made = make(name, row, x.reshape(shape), g.reshape(shape))
                        result += [
                            ((name, str(dtype), n, shape, what), call)
                            for what, call in made
                        ]
    return result


CHANNEL_SHAPES = (1, CHANNELS, -1), (-1, CHANNELS)  # a weight for each row, or column


def _forward(name, row, x, g):
    more = slopes_for(name, x, 0.3)
    y = _bits(reference.forward(name, x, **more))
    bits = reference.mask_bits(x, name, **more) if row.takes_mask else None

    def strided():
        wide = np.zeros((*x.shape, 2), x.dtype)
        wide[..., 0] = x
        return _same(row.forward(wide[..., 0], **more), y)

    def masked():
        got, mask = row.forward(x, return_mask=True, **more)
        return _same(got, y) and np.array_equal(mask.bits, bits)

    yield "fresh", lambda: _same(row.forward(x, **more), y)
    yield "in place", lambda: _same(row.forward(x.copy(), inplace=True, **more), y)
    yield "out", lambda: _same(row.forward(x, out=np.empty_like(x), **more), y)
    yield "strided", strided
    if row.takes_mask:
        yield "mask", masked


def _backward(name, row, x, g):
    more = slopes_for(name, x, 0.3)
    dx = _bits(reference.backward(name, g, x, **more))
    if row.parameter == "weight":
        dw = _bits(row.backward(g, x, **more)[1])  # its bits must never change

    def right(g, saved, **where):
        got = row.backward(g, saved, **more, **where)
        if row.parameter == "weight":
            got, weights = got
            return _same(got, dx) and _same(weights, dw)
        return _same(got, dx)

    yield "backward", lambda: right(g, x)
    yield "backward in place", lambda: right(g.copy(), x, inplace=True)
    if row.takes_mask:
        bits = reference.mask_bits(x, name, **more)
        mask = Mask(bits, x.shape, predicate=row.spec.predicate)
        yield "backward from a mask", lambda: right(g, mask)


def _bits(a):
    return a.view(f"u{a.dtype.itemsize}")


def _same(got, bits):
    return got.shape == bits.shape and np.array_equal(_bits(got), bits)


class Storm:
    """Threads that run calls, each in an order of its own, until they are stopped.

    ``wrong`` says which gave a wrong result or raised, ``number`` how many were run.
    """

    def __init__(self, calls, members=16):
        self.calls, self.wrong, self.counts = calls, [], [0] * members
        self.ended = threading.Event()
        self.team = [
            threading.Thread(target=self._run, args=(k,)) for k in range(members)
        ]

    def _run(self, me):
        pick = random.Random(me).choice
        while not self.ended.is_set():
            self.check(*pick(self.calls))
            self.counts[me] += 1

    def check(self, what, call):
        try:
            fine = call()
        except Exception as error:  # noqa: BLE001
            fine, what = False, (*what, repr(error))
        if not fine:
            self.wrong.append(what)

    def __enter__(self):
        for thread in self.team:
            thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        for thread in self.team:
            thread.join()

    @property
    def number(self):
        return sum(self.counts)
