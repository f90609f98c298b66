"""Inputs -> decoded images -> packs up to a patch budget, by threads or processes that run ahead of the model.

Patches stay 8-bit until they are on the device, a quarter of what would have to be kept and copied otherwise.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import multiprocessing
import os
import signal
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import count, islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from siglip2_packed.data import fill_packs
from siglip2_packed.parquet import one_line
from siglip2_packed.preprocess import Siglip2PackedImageProcessor
from siglip2_packed.sources import Input

DECODE_IN = ("threads", "processes")
IMAGES_PER_JOB = 8
JOBS_PER_WORKER = 3
T = TypeVar("T")
END = object()


class Decoded(NamedTuple):
    ordinal: int
    name: str
    grid: tuple[int, int] = (0, 0)
    patches: np.ndarray | None = None
    """`[h·w, P]` uint8, or None where `error` says why not."""
    error: str = ""
    place: int | None = None
    """Where the shelf has the patches, on the way from a process."""

    @property
    def length(self) -> int:
        return self.grid[0] * self.grid[1]


class Pack(NamedTuple):
    images: list[Decoded]
    patches: Tensor
    """`[T, P]` uint8."""
    failed: list[Decoded]
    """Inputs met on the way that give no patches."""


def decoding_pool(
    device: torch.device,
    processor: Siglip2PackedImageProcessor,
    workers: int | None = None,
    decode_in: str | None = None,
) -> Executor:
    """`workers` (one a core when left out) threads, or processes beside a GPU.

    Pillow lets go of the GIL where the time goes. What remains, a quarter of a millisecond an image, is nothing to a
    CPU; at the 2,000 images a second of a GPU it would keep the thread that launches the kernels waiting.
    """
    if decode_in is None:
        decode_in = "processes" if device.type == "cuda" and hasattr(os, "fork") else "threads"
    workers = workers or cores()
    if decode_in == "threads":
        return ThreadPoolExecutor(workers)
    places = JOBS_PER_WORKER * IMAGES_PER_JOB * workers + 256  # on their way, and waiting for a pack
    return DecodingProcesses(workers, Shelf(places, processor.max_num_patches * 3 * processor.patch_size**2))


class Shelf:
    """Memory that processes share, with places for an image each. A pipe, which holds 64 KiB and is read by one thread,
    would take a millisecond for each of them.
    """

    def __init__(self, places: int, size: int):
        self.memory = np.frombuffer(mmap.mmap(-1, places * size), np.uint8).reshape(places, size)
        self.free = deque(range(places))

    def take(self, count: int) -> list[int]:
        """`count` places that nobody uses, or as many as there are; those given back last come first."""
        taken: list[int] = []
        with contextlib.suppress(IndexError):
            while len(taken) < count:
                taken.append(self.free.pop())
        return taken

    def fits(self, patches: np.ndarray) -> bool:
        return patches.nbytes <= self.memory.shape[1]

    def put(self, place: int, patches: np.ndarray) -> None:
        self.memory[place, : patches.size].reshape(patches.shape)[:] = patches

    def lend(self, place: int, shape: tuple[int, int]) -> np.ndarray:
        """What was put there. The place is free again once the array is gone; views of it do not count."""
        patches = self.memory[place, : math.prod(shape)].reshape(shape)
        weakref.finalize(patches, self.free.append, place).atexit = False
        return patches


class DecodingProcesses(ProcessPoolExecutor):
    """Forked at once: quick as long as there is no model, and they touch neither torch nor the device."""

    def __init__(self, workers: int, shelf: Shelf):
        super().__init__(workers, multiprocessing.get_context("fork"), follow_parent, (shelf,))
        self.shelf = shelf
        self.submit(os.getpid)


_shelf: Shelf | None = None
"""Of the parent, in a decoding process."""


def follow_parent(shelf: Shelf) -> None:
    """A worker lets its parent go first, which has the device to feed, and leaves Ctrl-C to it.

    If the parent is killed the worker ends, where it would wait for jobs for ever.
    """
    global _shelf
    _shelf = shelf
    os.nice(10)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def decode(
    inputs: Iterable[Input], processor: Siglip2PackedImageProcessor, pool: Executor, workers: int
) -> Iterator[Decoded]:
    """In the order of the inputs, a few images a worker ahead."""
    inputs = iter(inputs)
    some = iter(lambda: list(islice(inputs, IMAGES_PER_JOB)), [])
    shelf = pool.shelf if isinstance(pool, DecodingProcesses) else None
    jobs = (partial(read_images, processor, images, shelf.take(len(images)) if shelf else []) for images in some)
    for images, unused in ahead(jobs, pool, JOBS_PER_WORKER * workers):
        for image in images:
            if shelf and image.place is not None:
                patches = shelf.lend(image.place, (image.length, 3 * processor.patch_size**2))
                yield image._replace(patches=patches, place=None)
                del patches
            else:
                yield image
        if shelf:
            shelf.free.extend(unused)


def read_images(
    processor: Siglip2PackedImageProcessor, inputs: list[Input], places: list[int]
) -> tuple[list[Decoded], list[int]]:
    """The images, patches put in places of the shelf as long as there are some; the places that are left."""
    images = []
    for item in inputs:
        image = read_image(processor, *item)
        if places and _shelf and image.patches is not None and _shelf.fits(image.patches):
            place = places.pop()
            _shelf.put(place, image.patches)
            image = image._replace(patches=None, place=place)
        images.append(image)
    return images, places


def read_image(processor: Siglip2PackedImageProcessor, ordinal: int, name: str, source: object) -> Decoded:
    if isinstance(source, ValueError):
        return Decoded(ordinal, name, error=one_line(source))
    try:
        patches, grid = processor.read(source)
    except Exception as error:  # whatever an image provokes, it must not end the run
        return Decoded(ordinal, name, error=one_line(error) or type(error).__name__)
    return Decoded(ordinal, name, grid, patches)


def packs(images: Iterable[Decoded], budget: int, window: int, pin_memory: bool = False) -> Iterator[Pack]:
    """Packs of at most `budget` patches, filled from `window` images."""
    waiting: dict[int, Decoded] = {}
    failed: list[Decoded] = []

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
        patches = torch.empty(sum(map(len, arrays)), arrays[0].shape[1], dtype=torch.uint8, pin_memory=pin_memory)
        np.concatenate(arrays, out=patches.numpy())
        pack = Pack([image._replace(patches=None) for image in chosen], patches, failed[:])
        del arrays, chosen  # gives their places back
        yield pack
        failed.clear()
    if failed:
        yield Pack([], torch.zeros(0, 0, dtype=torch.uint8), failed)


def ahead(jobs: Iterable[Callable[[], T]], pool: Executor, depth: int) -> Iterator[T]:
    """Results of the jobs in their order, at most `depth` of them begun before they are asked for."""
    begun: deque[Future[T]] = deque()
    try:
        for job in jobs:
            begun.append(pool.submit(job))
            if len(begun) == depth:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()


def prefetch(items: Iterator[T], depth: int) -> Iterator[T]:
    """The items, made in a thread of their own, `depth` ahead."""
    pool = ThreadPoolExecutor(1)
    begun = deque(pool.submit(next, items, END) for _ in range(depth))
    try:
        while (item := begun.popleft().result()) is not END:
            begun.append(pool.submit(next, items, END))
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(cancel_futures=True)
        items.close()  # type: ignore[attr-defined]


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
