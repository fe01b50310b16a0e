"""The catalogue: every activation's formula, its gradient and its public functions.

A formula is a plain function of scalars.  Each engine compiles its kernels from it, so
it is written once.  The rules for formulas:

- They get `x` (the input) and the activation's numbers, in the type that products are
  computed in.  They may call other plain functions.
- ``type(x)(0)`` is a zero of x's own type; a literal 0 would widen some integers.
- The order of the comparisons decides what a NaN does.
- `active` says where the gradient passes.  It is the bit that a mask keeps, and must give
  the same answer for the saved output if that may be saved.
- The gradient gets `g` (the gradient of the output), what `active` says, and the numbers.
  Where a bit is not enough, a specification names no `active`: the gradient gets x.

To add an activation, write one block and one row of the table at the foot: the README
has the recipe.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, overload

from fastrelu import _dispatch
from fastrelu._spec import Spec
from fastrelu._typing import A, Array, B, Input, Numbers, Real, Saved, Spread
from fastrelu.mask import Mask

__all__ = [
    "leaky_relu",
    "leaky_relu_backward",
    "prelu",
    "prelu_backward",
    "relu",
    "relu6",
    "relu6_backward",
    "relu_backward",
    "rrelu",
    "rrelu_backward",
    "squared_relu",
    "squared_relu_backward",
    "threshold",
    "threshold_backward",
]


def _is_positive(x: Any, *slope: Any) -> Any:
    return x > 0


# ReLU ---------------------------------------------------------------------------------


def _relu(x: Any) -> Any:
    return type(x)(0) if x <= 0 else x  # not `x if x > 0`: a NaN comes through


def _relu_gradient(g: Any, passes: Any) -> Any:
    return g if passes else type(g)(0)  # a choice, no product: inf * 0 would be NaN


_RELU = Spec("relu", _relu, _relu_gradient, _is_positive, "x > 0", integers=True)
_relu_forward, _relu_backward = _dispatch.elementwise(_RELU)


@overload
def relu(
    x: A, /, inplace: bool = ..., *, out: Any = ..., return_mask: Literal[False] = ...
) -> A: ...
@overload
def relu(
    x: A, /, inplace: bool = ..., *, out: Any = ..., return_mask: Literal[True]
) -> tuple[A, Mask]: ...
@overload
def relu(
    x: Input,
    /,
    inplace: bool = ...,
    *,
    out: Any = ...,
    return_mask: bool = ...,
) -> Any: ...
def relu(
    x: Any, /, inplace: bool = False, *, out: Any = None, return_mask: bool = False
) -> Any:
    """Return the rectified linear unit, max(x, 0), of each element.

    ::

        y = 0 if x <= 0 else x

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
    return _relu_forward.call(x, inplace, out, return_mask)


