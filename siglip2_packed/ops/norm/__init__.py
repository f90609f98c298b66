"""LayerNorm and the element-wise work around it. `eager` is the contract; `triton` is the same in fewer passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.check import Results, random
from siglip2_packed.ops.runtime.choice import Function

MODULES = {"eager": "siglip2_packed.ops.norm.eager", "triton": "siglip2_packed.ops.norm.triton"}
EPS = 1e-6


def _cases(device: torch.device, dtype: torch.dtype, D: int, late: bool) -> Iterator[tuple]:
    x, (weight, bias, shift) = random(device, dtype, 13, D), random(device, dtype, 3, D, seed=1)
    carry = random(device, torch.float32, D, seed=2)
    yield x, weight, bias, EPS, None, None
    if late:
        yield x, weight, bias, EPS, None, shift
        yield x, weight, bias, EPS, carry, shift


def _norm(function: Callable, *case) -> Results:
    out, total = function(*case)
    return {"out": out} if total is None else {"out": out, "total": total}


def _add_cases(device: torch.device, dtype: torch.dtype, D: int) -> Iterator[tuple]:
    (x, update), (weight, bias, shift) = random(device, dtype, 2, 13, D), random(device, dtype, 3, D, seed=1)
    yield x, update, weight, bias, EPS, shift


def _add(function: Callable, *case) -> Results:
    return dict(zip(("out", "total"), function(*case)))


def _backward_cases(device: torch.device, dtype: torch.dtype, D: int) -> Iterator[tuple]:
    """More rows than programs, whose sums go on from row to row."""
    T = 8 * choice.card(device).multiprocessors + 5
    grad, residual, x, update = random(device, dtype, 4, T, D)
    weight, bias = random(device, dtype, 2, D, seed=1)
    for some in (None, update):
        yield grad, residual, x, some, weight, bias, EPS


def _backward(function: Callable, grad: Tensor, residual: Tensor, x: Tensor, update: Tensor | None, *norm) -> Results:
    """The output takes the place of the update."""
    update = None if update is None else update.clone()
    out, sums = function(grad, residual, x, update, *norm, place=update)
    return {"dx": grad, "out": out, **{f"sum {i}": x for i, x in enumerate(sums)}}


LAYER_NORM = Function("norm.layer_norm", MODULES, _norm, _cases)
ADD_LAYER_NORM = Function("norm.add_layer_norm", MODULES, _add, _add_cases)
LAYER_NORM_BACKWARD = Function("norm.layer_norm_backward_", MODULES, _backward, _backward_cases)
FUNCTIONS = (LAYER_NORM, ADD_LAYER_NORM, LAYER_NORM_BACKWARD)
