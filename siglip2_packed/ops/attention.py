"""Varlen self-attention behind one function: every backend takes packed rows and the segments they fall into.

A backend is used only after it has been compared with the reference (outputs and gradients) on this machine:
`resolve_backend` runs that self-check once per (device, dtype, head_dim) and remembers it.

Shapes: T rows, S segments, H heads, K head_dim.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2_packed.ops.segments import Segments

logger = logging.getLogger("siglip2_packed")


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, backend: str) -> Tensor:
    """softmax(q kᵀ / sqrt(K)) v within each segment, bidirectional.

    Args:
        q, k, v: `[T, H, K]`, last dimension contiguous.
        segments: lengths that add up to T.
        backend: a name from `BACKENDS`, as `resolve_backend` returned it.

    Returns:
        `[T, H, K]`. An empty pack gives an empty result that is still attached to q, k and v.
    """
    if q.shape[0] == 0:
        return q + k + v
    return BACKENDS[backend].run(q, k, v, segments)


def eager(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """The reference: one segment after another, softmax in float32 at least."""
    scale = q.shape[-1] ** -0.5
    outputs = []
    for q_s, k_s, v_s in zip(*(x.split(segments.lengths) for x in (q, k, v))):
        scores = torch.einsum("qhk,shk->hqs", q_s * scale, k_s)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
        outputs.append(torch.einsum("hqs,shk->qhk", weights, v_s))
    return torch.cat(outputs)


def sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """torch's scaled_dot_product_attention, one call for all segments of a length; no mask, no padding."""
    if segments.by_length is not None:
        rows = segments.by_length[0]
        q, k, v = q[rows], k[rows], v[rows]
    sizes = [count * length for count, length in segments.groups]
    outputs = []
    for (count, length), *qkv in zip(segments.groups, *(x.split(sizes) for x in (q, k, v))):
        q_g, k_g, v_g = (x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv)
        out = F.scaled_dot_product_attention(q_g, k_g, v_g, is_causal=False)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out if segments.by_length is None else out[segments.by_length[1]]


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`torch.nn.attention.varlen`: FlashAttention as CUDA builds of torch ship it."""
    function = _import("torch.nn.attention.varlen", "varlen_attn")
    cu, longest = segments.cu_seqlens, segments.max_seqlen
    causal = {"is_causal": False} if "is_causal" in inspect.signature(function).parameters else {}
    return function(q, k, v, cu, cu, longest, longest, **causal)


def flash_attention_2(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`flash_attn` 2."""
    return _flash(_import("flash_attn", "flash_attn_varlen_func"), q, k, v, segments)


