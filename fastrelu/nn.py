"""Layers, a loss and an optimiser for small networks on plain arrays.

Every layer has ``forward`` and ``backward``, and `Parameter` objects that `SGD`
updates.  The activations are fastrelu's; everything else is asked of the
namespace that the arrays come from, so NumPy and CuPy arrays both work.  Layers
with parameters take that namespace as ``xp``.  On a GPU nothing here waits for the
device: results come when somebody looks at them.

>>> import numpy as np
>>> from fastrelu import nn
>>> rng = np.random.default_rng(0)
>>> model = nn.Sequential(nn.Dense(2, 16, rng=rng), nn.ReLU(), nn.Dense(16, 2, rng=rng))
>>> optimiser = nn.SGD(model.parameters, lr=0.1, momentum=0.9)
>>> x = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=np.float32)
>>> labels = np.array([0, 1, 1, 0])
>>> for _ in range(100):
...     loss, grad = nn.softmax_cross_entropy(model.forward(x), labels)
...     _ = model.backward(grad)
...     optimiser.step()
>>> model.forward(x, training=False).argmax(axis=1)
array([0, 1, 1, 0])

Gradients of several backward passes add up until a step uses them; the backward pass
after it replaces them.  Only a loop that updates parameters without `SGD` needs
``zero_grad``, as in PyTorch.
"""

import contextlib
import functools
import math
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fastrelu._arguments import (
    accepted,
    flag,
    generator,
    index,
    kind_of,
    number,
    shown,
    weakly,
)
from fastrelu._dtypes import FLOATS, is_accepted, row_of
from fastrelu._typing import Real
from fastrelu.activations import (
    leaky_relu,
    leaky_relu_backward,
    prelu,
    prelu_backward,
    relu,
    relu_backward,
)
from fastrelu.cpu.libraries import refuse

__all__ = [
    "SGD",
    "Activation",
    "Dense",
    "Layer",
    "LeakyReLU",
    "PReLU",
    "Parameter",
    "ReLU",
    "Sequential",
    "dead_units",
    "softmax_cross_entropy",
]

Array = Any  # an array of any namespace that follows NumPy's


def get_array_module(x: Array) -> Any:
    """Return the module of an array's library: numpy or cupy, imported already."""
    type_: Any = type(x)
    return sys.modules[_library(type_)]


@functools.cache
def _library(type_: type) -> str:
    names = [base.__module__.partition(".")[0] for base in type_.__mro__]
    known = (name for name in names if name in ("numpy", "cupy"))
    return next(known, names[0])


def _check_array(name: str, x: Array) -> None:
    """Refuse what is no array of NumPy or CuPy."""
    type_: Any = type(x)
    if _library(type_) not in ("numpy", "cupy") or not hasattr(type_, "__setitem__"):
        msg = f"{name} must be an array of NumPy or CuPy, got {kind_of(x)}"
        raise TypeError(msg)
    try:
        refuse(x)
    except TypeError as error:
        msg = f"{name} must be an array of NumPy or CuPy, {error}"
        raise TypeError(msg) from error


def _check_shape(name: str, x: Array, shape: tuple[int, ...]) -> None:
    """Refuse another shape."""
    if np.shape(x) != shape:
        msg = f"{name} must have shape {shape}, got {np.shape(x)}"
        raise ValueError(msg)


def _check_library(name: str, x: Array, other_name: str, other: Array) -> None:
    """Refuse arrays of two libraries."""
    _check_array(name, x)
    ours, others = get_array_module(x).__name__, get_array_module(other).__name__
    if ours != others:
        msg = f"{name} must be an array of {others} as {other_name} is, got {ours}'s"
        raise TypeError(msg)


def _check_output(out: Array, x: Array, shape: tuple[int, ...]) -> None:
    """Refuse an output that is not of x's library and dtype, or has another shape."""
    _check_library("out", out, "x", x)
    if out.dtype != x.dtype:
        msg = f"out must have the dtype of x, {x.dtype}, got {out.dtype}"
        raise TypeError(msg)
    _check_shape("out", out, shape)
    if not getattr(out.flags, "writeable", True):  # CuPy's all are
        msg = "out must be writeable, got a read-only array"
        raise ValueError(msg)


def _check_kept(x: Array, training: bool, out: Array | None) -> None:
    """Refuse an output that lies on an input which the backward pass needs."""
    if not flag("training", training) or out is None:
        return
    shares_memory = getattr(get_array_module(x), "shares_memory", None)
    both = shares_memory and type(out) is type(x) and shares_memory(x, out)
    if out is x or both:
        msg = "out must not be x, nor lie on it: the backward pass needs x"
        raise ValueError(msg)


