"""Varlen self-attention behind one function: every backend takes packed rows and the segments they fall into.

Which one runs is decided, once, by `dispatch.resolve_backend`.

Shapes: T rows, S segments, H heads, K head_dim.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2_packed.ops.segments import Segments


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, backend: str) -> Tensor:
    """softmax(q kᵀ / sqrt(K)) v within each segment, bidirectional.

    Args:
        q, k, v: `[T, H, K]`, last dimension contiguous.
        segments: lengths that add up to T.
        backend: a name from `BACKENDS`, as `dispatch.resolve_backend` returned it.

    Returns:
        `[T, H, K]`. An empty pack gives an empty result that is still attached to q, k and v.
    """
    if q.shape[0] == 0:
        return q + k + v
    return BACKENDS[backend].run(q, k, v, segments)


def varlen_attention_qkvpacked(qkv: Tensor, segments: Segments, backend: str) -> Tensor:
    """`varlen_attention` of a fused projection `[T, 3, H, K]`, whose gradient own kernels write as one tensor."""
    if backend == "triton" and qkv.shape[0]:
        from siglip2_packed.ops.triton import attention

        return attention.varlen_attention_qkvpacked(qkv, segments.cu_seqlens, segments.max_seqlen)
    q, k, v = qkv.unbind(1)
    return varlen_attention(q, k, v, segments, backend)


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


def triton(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """This package's own kernels (`ops/triton`), made for head_dim 64 and 72 and segments up to about 1000 rows."""
    from siglip2_packed.ops.triton import attention

    return attention.varlen_attention(q, k, v, segments.cu_seqlens, segments.max_seqlen)


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`torch.nn.attention.varlen`: FlashAttention as CUDA builds of torch ship it."""
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = segments.cu_seqlens, segments.max_seqlen
    causal = {"is_causal": False} if "is_causal" in inspect.signature(varlen_attn).parameters else {}
    return varlen_attn(q, k, v, cu, cu, longest, longest, **causal)  # type: ignore[arg-type, return-value]


def flash_attention_2(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`flash_attn` 2."""
    from flash_attn import flash_attn_varlen_func

    return _flash(flash_attn_varlen_func, q, k, v, segments)


def flash_attention_3(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`flash_attn_interface` (FlashAttention 3, Hopper)."""
    from flash_attn_interface import flash_attn_varlen_func

    return _flash(flash_attn_varlen_func, q, k, v, segments)


def flash_attention_4(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`flash_attn.cute` (FlashAttention 4).

    Where gradients are needed, head_dims are padded to 64, 96 or 128: its dQ is wrong at some between, 72 among them.
    """
    from flash_attn.cute import flash_attn_varlen_func

    head_dim = q.shape[-1]
    width = next((width for width in (64, 96, 128) if head_dim <= width), head_dim)
    if width == head_dim or not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        return _flash(flash_attn_varlen_func, q, k, v, segments)
    q, k, v = (F.pad(x, (0, width - head_dim)) for x in (q, k, v))
    return _flash(flash_attn_varlen_func, q, k, v, segments, scale=head_dim**-0.5)[..., :head_dim]


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
    max_head_dim: int = 256


BACKENDS = {
    "eager": Backend(eager),
    "sdpa": Backend(sdpa),
    "triton": Backend(triton, "siglip2_packed.ops.triton.attention", "varlen_attention", (8, 0), 128),
    "torch_varlen": Backend(torch_varlen, "torch.nn.attention.varlen", "varlen_attn", (8, 0)),
    "flash_attention_2": Backend(flash_attention_2, "flash_attn", "flash_attn_varlen_func", (8, 0)),
    "flash_attention_3": Backend(flash_attention_3, "flash_attn_interface", "flash_attn_varlen_func", (9, 0)),
    "flash_attention_4": Backend(flash_attention_4, "flash_attn.cute", "flash_attn_varlen_func", (9, 0)),
}
ATTN_IMPLEMENTATIONS = ("auto", *BACKENDS)


@cache
def why_missing(backend: str) -> str | None:
    """Why this backend cannot be imported here; None if it can."""
    spec = BACKENDS[backend]
    if spec.module is None:
        return None
    try:
        getattr(importlib.import_module(spec.module), spec.name)
    except Exception as error:  # a broken binary raises OSError, an ABI mismatch ImportError, CuTe whatever it likes
        return f"{spec.module}.{spec.name} cannot be imported ({type(error).__name__}: {error})"
    return None


def why_not(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this backend cannot run on such tensors; None if it can."""
    reason = why_missing(backend)
    _, _, _, capability, max_head_dim = BACKENDS[backend]
    if reason is not None or capability is None:
        return reason
    if device.type != "cuda":
        return f"needs a CUDA device, the tensors are on {device.type}"
    if torch.cuda.get_device_capability(device) < capability:
        return f"needs compute capability {capability}, {torch.cuda.get_device_name(device)} has less"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, the tensors are {dtype}"
    if head_dim % 8 or head_dim > max_head_dim:
        return f"needs a head_dim that is a multiple of 8 up to {max_head_dim}, got {head_dim}"
    return None
