"""The packed tower in the place of those of transformers' that take images `[N, C, H, W]`: of one size in a call, or in
Idefics2 of several, padded to one.

Shapes: N images, h and w patches of each, padding included, T patches of all of them without it, D hidden size.
"""

from __future__ import annotations

import math
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Siglip2VisionConfig
from transformers.modeling_outputs import ModelOutput
from transformers.models.idefics2 import modeling_idefics2
from transformers.models.idefics3 import modeling_idefics3
from transformers.models.siglip import modeling_siglip
from transformers.models.smolvlm import modeling_smolvlm

from siglip2_packed.attention import Siglip2PackedAttention
from siglip2_packed.embeddings import Siglip2PackedEmbeddings
from siglip2_packed.encoder import Siglip2PackedEncoder, Siglip2PackedEncoderLayer, Siglip2PackedMLP
from siglip2_packed.handover import Twins
from siglip2_packed.kinds import num_patches
from siglip2_packed.layout import to_host
from siglip2_packed.ops.runtime.transfer import to_device
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
    @torch.compiler.disable(recursive=False)  # as the model's
    def _encoded(
        self,
        images: Tensor,
        marks: np.ndarray,
        output_hidden_states: Any,
        output_attentions: bool | None,
        return_dict: bool | None,
    ) -> ModelOutput | tuple:
        """`[N, C, H, W]` -> `last_hidden_state [N, h·w, D]`, hidden states of that form, and `pooler_output [N, D]`.

        marks: `[N, h, w]` booleans, true at an image's own patches, a rectangle at the top left.
        """
        n, h, w = marks.shape
        patch: Any = self.config.patch_size
        pixel_values = patchify(images[..., : h * patch, : w * patch], patch)
        if not marks.all():
            own = to_device(torch.from_numpy(np.flatnonzero(marks)), images.device)
            pixel_values = pixel_values.index_select(0, own)
        grids = [(1, int(m[:, 0].sum()), int(m[0].sum())) for m in marks]
        marks = marks.reshape(n, h * w)
        return self.run(pixel_values, grids, marks, output_hidden_states, output_attentions, return_dict)

    def _marks(self, images: Any) -> np.ndarray:
        """Those of images without padding."""
        h, w = self._grid(images)
        return np.ones((len(images), h, w), dtype=bool)

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
        marks = self._marks(pixel_values)
        return self._encoded(pixel_values, marks, output_hidden_states, output_attentions, return_dict)


class IdeficsPackedVisionTower(PackedImageTower):
    """In the place of Idefics3's tower.

    Attributes:
        padding: whether images may have some. What is behind the tower must not read it, as it comes back as zeros.
    """

    padding = False
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
            patch_attention_mask: `[N, h, w]`, true at an image's own patches; None: all are.

        Raises:
            ValueError: a mask that leaves out patches, where `padding` may not be; `output_attentions`.
        """
        if grid_thw is not None:
            return self.packed(pixel_values, grid_thw, output_hidden_states, output_attentions, return_dict, kwargs)
        marks = self._marks(pixel_values)
        if patch_attention_mask is not None:
            marks = _read_mask(patch_attention_mask, marks.shape, self.padding)
        return self._encoded(pixel_values, marks, output_hidden_states, output_attentions, return_dict)


class Idefics2PackedVisionTower(IdeficsPackedVisionTower):
    """In the place of Idefics2's tower, whose connector has padding masked."""

    padding = True
    twins = _twins(
        modeling_idefics2,
        "Idefics2VisionEmbeddings",
        "Idefics2Encoder",
        "Idefics2EncoderLayer",
        "Idefics2VisionAttention",
        "Idefics2VisionMLP",
    )


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
def _read_mask(mask: Any, expected: tuple[int, ...], padding: bool) -> np.ndarray:
    """`[N, h, w]` booleans, with one device-to-host copy."""
    marks = to_host(patch_attention_mask=torch.as_tensor(mask).bool().long())[0].astype(bool)
    if marks.shape != expected:
        raise ValueError(f"patch_attention_mask is {list(marks.shape)}, pixel_values have {list(expected)} patches")
    for i, image in enumerate(marks):
        if not padding and not image.all():
            raise ValueError(
                f"patch_attention_mask: image {i} has {image.sum()} of {image.size} patches. The connector joins those "
                "beyond it with its own, and only transformers' tower computes them: give images without padding "
                "(do_image_splitting=True; else, all of one size), or restore the tower"
            )
        h, w = image[:, 0].sum(), image[0].sum()
        if not image[:h, :w].all() or image.sum() != h * w or not h:
            raise ValueError(
                f"patch_attention_mask: the {image.sum()} patches of image {i} are no rectangle at the top left: pad "
                "images at the right and at the bottom, and leave out those that are nothing but padding"
            )
    return marks


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
    modeling_idefics2.Idefics2VisionTransformer: Idefics2PackedVisionTower,
    modeling_idefics3.Idefics3VisionTransformer: IdeficsPackedVisionTower,
    modeling_smolvlm.SmolVLMVisionTransformer: SmolVLMPackedVisionTower,
}
"""What stands in the place of which class of transformers."""
