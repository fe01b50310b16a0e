"""Any arguments at all: a right result, or an error that names one of them.

``python tests/test_fuzz.py FIRST COUNT NOTE`` tries so many cases, each made from its
number, and notes the number first, so that a crash says which case it was.
"""

import decimal
import fractions
import inspect
import math
import operator
import os
import random
import re
import sys
import warnings

import numpy as np
import pytest
import reference
from conftest import (
    FLOATS,
    INTEGERS,
    dtype_of,
    floats_here,
    run_command,
    sample,
)
from reference import assert_same, assert_weight_gradient, native

import fastrelu as F
from fastrelu import activations

# All kinds of operands but the slopes of rrelu, whose own tests are in test_rrelu.py.
NAMED = "relu", "leaky_relu", "prelu", "relu6", "squared_relu", "threshold"
FUNCTIONS = [
    (name, function)
    for name in NAMED
    for row in [activations.ACTIVATIONS[name]]
    for function in (row.forward, row.backward)
]
NUMBERS = "negative_slope", "threshold", "value"
NAMES = [
    "x",
    "grad_output",
    "saved",
    "weight",
    "axis",
    "negative_slope",
    "inplace",
    "out",
    "return_mask",
]
FLOAT_TYPES = [dtype_of(name) for name in floats_here()]
INTEGER_TYPES = [np.dtype(code) for code in "bBhHiIlLqQ"]
POOLS = {dtype: sample((1 << 15,), dtype) for dtype in (*FLOAT_TYPES, *INTEGER_TYPES)}
SIDES = (0, 1, 1, 2, 3, 4, 5, 7, 9, 17)
BEYOND = 1 << 47  # bytes: what no address space has


def fails(*_):
    raise RuntimeError


class Odd(np.ndarray):
    """An array that answers no question about itself"""

    dtype = shape = strides = flags = ndim = size = nbytes = property(fails)
    __array_function__ = fails


def odd(name, value):
    return type("Odd", (), {name: value})()


SPECIAL = (
    "array array_interface array_struct cuda_array_interface float index len class"
)
ODD_OBJECTS = [
    *(odd(f"__{name}__", property(fails)) for name in SPECIAL.split()),
    *(odd(f"__{name}__", fails) for name in ("array", "float", "index", "len", "bool")),
    *(odd(name, property(fails)) for name in ("dtype", "shape")),
    *(odd("__array_interface__", value) for value in ({}, {"shape": (2,)}, 1, None)),
    odd("__array__", lambda self, dtype=None, copy=None: 5),
    odd("__array__", lambda self, dtype=None, copy=None: np.ones(3, np.float32)),
    odd("__class__", np.ndarray),
    odd("__class__", tuple),
    odd("__class__", float),
]
SLOPES = [
    0,
    1,
    -3,
    0.3,
    -0.0,
    2.0,
    1e39,
    1e-60,
    10**30,
    True,
    np.True_,
    None,
    "0.1",
    1j,
]
SLOPES += [math.nan, math.inf, 10**400, 10**5000, fractions.Fraction(1, 3), [0.1], b"1"]
SLOPES += [decimal.Decimal("0.1"), np.float16(0.3), np.float32(0.3), np.longdouble(0.5)]
SLOPES += [np.int8(3), np.array(0.3), np.array([0.3]), np.timedelta64(1, "s")]
SLOPES += [fractions.Fraction(10**400), np.float32("nan"), np.longdouble("1e4000")]
AXES = [0, 1, 2, -1, -2, -3, 64, 2**31, 2**63, -(2**70), 10**5000, True, np.True_]
AXES += [np.int8(1), np.uint64(0), np.array(0), 1.0, "1", None, (1,), np.array([1])]
FLAGS = [True, False, np.True_, np.False_, 0, 1, None, "", [], np.array(True)]
ARRAYS = [None, 1, 1.5, -2, True, 1j, "1", b"1", [], [1.0, -2.0], [[1.0], [1.0, 2.0]]]
ARRAYS += [
    {},
    {1.0},
    object(),
    np.float32(-1),
    np.float64(-1),
    np.ma.masked,
    iter([1.0]),
]
ARRAYS += [np.zeros((2, 3), kind) for kind in ("?", "F", "g", "O", "S4", "U4", "V8")]
ARRAYS += [np.zeros(3, kind) for kind in ("M8[s]", "m8[s]", "f4,f4", ">f4", ">i8")]
ARRAYS += [
    np.ma.ones(3, "f4"),
    memoryview(np.ones(3, "f4")),
    decimal.Decimal(1),
    10**400,
]
ARRAYS += [np.broadcast_to(np.float32(1), (BEYOND,)), np.zeros((0, 2**40), "f4")]
JUNK = [*ODD_OBJECTS, *ARRAYS]


