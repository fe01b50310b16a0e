"""The cache: what code is made of is in its name, and where it lies on the disk."""

import enum
import functools
import importlib
import importlib.util
import math
import sys
import types
import zipfile
from pathlib import Path

import numba
import numpy as np
import pytest
from llvmlite import ir
from numba.extending import intrinsic
from test_paths import LOOPS, assembly
from test_threads import run

from fastrelu import _digest
from fastrelu._digest import digest, sources
from fastrelu.cpu import build, calls, handler, jit, threads, vector

# What each makes of a limit is called as formula(x).
FORMULAS = {
    "a global": """
LIMIT = {limit}
def formula(x):
    return x if x < LIMIT else type(x)(LIMIT)
""",
    "a closure": """
def below(limit):
    def formula(x):
        return x if x < limit else type(x)(limit)
    return formula
formula = below({limit})
""",
    "a helper's global": """
LIMIT = {limit}
@numba.njit
def clip(x):
    return x if x < LIMIT else type(x)(LIMIT)
def formula(x):
    return clip(x)
""",
    "a helper's default": """
@numba.njit
def clip(x, limit={limit}):
    return x if x < limit else type(x)(limit)
def formula(x):
    return clip(x)
""",
    "an array": """
LIMITS = np.array([{limit}])
def formula(x):
    return x if x < LIMITS[0] else type(x)(LIMITS[0])
""",
}


def test_a_limit_that_was_changed(tmp_path):
    """Yesterday's code would still clip at 6; where that cannot be told, none is kept."""
    script = f"""
    import os, numba, numpy as np
    from fastrelu._spec import ARRAY, Operation
    from fastrelu.cpu import build, vector, loops
    x = np.arange(9, dtype=np.float32)
    def limit_of(source):
        names, y = {{"numba": numba, "np": np}}, np.empty_like(x)
        exec(source, names)
        operation = Operation(names["formula"], (ARRAY,))
        loop = build.compiled(loops.plain, operation, vector.format_of(x.dtype))
        words = np.zeros(loops.LENGTH, np.int64)
        words[[loops.ARRAYS, loops.Y, loops.SIZE]] = x.ctypes.data, y.ctypes.data, 9
        loop.ctypes(words.ctypes.data)
        return y.max()
    for what, source in {FORMULAS!r}.items():
        print(what, limit_of(source.format(limit=6)), limit_of(source.format(limit=5)))
    """
    lines = run(script, NUMBA_CACHE_DIR=str(tmp_path)).splitlines()
    assert lines == [f"{what} 6.0 5.0" for what in FORMULAS]
    assert len(list(tmp_path.rglob("*.nbc"))) == 2 * (len(FORMULAS) - 1)


# Values -------------------------------------------------------------------------------

STRUCTURE = ir.Context().get_identified_type("s")
DIFFERENT = [
    None,
    ...,
    True,
    1,
    1.0,
    1 + 0j,
    0.0,
    -0.0,
    math.nan,
    -math.nan,
    "1",
    b"1",
    (),
    (1,),
    ((1,),),
    ("module", "math"),
    frozenset({1, "1"}),
    frozenset({1}),
    slice(1),
    slice(1, 2),
    math,
    math.exp,
    np.exp,
    np.float32,
    np.float32(1),
    np.float64(1),
    np.int64(1),
    np.dtype("f4"),
    np.dtype("i4"),
    len,
    int,
    functools.partial,
    functools.wraps,
    numba.types.int64,
    numba.types.Array(numba.types.int64, 1, "C"),
    numba.types.Array(numba.types.int64, 1, "A"),
    numba.types.ExternalFunction("f", numba.types.int64()),
    numba.types.ExternalFunction("f", numba.types.int64(numba.types.int64)),
    numba.types.int64(),
    numba.types.void(),
    ir.IntType(64),
    ir.IntType(64).as_pointer(),
    ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), "nop", ""),
    ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), "hlt", ""),
    ir.InlineAsm(ir.FunctionType(ir.VoidType(), [ir.IntType(8)]), "hlt", "r"),
]


def test_values_that_differ():
    names = [digest(value) for value in DIFFERENT]
    assert None not in names
    assert len({*names}) == len(names)
    assert names == [digest(value) for value in DIFFERENT]


class Colour(enum.IntEnum):
    RED = 1


Pair = type("Pair", (tuple,), {})


@pytest.mark.parametrize(
    "value",
    [
        object(),
        [1],
        {1: 2},
        {1},
        np.zeros(2),
        np.dtype([("a", "i4")]),
        np.dtype(">f4"),
        np.void(b"12"),
        Colour.RED,
        Colour,
        Pair((1, 2)),
        np.frompyfunc(abs, 1, 1),
        type("float32", (), {"__module__": "numpy"}),
        STRUCTURE,
        numba.types.Dispatcher(numba.njit(lambda: 1)),
        type("Own", (numba.types.Opaque,), {"__module__": "host"})("own"),
        [].append,
    ],
)
def test_values_that_cannot_be_known(value):
    assert digest(value) is None
    assert digest((1, value)) is None


