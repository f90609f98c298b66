"""`siglip2-packed bench`: this encoder beside the others, the same images and weights, in turn, answers first.

An encoder whose features are not the float32 reference's is named with its error and not timed; so is one that cannot
run. stderr says what is being done: on a CPU every step takes seconds.

Shapes: N images, T patches, P patch_dim, D hidden size, L layers.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Siglip2VisionConfig

from siglip2_packed.flags import pick_device
from siglip2_packed.kinds import position_mode
from siglip2_packed.measure import PEAK_TFLOPS, Rows, card_name, check_rate, cpu_name, relative_error
from siglip2_packed.modeling import Siglip2PackedVisionModel
from siglip2_packed.ops.positions import ANTIALIASED
from siglip2_packed.packing import PackedPatches, unpack
from siglip2_packed.peers import PROVIDERS, Packed, Padded
from siglip2_packed.random_checkpoint import randomize
from siglip2_packed.workloads import PROVIDERS as WORKLOADS_OF
from siglip2_packed.workloads import SHAPES, attention_flops, fitting_grids, forward_flops, grids

ATTENTION_TFLOPS = 500
"""A forward's floor, on those cards: the time of `gemm_chain`, and attention's work at this rate."""
WARM_UP = 0.25
"""Seconds."""
CPU_PATCHES = 512
"""Of a workload, unless `--images` says: what a CPU encodes in a second or two."""
BOUND = {torch.bfloat16: 0.05, torch.float16: 0.02, torch.float32: 1e-4}


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
) -> bool:
    """Checks every provider on a pack, then times those that are right, in turn; prints and keeps the rows.

    `exact` is the float32 reference. False: an answer, or a time, was refused.
    """
    ready, right = check(rows, exact, workload, packed, providers, dtype)
    return time_in_turn(rows, config, workload, packed, ready, modes, dtype, rounds) and right


def time_in_turn(
    rows: Rows,
    config: Siglip2VisionConfig,
    workload: str,
    packed: PackedPatches,
    ready: dict[str, tuple[Packed, Any]],
    modes: Sequence[str],
    dtype: torch.dtype,
    rounds: int,
) -> bool:
    """Times providers, each with its inputs, on a pack; prints and keeps the rows. False: a time was refused."""
    device, card, right = packed["pixel_values"].device, rows.common["card"], True
    images_thw = [tuple(grid) for grid in packed["grid_thw"].tolist()]
    total, images = sum(t * h * w for t, h, w in images_thw), len(images_thw)
    flops, attention = forward_flops(config, images_thw), attention_flops(config, images_thw)
    name, gradient = dtype_name(dtype), seeded_gradient(packed, config.hidden_size, dtype)
    for mode in modes:
        steps = {}
        for key, (provider, inputs) in ready.items():
            if mode == "forward" or provider.trains:
                steps[key] = step(provider, inputs, mode, provider.tokens_of(gradient, packed))
            else:
                rows.leave_out(key, workload, mode, name, "does not train")
        times = steady_milliseconds(steps, rounds, device, 3, f"{workload} {mode}: timing ")
        chain = times.get("gemm_chain")
        for key, samples in times.items():
            products = flops - attention - patch_flops(config, total)
            work = (products if key == "gemm_chain" else flops) * (3 if mode == "train" else 1)
            try:
                check_rate(work, min(samples), card, name, key.endswith("fp8"))
            except ValueError as error:
                refuse(rows, key, workload, mode, name, str(error))
                right = False
                continue
            rows.add(key, workload, mode, name, "time", samples, "ms")
            if key == "gemm_chain":
                continue
            seconds = [x / 1e3 for x in samples]
            rows.add(key, workload, mode, name, "patches_per_s", [total / x for x in seconds], "1/s")
            rows.add(key, workload, mode, name, "images_per_s", [images / x for x in seconds], "1/s")
            peak = next((x for known, x in PEAK_TFLOPS.items() if known in card), None)
            if peak and dtype == torch.bfloat16:
                if chain:
                    floor = statistics.median(chain) + attention / ATTENTION_TFLOPS / 1e9
                    rows.add(key, workload, mode, name, "over_floor", [x / floor for x in samples], "")
                rows.add(key, workload, mode, name, "mfu", [work / x / peak / 1e12 for x in seconds], "")
            if device.type == "cuda" and not ready[key][0].replays:
                memory = peak_memory(ready[key][0], steps[key])
                rows.add(key, workload, mode, name, "peak_memory", memory / 2**30, "GiB")
        for key in steps:
            if any(True for _ in values(rows, workload, mode, key, "time")):
                print(line(rows, workload, mode, key), flush=True)
    return right


def check(
    rows: Rows,
    exact: Padded,
    workload: str,
    packed: PackedPatches,
    providers: dict[str, Packed],
    dtype: torch.dtype,
) -> tuple[dict[str, tuple[Packed, Any]], bool]:
    """Providers that run and are right, each with its inputs; and whether none was wrong.

    Raises:
        ValueError: features of the reference that would pass anything: not finite, or all the same.
    """
    expected = expected_features(exact, workload, packed)
    name, right = dtype_name(dtype), True
    ready: dict[str, tuple[Packed, Any]] = {}
    for key, provider in providers.items():
        say(f"{workload}: checking {key}")
        try:
            inputs = provider.inputs(packed)
            if key != "gemm_chain":
                with torch.no_grad():
                    out = provider.rows(provider.tokens(inputs), packed).float()
                if not features_are_right(rows, key, workload, "forward", out, expected, dtype):
                    right = False
                    continue
            ready[key] = provider, inputs
        except (ValueError, RuntimeError, TypeError) as error:
            cannot_run(rows, key, workload, name, error)
    return ready, right


def expected_features(exact: Padded, workload: str, packed: PackedPatches, gradient: Tensor | None = None) -> Tensor:
    """`reference`, which must not be features that would pass anything."""
    say(f"{workload}: the float32 reference")
    expected = reference(exact, packed, gradient)
    if not expected.isfinite().all() or (expected == expected.flatten()[0]).all():
        raise ValueError(
            f"{workload}: the reference's features are not finite or all the same: nothing to compare with"
        )
    return expected


def features_are_right(
    rows: Rows,
    provider: str,
    workload: str,
    mode: str,
    out: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    bound: float | None = None,
) -> bool:
    """Whether features `[T, D]` are the reference's; keeps error and cosine, and says what is refused.

    `bound`: of the relative error, if it is not `BOUND`'s.
    """
    name, error = dtype_name(dtype), relative_error(out, expected)
    cosine = F.cosine_similarity(out.double(), expected.double(), dim=-1).min().item()
    rows.add(provider, workload, mode, name, "relative_error", error, "")
    rows.add(provider, workload, mode, name, "min_cosine", cosine, "")
    if error <= (BOUND[dtype] if bound is None else bound) or (provider.endswith("fp8") and cosine > 0.99):
        return True
    refuse(rows, provider, workload, mode, name, f"relative error {error:.1e}, min cosine {cosine:.4f}")
    return False


def refuse(rows: Rows, provider: str, workload: str, mode: str, dtype: str, reason: str) -> None:
    print(f"{workload:11} {mode:8} {provider:34} refused: {reason}", flush=True)
    rows.leave_out(provider, workload, mode, dtype, f"refused: {reason}")


def cannot_run(rows: Rows, provider: str, workload: str, dtype: str, error: object) -> None:
    """Says why there is no number."""
    reason = f"cannot run: {one_line(error)}"
    print(f"{workload:11} {provider:34} {reason}", flush=True)
    rows.leave_out(provider, workload, "forward", dtype, reason)


def say(stage: str) -> None:
    print(stage, file=sys.stderr, flush=True)


def one_line(error: object) -> str:
    return " ".join(str(error).split())[:160]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def patch_flops(config: Siglip2VisionConfig, total: int) -> int:
    """2TPD, of the patch embedding, which `gemm_chain` leaves out."""
    assert isinstance(config.patch_size, int)  # the model has seen to it
    return 2 * total * config.patch_size**2 * config.num_channels * config.hidden_size


def reference(exact: Padded, packed: PackedPatches, gradient: Tensor | None = None) -> Tensor:
    """Token features `[T, D]` of transformers in float32, TF32 off, one image at a time.

    With a gradient `[T, D]` of them, `exact.model`'s parameters have theirs afterwards.
    """
    device = packed["pixel_values"].device
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    exact.model.zero_grad()
    try:
        outputs: list[Tensor] = []
        for grid, image in zip(packed["grid_thw"].tolist(), unpack(packed["pixel_values"], packed["grid_thw"])):
            one = PackedPatches(image.float().cpu(), [tuple(grid)]).to(device)
            with torch.set_grad_enabled(gradient is not None):
                out = exact.rows(exact.tokens(exact.inputs(one)), one)
            if gradient is not None:
                begin = sum(map(len, outputs))
                out.backward(gradient[begin : begin + len(out)].float())
            outputs.append(out.detach())
        return torch.cat(outputs)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def seeded_gradient(packed: PackedPatches, width: int, dtype: torch.dtype) -> Tensor:
    """`[T, D]`, of the features: the same for every provider."""
    device = packed["pixel_values"].device
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(len(packed["pixel_values"]), width, generator=generator, device=device).to(dtype)


def step(provider: Packed, inputs: Any, mode: str, gradient: Tensor) -> Callable[[], Tensor]:
    """One forward, or one forward and backward with fresh gradients, given that of the tokens; returns the tokens."""
    if mode == "forward":

        def forward():
            with torch.no_grad():
                return provider.tokens(inputs)

        return forward

    def train():
        for parameter in provider.model.parameters():
            parameter.grad = None
        out = provider.tokens(inputs)
        out.backward(gradient)
        return out.detach()

    return train


def steady_milliseconds(
    steps: dict[str, Callable],
    rounds: int,
    device: torch.device,
    samples: int = 3,
    label: str = "timing ",
) -> dict[str, list[float]]:
    """In every round each function runs to warm up, then at least `samples` times; `label` and its name are said first.

    On CUDA one step follows the other without waiting, as in a loop over data: the host prepares a step while the
    device works on the one before. There warm-up takes at least `WARM_UP` seconds, and so do the samples: the clock of
    a card at its power limit is first that of what ran before, and then swings for tenths of a second.
    """
    times: dict[str, list[float]] = {key: [] for key in steps}
    for turn in range(rounds):
        for key, function in steps.items():
            if turn == 0:
                say(label + key)
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


def values(rows: Rows, workload: str, mode: str, provider: str, metric: str) -> Iterator[float]:
    for row in rows.rows:
        if (row["provider"], row["workload"], row["mode"], row["metric"]) == (provider, workload, mode, metric):
            yield float(row["p50"])


def line(rows: Rows, workload: str, mode: str, provider: str) -> str:
    units = {"time": "{:9.2f} ms", "patches_per_s": "{:9.0f} patches/s", "images_per_s": "{:8.1f} images/s"}
    units |= {"over_floor": "{:.2f}x its floor", "mfu": "MFU {:.3f}", "peak_memory": "{:6.2f} GiB"}
    parts = [text.format(x) for metric, text in units.items() for x in values(rows, workload, mode, provider, metric)]
    parts += [f"error {x:.1e}" for x in values(rows, workload, "forward", provider, "relative_error")]
    parts += [f"min cosine {x:.5f}" for x in values(rows, workload, "forward", provider, "min_cosine")]
    return f"{workload:11} {mode:8} {provider:34} {'  '.join(parts)}"


def run(args: argparse.Namespace) -> int:
    for flag, value in (("--images", args.images), ("--rounds", args.rounds)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} must be at least 1, got {value}")
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    if cuda and device.index is not None:
        torch.cuda.set_device(device)  # whose streams events are recorded on
    dtype = getattr(torch, args.dtype or ("bfloat16" if cuda else "float32"))
    modes = args.modes or (["forward", "train"] if cuda else ["forward"])
    config, state = weights(args.ckpt, args.shape or ("so400m" if cuda else "base"), device)
    rows = Rows("encoder", torch.cuda.get_device_name() if cuda else cpu_name())
    exact = Padded(config, state, device, torch.float32)
    providers = build(rows, args, config, state, device, dtype)
    right = True
    for workload in args.workloads:
        images = grids(workload, images=args.images) if cuda or args.images else fitting_grids(workload, CPU_PATCHES)
        total = sum(t * h * w for t, h, w in images)
        say(f"{workload}: {len(images)} images, {total} patches")
        patches = torch.randn(total, state["embeddings.patch_embedding.weight"].shape[1])
        packed = PackedPatches(patches.to(dtype), images).to(device)
        chosen = {}
        for name, provider in providers.items():
            if workload in WORKLOADS_OF[name]:
                chosen[name] = provider
            else:
                only = f"is timed on {', '.join(WORKLOADS_OF[name])} only"
                cannot_run(rows, name, workload, dtype_name(dtype), only)
        right &= measure(rows, config, exact, workload, packed, chosen, modes, dtype, args.rounds or (5 if cuda else 1))
        if args.out:
            rows.write(Path(args.out))  # after every workload: a run that is stopped has kept its rows
    return 0 if right and any(row["metric"] == "time" for row in rows.rows) else 1


def build(
    rows: Rows,
    args: argparse.Namespace,
    config: Siglip2VisionConfig,
    state: dict[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Packed]:
    """The providers asked for; rows and lines say why one of them is not among them."""
    providers: dict[str, Packed] = {}
    for name in args.providers:
        say(f"building {name}")
        try:
            with device:  # where initial values, replaced at once, are drawn in no time
                providers[name] = PROVIDERS[name](config, state, device, dtype)
        except (ImportError, ValueError, RuntimeError, AttributeError) as error:
            reason = f"cannot be built: {one_line(error)}"
            print(f"{name}: {reason}", flush=True)
            for workload in args.workloads:
                rows.leave_out(name, workload, "forward", dtype_name(dtype), reason)
    return providers


def weights(ckpt: str | None, shape: str, device: torch.device | str) -> tuple[Siglip2VisionConfig, dict[str, Tensor]]:
    """Configuration and float32 state of a vision tower without its pooling head."""
    if ckpt is not None:
        say(f"reading {ckpt}")
        model = Siglip2PackedVisionModel.from_pretrained(ckpt, vision_use_head=False, dtype="float32")
        if position_mode(model.config) != ANTIALIASED:
            raise ValueError(f"{ckpt!r} is no NaFlex tower, which is what bench has other encoders of")
    else:
        say(f"making random weights: {shape}")
        config = Siglip2VisionConfig(**SHAPES[shape], vision_use_head=False)
        torch.manual_seed(0)
        model = Siglip2PackedVisionModel(config)
        randomize(model, torch.Generator().manual_seed(0))
    return model.config, {key: value.to(device) for key, value in model.state_dict().items()}


__all__ = ["PEAK_TFLOPS", "PROVIDERS", "card_name", "measure", "run", "weights"]
