"""Varlen self-attention as layers call it: one object a pack, which knows the segments and what runs on them.

Shapes: T rows, S segments, H heads, K head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from siglip2_packed.ops.attention import operators
from siglip2_packed.ops.attention.backends import ATTN_IMPLEMENTATIONS, BACKENDS, refusal, why_not
from siglip2_packed.ops.attention.compiled import RUN, attention_by_segments
from siglip2_packed.ops.attention.kernels import Kernels
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.check import Refused
from siglip2_packed.ops.runtime.tracing import traced, transformed
from siglip2_packed.ops.segments import Segments


class VarlenAttention:
    """softmax(q kᵀ / sqrt(K)) v within each segment, bidirectional.

        attention(q, k, v)           # [T, H, K] each -> [T, H, K]
        attention.qkvpacked(qkv)     # [T, 3, H, K]   -> [T, H, K]

    Attributes:
        backend: the name of what runs, from `BACKENDS`.
        written_out: whether `forward` and `backward` can be called for themselves: those of our own kernels, which
            read a fused projection and write its gradient where it lies.
        invariant: whether a row's result is the same to the bit whatever other segments there are; of own kernels.
    """

    def __init__(self, segments: Segments, backend: str, otherwise: str = "", invariant: bool = False):
        """`otherwise`: the backend that runs where own kernels are refused for tensors laid out in another way."""
        self.segments, self.backend, self.otherwise, self.invariant = segments, backend, otherwise, invariant
        self.written_out = BACKENDS[backend].run is None
        self._kernels: dict[tuple, Kernels | None] = {}

    def to(self, device: torch.device | str, non_blocking: bool = True) -> VarlenAttention:
        segments = self.segments.to(device, non_blocking)
        if segments is self.segments:
            return self
        return VarlenAttention(segments, self.backend, self.otherwise, self.invariant)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[T, H, K]`, last dimensions contiguous. An empty pack's result is still attached to q, k and v."""
        if q.shape[0] == 0:
            return q + k + v
        assert not self.invariant, "layers that call it so have been refused"
        if self.backend in RUN and torch.compiler.is_compiling():
            return attention_by_segments(q, k, v, self.segments.offsets, self.backend)
        if self.otherwise and transformed():  # kernels have one derivative, and rules for one transform
            return BACKENDS[self.otherwise].run(q, k, v, self.segments)  # type: ignore[misc]
        if not self.written_out:
            return BACKENDS[self.backend].run(q, k, v, self.segments)  # type: ignore[misc]
        try:
            return operators.varlen_attention(q, k, v, self.segments.cu_seqlens, self.segments.max_seqlen)
        except Refused:
            if not self.otherwise:
                raise
            return BACKENDS[self.otherwise].run(q, k, v, self.segments)  # type: ignore[misc]

    def qkvpacked(self, qkv: Tensor) -> Tensor:
        """Of a fused projection, whose parts own kernels read where they lie."""
        if self.written_out and qkv.shape[0] and not (traced() or torch.is_grad_enabled()):
            return self.forward(qkv)[0]
        return self(*qkv.unbind(1))

    def over(self, qkv: Tensor, place: Tensor) -> Callable[[], Tensor]:
        """`qkvpacked` without gradients, called again and again as `[T, 3, H, K]` is filled anew.

        The result may be put into `place` `[T, H, K]`, contiguous.
        """
        q, k, v = qkv.unbind(1)
        kernels = None if traced() or not self.written_out else self._for(q, packed=True, gradients=False)
        if kernels is None:
            return partial(self, q, k, v)
        (T, H, K), segments = q.shape, self.segments
        lse = torch.empty((H, T), dtype=torch.float32, device=q.device)

        def run() -> Tensor:
            kernels.forward(q, k, v, place, None, lse, segments.cu_seqlens, segments.max_seqlen, K**-0.5)
            return place

        return run

    def forward(self, qkv: Tensor, gradients: bool = False) -> tuple[Tensor, Tensor | None, Tensor]:
        """`[T, 3, H, K]` -> `[T, H, K]` and what `backward` takes: its low-order part, the log-sum-exp `[H, T]`."""
        q, k, v = qkv.unbind(1)
        kernels = self._for(q, packed=True, gradients=gradients)
        segments = self.segments
        return operators.run_forward(q, k, v, segments.cu_seqlens, segments.max_seqlen, q.shape[2] ** -0.5, kernels)

    def backward(self, grad: Tensor, qkv: Tensor, out: Tensor, low: Tensor | None, lse: Tensor, dqkv: Tensor) -> None:
        """Fills dqkv `[T, 3, H, K]`, contiguous, from the gradient of `out`, given what `forward` did."""
        operators.one_gradient(grad)
        q, k, v = qkv.unbind(1)
        kernels, segments = self._for(q, packed=True, gradients=True), self.segments
        assert kernels is not None
        assert kernels.backward is not None
        cu_seqlens, longest = segments.cu_seqlens, segments.max_seqlen
        kernels.backward(grad, q, k, v, out, low, lse, *dqkv.unbind(1), cu_seqlens, longest, q.shape[2] ** -0.5)

    def _for(self, q: Tensor, packed: bool, gradients: bool) -> Kernels | None:
        """Looked for once a pack, as all of its layers are alike."""
        key = q.dtype, q.shape[1], packed, gradients
        if key not in self._kernels:
            cu_seqlens, longest = self.segments.cu_seqlens, self.segments.max_seqlen
            self._kernels[key] = operators.for_tensors(q, cu_seqlens, longest, packed, gradients, self.invariant)
        return self._kernels[key]


