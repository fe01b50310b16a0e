"""Dask's arrays: the public functions for each of their blocks, once they are computed.

Here is checked what can be without a block: dtypes, numbers, and shapes as far as they
are known.  What is then added to the graph is one layer, which Dask fuses with its
neighbours.  A task calls the same quick calls as everybody, on arrays of NumPy or on a
GPU.  It finds out for itself where it runs: in a pool of threads, or beside processes,
that have a task for each processor, its loops stay with its own thread.

Examples
--------
Arrays of xarray that hold Dask's go by way of its own function for that:

>>> import dask.array as da
>>> import fastrelu
>>> import xarray
>>> x = xarray.DataArray(da.arange(-2.0, 3.0, chunks=2), dims="time")
>>> y = xarray.apply_ufunc(fastrelu.relu, x, dask="parallelized")
>>> y.chunks
((2, 2, 1),)
>>> y.values
array([0., 0., 0., 1., 2.])
"""

import functools
import itertools
import math
import multiprocessing
import operator
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import dask.array as da
import numpy as np
from dask.base import DaskMethodsMixin
from dask.core import flatten

from fastrelu import _arguments, _dispatch, cpu
from fastrelu._arguments import is_number, is_on_gpu
from fastrelu._dtypes import rounded
from fastrelu._sums import added_up
from fastrelu.mask import Mask

Array = Any
Function = Any  # one of _dispatch's
Shape = Sequence[float]  # with NaN for what is not known


# Masks --------------------------------------------------------------------------------


