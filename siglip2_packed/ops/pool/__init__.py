"""The pooling head's attention: one query reads each image's rows. `eager` is the contract; `triton` is one kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.check import Results, random
from siglip2_packed.ops.runtime.choice import Function
from siglip2_packed.ops.runtime.tracing import transformed
from siglip2_packed.ops.segments import Segments

MODULES = {"eager": "siglip2_packed.ops.pool.eager", "triton": "siglip2_packed.ops.pool.triton"}


def _cases(device: torch.device, dtype: torch.dtype, H: int, K: int, gradients: bool) -> Iterator[tuple]:
    """Keys have a large mean, as features have, which must not enter the gradient of q."""
    lengths = [35, 256, 1, 64]
    k, v = random(device, dtype, 2, sum(lengths), H, K)
    k = k + 3 * random(device, dtype, H, K, seed=3)
    grad = random(device, dtype, len(lengths), H, K, seed=1) if gradients else None
    yield random(device, dtype, H, K, seed=2), k, v, Segments(lengths, device), grad


def _pooled(function: Callable, q: Tensor, k: Tensor, v: Tensor, images: Segments, grad: Tensor | None) -> Results:
    if grad is None:
        with torch.no_grad():
            return {"out": function(q, k, v, images)}
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = function(*inputs, images)
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, inputs, grad)))}


ATTENTION_POOL = Function("pool.attention_pool", MODULES, _pooled, _cases)


def attention_pool(q: Tensor, k: Tensor, v: Tensor, images: Segments, invariant: bool = False) -> Tensor:
    """q `[H, K]`, k and v `[T, H, K]` -> `[N, H, K]`; see `pool.eager`.

    invariant: an image's result is the same to the bit whatever the others are; `Refused` where that cannot be had.
    """
    H, K = q.shape
    if invariant:
        pool = choice.require(ATTENTION_POOL, ("triton",), k.device, k.dtype, H, K, torch.is_grad_enabled())
        return pool(q, k, v, images)  # type: ignore[no-any-return]
    if transformed():
        return ATTENTION_POOL.of("eager")(q, k, v, images)  # type: ignore[no-any-return]
    order, gradients = choice.pool(choice.card(k.device), k.dtype, K), torch.is_grad_enabled()
    return choice.take(ATTENTION_POOL, order, k.device, k.dtype, H, K, gradients)(q, k, v, images)
