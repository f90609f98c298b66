"""The transformer: pre-norm layers of varlen attention and MLP on packed rows.

Shapes: T rows, D hidden size, L layers.
"""

from __future__ import annotations

import threading
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from siglip2_packed import fused, invariance, plain
from siglip2_packed.attention import Siglip2PackedAttention
from siglip2_packed.fused import LayerWeights
from siglip2_packed.ops.attention import VarlenAttention

GELU_TANH = type(ACT2FN["gelu_pytorch_tanh"])
KINDS = nn.LayerNorm, *[nn.Linear] * 4, nn.LayerNorm, *[nn.Linear] * 2
"""Of the modules whose weights a layer computes with, in the order in which it does."""


class Siglip2PackedMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))

    def invariantly(self, hidden_states: Tensor) -> Tensor:
        """The same, see `invariance`."""
        return invariance.linear(self, "fc2", self.activation_fn(invariance.linear(self, "fc1", hidden_states)))


class Siglip2PackedEncoderLayer(GradientCheckpointingLayer):
    """The unit to wrap for FSDP, checkpointing and device maps."""

    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Siglip2PackedAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Siglip2PackedMLP(config)

    def __setattr__(self, name: str, value: Any) -> None:
        # A VLM around this model may choose reentrant checkpointing (transformers 4's default), which gives layers over
        # frozen ones no gradients at all. transformers sets a partial of torch's `checkpoint`.
        reentrant = isinstance(value, partial) and value.keywords.get("use_reentrant")
        if name == "_gradient_checkpointing_func" and reentrant:
            value = partial(value, use_reentrant=False)
        super().__setattr__(name, value)

    def forward(self, hidden_states: Tensor, attention: VarlenAttention) -> Tensor:
        """`[T, D]` -> `[T, D]`."""
        weights = None if plain.watched(hidden_states) else self.plain_weights(hidden_states)
        if weights is not None:
            return fused.layer(weights, hidden_states, attention)
        if attention.invariant:
            raise invariance.refused(self, hidden_states)
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states), attention)
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))

    def plain_weights(self, hidden_states: Tensor) -> LayerWeights | None:
        """What the layer computes with; None if its parts are not what they were built as, or of another dtype."""
        modules, dtype = self._modules, hidden_states.dtype  # without nn.Module's slow lookup
        attention: Any = modules["self_attn"]
        mlp: Any = modules["mlp"]
        if type(attention) is not Siglip2PackedAttention or type(mlp) is not Siglip2PackedMLP:
            return None
        activation, fc1, fc2 = _of_mlp(mlp._modules)
        if type(activation) is not GELU_TANH or not plain.unhooked(attention, mlp, activation):
            return None
        norm1: Any = modules["layer_norm1"]
        norm2: Any = modules["layer_norm2"]
        q, k, v, out = _of_attention(attention._modules)
        weights = plain.weights(*zip((norm1, q, k, v, out, norm2, fc1, fc2), KINDS), dtype=dtype)
        if weights is None:
            return None
        first, second = fused.parts(weights)
        return LayerWeights(first, second, (norm1.eps, norm2.eps), attention.head_dim)


class Siglip2PackedEncoder(nn.Module):
    def __init__(self, config, num_layers: int):
        super().__init__()
        self.layers = nn.ModuleList(Siglip2PackedEncoderLayer(config) for _ in range(num_layers))

    def forward(
        self, hidden_states: Tensor, attention: VarlenAttention, output_hidden_states: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """`[T, D]` -> `[T, D]` after the last layer, and, if asked for, all L+1 states, the input first."""
        weights = None if output_hidden_states else self.plain_weights(hidden_states)
        if weights is not None:
            run = fused.train if self.learns(hidden_states) else fused.infer
            return run(weights, hidden_states, attention), None
        states = [hidden_states]
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention)
            if output_hidden_states:
                states.append(hidden_states)
        return hidden_states, tuple(states) if output_hidden_states else None

    def plain_weights(self, hidden_states: Tensor) -> list[LayerWeights] | None:
        """What all layers compute with, where there are any and calling them would do no more."""
        if plain.watched(hidden_states) or not plain.unhooked(*self.layers):
            return None
        found: list[LayerWeights] = []
        recorded = torch.is_grad_enabled()
        for layer in self.layers:
            if type(layer) is not Siglip2PackedEncoderLayer:
                return None
            if recorded and layer.gradient_checkpointing and layer.training:
                return None
            weights = layer.plain_weights(hidden_states)
            if weights is None or (found and weights.second.fc1_bias.shape != found[0].second.fc1_bias.shape):
                return None  # of another width, as pruned layers are
            found.append(weights)
        return found or None

    def learns(self, hidden_states: Tensor) -> bool:
        """Whether gradients are wanted, of weights or of what comes in."""
        return torch.is_grad_enabled() and (hidden_states.requires_grad or plain.learns(self.layers))


_of_attention = itemgetter("q_proj", "k_proj", "v_proj", "out_proj")
_of_mlp = itemgetter("activation_fn", "fc1", "fc2")


_joining = threading.Lock()


def join_projections(encoder: nn.Module) -> None:
    """Moves q_proj, k_proj and v_proj of each layer side by side in memory, where one product reads all three.

    They stay three parameters with their names and values, and storages of their own. Moving the model (`.to`)
    separates them again. Of several threads each returns when all are there.
    """
    with _joining:
        for layer in getattr(encoder, "layers", ()):
            attention = getattr(layer, "self_attn", None)
            projections: list[Any] = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")]
            if all(type(x) is nn.Linear and type(x.weight) in plain.WHOLE for x in projections):
                fused.join(*(x.weight for x in projections))
                fused.join(*(x.bias for x in projections))
