"""What compiled calls for arrays on a GPU know, and how they come to know it."""

import functools
import sys
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
        self, library: Library, asked: Questions, kinds: Sequence[int], predicate: str
    ) -> None:
        size = compiled.ROWS + _MOST * compiled.ROW
        self.table = table = np.zeros(size, np.int64)
        self.rows: dict[Any, int] = {}
        self.kernels: set[Any] = set()
        self.code = _compiled()
        table[: objects.LENGTH] = objects.known()
        table[compiled.LAUNCH], table[compiled.CURRENT] = launch.functions()
        table[compiled.HANDLE], _ = _question(asked.handle)
        table[compiled.LIKE] = asked.like
        table[compiled.COUNT], table[compiled.FACTS] = len(kinds), len(asked.facts)
        table[compiled.KINDS :][: len(kinds)] = kinds
        held = {
            compiled.PREDICATE: sys.intern(predicate),
            compiled.MODEL: asked.model,
            compiled.UINT8: asked.uint8,
            compiled.STREAM: asked.stream,
            compiled.MAKE: asked.make,
            compiled.EMPTY_BYTES: library.empty_bytes,
        }
        for word, value in held.items():
            table[word] = id(value)
        names = asked.owner, asked.start, asked.device, "dtype", "shape", asked.size
        for k, name in enumerate(names):
            table[compiled.OWNER + 2 * k :][:2] = _question(name)
        for k, (name, answer) in enumerate(asked.facts.items()):
            table[compiled.FACT + 3 * k :][:3] = *_question(name), id(answer)
        keep_for_ever((table, asked, held))

    def learn(
        self, place: int, plan: Any, device: int, dtype: Any, weight: Any = None
    ) -> None:
        """Take note of a kernel, launched for a dtype and that of a weight on a device."""
        key = dtype, weight, device
        is_new = key not in self.rows
        if (place, *key) in self.kernels or (is_new and len(self.rows) == _MOST):
            return
        code, compute, itemsize = plan
        loaded = code.loaded[device]
        keep_for_ever((key, loaded))  # what is known by its address
        if is_new:
            row = self.rows[key] = compiled.ROWS + compiled.ROW * len(self.rows)
            words = {
                compiled.OF_X: id(dtype),
                compiled.OF_WEIGHT: 0 if weight is None else id(weight),
                compiled.ON: device,
                compiled.CONTEXT: launch.context_of(device),
                compiled.NUMBER: id(device),
                compiled.ITEM: itemsize,
                compiled.WEIGHT_ITEM: 0 if weight is None else weight.itemsize,
                compiled.SINGLE: compute is np.float32,
            }
            for word, value in words.items():
                self.table[row + word] = value
            self.table[compiled.KNOWN] = len(self.rows)
        self.table[self.rows[key] + compiled.KERNEL + place] = int(loaded.handle)
        self.kernels.add((place, *key))

    def before(self, fallback: Any) -> Any:
        """Return the call, with somebody to take what it leaves."""
        own = np.array([id(keep_for_ever(fallback)), self.table.ctypes.data])
        return built_in(self.code, own)


def _question(name: str) -> tuple[int, bool]:
    """Return a name for compiled code, 0 for none, and whether it is a method's."""
    plain = sys.intern(name.removesuffix("()"))
    return id(keep_for_ever(plain)) if name else 0, plain != name


@functools.cache
@shielded
def _compiled() -> Any:
    signature = types.int64(types.int64, types.int64, types.intp)
    return compile_and_keep(compiled.call, signature)
