"""The public functions inside Numba: in users' @njit, @vectorize and CUDA functions.

Importing fastrelu registers them, in a few milliseconds, and compiles nothing.  Numba has
an entry point for that, but it would import fastrelu into every process that compiles
anything; and whoever names a function of fastrelu has imported it.  Numba's CUDA target
looks where its CPU target does, so that numba-cuda need not be imported for that either.

What is compiled is a formula of the catalogue for numbers, and for arrays a loop on one
thread: the caller's own, who may be within a parallel loop.  Loops are those of `cpu.loops`
and `cpu.sums`, or of `cpu.portable` where the fast ones are not in use.  Types decide, while
the caller is compiled, which loop it is:

- A fresh result is in Fortran's order if that is the order of its models' types, else in
  C order.
- A mask is its bits alone, in C order whatever the layout.  A one-dimensional array of
  uint8 that is saved is taken for such bits, unless the gradient is one of uint8, too.
- In a kernel that Numba compiles with `fma`, its default, a product of ours and a sum of
  the caller's may become one operation, as may their own.
- Numba's int64 and float64 stand for Python's numbers, too: as the gradient of an array,
  and as a weight, they take its dtype.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.errors import TypingError
from numba.core.target_extension import current_target
from numba.extending import overload

from fastrelu import _arguments, _dispatch, cpu
from fastrelu._dtypes import BY_NAME
from fastrelu._functions import rebuild
from fastrelu._spec import ARRAY, WEIGHT, Operation, Spec
from fastrelu._sums import lost
from fastrelu.activations import ACTIVATIONS, Row
from fastrelu.cpu import portable, templates

Function = Callable[..., Any]

# Said here, or Numba would take them over from a caller who has others.
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": False}
_INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}

# From types to what is compiled -------------------------------------------------------


def _made(template: Any, **names: Any) -> Any:
    """Return a template for Numba, with what it leaves open, and all that it calls."""
    held = template.__globals__
    used = {
        name: names[name] if name in names else _made(held[name])
        for name in template.__code__.co_names
        if name in names or type(held.get(name)) is FunctionType
    }
    return _kept(template, tuple(used.items()))


@functools.cache
def _kept(template: Function, names: tuple[tuple[str, Any], ...]) -> Any:
    """Return the same for the same, so that nothing is compiled twice."""
    made = rebuild(template, template.__name__, dict(names)) if names else template
    return numba.njit(made, **_OPTIONS, **_INNER)


def _is_array(type_: Any) -> bool:
    return isinstance(type_, types.Array)


def _on_gpu() -> bool:
    return bool(current_target() == "cuda")


def _dtype(type_: Any) -> str:
    """Return the name of the dtype of an array's or number's type."""
    name = str(types.unliteral(type_.dtype if _is_array(type_) else type_))
    return "bfloat16" if name == "__nv_bfloat16" else name


def _stand_in(type_: Any) -> Any:
    """Return what checks of arrays ask, of a type."""
    return SimpleNamespace(dtype=_dtype(type_), shape=None, device=None)


def _accepted(name: str, type_: Any, *, integers: bool = False) -> str:
    """Return the dtype of an argument, which must be one that functions take."""
    is_number = isinstance(type_, (types.Number, types.Boolean))
    if not _is_array(type_) and not is_number and _dtype(type_) != "bfloat16":
        msg = f"{name} must be an array or a number, got {type_}"
        raise TypeError(msg)
    _arguments.accepted(name, _stand_in(type_), integers=integers)
    if _on_gpu() and _is_array(type_):
        msg = f"{name} must be a number in a kernel, which calls for each, got {type_}"
        raise TypeError(msg)
    if not _on_gpu() and _dtype(type_) in _HALVES:
        msg = f"{name} must not be of {_dtype(type_)}: Numba has none on the CPU"
        raise TypeError(msg)
    return _dtype(type_)


_HALVES = "float16", "bfloat16"


def _flag(name: str, type_: Any) -> bool:
    """Return a flag, which must be known while the caller is compiled."""
    value = getattr(type_, "literal_value", getattr(type_, "value", type_))
    if isinstance(value, types.Boolean):
        msg = f"{name} must be written out as True or False, got a variable"
        raise TypeError(msg)
    return _arguments.flag(name, value)


def _is_none(type_: Any) -> bool:
    return getattr(type_, "value", type_) in (None, types.none)


def _number_type(name: str, type_: Any) -> None:
    """Refuse what is not a real number."""
    real = types.Integer, types.Float, float, int, types.Omitted
    if not isinstance(type_, real) and _dtype(type_) != "bfloat16":
        msg = f"{name} must be a real number, got {type_}"
        raise TypeError(msg)


def _scalar(dtype: str) -> Any:
    """Return the type of numbers that are computed with elements of a dtype."""
    return np.float32 if dtype in _HALVES else getattr(np, dtype)


@functools.cache
def _of(dtype: str) -> dict[str, Any]:
    """Return what a dtype binds."""
    itself = _made(templates.itself)
    load, store = _halves(dtype) if dtype in _HALVES else (itself, itself)
    return {"load": load, "store": store, "scalar": _scalar(dtype)}


def _halves(dtype: str) -> Any:
    """Return how half floats are read and made in a kernel, as in ours."""
    from numba.cuda import types as kinds

    from fastrelu.cuda import vector

    half: Any = vector.half
    return half(vector.format_of(dtype, (7, 5)), getattr(kinds, dtype))


def _rounding(count: int, dtype: str) -> Any:
    """Return what rounds so many numbers to the type of products."""
    return _made(templates.ROUND[count], scalar=getattr(np, BY_NAME[dtype].compute))


def _numbers(names: Sequence[str], dtype: str, *, check: bool = True) -> dict[str, Any]:
    """Return what goes with the numbers of an activation."""
    msg = f"{' and '.join(names)} must be finite in {BY_NAME[dtype].compute}"
    finite = _made(templates.FINITE[len(names) if check else 0], message=msg)
    return {"rounded": _rounding(len(names), dtype), "finite": finite}


def _fits(name: str, dtype: str) -> Any:
    """Return what refuses a number, perhaps of Python's, that a dtype cannot hold."""
    is_float = BY_NAME[dtype].kind == "f"
    fits = templates.fits_float if is_float else templates.fits_integer
    return _made(fits, message=f"{name} must fit {dtype}")


