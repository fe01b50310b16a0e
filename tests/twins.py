"""What is compiled, as the Python that it is.

Templates are Python; what they need of the compiler has a twin here, on the same memory.
So the kernels run line by line, every index checked by NumPy, with no compiler between.
"""

import ctypes
import dataclasses
import functools
import random
import weakref

import numpy as np
from numba.core.types import ExternalFunction
from numba.extending import _Intrinsic

from fastrelu import _dispatch, activations
from fastrelu.cpu import (
    blocks,
    build,
    calls,
    fast,
    halves,
    handler,
    loops,
    objects,
    portable,
    quick,
    sums,
    threads,
    vector,
    walk,
)
from fastrelu.cpu.jit import rebuild


def public_functions():
    """What stands behind the public functions"""
    for value in vars(activations).values():
        if isinstance(value, _dispatch._Function):
            yield value


def quick_calls():
    """The quick calls of all of them"""
    for function in public_functions():
        yield function.quick


# A formula and a predicate of two numbers, which no activation has, as plain Python.


def clipped(x, low, high):
    y = high if x >= high else x  # noqa: FURB136 - min() would lose a NaN
    return low if x <= low else y


def within(x, low, high):
    return x > low and x < high


# Memory -------------------------------------------------------------------------------


def array_at(address, size, dtype):
    dtype = np.dtype(dtype if isinstance(dtype, type) else str(dtype))
    memory = (ctypes.c_char * (size * dtype.itemsize)).from_address(int(address))
    return np.frombuffer(memory, dtype)


def piece(array, start, stop):
    assert 0 <= start <= stop <= array.size
    return array[start:stop]


def buffer(number, element=None):
    """Memory that nobody has written to"""

    def space(like):
        dtype = np.dtype(element or like.dtype)
        return np.full(number * dtype.itemsize, 0xA5, np.uint8).view(dtype)

    return space


def words_of(kind, size=8):
    number = type(kind().value)

    class Words:
        def __init__(self, address):
            self.address = int(address)

        def __getitem__(self, i):
            return kind.from_address(self.address + size * int(i)).value

        def __setitem__(self, i, value):
            kind.from_address(self.address + size * int(i)).value = number(value)

    return Words


# Vectors ------------------------------------------------------------------------------


def put_word(bits, place, word):
    bits[8 * place :][:8] = np.frombuffer(np.uint64(word).tobytes(), np.uint8)


def pack(flags):
    assert flags.size == loops.STRIP
    assert flags.max() <= 1
    return np.packbits(flags, bitorder="little").view(np.uint64)[0]


def unpack(bits, flags, words):
    flags[: words * loops.STRIP] = np.unpackbits(bits[: words * 8], bitorder="little")


def store_strip(target, first, word):
    assert word.size == loops.STRIP
    target[first : first + loops.STRIP] = word


def stream_strip(target, first, word):
    assert target[first:].ctypes.data % 64 == 0
    store_strip(target, first, word)


def twin_of(fmt):
    """The format without the compiler; half floats are converted bit by bit"""
    same = getattr(vector._same, "py_func", vector._same)
    plain = same, same
    load, store = portable._HALVES.get(fmt.name, plain)
    return dataclasses.replace(fmt, load=load, store=store)


# Python's and NumPy's own functions ---------------------------------------------------


def referred(address):
    """The object at an address"""
    return ctypes.cast(int(address), ctypes.py_object).value


@functools.cache
def of_python(name, *more):
    """A C function of Python that takes and returns addresses or sizes"""
    function = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, *more)(
        (name, ctypes.pythonapi)
    )
    return lambda *values: function(*map(int, values))


at_address = functools.cache(
    lambda address, *kinds: ctypes.PYFUNCTYPE(ctypes.c_void_p, *kinds)(address)
)


