"""timm's NaFlex checkpoints load as the towers they are: features are those of transformers on the same weights."""

import json

import pytest
import torch
from checkpoint_copies import bare, read_json, same
from safetensors.torch import save_file
from transformers import Siglip2VisionModel

from siglip2_packed import NoPoolingHead, PackedPatches, SigLip2NaflexVisionTower, Siglip2PackedVisionModel, pad

GRIDS = [(1, 13, 19), (1, 8, 32), (1, 2, 3)]
ARCHITECTURE = "naflexvit_base_patch16_siglip"
load = Siglip2PackedVisionModel.from_pretrained


def timm_state(state):
    """The names and shapes of timm's NaFlexVit, written down from its source, for a tower of transformers."""
    layers, side = 3, 4
    out = {
        "embeds.proj.weight": state["embeddings.patch_embedding.weight"],
        "embeds.proj.bias": state["embeddings.patch_embedding.bias"],
        "embeds.pos_embed": state["embeddings.position_embedding.weight"].reshape(1, side, side, 64),
        "norm.weight": state["post_layernorm.weight"],
        "norm.bias": state["post_layernorm.bias"],
        "attn_pool.latent": state["head.probe"],
    }
    for kind in ("weight", "bias"):
        for i in range(layers):
            theirs, ours = f"blocks.{i}", f"encoder.layers.{i}"
            attention = [state[f"{ours}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            out[f"{theirs}.attn.qkv.{kind}"] = torch.cat(attention)
            out[f"{theirs}.attn.proj.{kind}"] = state[f"{ours}.self_attn.out_proj.{kind}"]
            for n in "12":
                out[f"{theirs}.norm{n}.{kind}"] = state[f"{ours}.layer_norm{n}.{kind}"]
                out[f"{theirs}.mlp.fc{n}.{kind}"] = state[f"{ours}.mlp.fc{n}.{kind}"]
        joined = state[f"head.attention.in_proj_{kind}"]
        out[f"attn_pool.q.{kind}"], out[f"attn_pool.kv.{kind}"] = joined[:64], joined[64:]
        out[f"attn_pool.proj.{kind}"] = state[f"head.attention.out_proj.{kind}"]
        out[f"attn_pool.norm.{kind}"] = state[f"head.layernorm.{kind}"]
        for n in "12":
            out[f"attn_pool.mlp.fc{n}.{kind}"] = state[f"head.mlp.fc{n}.{kind}"]
    return {name: tensor.clone() for name, tensor in out.items()}


def write(folder, state, architecture=ARCHITECTURE, **model_args):
    """As timm's `save_for_hf` does."""
    folder.mkdir(exist_ok=True)
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": 64,
        "global_pool": "map",
        "pretrained_cfg": {"tag": "v2_webli", "mean": [0.5] * 3, "std": [0.5] * 3, "first_conv": "embeds.proj"},
        "model_args": {"embed_dim": 64, "depth": 3, "num_heads": 4, "patch_size": 4, **model_args},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    return folder


def test_its_features_are_those_of_transformers(checkpoint, patches, tmp_path):
    path = write(tmp_path / "timm", timm_state(bare(checkpoint("tiny"))))
    packed = PackedPatches(patches(GRIDS), GRIDS)
    with torch.no_grad():
        expected = Siglip2VisionModel.from_pretrained(checkpoint("tiny"))(**pad(packed))
        out = load(path)(**packed)
    torch.testing.assert_close(out.pooler_output, expected.pooler_output, atol=1e-4, rtol=0)
    rows = [expected.last_hidden_state[i, : h * w] for i, (_, h, w) in enumerate(GRIDS)]
    torch.testing.assert_close(out.last_hidden_state, torch.cat(rows), atol=1e-4, rtol=0)


def test_its_parameters_are_those_of_the_checkpoint(checkpoint, tmp_path):
    state = bare(checkpoint("tiny"))
    model = load(write(tmp_path / "timm", timm_state(state)))
    assert same(dict(model.state_dict()), state)
    model.save_pretrained(tmp_path / "saved")
    assert same(dict(load(tmp_path / "saved").state_dict()), state)
    config, theirs = model.config.to_dict(), read_json(checkpoint("tiny"))
    assert {name: config[name] for name in theirs.keys() & config.keys()}.items() >= {
        name: theirs[name] for name in ("hidden_act", "num_patches", "num_attention_heads", "patch_size")
    }.items()
    assert len(load(tmp_path / "timm", select_layer=-2).encoder.layers) == 2
    tower = SigLip2NaflexVisionTower(str(tmp_path / "timm"))
    assert tower(torch.randn(6, 48), grid_thw=[(1, 2, 3)]).shape == (6, 64)


def test_its_older_names_and_forms(checkpoint, tmp_path):
    """A convolution over pixels and a table in one row, as timm's other ViTs have them; a classifier behind."""
    state = bare(checkpoint("tiny"))
    timm = timm_state(state)
    timm["patch_embed.proj.weight"] = (
        timm.pop("embeds.proj.weight").reshape(64, 4, 4, 3).permute(0, 3, 1, 2).contiguous()
    )
    timm["patch_embed.proj.bias"] = timm.pop("embeds.proj.bias")
    timm["pos_embed"] = timm.pop("embeds.pos_embed").reshape(1, 16, 64)
    timm["head.weight"], timm["head.bias"] = torch.ones(10, 64), torch.ones(10)
    assert same(dict(load(write(tmp_path / "timm", timm)).state_dict()), state)


def test_without_its_pooling_head(checkpoint, tmp_path):
    timm = {name: x for name, x in timm_state(bare(checkpoint("tiny"))).items() if not name.startswith("attn_pool.")}
    path = write(tmp_path / "timm", timm, global_pool="")
    assert not hasattr(load(path), "head")
    with pytest.raises(NoPoolingHead):
        load(path, vision_use_head=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"architecture": "naflexvit_base_patch16_gap"},
            "config.json: timm's architecture 'naflexvit_base_patch16_gap'",
        ),
        ({"architecture": "vit_base_patch16_siglip_512.v2_webli"}, "timm's architecture 'vit_base_patch16_siglip_512'"),
        ({"rope_type": "axial"}, "model_args has rope_type='axial'"),
        ({"qk_norm": True}, "model_args has qk_norm=True"),
        ({"act_layer": "gelu"}, "model_args has act_layer='gelu'"),
        ({"pos_embed_interp_mode": "bicubic"}, "pos_embed_interp_mode='bicubic'"),
        ({"patchify_channels_last": False}, "patchify_channels_last=False"),
        ({"attn_pool_num_heads": 8}, "attn_pool_num_heads 8 are not num_heads 4"),
        ({"in_chans": 12}, "model_args has in_chans=12"),  # whose patches of 8x8 are as wide as 16x16 of RGB
        ({"num_heads": 7}, "hidden_size 64 is not a multiple of num_attention_heads 7"),
    ],
)
def test_other_towers_of_timm_are_refused(checkpoint, tmp_path, given, message):
    path = write(tmp_path / "timm", timm_state(bare(checkpoint("tiny"))), **given)
    with pytest.raises(ValueError, match=message):
        load(path)


