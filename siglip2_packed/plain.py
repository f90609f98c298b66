"""Is a module what its class says? Then its parameters tell all that it computes, and it need not be called.

It is not where hooks, adapters or wrappers hang on it, where its weights are quantised or sharded, and where somebody
follows the calls themselves.
"""

from __future__ import annotations

from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from siglip2_packed.ops.runtime.tracing import traced

WHOLE = frozenset((nn.Parameter, Tensor))
"""Types of weights that are neither sharded nor quantised."""


def watched(x: Tensor) -> bool:
    """Whether somebody follows the calls, or autocast or hooks of all modules change what they compute."""
    device = x.device.type
    return (
        traced()
        or (torch._C._is_autocast_available(device) and torch.is_autocast_enabled(device))
        or _has_any_global_hook()
    )


def unhooked(*modules: nn.Module) -> bool:
    """Whether calling each module is calling its class's forward."""
    for module in modules:
        state = module.__dict__
        if any(_hooks(state)) or "forward" in state or module._compiled_call_impl is not None:
            return False
    return True


_hooks = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def weights(*pairs: tuple[Any, Any], dtype: torch.dtype, bias: bool = True) -> list[Tensor] | None:
    """weight and bias of each unhooked (module, its kind) in turn; None unless all are whole tensors of the dtype.

    bias: whether they have one.
    """
    found: list[Any] = []
    for module, kind in pairs:
        # FSDP1 lays views over the parameters; in a checkpoint's recomputation it takes the parameters away as well
        if type(module) is not kind or "weight" in module.__dict__:
            return None
        parameters = module._parameters
        found += (parameters.get("weight"), parameters.get("bias"))[: 1 + bias]
    if not WHOLE.issuperset(map(type, found)) or {*map(_dtype, found)} != {dtype}:
        return None
    modules, _ = zip(*pairs)
    return found if unhooked(*modules) else None


_dtype = attrgetter("dtype")


def learns(*modules: nn.Module) -> bool:
    """Whether any of their parameters wants a gradient, and gradients are recorded."""
    return torch.is_grad_enabled() and any(p.requires_grad for module in modules for p in module.parameters())
