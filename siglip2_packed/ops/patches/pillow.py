"""Which side of an image Pillow resizes first. As the pixels between are rounded to 8 bits the result depends on it."""

ORDERS = ("width", "width, but of tall images", "width, unless height shrinks more")
"""To Pillow 12.1, from 12.2, from 13.0."""


def height_first(order: str, height: tuple[int, int], width: tuple[int, int]) -> bool:
    """Each from how many pixels to how many."""
    less = height[0] - height[1]
    if order == "width, but of tall images":
        return less > 0 and height[0] > 100 * width[0]
    if order == "width, unless height shrinks more":
        return less > 0 and less > 2 * (width[0] - width[1])
    return False
