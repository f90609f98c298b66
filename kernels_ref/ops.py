"""Row-wise operations, each written as its formula in fp32 (fp64 for fp64 inputs), rounded to the input's dtype."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """fp64 stays fp64, everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """`[..., D]` -> `[..., D]`: (x - mean) / sqrt(variance + eps) · weight + bias, the variance over D, not D - 1."""
    centred = wide(x) - wide(x).mean(dim=-1, keepdim=True)
    variance = (centred**2).mean(dim=-1, keepdim=True)
    return (centred / (variance + eps).sqrt() * wide(weight) + wide(bias)).to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU, the tanh approximation (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415)."""
    y = wide(x)
    return (0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """GELU, exact: x · Φ(x)."""
    y = wide(x)
    return (0.5 * y * (1 + torch.erf(y / math.sqrt(2)))).to(x.dtype)


def quick_gelu(x: Tensor) -> Tensor:
    """GELU, the sigmoid approximation: x · σ(1.702 x)."""
    y = wide(x)
    return (y * torch.sigmoid(1.702 * y)).to(x.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu": gelu,
    "quick_gelu": quick_gelu,
}


def activation(hidden_act: str) -> Callable[[Tensor], Tensor]:
    """The function a config's `hidden_act` names; ValueError for an unknown name."""
    if hidden_act not in ACTIVATIONS:
        raise ValueError(f"unknown hidden_act {hidden_act!r}, known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[hidden_act]


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    hidden_act: str = "gelu_pytorch_tanh",
) -> Tensor:
    """`[..., D]` -> `[..., D]` through `fc1_weight [F, D]`, the activation, `fc2_weight [D, F]`."""
    return activation(hidden_act)(x @ fc1_weight.T + fc1_bias) @ fc2_weight.T + fc2_bias