@overload
def relu_backward(
    grad_output: Spread, saved: Any, /, *, inplace: bool = ..., out: Any = ...
) -> Any: ...
@overload
def relu_backward(
    grad_output: A, saved: Saved | Numbers, /, *, inplace: bool = ..., out: Any = ...
) -> A: ...
def relu_backward(
    grad_output: Any, saved: Any, /, *, inplace: bool = False, out: Any = None
) -> Any:
    """Return the gradient of a loss towards relu's input.

    ::

        dx = g if x > 0 else 0

    The derivative at 0 is 0 [1]_, and so it is at NaN.  The gradient is chosen, not
    multiplied: an infinite `grad_output` gives 0 where the unit was inactive.

    Parameters
    ----------
    grad_output : array or float
        The gradient towards relu's output; dtypes as for `relu`.  One number stands for
        the gradient of every element, without an array of ones.
    saved : array or Mask
        What was kept of the forward pass: its input, its output or its mask; or bools,
        True where a unit was active.  Of any real dtype, the gradient's or another.
    inplace : bool
        Overwrite `grad_output` and return it.
    out : array, optional
        Where to write the result; of its shape and dtype.

    Returns
    -------
    array
        Of grad_output's shape and dtype.  One number gives saved's shape; one of
        Python's takes saved's dtype if that is a float type, or else what NumPy makes
        of both, such as float64 of 1.0 and a mask.

    Raises
    ------
    TypeError
        For another kind of argument or dtype.
    ValueError
        If `saved` has another shape or is a mask of another activation, and for `out` as
        `relu` does.

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
    return _relu_backward.call(grad_output, inplace, out, saved)


# Leaky ReLU ---------------------------------------------------------------------------


def _leaky_relu(x: Any, slope: Any) -> Any:
    return x if x > 0 else slope * x


def _leaky_relu_gradient(g: Any, passes: Any, slope: Any) -> Any:
    return g if passes else slope * g


_LEAKY_RELU = Spec(
    "leaky_relu",
    _leaky_relu,
    _leaky_relu_gradient,
    _is_positive,
    "x > 0",
    numbers=("negative_slope",),
)
_leaky_relu_forward, _leaky_relu_backward = _dispatch.elementwise(_LEAKY_RELU)


@overload
def leaky_relu(
    x: A,
    /,
    negative_slope: Real = ...,
    inplace: bool = ...,
    *,
    out: Any = ...,
    return_mask: Literal[False] = ...,
) -> A: ...
@overload
def leaky_relu(
    x: A,
    /,
    negative_slope: Real = ...,
    inplace: bool = ...,
    *,
    out: Any = ...,
    return_mask: Literal[True],
) -> tuple[A, Mask]: ...
@overload
def leaky_relu(
    x: Input,
    /,
    negative_slope: Real = ...,
    inplace: bool = ...,
    *,
    out: Any = ...,
    return_mask: bool = ...,
) -> Any: ...
def leaky_relu(
    x: Any,
    /,
    negative_slope: Real = 0.01,
    inplace: bool = False,
    *,
    out: Any = None,
    return_mask: bool = False,
) -> Any:
    """Return x where it is positive and a small multiple of it elsewhere.

    ::

        y = x if x > 0 else slope * x

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
    return _leaky_relu_forward.call(x, inplace, out, return_mask, negative_slope)


@overload
def leaky_relu_backward(
    grad_output: Spread,
    saved: Any,
    /,
    negative_slope: Real = ...,
    *,
    inplace: bool = ...,
    out: Any = ...,
) -> Any: ...
@overload
def leaky_relu_backward(
    grad_output: A,
    saved: Saved | Numbers,
    /,
    negative_slope: Real = ...,
    *,
    inplace: bool = ...,
    out: Any = ...,
) -> A: ...
def leaky_relu_backward(
    grad_output: Any,
    saved: Any,
    /,
    negative_slope: Real = 0.01,
    *,
    inplace: bool = False,
    out: Any = None,
) -> Any:
    """Return the gradient of a loss towards leaky_relu's input.

    ::

        dx = g if x > 0 else slope * g

    The derivative at 0 and at NaN is `negative_slope`.

    Parameters
    ----------
    grad_output : array or float
        The gradient towards leaky_relu's output; dtypes as for `leaky_relu`.  One
        number stands for the gradient of every element, without an array of ones.
    saved : array or Mask
        What was kept of the forward pass: its input or its mask; or bools, True where a
        unit was active; or its output, if `negative_slope` is at least 0.  (A negative
        slope makes negative inputs positive: their outputs do not tell.)  Of any real
        dtype, the gradient's or another.
    negative_slope : float
        As in the forward pass.
    inplace : bool
        Overwrite `grad_output` and return it.
    out : array, optional
        Where to write the result; of its shape and dtype.

    Returns
    -------
    array
        Of grad_output's shape and dtype.  One number gives saved's shape; one of
        Python's takes saved's dtype if that is a float type, or else what NumPy makes
        of both, such as float64 of 1.0 and a mask.

    Raises
    ------
    TypeError
        For another kind of argument or dtype.
    ValueError
        If `saved` has another shape or is a mask of another activation, if
        `negative_slope` is not finite once it is rounded, and for `out` as `relu` does.

    Examples
    --------
    >>> import numpy as np
    >>> import fastrelu
    >>> x = np.array([-2.0, 0.0, 3.0])
    >>> fastrelu.leaky_relu_backward(np.array([10.0, 10.0, 10.0]), x, 0.1)
    array([ 1.,  1., 10.])
    """
    return _leaky_relu_backward.call(grad_output, inplace, out, saved, negative_slope)


