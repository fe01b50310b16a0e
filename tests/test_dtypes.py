"""Dtypes that are not accepted: a TypeError names the argument, and no byte changes.

Packages reuse each other's letters, kinds, names and sizes of dtypes.  Whoever told
them by one of these would work on elements of one size as if they had another.

``python tests/test_dtypes.py`` tries all that is small with no call before it.
"""

import contextlib
import ctypes
import functools
import inspect
import math
from pathlib import Path

import numpy as np
import pytest
import reference
from conftest import (
    ACTIVATIONS,
    FLOATS,
    GUARD,
    INTEGERS,
    LAYOUTS,
    dtype_of,
    floats_here,
)
from test_arguments import FUNCTIONS, call, mask_for, sound
from test_threads import run

import fastrelu as F
from fastrelu.cpu import pool, threads

LARGE = max(pool.SMALLEST, 2 * threads.SHARE) + 4096  # bytes


# What there is ------------------------------------------------------------------------


def _of_ml_dtypes():
    """All that the installed version has"""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for name, kind in vars(ml_dtypes).items():
        if isinstance(kind, type) and np.dtype(kind).type is kind:
            yield name, np.dtype(kind)


def _of(module, name):
    return lambda: np.dtype(getattr(pytest.importorskip(module), name))


class _Bfloat(np.void):
    """Of two bytes, it has the name and the module of another"""


_Bfloat.__name__, _Bfloat.__module__ = "bfloat", "ml_dtypes"

NUMPYS = [
    *("?", "F", "D", "G", "g", "O", "S1", "S2", "S3", "S4", "S8", "U1", "U2", "V1"),
    *("V2", "V4", "V8", "M8[s]", "M8", "m8[ns]", "m8", ">F", ">U1"),
]
FOREIGN = {
    **{name: functools.partial(np.dtype, name) for name in NUMPYS},
    "a structure": lambda: np.dtype([("a", "f4"), ("b", "i2")]),
    "a float32 in a structure": lambda: np.dtype([("a", "f4")]),
    "a record": lambda: np.dtype((np.record, [("a", "f8")])),
    "bfloat16 by name": lambda: np.dtype((_Bfloat, [("a", "u2")])),
    "StringDType": np.dtypes.StringDType,
    "StringDType with NaN": lambda: np.dtypes.StringDType(na_object=np.nan),
    "rational": _of("numpy._core._rational_tests", "rational"),
    "quaternion": _of("quaternion", "quaternion"),
}
if len(floats_here()) == len(FLOATS):
    FOREIGN |= {
        name: functools.partial(lambda dtype: dtype, dtype)
        for name, dtype in _of_ml_dtypes()
        if name != "bfloat16"
    }
ACCEPTED = [dtype_of(name) for name in (*floats_here(), *INTEGERS)]


def test_nothing_is_left_out():
    """Every letter of NumPy's is on one of the two lists."""
    ours = {np.dtype(letter).char for letter in NUMPYS}
    accepted = {np.dtype(code).num for code in "bBhHiIlLqQefd"}
    for letter in np.typecodes["All"]:
        assert letter in ours or np.dtype(letter).num in accepted


def companions(function, foreign):
    """The accepted dtypes to try beside this one: of one letter, of one size"""
    name = function.removesuffix("_backward")
    ours = [
        dtype
        for dtype in ACCEPTED
        if dtype.kind not in "iu" or reference.DEFINITIONS[name].integers
    ]
    alike = [
        [dtype for dtype in ours if dtype.char == foreign.char],
        [dtype for dtype in ours if dtype.itemsize == foreign.itemsize],
        [np.dtype(np.float32)],
    ]
    return list(dict.fromkeys(dtypes[0] for dtypes in alike if dtypes))


# Arrays in guarded memory -------------------------------------------------------------

SMALL = [
    ((), "c"),
    ((0,), "c"),
    ((7,), "c"),
    ((7,), "step"),
    ((7,), "negative"),
    ((2, 3), "c"),
    ((2, 3), "transposed"),
    ((2, 3), "step"),
    ((2, 3), "misaligned"),
]


