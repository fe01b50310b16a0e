"""More elements than 32 bits can count: of int8, which makes them affordable."""

import os

import numpy as np
import pytest

import fastrelu as F

N = (1 << 31) + 4099
PIECE = 1 << 26
PERIOD = np.arange(-125, 126, dtype=np.int8)  # 251 is prime: no two pieces are alike


def memory_at_hand():
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(memory_at_hand() < 4 * N, reason="needs 8 GiB of free memory"),
]


def pieces():
    """(part, its numbers): what an array holds whose elements repeat PERIOD"""
    whole = np.resize(PERIOD, PIECE + PERIOD.size)
    for start in range(0, N, PIECE):
        stop = min(start + PIECE, N)
        shift = start % PERIOD.size
        yield slice(start, stop), whole[shift : shift + stop - start]


def filled(array):
    for part, values in pieces():
        array[part] = values
    return array


def is_right(y, expected):
    return all(np.array_equal(y[part], expected(v)) for part, v in pieces())


def relu(values):
    return np.maximum(values, 0)


@pytest.fixture
def x():
    yield filled(np.empty(N, np.int8))
    F.get_default_memory_pool().free_all_blocks()


def test_fresh(x):
    assert is_right(F.relu(x), relu)


def test_out(x):
    out = np.empty_like(x)
    assert F.relu(x, out=out) is out
    assert is_right(out, relu)


def test_in_place(x):
    F.relu(x.reshape(1, N), inplace=True)
    assert is_right(x, relu)


@pytest.mark.parametrize("way", ["fresh", "in place"])
def test_backwards(way, x):
    """A view with a negative stride, which is laid flat in a copy."""
    view = x[::-1]
    y = F.relu(view, inplace=way == "in place")
    assert is_right(y[::-1], relu)
    assert (y is view) == (way == "in place")
    assert is_right(x, relu if y is view else lambda values: values)


def test_mask(x):
    y, mask = F.relu(x, return_mask=True)
    assert is_right(y, relu)
    assert mask.bits.size == -(-N // 8)
    for part, values in pieces():
        bits = np.packbits(values > 0, bitorder="little")
        assert np.array_equal(mask.bits[part.start // 8 : -(-part.stop // 8)], bits)
    assert mask.unpack()[N - 1] == (x[-1] > 0)
    F.relu_backward(x, mask, inplace=True)
    assert is_right(x, relu)


def test_backward(x):
    dx = F.relu_backward(x, x)
    assert is_right(dx, relu)
