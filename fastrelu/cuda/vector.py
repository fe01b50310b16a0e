"""How each dtype is read, computed and written on a GPU, 16 bytes at a time.

Numba makes no 16-byte accesses of its own, and it computes half floats by calls to a
library.  The primitives below say both in LLVM's words.  Each has a twin for Numba's
simulator, which cannot run them: there a pointer is an address in the host's memory.

A vector is a tuple of numbers, in the type that products are computed in.
"""

import ctypes
import functools
import inspect
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, types

from fastrelu._functions import bound, rebuild
from fastrelu.cuda.config import BYTES, SIMULATED

Function = Callable[..., Any]


@dataclass(frozen=True)
class Format:
    """One dtype as the kernels see it."""

    name: str
    storage: Any  # the Numba type that it is stored as
    compute: Any  # and that of every product
    paired: bool = False  # the device rounds two floats to halves at once

    @property
    def width(self) -> int:
        """The elements in a vector."""
        return 8 * BYTES // int(self.storage.bitwidth)

    @property
    def pointer(self) -> Any:
        """The type of a kernel's argument."""
        return types.CPointer(self.storage)

    @property
    def scalar(self) -> Any:
        """NumPy's type of every product."""
        return getattr(np, str(self.compute))


def format_of(name: str, capability: tuple[int, int]) -> Format:
    """Return the format of a dtype on devices of a compute capability."""
    if name in ("float16", "bfloat16"):
        return Format(name, types.uint16, types.float32, capability >= (8, 0))
    number = getattr(types, name)
    return Format(name, number, number)


