"""The benchmarks of several ranks: their ways train, their rows compare with one rank, and encode writes the same."""

import csv
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from siglip2_packed.data import PatchBudgetBatchSampler

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import encode_ranks
import scaling

TINY = "--shape tiny --budgets 300 --dtype float32 --max-num-patches 48 --packs 2 --warmup 0 --samples 1 --every 2"


def read(file):
    rows = list(csv.DictReader(file.open()))
    found = {(row["provider"].removeprefix("siglip2_packed:"), row["metric"]): float(row["p50"]) for row in rows}
    assert len(found) == len(rows) and np.isfinite(list(found.values())).all()
    return rows, found


def test_ways_on_two_ranks_are_compared_with_one(ranks, checkpoint, tmp_path):
    out = tmp_path / "rows.csv"
    flags = [*TINY.split(), "--workers", "0", "--ckpt", str(checkpoint("tiny")), "--out", str(out), "--ways"]
    rows = scaling.Rows("scaling", "card")
    rows.add("siglip2_packed:fsdp", "tiny_max48_budget300_ranks1", "train", "float32", "patches_per_s", 100, "1/s")
    rows.write(out)
    ways = ["fsdp_units3", "fsdp_prefetch2", "fsdp_loader", "balance"]
    ranks(scaling.main, [*flags, *ways])
    rows, found = read(out)
    assert {row["workload"] for row in rows[1:]} == {"tiny_max48_budget300_ranks2", "tiny_mixed_budget300_ranks2"}
    for way in ways:
        rate, step = found[way, "patches_per_s"], found[way, "time"] / 1e3
        assert rate * step == pytest.approx(2 * 280, rel=0.2)
        assert ((way, "efficiency") in found) == way.startswith(("fsdp_units3", "fsdp_prefetch2"))
    assert found["fsdp_units3", "efficiency"] == pytest.approx(
        found["fsdp_units3", "patches_per_s"] / 2 / 100, rel=1e-4
    )
    assert 0 < found["fsdp_loader", "loader_wait"] < 1


def test_every_way_has_one_that_is_run_alone():
    assert set(scaling.SAME_ALONE.values()) == {"fsdp", "ddp", "ddp_graphs", "fsdp_loader"} <= set(scaling.WAYS)


def test_processes_of_a_loader_have_packs_to_make_until_the_end(checkpoint, monkeypatch):
    """A sample is a turn of each; warm-up takes what they made ahead; and no epoch ends, after which all begin anew."""
    monkeypatch.setattr(scaling.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(scaling, "packs_of", lambda crops, *rest: crops)
    args = SimpleNamespace(every=3, workers=7, warmup=2, samples=5, profile=5, max_num_patches=48)
    way = scaling.WAYS["fsdp_loader"]
    assert (scaling.steps_of_sample(way, args), scaling.steps_of_sample(scaling.WAYS["fsdp"], args)) == (7, 3)
    crops = scaling.loaded(checkpoint("tiny"), args, 300, way)
    assert len(PatchBudgetBatchSampler(crops.grids, 300, num_replicas=2, rank=0)) >= (2 + 5) * 7 + 5 + 2 * 7


def test_a_rank_without_steps_behind_its_first_shard(tmp_path):
    (tmp_path / ".parts").mkdir()
    for number in range(3):
        (tmp_path / ".parts" / f"{number:05d}.csv").write_text("input\n" + "a.jpg\n" * 4)
    with pytest.raises(ValueError, match="rank 1 has 1 shards"):
        encode_ranks.rate(tmp_path, 2)


def test_rates_of_ranks_add_up(tmp_path):
    (tmp_path / ".parts").mkdir()
    for number, when in enumerate([10, 12, 11, 13, 14, 14]):
        part = tmp_path / ".parts" / f"{number:05d}.csv"
        part.write_text("input\n" + "a.jpg\n" * 4)
        os.utime(part, (when, when))
    assert encode_ranks.rate(tmp_path, 2) == 8 / 4 + 8 / 2


def test_rows_that_differ_are_not_reported():
    alone = {"index": b"a", "rows": torch.ones(3, 4)}
    near = alone | {"rows": alone["rows"] + 1e-3}
    assert encode_ranks.check(alone, alone, "bfloat16", True) == 0
    assert encode_ranks.check(near, alone, "bfloat16", False) == pytest.approx(1e-3, rel=1e-3)
    for found, dtype, invariant in (
        (near, "bfloat16", True),
        (near, "float32", False),
        (alone | {"index": b"b"}, "bfloat16", False),
        (alone | {"rows": alone["rows"] * torch.nan}, "bfloat16", False),
        (alone | {"rows": alone["rows"] * 1.1}, "bfloat16", False),
    ):
        with pytest.raises(SystemExit, match="nothing is reported"):
            encode_ranks.check(found, alone, dtype, invariant)
