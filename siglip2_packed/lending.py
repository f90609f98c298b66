"""Gradients stay where a graph has left them, and are lent: `.grad` costs neither a copy nor memory of its own.

Before the graph's memory is used again, those that are still needed are moved (`Lender.reclaim`).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from siglip2_packed.ops.runtime.aside import Room
from siglip2_packed.ops.runtime.memory import alias

LENDS = hasattr(torch._C, "_storage_Use_Count")
"""Whether torch says how many tensors there are in a piece of memory. Else gradients are copied."""


class Lot:
    """Gradients side by side, where a graph leaves them."""

    def __init__(self, flat: Tensor, places: dict[int, nn.Parameter]):
        self._flat, self.parameters, self._first = flat, list(places.values()), list(places)

    @classmethod
    def of_copies(cls, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> Lot:
        room = Room(gradients, gradients[0])
        room.make()
        copies: list[Any] = [room.take(g.dtype, *g.shape) for g in gradients]
        torch._foreach_copy_(copies, list(gradients))
        ends = itertools.accumulate(map(room.size, gradients), initial=0)
        return cls(room.flat, dict(zip(ends, parameters)))

    def settle(self, graph: torch.cuda.CUDAGraph) -> None:
        """The pool has the memory from now on, for other graphs, too. It lives as long as anybody has what is lent."""
        self._flat = alias(self._flat, holds=graph)
        pieces = zip(self.parameters, self._first)
        self._gradients = [self._flat[first : first + p.numel()].view(p.shape) for p, first in pieces]
        self._storage = self._flat.untyped_storage()
        self._own = self._users()

    def _users(self) -> int:
        return torch._C._storage_Use_Count(self._storage._cdata) if LENDS else 0

    def lend(self) -> list[Tensor]:
        return [x.detach() for x in self._gradients] if LENDS else [*torch._foreach_mul(self._gradients, 1.0)]

    @property
    def is_lent(self) -> bool:
        """Whether anybody still has any of them."""
        return self._users() > self._own

    def move(self) -> None:
        """Gives those that `.grad` holds memory of their own."""
        address = self._flat.data_ptr()
        for parameter in self.parameters:
            if parameter.grad is not None and parameter.grad.untyped_storage().data_ptr() == address:
                parameter.grad.data = parameter.grad.detach().clone()


class Lender:
    """Keeps account of gradients that lie in the memory of one pool."""

    def __init__(self, device: torch.device):
        self._device = device
        self._lent: dict[Lot, torch.cuda.Stream] = {}
        self.borrower = threading.get_ident()
        """The thread whose gradients they are."""

    def lend(self, lots: Sequence[Lot]) -> list[Tensor]:
        """Made on the current stream, and read there first."""
        self._lent |= dict.fromkeys(lots, torch.cuda.current_stream(self._device))
        return [gradient for lot in lots for gradient in lot.lend()]

    def reclaim(self) -> bool:
        """Has the gradients of earlier steps that `.grad` still holds moved to memory of their own.

        False: somebody holds them otherwise, or another thread may be at work on them, so nothing may run here. (Memory
        that a tensor was given to another stream for, by `record_stream`, is not told from free memory.) What reads
        them where they were made comes first.
        """
        mine = self.borrower == threading.get_ident()
        current = torch.cuda.current_stream(self._device)
        for lot, stream in self._lent.items():
            if mine and lot.is_lent:
                with torch.cuda.stream(stream):
                    lot.move()
        for stream in set(self._lent.values()) - {current}:
            current.wait_stream(stream)
        self._lent = {lot: stream for lot, stream in self._lent.items() if lot.is_lent}
        return not self._lent
