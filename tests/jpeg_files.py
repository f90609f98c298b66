"""JPEG files of every kind: sampled, turned, grey, of other colours, damaged, with more behind or within."""

import io

import numpy as np
from PIL import Image

from siglip2_packed.collection.sources import Input

SIZE = (198, 133)
"""Width and height: no multiples of a block, nor of its eighth."""


def photograph(size=SIZE, seed=0):
    """Smooth, with noise: what chroma is sampled from shows."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 6, size[0] // 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def jpeg(image=None, **options):
    buffer = io.BytesIO()
    (photograph() if image is None else image).save(buffer, options.pop("format", "JPEG"), **{"quality": 90, **options})
    return buffer.getvalue()


def turned(orientation, image=None):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(image, exif=exif)


def with_thumbnail():
    """A whole JPEG, with its end of image, within the EXIF block."""
    return jpeg(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0" + jpeg(photograph((40, 30))))


PLAIN = {
    **{f"sampled {kind}": jpeg(subsampling=kind) for kind in ("4:4:4", "4:2:2", "4:2:0")},
    "progressive": jpeg(progressive=True),
    "grey": jpeg(photograph().convert("L")),
    **{f"orientation {i}": turned(i) for i in range(1, 9)},
    "thumbnail": with_thumbnail(),
    "restarts": jpeg(restart_marker_rows=1),
    "tail": jpeg() + b"\0" * 100,
    "one pixel wide": jpeg(photograph((6, 260)).crop((0, 0, 1, 260))),
    "small": jpeg(photograph((13, 19))),
}
ODD = {
    "RGB": jpeg(keep_rgb=True),
    "CMYK": jpeg(photograph().convert("CMYK")),
    "several": jpeg(format="MPO", save_all=True, append_images=[photograph(seed=1)]),
    "hole": jpeg()[:4000] + jpeg()[4200:],
}
"""Readable, and perhaps not by every decoder alike."""
BROKEN = {
    "cut": jpeg()[:-2000],
    "cut in front of its end": jpeg()[:-2],
    "cut, thumbnail": with_thumbnail()[:-2000],
    "header": jpeg()[:300],
    "empty": b"",
}
OTHER = {"png": jpeg(format="PNG"), "gif": jpeg(format="GIF"), "webp": jpeg(format="WEBP")}


def inputs(files):
    return [Input(i, name, data) for i, (name, data) in enumerate(files.items())]
