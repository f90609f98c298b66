"""What is known of a shard once it is there: `.parts/00000.csv`, written after it, tells where each input's row lies.

Its first line is JSON: the digest of the run, the size and a checksum of each of the shard's files, and the number and
the digest of the rows below. A part that is not just so, or whose shard is not, is none: `read_part` returns None, and
the inputs it may once have named are encoded again.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from siglip2_packed.collection.features import EncodedImage
from siglip2_packed.collection.shards import Output, replacing
from siglip2_packed.collection.walk import PARTS

CHECKED = 1 << 16
"""Bytes at the beginning and at the end of a shard that the checksum covers: its header, its footer."""


class Row(NamedTuple):
    """An input of the shard: its state, and the place of its features or why there are none."""

    input: str
    stamp: str
    row: str
    grid: str
    error: str


def write_part(output: Output, number: int, images: Sequence[EncodedImage]) -> None:
    """Vouches for the shard, which is on the disk, and for all of its inputs, in their order."""
    body = io.StringIO(newline="")
    writer = csv.writer(body)
    row = 0
    for image in images:
        place = ("", "") if image.error else (row, "x".join(map(str, (1, *image.grid))))
        row += not image.error
        writer.writerow((image.name, image.stamp, *place, image.error))
    # names that are not UTF-8 come and go as they are
    rows = body.getvalue().encode("utf-8", "surrogateescape")
    header = {
        "run": output.run,
        "files": {path.name: file_mark(path) for path in output.files(number)},
        "inputs": len(images),
        "rows": hashlib.sha256(rows).hexdigest(),
    }
    with replacing(output.part(number), output.held) as path:
        path.write_bytes(json.dumps(header).encode() + b"\n" + rows)


def read_part(output: Output, number: int) -> list[Row] | None:
    """Its rows, if the run is the same, the part whole, and its shard as it was when it was written."""
    try:
        first, _, rows = output.part(number).read_bytes().partition(b"\n")
        header = json.loads(first)
        files = {path.name: file_mark(path) for path in output.files(number)}
        if (header["run"], header["files"], header["rows"]) != (output.run, files, hashlib.sha256(rows).hexdigest()):
            return None
        found = parsed(rows)
    except (OSError, ValueError, TypeError, KeyError, csv.Error):
        return None
    return found if len(found) == header["inputs"] else None


def parsed(rows: bytes) -> list[Row]:
    return [Row(*row) for row in csv_rows(rows)]


def csv_rows(table: bytes) -> list[list[str]]:
    limit = csv.field_size_limit(1 << 30)  # csv's own is less than what a line of a list may be
    try:
        return list(csv.reader(io.StringIO(table.decode("utf-8", "surrogateescape"), newline="")))
    finally:
        csv.field_size_limit(limit)


def recorded(folder: Path) -> Iterator[Row]:
    """The rows of all the parts of a run, whatever else they vouch for."""
    for path in sorted((folder / PARTS).glob("*.csv")):
        with contextlib.suppress(OSError, ValueError, TypeError, csv.Error):
            yield from parsed(path.read_bytes().partition(b"\n")[2])


def file_mark(path: Path) -> list:
    """[size in bytes, checksum of both ends]."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        ends = hashlib.sha256(file.read(CHECKED))
        file.seek(max(CHECKED, size - CHECKED))
        ends.update(file.read(CHECKED))
    return [size, ends.hexdigest()]


def part_numbers(output: Output) -> list[int]:
    """Of all parts there are, good or not."""
    numbers = {int(path.stem) for path in output.parts.glob("*.csv") if path.stem.isdecimal()}
    return sorted(number for number in numbers if output.part(number).exists())  # 7.csv is somebody else's