# PReLU: Leaky ReLU whose slope is the weight of the element's channel -----------------


_prelu_forward, _prelu_backward = _dispatch.by_channel(_LEAKY_RELU)


@overload
def prelu(
    x: A, /, weight: Input, *, axis: int = ..., inplace: bool = ..., out: Any = ...
) -> A: ...
@overload
def prelu(
    x: Numbers,
    /,
    weight: Input,
    *,
    axis: int = ...,
    inplace: bool = ...,
    out: Any = ...,
) -> Any: ...
def prelu(
    x: Any, /, weight: Any, *, axis: int = 1, inplace: bool = False, out: Any = None
) -> Any:
    """Return x where it is positive and its channel's multiple of it elsewhere.

    ::

        y = x if x > 0 else w[c] * x

    At 0 the value is ``w * x``, a zero, and the derivative `w`.  A NaN stays a NaN.

    Parameters
    ----------
    x : array of any shape and memory layout
        float16, bfloat16, float32 or float64.  Without `inplace`, also anything
        ``numpy.asarray`` makes such an array of.
    weight : array or float
        One element, shared by all of x; or one-dimensional, an element for each
        channel; or, with two dimensions and more, any shape that broadcasts against x
        without growing it.  Of x's dtype, or float32 with float16 and bfloat16.  Numbers
        of Python's, and lists of them, take x's dtype.
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
    return _prelu_forward.call(x, inplace, out, weight, axis)


@overload
def prelu_backward(
    grad_output: Spread,
    x: Any,
    /,
    weight: Input,
    *,
    axis: int = ...,
    inplace: bool = ...,
    out: Any = ...,
) -> tuple[Any, Any]: ...
@overload
def prelu_backward(
    grad_output: A,
    x: Input,
    /,
    weight: B,
    *,
    axis: int = ...,
    inplace: bool = ...,
    out: Any = ...,
) -> tuple[A, B]: ...
@overload
def prelu_backward(
    grad_output: A,
    x: Input,
    /,
    weight: Numbers,
    *,
    axis: int = ...,
    inplace: bool = ...,
    out: Any = ...,
) -> tuple[A, Any]: ...
def prelu_backward(
    grad_output: Any,
    x: Any,
    /,
    weight: Any,
    *,
    axis: int = 1,
    inplace: bool = False,
    out: Any = None,
) -> Any:
    """Return the gradients of a loss towards prelu's input and weight, in one pass.

    ::

        dx = g if x > 0 else w[c] * g
        dw[c] = sum of x * g where x > 0 does not hold, over channel c

    The derivative towards x at 0 and at NaN is `w`.  A NaN in x makes the weight
    gradient of its channel NaN; +inf adds nothing to it.  The sum is formed in float64
    with compensation, in an order that follows from the shape alone: it has the same
    bits for every number of threads.

    Parameters
    ----------
    grad_output : array or float
        The gradient towards prelu's output; dtypes as for `prelu`.  One number stands
        for the gradient of every element, without an array of ones.
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
        Of x's shape and dtype.
    grad_weight : array
        Of weight's shape and dtype.

    Raises
    ------
    TypeError
        For another kind of argument or dtype, a mask among them.
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
    gradients: tuple[Array, Array]
    gradients = _prelu_backward.call(grad_output, inplace, out, x, weight, axis)
    return gradients


# ReLU6 --------------------------------------------------------------------------------


def _relu6(x: Any) -> Any:
    return type(x)(0) if x <= 0 else type(x)(6) if x >= 6 else x


