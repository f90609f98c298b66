"""What there is to see in features: colours, attention, cosines, and where two models differ, of every patch.

Everything is computed in float32 on the host, from the features after post_layernorm.

Shapes: N images, T patches of an image (h·w) or of all, D hidden size, P patch_dim, H heads. A grid is (h, w), a patch
of it (row, column).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from siglip2_packed.inspection.references import (
    image_case,
    load_packed,
    load_reference,
    load_transformers,
    run_reference,
    run_transformers,
)
from siglip2_packed.packing import unpack
from siglip2_packed.pooling import Siglip2PackedPoolingHead
from siglip2_packed.preprocess import Siglip2PackedImageProcessor


class Difference(NamedTuple):
    """This model's features against another's, of every patch `[h, w]`."""

    against: str
    cosine: Tensor
    """1 - cosine"""
    relative: Tensor
    """‖x − other‖ / ‖other‖"""


@dataclass(frozen=True)
class View:
    """One image, as the panels show it."""

    name: str
    pixels: np.ndarray
    """`[h·p, w·p, 3]` uint8: what the model is given, resized to its grid."""
    colours: Tensor
    """`[h, w, 3]` in 0..1"""
    explained: float
    """Share of the features' variance that the colours show."""
    attention: Tensor | None
    """`[H, h, w]`, each head's sums to one; None without a pooling head."""
    cosines: Tensor
    """`[T, T]`"""
    patch: tuple[int, int]
    """(row, column) of the patch that cosines are shown to."""
    difference: Difference | None = None
    fitted_to: int = 1
    """Images whose patches the colours' principal components are those of."""

    @property
    def variance(self) -> str:
        """What the colours show, and of what."""
        of = f" of {self.fitted_to} images together" if self.fitted_to > 1 else ""
        return f"{self.explained:.0%} of the variance{of}"

    @property
    def grid(self) -> tuple[int, int]:
        return self.colours.shape[0], self.colours.shape[1]


def visible_pixels(patches: Tensor, grid: tuple[int, int], processor: Siglip2PackedImageProcessor) -> np.ndarray:
    """`[T, P]` normalised patches -> `[h·p, w·p, 3]` uint8, the image they were cut from."""
    (h, w), p = grid, processor.patch_size
    image = rearrange(patches, "(h w) (py px c) -> (h py) (w px) c", h=h, w=w, py=p, px=p).double().numpy()
    if processor.do_normalize:
        image = image * processor.image_std + processor.image_mean
    levels = image / (processor.rescale_factor if processor.do_rescale else 1 / 255)
    return levels.round().clip(0, 255).astype(np.uint8)


def principal_components(features: Tensor, k: int = 3) -> tuple[Tensor, float]:
    """`[T, D]` -> the first k principal components `[T, k]`, largest first, and the share of the variance they hold.

    Each has the sign that makes its direction's largest entry positive, so that equal features give equal pictures.
    Components that T patches do not have are zero.
    """
    centred = features.float() - features.float().mean(dim=0)
    _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:k]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    components = centred @ (directions * largest.sign()).T
    variances = sizes.double().square()
    explained = float(variances[:k].sum() / variances.sum()) if variances.sum() > 0 else 0.0
    return F.pad(components, (0, k - components.shape[1])), explained


def colours(components: Tensor) -> Tensor:
    """`[T, 3]` -> `[T, 3]` in 0..1: each component from its 1st to its 99th percentile, so that no outlier dims all."""
    low, high = components.quantile(torch.tensor([0.01, 0.99]), dim=0)
    span = high - low
    flat = span <= 1e-6 * components.abs().amax()
    return torch.where(flat, 0.5, (components - low) / torch.where(flat, 1.0, span)).clamp(0, 1)


def pooling_attention(head: Siglip2PackedPoolingHead, features: Tensor) -> Tensor:
    """`[T, D]` of one image -> `[H, T]`: what share each head of the pooling head reads of each patch."""
    q_weight, k_weight, _ = head.attention.in_proj_weight.detach().float().chunk(3)
    q_bias, k_bias, _ = head.attention.in_proj_bias.detach().float().chunk(3)
    size = head.attention.head_dim
    q = F.linear(head.probe[0].detach().float(), q_weight, q_bias).view(-1, size)
    k = F.linear(features.float().to(q.device), k_weight, k_bias).unflatten(-1, (-1, size))
    return torch.einsum("hk,thk->ht", q * size**-0.5, k).softmax(dim=-1)


def cosines(features: Tensor) -> Tensor:
    """`[T, D]` -> `[T, T]`, of every patch to every other."""
    unit = F.normalize(features.float(), dim=1)
    return (unit @ unit.T).clamp(-1, 1)


def difference(features: Tensor, other: Tensor, grid: tuple[int, int], against: str) -> Difference:
    """`[T, D]` twice. 1 - cosine is half the squared distance of the unit vectors, which does not cancel."""
    x, other = features.double(), other.double()
    apart = F.normalize(x, dim=1) - F.normalize(other, dim=1)
    relative = (x - other).norm(dim=1) / other.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    return Difference(against, (apart.square().sum(dim=1) / 2).view(grid), relative.view(grid))


