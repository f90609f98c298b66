"""What kernels for Hopper (compute capability 9.0) share: Gluon's copy engine (TMA), under the names it has here.

Gluon came with Triton 3.6 and is not a settled language: importing this fails where it is another.
"""

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# renamed after Triton 3.6
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


def in_reach(x: Tensor) -> Tensor:
    """x itself if the copy engine can bring its rows, which begin at multiples of 16 bytes; else a contiguous copy."""
    *outer, inner = x.stride()
    if inner == 1 and x.data_ptr() % 16 == 0 and 0 not in outer and sum([stride % 8 for stride in outer]) == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


class UncheckedDescriptor(TensorDescriptor):
    def __post_init__(self):
        """No checks of the arguments: they cost more than the rest of a launch."""
