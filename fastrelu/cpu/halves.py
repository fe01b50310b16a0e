"""Half floats bit by bit, and the last rounding of a sum.

Plain functions of scalars, for loops of both kinds.  They take the bits of a number by
way of `float_bits` and `bits_float`, in whose place compiled code has its own.
"""

import numpy as np


def float_bits(value):
    """Return the bits of a float32."""
    return np.float32(value).view(np.uint32)


def bits_float(bits):
    """Return the float32 of these bits."""
    return np.uint32(bits).view(np.float32)


def round_to_odd(value):
    """Return a float64 as a float32 that may be rounded once more, to a half float.

    Cut off, and odd if anything was: so a tie is one, and what is beside it is not.
    """
    nearest = np.float32(value)
    bits = float_bits(nearest)
    if np.isnan(value) or np.float64(nearest) == value:
        return nearest
    if abs(np.float64(nearest)) > abs(value):
        bits -= np.uint32(1)
    return bits_float(np.uint32(bits | np.uint32(1)))


def bfloat16_to_float(bits):
    return bits_float(np.uint32(bits) << np.uint32(16))


def float_to_bfloat16(value):
    bits = float_bits(value)
    # Half a unit in the last place, less one where the kept bit is even: ties to even.
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = bits | np.uint32(0x400000) if np.isnan(value) else np.uint32(bits + half)
    return np.uint16(rounded >> np.uint32(16))


def half_to_float(half):
    magnitude = np.uint32(half & np.uint16(0x7FFF)) << np.uint32(13)
    sign = np.uint32(half & np.uint16(0x8000)) << np.uint32(16)
    if magnitude >= np.uint32(0x0F800000):  # infinity or NaN
        return bits_float(sign | magnitude | np.uint32(0x7F800000))
    if magnitude >= np.uint32(0x00800000):
        return bits_float(sign | np.uint32(magnitude + np.uint32(0x38000000)))
    # Subnormal: as an integer, which no floating-point mode takes for 0.
    scaled = np.float32(magnitude >> np.uint32(13)) * np.float32(2.0**-24)
    return bits_float(sign | float_bits(scaled))


def float_to_half(value):
    bits = float_bits(value)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    if magnitude > np.uint32(0x7F800000):
        half = np.uint32(0x7E00)
    elif magnitude >= np.uint32(0x47800000):  # 65536 and above
        half = np.uint32(0x7C00)
    elif magnitude < np.uint32(0x38800000):  # subnormal: let the addition round
        half = float_bits(bits_float(magnitude) + np.float32(0.5)) - np.uint32(
            0x3F000000
        )
    else:  # a carry out of the fraction is the right exponent, up to infinity
        odd = (magnitude >> np.uint32(13)) & np.uint32(1)
        half = (
            magnitude - np.uint32(0x38000000) + np.uint32(0xFFF) + odd
        ) >> np.uint32(13)
    return np.uint16(sign | half)
