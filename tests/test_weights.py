"""Every checkpoint layout loads to the same parameters, or is refused with a reason; files go both ways."""

import pytest
import torch
from checkpoint_copies import bare, copy_with, read_json, same
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, Siglip2VisionConfig, Siglip2VisionModel

from siglip2_packed import NoPoolingHead, PackedPatches, Siglip2NaflexPacking, Siglip2PackedVisionModel
from siglip2_packed.weights import PATCH_EMBEDDING
from siglip2_packed.workloads import SHAPES

GRIDS = [(1, 5, 7), (1, 3, 4)]


def test_a_layer_without_a_number_is_not_taken_for_one(checkpoint, tmp_path, caplog):
    state = bare(checkpoint("tiny"))
    path = copy_with(checkpoint("tiny"), tmp_path / "x", state | {"encoder.layers.x.scale": torch.ones(1)})
    assert same(dict(Siglip2PackedVisionModel.from_pretrained(path).state_dict()), state)
    assert "1 tensors are not part of this model: encoder.layers.x.scale" in caplog.text


def test_all_layouts_give_the_same_parameters(checkpoint, tmp_path):
    folder = checkpoint("tiny")
    state, config = bare(folder), read_json(folder)
    expected = Siglip2PackedVisionModel.from_pretrained(folder).state_dict()
    assert same(state, expected)

    other = {"text_model.embeddings.token_embedding.weight": torch.ones(4, 4), "logit_scale": torch.ones(1)}
    language = {"model.language_model.layers.0.mlp.gate_proj.weight": torch.ones(2, 2), "lm_head.weight": torch.ones(2)}
    tower = {"model_type": "some_vlm", "vision_config": config}
    layouts = {
        "bare": (state, config, 1),
        "vision_model": ({f"vision_model.{k}": v for k, v in state.items()}, config, 1),
        "full": (
            {f"vision_model.{k}": v for k, v in state.items()} | other | {"logit_bias": torch.ones(1)},
            {"model_type": "siglip2", "vision_config": config},
            1,
        ),
        "tower": ({f"vision_tower.vision_model.{k}": v for k, v in state.items()}, tower, 1),
        "vlm": (
            {f"model.vision_tower.vision_tower.vision_model.{k}": v for k, v in state.items()} | language,
            tower,
            3,
        ),
    }
    for name, (keys, config_, shards) in layouts.items():
        path = copy_with(folder, tmp_path / name, keys, config_, shards)
        assert same(Siglip2PackedVisionModel.from_pretrained(path).state_dict(), expected), name


def test_the_full_model_gives_its_vision_tower(checkpoint):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny", full=True))
    reference = AutoModel.from_pretrained(checkpoint("tiny", full=True)).vision_model.state_dict()
    reference = {name.removeprefix("vision_model."): tensor for name, tensor in reference.items()}
    assert same(dict(model.state_dict()), reference)


def test_saved_files_load_in_transformers_with_nothing_missing(checkpoint, tmp_path):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))
    model.save_pretrained(tmp_path)
    reference, info = Siglip2VisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    reference = {name.removeprefix("vision_model."): tensor for name, tensor in reference.state_dict().items()}
    assert same(dict(model.state_dict()), reference)
    assert same(dict(Siglip2PackedVisionModel.from_pretrained(tmp_path).state_dict()), reference)
    assert all(name.startswith("vision_model.") for name in load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("head", [True, False])
def test_parameters_are_in_transformers_order(checkpoint, head):
    """By which an optimiser's saved state knows them: another order gives it another parameter's moments."""
    ours = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), vision_use_head=head)
    theirs = Siglip2VisionModel(Siglip2VisionConfig(**SHAPES["tiny"], vision_use_head=head))
    names = [name.removeprefix("vision_model.") for name, _ in theirs.named_parameters()]
    assert [name for name, _ in ours.named_parameters()] == names
    assert list(ours.state_dict()) == names
    assert len(names) == (64 if head else 53)


