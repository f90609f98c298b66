"""Which attention backend runs: the fastest, by measurement, that has proved itself on this machine.

A backend is used only after its outputs and its gradients have been compared with the reference on this device, dtype
and head_dim. The comparison runs once and is remembered; what fails is refused by name, with the numbers.

Shapes: S segments, H heads, K head_dim.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from siglip2_packed.measure import relative_error
from siglip2_packed.ops.attention import ATTN_IMPLEMENTATIONS, BACKENDS, eager, why_not
from siglip2_packed.ops.segments import Segments

logger = logging.getLogger("siglip2_packed")

LENGTH_CLASSES = (96, 192, 384, 768, 1536, 3584)
"""Upper bounds of the length classes that measurements are kept for; one more class lies above the last."""

Order = tuple[str, ...]


class Preference(NamedTuple):
    """Backends, fastest first, up to a length and above it."""

    up_to: int
    short: Order
    long: Order


# Fastest first. Measured: benchmarks/results/attention_h100.csv; key: (compute capability, head_dim, training).
_OTHERS = ("torch_varlen", "flash_attention_2", "sdpa")
_IMAGES = ("triton", *_OTHERS)
_LONG = ("flash_attention_4", "triton", *_OTHERS)
MEASURED = {
    ((9, 0), 64, False): Preference(1536, _IMAGES, _LONG),
    ((9, 0), 64, True): Preference(768, _IMAGES, _LONG),
    ((9, 0), 72, False): Preference(3584, _IMAGES, _IMAGES),
    ((9, 0), 72, True): Preference(3584, _IMAGES, _LONG),
}


def length_class(lengths: Sequence[int]) -> int:
    """The class of a pack's typical segment: the mean length, each row counted once, as attention's work counts it."""
    total = sum(lengths)
    typical = sum(length * length for length in lengths) / total if total else 0
    return sum(typical > bound for bound in LENGTH_CLASSES)


def preference(device: torch.device, head_dim: int, length: int, training: bool) -> Order:
    """Backends worth trying, fastest first, for a length class."""
    if device.type != "cuda":
        return ("sdpa",)
    capability = torch.cuda.get_device_capability(device)
    measured = MEASURED.get((capability, head_dim, training)) or _unmeasured(capability)
    longest = LENGTH_CLASSES[min(length, len(LENGTH_CLASSES) - 1)] + (length == len(LENGTH_CLASSES))
    return measured.short if longest <= measured.up_to else measured.long


def _unmeasured(capability: tuple[int, int]) -> Preference:
    """The rule for other cards and head dims: own kernels for images, FlashAttention for long segments."""
    if capability >= (9, 0):
        return Preference(768, _IMAGES, ("flash_attention_3", *_LONG))
    return Preference(1536, _IMAGES, ("flash_attention_2", "torch_varlen", "triton", "sdpa"))


class SelfCheck(NamedTuple):
    """Relative errors ‖x − ref‖ / ‖ref‖ against the float64 reference; NaN if it did not run."""

    forward: float
    dq: float
    dk: float
    dv: float
    bound: float
    error: str = ""

    @property
    def forward_ok(self) -> bool:
        return self.forward <= self.bound

    @property
    def backward_ok(self) -> bool:
        return self.forward_ok and all(error <= self.bound for error in (self.dq, self.dk, self.dv))

    def __str__(self) -> str:
        if self.error:
            return self.error
        errors = f"forward {self.forward:.1e}, dq {self.dq:.1e}, dk {self.dk:.1e}, dv {self.dv:.1e}"
        return f"{errors} (bound {self.bound:.0e})"


CHECKED_PACKS = ([35, 300, 1], [35, 256, 1, 64], [35, 100, 1, 64], [35, 1, 64], [17, 32, 1])
"""Kernels differ by the longest segment, so several packs are compared."""


@cache
def self_check(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> SelfCheck:
    """Runs a backend forward and backward on small packs and compares it with the reference in float64.

    Raises:
        RuntimeError: called while a CUDA graph is captured. Run the model once before.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"attention backend {backend} is not checked yet: run the model once before graph capture")
    bound = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-10}.get(dtype, 1e-5)
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        bound = 5e-3
    try:
        with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
            errors = [_errors(BACKENDS[backend].run, lengths, device, dtype, head_dim) for lengths in CHECKED_PACKS]
    except torch.OutOfMemoryError:
        raise  # says nothing about the backend, and must not be remembered
    except Exception as error:  # whatever a kernel raises is the reason it cannot be used
        nan = float("nan")
        return SelfCheck(nan, nan, nan, nan, bound, f"{type(error).__name__}: {error}")
    forward, dq, dk, dv = (float(x) for x in np.max(errors, axis=0))  # np.max keeps a NaN
    return SelfCheck(forward, dq, dk, dv, bound)


