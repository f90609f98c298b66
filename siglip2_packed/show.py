"""`siglip2-packed show`: features as colours, attention and cosines, and where two models differ, for a person."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from siglip2_packed.collection.sources import image_files
from siglip2_packed.flags import DTYPES, pick_device
from siglip2_packed.inspection.photographs import photographs
from siglip2_packed.inspection.references import full_precision
from siglip2_packed.inspection.report import PANEL_SUFFIXES, draw_panel, require_matplotlib, write_html
from siglip2_packed.inspection.views import View, encode, encode_padded, make_views

MAX_IMAGES = 32


def run(args: argparse.Namespace) -> int:
    if not (args.out or args.html):
        raise ValueError("nothing to write: give --out panel.png, --html report.html or both")
    out = args.out and output_path("--out", args.out, PANEL_SUFFIXES)
    html = args.html and output_path("--html", args.html, (".html", ".htm"))
    if out:
        require_matplotlib()
    files = (photographs(3) if args.use_real_images else []) + image_files(args.images)
    if not files:
        raise ValueError("no images: name some, or give --use-real-images")
    if len(files) > MAX_IMAGES:
        raise ValueError(f"{len(files)} images; show draws at most {MAX_IMAGES} at a time")
    device, dtype = pick_device(args.device), DTYPES[args.dtype]

    with full_precision():
        encoded = encode(args.ckpt, files, device, dtype, args.attn_implementation, args.max_num_patches)
        others = None
        if args.against in ("padded", "transformers"):
            others = encode_padded(args.against, args.ckpt, files, device, args.max_num_patches)
        elif args.against:
            other = encode(args.against, files, device, dtype, args.attn_implementation, args.max_num_patches)
            others = other.grids, other.features
        names = [file.name.encode("utf-8", "replace").decode() for file in files]  # a font has no glyph for a bare byte
        views = make_views(names, encoded, args.patch, args.against or "", others, args.pca)

    if len(views) > 1 and args.pca == "together":
        print(
            f"principal components: of the patches of all {len(views)} images together; --pca image: each image's own"
        )
    for view in views:
        print(summary(view))
    if out:
        draw_panel(views, out)
        print(f"wrote {out}")
    if html:
        write_html(views, html, f"{args.ckpt}, {args.dtype}")
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
