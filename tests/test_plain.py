"""Is a module what its class says? Only then are its parameters taken instead of its calls."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from siglip2_packed import Siglip2PackedVisionModel, plain

X = torch.zeros(3, 8)


@contextlib.contextmanager
def removed(handle):
    try:
        yield
    finally:
        handle.remove()


def hooked_everywhere(register, *hook):
    return lambda: removed(register(*hook))


FOLLOWED = {
    "a global forward hook": hooked_everywhere(nn.modules.module.register_module_forward_hook, lambda *_: None),
    "a global pre-hook": hooked_everywhere(nn.modules.module.register_module_forward_pre_hook, lambda *_: None),
    "a global backward hook": hooked_everywhere(nn.modules.module.register_module_full_backward_hook, lambda *_: None),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "a dispatch mode": lambda: FlopCounterMode(display=False),
}


@pytest.mark.parametrize("how", FOLLOWED)
def test_calls_that_somebody_follows_are_made(how):
    assert not plain.watched(X)
    with FOLLOWED[how]():
        assert plain.watched(X)
    assert not plain.watched(X)


def test_so_are_those_of_transforms_and_compilation():
    seen = []

    def follow(x):
        seen.append(plain.watched(x))
        return x

    torch.func.vmap(follow)(X)
    torch.func.grad(lambda x: follow(x).sum())(X)
    torch.compile(lambda x: x + plain.watched(x), backend="eager", fullgraph=True)(X)
    assert seen == [True, True]
    assert torch.equal(torch.compile(lambda x: x + plain.watched(x), backend="eager")(X), X + 1)


def test_autocast_of_another_device_or_switched_off_is_none():
    with torch.autocast("cpu", enabled=False):
        assert not plain.watched(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert not plain.watched(X.to("meta"))


def forward_hook(module):
    module.register_forward_hook(lambda *_: None)


def forward_pre_hook(module):
    module.register_forward_pre_hook(lambda *_: None)


def backward_hook(module):
    module.register_full_backward_hook(lambda *_: None)


def backward_pre_hook(module):
    module.register_full_backward_pre_hook(lambda *_: None)


def replaced_forward(module):
    module.forward = module.forward


def compiled(module):
    module.compile(backend="eager")


HOOKS = [forward_hook, forward_pre_hook, backward_hook, backward_pre_hook, replaced_forward, compiled]


@pytest.mark.parametrize("hang", HOOKS)
def test_a_module_that_something_hangs_on_is_called(hang):
    module = nn.Linear(8, 8)
    assert plain.unhooked(module)
    hang(module)
    assert not plain.unhooked(module)
    assert plain.weights((module, nn.Linear), dtype=torch.float32) is None


def test_a_hook_that_is_gone_again_is_none():
    module = nn.Linear(8, 8)
    with removed(module.register_forward_hook(lambda *_: None)):
        assert not plain.unhooked(module)
    assert plain.unhooked(module)


def test_weights_come_in_turn():
    linear, norm = nn.Linear(8, 4), nn.LayerNorm(8)
    found = plain.weights((linear, nn.Linear), (norm, nn.LayerNorm), dtype=torch.float32)
    assert [id(x) for x in found] == [id(x) for x in (linear.weight, linear.bias, norm.weight, norm.bias)]
    linear.weight.requires_grad_(False)
    linear.bias = nn.Parameter(torch.zeros(4))
    assert plain.weights((linear, nn.Linear), dtype=torch.float32)[1] is linear.bias
    assert plain.weights((linear, nn.Linear), dtype=torch.bfloat16) is None


class Sharded(torch.Tensor):
    """A tensor that is not all there, as DTensor, or a quantised one, as torchao has them."""


class Adapted(nn.Linear):
    """LoRA's, bitsandbytes': their weight does not tell all."""


class Wrapped(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base


def of_a_subclass(module):
    module.__class__ = Adapted


def sharded_weight(module):
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Sharded))


def sharded_bias(module):
    module.bias = nn.Parameter(module.bias.detach().as_subclass(Sharded))


def weight_of_another_dtype(module):
    module.weight = nn.Parameter(module.weight.detach().bfloat16())


def bias_of_another_dtype(module):
    module.bias = nn.Parameter(module.bias.detach().bfloat16())


def no_bias(module):
    module.bias = None


def view_over_the_weight(module):
    """FSDP1 in forward: a plain attribute in the place of the parameter."""
    weight = module.weight.detach()
    del module._parameters["weight"]
    module.__dict__["weight"] = weight


def view_beside_the_weight(module):
    """FSDP1's views, the parameter left where it was."""
    module.__dict__["weight"] = module.weight.detach()


