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
    code, rows = run(tmp_path, "--modes", "forward", "train", "--providers", *names)
    assert code == 0 and list(rows[0]) == COLUMNS
    assert {r["provider"] for r in rows if r["metric"] == "time" and r["mode"] == "forward"} == set(names[:4])
    assert {r["provider"] for r in rows if r["metric"] == "time" and r["mode"] == "train"} == set(names[:2])
    assert all(float(r["p50"]) < 1e-5 for r in rows if r["metric"] == "relative_error")
    times = {r["provider"]: float(r["p50"]) for r in rows if r["metric"] == "time" and r["mode"] == "forward"}
    speed = {r["provider"]: float(r["p50"]) for r in rows if r["metric"] == "patches_per_s" and r["mode"] == "forward"}
    total = sum(h * w for _, h, w in bench.grids("naflex256", images=2))
    assert speed["siglip2_packed"] == pytest.approx(total / times["siglip2_packed"] * 1e3, rel=1e-3)
    assert "cudagraph: cannot be built" in capsys.readouterr().out


def test_defaults_on_a_cpu_are_small_and_every_stage_is_a_line(tmp_path, capsys, monkeypatch):
    """The base shape, a forward, one round, images of each size in 512 patches; here without the hub's sizes."""
    monkeypatch.setitem(bench.SHAPES, "base", bench.SHAPES["tiny"])
    out = tmp_path / "rows.csv"
    assert cli.main(["bench", "--device", "cpu", "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    told = capsys.readouterr()
    assert {r["mode"] for r in rows} == {"forward"} and {r["dtype"] for r in rows} == {"float32"}
    assert "mixed: 3 images, 459 patches" in told.err
    promised = "siglip2_packed", "transformers_sdpa_padded", "timm_naflexvit", "transformers_cosmos3_edge", "gemm_chain"
    assert {r["provider"] for r in rows} == set(promised)
    for workload in ("uniform256", "mixed"):
        for name in promised:
            (row,) = [
                r for r in rows if (r["provider"], r["workload"]) == (name, workload) and r["metric"] == "time"
            ] or [r for r in rows if (r["provider"], r["workload"], r["metric"]) == (name, workload, "not_run")]
            assert f"building {name}" in told.err
            if row["metric"] == "time":
                assert f"{workload}: checking {name}" in told.err and f"{workload} forward: timing {name}" in told.err
            else:
                assert row["unit"] in told.out and row["unit"].startswith("cannot ") and not row["p50"]
    assert "timm" in told.out  # of no such size as tiny, or not installed


def test_a_workload_that_a_provider_does_not_have_is_said(tmp_path, capsys):
    flags = ["--providers", "siglip2_packed", "seed_padded", "--workloads", "long", "--images", "1"]
    code, rows = run(tmp_path, "--shape", "tiny", *flags)
    (row,) = [r for r in rows if r["metric"] == "not_run"]
    assert code == 0 and row["provider"] == "seed_padded" and row["workload"] == "long"
    assert (
        row["unit"] == "cannot run: is timed on uniform256, naflex256, mixed only"
        and row["unit"] in capsys.readouterr().out
    )


@pytest.mark.parametrize("provider", ["siglip2_packed", "gemm_chain"])
def test_a_time_that_cannot_be_is_refused(tmp_path, monkeypatch, capsys, provider):
    def impossible(steps, *_):
        return {name: [1e-7] * 3 if name == provider else [1e4] * 3 for name in steps}

    monkeypatch.setattr(bench, "steady_milliseconds", impossible)
    code, rows = run(tmp_path, "--providers", "siglip2_packed", "gemm_chain")
    assert code == 1
    assert {r["provider"] for r in rows if r["metric"] == "time"} == {"siglip2_packed", "gemm_chain"} - {provider}
    (row,) = [r for r in rows if r["metric"] == "not_run"]
    assert row["provider"] == provider and "TFLOP/s in 1e-07 ms" in row["unit"]
    assert "TFLOP/s in 1e-07 ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("metric", "value", "dtype", "allowed"),
    [
        ("mfu", 124.0, "bfloat16", False),
        ("mfu", 1.01, "bfloat16", False),
        ("mfu", 0.6, "bfloat16", True),
        ("tflops", 990.0, "bfloat16", False),
        ("tflops", 900.0, "bfloat16", True),
        ("time", 0.0, "bfloat16", False),
        ("time", float("nan"), "bfloat16", False),
        ("time", -1.0, "float32", False),
        ("mfu", float("nan"), "bfloat16", False),
    ],
)
def test_rows_beyond_the_card_are_not_kept(metric, value, dtype, allowed):
    rows = Rows("train_tower", "NVIDIA H200")
    if allowed:
        rows.add("siglip2_packed", "mixed", "train", dtype, metric, [value], "")
        return
    with pytest.raises(ValueError, match="siglip2_packed mixed train: "):
        rows.add("siglip2_packed", "mixed", "train", dtype, metric, [value], "")
    assert not rows.rows


def test_products_in_float8_may_be_twice_as_fast():
    rows = Rows("encoder", "NVIDIA H200")
    rows.add("siglip2_packed:fp8", "mixed", "forward", "bfloat16", "mfu", [1.2], "")
    with pytest.raises(ValueError, match=r"2\.1 is above 2"):
        rows.add("siglip2_packed:fp8", "mixed", "forward", "bfloat16", "mfu", [2.1], "")


@pytest.mark.parametrize("fault", [0.0, 1.5, float("nan")])
def test_a_reference_that_would_pass_anything_is_refused(tmp_path, monkeypatch, capsys, fault):
    monkeypatch.setattr(bench, "reference", lambda *_: torch.full((492, 64), fault))
    assert cli.main(["bench", *TINY, "--providers", "siglip2_packed"]) == 2
    assert "nothing to compare with" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "value"), [("--images", "0"), ("--images", "-2"), ("--rounds", "0")])
