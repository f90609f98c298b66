"""Images in a Parquet file: which column holds them, and the entry in each row of it.

R rows of a table.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from siglip2_packed.collection.identity import stamp
from siglip2_packed.formats import local_path, open_regular
from siglip2_packed.remote import RemoteError, is_url

Entry = str | bytes | ValueError
"""A path, the bytes of an image, or why there are none."""
BUFFER = 1 << 20
"""Bytes that are read at a time of a column by URL."""
BATCH = 64
"""Rows that are in memory at a time."""
LONGEST_ID = 64
"""Bytes. Binary values of one short length are ids and digests, not images."""
LONGEST_REASON = 1000
"""Characters."""
HELD = "bytes, paths or {bytes, path}, or lists of them"
WORDS = ("image", "path", "file")
"""What the name of a column of paths holds."""


class Table:
    """The rows of a table's image column; `a.parquet#17` is the name of a row.

    The column holds bytes, paths (relative ones are looked for beside the file first), structs of both, as Hugging Face
    datasets writes them, or lists of any of these: `a.parquet#17.2` is then the name of the third image in a row.

    A subclass sets `groups`, the rows of each part that is read on its own, and `faults`, which of them cannot be read
    and why; for lists it calls `hold_lists`. It yields the values of a group's rows with `values`.
    """

    groups: list[int]
    column: str
    schema: Any = None
    """pyarrow's; None of a file that cannot be read."""

    def __init__(self, path: str):
        self.path, self.stamp = path, stamp(path)
        self._last: tuple[Any, Any] = None, None
        self.faults: dict[int, str] = {}
        self.ends: np.ndarray | None = None
        """`[R]`: images in the rows up to and with each; None where every row holds one."""
        self.empty = 0
        """Rows that hold an empty list."""

    def hold_lists(self, lengths: list[np.ndarray]) -> None:
        """`lengths` has the images in each row of every group; a row of a faulty group counts as one."""
        counts = np.concatenate([np.zeros(0, np.int64), *lengths])
        self.ends, self.empty = counts.cumsum(), int((counts == 0).sum())

    def values(self, opened: Any, group: int, start: int, stop: int) -> Iterator[Any]:
        """What the column holds in the rows `start` to `stop` of a group. May raise an OSError or ArrowException."""
        raise NotImplementedError

    def table(self, group: int, names: list[str]) -> Any:
        """These columns of a group. May raise an OSError or ArrowException."""
        raise NotImplementedError

    @contextlib.contextmanager
    def opened(self) -> Iterator[Any]:
        """What `values` reads from."""
        raise NotImplementedError
        yield

    def types(self, names: Sequence[str]) -> dict[str, Any]:
        """Of these columns, which all have to be there."""
        if self.schema is None:
            return {}
        for name in names:
            if (count := self.schema.names.count(name)) != 1:
                there = ", ".join(self.schema.names)
                raise ValueError(
                    f"--keep {name!r}: {self.path} has {count or 'no'} columns of that name; it has {there}"
                )
        return {name: self.schema.field(name).type for name in names}

    def columns(self, places: np.ndarray, names: list[str]) -> Any:
        """A table of these columns in `plain` types, a row for each of the images at these places, which ascend."""
        pa = import_pyarrow()
        rows = places if self.ends is None else self.ends.searchsorted(places, "right")
        begins = np.cumsum([0, *self.groups])
        owners = begins.searchsorted(rows, "right") - 1
        found = []
        for group in np.unique(owners).tolist():
            key = group, tuple(names)
            if self._last[0] != key:  # kept for the next shard, which goes on there
                table = self.table(group, names).select(names)
                kinds = [field.with_type(plain(field.type)) for field in table.schema]
                self._last = key, cast(table, pa.schema(kinds))  # views cannot be taken from
            found.append(self._last[1].take(rows[owners == group] - begins[group]))
        return pa.concat_tables(found)

    def __len__(self) -> int:
        if self.ends is None:
            return sum(self.groups)
        return int(self.ends[-1]) if len(self.ends) else 0

    def names(self, start: int, stop: int) -> Iterator[str]:
        if self.ends is None:
            return (f"{self.path}#{row}" for row in range(start, stop))
        rows = self.ends.searchsorted(np.arange(start, stop), "right")
        first = np.concatenate(([0], self.ends))[rows]
        return (f"{self.path}#{row}.{i - begin}" for row, i, begin in zip(rows, range(start, stop), first))

    def read(self, start: int, stop: int) -> Iterator[Entry]:
        if start >= stop:
            return
        if self.ends is None:
            yield from map(self._entry, self._rows(start, stop))
            return
        first, last = self.ends.searchsorted((start, stop - 1), "right").tolist()
        begin = int(self.ends[first - 1]) if first else 0
        values = self._images(first, last + 1)
        yield from map(self._entry, itertools.islice(values, start - begin, stop - begin))

    def _images(self, start: int, stop: int) -> Iterator[Any]:
        """The images of rows that hold lists."""
        assert self.ends is not None
        counts = np.diff(self.ends[start:stop], prepend=self.ends[start - 1] if start else 0).tolist()
        for value, count in zip(self._rows(start, stop), counts):
            if isinstance(value, ValueError):
                value = [value] * count
            yield from value or ()

    def _rows(self, start: int, stop: int) -> Iterator[Any]:
        """Values of rows; a ValueError for each that cannot be read."""
        pyarrow = import_pyarrow()
        with contextlib.ExitStack() as stack:
            opened = None
            first = 0
            for group, rows in enumerate(self.groups):
                done, last = max(0, start - first), min(rows, stop - first)
                if done < last:
                    fault = self.faults.get(group, "")
                    try:
                        if not fault:
                            opened = opened or stack.enter_context(self.opened())
                            for value in self.values(opened, group, done, last):
                                yield value
                                done += 1
                    except (pyarrow.ArrowException, OSError, ValueError) as error:
                        fault = one_line(f"row group {group} cannot be read: {error}")
                    yield from (ValueError(fault) for _ in range(done, last))
                first += rows

    def _entry(self, value: Any) -> Entry:
        entry = entry_of(value)
        if not isinstance(entry, str):
            return entry
        try:
            path = local_path(entry)
        except ValueError as error:
            return error
        beside = os.path.join(os.path.dirname(self.path), path)
        if is_url(self.path):
            return ValueError(f"{beside} is the path of a file beside the table: only images that lie in it are read")
        return path if os.path.exists(path) and not os.path.exists(beside) else beside