@pytest.mark.parametrize("missing", ["encoder.layers.1.mlp.fc2.bias", PATCH_EMBEDDING, "head.probe"])
def test_missing_tensors_are_an_error_that_lists_them(checkpoint, tmp_path, missing):
    state = bare(checkpoint("tiny"))
    del state[missing]
    path = copy_with(checkpoint("tiny"), tmp_path / "x", state)
    match = "holds 0 vision towers" if missing == PATCH_EMBEDDING else rf"lacks 1 of 64 tensors: {missing}"
    with pytest.raises(ValueError, match=match):
        Siglip2PackedVisionModel.from_pretrained(path)


def test_misshapen_tensors_are_an_error(checkpoint, tmp_path):
    state = bare(checkpoint("tiny"))
    state["post_layernorm.bias"] = torch.zeros(63)
    path = copy_with(checkpoint("tiny"), tmp_path / "x", state)
    with pytest.raises(ValueError, match=r"post_layernorm.bias is \[63\], expected \[64\]"):
        Siglip2PackedVisionModel.from_pretrained(path)


def test_a_headless_checkpoint_never_grows_a_random_head(checkpoint, tmp_path, patches):
    state = {name: tensor for name, tensor in bare(checkpoint("tiny")).items() if not name.startswith("head.")}
    path = copy_with(checkpoint("tiny"), tmp_path / "x", state)
    packed = PackedPatches(patches(GRIDS), GRIDS)
    full = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))(**packed)
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = Siglip2PackedVisionModel.from_pretrained(path)
        out = model(**packed)
        assert torch.equal(out.last_hidden_state, full.last_hidden_state)
        assert not any(name.startswith("head.") for name, _ in model.named_parameters())
        with pytest.raises(NoPoolingHead, match="checkpoint has no pooling head"):
            _ = out.pooler_output


def test_an_unknown_model_type_is_refused(checkpoint, tmp_path):
    path = copy_with(checkpoint("tiny"), tmp_path / "x", config={"model_type": "clip_vision_model"})
    with pytest.raises(ValueError, match="model_type 'clip_vision_model'; expected 'siglip2'"):
        Siglip2PackedVisionModel.from_pretrained(path)


def test_the_folders_name_decides_nothing(checkpoint, tmp_path, monkeypatch):
    expected = dict(Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny")).state_dict())
    copy_with(checkpoint("tiny"), tmp_path / "clip_vs_siglip2_naflex")
    (tmp_path / "link").symlink_to(tmp_path / "clip_vs_siglip2_naflex")
    monkeypatch.chdir(tmp_path)
    for path in ("clip_vs_siglip2_naflex", "./clip_vs_siglip2_naflex/", "link", tmp_path / "link"):
        assert same(dict(Siglip2PackedVisionModel.from_pretrained(path).state_dict()), expected)


def test_offline_and_absent_files_are_named(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Siglip2PackedVisionModel.from_pretrained(str(checkpoint("tiny")))
    with pytest.raises(FileNotFoundError, match=r"folder '/nowhere/tower' does not exist"):
        Siglip2PackedVisionModel.from_pretrained("/nowhere/tower")
    path = copy_with(checkpoint("tiny"), tmp_path / "x")
    (path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors.*x'"):
        Siglip2PackedVisionModel.from_pretrained(path)
    (path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config.json in .*x'"):
        Siglip2PackedVisionModel.from_pretrained(path)


def test_a_missing_shard_is_named(checkpoint, tmp_path):
    path = copy_with(checkpoint("tiny"), tmp_path / "x", bare(checkpoint("tiny")), shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="names shards that are not there: model-00002-of-00003.safetensors"):
        Siglip2PackedVisionModel.from_pretrained(path)


def test_pickle_weights_are_refused_with_the_conversion(checkpoint, tmp_path):
    path = copy_with(checkpoint("tiny"), tmp_path / "x")
    (path / "model.safetensors").unlink()
    torch.save(bare(checkpoint("tiny")), path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickle weights only \(pytorch_model.bin\).*save_file"):
        Siglip2PackedVisionModel.from_pretrained(path)
    with pytest.raises(ValueError, match="safetensors only"):
        Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), use_safetensors=False)


def test_dtype_follows_the_checkpoint_or_the_caller(checkpoint, tmp_path):
    Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny")).to(torch.bfloat16).save_pretrained(tmp_path)
    assert Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny")).dtype == torch.float32
    half = Siglip2PackedVisionModel.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert Siglip2PackedVisionModel.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_device_map_places_the_model(checkpoint, patches):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), device_map="cpu")
    assert model(patches(GRIDS), GRIDS).last_hidden_state.shape == (47, 64)


def test_a_saved_state_loads_into_a_model(checkpoint, tmp_path):
    """As a Trainer does when it resumes: `load_state_dict` of what `save_pretrained` wrote."""
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))
    changed = {name: tensor + 0.1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=changed)
    assert same(dict(Siglip2PackedVisionModel.from_pretrained(tmp_path).state_dict()), changed)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert same(dict(model.state_dict()), changed)
    parent = torch.nn.ModuleDict({"tower": Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))})
    parent.load_state_dict({f"tower.{name}": tensor for name, tensor in changed.items()})
    assert same(dict(parent["tower"].state_dict()), changed)


