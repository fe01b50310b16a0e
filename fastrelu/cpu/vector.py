"""How each dtype is read, computed and written, in LLVM's words.

Numba's CPU target knows neither half floats, nor bit masks, nor stores that bypass the
cache.  The intrinsics below add them.  They are plain LLVM vector code, which every
target can lower, so nothing here belongs to one processor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastrelu._dtypes import BY_NAME, Row, row_of
from fastrelu._functions import rebuild
from fastrelu.cpu import halves
from fastrelu.cpu.abi import cgutils, config
from fastrelu.cpu.jit import inlined, new_array

STRIP = 64  # elements whose mask bits are packed at once; every chunk is cut at one

_BIT, _BYTE, _I16, _I32 = (ir.IntType(width) for width in (1, 8, 16, 32))
_HALF, _FLOAT = ir.HalfType(), ir.FloatType()
_LINE = ir.VectorType(_I32, 16)  # 64 bytes, one cache line


def _conversion(
    source: types.Type, target: types.Type, emit: Callable[..., Any]
) -> Any:
    """Return an intrinsic that turns one `source` scalar into a `target` scalar."""

    @intrinsic
    def convert(typingctx, value):
        def codegen(context, builder, signature, args):
            return emit(builder, args[0])

        return target(source), codegen

    return convert


_float_bits = _conversion(types.float32, types.uint32, lambda b, v: b.bitcast(v, _I32))
_bits_float = _conversion(
    types.uint32, types.float32, lambda b, v: b.bitcast(v, _FLOAT)
)


@inlined
def _same(value):
    return value


def _by_bits(template: Callable[..., Any]) -> Any:
    """Compile one of the functions of `halves` for the loops here."""
    names = {"float_bits": _float_bits, "bits_float": _bits_float}
    return inlined(rebuild(template, template.__name__, names))


round_to_odd = _by_bits(halves.round_to_odd)
_bfloat16_to_float = _by_bits(halves.bfloat16_to_float)
_float_to_bfloat16 = _by_bits(halves.float_to_bfloat16)
_half_to_float_by_bits = _by_bits(halves.half_to_float)
_float_to_half_by_bits = _by_bits(halves.float_to_half)


def _has_half_instructions() -> bool:
    """Say whether LLVM converts half floats itself instead of calling a library."""
    if llvm.get_process_triple().startswith(("aarch64", "arm64")):
        return True
    features = config.CPU_FEATURES
    if features is None:
        features = llvm.get_host_cpu_features().flatten()
    return "+f16c" in features


if _has_half_instructions():
    _half_to_float = _conversion(
        types.uint16, types.float32, lambda b, v: b.fpext(b.bitcast(v, _HALF), _FLOAT)
    )
    _float_to_half = _conversion(
        types.float32, types.uint16, lambda b, v: b.bitcast(b.fptrunc(v, _HALF), _I16)
    )
else:
    _half_to_float, _float_to_half = _half_to_float_by_bits, _float_to_half_by_bits


@dataclass(frozen=True, eq=False)  # told apart by identity, which is quick
class Format:
    """One dtype as the loops see it."""

    name: str
    storage: np.dtype[Any]  # what the loops index: the dtype itself, or uint16
    compute: Any  # the Numba type of every product
    load: Any  # storage -> a number
    store: Any  # a number -> storage

    @property
    def product(self) -> np.dtype[Any]:
        """The dtype of every product."""
        return np.dtype(str(self.compute))


@intrinsic
def put_word(typingctx, bits, place, word):
    """Write the mask bits of a word to bits[8 * place:]."""

    def codegen(context, builder, signature, args):
        target = _pointer(context, builder, bits, args[0], ir.IntType(STRIP))
        builder.store(args[2], builder.gep(target, [args[1]]), align=1)
        return context.get_dummy_value()

    return types.void(bits, types.uintp, types.uint64), codegen


def _pointer(context: Any, builder: Any, array: Any, value: Any, element: Any) -> Any:
    """Return the address of an array's first element as a pointer to `element`."""
    data = context.make_array(array)(context, builder, value).data
    return builder.bitcast(data, element.as_pointer())


_HALVES = {
    "float16": (_half_to_float, _float_to_half),
    "bfloat16": (_bfloat16_to_float, _float_to_bfloat16),
}


def _format(row: Row) -> Format:
    words = _HALVES.get(row.name, (_same, _same))
    return Format(row.name, row.storage, getattr(types, row.compute), *words)


_FORMATS = {row: _format(row) for row in BY_NAME.values()}


def store_to_nearest(fmt: Format) -> Any:
    """Return a format's `store` that asks no floating-point mode, as NumPy's casts."""
    return _float_to_half_by_bits if fmt.name == "float16" else fmt.store


def format_of(dtype: np.dtype[Any]) -> Format:
    """Return the format of a native dtype that the arguments' check has let through."""
    row = row_of(dtype)
    if row is None:
        msg = f"no loops are known for dtype {dtype}: this is a bug of fastrelu"
        raise TypeError(msg)
    return _FORMATS[row]


