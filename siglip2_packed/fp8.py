"""Inference with the encoder's linear layers in float8 (e4m3), a scale for each row of activations and of weights.

    quantize_fp8(model)     # Hopper or newer; for inference only; there is no way back

LayerNorm, softmax, GELU and the residual stream stay in the model's dtype and float32.

Shapes: T rows, D hidden size, F MLP width, K head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from siglip2_packed import plain
from siglip2_packed.encoder import GELU_TANH
from siglip2_packed.modeling import Siglip2PackedVisionModel
from siglip2_packed.ops import float8
from siglip2_packed.ops.attention import VarlenAttention
from siglip2_packed.ops.float8 import quantize, quantize_rows


def quantize_fp8(model: Siglip2PackedVisionModel) -> Siglip2PackedVisionModel:
    """Replaces the encoder's linear layers by float8 ones, in place; returns the model.

    Raises:
        ValueError: a device without float8 products, a dtype other than bfloat16, widths that are no multiples of 16,
            an activation other than GELU's tanh form.
    """
    weight = model.embeddings.patch_embedding.weight
    if reason := float8.why_not(weight.device):
        raise ValueError(f"{reason}, the model is on {weight.device}")
    if weight.dtype != torch.bfloat16:
        raise ValueError(f"float8 replaces bfloat16 weights, the model is in {weight.dtype}")
    model.encoder = Float8Encoder(model.encoder.layers)  # type: ignore[assignment]
    return model


class Float8Linear(nn.Module):
    weight: Tensor
    scale: Tensor
    bias: Tensor
    one: Tensor

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        if any(size % 16 for size in weight.shape):
            raise ValueError(f"float8 products need widths that are multiples of 16, got {list(weight.shape)}")
        quantized, scale = quantize(weight.detach().float())
        self.register_buffer("weight", quantized.t())  # [in, out], column-major, as the product takes it
        self.register_buffer("scale", scale.t())
        self.register_buffer("bias", bias.detach())
        self.register_buffer("one", torch.ones((), dtype=torch.float32, device=weight.device), persistent=False)

    def forward(self, rows: Tensor, scales: Tensor) -> Tensor:
        """`[T, in]` float8 and `[T, 1]` float32 -> `[T, out]` in the bias' dtype."""
        return torch._scaled_mm(
            rows, self.weight, scales, self.scale, bias=self.bias, out_dtype=self.bias.dtype, use_fast_accum=True
        )

    def unscaled(self, rows: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `quantize_rows` adds as an update: the product alone, in a quarter less time for long rows, and what it
        still lacks, both scales and the bias."""
        product = torch._scaled_mm(
            rows, self.weight, self.one, self.one, out_dtype=self.bias.dtype, use_fast_accum=True
        )
        return product, scales, self.scale, self.bias


class Float8Layer(nn.Module):
    def __init__(self, block):
        super().__init__()
        if type(block.mlp.activation_fn) is not GELU_TANH:
            raise ValueError(f"float8 knows GELU's tanh form only, got {type(block.mlp.activation_fn).__name__}")
        self.norm1, self.norm2 = block.layer_norm1, block.layer_norm2
        self.head_dim = block.self_attn.head_dim
        attention, mlp = block.self_attn, block.mlp
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        for x in (*projections, attention.out_proj, mlp.fc1, mlp.fc2):
            if type(x) is not nn.Linear or type(x.weight) not in plain.WHOLE:
                raise ValueError(
                    f"float8 replaces plain linear layers, not {type(x).__name__} of {type(x.weight).__name__}: merge "
                    "adapters first; what is quantised already stays as it is"
                )
        self.qkv = Float8Linear(torch.cat([x.weight for x in projections]), torch.cat([x.bias for x in projections]))
        self.out, self.fc1, self.fc2 = (Float8Linear(x.weight, x.bias) for x in (attention.out_proj, mlp.fc1, mlp.fc2))

    def forward(
        self, x: Tensor, update: tuple | None, attention: VarlenAttention, to_float8: Callable
    ) -> tuple[Tensor, tuple]:
        """The stream `[T, D]` and what is still to be added to it, before and after the layer."""
        rows, scales, x = to_float8(x, update, (self.norm1.weight, self.norm1.bias, self.norm1.eps))
        qkv = self.qkv(rows, scales).unflatten(1, (3, -1, self.head_dim))
        rows, scales, _ = to_float8(attention.qkvpacked(qkv).flatten(1))
        update = self.out.unscaled(rows, scales)
        rows, scales, x = to_float8(x, update, (self.norm2.weight, self.norm2.bias, self.norm2.eps))
        rows, scales, _ = to_float8(self.fc1(rows, scales), gelu=True)
        return x, self.fc2.unscaled(rows, scales)


class Float8Encoder(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(Float8Layer(block) for block in layers)
        self.widths = [block.mlp.fc1.out_features for block in layers]

    @torch.no_grad()
    def forward(
        self, hidden_states: Tensor, attention: VarlenAttention, output_hidden_states: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """As the encoder it replaces, without gradients."""
        x, update = hidden_states, None
        states = [x]
        if len(x) and len(self.layers):
            for layer, width in zip(self.layers, self.widths):
                to_float8 = quantize_rows(x, width)
                x, update = layer(x, update, attention, to_float8)
                if output_hidden_states:
                    states.append(to_float8(x, update)[2])
            x = to_float8(x, update)[2]
        return x, tuple(states) if output_hidden_states else None
