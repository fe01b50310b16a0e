"""What NumPy calls for memory, and Python for what a pool has: compiled, as `blocks` is.

NumPy's handler is the pool's for the length of one call.
"""

import functools
from collections.abc import Callable
from typing import Any

from numba import types

from fastrelu.cpu.abi import DATA
from fastrelu.cpu.blocks import (
    HANDLER,
    HEAD,
    LENDER,
    SET_HANDLER,
    SIZE,
    TAKER,
    enter,
    free_idle,
    janitor,
    lend,
    take_back,
)
from fastrelu.cpu.jit import (
    calling,
    compile_and_keep,
    inlined,
    keep_for_ever,
    pointer_to,
    smaller,
)

_word = types.int64
_words = pointer_to(types.CPointer(_word))
_bytes = pointer_to(types.CPointer(types.uint8))
_call_lend = calling(_word(_word, _word))
_call_take_back = calling(types.void(_word, _word, _word))
_set_handler = calling(_word(_word))
_vectorcall = types.ExternalFunction(
    "PyObject_Vectorcall", _word(_word, _word, types.intp, _word)
)
_let_go = types.ExternalFunction("Py_DecRef", types.void(_word))


# What NumPy calls ---------------------------------------------------------------------


def malloc(pool, nbytes):
    return lend(pool, nbytes)


def free(pool, address, nbytes):
    take_back(pool, address)


# What it seldom calls has no code of its own to lend and to take back, which would be a
# quarter of all that is compiled here.


def calloc(pool, items, itemsize):
    nbytes = items * itemsize
    address = _call_lend(_words(pool)[LENDER], (pool, nbytes))
    if address != 0:
        for i in range(nbytes):
            _bytes(address)[i] = 0
    return address


def realloc(pool, address, nbytes):
    new = _call_lend(_words(pool)[LENDER], (pool, nbytes))
    if new != 0 and address != 0:
        for i in range(smaller(nbytes, _words(address - HEAD)[SIZE])):
            _bytes(new)[i] = _bytes(address)[i]
        _call_take_back(_words(pool)[TAKER], (pool, address, 0))
    return new


# What Python calls --------------------------------------------------------------------


def shrink(pool, most):
    """Free the stalest blocks until no more is idle; say whether the list was free."""
    return 1 if free_idle(pool, most) else 0


def hold(pool):
    """Take the list for a fork; say whether it was free."""
    return 1 if enter(pool) else 0


@inlined
def borrow(pool):
    """Let NumPy take memory from the pool; return where it did before, or 0."""
    return _set_handler(_words(pool)[SET_HANDLER], (_words(pool)[HANDLER],))


@inlined
def restore(pool, before, result):
    """Let NumPy take memory where it did before; return the result, or 0."""
    own = _set_handler(_words(pool)[SET_HANDLER], (before,))
    _let_go(before)
    if own != 0:
        _let_go(own)
    elif result != 0:
        _let_go(result)
        result = 0
    return result


def call(self, arguments, number):
    """Call arguments[0] of the others, a function of NumPy that makes an array."""
    pool = _words(self)[DATA]
    before = borrow(pool)
    if before == 0:
        return 0
    result = _vectorcall(_words(arguments)[0], arguments + 8, number - 1, 0)
    return restore(pool, before, result)


_SIGNATURES: dict[Callable[..., Any], Any] = {
    malloc: _word(_word, _word),
    calloc: _word(_word, _word, _word),
    realloc: _word(_word, _word, _word),
    free: types.void(_word, _word, _word),
    shrink: _word(_word, _word),
    hold: _word(_word),
    call: _word(_word, _word, types.intp),
    janitor: types.void(_word),
}


@functools.cache
def compiled() -> dict[Callable[..., Any], Any]:
    """Return what is called from outside, each by the function it was made of."""
    # For ever: an array may outlive all modules.
    return keep_for_ever(
        {
            function: compile_and_keep(function, signature)
            for function, signature in _SIGNATURES.items()
        }
    )
