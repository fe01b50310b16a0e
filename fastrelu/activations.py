"""The catalogue: every activation's formula, its gradient and its public functions.

A formula is a plain function of scalars.  Each engine compiles its kernels from it, so
it is written once.  The rules for formulas:

- They see `x` (the input), `g` (the gradient of the output) and `slope`, in the type
  that products are computed in.  The saved `x` of a gradient may be the input, the
  output, or 1 and 0 from a mask.
- ``type(x)(0)`` is a zero of x's own type; a literal 0 would widen some integers.
- The order of the comparisons decides what a NaN does.

To add an activation, write one block and one row of the table at the foot.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fastrelu import _arguments
from fastrelu._dispatch import PlainCalls, engine_of
from fastrelu.mask import Mask

Array = Any  # an array of any library; the result is of the same


# ReLU ---------------------------------------------------------------------------------


def _relu(x: Any, slope: Any) -> Any:
    return type(x)(0) if x <= 0 else x  # not `x if x > 0`: a NaN comes through


def _relu_gradient(g: Any, x: Any, slope: Any) -> Any:
    return g if x > 0 else type(g)(0)  # a choice, no product: inf * 0 would be NaN


_relu_calls = PlainCalls(_relu, gradient=False, integers=True)
_relu_backward_calls = PlainCalls(_relu_gradient, gradient=True, integers=True)


def relu(
    x: Array,
    /,
    inplace: bool = False,
    *,
    out: Array | None = None,
    return_mask: bool = False,
) -> Any:
    r"""Return the rectified linear unit, max(x, 0), of each element.

    .. math:: y = 0 \text{ if } x \le 0 \text{ else } x

    At 0, and at -0, the value is +0 and the derivative 0.  A NaN stays a NaN.

    Parameters
    ----------
    x : array of any shape and memory layout
        float16, bfloat16, float32, float64, or a signed or unsigned integer dtype.
        Without `inplace`, also anything ``numpy.asarray`` makes such an array of.
    inplace : bool
        Overwrite `x` and return it.
    out : array, optional
        Where to write the result; of x's shape and dtype.  It may be `x` and may
        overlap it.
    return_mask : bool
        Also return which units were active, in 1 bit each, for the backward pass.

    Returns
    -------
    array
        Of x's shape and dtype; `x` or `out` themselves where they were written to.
    Mask
        Only with ``return_mask=True``.

    Raises
    ------
    TypeError
        For another kind of argument or dtype.
    ValueError
        If `out` has another shape, is read-only or shares memory between its own
        elements, or if it is given together with `inplace`.

    References
    ----------
    .. [1] V. Nair and G. Hinton, "Rectified Linear Units Improve Restricted Boltzmann
       Machines", ICML 2010.

    Examples
    --------
    >>> import numpy as np
    >>> import fastrelu
    >>> fastrelu.relu(np.array([-2.0, -0.0, 3.0, np.nan]))
    array([ 0.,  0.,  3., nan])
    """
    y = _relu_calls.forward(x, 0.0, inplace, out, return_mask)
    if y is not None:
        return y
    return _forward(_relu, x, 0.0, inplace, out, return_mask, integers=True)


def relu_backward(
    grad_output: Array,
    saved: Array | Mask,
    /,
    *,
    inplace: bool = False,
    out: Array | None = None,
) -> Array:
    r"""Return the gradient of a loss towards relu's input.

    .. math:: dx = g \text{ if } x > 0 \text{ else } 0

    The derivative at 0 is 0 [1]_, and so it is at NaN.  The gradient is chosen, not
    multiplied: an infinite `grad_output` gives 0 where the unit was inactive.

    Parameters
    ----------
    grad_output : array
        The gradient towards relu's output; dtypes as for `relu`.
    saved : array or Mask
        What was kept of the forward pass: its input, its output or its mask.
    inplace : bool
        Overwrite `grad_output` and return it.
    out : array, optional
        Where to write the result; of grad_output's shape and dtype.

    Returns
    -------
    array
        Of grad_output's shape and dtype.

    Raises
    ------
    TypeError
        For another kind of argument, or if `saved` has another dtype.
    ValueError
        If `saved` has another shape, and for `out` as `relu` does.

    References
    ----------
    .. [1] D. Bertoin et al., "Numerical influence of ReLU'(0) on backpropagation",
       NeurIPS 2021, arXiv:2106.12915.

    Examples
    --------
    >>> import numpy as np
    >>> import fastrelu
    >>> y, mask = fastrelu.relu(np.array([-2.0, 0.0, 3.0]), return_mask=True)
    >>> fastrelu.relu_backward(np.array([10.0, 10.0, 10.0]), mask)
    array([ 0.,  0., 10.])
    """
    dx = _relu_backward_calls.backward(grad_output, saved, 0.0, inplace, out)
    if dx is not None:
        return dx
    return _backward(
        _relu_gradient, grad_output, saved, 0.0, inplace, out, integers=True
    )


# Leaky ReLU ---------------------------------------------------------------------------


def _leaky_relu(x: Any, slope: Any) -> Any:
    return x if x > 0 else slope * x


def _leaky_relu_gradient(g: Any, x: Any, slope: Any) -> Any:
    return g if x > 0 else slope * g


_leaky_relu_calls = PlainCalls(_leaky_relu, gradient=False, integers=False)
_leaky_relu_backward_calls = PlainCalls(
    _leaky_relu_gradient, gradient=True, integers=False
)


def leaky_relu(
    x: Array,
    /,
    negative_slope: float = 0.01,
    inplace: bool = False,
    *,
    out: Array | None = None,
    return_mask: bool = False,
) -> Any:
    r"""Return x where it is positive and a small multiple of it elsewhere.

    .. math:: y = x \text{ if } x > 0 \text{ else } slope \cdot x

    At 0 the value is ``slope * x``, a zero, and the derivative `negative_slope`.  A NaN
    stays a NaN.  The product is IEEE's: slope 0 at -inf gives NaN.

    Parameters
    ----------
    x : array of any shape and memory layout
        float16, bfloat16, float32 or float64.  Without `inplace`, also anything
        ``numpy.asarray`` makes such an array of.
    negative_slope : float
        Any finite number; negative ones and those above 1 too.  Of whatever type, also
        a 0-d array, it is rounded once to float64 for float64 arrays and to float32 for
        the others, which are computed in float32.
    inplace : bool
        Overwrite `x` and return it.
    out : array, optional
        Where to write the result; of x's shape and dtype.  It may be `x` and may
        overlap it.
    return_mask : bool
        Also return which units were active, in 1 bit each, for the backward pass.

    Returns
    -------
    array
        Of x's shape and dtype; `x` or `out` themselves where they were written to.
    Mask
        Only with ``return_mask=True``.

    Raises
    ------
    TypeError
        For another kind of argument or dtype.
    ValueError
        If `negative_slope` is not finite once it is rounded, and for `out` as `relu`
        does.

    References
    ----------
    .. [1] A. Maas, A. Hannun and A. Ng, "Rectifier Nonlinearities Improve Neural
       Network Acoustic Models", ICML 2013.

    Examples
    --------
    >>> import numpy as np
    >>> import fastrelu
    >>> fastrelu.leaky_relu(np.array([-2.0, 0.0, 3.0]), 0.1)
    array([-0.2,  0. ,  3. ])
    """
    y = _leaky_relu_calls.forward(x, negative_slope, inplace, out, return_mask)
    if y is not None:
        return y
    return _forward(_leaky_relu, x, negative_slope, inplace, out, return_mask)


def leaky_relu_backward(
    grad_output: Array,
    saved: Array | Mask,
    /,
    negative_slope: float = 0.01,
    *,
    inplace: bool = False,
    out: Array | None = None,
) -> Array:
    r"""Return the gradient of a loss towards leaky_relu's input.

    .. math:: dx = g \text{ if } x > 0 \text{ else } slope \cdot g

    The derivative at 0 and at NaN is `negative_slope`.

    Parameters
    ----------
    grad_output : array
        The gradient towards leaky_relu's output; dtypes as for `leaky_relu`.
    saved : array or Mask
        What was kept of the forward pass: its input or its mask; or its output, if
        `negative_slope` is at least 0.  (A negative slope makes negative inputs
        positive: their outputs do not tell.)
    negative_slope : float
        As in the forward pass.
    inplace : bool
        Overwrite `grad_output` and return it.
    out : array, optional
        Where to write the result; of grad_output's shape and dtype.

    Returns
    -------
    array
        Of grad_output's shape and dtype.

    Raises
    ------
    TypeError
        For another kind of argument, or if `saved` has another dtype.
    ValueError
        If `saved` has another shape, `negative_slope` is not finite once it is rounded,
        and for `out` as `relu` does.

    Examples
    --------
    >>> import numpy as np
    >>> import fastrelu
    >>> x = np.array([-2.0, 0.0, 3.0])
    >>> fastrelu.leaky_relu_backward(np.array([10.0, 10.0, 10.0]), x, 0.1)
    array([ 1.,  1., 10.])
    """
    dx = _leaky_relu_backward_calls.backward(
        grad_output, saved, negative_slope, inplace, out
    )
    if dx is not None:
        return dx
    return _backward(
        _leaky_relu_gradient, grad_output, saved, negative_slope, inplace, out
    )


# PReLU: Leaky ReLU whose slope is the weight of the element's channel -----------------


def prelu(
    x: Array,
    /,
    weight: Array,
    *,
    axis: int = 1,
    inplace: bool = False,
    out: Array | None = None,
) -> Array:
    r"""Return x where it is positive and its channel's multiple of it elsewhere.

    .. math:: y = x \text{ if } x > 0 \text{ else } w_c \cdot x

    At 0 the value is ``w * x``, a zero, and the derivative `w`.  A NaN stays a NaN.

    Parameters
    ----------
    x : array of any shape and memory layout
        float16, bfloat16, float32 or float64.  Without `inplace`, also anything
        ``numpy.asarray`` makes such an array of.
    weight : array
        One element, shared by all of x; or one-dimensional, an element for each
        channel; or, with two dimensions and more, any shape that broadcasts against x
        without growing it.  Of x's dtype, or float32 with float16 and bfloat16.
    axis : int
        The axis of the channels for a one-dimensional weight.  It is never guessed
        from the sizes: where x has fewer than two dimensions, name it.
    inplace : bool
        Overwrite `x` and return it.
    out : array, optional
        Where to write the result; of x's shape and dtype.  It may be `x` and may
        overlap it.

    Returns
    -------
    array
        Of x's shape and dtype; `x` or `out` themselves where they were written to.

    Raises
    ------
    TypeError
        For another kind of argument or dtype.
    ValueError
        If `weight` does not fit x, `axis` is out of range, and for `out` as `relu`
        does.

    References
    ----------
    .. [1] K. He et al., "Delving Deep into Rectifiers", ICCV 2015, arXiv:1502.01852.

    Examples
    --------
    >>> import numpy as np
    >>> import fastrelu
    >>> x = np.array([[-1.0, -1.0], [2.0, -2.0]])
    >>> fastrelu.prelu(x, np.array([0.5, 0.25]))
    array([[-0.5 , -0.25],
           [ 2.  , -0.5 ]])
    """
    y = _leaky_relu_calls.channels(x, weight, axis, inplace, out)
    if y is not None:
        return y
    engine = engine_of(x)
    position = _arguments.index("axis", axis)
    overwrite = _arguments.in_place(inplace, out)
    arrays = ("x", x), ("weight", weight), ("out", out)
    given, slopes, target = _arguments.read(engine, *arrays, in_place=overwrite)
    checked = _arguments.accepted("x", given)
    _, broadcast = _arguments.weight(slopes, checked, position)
    y, target = _target(engine, "x", (x, out), (given, target), checked, overwrite)
    engine.prelu(_leaky_relu, checked, broadcast, target)
    return y


def prelu_backward(
    grad_output: Array,
    x: Array,
    /,
    weight: Array,
    *,
    axis: int = 1,
    inplace: bool = False,
    out: Array | tuple[Array | None, Array | None] | None = None,
) -> tuple[Array, Array]:
    r"""Return the gradients of a loss towards prelu's input and weight, in one pass.

    .. math::
        dx &= g \text{ if } x > 0 \text{ else } w_c \cdot g \\
        dw_c &= \sum_{x \text{ in } c,\; x \not> 0} x \cdot g

    The derivative towards x at 0 and at NaN is `w`.  A NaN in x makes the weight
    gradient of its channel NaN; +inf adds nothing to it.  The sum is formed in float64
    with compensation, in an order that follows from the shape alone: it has the same
    bits for every number of threads.

    Parameters
    ----------
    grad_output : array
        The gradient towards prelu's output; dtypes as for `prelu`.
    x : array
        The input of the forward pass; of grad_output's shape and dtype.
    weight, axis
        As in the forward pass.
    inplace : bool
        Overwrite `grad_output` with the first result.
    out : array or (array, array), optional
        Where to write the first result or both; either may be None for a fresh one.

    Returns
    -------
    grad_input : array
        Of grad_output's shape and dtype.
    grad_weight : array
        Of weight's shape and dtype.

    Raises
    ------
    TypeError
        For another kind of argument or dtype.
    ValueError
        If `x` or `weight` do not fit grad_output, `axis` is out of range, `out` holds
        other than two arrays, and for each of them as `relu` does.

    Examples
    --------
    >>> import numpy as np
    >>> import fastrelu
    >>> x = np.array([[-1.0, -1.0], [2.0, -2.0]])
    >>> dx, dw = fastrelu.prelu_backward(np.ones((2, 2)), x, np.array([0.5, 0.25]))
    >>> dx
    array([[0.5 , 0.25],
           [1.  , 0.25]])
    >>> dw
    array([-1., -3.])
    """
    gradients: tuple[Array, Array] | None
    gradients = _leaky_relu_backward_calls.channels(
        grad_output, weight, axis, inplace, out, x
    )
    if gradients is not None:
        return gradients
    engine = engine_of(grad_output)
    position = _arguments.index("axis", axis)
    out_input, out_weight = _arguments.pair(out)
    overwrite = _arguments.in_place(inplace, out_input)
    given, saved, slopes, target, sums = _arguments.read(
        engine,
        ("grad_output", grad_output),
        ("x", x),
        ("weight", weight),
        ("out", out_input),
        ("out[1]", out_weight),
        in_place=overwrite,
    )
    grad = _arguments.accepted("grad_output", given)
    checked = _arguments.like("x", saved, "grad_output", grad)
    slopes, broadcast = _arguments.weight(slopes, checked, position)
    objects, views = (grad_output, out_input), (given, target)
    if sums is not None:
        _arguments.writeable("out[1]", sums, slopes)
        written = given if overwrite else target
        if written is not None:
            _arguments.distinct("out[0]", written, "out[1]", sums)
    else:
        out_weight, sums = _fresh(engine, slopes)
    dx, target = _target(engine, "grad_output", objects, views, grad, overwrite)
    engine.prelu_backward(_leaky_relu_gradient, grad, checked, broadcast, target, sums)
    return dx, out_weight


# The long way, with all checks --------------------------------------------------------


def _fresh(engine: ModuleType, x: Any) -> tuple[Any, Any]:
    """Return a new array like x, and what the engine sees of it."""
    y = engine.empty_like(x)
    return y, engine.read(y)


def _target(
    engine: ModuleType,
    name: str,
    objects: tuple[Any, Any],
    views: tuple[Any, Any],
    model: Any,
    overwrite: bool,
) -> tuple[Any, Any]:
    """Return the object to give back, and the array to write to.

    `objects` are the first argument and `out` as they came, `views` what was read.
    """
    if overwrite:
        return objects[0], _arguments.writeable(name, views[0], model)
    if views[1] is not None:
        return objects[1], _arguments.writeable("out", views[1], model)
    return _fresh(engine, model)


def _forward(
    formula: Callable[..., Any],
    x: Any,
    negative_slope: Any,
    inplace: Any,
    out: Any,
    return_mask: Any,
    *,
    integers: bool = False,
) -> Any:
    engine = engine_of(x)
    slope = _arguments.slope(negative_slope)
    want_mask = _arguments.flag("return_mask", return_mask)
    overwrite = _arguments.in_place(inplace, out)
    arrays = ("x", x), ("out", out)
    given, target = _arguments.read(engine, *arrays, in_place=overwrite)
    checked = _arguments.accepted("x", given, integers=integers)
    number = slope.of(checked)
    y, target = _target(engine, "x", (x, out), (given, target), checked, overwrite)
    bits = engine.forward(formula, checked, number, target, want_mask=want_mask)
    if not want_mask:
        return y
    mask = Mask.__new__(Mask)  # without its checks: they could still want memory
    mask.bits, mask.shape = bits, checked.shape
    return y, mask


def _backward(
    gradient: Callable[..., Any],
    grad_output: Any,
    saved: Any,
    negative_slope: Any,
    inplace: Any,
    out: Any,
    *,
    integers: bool = False,
) -> Any:
    engine = engine_of(grad_output)
    slope = _arguments.slope(negative_slope)
    overwrite = _arguments.in_place(inplace, out)
    mask = _arguments.unchanged(saved) if issubclass(type(saved), Mask) else None
    kept = saved if mask is None else mask.bits
    arrays = ("grad_output", grad_output), ("saved", kept), ("out", out)
    given, kept, target = _arguments.read(engine, *arrays, in_place=overwrite)
    grad = _arguments.accepted("grad_output", given, integers=integers)
    number = slope.of(grad)
    if mask is None:
        kept = _arguments.like("saved", kept, "grad_output", grad)
    else:
        kept = _arguments.bits_of(mask, kept, "grad_output", grad)
    objects, views = (grad_output, out), (given, target)
    dx, target = _target(engine, "grad_output", objects, views, grad, overwrite)
    run = engine.backward if mask is None else engine.backward_mask
    run(gradient, grad, kept, number, target)
    return dx


# The table ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Activation:
    """One row: what tests, benchmarks and the README's matrix walk."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    parameter: str | None  # the name of the slope's argument
    integers: bool = False


ACTIVATIONS = {
    "relu": Activation(relu, relu_backward, None, integers=True),
    "leaky_relu": Activation(leaky_relu, leaky_relu_backward, "negative_slope"),
    "prelu": Activation(prelu, prelu_backward, "weight"),
}

__all__ = sorted(  # noqa: PLE0605
    function.__name__
    for row in ACTIVATIONS.values()
    for function in (row.forward, row.backward)
)
