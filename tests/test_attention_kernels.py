"""What only our own attention kernels promise: any strides, rows of no segment, tiles, operators, errors."""

import itertools

import pytest
import torch
from attention_inputs import (
    CUDA,
    DEVICE,
    EXACT,
    PACKS,
    assert_as_good_as_torch,
    assert_close,
    assert_same,
    loop,
    offsets,
    own,
    own_launches,
    poison,
    random_qkv,
    with_gradients,
    written_out,
)

from siglip2_packed.ops.attention import Refused, VarlenAttention, cases, kernels
from siglip2_packed.ops.attention.operators import varlen_attention
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.choice import Card, Tile
from siglip2_packed.ops.segments import Segments


def rows_and_gradient(T, K, dtype=torch.float32, H=2):
    return random_qkv(T, H, K, dtype), random_qkv(T, H, K, dtype, seed=1)[:, 0].contiguous()


@pytest.mark.parametrize("lengths", [[64, 17, 1], [100, 65, 3]], ids=str)
def test_half_precision_tiles(lengths):
    """float16 takes other kernels and tiles than float32: one tile a segment, up to 64 and up to 128 rows."""
    qkv, grad = rows_and_gradient(sum(lengths), 72, torch.float16)
    cu, longest = offsets(lengths), max(lengths)
    assert own_launches(qkv, cu, longest)
    actual = with_gradients(lambda *x: varlen_attention(*x, cu, longest), qkv.unbind(1), grad)
    assert_close(actual, with_gradients(lambda *x: loop(*x, lengths), qkv.unbind(1), grad), 2e-3)


@pytest.mark.parametrize("K", [8, 24, 40, 56, 88, 96, 120])
def test_other_head_dims(K):
    lengths = [5, 33, 9]
    qkv, grad = rows_and_gradient(47, K)
    assert own_launches(qkv, offsets(lengths), 33)
    actual = with_gradients(lambda *x: varlen_attention(*x, offsets(lengths), 33), qkv.unbind(1), grad)
    assert_close(actual, with_gradients(lambda *x: loop(*x, lengths), qkv.unbind(1), grad), EXACT)


def test_strides():
    """Views of any layout: heads first, a gap between rows, strides that are no multiple of 8, an expanded gradient."""
    lengths, H, K = [9, 7, 24], 2, 72
    q = random_qkv(40, H, K)[:, 0].transpose(0, 1).contiguous().transpose(0, 1)
    k = random_qkv(40, H, K + 8, seed=1)[:, 1, :, :K]
    v = random_qkv(40, H, K + 3, seed=2)[:, 1, :, 3:]
    assert own_launches(random_qkv(40, H, K), offsets(lengths), 24)
    for grad in (random_qkv(40, H, K, seed=3)[:, 2], torch.ones(1, 1, 1, device=DEVICE).expand(40, H, K)):
        actual = with_gradients(lambda *x: varlen_attention(*x, offsets(lengths), 24), (q, k, v), grad)
        assert_close(actual, with_gradients(lambda *x: loop(*x, lengths), (q, k, v), grad), EXACT)


@pytest.mark.parametrize("max_seqlen", [30, 40])
def test_the_softmax_scale(max_seqlen):
    """By default that of the true head_dim: one of 80 ** -0.5 or 128 ** -0.5 would move the result far more."""
    qkv = 3 * random_qkv(30, 2, 72)
    cu = offsets([30])
    default = varlen_attention(*qkv.unbind(1), cu, max_seqlen)
    assert torch.equal(default, varlen_attention(*qkv.unbind(1), cu, max_seqlen, softmax_scale=72**-0.5))
    assert_close([default], [loop(*qkv.unbind(1), [30], 72**-0.5)], EXACT)
    assert_close([varlen_attention(*qkv.unbind(1), cu, max_seqlen, 0.3)], [loop(*qkv.unbind(1), [30], 0.3)], EXACT)


@pytest.mark.parametrize("lengths", PACKS, ids=str)
@pytest.mark.parametrize("tail", [2, 70])
def test_rows_beyond_the_last_segment(lengths, tail):
    """They may hold NaN: their outputs and gradients are zeros, and no other row notices."""
    rows = sum(lengths)
    qkv, grad = rows_and_gradient(rows + tail, 72)
    qkv[rows:], grad[rows:] = float("nan"), float("nan")
    run = own(offsets(lengths), max(lengths))
    poison(qkv.shape, grad.shape, dtype=qkv.dtype)
    padded = with_gradients(run, qkv.unbind(1), grad)
    exact = with_gradients(own(offsets(lengths), max(lengths)), qkv[:rows].unbind(1), grad[:rows])
    out, _, dqkv = written_out(run, qkv, grad)
    for results in (padded, [out, *dqkv.unbind(1)]):
        for actual, expected in zip(results, exact, strict=True):
            assert torch.equal(actual[:rows], expected)
            assert (actual[rows:] == 0).all()


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_no_segments(rows, lengths):
    """`cu_seqlens = [0]`, with and without rows; a pack whose segments are empty; all attached to the graph."""
    cu, qkv, grad = offsets(lengths), random_qkv(rows, 2, 72), torch.ones(rows, 2, 72, device=DEVICE)
    poison(qkv.shape, dtype=qkv.dtype)
    packed = with_gradients(own(cu, 0).qkvpacked, [qkv], grad)
    assert [x.shape for x in packed] == [(rows, 2, 72), (rows, 3, 2, 72)]
    separate = with_gradients(lambda *x: varlen_attention(*x, cu, 0), qkv.unbind(1), grad)
    out, _, dqkv = written_out(own(cu, 0), qkv, grad)
    assert all((x == 0).all() for x in (*packed, *separate, out, dqkv))


@pytest.mark.parametrize("lengths", [[0, 5, 0, 0, 17], [0, 40, 0, 3, 0]], ids=str)
def test_empty_segments_change_no_bit_of_the_others(lengths):
    qkv, grad = rows_and_gradient(sum(lengths), 72)
    without = own(offsets([length for length in lengths if length]), max(lengths))
    expected = with_gradients(without, qkv.unbind(1), grad)
    assert_close(expected, with_gradients(lambda *x: loop(*x, lengths), qkv.unbind(1), grad), EXACT)
    assert_same(with_gradients(own(offsets(lengths), max(lengths)), qkv.unbind(1), grad), expected)


@pytest.mark.parametrize("K", [64, 72])
def test_a_generous_max_seqlen_changes_nothing(K):
    lengths = [5, 30, 17]
    qkv, grad = rows_and_gradient(52, K)
    results = [
        with_gradients(lambda *x: varlen_attention(*x, offsets(lengths), longest), qkv.unbind(1), grad)
        for longest in (30, 100)
    ]
    assert_close(*results, EXACT)


@pytest.mark.parametrize(("change", "message"), [
    (dict(q=torch.zeros(9, 2, 64, device=DEVICE)), r"shape of q, \[9, 2, 64\], got \[10, 2, 64\]"),
    (dict(k=torch.zeros(10, 2, 64, device=DEVICE, dtype=torch.float16)), "k is torch.float16"),
    (dict(q=torch.zeros(10, 128, device=DEVICE)), r"q must be \[T, H, K\], got \[10, 128\]"),
    (dict(v=torch.zeros(10, 64, 2, device=DEVICE).mT), "last dimension must be contiguous, got stride 2"),
    (dict(cu_seqlens=torch.tensor([0, 10], device=DEVICE)), r"\[S\+1\] int32, got \[2\] torch.int64"),
    (dict(cu_seqlens=torch.zeros(0, device=DEVICE, dtype=torch.int32)), r"\[S\+1\] int32, got \[0\] torch.int32"),
    (dict(cu_seqlens=torch.tensor([0, 7, 10], device=DEVICE, dtype=torch.int32)[::2]), "contiguous, got stride 2"),
    (dict(cu_seqlens=torch.tensor([0, 10], dtype=torch.int32, device="meta")), "cu_seqlens is on meta"),
    (dict(max_seqlen=torch.tensor(10)), "Python int, got Tensor"),
    (dict(max_seqlen=10.0), "Python int, got float"),
    (dict(softmax_scale=0.0), "softmax_scale must be positive, got 0.0"),
    (dict(softmax_scale=float("nan")), "softmax_scale must be positive, got nan"),
    *[(dict.fromkeys("qkv", torch.zeros(10, 2, K, device=DEVICE)), f"8 to 128, got {K}") for K in (60, 136)],
    (dict.fromkeys("qkv", torch.zeros(10, 2, 64, device=DEVICE, dtype=torch.float64)), "got torch.float64"),
])  # fmt: skip
def test_errors(change, message):
    tensors = dict.fromkeys("qkv", torch.zeros(10, 2, 64, device=DEVICE))
    arguments = tensors | {"cu_seqlens": offsets([10]), "max_seqlen": 10, "softmax_scale": None} | change
    with pytest.raises(ValueError, match=message):
        varlen_attention(**arguments)


