"""The MLP's wide product and GELU (tanh form). `eager` is the contract; `hopper` has GELU in the product's epilogue,
`triton` a backward of GELU in one pass, `invariant` and `invariant_hopper` sums in one order, whatever the number of
rows (`linear`'s kernels).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from siglip2_packed.ops.linear import INVARIANT, by_every_tile
from siglip2_packed.ops.runtime.check import Results, random
from siglip2_packed.ops.runtime.choice import Function

FOLDER = "siglip2_packed.ops.mlp"
BOTH = {"eager": f"{FOLDER}.eager", "hopper": f"{FOLDER}.hopper"}
FORWARD = BOTH | INVARIANT
BACKWARD = BOTH | {"triton": f"{FOLDER}.triton"}
T = 4 * 128 + 37


def _cases(device: torch.device, dtype: torch.dtype, D: int, F: int) -> Iterator[tuple]:
    yield random(device, dtype, T, D), random(device, dtype, F, D, scale=D**-0.5), random(device, dtype, F, seed=1)


def _backward_cases(device: torch.device, dtype: torch.dtype, D: int, F: int) -> Iterator[tuple]:
    yield random(device, dtype, T, D), random(device, dtype, D, F, scale=D**-0.5), random(device, dtype, T, F, seed=1)


def _active(function: Callable, *case) -> Results:
    return {"active": by_every_tile(function, *case)}  # type: ignore[dict-item]


def _keep(function: Callable, *case) -> Results:
    return dict(zip(("wide", "active"), by_every_tile(function, *case)))


def _backward(function: Callable, dout: Tensor, weight: Tensor, wide: Tensor) -> Results:
    """`active` takes the place of `wide`."""
    dwide, sums = by_every_tile(function, dout, weight, wide, wide)
    return {"dwide": dwide, "sums": sums, "active": wide}


LINEAR_GELU = Function("mlp.linear_gelu", FORWARD, _active, _cases)
LINEAR_GELU_KEEP = Function("mlp.linear_gelu_keep", FORWARD, _keep, _cases)
LINEAR_GELU_BACKWARD = Function("mlp.linear_gelu_backward", BACKWARD, _backward, _backward_cases)
FUNCTIONS = (LINEAR_GELU, LINEAR_GELU_KEEP, LINEAR_GELU_BACKWARD)
