"""Attention's contract, held by every implementation, through the object that layers call.

Values and gradients are those of a loop over segments in float64; who adds one to `IMPLEMENTATIONS` has them all.
"""

import itertools
from typing import NamedTuple

import pytest
import torch
from attention_inputs import (
    DEVICE,
    EXACT,
    NAMES,
    assert_as_good_as_torch,
    assert_close,
    assert_same,
    loop,
    own_launches,
    poison,
    random_qkv,
    with_gradients,
    written_out,
)

import kernels_ref
from siglip2_packed.ops.attention import VarlenAttention
from siglip2_packed.ops.attention.backends import BACKENDS, refusal, why_not
from siglip2_packed.ops.attention.kernels import FORWARD
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.check import missing
from siglip2_packed.ops.segments import Segments

CPU = torch.device("cpu")
H = 2


class Implementation(NamedTuple):
    backend: str
    device: torch.device = DEVICE
    dtype: torch.dtype = torch.float32
    warpgroups: int = 0
    """Of the Hopper kernels, which take every pack then; 0: those of the pack's own choice."""
    once: bool = False
    """Whether their backward takes one pass."""

    @property
    def own(self) -> bool:
        return BACKENDS[self.backend].run is None

    @property
    def repeats(self) -> bool:
        """Whether gradients are the same bits every time. Those of other packages on CUDA are sums by atomics."""
        return self.own or self.backend == "eager" or self.device.type == "cpu"

    @property
    def separates_nan(self) -> bool:
        """Whether NaN in one segment stays there. Other packages' kernels may multiply a neighbour's rows by zero."""
        return self.own or self.backend in ("eager", "sdpa")

    @property
    def bound(self) -> float:
        """Of an output's error in norm."""
        if self.dtype == torch.float32:
            return EXACT if self.own or self.device.type == "cpu" else 1e-5
        return {torch.float16: 1e-3, torch.bfloat16: 1e-2}[self.dtype]

    def rows(self, T, K, seed=0):
        return random_qkv(T, H, K, self.dtype, seed, self.device)

    def __call__(self, lengths):
        return VarlenAttention(Segments(lengths, self.device), self.backend)

    def ran_own_kernels(self, qkv, lengths, packed):
        """None of our own may be right, and torch's path run in their place: then this test would show nothing."""
        longest, cu = max(lengths), Segments(lengths, self.device).cu_seqlens
        names = own_launches(qkv, cu, longest, packed)
        if self.warpgroups:
            assert names == ["hopper", "hopper_one_pass" if self.once else "hopper"]
        assert names

    def assert_right(self, actual, expected, inputs, grad, lengths):
        if self.dtype != torch.float32:
            return assert_as_good_as_torch(actual, expected, inputs, grad, lengths)
        bound = self.bound
        least = 2e-6 if self.device.type == "cpu" else 1e-5  # dq and dk of one row are zero
        least *= not self.own or max(lengths) == 1
        if not self.own and self.device.type == "cpu":
            torch.testing.assert_close(actual[0].double(), expected[0], atol=2e-6, rtol=1e-5)
            bound = 2e-6
        for name, a, e in zip(NAMES, actual, expected, strict=True):
            assert a.shape == e.shape, f"{name}: {list(a.shape)}, not {list(e.shape)}"
            error, most = (a.double() - e).norm(), bound * e.norm() + least
            assert error <= most, f"{name}: error {error:.2e} > {most:.2e}"


def on_gpu(backend, dtype=torch.bfloat16, warpgroups=0, once=False):
    name = f"hopper{warpgroups}{'once' * once}" if warpgroups else backend
    one = Implementation(backend, torch.device("cuda"), dtype, warpgroups, once)
    return pytest.param(one, id=f"{name}-{str(dtype)[6:]}-cuda", marks=pytest.mark.gpu)


