"""Features on disk: numbered shards, each whole or not there, and the tables that say what lies where.

    DIR/run.json                      what was asked for; `--resume` compares it (run.py)
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
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from siglip2_packed.collection.features import EncodedImage
from siglip2_packed.collection.parquet import import_pyarrow

FORMATS = ("safetensors", "parquet", "arrow", "npy")
PART = ("input", "shard", "row", "grid", "error")


class Counts(NamedTuple):
    """What became of the inputs: how many failed, how many were read, and the patches of these."""

    failed: int
    read: int
    patches: int


def gather(images: Iterable[EncodedImage], shard_size: int, total: int) -> Iterator[tuple[int, list[EncodedImage]]]:
    """(number, its images in input order) of each shard, once the last of its inputs has come."""
    waiting: dict[int, list[EncodedImage]] = {}
    for image in images:
        number = image.ordinal // shard_size
        shard = waiting.setdefault(number, [])
        shard.append(image)
        if len(shard) == min(shard_size, total - number * shard_size):
            yield number, in_order(waiting.pop(number))
    assert not waiting, f"shards {sorted(waiting)} never got all of their inputs"


def in_order(images: Iterable[EncodedImage]) -> list[EncodedImage]:
    return sorted(images, key=lambda image: image.ordinal)


def write_file(path: Path, images: Iterable[EncodedImage], empty: dict[str, Tensor], model: dict[str, Any]) -> Counts:
    """All images in one safetensors file, a tensor each.

    `"00000"`, ...: `[h·w, D]` of the input of that index. `grid_thw [N, 3]` and, if wanted, `pooled [N, D]`: a row for
    each input that was read, in their order. What they are, and what failed, is JSON in the metadata.
    """
    with replacing(path) as temporary:  # entered first: what cannot be written is not computed
        images = in_order(images)
        good, bad = [image for image in images if not image.error], [image for image in images if image.error]
        patches = {file_key(image): image.patches for image in good if image.patches is not None}
        tensors = {key: cast(x, empty["patches"]) for key, x in patches.items()}
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}  # views of packs cannot be saved
        tensors |= stacked(good, {name: x for name, x in empty.items() if name == "pooled"})
        metadata = {
            "images": {file_key(image): {"file": image.name, "grid_thw": [1, *image.grid]} for image in good},
            "failed": {file_key(image): {"file": image.name, "reason": image.error} for image in bad},
            "model": model,
        }
        save_file(tensors, temporary, {name: json.dumps(value) for name, value in metadata.items()})
    return Counts(len(bad), len(good), sum(h * w for h, w in (image.grid for image in good)))


def file_key(image: EncodedImage) -> str:
    return f"{image.ordinal:05d}"


def write_shard(folder: Path, number: int, images: Sequence[EncodedImage], fmt: str, empty: dict[str, Tensor]) -> None:
    """Writes the features, then the part that says they are there.

    Args:
        images: all of the shard's inputs, in their order.
        empty: what is kept, `patches [0, D]` and `pooled [0, D]`, in the dtype to save.
    """
    good = [image for image in images if not image.error]
    tensors = stacked(good, empty)
    names = [image.name for image in good]
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
    rows = {image.ordinal: row for row, image in enumerate(good)}
    with replacing(part_path(folder, number)) as path, open_csv(path, "w") as file:
        writer = csv.writer(file)
        writer.writerow(PART)
        for image in images:
            grid = "x".join(map(str, (1, *image.grid)))
            place = ("", "", "") if image.error else (shard, rows[image.ordinal], grid)
            writer.writerow((image.name, *place, image.error))


def stacked(images: Sequence[EncodedImage], empty: dict[str, Tensor]) -> dict[str, Tensor]:
    """grid_thw `[N, 3]`; as wanted pooled `[N, D]`, patches `[T, D]` with offsets `[N+1]` (where each image begins)."""
    tensors = {"grid_thw": torch.tensor([(1, *image.grid) for image in images], dtype=torch.int64).reshape(-1, 3)}
    if "pooled" in empty:
        pooled = [image.pooled[None] for image in images if image.pooled is not None]
        tensors["pooled"] = torch.cat([cast(x, empty["pooled"]) for x in (empty["pooled"], *pooled)])
    if "patches" in empty:
        patches = [image.patches for image in images if image.patches is not None]
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


def merge(folder: Path, shards: int) -> Counts:
    """Parts -> index.csv and errors.csv, in input order."""
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
    return Counts(failed, read, patches)


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
