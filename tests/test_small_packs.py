"""The benchmark of small packs: the packs it draws, and that it times right answers and right gradients only."""

import csv
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from siglip2_packed import bench, peers, workloads
from siglip2_packed.measure import COLUMNS
from siglip2_packed.packing import PackedPatches

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import small_packs

GRIDS = [(1, 13, 19), (1, 8, 32), (1, 7, 1)]
needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what is left out on a CPU")


def run(tmp_path, *flags):
    out = tmp_path / "rows.csv"
    code = small_packs.main(["--shape", "tiny", "--rounds", "1", *flags, "--out", str(out)])
    return code, list(csv.DictReader(out.open()))


@pytest.mark.parametrize("name", workloads.SMALL_PACKS)
def test_sizes_are_those_of_the_name(name):
    lengths = {"pack1x256": [256], "pack4x256": [256] * 4, "pack8x256": [256] * 8, "page64x64": [4096]}
    found = [math.prod(grid) for grid in workloads.grids(name)]
    assert found == lengths.get(name, found) and sum(found) <= 4096
    assert len(workloads.grids(name, images=9)) == 9
    fitting = workloads.fitting_grids(name, 512)
    assert fitting and (sum(map(math.prod, fitting)) <= 512 or len(fitting) == 1)


def test_random_packs_are_those_of_a_seed():
    packs = workloads.random_packs(500)
    assert packs == workloads.random_packs(500) != workloads.random_packs(500, seed=1)
    assert packs[:3] == workloads.random_packs(3)
    totals = [sum(map(math.prod, pack)) for pack in packs]
    assert len(packs) == 500 and min(totals) >= 250 and max(totals) <= 4096
    assert min(totals) < 300 and max(totals) > 3500 and {len(pack) for pack in packs} == set(range(1, 9))
    images = [grid for pack in packs for grid in pack]
    assert all(t == 1 and 50 < h * w <= 1024 for t, h, w in images)
    assert max(max(h / w, w / h) for _, h, w in images) > 2 and len(set(images)) > 500


