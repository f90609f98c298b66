"""Adapters, checkpoints and what else a model has or is within: in CUDA graphs where that is right, else without."""

from functools import partial

import pytest
import recorded_graphs
import torch
import torch.utils.checkpoint
from graphed import (
    BUDGETS,
    AtBucketRows,
    adapted,
    check,
    gradients,
    graphs_of,
    near,
    relative,
    same,
    step,
    weighted,
)
from peft import LoraConfig
from torch import nn
from torch.utils.checkpoint import checkpoint

from siglip2_packed.graphs import CUDAGraphs
from siglip2_packed.lending import Lot


def test_lora(world):
    model = world.model(vision_use_head=False)
    adapted(model)
    graphs, packed = check(world, model), world.pack()
    _, grads = step(graphs, model, packed)
    assert len(grads) == 2 * 3 * len(model.encoder.layers) and all("lora" in name for name in grads)


def test_lora_over_inputs_that_are_made_to_require_a_gradient(world):
    """As training with reentrant checkpointing has it, of a tower within a VLM."""
    model = world.model(vision_use_head=False)
    adapted(model)
    model.enable_input_require_grads()
    check(world, model)


def test_lora_by_the_model_that_peft_wraps(world):
    model = world.model(vision_use_head=False)
    wrapped, packed = adapted(model), world.pack()
    expected = step(AtBucketRows(model), model, packed)
    model.cuda_graphs_enable(BUDGETS)
    same(step(wrapped, model, packed), expected)
    assert len(graphs_of(model)) == 1


def test_parametrised_weights(world):
    model = world.model(vision_use_head=False)
    nn.utils.parametrizations.weight_norm(model.encoder.layers[0].mlp.fc1)
    check(world, model, compare=partial(near, bound=world.noise))


def test_an_adapter_that_is_switched_off_and_merged_is_seen(world):
    model = world.model(vision_use_head=False)
    packed = world.pack()
    base = AtBucketRows(model)(**packed).last_hidden_state.detach()
    graphs = CUDAGraphs(model, BUDGETS)
    assert torch.equal(graphs(**packed).last_hidden_state, base)
    wrapped = adapted(model)
    changed = graphs(**packed).last_hidden_state.detach()
    assert torch.equal(changed, AtBucketRows(model)(**packed).last_hidden_state)
    assert relative(changed, base) > 3 * world.noise
    with torch.no_grad():
        assert torch.equal(graphs(**packed).last_hidden_state, AtBucketRows(model)(**packed).last_hidden_state)
        assert relative(graphs(**packed).last_hidden_state, changed) < world.noise
    with wrapped.disable_adapter(), torch.no_grad():
        assert torch.equal(graphs(**packed).last_hidden_state, AtBucketRows(model)(**packed).last_hidden_state)
        assert relative(graphs(**packed).last_hidden_state, base) < world.noise
    same(step(graphs, model, packed), step(AtBucketRows(model), model, packed))
    merged = wrapped.merge_and_unload()
    with torch.no_grad():
        assert relative(CUDAGraphs(merged, BUDGETS)(**packed).last_hidden_state, changed) < world.noise
        assert relative(graphs(**packed).last_hidden_state, changed) < world.noise


def test_a_second_adapter_trains(world, said):
    model = world.model(vision_use_head=False)
    wrapped, packed = adapted(model), world.pack()
    model.cuda_graphs_enable(BUDGETS)
    step(wrapped, model, packed)
    wrapped.add_adapter("second", LoraConfig(target_modules=["q_proj", "v_proj", "fc1"], r=2, init_lora_weights=False))
    wrapped.set_adapter("second")
    found = step(wrapped, model, packed)
    same(found, step(AtBucketRows(model), model, packed))
    assert all("second" in name for name in found[1]) and len(graphs_of(model)) == 1 and not said()


def test_dropout_differs_from_step_to_step_and_trains(world):
    model = world.model(vision_use_head=False)
    adapted(model, lora_dropout=0.5)
    model.train()
    graphs, packed = CUDAGraphs(model, BUDGETS), world.pack()
    (first, first_grads), (second, second_grads) = (step(graphs, model, packed) for _ in range(2))
    assert len(graphs_of(graphs)) == 1
    assert not torch.equal(first, second)
    assert not all(torch.equal(first_grads[name], second_grads[name]) for name in first_grads)
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(10):
        loss = graphs(**packed).last_hidden_state.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert not torch.equal(graphs(**packed).last_hidden_state, graphs(**packed).last_hidden_state)
        model.eval()
        assert torch.equal(graphs(**packed).last_hidden_state, graphs(**packed).last_hidden_state)


