"""Fused layers are the modules' layers, whatever has or has not been done to the modules."""

import contextlib
import copy
import gc
import threading
import weakref
from functools import partial

import accelerate
import pytest
import torch
from implementations import DEVICES, INTERPRETED
from safetensors.torch import load_file
from torch import nn
from transformers import Siglip2VisionConfig

from siglip2_packed import PackedPatches, Siglip2PackedVisionModel, fused
from siglip2_packed.encoder import join_projections
from siglip2_packed.measure import relative_error
from siglip2_packed.ops import columns, mlp, norm
from siglip2_packed.ops.attention import VarlenAttention
from siglip2_packed.ops.layer import for_training
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.segments import Segments
from siglip2_packed.workloads import SHAPES

GRIDS = [(1, 13, 19), (1, 8, 32), (2, 3, 4), (1, 7, 1)]
FEW = [(1, 3, 5), (2, 2, 3)]


@pytest.fixture
def model(checkpoint):
    return Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))


@pytest.fixture
def calls(monkeypatch):
    """Which fused functions ran."""
    seen = []
    for name in ("infer", "train"):
        original = getattr(fused, name)

        def run(*args, name=name, original=original):
            seen.append(name)
            return original(*args)

        monkeypatch.setattr(fused, name, run)
    return seen


@contextlib.contextmanager
def called(model):
    """Within it every module of the model is called: something hangs on each."""
    handles = [module.register_forward_hook(lambda *_: None) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention_within(lengths, backend, device="cpu"):
    return VarlenAttention(Segments(lengths, device), backend)


def widened(block, width):
    """An encoder layer with an MLP of another width."""
    block.mlp.fc1, block.mlp.fc2 = nn.Linear(64, width), nn.Linear(width, 64)
    return block


def gradients(model, packed):
    model.zero_grad()
    out = model(**packed)
    (out.last_hidden_state.square().sum() + out.pooler_output.sum()).backward()
    return out.last_hidden_state.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def close(grads, expected):
    assert grads.keys() == expected.keys()
    largest = max(g.norm() for g in expected.values())
    for name, grad in grads.items():
        rounding = 1e-4 * name.endswith("k_proj.bias")  # of sums that are zero in exact arithmetic
        assert (grad - expected[name]).norm() <= 1e-5 * max(expected[name].norm(), 1e-3 * largest) + rounding, name


@pytest.mark.parametrize(("by", "grids"), [("eager", GRIDS), pytest.param("triton", FEW, marks=INTERPRETED)])
def test_features_and_gradients_are_those_of_the_modules(model, patches, trusted, calls, by, grids):
    trusted(norm=[by], mlp=[by], columns=[by])
    packed = PackedPatches(patches(grids), grids)
    with torch.no_grad():
        features = model(**packed).last_hidden_state
    assert calls == ["infer"]
    out, grads = gradients(model, packed)
    assert calls[1:] == ["train"]
    with called(model):
        expected, expected_grads = gradients(model, packed)
    assert len(calls) == 2
    assert relative_error(features, expected) <= 1e-6
    assert relative_error(out, expected) <= 1e-6
    close(grads, expected_grads)


@pytest.mark.parametrize("by", ["eager", pytest.param("triton", marks=INTERPRETED)])
@pytest.mark.parametrize("attention", ["triton", "sdpa"])
def test_what_backward_makes_again_is_what_it_was(model, patches, trusted, monkeypatch, by, attention):
    """Of many rows attention's projected output is not kept."""
    trusted(norm=[by], mlp=[by], columns=[by], attention=[attention])
    packed = PackedPatches(patches(FEW), FEW)
    kept, expected = gradients(model, packed)
    monkeypatch.setattr(choice, "KEPT_ROWS", 0)
    again, grads = gradients(model, packed)
    assert torch.equal(again, kept)
    close(grads, expected)


def test_wrong_kernels_change_nothing(model, patches, forced, monkeypatch, calls):
    """They are refused, and what torch computes is what there is without any."""
    packed, ran = PackedPatches(patches(FEW), FEW), []

    def wrong(right):
        def kernel(*args, **kwargs):
            ran.append(right.__name__)
            out = right(*args, **kwargs)
            return tuple(x if x is None else 1.05 * x for x in out) if isinstance(out, tuple) else 1.05 * out

        return kernel

    forced(norm=["eager"], mlp=["eager"], columns=["eager"])
    expected, expected_grads = gradients(model, packed)
    for function in (*norm.FUNCTIONS, *mlp.FUNCTIONS, *columns.FUNCTIONS):
        if "triton" in function.modules:
            monkeypatch.setattr(
                f"{function.modules['triton']}.{function.name.split('.')[1]}", wrong(function.of("eager"))
            )
    forced(norm=["triton"], mlp=["triton"], columns=["triton"])
    out, grads = gradients(model, packed)
    assert len(set(ran)) == 6  # in their checks
    checked = len(ran)
    assert torch.equal(out, expected) and all(torch.equal(grads[name], g) for name, g in expected_grads.items())
    gradients(model, packed)
    assert len(ran) == checked and calls == ["train"] * 3


def test_layers_of_several_widths_run_one_by_one(model, patches, calls):
    """As pruned ones are. What is chosen for a width is chosen for each."""
    packed, layers = PackedPatches(patches(FEW), FEW), model.encoder.layers
    for block, width in zip(layers, (128, 96, *[128] * len(layers))):
        widened(block, width)
    with torch.no_grad():
        assert model.encoder.plain_weights(torch.zeros(3, 64)) is None
        out = model(**packed).last_hidden_state
        assert calls == ["train"] * len(layers)
        with called(model):
            expected = model(**packed).last_hidden_state
        assert len(calls) == len(layers) and relative_error(out, expected) <= 1e-6
        for block in layers:
            widened(block, 96)
        assert len(model.encoder.plain_weights(torch.zeros(3, 64))) == len(layers)
        model(**packed)
    assert calls[len(layers) :] == ["infer"]


@pytest.mark.parametrize("backend", ["sdpa", pytest.param("triton", marks=INTERPRETED)])
@pytest.mark.usefixtures("poisoned")
def test_layers_of_several_numbers_of_heads_share_no_memory_that_does_not_fit(trusted, backend):
    """As pruned ones have them: each layer's products are of its own size."""
    trusted(norm=["triton"])
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    layers = []
    for heads in (2, 1, 3, 3):
        of_norm, of_qkv = (1 + 0.1 * draw(48), draw(48)), (0.1 * draw(heads * 24, 48), draw(heads * 24))
        first = fused.NormQKV(*of_norm, *of_qkv * 3)
        second = fused.ProjectMLP(
            0.1 * draw(48, heads * 24), draw(48), *of_norm, 0.1 * draw(80, 48), draw(80), 0.1 * draw(48, 80), draw(48)
        )
        layers.append(fused.LayerWeights(first, second, (1e-6, 1e-6), 24))
    x, attention = draw(20, 48), attention_within([13, 1, 6], backend)
    expected = x.double()
    for first, second, *_ in layers:
        exact = fused.LayerWeights(*(type(w)(*[y.double() for y in w]) for w in (first, second)), (1e-6, 1e-6), 24)
        expected = fused.layer(exact, expected, attention_within([13, 1, 6], "eager"))
    for some in (x, x[:0]):
        out = fused.infer(layers, some, attention if len(some) else attention_within([], backend))
        assert (out.shape == some.shape and relative_error(out, expected[: len(some)]) <= 1e-5) or not len(some)


def test_fused_layers_round_no_more_than_the_modules(checkpoint, patches):
    packed = PackedPatches(patches(GRIDS, 768), GRIDS)
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("base"))
    exact = Siglip2PackedVisionModel.from_pretrained(checkpoint("base"), dtype=torch.float64)
    with torch.no_grad():
        expected = exact(**packed).last_hidden_state

        def error(**kwargs):
            return (model(**packed, **kwargs).last_hidden_state - expected).norm().item()

        with called(model):
            of_modules = error()
        assert 0 < error() <= 1.15 * of_modules  # infer
        assert error(output_hidden_states=True) <= 1.15 * of_modules  # layer