def _like(order: str, dtype: str) -> dict[str, Any]:
    template = templates.like_fortran if order == "F" else templates.like_c
    return {"like": _made(template, scalar=_scalar(dtype))}


def _order(*kinds: Any) -> str:
    """Return the order that arrays have in common, or that of new ones beside them."""
    layouts = {type_.layout for type_ in kinds}
    return layouts.pop() if len(layouts) == 1 else "A"


def _target(
    first: str, x: Any, inplace: bool, out: Any, dtype: str, name: str = "out"
) -> Any:
    """Return the type of a result, and what takes it from the arguments."""
    if not inplace and _is_none(out):
        y = _dense(x, x.layout).copy(dtype=getattr(types, dtype))
        return y, _made(templates.take_fresh, **_like(x.layout, dtype))
    _arguments.in_place(inplace, None if _is_none(out) else out)
    name, y = (first, x) if inplace else (name, out)
    if not _is_array(y) or y.ndim != x.ndim or _dtype(y) != dtype:
        msg = f"{name} must be an array of {x.ndim} dimensions and {dtype}, got {y}"
        raise TypeError(msg)
    if not y.mutable:
        msg = f"{name} must be writeable, got a read-only array"
        raise ValueError(msg)
    check, template = (
        _made(templates.check_none),
        templates.take_first if inplace else templates.take_out,
    )
    if y.layout == "A":
        msg = f"{name} must not share memory between its own elements"
        check = _made(templates.check_any, message=msg)
    return y, _made(
        template, check=check, message=f"{name} must have the shape of {first}"
    )


