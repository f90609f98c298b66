"""Inputs -> decoded images -> packs up to a patch budget, by threads or processes that run ahead of the model.

Patches stay 8-bit until they are on the device, a quarter of what would have to be kept and copied otherwise.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import chain, count, islice
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

    @property
    def length(self) -> int:
        return self.grid[0] * self.grid[1]


class Pack(NamedTuple):
    images: list[Decoded]
    patches: Tensor
    """`[T, P]` uint8."""
    failed: list[Decoded]
    """Inputs met on the way that give no patches."""


def decoding_pool(device: torch.device, workers: int | None = None, decode_in: str | None = None) -> Executor:
    """`workers` (one a core when left out) threads, or processes beside a GPU.

    Pillow lets go of the GIL where the time goes. What remains, a quarter of a millisecond an image, is nothing to a
    CPU; at the 2,000 images a second of a GPU it would keep the thread that launches the kernels waiting.
    """
    if decode_in is None:
        decode_in = "processes" if device.type == "cuda" and hasattr(os, "fork") else "threads"
    if decode_in == "threads":
        return ThreadPoolExecutor(workers or cores())
    # forked: at once, and the processes touch neither torch nor the device
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers or cores(), mp_context=context, initializer=follow_parent)
    pool.submit(os.getpid)  # has it fork
    return pool


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
    inputs: Iterable[Input], processor: Siglip2PackedImageProcessor, pool: Executor, workers: int
) -> Iterator[Decoded]:
    """In the order of the inputs, a few images a worker ahead."""
    inputs = iter(inputs)
    some = iter(lambda: list(islice(inputs, IMAGES_PER_JOB)), [])
    jobs = (partial(read_images, processor, images) for images in some)
    return chain.from_iterable(ahead(jobs, pool, JOBS_PER_WORKER * workers))


def read_images(processor: Siglip2PackedImageProcessor, inputs: list[Input]) -> list[Decoded]:
    return [read_image(processor, *item) for item in inputs]


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
        yield Pack([image._replace(patches=None) for image in chosen], patches, failed[:])
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
