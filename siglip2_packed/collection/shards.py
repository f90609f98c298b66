"""Features on disk, shard by shard, in any format; and how a file comes into being: whole, or not at all.

    DIR/shard-00000.safetensors ...   `grid_thw [N, 3]`, `pooled [N, D]`, `patches [T, D]` with `offsets [N+1]`

N images of a shard, T their patches, D hidden size.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from siglip2_packed.collection.features import EncodedImage
from siglip2_packed.collection.parquet import import_pyarrow

TABLES = ("parquet", "arrow")
"""Formats whose shards hold columns of any type themselves."""
FEATURES = ("grid_thw", "pooled", "patches")
"""Columns of these."""
OURS = r"run\.json|index\.csv|index\.parquet|errors\.csv|skipped\.csv|shard-\d{5,}\..+|\d{5,}\.csv"
"""What the files of a collection are called."""


class Counts(NamedTuple):
    """What became of the inputs: how many failed, how many were read, and the patches of these."""

    failed: int
    read: int
    patches: int


class Output(NamedTuple):
    """A folder, and what a run writes there."""

    folder: Path
    fmt: str
    kept: tuple[str, ...]
    """Names of the tensors of a shard."""
    run: str
    """Its digest, see `identity.run_digest`."""
    held: Callable[[], None] = lambda: None
    """Raises OSError if the folder is not this run's any more."""
    keep: bool = False
    """Whether there are columns beside the features, see kept.py."""

    def shard(self, number: int) -> str:
        """What index.csv calls it."""
        stem = f"shard-{number:05d}"
        return stem if self.fmt == "npy" else f"{stem}.{self.fmt}"

    def files(self, number: int) -> list[Path]:
        """Those it consists of."""
        features = dict.fromkeys(self.file_of(number, name) for name in self.kept)
        beside = [self.columns(number)] if self.keep and self.fmt not in TABLES else []
        return [*features, *beside]

    def file_of(self, number: int, tensor: str) -> Path:
        return self.folder / (f"{self.shard(number)}.{tensor}.npy" if self.fmt == "npy" else self.shard(number))

    def columns(self, number: int) -> Path:
        """The file that has what is kept beside the features."""
        return self.folder / (self.shard(number) if self.fmt in TABLES else f"shard-{number:05d}.columns.parquet")

    @property
    def index_table(self) -> Path:
        """index.csv with what is kept."""
        return self.folder / "index.parquet"

    @property
    def parts(self) -> Path:
        return self.folder / ".parts"

    def part(self, number: int) -> Path:
        return self.parts / f"{number:05d}.csv"


def in_order(images: Iterable[EncodedImage]) -> list[EncodedImage]:
    return sorted(images, key=lambda image: image.ordinal)


def write_file(path: Path, images: Iterable[EncodedImage], empty: dict[str, Tensor], model: dict[str, Any]) -> Counts:
    """All images in one safetensors file, a tensor each.

    `"00000"`, ...: `[h·w, D]` of the input of that index. `grid_thw [N, 3]` and, if wanted, `pooled [N, D]`: a row for
    each input that was read, in their order. What they are, and what failed, is JSON in the metadata.
    """
    sweep(path.parent, re.escape(path.name))
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


def check_replaced(path: Path, ours: str) -> None:
    """Raises ValueError for a file that is there, and is none whose metadata has `ours`: weights, a shard, a note."""
    if not path.exists():
        return
    try:
        with safe_open(path, "pt") as file:
            is_ours = ours in (file.metadata() or {})
    except SafetensorError:
        is_ours = False
    if not is_ours:
        raise ValueError(f"{str(path)!r} is there, and no file of this command: remove it, or write elsewhere")


def file_key(image: EncodedImage) -> str:
    return f"{image.ordinal:05d}"


def write_shard(
    output: Output, number: int, images: Sequence[EncodedImage], empty: dict[str, Tensor], columns: Any = None
) -> None:
    """Writes the features of those of the images that have some.

    Args:
        empty: what is kept, `patches [0, D]` and `pooled [0, D]`, in the dtype to save.
        columns: a table of what is kept besides, a row for each image that has features.
    """
    good = [image for image in images if not image.error]
    tensors = stacked(good, empty)
    names = [image.name for image in good]
    files = output.files(number)
    if columns is not None and output.fmt not in TABLES:
        with replacing(output.columns(number), output.held) as path:
            write_table(path, input_column(names, columns), "parquet")
    if output.fmt == "npy":
        for name, file in zip(output.kept, files):
            with replacing(file, output.held) as path, open(path, "w+b") as opened:  # NumPy's way with "wb" hides errno
                np.save(opened, tensors[name].numpy())
        return
    with replacing(files[0], output.held) as path:
        if output.fmt == "safetensors":
            save_file(tensors, path, {"inputs": json.dumps(names)})
        else:
            write_table(path, arrow_table(names, tensors, columns), output.fmt)


