"""Inputs -> encoded images: decoded ahead of the model, their features copied to the host beside it.

N images, T patches of a pack, P patch_dim, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2_packed.card import Card
from siglip2_packed.collection.cut import cut
from siglip2_packed.collection.decode import (
    PACKS_READY,
    DecodedImage,
    Pack,
    cores,
    decode,
    packs,
    prefetch,
    window,
)
from siglip2_packed.collection.sources import Input
from siglip2_packed.graphs import CUDAGraphs
from siglip2_packed.modeling import Siglip2PackedVisionModel
from siglip2_packed.preprocess import Siglip2PackedImageProcessor


class EncodedImage(NamedTuple):
    """What became of an input: features on the host, or an error."""

    ordinal: int
    name: str
    grid: tuple[int, int] = (0, 0)
    patches: Tensor | None = None
    """`[h·w, D]`"""
    pooled: Tensor | None = None
    """`[D]`"""
    error: str = ""
    stamp: str = ""
    """Which state of its file this is, see `identity.stamp`."""


Image = TypeVar("Image", DecodedImage, EncodedImage)


class StrictError(Exception):
    """An input cannot be used, and it was asked to stop at the first."""


class Meter:
    """Counts what passes: how much, how full the packs are, how busy the device."""

    def __init__(self, patch_budget: int):
        self.patch_budget, self.begun = patch_budget, time.perf_counter()
        self.images = self.patches = self.packs = 0
        self.busy = 0.0

    def count(self, pack: Pack, seconds: float) -> None:
        self.images += len(pack.images)
        self.patches += len(pack.patches)
        self.packs += 1
        self.busy += seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begun

    def __str__(self) -> str:
        full = self.patches / max(1, self.packs * self.patch_budget)
        rate, busy = self.patches / self.seconds, self.busy / self.seconds
        return f"{rate:.0f} patches/s, packs {full:.0%} full, device {busy:.0%} busy"


@torch.no_grad()
def encode(
    model: Siglip2PackedVisionModel | CUDAGraphs,
    processor: Siglip2PackedImageProcessor,
    inputs: Iterable[Input],
    pool: Executor,
    *,
    pooled: bool = False,
    patches: bool = True,
    patch_budget: int = 16384,
    workers: int | None = None,
    strict: bool = False,
    meter: Meter | None = None,
    card: Card | None = None,
) -> Iterator[EncodedImage]:
    """All inputs, encoded pack by pack: nearly in their order.

    Args:
        model: itself, or `graphs.replayed` of it.
        inputs: (ordinal, name, path | bytes | ValueError), the ordinal unique.
        pool: decodes, see `decoding_pool`.
        pooled, patches: what to compute and bring to the host.
        patch_budget: patches a pack, at least the processor's `max_num_patches`.
        workers: those of the pool, which has enough to do; one a core when left out.
        strict: raise StrictError at the first input that cannot be used.
        meter: counts what passes.
        card: resizes, and decodes with `decode="gpu"`: the processor's `on_card(model.device)`, or None but with that.
    """
    if not (processor.do_resize and processor.do_rescale):
        raise ValueError(
            "encode resizes and rescales; this checkpoint's preprocessor_config.json turns one of them off"
        )
    if processor.decode == "gpu" and card is None:
        raise ValueError("decode='gpu' needs a card, the processor's on_card(model.device)")
    checked: Callable[[Iterable], Iterator] = halted if strict else iter
    images = decode(inputs, processor, pool, workers or cores(), by_card=card is not None)
    images = checked(images if card is None else cut(images, processor, card))
    ready = packs(images, patch_budget, window(processor, patch_budget), pin_memory=model.device.type == "cuda")
    meter = meter or Meter(patch_budget)

    # The device gets the next pack before the last one's features are waited for.
    finish: Callable[[], list[EncodedImage]] = list
    for pack in prefetch(ready, PACKS_READY, None if card is None else partial(own_stream, model.device)):
        last, finish = finish, launch(model, processor, pack, pooled, patches, meter)
        yield from checked(last())
    yield from checked(finish())


def launch(
    model: Siglip2PackedVisionModel | CUDAGraphs,
    processor: Siglip2PackedImageProcessor,
    pack: Pack,
    pooled: bool,
    patches: bool,
    meter: Meter,
) -> Callable[[], list[EncodedImage]]:
    """Starts a forward and the copies to the host. What it returns waits for them and gives the images."""
    failed = [EncodedImage(image.ordinal, image.name, error=image.error, stamp=image.stamp) for image in pack.failed]
    if not pack.images:
        return lambda: failed
    on_device = upload(pack, model.device)
    stop_clock = clock(model.device)
    output: Any = model(
        pixel_values=processor.normalize(on_device),
        grid_thw=torch.tensor([(1, *image.grid) for image in pack.images]),
    )
    features: dict[str, Tensor] = {"patches": output.last_hidden_state} if patches else {}
    if pooled:
        features["pooled"] = output.pooler_output
    finite = {f"finite_{name}": x.isfinite().all(dim=1) for name, x in features.items()}
    seconds = stop_clock()
    on_host = download(features | finite)
    kept, dtype = list(features), output.last_hidden_state.dtype

    def finish() -> list[EncodedImage]:
        host = on_host()
        meter.count(pack, seconds())
        return failed + list(taken_apart(host, kept, pack.images, dtype))

    return finish


def taken_apart(
    host: dict[str, Tensor], kept: list[str], images: list[DecodedImage], dtype: torch.dtype
) -> Iterator[EncodedImage]:
    """A pack's features -> those of each image, or the error that they are not finite.

    Args:
        host: patches `[T, D]`, pooled `[N, D]`, or one of them; of each whether its rows are finite, finite_patches
            `[T]`, finite_pooled `[N]`.
        kept: which of the features there are.
        images: the N images of the pack.
        dtype: what was computed in.
    """
    lengths = [image.length for image in images]
    split = {name: host[name].split(lengths) if name == "patches" else list(host[name]) for name in kept}
    finite = np.full(len(images), True)
    if "patches" in kept:
        finite &= np.logical_and.reduceat(host["finite_patches"].numpy(), np.cumsum([0, *lengths[:-1]]))
    if "pooled" in kept:
        finite &= host["finite_pooled"].numpy()
    for i, (image, right) in enumerate(zip(images, finite.tolist())):
        if right:
            found = {name: split[name][i] for name in kept}
            yield EncodedImage(image.ordinal, image.name, image.grid, **found, stamp=image.stamp)
        else:
            error = f"its features are not finite in {dtype}"
            yield EncodedImage(image.ordinal, image.name, error=error, stamp=image.stamp)


def own_stream(device: torch.device) -> None:
    """Of the thread that makes packs, and may do so on the card."""
    if device.type == "cuda":
        torch.cuda.set_stream(copy_stream(device, "cut"))


def upload(pack: Pack, device: torch.device) -> Tensor:
    """On a GPU the copy goes on beside the pack before, which is still being computed."""
    if device.type != "cuda":
        return pack.patches.to(device)
    current = torch.cuda.current_stream(device)
    if pack.ready is not None:  # made there
        current.wait_event(pack.ready)
        moved = pack.patches
    else:
        side = copy_stream(device, "in")
        with torch.cuda.stream(side):
            moved = pack.patches.to(device, non_blocking=True)
        current.wait_stream(side)
    moved.record_stream(current)
    return moved


def download(tensors: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Starts the copies beside whatever the device does next; the result waits for them."""
    if all(tensor.device.type == "cpu" for tensor in tensors.values()):
        return lambda: tensors
    device = next(iter(tensors.values())).device
    side = copy_stream(device, "out")
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        copies = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.record_stream(side)
    copied = side.record_event(torch.cuda.Event(blocking=True))  # a core that waits decodes

    def wait() -> dict[str, Tensor]:
        copied.synchronize()
        return {name: copy.clone() for name, copy in copies.items()}  # out of page-locked memory

    return wait


@lru_cache
def copy_stream(device: torch.device, direction: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def clock(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Starts a clock on the device; stopped, it tells the seconds once the work between is done."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()

        def stop() -> Callable[[], float]:
            end.record()
            return lambda: begin.elapsed_time(end) / 1e3
    else:
        start = time.perf_counter()

        def stop() -> Callable[[], float]:
            seconds = time.perf_counter() - start
            return lambda: seconds

    return stop


def of_unit_length(images: Iterable[EncodedImage]) -> Iterator[EncodedImage]:
    """Divides pooled vectors by their length, in float32, each on its own: it does not depend on the pack."""
    for image in images:
        yield image if image.pooled is None else image._replace(pooled=F.normalize(image.pooled.float(), dim=0))


def halted(images: Iterable[Image]) -> Iterator[Image]:
    """Raises StrictError at the first that cannot be used."""
    for image in images:
        if image.error:
            raise StrictError(f"image {image.ordinal} ({image.name}): {image.error}")
        yield image
