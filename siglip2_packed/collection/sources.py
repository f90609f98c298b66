"""Where images come from: files, folders, lists, tar shards (WebDataset) and tables, as one numbered sequence.

The order is that of the arguments; folders are walked in sorted order (walk.py), tar members and the rows of Parquet
and Arrow files come as stored. The entry of an input is a path, the bytes of an image, or the ValueError that says why
there are none: damage inside a collection costs the inputs it hits, never the run.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from siglip2_packed.collection.arrow import ARROW, Arrow
from siglip2_packed.collection.identity import UNSTEADY, same, stamp
from siglip2_packed.collection.kept import kept_schema
from siglip2_packed.collection.parquet import Entry, Parquet, one_line
from siglip2_packed.collection.tar import Tar, is_compressed
from siglip2_packed.collection.walk import (
    COMPRESSED,
    CONTAINERS,
    ELSEWHERE,
    EMPTY,
    FOLDER,
    HIDDEN,
    NO_IMAGE,
    UNREAD,
    Fault,
    Skipped,
    reason_of_parts,
    walk,
)
from siglip2_packed.formats import is_image_name, local_path, open_regular, suffix_of
from siglip2_packed.remote import files_below, forget_states, is_url, read_urls, states

LISTS = (".txt",)


class Input(NamedTuple):
    ordinal: int
    name: str
    entry: Entry
    stamp: str = ""
    """Of the container it comes from, see `identity.stamp`; of a file of its own whoever reads it takes one."""


class Files:
    """Image files, opened by whoever decodes them."""

    path = stamp = ""

    def __init__(self, paths: list[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def names(self, start: int, stop: int) -> Iterator[str]:
        return iter(self.paths[start:stop])

    def read(self, start: int, stop: int) -> Iterator[Entry]:
        return iter(self.paths[start:stop])

    def types(self: Any, names: Sequence[str]) -> dict[str, Any]:
        raise ValueError(f"--keep {names[0]!r}: {self.paths[0]} stands for itself: only tables and tar files hold more")


class RemoteFiles:
    """Image files by URL, read here, ahead of whoever decodes them."""

    path = stamp = ""

    def __init__(self, paths: list[str], stamps: list[str]):
        self.paths, self.stamps = paths, stamps

    def __len__(self) -> int:
        return len(self.paths)

    def names(self, start: int, stop: int) -> Iterator[str]:
        return iter(self.paths[start:stop])

    def read(self, start: int, stop: int) -> Iterator[Entry]:
        return read_urls(self.paths[start:stop])

    types = Files.types


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

    def types(self, names: Sequence[str]) -> dict[str, Any]:
        return {}


Part = Files | RemoteFiles | Tar | Parquet | Arrow | Unusable


class Inputs:
    """The parts end to end: N inputs with the numbers 0 to N-1; `skipped` is what was passed over to find them."""

    schema: Any = None
    """pyarrow's, of the columns that are kept, see kept.py."""

    def __init__(self, parts: Iterable[Part], skipped: Skipped | None = None):
        self.skipped = skipped or Skipped()
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
                if part.path and (change := changed(part)):
                    entry = ValueError(change)
                yield Input(ordinal, name, entry, stamp_in(part, ordinal - begin))

    def places(self, ordinals: Sequence[int]) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
        """(part, places in it, which of the ordinals these are) of runs of ordinals, which ascend."""
        numbers = np.searchsorted(self.ends, ordinals, "right")
        for number in np.unique(numbers).tolist():
            part, run = self.parts[number], np.flatnonzero(numbers == number)
            yield part, np.asarray(ordinals)[run] - (self.ends[number] - len(part)), run

    def stamp(self, ordinal: int) -> str:
        """Of an input: its file's now, or its container's when that was listed."""
        number = bisect_right(self.ends, ordinal)
        part = self.parts[number]
        place = ordinal - self.ends[number] + len(part)
        return stamp(part.paths[place]) if isinstance(part, Files) else stamp_in(part, place)

    def fingerprint(self) -> str:
        """Of the names in their order."""
        digest = hashlib.sha256()
        for name in self.names():
            digest.update(os.fsencode(name) + b"\0")
        return digest.hexdigest()[:32]


def changed(part: Part) -> str:
    """How the container of inputs is not what it was when it was listed, or ""."""
    try:
        return "" if stamp(part.path) == part.stamp else f"{part.path} has changed since it was listed"
    except OSError as error:  # by URL
        return one_line(error)