@needs_cpu
def test_rows_of_what_runs_here(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(small_packs, "WARM_PACKS", 1)
    code, rows = run(tmp_path, "--workloads", "pack1x256", "random", "--packs", "2")
    told = capsys.readouterr().out
    assert code == 0 and list(rows[0]) == COLUMNS and {row["bench"] for row in rows} == {"small_packs"}
    timed = {(row["workload"], row["mode"], row["provider"]) for row in rows if row["metric"] == "time"}
    packed, padded = "siglip2_packed", "transformers_sdpa_padded"
    modes = "forward", "train"
    assert timed == {(w, mode, x) for w in ("pack1x256", "random") for mode in modes for x in (packed, padded)}
    errors = [float(row["p50"]) for row in rows if row["metric"] in ("relative_error", "gradient_error")]
    assert len(errors) == 12 and max(errors) < 1e-5
    left_out = {row["provider"] for row in rows if row["metric"] == "not_run"}
    assert left_out == {f"{packed}:cudagraph", f"{padded}:cudagraph", f"{padded}:compile"}
    assert f"{padded}:cudagraph: cannot be built: CUDA graphs need a CUDA device, not cpu" in told
    kind = {"workload": "random", "mode": "train", "metric": "time"}
    time = {row["provider"]: float(row["p50"]) for row in rows if row.items() >= kind.items()}
    (line,) = [x for x in told.splitlines() if x.startswith("random      train    siglip2_packed ") and x.endswith("x")]
    assert float(line.split()[-1][:-1]) == pytest.approx(time[padded] / time[packed], rel=0.01, abs=0.01)


class Doubled(peers.Packed):
    def tokens(self, inputs):
        tokens = super().tokens(inputs)
        return tokens + (tokens - tokens.detach())


class OnePercentOff(peers.Packed):
    def tokens(self, inputs):
        tokens = super().tokens(inputs)
        return tokens + 0.01 * (tokens - tokens.detach())


class Missing(peers.Packed):
    def __init__(self, *args):
        super().__init__(*args)
        self.model.encoder.layers[1].mlp.fc1.bias.requires_grad_(False)


class NotFinite(peers.Packed):
    def __init__(self, *args):
        super().__init__(*args)
        self.model.post_layernorm.bias.register_hook(lambda grad: grad * float("nan"))


class Stale(peers.Packed):
    """Right once, as a graph that replays into a buffer nobody reads."""

    calls = 0

    def tokens(self, inputs):
        self.calls += 1
        return super().tokens(inputs) if self.calls < 3 else torch.full((256, 64), float("nan"), requires_grad=True)


class Fails(peers.Packed):
    def tokens(self, inputs):
        if torch.is_grad_enabled():
            raise RuntimeError("no graph of a backward")
        return super().tokens(inputs)


@pytest.mark.parametrize(
    ("provider", "reason", "forward"),
    [
        (Doubled, "refused: relative error of gradients 1.0e+00", True),
        (OnePercentOff, "refused: relative error of gradients 1.0e-02", True),
        (Missing, "refused: 1 gradients missing or not finite: encoder.layers.1.mlp.fc1.bias", True),
        (NotFinite, "refused: 1 gradients missing or not finite: post_layernorm.bias", True),
        (Stale, "refused: relative error nan", False),
        (Fails, "cannot run: no graph of a backward", True),
    ],
)
@needs_cpu
def test_a_provider_that_is_wrong_is_refused_and_not_timed(tmp_path, monkeypatch, capsys, provider, reason, forward):
    monkeypatch.setitem(bench.PROVIDERS, "siglip2_packed", provider)
    flags = ["--workloads", "pack1x256", "--providers", "siglip2_packed", "transformers_sdpa_padded"]
    code, rows = run(tmp_path, *flags)
    assert code == (0 if provider is Fails else 1) and reason in capsys.readouterr().out
    assert any(row["unit"].startswith(reason) for row in rows if row["metric"] == "not_run")
    timed = {(row["provider"], row["mode"]) for row in rows if row["metric"] == "time"}
    others = {("transformers_sdpa_padded", "forward"), ("transformers_sdpa_padded", "train")}
    assert timed == others | ({("siglip2_packed", "forward")} if forward else set())


def test_capture_is_what_the_first_steps_take_beyond_a_later_one(monkeypatch):
    now, naps = 0.0, iter([3.0, 1.0, 0.25, 0.25])

    def step():
        nonlocal now
        now += next(naps)
        return now

    monkeypatch.setattr(small_packs, "time", SimpleNamespace(perf_counter=lambda: now))
    assert small_packs.captured(step) == (4.5, 3.5)


def held(number):
    """Ours with a graph's count, as it would be on a GPU."""

    class Held(peers.Packed):
        def __init__(self, *args):
            super().__init__(*args)
            self.graphs = SimpleNamespace(held=lambda: (number, number * 2**28))

    return Held


@needs_cpu
def test_graphs_that_are_held_are_rows_and_none_are_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(small_packs, "WARM_PACKS", 1)
    monkeypatch.setitem(bench.PROVIDERS, "siglip2_packed:cudagraph", held(6))
    monkeypatch.setitem(bench.PROVIDERS, "siglip2_packed", held(1))
    flags = ["--workloads", "random", "--packs", "1"]
    code, rows = run(tmp_path, *flags, "--providers", "siglip2_packed", "siglip2_packed:cudagraph")
    found = {row["metric"]: row["p50"] for row in rows if row["provider"] == "siglip2_packed:cudagraph"}
    timed = {(row["provider"], row["mode"]) for row in rows if row["metric"] == "time"}
    assert code == 0 and (found["graphs"], found["graphs_held"]) == ("6", "1.5")
    assert "6 graphs hold 1.50 GiB" in capsys.readouterr().out
    assert ("siglip2_packed", "forward") in timed and ("siglip2_packed", "train") not in timed  # one for two modes
    (row,) = [row for row in rows if row["metric"] == "not_run"]
    assert row["unit"] == "cannot run: ran without CUDA graphs; why is in the log"


@pytest.mark.parametrize("flag", ["--rounds", "--packs"])
def test_nothing_to_time_is_an_error(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        small_packs.main([flag, "0"])
    assert f"{flag} must be at least 1, got 0" in capsys.readouterr().err


# what is timed in CUDA graphs, here without them


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(small_packs.__file__).parent))
    yield pytest.importorskip("readme_tables")
    sys.modules.pop("readme_tables")


