"""DistributedDataParallel averages a step's gradients once all of them are there. Says so if some never come."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

MESSAGE = (
    "DistributedDataParallel waits for the gradients of {names}, which this loss does not reach: it did not average "
    "the others of this step over ranks, and will raise in the next. Where token features alone are trained, load with "
    "vision_use_head=False (or select_layer), or freeze what is idle; or give find_unused_parameters=True"
)


_seen: WeakSet[nn.Module] = WeakSet()
"""Models whose first step under DDP is over: not on the models, whose copies have one of their own."""


def _softly(function: Callable[..., None]) -> Callable[..., None]:
    """Says nothing where torch no longer has its private names, or has them otherwise: a warning is worth no step."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> None:
        with contextlib.suppress(AttributeError, TypeError):
            function(*args)

    return wrapped


@torch.compiler.disable
@_softly
def watch_first_step(model: nn.Module, output: Mapping[str, Any]) -> None:
    """Called in a model's forward: warns after the first backward under DDP that left a trainable parameter out.

    The first step goes wrong without a word, and only the second one raises, which names no parameter.
    """
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if wrapper is None or not torch.is_grad_enabled() or model in _seen:
        return
    if wrapper.find_unused_parameters or wrapper.static_graph or not wrapper.require_backward_grad_sync:
        return
    asked = False

    @_softly
    def when_done(gradient: Tensor) -> None:
        nonlocal asked
        if not asked:
            asked = True
            Variable._execution_engine.queue_callback(lambda: _say_what_is_idle(model, wrapper))

    for value in output.values():
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(when_done)


@_softly
def _say_what_is_idle(model: nn.Module, wrapper: DistributedDataParallel) -> None:
    if model in _seen:
        return
    _seen.add(model)
    ignored = {id(p) for name, p in wrapper.module.named_parameters() if name in wrapper.parameters_to_ignore}
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None and id(p) not in ignored]
    if idle:
        names = ", ".join(idle[:2]) + (f" and {len(idle) - 2} more" if len(idle) > 2 else "")
        warnings.warn(MESSAGE.format(names=names))