@pytest.mark.parametrize(
    "name", ["embeds.reg_token", "blocks.1.ls1.gamma", "blocks.0.attn.q_norm.weight", "fc_norm.bias"]
)
def test_tensors_without_a_place_are_named(checkpoint, tmp_path, name):
    timm = timm_state(bare(checkpoint("tiny"))) | {name: torch.ones(64)}
    with pytest.raises(ValueError, match=rf"timm's {name} \[64\] has no place"):
        load(write(tmp_path / "timm", timm))


def test_a_tensor_under_two_names_is_refused(checkpoint, tmp_path):
    timm = timm_state(bare(checkpoint("tiny")))
    timm["patch_embed.proj.weight"] = timm["embeds.proj.weight"] + 1
    with pytest.raises(ValueError, match=r"patch_embed.proj.weight is there under another name, too"):
        load(write(tmp_path / "timm", timm))


@pytest.mark.parametrize("model_args", ["embed_dim=64", [1]])
def test_model_args_are_an_object(checkpoint, tmp_path, model_args):
    path = write(tmp_path / "timm", timm_state(bare(checkpoint("tiny"))))
    (path / "config.json").write_text(json.dumps(read_json(path) | {"model_args": model_args}))
    with pytest.raises(ValueError, match=r"config.json: model_args is .*expected an object"):
        load(path)


def test_a_block_without_a_number_is_named(checkpoint, tmp_path):
    timm = timm_state(bare(checkpoint("tiny"))) | {"blocks.x.norm1.bias": torch.ones(64)}
    with pytest.raises(ValueError, match=r"timm's blocks.x.norm1.bias \[64\] has no place"):
        load(write(tmp_path / "timm", timm))


def test_a_pooling_head_without_its_probe_is_damaged(checkpoint, tmp_path):
    state = timm_state(bare(checkpoint("tiny")))
    del state["attn_pool.latent"]
    with pytest.raises(ValueError, match=r"lacks 1 of 64 tensors: head.probe"):
        load(write(tmp_path / "x", state))


def test_missing_tensors_are_named_as_here(checkpoint, tmp_path):
    timm = timm_state(bare(checkpoint("tiny")))
    del timm["blocks.1.attn.qkv.bias"], timm["attn_pool.kv.weight"]
    with pytest.raises(ValueError, match=r"lacks 4 of 64 tensors: .*k_proj.bias.*head.attention.in_proj_weight"):
        load(write(tmp_path / "timm", timm))


def test_timm_itself_gives_the_same_features(patches, tmp_path):
    timm = pytest.importorskip("timm", exc_type=ImportError)
    from timm.models._hub import save_for_hf

    sizes = dict(embed_dim=64, depth=2, num_heads=4, patch_size=4, pos_embed_grid_size=(4, 4))
    theirs = timm.create_model(ARCHITECTURE, **sizes).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 and "pos" not in name else 0.5))
    save_for_hf(theirs, tmp_path, model_args=sizes, safe_serialization=True)
    model = load(tmp_path)
    for grid in GRIDS:
        (_, h, w), x = grid, patches([grid])
        y, x_ = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        with torch.no_grad():
            inputs = {"patches": x[None], "patch_coord": torch.stack([y, x_], -1).view(1, -1, 2)}
            inputs["patch_valid"] = torch.ones(1, h * w, dtype=torch.bool)
            tokens, pooled = theirs.forward_features(**inputs)["patches"], theirs(inputs)
            out = model(x, [grid])
        torch.testing.assert_close(out.last_hidden_state, tokens[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out.pooler_output, pooled, atol=1e-4, rtol=1e-4)
