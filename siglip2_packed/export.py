"""The model as a graph that runs without this package: torch.export, AOTInductor, ONNX.

    program = export(model)                                  # a torch.export.ExportedProgram
    last_hidden_state, pooler_output = program.module()(**export_inputs(packed))
    torch._inductor.aoti_compile_and_package(program, package_path="siglip2.pt2")
    export_onnx(model, "siglip2.onnx")                       # the same inputs, by name

Three tensors say what a pack is: `pixel_values [T, P]`, `grid_thw [N, 3]` and `seqlens [S]`, the rows of each attention
segment (of an image: h·w). All else is computed from them within the graph, which serves any pack. A graph for packs
laid out as one, `export(model, packed)`, takes `pixel_values` alone.

Shapes: N images, S attention segments, T total patches, P patch_dim, D hidden size, G side of the position table,
H heads, K head_dim.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from siglip2_packed import invariance, plain
from siglip2_packed.configuration import patch_dim
from siglip2_packed.embeddings import Siglip2PackedEmbeddings
from siglip2_packed.encoder import Siglip2PackedEncoder, Siglip2PackedEncoderLayer
from siglip2_packed.kinds import NAFLEX, kind_of, position_mode
from siglip2_packed.layout import make_layout
from siglip2_packed.modeling import Siglip2PackedVisionModel
from siglip2_packed.ops.positions import ANTIALIASED
from siglip2_packed.packing import PackedPatches, check_patches
from siglip2_packed.pooling import PoolingAttention, Siglip2PackedPoolingHead
from siglip2_packed.quantized import FLOATING
from siglip2_packed.towers import Siglip2PackedVisionTower

INPUTS = {"pixel_values": "patches", "grid_thw": "images", "seqlens": "segments"}
"""Their names, and what their first dimensions count."""
OUTPUTS = ("last_hidden_state", "pooler_output")
TRACED = [(1, 2, 3), (2, 3, 2)]
"""Grids to trace with: T, N and S differ, and none is 1."""


def export(
    model: Siglip2PackedVisionModel, packed: Mapping[str, Any] | None = None, *, strict: bool = False
) -> ExportedProgram:
    """The model as one graph: `(last_hidden_state [T, D], pooler_output [N, D])`, the first alone without a head.

    Args:
        model: in eval mode; a tower that `replace_vision_tower` gave back, too. Adapters are exported as they compute.
        packed: the graph is for packs laid out as this one (`PackedPatches`), and takes their `pixel_values`.
            None: for any pack, as `export_inputs` gives it; attention then pads every segment to the longest.
        strict: as `torch.export.export` takes it.

    Raises:
        ValueError: hooks, replaced parts (float8), quantised or sharded weights: all that a graph would leave out.
    """
    check_exportable(model)
    traced = torch.zeros(sum(map(math.prod, TRACED)), patch_dim(model.config), device="cpu")
    example = PackedPatches(traced, TRACED) if packed is None else packed
    inputs = {name: x.to(model.device) for name, x in export_inputs(example).items()}
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        if packed is None:
            sizes = {name: {0: Dim(size)} for name, size in INPUTS.items()}
            return torch.export.export(AnyPackEncoder(model), (), inputs, dynamic_shapes=sizes, strict=strict)
        encoder = OnePackEncoder(model, inputs.pop("grid_thw"), inputs.pop("seqlens"))
        return torch.export.export(encoder, (), inputs, strict=strict)


def export_onnx(
    model: Siglip2PackedVisionModel,
    file: str | os.PathLike,
    packed: Mapping[str, Any] | None = None,
    **options: Any,
) -> torch.onnx.ONNXProgram:
    """Writes the graph of `export(model, packed)` as ONNX, with the inputs and outputs that are named here.

    Positions are products of matrices: of Resize, antialias differs between runtimes. The CPU of onnxruntime computes
    float32 and float16, not bfloat16. Weights may lie in a second file beside this one (`external_data`).

    Args:
        options: others of `torch.onnx.export`, as `opset_version`.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: as `export`.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{' and '.join(missing)} not installed: pip install 'siglip2-packed[onnx]'")
    names = INPUTS if packed is None else {"pixel_values": None}
    written = torch.onnx.export(
        export(model, packed),
        (),
        file,
        input_names=list(names),
        output_names=OUTPUTS[: 2 if hasattr(model, "head") else 1],
        dynamic_shapes={name: {0: size} for name, size in names.items() if size},
        **{"dynamo": True, "verbose": False, **options},
    )
    assert written is not None
    return written


