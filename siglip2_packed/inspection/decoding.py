"""How far features move when JPEG files are decoded otherwise than to Pillow's pixels, everything else the same."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from siglip2_packed.images import decode as open_upright
from siglip2_packed.images import to_rgb
from siglip2_packed.inspection.compare import Comparison, measure
from siglip2_packed.modeling import Siglip2PackedVisionModel
from siglip2_packed.preprocess import Siglip2PackedImageProcessor

RELATIVE, COSINE = 8.6e-3, 0.9995
"""Bounds of `scaled` and `gpu`: what bfloat16 moves features by, and the worst token."""
LARGE = 12e6
"""Pixels of a photo."""
LONGEST = 65500
"""Pixels a side of a JPEG file, as libjpeg writes one."""


def jpegs(files: Sequence[Path], enlarge: bool) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each file, as a JPEG: itself if it is one.

    Args:
        enlarge: and of each at 12 megapixels, which a scale of its own is for; fewer if a side would be too long.

    Raises:
        ValueError: an image that no JPEG file holds, by name.
    """
    for file in files:
        data = file.read_bytes()
        image = to_rgb(open_upright(data)[0], None)
        coded = data.startswith(b"\xff\xd8")
        if not coded and max(image.size) > LONGEST:
            raise ValueError(f"{file}: {image.width}x{image.height}; a JPEG file has at most {LONGEST} pixels a side")
        yield file.name, data if coded else _coded(image)
        if enlarge:
            factor = min(math.sqrt(LARGE / (image.width * image.height)), LONGEST / max(image.size))
            large = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
            yield f"{file.name}, {large.width * large.height / 1e6:.0f} megapixels", _coded(large)


def _coded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


@torch.inference_mode()
def compare_decoding(
    name: str, data: bytes, ckpt: str, model: Siglip2PackedVisionModel, decode: str, max_num_patches: int | None
) -> Comparison:
    """Features of one JPEG file, decoded in this way, against those of Pillow's pixels.

    Args:
        model: in float32.
    """
    limit: Any = {} if max_num_patches is None else {"max_num_patches": max_num_patches}
    with torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext():
        packs = [
            Siglip2PackedImageProcessor.from_pretrained(ckpt, decode=how, **limit)([data]) for how in (decode, "exact")
        ]
    ours, exact = (model(**pack.to(model.device)).last_hidden_state for pack in packs)
    pixels = [pack["pixel_values"].cpu() for pack in packs]
    steps = float((pixels[0] - pixels[1]).abs().max())
    if not (ours.isfinite().all() and exact.isfinite().all()):
        return Comparison(name, "exact", decode, False, note="non-finite values")
    errors = measure(ours, exact)
    return Comparison(
        name,
        "exact",
        decode,
        errors.relative <= RELATIVE and errors.min_cosine >= COSINE,
        *errors[:4],
        max_abs_bound=math.inf,
        relative_error_bound=RELATIVE,
        cosine_bound=COSINE,
        note=f"pixels differ by up to {steps:.1e}" if steps else "the same pixels",
    )
