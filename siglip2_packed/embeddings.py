"""Patches to hidden states: a linear projection plus the position table resized to each image's grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from siglip2_packed.configuration import patch_dim
from siglip2_packed.ops.positions import Places, add_positions


class Siglip2PackedEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.patch_embedding = nn.Linear(patch_dim(config), config.hidden_size)
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    @torch.compiler.disable
    def forward(self, pixel_values: Tensor, places: Places) -> Tensor:
        """`[T, P]` patches (any floating dtype) and where they lie -> `[T, D]` in the weights' dtype."""
        dtype = self.patch_embedding.weight.dtype
        return add_positions(
            self.patch_embedding(pixel_values.to(dtype)), self.position_embedding.weight, places, dtype
        )