class Parquet(Table):
    def __init__(self, path: str, column: str | None):
        super().__init__(path)
        pyarrow = import_pyarrow()
        try:
            with self.opened() as file:
                schema, metadata = file.schema_arrow, file.metadata
                self.groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        except pyarrow.ArrowException as error:
            self.groups, self.faults[0] = [1], one_line(f"not a Parquet file that can be read: {error}")
            return
        self.column, self.schema = image_column(schema, column, path), schema
        if element_type(schema.field(self.column).type):
            with self.opened() as file:
                self.hold_lists([self._lengths(file, group, rows) for group, rows in enumerate(self.groups)])

    def _lengths(self, file, group: int, rows: int) -> np.ndarray:
        """Images in each row of the group: of the paths, where there are any, which are shorter than the images."""
        pyarrow = import_pyarrow()
        leaves = [file.schema.column(i).path for i in range(len(file.schema))]
        inner = [leaf for leaf in leaves if leaf.startswith(f"{self.column}.") and leaf not in self.schema.names]
        leaves = inner or [self.column]
        leaf = next((leaf for leaf in leaves if leaf.endswith(".path")), leaves[0])
        try:
            batches = file.iter_batches(row_groups=[group], columns=[leaf], batch_size=BATCH)
            return np.concatenate([np.zeros(0, np.int64), *(list_lengths(batch.column(0)) for batch in batches)])
        except RemoteError:
            raise
        except (pyarrow.ArrowException, OSError) as error:
            self.faults[group] = one_line(f"row group {group} cannot be read: {error}")
            return np.ones(rows, np.int64)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Any]:
        parquet = import_pyarrow().parquet
        with (
            open_regular(self.path) as source,  # pyarrow would wait at a pipe
            parquet.ParquetFile(native_path(self.path) or source, buffer_size=BUFFER) as file,
        ):
            yield file

    def values(self, opened: Any, group: int, start: int, stop: int) -> Iterator[Any]:
        batches = opened.iter_batches(BATCH, row_groups=[group], columns=[self.column])
        values = itertools.chain.from_iterable(cells(batch.column(0)) for batch in batches)
        return itertools.islice(values, start, stop)

    def table(self, group: int, names: list[str]) -> Any:
        with self.opened() as file:
            return file.read_row_group(group, columns=names)


def native_path(path: str) -> str:
    """What pyarrow reads twice as fast as an open file; "" where it takes the name for something else."""
    whole = os.path.abspath(path)  # `a:b/c` would be a URL
    return "" if is_url(path) or whole != whole.encode("utf-8", "replace").decode() else whole


def entry_of(value: Any) -> Entry:
    """What a cell holds: bytes, a path, or {bytes, path}, of which the bytes count if there are any."""
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.dtype == object):
        return ValueError(f"a list of {len(value)} where one image is expected: give each a row of its own")
    return ValueError("null: the row has no image") if value is None else value


def cells(column: Any) -> list[Any]:
    """Values of a column; the error of each that has none in Python: text that is no UTF-8."""

    def cell(scalar: Any) -> Any:
        try:
            return scalar.as_py()
        except UnicodeDecodeError as error:
            return error

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [*map(cell, column)]


