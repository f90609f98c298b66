"""A CUDA graph of one bucket, and what all graphs of a model have in common.

All of them lie in one memory pool, in which one step at a time is made: what a graph leaves there for the next one,
activations for the backward, lies where other buckets' graphs leave theirs.

Shapes: N images, T patches, P patch_dim, D hidden size; a bucket's are B patches.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from siglip2_packed import fused
from siglip2_packed.buckets import Bucket, Metadata
from siglip2_packed.configuration import patch_dim
from siglip2_packed.layout import Layout
from siglip2_packed.lending import Lender
from siglip2_packed.ops.attention import Refused, VarlenAttention
from siglip2_packed.ops.runtime.aside import Aside
from siglip2_packed.ops.runtime.memory import alias
from siglip2_packed.pieces import as_now


class Step(Protocol):
    """One forward of a graph, and as much of its backward as was asked for."""

    @property
    def open(self) -> bool:
        """Whether some backward is still to come."""


def foreign_allocator(device: torch.device) -> str | None:
    """Why memory of a pool would not stay where graphs have left something; None if it does."""
    backend = torch.cuda.get_allocator_backend() if device.type == "cuda" else "native"
    return None if backend == "native" else f"memory that {backend} allocates does not outlive what a graph frees in it"


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
        self.lender = Lender(self.device)
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
        self.lender.borrower = threading.get_ident()

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

    def _give_up(self, graph: torch.cuda.CUDAGraph, aside: Aside | None) -> None:
        """Ends a capture within which something went wrong. What is captured later has a pool of its own."""
        if aside is not None:
            aside.join()
        pool, self.pool = self.pool, torch.cuda.graph_pool_handle()
        try:
            graph.capture_end()
        except RuntimeError:  # torch then leaves allocator and random generator as they are during a capture
            torch._C._cuda_endAllocateToPool(self.device.index, pool)
            ended = torch.cuda.CUDAGraph()  # which the generator is told of
            ended.capture_begin(capture_error_mode="thread_local")
            torch.ones(1, device=self.device)
            ended.capture_end()

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
                except BaseException as error:
                    self._give_up(graph, aside)
                    if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
                        raise Refused(f"a CUDA graph cannot have what it does: {error}") from error
                    raise
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
        if total < len(self.pixel_values):
            self.pixel_values[total:].zero_()
        self.metadata.fill(layout)


class InferenceGraph:
    """Features of a bucket's packs."""

    def __init__(self, model: Any, ground: Ground, bucket: Bucket, attention_in: Callable[..., VarlenAttention]):
        self.ground, self.inputs = ground, Inputs(ground, bucket)
        self.memory: list[Tensor] = []
        """What it reads, to be kept."""
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