def _count(name: str, value: Any) -> int:
    """Return an integer of at least 1."""
    n = index(name, value)
    if n < 1:
        msg = f"{name} must be at least 1, got {shown(n)}"
        raise ValueError(msg)
    return n


def _parameter_dtype(dtype: Any, xp: Any) -> np.dtype[Any]:
    """Return the dtype of a layer's parameters, which are to be arrays of ``xp``."""
    if not isinstance(xp, ModuleType) or xp.__name__ not in ("numpy", "cupy"):
        msg = f"xp must be the module numpy or cupy, got {_quoted(xp)}"
        raise TypeError(msg)
    found = np.dtype[Any](object)
    with contextlib.suppress(TypeError, ValueError):
        found = np.dtype(dtype)
    if not is_accepted(row_of(found), integers=False):
        msg = f"dtype must be {FLOATS}, got {_quoted(dtype)}"
        raise TypeError(msg)
    return found.newbyteorder("=")


def _quoted(value: object) -> str:
    """Return a value as text; a string is told from what it names by its quotes."""
    return repr(value) if isinstance(value, str) else shown(value)


@functools.cache
def _sum_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype to sum in: a sum of half floats soon stands still in its own."""
    return np.result_type(dtype, np.float32)


class Parameter:
    """An array that is learned, and the gradient of the loss towards it.

    Parameters
    ----------
    value : float array
        The start value, updated in place by `SGD`; a copy, if its bytes are swapped.
    decay : bool
        Whether weight decay applies.

    Raises
    ------
    TypeError
        If ``value`` is not an array of floats of NumPy or CuPy, or ``decay`` no bool.

    Attributes
    ----------
    grad : array
        The sum of the gradients of all backward passes since the latest step of an
        optimiser, or since `zero_grad`, in the dtype of ``value``.  Pickles and copies
        leave it out.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrelu import nn
    >>> p = nn.Parameter(np.array([1.0, 2.0]))
    >>> p.add_grad(np.array([3.0, 4.0]))
    >>> p.add_grad(np.array([3.0, 4.0]))
    >>> p.grad
    array([6., 8.])
    """

    _used = True  # whether a step has used grad, so that the next gradient replaces it

    def __init__(self, value: Array, *, decay: bool = True) -> None:
        _check_array("value", value)
        self.value = accepted("value", value)
        self.grad = get_array_module(value).zeros_like(self.value)
        self.decay = flag("decay", decay)

    def __repr__(self) -> str:
        return f"Parameter(shape={self.value.shape}, dtype={self.value.dtype})"

    def __getstate__(self) -> dict[str, Any]:
        left_out = "grad", "_used"
        return {k: v for k, v in self.__dict__.items() if k not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.grad = get_array_module(self.value).zeros_like(self.value)

    def zero_grad(self) -> None:
        """Set the gradient to 0."""
        self.grad[...] = 0
        self._used = True

    def add_grad(self, grad: Array) -> None:
        """Add a gradient to ``grad``, or replace it if a step has used it.

        Parameters
        ----------
        grad : array
            Of the shape of ``value``.

        Raises
        ------
        TypeError
            If it is no array of floats of ``value``'s library.
        ValueError
            If it has another shape: nothing is broadcast.
        """
        _check_library("grad", grad, "value", self.value)
        accepted("grad", grad)
        _check_shape("grad", grad, self.value.shape)
        if not self._used:
            self.grad += grad
        elif grad is not self.grad:
            self.grad[...] = grad
        self._used = False

    def _grad_out(self) -> Array | None:
        """Return ``grad`` where `add_grad` would replace it: it may be written to."""
        return self.grad if self._used else None


class Layer:
    """What `Sequential` asks of a layer.

    Attributes
    ----------
    inplace : bool
        Whether ``forward`` may be given its own input as ``out``, also when
        training.
    parameters : list of Parameter
        What the layer learns.

    Notes
    -----
    ``forward(x, training=True, out=None)`` returns a new array, or ``out`` once
    written, but never ``x`` itself or a view of it.  With ``training=False`` it
    saves nothing and leaves what is saved alone.  ``backward(grad_output,
    out=None)`` gives the gradients of the parameters to `Parameter.add_grad`,
    returns the gradient towards ``x`` and frees what was saved: once per forward
    pass, unless it has raised.  Its ``out`` may be the ``x`` of the forward pass, which is how
    `Sequential` needs no memory for gradients.

    What was saved belongs in the attribute ``_saved``, which pickles and copies
    leave out.
    """

    inplace = False
    _saved: Any = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_saved": None}

    @property
    def parameters(self) -> list[Parameter]:
        """The parameters, in a fixed order."""
        return []

    def zero_grad(self) -> None:
        """Set the gradients of all parameters to 0."""
        for p in self.parameters:
            p.zero_grad()

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the output for an input of the given shape."""
        return shape

    def forward(
        self, x: Array, /, *, training: bool = True, out: Array | None = None
    ) -> Array:
        """Return the output for ``x``."""
        raise NotImplementedError

    def backward(self, grad_output: Array, /, *, out: Array | None = None) -> Array:
        """Return the gradient towards the input of the latest forward pass."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _take(self) -> Iterator[Any]:
        """Give what the forward pass saved, and forget it unless its use fails."""
        if self._saved is None:
            msg = (
                f"{type(self).__name__}.backward needs a forward pass with "
                "training=True before it, and each serves one backward pass"
            )
            raise RuntimeError(msg)
        yield self._saved
        self._saved = None


class Dense(Layer):
    r"""A fully connected layer.

    .. math:: y = x W^T + b

    Parameters
    ----------
    in_features, out_features : int
        Columns of the input and of the output.
    negative_slope : float
        Slope below zero of the activation that follows: 0 for ReLU, the slope for
        Leaky ReLU and PReLU, 1 where none follows.  The weights are drawn from a
        normal distribution of variance ``2 / ((1 + slope**2) * in_features)``, so
        that the signal keeps its size from layer to layer [1]_.  The bias is 0.
    rng : numpy.random.Generator or int, optional
        Where the weights are drawn from.
    dtype : data-type
        Of the parameters and of every input, in the machine's own byte order.
    xp : module
        The namespace whose arrays the parameters are: numpy or cupy.

    Attributes
    ----------
    weight, bias : Parameter
        Of shapes ``(out_features, in_features)``, as in PyTorch, and
        ``(out_features,)``.

    Raises
    ------
    TypeError
        If an argument is of another kind, or ``dtype`` is not one of floats.
    ValueError
        If a number of features is below 1, or ``negative_slope`` is not finite.

    Notes
    -----
    When training, the layer holds ``x`` itself, not a copy: do not change ``x``
    between ``forward`` and ``backward``.

    References
    ----------
    .. [1] K. He, X. Zhang, S. Ren, J. Sun, "Delving Deep into Rectifiers",
       ICCV 2015, arXiv:1502.01852.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrelu import nn
    >>> layer = nn.Dense(64, 10, negative_slope=1, rng=0)
    >>> layer.forward(np.ones((3, 64), dtype=np.float32)).shape
    (3, 10)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        negative_slope: Real = 0.0,
        rng: np.random.Generator | int | None = None,
        dtype: DTypeLike = np.float32,
        xp: ModuleType = np,
    ) -> None:
        self.in_features = _count("in_features", in_features)
        self.out_features = _count("out_features", out_features)
        slope = number("negative_slope", negative_slope).float64
        dtype = _parameter_dtype(dtype, xp)
        std = math.sqrt(2 / ((1 + slope * slope) * self.in_features))
        shape = (self.out_features, self.in_features)
        weight = generator(rng).normal(scale=std, size=shape)
        self.weight = Parameter(xp.asarray(weight, dtype=dtype))
        self.bias = Parameter(xp.zeros(self.out_features, dtype=dtype))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_features}, {self.out_features})"

    @property
    def parameters(self) -> list[Parameter]:
        """The weight and the bias."""
        return [self.weight, self.bias]

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return ``(batch, out_features)``."""
        return (shape[0], self.out_features)

    def forward(
        self, x: Array, /, *, training: bool = True, out: Array | None = None
    ) -> Array:
        """Return ``x @ weight.T + bias``.

        Parameters
        ----------
        x : array of shape (batch, in_features)
            Of the layer's dtype.
        training : bool
            Whether to keep ``x`` for ``backward``.
        out : array of shape (batch, out_features), optional
            Where to write the result; when training, no memory of ``x``'s.

        Raises
        ------
        ValueError
            If ``x`` or ``out`` has another shape, ``out`` is read-only, or lies on an
            ``x`` that is needed for ``backward``.
        TypeError
            If ``x`` or ``out`` has another dtype, or is of another library, or
            ``training`` is no bool.
        """
        _check_library("x", x, "the weight", self.weight.value)
        if x.ndim != 2 or x.shape[1] != self.in_features:
            msg = f"x must have shape (batch, {self.in_features}), got {x.shape}"
            raise ValueError(msg)
        if x.dtype != self.weight.value.dtype:
            msg = f"x must have dtype {self.weight.value.dtype}, got {x.dtype}"
            raise TypeError(msg)
        xp = get_array_module(x)
        _check_kept(x, training, out)
        shape = len(x), self.out_features
        if out is None:  # a product of bfloat16 would be float32
            out = xp.empty(shape, dtype=x.dtype)
        else:
            _check_output(out, x, shape)
        y = xp.matmul(x, self.weight.value.T, out=out)
        y += self.bias.value
        if training:
            self._saved = x
        return y

    def backward(self, grad_output: Array, /, *, out: Array | None = None) -> Array:
        """Return ``grad_output @ weight``; add up the gradients of the parameters.

        Raises
        ------
        RuntimeError
            Without a forward pass with ``training=True`` before it.
        TypeError, ValueError
            If ``grad_output`` is no array of floats of the layer's library, or it or
            ``out`` has another shape than it must.
        """
        weight, bias = self.weight, self.bias
        with self._take() as x:
            _check_library("grad_output", grad_output, "the weight", weight.value)
            accepted("grad_output", grad_output)
            _check_shape("grad_output", grad_output, (len(x), self.out_features))
            xp = get_array_module(x)
            if out is None:
                out = xp.empty(x.shape, dtype=x.dtype)
            else:
                _check_output(out, x, x.shape)
            weight.add_grad(xp.matmul(grad_output.T, x, out=weight._grad_out()))
            sums = {"dtype": _sum_dtype(bias.value.dtype), "out": bias._grad_out()}
            bias.add_grad(xp.sum(grad_output, axis=0, **sums))
            # Last, because out may be x.
            return xp.matmul(grad_output, weight.value, out=out)


class Activation(Layer):
    """A layer that works element by element; a unit is active where ``x > 0``."""


class ReLU(Activation):
    r"""Rectified linear unit: ``0 if x <= 0 else x``.

    The gradient is ``grad_output`` where ``x > 0`` and 0 elsewhere.  What is saved
    is a mask of 1 bit per element, so the input may be overwritten.  Takes any
    shape and float dtype, as `fastrelu.relu` does.

    References
    ----------
    .. [1] V. Nair, G. E. Hinton, "Rectified Linear Units Improve Restricted
       Boltzmann Machines", ICML 2010.
    .. [2] X. Glorot, A. Bordes, Y. Bengio, "Deep Sparse Rectifier Neural
       Networks", AISTATS 2011.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrelu import nn
    >>> layer = nn.ReLU()
    >>> layer.forward(np.array([-2.0, 0.0, 3.0]))
    array([0., 0., 3.])
    >>> layer.backward(np.array([1.0, 1.0, 1.0]))
    array([0., 0., 1.])
    """

    inplace = True

    def forward(
        self, x: Array, /, *, training: bool = True, out: Array | None = None
    ) -> Array:
        """Return ``relu(x)``, in place if ``out`` is ``x``."""
        if not flag("training", training):
            return relu(x, out=out)
        y, self._saved = relu(x, out=out, return_mask=True)
        return y

    def backward(self, grad_output: Array, /, *, out: Array | None = None) -> Array:
        """Return the gradient towards ``x``, in place if ``out`` is ``grad_output``.

        Raises
        ------
        RuntimeError
            Without a forward pass with ``training=True`` before it.
        """
        with self._take() as mask:
            return relu_backward(grad_output, mask, out=out)


class LeakyReLU(Activation):
    r"""Leaky rectified linear unit: ``x if x > 0 else negative_slope * x``.

    The gradient is ``grad_output`` where ``x > 0`` and ``negative_slope *
    grad_output`` elsewhere.  What is saved is a mask of 1 bit per element, so the
    input may be overwritten whatever the slope.  Takes any shape and float dtype,
    as `fastrelu.leaky_relu` does.

    Parameters
    ----------
    negative_slope : float
        Any finite number.

    Raises
    ------
    TypeError, ValueError
        If ``negative_slope`` is no real number, or not finite.

    References
    ----------
    .. [1] A. L. Maas, A. Y. Hannun, A. Y. Ng, "Rectifier Nonlinearities Improve
       Neural Network Acoustic Models", ICML 2013.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrelu import nn
    >>> layer = nn.LeakyReLU(0.1)
    >>> layer.forward(np.array([-2.0, 0.0, 3.0]))
    array([-0.2,  0. ,  3. ])
    >>> layer.backward(np.array([1.0, 1.0, 1.0]))
    array([0.1, 0.1, 1. ])
    """

    inplace = True

    def __init__(self, negative_slope: Real = 0.01) -> None:
        number("negative_slope", negative_slope)
        self.negative_slope = negative_slope

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.negative_slope})"

    def forward(
        self, x: Array, /, *, training: bool = True, out: Array | None = None
    ) -> Array:
        """Return ``leaky_relu(x, negative_slope)``, in place if ``out`` is ``x``."""
        if not flag("training", training):
            return leaky_relu(x, self.negative_slope, out=out)
        y, self._saved = leaky_relu(x, self.negative_slope, out=out, return_mask=True)
        return y

    def backward(self, grad_output: Array, /, *, out: Array | None = None) -> Array:
        """Return the gradient towards ``x``, in place if ``out`` is ``grad_output``.

        Raises
        ------
        RuntimeError
            Without a forward pass with ``training=True`` before it.
        """
        with self._take() as mask:
            return leaky_relu_backward(grad_output, mask, self.negative_slope, out=out)


class PReLU(Activation):
    r"""Parametric rectified linear unit: ``x if x > 0 else weight * x``.

    The gradient towards ``x`` is ``grad_output`` where ``x > 0`` and ``weight *
    grad_output`` elsewhere; towards the weight it is the sum of ``x *
    grad_output`` over the inactive elements (of each channel).

    Parameters
    ----------
    num_parameters : int
        1 for one slope shared by the layer, or the length of ``axis`` for one
        slope per channel.
    init : float
        The start value of the slopes.
    axis : int
        The channel axis.
    dtype, xp
        As for `Dense`.

    Attributes
    ----------
    weight : Parameter
        Of shape ``(num_parameters,)``.  It takes no weight decay, which would
        draw the slopes towards 0 and the layer towards ReLU [1]_.

    Raises
    ------
    TypeError
        If an argument is of another kind, or ``dtype`` is not one of floats.
    ValueError
        If ``num_parameters`` is below 1, or ``init`` is not finite in ``dtype``.

    Notes
    -----
    The weight's gradient needs ``x``.  When training, the layer holds ``x``
    itself, not a copy: do not change it between ``forward`` and ``backward``.

    References
    ----------
    .. [1] K. He, X. Zhang, S. Ren, J. Sun, "Delving Deep into Rectifiers",
       ICCV 2015, arXiv:1502.01852.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrelu import nn
    >>> layer = nn.PReLU(dtype=np.float64)
    >>> layer.forward(np.array([[-2.0, 0.0, 3.0]]))
    array([[-0.5,  0. ,  3. ]])
    >>> layer.backward(np.array([[1.0, 1.0, 1.0]]))
    array([[0.25, 0.25, 1.  ]])
    >>> layer.weight.grad
    array([-2.])
    """

    def __init__(
        self,
        num_parameters: int = 1,
        init: Real = 0.25,
        *,
        axis: int = 1,
        dtype: DTypeLike = np.float32,
        xp: ModuleType = np,
    ) -> None:
        n = _count("num_parameters", num_parameters)
        self.axis = index("axis", axis)
        dtype = _parameter_dtype(dtype, xp)
        start = weakly("init", np.asarray(number("init", init).float64), dtype)
        self.weight = Parameter(xp.full(n, start.item(), dtype=dtype), decay=False)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.weight.value.size}, axis={self.axis})"

    @property
    def parameters(self) -> list[Parameter]:
        """The weight."""
        return [self.weight]

    def forward(
        self, x: Array, /, *, training: bool = True, out: Array | None = None
    ) -> Array:
        """Return ``prelu(x, weight)``; when training, ``out`` must not lie on ``x``.

        Raises
        ------
        ValueError
            If ``out`` has memory of ``x``'s although ``x`` is needed for ``backward``.
        """
        _check_kept(x, training, out)
        y = prelu(x, self.weight.value, axis=self.axis, out=out)
        if training:
            self._saved = x
        return y

    def backward(self, grad_output: Array, /, *, out: Array | None = None) -> Array:
        """Return the gradient towards ``x``; add up that of the weight.

        Raises
        ------
        RuntimeError
            Without a forward pass with ``training=True`` before it.
        """
        with self._take() as x:
            grad_input, grad_weight = prelu_backward(
                grad_output,
                x,
                self.weight.value,
                axis=self.axis,
                out=(out, self.weight._grad_out()),
            )
            self.weight.add_grad(grad_weight)
            return grad_input


class Sequential(Layer):
    """Layers one after another, with the memory that a training step needs.

    Parameters
    ----------
    *layers : Layer
        At least one, and each only once: it saves one forward pass.  Two layers may
        share a `Parameter`.  The layers of another `Sequential` are taken out of it.

    Attributes
    ----------
    layers : list of Layer
        The layers, flat.

    Raises
    ------
    TypeError
        If something is no `Layer`.
    ValueError
        If there is no layer, or one comes twice.

    Notes
    -----
    When training, the outputs between the layers live in buffers that are sized by
    the largest batch so far and used again by every step.  Activations with a mask
    work in place in them, and ``backward`` writes each gradient over the
    activations it belongs to, so gradients take no memory of their own.  What a
    caller sees is never such a buffer: the arrays that ``forward`` and
    ``backward`` take are only read, and those they return are new.  The only state
    is of the latest training pass; a pass with ``training=False`` does not touch
    it.  Pickles and copies hold the layers, but neither buffers nor that state.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrelu import nn
    >>> model = nn.Sequential(nn.Dense(4, 8, rng=0), nn.PReLU(8), nn.Dense(8, 2, rng=1))
    >>> model
    Sequential(Dense(4, 8), PReLU(8, axis=1), Dense(8, 2))
    >>> y = model.forward(np.ones((5, 4), dtype=np.float32))
    >>> model.backward(np.ones_like(y)).shape
    (5, 4)
    """

    def __init__(self, *layers: Layer) -> None:
        if not layers:
            msg = "layers must name at least one layer, got none"
            raise ValueError(msg)
        self.layers: list[Layer] = []
        for layer in layers:
            if not isinstance(layer, Layer):
                msg = f"layers must be objects of Layer, got {shown(layer)}"
                raise TypeError(msg)
            self.layers += layer.layers if isinstance(layer, Sequential) else [layer]
        for i, layer in enumerate(self.layers):
            if any(layer is other for other in self.layers[:i]):
                msg = f"layers must be used once each, got one {layer} twice"
                raise ValueError(msg)
        self._buffers: dict[int, Array] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.layers))})"

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_buffers": {}}

    @property
    def parameters(self) -> list[Parameter]:
        """The parameters of all layers, in order, shared ones once."""
        shared = (p for layer in self.layers for p in layer.parameters)
        return list(dict.fromkeys(shared))

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the last layer's output."""
        for layer in self.layers:
            shape = layer.output_shape(shape)
        return shape

    def forward(
        self, x: Array, /, *, training: bool = True, out: Array | None = None
    ) -> Array:
        """Return the output of the last layer.

        Parameters
        ----------
        x : array
            What the first layer takes.
        training : bool
            Whether to save what ``backward`` needs.
        out : array, optional
            Where to write the result; may not share memory with ``x``.
        """
        if flag("training", training):
            self._saved = None
        # The buffer that each layer read from; the first read from the caller's.
        inputs: list[Array | None] = []
        h = x
        for i, layer in enumerate(self.layers):
            inputs.append(h if i else None)
            if i == len(self.layers) - 1:
                target = out
            elif i and layer.inplace:
                target = h
            else:
                target = self._buffer(i, h) if training else None
            h = layer.forward(h, training=training, out=target)
        if training:
            self._saved = inputs
        return h

    def backward(self, grad_output: Array, /, *, out: Array | None = None) -> Array:
        """Return the gradient towards ``x``; add up those of all parameters.

        Raises
        ------
        RuntimeError
            Without a forward pass with ``training=True`` before it.
        """
        grad = grad_output
        with self._take() as inputs:
            for layer, h in zip(self.layers[::-1], inputs[::-1], strict=True):
                grad = layer.backward(grad, out=out if h is None else h)
            return grad

    def _buffer(self, i: int, x: Array) -> Array:
        """Return memory for the output of layer ``i`` for the input ``x``."""
        rows, *rest = self.layers[i].output_shape(x.shape)
        buffer = self._buffers.get(i)
        if (
            buffer is None
            or len(buffer) < rows
            or buffer.shape[1:] != tuple(rest)
            or buffer.dtype != x.dtype
            or get_array_module(buffer) is not get_array_module(x)
        ):
            buffer = get_array_module(x).empty((rows, *rest), dtype=x.dtype)
            self._buffers[i] = buffer
        return buffer[:rows]