class Interpreter:
    """The global lock, the error that is on its way, and what malloc has given out"""

    def __init__(self):
        self.held, self.error = True, None
        self.arrays = []  # that were made
        self.given, self.left, self.objects = set(), 1 << 60, 1 << 60
        self.raw_malloc, self.raw_free = map(
            of_python, ("PyMem_RawMalloc", "PyMem_RawFree")
        )

    def malloc(self, nbytes):
        self.left -= 1
        if self.left < 0:
            return 0
        address = self.raw_malloc(nbytes)
        self.given.add(address)
        return address

    def free(self, address):
        if address != 0:
            self.given.remove(address)
            self.raw_free(address)

    def save_thread(self):
        assert self.held
        self.held = False
        return 7

    def restore_thread(self, thread):
        assert (thread, self.held) == (7, False)
        self.held = True

    def outcome(self, address):
        """The object that is given away, or the error that is raised instead"""
        assert self.held
        if address == 0:
            raise self.error
        assert self.error is None
        value = referred(address)
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(value))
        return value

    def asking(self, function):
        """A function of addresses that returns what Python answers, or 0 for an error"""

        def ask(*values):
            assert self.held
            assert self.error is None
            try:
                result = function(*values)
            except Exception as error:  # noqa: BLE001 - it is raised later
                self.error = error
                return 0
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(result))
            return id(result)

        return ask

    def make(self, function, *values):
        """What a C function returns that makes an object, as long as there is memory"""
        self.objects -= 1
        if self.objects < 0:
            self.error = MemoryError()
            return 0
        return function(*values)

    def new_tuple(self, size):
        return self.make(of_python("PyTuple_New"), size)

    def new_object(self, kind, items):
        return self.make(
            of_python("PyType_GenericAlloc", ctypes.c_ssize_t), kind, items
        )

    def from_integer(self, value):
        number = ctypes.pythonapi.PyLong_FromSsize_t
        number.restype, number.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
        return self.make(number, value)

    def set_item(self, pair, i, address):
        """Only what nobody else can see yet may change."""
        assert self.held
        place = ctypes.c_ssize_t, ctypes.c_void_p
        of_python("PyTuple_SetItem", *place)(pair, i, address)

    def as_float(self, address):
        try:
            return float(referred(address))
        except OverflowError as error:
            self.error = error
            return -1.0

    def as_integer(self, address):
        value = referred(address)
        if abs(value) < 1 << 63:
            return value
        self.error = OverflowError()
        return -1

    def failed(self):
        return int(self.error is not None)

    def forget(self):
        self.error = None

    def empty_like(self, address, values):
        kinds = ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int
        return self.make_array(address, kinds, values)

    def new_array(self, address, values):
        word, size = ctypes.c_void_p, ctypes.c_int
        kinds = word, size, word, size, word, word, size, size, word
        return self.make_array(address, kinds, values)

    def make_array(self, address, kinds, values):
        try:
            made = self.make(at_address(address, *kinds), *values)
        except MemoryError as error:
            self.error = error
            return 0
        if made != 0:
            self.arrays.append(weakref.ref(referred(made)))
        return made


# The whole ----------------------------------------------------------------------------