class Maker(random.Random):
    """Makes the arguments of one call, all writeable memory from one block"""

    def __init__(self, number):
        super().__init__(number)
        self.name, self.function = self.choice(FUNCTIONS)
        self.parameters = [*inspect.signature(self.function).parameters]
        integers = reference.DEFINITIONS[self.name].integers
        types = FLOAT_TYPES + INTEGER_TYPES if integers else FLOAT_TYPES
        self.dtype = self.choice(types)
        self.shape = self.any_shape()
        size = math.prod(self.shape) * self.dtype.itemsize
        nbytes = size * self.choice([1, 2, 6]) + self.choice([64, 512])
        pool = POOLS[self.dtype].view(np.uint8)
        self.memory = np.resize(np.roll(pool, -8 * self.randrange(999)), nbytes)

    def any_shape(self):
        kind = self.random()
        if kind < 0.003:
            return self.randrange(2, 400), self.randrange(100, 3000)
        if kind < 0.05:
            return (self.randrange(5000),)
        while True:
            shape = tuple(
                self.choice(SIDES) for _ in range(self.choice([0, 1, 2, 2, 3, 4]))
            )
            if math.prod(shape) < 2000:
                return shape

    def window(self, shape, dtype):
        """Elements anywhere in the block, with any strides that stay within"""
        kind, item = (
            self.choice(["c", "c", "dense", "step", "bytes", "repeat"]),
            dtype.itemsize,
        )
        order = [*range(len(shape))]
        if kind != "c":
            self.shuffle(order)
        dense, reach = [0] * len(shape), item
        for axis in reversed(order):
            dense[axis] = reach
            reach *= shape[axis]
        strides = dense
        if kind == "step":
            strides = [s * self.choice([1, -1, 2, -2]) for s in dense]
        elif kind == "bytes":
            strides = [self.randrange(-3 * item, 3 * item + 1) for _ in shape]
        elif kind == "repeat":
            strides = [s * self.choice([0, 1]) for s in dense]
        spans = [s * (n - 1) for s, n in zip(strides, shape, strict=True) if n]
        low, high = (
            sum(s for s in spans if s < 0),
            sum(s for s in spans if s > 0) + item,
        )
        room = self.memory.size - (high - low)
        if 0 in shape or room < 0:
            strides, low, room = dense, 0, max(self.memory.size - reach, 0)
        if 0 not in shape and self.memory.size < math.prod(shape) * item:
            return np.zeros(shape, dtype)
        start = self.randrange(room + 1)
        if self.random() < 0.8:
            start -= (start + low) % item if start >= item else 0
        return np.ndarray(shape, dtype, self.memory, start - low, strides)

    def array(self, shape):
        """An input as it should be"""
        a = self.window(shape, self.dtype)
        kind = self.random()
        if kind < 0.05:
            a.flags.writeable = False
        elif kind < 0.08 and a.dtype.kind in "iuf":
            a = a.view(a.dtype.newbyteorder())
        elif kind < 0.1:
            a = a.view(Odd)
        elif kind < 0.12:
            a = a.view(np.memmap)
        elif kind < 0.14 and a.dtype in (np.float64, np.int64):
            a = a.tolist()
        return a

    def mask(self):
        size = math.prod(self.shape)
        axes = (
            None
            if self.random() < 0.5
            else self.sample([*range(len(self.shape))], len(self.shape))
        )
        predicate = activations.ACTIVATIONS[self.name].spec.predicate or "x > 0"
        if self.random() < 0.1:
            predicate = self.choice(["x > 0", "0 < x < 6", "", "x"])
        bits = self.window((-(-size // 8),), np.dtype(np.uint8))
        order = None if axes is None else tuple(axes)
        mask = F.Mask(bits, self.shape, order, predicate)
        if self.random() < 0.2:
            mask.bits = self.choice([self.window((size // 9,), mask.bits.dtype), *JUNK])
        if self.random() < 0.2:
            mask.shape = self.choice([self.any_shape(), [*self.shape], *JUNK])
        return mask

    def weight(self, axis):
        shapes = [(), (1,), tuple(self.choice([1, n]) for n in self.shape)]
        if -len(self.shape) <= axis < len(self.shape):
            shapes += [(self.shape[axis],)] * 4
        mixed = self.dtype.itemsize == 2 and self.random() < 0.3
        return self.window(
            self.choice(shapes), np.dtype(np.float32) if mixed else self.dtype
        )

    def out(self, given):
        kind = self.random()
        if kind < 0.3:
            return self.window(self.shape, self.dtype)
        return self.choice([None, None, *given.values()]) if kind < 0.4 else None

    def argument(self, name, given):
        if name in ("x", "grad_output"):
            return self.array(self.shape)
        if name == "saved":
            return self.mask() if self.random() < 0.4 else self.array(self.shape)
        if name == "axis":
            return self.choice([1, 1, 0, -1])
        if name == "weight":
            return self.weight(1)
        if name in NUMBERS:
            return self.choice([0.01, 0.01, self.choice(SLOPES)])
        if name == "out":
            out = self.out(given)
            if "weight" in given and self.random() < 0.3:
                own = isinstance(given["weight"], np.ndarray)
                shape, dtype = given["weight"].shape, given["weight"].dtype
                out = out, self.window(shape, dtype) if own else None
            return out
        return self.random() < 0.2

    def wrong(self, name):
        if name in ("x", "grad_output", "saved", "weight", "out"):
            dtype = self.choice(FLOAT_TYPES + INTEGER_TYPES)
            strange = self.window(self.any_shape(), dtype)
            return self.choice(
                [strange, self.choice(JUNK), (strange, self.choice(JUNK))]
            )
        values = SLOPES if name in NUMBERS else AXES if name == "axis" else FLAGS
        return self.choice([*values, self.choice(JUNK)])

    def make(self):
        given = {}
        for name in self.parameters:
            given[name] = self.argument(name, given)
        if self.random() < 0.5:
            for name in self.sample(self.parameters, self.choice([1, 1, 2])):
                given[name] = self.wrong(name)
        return given


# What the contract says, in other words than the package's


def readable(value, integers=False):
    """The array that an input stands for, or None"""
    if issubclass(type(value), np.ma.MaskedArray):
        return None
    try:
        a = np.asarray(value)
    except Exception:  # noqa: BLE001 (whatever the object raises)
        return None
    fine = a.dtype.kind in "iufV" and a.dtype.names is None
    known = a.dtype.name in FLOATS or (integers and a.dtype.name in INTEGERS)
    return a if fine and known and a.dtype.char != "g" else None


def writeable(value, model):
    """The array behind an output that will do, or None"""
    kind = type(value)
    if not issubclass(kind, np.ndarray) or issubclass(kind, np.ma.MaskedArray):
        return None
    a = np.asarray(value)
    fine = a.dtype == native(model.dtype) and a.shape == model.shape
    if not (fine and a.dtype.isnative and a.flags.writeable):
        return None
    if a.size > 1 and not a.flags.c_contiguous:
        where = np.zeros(a.shape, np.int64)
        for axis, (n, stride) in enumerate(zip(a.shape, a.strides, strict=True)):
            where += np.arange(n).reshape(-1, *[1] * (a.ndim - 1 - axis)) * stride
        if np.diff(np.sort(where, axis=None)).min() < a.itemsize:
            return None
    return a


def boolean(value):
    return issubclass(type(value), (bool, np.bool_))


class Wrong(Exception):
    """The contract does not allow these arguments"""


def need(value):
    if value is None or value is False:
        raise Wrong
    return value


def is_number(value):
    return issubclass(type(value), (int, float, np.generic))


def is_plain_number(value):
    """Of Python's, or a list of them: such take the dtype of what they go with"""
    if issubclass(type(value), (list, tuple)):
        return all(map(is_plain_number, value))
    return is_number(value) and not issubclass(type(value), (bool, np.generic))


def told(value):
    """The array that says what was active: of any real dtype, or of bools"""
    try:
        a = np.asarray(value)
    except Exception:  # noqa: BLE001
        return None
    if issubclass(type(value), np.ma.MaskedArray) or a.dtype != np.bool_:
        return readable(value, True)
    return a


def for_all(value, model):
    """One number as the gradient of every element"""
    if is_plain_number(value):
        in_dtype(value, np.float64)
        floats = model.dtype.name in FLOATS
        dtype = model.dtype if floats else np.result_type(type(value)(0), model.dtype)
        small = in_dtype(value, native(dtype))
        need(dtype.kind == "f" or floats or small == value)
        value = small
    return np.full(model.shape, value)


def in_dtype(value, dtype):
    """Numbers of Python's in a dtype, where all stay finite"""
    try:
        wide = np.array(value)
    except ValueError:  # of other lengths
        need(None)
    need(wide.dtype.kind in "iuf")
    with np.errstate(all="ignore"):
        result = wide.astype(dtype)
    need((np.isfinite(result) == np.isfinite(wide)).all())
    return result


def passing(a, name, numbers):
    """What was active, asked in the dtype of the forward pass"""
    if a.dtype == np.bool_:
        return a
    with np.errstate(all="ignore"):
        if a.dtype.name in INTEGERS:
            a = a.astype(np.float64)
        return reference.active(a, name, **numbers)


def understood(name, given):
    """The copies that a result follows from, and where it is to be written"""
    integers = reference.DEFINITIONS[name].integers
    names = [*given]
    first, backward = given[names[0]], names[0] == "grad_output"
    second = given.get("saved", given.get("x") if backward else None)
    inplace = given["inplace"]
    need(boolean(inplace))
    if backward and is_number(first) and not is_number(second) and not inplace:
        if type(second) is F.Mask:
            try:
                need(all(type(n) is int and n >= 0 for n in second.shape))
                model = np.broadcast_to(True, second.shape)
            except (AttributeError, TypeError, ValueError):
                need(None)
        else:
            model = need(told(second))
        first = need(readable(for_all(first, model), integers))
    else:
        first = need(readable(first, integers))
    arrays = [first]
    more = {}
    for number in NUMBERS:
        if number not in given:
            continue
        slope = given[number]
        if issubclass(type(slope), np.ndarray) and slope.ndim == 0:
            slope = slope[()]
        kind = type(slope)
        real = issubclass(kind, (int, float, fractions.Fraction, np.number))
        need(real and not issubclass(kind, (bool, np.timedelta64, np.complexfloating)))
        try:
            more[number] = float(slope)
        except OverflowError:
            need(None)
        need(math.isfinite(more[number]))
        with np.errstate(over="ignore"):
            rounded = reference.compute_type(first.dtype).type(float(slope))
        need(bool(np.isfinite(rounded)))
    if type(second) is F.Mask and "saved" in given:
        try:
            mask = F.Mask(second.bits, second.shape, second._axes, second.predicate)
        except (TypeError, ValueError):
            need(None)
        need(mask.shape == first.shape)
        need(mask.predicate == activations.ACTIVATIONS[name].spec.predicate)
        arrays.append(standing_for(mask.unpack(), name, first))
    elif backward and "saved" in given and activations.ACTIVATIONS[name].takes_mask:
        saved = need(told(second))
        need(saved.shape == first.shape)
        if native(saved.dtype) == native(first.dtype):
            arrays.append(saved)
        else:
            arrays.append(standing_for(passing(saved, name, more), name, first))
    elif backward:
        arrays.append(need(readable(second, integers)))
        need(native(arrays[1].dtype) == native(first.dtype))
        need(arrays[1].shape == first.shape)
    if "weight" in given:
        weight = given["weight"]
        if is_plain_number(weight):
            weight = in_dtype(weight, native(first.dtype))
        weight = need(readable(weight))
        dtype = native(weight.dtype)
        mixed = dtype == np.float32 and first.dtype.itemsize == 2
        need(mixed or dtype == native(first.dtype))
        axis = given["axis"]
        need(not boolean(axis))
        try:
            axis = operator.index(axis)
        except Exception:  # noqa: BLE001
            need(None)
        if weight.ndim > 1:
            sides = zip(weight.shape[::-1], first.shape[::-1], strict=False)
            need(weight.ndim <= first.ndim and all(n in (1, m) for n, m in sides))
            axis = 0
        else:
            within = -first.ndim <= axis < first.ndim
            need(within or (weight.size == 1 and axis == 1))
            need(weight.size == 1 or weight.size == first.shape[axis])
        more |= {"weight": weight, "axis": axis if weight.size != 1 else 0}
    need(boolean(given.get("return_mask", False)))
    out, out_weight = given["out"], None
    if "weight" in given and names[1] == "x" and issubclass(type(out), tuple):
        need(len(out) == 2)
        out, out_weight = out
    elif issubclass(type(out), tuple) and len(out) == 1:
        (out,) = out
    if inplace:
        need(out is None)
        out = given[names[0]]
    targets = [None, None]
    if out is not None:
        targets[0] = need(writeable(out, first))
    if out_weight is not None:
        targets[1] = need(writeable(out_weight, more["weight"]))
        need(out is None or not np.shares_memory(*targets))
    return arrays, more, [out, out_weight], targets


def standing_for(passes, name, model):
    """An input of the gradient's dtype that is active where it is said"""
    high, low = (math.inf, -math.inf) if name == "threshold" else (1, 0)
    return np.where(passes, high, low).astype(native(model.dtype))


def tame(a):
    """Whether a sum of products of such numbers neither under- nor overflows"""
    size = np.abs(a[np.isfinite(a) & (a != 0)])
    return native(a.dtype) != np.float64 or ((size > 1e-90) & (size < 1e90)).all()


def attempt(number):
    """Make a case and try it"""
    maker = Maker(number)
    given, name, memory = maker.make(), maker.name, maker.memory
    before = memory.copy()
    try:
        arrays, more, outs, targets = understood(name, given)
        fine = True
    except Wrong:
        fine = False
    if fine:
        beyond = arrays[0].nbytes >= BEYOND
        if not beyond:
            arrays = [a.copy() for a in arrays]
            more = {k: v.copy() if k == "weight" else v for k, v in more.items()}
    parameters = inspect.signature(maker.function).parameters
    first = [
        v
        for k, v in given.items()
        if parameters[k].kind is inspect.Parameter.POSITIONAL_ONLY
    ]
    rest = dict([*given.items()][len(first) :])
    try:
        result = maker.function(*first, **rest)
    except MemoryError:
        assert fine and beyond  # noqa: PT018
        return
    except (TypeError, ValueError) as error:
        text, result = str(error), None
    if result is None:
        assert not fine, text
        assert re.match(r"\w+", text)[0] in given, text
        assert memory.tobytes() == before.tobytes()
        return
    assert fine
    results = list(result) if isinstance(result, tuple) else [result]
    if given.get("return_mask"):
        mask = results.pop()
        assert_same(mask.unpack(), reference.active(arrays[0], name, **more))
        assert not np.may_share_memory(mask.bits, memory)
    backward = len(arrays) == 2
    expected = (reference.backward if backward else reference.forward)(
        name, *arrays, **more
    )
    assert_same(np.asarray(results[0]), expected)
    if backward and "weight" in more:
        got = np.asarray(results[1])
        assert got.dtype == native(more["weight"].dtype)
        assert got.shape == more["weight"].shape
        if all(map(tame, arrays)):
            assert_weight_gradient(got, *arrays, **more)
    for got, out, target in zip(results, outs, targets, strict=False):
        if out is not None:
            assert got is out
            if np.may_share_memory(target, memory):
                start = target.ctypes.data - memory.ctypes.data
                place = np.ndarray(
                    target.shape, target.dtype, before, start, target.strides
                )
                place[...] = target
        else:
            number = got is results[0] and all(map(is_number, first[: len(arrays)]))
            number |= got is not results[0] and is_number(given["weight"])
            assert isinstance(got, np.generic if number else np.ndarray)
            assert not np.may_share_memory(got, memory)
    assert memory.tobytes() == before.tobytes()


def main(first, count, path):
    warnings.simplefilter("error")
    note = np.memmap(path, np.int64, "w+", shape=1)
    for number in range(first, first + count):
        note[0] = number
        with np.errstate(all="ignore"):
            attempt(number)


def fuzz(first, count, path):
    command = [sys.executable, __file__, str(first), str(count)]
    done = run_command([*command, path], timeout=3600)
    number = np.fromfile(path, np.int64)
    assert done.returncode == 0, f"case {number}:\n{done.stderr[-3000:]}"


def test_any_arguments(tmp_path):
    fuzz(0, int(os.environ.get("FASTRELU_FUZZ", "4000")), tmp_path / "note")


@pytest.mark.long
@pytest.mark.parametrize("first", range(0, 1_000_000, 100_000))
def test_any_arguments_at_length(first, tmp_path):
    fuzz(first, 100_000, tmp_path / "note")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
