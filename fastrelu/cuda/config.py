"""What kernels and those who launch them have to agree on."""

import numba

SIMULATED = bool(numba.config.ENABLE_CUDASIM)
THREADS = 32 if SIMULATED else 128  # in a block; a simulated thread costs 0.2 ms
VECTORS = 1  # that a thread of flat arrays does: 1 or 2
BLOCKS = 1056  # at most, where a sum is split: no more than a GPU runs at once
DOWN = 4 if SIMULATED else 8  # rows that a block of columns works on at once
BYTES = 16  # the widest access