def test_a_graph_that_is_kept_gives_the_same_gradients_again(model, patches):
    out = model(**PackedPatches(patches(GRIDS), GRIDS)).last_hidden_state.square().sum()
    parameters = [p for name, p in model.named_parameters() if "layers" in name]
    first, again, last = (torch.autograd.grad(out, parameters, retain_graph=keep) for keep in (True, True, False))
    assert all(torch.equal(x, y) for other in (again, last) for x, y in zip(first, other))


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_the_last_backward_works_in_the_memory_of_wide(model, monkeypatch, backend):
    """GELU's output, the sum before layer_norm2, gradients of q, k and v; not while the graph is kept."""
    block, kept, written = widened(model.encoder.layers[0], 224), [], []
    x, backward = torch.randn(12, 64), VarlenAttention.backward
    monkeypatch.setattr(VarlenAttention, "backward", lambda *args: (written.append(args[-1]), backward(*args)))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = fused.layer(block.plain_weights(x), x, attention_within([12], backend)).sum()
    (wide,) = (x for x in kept if x.shape == (12, 224))
    before = wide.clone()
    out.backward(retain_graph=True)
    assert torch.equal(wide, before)
    out.backward()
    assert not torch.equal(wide, before)
    own_memory = [dqkv.untyped_storage().data_ptr() != wide.untyped_storage().data_ptr() for dqkv in written]
    assert own_memory == ([True, False] if backend == "triton" else [])


