"""Photographs that come with scikit-image, for demos and comparisons where nobody has given any."""

from __future__ import annotations

from pathlib import Path

# colour, grey, alpha, text, a palette; landscape and portrait
PHOTOGRAPHS = (
    "astronaut.png chelsea.png coffee.png rocket.jpg camera.png logo.png page.png motorcycle_left.png "
    "no_time_for_that_tiny.gif"
).split()


def photographs(most: int = len(PHOTOGRAPHS)) -> list[Path]:
    """Of different shapes and modes, those that are photographs in colour first.

    Raises:
        ImportError: scikit-image is not installed.
    """
    try:
        import skimage
    except ImportError as error:
        raise ImportError("--use-real-images needs scikit-image: pip install 'siglip2-packed[demo]'") from error
    return [Path(skimage.__file__).parent / "data" / name for name in PHOTOGRAPHS[:most]]
