"""Towers whose linear layers somebody has quantised: this package knows the modules by what they are called only."""

from __future__ import annotations

import sys

import torch
from torch import nn

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What weights are computed in; all other dtypes are those of quantised ones."""


def keep_layout(model: nn.Module) -> None:
    """Before a forward on the CPU: bitsandbytes' 4-bit layers leave their weights as they lie.

    Where a CPU multiplies bfloat16, their first inference turns weights into another layout, for good: it takes widths
    that are multiples of 64 only (so400m's 4,304 is none), gives no gradients ever after, and loses the order of its
    scales when it is saved. See findings/bitsandbytes_4bit_on_cpu.
    """
    if "bitsandbytes" not in sys.modules:
        return
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
