"""`siglip2-packed encode`: the features of images, packed up to a budget, into one safetensors file."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from siglip2_packed.attention import head_dim
from siglip2_packed.doctor import DTYPES, pick_device
from siglip2_packed.modeling import Siglip2PackedVisionModel
from siglip2_packed.ops.attention import ATTN_IMPLEMENTATIONS
from siglip2_packed.ops.dispatch import resolve_backend
from siglip2_packed.packing import unpack
from siglip2_packed.preprocess import Siglip2PackedImageProcessor

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, or folders to walk for images")
    parser.add_argument("--out", required=True, metavar="FILE", help="safetensors file to write")
    parser.add_argument("--ckpt", required=True, help="checkpoint: a folder or a hub id")
    parser.add_argument("--pooled", action="store_true", help="also the pooling head's vector of each image")
    parser.add_argument("--device", help="device to run on (cuda if there is one, else cpu)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="dtype to compute and save (float32)")
    parser.add_argument("--max-num-patches", type=int, metavar="N", help="patches an image (as the checkpoint says)")
    parser.add_argument("--patch-budget", type=int, default=16384, metavar="N", help="patches a pack (16384)")
    parser.add_argument("--attn-implementation", choices=ATTN_IMPLEMENTATIONS, default="auto", help="backend (auto)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    if out.is_dir():
        raise ValueError(f"--out {args.out!r} is a folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    files = image_files(args.images)
    limit = {} if args.max_num_patches is None else {"max_num_patches": args.max_num_patches}
    processor = Siglip2PackedImageProcessor.from_pretrained(args.ckpt, **limit)
    if args.patch_budget < processor.max_num_patches:
        raise ValueError(
            f"--patch-budget {args.patch_budget} is less than the {processor.max_num_patches} patches an image may have"
        )
    device, dtype = pick_device(args.device), DTYPES[args.dtype]
    head: Any = {} if args.pooled else {"vision_use_head": False}
    model: Any = Siglip2PackedVisionModel.from_pretrained(
        args.ckpt, dtype=dtype, attn_implementation=args.attn_implementation, **head
    )
    model.to(device).eval()
    if args.pooled and not hasattr(model, "head"):
        raise ValueError(f"--pooled: {args.ckpt!r} has no pooling head")
    # a backend that was asked for and cannot run is refused here, not in the middle
    resolve_backend(args.attn_implementation, device, dtype, head_dim(model.config), needs_grad=False)

    features, failed = encode(model, processor, files, args.patch_budget // processor.max_num_patches)
    grids = features["grid_thw"].tolist()
    kept = [index for index in range(len(files)) if index not in failed]
    metadata = {
        "images": {_key(i): {"file": str(files[i]), "grid_thw": grid} for i, grid in zip(kept, grids)},
        "failed": {_key(i): {"file": str(files[i]), "reason": reason} for i, reason in failed.items()},
        "model": {"ckpt": args.ckpt, "dtype": args.dtype, "max_num_patches": processor.max_num_patches},
    }
    write_safetensors(out, features, {name: json.dumps(value) for name, value in metadata.items()})
    patches = int(features["grid_thw"].prod(dim=1).sum())
    print(f"wrote {args.out}: {len(kept)} images, {patches} patches ({args.dtype} on {device})")
    if failed:
        print(f"{len(failed)} of {len(files)} images could not be read", file=sys.stderr)
    return 1 if failed else 0


@torch.inference_mode()
def encode(
    model: Siglip2PackedVisionModel, processor: Siglip2PackedImageProcessor, files: Sequence[Path], images_per_pack: int
) -> tuple[dict[str, Tensor], dict[int, str]]:
    """Features of all files that can be read, on the host, and (index -> reason) of those that cannot.

    Returns:
        `"00000"`, ...: `[h·w, D]` of the file of that index. `grid_thw [N, 3]` and, if the model has a head,
        `pooled [N, D]`: a row for each file that was read, in their order.
    """
    features: dict[str, Tensor] = {}
    grids, pooled, failed = [], [], {}
    with tqdm(total=len(files), unit="image", dynamic_ncols=True) as progress:
        for start in range(0, len(files), images_per_pack):
            some = files[start : start + images_per_pack]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what was skipped is said below, one line each
                packed = processor([str(file) for file in some], on_error="skip")
            for index, name, reason in packed.skipped:
                failed[start + index] = reason
                progress.write(f"image {start + index} ({name}): {reason}", file=sys.stderr)
            if packed.num_images:
                output = model(**packed.to(model.device))
                images = unpack(output.last_hidden_state.cpu(), packed["grid_thw"])
                features |= {_key(start + index): image.clone() for index, image in zip(packed.kept, images)}
                grids.append(packed["grid_thw"])
                if hasattr(model, "head"):
                    pooled.append(output.pooler_output.cpu())
            progress.update(len(some))
    features["grid_thw"] = torch.cat([torch.zeros(0, 3, dtype=torch.int64), *grids])
    if hasattr(model, "head"):
        nothing = torch.zeros(0, model.config.hidden_size, dtype=model.dtype)
        features["pooled"] = torch.cat([nothing, *pooled])
    return features, failed


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Written beside it and renamed, so that the file is whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def image_files(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """Files as they are, folders walked in sorted order for files with an image's suffix.

    Raises:
        ValueError: a folder without images.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not found:
                raise ValueError(f"no images in {str(path)!r} (files that end in {', '.join(SUFFIXES)})")
        files += found
    return files


def _key(index: int) -> str:
    return f"{index:05d}"