# Operators


@pytest.mark.parametrize("which", range(3))
def test_a_tangent_is_an_error(which):
    """It was dropped without a word; beside inputs that have none nothing changes."""
    tensors, cu = [*random_qkv(40, 2, 72).unbind(1)], offsets([17, 23])
    expected = varlen_attention(*tensors, cu, 23)

    def of_one(x):
        return varlen_attention(*tensors[:which], x, *tensors[which + 1 :], cu, 23)

    with pytest.raises(RuntimeError, match="no derivative in forward mode"):
        torch.func.jvp(of_one, (tensors[which],), (tensors[which],))
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(varlen_attention(*tensors, cu, 23), expected)


def test_operators_are_well_formed():
    qkv, cu = random_qkv(40, 2, 72), offsets([17, 23])
    ops = torch.ops.siglip2_packed
    torch.library.opcheck(ops.varlen_attention.default, (*qkv.requires_grad_().unbind(1), cu, 23, 0.1))
    q, k, v = qkv.detach().unbind(1)
    out, low, lse = ops.varlen_attention(q, k, v, cu, 23, 0.1)
    torch.library.opcheck(ops.varlen_attention_backward.default, (v, q, k, v, out, low, lse, cu, 23, 0.1))


def test_operators_give_what_is_given_without_them():
    qkv, cu = random_qkv(40, 2, 72), offsets([17, 23])
    grad = random_qkv(40, 2, 72, seed=1)[:, 0].contiguous()
    op = torch.ops.siglip2_packed.varlen_attention
    actual = with_gradients(lambda *x: op(*x, cu, 23, 0.1)[0], qkv.unbind(1), grad)
    assert_same(actual, with_gradients(lambda *x: varlen_attention(*x, cu, 23, 0.1), qkv.unbind(1), grad))
    assert_close(actual, with_gradients(lambda *x: loop(*x, [17, 23], 0.1), qkv.unbind(1), grad), EXACT)


@pytest.mark.parametrize("how", ["varlen_attention", "VarlenAttention"])
def test_compile_without_graph_breaks_or_recompiles(how):
    """Packs of different T, S and max_seqlen run one compiled graph."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    def attend(qkv, cu, longest):
        if how == "varlen_attention":
            return varlen_attention(*qkv.unbind(1), cu, longest)
        return own(cu, longest).qkvpacked(qkv)

    torch._dynamo.reset()
    step = torch.compile(attend, backend=backend if not CUDA else "inductor", fullgraph=True, dynamic=True)
    for lengths in ([17, 23, 2], [40, 9], [5, 6, 7, 31]):
        qkv, grad = rows_and_gradient(sum(lengths), 72)
        cu, longest = offsets(lengths), max(lengths)
        eager = with_gradients(lambda x: attend(x, cu, longest), [qkv], grad)
        assert_same(with_gradients(lambda x: step(x, cu, longest), [qkv], grad), eager)
    assert len(compiled) == (0 if CUDA else 1)


def test_checkpointing():
    """Full recomputation, and selective checkpointing that saves the attention by its operator."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    lengths = [17, 23, 2]
    qkv, grad = rows_and_gradient(42, 72)
    attention = own(offsets(lengths), 23)
    calls = []

    def policy(context, op, *args, **kwargs):
        ours = op is torch.ops.siglip2_packed.varlen_attention.default
        calls.append(ours)
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    def layer(x):
        return attention.qkvpacked(x.sin()).cos()

    expected = with_gradients(layer, [qkv], grad)
    for options in ({}, {"context_fn": lambda: create_selective_checkpoint_contexts(policy)}):
        actual = with_gradients(lambda x: checkpoint(layer, x, use_reentrant=False, **options), [qkv], grad)
        assert_same(actual, expected)
    assert any(calls)


@pytest.mark.parametrize(("change", "message"), [
    (dict(k=(30, 1, 64)), r"k must have the shape of q, \[30, 2, 64\], got \[30, 1, 64\]"),
    (dict(v=(30, 1, 64)), r"v must have the shape of q, \[30, 2, 64\], got \[30, 1, 64\]"),
    (dict(k=(20, 2, 64), v=(20, 2, 64)), r"k must have the shape of q, \[30, 2, 64\], got \[20, 2, 64\]"),
    (dict(q=(20, 2, 64)), r"k must have the shape of q, \[20, 2, 64\], got \[30, 2, 64\]"),
    (dict(k=torch.float16), "k is torch.float16 on .*, q is torch.float32"),
    (dict(v=torch.float64), "v is torch.float64 on .*, q is torch.float32"),
    (dict(q=torch.bfloat16, k=torch.bfloat16), "v is torch.float32 on .*, q is torch.bfloat16"),
])  # fmt: skip
@pytest.mark.parametrize("otherwise", ["", "sdpa"])
@pytest.mark.parametrize("gradients", [False, True])
def test_rows_that_do_not_fit_each_other_are_errors(change, message, otherwise, gradients):
    """Not undefined reads; nor are they given to the backend that takes what own kernels are refused for."""
    made = {}
    for name in "qkv":
        what = change.get(name, (30, 2, 64))
        shape, dtype = (what, torch.float32) if isinstance(what, tuple) else ((30, 2, 64), what)
        made[name] = torch.zeros(shape, dtype=dtype, device=DEVICE, requires_grad=gradients)
    attention = VarlenAttention(Segments([17, 13], DEVICE), "triton", otherwise)
    with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match=message) as raised:
        attention(**made)
    assert not isinstance(raised.value, Refused)


# What the check compares kernels on


def launches(direction, capability, dtype, K):
    """Each launch that a rule gives for some pack of a card, with the longest segments that it is given for."""
    found = {}
    lengths = [0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 192, 193, 256, 257, 1024, 4096]
    for longest, T, multiprocessors in itertools.product(lengths, (1, 40, 16384), (1, 132)):
        card = Card("cuda", capability, multiprocessors)
        if direction == "forward":
            order = choice.attention_forward(card, dtype, max(T, longest), 16, K, longest)
        else:
            order = choice.attention_backward(card, dtype, max(T, longest), 8, 16, K, longest)
        for launch in order:
            found.setdefault(launch, []).append(longest)
    return found


def case_of(direction, launch, dtype=torch.float32, K=72, packed=True):
    """Lengths of the one case, and its tensors of rows."""
    make, _ = cases.of(direction)
    (case,) = make(torch.device("cpu"), dtype, 2, K, packed, launch[1])
    *tensors, cu_seqlens, longest = case
    lengths = cu_seqlens.diff().tolist()
    assert longest == max(lengths) and cu_seqlens[0] == 0
    return lengths, [x if x.ndim != 4 else x[:, 0] if packed else x[0] for x in tensors if torch.is_tensor(x)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [64, 72, 80, 128])
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_what_kernels_are_checked_on_reaches_all_of_them(capability, K, dtype):
    """Whatever is launched: whole tiles, parts of tiles, more than one where it loops, none, and rows of no segment."""
    for direction in ("forward", "backward"):
        given = launches(direction, capability, dtype, K)
        assert given
        for (name, how), served in given.items():
            lengths, tensors = case_of(direction, (name, how), dtype, K)
            assert 0 in lengths and 1 in lengths, "no empty segment, or none of one row"
            for x in tensors:
                assert x.shape[0 if x.ndim == 3 else 1] > sum(lengths), "no rows beyond the last segment"
            assert tensors[0][sum(lengths) :].isnan().all() and tensors[0][: sum(lengths)].isfinite().all()
            longest = max(lengths)
            if name.startswith("hopper"):
                block, tiles = 64 * how, (64,)
                assert {block, 65} <= set(lengths) and longest > block, "no whole block, or not more than one"
            elif isinstance(how, Tile) and (how.single or name == "triton_short"):
                size = how.N
                assert longest == size and max(served) <= size, "not a tile, or given for longer segments"
                assert name != "triton_short" or how.M == how.N
                assert any(1 < n < size for n in lengths), "no part of a tile"
                continue
            else:
                tiles = [n for tile in ([how] if isinstance(how, Tile) else how) for n in (tile.M, tile.N)]
            assert all(longest > tile and longest % tile for tile in tiles), "it does not loop, or ends with a tile"
            assert any(n and n % tile == 0 for n in lengths for tile in tiles), "none ends with a tile"
            assert any(1 < n < min(tiles) for n in lengths), "no part of a tile"


