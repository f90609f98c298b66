"""The packed model over the weights of a tower of transformers, in its place, and called as that one is.

A padded batch is packed, run and padded again: one pass over `last_hidden_state`, none where images fill their rows.

Shapes: N images, T patches of all of them, P patch_dim, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Siglip2VisionConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.siglip2 import modeling_siglip2

from siglip2_packed.attention import Siglip2PackedAttention, attention_name, head_dim
from siglip2_packed.checkpoints import not_partitioned
from siglip2_packed.configuration import patch_dim
from siglip2_packed.embeddings import Siglip2PackedEmbeddings
from siglip2_packed.encoder import Siglip2PackedEncoder, Siglip2PackedEncoderLayer, Siglip2PackedMLP
from siglip2_packed.handover import HOOKS, Twins, hand_over
from siglip2_packed.kinds import num_patches
from siglip2_packed.layout import Grid, to_host
from siglip2_packed.llava_inputs import ImagePack, pack_images
from siglip2_packed.modeling import Siglip2PackedVisionModel
from siglip2_packed.ops.attention import ATTN_IMPLEMENTATIONS, VarlenAttention
from siglip2_packed.ops.runtime.transfer import to_device
from siglip2_packed.ops.segments import Segments
from siglip2_packed.pooling import PoolingAttention, Siglip2PackedPoolingHead

CALLED = {"forward", "_old_forward", "_hf_hook"}
"""What a module has of its own where accelerate has placed it."""


class PackedTower(Siglip2PackedVisionModel):
    """What all towers have in common that take another's place; `of` makes one. A subclass has the `forward` of the
    tower that was there, which makes a pack of what it is given, for `run`.

    Attributes:
        twins: the class of transformers' module for each of ours that stands in the place of one.
        original: the tower that was there, in a tuple, so that it is no module of this one.
        config: the original's, the same object.
    """

    twins: Twins
    original: tuple[Any, ...] = ()

    @classmethod
    def of(cls, original: Any, name: str) -> PackedTower:
        """ValueError for what cannot be carried over. The original has not changed, then or otherwise."""
        cls.check(original, name)
        with torch.device("meta"), not_partitioned():
            tower = cls(cls.config_of(original))
        _check_settings(original, name or "the model")
        hand_over(original, tower, cls.twins, name)
        own = vars(tower)
        own |= {key: vars(original)[key] for key in HOOKS}  # what is hung on one, or removed, is so on the other
        own |= {key: value for key, value in vars(original).items() if key not in own and key not in CALLED}
        own["_is_full_backward_hook"] = original._is_full_backward_hook
        tower._load_state_dict_pre_hooks.update(original._load_state_dict_pre_hooks)
        tower.original = (original,)
        return tower

    @classmethod
    def check(cls, tower: Any, name: str) -> None:
        """ValueError for what one of both towers would compute otherwise than the other."""
        out_proj = tower.head.attention.out_proj if hasattr(tower, "head") else None
        if hasattr(out_proj, "base_layer"):
            raise ValueError(
                f"{name or 'the model'}: head.attention.out_proj is {type(out_proj).__name__} of an adapter, which "
                "nn.MultiheadAttention passes over and the packed tower does not: leave it out of target_modules"
            )

    @classmethod
    def config_of(cls, original: Any) -> Siglip2VisionConfig:
        """What the original is now: somebody may have taken out layers, or the head."""
        config = copy.deepcopy(original.config)
        config.num_hidden_layers = len(original.encoder.layers)
        config.vision_use_head, config.select_layer = hasattr(original, "head"), None
        if config._attn_implementation == "sdpa":  # transformers' default, which nobody need have asked for
            config._attn_implementation = attention_name("auto")
        return config

    def take_place(self) -> None:
        """From now on it is this tower that the configuration of both is about."""
        (original,) = self.original
        original.config._attn_implementation = self.config._attn_implementation
        self.config = original.config

    def give_back(self, name: str) -> nn.Module:
        """The original, with the weights and settings of now."""
        (original,) = self.original
        self.check(self, name)
        hand_over(self, original, {theirs: ours for ours, theirs in self.twins.items()}, name)
        original._is_full_backward_hook = self._is_full_backward_hook
        return original  # type: ignore[no-any-return]

    def leave_place(self) -> None:
        """From now on the configuration has a name that is transformers'."""
        self.config._attn_implementation = str(self.config._attn_implementation)

    def get_correct_attn_implementation(self, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        """What the model around it may have and this one not (`flex_attention`) changes nothing here."""
        own: str = self.config._attn_implementation
        return own if _is_foreign(requested_attention) and not _is_foreign(own) else attention_name(requested_attention)

    _check_and_adjust_attn_implementation = get_correct_attn_implementation  # type: ignore[assignment]

    def _attention(self, segments: Segments) -> VarlenAttention:
        if _is_foreign(self.config._attn_implementation):  # transformers 4 asks the module around it alone
            self.config._attn_implementation = attention_name("auto")
        return super()._attention(segments)  # type: ignore[no-any-return]

    def packed(
        self,
        pixel_values: Tensor,
        grid_thw: Any,
        output_hidden_states: Any,
        output_attentions: bool | None,
        return_dict: bool | None,
        others: Mapping[str, Any],
    ) -> ModelOutput | tuple:
        """A pack `[T, P]`, as `Siglip2PackedVisionModel` takes it."""
        self.check(self, "")
        return super().forward(
            pixel_values,
            grid_thw,
            output_hidden_states=None if output_hidden_states is None else bool(output_hidden_states),
            output_attentions=output_attentions,
            return_dict=return_dict,
            **others,
        )

    @torch.compiler.disable(recursive=False)  # as the model's
    def run(
        self,
        pixel_values: Tensor,
        grids: list[Grid],
        marks: np.ndarray,
        output_hidden_states: Any,
        output_attentions: bool | None,
        return_dict: bool | None,
    ) -> ModelOutput | tuple:
        """What a caller of transformers' tower reads, `[N, longest, D]`, of the pack `[T, P]` that his images are.

        marks: `[N, longest]` booleans, true where the pack's rows go, in their order; the others are zeros.
        """
        self.check(self, "")  # an adapter may have come since
        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wants_states = asked is not None and asked is not False
        out: Any = super().forward(
            pixel_values,
            grids,
            output_hidden_states=wants_states,
            output_attentions=output_attentions,
            return_dict=True,
        )

        def pad(x: Tensor) -> Tensor:
            return _pad(x, marks)

        states: Any = None
        if wants_states:
            wanted = _chosen(asked, len(out.hidden_states))
            states = tuple(pad(x) if i in wanted else None for i, x in enumerate(out.hidden_states))
        padded = BaseModelOutputWithPooling(pad(out.last_hidden_state), out.get("pooler_output"), states)  # type: ignore
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return padded if return_dict else padded.to_tuple()


def _is_foreign(name: str | None) -> bool:
    """Whether it is transformers' name (or of its hub, or a paged one) of what has no place in a tower."""
    known = name in ALL_ATTENTION_FUNCTIONS.valid_keys() or "|" in (name or "") or "/" in (name or "")
    return known and getattr(name, "requested", name) not in ATTN_IMPLEMENTATIONS


class Siglip2PackedVisionTower(PackedTower):
    """In the place of transformers' SigLIP2 NaFlex tower."""

    twins = {
        Siglip2PackedEmbeddings: modeling_siglip2.Siglip2VisionEmbeddings,
        Siglip2PackedEncoder: modeling_siglip2.Siglip2Encoder,
        nn.ModuleList: nn.ModuleList,
        Siglip2PackedEncoderLayer: modeling_siglip2.Siglip2EncoderLayer,
        Siglip2PackedAttention: modeling_siglip2.Siglip2Attention,
        Siglip2PackedMLP: modeling_siglip2.Siglip2MLP,
        Siglip2PackedPoolingHead: modeling_siglip2.Siglip2MultiheadAttentionPoolingHead,
        PoolingAttention: nn.MultiheadAttention,
    }

    @torch.compiler.disable(recursive=False)  # as the model's
    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Any = None,
        spatial_shapes: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        *,
        attention_mask: Any = None,
        grid_thw: Any = None,
        **kwargs: Any,
    ) -> ModelOutput | tuple:
        """As transformers' tower; a pack (`tower(**packed)`) as `Siglip2PackedVisionModel`.

        Args:
            pixel_values: `[N, max, P]`, an image's patches in its first h·w rows.
            pixel_attention_mask: `[N, max]`, which marks those rows; None: all are. `attention_mask` in transformers 4.
            spatial_shapes: `[N, 2]` integers (h, w).
            output_hidden_states: or which of them, as indices; the others are None then.
            kwargs: of no meaning here, as in transformers.

        Returns:
            `last_hidden_state [N, max, D]` and `hidden_states`, zeros in the rows beyond an image, and
            `pooler_output [N, D]`, None without a head.

        Raises:
            ValueError: mask and shapes that disagree; `output_attentions`.
        """
        if grid_thw is not None:
            return self.packed(pixel_values, grid_thw, output_hidden_states, output_attentions, return_dict, kwargs)
        mask = attention_mask if pixel_attention_mask is None else pixel_attention_mask
        pack = _pack(pixel_values, mask, spatial_shapes, patch_dim(self.config))
        marks = np.arange(pixel_values.shape[1]) < np.array(pack.counts)[:, None]
        return self.run(pack.pixel_values, pack.grids, marks, output_hidden_states, output_attentions, return_dict)


