"""Timing in turn, and results as rows of one long table."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from siglip2_packed.ops.runtime.check import relative_error

__all__ = [
    "COLUMNS",
    "PEAK_TFLOPS",
    "Rows",
    "card_name",
    "check_rate",
    "cpu_bfloat16",
    "cpu_name",
    "in_turn",
    "relative_error",
    "version",
]

PEAK_TFLOPS = {"H100": 989, "H200": 989}
"""Dense bfloat16, by the data sheets; MFU is printed for these only."""
FASTEST_TFLOPS = 2500
"""Of any other card."""
CORE_TFLOPS = {"float32": 0.4, "bfloat16": 10.0, "float16": 10.0}
"""Of a core of a CPU, what none reaches: two AVX-512 units, or AMX, at more than 6 GHz."""

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


def check_rate(flops: float, ms: float, card: str, dtype: str, float8: bool = False) -> None:
    """Raises ValueError for a time in which this card, or CPU, cannot have done the work."""
    if not (math.isfinite(ms) and ms > 0):
        raise ValueError(f"a time of {ms:g} ms is none")
    tflops, most = flops / ms / 1e9, most_tflops(card, dtype, float8)
    if tflops > most:
        raise ValueError(f"{tflops:,.6g} TFLOP/s in {ms:.3g} ms: {card} does no more than {most:,.6g}")


def most_tflops(card: str, dtype: str, float8: bool = False) -> float:
    """What no work on this card, or CPU, exceeds. Products in float8 are twice as fast as in bfloat16."""
    if card == cpu_name():
        return (os.cpu_count() or 1) * CORE_TFLOPS.get(dtype, max(CORE_TFLOPS.values()))
    known = next((peak for name, peak in PEAK_TFLOPS.items() if name in card), FASTEST_TFLOPS)
    return known * (2 if float8 else 1)


class Rows:
    """Collects rows of one benchmark run and writes them."""

    def __init__(self, bench: str, card: str):
        self.rows: list[dict] = []
        self.common = {"bench": bench, "card": card, "commit": _commit(), "date": datetime.date.today().isoformat()}
        self.common |= {name: version(name) for name in ("torch", "triton", "transformers")}

    def add(self, provider: str, workload: str, mode: str, dtype: str, metric: str, values, unit: str) -> dict:
        """One number, as quantiles of its samples.

        Raises:
            ValueError: what cannot be: a time of nothing, more than the whole of the card's peak.
        """
        quantiles = np.quantile(np.atleast_1d(values), [0.2, 0.5, 0.8])
        self._check(provider, workload, mode, dtype, metric, quantiles)
        p20, p50, p80 = (f"{x:.6g}" for x in quantiles)
        row = {"provider": provider, "workload": workload, "mode": mode, "dtype": dtype, "metric": metric, "unit": unit}
        self.rows.append(self.common | row | {"p20": p20, "p50": p50, "p80": p80})
        return self.rows[-1]

    def leave_out(self, provider: str, workload: str, mode: str, dtype: str, reason: str) -> None:
        """A row in the place of a number that there is not: `not_run`, the reason where the unit would be."""
        row = {"provider": provider, "workload": workload, "mode": mode, "dtype": dtype, "metric": "not_run"}
        self.rows.append(self.common | row | {"p20": "", "p50": "", "p80": "", "unit": " ".join(reason.split())[:200]})

    def _check(self, provider: str, workload: str, mode: str, dtype: str, metric: str, values: np.ndarray) -> None:
        float8 = "fp8" in provider or "float8" in dtype
        limits = {"mfu": 2.0 if float8 else 1.0, "tflops": most_tflops(self.common["card"], dtype, float8)}
        if metric == "time" and not (np.isfinite(values).all() and (values > 0).all()):
            raise ValueError(f"{provider} {workload} {mode}: a time of {values[1]:g} ms is none")
        if metric in limits and not (np.isfinite(values).all() and (values <= limits[metric]).all()):
            raise ValueError(
                f"{provider} {workload} {mode}: {metric} {values.max():.6g} is above {limits[metric]:g}, "
                f"all that {self.common['card']} can do: the time is wrong"
            )

    def write(self, path: Path, replacing: Sequence[str] = ()) -> None:
        """With `replacing`, columns, the file's earlier rows stay, but for those that agree with a new one in them."""
        if replacing and path.exists():
            with path.open(newline="") as file:
                earlier = list(csv.DictReader(file))
            new = {tuple(row[name] for name in replacing) for row in self.rows}
            self.rows = [row for row in earlier if tuple(row[name] for name in replacing) not in new] + self.rows
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # a run may be stopped as it writes
        with whole.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        whole.replace(path)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def card_name() -> str:
    """The GPU, as it stands in the results' file names: `h100`."""
    words = torch.cuda.get_device_name().lower().split()
    return next((word for word in words if any(c.isdigit() for c in word)), "_".join(words))


def cpu_bfloat16() -> str:
    """By which instructions this CPU multiplies bfloat16: `amx`, `avx512_bf16`, or nothing if it has none."""
    asked = {"amx": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}
    return next((name for name, ask in asked.items() if getattr(torch.cpu, ask, bool)()), "")


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
