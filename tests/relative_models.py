"""Small towers of transformers that are SigLIP2's relatives, random weights, and models around them."""

import torch
import transformers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionConfig, Idefics2VisionTransformer
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionConfig, Idefics3VisionTransformer
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionConfig, SmolVLMVisionTransformer

from siglip2_packed.random_checkpoint import randomize
from siglip2_packed.workloads import SHAPES

SIDE = 7
"""Of the table. It divides no side of `IMAGES` but its own: transformers 4 takes the bucket below at each bound."""
IMAGES = [(13, 19), (8, 32), (1, 40), (7, 7), (3, 5), (9, 1)]
TOWERS = {
    "siglip": (SiglipVisionConfig, SiglipVisionModel),
    "idefics2": (Idefics2VisionConfig, Idefics2VisionTransformer),
    "idefics3": (Idefics3VisionConfig, Idefics3VisionTransformer),
    "smolvlm": (SmolVLMVisionConfig, SmolVLMVisionTransformer),
}
EXACT_BUCKETS = int(transformers.__version__.split(".")[0]) >= 5


def fields(shape="tiny", side=SIDE, **more):
    """Of a vision configuration."""
    given = {**SHAPES[shape], "image_size": 4 * side, **more}
    given.pop("num_patches")
    return given


def made(make, seed=0):
    """Normal weights at 1/sqrt(fan_in), the position table at unit scale."""
    model = make()
    randomize(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.mul_(module.weight[0].numel() ** -0.5)
    return model.eval()


def tower(name, shape="tiny", **more):
    config, model = TOWERS[name]
    return made(lambda: model(config(**fields(shape, **more))))


def pictures(sizes, seed=0):
    """`[1, C, H, W]` of each size in patches."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 3, 4 * h, 4 * w, generator=generator) for h, w in sizes]


def framed(sizes, seed=0):
    """`[N, C, H, W]` of all sizes in one frame, noise around them, and a mask `[N, h, w]` of their own patches."""
    h, w = (max(sides) for sides in zip(*sizes))
    images = torch.cat(pictures([(h, w)] * len(sizes), seed + 1))
    mask = torch.zeros(len(sizes), h, w, dtype=torch.bool)
    for i, ((own_h, own_w), (picture,)) in enumerate(zip(sizes, pictures(sizes, seed))):
        images[i, :, : 4 * own_h, : 4 * own_w] = picture
        mask[i, :own_h, :own_w] = True
    return images, mask


def run(model, image, interpolate=True):
    """transformers' output for one picture."""
    if not isinstance(model, SiglipVisionModel):
        h, w = (size // 4 for size in image.shape[2:])
        return model(image, patch_attention_mask=torch.ones(1, h, w, dtype=torch.bool))
    return model(image, interpolate_pos_encoding=interpolate)


TEXT = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16, vocab_size=70, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def vlm(name):
    """A model with a tower inside, and the tower."""
    config, model, text, vision, more = VLMS[name]
    kind = {"projection_size": 64} if config is SiglipConfig else {"model_type": text}
    built = made(lambda: model(config(vision_config=vision, text_config={**TEXT, **kind}, **more)))
    inner = getattr(built, "model", built)
    found = getattr(inner, "vision_tower", None) or getattr(inner, "visual", None) or inner.vision_model
    return built, getattr(found, "vision_model", found)


_SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **fields()}
_EVEN = fields(side=8)
_PERCEIVER = dict(
    hidden_size=32, resampler_n_latents=4, resampler_depth=2, resampler_n_heads=2, resampler_head_dim=16,
    num_key_value_heads=1,
)  # fmt: skip
VLMS = {
    "siglip": (SiglipConfig, SiglipModel, "", fields(), {}),
    "paligemma": (
        PaliGemmaConfig, PaliGemmaForConditionalGeneration, "gemma", _SIGLIP,
        {"image_token_index": 60, "projection_dim": 32},
    ),
    "gemma3": (
        Gemma3Config, Gemma3ForConditionalGeneration, "gemma3_text", {**_SIGLIP, "image_size": 32},
        {"mm_tokens_per_image": 16, "image_token_index": 60},
    ),
    "llava_onevision": (
        LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, "qwen2", _SIGLIP,
        {"image_token_index": 60, "vision_feature_layer": -1},
    ),
    "idefics2": (
        Idefics2Config, Idefics2ForConditionalGeneration, "mistral", fields(),
        {"image_token_id": 60, "perceiver_config": _PERCEIVER},
    ),
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration, "llama", _EVEN, {"image_token_id": 60}),
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration, "llama", _EVEN, {"image_token_id": 60}),
    "lfm2_vl": (
        Lfm2VlConfig, Lfm2VlForConditionalGeneration, "lfm2",
        {**SHAPES["tiny"], "model_type": "siglip2_vision_model", "vision_use_head": False},
        {"image_token_id": 60, "projector_hidden_size": 48},
    ),
}  # fmt: skip
