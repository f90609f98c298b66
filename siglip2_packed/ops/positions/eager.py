"""The position table resized to all grids of a pack at once, by torch: the contract.

A resize is linear and separable: row r of an image of height h is a weighted sum of a few table rows, and so for
columns. The weights are computed on the host, the sums are two `embedding_bag`s over exactly the non-zero weights, so
the work follows the distinct (h, w), not the images.

Shapes: T patches, G side of the table, D hidden size.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2_packed.ops.positions.places import ANTIALIASED, Grids, Places, ranges, starts
from siglip2_packed.ops.runtime.tracing import transformed
from siglip2_packed.ops.runtime.transfer import to_device


class Plan(NamedTuple):
    """Weighted sums of table rows, as `embedding_bag` takes them."""

    taps: Any
    """Rows to sum, those of one output after another."""
    offsets: Any
    """Where each output's taps begin."""
    weights: Any


def add_positions(patches: Tensor, table: Tensor, places: Places, dtype: torch.dtype) -> Tensor:
    """Every patch plus the position of its place; differentiable.

    Args:
        patches: `[T, D]`.
        table: `[G·G, D]`; resized in float32, then cast to `dtype`, then added.

    Returns:
        `[T, D]` in the wider of both dtypes: under autocast the residual stream stays in float32.
    """
    return patches + resize_positions(table, places.grids, places.ids, places.mode).to(dtype)


def resize_positions(table: Tensor, grids: Grids, ids: Tensor | None = None, mode: str = ANTIALIASED) -> Tensor:
    """Position embeddings of every patch of a pack.

    Computed in float32; bit-exact identity at (G, G). Frames of a video share their image's positions.

    Args:
        table: `[G·G, D]`, any floating dtype; differentiable.
        grids: (t, h, w) of each image.
        ids: `[T]`, of those of all patches, in which order; None: all of them.
        mode: what the resize is the same as, at each (h, w), `"bilinear_antialias"`:
            `F.interpolate(mode="bilinear", align_corners=False, antialias=True)`; `"bicubic"`:
            `F.interpolate(mode="bicubic", align_corners=False)`; `"bucketed"`: row r of h has the table's row ⌊r·G/h⌋,
            and so for columns, as NaViT's fractional coordinates in G buckets.

    Returns:
        `[T, D]` float32, T = sum of t·h·w where there are no ids.
    """
    side = int(table.shape[0] ** 0.5)
    assert side * side == table.shape[0], "the position table is not square"
    rows_plan, cols_plan, patches = _plan(side, tuple(grids), mode)
    rows = _weighted_sums(table.float().reshape(side, -1), rows_plan)
    distinct = _weighted_sums(rows.reshape(-1, table.shape[1]), cols_plan)
    order = None if patches is None else to_device(torch.from_numpy(patches), table.device)
    if ids is not None:
        ids = to_device(ids, table.device)
        order = ids if order is None else order[ids]
    return distinct if order is None else distinct[order]


def _weighted_sums(table: Tensor, plan: Plan) -> Tensor:
    taps, offsets, weights = (to_device(torch.from_numpy(x), table.device) for x in plan)
    if len(taps) == 0:
        return table[:0]
    if not transformed():
        return F.embedding_bag(taps, table, offsets, mode="sum", per_sample_weights=weights)
    counts = np.diff(plan.offsets, append=len(plan.taps))  # the same, by operators that torch.func has rules for
    output = to_device(torch.from_numpy(np.repeat(np.arange(len(counts)), counts)), table.device)
    return table.new_zeros(len(counts), table.shape[1]).index_add(0, output, table[taps] * weights[:, None])


