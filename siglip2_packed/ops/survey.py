"""What there is on a device, what was found right, and what would run: the answers of `siglip2-packed doctor`.

Shapes: T rows, D hidden size, F MLP width, H heads, K head_dim, G side of the position table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from siglip2_packed.ops import columns, float8, layer, linear, mlp, norm, pool, positions
from siglip2_packed.ops.attention import backends, for_pack, kernels, low_order, shared_mean
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.check import Verdict
from siglip2_packed.ops.runtime.choice import Function, Launch
from siglip2_packed.ops.segments import Segments

SHARED_MEAN = shared_mean.MEAN
"""At which dQ's error is measured."""


class Shape(NamedTuple):
    """Of a model; the sizes that kernels are compiled for."""

    D: int
    F: int
    H: int
    G: int

    @property
    def K(self) -> int:
        return self.D // self.H


class Finding(NamedTuple):
    """One implementation of one operation."""

    operation: str
    implementation: str
    why_not: str | None
    """Why it cannot run here; None if it can."""
    verdict: Verdict | None = None
    """What its check says, forward and backward. None where it is the reference itself, or cannot run."""
    dq_at_shared_mean: float | None = None
    """Attention's alone; see `attention.shared_mean`."""
    broken: bool = False
    """It is for this device and installed, and cannot be imported."""

    def __str__(self) -> str:
        """`right: forward 2.1e-03 (bound 1e-02); dQ at a shared mean 1.2e-01`."""
        if self.why_not is not None:
            return f"not here: {self.why_not}"
        found = f"{'right' if self.verdict.right else 'WRONG'}: {self.verdict}" if self.verdict else "the reference"
        if self.verdict is None and self.implementation != "eager":
            return "own kernels, chosen by the pack: below"
        return found if self.dq_at_shared_mean is None else f"{found}; dQ at a shared mean {self.dq_at_shared_mean:.1e}"


def findings(device: torch.device, dtype: torch.dtype, shape: Shape) -> Iterator[Finding]:
    """Every implementation of every operation, those that can run here checked, forward and backward."""
    for backend in backends.BACKENDS:
        reason = backends.why_not(backend, device, dtype, shape.K)
        own = backends.BACKENDS[backend].run is None
        checked = reason is None and backend != "eager" and not own
        verdict = backends.verdict_on(backend, device, dtype, shape.K, gradients=True) if checked else None
        runs = backend == "eager" or (verdict is not None and verdict.right)
        error = shared_mean.of_backend(backend, device, dtype, shape.K) if runs else None
        yield Finding(
            "attention", backend, reason, verdict, error, backends.broken_here(backend, device, dtype, shape.K)
        )
        if own and reason is None:
            yield from _own_attention(device, dtype, shape)
    for function, sizes in _functions(shape):
        for implementation in function.modules:
            unmet = _unmet(function, implementation, device, dtype, shape)
            missing = None if unmet else function.missing(implementation)
            checked = not (unmet or missing) and implementation != "eager"
            verdict = function.verdict(implementation, device, dtype, sizes) if checked else None
            yield Finding(function.name, implementation, unmet or missing, verdict, broken=bool(missing))


PACKS = (16, 64, 128, 192, 256, 1024, 4096)
"""Longest segments that own attention kernels are launched differently for."""


