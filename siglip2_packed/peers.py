"""The encoders that `bench` holds beside each other, ours and others', each behind the same few methods.

Every one gives token features of the same patches; what it computes on padding counts as time, never as work.

Shapes: T patches, D hidden size, F MLP width, L layers.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Siglip2VisionModel

from siglip2_packed.graphs import BUDGETS, CUDAGraphs
from siglip2_packed.modeling import Siglip2PackedVisionModel
from siglip2_packed.packing import PackedPatches, pad
from siglip2_packed.workloads import FIELDS


class Packed:
    """Ours. `tokens` is what is timed; `rows` brings its result to `[T, D]` for the comparison, `tokens_of` is back."""

    trains = True
    replays = False
    """CUDA graphs, which hold memory of their own."""
    model: Any

    def __init__(self, config, state, device, dtype):
        self.model = Siglip2PackedVisionModel(copy.deepcopy(config))
        self.model.load_state_dict(state)
        self.model.to(device, dtype).train()

    def inputs(self, packed: PackedPatches) -> Any:
        return dict(packed)

    def tokens(self, inputs: Any) -> Tensor:
        return self.model(**inputs).last_hidden_state

    def rows(self, tokens: Tensor, packed: PackedPatches) -> Tensor:
        return tokens

    def tokens_of(self, rows: Tensor, packed: PackedPatches) -> Tensor:
        return rows


class Compiled(Packed):
    def __init__(self, *args):
        super().__init__(*args)
        for layer in self.model.encoder.layers:
            layer.compile()


class Graphs(Packed):
    replays = True

    def __init__(self, *args):
        super().__init__(*args)
        self.graphs = CUDAGraphs(self.model)

    def inputs(self, packed):
        if len(packed["pixel_values"]) > BUDGETS[-1]:
            raise ValueError(f"{len(packed['pixel_values'])} patches are beyond the largest bucket, {BUDGETS[-1]}")
        return dict(packed)

    def tokens(self, inputs):
        return self.graphs(**inputs)["last_hidden_state"]


class BatchInvariant(Graphs):
    """In graphs, but for packs beyond the largest bucket."""

    def __init__(self, *args):
        super().__init__(*args)
        self.model.config.batch_invariant = True

    def inputs(self, packed):
        return dict(packed)


class Float8(Graphs):
    """Its kernels are done before a slow host has launched them: graphs here too, of the pack's own size."""

    trains = False

    def __init__(self, *args):
        from siglip2_packed.fp8 import quantize_fp8

        Packed.__init__(self, *args)
        quantize_fp8(self.model)

    def inputs(self, packed):
        self.graphs = CUDAGraphs(self.model, [len(packed["pixel_values"])])
        return dict(packed)


class Padded(Packed):
    """`transformers.Siglip2VisionModel`, padded batches and a mask."""

    def __init__(self, config, state, device, dtype):
        config = copy.deepcopy(config)
        config._attn_implementation = "sdpa"
        self.model = Siglip2VisionModel(config)
        prefix = "vision_model." if hasattr(self.model, "vision_model") else ""
        self.model.load_state_dict({prefix + key: value for key, value in state.items()})
        self.model.to(device, dtype).train()

    def inputs(self, packed):
        device = packed["pixel_values"].device
        frames = [(1, h, w) for t, h, w in packed["grid_thw"].tolist() for _ in range(t)]
        padded = pad(PackedPatches(packed["pixel_values"].cpu(), frames))
        return {key: value.to(device) for key, value in padded.items()}

    def rows(self, tokens, packed):
        return torch.cat([image[:length] for image, length in zip(tokens, frame_lengths(packed))])

    def tokens_of(self, rows, packed):
        return pad_sequence(rows.split(frame_lengths(packed)), batch_first=True)


