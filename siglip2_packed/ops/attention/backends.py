"""The attention backends by name: what each needs, whether it is here, and whether it was found right.

Shapes: T rows, S segments, H heads, K head_dim.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from siglip2_packed.ops.attention import eager, outside
from siglip2_packed.ops.attention.kernels import kernels
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.check import Refused, Results, Verdict, broken, check, missing
from siglip2_packed.ops.segments import Segments


class Backend(NamedTuple):
    run: Callable[[Tensor, Tensor, Tensor, Segments], Tensor] | None
    """None: our own kernels, which are chosen by the pack."""
    module: str = ""
    """What has to be importable, with `name` in it."""
    name: str = ""


BACKENDS = {
    "eager": Backend(eager.attention),
    "sdpa": Backend(outside.sdpa),
    "triton": Backend(None, "siglip2_packed.ops.attention.triton", "forward"),
    "torch_varlen": Backend(outside.torch_varlen, "torch.nn.attention.varlen", "varlen_attn"),
    "flash_attention_2": Backend(outside.flash_attention_2, "flash_attn", "flash_attn_varlen_func"),
    "flash_attention_3": Backend(outside.flash_attention_3, "flash_attn_interface", "flash_attn_varlen_func"),
    "flash_attention_4": Backend(outside.flash_attention_4, "flash_attn.cute", "flash_attn_varlen_func"),
}
ATTN_IMPLEMENTATIONS = ("auto", *BACKENDS)


def why_missing(backend: str) -> str | None:
    """Why this backend cannot be imported here; None if it can."""
    _, module, name = BACKENDS[backend]
    return missing(module, name) if module else None


def why_not(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this backend cannot run on such tensors; None if it can."""
    return why_missing(backend) or choice.attention_unmet(backend, choice.card(device), dtype, head_dim)


def broken_here(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether it is for such tensors, and installed, and yet cannot be imported."""
    _, module, name = BACKENDS[backend]
    return (
        bool(module)
        and broken(module, name)
        and choice.attention_unmet(backend, choice.card(device), dtype, head_dim) is None
    )


def refusal(
    backend: str,
    segments: Segments,
    T: int,
    dtype: torch.dtype,
    H: int,
    K: int,
    gradients: bool,
    invariant: bool = False,
) -> str | None:
    """Why this backend may not be used for a pack: it cannot run, or was found wrong. None if it may."""
    device = segments.cu_seqlens.device
    reason = why_not(backend, device, dtype, K) or (_undetermined(backend) if gradients else None)
    if reason is not None or backend == "eager" or not T or device.type == "meta":  # where nothing is computed
        return reason
    if BACKENDS[backend].run is None:
        try:
            how = {"gradients": gradients, "invariant": invariant}
            kernels(device, dtype, (T, H, K), len(segments), segments.max_seqlen, **how)
        except Refused as refused:
            return f"failed its self-check: {refused}"
        return None
    verdict = verdict_on(backend, device, dtype, K, gradients)
    if verdict is None:
        return "has not been checked yet: run the model once before graph capture"
    return None if verdict.right else f"failed its self-check: {verdict}"


def _undetermined(backend: str) -> str | None:
    """Why this backend's gradients are not what `torch.use_deterministic_algorithms` asks for; None if they are."""
    _, module, name = BACKENDS[backend]
    asked = torch.are_deterministic_algorithms_enabled() and name == "flash_attn_varlen_func"
    if not asked or outside.deterministic(getattr(importlib.import_module(module), name)):
        return None
    reason = "this version of it has no deterministic backward"
    if torch.is_deterministic_algorithms_warn_only_enabled():
        choice.say_once(f"attention ({backend}): {reason}", logging.WARNING)
        return None
    return f"{reason}, as torch.use_deterministic_algorithms(True) wants it"


def verdict_on(backend: str, device: torch.device, dtype: torch.dtype, K: int, gradients: bool) -> Verdict | None:
    """What the check of a backend that is not our own says, of its forward or of forward and backward."""
    run = BACKENDS[backend].run
    assert run is not None
    results = _with_gradients if gradients else _without_gradients
    return check(
        f"attention ({backend}) at head_dim {K}",
        (device, dtype, gradients, torch.get_deterministic_debug_mode()),
        partial(results, run),
        partial(results, eager.attention),
        lambda: _cases(device, dtype, K),
        device,
        dtype,
    )


def _cases(device: torch.device, dtype: torch.dtype, K: int) -> Iterator[tuple]:
    """Backends may differ by the longest segment, and where several are of one length."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    for lengths in ([35, 300, 1, 64], [17, 32, 1], [5, 5, 5]):
        rows = torch.randn(4, sum(lengths), 2, K, generator=generator, dtype=torch.float32, device="cpu")
        yield Segments(lengths, device), *rows.to(device, dtype)


def _without_gradients(run: Callable, segments: Segments, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Results:
    with torch.no_grad():  # where a backend may take another path
        return {"forward": run(q, k, v, segments)}


def _with_gradients(run: Callable, segments: Segments, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Results:
    """NaN for gradients that a forward-only build does not give. Frozen layers go the way without gradients."""
    inference = _without_gradients(run, segments, q, k, v, grad)["forward"]
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = run(*inputs, segments)
    try:
        gradients = torch.autograd.grad(out, inputs, grad)
    except (RuntimeError, NotImplementedError, AssertionError):
        gradients = tuple(torch.full_like(x, float("nan")) for x in inputs)
    return {"inference": inference, "forward": out.detach(), **dict(zip(("dq", "dk", "dv"), gradients))}
