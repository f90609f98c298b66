"""Forward and backward of one bucket as CUDA graphs: a forward, and a backward in parts, each behind an autograd node.

Shapes: N images, T patches, P patch_dim, D hidden size; a bucket's are B patches.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from siglip2_packed.buckets import Bucket
from siglip2_packed.capture import Ground, Inputs
from siglip2_packed.layout import Layout
from siglip2_packed.lending import Lot
from siglip2_packed.ops.attention import VarlenAttention
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.aside import Aside
from siglip2_packed.ops.runtime.function import Function
from siglip2_packed.ops.runtime.memory import alias
from siglip2_packed.ops.runtime.once import once_differentiable
from siglip2_packed.ops.runtime.tracing import batched
from siglip2_packed.pieces import Found, Piece, Run, as_now, backward, forward, pieces_of
from siglip2_packed.shadow import Shadow

LAYERS_OF_A_PART = 5
"""Their gradients reach autograd together; what waits for them (DDP's averaging) runs beside the parts to come."""


class TrainingGraph:
    """Features of a bucket's packs, whose gradients reach autograd part by part."""

    def __init__(self, model: Any, ground: Ground, bucket: Bucket, attention_in: Callable[..., VarlenAttention]):
        self.ground, self.inputs = ground, Inputs(ground, bucket)
        self.memory: list[Tensor] = []
        """What it reads, to be kept."""
        metadata = self.inputs.metadata
        attention = attention_in(model, metadata.segments, bucket.patches, gradients=True)
        if attention.invariant:
            model._check_invariant(self.inputs.pixel_values)
        shadow = Shadow(model)
        pieces, heads = pieces_of(shadow.model, metadata, attention), []
        if hasattr(model, "head"):
            pool = partial(shadow.model.head, images=metadata.images, invariant=attention.invariant)
            heads = [Piece(as_now(pool), shadow.model.head)]
        with torch.autocast(ground.device.type, enabled=False):  # pieces have their own
            self._capture(shadow, pieces, heads)

    def _capture(self, shadow: Shadow, pieces: list[Piece], heads: list[Piece]) -> None:
        ground = self.ground
        aside = Aside(ground.side if choice.runs_beside(len(self.inputs.pixel_values)) else None)
        runs, features, of_head, pooled = self._run(pieces, heads)  # compiles kernels, checks backends, sets up cuBLAS
        for kept in (of_head, runs):
            if kept:
                backward(kept, torch.zeros_like(kept[-1].out), aside, shadow.check)
        del runs, features, of_head, pooled, kept

        self._forward = torch.cuda.CUDAGraph()
        with ground.capture(self._forward, aside):
            runs, features, of_head, pooled = self._run(pieces, heads)
        self._hidden_states, self._pooled = alias(features), None if pooled is None else alias(pooled)
        self._grad = ground.gradient_of(features)
        self.head: Part | None = None
        if pooled is not None and of_head:
            self._pooled_grad = torch.zeros(pooled.shape, dtype=pooled.dtype, device=ground.device)
            self.head = Part(ground, shadow, aside, of_head, self._pooled_grad)
            self._from_head = None if self.head.dx is None else alias(self.head.dx)
        del features, pooled  # and activations, where they are no longer needed: the pool has them for what follows
        parts, grad = _cut(runs), self._grad
        del runs
        self.parts: list[Part] = []
        """The first of them first."""
        while parts:
            part = Part(ground, shadow, aside, parts.pop(), grad)
            grad = grad if part.dx is None else part.dx
            self.parts.insert(0, part)
        for part in (*self.parts, *([] if self.head is None else [self.head])):
            part.settle()

    def _run(self, pieces: list[Piece], heads: list[Piece]) -> tuple[list[Run], Tensor, list[Run], Tensor | None]:
        """Runs and result of the encoder, and of the head on top of it."""
        runs, features = forward(pieces, self.inputs.pixel_values)
        if not heads:
            return runs, features, [], None
        of_head, pooled = forward(heads, features, learns=bool(runs))
        return runs, features, of_head, pooled

    def __call__(self, pixel_values: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """`[T, P]` -> `[T, D]`, and `[N, D]` if the model has a head; with gradients."""
        total, images = len(pixel_values), len(layout.grids)
        with self.ground.in_turn():
            self.inputs.fill(pixel_values, layout)
            self._forward.replay()
            features = self._hidden_states[:total].clone()
            pooled = None if self._pooled is None else self._pooled[:images].clone()
        step = Step(self)
        self.ground.begin(step)
        token: Tensor | None = None
        for number, part in enumerate(self.parts):
            last = number == len(self.parts) - 1
            result = features if last else self.ground.token.clone()
            token = _Backward.apply([result], partial(step.backward, number), token, *part.parameters)
        if token is not None:
            features = token
        if pooled is not None and self.head is not None:
            pooled = _Backward.apply([pooled], step.backward_head, features, *self.head.parameters)
        return features, pooled


def _cut(runs: list[Run]) -> list[list[Run]]:
    count = max(1, len(runs) // LAYERS_OF_A_PART)
    cuts = [number * len(runs) // count for number in range(count + 1)]
    return [runs[first:end] for first, end in itertools.pairwise(cuts) if first < end]


class Step:
    """One forward of a training graph, and as much of its backward as was asked for."""

    def __init__(self, graph: TrainingGraph):
        self._graph = graph
        self._left = len(graph.parts)
        self._head_left = graph.head is not None
        self._versions = {part: part.versions() for part in (*graph.parts, graph.head) if part is not None}

    @property
    def open(self) -> bool:
        """Whether some backward is still to come. (None comes for a head after that of the encoder.)"""
        return self._left > 0 or (self._head_left and not self._graph.parts)

    def backward(self, number: int, grad: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Part by part, from the last; the lower ones take their gradient from the one above."""
        graph = self._graph
        if number != self._left - 1:
            raise RuntimeError(AGAIN)
        self._check(graph.parts[number])
        with graph.ground.in_turn():
            if number == len(graph.parts) - 1:
                graph._grad[: len(grad)].copy_(grad)
                if len(grad) < len(graph._grad):
                    graph._grad[len(grad) :].zero_()
            gradients = graph.parts[number].gradients()
            self._left = number
        return graph.ground.token, gradients

    def backward_head(self, grad: Tensor) -> tuple[Tensor | None, Sequence[Tensor]]:
        graph, head = self._graph, self._graph.head
        if head is None or not self._head_left or self._left < len(graph.parts):
            raise RuntimeError(AGAIN)
        self._check(head)
        with graph.ground.in_turn():
            graph._pooled_grad[: len(grad)].copy_(grad)
            graph._pooled_grad[len(grad) :].zero_()
            gradients = head.gradients()
            self._head_left = False
            return None if graph._from_head is None else graph._from_head.clone(), gradients

    def _check(self, part: Part) -> None:
        if part.versions() != self._versions[part]:
            changed = [x for x, y in zip(part.shapes, map(operator.ne, part.versions(), self._versions[part])) if y]
            raise RuntimeError(
                f"{len(changed)} parameters, the first {changed[0]}, were modified by an inplace operation between a "
                "forward and its backward"
            )


AGAIN = (
    "a CUDA graph keeps the activations of a forward for one backward, of all losses together: add them up, or train "
    "without CUDA graphs"
)


class _Backward(Function):
    """A result that is there already, of x and parameters, whose gradients are made by `run`."""

    @staticmethod
    def forward(ctx, result: list[Tensor], run: Callable, x: Tensor | None, *parameters: Tensor) -> Tensor:
        ctx.run, ctx.rows = run, 0 if x is None else len(x)
        return result.pop()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if batched(grad):
            raise RuntimeError("is_grads_batched: CUDA graphs take one gradient at a time; run the model without them")
        dx, gradients = ctx.run(grad)
        return None, None, dx[: ctx.rows] if ctx.needs_input_grad[2] else None, *gradients


class Part:
    """Pieces whose backward is one graph, and where it leaves their gradients."""

    def __init__(self, ground: Ground, shadow: Shadow, aside: Aside, runs: list[Run], grad: Tensor):
        """Empties `runs`; the pool keeps `dx` and gradients until they are settled."""
        self._reads = [shadow.real(p) for run in runs for p in run.piece.module.parameters()]
        self._ground, self._graph = ground, torch.cuda.CUDAGraph()
        with ground.capture(self._graph, aside):
            self.dx, found = backward(runs, grad, aside)
            """Of the first run's x, if it wants one."""
            aside.join()
            self._lots = _lots(found, shadow)
        self.parameters = [p for lot in self._lots for p in lot.parameters]

    def versions(self) -> list[int]:
        """Of all parameters that it reads, which change with every change in place."""
        return [p._version for p in self._reads]

    @property
    def shapes(self) -> list[list[int]]:
        return [list(p.shape) for p in self._reads]

    def settle(self) -> None:
        self.dx = None
        for lot in self._lots:
            lot.settle(self._graph)

    def gradients(self) -> list[Tensor]:
        """Those of `parameters`: lent, see `Lender.reclaim`."""
        self._graph.replay()
        return self._ground.lender.lend(self._lots)


def _lots(found: list[Found], shadow: Shadow) -> list[Lot]:
    """Of the gradients in each room, and of copies of those that are in none."""
    lots: list[Lot] = []
    others: dict[torch.dtype, list[tuple[nn.Parameter, Tensor]]] = {}
    for gradients, room in found:
        places: dict[int, nn.Parameter] = {}
        for parameter, gradient in gradients:
            place, real = room.place(gradient), shadow.real(parameter)
            if place is None:
                others.setdefault(gradient.dtype, []).append((real, gradient))
            else:
                places[place] = real
        if places:
            lots.append(Lot(room.flat, places))
    return lots + [Lot.of_copies(*zip(*alike)) for alike in others.values()]
