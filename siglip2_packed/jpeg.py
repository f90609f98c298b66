"""JPEG files by libjpeg-turbo itself (simplejpeg), where that gives Pillow's pixels bit for bit.

Pillow feeds libjpeg through a buffer of 64 KiB and unpacks each row; simplejpeg decodes a whole file into the four
bytes a pixel in which Pillow keeps RGB, and Arrow hands them over without a copy. Decoded so and resized by Pillow,
photos of 12 megapixels take 0.76 of the time, of 0.8 megapixels 0.9. (torchvision's decoder gives three bytes a pixel:
to bring those to Pillow costs what it gains.) What simplejpeg does not take, damaged files above all, Pillow does.
"""

from __future__ import annotations

import io
import logging
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, JpegImagePlugin

FORMATS = ("JPEG", "MPO")
"""Of Pillow; MPO is a JPEG file that others follow."""
LAYOUTS = {"RGB": "RGBX", "L": "GRAY"}
"""Mode of Pillow -> colour space of simplejpeg, as Pillow has it in memory. CMYK, which Adobe inverts, is Pillow's."""

logger = logging.getLogger(__name__)


def decode(image: Image.Image) -> Image.Image | None:
    """The pixels that `image.load()` would give, or None if only that can tell.

    Args:
        image: just opened from a file, perhaps with a draft, and not loaded.
    """
    if not takes(image):
        return None
    pixels = _decode(_file(image), LAYOUTS[image.mode], image.size)
    return None if pixels is None else _as_image(pixels, image.mode)


def decode_rgb(image: Image.Image, out: np.ndarray) -> bool:
    """`image.load()` of an RGB image that `takes` takes into `[height, width, 3]` uint8; False if it is damaged."""
    return _decode(_file(image), "RGB", image.size, out) is not None


def takes(image: Image.Image) -> bool:
    """Whether it is of the kinds of files that were compared."""
    if image.format not in FORMATS or image.mode not in LAYOUTS or decoder() != "simplejpeg":
        return False
    return image.mode == "L" or JpegImagePlugin.get_sampling(image) >= 0


def _file(image: Image.Image) -> bytes:
    file: Any = image.fp  # type: ignore[attr-defined]
    file.seek(0)
    return file.read()


@lru_cache
def decoder() -> str:
    """Who decodes JPEG files: simplejpeg once it was compared with Pillow, or Pillow."""
    try:
        import pyarrow  # noqa: F401
        import simplejpeg  # noqa: F401
    except ModuleNotFoundError:
        return "Pillow"
    except Exception as error:  # built for another NumPy, without its library
        logger.warning("simplejpeg cannot be used (%s): Pillow decodes", str(error).partition("\n")[0])
        return "Pillow"
    if not hasattr(Image, "fromarrow"):  # before Pillow 11.2
        return "Pillow"
    difference = max(_differences().values())
    if difference:
        logger.warning("simplejpeg's pixels differ from Pillow's by up to %d of 255: Pillow decodes", difference)
    return "Pillow" if difference else "simplejpeg"


def _decode(data: bytes, layout: str, size: tuple[int, int], out: np.ndarray | None = None) -> np.ndarray | None:
    """`[height, width, c]` uint8, or None."""
    import simplejpeg

    width, height = size
    try:  # the smallest of the file's scales that gives this size is the one that has it, if a draft chose it
        pixels = simplejpeg.decode_jpeg(data, layout, min_height=height, min_width=width, buffer=out)
    except ValueError:  # damaged, cut short, of a kind that it does not know
        return None
    return pixels if pixels.shape[:2] == (height, width) else None


def _as_image(pixels: np.ndarray, mode: str) -> Image.Image:
    """`[h, w, 4]` or `[h, w, 1]` uint8 -> an image of mode RGB or L, in the same memory."""
    height, width, _ = pixels.shape
    if mode == "L":
        return Image.frombuffer("L", (width, height), pixels, "raw", "L", 0, 1)
    import pyarrow as pa

    array = pa.Array.from_buffers(pa.uint32(), height * width, [None, pa.py_buffer(pixels)])
    return Image.fromarrow(array, "RGB", (width, height))


def _differences() -> dict[str, int]:
    """Largest difference from Pillow in files of each kind, whole and at each of their scales; 255 if it takes none."""
    noise = np.random.default_rng(0).integers(0, 256, (67, 51, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((102, 134), Image.Resampling.BICUBIC)
    kinds: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "4:4:4": (image, {"subsampling": "4:4:4"}),
        "4:2:2": (image, {"subsampling": "4:2:2"}),
        "4:2:0": (image, {"subsampling": "4:2:0"}),
        "progressive": (image, {"progressive": True}),
        "RGB": (image, {"keep_rgb": True}),
        "grey": (image.convert("L"), {}),
    }
    found = {}
    for kind, (drawn, options) in kinds.items():
        buffer = io.BytesIO()
        drawn.save(buffer, "JPEG", quality=85, **options)
        for scale in (1, 2, 4, 8):
            theirs = JpegImagePlugin.JpegImageFile(io.BytesIO(buffer.getvalue()))  # whatever Image.MAX_IMAGE_PIXELS is
            theirs.draft(None, (drawn.width // scale, drawn.height // scale))
            ours = _decode(buffer.getvalue(), LAYOUTS[theirs.mode], theirs.size)
            found[f"{kind}, 1/{scale}"] = 255 if ours is None else _difference(_as_image(ours, theirs.mode), theirs)
            if theirs.mode == "RGB":
                three = _decode(buffer.getvalue(), "RGB", theirs.size)
                found[f"{kind}, 1/{scale}, three bytes"] = 255 if three is None else _difference(three, theirs)
    return found


def _difference(a: Any, b: Any) -> int:
    return int(np.abs(np.asarray(a, dtype=np.int16) - np.asarray(b, dtype=np.int16)).max())