def spread(body, arguments, size, grain, moved):
    """Three pieces at least, where there is so much, in any order"""
    size = int(size)
    piece = max(1, size // (3 * grain)) * grain
    starts = list(range(0, size, piece))
    random.Random(size).shuffle(starts)
    for start in starts:
        body(*arguments, start, min(start + piece, size))


def interpret(monkeypatch):
    """Have NumPy arrays go through Python alone; return the interpreter's twin"""
    threads.ready()  # which is not for Python
    python, functions = Interpreter(), {}
    call = lambda address, values: functions[address](*values)
    memory = {"_malloc": python.malloc, "_free": python.free}
    item = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(
        ("PyDict_GetItem", ctypes.pythonapi)
    )
    stack = {
        "strip_buffer": buffer(loops.STRIP),
        "rest_buffer": buffer(loops.STRIP),
        "flag_buffer": buffer(loops.MASKED + 2 * loops.STRIP, np.uint8),
        "bit_buffer": buffer(loops.STRIP, np.uint8),
        "weight_buffer": buffer(loops.WIDE),
        "sum_buffer": buffer(sums.LANES, np.float64),
        "column_buffer": buffer(sums.SEGMENT_COLUMNS + loops.STRIP, np.float64),
        "line_buffer": buffer(sums.SUMMED),
        "axes_buffer": buffer(walk.RANK + 1, np.int64),
        "counts_buffer": buffer(walk.MOST_AXES, np.int64),
        "_places": buffer(walk.FIELDS, np.int64),
        "_words": buffer(loops.LENGTH, np.int64),
        "_lines": buffer((walk.FIELDS - 1) * walk.LINE, np.int64),
        "_long_lines": buffer((1 + loops.MOST_ARRAYS) * walk.LONG_LINE, np.int64),
        "_strides": buffer(64, np.int64),
        "_layout": buffer(64 * (2 + loops.MOST_ARRAYS), np.int64),
        "_operands": buffer(loops.LENGTH + 5, np.int64),
    }
    vectors = {
        "put_word": put_word,
        "pack": pack,
        "unpack": unpack,
        "store_strip": store_strip,
        "stream_strip": stream_strip,
        "stream_halves": stream_strip,
        "fence": lambda: None,
    }
    shared = {
        "round_to_odd": halves.round_to_odd,
        "array_at": array_at,
        "piece": piece,
        "first_of": lambda values: values[0],
        "second_of": lambda values: values[1],
        "third_of": lambda values: values[2],
        "spread": spread,
        "words": words_of(ctypes.c_int64),
        "floats": words_of(ctypes.c_double),
        **memory,
        **stack,
        **vectors,
    }
    twins = {
        vector: vectors,
        loops: shared,
        sums: shared,
        walk: shared | {"_call_loop": call},
        build: vectors,
        objects: {
            **shared,
            "_call_empty_like": python.empty_like,
            "_call_new_array": python.new_array,
            "incref": of_python("Py_IncRef"),
            "decref": of_python("Py_DecRef"),
            "new_tuple": python.new_tuple,
            "tuple_size": of_python("PyTuple_Size"),
            "tuple_item": of_python("PyTuple_GetItem", ctypes.c_ssize_t),
            "set_item": python.set_item,
            "_new_object": python.new_object,
            "from_integer": python.from_integer,
            "save_thread": python.save_thread,
            "restore_thread": python.restore_thread,
            "_as_float": python.as_float,
            "as_integer": python.as_integer,
            "failed": python.failed,
            "forget": python.forget,
        },
        calls: {
            **shared,
            "singles": words_of(ctypes.c_float, 4),
            "_call_loop": call,
            "_call_look": call,
            "_call_sums": call,
            "_call_view": call,
            "_call_weights": call,
            "vectorcall": vectorcall,
        },
        threads: {
            "_team": lambda: threads._memory,
            "_dict_item": lambda where, key: item(int(where), int(key)) or 0,
            "_own_number": lambda: 0,  # nobody whose threads are looked for
        },
    }
    twins[calls] = twins[objects] | twins[calls]
    put(monkeypatch, twins)

    def kept(loop):
        loop.ctypes, loop.address = loop, id(loop)
        functions[id(loop)] = loop
        return loop

    def compiled(body, operation, fmt, target=build.PLAIN):
        return kept(build.bound(body, operation, twin_of(fmt), target))

    def compiled_for(fmt, template):
        return kept(rebuild(template, "twin", build._of_format(twin_of(fmt))))

    def make(summed, table, fallback):
        own = np.array([0 if fallback is None else id(fallback), table.ctypes.data])
        template = calls.call_sums if summed else calls.call

        def call(*arguments):
            given = (ctypes.py_object * len(arguments))(*arguments)
            result = template(id(own), ctypes.addressof(given), len(arguments))
            return python.outcome(result)

        return call

    monkeypatch.setattr(build, "inlined", lambda function, **_: function)
    monkeypatch.setattr(build, "compiled", compiled)
    monkeypatch.setattr(build, "compiled_for", compiled_for)
    monkeypatch.setattr(quick, "_make", make)
    monkeypatch.setattr(quick, "_compiled", lambda template, _: kept(template))
    monkeypatch.setattr(fast, "quick_call", functools.cache(quick.Call))
    for function in public_functions():
        monkeypatch.setattr(function, "call", function.left)
        monkeypatch.setattr(function, "asks_numpy", False)
        call = function.quick
        fresh = quick.Call(call.operation, **call.options)
        monkeypatch.setattr(function, "quick", fresh)
    return python


def put(monkeypatch, twins):
    """Put names of modules in the place of what is for the compiler"""
    for module, names in twins.items():
        for name, value in list(vars(module).items()):
            if name in names:
                monkeypatch.setattr(module, name, names[name])
            elif hasattr(value, "py_func"):
                monkeypatch.setattr(module, name, value.py_func)
            elif isinstance(value, (_Intrinsic, ExternalFunction)):
                monkeypatch.setattr(module, name, None)  # which cannot be called


def referred_all(arguments, number):
    """The objects whose addresses lie at an address"""
    return [referred(words_of(ctypes.c_int64)(arguments)[i]) for i in range(number)]


def vectorcall(callable, arguments, number, names):
    """What the function at an address returns, as a new reference"""
    result = referred(callable)(*referred_all(arguments, number))
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(result))
    return id(result)


