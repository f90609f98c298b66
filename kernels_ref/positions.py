"""The position table resized to an image's grid: bilinear, antialiased, align_corners=False.

Written out, because `torch.nn.functional.interpolate` is wrong on CPU where the output is one column wide.
"""

import torch
from torch import Tensor


def position_weights(source: int, target: int) -> Tensor:
    """Weights `[target, source]` (fp64, rows sum to 1) that resize `source` samples to `target`.

    Output i sits at (i + 1/2)·scale on the source axis, scale = source / target, source sample j at j + 1/2. It takes
    the samples under a triangle of half-width max(scale, 1): shrinking averages over what an output pixel covers
    (antialias), enlarging interpolates between neighbours. The formula is that of Pillow's and torch's
    `_upsample_bilinear2d_aa`, which cut the triangle at the border and normalise what is left.
    """
    scale = source / target
    support = max(scale, 1.0)
    centre = (torch.arange(target, dtype=torch.float64) + 0.5) * scale
    sample = torch.arange(source, dtype=torch.float64) + 0.5
    triangle = (1 - (sample[None, :] - centre[:, None]).abs() / support).clamp(min=0)
    return triangle / triangle.sum(dim=1, keepdim=True)


def resize_positions(table: Tensor, h: int, w: int) -> Tensor:
    """Position table `[G·G, D]` or `[G, G, D]` -> `[h·w, D]` in raster order.

    Computed in fp64 and rounded once to the table's dtype; bit-exact identity at h = w = G.
    """
    D = table.shape[-1]
    G = round(table[..., 0].numel() ** 0.5)
    if table[..., 0].numel() != G * G:
        raise ValueError(f"the position table has {table[..., 0].numel()} rows, which is no square")
    rows = position_weights(G, h).to(table.device)
    columns = position_weights(G, w).to(table.device)
    resized = torch.einsum("hi,wj,ijd->hwd", rows, columns, table.reshape(G, G, D).double())
    return resized.reshape(h * w, D).to(table.dtype)