def for_pack(
    segments: Segments,
    requested: str,
    dtype: torch.dtype,
    heads: int,
    head_dim: int,
    gradients: bool,
    invariant: bool = False,
) -> VarlenAttention:
    """Attention for a pack by the backend asked for, or for `"auto"` by the fastest that was found right.

    Args:
        requested: one of `ATTN_IMPLEMENTATIONS`.
        gradients: whether the backward has to be right too.
        invariant: see `VarlenAttention`; by own kernels or not at all.

    Raises:
        ValueError: an unknown name, or a backend asked for by name that cannot run here or was found wrong.
    """
    if requested not in ATTN_IMPLEMENTATIONS:
        raise ValueError(f"unknown attn_implementation {requested!r}: choose one of {', '.join(ATTN_IMPLEMENTATIONS)}")
    device = segments.cu_seqlens.device
    T = sum(segments.lengths)
    order: tuple[str, ...] = (requested,)
    if invariant:
        if not serves_buckets(requested):
            raise ValueError(f"batch_invariant has attention of its own, attn_implementation asks for {requested!r}")
        return for_bucket(segments, T, dtype, heads, head_dim, gradients, invariant)
    if requested == "auto":
        card, length = choice.card(device), choice.length_class(segments.lengths)
        order = choice.allowed("attention", choice.attention(card, head_dim, length, gradients))
    where = f"{device.type}, {str(dtype).removeprefix('torch.')}, head_dim {head_dim}"
    for backend in order:
        reason = refusal(backend, segments, T, dtype, heads, head_dim, gradients)
        if reason is None:
            if requested == "auto":
                choice.say_once(f"attention: {backend} ({where})")
            return VarlenAttention(segments, backend, otherwise="sdpa" if requested == "auto" else "")
        if requested != "auto":
            raise ValueError(f"attn_implementation={requested!r} cannot be used: {reason} ({where})")
    return VarlenAttention(segments, "eager")


BUCKETS_BY = "triton"
"""The one backend that may leave rows alone which belong to no segment."""


def serves_buckets(requested: str) -> bool:
    """Whether the backend asked for can be given segments whose lengths only the device knows."""
    return requested in ("auto", BUCKETS_BY)


def buckets_unmet(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What attention in buckets needs and has not got here; None if it has all."""
    return why_not(BUCKETS_BY, device, dtype, head_dim)


def for_bucket(
    segments: Segments,
    rows: int,
    dtype: torch.dtype,
    heads: int,
    head_dim: int,
    gradients: bool,
    invariant: bool = False,
) -> VarlenAttention:
    """Attention for segments that only the device knows, among so many rows.

    Raises:
        Refused: it cannot run here, or was found wrong.
    """
    reason = refusal(BUCKETS_BY, segments, rows, dtype, heads, head_dim, gradients, invariant)
    if reason is not None:
        what = "batch_invariant attention" if invariant else "attention in buckets"
        raise Refused(f"{what} cannot be had: {reason}")
    return VarlenAttention(segments, BUCKETS_BY, invariant=invariant)
