"""What own attention kernels are compared on.

Segments that are empty, of one row, shorter than a tile, of a tile and of more, and rows beyond the last, which hold
NaN. Results begin as NaN, and nothing may be written beside the gradients. Keys and values of a backward have a mean in
common, which must not enter dQ: with delta = sum(out * grad), `out` being rounded, it does.

Shapes: T rows, H heads, K head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from siglip2_packed.ops.attention import eager
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.check import Results, random
from siglip2_packed.ops.runtime.choice import Tile
from siglip2_packed.ops.segments import cumulative

MARGIN, BEYOND = 64, 3
SHARED_MEAN = 2.0
"""Of keys and of values, by their standard deviation. At 0 a kernel with that fault is as exact as any; here its dQ is
off by two to five times the bound, and one that has mended it stays within half."""


def _lengths(how: Tile | tuple[Tile, Tile] | int, short: bool, device: torch.device, H: int) -> list[int]:
    """For warpgroups, which stay resident, so many that each thread block has three items and more."""
    if isinstance(how, int):
        times = max(1, -(-choice.card(device).multiprocessors // H))
        return [64 * how + 37, 0, 64 * how, 65, 1, 5] * times
    tile = how if isinstance(how, Tile) else how[0]
    if short:
        return [tile.N, 0, 1, tile.N - 15]
    return [max(tile.M, 64) + 37, 0, max(tile.M, 64), 65, 1, 5]


def _forward_cases(device, dtype, H: int, K: int, packed: bool, how) -> Iterator[tuple]:
    lengths = _lengths(how, short=isinstance(how, Tile) and how.single, device=device, H=H)
    qkv = random(device, dtype, sum(lengths) + BEYOND, 3, H, K)
    qkv[-BEYOND:] = float("nan")
    yield qkv if packed else qkv.transpose(0, 1).contiguous(), packed, cumulative(lengths).to(device), max(lengths)


def _forward_results(run: Callable, qkv: Tensor, packed: bool, cu_seqlens: Tensor, max_seqlen: int) -> Results:
    q, k, v = qkv.unbind(1 if packed else 0)
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=q.device)
    lse = torch.full(
        (q.shape[1], len(q)), float("nan"), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device
    )
    run(q, k, v, out, lse, cu_seqlens, max_seqlen, q.shape[2] ** -0.5)
    return {"out": out, "lse": lse[:, :-BEYOND]}


def _backward_cases(device, dtype, H: int, K: int, packed: bool, how) -> Iterator[tuple]:
    lengths = _lengths(how, short=isinstance(how, Tile), device=device, H=H)
    T, cu_seqlens, longest = sum(lengths) + BEYOND, cumulative(lengths).to(device), max(lengths)
    qkv, grad = random(device, dtype, T, 3, H, K), random(device, dtype, T, H, K, seed=1)
    qkv[:, 1:] += random(device, dtype, 2, H, K, scale=SHARED_MEAN, seed=2)
    results = _forward_results(eager.forward, qkv.double(), True, cu_seqlens, longest)
    lse = torch.nn.functional.pad(results["lse"], (0, BEYOND), value=float("nan"))
    qkv[-BEYOND:], grad[-BEYOND:] = float("nan"), float("nan")
    qkv = qkv if packed else qkv.transpose(0, 1).contiguous()
    yield qkv, packed, grad, results["out"].to(dtype), lse.float(), cu_seqlens, longest


def _backward_results(
    run: Callable,
    qkv: Tensor,
    packed: bool,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
) -> Results:
    T, H, K = grad.shape
    shape = (MARGIN + T + MARGIN, 3, H, K) if packed else (3, MARGIN + T + MARGIN, H, K)
    around = torch.full(shape, float("nan"), dtype=grad.dtype, device=grad.device)
    dq, dk, dv = (x[MARGIN:-MARGIN] for x in around.unbind(1 if packed else 0))
    run(grad, *qkv.unbind(1 if packed else 0), out, lse, dq, dk, dv, cu_seqlens, max_seqlen, K**-0.5)
    found = {name: x.clone() for name, x in (("dq", dq), ("dk", dk), ("dv", dv))}
    for x in (dq, dk, dv):
        x.fill_(float("nan"))
    if not around.isnan().all():
        raise RuntimeError("it writes beside its rows")
    return found


def of(direction: str) -> tuple[Callable[..., Iterator[tuple]], Callable[..., Results]]:
    """`make(device, dtype, H, K, packed, how)`, which gives cases, and `results(run, *case)`."""
    return (_forward_cases, _forward_results) if direction == "forward" else (_backward_cases, _backward_results)
