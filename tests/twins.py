"""What is compiled, as the Python that it is.

Templates are Python; what they need of the compiler has a twin here, on the same memory.
So the kernels run line by line, every index checked by NumPy, with no compiler between.
"""

import ctypes
import dataclasses
import random

import numpy as np
import reference
from conftest import dtype_of
from numba.core.types import ExternalFunction
from numba.extending import _Intrinsic

from fastrelu import activations
from fastrelu.cpu import calls, halves, lanes, loops, pool, portable, threads
from fastrelu.cpu.jit import rebuild

CALLS = [
    call
    for row in vars(activations).values()
    if isinstance(row, activations.PlainCalls)
    for call in (row.flat, row.masked, row.by_channel)
]


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


# Lanes --------------------------------------------------------------------------------


def put_word(bits, place, word):
    bits[8 * place :][:8] = np.frombuffer(np.uint64(word).tobytes(), np.uint8)


def unpack(bits, flags, words):
    flags[: words * loops.WORD] = np.unpackbits(bits[: words * 8], bitorder="little")


def store_word(target, first, word):
    assert word.size == loops.WORD
    target[first : first + loops.WORD] = word


def stream_word(target, first, word):
    assert target[first:].ctypes.data % 64 == 0
    store_word(target, first, word)


def twin_of(lane):
    """The lane without the compiler; half floats are converted bit by bit"""
    dtype = dtype_of(lane.name)

    def active(x, first):
        values = x[first : first + loops.WORD].view(dtype)
        assert values.size == loops.WORD
        return reference.mask_bits(values).view(np.uint64)[0]

    same = getattr(lanes._same, "py_func", lanes._same)
    plain = same, same
    load, store = portable._HALVES.get(lane.name, plain)
    return dataclasses.replace(lane, active=active, load=load, store=store)


# Python's and NumPy's own functions ---------------------------------------------------


def referred(address):
    """The object at an address"""
    return ctypes.cast(address, ctypes.py_object).value


def of_python(name, *more):
    """A C function of Python that takes and returns addresses or sizes"""
    function = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, *more)(
        (name, ctypes.pythonapi)
    )
    return lambda *values: function(*map(int, values))


class Interpreter:
    """The global lock, the error that is on its way, and what malloc has given out"""

    def __init__(self):
        self.held, self.error = True, None
        self.given, self.left = set(), 1 << 60
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

    def set_item(self, pair, i, address):
        """Only what nobody else can see yet may change."""
        assert self.held
        place = ctypes.c_ssize_t, ctypes.c_void_p
        of_python("PyTuple_SetItem", *place)(pair, i, address)

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
        prototype = ctypes.PYFUNCTYPE(
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_int,
        )
        try:
            return prototype(address)(*values)
        except MemoryError as error:
            self.error = error
            return 0


# The whole ----------------------------------------------------------------------------


