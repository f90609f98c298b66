"""The model types whose vision tower this one is, and what each computes that its configuration does not say.

SigLIP's fixed-size tower and those made of it differ from NaFlex's in how the position table gets to the size of an
image, and in the form of the patch projection's weight.
"""

from __future__ import annotations

from typing import NamedTuple

from transformers import PretrainedConfig, Siglip2VisionConfig, SiglipVisionConfig
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

from siglip2_packed.ops.positions import ANTIALIASED

NAFLEX = "siglip2_vision_model"
COSMOS = "cosmos3_edge_vision"
"""NaFlex's tower without a head, under a name of its own and with other defaults."""
COSMOS_DEFAULTS = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "vision_use_head": False,
}
NATIVE = "native"
POSITION_MODES = (ANTIALIASED, "bicubic", "bucketed", NATIVE)
"""Those of `ops.positions.eager.resize_positions`, and one that takes images of the table's own size alone."""


class Kind(NamedTuple):
    config: type[PretrainedConfig]
    position_mode: str = "bucketed"
    """Where the configuration names none."""
    convolution: bool = True
    """The patch projection's weight is a convolution's `[D, C, p, p]`, and image_size tells the table's size."""
    head: bool = False
    """There may be a pooling head: vision_use_head tells."""
    prefix: str = ""
    """Of keys in files that transformers' class reads in every version."""


KINDS = {
    NAFLEX: Kind(Siglip2VisionConfig, ANTIALIASED, convolution=False, head=True, prefix="vision_model."),
    "siglip_vision_model": Kind(SiglipVisionConfig, NATIVE, head=True, prefix="vision_model."),
    "idefics2_vision": Kind(Idefics2VisionConfig),
    "idefics3_vision": Kind(Idefics3VisionConfig),
    "smolvlm_vision": Kind(SmolVLMVisionConfig),
}
WITHIN = {  # what a vision_config is that names no type, or that of the model around it, as early files do
    **dict.fromkeys(("siglip2", "lfm2_vl"), NAFLEX),
    **dict.fromkeys(("siglip", "paligemma", "gemma3", "llava_onevision"), "siglip_vision_model"),
    "cosmos3_edge": COSMOS,
    "idefics2": "idefics2_vision",
    "idefics3": "idefics3_vision",
    "smolvlm": "smolvlm_vision",
}
OTHERS = {  # beginnings of model types, the first that fits
    "qwen2_5_": "window attention and rotary positions",
    "minicpmv4": "window attention",
    **dict.fromkeys(
        ("qwen", "moonvit", "kimi", "glm", "paddleocr_vl", "video_llama_3", "pixtral", "lfm3_vl"), "rotary positions"
    ),
}


def kind_of(model_type: str | None) -> Kind:
    """NaFlex's, for a type that is not known."""
    return KINDS.get(model_type or NAFLEX, KINDS[NAFLEX])


def num_patches(config: PretrainedConfig) -> int:
    """Entries of the position table."""
    fixed = kind_of(config.model_type).convolution
    return (config.image_size // config.patch_size) ** 2 if fixed else config.num_patches  # type: ignore[no-any-return]


def position_mode(config: PretrainedConfig) -> str:
    """How the position table gets to the size of an image, one of `POSITION_MODES`."""
    return getattr(config, "position_mode", None) or kind_of(config.model_type).position_mode


def uses_head(config: PretrainedConfig) -> bool:
    """Whether the tower has a pooling head."""
    return bool(getattr(config, "vision_use_head", kind_of(config.model_type).head))


def other(model_type: object) -> str | None:
    """What towers of a type compute that this one does not, where that is known."""
    return next((what for begin, what in OTHERS.items() if str(model_type).startswith(begin)), None)
