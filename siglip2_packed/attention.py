"""Multi-head self-attention over packed rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from siglip2_packed.ops.attention import ATTN_IMPLEMENTATIONS, VarlenAttention, why_missing


class Siglip2PackedAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = head_dim(config)
        # k, v, q as in transformers: an optimiser's state knows parameters by their order alone
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, attention: VarlenAttention) -> Tensor:
        """`[T, D]` -> `[T, D]`; rows attend within their segment."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(hidden_states).unflatten(-1, (-1, self.head_dim)) for project in projections)
        return self.out_proj(attention(q, k, v).flatten(1))


def head_dim(config) -> int:
    """K = D / H."""
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {config.num_attention_heads}"
        )
    return config.hidden_size // config.num_attention_heads


class AttentionName(str):
    """What a configuration holds for a name that transformers does not know: `"sdpa"` to all others.

    So what is built from the model's configuration elsewhere works, and a name that is set there counts here.
    """

    requested: str


def attention_name(requested: str | None) -> str:
    """What a configuration holds for a requested backend.

    Raises:
        ValueError: no such backend.
        ImportError: it is not installed.
    """
    name = getattr(requested, "requested", requested) or "auto"
    if name not in ATTN_IMPLEMENTATIONS:
        choices = f"unknown attn_implementation {name!r}: choose one of {', '.join(ATTN_IMPLEMENTATIONS)}"
        raise ValueError(f'Specified `attn_implementation="{name}"` is not supported ({choices})')
    reason = None if name == "auto" else why_missing(name)
    if reason is not None:
        raise ImportError(f"attn_implementation={name!r} cannot be used: {reason}")
    if name in ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()):
        return name
    known = AttentionName("sdpa")
    known.requested = name
    return known


def requested_attention(config: Any) -> str:
    """The backend that a configuration asks for."""
    name = config._attn_implementation
    return getattr(name, "requested", name) or "auto"