def dead_units(
    model: Sequential, x: Array, /, *, batch_size: int = 1024
) -> list[Array]:
    """Find the units that are never active (``> 0``) on a data set.

    A dead ReLU unit passes no gradient, so on this data it can neither contribute
    nor recover.

    Parameters
    ----------
    model : Sequential
        The network.
    x : array of shape (samples, ...)
        The data, at least one sample.
    batch_size : int
        How many samples go through the network at a time.

    Returns
    -------
    list of bool array
        One array for each `Activation` layer, in order: True for dead units.

    Raises
    ------
    TypeError
        If ``model`` is no `Sequential`, ``x`` no array, or ``batch_size`` no integer.
    ValueError
        If ``x`` holds no sample or ``batch_size`` is below 1.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrelu import nn
    >>> layer = nn.Dense(1, 2, dtype=np.float64)
    >>> layer.weight.value[:] = [[1], [-1]]
    >>> nn.dead_units(nn.Sequential(layer, nn.ReLU()), np.array([[2.0], [3.0]]))
    [array([False,  True])]
    """
    if not isinstance(model, Sequential):
        msg = f"model must be a Sequential, got {kind_of(model)}"
        raise TypeError(msg)
    _check_array("x", x)
    batch_size = _count("batch_size", batch_size)
    if x.ndim == 0 or not len(x):
        msg = f"x must hold at least one sample, got shape {x.shape}"
        raise ValueError(msg)
    dead: list[Array] = []
    for start in range(0, len(x), batch_size):
        h, dead_here = x[start : start + batch_size], []
        for layer in model.layers:
            if isinstance(layer, Activation):
                dead_here.append(~(h > 0).any(axis=0))
            h = layer.forward(h, training=False)
        if start:
            dead_here = [a & b for a, b in zip(dead, dead_here, strict=True)]
        dead = dead_here
    return dead


