"""A model's forward, and its forward and backward, as CUDA graphs of one bucket.

All graphs of a model lie in one memory pool (`Ground`), of which one step at a time is made: what a graph leaves there
for the next one, activations for the backward, lies where other buckets' graphs leave theirs.

Shapes: N images, T patches, P patch_dim, D hidden size; a bucket's are B patches.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from siglip2_packed import fused
from siglip2_packed.buckets import Bucket, Metadata
from siglip2_packed.configuration import patch_dim
from siglip2_packed.layout import Layout
from siglip2_packed.ops.attention import VarlenAttention
from siglip2_packed.ops.runtime.aside import ROWS, Aside, Room
from siglip2_packed.ops.runtime.function import Function
from siglip2_packed.ops.runtime.memory import alias
from siglip2_packed.ops.runtime.once import once_differentiable
from siglip2_packed.ops.runtime.tracing import batched

LAYERS_OF_A_PART = 5
"""Their gradients reach autograd together; what waits for them (DDP's averaging) runs beside the parts to come."""


class Ground:
    """What all graphs of a model have in common: memory, a stream to capture on, and whose step is being made."""

    def __init__(self, model: Any, rows: int):
        self.device: torch.device = model.device
        dtype, columns = model.embeddings.compute_dtype, patch_dim(model.config)
        self.pixel_values = torch.zeros(rows, columns, dtype=dtype, device=self.device)
        self.stream, self.side = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        self.pool = torch.cuda.graph_pool_handle()
        self.token = torch.empty(0, device=self.device)
        self._grad: Tensor | None = None
        self._step: Callable[[], Step | None] = lambda: None
        self.loans: list[tuple[weakref.ref, int, list[nn.Parameter], torch.cuda.Stream]] = []
        self._lock = threading.RLock()
        self._left = torch.cuda.Event()
        self._left.record(torch.cuda.current_stream(self.device))

    @property
    def busy(self) -> bool:
        """Whether a step's activations are still to be read by its backward."""
        step = self._step()
        return step is not None and step.open

    def begin(self, step: Step) -> None:
        self._step = weakref.ref(step)

    def reclaim(self) -> bool:
        """Has the gradients of earlier steps that `.grad` still holds moved to memory of their own.

        False: somebody holds them otherwise, so nothing may run here. (Memory that a tensor was given to another stream
        for, by `record_stream`, is not told from free memory.) What reads them where they were made comes first.
        """
        current = torch.cuda.current_stream(self.device)
        for loan, address, parameters, stream in self.loans:
            if loan() is not None:
                grads = [p.grad for p in parameters if p.grad is not None]
                grads = [g for g in grads if g.untyped_storage().data_ptr() == address]
                with torch.cuda.stream(stream):
                    for grad in grads:
                        grad.data = grad.detach().clone()
            if stream != current:
                current.wait_stream(stream)
        self.loans = [loan for loan in self.loans if loan[0]() is not None]
        return not self.loans

    def bytes(self) -> int:
        """Of the memory pool."""
        segments = torch.cuda.memory_snapshot()
        return sum(x["total_size"] for x in segments if tuple(x["segment_pool_id"]) == tuple(self.pool))

    def gradient_of(self, features: Tensor) -> Tensor:
        """Where the gradient of features `[B, D]` goes."""
        rows = len(self.pixel_values)
        if self._grad is None or self._grad.dtype != features.dtype:
            self._grad = torch.zeros(rows, features.shape[1], dtype=features.dtype, device=self.device)
        return self._grad[: len(features)]

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """One use of the memory follows the other, on the device, too, whichever threads and streams callers are on."""
        with self._lock:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self._left)
            yield
            self._left.record(stream)

    @contextlib.contextmanager
    def capture(self, graph: torch.cuda.CUDAGraph, aside: Aside | None = None) -> Iterator[None]:
        """Other threads may go on, pinning memory for the packs to come."""
        collecting = gc.isenabled()
        gc.disable()  # which might free a graph
        try:
            with torch.cuda.stream(self.stream), fused.weight_gradients(aside):
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    yield
                finally:
                    graph.capture_end()
        finally:
            if collecting:
                gc.enable()


class Inputs:
    """A bucket's packs, where its graphs read them."""

    def __init__(self, ground: Ground, bucket: Bucket):
        self.pixel_values = ground.pixel_values[: bucket.patches]
        self.metadata = Metadata(bucket, ground.device)
        rows = min(bucket.max_seqlen, bucket.patches)
        self.metadata.fill(Layout([(1, 1, rows)], [rows], rows))

    def fill(self, pixel_values: Tensor, layout: Layout) -> None:
        """Patches `[T, P]`; rows beyond are zeros: their gradients are, too, and zero times NaN is NaN."""
        total = len(pixel_values)
        self.pixel_values[:total].copy_(pixel_values, non_blocking=True)
        self.pixel_values[total:].zero_()
        self.metadata.fill(layout)


