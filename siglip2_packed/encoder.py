"""The transformer: pre-norm layers of varlen attention and MLP on packed rows."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from siglip2_packed import fused
from siglip2_packed.attention import Siglip2PackedAttention
from siglip2_packed.ops.segments import Segments


class Siglip2PackedMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.hidden_act not in ACT2FN:
            raise ValueError(f"unknown hidden_act {config.hidden_act!r}: choose one of {', '.join(sorted(ACT2FN))}")
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class Siglip2PackedEncoderLayer(GradientCheckpointingLayer):
    """The unit to wrap for FSDP, checkpointing and device maps."""

    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Siglip2PackedAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Siglip2PackedMLP(config)

    @property
    def _gradient_checkpointing_func(self) -> Any:
        return self.__dict__["checkpointing"]

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, checkpointing: Any) -> None:
        # A VLM around this model may choose reentrant checkpointing (transformers 4's default), which gives layers over
        # frozen ones no gradients at all. transformers sets a partial of torch's `checkpoint`.
        if isinstance(checkpointing, partial) and checkpointing.keywords.get("use_reentrant"):
            checkpointing = partial(checkpointing, use_reentrant=False)
        self.__dict__["checkpointing"] = checkpointing

    def forward(self, hidden_states: Tensor, segments: Segments, backend: str) -> Tensor:
        """`[T, D]` -> `[T, D]`."""
        if fused.applies(self, hidden_states):
            return fused.layer(self, hidden_states, segments, backend)
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states), segments, backend)
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class Siglip2PackedEncoder(nn.Module):
    def __init__(self, config, num_layers: int):
        super().__init__()
        self.layers = nn.ModuleList(Siglip2PackedEncoderLayer(config) for _ in range(num_layers))

    def forward(
        self, hidden_states: Tensor, segments: Segments, backend: str, output_hidden_states: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """`[T, D]` -> `[T, D]` after the last layer, and, if asked for, all L+1 states, the input first."""
        if not output_hidden_states and fused.may_infer(self.layers, hidden_states):
            return fused.infer(self.layers, hidden_states, segments, backend), None
        states = [hidden_states]
        for layer in self.layers:
            hidden_states = layer(hidden_states, segments, backend)
            if output_hidden_states:
                states.append(hidden_states)
        return hidden_states, tuple(states) if output_hidden_states else None
