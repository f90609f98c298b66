"""One to eight images a step, as a rank of LLaVA training has them, where the host is the limit.

    python benchmarks/small_packs.py                                    # so400m, bfloat16, on one GPU
    python benchmarks/small_packs.py --workloads pack4096 random --rounds 2

One clock for all: from pixels on the device, padded where padding is needed, to features, or to every `.grad`, None
before each step. Features and gradients are compared with transformers in float32 first; what is wrong is refused with
its error and not timed. Captures and compilation stand beside the times, as `capture_time`; but in `random`, a step for
each of 500 packs of 250 to 4,096 patches, captures are within (kernels are compiled before). Of ours in graphs, a pack
of 1,030 patches stands beside one of 1,024, and the memory of training at 4,096 beside that without. Rows go to
results/small_packs_<card>.csv; readme_tables.py makes the book's table and plot of them.

Shapes: T patches, D hidden size.
"""

import argparse
import gc
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Siglip2VisionConfig
from transformers.utils import logging

from siglip2_packed import bench
from siglip2_packed.measure import Rows, card_name, cpu_name
from siglip2_packed.packing import PackedPatches
from siglip2_packed.peers import Packed, Padded
from siglip2_packed.workloads import SHAPES, SMALL_PACKS, Grid, grids, random_packs

OURS, PEER = "siglip2_packed", "transformers_sdpa_padded"
PROVIDERS = (OURS, f"{OURS}:cudagraph", PEER, f"{PEER}:cudagraph", f"{PEER}:compile")
ASKED_FOR = (f"{OURS}:batch_invariant",)
"""Those that nobody gets who does not name them."""
RANDOM = PROVIDERS[:3]
"""Those made for packs of any sizes."""
BLOCKS, WARM_PACKS = 5, 48
WIDER, MOST = 1.2, 0.2
"""How much further than transformers' gradients, in the same precision, others' may be from float32's; and at most."""


def check(
    rows: Rows,
    exact: Padded,
    workload: str,
    packed: PackedPatches,
    providers: dict[str, Packed],
    modes: Sequence[str],
    dtype: torch.dtype,
) -> tuple[dict[str, dict[str, tuple[Packed, Any]]], bool]:
    """By mode, the providers that run and are right, each with its inputs; and whether none was wrong."""
    gradient = bench.seeded_gradient(packed, exact.model.config.hidden_size, dtype)
    features = bench.expected_features(exact, workload, packed, gradient if "train" in modes else None)
    expected = gradients(exact.model)
    ready: dict[str, dict[str, tuple[Packed, Any]]] = {mode: {} for mode in modes}
    name, right, bound = bench.dtype_name(dtype), True, bench.BOUND[dtype]
    for key in sorted(providers, key=lambda key: key != PEER):
        provider = providers[key]
        bench.say(f"{workload}: checking {key}")
        try:
            inputs, dout = provider.inputs(packed), provider.tokens_of(gradient, packed)
            for i, mode in enumerate(modes):
                tokens, seconds = captured(bench.step(provider, inputs, mode, dout))
                if (graphs := held(provider)) and graphs[0] <= i:
                    raise RuntimeError("ran without CUDA graphs; why is in the log")
                if provider.replays:
                    rows.add(key, workload, mode, name, "capture_time", seconds, "s")
                    print(f"{workload:11} {mode:8} {key:34} captured in {seconds:.2f} s", flush=True)
                out = provider.rows(tokens, packed).float()
                good = bench.features_are_right(rows, key, workload, mode, out, features, dtype)
                if good and mode == "train":
                    error, reason = gradient_error(rows, key, workload, gradients(provider.model), expected, dtype)
                    if key == PEER:
                        bound = max(bound, min(WIDER * error, MOST))
                    good = error <= bound
                    if not good:
                        bench.refuse(rows, key, workload, mode, name, reason)
                if good:
                    ready[mode][key] = provider, inputs
                right &= good
        except (ValueError, RuntimeError, TypeError) as error:
            bench.cannot_run(rows, key, workload, name, error)
    return ready, right


def gradients(model: torch.nn.Module) -> dict[str, Any]:
    """By parameter, whose names are those of either generation of transformers."""
    return {name.removeprefix("vision_model."): parameter.grad for name, parameter in model.named_parameters()}


def gradient_error(
    rows: Rows, provider: str, workload: str, found: dict[str, Any], expected: dict[str, Any], dtype: torch.dtype
) -> tuple[float, str]:
    """Of all parameters' gradients together, relative to those of float32, infinite where one is missing; in words."""
    bad = [x for x in found.keys() | expected.keys() if found.get(x) is None or not found[x].isfinite().all()]
    if bad:
        return math.inf, f"{len(bad)} gradients missing or not finite: {min(bad)}"
    pairs = ((found[x].double(), expected[x].double()) for x in expected)
    squares = [((ours - theirs).square().sum(), theirs.square().sum()) for ours, theirs in pairs]
    difference, whole = map(sum, zip(*squares))
    error: float = (difference / whole).sqrt().item()
    rows.add(provider, workload, "train", bench.dtype_name(dtype), "gradient_error", error, "")
    print(f"{workload:11} {'train':8} {provider:34} gradients' error {error:.1e}", flush=True)
    return error, f"relative error of gradients {error:.1e}"