def _own_attention(device: torch.device, dtype: torch.dtype, shape: Shape) -> Iterator[Finding]:
    card, (_, _, H, _), K = choice.card(device), shape, shape.K
    for direction in ("forward", "backward"):
        launches: dict[Launch, None] = {}
        for longest in PACKS:
            for T in (longest, 16384):
                forward = choice.attention_forward(card, dtype, T, H, K, longest)
                backward = choice.attention_backward(card, dtype, T, T // longest, H, K, longest)
                launches |= dict.fromkeys(forward if direction == "forward" else backward)
        if direction == "forward" and choice.invariant_products(card, dtype, shape.D, shape.F):
            launches |= dict.fromkeys(choice.invariant_attention_forward(card, dtype, K))
        for launch in launches:
            low = direction == "forward" and dtype in low_order.SHIFT
            verdict = kernels.verdict_on(direction, launch, device, dtype, H, K, packed=True, low=low)
            measured = direction == "backward" and verdict is not None and verdict.right
            error = shared_mean.of_launch(launch, device, dtype, H, K) if measured else None
            yield Finding(f"attention.{direction}", _name(launch), None, verdict, error)


def _functions(shape: Shape) -> list[tuple[Function, tuple]]:
    D, F, H, G = shape
    return [
        (norm.LAYER_NORM, (D, True)),
        (norm.ADD_LAYER_NORM, (D,)),
        (norm.LAYER_NORM_BACKWARD, (D,)),
        (linear.LINEAR, (D, 3 * D)),
        (linear.ADD_PRODUCT, (F, D)),
        (mlp.LINEAR_GELU, (D, F)),
        (mlp.LINEAR_GELU_KEEP, (D, F)),
        (mlp.LINEAR_GELU_BACKWARD, (D, F)),
        (columns.COLUMN_SUMS, (3 * D,)),
        (columns.PRODUCT_OVER_ROWS, (F, D)),
        (pool.ATTENTION_POOL, (H, shape.K, True)),
        (positions.ADD_POSITIONS, (G, D, True)),
        (float8.QUANTIZE_ROWS, (D, F)),
    ]


def _unmet(
    function: Function, implementation: str, device: torch.device, dtype: torch.dtype, shape: Shape
) -> str | None:
    card, many = choice.card(device), 1 << 20
    operation = function.name.split(".")[0]
    order = {
        "mlp": choice.product_with_gelu(card, dtype, many, shape.D, shape.F),
        "pool": choice.pool(card, dtype, shape.K),
    }.get(operation, choice.rows(card, dtype))
    if implementation.startswith("invariant"):
        order = choice.invariant_products(card, dtype, shape.D, shape.F)
    if implementation not in (*order, "eager"):
        return f"not for {device.type} in {str(dtype).removeprefix('torch.')} at these widths"
    return None


class Plan(NamedTuple):
    """What runs for a pack: implementations by operation."""

    inference: dict[str, str]
    training: dict[str, str]


def plan(device: torch.device, dtype: torch.dtype, shape: Shape, lengths: Sequence[int], requested: str) -> Plan:
    """For a pack of images of these lengths; checks what was not checked yet, as the pack itself would."""
    (D, F, H, G), K, segments = shape, shape.K, Segments(lengths, device)
    x = torch.empty(sum(lengths), D, device=device, dtype=dtype)

    def attention(gradients: bool) -> dict[str, str]:
        found = for_pack(segments, requested, dtype, H, K, gradients)
        names = {"attention": found.backend}
        if found.written_out:
            rows = len(x), H, K
            chosen = kernels.kernels(device, dtype, rows, len(segments), segments.max_seqlen, gradients=gradients)
            names |= zip(("attention.forward", "attention.backward"), map(_name, chosen.launches))
        return names

    def both(function: Function, order: choice.Order, *sizes: int) -> list[str]:
        taken = [choice.take(function, order, device, dtype, *sizes, gradients) for gradients in (False, True)]
        return list(map(_module, taken))

    card = choice.card(device)
    placed = both(positions.ADD_POSITIONS, choice.rows(card, dtype), G, D)
    pooled = both(pool.ATTENTION_POOL, choice.pool(card, dtype, K), H, K)
    inference, training = layer.for_inference(x, F), layer.for_training(x, F, gradients=True)
    return Plan(
        {"positions": placed[0], **attention(False), **_modules(inference), "pool": pooled[0]},
        {"positions": placed[1], **attention(True), **_modules(training), "pool": pooled[1]},
    )


def _name(launch: Launch) -> str:
    """`hopper, 2 warpgroups`; `triton, tiles of 64x32 and 32x64`."""
    name, how = launch
    if isinstance(how, int):
        return f"{name}, {how} warpgroups"
    tiles = [how] if isinstance(how, choice.Tile) else how
    return f"{name}, {' and '.join(f'{tile.M}x{tile.N}' for tile in tiles)}"


def _modules(functions: layer.Inference | layer.Training) -> dict[str, str]:
    return {name: _module(function) for name, function in functions._asdict().items()}


def _module(function: Callable) -> str:
    return function.__module__.rsplit(".", 1)[1]
