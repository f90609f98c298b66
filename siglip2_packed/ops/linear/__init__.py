"""Products of rows with a weight. `eager` is the contract, by a BLAS, whose order of sums changes with the number of
rows; `invariant` (in Triton) and `invariant_hopper` have one order, whatever rows there are beside, for
`batch_invariant`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.check import Results, random
from siglip2_packed.ops.runtime.choice import Function
from siglip2_packed.ops.runtime.once import once_differentiable

__all__ = ["ADD_PRODUCT", "LINEAR", "linear"]

FOLDER = "siglip2_packed.ops.linear"
INVARIANT = {"invariant": f"{FOLDER}.triton", "invariant_hopper": f"{FOLDER}.hopper"}
MODULES = {"eager": f"{FOLDER}.eager"} | INVARIANT
T = 2 * 128 + 37
BLOCKS = 3
"""Of a comparison."""


def by_every_tile(function: Callable, *case) -> Tensor | tuple[Tensor, ...]:
    """`function(*case)`, which no tile that rows may have is to change, where they can be asked for.

    On few thread blocks, where these can, so that each has tile after tile and all that it may wait for happens.

    Raises:
        RuntimeError: some tile does.
    """
    module, parameters = importlib.import_module(function.__module__), inspect.signature(function).parameters
    if "blocks" in parameters:
        function = partial(function, blocks=BLOCKS)
    if "tile" not in parameters:
        return function(*case)  # type: ignore[no-any-return]
    first, *others = module.tiles(choice.card(case[0].device))
    expected = function(*map(_copied, case), tile=first)
    for tile in others:
        found = function(*map(_copied, case), tile=tile)
        if not all(map(torch.equal, _tensors(found), _tensors(expected))):
            raise RuntimeError(f"{tile} does not give the bits of {first}")
    return expected  # type: ignore[no-any-return]


def _copied(x: Tensor) -> Tensor:
    return x.clone()


def _tensors(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else found


def _cases(device: torch.device, dtype: torch.dtype, D: int, F: int) -> Iterator[tuple]:
    yield random(device, dtype, T, D), random(device, dtype, F, D, scale=D**-0.5), random(device, dtype, F, seed=1)


def _sum_cases(device: torch.device, dtype: torch.dtype, D: int, F: int) -> Iterator[tuple]:
    """Of both widths that a layer adds: the MLP's and the stream's own."""
    for width in dict.fromkeys((D, F)):
        rows, weight = random(device, dtype, T, width), random(device, dtype, F, width, scale=width**-0.5)
        yield random(device, dtype, T, F, seed=1), rows, weight


def _result(function: Callable, *case) -> Results:
    return {"out": by_every_tile(function, *case)}  # type: ignore[dict-item]


def _sum(function: Callable, x: Tensor, *case) -> Results:
    return {"out": by_every_tile(function, x.clone(), *case)}  # type: ignore[dict-item]


LINEAR = Function("linear.linear", MODULES, _result, _cases)
ADD_PRODUCT = Function("linear.add_product_", MODULES, _sum, _sum_cases)
FUNCTIONS = (LINEAR, ADD_PRODUCT)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x weightᵀ + bias, x `[T, D]`, weight `[F, D]` -> `[T, F]`, all of one dtype; differentiable once.

    A row of the result is the same to the bit whatever the other rows are, and however many.

    Raises:
        Refused: the product cannot be had here, or was found wrong.
    """
    return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        F, D = weight.shape
        order = choice.invariant_products(choice.card(x.device), x.dtype, D, F)
        return choice.require(LINEAR, order, x.device, x.dtype, D, F)(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        dx = grad @ weight if of_x else None
        dweight = grad.mT @ x if of_weight else None
        return dx, dweight, grad.sum(-2) if of_bias else None