def stamp_in(part: Part, place: int) -> str:
    """Of an input in a container, or by URL; where in a tar file tells members of one name apart."""
    if isinstance(part, RemoteFiles):
        return part.stamps[place]
    return f"{part.stamp}@{part.members[place].offset}" if isinstance(part, Tar) else part.stamp


def find_inputs(
    paths: Sequence[str | os.PathLike], column: str | None = None, but: Path | None = None, keep: Sequence[str] = ()
) -> Inputs:
    """What the command line names.

    Args:
        paths: image files, folders, lists (`.txt`, or `-` for standard input: a path a line, relative to the working
            folder), tar, Parquet and Arrow files. What is named is read whatever its suffix; what a walk or a tar
            file holds besides images is passed over and counted.
        column: the image column of Parquet and Arrow files.
        but: a folder that is not walked: the output.
        keep: columns of tables and members of tar samples that are carried along, see kept.py.

    Raises:
        ValueError: a path without images, a compressed tar file, no or several image columns, the output as input,
            nothing of a name to keep. In a folder with anything else, what is met of these is an input that says so.
        OSError: a folder, list, tar, Parquet or Arrow file that is not there; a URL that cannot be read.
        ImportError: no package for its scheme.
    """
    parts: list[Part] = []
    skipped = Skipped()
    for path in map(as_path, paths):
        finder = Finder(column, but, keep)
        if is_url(path):
            found = list(finder.of_url(path))
        elif os.path.isdir(path):
            found = list(finder.parts(walk(path, finder.skipped, but), walked=True))
        elif path == "-" or path.lower().endswith(LISTS):
            found = list(finder.parts(_lines(path)))
        elif is_image_name(path) or os.path.exists(path):
            found = list(finder.parts([path]))
        else:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if not any(map(len, found)):
            raise ValueError(no_images(path, finder.skipped))
        if isinstance(found[0], Unusable) and all(isinstance(part, Unusable) for part in found):
            raise ValueError(found[0].fault)
        parts += found
        skipped.update(finder.skipped)
    inputs = Inputs(parts, skipped)
    if keep:
        inputs.schema = kept_schema(inputs.parts, keep)
    return inputs


def find_again(name: str, stamp: str, column: str | None = None) -> str | bytes:
    """The path or the bytes of an input that was encoded, by its name.

    Args:
        stamp: the state it was in, see `identity.stamp`.
        column: the image column of tables, as `find_inputs` was given it.

    Raises:
        ValueError: it is not there any more, in another state, or cannot be read.
        OSError: what holds it cannot be opened.
    """
    holders = [name[:i] for i, letter in enumerate(name) if letter == "#"]
    path = next(filter(is_file, [*holders, name] if is_url(name) else [name, *holders]), None)
    if path is None:
        raise ValueError("not there any more" if os.path.isabs(name) else "not found from the working folder")
    inputs = _inputs_of(path, column)
    for ordinal, other in enumerate(inputs.names()):
        if other == name and same(stamp, inputs.stamp(ordinal)):
            entry = next(inputs.read(ordinal, ordinal + 1)).entry
            if isinstance(entry, ValueError):
                raise entry
            return entry
    raise ValueError("changed since it was encoded")


def is_file(path: str) -> bool:
    return stamp(path) != "absent" if is_url(path) else os.path.isfile(path)


@lru_cache(4)
def _inputs_of(path: str, column: str | None) -> Inputs:
    return find_inputs([path], column)