def interpret_gpu(monkeypatch):
    """Have quick calls for arrays on a GPU be Python; return the interpreter's twin"""
    from fastrelu.cuda import compiled as on_gpu
    from fastrelu.cuda import quick as gpu_quick

    python = interpret(monkeypatch)
    word, number = ctypes.c_void_p, ctypes.c_uint

    def call(*kinds):
        function = functools.cache(ctypes.CFUNCTYPE(ctypes.c_int, *kinds))

        def run(address, values):
            assert python.held is (len(kinds) < 3)  # the driver may wait at a launch
            return function(address)(*map(int, values))

        return run

    def method(name, arguments, number, names):
        owner, *rest = referred_all(arguments, number)
        return getattr(owner, referred(name))(*rest)

    twins = {
        "array_at": array_at,
        "words": words_of(ctypes.c_int64),
        "floats": words_of(ctypes.c_double),
        "singles": words_of(ctypes.c_float, 4),
        "_space": buffer(on_gpu.SPACE, np.int64),
        "_call_current": call(word),
        "_call_capturing": call(word, word),
        "_call_launch": call(word, *(7 * [number]), *(3 * [word])),
        "_attribute": python.asking(
            lambda x, name: getattr(referred(x), referred(name))
        ),
        "_method": python.asking(method),
        "_tuple": python.asking(lambda x: tuple(referred(x))),
        "vectorcall": python.asking(
            lambda x, *given: referred(x)(*referred_all(*given[:2]))
        ),
        "tuple_size": lambda x: len(referred(x)),
    }
    shared = {name: f for name, f in vars(objects).items() if callable(f)}
    put(monkeypatch, {on_gpu: shared | twins})

    def before(self, fallback):
        own = np.array([id(fallback), self.table.ctypes.data])

        def call(*arguments):
            given = (ctypes.py_object * len(arguments))(*arguments)
            python.error = None
            result = self.code(id(own), ctypes.addressof(given), len(arguments))
            return python.outcome(result)

        call.kept = fallback
        return call

    monkeypatch.setattr(gpu_quick, "_compiled", lambda template: template)
    monkeypatch.setattr(gpu_quick.Quick, "before", before)
    return python


class Memory:
    """What NumPy's own handler gives the pool: so many bytes, and then no more"""

    def __init__(self, enough):
        self.blocks, self.left = {}, enough

    def malloc(self, address, values):
        _, nbytes = values
        if nbytes > self.left:
            return 0
        block = ctypes.create_string_buffer(nbytes)
        self.blocks[ctypes.addressof(block)] = block
        self.left -= nbytes
        return ctypes.addressof(block)

    def free(self, address, values):
        _, start, nbytes = values
        assert len(self.blocks.pop(start)) == nbytes
        self.left += nbytes


class Pages:
    """What the system maps: pages of one region, side by side, and then no more"""

    def __init__(self, enough):
        self.region = np.full(enough + blocks._PAGE, 0xA5, np.uint8)
        self.start = -(-self.region.ctypes.data // blocks._PAGE) * blocks._PAGE
        self.used = np.zeros(enough // blocks._PAGE, bool)
        self.advice, self.limits = [], {}  # given, and of what

    @property
    def left(self):
        return int((~self.used).sum()) * blocks._PAGE

    def map(self, address, values):
        near, nbytes, *_ = values
        assert (near, nbytes % blocks._PAGE) == (0, 0)
        number = nbytes // blocks._PAGE
        for first in range(self.used.size - number + 1):
            if not self.used[first : first + number].any():
                self.used[first : first + number] = True
                return self.start + first * blocks._PAGE
        return -1

    def unmap(self, address, values):
        start, nbytes = values
        assert (start - self.start) % blocks._PAGE == nbytes % blocks._PAGE == 0
        first, number = (start - self.start) // blocks._PAGE, nbytes // blocks._PAGE
        assert self.used[first : first + number].all()
        self.used[first : first + number] = False
        ctypes.memset(start, 0xDD, nbytes)

    def advise(self, address, values):
        self.advice.append(values)

    def get_limit(self, address, values):
        what, answer = values
        limit = self.limits.get(what, -1)
        words_of(ctypes.c_int64)(answer)[0] = limit


def exchange(words, i, value):
    before, words[i] = words[i], value
    return before


def interpret_pool(monkeypatch, enough):
    """Have the pool's functions be Python; return who gives and who maps memory"""
    memory, pages = Memory(enough), Pages(enough)
    twins = {
        "_words": words_of(ctypes.c_int64),
        "_bytes": words_of(ctypes.c_uint8, 1),
        "_exchange": exchange,
        "_call_malloc": memory.malloc,
        "_call_free": memory.free,
        "_call_lend": lambda address, values: handler.malloc(*values),
        "_call_take_back": lambda address, values: handler.free(*values),
        "_call_map": pages.map,
        "_call_unmap": pages.unmap,
        "_call_advise": pages.advise,
        "_call_get_limit": pages.get_limit,
    }
    for module, name in [(m, name) for m in (blocks, handler) for name in vars(m)]:
        value = getattr(module, name)
        if name in twins:
            monkeypatch.setattr(module, name, twins[name])
        elif hasattr(value, "py_func"):
            monkeypatch.setattr(module, name, value.py_func)
    return memory, pages
