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
    compared = image.mode == "L" or (image.mode == "RGB" and JpegImagePlugin.get_sampling(image) >= 0)
    if image.format not in FORMATS or not compared or decoder() != "simplejpeg":
        return None
    file: Any = image.fp  # type: ignore[attr-defined]
    file.seek(0)
    return _decode(file.read(), image.mode, image.size)


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


def _decode(data: bytes, mode: str, size: tuple[int, int]) -> Image.Image | None:
    import simplejpeg

    width, height = size
    try:  # the smallest of the file's scales that gives this size is the one that has it, if a draft chose it
        pixels = simplejpeg.decode_jpeg(data, LAYOUTS[mode], min_height=height, min_width=width)
    except ValueError:  # damaged, cut short, of a kind that it does not know
        return None
    if pixels.shape[:2] != (height, width):
        return None
    return Image.frombuffer("L", size, pixels, "raw", "L", 0, 1) if mode == "L" else _handed_over(pixels)


def _handed_over(pixels: np.ndarray) -> Image.Image:
    """`[h, w, 4]` uint8 -> an RGB image in the same memory."""
    import pyarrow as pa

    height, width, _ = pixels.shape
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
            ours = _decode(buffer.getvalue(), theirs.mode, theirs.size)
            found[f"{kind}, 1/{scale}"] = 255 if ours is None else _difference(ours, theirs)
    return found


def _difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, dtype=np.int16) - np.asarray(b, dtype=np.int16)).max())
