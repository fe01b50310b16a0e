"""How a warp's threads put their mask bits together, as Python: a thread for a thread."""

import threading
import types

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda: see the extra cuda13")

from fastrelu.cuda import launch, vector

WARP = 32


class Shuffle:
    """What shfl_down_sync gives each thread: what the one `delta` further has"""

    def __init__(self):
        self.barrier, self.values = threading.Barrier(WARP, timeout=60), [0] * WARP
        self.me = threading.local()

    def __call__(self, mask, value, delta):
        assert mask == 0xFFFFFFFF
        me = self.me.lane
        self.values[me] = np.int32(value)
        self.barrier.wait()
        there = me + delta
        got = self.values[there if there < WARP else me]
        self.barrier.wait()
        return got


@pytest.mark.skipif(launch.SIMULATED, reason="the simulator has a twin of this")
@pytest.mark.parametrize("width", [2, 4, 8, 16])
def test_a_warp_writes_its_bits(width, monkeypatch):
    shuffle = Shuffle()
    monkeypatch.setattr(vector, "cuda", types.SimpleNamespace(shfl_down_sync=shuffle))
    put = vector.put_flags(width).py_func
    whole = WARP * width
    for end in {whole, whole - 1, whole - 8, whole // 2 + 3, 9, 8, 1}:
        bits = np.random.default_rng(end).integers(0, 2, whole).astype(bool)
        bits[end:] = False
        memory = np.full(whole // 8 + 2, 0xA5, np.uint8)
        expected = memory.copy()
        packed = np.packbits(bits[:end], bitorder="little")
        expected[: packed.size] = packed

        def work(lane, bits=bits, memory=memory, end=end):
            shuffle.me.lane = lane
            mine = bits[lane * width : (lane + 1) * width].tolist()
            flags = np.int32(sum(bit << k for k, bit in enumerate(mine)))
            put(memory, lane * width, end, flags)

        warp = [threading.Thread(target=work, args=(lane,)) for lane in range(WARP)]
        for thread in warp:
            thread.start()
        for thread in warp:
            thread.join()
        assert (memory == expected).all()