def _elementwise(
    operands: Any,
    kinds: Sequence[Any],
    y: Any,
    fresh: bool,
    inplace: bool | None = None,
    **names: Any,
) -> Any:
    """Return ``run(a, y, s)`` for arrays of any layout."""
    lay, get, meets_any = operands
    order = _order(*kinds, y)
    if y.ndim == 0 or order == "C":
        at, run = templates.flat_c, templates.at_once
    elif order == "F":
        at, run = templates.flat_fortran, templates.at_once
    elif y.ndim == 1:
        at, run = templates.whole, templates.at_once
    else:
        at, run = templates.line, templates.by_lines
    names |= {"at": _made(at), "get": _made(get, **names)}
    names |= {"plain": _made(portable._plain, **names), "lay": _made(lay, **names)}
    with_strips = inplace is not None and y.aligned and cpu.is_fast()
    if run is templates.at_once and with_strips:
        run, names = templates.by_strips, names | _strips(inplace, len(kinds) + 1)
    made = _made(run, **names)
    if fresh:
        return made
    meets_any = _made(meets_any)
    like, z = _like(y.layout, _dtype(y)), _dense(y, y.layout)
    return _made(
        templates.apart_from_result,
        run=made,
        meets_any=meets_any,
        copy=_copy(z, y),
        **like,
    )


@functools.cache
def _strips(inplace: bool, moved: int) -> dict[str, Any]:
    """Return what writes strips, in place or past the cache, of so many arrays."""
    from fastrelu.cpu import loops, threads, vector

    return {
        "moved": moved,
        "cache": sys.maxsize if inplace else threads.CACHE,  # in place all stays there
        "strip_size": vector.STRIP,
        "strip_buffer": loops.strip_buffer,
        "store_strip": vector.store_strip,
        "stream_strip": vector.stream_strip,
        "fence": vector.fence,
    }


def _dense(x: Any, order: str) -> Any:
    """Return the type of an array that `_like` makes."""
    return x.copy(layout="F" if order == "F" else "C", readonly=False)


def _copy(x: Any, y: Any) -> Any:
    """Return ``copy((x,), y, ())``; Numba compiles its own ten times as long."""
    itself = _made(templates.itself)
    names = {"load": itself, "store": itself, "formula": itself}
    return _elementwise(templates.ONE, (x,), y, True, **names)


def _inside(name: str, operation: Operation, dtype: str) -> Any:
    """Return a body of the fast loops, or one of their drivers of sums."""
    from fastrelu.cpu import build, loops, sums, vector

    body = getattr(loops, name, None) or getattr(sums, name)
    return build.inside(body, operation, vector.format_of(np.dtype(dtype)))


def _by_channel(loops: tuple[str, str], many: str, of: Operation, dtype: str) -> Any:
    """Return the bodies for rows and columns, and what chooses between them."""
    from fastrelu.cpu import calls
    from fastrelu.cpu import loops as known

    rows, columns = (_inside(name, of, dtype) for name in loops)
    suits = _made(calls.suits_columns)
    more = {"suits_columns": suits, "many": getattr(known, many)}
    return {"rows": rows, "columns": columns, **more}


def _with_bits(
    name: str, of: Operation, x: Any, y: Any, fresh: bool, **names: Any
) -> Any:
    """Return ``run(x, bits, y, s, size)``, with the loop of a name over bits in C order."""
    if y.aligned and cpu.is_fast():
        body = _inside(name, of, _dtype(y))
        run = _made(templates.bits_in_strips, body=body)
    else:
        get = _made(portable._get_one, **names)
        loop = _made(getattr(portable, f"_{name}"), get=get, **names)
        run = _made(templates.bits_at_once, loop=loop)
    z = _dense(x, "C")
    copies = {"copy_in": _copy(x, z), "copy_out": _copy(z, y)}
    copied = _made(templates.bits_of_copy, run=run, **copies, **_like("C", _dtype(x)))
    if x.layout != "C" or y.layout != "C":
        return copied
    return run if fresh else _made(templates.bits_apart, run=run, copied=copied)


