"""Everything that can be wrong with an argument, and all that only looks wrong."""

import enum
import inspect
import itertools
import re
import signal
import time
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import reference
from conftest import LARGE, normal, place
from numpy.lib.stride_tricks import as_strided
from reference import assert_same

import fastrelu as F
from fastrelu import _dispatch, activations, cpu
from fastrelu.cpu import build, fast, quick, threads

FLOAT32 = np.dtype(np.float32)
FUNCTIONS = {
    function.__name__: function
    for row in activations.ACTIVATIONS.values()
    for function in (row.forward, row.backward)
}
# What some of them need beside arrays.
NUMBERS = {"slopes": 0.2}
for row in activations.ACTIVATIONS.values():
    NUMBERS |= {name: values[0] for name, values in row.examples.items()}
ARRAYS = ("x", "grad_output", "saved", "weight")
each_function = pytest.mark.parametrize("function", FUNCTIONS)


def takes(*wanted):
    """Run a test for every function with these parameters"""
    names = [
        name
        for name, function in FUNCTIONS.items()
        if {*wanted} <= {*inspect.signature(function).parameters}
    ]
    return pytest.mark.parametrize("function", names)


each_array = pytest.mark.parametrize(
    ("function", "argument"),
    [
        (name, argument)
        for name, function in FUNCTIONS.items()
        for argument in inspect.signature(function).parameters
        if argument in ARRAYS
    ],
)
each_input = pytest.mark.parametrize(
    ("function", "argument"), [p for p in each_array.args[1] if p[1] != "weight"]
)
each_first_array = pytest.mark.parametrize(
    ("function", "argument"),
    [
        (name, next(iter(inspect.signature(f).parameters)))
        for name, f in FUNCTIONS.items()
    ],
)


def sound(function, shape=(2, 3), dtype=FLOAT32):
    """Arrays that the function takes, by the names of its parameters"""
    shapes = dict.fromkeys(ARRAYS, shape) | {"weight": shape[1:2]}
    names = [
        n for n in inspect.signature(FUNCTIONS[function]).parameters if n in ARRAYS
    ]
    return {name: normal(shapes[name], dtype, i) for i, name in enumerate(names)}


def row_of(function):
    return activations.ACTIVATIONS[function.removesuffix("_backward")]


def mask_for(function, x):
    """What the forward pass of a function's activation keeps"""
    row = row_of(function)
    numbers = [NUMBERS[name] for name in row.spec.numbers if name in NUMBERS]
    return row.forward(x, *numbers, return_mask=True)[1]


def call(function, given):
    parameters = inspect.signature(FUNCTIONS[function]).parameters.values()
    first = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    needed = {p.name for p in parameters if p.default is p.empty} & {*NUMBERS}
    given = {name: NUMBERS[name] for name in needed} | given
    rest = {name: value for name, value in given.items() if name not in first}
    return FUNCTIONS[function](*(given[name] for name in first), **rest)


def several(results):
    return results if issubclass(type(results), tuple) else (results,)


def refuses(error, argument, function, given):
    """The call fails, names the argument, and leaves every array as it was"""
    values = [value for given in given.values() for value in several(given)]
    arrays = [a for a in values if issubclass(type(a), np.ndarray)]
    before = [a.tobytes() for a in arrays]
    with pytest.raises(error, match=rf"\b{argument}\b"):
        call(function, given)
    assert [a.tobytes() for a in arrays] == before


def fails(*_):
    """What objects may do when they are asked for something"""
    raise RuntimeError


NO_ARRAYS = {
    "None": None,
    "str": "1.5",
    "bytes": b"1.5",
    "object": object(),
    "dict": {0: 1.0},
    "set": {1.0},
    "type": float,
    "complex": 1j,
    "bool": True,
    "list of bool": [True, False],
    "list of None": [None, 1.0],
    "list of str": ["1.5"],
    **{
        f"broken {name}": type("Broken", (), {name: property(fails)})()
        for name in ("__array__", "__cuda_array_interface__", "__class__", "dtype")
    },
}
KINDS = ("?", "F", "D", "g", "G", "O", "S4", "U4", "V8", "M8[s]", "m8[s]", "f4,f4")


@pytest.mark.parametrize("kind", NO_ARRAYS)
@each_array
def test_no_array(function, argument, kind):
    is_bool = argument == "saved" and "bool" in kind  # of another shape
    wrong = {argument: NO_ARRAYS[kind]}
    refuses(
        ValueError if is_bool else TypeError,
        argument,
        function,
        sound(function) | wrong,
    )


@pytest.mark.parametrize("kind", KINDS)
@each_array
def test_kinds_of_array(function, argument, kind):
    if kind == "g" and np.dtype("g").itemsize == 8:
        pytest.skip("long double is double here")
    given = sound(function)
    wrong = np.zeros(given[argument].shape, kind)
    if argument == "saved" and kind == "?":
        expected = call(function, given | {argument: np.zeros_like(given[argument])})
        assert_same(call(function, given | {argument: wrong}), expected)
        return
    refuses(TypeError, argument, function, given | {argument: wrong})


@each_array
def test_masked_arrays(function, argument):
    given = sound(function)
    given[argument] = np.ma.masked_array(given[argument], given[argument] > 0)
    refuses(TypeError, argument, function, given)


@each_array
def test_ragged_lists(function, argument):
    given = sound(function) | {argument: [[1.0, 2.0], [3.0]]}
    refuses((TypeError, ValueError), argument, function, given)


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint16"])
@each_array
def test_integers(function, argument, dtype):
    name = function.removesuffix("_backward")
    given = sound(function)
    given = {key: a.astype(dtype) for key, a in given.items() if key != "weight"}
    if reference.DEFINITIONS[name].integers:
        assert call(function, given).dtype == dtype
    else:
        given = sound(function) | {
            argument: np.ones_like(sound(function)[argument], dtype)
        }
        if argument == "saved":  # which only tells what was active
            expected = call(function, given | {"saved": given["saved"].astype("f4")})
            assert_same(call(function, given), expected)
        else:
            refuses(TypeError, argument, function, given)