def softmax_cross_entropy(logits: Array, labels: Array, /) -> tuple[Any, Array]:
    r"""Mean cross-entropy of the softmax of ``logits``, and its gradient.

    .. math::
        L = \frac{1}{n} \sum_i \Bigl(\log \sum_j e^{z_{ij}} - z_{i y_i}\Bigr),
        \qquad
        \frac{\partial L}{\partial z_{ij}}
        = \frac{1}{n} \Bigl(\frac{e^{z_{ij}}}{\sum_k e^{z_{ik}}} - [j = y_i]\Bigr)

    Parameters
    ----------
    logits : float array of shape (n, classes)
        The scores, at least one row.
    labels : integer array of shape (n,)
        The right class of each row, from 0 to ``classes - 1``.

    Returns
    -------
    loss : scalar or 0-d array
        The mean loss, in the dtype of ``logits``.
    grad : array of shape (n, classes)
        The gradient of the mean loss towards ``logits``.

    Raises
    ------
    ValueError
        If a shape does not fit, or a label names no class.  To see that on a GPU
        would mean to wait for it: there the loss is NaN.
    TypeError
        If ``logits`` are not floats, or ``labels`` not integers of the same library.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrelu import nn
    >>> loss, grad = nn.softmax_cross_entropy(np.zeros((1, 4)), np.array([2]))
    >>> print(f"{loss:.4f} = log(4)")
    1.3863 = log(4)
    >>> grad
    array([[ 0.25,  0.25, -0.75,  0.25]])
    """
    _check_array("logits", logits)
    accepted("logits", logits)
    _check_library("labels", labels, "logits", logits)
    if logits.ndim != 2 or not logits.size:
        msg = f"logits must have shape (n, classes), got {logits.shape}"
        raise ValueError(msg)
    n, classes = logits.shape
    if labels.shape != (n,):
        msg = f"labels must have shape ({n},) to fit logits, got {labels.shape}"
        raise ValueError(msg)
    if labels.dtype.kind not in "iu":
        msg = f"labels must have an integer dtype, got {labels.dtype}"
        raise TypeError(msg)
    xp = get_array_module(logits)
    if xp is np and (labels.min() < 0 or labels.max() >= classes):
        msg = f"labels must lie in 0..{classes - 1}, got {labels.min()}..{labels.max()}"
        raise ValueError(msg)
    rows, dtype = xp.arange(n), logits.dtype
    logits = logits.astype(_sum_dtype(dtype), copy=False)
    # The largest score becomes 0, so that no exponential overflows.
    shifted = logits - logits.max(axis=1, keepdims=True)
    # What is far below the largest is 0 and no error.
    with np.errstate(under="ignore"):
        grad = xp.exp(shifted)
        total = grad.sum(axis=1, keepdims=True)
        losses = xp.log(total[:, 0]) - shifted[rows, labels]
        if xp is not np:  # CuPy's indices wrap around
            losses[(labels < 0) | (labels >= classes)] = math.nan
        loss = losses.sum() / n
        grad /= total
        grad[rows, labels] -= 1
        grad /= n
        return loss.astype(dtype), grad.astype(dtype, copy=False)


