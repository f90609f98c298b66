"""A checkpoint of another computation, or whose files contradict each other, is refused by name."""

import json

import pytest
import torch
from checkpoint_copies import bare, copy_with, read_json, same
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, Siglip2VisionConfig

from siglip2_packed import Siglip2PackedVisionModel, files
from siglip2_packed.llava import SigLip2NaflexVisionTower
from siglip2_packed.random_checkpoint import SHAPES

GRIDS = [(1, 13, 19), (1, 2, 3)]
load = Siglip2PackedVisionModel.from_pretrained


def with_fields(checkpoint, target, nested=False, **fields):
    config = read_json(checkpoint("tiny")) | fields
    if nested:
        config = {"model_type": "some_vlm", "vision_config": config}
    return copy_with(checkpoint("tiny"), target, config=config)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_rope": True},
        {"use_windows_attn": True, "window_size": 14},
        {"fullatt_block_indexes": [1]},
        {"fullatt_block_indexes": [], "window_size": 112},
        {"full_attention_indexes": [7, 14]},
        {"window_size": 112},
        {"hidden_stride": 2},
        {"temporal_patch_size": 2},
        {"spatial_merge_size": 2},
        {"preserve_original_pe": False},
        {"antialias": False},
        {"interpolate_mode": "bicubic"},
        {"use_post_layernorm": False},
        {"position_embedding_type": "rotary"},
        {"pruned_heads": {"0": [1]}},
        {"hidden_dropout": 0.1},
        {"qkv_bias": False},
        {"a_field_nobody_knows": 3},
        {"norm_name": "rms"},
        {"layer_norm_epsilon": 1e-5},
        {"pos_embed_version": "rope"},
        {"rope_versions": [2]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_field_of_another_computation_is_refused_by_name(checkpoint, tmp_path, fields):
    name = next(iter(fields))
    for nested in (False, True):
        path = with_fields(checkpoint, tmp_path / f"{nested}", nested, **fields)
        with pytest.raises(ValueError, match=rf"config.json: {name} is .*from_pretrained {name}=None"):
            load(path)
        with pytest.raises(ValueError, match=name):
            SigLip2NaflexVisionTower(str(path), delay_load=True)
    made = Siglip2VisionConfig(**SHAPES["tiny"], **fields)
    if name == "a_field_nobody_knows":  # made in code, a configuration may carry what it likes
        assert Siglip2PackedVisionModel(made)
    else:
        with pytest.raises(ValueError, match=name):
            Siglip2PackedVisionModel(made)
    with pytest.raises(ValueError, match=name):
        load(checkpoint("tiny"), config=Siglip2VisionConfig(**SHAPES["tiny"], **fields))


def test_fields_that_are_off_or_say_nothing_load(checkpoint, tmp_path, patches):
    expected = load(checkpoint("tiny"))(patches(GRIDS), GRIDS).last_hidden_state
    off = [
        {"use_rope": False, "rope_theta": 10000.0, "use_windows_attn": False, "window_size": 14}
        | {"full_attention_indexes": [7, 14, 21, 26]},  # as towers of robots have it
        {"hidden_stride": 1, "fullatt_block_indexes": None, "window_size": 112, "temporal_patch_size": 1}
        | {"preserve_original_pe": True, "use_rope": False},
        {
            "image_size": 512,
            "max_num_patches": 256,
            "initializer_range": 0.02,
            "projection_dim": 7,
            "norm_eps": 1e-6,
            "qkv_bias": True,
        },
        # transformers 4 wrote all of its general fields
        {
            "top_k": 50,
            "num_beams": 1,
            "torch_dtype": "float32",
            "pruned_heads": {},
            "_attn_implementation_autoset": True,
        }
        | {"max_length": 20, "temperature": 1.0, "tie_word_embeddings": True, "is_decoder": False, "use_cache": True},
        {"antialias": True, "interpolate_mode": "bilinear", "position_embedding_type": "absolute", "tubelet_size": 1}
        | {"gradient_checkpointing": True, "use_flash_attn": True, "num_image_tokens": 256, "freeze": True},
        {"license": "MIT", "dataset_name": "x", "note": "trained on y", "model_version": 2, "composition_note": "z"},
    ]
    for i, fields in enumerate(off):
        model = load(with_fields(checkpoint, tmp_path / str(i), **fields))
        assert torch.equal(model(patches(GRIDS), GRIDS).last_hidden_state, expected)
        model.save_pretrained(tmp_path / f"{i}.saved")
        load(tmp_path / f"{i}.saved")
    path = with_fields(checkpoint, tmp_path / "known", out_hidden_size=2048)
    assert same(dict(load(path, out_hidden_size=None).state_dict()), bare(path))


def test_a_default_of_the_installed_transformers_is_no_other_computation(checkpoint, tmp_path, monkeypatch):
    """A version to come may add general fields whose defaults are on."""
    to_dict = Siglip2VisionConfig.to_dict
    monkeypatch.setattr(Siglip2VisionConfig, "to_dict", lambda self: {"a_field_to_come": {"kind": 1}} | to_dict(self))
    for path in (checkpoint("tiny"), with_fields(checkpoint, tmp_path / "same", a_field_to_come={"kind": 1})):
        model = load(path)
        model.save_pretrained(tmp_path / "saved")
        assert same(dict(load(tmp_path / "saved").state_dict()), bare(checkpoint("tiny")))
        load(checkpoint("tiny"), config=model.config)
    with pytest.raises(ValueError, match=r"config.json: a_field_to_come is {'kind': 2}"):
        load(with_fields(checkpoint, tmp_path / "other", a_field_to_come={"kind": 2}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size must be one integer, got '64'"),
        ({"hidden_size": 64.0}, "hidden_size must be one integer, got 64.0"),
        ({"num_hidden_layers": None}, "num_hidden_layers must be one integer, got None"),
        ({"num_attention_heads": True}, "num_attention_heads must be one integer, got True"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"num_patches": -1}, "num_patches must be at least 1, got -1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, more than any tower has"),
        ({"hidden_size": 10**30}, "hidden_size is 1000000000000000000000000000000, more than"),
        ({"num_hidden_layers": 4000}, "num_hidden_layers is 4000, but the weights have 3 layers"),
        ({"hidden_size": 2**18}, "hidden_size is 262144, but the weights have 64"),
        ({"intermediate_size": 2**19}, "intermediate_size is 524288, but the weights have 128"),
        ({"num_patches": 2**22}, "num_patches is 4194304, but the weights have 16"),
        ({"patch_size": 16}, "patch_size² · num_channels is 768, but the weights have 48"),
        ({"patch_size": [4, 4]}, r"patch_size must be one integer \(square patches\), got \[4, 4\]"),
        ({"layer_norm_eps": "1e-6"}, "layer_norm_eps must be a number, 0 or more, got '1e-6'"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps must be a number, 0 or more, got nan"),
        ({"hidden_act": ["gelu"]}, r"hidden_act must be a name, got \['gelu'\]"),
        ({"hidden_act": "nope"}, "config.json: unknown hidden_act 'nope': choose one of "),
        ({"attention_dropout": "no"}, "attention_dropout 'no'"),
        ({"vision_use_head": "false"}, "vision_use_head must be true or false, got 'false'"),
        ({"output_hidden_states": 1}, "output_hidden_states must be true or false, got 1"),
        ({"return_dict": False}, "return_dict is false"),
        ({"dtype": "float99"}, "dtype must be a floating dtype, such as 'bfloat16', got 'float99'"),
        ({"dtype": "float8_e4m3fn"}, "dtype must be a floating dtype, such as 'bfloat16', got 'float8_e4m3fn'"),
        ({"dtype": "int8"}, "dtype must be a floating dtype, such as 'bfloat16', got 'int8'"),
        ({"select_layer": "last"}, "select_layer must be an integer, got 'last'"),
        ({"id2label": 5}, "config.json: "),
    ],
)
def test_wrong_values_are_refused_with_file_and_field(checkpoint, tmp_path, fields, message):
    path = with_fields(checkpoint, tmp_path / "x", **fields)
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert str(path / "config.json") in str(error.value)


def test_tuples_are_there_for_who_asks(checkpoint, tmp_path, patches):
    path = with_fields(checkpoint, tmp_path / "x", return_dict=False)
    assert isinstance(load(path, return_dict=False)(patches(GRIDS), GRIDS), tuple)
    assert load(path, return_dict=True)(patches(GRIDS), GRIDS).pooler_output.shape == (2, 64)


def test_another_models_configuration_is_refused(checkpoint):
    with pytest.raises(ValueError, match="config is a CLIPVisionConfig; expected a Siglip2VisionConfig"):
        load(checkpoint("tiny"), config=CLIPVisionConfig())
    with pytest.raises(ValueError, match="config is a CLIPVisionConfig without num_patches"):
        Siglip2PackedVisionModel(CLIPVisionConfig())
    with pytest.raises(TypeError, match="config is a dict; expected a Siglip2VisionConfig"):
        Siglip2PackedVisionModel(SHAPES["tiny"])


def test_a_key_twice_in_a_json_file_is_refused(checkpoint, tmp_path):
    path = copy_with(checkpoint("tiny"), tmp_path / "x")
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text.replace("{", '{"hidden_act": "relu",', 1))
    with pytest.raises(ValueError, match="config.json is not valid JSON: key 'hidden_act' is given twice"):
        load(path)