def large(*dtypes):
    """More than one thread's share, and than what only malloc recycles"""
    length = LARGE // min(dtype.itemsize for dtype in dtypes)
    return [((2, length // 2), "c"), ((length // 2, 2), "transposed")]


def lay(shape, dtype, layout):
    """An array of any dtype, and the bytes of its memory and of that on both sides"""
    outer, window = LAYOUTS[layout]
    size = 2 * GUARD + math.prod(outer(shape))
    memory = np.empty(size, dtype)
    if dtype.hasobject or dtype.kind == "T":
        memory[...] = "some text that does not lie in its element"
    elif dtype.char == "?":
        memory[...] = True
    else:  # negative for whoever takes it for numbers: it would come out as another
        skew = int(layout == "misaligned")
        pattern = np.arange(150, 250, dtype=np.uint8)
        memory = np.resize(pattern, memory.nbytes + skew)[skew:].view(dtype)
    array = window(memory[GUARD : size - GUARD].reshape(outer(shape)), shape)
    address = ctypes.c_uint8 * memory.nbytes
    return array, np.frombuffer(address.from_address(memory.ctypes.data), np.uint8)


class Stock:
    """For each place among the arguments an array of each of some dtypes, made once"""

    def __init__(self, shape, layout):
        self.shape, self.layout = shape, layout
        self.arrays, self.memories = {}, {}

    def __call__(self, place, dtype):
        if (place, dtype) not in self.arrays:
            shape, layout = self.shape, self.layout
            if place in ("weight", "out[1]"):
                shape = shape[1:2] if len(shape) > 1 else (1,)
                layout = layout if layout == "step" else "c"
            array, memory = lay(shape, dtype, layout)
            self.arrays[place, dtype] = array
            self.memories[place, dtype] = memory, memory.copy()
        return self.arrays[place, dtype]

    def check(self):
        """Nothing was written to."""
        for place, (memory, before) in self.memories.items():
            assert np.array_equal(memory, before), place


# The sweep ----------------------------------------------------------------------------


# Each function's parameters that are arrays, and those that have no name for a caller.
ARRAYS = {function: [*sound(function)] for function in FUNCTIONS}
FIRST = {
    name: [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.POSITIONAL_ONLY
    ]
    for name, function in FUNCTIONS.items()
}


def takes_mask(function):
    return ACTIVATIONS[function.removesuffix("_backward")].takes_mask


def ways(function):
    """Sets of what else a call is given"""
    yield set()
    yield {"inplace"}
    yield {"out"}
    if takes_mask(function) and "saved" in ARRAYS[function]:
        yield {"mask"}
        yield {"mask", "inplace"}
    elif takes_mask(function):
        yield {"return_mask"}


def places(function, way):
    """What may be of another dtype: one argument, or all arrays. The first is named."""
    names = [
        name for name in ARRAYS[function] if not (name == "saved" and "mask" in way)
    ]
    yield from ([name] for name in names)
    if "inplace" not in way:
        yield ["out"]
        if function == "prelu_backward":
            yield ["out[1]"]
    yield [*names, *(way & {"out"})]


def arguments(function, way, stock, good, foreign=None, where=()):
    """A call's arguments, whose arrays are of the foreign dtype in some places"""

    def array(place):
        return stock(place, foreign if place in where else good)

    given = {name: array(name) for name in ARRAYS[function]}
    if "mask" in way:
        shape = stock.shape
        predicate = ACTIVATIONS[function.removesuffix("_backward")].spec.predicate
        bits = np.zeros(-(-math.prod(shape) // 8), np.uint8)
        given["saved"] = F.Mask(bits, shape, predicate=predicate)
    given |= dict.fromkeys(way & {"inplace", "return_mask"}, True)
    if "out" in way or "out" in where:
        given["out"] = array("out")
    if function == "prelu_backward" and ("out" in way or "out[1]" in where):
        given["out"] = given.get("out"), array("out[1]")
    return given


@functools.cache
def warm(function, dtype, shape, layout):
    """Make the calls with a dtype that is accepted, which makes the next ones quick."""
    for way in ways(function):
        call(function, arguments(function, way, Stock(shape, layout), dtype))


def refused(function, given, argument):
    """The call is a TypeError that names the argument."""
    message = "accepted"
    try:
        call(function, given)
    except TypeError as error:
        message = str(error)
    names = [argument, "out[0]"] if argument == "out" else [argument]
    assert message.startswith(tuple(f"{name} must " for name in names)), message


def attempt(function, stock, foreign, good):
    for way in ways(function):
        for where in places(function, way):
            if foreign.char == "?" and where == ["saved"]:
                continue  # True where a unit was active is not a number's dtype
            given = arguments(function, way, stock, good, foreign, where)
            try:
                refused(function, given, where[0])
            except BaseException as error:
                error.add_note(f"{where} of {foreign!r}, {way}")
                raise


def sweep(foreign, *, before):
    """Try a dtype everywhere, each time after the call that is right or as the first."""
    for good in ACCEPTED:
        functions = [name for name in FUNCTIONS if good in companions(name, foreign)]
        cases = SMALL
        if before and functions and good == companions(functions[0], foreign)[0]:
            cases = SMALL + large(good, foreign)
        for shape, layout in cases if functions else ():
            stock = Stock(shape, layout)
            for function in functions:
                if before:
                    warm(function, good, shape, layout)
                try:
                    attempt(function, stock, foreign, good)
                    stock.check()
                except BaseException as error:
                    error.add_note(f"{function}: the rest is {good}, {shape}, {layout}")
                    raise


@pytest.mark.parametrize("name", FOREIGN)
def test_a_dtype_that_is_not_accepted(name):
    sweep(FOREIGN[name](), before=True)


def first():
    """Try all that is small, and count the dtypes."""
    count = 0
    for make in FOREIGN.values():
        with contextlib.suppress(pytest.skip.Exception):
            sweep(make(), before=False)
            count += 1
    return count


def test_nor_by_the_first_call_of_a_process():
    script = f"""
    import sys
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    import test_dtypes
    print(test_dtypes.first() > 40)
    """
    assert run(script) == "True\n"


@pytest.mark.parametrize("name", FOREIGN)
def test_the_bits_of_a_mask(name):
    """They are uint8, when a mask is made and when it is used."""
    bits, memory = lay((1,), FOREIGN[name](), "c")
    before = memory.copy()
    with pytest.raises(TypeError, match=r"^bits must be an array of uint8"):
        F.Mask(bits, 7)
    grad = np.ones(7, np.float32)
    for function in FUNCTIONS:
        if "saved" in ARRAYS[function]:
            mask = mask_for(function, grad)
            call(function, {"grad_output": grad, "saved": mask})
            mask.bits = bits
            given = {"grad_output": grad, "saved": mask, "inplace": True}
            refused(function, given, "saved")
            assert np.array_equal(memory, before)
            assert grad.min() == 1


if __name__ == "__main__":
    first()
