"""Packed batches: the patches of N images end to end, and the metadata, on the host, that tells them apart.

Shapes: N images (rows of grid_thw), S attention segments (frames), T total patches, P patch_dim, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature

from siglip2_packed.layout import Grid, Layout, check_numbers, host_grids, integer, integers, make_layout, to_host
from siglip2_packed.ops.segments import cumulative

__all__ = [
    "KEYS", "Grid", "Layout", "PackedPatches", "check_mask", "check_patches", "convert_to_packing_format", "cumulative",
    "integers", "make_layout", "pack", "pad", "unpack",
]  # fmt: skip
KEYS = ("pixel_values", "grid_thw", "cu_seqlens", "max_seqlen")


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

    Examples:
        >>> import torch
        >>> from siglip2_packed import PackedPatches
        >>> packed = PackedPatches(torch.zeros(26, 768), [[1, 2, 3], [1, 4, 5]])
        >>> packed
        PackedPatches: 2 images, 26 patches, longest 20
        >>> packed["cu_seqlens"].tolist(), packed["max_seqlen"]
        ([0, 6, 26], 20)
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
                "grid_thw": _rows_of_integers(layout.grids, 3),
                "cu_seqlens": cumulative(layout.lengths),
                "max_seqlen": layout.max_seqlen,
            }
        )

    if TYPE_CHECKING:
        pixel_values: Tensor
        grid_thw: Tensor
        cu_seqlens: Tensor
        max_seqlen: int

        @overload  # type: ignore[override]
        def __getitem__(self, item: Literal["pixel_values", "grid_thw", "cu_seqlens"]) -> Tensor: ...
        @overload
        def __getitem__(self, item: Literal["max_seqlen"]) -> int: ...
        @overload
        def __getitem__(self, item: str) -> Any: ...
        def __getitem__(self, item: str) -> Any: ...

    def __repr__(self) -> str:
        """`PackedPatches: 2 images, 2004 patches, longest 1014`: what attends together is at most 1014 patches long."""
        try:
            frames = torch.as_tensor(self["grid_thw"])[:, 0].tolist()
            videos = [t for t in frames if t > 1]
            patches, longest = len(self["pixel_values"]), self["max_seqlen"]
        except Exception:  # keys that the caller has taken out or changed, tensors without values
            return f"{type(self).__name__}: {', '.join(map(str, self)) or 'nothing'}"
        parts = [_count(len(frames) - len(videos), "image")] if len(videos) < len(frames) or not frames else []
        if videos:
            parts.append(f"{_count(len(videos), 'video')} of {sum(videos)} frames")
        parts.append(_count(patches, "patch", "patches"))
        if frames:
            parts.append(f"longest {longest}")
        parts += [str(name) for name in self if name not in KEYS]
        return f"{type(self).__name__}: {', '.join(parts)}"

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
            if self[name].device.type == "cpu":  # patches that a card has decoded are there
                self[name] = self[name].pin_memory()
        return self

    def _own_tensors(self) -> list[str]:
        return [name for name, value in self.items() if name not in KEYS and isinstance(value, Tensor)]


def _count(number: int, one: str, more: str = "") -> str:
    return f"{number} {one if number == 1 else more or one + 's'}"


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
        `([N·h·w, patch_size²·C], grid_thw [N, 3])`, patches in raster order, each (py, px, c), c fastest, as
        transformers' `Siglip2ImageProcessor` cuts them.

    Raises:
        ValueError: images of another shape, sides that are no multiples of `patch_size`.

    Examples:
        >>> import torch
        >>> from siglip2_packed import convert_to_packing_format
        >>> patches, grid_thw = convert_to_packing_format(torch.zeros(2, 3, 32, 48), patch_size=16)
        >>> patches.shape, grid_thw.tolist()
        (torch.Size([12, 768]), [[1, 2, 3], [1, 2, 3]])
    """
    if isinstance(patch_size, bool) or not isinstance(patch_size, int) or patch_size < 1:
        raise ValueError(f"patch_size must be a positive integer, got {patch_size!r}")
    if not isinstance(images, Tensor) or images.ndim != 4:
        got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be a tensor [N, C, H, W], got {got}")
    n, _, height, width = images.shape
    if height % patch_size or width % patch_size or not height or not width:
        raise ValueError(f"image size {height}x{width} is not a multiple of patch_size {patch_size}")
    grid = [[1, height // patch_size, width // patch_size]]
    return patchify(images, patch_size), torch.tensor(grid, dtype=torch.long, device=images.device).repeat(n, 1)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """`[N, C, H, W]`, multiples of `patch_size` -> `[N·h·w, P]`; waits for no device."""
    return rearrange(images, "n c (h py) (w px) -> (n h w) (py px c)", py=patch_size, px=patch_size)


GridLike: TypeAlias = Tensor | np.ndarray | Sequence[Sequence[int]]
"""`[N, 3]` integers (t, h, w)."""


def pack(
    pixel_values: Any,
    grid_thw: GridLike | None = None,
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

    Examples:
        >>> import torch
        >>> from siglip2_packed import pack
        >>> pack([torch.zeros(6, 768), torch.zeros(20, 768)], [[1, 2, 3], [1, 4, 5]])
        PackedPatches: 2 images, 26 patches, longest 20
        >>> pack(torch.zeros(2, 20, 768), spatial_shapes=[[2, 3], [4, 5]])      # padded to 20
        PackedPatches: 2 images, 26 patches, longest 20
    """
    if isinstance(pixel_values, Mapping):
        return pack(**pixel_values, temporal=temporal)
    if (grid_thw is None) == (spatial_shapes is None):
        raise ValueError("give exactly one of grid_thw [N, 3] and spatial_shapes [N, 2]")
    if grid_thw is None:
        shapes = to_host(spatial_shapes=spatial_shapes)[0]
        if shapes.ndim != 2 or shapes.shape[1] != 2:
            raise ValueError(f"spatial_shapes must be [N, 2] rows of (h, w), got {list(shapes.shape)}")
        grid_thw = np.insert(shapes, 0, 1, axis=1)
    grids = host_grids(grid_thw)
    lengths = [math.prod(grid) for grid in grids]

    if not isinstance(pixel_values, (Tensor, list, tuple)):
        raise ValueError(f"pixel_values must be a list of tensors or a tensor, got {type(pixel_values).__name__}")
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
            raise ValueError(f"image {i}: its grid {grids[i]} covers {length} patches, got {list(image.shape)}")
    if pixel_attention_mask is not None:
        check_mask(pixel_attention_mask, pixel_values, lengths)
    if not lengths:
        if not isinstance(pixel_values, Tensor):
            raise ValueError("an empty list has no patch_dim: an empty pack is PackedPatches(torch.zeros(0, P), [])")
        return PackedPatches(pixel_values.flatten(0, 1), grids, temporal)
    rows = [image[:length] for image, length in zip(pixel_values, lengths)]
    return PackedPatches(torch.cat(rows), grids, temporal)


@overload
def unpack(hidden_states: Tensor, grid_thw: GridLike, *, padded: Literal[False] = False) -> list[Tensor]: ...
@overload
def unpack(hidden_states: Tensor, grid_thw: GridLike, *, padded: Literal[True]) -> tuple[Tensor, Tensor]: ...
@overload
def unpack(hidden_states: Tensor, grid_thw: GridLike, *, padded: bool) -> list[Tensor] | tuple[Tensor, Tensor]: ...
def unpack(hidden_states: Tensor, grid_thw: Any, *, padded: bool = False) -> Any:
    """Packed rows `[T, D]` -> a list of N views `[t·h·w, D]`; `padded=True`: `([N, max, D], mask [N, max] bool)`.

    Args:
        hidden_states: rows of any width and dtype.
        grid_thw: `[N, 3]` integers (t, h, w) that cover T.
        padded: rows beyond an image's own are zeros, and False in the mask.

    Raises:
        ValueError: a grid that covers another number of rows.

    Examples:
        >>> import torch
        >>> from siglip2_packed import unpack
        >>> rows, grid_thw = torch.ones(26, 4), [[1, 2, 3], [1, 4, 5]]
        >>> [len(image) for image in unpack(rows, grid_thw)]
        [6, 20]
        >>> batch, mask = unpack(rows, grid_thw, padded=True)
        >>> batch.shape, mask.sum(dim=1).tolist()
        (torch.Size([2, 20, 4]), [6, 20])
    """
    if not isinstance(hidden_states, Tensor) or not hidden_states.ndim:
        raise ValueError(f"hidden_states must be a tensor [T, D], got {type(hidden_states).__name__}")
    lengths = make_layout(grid_thw, total_patches=len(hidden_states), of="hidden_states").image_lengths
    images = list(hidden_states.split(lengths)) if lengths else []
    if not padded:
        return images
    longest = max(lengths, default=0)
    mask = _marks(lengths, longest)
    if not images:
        return hidden_states.new_zeros(0, 0, *hidden_states.shape[1:]), mask.to(hidden_states.device)
    return torch.nn.utils.rnn.pad_sequence(images, batch_first=True), mask.to(hidden_states.device)


@overload
def pad(pixel_values: Mapping[str, Any], *, max_num_patches: int | None = None) -> BatchFeature: ...
@overload
def pad(pixel_values: Tensor, grid_thw: GridLike, *, max_num_patches: int | None = None) -> BatchFeature: ...
def pad(pixel_values: Any, grid_thw: Any = None, *, max_num_patches: int | None = None) -> BatchFeature:
    """A pack -> the padded batch of `transformers.Siglip2VisionModel`: `hf_model(**pad(packed))`.

    A video's frames become rows of their own (the padded model knows no t).

    Args:
        pixel_values: `PackedPatches` whose frames attend to themselves, or `[T, P]` with `grid_thw [N, 3]`.
        max_num_patches: rows an image is padded to; the longest image's, when left out.

    Returns:
        `pixel_values [S, max, P]` zero-padded, `pixel_attention_mask [S, max]` int32, `spatial_shapes [S, 2]` int64.

    Raises:
        ValueError: a grid that covers another number of rows, `max_num_patches` below the longest image, frames that
            attend to each other.

    Examples:
        >>> import torch
        >>> from siglip2_packed import pack, pad
        >>> batch = pad(pack([torch.zeros(6, 768), torch.zeros(20, 768)], [[1, 2, 3], [1, 4, 5]]))
        >>> batch["pixel_values"].shape, batch["spatial_shapes"].tolist()
        (torch.Size([2, 20, 768]), [[2, 3], [4, 5]])
    """
    cu_seqlens = None
    if isinstance(pixel_values, Mapping):
        cu_seqlens = pixel_values.get("cu_seqlens")
        pixel_values, grid_thw = pixel_values["pixel_values"], pixel_values["grid_thw"]
    if grid_thw is None:
        raise ValueError("grid_thw is missing: [N, 3] rows of (t, h, w)")
    if not isinstance(pixel_values, Tensor) or pixel_values.ndim != 2:
        got = list(pixel_values.shape) if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
        raise ValueError(f"pixel_values must be a pack, or a tensor of patches [T, P], got {got}")
    layout = make_layout(grid_thw, total_patches=len(pixel_values))
    if cu_seqlens is not None and make_layout(grid_thw, cu_seqlens=cu_seqlens).lengths != layout.lengths:
        raise ValueError(
            "the pack's cu_seqlens are not its frames (temporal='joint'?): transformers' model would attend within "
            "frames, to other features. For those, give pixel_values and grid_thw"
        )
    if max_num_patches is not None and integer(max_num_patches, "max_num_patches") < layout.max_seqlen:
        raise ValueError(f"max_num_patches is {max_num_patches}, the longest image has {layout.max_seqlen} patches")
    width = layout.max_seqlen if max_num_patches is None else max_num_patches
    frames = [(1, h, w) for t, h, w in layout.grids for _ in range(t)]
    rows, mask = unpack(pixel_values, frames, padded=True)
    extra = (0, width - layout.max_seqlen)
    return BatchFeature(
        {
            "pixel_values": torch.nn.functional.pad(rows, (0, 0, *extra)),
            "pixel_attention_mask": torch.nn.functional.pad(mask, extra).to(torch.int32),
            "spatial_shapes": _rows_of_integers(frames, 3)[:, 1:].to(rows.device),
        }
    )


def _rows_of_integers(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    """`[len(rows), width]` int64 on the host, whatever the default device is."""
    return torch.from_numpy(np.array(rows, dtype=np.int64).reshape(-1, width))


def _marks(lengths: list[int], width: int) -> Tensor:
    """`[N, width]` bool on the host: the first lengths[i] of row i."""
    return torch.from_numpy(np.arange(width)[None, :] < np.array(lengths, dtype=np.int64)[:, None])


def check_mask(mask: Any, pixel_values: Tensor | Sequence[Tensor], lengths: list[int]) -> None:
    """Raises ValueError unless the mask `[N, max]` of a padded batch marks the first `lengths[i]` rows of image i."""
    mask = mask if isinstance(mask, Tensor) else torch.from_numpy(np.asarray(mask).astype(bool))
    check_numbers(mask, "pixel_attention_mask")
    if not isinstance(pixel_values, Tensor) or mask.shape != pixel_values.shape[:2]:
        raise ValueError(f"pixel_attention_mask {list(mask.shape)} needs a padded batch of the same [N, max]")
    wrong = (mask.cpu().bool() != _marks(lengths, mask.shape[1])).any(dim=1).nonzero().flatten().tolist()
    if wrong:
        i = wrong[0]
        raise ValueError(
            f"image {i}: pixel_attention_mask marks {int(mask[i].sum())} rows, the grid covers the first {lengths[i]}"
        )
