"""Every form in which LLaVA's code holds images, their grid and patch positions -> one pack; features -> that form.

Shapes: B, N images (rows of grid_thw), T rows that are computed, P patch_dim, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2_packed.layout import Grid, check_numbers, host_grids, integers
from siglip2_packed.ops.runtime.transfer import to_device
from siglip2_packed.ops.segments import cumulative
from siglip2_packed.packing import check_mask


class ImagePack(NamedTuple):
    images: Tensor | list[Tensor]
    """As they came: `[T, P]`, `[B, N, P]`, or a list of `[N_i, P]` and `[k, N_i, P]`."""
    pixel_values: Tensor
    """`[T, P]`, the images end to end without their padding; or in `order`."""
    grids: list[Grid]
    counts: list[int]
    """Rows of each image."""
    cu_seqlens: Tensor | None = None
    """Attention segments; None: frames."""
    position_ids: Tensor | None = None
    """Of patches with positions of their own, as the model takes them."""
    order: Tensor | None = None
    """`[T]`: such patches are sorted by frame; which one each row is."""

    @torch.compiler.disable
    def restore(self, features: Tensor) -> Any:
        """`[T, D]`, images end to end -> the form of `images`, with D for P and zeros in their padding."""
        rows = _rows(self.images)
        if rows is None:
            return features
        padded = [F.pad(x, (0, 0, 0, len(row) - len(x))) for x, row in zip(features.split(self.counts), rows)]
        if isinstance(self.images, Tensor):
            return torch.stack(padded) if padded else features.reshape(*self.images.shape[:2], features.shape[1])
        each = iter(padded)
        return [next(each) if image.ndim == 2 else torch.stack([next(each) for _ in image]) for image in self.images]


def pack_images(images: Any, grid_thw: Any, patch_positions: Any, patch_dim: int) -> ImagePack:
    """Grid and positions come to the host here and nowhere else.

    Args: those of `SigLip2NaflexVisionTower.forward`, without raw images.
        patch_dim: P, of a list without images.
    """
    own_grid, cu_seqlens, mask = None, None, None
    if isinstance(images, Mapping):
        own_grid, cu_seqlens, mask = _grid_of(images), images.get("cu_seqlens"), images.get("pixel_attention_mask")
        images = images["pixel_values"]
    rows = _rows(images)
    grids = _agreed_grid(own_grid, grid_thw, rows)
    if rows is not None and len(rows) != len(grids):
        raise ValueError(f"there are {len(rows)} images, but grid_thw has {len(grids)} rows")
    counts = [math.prod(grid) for grid in grids]
    if mask is not None:
        check_mask(mask, images, counts)
    entries = _host_positions(patch_positions)
    if entries is None:
        return ImagePack(images, _pixel_values(images, rows, counts, patch_dim), grids, counts, cu_seqlens)

    if cu_seqlens is not None:
        raise ValueError("patch_positions choose the attention segments, and so does the mapping's cu_seqlens")
    given = len(images) if rows is None else sum(map(len, rows))
    positions, entry_of_image = _positions_of_images(entries, grids, given)
    if all(map(_are_whole_frames, positions, grids)):
        return ImagePack(images, _pixel_values(images, rows, counts, patch_dim), grids, counts)
    _check_positions(positions, grids, None if rows is None else [len(row) for row in rows])
    counts = [len(array) for array in positions]
    if rows is None and sum(counts) != len(images):
        raise ValueError(f"patch_positions has {sum(counts)} rows, images {len(images)}")
    pixel_values = _pixel_values(images, rows, counts, patch_dim)
    order, cu_seqlens, position_ids = _sort_by_frame(positions, grids, entry_of_image)
    pixel_values = pixel_values[to_device(order, pixel_values.device)]
    return ImagePack(images, pixel_values, [(1, h, w) for _, h, w in grids], counts, cu_seqlens, position_ids, order)


def _rows(images: Tensor | list[Tensor]) -> list[Tensor] | None:
    """`[rows, P]` of each image, padding included; None for packed patches, which do not tell their images apart."""
    if isinstance(images, Tensor):
        if images.ndim not in (2, 3):
            raise ValueError(f"images must be [T, P], [B, N, P] or [B, C, H, W], got {list(images.shape)}")
        return list(images) if images.ndim == 3 else None
    if not isinstance(images, (list, tuple)):
        raise ValueError(f"images must be a tensor, a list of tensors or a mapping, got {type(images).__name__}")
    for i, image in enumerate(images):
        if not isinstance(image, Tensor) or image.ndim not in (2, 3) or not len(image):
            got = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"images[{i}] must be patches [N_i, P] or [k, N_i, P], got {got}")
    return [row for image in images for row in (image[None] if image.ndim == 2 else image)]


def _pixel_values(images: Any, rows: list[Tensor] | None, counts: list[int], width: int) -> Tensor:
    """`[T, P]`: the first `counts[i]` rows of each image."""
    if rows is None:
        return images
    for i, (row, count) in enumerate(zip(rows, counts)):
        if not row.is_floating_point():
            raise ValueError(f"image {i}: pixel_values must be floating (normalised patches), got {row.dtype}")
        if len(row) < count:
            raise ValueError(f"image {i}: its grid covers {count} patches, it has {len(row)} rows")
        if row.shape[1] != rows[0].shape[1]:
            raise ValueError(f"image {i} has patch_dim {row.shape[1]}, image 0 has {rows[0].shape[1]}")
    if not rows and isinstance(images, Tensor):
        return images.flatten(0, 1)
    if not rows:
        return torch.zeros(0, width, dtype=torch.float32, device="cpu")
    return torch.cat([row[:count] for row, count in zip(rows, counts)])


# grid


def _grid_of(images: Mapping) -> Tensor:
    """`[N, 3]` of a mapping: a pack's `grid_thw`, or a padded batch's `spatial_shapes` with t = 1."""
    if "pixel_values" not in images or not ("grid_thw" in images or "spatial_shapes" in images):
        raise ValueError(f"a mapping needs pixel_values, and grid_thw or spatial_shapes; got {list(images)}")
    if "grid_thw" in images:
        return images["grid_thw"]
    shapes = integers(images["spatial_shapes"], "spatial_shapes")
    if shapes.ndim != 2 or shapes.shape[1] != 2:
        raise ValueError(f"spatial_shapes must be [B, 2] rows of (h, w), got {list(shapes.shape)}")
    return F.pad(shapes, (1, 0), value=1)


def _agreed_grid(own: Any, given: Any, rows: list[Tensor] | None) -> list[Grid]:
    """The grid that comes with the images, or the caller's; the same if both are there; squares if neither is."""
    grids = [_host_grid(grid) for grid in (own, given) if grid is not None]
    if len(grids) == 2 and grids[0] != grids[1]:
        raise ValueError(f"grid_thw is {grids[1]}, but the images' own grid is {grids[0]}")
    if not grids and rows is None:
        raise ValueError("grid_thw is missing: packed patches [T, P] need [N, 3] rows of (t, h, w)")
    return grids[0] if grids else [_square(i, row) for i, row in enumerate(rows or [])]