def test_nothing_to_time_is_an_error(capsys, flag, value):
    assert cli.main(["bench", *TINY, flag, value]) == 2
    assert f"{flag} must be at least 1, got {value}" in capsys.readouterr().err


def test_a_forwards_floor_is_its_products_and_attention(monkeypatch):
    config, state = bench.weights(None, "tiny", "cpu")
    grids = [(1, 400, 300), (2, 13, 19)]
    packed = bench.PackedPatches(torch.randn(400 * 300 + 2 * 13 * 19, 48).bfloat16(), grids)
    attention = config.num_hidden_layers * 4 * config.hidden_size * ((400 * 300) ** 2 + 2 * (13 * 19) ** 2)
    names = "siglip2_packed", "gemm_chain"
    for name in names:
        monkeypatch.setattr(bench.PROVIDERS[name], "tokens", lambda self, inputs: torch.zeros(1))
        monkeypatch.setattr(bench.PROVIDERS[name], "inputs", lambda self, packed: None)
    monkeypatch.setattr(bench, "reference", lambda *_: torch.tensor([[1.0, 2.0]]))
    monkeypatch.setattr(bench.PROVIDERS["siglip2_packed"], "rows", lambda *_: torch.tensor([[1.0, 2.0]]))
    monkeypatch.setattr(bench, "steady_milliseconds", lambda steps, *_: {name: [40.0, 39.0, 90.0] for name in steps})
    providers = {name: bench.PROVIDERS[name](config, state, "cpu", torch.bfloat16) for name in names}
    rows = Rows("encoder", "NVIDIA H100 80GB HBM3")
    bench.measure(rows, config, None, "long", packed, providers, ["forward", "train"], torch.bfloat16, 1)
    (row,) = [row for row in rows.rows if row["metric"] == "over_floor"]
    assert (row["provider"], row["mode"]) == ("siglip2_packed", "forward")
    assert float(row["p50"]) == pytest.approx(40 / (40 + attention / 500e12 * 1e3), rel=1e-4)
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
