"""The Hopper attention kernels: on such a card what they compute, elsewhere what the host does for them."""

import importlib.util
import inspect
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

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
from siglip2_packed.ops.runtime.choice import Card
from siglip2_packed.ops.runtime.hopper import in_reach

FOLDER = "siglip2_packed.ops.attention"
NAMES = "hopper_forward", "hopper_backward", "hopper_one_pass"
if reason := next(filter(None, (missing(f"{FOLDER}.{name}") for name in NAMES)), None):
    pytest.skip(reason, allow_module_level=True)  # they are not used; see test_attention_checks.py

from siglip2_packed.ops.attention import (  # noqa: E402
    cases,
    hopper_backward,
    hopper_forward,
    hopper_items,
    hopper_one_pass,
    hopper_sums,
    low_order,
)

MODULES = {"forward": hopper_forward, "backward": hopper_backward, "one pass": hopper_one_pass}


# The host's part, anywhere


@pytest.fixture
def items(monkeypatch):
    """`hopper_items` as a new process has it, on any device; `items.captures = True`: a graph is captured."""
    spec = importlib.util.spec_from_file_location("hopper_items", hopper_items.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.captures, module.capturing = False, lambda device: module.captures
    if not CUDA:
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return module


def test_overlapping_launches_have_their_own_counters(items):
    """Eager ones take turns, captured ones keep theirs; all are one tensor of zeros."""
    taken = {False: [], True: []}
    for turn in range(40):
        items.captures = turn % 2 == 1
        taken[items.captures].append(items.work_counter(DEVICE))
    (address,) = {tensor.data_ptr() for tensor, _ in taken[False] + taken[True]}
    tensor = taken[False][0][0]
    assert tensor.data_ptr() == address and (tensor.shape, tensor.dtype) == ((items.COUNTERS,), torch.int32)
    assert not tensor.any()
    eager, captured = ([slot for _, slot in taken[way]] for way in (False, True))
    assert len({*eager, *captured}) == 40
    assert max(eager) < items.EAGER <= min(captured) and max(captured) < items.COUNTERS


def test_eager_launches_take_turns(items):
    slots = [items.work_counter(DEVICE)[1] for _ in range(items.EAGER + 3)]
    assert slots == [*range(items.EAGER), 0, 1, 2]


def test_captured_launches_have_zeroed_ones_made_when_all_are_taken(items):
    items.captures = True
    slots = [items.work_counter(DEVICE)[1] for _ in range(items.COUNTERS - items.EAGER)]
    assert slots == [*range(items.EAGER, items.COUNTERS)]
    (first, slot), (second, other) = (items.work_counter(DEVICE) for _ in range(2))
    assert slot == other == 0 and first.tolist() == second.tolist() == [0] and first.dtype == torch.int32
    assert first.data_ptr() != second.data_ptr()
    items.captures = False
    assert items.work_counter(DEVICE)[0].shape == (items.COUNTERS,)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "separate"])
@pytest.mark.parametrize(("multiprocessors", "H"), [(1, 2), (5, 2), (132, 16)])
@pytest.mark.parametrize("WGS", [2, 3])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_thread_blocks_draw_item_after_item_where_they_are_checked(forced, direction, WGS, multiprocessors, H, packed):
    """Three and more each, so that what is left of one shows in the next; and all kinds of segments among them."""
    forced(card=Card("cuda", 90, multiprocessors))
    make, _ = cases.of(direction)
    (case,) = make(torch.device("cpu"), torch.float16, H, 64, packed, WGS)
    *_, cu_seqlens, longest = case
    lengths = cu_seqlens.diff().tolist()
    assert longest == max(lengths) > 64 * WGS and {0, 1, 65, 64 * WGS} <= set(lengths)
    blocks = {"forward": [(64 * WGS, hopper_forward.RESOURCES[WGS][-1])]}
    blocks["backward"] = [(64 * WGS, 1), (64, hopper_backward.RESOURCES_KV[-1])]  # one pass too
    for rows, resident in blocks[direction]:
        items = H * sum(-(-length // rows) for length in lengths)
        assert items >= 3 * resident * multiprocessors


@pytest.fixture
def launched(items, monkeypatch):
    """What was launched, `(name, grid, arguments, boxes of tiles)`, by the names of parameters; nothing runs."""
    launches = []

    class Launcher:
        def __init__(self, kernel, arguments, tiles, *, num_warps, maxnreg):
            assert num_warps == 4 and maxnreg % 8 == 0
            self.kernel, self.tiles, self.checked = kernel.fn, tiles, arguments

        def __call__(self, grid, arguments):
            assert len(self.checked) == len(arguments)
            named = dict(zip(inspect.signature(self.kernel).parameters, arguments, strict=True))
            boxes = {name: tile.box for name, tile in zip(named, self.tiles)}
            launches.append((self.kernel.__name__, grid, named, boxes))

    for module in MODULES.values():
        monkeypatch.setattr(module, "_launchers", {})
        monkeypatch.setattr(module, "work_counter", items.work_counter)
        monkeypatch.setattr(module, "Launcher", Launcher)
    return launches


@pytest.mark.parametrize("keeps", [True, False], ids=["low", ""])
@pytest.mark.parametrize("K", [64, 72])
@pytest.mark.parametrize("WGS", [2, 3])
def test_kernels_get_all_their_arguments(launched, K, WGS, keeps):
    """Tiles of the tensors where they lie, no copies; a counter a launch, shared by the two of a backward."""
    qkv, dqkv = torch.zeros(2, 500, 3, 5, K, dtype=torch.float16, device=DEVICE)
    grad, out = torch.zeros(2, 500, 5, K, dtype=torch.float16, device=DEVICE)
    lse, cu = torch.zeros(5, 500, device=DEVICE), offsets([300, 0, 200])
    low = low_order.empty_like(out) if keeps else None
    (q, k, v), (dq, dk, dv) = qkv.unbind(1), dqkv.unbind(1)
    for _ in range(2):
        hopper_forward.forward(WGS, q, k, v, out, low, lse, cu, 300, 0.1)
        hopper_backward.backward(WGS, grad, q, k, v, out, low, lse, dq, dk, dv, cu, 300, 0.1)
    assert [name for name, *_ in launched] == ["forward_kernel", "backward_q", "backward_kv"] * 2
    slots = [named["slot"] for _, _, named, _ in launched]
    assert slots == [0, 1, 1, 2, 3, 3]
    tensors = {"q": q, "k": k, "v": v, "o": out, "out": out, "grad": grad}
    for (name, grid, named, boxes), items in zip(launched, [500 // (64 * WGS), 500 // (64 * WGS), 500 // 64] * 2):
        described = [x for x in tensors if x in named and (name, x) != ("forward_kernel", "out")]
        assert described[:3] == ["q", "k", "v"]
        for x in described:
            tail = f"{x}_tail" if f"{x}_tail" in named else f"{x}_t"
            assert named[x].data_ptr() == tensors[x].data_ptr() and named[x].stride() == tensors[x].stride()
            assert named[tail] is (None if K == 64 else named[x])
            narrow = name == "forward_kernel" and x in ("v", "o")  # the eight lanes of the head alone
            assert (boxes[x], boxes[tail]) == ([64, 1, 64], [64, 1, 8 if narrow else 16])
        assert (named["T"], named["S"], named["H"], named["K"]) == (500, 3, 5, K)
        assert named["blocks"] == -(-300 // (64 if name == "backward_kv" else 64 * WGS))
        assert named["scale_log2"] == pytest.approx(0.1 / 0.6931471805599453)
        assert 1 <= grid[0] <= 5 * (items + 3) and grid[1:] == (1, 1)
        assert named["lse"] is lse and named["cu_seqlens"] is cu
        if name != "backward_kv":
            assert named["low"] is low and named["LOW"] == (5 if keeps else 0)
        if name != "forward_kernel":
            assert named["scale"] == 0.1 and (named["sdt"], named["sdh"]) == (3 * 5 * K, K)
            delta = named["delta"]
            assert (delta.shape, delta.dtype, delta.is_contiguous()) == (lse.shape, torch.float32, True)
    (_, _, of_q, _), (_, _, of_kv, _) = launched[1:3]
    assert of_q["delta"] is of_kv["delta"] and of_q["dq"] is dq and of_kv["dk"] is dk and of_kv["dv"] is dv
    assert launched[0][2]["out"] is out


@pytest.mark.parametrize("keeps", [True, False], ids=["low", ""])
@pytest.mark.parametrize("K", [64, 72])
def test_one_pass_gets_all_its_arguments(launched, monkeypatch, K, keeps):
    """What comes before and after knows the same tiles, as many as any segments of so many rows have."""
    around = []
    monkeypatch.setattr(
        hopper_sums, "launch", lambda kernel, grid, *given, **options: around.append((kernel, grid, given))
    )
    qkv, dqkv = torch.zeros(2, 500, 3, 5, K, dtype=torch.float16, device=DEVICE)
    grad, out = torch.zeros(2, 500, 5, K, dtype=torch.float16, device=DEVICE)
    lse, cu = torch.zeros(5, 500, device=DEVICE), offsets([300, 0, 200])
    low = low_order.empty_like(out) if keeps else None
    (q, k, v), (dq, dk, dv) = qkv.unbind(1), dqkv.unbind(1)
    hopper_one_pass.backward(2, grad, q, k, v, out, low, lse, dq, dk, dv, cu, 300, 0.1)
    ((name, grid, named, boxes),) = launched
    assert name == "backward_kernel" and 1 <= grid[0] <= 5 * (500 // 128 + 3) and grid[1:] == (1, 1)
    for x, tensor in {"q": q, "k": k, "v": v, "grad": grad}.items():
        assert named[x].data_ptr() == tensor.data_ptr() and named[x].stride() == tensor.stride()
        assert named[f"{x}_t"] is (None if K == 64 else named[x])
        assert (boxes[x], boxes[f"{x}_t"]) == ([64, 1, 64], [64, 1, 16])
    assert (boxes["sums"], boxes["sums_t"], boxes["statistics"]) == ([128, 32], [32, 32], [128])
    assert (named["T"], named["S"], named["H"], named["K"], named["blocks"]) == (500, 3, 5, K, 3)
    assert named["dk"] is dk and named["dv"] is dv and (named["sdt"], named["sdh"]) == (3 * 5 * K, K)
    tiles = named["tiles_of_head"]
    assert named["sums"] is named["sums_t"] and named["sums"].shape == (5 * tiles * 160, 32)
    assert named["statistics"].shape == (5 * tiles * 128,) and named["added"].shape == (5 * tiles,)
    (begin, _, (tensors, numbers, constants)), (store, _, (stored, factors, _)) = around
    assert (begin, store) == (hopper_sums.begin_kernel, hopper_sums.store_kernel)
    assert numbers == (500, 3, 5, tiles) and factors == (0.1, 500, 3, 5, tiles)
    assert constants[-1] == (5 if keeps else 0) and (tensors[2] is low or not keeps)
    assert stored[0] is named["sums"] and stored[2] is dq
    for lengths in ([500], [1] * 500, [65] * 7 + [45], [64] * 7, [127, 127, 127, 119], [63] * 7):
        first = [sum(lengths[:i]) // 64 + i for i in range(len(lengths))]
        taken = [f + i for f, n in zip(first, lengths) for i in range(-(-n // 64))]
        assert len({*taken}) == len(taken) and max(taken) < 500 // 64 + len(lengths) + 1


@pytest.mark.parametrize("K", [pytest.param(64, marks=pytest.mark.slow), 72])
def test_they_compile_and_fit(K):
    """For a card that need not be here: by as many thread blocks a multiprocessor as there are to be."""
    script = Path(__file__).parent / "compiled_attention.py"
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, script, str(K)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    forward, _, of_q, of_kv, one_pass = rows = json.loads(run.stdout.splitlines()[-1])
    assert [name for name, *_ in rows] == ["forward_kernel"] * 2 + ["backward_q", "backward_kv", "backward_kernel"]
    resident = [hopper_forward.RESOURCES[2][-1]] * 2 + [1, hopper_backward.RESOURCES_KV[-1], 1]
    for (_, shared, threads, registers, instructions), blocks in zip(rows, resident, strict=True):
        assert blocks * (shared + 1024) <= 228 << 10 and blocks * threads * registers <= 1 << 16
        assert {"cp.async.bulk", "m64n64k16"} <= {*instructions}
    assert ("m64n16k16" if K == 72 else "m64n8k16") in forward[-1]  # where the row sums are
    assert ("m64n16k16" in of_q[-1]) == ("m64n16k16" in of_kv[-1]) == (K == 72)
    assert {"m64n16k16", "cp.reduce.async.bulk"} <= {*one_pass[-1]}


def test_rows_are_read_where_they_lie_if_the_copy_engine_can():
    """In pieces of 16 bytes, each row for itself; anything else is copied before."""
    qkv = torch.zeros(40, 3, 2, 72, dtype=torch.bfloat16)
    for view in (*qkv.unbind(1), qkv[:, 0].transpose(0, 1).contiguous().transpose(0, 1), qkv[::2, 1]):
        assert in_reach(view)[0] is view
    flat = torch.arange(40 * 2 * 148.0).bfloat16()
    for x in (
        flat[4 : 40 * 144 + 4].view(40, 2, 72),  # 8 bytes beyond a multiple of 16
        flat[:72].expand(40, 2, 72),  # one row for all
        flat[:144].view(1, 2, 72).expand(40, 2, 72),
        flat.as_strided((40, 2, 72), (148, 72, 1)),  # rows begin at a multiple of 8 bytes only
        flat[: 40 * 144].view(40, 72, 2).mT,
    ):
        (copy,) = in_reach(x)
        assert copy is not x and copy.is_contiguous() and copy.data_ptr() % 16 == 0 and torch.equal(copy, x)


# On a Hopper card


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