@each_first_array
@pytest.mark.parametrize("kind", ["list", "float", "numpy scalar"])
def test_in_place_needs_an_array(function, argument, kind):
    value = {"list": [[1.0, -2.0, 3.0]] * 2, "float": 1.5}.get(kind, np.float64(1.5))
    given = sound(function, np.shape(value), np.dtype(float))
    given |= {"weight": np.ones(1)} if "weight" in given else {}
    given |= {argument: value, "inplace": True}
    refuses(TypeError, f"({argument}|inplace)", function, given)


@each_first_array
def test_in_place_needs_a_writeable_array(function, argument):
    given = sound(function) | {"inplace": True}
    given[argument].flags.writeable = False
    refuses(ValueError, argument, function, given)


@each_first_array
def test_in_place_needs_the_native_byte_order(function, argument):
    given = sound(function) | {"inplace": True}
    given[argument] = given[argument].astype(FLOAT32.newbyteorder())
    refuses(TypeError, argument, function, given)


@each_first_array
def test_in_place_needs_memory_of_its_own_for_every_element(function, argument):
    given = sound(function) | {"inplace": True}
    given[argument] = as_strided(given[argument], (2, 3), (0, 4))
    refuses(ValueError, argument, function, given)


# Slopes and axes


SLOPES = {
    "None": (TypeError, None),
    "str": (TypeError, "0.1"),
    "complex": (TypeError, 0.1 + 0j),
    "bool": (TypeError, True),
    "numpy bool": (TypeError, np.True_),
    "array": (TypeError, np.array([0.1, 0.2])),
    "array of one": (TypeError, np.array([0.1])),
    "list": (TypeError, [0.1]),
    "nan": (ValueError, float("nan")),
    "inf": (ValueError, float("inf")),
    "-inf": (ValueError, -float("inf")),
    "numpy nan": (ValueError, np.float32("nan")),
    "10**400": (ValueError, 10**400),
    "10**5000": (ValueError, 10**5000),  # too long for str
    "timedelta": (TypeError, np.timedelta64(1, "s")),  # an np.integer to Python
    "broken float": (TypeError, type("Broken", (float,), {"__float__": fails})()),
}


@pytest.mark.parametrize("slope", SLOPES)
@takes("negative_slope")
def test_slopes(function, slope):
    error, value = SLOPES[slope]
    given = sound(function) | {"negative_slope": value}
    refuses(error, "negative_slope", function, given)
    refuses(error, "negative_slope", function, given | {"inplace": True})


FINITE = {  # in float64, and in float32 nearest to the last number before an infinity
    "1e39": 1e39,
    "-1e39": -1e39,
    "integer": 10**39,
    "double": np.float64(3.5e38),
    "half way": 2.0**128 - 2.0**103,
}


@pytest.mark.parametrize("slope", FINITE)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@takes("negative_slope")
def test_slopes_that_float32_has_not(function, dtype, slope):
    """With float64 they are as good as any; a call before makes the quick way ready."""
    given = sound(function, dtype=np.dtype(dtype)) | {"negative_slope": FINITE[slope]}
    call(function, given | {"negative_slope": 0.5})
    refuses(ValueError, "negative_slope", function, given)
    double = sound(function, dtype=np.dtype(float)) | {"negative_slope": FINITE[slope]}
    assert np.isfinite(call(function, double)).all()


@takes("negative_slope")
def test_the_largest_slope_of_float32(function):
    largest = np.nextafter(2.0**128 - 2.0**103, 0)
    given = sound(function)
    given = {name: np.full_like(a, -1) for name, a in given.items()}
    got = call(function, given | {"negative_slope": float(largest)})
    assert (abs(got) == np.finfo(np.float32).max).all()


# Beside a tie of float32, by less than float64 has.
TIES = {
    "integer": (2**60 + 2**36 + 1, 2.0**60 + 2.0**37),
    "integer below": (2**60 + 3 * 2**36 - 1, 2.0**60 + 2.0**37),
    "negative integer": (-(2**60) - 2**36 - 1, -(2.0**60) - 2.0**37),
    "tie": (2**60 + 2**36, 2.0**60),
    "numpy integer": (np.int64(2**60 + 2**36 + 1), 2.0**60 + 2.0**37),
    "fraction": (Fraction(2**60 + 2**36 + 1, 2**61), 0.5 + 2.0**-24),
    "long double": (
        np.longdouble(2.0**60 + 2.0**36) + np.longdouble(1),
        2.0**60 + (2.0**37 if np.finfo(np.longdouble).nmant > 60 else 0),
    ),
}


@pytest.mark.parametrize("tie", TIES)
def test_a_slope_is_rounded_once(tie):
    value, expected = TIES[tie]
    x = np.full(3, -1.0, np.float32)
    assert F.leaky_relu(x, value).tolist() == [-expected] * 3
    assert F.leaky_relu_backward(x, x, value).tolist() == [-expected] * 3
    assert F.leaky_relu(x.astype(float), value).tolist() == [-float(value)] * 3


SCALARS = ["int8", "uint64", "float16", "bfloat16", "float32", "float64", "longdouble"]


