"""How functions become machine code, where it is kept, and how it calls C."""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import pickle
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastrelu._digest import digest, settings, sources, user_folder
from fastrelu._functions import rebuild
from fastrelu.cpu import abi, shield
from fastrelu.cpu.abi import (
    CFunc,
    CompilerBase,
    CompileResult,
    CPUDispatcher,
    FixupArgs,
    IRLegalization,
    IRProcessing,
    JITCodeLibrary,
    Lower,
    NativeLowering,
    NoPythonBackend,
    NopythonTypeInference,
    PassManager,
    PreLowerStripPhis,
    ReconstructSSA,
    TranslateByteCode,
    cgutils,
    config,
    create_new_module_pass_manager,
    parse_dtype,
    populate_array,
    register_pass,
    serialize,
    sigutils,
)

Function = Callable[..., Any]
T = TypeVar("T")


def shielded(function: Function) -> Function:
    """Make a function one that compiles, as in `shield`; what fails there is unproven.

    It relies on what Numba does not promise.
    """

    @functools.wraps(function)
    def compiles(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (MemoryError, abi.Unproven):
            raise
        except Exception as error:
            msg = f"{type(error).__name__}: {error}"
            raise abi.Unproven(msg) from error

    return shield.shielded(compiles)


class _Library(JITCodeLibrary):  # type: ignore[misc]
    """Code that is no use before others have taken it in, and is optimised there.

    Only what chooses between two values must be a select before: a branch would draw in
    the load of a value that one side needs.  That load would wait for what decides, and
    where none can be under a mask (SSE, NEON), the loop would be scalar code.
    """

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout
        passes = create_new_module_pass_manager()
        passes.add_sroa_pass()
        passes.add_simplify_cfg_pass()
        passes.run(ll_module, self._codegen._pass_builder())

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True


class _Lower(Lower):  # type: ignore[misc]
    """Have no value for an inlined function.

    Numba's is its address, which ties code to a process wherever LLVM does not take it
    out, as with NUMBA_OPT=0.
    """

    def lower_assign(self, type_: Any, inst: Any) -> Any:
        if isinstance(getattr(type_, "dispatcher", None), _Inlined):
            return self.context.get_dummy_value()
        return super().lower_assign(type_, inst)


@register_pass(mutates_CFG=True, analysis_only=False)
class _Lowering(NativeLowering):  # type: ignore[misc]
    """Count no references: the arrays here own nothing."""

    _name = "fastrelu_lowering"
    lowering_class = _Lower

    def run_pass(self, state: Any) -> bool:
        state.targetctx = state.targetctx.subtarget(enable_nrt=False)
        super().run_pass(state)
        return True


@register_pass(mutates_CFG=True, analysis_only=False)
class _LoweringToLLVM(_Lowering):
    """Stop at LLVM's language: machine code would be a third of the time."""

    _name = "fastrelu_lowering_to_llvm"

    def run_pass(self, state: Any) -> bool:
        state.flags.no_compile = True
        state.library = _Library(state.targetctx.codegen(), state.func_id.func_qualname)
        super().run_pass(state)
        # Numba knows a function by its wrapper: a built-in function, for this one alone,
        # that refuses whatever it is called with.
        wrapper, compiled = object().__format__, state.cr
        state.targetctx.insert_user_function(wrapper, compiled.fndesc, [state.library])
        state.cr = compiled._replace(cfunc=wrapper)
        return True


class _Compiler(CompilerBase):  # type: ignore[misc]
    """Numba's passes, without those that look for what our functions do not have.

    That is closures, branches on a type, `with`, expressions of whole arrays: a fifth of
    the time.
    """

    lowering = _Lowering

    def define_pipelines(self) -> list[Any]:
        passes = PassManager("fastrelu")
        for each in (
            TranslateByteCode,
            FixupArgs,
            IRProcessing,
            ReconstructSSA,
            NopythonTypeInference,
            PreLowerStripPhis,
            IRLegalization,
            self.lowering,
            NoPythonBackend,
        ):
            passes.add_pass(each, each.__name__)
        passes.finalize()
        return [passes]


class _CompilerToLLVM(_Compiler):
    lowering = _LoweringToLLVM


class _Inlined(CPUDispatcher):  # type: ignore[misc]
    """A function that is compiled once for all numbers of a type.

    Numba would do it again for each number that its callers write out.
    """

    def get_call_template(self, args: Any, kws: Any) -> Any:
        return super().get_call_template(tuple(map(types.unliteral, args)), kws)


def inlined(function: Function) -> Any:
    """Compile what other compiled functions take in.

    Nobody else calls it, so that it needs no wrappers and no machine code of its own.
    """
    options = {
        "nopython": True,
        "boundscheck": None,  # as Numba is told
        "forceinline": True,
        "error_model": "numpy",
        "no_cpython_wrapper": True,
        "no_cfunc_wrapper": True,
    }
    return _Inlined(function, targetoptions=options, pipeline_class=_CompilerToLLVM)


# Numba makes a function of `min` and `max` for each type, which takes its time, and it
# makes none where NUMBA_DISABLE_JIT is set, as by people who debug kernels of their own.


@inlined
def smaller(a: int, b: int) -> int:
    """Return the smaller of two integers."""
    return a if a < b else b  # noqa: FURB136


@inlined
def larger(a: int, b: int) -> int:
    """Return the larger of two integers."""
    return a if a > b else b  # noqa: FURB136


# What is kept on the disk -------------------------------------------------------------

SOURCES = sources(__package__)  # before anybody can change them


def _name_of_copy() -> str:
    """Return a name that no other copy of this package has in this process.

    LLVM knows what it is told of by its name alone.
    """
    names = (f"{__name__}.{number}" for number in itertools.count())
    name = next(name for name in names if not llvm.address_of_symbol(name))
    llvm.add_symbol(name, 1)
    return name


COPY = _name_of_copy()


def compile_and_keep(function: Function, signature: Any) -> Any:
    """Compile what C code calls, and keep its code on the disk.

    Its name there and its name to LLVM say all that it is made of.
    """
    signature = sigutils.normalize_signature(signature)
    made_of = COPY, settings(), SOURCES, signature, function
    name = digest(*made_of) if SOURCES else None
    named = rebuild(function, f"{function.__name__}_{(name or uuid.uuid4().hex)[:16]}")
    options = {"error_model": "numpy"}
    result: Any = CFunc(named, signature, {}, options, pipeline_class=_Compiler)
    if name is not None:
        result._cache = _Cache(named.__name__, name, made_of)
    result.compile()
    return result


def _folders() -> Iterator[Path]:
    """Return where machine code may be kept, the best place first."""
    if config.CACHE_DIR:
        yield Path(config.CACHE_DIR) / "fastrelu"
        return
    yield Path(__file__).parent / "__pycache__"  # which cannot be in an archive
    with contextlib.suppress(RuntimeError):  # not every user has a home
        yield user_folder()


class _Cache:
    """The machine code of one function: a file that tells whether it is whole.

    Whatever is wrong with the disk, the function is compiled.  Numba's own files are an
    index and what it numbers: two processes that start at once may give two functions
    one number, and a damaged file raises or crashes.
    """

    def __init__(self, name: str, digest: str, made_of: tuple[Any, ...]) -> None:
        self.name, self.digest, self.made_of = name, digest, made_of

    def _file(self, codegen: Any) -> tuple[str, bytes]:
        """Return a file's name, and what its content is checked with."""
        key = repr((self.digest, codegen.magic_tuple())).encode()
        return f"{self.name}.{hashlib.blake2s(key).hexdigest()[:16]}.nbc", key

    def load_overload(self, signature: Any, context: Any) -> Any:
        """Return what was saved, or None.

        Numba would first load all that it compiles with, SciPy too where it is installed,
        a third of a second at the start of each process.
        """
        name, key = self._file(context.codegen())
        for folder in _folders():
            with contextlib.suppress(Exception):
                content = (folder / name).read_bytes()
                check, data = content[:32], content[32:]
                if check == hashlib.blake2s(key + data).digest():
                    return CompileResult._rebuild(context, *pickle.loads(data))
        return None

    def save_overload(self, signature: Any, result: Any) -> None:
        """Write a new file and put it in the old one's place."""
        if result.library.has_dynamic_globals or digest(*self.made_of) != self.digest:
            return  # it holds addresses, or was made of something else
        name, key = self._file(result.codegen)
        data = serialize.dumps(_reduced(result))
        data = hashlib.blake2s(key + data).digest() + data
        for folder in _folders():
            with contextlib.suppress(OSError):
                folder.mkdir(parents=folder.name == "fastrelu", exist_ok=True)
                new = folder / f"{name}.{uuid.uuid4().hex}"
                try:
                    new.write_bytes(data)
                    new.replace(folder / name)
                finally:
                    new.unlink(missing_ok=True)
                return


def _reduced(result: Any) -> Any:
    """Return what is to be pickled, without what no loop has a use for.

    That is LLVM's code, which no other function takes in, and the environments of what
    the loop has taken in, where these hold nothing.  Both took longer than all else of a
    load.
    """
    (name, kind, (code, _)), *rest, environments = result._reduce()
    # Numba asks LLVM's code for one thing: whether the function is there.
    function = result.fndesc.llvm_cfunc_wrapper_name
    module = llvm.parse_assembly(f'define void @"{function}"() {{ ret void }}')
    used = tuple(each for each in environments if each.consts)
    return (name, kind, (code, module.as_bitcode())), *rest, used


# Addresses ----------------------------------------------------------------------------


def pointer_to(type_: types.Type) -> Any:
    """Return an intrinsic that makes a pointer to this type of an address."""

    @intrinsic  # type: ignore[untyped-decorator]
    def at(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(type_))

        return type_(types.int64), codegen

    return at


@intrinsic  # type: ignore[untyped-decorator]
def array_at(typingctx: Any, address: Any, size: Any, dtype: Any) -> Any:
    """Return what lies at an address as a flat array.

    That is Numba's `carray`, but no function to compile for each type.
    """
    type_ = types.Array(parse_dtype(dtype), 1, "C")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], cgutils.voidptr_t)
        return new_array(context, builder, type_, pointer, args[1])

    return type_(types.int64, types.intp, dtype), codegen


