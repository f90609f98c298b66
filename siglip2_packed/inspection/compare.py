"""A stage of our model against a reference, as numbers with a verdict; and all stages of a case.

Passing takes three things at once, the largest absolute difference, the relative error and the worst token's cosine.
A cosine alone would pass wrong positions, and nothing that is not finite, or not there, ever passes.

Shapes: N images, T patches of all of them, D features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from siglip2_packed.inspection.references import MISPLACED, Case, References, Stages


class Errors(NamedTuple):
    """How far x is from a reference."""

    max_abs: float
    relative: float
    """‖x − ref‖ / ‖ref‖"""
    min_cosine: float
    """Of the worst row."""
    mean_cosine: float
    worst_row: int
    """The row of the largest absolute difference."""


@dataclass(frozen=True)
class Comparison:
    """One stage, of one case, against one reference."""

    case: str
    reference: str
    stage: str
    passed: bool
    max_abs: float = math.nan
    relative_error: float = math.nan
    min_cosine: float = math.nan
    mean_cosine: float = math.nan
    max_abs_bound: float = math.nan
    relative_error_bound: float = math.nan
    cosine_bound: float = math.nan
    image: str = ""
    token: int | None = None
    position: tuple[int, int] | None = None
    note: str = ""

    @property
    def severity(self) -> float:
        """How close to its bounds it came: above 1, it failed."""
        parts = (self.max_abs / self.max_abs_bound, self.relative_error / self.relative_error_bound)
        cosine = (1 - self.min_cosine) / max(1 - self.cosine_bound, 1e-12)
        return max(*parts, cosine) if math.isfinite(sum(parts) + cosine) else math.inf

    @property
    def where(self) -> str:
        return self.image if self.token is None else f"{self.image}, token {self.token} {self.position}"

    @property
    def numbers(self) -> str:
        return (
            f"{self.max_abs:8.1e} {self.relative_error:9.1e} {self.relative_error_bound:8.1e} {self.min_cosine:11.7f} "
            f"{self.mean_cosine:12.7f}   {'PASS' if self.passed else 'FAIL'}"
        )


def measure(x: Tensor, reference: Tensor) -> Errors:
    """x and reference `[rows, features]`, finite and of one shape."""
    x, reference = x.double(), reference.double()
    difference = x - reference
    norms = x.norm(dim=1), reference.norm(dim=1)
    cosine = (x * reference).sum(dim=1) / (norms[0] * norms[1])
    # 0/0: a row of zeros points nowhere, and is right only where the reference's is one as well
    cosine = torch.where(norms[0] * norms[1] > 0, cosine, (norms[0] == norms[1]).double())
    size, total = float(difference.norm()), float(reference.norm())
    relative = size / total if total else (math.inf if size else 0.0)
    largest = difference.abs().amax(dim=1)
    return Errors(float(largest.max()), relative, float(cosine.min()), float(cosine.mean()), int(largest.argmax()))


def bounds(
    reference: Tensor, dtype: torch.dtype, depth: int, threshold: float, baseline: Errors | None = None
) -> tuple[float, float, float]:
    """What passes: the largest absolute difference, the largest relative error and the smallest cosine.

    float32: 1e-4 at unit scale, that is times the reference's rms where that is above 1 (or a tenth of its largest
    value, where a few channels stand out). Layers round independently, so the relative error may grow with the root
    of their number: 1e-5 at the embeddings (measured: below 1e-6), 5e-5 after 27 layers.

    bfloat16, float16: reference and `baseline` are what transformers' own padded model reaches in this dtype, each
    against float32. Ours may be 1.1 times as far off, plus an allowance for chance where there are few values to
    average over, and for the largest difference, a single value, 2 times. Without a baseline: four roundings a layer.
    """
    scale = max(1.0, float(reference.double().square().mean().sqrt()), float(reference.abs().max()) / 10)
    if dtype == torch.float32:
        return 1e-4 * scale, 1e-5 * math.sqrt(1 + depth), max(threshold, 1 - 1e-6)
    rounding = torch.finfo(dtype).eps / 2
    if baseline is None:
        relative = 4 * rounding * math.sqrt(1 + depth)
        return 10 * relative * scale, relative, threshold
    factor = 1.1 + 4 / math.sqrt(reference.numel())
    return 2 * baseline.max_abs + rounding * scale, factor * baseline.relative + rounding / 10, threshold


def compare(
    ours: Tensor | None,
    reference: Tensor | None,
    images: Sequence[str],
    grids: Sequence[tuple[int, int]],
    *,
    case: str = "",
    stage: str = "",
    against: str = "",
    dtype: torch.dtype = torch.float32,
    depth: int = 0,
    threshold: float = 0.99,
    baseline: Errors | None = None,
    note: str = "",
) -> Comparison:
    """One stage.

    Args:
        ours, reference: `[T, D]`, or `[N, D]` for a stage with one row an image; None if there is none.
        images, grids: N names and (h, w), to say where the worst token is.
        depth: layers below this stage.
        baseline: errors of transformers in `dtype`, see `bounds`.

    Fails on any non-finite value, on shapes that differ, and where there is nothing to compare: no values, or features
    that are the same everywhere, as of weights that were never loaded, which anything agrees with.
    """
    sizes = [h * w for h, w in grids]
    lengths = [1] * len(grids) if stage == "pooled" else sizes

    def place(row: int) -> dict[str, Any]:
        index = 0
        while row >= lengths[index]:
            row, index = row - lengths[index], index + 1
        found: dict[str, Any] = {"image": images[index]}
        return found if stage == "pooled" else found | {"token": row, "position": divmod(row, grids[index][1])}

    def failed(reason: str, **values: Any) -> Comparison:
        return Comparison(case, against, stage, False, note="; ".join(filter(None, (reason, note))), **values)

    if ours is None or reference is None:
        return failed(f"nothing to compare: {'this model' if ours is None else 'the reference'} has no {stage}")
    if ours.shape != reference.shape:
        return failed(f"shapes differ: {list(ours.shape)}, the reference has {list(reference.shape)}")
    if ours.ndim != 2 or ours.numel() == 0:
        return failed(f"empty comparison: {len(images)} images, shape {list(ours.shape)}")
    if ours.shape[0] != sum(lengths):
        return failed(f"shapes differ: {ours.shape[0]} rows, the grids cover {sum(lengths)}")

    bad = [~x.isfinite().all(dim=1) for x in (ours, reference)]
    if (bad[0] | bad[1]).any():
        counts = [f"{int(rows.sum())} rows of {name}" for rows, name in zip(bad, ("ours", "the reference"))]
        return failed(f"non-finite values in {' and '.join(counts)}", **place(int((bad[0] | bad[1]).int().argmax())))

    same = nothing_in(reference, lengths) if stage != "patches" else ""  # an image may well be of one colour
    if same:
        return failed(f"nothing to compare: in the reference {same}")

    if baseline is not None and not math.isfinite(baseline.relative):
        return failed(f"non-finite values in transformers' own {str(dtype).removeprefix('torch.')} model")
    errors = measure(ours, reference)
    max_abs, relative, cosine = bounds(reference, dtype, depth, threshold, baseline)
    faults = [
        f"max abs {errors.max_abs:.1e} > {max_abs:.1e}" * (errors.max_abs > max_abs),
        f"relative {errors.relative:.1e} > {relative:.1e}" * (errors.relative > relative),
        f"cosine {errors.min_cosine:.7f} < {cosine:.7f}" * (errors.min_cosine < cosine),
    ]
    return Comparison(
        case,
        against,
        stage,
        not any(faults),
        *errors[:4],
        max_abs_bound=max_abs,
        relative_error_bound=relative,
        cosine_bound=cosine,
        note="; ".join(filter(None, (*faults, note))),
        **place(errors.worst_row),
    )


def nothing_in(features: Tensor, lengths: Sequence[int]) -> str:
    """Why features `[rows, D]`, of images of these lengths, tell nothing apart; empty if they do."""
    if (features == features[0, 0]).all() and (features.shape[1] > 1 or not features.any()):
        return f"every feature is {float(features[0, 0]):g}"
    images = features.split(list(lengths))
    if max(lengths) > 1 and all(torch.equal(image, image[:1].expand_as(image)) for image in images):
        return "all patches of an image have the same features"
    return ""


def compare_stages(
    case: Case,
    against: str,
    ours: Stages,
    reference: Stages,
    *,
    dtype: torch.dtype = torch.float32,
    threshold: float = 0.99,
    baseline: Stages | None = None,
    wrong: Sequence[int] = (),
) -> list[Comparison]:
    """The stages of a case against one reference.

    Args:
        baseline: what transformers computes in `dtype`; see `bounds`.
        wrong: images whose positions transformers gets wrong: neither compared with it nor part of the baseline.
    """
    everyone = range(len(case.images))
    right = [index for index in everyone if index not in wrong]
    chosen = right if against == "transformers" else list(everyone)
    if wrong and not chosen:
        return []
    note = ""
    if len(chosen) < len(case.images):
        note = f"without {', '.join(case.images[index] for index in wrong)}: {MISPLACED}"

    def compared(stage: str, depth: int, dtype: torch.dtype) -> Comparison:
        x, ref, low = (stages.get(stage) for stages in (ours, reference, baseline or {}))
        errors = None
        if ref is not None and low is not None and right:
            errors = measure(_rows_of(low, case, right, stage), _rows_of(ref, case, right, stage))
        return compare(
            _rows_of(x, case, chosen, stage),
            _rows_of(ref, case, chosen, stage),
            [case.images[index] for index in chosen],
            [case.grids[index] for index in chosen],
            case=case.name,
            stage=stage,
            against=against,
            dtype=dtype,
            depth=depth,
            threshold=threshold,
            baseline=errors,
            note=note,
        )

    stages = [name for name in ours | reference if name != "patches"]
    found = [compared(stage, depth, dtype) for depth, stage in enumerate(stages)]
    # patches are float32 whatever the model's dtype, and the references that were given them have nothing to add
    return [compared("patches", 0, torch.float32), *found] if against == case.patches_by else found


def _rows_of(rows: Tensor | None, case: Case, images: Sequence[int], stage: str) -> Any:
    """The rows of some images; as they are, if all are wanted or if they do not fit the grids."""
    lengths = [1 if stage == "pooled" else h * w for h, w in case.grids]
    if rows is None or len(images) == len(lengths) or len(rows) != sum(lengths):
        return rows
    return torch.cat([rows.split(lengths)[index] for index in images])


def loading(references: References) -> Comparison:
    """Whether transformers has the checkpoint's weights, as a comparison of its own."""
    theirs, tensors = references.theirs, len(references.reference.state)
    return Comparison("weights", "transformers", "transformers", not theirs.not_loaded, note=theirs.loaded(tensors))