def _errors(run, lengths: list[int], device: torch.device, dtype: torch.dtype, head_dim: int) -> list[float]:
    """Relative errors of the output, with and without gradients the worse, and of dq, dk and dv."""
    segments = Segments(lengths, device)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, sum(lengths), 3, head_dim, generator=generator, device="cpu").to(device, dtype)
    with torch.no_grad():
        q, k, v = inputs[:3]
        inference = run(q, k, v, segments)  # a backend may take another path without gradients
    with torch.enable_grad():
        ours = _with_gradients(run, inputs, segments, dtype)
        exact = _with_gradients(eager, inputs, segments, torch.float64)
    forward, *gradients = (relative_error(x, ref) for x, ref in zip(ours, exact))
    return [float(np.maximum(forward, relative_error(inference, exact[0]))), *gradients]


def _with_gradients(run, inputs: Tensor, segments: Segments, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of q, k and v; NaN for gradients that a forward-only build does not give."""
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs[:3])
    out = run(q, k, v, segments)
    try:
        gradients = torch.autograd.grad(out, (q, k, v), inputs[3].to(dtype))
    except (RuntimeError, NotImplementedError, AssertionError):
        gradients = tuple(torch.full_like(x, float("nan")) for x in (q, k, v))
    return [out.detach(), *gradients]


@torch.compiler.assume_constant_result
def resolve_backend(
    requested: str, device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool, length: int = 2
) -> str:
    """The backend that will run: `requested` itself, or for `"auto"` the fastest that has passed its self-check.

    Args:
        needs_grad: whether the backward has to be right too.
        length: a pack's `length_class`; `"auto"` depends on it. Default: images of some 256 patches.

    Raises:
        ValueError: an unknown name, or a backend asked for by name that cannot run here or fails its self-check.
    """
    return _resolve(requested, device, dtype, head_dim, needs_grad, length if requested == "auto" else 0)


@cache
def _resolve(
    requested: str, device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool, length: int
) -> str:
    if requested not in ATTN_IMPLEMENTATIONS:
        raise ValueError(f"unknown attn_implementation {requested!r}: choose one of {', '.join(ATTN_IMPLEMENTATIONS)}")
    where = f"{device.type}, {str(dtype).removeprefix('torch.')}, head_dim {head_dim}"
    order = preference(device, head_dim, length, needs_grad) if requested == "auto" else (requested,)
    for backend in order:
        reason = refusal(backend, device, dtype, head_dim, needs_grad)
        if reason is None:
            if requested == "auto":
                _say_once(backend, where)
            return backend
        if requested != "auto":
            raise ValueError(f"attn_implementation={requested!r} cannot be used: {reason}")
        if "self-check" in reason:
            logger.warning("attention backend %s %s", backend, reason)
    return "eager"


def refusal(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> str | None:
    """Why this backend may not be used on such tensors: it cannot run, or fails its self-check. None if it may."""
    reason = why_not(backend, device, dtype, head_dim)
    if reason is not None or backend == "eager":
        return reason
    check = self_check(backend, device, dtype, head_dim)
    if check.backward_ok if needs_grad else check.forward_ok:
        return None
    return f"failed its self-check on {device.type}, {str(dtype).removeprefix('torch.')}, head_dim {head_dim}: {check}"


@cache
def _say_once(backend: str, where: str) -> None:
    logger.info("attention: %s (%s)", backend, where)
