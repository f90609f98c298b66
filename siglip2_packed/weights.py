"""From a checkpoint, whoever wrote it, to this model's configuration and state dict.

Read are safetensors files only, single or sharded, in every layout SigLIP2 towers come in: bare keys, `vision_model.`,
the full model with its text tower, and towers cut out of, or still inside, a vision-language model. What decides is
`config.json` and the keys themselves, never the folder's name.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import Siglip2VisionConfig
from transformers.utils import cached_file

logger = logging.getLogger("siglip2_packed")

PATCH_EMBEDDING = "embeddings.patch_embedding.weight"
SAFETENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth")


def find_file(ckpt: str | os.PathLike, name: str, **hub) -> Path | None:
    """A file of a local folder, or of a hub repository through transformers' cache; None if it has no such file."""
    folder = Path(ckpt).expanduser()
    if folder.is_dir():
        path = folder / (hub.get("subfolder") or "") / name
        return path if path.is_file() else None
    if folder.is_absolute() or str(ckpt).startswith((".", "~")) or str(ckpt).count("/") > 1:
        raise FileNotFoundError(f"checkpoint folder {str(ckpt)!r} does not exist")
    found = cached_file(ckpt, name, _raise_exceptions_for_missing_entries=False, **hub)
    return None if found is None else Path(found)


def read_config(ckpt: str | os.PathLike, **hub) -> Siglip2VisionConfig:
    """The vision configuration of a checkpoint: its own, or the `vision_config` inside.

    Raises:
        FileNotFoundError: no config.json.
        ValueError: a model_type that is no SigLIP2 NaFlex tower.
    """
    path = find_file(ckpt, "config.json", **hub)
    if path is None:
        raise FileNotFoundError(f"no config.json in {str(ckpt)!r}")
    config = read_json(path)
    model_type = config.get("model_type")
    vision = config
    while "vision_config" in vision:
        vision = vision["vision_config"]
        if not isinstance(vision, dict):
            raise ValueError(f"{path}: vision_config is {vision!r}, expected an object")
        # Siglip2Config's own vision_config may leave out its type
        model_type = vision.get("model_type", "siglip2_vision_model" if model_type == "siglip2" else None)
    if model_type in ("siglip", "siglip_vision_model"):
        raise ValueError(_fixed_resolution(ckpt, config, vision, hub))
    if model_type != "siglip2_vision_model":
        raise ValueError(
            f"{str(ckpt)!r} has model_type {config.get('model_type')!r}; expected 'siglip2', 'siglip2_vision_model' or "
            "a model whose vision_config is one"
        )
    return Siglip2VisionConfig.from_dict({k: v for k, v in vision.items() if k != "model_type"})


def read_json(path: Path) -> dict:
    """A JSON object; ValueError, with the path, for anything else."""
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected an object")
    return value


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """`safe_open`, whose errors do not say which file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error


def read_state_dict(ckpt: str | os.PathLike, **hub) -> dict[str, Tensor]:
    """All tensors of the vision tower under Hugging Face's bare keys (`encoder.layers.0.self_attn.q_proj.weight`, ...).

    Tensors of other parts (text tower, logit scale, language model) are not read.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is missing.
        ValueError: pickle weights only; no SigLIP2 patch embedding among the keys, or more than one.
    """
    files = _weight_files(ckpt, hub)
    names = [name for keys in files.values() for name in keys]
    towers = [name.removesuffix(PATCH_EMBEDDING) for name in names if name.endswith(PATCH_EMBEDDING)]
    if len(towers) != 1:
        raise ValueError(
            f"{str(ckpt)!r} holds {len(towers)} vision towers (keys that end in {PATCH_EMBEDDING}: "
            f"{[tower + PATCH_EMBEDDING for tower in towers]}); expected one. First keys: {sorted(names)[:5]}"
        )
    return _read(files, towers[0])


def _read(files: dict[Path, list[str]], prefix: str) -> dict[str, Tensor]:
    state = {}
    for path, keys in files.items():
        with open_weights(path) as file:
            for key in keys:
                name = key.removeprefix(prefix)
                if key.startswith(prefix) and name.startswith(("embeddings.", "encoder.", "post_layernorm.", "head.")):
                    state[name] = file.get_tensor(key)
    return state


def read_tensors(ckpt: str | os.PathLike, names: Sequence[str], **hub) -> dict[str, Tensor]:
    """Those of the named tensors that a checkpoint holds, by their names in the file."""
    found = {}
    for path, keys in _weight_files(ckpt, hub).items():
        with open_weights(path) as file:
            found.update({name: file.get_tensor(name) for name in names if name in keys})
    return found


def _weight_files(ckpt: str | os.PathLike, hub: dict) -> dict[Path, list[str]]:
    """Weight files and the keys in each."""
    single = find_file(ckpt, SAFETENSORS, **hub)
    if single is not None:
        paths = [single]
    else:
        index = find_file(ckpt, INDEX, **hub)
        if index is None:
            raise _no_weights(ckpt, hub)
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map")
        shards = sorted(set(weight_map.values()))
        found = {name: find_file(ckpt, name, **hub) for name in shards}
        missing = [name for name, path in found.items() if path is None]
        if missing:
            raise FileNotFoundError(f"{INDEX} in {str(ckpt)!r} names shards that are not there: {', '.join(missing)}")
        paths = [path for path in found.values() if path is not None]
    files = {}
    for path in paths:
        with open_weights(path) as file:
            files[path] = list(file.keys())
    return files


def _no_weights(ckpt: str | os.PathLike, hub: dict) -> Exception:
    pickles = [name for name in PICKLES if find_file(ckpt, name, **hub) is not None]
    if pickles:
        return ValueError(
            f"{str(ckpt)!r} has pickle weights only ({', '.join(pickles)}), which can run code when opened and are not "
            "loaded. If you trust the file, convert it: safetensors.torch.save_file(torch.load('pytorch_model.bin', "
            "weights_only=True), 'model.safetensors')"
        )
    return FileNotFoundError(f"no {SAFETENSORS} and no {INDEX} in {str(ckpt)!r}")


def _fixed_resolution(ckpt: str | os.PathLike, config: Mapping, vision: Mapping, hub: dict) -> str:
    shapes = {}
    for path, keys in _weight_files(ckpt, hub).items():
        with open_weights(path) as file:
            for key in keys:
                if key.endswith((PATCH_EMBEDDING, "embeddings.position_embedding.weight")) and "text_model" not in key:
                    shapes[key.split(".")[-2]] = file.get_slice(key).get_shape()
    width, patch, channels = vision.get("hidden_size", 768), vision.get("patch_size", 16), vision.get("num_channels", 3)
    return (
        f"{str(ckpt)!r} has model_type {config.get('model_type')!r}: a fixed-resolution SigLIP checkpoint, with "
        f"patch_embedding {shapes.get('patch_embedding')} and position_embedding {shapes.get('position_embedding')}. "
        f"This model needs a NaFlex one, with patch_embedding [{width}, {patch * patch * channels}] and a square table "
        f"[256, {width}], such as google/siglip2-so400m-patch16-naflex"
    )


def check_state_dict(
    state: Mapping[str, Tensor], expected: Mapping[str, torch.Size], source: object, truncated: bool = False
) -> None:
    """Raises ValueError if tensors are missing or of another shape or kind than the model's.

    Warns of tensors the model has no use for, unless it is `truncated` on purpose.
    """
    missing = sorted(set(expected) - set(state))
    if missing:
        listed = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise ValueError(f"{source!r} lacks {len(missing)} of {len(expected)} tensors: {listed}")
    floating = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    for name in expected:
        if state[name].dtype not in floating:
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