IMPLEMENTATIONS = [
    pytest.param(Implementation("eager", CPU), id="eager"),
    pytest.param(Implementation("sdpa", CPU), id="sdpa"),
    pytest.param(Implementation("triton"), id="triton-float32"),
    pytest.param(Implementation("triton", dtype=torch.float16), id="triton-float16"),
    on_gpu("triton"),
    *[on_gpu("triton", dtype, n) for dtype in (torch.bfloat16, torch.float16) for n in (2, 3)],
    *[on_gpu("triton", dtype, 2, once=True) for dtype in (torch.bfloat16, torch.float16)],
    *[on_gpu(name, dtype) for name in ("eager", "sdpa") for dtype in (torch.float32, torch.bfloat16)],
    *[on_gpu(name) for name in BACKENDS if name not in ("eager", "sdpa", "triton")],
]


@pytest.fixture(params=IMPLEMENTATIONS)
def attention(request):
    """An implementation; skips where it cannot be had, with the reason. It runs as it does without this fixture."""
    implementation = request.param
    backend, device, dtype, warpgroups, once = implementation
    K = request.node.callspec.params.get("K", 72)
    if device.type == "cuda" and dtype != torch.float32 and (reason := why_not(backend, device, dtype, K)):
        pytest.skip(f"{backend}: {reason}")
    if device.type == "cuda" and not implementation.own:  # a build may lack a head_dim; it is refused then, not used
        reason = refusal(backend, Segments([5], device), 5, dtype, H, K, gradients=True)
        if reason is not None:
            pytest.skip(f"{backend}: {reason}")
    if not warpgroups:
        yield implementation
        return
    if torch.cuda.get_device_capability(device) != (9, 0) or K not in (64, 72):
        pytest.skip("made for compute capability 9.0, head_dim 64 and 72")
    if reason := missing(*FORWARD["hopper"]):
        pytest.skip(reason)
    kernel = [("hopper", warpgroups)]
    with choice.forced(attention_forward=kernel, attention_backward=[("hopper_one_pass", 2)] if once else kernel):
        yield implementation


@pytest.mark.parametrize(
    ("lengths", "K"),
    [
        *itertools.product([[5, 5, 5], [1, 15, 16], [17, 40, 3]], [64, 72, 80, 128]),
        *itertools.product([[35], [3, 9, 3, 1, 9, 17], [1], [16, 7, 16]], [64, 72]),
        ([17, 63, 64], 64),
        ([256, 1, 64, 35], 64),
        *[(lengths, 72) for lengths in ([65, 1, 3], [200, 1, 17], [256, 1, 64, 35])],
    ],
    ids=str,
)
def test_values_and_gradients(attention, lengths, K):
    if attention.own and attention.device.type == "cpu" and K == 64 and max(lengths) > 200:
        pytest.skip("takes the interpreter long, and is done at head_dim 72")
    qkv, grad = attention.rows(sum(lengths), K), attention.rows(sum(lengths), K, seed=1)[:, 0]
    if attention.own:
        attention.ran_own_kernels(qkv, lengths, packed=False)
    poison(qkv.shape, grad.shape, dtype=qkv.dtype)
    actual = with_gradients(attention(lengths), qkv.unbind(1), grad)
    cu = Segments(lengths, attention.device).cu_seqlens
    exact = with_gradients(lambda *x: kernels_ref.attention(*x, cu), qkv.double().unbind(1), grad.double())
    assert_close(exact, with_gradients(lambda *x: loop(*x, lengths), qkv.double().unbind(1), grad), 1e-12)
    attention.assert_right(actual, exact, qkv.unbind(1), grad, lengths)


