"""Patches to hidden states: a linear projection plus the position table resized to each image's grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siglip2_packed import plain
from siglip2_packed.configuration import patch_dim
from siglip2_packed.kinds import NATIVE, kind_of, num_patches, position_mode
from siglip2_packed.ops.positions import ANTIALIASED, Places, add_positions
from siglip2_packed.quantized import FLOATING


class PatchConvolution(nn.Conv2d):
    """A convolution whose windows have been cut out already: its parameters, `[D, C, p, p]` and `[D]`, on rows."""

    def forward(self, patches: Tensor) -> Tensor:
        """`[T, P]` of (py, px, c) -> `[T, D]`."""
        return F.linear(patches, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class Siglip2PackedEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        if kind_of(config.model_type).convolution:
            patch = config.patch_size
            convolution = PatchConvolution(config.num_channels, config.hidden_size, patch, patch)
            self.patch_embedding: nn.Linear | PatchConvolution = convolution
        else:
            self.patch_embedding = nn.Linear(patch_dim(config), config.hidden_size)
        self.position_embedding = nn.Embedding(num_patches(config), config.hidden_size)
        self.position_mode = position_mode(config)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The projection's; where that is quantised, the position table's, which quantisers leave as it is."""
        weight, table = self.patch_embedding.weight, self.position_embedding.weight
        if type(weight) in plain.WHOLE and weight.dtype in FLOATING:
            return weight.dtype
        return table.dtype if isinstance(table, Tensor) and table.dtype in FLOATING else torch.float32

    @torch.compiler.disable
    def forward(self, pixel_values: Tensor, places: Places, frozen: bool = False) -> Tensor:
        """`[T, P]` patches (any floating dtype) and where they lie -> `[T, D]` in the weights' dtype.

        frozen: nothing of the model learns, and it has no use for hooks that make a gradient go through it.
        """
        dtype = self.compute_dtype
        patches = self.patch_embedding(pixel_values.to(dtype))
        if frozen and patches.requires_grad and patches.is_leaf and made_to_require_grad(self.patch_embedding):
            patches = patches.detach()
        return add_positions(patches, self._table(pixel_values.device), places, dtype)

    @torch.compiler.disable
    def resize_mode(self, grids: Sequence[tuple[int, int, int]]) -> str:
        """How the table gets to these grids; as any mode would where all of them are its own size.

        Raises:
            ValueError: a grid of another size, where the position mode is that there is none.
        """
        side = math.isqrt(self.position_embedding.num_embeddings)
        other = next((i for i, (_, h, w) in enumerate(grids) if not h == w == side), None)
        if other is None or self.position_mode == ANTIALIASED:
            return ANTIALIASED
        if self.position_mode == NATIVE:
            _, h, w = grids[other]
            raise ValueError(
                f"grid_thw[{other}] has {h}x{w} patches, the position table {side}x{side}, and position_mode is "
                f"{NATIVE!r}: resize images to {side}x{side} patches, or load with position_mode='bicubic', which is "
                "transformers' interpolate_pos_encoding=True"
            )
        return self.position_mode

    def _table(self, device: torch.device) -> Tensor:
        """`[num_patches, D]`, resized as a whole: nothing is looked up, and what is around lookups would be idle."""
        module: Any = self.position_embedding
        if hasattr(module, "base_layer") and bool(module.merged) == bool(module.disable_adapters):
            raise ValueError(
                f"position_embedding is {type(module).__name__} of an adapter, which acts on lookups, but the table is "
                "resized as a whole: leave it out of target_modules; modules_to_save=['position_embedding'] trains it"
            )
        weight = module.weight
        # those of torchao have a floating dtype, and not a table's operations
        if isinstance(weight, Tensor) and weight.dtype in FLOATING and "torchao" not in type(weight).__module__:
            return weight
        return module(torch.arange(module.num_embeddings, device=device))  # type: ignore[no-any-return]


def made_to_require_grad(module: nn.Module) -> bool:
    """Whether `enable_input_require_grads`, transformers' or PEFT's, hung its hook here, as it does on all of a VLM.

    It is there for layers that learn under reentrant checkpointing; a frozen tower would keep all its activations.
    """
    hooks = module._forward_hooks.values()
    return any(getattr(hook, "__name__", "").startswith("make_inputs_require_grad") for hook in hooks)
