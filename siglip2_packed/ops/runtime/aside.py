"""Work on a second stream: for what backward makes and nothing in backward waits for, the gradients of weights.

Few rows leave most of a card idle; where launches cost nothing (a CUDA graph is captured), such products run beside the
gradients of activations. Elsewhere everything runs in turn, on one stream.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

DEPTH = 2
"""Layers whose work may still be under way: their tensors are kept."""


class Aside:
    """A stream beside the current one, which later waits for it: after `DEPTH` layers, and in `join`."""

    def __init__(self, stream: torch.cuda.Stream):
        self.stream = stream
        self._read: list[Tensor] = []
        self._layers: list[tuple[torch.cuda.Event, list[Tensor]]] = []

    @contextlib.contextmanager
    def layer(self) -> Iterator[None]:
        """Within it, in this thread, `beside` is on this stream."""
        self.stream.wait_stream(torch.cuda.current_stream())
        _current.aside = self
        try:
            yield
        finally:
            _current.aside = None
        self._layers.append((self.stream.record_event(), self._read))
        self._read = []
        while len(self._layers) > DEPTH:
            done, _ = self._layers.pop(0)
            torch.cuda.current_stream().wait_event(done)

    def join(self) -> None:
        if self._layers:
            torch.cuda.current_stream().wait_stream(self.stream)
            self._layers.clear()

    @contextlib.contextmanager
    def beside(self, *read: Tensor) -> Iterator[None]:
        self._read += read
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield


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
    return _current.aside is not None