def captured(step: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What a third call returns, and the seconds that the first two took beyond it."""
    first, second, third = (seconds([step]) for _ in range(3))
    return step(), max(0.0, first + second - 2 * third)


def seconds(steps: Sequence[Callable[[], object]]) -> float:
    """Of all of them, one after the other, to the end of the device's work."""
    wait()
    begin = time.perf_counter()
    for step in steps:
        step()
    wait()
    return time.perf_counter() - begin


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random(
    rows: Rows,
    config: Siglip2VisionConfig,
    state: dict[str, Tensor],
    exact: Padded,
    providers: dict[str, Packed],
    make: Callable[[list[Grid]], PackedPatches],
    count: int,
    modes: Sequence[str],
    dtype: torch.dtype,
) -> bool:
    """Times a step for each of `count` packs, captures included; prints and keeps the rows. False: one was refused.

    `providers` are checked on a pack of another seed and run on more of them, which compiles kernels; those timed are
    new ones, for each mode.
    """
    warm, packs = random_packs(WARM_PACKS, seed=1), random_packs(count)
    device, name = exact.model.device, bench.dtype_name(dtype)

    def steps(provider: Packed, packs: list[list[Grid]], mode: str) -> list[Callable[[], Tensor]]:
        made = [make(pack) for pack in packs]
        douts = [provider.tokens_of(bench.seeded_gradient(x, config.hidden_size, dtype), x) for x in made]
        return [bench.step(provider, provider.inputs(x), mode, dout) for x, dout in zip(made, douts)]

    ready, right = check(rows, exact, "random", make(warm[0]), providers, modes, dtype)
    for mode in modes:
        bench.say(f"random {mode}: {count} packs, {sum(h * w for pack in packs for _, h, w in pack)} patches")
        for provider, _ in ready[mode].values():
            seconds(steps(provider, warm, mode))
        with device:
            fresh = {key: type(provider)(config, state, device, dtype) for key, (provider, _) in ready[mode].items()}
        times = dict.fromkeys(fresh, 0.0)
        block = math.ceil(count / BLOCKS)
        for begin in range(0, count, block):
            for key, provider in fresh.items():
                times[key] += seconds(steps(provider, packs[begin : begin + block], mode))
        for key, provider in fresh.items():
            rows.add(key, "random", mode, name, "time", 1e3 * times[key], "ms")
            print(f"{'random':11} {mode:8} {key:34} {times[key]:9.2f} s for {count} packs", flush=True)
            if graphs := held(provider):
                number, gib = graphs[0], graphs[1] / 2**30
                rows.add(key, "random", mode, name, "graphs", number, "")
                rows.add(key, "random", mode, name, "graphs_held", gib, "GiB")
                print(f"{'random':11} {mode:8} {key:34} {number} graphs hold {gib:.2f} GiB", flush=True)
    return right


def between_buckets(
    rows: Rows, provider: Packed, make: Callable[[list[Grid]], PackedPatches], modes: Sequence[str], dtype: torch.dtype,
    rounds: int,
) -> None:  # fmt: skip
    """Times ours in graphs on a pack that just misses a bucket beside one that fills it, in turn."""
    key, name = f"{OURS}:cudagraph", bench.dtype_name(dtype)
    full = grids("pack4x256")
    packs = {"pack1024": make(full), "pack1030": make([*full, (1, 2, 3)])}
    for mode in modes:
        steps = {}
        for workload, packed in packs.items():
            gradient = bench.seeded_gradient(packed, provider.model.config.hidden_size, dtype)
            steps[workload] = bench.step(provider, provider.inputs(packed), mode, gradient)
        times = bench.steady_milliseconds(steps, rounds, provider.model.device, 3, f"{mode}: timing ")
        for workload, samples in times.items():
            rows.add(key, workload, mode, name, "time", samples, "ms")
        over = statistics.median(times["pack1030"]) / statistics.median(times["pack1024"])
        rows.add(key, "pack1030", mode, name, "over_pack1024", over, "")
        print(f"{'pack1030':11} {mode:8} {key:34} {over:.3f} times as long as 1,024 patches", flush=True)


def training_memory(rows: Rows, config, state, packed: PackedPatches, dtype: torch.dtype) -> None:
    """What torch reserves for weights, and for training steps, with graphs and without, at the largest bucket."""
    device, name = packed["pixel_values"].device, bench.dtype_name(dtype)
    taken = {}
    for key in PROVIDERS[:2]:
        with device:
            provider = bench.PROVIDERS[key](config, state, device, dtype)
        weights = sum(x.nbytes for x in provider.model.parameters())
        gradient = bench.seeded_gradient(packed, config.hidden_size, dtype)
        train = bench.step(provider, provider.inputs(packed), "train", gradient)
        train()  # what is captured, checked and compiled is behind us
        for parameter in provider.model.parameters():
            parameter.grad = None
        gc.collect()
        torch.cuda.empty_cache()
        pool = (held(provider) or (0, 0))[1]
        before = torch.cuda.memory_reserved() - pool
        for _ in range(3):
            train()
        wait()
        taken[key] = weights + torch.cuda.memory_reserved() - before
        rows.add(key, "pack4096", "train", name, "reserved_memory", taken[key] / 2**30, "GiB")
        del provider, train
        gc.collect()
    plain, graphs = taken.values()
    print(f"{'pack4096':11} {'train':8} {'reserved, with graphs over without':34} {graphs / plain:.3f}", flush=True)


def held(provider: Packed) -> tuple[int, int] | None:
    """How many graphs a provider holds, and their bytes; None where it does not say."""
    graphs = getattr(provider, "graphs", None)
    return graphs.held() if hasattr(graphs, "held") else None


def ratios(rows: Rows, workloads: Sequence[str], modes: Sequence[str]) -> Iterator[str]:
    """How many times as fast as transformers ours is, by medians."""
    yield f"{'':55} {'over transformers':>18} {'its graphs':>11} {'compiled':>9}"
    for workload, mode, ours in itertools.product(workloads, modes, PROVIDERS[:2]):
        mine, *theirs = (
            next(bench.values(rows, workload, mode, provider, "time"), None) for provider in (ours, *PROVIDERS[2:])
        )
        if mine and any(theirs):
            cells = [f"{x / mine:.2f}x" if x else "" for x in theirs]
            yield f"{workload:11} {mode:8} {ours:34} {cells[0]:>18} {cells[1]:>11} {cells[2]:>9}".rstrip()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every, modes = (*SMALL_PACKS, "random"), ("forward", "train")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS + ASKED_FOR, default=PROVIDERS,
                        metavar="NAME", help=f"of {', '.join(PROVIDERS)} (all), {', '.join(ASKED_FOR)}")  # fmt: skip
    parser.add_argument("--workloads", nargs="+", choices=every, default=every, metavar="NAME",
                        help=f"of {', '.join(every)} (all)")  # fmt: skip
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes,
                        help="inference, and forward with backward (both)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="in each every provider is timed (5)")
    parser.add_argument("--packs", type=int, default=500, help="of random (500)")
    parser.add_argument("--shape", choices=list(SHAPES), default="so400m", help="of the weights (so400m)")
    parser.add_argument("--out", type=Path, help="CSV file (results/small_packs_<card>.csv beside this script)")
    args = parser.parse_args(argv)
    for flag, value in (("--rounds", args.rounds), ("--packs", args.packs)):
        if value < 1:
            parser.error(f"{flag} must be at least 1, got {value}")

    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    rows = Rows("small_packs", torch.cuda.get_device_name() if cuda else cpu_name())
    path = args.out or Path(__file__).parent / "results" / f"small_packs_{card_name() if cuda else cpu_name()}.csv"
    config, state = bench.weights(None, args.shape, device)
    exact = Padded(config, state, device, torch.float32)
    providers = bench.build(rows, args, config, state, device, dtype)
    patches = torch.randn(4096, config.patch_size**2 * config.num_channels).to(dtype)

    def make(images: list[Grid]) -> PackedPatches:
        return PackedPatches(patches[: sum(t * h * w for t, h, w in images)], images).to(device)

    right = True
    for workload in args.workloads:
        if workload == "random":
            some = {key: provider for key, provider in providers.items() if key in RANDOM}
            right &= random(rows, config, state, exact, some, make, args.packs, args.modes, dtype)
        else:
            packed = make(grids(workload))
            ready, good = check(rows, exact, workload, packed, providers, args.modes, dtype)
            for mode in args.modes:
                some = ready[mode]
                good &= bench.time_in_turn(rows, config, workload, packed, some, [mode], dtype, args.rounds)
            right &= good
        rows.write(path)  # after every workload: a run that is stopped has kept its rows
    ours = providers.get(f"{OURS}:cudagraph")
    if ours is not None and cuda and "pack4x256" in args.workloads:
        between_buckets(rows, ours, make, args.modes, dtype, args.rounds)
    if ours is not None and cuda and "pack4096" in args.workloads and "train" in args.modes:
        training_memory(rows, config, state, make(grids("pack4096")), dtype)
    rows.write(path)
    print("\n".join(ratios(rows, args.workloads, args.modes)))
    print(f"{len(rows.rows)} rows -> {path}")
    return 0 if right else 1


if __name__ == "__main__":
    logging.disable_progress_bar()
    sys.exit(main())
