"""torch.autograd.Function, called once or more for each layer."""

from __future__ import annotations

from typing import Any

import torch

from siglip2_packed.ops.runtime.tracing import transformed


class Function(torch.autograd.Function):
    @classmethod
    def apply(cls, *args: Any) -> Any:
        """torch's; while nothing is transformed it does not look at every argument for what transforms have left.

        Of rows that may come from one take `tracing.alive`.
        """
        torchs: Any = super() if transformed() else super(torch.autograd.Function, cls)
        return torchs.apply(*args)
