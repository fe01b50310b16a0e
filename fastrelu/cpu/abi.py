"""Every fact about other people's insides that the fast loops rest on.

Those of CPython and NumPy stand here with where they are written down, and `doubt`
proves them once in each process on live objects.  What is used of Numba and llvmlite
beside what they promise is imported here alone: it must be there, and what comes of it
at first use is `Unproven` if it fails.  Where something does not hold, the portable
loops take over.

An object is a row of words of 8 bytes; the constants below are places in it.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fastrelu.mask import Mask

_multiarray_umath: Any = sys.modules.get("numpy._core._multiarray_umath")


class Unproven(Exception):
    """Something that fast loops rest on is not as it was."""


# Facts --------------------------------------------------------------------------------

# CPython, Include/object.h: the last word of an object's head is its type.  Builds
# without the GIL and those that trace references have a longer head.
HEAD = object.__basicsize__  # bytes
LARGEST = sys.maxsize
TYPE = HEAD // 8 - 1

# NumPy, numpy/ndarraytypes.h: PyArrayObject_fields, which is part of its ABI.
DATA, NDIM, SHAPE, STRIDES, BASE, DTYPE, FLAGS = (TYPE + i for i in range(1, 8))
C_ORDER, ANY_ORDER, ALIGNED, WRITEABLE = 1, 3, 0x100, 0x400  # NPY_ARRAY_...
KEEP_ORDER = 2  # NPY_KEEPORDER

# The same header: _PyArray_DescrNumPy2.  A word after `typeobj` come four characters,
# the byte order among them, and the type number: no two dtypes have both in common.
KIND = TYPE + 2

# CPython, Objects/typeobject.c: what a class has slots for lies behind the head, sorted by
# name.
MASK_AXES, MASK_BITS, MASK_PREDICATE, MASK_SHAPE = (TYPE + i for i in range(1, 5))

# NumPy's table for C code, numpy/__multiarray_api.h: numbers of functions.
C_API_VERSION, NEW_ARRAY, NEW_LIKE_ARRAY = 0, 93, 277
SET_HANDLER, DEFAULT_HANDLER = 304, 306
UINT8 = np.dtype(np.uint8).num
ABI_VERSION = 2  # the leading byte of PyArray_GetNDArrayCVersion's answer

# CPython, Include/methodobject.h: a function of (self, arguments, their number).
METH_FASTCALL = 0x80

# What compiled code calls by name: all of Python's documented C interface.
FUNCTIONS = (
    "PyDict_GetItem",
    "PyErr_Clear",
    "PyErr_Occurred",
    "PyEval_RestoreThread",
    "PyEval_SaveThread",
    "PyFloat_AsDouble",
    "PyLong_AsSsize_t",
    "PyLong_FromSsize_t",
    "PyMem_RawFree",
    "PyMem_RawMalloc",
    "PyObject_GetAttr",
    "PyObject_Vectorcall",
    "PyObject_VectorcallMethod",
    "PySequence_Tuple",
    "PyThread_acquire_lock",
    "PyThread_acquire_lock_timed",
    "PyThread_allocate_lock",
    "PyThread_get_thread_ident",
    "PyThread_release_lock",
    "PyThread_start_new_thread",
    "PyThread_tss_get",
    "PyTuple_GetItem",
    "PyTuple_New",
    "PyTuple_SetItem",
    "PyTuple_Size",
    "PyType_GenericAlloc",
    "Py_DecRef",
    "Py_IncRef",
)


class Method(ctypes.Structure):
    """CPython, Include/methodobject.h: PyMethodDef."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    ]


class Handler(ctypes.Structure):
    """NumPy, numpy/ndarraytypes.h: PyDataMem_Handler (NEP 49)."""

    _fields_ = [
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("context", ctypes.c_void_p),
        ("malloc", ctypes.c_void_p),
        ("calloc", ctypes.c_void_p),
        ("realloc", ctypes.c_void_p),
        ("free", ctypes.c_void_p),
    ]


HANDLER_CAPSULE = b"mem_handler"

capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def word(value: object, place: int) -> int:
    """Return a word of an object."""
    return ctypes.c_int64.from_address(id(value) + 8 * place).value


def numpy_api(number: int) -> int:
    """Return an entry, most of them functions, of NumPy's table for C code."""
    table = capsule_pointer(_multiarray_umath._ARRAY_API, None)
    return ctypes.cast(table, ctypes.POINTER(ctypes.c_void_p))[number] or 0


def asks_for_huge_pages() -> bool:
    """Say whether NumPy advises the system to use them (NUMPY_MADVISE_HUGEPAGE)."""
    return bool(getattr(_multiarray_umath, "_get_madvise_hugepage", bool)())


