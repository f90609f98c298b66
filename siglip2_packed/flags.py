"""What commands have in common: the flags that choose and place a model, and JSON reports."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from siglip2_packed.ops.attention import ATTN_IMPLEMENTATIONS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_model_flags(
    parser: argparse.ArgumentParser,
    ckpt: str = "checkpoint: a folder or a hub id",
    dtype: str = "dtype to compute in",
    default: str = "float32",
) -> None:
    """--ckpt, --device, --dtype, --max-num-patches, --attn-implementation.

    Args:
        default: the dtype; anything that is none says how the command chooses, which then finds None.
    """
    parser.add_argument("--ckpt", required=True, help=ckpt)
    parser.add_argument("--device", help="device to run on (cuda if there is one, else cpu)")
    chosen = default if default in DTYPES else None
    parser.add_argument("--dtype", choices=list(DTYPES), default=chosen, help=f"{dtype} ({default})")
    parser.add_argument("--max-num-patches", type=int, metavar="N", help="patches an image (as the checkpoint says)")
    parser.add_argument("--attn-implementation", choices=ATTN_IMPLEMENTATIONS, default="auto", help="backend (auto)")


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or CUDA where there is one. ValueError if it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # no such name or device
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def write_json(path: str, report: Any) -> None:
    """Writes a report, NaN and infinities as null: JSON has none."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(_finite(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
