"""What the Hopper attention kernels compute, on such a card. What the host does for them: test_attention_launches."""

import itertools

import pytest
import torch
from attention_inputs import (
    CUDA,
    DEVICE,
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

import kernels_ref
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.check import missing

FOLDER = "siglip2_packed.ops.attention"
NAMES = "hopper_forward", "hopper_backward", "hopper_one_pass"
if reason := next(filter(None, (missing(f"{FOLDER}.{name}") for name in NAMES)), None):
    pytest.skip(reason, allow_module_level=True)  # they are not used; see test_attention_checks.py

from siglip2_packed.ops.attention import (  # noqa: E402
    hopper_backward,
    hopper_forward,
    hopper_items,
    hopper_one_pass,
    low_order,
)

MODULES = {"forward": hopper_forward, "backward": hopper_backward, "one pass": hopper_one_pass}


@pytest.fixture
def on_hopper(monkeypatch):
    """Every pack long enough goes to the Hopper kernels, few rows too: what was launched, "forward" or "backward"."""
    if not CUDA or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    launches = []
    for name, module in MODULES.items():

        class Launcher(module.Launcher):
            def __call__(self, grid, arguments, name=name):
                launches.append(name)
                super().__call__(grid, arguments)

        monkeypatch.setattr(module, "_launchers", {})
        monkeypatch.setattr(module, "Launcher", Launcher)
    with choice.forced(card=choice.card(DEVICE)._replace(multiprocessors=0)):
        yield launches


@pytest.fixture(params=["two passes", "one pass"])
def differentiated(request, on_hopper):
    """`on_hopper`, by both kinds of backward."""
    if request.param == "two passes":
        with choice.forced(attention_backward=[("hopper", 2)]):
            yield on_hopper
    else:
        with choice.forced(attention_backward=[("hopper_one_pass", 2)]):
            yield on_hopper
        assert "backward" not in on_hopper


def of(launches, direction):
    """How many calls there were; a backward in two passes is two launches."""
    count = launches.count(direction)
    if direction == "forward":
        return count
    assert count % 2 == 0
    return count // 2 + launches.count("one pass")


def without_gradients(qkv, cu, longest):
    with torch.no_grad():
        return own(cu, longest).qkvpacked(qkv)


def gradient(qkv, grad, cu, longest):
    """Of a fused projection, written where it lies."""
    poison(qkv.shape, grad.shape, dtype=qkv.dtype)
    out, _, dqkv = written_out(own(cu, longest), qkv, grad)
    return out, dqkv


FORWARD_PACKS = [[100, 0, 128, 1, 65], [144, 192, 1, 63, 129], [256, 64, 1, 577, 0, 129, 1024, 63], [252] * 40]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("K", [64, 72])
@pytest.mark.parametrize("lengths", FORWARD_PACKS, ids=lambda x: f"{max(x)}x{len(x)}")
def test_forward(on_hopper, lengths, K, dtype):
    """It runs; NaN in other segments, repeated last offsets, rows beyond and a generous max_seqlen change no bit."""
    rows, H, longest = sum(lengths), 3, max(lengths)
    qkv, cu = random_qkv(rows + 150, H, K, dtype), offsets(lengths)
    for bound in (longest, 3000):
        without_gradients(qkv[:rows], cu, bound)  # compiled, checked
    with torch.no_grad():
        own(cu, longest)(*(x.contiguous() for x in qkv[:rows].unbind(1)))
    on_hopper.clear()
    poison((rows + 150, H, K), dtype=dtype)
    expected = without_gradients(qkv[:rows], cu, longest)
    assert_close([expected], [loop(*qkv[:rows].unbind(1), lengths)], 5e-3 if dtype == torch.bfloat16 else 1e-3)
    with torch.no_grad():
        assert torch.equal(expected, own(cu, longest)(*(x.contiguous() for x in qkv[:rows].unbind(1))))
    changed = qkv.clone()
    changed[rows:] = float("nan")
    for first, last in list(itertools.pairwise(cu.tolist()))[1::2]:
        changed[first:last] = float("nan")
    poison((rows + 150, H, K), dtype=dtype)
    actual = without_gradients(changed, torch.cat([cu, cu[-1:].expand(300)]), longest)
    assert (actual[rows:] == 0).all()
    for first, last in list(itertools.pairwise(cu.tolist()))[::2]:
        assert torch.equal(actual[first:last], expected[first:last])
    assert on_hopper == ["forward"] * 3
    assert_close([without_gradients(qkv[:rows], cu, 3000)], [expected], 1e-6)
    assert on_hopper == ["forward"] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("K", [64, 72])
@pytest.mark.parametrize("top", [3.0, 6.0, 60.0, 300.0])
def test_scores_that_grow_or_fall(on_hopper, top, K, dtype):
    """From tile to tile, by less than it takes for O to be rescaled and by more, in some rows of a warp alone."""
    lengths, H = [300, 64, 130, 700], 3
    rows, cu = sum(lengths), offsets(lengths)
    qkv = random_qkv(rows, H, K, dtype)
    without_gradients(qkv, cu, 700)  # compiled, checked
    on_hopper.clear()
    ramp = torch.cat([torch.linspace(-top, top, n, device=DEVICE) for n in lengths])
    steep = torch.arange(rows, device=DEVICE) % 3 - 1.0  # falling, even and growing
    qkv[:, 0, :, 0], qkv[:, 1, :, 0] = steep[:, None] * 8, ramp[:, None] * K**0.5 / 8
    actual = without_gradients(qkv, cu, 700)
    assert_close([actual], [loop(*qkv.unbind(1), lengths)], 5e-3 if dtype == torch.bfloat16 else 1e-3)
    for n, first in zip(lengths, cu.tolist()):
        alone = without_gradients(qkv[first : first + n].clone(), offsets([n]), 700)
        assert torch.equal(alone, actual[first : first + n])
    assert on_hopper == ["forward"] * 5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("K", [64, 72])
@pytest.mark.parametrize("keeps", [True, False], ids=["low", ""])
@pytest.mark.parametrize("WGS", [2, 3])
def test_values_that_are_all_alike_come_out_as_they_are(on_hopper, WGS, keeps, K, dtype):
    """Rows are divided by the sum of their weights as these are rounded."""
    lengths, H = [300, 1, 64, 130, 5], 3
    rows, cu = sum(lengths), offsets(lengths)
    q, k, v = random_qkv(rows, H, K, dtype).unbind(1)
    v = v[:1].expand(rows, H, K).contiguous()
    out, lse = torch.full_like(v, float("nan")), torch.full((H, rows), float("nan"), device=DEVICE)
    low = low_order.empty_like(out) if keeps else None
    hopper_forward.forward(WGS, q, k, v, out, low, lse, cu, 300, K**-0.5)
    assert torch.equal(out, v) and lse.isfinite().all()
    assert low is None or low.abs().max() <= 16  # of the 128 that rounding may take: sums in float32


BACKWARD_PACKS = [
    [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 257, 1024],
    [129, 0, 192, 1, 63, 144],
    [256, 64, 1, 577, 0, 129, 1024, 63],
    [252] * 40,
    [4096, *range(64, 1024, 60)],
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("K", [64, 72])
@pytest.mark.parametrize("lengths", BACKWARD_PACKS, ids=lambda x: f"{max(x)}x{len(x)}")
def test_backward(differentiated, lengths, K, dtype):
    """It runs; NaN in other segments, repeated last offsets, rows beyond and layouts change no bit."""
    rows, H, longest, cu = sum(lengths), 3, max(lengths), offsets(lengths)
    qkv, grad = random_qkv(rows + 150, H, K, dtype), random_qkv(rows + 150, H, K, dtype, 1)[:, 0].contiguous()
    for bound in (longest, 3000):
        gradient(qkv[:rows], grad[:rows], cu, bound)  # compiled, checked
    with_gradients(own(cu, longest), qkv[:rows].unbind(1), grad[:rows])
    differentiated.clear()
    out, dqkv = gradient(qkv[:rows], grad[:rows], cu, longest)
    exact = with_gradients(
        lambda *x: kernels_ref.attention(*x, cu), qkv[:rows].double().unbind(1), grad[:rows].double()
    )
    assert_as_good_as_torch([out, *dqkv.unbind(1)], exact, qkv.unbind(1), grad, lengths)
    assert torch.equal(gradient(qkv[:rows], grad[:rows], cu, longest)[1], dqkv)
    changed, changed_grad = qkv.clone(), grad.clone()
    for first, last in [*list(itertools.pairwise(cu.tolist()))[1::2], (rows, rows + 150)]:
        changed[first:last], changed_grad[first:last] = float("nan"), float("nan")
    actual = gradient(changed, changed_grad, torch.cat([cu, cu[-1:].expand(300)]), longest)[1]
    assert (actual[rows:] == 0).all()
    for first, last in list(itertools.pairwise(cu.tolist()))[::2]:
        assert torch.equal(actual[first:last], dqkv[first:last])
    assert of(differentiated, "backward") == 3
    poison(qkv.shape, grad.shape, dtype=dtype)
    separate = with_gradients(own(cu, longest), qkv[:rows].unbind(1), grad[:rows])
    assert_same(separate, [out, *dqkv.unbind(1)])
    assert of(differentiated, "backward") == 4
    assert_close(gradient(qkv[:rows], grad[:rows], cu, 3000)[1].unbind(1), dqkv.unbind(1), 1e-3)
    assert of(differentiated, "backward") == of(differentiated, "forward") == 5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("K", [64, 72])
@pytest.mark.parametrize("lengths", [[144] * 60, [256] * 40, [129, 0, 192, 1, 63, 144] * 8], ids=lambda x: str(max(x)))
def test_repeats_to_the_bit(differentiated, lengths, K, dtype):
    """Warps that run into each other's shared memory show in some of many runs."""
    qkv = random_qkv(sum(lengths), 16, K, dtype)
    grad, cu, longest = random_qkv(sum(lengths), 16, K, dtype, 1)[:, 0], offsets(lengths), max(lengths)

    def run():
        return written_out(own(cu, longest), qkv, grad)

    expected = run()
    assert all(x.isfinite().all() for x in expected)
    differentiated.clear()
    differing = sum(sum((a != b).sum() for a, b in zip(run(), expected, strict=True)) for _ in range(300))
    assert differing == 0
    assert of(differentiated, "forward") == of(differentiated, "backward") == 300


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[256], [100, 0, 156, 1], [7] * 30], ids=str)
@pytest.mark.parametrize("K", [64, 72])
def test_few_rows_are_not_for_them(lengths, K):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    qkv, cu, longest = random_qkv(sum(lengths), 16, K, torch.bfloat16), offsets(lengths), max(lengths)
    assert all(name.startswith("triton") for name in own_launches(qkv, cu, longest))
    more = torch.empty(2000, 3, 16, K, dtype=qkv.dtype, device=DEVICE)
    assert own_launches(more, cu, 256) == own_launches(qkv, cu, 257) == ["hopper", "hopper"]
    grad = random_qkv(sum(lengths), 16, K, torch.bfloat16, 1)[:, 0]
    actual = with_gradients(own(cu, longest), qkv.unbind(1), grad)
    assert_close(actual, with_gradients(lambda *x: loop(*x, lengths), qkv.unbind(1), grad), 6e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("K", [64, 72])
def test_strides(differentiated, K):
    """Separate tensors, heads first, gaps between rows: read in place, to the same bits. One row for all: copied."""
    lengths, H, dtype = [200, 1, 65, 144, 17], 3, torch.bfloat16
    rows, cu = sum(lengths), offsets(lengths)
    qkv, grad = random_qkv(rows, H, K, dtype), random_qkv(rows, H, K, dtype, 1)[:, 0].contiguous()

    def run(q, k, v, grad):
        poison(q.shape, qkv.shape, dtype=dtype)
        return with_gradients(own(cu, 200), (q, k, v), grad)

    def heads_first(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    def gaps(x):
        return torch.stack([x, x * float("nan")], 1)[:, 0]

    run(*qkv.unbind(1), grad)  # compiled, checked
    differentiated.clear()
    expected = run(*qkv.unbind(1), grad)
    assert_close(expected, with_gradients(lambda *x: loop(*x, lengths), qkv.unbind(1), grad), 6e-3)
    for change in (torch.Tensor.contiguous, heads_first, gaps):
        for actual in (run(*map(change, qkv.unbind(1)), grad), run(*qkv.unbind(1), change(grad))):
            assert_same(actual, expected)
    assert of(differentiated, "forward") == of(differentiated, "backward") == 7
    for one in (grad[:1].expand(rows, H, K), grad[:, :1].expand(rows, H, K), grad.new_ones(1, 1, 1).expand(rows, H, K)):
        actual = run(*qkv.unbind(1), one)
        assert_close(actual, with_gradients(lambda *x: loop(*x, lengths), qkv.unbind(1), one), 6e-3)
        assert_same(actual, run(*qkv.unbind(1), one.contiguous()))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [0, 5, 200])
def test_without_segments(differentiated, rows):
    def run(rows, cu):
        qkv, grad = random_qkv(rows, 3, 72, torch.bfloat16), random_qkv(rows, 3, 72, torch.bfloat16, 1)[:, 0]
        poison(qkv.shape, dtype=qkv.dtype)
        return qkv, *gradient(qkv, grad, cu, 256)

    run(17, offsets([17]))  # compiled, checked
    differentiated.clear()
    for cu in (offsets([]), offsets([0]), offsets([0, 0, 0])):
        qkv, out, dqkv = run(rows, cu)
        assert dqkv.shape == qkv.shape and out.shape == (rows, 3, 72)
        assert (dqkv == 0).all() and (out == 0).all()
    assert of(differentiated, "forward") == of(differentiated, "backward") == (3 if rows else 0)


@pytest.mark.gpu
def test_launches_leave_their_counter_at_zero(differentiated, monkeypatch):
    """Those of one stream, which do not overlap, could share one; more items than thread blocks, or fewer."""
    packs = [[4096, *range(64, 1024, 60)], [252] * 40, [200, 0, 1], [0, 130]]

    def run():
        for lengths in packs:
            qkv = random_qkv(sum(lengths) + 70, 3, 72, torch.bfloat16)
            yield from gradient(qkv, qkv[:, 0], offsets(lengths), max(lengths))

    expected = list(run())
    differentiated.clear()
    monkeypatch.setattr(hopper_items, "_eager", itertools.repeat(5))
    for _ in range(3):
        assert_same(list(run()), expected)
    assert of(differentiated, "forward") == of(differentiated, "backward") == 3 * len(packs)
    shared, slot = hopper_items.work_counter(expected[0].device)
    assert slot == 5 and not shared.any()


@pytest.mark.gpu
def test_forward_in_a_cuda_graph(on_hopper):
    """Replays follow the contents of the inputs, lengths included, beside eager launches on another stream."""
    qkv, cu = random_qkv(1200, 16, 72, torch.bfloat16), offsets([256, 300, 44, 500, 0])
    without_gradients(qkv, cu, 600)  # compiled, checked
    on_hopper.clear()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        outputs = [without_gradients(qkv, cu, 600) for _ in range(3)]
    assert on_hopper == ["forward"] * 3
    other, cu_other = random_qkv(4096, 16, 72, torch.bfloat16, 1), offsets([1024] * 4)
    expected_other = without_gradients(other, cu_other, 1024)
    for lengths in ([256, 300, 44, 500, 0], [600, 1, 2, 3, 594], [7, 0, 0, 0, 0]):
        cu.copy_(offsets(lengths))
        for out in outputs:
            out.fill_(float("nan"))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            others = [without_gradients(other, cu_other, 1024) for _ in range(5)]
        graph.replay()
        torch.cuda.current_stream().wait_stream(stream)
        for out in outputs:
            assert_close([out], [loop(*qkv.unbind(1), lengths)], 5e-3)
        assert all(torch.equal(x, expected_other) for x in others)


@pytest.mark.gpu
def test_backward_in_a_cuda_graph(differentiated):
    """Replays follow the contents of the inputs, lengths included, beside eager launches on another stream."""
    qkv, grad = random_qkv(1200, 16, 72, torch.bfloat16), random_qkv(1200, 16, 72, torch.bfloat16, 1)[:, 0]
    cu = offsets([256, 300, 44, 500, 0])

    def run():
        return with_gradients(own(cu, 600).qkvpacked, [qkv], grad)[1]

    other, cu_other = random_qkv(6144, 16, 72, torch.bfloat16, 2), offsets([1024, 2048, 64, 512, 1472, 1024])
    before = torch.ones_like(other[:, 0])

    def run_other():
        return with_gradients(own(cu_other, 2048).qkvpacked, [other], before)[1]

    run()  # compiled, checked
    expected_other = run_other()
    differentiated.clear()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        gradients = [run() for _ in range(3)]
    assert of(differentiated, "backward") == 3
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
