"""Inference replayed from CUDA graphs: small batches at the speed of their kernels, not of their launches.

A graph is captured for each bucket: so many patches, segments and images at most, segments so long at most. A pack is
copied into its bucket's buffers; the rows beyond it belong to no image and no segment.

Shapes: N images, T patches, S segments, P patch_dim, D hidden size; a bucket's are B patches.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from siglip2_packed.attention import head_dim, requested_attention
from siglip2_packed.configuration import patch_dim
from siglip2_packed.encoder import join_projections
from siglip2_packed.layout import Layout
from siglip2_packed.modeling import Siglip2PackedVisionModel, TokenOutput
from siglip2_packed.ops.attention import Refused, VarlenAttention, buckets_unmet, for_bucket, serves_buckets
from siglip2_packed.ops.positions import Places
from siglip2_packed.ops.segments import Segments
from siglip2_packed.overflow import watch

logger = logging.getLogger("siglip2_packed")

BUDGETS = (64, 128, 256, 512, 1024, 2048, 4096)


class Bucket(NamedTuple):
    patches: int
    segments: int
    images: int
    max_seqlen: int


class CUDAGraphs:
    """A model that replays CUDA graphs: `CUDAGraphs(model)(**packed.to("cuda"))`.

    Outputs are the caller's own, untouched by later calls. Parameters are read at every call, so updates in place
    (an optimiser's, `load_state_dict`'s) are seen; parameters that were replaced (`model.to(...)`) have the graphs
    captured anew. The first pack of a bucket takes seconds, for its capture. Not for use by several threads at once.

    Args:
        model: on a CUDA device, bfloat16 or float16, in its final place.
        budgets: buckets' numbers of patches. A pack beyond the largest runs without a graph.
        least: so does a pack of fewer patches.
    """

    def __init__(self, model: Siglip2PackedVisionModel, budgets: Sequence[int] = BUDGETS, least: int = 1):
        if not budgets or any(isinstance(x, bool) or not isinstance(x, int) or x < 1 for x in budgets):
            raise ValueError(f"budgets must be positive integers, got {list(budgets)}")
        dtype = model.embeddings.compute_dtype
        if reason := buckets_unmet(model.device, dtype, head_dim(model.config)):
            raise ValueError(f"no graphs of this model: attention in buckets {reason}")
        self.model = model
        self.budgets = sorted(budgets)
        self.least = least
        self._graphs: dict[Bucket, _Graph] = {}
        self._refused: set[Bucket] = set()  # for want of a kernel that is right
        self._weights: list[tuple] = []
        join_projections(model.encoder)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def __call__(
        self,
        pixel_values: Tensor,
        grid_thw: Any,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        temporal: str | None = None,
    ) -> ModelOutput:
        """As the model's forward, for inference: `last_hidden_state` and, if it has a head, `pooler_output`.

        Raises:
            ValueError: what the model's forward raises.
        """
        layout = self.model._layout(pixel_values, grid_thw, cu_seqlens, max_seqlen, temporal)
        bucket = self.bucket(layout)
        if bucket is None or bucket in self._refused:
            with torch.no_grad():
                return self.model(pixel_values, grid_thw, cu_seqlens=cu_seqlens, temporal=temporal)
        graph = self._graphs.get(bucket)
        if graph is not None:
            output = graph.replay(pixel_values, layout)
            watch(self.model, output)
            if self._weights_are_where_they_were():  # asked while the device works
                return output
            self._graphs.clear()
        self._remember_weights()
        try:
            graph = self._graphs[bucket] = _Graph(self.model, bucket)
        except Refused as refused:
            logger.warning("packs of %s run without a graph: %s", bucket, refused)
            self._refused.add(bucket)
            return self(pixel_values, grid_thw, cu_seqlens, max_seqlen, temporal)
        return graph.replay(pixel_values, layout)

    def _remember_weights(self) -> None:
        self._weights = [
            (module._parameters, name, parameter, parameter.data_ptr(), parameter.detach())
            for module in self.model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]

    def _weights_are_where_they_were(self) -> bool:
        """Whether every parameter is the tensor, and in the memory, that the graphs read (which is kept for them)."""
        return all(
            parameters.get(name) is parameter and parameter.data_ptr() == place
            for parameters, name, parameter, place, _ in self._weights
        )

    def bucket(self, layout: Layout) -> Bucket | None:
        """The smallest bucket that a pack fits; None for a pack beyond every budget, and for one too small for any."""
        total = sum(layout.lengths)
        budget = next((x for x in self.budgets if total <= x), None)
        if budget is None or total < max(1, self.least):
            return None
        longest = min(max(64, _power_of_2(layout.max_seqlen)), _power_of_2(budget))
        least = budget // 1024 * 8  # so that full packs of more or fewer images have a graph in common
        segments, images = (max(least, _power_of_2(len(x))) for x in (layout.lengths, layout.grids))
        return Bucket(budget, segments, images, longest)


def replayed(model: Siglip2PackedVisionModel, patch_budget: int) -> Siglip2PackedVisionModel | CUDAGraphs:
    """The model for packs up to a budget: full ones in a CUDA graph where it can be had, the last one as it is.

    A large pack keeps the device busy for longer than its launches take; but hundreds of them compete with decoding
    for the interpreter, and one does not.
    """
    half = model.embeddings.compute_dtype in (torch.bfloat16, torch.float16)
    if model.device.type != "cuda" or not half or not serves_buckets(requested_attention(model.config)):
        return model
    try:
        return CUDAGraphs(model, [patch_budget], least=patch_budget // 2)
    except ValueError:  # no Triton, or it is not right here
        return model


def attention_in_buckets(model: Siglip2PackedVisionModel, segments: Segments, rows: int) -> VarlenAttention:
    dtype, config = model.embeddings.compute_dtype, model.config
    return for_bucket(segments, rows, dtype, config.num_attention_heads, head_dim(config))


class _Graph:
    def __init__(self, model: Siglip2PackedVisionModel, bucket: Bucket):
        self.model, self.bucket = model, bucket
        device, dtype = model.embeddings.patch_embedding.weight.device, model.embeddings.compute_dtype
        self.pixel_values = torch.zeros(bucket.patches, patch_dim(model.config), device=device, dtype=dtype)
        sizes = bucket.segments + 1, bucket.images + 1, 3 * bucket.images, bucket.patches
        self.host = torch.zeros(sum(sizes), dtype=torch.int32, device="cpu").pin_memory()
        self.copied = torch.cuda.Event()
        self.layout: Layout | None = None
        self.metadata = self.host.to(device)
        self.host_parts = [part.numpy() for part in self.host.split(sizes)]
        cu_seqlens, cu_images, images, image_of_row = self.metadata.split(sizes)
        self.attention = attention_in_buckets(model, Segments.on_device(cu_seqlens, bucket.max_seqlen), bucket.patches)
        self.images = Segments.on_device(cu_images, bucket.patches)
        self.places = Places.on_device(images.view(-1, 3), image_of_row)

        rows = min(bucket.max_seqlen, bucket.patches)
        self._fill(Layout([(1, 1, rows)], [rows], rows))
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(2):
                self._run()  # compiles kernels, checks backends, sets up cuBLAS
            stream.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            # other threads may go on, pinning memory for the packs to come
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.outputs = self._run()
        torch.cuda.current_stream(device).wait_stream(stream)

    def _run(self) -> Any:
        images = self.images if hasattr(self.model, "head") else None
        return self.model._features(self.pixel_values, self.places, self.attention, images)

    def replay(self, pixel_values: Tensor, layout: Layout) -> ModelOutput:
        total, images = len(pixel_values), len(layout.grids)
        self.pixel_values[:total].copy_(pixel_values, non_blocking=True)
        self._fill(layout)
        self.graph.replay()
        hidden_states = self.outputs.last_hidden_state[:total].clone()
        if "pooler_output" not in self.outputs:
            return TokenOutput(hidden_states)
        return BaseModelOutputWithPooling(hidden_states, self.outputs.pooler_output[:images].clone())

    def _fill(self, layout: Layout) -> None:
        """Copies a pack's metadata into the graph's buffers, in one piece."""
        if layout == self.layout:
            return
        self.layout = layout
        self.copied.synchronize()  # the pinned buffer may still be on its way from the last call
        cu_seqlens, cu_images, images, image_of_row = self.host_parts
        lengths = np.array(layout.image_lengths)
        ends = lengths.cumsum()
        n, total = len(lengths), ends[-1]
        cu_seqlens[1:] = total
        cu_seqlens[1 : len(layout.lengths) + 1] = np.cumsum(layout.lengths)
        cu_images[1:] = total
        cu_images[1 : n + 1] = ends
        images = images.reshape(-1, 3)
        images[:n, 0] = ends - lengths
        images[:n, 1:] = [(h, w) for _, h, w in layout.grids]
        image_of_row[:total] = np.repeat(np.arange(n), lengths)
        image_of_row[total:] = -1
        self.metadata.copy_(self.host, non_blocking=True)
        self.copied.record(torch.cuda.current_stream(self.metadata.device))


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
