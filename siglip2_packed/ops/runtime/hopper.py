"""What kernels for Hopper (compute capability 9.0) share: Gluon's copy engine (TMA), under the names it has here, and
launches that give kernels descriptors of tiles.

Gluon came with Triton 3.6 and is not a settled language: importing this fails where it is another.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.nvidia import driver
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from siglip2_packed.ops.runtime.launch import Compiled, device_of, run_compiled

# renamed after Triton 3.6
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_memory = gl.shared_memory_descriptor
reinterpret = _memory.reinterpret if hasattr(_memory, "reinterpret") else _memory._reinterpret


@builtin
def _add(target, coordinates, x, _semantic=None):
    where = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, target.handle, where, x.handle)


add = tma.async_atomic_add if hasattr(tma, "async_atomic_add") else _add  # Triton 3.6 has no name for it


def in_reach(*tensors: Tensor) -> list[Tensor]:
    """Each itself if the copy engine brings its rows, which begin at multiples of 16 bytes, else a contiguous copy."""
    found = []
    for x in tensors:
        *outer, inner = x.stride()
        reached = inner == 1 and x.data_ptr() % 16 == 0 and 0 not in outer and math.gcd(8, *outer) == 8
        found.append(x if reached else x.clone(memory_format=torch.contiguous_format))
    return found


class Tiles(NamedTuple):
    """What the copy engine brings of a tensor at once, and how it lies in shared memory."""

    box: list[int]
    layout: Any


class Launcher:
    """A kernel compiled for arguments of one kind: `launcher(grid, arguments)`.

    It is given tensors, all on one device; of those that the kernel takes tiles of it gets descriptors.

    Args:
        arguments: some that it may be launched with.
        tiles: for each argument, from the first on, its tiles, or None.
    """

    def __init__(self, kernel: Any, arguments: Sequence, tiles: Sequence[Tiles | None], **options: int):
        described = list(arguments)
        self._kinds: list[Any] = [_PLACE if isinstance(x, Tensor) else None for x in arguments]
        for i, (x, tile) in enumerate(zip(arguments, tiles)):
            if x is not None and tile is not None:
                described[i], self._kinds[i] = _described(TensorDescriptor, x, tile), tile
        with device_of(arguments[0]):
            compiled = kernel.warmup(*described, grid=(1,), **options)
            self._compiled = Compiled.of(compiled)
        past_encoding = _past_encoding(self._compiled.launch)
        if past_encoding is not None and compiled.metadata.tensordesc_meta:
            self._compiled = self._compiled._replace(launch=past_encoding)
            metadata = iter(compiled.metadata.tensordesc_meta)
            self._kinds = [Descriptors.of(next(metadata), x) if type(x) is Tiles else x for x in self._kinds]

    def __call__(self, grid: tuple, arguments: Sequence) -> None:
        device, given = arguments[0].get_device(), []
        for x, kind in zip(arguments, self._kinds):
            if x is None or kind is None:
                given.append(x)
            elif x.get_device() != device:
                raise ValueError(f"a kernel's tensors must be on one device, got {arguments[0].device} and {x.device}")
            elif kind is _PLACE:
                given.append(x.data_ptr())
            elif type(kind) is Descriptors:
                given += kind[x.data_ptr(), x.shape, x.stride()]
            else:
                given.append(_described(_Unchecked, x, kind))
        run_compiled(self._compiled, grid, device, tuple(given))


class Descriptors(dict):
    """What a launch takes for tiles of one kind, by `(place in memory, shape, strides)` of the tensor.

    A descriptor holds nothing but these, dtype and box: one that is kept is right for whatever lies there.
    """

    kinds: ClassVar[dict[str, Descriptors]] = {}
    MOST = 1 << 13

    @classmethod
    def of(cls, metadata: dict, tiles: Tiles) -> Descriptors:
        """Those that are encoded alike are shared by all kernels."""
        return cls.kinds.setdefault(repr(metadata), cls(metadata, tiles))

    def __init__(self, metadata: dict, tiles: Tiles):
        self.metadata, self.tiles = metadata, tiles

    def __missing__(self, key: tuple) -> Sequence:
        place, shape, strides = key
        if len(self) >= self.MOST:
            self.clear()
        base: Any = SimpleNamespace(data_ptr=lambda: place)
        descriptor = _Unchecked(base, list(shape), list(strides), *self.tiles)
        self[key] = encoded = driver.make_tensordesc_arg(descriptor, self.metadata, *_LAUNCH)
        return encoded


class _Unchecked(TensorDescriptor):
    def __post_init__(self):
        """No checks of the arguments: they cost more than the rest of a launch."""


_PLACE = object()

_KNOWN = hasattr(driver, "make_tensordesc_arg")
_LAUNCH = [None] * (len(inspect.signature(driver.make_tensordesc_arg).parameters) - 2) if _KNOWN else []
"""What Triton's encoding takes besides, from 3.7 on: the launch, which it does not look at."""


def _described(kind: type[TensorDescriptor], x: Tensor, tiles: Tiles) -> TensorDescriptor:
    return kind(x, list(x.shape), list(x.stride()), *tiles)


def _past_encoding(launch: Callable) -> Callable | None:
    """What launches a kernel behind Triton's step that encodes all descriptors anew; None if there is no such step.

    That step is a function around the launching one, which is no part of Triton's interface (3.6 to 3.9 have it).
    """
    if not _KNOWN or not inspect.isfunction(launch):
        return None
    return inspect.getclosurevars(launch).nonlocals.get("launcher")
