"""What rounding takes from an attention's output, a byte an element: with it the output is known 256 times as well.

Backward's delta is the row sum of grad * out. Where values have a mean in common, what rounding takes from `out` adds
up there, and reaches dQ times the mean key.

    low      = (bits of the output in float32 - bits of `out` in float32) / 2 ** SHIFT, rounded, within [-128, 127]
    restored = bits of `out` in float32 + (low << SHIFT)

Floats of one sign lie in the order of their bits, and rounding keeps the sign. Half a unit in the last place is 128;
where `out` is zero or subnormal the output may be further off, and what comes nearest is kept. Where `out` is infinite
or NaN, low is 0.

Shapes: T rows, H heads, K head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHIFT = {torch.bfloat16: 8, torch.float16: 5}
"""Bits of a float32 that lie below a byte behind those of the dtype. Others are not rounded, and have no low part."""


def empty_like(out: Tensor) -> Tensor | None:
    """Memory for it, int8, contiguous, in the shape of `out`; None if there is nothing to keep."""
    return torch.empty(out.shape, dtype=torch.int8, device=out.device) if out.dtype in SHIFT else None


def shift(out: Tensor, low: Tensor | None) -> int:
    """What kernels are told: 0 for none."""
    return 0 if low is None else SHIFT[out.dtype]


def of(exact: Tensor, out: Tensor) -> Tensor:
    """`exact`, float32, and `out`, the same in half precision -> int8."""
    rounded = out.float()
    half = 1 << SHIFT[out.dtype] >> 1
    low = (_bits(exact) - _bits(rounded) + half) >> SHIFT[out.dtype]
    return torch.where(rounded.isfinite(), low.clamp(-128, 127), 0).to(torch.int8)


def restored(out: Tensor, low: Tensor) -> Tensor:
    """float32, from `out` in half precision and its low part."""
    return (_bits(out.float()) + (low.int() << SHIFT[out.dtype])).view(torch.float32)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)