def list_lengths(column) -> np.ndarray:
    """`[R]` int64: elements of each row's list, 0 for null."""
    lengths = import_pyarrow().compute.list_value_length(column)
    return lengths.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


def element_type(kind):
    """Of a list's elements; None for what is no list."""
    types = import_pyarrow().types
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return kind.value_type if any(check(kind) for check in lists) else None


def is_wrapped(kind) -> bool:
    """A list, but not of lists, or values that are stored in another way."""
    types = import_pyarrow().types
    inner = element_type(kind)
    if inner is None:
        return types.is_dictionary(kind) or types.is_run_end_encoded(kind)
    return element_type(inner) is None


def is_image_type(kind, short: bool = False) -> bool:
    """Bytes, a struct of `bytes`, or a list of these; with `short` also bytes of one length that an id may have."""
    types = import_pyarrow().types
    if is_wrapped(kind):
        return is_image_type(kind.value_type, short)
    if types.is_struct(kind):
        return any(field.name == "bytes" and is_image_type(field.type, short=True) for field in kind)
    if types.is_fixed_size_binary(kind):
        return short or kind.byte_width > LONGEST_ID
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def is_path_type(kind) -> bool:
    """Text, a struct of a `path` without bytes, or a list of these."""
    types = import_pyarrow().types
    if is_wrapped(kind):
        return is_path_type(kind.value_type)
    if types.is_struct(kind):
        return any(field.name == "path" and is_path_type(field.type) for field in kind)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def image_column(schema, wanted: str | None, path: str) -> str:
    """The column asked for, or the one that can hold images."""
    columns = {field.name: field.type for field in schema}
    listed = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
    if wanted is not None:
        kind = columns.get(wanted)
        nothing = kind is not None and import_pyarrow().types.is_null(kind)  # of rows that are null, all of them
        if kind is None or not (nothing or is_image_type(kind, short=True) or is_path_type(kind)):
            raise ValueError(f"{path}: --column {wanted!r} must hold {HELD}; it has {listed}")
        found = [wanted]
    else:
        found = [name for name, kind in columns.items() if is_image_type(kind)]
    if not found:
        texts = [name for name, kind in columns.items() if is_path_type(kind)]
        found = [name for name in texts if any(word in name.lower() for word in WORDS)]
    if len(found) != 1:
        what = f"{len(found)} columns that may hold images" if found else "no image column"
        able = any(is_image_type(kind, short=True) or is_path_type(kind) for kind in columns.values())
        hint = "choose with --column" if able else f"none holds {HELD}"
        raise ValueError(f"{path} has {what}: {hint}; it has {listed or 'none'}")
    if (count := schema.names.count(found[0])) > 1:
        raise ValueError(f"{path} has {count} columns that are called {found[0]!r}: rename all but one")
    return found[0]


def plain(kind: Any) -> Any:
    """The type of the same values that every reader of Parquet knows: no dictionaries, views or extensions."""
    pa = import_pyarrow()
    if isinstance(kind, pa.BaseExtensionType):
        return plain(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain(kind.value_type)
    if pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
        return pa.string()
    if pa.types.is_binary_view(kind) or pa.types.is_large_binary(kind):
        return pa.binary()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(plain(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(plain(kind.key_type), plain(kind.item_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(plain(kind.value_type), kind.list_size)
    inner = element_type(kind)
    return kind if inner is None else pa.list_(plain(inner))


def common_type(one: Any, other: Any) -> Any:
    """That holds the values of both: the wider, a struct of the fields of both. Raises ArrowTypeError if none does."""
    pa = import_pyarrow()
    schemas = [pa.schema([("values", kind)]) for kind in (one, other)]
    found = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    if pa.types.is_floating(found) and any(map(pa.types.is_decimal, (one, other))):
        raise pa.ArrowTypeError(f"digits of {one} or {other} would be lost")
    return found


def cast(table: Any, schema: Any) -> Any:
    """The same values in the types of the schema. Raises ArrowInvalid where they do not fit."""
    pa = import_pyarrow()
    encoded = [i for i, field in enumerate(table.schema) if pa.types.is_run_end_encoded(field.type)]
    for i in encoded:
        chunks = [pa.compute.run_end_decode(chunk) for chunk in table.column(i).chunks]
        table = table.set_column(i, table.schema.names[i], pa.chunked_array(chunks, schema.field(i).type))
    return table.cast(schema)


def import_pyarrow():
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"Parquet and Arrow need pyarrow (pip install 'siglip2-packed[parquet]'): {error}") from error
    return pyarrow


def one_line(text: object) -> str:
    """At most `LONGEST_REASON` characters: it may quote the image itself, as text."""
    line = " ".join(str(text).replace("\0", "\\0").split())
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]} ..."
