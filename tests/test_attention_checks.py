"""Our own attention kernels are checked before they run. Kernels with faults take the place of theirs, by name.

On a machine without a CUDA device those for Hopper are played by torch, on the launches that a Hopper card would have.
"""

import itertools
import sys
import types

import pytest
import torch
from attention_inputs import (
    DEVICE,
    assert_close,
    assert_same,
    forgotten,
    loop,
    offsets,
    own,
    pretend_to_capture,
    random_qkv,
    warnings,
    with_gradients,
    written_out,
)

from siglip2_packed.ops.attention import (
    Refused,
    VarlenAttention,
    buckets_unmet,
    eager,
    for_bucket,
    for_pack,
    kernels,
    operators,
)
from siglip2_packed.ops.runtime import check, choice
from siglip2_packed.ops.runtime.base2 import LOG2_E
from siglip2_packed.ops.runtime.choice import Card
from siglip2_packed.ops.segments import Segments

HOPPER = Card("cuda", 90, 1)
"""On which hardly any rows are few."""
LENGTHS = [5, 17, 131]


@pytest.fixture
def fresh(forced):
    """`forced`, where nothing was imported, said, checked or chosen before."""
    with forgotten():
        forced()
        yield forced


@pytest.fixture
def planted(fresh, monkeypatch):
    """`planted("forward", "hopper", function)`: that kernel is `function`, called as `function(how, q, k, v, ...)`."""
    module = types.ModuleType("stand_ins")
    monkeypatch.setitem(sys.modules, "stand_ins", module)

    def plant(direction, name, function):
        setattr(module, f"{direction}_{name}", function)
        table = kernels.FORWARD if direction == "forward" else kernels.BACKWARD
        monkeypatch.setitem(table, name, ("stand_ins", f"{direction}_{name}"))

    return plant


def checked_launches(dtype=torch.float16, packed=False):
    shape = sum(LENGTHS), 2, 72
    return kernels.kernels(DEVICE, dtype, shape, len(LENGTHS), max(LENGTHS), packed=packed, gradients=True).launches


# Kernels that take their place


def compute_forward(how, *arguments):
    eager.forward(*arguments)


def compute_backward(how, *arguments):
    eager.backward(*arguments)


def wrong_forward(fault):
    """`eager.forward` with a fault."""

    def run(how, q, k, v, out, low, lse, cu_seqlens, max_seqlen, scale):
        last = int(cu_seqlens[-1])
        if fault == "does not compile":
            raise RuntimeError("no such layout")
        if fault == "scale of padded lanes":
            scale = 80**-0.5
        if fault == "offsets beside":
            cu_seqlens = cu_seqlens + (cu_seqlens == cu_seqlens[1]).int()
        if fault == "keys of a tile only":
            k, v = k.clone(), v.clone()
            for begin, end in itertools.pairwise(cu_seqlens.tolist()):
                k[begin + 64 : end], v[begin + 64 : end] = 0, 0
        before = out.clone()
        eager.forward(q, k, v, out, low, lse, cu_seqlens, max_seqlen, scale)
        if fault == "is wrong":
            out *= 1.5
        if fault == "is NaN":
            out.fill_(float("nan"))
        if fault == "a row left out":
            out[last - 1] = before[last - 1]
        if fault == "rows beyond left out":
            out[last:] = before[last:]
        if fault == "natural logarithm":
            lse *= 0.6931
        if fault == "low part left out":
            low.zero_()
        if fault == "low part of the other sign":
            low.neg_()
        if fault == "low part of another row":
            low[1:] = low[:-1].clone()

    return run


