"""LayerNorm in Triton, together with the element-wise work around it: residual add, bias, recomputation in backward.

Rows are read once, in float32, whatever the dtype; the time is that of reading and writing the tensors.

Shapes: T rows, D columns, G programs of a backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip2_packed.ops.triton.arguments import device_of, launch, multiprocessors


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, offset: Tensor | None) -> Tensor:
    """LayerNorm of x + offset. x `[T, D]`; weight, bias `[D]`; offset `[D]` or None. Returns `[T, D]` in x's dtype."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, None, offset, None, weight, bias, eps, out, None)
    return out


def add_layer_norm(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """LayerNorm of x + update, and x + update + shift. x, update `[T, D]`; weight, bias, shift `[D]`."""
    out, total = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    _launch(x, update, None, shift, weight, bias, eps, out, total)
    return out, total


def layer_norm_backward(
    grad: Tensor, residual: Tensor, x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of out = LayerNorm(h), h = x + update (or x): dh = residual + what flows through the norm, and out once more.

    Args:
        grad: `[T, D]`, of out.
        residual: `[T, D]`, the gradient that reaches h past the norm.

    Returns:
        dh `[T, D]`, out `[T, D]`, and in float32 `[D]` the gradients of weight and bias and the column sums of dh.
    """
    T, D = x.shape
    dx, out = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    grad, residual, x = (y.contiguous() for y in (grad, residual, x))
    update = None if update is None else update.contiguous()
    programs = min(max(1, T), 4 * multiprocessors(x.device))
    sums = torch.empty((programs, 3, D), dtype=torch.float32, device=x.device)
    with device_of(x):
        launch(
            backward_kernel,
            (programs, 1, 1),
            (grad, residual, x, x if update is None else update, weight, bias, dx, out, sums),
            (T, eps),
            (D, triton.next_power_of_2(D), update is not None),
            num_warps=2 if D > 512 else 1,
        )
    dweight, dbias, dx_sum = sums.sum(0)
    return dx, out, dweight.clone(), dbias.clone(), dx_sum.clone()


# The operators, for whom wants to see them; the functions are called without their cost, which is that of a launch.
layer_norm_op = torch.library.custom_op("siglip2_packed::layer_norm", layer_norm, mutates_args=())
add_layer_norm_op = torch.library.custom_op("siglip2_packed::add_layer_norm", add_layer_norm, mutates_args=())
backward_op = torch.library.custom_op("siglip2_packed::layer_norm_backward", layer_norm_backward, mutates_args=())


@layer_norm_op.register_fake
def _(x, weight, bias, eps, offset):
    return x.new_empty(x.shape)


@add_layer_norm_op.register_fake
def _(x, update, weight, bias, eps, shift):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@backward_op.register_fake
def _(grad, residual, x, update, weight, bias, eps):
    sums = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(3))
    return x.new_empty(x.shape), x.new_empty(x.shape), *sums


def _launch(x, update, offset, shift, weight, bias, eps, out, total):
    T, D = x.shape
    if T == 0:
        return
    x, update = (y if y is None else y.contiguous() for y in (x, update))
    tensors = (
        x,
        x if update is None else update,
        weight if offset is None else offset,
        weight if shift is None else shift,
        weight,
        bias,
        out,
        out if total is None else total,
    )
    with device_of(x):
        launch(
            forward_kernel,
            (T, 1, 1),
            tensors,
            (eps,),
            (D, triton.next_power_of_2(D), offset is not None, update is not None),
            num_warps=2 if D > 512 else 1,
        )


@triton.jit
def forward_kernel(
    x,
    update,
    offset,
    shift,
    weight,
    bias,
    out,
    total,
    eps,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    OFFSET: tl.constexpr,
    UPDATE: tl.constexpr,
):
    """out = LayerNorm(h) of one row: h = x + offset, or h = x + update, and then also total = h + shift."""
    row = tl.program_id(0).to(tl.int64) * D
    columns = tl.arange(0, COLUMNS)
    mask = columns < D
    h = tl.load(x + row + columns, mask=mask, other=0.0).to(tl.float32)
    if OFFSET:
        h += tl.load(offset + columns, mask=mask, other=0.0).to(tl.float32)
    if UPDATE:
        h += tl.load(update + row + columns, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(shift + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(total + row + columns, (h + s).to(total.dtype.element_ty), mask=mask)
        h = h.to(x.dtype.element_ty).to(tl.float32)
    normed, _ = _normalise(h, mask, eps, D)
    w = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row + columns, (normed * w + b).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    grad,
    residual,
    x,
    update,
    weight,
    bias,
    dx,
    out,
    sums,
    T,
    eps,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPDATE: tl.constexpr,
):
    """One program takes every G-th row, and keeps its column sums in registers: sums `[G, 3, D]`."""
    columns = tl.arange(0, COLUMNS)
    mask = columns < D
    w = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros([COLUMNS], tl.float32)
    dbias = tl.zeros([COLUMNS], tl.float32)
    dx_sum = tl.zeros([COLUMNS], tl.float32)
    for i in range(tl.program_id(0), T, tl.num_programs(0)):
        row = tl.cast(i, tl.int64) * D
        h = tl.load(x + row + columns, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + row + columns, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(residual + row + columns, mask=mask, other=0.0).to(tl.float32)
        if UPDATE:
            h += tl.load(update + row + columns, mask=mask, other=0.0).to(tl.float32)
            h = h.to(x.dtype.element_ty).to(tl.float32)
        normed, scale = _normalise(h, mask, eps, D)
        tl.store(out + row + columns, (normed * w + b).to(out.dtype.element_ty), mask=mask)
        dweight += g * normed
        dbias += g
        g *= w
        d = r + scale * (g - tl.sum(g, 0) / D - normed * (tl.sum(g * normed, 0) / D))
        dx_sum += d
        tl.store(dx + row + columns, d.to(dx.dtype.element_ty), mask=mask)
    sums += tl.program_id(0) * 3 * D + columns
    tl.store(sums, dweight, mask=mask)
    tl.store(sums + D, dbias, mask=mask)
    tl.store(sums + 2 * D, dx_sum, mask=mask)


@triton.jit
def _normalise(h, mask, eps, D: tl.constexpr):
    """(h - mean) / sqrt(variance + eps), zeros where masked, and 1 / sqrt(variance + eps)."""
    centred = tl.where(mask, h - tl.sum(h, 0) / D, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
    return centred * scale, scale
