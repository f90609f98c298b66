"""A run over a folder: which shards this process writes, and which of them are there already.

    settings  ->  missing shards  ->  ranges of inputs  ->  encoded images  ->  shards  ->  index.csv, errors.csv

Under torchrun, rank r of w takes the shards r, r + w, ...: ranks tell each other when they are ready and when they are
done, nothing else.

D hidden size.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from siglip2_packed.collection.decode import ahead
from siglip2_packed.collection.features import EncodedImage
from siglip2_packed.collection.shards import Counts, gather, merge, part_path, replacing, shards_done, write_shard

Range = tuple[int, int]
"""Inputs `start` to `stop`."""
Encode = Callable[[list[Range], int], Iterator[EncodedImage]]
"""(ranges, how many inputs are done already) -> the inputs of these ranges, encoded."""


def to_folder(
    folder: Path,
    settings: dict[str, Any],
    resume: bool,
    encode: Encode,
    empty: dict[str, Tensor],
    rank: int,
    world: int,
) -> Counts:
    """Writes this rank's shards; rank 0, the tables. Every rank returns the counts of all.

    Args:
        settings: `inputs`, `shard_size`, `format`, and all else that makes a run another one: they become run.json.
        resume: go on with the run that is in the folder, if there is one.
        empty: what is kept, `patches [0, D]` and `pooled [0, D]`, in the dtype to save.

    Raises:
        ValueError: the folder holds another run, or ranks were asked for different ones.
    """
    if world > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
        check_ranks(settings, rank, world)
    check_run(folder, settings, resume)
    barrier(world)  # all have looked
    if rank == 0:
        start(folder, settings)
    barrier(world)
    count = -(-settings["inputs"] // settings["shard_size"])
    write_missing(folder, settings, range(rank, count, world), encode, empty)
    barrier(world)
    counts = merge(folder, count) if rank == 0 else Counts(0, 0, 0)
    if world > 1:
        shared = [counts]
        dist.broadcast_object_list(shared)  # every rank exits with the same code
        counts = shared[0]
    return counts


def write_missing(
    folder: Path, settings: dict[str, Any], numbers: range, encode: Encode, empty: dict[str, Tensor]
) -> None:
    """Those of the numbered shards that are not there, by a thread behind the model."""
    total, size, fmt = settings["inputs"], settings["shard_size"], settings["format"]

    def inputs_of(number: int) -> Range:
        return number * size, min(number * size + size, total)

    done = shards_done(folder, fmt, numbers, [*empty, "grid_thw"])
    ranges = joined(inputs_of(number) for number in numbers if number not in done)
    encoded = encode(ranges, sum(stop - start for start, stop in map(inputs_of, done)))
    made = gather(encoded, size, total)
    jobs = ((partial(write_shard, folder, number, images, fmt, empty), None) for number, images in made)
    with ThreadPoolExecutor(1) as writer:
        for _ in ahead(jobs, writer, depth=2):
            pass


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The same inputs in fewer ranges: those that follow each other become one."""
    result: list[Range] = []
    for start, stop in ranges:
        if result and result[-1][1] == start:
            start = result.pop()[0]
        result.append((start, stop))
    return result


def start(folder: Path, settings: dict[str, Any]) -> None:
    """Writes run.json, and takes away what a killed run left unfinished."""
    part_path(folder, 0).parent.mkdir(parents=True, exist_ok=True)
    for place in (folder, part_path(folder, 0).parent):
        for leftover in place.glob(".*.tmp"):
            leftover.unlink()
    with replacing(folder / "run.json") as path:
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def check_run(folder: Path, settings: dict[str, Any], resume: bool) -> None:
    """Raises ValueError if the folder holds a run and this one does not go on with it: other settings, other inputs."""
    file = folder / "run.json"
    if not file.exists():
        return
    if not resume:
        raise ValueError(f"{str(folder)!r} holds a run: go on with it (--resume), remove it or write elsewhere")
    before = json.loads(file.read_text(encoding="utf-8"))
    for name in {**settings, **before}:
        ours, theirs = settings.get(name), before.get(name)
        if name != "checkpoint" and ours != theirs:
            if name == "names":
                ours, theirs = "the same number under other names or in another order", f"{before['inputs']} inputs"
            if name == "weights":
                ours, theirs = f"others, of {settings['checkpoint']}", f"those of {before['checkpoint']}"
            raise ValueError(f"--resume: the run in {str(folder)!r} has {name} {theirs}, this one {ours}")


def check_ranks(settings: dict[str, Any], rank: int, world: int) -> None:
    """Raises ValueError if ranks were asked for different things."""
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, settings)
    for other, theirs in enumerate(everyone):
        for name in (name for name in settings if settings[name] != theirs[name]):
            raise ValueError(f"rank {other} has {name} {theirs[name]}, rank {rank} {settings[name]}")


def barrier(world: int) -> None:
    if world > 1:
        dist.barrier()


def leave(world: int) -> None:
    """Returns once all ranks are here: the first to exit with 1 has torchrun end the others."""
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def fingerprint(model: torch.nn.Module) -> str:
    """Of the beginning of every parameter: training, or another checkpoint, changes it."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()[:1024].float().cpu().numpy()
        digest.update(f"{name} {list(parameter.shape)}".encode() + values.tobytes())
    return digest.hexdigest()[:32]
