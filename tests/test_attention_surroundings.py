"""Own attention kernels read nothing but a pack's rows and write nothing beside their results, in large packs too.

Inputs lie in memory that else holds NaN, rows of no segment among it; results between canaries.
"""

import itertools
from typing import NamedTuple

import pytest
import torch
from attention_inputs import CUDA, DEVICE, assert_close, loop, offsets, random_qkv, with_gradients

from siglip2_packed.ops.attention import kernels, low_order
from siglip2_packed.ops.attention.kernels import BACKWARD, FORWARD
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.base2 import LOG2_E
from siglip2_packed.ops.runtime.check import missing
from siglip2_packed.ops.runtime.choice import Card

H, BEYOND = 2, 150
DTYPE = torch.bfloat16 if CUDA else torch.float16  # the interpreter's bfloat16 products are wrong
MARGIN, CANARY = 1 << 18, 0x5A  # bytes: more than a tile of rows; a value


def among_nan(x):
    """A copy; whatever lies before and behind it is NaN, of bytes 127."""
    fill = float("nan") if x.is_floating_point() else 127
    flat = torch.full((x.numel() + 2 * MARGIN,), fill, dtype=x.dtype, device=x.device)
    return flat[MARGIN:-MARGIN].view(x.shape).copy_(x)


class Guarded(NamedTuple):
    """A result that holds NaN, or bytes 127, until it is written, and all the memory that it lies in."""

    x: torch.Tensor
    memory: torch.Tensor

    @classmethod
    def of(cls, shape, dtype):
        size = torch.empty(shape, dtype=dtype, device="meta").nbytes
        memory = torch.full((size + 2 * MARGIN,), CANARY, dtype=torch.uint8, device=DEVICE)
        x = memory[MARGIN:-MARGIN].view(dtype).view(shape)
        return cls(x.fill_(float("nan") if dtype.is_floating_point else 127), memory)

    @property
    def alone(self):
        return bool((self.memory[:MARGIN] == CANARY).all() and (self.memory[-MARGIN:] == CANARY).all())


class Results(NamedTuple):
    out: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    low: torch.Tensor
    lse: torch.Tensor
    """`[T, H]`"""


def run(launches, qkv, grad, lengths):
    """Forward, and backward of what it gave. Gradients lie with a gap between rows."""
    forward, backward = launches
    T, K, longest = len(qkv), qkv.shape[-1], max(lengths)
    cu, scale = among_nan(offsets(lengths)), K**-0.5
    q, k, v = among_nan(qkv).unbind(1)
    out, low, lse = Guarded.of((T, H, K), DTYPE), Guarded.of((T, H, K), torch.int8), Guarded.of((H, T), torch.float32)
    call = kernels.implementation("forward", forward), kernels.implementation("backward", backward)
    call[0](forward[1], q, k, v, out.x, low.x, lse.x, cu, longest, scale)
    kept = [among_nan(x) for x in (out.x, low.x, lse.x)]
    gradients = Guarded.of((T, 4, H, K), DTYPE)
    gap = gradients.x[:, 3].fill_(7.0)
    call[1](backward[1], among_nan(grad), q, k, v, *kept, *gradients.x.unbind(1)[:3], cu, longest, scale)
    assert all(x.alone for x in (out, low, lse, gradients)), "something was written beside a result"
    assert (gap == 7).all(), "something was written between the rows of the gradients"
    return Results(out.x, *gradients.x.unbind(1)[:3], low.x, lse.x.T)


def exactly(qkv, grad, lengths, block=2048):
    """`[out, dq, dk, dv, lse]` in float64, lse to base 2, so many queries at a time."""
    results, scale = [], qkv.shape[-1] ** -0.5
    rows = sum(lengths)
    for qkv_s, g in zip(qkv[:rows].split(lengths), grad[:rows].split(lengths)):
        q, k, v, g = (x.double().transpose(0, 1) for x in (*qkv_s.unbind(1), g))
        dk, dv, blocks = torch.zeros_like(k), torch.zeros_like(v), []
        for q_b, g_b in zip(q.split(block, 1), g.split(block, 1)):
            s = q_b @ k.mT * scale
            lse = s.logsumexp(-1, keepdim=True)
            p = s.sub_(lse).exp_()
            out = p @ v
            dv += p.mT @ g_b
            ds = (g_b @ v.mT).sub_((g_b * out).sum(-1, keepdim=True)).mul_(p).mul_(scale)
            dk += ds.mT @ q_b
            blocks.append((out, ds @ k, lse * LOG2_E))
        out, dq, lse = (torch.cat(x, 1) for x in zip(*blocks))
        results.append([x.transpose(0, 1) for x in (out, dq, dk, dv, lse)])
    return [torch.cat(x) for x in zip(*results)]


def test_what_is_exact():
    lengths = [17, 1, 40]
    qkv, grad = random_qkv(60, H, 72), random_qkv(60, H, 72, seed=1)[:, 0]
    *results, lse = exactly(qkv, grad, lengths, block=7)
    expected = with_gradients(lambda *x: loop(*x, lengths), qkv[:58].double().unbind(1), grad[:58])
    assert_close(results, expected, 1e-12)
    scores = torch.einsum("qhk,shk->qhs", *qkv[18:58].double().unbind(1)[:2]) * 72**-0.5
    torch.testing.assert_close(lse[18:, :, 0].exp2(), scores.exp().sum(-1))


