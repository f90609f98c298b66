"""Multi-head self-attention over packed rows."""

from __future__ import annotations

from torch import Tensor, nn

from siglip2_packed.ops.attention import VarlenAttention


class Siglip2PackedAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = head_dim(config)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
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