def _forward_body(spec: Spec, given: dict[str, Any]) -> Any:
    """Return what computes an activation of numbers, or none, for parameters."""
    x, out = given["x"], given["out"]
    dtype = _accepted("x", x, integers=spec.integers)
    inplace, want_bits = (_flag(name, given.get(name, False)) for name in _FLAGS)
    check = "weight" not in given  # which may be infinite, too
    names = _of(dtype) | _numbers(spec.numbers, dtype, check=check)
    names["formula"] = _made(spec.formula)
    for number in spec.numbers:
        _number_type(number, given.get(number, 0.0))
    if not _is_array(x):
        return _for_number(
            "x", x, want_bits or inplace, out, _made(templates.of_number, **names)
        )
    y, take = _target("x", x, inplace, out, dtype)
    fresh = inplace or _is_none(out)  # x alone meets itself in each element
    if not want_bits:
        apart = _elementwise(templates.ONE, (x,), y, fresh, inplace, **names)
        return _made(templates.forward, take=take, apart=apart, **names)
    names["active"] = _made(spec.active)
    names["kept"] = _made(portable._KEEP[len(spec.numbers_kept)])
    run = _with_bits("to_bits", spec.to_bits, x, y, fresh, **names)
    return _made(templates.forward_bits, take=take, run=run, **names)


_FLAGS = "inplace", "return_mask"


def _for_number(name: str, x: Any, asked: bool, out: Any, body: Function) -> Any:
    """Refuse what is for arrays alone."""
    if asked or not _is_none(out):
        msg = f"{name} must be an array with inplace, out or return_mask, got {x}"
        raise TypeError(msg)
    return body


def _backward_body(spec: Spec, given: dict[str, Any]) -> Any:
    name = "saved" if "saved" in given else "x"
    g, saved, out = given["grad_output"], given[name], given["out"]
    inplace = _flag("inplace", given["inplace"])
    spread = _is_array(saved) and not _is_array(g)
    dtype = _accepted("grad_output", g, integers=spec.integers)
    told = _dtype(saved) == "bool" and name == "saved" and spec.active is not None
    told_dtype = "uint8" if told else _accepted(name, saved, integers=True)
    if spread and _dtype(g) in ("int64", "float64") and not told:
        row = BY_NAME[told_dtype]
        dtype = told_dtype if row.kind == "f" or dtype == "int64" else dtype
    if name == "x" and dtype != told_dtype:
        _arguments.like(name, _stand_in(saved), "grad_output", _stand_in(g))
    numbers = [number for number in (*spec.numbers_kept, "slopes") if number in given]
    slopes = [given[number] for number in numbers if _is_array(given[number])]
    for number in numbers if not slopes else ():
        _number_type(number, given[number])
    names = _of(dtype) | _numbers(numbers, dtype)
    names["formula"] = names["gradient"] = _made(spec.gradient)
    names["passes"] = _passes(spec, told, told_dtype, len(numbers) - len(slopes))
    names["fits"] = _fits("grad_output", dtype)
    if not _is_array(g) and not _is_array(saved) and not slopes:
        body = _made(templates.number_backward, **names)
        return _for_number("grad_output", g, inplace, out, body)
    if not _is_array(saved) or (spread and (inplace or slopes)):
        msg = f"{name} must be an array as grad_output is, got {saved} and {g}"
        raise TypeError(msg)
    y, take = _target("grad_output", saved if spread else g, inplace, out, dtype)
    fresh = not inplace and _is_none(out)
    msg = f"{name} must have the shape of grad_output"
    if name == "saved" and not spread and _are_bits(saved, g):
        msg = "saved must be bits, one for each element of grad_output"
        run = _with_bits("from_bits", spec.from_bits, g, y, fresh, **names)
        return _made(templates.backward_bits, take=take, run=run, message=msg, **names)
    for each in () if spread else (saved, *slopes):
        if each.ndim != g.ndim:
            msg = f"{msg}, got {each} and {g}"
            raise TypeError(msg)
    for each in slopes:
        _arguments.like("slopes", _stand_in(each), "grad_output", _stand_in(g))
    operands = (
        templates.SPREAD if spread else templates.SLOPES if slopes else templates.SAVED
    )
    kinds = (saved,) if spread else (g, saved, *slopes)
    apart = _elementwise(operands, kinds, y, fresh, inplace, **names)
    template = (
        templates.backward_spread
        if spread
        else templates.backward_slopes
        if slopes
        else templates.backward
    )
    return _made(template, take=take, apart=apart, message=msg, **names)


