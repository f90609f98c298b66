"""Patches to hidden states: a linear projection plus the position table resized to each image's grid."""

from __future__ import annotations

from typing import Any

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
