"""Images to patches and back, and what a grid says about the rows of a pack."""

import torch
from einops import rearrange
from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """`[N, C, H, W]` -> `[N, h·w, patch_size²·C]`: patches in raster order, each (py, px, c), c fastest."""
    height, width = images.shape[2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"images of {height}x{width} do not divide into patches of {patch_size}x{patch_size}")
    return rearrange(images, "N C (h py) (w px) -> N (h w) (py px C)", py=patch_size, px=patch_size)


def unpatchify(patches: Tensor, patch_size: int, h: int, w: int) -> Tensor:
    """`[N, h·w, patch_size²·C]` -> `[N, C, h·patch_size, w·patch_size]`, the inverse of `patchify`."""
    if patches.shape[1] != h * w:
        raise ValueError(f"a grid of {h}x{w} has {h * w} patches, got {patches.shape[1]}")
    return rearrange(patches, "N (h w) (py px C) -> N C (h py) (w px)", h=h, py=patch_size, px=patch_size)


def grid_rows(grid_thw: Tensor) -> list[tuple[int, int, int]]:
    """The rows (t, h, w) of an integer `[N, 3]` grid; ValueError for another shape, a float, an entry below 1."""
    if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or grid_thw.is_floating_point():
        raise ValueError(f"grid_thw must be integer [N, 3], got {grid_thw.dtype} {list(grid_thw.shape)}")
    rows = [(t, h, w) for t, h, w in grid_thw.tolist()]
    for i, row in enumerate(rows):
        if min(row) < 1:
            raise ValueError(f"grid_thw entries must be at least 1, row {i} is {row}")
    return rows


def cu_seqlens_of(lengths: list[int], device: torch.device | str = "cpu") -> Tensor:
    """Lengths of S segments -> their offsets, `[S+1]` int32."""
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    return torch.tensor(offsets, dtype=torch.int32, device=device)
