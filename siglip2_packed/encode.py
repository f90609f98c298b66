"""`siglip2-packed encode`: the features of images, of a few or of a whole collection.

    sources -> decode -> packs -> features -> shards

The stages are in `collection/`; here is what a command adds: the model, the progress bar, the exit code. It is 0
for a run that came to its end, whatever it could not read, so that a launcher does not start it again; 1 if it read
nothing, or --strict or --max-errors say so.
Decoding runs ahead of the model, in threads or processes, writing in a thread behind it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from siglip2_packed.card import PIXELS_AT_ONCE, Card
from siglip2_packed.collection import FORMATS
from siglip2_packed.collection.decode import DecodingProcesses, DecodingThreads, cores, decoding_pool, most_ahead
from siglip2_packed.collection.features import EncodedImage, Meter, StrictError, encode, of_unit_length
from siglip2_packed.collection.identity import tower, versions, weights_digest
from siglip2_packed.collection.kept import check_names
from siglip2_packed.collection.lock import Lock, lock_of
from siglip2_packed.collection.parquet import import_pyarrow
from siglip2_packed.collection.plan import Share
from siglip2_packed.collection.ranks import Ranks
from siglip2_packed.collection.run import check_run, complete, read_run, to_folder
from siglip2_packed.collection.shards import TABLES, Counts, check_replaced, replacing, write_file
from siglip2_packed.collection.shelf import Shelf
from siglip2_packed.collection.sources import Inputs, as_path, find_inputs
from siglip2_packed.collection.tar import Tar
from siglip2_packed.collection.walk import Skipped
from siglip2_packed.flags import DTYPES, pick_device
from siglip2_packed.graphs import replayed
from siglip2_packed.invariance import asked
from siglip2_packed.jpeg import decoder
from siglip2_packed.measure import cpu_bfloat16
from siglip2_packed.modeling import Siglip2PackedVisionModel
from siglip2_packed.ops.segments import Segments
from siglip2_packed.preprocess import Siglip2PackedImageProcessor
from siglip2_packed.remote import is_url

REPORTED = 20
"""Errors said on stderr; all of them are in errors.csv."""
BUDGETS = {"cuda": 16384, "cpu": 2048}
"""Patches a pack. A GPU is busy with so many; on a CPU fewer are as fast, and something is seen to happen."""


def run(args: argparse.Namespace) -> int:
    whole, ranks, share = Path(args.out), Ranks.of_torchrun(), Share(*args.shard)
    out = share.folder(whole) if share.of > 1 else whole
    check_arguments(args, whole, ranks.world)
    args.out = str(out)
    ranks.join()
    with locked(out, ranks) as lock:
        if not is_one_file(out):
            check_run(out, {}, args.resume)
        device = pick_device(args.device)
        inputs = find_inputs(args.images, args.column, but=whole.resolve(), keep=args.keep)
        chosen: dict[str, Any] = {} if args.max_num_patches is None else {"max_num_patches": args.max_num_patches}
        chosen["decode"] = args.decode or run_before(out).get("decode", "exact")
        processor = Siglip2PackedImageProcessor.from_pretrained(args.ckpt, **chosen)
        longest = processor.max_num_patches
        if args.patch_budget is None:
            args.patch_budget = max(longest, BUDGETS.get(device.type, BUDGETS["cuda"]))
        if args.patch_budget < longest:
            raise ValueError(f"--patch-budget {args.patch_budget} is less than the {longest} patches an image may have")
        workers = args.workers or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        # forks before there is a card or a model, while that is quick
        with decoding_pool(device, processor, workers, args.decode_in, args.patch_budget) as pool:
            card = card_of(processor, args.device)
            if card is not None and card.device.type == "cuda":
                pool.shelf.lock_pages(card.device)
            return encode_inputs(args, out, inputs, processor, card, pool, workers, ranks, lock)


@contextmanager
def locked(out: Path, ranks: Ranks) -> Iterator[Lock]:
    """Rank 0 holds the lock for all. Raises BlockingIOError, which says who else does."""
    lock = Lock(lock_of(out, is_one_file(out)))
    try:  # a signal may come as soon as it is taken
        lock.join(ranks.first(lock.take))
        yield lock
    finally:
        lock.release()


def encode_inputs(
    args: argparse.Namespace,
    out: Path,
    inputs: Inputs,
    processor: Siglip2PackedImageProcessor,
    card: Card | None,
    pool: DecodingThreads | DecodingProcesses,
    workers: int,
    ranks: Ranks,
    lock: Lock,
) -> int:
    device = local_device(args.device)
    before = run_before(out)  # it goes on as what it was begun, wherever that was
    dtypes = {name: before[name] for name in ("dtype", "save_dtype") if before.get(name) in DTYPES.names}
    default = args.dtype is None and not before
    args.dtype = args.dtype or dtypes.get("dtype") or default_dtype(device)
    args.save_dtype = args.save_dtype or dtypes.get("save_dtype")
    begun = before.get("shard_size") if isinstance(before.get("shard_size"), int) else None
    args.shard_size = args.shard_size or begun or shard_size(args.patches, len(inputs), ranks.world * args.shard[1])
    share = Share(*args.shard)
    settings = run_settings(args, processor, inputs.schema)
    if not is_one_file(out):
        check_run(out, complete(settings, inputs), args.resume, inputs)  # before the model, which takes longer
    model: Any = load_model(args)
    with ThreadPoolExecutor(1) as beside:  # of the weights on the host, which the model leaves now
        weights = beside.submit(weights_digest, model.state_dict(), workers)
        on_device(model, device)
        forward = replayed(model, args.patch_budget)
    invariant = {"batch_invariant": asked(model.config)}
    settings |= {"tower": tower(model.config), "checkpoint": args.ckpt, "weights": weights.result(), **invariant}
    empty = nothing_yet(args, model.config.hidden_size)
    meter = Meter(args.patch_budget)

    def encoded(ranges: list[tuple[int, int]], done: int = 0) -> Iterator[EncodedImage]:
        wanted = chain.from_iterable(inputs.read(*some) for some in ranges)
        count = sum(stop - start for start, stop in ranges)
        if ranks.rank == 0:
            say_lacking(inputs)
            say_size(out, count * ranks.world, processor.max_num_patches, empty, args)
            say_ahead(processor, workers, args.patch_budget, pool.shelf if card else None)
            if default:
                say_faster(device)
        with tqdm(
            total=done + count, initial=done, unit="image", dynamic_ncols=True, disable=ranks.rank > 0
        ) as progress:
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
                card=card,
            )
            yield from watched(of_unit_length(images) if args.normalize else images, progress, meter)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of files that are read all the same
            if is_one_file(out):
                described = {"ckpt": args.ckpt, "dtype": args.dtype, "max_num_patches": processor.max_num_patches}
                described |= {"decode": processor.decode, "normalize": args.normalize, **invariant}
                counts = write_file(out, encoded([(0, len(inputs))]), empty, described)
            else:
                how: Any = {"resume": args.resume, "retry_errors": args.retry_errors}
                counts = to_folder(
                    out, inputs, settings, encoded, empty, **how, ranks=ranks, held=lock.held, share=share
                )
    except BrokenExecutor as error:
        raise OSError("a decoding process was killed (out of memory?): see --workers; --resume goes on") from error
    except StrictError as error:
        print(f"siglip2-packed encode: --strict: {error}", file=sys.stderr)
        return 1
    if ranks.rank == 0:
        print(f"wrote {args.out}: {counts.read} images, {counts.patches} patches ({args.dtype} on {device})")
        rate = f"{meter.images / meter.seconds:.1f} images/s, {meter}, decode {decoded_by(processor, card)}"
        print(f"{'rank 0: ' * (ranks.world > 1)}{rate}", flush=True)
    code = verdict(counts, args)
    if ranks.rank == 0:
        if counts.failed:
            where = "" if is_one_file(out) or share.of > 1 else f": see {out / 'errors.csv'}"
            print(f"{counts.failed} of {counts.failed + counts.read} images could not be read{where}", file=sys.stderr)
        if share.of > 1:
            print(f"share {share}; once all are there: siglip2-packed merge {out.parent}")
        say_skipped(inputs.skipped, None if is_one_file(out) else out / "skipped.csv", lock.held)
    ranks.leave()  # not before the lines above are out
    return code


def run_before(out: Path) -> dict[str, Any]:
    """The settings of the run that is there."""
    return {} if is_one_file(out) else read_run(out)


def card_of(processor: Siglip2PackedImageProcessor, device: str | None) -> Card | None:
    """What resizes on the card, and decodes there with --decode gpu; if any. Without nvJPEG that is exact, and said.

    Raises:
        ValueError: it is to decode, and there is none.
    """
    where = local_device(device)
    if processor.decode == "gpu" and where.type != "cuda":
        raise ValueError(f"--decode gpu needs a CUDA device, this is {where}")
    try:
        return processor.on_card(where)
    except ValueError as error:
        print(f"{error}. All images are decoded the exact way (--decode exact)", file=sys.stderr)
        processor.decode = "exact"
        return processor.on_card(where)


def decoded_by(processor: Siglip2PackedImageProcessor, card: Card | None) -> str:
    if card is None or processor.decode != "gpu":
        return f"{processor.decode} (JPEG by {decoder()}{', resized on the card' * (card is not None)})"
    return f"gpu ({card.decoded} on the card, {card.refused} refused by it)"


def verdict(counts: Counts, args: argparse.Namespace) -> int:
    """The exit code: 1 if no image was read, or more were not than --strict or --max-errors allow."""
    total = counts.read + counts.failed
    allowed = 0 if args.strict else args.max_errors
    failed = counts.failed / max(total, 1) if isinstance(allowed, float) else counts.failed
    return int(counts.failed > 0 and (counts.read == 0 or (allowed is not None and failed > allowed)))


def say_skipped(skipped: Skipped, file: Path | None, held: Callable[[], None]) -> None:
    """What was passed over, on a line, and where there is a folder in a table, also if that is empty."""
    if file is not None:
        with replacing(file, held) as path:
            path.write_text(skipped.table(), encoding="utf-8", errors="surrogateescape", newline="")
    if skipped:
        print(f"passed over: {skipped}", flush=True)


def load_model(args: argparse.Namespace) -> Siglip2PackedVisionModel:
    """On the CPU. Raises ValueError for a head that was asked for and is not there."""
    dtype = DTYPES[args.dtype]
    changes: Any = {} if args.pooled else {"vision_use_head": False}
    if args.batch_invariant:
        changes["batch_invariant"] = True
    model: Any = Siglip2PackedVisionModel.from_pretrained(
        args.ckpt, dtype=dtype, attn_implementation=args.attn_implementation, **changes
    )
    if args.pooled and not hasattr(model, "head"):
        raise ValueError(f"--pooled: {args.ckpt!r} has no pooling head")
    return model


def on_device(model: Any, device: torch.device) -> None:
    """Raises ValueError for a backend that was asked for and is not there."""
    model.to(device).eval()
    with torch.no_grad():
        model._attention(Segments([256], device))  # refused here, not in the middle


def nothing_yet(args: argparse.Namespace, hidden_size: int) -> dict[str, Tensor]:
    """What is kept of no images, in the dtype to save: pooled `[0, D]`, patches `[0, D]`."""
    return {name: torch.zeros(0, hidden_size, dtype=save_dtype(args)) for name in kept(args)}


def kept(args: argparse.Namespace) -> list[str]:
    return ["patches"] * args.patches + ["pooled"] * args.pooled


def save_dtype(args: argparse.Namespace) -> torch.dtype:
    dtype = DTYPES[args.save_dtype or args.dtype]
    return torch.float32 if dtype == torch.bfloat16 and args.format != "safetensors" else dtype


def default_dtype(device: torch.device) -> str:
    fit = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fit else "float32"


def say_faster(device: torch.device) -> None:
    """Of a CPU that computes faster in another dtype than its default."""
    if device.type == "cpu" and (by := cpu_bfloat16()):
        print(
            f"this CPU has {by}: --dtype bfloat16 is about twice as fast as float32 or faster, within 1%",
            file=sys.stderr,
        )


def say_lacking(inputs: Inputs) -> None:
    """Which of what is kept samples of tar files do not have."""
    lacking: Counter[str] = Counter()
    for part in inputs.parts:
        lacking.update(part.lacking if isinstance(part, Tar) else {})
    if lacking:
        of = sum(len(part) for part in inputs.parts if isinstance(part, Tar))
        said = ", ".join(f"{name} of {count}" for name, count in sorted(lacking.items()))
        print(f"--keep: null, as their samples have none: {said} of {of} images in tar files", file=sys.stderr)


def say_size(out: Path, images: int, longest: int, empty: dict[str, Tensor], args: argparse.Namespace) -> None:
    """How much will be written at most, and what room there is for it."""
    rows = {"patches": longest, "pooled": 1}
    need = images * sum(rows[name] * x.shape[1] * x.element_size() for name, x in empty.items())
    free = shutil.disk_usage(out if out.is_dir() else out.parent).free
    dtype = str(save_dtype(args)).removeprefix("torch.")
    asked = args.save_dtype or args.dtype
    why = f" ({args.format} has no bfloat16)" if asked == "bfloat16" and dtype != asked else ""
    warn = ": this may not fit" if need > free else ""
    print(f"to write: up to {size(need)} of {dtype}{why}; free there: {size(free)}{warn}", file=sys.stderr)


def say_ahead(processor: Siglip2PackedImageProcessor, workers: int, patch_budget: int, shelf: Shelf | None) -> None:
    """What memory decoding takes at most. `shelf`: where pixels wait for a card, if they do."""
    images, patches = most_ahead(processor, workers, patch_budget, shelf is not None)
    if shelf is not None:
        what = f"images, {size(len(shelf.memory))} of files and pixels"
        pixels = f"{size(2 * 3 * PIXELS_AT_ONCE)} of pixels and {size(patches)} of patches on the card"
        print(f"ahead of the model: up to {images} {what}; {pixels}", file=sys.stderr)
    else:
        print(
            f"ahead of the model: up to {size(patches)} of patches, and {workers} images being decoded", file=sys.stderr
        )


def size(count: float) -> str:
    """`1234567` -> `1.2 MB`."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"


