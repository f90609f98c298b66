"""A finished run's folder -> names and features, whatever its format: the way back from disk.

N images, n rows of a shard, D hidden size.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from siglip2_packed.collection.identity import run_digest
from siglip2_packed.collection.parquet import import_pyarrow
from siglip2_packed.collection.parts import Row, csv_rows, read_part
from siglip2_packed.collection.plan import listed
from siglip2_packed.collection.run import RECORD, read_run
from siglip2_packed.collection.shards import Output, read_table, tensor_names


def load_features(folder: str | os.PathLike) -> Features:
    """What `siglip2-packed encode` has written: names, pooled vectors, and the patches of each image.

    Tensors are mapped from the shards of safetensors, npy and Arrow, and read when they are touched; Parquet is decoded
    a shard at a time. Their dtype is the one saved, bfloat16 included. Writing to them changes no file.

    Args:
        folder: `--out` of a run that came to its end.

    Returns:
        Features of N images, in the order of index.csv:

        - `names`: N strings; `index(name)`: where one of them is.
        - `pooled`: `[N, D]`; of one shard a view of the file. Of unit length if `encode --normalize` wrote them.
        - `patches(name)`: `[h·w, D]` of an image, a view of the file.
        - `grid(name)`: its (h, w) in patches.
        - `blocks(size)`: `pooled` in pieces, for more than memory holds.
        - `columns`: what `encode --keep` carried along, a pyarrow Table of N rows: `features.columns["caption"]`.
        - `run`: run.json, what all rows were computed with.

    Raises:
        FileNotFoundError: no such folder, or none that encode wrote.
        ValueError: a run that is not finished or of another version; asked for, features that were not kept, an image
            that there is not, a shard that is not as the run wrote it.

    Example:
        >>> from siglip2_packed import load_features
        >>> from siglip2_packed.cli import main
        >>> main("encode photos --ckpt CKPT --out vectors --pooled --no-patches".split())  # doctest: +ELLIPSIS
        wrote vectors: 2 images...
        0
        >>> features = load_features("vectors")
        >>> features.names
        ['photos/a.jpg', 'photos/b.jpg']
        >>> features.pooled.shape
        torch.Size([2, 64])
    """
    return Features(Path(folder))


class Features:
    """See `load_features`."""

    def __init__(self, folder: Path):
        self.run = finished_run(folder)
        kept, keep = tensor_names(self.run["kept"]), bool(self.run.get("keep"))
        self.output = Output(folder, self.run["format"], kept, run_digest(self.run), keep=keep)
        index, errors = table(folder / "index.csv", columns=4), table(folder / "errors.csv", columns=2)
        if len(index) + len(errors) != self.run["inputs"]:
            raise ValueError(unfinished(folder))
        self.names = [name for name, *_ in index]
        self.errors = dict(errors)
        self._grids = [grid for *_, grid in index]
        self._shards = np.array([int(re.sub(r"\D", "", shard)) for _, shard, *_ in index], np.int64)
        self._rows = np.array([row for _, _, row, _ in index], np.int64)
        self._tensor = lru_cache(2)(self._read)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"Features: {' and '.join(self.run['kept'])} of {len(self)} images in {str(self.output.folder)!r}"

    @cached_property
    def pooled(self) -> Tensor:
        """`[N, D]`"""
        self.require("pooled")
        if [images.tolist() for images in self._by_shard.values()] == [[*range(len(self))]]:
            return self._tensor(*self._by_shard, "pooled")
        pooled = torch.empty(len(self), self._width, dtype=getattr(torch, self.run["save_dtype"]))
        for images, vectors in self.blocks():
            pooled[images] = vectors
        return pooled

    @cached_property
    def columns(self) -> Any:
        """pyarrow's Table of N rows: what `encode --keep` carried along, in the order of `names`."""
        names = [name for name, _ in self.run.get("keep", [])]
        if not names:
            raise ValueError(f"{str(self.output.folder)!r} holds no columns: it was encoded without --keep")
        table = read_table(self.output.index_table, ["shard", "row", *names])
        places = [self.output.shard(number) for number in self._shards.tolist()], self._rows.tolist()
        if [table[name].to_pylist() for name in ("shard", "row")] != [*places]:
            raise ValueError(f"{self.output.index_table} is not as index.csv says: encode --resume writes both again")
        return table.select(names)

    def blocks(self, size: int = 1 << 14) -> Iterator[tuple[Tensor, Tensor]]:
        """(which images, their pooled vectors): `[n]` int64, places in `names`, and `[n, D]`, n at most `size`."""
        self.require("pooled")
        for number, images in self._by_shard.items():
            pooled, places = self._tensor(number, "pooled"), torch.from_numpy(images)
            yield from zip(places.split(size), pooled.split(size))

    def index(self, name: str) -> int:
        """Its place in `names`, of the first of that name."""
        if name in self._images:
            return self._images[name]
        if name in self.errors:
            raise ValueError(f"{name!r} could not be read: {self.errors[name]}")
        alike = [other for other in self.names if Path(other).name == Path(name).name]
        hint = f": {listed(alike)} is" if alike else f", the first of which is {self.names[0]!r}" if self.names else ""
        raise ValueError(f"{name!r} is not among the {len(self)} images in {str(self.output.folder)!r}{hint}")

    def grid(self, name: str) -> tuple[int, int]:
        """(h, w) of an image, in patches."""
        return self._area(self.index(name))

    def patches(self, name: str) -> Tensor:
        """`[h·w, D]` of an image."""
        self.require("patches")
        image = self.index(name)
        number, row = int(self._shards[image]), int(self._rows[image])
        before = sum(math.prod(self._area(other)) for other in self._by_shard[number][:row])
        return self._tensor(number, "patches")[before : before + math.prod(self._area(image))]

    def require(self, kept: str) -> None:
        """Raises ValueError unless the run kept these: "pooled", "patches"."""
        if kept not in self.run["kept"]:
            how = {"pooled": "without --pooled", "patches": "with --no-patches"}[kept]
            raise ValueError(f"{str(self.output.folder)!r} holds no {kept}: it was encoded {how}")

    def stamp(self, image: int) -> str:
        """The state in which the image of this place in `names` was encoded, see `identity.stamp`."""
        return self._part(int(self._shards[image]))[int(self._rows[image])].stamp

    @property
    def _width(self) -> int:
        return self.run["tower"]["hidden_size"]

    @cached_property
    def _by_shard(self) -> dict[int, np.ndarray]:
        """Which images the rows of each shard are."""
        order = np.lexsort((self._rows, self._shards))
        numbers, begin = np.unique(self._shards[order], return_index=True)
        return dict(zip(numbers.tolist(), np.split(order, begin[1:])))

    @cached_property
    def _images(self) -> dict[str, int]:
        return {name: image for image, name in reversed([*enumerate(self.names)])}

    def _area(self, image: int) -> tuple[int, int]:
        _, h, w = map(int, self._grids[image].split("x"))
        return h, w

    def _part(self, number: int) -> list[Row]:
        """The rows of a shard, vouched for by its part, which says the same as the index."""
        found = [row for row in read_part(self.output, number) or [] if not row.error]
        rows = [(self.names[i], str(self._rows[i]), self._grids[i]) for i in self._by_shard[number].tolist()]
        if [(row.input, row.row, row.grid) for row in found] != rows:
            raise ValueError(
                f"{self.output.folder / self.output.shard(number)} is not as index.csv and .parts say: it was changed, "
                "lost or copied without them. encode --resume makes it again"
            )
        return found

    def _read(self, number: int, name: str) -> Tensor:
        self._part(number)
        return READ[self.output.fmt](self.output.file_of(number, name), name, self._width)


