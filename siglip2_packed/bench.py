"""`siglip2-packed bench`: this encoder beside the others, the same images and weights, in turn, answers first.

Every provider gives token features of the same patches; what it computes on padding counts as time, never as work. One
whose features are not the float32 reference's is named with its error and not timed.

Shapes: N images, T patches, P patch_dim, D hidden size, F MLP width, L layers.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from siglip2_packed.graphs import BUDGETS, CUDAGraphs
from siglip2_packed.measure import Rows, card_name, cpu_name, relative_error
from siglip2_packed.modeling import Siglip2PackedVisionModel
from siglip2_packed.packing import PackedPatches, pad, unpack
from siglip2_packed.random_checkpoint import SHAPES, randomize
from siglip2_packed.workloads import WORKLOADS, attention_flops, forward_flops, grids

PEAK_TFLOPS = {"H100": 989, "H200": 989}  # dense bfloat16, by the data sheets; MFU is printed for these only
ATTENTION_TFLOPS = 500
"""A forward's floor, on those cards: the time of `gemm_chain`, and attention's work at this rate."""
WARM_UP = 0.25
"""Seconds."""
BOUND = {torch.bfloat16: 0.05, torch.float16: 0.02, torch.float32: 1e-4}


class Packed:
    """Ours. `tokens` is what is timed; `rows` brings its result to `[T, D]` for the comparison."""

    trains = True
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


class Compiled(Packed):
    def __init__(self, *args):
        super().__init__(*args)
        for layer in self.model.encoder.layers:
            layer.compile()


class Graphs(Packed):
    trains = False

    def __init__(self, *args):
        super().__init__(*args)
        self.graphs = CUDAGraphs(self.model)

    def inputs(self, packed):
        if len(packed["pixel_values"]) > BUDGETS[-1]:
            raise ValueError(f"{len(packed['pixel_values'])} patches are beyond the largest bucket, {BUDGETS[-1]}")
        return dict(packed)

    def tokens(self, inputs):
        return self.graphs(**inputs)["last_hidden_state"]


class Float8(Graphs):
    """Its kernels are done before a slow host has launched them: graphs here too, of the pack's own size."""

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
        lengths = [h * w for t, h, w in packed["grid_thw"].tolist() for _ in range(t)]
        return torch.cat([image[:length] for image, length in zip(tokens, lengths)])


class Timm(Padded):
    """timm's NaFlexVit, padded batches and a mask."""

    def __init__(self, config, state, device, dtype):
        timm = importlib.import_module("timm")
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
        fields = {name: getattr(config, name) for name in (*SHAPES["base"], "layer_norm_eps", "hidden_act")}
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
    "siglip2_packed:fp8": Float8,
    "transformers_sdpa_padded": Padded,
    "timm_naflexvit": Timm,
    "transformers_cosmos3_edge": Cosmos3Edge,
    "seed_padded": SeedPadded,
    "gemm_chain": GemmChain,
}
WHERE = {
    "siglip2_packed:compile": ("mixed",),
    "siglip2_packed:cudagraph": ("single256",),
    "siglip2_packed:fp8": ("uniform256", "mixed"),
    "seed_padded": ("uniform256", "naflex256", "mixed"),
}
"""Variants that say something for some workloads only."""
DEFAULT = ("siglip2_packed", "transformers_sdpa_padded", "gemm_chain")