@pytest.mark.parametrize(
    "name",
    [
        "encoder.layers.1.self_attn.q_norm.weight",
        "encoder.layers.0.layer_scale1",
        "encoder.layers.0.self_attn.rotary_emb.inv_freq",
        "embeddings.cls_token",
        "head.projection.weight",
    ],
)
def test_a_tensor_of_another_computation_is_refused_by_name(checkpoint, tmp_path, name):
    path = copy_with(checkpoint("tiny"), tmp_path / "x", bare(checkpoint("tiny")) | {name: torch.ones(64)})
    with pytest.raises(ValueError, match=rf"1 tensors of another computation .*: {name}"):
        load(path)


def test_tensors_that_compute_nothing_here_load(checkpoint, tmp_path):
    state = bare(checkpoint("tiny"))
    more = {"embeddings.position_ids": torch.arange(16)[None], "encoder.layers.2.layer_scale": torch.ones(4)}
    path = copy_with(checkpoint("tiny"), tmp_path / "x", state | more)
    truncated = load(path, select_layer=-2)  # without that layer
    assert all(torch.equal(value, state[name]) for name, value in truncated.state_dict().items())
    more.popitem()
    assert same(dict(load(copy_with(checkpoint("tiny"), tmp_path / "y", state | more)).state_dict()), state)
    more["head.projection.weight"] = torch.ones(4)
    assert not hasattr(load(copy_with(checkpoint("tiny"), tmp_path / "z", state | more), vision_use_head=False), "head")