def test_table_and_picture_are_of_the_rows(tmp_path, monkeypatch, tables):
    figures = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.small_packs() == ""
    tables.plot_small_packs()
    rows = bench.Rows("small_packs", "NVIDIA H200")
    for i, workload in enumerate((*workloads.SMALL_PACKS, "random")):
        some = small_packs.PROVIDERS if workload != "random" else small_packs.RANDOM
        for j, (provider, mode) in enumerate((x, y) for x in some for y in ("forward", "train")):
            scale = 1e3 if workload == "random" else 1
            rows.add(provider, workload, mode, "bfloat16", "time", (3 + i + 2 * j) * scale, "ms")
            rows.add(provider, workload, mode, "bfloat16", "capture_time", 1 + i + j, "s")
    for workload, seconds in (("pack1024", 4), ("pack1030", 5)):
        rows.add(small_packs.PROVIDERS[1], workload, "forward", "bfloat16", "time", seconds, "ms")
    rows.add(small_packs.PROVIDERS[1], "pack1030", "forward", "bfloat16", "over_pack1024", 1.25, "")
    for provider, gib in zip(small_packs.PROVIDERS, (4, 5)):
        rows.add(provider, "pack4096", "train", "bfloat16", "reserved_memory", gib, "GiB")
    rows.leave_out(small_packs.PROVIDERS[3], "random", "forward", "bfloat16", "takes one pack")
    rows.write(tmp_path / "small_packs_h200.csv")
    table = tables.small_packs()
    assert "| pack1x256, forward | 3.00 | 7.00 | 11.0 | 15.0 | 19.0 | 3.67x | 5.00x | 1.57x | 2.14x |" in table
    assert "| random, train | 10.0 | 14.0 | 18.0 |  |  | 1.80x |  | 1.29x |  |" in table
    assert "packed in graphs 3.0 to 8.0 s" in table and "pack1030" not in table
    assert "one of 1,024 times: forward 1.25." in table and "4,096 patches: 4.0 GiB, in graphs 5.0." in table
    assert table.endswith("![small packs](pictures/small_packs_h200.png)")
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    tables.plot_small_packs()
    (figure,) = drawn
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(tables.SMALL.values())
    forward = figure.axes[0]
    assert [text.get_text() for text in forward.texts] == ["1.6x", "1.5x", "1.4x", "1.4x", "1.4x"]
    labels = [label.get_text().splitlines() for label in forward.get_xticklabels()]
    assert labels[3] == ["pack4096", "4 images", "4,096 patches"] and labels[4][1] == "1 image"


class GraphsOnCPU(peers.PaddedGraphs):
    __init__ = peers.Padded.__init__


def as_it_is(function, sample):
    """A capture that captures nothing: what is called is what was given, with the sample's shape."""
    return lambda x: function(x.view_as(*sample))


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_transformers_encoder_is_taken_out_of_its_model_with_its_mask(monkeypatch, mode):
    """Features and gradients are those of the whole model, padding and three images included."""
    config, state = bench.weights(None, "tiny", "cpu")
    packed = PackedPatches(torch.randn(sum(map(math.prod, GRIDS)), 48), GRIDS)
    gradient = bench.seeded_gradient(packed, 64, torch.float32)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", as_it_is)
    monkeypatch.setattr(peers, "_replayed", as_it_is)
    found = []
    for provider in (peers.Padded, GraphsOnCPU):
        made = provider(config, state, "cpu", torch.float32)
        inputs = made.inputs(packed)
        tokens = bench.step(made, inputs, mode, made.tokens_of(gradient, packed))()
        found.append([tokens, *(x.grad for x in made.model.parameters() if x.grad is not None)])
    assert len(found[0]) == (len(state) + 1 if mode == "train" else 1)
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    attended = made.mask if made.mask.dtype is torch.bool else made.mask == 0  # added to scores in transformers 4
    assert attended.shape[-1] == 256 and not attended[2, 0, 0, 7:].any() and attended[2, 0, 0, :7].all()


@pytest.mark.parametrize("provider", [peers.Packed, peers.Padded])
def test_tokens_of_is_the_way_back_from_rows(provider):
    packed = PackedPatches(torch.randn(2 * 15 + 247, 48), [(2, 3, 5), (1, 13, 19)])
    rows = torch.randn(len(packed["pixel_values"]), 8)
    made = object.__new__(provider)
    tokens = made.tokens_of(rows, packed)
    assert torch.equal(made.rows(tokens, packed), rows)
    assert tokens.shape[:-1] == made.inputs(packed)["pixel_values"].shape[:-1]
    assert tokens.count_nonzero() == rows.count_nonzero()  # zeros on padding


@pytest.mark.gpu
def test_transformers_in_graphs_is_transformers_and_its_gradients_are_not_to_be_kept():
    device, dtype = torch.device("cuda"), torch.bfloat16
    config, state = bench.weights(None, "tiny", device)
    eager, graphs = (x(config, state, device, dtype) for x in (peers.Padded, peers.PaddedGraphs))
    first, second = (PackedPatches(torch.randn(510, 48).to(dtype), GRIDS).to(device) for _ in range(2))
    gradient = eager.tokens_of(bench.seeded_gradient(first, 64, dtype), first)
    ready = graphs.inputs(first)
    for packed in (first, second):
        ready["pixel_values"].copy_(eager.inputs(packed)["pixel_values"])
        for mode in ("forward", "train"):
            theirs = bench.step(eager, eager.inputs(packed), mode, gradient)()
            assert bench.relative_error(bench.step(graphs, ready, mode, gradient)(), theirs) < 1e-2
        found, expected = (torch.cat([x.grad.flatten() for x in y.model.parameters()]) for y in (graphs, eager))
        assert bench.relative_error(found, expected) < 1e-2
    kept = graphs.vision.encoder.layers[0].mlp.fc1.weight.grad
    before = kept.clone()
    ready["pixel_values"].copy_(eager.inputs(first)["pixel_values"])
    bench.step(graphs, ready, "train", gradient)()
    assert not torch.equal(kept, before)
