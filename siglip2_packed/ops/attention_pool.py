"""Attention of one query per image over the image's own rows.

Shapes: N images, T rows, H heads, K head_dim.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from siglip2_packed.measure import relative_error
from siglip2_packed.ops.attention import why_not
from siglip2_packed.ops.segments import Segments

logger = logging.getLogger("siglip2_packed")


def attention_pool(q: Tensor, k: Tensor, v: Tensor, images: Segments) -> Tensor:
    """softmax(q kᵀ / sqrt(K)) v over each image's rows, accumulated in float32 (float64 for float64).

    One Triton kernel where it runs and has been compared with the torch path, outputs and gradients; else torch.

    Args:
        q: `[H, K]`, one query shared by all images.
        k, v: `[T, H, K]`.
        images: rows of each image, N of them, adding up to T.

    Returns:
        `[N, H, K]` in v's dtype.
    """
    return (_triton if triton_is_right(k.device, k.dtype, k.shape[-1]) else _torch)(q, k, v, images)


def _triton(q: Tensor, k: Tensor, v: Tensor, images: Segments) -> Tensor:
    from siglip2_packed.ops.triton.attention_pool import varlen_attention_pool

    return varlen_attention_pool(q, k, v, images.cu_seqlens, images.max_seqlen)


def _torch(q: Tensor, k: Tensor, v: Tensor, images: Segments) -> Tensor:
    precision = torch.promote_types(v.dtype, torch.float32)
    lengths = images.cu_seqlens.diff()
    scores = torch.einsum("hk,thk->th", q.to(precision) * q.shape[-1] ** -0.5, k.to(precision))
    with torch.no_grad():
        highest = torch.segment_reduce(scores, "max", lengths=lengths, unsafe=True)
    weights = (scores - highest.repeat_interleave(lengths, dim=0, output_size=k.shape[0])).exp()
    total = torch.segment_reduce(weights, "sum", lengths=lengths, unsafe=True)
    summed = torch.segment_reduce(weights[..., None] * v.to(precision), "sum", lengths=lengths, unsafe=True)
    return (summed / total[..., None]).to(v.dtype)


@torch.compiler.assume_constant_result
def triton_is_right(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    return _triton_is_right(device, dtype, head_dim)


@cache
def _triton_is_right(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    if why_not("triton", device, dtype, head_dim) is not None:
        return False
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            errors = _errors(device, dtype, head_dim)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a kernel raises is the reason it cannot be used
        logger.warning("the Triton pooling kernel cannot be used (%s: %s)", type(error).__name__, error)
        return False
    return all(error <= 1e-2 for error in errors)


def _errors(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[float]:
    images = Segments([35, 256, 1, 64], device)
    shapes = (2, head_dim), (2, head_dim), (sum(images.lengths), 2, head_dim), (sum(images.lengths), 2, head_dim)
    generator = torch.Generator().manual_seed(0)
    grad, *qkv = (torch.randn(x, generator=generator, device="cpu").to(device, dtype) for x in shapes)
    results = []
    for pool, precision in ((_triton, dtype), (_torch, torch.float64)):
        inputs = q, k, v = [x.to(precision, copy=True).requires_grad_() for x in qkv]
        out = pool(q, k, v, images)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, grad.to(precision).expand_as(out))])
    return [relative_error(x, ref) for x, ref in zip(*results)]
