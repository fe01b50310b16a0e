"""How each dtype is read, computed and written, in LLVM's words.

Numba's CPU target knows neither half floats, nor bit masks, nor stores that bypass the
cache.  The intrinsics below add them.  They are plain LLVM vector code, which every
target can lower, so nothing here belongs to one processor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from fastrelu.cpu.jit import inlined, new_array

WORD = 64  # elements whose mask bits are packed at once; every chunk is cut at one

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
def round_to_odd(value):
    """Return a float64 as a float32 that may be rounded once more, to a half float.

    Cut off, and odd if anything was: so a tie is one, and what is beside it is not.
    """
    nearest = np.float32(value)
    bits = _float_bits(nearest)
    if np.isnan(value) or np.float64(nearest) == value:
        return nearest
    if abs(np.float64(nearest)) > abs(value):
        bits -= np.uint32(1)
    return _bits_float(np.uint32(bits | np.uint32(1)))


@inlined
def _same(value):
    return value


@inlined
def _bfloat16_to_float(bits):
    return _bits_float(np.uint32(bits) << np.uint32(16))


@inlined
def _float_to_bfloat16(value):
    bits = _float_bits(value)
    # Half a unit in the last place, less one where the kept bit is even: ties to even.
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = bits | np.uint32(0x400000) if np.isnan(value) else np.uint32(bits + half)
    return np.uint16(rounded >> np.uint32(16))


@inlined
def _half_to_float_by_bits(half):
    magnitude = np.uint32(half & np.uint16(0x7FFF)) << np.uint32(13)
    sign = np.uint32(half & np.uint16(0x8000)) << np.uint32(16)
    if magnitude >= np.uint32(0x0F800000):  # infinity or NaN
        return _bits_float(sign | magnitude | np.uint32(0x7F800000))
    scaled = _bits_float(magnitude) * np.float32(2.0**112)  # exact, subnormals included
    return _bits_float(sign | _float_bits(scaled))


@inlined
def _float_to_half_by_bits(value):
    bits = _float_bits(value)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    if magnitude > np.uint32(0x7F800000):
        half = np.uint32(0x7E00)
    elif magnitude >= np.uint32(0x47800000):  # 65536 and above
        half = np.uint32(0x7C00)
    elif magnitude < np.uint32(0x38800000):  # subnormal: let the addition round
        half = _float_bits(_bits_float(magnitude) + np.float32(0.5)) - np.uint32(
            0x3F000000
        )
    else:  # a carry out of the fraction is the right exponent, up to infinity
        odd = (magnitude >> np.uint32(13)) & np.uint32(1)
        half = (
            magnitude - np.uint32(0x38000000) + np.uint32(0xFFF) + odd
        ) >> np.uint32(13)
    return np.uint16(sign | half)


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
class Lane:
    """One dtype as the loops see it."""

    name: str
    storage: np.dtype[Any]  # what the loops index: the dtype itself, or uint16
    compute: Any  # the Numba type of every product
    load: Any  # storage -> a number
    store: Any  # a number -> storage
    active: Any  # active(x, first): the mask bits of the WORD elements from there

    @property
    def product(self) -> np.dtype[Any]:
        """The dtype of every product."""
        return np.dtype(str(self.compute))


def _tester(positive: Callable[[Any, Any], Any]) -> Any:
    """Return `active(x, first)`; `positive` tests a vector of 64 stored values."""

    @intrinsic
    def active(typingctx, x, first):
        def codegen(context, builder, signature, args):
            element = context.get_value_type(x.dtype)
            source = _pointer(context, builder, x, args[0], element)
            source = builder.bitcast(
                builder.gep(source, [args[1]]),
                ir.VectorType(element, WORD).as_pointer(),
            )
            value = builder.load(source, align=1)
            return builder.bitcast(positive(builder, value), ir.IntType(WORD))

        return types.uint64(x, types.uintp), codegen

    return active


@intrinsic
def put_word(typingctx, bits, place, word):
    """Write the mask bits of a word to bits[8 * place:]."""

    def codegen(context, builder, signature, args):
        target = _pointer(context, builder, bits, args[0], ir.IntType(WORD))
        builder.store(args[2], builder.gep(target, [args[1]]), align=1)
        return context.get_dummy_value()

    return types.void(bits, types.uintp, types.uint64), codegen


def _pointer(context: Any, builder: Any, array: Any, value: Any, element: Any) -> Any:
    """Return the address of an array's first element as a pointer to `element`."""
    data = context.make_array(array)(context, builder, value).data
    return builder.bitcast(data, element.as_pointer())


