"""Every function beside its peers: `pytest bench --full --benchmark-json=speed.json`"""

from itertools import product

from fastrelu.cli.peers.cases import COMMON, OPS

SIZES = ("1", "64", "1k", "16k", "128k", "1M", "16M", "64M")

# What the short grid has besides the common ways.
BACKWARD = ("relu_backward", "leaky_relu_backward_mask")
LAYOUTS = tuple(
    f"prelu{passes}_{layout}"
    for passes in ("", "_backward")
    for layout in ("last", "rows", "shared")
)

# What came later, or has arguments one step off the plainest, at fewer sizes; and what
# of it the short grid has.
FEWER = [
    (op, mode)
    for op, row in OPS.items()
    if row.activation not in ("relu", "leaky_relu", "prelu") or ":" in op
    for mode in row.modes
]
SAMPLE = [
    *product(("relu6", "squared_relu", "threshold", "rrelu"), ["fresh"]),
    *product(("relu:columns", "relu_mask:nhwc"), ["fresh"]),
    ("relu:transposed", "out"),
]


def cases(full):
    if full:
        all_rows = [(op, mode) for op, row in OPS.items() for mode in row.modes]
        everything = [pair for pair in all_rows if pair not in FEWER]
        # Some peers need seconds and gigabytes for the rest of the largest arrays.
        plain = [pair for pair in COMMON if OPS[pair[0]].activation != "prelu"]
        others = ["float64", "float16", "bfloat16"]
        rows = [
            *product(everything, ["float32"], SIZES[:-1]),
            *product(plain, ["float32"], SIZES[-1:]),
            *product(everything, others, ["1k", "1M"]),
            *product(COMMON, others, ["16M"]),
            *product(FEWER, ["float32"], ["1k", "128k", "16M"]),
        ]
    else:
        rows = [
            *product(COMMON, ["float32"], ["1k", "1M", "16M"]),
            *product(COMMON[:3], ["float32"], ["1", "128k"]),
            *product(COMMON, ["float16"], ["1M"]),
            *product(product(BACKWARD, ["out", "inplace"]), ["float32"], ["1M"]),
            *product(product(LAYOUTS, ["fresh"]), ["float32"], ["1M"]),
            *product(SAMPLE, ["float32"], ["128k"]),
        ]
    return [f"{op}-{mode}-{dtype}-{n}" for (op, mode), dtype, n in rows]


def test_speed(measured, report):
    report(measured)