def _check_settings(tower: Any, name: str) -> None:
    """ValueError for what its modules compute otherwise than its configuration says."""
    entries = num_patches(tower.config)
    found = getattr(tower.embeddings.position_embedding, "num_embeddings", entries)
    if found != entries:
        raise ValueError(f"{name}: embeddings.position_embedding has {found} entries, its configuration says {entries}")
    for number, layer in enumerate(tower.encoder.layers):
        attention = getattr(layer, "self_attn", None)
        for setting, expected in {"scale": head_dim(tower.config) ** -0.5, "dropout": 0}.items():
            value = getattr(attention, setting, expected)
            if value != expected:
                raise ValueError(f"{name}: encoder.layers.{number}.self_attn.{setting} is {value}, expected {expected}")


@torch.compiler.disable
def _pack(pixel_values: Any, mask: Any, spatial_shapes: Any, patch_dim: int) -> ImagePack:
    """A padded batch without its padding; one device-to-host copy of mask and shapes."""
    if not isinstance(pixel_values, Tensor) or pixel_values.ndim != 3:
        got = list(pixel_values.shape) if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
        raise ValueError(f"pixel_values must be [N, max, P], got {got}; a pack [T, P] comes with its grid_thw")
    if spatial_shapes is None:
        raise ValueError("spatial_shapes are missing: [N, 2] rows of (h, w)")
    if mask is None:
        (shapes,) = to_host(spatial_shapes=spatial_shapes)
        pack = pack_images({"pixel_values": pixel_values, "spatial_shapes": shapes}, None, None, patch_dim)
        for i, count in enumerate(pack.counts):
            if count != pixel_values.shape[1]:
                raise ValueError(
                    f"image {i}: without pixel_attention_mask all {pixel_values.shape[1]} rows are patches, "
                    f"spatial_shapes cover {count}"
                )
        return pack
    mask = torch.as_tensor(mask).bool().long()
    shapes, marks = to_host(spatial_shapes=spatial_shapes, pixel_attention_mask=mask)
    batch = {"pixel_values": pixel_values, "spatial_shapes": shapes, "pixel_attention_mask": torch.from_numpy(marks)}
    return pack_images(batch, None, None, patch_dim)


@torch.compiler.disable
def _pad(rows: Tensor, marks: np.ndarray) -> Tensor:
    """`[T, D]` -> `[N, longest, D]`, zeros where `marks [N, longest]` are false; no copy where all are true."""
    if len(rows) == marks.size:
        return rows.unflatten(0, marks.shape)
    index = to_device(torch.from_numpy(np.flatnonzero(marks)), rows.device)
    return rows.new_zeros(marks.size, rows.shape[1]).index_copy_(0, index, rows).unflatten(0, marks.shape)


@torch.compiler.disable
def _chosen(asked: Any, count: int) -> set[int]:
    """Which of so many hidden states: all, or those of one index or several."""
    return set(range(count)) if asked is True else {int(i) % count for i in np.atleast_1d(asked) if -count <= i < count}
