"""CUDA graphs: small packs at the speed of their kernels, not of their launches, in inference and in training.

A graph is captured for each bucket: so many patches and segments at most, segments so long at most. A pack is copied
into its bucket's buffers; the rows beyond it belong to no image and no segment.

Shapes: N images, T patches, P patch_dim, D hidden size.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from transformers.modeling_outputs import ModelOutput

from siglip2_packed import invariance
from siglip2_packed.attention import head_dim, requested_attention
from siglip2_packed.buckets import BUDGETS, Bucket, bucket_of
from siglip2_packed.capture import Ground, InferenceGraph, foreign_allocator
from siglip2_packed.encoder import join_projections
from siglip2_packed.layout import Layout
from siglip2_packed.ops.attention import Refused, VarlenAttention, buckets_unmet, for_bucket, serves_buckets
from siglip2_packed.ops.positions import ANTIALIASED
from siglip2_packed.ops.runtime.tracing import backward_followed, capturing, traced
from siglip2_packed.ops.segments import Segments
from siglip2_packed.plain import unhooked
from siglip2_packed.snapshot import Snapshot, why_not
from siglip2_packed.training_graph import TrainingGraph

logger = logging.getLogger("siglip2_packed")

MOST_GRAPHS = 64


class Graphs:
    """A model's graphs, of the buckets that came last: `features` of a pack in one of them, where that can be.

    Not copied or pickled with the model that has them: a copy captures its own.

    Args:
        budgets: buckets' numbers of patches. A pack beyond the largest runs without a graph.
        least: so does a pack of fewer patches.
        most: graphs that are kept; the least recently used goes.
    """

    def __init__(self, budgets: Sequence[int] = BUDGETS, least: int = 1, most: int = MOST_GRAPHS):
        if not budgets or any(isinstance(x, bool) or not isinstance(x, int) or x < 1 for x in budgets):
            raise ValueError(f"budgets must be positive integers, got {list(budgets)}")
        self.budgets, self.least, self.most = sorted(budgets), least, most
        self._lock = threading.RLock()
        self._said: set[str] = set()
        self._forget()

    def _forget(self) -> None:
        self._graphs: OrderedDict[tuple, InferenceGraph | TrainingGraph | str] = OrderedDict()
        self._snapshot: Snapshot | None = None
        self._ground: Ground | None = None

    def __reduce__(self) -> tuple:
        return Graphs, (self.budgets, self.least, self.most)

    def held(self) -> tuple[int, int]:
        """How many graphs there are, and the bytes of device memory that they share."""
        count = sum(not isinstance(graph, str) for graph in self._graphs.values())
        return count, 0 if self._ground is None else self._ground.bytes()

    def features(self, model: Any, pixel_values: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None] | None:
        """`[T, P]` -> `[T, D]`, and `[N, D]` if the model has a head: the caller's own, untouched by later calls.

        With gradients, where they are recorded and any parameter wants one. None: the pack has to run without a graph,
        as one beyond every budget does; why is logged once, if it is not the pack. Several threads take turns.

        Raises:
            ValueError: a pack on another device than the model's, which does not come from elsewhere in each call.
        """
        bucket = bucket_of(layout, self.budgets)
        if bucket is None or len(pixel_values) < self.least or traced() or capturing(pixel_values.device):
            return None
        if pixel_values.requires_grad and torch.is_grad_enabled():
            return None
        if (mode := model.embeddings.resize_mode(layout.grids)) != ANTIALIASED:
            self._say(f"{mode} positions have no kernel, other than at the table's own size")
            return None
        device = next((p.device for p in model.parameters()), pixel_values.device)
        if pixel_values.device != device:
            if reason := why_not(model, learns=False):  # offloaded, say
                self._say(reason)
                return None
            raise ValueError(f"pixel_values is on {pixel_values.device}, the model on {device}")
        if getattr(model, "_is_replica", False):
            self._say("DataParallel copies the model in each call")
            return None
        if _has_any_global_hook():
            self._say("hooks of all modules have to run in each call")
            return None
        on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with self._lock, on_device:
            return self._features(model, pixel_values, layout, bucket)

    def _features(
        self, model: Any, pixel_values: Tensor, layout: Layout, bucket: Bucket
    ) -> tuple[Tensor, Tensor | None] | None:
        if self._snapshot is None:
            with torch.inference_mode(False):
                if why_not(model, learns=False) is None:
                    join_projections(model.encoder)
                self._snapshot = Snapshot(model)
        state = self._snapshot.state()
        learns = torch.is_grad_enabled() and self._snapshot.learns()
        if learns and (reason := backward_followed()):
            self._say(reason)
            return None
        dtype, autocast = _computes_in(model)
        invariant = invariance.asked(model.config)
        key = bucket, learns, dtype, autocast, requested_attention(model.config), invariant, state
        graph = self._graphs.get(key)
        if graph is None and self._snapshot.holds():
            while len(self._graphs) >= self.most:
                self._graphs.popitem(last=False)
            graph = self._graphs[key] = self._captured(model, bucket, learns, dtype)
        if isinstance(graph, (InferenceGraph, TrainingGraph)):
            if graph.ground.busy:
                self._say("a forward whose backward is still to come has the graphs' memory")
                return None
            if not graph.ground.lender.reclaim():
                self._say("another thread, or more than .grad, holds an earlier step's gradients in the graphs' memory")
                return None
            self._graphs.move_to_end(key)
            features = graph(pixel_values, layout)
            if self._snapshot.holds():  # asked while the device works
                return features
        elif graph is not None and self._snapshot.holds():
            self._say(graph)
            return None
        self._forget()
        return self._features(model, pixel_values, layout, bucket)

    def _captured(
        self, model: Any, bucket: Bucket, learns: bool, dtype: torch.dtype
    ) -> InferenceGraph | TrainingGraph | str:
        """The graph of a bucket, or why there is none."""
        requested = requested_attention(model.config)
        if not serves_buckets(requested):
            return f"attn_implementation={requested!r} has to know every segment's length"
        if reason := why_not(model, learns) or foreign_allocator(model.device):
            return reason
        if reason := buckets_unmet(model.device, dtype, head_dim(model.config)):
            return reason
        try:
            with torch.inference_mode(False):  # what is made for one pack is there for all
                if self._ground is None:
                    self._ground = Ground(model, self.budgets[-1])
                graph = (TrainingGraph if learns else InferenceGraph)(model, self._ground, bucket, attention_in_buckets)
        except Refused as refused:
            return str(refused)
        except BaseException:
            self._forget()  # a capture was broken off, of which streams and memory may know still
            raise
        graph.memory = [] if self._snapshot is None else self._snapshot.memory
        if logger.isEnabledFor(logging.INFO):
            count, held = self.held()
            purpose = "training" if learns else "inference"
            logger.info("CUDA graph of %s for %s; %d graphs hold %.2f GiB", bucket, purpose, count + 1, held / 2**30)
        return graph

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("without CUDA graphs: %s", reason)


def _computes_in(model: Any) -> tuple[torch.dtype, bool]:
    """The dtype of products, and whether it is autocast's."""
    if torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda"), True
    return model.embeddings.compute_dtype, False


