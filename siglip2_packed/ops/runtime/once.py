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
        ctx = _Unpacked(ctx)
        with torch.no_grad():
            results = backward(ctx, *grads)
        sources = [x for x in (*grads, *ctx.saved_tensors) if isinstance(x, Tensor) and x.requires_grad]
        return _Once.apply(len(results), *results, *sources) if sources else results

    return run


class _Unpacked:
    """A context whose saved tensors are unpacked once, as those within a checkpoint have to be."""

    def __init__(self, ctx: Any):
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Once(torch.autograd.Function):
    """The first `count` of the tensors, which depend on the others in a way that has no derivative here."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "this model is differentiable once by torch.autograd (once_differentiable). Second derivatives: "
            "torch.func.grad, hessian and jacrev of the model are differentiable again"
        )
