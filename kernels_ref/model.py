"""The seed's standard model, `[N, C, H, W]` images in, `[N, patches, D]` out, and the loading of its checkpoint."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .encoder import padded_encoder, setting
from .patches import patchify

PATCH_KEY = "embeddings.patch_embedding.weight"
LAYER_MODULES = ["layer_norm1", *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")), "layer_norm2"]
MLP_MODULES = ["mlp.fc1", "mlp.fc2"]


def expected_keys(config: Any, head: bool) -> list[str]:
    modules = ["embeddings.patch_embedding", "post_layernorm"]
    for index in range(setting(config, "num_hidden_layers")):
        modules += [f"encoder.layers.{index}.{module}" for module in LAYER_MODULES + MLP_MODULES]
    keys = ["embeddings.position_embedding.weight"]
    if head:
        modules += [f"head.{module}" for module in ["attention.out_proj", "layernorm", *MLP_MODULES]]
        keys += ["head.probe", "head.attention.in_proj_weight", "head.attention.in_proj_bias"]
    return keys + [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]


def load_checkpoint(folder: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A folder with config.json and safetensors -> (vision config, flat state).

    The vision tower may carry any prefix (`vision_model.` or that of a VLM) or none; every other tensor of the
    files is left out. A checkpoint without `head.*` is complete without it. ValueError names what is missing.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ValueError(f"no config.json in {path}")
    whole = json.loads((path / "config.json").read_text())
    config = whole.get("vision_config", whole)
    model_type = config.get("model_type", whole.get("model_type"))
    if model_type not in ("siglip2_vision_model", "siglip2"):
        raise ValueError(f"{path} holds a {model_type!r}, expected 'siglip2' or 'siglip2_vision_model' (NaFlex)")

    index = path / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    tensors: dict[str, Tensor] = {}
    for name in sorted(names):
        if not (path / name).is_file():
            raise ValueError(f"no {name} in {path}")
        tensors |= load_file(path / name)

    prefixes = [key.removesuffix(PATCH_KEY) for key in tensors if key.endswith(PATCH_KEY)]
    if len(prefixes) != 1:
        raise ValueError(f"{path} must hold one {PATCH_KEY}, under whatever prefix; it has {len(prefixes)}")
    state = {key.removeprefix(prefixes[0]): tensor for key, tensor in tensors.items() if key.startswith(prefixes[0])}
    if state[PATCH_KEY].ndim != 2:
        raise ValueError(
            f"{PATCH_KEY} has shape {list(state[PATCH_KEY].shape)}: a fixed-resolution SigLIP convolution, "
            "where NaFlex has a linear layer [D, P]"
        )
    head = setting(config, "vision_use_head") and any(key.startswith("head.") for key in state)
    keys = expected_keys(config, head)
    missing = [key for key in keys if key not in state]
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} of {len(keys)} tensors: {', '.join(missing)}")
    return config, {key: state[key] for key in keys}


class Siglip2Naflex(nn.Module):
    """Images `[N, C, H, W]`, normalised, sides divisible by the patch size -> last_hidden_state `[N, patches, D]`.

    `ckpt` is a local folder (see `load_checkpoint`) or, where no such folder exists, a hub id. The device defaults
    to CUDA where there is one. Parameters have Hugging Face's names; `state` and `config` feed the other functions.
    """

    def __init__(
        self,
        ckpt: str | os.PathLike,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if not Path(ckpt).is_dir():
            from huggingface_hub import snapshot_download

            ckpt = snapshot_download(str(ckpt), allow_patterns=["*.json", "*.safetensors"])
        self.config, state = load_checkpoint(ckpt)
        for key, tensor in state.items():
            *path, name = key.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(name, nn.Parameter(tensor.to(dtype)))
        self.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @classmethod
    def from_pretrained(cls, ckpt: str | os.PathLike, **kwargs: Any) -> "Siglip2Naflex":
        return cls(ckpt, **kwargs)

    @property
    def state(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())

    def forward(self, images: Tensor) -> Tensor:
        patch_size = setting(self.config, "patch_size")
        pixel_values = patchify(images, patch_size)
        N, patches, _ = pixel_values.shape
        mask = torch.ones(N, patches, dtype=torch.long, device=images.device)
        shape = [images.shape[2] // patch_size, images.shape[3] // patch_size]
        spatial_shapes = torch.tensor([shape] * N, device=images.device).reshape(N, 2)
        return padded_encoder(self.state, self.config, pixel_values, mask, spatial_shapes).last_hidden_state