def test_checkpointing_with_dropout_runs_without_graphs(world, said):
    model = world.model(vision_use_head=False)
    adapted(model, lora_dropout=0.5)
    model.train().gradient_checkpointing_enable()
    graphs = CUDAGraphs(model, BUDGETS)
    for _ in range(2):
        _, grads = step(graphs, model, world.pack())
        assert grads
    assert said() == ["gradient checkpointing has to draw the same dropout twice"]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_checkpoint_around_the_model(world, said, reentrant, frozen):
    """It calls the model once more in backward, in autograd's thread."""
    model, packed = world.model(vision_use_head=False), world.pack()
    model.requires_grad_(not frozen)
    torch.manual_seed(0)
    width = model.config.hidden_size
    project = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 8)).to(model.device, model.dtype)
    start = torch.zeros(1, device=model.device, dtype=model.dtype, requires_grad=True)

    def run(start):
        return project(model(**packed).last_hidden_state + start)

    def checkpointed():
        model.zero_grad(), project.zero_grad()
        out = checkpoint(run, start, use_reentrant=reentrant)
        weighted(out).backward()
        return out.detach(), {**gradients(model), **gradients(project)}

    expected = checkpointed()
    model.cuda_graphs_enable(BUDGETS)
    for _ in range(2):
        near(checkpointed(), expected, world.noise)
    followed = not (reentrant or frozen)
    assert len(said()) == followed and all(reason.startswith("hooks on saved tensors") for reason in said())
    assert bool(graphs_of(model)) is not followed


def test_anomaly_detection_runs_without_graphs(world, said):
    model, packed = world.model(vision_use_head=False), world.pack()
    graphs = CUDAGraphs(model, BUDGETS)
    with torch.autograd.detect_anomaly(check_nan=True):
        near(step(graphs, model, packed), step(model, model, packed), world.noise)
    assert said() == ["anomaly detection looks at the gradients of each operation"]
    same(step(graphs, model, packed), step(AtBucketRows(model), model, packed))


class Waiting(nn.Linear):
    """Looks at its input on the host, which a capture does not permit, as long as it does."""

    waits = True

    def forward(self, x):
        return super().forward(x * (x.detach().abs().max().item() > 0 if self.waits else 1))


@pytest.mark.parametrize("learns", [False, True])
def test_what_cannot_be_captured_runs_without_graphs(world, said, learns):
    model, packed = world.model(vision_use_head=False), world.pack()
    mlp, graphs = model.encoder.layers[0].mlp, CUDAGraphs(model, BUDGETS)
    waiting = Waiting(mlp.fc1.in_features, mlp.fc1.out_features, device=model.device, dtype=model.dtype)
    waiting.load_state_dict(mlp.fc1.state_dict())
    mlp.fc1 = waiting
    for _ in range(2):
        with torch.set_grad_enabled(learns):
            found, expected = graphs(**packed).last_hidden_state, model(**packed).last_hidden_state
        assert relative(found.detach(), expected.detach()) < world.noise
    assert len(said()) == 1 and said()[0].startswith("a CUDA graph cannot have what it does: ")
    torch.rand(1, device=model.device)  # torch's generator knows that no capture goes on
    del found, expected
    waiting.waits = False
    same(step(graphs, model, packed), step(AtBucketRows(model), model, packed))
    assert len(graphs_of(graphs)) == 1


def test_a_capture_that_broke_off_is_followed_by_one_that_ends(world, monkeypatch):
    """Only that takes torch's random generator out of the capture."""
    if world.device == "cuda":
        pytest.skip("torch's own raises as well")
    model, packed, ended = world.model(vision_use_head=False), world.pack(), []
    Recorded, given_back = recorded_graphs.Recorded, []
    end = Recorded.capture_end

    def capture_end(graph):
        end(graph)
        if not ended:
            ended.append(False)
            raise RuntimeError("operation failed due to a previous error during capture")
        ended.append(True)

    monkeypatch.setattr(Recorded, "capture_end", capture_end)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *args: given_back.append(args), raising=False)
    linear = model.encoder.layers[0].mlp.fc1
    waiting = Waiting(linear.in_features, linear.out_features, device=model.device, dtype=model.dtype)
    model.encoder.layers[0].mlp.fc1 = waiting
    with torch.no_grad():
        CUDAGraphs(model, BUDGETS)(**packed)
    assert ended == [False, True] and len(given_back) == 1


def test_an_error_in_a_capture_is_the_one_that_is_raised(world, monkeypatch):
    model, packed = world.model(vision_use_head=False), world.pack()
    graphs = CUDAGraphs(model, BUDGETS)

    def no_memory(self, *args):
        raise torch.OutOfMemoryError("as much as there is not")

    with monkeypatch.context() as patch:
        patch.setattr(Lot, "of_copies", no_memory)
        with pytest.raises(torch.OutOfMemoryError, match="as much as there is not"):
            step(graphs, model, packed)
    same(step(graphs, model, packed), step(AtBucketRows(model), model, packed))
