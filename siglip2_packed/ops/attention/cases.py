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

from siglip2_packed.ops.attention import eager, low_order
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.check import Results, random
from siglip2_packed.ops.runtime.choice import Tile
from siglip2_packed.ops.segments import cumulative

MARGIN, BEYOND = 64, 3
SHARED_MEAN = 3.0
"""Of keys and of values, by their standard deviation. At 0 a kernel that takes the rounded output is as exact as any;
here its dQ is off by more than 1.5 times the bound, and that of one that reads the low part stays within half."""

FAR = 64.0


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


def _low_cases(device, dtype, *rest) -> Iterator[tuple]:
    """And scores that leave each query some of the keys, all alike, of values far off zero.

    p is 1 or 0 before it is divided by its sum: nothing but the output is rounded.
    """
    for qkv, packed, *pack in _forward_cases(device, dtype, *rest):
        yield qkv, packed, *pack
        qkv = qkv.clone()
        q, k, v = (x[:-BEYOND] for x in qkv.unbind(1 if packed else 0))
        chosen = random(device, dtype, 2, *q.shape[:2], 4, seed=1) > 0
        q.zero_()
        q[..., :4], k[..., :4] = chosen[0], chosen[1] * -2048.0
        v += random(device, dtype, *v.shape[1:], seed=2).sign() * FAR
        yield qkv, packed, *pack


def _low_results(run: Callable, qkv: Tensor, packed: bool, cu_seqlens: Tensor, max_seqlen: int) -> Results:
    """And the output of both parts, seen from a value: what rounding took is beyond the bound there."""
    results = _forward_results(run, qkv, packed, cu_seqlens, max_seqlen, keep=True)
    out, low, value = results["out"], results.pop("low", None), qkv.unbind(1 if packed else 0)[2][:1]
    output = out if low is None else low_order.restored(out, low)
    return results | {"output": (output - value.to(output.dtype))[:-BEYOND]}


def _forward_results(
    run: Callable, qkv: Tensor, packed: bool, cu_seqlens: Tensor, max_seqlen: int, keep: bool = False
) -> Results:
    q, k, v = qkv.unbind(1 if packed else 0)
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=q.device)
    low = low_order.empty_like(out) if keep else None
    lse = torch.full(
        (q.shape[1], len(q)), float("nan"), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device
    )
    run(q, k, v, out, low, lse, cu_seqlens, max_seqlen, q.shape[2] ** -0.5)
    return {"out": out, "lse": lse[:, :-BEYOND]} | ({} if low is None else {"low": low})


def _backward_cases(device, dtype, H: int, K: int, packed: bool, how) -> Iterator[tuple]:
    lengths = _lengths(how, short=isinstance(how, Tile), device=device, H=H)
    T, cu_seqlens, longest = sum(lengths) + BEYOND, cumulative(lengths).to(device), max(lengths)
    qkv = random(device, dtype, T, 3, H, K)
    qkv[:, 1:] += random(device, dtype, 2, H, K, scale=SHARED_MEAN, seed=2)
    results = _forward_results(eager.forward, qkv.double(), True, cu_seqlens, longest)
    lse = torch.nn.functional.pad(results["lse"], (0, BEYOND), value=float("nan"))
    exact = results["out"].float()
    out = exact.to(dtype)
    low = low_order.of(exact, out) if dtype in low_order.SHIFT else None
    sign = (out - exact).sign().to(dtype)  # all that rounding took adds up in delta
    grad = random(device, dtype, T, H, K, seed=1).abs().copysign(sign)
    qkv[-BEYOND:], grad[-BEYOND:] = float("nan"), float("nan")
    qkv = qkv if packed else qkv.transpose(0, 1).contiguous()
    yield qkv, packed, grad, out, low, lse.float(), cu_seqlens, longest


def _backward_results(
    run: Callable,
    qkv: Tensor,
    packed: bool,
    grad: Tensor,
    out: Tensor,
    low: Tensor | None,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
) -> Results:
    T, H, K = grad.shape
    shape = (MARGIN + T + MARGIN, 3, H, K) if packed else (3, MARGIN + T + MARGIN, H, K)
    around = torch.full(shape, float("nan"), dtype=grad.dtype, device=grad.device)
    dq, dk, dv = (x[MARGIN:-MARGIN] for x in around.unbind(1 if packed else 0))
    run(grad, *qkv.unbind(1 if packed else 0), out, low, lse, dq, dk, dv, cu_seqlens, max_seqlen, K**-0.5)
    found = {name: x.clone() for name, x in (("dq", dq), ("dk", dk), ("dv", dv))}
    for x in (dq, dk, dv):
        x.fill_(float("nan"))
    if not around.isnan().all():
        raise RuntimeError("it writes beside its rows")
    return found


def of(direction: str, low: bool = False) -> tuple[Callable[..., Iterator[tuple]], Callable[..., Results]]:
    """`make(device, dtype, H, K, packed, how)`, which gives cases, and `results(run, *case)`.

    low: of a forward that keeps what rounding takes from its output.
    """
    if direction == "backward":
        return _backward_cases, _backward_results
    return (_low_cases, _low_results) if low else (_forward_cases, _forward_results)