class Encoded(NamedTuple):
    """N images through the packed model, in one pack."""

    grids: list[tuple[int, int]]
    pixels: list[np.ndarray]
    features: list[Tensor]
    """`[T, D]` each"""
    head: Siglip2PackedPoolingHead | None


@torch.no_grad()
def encode(
    ckpt: str, files: Sequence[Path], device: torch.device, dtype: torch.dtype, attention: str, limit: int | None
) -> Encoded:
    settings: Any = {} if limit is None else {"max_num_patches": limit}
    processor = Siglip2PackedImageProcessor.from_pretrained(ckpt, **settings)
    model = load_packed(ckpt, device, dtype, attention)
    packed = processor([str(file) for file in files])
    grid_thw, grids = packed["grid_thw"], [(h, w) for _, h, w in packed["grid_thw"].tolist()]
    patches = unpack(packed["pixel_values"], grid_thw)
    pixels = [visible_pixels(x, grid, processor) for x, grid in zip(patches, grids)]
    features = unpack(model(**packed.to(device)).last_hidden_state.float().cpu(), grid_thw)
    return Encoded(grids, pixels, list(features), getattr(model, "head", None))


@torch.no_grad()
def encode_padded(
    against: str, ckpt: str, files: Sequence[Path], device: torch.device, limit: int | None
) -> tuple[list[tuple[int, int]], list[Tensor]]:
    """Grids and features of the same checkpoint in float32, by `kernels_ref` ("padded") or by "transformers"."""
    reference = load_reference(ckpt, device)
    if against == "transformers":
        theirs = load_transformers(ckpt, device, torch.float32, "head.probe" in reference.state)
        if theirs.not_loaded:
            raise ValueError(f"--against transformers: {theirs.loaded(len(reference.state))}")
    grids, features = [], []
    for file in files:  # one by one: a run keeps the hidden states of all layers
        case = image_case(file.name, [file], ckpt, limit)
        padded = against == "padded"
        stages = run_reference(reference, case) if padded else run_transformers(theirs.model, case)
        grids += case.grids
        features.append(stages["final"].float().cpu())
    return grids, features


def make_views(
    names: Sequence[str],
    encoded: Encoded,
    patch: tuple[int, int] | None = None,
    against: str = "",
    others: tuple[Sequence[tuple[int, int]], Sequence[Tensor]] | None = None,
    pca: str = "together",
) -> list[View]:
    """What there is to draw of N images.

    Args:
        pca: `"together"`: one for all images, the same colour means the same thing in each; `"image"`: each its own.
        patch: (row, column) that cosines are shown to. None: the one that the head attends to most, or the middle.
        others: grids and features of the model they are compared with, named `against`.

    Raises:
        ValueError: non-finite features, a patch outside a grid, or features that cannot be compared.
    """
    features = encoded.features
    for name, x in zip(names, features):
        bad = int((~x.isfinite()).any(dim=1).sum())
        if bad:
            raise ValueError(f"{name}: features of {bad} of {len(x)} patches are not finite")
    if pca == "image":
        painted = [(colours(components), share) for components, share in map(principal_components, features)]
    else:
        components, explained = principal_components(torch.cat(features))
        painted = [(some, explained) for some in colours(components).split([len(x) for x in features])]
    views = []
    for i, (name, (h, w), x) in enumerate(zip(names, encoded.grids, features)):
        attention = None if encoded.head is None else pooling_attention(encoded.head, x).view(-1, h, w).cpu()
        at = _most_attended((h, w), attention) if patch is None else patch
        if not (0 <= at[0] < h and 0 <= at[1] < w):
            raise ValueError(
                f"--patch {at[0]},{at[1]} is outside {name}, which has {h} rows and {w} columns of patches"
            )
        compared = None if others is None else _compared(name, (h, w), x, others[0][i], others[1][i], against)
        pixels, (shades, share) = encoded.pixels[i], painted[i]
        fitted = len(features) if pca == "together" else 1
        views.append(
            View(name, pixels, shades.view(h, w, 3), share, attention, cosines(x), at, compared, fitted_to=fitted)
        )
    return views


def _most_attended(grid: tuple[int, int], attention: Tensor | None) -> tuple[int, int]:
    """`[H, h, w]` -> (row, column) of the patch that the heads read most of; without a head the middle one."""
    h, w = grid
    return (h // 2, w // 2) if attention is None else divmod(int(attention.mean(dim=0).argmax()), w)


def _compared(
    name: str, grid: tuple[int, int], features: Tensor, their_grid: tuple[int, int], theirs: Tensor, against: str
) -> Difference:
    (h, w), (their_h, their_w) = grid, their_grid
    if (their_h, their_w) != (h, w):
        raise ValueError(f"{name}: {h}x{w} patches here, {their_h}x{their_w} in {against}; try --max-num-patches")
    if theirs.shape[1] != features.shape[1]:
        raise ValueError(f"{name}: features of width {features.shape[1]} here, {theirs.shape[1]} in {against}")
    if not theirs.isfinite().all():
        raise ValueError(f"{name}: features in {against} are not finite")
    return difference(features, theirs, grid, against)