@pytest.mark.parametrize("dtype", SCALARS)
def test_slopes_of_numpy(dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    x = np.array([-1.0, 2.0], np.float32)
    for slope in (np.array(3, dtype)[()], np.array(3, dtype)):
        assert F.leaky_relu(x, slope).tolist() == [-3.0, 2.0]


FLAGS = {"1": 1, "0.0": 0.0, "None": None, "str": "no", "array": np.array(True)}


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("argument", ["inplace", "return_mask"])
@each_function
def test_flags(function, argument, flag):
    if argument in inspect.signature(FUNCTIONS[function]).parameters:
        given = sound(function) | {argument: FLAGS[flag]}
        refuses(TypeError, argument, function, given)


AXES = {
    "2": (ValueError, 2),
    "-3": (ValueError, -3),
    "2**70": (ValueError, 2**70),
    "10**5000": (ValueError, 10**5000),
    "broken": (TypeError, type("Broken", (), {"__index__": fails})()),
    "float": (TypeError, 1.0),
    "str": (TypeError, "1"),
    "None": (TypeError, None),
    "bool": (TypeError, True),
    "numpy bool": (TypeError, np.True_),
    "tuple": (TypeError, (1,)),
}


@pytest.mark.parametrize("axis", AXES)
@takes("axis")
def test_axes(function, axis):
    error, value = AXES[axis]
    refuses(error, "axis", function, sound(function) | {"axis": value})
    given = sound(function) | {"axis": value, "inplace": True}
    refuses(error, "axis", function, given)


# Weights


WRONG_WEIGHTS = [  # the shapes of data, weight, and the axis
    "2 3 / 2 /",
    "2 3 / 4 /",
    "2 3 / 0 /",
    "2 3 / 3 / 0",
    "2 3 4 / 4 /",
    "2 3 4 / 3 / -1",
    "2 3 3 / 9 /",
    "3 / 3 /",
    " / 2 /",
    "0 / 0 /",
    "1 3 / 2 3 /",
    "2 1 / 2 3 /",
    "2 3 / 1 2 3 /",
    "3 / 1 3 /",
    "2 3 / 3 1 /",
    "2 3 4 / 3 2 /",
]


@pytest.mark.parametrize("shapes", WRONG_WEIGHTS)
@takes("weight")
def test_weights_of_the_wrong_shape(function, shapes):
    shape, weight, axis = shapes.split("/")
    given = sound(function, tuple(map(int, shape.split())))
    given["weight"] = np.ones(tuple(map(int, weight.split())), np.float32)
    given |= {"axis": int(axis)} if axis.strip() else {}
    refuses(ValueError, "weight", function, given)
    refuses(ValueError, "weight", function, given | {"inplace": True})


@pytest.mark.parametrize(
    "types",
    ["float32 float64", "float64 float32", "float32 float16", "float16 float64"],
)
@takes("weight")
def test_weights_of_the_wrong_type(function, types):
    data, weight = types.split()
    given = sound(function, dtype=np.dtype(data))
    given["weight"] = given["weight"].astype(weight)
    refuses(TypeError, "weight", function, given)


@takes("weight")
def test_the_other_half_is_no_weight(function):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    for data, weight in ((bfloat16, np.float16), (np.float16, bfloat16)):
        given = sound(function, dtype=np.dtype(data))
        given["weight"] = given["weight"].astype(weight)
        refuses(TypeError, "weight", function, given)


# Numbers for gradients


class One(enum.IntEnum):
    ONE = 1


class Weighed(float):
    def __new__(cls, value, unit):
        return super().__new__(cls, value)


@pytest.mark.parametrize("number", [One.ONE, Weighed(1, "kg")])
def test_one_number_of_a_subclass(number):
    x = normal((2, 3), FLOAT32)
    assert_same(F.relu_backward(number, x), F.relu_backward(1.0, x))
    expected = F.relu_backward(number.real, x > 0)
    assert_same(F.relu_backward(number, x > 0), expected)


@pytest.mark.parametrize(
    ("number", "dtype"),
    [(300, "int8"), (-1, "uint64"), (1e39, "float32"), (-1e5, "float16")],
)
def test_one_number_that_does_not_fit(number, dtype):
    with pytest.raises(
        ValueError, match=f"grad_output must fit {dtype}, got {re.escape(str(number))}"
    ):
        F.relu_backward(number, np.ones(3, dtype))


# What the forward pass saved


SECOND = {
    name: list(sound(name))[1] for name, f in FUNCTIONS.items() if "_back" in name
}
each_second_array = pytest.mark.parametrize(("function", "argument"), SECOND.items())


@pytest.mark.parametrize(
    "shape", ["2", "3", "3 2", "1 3", "2 1", "6", "2 3 1", "0 3", ""]
)
@each_second_array
def test_saved_of_another_shape(function, argument, shape):
    given = sound(function)
    given[argument] = np.ones(tuple(map(int, shape.split())), np.float32)
    refuses(ValueError, argument, function, given)
    refuses(ValueError, argument, function, given | {"inplace": True})


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32"])
@each_second_array
def test_saved_of_another_type(function, argument, dtype):
    given = sound(function)
    wrong = given[argument].astype(dtype)
    if argument != "saved":
        refuses(TypeError, argument, function, given | {argument: wrong})
        return
    expected = call(function, given | {"saved": wrong.astype(np.float32)})
    for saved in (wrong, np.asfortranarray(wrong), place(wrong, "swapped")[0]):
        assert_same(call(function, given | {"saved": saved}), expected)


def test_no_output_is_touched_before_its_loop_is_compiled(monkeypatch):
    """Memory may end there, or somebody have enough of it."""
    if not cpu.is_fast():
        pytest.skip("the portable loops have no quick calls")
    grad = np.asfortranarray(np.arange(1.0, 7).reshape(2, 3))
    mask, out, asked = F.Mask.pack(np.arange(6).reshape(2, 3) > 2), np.ones((2, 3)), []

    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(fast, "quick_call", quick.Call)  # with nothing compiled
    monkeypatch.setattr(threads, "ready", asked.append)
    with monkeypatch.context() as patch:
        patch.setattr(build, "compiled", no_memory)
        with pytest.raises(MemoryError):
            F.relu_backward(grad, mask, out=out)
    assert (out == 1).all()
    F.relu_backward(grad, mask, out=out)
    assert_same(out, np.where(mask, grad, 0))
    assert asked == [2 * out.nbytes]  # no threads for so few elements


@pytest.mark.parametrize("shape", ["3 2", "6", "2 3 1", "1 6", "2 4", "5", ""])
@takes("saved")
def test_mask_of_another_shape(function, shape):
    mask = mask_for(function, np.ones(tuple(map(int, shape.split()))))
    given = sound(function) | {"saved": mask}
    refuses(ValueError, "saved", function, given)
    refuses(ValueError, "saved", function, given | {"inplace": True})


MISUSED = {
    "fewer bits": (ValueError, "bits", np.zeros(1, np.uint8)),
    "more bits": (ValueError, "bits", np.zeros(3, np.uint8)),
    "bits in two dimensions": (ValueError, "bits", np.zeros((1, 2), np.uint8)),
    "bits of another type": (TypeError, "bits", np.zeros(2, np.int8)),
    "list of bits": (TypeError, "bits", [0, 0]),
    "no bits": (TypeError, "bits", None),
    "larger shape": (ValueError, "shape", (2, 30)),
    "another number of dimensions": (ValueError, "shape", 15),
    "list for a shape": (TypeError, "shape", [3, 5]),
    "array for a shape": (TypeError, "shape", np.array([3, 5])),
}


@pytest.mark.parametrize("case", MISUSED)
@takes("saved")
def test_mask_that_was_changed(function, case):
    error, attribute, value = MISUSED[case]
    mask = mask_for(function, np.ones((3, 5), np.float32))
    setattr(mask, attribute, value)
    given = sound(function, (3, 5)) | {"saved": mask}
    refuses(error, "saved", function, given)
    refuses(error, "saved", function, given | {"inplace": True})
    given["saved"] = F.Mask.__new__(F.Mask)  # neither bits nor shape
    refuses(TypeError, "saved", function, given)


@takes("saved")
def test_mask_of_every_other_byte(function):
    given = sound(function, (3, 5))
    mask = given["saved"] = mask_for(function, given["saved"])
    expected = call(function, given)
    bits = np.repeat(mask.bits, 2)[::2]
    given["saved"] = F.Mask(bits, (3, 5), predicate=mask.predicate)
    assert_same(call(function, given), expected)


@takes("saved")
def test_mask_of_another_function(function):
    others = [name for name in FUNCTIONS if row_of(name).takes_mask]
    given = sound(function)
    for name in others:
        mask = mask_for(name, given["saved"])
        if mask.predicate != mask_for(function, given["saved"]).predicate:
            refuses(ValueError, "saved", function, given | {"saved": mask})


class Both(NamedTuple):
    grad_input: np.ndarray | None
    grad_weight: np.ndarray | None


def test_a_named_tuple_for_both_outputs():
    """As NumPy's functions take one; what was given comes back, of a number's weight too"""
    x, total = normal((2, 3), FLOAT32), np.zeros((), np.float32)
    for weight in 0.25, np.array(0.25, np.float32):
        dx, dw = F.prelu_backward(x, x, weight, out=Both(None, total))
        assert dw is total
        assert_same(dx, F.prelu_backward(x, x, weight)[0])


NEEDED = "must be the input, got a mask, which does not tell enough"


@pytest.mark.parametrize(
    "function", [n for n, second in SECOND.items() if second == "x"]
)
def test_a_bit_is_not_enough_for_every_gradient(function):
    given = sound(function)
    given["x"] = F.relu(given["x"], return_mask=True)[1]
    refuses(TypeError, f"x {NEEDED}", function, given)
    refuses(TypeError, f"x {NEEDED}", function, given | {"grad_output": 1.0})
    given["x"] = given["x"].unpack()
    refuses(
        TypeError,
        "x must have dtype float16, bfloat16, float32 or float64, got bool",
        function,
        given,
    )


@each_first_array
def test_a_mask_for_the_first_argument(function, argument):
    given = sound(function)
    given[argument] = F.relu(given[argument], return_mask=True)[1]
    refuses(TypeError, f"{argument} must be .*, got a mask", function, given)


def test_mask_of_a_shape_that_no_array_has():
    for shape in ((0, 2**100), (1,) * 65, 10**5000, (2**40, 2**40), (-1,)):
        with pytest.raises(ValueError, match="shape"):
            F.Mask(np.zeros(1, np.uint8), shape)


WRONG_ORDERS = [(0, 0), (0,), (0, 2), ("0", 1), 1.5]


@pytest.mark.parametrize("axes", WRONG_ORDERS)
def test_masks_in_no_order(axes):
    with pytest.raises((TypeError, ValueError), match="axes"):
        F.Mask(np.zeros(1, np.uint8), (2, 3), axes)
    with pytest.raises(TypeError, match="predicate"):
        F.Mask(np.zeros(1, np.uint8), (2, 3), predicate=axes)


def test_the_order_of_a_mask():
    mask = F.Mask(np.array([0b000110], np.uint8), (2, 3), (1, 0))
    assert mask.axes == (1, 0)
    assert mask.unpack().tolist() == [[False, True, False], [True, False, False]]
    assert F.Mask(mask.bits, (2, 3), (0, 1)).axes == (0, 1)


@pytest.mark.parametrize("argument", ["x", "grad_output", "weight"])
def test_a_mask_is_no_array(argument):
    _, mask = F.relu(np.ones((2, 3), np.float32), return_mask=True)
    given = sound("prelu_backward") | {argument: mask}
    refuses(TypeError, argument, "prelu_backward", given)


# out


def _swapped(shape):
    return np.ones(shape, FLOAT32.newbyteorder())


def _read_only(shape):
    a = np.ones(shape, np.float32)
    a.flags.writeable = False
    return a


WRONG_OUTS = {
    "list": (TypeError, lambda s: [[0.0] * s[1]] * s[0]),
    "str": (TypeError, lambda s: "out"),
    "scalar": (TypeError, lambda s: np.float32(1)),
    "type": (TypeError, lambda s: np.ndarray),
    "broken": (TypeError, lambda s: NO_ARRAYS["broken dtype"]),
    "claiming": (TypeError, lambda s: type("Out", (), {"__class__": np.ndarray})()),
    "memoryview": (TypeError, lambda s: memoryview(np.ones(s, np.float32))),
    "masked": (TypeError, lambda s: np.ma.ones(s, np.float32)),
    "float64": (TypeError, lambda s: np.ones(s)),
    "float16": (TypeError, lambda s: np.ones(s, np.float16)),
    "int32": (TypeError, lambda s: np.ones(s, np.int32)),
    "swapped": (TypeError, _swapped),
    "flat": (ValueError, lambda s: np.ones(s[0] * s[1], np.float32)),
    "turned": (ValueError, lambda s: np.ones(s[::-1], np.float32)),
    "larger": (ValueError, lambda s: np.ones((s[0] + 1, s[1]), np.float32)),
    "more dimensions": (ValueError, lambda s: np.ones((1, *s), np.float32)),
    "read-only": (ValueError, _read_only),
    "broadcast": (
        ValueError,
        lambda s: as_strided(np.ones(s[1], np.float32), s, (0, 4)),
    ),
}


@pytest.mark.parametrize("kind", WRONG_OUTS)
@each_function
def test_out(function, kind):
    error, make = WRONG_OUTS[kind]
    refuses(error, "out", function, sound(function) | {"out": make((2, 3))})


@pytest.mark.parametrize("number", [0, 2])
@takes("return_mask")
def test_out_is_no_pair_where_there_is_one_result(function, number):
    out = tuple(np.ones((2, 3), np.float32) for _ in range(number))
    refuses(TypeError, "out", function, sound(function) | {"out": out})


@takes("return_mask")
def test_out_may_be_a_tuple_of_one(function):
    """As it may be for NumPy's ufuncs"""
    given, y = sound(function), np.ones((2, 3), np.float32)
    assert call(function, given | {"out": (y,)}) is y
    assert_same(y, call(function, given))


@each_function
def test_out_and_in_place(function):
    first = next(iter(sound(function)))
    for out in (np.ones((2, 3), np.float32), first):
        given = sound(function)
        given |= {"inplace": True, "out": given[first] if out is first else out}
        refuses((TypeError, ValueError), "out", function, given)


SELF_OVERLAPS = {  # float64 windows on one buffer: shape, strides in bytes
    "8 12": ((2, 2), (8, 12)),
    "12 8": ((2, 2), (12, 8)),
    "8 8": ((3, 3), (8, 8)),
    "4": ((5,), (4,)),
    "1": ((2,), (1,)),
    "0": ((2,), (0,)),
    "16 8": ((2, 3), (16, 8)),
    "8 -8": ((2, 2), (8, -8)),
    "-8 12": ((2, 2), (-8, 12)),
    "24 16": ((3, 4), (24, 16)),
    "0 64 8": ((2, 2, 2), (0, 64, 8)),
    "40 24 16": ((2, 2, 2), (40, 24, 16)),
    "large": ((1000, 1000), (8 * 999, 8)),
}
ODD_BUT_SOUND = {
    "24 16": ((2, 3), (24, 16)),
    "16 24": ((3, 2), (16, 24)),
    "12 24": ((2, 2), (12, 24)),
    "12": ((5,), (12,)),
    "-12": ((5,), (-12,)),
    "8 -64": ((2, 2), (8, -64)),
    "0 of one": ((1, 3), (0, 8)),
    "0 of none": ((2, 0), (0, 0)),
    "24 40": ((3, 3), (24, 40)),  # every row reaches into every other
    "40 64 16": ((2, 2, 2), (40, 64, 16)),
    "large": ((1000, 1000), (8 * 1001, 8)),
}


def window(shape, strides):
    reach = sum(abs(s) * n for s, n in zip(strides, shape, strict=True)) // 8 + 8
    memory = np.arange(2.0 * reach)
    return as_strided(memory[reach:], shape, strides), memory


@pytest.mark.parametrize("case", SELF_OVERLAPS)
@each_function
def test_out_with_elements_that_share_memory(function, case):
    shape, strides = SELF_OVERLAPS[case]
    out, memory = window(shape, strides)
    before = memory.copy()
    given = sound(function, shape, np.dtype(float))
    if "weight" in given:
        given["weight"] = np.ones(1)
    refuses(ValueError, "out", function, given | {"out": out})
    first = next(iter(given))
    given |= {first: out, "inplace": True}
    refuses(ValueError, first, function, given)
    assert_same(memory, before)


@pytest.mark.parametrize("case", ODD_BUT_SOUND)
@each_function
def test_out_with_odd_strides(function, case):
    shape, strides = ODD_BUT_SOUND[case]
    out, memory = window(shape, strides)
    given = sound(function, shape, np.dtype(float))
    if "weight" in given:
        given["weight"] = np.ones(1) * 0.5
    like, around = window(shape, strides)
    like[...] = several(call(function, given))[0]
    call(function, given | {"out": out})
    assert_same(memory, around)


PAIRS = {
    "one": (ValueError, lambda dx, dw: (dx,)),
    "three": (ValueError, lambda dx, dw: (dx, dw, dw)),
    "list": (TypeError, lambda dx, dw: [dx, dw]),
    "weight gradient of another shape": (ValueError, lambda dx, dw: (dx, dw[:2])),
    "weight gradient with more dimensions": (ValueError, lambda dx, dw: (dx, dw[None])),
    "weight gradient of another type": (
        TypeError,
        lambda dx, dw: (dx, dw.astype(float)),
    ),
    "weight gradient in a list": (TypeError, lambda dx, dw: (dx, [0.0] * 3)),
    "swapped": (TypeError, lambda dx, dw: (dx, _swapped(3))),
    "read-only": (ValueError, lambda dx, dw: (dx, _read_only(3))),
    "repeating": (ValueError, lambda dx, dw: (dx, as_strided(dw, (3,), (0,)))),
    "turned": (ValueError, lambda dx, dw: (dx.T, dw)),
    "another type": (TypeError, lambda dx, dw: (dx.astype(float), dw)),
    "exchanged": (ValueError, lambda dx, dw: (dw, dx)),
    "shared": (ValueError, lambda dx, dw: (dx, dx[0])),
}


@pytest.mark.parametrize("case", PAIRS)
def test_out_of_two(case):
    error, make = PAIRS[case]
    out = make(np.ones((2, 3), np.float32), np.ones(3, np.float32))
    if case in ("one", "three"):
        error = (TypeError, ValueError)
    refuses(error, "out", "prelu_backward", sound("prelu_backward") | {"out": out})


# Overlap


def square(memory):
    return memory[: int(memory.size**0.5) ** 2].reshape(2 * [int(memory.size**0.5)])


OVERLAPS = {  # memory -> an input and an output on it
    "ahead": lambda m: (m[:-1], m[1:]),
    "behind": lambda m: (m[1:], m[:-1]),
    "far ahead": lambda m: (m[:-100], m[100:]),
    "reversed": lambda m: (m, m[::-1]),
    "stretched": lambda m: (m[: m[::2].size], m[::2]),
    "compressed": lambda m: (m[::2], m[: m[::2].size]),
    "interleaved": lambda m: (m[:-1:2], m[1::2]),
    "transposed": lambda m: (square(m), square(m).T),
    "one byte": lambda m: (m[:-1], m.view(np.uint8)[1:-3].view(m.dtype)),
    "the same": lambda m: (m[1:], m[1:]),
    "half reversed": lambda m: (m[1:], m[:0:-1]),
    "repeated": lambda m: (np.broadcast_to(m[5:6], m.shape), m),
}


@pytest.mark.parametrize("size", ["400", "large"])
@pytest.mark.parametrize("how", OVERLAPS)
@each_input
def test_overlap(function, argument, how, size):
    memory = normal(LARGE - 1 if size == "large" else 400, FLOAT32, 5)
    overlapping, out = OVERLAPS[how](memory)
    given = sound(function, out.shape)
    given |= {argument: overlapping.copy()}
    given |= {"weight": np.full(1, 0.3, np.float32)} if "weight" in given else {}
    expected = several(call(function, given))
    got = several(call(function, given | {argument: overlapping, "out": out}))
    assert got[0] is out
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("how", OVERLAPS)
@each_second_array
def test_overlap_in_place(function, argument, how):
    memory = normal(400, FLOAT32, 5)
    overlapping, out = OVERLAPS[how](memory)
    given = sound(function, out.shape) | {argument: overlapping.copy()}
    given |= {"weight": np.full(1, 0.3, np.float32)} if "weight" in given else {}
    first = next(iter(given))
    given[first] = out.copy()
    expected = call(function, given)
    call(function, given | {first: out, argument: overlapping, "inplace": True})
    assert_same(out, several(expected)[0])


@pytest.mark.parametrize("how", ["inplace", "out"])
@pytest.mark.parametrize("row", ["0", "-1"])
@pytest.mark.parametrize("size", ["7", "1000"])
@takes("weight")
def test_weight_within_the_output(function, size, row, how):
    given = sound(function, (300, int(size)))
    first = next(iter(given))
    memory = given[first].copy()
    weight = memory[int(row)]
    expected = call(function, given | {"weight": weight.copy()})
    more = {first: memory, "inplace": True} if how == "inplace" else {"out": memory}
    got = call(function, given | {"weight": weight} | more)
    for a, b in zip(several(got), several(expected), strict=True):
        assert_same(a, b)
    assert several(got)[0] is memory


@takes("weight")
def test_weight_within_the_output_of_an_input_that_is_copied(function):
    given = sound(function, (30, 7))
    first = next(iter(given))
    expected = call(function, given)
    given[first] = place(given[first], "misaligned")[0]
    out = np.empty((30, 7), np.float32)
    out[-1] = given["weight"]
    got = call(function, given | {"weight": out[-1], "out": out})
    for a, b in zip(several(got), several(expected), strict=True):
        assert_same(a, b)


@each_first_array
def test_arrays_that_take_all_memory(function, argument):
    """What asarray raises for want of memory is not taken for a wrong argument."""

    class Endless:
        def __array__(self, dtype=None, copy=None):
            raise MemoryError

    with pytest.raises(MemoryError):
        call(function, sound(function) | {argument: Endless()})


@each_second_array
def test_saved_in_the_output_of_a_gradient_that_is_copied(function, argument):
    given = sound(function, (30, 7))
    expected = several(call(function, given))
    first = next(iter(given))
    given[first] = place(given[first], "step")[0]
    got = several(call(function, given | {"out": given[argument]}))
    assert got[0] is given[argument]
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)