# Numba and llvmlite -------------------------------------------------------------------

_missing = ""
try:
    # How a function is compiled: numba/core/compiler.py and the passes it names, and
    # llvmlite/binding/newpassmanagers.py for what LLVM does in between.
    from llvmlite.binding.newpassmanagers import (
        create_new_module_pass_manager as create_new_module_pass_manager,
    )

    # The code for a value: numba/core/cgutils.py, typing/npydecl.py, np/arrayobj.py.
    # What it is compiled for: numba/core/ccallback.py, whose functions carry what came
    # of compiler.py to the disk as serialize.py pickles it.
    from numba.core import cgutils as cgutils
    from numba.core import config as config
    from numba.core import serialize as serialize
    from numba.core import sigutils as sigutils
    from numba.core.ccallback import CFunc as CFunc
    from numba.core.codegen import JITCodeLibrary as JITCodeLibrary
    from numba.core.compiler import CompilerBase as CompilerBase
    from numba.core.compiler import CompileResult as CompileResult
    from numba.core.compiler_lock import global_compiler_lock as global_compiler_lock
    from numba.core.compiler_machinery import PassManager as PassManager
    from numba.core.compiler_machinery import register_pass as register_pass
    from numba.core.entrypoints import init_all as init_all
    from numba.core.lowering import Lower as Lower
    from numba.core.registry import CPUDispatcher as CPUDispatcher
    from numba.core.typed_passes import IRLegalization as IRLegalization
    from numba.core.typed_passes import NativeLowering as NativeLowering
    from numba.core.typed_passes import NoPythonBackend as NoPythonBackend
    from numba.core.typed_passes import NopythonTypeInference as NopythonTypeInference
    from numba.core.typed_passes import PreLowerStripPhis as PreLowerStripPhis
    from numba.core.typing.npydecl import parse_dtype as parse_dtype
    from numba.core.untyped_passes import FixupArgs as FixupArgs
    from numba.core.untyped_passes import IRProcessing as IRProcessing
    from numba.core.untyped_passes import ReconstructSSA as ReconstructSSA
    from numba.core.untyped_passes import TranslateByteCode as TranslateByteCode
    from numba.np.arrayobj import populate_array as populate_array

    # Whether Numba's own threads are started, and how many may be used.
    from numba.np.ufunc import parallel as parallel
except ImportError as error:
    _missing = str(error)

# Proof --------------------------------------------------------------------------------


def doubt() -> str:
    """Return what does not hold of the facts above, or nothing."""
    try:
        return next(_doubts(), "")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        return f"the proof could not be made: {type(e).__name__}: {e}"


def _doubts() -> Iterator[str]:
    """Yield each doubt; what comes first must hold for the rest to be asked."""
    if _missing:
        yield f"Numba is not as it was: {_missing}"
    if sys.implementation.name != "cpython":
        yield f"objects are known of CPython, this is {sys.implementation.name}"
    if HEAD != 16 or not _has_gil():
        yield "this Python may run without the GIL, or traces references"
    if ctypes.sizeof(ctypes.c_void_p) != 8 or sys.byteorder != "little":
        yield "pointers have not 8 bytes, the lowest first"
    if int(np.__version__.partition(".")[0]) != ABI_VERSION:
        yield f"arrays are known of NumPy 2, this is {np.__version__}"
    for name in FUNCTIONS:
        if not hasattr(ctypes.pythonapi, name):
            yield f"Python has no {name}"
    if np.ndarray.__basicsize__ < 8 * (FLAGS + 1):
        yield "an array has not the words that are read"
    dtype = np.dtype(np.float64)
    for value in (1.5, 1 << 40, (1, 2), np.empty(1), dtype, None, _ARRAY_API):
        if word(value, TYPE) != id(type(value)):
            yield f"the type of a {type(value).__name__} is elsewhere"
    for array in _arrays():
        yield from _doubts_of(array)
    yield from _doubts_of_dtypes()
    yield from _doubts_of_functions()
    yield from _doubts_of_masks()


def _has_gil() -> bool:
    """Say whether threads run one at a time; before Python 3.13 they always do."""
    is_enabled: Callable[[], bool] = getattr(sys, "_is_gil_enabled", lambda: True)
    return is_enabled()


_ARRAY_API = getattr(_multiarray_umath, "_ARRAY_API", None)


def _arrays() -> list[np.ndarray[Any, Any]]:
    """Return arrays that differ in each word that is read."""
    plain = np.zeros((3, 5))
    read_only = plain[1:, ::2]
    read_only.flags.writeable = False
    misaligned = np.zeros(17, np.uint8)[1:].view(np.float64)
    return [plain, plain.T, read_only, misaligned, np.zeros((2, 3, 4), np.float32)]


