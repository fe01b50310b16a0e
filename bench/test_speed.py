"""Every function beside its peers: `pytest bench --full --benchmark-json=speed.json`"""

from itertools import product

from fastrelu._peers import COMMON, OPS

SIZES = ("1", "64", "1k", "16k", "128k", "1M", "16M", "64M")

# What the short grid has besides the common ways.
BACKWARD = ("relu_backward", "leaky_relu_backward_mask")
LAYOUTS = tuple(
    f"prelu{passes}_{layout}"
    for passes in ("", "_backward")
    for layout in ("last", "rows", "shared")
)


def cases(full):
    if full:
        everything = [(op, mode) for op, row in OPS.items() for mode in row.modes]
        # Some peers need seconds and gigabytes for the rest of the largest arrays.
        plain = [pair for pair in COMMON if OPS[pair[0]].activation != "prelu"]
        others = ["float64", "float16", "bfloat16"]
        rows = [
            *product(everything, ["float32"], SIZES[:-1]),
            *product(plain, ["float32"], SIZES[-1:]),
            *product(everything, others, ["1k", "1M"]),
            *product(COMMON, others, ["16M"]),
        ]
    else:
        rows = [
            *product(COMMON, ["float32"], ["1k", "1M", "16M"]),
            *product(COMMON[:3], ["float32"], ["1", "128k"]),
            *product(COMMON, ["float16"], ["1M"]),
            *product(product(BACKWARD, ["out", "inplace"]), ["float32"], ["1M"]),
            *product(product(LAYOUTS, ["fresh"]), ["float32"], ["1M"]),
        ]
    return [f"{op}-{mode}-{dtype}-{n}" for (op, mode), dtype, n in rows]


def test_speed(measured, report):
    report(measured)
