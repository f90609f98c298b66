"""Gradients stay where a graph has left them, and are lent: `.grad` costs neither a copy nor memory of its own.

Before the graph's memory is used again, those that are still needed are moved (`Lender.reclaim`).
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from siglip2_packed.ops.runtime.aside import Room
from siglip2_packed.ops.runtime.memory import alias


class Lender:
    """Keeps account of gradients that lie in the memory of one pool."""

    def __init__(self, device: torch.device):
        self._device = device
        self._lent: list[Lent] = []
        self.borrower = threading.get_ident()
        """The thread whose gradients they are."""

    def note(self, loan: Loan, address: int, parameters: list[nn.Parameter]) -> None:
        stream = torch.cuda.current_stream(self._device)
        self._lent.append(Lent(weakref.ref(loan), address, parameters, stream))

    def reclaim(self) -> bool:
        """Has the gradients of earlier steps that `.grad` still holds moved to memory of their own.

        False: somebody holds them otherwise, or another thread may be at work on them, so nothing may run here. (Memory
        that a tensor was given to another stream for, by `record_stream`, is not told from free memory.) What reads
        them where they were made comes first.
        """
        mine = self.borrower == threading.get_ident()
        current = torch.cuda.current_stream(self._device)
        for loan, address, parameters, stream in self._lent:
            if mine and loan() is not None:
                grads = [p.grad for p in parameters if p.grad is not None]
                grads = [g for g in grads if g.untyped_storage().data_ptr() == address]
                with torch.cuda.stream(stream):
                    for grad in grads:
                        grad.data = grad.detach().clone()
            if stream != current:
                current.wait_stream(stream)
        self._lent = [lent for lent in self._lent if lent.loan() is not None]
        return not self._lent


class Loan:
    """Alive as long as anybody has gradients that were lent together. Their pool lives as long as the graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph):
        self.graph = graph


class Lent(NamedTuple):
    """What is known of a loan."""

    loan: weakref.ref[Loan]
    address: int
    parameters: list[nn.Parameter]
    stream: torch.cuda.Stream
    """Where they were made, and are read first."""


class Lot:
    """Gradients side by side."""

    def __init__(self, flat: Tensor, places: dict[int, nn.Parameter]):
        self.flat, self.parameters = flat, list(places.values())
        views = [flat[place : place + p.numel()].view(p.shape) for place, p in places.items()]
        self._strided = [(x.shape, x.stride(), place) for x, place in zip(views, places)]

    @classmethod
    def of_copies(cls, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> Lot:
        room = Room(gradients, gradients[0])
        room.make()
        copies: list[Any] = [room.take(g.dtype, *g.shape) for g in gradients]
        torch._foreach_copy_(copies, list(gradients))
        ends = itertools.accumulate(map(room.size, gradients), initial=0)
        return cls(room.flat, dict(zip(ends, parameters)))

    def lend(self, lender: Lender, graph: torch.cuda.CUDAGraph) -> list[Tensor]:
        loan = Loan(graph)
        flat = alias(self.flat, holds=loan)
        lender.note(loan, flat.data_ptr(), self.parameters)
        return [torch.as_strided(flat, *strided) for strided in self._strided]