@takes("saved")
def test_bits_within_the_output(function):
    g, x = normal(64, FLOAT32), normal(64, FLOAT32, 1)
    expected = call(function, {"grad_output": g, "saved": x})
    bits, mask = g.view(np.uint8)[8:16], mask_for(function, x)
    bits[:] = mask.bits
    part = {"grad_output": g[2:4], "saved": x[2:4]}
    expected[2:4] = call(function, part)
    mask = F.Mask(bits, 64, predicate=mask.predicate)
    call(function, {"grad_output": g, "saved": mask, "inplace": True})
    assert_same(g, expected)


@pytest.mark.parametrize("size", ["7", "1000"])
@pytest.mark.parametrize("argument", ["weight", "x", "grad_output"])
def test_weight_gradient_onto_an_input(argument, size):
    given = sound("prelu_backward", (300, int(size)))
    expected = F.prelu_backward(*given.values())
    taken = given[argument]
    dw = {"weight": taken, "x": taken[-1], "grad_output": taken[0]}[argument]
    dx = np.empty_like(given["x"])
    result = call("prelu_backward", given | {"out": (dx, dw)})
    assert result[0] is dx
    assert result[1] is dw
    for got, want in zip(result, expected, strict=True):
        assert_same(got, want)


def test_weight_and_its_gradient_may_overlap_in_part():
    memory = normal(8, FLOAT32)
    given = sound("prelu_backward", (30, 7))
    for weight, dw in ((memory[1:], memory[:-1]), (memory[:7], memory[6::-1])):
        given["weight"] = weight.copy()
        expected = call("prelu_backward", given)
        out = (np.empty_like(given["x"]), dw)
        call("prelu_backward", given | {"weight": weight, "out": out})
        assert_same(out[0], expected[0])
        assert_same(dw, expected[1])


