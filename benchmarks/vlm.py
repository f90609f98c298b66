"""Other people's models before and after `replace_vision_tower`: the tower alone, and the whole model around it.

    python benchmarks/vlm.py                                # real sizes, bfloat16, on one GPU
    python benchmarks/vlm.py --models lfm2_vl --rounds 2

Models are made from their configurations, with random weights: LFM2-VL-1.6B with a micro-batch of two conversations,
each of a picture in six tiles and four small images; the towers of SmolVLM2-2.2B and Gemma 3 with images of one size,
where there is no padding to save. A forward gives features of the tower, logits of the model; a training step ends with
every `.grad`, None before it. Answers and gradients are compared with transformers in float32 first; what is further
from it than transformers in the same precision is refused with its error and not timed, and a tower that cannot be
replaced is a row with the reason. Rows go to results/vlm_<card>.csv; readme_tables.py makes the book's table of them.

Shapes: N images, D hidden size, R rows of the answer that are no padding.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import transformers
from small_packs import MOST, WIDER, gradient_error, gradients
from torch import Tensor, nn
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer
from transformers.utils import logging

from siglip2_packed import bench
from siglip2_packed.measure import Rows, card_name, check_rate, cpu_name
from siglip2_packed.packing import pad
from siglip2_packed.random_checkpoint import randomize
from siglip2_packed.workloads import SHAPES, Grid, forward_flops

PEER, OURS = "transformers_sdpa_padded", "siglip2_packed"
TILE, SMALL = 32, [(16, 16), (14, 18), (12, 20), (20, 12), (10, 24), (18, 12), (10, 18), (12, 12)]
"""Patches: a side of a tile; (h, w) of the small images."""
LAYERS = "conv conv full_attention " * 3 + "conv full_attention " * 3 + "conv"
TEXT = {
    "real": dict(
        hidden_size=2048, intermediate_size=12288, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=65536, layer_types=LAYERS.split(),
    ),
    "tiny": dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, layer_types=["conv", "full_attention"], pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
}  # fmt: skip
WORDS = 64
"""Of the longer conversation."""


class Workload(NamedTuple):
    name: str
    part: Callable[[nn.Module], nn.Module]
    """Of the model, what is called and trained."""
    inputs: dict[str, Any]
    flops: int
    """Of a forward of the tower: what a step takes at least."""
    gradient: Tensor | None = None
    """Of a tower's features, at which its step begins, zero on padding."""
    labels: Tensor | None = None
    """Of a language model, whose step begins at its loss."""
    real: Tensor | None = None
    """`[N, max]`: features that are no padding; None: all are."""