class PaddedGraphs(Padded):
    """Its encoder replayed from CUDA graphs of the pack's own sizes and mask, captured at the first call of each mode.

    Embeddings and the last norm run as ever. In training the graphs are `torch.cuda.make_graphed_callables`'s, whose
    gradients lie in buffers that the next step writes: right for a step whose `.grad` began as None, not to add up.
    """

    replays = True

    def __init__(self, config, state, device, dtype):
        if torch.device(device).type != "cuda":
            raise ValueError(f"CUDA graphs need a CUDA device, not {device}")
        super().__init__(config, state, device, dtype)

    @property
    def vision(self) -> Any:
        return getattr(self.model, "vision_model", self.model)

    def inputs(self, packed):
        inputs = super().inputs(packed)
        self.mask, self.graphs = self._mask(inputs), {}
        return inputs

    def tokens(self, inputs):
        hidden_states = self.vision.embeddings(inputs["pixel_values"], inputs["spatial_shapes"])
        return self.vision.post_layernorm(self.encode(hidden_states))

    def encode(self, hidden_states: Tensor) -> Tensor:
        trains = torch.is_grad_enabled()
        if trains not in self.graphs:
            sample = hidden_states.detach().clone().requires_grad_(trains)
            capture = torch.cuda.make_graphed_callables if trains else _replayed
            self.graphs[trains] = capture(_MaskedEncoder(self.vision.encoder, self.mask), (sample,))
        return self.graphs[trains](hidden_states)

    def _mask(self, inputs: Any) -> Tensor | None:
        """As the model makes it for its encoder."""
        calls: list[dict] = []
        hook = self.vision.encoder.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True
        )
        with hook, torch.no_grad():
            self.model(**inputs)
        return calls[0]["attention_mask"]


class PaddedReduceOverhead(PaddedGraphs):
    """Its encoder under `torch.compile(mode="reduce-overhead")`, compiled for the pack's own sizes and mask."""

    def inputs(self, packed):
        torch.compiler.reset()  # or the fifth pack would run as it is, for too many recompilations
        inputs = super().inputs(packed)
        encoder = _MaskedEncoder(self.vision.encoder, self.mask)
        self.compiled = torch.compile(encoder, mode="reduce-overhead", dynamic=False)
        return inputs

    def encode(self, hidden_states):
        torch.compiler.cudagraph_mark_step_begin()
        return self.compiled(hidden_states)


class _MaskedEncoder(torch.nn.Module):
    """transformers' encoder as a module of one tensor."""

    def __init__(self, encoder: torch.nn.Module, mask: Tensor | None):
        super().__init__()
        self.encoder = encoder
        self.register_buffer("mask", mask)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.encoder(inputs_embeds=hidden_states, attention_mask=self.mask).last_hidden_state


def _replayed(function, sample: tuple[Tensor]):
    """Its forward in a CUDA graph; what it returns is written anew by the next call."""
    (static,) = sample
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(static)

    def replay(hidden_states: Tensor) -> Tensor:
        static.copy_(hidden_states)
        graph.replay()
        return out

    return replay


