"""The attention pooling head: one learned query (the probe) reads each image's rows into one vector."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from siglip2_packed import invariance, plain
from siglip2_packed.attention import head_dim
from siglip2_packed.encoder import GELU_TANH, Siglip2PackedMLP
from siglip2_packed.ops.linear import linear
from siglip2_packed.ops.pool import attention_pool
from siglip2_packed.ops.segments import Segments


class PoolingAttention(nn.Module):
    """The parameters of `nn.MultiheadAttention`, applied to one query per image."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = head_dim(config)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.hidden_size, config.hidden_size))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * config.hidden_size))
        # not for quantisers, as in nn.MultiheadAttention: their files and transformers' hold the same
        self.out_proj = NonDynamicallyQuantizableLinear(config.hidden_size, config.hidden_size)

    def forward(self, probe: Tensor, hidden_states: Tensor, images: Segments, invariant: bool = False) -> Tensor:
        """probe `[1, 1, D]`, hidden_states `[T, D]` -> `[N, D]`."""
        product = linear if invariant else F.linear
        q_weight, k_weight, v_weight = self.in_proj_weight.chunk(3)
        q_bias, k_bias, v_bias = self.in_proj_bias.chunk(3)
        q = product(probe[0], q_weight, q_bias).view(-1, self.head_dim)
        k = product(hidden_states, k_weight, k_bias).unflatten(-1, (-1, self.head_dim))
        v = product(hidden_states, v_weight, v_bias).unflatten(-1, (-1, self.head_dim))
        pooled = attention_pool(q, k, v, images, invariant).flatten(1)
        return invariance.linear(self, "out_proj", pooled) if invariant else self.out_proj(pooled)


class Siglip2PackedPoolingHead(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, config.hidden_size))
        self.attention = PoolingAttention(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Siglip2PackedMLP(config)

    @torch.compiler.disable  # nothing to fuse, and segments of its own: a graph less
    def forward(self, hidden_states: Tensor, images: Segments, invariant: bool = False) -> Tensor:
        """`[T, D]` after post_layernorm -> `[N, D]`, one vector an image (all frames of a video together).

        invariant: see `invariance`.
        """
        if invariant and not self.is_plain(hidden_states):
            raise invariance.refused(self, hidden_states)
        pooled = self.attention(self.probe, hidden_states, images, invariant)
        normed = self.layernorm(pooled)
        return pooled + (self.mlp.invariantly(normed) if invariant else self.mlp(normed))

    def is_plain(self, hidden_states: Tensor) -> bool:
        """Whether all its parts are what they were built as, whole and of one dtype."""
        attention, mlp = self.attention, self.mlp
        if type(attention) is not PoolingAttention or type(mlp) is not Siglip2PackedMLP:
            return False
        parts = (attention.out_proj, NonDynamicallyQuantizableLinear), (self.layernorm, nn.LayerNorm)
        linears = (mlp.fc1, nn.Linear), (mlp.fc2, nn.Linear)
        own, dtype = (attention.in_proj_weight, attention.in_proj_bias, self.probe), hidden_states.dtype
        if type(mlp.activation_fn) is not GELU_TANH or not plain.unhooked(attention, mlp, mlp.activation_fn):
            return False
        whole = all(type(x) in plain.WHOLE and x.dtype == dtype for x in own)
        return whole and plain.weights(*parts, *linears, dtype=dtype) is not None
