"""How Pillow resizes (Resample.c): a side after the other, by weights of a fixed point, rounded to 8 bits each time."""

import math

PRECISION = 22
"""Bits behind the point of a weight: a sum of them times 8-bit levels fits 32."""
SUPPORTS = {"bilinear": 1, "bicubic": 2}
"""Pixels that count to each side, where an image is not made smaller."""
ORDERS = ("width", "width, but of tall images", "width, unless height shrinks more")
"""Which side comes first, on which the result depends: to Pillow 12.1, from 12.2, from 13.0."""


def height_first(order: str, height: tuple[int, int], width: tuple[int, int]) -> bool:
    """Each from how many pixels to how many."""
    less = height[0] - height[1]
    if order == "width, but of tall images":
        return less > 0 and height[0] > 100 * width[0]
    if order == "width, unless height shrinks more":
        return less > 0 and less > 2 * (width[0] - width[1])
    return False


def taps(extent: float, size: int, mode: str) -> int:
    """How many pixels count at most for one of `size` that are made of the picture, `extent` pixels long."""
    return 2 * math.ceil(SUPPORTS[mode] * max(extent / size, 1.0)) + 1
