"""Which attention runs, and why not another: the rules, the backends by name, and what their checks say."""

import itertools
import logging
import sys
import types

import pytest
import torch
from attention_inputs import forgotten, pretend_to_capture, random_qkv, warnings

import kernels_ref
from siglip2_packed.ops.attention import VarlenAttention, for_pack, outside
from siglip2_packed.ops.attention.backends import BACKENDS, Backend, verdict_on, why_not
from siglip2_packed.ops.runtime import check, choice
from siglip2_packed.ops.runtime.choice import Card, Tile
from siglip2_packed.ops.segments import Segments

CPU = torch.device("cpu")
HOPPER = Card("cuda", 90, 0)
"""Which never has few rows."""
STAND_IN = "flash_attention_2"
"""A backend whose place is taken by one that runs anywhere."""


def pack(requested, gradients=False, lengths=(5, 35, 1), dtype=torch.float32, device=CPU):
    return for_pack(Segments(lengths, device), requested, dtype, 2, 72, gradients)


@pytest.fixture
def fresh(forced):
    """`forced`, where nothing was imported, said, checked or chosen before."""
    with forgotten():
        forced()
        yield forced


@pytest.fixture
def stand_in(fresh, monkeypatch):
    """`stand_in(function)`: it is the backend `STAND_IN`, and runs anywhere."""

    def plant(run):
        monkeypatch.setitem(BACKENDS, STAND_IN, Backend(run))
        monkeypatch.delitem(choice.NEEDS, STAND_IN)

    return plant


# Rules


def test_length_class_weighs_segments_by_their_work():
    assert [choice.length_class([n] * 5) for n in (1, 96, 97, 256, 1024, 4096)] == [0, 0, 1, 2, 4, 6]
    assert choice.length_class([64] * 64 + [4096]) == choice.length_class([2080])
    assert choice.length_class([]) == 0


@pytest.mark.parametrize(
    ("capability", "head_dim", "lengths", "training", "first"),
    [
        (90, 72, [256] * 64, False, "triton"),
        (90, 72, [1024] * 16, True, "triton"),
        (90, 72, [4096] * 4, False, "triton"),
        (90, 72, [3072] * 4, False, "triton"),
        (90, 72, [4096] * 4, True, "triton"),
        (90, 72, [3072] * 4, True, "triton"),
        (90, 64, [576] * 28, False, "triton"),
        (90, 64, [576] * 28, True, "triton"),
        (90, 64, [1024] * 16, True, "flash_attention_4"),
        (90, 64, [4096] * 4, False, "flash_attention_4"),
        (90, 128, [256] * 64, True, "triton"),
        (100, 72, [4096] * 4, False, "flash_attention_3"),
        (80, 72, [256] * 64, True, "triton"),
        (80, 72, [4096] * 4, True, "flash_attention_2"),
    ],
)
def test_preference_by_card_head_dim_and_length(capability, head_dim, lengths, training, first):
    order = choice.attention(Card("cuda", capability, 132), head_dim, choice.length_class(lengths), training)
    assert order[0] == first
    assert order[-1] == "sdpa"
    assert set(order) <= set(BACKENDS)
    assert choice.attention(Card("cpu"), head_dim, 2, training) == ("sdpa",)


def forward(longest, K=72, dtype=torch.bfloat16, card=HOPPER, T=40, H=2):
    return choice.attention_forward(card, dtype, T, H, K, longest)


def backward(longest, K=72, dtype=torch.bfloat16, card=HOPPER, T=40, S=3, H=2):
    return choice.attention_backward(card, dtype, T, S, H, K, longest)


def warpgroups(order):
    """Of the Hopper kernel, where it is tried first; 0 where it is not tried. Triton's is always there."""
    assert order[-1][0] in ("triton", "triton_short") and len(order) <= 3
    return next((how for name, how in order if name == "hopper"), 0)


def test_where_the_hopper_forward_fits():
    assert [warpgroups(forward(n)) for n in (0, 64, 65, 128, 129, 192, 193, 256, 4096)] == [0, 0, 2, 2, 3, 3, 2, 2, 2]
    assert warpgroups(forward(256, 64, torch.float16)) == 2
    for other in ({"K": 80}, {"K": 128}, {"dtype": torch.float32}, *[{"card": Card("cuda", n, 0)} for n in (80, 100)]):
        assert warpgroups(forward(256, **other)) == 0


