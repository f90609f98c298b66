"""The packed tower in the place of those of transformers' that take images `[N, C, H, W]`: all of one size in a call.

Shapes: N images, h and w patches of each, T = N·h·w, D hidden size.
"""

from __future__ import annotations

import math
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Siglip2VisionConfig
from transformers.modeling_outputs import ModelOutput
from transformers.models.idefics3 import modeling_idefics3
from transformers.models.siglip import modeling_siglip
from transformers.models.smolvlm import modeling_smolvlm

from siglip2_packed.attention import Siglip2PackedAttention
from siglip2_packed.embeddings import Siglip2PackedEmbeddings
from siglip2_packed.encoder import Siglip2PackedEncoder, Siglip2PackedEncoderLayer, Siglip2PackedMLP
from siglip2_packed.handover import Twins
from siglip2_packed.kinds import num_patches
from siglip2_packed.layout import to_host
from siglip2_packed.packing import patchify
from siglip2_packed.pooling import PoolingAttention, Siglip2PackedPoolingHead
from siglip2_packed.towers import PackedTower

OURS = (
    Siglip2PackedEmbeddings,
    Siglip2PackedEncoder,
    Siglip2PackedEncoderLayer,
    Siglip2PackedAttention,
    Siglip2PackedMLP,
)


def _twins(module: ModuleType, *names: str) -> Twins:
    """transformers' classes of these names, for each of `OURS`."""
    return {nn.ModuleList: nn.ModuleList, **{ours: getattr(module, name) for ours, name in zip(OURS, names)}}


class PackedImageTower(PackedTower):
    def _encoded(
        self, images: Tensor, output_hidden_states: Any, output_attentions: bool | None, return_dict: bool | None
    ) -> ModelOutput | tuple:
        """`[N, C, H, W]` -> `last_hidden_state [N, h·w, D]`, hidden states of that form, and `pooler_output [N, D]`."""
        h, w = self._grid(images)
        patch: Any = self.config.patch_size
        pixel_values = patchify(images[..., : h * patch, : w * patch], patch)
        grids = [(1, h, w)] * len(images)
        return self.run(pixel_values, grids, h * w, output_hidden_states, output_attentions, return_dict)

    def _grid(self, images: Any) -> tuple[int, int]:
        """h and w; what is left of a patch at the right and at the bottom is none, as in a convolution."""
        patch: Any = self.config.patch_size
        channels = self.config.num_channels
        tensor = isinstance(images, Tensor)
        if not (tensor and images.ndim == 4 and images.shape[1] == channels and min(images.shape[2:]) >= patch):
            raise ValueError(
                f"pixel_values must be [N, {channels}, H, W] of at least {patch}x{patch} pixels, got "
                f"{list(images.shape) if tensor else type(images).__name__}; a pack [T, P] comes with its grid_thw"
            )
        return images.shape[2] // patch, images.shape[3] // patch


class SiglipPackedVisionTower(PackedImageTower):
    """In the place of SigLIP's fixed-size tower: PaliGemma's, Gemma 3's, LLaVA-OneVision's."""

    twins = {
        **_twins(
            modeling_siglip,
            "SiglipVisionEmbeddings",
            "SiglipEncoder",
            "SiglipEncoderLayer",
            "SiglipAttention",
            "SiglipMLP",
        ),
        Siglip2PackedPoolingHead: modeling_siglip.SiglipMultiheadAttentionPoolingHead,
        PoolingAttention: nn.MultiheadAttention,
    }

    @classmethod
    def config_of(cls, original: Any) -> Siglip2VisionConfig:
        config: Any = super().config_of(original)
        config.position_mode = "bicubic"  # which at the table's own size is as if there were none
        return config  # type: ignore[no-any-return]

    @torch.compiler.disable(recursive=False)  # as the model's
    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool | None = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        *,
        grid_thw: Any = None,
        **kwargs: Any,
    ) -> ModelOutput | tuple:
        """As transformers' tower; a pack (`tower(**packed)`) as `Siglip2PackedVisionModel` with bicubic positions.

        Raises:
            ValueError: images of another size than the position table's, without `interpolate_pos_encoding`;
                `output_attentions`.
        """
        if grid_thw is not None:
            return self.packed(pixel_values, grid_thw, output_hidden_states, output_attentions, return_dict, kwargs)
        side = math.isqrt(num_patches(self.config))
        h, w = self._grid(pixel_values)
        if not (interpolate_pos_encoding or h == w == side):
            raise ValueError(
                f"pixel_values have {h}x{w} patches, the position table {side}x{side}: pass "
                "interpolate_pos_encoding=True"
            )
        return self._encoded(pixel_values, output_hidden_states, output_attentions, return_dict)


