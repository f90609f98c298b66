"""Gradients of every parameter: our model's in its dtype, held against transformers' in float32.

What transformers itself reaches in our dtype is measured beside it. Attention in half precision may lose the gradients
of q_proj and k_proj without a word; see `siglip2-packed doctor`.

Shapes: N images, T patches of all of them, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from siglip2_packed.inspection.references import Case, References, Stages, run_packed, run_transformers
from siglip2_packed.modeling import Siglip2PackedVisionModel


@dataclass(frozen=True)
class Gradient:
    """Of one parameter, for the images of one case. Errors are ‖x − ref‖ / ‖ref‖."""

    case: str
    parameter: str
    passed: bool
    relative_error: float = math.nan
    transformers_error: float = math.nan
    """Of transformers in our model's dtype; NaN where that is float32."""
    bound: float = math.nan
    note: str = ""

    @property
    def severity(self) -> float:
        """How close to its bound it came: above 1, it failed."""
        return self.relative_error / self.bound if math.isfinite(self.relative_error) else math.inf


def compare_gradients(
    case: Case,
    model: Siglip2PackedVisionModel,
    references: References,
    dtype: torch.dtype,
    seed: int,
    wrong: Sequence[int] = (),
) -> list[Gradient]:
    """Every parameter's, the loss being a random projection of all token features and of the pooled ones.

    Args:
        dtype: what the model computes in.
        wrong: images whose positions transformers gets wrong: no part of the loss.
    """
    weights = projection(case, model, dtype, seed, wrong)
    exact = gradients(references.theirs.model, run_transformers(references.theirs.model, case), weights)
    ours = gradients(model, run_packed(model, case), weights)
    low: dict[str, Tensor] = {}
    if references.low is not None:
        low = gradients(references.low, run_transformers(references.low, case), weights)
    depth, patches = len(model.encoder.layers), sum(h * w for h, w in case.grids)
    return [compare(case.name, name, ours, exact, low, dtype, depth, patches) for name in exact | ours]


def projection(case: Case, model: Any, dtype: torch.dtype, seed: int, wrong: Sequence[int]) -> Stages:
    """Weights of the loss by stage, "final" `[T, D]` and "pooled" `[N, D]`, which `dtype` has exactly."""
    generator = torch.Generator().manual_seed(seed)
    D, sizes = model.config.hidden_size, [h * w for h, w in case.grids]
    counted = torch.tensor([index not in wrong for index in range(len(sizes))])
    counts = {"final": counted.repeat_interleave(torch.tensor(sizes)), "pooled": counted}
    return {
        stage: (torch.randn(len(rows), D, generator=generator) * rows[:, None]).to(dtype).to(model.device)
        for stage, rows in counts.items()
    }


def gradients(model: Any, stages: Stages, weights: Stages) -> dict[str, Tensor]:
    """Of the parameters that the stages depend on, by Hugging Face's names."""
    losses = [(stages[name].float() * x).sum() for name, x in weights.items() if name in stages]
    named = {name.removeprefix("vision_model."): x for name, x in model.named_parameters()}
    found = torch.autograd.grad(torch.stack(losses).sum(), list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found) if gradient is not None}


def compare(
    case: str,
    name: str,
    ours: dict[str, Tensor],
    exact: dict[str, Tensor],
    low: dict[str, Tensor],
    dtype: torch.dtype,
    depth: int,
    patches: int,
) -> Gradient:
    """One parameter.

    float32: 1e-5, growing with the root of the depth. bfloat16, float16: 1.2 times transformers' own error, plus an
    allowance for chance where there are few values, or few patches whose roundings they sum, and a rounding. The bias
    of k_proj has no gradient in exact arithmetic: what roundings make of it is measured by that of k_proj's weight.
    """
    if name not in ours or name not in exact:
        whose = "this model" if name in exact else "transformers"
        return Gradient(case, name, False, note=f"{whose} has no such gradient")
    measure = exact[name.replace("k_proj.bias", "k_proj.weight")].double().norm()
    if not measure:
        return Gradient(case, name, False, note="nothing to compare: in the reference it is 0")

    def error(x: Tensor) -> float:
        return float((x.double() - exact[name].double()).norm() / measure)

    relative, theirs, bound = error(ours[name]), math.nan, 1e-5 * math.sqrt(1 + depth)
    if dtype != torch.float32:
        theirs = error(low[name])
        factor = 1.2 + 4 / math.sqrt(min(exact[name].numel(), patches))
        bound = factor * theirs + torch.finfo(dtype).eps / 2
    note = "" if math.isfinite(relative) and not math.isnan(bound) else "non-finite values"
    return Gradient(case, name, relative <= bound and not note, relative, theirs, bound, note)
