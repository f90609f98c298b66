"""`siglip2-packed show`: what a person looks at. Features as colours, attention, cosines, and where two models differ.

This file has the numbers and the command, `report.py` draws them. Everything is computed in float32 on the host, from
the features after post_layernorm.

Shapes: N images, T patches of an image (h·w) or of all, D hidden size, P patch_dim, H heads.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2_packed import align, report
from siglip2_packed.flags import DTYPES, add_model_flags, pick_device
from siglip2_packed.packing import unpack
from siglip2_packed.pooling import Siglip2PackedPoolingHead
from siglip2_packed.preprocess import Siglip2PackedImageProcessor
from siglip2_packed.sources import image_files

MAX_IMAGES = 32
Grid = tuple[int, int]


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
    patch: Grid
    """(row, column) of the patch that cosines are shown to."""
    difference: Difference | None = None

    @property
    def grid(self) -> Grid:
        return self.colours.shape[0], self.colours.shape[1]


def visible_pixels(patches: Tensor, grid: Grid, processor: Siglip2PackedImageProcessor) -> np.ndarray:
    """`[T, P]` normalised patches -> `[h·p, w·p, 3]` uint8, the image they were cut from."""
    (h, w), p = grid, processor.patch_size
    image = patches.reshape(h, w, p, p, 3).permute(0, 2, 1, 3, 4).reshape(h * p, w * p, 3).double().numpy()
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


def difference(features: Tensor, other: Tensor, grid: Grid, against: str) -> Difference:
    """`[T, D]` twice. 1 - cosine is half the squared distance of the unit vectors, which does not cancel."""
    x, other = features.double(), other.double()
    apart = F.normalize(x, dim=1) - F.normalize(other, dim=1)
    relative = (x - other).norm(dim=1) / other.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    return Difference(against, (apart.square().sum(dim=1) / 2).view(grid), relative.view(grid))


class Encoded(NamedTuple):
    """N images through the packed model, in one pack."""

    grids: list[Grid]
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
    model = align.load_packed(ckpt, device, dtype, attention)
    packed = processor([str(file) for file in files])
    grid_thw, grids = packed["grid_thw"], [(h, w) for _, h, w in packed["grid_thw"].tolist()]
    patches = unpack(packed["pixel_values"], grid_thw)
    pixels = [visible_pixels(x, grid, processor) for x, grid in zip(patches, grids)]
    features = unpack(model(**packed.to(device)).last_hidden_state.float().cpu(), grid_thw)
    return Encoded(grids, pixels, list(features), getattr(model, "head", None))


@torch.no_grad()
def encode_padded(
    against: str, ckpt: str, files: Sequence[Path], device: torch.device, limit: int | None
) -> tuple[list[Grid], list[Tensor]]:
    """Grids and features of the same checkpoint in float32, by `kernels_ref` ("padded") or by "transformers"."""
    reference = align.load_reference(ckpt, device)
    if against == "transformers":
        theirs = align.load_transformers(ckpt, device, torch.float32, "head.probe" in reference.state)
        if theirs.not_loaded:
            raise ValueError(f"--against transformers: {align.loading(theirs, len(reference.state)).note}")
    grids, features = [], []
    for file in files:  # one by one: a run keeps the hidden states of all layers
        case = align.image_case(file.name, [file], ckpt, limit)
        padded = against == "padded"
        stages = align.run_reference(reference, case) if padded else align.run_transformers(theirs.model, case)
        grids += case.grids
        features.append(stages["final"].float().cpu())
    return grids, features


def make_views(
    names: Sequence[str],
    encoded: Encoded,
    patch: Grid | None = None,
    against: str = "",
    others: tuple[Sequence[Grid], Sequence[Tensor]] | None = None,
) -> list[View]:
    """What there is to draw of N images. One PCA for all of them: the same colour means the same thing in each.

    Args:
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
    components, explained = principal_components(torch.cat(features))
    painted = colours(components).split([len(x) for x in features])
    views = []
    for i, (name, (h, w), x) in enumerate(zip(names, encoded.grids, features)):
        attention = None if encoded.head is None else pooling_attention(encoded.head, x).view(-1, h, w).cpu()
        at = patch
        if at is None:
            at = (h // 2, w // 2) if attention is None else divmod(int(attention.mean(dim=0).argmax()), w)
        if not (0 <= at[0] < h and 0 <= at[1] < w):
            raise ValueError(
                f"--patch {at[0]},{at[1]} is outside {name}, which has {h} rows and {w} columns of patches"
            )
        compared = None
        if others is not None:
            (their_h, their_w), theirs = others[0][i], others[1][i]
            if (their_h, their_w) != (h, w):
                raise ValueError(
                    f"{name}: {h}x{w} patches here, {their_h}x{their_w} in {against}; try --max-num-patches"
                )
            if theirs.shape[1] != x.shape[1]:
                raise ValueError(f"{name}: features of width {x.shape[1]} here, {theirs.shape[1]} in {against}")
            if not theirs.isfinite().all():
                raise ValueError(f"{name}: features in {against} are not finite")
            compared = difference(x, theirs, (h, w), against)
        pixels, shades = encoded.pixels[i], painted[i].view(h, w, 3)
        views.append(View(name, pixels, shades, explained, attention, cosines(x), at, compared))
    return views


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, or folders to walk for images")
    add_model_flags(parser, dtype="dtype of the model")
    parser.add_argument("--out", metavar="FILE", help="draw the panels here: .png, .pdf or .svg")
    parser.add_argument("--html", metavar="FILE", help="write a page in which patches can be clicked")
    parser.add_argument("--patch", type=patch, metavar="ROW,COL", help="cosines to this patch (the most attended)")
    parser.add_argument("--against", metavar="MODEL", help="where it differs: padded, transformers or a checkpoint")
    parser.set_defaults(run=run)


def patch(text: str) -> Grid:
    """`3,5` -> (3, 5)"""
    row, column = text.split(",")
    return int(row), int(column)


def run(args: argparse.Namespace) -> int:
    if not (args.out or args.html):
        raise ValueError("nothing to write: give --out panel.png, --html report.html or both")
    out = args.out and output_path("--out", args.out, report.PANEL_SUFFIXES)
    html = args.html and output_path("--html", args.html, (".html", ".htm"))
    if out:
        report.require_matplotlib()
    files = image_files(args.images)
    if len(files) > MAX_IMAGES:
        raise ValueError(f"{len(files)} images; show draws at most {MAX_IMAGES} at a time")
    device, dtype = pick_device(args.device), DTYPES[args.dtype]

    with align.full_precision():
        encoded = encode(args.ckpt, files, device, dtype, args.attn_implementation, args.max_num_patches)
        others = None
        if args.against in ("padded", "transformers"):
            others = encode_padded(args.against, args.ckpt, files, device, args.max_num_patches)
        elif args.against:
            other = encode(args.against, files, device, dtype, args.attn_implementation, args.max_num_patches)
            others = other.grids, other.features
        names = [file.name.encode("utf-8", "replace").decode() for file in files]  # a font has no glyph for a bare byte
        views = make_views(names, encoded, args.patch, args.against or "", others)

    for view in views:
        print(summary(view))
    if out:
        report.draw_panel(views, out)
        print(f"wrote {out}")
    if html:
        report.write_html(views, html, f"{args.ckpt}, {args.dtype}")
        print(f"wrote {html}")
    return 0


def summary(view: View) -> str:
    """A line for the terminal."""
    h, w = view.grid
    parts = [f"{view.name}: {h}x{w} patches"]
    if view.attention is None:
        parts.append("no pooling head")
    else:
        mean = view.attention.mean(dim=0)
        parts.append(f"most attended {divmod(int(mean.argmax()), w)}, {100 * float(mean.max()):.1f}%")
    if view.difference is not None:
        worst = view.difference.relative
        at = divmod(int(worst.argmax()), w)
        parts.append(f"relative error to {view.difference.against} at most {float(worst.max()):.1e}, at {at}")
    return "; ".join(parts)


def output_path(flag: str, text: str, suffixes: Sequence[str]) -> Path:
    """Where to write, made sure of before anything is computed.

    Raises:
        ValueError: another suffix, or a folder.
        OSError: the folder cannot be made or written to.
    """
    path = Path(text)
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{flag} {text!r} must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"{flag} {text!r} is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{flag} {text!r} cannot be written")
    return path