@intrinsic
def pack(typingctx, flags):
    """Return the mask bits of STRIP integers that are 0 or 1.

    They are as wide as the elements that were looked at: then the compiler has the bits
    of a vector from one comparison, and nothing goes by way of memory.
    """

    def codegen(context, builder, signature, args):
        vector = ir.VectorType(ir.IntType(flags.dtype.bitwidth), STRIP)
        each = builder.load(
            _pointer(context, builder, flags, args[0], vector), align=64
        )
        bits = builder.trunc(each, ir.VectorType(_BIT, STRIP))
        return builder.bitcast(bits, ir.IntType(STRIP))

    return types.uint64(flags), codegen


@intrinsic
def unpack(typingctx, bits, flags, words):
    """Spread whole words of mask bits into bytes of 0 and 1."""

    def codegen(context, builder, signature, args):
        vector = ir.VectorType(_BYTE, STRIP)
        source = _pointer(context, builder, bits, args[0], ir.IntType(STRIP))
        target = _pointer(context, builder, flags, args[1], vector)
        with cgutils.for_range(builder, args[2]) as loop:
            word = builder.load(builder.gep(source, [loop.index]), align=1)
            active = builder.bitcast(word, ir.VectorType(_BIT, STRIP))
            spread = builder.zext(active, vector)
            builder.store(spread, builder.gep(target, [loop.index]), align=1)
        return context.get_dummy_value()

    return types.void(bits, flags, types.intp), codegen


def unsigned(element: types.Type) -> types.Type:
    """Return the type of integers as wide as an element."""
    return getattr(types, f"uint{element.bitwidth}")


def itself(element: types.Type) -> types.Type:
    """Return the same type."""
    return element


def buffer(number: int, element: Any = itself) -> Any:
    """Return `space(like)`: an array of so many elements on the stack.

    They start on a cache line and are of like's type, or of one that is given, or made
    of it.
    """

    @intrinsic
    def space(typingctx, like):
        made = element if isinstance(element, types.Type) else element(like.dtype)
        kind = types.Array(made, 1, "C")

        def codegen(context, builder, signature, args):
            size = context.get_abi_sizeof(context.get_data_type(kind.dtype))
            lines = ir.ArrayType(_LINE, -(-number * size // 64))
            space = cgutils.alloca_once(builder, lines)
            length = context.get_constant(types.intp, number)
            return new_array(context, builder, kind, space, length)

        return kind(like), codegen

    return space


def _strip_store(past_cache: bool, halves: bool = False) -> Any:
    """Return `store(target, first, buffer)`: send STRIP elements to target[first:].

    Past the cache, target[first] must start a line.  An ordinary store first reads the
    line that it overwrites: on arrays that do not fit the cache a third of all traffic.

    Something that might look at the memory stands before an ordinary store.  Else, where
    a value was read from there and is kept, LLVM would store under a mask without it:
    in place from memory that is a fifth slower, and nowhere more than 4 % faster.

    Processors with half-float arithmetic have no stores of half floats past the cache
    that LLVM knows of.  A zero of which it knows nothing makes integers of them.
    """
    function = ir.FunctionType(ir.VoidType(), [])
    nothing = ir.InlineAsm(function, "", "~{memory}", side_effect=True)
    zero = ir.InlineAsm(ir.FunctionType(_I32, [_I32]), "", "=r,0")

    @intrinsic
    def store_strip(typingctx, target, first, buffer):
        def codegen(context, builder, signature, args):
            element = context.get_data_type(target.dtype)
            size = context.get_abi_sizeof(element)
            to = _pointer(context, builder, target, args[0], element)
            to = builder.bitcast(builder.gep(to, [args[1]]), _LINE.as_pointer())
            start = _pointer(context, builder, buffer, args[2], _LINE)
            hint = builder.module.add_metadata([ir.Constant(_I32, 1)])
            lines = [
                builder.load(builder.gep(start, [_I32(i)]), align=64)
                for i in range(STRIP * size // 64)
            ]
            if halves:
                first = builder.call(zero, [_I32(0)])
                zeros = builder.insert_element(_LINE(ir.Undefined), first, _I32(0))
                zeros = builder.shuffle_vector(zeros, zeros, _LINE([0] * _LINE.count))
                lines = [builder.xor(line, zeros) for line in lines]
            if not past_cache:
                builder.call(nothing, [])
            for i, line in enumerate(lines):
                place = builder.gep(to, [_I32(i)])
                store = builder.store(line, place, align=64 if past_cache else size)
                if past_cache:
                    store.set_metadata("nontemporal", hint)
            return context.get_dummy_value()

        return types.void(target, types.uintp, buffer), codegen

    return store_strip


stream_strip, store_strip = (
    _strip_store(past_cache=True),
    _strip_store(past_cache=False),
)
stream_halves = _strip_store(past_cache=True, halves=True)


@intrinsic
def fence(typingctx):
    """Make streamed lines visible before anything that follows."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen
