"""The byte an element that attention keeps of its output for backward: what it is, who makes it, who reads it."""

import pytest
import torch
import triton
import triton.language as tl
from attention_inputs import (
    CUDA,
    DEVICE,
    assert_close,
    assert_same,
    few_tiles,
    loop,
    offsets,
    own,
    own_launches,
    random_qkv,
    with_gradients,
)
from transformers import Siglip2VisionConfig

from siglip2_packed import Siglip2PackedVisionModel
from siglip2_packed.ops.attention import VarlenAttention, eager, kernels, low_order, operators, triton_kernels
from siglip2_packed.ops.attention.operators import varlen_attention
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.segments import Segments
from siglip2_packed.workloads import SHAPES

HALF = [torch.float16, torch.bfloat16]
INFINITE = [float("inf"), float("-inf"), float("nan")]
ZERO = [0.0, -0.0]
SUBNORMAL = [6e-8, -6e-8, 1e-7, 3.3e-5, -5.9e-5, 1e-39, -7e-40]  # of float16, and of bfloat16
VANISHING = [1e-9, -2e-8, 1e-45, -1e-44]  # what rounds to zero in float16, or in both
LARGE = [65504.0, -65504.0, 65510.0, 65519.9]
OVERFLOWING = [65520.0, -7e4, 3.4e38, -3.4e38]
TIES = [1 + 2**-11, 1 + 2**-8, -1 - 3 * 2**-11, 1 - 2**-12]
LENGTHS = [5 * 28, 1, 40]  # beyond one tile: backward takes delta from the output


