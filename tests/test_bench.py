"""The benchmark checks answers before it times them, and times what it says."""

import csv
from types import SimpleNamespace

import pytest
import torch

from siglip2_packed import bench, cli
from siglip2_packed.measure import COLUMNS, Rows

TINY = ["--shape", "tiny", "--workloads", "naflex256", "--images", "2", "--rounds", "1", "--device", "cpu"]


def run(tmp_path, *flags):
    out = tmp_path / "rows.csv"
    code = cli.main(["bench", *TINY, *flags, "--out", str(out)])
    return code, list(csv.DictReader(out.open()))


def test_rows_of_every_provider_that_runs_here(tmp_path, capsys):
    names = ["siglip2_packed", "transformers_sdpa_padded", "seed_padded", "gemm_chain", "siglip2_packed:cudagraph"]
    code, rows = run(tmp_path, "--providers", *names)
    assert code == 0 and list(rows[0]) == COLUMNS
    assert {r["provider"] for r in rows if r["metric"] == "time" and r["mode"] == "forward"} == set(names[:4])
    assert {r["provider"] for r in rows if r["metric"] == "time" and r["mode"] == "train"} == set(names[:2])
    assert all(float(r["p50"]) < 1e-5 for r in rows if r["metric"] == "relative_error")
    times = {r["provider"]: float(r["p50"]) for r in rows if r["metric"] == "time" and r["mode"] == "forward"}
    speed = {r["provider"]: float(r["p50"]) for r in rows if r["metric"] == "patches_per_s" and r["mode"] == "forward"}
    total = sum(h * w for _, h, w in bench.grids("naflex256", images=2))
    assert speed["siglip2_packed"] == pytest.approx(total / times["siglip2_packed"] * 1e3, rel=1e-3)
    assert "cudagraph: cannot be built" in capsys.readouterr().out


def test_a_forwards_floor_is_its_products_and_attention(monkeypatch):
    config, state = bench.weights(None, "tiny", "cpu")
    grids = [(1, 400, 300), (2, 13, 19)]
    packed = bench.PackedPatches(torch.randn(400 * 300 + 2 * 13 * 19, 48).bfloat16(), grids)
    attention = config.num_hidden_layers * 4 * config.hidden_size * ((400 * 300) ** 2 + 2 * (13 * 19) ** 2)
    names = "siglip2_packed", "gemm_chain"
    for name in names:
        monkeypatch.setattr(bench.PROVIDERS[name], "tokens", lambda self, inputs: torch.zeros(1))
        monkeypatch.setattr(bench.PROVIDERS[name], "inputs", lambda self, packed: None)
    monkeypatch.setattr(bench, "reference", lambda exact, packed: torch.ones(1, 1))
    monkeypatch.setattr(bench.PROVIDERS["siglip2_packed"], "rows", lambda *_: torch.ones(1, 1))
    monkeypatch.setattr(bench, "steady_milliseconds", lambda steps, *_: {name: [4.0, 2.0, 9.0] for name in steps})
    providers = {name: bench.PROVIDERS[name](config, state, "cpu", torch.bfloat16) for name in names}
    rows = Rows("encoder", "NVIDIA H100 80GB HBM3")
    bench.measure(rows, config, None, "long", packed, providers, ["forward", "train"], torch.bfloat16, 1)
    (row,) = [row for row in rows.rows if row["metric"] == "over_floor"]
    assert (row["provider"], row["mode"]) == ("siglip2_packed", "forward")
    assert float(row["p50"]) == pytest.approx(4 / (4 + attention / 500e12 * 1e3), rel=1e-4)
    assert attention / 500e12 * 1e3 > 1


@pytest.mark.parametrize(("seconds", "samples"), [(0.8, 3), (0.02, 13)])
def test_samples_take_as_long_as_the_warm_up(monkeypatch, seconds, samples):
    """Each is one step; the first of all, which compiles, is not among them."""
    now, naps = 0.0, iter([5.0])

    def step():
        nonlocal now
        now += next(naps, seconds)

    class Event:
        def __init__(self, **_):
            pass

        def record(self):
            self.time = now

        def synchronize(self):
            pass

        def elapsed_time(self, later):
            return 1e3 * (later.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: now))
    times = bench.steady_milliseconds({"step": step}, 2, torch.device("cuda"))["step"]
    assert times == pytest.approx([1e3 * seconds] * 2 * samples)


@pytest.mark.parametrize("fault", ["wrong", "nan"])
def test_a_wrong_answer_is_refused_and_not_timed(tmp_path, monkeypatch, capsys, fault):
    class Wrong(bench.Packed):
        def rows(self, tokens, packed):
            return tokens + 0.1 if fault == "wrong" else torch.full_like(tokens, float("nan"))

    monkeypatch.setitem(bench.PROVIDERS, "transformers_sdpa_padded", Wrong)
    code, rows = run(tmp_path, "--providers", "transformers_sdpa_padded", "--modes", "forward")
    assert code == 1 and "refused" in capsys.readouterr().out
    assert not [r for r in rows if r["metric"] == "time"]


def test_a_checkpoint_is_timed_without_its_head(tmp_path, checkpoint):
    code, rows = run(tmp_path, "--ckpt", str(checkpoint("tiny", full=True)), "--providers", "siglip2_packed")
    assert code == 0 and rows


def test_rows_replace_those_of_an_earlier_run_of_the_same_kind(tmp_path):
    def run(workload, value):
        rows = Rows("bulk", "a card")
        rows.add("siglip2_packed", workload, "encode", "float32", "time", [value, value], "ms")
        rows.write(tmp_path / "rows.csv", replacing=["workload"])

    for workload, value in (("small", 1.0), ("large", 2.0), ("small", 3.0)):
        run(workload, value)
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert [(row["workload"], row["p50"]) for row in csv.DictReader(file)] == [("large", "2"), ("small", "3")]