def _are_bits(saved: Any, g: Any) -> bool:
    """Say whether what was saved is bits, told by its type."""
    same = g.ndim == 1 and _dtype(g) == "uint8"
    return _dtype(saved) == "uint8" and saved.ndim == 1 and not same


def _passes(spec: Spec, told: bool, dtype: str, numbers: int) -> Any:
    """Return what a gradient is told of what was saved."""
    if told or spec.active is None:
        return _made(templates.is_told, **_of(dtype))
    rounded = _rounding(numbers, dtype)
    active = _made(spec.active)
    return _made(
        templates.is_active, active=active, rounded=rounded, load=_of(dtype)["load"]
    )


def _mean_body(spec: Spec, given: dict[str, Any]) -> Any:
    if _flag("training", given["training"]):
        msg = "training must be False within Numba, where no slopes are drawn"
        raise TypeError(msg)
    for name in ("lower", "upper"):
        _number_type(name, given[name])
    run = _forward_body(spec, given)
    middle = _made(_dispatch.middle)
    if not _is_array(given["x"]):
        return _made(templates.mean_number, run=run, middle=middle)
    names = _numbers(("lower", "upper"), _dtype(given["x"]))
    msg = "lower must not be above upper"
    return _made(templates.mean, run=run, middle=middle, message=msg, **names)


def _weight_view(x: Any, weight: Any, axis: Any, order: str) -> Any:
    """Return ``view(x, weight, axis)``, of a weight that fits x."""
    names = {"scalar": _scalar(_dtype(x)), "reverse": order == "F"}
    names["fits"] = _fits("weight", _dtype(x))
    if not isinstance(axis, (int, types.Integer, types.Omitted)):
        msg = f"axis must be an integer, got {axis}"
        raise TypeError(msg)
    if not _is_array(weight) or weight.ndim == 0:
        return _made(templates.view_number, value_of=_value_of(weight), **names)
    itself = _made(templates.itself)
    names["view_number"] = _made(templates.view_number, value_of=itself, **names)
    if weight.ndim > max(x.ndim, 1):
        msg = f"weight must broadcast against x without growing it, got {weight}, {x}"
        raise TypeError(msg)
    names["channels_of"] = _made(templates.channels_of, **names)
    if weight.ndim > 1:
        msg = "weight must broadcast against x without growing it"
        return _made(templates.view_broadcast, message=msg, **names)
    msg = (
        "weight must have one element, or as many as x has along an axis of x's, which "
        "must be named where x has fewer than two dimensions"
    )
    template = templates.view_one_element if x.ndim == 0 else templates.view_axis
    return _made(template, message=msg, **names)


def _value_of(weight: Any) -> Any:
    if _is_array(weight):
        return _made(templates.element_of)
    half = not isinstance(weight, (float, int)) and _dtype(weight) in _HALVES
    return _of(_dtype(weight))["load"] if half else _made(templates.itself)


def _checked_weight(weight: Any, x: Any) -> None:
    """Refuse a weight that is no number and not of x's dtype."""
    if not _is_array(weight):
        _number_type("weight", weight)
    elif _accepted("weight", weight) != _dtype(x):
        msg = (
            f"weight must have the dtype of x, {_dtype(x)}, got {_dtype(weight)}: "
            f"take weight.astype(x.dtype)"
        )
        raise TypeError(msg)


