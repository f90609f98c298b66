"""torch.autograd.Function, called once or more for each layer."""

from __future__ import annotations

from typing import Any

import torch

from siglip2_packed.ops.runtime.tracing import transformed


class Function(torch.autograd.Function):
    @classmethod
    def apply(cls, *args: Any) -> Any:
        """torch's, which looks at every argument for what a function transform has left, only where there is one."""
        torchs: Any = super() if transformed() else super(torch.autograd.Function, cls)
        return torchs.apply(*args)
