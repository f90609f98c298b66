"""Launching Triton kernels: on which device, with which compiled kernel, from tensors that they can read."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1

next_power_of_2 = functools.cache(triton.next_power_of_2)  # Triton's own takes a third of a launch


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def readable(x: Tensor) -> Tensor:
    """x itself if its rows lie in pieces of 16 bytes from where it begins, else a contiguous copy."""
    *outer, inner = x.stride()
    if inner == 1 and sum([stride % 8 for stride in outer]) == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def outer_strides(*tensors: Tensor) -> list[int]:
    """Of the first two dimensions, in pieces of 16 bytes, which tells the compiler that they are whole pieces."""
    return [stride // 8 for x in tensors for stride in x.stride()[:2]]


def device_of(x: Tensor):
    """A context in which kernels launch on x's device; as good as free if it is the current one."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def launch(kernel, grid: tuple, tensors: tuple[Tensor, ...], numbers: tuple, constants: tuple, **options: int) -> None:
    """`kernel[grid](*tensors, *numbers, *constants, **options)`, but looks only once for the compiled kernel that fits.

    The search costs the host more than all else in a launch. It is left out where what the search goes by is the same:
    device, dtypes, alignment to 16 bytes, constants (constexprs, and integers that kernels are specialized on) and
    options. Integers among `numbers` must be marked `do_not_specialize`.
    """
    arguments = *tensors, *numbers, *constants
    if INTERPRETED:
        kernel[grid](*arguments, **options)
        return
    key = id(kernel), tensors[0].get_device(), constants, *options.items(), *[x.dtype for x in tensors]
    compiled = None if sum([x.data_ptr() % 16 for x in tensors]) else _compiled.get(key)
    if compiled is None:
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        if not any(x.data_ptr() % 16 for x in tensors):
            _compiled[key] = compiled
    run_compiled(compiled, grid, arguments)


def run_compiled(compiled, grid: tuple, arguments: tuple) -> None:
    """`compiled[grid](*arguments)` on the current device and stream, without what Triton does for launch hooks."""
    driver = triton.runtime.driver.active
    stream = driver.get_current_stream(driver.get_current_device())
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


_compiled: dict[tuple, Any] = {}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
