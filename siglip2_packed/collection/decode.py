"""Inputs -> decoded images -> packs up to a patch budget, by threads or processes that run ahead of the model.

Patches stay 8-bit until they are on the device, a quarter of what would have to be kept and copied otherwise. Beside a
card images are decoded here, or with `decode="gpu"` read, as far as there is room for them (shelf.py); they go on to it
(cut.py), and it makes the patches.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import count, islice, repeat
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from siglip2_packed.card import FILES_AT_ONCE, resizes_exactly
from siglip2_packed.collection.identity import UNSTEADY, joint, stamp
from siglip2_packed.collection.parquet import Entry, one_line
from siglip2_packed.collection.shelf import MOST_SHARED, Room, Shelf
from siglip2_packed.collection.sources import Input
from siglip2_packed.data import fill_packs
from siglip2_packed.formats import decoders
from siglip2_packed.images import Allocate, Stored
from siglip2_packed.jpeg import decoder
from siglip2_packed.preprocess import Siglip2PackedImageProcessor

IMAGES_PER_JOB = 8
JOBS_PER_WORKER = 3
PACKS_READY = 4
"""0.1 s of so400m's on an H200: while it computes, nvJPEG's own kernels now and then wait that long."""
PACKS_AHEAD = PACKS_READY + 2
"""And one that is being filled, one that the model has."""
READS = 3
"""Of a file that changes under the reader's hands."""
IMAGE_SHARED = 5 << 20
"""Bytes that a file or pixels for the card have room for, of those of a job on the average, less with many workers. A
photo of 12 megapixels has room in the place of eight."""
T = TypeVar("T")
U = TypeVar("U")
END = object()


class DecodedImage(NamedTuple):
    ordinal: int
    name: str
    grid: tuple[int, int] = (0, 0)
    patches: np.ndarray | Tensor | None = None
    """`[h·w, P]` uint8 on the host or the card, or None where there is something for the card or an error."""
    error: str = ""
    stamp: str = ""
    """Which state of its file this is, see `identity.stamp`."""
    place: slice | None = None
    """Where its job's memory has the patches, or what is for the card, on the way from a process."""
    stored: Stored | None = None
    """What the card makes the patches of."""

    @property
    def length(self) -> int:
        return self.grid[0] * self.grid[1]


class Pack(NamedTuple):
    images: list[DecodedImage]
    patches: Tensor
    """`[T, P]` uint8."""
    failed: list[DecodedImage]
    """Inputs met on the way that give no patches."""
    ready: torch.cuda.Event | None = None
    """When the card has the patches, if it made them."""


