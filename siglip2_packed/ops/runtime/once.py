"""Functions that are differentiable once, and say so: torch's own decorator may let a second derivative be zero."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def once_differentiable(backward: Callable) -> Callable:
    """A Function's `backward` that autograd does not follow; RuntimeError where a second derivative goes through it.

    torch's decorator of this name cuts the graph there: `torch.autograd.functional.hessian` then gives zeros.
    """

    @functools.wraps(backward)
    def run(ctx, *grads):
        if not torch.is_grad_enabled():  # nobody will differentiate again
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        # no saved tensor is asked for here: a checkpoint's may be unpacked once
        return _Once.apply(len(results), *results, torch.zeros((), device="cpu", requires_grad=True))

    return run


class _Once(torch.autograd.Function):
    """The first `count` of the tensors; their derivatives are not known here."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "this model is differentiable once by torch.autograd (once_differentiable). Second derivatives: "
            "torch.func.grad, hessian and jacrev of the model are differentiable again"
        )
