"""From config.json, whoever wrote it, to this model's configuration; what the model would not honour is refused.

Towers of other computations carry the same `model_type`: what tells them apart is a field that is on.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PretrainedConfig, Siglip2VisionConfig
from transformers.activations import ACT2FN

from siglip2_packed import timm_files
from siglip2_packed.files import find_file, read_json, read_shapes
from siglip2_packed.kinds import (
    COSMOS,
    COSMOS_DEFAULTS,
    KINDS,
    NAFLEX,
    POSITION_MODES,
    WITHIN,
    Kind,
    kind_of,
    num_patches,
    other,
)
from siglip2_packed.quantized import FLOATING

COUNTS = {  # and what no tower comes near
    "hidden_size": 2**20,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**16,
    "num_channels": 2**12,
    "patch_size": 2**12,
}
TABLE = {False: ("num_patches", 2**24), True: ("image_size", 2**16)}
"""The count that tells the size of the position table, by whether that is a fixed-size tower's."""
FLAGS = ("vision_use_head", "return_dict", "output_hidden_states", "output_attentions", "batch_invariant")
OWN = {*COUNTS, *FLAGS, *"hidden_act layer_norm_eps attention_dropout select_layer num_patches position_mode".split()}
DESCRIPTIVE = set(  # fields that say nothing of what a tower computes: transformers' general ones, and common others
    """
    add_cross_attention architectures auto_map bad_words_ids base_model_pp_plan base_model_tp_plan begin_suppress_tokens
    bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id distributed_config
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id experts_implementation
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id fusion_config id2label
    image_size initializer_factor initializer_range is_decoder is_encoder_decoder kernel_config label2id length_penalty
    max_length max_num_patches min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_scores pad_token_id prefix problem_type projection_dim projection_size
    quantization_config remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version transformers_weights typical_p use_bfloat16 use_cache
    attn_implementation freeze gradient_checkpointing num_image_tokens seed trust_remote_code use_flash_attn
    max_image_size projector_hidden_act size use_base_siglip vocab_size
    """.split()
)
PARTS = "act activation attention attn embed embedding ffn layer mlp norm pe pool pooling pos position rope".split()
NOTES = re.compile(
    rf"_.*|(?!(.*_)?({'|'.join(PARTS)})_)"  # the name or version of such a part says what it computes
    r"(.*_)?(name|version|path|url|note|comment|description|license|author|dataset)s?"
)
EPS = re.compile(r"eps(ilon)?$")
"""Of a norm by another name: right if it is what ours is."""
SAME: dict[str, tuple] = {  # values of others' fields that say what is computed here anyway
    "antialias": (True,),
    "attention_bias": (True,),
    "hidden_stride": (1,),
    "interpolate_antialias": (True,),
    "interpolation_antialias": (True,),
    "interpolate_mode": ("bilinear",),
    "interpolation_mode": ("bilinear",),
    "mlp_bias": (True,),
    "patch_bias": (True,),
    "pixel_shuffle_scale_factor": (1,),
    "pos_embed_antialias": (True,),
    "pos_embed_interp_mode": ("bilinear",),
    "position_embedding_type": ("absolute", "learned"),
    "preserve_original_pe": (True,),
    "qkv_bias": (True,),
    "spatial_merge_size": (1,),
    "temporal_patch_size": (1,),
    "tubelet_size": (1,),
    "use_bias": (True,),
    "use_post_layernorm": (True,),
}
IDLE = {  # fields that mean nothing where the first is there, and off
    "use_windows_attn": ("window_size", "fullatt_block_indexes", "full_attention_indexes"),
    "fullatt_block_indexes": ("window_size",),
    "use_rope": ("rope_theta", "rope_scaling", "rope_parameters"),
}


COMPUTES = re.compile(
    r"rope|rotary|pos_e|position|window|attn|attention|stride|merge|shuffle|deepstack|temporal|pool|conv|register|prune|"
    r"fullatt|antialias|interpol|norm|(cls|class)_?token|scale|gated|glu|bias|drop|sparse|preserve|eps(ilon)?$"
)
"""Words in names of what a tower computes. A configuration made in code may carry anything else, as transformers' own
tests do; a checkpoint's file is asked for all that is not known to be harmless."""


def read_config(
    ckpt: str | os.PathLike, changes: dict[str, Any] | None = None, **hub: Any
) -> tuple[Siglip2VisionConfig, str]:
    """The vision configuration of a checkpoint, its own or the `vision_config` inside, and the file it is from.

    Args:
        changes: values that replace the file's, and whatever else: what is a field is taken out.

    Raises:
        FileNotFoundError: no config.json.
        ValueError: another kind of model, or fields that this one would not honour.
    """
    fields, path = _read_fields(ckpt, hub)
    changes = {} if changes is None else changes
    if fields.get("return_dict") is False and "return_dict" not in changes:
        raise ValueError(
            f"{path}: return_dict is false: the model would give tuples to all that ask for last_hidden_state. Pass "
            "return_dict=True, or False if tuples are wanted"
        )
    return make_config(_change_fields(fields, changes), path), path