class Timm(Padded):
    """timm's NaFlexVit, padded batches and a mask."""

    def __init__(self, config, state, device, dtype):
        try:
            timm = importlib.import_module("timm")
        except ImportError as error:
            raise ImportError(f"timm cannot be imported ({error}): pip install 'siglip2-packed[timm]'") from error
        name = {1152: "so400m", 768: "base"}.get(config.hidden_size)
        if name is None:
            raise ValueError(f"timm has no NaFlexVit of hidden size {config.hidden_size}")
        self.model = timm.create_model(f"naflexvit_{name}_patch16_siglip", num_classes=0, global_pool="")
        self.model.load_state_dict(_timm_state(state, config))
        self.model.to(device, dtype).train()

    def inputs(self, packed):
        padded = super().inputs(packed)
        shapes, longest = padded["spatial_shapes"].cpu(), padded["pixel_values"].shape[1]
        coordinates = torch.zeros(len(shapes), longest, 2, dtype=torch.long)
        for i, (h, w) in enumerate(shapes.tolist()):
            coordinates[i, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(-1, 2)
        device = padded["pixel_values"].device
        return {
            "patches": padded["pixel_values"],
            "patch_coord": coordinates.to(device),
            "patch_valid": padded["pixel_attention_mask"].bool(),
        }

    def tokens(self, inputs):
        return self.model.forward_features(**inputs)["patches"]


class Cosmos3Edge(Packed):
    """transformers' own packed SigLIP2, the vision tower of Cosmos3 Edge."""

    def __init__(self, config, state, device, dtype):
        module = importlib.import_module("transformers.models.cosmos3_edge.modeling_cosmos3_edge")
        fields = {name: getattr(config, name) for name in (*FIELDS, "layer_norm_eps", "hidden_act")}
        settings = module.Cosmos3EdgeVisionConfig(**fields, spatial_merge_size=1)
        settings._attn_implementation = "sdpa"
        self.model = module.Cosmos3EdgeVisionModel(settings)
        self.model.load_state_dict(state)
        self.model.to(device, dtype).train()

    def inputs(self, packed):
        pixel_values = packed["pixel_values"]
        return {"pixel_values": pixel_values, "grid_thw": packed["grid_thw"].to(pixel_values.device)}


class SeedPadded(Padded):
    """The seed's way, padded inside a packed API: `kernels_ref`, whose attention and norms run in float32."""

    trains = False

    def __init__(self, config, state, device, dtype):
        self.model = torch.nn.ParameterList(state.values()).to(device, dtype)
        self.state = dict(zip(state, self.model))
        self.config = config

    def tokens(self, inputs):
        from kernels_ref.encoder import padded_encoder

        return padded_encoder(self.state, self.config, **inputs).last_hidden_state


class GemmChain(Packed):
    """The four linear layers of every layer, nothing else: what any encoder built on these products takes."""

    trains = False

    def __init__(self, config, state, device, dtype):
        self.layers, d, f = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        shapes = [(3 * d, d), (d, d), (f, d), (d, f)]
        self.model = torch.nn.ModuleList(torch.nn.Linear(k, n) for n, k in shapes).to(device, dtype)

    def inputs(self, packed):
        weight = self.model[0].weight
        return [torch.randn(len(packed["pixel_values"]), x.in_features).to(weight) for x in self.model]

    def tokens(self, inputs):
        for _ in range(self.layers):
            for linear, x in zip(self.model, inputs):
                out = F.linear(x, linear.weight, linear.bias)
        return out


PROVIDERS: dict[str, type[Packed]] = {
    "siglip2_packed": Packed,
    "siglip2_packed:compile": Compiled,
    "siglip2_packed:cudagraph": Graphs,
    "siglip2_packed:batch_invariant": BatchInvariant,
    "siglip2_packed:fp8": Float8,
    "transformers_sdpa_padded": Padded,
    "transformers_sdpa_padded:cudagraph": PaddedGraphs,
    "transformers_sdpa_padded:compile": PaddedReduceOverhead,
    "timm_naflexvit": Timm,
    "transformers_cosmos3_edge": Cosmos3Edge,
    "seed_padded": SeedPadded,
    "gemm_chain": GemmChain,
}
"""By the names of `workloads.PROVIDERS`."""


def frame_lengths(packed: PackedPatches) -> list[int]:
    return [h * w for t, h, w in packed["grid_thw"].tolist() for _ in range(t)]


def _timm_state(state: dict[str, Tensor], config) -> dict[str, Tensor]:
    side = int(config.num_patches**0.5)
    out = {
        "embeds.proj.weight": state["embeddings.patch_embedding.weight"],
        "embeds.proj.bias": state["embeddings.patch_embedding.bias"],
        "embeds.pos_embed": state["embeddings.position_embedding.weight"].view(1, side, side, -1),
        "norm.weight": state["post_layernorm.weight"],
        "norm.bias": state["post_layernorm.bias"],
    }
    names = {"layer_norm1": "norm1", "self_attn.out_proj": "attn.proj", "layer_norm2": "norm2"}
    names |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for i in range(config.num_hidden_layers):
        for kind in ("weight", "bias"):
            layer = f"encoder.layers.{i}."
            for ours, theirs in names.items():
                out[f"blocks.{i}.{theirs}.{kind}"] = state[f"{layer}{ours}.{kind}"]
            out[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(
                [state[f"{layer}self_attn.{x}_proj.{kind}"] for x in ("q", "k", "v")]
            )
    return out