def _is_between(x: Any) -> Any:
    return x > 0 and x < 6


_RELU6 = Spec("relu6", _relu6, _relu_gradient, _is_between, "0 < x < 6")
_relu6_forward, _relu6_backward = _dispatch.elementwise(_RELU6)


@overload
def relu6(
    x: A, /, inplace: bool = ..., *, out: Any = ..., return_mask: Literal[False] = ...
) -> A: ...
@overload
def relu6(
    x: A, /, inplace: bool = ..., *, out: Any = ..., return_mask: Literal[True]
) -> tuple[A, Mask]: ...
@overload
def relu6(
    x: Input,
    /,
    inplace: bool = ...,
    *,
    out: Any = ...,
    return_mask: bool = ...,
) -> Any: ...
def relu6(
    x: Any, /, inplace: bool = False, *, out: Any = None, return_mask: bool = False
) -> Any:
    """Return x cut off below 0 and above 6.

    ::

        y = 0 if x <= 0, 6 if x >= 6, else x

    At 0, and at -0, the value is +0 and the derivative 0; at 6 it is 0, too.  A NaN stays
    a NaN.

    Parameters
    ----------
    x : array of any shape and memory layout
        float16, bfloat16, float32 or float64.  Without `inplace`, also anything
        ``numpy.asarray`` makes such an array of.
    inplace : bool
        Overwrite `x` and return it.
    out : array, optional
        Where to write the result; of x's shape and dtype.  It may be `x` and may
        overlap it.
    return_mask : bool
        Also return where ``0 < x < 6``, in 1 bit each, for the backward pass.

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
        For `out` as `relu` does.

    References
    ----------
    .. [1] A. Krizhevsky, "Convolutional Deep Belief Networks on CIFAR-10", 2010.

    Examples
    --------
    >>> import numpy as np
    >>> import fastrelu
    >>> fastrelu.relu6(np.array([-2.0, 3.0, 8.0]))
    array([0., 3., 6.])
    """
    return _relu6_forward.call(x, inplace, out, return_mask)


@overload
def relu6_backward(
    grad_output: Spread, saved: Any, /, *, inplace: bool = ..., out: Any = ...
) -> Any: ...
@overload
def relu6_backward(
    grad_output: A, saved: Saved | Numbers, /, *, inplace: bool = ..., out: Any = ...
) -> A: ...
def relu6_backward(
    grad_output: Any, saved: Any, /, *, inplace: bool = False, out: Any = None
) -> Any:
    """Return the gradient of a loss towards relu6's input.

    ::

        dx = g if 0 < x < 6 else 0

    The derivative at 0, at 6 and at NaN is 0.  The gradient is chosen, not multiplied.

    Parameters
    ----------
    grad_output : array or float
        The gradient towards relu6's output; dtypes as for `relu6`.  One number stands
        for the gradient of every element, without an array of ones.
    saved : array or Mask
        What was kept of the forward pass: its input, its output or its mask; or bools,
        True where a unit was active.  Of any real dtype, the gradient's or another.
    inplace : bool
        Overwrite `grad_output` and return it.
    out : array, optional
        Where to write the result; of its shape and dtype.

    Returns
    -------
    array
        Of grad_output's shape and dtype.  One number gives saved's shape; one of
        Python's takes saved's dtype if that is a float type, or else what NumPy makes
        of both, such as float64 of 1.0 and a mask.

    Raises
    ------
    TypeError
        For another kind of argument or dtype.
    ValueError
        If `saved` has another shape or is a mask of another activation, and for `out` as
        `relu` does.

    Examples
    --------
    >>> import numpy as np
    >>> import fastrelu
    >>> fastrelu.relu6_backward(np.ones(3), np.array([-2.0, 3.0, 8.0]))
    array([0., 1., 0.])
    """
    return _relu6_backward.call(grad_output, inplace, out, saved)


# Squared ReLU -------------------------------------------------------------------------


