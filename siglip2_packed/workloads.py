"""What benchmarks have in common, so that numbers compare: workloads, sizes of the model, and the encoders beside it.

Imports nothing heavy: a command's help lists the names.

Shapes: T patches, P patch_dim, D hidden size, F MLP width, L layers.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

Grid = tuple[int, int, int]

WORKLOADS: dict[str, dict] = {
    "uniform256": {"images": 64, "budgets": [256], "aspect_ratio_max": 1.0},
    "naflex256": {"images": 64, "budgets": [256], "aspect_ratio_max": 2.5},
    "mixed": {"images": 48, "budgets": [64, 144, 256, 576, 1024], "aspect_ratio_max": 2.0},
    "long": {"images": 10, "budgets": [256, 1024, 2304, 4096], "aspect_ratio_max": 2.0},
    "pages": {"grids": [(1, 48, 48)] * 3 + [(1, 64, 64)] * 3},
    "single256": {"images": 1, "budgets": [256], "aspect_ratio_max": 1.0},
    "video": {"images": 8, "budgets": [196], "aspect_ratio_max": 1.0, "frames": 8},
    "pack1x256": {"grids": [(1, 16, 16)]},
    "pack4x256": {"grids": [(1, 16, 16)] * 4},
    "pack8x256": {"images": 8, "budgets": [256], "aspect_ratio_max": 1.0},
    "pack4096": {"grids": [(1, 32, 32), (1, 24, 32), (1, 36, 36), (1, 28, 36)]},
    "page64x64": {"grids": [(1, 64, 64)]},
}
SMALL_PACKS = ("pack1x256", "pack4x256", "pack8x256", "pack4096", "page64x64")
"""A rank's step of LLaVA training, where the host is the limit."""

FIELDS = "hidden_size intermediate_size num_hidden_layers num_attention_heads patch_size num_patches".split()
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(zip(FIELDS, (64, 128, 3, 4, 4, 16))),
    "tiny72": dict(zip(FIELDS, (144, 208, 2, 2, 4, 16))),
    "base": dict(zip(FIELDS, (768, 3072, 12, 12, 16, 256))),
    "so400m": dict(zip(FIELDS, (1152, 4304, 27, 16, 16, 256))),
}
"""Of the vision tower, as `Siglip2VisionConfig` takes them."""

PROVIDERS: dict[str, tuple[str, ...]] = {
    "siglip2_packed": tuple(WORKLOADS),
    "siglip2_packed:compile": ("mixed",),
    "siglip2_packed:cudagraph": ("single256", *SMALL_PACKS),
    "siglip2_packed:batch_invariant": ("uniform256", "mixed", "single256", *SMALL_PACKS),
    "siglip2_packed:fp8": ("uniform256", "mixed"),
    "transformers_sdpa_padded": tuple(WORKLOADS),
    "transformers_sdpa_padded:cudagraph": ("single256", *SMALL_PACKS),
    "transformers_sdpa_padded:compile": SMALL_PACKS,
    "timm_naflexvit": tuple(WORKLOADS),
    "transformers_cosmos3_edge": tuple(WORKLOADS),
    "seed_padded": ("uniform256", "naflex256", "mixed"),
    "gemm_chain": tuple(WORKLOADS),
}
"""Encoders, and the workloads for which each says something."""
DEFAULT_PROVIDERS = (
    "siglip2_packed",
    "transformers_sdpa_padded",
    "timm_naflexvit",
    "transformers_cosmos3_edge",
    "gemm_chain",
)


def grids(name: str, *, images: int | None = None, seed: int = 0) -> list[Grid]:
    """(t, h, w) of a workload's images, as it gives them (again, for more) or drawn: a budget, then an aspect ratio."""
    workload = WORKLOADS[name]
    if "grids" in workload:
        given = workload["grids"]
        return list(itertools.islice(itertools.cycle(given), len(given) if images is None else images))
    rng = random.Random(seed)
    drawn = []
    for _ in range(workload["images"] if images is None else images):
        h, w = _draw(rng, rng.choice(workload["budgets"]), workload["aspect_ratio_max"])
        drawn.append((workload.get("frames", 1), h, w))
    return drawn


def random_packs(count: int, seed: int = 0) -> list[list[Grid]]:
    """Packs of 250 to 4,096 patches: one to eight images, of log-uniform budgets of 64 to 1,024 patches, up to 2.5:1.

    What is smaller or larger is drawn again.
    """
    rng = random.Random(seed)
    packs: list[list[Grid]] = []
    while len(packs) < count:
        budgets = [round(math.exp(rng.uniform(math.log(64), math.log(1024)))) for _ in range(rng.randint(1, 8))]
        pack = [(1, *_draw(rng, budget, 2.5)) for budget in budgets]
        if 250 <= sum(map(math.prod, pack)) <= 4096:
            packs.append(pack)
    return packs


def _draw(rng: random.Random, budget: int, aspect_ratio_max: float) -> tuple[int, int]:
    """A budget b and an aspect ratio a (log-uniform): h = ⌊√(b/a)⌋, w = ⌊b/h⌋."""
    limit = math.log(aspect_ratio_max)
    h = max(1, int(math.sqrt(budget / math.exp(rng.uniform(-limit, limit)))))
    return h, max(1, budget // h)


def fitting_grids(name: str, patches: int) -> list[Grid]:
    """Images of the workload that fit `patches` together: one of each budget, small ones first, and again; or one."""
    drawn, taken = grids(name), []
    budgets = WORKLOADS[name].get("budgets") or sorted({h * w for _, h, w in drawn})
    kinds = [[grid for grid in drawn if _budget(grid, budgets) == budget] for budget in sorted(budgets)]
    for grid in filter(None, itertools.chain.from_iterable(itertools.zip_longest(*kinds))):
        if math.prod(grid) <= patches:
            patches -= math.prod(grid)
            taken.append(grid)
    return taken or [min(drawn, key=math.prod)]


def _budget(grid: Grid, budgets: Sequence[int]) -> int:
    return min(budget for budget in budgets if grid[1] * grid[2] <= budget)


def forward_flops(config, grid_thw: Sequence[Grid]) -> int:
    """L·(2T(4D² + 2DF) + 4D·Σ len²) + 2TPD over real patches; padding never counts as work. Training: 3x."""
    d, f, total = config.hidden_size, config.intermediate_size, sum(_lengths(grid_thw))
    linear = config.num_hidden_layers * 2 * total * (4 * d * d + 2 * d * f)
    return linear + attention_flops(config, grid_thw) + 2 * total * config.patch_size**2 * config.num_channels * d


def attention_flops(config, grid_thw: Sequence[Grid]) -> int:
    """L·4D·Σ len², every frame a segment."""
    return config.num_hidden_layers * 4 * config.hidden_size * sum(length * length for length in _lengths(grid_thw))


def _lengths(grid_thw: Sequence[Grid]) -> Iterator[int]:
    return (h * w for t, h, w in grid_thw for _ in range(t))
