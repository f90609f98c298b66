"""Whether kernels may be launched at once, or calls have to go through operators that others can follow."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

BATCHED = [
    getattr(torch._C._functorch, name)
    for name in ("is_batchedtensor", "is_legacy_batchedtensor")
    if hasattr(torch._C._functorch, name)
]


def traced() -> bool:
    """Whether somebody follows calls to operators: torch.compile, a dispatch mode, a function transform."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or transformed()


def backward_followed() -> str | None:
    """Who has to see each operation of a backward, or what it keeps until then; None: nobody."""
    if torch.is_anomaly_enabled():
        return "anomaly detection looks at the gradients of each operation"
    if torch._C._autograd._top_saved_tensors_default_hooks(True):
        return "hooks on saved tensors, as checkpoint's and save_on_cpu's, have to see what each operation keeps"
    return None


def transformed() -> bool:
    """Whether torch.func transforms calls (grad, jvp, vmap), or they carry tangents (`forward_ad.dual_level`).

    Not every operator has rules for all of them.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def no_tangent(*tensors: Tensor) -> None:
    """RuntimeError for one that carries a tangent (`torch.func.jvp`), which an operator would drop."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(
            "own attention kernels have no derivative in forward mode (torch.func.jvp, forward_ad); with "
            "attn_implementation='sdpa' there is one"
        )


def alive(x: Tensor) -> Tensor:
    """x itself, also where it was kept from within a function transform that has ended: kernels need its memory."""
    return torch._C._functorch.unwrap_if_dead(x)  # type: ignore[no-any-return]


def batched(x: Tensor) -> bool:
    """Whether x is one of torch.func.vmap's tensors, or of `is_grads_batched=True`: no kernel has its memory."""
    return True in [is_batched(x) for is_batched in BATCHED]


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: nothing may be compiled, compared or waited for."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