def _squared_relu(x: Any) -> Any:
    return type(x)(0) if x <= 0 else x * x


def _squared_relu_gradient(g: Any, x: Any) -> Any:
    return (x + x) * g if x > 0 else type(g)(0)


_SQUARED_RELU = Spec("squared_relu", _squared_relu, _squared_relu_gradient, None)
_squared_relu_forward, _squared_relu_backward = _dispatch.elementwise(_SQUARED_RELU)


@overload
def squared_relu(x: A, /, inplace: bool = ..., *, out: Any = ...) -> A: ...
@overload
def squared_relu(x: Numbers, /, inplace: bool = ..., *, out: Any = ...) -> Any: ...
def squared_relu(x: Any, /, inplace: bool = False, *, out: Any = None) -> Any:
    """Return the square of the rectified linear unit, max(x, 0)^2.

    ::

        y = 0 if x <= 0 else x * x

    At 0, and at -0, the value is +0 and the derivative 0.  A NaN stays a NaN.

    Parameters
    ----------
    x : array of any shape and memory layout
        float16, bfloat16, float32 or float64.  Without `inplace`, also anything
        ``numpy.asarray`` makes such an array of.
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
        For `out` as `relu` does.

    References
    ----------
    .. [1] D. So et al., "Primer: Searching for Efficient Transformers for Language
       Modeling", NeurIPS 2021, arXiv:2109.08668.

    Examples
    --------
    >>> import numpy as np
    >>> import fastrelu
    >>> fastrelu.squared_relu(np.array([-2.0, 0.5, 3.0]))
    array([0.  , 0.25, 9.  ])
    """
    return _squared_relu_forward.call(x, inplace, out, False)


@overload
def squared_relu_backward(
    grad_output: Spread, x: Any, /, *, inplace: bool = ..., out: Any = ...
) -> Any: ...
@overload
def squared_relu_backward(
    grad_output: A, x: Input, /, *, inplace: bool = ..., out: Any = ...
) -> A: ...
def squared_relu_backward(
    grad_output: Any, x: Any, /, *, inplace: bool = False, out: Any = None
) -> Any:
    """Return the gradient of a loss towards squared_relu's input.

    ::

        dx = 2 * x * g if x > 0 else 0

    The derivative at 0 and at NaN is 0.

    Parameters
    ----------
    grad_output : array or float
        The gradient towards squared_relu's output; dtypes as for `squared_relu`.  One
        number stands for the gradient of every element, without an array of ones.
    x : array
        The input of the forward pass; of grad_output's shape and dtype.  A mask, 1 bit,
        does not tell how large it was.
    inplace : bool
        Overwrite `grad_output` and return it.
    out : array, optional
        Where to write the result; of its shape and dtype.

    Returns
    -------
    array
        Of x's shape and dtype.

    Raises
    ------
    TypeError
        For another kind of argument or dtype, a mask among them.
    ValueError
        If `x` has another shape, and for `out` as `relu` does.

    Examples
    --------
    >>> import numpy as np
    >>> import fastrelu
    >>> fastrelu.squared_relu_backward(np.ones(3), np.array([-2.0, 0.5, 3.0]))
    array([0., 1., 6.])
    """
    return _squared_relu_backward.call(grad_output, inplace, out, x)


# Threshold ----------------------------------------------------------------------------


def _threshold(x: Any, threshold: Any, value: Any) -> Any:
    return value if x <= threshold else x  # a NaN comes through


def _is_above(x: Any, threshold: Any) -> Any:
    return x > threshold


def _threshold_gradient(g: Any, passes: Any, threshold: Any) -> Any:
    return g if passes else type(g)(0)


_THRESHOLD = Spec(
    "threshold",
    _threshold,
    _threshold_gradient,
    _is_above,
    "x > threshold",
    numbers=("threshold", "value"),
    kept=1,
)
_threshold_forward, _threshold_backward = _dispatch.elementwise(_THRESHOLD)