def lfm2_vl(shape: str) -> tuple[nn.Module, list[Workload]]:
    """26 layers of so400m: what LFM2-VL-1.6B reads of its 27."""
    vision = dict(SHAPES["so400m"], num_hidden_layers=26) if shape == "real" else SHAPES["tiny"]
    config = transformers.Lfm2VlConfig(
        text_config={"model_type": "lfm2", **TEXT[shape]},
        vision_config={"model_type": "siglip2_vision_model", "vision_use_head": False, **vision},
    )
    model = transformers.Lfm2VlForConditionalGeneration(config)
    conversations = micro_batch(TILE if shape == "real" else TILE // 4)
    grids = [grid for conversation in conversations for grid in conversation]
    patches = torch.randn(sum(h * w for _, h, w in grids), vision["patch_size"] ** 2 * 3)
    images = dict(pad(patches, grids))
    ids = input_ids(conversations, config.image_token_id)
    flops, real = forward_flops(config.vision_config, grids), images["pixel_attention_mask"].bool()
    gradient = torch.randn(*real.shape, vision["hidden_size"]) * real[..., None]
    whole = {**images, "input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    labels = ids.masked_fill(ids == config.image_token_id, -100)
    return model, [
        Workload("lfm2_vl_tower", lambda model: model.model.vision_tower, images, flops, gradient, real=real),
        Workload("lfm2_vl_model", lambda model: model, whole, flops, labels=labels),
    ]


def micro_batch(side: int) -> list[list[Grid]]:
    """The images of two conversations; small ones shrink with the tiles, to even sides."""
    small = [(1, *(max(2, x * side // TILE // 2 * 2) for x in size)) for size in SMALL]
    return [[*[(1, side, side)] * 6, *some] for some in (small[::2], small[1::2])]


def input_ids(conversations: list[list[Grid]], image_token: int) -> Tensor:
    """`[2, length]`: a token for every four patches, then words, as many as fill the row."""
    counts = [sum(h * w // 4 for _, h, w in grids) for grids in conversations]
    words = torch.randint(3, image_token, (len(counts), max(counts) + WORDS))
    for row, count in zip(words, counts):
        row[:count] = image_token
    return words


def smolvlm(shape: str) -> tuple[nn.Module, list[Workload]]:
    sizes = fixed_sizes(shape, image_size=384)
    config = transformers.models.smolvlm.configuration_smolvlm.SmolVLMVisionConfig(**sizes)
    config._attn_implementation = "sdpa"
    return fixed("smolvlm_tower", SmolVLMVisionTransformer(config), 16 if shape == "real" else 3)


def gemma3(shape: str) -> tuple[nn.Module, list[Workload]]:
    config = transformers.SiglipVisionConfig(**fixed_sizes(shape, image_size=896), vision_use_head=False)
    return fixed("gemma3_tower", transformers.SiglipVisionModel(config), 4 if shape == "real" else 2)


def fixed_sizes(shape: str, image_size: int) -> dict[str, int]:
    """Of so400m with patches of 14 pixels."""
    changed = {"patch_size": 14, "image_size": image_size} if shape == "real" else {"image_size": 20}
    sizes: dict[str, int] = {**SHAPES["so400m" if shape == "real" else "tiny"], **changed}
    del sizes["num_patches"]
    return sizes


def fixed(name: str, tower: nn.Module, count: int) -> tuple[nn.Module, list[Workload]]:
    """A tower, as part of a model, with `count` images of its size."""
    config: Any = tower.config
    side = config.image_size // config.patch_size
    inputs = {"pixel_values": torch.randn(count, 3, config.image_size, config.image_size)}
    gradient = torch.randn(count, side * side, config.hidden_size)
    flops = forward_flops(config, [(1, side, side)] * count)
    return nn.ModuleDict({"tower": tower}), [Workload(name, lambda model: model["tower"], inputs, flops, gradient)]


MODELS = {"lfm2_vl": lfm2_vl, "smolvlm": smolvlm, "gemma3": gemma3}


def replaced(model: nn.Module) -> nn.Module:
    """Its towers, in their place.

    Raises:
        ImportError, ValueError: there is no replacement.
    """
    from siglip2_packed.vlm import replace_vision_tower

    replace_vision_tower(model)
    return model


def build(rows: Rows, model: nn.Module, workloads: list[Workload], dtype: torch.dtype) -> dict[str, nn.Module]:
    """Before and after; rows and lines say why there is no after."""
    providers = {PEER: copy.deepcopy(model).to(dtype)}
    try:
        providers[OURS] = replaced(copy.deepcopy(model).to(dtype))
    except (ImportError, ValueError, RuntimeError) as error:
        for workload in workloads:
            bench.cannot_run(rows, OURS, workload.name, bench.dtype_name(dtype), error)
    return providers


def step(model: nn.Module, workload: Workload, mode: str) -> Callable[[], Tensor]:
    """One forward, or one forward and backward with fresh gradients; returns the answer: features or logits."""
    part = workload.part(model)
    weight = next(part.parameters())
    inputs = {key: x.to(weight.device) if isinstance(x, Tensor) else x for key, x in workload.inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(weight.dtype)
    if mode == "forward":

        def forward():
            with torch.no_grad():
                return answer_of(part(**inputs))

        return forward

    labels = {} if workload.labels is None else {"labels": workload.labels.to(weight.device)}
    gradient = None if workload.gradient is None else workload.gradient.to(weight)

    def train():
        for parameter in part.parameters():
            parameter.grad = None
        out = part(**inputs, **labels)
        answer = answer_of(out)
        (out["loss"] if labels else answer).backward(gradient)
        return answer.detach()

    return train


def answer_of(out: Any) -> Tensor:
    answer: Tensor = out["logits"] if "logits" in out else out["last_hidden_state"]
    return answer


def rows_of(answer: Tensor, workload: Workload) -> Tensor:
    """`[R, D]`, float32."""
    real = workload.real
    return (answer.flatten(0, 1) if real is None else answer[real.to(answer.device)]).float()


def gradients_of(part: nn.Module) -> dict[str, Tensor | None]:
    """By parameter; that of a convolution over patches as the linear layer's that it is."""
    found = gradients(part)
    return {k: x.permute(0, 2, 3, 1).flatten(1) if x is not None and x.ndim == 4 else x for k, x in found.items()}


def reference(model: nn.Module, workload: Workload, mode: str) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Answer `[R, D]` and gradients of transformers in float32, TF32 off."""
    bench.say(f"{workload.name} {mode}: the float32 reference")
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        answer = rows_of(step(model, workload, mode)(), workload)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    if not answer.isfinite().all() or (answer == answer.flatten()[0]).all():
        raise ValueError(f"{workload.name}: the reference is not finite or all the same: nothing to compare with")
    found = gradients_of(workload.part(model))
    model.zero_grad()
    return answer, found


def check(
    rows: Rows, exact: nn.Module, workload: Workload, providers: dict[str, nn.Module], mode: str, dtype: torch.dtype
) -> tuple[dict[str, nn.Module], bool]:
    """Providers that run and are right; and whether none was wrong. Transformers' own error, before, is the measure."""
    expected, gradients = reference(exact, workload, mode)
    ready, right, name = {}, True, bench.dtype_name(dtype)
    bound = gradient_bound = bench.BOUND[dtype]
    for key, model in providers.items():
        bench.say(f"{workload.name} {mode}: checking {key}")
        try:
            answer = rows_of(step(model, workload, mode)(), workload)
        except (ValueError, RuntimeError, TypeError) as error:
            bench.cannot_run(rows, key, workload.name, name, error)
            continue
        if key == PEER:
            bound = max(bound, min(WIDER * bench.relative_error(answer, expected), MOST))
        good = bench.features_are_right(rows, key, workload.name, mode, answer, expected, dtype, bound)
        if good and mode == "train":
            found = gradients_of(workload.part(model))
            error, reason = gradient_error(rows, key, workload.name, found, gradients, dtype)
            if key == PEER:
                gradient_bound = max(gradient_bound, min(WIDER * error, MOST))
            good = error <= gradient_bound
            if not good:
                bench.refuse(rows, key, workload.name, mode, name, reason)
        model.zero_grad()
        if good:
            ready[key] = model
        right &= good
    return ready, right


def time_in_turn(
    rows: Rows, workload: Workload, ready: dict[str, nn.Module], mode: str, dtype: torch.dtype, rounds: int
) -> bool:
    """Prints and keeps the rows. False: a time was refused."""
    name, right = bench.dtype_name(dtype), True
    steps = {key: step(model, workload, mode) for key, model in ready.items()}
    device = next((next(model.parameters()).device for model in ready.values()), torch.device("cpu"))
    times = bench.steady_milliseconds(steps, rounds, device, 3, f"{workload.name} {mode}: timing ")
    for key, samples in times.items():
        try:
            check_rate(workload.flops * (3 if mode == "train" else 1), min(samples), rows.common["card"], name)
        except ValueError as error:
            bench.refuse(rows, key, workload.name, mode, name, str(error))
            right = False
            continue
        rows.add(key, workload.name, mode, name, "time", samples, "ms")
        if device.type == "cuda":
            memory = bench.peak_memory(SimpleNamespace(model=workload.part(ready[key])), steps[key])
            rows.add(key, workload.name, mode, name, "peak_memory", memory / 2**30, "GiB")
        print(bench.line(rows, workload.name, mode, key), flush=True)
        ready[key].zero_grad()
    return right


def ratios(rows: Rows) -> Iterator[str]:
    """How many times as fast, by medians."""
    for row in [row for row in rows.rows if row["provider"] == OURS and row["metric"] == "time"]:
        theirs = next(bench.values(rows, row["workload"], row["mode"], PEER, "time"), None)
        if theirs:
            yield f"{row['workload']:14} {row['mode']:8} {theirs / float(row['p50']):.2f}x"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = ("forward", "train")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME",
                        help=f"of {', '.join(MODELS)} (all)")  # fmt: skip
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes,
                        help="inference, and forward with backward (both)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="in each both towers are timed (5)")
    parser.add_argument("--shape", choices=list(TEXT), default="real", help="of the models (real)")
    parser.add_argument("--out", type=Path, help="CSV file (results/vlm_<card>.csv beside this script)")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")

    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    rows = Rows("vlm", torch.cuda.get_device_name() if cuda else cpu_name())
    path = args.out or Path(__file__).parent / "results" / f"vlm_{card_name() if cuda else cpu_name()}.csv"
    right = True
    for name in args.models:
        bench.say(f"making {name}")
        torch.manual_seed(0)
        model, workloads = MODELS[name](args.shape)
        randomize(model, torch.Generator().manual_seed(0))
        exact = model.to(device)
        providers = build(rows, exact, workloads, dtype)
        for workload in workloads:
            for mode in args.modes:
                ready, good = check(rows, exact, workload, providers, mode, dtype)
                right &= good & time_in_turn(rows, workload, ready, mode, dtype, args.rounds)
        rows.write(path)  # after every model: a run that is stopped has kept its rows
    print("\n".join(ratios(rows)))
    print(f"{len(rows.rows)} rows -> {path}")
    return 0 if right else 1


if __name__ == "__main__":
    logging.disable_progress_bar()
    sys.exit(main())
