r"""Training on one rank and on several, and what is lost between: transfers, waiting for the slowest rank, the host.

    torchrun --nproc-per-node 1 benchmarks/scaling.py --ways fsdp ddp ddp_graphs fsdp_loader    # so400m, on one GPU
    torchrun --nproc-per-node 2 benchmarks/scaling.py       # then on two, in every way: efficiency, and where time goes

train_tower.py's model and crops, a few steps each. Packs are made before the clock runs, and used in turn. Only those
of `fsdp_loader` come from processes that prepare images meanwhile, and `loader_wait` is the share of the time in which
a rank has none. `balance` trains the tower alone, on grids of workload `mixed`: do the sampler's packs last equally
long? Scaling is weak: every rank has the same budget of patches. `efficiency` is a rank's rate over that of one rank
alone, whose rows the file holds.

On a GPU the last steps are profiled (device_time.py): ms of a step, the mean over ranks, that compute, transfer, wait
for another rank, or idle. Rows go to results/scaling_<card>.csv, in place of those of an earlier run of the same kind.
"""

import argparse
import csv
import functools
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import device_time
import numpy as np
import torch
import torch.distributed as dist
from captioned_crops import CaptionedCrops, packs_of
from torch.distributed.fsdp import FSDPModule
from train_tower import LM, Captioner, join, mean_loss, parallelize, say, shared_folder, update
from transformers.utils import logging

from siglip2_packed import PackedPatches, Siglip2PackedImageProcessor, Siglip2PackedVisionModel
from siglip2_packed.collection.features import clock
from siglip2_packed.data import PatchBudgetBatchSampler
from siglip2_packed.measure import PEAK_TFLOPS, Rows, card_name, cpu_name
from siglip2_packed.parallel import apply_fsdp, mean_over_ranks
from siglip2_packed.random_checkpoint import save_random_checkpoint
from siglip2_packed.workloads import forward_flops, grids


class Way(NamedTuple):
    """To train: engine, what `apply_fsdp` takes, and what else is different."""

    engine: str = "fsdp"
    sharding: dict[str, object] = {}
    prefetch: int = 0  # units ahead, named to FSDP2; 0: what it does by itself, one in backward
    graphs: bool = False
    loader: bool = False  # packs come from a loader
    alone: bool = False  # the tower, on grids of workload `mixed`


WAYS = {
    "fsdp": Way(),
    "fsdp_units3": Way(sharding={"layers_per_unit": 3}),
    "fsdp_units9": Way(sharding={"layers_per_unit": 9}),
    "fsdp_gathered": Way(sharding={"reshard_after_forward": False}),
    "fsdp_units3_gathered": Way(sharding={"layers_per_unit": 3, "reshard_after_forward": False}),
    "fsdp_prefetch2": Way(prefetch=2),
    "fsdp_loader": Way(loader=True),
    "ddp": Way("ddp"),
    "ddp_graphs": Way("ddp", graphs=True),
    "balance": Way(alone=True),
}
SAME_ALONE = {  # on one rank all ways to shard are one
    name: name if name in ("ddp_graphs", "fsdp_loader") else way.engine for name, way in WAYS.items() if not way.alone
}
SAID = "time patches_per_s mfu peak_memory loader_wait efficiency".split()


class Task(NamedTuple):
    """What is timed: its packs, and what a pack does to it."""

    packs: Iterator
    step: Callable
    flops: Callable
    every: int  # steps of a sample


def steps_of_sample(way: Way, args) -> int:
    """Of a loader, all that its processes bring at once: they hand over packs in turn."""
    return max(args.every, args.workers) if way.loader else args.every


def captioner_task(way: Way, folder, args, device: torch.device, packs: Iterator) -> Task:
    torch.manual_seed(0)
    captioner = Captioner(folder, args.shape, way.graphs).to(device).train()
    model = parallelize(captioner, way.engine, getattr(torch, args.dtype), **way.sharding)
    prefetch(captioner.tower.vision_tower.encoder.layers, way.prefetch)
    parameters = list(captioner.parameters())
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=device.type == "cuda")

    def step(packed) -> None:
        update(mean_loss(model, packed.to(device, non_blocking=True)), parameters, optimizer)

    return Task(packs, step, captioner.training_flops, steps_of_sample(way, args))


