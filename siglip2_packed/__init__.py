"""SigLIP2 NaFlex on packed patches: no padding, exact positions, varlen attention."""

from siglip2_packed.llava import SigLip2NaflexImageProcessor, SigLip2NaflexVisionTower, encode_images
from siglip2_packed.modeling import NoPoolingHead, Siglip2NaflexPacking, Siglip2PackedVisionModel
from siglip2_packed.packing import PackedPatches, convert_to_packing_format, pack, pad, unpack
from siglip2_packed.preprocess import Siglip2PackedImageProcessor
from siglip2_packed.version import __version__

__all__ = [
    "NoPoolingHead",
    "PackedPatches",
    "SigLip2NaflexImageProcessor",
    "SigLip2NaflexVisionTower",
    "Siglip2NaflexPacking",
    "Siglip2PackedImageProcessor",
    "Siglip2PackedVisionModel",
    "__version__",
    "convert_to_packing_format",
    "encode_images",
    "pack",
    "pad",
    "unpack",
]
