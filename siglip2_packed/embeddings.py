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
        return add_positions(
            self.patch_embedding(pixel_values.to(dtype)), self.position_embedding.weight, places, dtype
        )
