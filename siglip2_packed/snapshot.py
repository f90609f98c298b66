"""Is a model what it was when its graphs were captured? They read its weights where they lay, and call no module."""

from __future__ import annotations

import copy
import operator
import sys
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from siglip2_packed import plain
from siglip2_packed.attention import Siglip2PackedAttention
from siglip2_packed.embeddings import Siglip2PackedEmbeddings, made_to_require_grad
from siglip2_packed.encoder import GELU_TANH, Siglip2PackedEncoder, Siglip2PackedEncoderLayer, Siglip2PackedMLP
from siglip2_packed.pooling import PoolingAttention, Siglip2PackedPoolingHead

HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
CALLS = {"forward", "_compiled_call_impl"}
"""What a module has of its own only where calling it is not calling its class's forward."""
KNOWN = {
    Siglip2PackedEmbeddings, Siglip2PackedEncoder, Siglip2PackedEncoderLayer, Siglip2PackedAttention, Siglip2PackedMLP,
    Siglip2PackedPoolingHead, PoolingAttention, GELU_TANH, nn.Linear, nn.LayerNorm, nn.Embedding, nn.ModuleList,
    NonDynamicallyQuantizableLinear,
}  # fmt: skip
"""Modules that compute the same as long as their parts are the same."""


class Snapshot:
    """The parts of a model, and where its tensors lie: they are kept, and what else there comes to lie is seen."""

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        held = [(table, name, part) for m in modules for table in _tables(m) for name, part in table.items()]
        self._tables, self._names, self._parts = zip(*held)
        self._tensors = [part for part in self._parts if isinstance(part, Tensor)]
        self._places = [x.data_ptr() for x in self._tensors]
        self._contiguous = [x.is_contiguous() for x in self._tensors]
        self.memory = [x.detach() for x in self._tensors]
        """What graphs read, also when the model has other tensors in their place."""
        hooks = [vars(m)[name] for m in modules[1:] for name in HOOKS]
        self._others = [m for m in modules[1:] if type(m) not in KNOWN]
        lists = [m for m in modules if isinstance(m, nn.ModuleList)]
        self._open = [*hooks, *chain.from_iterable(map(_tables, (*lists, *self._others, model)))]
        """Tables in which anything new counts."""
        self._counts = [*map(len, self._open)]
        self._hooked = [table for table in hooks if table]
        self._handles = [*map(tuple, self._hooked)]
        self._norms = [m for m in modules if isinstance(m, nn.LayerNorm)]
        self._eps = [*map(_eps, self._norms)]
        self._states = [vars(m) for m in modules if m is not model]
        self._sizes = [*map(len, self._states)]
        self._called = [*map(CALLS.isdisjoint, self._states)]
        self._parameters = list(model.parameters())
        self._layers = [m for m in modules if isinstance(m, Siglip2PackedEncoderLayer)]
        self._settings = [(vars(m), _settings(m)) for m in self._others]
        self._last: tuple[list, str] = [], ""

    def holds(self) -> bool:
        """Whether every part is the one that it was, in the memory where it was, and nothing new hangs on it."""
        return (
            all(map(operator.is_, map(dict.get, self._tables, self._names), self._parts))
            and [*map(Tensor.data_ptr, self._tensors)] == self._places
            and [*map(Tensor.is_contiguous, self._tensors)] == self._contiguous
            and [*map(len, self._open)] == self._counts
            and [*map(tuple, self._hooked)] == self._handles
            and [*map(_eps, self._norms)] == self._eps
            and self._are_called_alike()
        )

    def _are_called_alike(self) -> bool:
        """Whether no module has got, or lost, a `forward` of its own."""
        sizes = [*map(len, self._states)]
        if sizes == self._sizes:
            return True
        self._sizes = sizes
        return [*map(CALLS.isdisjoint, self._states)] == self._called

    def learns(self) -> bool:
        return any(map(_requires_grad, self._parameters))

    def state(self) -> tuple:
        """What changes how a model computes or learns, and no part of it: graphs are captured for each."""
        return (
            tuple(map(_requires_grad, self._parameters)),
            tuple(map(_training, self._layers)),
            tuple(map(_gradient_checkpointing, self._layers)),
            tuple(map(_training, self._others)),
            self._of_others(),
        )

    def _of_others(self) -> str:
        """What modules that we do not know, adapters say, say of themselves."""
        now = [[len(settings), *map(settings.get, names)] for settings, names in self._settings]
        before, text = self._last
        if now != before:
            text = str(now)
            self._last = copy.deepcopy(now), text
        return text


_requires_grad = operator.attrgetter("requires_grad")
_training = operator.attrgetter("training")
_eps = operator.attrgetter("eps")
_gradient_checkpointing = operator.attrgetter("gradient_checkpointing")


def _tables(module: nn.Module) -> tuple[dict, ...]:
    return module._modules, module._parameters, module._buffers


def _settings(module: nn.Module) -> list[str]:
    """Attributes of plain values, which may tell what a module computes."""
    return [name for name, value in vars(module).items() if name not in INNER and _is_plain(value)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return _is_plain([*value, *value.values()])
    return isinstance(value, (bool, int, float, str, type(None)))


INNER = {*HOOKS, "_modules", "_parameters", "_buffers", *vars(nn.Module())}


def why_not(model: Any, learns: bool) -> str | None:
    """Why graphs of this model, which learns or does not, would not do what calling it does; None if they would."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if type(tensor) not in plain.WHOLE:
            return f"{name} is {type(tensor).__name__}, sharded or quantised"
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.distributed.fsdp"):
            return f"{name} is {type(module).__name__}, which gathers its weights in each call"
        if loose := next((key for key, value in vars(module).items() if isinstance(value, Tensor)), None):
            return f"{name}.{loose} is neither parameter nor buffer, as those that FSDP gathers"
        if name and not plain.unhooked(module) and not _harmless(module, model):
            return f"hooks or a replaced forward on {name} have to run in each call"
    if around := _gathers_around(model):
        return f"{around}, of which this model is a part, gathers its weights in each call"
    return _cannot_learn(model) if learns else None


def _gathers_around(model: Any) -> str | None:
    """FSDP2's type of a module around the model, which within its forward has whole weights, and lets go of them."""
    states = sys.modules.get("torch.distributed._composable_state")
    for module in [] if states is None else list(states._module_state_mapping):
        is_fsdp = any(kind.__module__.startswith("torch.distributed.fsdp") for kind in type(module).__mro__)
        if is_fsdp and any(part is model for part in module.modules()):
            return type(module).__name__
    return None


def _cannot_learn(model: Any) -> str | None:
    """What is differentiated layer by layer."""
    layers, ours = model.encoder.layers, (Siglip2PackedEncoder, Siglip2PackedEncoderLayer)
    for part in (model.encoder, *layers):
        if not isinstance(part, ours):
            return f"{type(part).__name__} is in the place of an encoder or layer of ours"
    again = any(layer.gradient_checkpointing and layer.training for layer in layers)
    if again and any(isinstance(m, nn.Dropout) and m.p and m.training for m in model.modules()):
        return "gradient checkpointing has to draw the same dropout twice"
    return None


def _harmless(module: nn.Module, model: Any) -> bool:
    """The patch embedding with the one hook of `enable_input_require_grads`, which gradients do not need here."""
    only = sum(len(vars(module)[table]) for table in HOOKS) == len(module._forward_hooks) == 1
    own = CALLS.isdisjoint(vars(module)) and module is model.embeddings.patch_embedding
    return only and own and made_to_require_grad(module)
