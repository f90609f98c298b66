"""Which of our own kernels run a pack: the best of those that are present and were found right.

Shapes: T rows, S segments, H heads, K head_dim.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from siglip2_packed.ops.attention import cases, eager, low_order
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.check import Refused, Verdict, check, checkable, missing
from siglip2_packed.ops.runtime.choice import Launch

FOLDER = "siglip2_packed.ops.attention"
FORWARD = {"hopper": (f"{FOLDER}.hopper_forward", "forward"), "triton": (f"{FOLDER}.triton", "forward")}
BACKWARD = {
    "hopper": (f"{FOLDER}.hopper_backward", "backward"),
    "hopper_one_pass": (f"{FOLDER}.hopper_one_pass", "backward"),
    "triton": (f"{FOLDER}.triton", "backward"),
    "triton_short": (f"{FOLDER}.triton", "backward_short"),
}
READ_OUTPUT = "hopper", "hopper_one_pass", "triton"
"""Backward kernels that take delta from the output."""


class Kernels(NamedTuple):
    """What runs a pack: functions that fill their results, as those of `eager` do."""

    forward: Callable[..., None]
    backward: Callable[..., None] | None
    """None where no gradients are asked for."""
    launches: tuple[Launch, ...]
    reads_low: bool = False
    """Whether backward reads what rounding took from the output (`low_order`), which forward then keeps."""


def kernels(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    S: int,
    max_seqlen: int,
    *,
    packed: bool = True,
    gradients: bool = False,
    invariant: bool = False,
) -> Kernels:
    """The best kernels for q, k and v of `shape` `[T, H, K]` that are present and right.

    Args:
        packed: whether they, and their gradients, are views of one tensor `[T, 3, H, K]`.
        invariant: one forward, whatever T, S and max_seqlen are, and whether backward reads all that it keeps.

    Raises:
        Refused: none is; or none has been checked, and a CUDA graph is being captured.
    """
    (T, H, K), card = shape, choice.card(device)
    forward = choice.allowed("attention_forward", choice.attention_forward(card, dtype, T, H, K, max_seqlen))
    if invariant:
        forward = choice.invariant_attention_forward(card, dtype, K)
    backward: tuple[Launch, ...] = ()
    if gradients:
        order = choice.attention_backward(card, dtype, T, S, H, K, max_seqlen)
        backward = choice.allowed("attention_backward", order)
    rows = device, dtype, H, K, packed
    key = *rows, forward, backward, invariant
    found = _found.get(key)
    if found is None:
        differentiate, *ran = _first_right("backward", backward, *rows) if gradients else (None,)
        reads_low = dtype in low_order.SHIFT and any(invariant or name in READ_OUTPUT for name, _ in ran)
        run, first = _first_right("forward", forward, *rows, reads_low)
        found = Kernels(run, differentiate, (first, *ran), reads_low)
        if checkable(device):  # else a better one may have had no check yet
            _found[key] = found
    return found


_found: dict[tuple, Kernels] = choice.remember()


def _first_right(direction: str, launches: tuple[Launch, ...], *key) -> tuple[Callable[..., None], Launch]:
    reason = "has no kernel"
    for launch in launches:
        verdict = verdict_on(direction, launch, *key)
        if verdict is not None and verdict.right:
            return partial(implementation(direction, launch), launch[1]), launch
        reason = str(verdict or "has not been checked yet: run the model once before graph capture")
    raise Refused(f"its {direction}: {reason}")


def implementation(direction: str, launch: Launch) -> Callable[..., None]:
    """What is called as `function(how, ...)`, and fills its results."""
    module, name = (FORWARD if direction == "forward" else BACKWARD)[launch[0]]
    return getattr(importlib.import_module(module), name)


def verdict_on(
    direction: str,
    launch: Launch,
    device: torch.device,
    dtype: torch.dtype,
    H: int,
    K: int,
    packed: bool,
    low: bool = False,
) -> Verdict | None:
    """What the check of a kernel says, launched so; see `check.check`. low: of a forward that keeps that part."""
    name, how = launch
    what = f"attention.{direction} ({name}) for {H} heads of {K}" + " in training" * low
    module, function = (FORWARD if direction == "forward" else BACKWARD)[name]
    if reason := missing(module, function):
        choice.say_once(f"attention.{direction} ({name}): {reason}", logging.WARNING)
        return Verdict({}, {}, reason)
    make, results = cases.of(direction, low)
    return check(
        what,
        (device, dtype, packed, launch, low),
        partial(results, partial(implementation(direction, launch), how)),
        partial(results, getattr(eager, direction)),
        lambda: make(device, dtype, H, K, packed, how),
        device,
        dtype,
    )
