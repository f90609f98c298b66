"""Memory that decoding workers share with the process that has the model: a place for what each job takes and gives."""

from __future__ import annotations

import contextlib
import logging
import mmap
import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

MOST_SHARED = 4 << 30
"""Bytes."""
PORTABLE = 1
"""cudaHostRegisterPortable: for every device."""

logger = logging.getLogger(__name__)


class Shelf:
    """`places` of `size` bytes, or as many as there may be, mapped once: processes that are forked afterwards have it.

    A pipe, which holds 64 KiB and is read by one thread, would take a millisecond an image.
    """

    def __init__(self, places: int, size: int):
        places = min(places, MOST_SHARED // size)
        try:
            self.memory = mmap.mmap(-1, max(1, places * size))
        except OSError:  # so much is not to be had
            places, self.memory = 0, mmap.mmap(-1, 1)
        self.size, self.free = size, deque(range(places))
        self._locked: Future[bool] | None = None
        self._unlock: weakref.finalize | None = None

    def take(self) -> int | None:
        """A place that nobody uses, if there is one: the one given back last."""
        try:
            return self.free.pop()
        except IndexError:
            return None

    def at(self, place: int) -> np.ndarray:
        """`[size]` bytes."""
        return np.frombuffer(self.memory, np.uint8, self.size, place * self.size)

    def lend(self, place: int) -> np.ndarray:
        """`[size]` bytes. The place is free again once the array and all views of it are gone."""
        array = self.at(place)
        weakref.finalize(array, self.free.append, place).atexit = False
        return array

    def lock_pages(self, device: torch.device) -> Future[bool] | None:
        """Has the card copy from here by itself. Where pages cannot be locked the host copies.

        In a thread, which tells whether they are: it takes half a second a GiB. They are unlocked by `unlock`, or when
        the shelf is gone, in any case before they are unmapped: at the same address the card would find them again in
        place of what is there then.
        """
        if self.free and self._unlock is None:
            thread = ThreadPoolExecutor(1)
            self._locked = thread.submit(_lock, self, device)  # keeps it: whoever unlocks need not wait for himself
            thread.shutdown(wait=False)
            self._unlock = weakref.finalize(self, _unlock, self._locked, self.memory, device)
        return self._locked

    def unlock(self) -> None:
        if self._unlock is not None:
            self._unlock()


def _lock(shelf: Shelf, device: torch.device) -> bool:
    place, size = _extent(shelf.memory)
    with torch.cuda.device(device):
        error = torch.cuda.cudart().cudaHostRegister(place, size, PORTABLE)
    if int(error):
        logger.warning("%d bytes cannot be page-locked (%s): the host copies pixels to %s", size, error, device)
    return not int(error)


def _unlock(locked: Future[bool], memory: mmap.mmap, device: torch.device) -> None:
    with contextlib.suppress(RuntimeError):  # of a device that is lost
        if locked.result():
            with torch.cuda.device(device):
                torch.cuda.synchronize()  # it may still copy
                torch.cuda.cudart().cudaHostUnregister(_extent(memory)[0])


def _extent(memory: mmap.mmap) -> tuple[int, int]:
    """Address and bytes."""
    whole = np.frombuffer(memory, np.uint8)
    return whole.ctypes.data, whole.size


class Room:
    """A job's memory, filled from its beginning."""

    def __init__(self, memory: np.ndarray):
        self.memory, self.end = memory, 0
        self.wanted = 0
        """Bytes that were asked for."""

    def take(self, size: int) -> np.ndarray | None:
        """`[size]` bytes, if there are so many left."""
        self.wanted += size
        if size > self.memory.size - self.end:
            return None
        self.end += size
        return self.memory[self.end - size : self.end]

    def put(self, data: Any) -> slice | None:
        """Where in the memory the data is, or is now; None where there is no room, or no data."""
        flat = np.frombuffer(b"" if data is None else data, np.uint8)
        if not flat.size:
            return None
        start = flat.ctypes.data - self.memory.ctypes.data
        if not 0 <= start < self.memory.size:
            room, start = self.take(flat.size), self.end - flat.size
            if room is None:
                return None
            room[:] = flat
        return slice(start, start + flat.size)
