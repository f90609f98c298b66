"""Training in CUDA graphs is training without: to the bit where rows are as many, within rounding of the pack's own."""

import contextlib
from functools import partial
from types import SimpleNamespace

import graphed
import pytest
import torch
import torch.utils.checkpoint
from graphed import (
    BUDGETS,
    GRIDS,
    HOOKED,
    LEARNING,
    OTHERS,
    AtBucketRows,
    check,
    flat,
    freeze,
    gradients,
    graphs_of,
    near,
    on_both,
    on_pooled,
    on_tokens,
    relative,
    same,
    same_gradients,
    step,
)
from torch import nn

from siglip2_packed import Siglip2PackedVisionModel
from siglip2_packed.encoder import Siglip2PackedEncoderLayer
from siglip2_packed.graphs import CUDAGraphs


@pytest.mark.parametrize("loss", [on_tokens, on_pooled, on_both])
def test_gradients_of_a_loss(world, loss):
    """Also of a pack of fewer images than the one before, in the same bucket."""
    check(world, world.model(), loss, packs=[GRIDS, [(1, 8, 32), (5, 2, 2)]])


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "mode",
    [partial(default_dtype, torch.float64), partial(default_dtype, torch.float16), partial(torch.device, "meta")],
    ids=["float64", "float16", "meta"],
)
def test_the_first_call_may_be_made_among_other_defaults(world, mode):
    model, packed = world.model(), world.pack()
    expected = step(AtBucketRows(model), model, packed)
    graphs = CUDAGraphs(model, BUDGETS)
    with mode():
        graphs(**packed)
    same(step(graphs, model, packed), expected)
    assert len(graphs_of(graphs)) == 1


def test_gradients_of_packs_of_many_buckets(world):
    check(world, world.model(vision_use_head=False), packs=[*OTHERS, *OTHERS[::-1]], count=6)


@pytest.mark.gpu
def test_gradients_at_the_width_of_so400m(world):
    from transformers import Siglip2VisionConfig

    from siglip2_packed.workloads import SHAPES

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Siglip2PackedVisionModel(Siglip2VisionConfig(**{**SHAPES["so400m"], "num_hidden_layers": 2}))
    model.to(torch.bfloat16)
    graphs = CUDAGraphs(model)
    for grids in (GRIDS, [(1, 16, 16)] * 4, [(1, 32, 32), (1, 24, 32), (1, 36, 36), (1, 28, 36)]):
        packed = world.pack(grids, patches=768)
        expected = step(AtBucketRows(model, graphs.graphs.budgets), model, packed, on_both)
        same(step(graphs, model, packed, on_both), expected)
        near(step(model, model, packed, on_both), expected, world.noise)


@pytest.mark.parametrize("learning", LEARNING)
def test_frozen_parameters_get_no_gradient(world, learning):
    model = world.model()
    freeze(model, LEARNING[learning])
    loss = on_pooled if learning == "the head" else on_both
    as_for_inference = learning in ("the norm at the end", "the head")  # the encoder, without graphs
    graphs = check(world, model, loss, compare=partial(near, bound=world.noise) if as_for_inference else same)
    step(graphs, model, world.pack(), loss)
    assert gradients(model).keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_model_that_is_frozen_or_unfrozen_later_is_captured_anew(world):
    model = world.model(vision_use_head=False)
    graphs, packed = CUDAGraphs(model, BUDGETS), world.pack()
    for learning in (lambda name: True, lambda name: "layers.1" in name, lambda name: True):
        freeze(model, learning)
        same(step(graphs, model, packed), step(AtBucketRows(model), model, packed))
    freeze(model, lambda name: False)
    assert not graphs(**packed).last_hidden_state.requires_grad
    assert len(graphs_of(graphs)) == 3


@pytest.mark.parametrize("select_layer", [0, 1, -2])
def test_models_that_end_at_a_layer(world, select_layer):
    check(world, world.model(select_layer=select_layer))


@pytest.mark.parametrize("again", [False, True])
def test_gradient_checkpointing_changes_no_bit(world, monkeypatch, again):
    """Layers run once more in backward."""
    model, runs, forward = world.model(), [], Siglip2PackedEncoderLayer.forward
    monkeypatch.setattr(
        Siglip2PackedEncoderLayer, "forward", lambda *args, **kwargs: runs.append(1) or forward(*args, **kwargs)
    )
    packed = world.pack()
    expected = step(AtBucketRows(model), model, packed, on_both)
    graphs = CUDAGraphs(model, BUDGETS)
    if again:  # it is seen, whenever it comes
        same(step(graphs, model, packed, on_both), expected)
    model.gradient_checkpointing_enable()
    runs.clear()
    for _ in range(2):
        same(step(graphs, model, packed, on_both), expected)
    assert len(graphs_of(graphs)) == 1 + again
    assert len(runs) == 4 * len(model.encoder.layers)  # to get ready and to be captured, forward and again


