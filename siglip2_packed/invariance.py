"""`batch_invariant`: an image's features are the same to the bit whatever shares its pack, however large that is.

    products            one order of each sum, for any number of rows       `ops.linear`
    attention           one kernel, whose order follows the image's length  `ops.attention`
    norms, positions, pooling      a row or an image for itself             `ops.norm`, `ops.positions`, `ops.pool`

That is what kernels of our own do with whole weights of one dtype. Whatever computes in another way is refused by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.activations import ACT2FN

from siglip2_packed import plain
from siglip2_packed.ops import linear as ops

PRODUCTS = nn.Linear, NonDynamicallyQuantizableLinear, nn.Conv2d
BUILT_OF = *PRODUCTS, nn.LayerNorm, nn.Embedding, nn.ModuleList, type(ACT2FN["gelu_pytorch_tanh"])
"""And of classes of ours."""


def asked(config: Any) -> bool:
    """Whether a configuration asks for it."""
    return bool(getattr(config, "batch_invariant", False))


def linear(owner: nn.Module, name: str, x: Tensor) -> Tensor:
    """What the owner's linear layer of this name, or convolution over its windows, makes of x: `[T, D]` -> `[T, F]`.

    Raises:
        ValueError: it is more than its weights, or the product cannot be had here.
    """
    module = getattr(owner, name)
    kind = type(module) if type(module) in PRODUCTS else nn.Linear
    found = plain.weights((module, kind), dtype=x.dtype)
    if found is None:
        raise refused(owner, x)
    weight, bias = found
    if weight.ndim == 4:  # [D, C, p, p], rows are (py, px, c)
        weight = weight.permute(0, 2, 3, 1).flatten(1)
    return ops.linear(x, weight, bias)


def refused(module: nn.Module, x: Tensor, other: type | None = None) -> ValueError:
    """Why a module that takes x cannot have it; other: the class of a part that computes in its own way."""
    reason = _reason(module, x) if other is None else f"{other.__name__} computes in its own way"
    return ValueError(f"batch_invariant cannot be had: {reason}. Set config.batch_invariant=False")


def _reason(module: nn.Module, x: Tensor) -> str:
    if plain.watched(x):
        return "autocast, torch.compile, a function transform or hooks of all modules change what is computed"
    for name, part in module.named_modules(prefix=type(module).__name__):
        if part is not module and not plain.unhooked(part):
            return f"hooks or a replaced forward on {name} have to run"
        kind = type(part)
        if kind not in BUILT_OF and not kind.__module__.startswith("siglip2_packed."):
            return f"{name} is {kind.__name__}, {kind.__module__}'s"
        for key, parameter in part.named_parameters(recurse=False):
            if type(parameter) not in plain.WHOLE:
                return f"{name}.{key} is {type(parameter).__name__}, sharded or quantised"
            if parameter.dtype != x.dtype:
                return f"{name}.{key} is {_name(parameter.dtype)}, and what it is applied to {_name(x.dtype)}"
    return f"{type(module).__name__} has not the parts that it was built of"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