@each_first_array
@pytest.mark.parametrize("how", ["out", "inplace"])
def test_empty_arrays_in_one_place(function, argument, how):
    given = sound(function, (3, 0, 7))
    x = given[argument]
    out = x[:, :0]
    more = {"inplace": True} if how == "inplace" else {"out": out}
    result = several(call(function, given | more))[0]
    assert result is (x if how == "inplace" else out)


@pytest.mark.parametrize("wrong", [{"inplace": True}, {"out": 3}, {"inplace": 2}])
def test_wrong_beside_a_mask_for_which_there_is_no_memory(wrong):
    """What is wrong is told, though nobody could allocate what the call asks for."""
    x = np.broadcast_to(np.float32(1), (1 << 45,))
    with pytest.raises((TypeError, ValueError), match=r"^(inplace|out|x) must"):
        F.relu(x, return_mask=True, **wrong)
    with pytest.raises(MemoryError):
        F.relu(x, return_mask=True)


# What looks wrong and is not


@each_first_array
@pytest.mark.parametrize("kind", ["list", "tuple", "float", "float64", "0-d"])
def test_what_asarray_takes(function, argument, kind):
    make = {
        "list": np.ndarray.tolist,
        "tuple": lambda a: tuple(map(tuple, a.tolist())),
        "float": float,
        "float64": np.float64,
        "0-d": np.array,
    }[kind]
    shape = (2, 3) if kind in ("list", "tuple") else ()
    given = sound(function, shape, np.dtype(float))
    if "weight" in given and not shape:
        given["weight"] = np.array(0.5)
    expected = several(call(function, given))
    got = several(call(function, given | {argument: make(given[argument])}))
    for a, b in zip(got, expected, strict=True):
        assert_same(np.asarray(a), b)