def launches(kind, K, lengths):
    """Of forward and backward: `triton`, those of the rules; `hopper2`, with two warpgroups; `hopper2once`."""
    longest = max(lengths)
    if kind.startswith("hopper"):
        if not CUDA or torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs compute capability 9.0")
        if reason := missing(*FORWARD["hopper"]) or missing(*BACKWARD["hopper"]):
            pytest.skip(reason)
        forward = "hopper", int(kind[6])
        return [forward, ("hopper_one_pass", 2) if kind.endswith("once") else forward]
    card = choice.card(DEVICE) if CUDA else Card("cuda", 80, 108)
    T, S = sum(lengths), len(lengths)
    return [
        choice.attention_forward(card, DTYPE, T, H, K, longest)[-1],
        choice.attention_backward(card, DTYPE, T, S, H, K, longest)[-1],
    ]


def three_thousand(longest):
    lengths = [n for n in (0, 1, 5, 17, 63, 64, 65, 100, 128, 129, 144, 192, 200, 256) if n <= longest]
    chosen = torch.randint(len(lengths), (2999,), generator=torch.Generator().manual_seed(0))
    return [lengths[i] for i in chosen] + [longest]


SMALL = [[17, 40, 3], [5, 0, 64, 1], [70, 1, 33]]
LARGE = {
    "65536": [65536],
    "65536 among others": [300, 65536, 65],
    "3000 up to 256": three_thousand(256),
    "3000 up to 128": three_thousand(128),
    "3000 up to 64": three_thousand(64),
}
PACKS = [
    *[pytest.param("triton", lengths, id=f"triton-{lengths}") for lengths in SMALL],
    *[
        pytest.param(kind, lengths, id=f"{kind}-{name}", marks=pytest.mark.gpu)
        for kind, (name, lengths) in itertools.product(("triton", "hopper2", "hopper3", "hopper2once"), LARGE.items())
    ],
]


@pytest.mark.parametrize("K", [64, 72])
@pytest.mark.parametrize(("kind", "lengths"), PACKS)
def test_nothing_but_the_rows_of_a_pack_is_read_and_nothing_else_is_written(kind, lengths, K):
    """Values and gradients are right, row by row; then NaN in every second segment changes no bit of the others."""
    rows, how = sum(lengths), launches(kind, K, lengths)
    qkv, grad = random_qkv(rows + BEYOND, H, K, DTYPE), random_qkv(rows + BEYOND, H, K, DTYPE, 1)[:, 0].contiguous()
    qkv[:, 0] *= 3  # few keys count for a query: each that is left out shows
    qkv[rows:], grad[rows:] = float("nan"), float("nan")
    results = run(how, qkv, grad, lengths)
    *exact, lse = exactly(qkv, grad, lengths)
    assert all((x[rows:] == 0).all() for x in results[:4])
    assert results.lse[rows:].isnan().all() or (results.lse[rows:] == 0).all()
    bound = 1e-2 if CUDA else 2e-3
    assert_close([x[:rows] for x in results[:4]], exact, bound)
    torch.testing.assert_close(results.lse[:rows].double(), lse[..., 0], atol=1e-3, rtol=1e-4)
    for name, x, e in zip(Results._fields, results, exact):
        errors, sizes = ((y.flatten(1)).norm(dim=1) for y in (x[:rows].double() - e, e))
        far = errors > 5 * bound * (sizes + sizes.square().mean().sqrt())
        assert not far.any(), f"{name}: rows {far.nonzero()[:5, 0].tolist()} of {int(far.sum())} are off"
    assert_close([low_order.restored(results.out, results.low)[:rows]], exact[:1], bound)
    segments = [x for x in itertools.pairwise(itertools.accumulate(lengths, initial=0)) if x[0] < x[1]]
    for parity in (0, 1) if len(segments) > 1 else ():
        changed = torch.zeros(rows + BEYOND, dtype=torch.bool)
        for begin, end in segments[parity::2]:
            changed[begin:end] = True
        changed = changed.to(DEVICE)
        others = run(how, qkv.masked_fill(changed[:, None, None, None], float("nan")),
                     grad.masked_fill(changed[:, None, None], float("nan")), lengths)  # fmt: skip
        kept = ~changed
        kept[rows:] = False
        for name, x, y in zip(Results._fields, results, others):
            assert torch.equal(x[kept], y[kept]), f"{name}: NaN in other segments changes it"


@pytest.mark.parametrize("which", ["before", "behind", "gap"])
def test_what_is_written_beside_is_seen(monkeypatch, which):
    """One byte before a result or behind it; one lane between rows."""
    lengths = [5, 17]
    how, qkv, grad = launches("triton", 72, lengths), random_qkv(22, H, 72, DTYPE), random_qkv(22, H, 72, DTYPE)[:, 0]
    implementation = kernels.implementation

    def faulty(direction, launch):
        function = implementation(direction, launch)

        def call(how, *arguments):
            function(how, *arguments)
            if direction == "backward":
                dv = arguments[9]
                memory = dv.as_strided((dv.untyped_storage().nbytes() // 2,), (1,), 0)
                first = MARGIN // 2
                memory[{"before": first - 1, "behind": -first, "gap": first + 3 * H * 72}[which]] = 1.0

        return call

    monkeypatch.setattr(kernels, "implementation", faulty)
    with pytest.raises(AssertionError, match="between the rows" if which == "gap" else "beside a result"):
        run(how, qkv, grad, lengths)
