"""The benchmark of image sizes, and the planning table that is made of its rows."""

import csv
import math
import sys
from pathlib import Path

import pytest
import torch

from siglip2_packed import bench
from siglip2_packed.measure import COLUMNS

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import planning


def test_squares_keep_their_pixels_and_packs_are_full():
    found = dict(planning.workloads(planning.PACK))
    for name, grids in found.items():
        _, h, w = grids[0]
        assert set(grids) == {(1, h, w)} and f"_grid{h}x{w}_images{len(grids)}" in name
        left = planning.PACK - len(grids) * h * w
        assert len(grids) == 1 or 0 <= left < h * w
    for side in (224, 256, 384, 512, 768, 1024):
        (grid,) = next(grids for name, grids in found.items() if name.startswith(f"{side}x{side}_"))
        assert math.prod(grid) == (side // 16) ** 2
    assert found["4032x3024_max256_grid14x18_images65"] == [(1, 14, 18)] * 65


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is left out on a CPU")
def test_rows_of_what_runs_here(tmp_path):
    assert planning.main(["--quick", "--out", str(tmp_path / "rows.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert list(rows[0]) == COLUMNS and {row["bench"] for row in rows} == {"planning"}
    timed = {(row["workload"], row["mode"]) for row in rows if row["metric"] == "time"}
    assert timed == {(name, mode) for name, _ in planning.workloads(512) for mode in ("forward", "train")}
    left_out = {(row["provider"], row["metric"]) for row in rows if row["provider"] != planning.OURS}
    assert left_out == {(planning.FP8, "not_run"), (planning.GRAPHS, "not_run")}


def test_a_wrong_answer_has_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "relative_error", lambda out, expected: math.nan)
    assert planning.main(["--quick", "--out", str(tmp_path / "rows.csv")]) == 1
    assert not [row for row in csv.DictReader((tmp_path / "rows.csv").open()) if row["metric"] == "time"]


def test_the_table_is_of_the_rows(tmp_path, monkeypatch):
    tables = pytest.importorskip("readme_tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.planning() == ""
    rows = bench.Rows("planning", "NVIDIA H200")
    for i, (workload, grids) in enumerate(planning.workloads(planning.PACK)):
        for j, (provider, mode) in enumerate(tables.IMAGE_COSTS.values()):
            if provider != planning.GRAPHS or len(grids) == 1:
                rows.add(provider, workload, mode, "bfloat16", "time", 10 + i + j, "ms")
                if provider != planning.GRAPHS:
                    rows.add(provider, workload, mode, "bfloat16", "peak_memory", 1 + i + j / 10, "GiB")
    rows.leave_out(planning.FP8, workload, "train", "bfloat16", "does not train")
    rows.leave_out(planning.GRAPHS, "all", "forward", "bfloat16", "cannot be built")
    rows.write(tmp_path / "planning_h200.csv")
    table = tables.planning().splitlines()
    assert "| 256×256 | 256 | 16×16 | 256 | 10.0 | 11.0 | 12.0 | 13.0 | 14.0 | 1.00 | 1.20 | 1.30 |" in table
    assert "| 4032×3024 | 256 | 65 | 13.0 (5,000/s) | 15.0 (4,333/s) | 16.0 (4,062/s) | 4.00 | 4.20 | 4.30 |" in table
    order = [line.split(" | ")[0].removeprefix("| ") for line in table if "×" in line]
    assert order == [*(f"{side}×{side}" for side in (224, 256, 384, 512, 768, 1024)), *["4032×3024"] * 3] * 2
    assert len(table) == 7 + 2 * (2 + 9)  # card, titles and blank lines; two heads, and nine sizes each