def wrong_backward(fault):
    """`eager.backward` with a fault."""

    def run(how, grad, q, k, v, out, low, lse, dq, dk, dv, cu_seqlens, max_seqlen, scale):
        last = int(cu_seqlens[-1])
        if fault == "does not compile":
            raise RuntimeError("no such layout")
        if fault == "offsets beside":
            cu_seqlens = cu_seqlens + (cu_seqlens == cu_seqlens[1]).int()
        before = dk.clone()
        eager.backward(grad, q, k, v, out, low, lse, dq, dk, dv, cu_seqlens, max_seqlen, scale)
        if fault.startswith("delta"):
            for begin, end in itertools.pairwise(cu_seqlens.tolist()):
                of = out if fault == "delta of the rounded output" else out * 0
                g, q_s, k_s, v_s, o = (x[begin:end].transpose(0, 1).float() for x in (grad, q, k, v, of))
                p = torch.exp2(q_s @ k_s.mT * (scale * LOG2_E) - lse[:, begin:end, None])
                ds = p * (g @ v_s.mT - (g * o).sum(-1, keepdim=True)) * scale
                dq[begin:end], dk[begin:end] = (ds @ k_s).transpose(0, 1), (ds.mT @ q_s).transpose(0, 1)
        if fault == "is wrong":
            dq *= 1.5
        if fault == "is NaN":
            dk.fill_(float("nan"))
        if fault == "scale left out":
            dk *= 1 / scale
        if fault == "dk and dv swapped":
            dk[:], dv[:] = dv.clone(), dk.clone()
        if fault == "a row left out":
            dk[last - 1] = before[last - 1]
        if fault == "rows beyond left out":
            dk[last:] = before[last:]
        if fault == "writes beside":
            dq.as_strided((8,), (1,), dq.storage_offset() - 8).zero_()

    return run


SAYS = {
    "does not compile": "RuntimeError: no such layout",
    "is wrong": "5.0e-01",
    "is NaN": "nan",
    "natural logarithm": "lse 3.1e-01",
    "a row left out": "nan",
    "rows beyond left out": "nan",
    "writes beside": "RuntimeError: it writes beside its rows",
}
FORWARD_FAULTS = [
    "does not compile", "is wrong", "is NaN", "scale of padded lanes", "offsets beside", "keys of a tile only",
    "a row left out", "rows beyond left out", "natural logarithm",
]  # fmt: skip
BACKWARD_FAULTS = [
    "does not compile", "is wrong", "is NaN", "delta left out", "delta of the rounded output", "offsets beside",
    "scale left out", "dk and dv swapped", "a row left out", "rows beyond left out", "writes beside",
]  # fmt: skip
LOW_FAULTS = ["low part left out", "low part of the other sign", "low part of another row"]
FAULTS = [*itertools.product(["forward"], FORWARD_FAULTS), *itertools.product(["backward"], BACKWARD_FAULTS)]


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize(("direction", "fault"), [("forward", ""), ("backward", ""), *FAULTS])
@pytest.mark.parametrize("launch", [("hopper", 2), ("hopper", 3), ("hopper_one_pass", 2)], ids=str)
def test_faults_that_the_check_catches(fresh, planted, direction, fault, packed, launch):
    planted(direction, launch[0], (wrong_forward if direction == "forward" else wrong_backward)(fault))
    verdict = kernels.verdict_on(direction, launch, DEVICE, torch.float16, 2, 72, packed)
    assert verdict.right == (not fault)
    assert SAYS.get(fault, "bound") in str(verdict)


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize("fault", ["", *FORWARD_FAULTS, *LOW_FAULTS])
def test_faults_of_a_forward_in_training(fresh, planted, fault, packed):
    """What it keeps of the output's rounding is compared, too."""
    planted("forward", "hopper", wrong_forward(fault))
    verdict = kernels.verdict_on("forward", ("hopper", 3), DEVICE, torch.float16, 2, 72, packed, low=True)
    assert verdict.right == (not fault)
    assert SAYS.get(fault, "bound") in str(verdict)


OUTCOMES = "does not compile", "is wrong", "is NaN"


