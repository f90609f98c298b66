"""The MLP's wide product and GELU (tanh form). `eager` is the contract; `hopper` has GELU in the product's epilogue,
`triton` a backward of GELU in one pass, `invariant` sums in one order, whatever the number of rows (`linear`'s kernel).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from siglip2_packed.ops.linear import by_every_tile
from siglip2_packed.ops.runtime.check import Results, random
from siglip2_packed.ops.runtime.choice import Function

FOLDER = "siglip2_packed.ops.mlp"
BOTH = {"eager": f"{FOLDER}.eager", "hopper": f"{FOLDER}.hopper"}
FORWARD = BOTH | {"invariant": "siglip2_packed.ops.linear.triton"}
BACKWARD = BOTH | {"triton": f"{FOLDER}.triton"}
T = 4 * 128 + 37


def _cases(device: torch.device, dtype: torch.dtype, D: int, F: int) -> Iterator[tuple]:
    yield random(device, dtype, T, D), random(device, dtype, F, D, scale=D**-0.5), random(device, dtype, F, seed=1)


def _backward_cases(device: torch.device, dtype: torch.dtype, D: int, F: int) -> Iterator[tuple]:
    yield random(device, dtype, T, D), random(device, dtype, D, F, scale=D**-0.5), random(device, dtype, T, F, seed=1)


def _on_few_blocks(function: Callable, *case):
    """Where it can be asked for, so that each thread block has tile after tile and all that it may wait for happens.

    Or by every tile, where that can be asked for.
    """
    few = {"blocks": 3} if "blocks" in inspect.signature(function).parameters else {}
    return by_every_tile(partial(function, **few), *case)


def _active(function: Callable, *case) -> Results:
    return {"active": _on_few_blocks(function, *case)}


def _keep(function: Callable, *case) -> Results:
    return dict(zip(("wide", "active"), _on_few_blocks(function, *case)))


def _backward(function: Callable, dout: Tensor, weight: Tensor, wide: Tensor) -> Results:
    """`active` takes the place of `wide`."""
    dwide, sums = _on_few_blocks(function, dout, weight, wide, wide)
    return {"dwide": dwide, "sums": sums, "active": wide}


LINEAR_GELU = Function("mlp.linear_gelu", FORWARD, _active, _cases)
LINEAR_GELU_KEEP = Function("mlp.linear_gelu_keep", FORWARD, _keep, _cases)
LINEAR_GELU_BACKWARD = Function("mlp.linear_gelu_backward", BACKWARD, _backward, _backward_cases)
FUNCTIONS = (LINEAR_GELU, LINEAR_GELU_KEEP, LINEAR_GELU_BACKWARD)
