"""Plans of an epoch and of a collection for many ranks, without the ranks: balance, time, memory.

    python benchmarks/many_ranks.py                             # a million images; a minute or two
    python benchmarks/many_ranks.py --images 20000 --ranks 2 16

`sampler`: steps of `PatchBudgetBatchSampler`. A step lasts as long as its costliest pack: `slowest_over_mean` is that
cost over the ranks' mean, of every step; `whole_epoch` the same of the sums over all steps. `encode`: shards of
`siglip2-packed encode`, of which rank r takes every n-th; how many patches the busiest rank has over the mean. Sizes
are drawn from the images of workload `mixed`. Each plan is made in a process of its own. Rows go to
results/many_ranks_<cpu>.csv; readme_tables.py makes a table of them.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from siglip2_packed.batch_sampler import SO400M_COST, PatchBudgetBatchSampler
from siglip2_packed.collection.plan import make_plan
from siglip2_packed.collection.shards import Output
from siglip2_packed.encode import shard_size
from siglip2_packed.measure import Rows, cpu_name
from siglip2_packed.workloads import grids


def patches_of(images: int) -> np.ndarray:
    """`[images]` patches of each, as in workload `mixed`."""
    return np.random.default_rng(0).choice([h * w for _, h, w in grids("mixed")], images)


def sampler(images: int, ranks: int, budget: int) -> dict[str, tuple[object, str]]:
    """One rank's plan of an epoch, which is every rank's."""
    lengths = patches_of(images)
    begin = time.perf_counter()
    sampler = PatchBudgetBatchSampler(lengths, budget, num_replicas=ranks, rank=0)
    batches = len(sampler)
    seconds = time.perf_counter() - begin
    a, b = SO400M_COST
    cost = a * lengths + b * lengths.astype(np.float64) ** 2
    costs = np.array([[cost[pack].sum() for pack in step] for step in sampler._plan()])  # [steps, ranks]
    return {
        "plan_time": (seconds, "s"),
        "batches": (batches, ""),
        "utilisation": (sampler.utilisation, ""),
        "slowest_over_mean": (costs.max(1) / costs.mean(1), ""),
        "whole_epoch": (costs.max(1).sum() / costs.mean(1).sum(), ""),
    }


class Named:
    """Inputs of a collection, as far as a plan asks for them."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count


def encode(images: int, ranks: int, patches: bool) -> dict[str, tuple[object, str]]:
    """The shards of a new collection."""
    lengths, size = patches_of(images), shard_size(patches, images, ranks)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        plan = make_plan(Output(Path(folder), "safetensors", ("patches",), ""), Named(images), size)
        ranges = plan.ranges(plan.to_make[0::ranks])
        seconds = time.perf_counter() - begin
    load = np.bincount(plan.owner % ranks, lengths, ranks)  # shards are numbered in order
    assert load[0] == sum(lengths[start:stop].sum() for start, stop in ranges)
    return {
        "plan_time": (seconds, "s"),
        "shard_size": (size, ""),
        "busiest_over_mean": (load.max() / load.mean(), ""),
        "idle_ranks": (int((load == 0).sum()), ""),
    }


def with_memory(function, *arguments) -> dict[str, tuple[object, str]]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = function(*arguments)
    return found | {"memory": ((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20, "GiB")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000, help="of a data set or collection (1000000)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 1024], help="(8 64 1024)")
    parser.add_argument("--budgets", type=int, nargs="+", default=[4096, 65536], help="patches of a rank and step")
    parser.add_argument("--out", type=Path, help="CSV file (results/many_ranks_<cpu>.csv beside this script)")
    args = parser.parse_args()
    rows = Rows("many_ranks", cpu_name())
    for ranks in args.ranks:
        plans = {f"sampler_budget{budget}": (sampler, args.images, ranks, budget) for budget in args.budgets}
        plans |= {"encode": (encode, args.images, ranks, True), "encode_pooled": (encode, args.images, ranks, False)}
        for name, plan in plans.items():
            with multiprocessing.get_context("spawn").Pool(1) as process:
                found = process.apply(with_memory, plan)
            workload = f"{name}_images{args.images}_ranks{ranks}"
            for metric, (values, unit) in found.items():
                row = rows.add("siglip2_packed", workload, "plan", "", metric, values, unit)
                print(f"{workload:50} {metric:20} {float(row['p50']):10.4g} {unit}", flush=True)
    path = args.out or Path(__file__).parent / "results" / f"many_ranks_{cpu_name()}.csv"
    rows.write(path)
    print(f"{len(rows.rows)} rows -> {path}")


if __name__ == "__main__":
    main()
