"""SigLIP's fixed-size tower and those made of it: checkpoints load as they are, and give transformers' features."""

import json

import pytest
import torch
from checkpoint_copies import read_json, same
from relative_models import EXACT_BUCKETS, IMAGES, SIDE, TEXT, TOWERS, VLMS, made, pictures, run, tower, vlm

from siglip2_packed import NoPoolingHead, Siglip2PackedVisionModel, convert_to_packing_format
from siglip2_packed.measure import relative_error

BOUND = 1e-5
load = Siglip2PackedVisionModel.from_pretrained


def mode_of(name):
    return {"position_mode": "bicubic"} if name == "siglip" else {}


def packed(images):
    """One pack of pictures of any sizes."""
    parts = [convert_to_packing_format(image, 4) for image in images]
    patches, grids = (torch.cat(x) for x in zip(*parts))
    return {"pixel_values": patches, "grid_thw": grids}


def bare(model, values):
    return {name.removeprefix("vision_model."): value for name, value in values(model)}


def gradients(model, features):
    model.zero_grad()
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(3))
    (features * weights).sum().backward()
    return bare(model, lambda m: ((name, p.grad) for name, p in m.named_parameters() if p.grad is not None))


@pytest.mark.parametrize("shape", ["tiny", "tiny72"])
@pytest.mark.parametrize("name", TOWERS)
def test_features_and_gradients_are_transformers(tmp_path, name, shape):
    """Images of six sizes in one pack, each of them alone in transformers."""
    reference = tower(name, shape)
    reference.save_pretrained(tmp_path)
    model = load(tmp_path, **mode_of(name))
    sizes = [size for size in IMAGES if name == "siglip" or EXACT_BUCKETS or size != (SIDE, SIDE)]
    images = pictures(sizes)
    theirs = [run(reference, image) for image in images]
    ours = model(**packed(images))
    for found, expected in zip(ours.last_hidden_state.split([h * w for h, w in sizes]), theirs):
        assert relative_error(found, expected.last_hidden_state[0]) <= BOUND
    features = [ours.last_hidden_state], [x.last_hidden_state[0] for x in theirs]
    if name == "siglip":
        pooled = torch.cat([x.pooler_output for x in theirs])
        assert relative_error(ours.pooler_output, pooled) <= BOUND
        features = [*features[0], ours.pooler_output], [*features[1], pooled]
    else:
        with pytest.raises(NoPoolingHead):
            _ = ours.pooler_output
    found, expected = (gradients(m, torch.cat(x)) for m, x in zip((model, reference), features))
    assert found.keys() == expected.keys() and len(found) == len(list(model.parameters()))
    for key, gradient in expected.items():
        if "k_proj.bias" not in key and "in_proj_bias" not in key:  # of the keys' biases it is rounding alone
            assert relative_error(found[key], gradient) <= BOUND, key


@pytest.mark.parametrize("name", TOWERS)
def test_files_go_both_ways_as_they_are(tmp_path, name):
    """Names, shapes and model_type of the class that the checkpoint came from."""
    reference = tower(name)
    reference.save_pretrained(tmp_path / "theirs")
    load(tmp_path / "theirs", **mode_of(name)).save_pretrained(tmp_path / "ours")
    again, info = TOWERS[name][1].from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = reference.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.state_dict().items())
    assert again.config.model_type == reference.config.model_type
    model = load(tmp_path / "ours")
    assert model.embeddings.position_mode == ("bicubic" if name == "siglip" else "bucketed")
    model.load_state_dict(reference.state_dict())


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("name", VLMS)
def test_the_tower_inside_a_model_loads_from_its_folder(tmp_path, name, shards):
    model, inside = vlm(name)
    model.save_pretrained(tmp_path, **({"max_shard_size": "150KB"} if shards else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == shards
    ours = load(tmp_path)
    expected = inside.state_dict()
    assert same(ours.state_dict(), expected)
    if name == "lfm2_vl":
        return
    side = ours.config.image_size // 4
    images = pictures([(side, side)] * 3)
    if EXACT_BUCKETS or ours.embeddings.position_mode != "bucketed":
        theirs = torch.cat([run(inside, image, interpolate=False).last_hidden_state[0] for image in images])
        assert relative_error(ours(**packed(images)).last_hidden_state, theirs) <= BOUND


def test_cosmos3_edges_tower_loads_from_its_folder(tmp_path):
    """Rows are in raster order here, and come block by block there."""
    transformers = pytest.importorskip("transformers", minversion="5")
    if not hasattr(transformers, "Cosmos3EdgeForConditionalGeneration"):
        pytest.skip("this transformers has no Cosmos3 Edge")
    text = {key: x for key, x in TEXT.items() if key != "pad_token_id"}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    vision = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, patch_size=4, num_patches=16)
    config = transformers.Cosmos3EdgeConfig(text_config=text, vision_config=vision, projector_hidden_size=48)
    model = made(lambda: transformers.Cosmos3EdgeForConditionalGeneration(config))
    model.save_pretrained(tmp_path)
    written = read_json(tmp_path)
    assert written["vision_config"].pop("num_attention_heads") == 16  # its default, which a file need not have
    (tmp_path / "config.json").write_text(json.dumps(written))
    ours, inside = load(tmp_path), model.model.visual
    assert ours.config.num_attention_heads == 16 and not hasattr(ours, "head")
    assert same(ours.state_dict(), inside.state_dict())
    grids = torch.tensor([(1, 4, 6), (1, 8, 2), (1, 2, 10)])
    rows = torch.arange(len(grids) * 100)
    blocks, first = [], 0
    for _, h, w in grids.tolist():
        image = rows[first : first + h * w].view(h // 2, 2, w // 2, 2)
        blocks, first = [*blocks, image.transpose(1, 2).flatten()], first + h * w
    order = torch.cat(blocks)
    patches = torch.randn(len(order), 48, generator=torch.Generator().manual_seed(0))
    expected = inside(patches[order], grids).last_hidden_state
    assert relative_error(ours(patches, grids).last_hidden_state[order], expected) <= BOUND
