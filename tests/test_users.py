"""Arguments as people have them: plain numbers, other dtypes, other libraries' arrays."""

import importlib.util
import subprocess
import sys
import types

import ml_dtypes
import numpy as np
import pytest
from conftest import FLOATS, sample
from reference import assert_same

import fastrelu as F
from fastrelu import _arguments, activations

X = sample((4, 3, 5), np.dtype(np.float32))


# Numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, indirect=True)
@pytest.mark.parametrize(
    "weight", [0.1, 1, [0.1, 0.2, 0.3], [[0.1], [2], [-3.5]], (1, 2, 3)]
)
def test_numbers_of_python_for_a_weight(dtype, weight):
    """They take x's dtype, rounded once."""
    x, g = sample((4, 3, 5), dtype), sample((4, 3, 5), dtype, seed=1)
    of_dtype = np.array(weight).astype(dtype)
    assert_same(F.prelu(x, weight), F.prelu(x, of_dtype))
    dx, dw = F.prelu_backward(g, x, weight)
    expected, sums = F.prelu_backward(g, x, of_dtype)
    assert_same(dx, expected)
    assert dw.dtype == dtype
    assert_same(np.asarray(dw), sums)
    assert isinstance(dw, np.ndarray) == isinstance(weight, (list, tuple))


def test_a_weight_is_rounded_to_bfloat16_once():
    """By way of float32 alone, a tie would be made that is none."""
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    just_above, just_below = 1 + 2.0**-8 + 2.0**-40, 1 + 3 * 2.0**-8 - 2.0**-40
    rounded = _arguments.weakly(
        "weight", np.array([just_above, just_below, -just_above]), bfloat16
    )
    assert rounded.astype(float).tolist() == [1 + 2.0**-7, 1 + 2.0**-7, -1 - 2.0**-7]


@pytest.mark.parametrize(
    ("weight", "error", "said"),
    [
        (1e39, ValueError, r"weight must fit float32, got 1e\+39"),
        ([0.1, -1e39, 1.0], ValueError, "weight must fit float32, got"),
        (10**400, TypeError, "weight must be real numbers"),
        (True, TypeError, "weight must have dtype"),
        ([True, 1.0, 2.0], TypeError, "weight must have the dtype of x"),
        (np.float64(0.25), TypeError, r"take weight.astype\(x.dtype\)"),
        (np.ones(3), TypeError, r"take weight.astype\(x.dtype\)"),
        ([], ValueError, "weight must have one element, or 3"),
    ],
)
def test_weights_that_are_refused(weight, error, said):
    with pytest.raises(error, match=said):
        F.prelu(X, weight)


@pytest.mark.parametrize(
    "number",
    [-1.5, 3, np.float32(-1.5), np.float16(2), np.int8(-3), ml_dtypes.bfloat16(1.5)],
)
def test_a_number_in_a_number_out(number):
    dtype = np.asarray(number).dtype
    y = F.relu(number)
    assert type(y) is dtype.type
    assert y == max(number, 0)
    again, mask = F.relu(number, return_mask=True)
    assert type(again) is dtype.type
    assert (mask.shape, bool(mask.count())) == ((), number > 0)
    assert type(F.relu_backward(number, number)) is dtype.type
    assert type(F.relu(np.asarray(number))) is np.ndarray
    out = np.zeros((), dtype)
    assert F.relu(number, out=out) is out
    if dtype.kind != "i":
        dx, dw = F.prelu_backward(number, number, 0.5)
        assert (type(dx), type(dw)) == (dtype.type, dtype.type)
        assert type(F.leaky_relu(number, 0.5)) is dtype.type


# Gradients ----------------------------------------------------------------------------