def measure(
    rows: Rows,
    config: Siglip2VisionConfig,
    exact: Padded,
    workload: str,
    packed: PackedPatches,
    providers: dict[str, Packed],
    modes: Sequence[str],
    dtype: torch.dtype,
    rounds: int,
) -> None:
    """Checks every provider on a pack, then times those that are right, in turn; prints and keeps the rows.

    `exact` is the float32 reference.
    """
    device = packed["pixel_values"].device
    expected = reference(exact, packed)
    total, images = len(packed["pixel_values"]), len(packed["grid_thw"])
    images_thw = [tuple(grid) for grid in packed["grid_thw"].tolist()]
    flops, attention = forward_flops(config, images_thw), attention_flops(config, images_thw)
    name = str(dtype).removeprefix("torch.")
    ready: dict[str, tuple[Packed, Any]] = {}
    for key, provider in providers.items():
        try:
            inputs = provider.inputs(packed)
            if key != "gemm_chain":
                with torch.no_grad():
                    out = provider.rows(provider.tokens(inputs), packed).float()
                error = relative_error(out, expected)
                cosine = F.cosine_similarity(out.double(), expected.double(), dim=-1).min().item()
                rows.add(key, workload, "forward", name, "relative_error", error, "")
                rows.add(key, workload, "forward", name, "min_cosine", cosine, "")
                if not (error <= BOUND[dtype] or (key.endswith("fp8") and cosine > 0.99)):
                    print(f"{workload:11} {key:26} refused: relative error {error:.1e}, min cosine {cosine:.4f}")
                    continue
            ready[key] = provider, inputs
        except (ValueError, RuntimeError, TypeError) as error:
            print(f"{workload:11} {key:26} cannot run: {str(error)[:120]}")
    del expected
    for mode in modes:
        steps = {
            key: step(provider, inputs, mode)
            for key, (provider, inputs) in ready.items()
            if mode == "forward" or provider.trains
        }
        times = steady_milliseconds(steps, rounds, device)
        chain = times.get("gemm_chain")
        for key, samples in times.items():
            rows.add(key, workload, mode, name, "time", samples, "ms")
            if key == "gemm_chain":
                continue
            seconds = [x / 1e3 for x in samples]
            rows.add(key, workload, mode, name, "patches_per_s", [total / x for x in seconds], "1/s")
            rows.add(key, workload, mode, name, "images_per_s", [images / x for x in seconds], "1/s")
            work = flops * (3 if mode == "train" else 1)
            peak = next((x for card, x in PEAK_TFLOPS.items() if card in rows.common["card"]), None)
            if peak and dtype == torch.bfloat16:
                if chain:
                    floor = statistics.median(chain) + attention / ATTENTION_TFLOPS / 1e9
                    rows.add(key, workload, mode, name, "over_floor", [x / floor for x in samples], "")
                rows.add(key, workload, mode, name, "mfu", [work / x / peak / 1e12 for x in seconds], "")
            if device.type == "cuda":
                memory = peak_memory(ready[key][0], steps[key])
                rows.add(key, workload, mode, name, "peak_memory", memory / 2**30, "GiB")
        for key in steps:
            print(line(rows, workload, mode, key), flush=True)


def reference(exact: Padded, packed: PackedPatches) -> Tensor:
    """Token features `[T, D]` of transformers in float32, TF32 off, one image at a time."""
    device = packed["pixel_values"].device
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        outputs = []
        for grid, image in zip(packed["grid_thw"].tolist(), unpack(packed["pixel_values"], packed["grid_thw"])):
            one = PackedPatches(image.float().cpu(), [tuple(grid)]).to(device)
            with torch.no_grad():
                outputs.append(exact.rows(exact.tokens(exact.inputs(one)), one))
        return torch.cat(outputs)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def step(provider: Packed, inputs: Any, mode: str) -> Callable[[], object]:
    """One forward, or one forward and backward with fresh gradients."""
    if mode == "forward":

        def forward():
            with torch.no_grad():
                return provider.tokens(inputs)

        return forward
    grad: list[Tensor] = []

    def train():
        for parameter in provider.model.parameters():
            parameter.grad = None
        out = provider.tokens(inputs)
        if not grad:
            grad.append(torch.randn_like(out))
        out.backward(grad[0])

    return train


def steady_milliseconds(
    steps: dict[str, Callable], rounds: int, device: torch.device, samples: int = 3
) -> dict[str, list[float]]:
    """In every round each function runs to warm up, then at least `samples` times.

    On CUDA one step follows the other without waiting, as in a loop over data: the host prepares a step while the
    device works on the one before. There warm-up takes at least `WARM_UP` seconds, and so do the samples: the clock of
    a card at its power limit is first that of what ran before, and then swings for tenths of a second.
    """
    times: dict[str, list[float]] = {key: [] for key in steps}
    for _ in range(rounds):
        for key, function in steps.items():
            if device.type == "cuda":
                _cuda_milliseconds(function, 1)
                times[key] += _cuda_milliseconds(function, samples)
            else:
                function()
                times[key] += _cpu_milliseconds(function, samples)
    return times


def _cpu_milliseconds(function: Callable, samples: int) -> list[float]:
    stamps = [time.perf_counter()]
    for _ in range(samples):
        function()
        stamps.append(time.perf_counter())
    return [(end - begin) * 1e3 for begin, end in itertools.pairwise(stamps)]


def _cuda_milliseconds(function: Callable, samples: int) -> list[float]:
    """Of at least so many steps, and of those of `WARM_UP` seconds; the host is at most two ahead of the device."""
    begin, events = time.perf_counter(), [torch.cuda.Event(enable_timing=True)]
    events[0].record()
    while len(events) <= samples or time.perf_counter() - begin < WARM_UP:
        function()
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()
        events[max(0, len(events) - 3)].synchronize()
    events[-1].synchronize()
    return [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]