SHARDS_OF_A_RANK = 4


def shard_size(patches: bool, inputs: int, ranks: int) -> int:
    """Inputs a shard, where nobody asks for a number: of several ranks each has as many shards as the others."""
    most = 1024 if patches else 8192
    if ranks == 1:
        return most
    each = max(SHARDS_OF_A_RANK, -(-inputs // (most * ranks)))
    return max(1, -(-inputs // (each * ranks)))


def run_settings(
    args: argparse.Namespace, processor: Siglip2PackedImageProcessor, schema: Any = None
) -> dict[str, Any]:
    """What all rows depend on, and `--resume` compares; the model's come to it once it is there."""
    return {
        "column": args.column,
        "keep": [[field.name, str(field.type)] for field in schema or ()],
        "shard_size": args.shard_size,
        "format": args.format,
        "kept": kept(args),
        "normalize": args.normalize,
        "dtype": args.dtype,
        "save_dtype": str(save_dtype(args)).removeprefix("torch."),
        **processor.to_dict(),
        "decode": processor.decode,
        "versions": versions(processor.decode),
    }


def is_one_file(out: Path) -> bool:
    return out.suffix == ".safetensors" and not out.is_dir()


def check_arguments(args: argparse.Namespace, out: Path, world: int) -> None:
    """What can be said before anything is opened, waited for or written."""
    here = [path for path in args.images if path != "-" and not is_url(path)]
    missing = [path for path in here if not os.path.exists(as_path(path))]
    if missing:
        raise FileNotFoundError(f"no such file or folder: {', '.join(missing)}")
    if is_url(args.out):
        raise ValueError(f"--out {args.out!r} is a URL: give a folder of this machine")
    if args.out != args.out.encode("utf-8", "replace").decode():
        raise ValueError(f"--out {args.out!r} is not UTF-8: safetensors could not read what is written there")
    if not (args.patches or args.pooled):
        raise ValueError("--no-patches without --pooled: nothing to write")
    if args.normalize and not args.pooled:
        raise ValueError("--normalize is of pooled vectors: give --pooled")
    if args.format in TABLES:
        import_pyarrow()
    check_names(args.keep)
    for flag, value in (("--shard-size", args.shard_size), ("--workers", args.workers)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} must be at least 1, got {value}")
    if args.retry_errors and not args.resume:
        raise ValueError("--retry-errors goes with --resume")
    if is_one_file(out):
        for flag, given in (
            ("--resume", args.resume),
            ("torchrun", world > 1),
            ("--shard-size", args.shard_size),
            ("--keep", args.keep),
            ("--shard", args.shard[1] > 1),
        ):
            if given:
                raise ValueError(f"{flag} needs a folder: --out {args.out!r} is one file")
        check_replaced(out, "images")
        if args.format != "safetensors" or not args.patches:
            raise ValueError(f"--out {args.out!r} is one safetensors file of patches: give a folder")
    elif out.suffix[1:] in (*FORMATS, "csv") and not out.is_dir():
        raise ValueError(f"--out {args.out!r}: give a folder, and --format for what its shards are")
    elif out.exists() and not out.is_dir():
        raise ValueError(f"--out {args.out!r} is a file, not a folder")
    elif args.shard[1] > 1 and (out / "run.json").exists() and not Share(*args.shard).folder(out).exists():
        raise ValueError(f"--shard: {args.out!r} holds a whole run: go on with it without, or write elsewhere")
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