def test_one_number_for_all_gradients():
    """What a derivative is: no array of ones, and none is made."""
    active = X > 0
    assert_same(F.relu_backward(1.0, X), active.astype(np.float32))
    assert_same(F.relu_backward(np.float64(2), X), np.where(active, 2.0, 0.0))
    assert_same(
        F.leaky_relu_backward(1, X, 0.5), np.where(active, 1, 0.5).astype(np.float32)
    )
    for x in (X.T, X[:, ::2], X.astype(ml_dtypes.bfloat16)):
        dx = F.relu_backward(1.0, x)
        assert_same(dx, (x > 0).astype(x.dtype))
        assert dx.strides == np.empty_like(x).strides
    assert_same(F.relu_backward(1.0, active), active.astype(float))
    integers = np.array([-1, 0, 2])
    assert_same(F.relu_backward(1, integers), np.array([0, 0, 1]))
    assert_same(F.relu_backward(0.5, integers), np.array([0.0, 0.0, 0.5]))
    _, mask = F.relu(X, return_mask=True)
    assert_same(F.relu_backward(1.0, mask), active.astype(float))
    assert_same(F.relu_backward(1, mask), active.astype(int))
    out = np.empty_like(X)
    assert F.relu_backward(1.0, X, out=out) is out
    dx, dw = F.prelu_backward(1.0, X, [0.1, 0.2, 0.3])
    expected = F.prelu_backward(np.ones_like(X), X, np.array([0.1, 0.2, 0.3], X.dtype))
    assert_same(dx, expected[0])
    assert_same(dw, expected[1])
    for slopes in (0.5, np.full_like(X, 0.5)):
        dx = F.rrelu_backward(2.0, X, slopes)
        assert_same(dx, F.leaky_relu_backward(2.0, X, 0.5))
    with pytest.raises(TypeError, match="grad_output must be an array"):
        F.relu_backward(1.0, X, inplace=True)
    with pytest.raises(TypeError, match="inplace must be True or False"):
        F.relu_backward(1.0, X, inplace=0)


@pytest.mark.parametrize("name", ["leaky_relu", "threshold"])
def test_what_was_active_is_asked_in_the_dtype_of_the_forward_pass(name):
    """A float64 that float32 has not is positive all the same."""
    numbers = {"leaky_relu": (0.5,), "threshold": (1e-300,)}[name]
    saved = np.array([2e-300, -2e-300, 0.0, np.nan, 1e-300])
    active = [True, False, False, False, name == "leaky_relu"]
    backward = getattr(F, f"{name}_backward")
    g = np.full(5, 3, np.float32)
    other = 1.5 if name == "leaky_relu" else 0.0
    assert_same(backward(g, saved, *numbers), np.where(active, 3, other).astype("f4"))
    assert_same(backward(g, np.array(active), *numbers), backward(g, saved, *numbers))


def test_errors_of_axes_where_there_are_none():
    scalar = np.ones((), np.float32)
    for axis in (0, 1, -1):
        with pytest.raises(ValueError, match="one element where x has 0 dimensions"):
            F.prelu(scalar, np.ones(3, np.float32), axis=axis)
        assert F.prelu(scalar, np.ones(1, np.float32), axis=1) == 1


# What carries more than numbers -------------------------------------------------------


class Metres(np.ndarray):
    def __array_finalize__(self, other):
        self.unit = getattr(other, "unit", "m")


def of_package(name, kind="Labelled"):
    """An array-like whose class is some package's"""
    kind = type(kind, (), {"__module__": name, "__array__": lambda *_: X})
    return kind()


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (X.view(Metres), "numpy.asarray"),
        (np.ma.masked_array(X, X > 0), "fill its gaps"),
        (of_package("dask.dataframe"), "to_dask_array"),
        (of_package("pandas.core.series"), "to_numpy"),
        (of_package("pint.registry"), "magnitude"),
        (of_package("jax._src.core"), "pure_callback"),
        (of_package("polars.series.series"), "its .to_numpy"),
        (of_package("polars.lazyframe.frame", "LazyFrame"), "collect"),
        (of_package("pyarrow.lib", "Table"), "each column"),
        (of_package("pyarrow.lib"), "to_numpy"),
        (of_package("sparse.numba_backend"), "todense"),
        (of_package("tensorflow.python"), r"\.numpy"),
        (of_package("xarray.core.dataarray"), "apply_ufunc"),
    ],
)
def test_nothing_is_dropped_in_silence(value, remedy):
    with pytest.raises(TypeError, match=f"x must be .* more than numbers.*{remedy}"):
        F.relu(value)
    for given in ({"out": value}, {"inplace": True}):
        with pytest.raises(TypeError, match=remedy):
            F.relu(*([X] if "out" in given else [value]), **given)


