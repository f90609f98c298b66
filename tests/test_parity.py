"""The packed model against transformers' padded one, its packed sibling, and kernels_ref: features and gradients."""

import pytest
import torch
import transformers
from conftest import AWKWARD_GRIDS, SIDE_OF_ONE
from transformers import Siglip2VisionModel

import kernels_ref
from siglip2_packed import PackedPatches, Siglip2PackedVisionModel, pad

# 4.57 resizes positions with F.interpolate, whose CPU kernel is wrong at output width 1
EXACT_POSITIONS = int(transformers.__version__.split(".")[0]) >= 5
GRIDS = AWKWARD_GRIDS + (SIDE_OF_ONE if EXACT_POSITIONS else [])


def run_transformers(model, packed, **kwargs):
    """Padded run -> packed rows of last_hidden_state and of every hidden state, and pooled vectors."""
    batch = pad(packed)
    out = model(**batch, output_hidden_states=True)
    real = batch["pixel_attention_mask"].bool()
    return out.last_hidden_state[real], [state[real] for state in out.hidden_states], out.pooler_output


def worst(a, b):
    return (a - b).abs().max().item()


def check_features(folder, grids, patch_dim, bound=1e-4):
    generator = torch.Generator().manual_seed(1)
    packed = PackedPatches(torch.randn(sum(h * w for _, h, w in grids), patch_dim, generator=generator), grids)
    model = Siglip2PackedVisionModel.from_pretrained(folder)
    reference = Siglip2VisionModel.from_pretrained(folder)
    with torch.no_grad():
        ours = model(**packed, output_hidden_states=True)
        tokens, states, pooled = run_transformers(reference, packed)
        rows = [h * w for _, h, w in grids]
        alone = [
            run_transformers(reference, PackedPatches(x, [grid]))
            for x, grid in zip(packed["pixel_values"].split(rows), grids)
        ]
    alone_tokens, alone_pooled = (torch.cat([x[i] for x in alone]) for i in (0, 2))
    assert 0.3 < tokens.std() < 3
    for x, padded, single in (
        (ours.last_hidden_state, tokens, alone_tokens),
        (ours.pooler_output, pooled, alone_pooled),
    ):
        assert x.shape == padded.shape
        # the padded model does not agree with itself any better
        assert worst(x, padded) <= min(bound, 2 * max(worst(padded, single), 2e-6))
    assert len(ours.hidden_states) == len(states)
    for mine, theirs in zip(ours.hidden_states, states):
        assert worst(mine, theirs) <= 2e-6 * max(1, theirs.abs().max().item())


@pytest.mark.parametrize("shape", ["tiny", "tiny72"])
@pytest.mark.parametrize(
    "grids", [GRIDS, [(1, 4, 4)] * 3, [(1, 13, 19)], [(1, 19, 13)]], ids=["awkward", "3", "1", "1t"]
)
def test_features_match_transformers(checkpoint, shape, grids):
    check_features(checkpoint(shape), grids, 48)


def test_base_shape_matches_transformers(checkpoint):
    check_features(checkpoint("base"), [(1, 13, 19), (1, 8, 32), (1, 16, 16), (1, 5, 3)], 768)


@pytest.mark.slow
def test_so400m_shape_matches_transformers(checkpoint):
    check_features(checkpoint("so400m"), [(1, 13, 19), (1, 3, 20), (1, 5, 3)], 768)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name.removeprefix("vision_model."): parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("shape", ["tiny", "tiny72"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_match_transformers(checkpoint, patches, shape, checkpointing):
    packed = PackedPatches(patches(GRIDS), GRIDS)
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint(shape)).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    reference = Siglip2VisionModel.from_pretrained(checkpoint(shape)).double().train()
    exact = PackedPatches(packed["pixel_values"].double(), GRIDS)
    weights = torch.randn(1, model.config.hidden_size, generator=torch.Generator().manual_seed(2))

    out = model(**packed)
    ours = gradients(model, (out.last_hidden_state * weights).mean() + (out.pooler_output * weights).mean())
    tokens, _, pooled = run_transformers(reference, exact)
    expected = gradients(reference, (tokens * weights).mean() + (pooled * weights).mean())
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        # a bias of k moves all scores of a query alike: its gradient is zero but for rounding
        scale = max(expected[name].norm().item(), 1e-3 if "bias" in name else 0.0)
        error = (gradient - expected[name]).norm() / scale
        assert error <= 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("shape", ["tiny", "tiny72"])
@pytest.mark.parametrize("temporal", ["frames", "joint"])
def test_video_and_sides_of_one_match_the_reference(checkpoint, patches, shape, temporal):
    grids = [(3, 4, 6), (1, 13, 19), (2, 1, 9), *SIDE_OF_ONE]
    packed = PackedPatches(patches(grids), grids, temporal)
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint(shape))
    reference = kernels_ref.Siglip2Naflex(checkpoint(shape), device="cpu", dtype=torch.float64)
    with torch.no_grad():
        ours = model(**packed, output_hidden_states=True)
        expected = kernels_ref.packed_encoder(
            reference.state,
            reference.config,
            packed["pixel_values"].double(),
            packed["grid_thw"],
            temporal=temporal,
            output_hidden_states=True,
        )
    assert worst(ours.last_hidden_state, expected.last_hidden_state) <= 1e-5
    assert worst(ours.pooler_output, expected.pooler_output) <= 1e-5
    assert len(ours.hidden_states) == len(expected.hidden_states)
    assert all(worst(a, b) <= 1e-4 for a, b in zip(ours.hidden_states, expected.hidden_states))


def test_packed_sibling_in_transformers_agrees(checkpoint, patches):
    """`Cosmos3EdgeVisionModel`: SigLIP2 on packed patches, without a head."""
    cosmos = pytest.importorskip("transformers.models.cosmos3_edge", reason="transformers 5.x only")
    grids = [(1, 13, 19), (3, 4, 6), (1, 8, 32)]
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny72"))
    fields = model.config.to_dict()
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "patch_size",
        "num_patches",
    )
    config = cosmos.Cosmos3EdgeVisionConfig(**{name: fields[name] for name in names}, spatial_merge_size=1)
    sibling = cosmos.Cosmos3EdgeVisionModel(config).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    sibling.load_state_dict(state, strict=True)
    pixel_values = patches(grids)
    with torch.no_grad():
        ours = model(pixel_values, grids).last_hidden_state
        theirs = sibling(pixel_values, torch.tensor(grids)).last_hidden_state
    assert worst(ours, theirs) <= 1e-5


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_act", "gelu"), ("hidden_act", "quick_gelu"), ("layer_norm_eps", 1e-1)]
)
def test_the_configuration_is_honoured(checkpoint, patches, field, value):
    grids = [(1, 5, 7), (1, 3, 4)]
    packed = PackedPatches(patches(grids), grids)
    default = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), **{field: value})
    reference = Siglip2VisionModel.from_pretrained(checkpoint("tiny"), **{field: value})
    with torch.no_grad():
        ours, before = model(**packed), default(**packed)
        tokens, _, pooled = run_transformers(reference, packed)
    for x, expected, unchanged in (
        (ours.last_hidden_state, tokens, before.last_hidden_state),
        (ours.pooler_output, pooled, before.pooler_output),
    ):
        assert worst(x, expected) <= 1e-5
        assert worst(x, unchanged) > 1e-4