@overload
def threshold(
    x: A,
    /,
    threshold: Real,
    value: Real,
    inplace: bool = ...,
    *,
    out: Any = ...,
    return_mask: Literal[False] = ...,
) -> A: ...
@overload
def threshold(
    x: A,
    /,
    threshold: Real,
    value: Real,
    inplace: bool = ...,
    *,
    out: Any = ...,
    return_mask: Literal[True],
) -> tuple[A, Mask]: ...
@overload
def threshold(
    x: Input,
    /,
    threshold: Real,
    value: Real,
    inplace: bool = ...,
    *,
    out: Any = ...,
    return_mask: bool = ...,
) -> Any: ...
def threshold(
    x: Any,
    /,
    threshold: Real,
    value: Real,
    inplace: bool = False,
    *,
    out: Any = None,
    return_mask: bool = False,
) -> Any:
    """Return x where it is above a threshold and one value elsewhere.

    ::

        y = value if x <= threshold else x

    At the threshold the value is `value` and the derivative 0.  A NaN stays a NaN.

    Parameters
    ----------
    x : array of any shape and memory layout
        float16, bfloat16, float32 or float64.  Without `inplace`, also anything
        ``numpy.asarray`` makes such an array of.
    threshold, value : float
        Any finite numbers, each rounded once to float64 for float64 arrays and to
        float32 for the others; a `value` that is taken is then rounded to x's dtype.
    inplace : bool
        Overwrite `x` and return it.
    out : array, optional
        Where to write the result; of x's shape and dtype.  It may be `x` and may
        overlap it.
    return_mask : bool
        Also return where ``x > threshold``, in 1 bit each, for the backward pass.

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
        If `threshold` or `value` is not finite once it is rounded, and for `out` as
        `relu` does.

    References
    ----------
    .. [1] K. Konda, R. Memisevic and D. Krueger, "Zero-bias autoencoders and the benefits
       of co-adapting features", ICLR 2015, arXiv:1402.3337; with a `value` of 0.

    Examples
    --------
    >>> import numpy as np
    >>> import fastrelu
    >>> fastrelu.threshold(np.array([-2.0, 0.5, 3.0]), 1.0, -1.0)
    array([-1., -1.,  3.])
    """
    return _threshold_forward.call(x, inplace, out, return_mask, threshold, value)


@overload
def threshold_backward(
    grad_output: Spread,
    saved: Any,
    /,
    threshold: Real,
    *,
    inplace: bool = ...,
    out: Any = ...,
) -> Any: ...
@overload
def threshold_backward(
    grad_output: A,
    saved: Saved | Numbers,
    /,
    threshold: Real,
    *,
    inplace: bool = ...,
    out: Any = ...,
) -> A: ...
def threshold_backward(
    grad_output: Any,
    saved: Any,
    /,
    threshold: Real,
    *,
    inplace: bool = False,
    out: Any = None,
) -> Any:
    """Return the gradient of a loss towards threshold's input.

    ::

        dx = g if x > threshold else 0

    The derivative at the threshold and at NaN is 0.

    Parameters
    ----------
    grad_output : array or float
        The gradient towards threshold's output; dtypes as for `threshold`.  One number
        stands for the gradient of every element, without an array of ones.
    saved : array or Mask
        What was kept of the forward pass: its input or its mask; or bools, True where
        ``x > threshold``; or its output, if its `value`, as x's dtype holds it, is not
        above its `threshold`.  Of any real dtype, the gradient's or another.
    threshold : float
        As in the forward pass.
    inplace : bool
        Overwrite `grad_output` and return it.
    out : array, optional
        Where to write the result; of its shape and dtype.

    Returns
    -------
    array
        Of grad_output's shape and dtype.  One number gives saved's shape; one of
        Python's takes saved's dtype if that is a float type, or else what NumPy makes
        of both, such as float64 of 1.0 and a mask.

    Raises
    ------
    TypeError
        For another kind of argument or dtype.
    ValueError
        If `saved` has another shape or is a mask of another activation, if `threshold` is
        not finite once it is rounded, and for `out` as `relu` does.

    Examples
    --------
    >>> import numpy as np
    >>> import fastrelu
    >>> fastrelu.threshold_backward(np.ones(3), np.array([-2.0, 0.5, 3.0]), 1.0)
    array([0., 0., 1.])
    """
    return _threshold_backward.call(grad_output, inplace, out, saved, threshold)


