"""Images turned, resized and cut one by one."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from siglip2_packed.ops.patches.pillow import PRECISION, SUPPORTS, height_first, taps


def cut(
    images: list[Tensor],
    turns: list,
    boxes: list,
    grids: list[tuple[int, int]],
    patch_size: int,
    mode: str,
    order: str,
) -> Tensor:
    """`[T, P]` uint8, each patch `(py, px, c)`, of images `[3, height, width]` uint8 as stored.

    Each is turned upright (`Turn`) and what is in its `Box` resized as Pillow does (Resample.c), bit for bit:
    antialiased, by `mode` (bilinear or bicubic), one side after the other, each time with weights of 22 bits and
    rounded to 8.

    Args:
        boxes: of each, upright; None is all of it.
        grids: (h, w) patches of each, upright.
        order: which side comes first, of `pillow.ORDERS`.
    """
    p = patch_size
    found = []
    for image, turn, box, (h, w) in zip(images, turns, boxes, grids):
        levels, (height, width) = upright(image, turn), (h * p, w * p)
        left, top, right, bottom = box or (0, 0, levels.shape[2], levels.shape[1])
        across, down = (width, mode, left, right), (height, mode, top, bottom)
        if height_first(order, (levels.shape[1], height), (levels.shape[2], width)):
            levels = resized(resized(levels.mT, *down).mT, *across)  # [3, h·p, w·p]
        else:
            levels = resized(resized(levels, *across).mT, *down).mT
        found.append(rearrange(levels, "c (h py) (w px) -> (h w) (py px c)", py=p, px=p))
    return torch.cat(found)


def upright(image: Tensor, turn) -> Tensor:
    """`[c, h, w]`"""
    mirrored = [1] * turn.down + [2] * turn.across
    image = image.transpose(1, 2) if turn.sideways else image
    return image.flip(mirrored) if mirrored else image


def resized(levels: Tensor, size: int, mode: str, begin: float, end: float) -> Tensor:
    """`[..., length]` uint8 -> `[..., size]`, of the picture from `begin` to `end`."""
    length = levels.shape[-1]
    first, weights = filters(length, size, mode, begin, end, levels.device)
    total = torch.full((*levels.shape[:-1], size), 1 << PRECISION - 1, dtype=torch.int32, device=levels.device)
    for k, weight in enumerate(weights):
        total += levels[..., (first + k).clamp(max=length - 1)] * weight
    return (total >> PRECISION).clamp_(0, 255).to(torch.uint8)


def filters(length: int, size: int, mode: str, begin: float, end: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each of `size` pixels made of `length`: the first that counts `[size]`, and the weights of those from there on
    `[taps, size]` int32, beyond the last that counts 0. In float64 and in Pillow's order, as a weight may be a half.
    """
    ratio = (end - begin) / size
    stretched = max(ratio, 1.0)
    support = SUPPORTS[mode] * stretched
    middle = (torch.arange(size, dtype=torch.float64, device=device) + 0.5) * ratio + begin
    first = (middle - support + 0.5).long().clamp(min=0)
    past = (middle + support + 0.5).long().clamp(max=length)
    place = first + torch.arange(taps(end - begin, size, mode), device=device)[:, None]
    weights = torch.where(place < past, weight((place - middle + 0.5) * (1 / stretched), mode), 0.0)
    total = torch.zeros_like(middle)
    for some in weights:
        total += some
    weights = weights / total * (1 << PRECISION)
    return first, (weights + torch.where(weights < 0, -0.5, 0.5)).int()


def weight(x: Tensor, mode: str) -> Tensor:
    """The filter, bilinear or bicubic with a = -0.5."""
    x = x.abs()
    if mode == "bilinear":
        return torch.where(x < 1, 1 - x, 0.0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
