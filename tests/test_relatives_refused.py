"""Towers that only look like relatives, and images that a relative has no positions for, are refused by name."""

import json
from types import SimpleNamespace

import pytest
import torch
from checkpoint_copies import copy_with, read_json
from relative_models import EXACT_BUCKETS, SIDE, TOWERS, pictures, run, tower
from safetensors.torch import load_file
from test_relatives import load, mode_of, packed
from transformers import SiglipVisionConfig

from siglip2_packed import NoPoolingHead, SigLip2NaflexVisionTower, Siglip2PackedVisionModel, bench
from siglip2_packed.measure import relative_error


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder("siglip")` -> a checkpoint of that tower."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            tower(name).save_pretrained(made[name])
        return made[name]

    return make


@pytest.mark.parametrize("size", [(13, 19), (8, 32), (1, SIDE * SIDE), (SIDE, SIDE + 1)])
def test_a_fixed_size_tower_takes_its_own_size_alone(folder, size):
    """Also where the number of patches is right: transformers would add the table in raster order, in silence."""
    model = load(folder("siglip"))
    both = packed([*pictures([(SIDE, SIDE)]), *pictures([size])])
    h, w = size
    with pytest.raises(ValueError, match=rf"grid_thw\[1\] has {h}x{w} patches, the position table 7x7.*'bicubic'"):
        model(**both)


def test_at_its_own_size_every_mode_is_the_same(folder):
    reference, images = tower("siglip"), pictures([(SIDE, SIDE)] * 3)
    theirs = torch.cat([run(reference, image, interpolate=False).last_hidden_state[0] for image in images])
    outs = [
        load(folder("siglip"), position_mode=mode)(**packed(images)).last_hidden_state
        for mode in (None, "bilinear_antialias", "bicubic", "bucketed")
    ]
    assert relative_error(outs[0], theirs) <= 1e-5
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.skipif(not EXACT_BUCKETS, reason="transformers 4 takes the bucket below at each bound")
@pytest.mark.parametrize("size", [(SIDE, SIDE), (2 * SIDE, 3 * SIDE), (14, 5), (21, 1)])
def test_buckets_whose_bounds_are_met_are_transformers(folder, size):
    (image,) = pictures([size])
    expected = run(tower("idefics3"), image).last_hidden_state[0]
    assert relative_error(load(folder("idefics3"))(**packed([image])).last_hidden_state, expected) <= 1e-5


@pytest.mark.parametrize("name", ["siglip", "idefics3"])
def test_packs_that_no_graph_can_have_say_so(folder, name, said):
    model, expected = (load(folder(name), cuda_graphs=graphs, **mode_of(name)) for graphs in (True, False))
    batch = packed(pictures([(13, 19), (SIDE, SIDE)]))
    assert torch.equal(model(**batch).last_hidden_state, expected(**batch).last_hidden_state)
    mode = model.embeddings.position_mode
    assert said() == [f"{mode} positions have no kernel, other than at the table's own size"]


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("siglip", {"position_mode": "nearest"}, "position_mode must be one of bilinear_antialias, bicubic, bucketed"),
        ("siglip", {"image_size": [28, 56]}, r"image_size must be one integer \(square images\), got \[28, 56\]"),
        ("siglip", {"image_size": 3}, "image_size 3 is less than a patch of 4"),
        ("siglip", {"image_size": 32}, "num_patches is 64, but the weights have 49"),
        ("siglip", {"num_positions": 48}, "num_positions is 48"),
        ("siglip", {"patch_size": 14}, "num_patches is 4, but the weights have 49"),
        ("siglip", {"num_channels": 4}, "patch_size² · num_channels is 64, but the weights have 48"),
        ("idefics3", {"use_rope": True}, "use_rope is True, which this model does not implement"),
        ("smolvlm", {"window_size": 7}, "window_size is 7, which this model does not implement"),
        ("siglip", {"attention_dropout": 0.1}, "attention_dropout 0.1 is not supported"),
    ],
)
def test_fields_are_refused_by_name(folder, tmp_path, name, fields, message):
    path = copy_with(folder(name), tmp_path / "x", config=read_json(folder(name)) | fields)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_fields_of_real_checkpoints_say_nothing_of_the_tower(folder, tmp_path):
    more = {
        "siglip": {"projector_hidden_act": "gelu_fast", "num_image_tokens": 256, "projection_dim": 2048}
        | {"num_positions": SIDE**2, "vocab_size": 257152},
        "idefics3": {"max_image_size": {"longest_edge": 28}, "size": {"longest_edge": 2048}, "use_base_siglip": False},
    }
    for name, fields in more.items():
        inner = read_json(folder(name)) | fields
        if name == "idefics3":
            inner["model_type"] = "idefics3"  # as early files have it
        outer = {"model_type": name, "vision_config": inner}
        model = load(copy_with(folder(name), tmp_path / name, config=outer))
        assert model.config.model_type == {"siglip": "siglip_vision_model", "idefics3": "idefics3_vision"}[name]


@pytest.mark.parametrize(
    ("model_type", "what"),
    [
        ("qwen2_vl", "rotary positions"),
        ("qwen2_5_vl", "window attention and rotary positions"),
        ("qwen3_vl", "rotary positions"),
        ("moonvit", "rotary positions"),
        ("kimi_vl", "rotary positions"),
        ("minicpmv4_6_vision", "window attention"),
        ("paddleocr_vl", "rotary positions"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_towers_of_another_computation_are_refused_by_what_they_do(folder, tmp_path, model_type, what, nested):
    inner = read_json(folder("siglip")) | {"model_type": model_type}
    config = {"model_type": "some_vlm", "vision_config": inner} if nested else inner
    with pytest.raises(ValueError, match=rf"has a tower with {what}, which this model does not compute; expected 'si"):
        load(copy_with(folder("siglip"), tmp_path / "x", config=config))


@pytest.mark.parametrize("delay_load", [False, True])
def test_what_resizes_images_as_naflex_does_takes_none_of_these(folder, delay_load):
    for name, mode in (("siglip", "native"), ("smolvlm", "bucketed")):
        with pytest.raises(ValueError, match=f"config.json: position_mode is {mode}, this tower is NaFlex's"):
            SigLip2NaflexVisionTower(str(folder(name)), SimpleNamespace(), delay_load=delay_load)
        with pytest.raises(ValueError, match="is no NaFlex tower, which is what bench has other encoders of"):
            bench.weights(str(folder(name)), "tiny", "cpu")


def test_two_towers_are_listed(folder, tmp_path):
    state = load_file(folder("siglip") / "model.safetensors")
    two = {f"model.{tower}.{key}": x.clone() for tower in ("vision_tower", "detail_tower") for key, x in state.items()}
    config = {"model_type": "some_vlm", "vision_config": read_json(folder("siglip"))}
    with pytest.raises(
        ValueError, match=r"holds 2 vision towers .*model\.(vision|detail)_tower.*model\.(vision|detail)"
    ):
        load(copy_with(folder("siglip"), tmp_path / "x", two, config))


def test_a_projection_of_the_other_form_is_refused(folder, checkpoint, tmp_path):
    """What is no convolution in a fixed-size tower's file, and what is one in NaFlex's."""
    state = {key.split("vision_model.")[-1]: x for key, x in load_file(folder("siglip") / "model.safetensors").items()}
    name = "embeddings.patch_embedding.weight"
    flat = state | {name: state[name].permute(0, 2, 3, 1).flatten(1).contiguous()}
    with pytest.raises(ValueError, match=rf"{name} is \[64, 48\], expected \[64, 3, 4, 4\]"):
        load(copy_with(folder("siglip"), tmp_path / "x", flat))
    convolution = load(checkpoint("tiny")).state_dict() | {name: state[name]}
    with pytest.raises(ValueError, match=rf"{name} is \[64, 3, 4, 4\], expected \[64, 48\]"):
        load(copy_with(checkpoint("tiny"), tmp_path / "y", convolution))


def test_heads_that_are_not_there_are_never_made_up(folder, tmp_path):
    with pytest.raises(NoPoolingHead, match="no pooling head"):
        load(folder("idefics3"), vision_use_head=True)
    state = load_file(folder("siglip") / "model.safetensors")
    headless = {key: x for key, x in state.items() if "head." not in key}
    assert not hasattr(load(copy_with(folder("siglip"), tmp_path / "x", headless)), "head")
    for name, (config, _) in TOWERS.items():
        given = config(**{key: x for key, x in read_json(folder(name)).items() if key != "model_type"})
        made = Siglip2PackedVisionModel(given)
        assert hasattr(made, "head") == (name == "siglip")
        assert made.config.to_dict()["model_type"] == given.model_type


def test_a_configuration_made_in_code_is_taken(folder):
    given = SiglipVisionConfig(**{k: x for k, x in read_json(folder("siglip")).items() if k != "model_type"})
    model = load(folder("siglip"), config=given, select_layer=-2)
    assert type(model.config) is SiglipVisionConfig and len(model.encoder.layers) == 2
    assert "position_mode" not in json.loads(given.to_json_string())
    (image,) = pictures([(SIDE, SIDE)])
    expected = tower("siglip")(image, output_hidden_states=True).hidden_states[-2][0]
    assert relative_error(model(**packed([image])).last_hidden_state, expected) <= 1e-5