@pytest.mark.parametrize(("direction", "fault"), [x for x in FAULTS if x[1] in OUTCOMES])
def test_triton_runs_where_a_hopper_kernel_fails_its_check(fresh, planted, caplog, direction, fault):
    """The reason is logged once; the results are Triton's, and the kernel is never launched on the pack."""
    rows = []
    faulty = (wrong_forward if direction == "forward" else wrong_backward)(fault)
    other = "backward" if direction == "forward" else "forward"
    planted(direction, "hopper", lambda how, *tensors: rows.append(len(tensors[0])) or faulty(how, *tensors))
    planted(other, "hopper", compute_backward if other == "backward" else compute_forward)
    fresh(card=HOPPER)
    qkv, grad = random_qkv(153, 2, 72, torch.float16), random_qkv(153, 2, 72, torch.float16, 1)[:, 0]
    exact = with_gradients(lambda *x: loop(*x, LENGTHS), qkv.unbind(1), grad)
    for _ in range(2):
        assert_close(with_gradients(own(offsets(LENGTHS), 131), qkv.unbind(1), grad), exact, 2e-3)
    names = dict(zip(("forward", "backward"), [name for name, _ in checked_launches()]))
    assert names == {direction: "triton", other: "hopper"}
    assert rows and 153 not in rows
    (warning,) = warnings(caplog)
    heads = "2 heads of 72" + " in training" * (direction == "forward")
    assert f"attention.{direction} (hopper) for {heads} is not used on {DEVICE} in float16: " in warning
    assert SAYS[fault] in warning


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_triton_runs_where_gluon_cannot_be_had(fresh, planted, monkeypatch, caplog, direction):
    monkeypatch.setitem(sys.modules, f"siglip2_packed.ops.attention.hopper_{direction}", None)
    other = "backward" if direction == "forward" else "forward"
    planted(other, "hopper", compute_backward if other == "backward" else compute_forward)
    fresh(card=HOPPER)
    qkv = random_qkv(153, 2, 72, torch.float16)
    exact = with_gradients(lambda *x: loop(*x, LENGTHS), qkv.unbind(1), qkv[:, 0])
    for _ in range(2):
        assert_close(with_gradients(own(offsets(LENGTHS), 131), qkv.unbind(1), qkv[:, 0]), exact, 2e-3)
    (warning,) = warnings(caplog)
    assert warning.startswith(f"attention.{direction} (hopper): siglip2_packed.ops.attention.hopper_{direction}")
    assert "cannot be imported (ModuleNotFoundError" in warning


@pytest.mark.parametrize(("direction", "wrong"), [("forward", wrong_forward), ("backward", wrong_backward)])
def test_none_of_our_own_runs_where_none_is_right(fresh, planted, caplog, direction, wrong):
    """By name it is refused, with the numbers; "auto" goes on; those who have it already get an error, or another."""
    for name in ("hopper", "triton"):
        planted(direction, name, wrong("is wrong"))
    other = "backward" if direction == "forward" else "forward"
    planted(other, "hopper", compute_backward if other == "backward" else compute_forward)
    fresh(card=HOPPER, attention=["triton", "sdpa"])

    def take(requested, gradients):
        return for_pack(Segments(LENGTHS, DEVICE), requested, torch.float16, 2, 72, gradients)

    for gradients in (False, True):
        if gradients or direction == "forward":
            with pytest.raises(ValueError, match=rf"triton'.*failed its self-check: its {direction}: .* 5\.0e-01"):
                take("triton", gradients)
            assert take("auto", gradients).backend == "sdpa"
        else:
            assert take("triton", gradients).backend == take("auto", gradients).backend == "triton"
    inference = 2 if direction == "forward" else 0
    assert len(warnings(caplog)) == inference + 2
    qkv = random_qkv(153, 2, 72, torch.float16)
    exact = with_gradients(lambda *x: loop(*x, LENGTHS), qkv.unbind(1), qkv[:, 0])
    by_name = VarlenAttention(Segments(LENGTHS, DEVICE), "triton")
    for _ in range(2):
        for run in (
            lambda: with_gradients(by_name, qkv.unbind(1), qkv[:, 0]),
            lambda: written_out(by_name, qkv, qkv[:, 0]),
        ):
            with pytest.raises(Refused, match=rf"its {direction}: .* 5\.0e-01"):
                run()
        by_auto = VarlenAttention(Segments(LENGTHS, DEVICE), "triton", otherwise="sdpa")
        assert_close(with_gradients(by_auto, qkv.unbind(1), qkv[:, 0]), exact, 2e-3)
    assert len(warnings(caplog)) == inference + 4  # of the layout that was not asked for before


