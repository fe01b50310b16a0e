"""Runs PTX on the CPU: the very code that a GPU's driver would be given.

The threads of a block go in step as the lanes of NumPy arrays, those that are behind
first.  Unlike a GPU it checks every access: an address must be a multiple of the bytes
that are read or written, and within memory that a kernel may touch.  It knows what
fastrelu's kernels use; anything else is a NotImplementedError.
"""

import bisect
import ctypes
import re

import numpy as np

BITS = {bits: np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)}
KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}
DTYPES = {
    f"{letter}{bits}": np.dtype(f"{kind}{bits // 8}")
    for letter, kind in KINDS.items()
    for bits in (8, 16, 32, 64)
    if bits > 8 or letter != "f"
} | {"pred": np.dtype(bool)}
COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
SIMPLE = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


class Memory:
    """The parts of the host's memory that kernels may touch"""

    def __init__(self):
        self.starts, self.arrays = [], []
        self.kept = []  # or what comes to lie in their place would be mistaken for them
        self.widest = 0  # bytes of the widest access so far

    def add(self, a):
        if not a.size:
            return
        self.kept.append(a)
        start, end = np.lib.array_utils.byte_bounds(a)
        before = bisect.bisect(self.starts, start) - 1
        if before >= 0 and end <= self.starts[before] + self.arrays[before].size:
            return
        within = slice(*(bisect.bisect_left(self.starts, at) for at in (start, end)))
        lies = np.asarray((ctypes.c_ubyte * (end - start)).from_address(start))
        self.starts[within], self.arrays[within] = [start], [lies]

    def find(self, addresses, size):
        """The array that holds all these accesses, and where they are in it"""
        addresses = addresses.astype(np.int64)
        if (addresses % size).any():
            raise AssertionError(f"misaligned access of {size} bytes")
        self.widest = max(self.widest, size)
        place = bisect.bisect(self.starts, int(addresses.min())) - 1
        if place >= 0:
            places = addresses - self.starts[place]
            if places.max() + size <= self.arrays[place].size:
                return self.arrays[place], places[:, None] + np.arange(size)
        raise AssertionError(f"access of {size} bytes out of bounds")


class Shared:
    def __init__(self, size):
        self.bytes = np.full(max(size, 1), 0xAB, np.uint8)

    def find(self, addresses, size):
        places = addresses.astype(np.int64)
        assert not (places % size).any()
        assert places.min() >= 0
        assert places.max() + size <= self.bytes.size
        return self.bytes, places[:, None] + np.arange(size)