def numbers():
    normal = torch.randn(997, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 997)
    special = torch.tensor([*INFINITE, *ZERO, *SUBNORMAL, *VANISHING, *LARGE, *OVERFLOWING, *TIES])
    return torch.cat([special, normal])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_what_it_is(dtype):
    exact = numbers()
    out = exact.to(dtype)
    low = low_order.of(exact, out)
    restored, finite = low_order.restored(out, low), out.isfinite()
    assert low.dtype == torch.int8 and restored.dtype == torch.float32
    assert not low[~finite].any() and not low[exact == 0].any()
    unchanged = ~finite | (exact == 0)
    torch.testing.assert_close(restored[unchanged], out.float()[unchanged], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(restored.signbit()[~exact.isnan()], exact.signbit()[~exact.isnan()])
    before, left = (exact - out.float()).abs()[finite], (exact - restored).abs()[finite]
    assert (left <= before).all()
    normal = finite & (exact.abs() >= torch.finfo(dtype).tiny)
    assert ((exact - restored).abs()[normal] <= exact.abs()[normal] * torch.finfo(dtype).eps / 256).all()


@triton.jit
def through_kernels(x, out, low, restored, N: tl.constexpr, LOW: tl.constexpr):
    at = tl.arange(0, N)
    rounded = tl.load(out + at)
    tl.store(low + at, triton_kernels._low(tl.load(x + at), rounded, LOW).to(tl.int8))
    rows = tl.arange(0, 1)
    tl.store(restored + at[None, :], triton_kernels._restored(out, low, N, N, rows, 1, N, N, LOW))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_kernels_give_the_same_bytes(dtype):
    exact = torch.nn.functional.pad(numbers(), (0, 1024 - len(numbers()))).to(DEVICE)
    if dtype == torch.bfloat16 and not CUDA:
        exact[exact.abs() < torch.finfo(dtype).tiny] = 0  # the interpreter takes its subnormals for others
    out, low, restored = exact.to(dtype), torch.full_like(exact, 99, dtype=torch.int8), torch.full_like(exact, 99)
    through_kernels[(1,)](exact, out, low, restored, 1024, low_order.SHIFT[dtype])
    assert torch.equal(low, low_order.of(exact, out))
    assert torch.equal(restored.view(torch.int32), low_order.restored(out, low).view(torch.int32))


HALVES = [
    (0, 0), (-0.0, -0.0), (6e-8, 0), (-6e-8, 0), (6e-8, -6e-8), (65504, 65504), (-65504, -65504), (65504, 1),
    (float("inf"), 1), (-float("inf"), 2), (float("nan"), 1), (float("inf"), -float("inf")), (1, 1 + 2**-7),
    (-1, -1 - 2**-7), (1, 1 + 2**-10), (3, 2**-8), (-3, 2**-8), (1000, 0.37), (6e-5, 6e-8), (-5, 5),
]  # fmt: skip


@pytest.mark.parametrize("name", ["triton", pytest.param("hopper", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("K", [64, 72])
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def test_forward_keeps_it(name, K, dtype):
    """Of two values whose weights are alike: half their sum, which nothing but the last step rounds. In each lane."""
    card, H = choice.card(DEVICE), 2
    if name == "hopper" and card.capability != 90:
        pytest.skip("needs compute capability 9.0")
    how = 2 if name == "hopper" else choice.attention_forward(card, dtype, 200, H, K, 200)[-1][1]
    pairs = torch.tensor([HALVES[i % len(HALVES)] for i in range(H * K)], device=DEVICE).T.view(2, H, K).to(dtype)
    q, k = torch.zeros(2, H, K, dtype=dtype, device=DEVICE), random_qkv(2, H, K, dtype)[:, 0].contiguous()
    out, low, lse = torch.empty_like(q), torch.full((2, H, K), 99, dtype=torch.int8, device=DEVICE), torch.empty(H, 2)
    kernels.implementation("forward", (name, how))(how, q, k, pairs, out, low, lse.to(DEVICE), offsets([2]), 2, K**-0.5)
    exact = ((pairs[0].float() + pairs[1].float()) / 2).expand(2, H, K)
    torch.testing.assert_close(out, exact.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(low, low_order.of(exact, exact.to(dtype)))
    assert low.any()


def inputs(dtype=torch.float16, lengths=LENGTHS, K=72):
    qkv = random_qkv(sum(lengths), 2, K, dtype)
    return qkv, random_qkv(sum(lengths), 2, K, dtype, seed=1)[:, 0].contiguous()


def kept_for_backward(run):
    """Bytes."""
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: found.append(x) or x, lambda x: x):
        run()
    return sum({x.data_ptr(): x.nbytes for x in found}.values())


def test_a_byte_an_element_is_kept():
    qkv, _ = inputs()
    cu, longest = offsets(LENGTHS), max(LENGTHS)
    q, k, v = (x.detach().requires_grad_() for x in qkv.unbind(1))
    bytes_kept = kept_for_backward(lambda: varlen_attention(q, k, v, cu, longest))
    q_k_v_and_out, lse = 4 * q.nbytes, 2 * sum(LENGTHS) * 4
    assert bytes_kept == q_k_v_and_out + lse + cu.nbytes + q.numel()


@pytest.mark.parametrize(("dtype", "lengths"), [(torch.float32, [40]), (torch.float16, [16, 5])], ids=str)
def test_none_where_backward_reads_none(dtype, lengths):
    """Nothing is rounded, or the kernel has whole rows of p."""
    qkv, _ = inputs(dtype, lengths)
    assert own_launches(qkv, offsets(lengths), max(lengths), packed=True)
    with torch.no_grad():
        _, low, _ = own(offsets(lengths), max(lengths)).forward(qkv, gradients=True)
    assert low is None


def test_inference_has_none(monkeypatch):
    """Neither where gradients are off, nor where nobody wants one."""
    qkv, _ = inputs()
    cu, longest = offsets(LENGTHS), max(LENGTHS)
    attention, place = own(cu, longest), torch.empty_like(qkv[:, 0], memory_format=torch.contiguous_format)
    q, k, v = (x.contiguous() for x in qkv.unbind(1))
    lows, run = [], operators.run_forward

    def seen(*arguments):
        found = run(*arguments)
        lows.append(found[1])
        return found

    monkeypatch.setattr(operators, "run_forward", seen)
    with torch.no_grad():
        results = [attention.qkvpacked(qkv), attention(q, k, v), attention.over(qkv, place)()]
    results.append(varlen_attention(q, k, v, cu, longest))
    out, low, _ = torch.ops.siglip2_packed.varlen_attention(q, k, v, cu, longest, 72**-0.5, gradients=False)
    assert low.numel() == 0 and lows == [None] * 4
    assert_same(results, [out] * 4)
    q.requires_grad_()
    varlen_attention(q, k, v, cu, longest)
    assert lows[-1].shape == out.shape


@pytest.mark.parametrize("K", [64, 72])
@pytest.mark.parametrize("rows", [256, 1024])
def test_backward_reads_it(rows, K):
    """dq at a shared mean of ten is as exact as without one, and drowns without the byte."""
    qkv, grad = random_qkv(rows, 1, K), random_qkv(rows, 1, K, seed=1)[:, 0].half()
    qkv[:, 1:] += 10 * random_qkv(1, 1, K, seed=5)[:, 1:]
    qkv, cu = qkv.half(), offsets([rows])
    q, k, v = qkv.unbind(1)
    exact = with_gradients(lambda *x: loop(*x, [rows]), [x.double() for x in (q, k, v)], grad)
    attention = own(cu, rows)
    with torch.no_grad(), few_tiles(rows):
        out, low, lse = attention.forward(qkv, gradients=True)
        found = []
        for kept in (low, None):
            dqkv = torch.full_like(qkv, float("nan"))
            attention.backward(grad, qkv, out, kept, lse, dqkv)
            found.append(dqkv.unbind(1))
    assert_close([out, *found[0]], exact, 1e-3 if not CUDA else 3.75e-3)
    error, without = ((dq.double() - exact[1]).norm() for dq, _, _ in found)
    assert without > 2 * error


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_by_torch(dtype):
    """`eager.forward`, which runs in compiled code and is what kernels are compared with."""
    q, k, v = inputs(dtype)[0].unbind(1)
    out, low, lse = torch.empty_like(q), torch.empty(q.shape, dtype=torch.int8, device=DEVICE), torch.empty(2, len(q))
    eager.forward(q, k, v, out, low, lse.to(DEVICE), offsets(LENGTHS), max(LENGTHS), 72**-0.5)
    exact = loop(q, k, v, LENGTHS)
    assert_close([low_order.restored(out, low)], [exact], 2e-5)


def test_compiled_code_keeps_it():
    """The same gradients to the bit."""
    qkv, grad = inputs()
    cu, longest = offsets(LENGTHS), max(LENGTHS)
    step = torch.compile(own(cu, longest), backend="aot_eager", fullgraph=True)
    assert_same(
        with_gradients(step, qkv.unbind(1), grad),
        with_gradients(lambda *x: varlen_attention(*x, cu, longest), qkv.unbind(1), grad),
    )


def test_operators_are_well_formed():
    qkv, cu = random_qkv(20, 2, 64, torch.float16), offsets([17, 3])
    op = torch.ops.siglip2_packed.varlen_attention.default
    for gradients in (True, False):
        torch.library.opcheck(
            op, (*qkv.unbind(1), cu, 17, 0.1, gradients), test_utils=("test_schema", "test_faketensor")
        )


def test_layers_keep_a_byte_an_element(monkeypatch):
    """Fused layers: their saved tensors grow by one byte an element of the output, and no more."""
    config = Siglip2VisionConfig(**SHAPES["tiny"] | {"num_hidden_layers": 2})
    encoder = Siglip2PackedVisionModel(config).encoder.to(DEVICE, torch.bfloat16)
    found = []
    for reads_low in (False, True):
        chosen = kernels.Kernels(eager.forward, eager.backward, (), reads_low)
        monkeypatch.setattr(operators, "for_tensors", lambda *_, chosen=chosen: chosen)
        x = torch.randn(9, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        attention = VarlenAttention(Segments([5, 4], DEVICE), "triton")
        found.append(kept_for_backward(lambda: encoder(x, attention)))
    assert found[1] - found[0] == 2 * 9 * 64


@pytest.mark.parametrize("hidden_states", [False, True])
def test_no_layer_keeps_it_where_nothing_is_recorded(monkeypatch, hidden_states):
    """Also where layers run one by one; the backward's kernels are not looked for either."""
    encoder = Siglip2PackedVisionModel(Siglip2VisionConfig(**SHAPES["tiny"])).encoder.to(DEVICE, torch.bfloat16)
    asked = []

    def chosen(q, cu_seqlens, max_seqlen, packed, gradients, invariant):
        asked.append(gradients)
        return kernels.Kernels(eager.forward, None, ())

    monkeypatch.setattr(operators, "for_tensors", chosen)
    x = torch.randn(9, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            encoder(x, VarlenAttention(Segments([5, 4], DEVICE), "triton"), hidden_states)
    assert asked and not any(asked)
