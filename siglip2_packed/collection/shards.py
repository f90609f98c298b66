"""Features on disk: numbered shards, each whole or not there, and the tables that say what lies where.

    DIR/run.json                      what was asked for; `--resume` compares it
    DIR/shard-00000.safetensors ...   of the inputs 0 to shard_size-1, ...: those that could be read, in order
    DIR/.parts/00000.csv ...          written after its shard: a shard with a part is done
    DIR/index.csv, errors.csv         the parts, end to end, when all are there

Which inputs a shard holds depends on its number alone, so any process can write it, and write it again. Everything is
written under another name, brought to the disk and renamed.

N images of a shard, T their patches, D hidden size.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from siglip2_packed.collection.features import Row
from siglip2_packed.collection.parquet import import_pyarrow

FORMATS = ("safetensors", "parquet", "arrow", "npy")
PART = ("input", "shard", "row", "grid", "error")


def gather(rows: Iterable[Row], shard_size: int, total: int) -> Iterator[tuple[int, list[Row]]]:
    """(number, its rows in input order) of each shard, once the last of its inputs has come."""
    waiting: dict[int, list[Row]] = {}
    for row in rows:
        number = row.ordinal // shard_size
        shard = waiting.setdefault(number, [])
        shard.append(row)
        if len(shard) == min(shard_size, total - number * shard_size):
            yield number, sorted(waiting.pop(number), key=lambda row: row.ordinal)
    assert not waiting, f"shards {sorted(waiting)} never got all of their inputs"


def write_file(
    path: Path, rows: Iterable[Row], empty: dict[str, Tensor], model: dict[str, Any]
) -> tuple[int, int, int]:
    """All rows in one safetensors file, a tensor an image.

    `"00000"`, ...: `[h·w, D]` of the input of that index. `grid_thw [N, 3]` and, if wanted, `pooled [N, D]`: a row for
    each input that was read, in their order. What they are, and what failed, is JSON in the metadata.

    Returns:
        How many inputs failed, how many were read, and their patches.
    """
    with replacing(path) as temporary:  # entered first: what cannot be written is not computed
        rows = sorted(rows, key=lambda row: row.ordinal)
        good, bad = [row for row in rows if not row.error], [row for row in rows if row.error]
        tensors = {f"{row.ordinal:05d}": cast(row.patches, empty["patches"]) for row in good if row.patches is not None}
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # views of packs cannot be saved
        tensors |= stacked(good, {name: x for name, x in empty.items() if name == "pooled"})
        metadata = {
            "images": {f"{row.ordinal:05d}": {"file": row.name, "grid_thw": [1, *row.grid]} for row in good},
            "failed": {f"{row.ordinal:05d}": {"file": row.name, "reason": row.error} for row in bad},
            "model": model,
        }
        save_file(tensors, temporary, {name: json.dumps(value) for name, value in metadata.items()})
    return len(bad), len(good), sum(h * w for h, w in (row.grid for row in good))


def write_shard(folder: Path, number: int, rows: Sequence[Row], fmt: str, empty: dict[str, Tensor]) -> None:
    """Writes the features, then the part that says they are there.

    Args:
        empty: what is kept, `patches [0, D]` and `pooled [0, D]`, in the dtype to save.
    """
    good = [row for row in rows if not row.error]
    tensors = stacked(good, empty)
    names = [row.name for row in good]
    stem = folder / f"shard-{number:05d}"
    if fmt == "safetensors":
        with replacing(stem.with_suffix(".safetensors")) as path:
            save_file(tensors, path, {"inputs": json.dumps(names)})
    elif fmt == "npy":
        for name, tensor in tensors.items():
            with replacing(stem.with_suffix(f".{name}.npy")) as path, open(path, "wb") as file:
                np.save(file, tensor.numpy())
    else:
        with replacing(stem.with_suffix(f".{fmt}")) as path:
            write_table(path, arrow_table(names, tensors), fmt)

    shard = stem.name if fmt == "npy" else f"{stem.name}.{fmt}"
    position = {row.ordinal: i for i, row in enumerate(good)}
    with replacing(part_path(folder, number)) as path, open_csv(path, "w") as file:
        writer = csv.writer(file)
        writer.writerow(PART)
        for row in rows:
            place = ("", "", "") if row.error else (shard, position[row.ordinal], "x".join(map(str, (1, *row.grid))))
            writer.writerow((row.name, *place, row.error))


def stacked(rows: Sequence[Row], empty: dict[str, Tensor]) -> dict[str, Tensor]:
    """grid_thw `[N, 3]`; as wanted pooled `[N, D]`, patches `[T, D]` with offsets `[N+1]` (where each image begins)."""
    tensors = {"grid_thw": torch.tensor([(1, *row.grid) for row in rows], dtype=torch.int64).reshape(-1, 3)}
    if "pooled" in empty:
        pooled = [row.pooled[None] for row in rows if row.pooled is not None]
        tensors["pooled"] = torch.cat([cast(x, empty["pooled"]) for x in (empty["pooled"], *pooled)])
    if "patches" in empty:
        patches = [row.patches for row in rows if row.patches is not None]
        tensors["patches"] = torch.cat([cast(x, empty["patches"]) for x in (empty["patches"], *patches)])
        tensors["offsets"] = torch.nn.functional.pad(tensors["grid_thw"].prod(dim=1).cumsum(0), (1, 0))
    return tensors


def cast(features: Tensor, like: Tensor) -> Tensor:
    """Raises ValueError for values that the dtype to save cannot hold."""
    result = features.to(like.dtype)
    if not result.isfinite().all():
        raise ValueError(
            f"features up to {features.abs().max():g} do not fit {like.dtype}: choose another --save-dtype"
        )
    return result


def arrow_table(names: list[str], tensors: dict[str, Tensor]):
    """input, grid_thw (3 int64), pooled (D floats), patches (a list of rows of D floats)."""
    pa = import_pyarrow()

    def rows(tensor: Tensor):
        return pa.FixedSizeListArray.from_arrays(pa.array(tensor.numpy().reshape(-1)), tensor.shape[1])

    columns = {"input": pa.array([name.encode("utf-8", "replace").decode() for name in names], pa.string())}
    columns |= {name: rows(tensors[name]) for name in ("grid_thw", "pooled") if name in tensors}
    if "patches" in tensors:
        offsets = pa.array(tensors["offsets"].numpy())
        columns["patches"] = pa.LargeListArray.from_arrays(offsets, rows(tensors["patches"]))
    return pa.table(columns)


def write_table(path: Path, table, fmt: str) -> None:
    pa = import_pyarrow()
    if fmt == "arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    else:  # neither dictionaries nor compression help with floats
        pa.parquet.write_table(table, path, compression="none", use_dictionary=["input"], write_statistics=["input"])


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


def shards_done(folder: Path, fmt: str, numbers: Iterable[int], kept: Iterable[str]) -> set[int]:
    """Which of the shards need no work: their part and all their files are there."""
    suffixes = [f".{name}.npy" for name in kept] if fmt == "npy" else [f".{fmt}"]
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    parts = {path.name for path in part_path(folder, 0).parent.glob("*.csv")}
    return {
        number
        for number in numbers
        if f"{number:05d}.csv" in parts and all(f"shard-{number:05d}{suffix}" in there for suffix in suffixes)
    }


def merge(folder: Path, shards: int) -> tuple[int, int, int]:
    """Parts -> index.csv and errors.csv, in input order. Returns how many inputs failed, were read; their patches."""
    failed = read = patches = 0
    with (
        replacing(folder / "errors.csv") as errors_path,
        replacing(folder / "index.csv") as index_path,
        open_csv(errors_path, "w") as errors_file,
        open_csv(index_path, "w") as index_file,
    ):
        index, errors = csv.writer(index_file), csv.writer(errors_file)
        index.writerow(("input", "shard", "row", "grid"))
        errors.writerow(("input", "reason"))
        for number in range(shards):
            with open_csv(part_path(folder, number), "r") as file:
                for row in csv.DictReader(file):
                    if row["error"]:
                        errors.writerow((row["input"], row["error"]))
                        failed += 1
                    else:
                        index.writerow([row[name] for name in PART[:-1]])
                        read += 1
                        patches += math.prod(map(int, row["grid"].split("x")))
    return failed, read, patches


def part_path(folder: Path, number: int) -> Path:
    return folder / ".parts" / f"{number:05d}.csv"


def open_csv(path: Path, mode: str):
    # names that are not UTF-8 come and go as they are
    return open(path, mode, newline="", encoding="utf-8", errors="surrogateescape")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to. At the end it is on the disk under its own, in one step, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        os.chmod(temporary, mode)  # safetensors leaves files that only their owner can read
        _sync(temporary)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # not every file system syncs folders
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