# Functions ----------------------------------------------------------------------------


def made(source, **names):
    """The function f of a source text, in globals of its own"""
    globals_ = {"numba": numba, "intrinsic": intrinsic, "np": np, **names}
    exec(source, globals_)  # noqa: S102 - it is our own
    return globals_["f"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("def f(x): return x + 1", "def f(x): return x - 1"),
        ("def f(x): return x + 1", "def f(x): return x + 2"),
        ("def f(x): return x + 1", "def f(x): return x + 1.0"),
        ("def f(x): return x.real", "def f(x): return x.imag"),
        ("def f(x, y=1): return x", "def f(x, y=2): return x"),
        ("def f(x, *, y=1): return x", "def f(x, *, y=2): return x"),
        ("def f(x): return lambda: x + 1", "def f(x): return lambda: x + 2"),
        ("a = 1\ndef f(x): return lambda: a", "a = 2\ndef f(x): return lambda: a"),
        ("def f(x, y): return x", "def f(x, y): return y"),
        (
            "def g(): return 1\ndef f(x): return g()",
            "def g(): return 2\ndef f(x): return g()",
        ),
        ("a = 1, 2\ndef f(x): return a[0]", "a = 1, 3\ndef f(x): return a[0]"),
        ("a = np.int8(1)\ndef f(x): return a", "a = np.int8(2)\ndef f(x): return a"),
        (
            "@intrinsic\ndef g(t):\n return lambda: a\na = 1\ndef f(x): return g()",
            "@intrinsic\ndef g(t):\n return lambda: a\na = 2\ndef f(x): return g()",
        ),
        (
            "@numba.njit\ndef f(x): return x + x",
            "@numba.njit(fastmath=True)\ndef f(x): return x + x",
        ),
        (
            "@intrinsic\ndef f(t, x): return 1",
            "@intrinsic(prefer_literal=True)\ndef f(t, x): return 1",
        ),
    ],
)
def test_functions_that_differ(one, other):
    names = [digest(made(source)) for source in (one, one, other)]
    assert None not in names
    assert names[0] == names[1] != names[2]


def test_what_changes_between_two_looks():
    """In globals, cells and defaults, at any depth, and is there again later."""
    settings = types.ModuleType("settings")
    settings.LIMIT, settings.inner = 1, types.ModuleType("inner")
    source = """
def outer(limit):
    def g(x, y=1, *, z=2):
        return a + limit + settings.LIMIT + settings.inner.DEEP
    return g, lambda value: [value := value]
g, _ = outer(3)
def f(x):
    return g(x)
"""
    f = made(source, a=1, settings=settings)
    g = f.__globals__["g"]
    seen = [digest(f)]

    def look():
        assert digest(f) == digest(f)
        seen.append(digest(f))

    f.__globals__["a"] = 2
    look()
    g.__closure__[0].cell_contents = 4
    look()
    g.__defaults__ = (2,)
    look()
    g.__kwdefaults__["z"] = 3
    look()
    settings.LIMIT = 2
    look()
    settings.inner.DEEP = 2
    look()
    g.__code__ = made("def f(limit):\n def g(): return limit\n return g")(1).__code__
    look()
    assert None not in seen
    assert len({*seen}) == len(seen)
    f = made(source, a=1, settings=settings)
    before = digest(f)
    f.__globals__["a"] = []
    assert digest(f) is None
    f.__globals__["a"] = 1
    assert digest(f) == before


def test_what_is_not_there():
    """An open name, and a cell that nothing was put into yet."""
    f = made("def f(x): return nowhere(x)")
    before = digest(f)
    assert before is not None
    f.__globals__["nowhere"] = len
    assert digest(f) not in (None, before)
    source = (
        "def outer():\n def g(): return later\n {}\n return g\n later = 1\nf = outer()"
    )
    empty, full = (digest(made(source.format(s))) for s in ("pass", "later = 1"))
    assert None not in (empty, full)
    assert empty != full


def test_functions_that_call_each_other():
    source = (
        "def g(x): return f(x - 1)\ndef h(x): return {}\ndef f(x): return g(x) + h(x)"
    )
    first, again, other = (made(source.format(k)) for k in ("f(1)", "f(1)", "f(2)"))
    assert digest(first) == digest(again) != digest(other)
    assert None not in (digest(first), digest(other))
    names = [digest(each.__globals__["g"]) for each in (first, again, other)]
    assert None not in names
    assert names[0] == names[1] != names[2]
    inner = "def g(x): return f(x)\ndef f(x): return g(x)"
    outer = "def g(x): return f(x)\ndef f(x): return g(x) + h(x)"
    around = made(outer + "\ndef h(x): return g(x)")
    beside = made(outer, h=made(inner))  # which has a g of its own
    assert digest(around) != digest(beside)
    first.__globals__["h"] = other.__globals__["h"]
    assert digest(first) not in (digest(again), None)


