"""`siglip2-packed plan`: how long a collection takes on this machine, and how much disk and memory, measured now.

Images are read, and packs of them go through the model, for half of the time each; the rest is arithmetic.

Shapes: N images, T patches of a pack, D hidden size.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Siglip2VisionConfig

from siglip2_packed.collection.decode import IMAGE_SHARED, IMAGES_PER_JOB, cores
from siglip2_packed.collection.shelf import Room
from siglip2_packed.collection.sources import image_files
from siglip2_packed.doctor import device_name
from siglip2_packed.encode import BUDGETS, default_dtype, size
from siglip2_packed.flags import DTYPES, pick_device, write_json
from siglip2_packed.graphs import replayed
from siglip2_packed.images import Source, source_name
from siglip2_packed.modeling import Siglip2PackedVisionModel
from siglip2_packed.packing import PackedPatches
from siglip2_packed.preprocess import Siglip2PackedImageProcessor
from siglip2_packed.random_checkpoint import randomize
from siglip2_packed.workloads import SHAPES

SAMPLE = (768, 1024)
"""Height and width of the JPEG that stands for all, where none are given."""
LEAST = 64
"""So many of the images that are given are read, however long it takes."""
CPU_PATCHES = 512
"""A pack on a CPU: one as large as `encode`'s is no faster there, and may take longer than all the seconds given."""
GIB = 2**30


@dataclass(frozen=True)
class Measured:
    patches_an_image: float
    decoded_per_s: float
    """Images, on all cores."""
    encoded_per_s: float
    """Images, by the model alone."""
    memory: int
    """Bytes: of the device, or of this process on a CPU."""


@dataclass(frozen=True)
class Plan:
    seconds: float
    limit: str
    """What is waited for."""
    pooled: float
    """Bytes of a vector an image."""
    patches: float
    """Bytes of the features of all patches."""


def run(args: argparse.Namespace) -> int:
    if args.images < 1 or not args.seconds > 0:
        raise ValueError("--images and --seconds must be more than 0")
    device = pick_device(args.device)
    dtype = args.dtype or default_dtype(device)
    limit = {} if args.max_num_patches is None else {"max_num_patches": args.max_num_patches}
    if args.ckpt is None:
        model, processor = random_model(args.shape, limit)
    else:
        model = Siglip2PackedVisionModel.from_pretrained(args.ckpt)
        processor = Siglip2PackedImageProcessor.from_pretrained(args.ckpt, **limit)
    model.to(device=device, dtype=DTYPES[dtype]).eval()
    sources = image_files(args.sample) if args.sample else [photograph()]
    budget = max(processor.max_num_patches, CPU_PATCHES if device.type == "cpu" else BUDGETS["cuda"])

    found = measure(model, processor, sources, budget, args.seconds)
    plan = planned(args.images, found, model.config.hidden_size, DTYPES[dtype].itemsize, device.type == "cpu")
    print(f"{args.ckpt or f'random weights, {args.shape}'}, {dtype} on {device} ({device_name(device)})")
    print(
        f"{args.images:,} images of up to {processor.max_num_patches} patches, {found.patches_an_image:.0f} on average "
        f"of {f'{len(sources)} given' if args.sample else 'a photograph of 4:3'}\n"
    )
    print(f"time    {duration(plan.seconds)}, waiting for {plan.limit}")
    print(f"        the model alone: {found.encoded_per_s:,.1f} images/s; reading: {found.decoded_per_s:,.1f} images/s")
    print(f"        ({'those given' if args.sample else f'JPEGs of {SAMPLE[1]} x {SAMPLE[0]}'}, {cores()} cores)")
    print(f"disk    {size(plan.pooled)} with --pooled --no-patches; {size(plan.patches)} with all patches ({dtype})")
    print(f"memory  {found.memory / GIB:.1f} GiB {'of this process' if device.type == 'cpu' else 'on the device'}")
    if args.json:
        settings = {"images": args.images, "dtype": dtype, "max_num_patches": processor.max_num_patches}
        write_json(args.json, settings | {"device": device_name(device)} | asdict(found) | asdict(plan))
    return 0