def test_tied_layers_add_up_their_gradients(world):
    model = world.model(vision_use_head=False)
    model.encoder.layers[1].mlp = model.encoder.layers[0].mlp
    graphs, packed = CUDAGraphs(model, BUDGETS), world.pack()
    expected = step(AtBucketRows(model), model, packed)
    for _ in range(2):
        near(step(graphs, model, packed), expected, world.noise)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_model_within_a_checkpoint(world, said, reentrant, first):
    """Whether or not its graphs are there already."""
    model = world.model(vision_use_head=False)
    graphs, packed = CUDAGraphs(model, BUDGETS), world.pack()
    expected = step(AtBucketRows(model), model, packed)
    if not first:
        step(graphs, model, packed)
    scale = torch.ones((), device=world.device, requires_grad=True)

    def run(**packed):
        def features(scale):
            return graphs(**packed).last_hidden_state * scale

        hidden_states = torch.utils.checkpoint.checkpoint(features, scale, use_reentrant=reentrant)
        return SimpleNamespace(last_hidden_state=hidden_states)

    for _ in range(2):
        near(step(run, model, packed), expected, world.noise)
    assert said() == [HOOKED] * (not reentrant)
    same(step(graphs, model, packed), expected)


@pytest.mark.parametrize("first", [False, True])
def test_activations_that_are_kept_on_the_host(world, said, first):
    model = world.model(vision_use_head=False)
    graphs, packed = CUDAGraphs(model, BUDGETS), world.pack()
    expected = step(AtBucketRows(model), model, packed)
    if not first:
        step(graphs, model, packed)
    for _ in range(2):
        with torch.autograd.graph.save_on_cpu():
            found = step(graphs, model, packed)
        near(found, expected, world.noise)
    assert said() == [HOOKED]
    same(step(graphs, model, packed), expected)


def test_ten_steps_of_adamw(world):
    losses = {}
    for run in (AtBucketRows, CUDAGraphs):
        model, losses[run] = world.model(), []
        optimizer, features = torch.optim.AdamW(model.parameters(), lr=1e-3), run(model, BUDGETS)
        for number in range(10):
            loss = on_both(features(**world.pack(OTHERS[number % 3], seed=number)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[run].append(loss.item())
    assert losses[CUDAGraphs] == losses[AtBucketRows]
    assert len(set(losses[CUDAGraphs])) == 10


def test_three_micro_steps_accumulate(world, said):
    model = world.model()
    graphs, packs = CUDAGraphs(model, BUDGETS), [world.pack(grids, seed) for seed, grids in enumerate(OTHERS[:3])]

    def accumulated(run):
        model.zero_grad()
        for packed in packs:
            (on_both(run(**packed)) / 3).backward()
        return gradients(model)

    expected = accumulated(AtBucketRows(model))
    for _ in range(2):
        same_gradients(accumulated(graphs), expected)
    assert not said()


@pytest.mark.gpu
def test_gradients_of_a_scaled_loss_in_float16(checkpoint):
    world = graphed.World(checkpoint, "cuda", torch.float16, "tiny72")
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
    check(world, world.model(), lambda out: scaler.scale(on_both(out)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters_under_autocast(checkpoint, said, dtype):
    """With a GradScaler, which skips a step whose loss is not finite."""
    world, found = graphed.World(checkpoint, "cuda", torch.float32, "tiny72"), {}
    for run in (AtBucketRows, CUDAGraphs):
        model = world.model(vision_use_head=False)
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1e-2), torch.amp.GradScaler("cuda", init_scale=256.0)
        with torch.autocast("cuda", dtype):
            features = run(model, BUDGETS)
        losses = []
        for number in range(4):
            with torch.autocast("cuda", dtype):
                loss = on_tokens(features(**world.pack(seed=number)))
            scaler.scale(loss * (float("inf") if number == 2 else 1)).backward()
            assert all(p.grad.dtype is torch.float32 for p in model.parameters())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
        found[run] = losses, scaler.get_scale(), flat({n: p.detach() for n, p in model.named_parameters()})
    (losses, scale, parameters), (e_losses, e_scale, e_parameters) = found[CUDAGraphs], found[AtBucketRows]
    assert len(graphs_of(features)) == 1 and not said()
    assert scale == e_scale == 128
    assert losses == pytest.approx(e_losses, rel=0.01)
    assert parameters.isfinite().all() and relative(parameters, e_parameters) < 1e-3


def test_clip_grad_norm(world):
    model, packed, found = world.model(), world.pack(), []
    graphs = CUDAGraphs(model, BUDGETS)
    for run in (AtBucketRows(model), graphs, graphs):
        step(run, model, packed, on_both)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert norm > 0.1
        found.append({"norm": norm, **gradients(model)})
    expected, *others = found
    for grads in others:
        same_gradients(grads, expected)
