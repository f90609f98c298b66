"""Images in a Parquet file: which column holds them, and the entry in each row of it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

from siglip2_packed.collection.identity import stamp

Entry = str | bytes | ValueError
"""A path, the bytes of an image, or why there are none."""


class Parquet:
    """The rows of a Parquet file's image column; `a.parquet#17` is the name of a row.

    The column holds bytes, paths (relative ones are looked for beside the file first), or structs of both, as
    Hugging Face datasets writes them.
    """

    BATCH = 64

    def __init__(self, path: str, column: str | None):
        self.path, self.fault, self.groups = path, "", [1]
        self.stamp = stamp(path)
        pyarrow = import_pyarrow()
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
                self.groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        except pyarrow.ArrowException as error:
            self.fault = one_line(f"not a Parquet file that can be read: {error}")
        else:
            self.column = image_column(schema, column, path)

    def __len__(self) -> int:
        return sum(self.groups)

    def names(self, start: int, stop: int) -> Iterator[str]:
        return (f"{self.path}#{row}" for row in range(start, stop))

    def read(self, start: int, stop: int) -> Iterator[Entry]:
        if self.fault:
            yield from (ValueError(self.fault) for _ in range(start, stop))
            return
        pyarrow = import_pyarrow()
        with pyarrow.parquet.ParquetFile(self.path) as file:
            first = 0
            for group, rows in enumerate(self.groups):
                done, last = max(0, start - first), min(rows, stop - first)
                if done < last:
                    try:
                        for value in self._values(file, group, done, last):
                            yield value
                            done += 1
                    except (pyarrow.ArrowException, OSError) as error:
                        fault = one_line(f"row group {group} cannot be read: {error}")
                        yield from (ValueError(fault) for _ in range(done, last))
                first += rows

    def _values(self, file, group: int, start: int, stop: int) -> Iterator[Entry]:
        batches = file.iter_batches(self.BATCH, row_groups=[group], columns=[self.column])
        values = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
        return map(self._entry, itertools.islice(values, start, stop))

    def _entry(self, value: bytes | str | dict | None) -> Entry:
        entry = entry_of(value)
        if isinstance(entry, str):
            beside = os.path.join(os.path.dirname(self.path), entry)
            return beside if os.path.exists(beside) else entry
        return entry


def entry_of(value: bytes | str | dict | None) -> Entry:
    """What a cell holds: bytes, a path, or {bytes, path}, of which the bytes count if there are any."""
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    return ValueError("null: the row has no image") if value is None else value


def image_column(schema, wanted: str | None, path: str) -> str:
    """The column asked for, or the one that can hold images."""
    types = import_pyarrow().types

    def holds(kind, *checks) -> bool:
        return any(check(kind) for check in checks)

    def is_image(kind) -> bool:
        if types.is_struct(kind):
            return any(field.name == "bytes" and is_image(field.type) for field in kind)
        return holds(kind, types.is_binary, types.is_large_binary, types.is_binary_view)

    columns = {field.name: field.type for field in schema}
    listed = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
    if wanted is not None:
        kind = columns.get(wanted)
        if kind is None or not (is_image(kind) or holds(kind, types.is_string, types.is_large_string)):
            raise ValueError(f"{path}: --column {wanted!r} must hold bytes, paths or {{bytes, path}}; it has {listed}")
        return wanted
    found = [name for name, kind in columns.items() if is_image(kind)]
    if not found:
        texts = [name for name, kind in columns.items() if holds(kind, types.is_string, types.is_large_string)]
        found = [name for name in texts if any(word in name.lower() for word in ("image", "path", "file"))]
    if len(found) != 1:
        what = f"{len(found)} columns that may hold images" if found else "no image column"
        raise ValueError(f"{path} has {what}: choose with --column; it has {listed}")
    return found[0]


def import_pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"Parquet and Arrow need pyarrow (pip install siglip2-packed[parquet]): {error}") from error
    return pyarrow


def one_line(text: object) -> str:
    return " ".join(str(text).split())