def spread(body, arguments, size, grain, moved):
    """Three pieces at least, where there is so much, in any order"""
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
        "word_buffer": buffer(loops.WORD),
        "rest_buffer": buffer(loops.WORD),
        "flag_buffer": buffer(loops.MASKED + 2 * loops.WORD, np.uint8),
        "sum_buffer": buffer(loops.LANES, np.float64),
        "weight_buffer": buffer(loops.WIDE),
        "column_buffer": buffer(loops.SEGMENT_COLUMNS + loops.WORD, np.float64),
    }
    vectors = {
        "put_word": put_word,
        "unpack": unpack,
        "store_word": store_word,
        "stream_word": stream_word,
        "stream_halves": stream_word,
        "fence": lambda: None,
    }
    twins = {
        lanes: vectors,
        loops: {
            "round_to_odd": halves.round_to_odd,
            "array_at": array_at,
            "piece": piece,
            "spread": spread,
            **memory,
            **stack,
            **vectors,
        },
        calls: {
            "_words": words_of(ctypes.c_int64),
            "_floats": words_of(ctypes.c_double),
            "_singles": words_of(ctypes.c_float, 4),
            "_call_loop": call,
            "_call_backward": call,
            "_call_weights": call,
            "_call_empty_like": python.empty_like,
            "_incref": of_python("Py_IncRef"),
            "_decref": of_python("Py_DecRef"),
            "_new_tuple": of_python("PyTuple_New"),
            "_length": of_python("PyTuple_Size"),
            "_item": of_python("PyTuple_GetItem", ctypes.c_ssize_t),
            "_set_item": python.set_item,
            **memory,
            "_save_thread": python.save_thread,
            "_restore_thread": python.restore_thread,
            "_as_float": referred,
            "_as_integer": python.as_integer,
            "_failed": python.failed,
            "_forget": python.forget,
        },
        threads: {
            "_team": lambda: threads._memory,
            "_dict_item": lambda where, key: item(int(where), int(key)) or 0,
        },
    }
    for module, names in twins.items():
        for name, value in list(vars(module).items()):
            if name in names:
                monkeypatch.setattr(module, name, names[name])
            elif hasattr(value, "py_func"):
                monkeypatch.setattr(module, name, value.py_func)
            elif isinstance(value, (_Intrinsic, ExternalFunction)):
                monkeypatch.setattr(module, name, None)  # which cannot be called

    def kept(loop):
        loop.ctypes, loop.address = loop, id(loop)
        functions[id(loop)] = loop
        return loop

    def compiled(block, formula, lane, kind=loops.PLAIN):
        return kept(loops.bound(block, formula, twin_of(lane), kind))

    def compiled_for(lane, template):
        return kept(rebuild(template, "twin", loops._names(twin_of(lane))))

    def compile_call(template, table):
        def call(*arguments):
            given = (ctypes.py_object * len(arguments))(*arguments)
            result = template(id(table), ctypes.addressof(given), len(arguments))
            assert python.held
            if result == 0:
                raise python.error
            assert python.error is None
            value = referred(result)
            ctypes.pythonapi.Py_DecRef(ctypes.py_object(value))
            return value

        return call

    monkeypatch.setattr(loops, "inlined", lambda function, **_: function)
    monkeypatch.setattr(loops, "compiled", compiled)
    monkeypatch.setattr(loops, "compiled_for", compiled_for)
    monkeypatch.setattr(calls, "_compile", compile_call)
    for call in CALLS:
        fresh = calls.Call(call.formula, *call.blocks)
        for name in ("call", "table", "rows"):
            monkeypatch.setattr(call, name, getattr(fresh, name))
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
        self.region = np.full(enough + pool._PAGE, 0xA5, np.uint8)
        self.start = -(-self.region.ctypes.data // pool._PAGE) * pool._PAGE
        self.used = np.zeros(enough // pool._PAGE, bool)
        self.advice, self.limits = [], {}  # given, and of what

    @property
    def left(self):
        return int((~self.used).sum()) * pool._PAGE

    def map(self, address, values):
        near, nbytes, *_ = values
        assert (near, nbytes % pool._PAGE) == (0, 0)
        number = nbytes // pool._PAGE
        for first in range(self.used.size - number + 1):
            if not self.used[first : first + number].any():
                self.used[first : first + number] = True
                return self.start + first * pool._PAGE
        return -1

    def unmap(self, address, values):
        start, nbytes = values
        assert (start - self.start) % pool._PAGE == nbytes % pool._PAGE == 0
        first, number = (start - self.start) // pool._PAGE, nbytes // pool._PAGE
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
        "_call_lend": lambda address, values: pool.malloc(*values),
        "_call_take_back": lambda address, values: pool.free(*values),
        "_call_map": pages.map,
        "_call_unmap": pages.unmap,
        "_call_advise": pages.advise,
        "_call_get_limit": pages.get_limit,
    }
    for name, value in list(vars(pool).items()):
        if name in twins:
            monkeypatch.setattr(pool, name, twins[name])
        elif hasattr(value, "py_func"):
            monkeypatch.setattr(pool, name, value.py_func)
    return memory, pages