def image_files(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """Files as they are, folders walked for images; stderr tells what was passed over.

    Raises ValueError for a folder without images.
    """
    files: list[Path] = []
    skipped = Skipped()
    for path in map(as_path, paths):
        found = [path]
        if os.path.isdir(path):
            found = list(_only_images(walk(path, here := Skipped()), here))
            if not found:
                raise ValueError(no_images(path, here))
            skipped.update(here)
        files += map(Path, found)
    if skipped:
        print(f"passed over: {skipped}", file=sys.stderr)
    return files


def _only_images(paths: Iterable[str | Fault], skipped: Skipped) -> Iterator[str]:
    for path in paths:
        if isinstance(path, Fault):
            skipped.add(path.path, UNREAD, suffix=FOLDER)
        elif is_image_name(path):
            yield path
        else:
            skipped.add(path, ELSEWHERE)


def no_images(path: str, skipped: Skipped) -> str:
    there = f"; it holds {skipped}" if skipped else ""
    return f"no images in {path!r}{there}. `siglip2-packed encode --help` lists the suffixes of images"


class Finder:
    """Paths -> parts, and what was passed over on the way."""

    def __init__(self, column: str | None, but: Path | None, keep: Sequence[str] = ()):
        self.column, self.but, self.keep, self.skipped = column, but, keep, Skipped()
        self.states: dict[str, str] = {}
        """Of files by URL, as far as a listing told them."""

    def parts(self, paths: Iterable[str | Fault], walked: bool = False) -> Iterator[Part]:
        """Runs of image files become one part; anything else stands for itself.

        What somebody named and is unfit is an error. What a walk met must not keep the rest of the folder from being
        read.
        """
        run: list[str] = []
        for path in paths:
            image = isinstance(path, str) and (is_image_name(path) or is_other_file(path))
            if run and not (image and is_url(path) == is_url(run[0])):
                yield self.files(run)
                run = []
            if image:
                run.append(str(path))
                continue
            if isinstance(path, Fault):
                yield Unusable(path.path, one_line(path.reason))
                continue
            try:
                if os.path.isdir(path):
                    yield from self.parts(walk(path, self.skipped, self.but), walked=True)
                else:
                    yield self.container(path)
            except (ValueError, OSError, ImportError) as error:
                if not walked:
                    raise
                yield Unusable(path, one_line(error))
        if run:
            yield self.files(run)

    def files(self, paths: list[str]) -> Part:
        if not is_url(paths[0]):
            return Files(paths)
        unknown = [path for path in paths if not self.states.get(path)]
        self.states.update(zip(unknown, states(unknown)))
        return RemoteFiles(paths, [self.states[path] or UNSTEADY for path in paths])

    def of_url(self, url: str) -> Iterator[Part]:
        """A list, a collection, an image, or a folder of these."""
        forget_states()
        name = url_path(url).lower()
        if name.endswith(LISTS):
            yield from self.parts(_lines(url))
            return
        if not (is_image_name(name) or name.endswith(CONTAINERS)):
            self.states = files_below(url)
            if [*self.states] != [url]:
                below = len(url.rstrip("/")) + 1
                yield from self.parts((x for x in self.states if is_wanted(x, x[below:], self.skipped)), walked=True)
                return
        if stamp(url) == "absent":
            raise FileNotFoundError(f"{url}: not found")
        yield from self.parts([url])

    def container(self, path: str) -> Part:
        lower = (url_path(path) if is_url(path) else path).lower()
        if lower.endswith(COMPRESSED) or (lower.endswith(".tar") and is_compressed(path)):
            raise ValueError(f"{path} is compressed: decompress it (members are read from where they lie)")
        if lower.endswith(".tar"):
            return Tar(path, self.skipped, self.keep)
        table = (Arrow if lower.endswith(ARROW) else Parquet)(path, self.column)
        if table.empty:
            self.skipped.add(path, EMPTY, count=table.empty)
        return table


def is_other_file(path: str) -> bool:
    """Neither a folder nor a collection: reading it tells what it is. Of a pipe too, which has no suffix to go by."""
    if is_url(path):
        return not url_path(path).lower().endswith(CONTAINERS)
    return not os.path.isdir(path) and (
        not path.lower().endswith(CONTAINERS) or (os.path.exists(path) and not os.path.isfile(path))
    )


def url_path(url: str) -> str:
    """Without what a server is asked: `http://a/b.tar` of `http://a/b.tar?key=c`."""
    return re.split(r"[?#]", url)[0] if url.lower().startswith("http") else url


def is_wanted(url: str, below: str, skipped: Skipped) -> bool:
    """Whether what lies below a folder by URL is an image or a collection."""
    *folders, last = below.split("/")
    reason = reason_of_parts(folders) or (HIDDEN if last.startswith(".") else "")
    name = url_path(url).lower()
    if not reason and (is_image_name(name) or name.endswith(CONTAINERS)):
        return True
    skipped.add(url, reason or NO_IMAGE, suffix=suffix_of(url_path(last)))
    return False


def as_path(path: str | os.PathLike) -> str:
    """A `file://` URL as the path it stands for; one of another machine is left, for whoever reads it to say so."""
    try:
        return local_path(path)
    except ValueError:
        return os.fspath(path)


def _lines(path: str) -> list[str]:
    if path == "-":
        if sys.stdin is None:
            raise ValueError("-: standard input is closed")
        data = sys.stdin.buffer.read()
    else:
        try:
            with open_regular(path) as file:
                data = file.read()
        except ValueError as error:
            raise ValueError(f"{path} is {error}: have it come through `-`, standard input") from error
    if b"\0" in data:
        raise ValueError(f"{path} holds zero bytes, which no path does (UTF-16, `find -print0`): have it a path a line")
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [as_path(os.fsdecode(line.rstrip(b"\r"))) for line in lines if line.strip()]
