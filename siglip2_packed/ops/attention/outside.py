"""Attention of torch's and of other packages, one signature for all: `backend(q, k, v, segments)`.

Shapes: T rows, S segments, H heads, K head_dim.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from siglip2_packed.ops.runtime.tracing import transformed
from siglip2_packed.ops.segments import Segments

NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """torch's scaled_dot_product_attention, one call for all segments of a length; no mask, no padding.

    On CUDA without cuDNN where gradients are wanted: torch 2.11's are wrong, without a word, where the gradient of the
    output has another layout than the output. Under torch.func by its own formula, the one that has all derivatives.
    """
    order = segments.by_length
    if order is not None:
        q, k, v = (x[order[0]] for x in (q, k, v))
    differentiated = q.is_cuda and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    allowed = SDPBackend.MATH if transformed() else NOT_CUDNN if differentiated else None
    sizes = [count * length for count, length in segments.groups]
    outputs = []
    for (count, length), *qkv in zip(segments.groups, *(x.split(sizes) for x in (q, k, v))):
        q_g, k_g, v_g = (x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv)
        with sdpa_kernel(allowed) if allowed else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(q_g, k_g, v_g, is_causal=False)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out if order is None else out[order[1]]


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


def deterministic(function: Callable) -> bool:
    """Whether a function of FlashAttention can be asked for a backward that gives the same bits each time."""
    parameters = inspect.signature(function).parameters
    return "deterministic" in parameters or any(x.kind is x.VAR_KEYWORD for x in parameters.values())


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
        **({"deterministic": True} if torch.are_deterministic_algorithms_enabled() and deterministic(function) else {}),
    )
    return out[0] if isinstance(out, tuple) else out