@lru_cache(maxsize=8)
def _plan(side: int, grids: Grids, mode: str) -> tuple[Plan, Plan, np.ndarray | None]:
    """The row sums, the column sums of those rows, and the distinct patch of every patch of the pack.

    Arrays, not tensors, which the mode that they are made in (inference, fake) would stick to.
    """
    shapes = np.array(list(dict.fromkeys((h, w) for _, h, w in grids)), dtype=np.int64).reshape(-1, 2)
    heights, row_of_height = np.unique(shapes[:, 0], return_inverse=True)
    widths, col_of_width = np.unique(shapes[:, 1], return_inverse=True)
    row_taps, row_counts, row_weights = _taps(side, heights, mode)
    col_taps, col_counts, col_weights = _taps(side, widths, mode)

    # every distinct patch: which resized row it lies in, which column position it has
    area = shapes[:, 0] * shapes[:, 1]
    shape_of, within = np.repeat(np.arange(len(shapes)), area), ranges(area)
    first_row, first_col = starts(heights)[row_of_height], starts(widths)[col_of_width]
    row = first_row[shape_of] + within // shapes[shape_of, 1]
    col = first_col[shape_of] + within % shapes[shape_of, 1]

    counts = col_counts[col]
    tap = np.repeat(starts(col_counts)[col], counts) + ranges(counts)
    rows_plan = Plan(row_taps, starts(row_counts), row_weights)
    cols_plan = Plan(np.repeat(row, counts) * side + col_taps[tap], starts(counts), col_weights[tap])
    return rows_plan, cols_plan, _patches_of(grids, shapes, area)


def _taps(side: int, targets: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Non-zero weights for every index of every target size.

    Returns:
        Source indices and float32 weights of all taps, and how many each (target, i) has.
    """
    weights = WEIGHTS[mode](side, np.repeat(targets, targets)[:, None], ranges(targets)[:, None])
    weights = np.where(abs(weights) > 1e-12, weights, 0)
    weights /= weights.sum(axis=1, keepdims=True)
    index, tap = np.nonzero(weights)
    return tap, np.bincount(index, minlength=len(weights)), weights[index, tap].astype(np.float32)


# How much of each table entry `[side]` index i of a target size takes, not normalised.


def _triangle(side: int, target: np.ndarray, i: np.ndarray) -> np.ndarray:
    """A triangle of half-width max(side / target, 1) around the half-pixel centre (i + 0.5) · side / target: the filter
    of torch's and Pillow's antialiased bilinear resize."""
    scale = side / target
    distance = np.abs(np.arange(side) + 0.5 - (i + 0.5) * scale)
    return np.maximum(1 - distance / np.maximum(scale, 1), 0)


def _cubic(side: int, target: np.ndarray, i: np.ndarray) -> np.ndarray:
    """Keys' convolution with a = -0.75 around the same centre; entries beyond the edge are those at it."""
    distance = np.abs(np.arange(-2, side + 2) + 0.5 - (i + 0.5) * side / target)
    inner = (1.25 * distance - 2.25) * distance**2 + 1
    outer = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
    weights = np.where(distance <= 1, inner, np.where(distance < 2, outer, 0))
    within = weights[:, 2:-2]
    within[:, 0] += weights[:, :2].sum(axis=1)
    within[:, -1] += weights[:, -2:].sum(axis=1)
    return within


def _bucket(side: int, target: np.ndarray, i: np.ndarray) -> np.ndarray:
    """All of the bucket that i / target lies in, by integers: in floating numbers its lower bound may be in another."""
    return (np.arange(side) == i * side // target).astype(np.float64)


WEIGHTS = {ANTIALIASED: _triangle, "bicubic": _cubic, "bucketed": _bucket}


def _patches_of(grids: Grids, shapes: np.ndarray, area: np.ndarray) -> np.ndarray | None:
    """The distinct patch of every patch `[T]`; None if the pack is exactly the distinct shapes in order."""
    number = {tuple(shape): i for i, shape in enumerate(shapes.tolist())}
    frames = np.array([number[h, w] for t, h, w in grids for _ in range(t)], dtype=np.int64)
    if np.array_equal(frames, np.arange(len(shapes))):
        return None
    return np.repeat(starts(area)[frames], area[frames]) + ranges(area[frames])
