"""`benchmarks/attention.py` times what was compared before, on the path that it times, and keeps what it measured."""

import csv
import sys
from pathlib import Path

import pytest
import torch

from siglip2_packed.ops.attention import eager

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))


@pytest.fixture
def bench(monkeypatch):
    """On the CPU, few rows, a time of 1 ms each; `bench.found`: what there is to time."""
    import attention

    def right(segments):
        return lambda q, k, v: eager.attention(q, k, v, segments)

    def wrong_without_gradients(segments):
        return lambda q, k, v: eager.attention(q, k, v, segments) * (1.0 if q.requires_grad else 1.05)

    def wrong_gradients(segments):
        return lambda q, k, v: eager.attention(q + q - q.detach(), k, v, segments)

    def nan(segments):
        return lambda q, k, v: eager.attention(q, k, v, segments) * float("nan")

    def raises(segments):
        def run(q, k, v):
            raise RuntimeError("no kernel for this shape")

        return run

    functions = dict(triton=right, inference=wrong_without_gradients, gradients=wrong_gradients, nan=nan, raises=raises)
    monkeypatch.setattr(
        attention, "providers", lambda head_dim, segments: {name: f(segments) for name, f in functions.items()}
    )
    monkeypatch.setattr(attention, "CUDA", torch.device("cpu"))
    monkeypatch.setattr(attention, "ROWS", 32)
    monkeypatch.setattr(attention, "HEADS", 2)
    monkeypatch.setattr(attention, "ceilings", lambda: (700.0, 4.0))
    monkeypatch.setattr(attention, "microseconds", lambda functions: {name: [1e3] * 3 for name in functions})
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    return attention


def main(bench, monkeypatch, tmp_path, *arguments):
    path = tmp_path / "attention_h200.csv"
    monkeypatch.setattr(sys, "argv", ["attention.py", "--out", str(path), *arguments])
    bench.main()
    return path


def rows_of(path, metric):
    return [row for row in csv.DictReader(path.open()) if row["metric"] == metric]


def test_what_is_wrong_or_raises_is_reported_and_not_timed(bench, monkeypatch, tmp_path, capsys):
    path = main(bench, monkeypatch, tmp_path, "--lengths", "8", "16", "--workloads")
    timed = {(row["provider"], row["workload"], row["mode"]) for row in rows_of(path, "time")}
    packs = [f"len{length}_k{K}" for length in (8, 16) for K in (64, 72)]
    assert timed == {("triton", pack, mode) for pack in packs for mode in ("forward", "backward")}
    errors = {(row["provider"], row["mode"]): float(row["p50"]) for row in rows_of(path, "relative_error")}
    assert errors["inference", "forward"] > 0.04 and errors["inference", "backward"] < 0.01
    assert errors["gradients", "forward"] < 0.01 and errors["gradients", "backward"] > 0.5
    printed = capsys.readouterr().out
    assert printed.count("refused: relative errors") == 3 * len(packs)
    assert printed.count("RuntimeError: no kernel for this shape") == len(packs)


def test_a_run_that_is_stopped_leaves_what_it_has_measured(bench, monkeypatch, tmp_path):
    run = bench.run

    def stopped(rows, workload, *arguments):
        if workload == "len16_k64":
            raise KeyboardInterrupt
        run(rows, workload, *arguments)

    monkeypatch.setattr(bench, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(bench, monkeypatch, tmp_path, "--lengths", "8", "16", "--workloads")
    assert {row["workload"] for row in rows_of(tmp_path / "attention_h200.csv", "time")} == {"len8_k64"}


def test_the_table_leaves_out_who_is_not_there(bench, monkeypatch, tmp_path):
    tables = pytest.importorskip("readme_tables")
    main(bench, monkeypatch, tmp_path, "--lengths", "8", "--workloads")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    table = tables.attention()
    assert "| head_dim 72 | own Triton |\n|---|---|\n| 8 | 1000 / 1000 |\n" in table
    assert table.startswith("NVIDIA H200, bfloat16")
    assert table.endswith("![attention](pictures/attention_h200.png)")
    sys.modules.pop("readme_tables")
