"""Copies from the host that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor

from siglip2_packed.ops.runtime.tracing import traced

STAGED = 1 << 16
"""Bytes of pageable memory from which on CUDA has the host wait until the device has done all that it was given."""


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, in the order of the current stream."""
    eager = device.type == "cuda" and not traced() and not torch.cuda.is_current_stream_capturing()
    if eager and x.device.type == "cpu" and x.nbytes >= STAGED:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