def test_batched_gradients_are_those_of_each_alone(model):
    x, parameters = torch.randn(12, 64), list(model.encoder.parameters())
    out, _ = model.encoder(x.requires_grad_(), attention_within([5, 7], "sdpa"))
    grads = torch.randn(3, 12, 64)
    batched = torch.autograd.grad(out, [x, *parameters], grads, retain_graph=True, is_grads_batched=True)
    for i, grad in enumerate(grads):
        for ours, one in zip(batched, torch.autograd.grad(out, [x, *parameters], grad, retain_graph=True)):
            torch.testing.assert_close(ours[i], one, rtol=1e-4, atol=1e-4)


def test_own_kernels_say_that_they_take_one_gradient_at_a_time(model):
    x = torch.randn(12, 64, requires_grad=True)
    fused_layers, _ = model.encoder(x, attention_within([5, 7], "triton"))
    q = torch.randn(12, 2, 32, requires_grad=True)
    for out, of in ((fused_layers, x), (attention_within([5, 7], "triton")(q, q, q), q)):
        with pytest.raises(RuntimeError, match="is_grads_batched: own attention kernels take one gradient at a time"):
            torch.autograd.grad(out, [of], torch.randn(3, *out.shape), is_grads_batched=True)


def test_backward_within_autocast_is_in_the_dtype_of_forward(model):
    out = model.encoder(torch.randn(12, 64), attention_within([5, 7], "sdpa"))[0].square().sum()
    parameters = list(model.encoder.layers[-1].mlp.parameters())
    expected = torch.autograd.grad(out, parameters, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        out.backward()
    assert all(torch.equal(p.grad, exact) for p, exact in zip(parameters, expected))


def test_float64_is_not_rounded(model, patches):
    packed, model = PackedPatches(patches(GRIDS).double(), GRIDS), model.double()
    with called(model):
        expected, expected_grads = gradients(model, packed)
    out, grads = gradients(model, packed)
    with torch.no_grad():
        features = model(**packed).last_hidden_state
    assert relative_error(out, expected) <= 1e-13 and relative_error(features, expected) <= 1e-13
    largest = max(g.norm() for g in expected_grads.values())
    assert all((grads[name] - g).norm() <= 1e-13 * largest for name, g in expected_grads.items())


@pytest.fixture
def norms(monkeypatch):
    """The norms that `infer` was given."""
    seen, infer = [], fused.infer
    monkeypatch.setattr(fused, "infer", lambda *args: (seen.append(args[3:]), infer(*args))[1])
    return seen


def test_the_norm_at_the_end_is_the_modules(model, patches, norms):
    """In one pass with the last sum, or called where something hangs on it."""
    packed, seen = PackedPatches(patches(GRIDS), GRIDS), []
    nn.init.normal_(model.post_layernorm.weight)
    with torch.no_grad():
        out = model(**packed).last_hidden_state
        model.post_layernorm.register_forward_hook(lambda *_: seen.append(1))
        assert relative_error(out, model(**packed).last_hidden_state) <= 1e-6
    (first,), second = norms
    assert len(seen) == 1 and second == ()
    assert first.weight is model.post_layernorm.weight and first.bias is model.post_layernorm.bias
    assert first.eps == model.post_layernorm.eps


def test_the_norm_at_the_end_learns_over_a_frozen_encoder(model, patches):
    packed = PackedPatches(patches(GRIDS), GRIDS)
    model.requires_grad_(False).post_layernorm.requires_grad_(True)
    with called(model):
        _, expected = gradients(model, packed)
    _, grads = gradients(model, packed)
    assert set(grads) == {"post_layernorm.weight", "post_layernorm.bias"} == set(expected)
    assert all(relative_error(grads[name], expected[name]) <= 1e-5 for name in grads)


def test_what_hangs_on_the_norm_at_the_end_learns_over_a_frozen_tower(model, patches):
    packed, scale = PackedPatches(patches(GRIDS), GRIDS), nn.Parameter(torch.ones(()))
    model.requires_grad_(False).post_layernorm.register_forward_hook(lambda module, args, out: out * scale)
    features = model(**packed).last_hidden_state
    features.square().sum().backward()
    assert scale.grad.item() == pytest.approx(2 * features.square().sum().item(), rel=1e-5)


def test_a_hook_on_the_encoder_sees_the_sum_before_the_norm(model, patches, norms):
    packed, seen = PackedPatches(patches(GRIDS), GRIDS), []
    model.encoder.register_forward_hook(lambda module, args, out: seen.append(out[0].clone()))
    with torch.no_grad():
        out = model(**packed).last_hidden_state
        (before,) = seen
        expected = model(**packed, output_hidden_states=True).hidden_states[-1]
        assert relative_error(before, expected) <= 1e-6 and relative_error(out, model.post_layernorm(before)) <= 1e-6
    assert norms == [()]


def test_an_encoder_of_another_class_is_called(model, patches):
    class Rolled(type(model.encoder)):
        def forward(self, *args):
            hidden_states, states = super().forward(*args)
            return hidden_states.roll(1, 1), states

    packed = PackedPatches(patches(GRIDS), GRIDS)
    nn.init.normal_(model.post_layernorm.weight)
    with torch.no_grad():
        expected = model.post_layernorm(model(**packed, output_hidden_states=True).hidden_states[-1].roll(1, 1))
        model.encoder.__class__ = Rolled
        assert relative_error(model(**packed).last_hidden_state, expected) <= 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "frozen", [(), ("weight",), ("bias",), ("q_proj", "fc1", "fc2.bias"), ("norm", "out_proj")], ids=str
)
@pytest.mark.parametrize("width", [40, 128, 224])
def test_a_layer_in_one_function_is_the_layer_in_three(model, device, frozen, width):
    """Around our own attention; gradients of what wants some, a second time where the graph is kept."""
    block = widened(model.encoder.layers[1], width).to(device)
    for name, parameter in block.named_parameters():
        nn.init.normal_(parameter, std=0.2)
        parameter.requires_grad_(not any(part in name for part in frozen))
    wanted = {name: p for name, p in block.named_parameters() if p.requires_grad}
    x, grad = (torch.randn(26, 64, generator=torch.Generator().manual_seed(i)).to(device) for i in range(2))
    found = []
    for backend, needs_x in (("triton", True), ("eager", True), ("triton", False)):
        leaf = x.clone().requires_grad_(needs_x)
        inputs = [*wanted.values(), *[leaf] * needs_x]
        out = fused.layer(block.plain_weights(leaf), leaf, attention_within([5, 1, 20], backend, device))
        assert (out.grad_fn.name() == "_LayersBackward") == (backend == "triton")
        found.append([out.detach(), *torch.autograd.grad(out, inputs, grad, retain_graph=True)])
        for again, first in zip(torch.autograd.grad(out, inputs, grad), found[-1][1:]):
            assert torch.equal(again, first)
    for i, (name, one) in enumerate(zip(["out", *wanted, "x"], found[0])):
        three = found[1][i]
        assert (one - three).norm() <= 1e-5 * three.norm() + 1e-4 * ("k_proj.bias" in name), name
        if name != "x":
            assert torch.equal(found[2][i], one), name