def tower_task(way: Way, folder, args, device: torch.device, budget: int) -> Task:
    """Packs of the sampler, of random pixels: `--packs` of them in turn."""
    tower = Siglip2PackedVisionModel.from_pretrained(folder, vision_use_head=False).to(device).train()
    apply_fsdp(tower, param_dtype=getattr(torch, args.dtype), **way.sharding)
    parameters = list(tower.parameters())
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=device.type == "cuda")
    sizes = [size for size in grids("mixed", images=budget // 4 * dist.get_world_size()) if size[1] * size[2] <= budget]
    sampler, patch_dim = PatchBudgetBatchSampler(sizes, budget), tower.config.num_channels * tower.config.patch_size**2

    def packed_of(places: list[int]) -> PackedPatches:
        chosen = [sizes[i] for i in places]
        packed = PackedPatches(torch.randn(sum(h * w for _, h, w in chosen), patch_dim), chosen)
        return packed.pin_memory() if device.type == "cuda" else packed

    def step(packed) -> None:
        features = tower(**packed.to(device, non_blocking=True)).last_hidden_state
        update(mean_over_ranks(features.float().tanh().sum(), len(features)), parameters, optimizer)

    def flops(packed) -> int:
        return 3 * forward_flops(tower.config, [tuple(grid) for grid in packed["grid_thw"].tolist()])

    packs = [packed_of(places) for places in itertools.islice(sampler, args.packs)]
    return Task(itertools.cycle(packs), step, flops, steps_of_sample(way, args))


def prefetch(layers, ahead: int) -> None:
    units = [layer for layer in layers if ahead and isinstance(layer, FSDPModule)]
    for i, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(units[i + 1 : i + 1 + ahead])
        unit.set_modules_to_backward_prefetch(units[max(0, i - ahead) : i][::-1])


def timed(task: Task, args, device: torch.device) -> dict[str, np.ndarray]:
    """A sample for every few steps after warm-up: seconds of a step; of all ranks, patches, FLOPs and waiting for
    packs a second. Nothing waits for the device between samples."""
    stops, counts = [], []
    for _ in range(args.warmup + args.samples):
        stop, patches, flops, waited = clock(device), 0, 0, 0.0
        for _ in range(task.every):
            begin = time.perf_counter()
            packed = next(task.packs)
            waited += time.perf_counter() - begin
            patches += len(packed["pixel_values"])
            flops += task.flops(packed)
            task.step(packed)
        stops.append(stop())
        counts.append((patches, flops, waited))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    sums = torch.tensor([(stop(), *count) for stop, count in zip(stops, counts)], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    seconds, *others = sums[args.warmup :].T.cpu().numpy()
    seconds = seconds / dist.get_world_size()
    names = "patches_per_s", "flops_per_s", "loader_wait"
    return {"seconds": seconds / task.every} | {name: x / seconds for name, x in zip(names, others)}


def where_time_goes(task: Task, args, device: torch.device) -> dict[str, np.ndarray]:
    def run() -> None:
        for packed in device_time.marked(itertools.islice(task.packs, args.profile)):
            task.step(packed)
        device_time.mark()

    return device_time.profiled(run, device)


def measure(name: str, kind: str, task: Task, args, device: torch.device, rows: Rows) -> None:
    """Times the task, profiles it on a GPU -> its rows, said as well."""
    ranks, cuda = dist.get_world_size(), device.type == "cuda"
    rates = timed(task, args, device)
    add = functools.partial(rows.add, f"siglip2_packed:{name}", f"{kind}_ranks{ranks}", "train", args.dtype)
    add("time", 1e3 * rates["seconds"], "ms")
    add("patches_per_s", rates["patches_per_s"], "1/s")
    add("tflops_per_rank", rates["flops_per_s"] / ranks / 1e12, "TFLOP/s")
    peaks = [x * 1e12 for card, x in PEAK_TFLOPS.items() if card in rows.common["card"] and args.dtype == "bfloat16"]
    if peaks:
        add("mfu", rates["flops_per_s"] / ranks / peaks[0], "")
    if cuda:
        add("peak_memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    if WAYS[name].loader:
        add("loader_wait", rates["loader_wait"] / ranks, "share")
    one = name in SAME_ALONE and rate_alone(args.out, SAME_ALONE[name], f"{kind}_ranks1", args.dtype)
    if one and ranks > 1:
        add("efficiency", rates["patches_per_s"] / ranks / one, "")
    said = {row["metric"]: float(row["p50"]) for row in rows.rows}
    found = "  ".join(f"{metric} {said[metric]:.4g}" for metric in SAID if metric in said)
    say(f"{name:21}{kind:27}{ranks} ranks  {found}")
    if not (cuda and args.profile):
        return
    try:
        shares = where_time_goes(task, args, device)
    except ValueError as error:  # the same on every rank
        say(f"no profile: {error}")
        return
    for column in device_time.COLUMNS:
        add(f"device_{column}", shares[column].mean(0), "ms")
    add("slowest_over_mean", device_time.balance(shares), "")
    say(device_time.table(shares))


def rate_alone(file: Path, provider: str, workload: str, dtype: str) -> float | None:
    """Median patches a second on one rank, of an earlier run."""
    wanted = {"provider": f"siglip2_packed:{provider}", "workload": workload, "dtype": dtype, "metric": "patches_per_s"}
    found = list(csv.DictReader(file.open())) if file.exists() else []
    return next((float(row["p50"]) for row in found if wanted.items() <= row.items()), None)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(LM), default="so400m", help="of the tower; the LM's follows (so400m)")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="to train (all)")
    parser.add_argument("--budgets", type=int, nargs="+", default=[65536, 4096], help="patches of a rank and step")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="to compute in (bfloat16)")
    parser.add_argument("--max-num-patches", type=int, default=256, help="patches of an image (256)")
    parser.add_argument("--packs", type=int, default=4, help="of a rank, made before the clock runs (4)")
    parser.add_argument("--warmup", type=int, default=2, help="samples left out (2)")
    parser.add_argument("--samples", type=int, default=5, help="(5)")
    parser.add_argument("--every", type=int, default=3, help="steps of a sample (3)")
    parser.add_argument("--profile", type=int, default=5, help="steps profiled on a GPU (5)")
    parser.add_argument("--workers", type=int, default=14, help="processes of a rank that prepare images (14)")
    parser.add_argument("--ckpt", type=Path, help="a checkpoint of this shape; random weights where it is left out")
    parser.add_argument("--out", type=Path, help="CSV file (results/scaling_<card>.csv beside this script)")
    args = parser.parse_args(argv)
    joined, cuda = dist.is_initialized(), torch.cuda.is_available()
    device, card = join(), torch.cuda.get_device_name() if cuda else cpu_name()
    args.out = args.out or Path(__file__).parent / "results" / f"scaling_{card_name() if cuda else cpu_name()}.csv"
    say(f"{card}, {dist.get_world_size()} ranks, {args.dtype}, torch {torch.__version__}")
    logging.disable_progress_bar()
    with shared_folder() as temporary:
        folder = args.ckpt or temporary
        if args.ckpt is None and dist.get_rank() == 0:
            save_random_checkpoint(folder, args.shape)
        dist.barrier()
        for budget in args.budgets:
            chosen = [WAYS[name] for name in args.ways]
            packs = []
            if any(not (way.alone or way.loader) for way in chosen):
                crops = crops_of(folder, args, budget, args.packs)
                packs = list(itertools.islice(packs_of(crops, budget, args.workers), args.packs))
            for name in args.ways:
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                rows, way = Rows("scaling", card), WAYS[name]
                if way.alone:
                    kind, task = "mixed", tower_task(way, folder, args, device, budget)
                else:
                    coming = loaded(folder, args, budget, way) if way.loader else itertools.cycle(packs)
                    kind, task = f"max{args.max_num_patches}", captioner_task(way, folder, args, device, coming)
                measure(name, f"{args.shape}_{kind}_budget{budget}", task, args, device, rows)
                if dist.get_rank() == 0:
                    rows.write(args.out, replacing=["provider", "workload", "dtype"])
                del task
                gc.collect()  # the model before the next one
                if cuda:
                    torch.cuda.empty_cache()
    if not joined:
        dist.destroy_process_group()


def loaded(folder, args, budget: int, way: Way) -> Iterator:
    """Packs of a loader. No epoch ends before the last step: its processes never run out of packs to make."""
    steps = (args.warmup + args.samples) * steps_of_sample(way, args) + args.profile
    return packs_of(crops_of(folder, args, budget, steps + 2 * args.workers), budget, args.workers, itertools.count())


def crops_of(folder, args, budget: int, packs: int) -> CaptionedCrops:
    """Images for an epoch of more than so many packs a rank."""
    processor = Siglip2PackedImageProcessor.from_pretrained(folder, max_num_patches=args.max_num_patches)
    return CaptionedCrops((packs + 1) * dist.get_world_size() * budget // args.max_num_patches * 5 // 4, 0, processor)


if __name__ == "__main__":
    main()