class DaskMask(DaskMethodsMixin):  # type: ignore[misc]
    """A mask that is not computed yet: a `Mask` for each block of an array.

    ``relu(x, return_mask=True)`` makes one of a Dask array.  It is a Dask collection:
    ``persist()`` keeps its bits on the workers, and ``compute()`` gives one `Mask`, in
    C order if there was more than one block.

    Parameters
    ----------
    array : dask.array.Array
        Of the shape, the chunks and the meta of ``unpack()``; its blocks are masks.
    predicate : str
        What a bit says of an element.

    Examples
    --------
    >>> import dask.array as da
    >>> import fastrelu
    >>> x = da.arange(-4.0, 4.0, chunks=4)
    >>> y, mask = fastrelu.relu(x, return_mask=True)
    >>> fastrelu.relu_backward(da.ones_like(x), mask).compute()
    array([0., 0., 0., 0., 0., 1., 1., 1.])
    >>> mask.compute().bits
    array([224], dtype=uint8)
    """

    def __init__(self, array: Any, predicate: str) -> None:
        self.array, self.predicate = array, predicate

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape of the array that it is made of."""
        shape: tuple[Any, ...] = self.array.shape
        return shape

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of ``unpack()``, bool."""
        return np.dtype(np.bool_)

    @property
    def chunks(self) -> Any:
        """The lengths of the blocks along each axis."""
        return self.array.chunks

    @property
    def nbytes(self) -> Any:
        """The bytes that the bits of all blocks take, NaN where it is not known."""
        return sum(-(-math.prod(n) // 8) for n in itertools.product(*self.chunks))

    def unpack(self) -> Any:
        """Return a Dask array of bool: True where the gradient passes."""
        return _mapped("unpack", _unpack, self.array, (self.array,), self.dtype)

    to_dask_array = unpack  # what Dask's own functions ask for

    def count(self, axis: int | tuple[int, ...] | None = None) -> Any:
        """Return how many bits are set, along some axes or all, as a Dask array."""
        return self.unpack().sum(axis)

    def __getattr__(self, name: str) -> Any:
        msg = f"{type(self).__name__!r} object has no attribute {name!r}"
        if name in ("bits", "axes"):
            msg = (
                f"a mask that is not computed yet has no {name}: take compute().{name}"
            )
        raise AttributeError(msg)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.compute().__array__(dtype, copy)

    def __bool__(self) -> bool:
        msg = "a mask has one bit for each element, not one for all: use mask.count()"
        raise ValueError(msg)

    def __repr__(self) -> str:
        return f"DaskMask(shape={self.shape}, chunksize={self.array.chunksize})"

    # What Dask asks of a collection.  Optimised as arrays are, so that a mask and its
    # array are computed together.
    __dask_optimize__ = vars(da.Array)["__dask_optimize__"]
    __dask_scheduler__ = vars(da.Array)["__dask_scheduler__"]

    def __dask_graph__(self) -> Any:
        return self.array.__dask_graph__()

    def __dask_layers__(self) -> Any:
        return self.array.__dask_layers__()

    def __dask_keys__(self) -> Any:
        return self.array.__dask_keys__()

    def __dask_tokenize__(self) -> Any:
        return type(self).__name__, self.array.name

    def __dask_postcompute__(self) -> Any:
        return _whole, (self.predicate,)

    def __dask_postpersist__(self) -> Any:
        return _rebuilt, (*self.array.__dask_postpersist__(), self.predicate)


def pack(bools: Any, predicate: str) -> DaskMask:
    """Return the mask of an array of bools, as `Mask.pack` does for each block."""
    if not isinstance(bools, DaskMask):
        bools = _read("bools", bools)
    bools = da.asarray(bools)
    call = functools.partial(Mask.pack, predicate=predicate)
    call(bools._meta)  # refuses what its blocks are
    bits = _mapped("pack", call, bools, (bools,), bools.dtype)
    return DaskMask(bits, predicate)


def _unpack(mask: Mask) -> Array:
    return mask.unpack()


def _whole(blocks: Any, predicate: str) -> Mask:
    """Return one mask of nested lists of them, or tuples."""
    masks: list[Mask] = list(flatten(blocks, container=(list, tuple)))
    if len(masks) == 1:
        return masks[0]
    bools = _joined(blocks)
    bits = np.packbits(bools, None, "little")
    return Mask(bits, bools.shape, None, predicate)


def _joined(blocks: Any, axis: int = 0) -> Array:
    if isinstance(blocks, Mask):
        return blocks.unpack()
    return np.concatenate([_joined(block, axis + 1) for block in blocks], axis)


def _rebuilt(
    graph: Any, rebuild: Any, arguments: Any, predicate: str, **more: Any
) -> DaskMask:
    return DaskMask(rebuild(graph, *arguments, **more), predicate)


_LAZY = da.Array, DaskMask


def is_lazy(value: Any) -> bool:
    """Say whether a value is what this module takes."""
    return issubclass(type(value), _LAZY)


# Where a task runs --------------------------------------------------------------------

_PART = 16  # of a worker's memory limit may be idle in the pool
_known_workers: set[Any] = set()


def _run(call: Callable[..., Any], *arguments: Any) -> Any:
    """Make a call as where it runs demands."""
    _heed_the_worker()
    # Dask's synchronous scheduler runs where it is called: there the team may help.
    if threading.current_thread() is threading.main_thread() and not _has_parent():
        return call(*arguments)
    with cpu.alone():
        return call(*arguments)


_has_parent = multiprocessing.parent_process


def _heed_the_worker() -> None:
    """Keep less idle memory in a worker that is told how much it may use.

    It is paused or ended for what the process holds, idle or not.
    """
    distributed = sys.modules.get("distributed.worker")
    if distributed is None:
        return
    try:
        worker = distributed.get_worker()
    except ValueError:  # this is none
        return
    limit = worker.memory_manager.memory_limit
    if worker.address not in _known_workers and limit:
        pool = cpu.get_default_memory_pool()
        pool.set_limit(min(pool.get_limit(), limit // _PART))
    _known_workers.add(worker.address)


def _call(function: Function, x: Array, *others: Any) -> Any:
    return _run(function.call, x, False, None, *others)


# Checks, without a block --------------------------------------------------------------


def _refuse(inplace: Any, out: Any) -> None:
    """Refuse to write to arrays that are not there yet."""
    for name, given in (
        ("inplace", _arguments.flag("inplace", inplace)),
        ("out", _arguments.single(out) is not None),
    ):
        if given:
            msg = (
                f"{name} must not be given with Dask arrays, which cannot be written to: "
                "use what is returned"
            )
            raise TypeError(msg)


def _read(name: str, value: Any) -> Any:
    """Return an argument as Dask's or as an array in memory."""
    if isinstance(value, DaskMask) and name != "saved":
        raise _arguments.no_mask(name)
    if is_lazy(value):
        if not isinstance(value.dtype, np.dtype):
            came = _arguments.kind_of(value._meta)
            msg = f"{name} must be made of arrays of NumPy or CuPy, got {came}"
            raise TypeError(msg)
        meta = getattr(value, "_meta", None)
        if meta is not None and not is_on_gpu(meta):
            _arguments.read(cpu, (name, meta))
        return value
    if is_on_gpu(value):
        return value
    return _arguments.read(cpu, (name, value))[0]


def _models(*values: Any, hint: Shape = ()) -> list[Array]:
    """Return arrays that take no memory for the checks of shapes and dtypes.

    Where a length is not known, another's is taken; each block's own call will tell.
    """
    known: dict[int, int] = {}
    for shape in (*(value.shape for value in values), hint):
        for axis, length in enumerate(shape):
            if not math.isnan(length):
                known.setdefault(axis, int(length))
    models = []
    for value in values:
        lengths = enumerate(value.shape)
        shape = [known.get(i, 0) if math.isnan(n) else n for i, n in lengths]
        models.append(np.broadcast_to(np.empty((), value.dtype), shape))
    return models


# Layers -------------------------------------------------------------------------------


def _meta(x: Any, dtype: Any) -> Any:
    """Return an empty array of the kind of x's blocks."""
    meta = x._meta
    return meta if meta.dtype == dtype else meta.astype(dtype)


def _mapped(
    label: str, function: Any, like: Any, operands: Sequence[Any], dtype: Any
) -> Any:
    """Return the Dask array of a function of operands: Dask's have like's blocks."""
    axes = tuple(range(like.ndim))
    pairs: list[Any] = []
    for operand in operands:
        pairs += [operand, axes if isinstance(operand, da.Array) else None]
    options = {"token": label, "dtype": dtype, "meta": _meta(like, dtype)}
    return da.blockwise(function, axes, *pairs, align_arrays=False, **options)


def _unified(**named: Any) -> list[Any]:
    """Return arrays of one shape as Dask's, in the same chunks.

    The blocks of a mask cannot be cut: where others' ask for that, it is unpacked.
    """
    arrays = [v.array if isinstance(v, DaskMask) else v for v in named.values()]
    lazy = [array for array in arrays if isinstance(array, da.Array)]
    is_known = not any(math.isnan(n) for array in lazy for n in array.shape)
    for i, array in enumerate(arrays):
        if not isinstance(array, da.Array):
            arrays[i] = da.from_array(
                array, lazy[0].chunks if lazy and is_known else -1
            )
    if is_known:
        axes = tuple(range(arrays[0].ndim))
        chunks, _ = da.unify_chunks(
            *(each for array in arrays for each in (array, axes))
        )
        common = tuple(chunks[axis] for axis in axes)
        for i, value in enumerate(named.values()):
            if isinstance(value, DaskMask) and value.chunks != common:
                arrays[i] = value.unpack()
        return [array.rechunk(common) for array in arrays]
    for name, array in zip(named, arrays, strict=True):
        if array.numblocks != arrays[0].numblocks:
            msg = (
                f"{name} must have known chunk sizes, or as many blocks as the other, "
                f"{arrays[0].numblocks}, got {array.numblocks}: call "
                "compute_chunk_sizes() on both"
            )
            raise ValueError(msg)
    return arrays


# Elementwise --------------------------------------------------------------------------
#
# Each does, lazily, what the call of its name does that is described in `_dispatch`.


def forward(
    function: Function, x: Any, inplace: Any, out: Any, return_mask: Any, *numbers: Any
) -> Any:
    """Return the result and, if it is asked for, its mask."""
    spec = function.spec
    want_mask = _arguments.flag("return_mask", return_mask)
    _refuse(inplace, out)
    model = _arguments.accepted("x", *_models(_read("x", x)), integers=spec.integers)
    rounded = _numbers(spec.numbers, numbers, model)
    call = functools.partial(_call, function)
    y = _mapped(spec.name, call, x, (x, want_mask, *rounded), model.dtype)
    if not want_mask:
        return y
    first, second = map(operator.itemgetter, (0, 1))
    bits = _mapped(f"{spec.name}_mask", second, x, (y,), np.dtype(np.bool_))
    y = _mapped(f"{spec.name}_result", first, x, (y,), model.dtype)
    return y, DaskMask(bits, spec.predicate)


def backward(
    function: Function, grad: Any, inplace: Any, out: Any, saved: Any, *numbers: Any
) -> Any:
    """Return the gradient."""
    spec = function.spec
    name = "x" if spec.active is None else "saved"
    _refuse(inplace, out)
    if issubclass(type(saved), (Mask, DaskMask)):
        _arguments.tells_enough(name, spec)
        _arguments.same_predicate(saved, spec.predicate)
    if issubclass(type(saved), Mask):
        saved = _arguments.unchanged(saved).unpack()
    grad, saved, given, model = _pair(grad, name, saved, integers=spec.integers)
    names = spec.numbers_kept
    rounded = _numbers(names, numbers, given)
    if spec.active is None:
        _arguments.like(name, model, "grad_output", given)
    else:
        _arguments.active(name, model, "grad_output", given)
        if spec.numbers_decide and model.dtype not in (given.dtype, np.bool_):
            # What was active is asked in saved's own dtype: each block rounds to both.
            _numbers(names, numbers, model)
            rounded = list(map(_arguments.real_number, names, numbers))
    label, call = f"{spec.name}_backward", functools.partial(_call, function)
    return _mapped(label, call, saved, (grad, saved, *rounded), given.dtype)


def _numbers(names: Sequence[str], values: Sequence[Any], model: Array) -> list[float]:
    named = zip(names, values, strict=True)
    return [_arguments.number(*each).of(model) for each in named]


def _pair(grad: Any, name: str, saved: Any, *, integers: bool = False) -> Any:
    """Return a gradient, which may be one number, and what was saved; models of both."""
    saved = _read(name, saved)
    if is_number(grad):
        (model,) = _models(saved)
        if model.dtype != np.bool_:
            model = _arguments.accepted(name, model, integers=True)
        given = _arguments.spread("grad_output", grad, model)
        (saved,) = _unified(**{name: saved})
    else:
        grad = _read("grad_output", grad)
        given, model = _models(grad, saved)
    given = _arguments.accepted("grad_output", given, integers=integers)
    if not is_number(grad) and given.shape == model.shape:
        grad, saved = _unified(**{"grad_output": grad, name: saved})
    return grad, saved, given, model


# PReLU --------------------------------------------------------------------------------


class _Weight:
    """A weight that was checked, with what gives it x's axes and takes them away."""

    def __init__(self, value: Any, x: Any, position: int) -> None:
        given, ndim = _read("weight", value), x.ndim
        if any(map(math.isnan, given.shape)):
            msg = "weight must have known chunk sizes: call its compute_chunk_sizes()"
            raise ValueError(msg)
        self.axes = range(ndim - given.ndim, ndim)  # which of x's are the weight's
        if given.ndim == 1 and given.shape != (1,) and -ndim <= position < ndim:
            self.axes = range(position % ndim, position % ndim + 1)
        lengths = dict(zip(self.axes, given.shape, strict=True))
        hint = [lengths.get(axis, 1) for axis in range(ndim)]
        (model,) = _models(x, hint=[math.nan if n == 1 else n for n in hint])
        in_memory = not (is_lazy(given) or is_on_gpu(given))
        checked, spread = _arguments.weight(
            value,
            given if in_memory else _models(given)[0],
            _arguments.accepted("x", model),
            position,
        )
        self.value = checked if in_memory else given
        self.dtype, self.spread = checked.dtype, spread.shape
        self.kept = tuple(axis for axis, size in enumerate(self.spread) if size != 1)

    def beside(self, x: Any) -> Any:
        """Return it with x's axes: in memory, if x has one block along the weight's."""
        cut = [axis for axis in self.kept if x.numblocks[axis] > 1]
        if any(math.isnan(x.shape[axis]) for axis in cut):
            msg = (
                "x must have known chunk sizes, or one block, along the axes of weight, "
                f"got shape {x.shape}: call its compute_chunk_sizes()"
            )
            raise ValueError(msg)
        if is_lazy(self.value):
            places = [slice(None) if i in self.axes else None for i in range(x.ndim)]
            value = self.value[tuple(places) if x.ndim or not self.value.ndim else 0]
        else:
            value = self.value.reshape(self.spread)
            if not cut:
                return value
            value = da.from_array(value, -1)
        chunks = enumerate(x.chunks)
        return value.rechunk([n if axis in cut else -1 for axis, n in chunks])

    def without(self, sums: Any) -> Any:
        """Return sums that have x's axes in the weight's own shape."""
        if self.value.ndim > sums.ndim:
            return sums[None]
        places = [slice(None) if i in self.axes else 0 for i in range(sums.ndim)]
        return sums[tuple(places)]


def by_channel(
    function: Function, x: Any, inplace: Any, out: Any, weight: Any, axis: Any
) -> Any:
    """Return the result."""
    position = _arguments.index("axis", axis)
    _refuse(inplace, out)
    (x,) = _unified(x=_read("x", x))
    (model,) = _models(x)
    operands = x, _Weight(weight, x, position).beside(x), position
    call = functools.partial(_call, function)
    return _mapped("prelu", call, x, operands, _arguments.accepted("x", model).dtype)


def by_channel_backward(
    function: Function,
    grad: Any,
    inplace: Any,
    out: Any,
    x: Any,
    weight: Any,
    axis: Any,
) -> Any:
    """Return both gradients: the weight's is added up in a tree that the chunks fix."""
    position = _arguments.index("axis", axis)
    _refuse(inplace, out)
    grad, x, given, model = _pair(grad, "x", x)
    _arguments.like("x", model, "grad_output", given)
    own = _Weight(weight, x, position)
    both = functools.partial(_run, functools.partial(_both, function))
    operands = grad, x, own.beside(x), position
    gradients = _mapped("prelu_backward", both, x, operands, given.dtype)
    first = operator.itemgetter(0)
    dx = _mapped("prelu_backward_input", first, x, (gradients,), given.dtype)
    rounded = functools.partial(_rounded, own.dtype)
    options = {"dtype": own.dtype, "meta": _meta(x, own.dtype)}
    spread = tuple(axis for axis in range(x.ndim) if axis not in own.kept)
    if spread:
        options |= {"axis": spread, "keepdims": True, "concatenate": False}
        options |= {"combine": _added, "split_every": _BRANCHES}
        sums = da.reduction(gradients, _sums_of, rounded, **options)
    else:
        sums = _mapped("prelu_backward_weight", rounded, x, (gradients,), own.dtype)
    return dx, own.without(sums)


_BRANCHES = 16  # of a node of the tree, at most


def _both(function: Function, grad: Array, x: Array, weight: Array, axis: int) -> Any:
    """Return the gradient towards a block, and sums in the type they are formed in."""
    if is_number(grad):
        grad = _arguments.spread("grad_output", grad, x)
    if not is_on_gpu(x):
        return _dispatch.prelu_backward_exactly(function.spec, grad, x, weight, axis)
    # There they come in the weight's type, which may be wider than half floats.
    wide = weight.astype("float32") if weight.dtype.itemsize == 2 else weight
    return function.call(grad, False, None, x, wide, axis)


def _sums_of(both: Any, axis: Any, keepdims: bool) -> Array:
    """Return a block's sums, and their errors, which the engine has added to them."""
    return np.stack([both[1], np.zeros_like(both[1])])


def _added(parts: Any, axis: Any, keepdims: bool) -> Array:
    """Return the compensated sums of nested lists of them."""
    with np.errstate(all="ignore"):
        return added_up(np.stack([*flatten(parts, container=list)], 1), [0])


def _rounded(to: Any, parts: Any, axis: Any = (), keepdims: bool = True) -> Array:
    """Return sums as the weight's gradient."""
    if type(parts) is tuple:
        parts = [_sums_of(parts, axis, keepdims)]
    with np.errstate(all="ignore"):
        total, errors = _added(parts, axis, keepdims)
        # Past an infinity or a NaN the errors are NaN and say nothing.
        return rounded(np.where(np.isfinite(total), total + errors, total), to)


# Randomised leaky ReLU ----------------------------------------------------------------


def slopes(x: Any, lower: float, upper: float, rng: Any) -> Any:
    """Return a slope for each element: a seed and the chunks fix them."""
    model = _arguments.accepted("x", *_models(_read("x", x)))
    words = _arguments.generator(rng).integers(0, 1 << 32, 4, np.uint32).tolist()
    draw = functools.partial(rrelu_slopes, lower, upper, words)
    options = {"dtype": model.dtype, "meta": _meta(x, model.dtype)}
    return da.map_blocks(draw, x, **options)


def rrelu_slopes(
    lower: float, upper: float, words: list[int], x: Array, block_id: tuple[int, ...]
) -> Array:
    """Draw a block's slopes from a generator of its own.  The layer has this name."""
    seed = np.random.SeedSequence(words, spawn_key=block_id)
    engine = _dispatch.engine_of(x)
    random = (np if engine is cpu else sys.modules["cupy"]).random
    (given,) = _arguments.read(engine, ("x", x))
    drawn = engine.uniform(given, lower, upper, random.default_rng(seed))
    return engine.as_came(drawn, x)


def by_element(function: Function, x: Any, inplace: Any, out: Any, slopes: Any) -> Any:
    """Return the result."""
    _refuse(inplace, out)
    x, slopes = _read("x", x), _read("slopes", slopes)
    model, other = _models(x, slopes)
    model = _arguments.accepted("x", model)
    _arguments.like("slopes", other, "x", model)
    operands = _unified(x=x, slopes=slopes)
    call = functools.partial(_call, function)
    return _mapped("rrelu", call, operands[0], operands, model.dtype)


def by_element_backward(
    function: Function, grad: Any, inplace: Any, out: Any, x: Any, slopes: Any
) -> Any:
    """Return the gradient."""
    _refuse(inplace, out)
    operands = {"grad_output": grad, "x": x, "slopes": slopes}
    arrays = operands.copy()
    if is_number(grad):
        del arrays["grad_output"]
    if _arguments.is_scalar(slopes):
        del arrays["slopes"]
    arrays = {name: _read(name, value) for name, value in arrays.items()}
    models = dict(zip(arrays, _models(*arrays.values()), strict=True))
    given = models.get("grad_output")
    if given is None:
        given = _arguments.spread("grad_output", grad, models["x"])
    given = _arguments.accepted("grad_output", given)
    for name, model in models.items():
        _arguments.like(name, model, "grad_output", given)
    operands |= zip(arrays, _unified(**arrays), strict=True)
    if "slopes" not in arrays:
        (operands["slopes"],) = _numbers(["slopes"], [slopes], given)
    call, each = functools.partial(_call, function), list(operands.values())
    return _mapped("rrelu_backward", call, operands["x"], each, given.dtype)
