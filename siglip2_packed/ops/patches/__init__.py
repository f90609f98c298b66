"""Decoded images -> patches: turned upright, resized to Pillow's pixels bit for bit, cut. `eager` is the contract;
`triton` takes three launches for any number of images of any sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from siglip2_packed.ops.patches.pillow import ORDERS
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.check import Results
from siglip2_packed.ops.runtime.choice import Function

__all__ = ["CUT", "ORDERS", "Turn", "cutter"]

MODULES = {"eager": "siglip2_packed.ops.patches.eager", "triton": "siglip2_packed.ops.patches.triton"}


class Turn(NamedTuple):
    """What brings an image upright: its sides are exchanged, then it is mirrored."""

    sideways: bool = False
    down: bool = False
    """Mirrored top to bottom."""
    across: bool = False


Box = tuple[float, float, float, float]
"""(left, top, right, bottom) of the picture among an upright image's pixels, in pixels, multiples of 1/8: a JPEG file
that is decoded at a scale of its own has its sides rounded up."""


def _cases(device: torch.device, dtype: torch.dtype, patch_size: int, mode: str) -> Iterator[tuple]:
    """Smaller and larger, of one pixel, turned; not all of them contiguous."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    sizes = [(23, 37), (5, 3), (1, 1), (1, 30), (101, 1), (61, 27)]
    noise = [torch.randint(0, 256, (3, *size), dtype=dtype, generator=generator).to(device) for size in sizes]
    images = [noise[0], noise[0][:, 1:, 2:31], *noise[1:], *[noise[-1]] * 3]
    turns = [Turn(i & 1 == 1, i & 2 == 2, i & 4 == 4) for i in range(len(images))]
    boxes: list[Box | None] = [(0, 0.5, 36.75, 22.125), *[None] * (len(images) - 2), (0.875, 0, 60.25, 27)]
    grids = [(1 + i % 3, 1 + i % 2) for i in range(len(images))]
    for order in ORDERS:
        yield images, turns, boxes, grids, patch_size, mode, order


def _cut(function: Callable, *case) -> Results:
    return {"patches": function(*case).double()}


CUT = Function("patches.cut", MODULES, _cut, _cases)


Cut = Callable[[list[Tensor], list[Turn], Sequence[Box | None], list[tuple[int, int]]], Tensor]
"""Pixels as stored, `[3, height, width]` uint8 each, and (h, w) -> `[T, P]` uint8 patches of all: `patches.eager`."""


def cutter(device: torch.device, patch_size: int, mode: str, order: str = ORDERS[0]) -> Cut:
    function = choice.take(CUT, choice.rows(choice.card(device), torch.uint8), device, torch.uint8, patch_size, mode)
    return partial(function, patch_size=patch_size, mode=mode, order=order)