def flash_attention_3(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`flash_attn_interface` (FlashAttention 3, Hopper)."""
    return _flash(_import("flash_attn_interface", "flash_attn_varlen_func"), q, k, v, segments)


def flash_attention_4(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`flash_attn.cute` (FlashAttention 4), padded to 64, 96 or 128: its dQ is wrong at some head_dims between."""
    head_dim = q.shape[-1]
    width = next((width for width in (64, 96, 128) if head_dim <= width), head_dim)
    q, k, v = (F.pad(x, (0, width - head_dim)) if width > head_dim else x for x in (q, k, v))
    function = _import("flash_attn.cute", "flash_attn_varlen_func")
    return _flash(function, q, k, v, segments, scale=head_dim**-0.5)[..., :head_dim]


def _flash(
    function: Callable, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None = None
) -> Tensor:
    out = function(
        q,
        k,
        v,
        cu_seqlens_q=segments.cu_seqlens,
        cu_seqlens_k=segments.cu_seqlens,
        max_seqlen_q=segments.max_seqlen,
        max_seqlen_k=segments.max_seqlen,
        softmax_scale=q.shape[-1] ** -0.5 if scale is None else scale,
        causal=False,
    )
    return out[0] if isinstance(out, tuple) else out


class Backend(NamedTuple):
    run: Callable[[Tensor, Tensor, Tensor, Segments], Tensor]
    module: str | None = None
    """What has to be importable, with `name` in it."""
    name: str = ""
    min_capability: tuple[int, int] | None = None
    """Lowest CUDA compute capability; None: any device and dtype."""


BACKENDS = {
    "eager": Backend(eager),
    "sdpa": Backend(sdpa),
    "torch_varlen": Backend(torch_varlen, "torch.nn.attention.varlen", "varlen_attn", (8, 0)),
    "flash_attention_2": Backend(flash_attention_2, "flash_attn", "flash_attn_varlen_func", (8, 0)),
    "flash_attention_3": Backend(flash_attention_3, "flash_attn_interface", "flash_attn_varlen_func", (9, 0)),
    "flash_attention_4": Backend(flash_attention_4, "flash_attn.cute", "flash_attn_varlen_func", (9, 0)),
}
ATTN_IMPLEMENTATIONS = ("auto", *BACKENDS)
AUTO_ORDER = ("flash_attention_3", "torch_varlen", "flash_attention_2", "sdpa")


@cache
def _import(module: str, name: str):
    return getattr(importlib.import_module(module), name)


def why_missing(backend: str) -> str | None:
    """Why this backend cannot be imported here; None if it can."""
    spec = BACKENDS[backend]
    if spec.module is None:
        return None
    try:
        _import(spec.module, spec.name)
    except Exception as error:  # a broken binary raises OSError, an ABI mismatch ImportError, CuTe whatever it likes
        return f"{spec.module}.{spec.name} cannot be imported ({type(error).__name__}: {error})"
    return None


def why_not(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this backend cannot run on such tensors; None if it can."""
    reason = why_missing(backend)
    capability = BACKENDS[backend].min_capability
    if reason is not None or capability is None:
        return reason
    if device.type != "cuda":
        return f"needs a CUDA device, the tensors are on {device.type}"
    if torch.cuda.get_device_capability(device) < capability:
        return f"needs compute capability {capability}, {torch.cuda.get_device_name(device)} has less"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, the tensors are {dtype}"
    if head_dim % 8 or head_dim > 256:
        return f"needs a head_dim that is a multiple of 8 up to 256, got {head_dim}"
    return None


class SelfCheck(NamedTuple):
    """Relative errors ‖x − ref‖ / ‖ref‖ against the float64 reference; NaN if it did not run."""

    forward: float
    dq: float
    dk: float
    dv: float
    bound: float
    error: str = ""

    @property
    def forward_ok(self) -> bool:
        return self.forward <= self.bound

    @property
    def backward_ok(self) -> bool:
        return self.forward_ok and all(error <= self.bound for error in (self.dq, self.dk, self.dv))

    def __str__(self) -> str:
        if self.error:
            return self.error
        errors = f"forward {self.forward:.1e}, dq {self.dq:.1e}, dk {self.dk:.1e}, dv {self.dv:.1e}"
        return f"{errors} (bound {self.bound:.0e})"


@cache
def self_check(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> SelfCheck:
    """Runs a backend forward and backward on a small pack and compares it with the reference in float64."""
    bound = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-10}.get(dtype, 1e-5)
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        bound = 5e-3
    nan = float("nan")
    generator = torch.Generator().manual_seed(0)
    segments = Segments([35, 256, 1, 64], device)
    inputs = torch.randn(4, sum(segments.lengths), 3, head_dim, generator=generator).to(device, dtype)
    results = []
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            for run, precision in ((BACKENDS[backend].run, dtype), (eager, torch.float64)):
                q, k, v = (x.to(precision).requires_grad_() for x in inputs[:3])
                out = run(q, k, v, segments)
                results.append([out.detach(), *_gradients(out, (q, k, v), inputs[3].to(precision))])
    except Exception as error:  # whatever a kernel raises is the reason it cannot be used
        return SelfCheck(nan, nan, nan, nan, bound, f"{type(error).__name__}: {error}")
    forward, dq, dk, dv = (_relative_error(x, ref) for x, ref in zip(*results))
    return SelfCheck(forward, dq, dk, dv, bound)


def _gradients(out: Tensor, inputs: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
    try:
        return list(torch.autograd.grad(out, inputs, grad))
    except (RuntimeError, NotImplementedError, AssertionError):  # a forward-only build is still good for inference
        return [torch.full_like(x, float("nan")) for x in inputs]


def _relative_error(x: Tensor, ref: Tensor) -> float:
    return float((x.double() - ref.double()).norm() / ref.double().norm())


@torch.compiler.assume_constant_result
def resolve_backend(requested: str, device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> str:
    """The backend that will run: `requested` itself, or for `"auto"` the fastest that has passed its self-check.

    Raises:
        ValueError: an unknown name, or a backend asked for by name that cannot run here or fails its self-check.
    """
    return _resolve(requested, device, dtype, head_dim, needs_grad)


@cache
def _resolve(requested: str, device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> str:
    if requested not in ATTN_IMPLEMENTATIONS:
        raise ValueError(f"unknown attn_implementation {requested!r}: choose one of {', '.join(ATTN_IMPLEMENTATIONS)}")
    where = f"{device.type}, {str(dtype).removeprefix('torch.')}, head_dim {head_dim}"
    for backend in AUTO_ORDER if requested == "auto" else (requested,):
        reason = why_not(backend, device, dtype, head_dim)
        if reason is None and backend != "eager":
            check = self_check(backend, device, dtype, head_dim)
            if not (check.backward_ok if needs_grad else check.forward_ok):
                reason = f"failed its self-check on {where}: {check}"
                logger.warning("attention backend %s %s", backend, reason)
        if reason is None:
            if requested == "auto":
                logger.info("attention: %s (%s)", backend, where)
            return backend
        if requested != "auto":
            raise ValueError(f"attn_implementation={requested!r} cannot be used: {reason}")
    return "eager"
