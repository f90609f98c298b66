"""Checkpoints made by transformers from a shape and a seed, where no hub is reachable: demos, tests, benchmarks.

The weights bite: position table, biases and norms at a scale that makes a wrong position, a dropped bias or another
GELU visible in the features, which transformers' own initialisation (zero biases, small table) would hide.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Siglip2Config, Siglip2Model, Siglip2VisionConfig, Siglip2VisionModel

from siglip2_packed.preprocess import Siglip2PackedImageProcessor

FIELDS = "hidden_size intermediate_size num_hidden_layers num_attention_heads patch_size num_patches".split()
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(zip(FIELDS, (64, 128, 3, 4, 4, 16))),
    "tiny72": dict(zip(FIELDS, (144, 208, 2, 2, 4, 16))),
    "base": dict(zip(FIELDS, (768, 3072, 12, 12, 16, 256))),
    "so400m": dict(zip(FIELDS, (1152, 4304, 27, 16, 16, 256))),
}


def save_random_checkpoint(
    folder: str | os.PathLike, shape: str = "base", *, seed: int = 0, full: bool = False
) -> Path:
    """Writes config.json, preprocessor_config.json and model.safetensors.

    Args:
        folder: made if it does not exist.
        shape: a key of `SHAPES`.
        full: a `Siglip2Model` with a small text tower, as the hub checkpoints are; else the vision model alone.
    """
    config = Siglip2VisionConfig(**SHAPES[shape])
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):  # transformers' own initialisation would take longer than all the rest
        if full:
            text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
            text |= dict(projection_size=config.hidden_size, max_position_embeddings=8)
            model: PreTrainedModel = Siglip2Model(Siglip2Config(text_config=text, vision_config=config.to_dict()))
        else:
            model = Siglip2VisionModel(config)
    model.to_empty(device="cpu")
    randomize(model, generator)
    model.save_pretrained(folder)
    shape_kwargs = {"patch_size": SHAPES[shape]["patch_size"], "max_num_patches": SHAPES[shape]["num_patches"]}
    Siglip2PackedImageProcessor(**shape_kwargs).save_pretrained(folder)
    return Path(folder)


@torch.no_grad()
def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Normal weights: matrices at 1/sqrt(fan_in), position table, probe and biases at unit scale, norms around 1."""
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias") or "logit" in name:
            noise *= 0.5
        elif "norm" in name:
            noise = 1 + 0.3 * noise
        elif parameter.ndim == 2 and "embedding.weight" not in name.replace("patch_embedding", ""):
            noise *= parameter.shape[1] ** -0.5
        parameter.copy_(noise)


__all__ = ["SHAPES", "randomize", "save_random_checkpoint"]