@pytest.mark.parametrize(
    ("lengths", "K"), [([17, 40, 3], 64), ([17, 40, 3], 72), ([5, 5, 5], 72), ([65, 1, 3], 72)], ids=str
)
def test_a_fused_projection_gives_what_separate_tensors_give(attention, lengths, K):
    """Views of it as well; with autograd, without, and by `forward` and `backward` where there are such."""
    run, grad = attention(lengths), attention.rows(sum(lengths), K, seed=1)[:, 0].contiguous()
    qkv = attention.rows(sum(lengths), K)
    poison(qkv.shape, grad.shape, dtype=qkv.dtype)
    separate = with_gradients(run, [x.contiguous() for x in qkv.unbind(1)], grad)
    views = with_gradients(run, qkv.unbind(1), grad)
    out, dqkv = with_gradients(run.qkvpacked, [qkv], grad)
    with torch.no_grad():
        others = [run.qkvpacked(qkv), run(*qkv.unbind(1))]
    exact = with_gradients(lambda *x: loop(*x, lengths), qkv.double().unbind(1), grad)
    if not attention.repeats:
        for results in (separate, views, [out, *dqkv.unbind(1)]):
            attention.assert_right(results, exact, qkv.unbind(1), grad, lengths)
        return
    assert_same([out, *dqkv.unbind(1)], views)
    assert_same(others, [out, out])
    attention.assert_right(views, exact, qkv.unbind(1), grad, lengths)
    attention.assert_right(separate, exact, qkv.unbind(1), grad, lengths)
    assert run.written_out == attention.own
    if run.written_out:
        attention.ran_own_kernels(qkv, lengths, packed=True)
        assert_same(separate, views)
        poison(qkv.shape, grad.shape, dtype=qkv.dtype)
        written, lse, gradients = written_out(run, qkv, grad)
        assert_same([written, gradients], [out, dqkv])
        q, k, _ = qkv.double().unbind(1)
        sums = [
            torch.einsum("qhk,shk->hqs", q_s, k_s).mul(K**-0.5).logsumexp(-1) / torch.tensor(2.0).log()
            for q_s, k_s in zip(q.split(lengths), k.split(lengths))
        ]
        assert lse.dtype == torch.float32
        torch.testing.assert_close(lse.double(), torch.cat(sums, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lengths", [[30], [40]], ids=str)
def test_the_softmax_scale_is_that_of_the_true_head_dim(attention, lengths):
    """Kernels pad head_dim 72: a scale of 80, 96 or 128 to the -0.5 would move it by far more than the bound."""
    qkv = attention.rows(sum(lengths), 72)
    out = attention(lengths)(*qkv.unbind(1))
    assert_close([out], [loop(*qkv.unbind(1), lengths, 72**-0.5)], attention.bound)
    for other in (64, 80, 96, 128):
        wrong = loop(*qkv.unbind(1), lengths, other**-0.5)
        with pytest.raises(AssertionError):
            assert_close([out], [wrong], 4 * attention.bound)


@pytest.mark.parametrize("lengths", [[1, 15, 16], [17, 40, 3], [9, 9, 9], [3, 65, 9]], ids=str)
def test_isolation(attention, lengths):
    """Noise, then NaN, in one segment changes no bit of the others, forward and backward."""
    qkv, grad = attention.rows(sum(lengths), 72), attention.rows(sum(lengths), 72, seed=1)[:, 0]
    begin, end = lengths[0], lengths[0] + lengths[1]
    run = attention(lengths)
    expected = with_gradients(run.qkvpacked, [qkv], grad)
    noises = [attention.rows(end - begin, 72, seed=2) * 100]
    for noise in noises + [float("nan")] * attention.separates_nan:
        changed = qkv.clone()
        changed[begin:end] = noise
        out, dqkv = with_gradients(run.qkvpacked, [changed], grad)
        assert not torch.equal(out[begin:end], expected[0][begin:end])
        for others in (slice(begin), slice(end, None)):
            assert torch.equal(out[others], expected[0][others])
            if attention.repeats:
                assert torch.equal(dqkv[others], expected[1][others])
            else:
                assert_close([dqkv[others]], [expected[1][others]], 1e-2)


@pytest.mark.parametrize("row", [0, -1])
def test_every_key_counts(attention, row):
    """No causal mask, and none the other way: the first and the last row move all."""
    qkv = attention.rows(70, 64)
    changed = qkv.clone()
    changed[row] += 1
    before, after = (attention([70]).qkvpacked(x) for x in (qkv, changed))
    assert (before != after).flatten(1).any(1).all()


def test_one_patch(attention):
    """Softmax over one key: the output is v, and only v has a gradient."""
    qkv, grad = attention.rows(1, 72), attention.rows(1, 72, seed=1)[:, 0]
    out, dq, dk, dv = with_gradients(attention([1]), qkv.unbind(1), grad)
    exact = attention.dtype == torch.float32
    rounding = {"rtol": 1e-5, "atol": 1e-8} if exact else {}
    torch.testing.assert_close(out, qkv[:, 2], **rounding)
    torch.testing.assert_close(dv, grad, **rounding)
    assert max(dq.abs().max(), dk.abs().max()) < (1e-5 if exact else 1e-2)


@pytest.mark.parametrize("how", ["separate", "packed"])
def test_an_empty_pack_stays_attached(attention, how):
    run, qkv = attention([]), attention.rows(0, 72)
    inputs = [x.detach().requires_grad_() for x in (qkv.unbind(1) if how == "separate" else [qkv])]
    out = run(*inputs) if how == "separate" else run.qkvpacked(*inputs)
    assert out.shape == (0, H, 72) and out.dtype == attention.dtype
    out.sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in inputs)
    with torch.no_grad():
        assert run(*qkv.unbind(1)).shape == run.qkvpacked(qkv).shape == (0, H, 72)
    if run.written_out:
        out, low, lse = run.forward(qkv)
        assert (out.shape, low, lse.shape) == ((0, H, 72), None, (H, 0))


@pytest.mark.parametrize("lengths", [[1, 15, 16], [17, 40, 3], [9, 9, 9]], ids=str)
def test_the_same_twice(attention, lengths):
    qkv, grad = attention.rows(sum(lengths), 72), attention.rows(sum(lengths), 72, seed=1)[:, 0]

    def run():
        return with_gradients(attention(lengths), qkv.unbind(1), grad)

    results = 4 if attention.repeats else 1
    assert_same(run()[:results], run()[:results])


@pytest.mark.parametrize("lengths", [[5, 17], [41], [41, 5]], ids=str)
def test_rows_that_are_not_there_stay_out_of_gradients(attention, lengths):
    """Every real score far below zero: a missing mask lets exp2(0 - lse) of absent rows overflow."""
    q, k, v = attention.rows(sum(lengths), 72).unbind(1)
    results = with_gradients(attention(lengths), (30 + q, k - 6, v), torch.ones_like(v))
    assert all(x.isfinite().all() for x in results)


def test_sdpa_is_called_once_a_length(monkeypatch):
    shapes = []
    function = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, **kwargs):
        assert kwargs == {"is_causal": False}
        shapes.append(tuple(q.shape))
        return function(q, k, v, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    lengths = [16, 7, 16, 9, 7, 16]
    VarlenAttention(Segments(lengths), "sdpa").qkvpacked(random_qkv(71, 2, 72, device=CPU))
    assert shapes == [(2, 2, 7, 72), (1, 2, 9, 72), (3, 2, 16, 72)]


@pytest.mark.gpu
@pytest.mark.parametrize("K", [64, 72])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [64] * 4], ids=lambda x: f"{len(x)}x{x[0]}")
def test_sdpas_gradients_are_right_whatever_the_layout_of_the_outputs(lengths, K):
    """Where the gradient of the output has another layout than the output, cuDNN's are wrong (torch 2.11)."""
    device = torch.device("cuda")
    qkv, grad = random_qkv(sum(lengths), H, K, torch.bfloat16, 0, device), random_qkv(sum(lengths), H, K, seed=1)[:, 0]
    grad = grad.to(device, torch.bfloat16)
    inputs = [x.contiguous() for x in qkv.unbind(1)]
    exact = with_gradients(lambda *x: loop(*x, lengths), inputs, grad)
    for laid_out in (grad.contiguous(), grad.transpose(0, 1).contiguous().transpose(0, 1)):  # rows first, heads first
        actual = with_gradients(VarlenAttention(Segments(lengths, device), "sdpa"), inputs, laid_out)
        assert_as_good_as_torch(actual, exact, inputs, grad, lengths)