def test_checkpointed_layers_are_called(calls):
    model = Siglip2PackedVisionModel(Siglip2VisionConfig(**SHAPES["tiny"]))
    model.gradient_checkpointing_enable()
    packed = PackedPatches(torch.randn(9, model.config.patch_size**2 * 3), [(1, 3, 3)])
    model(**packed)
    assert calls == ["train"] * len(model.encoder.layers)
    model.eval()(**packed)
    assert calls[len(model.encoder.layers) :] == ["train"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_takes_rows_that_were_kept_from_a_function_transform(model, trusted, device):
    """Around our own kernels, all of which need the rows' memory."""
    trusted(norm=["triton"])
    block, kept = model.encoder.layers[0].to(device), []
    x = torch.randn(26, 64, generator=torch.Generator().manual_seed(0)).to(device)
    torch.func.grad(lambda x: (kept.append(x * 1), x.sum())[1])(x)
    attention = attention_within([5, 1, 20], "triton", device)
    assert torch.equal(block(kept[0], attention), block(x, attention))


def functions_of(block, x):
    """A layer's two parts as functions of rows: (function, how many rows it takes)."""
    first, second, (eps1, eps2), _ = block.plain_weights(x)
    by = for_training(x, len(second.fc1_bias), gradients=True)
    return [
        (lambda x: fused._NormQKV.apply(x, by, eps1, *first), 1),
        (lambda x, attended: fused._ProjectMLP.apply(x, attended, by, eps2, *second), 2),
    ]


def test_second_derivatives_are_refused(model):
    x = torch.randn(12, 64, requires_grad=True)
    whole = model.encoder.layers[0]
    at_once = lambda x: fused.layer(whole.plain_weights(x), x, attention_within([12], "triton"))[None]  # noqa: E731
    for function, takes in (*functions_of(whole, x), (at_once, 1)):
        out = function(*[x] * takes)
        (grad,) = torch.autograd.grad(out[-1].square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_the_callers_input_is_left_alone(model):
    x = torch.randn(12, 64)
    kept = x.clone()
    with torch.no_grad():
        model.encoder(x, attention_within([12], "sdpa"))
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    "frozen",
    ["norms", "all but the last layer", "all but biases"]
    + [f"all but {name}" for name in ("fc1", "k_proj", "v_proj.bias", "fc2.weight", "fc2.bias", "out_proj.weight")],
)
def test_frozen_parameters_get_no_gradient_and_others_the_right_one(model, patches, frozen):
    chosen = {
        "all but the last layer": lambda name: "layers.2." in name,
        "all but biases": lambda name: name.endswith("bias"),
        "norms": lambda name: "layer_norm" not in name,
    }.get(frozen, lambda name: frozen.removeprefix("all but ") in name)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name))
    packed = PackedPatches(patches(GRIDS), GRIDS)
    _, grads = gradients(model, packed)
    with called(model):
        _, expected = gradients(model, packed)
    assert all(chosen(name) for name in grads)
    close(grads, expected)