def adopt_config(config: PretrainedConfig, changes: dict[str, Any]) -> Siglip2VisionConfig:
    """One made elsewhere, or the `vision_config` inside, with `changes` as in `read_config`; left as it is itself."""
    given = getattr(config, "vision_config", config)
    fields = _fields_of_tower(given.to_dict(), given.model_type)
    if fields["model_type"] not in KINDS:
        raise ValueError(f"config is a {type(given).__name__}; expected a Siglip2VisionConfig")
    adopted = make_config(_change_fields(fields, changes), "config")
    adopted._attn_implementation = given._attn_implementation
    return adopted


def _change_fields(fields: Mapping[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The fields with `changes`, out of which they are taken; not those that transformers sees to itself."""
    names = {*kind_of(fields.get("model_type")).config().to_dict(), *OWN, *fields}
    names -= {"model_type", "dtype", "torch_dtype", "attn_implementation", "quantization_config"}
    return {**fields, **{name: changes.pop(name) for name in names & changes.keys()}}


def _read_fields(ckpt: str | os.PathLike, hub: dict) -> tuple[dict[str, Any], str]:
    """As they are in the file, and its path."""
    path = find_file(ckpt, "config.json", **hub)
    if path is None:
        raise FileNotFoundError(f"no config.json in {str(ckpt)!r}")
    config = read_json(path)
    if timm_files.is_timm(config):
        return timm_files.fields(config, read_shapes(ckpt, **hub), str(path)), str(path)
    vision: Any = config
    model_type: Any = config.get("model_type")
    while "vision_config" in vision:
        vision = vision["vision_config"]
        if not isinstance(vision, dict):
            raise ValueError(f"{path}: vision_config is {vision!r}, expected an object")
        model_type = vision.get("model_type", model_type)
        model_type = WITHIN.get(model_type, model_type)
    fields = _fields_of_tower(vision, model_type)
    if fields["model_type"] not in KINDS:
        what = other(model_type)
        raise ValueError(
            f"{path}: model_type {config.get('model_type')!r}"
            + (f" has a tower with {what}, which this model does not compute" if what else "")
            + f"; expected 'siglip2', or a model whose vision_config is one of {', '.join(KINDS)}"
        )
    if config.get("quantization_config"):  # of all that the checkpoint holds
        fields["quantization_config"] = config["quantization_config"]
    return fields, str(path)


def _fields_of_tower(fields: Mapping[str, Any], model_type: Any) -> dict[str, Any]:
    """The fields under the type of one of `KINDS`, if it is one; Cosmos3 Edge's are NaFlex's.

    What that one's merge size says is the order of the rows that the model around it wants, and how it joins them.
    """
    if model_type == COSMOS:
        fields = {name: value for name, value in fields.items() if name != "spatial_merge_size"}
        return {**COSMOS_DEFAULTS, **fields, "model_type": NAFLEX}
    return {**fields, "model_type": model_type}


def make_config(fields: Mapping[str, Any], source: str) -> Siglip2VisionConfig:
    """A configuration of these fields; ValueError, with their source, for what the model would not honour."""
    _check_fields(fields, source)
    _refuse_others(fields, source)
    kind = kind_of(fields.get("model_type"))
    counts = {name: operator.index(fields[name]) for name in fields.keys() & _counts(kind).keys()}
    if fields.get("select_layer") is not None:
        counts["select_layer"] = _as_integer(fields["select_layer"], source)
    try:
        config: Any = kind.config.from_dict({**fields, **counts})
    except Exception as error:  # of transformers' own validation, which has an exception for each version
        raise ValueError(f"{source}: {error}") from error
    check_config(config, source)
    return config


def check_config(config: Siglip2VisionConfig, source: str = "config") -> None:
    """ValueError for a configuration whose model would be another than this one, or none."""
    if not isinstance(config, PretrainedConfig):
        raise TypeError(f"{source} is a {type(config).__name__}; expected a Siglip2VisionConfig")
    fields = config.to_dict()
    if missing := sorted(_counts(kind_of(config.model_type)).keys() - fields.keys()):
        raise ValueError(
            f"{source} is a {type(config).__name__} without {', '.join(missing)}; expected Siglip2VisionConfig"
        )
    _check_fields(fields, source)
    _refuse_others(fields, source, COMPUTES)
    if fields["hidden_size"] % fields["num_attention_heads"]:
        raise ValueError(
            f"{source}: hidden_size {fields['hidden_size']} is not a multiple of num_attention_heads "
            f"{fields['num_attention_heads']}"
        )
    entries = num_patches(config)
    if math.isqrt(entries) ** 2 != entries:
        raise ValueError(f"{source}: num_patches {entries} is not a square number, as the position table has to be")
    if not entries:
        raise ValueError(f"{source}: image_size {fields['image_size']} is less than a patch of {fields['patch_size']}")
    layer_index(fields.get("select_layer"), fields["num_hidden_layers"], source)


def _counts(kind: Kind) -> dict[str, int]:
    """The fields that are numbers of something, and what no tower comes near."""
    name, most = TABLE[kind.convolution]
    return {**COUNTS, name: most}


def _check_fields(fields: Mapping[str, Any], source: str) -> None:
    """ValueError for fields of a wrong type or size."""
    most = _counts(kind_of(fields.get("model_type")))
    for name in fields.keys() & most.keys():
        value = fields[name]
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            square = {"patch_size": " (square patches)", "image_size": " (square images)"}.get(name, "")
            raise ValueError(f"{source}: {name} must be one integer{square}, got {value!r}")
        if value < 1:
            raise ValueError(f"{source}: {name} must be at least 1, got {value}")
        if value > most[name]:
            raise ValueError(f"{source}: {name} is {value}, more than any tower has ({most[name]})")
    mode = fields.get("position_mode")
    if mode is not None and mode not in POSITION_MODES:
        raise ValueError(f"{source}: position_mode must be one of {', '.join(POSITION_MODES)}, got {mode!r}")
    for name in fields.keys() & set(FLAGS):
        if fields[name] is not None and not isinstance(fields[name], bool):
            raise ValueError(f"{source}: {name} must be true or false, got {fields[name]!r}")
    eps = fields.get("layer_norm_eps", 1e-6)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise ValueError(f"{source}: layer_norm_eps must be a number, 0 or more, got {eps!r}")
    if not isinstance(fields.get("hidden_act", ""), str):
        raise ValueError(f"{source}: hidden_act must be a name, got {fields['hidden_act']!r}")
    if fields.get("hidden_act", "gelu") not in ACT2FN:
        known = ", ".join(sorted(ACT2FN))
        raise ValueError(f"{source}: unknown hidden_act {fields['hidden_act']!r}: choose one of {known}")
    if fields.get("attention_dropout") not in (None, 0):
        raise ValueError(f"{source}: attention_dropout {fields['attention_dropout']!r} is not supported, only 0.0")
    for name in fields.keys() & {"dtype", "torch_dtype"}:
        _check_dtype(name, fields[name], source)


def _refuse_others(fields: Mapping[str, Any], source: str, words: re.Pattern = re.compile("")) -> None:
    """ValueError for fields of other computations that are on; of those alone whose names hold one of the words."""
    changes = sorted(name for name in fields if words.search(name) and _changes(name, fields))
    # what is on in every tower of its kind of the transformers that is installed changes none
    defaults = kind_of(fields.get("model_type")).config().to_dict() if changes else {}
    for name in (x for x in changes if x not in defaults or fields[x] != defaults[x]):
        raise ValueError(
            f"{source}: {name} is {fields[name]!r}, which this model does not implement: its features would be others "
            f"than the checkpoint's. If it changes nothing in this tower, pass from_pretrained {name}=None"
        )


def _changes(name: str, fields: Mapping[str, Any]) -> bool:
    """Whether a field belongs to another computation, and is on."""
    value = fields[name]
    kind = kind_of(fields.get("model_type"))
    if name in ("num_patches", "num_positions") and kind.convolution:
        return value not in (None, num_patches(kind.config.from_dict(dict(fields))))
    if name in OWN or name in DESCRIPTIVE or NOTES.fullmatch(name) or value is None:
        return False
    if name in SAME:
        return value not in SAME[name]
    if EPS.search(name):
        return value != fields.get("layer_norm_eps", 1e-6)
    if any(name in idle and switch in fields and _off(switch, fields[switch]) for switch, idle in IDLE.items()):
        return False
    return not _off(name, value)


def _off(name: str, value: Any) -> bool:
    # an empty list of the layers with full attention is none of them
    return value is None if "indexes" in name else not value


def _check_dtype(name: str, value: Any, source: str) -> None:
    dtype = getattr(torch, value.removeprefix("torch."), value) if isinstance(value, str) else value
    if dtype is not None and dtype not in FLOATING:
        raise ValueError(f"{source}: {name} must be a floating dtype, such as 'bfloat16', got {value!r}")


def patch_dim(config) -> int:
    """P = patch_size² · channels."""
    return config.patch_size**2 * config.num_channels


def layer_index(select_layer: int | None, num_layers: int, source: str = "config") -> int:
    """How many layers run for `hidden_states[select_layer]` of L+1 entries; all of them for None.

    Raises:
        ValueError: out of range.
    """
    if select_layer is None:
        return num_layers
    select_layer = _as_integer(select_layer, source)
    if not -num_layers - 1 <= select_layer <= num_layers:
        raise ValueError(
            f"{source}: select_layer {select_layer} is out of range: {num_layers} layers give "
            f"hidden_states[0..{num_layers}]"
        )
    return select_layer % (num_layers + 1)


def _as_integer(select_layer: Any, source: str) -> int:
    if isinstance(select_layer, bool) or not hasattr(select_layer, "__index__"):
        raise ValueError(f"{source}: select_layer must be an integer, got {select_layer!r}")
    return operator.index(select_layer)