def tensor_names(empty: Iterable[str]) -> tuple[str, ...]:
    """Those that `stacked` makes of what is kept."""
    return ("grid_thw", *empty, *(["offsets"] if "patches" in empty else []))


def stacked(images: Sequence[EncodedImage], empty: dict[str, Tensor]) -> dict[str, Tensor]:
    """grid_thw `[N, 3]`; as wanted pooled `[N, D]`, patches `[T, D]` with offsets `[N+1]` (where each image begins)."""
    tensors = {"grid_thw": torch.tensor([(1, *image.grid) for image in images], dtype=torch.int64).reshape(-1, 3)}
    if "pooled" in empty:
        pooled = [image.pooled for image in images if image.pooled is not None]
        tensors["pooled"] = cast(torch.stack(pooled), empty["pooled"]) if pooled else empty["pooled"]
    if "patches" in empty:
        patches = [image.patches for image in images if image.patches is not None]
        tensors["patches"] = torch.cat([empty["patches"], *(cast(x, empty["patches"]) for x in patches)])
        tensors["offsets"] = torch.nn.functional.pad(tensors["grid_thw"].prod(dim=1).cumsum(0), (1, 0))
    return tensors


def cast(features: Tensor, like: Tensor) -> Tensor:
    """Raises ValueError for values, finite ones, that the dtype to save cannot hold."""
    result = features.to(like.dtype)
    if result is not features and not result.isfinite().all():
        raise ValueError(
            f"features up to {features.abs().max():g} do not fit {like.dtype}: choose another --save-dtype"
        )
    return result


def input_column(names: list[str], columns: Any = None):
    """A table of the names, as far as they are UTF-8, and the columns of another, if there is one."""
    pa = import_pyarrow()
    inputs = pa.array([name.encode("utf-8", "replace").decode() for name in names], pa.string())
    others = {} if columns is None else dict(zip(columns.column_names, columns.columns))
    return pa.table({"input": inputs, **others})


def arrow_table(names: list[str], tensors: dict[str, Tensor], kept: Any = None):
    """input, what is kept, grid_thw (3 int64), pooled (D floats), patches (a list of rows of D floats)."""
    pa = import_pyarrow()

    def rows(tensor: Tensor):
        return pa.FixedSizeListArray.from_arrays(pa.array(tensor.numpy().reshape(-1)), tensor.shape[1])

    table = input_column(names, kept)
    columns: dict[str, Any] = {name: rows(tensors[name]) for name in ("grid_thw", "pooled") if name in tensors}
    if "patches" in tensors:
        offsets = pa.array(tensors["offsets"].numpy())
        columns["patches"] = pa.LargeListArray.from_arrays(offsets, rows(tensors["patches"]))
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table


def write_table(path: Path, table, fmt: str) -> None:
    pa = import_pyarrow()
    with path.open("wb") as file:  # pyarrow would take a path as UTF-8, and `a:b/c` for a URL
        if fmt == "arrow":
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
        else:  # neither dictionaries nor compression help with floats
            texts = [name for name in table.column_names if name not in FEATURES]
            pa.parquet.write_table(table, file, compression="none", use_dictionary=texts, write_statistics=texts)


def read_table(path: Path, names: list[str]):
    """These columns of a table that `write_table` wrote, in memory."""
    pa = import_pyarrow()
    with path.open("rb") as file:
        if path.suffix == ".parquet":
            return pa.parquet.ParquetFile(file).read(names).select(names)
        return pa.ipc.open_file(file).read_all().select(names)


@contextlib.contextmanager
def replacing(path: Path, held: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A name to write to. At the end it is on the disk under its own, in one step, or not at all.

    It lies in a folder of its own: safetensors, too, writes to another name first, and a kill would leave that.
    """
    apart = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary = apart / path.name
    try:
        apart.mkdir(exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_nlink < 2:  # not of a file that is there under another name, and may be somebody else's
            os.chmod(temporary, mode)  # safetensors leaves files that only their owner can read
        _sync(temporary)
        held()
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # not every file system syncs folders
            _sync(path.parent)
    finally:
        shutil.rmtree(apart, ignore_errors=True)


def sweep(folder: Path, names: str = OURS) -> None:
    """Takes away what killed runs have left of files of these names. Nobody else may be writing them."""
    leftover = re.compile(rf"\.(?:{names})\.\d+\.tmp")
    for path in folder.glob(".*.tmp"):
        if leftover.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
