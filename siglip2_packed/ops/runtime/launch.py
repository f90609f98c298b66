"""Launching Triton kernels: on which device, with which compiled kernel, from tensors that they can read."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable
from operator import attrgetter, or_
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1

next_power_of_2 = functools.cache(triton.next_power_of_2)  # Triton's own takes a third of a launch


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def readable(*tensors: Tensor) -> list[Tensor]:
    """Each itself if its rows lie in pieces of 16 bytes from where it begins, else a contiguous copy."""
    found = []
    for x in tensors:
        *outer, inner = x.stride()
        whole = inner == 1 and math.gcd(8, *outer) == 8
        found.append(x if whole else x.clone(memory_format=torch.contiguous_format))
    return found


def outer_strides(*tensors: Tensor) -> list[int]:
    """Of the first two dimensions, in pieces of 16 bytes, which tells the compiler that they are whole pieces."""
    return [stride // 8 for x in tensors for stride in x.stride()[:2]]


def device_of(x: Tensor):
    """A context in which kernels launch on x's device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def launch(kernel, grid: tuple, tensors: tuple[Tensor, ...], numbers: tuple, constants: tuple, **options: int) -> None:
    """`kernel[grid](*tensors, *numbers, *constants, **options)` on the tensors' device, looked for once.

    The search for the compiled kernel that fits costs the host more than all else in a launch. It is left out where
    what the search goes by is the same: devices, dtypes, alignment to 16 bytes, constants (constexprs, and integers
    that kernels are specialized on) and options. Integers among `numbers` must be marked `do_not_specialize`.

    Raises:
        ValueError: the tensors are not all on one CUDA device.
    """
    if INTERPRETED:
        kernel[grid](*tensors, *numbers, *constants, **options)
        return
    places = [*map(Tensor.data_ptr, tensors)]
    aligned = functools.reduce(or_, places) % 16 == 0
    key = id(kernel), constants, *options.items(), *map(Tensor.get_device, tensors), *map(_dtype, tensors)
    compiled = _compiled.get(key) if aligned else None
    if compiled is None:
        if len({x.device for x in tensors}) > 1:
            raise ValueError(f"a kernel's tensors must be on one device, got {[str(x.device) for x in tensors]}")
        with device_of(tensors[0]):
            compiled = Compiled.of(kernel.warmup(*tensors, *numbers, *constants, grid=grid, **options))
        if aligned:
            _compiled[key] = compiled
    run_compiled(compiled, grid, tensors[0].get_device(), (*places, *numbers, *constants))


class Compiled(NamedTuple):
    """A compiled kernel, loaded on the current device: `launch(*grid, stream, *fixed, *arguments)`."""

    launch: Callable
    fixed: tuple
    spread: bool = True
    """Or `launch(*grid, stream, *fixed, arguments)`."""
    whole: Any = None
    """What Triton compiled; once nobody holds it, Triton (3.9, not 3.6) unloads the function that is in `fixed`."""

    @classmethod
    def of(cls, compiled: Any) -> Compiled:
        """By Triton's function in C if possible, which its launcher calls with the same `fixed` each time."""
        run = compiled.run
        fixed = compiled.function, compiled.packed_metadata, None, None, None
        try:
            noting, noted = copy.copy(run), []
            noting.launch = lambda *given: noted.extend(given)
            if run.global_scratch_size == run.profile_scratch_size == 0:
                noting(*_GRID_AND_STREAM, *fixed, _ARGUMENT)
            *first, last = noted
        except (AttributeError, TypeError, ValueError):  # another Triton than those of 3.5 to 3.9
            return cls(run, fixed, whole=compiled)
        if tuple(first[:4]) != _GRID_AND_STREAM or last not in (_ARGUMENT, (_ARGUMENT,)):
            return cls(run, fixed, whole=compiled)
        return cls(run.launch, tuple(first[4:]), last == _ARGUMENT, compiled)


_GRID_AND_STREAM, _ARGUMENT = ("x", "y", "z", "stream"), "argument"


def run_compiled(compiled: Compiled, grid: tuple, device: int, arguments: tuple) -> None:
    """Launches it on the device's current stream, without what Triton does for launch hooks.

    Tensors among the arguments may be given by their places in memory, which Triton then does not look up.
    """
    if device < 0:
        raise ValueError("kernels of our own run on CUDA devices, the tensors are not on one")
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            run_compiled(compiled, grid, device, arguments)
        return
    stream = torch._C._cuda_getCurrentRawStream(device)
    launch, fixed, spread, _ = compiled
    if spread:
        launch(*grid, stream, *fixed, *arguments)
    else:
        launch(*grid, stream, *fixed, arguments)


_dtype = attrgetter("dtype")
_compiled: dict[tuple, Compiled] = {}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
