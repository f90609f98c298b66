"""`siglip2-packed align`: does this model compute what the checkpoint means, stage by stage?

Compared with two independent computations of the same images in float32: `kernels_ref`, and
`transformers.Siglip2VisionModel`, both padded. A stage passes only if the largest absolute difference, the relative
error and the worst token's cosine are all within their bounds; a cosine alone would pass wrong positions.
`--gradients` also compares those of every parameter with transformers' in float32, `--decode` the features of JPEG
files that are decoded faster with those of their exact pixels.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from siglip2_packed.collection.sources import image_files
from siglip2_packed.doctor import environment
from siglip2_packed.flags import DTYPES, pick_device, write_json
from siglip2_packed.inspection.compare import Comparison, compare_stages, loading
from siglip2_packed.inspection.decoding import compare_decoding, jpegs
from siglip2_packed.inspection.gradients import Gradient, compare_gradients
from siglip2_packed.inspection.photographs import photographs
from siglip2_packed.inspection.references import (
    MISPLACED,
    Case,
    References,
    full_precision,
    image_case,
    load_packed,
    load_references,
    random_cases,
    run_packed,
    run_references,
    wrong_positions,
)
from siglip2_packed.modeling import Siglip2PackedVisionModel
from siglip2_packed.ops.segments import Segments
from siglip2_packed.preprocess import Siglip2PackedImageProcessor


def run(args: argparse.Namespace) -> int:
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    if not -1 <= args.threshold <= 1:
        raise ValueError(f"--threshold is a cosine, from -1 to 1, got {args.threshold:g}")
    for flag, value in {"--decode": args.decode, "--max-num-patches": args.max_num_patches}.items():
        if value is not None and not (args.use_real_images or args.images):
            raise ValueError(f"{flag} is about images in files: give --images or --use-real-images")
    files = (photographs() if args.use_real_images else []) + image_files(args.images or [])
    device, dtype = pick_device(args.device), DTYPES[args.dtype]
    if args.decode == "gpu":  # refused here, not at the end
        Siglip2PackedImageProcessor.from_pretrained(args.ckpt, decode="gpu").on_card(device)

    with full_precision() as tf32:
        ours = load_packed(args.ckpt, device, dtype, args.attn_implementation)
        attention_of(
            ours, [(16, 16)]
        )  # one that was asked for and cannot run is refused before anything else is loaded
        backends: dict[str, str] = {}
        found = environment(device) | {
            "checkpoint": args.ckpt,
            "dtype": args.dtype if dtype == torch.float32 else f"{args.dtype}, against float32",
            "tf32": tf32,
            "attention": args.attn_implementation,
        }
        for name, value in found.items():
            if value != "absent":
                print(f"{name:<15} {value}")

        references = load_references(args.ckpt, device, dtype)
        weights = loading(references)
        print(f"{'weights':<15} {'PASS' if weights.passed else 'FAIL'}: {weights.note}")

        def examine(case: Case, alone: bool = False) -> list[Comparison]:
            backend = backends[case.name] = attention_of(ours, case.grids)
            compared = compare_case(case, ours, references, dtype, args.threshold)
            if args.verbose and alone:
                print_alone(case, compared, backend)
            if (args.verbose and not alone) or not all(one.passed for one in compared):
                print_stages(case, compared, backend)
            return compared

        def differentiate(case: Case) -> list[Gradient]:
            wrong = wrong_positions(references.theirs.model, case.grids)
            if references.theirs.not_loaded or len(wrong) == len(case.images):
                return []
            found = compare_gradients(case, ours, references, dtype, args.seed, wrong)
            print_gradients(case, found, attention_of(ours, case.grids, gradients=True))
            return found

        compared = [weights]
        gradients: list[Gradient] = []
        if files:
            if args.verbose:
                print(f"\n{'each image alone':<28} {'against':<13} {NUMBERS}          worst stage (attention)")
            for file in tqdm(files, unit="image", leave=False, disable=True if args.verbose else None):
                compared += examine(image_case(file.name, [file], args.ckpt, args.max_num_patches), alone=True)
            together = f"{len(files)} image{'s' * (len(files) > 1)} in one pack"
            cases = iter([image_case(together, files, args.ckpt, args.max_num_patches)])
        else:
            cases = random_cases(ours.config, args.batch_size, args.image_size, args.seed)
        for case in cases:
            compared += examine(case)
            gradients += differentiate(case) if args.gradients else []
        if args.decode:
            exact = dtype == torch.float32
            model = ours if exact else load_packed(args.ckpt, device, torch.float32, args.attn_implementation)
            compared += decodings(args, files, model)

    if not args.verbose:
        print_summary(compared[1:])
    verdicts = [one.passed for one in compared] + [one.passed for one in gradients]
    failed = verdicts.count(False)
    summary = f"{failed} of {len(verdicts)} FAILED" if failed else f"ALL TESTS PASSED ({len(verdicts)} comparisons)"
    print(f"\n{summary}")
    if args.json:
        rows = [asdict(one) | {"attention": backends.get(one.case, "")} for one in compared]
        report = {"passed": not failed, "summary": summary, "environment": found, "rows": rows}
        write_json(args.json, report | ({"gradients": [asdict(one) for one in gradients]} if args.gradients else {}))
    return 1 if failed else 0


def decodings(args: argparse.Namespace, files: list[Path], model: Siglip2PackedVisionModel) -> list[Comparison]:
    """Of every file as a JPEG; scikit-image's photographs are no large photos, and so are enlarged to some as well."""
    print(f"\n{f'decode {args.decode}, in float32':<42} {NUMBERS}")
    found = []
    for name, data in jpegs(files, enlarge=args.use_real_images):
        one = compare_decoding(name, data, args.ckpt, model, args.decode, args.max_num_patches)
        print(f"  {name:<40} {one.numbers}   {one.note}")
        found.append(one)
    if not any(one.max_abs for one in found):
        why = (
            "larger ones, or fewer --max-num-patches, have a scale" if args.decode == "scaled" else "the card took none"
        )
        note = f"nothing to compare: every file has its exact pixels ({why})"
        print(f"  FAIL   {note}")
        found.append(Comparison("all files", "exact", args.decode, False, note=note))
    return found


def attention_of(model: Siglip2PackedVisionModel, grids: Sequence[tuple[int, int]], gradients: bool = False) -> str:
    """The backend that runs for images of these (h, w)."""
    with torch.set_grad_enabled(gradients):
        return model._attention(Segments([h * w for h, w in grids], model.device)).backend


@torch.inference_mode()
def compare_case(
    case: Case, model: Siglip2PackedVisionModel, references: References, dtype: torch.dtype, threshold: float
) -> list[Comparison]:
    """Every stage of the model, which computes in `dtype`, against every reference."""
    ours, (stages, baseline) = run_packed(model, case), run_references(references, case)
    wrong = wrong_positions(references.theirs.model, case.grids)
    if len(wrong) == len(case.images):
        print(f"  {case.name}: with kernels_ref only, {MISPLACED}")
    limits: dict[str, Any] = {"dtype": dtype, "threshold": threshold, "baseline": baseline, "wrong": wrong}
    compared = (compare_stages(case, name, ours, theirs, **limits) for name, theirs in stages.items())
    return list(itertools.chain.from_iterable(compared))


NUMBERS = f"{'max abs':>8} {'relative':>9} {'bound':>8} {'min cosine':>11} {'mean cosine':>12}"


def print_alone(case: Case, compared: Sequence[Comparison], backend: str) -> None:
    """One image: a line for each reference, with the stage that came closest to its bounds."""
    for against, stages in _by_reference(compared):
        worst = max(stages, key=lambda stage: stage.severity)
        token = "" if worst.token is None else f", token {worst.token} {worst.position}"
        print(f"  {case.name:<26} {against:<13} {worst.numbers}   {worst.stage}{token} ({backend})")


def print_summary(compared: Sequence[Comparison]) -> None:
    """A line for each kind of stage and reference: how many there were, and what came closest to its bounds."""
    print(f"\n{'against':<13} {'stage':<14} {'compared':>8} {NUMBERS}          worst (--verbose: all)")
    kinds: dict[tuple[str, str], list[Comparison]] = {}
    for one in compared:
        kinds.setdefault((one.reference, one.stage.split(" ")[0]), []).append(one)
    for (reference, kind), some in kinds.items():
        worst = max(some, key=lambda one: one.severity)
        name = kind if len({one.stage for one in some}) == 1 else f"{kind}s"
        print(f"{reference:<13} {name:<14} {len(some):>8} {worst.numbers}   {worst.stage}, {worst.where or worst.case}")


def print_stages(case: Case, compared: Sequence[Comparison], backend: str) -> None:
    """A line for each stage and reference."""
    patches = sum(h * w for h, w in case.grids)
    for against, stages in _by_reference(compared):
        print(f"\n{case.name}, {patches} patches, attention {backend}, against {against}")
        print(f"  {'stage':<14} {NUMBERS}          worst")
        for one in stages:
            print(f"  {one.stage:<14} {one.numbers}   {': '.join(filter(None, (one.where, one.note)))}")


def print_gradients(case: Case, compared: Sequence[Gradient], backend: str) -> None:
    """Those that failed, at least the five that came closest to their bounds, worst first; and the largest error."""
    patches = sum(h * w for h, w in case.grids)
    print(f"\n{case.name}, {patches} patches, attention {backend}, gradients against transformers in float32")
    print(f"  {f'of {len(compared)} parameters':<52} {'relative':>9} {'transformers':>13} {'bound':>8}")
    worst = sorted(compared, key=lambda one: -one.severity)
    for one in worst[: max(5, sum(not one.passed for one in compared))]:
        theirs = "-" if math.isnan(one.transformers_error) else f"{one.transformers_error:.1e}"
        numbers = f"{one.relative_error:9.1e} {theirs:>13} {one.bound:8.1e}"
        print(f"  {one.parameter:<52} {numbers}   {'PASS' if one.passed else 'FAIL'}   {one.note}")
    largest = max(compared, key=lambda one: one.relative_error)
    print(f"  largest: {largest.relative_error:.1e} of {largest.parameter}")


def _by_reference(compared: Sequence[Comparison]) -> Iterator[tuple[str, list[Comparison]]]:
    for against, stages in itertools.groupby(compared, key=lambda one: one.reference):
        yield against, list(stages)
