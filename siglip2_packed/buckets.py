"""Packs of one bucket have a CUDA graph in common: as many rows and segments at most, segments as long at most.

Shapes: N images, T patches, S segments, P patch_dim; a bucket's are B patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from siglip2_packed.layout import Layout
from siglip2_packed.ops.positions import Places
from siglip2_packed.ops.runtime.transfer import STAGED
from siglip2_packed.ops.segments import Segments

BUDGETS = (*range(64, 512, 64), *range(512, 1024, 128), *range(1024, 2048, 128), *range(2048, 4097, 256))
"""Rows of the buckets that are made if nobody says: each at most an eighth larger than the one before, from 1024 on."""
LENGTHS = (64, 128, 256)
"""Upper bounds of a bucket's longest segment, by which attention's kernels differ; else a segment may fill it."""


class Bucket(NamedTuple):
    patches: int
    segments: int
    """Of images there may be as many."""
    max_seqlen: int


def bucket_of(layout: Layout, budgets: Sequence[int]) -> Bucket | None:
    """The smallest bucket, of ascending budgets, that a pack fits; None for a pack beyond all, or without rows."""
    total = sum(layout.lengths)
    budget = next((x for x in budgets if total <= x), None)
    if budget is None or total == 0:
        return None
    longest = next((x for x in LENGTHS if layout.max_seqlen <= x < budget), budget)
    segments = 1
    while segments < max(len(layout.lengths), len(layout.grids)):
        segments *= 4
    return Bucket(budget, segments, longest)


class Metadata:
    """Where everything lies in a pack that is in a bucket, in the device's memory, where graphs read it.

    Rows beyond the pack belong to no segment and to no image; segments and images beyond its own have no rows.
    """

    def __init__(self, bucket: Bucket, device: torch.device):
        self._sizes = bucket.segments + 1, bucket.segments + 1, 4 * bucket.segments, bucket.patches
        self._there = torch.zeros(sum(self._sizes), dtype=torch.int32, device=device)
        self._layout: Layout | None = None
        cu_seqlens, cu_images, images, image_of_row = self._there.split(self._sizes)
        self.segments = Segments.on_device(cu_seqlens, bucket.max_seqlen)
        self.images = Segments.on_device(cu_images, bucket.patches)
        self.places = Places.on_device(images.view(-1, 4), image_of_row)

    def fill(self, layout: Layout) -> None:
        """One copy, in the order of the current stream, which the host does not wait for."""
        if layout == self._layout:
            return
        host = torch.zeros(len(self._there), dtype=torch.int32, device="cpu", pin_memory=self._there.nbytes >= STAGED)
        cu_seqlens, cu_images, images, image_of_row = (part.numpy() for part in host.split(self._sizes))
        lengths = np.array(layout.image_lengths)
        ends, n = lengths.cumsum(), len(lengths)
        total = ends[-1]
        cu_seqlens[1:] = cu_images[1:] = total
        cu_seqlens[1 : len(layout.lengths) + 1] = np.cumsum(layout.lengths)
        cu_images[1 : n + 1] = ends
        images = images.reshape(-1, 4)
        images[:n, 0] = ends - lengths
        images[:n, 1:] = layout.grids
        image_of_row[:total] = np.repeat(np.arange(n), lengths)
        image_of_row[total:] = -1
        self._there.copy_(host, non_blocking=True)
        self._layout = layout
