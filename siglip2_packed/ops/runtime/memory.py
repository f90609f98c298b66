"""Tensors that lie in memory which other tensors hold."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


def shared(x: Tensor) -> bool:
    """Whether other tensors have the memory of x as well, or may have, where torch does not count them."""
    users = getattr(torch._C, "_storage_Use_Count", None)
    alone = x.new_empty(1)
    return users is None or users(x.untyped_storage()._cdata) > users(alone.untyped_storage()._cdata)


class _Place:
    """What torch asks of foreign memory on a CUDA device (the CUDA array interface), which it holds like a tensor's."""

    def __init__(self, x: Tensor, holds: object):
        address = x.data_ptr(), False
        self.__cuda_array_interface__ = {"shape": (x.nbytes,), "typestr": "|u1", "data": address, "version": 3}
        self.holds = holds


def alias(x: Tensor, holds: object = None) -> Tensor:
    """x, contiguous and not empty, in the same memory under a storage of its own.

    That storage holds `holds`, and so what `holds` holds; it does not hold x's.
    """
    assert x.is_contiguous()
    if x.is_cuda:
        flat = torch.as_tensor(_Place(x, holds), device=x.device)
    else:
        place = (ctypes.c_uint8 * x.nbytes).from_address(x.data_ptr())
        place.holds = holds  # type: ignore[attr-defined]
        flat = torch.frombuffer(place, dtype=torch.uint8)
    return flat.view(x.dtype).view(x.shape)