def finished_run(folder: Path) -> dict[str, Any]:
    """run.json of a run that came to its end."""
    run = read_run(folder)
    if not run:
        why = "it is no folder that `siglip2-packed encode` wrote"
        if any(folder.glob("share-*-of-*/run.json")):
            why = f"it holds shares, which `siglip2-packed merge {folder}` makes one of"
        raise FileNotFoundError(f"{str(folder)!r} holds no run.json: {why}")
    if run.get("record") != RECORD:
        raise ValueError(f"the run in {str(folder)!r} is of another version of siglip2-packed: encode again")
    if run.get("share"):
        raise ValueError(
            f"{str(folder)!r} is share {run['share']} of a run: `siglip2-packed merge` makes one of them all"
        )
    if not (folder / "index.csv").exists() or not (folder / "errors.csv").exists():
        raise ValueError(unfinished(folder))
    return run


def unfinished(folder: Path) -> str:
    return f"the run in {str(folder)!r} is not finished: encode --resume goes on with it"


def table(path: Path, columns: int) -> list[list[str]]:
    """Its rows, without the header. Raises ValueError if one is not whole."""
    rows = csv_rows(path.read_bytes())
    for line, row in enumerate(rows, 1):
        if len(row) != columns:
            why = f"{len(row)} columns, not {columns}: encode --resume writes it again"
            raise ValueError(f"{path}: row {line} has {why}")
    return rows[1:]


def of_safetensors(path: Path, name: str, width: int) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def of_npy(path: Path, name: str, width: int) -> Tensor:
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def of_arrow(path: Path, name: str, width: int) -> Tensor:
    pa = import_pyarrow()
    file = np.memmap(path, np.uint8, "c")
    values = numbers(pa.ipc.open_file(pa.py_buffer(file)).read_all()[name])
    begin = values.ctypes.data - file.ctypes.data  # pyarrow's own view may not be written to, not even in memory
    assert 0 <= begin <= file.nbytes - values.nbytes, f"{path} is not one record batch"
    return torch.from_numpy(file[begin : begin + values.nbytes].view(values.dtype)).view(-1, width)


def of_parquet(path: Path, name: str, width: int) -> Tensor:
    return torch.from_numpy(numbers(read_table(path, [name])[name]).copy()).view(-1, width)


READ = {"safetensors": of_safetensors, "npy": of_npy, "arrow": of_arrow, "parquet": of_parquet}
"""(file, tensor, D) -> `[rows, D]`."""


def numbers(column: Any) -> np.ndarray:
    """Those of a column of lists, of lists of lists, end to end."""
    pa = import_pyarrow()
    array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
    while pa.types.is_nested(array.type):
        array = array.flatten()
    return array.to_numpy()
