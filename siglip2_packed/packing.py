"""Packed batches: the patches of N images end to end, and the metadata, on the host, that tells them apart.

Shapes: N images (rows of grid_thw), S attention segments (frames), T total patches, P patch_dim, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature

from siglip2_packed.ops.segments import cumulative

Grid = tuple[int, int, int]
TEMPORAL = ("frames", "joint")
KEYS = ("pixel_values", "grid_thw", "cu_seqlens", "max_seqlen")


class Layout(NamedTuple):
    """Where everything lies in a pack. Host integers only: nothing in it can cause a device sync."""

    grids: list[Grid]
    """(t, h, w) in patches, one an image."""
    lengths: list[int]
    """Rows of each attention segment, S of them."""
    max_seqlen: int

    @property
    def image_lengths(self) -> list[int]:
        """Rows of each image, N of them."""
        return [t * h * w for t, h, w in self.grids]


def make_layout(
    grid_thw: Any,
    *,
    total_patches: int | None = None,
    temporal: str = "frames",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    position_ids: Tensor | None = None,
) -> Layout:
    """Checks the metadata of a pack and brings it to the host.

    Costs one device-to-host copy if `grid_thw` or `cu_seqlens` lies on a device, none otherwise.

    Args:
        grid_thw: `[N, 3]` integers (t, h, w) in patches; tensor, array or nested list.
        total_patches: rows of `pixel_values`, compared with what the grid covers.
        temporal: `"frames"`: every frame is an attention segment; `"joint"`: every image (t·h·w rows) is one.
        cu_seqlens: `[S+1]` integers, segments that replace those of `temporal`.
        max_seqlen: upper bound of the segments' lengths, as the caller knows it.
        position_ids: `[T]` integers: the rows are not the patches that the grid covers; each names its own among them.

    Raises:
        ValueError: a floating or misshapen grid, entries below 1, or counts that disagree (both are named).
    """
    if temporal not in TEMPORAL:
        raise ValueError(f"temporal must be one of {TEMPORAL}, got {temporal!r}")
    grid, offsets = _to_host(integers(grid_thw, "grid_thw"), cu_seqlens)
    if grid.shape == (0,):
        grid = grid.reshape(0, 3)
    if grid.ndim == 2 and grid.shape[1] == 2:
        raise ValueError(
            f"grid_thw must be [N, 3] rows of (t, h, w), got {list(grid.shape)}; rows of (h, w) need t = 1 in front"
        )
    if grid.ndim != 2 or grid.shape[1] != 3:
        raise ValueError(f"grid_thw must be [N, 3] rows of (t, h, w), got shape {list(grid.shape)}")
    for i in np.flatnonzero((grid < 1).any(axis=1))[:1]:
        raise ValueError(f"grid_thw[{i}] is {tuple(grid[i].tolist())}: t, h and w must all be at least 1")

    grids: list[Grid] = [(t, h, w) for t, h, w in grid.tolist()]
    covered = sum(t * h * w for t, h, w in grids)
    if position_ids is not None:
        _check_position_ids(position_ids, total_patches, covered, offsets)
        covered = len(position_ids)
    elif total_patches is not None and covered != total_patches:
        raise ValueError(f"grid_thw covers {covered} patches, pixel_values has {total_patches} rows")

    if offsets is not None:
        lengths = _segment_lengths(offsets, covered)
    elif temporal == "joint":
        lengths = [t * h * w for t, h, w in grids]
    else:
        lengths = [h * w for t, h, w in grids for _ in range(t)]

    longest = max(lengths) if lengths else 0
    if max_seqlen is not None and (isinstance(max_seqlen, bool) or not hasattr(max_seqlen, "__index__")):
        raise ValueError(f"max_seqlen must be an integer, got {max_seqlen!r}")
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(f"max_seqlen is {max_seqlen}, the longest segment has {longest} rows")
    return Layout(grids, lengths, longest)


class PackedPatches(BatchFeature):
    """A packed batch, as the model takes it: `model(**packed)`.

    Keys:
        pixel_values: `[T, P]` float patches, raster order, each (py, px, c), c fastest.
        grid_thw: `[N, 3]` int64 (t, h, w) in patches.
        cu_seqlens: `[S+1]` int32 offsets of the attention segments.
        max_seqlen: int, the longest segment.

    Attributes:
        kept: for each row of `grid_thw`, which of the processor's inputs it is.
        skipped: (index, name, reason) of inputs the processor left out.

    `.to(...)` and `.pin_memory()` move the patches; the metadata stays on the host, where the model wants it, so that
    a forward needs no device-to-host copy.

    Args:
        pixel_values: `[T, P]` floating tensor, or a mapping with the keys above (trainers rebuild batches that way).
        grid_thw: `[N, 3]` integers.
        temporal: `"frames"` (every frame attends to itself) or `"joint"` (all frames of a video attend to each other).

    Raises:
        ValueError: the patches and the grid do not fit each other.
    """

    def __init__(self, pixel_values: Any, grid_thw: Any = None, temporal: str = "frames"):
        self.kept: list[int] = []
        self.skipped: list[tuple[int, str, str]] = []
        if isinstance(pixel_values, Mapping):
            missing = set(KEYS) - pixel_values.keys()
            if missing:
                raise ValueError(f"a pack needs the keys {', '.join(sorted(missing))} too; got {list(pixel_values)}")
            super().__init__(dict(pixel_values))
            self.kept = list(range(self.num_images))
            return
        if grid_thw is None:
            raise ValueError("grid_thw is missing: [N, 3] rows of (t, h, w)")
        check_patches(pixel_values)
        layout = make_layout(grid_thw, total_patches=pixel_values.shape[0], temporal=temporal)
        self.kept = list(range(len(layout.grids)))
        super().__init__(
            {
                "pixel_values": pixel_values,
                "grid_thw": torch.tensor(layout.grids, dtype=torch.int64).reshape(-1, 3),
                "cu_seqlens": cumulative(layout.lengths),
                "max_seqlen": layout.max_seqlen,
            }
        )

    def __getstate__(self) -> dict:
        return self.__dict__

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)

    @property
    def num_images(self) -> int:
        """N."""
        return self["grid_thw"].shape[0]

    def to(self, *args, **kwargs) -> PackedPatches:
        """Moves or casts `pixel_values` as `Tensor.to` does, in place; returns the pack itself.

        Tensors under keys of the caller's own (labels) are moved along, never cast.
        """
        self["pixel_values"] = self["pixel_values"].to(*args, **kwargs)
        for name in self._own_tensors():
            self[name] = self[name].to(self["pixel_values"].device, non_blocking=kwargs.get("non_blocking", False))
        return self

    def pin_memory(self) -> PackedPatches:
        for name in ("pixel_values", *self._own_tensors()):
            self[name] = self[name].pin_memory()
        return self

    def _own_tensors(self) -> list[str]:
        return [name for name, value in self.items() if name not in KEYS and isinstance(value, Tensor)]


def check_patches(pixel_values: Tensor, patch_dim: int | None = None) -> None:
    """Raises ValueError unless `pixel_values` is a floating `[T, P]` tensor (P = `patch_dim`, when given)."""
    if not isinstance(pixel_values, Tensor):
        raise ValueError(f"pixel_values must be a tensor of patches [T, P], got {type(pixel_values).__name__}")
    if pixel_values.ndim != 2 or (patch_dim is not None and pixel_values.shape[1] != patch_dim):
        hint = " (images [N, C, H, W] go through convert_to_packing_format first)" if pixel_values.ndim == 4 else ""
        hint = " (a padded batch [N, max, P] goes through pack first)" if pixel_values.ndim == 3 else hint
        raise ValueError(f"pixel_values must be [T, {patch_dim or 'P'}], got {list(pixel_values.shape)}{hint}")
    if not pixel_values.is_floating_point():
        raise ValueError(f"pixel_values must be floating (normalised patches), got {pixel_values.dtype}")


def convert_to_packing_format(images: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Cuts images of one size into packed patches.

    Args:
        images: `[N, C, H, W]`, H and W multiples of `patch_size`.

    Returns:
        `([N·h·w, patch_size²·C], grid_thw [N, 3])`, patches in raster order, each (py, px, c), c fastest.
    """
    if isinstance(patch_size, bool) or not isinstance(patch_size, int) or patch_size < 1:
        raise ValueError(f"patch_size must be a positive integer, got {patch_size!r}")
    if images.ndim != 4:
        raise ValueError(f"images must be [N, C, H, W], got {list(images.shape)}")
    n, _, height, width = images.shape
    if height % patch_size or width % patch_size or not height or not width:
        raise ValueError(f"image size {height}x{width} is not a multiple of patch_size {patch_size}")
    patches = rearrange(images, "n c (h py) (w px) -> (n h w) (py px c)", py=patch_size, px=patch_size)
    grid = [[1, height // patch_size, width // patch_size]]
    return patches, torch.tensor(grid, dtype=torch.long, device=images.device).repeat(n, 1)


def pack(
    pixel_values: Any,
    grid_thw: Any = None,
    *,
    pixel_attention_mask: Any = None,
    spatial_shapes: Any = None,
    temporal: str = "frames",
) -> PackedPatches:
    """Packs per-image patches or transformers' padded batch: `pack(**Siglip2ImageProcessor(images))`.

    Args:
        pixel_values: a list of N tensors `[t·h·w, P]`, or a padded batch `[N, max, P]`; rows beyond h·w are dropped.
        grid_thw: `[N, 3]`; or give
        spatial_shapes: `[N, 2]` (h, w), for t = 1.
        pixel_attention_mask: `[N, max]`; must mark the first h·w rows of each image and nothing else.

    Raises:
        ValueError: neither or both of `grid_thw` and `spatial_shapes`, or row counts that disagree.
    """
    if isinstance(pixel_values, Mapping):
        return pack(**pixel_values, temporal=temporal)
    if (grid_thw is None) == (spatial_shapes is None):
        raise ValueError("give exactly one of grid_thw [N, 3] and spatial_shapes [N, 2]")
    if grid_thw is None:
        shapes = _to_host(integers(spatial_shapes, "spatial_shapes"))[0]
        if shapes.ndim != 2 or shapes.shape[1] != 2:
            raise ValueError(f"spatial_shapes must be [N, 2] rows of (h, w), got {list(shapes.shape)}")
        grid_thw = np.insert(shapes, 0, 1, axis=1)
    layout = make_layout(grid_thw, temporal=temporal)
    lengths = layout.image_lengths

    if len(pixel_values) != len(lengths):
        raise ValueError(f"pixel_values holds {len(pixel_values)} images, the grid {len(lengths)}")
    padded = isinstance(pixel_values, Tensor)
    if isinstance(pixel_values, Tensor) and pixel_values.ndim != 3:
        raise ValueError(f"a padded batch is [N, max, P], got {list(pixel_values.shape)}")
    for i, (image, length) in enumerate(zip(pixel_values, lengths)):
        if not isinstance(image, Tensor):
            raise ValueError(f"image {i}: patches must be a tensor [t·h·w, P], got {type(image).__name__}")
        if not image.is_floating_point():
            raise ValueError(f"image {i}: pixel_values must be floating (normalised patches), got {image.dtype}")
        if image.shape[1:] != pixel_values[0].shape[1:]:
            raise ValueError(f"image {i}: patch_dim {image.shape[-1]}, image 0 has {pixel_values[0].shape[-1]}")
        if image.ndim != 2 or image.shape[0] < length or (image.shape[0] > length and not padded):
            raise ValueError(f"image {i}: its grid {layout.grids[i]} covers {length} patches, got {list(image.shape)}")
    if pixel_attention_mask is not None:
        check_mask(pixel_attention_mask, pixel_values, lengths)
    if not lengths:
        if not isinstance(pixel_values, Tensor):
            raise ValueError("an empty list has no patch_dim: an empty pack is PackedPatches(torch.zeros(0, P), [])")
        return PackedPatches(torch.zeros(0, pixel_values.shape[2]), grid_thw, temporal)
    rows = [image[:length] for image, length in zip(pixel_values, lengths)]
    return PackedPatches(torch.cat(rows), layout.grids, temporal)


def unpack(hidden_states: Tensor, grid_thw: Any, *, padded: bool = False) -> Any:
    """Packed rows `[T, D]` -> a list of N views `[t·h·w, D]`; `padded=True`: `([N, max, D], mask [N, max] bool)`."""
    if not isinstance(hidden_states, Tensor):
        raise ValueError(f"hidden_states must be a tensor [T, D], got {type(hidden_states).__name__}")
    lengths = make_layout(grid_thw).image_lengths
    if sum(lengths) != hidden_states.shape[0]:
        raise ValueError(f"grid_thw covers {sum(lengths)} patches, hidden_states has {hidden_states.shape[0]} rows")
    images = list(hidden_states.split(lengths)) if lengths else []
    if not padded:
        return images
    longest = max(lengths, default=0)
    mask = torch.arange(longest)[None, :] < torch.tensor(lengths, dtype=torch.int64)[:, None]
    if not images:
        return hidden_states.new_zeros(0, 0, *hidden_states.shape[1:]), mask.to(hidden_states.device)
    return torch.nn.utils.rnn.pad_sequence(images, batch_first=True), mask.to(hidden_states.device)


def pad(pixel_values: Any, grid_thw: Any = None, *, max_num_patches: int | None = None) -> BatchFeature:
    """A pack -> the padded batch of `transformers.Siglip2VisionModel`: `hf_model(**pad(packed))`.

    A video's frames become rows of their own (the padded model knows no t).

    Args:
        pixel_values: `PackedPatches`, or `[T, P]` with `grid_thw [N, 3]`.
        max_num_patches: rows an image is padded to; the longest image's, when left out.

    Returns:
        `pixel_values [S, max, P]` zero-padded, `pixel_attention_mask [S, max]` int32, `spatial_shapes [S, 2]` int64.
    """
    if isinstance(pixel_values, Mapping):
        pixel_values, grid_thw = pixel_values["pixel_values"], pixel_values["grid_thw"]
    if grid_thw is None:
        raise ValueError("grid_thw is missing: [N, 3] rows of (t, h, w)")
    layout = make_layout(grid_thw, total_patches=pixel_values.shape[0])
    if max_num_patches is not None and max_num_patches < layout.max_seqlen:
        raise ValueError(f"max_num_patches is {max_num_patches}, the longest image has {layout.max_seqlen} patches")
    width = layout.max_seqlen if max_num_patches is None else max_num_patches
    frames = [(1, h, w) for t, h, w in layout.grids for _ in range(t)]
    rows, mask = unpack(pixel_values, frames, padded=True)
    extra = (0, width - layout.max_seqlen)
    return BatchFeature(
        {
            "pixel_values": torch.nn.functional.pad(rows, (0, 0, *extra)),
            "pixel_attention_mask": torch.nn.functional.pad(mask, extra).to(torch.int32),
            "spatial_shapes": torch.tensor(frames, dtype=torch.int64, device=rows.device).reshape(-1, 3)[:, 1:],
        }
    )


def integers(values: Any, name: str) -> Tensor:
    """A tensor of `values`, on its own device; ValueError unless they are integers."""
    try:
        tensor = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must hold integers, got {str(values)[:80]}") from error
    if tensor.numel() == 0:
        return tensor.long()
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers, got {tensor.dtype}")
    return tensor


def _to_host(grid: Tensor, cu_seqlens: Tensor | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """One copy for both when either lies on a device."""
    if cu_seqlens is None:
        return grid.cpu().numpy(), None
    cu_seqlens = integers(cu_seqlens, "cu_seqlens")
    if grid.device == cu_seqlens.device and grid.device.type != "cpu":
        both = torch.cat([grid.reshape(-1).long(), cu_seqlens.reshape(-1).long()]).cpu().numpy()
        return both[: grid.numel()].reshape(grid.shape), both[grid.numel() :].reshape(cu_seqlens.shape)
    return grid.cpu().numpy(), cu_seqlens.cpu().numpy()


def _segment_lengths(offsets: np.ndarray, covered: int) -> list[int]:
    if offsets.ndim != 1 or offsets.size == 0 or offsets[0] != 0:
        raise ValueError(f"cu_seqlens must be [S+1] offsets that begin with 0, got shape {list(offsets.shape)}")
    if offsets[-1] != covered:
        raise ValueError(f"cu_seqlens ends at {offsets[-1]}, grid_thw covers {covered} patches")
    lengths = np.diff(offsets)
    if (lengths < 1).any():
        i = int(np.flatnonzero(lengths < 1)[0])
        raise ValueError(f"cu_seqlens segment {i} has {lengths[i]} rows: every segment needs at least 1")
    return lengths.tolist()


def _check_position_ids(position_ids: Tensor, rows: int | None, covered: int, offsets: np.ndarray | None) -> None:
    if integers(position_ids, "position_ids").shape != (rows,):
        raise ValueError(f"position_ids has shape {list(position_ids.shape)}, pixel_values has {rows} rows")
    if offsets is None:
        raise ValueError("position_ids need cu_seqlens: the grid does not tell which rows attend to each other")
    if offsets.size and offsets[-1] != rows:
        raise ValueError(f"cu_seqlens ends at {offsets[-1]}, pixel_values has {rows} rows")
    if position_ids.device.type == "cpu" and len(position_ids):  # elsewhere, a look would be a sync
        low, high = position_ids.min().item(), position_ids.max().item()
        if low < 0 or high >= covered:
            raise ValueError(f"position_ids lie in {low}..{high}, grid_thw covers {covered} patches")


def check_mask(mask: Any, pixel_values: Tensor | Sequence[Tensor], lengths: list[int]) -> None:
    """Raises ValueError unless the mask `[N, max]` of a padded batch marks the first `lengths[i]` rows of image i."""
    mask = torch.as_tensor(mask)
    if not isinstance(pixel_values, Tensor) or mask.shape != pixel_values.shape[:2]:
        raise ValueError(f"pixel_attention_mask {list(mask.shape)} needs a padded batch of the same [N, max]")
    expected = torch.arange(mask.shape[1])[None, :] < torch.tensor(lengths)[:, None]
    wrong = (mask.cpu().bool() != expected).any(dim=1).nonzero().flatten().tolist()
    if wrong:
        i = wrong[0]
        raise ValueError(
            f"image {i}: pixel_attention_mask marks {int(mask[i].sum())} rows, the grid covers the first {lengths[i]}"
        )