@pytest.mark.parametrize(("direction", "wrong"), [("forward", wrong_forward), ("backward", wrong_backward)])
def test_compiled_code_has_torchs_where_none_of_our_own_is_right(fresh, planted, direction, wrong):
    """Nobody is there to choose something else."""
    for name in ("hopper", "triton"):
        planted(direction, name, wrong("is wrong"))
    other = "backward" if direction == "forward" else "forward"
    planted(other, "hopper", compute_backward if other == "backward" else compute_forward)
    fresh(card=HOPPER)
    qkv, cu = random_qkv(153, 2, 72, torch.float16), offsets(LENGTHS)
    exact = with_gradients(lambda *x: loop(*x, LENGTHS), qkv.unbind(1), qkv[:, 0])

    def operator(q, k, v):
        return torch.ops.siglip2_packed.varlen_attention(q, k, v, cu, 131, 72**-0.5)[0]

    assert_close(with_gradients(operator, qkv.unbind(1), qkv[:, 0]), exact, 2e-3)
    compiled = torch.compile(own(cu, 131), backend="aot_eager")
    assert_close(with_gradients(compiled, qkv.unbind(1), qkv[:, 0]), exact, 2e-3)


def test_what_is_refused_for_one_layout_is_sdpas_in_another_where_auto_chose(fresh, planted):
    """Own kernels that are right for a fused projection only: for separate tensors, the next backend."""

    def right_when_packed(how, q, *rest):
        eager.forward(q, *rest)
        if q.is_contiguous():
            rest[2].mul_(1.5)

    for name in ("hopper", "triton"):
        planted("forward", name, right_when_packed)
    fresh(card=HOPPER, attention=["triton", "sdpa"])
    qkv = random_qkv(153, 2, 72, torch.float16)
    exact = [loop(*qkv.unbind(1), LENGTHS)]
    separate = [x.contiguous() for x in qkv.unbind(1)]
    for requested in ("auto", "triton"):
        attention = for_pack(Segments(LENGTHS, DEVICE), requested, torch.float16, 2, 72, False)
        assert attention.backend == "triton"
        for taken in (attention, attention.to(DEVICE), attention.to("meta").to(DEVICE)):
            with torch.no_grad():
                assert_close([taken.qkvpacked(qkv)], exact, 2e-3)
                if requested == "auto":
                    assert_close([taken(*separate)], exact, 2e-3)
                else:
                    with pytest.raises(Refused, match="its forward: .* 5.0e-01"):
                        taken(*separate)