if not SIMULATED:
    from llvmlite import ir
    from numba.core import typing
    from numba.cuda.extending import intrinsic

    _I1, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
    _HALF, _FLOAT = ir.HalfType(), ir.FloatType()
    _WORDS = ir.VectorType(_I32, 4)

    inlined = cuda.jit(device=True, inline="always")

    def _widen(fmt, builder, value):
        """Turn what was stored into a number to compute with."""
        if fmt.name == "float16":
            return builder.fpext(builder.bitcast(value, _HALF), _FLOAT)
        if fmt.name == "bfloat16":
            return builder.bitcast(
                builder.shl(builder.zext(value, _I32), _I32(16)), _FLOAT
            )
        return value

    def _narrow(fmt, builder, value):
        """Turn a number into what is stored, rounded to nearest, ties to even."""
        if fmt.name == "float16":
            return builder.bitcast(builder.fptrunc(value, _HALF), _I16)
        if fmt.name == "bfloat16" and fmt.paired:
            return builder.trunc(_narrow_pair(fmt, builder, value, value), _I16)
        if fmt.name == "bfloat16":
            bits = builder.bitcast(value, _I32)
            odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
            half = builder.add(bits, builder.add(odd, _I32(0x7FFF)))
            quiet = builder.or_(bits, _I32(0x400000))
            is_nan = builder.fcmp_unordered("uno", value, value)
            bits = builder.select(is_nan, quiet, half)
            return builder.trunc(builder.lshr(bits, _I32(16)), _I16)
        return value

    def _narrow_pair(fmt, builder, low, high):
        """Turn two floats into a word that holds both as halves."""
        to = "bf16x2" if fmt.name == "bfloat16" else "f16x2"
        convert = ir.InlineAsm(
            ir.FunctionType(_I32, [_FLOAT, _FLOAT]),
            f"cvt.rn.{to}.f32 $0, $1, $2;",
            "=r,f,f",
        )
        return builder.call(convert, [high, low])

    def _vector_type(context, fmt):
        """Return the type of 16 bytes: LLVM splits vectors of small elements."""
        if fmt.storage.bitwidth < 32:
            return _WORDS
        return ir.VectorType(context.get_data_type(fmt.storage), fmt.width)

    def _read_vector(fmt, context, builder, place):
        type_ = _vector_type(context, fmt)
        vector = builder.load(builder.bitcast(place, type_.as_pointer()), align=BYTES)
        parts = [builder.extract_element(vector, _I32(k)) for k in range(type_.count)]
        if type_ is _WORDS:
            element, bits = context.get_data_type(fmt.storage), fmt.storage.bitwidth
            parts = [
                builder.trunc(builder.lshr(word, _I32(shift)), element)
                for word in parts
                for shift in range(0, 32, bits)
            ]
        return [_widen(fmt, builder, part) for part in parts]

    def _write_vector(fmt, context, builder, place, values):
        type_ = _vector_type(context, fmt)
        if fmt.paired:
            pairs = zip(values[::2], values[1::2], strict=True)
            parts = [_narrow_pair(fmt, builder, *pair) for pair in pairs]
        else:
            parts = [_narrow(fmt, builder, value) for value in values]
        if type_ is _WORDS and not fmt.paired:
            bits = fmt.storage.bitwidth
            words = [
                [
                    builder.shl(builder.zext(part, _I32), _I32(k * bits))
                    for k, part in enumerate(parts[first : first + 32 // bits])
                ]
                for first in range(0, fmt.width, 32 // bits)
            ]
            parts = [functools.reduce(builder.or_, word) for word in words]
        vector = ir.Constant(type_, ir.Undefined)
        for k, part in enumerate(parts):
            vector = builder.insert_element(vector, part, _I32(k))
        builder.store(vector, builder.bitcast(place, type_.as_pointer()), align=BYTES)

    def _where(builder, condition, then, otherwise):
        """Return what `then()` makes where the condition holds."""
        before = builder.block
        with builder.if_then(condition):
            value = then()
            inside = builder.block
        phi = builder.phi(otherwise.type)
        phi.add_incoming(otherwise, before)
        phi.add_incoming(value, inside)
        return phi

    class Reader(NamedTuple):
        """How a vector is read: from which pointer, and as which type."""

        pointer: Any
        type_: Any
        read: Function  # (context, builder, pointer, place, end) -> its numbers

    def reader(fmt, width, *, part=False, aligned=True):
        """Return how the vector at p[i] is read; zeros from `end` on, in part.

        What is not aligned is read element by element.
        """

        def read(context, builder, pointer, i, end):
            start = builder.gep(pointer, [i])

            def one(k):
                return _widen(fmt, builder, builder.load(builder.gep(start, [_I64(k)])))

            if part:
                zero = context.get_constant(fmt.compute, 0)
                return [
                    _where(
                        builder,
                        builder.icmp_signed("<", builder.add(i, _I64(k)), end),
                        functools.partial(one, k),
                        zero,
                    )
                    for k in range(width)
                ]
            if width == 1 or not aligned:
                return [one(k) for k in range(width)]
            return _read_vector(fmt, context, builder, start)

        return Reader(fmt.pointer, fmt.compute, read)

    def half(fmt, type_):
        """Return how a number of Numba's own type of half floats is read and made."""

        @intrinsic
        def widened(typingctx, value):
            def codegen(context, builder, signature, args):
                return _widen(fmt, builder, builder.bitcast(args[0], _I16))

            return fmt.compute(type_), codegen

        @intrinsic
        def narrowed(typingctx, value):
            def codegen(context, builder, signature, args):
                made = context.get_value_type(type_)
                return builder.bitcast(_narrow(fmt, builder, args[0]), made)

            return type_(fmt.compute), codegen

        return widened, narrowed

    def bits_reader(width, *, part=False):
        """Return how the mask bits from i on are read."""

        def read(context, builder, pointer, i, end):
            place = builder.gep(pointer, [builder.ashr(i, _I64(3))])

            def byte(k):
                return builder.zext(builder.load(builder.gep(place, [_I64(k)])), _I32)

            word = byte(0)
            for k in range(1, width // 8):
                if part:
                    more = builder.icmp_signed("<", builder.add(i, _I64(8 * k)), end)
                    high = _where(builder, more, functools.partial(byte, k), _I32(0))
                else:
                    high = byte(k)
                word = builder.or_(word, builder.shl(high, _I32(8 * k)))
            if width < 8:
                shift = builder.and_(builder.trunc(i, _I32), _I32(7))
                word = builder.lshr(word, shift)
            bits = [builder.lshr(word, _I32(k)) for k in range(width)]
            return [builder.trunc(bit, _I1) for bit in bits]

        return Reader(types.CPointer(types.uint8), types.boolean, read)

    def load(fmt, width, *, part=False, aligned=True):
        """Return `get(p, i, end)`, which reads a vector as `reader` says."""
        pointer, type_, read = reader(fmt, width, part=part, aligned=aligned)
        vector = types.UniTuple(type_, width)

        @intrinsic
        def get(typingctx, p, i, end):
            def codegen(context, builder, signature, args):
                values = read(context, builder, *args)
                return context.make_tuple(builder, signature.return_type, values)

            return vector(pointer, types.int64, types.int64), codegen

        return get

    def store(fmt, width, *, part=False, aligned=True):
        """Return `put(p, i, end, values)`: write them to p[i:], in part up to `end`."""
        vector = types.UniTuple(fmt.compute, width)

        @intrinsic
        def put(typingctx, p, i, end, values):
            def codegen(context, builder, signature, args):
                start = builder.gep(args[0], [args[1]])
                numbers = [builder.extract_value(args[3], k) for k in range(width)]

                def one(k):
                    value = _narrow(fmt, builder, numbers[k])
                    builder.store(value, builder.gep(start, [_I64(k)]))

                if part:
                    for k in range(width):
                        at = builder.add(args[1], _I64(k))
                        with builder.if_then(builder.icmp_signed("<", at, args[2])):
                            one(k)
                elif width == 1 or not aligned:
                    for k in range(width):
                        one(k)
                else:
                    _write_vector(fmt, context, builder, start, numbers)
                return context.get_dummy_value()

            arguments = fmt.pointer, types.int64, types.int64, vector
            return types.void(*arguments), codegen

        return put

    def _lanes(builder, type_, value, width):
        """Return the type of one lane, and its value for each: scalars have but one."""
        if isinstance(type_, types.BaseTuple):
            return type_.dtype, [builder.extract_value(value, k) for k in range(width)]
        return type_, [value] * width

    _number = itertools.count()

    @functools.cache
    def _linked(function):
        """Return a function that Numba compiles, though it calls plain ones.

        Numba keeps by the code object what it has compiled, which functions with other
        globals may share: so it gets one of its own.
        """
        own = bound(function, inlined).py_func
        name = f"{function.__name__}_{next(_number)}"
        code = own.__code__.replace(co_name=name)
        rest = own.__defaults__, own.__closure__
        return FunctionType(code, own.__globals__, name, *rest)

    def _call(context, builder, function, *operands):
        """Return the type and the value of what a function makes of such pairs.

        It is compiled once, and inlined by LLVM.
        """
        code, held = function.__code__, function.__globals__
        if code.co_flags & inspect.CO_VARARGS:
            called = {
                name: functools.partial(_call, context, builder, held[name])
                for name in code.co_names
                if type(held.get(name)) is FunctionType
            }
            if called:  # which may be all it does: Numba inlines no calls with *numbers
                return rebuild(function, function.__name__, called)(*operands)
            rest = operands[code.co_argcount :]
            type_ = types.BaseTuple.from_types(tuple(type_ for type_, _ in rest))
            packed = context.make_tuple(builder, type_, [value for _, value in rest])
            operands = *operands[: code.co_argcount], (type_, packed)
        types_, values = zip(*operands, strict=True)
        inner = typing.signature(None, *types_)
        made = context.compile_subroutine(builder, _linked(function), inner)
        value = context.call_internal(builder, made.fndesc, made.signature, values)
        return made.signature.return_type, value

    def _apply(function, result, context, builder, operands, width):
        """Call a function for each lane, and have all results of one type."""
        types_, values = zip(*operands, strict=True)
        found = []
        for k in range(width):
            lane = zip(types_, (of[k] for of in values), strict=True)
            type_, value = _call(context, builder, function, *lane)
            found.append(context.cast(builder, value, type_, result))
        return found

    def each(function, result, width, takes=None):
        """Return `apply(operands)`: the function of vectors and scalars, lane by lane.

        Of those in the tuple it is given the first ones, so many as it takes.
        """
        vector = types.UniTuple(result, width)

        @intrinsic
        def apply(typingctx, operands):
            def codegen(context, builder, signature, args):
                given = [
                    _lanes(builder, type_, builder.extract_value(args[0], k), width)
                    for k, type_ in enumerate(operands)
                ]
                values = _apply(
                    function, result, context, builder, given[:takes], width
                )
                return context.make_tuple(builder, signature.return_type, values)

            return vector(operands), codegen

        return apply

    def element(function, result, width, readers):
        """Return `value(pointers, places, rest, end)`: the function, lane by lane.

        An operand with a reader is at the next of the places, or all are at the one;
        any other is the next of the rest.
        """
        vector = types.UniTuple(result, width)

        @intrinsic
        def value(typingctx, pointers, places, rest, end):
            def codegen(context, builder, signature, args):
                operands, number = [], itertools.count()
                others = iter(enumerate(rest))
                for reader in readers:
                    if reader is None:
                        k, type_ = next(others)
                        given = builder.extract_value(args[2], k)
                        operands.append(_lanes(builder, type_, given, width))
                    else:
                        k, place = next(number), args[1]
                        if isinstance(places, types.BaseTuple):
                            place = builder.extract_value(place, k)
                        where = builder.extract_value(args[0], k), place, args[3]
                        read = reader.read(context, builder, *where)
                        operands.append((reader.type_, read))
                values = _apply(function, result, context, builder, operands, width)
                return context.make_tuple(builder, signature.return_type, values)

            return vector(pointers, places, rest, types.int64), codegen

        return value

    def multiply(fmt):
        """Return a product that is never fused with a sum: all see the same."""
        type_ = "f64" if fmt.compute == types.float64 else "f32"
        letter = "d" if fmt.compute == types.float64 else "f"

        @intrinsic
        def product(typingctx, a, b):
            def codegen(context, builder, signature, args):
                number_type = context.get_value_type(fmt.compute)
                code = ir.InlineAsm(
                    ir.FunctionType(number_type, [number_type, number_type]),
                    f"mul.rn.{type_} $0, $1, $2;",
                    f"={letter},{letter},{letter}",
                )
                return builder.call(code, args)

            return fmt.compute(fmt.compute, fmt.compute), codegen

        return product

    def pack(width):
        """Return `flags(values)`: bit k is the truth of values[k]."""

        @intrinsic
        def flags(typingctx, values):
            def codegen(context, builder, signature, args):
                word = _I32(0)
                for k in range(width):
                    bit = builder.zext(builder.extract_value(args[0], k), _I32)
                    word = builder.or_(word, builder.shl(bit, _I32(k)))
                return word

            return types.int32(types.UniTuple(types.boolean, width)), codegen

        return flags

    def put_flags(width):
        """Return `put(p, i, end, flags)`, which writes the mask bits of a vector.

        Every thread of a warp has to call it, with i growing by `width`.
        """
        if width >= 8:
            count = width // 8

            @inlined
            def put(p, i, end, flags):
                for k in range(count):
                    if i + 8 * k < end:
                        p[(i >> 3) + k] = np.uint8(flags >> (8 * k))

        elif width == 4:

            @inlined
            def put(p, i, end, flags):
                high = cuda.shfl_down_sync(0xFFFFFFFF, flags, 1)
                if i < end and i & 7 == 0:
                    p[i >> 3] = np.uint8(flags | high << 4)

        else:

            @inlined
            def put(p, i, end, flags):
                high = cuda.shfl_down_sync(0xFFFFFFFF, flags, 1)
                four = np.int32(flags | high << 2)
                high = cuda.shfl_down_sync(0xFFFFFFFF, four, 2)
                if i < end and i & 7 == 0:
                    p[i >> 3] = np.uint8(four | high << 4)

        return put

    def unravel(rank, *, wide):
        """Return `place(i, shape)`: the index along each axis of element i."""
        lengths = types.UniTuple(types.int64, rank)
        # Divisions of 64-bit numbers cost ten times as much.
        type_ = _I64 if wide else _I32

        @intrinsic
        def place(typingctx, i, shape):
            def codegen(context, builder, signature, args):
                rest, indices = args[0], []
                rest = builder.trunc(rest, type_) if type_ is _I32 else rest
                for axis in range(rank - 1, 0, -1):
                    length = builder.extract_value(args[1], axis)
                    length = builder.trunc(length, type_) if type_ is _I32 else length
                    quotient = builder.udiv(rest, length)
                    indices.append(builder.sub(rest, builder.mul(quotient, length)))
                    rest = quotient
                indices.append(rest)
                if type_ is _I32:
                    indices = [builder.zext(index, _I64) for index in indices]
                return context.make_tuple(builder, signature.return_type, indices[::-1])

            return lengths(types.int64, lengths), codegen

        return place

    def offsets(rank, count):
        """Return `at(place, strides)`: where so many arrays have the element, each.

        The strides, in elements, are those of one array after the other's.
        """
        arguments = (
            types.UniTuple(types.int64, rank),
            types.UniTuple(types.int64, rank * count),
        )

        @intrinsic
        def at(typingctx, place, strides):
            def codegen(context, builder, signature, args):
                place, strides = args
                found = []
                for first in range(0, rank * count, rank):
                    terms = [
                        builder.mul(
                            builder.extract_value(place, k),
                            builder.extract_value(strides, first + k),
                        )
                        for k in range(rank)
                    ]
                    found.append(functools.reduce(builder.add, terms))
                return context.make_tuple(builder, signature.return_type, found)

            return types.UniTuple(types.int64, count)(*arguments), codegen

        return at

    def spill(fmt, width):
        """Return `put(array, i, values)`, which writes a vector to shared memory."""
        vector = types.UniTuple(fmt.compute, width)

        @intrinsic
        def put(typingctx, array, i, values):
            def codegen(context, builder, signature, args):
                data = context.make_array(array)(context, builder, args[0]).data
                for k in range(width):
                    place = builder.gep(data, [builder.add(args[1], _I64(k))])
                    builder.store(builder.extract_value(args[2], k), place)
                return context.get_dummy_value()

            return types.void(array, types.int64, vector), codegen

        return put

else:  # the same in Python

    def inlined(function):
        return function

    def _memory(name, p, i, count):
        """Show so many elements from p[i] on as an array."""
        dtype = np.dtype(name)
        place = int(p) + int(i) * dtype.itemsize
        buffer = (ctypes.c_ubyte * (count * dtype.itemsize)).from_address(place)
        return np.frombuffer(buffer, dtype)

    def load(fmt, width, *, part=False, aligned=True):
        def get(p, i, end):
            count = int(min(width, end - i)) if part else width
            values = _memory(fmt.name, p, i, max(count, 0))
            numbers = [fmt.scalar(value) for value in values]
            return tuple(numbers + [fmt.scalar(0)] * (width - len(numbers)))

        return get

    reader = load

    def bits_reader(width, *, part=False):
        def get(p, i, end):
            count = int(min(width, end - i)) if part else width
            stored = _memory("uint8", p, i >> 3, ((int(i) & 7) + count + 7) >> 3)
            flags = np.unpackbits(stored, bitorder="little")[int(i) & 7 :]
            flags = [bool(flag) for flag in flags[:count]]
            return tuple(flags + [False] * (width - count))

        return get

    def store(fmt, width, *, part=False, aligned=True):
        def put(p, i, end, values):
            count = int(min(width, end - i)) if part else width
            with np.errstate(all="ignore"):
                stored = np.array(values[:count], fmt.scalar).astype(fmt.name)
            _memory(fmt.name, p, i, count)[:] = stored

        return put

    def each(function, result, width, takes=None):
        def apply(operands):
            given = operands[:takes]
            with np.errstate(all="ignore"):
                return tuple(
                    function(*(o[k] if isinstance(o, tuple) else o for o in given))
                    for k in range(width)
                )

        return apply

    def element(function, result, width, readers):
        apply = each(function, result, width)

        def value(pointers, places, rest, end):
            places = places if isinstance(places, tuple) else [places] * len(pointers)
            at, following = zip(pointers, places, strict=False), iter(rest)
            return apply(
                tuple(
                    reader(*next(at), end) if reader else next(following)
                    for reader in readers
                )
            )

        return value

    def multiply(fmt):
        return lambda a, b: a * b

    def pack(width):
        return lambda values: sum(int(flag) << k for k, flag in enumerate(values))

    _turn = threading.Lock()  # two simulated threads write parts of one byte

    def put_flags(width):
        def put(p, i, end, flags):
            last = (int(end) + 7) // 8 * 8  # the rest of the last byte is zeros
            for k in range(max(0, min(width, last - int(i)))):
                byte = _memory("uint8", p, (i + k) >> 3, 1)
                bit = 1 << ((int(i) + k) & 7)
                with _turn:
                    byte[0] = int(byte[0]) & ~bit | bit * (int(flags) >> k & 1)

        return put

    def unravel(rank, *, wide):
        return lambda i, shape: np.unravel_index(int(i), shape)

    def offsets(rank, count):
        def at(place, strides):
            strides = np.reshape(strides, (count, rank))
            return tuple(int(np.dot(place, steps)) for steps in strides)

        return at

    def spill(fmt, width):
        def put(array, i, values):
            for k in range(width):
                array[i + k] = values[k]

        return put