class SGD:
    r"""Stochastic gradient descent with momentum.

    .. math::
        v \leftarrow \mu v + g + \lambda w, \qquad w \leftarrow w - \eta v

    as in PyTorch, with learning rate :math:`\eta`, momentum :math:`\mu` and weight
    decay :math:`\lambda`, which is left out for parameters with ``decay=False``.  For
    parameters of half floats, :math:`v` is float32 and each step rounds once.

    Parameters
    ----------
    parameters : iterable of Parameter
        What to update, each once however often it comes.
    lr : float
        The learning rate; the attribute ``lr`` may be changed between steps.
    momentum, weight_decay : float
        At least 0.

    Raises
    ------
    TypeError
        If a parameter is no `Parameter`, or a number none.
    ValueError
        If there is no parameter, or a number is negative or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrelu import nn
    >>> p = nn.Parameter(np.array([1.0, 2.0]))
    >>> optimiser = nn.SGD([p], lr=0.5)
    >>> p.grad[:] = [2.0, 4.0]
    >>> optimiser.step()
    >>> p.value
    array([0., 0.])
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        lr: Real,
        momentum: Real = 0.0,
        weight_decay: Real = 0.0,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        checked = [number(*setting).float64 for setting in settings.items()]
        for name, value in zip(settings, checked, strict=True):
            if value < 0:
                msg = f"{name} must be at least 0, got {value}"
                raise ValueError(msg)
        if not isinstance(parameters, Iterable):
            came = kind_of(parameters)
            msg = f"parameters must be an iterable of Parameter, got {came}"
            raise TypeError(msg)
        given = list(parameters)
        for p in given:
            if not isinstance(p, Parameter):
                msg = f"parameters must hold objects of Parameter, got {kind_of(p)}"
                raise TypeError(msg)
        self.parameters = list(dict.fromkeys(given))
        if not self.parameters:
            msg = "parameters must hold at least one parameter, got none"
            raise ValueError(msg)
        self.lr, self.momentum, self.weight_decay = checked
        self._velocity = [
            get_array_module(p.value).zeros_like(
                p.value, dtype=_sum_dtype(p.value.dtype)
            )
            for p in self.parameters
        ]
        self._scratch: Array | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_scratch": None}

    def zero_grad(self) -> None:
        """Set the gradients of all parameters to 0."""
        for p in self.parameters:
            p.zero_grad()

    def step(self) -> None:
        """Update every parameter in place from its gradient.

        The next backward pass replaces the gradients, so that no `zero_grad` is
        needed between steps.

        Raises
        ------
        ValueError
            If a parameter is read-only, before anything is changed.
        """
        for i, p in enumerate(self.parameters):
            # CuPy's arrays are always writeable and have no such flag.
            if not getattr(p.value.flags, "writeable", True):
                msg = f"parameters[{i}] must be writeable, got a read-only {p}"
                raise ValueError(msg)
        if self._scratch is None:  # one piece of memory, for the largest parameter
            largest = max(self._velocity, key=lambda v: v.nbytes)
            xp = get_array_module(largest)
            self._scratch = xp.empty(largest.nbytes, dtype=np.uint8)
        for p, v in zip(self.parameters, self._velocity, strict=True):
            xp = get_array_module(v)
            scratch = self._scratch[: v.nbytes].view(v.dtype).reshape(v.shape)
            v *= self.momentum
            v += p.grad
            if p.decay and self.weight_decay:
                v += xp.multiply(p.value, self.weight_decay, out=scratch, dtype=v.dtype)
            p.value -= xp.multiply(v, self.lr, out=scratch)
            p._used = True
