"""From a checkpoint's weights, whoever wrote them, to this model's state dict.

Read are safetensors files only, single or sharded, in every layout SigLIP2 towers come in: bare keys, `vision_model.`,
the full model with its text tower, towers cut out of, or still inside, a vision-language model, and timm's names. What
decides is `config.json` and the keys themselves, never the folder's name.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from siglip2_packed import timm_files
from siglip2_packed.configuration import layer_index, patch_dim
from siglip2_packed.files import open_weights, weight_files
from siglip2_packed.kinds import num_patches
from siglip2_packed.quantized import FLOATING

logger = logging.getLogger("siglip2_packed")

PATCH_EMBEDDING = "embeddings.patch_embedding.weight"
LINEAR = re.compile(r".*(patch_embedding|_proj|fc1|fc2)\._?weight.*")
DIFFUSERS = (  # names in what transformers 5 saves of Cosmos3 Edge, and ours
    (".self_attn.to_q.", ".self_attn.q_proj."),
    (".self_attn.to_k.", ".self_attn.k_proj."),
    (".self_attn.to_v.", ".self_attn.v_proj."),
    (".mlp.up_proj.", ".mlp.fc1."),
    (".mlp.down_proj.", ".mlp.fc2."),
)
TORCHAO = "embeddings.patch_embedding._weight_qdata"  # torchao writes the parts of its weights


class Tower(NamedTuple):
    """A checkpoint's vision tower: its tensors by Hugging Face's bare keys, and what comes before them in the file."""

    state: dict[str, Tensor]
    prefix: str

    @property
    def quantized(self) -> bool:
        """Whether weights of linear layers are in the form of some quantiser."""
        return any(_packed(self.state, name) for name in self.state if LINEAR.fullmatch(name))

    @property
    def plain_linears(self) -> list[str]:
        """The linear layers whose weights are as they were."""
        weights = [name for name in self.state if LINEAR.fullmatch(name) and name.endswith(".weight")]
        return sorted(name.removesuffix(".weight") for name in weights if not _packed(self.state, name))


def _packed(state: Mapping[str, Tensor], name: str) -> bool:
    """Whether a weight is quantised: 4-bit ones may be stored as floating numbers, with their scales beside them."""
    return state[name].dtype not in FLOATING or f"{name}.absmax" in state


def read_state_dict(ckpt: str | os.PathLike, **hub) -> dict[str, Tensor]:
    """All tensors of the vision tower under Hugging Face's bare keys (`encoder.layers.0.self_attn.q_proj.weight`, ...).

    See `read_tower`.
    """
    return read_tower(ckpt, **hub).state


def read_tower(ckpt: str | os.PathLike, **hub) -> Tower:
    """The vision tower. Tensors of other parts (text tower, logit scale, language model) are not read.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is missing.
        ValueError: pickle weights only; no SigLIP2 patch embedding among the keys, or more than one.
    """
    files = weight_files(ckpt, **hub)
    names = [name for keys in files.values() for name in keys]
    if any(name in timm_files.PATCH_EMBEDDINGS for name in names):
        return Tower(timm_files.convert(read_tensors(ckpt, names, **hub), str(ckpt)), "")
    towers = [name.removesuffix(end) for end in (PATCH_EMBEDDING, TORCHAO) for name in names if name.endswith(end)]
    if len(towers) != 1:
        raise ValueError(
            f"{str(ckpt)!r} holds {len(towers)} vision towers (keys that end in {PATCH_EMBEDDING}: "
            f"{[tower + PATCH_EMBEDDING for tower in towers]}); expected one. First keys: {sorted(names)[:5]}"
        )
    return Tower(_read(files, towers[0]), towers[0])


def _read(files: dict[Path, list[str]], prefix: str) -> dict[str, Tensor]:
    state = {}
    for path, keys in files.items():
        with open_weights(path) as file:
            for key in keys:
                name = key.removeprefix(prefix)
                if key.startswith(prefix) and name.startswith(("embeddings.", "encoder.", "post_layernorm.", "head.")):
                    for theirs, ours in DIFFUSERS:
                        name = name.replace(theirs, ours)
                    if name in state:
                        raise ValueError(f"{path}: {key} is there under another name, too, as {prefix}{name}")
                    state[name] = file.get_tensor(key)
    return state


def read_tensors(ckpt: str | os.PathLike, names: Sequence[str], **hub) -> dict[str, Tensor]:
    """Those of the named tensors that a checkpoint holds, by their names in the file."""
    found = {}
    for path, keys in weight_files(ckpt, **hub).items():
        with open_weights(path) as file:
            found.update({name: file.get_tensor(name) for name in names if name in keys})
    return found


def check_sizes(state: Mapping[str, Tensor], config: PretrainedConfig, source: str) -> None:
    """ValueError, naming the field, if the configuration's sizes are not the weights': before anything is built."""
    layers = {found[1] for found in (re.match(r"encoder\.layers\.(\d+)\.", name) for name in state) if found}
    wanted = layer_index(getattr(config, "select_layer", None), config.num_hidden_layers)
    if wanted > len(layers):
        raise ValueError(
            f"{source}: num_hidden_layers is {config.num_hidden_layers}, but the weights have {len(layers)} layers"
        )
    table, patches = state.get("embeddings.position_embedding.weight"), state.get(PATCH_EMBEDDING)
    fc1 = state.get("encoder.layers.0.mlp.fc1.bias") if wanted else None
    rows, width = (None, None) if table is None or table.ndim != 2 else table.shape
    sizes = {
        "num_patches": (num_patches(config), rows),
        "hidden_size": (config.hidden_size, width),
        "intermediate_size": (config.intermediate_size, None if fc1 is None else fc1.numel()),
        "patch_size² · num_channels": (
            patch_dim(config),
            None if patches is None or patches.ndim < 2 or _packed(state, PATCH_EMBEDDING) else patches[0].numel(),
        ),
    }
    for name, (told, found) in sizes.items():
        if found is not None and told != found:
            raise ValueError(f"{source}: {name} is {told}, but the weights have {found}")


def check_state_dict(
    state: Mapping[str, Tensor], expected: Mapping[str, torch.Size], source: object, truncated: bool = False
) -> None:
    """Raises ValueError if tensors are missing or of another shape or kind than the model's.

    Warns of other tensors the model has no use for, unless it is `truncated` on purpose.
    """
    missing = sorted(set(expected) - set(state))
    if missing:
        listed = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise ValueError(f"{source!r} lacks {len(missing)} of {len(expected)} tensors: {listed}")
    for name in expected:
        if state[name].dtype not in FLOATING:
            raise ValueError(f"{source!r}: {name} is {state[name].dtype}; expected floating weights")
    wrong = [name for name in expected if state[name].shape != expected[name]]
    if wrong:
        shapes = (f"{name} is {list(state[name].shape)}, expected {list(expected[name])}" for name in wrong[:8])
        raise ValueError(
            f"{source!r} has {len(wrong)} tensors of another shape than its config says: {'; '.join(shapes)}"
        )
    unused = sorted(name for name in set(state) - set(expected) if not name.startswith("head."))
    if unused and not truncated:
        logger.warning("%s: %d tensors are not part of this model: %s", source, len(unused), ", ".join(unused[:4]))


def check_parts(state: Mapping[str, Tensor], expected: Iterable[str], source: object) -> None:
    """ValueError for tensors that a part of the model has no place for: that part computes something else with them."""
    parts = {_part(name) for name in expected}
    strange = sorted(name for name in set(state) - set(expected) if _part(name) in parts and _computes(state[name]))
    if strange:
        raise ValueError(
            f"{source!r} has {len(strange)} tensors of another computation in parts that this model has: "
            f"{', '.join(strange[:8])}. Its features would be others than the checkpoint's; if they change nothing, "
            "take them out of the file"
        )


def _part(name: str) -> str:
    """`encoder.layers.3`, `embeddings`, `head`, ..."""
    return ".".join(name.split(".")[: 3 if name.startswith("encoder.") else 1])


def _computes(tensor: Tensor) -> bool:
    """Not so `position_ids` and the like, which older versions of transformers wrote."""
    return tensor.is_floating_point() or tensor.is_complex()
