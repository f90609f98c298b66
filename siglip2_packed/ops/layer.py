"""The functions a layer's products and element-wise work are made of, chosen once for rows of one kind.

`invariant`: those whose results for a row do not depend on the number of rows, or a `Refused` that says why not.

Shapes: T rows, D hidden size, F MLP width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from siglip2_packed.ops import columns, linear, mlp, norm
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.check import checkable
from siglip2_packed.ops.runtime.choice import Function, require, take
from siglip2_packed.ops.runtime.tracing import batched, traced


class Inference(NamedTuple):
    """See `norm.eager`, `linear.eager` and `mlp.eager` for what each computes."""

    layer_norm: Callable
    linear: Callable
    add_product_: Callable
    linear_gelu: Callable


class Training(NamedTuple):
    """See `eager` of `norm`, `linear`, `mlp` and `columns`. Gradients are None where none are asked for."""

    layer_norm: Callable
    linear: Callable
    add_product_: Callable
    add_layer_norm: Callable
    linear_gelu_keep: Callable
    layer_norm_backward_: Callable | None = None
    linear_gelu_backward: Callable | None = None
    column_sums: Callable | None = None
    product_over_rows: Callable | None = None


def for_inference(x: Tensor, F: int, invariant: bool = False) -> Inference:
    """For x `[T, D]`."""
    (T, D), device, dtype, card = x.shape, x.device, x.dtype, choice.card(x.device)
    if invariant:
        return Inference(
            require(norm.LAYER_NORM, BY_TRITON, device, dtype, D, True),
            _product(linear.LINEAR, device, dtype, D, 3 * D),
            _product(linear.ADD_PRODUCT, device, dtype, F, D),
            _product(mlp.LINEAR_GELU, device, dtype, D, F),
        )
    rows, product = choice.rows(card, dtype), choice.product_with_gelu(card, dtype, T, D, F)
    return Inference(
        take(norm.LAYER_NORM, rows, device, dtype, D, True),
        *BY_BLAS,
        take(mlp.LINEAR_GELU, product, device, dtype, D, F),
    )


def for_training(x: Tensor, F: int, gradients: bool, invariant: bool = False) -> Training:
    """For x `[T, D]`. Backward is the same, invariant or not."""
    (T, D), device, dtype = x.shape, x.device, x.dtype
    key = device, dtype, T, D, F, gradients, invariant
    found = _training.get(key)
    if found is None:
        card = choice.card(device)
        rows, sums = choice.rows(card, dtype), choice.sums(card, dtype, T)
        product = choice.product_with_gelu(card, dtype, T, D, F)
        if invariant:
            found = Training(
                require(norm.LAYER_NORM, BY_TRITON, device, dtype, D, False),
                _product(linear.LINEAR, device, dtype, D, 3 * D),
                _product(linear.ADD_PRODUCT, device, dtype, F, D),
                require(norm.ADD_LAYER_NORM, BY_TRITON, device, dtype, D),
                _product(mlp.LINEAR_GELU_KEEP, device, dtype, D, F),
            )
        else:
            found = Training(
                take(norm.LAYER_NORM, rows, device, dtype, D, False),
                *BY_BLAS,
                take(norm.ADD_LAYER_NORM, rows, device, dtype, D),
                take(mlp.LINEAR_GELU_KEEP, product, device, dtype, D, F),
            )
        if gradients:
            found = found._replace(
                layer_norm_backward_=take(norm.LAYER_NORM_BACKWARD, rows, device, dtype, D),
                linear_gelu_backward=take(mlp.LINEAR_GELU_BACKWARD, product, device, dtype, D, F),
                column_sums=take(columns.COLUMN_SUMS, sums, device, dtype, 3 * D),
                product_over_rows=take(columns.PRODUCT_OVER_ROWS, sums, device, dtype, F, D),
            )
        if len(_training) >= MOST:
            _training.clear()
        if checkable(device):  # else some may have had no check yet
            _training[key] = found
    return found


def _product(function: Function, device: torch.device, dtype: torch.dtype, D: int, F: int) -> Callable:
    """The invariant one between D and F columns."""
    return require(function, choice.invariant_products(choice.card(device), dtype, D, F), device, dtype, D, F)


BY_TRITON = ("triton",)
BY_BLAS = linear.LINEAR.of("eager"), linear.ADD_PRODUCT.of("eager")
_training: dict[tuple, Training] = choice.remember()
MOST = 1024
"""Kinds of rows whose functions are remembered."""


def for_gradient(chosen: Training, grad: Tensor) -> Training:
    """The same, or torch's: for a batch of gradients, whose memory kernels cannot see, and for who follows backward."""
    return BY_TORCH if batched(grad) or traced() else chosen


BY_TORCH = Training(*(function.of("eager") for function in (
    norm.LAYER_NORM, linear.LINEAR, linear.ADD_PRODUCT, norm.ADD_LAYER_NORM, mlp.LINEAR_GELU_KEEP,
    norm.LAYER_NORM_BACKWARD, mlp.LINEAR_GELU_BACKWARD, columns.COLUMN_SUMS, columns.PRODUCT_OVER_ROWS,
)))  # fmt: skip