def _weighted_body(spec: Spec, given: dict[str, Any]) -> Any:
    x, weight, out = given["x"], given["weight"], given["out"]
    dtype = _accepted("x", x)
    _checked_weight(weight, x)
    inplace = _flag("inplace", given["inplace"])
    if not _is_array(weight) or weight.ndim == 0:
        names = {"scalar": _scalar(dtype), "value_of": _value_of(weight)}
        fits = _fits("weight", dtype) if _is_array(x) else _made(templates.no_check)
        run = _forward_body(spec, given)
        return _made(templates.prelu_number, run=run, fits=fits, **names)
    if not _is_array(x):
        msg = f"weight must be a number as x is, got {weight}"
        raise TypeError(msg)
    y, take = _target("x", x, inplace, out, dtype)
    order = _order(x, y)
    names = _of(dtype) | _like(order, dtype)
    names["formula"] = _made(spec.formula)
    view = _weight_view(x, weight, given["axis"], order)
    at = _made(templates.flat_fortran if order == "F" else templates.flat_c)
    if y.aligned and cpu.is_fast():
        of = Operation(spec.formula, (ARRAY, WEIGHT))
        loops = _by_channel(("rows", "columns"), "MANY", of, dtype)
        run = _made(templates.weighted_in_strips, at=at, **loops)
    else:
        one, two = (_made(get, **names) for get in portable._GET[:2])
        run = _made(
            templates.weighted,
            at=at,
            rows=_made(portable._rows, get=one, **names),
            plain=_made(portable._plain, get=two, **names),
        )
    fresh, z = inplace or _is_none(out), _dense(x, order)
    names |= {"copy_in": _copy(x, z), "copy_out": _copy(z, y)}
    run = _without_overlap(
        run, templates.weighted_copy, templates.weighted_apart, order, fresh, **names
    )
    return _made(templates.prelu, view=view, take=take, run=run)


def _without_overlap(
    run: Function,
    copy: Function,
    apart: Function,
    order: str,
    fresh: bool,
    **names: Any,
) -> Any:
    """Return what works on copies where arrays do not lie flat, or may overlap."""
    copied = _made(copy, run=run, **names)
    if order == "A":
        return copied
    return run if fresh else _made(apart, run=run, copied=copied)


def _both_body(spec: Spec, given: dict[str, Any]) -> Any:
    g, x, weight, out = (given[n] for n in ("grad_output", "x", "weight", "out"))
    inplace = _flag("inplace", given["inplace"])
    dtype = _accepted("grad_output", g)
    _accepted("x", x)
    _arguments.like("x", _stand_in(x), "grad_output", _stand_in(g))
    _checked_weight(weight, x)
    names = _of(dtype) | {"gradient": _made(spec.gradient)}
    names |= {"share": _made(portable.share_of), "lost": _made(lost)}
    if not _is_array(g) and not _is_array(x) and not _is_array(weight):
        names["passes"] = _passes(spec, False, dtype, 0)
        names["value_of"] = _value_of(weight)
        body = _made(templates.number_prelu_backward, **names)
        return _for_number("grad_output", g, inplace, out, body)
    if not (_is_array(g) and _is_array(x) and g.ndim == x.ndim):
        msg = f"x must have the shape of grad_output, got {x} and {g}"
        raise TypeError(msg)
    outs, firsts = _arguments.pair(out), (templates.itself, templates.nothing)
    if isinstance(out, types.BaseTuple):
        outs, firsts = (
            _arguments.pair(tuple(out)),
            (templates.first_of, templates.second_of),
        )
    y, take = _target("grad_output", g, inplace, outs[0], dtype)
    fresh = not inplace and _is_none(outs[0])
    order = _order(g, x, y)
    names |= _like(order, dtype) | {
        "at": _made(templates.flat_fortran if order == "F" else templates.flat_c)
    }
    names["formula"] = _made(spec.of_saved)
    if all(each.aligned for each in (g, x, y)) and cpu.is_fast():
        of = Operation(spec.of_saved, (ARRAY, ARRAY, WEIGHT))
        loops = "prelu_backward_rows", "prelu_backward_columns"
        found = _by_channel(loops, "MANY_SUMMED", of, dtype)
        run = _made(templates.both_in_strips, **names, **found)
    else:
        loop = _made(portable._prelu_backward, **names)
        run = _made(templates.both, loop=loop, **names)
    z = _dense(x, order)
    names |= {"copy_in": _copy(g, z), "copy_too": _copy(x, z), "copy_out": _copy(z, y)}
    run = _without_overlap(
        run, templates.both_copies, templates.both_apart, order, fresh, **names
    )
    if _is_array(weight):
        _, take_weight = _target("weight", weight, False, outs[1], dtype, "out[1]")
    else:
        take_weight = _made(templates.one_element, scalar=_scalar(dtype))
        if not _is_none(outs[1]):
            msg = f"out[1] must be None where weight is a number, got {outs[1]}"
            raise TypeError(msg)
    check = _made(templates.no_check)
    if not _is_none(outs[1]) and not fresh:
        msg = "out[0] and out[1] must not share memory"
        check = _made(templates.check_apart, message=msg)
    return _made(
        templates.prelu_backward,
        view=_weight_view(x, weight, given["axis"], order),
        take=take,
        take_weight=take_weight,
        first_out=_made(firsts[0]),
        second_out=_made(firsts[1]),
        check=check,
        run=run,
        result=_made(templates.itself if _is_array(weight) else templates.first_of),
        message="x must have the shape of grad_output",
    )