def hook_module(model):
    seen = []
    model.encoder.layers[1].mlp.fc1.register_forward_hook(lambda *args: seen.append(1))
    return lambda: len(seen)


def hook_layer(model):
    seen = []
    model.encoder.layers[1].register_forward_pre_hook(lambda *args: seen.append(1))
    return lambda: len(seen)


def replace_forward(model):
    norm, seen = model.encoder.layers[1].layer_norm2, []
    forward = norm.forward
    norm.forward = lambda x: seen.append(1) or forward(x)
    return lambda: len(seen)


def wrap_linear(model):
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.seen = base, 0

        def forward(self, x):
            self.seen += 1
            return self.base(x)

    attention = model.encoder.layers[1].self_attn
    attention.q_proj = Adapted(attention.q_proj)
    return lambda: attention.q_proj.seen


def subclass(part):
    """Another class with the same children, as somebody's own attention, MLP or layer may be."""

    def change(model):
        layer = model.encoder.layers[1]
        module, seen = layer if part == "layer" else getattr(layer, part), []

        class Own(type(module)):
            def forward(self, *args):
                seen.append(1)
                return super().forward(*args)

        module.__class__ = Own
        return lambda: len(seen)

    change.__name__ = f"subclass_{part}"
    return change


def wrap(part):
    """Another module around it, as checkpoint wrappers are."""

    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.seen = inner, 0

        def forward(self, *args):
            self.seen += 1
            return self.inner(*args)

    def change(model):
        if part == "layer":
            model.encoder.layers[1] = wrapped = Wrapped(model.encoder.layers[1])
        else:
            wrapped = Wrapped(getattr(model.encoder.layers[1], part))
            setattr(model.encoder.layers[1], part, wrapped)
        return lambda: wrapped.seen

    change.__name__ = f"wrap_{part}"
    return change


PARTS = "layer", "self_attn", "mlp"


