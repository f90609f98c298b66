"""Features in float16 that are not finite are said once a model, without a wait."""

import copy
import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import BaseModelOutput

from siglip2_packed import Siglip2NaflexPacking, Siglip2PackedVisionModel, overflow

GRIDS = [(1, 3, 5), (1, 2, 4)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def beyond(checkpoint, dtype=torch.float16, device="cpu", **kwargs):
    """Whose activations are beyond 65,504 in its last layer."""
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), **kwargs)
    with torch.no_grad():
        model.encoder.layers[-1].mlp.fc2.bias.fill_(1e5)
    return model.to(device, dtype)


@pytest.fixture
def said(caplog):
    caplog.set_level("WARNING", "siglip2_packed")
    return lambda: [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]


def run(model, patches, device="cpu", calls=3):
    for _ in range(calls):
        out = model(patches(GRIDS).to(device), GRIDS)
        if device == "cuda":
            torch.cuda.synchronize()
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kwargs", [{}, {"vision_use_head": False}, {"select_layer": -1}], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_it_is_said_once_and_recommends_bfloat16(checkpoint, patches, said, kwargs, grad, device):
    model = beyond(checkpoint, device=device, **kwargs)
    with torch.set_grad_enabled(grad):
        assert not run(model, patches, device).last_hidden_state.isfinite().all()
    (line,) = said()
    assert line.startswith("Siglip2PackedVisionModel: features are not finite") and "bfloat16" in line
    run(beyond(checkpoint, device=device), patches, device)
    assert len(said()) == 2  # of each model


def test_what_only_the_head_makes_is_said_too(checkpoint, patches, said):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))
    with torch.no_grad():
        model.head.mlp.fc2.bias.fill_(1e5)
    out = run(model.half(), patches)
    assert out.last_hidden_state.isfinite().all() and not out.pooler_output.isfinite().all()
    assert len(said()) == 1


def test_finite_features_and_other_dtypes_are_not_looked_at(checkpoint, patches, said, monkeypatch):
    run(Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), dtype=torch.float16), patches)
    monkeypatch.setattr(overflow, "_total", lambda features: pytest.fail("looked at"))
    for dtype in (torch.float32, torch.bfloat16):
        run(beyond(checkpoint, dtype), patches)
    with torch.autocast("cpu", torch.bfloat16):
        run(beyond(checkpoint, torch.float32), patches)
    assert not said()


@pytest.mark.parametrize("where", ["autocast", "inference mode", "the first document's class", "empty"])
def test_wherever_it_is_called(checkpoint, patches, said, where):
    model = beyond(checkpoint)
    if where == "autocast":
        model = beyond(checkpoint, torch.float32)
        with torch.no_grad():
            model.encoder.layers[-1].mlp.fc2.weight.fill_(1e5)
        with torch.autocast("cpu", torch.float16):
            run(model, patches)
    elif where == "inference mode":
        with torch.inference_mode():
            run(model, patches)
        run(model, patches)
    elif where == "empty":
        model(torch.zeros(0, 48), [])
    else:
        first = Siglip2NaflexPacking(checkpoint("tiny"), device="cpu")
        first.vision_model = model
        first(patches(GRIDS), GRIDS)
    assert len(said()) == (where != "empty")


def test_models_are_not_held_and_copies_not_hindered(checkpoint, patches, said):
    gc.collect()
    before = len(overflow._said)
    model = beyond(checkpoint)
    run(model, patches)
    run(copy.deepcopy(model), patches)
    assert len(said()) == 2
    del model
    gc.collect()
    assert len(overflow._said) <= before


def test_who_follows_the_calls_or_compiles_is_left_alone(checkpoint, patches, said):
    class Passing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    model = beyond(checkpoint)
    model(patches(GRIDS), GRIDS)  # what is checked at a first call
    model = beyond(checkpoint)
    with Passing():
        run(model, patches)
    assert len(said()) == 1
    compiled = torch.compile(beyond(checkpoint), backend="eager")
    with torch.no_grad():
        run(compiled, patches)
    assert len(said()) == 2


@pytest.mark.gpu
def test_no_call_waits_for_the_device(checkpoint, patches, said):
    model = beyond(checkpoint, device="cuda")
    x = patches(GRIDS).cuda()
    run(beyond(checkpoint, device="cuda"), patches, "cuda")
    assert len(said()) == 1
    with torch.no_grad():
        model(x, GRIDS)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            for _ in range(3):
                model(x, GRIDS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(said()) == 2


@pytest.mark.gpu
def test_graphs_are_captured_and_their_replays_looked_at(checkpoint, patches, said):
    from siglip2_packed.graphs import CUDAGraphs

    model = beyond(checkpoint, device="cuda")
    run(CUDAGraphs(model), patches, "cuda")
    assert len(said()) == 1
    finite = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), dtype=torch.float16).cuda()
    run(CUDAGraphs(finite), patches, "cuda")
    x = patches(GRIDS).cuda()
    graph, fresh = torch.cuda.CUDAGraph(), beyond(checkpoint, device="cuda")
    with torch.no_grad():
        fresh(x, GRIDS)
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                overflow.watch(fresh, BaseModelOutput(x.half()))
        finally:
            torch.cuda.synchronize()
    run(fresh, patches, "cuda")
    assert len(said()) == 2
