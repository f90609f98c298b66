"""SigLIP2 NaFlex on packed patches: no padding, exact positions, varlen attention.

    >>> import siglip2_packed
    >>> print(siglip2_packed.__version__)
    0.1.0

A name is loaded when it is asked for: torch and transformers take seconds, which `--version` and `--help` do not need.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from siglip2_packed.version import __version__

if TYPE_CHECKING:
    from siglip2_packed.collection.load import load_features
    from siglip2_packed.llava import SigLip2NaflexImageProcessor, SigLip2NaflexVisionTower, encode_images
    from siglip2_packed.llava_fixed import SigLipImageProcessor, SigLipVisionTower
    from siglip2_packed.modeling import NoPoolingHead, Siglip2NaflexPacking, Siglip2PackedVisionModel
    from siglip2_packed.packing import PackedPatches, convert_to_packing_format, pack, pad, unpack
    from siglip2_packed.preprocess import Siglip2PackedImageProcessor
    from siglip2_packed.vlm import replace_vision_tower, restore_vision_tower

__all__ = [
    "NoPoolingHead",
    "PackedPatches",
    "SigLip2NaflexImageProcessor",
    "SigLip2NaflexVisionTower",
    "SigLipImageProcessor",
    "SigLipVisionTower",
    "Siglip2NaflexPacking",
    "Siglip2PackedImageProcessor",
    "Siglip2PackedVisionModel",
    "__version__",
    "convert_to_packing_format",
    "encode_images",
    "load_features",
    "pack",
    "pad",
    "replace_vision_tower",
    "restore_vision_tower",
    "unpack",
]

_HOME = {
    "collection.load": ("load_features",),
    "llava": ("SigLip2NaflexImageProcessor", "SigLip2NaflexVisionTower", "encode_images"),
    "llava_fixed": ("SigLipImageProcessor", "SigLipVisionTower"),
    "modeling": ("NoPoolingHead", "Siglip2NaflexPacking", "Siglip2PackedVisionModel"),
    "packing": ("PackedPatches", "convert_to_packing_format", "pack", "pad", "unpack"),
    "preprocess": ("Siglip2PackedImageProcessor",),
    "vlm": ("replace_vision_tower", "restore_vision_tower"),
}

if not TYPE_CHECKING:  # a type checker that saw these would let every misspelt name pass

    def __getattr__(name: str):
        """A public name, or a module of the package (`siglip2_packed.data` after `import siglip2_packed`)."""
        for module, names in _HOME.items():
            if name in names:
                value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
                return value
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
