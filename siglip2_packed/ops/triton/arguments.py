"""What Triton operators do with their arguments: checks, strides, the card's capability, launches.

Shapes: T rows, S segments, H heads, K head_dim.
"""

import contextlib
import functools
import importlib
import logging
import math
from typing import Any

import torch
import triton
from torch import Tensor

logger = logging.getLogger("siglip2_packed")

LOG2_E = math.log2(math.e)
# gelu(u) = u (1 + tanh z) / 2 = u sigmoid(2z), z = sqrt(2/pi) (u + 0.044715 u^3): 2z is SLOPE u + CUBIC u^3
GELU_SLOPE = 2 * 0.7978845608028654
GELU_CUBIC = GELU_SLOPE * 0.044715
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1

next_power_of_2 = functools.cache(triton.next_power_of_2)  # Triton's own take a third of a launch each


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def check_rows(**tensors: Tensor) -> None:
    (first, x), *others = tensors.items()
    for name, y in tensors.items():
        if y.ndim != 3:
            raise ValueError(f"{name} must be [T, H, K], got {list(y.shape)}")
        if y.stride(-1) != 1:
            raise ValueError(f"{name}'s last dimension must be contiguous, got stride {y.stride(-1)}")
    for name, y in others:
        if y.shape != x.shape:
            raise ValueError(f"{name} must have the shape of {first}, {list(x.shape)}, got {list(y.shape)}")
        if y.dtype != x.dtype or y.device != x.device:
            raise ValueError(f"{name} is {y.dtype} on {y.device}, {first} is {x.dtype} on {x.device}")


def check(x: Tensor, cu_seqlens: Tensor, max_seqlen: int, softmax_scale: float | None) -> float:
    """The softmax scale, once all else is valid."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype must be bfloat16, float16 or float32, got {x.dtype}")
    if not (x.is_cuda or INTERPRETED):
        raise ValueError(f"Triton attention needs CUDA tensors (or TRITON_INTERPRET=1), got {x.device}")
    head_dim = x.shape[-1]
    if head_dim % 8 or not 8 <= head_dim <= 128:
        raise ValueError(f"head_dim must be a multiple of 8 from 8 to 128, got {head_dim}")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be [S+1] int32, got {list(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if cu_seqlens.stride(0) != 1:
        raise ValueError(f"cu_seqlens must be contiguous, got stride {cu_seqlens.stride(0)}")
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, the inputs are on {x.device}")
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt)):
        raise ValueError(f"max_seqlen must be a Python int, got {type(max_seqlen).__name__}")
    scale = head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
    if not scale > 0:
        raise ValueError(f"softmax_scale must be positive, got {softmax_scale}")
    return scale


def aligned(x: Tensor) -> Tensor:
    """x itself if the kernels can read it in 16-byte pieces, else a copy."""
    ok = x.stride(-1) == 1 and all(stride % 8 == 0 for stride in x.stride()[:-1])
    return x if ok else x.clone(memory_format=torch.contiguous_format)


def strides(*tensors: Tensor) -> list[int]:
    return [stride // 8 for x in tensors for stride in x.stride()[:2]]


def capability(x: Tensor) -> int:
    """Compute capability, 90 for an H100."""
    return _capability(x.device.index) if x.is_cuda else 0


@functools.cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def hopper_kernels(module: str):
    """Kernels in Gluon, which came with Triton 3.6 and is not a settled language; None if they cannot be had."""
    try:
        return importlib.import_module(f"siglip2_packed.ops.triton.{module}")
    except Exception as error:
        logger.warning("no %s with Triton %s: %s", module, triton.__version__, error)
        return None


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
