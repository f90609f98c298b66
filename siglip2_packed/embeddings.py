"""Patches to hidden states: a linear projection plus the position table resized to each image's grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from siglip2_packed.ops.layer_norm import on_triton
from siglip2_packed.ops.positions import places, resize_positions
from siglip2_packed.ops.tracing import traced
from siglip2_packed.ops.transfer import to_device


class Siglip2PackedEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.patch_embedding = nn.Linear(patch_dim(config), config.hidden_size)
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    @torch.compiler.disable
    def forward(
        self, pixel_values: Tensor, grids: Sequence[tuple[int, int, int]], position_ids: Tensor | None = None
    ) -> Tensor:
        """`[T, P]` patches (any floating dtype) and their (t, h, w) grids -> `[T, D]` in the weights' dtype.

        With `position_ids [T]`, row r has the position of patch `position_ids[r]` of those that the grids cover.
        """
        dtype = self.patch_embedding.weight.dtype
        patches = self.patch_embedding(pixel_values.to(dtype))
        in_order, untracked = position_ids is None, not (torch.is_grad_enabled() or traced())
        if in_order and untracked and patches.dtype == dtype and on_triton(patches):
            return self.add_positions(patches, *places(tuple(grids), patches.device))
        positions = resize_positions(self.position_embedding.weight, grids)
        if position_ids is not None:
            positions = positions[to_device(position_ids, positions.device)]
        # the weights' dtype, not the patches': under autocast the residual stream stays in float32
        return patches + positions.to(dtype)

    def add_positions(self, patches: Tensor, images: Tensor, image_of_row: Tensor) -> Tensor:
        """In one pass on CUDA, without gradients; `images` and `image_of_row` as `ops.positions.places` gives them."""
        from siglip2_packed.ops.triton.positions import add_positions

        return add_positions(patches, self.position_embedding.weight, images, image_of_row)


def patch_dim(config) -> int:
    """P = patch_size² · channels."""
    return config.patch_size**2 * config.num_channels
