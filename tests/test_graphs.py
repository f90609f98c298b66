"""CUDA graphs give the model's features for packs of every kind, and outputs that stay what they were."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from implementations import INTERPRETED

from siglip2_packed import PackedPatches, Siglip2PackedVisionModel
from siglip2_packed import graphs as module
from siglip2_packed.graphs import CUDAGraphs, replayed
from siglip2_packed.ops.attention import Refused, VarlenAttention
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


@pytest.fixture
def interpreted(checkpoint, trusted, monkeypatch):
    """A model in float32 whose graphs run once more instead of being replayed: all but the capture, without a GPU."""

    class Rerun(module._Graph):
        def __init__(self, *args):
            super().__init__(*args)
            self.graph = SimpleNamespace(replay=self.again)

        @torch.no_grad()
        def again(self):
            self.outputs = self._run()

    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, **kwargs: contextlib.nullcontext())
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: stream)
    event = SimpleNamespace(synchronize=lambda: None, record=lambda stream: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(module, "_Graph", Rerun)
    monkeypatch.setattr(module, "buckets_unmet", lambda *args: None)
    monkeypatch.setattr(
        module, "attention_in_buckets", lambda model, segments, rows: VarlenAttention(segments, "triton")
    )
    trusted(positions=["triton"], pool=["triton"], norm=["eager"], mlp=["eager"], attention=["sdpa"])
    return Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))


@INTERPRETED
def test_a_buckets_features_are_the_packs(interpreted, patches):
    """Whatever lies in the rows beyond it, and whoever was in the buffers before."""
    graphs = CUDAGraphs(interpreted, budgets=[32])
    for grids in ([(1, 3, 5), (2, 2, 3)], [(1, 1, 1)], [(1, 4, 4), (1, 2, 3), (1, 1, 2)]):
        packed = PackedPatches(patches(grids), grids)
        with torch.no_grad():
            expected = interpreted(**packed)
        for _ in range(2):
            out = graphs(**packed)
            for name in ("last_hidden_state", "pooler_output"):
                torch.testing.assert_close(out[name], expected[name], atol=1e-4, rtol=0)
            graph, rows = graphs._graphs[graphs.bucket(make_layout(grids))], len(packed["pixel_values"])
            _, cu_images, _, image_of_row = graph.host_parts  # nobody's rows, and images without any
            assert (image_of_row[rows:] == -1).all() and (cu_images[len(grids) :] == rows).all()
            for graph in graphs._graphs.values():
                graph.pixel_values[len(packed["pixel_values"]) :] = float("nan")
    assert list(graphs._graphs) == [(32, 4, 2, 32), (32, 1, 1, 32), (32, 4, 4, 32)]


@INTERPRETED
def test_a_graph_computes_by_the_models_own_path(interpreted, patches, monkeypatch):
    """What is changed in how a model embeds, encodes or pools is changed in its graphs."""
    grids = [(1, 3, 4)]
    packed, features = PackedPatches(patches(grids), grids), Siglip2PackedVisionModel._features
    rows = []
    monkeypatch.setattr(
        Siglip2PackedVisionModel, "_features", lambda *args: rows.append(len(args[1])) or features(*args)
    )
    with torch.no_grad():
        interpreted(**packed)
    CUDAGraphs(interpreted, budgets=[16])(**packed)
    assert rows == [12, 16, 16, 16, 16]  # the forward; two to get ready, the capture, its replay


@INTERPRETED
def test_replaced_weights_are_captured_anew(interpreted, patches):
    grids = [(1, 3, 4)]
    graphs, packed = CUDAGraphs(interpreted, budgets=[16]), PackedPatches(patches(grids), grids)
    before, (graph,) = graphs(**packed).last_hidden_state, graphs._graphs.values()
    with torch.no_grad():
        interpreted.encoder.layers[0].mlp.fc1.weight.mul_(1.5)
        changed, expected = graphs(**packed).last_hidden_state, interpreted(**packed).last_hidden_state
        assert list(graphs._graphs.values()) == [graph] and not torch.equal(changed, before)
        torch.testing.assert_close(changed, expected, atol=1e-4, rtol=0)
        interpreted.encoder.layers[0].mlp.fc1.weight.data = torch.randn(128, 64)
        changed, expected = graphs(**packed).last_hidden_state, interpreted(**packed).last_hidden_state
    torch.testing.assert_close(changed, expected, atol=1e-4, rtol=0)
    assert list(graphs._graphs.values()) != [graph]


@INTERPRETED
@pytest.mark.parametrize("refused", ["attention", "positions"])
def test_packs_of_a_bucket_without_a_right_kernel_run_without_a_graph(
    interpreted, patches, monkeypatch, caplog, trusted, refused
):
    """It is said once; other buckets have their graphs."""
    in_buckets, asked = module.attention_in_buckets, []

    def attention(model, segments, rows):
        asked.append(rows)
        if rows == 32:
            raise Refused("attention in buckets cannot be had: wrong")
        return in_buckets(model, segments, rows)

    if refused == "attention":
        monkeypatch.setattr(module, "attention_in_buckets", attention)
    else:
        trusted(positions=["eager"])  # which the grids are nowhere for
    graphs = CUDAGraphs(interpreted, budgets=[16, 32])
    for _ in range(2):
        for grids in ([(1, 3, 4)], [(1, 5, 5)], [(1, 4, 6)]):
            packed = PackedPatches(patches(grids), grids)
            with torch.no_grad():
                expected = interpreted(**packed)
            out = graphs(**packed)
            for name in ("last_hidden_state", "pooler_output"):
                torch.testing.assert_close(out[name], expected[name], atol=1e-4, rtol=0)
                assert not out[name].requires_grad
    said = [record.getMessage() for record in caplog.records if record.name == "siglip2_packed"]
    if refused == "attention":
        assert asked == [16, 32] and [bucket.patches for bucket in graphs._graphs] == [16]
        (line,) = said
        assert "packs of Bucket(patches=32, " in line and line.endswith("attention in buckets cannot be had: wrong")
    else:
        assert not graphs._graphs and len(said) == 2
        assert all("only the device knows these grids" in line for line in said)


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