def test_lists_throughout():
    assert_same(F.relu([1, -2]), np.array([1, 0]))
    assert_same(F.leaky_relu([[1.0, -2.0]], 0.5), np.array([[1.0, -1.0]]))
    assert_same(F.prelu([[1.0, -2.0]], [3.0, 0.5]), np.array([[1.0, -1.0]]))
    dx, dw = F.prelu_backward([[1.0, 5.0]], [[1.0, -2.0]], [3.0, 0.5])
    assert_same(dx, np.array([[1.0, 2.5]]))
    assert_same(dw, np.array([0.0, -10.0]))


@each_function
def test_arrays_without_dimensions_stay_arrays(function):
    given = sound(function, (), np.dtype(float)) | (
        {"weight": np.array(0.5)} if "weight" in sound(function) else {}
    )
    for result in several(call(function, given)):
        assert type(result) is np.ndarray
        assert result.shape == ()


@each_array
@pytest.mark.parametrize("kind", ["swapped", "misaligned"])
def test_odd_memory(function, argument, kind):
    given = sound(function)
    expected = several(call(function, given))
    got = several(call(function, given | {argument: place(given[argument], kind)[0]}))
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)


@each_function
def test_memmap(function, tmp_path):
    given = sound(function)
    first = next(iter(given))
    expected = several(call(function, given))[0]
    mapped = np.memmap(tmp_path / "data", np.float32, "w+", shape=(2, 3))
    mapped[...] = given[first]
    assert_same(several(call(function, given | {first: mapped}))[0], expected)
    for more in ({first: mapped, "inplace": True}, {"out": mapped}):
        assert several(call(function, given | more))[0] is mapped
        mapped.flush()
        written = np.fromfile(tmp_path / "data", np.float32).reshape(2, 3)
        assert_same(written, expected)