def _host_grid(grid_thw: Any) -> list[Grid]:
    grid = integers(grid_thw, "grid_thw")
    # a batch of text alone comes as [B, 1, 3] from LLaVA's data code
    return host_grids(grid[:, 0] if grid.ndim == 3 and grid.shape[1] == 1 else grid)


def _square(i: int, row: Tensor) -> Grid:
    side = math.isqrt(len(row))
    if side * side != len(row):
        raise ValueError(f"image {i} has {len(row)} patches, not a square: give grid_thw")
    if not row[-1].any() and row.any():
        raise ValueError(f"image {i} looks padded (of its {len(row)} rows the last is zero): give grid_thw")
    return 1, side, side


# patch positions


def _host_positions(given: Any) -> list[np.ndarray | None] | None:
    """`patch_positions` -> `[n, 3]` an entry, in one device-to-host copy; None if there are none at all."""
    if given is None or (isinstance(given, (list, tuple)) and all(entry is None for entry in given)):
        return None
    entries = list(given) if isinstance(given, (list, tuple)) or getattr(given, "ndim", 0) == 3 else [given]
    tensors = [None if entry is None else integers(entry, "patch_positions") for entry in entries]
    for i, tensor in enumerate(tensors):
        if tensor is not None:
            check_numbers(tensor, f"patch_positions[{i}]")
        if tensor is not None and tensor.shape != (*[1] * (tensor.ndim - 2), tensor.numel() // 3, 3):
            raise ValueError(f"patch_positions[{i}] must be [1, T, 3] rows of (t, h, w), got {list(tensor.shape)}")
    joined = [tensor.reshape(-1, 3) for tensor in tensors if tensor is not None]
    device = next((tensor.device for tensor in joined if tensor.device.type != "cpu"), torch.device("cpu"))
    host = torch.cat([tensor.to(device) for tensor in joined]).cpu()
    arrays = iter(host.split([len(tensor) for tensor in joined]))
    return [None if tensor is None else next(arrays).numpy() for tensor in tensors]


def _positions_of_images(
    entries: list[np.ndarray | None], grids: list[Grid], given: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Positions `[n, 3]` of every image, and which entry they come from.

    There is one entry an image; or (LLaVA's: one a sample) each covers all patches of as many images as it has rows
    for, None those of one image. `given`: rows of patches there are.
    """
    if len(entries) == len(grids):
        arrays = [_raster(grid, given) if entry is None else entry for entry, grid in zip(entries, grids)]
        return arrays, np.arange(len(grids))
    lengths = [math.prod(grid) for grid in grids]
    ends, rows, spans = np.cumsum(lengths).tolist(), 0, list[int]()
    for entry in entries:
        first = sum(spans)
        rows += sum(lengths[first : first + 1]) if entry is None else len(entry)
        spans.append(ends.index(rows) + 1 - first if rows in ends else 0)
    if 0 in spans or sum(spans) != len(grids):
        raise ValueError(
            f"patch_positions has {len(entries)} entries of {[None if x is None else len(x) for x in entries]} rows, "
            f"the {len(grids)} images have {lengths} patches: give one entry an image, or entries that each cover all "
            "patches of some images"
        )
    entry_of_image = np.repeat(np.arange(len(entries)), spans)
    whole = [_raster(grids[i], given) if entry is None else entry for i, entry in zip(np.cumsum([0, *spans]), entries)]
    return np.split(np.concatenate(whole), ends[:-1]), entry_of_image


def _raster(grid: Grid, given: int | None = None) -> np.ndarray:
    """`[t·h·w, 3]`, unless that is more than the rows that are `given`."""
    if given is not None and math.prod(grid) > given:
        raise ValueError(f"the grid {grid} covers {math.prod(grid)} patches, there are {given} rows of patches")
    return np.stack(np.unravel_index(np.arange(math.prod(grid)), grid), axis=1)


def _are_whole_frames(positions: np.ndarray, grid: Grid) -> bool:
    """Whether these are what the grid says anyway: all patches in order, and every frame has a t of its own."""
    t, h, w = grid
    if len(positions) != t * h * w:
        return False
    times, places = positions[:, 0].reshape(t, h * w), positions[:, 1:].reshape(t, h * w, 2)
    distinct = len(np.unique(times[:, 0])) == t and (times == times[:, :1]).all()
    return bool(distinct and (places == _raster((1, h, w))[:, 1:]).all())


def _check_positions(positions: list[np.ndarray], grids: list[Grid], rows: list[int] | None) -> None:
    for i, (array, (t, h, w)) in enumerate(zip(positions, grids)):
        given = len(array) if rows is None else rows[i]
        if len(array) != min(t * h * w, given):
            raise ValueError(
                f"image {i}: patch_positions has {len(array)} rows, the grid {(t, h, w)} covers {t * h * w} patches, "
                f"and there are {given} rows of patches"
            )
        if (array < 0).any() or (array[:, 1:] >= (h, w)).any():
            low, high = array[:, 1:].min(axis=0).tolist(), array[:, 1:].max(axis=0).tolist()
            raise ValueError(f"image {i}: patch_positions has (h, w) from {low} to {high}, the grid is {h} x {w}")


def _sort_by_frame(
    positions: list[np.ndarray], grids: list[Grid], entry_of_image: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows sorted by frame, the frames' offsets, and each row's patch among those of one frame of every image.

    A frame is the patches of one t in one image, or in one entry if that is one video: a codec's video is packed into
    several images, and a frame may end in one and go on in the next. Images that are merely neighbours in a sample
    claim the same places (t, h, w); a video never does.
    """
    image = np.repeat(np.arange(len(grids)), [len(array) for array in positions])
    places = np.concatenate(positions)
    entry = entry_of_image[image]
    distinct, times_claimed = np.unique(np.column_stack([entry, places]), axis=0, return_counts=True)
    shared = np.isin(entry, distinct[times_claimed > 1, 0])
    video = np.where(shared, len(grids) + image, entry)

    t, h, w = places.T
    order = np.lexsort((t, video))
    new_frame = (np.diff(video[order]) != 0) | (np.diff(t[order]) != 0)
    bounds = [0, *(np.flatnonzero(new_frame) + 1).tolist(), len(order)]
    height, width = np.array(grids).T[1:]
    first = np.cumsum(height * width) - height * width
    position_ids = first[image] + h * width[image] + w
    return torch.from_numpy(order), cumulative(np.diff(bounds).tolist()), torch.from_numpy(position_ids[order])
