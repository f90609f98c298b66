"""Images resized and cut into patches on a GPU, with Pillow's arithmetic, and JPEG files decoded there, too
(`decode="gpu"`), for a processor or a collection.

    file  ->  its header, on the host  ->  nvJPEG  \
    pixels on the host, in page-locked memory  ->  pixels on the card  ->  resized (ops.patches)  ->  patches

nvJPEG has a stream of its own. What is decoded or copied is in memory of another, so that no memory comes back to it
before all who read that memory are done, and nobody waits for them.

Only what nvJPEG and libjpeg read alike goes the first way, and only large and whole files: `plain_jpeg` judges that by
the header. Everything else, and every file of which the card does not give as many pixels as the header says, is its
caller's to read the exact way. T patches of all files, P patch_dim.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, JpegImagePlugin
from torch import Tensor

from siglip2_packed.images import ACROSS, DOWN, SIDEWAYS, Source, Stored, opened, readable_again, transposition
from siglip2_packed.ops.patches import ORDERS, Turn, cutter

DecodeJpegs = Callable[[list[Tensor]], list[Tensor]]
"""Files, `[bytes]` uint8 on the host -> their pixels, `[3, height, width]` uint8 on the device."""
MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
"""Of Pillow -> of `ops.patches`."""
PIXELS_AT_ONCE = 28 * 4032 * 3024
"""Of the files of a batch, three bytes each on the card: 0.95 GiB, four photos of 12 megapixels for each of an H100's
seven decoders. One file of more is a batch of its own."""
FILES_AT_ONCE = 64
LARGE = 2_000_000
"""Pixels of a file from which on nvJPEG decodes it. A smaller photo takes a core a few milliseconds, and nvJPEG, whose
kernels wait for those of a model that computes, as long as a large one."""
END_OF_IMAGE = b"\xff\xd9"

T = TypeVar("T")
logger = logging.getLogger(__name__)


def plain_jpeg(source: Source, do_convert_rgb: bool | None = None) -> Stored | None:
    """The file, if it is a JPEG for the card: of two megapixels or more, grey, or YCbCr in 4:4:4, 4:2:2 or 4:2:0, and
    not cut short.

    Args:
        do_convert_rgb: the processor's; False leaves a grey file to the exact way, which refuses it.

    Raises:
        ValueError: it is no image that can be read.
    """
    if not readable_again(source):
        return None
    with opened(source) as image:
        refused = image.mode != "RGB" and do_convert_rgb is False
        small = image.width * image.height < LARGE
        if image.format != "JPEG" or small or refused or not _known(image):
            return None
        turn, file = transposition(image), image.fp  # type: ignore[attr-defined]
        scan = file.tell()  # Pillow has read up to here
        data = bytearray(file.seek(0, os.SEEK_END))  # the card's decoder takes what can be written to
        file.seek(0)
        del data[file.readinto(data) :]
        whole = data.rfind(END_OF_IMAGE, scan) >= 0  # any before that is a thumbnail's
        return Stored(data, (image.height, image.width), turn) if whole else None


def _known(image: Any) -> bool:
    if image.mode == "L":
        return image.layer[0][1:3] == (1, 1)
    # no transform, or these names for its parts: what is stored is RGB
    ycbcr = image.info.get("adobe_transform", 1) == 1 and bytes(part[0] for part in image.layer) != b"RGB"
    return image.mode == "RGB" and ycbcr and JpegImagePlugin.get_sampling(image) >= 0


class Decoded(NamedTuple):
    """A batch of images on the card."""

    files: list[Stored]
    grids: list[tuple[int, int]]
    """(h, w) patches of each."""
    pixels: list[Tensor | None]
    """`[3, height, width]` uint8 as stored, or None."""
    ready: torch.cuda.Event | None
    """When the card has them."""


class Card:
    """Resizes and cuts images on a device, and decodes JPEG files there.

    Args:
        device: where.
        patch_size, resample: the processor's.
        decode_jpegs: `nvjpeg(device)`; None where images are decoded already.
    """

    def __init__(
        self,
        device: torch.device,
        patch_size: int,
        resample: Image.Resampling,
        decode_jpegs: DecodeJpegs | None = None,
    ):
        self.device, self.patch_size = device, patch_size
        self.decode_jpegs = decode_jpegs
        self.resized = cutter(device, patch_size, MODES[resample], pillow_order(resample) or ORDERS[0])
        self.stream = _stream(index_of(device)) if device.type == "cuda" else None
        """Whose memory the decoded pixels are."""
        self.decoded = self.refused = 0
        """Files so far."""
        self.said = False

    def patches(self, files: list[Stored], grids: list[tuple[int, int]]) -> list[Tensor | None]:
        """A batch of images and the (h, w) patches of each -> `[h·w, P]` uint8 on the device.

        None is for one that is to be read the exact way: the card refused it, or has no memory for it.
        """
        return self.cut(self.decode(files, grids))

    @torch.no_grad()
    def decode(self, files: list[Stored], grids: list[tuple[int, int]]) -> Decoded:
        """The first half of `patches`, for a thread of its own."""
        with contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            by_card = iter(self._decode([file for file in files if not file.decoded]))
            copied = iter(self._copied([file.data for file in files if file.decoded]))
            pixels = [next(copied if file.decoded else by_card) for file in files]
            ready = None if self.stream is None else self.stream.record_event(torch.cuda.Event(blocking=True))
        return Decoded(files, grids, pixels, ready)

    @torch.no_grad()
    def cut(self, batch: Decoded) -> list[Tensor | None]:
        """The second half, on the current stream. Files and pixels may be written over afterwards."""
        if batch.ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(batch.ready)
            for pixels in batch.pixels:
                if pixels is not None:
                    pixels.record_stream(current)
        there = [i for i, pixels in enumerate(batch.pixels) if pixels is not None]
        found = dict(zip(there, self._cut(batch, there)))
        if batch.ready is not None:
            batch.ready.synchronize()
        self.refused += sum(found.get(i) is None for i in range(len(batch.files)))
        self.decoded += sum(found.get(i) is not None for i, file in enumerate(batch.files) if not file.decoded)
        return [found.get(i) for i in range(len(batch.files))]

    def joined(self, patches: Sequence[np.ndarray | Tensor]) -> Tensor:
        """`[h·w, P]` uint8 of each image, here or on the host -> `[T, P]` on the device."""
        here = [self.here(x) for x in patches]
        return (
            torch.cat(here) if here else torch.zeros(0, self.patch_size**2 * 3, dtype=torch.uint8, device=self.device)
        )

    def here(self, patches: np.ndarray | Tensor) -> Tensor:
        return patches if isinstance(patches, Tensor) else torch.tensor(patches, device=self.device)

    def _copied(self, images: list[Any]) -> list[Tensor | None]:
        """`[height, width, 3]` uint8 on the host -> `[3, height, width]`, on its way to the device, or None."""
        if not images:
            return []
        sizes = [image.size for image in images]
        try:
            places = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device).split(sizes)
        except RuntimeError as error:
            self._say(error)
            return [None] * len(images)
        for place, image in zip(places, images):
            place.copy_(torch.from_numpy(image).view(-1), non_blocking=True)
        return [place.view(image.shape).permute(2, 0, 1) for place, image in zip(places, images)]

    def _decode(self, files: list[Stored]) -> list[Tensor | None]:
        """`[3, height, width]` uint8, as stored, or None."""
        if not files:
            return []
        assert self.decode_jpegs is not None, "a card that decodes nothing was given a file"
        try:
            found = self.decode_jpegs([torch.frombuffer(file.data, dtype=torch.uint8) for file in files])
        except RuntimeError as error:  # it does not say of which
            if len(files) > 1:
                half = len(files) // 2
                return self._decode(files[:half]) + self._decode(files[half:])
            self._say(error)
            return [None]
        return [pixels if pixels.shape == (3, *file.stored) else None for pixels, file in zip(found, files)]

    def _cut(self, batch: Decoded, some: list[int]) -> list[Tensor | None]:
        """`[h·w, P]` of some of its files, which are there; None for one that there is no memory for."""
        if not some:
            return []
        pixels: Any = [batch.pixels[i] for i in some]
        files, grids = [batch.files[i] for i in some], [batch.grids[i] for i in some]
        turns = [Turn(file.turn in SIDEWAYS, file.turn in DOWN, file.turn in ACROSS) for file in files]
        try:
            patches = self.resized(pixels, turns, [file.scaled and file.scaled.box for file in files], grids)
        except RuntimeError as error:
            if len(some) > 1:
                half = len(some) // 2
                return self._cut(batch, some[:half]) + self._cut(batch, some[half:])
            self._say(error)
            return [None]
        return list(patches.split([h * w for h, w in grids]))

    def _say(self, error: RuntimeError) -> None:
        if not self.said:  # the first is enough
            self.said = True
            logger.warning("read the exact way, as all that %s refuses: %s", self.device, str(error).splitlines()[0])


@lru_cache
def pillow_order(resample: Image.Resampling) -> str | None:
    """The order (`ops.patches.pillow`) in which the Pillow that is installed resizes, known by its pixels; None if no
    order gives them, and the host resizes."""
    generator = np.random.default_rng(0)
    sizes = [(61, 27), (203, 2), (40, 50), (5, 7), (301, 299), (41, 20)]
    boxes = [None, None, (0.125, 0, 50, 39.5), None, None, (0, 0, 20, 40)]
    resized = [(20, 14), (5, 3), (13, 19), (16, 16), (16, 15), (20, 10)]
    images = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    theirs = [
        np.asarray(Image.fromarray(image).resize(size[::-1], resample, box)).reshape(-1, 3)
        for image, box, size in zip(images, boxes, resized)
    ]
    given = [torch.from_numpy(image).permute(2, 0, 1) for image in images], [Turn()] * len(sizes), boxes, resized
    for order in ORDERS:
        ours = cutter(torch.device("cpu"), 1, MODES[resample], order)(*given)
        if np.array_equal(ours.numpy(), np.concatenate(theirs)):
            return order
    return None


def resizes_exactly(device: torch.device, resample: Image.Resampling) -> bool:
    """Whether a card of this device gives Pillow's pixels."""
    return device.type == "cuda" and resample in MODES and pillow_order(resample) is not None