def attention_in_buckets(model: Any, segments: Segments, rows: int, gradients: bool) -> VarlenAttention:
    dtype, config = _computes_in(model)[0], model.config
    invariant = invariance.asked(config)
    return for_bucket(segments, rows, dtype, config.num_attention_heads, head_dim(config), gradients, invariant)


class CUDAGraphs:
    """A model that replays CUDA graphs: `CUDAGraphs(model)(**packed.to("cuda"))`, forward and backward.

    Gradients are recorded as by the model itself: not within `torch.inference_mode()` or `no_grad()`, nor of a frozen
    model. They reach `.grad` through autograd, a few layers at a time, so that what averages, clips or scales them goes
    on as ever. Outputs and gradients are the caller's own, untouched by later calls.

    Parameters are read at every call, so updates in place (an optimiser's, `load_state_dict`'s) are seen; what was
    replaced (by `model.to(...)`, an adapter) has the graphs captured anew. The first pack of a bucket waits for that.
    Where graphs cannot be right (hooks, sharded or quantised weights, a second forward before the first one's backward)
    the reason is logged once and the model itself runs. Several threads take turns.

    `model.cuda_graphs_enable()` and `from_pretrained(..., cuda_graphs=True)` have the model itself do so: within DDP,
    say.

    Args:
        model: on a CUDA device, bfloat16 or float16 (or float32 under autocast to one), in its final place.
        budgets: buckets' numbers of patches. A pack beyond the largest runs without a graph.
        least: so does a pack of fewer patches.
    """

    def __init__(self, model: Any, budgets: Sequence[int] = BUDGETS, least: int = 1):
        self.graphs = Graphs(budgets, least)
        if reason := buckets_unmet(model.device, _computes_in(model)[0], head_dim(model.config)):
            raise ValueError(f"no graphs of this model: attention in buckets {reason}")
        self.model = model

    @property
    def device(self) -> torch.device:
        return self.model.device  # type: ignore[no-any-return]

    def held(self) -> tuple[int, int]:
        """How many graphs there are, and the bytes of device memory that they share."""
        return self.graphs.held()

    def __call__(
        self,
        pixel_values: Tensor,
        grid_thw: Any,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        temporal: str | None = None,
    ) -> ModelOutput:
        """As the model's forward: `last_hidden_state` and, if it has a head, `pooler_output`.

        Raises:
            ValueError: what the model's forward raises; a pack on another device.
        """
        if not unhooked(self.model):
            self.graphs._say("hooks or a replaced forward on the model have to run in each call")
            return self.model(
                pixel_values,
                grid_thw=grid_thw,
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
                temporal=temporal,
                return_dict=True,
            )
        return self.model.features_of(self.graphs, pixel_values, grid_thw, cu_seqlens, max_seqlen, temporal)


def replayed(model: Any, patch_budget: int) -> Any:
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
