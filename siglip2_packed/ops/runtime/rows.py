"""A row in registers: a tuple of blocks of W columns, the last filled up with zeros.

A single block would have to be a power of two wide: 1152 columns would be the work of 2048.

Shapes: D columns of a row.
"""

# mypy: disable-error-code="assignment"
# (a tuple grows where Triton unrolls the loop)

import functools

import triton
import triton.language as tl


@functools.cache
def cut(D: int, at_once: int, most: int) -> tuple[int, int]:
    """W and the warps of a row: a thread has `at_once` columns of a block, side by side, and at most `most` in all."""
    warps = 1
    while 32 * warps * most < D and warps < 32:
        warps *= 2
    return min(32 * warps * at_once, triton.next_power_of_2(D)), warps


@triton.jit
def read(row, D: tl.constexpr, W: tl.constexpr):
    """The row `[D]` at a pointer, in float32."""
    blocks = ()
    for first in tl.static_range(0, D, W):
        columns = first + tl.arange(0, W)
        if first + W <= D:
            block = tl.load(row + columns)
        else:
            block = tl.load(row + columns, mask=columns < D, other=0.0)
        blocks += (block.to(tl.float32),)
    return blocks


@triton.jit
def write(row, blocks, D: tl.constexpr, W: tl.constexpr):
    """In the dtype of where it goes."""
    for i in tl.static_range(len(blocks)):
        columns = i * W + tl.arange(0, W)
        block = blocks[i].to(row.dtype.element_ty)
        if i * W + W <= D:
            tl.store(row + columns, block)
        else:
            tl.store(row + columns, block, mask=columns < D)


@triton.jit
def zeros(D: tl.constexpr, W: tl.constexpr):
    blocks = ()
    for _ in tl.static_range(0, D, W):
        blocks += (tl.zeros([W], tl.float32),)
    return blocks


@triton.jit
def add(a, b):
    blocks = ()
    for i in tl.static_range(len(a)):
        blocks += (a[i] + b[i],)
    return blocks


@triton.jit
def multiply(a, b):
    blocks = ()
    for i in tl.static_range(len(a)):
        blocks += (a[i] * b[i],)
    return blocks


@triton.jit
def shifted(a, by):
    """a + a number."""
    blocks = ()
    for i in tl.static_range(len(a)):
        blocks += (a[i] + by,)
    return blocks


@triton.jit
def scaled(a, by):
    """a times a number."""
    blocks = ()
    for i in tl.static_range(len(a)):
        blocks += (a[i] * by,)
    return blocks


@triton.jit
def each(a, function: tl.constexpr):
    """A function of every column."""
    blocks = ()
    for i in tl.static_range(len(a)):
        blocks += (function(a[i]),)
    return blocks


@triton.jit
def rounded(a, dtype: tl.constexpr):
    blocks = ()
    for i in tl.static_range(len(a)):
        blocks += (a[i].to(dtype).to(tl.float32),)
    return blocks


@triton.jit
def total(a):
    """The sum of its columns."""
    sums = a[0]
    for i in tl.static_range(1, len(a)):
        sums += a[i]
    return tl.sum(sums, 0)


@triton.jit
def largest(a):
    """The largest magnitude in it."""
    most = tl.abs(a[0])
    for i in tl.static_range(1, len(a)):
        most = tl.maximum(most, tl.abs(a[i]))
    return tl.max(most, 0)


@triton.jit
def normalise(h, eps, D: tl.constexpr, W: tl.constexpr):
    """(h - mean) / sqrt(variance + eps), zeros where filled up, and 1 / sqrt(variance + eps)."""
    mean = total(h) / D
    centred = ()
    for i in tl.static_range(len(h)):
        block = h[i] - mean
        if i * W + W > D:
            block = tl.where(i * W + tl.arange(0, W) < D, block, 0.0)
        centred += (block,)
    scale = tl.rsqrt(total(multiply(centred, centred)) / D + eps)
    return scaled(centred, scale), scale