def _doubts_of(a: np.ndarray[Any, Any]) -> Iterator[str]:
    known = {
        "data": (DATA, a.ctypes.data),
        "base": (BASE, 0 if a.base is None else id(a.base)),
        "dtype": (DTYPE, id(a.dtype)),
        # One piece of memory has both, so that its address is known to be one.
        "strides": (STRIDES, word(a, SHAPE) + 8 * a.ndim),
    }
    for name, (place, value) in known.items():
        if word(a, place) != value:
            yield f"the {name} of an array is elsewhere"
    if word(a, NDIM) & 0xFFFFFFFF != a.ndim:
        yield "the number of dimensions of an array is elsewhere"
    lengths = (ctypes.c_int64 * (2 * a.ndim)).from_address(word(a, SHAPE))
    if tuple(lengths) != (*a.shape, *a.strides):
        yield "the shape of an array is elsewhere"
    flags = {
        C_ORDER: a.flags.c_contiguous,
        ANY_ORDER: a.flags.forc,
        ALIGNED: a.flags.aligned,
        WRITEABLE: a.flags.writeable,
    }
    for bit, is_set in flags.items():
        if bool(word(a, FLAGS) & bit) != is_set:
            yield "the flags of an array are elsewhere"


def _doubts_of_dtypes() -> Iterator[str]:
    numbers = set()
    for code in "bBhHiIlLqQefdgFOSUV":
        dtype = np.dtype(code)
        numbers.add(word(dtype, KIND))
        if word(dtype, KIND) >> 32 != dtype.num:
            yield "the number of a dtype is elsewhere"
    swapped, unit = np.dtype(">f4"), np.dtype("f4", metadata={"unit": "m"})
    if len(numbers) < 19 or word(swapped, KIND) in numbers:
        yield "two dtypes are told apart by other words"
    if word(unit, KIND) != word(np.dtype("f4"), KIND):
        yield "the same dtype has two numbers"


def _doubts_of_functions() -> Iterator[str]:
    version = ctypes.CFUNCTYPE(ctypes.c_uint)(numpy_api(C_API_VERSION))()
    if version >> 24 != ABI_VERSION:
        yield f"NumPy's ABI has version {version:#x}"
    new_like: Callable[..., Any] = ctypes.PYFUNCTYPE(
        ctypes.py_object, ctypes.py_object, ctypes.c_int, ctypes.c_void_p, ctypes.c_int
    )(numpy_api(NEW_LIKE_ARRAY))
    model = np.zeros((3, 5), np.float32).T
    made = new_like(model, KEEP_ORDER, None, 0)
    if (made.shape, made.strides, made.dtype) != ((5, 3), model.strides, model.dtype):
        yield "NumPy makes arrays elsewhere"
    new: Callable[..., Any] = ctypes.PYFUNCTYPE(
        *(ctypes.py_object, ctypes.py_object, ctypes.c_int, ctypes.c_void_p),
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int),
        ctypes.c_void_p,
    )(numpy_api(NEW_ARRAY))
    size = ctypes.c_int64(5)
    made = new(np.ndarray, 1, ctypes.addressof(size), UINT8, None, None, 0, 0, None)
    if (type(made), made.shape, made.dtype) != (np.ndarray, (5,), np.dtype(np.uint8)):
        yield "NumPy makes arrays elsewhere"
    default = ctypes.py_object.from_address(numpy_api(DEFAULT_HANDLER)).value
    handler = Handler.from_address(capsule_pointer(default, HANDLER_CAPSULE))
    if handler.version != 1 or not (handler.malloc and handler.free):
        yield "NumPy's memory handler is another one"
    set_handler: Callable[..., Any] = ctypes.PYFUNCTYPE(
        ctypes.py_object, ctypes.py_object
    )(numpy_api(SET_HANDLER))
    before = set_handler(default)
    if set_handler(before) is not default:
        yield "NumPy takes memory handlers elsewhere"


def _doubts_of_masks() -> Iterator[str]:
    mask = Mask(np.zeros(1, np.uint8), (2, 3), (1, 0), "x > 1")
    known = [
        (MASK_AXES, mask._axes),
        (MASK_BITS, mask.bits),
        (MASK_PREDICATE, mask.predicate),
        (MASK_SHAPE, mask.shape),
    ]
    if Mask.__basicsize__ != HEAD + 8 * len(known):
        yield "a mask has not the words that are written"
    if any(word(mask, place) != id(value) for place, value in known):
        yield "the attributes of a mask are elsewhere"
