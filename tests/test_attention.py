"""Varlen attention: every backend this machine has, against the reference; dispatch and self-check."""

import importlib
import logging
import sys
import types

import pytest
import torch

import kernels_ref
from siglip2_packed.ops import attention, dispatch
from siglip2_packed.ops.attention import BACKENDS, varlen_attention, why_not
from siglip2_packed.ops.attention_pool import attention_pool
from siglip2_packed.ops.dispatch import resolve_backend, self_check
from siglip2_packed.ops.segments import Segments

CPU = torch.device("cpu")
PACKS = [[35], [256, 1, 64, 35], [5, 5, 5], [3, 9, 3, 1, 9, 17], [1], [16, 7, 16]]


def forget_imports():
    attention.why_missing.cache_clear()


def qkv(lengths, heads=2, head_dim=72, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, sum(lengths), heads, head_dim, generator=generator).to(dtype)
    return [t.clone().requires_grad_() for t in x]


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("lengths", PACKS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 72])
def test_outputs_and_gradients_match_the_reference(backend, lengths, head_dim):
    segments = Segments(lengths)
    inputs = qkv(lengths, head_dim=head_dim)
    out = varlen_attention(*inputs, segments, backend)
    reference = qkv(lengths, head_dim=head_dim, dtype=torch.float64)
    expected = kernels_ref.attention(*reference, segments.cu_seqlens)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)

    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(out, inputs, grad)
    theirs = torch.autograd.grad(expected, reference, grad.double())
    for x, ref in zip(ours, theirs):
        assert (x.double() - ref).norm() <= 2e-6 * ref.norm() + 2e-6


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_strided_views_of_a_fused_projection(backend):
    lengths = [3, 9, 3]
    fused = torch.randn(15, 3, 2, 72)
    segments = Segments(lengths)
    out = varlen_attention(*fused.unbind(1), segments, backend)
    expected = kernels_ref.attention(*(x.contiguous() for x in fused.unbind(1)), segments.cu_seqlens)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_an_empty_pack_stays_attached(backend):
    inputs = qkv([])
    out = varlen_attention(*inputs, Segments([]), backend)
    assert out.shape == (0, 2, 72)
    out.sum().backward()
    assert all(x.grad is not None for x in inputs)


def test_sdpa_calls_once_per_length(monkeypatch):
    shapes = []
    function = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, **kwargs):
        assert kwargs == {"is_causal": False}
        shapes.append(tuple(q.shape))
        return function(q, k, v, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    lengths = [16, 7, 16, 9, 7, 16]
    varlen_attention(*qkv(lengths), Segments(lengths), "sdpa")
    assert shapes == [(2, 2, 7, 72), (1, 2, 9, 72), (3, 2, 16, 72)]


@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_pooling_matches_the_reference(lengths):
    images = Segments(lengths)
    _, k, v = qkv(lengths)
    q = torch.randn(2, 72, generator=torch.Generator().manual_seed(3)).requires_grad_()
    out = attention_pool(q, k, v, images)
    reference = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = kernels_ref.attention_pool(*reference, images.cu_seqlens)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)

    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(out, (q, k, v), grad)
    theirs = torch.autograd.grad(expected, reference, grad.double())
    for x, ref in zip(ours, theirs):
        assert (x.double() - ref).norm() <= 1e-5 * ref.norm() + 1e-6


def test_pooling_survives_large_scores():
    k = torch.tensor([300.0, -300.0, 280.0]).view(3, 1, 1).expand(3, 1, 8)
    out = attention_pool(torch.ones(1, 8), k, torch.eye(3, 8)[:, None], Segments([3]))
    torch.testing.assert_close(out[0, 0, :3], torch.tensor([1.0, 0.0, 0.0]))


def test_auto_takes_sdpa_on_the_cpu_and_says_so_once(caplog):
    for cached in (dispatch._resolve, dispatch._say_once):
        cached.cache_clear()
    with caplog.at_level(logging.INFO, "siglip2_packed"):
        assert [resolve_backend("auto", CPU, torch.float32, 72, True, length) for length in (0, 2, 6)] == ["sdpa"] * 3
    assert len([record for record in caplog.records if "attention: sdpa" in record.message]) == 1


@pytest.mark.parametrize("name", [name for name in BACKENDS if name not in ("eager", "sdpa")])
def test_a_backend_asked_for_by_name_works_or_raises_with_the_reason(name):
    with pytest.raises(ValueError, match=rf"{name}.*cannot be used: .*(cannot be imported|needs)"):
        resolve_backend(name, CPU, torch.bfloat16, 72, False)


def test_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="unknown attn_implementation 'flash'.*torch_varlen"):
        resolve_backend("flash", CPU, torch.float32, 72, False)


@pytest.mark.parametrize("error", [OSError("undefined symbol"), ImportError("no ABI"), RuntimeError("broken")])
def test_a_broken_flash_attn_is_a_reason_not_a_crash(monkeypatch, error):
    def broken(name):
        raise error

    forget_imports()
    monkeypatch.setattr(importlib, "import_module", broken)
    reason = why_not("flash_attention_2", torch.device("cuda"), torch.bfloat16, 72)
    forget_imports()
    assert type(error).__name__ in reason
    assert str(error) in reason


