"""Is a module what its class says? Then its parameters tell all that it computes, and it need not be called.

It is not where hooks, adapters or wrappers hang on it, where its weights are quantised or sharded, and where somebody
follows the calls themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from siglip2_packed.ops.runtime.tracing import traced

WHOLE = (nn.Parameter, Tensor)
"""Types of weights that are neither sharded nor quantised."""


def watched(x: Tensor) -> bool:
    """Whether somebody follows the calls, or autocast or hooks of all modules change what they compute."""
    device = x.device.type
    return (
        traced()
        or (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device))
        or _has_any_global_hook()
    )


def unhooked(module: nn.Module) -> bool:
    """Whether calling a module is calling its class's forward."""
    state = module.__dict__
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or module._compiled_call_impl is not None
    )


def weights(*modules: tuple[Any, Any], dtype: torch.dtype) -> list[Tensor] | None:
    """weight and bias of each unhooked (module, its kind) in turn; None unless all are whole tensors of the dtype."""
    found: list[Tensor] = []
    for module, kind in modules:
        # FSDP1 lays views over the parameters; in a checkpoint's recomputation it takes the parameters away as well
        if type(module) is not kind or not unhooked(module) or "weight" in module.__dict__:
            return None
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if type(weight) not in WHOLE or type(bias) not in WHOLE or weight.dtype is not dtype or bias.dtype is not dtype:
            return None
        found += weight, bias
    return found


def learns(*modules: nn.Module) -> bool:
    """Whether any of their parameters wants a gradient, and gradients are recorded."""
    return torch.is_grad_enabled() and any(p.requires_grad for module in modules for p in module.parameters())
