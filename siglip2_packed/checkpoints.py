"""A checkpoint -> a model, and back: the files of transformers' models, in every layout that `weights` knows."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, Siglip2VisionConfig

from siglip2_packed import files, quantized, weights
from siglip2_packed.attention import requested_attention
from siglip2_packed.configuration import adopt_config, read_config
from siglip2_packed.kinds import kind_of, uses_head

if TYPE_CHECKING:
    from typing_extensions import Self

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")


class NoPoolingHead(ValueError, AttributeError):
    """Pooled features were asked of a model that has no pooling head.

    Examples:
        >>> import torch
        >>> from siglip2_packed import NoPoolingHead, Siglip2PackedVisionModel
        >>> ckpt = "google/siglip2-so400m-patch16-naflex"
        >>> model = Siglip2PackedVisionModel.from_pretrained(ckpt, vision_use_head=False)
        >>> try:
        ...     model(torch.zeros(6, 768), [[1, 2, 3]]).pooler_output
        ... except NoPoolingHead:
        ...     print("use last_hidden_state")
        use last_hidden_state
    """


class CheckpointedModel(PreTrainedModel):
    """How the vision model is loaded and saved."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *,
        config: Siglip2VisionConfig | str | os.PathLike | None = None,
        select_layer: int | None = None,
        cuda_graphs: bool | Sequence[int] = False,
        **kwargs: Any,
    ) -> Self:
        """Loads a checkpoint: a local folder, or a hub id, in any layout `weights.read_state_dict` knows.

        A checkpoint without `head.*` gives a model without a pooling head; every other tensor has to be there.

        Args:
            config: replaces the checkpoint's config.json; a configuration, or where to read one.
            select_layer: build and load the model up to this hidden state only, see the class.
            cuda_graphs: have packs run in CUDA graphs, forward and backward, where that is possible; True, or buckets'
                numbers of patches. See `graphs.CUDAGraphs`.
            **kwargs: `attn_implementation` (default `"auto"`), `vision_use_head=False` to leave the head out,
                `batch_invariant=True` for features that do not depend on the pack (see the class), other config fields,
                hub arguments, and those of transformers' `from_pretrained` (`dtype` (default: the checkpoint's),
                `device_map`, `quantization_config`, ...).

        Raises:
            FileNotFoundError: the folder, config.json or weights are missing.
            ValueError: another kind of model, or one with fields on that this one does not compute; pickle weights,
                missing or misshapen tensors, shards that contradict their index.
        """
        if pretrained_model_name_or_path is None:  # weights that the caller holds, as in transformers
            if select_layer is not None:
                raise ValueError("select_layer of weights that come as a state_dict: set config.select_layer")
            return cls._with_graphs(super().from_pretrained(None, config=config, **kwargs), cuda_graphs)
        ckpt = pretrained_model_name_or_path
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        if kwargs.pop("use_safetensors", True) is False:
            raise ValueError("weights are loaded from safetensors only")
        for name in {"state_dict", "variant", "from_tf", "from_flax", "gguf_file"} & kwargs.keys():
            raise ValueError(f"{name} is not supported: weights are read from the checkpoint's model.safetensors")
        kwargs.pop("trust_remote_code", None)
        head_wanted = kwargs.get("vision_use_head") is True
        if select_layer is not None:
            kwargs["select_layer"] = select_layer
        if isinstance(config, PretrainedConfig):
            config, source = adopt_config(config, kwargs), "config"
        else:
            config, source = read_config(ckpt if config is None else config, kwargs, **hub)
        kwargs.setdefault("attn_implementation", requested_attention(config))
        tower = weights.read_tower(ckpt, **hub)
        weights.check_sizes(tower.state, config, source)
        if not any(name.startswith("head.") for name in tower.state):
            if head_wanted:
                raise NoPoolingHead(f"vision_use_head=True, but checkpoint {str(ckpt)!r} has no pooling head")
            if uses_head(config):
                config.vision_use_head = False
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", "auto")
        with torch.device("meta"), not_partitioned():
            expected = {name: tensor.shape for name, tensor in cls(config).state_dict().items()}
        truncated = getattr(config, "select_layer", None) is not None
        if tower.quantized:
            loaded = cls._load_quantized(ckpt, tower, expected, config, hub, **kwargs)
        else:
            if hasattr(config, "quantization_config"):  # of the model around this tower, which was left as it was
                del config.quantization_config
            quantized.check_versions(kwargs.get("quantization_config"))
            weights.check_state_dict(tower.state, expected, str(ckpt), truncated)
            weights.check_parts(tower.state, expected, str(ckpt))
            state = {name: tower.state[name] for name in expected}
            loaded = super().from_pretrained(None, config=config, state_dict=state, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config._name_or_path = str(ckpt)
        return cls._with_graphs(loaded, cuda_graphs)

    @staticmethod
    def _with_graphs(loaded: Any, cuda_graphs: bool | Sequence[int]) -> Any:
        if cuda_graphs:
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model.cuda_graphs_enable(*[] if cuda_graphs is True else [cuda_graphs])
        return loaded

    @classmethod
    def _load_quantized(
        cls, ckpt: str | os.PathLike, tower: weights.Tower, expected: Mapping, config: Any, hub: dict, **kwargs: Any
    ) -> Any:
        """Weights that were saved quantised, which transformers reads into the modules of their quantiser."""
        given = getattr(config, "quantization_config", None)
        if not given:
            raise ValueError(
                f"{str(ckpt)!r} has quantised weights, and its config.json no quantization_config that says how"
            )
        quantized.check_versions(given)
        quantized.check_storage(given)
        source: dict[str, Any] = {"pretrained_model_name_or_path": ckpt, **hub}
        if quantized.method(given) == "bitsandbytes":
            config.quantization_config = quantized.with_skipped(given, tower.plain_linears)
            dtype = kwargs["dtype"] if kwargs.get("dtype") not in (None, "auto") else config.dtype
            state = quantized.in_dtype(quantized.parts_of(tower.state, expected), expected, dtype)
            source = {"pretrained_model_name_or_path": None, "state_dict": state}
        elif tower.prefix:
            raise ValueError(
                f"{str(ckpt)!r}: what {quantized.method(given)} quantised inside another model ({tower.prefix}...) "
                "cannot be read without that model: load the whole, or quantise the tower's own checkpoint"
            )
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(config=config, output_loading_info=True, **source, **kwargs)
        info = loaded[1]
        wrong = sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]}))
        if wrong:
            raise ValueError(f"{str(ckpt)!r} lacks {len(wrong)} quantised tensors: {', '.join(wrong[:8])}")
        return loaded if wants_info else loaded[0]

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        **kwargs: Any,
    ):
        """Writes config.json and safetensors that transformers' class of the same tower loads, in 4.57 and in 5.x:
        `Siglip2VisionModel`, or that which a relative came from, whose names, shapes and model_type are as they were.

        SigLIP's keys get the `vision_model.` prefix, the one form that both generations read.
        """
        if getattr(self, "_hf_peft_config_loaded", False):  # transformers writes the adapter alone, under its own keys
            return super().save_pretrained(save_directory, is_main_process, state_dict=state_dict, **kwargs)
        state = self.state_dict() if state_dict is None else state_dict
        prefix = kind_of(self.config.model_type).prefix
        prefixed = {prefix + name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
        replacing = files.replacing_weights(save_directory) if is_main_process else contextlib.nullcontext()
        with replacing, quantized.saved_as(self, prefixed):
            super().save_pretrained(save_directory, is_main_process, state_dict=prefixed, **kwargs)
        if is_main_process and getattr(self, "hf_quantizer", None) is not None:
            quantized.write_dtype(save_directory, self.dtype)
        files.share(save_directory)


@contextlib.contextmanager
def not_partitioned() -> Iterator[None]:
    """Suspends DeepSpeed's zero.Init, where it is on."""
    zero = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if zero is None:
        yield
        return
    zero.shutdown_init_context()
    try:
        yield
    finally:
        zero.restore_init_context()


def strip_prefix(module: nn.Module, state: dict, prefix: str, *_: Any) -> None:
    """Lets `load_state_dict` read what `save_pretrained` wrote (as a Trainer does when it resumes)."""
    written = f"{prefix}vision_model."
    for name in [name for name in state if name.startswith(written)]:
        state[prefix + name.removeprefix(written)] = state.pop(name)
