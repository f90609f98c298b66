"""Gradients of weights, which backward makes and does not wait for: on a second stream, at a given place in memory.

That is for backwards which a CUDA graph is captured of: forking costs nothing there, and gradients keep their places.
Elsewhere everything runs in turn, on one stream, and gradients lie anywhere.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

DEPTH = 2
"""Layers whose work may still be under way: their tensors are kept."""


class Aside:
    """A stream beside the current one, which later waits for it: after `DEPTH` layers, and in `join`.

    Or none, and all is done in turn.
    """

    def __init__(self, stream: torch.cuda.Stream | None):
        self.stream = stream
        self.room: Room | None = None
        self._forked = False
        self._read: list[Tensor] = []
        self._layers: list[tuple[torch.cuda.Event, list[Tensor]]] = []

    @contextlib.contextmanager
    def layer(self) -> Iterator[None]:
        """Within it, in this thread, `beside` is on this stream."""
        if self.room is not None:
            self.room.make()  # of this stream's memory, which activations leave
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
            self._forked = True
        _current.aside = self
        try:
            yield
        finally:
            _current.aside = None
        if self.stream is None:
            return
        self._layers.append((self.stream.record_event(), self._read))
        self._read = []
        while len(self._layers) > DEPTH:
            done, _ = self._layers.pop(0)
            torch.cuda.current_stream().wait_event(done)

    def join(self) -> None:
        if self._forked and self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        self._forked = False
        self._layers.clear()

    @contextlib.contextmanager
    def gradients_in(self, room: Room) -> Iterator[None]:
        """Within it, layers leave their gradients there, as long as there is room."""
        self.room = room
        try:
            yield
        finally:
            self.room = None

    @contextlib.contextmanager
    def beside(self, *read: Tensor) -> Iterator[None]:
        if self.stream is None:
            yield
            return
        self._read += read
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield


class Room:
    """Memory for gradients, one after another, in pieces of `PIECE` numbers, of 16 bytes at least."""

    def __init__(self, tensors: Sequence[Tensor], like: Tensor):
        """For as many numbers as the tensors have, in the dtype of `like`, on its device."""
        self._numbers, self._taken, self._like = sum(map(self.size, tensors)), 0, like
        self.flat: Tensor = like.new_empty(0)

    @staticmethod
    def size(x: Tensor) -> int:
        """Numbers that x takes."""
        return -(-x.numel() // PIECE) * PIECE

    def make(self) -> None:
        self.flat = self._like.new_empty(self._numbers)

    def take(self, dtype: torch.dtype, *shape: int) -> Tensor | None:
        """None: there is none left, or of another dtype."""
        first, size = self._taken, math.prod(shape)
        if first + size > len(self.flat) or dtype is not self._like.dtype:
            return None
        self._taken += -(-size // PIECE) * PIECE
        return self.flat[first : first + size].view(shape)

    def place(self, x: Tensor) -> int | None:
        """Where in `flat` x, contiguous, begins; None if it lies elsewhere."""
        if x.dtype is not self._like.dtype or not x.is_contiguous():
            return None
        first = (x.data_ptr() - self.flat.data_ptr()) // x.element_size()
        return first if 0 <= first < len(self.flat) else None


PIECE = 8


class _Current(threading.local):
    aside: Aside | None = None


_current = _Current()
_in_turn = contextlib.nullcontext()


def beside(*read: Tensor) -> contextlib.AbstractContextManager:
    """A context for work that reads these tensors and that nobody waits for."""
    aside = _current.aside
    return _in_turn if aside is None else aside.beside(*read)


def is_beside() -> bool:
    """Whether what is read there must not be overwritten here."""
    return _current.aside is not None and _current.aside.stream is not None


def product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b `[C, D]` of a `[T, C]` and b `[T, D]`, where a captured backward wants its gradient of a weight."""
    out = gradient(a.dtype, a.shape[1], b.shape[1])
    return a.t() @ b if out is None else torch.mm(a.t(), b, out=out)


def gradient(dtype: torch.dtype, *shape: int) -> Tensor | None:
    """The place of a gradient; None: anywhere."""
    room = None if _current.aside is None else _current.aside.room
    return None if room is None else room.take(dtype, *shape)
