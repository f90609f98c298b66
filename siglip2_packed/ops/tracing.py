"""Whether kernels may be launched at once, or calls have to go through operators that others can follow."""

import torch


def traced() -> bool:
    """Whether somebody follows calls to operators: torch.compile, a dispatch mode, a function transform."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )
