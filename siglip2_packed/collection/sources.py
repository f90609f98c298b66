"""Where images come from: files, folders, lists, tar shards (WebDataset) and Parquet, as one numbered sequence.

The order is that of the arguments; folders are walked in sorted order, tar members and Parquet rows come as stored.
The entry of an input is a path, the bytes of an image, or the ValueError that says why there are none: damage inside a
collection costs the inputs it hits, never the run.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import sys
import tarfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from siglip2_packed.collection.identity import stamp
from siglip2_packed.collection.parquet import Entry, Parquet, one_line

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
LISTS = (".txt",)
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
CONTAINERS = (".tar", ".parquet", *COMPRESSED)


class Input(NamedTuple):
    ordinal: int
    name: str
    entry: Entry
    stamp: str = ""
    """Of the container it comes from, see `identity.stamp`; of a file of its own whoever reads it takes one."""


class Files:
    """Image files, opened by whoever decodes them."""

    stamp = ""

    def __init__(self, paths: list[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def names(self, start: int, stop: int) -> Iterator[str]:
        return iter(self.paths[start:stop])

    def read(self, start: int, stop: int) -> Iterator[Entry]:
        return iter(self.paths[start:stop])


class Tar:
    """The image members of an uncompressed tar file; `a.tar#name` is their name."""

    def __init__(self, path: str):
        self.path, self.stamp = path, stamp(path)
        self.members = list(tar_members(path))

    def __len__(self) -> int:
        return len(self.members)

    def names(self, start: int, stop: int) -> Iterator[str]:
        return (f"{self.path}#{member.name}" for member in self.members[start:stop])

    def read(self, start: int, stop: int) -> Iterator[Entry]:
        with open(self.path, "rb") as file:
            for member in self.members[start:stop]:
                if member.fault:
                    yield ValueError(member.fault)
                    continue
                file.seek(member.offset)
                yield file.read(member.size)


class Member(NamedTuple):
    name: str
    offset: int
    size: int
    fault: str = ""


def tar_members(path: str) -> Iterator[Member]:
    """Members with an image's suffix, and a faulty member wherever more may be lost: damaged headers, a cut file.

    `tarfile` ends without a word at a header it cannot read. With `ignore_zeros` it looks for the next good one
    instead, and the gap shows that something was lost.
    """
    total, end = os.path.getsize(path), 0
    if not total:
        yield Member("", 0, 0, "an empty file, not a tar file")

    def gap(start: int, stop: int) -> Iterator[Member]:
        if start >= stop:
            return
        with open(path, "rb") as file:
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
        with tarfile.open(path, "r:", ignore_zeros=True) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if member.size < 0:
                    break
                yield from gap(end, member.offset)
                end = member.offset_data + (-(-member.size // 512) * 512 if member.isreg() else 0)
                there = total - member.offset_data
                if member.isreg() and member.size > there:  # whatever it is: what came behind it is lost
                    yield Member(member.name, 0, 0, f"the tar file ends after {there} of its {member.size} bytes")
                    return
                if member.name.lower().endswith(SUFFIXES) and not member.isdir():
                    fault = "" if member.isreg() else "a link or a special file, not an image"
                    yield Member(member.name, member.offset_data, member.size, fault)
    except Exception:  # TarError, or what an absurd size provokes when it is sought or allocated
        pass  # cut short or damaged from here on: the gap below
    yield from gap(min(end, total), total)


def global_header(block: bytes) -> int:
    """Size of what follows, or -1 if the block is no such header."""
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return -1
    return member.size if member.type == tarfile.XGLTYPE else -1


class Unusable:
    """A file or folder met on a walk that cannot be opened as what its name says: one input, and why."""

    def __init__(self, path: str, fault: str):
        self.path, self.fault, self.stamp = path, fault, stamp(path)

    def __len__(self) -> int:
        return 1

    def names(self, start: int, stop: int) -> Iterator[str]:
        return iter([self.path])

    def read(self, start: int, stop: int) -> Iterator[Entry]:
        return iter([ValueError(self.fault)])


Part = Files | Tar | Parquet | Unusable


class Inputs:
    """The parts end to end: N inputs with the numbers 0 to N-1."""

    def __init__(self, parts: Iterable[Part]):
        self.parts = [part for part in parts if len(part)]
        self.ends = list(itertools.accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def names(self) -> Iterator[str]:
        return itertools.chain.from_iterable(part.names(0, len(part)) for part in self.parts)

    def read(self, start: int, stop: int) -> Iterator[Input]:
        """Inputs `start` to `stop`, in order."""
        for number in range(bisect_right(self.ends, start), len(self.parts)):
            part, begin = self.parts[number], self.ends[number] - len(self.parts[number])
            first, last = max(start - begin, 0), min(stop - begin, len(part))
            if first >= last:
                break
            entries = zip(part.names(first, last), part.read(first, last))
            for ordinal, (name, entry) in enumerate(entries, begin + first):
                if not isinstance(part, Files) and stamp(part.path) != part.stamp:
                    entry = ValueError(f"{part.path} has changed since it was listed")
                yield Input(ordinal, name, entry, part.stamp)

    def stamps(self) -> Iterator[str]:
        """Of every input: its file's, or its container's when that was listed."""
        for part in self.parts:
            yield from map(stamp, part.paths) if isinstance(part, Files) else itertools.repeat(part.stamp, len(part))

    def fingerprint(self) -> str:
        """Of the names in their order."""
        digest = hashlib.sha256()
        for name in self.names():
            digest.update(os.fsencode(name) + b"\0")
        return digest.hexdigest()[:32]


def find_inputs(paths: Sequence[str | os.PathLike], column: str | None = None, but: Path | None = None) -> Inputs:
    """What the command line names.

    Args:
        paths: image files, folders, lists (`.txt`, or `-` for standard input: a path a line, relative to the working
            folder), tar and Parquet files.
        column: the image column of Parquet files.
        but: a folder that is not walked: the output.

    Raises:
        ValueError: a path without images, a compressed tar file, no or several image columns, the output as input.
            In a folder with anything else, what is met of these is an input that says so.
        OSError: a folder, list, tar or Parquet file that is not there.
    """
    parts: list[Part] = []
    for path in (os.fspath(path) for path in paths):
        if os.path.isdir(path):
            found = list(_parts(_walk(path, but), column, but, walked=True))
        elif path == "-" or path.lower().endswith(LISTS):
            found = list(_parts(_lines(path), column, but))
        elif path.lower().endswith(SUFFIXES) or os.path.exists(path):
            found = list(_parts([path], column, but))
        else:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if not any(map(len, found)):
            raise ValueError(f"no images in {path!r} (files that end in {', '.join(SUFFIXES)})")
        if isinstance(found[0], Unusable) and all(isinstance(part, Unusable) for part in found):
            raise ValueError(found[0].fault)
        parts += found
    return Inputs(parts)


def image_files(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """Files as they are, folders walked for images. Raises ValueError for a folder without."""
    files: list[Path] = []
    for path in map(Path, paths):
        found = [path]
        if path.is_dir():
            found = [file for file in map(Path, _walk(str(path))) if file.suffix.lower() in SUFFIXES]
        if not found:
            raise ValueError(f"no images in {str(path)!r} (files that end in {', '.join(SUFFIXES)})")
        files += found
    return files


def _parts(paths: Iterable[str], column: str | None, but: Path | None, walked: bool = False) -> Iterator[Part]:
    """Runs of image files become one part; anything else stands for itself.

    What somebody named and is unfit is an error. What a walk met must not keep the rest of the folder from being read.
    """
    for is_image, run in itertools.groupby(paths, lambda path: path.lower().endswith(SUFFIXES)):
        if is_image:
            yield Files(list(run))
            continue
        for path in run:
            try:
                if os.path.isdir(path):
                    more = _parts(_walk(path, but), column, but, walked=True)
                else:
                    more = iter([_part(path, column)])
            except (ValueError, OSError) as error:
                if not walked:
                    raise
                more = iter([Unusable(path, one_line(error))])
            yield from more


def _part(path: str, column: str | None) -> Part:
    lower = path.lower()
    if lower.endswith(COMPRESSED):
        raise ValueError(f"{path} is compressed: decompress it (members are read from where they lie)")
    if lower.endswith(".tar"):
        return Tar(path)
    return Parquet(path, column) if lower.endswith(".parquet") else Files([path])


def _lines(path: str) -> list[str]:
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [os.fsdecode(line.rstrip(b"\r")) for line in lines if line.strip()]


def _walk(folder: str, but: Path | None = None) -> list[str]:
    """Every image, tar and Parquet file below a folder, sorted part by part of the path. No features: outputs.

    A folder below that cannot be read is listed for itself.
    """
    found: list[str] = []

    def fail(error: OSError):
        if error.filename == folder:
            raise error
        found.append(error.filename)

    for root, folders, files in os.walk(folder, onerror=fail):
        is_output = but is not None and Path(root).resolve() == but
        if is_output and root == folder:
            raise ValueError(f"--out {folder!r} is a folder of inputs: name another, which may lie in it")
        if is_output or (root != folder and ".parts" in folders):
            folders.clear()
        else:
            found += [os.path.join(root, name) for name in files if name.lower().endswith((*SUFFIXES, *CONTAINERS))]
    return sorted(found, key=lambda path: path.split(os.sep))
