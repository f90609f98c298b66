"""Where in their images the rows of a pack lie.

Shapes: N images, T patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from siglip2_packed.ops.runtime.check import Refused
from siglip2_packed.ops.runtime.transfer import to_device

Grids = Sequence[tuple[int, int, int]]
ANTIALIASED = "bilinear_antialias"
"""How NaFlex resizes the table. At the table's own size every mode is the identity, this one's kernels included."""


class Places:
    """The place of each row: all patches of images of these grids in raster order, or those that `ids` names.

    Attributes:
        grids: (t, h, w) of each image; frames of a video share their image's positions.
        ids: `[T]`, the patch that each row is of those that the grids cover; None: all, in order.
        mode: how the table gets to the size of a grid, one of `eager.WEIGHTS`.
    """

    def __init__(self, grids: Grids, ids: Tensor | None = None, mode: str = ANTIALIASED):
        self._grids: tuple | None = tuple(grids)
        self.ids, self.mode = ids, mode
        self._known: tuple[Tensor, Tensor] | None = None

    @classmethod
    def on_device(cls, images: Tensor, image_of_row: Tensor) -> Places:
        """Places that only the device knows, as `on` gives them: images may be unused, all zeros, and rows of none."""
        self = cls(())
        self._grids, self._known = None, (images, image_of_row)
        return self

    @property
    def grids(self) -> Grids:
        if self._grids is None:
            raise Refused("only the device knows these grids, and the kernel that reads them there was refused")
        return self._grids

    @property
    def padded(self) -> bool:
        """Whether there may be rows of no image."""
        return self._known is not None

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """First row, t, h and w of each image `[N, 4]`, the image of each row `[T]` or -1; int32, copied at once."""
        if self._known is not None:
            return self._known
        n, both = len(self.grids), to_device(torch.from_numpy(_places(tuple(self.grids))), device)
        return both[: 4 * n].view(n, 4), both[4 * n :]


@lru_cache(maxsize=8)
def _places(grids: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    t, h, w = np.array(grids, dtype=np.int64).reshape(-1, 3).T
    rows = t * h * w
    images = np.stack([starts(rows), t, h, w], axis=1)
    image_of_row = np.repeat(np.arange(len(grids)), rows)
    return np.concatenate([images.ravel(), image_of_row]).astype(np.int32)


def starts(counts: np.ndarray) -> np.ndarray:
    """Where each of some runs, end to end, begins."""
    return np.cumsum(counts) - counts


def ranges(counts: np.ndarray) -> np.ndarray:
    """0..c-1 for every count c, end to end."""
    return np.arange(counts.sum()) - np.repeat(starts(counts), counts)
