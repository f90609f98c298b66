"""How exact dQ is where keys and values have a mean in common; `siglip2-packed doctor` shows it.

dQ = sum_j ds_ij k_j, where a row of ds adds up to zero, so that the mean key cancels. FlashAttention takes delta as the
sum of out * grad from the rounded output: rows then add up to what the rounding lost, which is multiplied with the mean
key. That is its arithmetic, and no reason to refuse it; own kernels are checked at such a mean (see `cases`).

Shapes: T rows, H heads, K head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from siglip2_packed.ops.attention import eager, low_order
from siglip2_packed.ops.attention.backends import BACKENDS
from siglip2_packed.ops.attention.kernels import implementation
from siglip2_packed.ops.runtime.check import in_clean_context, random, relative_error
from siglip2_packed.ops.runtime.choice import Launch, Tile
from siglip2_packed.ops.segments import Segments

MEAN = 3.0
"""Of keys and of values, by their standard deviation."""
ROWS, HEADS = 256, 2


def of_backend(backend: str, device: torch.device, dtype: torch.dtype, K: int) -> float:
    """The relative error of its dQ; of one that is not our own."""
    run = BACKENDS[backend].run
    assert run is not None

    def dq(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, segments: Segments) -> Tensor:
        inputs = [x.requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(run(q, k, v, segments), inputs, grad)[0]

    return in_clean_context(lambda: _error(dq, ROWS, HEADS, device, dtype, K), device)


def of_launch(launch: Launch, device: torch.device, dtype: torch.dtype, H: int, K: int) -> float:
    """The relative error of the dQ of a backward kernel of our own, launched so."""
    run, (_, how) = implementation("backward", launch), launch
    rows = min(ROWS, how.M) if isinstance(how, Tile) else ROWS  # one tile, or as many as it takes

    def dq(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, segments: Segments) -> Tensor:
        out, lse = torch.empty_like(q), torch.empty((H, rows), dtype=torch.float32, device=device)
        pack = segments.cu_seqlens, rows, K**-0.5
        low = low_order.empty_like(out)
        eager.forward(q, k, v, out, low, lse, *pack)
        gradients = [torch.empty_like(q) for _ in range(3)]
        run(how, grad, q, k, v, out, low, lse, *gradients, *pack)
        return gradients[0]

    return in_clean_context(lambda: _error(dq, rows, H, device, dtype, K), device)


def _error(dq: Callable[..., Tensor], rows: int, H: int, device: torch.device, dtype: torch.dtype, K: int) -> float:
    q, k, v, grad = random(device, dtype, 4, rows, H, K)
    of_k, of_v = random(device, dtype, 2, H, K, scale=MEAN, seed=1)
    case, segments = (q, k + of_k, v + of_v, grad), Segments([rows], device)
    exact = [torch.empty(q.shape, dtype=torch.float64, device=device) for _ in range(3)]
    q, k, v, grad = (x.double() for x in case)
    eager.gradients(grad, q, k, v, segments, (exact[0], exact[1], exact[2]))
    return relative_error(dq(*case, segments), exact[0])
