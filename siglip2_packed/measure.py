"""Timing in turn, and results as rows of one long table."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from siglip2_packed.ops.runtime.check import relative_error

__all__ = ["COLUMNS", "Rows", "card_name", "cpu_name", "in_turn", "relative_error", "version"]

COLUMNS = "bench,provider,workload,mode,dtype,metric,p20,p50,p80,unit,card,torch,triton,transformers,commit,date".split(
    ","
)


def in_turn(functions: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Milliseconds of each function, run one after another `repeats` times, so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(warmup + repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round_ >= warmup:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


class Rows:
    """Collects rows of one benchmark run and writes them."""

    def __init__(self, bench: str, card: str):
        self.rows: list[dict] = []
        self.common = {"bench": bench, "card": card, "commit": _commit(), "date": datetime.date.today().isoformat()}
        self.common |= {name: version(name) for name in ("torch", "triton", "transformers")}

    def add(self, provider: str, workload: str, mode: str, dtype: str, metric: str, values, unit: str) -> dict:
        """One number, as quantiles of its samples."""
        p20, p50, p80 = (f"{x:.6g}" for x in np.quantile(np.atleast_1d(values), [0.2, 0.5, 0.8]))
        row = {"provider": provider, "workload": workload, "mode": mode, "dtype": dtype, "metric": metric, "unit": unit}
        self.rows.append(self.common | row | {"p20": p20, "p50": p50, "p80": p80})
        return self.rows[-1]

    def write(self, path: Path, replacing: Sequence[str] = ()) -> None:
        """With `replacing`, columns, the file's earlier rows stay, but for those that agree with a new one in them."""
        if replacing and path.exists():
            with path.open(newline="") as file:
                earlier = list(csv.DictReader(file))
            new = {tuple(row[name] for name in replacing) for row in self.rows}
            self.rows = [row for row in earlier if tuple(row[name] for name in replacing) not in new] + self.rows
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def card_name() -> str:
    """The GPU, as it stands in the results' file names: `h100`."""
    words = torch.cuda.get_device_name().lower().split()
    return next((word for word in words if any(c.isdigit() for c in word)), "_".join(words))


def cpu_name() -> str:
    """The processor, as it may stand in a file name: `amd_epyc`."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":")[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models else name
    return "_".join(name.lower().replace("(r)", "").split())


def _commit() -> str:
    result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip()
