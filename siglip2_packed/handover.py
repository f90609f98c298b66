"""Weights change hands between two models of the same names, one of ours and one of transformers'.

What computes with weights (linear layers, norms, tables, an adapter or a quantised layer in the place of one) is one
module for both, and stays what it is. Only the modules around those have twins, of another class, in the other model:
what would be lost with one of them, or would see other tensors in its twin, is refused by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from siglip2_packed.embeddings import makes_inputs_require_grad

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
SETTINGS = "training", "gradient_checkpointing", "_gradient_checkpointing_func", "_is_hf_initialized"
"""What a module has of its twin."""
Twins = Mapping[type[nn.Module], type[nn.Module]]


def hand_over(source: nn.Module, target: nn.Module, twins: Twins, name: str) -> None:
    """The target gets all weights and settings of the source, which keeps them, too.

    Args:
        twins: for each class of the target's modules that have twins, that of the twin in the source.
        name: the source's in the model around it.

    Raises:
        ValueError: what has no place in the target, by name. Nothing has changed then.
    """
    for theirs, ours in list(_pairs(source, target, twins, name)):
        ours._parameters.update((key, p) for key, p in theirs._parameters.items() if p is not None)
        ours._buffers.update((key, theirs._buffers[key]) for key in theirs._non_persistent_buffers_set)
        ours._non_persistent_buffers_set |= theirs._non_persistent_buffers_set
        kept = {key: m if type(m) in twins else theirs._modules[key] for key, m in ours._modules.items()}
        ours._modules.clear()
        ours._modules.update(
            (key, kept[key]) for key in sorted(kept, key=list(theirs._modules).index)
        )  # in their order
        for setting in SETTINGS:
            if setting in vars(theirs):
                setattr(ours, setting, vars(theirs)[setting])
        _place_alike(theirs, ours)


def check_whole(model: nn.Module, tower: nn.Module, name: str) -> None:
    """ValueError if the tower's weights are sharded over ranks by something that knows its modules."""
    sharded = next((key for key, p in tower.named_parameters() if isinstance(p, DTensor)), None)
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is sharded by FSDP1, which knows the tower's modules: shard it later")
    if sharded is not None:
        raise ValueError(
            f"{_path(name, sharded)} is a DTensor, and FSDP2 or tensor parallel knows its module: shard the model later"
        )


def _pairs(source: nn.Module, target: nn.Module, twins: Twins, name: str) -> Iterator[tuple[nn.Module, nn.Module]]:
    """A module, its twin, and those inside: checked."""
    _check_call(source, name)
    for table in ("_parameters", "_buffers", "_modules"):
        given, expected = (
            {k for k, part in vars(m)[table].items() if part is not None} - m._non_persistent_buffers_set
            for m in (source, target)
        )
        if given != expected:
            raise ValueError(
                f"{name or 'the model'}: {table[1:]} are {sorted(given)}, expected {sorted(expected)}, as in a "
                f"{type(target).__name__}"
            )
    yield source, target
    for key, twin in vars(target)["_modules"].items():
        if type(twin) not in twins:
            continue
        child, path = vars(source)["_modules"][key], _path(name, key)
        if type(child) is not twins[type(twin)]:
            raise ValueError(
                f"{path} is a {type(child).__name__}, expected a {twins[type(twin)].__name__}: what else it does would "
                "be lost. Wrap or change the model later"
            )
        _check_hooks(child, path)
        yield from _pairs(child, twin, twins, path)


def _check_hooks(module: nn.Module, name: str) -> None:
    """ValueError for hooks, which a twin would show other tensors: packed rows instead of padded ones, or back."""
    tables = (vars(module)[table].values() for table in (*HOOKS, "_load_state_dict_pre_hooks"))
    for hook in itertools.filterfalse(_is_idle, filter(callable, itertools.chain.from_iterable(tables))):
        raise ValueError(
            f"{name} has a hook, {getattr(hook, '__qualname__', hook)}, which would see other tensors in the module "
            "that takes its place: remove it, and hang it there later"
        )


def _is_idle(hook: Any) -> bool:
    """Whether its module keeps it and its twin needs none: what records outputs for those who ask for them, and what
    reentrant checkpointing, which there is not in ours, wants."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing" or makes_inputs_require_grad(hook)


def _check_call(module: nn.Module, name: str) -> None:
    """ValueError for a module that is called otherwise than its class says."""
    own = vars(module).get("forward")
    replaced = own is not None and getattr(own, "__func__", None) is not type(module).forward
    if (replaced and "_hf_hook" not in vars(module)) or module._compiled_call_impl is not None:
        raise ValueError(f"{name or 'the model'} has a forward of its own, or is compiled: replace or compile it later")


def _place_alike(source: Any, target: Any) -> None:
    """The target runs where accelerate has placed the source (`device_map`)."""
    if "_hf_hook" not in vars(source) or "_hf_hook" in vars(target):
        return
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(target, ModelHook())  # the source's own would place the weights once more
    target._hf_hook = source._hf_hook


def _path(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
