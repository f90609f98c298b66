"""The encoder: embed, pad, L layers under a mask, unpad, pool. The seed's packing algorithm, stage by stage.

`state` is a flat dict with Hugging Face's keys (`encoder.layers.0.self_attn.q_proj.weight`), `config` a dict or any
object with the attributes of `Siglip2VisionConfig`; what it leaves out has that class's default.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention import attention_pool
from .ops import layer_norm, mlp, wide
from .patches import cu_seqlens_of, grid_rows
from .positions import resize_positions

State = dict[str, Tensor]

DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}


class EncoderOutput(NamedTuple):
    """Rows `[T, D]` of a packed run or `[N, L, D]` of a padded one, where padding rows mean nothing."""

    embeddings: Tensor
    hidden_states: tuple[Tensor, ...] | None  # layers + 1 of them: [k] after layer k, all before post_layernorm
    last_hidden_state: Tensor  # after post_layernorm
    pooler_output: Tensor | None  # [N, D], None without a head


def setting(config: Any, name: str) -> Any:
    return config.get(name, DEFAULTS[name]) if isinstance(config, dict) else getattr(config, name, DEFAULTS[name])


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state: State, config: Any, name: str, x: Tensor) -> Tensor:
    return layer_norm(x, state[f"{name}.weight"], state[f"{name}.bias"], setting(config, "layer_norm_eps"))


def feed_forward(state: State, config: Any, name: str, x: Tensor) -> Tensor:
    fc1_weight, fc1_bias = state[f"{name}.fc1.weight"], state[f"{name}.fc1.bias"]
    fc2_weight, fc2_bias = state[f"{name}.fc2.weight"], state[f"{name}.fc2.bias"]
    return mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, setting(config, "hidden_act"))


def embed(state: State, config: Any, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
    """Packed patches `[T, P]` -> `[T, D]`: the projected patch plus its position, the same in every frame.

    ValueError for integer pixels and for a grid that covers another number of rows than there are.
    """
    if not pixel_values.is_floating_point():
        raise ValueError(f"pixel_values must be normalised floats, got {pixel_values.dtype}")
    grid = grid_rows(grid_thw)
    covered = sum(t * h * w for t, h, w in grid)
    if covered != pixel_values.shape[0]:
        raise ValueError(f"grid_thw covers {covered} patches, pixel_values has {pixel_values.shape[0]} rows")
    table, weight = state["embeddings.position_embedding.weight"], state["embeddings.patch_embedding.weight"]
    positions = torch.cat([table[:0], *(resize_positions(table, h, w).repeat(t, 1) for t, h, w in grid)])
    return linear(state, "embeddings.patch_embedding", pixel_values.to(weight.dtype)) + positions


def self_attention(state: State, config: Any, index: int, x: Tensor, mask: Tensor) -> Tensor:
    """`[N, L, D]` and an additive mask that broadcasts to `[N, H, L, L]` -> `[N, L, D]`."""
    name = f"encoder.layers.{index}.self_attn"
    heads = setting(config, "num_attention_heads")
    q, k, v = (wide(linear(state, f"{name}.{p}_proj", x).unflatten(-1, (heads, -1))) for p in "qkv")  # [N, L, H, K]
    scores = torch.einsum("nlhk,nmhk->nhlm", q, k) * q.shape[-1] ** -0.5 + mask
    attended = torch.einsum("nhlm,nmhk->nlhk", scores.softmax(dim=-1), v)
    return linear(state, f"{name}.out_proj", attended.flatten(2).to(x.dtype))


def encoder_layer(state: State, config: Any, index: int, x: Tensor, mask: Tensor) -> Tensor:
    """Pre-norm transformer layer, `[N, L, D]` -> `[N, L, D]`; `mask` as in `self_attention`."""
    name = f"encoder.layers.{index}"
    x = x + self_attention(state, config, index, norm(state, config, f"{name}.layer_norm1", x), mask)
    return x + feed_forward(state, config, f"{name}.mlp", norm(state, config, f"{name}.layer_norm2", x))


def pooling_head(state: State, config: Any, hidden_states: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Rows `[T, D]` after post_layernorm, offsets of N images `[N+1]` -> `[N, D]`: the probe attends to each image."""
    D, heads = hidden_states.shape[-1], setting(config, "num_attention_heads")
    # torch.nn.MultiheadAttention stacks the q, k and v projections along the rows of one matrix
    weights, biases = state["head.attention.in_proj_weight"], state["head.attention.in_proj_bias"]
    q, k, v = (
        (x @ weight.T + bias).unflatten(-1, (heads, -1))
        for x, weight, bias in zip(
            (state["head.probe"].reshape(D), hidden_states, hidden_states), weights.split(D), biases.split(D)
        )
    )
    pooled = linear(state, "head.attention.out_proj", attention_pool(q, k, v, cu_seqlens).flatten(1))
    return pooled + feed_forward(state, config, "head.mlp", norm(state, config, "head.layernorm", pooled))


