"""The tower of LLaVA's forks that take squares of one size: LLaVA-NeXT's `SigLipVisionTower`, on a NaFlex checkpoint.

Shapes: B images, N = side² patches of each, C channels, S pixels a side, P patch_dim, D hidden size.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature

from siglip2_packed.llava import SigLip2NaflexVisionTower
from siglip2_packed.llava_inputs import ImagePack
from siglip2_packed.preprocess import Siglip2PackedImageProcessor
from siglip2_packed.processor_files import SETTINGS, UNSAVED, positive_int


class SigLipImageProcessor(Siglip2PackedImageProcessor):
    """Every image, whatever its shape, becomes the square of the patch budget; with the checkpoint's own settings.

    Raises:
        ValueError: as `Siglip2PackedImageProcessor`; a budget that is no square.

    Examples:
        >>> import numpy as np
        >>> from siglip2_packed import SigLipImageProcessor
        >>> processor = SigLipImageProcessor(patch_size=16, max_num_patches=256)
        >>> processor(np.zeros((480, 640, 3), np.uint8))["pixel_values"].shape
        torch.Size([1, 3, 256, 256])
    """

    def __call__(self, images: Any, return_tensors: str | None = None) -> BatchFeature:  # type: ignore[override]
        """One image, a list of them or a 4-D array of frames -> `pixel_values [B, C, S, S]`, float32."""
        packed = super().__call__(images, return_tensors=return_tensors)
        side, p = self.side, self.patch_size
        squares = rearrange(
            packed["pixel_values"], "(b h w) (py px c) -> b c (h py) (w px)", h=side, w=side, py=p, px=p
        )
        return BatchFeature({"pixel_values": squares.contiguous()})

    preprocess = __call__  # type: ignore[assignment]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """What every image is resized to."""
        return self.side, self.side

    @property
    def side(self) -> int:
        """Patches a side.

        Raises:
            ValueError: `max_num_patches` is no square.
        """
        side = math.isqrt(self.max_num_patches)
        if side * side != self.max_num_patches:
            raise ValueError(
                f"a fixed-size tower needs a square of patches, and max_num_patches is {self.max_num_patches}: pass "
                f"image_size, a multiple of patch_size {self.patch_size}"
            )
        return side

    @property
    def size(self) -> dict[str, int]:
        """Pixels, by every name that LLaVA's forks know."""
        pixels = self.side * self.patch_size
        return {"height": pixels, "width": pixels, "shortest_edge": pixels}

    @property
    def crop_size(self) -> dict[str, int]:
        return self.size


class SigLipVisionTower(SigLip2NaflexVisionTower):
    """LLaVA-NeXT's `SigLipVisionTower`, and its relatives' in Bunny and LLaVA-MORE: squares in, `[B, N, D]` out.

    As `SigLip2NaflexVisionTower`, but for what these forks rely on: images come as pixels of one square size, features
    leave in the images' dtype, `image_processor` makes such images, and `config` has an `image_size`. Weights begin
    frozen, as theirs do; a training script that names the tower (`mm_tunable_parts`, `unfreeze_mm_vision_tower`) turns
    them on. Theirs ignore `mm_vision_select_layer`; here it decides, and the default, -2, is what they give.

    Args:
        vision_tower: as of `SigLip2NaflexVisionTower`.
        vision_tower_cfg: likewise.
        delay_load: likewise.
        image_size: S, a multiple of the patch size; None: the square of the checkpoint's patch budget. `anyres` of
            LLaVA-NeXT with a range such as `(1x1),...,(6x6)` takes 224, 336, 384, 448 and 512 only.
        cuda_graphs: as of `SigLip2NaflexVisionTower`.
        batch_invariant: likewise.
        args: another name of `vision_tower_cfg`.

    Raises:
        ValueError: as there; `image_size` is not a multiple of the patch size, or the budget no square.

    Examples:
        >>> import torch
        >>> from siglip2_packed import SigLipVisionTower
        >>> tower = SigLipVisionTower("google/siglip2-so400m-patch16-naflex", image_size=96)
        >>> tower(torch.zeros(2, 3, 96, 96)).shape == (2, 36, tower.hidden_size)
        True
    """

    def __init__(
        self,
        vision_tower: str | os.PathLike,
        vision_tower_cfg: Any = None,
        delay_load: bool = False,
        image_size: int | None = None,
        cuda_graphs: bool = False,
        batch_invariant: bool = False,
        *,
        args: Any = None,
    ):
        cfg = args if vision_tower_cfg is None else vision_tower_cfg
        super().__init__(vision_tower, cfg, delay_load, cuda_graphs, batch_invariant)
        self.image_processor: SigLipImageProcessor = _squares(self.image_processor, image_size)
        self.config.image_size = self.image_processor.size["height"]
        self.requires_grad_(False)

    @torch.compiler.disable(recursive=False)  # as the base's
    def forward(self, images: Tensor | list[Tensor] | ImagePack) -> Any:  # type: ignore[override]
        """`[B, C, S, S]`, normalised -> `[B, N, D]`; a list of `[C, S, S]` -> a list of `[1, N, D]`; in their dtype.

        Raises:
            RuntimeError: no weights yet.
            ValueError: images of another size, or not normalised.
        """
        pack = images if isinstance(images, ImagePack) else self.pack(images)
        features = self._encode(pack).to(pack.pixel_values.dtype)
        return features if pack is images else pack.restore(features)

    @torch.compiler.disable
    def pack(self, images: Any, grid_thw: Any = None, patch_positions: Any = None) -> ImagePack:
        """What `forward` takes, as the one pack that it makes of it."""
        side, p, naflex = self.image_processor.side, self.image_processor.patch_size, SigLip2NaflexVisionTower.__name__
        if grid_thw is not None or patch_positions is not None:
            raise ValueError(
                f"a fixed-size tower takes squares of {side}x{side} patches, without grid_thw and patch_positions: "
                f"images of their own sizes are {naflex}'s"
            )
        listed, square = isinstance(images, (list, tuple)), [self.config.num_channels, side * p, side * p]
        for image in images if listed else [images]:
            found = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
            if found[not listed :] != square:
                raise ValueError(
                    f"a fixed-size tower takes a tensor [B, {str(square)[1:]} or a list of {square}, as its "
                    f"image_processor makes them, got {'a list with ' * listed}{found}: callers take features for "
                    f"{side}x{side} squares. Images of their own sizes are {naflex}'s"
                )
            if not image.is_floating_point():
                raise ValueError(f"images must be floating (normalised pixels), got {image.dtype}")
        if listed:
            images = torch.stack(images) if images else torch.zeros(0, *square, device="cpu")
        patches = rearrange(images, "b c (h py) (w px) -> b (h w) (py px c)", py=p, px=p)
        return super().pack([*patches[:, None]] if listed else patches, [(1, side, side)] * len(patches))


def _squares(processor: Siglip2PackedImageProcessor, image_size: int | None) -> SigLipImageProcessor:
    """The processor of a NaFlex checkpoint as one of squares of `image_size`, or of its budget."""
    settings = {name: getattr(processor, name) for name in (*SETTINGS, *UNSAVED)}
    if image_size is not None:
        side, rest = divmod(positive_int("image_size", image_size), processor.patch_size)
        if rest:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {processor.patch_size}")
        settings["max_num_patches"] = side * side
    return SigLipImageProcessor(**{**settings, "do_resize": True})
