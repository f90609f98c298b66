"""CUDA graphs give the model's features for packs of every kind, and outputs that stay what they were."""

import pytest
import torch

from siglip2_packed import PackedPatches, Siglip2PackedVisionModel
from siglip2_packed import graphs as module
from siglip2_packed.graphs import CUDAGraphs, replayed
from siglip2_packed.packing import make_layout

PACKS = [[(1, 5, 7), (1, 3, 4), (1, 16, 2)], [(1, 4, 4), (2, 3, 5)], [(1, 8, 32)], [(1, 1, 1)], [(3, 13, 19)]]


@pytest.fixture
def model(checkpoint):
    return Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny72"), dtype=torch.bfloat16).to("cuda")


def packed_of(patches, grids, seed=0):
    return PackedPatches(patches(grids, seed=seed), grids).to("cuda")


@pytest.mark.gpu
def test_features_are_those_of_the_model(model, patches):
    graphs = CUDAGraphs(model, budgets=[64, 300, 1000])
    for grids in [*PACKS, *PACKS[::-1], [], [(1, 33, 33)]]:
        packed = packed_of(patches, grids, seed=len(grids))
        with torch.no_grad():
            expected = model(**packed)
        out = graphs(**packed)
        torch.testing.assert_close(out.last_hidden_state, expected.last_hidden_state, atol=0.05, rtol=0)
        torch.testing.assert_close(out.pooler_output, expected.pooler_output, atol=0.05, rtol=0)


@pytest.mark.gpu
def test_outputs_are_the_callers_own_and_rows_beyond_a_pack_do_not_reach_it(model, patches):
    graphs = CUDAGraphs(model, budgets=[300])
    first = packed_of(patches, PACKS[0])
    out = graphs(**first).last_hidden_state
    kept = out.clone()
    poison = packed_of(patches, [(1, 8, 32)])
    poison["pixel_values"].fill_(float("nan"))
    graphs(**poison)
    assert torch.equal(out, kept)
    assert torch.equal(graphs(**first).last_hidden_state, kept)


@pytest.mark.gpu
def test_changed_and_replaced_weights_are_seen(model, patches):
    graphs, packed = CUDAGraphs(model, budgets=[300]), packed_of(patches, PACKS[0])
    before = graphs(**packed).last_hidden_state
    for change in (
        lambda: [p.data.mul_(1.5) for p in model.encoder.layers[0].self_attn.parameters()],
        lambda: model.to(torch.float16),
    ):
        with torch.no_grad():
            change()
            expected = model(**packed).last_hidden_state
        out = graphs(**packed).last_hidden_state
        assert out.dtype == expected.dtype
        assert not torch.equal(out.float(), before.float())
        torch.testing.assert_close(out, expected, atol=0.05, rtol=0)


@pytest.mark.gpu
def test_a_bucket_is_captured_once(model, patches):
    graphs = CUDAGraphs(model, budgets=[64, 300])
    for grids in ([(1, 5, 7), (1, 3, 4)], [(1, 4, 7), (1, 4, 4)], [(1, 7, 8), (1, 2, 4)]):
        graphs(**packed_of(patches, grids))
    assert len(graphs._graphs) == 1


def test_buckets(checkpoint):
    graphs = CUDAGraphs.__new__(CUDAGraphs)
    graphs.budgets, graphs.least = [64, 100, 300], 1
    assert graphs.bucket(make_layout([(1, 4, 4)])) == (64, 1, 1, 64)
    assert graphs.bucket(make_layout([(1, 8, 8), (2, 2, 2), (1, 5, 4)])) == (100, 4, 4, 64)
    assert graphs.bucket(make_layout([(1, 16, 17)])) == (300, 1, 1, 512)
    assert graphs.bucket(make_layout([(1, 20, 20)])) is None
    assert graphs.bucket(make_layout([])) is None
    graphs.budgets, graphs.least = [1024, 16384], 500
    assert graphs.bucket(make_layout([(1, 499, 1)])) is None
    assert graphs.bucket(make_layout([(1, 500, 1)])) == (1024, 8, 8, 512)
    for images in (1, 5, 64, 128):  # full packs have one graph
        assert graphs.bucket(make_layout([(1, 16384 // images, 1)] * images))[:3] == (16384, 128, 128)
    assert graphs.bucket(make_layout([(1, 4, 1)] * 129))[1:3] == (256, 256)


def test_encode_replays_packs_that_are_half_full_in_half_precision(checkpoint, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "CUDAGraphs", lambda *args, **kwargs: asked.append((args, kwargs)) or "graphs")
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))
    monkeypatch.setattr(Siglip2PackedVisionModel, "device", torch.device("cuda"))
    assert replayed(model, 640) is model
    assert replayed(model.to(torch.bfloat16), 640) == "graphs"
    assert asked == [((model, [640]), {"least": 320})]
    model.config._attn_implementation = "sdpa"
    assert replayed(model, 640) is model


def test_what_cannot_be_graphed_says_why(checkpoint):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))
    with pytest.raises(ValueError, match="CUDA"):
        CUDAGraphs(model)
    with pytest.raises(ValueError, match="budgets"):
        CUDAGraphs(model, budgets=[0])
