"""Attention segments of a pack, on the device that attends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from siglip2_packed.ops.transfer import to_device
from siglip2_packed.packing import cumulative


class Segments:
    """S stretches of rows that attend to themselves and to nothing else.

    Attributes:
        lengths: rows of each segment, host integers.
        max_seqlen: the longest, host integer.
        cu_seqlens: `[S+1]` int32 offsets on `device`.
    """

    @torch.compiler.disable
    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu"):
        self.lengths = list(lengths)
        self.max_seqlen = max(self.lengths) if self.lengths else 0
        self.device = torch.device(device)
        self.cu_seqlens = to_device(cumulative(self.lengths), self.device)

    @classmethod
    def on_device(cls, cu_seqlens: Tensor, max_seqlen: int) -> Segments:
        """Segments whose offsets only the device knows, none longer than `max_seqlen`; for Triton and flash-attn."""
        self = cls.__new__(cls)
        self.cu_seqlens, self.max_seqlen, self.device = cu_seqlens, max_seqlen, cu_seqlens.device
        return self

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Segments:
        return self if torch.device(device) == self.device else Segments(self.lengths, device)

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """`(count, length)` of the segments of each length, shortest first."""
        return [(count, length) for length, count in sorted(Counter(self.lengths).items())]

    @cached_property
    def by_length(self) -> tuple[Tensor, Tensor] | None:
        """Row indices `[T]` that sort the segments by length, and those that undo it; None if they are sorted."""
        if self.lengths == sorted(self.lengths):
            return None
        lengths = torch.tensor(self.lengths)
        order = torch.argsort(lengths, stable=True)
        starts = lengths.cumsum(0) - lengths
        sorted_lengths = lengths[order]
        sorted_starts = sorted_lengths.cumsum(0) - sorted_lengths
        rows = torch.arange(sum(self.lengths)) + (starts[order] - sorted_starts).repeat_interleave(sorted_lengths)
        return to_device(rows, self.device), to_device(torch.argsort(rows), self.device)
