"""`siglip2-packed encode`: the features of images, of a few or of a whole collection.

    sources -> decode -> packs -> features -> shards

The stages are in `collection/`; here is what a command adds: flags, the model, the progress bar, the exit code.
Decoding runs ahead of the model, in threads or processes, writing in a thread behind it.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from siglip2_packed.collection.decode import DECODE_IN, cores, decoding_pool
from siglip2_packed.collection.features import EncodedImage, Meter, StrictError, encode
from siglip2_packed.collection.run import check_run, fingerprint, leave, to_folder
from siglip2_packed.collection.shards import FORMATS, write_file
from siglip2_packed.collection.sources import Inputs, find_inputs
from siglip2_packed.flags import DTYPES, add_model_flags, pick_device
from siglip2_packed.graphs import replayed
from siglip2_packed.modeling import Siglip2PackedVisionModel
from siglip2_packed.ops.segments import Segments
from siglip2_packed.preprocess import Siglip2PackedImageProcessor

REPORTED = 20
"""Errors said on stderr; all of them are in errors.csv."""


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("images", nargs="+", metavar="INPUT", help="files, folders, lists (.txt, - for stdin), .tar, .parquet")
    add("--out", required=True, metavar="DIR", help="folder to write shards and index.csv to; or one .safetensors file")
    add_model_flags(parser, dtype="dtype to compute and save")
    add("--pooled", action="store_true", help="also the pooling head's vector of each image")
    add("--patches", action=argparse.BooleanOptionalAction, default=True, help="the features of all patches (yes)")
    add("--format", choices=FORMATS, default="safetensors", help="what a shard is (safetensors)")
    add("--shard-size", type=int, metavar="N", help="inputs a shard (1024; 8192 with --no-patches)")
    add("--resume", action="store_true", help="go on with the run in DIR, if there is one")
    add("--strict", action="store_true", help="stop at the first image that cannot be read")
    add("--column", metavar="NAME", help="image column of Parquet files (the one there is)")
    add("--workers", type=int, metavar="N", help="decoding threads or processes (one a core)")
    add("--decode-in", choices=DECODE_IN, help="which of them (processes beside a GPU, else threads)")
    add("--save-dtype", choices=list(DTYPES), help="dtype to save (as --dtype; float32 where there is no bfloat16)")
    add("--patch-budget", type=int, default=16384, metavar="N", help="patches a pack (16384)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    check_arguments(args, out, is_one_file(out), int(os.environ.get("WORLD_SIZE", 1)))
    inputs = find_inputs(args.images, args.column, but=out.resolve())
    limit = {} if args.max_num_patches is None else {"max_num_patches": args.max_num_patches}
    processor = Siglip2PackedImageProcessor.from_pretrained(args.ckpt, **limit)
    if args.patch_budget < processor.max_num_patches:
        raise ValueError(
            f"--patch-budget {args.patch_budget} is less than the {processor.max_num_patches} patches an image may have"
        )
    workers = args.workers or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    # forks before there is a model, while that is quick
    with decoding_pool(pick_device(args.device), processor, workers, args.decode_in, args.patch_budget) as pool:
        return encode_inputs(args, out, inputs, processor, pool, workers)


def encode_inputs(
    args: argparse.Namespace,
    out: Path,
    inputs: Inputs,
    processor: Siglip2PackedImageProcessor,
    pool: Executor,
    workers: int,
) -> int:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = local_device(args.device)
    model: Any = load_model(args, device)
    weights = fingerprint(model)
    forward = replayed(model, args.patch_budget)
    empty = nothing_yet(args, model.config.hidden_size)
    meter = Meter(args.patch_budget)

    def encoded(ranges: list[tuple[int, int]], done: int = 0) -> Iterator[EncodedImage]:
        wanted = chain.from_iterable(inputs.read(*some) for some in ranges)
        total = done + sum(stop - start for start, stop in ranges)
        with tqdm(total=total, initial=done, unit="image", dynamic_ncols=True, disable=rank > 0) as progress:
            images = encode(
                forward,
                processor,
                wanted,
                pool,
                pooled=args.pooled,
                patches=args.patches,
                patch_budget=args.patch_budget,
                workers=workers,
                strict=args.strict,
                meter=meter,
            )
            yield from watched(images, progress, meter)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of files that are read all the same
            if is_one_file(out):
                out.parent.mkdir(parents=True, exist_ok=True)
                described = {"ckpt": args.ckpt, "dtype": args.dtype, "max_num_patches": processor.max_num_patches}
                counts = write_file(out, encoded([(0, len(inputs))]), empty, described)
            else:
                settings = run_settings(args, inputs, processor, sorted(empty), weights)
                counts = to_folder(out, settings, args.resume, encoded, empty, rank, world)
    except BrokenExecutor as error:
        raise OSError("a decoding process was killed (out of memory?): see --workers; --resume goes on") from error
    except StrictError as error:
        print(f"siglip2-packed encode: --strict: {error}", file=sys.stderr)
        return 1
    if rank == 0:
        print(f"wrote {args.out}: {counts.read} images, {counts.patches} patches ({args.dtype} on {device})")
        print(f"{'rank 0: ' * (world > 1)}{meter.images / meter.seconds:.1f} images/s, {meter}", flush=True)
        if counts.failed:
            print(f"{counts.failed} of {len(inputs)} images could not be read", file=sys.stderr)
    leave(world)  # not before the lines above are out
    return 1 if counts.failed else 0


def load_model(args: argparse.Namespace, device: torch.device) -> Siglip2PackedVisionModel:
    """Raises ValueError for a head or a backend that was asked for and is not there."""
    dtype = DTYPES[args.dtype]
    head: Any = {} if args.pooled else {"vision_use_head": False}
    model: Any = Siglip2PackedVisionModel.from_pretrained(
        args.ckpt, dtype=dtype, attn_implementation=args.attn_implementation, **head
    )
    if args.pooled and not hasattr(model, "head"):
        raise ValueError(f"--pooled: {args.ckpt!r} has no pooling head")
    model.to(device).eval()
    with torch.no_grad():
        model._attention(Segments([256], device))  # refused here, not in the middle
    return model


def nothing_yet(args: argparse.Namespace, hidden_size: int) -> dict[str, Tensor]:
    """What is kept of no images, in the dtype to save: patches `[0, D]`, pooled `[0, D]`."""
    kept = {"patches": args.patches, "pooled": args.pooled}
    return {name: torch.zeros(0, hidden_size, dtype=save_dtype(args)) for name, wanted in kept.items() if wanted}


def save_dtype(args: argparse.Namespace) -> torch.dtype:
    dtype = DTYPES[args.save_dtype or args.dtype]
    return torch.float32 if dtype == torch.bfloat16 and args.format != "safetensors" else dtype


def run_settings(
    args: argparse.Namespace, inputs: Inputs, processor: Siglip2PackedImageProcessor, kept: list[str], weights: str
) -> dict[str, Any]:
    """What `--resume` compares: all that the rows in a shard depend on."""
    return {
        "inputs": len(inputs),
        "names": inputs.fingerprint(),
        "column": args.column,
        "shard_size": args.shard_size or (1024 if args.patches else 8192),
        "format": args.format,
        "kept": kept,
        "dtype": args.dtype,
        "save_dtype": str(save_dtype(args)).removeprefix("torch."),
        **processor.to_dict(),
        "checkpoint": args.ckpt,
        "weights": weights,
    }


def is_one_file(out: Path) -> bool:
    return out.suffix == ".safetensors" and not out.is_dir()


def check_arguments(args: argparse.Namespace, out: Path, one_file: bool, world: int) -> None:
    if not (args.patches or args.pooled):
        raise ValueError("--no-patches without --pooled: nothing to write")
    for flag, value in (("--shard-size", args.shard_size), ("--workers", args.workers)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} must be at least 1, got {value}")
    if one_file:
        for flag, given in (("--resume", args.resume), ("torchrun", world > 1), ("--shard-size", args.shard_size)):
            if given:
                raise ValueError(f"{flag} needs a folder: --out {args.out!r} is one file")
        if args.format != "safetensors" or not args.patches:
            raise ValueError(f"--out {args.out!r} is one safetensors file of patches: give a folder")
    elif out.suffix[1:] in (*FORMATS, "csv") and not out.is_dir():
        raise ValueError(f"--out {args.out!r}: give a folder, and --format for what its shards are")
    elif out.exists() and not out.is_dir():
        raise ValueError(f"--out {args.out!r} is a file, not a folder")
    elif not args.resume:
        check_run(out, {}, resume=False)
    if world > 1 and "-" in args.images:
        raise ValueError("standard input is one process's: write the list to a file for torchrun")


def watched(images: Iterator[EncodedImage], progress: tqdm, meter: Meter) -> Iterator[EncodedImage]:
    """Passes the images on, moves the progress bar and says what went wrong."""
    packs = faults = 0
    for image in images:
        if image.error:
            if faults < REPORTED:
                progress.write(f"image {image.ordinal} ({image.name}): {image.error}", file=sys.stderr)
            elif faults == REPORTED:
                progress.write("further errors are not shown here, only written", file=sys.stderr)
            faults += 1
        yield image
        if packs != meter.packs:
            packs = meter.packs
            progress.set_postfix_str(str(meter), refresh=False)
        progress.update()


def local_device(name: str | None) -> torch.device:
    """The device asked for; under torchrun `cuda` is the rank's own."""
    device = pick_device(name)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return device