def test_where_the_hopper_backward_fits():
    assert [warpgroups(backward(n)) for n in (0, 64, 128, 129, 192, 193, 256, 4096)] == [0, 0, 0, 3, 3, 2, 2, 2]
    assert warpgroups(backward(256, 64, torch.float16)) == 2
    for other in ({"K": 80}, {"K": 128}, {"dtype": torch.float32}, *[{"card": Card("cuda", n, 0)} for n in (80, 100)]):
        assert warpgroups(backward(256, **other)) == 0
    assert warpgroups(backward(10**5, S=10**6)) == warpgroups(backward(2**30)) == 2
    assert warpgroups(backward(256, S=2**30)) == warpgroups(backward(256, T=2**31)) == 0  # beyond 32 bits


def test_which_packs_are_gone_through_once():
    """Those of long segments on the whole; two passes are there where it is refused."""

    def once(T, S, K=72, **kwargs):
        names = [name for name, _ in backward(4096, K, T=T, S=S, **kwargs)]
        assert names[-2:] == ["hopper", "triton"]
        return names[0] == "hopper_one_pass"

    assert [once(T, 4) for T in (0, 3071, 3072, 16384)] == [False, False, True, True]
    assert [once(T, 4, 64) for T in (3072, 6143, 6144)] == [False, False, True]
    assert [backward(n, T=2000, S=1)[0][0] == "hopper_one_pass" for n in (256, 767, 768)] == [False, False, True]
    assert once(8192, 1, dtype=torch.float16)
    assert backward(128, T=128, S=1)[0][0] == "triton_short"
    assert [name for name, _ in backward(4096, T=4096, S=1, card=Card("cuda", 100, 1))] == ["triton"]


def test_which_packs_are_few_rows():
    """No more blocks of 64 queries than two a multiprocessor, and no segment that more of them would share."""
    small = HOPPER._replace(multiprocessors=4)
    packs = [(1, 129), (32, 256), (33, 256), (32, 257), (512, 256)]
    few = [warpgroups(forward(longest, card=small, T=rows, H=16)) == 0 for rows, longest in packs]
    assert few == [True, True, False, False, False]
    assert few == [warpgroups(backward(longest, card=small, T=rows, H=16)) == 0 for rows, longest in packs]
    tiles = [forward(n, card=small, T=1, H=16)[-1][1] for n in (64, 128, 129, 256)]
    assert [(tile.M, tile.N, tile.single) for tile in tiles] == [
        (64, 64, True), (64, 128, True), (64, 64, False), (64, 64, False)
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_no_tile_is_given_longer_segments_than_it_holds(dtype):
    """And loops have two stages or more: at one, they are miscompiled."""
    for capability, K, longest in itertools.product((75, 80, 90, 100, 120), (8, 64, 72, 80, 128), range(300)):
        card = Card("cuda", capability, 132)
        for name, how in forward(longest, K, dtype, card, T=16384) + backward(longest, K, dtype, card, T=16384):
            if name.startswith("hopper"):
                continue
            for tile in [how] if isinstance(how, Tile) else how:
                if tile.single or tile.stages < 2 or name == "triton_short":
                    assert longest <= tile.N and (tile.single or longest <= tile.M)


# Names


@pytest.mark.parametrize("name", [name for name in BACKENDS if name not in ("eager", "sdpa")])
def test_a_backend_asked_for_by_name_works_or_raises_with_the_reason(name):
    with pytest.raises(ValueError, match=rf"{name}.*cannot be used: .*(cannot be imported|needs)"):
        pack(name, dtype=torch.bfloat16)


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="unknown attn_implementation 'flash'.*torch_varlen"):
        pack("flash")


def test_reasons_are_numbers_and_names(forced):
    def reason(dtype=torch.bfloat16, K=72, backend="triton"):
        return why_not(backend, CPU, dtype, K)

    forced(card=Card("cpu"))
    assert reason() == "needs a CUDA device, the tensors are on cpu"
    assert reason(backend="sdpa") is reason(backend="eager") is None
    forced(card=Card("cuda", 80, 108))
    assert reason() is None
    assert reason(torch.float32) == "needs bfloat16 or float16, the tensors are torch.float32"
    for K in (60, 136):
        assert reason(K=K) == f"needs a head_dim that is a multiple of 8 up to 128, got {K}"
    forced(card=Card("cuda", 75, 40))
    assert reason() == "needs compute capability 8.0, this card has 7.5"
    assert reason(backend="sdpa") is reason(backend="eager") is None


def test_what_each_backend_needs():
    """FlashAttention 3 and 4 a Hopper card; outside backends take any head_dim that is a multiple of 8 up to 256."""
    assert choice.NEEDS.keys() == BACKENDS.keys() - {"eager", "sdpa"}
    for backend, (capability, head_dim) in choice.NEEDS.items():
        assert (capability, head_dim) == (90 if backend[-1] in "34" else 80, 128 if backend == "triton" else 256)
        card, dtype = Card("cuda", capability, 132), torch.bfloat16
        assert choice.attention_unmet(backend, card, dtype, head_dim) is None
        assert f"up to {head_dim}" in choice.attention_unmet(backend, card, dtype, head_dim + 8)
        older = card._replace(capability=capability - 5)
        assert f"capability {capability / 10}, this" in choice.attention_unmet(backend, older, dtype, head_dim)


