"""The pooling head's attention, one query over the rows of each image: torch's path and the Triton kernel."""

import pytest
import torch
from attention_inputs import DEVICE, EXACT, assert_close, offsets, poison, pool_loop, random_qkv, with_gradients

import kernels_ref
from siglip2_packed.ops.pool import ATTENTION_POOL, attention_pool
from siglip2_packed.ops.pool.triton import varlen_attention_pool
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.choice import Card
from siglip2_packed.ops.segments import Segments

PACKS = [[35], [256, 1, 64, 35], [5, 5, 5], [3, 9, 3, 1, 9, 17], [1], [16, 7, 16]]


@pytest.fixture(params=["chosen", "eager", "triton"])
def pool(request):
    """Implementations by name, and what modules call, which chooses one."""
    return attention_pool if request.param == "chosen" else ATTENTION_POOL.of(request.param)


def query(H, K, dtype=torch.float32, seed=3):
    return random_qkv(1, H, K, dtype, seed)[0, 0]


@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_values_and_gradients(pool, lengths):
    images, q = Segments(lengths, DEVICE), query(2, 72)
    _, k, v = random_qkv(sum(lengths), 2, 72).unbind(1)
    grad = random_qkv(len(lengths), 2, 72, seed=1)[:, 0]
    poison(k.shape, dtype=k.dtype)
    actual = with_gradients(lambda *x: pool(*x, images), (q, k, v), grad)
    exact = with_gradients(
        lambda *x: kernels_ref.attention_pool(*x, images.cu_seqlens), [x.double() for x in (q, k, v)], grad
    )
    torch.testing.assert_close(actual[0].double(), exact[0], atol=2e-6, rtol=1e-5)
    for ours, theirs in zip(actual[1:], exact[1:], strict=True):
        assert (ours.double() - theirs).norm() <= 1e-5 * theirs.norm() + 1e-6