@intrinsic  # type: ignore[untyped-decorator]
def piece(typingctx: Any, array: Any, start: Any, stop: Any) -> Any:
    """Return array[start:stop] of a flat array that has all of it.

    A slice, whose ends may lie anywhere, is several times the code.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(array)(context, builder, args[0]).data
        size = builder.sub(args[2], args[1])
        return new_array(context, builder, array, builder.gep(data, [args[1]]), size)

    return array(array, types.intp, types.intp), codegen


def _item(number: int) -> Any:
    """Return an intrinsic for an item of a tuple.

    Numba's counts a reference to it, once others have had anything compiled for the disk.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def item(typingctx: Any, values: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.extract_value(args[0], number)

        return values.types[number](values), codegen

    return item


first_of, second_of, third_of = _item(0), _item(1), _item(2)


def new_array(
    context: Any, builder: Any, type_: types.Array, pointer: Any, size: Any
) -> Any:
    """Return code for a flat array of this kind and size that starts at a pointer."""
    array = context.make_array(type_)(context, builder)
    itemsize = context.get_abi_sizeof(context.get_data_type(type_.dtype))
    stride = context.get_constant(types.intp, itemsize)
    data = builder.bitcast(pointer, array.data.type)
    populate_array(array, data, [size], [stride], stride, meminfo=None)
    return array._getvalue()