def decoding_pool(
    device: torch.device,
    processor: Siglip2PackedImageProcessor,
    workers: int | None = None,
    decode_in: str | None = None,
    patch_budget: int = 16384,
) -> DecodingThreads | DecodingProcesses:
    """`workers` (one a core when left out) threads, or processes beside a GPU, for packs of the processor's images.

    Pillow lets go of the GIL where the time goes. What remains, a quarter of a millisecond an image, or a tenth of one
    where only headers are read, is nothing to a CPU; at the 2,000 images a second of a GPU it would keep the threads
    waiting that launch kernels, 16 of those that read a millisecond for each.
    """
    if decode_in is None:
        decode_in = "processes" if device.type == "cuda" and hasattr(os, "fork") else "threads"
    workers = workers or cores()
    decoder(), decoders()  # compared with Pillow and imported here, once for all of them
    patches = IMAGES_PER_JOB * processor.max_num_patches * 3 * processor.patch_size**2
    if resizes_exactly(device, processor.resample) or processor.decode == "gpu":
        places = JOBS_PER_WORKER * workers + 3 * FILES_AT_ONCE // IMAGES_PER_JOB  # until it is on the card
        shelf = Shelf(places, max(patches, min(IMAGES_PER_JOB * IMAGE_SHARED, MOST_SHARED // places)))
    elif decode_in == "processes":
        shelf = Shelf(JOBS_PER_WORKER * workers + window(processor, patch_budget), patches)  # until it is in a pack
    else:
        shelf = Shelf(0, 1)
    return DecodingThreads(workers, shelf) if decode_in == "threads" else DecodingProcesses(workers, shelf)


class DecodingThreads(ThreadPoolExecutor):
    def __init__(self, workers: int, shelf: Shelf):
        super().__init__(workers)
        self.shelf = shelf

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        try:
            super().shutdown(wait, cancel_futures=cancel_futures)
        finally:
            self.shelf.unlock()


class DecodingProcesses(ProcessPoolExecutor):
    """Forked at once: quick as long as there is no model, and they touch neither torch nor the device."""

    def __init__(self, workers: int, shelf: Shelf):
        super().__init__(workers, multiprocessing.get_context("fork"), start_worker, (shelf,))
        self.shelf = shelf
        self.submit(os.getpid)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        try:
            super().shutdown(wait, cancel_futures=cancel_futures)
        finally:
            self.shelf.unlock()


_shelf: Shelf | None = None
"""Of the parent, in a decoding process."""


def start_worker(shelf: Shelf) -> None:
    global _shelf
    _shelf = shelf
    gc.freeze()  # else collecting garbage would write to all that the parent has, and so copy it
    follow_parent()


def follow_parent() -> None:
    """A worker lets its parent go first, which has the device to feed, and leaves Ctrl-C to it.

    If the parent is killed the worker ends, where it would wait for jobs for ever.
    """
    os.nice(10)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def decode(
    inputs: Iterable[Input],
    processor: Siglip2PackedImageProcessor,
    pool: Executor,
    workers: int,
    by_card: bool = False,
) -> Iterator[DecodedImage]:
    """In the order of the inputs, a few images a worker ahead. What lies in tar files and tables is read by a thread of
    its own. `by_card`: what a card can make the patches of is left to it.
    """
    jobs_ahead = workers if processor.decode == "gpu" else JOBS_PER_WORKER * workers  # of whole files
    shelf = pool.shelf if isinstance(pool, (DecodingProcesses, DecodingThreads)) else Shelf(0, 1)
    forked = isinstance(pool, DecodingProcesses)
    sizes = JobSizes(workers, shelf.size)

    def jobs() -> Iterator[tuple[Callable[[], tuple[list[DecodedImage], int]], np.ndarray | None]]:
        for some, place, memory in prefetch(by_job(inputs, shelf, sizes if by_card else repeat(IMAGES_PER_JOB)), 2):
            yield partial(read_images, processor, some, place if forked else memory, by_card), memory

    for (images, wanted), memory in ahead(jobs(), pool, jobs_ahead):
        sizes.saw(len(images), wanted)
        yield from images if memory is None else from_place(images, memory)


def by_job(
    inputs: Iterable[Input], shelf: Shelf, sizes: Iterator[int]
) -> Iterator[tuple[list[Input], int | None, np.ndarray | None]]:
    """(inputs, place on the shelf, memory there) of each job. Of images that are bytes the entry is where they are in
    the memory, as far as there is room.
    """
    inputs = iter(inputs)
    while some := list(islice(inputs, next(sizes))):
        place = shelf.take()
        memory = None if place is None else shelf.lend(place)
        if memory is not None:
            room = Room(memory)
            slices = [room.put(x.entry if isinstance(x.entry, bytes) else None) for x in some]
            some = [x if where is None else x._replace(entry=where) for x, where in zip(some, slices)]  # type: ignore[arg-type]
        yield some, place, memory


class JobSizes:
    """Images of each job for a card: few at first, so that it has some soon, then those that a job has room for, as the
    last ones tell: a photo of 12 megapixels.
    """

    def __init__(self, workers: int, room: int):
        self.workers, self.room, self.jobs, self.most = workers, room, 0, IMAGES_PER_JOB

    def __iter__(self) -> JobSizes:
        return self

    def __next__(self) -> int:
        self.jobs += 1
        return min(self.most, 1 + (self.jobs - 1) // self.workers)

    def saw(self, images: int, wanted: int) -> None:
        """A job of so many images wanted so many bytes."""
        self.most = max(1, min(IMAGES_PER_JOB, self.room * images // max(1, wanted)))


def most_ahead(
    processor: Siglip2PackedImageProcessor, workers: int, patch_budget: int, by_card: bool
) -> tuple[int, int]:
    """(images, bytes of patches) that there are at most ahead of the model, of images as long as may be.

    What is being decoded comes to it: an image a worker, or two batches on the card.
    """
    waiting = IMAGES_PER_JOB * ((1 if processor.decode == "gpu" else JOBS_PER_WORKER) * workers + 2)
    cut = window(processor, patch_budget) + (FILES_AT_ONCE if by_card else waiting)
    patches = PACKS_AHEAD * patch_budget + cut * processor.max_num_patches
    return waiting + 2 * FILES_AT_ONCE * by_card, patches * 3 * processor.patch_size**2


def window(processor: Siglip2PackedImageProcessor, patch_budget: int) -> int:
    """Images that a pack is filled from: as many as it takes, or more where it takes few."""
    return max(64, patch_budget // processor.max_num_patches)


def read_images(
    processor: Siglip2PackedImageProcessor,
    inputs: list[Input],
    where: int | np.ndarray | None,
    by_card: bool = False,
) -> tuple[list[DecodedImage], int]:
    """The images, and the bytes that they wanted. `where`: the job's memory, or which place of the shelf it is."""
    if isinstance(where, int):
        assert _shelf is not None
        where = _shelf.at(where)
    memory = np.empty(0, np.uint8) if where is None else where
    entries = [memory[x.entry].tobytes() if isinstance(x.entry, slice) else x.entry for x in inputs]
    room = Room(memory)
    allocate = room.take if by_card else None
    images = [read_image(processor, *x._replace(entry=e), allocate=allocate) for x, e in zip(inputs, entries)]
    return [to_place(image, room) for image in images], room.wanted


def to_place(image: DecodedImage, room: Room) -> DecodedImage:
    """The image without the patches, or what is for the card, if there is room for them."""
    place = room.put(image.patches if image.stored is None else image.stored.data)
    if place is None:
        return image
    return image._replace(patches=None, stored=image.stored and image.stored._replace(data=b""), place=place)


def from_place(images: list[DecodedImage], memory: np.ndarray) -> list[DecodedImage]:
    def moved(image: DecodedImage) -> DecodedImage:
        if image.place is None:
            return image
        data, stored = memory[image.place], image.stored
        if stored is None:
            return image._replace(patches=data.reshape(image.length, -1), place=None)
        data = data.reshape(*stored.stored, 3) if stored.decoded else data
        return image._replace(stored=stored._replace(data=data), place=None)

    return list(map(moved, images))


def read_image(
    processor: Siglip2PackedImageProcessor,
    ordinal: int,
    name: str,
    entry: Entry,
    container: str = "",
    allocate: Allocate | None = None,
) -> DecodedImage:
    """A file that somebody writes to meanwhile is read again, and then given up."""
    if not isinstance(entry, str):
        return decoded(processor, ordinal, name, entry, allocate)._replace(stamp=container)
    for _ in range(READS):
        before = stamp(entry)
        image = decoded(processor, ordinal, name, entry, allocate)
        if stamp(entry) == before:
            return image._replace(stamp=joint(container, before, entry))
    return DecodedImage(ordinal, name, error="it changed while it was read", stamp=UNSTEADY)


def decoded(
    processor: Siglip2PackedImageProcessor, ordinal: int, name: str, entry: Any, allocate: Allocate | None = None
) -> DecodedImage:
    """`allocate`: memory for pixels that a card resizes; without it all is done here."""
    if isinstance(entry, ValueError):
        return DecodedImage(ordinal, name, error=one_line(entry))
    try:
        found, grid = processor.read(entry) if allocate is None else processor.read_for_card(entry, allocate)
    except Exception as error:  # whatever an image provokes, it must not end the run
        return DecodedImage(ordinal, name, error=one_line(error) or type(error).__name__)
    if isinstance(found, Stored):
        return DecodedImage(ordinal, name, grid, stored=found)
    return DecodedImage(ordinal, name, grid, found)


def packs(images: Iterable[DecodedImage], budget: int, window: int, pin_memory: bool = False) -> Iterator[Pack]:
    """Packs of at most `budget` patches, filled from `window` images."""
    waiting: dict[int, DecodedImage] = {}
    failed: list[DecodedImage] = []

    def lengths() -> Iterator[int]:
        place = count()
        for image in images:
            if image.error:
                failed.append(image)
            else:
                waiting[next(place)] = image
                yield image.length

    for places in fill_packs(lengths(), budget, window=window):
        chosen = [waiting.pop(place) for place in places]
        arrays = [image.patches for image in chosen if image.patches is not None]
        patches = joined(arrays, pin_memory)
        ready = torch.cuda.current_stream(patches.device).record_event() if patches.is_cuda else None
        pack = Pack([image._replace(patches=None) for image in chosen], patches, failed[:], ready)
        del arrays, chosen  # gives their places back
        yield pack
        failed.clear()
    if failed:
        yield Pack([], torch.zeros(0, 0, dtype=torch.uint8), failed)


def joined(arrays: list[Any], pin_memory: bool) -> Tensor:
    """Patches of images, all on the card or all on the host -> `[T, P]` there."""
    if isinstance(arrays[0], Tensor):
        return torch.cat(arrays)
    patches = torch.empty(sum(map(len, arrays)), arrays[0].shape[1], dtype=torch.uint8, pin_memory=pin_memory)
    np.concatenate(arrays, out=patches.numpy())
    return patches


def ahead(jobs: Iterable[tuple[Callable[[], T], U]], pool: Executor, depth: int) -> Iterator[tuple[T, U]]:
    """Results of the jobs, and what came with each, in order; at most `depth` of them begun before they are asked for.

    What came with a job is kept until it is over, also where nobody asks for it any more.
    """
    begun: deque[tuple[Future[T], U]] = deque()
    try:
        for job, what in jobs:
            begun.append((pool.submit(job), what))
            if len(begun) == depth:
                future, what = begun.popleft()
                yield future.result(), what
        while begun:
            future, what = begun.popleft()
            yield future.result(), what
    finally:
        for future, what in begun:
            future.add_done_callback(lambda _, what=what: None)  # type: ignore[misc]
            future.cancel()


def prefetch(items: Iterator[T], depth: int, begin: Callable[[], None] | None = None) -> Iterator[T]:
    """The items, made in a thread of their own, `depth` ahead; `begin` is the first that it does."""
    pool = ThreadPoolExecutor(1, initializer=begin)
    begun = deque(pool.submit(next, items, END) for _ in range(depth))
    try:
        while (item := begun.popleft().result()) is not END:
            begun.append(pool.submit(next, items, END))
            held = [item]
            del item
            yield held.pop()  # type: ignore[misc]  # what it has in memory is its consumer's alone
    finally:
        pool.shutdown(cancel_futures=True)
        items.close()  # type: ignore[attr-defined]


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
