"""What kernels and those who launch them have to agree on."""

import numba

SIMULATED = bool(numba.config.ENABLE_CUDASIM)
# In a block.  A simulated thread costs 0.2 ms.  On an H100, 128 were a tenth slower at 1M
# elements and 2 % faster at 64M.
THREADS = 32 if SIMULATED else 256
BLOCKS = 2112  # at most, where a sum is split: twice what an H100 runs at once
DOWN = 4 if SIMULATED else 8  # rows that a block of columns works on at once
BYTES = 16  # the widest access
