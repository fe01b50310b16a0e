"""A user's file: type checkers must find the lines marked as wrong, and no others."""

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

import fastrelu as F
from fastrelu import Mask, leaky_relu, nn, relu

x: NDArray[np.float32] = np.ones((2, 3), np.float32)

y: NDArray[np.float32] = F.relu(x)
y = relu(x, True)
y = leaky_relu(x, 0.2, out=x)
y, mask = F.relu(x, return_mask=True)
bits: Mask = mask
y = F.relu_backward(x, mask)
y = F.leaky_relu_backward(x, x > 0, 0.2, inplace=True)
y, mask = F.threshold(x, 0.5, 0.0, return_mask=True)
y = F.relu6_backward(x, Mask.pack(x > 0, "0 < x < 6"))
y = F.prelu(x, 0.25, axis=-1)
y = F.prelu(x, [0.1, 0.2, 0.3])
dx, dw = F.prelu_backward(x, x, np.ones(3, np.float32))
y = dx
weight: NDArray[np.float32] = dw
y, slopes = F.rrelu(x, training=True)
y = F.rrelu(x, 0.1, 0.3)
y = F.rrelu_backward(x, x, slopes)
y = F.squared_relu_backward(x, x)
number: float = F.relu(1.5)
array: NDArray[np.float64] = F.relu([1.0, -2.0])
total: int = mask.count()
F.get_default_memory_pool().set_limit(1 << 30)
scalar: np.float32 = F.relu(np.float32(2))
layer = nn.LeakyReLU(np.float32(0.1))
prelu = nn.PReLU(1, Fraction(1, 4))
optimiser = nn.SGD(prelu.parameters, np.float32(0.1), np.array(0.9), np.int64(0))
for slope in np.float32(0.1), np.int64(1), np.array(0.1), Fraction(1, 10):
    y = F.leaky_relu(x, slope)
    y = F.leaky_relu_backward(x, x, slope)
    y = F.threshold(x, slope, slope)
    y = F.rrelu(x, 0, slope)
    y = F.rrelu_backward(x, x, slope)
y = F.relu_backward(np.float32(1), x)
y, dw = F.prelu_backward(np.float32(1), x, dw)
for flag in (True, False):
    either = F.relu(x, return_mask=flag)
    either = F.leaky_relu(x, 0.2, return_mask=flag)
    either = F.threshold(x, 0.5, 0.0, return_mask=flag)
    either = F.rrelu(x, training=flag)
    either = F.rrelu(x, 0.1, 0.3, flag)

bad: int = F.relu(x)  # wrong
bad = F.prelu(x, 0.25)  # wrong
y = F.relu(x, return_mask=True)  # wrong
F.relu("x")  # wrong
F.relu(x, return_masks=True)  # wrong
F.relu(x=x)  # wrong
F.leaky_relu(x, "0.1")  # wrong
F.leaky_relu(x, 0.1j)  # wrong
F.threshold(x, "0.5", 0)  # wrong
F.rrelu(x, 0, "1")  # wrong
F.rrelu(x, training="yes")  # wrong
F.prelu(x)  # wrong
F.prelu(x, 0.25, 1)  # wrong
y = F.prelu_backward(x, x, 0.25)  # wrong
F.relu_backward(x)  # wrong
F.gelu(x)  # wrong
F.relu(x, inplace="yes")  # wrong
nn.LeakyReLU("0.1")  # wrong
nn.PReLU(1, "0.1")  # wrong
nn.SGD(prelu.parameters, "0.1")  # wrong
