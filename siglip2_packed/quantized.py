"""Towers whose linear layers somebody has quantised: this package knows the modules by what they are called only."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What weights are computed in; all other dtypes are those of quantised ones."""


@torch.compiler.disable
def keep_layout(model: nn.Module) -> None:
    """Before a forward on the CPU: bitsandbytes' 4-bit layers leave their weights as they lie.

    Where a CPU multiplies bfloat16, their first inference turns weights into another layout, for good: it takes widths
    that are multiples of 64 only (so400m's 4,304 is none), gives no gradients ever after, and loses the order of its
    scales when it is saved. See findings/bitsandbytes_4bit_on_cpu.
    """
    if "bitsandbytes" not in sys.modules:
        return
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def method(quantization_config: Any) -> str:
    """`"bitsandbytes"`, `"torchao"`, ..."""
    name = _fields(quantization_config).get("quant_method")
    return str(getattr(name, "value", name))


def check_versions(quantization_config: Any) -> None:
    """ValueError for what the transformers here does not read."""
    if quantization_config is None or method(quantization_config) != "torchao":
        return
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ValueError(
            f"torchao wants transformers 5, this is {transformers.__version__}: load the model as it is, then call "
            "torchao.quantization.quantize_(model, ...)"
        )


def check_storage(quantization_config: Any) -> None:
    """ValueError for saved 4-bit weights that the transformers here would cast as if they were numbers."""
    storage = str(_fields(quantization_config).get("bnb_4bit_quant_storage", "uint8")).removeprefix("torch.")
    if storage != "uint8" and int(transformers.__version__.split(".")[0]) < 5:
        raise ValueError(
            f"bnb_4bit_quant_storage {storage}: transformers {transformers.__version__} does not read such weights: "
            "take transformers 5, or quantise the checkpoint they were made of"
        )


def with_skipped(quantization_config: Any, modules: Sequence[str]) -> dict:
    """bitsandbytes' configuration with just these modules left as they are, whatever part of the model is read.

    What it leaves by default depends on which module is the model's last.
    """
    return {**_fields(quantization_config), "llm_int8_skip_modules": list(modules)}


def parts_of(state: Mapping[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """Those tensors that belong to modules of a model with the `expected` ones: its weights, and scales beside them."""
    modules = {name.rpartition(".")[0] for name in expected}

    def module(name: str) -> str:
        return name.partition(".weight.")[0] if ".weight." in name else name.rpartition(".")[0]

    return {name: tensor for name, tensor in state.items() if module(name) in modules}


def in_dtype(state: Mapping[str, Tensor], expected: Mapping, dtype: torch.dtype | str | None) -> dict[str, Tensor]:
    """The state with what is not quantised in `dtype`: transformers casts biases, and leaves weights as they were."""
    dtype = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype

    def whole(name: str, tensor: Tensor) -> bool:
        return dtype is not None and tensor.dtype in FLOATING and tensor.shape == expected.get(name)

    return {name: tensor.to(dtype) if whole(name, tensor) else tensor for name, tensor in state.items()}


def _fields(quantization_config: Any) -> dict:
    return quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()


@contextlib.contextmanager
def saved_as(model: Any, state: dict[str, Tensor]) -> Iterator[None]:
    """Within, transformers saves this state for a quantised model too, instead of one that it takes itself.

    Raises:
        ValueError: a state of other things than tensors, as that of `quantize_dynamic`'s modules.
    """
    packed = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if packed is not None:
        raise ValueError(
            f"{packed} is no tensor, which is all that files hold: modules of quantize_dynamic cannot be saved. Save "
            "the model before it is quantised, and quantise what is loaded"
        )
    quantizer = getattr(model, "hf_quantizer", None)
    taken = getattr(quantizer, "get_state_dict_and_metadata", None)
    if quantizer is None or taken is None:
        yield
        return

    def given(*args: Any, **kwargs: Any) -> tuple[Any, dict]:
        own, metadata = taken(*args, **kwargs)
        return (state if own is None else own), metadata  # torchao takes its weights apart itself

    conversions = vars(model).get("_weight_conversions")  # of reading it, which transformers 5 cannot turn round
    quantizer.get_state_dict_and_metadata = given
    if conversions is not None:
        model._weight_conversions = []
    try:
        yield
    finally:
        del quantizer.get_state_dict_and_metadata
        if conversions is not None:
            model._weight_conversions = conversions


def write_dtype(folder: str | os.PathLike, dtype: torch.dtype) -> None:
    """Into the config.json that was saved: transformers 4 takes the first floating weight's, which may hold 4 bits."""
    path = Path(folder) / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    name, value = "torch_dtype" if "torch_dtype" in fields else "dtype", str(dtype).removeprefix("torch.")
    if fields.get(name) != value:
        path.write_text(json.dumps({**fields, name: value}, indent=2) + "\n", encoding="utf-8")