class Odd(np.ndarray):
    """An array that answers no question about itself"""

    dtype = shape = strides = flags = ndim = size = nbytes = property(fails)
    __array_function__ = fails


@each_function
def test_a_subclass_may_answer_otherwise(function):
    given = sound(function)
    expected = several(call(function, given))
    for argument in given:
        taken = {argument: given[argument].view(Odd)}
        for a, b in zip(several(call(function, given | taken)), expected, strict=True):
            assert_same(a, b)
    out = np.empty_like(expected[0]).view(Odd)
    assert several(call(function, given | {"out": out}))[0] is out
    assert_same(out.view(np.ndarray), expected[0])


@pytest.mark.parametrize("first", ["l", "q"])
def test_integer_types_of_one_size(first):
    """C's long and long long are one dtype by ==, but two to a ufunc."""
    relu = _dispatch._Forward(activations._RELU)
    for code in (first, *np.typecodes["AllInteger"]):
        x = np.array([1, 2], code)
        y = relu.call(x, False, None, False)
        assert y.tolist() == [1, 2]
        assert y.dtype.char == np.dtype(code).char


HUGE = [(2**60, "f4"), (2**50, "f2"), (2**63 - 1, "i1"), (2**63 - 5000, "u1")]


@pytest.mark.parametrize(("size", "dtype"), HUGE)
@each_function
def test_arrays_larger_than_memory(function, size, dtype):
    """One element, broadcast: the result cannot be had."""
    name = function.removesuffix("_backward")
    if dtype in ("i1", "u1") and not reference.DEFINITIONS[name].integers:
        dtype, size = "f8", size // 8
    x = as_strided(np.ones((), dtype), (size,), (0,))
    given = sound(function, (1, 1), x.dtype)
    given |= {name: x for name in given if name != "weight"}
    with pytest.raises(MemoryError):
        call(function, given)
    if x.nbytes < 2**62:
        with pytest.raises(ValueError, match="memory between its own elements"):
            call(function, given | {"out": x})


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@each_function
def test_matrix(function):
    given = sound(function)
    first = next(iter(given))
    expected = several(call(function, given))[0]
    for argument in given.keys() - {"weight"}:
        got = call(function, given | {argument: np.matrix(given[argument])})
        assert_same(several(got)[0], expected)
    matrix = np.matrix(given[first])
    got = call(function, given | {first: matrix, "inplace": True})
    assert several(got)[0] is matrix
    assert_same(matrix, expected)


