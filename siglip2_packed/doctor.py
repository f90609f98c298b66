"""`siglip2-packed doctor`: what runs for my pack on my card, and was it checked?"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import platform
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from siglip2_packed.flags import DTYPES, pick_device, write_json
from siglip2_packed.measure import cpu_bfloat16, cpu_name
from siglip2_packed.ops.survey import SHARED_MEAN, Finding, Plan, Shape, findings, plan
from siglip2_packed.version import __version__

SHAPES = {"base": Shape(768, 3072, 12, 16), "so400m": Shape(1152, 4304, 16, 16)}
OF_QUERIES = f"""\
dQ at a shared mean: the relative error of the gradient of queries where all keys and values share a mean of
{SHARED_MEAN:g} (from biases, or an attention sink). FlashAttention, and kernels built like it, lose this gradient to
the rounding of their output, without a warning. That is how they compute: none is refused for it."""
PACKAGES = ("torch", "triton", "transformers", "flash-attn", "flash-attn-3", "flash-attn-4", "safetensors", "numpy")


def run(args: argparse.Namespace) -> int:
    if args.image_patches < 1 or min(args.patches) < 1:
        raise ValueError("--patches and --image-patches must be at least 1")
    device = torch.empty(0, device=pick_device(args.device)).device  # with its number
    report: dict[str, Any] = {"environment": environment(device), "models": []}
    for name, value in report["environment"].items():
        print(f"{name:<24} {value}")
    for dtype in args.dtypes or ["bfloat16" if device.type == "cuda" else "float32"]:
        for name in args.shapes:
            print(f"\n{name} in {dtype}", flush=True)
            found = print_findings(findings(device, DTYPES[dtype], SHAPES[name]), args.verbose)
            packs = {T: images(T, args.image_patches) for T in args.patches}
            plans = {T: planned(device, DTYPES[dtype], SHAPES[name], lengths, args) for T, lengths in packs.items()}
            for one, alike in itertools.groupby(plans, key=plans.__getitem__):
                print_plan([packs[T] for T in alike], one)
            report["models"].append(
                {
                    "shape": name,
                    "dtype": dtype,
                    "operations": [as_json(finding) for finding in found],
                    "packs": [
                        {"patches": T, "images": packs[T], **(one if isinstance(one, dict) else one._asdict())}
                        for T, one in plans.items()
                    ],
                }
            )
    if args.verbose:
        print(f"\n{OF_QUERIES}")
    if args.json:
        write_json(args.json, report)
    return 0


def images(patches: int, most: int) -> list[int]:
    """Lengths of the images of a pack: all as long as may be, but the last."""
    whole, rest = divmod(patches, most)
    return [most] * whole + [rest] * bool(rest)


def planned(device: torch.device, dtype: torch.dtype, shape: Shape, lengths: list[int], args) -> Plan | dict[str, str]:
    """What runs; or why a backend that was asked for by name does not."""
    try:
        return plan(device, dtype, shape, lengths, args.attn_implementation)
    except ValueError as refused:
        return {"refused": str(refused)}


def print_findings(coming: Iterable[Finding], verbose: bool) -> list[Finding]:
    """Each that was not right or cannot be imported, or all, as they come: a check may end the process. Then, how many
    were right."""
    found, headed = [], False
    for finding in coming:
        found.append(finding)
        if verbose or finding.broken or (finding.verdict is not None and not finding.verdict.right):
            if not headed:
                print(f"\n  {'operation':<28} {'implementation':<24} found")
            headed = True
            print(f"  {finding.operation:<28} {finding.implementation:<24} {finding}", flush=True)
    verdicts = [finding.verdict for finding in found if finding.verdict is not None]
    wrong, broken = sum(not x.right for x in verdicts), sum(finding.broken for finding in found)
    absent = sum(finding.why_not is not None for finding in found) - broken
    blank = "\n" * headed
    print(
        f"{blank}  implementations checked: {len(verdicts)}, {f'{wrong} WRONG' if wrong else 'none wrong'}; "
        f"{f'BROKEN: {broken}; ' if broken else ''}"
        f"not for this machine: {absent}{'' if verbose else ' (--verbose: each, its errors or why)'}"
    )
    return found


def print_plan(packs: Sequence[list[int]], found: Plan | dict[str, str]) -> None:
    """Packs, as the lengths of their images, that one plan holds for."""
    print()
    for lengths in packs:
        count = f"{len(lengths)} image{'s' * (len(lengths) > 1)}"
        print(f"  a pack of {sum(lengths):,} patches, {count} of up to {max(lengths)}")
    if isinstance(found, dict):
        print(f"    refused: {found['refused']}")
        return
    operations = dict.fromkeys([*found.inference, *found.training])
    print(f"    {'':<26} {'inference':<26} training")
    for name in operations:
        print(f"    {name:<26} {found.inference.get(name, '-'):<26} {found.training.get(name, '-')}")


def as_json(finding: Finding) -> dict[str, Any]:
    verdict = finding.verdict
    return {
        "operation": finding.operation,
        "implementation": finding.implementation,
        "why_not": finding.why_not,
        "broken": finding.broken,
        "right": None if verdict is None else verdict.right,
        "errors": {} if verdict is None else verdict.errors,
        "bounds": {} if verdict is None else verdict.bounds,
        "raised": "" if verdict is None else verdict.reason,
        "dq_at_shared_mean": finding.dq_at_shared_mean,
    }


def environment(device: torch.device) -> dict[str, str]:
    """Versions and the device's name, as every report states them."""
    found = {"siglip2_packed": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    found["device"] = f"{device} ({device_name(device)})"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found["capability"] = f"{major}.{minor}"
        found["cuda"] = str(torch.version.cuda)
    elif device.type == "cpu":
        by = cpu_bfloat16()
        found["bfloat16"] = (
            f"by {by}: about twice as fast as float32 or faster" if by else "not faster than float32 here"
        )
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"
