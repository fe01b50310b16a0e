"""From a formula to a numpy.ufunc, the quickest call that a small array can make.

NumPy allocates the result, walks every layout and sorts out overlaps in C, in a third
of the time that Python needs to ask the same questions.  The loops inside are ours.

NumPy takes new loops through its C interface alone (``PyUFunc_AddLoopFromSpec``, of
NumPy 2.0), so the few structures below repeat its headers.  Why not ``PyUFunc_
FromFuncAndData`` and ``numba.vectorize``?  The first would warn of an "invalid value"
at every NaN that is compared, and calls of the second take five times as long.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numpy._core import _multiarray_umath  # type: ignore[attr-defined]

from fastrelu.cpu import loops
from fastrelu.cpu.jit import compile_and_keep
from fastrelu.cpu.lanes import lane_of

_STRIDED_LOOP = 5  # NPY_METH_strided_loop
_NO_FLOATINGPOINT_ERRORS = 2  # NPY_METH_NO_FLOATINGPOINT_ERRORS
_NO_CASTING = 0  # NPY_NO_CASTING
_NO_IDENTITY = -1  # PyUFunc_None

_LOOP = types.intc(
    types.voidptr,
    types.CPointer(types.voidptr),
    types.CPointer(types.intp),
    types.CPointer(types.intp),
    types.voidptr,
)


class _Slot(ctypes.Structure):  # PyType_Slot
    _fields_ = [("slot", ctypes.c_int), ("function", ctypes.c_void_p)]


class _Spec(ctypes.Structure):  # PyArrayMethod_Spec
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("nin", ctypes.c_int),
        ("nout", ctypes.c_int),
        ("casting", ctypes.c_int),
        ("flags", ctypes.c_int),
        ("dtypes", ctypes.POINTER(ctypes.py_object)),
        ("slots", ctypes.POINTER(_Slot)),
    ]


def _interface() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return NumPy's PyUFunc_FromFuncAndData and PyUFunc_AddLoopFromSpec."""
    get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    address = get_pointer(_multiarray_umath._UFUNC_API, None)
    table = ctypes.cast(address, ctypes.POINTER(ctypes.c_void_p))
    text, number, pointer = ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p
    new = ctypes.PYFUNCTYPE(
        ctypes.py_object, *[pointer] * 3, *[number] * 4, text, text, number
    )
    add = ctypes.PYFUNCTYPE(number, ctypes.py_object, ctypes.POINTER(_Spec))
    return new(table[1]), add(table[43])


_new, _add_loop = _interface()


@functools.cache
def ufunc(formula: Callable[..., Any], dtype: np.dtype[Any], *, gradient: bool) -> Any:
    """Return formula(x, slope), or gradient(g, x, slope), as a ufunc of one dtype.

    The slope is an array of the dtype that products are computed in.
    """
    lane = lane_of(dtype)
    template, block = (
        (loops.ufunc_backward, loops.backward)
        if gradient
        else (loops.ufunc_forward, loops.forward)
    )
    function = loops.bound(template, block, formula, lane, "ufunc")
    loop = compile_and_keep(function, _LOOP)
    operands = [dtype] * (2 if gradient else 1)
    signature = [*operands, lane.product, dtype]
    name = formula.__name__.strip("_").encode()
    result = _new(
        None, None, None, 0, len(signature) - 1, 1, _NO_IDENTITY, name, None, 0
    )
    classes: Any = ctypes.py_object * len(signature)
    dtypes = classes(*map(type, signature))
    spec = _Spec(
        name,
        len(signature) - 1,
        1,
        _NO_CASTING,
        _NO_FLOATINGPOINT_ERRORS,
        dtypes,
        (_Slot * 2)(_Slot(_STRIDED_LOOP, loop.address), _Slot(0, None)),
    )
    _add_loop(result, spec)
    _kept.append((loop, name))  # NumPy has their addresses only
    return result


_kept: list[Any] = []
