"""What compiled calls for arrays on a GPU know, and how they come to know it."""

import functools
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import types

from fastrelu.cpu import objects
from fastrelu.cpu.jit import built_in, compile_and_keep, keep_for_ever, shielded
from fastrelu.cuda import compiled, launch
from fastrelu.cuda.arrays import Library, Questions

_MOST = 32  # rows of a table


class Quick:
    """The quick calls of one operation for the arrays of one type.

    They take what `learn` was told of.
    """

    def __init__(
        self,
        library: Library,
        asked: Questions,
        kinds: Sequence[int],
        predicate: str,
        both: bool,
    ) -> None:
        size = compiled.ROWS + _MOST * compiled.ROW
        self.table = table = np.zeros(size, np.int64)
        self.rows: dict[Any, int] = {}
        self.kernels: set[Any] = set()  # that are known, by their keys
        self.lock = threading.Lock()
        self.code = _compiled(compiled.call_both if both else compiled.call)
        table[: objects.LENGTH] = objects.known()
        functions = compiled.LAUNCH, compiled.CURRENT, compiled.CAPTURING
        table[[*functions]] = launch.functions()
        table[compiled.CAPTURING] *= asked.captures
        table[compiled.NUMPY_DTYPES] = isinstance(asked.uint8, np.dtype)
        table[compiled.HANDLE], _ = _question(asked.handle)
        table[compiled.COUNT], table[compiled.FACTS] = len(kinds), len(asked.facts)
        table[compiled.KINDS :][: len(kinds)] = kinds
        held = {
            compiled.PREDICATE: sys.intern(predicate),
            compiled.MODEL: asked.model,
            compiled.STREAM: asked.stream,
            compiled.MAKE: asked.make,
            compiled.EMPTY_LIKE: asked.empty_like,
            compiled.WRITTEN: asked.written,
            compiled.EMPTY_BYTES: library.empty_bytes,
            compiled.REFUSED: launch.refused,
        }
        if asked.around is not None:
            words = compiled.AROUND, compiled.LEVEL, compiled.OUTSIDE
            held |= dict(zip(words, asked.around, strict=True))
        for word, value in held.items():
            table[word] = 0 if value is None else id(value)
        table[compiled.UINT8] = _word(asked.uint8)
        names = [asked.owner, asked.start, asked.device, "dtype", "shape", asked.size]
        names += [asked.contiguous, asked.strides, asked.unit]
        for k, name in enumerate(names):
            table[compiled.OWNER + 2 * k :][:2] = _question(name)
        for k, (name, answer) in enumerate(asked.facts.items()):
            table[compiled.FACT + 3 * k :][:3] = *_question(name), id(answer)
        keep_for_ever((table, asked, held))

    def learn(self, place: int, plan: Any, device: int, *dtypes: Any) -> None:
        """Take note of a kernel for x's dtype, and a weight's, launched on a device."""
        code, compute, itemsize = plan
        key = device, *dtypes
        if (place, *key) in self.kernels:
            return
        row = self._row(key, itemsize, *key)
        if row:
            self.table[row + compiled.SINGLE] = compute is np.float32
            self.table[row + compiled.KERNEL + place] = _handle(code, device)
            self.kernels.add((place, *key))

    def learn_both(self, view: Any, plan: Any, device: int, *dtypes: Any) -> None:
        """Take note of both launches for arrays seen so, and of the bytes between them."""
        nbytes, first, last = plan
        key = device, *dtypes, view
        if key in self.kernels:
            return
        row = self._row(key, dtypes[0].itemsize, device, *dtypes)
        if row:
            words = [*view, nbytes]
            for each in first, last:
                words += [_handle(each.kernel, device), each.blocks, *each.sizes]
            self.table[row + compiled.VIEW :][: len(words)] = words
            self.kernels.add(key)

    def _row(
        self, key: Any, itemsize: int, device: int, dtype: Any, weight: Any = None
    ) -> int:
        """Return where a row starts, or 0 where there is no place, or not now.

        A thread that meets another here makes its row with a later call.
        """
        if not self.lock.acquire(blocking=False):
            return 0
        try:
            if key in self.rows or len(self.rows) == _MOST:
                return self.rows.get(key, 0)
            row = compiled.ROWS + compiled.ROW * len(self.rows)
            words = {
                compiled.OF_X: _word(dtype),
                compiled.OF_WEIGHT: 0 if weight is None else _word(weight),
                compiled.ON: device,
                compiled.CONTEXT: launch.context_of(device),
                compiled.NUMBER: id(device),
                compiled.ITEM: itemsize,
                compiled.WEIGHT_ITEM: 0 if weight is None else weight.itemsize,
            }
            for word, value in words.items():
                self.table[row + word] = value
            keep_for_ever(device)  # which is known by its address
            self.rows[key] = row
            self.table[compiled.KNOWN] = len(self.rows)
            return row
        finally:
            self.lock.release()

    def before(self, fallback: Any) -> Any:
        """Return the call, with somebody to take what it leaves."""
        own = np.array([id(keep_for_ever(fallback)), self.table.ctypes.data])
        return built_in(self.code, own)


def _handle(code: launch.Kernel, device: int) -> int:
    """Return the driver's handle of a kernel that a device has loaded."""
    return int(keep_for_ever(code.loaded[device]).handle)


def _word(dtype: Any) -> int:
    """Return the word by which compiled code knows a dtype."""
    if isinstance(dtype, np.dtype):
        return objects.dtype_word(dtype)
    return id(keep_for_ever(dtype))


def _question(name: str) -> tuple[int, bool]:
    """Return a name for compiled code, 0 for none, and whether it is a method's."""
    plain = sys.intern(name.removesuffix("()"))
    return id(keep_for_ever(plain)) if name else 0, plain != name


@functools.cache
@shielded
def _compiled(template: Any) -> Any:
    signature = types.int64(types.int64, types.int64, types.intp)
    return compile_and_keep(template, signature)
