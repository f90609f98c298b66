"""What a pack's numbers say, checked and on the host: grids, attention segments, positions.

Whatever they come as (tensors on a device, arrays of any strides and byte order, lists), here they become Python
integers, and what is made of them is made on the host, whatever the default device and dtype are.

Shapes: N images (rows of grid_thw), S attention segments (frames), T total patches.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Grid = tuple[int, int, int]
TEMPORAL = ("frames", "joint")
MOST_PLACES = 2**24
"""So many patches position_ids may choose among: a place is looked up for each."""
JOINED = (
    "packs were joined key by key, by a pipeline's batch_size or a collate function that is not ours. Pack them: give "
    "the processor all images at once, or join packs with siglip2_packed.data.collate; pipelines take batch_size=1"
)


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


def host_grids(grid_thw: Any) -> list[Grid]:
    """`[N, 3]` integers, wherever they lie -> (t, h, w) of each image. ValueError unless all are at least 1."""
    return _grids(to_host(grid_thw=grid_thw)[0])


def _grids(grid: np.ndarray) -> list[Grid]:
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
    return [(t, h, w) for t, h, w in grid.tolist()]


def make_layout(
    grid_thw: Any,
    *,
    total_patches: int | None = None,
    temporal: str = "frames",
    cu_seqlens: Any = None,
    max_seqlen: int | None = None,
    position_ids: Tensor | None = None,
    of: str = "pixel_values",
) -> Layout:
    """Checks the metadata of a pack and brings it to the host.

    Costs one device-to-host copy if `grid_thw` or `cu_seqlens` lies on a device, none otherwise. Counts are compared
    before anything of their size is made.

    Args:
        grid_thw: `[N, 3]` integers (t, h, w) in patches; tensor, array or nested list.
        total_patches: rows of `pixel_values` (or of what `of` names), compared with what the grid covers.
        temporal: `"frames"`: every frame is an attention segment; `"joint"`: every image (t·h·w rows) is one.
        cu_seqlens: `[S+1]` integers, segments that replace those of `temporal`.
        max_seqlen: upper bound of the segments' lengths, as the caller knows it.
        position_ids: `[T]` integers: the rows are not the patches that the grid covers; each names its own among them.

    Raises:
        ValueError: a floating or misshapen grid, entries below 1, or counts that disagree (both are named).
    """
    if temporal not in TEMPORAL:
        raise ValueError(f"temporal must be one of {TEMPORAL}, got {temporal!r}")
    grid, *rest = to_host(grid_thw=grid_thw, **({} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}))
    grids, offsets = _grids(grid), rest[0] if rest else None
    covered = sum(t * h * w for t, h, w in grids)
    if position_ids is not None:
        _check_position_ids(position_ids, total_patches, covered, offsets)
        covered = len(position_ids)
    elif total_patches is not None and covered != total_patches:
        raise ValueError(f"grid_thw covers {covered} patches, {of} has {total_patches} rows")

    if offsets is not None:
        lengths = _segment_lengths(offsets, covered)
    elif temporal == "joint":
        lengths = [t * h * w for t, h, w in grids]
    else:
        lengths = [h * w for t, h, w in grids for _ in range(t)]

    if isinstance(max_seqlen, (list, tuple)):
        raise ValueError(f"max_seqlen is {max_seqlen}: {JOINED}")
    longest = max(lengths, default=0)
    if max_seqlen is not None and integer(max_seqlen, "max_seqlen") < longest:
        raise ValueError(f"max_seqlen is {max_seqlen}, the longest segment has {longest} rows")
    return Layout(grids, lengths, longest)


def _segment_lengths(offsets: np.ndarray, covered: int) -> list[int]:
    if offsets.ndim != 1 or offsets.size == 0 or offsets[0] != 0:
        raise ValueError(f"cu_seqlens must be [S+1] offsets that begin with 0, got shape {list(offsets.shape)}")
    begins = int((offsets == 0).sum())
    if begins > 1 and (np.diff(offsets) < 0).any():
        raise ValueError(f"cu_seqlens begins {begins} times at 0: {JOINED}")
    if offsets[-1] != covered:
        raise ValueError(f"cu_seqlens ends at {offsets[-1]}, grid_thw covers {covered} patches")
    lengths = np.diff(offsets)
    if (lengths < 1).any():
        i = int(np.flatnonzero(lengths < 1)[0])
        raise ValueError(f"cu_seqlens segment {i} has {lengths[i]} rows: every segment needs at least 1")
    return lengths.tolist()


def _check_position_ids(position_ids: Tensor, rows: int | None, covered: int, offsets: np.ndarray | None) -> None:
    if position_ids.shape != (rows,):
        raise ValueError(f"position_ids has shape {list(position_ids.shape)}, pixel_values has {rows} rows")
    if covered > MOST_PLACES:
        raise ValueError(
            f"grid_thw covers {covered} patches, pixel_values has {rows} rows: position_ids choose among at most "
            f"{MOST_PLACES} patches"
        )
    if offsets is None:
        raise ValueError("position_ids need cu_seqlens: the grid does not tell which rows attend to each other")
    if offsets.size and offsets[-1] != rows:
        raise ValueError(f"cu_seqlens ends at {offsets[-1]}, pixel_values has {rows} rows")
    if position_ids.device.type == "cpu" and len(position_ids):  # elsewhere, a look would be a sync
        low, high = position_ids.min().item(), position_ids.max().item()
        if low < 0 or high >= covered:
            raise ValueError(f"position_ids lie in {low}..{high}, grid_thw covers {covered} patches")


def integers(values: Any, name: str) -> Tensor:
    """An int64 tensor of `values`, on their device or the host; ValueError unless they are integers."""
    found = _integers(values, name)
    return found if isinstance(found, Tensor) else torch.from_numpy(found)


def _integers(values: Any, name: str) -> Tensor | np.ndarray:
    """int64 of `values`, as a tensor if they are tensors; strides and byte order are no matter."""
    if isinstance(values, (list, tuple)) and values and all(isinstance(row, Tensor) for row in values):
        shapes = [list(row.shape) for row in values]
        if shapes != shapes[:1] * len(shapes):
            raise ValueError(f"{name} must hold integers, got rows of shapes {shapes}"[:120])
        values = torch.stack(list(values))
    if isinstance(values, Tensor):
        integral = not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
        if values.layout is not torch.strided:
            raise ValueError(f"{name} must be a dense tensor, got {values.layout}")
        if values.numel() and not integral:
            raise ValueError(f"{name} must hold integers, got {values.dtype}")
        return values.long()
    try:
        array = np.asarray(values)
        integral = array.dtype.kind in "iu" and (array.dtype.itemsize < 8 or array.size == 0 or array.max() < 2**63)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} must hold integers, got {str(values)[:80]}") from error
    if array.size and not integral:
        raise ValueError(f"{name} must hold integers, got {array.dtype}: {str(values)[:80]}")
    return array.astype(np.int64, order="C")


def integer(value: Any, name: str) -> int:
    try:
        if not isinstance(value, bool) and getattr(value, "dtype", None) not in (torch.bool, np.bool_):
            return operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # of a tensor: several numbers, floating, or none (meta)
        pass
    raise ValueError(f"{name} must be an integer, got {value!r}")


def to_host(**given: Any) -> list[np.ndarray]:
    """Each as an int64 array; those on a device with one copy."""
    found = {name: _integers(values, name) for name, values in given.items()}
    for name, x in found.items():
        if isinstance(x, Tensor):
            check_numbers(x, name)
    away = {name: x for name, x in found.items() if isinstance(x, Tensor) and x.device.type != "cpu"}
    if len(away) > 1 and len({x.device for x in away.values()}) == 1:
        joined = torch.cat([x.reshape(-1) for x in away.values()]).cpu()
        parts = joined.split([x.numel() for x in away.values()])
        found.update({name: part.reshape(x.shape) for (name, x), part in zip(away.items(), parts)})
    return [x.cpu().numpy() if isinstance(x, Tensor) else x for x in found.values()]


def check_numbers(x: Tensor, name: str) -> None:
    """Raises ValueError for a tensor of the meta device, or a fake one: it has a shape and nothing else."""
    if x.is_meta or hasattr(x, "fake_mode"):
        raise ValueError(f"{name} {list(x.shape)} is a {x.device.type} tensor without numbers: give it on the host")