@pytest.mark.parametrize(
    "change", [hook_module, hook_layer, replace_forward, wrap_linear, *map(subclass, PARTS), *map(wrap, PARTS)]
)
def test_what_hangs_on_a_module_runs(model, patches, change):
    packed = PackedPatches(patches(GRIDS), GRIDS)
    expected = model(**packed).last_hidden_state
    seen = change(model)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            before = seen()
            out = model(**packed).last_hidden_state
        assert seen() == before + 1
        assert relative_error(out, expected) <= 1e-6


def test_joined_projections_are_the_same_parameters(model, patches, tmp_path):
    packed = PackedPatches(patches(GRIDS), GRIDS)
    with torch.no_grad():
        expected = model(**packed).last_hidden_state
    parameters = dict(model.named_parameters())
    join_projections(model.encoder)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    attention = model.encoder.layers[0].self_attn

    def are_joined(model):
        """Whether one product reads the three parameters where they lie."""
        first, *_ = model.encoder.layers[0].plain_weights(torch.zeros(1, 64))
        parts = zip(fused._joined(first), (first.q_weight, first.q_bias))
        return [joined.data_ptr() == q.data_ptr() for joined, q in parts]

    assert are_joined(model) == [True, True]
    with torch.no_grad():
        assert torch.equal(model(**packed).last_hidden_state, expected)
        attention.k_proj.weight.data.mul_(2)
        changed = model(**packed).last_hidden_state
        assert not torch.equal(changed, expected)

    model.save_pretrained(tmp_path / "joined")
    again = Siglip2PackedVisionModel.from_pretrained(tmp_path / "joined")
    with torch.no_grad():
        assert torch.equal(again(**packed).last_hidden_state, changed)
    moved = model.to(torch.float64).to(torch.float32)
    assert are_joined(moved) == [False, False]
    with torch.no_grad():
        assert torch.equal(moved(**packed).last_hidden_state, changed)


def test_joined_projections_are_saved_by_accelerate(model, tmp_path):
    """Of tensors in one storage it saves the first and drops the others."""
    expected = {name: x.clone() for name, x in model.state_dict().items()}
    join_projections(model.encoder)
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], x) for name, x in expected.items())


def test_joined_projections_live_as_long_as_one_of_them(model):
    join_projections(model.encoder)
    attention = copy.deepcopy(model).encoder.layers[0].self_attn
    assert torch.equal(attention.v_proj.weight, model.encoder.layers[0].self_attn.v_proj.weight)
    attention = model.encoder.layers[0].self_attn
    joined = weakref.ref(fused._joined_memory[attention.q_proj.weight.data_ptr()])
    value, expected = attention.v_proj.weight.detach(), attention.v_proj.weight.clone()
    model.to(torch.float64)
    gc.collect()
    assert joined() is not None
    assert torch.equal(value, expected)
    del value
    gc.collect()
    assert joined() is None


def test_joined_projections_may_be_transposed_in_place(model, patches):
    packed = PackedPatches(patches(GRIDS), GRIDS)
    other = copy.deepcopy(model)
    join_projections(model.encoder)
    for each in (model, other):
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(each.encoder.layers[0].self_attn, name).weight
            weight.data = weight.data.t()
    with torch.no_grad():
        assert torch.equal(model(**packed).last_hidden_state, other(**packed).last_hidden_state)


def test_joined_projections_stay_where_they_are(model):
    """Graphs that somebody has captured read them there."""
    join_projections(model.encoder)
    places = [p.data_ptr() for p in model.parameters()]
    join_projections(model.encoder)
    assert [p.data_ptr() for p in model.parameters()] == places


def test_projections_without_memory_are_not_joined(model):
    model.to("meta").cuda_graphs_enable()
    assert not fused._joined_memory.get(0)
    assert all(p.is_meta for p in model.parameters())


def test_what_is_joined_in_inference_mode_trains(model, patches):
    packed = PackedPatches(patches(GRIDS), GRIDS)
    _, expected = gradients(model, packed)
    with torch.inference_mode():
        join_projections(model.encoder)
    _, grads = gradients(model, packed)
    assert all(torch.equal(grads[name], grad) for name, grad in expected.items())
    attention = model.encoder.layers[0].self_attn
    assert attention.k_proj.weight.data_ptr() == attention.q_proj.weight.data_ptr() + attention.q_proj.weight.nbytes


