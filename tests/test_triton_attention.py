"""The Triton attention against a loop over segments in float64: values, gradients, and the contracts of packing.

Without a CUDA device the kernels run in Triton's interpreter (float32 and float16; its bfloat16 products are wrong).
"""

import functools
import itertools
import re
import sys

import pytest
import torch

import kernels_ref
from siglip2_packed.ops.triton.attention import (
    varlen_attention,
    varlen_attention_pool,
    varlen_attention_qkvpacked,
)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
EXACT = 5e-6  # float32 against float64
PACKS = [[1, 15, 16], [17, 40, 3]]  # in float32, one tile a segment up to 32 rows, loops beyond
LONG = [[65, 1, 3], [200, 1, 17]]


def offsets(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def random_qkv(rows, H, K, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, H, K, generator=generator).to(DEVICE, dtype)


def loop(q, k, v, lengths, scale=None):
    """One segment after another in float64; rows beyond the last segment are zeros."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    for q_s, k_s, v_s in zip(*(x[: sum(lengths)].double().split(lengths) for x in (q, k, v))):
        weights = torch.softmax(torch.einsum("qhk,shk->hqs", q_s, k_s) * scale, -1)
        outputs.append(torch.einsum("hqs,shk->qhk", weights, v_s))
    return torch.cat([*outputs, q[sum(lengths) :].double() * 0])


def pool_loop(q, k, v, lengths):
    outputs = []
    for k_s, v_s in zip(*(x[: sum(lengths)].double().split(lengths) for x in (k, v))):
        weights = torch.softmax(torch.einsum("hk,shk->hs", q.double(), k_s) * q.shape[-1] ** -0.5, -1)
        outputs.append(torch.einsum("hs,shk->hk", weights, v_s))
    return torch.stack(outputs)


def with_gradients(function, inputs, grad):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def assert_close(actual, expected, bound):
    for name, a, e in zip(("out", "dq", "dk", "dv")[: len(actual)], actual, expected, strict=True):
        assert a.shape == e.shape
        error = (a.double() - e.double()).norm() / e.double().norm()
        assert error <= bound, f"{name}: relative error {error:.2e} > {bound:.2e}"  # NaN fails


def assert_as_good_as_torch(actual, expected, inputs, grad, lengths):
    """At most twice the error of the same loop in torch in the same dtype, for each of out, dq, dk, dv."""
    for begin, end in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
        if begin == end:
            continue
        plain = with_gradients(
            lambda q, k, v: ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v,
            [x[begin:end].transpose(0, 1) for x in inputs],
            grad[begin:end].transpose(0, 1),
        )
        for name, ours, theirs, e in zip(("out", "dq", "dk", "dv"), actual, plain, expected, strict=True):
            e = e[begin:end]
            error = (ours[begin:end] - e).norm() / e.norm()
            bound = 2 * (theirs.transpose(0, 1) - e).norm() / e.norm() + 1e-3
            if end - begin > 1 or name in ("out", "dv"):  # dq and dk of one row are zero
                assert error <= bound, f"{name} of {end - begin} rows: {error:.2e} > {bound:.2e}"


def poison(*shapes, dtype):
    """Leaves NaN in the memory that the next allocations get."""
    if CUDA:
        tensors = [torch.full(shape, float("nan"), dtype=dtype, device=DEVICE) for shape in shapes for _ in range(8)]
        del tensors


@pytest.mark.parametrize(
    ("lengths", "K"), [*itertools.product(PACKS, [64, 72, 80, 128]), ([17, 63, 64], 64), *((x, 72) for x in LONG)]
)
def test_values_and_gradients(lengths, K):
    qkv, grad = random_qkv(sum(lengths), 2, K), random_qkv(sum(lengths), 2, K, seed=1)[:, 0]
    cu, longest = offsets(lengths), max(lengths)
    poison(qkv.shape, grad.shape, dtype=qkv.dtype)
    actual = with_gradients(lambda *x: varlen_attention(*x, cu, longest), qkv.unbind(1), grad)
    assert_close(actual, with_gradients(lambda *x: loop(*x, lengths), qkv.unbind(1), grad), EXACT)
    out, dqkv = with_gradients(lambda x: varlen_attention_qkvpacked(x, cu, longest), [qkv], grad)
    for packed, separate in zip([out, *dqkv.unbind(1)], actual, strict=True):
        assert torch.equal(packed, separate)


@pytest.mark.parametrize("lengths", [[64, 17, 1], [100, 65, 3]], ids=str)
def test_half_precision_tiles(lengths):
    """float16 takes other kernels and tiles than float32: one tile a segment, up to 64 and up to 128 rows."""
    qkv, grad = random_qkv(sum(lengths), 2, 72, torch.float16), random_qkv(sum(lengths), 2, 72, torch.float16, 1)[:, 0]
    actual = with_gradients(lambda *x: varlen_attention(*x, offsets(lengths), max(lengths)), qkv.unbind(1), grad)
    assert_close(actual, with_gradients(lambda *x: loop(*x, lengths), qkv.unbind(1), grad), 2e-3)


@pytest.mark.parametrize("K", [8, 24, 40, 56, 88, 96, 120])
def test_other_head_dims(K):
    lengths = [5, 33, 9]
    qkv, grad = random_qkv(47, 2, K), random_qkv(47, 2, K, seed=1)[:, 0]
    actual = with_gradients(lambda *x: varlen_attention(*x, offsets(lengths), 33), qkv.unbind(1), grad)
    assert_close(actual, with_gradients(lambda *x: loop(*x, lengths), qkv.unbind(1), grad), EXACT)


def test_strides():
    """Views of any layout: heads first, a gap between rows, strides that are no multiple of 8, an expanded gradient."""
    lengths, H, K = [9, 7, 24], 2, 72
    q = random_qkv(40, H, K)[:, 0].transpose(0, 1).contiguous().transpose(0, 1)
    k = random_qkv(40, H, K + 8, seed=1)[:, 1, :, :K]
    v = random_qkv(40, H, K + 3, seed=2)[:, 1, :, 3:]
    for grad in (random_qkv(40, H, K, seed=3)[:, 2], torch.ones(1, 1, 1, device=DEVICE).expand(40, H, K)):
        actual = with_gradients(lambda *x: varlen_attention(*x, offsets(lengths), 24), (q, k, v), grad)
        assert_close(actual, with_gradients(lambda *x: loop(*x, lengths), (q, k, v), grad), EXACT)


@pytest.mark.parametrize("max_seqlen", [30, 40])
def test_softmax_scale_is_that_of_the_true_head_dim(max_seqlen):
    """A scale of 80 ** -0.5 or 128 ** -0.5 would move the result by far more than the bound."""
    qkv = 3 * random_qkv(30, 2, 72)
    cu = offsets([30])
    default = varlen_attention(*qkv.unbind(1), cu, max_seqlen)
    assert torch.equal(default, varlen_attention(*qkv.unbind(1), cu, max_seqlen, softmax_scale=72**-0.5))
    assert_close([default], [loop(*qkv.unbind(1), [30], 72**-0.5)], EXACT)
    assert_close([varlen_attention(*qkv.unbind(1), cu, max_seqlen, 0.3)], [loop(*qkv.unbind(1), [30], 0.3)], EXACT)


@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_isolation(lengths):
    """Noise, then NaN, in one segment changes no bit of the others, forward and backward."""
    qkv, grad = random_qkv(sum(lengths), 2, 72), random_qkv(sum(lengths), 2, 72, seed=1)[:, 0]
    cu, longest = offsets(lengths), max(lengths)

    def run(x):
        return with_gradients(lambda x: varlen_attention_qkvpacked(x, cu, longest), [x], grad)

    expected = run(qkv)
    begin, end = cu[1].item(), cu[2].item()
    for noise in (random_qkv(end - begin, 2, 72, seed=2) * 100, float("nan")):
        changed = qkv.clone()
        changed[begin:end] = noise
        for actual, unchanged in zip(run(changed), expected, strict=True):
            assert torch.equal(actual[:begin], unchanged[:begin])
            assert torch.equal(actual[end:], unchanged[end:])


def test_every_key_counts():
    """No causal mask: the last row moves the first."""
    qkv = random_qkv(70, 1, 64)
    changed = qkv.clone()
    changed[-1] += 1
    before, after = (varlen_attention_qkvpacked(x, offsets([70]), 70) for x in (qkv, changed))
    assert (before != after).flatten(1).any(1).all()


@pytest.mark.parametrize("lengths", PACKS, ids=str)
@pytest.mark.parametrize("tail", [2, 70])
def test_rows_beyond_the_last_segment(lengths, tail):
    """They may hold NaN: their outputs and gradients are zeros, and no other row notices."""
    rows = sum(lengths)
    qkv, grad = random_qkv(rows + tail, 2, 72), random_qkv(rows + tail, 2, 72, seed=1)[:, 0].contiguous()
    qkv[rows:], grad[rows:] = float("nan"), float("nan")
    cu, longest = offsets(lengths), max(lengths)
    poison(qkv.shape, grad.shape, dtype=qkv.dtype)
    padded = with_gradients(lambda *x: varlen_attention(*x, cu, longest), qkv.unbind(1), grad)
    exact = with_gradients(lambda *x: varlen_attention(*x, cu, longest), qkv[:rows].unbind(1), grad[:rows])
    for actual, expected in zip(padded, exact, strict=True):
        assert torch.equal(actual[:rows], expected)
        assert (actual[rows:] == 0).all()


@pytest.mark.parametrize("rows", [0, 5])
def test_no_segments(rows):
    """`cu_seqlens = [0]`, with and without rows; a pack whose segments are empty; all attached to the graph."""
    for cu in (offsets([]), offsets([0, 0])):
        qkv = random_qkv(rows, 2, 72)
        grad = torch.ones(rows, 2, 72, device=DEVICE)
        out, dqkv = with_gradients(lambda x: varlen_attention_qkvpacked(x, cu, 0), [qkv], grad)
        assert out.shape == (rows, 2, 72) and dqkv.shape == qkv.shape
        assert (out == 0).all() and (dqkv == 0).all()
        out, *gradients = with_gradients(lambda *x: varlen_attention(*x, cu, 0), qkv.unbind(1), grad)
        assert all((x == 0).all() for x in (out, *gradients))
        k, v = qkv[:, 1], qkv[:, 2]
        out, dq, dk, dv = with_gradients(
            lambda *x: varlen_attention_pool(*x, cu, 0),
            [torch.ones_like(qkv[0, 0]) if rows else torch.ones(2, 72, device=DEVICE), k, v],
            torch.ones(cu.numel() - 1, 2, 72, device=DEVICE),
        )
        assert out.shape == (cu.numel() - 1, 2, 72)
        assert all((x == 0).all() for x in (out, dq, dk, dv))


def test_one_patch():
    """Softmax over one key: the output is v, and only v has a gradient."""
    qkv, grad = random_qkv(1, 2, 72), random_qkv(1, 2, 72, seed=1)[:, 0]
    out, dq, dk, dv = with_gradients(lambda *x: varlen_attention(*x, offsets([1]), 1), qkv.unbind(1), grad)
    assert torch.allclose(out, qkv[:, 2]) and torch.allclose(dv, grad)
    assert dq.abs().max() < 1e-5 and dk.abs().max() < 1e-5


@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_deterministic(lengths):
    qkv, grad = random_qkv(sum(lengths), 2, 72), random_qkv(sum(lengths), 2, 72, seed=1)[:, 0]
    cu = offsets(lengths)

    def run():
        return with_gradients(
            lambda *x: varlen_attention(*x, cu, max(lengths), deterministic=True), qkv.unbind(1), grad
        )

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("K", [64, 72])
def test_a_generous_max_seqlen_changes_nothing(K):
    lengths = [5, 30, 17]
    qkv, grad = random_qkv(52, 2, K), random_qkv(52, 2, K, seed=1)[:, 0]
    results = [
        with_gradients(lambda *x: varlen_attention(*x, offsets(lengths), longest), qkv.unbind(1), grad)
        for longest in (30, 100)
    ]
    assert_close(*results, EXACT)


@pytest.mark.parametrize("K", [64, 72])
def test_pool(K):
    lengths = [1, 15, 200, 33]
    rows, H = sum(lengths), 2
    kv = random_qkv(rows + 4, H, K)[:, 1:]
    kv[rows:] = float("nan")
    q, grad = random_qkv(1, H, K, seed=1)[0, 0], random_qkv(4, H, K, seed=2)[:, 0]
    cu = offsets(lengths)
    poison(kv.shape, dtype=kv.dtype)
    actual = with_gradients(lambda *x: varlen_attention_pool(*x, cu, 200), (q, *kv.unbind(1)), grad)
    expected = with_gradients(lambda *x: pool_loop(*x, lengths), (q, *kv.nan_to_num().unbind(1)), grad)
    assert_close(actual, expected, EXACT)
    assert (actual[2][rows:] == 0).all() and (actual[3][rows:] == 0).all()


@pytest.mark.parametrize(("change", "message"), [
    (dict(q=torch.zeros(9, 2, 64, device=DEVICE)), r"shape of q, \[9, 2, 64\], got \[10, 2, 64\]"),
    (dict(k=torch.zeros(10, 2, 64, device=DEVICE, dtype=torch.float16)), "k is torch.float16"),
    (dict(q=torch.zeros(10, 128, device=DEVICE)), r"q must be \[T, H, K\], got \[10, 128\]"),
    (dict(v=torch.zeros(10, 64, 2, device=DEVICE).mT), "last dimension must be contiguous, got stride 2"),
    (dict(cu_seqlens=torch.tensor([0, 10], device=DEVICE)), r"\[S\+1\] int32, got \[2\] torch.int64"),
    (dict(cu_seqlens=torch.tensor([0, 10], dtype=torch.int32, device="meta")), "cu_seqlens is on meta"),
    (dict(max_seqlen=torch.tensor(10)), "Python int, got Tensor"),
    (dict(max_seqlen=10.0), "Python int, got float"),
    (dict(softmax_scale=0.0), "softmax_scale must be positive, got 0.0"),
    *[(dict.fromkeys("qkv", torch.zeros(10, 2, K, device=DEVICE)), f"8 to 128, got {K}") for K in (60, 136)],
    (dict.fromkeys("qkv", torch.zeros(10, 2, 64, device=DEVICE, dtype=torch.float64)), "got torch.float64"),
])  # fmt: skip
def test_errors(change, message):
    tensors = dict.fromkeys("qkv", torch.zeros(10, 2, 64, device=DEVICE))
    arguments = tensors | {"cu_seqlens": offsets([10]), "max_seqlen": 10, "softmax_scale": None} | change
    with pytest.raises(ValueError, match=message):
        varlen_attention(**arguments)


def test_operators_are_well_formed():
    qkv, cu = random_qkv(40, 2, 72), offsets([17, 23])
    ops = torch.ops.siglip2_packed
    torch.library.opcheck(ops.varlen_attention.default, (*qkv.requires_grad_().unbind(1), cu, 23, 0.1))
    torch.library.opcheck(ops.varlen_attention_qkvpacked.default, (qkv.detach().requires_grad_(), cu, 23, 0.1))
    q = random_qkv(1, 2, 72)[0, 0].requires_grad_()
    torch.library.opcheck(ops.varlen_attention_pool.default, (q, *qkv.detach().unbind(1)[1:], cu, 0.1))


def test_compile_without_graph_breaks_or_recompiles():
    """Two packs of different T, S and max_seqlen run one compiled graph."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    torch._dynamo.reset()
    step = torch.compile(
        varlen_attention_qkvpacked, backend=backend if not CUDA else "inductor", fullgraph=True, dynamic=True
    )
    for lengths in ([17, 23, 2], [40, 9], [5, 6, 7, 31]):
        qkv, grad = random_qkv(sum(lengths), 2, 72), random_qkv(sum(lengths), 2, 72, seed=1)[:, 0]
        cu, longest = offsets(lengths), max(lengths)
        eager = with_gradients(lambda x: varlen_attention_qkvpacked(x, cu, longest), [qkv], grad)
        for actual, expected in zip(with_gradients(lambda x: step(x, cu, longest), [qkv], grad), eager, strict=True):
            assert torch.equal(actual, expected)
    assert len(compiled) == (0 if CUDA else 1)


def test_checkpointing():
    """Full recomputation, and selective checkpointing that saves the attention by its operator."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    lengths = [17, 23, 2]
    qkv, grad = random_qkv(42, 2, 72), random_qkv(42, 2, 72, seed=1)[:, 0]
    cu = offsets(lengths)
    calls = []

    def policy(context, op, *args, **kwargs):
        ours = op is torch.ops.siglip2_packed.varlen_attention_qkvpacked.default
        calls.append(ours)
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    def layer(x):
        return varlen_attention_qkvpacked(x.sin(), cu, 23).cos()

    expected = with_gradients(layer, [qkv], grad)
    for options in ({}, {"context_fn": lambda: create_selective_checkpoint_contexts(policy)}):
        actual = with_gradients(lambda x: checkpoint(layer, x, use_reentrant=False, **options), [qkv], grad)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert any(calls)


GPU_PACKS = [[64] * 20, [1, 15, 16, 17, 63, 64], [128, 100, 1, 65], [144, 192, 1, 63, 129, 16, 65], [144] * 60,
              [256, 252, 1, 15, 16, 17, 63, 65, 200], [1024, 1000, 256, 64], [35, 0, 577, 129, 0, 1]]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("K", [64, 72, 80, 128])
@pytest.mark.parametrize("lengths", GPU_PACKS, ids=lambda x: f"{max(x)}x{len(x)}")
def test_half_precision_against_torch(lengths, K, dtype):
    rows, H = sum(lengths), 16
    qkv, grad = random_qkv(rows + 3, H, K, dtype), random_qkv(rows + 3, H, K, dtype, 1)[:, 0]
    qkv[rows:] = float("nan")
    cu, longest = offsets(lengths), max(lengths)
    poison(qkv.shape, grad.shape, dtype=dtype)
    actual = with_gradients(lambda *x: varlen_attention(*x, cu, longest), qkv.unbind(1), grad)
    assert all((x[rows:] == 0).all() for x in actual)
    exact = with_gradients(lambda *x: loop(*x, lengths), qkv[:rows].double().unbind(1), grad[:rows].double())
    assert_as_good_as_torch(actual, exact, qkv.unbind(1), grad, lengths)


@pytest.mark.gpu
def test_pool_half_precision():
    lengths = [256, 252, 1, 1024, 17]
    kv = random_qkv(sum(lengths), 16, 72, torch.bfloat16)[:, 1:]
    q, grad = random_qkv(1, 16, 72, torch.bfloat16, 1)[0, 0], random_qkv(5, 16, 72, torch.bfloat16, 2)[:, 0]
    poison(kv.shape, dtype=kv.dtype)
    actual = with_gradients(lambda *x: varlen_attention_pool(*x, offsets(lengths), 1024), (q, *kv.unbind(1)), grad)
    expected = with_gradients(lambda *x: pool_loop(*x, lengths), (q, *kv.unbind(1)), grad)
    assert_close(actual, expected, 6e-3)


@pytest.mark.gpu
def test_offsets_beyond_32_bits(monkeypatch):
    """T * 3 * H * K > 2**31: the last segment equals the same rows alone, which the same kernels compute here."""
    monkeypatch.setattr("siglip2_packed.ops.triton.attention.few_rows", lambda *_: False)
    lengths = [256] * 2560
    qkv = torch.empty(sum(lengths), 3, 16, 72, dtype=torch.bfloat16, device=DEVICE).normal_()
    grad = torch.empty(sum(lengths), 16, 72, dtype=torch.bfloat16, device=DEVICE).normal_()
    assert qkv.numel() > 2**31
    cu = offsets(lengths)
    whole = with_gradients(lambda x: varlen_attention_qkvpacked(x, cu, 256), [qkv], grad)
    for rows in (slice(256), slice(-256, None)):
        alone = with_gradients(lambda x: varlen_attention_qkvpacked(x, offsets([256]), 256), [qkv[rows]], grad[rows])
        assert all(torch.equal(w[rows], a) for w, a in zip(whole, alone, strict=True))


@pytest.mark.gpu
def test_no_synchronisation():
    qkv, cu = random_qkv(600, 16, 72, torch.bfloat16).requires_grad_(), offsets([256, 300, 44])
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            varlen_attention_qkvpacked(qkv, cu, 300).backward(torch.ones(600, 16, 72, dtype=qkv.dtype, device=DEVICE))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("lengths", "dtype"), [([5, 17], torch.float32), ([41], torch.float32), ([41, 5], torch.float16)]
)
def test_rows_that_are_not_there_stay_out_of_gradients(lengths, dtype):
    """Every real score far below zero: a missing mask lets exp2(0 - lse) of absent rows overflow."""
    rows = sum(lengths)
    noise = random_qkv(rows, 2, 72)
    q, k, v = (x.to(dtype) for x in (30 + noise[:, 0], noise[:, 1] - 6, noise[:, 2]))
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = varlen_attention(*inputs, offsets(lengths), max(lengths))
    assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.sum(), inputs)))


@pytest.fixture
def hopper(monkeypatch):
    """The Hopper forward, for small packs too."""
    try:
        from siglip2_packed.ops.triton import attention, attention_hopper
    except Exception as error:  # an older or a newer Gluon
        pytest.skip(f"no Gluon as the Hopper forward needs it: {error}")
    monkeypatch.setattr(attention, "few_rows", lambda *_: False)
    return attention_hopper


def test_where_the_hopper_forward_fits(hopper):
    def warpgroups(max_seqlen, K=72, dtype=torch.bfloat16, make=lambda qkv: qkv.unbind(1)):
        return hopper.warpgroups(*make(torch.zeros(40, 3, 2, K, dtype=dtype)), max_seqlen)

    assert [warpgroups(n) for n in (0, 64, 65, 128, 129, 192, 193, 256, 4096)] == [0, 0, 2, 2, 3, 3, 2, 2, 2]
    assert warpgroups(256, 64, torch.float16) == 2
    assert warpgroups(256, 80) == warpgroups(256, 128) == warpgroups(256, dtype=torch.float32) == 0
    shifted = torch.zeros(40 * 3 * 2 * 72 + 4, dtype=torch.bfloat16)[4:].view(40, 3, 2, 72)
    assert warpgroups(256, make=lambda _: shifted.unbind(1)) == 0  # 8 bytes beyond a multiple of 16
    assert warpgroups(256, make=lambda qkv: [x[:1].expand(40, 2, 72) for x in qkv.unbind(1)]) == 0


def test_triton_runs_where_gluon_cannot_be_had(monkeypatch, caplog):
    from siglip2_packed.ops.triton import attention

    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
    monkeypatch.delitem(sys.modules, "siglip2_packed.ops.triton.attention_hopper", raising=False)
    monkeypatch.setattr(attention, "capability", lambda x: 90)
    monkeypatch.setattr(attention, "few_rows", lambda *_: False)
    monkeypatch.setattr(attention, "hopper_kernels", functools.cache(attention.hopper_kernels.__wrapped__))
    qkv = random_qkv(40, 2, 72)
    for _ in range(2):
        actual = varlen_attention_qkvpacked(qkv, offsets([17, 23]), 70)
        assert_close([actual], [loop(*qkv.unbind(1), [17, 23])], EXACT)
    assert [record.getMessage().startswith("no attention_hopper with") for record in caplog.records] == [True]


@pytest.mark.parametrize("outcome", ["does not compile", "is wrong", "is NaN"])
def test_a_hopper_forward_that_fails_its_check_is_refused(hopper, monkeypatch, caplog, outcome):
    """Once, by name and with the reason; it is never launched."""

    def attempt(*arguments):
        if outcome == "does not compile":
            raise RuntimeError("no such layout")
        return "kernel", 0.5 if outcome == "is wrong" else float("nan")

    monkeypatch.setattr(hopper, "_try", attempt)
    monkeypatch.setattr(hopper, "_kernels", {})
    monkeypatch.setattr(hopper, "_launch", lambda *_: pytest.fail("launched"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    q, k, v = random_qkv(70, 2, 72, torch.float16).unbind(1)
    for _ in range(2):
        assert not hopper.forward(q, k, v, torch.empty_like(q), q.new_empty(2, 70), offsets([70]), 70, 0.1)
    reason = {"does not compile": "no such layout", "is wrong": "5.0e-01", "is NaN": "nan"}[outcome]
    assert len(caplog.records) == 1 and reason in caplog.text and "2 heads of 72" in caplog.text


@pytest.fixture
def hopper_backward(hopper):
    from siglip2_packed.ops.triton import attention_hopper_backward

    return attention_hopper_backward


def test_overlapping_launches_have_their_own_counters(hopper, hopper_backward, monkeypatch):
    """Of the forward and of the backward, eager or captured in a graph, until graphs have taken all."""
    from siglip2_packed.ops.triton import hopper as shared

    q, k, v = random_qkv(130, 2, 72, torch.float16).unbind(1)
    (dq, dk, dv), (lse, delta) = torch.empty(130, 3, 2, 72, dtype=q.dtype).unbind(1), torch.empty(2, 2, 130)
    cu, out, slots = offsets([130]), torch.empty_like(q), {False: [], True: []}
    calls = {
        hopper: lambda: hopper.forward(q, k, v, out, lse, cu, 130, 0.1),
        hopper_backward: lambda: hopper_backward.backward(out, q, k, v, out, lse, delta, dq, dk, dv, cu, 130, 0.1),
    }
    for module in calls:
        monkeypatch.setattr(module, "_checked", lambda *_: "kernel")
        monkeypatch.setattr(module, "_kernels", {})
        monkeypatch.setattr(module, "_launch", lambda *arguments: slots[capturing].append(arguments[-1]))
    for turn, capturing in enumerate((True, False, True, False, True)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        assert [call() for call in calls.values()] == [turn > 0] * 2  # nothing is compiled during capture
    assert len({*slots[False], *slots[True]}) == 8
    assert max(slots[False]) < shared.EAGER <= min(slots[True])
    monkeypatch.setattr(shared, "_captured", itertools.count(shared.COUNTERS - shared.EAGER))
    assert not any(call() for call in calls.values()) and len(slots[True]) == 4


def test_where_the_hopper_backward_fits(hopper_backward):
    def warpgroups(max_seqlen=256, K=72, dtype=torch.bfloat16, segments=3, packed=True, **changes):
        tensors = {
            name: torch.zeros(40, 2, K, dtype=dtype) for name in ("grad", "q", "k", "v", "out", "dq", "dk", "dv")
        }
        if packed:
            tensors |= zip(("dq", "dk", "dv"), torch.zeros(40, 3, 2, K, dtype=dtype).unbind(1))
        tensors |= {"lse": torch.zeros(2, 40), "delta": torch.zeros(2, 40)} | changes
        inputs = [tensors[name] for name in ("grad", "q", "k", "v", "out")]
        results = [tensors[name] for name in ("lse", "delta", "dq", "dk", "dv")]
        return hopper_backward.warpgroups(inputs, results, torch.zeros(1).expand(segments + 1), max_seqlen)

    assert [warpgroups(n) for n in (0, 64, 128, 129, 192, 193, 256, 4096)] == [0, 0, 0, 3, 3, 2, 2, 2]
    assert warpgroups(K=64, dtype=torch.float16) == warpgroups(packed=False) == 2
    assert warpgroups(K=80) == warpgroups(K=128) == warpgroups(dtype=torch.float32) == 0
    flat = torch.zeros(40 * 2 * 72 + 4, dtype=torch.bfloat16)
    for name in ("grad", "q", "out", "dk"):
        assert warpgroups(packed=False, **{name: flat[4:].view(40, 2, 72)}) == 0  # 8 bytes beyond a multiple of 16
    assert warpgroups(lse=torch.zeros(81)[1:].view(2, 40)) == 0
    assert warpgroups(grad=flat[:72].expand(40, 2, 72)) == 0
    for name in ("grad", "v", "out"):
        assert warpgroups(**{name: torch.zeros(40, 2, 72)}) == 0  # float32
    assert warpgroups(grad=flat[: 40 * 144].view(2, 40, 72).transpose(0, 1)) == 2
    assert warpgroups(dq=flat[: 40 * 144].view(2, 40, 72).transpose(0, 1), packed=False) == 0  # no such kernel
    for row in (72, 148):  # rows that overlap, rows that begin at a multiple of 8 bytes only
        same = {name: torch.zeros(40 * row + 72, dtype=torch.bfloat16).as_strided((40, 2, 72), (row, 72, 1))
                for name in ("dq", "dk", "dv")}  # fmt: skip
        assert warpgroups(**same) == 0
    assert warpgroups(segments=10**6, max_seqlen=10**5) == warpgroups(max_seqlen=2**30) == 2
    assert warpgroups(segments=2**30) == 0  # beyond 32 bits


@pytest.mark.parametrize("outcome", ["cannot be imported", "does not compile", "is wrong", "is NaN"])
def test_triton_runs_where_the_hopper_backward_fails(hopper_backward, monkeypatch, caplog, outcome):
    """The reason is logged once; the gradients are Triton's, and the kernels are never launched."""
    from siglip2_packed.ops.triton import attention

    def attempt(*arguments):
        if outcome == "does not compile":
            raise RuntimeError("no such layout")
        return "kernels", 0.5 if outcome == "is wrong" else float("nan")

    qkv, grad = random_qkv(22, 1, 72, torch.float16), random_qkv(22, 1, 72, torch.float16, 1)[:, 0]
    plain = with_gradients(lambda x: varlen_attention_qkvpacked(x, offsets([5, 17]), 130), [qkv], grad)[1]
    if outcome == "cannot be imported":
        monkeypatch.setitem(sys.modules, "siglip2_packed.ops.triton.attention_hopper_backward", None)
    monkeypatch.setattr(attention, "hopper_kernels", functools.cache(attention.hopper_kernels.__wrapped__))
    monkeypatch.setattr(hopper_backward, "_try", attempt)
    monkeypatch.setattr(hopper_backward, "_kernels", {})
    monkeypatch.setattr(hopper_backward, "_launch", lambda *_: pytest.fail("launched"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(2):
        x = qkv.detach().requires_grad_()
        out = varlen_attention_qkvpacked(x, offsets([5, 17]), 130)
        with monkeypatch.context() as context:
            context.setattr(attention, "capability", lambda x: 90)
            actual = torch.autograd.grad(out, x, grad)[0]
        assert_close([actual], [plain], 1e-3)
        assert_close(actual.unbind(1), with_gradients(lambda *x: loop(*x, [5, 17]), qkv.unbind(1), grad)[1:], 2e-3)
    reason = {"does not compile": "no such layout", "is wrong": "5.0e-01", "is NaN": "nan"}.get(outcome, "Triton")
    (message,) = [x.getMessage() for x in caplog.records if x.name == "siglip2_packed"]
    assert re.match("no (Hopper attention backward for 1 heads of 72|attention_hopper_backward)", message)
    assert reason in message


def test_the_hopper_backward_gets_the_tensors_as_they_are(hopper_backward, monkeypatch):
    """Views of the projection and of its gradient, no copies; nothing is compiled while a graph is captured."""
    from siglip2_packed.ops.triton import attention

    launches, checks = [], []
    monkeypatch.setattr(hopper_backward, "_checked", lambda *key: checks.append(key) or "kernels")
    monkeypatch.setattr(hopper_backward, "_kernels", {})
    monkeypatch.setattr(hopper_backward, "_launch", lambda *arguments: launches.append(arguments))
    qkv, grad = random_qkv(57, 2, 72, torch.float16), random_qkv(57, 2, 72, torch.float16, 1)[:, 0]
    dqkv = torch.empty_like(qkv)
    (q, k, v), (dq, dk, dv) = qkv.unbind(1), dqkv.unbind(1)
    out, lse = attention.forward(q, k, v, offsets([17, 40]), 130, 0.1)
    monkeypatch.setattr(attention, "capability", lambda x: 90)
    for capturing in (True, False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        attention._backward(grad, q, k, v, out, lse, dq, dk, dv, offsets([17, 40]), 130, 0.1)
        attention._backward(grad, q, k, v, out, lse, dq, dk, dv, offsets([17, 40]), 128, 0.1)  # Triton's
    assert checks == [(q.device, q.dtype, 2, 72, 3 * 2 * 72, 3)]
    assert len(launches) == 2
    kernels, WGS, *tensors, _, max_seqlen, scale, _ = launches[0]
    assert (kernels, WGS, max_seqlen, scale) == ("kernels", 3, 130, 0.1)
    for x, y in zip(tensors, (grad, q, k, v, out, lse, None, dq, dk, dv), strict=True):
        assert y is None or (x.data_ptr() == y.data_ptr() and x.stride() == y.stride())
    delta = tensors[6]
    assert delta.shape == lse.shape and delta.is_contiguous() and delta.dtype == lse.dtype == torch.float32


def count_launches(module, monkeypatch):
    if not CUDA or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    launches = []
    launch = module._launch
    monkeypatch.setattr(module, "_launch", lambda *arguments: (launches.append(arguments[1]), launch(*arguments)))
    return launches


@pytest.fixture
def on_hopper(hopper, monkeypatch):
    """Counts the launches of the Hopper forward."""
    return count_launches(hopper, monkeypatch)


@pytest.fixture
def backward_on_hopper(hopper_backward, monkeypatch):
    """Counts the launches of the Hopper backward."""
    return count_launches(hopper_backward, monkeypatch)


HOPPER_PACKS = [[100, 0, 128, 1, 65], [144, 192, 1, 63, 129], [256, 64, 1, 577, 0, 129, 1024, 63], [252] * 40]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("K", [64, 72])
@pytest.mark.parametrize("lengths", HOPPER_PACKS, ids=lambda x: f"{max(x)}x{len(x)}")
def test_hopper_forward(on_hopper, lengths, K, dtype):
    """It runs; NaN in other segments, repeated last offsets, rows beyond and a generous max_seqlen change no bit."""
    rows, H, longest = sum(lengths), 3, max(lengths)
    qkv = random_qkv(rows + 150, H, K, dtype)
    cu = offsets(lengths)
    varlen_attention_qkvpacked(qkv[:rows], cu, longest)  # compiled, checked
    on_hopper.clear()
    poison((rows + 150, H, K), dtype=dtype)
    expected = varlen_attention_qkvpacked(qkv[:rows], cu, longest)
    assert_close([expected], [loop(*qkv[:rows].unbind(1), lengths)], 5e-3 if dtype == torch.bfloat16 else 1e-3)
    assert torch.equal(expected, varlen_attention(*(x.contiguous() for x in qkv[:rows].unbind(1)), cu, longest))
    changed = qkv.clone()
    changed[rows:] = float("nan")
    for first, last in list(itertools.pairwise(cu.tolist()))[1::2]:
        changed[first:last] = float("nan")
    padded = torch.cat([cu, cu[-1:].expand(300)])
    poison((rows + 150, H, K), dtype=dtype)
    actual = varlen_attention_qkvpacked(changed, padded, longest)
    assert (actual[rows:] == 0).all()
    for first, last in list(itertools.pairwise(cu.tolist()))[::2]:
        assert torch.equal(actual[first:last], expected[first:last])
    assert len(on_hopper) == 3
    generous = varlen_attention_qkvpacked(qkv[:rows], cu, 3000)
    assert_close([generous], [expected], 1e-6)


@pytest.mark.gpu
def test_hopper_forward_in_a_cuda_graph(on_hopper):
    """Replays follow the contents of the inputs, lengths included, beside eager launches on another stream."""
    qkv, cu = random_qkv(1200, 16, 72, torch.bfloat16), offsets([256, 300, 44, 500, 0])
    varlen_attention_qkvpacked(qkv, cu, 600)  # compiled, checked
    on_hopper.clear()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        outputs = [varlen_attention_qkvpacked(qkv, cu, 600) for _ in range(3)]
    assert len(on_hopper) == 3
    other = random_qkv(4096, 16, 72, torch.bfloat16, 1)
    expected_other = varlen_attention_qkvpacked(other, offsets([1024] * 4), 1024)
    for lengths in ([256, 300, 44, 500, 0], [600, 1, 2, 3, 594], [7, 0, 0, 0, 0]):
        cu.copy_(offsets(lengths))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            others = [varlen_attention_qkvpacked(other, offsets([1024] * 4), 1024) for _ in range(5)]
        graph.replay()
        torch.cuda.current_stream().wait_stream(stream)
        for output in outputs:
            assert_close([output], [loop(*qkv.unbind(1), lengths)], 5e-3)
        assert all(torch.equal(x, expected_other) for x in others)


HOPPER_BACKWARD_PACKS = [
    [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 257, 1024],
    [129, 0, 192, 1, 63, 144],
    [256, 64, 1, 577, 0, 129, 1024, 63],
    [252] * 40,
    [4096, *range(64, 1024, 60)],
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("K", [64, 72])
@pytest.mark.parametrize("lengths", HOPPER_BACKWARD_PACKS, ids=lambda x: f"{max(x)}x{len(x)}")
def test_hopper_backward(backward_on_hopper, lengths, K, dtype):
    """It runs; NaN in other segments, repeated last offsets, rows beyond and layouts change no bit."""
    rows, H, longest, cu = sum(lengths), 3, max(lengths), offsets(lengths)
    qkv, grad = random_qkv(rows + 150, H, K, dtype), random_qkv(rows + 150, H, K, dtype, 1)[:, 0].contiguous()

    def run(qkv, grad, cu=cu, longest=longest):
        poison(qkv.shape, grad.shape, dtype=dtype)
        return with_gradients(lambda x: varlen_attention_qkvpacked(x, cu, longest), [qkv], grad)

    for bound in (longest, 3000):
        run(qkv[:rows], grad[:rows], longest=bound)  # compiled, checked
    backward_on_hopper.clear()
    out, dqkv = run(qkv[:rows], grad[:rows])
    exact = with_gradients(
        lambda *x: kernels_ref.attention(*x, cu), qkv[:rows].double().unbind(1), grad[:rows].double()
    )
    assert_as_good_as_torch([out, *dqkv.unbind(1)], exact, qkv.unbind(1), grad, lengths)
    assert torch.equal(run(qkv[:rows], grad[:rows])[1], dqkv)
    changed, changed_grad = qkv.clone(), grad.clone()
    for first, last in [*list(itertools.pairwise(cu.tolist()))[1::2], (rows, rows + 150)]:
        changed[first:last], changed_grad[first:last] = float("nan"), float("nan")
    actual = run(changed, changed_grad, torch.cat([cu, cu[-1:].expand(300)]))[1]
    assert (actual[rows:] == 0).all()
    for first, last in list(itertools.pairwise(cu.tolist()))[::2]:
        assert torch.equal(actual[first:last], dqkv[first:last])
    assert len(backward_on_hopper) == 3
    assert_close(run(qkv[:rows], grad[:rows], longest=3000)[1].unbind(1), dqkv.unbind(1), 1e-3)
    assert len(backward_on_hopper) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("K", [64, 72])
@pytest.mark.parametrize("lengths", [[144] * 60, [256] * 40, [129, 0, 192, 1, 63, 144] * 8], ids=lambda x: str(max(x)))
def test_hopper_repeats_to_the_bit(on_hopper, backward_on_hopper, lengths, K, dtype):
    """Warps that run into each other's shared memory show in some of many runs."""
    qkv = random_qkv(sum(lengths), 16, K, dtype)
    grad, cu, longest = random_qkv(sum(lengths), 16, K, dtype, 1)[:, 0], offsets(lengths), max(lengths)

    def run():
        return with_gradients(lambda x: varlen_attention_qkvpacked(x, cu, longest), [qkv], grad)

    expected = run()
    assert on_hopper and backward_on_hopper
    differing = sum(sum((a != b).sum() for a, b in zip(run(), expected, strict=True)) for _ in range(300))
    assert differing == 0


def test_which_packs_are_few_rows(monkeypatch):
    """No more blocks of 64 queries than two a multiprocessor, and no segment that more of them would share."""
    from siglip2_packed.ops.triton import attention

    monkeypatch.setattr(attention, "multiprocessors", lambda device: 4)
    few = [attention.few_rows(torch.zeros(rows, 16, 8), longest) for rows, longest in
           [(1, 1), (32, 256), (33, 256), (32, 257), (512, 256)]]  # fmt: skip
    assert few == [True, True, False, False, False]
    tiles = [attention.forward_tile(72, torch.bfloat16, n, 90, True) for n in (64, 128, 129, 256)]
    assert [constants for constants, _ in tiles] == [
        (64, 64, True), (64, 128, True), (64, 64, False), (64, 64, False)
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("K", [64, 72, 128])
def test_packs_of_the_self_check_take_every_tile(K, capability, dtype, monkeypatch):
    from siglip2_packed.ops.dispatch import CHECKED_PACKS
    from siglip2_packed.ops.triton import attention

    monkeypatch.setattr(attention, "multiprocessors", lambda device: 100)

    def tiles(rows, longest):
        few = attention.few_rows(torch.zeros(rows, 3, 8), longest)
        short = attention.backward_short_tile(K, dtype, longest, capability)
        return repr(attention.forward_tile(K, dtype, longest, capability, few)), repr(short)

    checked = [tiles(sum(lengths), max(lengths)) for lengths in CHECKED_PACKS]
    possible = [
        tiles(rows, longest) for longest in (1, 32, 33, 64, 65, 128, 129, 256, 257, 4096) for rows in (longest, 9999)
    ]
    for chosen, all_of_them in zip(zip(*checked), zip(*possible)):
        assert set(chosen) == set(all_of_them)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[256], [100, 0, 156, 1], [7] * 30])
@pytest.mark.parametrize("K", [64, 72])
def test_few_rows(lengths, K, monkeypatch):
    """Are not for the Hopper kernels."""
    from siglip2_packed.ops.triton import attention

    monkeypatch.setattr(attention, "hopper_kernels", lambda name: pytest.fail(f"asked for {name}"))
    qkv, cu = random_qkv(sum(lengths), 16, K, torch.bfloat16), offsets(lengths)
    assert attention.few_rows(qkv[:, 0], max(lengths)) and not attention.few_rows(qkv[:, 0], 257)
    assert not attention.few_rows(qkv[:1, 0].expand(2000, 16, K), 256)
    grad = random_qkv(sum(lengths), 16, K, torch.bfloat16, 1)[:, 0]
    actual = with_gradients(lambda *x: varlen_attention(*x, cu, max(lengths)), qkv.unbind(1), grad)
    assert_close(actual, with_gradients(lambda *x: loop(*x, lengths), qkv.unbind(1), grad), 6e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("K", [64, 72])
def test_hopper_backward_strides(backward_on_hopper, K):
    """Separate tensors, heads first, gaps between rows: read in place, to the same bits. One row for all: Triton's."""
    lengths, H, dtype = [200, 1, 65, 144, 17], 3, torch.bfloat16
    rows, cu = sum(lengths), offsets(lengths)
    qkv, grad = random_qkv(rows, H, K, dtype), random_qkv(rows, H, K, dtype, 1)[:, 0].contiguous()

    def run(q, k, v, grad):
        poison(q.shape, qkv.shape, dtype=dtype)
        return with_gradients(lambda *x: varlen_attention(*x, cu, 200), (q, k, v), grad)

    def heads_first(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    def gaps(x):
        return torch.stack([x, x * float("nan")], 1)[:, 0]

    run(*qkv.unbind(1), grad)  # compiled, checked
    backward_on_hopper.clear()
    expected = run(*qkv.unbind(1), grad)
    for change in (torch.Tensor.contiguous, heads_first, gaps):
        for actual in (run(*map(change, qkv.unbind(1)), grad), run(*qkv.unbind(1), change(grad))):
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert len(backward_on_hopper) == 7
    for one in (grad[:1].expand(rows, H, K), grad[:, :1].expand(rows, H, K), grad.new_ones(1, 1, 1).expand(rows, H, K)):
        actual = run(*qkv.unbind(1), one)
        assert_close(actual, with_gradients(lambda *x: loop(*x, lengths), qkv.unbind(1), one), 6e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [0, 5, 200])
def test_hopper_backward_without_segments(backward_on_hopper, rows):
    def run(rows, cu):
        qkv, grad = random_qkv(rows, 3, 72, torch.bfloat16), random_qkv(rows, 3, 72, torch.bfloat16, 1)[:, 0]
        poison(qkv.shape, dtype=qkv.dtype)
        return qkv, with_gradients(lambda x: varlen_attention_qkvpacked(x, cu, 256), [qkv], grad)[1]

    run(17, offsets([17]))  # compiled, checked
    backward_on_hopper.clear()
    for cu in (offsets([]), offsets([0]), offsets([0, 0, 0])):
        qkv, dqkv = run(rows, cu)
        assert dqkv.shape == qkv.shape and (dqkv == 0).all()
    assert len(backward_on_hopper) == (3 if rows else 0)


@pytest.mark.gpu
def test_hopper_launches_leave_their_counter_at_zero(on_hopper, backward_on_hopper, monkeypatch):
    """Those of one stream, which do not overlap, could share one; more items than thread blocks, or fewer."""
    from siglip2_packed.ops.triton import hopper as shared

    packs = [[4096, *range(64, 1024, 60)], [252] * 40, [200, 0, 1], [0, 130]]

    def run():
        for lengths in packs:
            qkv = random_qkv(sum(lengths) + 70, 3, 72, torch.bfloat16)
            yield from with_gradients(
                lambda x: varlen_attention_qkvpacked(x, offsets(lengths), max(lengths)), [qkv], qkv[:, 0]
            )

    expected = list(run())
    on_hopper.clear(), backward_on_hopper.clear()
    monkeypatch.setattr(shared, "_eager", itertools.repeat(5))
    for _ in range(3):
        assert all(torch.equal(actual, e) for actual, e in zip(run(), expected, strict=True))
    assert len(on_hopper) == len(backward_on_hopper) == 3 * len(packs)
    assert not shared.counters(expected[0].device).any()


@pytest.mark.gpu
def test_hopper_backward_in_a_cuda_graph(backward_on_hopper):
    """Replays follow the contents of the inputs, lengths included, beside eager launches on another stream."""
    qkv, grad = random_qkv(1200, 16, 72, torch.bfloat16), random_qkv(1200, 16, 72, torch.bfloat16, 1)[:, 0]
    cu = offsets([256, 300, 44, 500, 0])

    def run():
        return with_gradients(lambda x: varlen_attention_qkvpacked(x, cu, 600), [qkv], grad)[1]

    other, cu_other = random_qkv(6144, 16, 72, torch.bfloat16, 2), offsets([1024, 2048, 64, 512, 1472, 1024])
    before = torch.ones_like(other[:, 0])

    def run_other():
        return with_gradients(lambda x: varlen_attention_qkvpacked(x, cu_other, 2048), [other], before)[1]

    run()  # compiled, checked
    expected_other = run_other()
    backward_on_hopper.clear()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        gradients = [run() for _ in range(3)]
    assert len(backward_on_hopper) == 3
    for lengths in ([256, 300, 44, 500, 0], [600, 1, 2, 3, 594], [7, 0, 0, 0, 0]):
        cu.copy_(offsets(lengths))
        for dqkv in gradients:
            dqkv.fill_(float("nan"))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            others = [run_other() for _ in range(5)]
        graph.replay()
        torch.cuda.current_stream().wait_stream(stream)
        expected = with_gradients(lambda *x: loop(*x, lengths), qkv.unbind(1), grad)[1:]
        for dqkv in gradients:
            assert_close(dqkv.unbind(1), expected, 6e-3)
        assert all(torch.equal(x, expected_other) for x in others)
