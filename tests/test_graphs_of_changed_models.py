"""What a model was when its graphs were captured it still is, or they are captured anew."""

import copy

import pytest
import torch
import torch.utils.checkpoint
from graphed import (
    BUDGETS,
    AtBucketRows,
    adapted,
    graphs_of,
    near,
    relative,
    same,
    same_gradients,
    step,
)
from torch import nn

from siglip2_packed.graphs import CUDAGraphs

CHANGES = {
    "a replaced parameter": lambda model: setattr(
        model.encoder.layers[0].mlp.fc1, "weight", nn.Parameter(2 * model.encoder.layers[0].mlp.fc1.weight.detach())
    ),
    "replaced data": lambda model: setattr(
        model.encoder.layers[0].mlp.fc1.weight, "data", 2 * model.encoder.layers[0].mlp.fc1.weight.detach()
    ),
    "data seen another way": lambda model: setattr(
        model.encoder.layers[0].self_attn.q_proj.weight,
        "data",
        model.encoder.layers[0].self_attn.q_proj.weight.data.t(),
    ),
    "another dtype": lambda model: model.to(torch.float16),
    "an adapter": lambda model: adapted(model),
    "a replaced module": lambda model: setattr(model.encoder.layers[0].mlp, "fc1", copy.deepcopy(
        model.encoder.layers[1].mlp.fc1
    )),
    "another layer": lambda model: model.encoder.layers.append(copy.deepcopy(model.encoder.layers[0])),
    "another epsilon": lambda model: [setattr(m, "eps", 0.1) for m in model.modules() if type(m) is nn.LayerNorm],
    "weights loaded in place": lambda model: model.load_state_dict(
        {name: 1.1 * x for name, x in model.state_dict().items()}
    ),
    "weights loaded by assignment": lambda model: model.load_state_dict(
        {name: 1.1 * x for name, x in model.state_dict().items()}, assign=True
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changed_is_seen(world, change):
    if change == "another dtype" and world.device == "cpu":
        pytest.skip("operations in float16 that the CPU has not got")
    model, packed = world.model(vision_use_head=False), world.pack()
    graphs = CUDAGraphs(model, BUDGETS)
    before, _ = step(graphs, model, packed)
    CHANGES[change](model)
    after = step(graphs, model, packed)
    same(after, step(AtBucketRows(model), model, packed))
    assert not torch.equal(before.float(), after[0].float())


def test_hooks_in_the_place_of_others_run(world, said):
    model, packed, seen = world.model(vision_use_head=False), world.pack(), []
    graphs = CUDAGraphs(model, BUDGETS)
    model.enable_input_require_grads()
    expected = step(graphs, model, packed)
    assert len(graphs_of(graphs)) == 1
    model.disable_input_require_grads()
    model.embeddings.patch_embedding.register_forward_hook(lambda *_: seen.append(1))
    near(step(graphs, model, packed), expected, world.noise)
    assert seen == [1]
    assert said() == ["hooks or a replaced forward on embeddings.patch_embedding have to run in each call"]


@pytest.mark.parametrize("kind", ["a hook", "a replaced forward"])
def test_hooks_on_the_model_run_in_each_call(world, said, kind):
    model, packed, seen = world.model(vision_use_head=False), world.pack(), []
    graphs, forward = CUDAGraphs(model, BUDGETS), model.forward
    expected = step(graphs, model, packed)
    if kind == "a hook":
        model.register_forward_hook(lambda *_: seen.append(1))
    else:
        model.forward = lambda *args, **kwargs: seen.append(1) or forward(*args, **kwargs)
    near(step(graphs, model, packed), expected, world.noise)
    assert seen == [1] and said() == ["hooks or a replaced forward on the model have to run in each call"]


@pytest.mark.parametrize("kind", ["forward", "backward", "forward pre", "a replaced forward"])
def test_hooks_run_in_each_call_and_graphs_when_they_are_gone(world, said, kind):
    model, packed, seen = world.model(vision_use_head=False), world.pack(), []
    graphs, layer = CUDAGraphs(model, BUDGETS), model.encoder.layers[0]
    expected = step(graphs, model, packed)
    if kind == "a replaced forward":
        forward = layer.forward
        layer.forward = lambda *args, **kwargs: seen.append(1) or forward(*args, **kwargs)
    else:
        hang = {
            "forward": layer.mlp.register_forward_hook,
            "forward pre": layer.self_attn.register_forward_pre_hook,
            "backward": layer.register_full_backward_hook,
        }
        handle = hang[kind](lambda *_: seen.append(1))
    for count in (1, 2):
        near(step(graphs, model, packed), expected, world.noise)
        assert len(seen) == count
    if kind == "a replaced forward":
        del layer.forward
    else:
        handle.remove()
    same(step(graphs, model, packed), expected)
    in_a_graph(graphs, packed)
    assert len(seen) == 2
    assert len(said()) == 1 and said()[0].startswith("hooks or a replaced forward on encoder.layers.0")


@pytest.mark.parametrize("captured", [False, True])
def test_hooks_on_gradients_of_parameters_run(world, said, captured):
    """Once each, whether they were there before the capture or not."""
    model, packed = world.model(vision_use_head=False), world.pack()
    graphs, name = CUDAGraphs(model, BUDGETS), "encoder.layers.0.mlp.fc1.weight"
    _, expected = step(AtBucketRows(model), model, packed)
    if captured:
        step(graphs, model, packed)
    handle = model.get_parameter(name).register_hook(lambda grad: 3 * grad)
    for _ in range(2):
        _, grads = step(graphs, model, packed)
        assert relative(grads[name], 3 * expected[name]) < world.noise
    handle.remove()
    same_gradients(step(CUDAGraphs(model, BUDGETS), model, packed)[1], expected)
    assert said() == []


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("whose", ["another layer's", "nobody's"])
def test_parameters_that_are_used_otherwise_than_by_their_modules(world, said, whose, again):
    """Their gradients would be missed by a capture, which differentiates by parameters of its own."""
    model, packed = world.model(vision_use_head=False), world.pack()
    layer, elsewhere = model.encoder.layers[0], [model.encoder.layers[1].mlp.fc1.bias]
    if whose == "nobody's":
        elsewhere = [nn.Parameter(elsewhere[0].detach().clone())]
    if again:
        model.gradient_checkpointing_enable()

    class Scaled(type(layer.mlp.activation_fn)):
        def forward(self, x):
            return super().forward(x) * (1 + elsewhere[0].mean())

    layer.mlp.activation_fn = Scaled()
    _, expected = step(model, model, packed)
    expected, elsewhere[0].grad = {**expected, "elsewhere": elsewhere[0].grad}, None
    _, grads = step(CUDAGraphs(model, BUDGETS), model, packed)
    same_gradients({**grads, "elsewhere": elsewhere[0].grad}, expected)
    assert said() == ["a parameter is used otherwise than as a module's own, so its gradient cannot be captured"]


def in_a_graph(graphs, packed):
    """To the bit as at the bucket's rows, not as at the pack's own."""
    model = graphs.model
    with torch.no_grad():
        found, own = graphs(**packed).last_hidden_state, model(**packed).last_hidden_state
        assert torch.equal(found, AtBucketRows(model)(**packed).last_hidden_state)
        assert not torch.equal(found, own) or model.device.type == "cuda"
