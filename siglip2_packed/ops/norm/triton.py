"""LayerNorm in Triton, together with the element-wise work around it: residual add, bias, recomputation in backward.

Rows are read once, in float32, whatever the dtype; the time is that of reading and writing the tensors.

Shapes: T rows, D columns in blocks of W, G programs of a backward.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip2_packed.ops.runtime import rows
from siglip2_packed.ops.runtime.fold import fold
from siglip2_packed.ops.runtime.launch import launch, multiprocessors


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    waiting: Tensor | None = None,
    late: Tensor | None = None,
    place: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `norm.eager`; with `late` x + (waiting + late) is not rounded before it is normalised."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if place is None else place[0]
    if late is None:
        _launch(x, weight, bias, eps, out)
        return out, None
    if x.shape[0] == 0:
        return out, late.to(torch.float32, copy=True) if waiting is None else waiting + late
    total = torch.empty(late.shape, dtype=torch.float32, device=x.device) if place is None else place[1]
    _launch(x, weight, bias, eps, out, add=late, carry=waiting, total=total)
    return out, total


def add_layer_norm(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """See `norm.eager`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(out)
    _launch(x, weight, bias, eps, out, update=update, add=shift, total=total)
    return out, total


def layer_norm_backward_(
    grad: Tensor,
    residual: Tensor,
    x: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    place: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `norm.eager`. Rows of update are read before those of place, which may be update, are written."""
    assert grad.is_contiguous()
    assert place is None or place.is_contiguous()
    T, D = x.shape
    residual, x, weight, bias = residual.contiguous(), x.contiguous(), weight.contiguous(), bias.contiguous()
    out = torch.empty_like(x) if place is None else place
    update = None if update is None else update.contiguous()
    programs = min(max(1, T), 4 * multiprocessors(x.device))
    width, warps = _cut_for_training(D)
    stages = 3 if D * x.element_size() <= 6144 else 1  # rows under way take twelve times that of shared memory
    sums = torch.empty((programs, 2 if update is None else 4, D), dtype=torch.float32, device=x.device)
    launch(
        backward_kernel,
        (programs, 1, 1),
        (grad, residual, x, x if update is None else update, weight, bias, out, sums),
        (T, float(eps)),
        (D, width, update is not None, stages),
        num_warps=warps,
    )
    return out, fold(sums.flatten(1), x.dtype).view(-1, D)


@functools.cache
def _cut_for_training(D: int) -> tuple[int, int]:
    """One for forward and backward, where the forward's output is made again: to the bit, as sums go the same way."""
    return rows.cut(D, at_once=4, most=20)


def _launch(x, weight, bias, eps, out, update=None, add=None, carry=None, total=None):
    T, D = x.shape
    if T == 0:
        return
    x = x.contiguous()
    inference = add is not None and update is None
    width, warps = rows.cut(D, at_once=8, most=36) if inference else _cut_for_training(D)
    launch(
        forward_kernel,
        (T, 1, 1),
        (
            x,
            x if update is None else update.contiguous(),
            x if add is None else add.contiguous(),
            x if carry is None else carry.contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            out,
            x if total is None else total,
        ),
        (float(eps),),
        (D, width, update is not None, add is not None, carry is not None),
        num_warps=warps,
    )


@triton.jit
def forward_kernel(
    x,
    update,
    add,
    carry,
    weight,
    bias,
    out,
    total,
    eps,
    D: tl.constexpr,
    W: tl.constexpr,
    UPDATE: tl.constexpr,
    ADD: tl.constexpr,
    CARRY: tl.constexpr,
):
    """out = LayerNorm(h) of one row.

    UPDATE: h = x + update, and total = h + add, rows both. Else, with ADD: h = x + total, total = carry + add.
    """
    row = tl.program_id(0).to(tl.int64) * D
    h = rows.read(x + row, D, W)
    if ADD:
        a = rows.read(add, D, W)
        if CARRY:
            a = rows.add(a, rows.read(carry, D, W))
        if UPDATE:
            h = rows.add(h, rows.read(update + row, D, W))
            rows.write(total + row, rows.add(h, a), D, W)
            h = rows.rounded(h, x.dtype.element_ty)
        else:
            h = rows.add(h, a)
            if row == 0:
                rows.write(total, a, D, W)
    normed, _ = rows.normalise(h, eps, D, W)
    scaled = rows.multiply(normed, rows.read(weight, D, W))
    rows.write(out + row, rows.add(scaled, rows.read(bias, D, W)), D, W)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    grad,
    residual,
    x,
    update,
    weight,
    bias,
    out,
    sums,
    T,
    eps,
    D: tl.constexpr,
    W: tl.constexpr,
    UPDATE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program takes every G-th row, the next ones under way. dh overwrites grad, column sums stay in registers:
    of grad * normed, grad, and with an update of dh and residual.
    """
    dweight, dbias = rows.zeros(D, W), rows.zeros(D, W)
    dh_sum, residual_sum = rows.zeros(D, W), rows.zeros(D, W)
    for number in tl.range(tl.program_id(0), T, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(number, tl.int64) * D
        h = rows.read(x + row, D, W)
        g = rows.read(grad + row, D, W)
        r = rows.read(residual + row, D, W)
        if UPDATE:
            h = rows.rounded(rows.add(h, rows.read(update + row, D, W)), x.dtype.element_ty)
        normed, scale = rows.normalise(h, eps, D, W)
        w = rows.read(weight, D, W)
        rows.write(out + row, rows.add(rows.multiply(normed, w), rows.read(bias, D, W)), D, W)
        dweight = rows.add(dweight, rows.multiply(g, normed))
        dbias = rows.add(dbias, g)
        # dh = residual + scale * (g w - mean(g w) - normed * mean(g w normed))
        g = rows.multiply(g, w)
        mean, along = rows.total(g) / D, rows.total(rows.multiply(g, normed)) / D
        g = rows.add(rows.shifted(g, -mean), rows.scaled(normed, -along))
        dh = rows.add(r, rows.scaled(g, scale))
        rows.write(grad + row, dh, D, W)
        if UPDATE:
            dh_sum = rows.add(dh_sum, dh)
            residual_sum = rows.add(residual_sum, r)
    sums += tl.program_id(0) * (4 * D if UPDATE else 2 * D)
    rows.write(sums, dweight, D, W)
    rows.write(sums + D, dbias, D, W)
    if UPDATE:
        rows.write(sums + 2 * D, dh_sum, D, W)
        rows.write(sums + 3 * D, residual_sum, D, W)