class IdeficsPackedVisionTower(PackedImageTower):
    """In the place of Idefics3's tower."""

    twins = _twins(
        modeling_idefics3,
        "Idefics3VisionEmbeddings",
        "Idefics3Encoder",
        "Idefics3EncoderLayer",
        "Idefics3VisionAttention",
        "Idefics3VisionMLP",
    )

    @classmethod
    def check(cls, tower: Any, name: str) -> None:
        super().check(tower, name)
        embeddings: Any = cls.twins[Siglip2PackedEmbeddings]
        if not _right_buckets(embeddings, type(tower.config)):  # type: ignore[arg-type]
            raise ValueError(
                f"{name or 'the model'}: this transformers places patches one entry of the position table too low "
                "wherever the fraction is that of an entry, even in images of the table's own size: take transformers "
                "5, which places them as the checkpoint was trained, and as the packed tower does"
            )

    @torch.compiler.disable(recursive=False)  # as the model's
    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        patch_attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        *,
        grid_thw: Any = None,
        **kwargs: Any,
    ) -> ModelOutput | tuple:
        """As transformers' tower; a pack (`tower(**packed)`) as `Siglip2PackedVisionModel`.

        Args:
            patch_attention_mask: `[N, h, w]`, all of it true; None says so, too.

        Raises:
            ValueError: a mask that leaves out patches; `output_attentions`.
        """
        if grid_thw is not None:
            return self.packed(pixel_values, grid_thw, output_hidden_states, output_attentions, return_dict, kwargs)
        if patch_attention_mask is not None:
            _check_mask(patch_attention_mask, (len(pixel_values), *self._grid(pixel_values)))
        return self._encoded(pixel_values, output_hidden_states, output_attentions, return_dict)


class SmolVLMPackedVisionTower(IdeficsPackedVisionTower):
    """In the place of SmolVLM's tower."""

    twins = _twins(
        modeling_smolvlm,
        "SmolVLMVisionEmbeddings",
        "SmolVLMEncoder",
        "SmolVLMEncoderLayer",
        "SmolVLMVisionAttention",
        "SmolVLMVisionMLP",
    )


@torch.compiler.disable
def _check_mask(mask: Any, expected: tuple[int, int, int]) -> None:
    """One device-to-host copy."""
    (marks,) = to_host(patch_attention_mask=torch.as_tensor(mask).bool().long())
    if marks.shape != expected:
        raise ValueError(f"patch_attention_mask is {list(marks.shape)}, pixel_values have {list(expected)} patches")
    partial = next((i for i, image in enumerate(marks) if not image.all()), None)
    if partial is not None:
        raise ValueError(
            f"patch_attention_mask: image {partial} has {marks[partial].sum()} of {marks[partial].size} patches. The "
            "connector joins those beyond it with its own, and only transformers' tower computes them: give images "
            "without padding (do_image_splitting=True; else, all of one size), or restore the tower"
        )


@cache
def _right_buckets(embeddings: Any, config: Any) -> bool:
    """Whether transformers gives an image of the table's own size its positions in order."""
    sizes = dict(hidden_size=1, num_attention_heads=1, num_channels=1, image_size=2, patch_size=1)
    with torch.device("cpu"), torch.no_grad():
        probe: Any = embeddings(config(**sizes))
        nn.init.zeros_(probe.patch_embedding.weight)
        nn.init.zeros_(probe.patch_embedding.bias)
        probe.position_embedding.weight.copy_(torch.arange(4)[:, None])
        return probe(torch.zeros(1, 1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool)).flatten().tolist() == [0, 1, 2, 3]


_SIGLIP = getattr(modeling_siglip, "SiglipVisionTransformer", modeling_siglip.SiglipVisionModel)  # 4.57: inside
IMAGE_TOWERS: dict[type[nn.Module], type[PackedTower]] = {
    _SIGLIP: SiglipPackedVisionTower,
    modeling_idefics3.Idefics3VisionTransformer: IdeficsPackedVisionTower,
    modeling_smolvlm.SmolVLMVisionTransformer: SmolVLMPackedVisionTower,
}
"""What stands in the place of which class of transformers."""
