"""Images drawn from a seed, and the patches that transformers' PIL-backed processor makes of one."""

import io

import numpy as np
import torch

from siglip2_packed.preprocess import Siglip2PackedImageProcessor

try:  # transformers 5
    import transformers.models.siglip2.image_processing_pil_siglip2 as theirs
except ImportError:
    import transformers.models.siglip2.image_processing_siglip2 as theirs

V5 = hasattr(theirs, "Siglip2ImageProcessorPil")
Reference = theirs.Siglip2ImageProcessorPil if V5 else theirs.Siglip2ImageProcessor
get_image_size_for_max_num_patches = theirs.get_image_size_for_max_num_patches
processor = Siglip2PackedImageProcessor()


def reference(image, **settings):
    """transformers' patches without the padding, and their (h, w)."""
    batch = Reference(**settings)(image, return_tensors="pt")
    h, w = batch["spatial_shapes"][0].tolist()
    return batch["pixel_values"][0, : h * w].float(), (h, w)


def rgb(height, width, seed=0):
    """uint8 noise that holds every level: a wrong rounding of any of them shows."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels.reshape(-1)[:256] = np.arange(256)
    return pixels


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def same(a, b):
    assert a["grid_thw"].tolist() == b["grid_thw"].tolist()
    assert torch.isfinite(a["pixel_values"]).all()
    assert torch.equal(a["pixel_values"], b["pixel_values"])