@pytest.mark.parametrize("error", ["OSError('undefined symbol')", "ImportError('no ABI')", "RuntimeError('broken')"])
def test_a_broken_flash_attn_is_a_reason_not_a_crash(fresh, monkeypatch, tmp_path, error):
    (tmp_path / "flash_attn.py").write_text(f"raise {error}")
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    reason = why_not("flash_attention_2", torch.device("cuda"), torch.bfloat16, 72)
    kind, words = error[:-2].split("('")
    assert f"{kind}: {words}" in reason and "flash_attn.flash_attn_varlen_func cannot be imported" in reason


def test_flash_attention_4_gets_the_true_scale_when_head_dim_is_padded(monkeypatch):
    """Its stand-in sees 96 lanes, the scale of 72, keywords only, and returns (out, lse)."""
    seen = {}

    def flash(q, k, v, **kwargs):
        seen.update(kwargs, width=q.shape[-1])
        return kernels_ref.attention(q, k, v, kwargs["cu_seqlens_q"], softmax_scale=kwargs["softmax_scale"]), None

    module = types.ModuleType("flash_attn.cute")
    module.flash_attn_varlen_func = flash
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    lengths = [5, 35, 1]
    qkv = random_qkv(41, 2, 72, device=CPU).requires_grad_()
    attention = VarlenAttention(Segments(lengths), "flash_attention_4")
    out = attention.qkvpacked(qkv)
    assert (seen["width"], seen["softmax_scale"], seen["causal"]) == (96, 72**-0.5, False)
    with torch.no_grad():
        attention.qkvpacked(qkv)
    assert (seen["width"], seen["softmax_scale"]) == (72, 72**-0.5)
    assert (seen["max_seqlen_q"], seen["max_seqlen_k"]) == (35, 35)
    assert seen["cu_seqlens_q"].tolist() == seen["cu_seqlens_k"].tolist() == [0, 5, 40, 41]
    expected = kernels_ref.attention(*qkv.unbind(1), Segments(lengths).cu_seqlens)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


FLASH = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn.cute",
}