class InferenceGraph:
    """Features of a bucket's packs."""

    def __init__(self, model: Any, ground: Ground, bucket: Bucket, attention_in: Callable[..., VarlenAttention]):
        self.ground, self.inputs = ground, Inputs(ground, bucket)
        metadata = self.inputs.metadata
        attention = attention_in(model, metadata.segments, bucket.patches, gradients=False)
        images = metadata.images if hasattr(model, "head") else None
        run = as_now(partial(model._features, self.inputs.pixel_values, metadata.places, attention, images))
        with torch.no_grad():
            run()  # compiles kernels, checks backends, sets up cuBLAS
            self.graph = torch.cuda.CUDAGraph()
            with ground.capture(self.graph):
                output = run()
        self.hidden_states = alias(output.last_hidden_state)
        self.pooled = alias(output.pooler_output) if "pooler_output" in output else None

    def __call__(self, pixel_values: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """`[T, P]` -> `[T, D]`, and `[N, D]` if the model has a head."""
        total, images = len(pixel_values), len(layout.grids)
        with self.ground.in_turn():
            self.inputs.fill(pixel_values, layout)
            self.graph.replay()
            return self.hidden_states[:total].clone(), None if self.pooled is None else self.pooled[:images].clone()


class Piece(NamedTuple):
    """A part of the model that makes one hidden state of another."""

    run: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]
    """Those that want a gradient."""
    again: bool = False
    """Whether it runs once more in backward, instead of keeping its activations."""


def pieces_of(model: Any, metadata: Metadata, attention: VarlenAttention) -> list[Piece]:
    """From patches `[T, P]` to `last_hidden_state`."""
    embed = partial(model.embeddings, places=metadata.places)
    pieces = [Piece(as_now(embed), _learning(model.embeddings))]
    for layer in model.encoder.layers:
        again = layer.gradient_checkpointing and layer.training
        pieces.append(Piece(as_now(partial(layer.forward, attention=attention)), _learning(layer), again))
    norm = getattr(model, "post_layernorm", None)
    return pieces if norm is None else [*pieces, Piece(as_now(norm), _learning(norm))]


def as_now(function: Callable) -> Callable:
    """A function under the autocast of now, without its memory of weights, which graphs cast with every replay."""
    if not torch.is_autocast_enabled("cuda"):
        return function
    return torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False)(function)