def parametrized(module):
    nn.utils.parametrizations.weight_norm(module)


CHANGES = [
    of_a_subclass,
    sharded_weight,
    sharded_bias,
    weight_of_another_dtype,
    bias_of_another_dtype,
    no_bias,
    view_over_the_weight,
    view_beside_the_weight,
    parametrized,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", [0, 1])
def test_weights_that_do_not_tell_all_are_none(change, place):
    modules = [nn.Linear(8, 8), nn.Linear(8, 8)]
    kinds = [(module, nn.Linear) for module in modules]
    assert plain.weights(*kinds, dtype=torch.float32) is not None
    change(modules[place])
    assert plain.weights(*kinds, dtype=torch.float32) is None


def test_a_wrapped_or_missing_module_has_none():
    assert plain.weights((Wrapped(nn.Linear(8, 8)), nn.Linear), dtype=torch.float32) is None
    assert plain.weights((nn.Identity(), nn.LayerNorm), dtype=torch.float32) is None
    assert plain.weights((nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm), dtype=torch.float32) is None
    assert plain.weights((None, nn.Linear), dtype=torch.float32) is None


def test_what_learns():
    frozen, trained = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)
    assert plain.learns(frozen, trained) and not plain.learns(frozen) and not plain.learns()
    with torch.no_grad():
        assert not plain.learns(trained)


# Of a whole model


LEAVES = ["layer_norm1", "layer_norm2", *[f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")], "mlp.fc1", "mlp.fc2"]
WITHIN = ["self_attn", "mlp", "mlp.activation_fn"]


@pytest.fixture
def model(checkpoint):
    return Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))


@pytest.mark.parametrize("name", [*LEAVES, *WITHIN])
@pytest.mark.parametrize("hang", [forward_hook, backward_hook, replaced_forward, compiled])
def test_a_layer_looks_at_each_of_its_modules(model, name, hang):
    x, layer = torch.zeros(3, 64), model.encoder.layers[1]
    assert layer.plain_weights(x) is not None
    hang(layer.get_submodule(name))
    assert layer.plain_weights(x) is None
    with torch.no_grad():
        assert model.encoder.plain_weights(x) is None


@pytest.mark.parametrize("name", LEAVES)
def test_and_at_each_of_its_weights(model, name):
    x = torch.zeros(3, 64)
    for part in ("weight", "bias"):
        module = model.encoder.layers[0].get_submodule(name)
        whole = getattr(module, part)
        setattr(module, part, nn.Parameter(whole.detach().as_subclass(Sharded)))
        assert model.encoder.layers[0].plain_weights(x) is None
        setattr(module, part, whole)
        assert model.encoder.layers[0].plain_weights(x) is not None
    assert model.encoder.layers[0].plain_weights(x.double()) is None


def test_the_encoder_computes_at_once(model):
    x = torch.zeros(3, 64)
    assert model.encoder.learns(x)
    with torch.no_grad():
        assert not model.encoder.learns(x.requires_grad_())
        assert len(model.encoder.plain_weights(x)) == 3
    model.requires_grad_(False)
    assert model.encoder.learns(x)  # x wants one
    assert not model.encoder.learns(x.detach())
    assert model.encoder.plain_weights(x.detach()) is not None
    model.encoder.layers[1].gradient_checkpointing = True
    assert model.train().encoder.plain_weights(x) is None
    with torch.no_grad():
        assert model.encoder.plain_weights(x) is not None
    assert model.eval().encoder.plain_weights(x) is not None
    forward_hook(model.encoder.layers[2])  # of no concern within the layer, which is called
    assert model.encoder.layers[2].plain_weights(x) is not None
    assert model.encoder.plain_weights(x.detach()) is None
