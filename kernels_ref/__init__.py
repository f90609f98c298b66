"""The slow, obvious version of every computation of SigLIP2 NaFlex, padded path included.

Pure functions over tensors and a flat state dict with Hugging Face's keys. Nothing here is shared with the fast
package, so that what agrees with it has been checked by something else. Where the dtype is bf16 or fp16, whatever
is delicate (norms, activations, softmax, positions) is computed in fp32 and rounded once.

Dimension letters: N images, T packed patches, S attention segments, L padded length, P patch_dim, D hidden size,
H heads, K head_dim, F MLP width, G side of the position table.
"""

from .attention import attention, attention_pool
from .encoder import EncoderOutput, embed, encoder_layer, packed_encoder, padded_encoder, pooling_head, self_attention
from .model import Siglip2Naflex, load_checkpoint
from .ops import ACTIVATIONS, activation, gelu, gelu_tanh, layer_norm, mlp, quick_gelu
from .patches import cu_seqlens_of, grid_rows, patchify, unpatchify
from .positions import position_weights, resize_positions

__all__ = [
    "ACTIVATIONS",
    "EncoderOutput",
    "Siglip2Naflex",
    "activation",
    "attention",
    "attention_pool",
    "cu_seqlens_of",
    "embed",
    "encoder_layer",
    "gelu",
    "gelu_tanh",
    "grid_rows",
    "layer_norm",
    "load_checkpoint",
    "mlp",
    "packed_encoder",
    "padded_encoder",
    "patchify",
    "pooling_head",
    "position_weights",
    "quick_gelu",
    "resize_positions",
    "self_attention",
    "unpatchify",
]