def random_model(shape: str, limit: dict[str, int]) -> tuple[Any, Siglip2PackedImageProcessor]:
    """A model of random weights, and a processor for it."""
    config: Any = Siglip2VisionConfig(**SHAPES[shape])
    model: Any = Siglip2PackedVisionModel(config)
    randomize(model, torch.Generator().manual_seed(0))
    budget = limit.get("max_num_patches", config.num_patches)
    return model, Siglip2PackedImageProcessor(patch_size=config.patch_size, max_num_patches=budget)


def photograph() -> bytes:
    """A JPEG with as much in it as one of a camera: smooth noise."""
    height, width = SAMPLE
    coarse = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def measure(
    model: Any, processor: Siglip2PackedImageProcessor, sources: Sequence[Source], budget: int, seconds: float
) -> Measured:
    """Reads the sources in random order, and encodes a pack of some of them, for half of the seconds each."""
    each = itertools.cycle(random.Random(0).sample(sources, len(sources)))
    lengths: list[int] = []
    memory_of_a_job = np.empty(IMAGES_PER_JOB * IMAGE_SHARED, np.uint8) if processor.on_card(model.device) else None

    def read_one() -> None:
        room = None if memory_of_a_job is None else Room(memory_of_a_job)
        lengths.append(math.prod(read(processor, next(each), room)[1]))

    reading = mean_time(read_one, seconds / 2, min(len(sources), LEAST))
    packed = full_pack(processor, each, budget, model.dtype).to(model.device)
    forward, cuda = replayed(model, budget), model.device.type == "cuda"

    @torch.inference_mode()
    def step() -> Tensor:
        features: Tensor = forward(**packed).last_hidden_state
        if cuda:
            torch.cuda.synchronize()
        return features

    step()  # what is done once: checks of kernels, a capture
    encoding = mean_time(step, seconds / 2)
    memory = torch.cuda.max_memory_allocated(model.device) if cuda else peak_of_process()
    return Measured(sum(lengths) / len(lengths), cores() / reading, packed.num_images / encoding, memory)


def read(
    processor: Siglip2PackedImageProcessor, source: Source, room: Room | None = None
) -> tuple[Any, tuple[int, int]]:
    """As the processor does, or where there is room for the pixels as it leaves them to a card, and (h, w).

    Raises:
        ValueError: with the name of what cannot be read.
    """
    try:
        return processor.read(source) if room is None else processor.read_for_card(source, room.take)
    except ValueError as error:
        raise ValueError(f"--sample: {source_name(source)}: {error}") from error


def full_pack(
    processor: Siglip2PackedImageProcessor, sources: Iterator[Source], budget: int, dtype: torch.dtype
) -> PackedPatches:
    """The next sources, as many as fit the budget."""
    rows: list[Tensor] = []
    grids: list[tuple[int, int, int]] = []
    for source in sources:
        patches, (h, w) = read(processor, source)
        if sum(t * h * w for t, h, w in grids) + len(patches) > budget:
            break
        rows.append(processor.normalize(torch.from_numpy(patches)).to(dtype))
        grids.append((1, h, w))
    return PackedPatches(torch.cat(rows), grids)


def mean_time(function: Callable[[], object], seconds: float, least: int = 1) -> float:
    """Seconds of a call, of calls for so long, and of at least so many."""
    begin = time.perf_counter()
    for count in itertools.count(1):
        function()
        passed = time.perf_counter() - begin
        if count >= least and passed >= seconds:
            return passed / count
    raise AssertionError


def peak_of_process() -> int:
    """Bytes that this process had at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def planned(images: int, found: Measured, hidden_size: int, itemsize: int, shared: bool) -> Plan:
    """Reading and the model work beside each other; on a CPU they share its cores."""
    reading, encoding = images / found.decoded_per_s, images / found.encoded_per_s
    seconds = reading + encoding if shared else max(reading, encoding)
    limit = "the model" if encoding >= reading else "reading and decoding"
    vector = float(images * hidden_size * itemsize)
    return Plan(seconds, limit, vector, vector * found.patches_an_image)


def duration(seconds: float) -> str:
    """`9000` -> `2.5 hours`."""
    for unit, length, most in (("seconds", 1, 120), ("minutes", 60, 7200), ("hours", 3600, 48 * 3600)):
        if seconds < most:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"
