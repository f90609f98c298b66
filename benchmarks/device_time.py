"""Where the time of a training step goes on the devices of several ranks: from the kernels that ran.

Transfers between ranks are NCCL's kernels, all else computes. A transfer begins on a rank when that rank is ready, and
ends on all at once: what it takes longer than on the last rank to come is waiting for that rank. Transfers and waiting
count as far as nothing computes beside them.

    step            between two marks
    compute         something computes
    transfer        NCCL alone, all ranks there
    wait            NCCL alone, another rank is not there yet
    idle            nothing runs: the host is late, or waits for data
    nccl            NCCL runs, whatever is beside it

Shapes: U intervals.
"""

import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

MARK = "spin_kernel"  # what `torch.cuda._sleep` runs
COLUMNS = "step compute transfer wait idle nccl".split()


def mark() -> None:
    """A step begins, on the device."""
    torch.cuda._sleep(1)


def marked(packs: Iterator) -> Iterator:
    """The same packs, a mark before each."""
    for packed in packs:
        mark()
        yield packed


def kernels_of(profiler) -> list[tuple[str, float, float]]:
    """(name, begin, end) in ms of all that ran on the device, copies among it, by their begin."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    ran = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return sorted(((e["name"], e["ts"] / 1e3, (e["ts"] + e["dur"]) / 1e3) for e in ran), key=lambda kernel: kernel[1])


def union(intervals) -> np.ndarray:
    """`[U, 2]` intervals, in any order -> disjoint ones, in order."""
    intervals = np.asarray(sorted(intervals), float).reshape(-1, 2)
    if not len(intervals):
        return intervals
    ends = np.maximum.accumulate(intervals[:, 1])
    first = np.append(True, intervals[1:, 0] > ends[:-1])
    return np.stack([intervals[first, 0], ends[np.append(first[1:], True)]], 1)


def within(intervals: np.ndarray, begin: float, end: float) -> float:
    """How much of disjoint intervals is between the two."""
    clipped = np.clip(intervals, begin, end)
    return float((clipped[:, 1] - clipped[:, 0]).sum())


def of_ranks(kernels: list[list[tuple[str, float, float]]]) -> dict[str, np.ndarray]:
    """`COLUMNS` -> `[ranks, steps]` ms.

    Raises:
        ValueError: ranks whose steps or transfers are not the same.
    """
    transfers = [sorted(kernel for kernel in ran if is_transfer(kernel)) for ran in kernels]  # each kind in its order
    marks = [[begin for name, begin, _ in ran if MARK in name] for ran in kernels]
    for what, found, least in (("transfers", transfers, 0), ("marks", marks, 2)):
        counts = [len(x) for x in found]
        if len({*counts}) > 1 or counts[0] < least:
            raise ValueError(f"{what} of ranks: {counts}")
    if any(len({name for name, _, _ in same}) > 1 for same in zip(*transfers)):
        raise ValueError("ranks have transfers of different kinds")
    lasted = np.array([[end - begin for _, begin, end in found] for found in transfers])  # [ranks, transfers]
    waited = lasted - lasted.min(0)
    table = [of_rank(*each) for each in zip(kernels, transfers, waited, marks)]
    return {name: np.array([[step[name] for step in steps] for steps in table]) for name in COLUMNS}


def is_transfer(kernel: tuple[str, float, float]) -> bool:
    return kernel[0].startswith("nccl")


def of_rank(kernels, transfers, waited, marks) -> list[dict[str, float]]:
    """`COLUMNS` of each step in ms."""
    computing = [kernel[1:] for kernel in kernels if not is_transfer(kernel)]
    transferring = [kernel[1:] for kernel in transfers]
    waiting = [(begin, begin + wait) for (begin, _), wait in zip(transferring, waited)]
    nccl, compute, late, busy = map(union, (transferring, computing, computing + waiting, computing + transferring))

    def of_step(begin: float, end: float) -> dict[str, float]:
        computes, with_waiting, runs = (within(x, begin, end) for x in (compute, late, busy))
        return {
            "step": end - begin,
            "compute": computes,
            "transfer": runs - with_waiting,
            "wait": with_waiting - computes,
            "idle": end - begin - runs,
            "nccl": within(nccl, begin, end),
        }

    return [of_step(*step) for step in itertools.pairwise(marks)]


def profiled(run, device: torch.device) -> dict[str, np.ndarray]:
    """Runs it on every rank, marks in it -> `of_ranks`, on all."""
    torch.cuda.synchronize(device)
    dist.barrier()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize(device)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, kernels_of(profiler))
    return of_ranks(everyone)


def table(shares: dict[str, np.ndarray]) -> str:
    """ms of a step of each rank, the mean over steps; and whose steps last longest."""
    lines = ["rank " + "".join(f"{name:>10}" for name in COLUMNS)]
    for rank in range(len(shares["step"])):
        lines.append(f"{rank:4} " + "".join(f"{shares[name][rank].mean():10.2f}" for name in COLUMNS))
    return "\n".join([*lines, f"compute of the slowest rank over the mean: {balance(shares).mean():.4f}"])


def balance(shares: dict[str, np.ndarray]) -> np.ndarray:
    """`[steps]` compute of the slowest rank over the ranks' mean."""
    return shares["compute"].max(0) / shares["compute"].mean(0)