def _learning(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


class Run(NamedTuple):
    """What a piece has left for its backward."""

    piece: Piece
    x: Tensor
    out: Tensor


def forward(pieces: Sequence[Piece], x: Tensor, learns: bool = False) -> tuple[list[Run], Tensor]:
    """learns: whether x wants a gradient."""
    runs: list[Run] = []
    for piece in pieces:
        x = x.detach().requires_grad_(learns)
        learns = learns or bool(piece.parameters)
        with torch.set_grad_enabled(learns and not piece.again):
            out = piece.run(x)
        if learns:
            runs.append(Run(piece, x, out))
        x = out
    return runs, x.detach()


class Found(NamedTuple):
    """Gradients of a piece's parameters, and where most of them are."""

    gradients: list[tuple[nn.Parameter, Tensor]]
    room: Room


def backward(runs: list[Run], grad: Tensor, aside: Aside) -> tuple[Tensor | None, list[Found]]:
    """From the gradient of the last run's result: that of the first one's x, if it wants one, and of all parameters.

    Empties `runs`, whose activations are not kept longer than they are needed.
    """
    found: list[Found] = []
    dx: Tensor | None = grad
    while runs:
        piece, x, out = runs.pop()
        if piece.again:
            with torch.enable_grad():
                out = piece.run(x)
        wanted = [x, *piece.parameters] if x.requires_grad else piece.parameters
        room = Room(piece.parameters, grad)
        with aside.gradients_in(room):
            gradients = torch.autograd.grad(out, wanted, dx, allow_unused=True)
        dx, *rest = gradients if x.requires_grad else (None, *gradients)
        found.append(Found([(p, g) for p, g in zip(piece.parameters, rest) if g is not None], room))
    return dx, found


class Part:
    """Pieces whose backward is one graph, and where it leaves their gradients."""

    def __init__(self, ground: Ground, aside: Aside, runs: list[Run], grad: Tensor):
        """Empties `runs`; the pool keeps `dx` and gradients until they are settled."""
        self._ground, self._graph = ground, torch.cuda.CUDAGraph()
        with ground.capture(self._graph, aside):
            self.dx, found = backward(runs, grad, aside)
            """Of the first run's x, if it wants one."""
            aside.join()
            self._lots = _lots(found)
        self.parameters = [p for lot in self._lots for p in lot.parameters]

    def versions(self) -> list[int]:
        """Of the parameters, which change with every change in place."""
        return [p._version for p in self.parameters]

    def settle(self) -> None:
        self.dx = None
        for lot in self._lots:
            lot.flat = alias(lot.flat)

    def gradients(self) -> list[Tensor]:
        """Those of `parameters`: lent, see `Ground.reclaim`."""
        self._graph.replay()
        return [gradient for lot in self._lots for gradient in lot.lend(self._ground)]


class Lot:
    """Gradients side by side."""

    def __init__(self, flat: Tensor, places: dict[int, nn.Parameter]):
        self.flat, self.parameters = flat, list(places.values())
        self._strided = [(p.shape, _contiguous(p), place) for place, p in places.items()]

    @classmethod
    def of_copies(cls, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> Lot:
        room = Room(gradients, gradients[0])
        room.make()
        copies: list[Any] = [room.take(g.dtype, *g.shape) for g in gradients]
        torch._foreach_copy_(copies, list(gradients))
        ends = itertools.accumulate(map(room.size, gradients), initial=0)
        return cls(room.flat, dict(zip(ends, parameters)))

    def lend(self, ground: Ground) -> list[Tensor]:
        loan = Loan()
        flat = alias(self.flat, holds=loan)
        stream = torch.cuda.current_stream(ground.device)
        ground.loans.append((weakref.ref(loan), flat.data_ptr(), self.parameters, stream))
        return [torch.as_strided(flat, *strided) for strided in self._strided]


def _contiguous(x: Tensor) -> tuple[int, ...]:
    return torch.empty(x.shape, device="meta").stride()


class Loan:
    """Alive as long as anybody has gradients that were lent together."""


def _lots(found: list[Found]) -> list[Lot]:
    """Of the gradients in each room, and of copies of those that are in none."""
    lots: list[Lot] = []
    others: dict[torch.dtype, list[tuple[nn.Parameter, Tensor]]] = {}
    for gradients, room in found:
        places: dict[int, nn.Parameter] = {}
        for parameter, gradient in gradients:
            place = room.place(gradient)
            if place is None:
                others.setdefault(gradient.dtype, []).append((parameter, gradient))
            else:
                places[place] = parameter
        if places:
            lots.append(Lot(room.flat, places))
    return lots + [Lot.of_copies(*zip(*alike)) for alike in others.values()]


class TrainingGraph:
    """Features of a bucket's packs, whose gradients reach autograd part by part."""

    def __init__(self, model: Any, ground: Ground, bucket: Bucket, attention_in: Callable[..., VarlenAttention]):
        self.ground, self.inputs = ground, Inputs(ground, bucket)
        metadata = self.inputs.metadata
        attention = attention_in(model, metadata.segments, bucket.patches, gradients=True)
        pieces, heads = pieces_of(model, metadata, attention), []
        if hasattr(model, "head"):
            heads = [Piece(as_now(partial(model.head, images=metadata.images)), _learning(model.head))]
        with torch.autocast(ground.device.type, enabled=False):  # pieces have their own
            self._capture(pieces, heads)

    def _capture(self, pieces: list[Piece], heads: list[Piece]) -> None:
        ground = self.ground
        aside = Aside(ground.side if len(self.inputs.pixel_values) <= ROWS else None)
        runs, features, of_head, pooled = self._run(pieces, heads)  # compiles kernels, checks backends, sets up cuBLAS
        for kept in (of_head, runs):
            if kept:
                backward(kept, torch.zeros_like(kept[-1].out), aside)
        del runs, features, of_head, pooled, kept

        self._forward = torch.cuda.CUDAGraph()
        with ground.capture(self._forward, aside):
            runs, features, of_head, pooled = self._run(pieces, heads)
        self._hidden_states, self._pooled = alias(features), None if pooled is None else alias(pooled)
        self._grad = ground.gradient_of(features)
        self.head: Part | None = None
        if pooled is not None and of_head:
            self._pooled_grad = torch.zeros(pooled.shape, dtype=pooled.dtype, device=ground.device)
            self.head = Part(ground, aside, of_head, self._pooled_grad)
            self._from_head = None if self.head.dx is None else alias(self.head.dx)
        del features, pooled  # and activations, where they are no longer needed: the pool has them for what follows
        parts, grad = _cut(runs), self._grad
        del runs
        self.parts: list[Part] = []
        """The first of them first."""
        while parts:
            part = Part(ground, aside, parts.pop(), grad)
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
    """One forward of a graph, and as much of its backward as was asked for."""

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
                graph._grad[len(grad) :].zero_()
            gradients = graph.parts[number].gradients()
            self._left = number
        return graph.ground.token, gradients

    def backward_head(self, grad: Tensor) -> tuple[Tensor | None, Sequence[Tensor]]:
        graph, head = self._graph, self._graph.head
        if head is None or not self._head_left or self._left < len(graph.parts):
            raise RuntimeError(AGAIN)
        self._check(head)
        self._head_left = False
        with graph.ground.in_turn():
            graph._pooled_grad[: len(grad)].copy_(grad)
            graph._pooled_grad[len(grad) :].zero_()
            gradients = head.gradients()
            return None if graph._from_head is None else graph._from_head.clone(), gradients

    def _check(self, part: Part) -> None:
        if part.versions() != self._versions[part]:
            raise RuntimeError("a parameter was modified by an inplace operation between forward and its backward")


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