class Program:
    """A kernel's code"""

    def __init__(self, text):
        text = re.sub(r"//[^\n]*", "", text)
        head = re.search(
            r"\.visible \.entry \w+\((.*?)\)\s*(?:\.\w+[^{]*)?\{", text, re.DOTALL
        )
        self.parameters = re.findall(r"\.param \.\w+ (\w+)", head.group(1))
        self.shared, self.shared_size = {}, 0
        for align, name, size in re.findall(
            r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\]", text
        ):
            start = -(-self.shared_size // int(align)) * int(align)
            self.shared[name], self.shared_size = start, start + int(size)
        body = text[head.end() :]
        body = body[: body.rindex("}")]
        self.registers = {}
        for kind, name, count in re.findall(r"\.reg \.(\w+)\s+%(\w+)<(\d+)>", body):
            for k in range(int(count)):
                self.registers[f"%{name}{k}"] = self._storage(kind)
        for kind, names in re.findall(r"\.reg \.(\w+)\s+([^<;]+);", body):
            for name in names.split(","):
                self.registers[name.strip()] = self._storage(kind)
        body = re.sub(
            r"(?m)(^|[{;])\s*\.(reg|pragma|loc|file|shared)\b[^;\n]*;", r"\1", body
        )
        self.code, self.labels = [], {}
        for line in re.split(r"[;\n]", body):
            self._parse(line.strip())

    @staticmethod
    def _storage(kind):
        return np.dtype(bool) if kind == "pred" else BITS[int(kind[1:])]

    def _parse(self, line):
        if line.startswith("{") or line == "}":
            line = line[1:].strip()
        while label := re.match(r"(\$?[\w$]+):\s*", line):
            self.labels[label.group(1)] = len(self.code)
            line = line[label.end() :]
        if line in ("", "{", "}"):
            return
        parts = re.match(r"(@!?%\w+)?\s*([a-z][\w.:]*)\s*(.*)", line)
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", parts.group(3))
        operands = [operand.strip() for operand in operands]
        self.code.append((parts.group(1), parts.group(2).split("."), operands))

    def run(self, blocks, threads, arguments, memory, which=None):
        """Run all blocks, or some of them"""
        with np.errstate(all="ignore"):
            for block in range(blocks) if which is None else which:
                Block(self, block, blocks, threads, arguments, memory).run()


class Block:
    def __init__(self, program, block, blocks, threads, arguments, memory):
        self.program, self.memory = program, memory
        self.shared = Shared(program.shared_size)
        self.threads = threads
        self.registers = {
            name: np.zeros(threads, kind) for name, kind in program.registers.items()
        }
        self.arguments = dict(zip(program.parameters, arguments, strict=True))
        constants = {"%ntid.x": threads, "%ctaid.x": block, "%nctaid.x": blocks}
        for name, value in constants.items():
            self.registers[name] = np.full(threads, value, np.uint32)
        self.registers["%tid.x"] = np.arange(threads, dtype=np.uint32)
        self.counter = np.zeros(threads, np.int64)
        self.live = np.ones(threads, bool)
        self.waiting = np.zeros(threads, bool)

    def run(self):
        code = self.program.code
        while self.live.any():
            ready = self.live & ~self.waiting
            if not ready.any():  # all have come to the barrier
                self.waiting[:] = False
                self.counter[self.live] += 1
                continue
            place = int(self.counter[ready].min())
            lanes = np.flatnonzero(ready & (self.counter == place))
            if place >= len(code):
                self.live[lanes] = False
                continue
            self._step(lanes, place, *code[place])

    def _step(self, lanes, place, guard, op, operands):
        active = lanes
        if guard:
            holds = self.registers[guard.lstrip("@!")][lanes]
            active = lanes[~holds if guard[1] == "!" else holds]
        name = op[0]
        if name == "bar":
            assert len(active) == len(lanes)
            self.waiting[lanes] = True
            return
        following = np.full(len(lanes), place + 1)
        if name == "bra":
            following[np.isin(lanes, active)] = self.program.labels[operands[0]]
        elif name in ("ret", "exit"):
            self.live[active] = False
        elif name == "shfl":
            behind = self.live & (self.counter < place)
            assert not behind.any()
            assert len(active) == self.live.sum()
            source = active + self._value(operands[2], "s32", active)
            source = np.where(source // 32 == active // 32, source, active)
            self._put(
                operands[0].split("|")[0], self.registers[operands[1]][source], active
            )
        elif len(active):
            self._execute(name, op, operands, active)
        self.counter[lanes] = following

    def _value(self, operand, kind, lanes):
        dtype = DTYPES[kind]
        if operand in self.registers:
            value = self.registers[operand][lanes]
            if kind == "pred":
                return value
            if value.dtype.itemsize > dtype.itemsize:
                value = value.astype(BITS[8 * dtype.itemsize])
            return value.view(dtype)
        if operand in self.program.shared:
            number = self.program.shared[operand]
        elif operand[:2] in ("0f", "0d"):
            bits = BITS[32 if operand[1] == "f" else 64]
            return np.full(len(lanes), int(f"0x{operand[2:]}", 0), bits).view(dtype)
        else:
            number = int(operand, 0)
        bits = 8 * dtype.itemsize
        return np.full(len(lanes), number % 2**bits, BITS[bits]).view(dtype)

    def _put(self, register, value, lanes):
        kept = self.registers[register]
        if kept.dtype != bool:
            if value.dtype.kind == "i":
                value = value.astype(f"i{kept.itemsize}")
            value = np.ascontiguousarray(value).view(BITS[8 * value.dtype.itemsize])
        kept[lanes] = value.astype(kept.dtype)

    def _execute(self, name, op, operands, lanes):
        kind = op[-1]

        def get(place, of=kind):
            return self._value(operands[place], of, lanes)

        if name in ("ld", "st"):
            self._access(name, op, operands, lanes)
            return
        if name == "mov" and operands[0][0] == "{":
            half = f"b{DTYPES[kind].itemsize * 4}"
            parts = get(1).view(DTYPES[half]).reshape(len(lanes), -1)
            for k, register in enumerate(operands[0].strip("{}").split(",")):
                if register.strip() != "_":
                    self._put(register.strip(), parts[:, k], lanes)
            return
        if name == "mov" and operands[1][0] == "{":
            registers = [r.strip() for r in operands[1].strip("{}").split(",")]
            part = f"b{DTYPES[kind].itemsize * 8 // len(registers)}"
            parts = np.stack([self._value(r, part, lanes) for r in registers], 1)
            value = np.ascontiguousarray(parts).view(DTYPES[kind])[:, 0]
        elif name in ("mov", "cvta"):
            value = get(1)
        elif name == "cvt":
            value = self._convert(op, get)
        elif name == "setp":
            value = self._compare(op, get)
        elif name == "selp":
            value = np.where(get(3, "pred"), get(1), get(2))
        elif name in ("not", "neg"):
            value = ~get(1) if name == "not" else -get(1)
        elif name in ("shl", "shr"):
            bits = 8 * DTYPES[kind].itemsize
            x, by = get(1), get(2, "u32")
            far, by = by >= bits, np.minimum(by, bits - 1).astype(x.dtype)
            value = x << by if name == "shl" else x >> by
            if name == "shl" or x.dtype.kind == "u":
                value = np.where(far, x.dtype.type(0), value)
        elif name == "prmt":
            value = self._permute(get)
        elif name in ("bfe", "bfi"):
            value = self._bit_field(name, get)
        elif "wide" in op:
            wide = np.dtype(f"{DTYPES[kind].kind}{2 * DTYPES[kind].itemsize}")
            value = get(1).astype(wide) * get(2).astype(wide)
            if name == "mad":
                value += self._value(
                    operands[3], f"{kind[0]}{8 * wide.itemsize}", lanes
                )
        elif name in ("mad", "fma"):
            assert name == "mad", "a fused product is not what the CPU computes"
            value = get(1) * get(2) + get(3)
        elif name in ("div", "rem"):
            quotient = get(1) // get(2)
            assert DTYPES[kind].kind == "u" or (
                (get(1) >= 0).all() and (get(2) > 0).all()
            )
            value = quotient if name == "div" else get(1) - quotient * get(2)
        elif name in ("min", "max"):
            nan = "NaN" in op or kind[0] != "f"
            of = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}
            value = of[name][nan](get(1), get(2))
        elif name in SIMPLE:
            value = SIMPLE[name](get(1), get(2))
        else:
            raise NotImplementedError(".".join(op))
        self._put(operands[0], value, lanes)

    def _access(self, name, op, operands, lanes):
        dtype = DTYPES[op[-1]]
        vector = next((int(o[1:]) for o in op if re.fullmatch(r"v\d", o)), 1)
        target, register = operands if name == "st" else operands[::-1]
        base, offset = re.fullmatch(r"\[([%\w$]+)(?:\+(-?\d+))?\]", target).groups()
        if op[1] == "param":
            value = np.asarray(self.arguments[base])
            value = value.astype(dtype if dtype.kind == "f" else np.int64)
            value = np.full(len(lanes), value).astype(dtype)
            self._put(register, value, lanes)
            return
        places = self._value(base, "s64", lanes) + int(offset or 0)
        space = self.shared if op[1] == "shared" else self.memory
        memory, index = space.find(places, vector * dtype.itemsize)
        for k, part in enumerate(register.strip("{}").split(",")):
            at = index[:, k * dtype.itemsize : (k + 1) * dtype.itemsize]
            if name == "ld":
                value = np.ascontiguousarray(memory[at]).view(dtype)[:, 0]
                self._put(part.strip(), value, lanes)
            else:
                value = np.ascontiguousarray(self._value(part.strip(), op[-1], lanes))
                memory[at] = value.view(np.uint8).reshape(len(lanes), -1)

    @staticmethod
    def _convert(op, get):
        to, source = op[-2], op[-1]
        if to in ("f16x2", "bf16x2"):
            high, low = (_to_half(get(k, "f32"), to[:-2]) for k in (1, 2))
            return high.astype(np.uint32) << 16 | low
        if to == "bf16":
            return _to_half(get(1, "f32"), to)
        return get(1, source).astype(DTYPES[to])

    @staticmethod
    def _compare(op, get):
        a, b = get(1), get(2)
        unordered = np.zeros(len(a), bool)
        if a.dtype.kind == "f":
            unordered = np.isnan(a) | np.isnan(b)
        if op[1] in ("nan", "num"):
            return unordered == (op[1] == "nan")
        if op[1] in COMPARISONS:
            value = COMPARISONS[op[1]](a, b)
            return value & ~unordered if op[1] == "ne" else value
        return COMPARISONS[op[1][:-1]](a, b) | unordered  # ltu, neu ...

    @staticmethod
    def _permute(get):
        both = np.stack([get(1, "b32"), get(2, "b32")], 1).view(np.uint8)
        which = get(3, "u32")
        picked = [(which >> (4 * k)) & 0xF for k in range(4)]
        assert all((p < 8).all() for p in picked)
        rows = np.arange(len(both))
        chosen = np.stack([both[rows, p] for p in picked], 1)
        return np.ascontiguousarray(chosen).view(np.uint32)[:, 0]

    @staticmethod
    def _bit_field(name, get):
        if name == "bfe":
            return get(1) >> get(2, "u32") & (2 ** get(3, "u32") - 1).astype("u4")
        mask = (2 ** get(4, "u32") - 1).astype("u4") << get(3, "u32")
        return get(2) & ~mask | get(1) << get(3, "u32") & mask


def _to_half(value, kind):
    """The bits of a half float, NaNs as the hardware makes them"""
    nan = np.isnan(value)
    if kind == "f16":
        bits = value.astype(np.float16).view(np.uint16)
    else:
        wide = value.view(np.uint32).astype(np.uint64)
        bits = ((wide + 0x7FFF + (wide >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(nan, 0x7FFF, bits).astype(np.uint16)