# Registering --------------------------------------------------------------------------


def _register(
    public: Function,
    spec: Spec,
    implement: Function,
    passed: str,
    numbers: Sequence[str] | None,
) -> None:
    """Have Numba type a public function, whose arguments go on as is `passed`.

    After them comes a tuple of its numbers, unless there is none.
    """

    def typed(*args: Any, **kws: Any) -> Any:
        signature = inspect.signature(public)
        try:
            given = signature.bind(*args, **kws)
            given.apply_defaults()
            more = "" if numbers is None else f", {_tuple(numbers, given.arguments)}"
            body = implement(spec, given.arguments)
        except (TypeError, ValueError) as error:
            raise TypingError(str(error)) from error
        # Numba folds arguments by the names and defaults of what it is given.
        parameters = [
            p.replace(kind=p.POSITIONAL_OR_KEYWORD, annotation=p.empty)
            for p in signature.parameters.values()
        ]
        named = str(inspect.Signature(parameters))[1:-1]
        names = {"body": body, "element_of": _made(templates.element_of)}
        return eval(f"lambda {named}: body({passed}{more})", names)

    overload(public, jit_options=_OPTIONS, strict=False, prefer_literal=True)(typed)


def _tuple(names: Sequence[str], given: dict[str, Any]) -> str:
    """Return the tuple of some numbers, in Python's words.

    One in an array is read here, before anything is written, and is no array any more.
    """
    items = []
    for name in names:
        type_ = given[name]
        is_inside = _is_array(type_) and type_.ndim == 0
        items.append(f"element_of({name}), " if is_inside else f"{name}, ")
        given[name] = type_.dtype if is_inside else type_
    return f"({''.join(items)})"


def _register_row(row: Row) -> None:
    spec = row.spec
    numbers: Any = spec.numbers
    kept: Any = spec.numbers_kept
    saved = "x" if spec.active is None or row.parameter else "saved"
    passed = "x, out", f"grad_output, {saved}, out"
    forward, backward = _forward_body, _backward_body
    if row.parameter == "weight":
        forward, backward = _weighted_body, _both_body
        passed = "x, weight, axis, out", "grad_output, x, weight, axis, out"
        numbers = kept = None
    elif row.parameter == "slopes":
        forward = _mean_body
        numbers, kept = ("lower", "upper"), ("slopes",)
    _register(row.forward, spec, forward, passed[0], numbers)
    _register(row.backward, spec, backward, passed[1], kept)


for _each in ACTIVATIONS.values():
    _register_row(_each)