def nvjpeg(device: torch.device) -> DecodeJpegs:
    """torchvision's decoder on a CUDA device, once it has decoded a file there.

    Raises:
        ValueError: it cannot, and why.
    """
    if device.type != "cuda":
        raise ValueError(f"decode='gpu' is for a CUDA device, got {device}")
    try:
        return _nvjpeg(index_of(device))
    except Exception as error:  # not installed, of another torch, without CUDA, a card or driver that has none
        raise ValueError(f"decode='gpu': torchvision has no nvJPEG here: {str(error).splitlines()[0]}") from error


def index_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@lru_cache
def _stream(index: int) -> torch.cuda.Stream:
    """One a device: each would keep memory of its own."""
    return torch.cuda.Stream(index)


@lru_cache
def _nvjpeg(index: int) -> DecodeJpegs:
    from torchvision.io import ImageReadMode, decode_jpeg

    decode: Any = partial(decode_jpeg, mode=ImageReadMode.RGB, device=torch.device("cuda", index))
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    decode([torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)])
    return decode


def batches(items: Iterable[T], pixels: Callable[[T], int]) -> Iterator[list[T]]:
    """The items in order, a batch for the card at a time."""
    batch: list[T] = []
    total = 0
    for item in items:
        if batch and (len(batch) == FILES_AT_ONCE or total + pixels(item) > PIXELS_AT_ONCE):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += pixels(item)
    if batch:
        yield batch
