"""Images turned, resized and cut one by one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def cut(images: list[Tensor], turns: list, grids: list[tuple[int, int]], patch_size: int, mode: str) -> Tensor:
    """`[T, P]` uint8, each patch `(py, px, c)`, of images `[3, height, width]` uint8 as stored.

    Each is turned upright (`Turn`) and resized as Pillow does: antialiased, by `mode` (bilinear or bicubic), the width
    first; both times computed in float32 and rounded to 8 bits.

    Args:
        grids: (h, w) patches of each, upright.
    """
    p = patch_size
    found = []
    for image, turn, (h, w) in zip(images, turns, grids):
        levels = upright(image, turn)
        levels = _resize(_resize(levels, (levels.shape[1], w * p), mode), (h * p, w * p), mode)
        found.append(rearrange(levels, "c (h py) (w px) -> (h w) (py px c)", py=p, px=p))
    return torch.cat(found)


def upright(image: Tensor, turn) -> Tensor:
    """`[c, h, w]`"""
    mirrored = [1] * turn.down + [2] * turn.across
    image = image.transpose(1, 2) if turn.sideways else image
    return image.flip(mirrored) if mirrored else image


def _resize(pixels: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    found = F.interpolate(pixels[None].float(), size, mode=mode, antialias=True, align_corners=False)[0]
    return found.add_(0.5).floor_().clamp_(0, 255).to(torch.uint8)
