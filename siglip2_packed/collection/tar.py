"""The images in an uncompressed tar file: where each lies, and what damage hides."""

from __future__ import annotations

import errno
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import IO, Any, NamedTuple

import numpy as np

from siglip2_packed.collection.identity import stamp
from siglip2_packed.collection.parquet import Entry, import_pyarrow
from siglip2_packed.collection.samples import Samples
from siglip2_packed.collection.walk import HIDDEN, NO_IMAGE, Skipped, reason_of_parts
from siglip2_packed.formats import SUFFIXES, open_regular, suffix_of
from siglip2_packed.remote import is_url, size_of

MOST_SPARSE = 1 << 30
"""Bytes. A sparse member that claims more would take memory that no image does."""
COMPRESSIONS = re.compile(rb"\x1f\x8b|BZh\d1AY&SY|\xfd7zXZ\0|\x28\xb5\x2f\xfd|PK\x03\x04").match
Chunks = tuple[tuple[int, int], ...]
"""(offset, bytes) of what is stored of a sparse member, one after the other; the rest are zeros."""


class Member(NamedTuple):
    name: str
    offset: int
    size: int
    fault: str = ""
    chunks: Chunks | None = None
    """Of a sparse member."""
    sample: int = -1
    """Which it belongs to, where what lies beside it is kept."""


class Tar:
    """The image members of an uncompressed tar file; `a.tar#name` is their name. `keep`: see samples.py."""

    def __init__(self, path: str, skipped: Skipped, keep: Sequence[str] = ()):
        self.path, self.stamp = path, stamp(path)
        self.samples = Samples(path, keep)
        self.members = list(image_members(path, skipped, self.samples))
        self.lacking: Counter[str] = Counter()
        """Images without a value, by name."""
        if keep:
            good = [member for member in self.members if not member.fault]
            self.lacking = self.samples.find_types(partial(open_regular, path), [member.sample for member in good])
            if unused := self.samples.unused():
                skipped.add(f"{path}#*.json", NO_IMAGE, suffix=".json", count=unused)

    def __len__(self) -> int:
        return len(self.members)

    def names(self, start: int, stop: int) -> Iterator[str]:
        return (f"{self.path}#{member.name}" for member in self.members[start:stop])

    def read(self, start: int, stop: int) -> Iterator[Entry]:
        with ExitStack() as stack:
            file: IO[bytes] | None = None
            for member in self.members[start:stop]:
                fault = member.fault
                try:
                    if not fault:
                        file = file or stack.enter_context(open_regular(self.path))
                        data = content(file, member)
                except (OSError, ValueError) as error:  # it was there when it was listed
                    fault = f"{self.path} cannot be read: {error}"
                yield ValueError(fault) if fault else data

    def types(self, names: Sequence[str]) -> dict[str, Any]:
        """Of what is kept of its samples."""
        return {name: self.samples.kinds[name] for name in names if name in self.samples.kinds}

    def columns(self, places: np.ndarray, names: list[str]) -> Any:
        """A table of what is kept, a row for each of the images at these places."""
        chosen = [self.members[place].sample for place in places.tolist()]
        with open_regular(self.path) as file:
            return import_pyarrow().table({name: self.samples.column(file, name, chosen) for name in names})


def content(file: IO[bytes], member: Member) -> bytes:
    file.seek(member.offset)
    if member.chunks is None:
        return file.read(member.size)
    data = bytearray(member.size)
    for start, count in member.chunks:
        data[start : start + count] = file.read(count)
    return bytes(data)


def image_members(path: str, skipped: Skipped, samples: Samples) -> Iterator[Member]:
    """Members with an image's suffix, and a faulty member wherever more may be lost: damaged headers, a cut file.

    `tarfile` ends without a word at a header it cannot read. With `ignore_zeros` it looks for the next good one
    instead, and the gap shows that something was lost. What is no image, nor kept beside one, is counted.
    """
    total, end = size_of(path) if is_url(path) else os.path.getsize(path), 0
    if not total:
        yield Member("", 0, 0, "an empty file, not a tar file")

    def gap(start: int, stop: int) -> Iterator[Member]:
        if start >= stop:
            return
        with open_regular(path) as file:
            while start < stop:
                file.seek(start)
                block = file.read(512)
                if not block.strip(b"\0"):  # padding, or where tar files were joined
                    start += 512
                elif 0 <= (size := global_header(block)) < stop - start:  # for all members that follow (git archive)
                    start += 512 + -(-size // 512) * 512
                else:
                    yield Member(f"bytes {start} to {stop}", 0, 0, "damaged tar headers: what they described is lost")
                    return

    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if member.size < 0:
                    break
                yield from gap(end, member.offset)
                end = tar.offset  # type: ignore[attr-defined]  # of a sparse member its size does not tell
                chunks = chunks_of(member)
                stored = member.size if chunks is None else sum(count for _, count in chunks)
                there = total - member.offset_data
                if member.isreg() and stored > there:  # whatever it is: what came behind it is lost
                    yield Member(member.name, 0, 0, f"the tar file ends after {there} of its {stored} bytes")
                    return
                place = (member.offset_data, member.size) if chunks is None else None
                if member.isreg() and samples.add(member.name, place):
                    continue
                if not member.isdir() and is_wanted(path, member.name, skipped):
                    fault = fault_of(member, chunks)
                    yield Member(member.name, member.offset_data, member.size, fault, chunks, samples.number)
    except OSError as error:
        if error.errno != errno.EINVAL:  # as of an absurd place; others say that it cannot be read, not that it ends
            raise
    except Exception:  # TarError, or what an absurd size provokes when it is sought or allocated
        pass  # cut short or damaged from here on: the gap below
    if end > total:  # the last member is there, less what fills its block
        yield Member(f"bytes {total} on", 0, 0, "the tar file ends within a block: what came behind it is lost")
    yield from gap(min(end, total), total)


def is_compressed(path: str) -> bool:
    """Whether it begins as what gzip, bzip2, xz, zstd or zip write, whatever its name is."""
    with open_regular(path) as file:
        return COMPRESSIONS(file.read(10)) is not None


def is_wanted(path: str, name: str, skipped: Skipped) -> bool:
    suffix, reason = suffix_of(name), ""
    if "/" in name or name.startswith("."):
        *folders, last = name.split("/")
        reason = reason_of_parts(folders) or (HIDDEN if last.startswith(".") else "")
    if not reason and suffix in SUFFIXES:
        return True
    skipped.add(f"{path}#{name}", reason or NO_IMAGE, suffix=suffix)
    return False


def chunks_of(member: tarfile.TarInfo) -> Chunks | None:
    pairs: Any = member.sparse
    return None if pairs is None else tuple(pairs)


def fault_of(member: tarfile.TarInfo, chunks: Chunks | None) -> str:
    if not member.isreg():
        return "a link or a special file, not an image"
    if chunks is None:
        return ""
    if member.size > MOST_SPARSE:
        return f"a sparse file of {member.size} bytes, not an image"
    fits = all(0 <= start <= start + count <= member.size for start, count in chunks)
    return "" if fits else "a sparse file whose map does not fit its size"


def global_header(block: bytes) -> int:
    """Size of what follows, or -1 if the block is no such header."""
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return -1
    return member.size if member.type == tarfile.XGLTYPE else -1