def pad(rows: Tensor, valid: Tensor) -> Tensor:
    """Packed rows `[T, D]` -> `[N, L, D]`, in order, where `valid [N, L]` is true; zeros elsewhere."""
    padded = rows.new_zeros(*valid.shape, rows.shape[-1])
    padded[valid] = rows
    return padded


def run_layers(state: State, config: Any, embeddings: Tensor, valid: Tensor) -> list[Tensor]:
    """Padded embeddings `[N, L, D]` -> hidden states `[0..layers]`, no row attending to padding."""
    mask = torch.zeros_like(valid, dtype=wide(embeddings).dtype).masked_fill(~valid, -torch.inf)[:, None, None, :]
    hidden_states = [embeddings]
    for index in range(setting(config, "num_hidden_layers")):
        hidden_states.append(encoder_layer(state, config, index, hidden_states[-1], mask))
    return hidden_states


def pool(state: State, config: Any, hidden_states: Tensor, lengths: list[int]) -> Tensor | None:
    if not setting(config, "vision_use_head") or "head.probe" not in state:
        return None
    return pooling_head(state, config, hidden_states, cu_seqlens_of(lengths))


def padded_encoder(
    state: State,
    config: Any,
    pixel_values: Tensor,
    pixel_attention_mask: Tensor,
    spatial_shapes: Tensor,
    output_hidden_states: bool = False,
    dtype: torch.dtype | None = None,
) -> EncoderOutput:
    """What everyone runs: pixels `[N, L, P]`, mask `[N, L]` (1 = patch), (h, w) `[N, 2]` -> padded `EncoderOutput`.

    `dtype` is the dtype to compute in, by default that of the state.
    """
    if dtype is not None:
        state = {key: tensor.to(dtype) for key, tensor in state.items()}
    valid = pixel_attention_mask.bool()
    lengths, areas = valid.sum(dim=1).tolist(), spatial_shapes.prod(dim=1).tolist()
    if lengths != areas:
        raise ValueError(f"spatial_shapes cover {areas} patches, pixel_attention_mask marks {lengths}")
    grid_thw = torch.cat([torch.ones_like(spatial_shapes[:, :1]), spatial_shapes], dim=1)
    embeddings = pad(embed(state, config, pixel_values[valid], grid_thw), valid)
    hidden_states = run_layers(state, config, embeddings, valid)
    last_hidden_state = norm(state, config, "post_layernorm", hidden_states[-1])
    pooled = pool(state, config, last_hidden_state[valid], lengths)
    return EncoderOutput(embeddings, tuple(hidden_states) if output_hidden_states else None, last_hidden_state, pooled)


def packed_encoder(
    state: State,
    config: Any,
    pixel_values: Tensor,
    grid_thw: Tensor,
    temporal: str = "frames",
    output_hidden_states: bool = False,
    dtype: torch.dtype | None = None,
) -> EncoderOutput:
    """The seed's way to run a pack: pad `[T, P]` to a batch, encode, unpad -> `EncoderOutput` with rows `[T, D]`.

    Every frame is an attention segment of its own (`temporal="frames"`), or the t·h·w patches of an image are one
    (`"joint"`). Positions repeat per frame and the head pools over all frames of an image either way.
    """
    if temporal not in ("frames", "joint"):
        raise ValueError(f'temporal must be "frames" or "joint", got {temporal!r}')
    if dtype is not None:
        state = {key: tensor.to(dtype) for key, tensor in state.items()}
    grid = grid_rows(grid_thw)
    images = [t * h * w for t, h, w in grid]
    lengths = images if temporal == "joint" else [h * w for t, h, w in grid for _ in range(t)]
    column = torch.arange(max(lengths, default=0), device=pixel_values.device)
    valid = column < torch.tensor(lengths, dtype=torch.long, device=column.device)[:, None]  # [S, L]

    embeddings = embed(state, config, pixel_values, grid_thw)
    hidden_states = [x[valid] for x in run_layers(state, config, pad(embeddings, valid), valid)]
    last_hidden_state = norm(state, config, "post_layernorm", hidden_states[-1])
    pooled = pool(state, config, last_hidden_state, images)
    return EncoderOutput(embeddings, tuple(hidden_states) if output_hidden_states else None, last_hidden_state, pooled)
