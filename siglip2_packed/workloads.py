"""The workloads every benchmark uses, so that numbers compare.

Shapes: T patches, P patch_dim, D hidden size, F MLP width, L layers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from siglip2_packed.packing import Grid, make_layout

WORKLOADS: dict[str, dict] = {
    "uniform256": {"images": 64, "budgets": [256], "aspect_ratio_max": 1.0},
    "naflex256": {"images": 64, "budgets": [256], "aspect_ratio_max": 2.5},
    "mixed": {"images": 48, "budgets": [64, 144, 256, 576, 1024], "aspect_ratio_max": 2.0},
    "long": {"images": 10, "budgets": [256, 1024, 2304, 4096], "aspect_ratio_max": 2.0},
    "single256": {"images": 1, "budgets": [256], "aspect_ratio_max": 1.0},
    "video": {"images": 8, "budgets": [196], "aspect_ratio_max": 1.0, "frames": 8},
}


def grids(name: str, *, images: int | None = None, seed: int = 0) -> list[Grid]:
    """(t, h, w) of a workload's images: a budget b and an aspect ratio a (log-uniform), h = ⌊√(b/a)⌋, w = ⌊b/h⌋."""
    workload = WORKLOADS[name]
    rng = random.Random(seed)
    limit = math.log(workload["aspect_ratio_max"])
    drawn = []
    for _ in range(workload["images"] if images is None else images):
        budget = rng.choice(workload["budgets"])
        aspect = math.exp(rng.uniform(-limit, limit))
        h = max(1, int(math.sqrt(budget / aspect)))
        drawn.append((workload.get("frames", 1), h, max(1, budget // h)))
    return drawn


def forward_flops(config, grid_thw: Sequence[Grid]) -> int:
    """L·(2T(4D² + 2DF) + 4D·Σ len²) + 2TPD over real patches; padding never counts as work. Training: 3x."""
    d, f, total = config.hidden_size, config.intermediate_size, sum(make_layout(grid_thw).lengths)
    linear = config.num_hidden_layers * 2 * total * (4 * d * d + 2 * d * f)
    return linear + attention_flops(config, grid_thw) + 2 * total * config.patch_size**2 * config.num_channels * d


def attention_flops(config, grid_thw: Sequence[Grid]) -> int:
    """L·4D·Σ len², every frame a segment."""
    lengths = make_layout(grid_thw).lengths
    return config.num_hidden_layers * 4 * config.hidden_size * sum(length * length for length in lengths)
