"""Patches to hidden states: a linear projection plus the position table resized to each image's grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from siglip2_packed import invariance, plain
from siglip2_packed.configuration import patch_dim
from siglip2_packed.kinds import NATIVE, kind_of, num_patches, position_mode
from siglip2_packed.ops.positions import ANTIALIASED, Places, add_positions
from siglip2_packed.quantized import FLOATING


class Siglip2PackedEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        patch, channels = config.patch_size, config.num_channels
        self.patch_embedding: nn.Linear | nn.Conv2d = nn.Linear(patch_dim(config), config.hidden_size)
        if kind_of(config.model_type).convolution:
            self.patch_embedding = nn.Conv2d(channels, config.hidden_size, patch, stride=patch)
        self.position_embedding = nn.Embedding(num_patches(config), config.hidden_size)
        self.position_mode = position_mode(config)
        self._window = (patch, patch, channels) if kind_of(config.model_type).convolution else None

    @property
    def compute_dtype(self) -> torch.dtype:
        """The projection's; where that is quantised, the position table's, which quantisers leave as it is."""
        weight, table = self.patch_embedding.weight, self.position_embedding.weight
        if type(weight) in plain.WHOLE and weight.dtype in FLOATING:
            return weight.dtype
        return table.dtype if isinstance(table, Tensor) and table.dtype in FLOATING else torch.float32

    @torch.compiler.disable
    def forward(self, pixel_values: Tensor, places: Places, frozen: bool = False, invariant: bool = False) -> Tensor:
        """`[T, P]` patches (any floating dtype) and where they lie -> `[T, D]` in the weights' dtype.

        frozen: nothing of the model learns, and it has no use for hooks that make a gradient go through it.
        invariant: see `invariance`.
        """
        dtype = self.compute_dtype
        if invariant:
            return self._invariantly(pixel_values.to(dtype), places)
        patches = self._projected(pixel_values.to(dtype))
        if frozen and patches.requires_grad and patches.is_leaf and made_to_require_grad(self.patch_embedding):
            patches = patches.detach()
        return add_positions(patches.flatten(1), self._table(pixel_values.device), places, dtype)

    def _invariantly(self, pixel_values: Tensor, places: Places) -> Tensor:
        table = self.position_embedding
        if plain.weights((table, nn.Embedding), dtype=pixel_values.dtype, bias=False) is None:
            raise invariance.refused(self, pixel_values)
        patches = invariance.linear(self, "patch_embedding", pixel_values)
        return add_positions(patches, table.weight, places, pixel_values.dtype, invariant=True)

    def _projected(self, pixel_values: Tensor) -> Tensor:
        """`[T, P]` -> `[T, D]`, with two more dimensions of 1 where a convolution was called."""
        module, window = self.patch_embedding, self._window
        if window is None:
            return module(pixel_values)  # type: ignore[no-any-return]
        if type(module) is nn.Conv2d and plain.unhooked(module) and not _has_any_global_hook():  # rows are its windows
            return F.linear(pixel_values, module.weight.permute(0, 2, 3, 1).flatten(1), module.bias)
        return module(pixel_values.unflatten(1, window).permute(0, 3, 1, 2))  # type: ignore[no-any-return]

    @torch.compiler.disable
    def resize_mode(self, grids: Sequence[tuple[int, int, int]]) -> str:
        """How the table gets to these grids; as any mode would where all of them are its own size.

        Raises:
            ValueError: a grid of another size, where the position mode is that there is none.
        """
        if self.position_mode == ANTIALIASED:
            return ANTIALIASED
        table: Any = getattr(self.position_embedding, "base_layer", self.position_embedding)  # of an adapter
        side = math.isqrt(table.num_embeddings)
        other = next((i for i, (_, h, w) in enumerate(grids) if not h == w == side), None)
        if other is None:
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
    """Whether a hook sees to it that what the module gives requires a gradient.

    `enable_input_require_grads` hangs it on all of a VLM, for layers that learn under reentrant checkpointing; a frozen
    tower would keep all its activations.
    """
    return any(map(makes_inputs_require_grad, module._forward_hooks.values()))


def makes_inputs_require_grad(hook: Any) -> bool:
    """Whether it is that of `enable_input_require_grads`, transformers' or PEFT's."""
    return getattr(hook, "__name__", "").startswith("make_inputs_require_grad")