def calling(signature: Any) -> Any:
    """Return an intrinsic that calls the C function of a signature at an address."""

    @intrinsic  # type: ignore[untyped-decorator]
    def call(typingctx: Any, address: Any, values: Any) -> Any:
        def codegen(context: Any, builder: Any, _: Any, args: Any) -> Any:
            operands = [context.get_value_type(type_) for type_ in signature.args]
            result = context.get_value_type(signature.return_type)
            if signature.return_type == types.void:
                result = ir.VoidType()
            function = ir.FunctionType(result, operands).as_pointer()
            returned = builder.call(
                builder.inttoptr(args[0], function),
                cgutils.unpack_tuple(builder, args[1]),
            )
            if signature.return_type == types.void:
                return context.get_dummy_value()
            return returned

        return signature.return_type(types.int64, types.Tuple(signature.args)), codegen

    return call


# Python's C interface -----------------------------------------------------------------

_new_function = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.POINTER(abi.Method), ctypes.py_object, ctypes.c_void_p
)(("PyCFunction_NewEx", ctypes.pythonapi))


def built_in(compiled: Any, table: Any) -> Any:
    """Return compiled code as a function of Python that finds its table in `self`."""
    method = abi.Method(b"call", compiled.address, abi.METH_FASTCALL, None)
    keep_for_ever((compiled, method, table))
    return _new_function(method, table, None)


def keep_for_ever(value: T) -> T:
    """Return a value that also lives on while the interpreter ends."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
    return value