def _splat(vector: Any, number: float) -> Any:
    return ir.Constant(vector.type, [number] * WORD)


def _positive_bits(infinity: int) -> Callable[[Any, Any], Any]:
    """Test 16-bit floats as integers: 1 <= bits <= infinity."""

    def positive(builder: Any, value: Any) -> Any:
        below = builder.sub(value, _splat(value, 1))
        return builder.icmp_unsigned("<", below, _splat(value, infinity))

    return positive


_active_float = _tester(lambda b, v: b.fcmp_ordered(">", v, _splat(v, 0.0)))
_active_signed = _tester(lambda b, v: b.icmp_signed(">", v, _splat(v, 0)))
_active_unsigned = _tester(lambda b, v: b.icmp_unsigned("!=", v, _splat(v, 0)))


def _lane(dtype: np.dtype[Any]) -> Lane:
    active = {"f": _active_float, "i": _active_signed, "u": _active_unsigned}
    compute = numba.float32 if dtype == np.float32 else numba.float64
    return Lane(dtype.name, dtype, compute, _same, _same, active[dtype.kind])


_UINT16 = np.dtype(np.uint16)
_FLOAT16 = Lane(
    "float16",
    _UINT16,
    numba.float32,
    _half_to_float,
    _float_to_half,
    _tester(_positive_bits(0x7C00)),
)
_BFLOAT16 = Lane(
    "bfloat16",
    _UINT16,
    numba.float32,
    _bfloat16_to_float,
    _float_to_bfloat16,
    _tester(_positive_bits(0x7F80)),
)
_LANES = {np.dtype(code): _lane(np.dtype(code)) for code in "bBhHiIlLqQfd"}
_LANES[np.dtype(np.float16)] = _FLOAT16


def lane_of(dtype: np.dtype[Any]) -> Lane:
    """Return the lane of a native dtype that the arguments' check has let through."""
    return _LANES.get(dtype, _BFLOAT16)


@intrinsic
def unpack(typingctx, bits, flags, words):
    """Spread whole words of mask bits into bytes of 0 and 1."""

    def codegen(context, builder, signature, args):
        vector = ir.VectorType(_BYTE, WORD)
        source = _pointer(context, builder, bits, args[0], ir.IntType(WORD))
        target = _pointer(context, builder, flags, args[1], vector)
        with cgutils.for_range(builder, args[2]) as loop:
            word = builder.load(builder.gep(source, [loop.index]), align=1)
            active = builder.bitcast(word, ir.VectorType(_BIT, WORD))
            spread = builder.zext(active, vector)
            builder.store(spread, builder.gep(target, [loop.index]), align=1)
        return context.get_dummy_value()

    return types.void(bits, flags, types.intp), codegen


def buffer(number: int, element: types.Type | None = None) -> Any:
    """Return `space(like)`: an array of so many elements on the stack.

    They start on a cache line and are of like's type, unless one is given.
    """

    @intrinsic
    def space(typingctx, like):
        kind = types.Array(element or like.dtype, 1, "C")

        def codegen(context, builder, signature, args):
            size = context.get_abi_sizeof(context.get_data_type(kind.dtype))
            lines = ir.ArrayType(_LINE, -(-number * size // 64))
            space = cgutils.alloca_once(builder, lines)
            length = context.get_constant(types.intp, number)
            return new_array(context, builder, kind, space, length)

        return kind(like), codegen

    return space


def _word_store(past_cache: bool, halves: bool = False) -> Any:
    """Return `store(target, first, buffer)`: send WORD elements to target[first:].

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
    def store_word(typingctx, target, first, buffer):
        def codegen(context, builder, signature, args):
            element = context.get_data_type(target.dtype)
            size = context.get_abi_sizeof(element)
            to = _pointer(context, builder, target, args[0], element)
            to = builder.bitcast(builder.gep(to, [args[1]]), _LINE.as_pointer())
            start = _pointer(context, builder, buffer, args[2], _LINE)
            hint = builder.module.add_metadata([ir.Constant(_I32, 1)])
            lines = [
                builder.load(builder.gep(start, [_I32(i)]), align=64)
                for i in range(WORD * size // 64)
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

    return store_word


stream_word, store_word = _word_store(past_cache=True), _word_store(past_cache=False)
stream_halves = _word_store(past_cache=True, halves=True)


@intrinsic
def fence(typingctx):
    """Make streamed lines visible before anything that follows."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen
