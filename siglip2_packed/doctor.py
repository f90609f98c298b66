"""`siglip2-packed doctor`: which attention backends this machine has, and what each was found to be worth."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from typing import Any

import torch

from siglip2_packed.flags import DTYPES, pick_device, write_json
from siglip2_packed.measure import cpu_name
from siglip2_packed.ops.attention import BACKENDS, why_missing, why_not
from siglip2_packed.ops.dispatch import LENGTH_CLASSES, resolve_backend, self_check
from siglip2_packed.version import __version__

HEAD_DIMS = (64, 72)
"""base and so400m."""
PACKAGES = ("torch", "triton", "transformers", "flash-attn", "flash-attn-3", "flash-attn-4", "safetensors", "numpy")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="device to check (cuda if there is one, else cpu)")
    parser.add_argument("--json", metavar="FILE", help="also write everything to this file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    report: dict[str, Any] = {"environment": environment(device)}
    for name, value in report["environment"].items():
        print(f"{name:<24} {value}")
    report["backends"] = {backend: examine(backend, device) for backend in BACKENDS}
    for backend, found in report["backends"].items():
        print(f"\n{backend:<24} {'present' if found['missing'] is None else 'missing: ' + found['missing']}")
        everywhere = {check["reason"] for check in found["checks"]}
        if len(everywhere) == 1 and None not in everywhere:
            print(f"  not checked: {everywhere.pop()}")
            continue
        for check in found["checks"]:
            print(f"  {check['dtype']:<9} head_dim {check['head_dim']:<4} {check['text']}")
    print("\nauto takes")
    report["auto"] = []
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            forward, training = (
                auto_takes(device, DTYPES[dtype], head_dim, needs_grad) for needs_grad in (False, True)
            )
            report["auto"].append({"dtype": dtype, "head_dim": head_dim, "forward": forward, "training": training})
            takes = _listed(forward) + (f"; in training {_listed(training)}" if training != forward else "")
            print(f"  {dtype:<9} head_dim {head_dim:<4} {takes}")
    if args.json:
        write_json(args.json, report)
    return 0


def examine(backend: str, device: torch.device) -> dict[str, Any]:
    """Why a backend is missing, or the self-checks of all dtypes and head_dims."""
    missing = why_missing(backend)
    checks = []
    for dtype in DTYPES if missing is None else ():
        for head_dim in HEAD_DIMS:
            reason = why_not(backend, device, DTYPES[dtype], head_dim)
            check: dict[str, Any] = {"dtype": dtype, "head_dim": head_dim, "reason": reason}
            if reason is None:
                result = self_check(backend, device, DTYPES[dtype], head_dim)
                check |= result._asdict() | {"forward_ok": result.forward_ok, "backward_ok": result.backward_ok}
                verdict = "right" if result.backward_ok else "right forward only" if result.forward_ok else "WRONG"
                check["text"] = f"{verdict}: {result}"
            else:
                check["text"] = f"not checked: {reason}"
            checks.append(check)
    return {"missing": missing, "checks": checks}


def auto_takes(
    device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool
) -> list[tuple[int | None, str]]:
    """(longest typical segment, backend) in ascending order; None: no limit."""
    taken: list[tuple[int | None, str]] = []
    for length, upper in enumerate((*LENGTH_CLASSES, None)):
        backend = resolve_backend("auto", device, dtype, head_dim, needs_grad, length)
        if taken and taken[-1][1] == backend:
            taken.pop()
        taken.append((upper, backend))
    return taken


def _listed(taken: list[tuple[int | None, str]]) -> str:
    return ", ".join(backend if upper is None else f"{backend} up to {upper} patches" for upper, backend in taken)


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
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"
