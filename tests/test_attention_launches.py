"""What the host does for the Hopper attention kernels: counters, checks, launches; and that they compile. Anywhere."""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_inputs import CUDA, DEVICE, offsets

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