def test_in_place_with_the_other_gradient_in_the_same_memory():
    x, weight = normal((2, 3), FLOAT32), normal(3, FLOAT32, 1)
    memory = normal((2, 3), FLOAT32, 2)
    for grad in (memory, memory[:, ::-1]):  # the quick and the long way
        given = {"grad_output": grad, "x": x, "weight": weight}
        given |= {"inplace": True, "out": (None, memory[1])}
        refuses(ValueError, "out", "prelu_backward", given)
        given["out"] = None, np.empty(3, np.float32)
        assert F.prelu_backward(grad.copy(), x, weight, out=given["out"])[1].size == 3


# Arguments that change while they are looked at ---------------------------------------


def regrow(x, size):
    """Give an array other memory, as nobody should."""
    x.resize(size, refcheck=False)


CHANGES = {
    "larger": lambda x: regrow(x, (64, 3)),
    "smaller": lambda x: regrow(x, (1, 3)),
    "gone": lambda x: regrow(x, (0, 3)),
    "another dtype": lambda x: setattr(x, "dtype", np.float16),
    "another shape": lambda x: setattr(x, "shape", (3, -1)),
    "read-only": lambda x: setattr(x.flags, "writeable", False),
}


class Subclass(np.ndarray):
    """Whose views are made before anything else is looked at"""


@pytest.mark.filterwarnings("ignore:Setting the:DeprecationWarning")  # NumPy 2.5
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", [np.ndarray, Subclass])
@pytest.mark.parametrize("where", ["axis", "weight"])
@takes("weight")
def test_code_of_an_argument_changes_another_one(function, where, kind, change):
    """What `__index__` and `__array__` do comes before all that is looked at."""
    given = sound(function, (40, 3))
    first = next(iter(given))
    owner = np.array(given[first]).view(kind)  # of memory that may be given back
    weight = given["weight"].copy()

    class Changes:
        def __index__(self):
            CHANGES[change](owner)
            return 1

        def __array__(self, dtype=None, copy=None):
            CHANGES[change](owner)
            return weight

    given |= {first: owner, where: Changes()}
    if change == "read-only":
        call(function, given)
        owner.flags.writeable = True
        refuses(ValueError, first, function, given | {"inplace": True})
        return
    for more in ({}, {"inplace": True}):
        given[first] = owner = np.array(sound(function, (40, 3))[first]).view(kind)
        try:
            result = several(call(function, given | more))[0]
        except (TypeError, ValueError):
            continue  # it no longer goes with the others
        assert result.shape == owner.shape


@pytest.mark.filterwarnings("ignore:Setting the:DeprecationWarning")  # NumPy 2.5
@pytest.mark.parametrize("change", ["another dtype", "another shape", "read-only"])
@each_function
def test_an_argument_changes_after_the_checks(function, change, monkeypatch):
    """By another thread, or a finalizer: what was checked is what is used."""
    given = sound(function, (6, 4)) | {"inplace": np.False_}  # not for the quick way
    expected = [a.copy() for a in several(call(function, given))]
    empty_like = cpu.empty_like

    def make(x):
        made = empty_like(x)
        for name in ("x", "grad_output", "saved"):
            if name in given:
                CHANGES[change](given[name])
        return made

    monkeypatch.setattr(cpu, "empty_like", make)
    if function == "prelu_backward":
        given["out"] = None, given["weight"].copy()  # or it would change twice
    for got, value in zip(several(call(function, given)), expected, strict=True):
        assert_same(got, value)


class Stop(Exception):
    """What a signal's handler may raise"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer")
@each_function
def test_what_a_handler_raises_arrives(function):
    """At any moment of a call, whichever way it takes."""
    given = sound(function, (2, 8))
    double = {name: a.astype(float)[:, ::2] for name, a in given.items() if a.ndim > 1}
    ways = [given, given | double] if "weight" not in given else [given]
    ways += [given | {"axis": np.int64(1)}] if "weight" in given else []
    if "negative_slope" in inspect.signature(FUNCTIONS[function]).parameters:
        ways += [given | {"negative_slope": 1}, given | {"negative_slope": np.int8(1)}]
    if "saved" in given:
        ways.append(given | {"saved": mask_for(function, given["saved"])})

    def handler(*_):
        raise Stop

    for way in ways:
        call(function, way)
    before = signal.signal(signal.SIGALRM, handler)
    caught, end = 0, time.monotonic() + 1
    moments = itertools.cycle(np.geomspace(5e-6, 5e-4, 97).tolist())
    try:
        while time.monotonic() < end:
            try:
                signal.setitimer(signal.ITIMER_REAL, next(moments))
                while True:
                    for way in ways:
                        call(function, way)
            except Stop:
                caught += 1
    finally:
        signal.signal(signal.SIGALRM, before)
    assert caught > 100
