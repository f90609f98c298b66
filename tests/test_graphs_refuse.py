"""What CUDA graphs cannot give is an error, or given without them: never a wrong gradient."""

import gc

import pytest
import torch
import torch.utils.checkpoint
from graphed import (
    BUDGETS,
    BUSY,
    LEARNING,
    OTHERS,
    AtBucketRows,
    freeze,
    gradients,
    graphs_of,
    on_both,
    on_pooled,
    on_tokens,
    same,
    same_gradients,
    step,
)

from siglip2_packed import training_graph
from siglip2_packed.graphs import CUDAGraphs


def test_a_second_backward_says_what_to_do(world):
    model, packed = world.model(), world.pack()
    graphs = CUDAGraphs(model, BUDGETS)
    out = graphs(**packed)
    on_tokens(out).backward(retain_graph=True)
    _, grads = out.last_hidden_state, gradients(model)
    with pytest.raises(RuntimeError, match="keeps the activations of a forward for one backward, of all losses tog"):
        on_tokens(out).backward()
    same_gradients(gradients(model), grads)
    with pytest.raises(RuntimeError, match="one backward, of all losses together"):  # of the head, after the encoder's
        on_pooled(out).backward()
    same_gradients(gradients(model), grads)
    same(step(graphs, model, packed), step(AtBucketRows(model), model, packed))


def test_a_second_backward_of_the_head_over_a_frozen_encoder(world, said):
    model, packed = world.model(), world.pack()
    freeze(model, LEARNING["the head"])
    graphs = CUDAGraphs(model, BUDGETS)
    loss = on_pooled(graphs(**packed))
    with torch.no_grad():
        graphs(**packed)
    assert said() == [BUSY]
    loss.backward(retain_graph=True)
    grads = gradients(model)
    with pytest.raises(RuntimeError, match="one backward, of all losses together"):
        loss.backward()
    same_gradients(gradients(model), grads)


def test_the_memory_is_lent_to_nobody_while_a_backward_runs(world):
    """Other threads ask for it at any time."""
    model, busy = world.model(), []
    freeze(model, LEARNING["the head"])
    graphs, packed = CUDAGraphs(model, BUDGETS), world.pack()
    step(graphs, model, packed, on_pooled)
    (graph,) = graphs_of(graphs)
    run = graph.head.gradients
    graph.head.gradients = lambda: busy.append(graph.ground.busy) or run()
    step(graphs, model, packed, on_pooled)
    assert busy == [True] and not graph.ground.busy


def test_two_backwards_of_losses_on_pooled_features_and_on_tokens(world):
    """The first takes the head and the encoder with it."""
    model = world.model()
    out = CUDAGraphs(model, BUDGETS)(**world.pack())
    on_pooled(out).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward, of all losses together"):
        on_tokens(out).backward()


@pytest.mark.parametrize("name", ["encoder.layers.1.mlp.fc1.weight", "head.probe", "embeddings.patch_embedding.bias"])
def test_a_parameter_changed_between_forward_and_backward(world, name):
    model, packed = world.model(), world.pack()
    graphs = CUDAGraphs(model, BUDGETS)
    loss = on_both(graphs(**packed))
    with torch.no_grad():
        model.get_parameter(name).mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation between a forward and its backward"):
        loss.backward()
    del loss
    same(step(graphs, model, packed, on_both), step(AtBucketRows(model), model, packed, on_both))


def no_memory(*args):
    raise MemoryError


def test_an_error_while_capturing_a_backward_is_the_callers(world, monkeypatch):
    """Graphs begin anew."""
    model, packed, other = world.model(vision_use_head=False), world.pack(), world.pack(OTHERS[0])
    graphs = CUDAGraphs(model, BUDGETS)
    step(graphs, model, other)
    with monkeypatch.context() as patch:
        patch.setattr(training_graph, "_lots", no_memory)
        with pytest.raises(MemoryError):
            graphs(**packed)
    assert graphs.held() == (0, 0)
    for again in (packed, other):
        same(step(graphs, model, again), step(AtBucketRows(model), model, again))
    assert graphs.held()[0] == 2


def test_second_derivatives_are_refused(world):
    model = world.model(vision_use_head=False)
    bias = model.encoder.layers[0].mlp.fc1.bias
    loss = on_tokens(CUDAGraphs(model, BUDGETS)(**world.pack()))
    (grad,) = torch.autograd.grad(loss, bias, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.square().sum().backward()


def test_a_batch_of_gradients_is_refused(world):
    model = world.model(vision_use_head=False)
    features = CUDAGraphs(model, BUDGETS)(**world.pack()).last_hidden_state
    with pytest.raises(RuntimeError, match="is_grads_batched: CUDA graphs take one gradient at a time"):
        torch.autograd.grad(
            features, list(model.parameters()), torch.ones(2, *features.shape).to(features), is_grads_batched=True
        )


def test_pixels_that_want_a_gradient_run_without_graphs(world):
    model, packed = world.model(vision_use_head=False), world.pack()
    graphs = CUDAGraphs(model, BUDGETS)
    packed["pixel_values"].requires_grad_()
    on_tokens(graphs(**packed)).backward()
    assert packed["pixel_values"].grad.abs().sum() > 0
    assert not graphs_of(graphs)


def test_the_last_gradient_of_a_graph_may_be_asked_for_alone(world):
    """Of the last layer only: those below get none, and the next step is as ever."""
    model, packed = world.model(vision_use_head=False), world.pack()
    graphs = CUDAGraphs(model, BUDGETS)
    weight = model.encoder.layers[-1].mlp.fc2.weight
    _, expected = step(AtBucketRows(model), model, packed)
    (grad,) = torch.autograd.grad(on_tokens(graphs(**packed)), weight)
    assert torch.equal(grad, expected[f"encoder.layers.{len(model.encoder.layers) - 1}.mlp.fc2.weight"])
    del grad
    gc.collect()
    same(step(graphs, model, packed), step(AtBucketRows(model), model, packed))