# Randomised leaky ReLU: Leaky ReLU with a slope of its own for each element ------------


_rrelu_forward, _rrelu_backward = _dispatch.by_element(_LEAKY_RELU)


@overload
def rrelu(
    x: A,
    /,
    lower: Real = ...,
    upper: Real = ...,
    training: Literal[False] = ...,
    inplace: bool = ...,
    *,
    rng: Any = ...,
    out: Any = ...,
) -> A: ...
@overload
def rrelu(
    x: A,
    /,
    lower: Real,
    upper: Real,
    training: Literal[True],
    inplace: bool = ...,
    *,
    rng: Any = ...,
    out: Any = ...,
) -> tuple[A, A]: ...
@overload
def rrelu(
    x: A,
    /,
    lower: Real = ...,
    upper: Real = ...,
    *,
    training: Literal[True],
    inplace: bool = ...,
    rng: Any = ...,
    out: Any = ...,
) -> tuple[A, A]: ...
@overload
def rrelu(
    x: Input,
    /,
    lower: Real = ...,
    upper: Real = ...,
    training: bool = ...,
    inplace: bool = ...,
    *,
    rng: Any = ...,
    out: Any = ...,
) -> Any: ...
def rrelu(
    x: Any,
    /,
    lower: Real = 1 / 8,
    upper: Real = 1 / 3,
    training: bool = False,
    inplace: bool = False,
    *,
    rng: Any = None,
    out: Any = None,
) -> Any:
    """Return x where it is positive and a random multiple of it elsewhere.

    ::

        y = x if x > 0 else a * x

    In training, each element has a slope `a` of its own, drawn uniformly from `lower` to
    `upper`.  Otherwise all have the mean of these two.  At 0 the value is ``a * x``, a
    zero, and the derivative `a`.  A NaN stays a NaN.

    Parameters
    ----------
    x : array of any shape and memory layout
        float16, bfloat16, float32 or float64.  Without `inplace`, also anything
        ``numpy.asarray`` makes such an array of.
    lower, upper : float
        Any finite numbers, the first not above the second; in training, x's dtype must be
        able to hold them, as it holds the slopes.
    training : bool
        Draw slopes, and return them.
    inplace : bool
        Overwrite `x` and return it.
    rng : numpy.random.Generator or what ``numpy.random.default_rng`` takes, optional
        What slopes are drawn from, in C order, whatever the layout: None for one that is
        seeded afresh.  For CuPy arrays a ``cupy.random.Generator``, for PyTorch's on a
        GPU a ``torch.Generator``, or None.
    out : array, optional
        Where to write the result; of x's shape and dtype.  It may be `x` and may
        overlap it.

    Returns
    -------
    array
        Of x's shape and dtype; `x` or `out` themselves where they were written to.
    array
        Only with ``training=True``: the slopes, of x's shape and dtype, for
        `rrelu_backward`.

    Raises
    ------
    TypeError
        For another kind of argument or dtype.
    ValueError
        If `lower` or `upper` is not finite once it is rounded, as slopes of `leaky_relu`
        are, or `lower` above `upper`, and for `out` as `relu` does.

    References
    ----------
    .. [1] B. Xu et al., "Empirical Evaluation of Rectified Activations in Convolutional
       Network", 2015, arXiv:1505.00853.

    Examples
    --------
    >>> import numpy as np
    >>> import fastrelu
    >>> x = np.array([-8.0, 3.0])
    >>> fastrelu.rrelu(x, 0.25, 0.5)
    array([-3.,  3.])
    >>> y, slopes = fastrelu.rrelu(x, 0.25, 0.5, training=True, rng=0)
    >>> bool(y[0] == slopes[0] * x[0])
    True
    """
    slopes = _dispatch.slopes(x, lower, upper, training, rng)
    if training:
        return _rrelu_forward.call(x, inplace, out, slopes), slopes
    return _leaky_relu_forward.call(x, inplace, out, False, slopes)


