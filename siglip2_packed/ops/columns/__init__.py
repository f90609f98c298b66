"""Sums and products over rows. `eager` is the contract; `triton` is for many rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.check import Results, random
from siglip2_packed.ops.runtime.choice import Function

MODULES = {"eager": "siglip2_packed.ops.columns.eager", "triton": "siglip2_packed.ops.columns.triton"}


def _cases(device: torch.device, dtype: torch.dtype, *columns: int) -> Iterator[tuple]:
    """More rows than programs, whose sums go on from row to row."""
    T = 16 * choice.card(device).multiprocessors + 37
    yield tuple(random(device, dtype, T, C, seed=C) for C in columns)


def _result(function: Callable, *case) -> Results:
    return {"result": function(*case)}


COLUMN_SUMS = Function("columns.column_sums", MODULES, _result, _cases)
PRODUCT_OVER_ROWS = Function("columns.product_over_rows", MODULES, _result, _cases)
FUNCTIONS = (COLUMN_SUMS, PRODUCT_OVER_ROWS)