@pytest.mark.parametrize("wrong_input", ["q", "k", "v"])
def test_wrong_gradients_are_refused_by_name_with_the_numbers(monkeypatch, caplog, wrong_input):
    """A backend whose dQ is wrong (as one is, silently, at head_dim 72) is good for inference only."""

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q):
            return q.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.5 * grad

    def wrong(q, k, v, segments):
        inputs = [WrongGradient.apply(x) if name == wrong_input else x for name, x in zip("qkv", (q, k, v))]
        return attention.sdpa(*inputs, segments)

    monkeypatch.setitem(BACKENDS, "wrong", attention.Backend(wrong))
    monkeypatch.setattr(dispatch, "ATTN_IMPLEMENTATIONS", (*attention.ATTN_IMPLEMENTATIONS, "wrong"))
    monkeypatch.setattr(dispatch, "preference", lambda *args: ("wrong", "sdpa"))
    for cached in (self_check, dispatch._resolve):
        cached.cache_clear()
    try:
        assert resolve_backend("wrong", CPU, torch.float32, 72, False) == "wrong"
        with pytest.raises(
            ValueError, match=rf"'wrong' cannot be used: failed its self-check.*d{wrong_input} 5\.0e-01"
        ):
            resolve_backend("wrong", CPU, torch.float32, 72, True)
        assert resolve_backend("auto", CPU, torch.float32, 72, True) == "sdpa"
        assert "wrong failed its self-check" in caplog.text
    finally:
        for cached in (self_check, dispatch._resolve):
            cached.cache_clear()


def test_a_check_under_inference_mode_is_good_for_training_too():
    self_check.cache_clear()
    with torch.inference_mode():
        assert self_check("sdpa", CPU, torch.float32, 72).backward_ok


@pytest.mark.parametrize("fault", ["nan", "scale", "raise", "inference"])
def test_a_wrong_forward_is_refused(monkeypatch, fault):
    def wrong(q, k, v, segments):
        if fault == "raise":
            raise RuntimeError("unsupported head_dim")
        out = attention.sdpa(q, k, v, segments)
        if fault == "inference":
            return out if q.requires_grad else out * 1.05
        return out * float("nan") if fault == "nan" else out * 1.05

    monkeypatch.setitem(BACKENDS, "wrong", attention.Backend(wrong))
    self_check.cache_clear()
    check = self_check("wrong", CPU, torch.bfloat16, 72)
    self_check.cache_clear()
    assert not check.forward_ok
    assert not check.backward_ok


def test_flash_attention_gets_the_true_scale_when_head_dim_is_padded(monkeypatch):
    """FlashAttention 4's stand-in: sees 96 lanes, the scale of 72, keywords only, and returns (out, lse)."""
    seen = {}

    def flash(q, k, v, **kwargs):
        seen.update(kwargs, width=q.shape[-1])
        return kernels_ref.attention(q, k, v, kwargs["cu_seqlens_q"], softmax_scale=kwargs["softmax_scale"]), None

    module = types.ModuleType("flash_attn.cute")
    module.flash_attn_varlen_func = flash
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    forget_imports()
    lengths = [5, 35, 1]
    inputs = qkv(lengths)
    out = varlen_attention(*inputs, Segments(lengths), "flash_attention_4")
    assert (seen["width"], seen["softmax_scale"], seen["causal"]) == (96, 72**-0.5, False)
    with torch.no_grad():
        varlen_attention(*inputs, Segments(lengths), "flash_attention_4")
    forget_imports()
    assert (seen["width"], seen["softmax_scale"]) == (72, 72**-0.5)
    assert (seen["max_seqlen_q"], seen["cu_seqlens_k"].tolist()) == (35, [0, 5, 40, 41])
    expected = kernels_ref.attention(*inputs, Segments(lengths).cu_seqlens)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


def test_length_class_weighs_segments_by_their_work():
    assert [dispatch.length_class([n] * 5) for n in (1, 96, 97, 256, 1024, 4096)] == [0, 0, 1, 2, 4, 6]
    assert dispatch.length_class([64] * 64 + [4096]) == dispatch.length_class([2080])
    assert dispatch.length_class([]) == 0


@pytest.mark.parametrize(
    ("capability", "head_dim", "lengths", "training", "first"),
    [
        ((9, 0), 72, [256] * 64, False, "triton"),
        ((9, 0), 72, [1024] * 16, True, "triton"),
        ((9, 0), 72, [4096] * 4, False, "triton"),
        ((9, 0), 72, [4096] * 4, True, "flash_attention_4"),
        ((9, 0), 72, [3072] * 4, True, "triton"),
        ((9, 0), 64, [576] * 28, False, "triton"),
        ((9, 0), 64, [576] * 28, True, "triton"),
        ((9, 0), 64, [1024] * 16, True, "flash_attention_4"),
        ((9, 0), 64, [4096] * 4, False, "flash_attention_4"),
        ((9, 0), 128, [256] * 64, True, "triton"),
        ((10, 0), 72, [4096] * 4, False, "flash_attention_3"),
        ((8, 0), 72, [256] * 64, True, "triton"),
        ((8, 0), 72, [4096] * 4, True, "flash_attention_2"),
    ],
)
def test_preference_by_card_head_dim_and_length(monkeypatch, capability, head_dim, lengths, training, first):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    order = dispatch.preference(torch.device("cuda"), head_dim, dispatch.length_class(lengths), training)
    assert order[0] == first
    assert order[-1] == "sdpa"
    assert set(order) <= set(BACKENDS)
    assert dispatch.preference(CPU, head_dim, 2, training) == ("sdpa",)