def test_name_and_configuration_are_those_asked_for(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint("tiny", full=True))
    before = config.to_dict()
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), config=config, num_hidden_layers=2)
    assert config.to_dict() == before
    assert len(model.encoder.layers) == 2
    assert model.name_or_path == model.config._name_or_path == str(checkpoint("tiny"))
    other = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), config=str(checkpoint("tiny")))
    assert same(dict(other.state_dict()), bare(checkpoint("tiny")))
    config.vision_config._attn_implementation = "eager"
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), config=config.vision_config)
    assert model.config._attn_implementation == "eager"
    units = (model.embeddings, model.encoder.layers[0], model.head)
    assert set(model._no_split_modules) == {type(unit).__name__ for unit in units}


def test_a_subfolder_is_where_the_files_are(checkpoint, tmp_path):
    copy_with(checkpoint("tiny"), tmp_path / "tower")
    model = Siglip2PackedVisionModel.from_pretrained(tmp_path, subfolder="tower")
    assert same(dict(model.state_dict()), bare(checkpoint("tiny")))


def test_layers_that_are_left_out_unasked_are_told(checkpoint, tmp_path, caplog):
    config = read_json(checkpoint("tiny")) | {"num_hidden_layers": 2}
    path = copy_with(checkpoint("tiny"), tmp_path / "x", config=config)
    Siglip2PackedVisionModel.from_pretrained(path)
    assert "16 tensors are not part of this model: encoder.layers.2" in caplog.text
    caplog.clear()
    Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), select_layer=-2, vision_use_head=False)
    assert "not part" not in caplog.text


def test_a_head_that_is_asked_for_has_to_be_there(checkpoint, tmp_path):
    state = {name: tensor for name, tensor in bare(checkpoint("tiny")).items() if not name.startswith("head.")}
    path = copy_with(checkpoint("tiny"), tmp_path / "x", state)
    with pytest.raises(NoPoolingHead, match="no pooling head"):
        Siglip2PackedVisionModel.from_pretrained(path, vision_use_head=True)


def test_two_towers_or_integer_weights_are_errors(checkpoint, tmp_path):
    state = bare(checkpoint("tiny"))
    two = {f"{tower}.{name}": tensor.clone() for tower in ("a", "b") for name, tensor in state.items()}
    with pytest.raises(ValueError, match="holds 2 vision towers"):
        Siglip2PackedVisionModel.from_pretrained(copy_with(checkpoint("tiny"), tmp_path / "two", two))
    state["post_layernorm.bias"] = torch.zeros(64, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"post_layernorm.bias is torch.int8; expected floating"):
        Siglip2PackedVisionModel.from_pretrained(copy_with(checkpoint("tiny"), tmp_path / "int8", state))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "config.json is not valid JSON"),
        ("config.json", "[]", "config.json holds list"),
        ("config.json", '{"model_type": "x", "vision_config": null}', "vision_config is None"),
        ("model.safetensors", "", "model.safetensors is not a complete safetensors file"),
    ],
)
def test_damaged_files_are_named(checkpoint, tmp_path, file, content, message):
    path = copy_with(checkpoint("tiny"), tmp_path / "x")
    (path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        Siglip2PackedVisionModel.from_pretrained(path)


def test_seed_class_holds_the_tower_under_a_known_prefix(checkpoint):
    model = Siglip2NaflexPacking.from_pretrained(checkpoint("tiny"))
    assert all(name.startswith("vision_model.") for name in model.state_dict())
    assert not any("head." in name for name in model.state_dict())