def triton_launches():
    """Of all cards, those that differ in more than how they are compiled, in float16 at head_dim 72."""
    seen = {}
    for direction, capability in itertools.product(("forward", "backward"), (80, 90, 120)):
        for name, how in launches(direction, capability, torch.float16, 72):
            if not name.startswith("hopper"):
                tiles = [how] if isinstance(how, Tile) else how
                seen.setdefault((direction, name, *[(tile.M, tile.N, tile.single) for tile in tiles]), (name, how))
    return [pytest.param(key[0], launch, id=f"{key[0]}-{launch[0]}-{key[2:]}") for key, launch in seen.items()]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "separate"])
@pytest.mark.parametrize(("direction", "launch"), triton_launches())
def test_every_tile_is_right(direction, launch, packed):
    """Interpreted, those of all cards. The bound is the check's own."""
    if CUDA and launch not in launches(direction, choice.card(DEVICE).capability, torch.float16, 72):
        pytest.skip("a tile for another card")
    verdict = kernels.verdict_on(direction, launch, DEVICE, torch.float16, 2, 72, packed)
    assert verdict.right, str(verdict)
    assert set(verdict.errors) == ({"out", "lse"} if direction == "forward" else {"dq", "dk", "dv"})


# On a GPU

GPU_PACKS = [[64] * 20, [1, 15, 16, 17, 63, 64], [128, 100, 1, 65], [144, 192, 1, 63, 129, 16, 65], [144] * 60,
              [256, 252, 1, 15, 16, 17, 63, 65, 200], [1024, 1000, 256, 64], [35, 0, 577, 129, 0, 1]]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("K", [64, 72, 80, 128])
@pytest.mark.parametrize("lengths", GPU_PACKS, ids=lambda x: f"{max(x)}x{len(x)}")
def test_half_precision_against_torch(lengths, K, dtype):
    """Separate tensors through autograd, and a fused projection by `forward` and `backward`."""
    rows = sum(lengths)
    qkv, grad = rows_and_gradient(rows + 3, K, dtype, H=16)
    qkv[rows:] = float("nan")
    cu, longest = offsets(lengths), max(lengths)
    assert own_launches(qkv, cu, longest) and own_launches(qkv, cu, longest, packed=True)
    poison(qkv.shape, grad.shape, dtype=dtype)
    actual = with_gradients(lambda *x: varlen_attention(*x, cu, longest), qkv.unbind(1), grad)
    poison(qkv.shape, grad.shape, dtype=dtype)
    out, _, dqkv = written_out(own(cu, longest), qkv, grad)
    exact = with_gradients(lambda *x: loop(*x, lengths), qkv[:rows].double().unbind(1), grad[:rows].double())
    for results in (actual, [out, *dqkv.unbind(1)]):
        assert all((x[rows:] == 0).all() for x in results)
        assert_as_good_as_torch(results, exact, qkv.unbind(1), grad, lengths)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """T * 3 * H * K > 2**31: the last segment equals the same rows alone, which the same kernels compute here."""
    lengths = [256] * 2560
    qkv = torch.empty(sum(lengths), 3, 16, 72, dtype=torch.bfloat16, device=DEVICE).normal_()
    grad = torch.empty(sum(lengths), 16, 72, dtype=torch.bfloat16, device=DEVICE).normal_()
    assert qkv.numel() > 2**31
    with choice.forced(card=choice.card(qkv.device)._replace(multiprocessors=0)):  # never few rows
        names = own_launches(qkv, offsets(lengths), 256)
        whole = with_gradients(own(offsets(lengths), 256).qkvpacked, [qkv], grad)
        for rows in (slice(256), slice(-256, None)):
            assert own_launches(qkv[rows], offsets([256]), 256) == names
            alone = with_gradients(own(offsets([256]), 256).qkvpacked, [qkv[rows]], grad[rows])
            assert_same([x[rows] for x in whole], alone)


@pytest.mark.gpu
def test_no_synchronisation():
    qkv, cu = random_qkv(600, 16, 72, torch.bfloat16).requires_grad_(), offsets([256, 300, 44])
    ones = torch.ones(600, 16, 72, dtype=qkv.dtype, device=DEVICE)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            own(cu, 300).qkvpacked(qkv).backward(ones)
            varlen_attention(*qkv.unbind(1), cu, 300).backward(ones)
            written_out(own(cu, 300), qkv.detach(), ones)
        finally:
            torch.cuda.set_sync_debug_mode("default")