def test_projections_are_joined_again_when_others_come_where_the_first_weight_was(model):
    """As the allocator may have it of a model that went to the CPU and came back."""
    attention, kept = model.encoder.layers[0].self_attn, model.embeddings.patch_embedding.weight.data_ptr()
    for _ in range(2):
        model._settle()
        places = [getattr(attention, name).weight.data_ptr() for name in ("q_proj", "k_proj", "v_proj")]
        assert places == [places[0] + number * attention.q_proj.weight.nbytes for number in range(3)]
        model._apply(lambda x: x if x.data_ptr() == kept else x.clone())


def test_a_second_thread_waits_until_projections_are_joined(model, monkeypatch):
    started, go, join = threading.Event(), threading.Event(), fused.join

    def slow(*parameters):
        started.set()
        assert go.wait(10)
        join(*parameters)

    monkeypatch.setattr(fused, "join", slow)
    first, second = (threading.Thread(target=model._settle) for _ in range(2))
    first.start()
    assert started.wait(10)
    second.start()
    second.join(0.3)
    assert second.is_alive()
    go.set()
    first.join(), second.join()


def test_parameters_in_a_flat_buffer_stay_there(model):
    """DeepSpeed's and FSDP's write to the buffer."""
    attention = model.encoder.layers[0].self_attn
    projections = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    flat = torch.cat([x.detach().flatten() for x in projections])
    for parameter, part in zip(projections, flat.chunk(3)):
        parameter.data = part.view(parameter.shape)
    join_projections(model.encoder)
    flat.zero_()
    assert not any(x.any() for x in projections)


def test_parameters_that_others_see_stay_there(model):
    """FSDP2 gathers into the memory of parameters that it made once; another module may be tied by `.data`."""
    projections = [getattr(model.encoder.layers[0].self_attn, name).weight for name in ("q_proj", "k_proj", "v_proj")]
    seen = projections[1].detach()
    join_projections(model.encoder)
    seen.zero_()
    assert not projections[1].any()
    del seen
    join_projections(model.encoder)
    assert projections[1].data_ptr() == projections[0].data_ptr() + projections[0].nbytes


@pytest.mark.parametrize("few", [20, 21])
def test_training_keeps_no_output_of_norm_or_gelu(model, monkeypatch, few):
    """Of a layer's activations autograd holds the stream, attention's inputs and output, and fc1's output.

    Of few rows also attention's projected output, which backward would have to make again.
    """
    monkeypatch.setattr(choice, "KEPT_ROWS", few)
    block, rows = model.encoder.layers[0], 21
    projected = [(64,)] * (rows <= few)
    parameters = {p.data_ptr() for p in model.parameters()}
    x = torch.randn(rows, 64, requires_grad=True)

    def kept(function, *args):
        """Columns of what autograd holds but parameters."""
        columns = []

        def keep(x):
            columns.extend([x.shape[1:]] * (x.data_ptr() not in parameters))
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            function(*args)
        return columns

    (first, _), (second, _) = functions_of(block, x)
    width = block.mlp.fc1.out_features
    assert kept(first, x) == [(64,)]
    assert kept(second, x, torch.randn(rows, 64)) == [(64,), (64,), (width,), *projected]
    attention = attention_within([rows], "triton")
    heads, head_dim = 64 // block.self_attn.head_dim, block.self_attn.head_dim
    qkv, log_sum_exp = (3, heads, head_dim), (rows,)
    at_once = kept(fused.layer, block.plain_weights(x), x, attention)
    assert at_once == [(64,), qkv, (heads, head_dim), log_sum_exp, (width,), *projected]


@pytest.mark.gpu
def test_a_forward_on_a_device_joins_projections_once(checkpoint, patches):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny72"), dtype=torch.bfloat16)
    packed = PackedPatches(patches(GRIDS), GRIDS).to("cuda")

    def forward(model):
        """Features, and where the projections lie."""
        with torch.no_grad():
            features = model(**packed).last_hidden_state
        return features, [p.data_ptr() for p in model.encoder.layers[0].self_attn.parameters()]

    def are_joined(model):
        first, *_ = model.encoder.layers[0].plain_weights(torch.zeros(1, 144, dtype=torch.bfloat16))
        return fused._joined(first)[0].data_ptr() == first.q_weight.data_ptr()

    model = model.to("cuda")
    expected, places = forward(model)
    assert are_joined(model) and torch.equal(forward(model)[0], expected) and forward(model)[1] == places
    for other in (copy.deepcopy(model), model.cpu().to("cuda")):
        assert not are_joined(other)
        features, _ = forward(other)
        assert are_joined(other) and torch.equal(features, expected)