def peak_memory(provider: Packed, function: Callable) -> int:
    """Bytes: the provider's weights, and the most that a step allocates on top; other providers' are left out."""
    for parameter in provider.model.parameters():
        parameter.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    for parameter in provider.model.parameters():
        parameter.grad = None
    return peak + sum(x.nbytes for x in (*provider.model.parameters(), *provider.model.buffers()))


def line(rows: Rows, workload: str, mode: str, provider: str) -> str:
    def values(metric: str, mode: str = mode) -> Iterator[float]:
        for row in rows.rows:
            if (row["provider"], row["workload"], row["mode"], row["metric"]) == (provider, workload, mode, metric):
                yield float(row["p50"])

    units = {"time": "{:9.2f} ms", "patches_per_s": "{:9.0f} patches/s", "images_per_s": "{:8.1f} images/s"}
    units |= {"over_floor": "{:.2f}x its floor", "mfu": "MFU {:.3f}", "peak_memory": "{:6.2f} GiB"}
    parts = [text.format(value) for metric, text in units.items() for value in values(metric)]
    parts += [f"error {value:.1e}" for value in values("relative_error", "forward")]
    parts += [f"min cosine {value:.5f}" for value in values("min_cosine", "forward")]
    return f"{workload:11} {mode:8} {provider:26} {'  '.join(parts)}"


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


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", help="checkpoint to read; without it random weights of --shape")
    parser.add_argument("--shape", choices=list(SHAPES), default="so400m", help="size of random weights (so400m)")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=["uniform256", "mixed"],
                        help=f"of {', '.join(WORKLOADS)} (uniform256 mixed)")  # fmt: skip
    parser.add_argument("--images", type=int, help="images of each workload (as the workload says)")
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=list(DEFAULT), metavar="NAME",
                        help=f"of {', '.join(PROVIDERS)} ({' '.join(DEFAULT)})")  # fmt: skip
    parser.add_argument("--modes", nargs="+", choices=["forward", "train"], default=["forward", "train"],
                        help="inference, and forward with backward (both)")  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where to run (cuda if there is one)")  # fmt: skip
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="bfloat16 on CUDA, else float32")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of at least three samples of each provider (5)")
    parser.add_argument("--out", type=Path, help="CSV to write the rows to")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    device = torch.device(args.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # whose streams events are recorded on
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    config, state = weights(args.ckpt, args.shape, args.device)
    card = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    rows = Rows("encoder", card)
    exact = Padded(config, state, device, torch.float32)
    providers: dict[str, Packed] = {}
    for name in args.providers:
        try:
            with device:  # where initial values, replaced at once, are drawn in no time
                providers[name] = PROVIDERS[name](config, state, device, dtype)
        except (ImportError, ValueError, RuntimeError, AttributeError) as error:
            print(f"{name}: cannot be built: {str(error)[:160]}")
    for workload in args.workloads:
        images = grids(workload, images=args.images)
        total = sum(t * h * w for t, h, w in images)
        patches = torch.randn(total, state["embeddings.patch_embedding.weight"].shape[1])
        packed = PackedPatches(patches.to(dtype), images).to(device)
        chosen = {name: x for name, x in providers.items() if workload in WHERE.get(name, WORKLOADS)}
        measure(rows, config, exact, workload, packed, chosen, args.modes, dtype, args.rounds)
        if args.out:
            rows.write(args.out)  # after every workload: a run that is stopped has kept its rows
    return 0 if any(row["metric"] == "time" for row in rows.rows) else 1


def weights(ckpt: str | None, shape: str, device: str) -> tuple[Siglip2VisionConfig, dict[str, Tensor]]:
    """Configuration and float32 state of a vision tower without its pooling head."""
    if ckpt is not None:
        model = Siglip2PackedVisionModel.from_pretrained(ckpt, vision_use_head=False, dtype="float32")
    else:
        config = Siglip2VisionConfig(**SHAPES[shape], vision_use_head=False)
        torch.manual_seed(0)
        model = Siglip2PackedVisionModel(config)
        randomize(model, torch.Generator().manual_seed(0))
    return model.config, {key: value.to(device) for key, value in model.state_dict().items()}


__all__ = ["PROVIDERS", "card_name", "configure", "measure", "run", "weights"]
