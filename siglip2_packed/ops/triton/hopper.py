"""What the attention kernels for Hopper (compute capability 9.0, in Gluon) share.

Shapes: T rows, H heads, K head_dim.

A tile is 64 rows of a head: 64 lanes and, for K = 72, a tail of 16. The copy engine (TMA) brings it into shared memory
and fills lanes outside [0, K) and rows outside [0, T) with zeros. Odd heads of K = 72 start in the middle of a 32-byte
sector: they have the tail in front, from lane -8, so that main tiles are always whole sectors.

A work item is a block of rows of one head of one segment. Thread blocks stay resident and draw items from an atomic
counter, long segments first, so that lengths may be mixed. In each, one warp (the producer) walks cu_seqlens to find
the items that it draws, brings their tiles, and tells the warpgroups that compute (the consumers) in a message in
shared memory which item it is.
"""

import functools
import itertools
import logging

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

logger = logging.getLogger("siglip2_packed")

TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 3))  # as TMA writes it: [64 rows, 1 head, lanes]
TILE_TAIL = gl.constexpr(gl.NVMMASharedLayout(32, 16, 3))
ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
ACC_TAIL = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16]))
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 16-byte pieces of rows
ROWS_TAIL = gl.constexpr(gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0]))

# renamed after Triton 3.6
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def cut(head, K: gl.constexpr):
    """First lanes of the main tile and of the tail."""
    odd = head % 2 * ((K - 64) % 16)
    return odd, 64 - odd * (K // 8)


@gluon.jit
def write(message, at, value):
    message.index(at).store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def read(message, at):
    return gl.sum(message.index(at).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def tell(message, place, first, length, head, row):
    """Which item the consumers have next: the segment's first row and length, the head, the item's row in it."""
    write(message, 4 * place, first)
    write(message, 4 * place + 1, length)
    write(message, 4 * place + 2, head)
    write(message, 4 * place + 3, row)
    barrier()


@gluon.jit
def walk(
    bring: gl.constexpr, source, tiles, bars, cu_seqlens, counter, S, H, blocks,
    K: gl.constexpr, WGS: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Numbers the items of WGS * 64 rows and has `bring` bring those that fall to this thread block; returns how many.

    blocks: items of max_seqlen rows. The counter is zero before and after.
    """
    item = gl.program_id(0)
    turn = 0  # items taken
    count = 0  # tiles brought, as `bring` counts them
    begin = 0  # number of the segment's first item
    last = gl.load(cu_seqlens + S)
    left = last  # rows whose items are not numbered yet
    for late in range(2):  # the segments of more than half of max_seqlen, then the others
        segment = 0
        first = 0
        while (first < last) & (left > 0):
            length = gl.load(cu_seqlens + segment + 1) - first
            own = (length + 64 * WGS - 1) // (64 * WGS)  # blocks of this segment
            if (2 * own <= blocks) == (late == 1):
                left -= length
                end = begin + own * H
                while item < end:
                    head = (item - begin) // own
                    row = (item - begin) % own * (64 * WGS)
                    count = bring(source, tiles, bars, first, length, head, row, turn, count, K, WGS, RING)
                    turn += 1
                    item = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
                begin = end
            first += length
            segment += 1
    if item == gl.num_programs(0) + begin - 1:  # one number was drawn for each item, this is the last
        gl.store(counter, 0)
    return turn


# Launches that may overlap must not share a work counter: eager ones take turns; one captured in a CUDA graph, which
# may run at any time, keeps its own for good.
EAGER, COUNTERS = 1 << 14, 1 << 18
_eager, _captured = itertools.count(), itertools.count()


def eager_slot() -> int:
    """The work counter of a launch that no graph captures."""
    return next(_eager) % EAGER


def free_slot(capturing: bool) -> int | None:
    """The work counter of a launch; None if graphs have taken all."""
    slot = EAGER + next(_captured) if capturing else eager_slot()
    return slot if slot < COUNTERS else None


@functools.cache
def counters(device: torch.device) -> Tensor:
    zeros = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    torch.cuda.synchronize(device)  # launches on other streams count on the zeros
    return zeros


class UncheckedDescriptor(TensorDescriptor):
    def __post_init__(self):
        """No checks of the arguments: they cost more than the rest of a launch."""


def descriptors(kind: type[TensorDescriptor], *tensors: Tensor) -> list[TensorDescriptor | None]:
    """Of each `[T, H, K]`, those of its tiles and of their tails, or None at K = 64."""
    found: list[TensorDescriptor | None] = []
    for x in tensors:
        shape, strides = list(x.shape), list(x.stride())
        found.append(kind(x, shape, strides, [64, 1, 64], TILE.value))
        found.append(kind(x, shape, strides, [64, 1, 16], TILE_TAIL.value) if shape[-1] > 64 else None)
    return found


def fits(*tensors: Tensor) -> bool:
    """Whether TMA can bring tiles of `arguments.aligned` tensors, for which there is a kernel."""
    dtype, K = tensors[0].dtype, tensors[0].shape[-1]
    if dtype not in (torch.bfloat16, torch.float16) or K not in (64, 72):
        return False
    # rows that begin at a multiple of 16 bytes, and not one row for all
    return not any(x.dtype != dtype or x.data_ptr() % 16 or min(x.stride()) <= 0 for x in tensors)


def checked(kernel: str, attempt, device: torch.device, dtype: torch.dtype, *rest):
    """What `attempt`, given the other arguments, has compiled; None, after a warning, if that fails or is wrong.

    It returns the compiled and the relative error of its results, NaN if some are missing.
    """
    bound = 1e-2 if dtype == torch.bfloat16 else 2e-3
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cuda", enabled=False):
            compiled, error = attempt(device, dtype, *rest)
        reason = None if error <= bound else f"relative error {error:.1e}"
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernel
    except Exception as exception:  # whatever a compiler raises is the reason
        reason = f"{type(exception).__name__}: {exception}"
    if reason is None:
        return compiled
    logger.warning("no Hopper %s in %s: %s", kernel, dtype, reason)
    return None
