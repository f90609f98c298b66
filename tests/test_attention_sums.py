"""What the backward of one pass on Hopper has before its kernel, and makes of its sums after; these kernels are in
Triton, and run on a CPU too. The one between: test_attention_hopper.py.
"""

import itertools

import pytest
import torch
from attention_inputs import DEVICE, assert_close, offsets, poison, random_qkv

from siglip2_packed.ops.attention import eager, hopper_sums, low_order
from siglip2_packed.ops.runtime.base2 import LOG2_E
from siglip2_packed.ops.segments import Segments

H, BEYOND, DTYPE = 2, 3, torch.float16
PACKS = [[130, 5, 0, 64, 1], [63, 200], [65]]


def in_register_order(x):
    """[64, lanes] of an accumulator: 16 rows a warp, of which a thread has two, and two of each eight lanes."""
    numbers = torch.arange(64)
    warp, half, row = numbers // 16, numbers // 8 % 2, numbers % 8
    lanes = torch.arange(x.shape[1])
    eight, pair, one = lanes // 8, lanes // 2 % 4, lanes % 2
    thread = warp[:, None] * 32 + row[:, None] * 4 + pair
    found = torch.empty(x.numel(), dtype=x.dtype)
    found[(eight * 512 + thread * 4 + half[:, None] * 2 + one).flatten()] = x.flatten()
    return found.view(-1, 32)


def lanes(head, K):
    """Of a main part and of a tail, which the tail of odd heads of 72 comes before."""
    main = 8 if head % 2 and K == 72 else 0
    return torch.arange(64) + main, torch.arange(16) + (-8 if main else 64)


def tiles(lengths):
    """(segment, number of the tile, its first row in the segment, its first own row) of each tile of a head."""
    first = [0, *itertools.accumulate(lengths)]
    for s, n in enumerate(lengths):
        for i in range(-(-n // 64)):
            yield s, first[s] // 64 + s + i, max(min(64 * i, n - 64), 0), 64 * i


def inputs(lengths, K, mean=3.0):
    rows = sum(lengths) + BEYOND
    qkv, grad = random_qkv(rows, H, K, DTYPE), random_qkv(rows, H, K, DTYPE, 1)[:, 0].contiguous()
    qkv[:, 1:] += mean * random_qkv(1, H, K, DTYPE, 2)[:, 1:]
    qkv[-BEYOND:], grad[-BEYOND:] = float("nan"), float("nan")
    exact = torch.empty(rows, H, K, device=DEVICE)
    lse = torch.empty(H, rows, device=DEVICE)
    eager.forward(*(x.float() for x in qkv.unbind(1)), exact, None, lse, offsets(lengths), max(lengths), K**-0.5)
    out = exact.to(DTYPE)
    return qkv, grad, out, low_order.of(exact, out), lse


@pytest.mark.parametrize("longest", [None, 64, 1000])
@pytest.mark.parametrize("K", [64, 72])
@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_statistics_of_tiles(lengths, K, longest):
    """Each row is one tile's own, others are switched off. Whatever max_seqlen: a count left out would be waited on."""
    qkv, grad, out, low, lse = inputs(lengths, K)
    T, cu = len(qkv), offsets(lengths)
    tiles_of_head = T // 64 + len(lengths) + 1
    poison((H * tiles_of_head * 128,), dtype=torch.float32)
    sums = hopper_sums.begin(grad, qkv[:, 1], out, low, lse, cu, longest or max(lengths))
    assert sums.tiles_of_head == tiles_of_head
    statistics, added = sums.statistics.view(H, -1, 2, 64).cpu(), sums.added.view(H, -1).cpu()
    delta = (low_order.restored(out, low).double() * grad.double()).sum(-1).T.cpu()
    first = [0, *itertools.accumulate(lengths)]
    for s, number, begin, own in tiles(lengths):
        rows = torch.arange(begin, begin + 64)
        mine = (rows >= own) & (rows < lengths[s])
        at = first[s] + rows[mine]
        assert (added[:, number] == 0).all()
        assert torch.equal(statistics[:, number, 0][:, mine], lse.cpu()[:, at])
        assert_close([statistics[:, number, 1][:, mine]], [delta[:, at]], 1e-5)
        assert (statistics[:, number, 0][:, ~mine] == float("inf")).all()
        assert (statistics[:, number, 1][:, ~mine] == 0).all()
    for s, n in enumerate(lengths):
        if n:
            sample = torch.arange(64) * n // 64 + first[s]
            assert_close([sums.means[s].cpu()], [qkv[:, 1].cpu().double()[sample].mean(0)], 1e-5)


@pytest.mark.parametrize("longest", [None, 64])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "separate"])
@pytest.mark.parametrize("K", [64, 72])
@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_dq_from_sums(lengths, K, packed, longest):
    """Rows of dS do not add up to zero, by what the rounding of the output takes: that does not reach dq."""
    qkv, grad, out, low, lse = inputs(lengths, K)
    T, rows, scale = len(qkv), sum(lengths), K**-0.5
    sums = hopper_sums.begin(grad, qkv[:, 1], out, low, lse, offsets(lengths), longest or max(lengths))
    q, k, v, g = (x[:rows].double().cpu() for x in (*qkv.unbind(1), grad))
    exact = [torch.empty(rows, H, K, dtype=torch.float64) for _ in range(3)]
    eager.gradients(g, q, k, v, Segments(lengths), tuple(exact))
    rounded = (out[:rows].double().cpu() * g).sum(-1)
    first, parts = [0, *itertools.accumulate(lengths)], torch.full_like(sums.sums, float("nan")).cpu()
    parts, uncentred = parts.view(H, sums.tiles_of_head, 160, 32), torch.zeros_like(exact[0])
    for head in range(H):
        main, tail = lanes(head, K)
        for s, number, begin, own in tiles(lengths):
            segment = slice(first[s], first[s] + lengths[s])
            chosen = torch.arange(begin, min(begin + 64, lengths[s]))
            at = first[s] + chosen
            p = (q[at, head] @ k[segment, head].T * scale - lse[head, at].double().cpu()[:, None] / LOG2_E).exp()
            ds = p * (g[at, head] @ v[segment, head].T - rounded[at, head][:, None])
            ds[chosen < own] = 0.0
            of_lanes = torch.ones(lengths[s], 96, dtype=torch.float64)
            of_lanes[:, 8 : 8 + K] = k[segment, head]
            whole = torch.zeros(64, 96, dtype=torch.float64)
            whole[: len(chosen)] = ds @ of_lanes
            uncentred[at[chosen >= own], head] = whole[: len(chosen)][chosen >= own][:, 8 : 8 + K] * scale
            both = [in_register_order(whole[:, x + 8].float()) for x in (main, tail)]
            parts[head, number] = torch.cat(both)
    sums.sums.copy_(parts.view(-1, 32))
    dqkv = torch.full((T, 3, H, K) if packed else (3, T, H, K), float("nan"), dtype=DTYPE, device=DEVICE)
    dq, *others = dqkv.unbind(1 if packed else 0)
    sums.store(dq, scale)
    assert (dq[rows:] == 0).all() and all(x.isnan().all() for x in others)
    assert_close([dq[:rows].cpu()], [exact[0]], 2e-3)
    assert (uncentred - exact[0]).norm() > 4e-3 * exact[0].norm(), "they add up to zero: this shows nothing"