def test_large_scores(pool):
    k = torch.tensor([300.0, -300.0, 280.0], device=DEVICE).view(3, 1, 1).repeat(1, 1, 8)
    v = torch.eye(3, 8, device=DEVICE)[:, None]
    out = pool(torch.ones(1, 8, device=DEVICE), k, v, Segments([3], DEVICE))
    torch.testing.assert_close(out[0, 0, :3], torch.tensor([1.0, 0.0, 0.0], device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [[16], [13 * 19, 256, 35], [64] * 8], ids=str)
def test_keys_with_a_large_mean(pool, lengths, dtype):
    """It cancels in the gradient of q, whose error is that of rounding it."""
    images, q = Segments(lengths, DEVICE), query(2, 72, dtype)
    _, k, v = random_qkv(sum(lengths), 2, 72).unbind(1)
    k, v = (k + 10 * query(2, 72, seed=5)).to(dtype), v.to(dtype)
    grad = random_qkv(len(lengths), 2, 72, dtype, 1)[:, 0]
    _, *actual = with_gradients(lambda *x: pool(*x, images), (q, k, v), grad)
    exact = with_gradients(lambda *x: pool_loop(*x, lengths), [x.double() for x in (q, k, v)], grad)[1:]
    assert_close(actual[:1], exact[:1], torch.finfo(dtype).eps / 2)
    assert_close(actual[1:], exact[1:], torch.finfo(dtype).eps)


@pytest.mark.parametrize("lengths", [[16], [13 * 19, 256, 35]], ids=str)
def test_keys_with_a_mean_in_float32(lengths):
    """On torch's path it is taken away: the gradient of q would be 20 times further off, or more."""
    images, q = Segments(lengths, DEVICE), query(2, 72)
    _, k, v = random_qkv(sum(lengths), 2, 72).unbind(1)
    k = k + 30 * query(2, 72, seed=5)
    grad = random_qkv(len(lengths), 2, 72, seed=1)[:, 0]
    _, *actual = with_gradients(lambda *x: ATTENTION_POOL.of("eager")(*x, images), (q, k, v), grad)
    exact = with_gradients(lambda *x: pool_loop(*x, lengths), [x.double() for x in (q, k, v)], grad)[1:]
    assert_close(actual, exact, 1e-6)


@pytest.mark.parametrize("lengths", [[13 * 19, 256, 7], [1]], ids=str)
def test_autocast_rounds_nothing_within(pool, lengths):
    """Sums stay in float32: those of 256 rows in bfloat16 were off by a tenth."""
    images, q = Segments(lengths, DEVICE), query(2, 72, torch.bfloat16)
    _, k, v = random_qkv(sum(lengths), 2, 72, torch.bfloat16).unbind(1)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = pool(q, k, v, images)
    exact = pool_loop(q.double(), k.double(), v.double(), lengths)
    assert_close([out], [exact], torch.finfo(torch.bfloat16).eps / 2)


def test_isolation(pool):
    """Noise, then NaN, in one image changes no bit of the others, forward and backward."""
    images, q, kv = Segments([3, 40, 9], DEVICE), query(2, 72), random_qkv(52, 2, 72)[:, 1:]
    grad = random_qkv(3, 2, 72, seed=1)[:, 0]

    def run(kv):
        out, dk, dv = with_gradients(lambda k, v: pool(q, k, v, images), kv.unbind(1), grad)
        return out[[0, 2]], dk[:3], dk[43:], dv[:3], dv[43:]

    expected = run(kv)
    for noise in (100 * random_qkv(40, 2, 72, seed=2)[:, 1:], float("nan")):
        changed = kv.clone()
        changed[3:43] = noise
        for actual, unchanged in zip(run(changed), expected, strict=True):
            assert torch.equal(actual, unchanged)


@pytest.mark.parametrize("K", [64, 72])
def test_kernel(K):
    """A fused projection's keys and values, and rows beyond the last image that hold NaN."""
    lengths = [1, 15, 200, 33]
    rows, H = sum(lengths), 2
    kv = random_qkv(rows + 4, H, K)[:, 1:]
    kv[rows:] = float("nan")
    q, grad = random_qkv(1, H, K, seed=1)[0, 0], random_qkv(4, H, K, seed=2)[:, 0]
    poison(kv.shape, dtype=kv.dtype)
    actual = with_gradients(lambda *x: varlen_attention_pool(*x, offsets(lengths), 200), (q, *kv.unbind(1)), grad)
    expected = with_gradients(lambda *x: pool_loop(*x, lengths), (q, *kv.nan_to_num().unbind(1)), grad)
    assert_close(actual, expected, EXACT)
    assert (actual[2][rows:] == 0).all() and (actual[3][rows:] == 0).all()


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_kernel_without_images(rows, lengths):
    """None, and such as have no rows: zeros, attached to the graph."""
    inputs, images = [query(2, 72), *random_qkv(rows, 2, 72)[:, 1:].unbind(1)], len(lengths)
    poison((rows, 2, 72), dtype=torch.float32)
    grad = torch.ones(images, 2, 72, device=DEVICE)
    out, *gradients = with_gradients(lambda *x: varlen_attention_pool(*x, offsets(lengths), 0), inputs, grad)
    assert out.shape == (images, 2, 72) and [x.shape for x in gradients] == [x.shape for x in inputs]
    assert all((x == 0).all() for x in (out, *gradients))


def test_operator_is_well_formed():
    q, kv, cu = query(2, 72).requires_grad_(), random_qkv(40, 2, 72)[:, 1:], offsets([17, 23])
    torch.library.opcheck(torch.ops.siglip2_packed.varlen_attention_pool.default, (q, *kv.unbind(1), cu, 0.1))


@pytest.mark.parametrize(("change", "message"), [
    (dict(q=torch.zeros(2, 72, device=DEVICE)), r"q must be \[H, K\] = \[2, 64\] torch.float32.*got \[2, 72\]"),
    (dict(v=torch.zeros(9, 2, 64, device=DEVICE)), r"shape of k, \[10, 2, 64\], got \[9, 2, 64\]"),
    (dict(cu_seqlens=torch.tensor([0, 10], device=DEVICE)), r"\[S\+1\] int32, got \[2\] torch.int64"),
    (dict(softmax_scale=-1.0), "softmax_scale must be positive, got -1.0"),
])  # fmt: skip
def test_errors(change, message):
    k = torch.zeros(10, 2, 64, device=DEVICE)
    arguments = {"q": k[0], "k": k, "v": k, "cu_seqlens": offsets([10]), "max_seqlen": 10} | change
    with pytest.raises(ValueError, match=message):
        varlen_attention_pool(**arguments)


@pytest.mark.parametrize(
    ("card", "dtype", "K", "first"),
    [
        (Card("cpu"), torch.bfloat16, 72, "eager"),
        (Card("cuda", 75, 40), torch.float16, 72, "eager"),
        (Card("cuda", 80, 108), torch.bfloat16, 72, "triton"),
        (Card("cuda", 90, 132), torch.float16, 128, "triton"),
        (Card("cuda", 90, 132), torch.float32, 72, "eager"),
        (Card("cuda", 90, 132), torch.bfloat16, 136, "eager"),
        (Card("cuda", 90, 132), torch.bfloat16, 60, "eager"),
    ],
)
def test_where_the_kernel_is_worth_trying(card, dtype, K, first):
    assert choice.pool(card, dtype, K)[0] == first


@pytest.mark.parametrize("outcome", ["right", "wrong"])
def test_a_kernel_runs_after_its_check_only(forced, monkeypatch, caplog, outcome):
    """Interpreted; one that is wrong is named with the numbers, once, and torch's path runs."""
    calls = []

    def kernel(q, k, v, images):
        calls.append(len(k))
        return ATTENTION_POOL.of("eager")(q, k, v, images) * (1 if outcome == "right" else 1.5)

    monkeypatch.setattr("siglip2_packed.ops.pool.triton.attention_pool", kernel)
    forced(pool=["triton"])
    lengths, q, kv = [3, 40, 9], query(2, 72), random_qkv(52, 2, 72)[:, 1:]
    for _ in range(2):
        out = attention_pool(q, *kv.unbind(1), Segments(lengths, DEVICE))
        assert_close([out], [pool_loop(q, *kv.unbind(1), lengths)], EXACT)
    assert calls.count(52) == (2 if outcome == "right" else 0) and len(calls) > calls.count(52)
    warnings = [x.getMessage() for x in caplog.records if x.levelname == "WARNING"]
    assert len(warnings) == (outcome == "wrong")
    assert all("pool.attention_pool (triton) is not used" in x and "out 5.0e-01" in x for x in warnings)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["kernel", "chosen"])
def test_half_precision(dtype, how):
    lengths = [256, 252, 1, 1024, 17]
    kv = random_qkv(sum(lengths), 16, 72, dtype)[:, 1:]
    q, grad = query(16, 72, dtype, 1), random_qkv(5, 16, 72, dtype, 2)[:, 0]
    images = Segments(lengths, DEVICE)
    poison(kv.shape, dtype=kv.dtype)

    def run(q, k, v):
        if how == "chosen":
            return attention_pool(q, k, v, images)
        return varlen_attention_pool(q, k, v, images.cu_seqlens, 1024)

    actual = with_gradients(run, (q, *kv.unbind(1)), grad)
    assert_close(actual, with_gradients(lambda *x: pool_loop(*x, lengths), (q, *kv.unbind(1)), grad), 6e-3)


def test_a_tangent_is_an_error():
    _, k, v = random_qkv(9, 2, 72).unbind(1)
    with pytest.raises(RuntimeError, match="no derivative in forward mode"):
        torch.func.jvp(lambda q: varlen_attention_pool(q, k, v, offsets([5, 4]), 5), (query(2, 72),), (query(2, 72),))
