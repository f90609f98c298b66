"""Positions: the table, resized to each image's grid, added to the patches. `eager` is the contract; `triton` computes
them as it adds them, and the table's gradient in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from siglip2_packed.ops.positions.places import ANTIALIASED, Places
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.check import Results, random
from siglip2_packed.ops.runtime.choice import Function
from siglip2_packed.ops.runtime.tracing import traced
from siglip2_packed.ops.runtime.transfer import to_device

__all__ = ["ADD_POSITIONS", "ANTIALIASED", "Places", "add_positions"]

MODULES = {"eager": "siglip2_packed.ops.positions.eager", "triton": "siglip2_packed.ops.positions.triton"}
GRIDS = ((1, 13, 19), (1, 8, 32), (2, 2, 3), (1, 16, 16), (1, 7, 1), (1, 40, 2))


def _cases(device: torch.device, dtype: torch.dtype, G: int, D: int, gradients: bool) -> Iterator[tuple]:
    rows = sum(t * h * w for t, h, w in GRIDS)
    grad = random(device, dtype, rows, D, seed=2) if gradients else None
    yield random(device, dtype, rows, D), random(device, dtype, G * G, D, seed=1), Places(GRIDS), grad


def _added(function: Callable, patches: Tensor, table: Tensor, places: Places, grad: Tensor | None) -> Results:
    if grad is None:
        with torch.no_grad():
            return {"out": function(patches, table, places, patches.dtype)}
    inputs = [x.requires_grad_() for x in (patches, table)]
    out = function(*inputs, places, patches.dtype)
    return {"out": out.detach(), **dict(zip(("dpatches", "dtable"), torch.autograd.grad(out, inputs, grad)))}


ADD_POSITIONS = Function("positions.add_positions", MODULES, _added, _cases)


def add_positions(
    patches: Tensor, table: Tensor, places: Places, dtype: torch.dtype, invariant: bool = False
) -> Tensor:
    """`[T, D]` patches plus their positions, of a table `[G·G, D]`; see `positions.eager`.

    invariant: an image's are the same to the bit whatever the others are; of one dtype, `Refused` where it cannot be
    had. (Sums of `positions.eager` have an order of their own each, but not the kernel's.)
    """
    if invariant and places.mode == ANTIALIASED:
        return _by_kernel(patches, table, places)
    mixed = not patches.dtype == table.dtype == dtype
    if mixed and places.padded:  # the kernel alone can read the grids, and takes one dtype
        wide = torch.promote_types(table.dtype, dtype)
        nothing = torch.zeros(patches.shape, dtype=wide, device=patches.device)
        return patches + add_positions(nothing, table.to(wide), places, wide).to(dtype)
    if traced() or places.ids is not None or places.mode != ANTIALIASED or mixed:
        return ADD_POSITIONS.of("eager")(patches, table, places, dtype)  # type: ignore[no-any-return]
    order, gradients = choice.rows(choice.card(patches.device), patches.dtype), torch.is_grad_enabled()
    G, D = int(table.shape[0] ** 0.5), table.shape[1]
    add = choice.take(ADD_POSITIONS, order, patches.device, patches.dtype, G, D, gradients)
    return add(patches, table, places, dtype)  # type: ignore[no-any-return]


def _by_kernel(patches: Tensor, table: Tensor, places: Places) -> Tensor:
    """Also of rows that are not all patches in turn: then it computes those of all, and rows take theirs."""
    device, dtype, (entries, D) = patches.device, patches.dtype, table.shape
    sizes = int(entries**0.5), D, torch.is_grad_enabled()
    add = choice.require(ADD_POSITIONS, ("triton",), device, dtype, *sizes)
    if places.ids is None:
        return add(patches, table, places, dtype)  # type: ignore[no-any-return]
    total = sum(t * h * w for t, h, w in places.grids)
    whole = add(patches.new_zeros(total, D), table, Places(places.grids), dtype)
    return patches + whole[to_device(places.ids, device)]  # type: ignore[no-any-return]