@pytest.fixture
def flash(fresh, monkeypatch):
    """`flash(backend, named=True)` -> the arguments of every call of that FlashAttention, whose stand-in runs anywhere.

    named: whether its signature has `deterministic`; None: it takes any keyword.
    """

    def plant(backend, named=True):
        calls = []

        def attend(q, k, v, cu_seqlens_q, softmax_scale, **kwargs):
            calls.append(kwargs)
            return kernels_ref.attention(q, k, v, cu_seqlens_q, softmax_scale=softmax_scale)

        def with_it(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
                    deterministic=False):  # fmt: skip
            return attend(q, k, v, cu_seqlens_q, softmax_scale, deterministic=deterministic)

        def without(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
            return attend(q, k, v, cu_seqlens_q, softmax_scale)

        for name in {"flash_attn", FLASH[backend]}:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        function = attend if named is None else with_it if named else without
        sys.modules[FLASH[backend]].flash_attn_varlen_func = function
        monkeypatch.delitem(choice.NEEDS, backend)
        fresh(attention=[backend, "sdpa"])
        return calls

    yield plant
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", FLASH)
@pytest.mark.parametrize("named", [True, None])
@pytest.mark.parametrize("warn_only", [False, True])
def test_flash_attention_is_asked_for_a_deterministic_backward(flash, backend, named, warn_only):
    calls, qkv = flash(backend, named), random_qkv(41, 2, 72, device=CPU).requires_grad_()

    def deterministic():
        calls.clear()
        pack(backend, gradients=True).qkvpacked(qkv)
        return {call.get("deterministic", False) for call in calls}

    assert deterministic() == {False}
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    assert deterministic() == {True}
    assert pack("auto", gradients=True).backend == backend
    torch.use_deterministic_algorithms(False)
    assert deterministic() == {False}


@pytest.mark.parametrize("backend", FLASH)
def test_another_runs_where_a_version_of_it_has_none(flash, backend, caplog):
    """By name it is refused; where torch is to warn only, it runs, and it is said."""
    flash(backend, named=False)
    assert pack("auto", gradients=True).backend == pack(backend, gradients=True).backend == backend
    torch.use_deterministic_algorithms(True)
    assert pack("auto", gradients=True).backend == "sdpa"
    assert pack("auto").backend == backend  # its forward is
    with pytest.raises(ValueError, match=f"{backend}' cannot be used: .*no deterministic backward"):
        pack(backend, gradients=True)
    assert not warnings(caplog)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert pack("auto", gradients=True).backend == pack(backend, gradients=True).backend == backend
    assert warnings(caplog) == [f"attention ({backend}): this version of it has no deterministic backward"]


def test_what_fails_in_deterministic_mode_is_refused_there_only(fresh, stand_in):
    def run(q, k, v, segments):
        if torch.are_deterministic_algorithms_enabled() and q.requires_grad:
            raise RuntimeError("does not have a deterministic implementation")
        return outside.sdpa(q, k, v, segments)

    stand_in(run)
    fresh(attention=[STAND_IN, "sdpa"])
    torch.use_deterministic_algorithms(True)
    try:
        assert pack("auto", gradients=True).backend == "sdpa"
    finally:
        torch.use_deterministic_algorithms(False)
    assert pack("auto", gradients=True).backend == STAND_IN


# Backends are checked


def test_auto_takes_sdpa_on_the_cpu_and_says_so_once(fresh, caplog):
    with caplog.at_level(logging.INFO, "siglip2_packed"):
        assert [pack("auto", True, [n]).backend for n in (16, 256, 4096)] == ["sdpa"] * 3
    assert [x.message for x in caplog.records] == ["attention: sdpa (cpu, float32, head_dim 72)"]


@pytest.mark.parametrize("wrong_input", ["q", "k", "v"])
def test_wrong_gradients_are_refused_by_name_with_the_numbers(fresh, stand_in, caplog, wrong_input):
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
        return outside.sdpa(*inputs, segments)

    stand_in(wrong)
    fresh(attention=[STAND_IN, "sdpa"])
    assert pack(STAND_IN).backend == pack("auto").backend == STAND_IN
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{STAND_IN}' cannot be used: .*self-check: .*d{wrong_input} 5\.0e-01"):
            pack(STAND_IN, gradients=True)
    assert pack("auto", gradients=True).backend == "sdpa"
    (warning,) = warnings(caplog)
    assert f"attention ({STAND_IN}) at head_dim 72 is not used on cpu in float32" in warning
    assert f"d{wrong_input} 5.0e-01" in warning and "bound 1e-05" in warning


@pytest.mark.parametrize("fault", ["nan", "scale", "raise", "inference", "training", "first key", "neighbour"])
def test_a_wrong_forward_is_refused(fresh, stand_in, caplog, fault):
    """With gradients asked for, too, if it is wrong without: frozen layers go that way."""

    def wrong(q, k, v, segments):
        if fault == "raise":
            raise RuntimeError("unsupported head_dim")
        if fault == "neighbour":
            moved = [n + (i == 0) - (i == 1) for i, n in enumerate(segments.lengths)]
            return outside.sdpa(q, k, v, Segments(moved))
        out = outside.sdpa(q, k, v, segments)
        if fault in ("inference", "training") and q.requires_grad == (fault == "inference"):
            return out
        if fault == "first key":
            first = torch.cat([x[:1].expand(len(x), 2, 72) for x in v.split(segments.lengths)])
            return out + 0.05 * (first - out)
        return out * float("nan") if fault == "nan" else out * 1.05

    stand_in(wrong)
    fresh(attention=[STAND_IN])
    refused = [fault != "training", True]
    for gradients in (False, True):
        if refused[gradients]:
            with pytest.raises(
                ValueError, match="failed its self-check: .*(RuntimeError: unsupported|forward|inference)"
            ):
                pack(STAND_IN, gradients, dtype=torch.bfloat16)
        assert pack("auto", gradients, dtype=torch.bfloat16).backend == ("eager" if refused[gradients] else STAND_IN)
    assert len(warnings(caplog)) == sum(refused)


def test_a_check_under_inference_mode_counts_for_training_too(fresh, monkeypatch):
    """Autocast does not reach it either."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert verdict_on("sdpa", CPU, torch.float32, 72, gradients=True).right
    monkeypatch.setattr(check, "_compare", lambda *_: pytest.fail("checked again"))
    assert pack("sdpa", gradients=True).backend == "sdpa"


def test_nothing_is_checked_while_a_graph_is_captured(fresh, stand_in, monkeypatch):
    """What was checked before runs; what was not is refused, this time."""
    calls, capture = [], pretend_to_capture(monkeypatch)
    stand_in(lambda *x: calls.append(1) or outside.sdpa(*x))
    fresh(attention=[STAND_IN, "sdpa"])
    capture(True)
    with pytest.raises(ValueError, match="has not been checked yet: run the model once before graph capture"):
        pack(STAND_IN)
    assert pack("auto").backend == "eager" and not calls
    capture(False)
    assert pack(STAND_IN).backend == pack("auto").backend == STAND_IN and calls
    capture(True)
    assert pack(STAND_IN).backend == STAND_IN
