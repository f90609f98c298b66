"""Stretches of a pack's rows that are computed together, attention segments or images, and what kernels ask of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from siglip2_packed.ops.runtime.transfer import to_device


class Segments:
    """S stretches of rows that have to do with themselves and with nothing else.

    Attributes:
        lengths: rows of each segment, host integers.
        max_seqlen: the longest, host integer.
        offsets: `[S+1]` int32, on the host.
        cu_seqlens: the same on `device`.
    """

    _groups: list[tuple[int, int]] | None = None
    _by_length: tuple[Tensor, Tensor] | tuple[()] | None = None  # () where they are sorted already

    @torch.compiler.disable
    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu"):
        self.lengths = list(lengths)
        self.max_seqlen = max(self.lengths) if self.lengths else 0
        self.device = torch.device(device)
        self.offsets = cumulative(self.lengths)
        self.cu_seqlens = to_device(self.offsets, self.device)

    @classmethod
    def on_device(cls, cu_seqlens: Tensor, max_seqlen: int) -> Segments:
        """Segments whose offsets only the device knows, none longer than `max_seqlen`."""
        self = cls.__new__(cls)
        self.cu_seqlens, self.max_seqlen, self.device = cu_seqlens, max_seqlen, cu_seqlens.device
        return self

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Segments:
        return self if torch.device(device) == self.device else Segments(self.lengths, device)

    @property
    def groups(self) -> list[tuple[int, int]]:
        """`(count, length)` of the segments of each length, shortest first."""
        if self._groups is None:
            self._groups = [(count, length) for length, count in sorted(Counter(self.lengths).items())]
        return self._groups

    @property
    def by_length(self) -> tuple[Tensor, Tensor] | None:
        """Row indices `[T]` that sort the segments by length, and those that undo it; None if they are sorted."""
        if self._by_length is None:
            self._by_length = () if self.lengths == sorted(self.lengths) else self._sort()
        return self._by_length or None

    def _sort(self) -> tuple[Tensor, Tensor]:
        lengths = np.array(self.lengths)
        order = np.argsort(lengths, kind="stable")
        starts, sorted_lengths = np.cumsum(lengths) - lengths, lengths[order]
        sorted_starts = np.cumsum(sorted_lengths) - sorted_lengths
        rows = np.arange(lengths.sum()) + np.repeat(starts[order] - sorted_starts, sorted_lengths)
        undo = np.empty_like(rows)
        undo[rows] = np.arange(len(rows))
        rows, undo = (to_device(torch.from_numpy(x), self.device) for x in (rows, undo))
        return rows, undo


def cumulative(lengths: Sequence[int]) -> Tensor:
    """`[S]` lengths -> `[S+1]` int32 offsets on the host, as varlen attention takes them."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(np.asarray(lengths, dtype=np.int64), out=offsets[1:])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"a pack holds at most {np.iinfo(np.int32).max} patches (int32 offsets), got {offsets[-1]}")
    return torch.from_numpy(offsets.astype(np.int32))


def check_rows(**tensors: Tensor) -> None:
    """Raises ValueError unless all are `[T, H, K]` of one shape, dtype and device, the last dimension contiguous."""
    (first, x), *others = tensors.items()
    for name, y in tensors.items():
        if y.ndim != 3:
            raise ValueError(f"{name} must be [T, H, K], got {list(y.shape)}")
        if y.stride(-1) != 1:
            raise ValueError(f"{name}'s last dimension must be contiguous, got stride {y.stride(-1)}")
    for name, y in others:
        if y.shape != x.shape:
            raise ValueError(f"{name} must have the shape of {first}, {list(x.shape)}, got {list(y.shape)}")
        if y.dtype != x.dtype or y.device != x.device:
            raise ValueError(f"{name} is {y.dtype} on {y.device}, {first} is {x.dtype} on {x.device}")


def check_segments(x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    """Raises ValueError unless own kernels can take these rows `[T, H, K]`, cut so."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype must be bfloat16, float16 or float32, got {x.dtype}")
    if x.shape[-1] % 8 or not 8 <= x.shape[-1] <= 128:
        raise ValueError(f"head_dim must be a multiple of 8 from 8 to 128, got {x.shape[-1]}")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be [S+1] int32, got {list(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if cu_seqlens.stride(0) != 1:
        raise ValueError(f"cu_seqlens must be contiguous, got stride {cu_seqlens.stride(0)}")
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, the inputs are on {x.device}")
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt)):
        raise ValueError(f"max_seqlen must be a Python int, got {type(max_seqlen).__name__}")


def positive_scale(K: int, given: float | None) -> float:
    """K ** -0.5 of the true head_dim, where none is given. ValueError unless it is positive."""
    scale = K**-0.5 if given is None else float(given)
    if not scale > 0:
        raise ValueError(f"softmax_scale must be positive, got {given}")
    return scale