def test_a_compiled_function_stays_what_it_was():
    """Numba takes no notice of a global that changes, so that both cannot be told."""
    f = made("@numba.njit\ndef g(): return a\ndef f(x): return g()", a=1)
    before = digest(f)
    f.__globals__["a"] = 2
    assert digest(f) is None
    f.__globals__["a"] = 1
    assert digest(f) == before


def test_a_module_that_makes_what_it_is_asked_for():
    lazy = types.ModuleType("lazy")
    f = made("def f(x): return lazy.LIMIT", lazy=lazy)
    assert digest(f) is not None
    lazy.__getattr__ = lambda name: 6
    assert digest(f) is None


def test_a_library_goes_by_its_version(monkeypatch):
    f = made("def f(x): return np.exp(x) + numba.config.LIMIT", numba=numba)
    before = digest(f)
    assert before is not None
    monkeypatch.setattr(numba.config, "LIMIT", 1, raising=False)
    assert digest(f) != before
    monkeypatch.undo()
    assert digest(f) == before
    for module in (np, numba, _digest.llvmlite):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__version__", "0.0")
            assert digest(f) != before
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version", "0.0")
        assert digest(f) != before
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["fastrelu"], "__version__", "0.0")
        assert digest(f) != before
    with monkeypatch.context() as patch:
        patch.setattr(_digest, "__name__", "vendor.fastrelu._digest")
        assert digest(f) != before


def test_all_that_is_compiled_is_known(monkeypatch):
    """Or each process would compile it again; the machine's caches are a part of it."""
    for fmt in (vector.format_of(np.dtype(code)) for code in "efdbHQ"):
        for body, operation in LOOPS.values():
            for target in build.TARGETS:
                bound = build.bound(body, operation, fmt, target)
                assert digest(bound) is not None, (body, fmt.name, target)
    for function in (calls.call, calls.call_sums):
        before = digest(function)
        with monkeypatch.context() as patch:
            patch.setattr(threads, "SHARE", 12345)
            assert before is not None
            assert digest(function) != before


@pytest.mark.parametrize("name", ["OPT", "BOUNDSCHECK", "LOOP_VECTORIZE"])
def test_settings_of_numba_that_make_another_code(name, monkeypatch):
    before = _digest.settings()
    monkeypatch.setattr(jit.config, name, 12345)
    assert _digest.settings() != before


# Sources ------------------------------------------------------------------------------


def package(folder, text, name):
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").touch()
    (folder / name / "a.py").write_text(text)
    return folder


def sources_at(place, name, monkeypatch):
    importlib.invalidate_caches()
    with monkeypatch.context() as patch:
        patch.syspath_prepend(place)
        importlib.import_module(name)
        found = sources(name)
        del sys.modules[name]
    return found


def test_sources_of_a_folder_an_archive_and_bytecode_alone(tmp_path, monkeypatch):
    import compileall

    name, found = "some_package_to_digest", []
    for number, text in enumerate(("x = 1", "x = 2")):
        folder = package(tmp_path / f"folder {number}", text, name)
        found.append(sources_at(folder, name, monkeypatch))
        archive = tmp_path / f"{number}.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for path in sorted(folder.rglob("*.py")):
                file.write(path, path.relative_to(folder))
        assert sources_at(archive, name, monkeypatch) == found[-1]
        compileall.compile_dir(folder, quiet=1, legacy=True)
        for path in folder.rglob("*.py"):
            path.unlink()
        found.append(sources_at(folder, name, monkeypatch))
    assert None not in found
    assert len({*found}) == 4


@pytest.mark.parametrize("without", ["a path", "modules", "a loader", "data"])
def test_sources_that_nobody_has(without, tmp_path, monkeypatch):
    name = "some_package_to_digest"
    package(tmp_path, "x = 1", name)
    module = types.ModuleType(name)
    module.__spec__ = importlib.util.spec_from_loader(name, None)
    monkeypatch.setitem(sys.modules, name, module)
    if without != "a path":
        module.__path__ = [str(tmp_path / ("" if without == "modules" else name))]
    if without == "modules":
        module.__path__ = [str(Path(tmp_path, "nothing"))]
    if without == "a loader":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    if without == "data":
        (tmp_path / name / "a.py").unlink()
        (tmp_path / name / "a.py").mkdir()
        (tmp_path / name / "b.py").touch()
        (tmp_path / name / "b.py").chmod(0)
        real = importlib.util.find_spec

        def found(each):
            spec = real(each)
            spec.origin = str(tmp_path / "gone")
            return spec

        monkeypatch.setattr(importlib.util, "find_spec", found)
    assert sources(name) is None