def test_nothing_in_a_list_is_dropped_in_silence():
    gaps = np.ma.array([1.0, 2.0], mask=[False, True])
    for given in ([gaps], (gaps,), [[1.0, 2.0], gaps], [[gaps], [gaps]]):
        with pytest.raises(TypeError, match=r"x must be .* fill its gaps first"):
            F.relu(given)
    assert_same(F.relu([[1.0], (-2.0,)]), np.array([[1.0], [0.0]]))
    assert_same(F.relu([X[0], X[1]]), F.relu(X[:2]))
    doubles = X.astype(float)
    assert_same(F.relu([doubles[0], doubles[1].tolist()]), F.relu(doubles[:2]))


class Once:
    """An object that has an array once"""

    def __array__(self, dtype=None, copy=None):
        assert not vars(self).setdefault("asked", [])
        self.asked.append(True)
        return np.array([[-1.0, 2.0]])


def test_what_was_saved_is_read_once():
    expected = np.array([[0.0, 1.0]])
    assert_same(F.relu_backward(1.0, Once()), expected)
    out = np.empty((1, 2))
    assert_same(F.relu_backward(1.0, Once(), out=out), expected)
    dx, dw = F.prelu_backward(1.0, Once(), 0.5)
    assert_same(dx, np.array([[0.5, 1.0]]))
    assert dw == -1


def test_a_slope_goes_with_the_gradient_and_not_with_what_was_saved():
    grad, signs = np.ones(3), np.array([-1, 0, 1])
    for dtype in (np.float16, np.float32, np.float64, np.int8, bool):
        saved = (signs > 0) if dtype is bool else signs.astype(dtype)
        for g in (grad, grad.tolist(), grad.astype(">f8")):
            dx = F.leaky_relu_backward(g, saved, 1e39)
            assert_same(dx, np.array([1e39, 1e39, 1.0]))
    with pytest.raises(ValueError, match="threshold must be finite in float32"):
        F.threshold_backward(grad, signs.astype("f4"), 1e39)  # where it is asked


def test_a_subclass_that_says_nothing_is_an_array():
    plain = type("Plain", (np.ndarray,), {})
    assert_same(F.relu(X.view(plain)), F.relu(X))
    assert_same(F.relu(X[0].view(np.matrix)), F.relu(X[0]))


class Theirs:
    """An array of a library that follows the array API"""

    def __init__(self, array):
        self.array = array

    def __array_namespace__(self, api_version=None):
        functions = {
            "from_dlpack": lambda y: Theirs(np.from_dlpack(y)),
            "asarray": Theirs,
        }
        return types.SimpleNamespace(**functions)

    @property
    def shape(self):
        return self.array.shape

    def __dlpack__(self, **more):
        return self.array.__dlpack__(**more)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __array__(self, dtype=None, copy=None):
        return self.array


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_arrays_of_other_libraries_come_back_as_theirs(dtype):
    own = X.astype(dtype)
    y = F.relu(Theirs(own))
    assert type(y) is Theirs
    assert_same(y.array, F.relu(own))
    y, mask = F.relu(Theirs(own), return_mask=True)
    assert_same(mask.unpack(), own > 0)
    dx = F.relu_backward(y, Theirs(own))
    assert_same(dx.array, F.relu_backward(y.array, own))
    if dtype is np.float32:
        x = Theirs(own.copy())
        assert F.relu(x, inplace=True) is x
        assert_same(x.array, F.relu(own))


