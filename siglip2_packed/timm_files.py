"""timm's NaFlex ViT of SigLIP2 (`naflexvit_*_siglip`) under Hugging Face's names: the same tower, named otherwise.

Shapes: D hidden size, F MLP width, P patch_dim, G side of the position table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

PATCH_EMBEDDINGS = ("embeds.proj.weight", "patch_embed.proj.weight")
HEADS = {"naflexvit_base_patch16_siglip": 12, "naflexvit_so400m_patch16_siglip": 16}
SETTINGS: dict[str, tuple] = {  # of timm's model_args that the weights do not show, those that are this tower's
    "act_layer": ("gelu_tanh",),
    "global_pool": ("map", ""),
    "pos_embed": ("learned",),
    "pos_embed_interp_mode": ("bilinear",),
    "pos_embed_antialias": (True,),
    "patchify_channels_last": (True,),
    "pool_include_prefix": (False,),
    "qkv_bias": (True,),
    "proj_bias": (True,),
    "final_norm": (True,),
    "fix_init": (True, False),
    "in_chans": (3,),
}
SHOWN = set(  # those that the weights show, or that have no part in features
    """
    embed_dim depth num_heads attn_pool_num_heads mlp_ratio attn_pool_mlp_ratio patch_size img_size num_classes
    pos_embed_grid_size weight_init class_token reg_tokens dynamic_img_size
    """.split()
)
MODULES = {
    "proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
    "attn_pool.proj": "head.attention.out_proj",
    "attn_pool.norm": "head.layernorm",
    "attn_pool.mlp.fc1": "head.mlp.fc1",
    "attn_pool.mlp.fc2": "head.mlp.fc2",
}
OF_A_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def is_timm(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of timm's."""
    return isinstance(config.get("architecture"), str) and "model_type" not in config


def fields(config: Mapping[str, Any], shapes: Mapping[str, list[int]], source: str) -> dict[str, Any]:
    """Those of a `Siglip2VisionConfig`, from the weights' shapes and what timm's config.json says beside them.

    Raises:
        ValueError: another architecture than SigLIP2's NaFlex, or settings that change what it computes.
    """
    name = config["architecture"].split(".")[0]
    if name not in HEADS:
        raise ValueError(f"{source}: timm's architecture {name!r}; of timm's towers {' and '.join(HEADS)} can be read")
    given = config.get("model_args") or {}
    if not isinstance(given, dict):
        raise ValueError(f"{source}: model_args is {given!r}, expected an object")
    for key, value in given.items():
        right = SETTINGS.get(key)
        if key not in SHOWN and value is not None and (value not in right if right else value):
            raise ValueError(f"{source}: model_args has {key}={value!r}, which SigLIP2's tower does not know")
    heads = given.get("num_heads") or HEADS[name]
    if given.get("attn_pool_num_heads") not in (None, heads):
        raise ValueError(f"{source}: attn_pool_num_heads {given['attn_pool_num_heads']} are not num_heads {heads}")
    patch = next((shapes[key] for key in PATCH_EMBEDDINGS if key in shapes), None)
    table = next((shapes[key] for key in ("embeds.pos_embed", "pos_embed") if key in shapes), None)
    mlp = shapes.get("blocks.0.mlp.fc1.bias")
    blocks = [int(found[1]) for found in (re.match(r"blocks\.(\d+)\.", key) for key in shapes) if found]
    if patch is None or table is None or mlp is None:
        raise ValueError(
            f"{source}: the weights lack a patch projection, a position table or layers, as timm names them"
        )
    return {
        "hidden_size": patch[0],
        "intermediate_size": mlp[0],
        "num_hidden_layers": 1 + max(blocks),
        "num_attention_heads": heads,
        "patch_size": math.isqrt(math.prod(patch[1:]) // 3),
        "num_patches": math.prod(table[1:-1]),
        "vision_use_head": any(key.startswith("attn_pool.") for key in shapes),
    }


def convert(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors under Hugging Face's names; ValueError for one that SigLIP2's tower has no place for."""
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in ("head.weight", "head.bias"):  # a classifier behind the tower
            continue
        parts = dict(_parts(name.removeprefix("embeds.").removeprefix("patch_embed."), tensor))
        if not parts:
            raise ValueError(f"{source!r}: timm's {name} {list(tensor.shape)} has no place in SigLIP2's NaFlex tower")
        for twice in parts.keys() & converted.keys():
            raise ValueError(f"{source!r}: timm's {name} is there under another name, too, as {twice}")
        converted |= parts
    for kind in ("weight", "bias"):
        pair = [converted.pop(f"attn_pool.{x}.{kind}", None) for x in ("q", "kv")]
        if pair[0] is not None and pair[1] is not None:
            converted[f"head.attention.in_proj_{kind}"] = torch.cat(pair)  # type: ignore[arg-type]
    return converted


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One of timm's tensors as one or several of Hugging Face's; none for one that is unknown."""
    module, _, kind = name.rpartition(".")
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    if name == "pos_embed":  # [1, G, G, D], or [1, G·G, D]
        if tensor.ndim == 3 or (tensor.ndim == 4 and tensor.shape[1] == tensor.shape[2]):
            yield "embeddings.position_embedding.weight", tensor.flatten(0, -2)
    elif name == "attn_pool.latent":
        yield "head.probe", tensor
    elif kind not in ("weight", "bias"):
        return
    elif name == "proj.weight" and tensor.ndim == 4:  # a convolution's [D, c, py, px]
        yield "embeddings.patch_embedding.weight", tensor.permute(0, 2, 3, 1).flatten(1)
    elif module in MODULES:
        yield f"{MODULES[module]}.{kind}", tensor
    elif module in ("attn_pool.q", "attn_pool.kv"):  # joined when both are there
        yield name, tensor
    elif block and block[2] in OF_A_BLOCK:
        yield f"encoder.layers.{block[1]}.{OF_A_BLOCK[block[2]]}.{kind}", tensor
    elif block and block[2] == "attn.qkv":
        for x, part in zip("qkv", tensor.chunk(3)):
            yield f"encoder.layers.{block[1]}.self_attn.{x}_proj.{kind}", part
