"""Patches to hidden states: a linear projection plus the position table resized to each image's grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from siglip2_packed import plain
from siglip2_packed.configuration import patch_dim
from siglip2_packed.ops.positions import Places, add_positions
from siglip2_packed.quantized import FLOATING


class Siglip2PackedEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.patch_embedding = nn.Linear(patch_dim(config), config.hidden_size)
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The projection's; where that is quantised, the position table's, which quantisers leave as it is."""
        weight = self.patch_embedding.weight
        if type(weight) in plain.WHOLE and weight.dtype in FLOATING:
            return weight.dtype
        return self.position_embedding.weight.dtype

    @torch.compiler.disable
    def forward(self, pixel_values: Tensor, places: Places) -> Tensor:
        """`[T, P]` patches (any floating dtype) and where they lie -> `[T, D]` in the weights' dtype."""
        dtype = self.compute_dtype
        patches = self.patch_embedding(pixel_values.to(dtype))
        if patches.requires_grad and patches.is_leaf and _made_to_require_grad(self.patch_embedding):
            patches = patches.detach()
        return add_positions(patches, self.position_embedding.weight, places, dtype)


def _made_to_require_grad(module: nn.Module) -> bool:
    """Whether `enable_input_require_grads`, transformers' or PEFT's, hung its hook here, as it does on all of a VLM.

    It is there for reentrant checkpointing, which layers never do; a frozen tower would keep all its activations.
    """
    hooks = module._forward_hooks.values()
    return any(getattr(hook, "__name__", "").startswith("make_inputs_require_grad") for hook in hooks)
