"""float16 ends at 65,504: features beyond it are said once a model, without waiting for the device."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from siglip2_packed.ops.runtime.tracing import capturing, traced

logger = logging.getLogger("siglip2_packed")


class _Copied(NamedTuple):
    total: Tensor
    """On the host, once `done`."""
    done: torch.cuda.Event


_waiting: WeakKeyDictionary[nn.Module, _Copied | None] = WeakKeyDictionary()
_said: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.compiler.disable
def watch(model: nn.Module, output: BaseModelOutput) -> None:
    """Warns, once a model, of features in float16 (or computed under its autocast) that are not finite.

    On the CPU at once. On CUDA their sum goes to pinned memory, and is looked at in a later call, when it has arrived;
    until then no other is sent. Nothing is looked at while a CUDA graph is captured or somebody follows the calls.
    """
    last: Tensor = output.last_hidden_state  # type: ignore[assignment]
    device = last.device
    if not _in_float16(last) or model in _said or device.type not in ("cpu", "cuda") or traced():
        return
    features = [output[name] for name in ("last_hidden_state", "pooler_output") if name in output]
    if any(type(x) is not Tensor for x in features) or capturing(device):
        return
    if device.type == "cpu":
        _look(model, _total(features))
        return
    sent = _waiting.get(model)
    if sent is not None and not sent.done.query():
        return
    if sent is not None:
        _look(model, sent.total)
    total = torch.empty((), dtype=torch.float32, device="cpu", pin_memory=True)
    with torch.cuda.device(device):
        total.copy_(_total(features), non_blocking=True)
        done = torch.cuda.Event()
        done.record()
    _waiting[model] = _Copied(total, done)


def _in_float16(x: Tensor) -> bool:
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) == torch.float16
    return x.dtype == torch.float16


@torch.no_grad()
def _total(features: Sequence[Tensor]) -> Tensor:
    """Not finite if any of the features is not: as many numbers of float16 as memory holds do not overflow float32."""
    return sum(x.detach().sum(dtype=torch.float32) for x in features)  # type: ignore[return-value]


def _look(model: nn.Module, total: Tensor) -> None:
    if not total.isfinite():
        _said[model] = True
        _waiting.pop(model, None)
        logger.warning(
            "%s: features are not finite. It computes in float16, which ends at 65,504, and activations of SigLIP2 go "
            "beyond: take bfloat16 (dtype=torch.bfloat16, or autocast to it), or float32",
            type(model).__name__,
        )
