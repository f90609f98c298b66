"""Rows in float8. `eager` is the contract; `triton` makes them in the pass that a LayerNorm, a sum or GELU takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from siglip2_packed.ops.float8.eager import quantize
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.check import Results, random
from siglip2_packed.ops.runtime.choice import Function

__all__ = ["QUANTIZE_ROWS", "quantize", "quantize_rows", "why_not"]

MODULES = {"eager": "siglip2_packed.ops.float8.eager", "triton": "siglip2_packed.ops.float8.triton"}


def _cases(device: torch.device, dtype: torch.dtype, D: int, F: int) -> Iterator[tuple]:
    """A layer's rows: after a LayerNorm, as they are, after a product and a LayerNorm, GELU's, and a last sum."""
    (x, product), (weight, bias, shift) = random(device, dtype, 2, 13, D), random(device, dtype, 3, D, seed=1)
    scales = random(device, torch.float32, 13, 1).abs(), random(device, torch.float32, 1, D).abs()
    nothing = (None,) * 4
    yield x, *nothing, weight, bias, False
    yield x, *nothing, None, None, False
    yield x, product, *scales, shift, weight, bias, False
    yield x, product, *scales, shift, None, None, False
    yield random(device, dtype, 13, F, seed=2), *nothing, None, None, True


def _rows(function: Callable, x: Tensor, product, row_scale, column_scale, shift, weight, bias, gelu: bool) -> Results:
    update = None if product is None else (product, row_scale, column_scale, shift)
    rows, scale, total = function(x, update, None if weight is None else (weight, bias, 1e-6), gelu)
    return {"rows": rows.float() * scale, "scale": scale, "total": total}


QUANTIZE_ROWS = Function("float8.quantize_rows", MODULES, _rows, _cases, rounded={"rows": torch.float8_e4m3fn})


def why_not(device: torch.device) -> str | None:
    """Why there are no products in float8 on a device; None if there are."""
    return choice.float8_unmet(choice.card(device))


@torch.compiler.disable  # nothing can be checked while torch.compile traces
def quantize_rows(x: Tensor, F: int) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """What quantises rows of `x [T, D]` and of the wide layer's F columns; see `float8.eager`."""
    card, (_, D) = choice.card(x.device), x.shape
    return choice.take(QUANTIZE_ROWS, choice.rows(card, x.dtype), x.device, x.dtype, D, F)