@overload
def rrelu_backward(
    grad_output: Spread,
    x: Any,
    /,
    slopes: Input | Real,
    *,
    inplace: bool = ...,
    out: Any = ...,
) -> Any: ...
@overload
def rrelu_backward(
    grad_output: A,
    x: Input,
    /,
    slopes: Input | Real,
    *,
    inplace: bool = ...,
    out: Any = ...,
) -> A: ...
def rrelu_backward(
    grad_output: Any, x: Any, /, slopes: Any, *, inplace: bool = False, out: Any = None
) -> Any:
    """Return the gradient of a loss towards rrelu's input.

    ::

        dx = g if x > 0 else a * g

    The derivative at 0 and at NaN is the element's slope.

    Parameters
    ----------
    grad_output : array or float
        The gradient towards rrelu's output; dtypes as for `rrelu`.  One number stands
        for the gradient of every element, without an array of ones.
    x : array
        The input of the forward pass; of grad_output's shape and dtype.
    slopes : array or float
        What the forward pass returned, of grad_output's shape and dtype; or one number.
    inplace : bool
        Overwrite `grad_output` and return it.
    out : array, optional
        Where to write the result; of its shape and dtype.

    Returns
    -------
    array
        Of x's shape and dtype.

    Raises
    ------
    TypeError
        For another kind of argument or dtype, a mask among them.
    ValueError
        If `x` or `slopes` has another shape, if slopes that are a number are not finite
        once they are rounded, and for `out` as `relu` does.

    Examples
    --------
    >>> import numpy as np
    >>> import fastrelu
    >>> x, slopes = np.array([-8.0, 3.0]), np.array([0.5, 0.25])
    >>> fastrelu.rrelu_backward(np.ones(2), x, slopes)
    array([0.5, 1. ])
    """
    return _rrelu_backward.call(grad_output, inplace, out, x, slopes)


# The table ----------------------------------------------------------------------------


def _always(*numbers: float) -> bool:
    return True


def _never(*numbers: float) -> bool:
    return False


@dataclass(frozen=True)
class Row:
    """One row: what tests walk, and what the README's matrix is compared with."""

    spec: Spec
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    # Whether the output may be saved, which may hang on the numbers.
    output_tells: Callable[..., bool] = _never
    parameter: str = ""  # "weight" for one of each channel, "slopes" for each element
    examples: dict[str, tuple[float, ...]] = field(default_factory=dict)  # numbers

    @property
    def takes_mask(self) -> bool:
        """Whether the backward pass takes a mask."""
        return self.spec.active is not None and not self.parameter


ACTIVATIONS = {
    "relu": Row(_RELU, relu, relu_backward, _always),
    "leaky_relu": Row(
        _LEAKY_RELU,
        leaky_relu,
        leaky_relu_backward,
        lambda negative_slope: negative_slope >= 0,
        examples={"negative_slope": (0.01, -0.5, -0.0, 0.0, 1e-30, 1.0, 2.0)},
    ),
    "prelu": Row(_LEAKY_RELU, prelu, prelu_backward, parameter="weight"),
    "relu6": Row(_RELU6, relu6, relu6_backward, _always),
    "squared_relu": Row(_SQUARED_RELU, squared_relu, squared_relu_backward),
    "threshold": Row(
        _THRESHOLD,
        threshold,
        threshold_backward,
        lambda threshold, value: value <= threshold,
        examples={"threshold": (0.5, -1.0, 0.0), "value": (0.25, 3.0, -0.0)},
    ),
    "rrelu": Row(_LEAKY_RELU, rrelu, rrelu_backward, parameter="slopes"),
}