def export_inputs(packed: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the graph for any pack takes, checked: `pixel_values [T, P]`, `grid_thw [N, 3]` and `seqlens [S]`, int64.

    The graph itself cannot tell what is wrong: sizes that do not fit its patches make all its features NaN.

    Raises:
        ValueError: no images, or patches, grids and segments that do not fit each other.
    """
    pixel_values = packed["pixel_values"]
    check_patches(pixel_values)
    layout = make_layout(packed["grid_thw"], total_patches=len(pixel_values), cu_seqlens=packed.get("cu_seqlens"))
    if not layout.grids:
        raise ValueError("an exported graph needs at least one image, the pack has none")
    numbers = {"grid_thw": layout.grids, "seqlens": layout.lengths}
    on_device = {name: torch.tensor(x, dtype=torch.int64, device=pixel_values.device) for name, x in numbers.items()}
    return {"pixel_values": pixel_values.float(), **on_device}


class Encoder(nn.Module):
    """The model's arithmetic without its choice of kernels."""

    def __init__(self, model: Siglip2PackedVisionModel):
        super().__init__()
        self.model = model

    def features(
        self, pixel_values: Tensor, positions: Tensor, segments: Segments, images: Segments
    ) -> tuple[Tensor, ...]:
        """`[T, P]` and positions `[T, D]` -> `[T, D]` and, of a model with a head, `[N, D]`."""
        model: Any = self.model
        hidden_states = model.embeddings.patch_embedding(pixel_values.to(model.dtype)) + positions.to(model.dtype)
        for layer in model.encoder.layers:
            hidden_states = hidden_states + layer.self_attn(layer.layer_norm1(hidden_states), segments.attention)
            hidden_states = hidden_states + layer.mlp(layer.layer_norm2(hidden_states))
        if hasattr(model, "post_layernorm"):
            hidden_states = model.post_layernorm(hidden_states)
        return (hidden_states, self.pooled(hidden_states, images)) if hasattr(model, "head") else (hidden_states,)

    def pooled(self, hidden_states: Tensor, images: Segments) -> Tensor:
        """`[T, D]` -> `[N, D]`."""
        head = self.model.head
        attention = head.attention
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        inputs = head.probe[0], hidden_states, hidden_states
        q, k, v = (F.linear(*x).unflatten(-1, (-1, attention.head_dim)) for x in zip(inputs, weights, biases))
        pooled = attention.out_proj(images.pool(q, k, v).flatten(1))
        return pooled + head.mlp(head.layernorm(pooled))

    def positions(self, grid_thw: Tensor, images: PaddedSegments) -> Tensor:
        """`[T, D]` in float32: the table resized as by `ops.positions`, in a product with dense weights `[T, G·G]`.

        Where a runtime takes TF32 for such products, positions are rounded as all else is.
        """
        _, h, w = grid_thw[images.of_row].unbind(1)
        patch = images.step_of_row % (h * w)
        embedding: Any = self.model.embeddings.position_embedding
        entries = embedding.weight.shape[0]
        side = math.isqrt(entries)
        of_row, of_column = position_weights(patch // w, h, side), position_weights(patch % w, w, side)
        table = embedding(torch.arange(entries, device=grid_thw.device))
        return (of_row[:, :, None] * of_column[:, None, :]).flatten(1) @ table.float()


class AnyPackEncoder(Encoder):
    def forward(self, pixel_values: Tensor, grid_thw: Tensor, seqlens: Tensor) -> tuple[Tensor, ...]:
        """`[T, P]`, `[N, 3]`, `[S]`: see `export_inputs`."""
        rows, image_lengths = pixel_values.shape[0], grid_thw.prod(1)  # of shape, as len() would be a constant
        segments, images = PaddedSegments(seqlens, rows), PaddedSegments(image_lengths, rows)
        fits = (seqlens.sum() == rows) & (image_lengths.sum() == rows)
        positions = torch.where(fits, self.positions(grid_thw, images), torch.nan)
        return self.features(pixel_values, positions, segments, images)


class OnePackEncoder(Encoder):
    of_patches: Tensor

    def __init__(self, model: Siglip2PackedVisionModel, grid_thw: Tensor, seqlens: Tensor):
        super().__init__(model)
        image_lengths = grid_thw.prod(1)
        self.segments, self.images = SplitSegments(seqlens.tolist()), SplitSegments(image_lengths.tolist())
        positions = self.positions(grid_thw, PaddedSegments(image_lengths, sum(self.images.lengths)))
        self.register_buffer("of_patches", positions)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """`[T, P]`."""
        return self.features(pixel_values, self.of_patches, self.segments, self.images)


class PaddedSegments:
    """Rows of segments of any lengths `[S]`, padded to the longest, with rows of their own that are masked.

    Attention has S·max² scores a head, of which it needs the sum of the lengths' squares.
    """

    def __init__(self, lengths: Tensor, rows: int):
        ends = lengths.cumsum(0)
        starts = ends - lengths
        longest: int = lengths.max().clamp(min=2).item()  # type: ignore[assignment]
        torch._check(longest >= 2)  # a size of 1 would be a graph of its own
        step, row = (torch.arange(n, device=lengths.device) for n in (longest, rows))
        self.real = step < lengths[:, None]
        self.rows = starts[:, None] + torch.where(self.real, step, 0)  # [S, max]
        self.of_row = (row[:, None] >= ends).sum(1)
        self.step_of_row = row - starts[self.of_row]

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[T, H, K]` each -> `[T, H, K]`."""
        return self._attend(self._padded(q), k, v).transpose(1, 2)[self.of_row, self.step_of_row]

    def pool(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[1, H, K]`, one query for all segments, and twice `[T, H, K]` -> `[S, H, K]`."""
        return self._attend(q[:, :, None].expand(self.rows.shape[0], -1, -1, -1), k, v)[:, :, 0]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, self._padded(k), self._padded(v), self.real[:, None, None])

    def _padded(self, x: Tensor) -> Tensor:
        """`[T, H, K]` -> `[S, H, max, K]`."""
        return x[self.rows].transpose(1, 2)


class SplitSegments:
    """Rows of segments of known lengths, one after another."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([_attend(*segment) for segment in zip(*(x.split(self.lengths) for x in (q, k, v)))])

    def pool(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([_attend(q, *segment) for segment in zip(*(x.split(self.lengths) for x in (k, v)))])


Segments = PaddedSegments | SplitSegments


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of one segment: `[m, H, K]`, `[n, H, K]` twice -> `[m, H, K]`."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def position_weights(index: Tensor, target: Tensor, side: int) -> Tensor:
    """`[T, G]` float32: what place `index` of a side resized to `target` takes of each of the table's G.

    A triangle of half-width max(G / target, 1) around the centre (index + ½)·G / target, normalised. Times
    2·target·max(G / target, 1) it is a difference of integers, so that one division is all that is rounded.
    """
    place = 2 * torch.arange(side, device=index.device) + 1
    distance = ((2 * index + 1)[:, None] * side - place * target[:, None]).abs()
    weights = (2 * target.clamp(min=side)[:, None] - distance).clamp(min=0).float()
    return weights / weights.sum(1, keepdim=True)


def check_exportable(model: Any) -> None:
    """Raises ValueError, with the name of the module, for what the graph would compute otherwise than the model."""
    if type(model) not in (Siglip2PackedVisionModel, Siglip2PackedVisionTower):
        raise ValueError(
            f"only a Siglip2PackedVisionModel can be exported, got {type(model).__name__}: give the model within, "
            "neither wrapped nor sharded"
        )
    tower, mode = model.config.model_type, position_mode(model.config)
    if mode != ANTIALIASED or kind_of(tower).convolution:
        raise ValueError(f"{tower} with {mode} positions cannot be exported, only {NAFLEX} with {ANTIALIASED} ones")
    if invariance.asked(model.config):
        raise ValueError("batch_invariant cannot be exported, as the products are those of who runs the graph")
    for name, module, kind in _arithmetic(model):
        if type(module) is not kind:
            raise ValueError(f"{name} is {type(module).__name__}, which cannot be exported, only {kind.__name__}")
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        if not plain.unhooked(module):
            raise ValueError(f"{where} has hooks or a forward of its own, which the graph would leave out")
        if ".quantized" in type(module).__module__:
            raise ValueError(f"{where} is quantised, which cannot be exported: export the model it was made of")
        if module.training:
            raise ValueError(f"{where} is in training mode: call model.eval() first")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if type(tensor) not in plain.WHOLE or tensor.dtype not in FLOATING:
            raise ValueError(
                f"{name} is {type(tensor).__name__} of {tensor.dtype}, quantised or sharded, which cannot be exported: "
                "export the model it was made of"
            )


def _arithmetic(model: Siglip2PackedVisionModel) -> Iterator[tuple[str, nn.Module, type]]:
    """The modules whose forward is written out here, with what they have to be."""
    yield "embeddings", model.embeddings, Siglip2PackedEmbeddings
    yield "encoder", model.encoder, Siglip2PackedEncoder
    for i, layer in enumerate(model.encoder.layers):
        yield f"encoder.layers.{i}", layer, Siglip2PackedEncoderLayer
    if hasattr(model, "head"):
        yield "head", model.head, Siglip2PackedPoolingHead
        yield "head.attention", model.head.attention, PoolingAttention