def test_a_check_under_inference_mode_counts_for_training_too(fresh, monkeypatch):
    """Autocast does not reach it either."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        own(offsets(LENGTHS), 131).forward(random_qkv(153, 2, 72), gradients=True)
    monkeypatch.setattr(check, "_compare", lambda *_: pytest.fail("checked again"))
    assert [name for name, _ in checked_launches(torch.float32, packed=True)] == ["triton", "triton"]


def test_own_kernels_are_not_checked_while_a_graph_is_captured(fresh, planted, monkeypatch):
    """One that was checked takes the place of a better one that was not, until it can be checked."""
    planted("forward", "hopper", compute_forward)
    planted("backward", "hopper", compute_backward)
    fresh(card=HOPPER)
    qkv, cu = random_qkv(153, 2, 72, torch.float16), offsets(LENGTHS)
    capture = pretend_to_capture(monkeypatch)
    capture(True)
    for call in (
        lambda q, k, v: own(cu, 131)(q, k, v),
        lambda q, k, v: operators.varlen_attention(q, k, v, cu, 131),
        lambda q, k, v: torch.ops.siglip2_packed.varlen_attention(q, k, v, cu, 131, 0.1),
        lambda *_: own(cu, 131).forward(qkv),
    ):
        with pytest.raises(Refused, match="run the model once before graph capture"):
            call(*qkv.unbind(1))
    capture(False)
    _, tile = choice.attention_forward(HOPPER, torch.float16, 153, 2, 72, 131)
    _, tiles = choice.attention_backward(HOPPER, torch.float16, 153, 3, 2, 72, 131)
    with choice.forced(attention_forward=[tile], attention_backward=[tiles]):
        assert [name for name, _ in checked_launches()] == ["triton", "triton"]
    capture(True)
    assert [name for name, _ in checked_launches()] == ["triton", "triton"]
    capture(False)
    assert [name for name, _ in checked_launches()] == ["hopper", "hopper"]
    capture(True)
    assert [name for name, _ in checked_launches()] == ["hopper", "hopper"]


def test_kernels_get_the_tensors_as_they_are(fresh, planted):
    """Views of the projection and of its gradient, no copies; and how they are launched."""
    seen = {}

    def record(name, run):
        return lambda *arguments: seen.__setitem__(name, arguments) or run(*arguments)

    planted("forward", "hopper", record("forward", compute_forward))
    planted("backward", "hopper", record("backward", compute_backward))
    fresh(card=HOPPER)
    qkv, cu = random_qkv(153, 2, 72, torch.float16), offsets(LENGTHS)
    grad, dqkv = random_qkv(153, 2, 72, torch.float16, 1)[:, 0], torch.empty_like(qkv)
    attention = own(cu, 131)
    out, low, lse = attention.forward(qkv, gradients=True)
    attention.backward(grad, qkv, out, low, lse, dqkv)
    expected = {
        "forward": (3, *qkv.unbind(1), out, low, lse, cu, 131, 72**-0.5),
        "backward": (3, grad, *qkv.unbind(1), out, low, lse, *dqkv.unbind(1), cu, 131, 72**-0.5),
    }
    for name, arguments in expected.items():
        for given, wanted in zip(seen[name], arguments, strict=True):
            if not torch.is_tensor(wanted):
                assert given == wanted
                continue
            assert given.data_ptr() == wanted.data_ptr() and given.stride() == wanted.stride()
    assert (lse.shape, lse.dtype, lse.is_contiguous()) == ((2, 153), torch.float32, True)


def test_a_bucket_of_wrong_kernels_is_refused(fresh, planted):
    planted("forward", "triton", wrong_forward("is wrong"))
    fresh(card=HOPPER)
    with pytest.raises(Refused, match=r"attention in buckets cannot be had: failed its self-check: .* 5\.0e-01"):
        for_bucket(Segments.on_device(offsets([5, 17, 0, 0]), 32), 40, torch.float16, 2, 72, False)


def test_attention_in_buckets_is_our_own_or_an_error(fresh):
    """Segments that only the device knows, among rows of which some belong to none."""
    cu, qkv = offsets([5, 17, 0, 0]), random_qkv(40, 2, 72, torch.float16)
    segments = Segments.on_device(cu, 32)
    if DEVICE.type == "cpu":
        assert "needs a CUDA device" in buckets_unmet(DEVICE, torch.float16, 72)
        with pytest.raises(Refused, match="attention in buckets cannot be had: needs a CUDA device"):
            for_bucket(segments, 40, torch.float16, 2, 72, False)
    fresh(card=HOPPER)
    assert buckets_unmet(DEVICE, torch.float16, 72) is None
    for dtype, K in ((torch.float32, 72), (torch.float16, 60)):
        reason = buckets_unmet(DEVICE, dtype, K)
        assert reason
        with pytest.raises(Refused, match=reason):
            for_bucket(segments, 40, dtype, 2, K, False)
    with torch.no_grad():
        out = for_bucket(segments, 40, torch.float16, 2, 72, False).qkvpacked(qkv)
    assert_close([out], [loop(*qkv.unbind(1), [5, 17])], 2e-3)
    assert (out[22:] == 0).all()
    assert_same([out[:22]], [own(offsets([5, 17]), 17)(*qkv[:22].unbind(1))])