# On the disk --------------------------------------------------------------------------


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A cache in a folder of its own, and how to save in it and to load from it"""

    monkeypatch.setattr(jit.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(jit, "_reduced", lambda result: result.data)
    rebuilt = types.SimpleNamespace(_rebuild=lambda context, *data: data)
    monkeypatch.setattr(jit, "CompileResult", rebuilt)

    class Kept:
        made_of, library = ["a part"], types.SimpleNamespace(has_dynamic_globals=False)
        processor = types.SimpleNamespace(magic_tuple=lambda: ("processor",))

        def cache(self):
            made_of = tuple(self.made_of)
            return jit._Cache("loop", jit.digest(*made_of), made_of)

        def save(self, data):
            codegen, library = self.processor, self.library
            result = types.SimpleNamespace(data=data, library=library, codegen=codegen)
            self.cache().save_overload((), result)

        def load(self):
            context = types.SimpleNamespace(codegen=lambda: self.processor)
            return self.cache().load_overload((), context)

    return Kept()


def test_a_damaged_file_is_not_believed(kept, tmp_path):
    assert kept.load() is None
    data = tuple(range(50))
    kept.save(data)
    assert kept.load() == data
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    for place, byte in enumerate(whole):
        file.write_bytes(whole[:place] + bytes([byte ^ 1]) + whole[place + 1 :])
        assert kept.load() is None
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert kept.load() is None
    kept.made_of = ["another part"]
    kept.save(data)
    other = next(path for path in files(tmp_path) if path != file)
    other.write_bytes(whole)  # under a name that is not its own
    assert kept.load() is None


def test_code_for_another_processor(kept, tmp_path):
    kept.save((1,))
    kept.processor = types.SimpleNamespace(magic_tuple=lambda: ("another",))
    assert kept.load() is None
    kept.save((2,))
    assert kept.load() == (2,)
    assert len(files(tmp_path)) == 2


def test_what_is_not_kept(kept, tmp_path, monkeypatch):
    """Code with addresses in it, and what was changed while it was compiled."""
    kept.library = types.SimpleNamespace(has_dynamic_globals=True)
    kept.save((1,))
    kept.library = types.SimpleNamespace(has_dynamic_globals=False)
    cache = kept.cache()
    cache.made_of = ("changed",)
    monkeypatch.setattr(kept, "cache", lambda: cache)
    kept.save((1,))
    assert files(tmp_path) == []
    (tmp_path / "file").touch()
    monkeypatch.undo()
    monkeypatch.setattr(jit, "_folders", lambda: [tmp_path / "file" / "below"])
    monkeypatch.setattr(jit, "_reduced", lambda result: result.data)
    kept.save((1,))
    assert files(tmp_path) == [tmp_path / "file"]


def test_where_code_is_kept(monkeypatch, tmp_path):
    """In the folder that was named, or beside the source, or in the user's."""
    monkeypatch.setattr(jit.config, "CACHE_DIR", "")
    beside = Path(jit.__file__).parent / "__pycache__"
    for platform, name in (("linux", "XDG_CACHE_HOME"), ("win32", "LOCALAPPDATA")):
        with monkeypatch.context() as patch:
            patch.setattr(_digest, "sys", types.SimpleNamespace(platform=platform))
            patch.setenv(name, str(tmp_path))
            assert [*jit._folders()] == [beside, tmp_path / "fastrelu"]

    def no_home():
        raise RuntimeError

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(_digest, "sys", types.SimpleNamespace(platform="linux"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "home", lambda: tmp_path)
        assert [*jit._folders()] == [beside, tmp_path / ".cache" / "fastrelu"]
        patch.setattr(Path, "home", no_home)
        assert [*jit._folders()] == [beside]
    monkeypatch.setattr(jit.config, "CACHE_DIR", str(tmp_path))
    assert [*jit._folders()] == [tmp_path / "fastrelu"]


@pytest.mark.parametrize("target", [build.PLAIN, build.PAST_CACHE])
@pytest.mark.parametrize("which", ["to_bits", "from_bits"])
def test_loops_that_no_disk_has(which, target):
    """Others find them on the disk, and what Numba is extended by does not run."""
    assert assembly(*LOOPS[which], np.float16, target)


def test_all_else_that_no_disk_has(monkeypatch):
    monkeypatch.setattr(jit, "_folders", tuple)
    word = numba.int64
    team = {
        threads._share: numba.void(*[word] * 5),
        **dict.fromkeys((threads._member, threads._join), numba.void(word)),
    }
    for function, signature in {**team, **handler._SIGNATURES}.items():
        assert jit.compile_and_keep(function, signature).address
