"""benchmarks/many_ranks.py: plans for ranks that are not there."""

import csv
import multiprocessing
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import many_ranks


def test_rows(tmp_path, monkeypatch):
    """Processes that are forked from one that has its imports behind it plan as those that begin with them."""
    out, context = tmp_path / "rows.csv", multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["siglip2_packed.encode"])
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(sys, "argv", ["many_ranks.py", "--images", "3000", "--ranks", "3", "--out", str(out)])
    many_ranks.main()
    found = {(row["workload"], row["metric"]): float(row["p50"]) for row in csv.DictReader(out.open())}
    for budget, most in ((4096, 1.01), (65536, 1.05)):
        assert 1 <= found[f"sampler_budget{budget}_images3000_ranks3", "whole_epoch"] < most
        assert 0.8 < found[f"sampler_budget{budget}_images3000_ranks3", "utilisation"] <= 1
    for name in ("encode", "encode_pooled"):
        assert 1 <= found[f"{name}_images3000_ranks3", "busiest_over_mean"] < 1.1
        assert found[f"{name}_images3000_ranks3", "idle_ranks"] == 0