def sharded(checkpoint, target):
    path = copy_with(checkpoint("tiny"), target, bare(checkpoint("tiny")), shards=3)
    return path, json.loads((path / files.INDEX).read_text())["weight_map"]


def write_index(path, weight_map):
    (path / files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("name", ["../x.safetensors", "{tmp}/x.safetensors", "sub/x.safetensors", "..", "x.bin", "", 7])
def test_shards_are_plain_names_beside_the_index(checkpoint, tmp_path, name):
    path, weight_map = sharded(checkpoint, tmp_path / "ckpt")
    name = name.format(tmp=tmp_path) if isinstance(name, str) else name
    (path / "sub").mkdir()
    for place in (tmp_path, path / "sub"):
        save_file({"post_layernorm.bias": torch.ones(64)}, place / "x.safetensors")
    write_index(path, weight_map | {"post_layernorm.bias": name})
    with pytest.raises(ValueError, match=r"index.json: weight_map has 'post_layernorm.bias' in .*expected the name"):
        load(path)


def test_the_index_decides_where_a_tensor_is(checkpoint, tmp_path):
    path, weight_map = sharded(checkpoint, tmp_path / "ckpt")
    state, key = bare(checkpoint("tiny")), "post_layernorm.bias"
    here = weight_map[key]
    other = next(name for name in set(weight_map.values()) if name != here)

    write_index(path, weight_map | {key: other})
    with pytest.raises(ValueError, match=rf"has '{key}' in {other}, but it is in {here}"):
        load(path)
    write_index(path, weight_map | {"head.extra": other})
    with pytest.raises(ValueError, match=rf"has 'head.extra' in {other}, but it is in none"):
        load(path)
    write_index(path, {name: shard for name, shard in weight_map.items() if name != key})
    with pytest.raises(ValueError, match=rf"lacks 1 of 64 tensors: {key}"):
        load(path)

    write_index(path, weight_map)
    doubled = {name: state[name] for name, shard in weight_map.items() if shard == other} | {key: torch.ones(64)}
    save_file(doubled, path / other)
    with pytest.raises(ValueError, match=rf"'{key}' is in two shards, .*{min(here, other)} and .*{max(here, other)}"):
        load(path)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_an_index_without_a_map_is_named(checkpoint, tmp_path, weight_map):
    path, _ = sharded(checkpoint, tmp_path / "ckpt")
    write_index(path, weight_map)
    with pytest.raises(ValueError, match=r"index.json has no weight_map"):
        load(path)


def test_two_checkpoints_in_one_folder_are_told_apart_or_refused(checkpoint, tmp_path):
    state = bare(checkpoint("tiny"))
    path, _ = sharded(checkpoint, tmp_path / "ckpt")
    save_file({name: tensor + 1 for name, tensor in state.items()}, path / files.SAFETENSORS)
    with pytest.raises(ValueError, match=r"two checkpoints, model.safetensors and the shards of model.*index.json"):
        load(path)
    for shard in path.glob("model-*.safetensors"):  # as transformers leaves it: the index of shards that are gone
        shard.unlink()
    assert torch.equal(load(path).post_layernorm.bias.detach(), state["post_layernorm.bias"] + 1)


def test_saving_over_a_checkpoint_of_another_form_replaces_it(checkpoint, tmp_path):
    model = load(checkpoint("tiny"))
    model.save_pretrained(tmp_path)
    torch.nn.init.constant_(model.post_layernorm.bias, 7)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert not (tmp_path / files.SAFETENSORS).exists()
    assert load(tmp_path).post_layernorm.bias.unique().tolist() == [7]
    torch.nn.init.constant_(model.post_layernorm.bias, 8)
    model.save_pretrained(tmp_path)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert load(tmp_path).post_layernorm.bias.unique().tolist() == [8]