def test_a_slope_that_another_library_keeps_in_an_array():
    slope = np.array(0.1, np.float32)
    assert_same(F.leaky_relu(X, Theirs(slope)), F.leaky_relu(X, slope))
    with pytest.raises(TypeError, match="must be a real number, got Theirs"):
        F.leaky_relu(X, Theirs(X))
    assert_same(F.leaky_relu_backward(X, X, Theirs(slope)), F.leaky_relu(X, slope))


# Each in a process of its own: JAX has threads, and does not bear a fork.
LIBRARIES = {
    "jax": """
        import jax, jax.numpy as jnp
        for dtype in (jnp.float32, jnp.bfloat16, jnp.int32):
            x = jnp.array([[-1, 0, 2]], dtype)
            y, mask = F.relu(x, return_mask=True)
            assert isinstance(y, jax.Array) and y.dtype == dtype and (y == x * (x > 0)).all()
            assert (F.relu_backward(x, mask) == y).all()
        x = jnp.array([[-1.0, 0.0, 2.0]])
        weight = jnp.array([0.1, 0.2, 0.3])
        assert (F.prelu(x, weight) == jnp.where(x > 0, x, weight * x)).all()
        dx, dw = F.prelu_backward(x, x, weight)
        assert isinstance(dw, jax.Array) and dw.tolist() == [1, 0, 0]
        for slope in (jnp.float32(0.1), jnp.array(0.1), jnp.bfloat16(0.1)):
            assert isinstance(F.leaky_relu(np.ones(3), slope), np.ndarray)
            assert F.leaky_relu(x, slope)[0, 0] == -jnp.float32(slope)
        refuse("writeable", F.relu, x, inplace=True)
        refuse("writeable", F.relu, np.zeros((1, 3), np.float32), out=x)
        refuse("pure_callback", jax.jit(F.relu), x)
        refuse("pure_callback", jax.grad(lambda x: F.relu(x).sum()), x)
        traced = jax.jit(lambda x: jax.pure_callback(F.relu, x, x))
        assert (traced(x) == jax.nn.relu(x)).all()
    """,
    "pandas": """
        import pandas
        series = pandas.Series([-1.0, 2.0])
        for value in (series, series.to_frame(), pandas.Index(series), pandas.array(series)):
            refuse("to_numpy", F.relu, value)
            assert type(F.relu(value.to_numpy())) is np.ndarray
        refuse("to_numpy", F.relu, np.ones(2), out=series)
        refuse("to_numpy", F.relu_backward, np.ones(2), series)
        refuse("to_numpy", F.prelu, np.ones((1, 2)), series)
    """,
    "polars": """
        import polars
        frame = polars.DataFrame({"a": [-1.0, 2.0]})
        for value in (frame, frame["a"]):
            refuse("take its .to_numpy()", F.relu, value)
            assert F.relu(value.to_numpy()).ravel().tolist() == [0, 2]
        refuse("take its .collect().to_numpy()", F.relu, frame.lazy())
        assert F.relu(frame.lazy().collect().to_numpy()).ravel().tolist() == [0, 2]
    """,
    "pyarrow": """
        import pyarrow
        array = pyarrow.array([-1.0, 2.0])
        for value in (array, pyarrow.chunked_array([array])):
            refuse("take its .to_numpy()", F.relu, value)
            assert F.relu(value.to_numpy()).tolist() == [0, 2]
        refuse("each column", F.relu, pyarrow.table({"a": array}))
    """,
    "astropy": """
        import astropy.units
        metres = np.array([-1.0, 2.0]) * astropy.units.m
        refuse("take its .value", F.relu, metres)
        refuse("take its .value", F.relu, metres, out=metres.to("cm"))
        assert F.relu(metres.value).tolist() == [0, 2]
    """,
    "pint": """
        import pint
        metres = np.array([-1.0, 2.0]) * pint.UnitRegistry().m
        refuse("take its .magnitude", F.relu, metres)
        assert F.relu(metres.magnitude).tolist() == [0, 2]
    """,
    "sparse": """
        import sparse
        value = sparse.COO.from_numpy(np.array([-1.0, 2.0]))
        refuse("take its .todense()", F.relu, value)
        assert F.relu(value.todense()).tolist() == [0, 2]
    """,
    "array_api_strict": """
        import array_api_strict as xp
        x = xp.asarray([[-1.0, 2.0]])
        assert type(F.relu(x)) is type(x)
        assert xp.all(F.prelu(x, xp.asarray([0.5, 0.5])) == xp.asarray([[-0.5, 2.0]]))
        assert type(F.leaky_relu(x, xp.asarray(0.5))) is type(x)
    """,
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_as_they_are(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    script = """if True:
        import numpy as np
        import fastrelu as F

        def refuse(said, function, *arguments, **options):
            try:
                function(*arguments, **options)
            except (TypeError, ValueError) as error:
                assert said in str(error), error
            else:
                raise AssertionError(f"not refused: {said}")
    """
    command = [sys.executable, "-c", script + LIBRARIES[name]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def dual(torch, call):
    forward = torch.autograd.forward_ad
    with forward.dual_level():
        assert torch.equal(F.relu(torch.ones(2)), torch.ones(2))
        call(forward.make_dual(torch.ones(2), torch.ones(2)))


def freed(torch, call):
    x = torch.ones(2)
    x.untyped_storage().resize_(0)
    call(x)


def recorded(torch, call):
    tracer = pytest.importorskip("torch.fx.experimental.proxy_tensor")
    tracer.make_fx(lambda x: call(2 * x))(torch.ones(2))


def subclass(torch, call):
    class Units(torch.Tensor):
        pass

    call(torch.ones(2).as_subclass(Units))


# What makes such a tensor and calls something with it, and what the error says.
NOT_PLAIN = {
    "requires a gradient": (
        lambda torch, call: call(torch.ones(2, requires_grad=True)),
        "detach",
    ),
    "dual": (dual, "detach"),
    "sparse": (lambda torch, call: call(torch.ones(2).to_sparse()), "to_dense"),
    "quantized": (
        lambda torch, call: call(
            torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)
        ),
        "dequantize",
    ),
    "nested": (
        lambda torch, call: call(torch.nested.nested_tensor([torch.ones(2)])),
        "unbind",
    ),
    "of a class": (subclass, "Units.*as_subclass"),
    "freed": (freed, "no memory"),
    "on no device": (
        lambda torch, call: call(torch.ones(2, device="meta")),
        "no memory",
    ),
    "of all zeros": (
        lambda torch, call: call(torch._efficientzerotensor(2)),
        "no memory",
    ),
    "of a batch": (
        lambda torch, call: torch.func.vmap(call)(torch.ones(1, 2)),
        "no memory",
    ),
    "functional": (
        lambda torch, call: torch.func.functionalize(call)(torch.ones(2)),
        "no memory",
    ),
    "traced": (lambda torch, call: torch.jit.trace(call, torch.ones(2)), "traces"),
    "recorded": (recorded, "traces"),
}


# What a user may write with arrays or tensors: of x and a weight of its columns.
QUICK = {
    "relu": lambda x, w: F.relu(x),
    "out": lambda x, w: F.relu(x, out=x[:] * 1),
    "in place": lambda x, w: F.relu(x[:] * 1, inplace=True),
    "mask": lambda x, w: F.leaky_relu(x, 0.1, return_mask=True),
    "backward": lambda x, w: F.relu_backward(x, x),
    "backward of a mask": lambda x, w: F.relu_backward(
        x, F.relu(x, return_mask=True)[1]
    ),
    "backward of bools": lambda x, w: F.relu_backward(x, x > 0),
    "weight": lambda x, w: F.prelu(x, w),
    "both gradients": lambda x, w: F.prelu_backward(x, x, w),
    "strides": lambda x, w: F.relu(x[:, ::2]),
    "no dimensions": lambda x, w: F.relu(x[0, :1].reshape(())),
}


def torch_tensor(path, array):
    return pytest.importorskip("torch").tensor(array)


def memory_map(path, array):
    written = np.memmap(path, array.dtype, "w+", shape=array.shape)
    written[...] = array
    return written


def test_numbers_of_python_for_a_weight_of_swapped_bytes():
    assert_same(F.prelu(X.astype(">f4"), 0.25), F.prelu(X, 0.25))
    with pytest.raises(TypeError, match="x must have dtype"):
        F.prelu(np.ones((2, 3), int), 0.25)


@pytest.mark.parametrize("kind", [torch_tensor, memory_map])
def test_results_are_written_to_what_was_given(kind, tmp_path):
    x = np.linspace(-2, 2, 12, dtype="f4").reshape(4, 3)
    w, zeros = np.full(3, 0.25, "f4"), np.zeros((4, 3), "f4")
    made = [kind(tmp_path / str(i), each) for i, each in enumerate((x, w, zeros, w))]
    given, weight, out, dw = made
    for target in (out, zeros):
        assert F.relu(given, out=target) is target
        assert F.relu(given, return_mask=True, out=target)[0] is target
        np.testing.assert_array_equal(target, F.relu(x))
        assert F.relu(x, out=target) is target
    for pair in ((out, dw), (zeros, w.copy())):
        results = F.prelu_backward(given, given, weight, out=pair)
        assert [a is b for a, b in zip(results, pair, strict=True)] == [True, True]
        for y, expected in zip(pair, F.prelu_backward(x, x, w), strict=True):
            np.testing.assert_array_equal(y, expected)
    fresh = type(F.relu(given))
    assert type(F.prelu_backward(given, given, w)[1]) is np.ndarray
    assert type(F.prelu_backward(given, given, 0.25)[1]) is np.float32
    assert type(F.prelu_backward(x, x, weight)[1]) is fresh
    assert type(F.prelu_backward(x, x, weight)[0]) is np.ndarray
    assert F.prelu(given, weight, inplace=True) is given
    np.testing.assert_array_equal(given, F.prelu(x, w))


@pytest.mark.parametrize("kind", [torch_tensor, memory_map])
def test_what_a_signal_handler_raises_is_not_lost(kind, tmp_path, monkeypatch):
    """Whatever it is; and nothing is done twice."""
    x, quick = (
        kind(tmp_path / "x", -np.ones(3, "f4")),
        activations._leaky_relu_forward.quick,
    )
    F.leaky_relu(x, 0.5, inplace=True)
    call = quick.call

    def interrupted(*given):
        call(*given)
        raise ValueError

    monkeypatch.setattr(quick, "call", interrupted)
    with pytest.raises(ValueError, match=r"^$"):
        F.leaky_relu(x, 0.5, inplace=True)
    assert x.tolist() == 3 * [-0.25]


class TestTensors:
    @pytest.fixture(autouse=True)
    def torch(self):
        return pytest.importorskip("torch")

    @pytest.mark.parametrize(
        "name", ["float16", "bfloat16", "float32", "float64", "int32"]
    )
    def test_come_back_as_tensors(self, torch, name):
        x = (torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)) * 9).to(
            getattr(torch, name)
        )
        for each in (x, x.transpose(0, 2), x[:, ::2]):
            assert torch.equal(F.relu(each), torch.relu(each))
            y, mask = F.relu(each, return_mask=True)
            assert torch.equal(F.relu_backward(y, mask), torch.relu(each))
            out = torch.empty_like(each)
            assert F.relu(each, out=out) is out
            assert torch.equal(out, torch.relu(each))
        y = F.relu(x, inplace=True)
        assert y is x
        assert bool((x >= 0).all())

    @pytest.mark.parametrize("name", QUICK)
    def test_cost_little_more_than_arrays(self, torch, name, monkeypatch):
        """No check that costs time is asked of what is plainly an array"""
        call = QUICK[name]
        arrays = (
            np.linspace(-2, 2, 12, dtype="f4").reshape(4, 3),
            np.full(3, 0.25, "f4"),
        )
        theirs = call(*arrays)
        tensors = tuple(map(torch.tensor, arrays))
        call(*tensors)
        monkeypatch.setattr(_arguments, "read", None)  # the long way's
        ours = call(*tensors)
        with torch.no_grad():
            call(tensors[0].requires_grad_(), tensors[1])
        if not isinstance(theirs, tuple):
            ours, theirs = (ours,), (theirs,)
        for y, expected in zip(ours, theirs, strict=True):
            assert type(y) is (F.Mask if type(expected) is F.Mask else torch.Tensor)
            np.testing.assert_array_equal(y, expected)

    def test_are_named_where_something_is_wrong(self, torch):
        x = torch.ones(2)
        for call in (
            lambda: F.relu(x, return_mask=x),
            lambda: F.relu(x, out=[x]),
            lambda: F.leaky_relu(x, x),
        ):
            with pytest.raises(TypeError, match=r"got (Tensor|list)"):
                call()
        with pytest.raises(ValueError, match="saved must have the shape"):
            F.relu_backward(x, x[:1])
        assert torch.equal(x, torch.ones(2))

    def test_of_dtypes_that_numpy_has_not(self, torch):
        x, strange = torch.ones(3), torch.ones(3).to(torch.float8_e4m3fn)
        for name, call in {
            "x": lambda: F.relu(strange),
            "out": lambda: F.relu(x, out=strange),
            "saved": lambda: F.relu_backward(x, strange),
            "weight": lambda: F.prelu(x[None], strange),
        }.items():
            said = f"{name} must be .* got a tensor of float8_e4m3fn"
            with pytest.raises(TypeError, match=said):
                call()
        both = torch.ones(1), strange
        with pytest.raises(TypeError, match=r"out\[1\] must be .* float8_e4m3fn"):
            F.prelu_backward(x[:1, None], x[:1, None], x[:1], out=both)

    def test_of_another_dtype_for_a_weight(self, torch):
        with pytest.raises(TypeError, match=r"take weight\.to\(x\.dtype\)"):
            F.prelu(torch.ones(1, 2), torch.ones(2, dtype=torch.float64))

    @pytest.mark.filterwarnings("error")
    def test_without_memory_where_warnings_are_errors(self, torch):
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            x = torch.ones(3)
        with pytest.raises(TypeError, match="x must be"):
            F.relu(x)

    def test_share_their_memory(self, torch):
        x = torch.randn(4)
        y = F.relu(x)
        assert y.data_ptr() != x.data_ptr()
        assert F.relu(x, inplace=True).data_ptr() == x.data_ptr()

    def test_of_gradients(self, torch):
        x = torch.randn(2, 3, 4)
        dx, dw = F.prelu_backward(x, x, torch.tensor([0.1, 0.2, 0.3]))
        assert (type(dx), type(dw)) == (torch.Tensor, torch.Tensor)
        assert type(F.relu_backward(1.0, x)) is torch.Tensor
        y, slopes = F.rrelu(x, training=True, rng=0)
        assert (type(y), type(slopes)) == (torch.Tensor, torch.Tensor)
        assert torch.equal(y, torch.where(x > 0, x, slopes * x))

    def test_whose_gradient_would_be_lost(self, torch):
        x = torch.randn(3, requires_grad=True)
        with pytest.raises(TypeError, match="detach"):
            F.relu(x)
        with torch.no_grad():
            assert torch.equal(F.relu(x), torch.relu(x))
        assert torch.equal(F.relu(x.detach()), torch.relu(x))

    @pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
    @pytest.mark.parametrize("kind", NOT_PLAIN)
    def test_that_are_more_than_numbers_or_less(self, torch, kind):
        make, said = NOT_PLAIN[kind]
        for call in (
            F.relu,
            lambda x: F.relu(x, inplace=True),
            lambda x: F.relu(np.ones(2, np.float32), out=x),
            lambda x: F.relu_backward(np.ones(2, np.float32), x),
            lambda x: F.prelu(np.ones(2, np.float32), x, axis=0),
            lambda x: F.leaky_relu(np.ones(2, np.float32), x),
        ):
            with pytest.raises(TypeError, match=rf"(?s)must be .*{said}"):
                make(torch, call)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int8"])
    def test_of_one_number(self, torch, dtype):
        number = torch.tensor(3, dtype=getattr(torch, dtype))
        assert torch.equal(
            F.leaky_relu(torch.tensor([-2.0]), number), torch.tensor([-6.0])
        )
        negative = torch.tensor(1 + 2j).conj().imag
        assert F.leaky_relu(np.float32(-1), negative) == 2
        for bad in (torch.ones(1), torch.tensor(1j), torch.tensor(True)):
            with pytest.raises(TypeError, match="negative_slope must be a real number"):
                F.leaky_relu(torch.ones(2), bad)

    def test_that_stand_for_the_negatives_of_their_memory(self, torch):
        x = torch.tensor([1 + 1j, 1 - 2j]).conj().imag
        assert x.is_neg()
        assert torch.equal(F.relu(x), torch.tensor([0.0, 2.0]))
        for call in (
            lambda: F.relu(x, inplace=True),
            lambda: F.relu(torch.ones(2), out=x),
            lambda: F.prelu_backward(*(3 * [torch.ones(1, 2)]), out=(None, x)),
        ):
            with pytest.raises(TypeError, match="resolve_neg"):
                call()
        assert torch.equal(x, torch.tensor([-1.0, 2.0]))

    @pytest.mark.parametrize(
        "write",
        [
            lambda x, w: F.relu(x, inplace=True),
            lambda x, w: F.relu(x.clone(), out=x, return_mask=True),
            lambda x, w: F.relu(x.numpy().copy(), out=x),
            lambda x, w: F.prelu(x, w, out=x),
            lambda x, w: F.relu_backward(x, x > 0, inplace=True),
            lambda x, w: F.prelu_backward(x, x, w, inplace=True),
            lambda x, w: F.prelu_backward(x.clone(), x, w, out=(None, x[0, :1])),
        ],
        ids=[
            "in place",
            "out",
            "an array's",
            "weights",
            "gradient",
            "both",
            "a weight's gradient",
        ],
    )
    def test_that_a_backward_pass_needed(self, torch, write):
        """PyTorch is told of what was written, and refuses to go on with it"""
        weight = torch.ones(2, 3, requires_grad=True)
        x = torch.randn(2, 3)
        loss = (weight * x).sum()
        write(x, torch.ones(1))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        with torch.inference_mode():  # where nobody counts
            write(torch.randn(2, 3), torch.ones(1))

    @pytest.mark.filterwarnings("ignore:Dynamo:UserWarning", "ignore::FutureWarning")
    def test_within_a_function_that_pytorch_compiles(self, torch):
        """Its graph breaks there, as at any function that it does not know"""

        def function(x):
            y, mask = F.relu(2 * x, return_mask=True)
            return F.relu_backward(y, mask) + 1

        x = torch.tensor([1.0, -1.0])
        for _ in "12":
            y = torch.compile(function, backend="eager")(x)
            assert torch.equal(y, torch.tensor([3.0, 1.0]))

    def test_of_bfloat16_without_a_dtype_for_it(self, torch, monkeypatch):
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
        with pytest.raises(TypeError, match="needs the package ml_dtypes"):
            F.relu(torch.ones(3, dtype=torch.bfloat16))
