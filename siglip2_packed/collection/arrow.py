"""Images in an Arrow file, stream or file format: what Hugging Face datasets' `save_to_disk` and caches hold."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np

from siglip2_packed.collection.parquet import (
    BATCH,
    Table,
    cells,
    element_type,
    image_column,
    import_pyarrow,
    list_lengths,
    one_line,
)
from siglip2_packed.formats import open_regular
from siglip2_packed.remote import RemoteError, is_url

ARROW = ".arrow"
STATE = "state.json"
"""Beside the Arrow files of a data set: which they are."""
MAGIC = b"ARROW1"
"""Begins the file format."""


class Arrow(Table):
    """A group is a record batch. What follows one that cannot be read counts as one row: nothing tells how many."""

    def __init__(self, path: str, column: str | None):
        super().__init__(path)
        pyarrow = import_pyarrow()
        self.groups = []
        lengths: list[np.ndarray] = []
        try:
            with open_regular(path) as file:
                self.is_file = file.read(len(MAGIC)) == MAGIC
            reader = self._reader()
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, (FileNotFoundError, RemoteError)):
                raise
            self.groups, self.faults[0] = [1], one_line(f"not an Arrow file that can be read: {error}")
            return
        self.column, self.schema = image_column(reader.schema, column, path), reader.schema
        holds_lists = element_type(reader.schema.field(self.column).type) is not None
        try:
            for batch in self._batches(reader):
                self.groups.append(len(batch))
                if holds_lists:
                    lengths.append(list_lengths(batch.column(self.column)))
        except RemoteError:
            raise
        except (pyarrow.ArrowException, OSError) as error:
            self.faults[len(self.groups)] = one_line(f"rows from {sum(self.groups)} on cannot be read: {error}")
            self.groups.append(1)
            lengths.append(np.ones(1, np.int64))
        if holds_lists:
            self.hold_lists(lengths)

    def _reader(self):
        pyarrow = import_pyarrow()
        source = open_regular(self.path) if is_url(self.path) else mapped(self.path)
        return pyarrow.ipc.open_file(source) if self.is_file else pyarrow.ipc.open_stream(source)

    def _batches(self, reader) -> Iterator[Any]:
        if not self.is_file:
            return iter(reader)
        return (reader.get_batch(number) for number in range(reader.num_record_batches))

    @contextlib.contextmanager
    def opened(self) -> Iterator[Any]:
        open_regular(self.path).close()  # pyarrow would wait at a pipe
        batches = self._batches(self._reader())
        yield [next(batches) for group in range(len(self.groups)) if group not in self.faults]

    def values(self, opened: Any, group: int, start: int, stop: int) -> Iterator[Any]:
        column = opened[group].column(self.column)
        slices = (column.slice(place, min(BATCH, stop - place)) for place in range(start, stop, BATCH))
        return chain.from_iterable(map(cells, slices))

    def table(self, group: int, names: list[str]) -> Any:
        with self.opened() as batches:
            return import_pyarrow().Table.from_batches([batches[group]])


def mapped(path: str | os.PathLike) -> Any:
    """A file as pyarrow reads it, whatever its name: `pyarrow.memory_map` takes UTF-8 only."""
    empty = not os.path.getsize(path)
    return import_pyarrow().py_buffer(b"" if empty else np.memmap(path, np.uint8, "r"))


def saved_files(state: str) -> set[str] | None:
    """Names of the Arrow files of the data set that `save_to_disk` wrote beside its state; None: no such state.

    Raises ValueError if the data set is a selection of rows of these files.
    """
    try:
        with open_regular(state) as file:
            described = json.load(file)
        names = {os.path.basename(row["filename"]) for row in described["_data_files"]}
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if described.get("_indices_data_files"):
        raise ValueError("a data set with an index of its rows: load it, `flatten_indices()` and save it again")
    return names
