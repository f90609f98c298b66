"""A folder -> the images and collections below it, sorted part by part of the path; what else is there is counted.

Links to folders are followed, except into a folder that the link lies in: what two links lead to has two names. Hidden
files and folders, and what systems put beside photographs (companions, thumbnails, bins, snapshots), are passed over.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from siglip2_packed.collection.arrow import ARROW, STATE, saved_files
from siglip2_packed.formats import SUFFIXES, suffix_of

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
CONTAINERS = (".tar", ".parquet", ARROW, *COMPRESSED)
CACHES = frozenset(
    "@eadir|@recycle|@recently-snapshot|@tmp|#recycle|#snapshot|~snapshot|$recycle.bin|__macosx|lost+found|"
    "system volume information|network trash folder".split("|")
)
"""Folders of systems and NAS boxes, in lower case. Those that begin with a dot are hidden anyhow."""
PARTS = ".parts"
"""In a folder that encode has written to."""
FOLDER = "/"
"""Stands for the suffix of a folder."""
SUFFIX = re.compile(r"/|\*|\.\w{1,15}").fullmatch
"""What is no suffix but the end of a name ("St. Petersburg 2019") is not counted for itself."""

NO_IMAGE, HIDDEN, CACHE = "no image type", "hidden", "thumbnails, bins and snapshots"
LOOP, BROKEN, SPECIAL = "links to a folder they lie in", "links to what is not there", "pipes, sockets and devices"
EMPTY, ELSEWHERE = "rows without images", "collections, which encode reads"
UNREAD = "folders that cannot be read"
OUTPUT, STALE = "features of an earlier run", "not of the data set that lies there"


class Skipped:
    """How many files of which suffix were passed over and why, with an example of each."""

    MOST = 1000
    """Kinds told apart; the suffixes of all further ones are `*`."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        """(suffix, reason) -> files."""
        self.examples: dict[tuple[str, str], str] = {}

    def add(self, path: str, reason: str, *, suffix: str | None = None, count: int = 1) -> None:
        kind = suffix_of(path) if suffix is None else suffix, reason
        if kind not in self.counts:
            kind = kind[0] if SUFFIX(kind[0]) else "", reason
            if kind not in self.counts and len(self.counts) >= self.MOST:
                kind = "*", reason
            self.examples.setdefault(kind, path)
        self.counts[kind] += count

    def update(self, other: Skipped) -> None:
        for (suffix, reason), count in other.counts.items():
            self.add(other.examples[suffix, reason], reason, suffix=suffix, count=count)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """`12 .json, 3 .txt (no image type), 40 (hidden)`, the most frequent suffixes first."""
        said = []
        for reason in sorted({reason for _, reason in self.counts}, key=lambda reason: (reason != NO_IMAGE, reason)):
            rows = [(count, suffix) for (suffix, why), count in self.counts.items() if why == reason]
            rows.sort(key=lambda row: (-row[0], row[1]))
            listed = [str(sum(count for count, _ in rows))]
            if reason == NO_IMAGE:
                listed = [f"{count} {suffix or 'without suffix'}" for count, suffix in rows[:8]]
                rest = sum(count for count, _ in rows[8:])
                listed += [f"{rest} others"] if rest else []
            said.append(f"{', '.join(listed)} ({reason})")
        return ", ".join(said)

    def table(self) -> str:
        """CSV: suffix, reason, count, example."""
        file = io.StringIO()
        writer = csv.writer(file)
        writer.writerow(("suffix", "reason", "count", "example"))
        writer.writerows((*kind, count, self.examples[kind]) for kind, count in sorted(self.counts.items()))
        return file.getvalue()


class Fault(NamedTuple):
    """A folder or file that cannot be walked or read, and why."""

    path: str
    reason: str


def walk(folder: str, skipped: Skipped, but: str | os.PathLike | None = None) -> Iterator[str | Fault]:
    """Images and collections below the folder; one below it that cannot be read is a Fault.

    Args:
        but: a folder that is not walked: the output.

    Raises:
        OSError: the folder itself cannot be read.
        ValueError: it is the output.
    """
    output = os.stat(but) if but is not None and os.path.isdir(but) else None
    if output and os.path.samestat(os.stat(folder), output):
        raise ValueError(f"--out {folder!r} is a folder of inputs: name another, which may lie in it")
    above: list[tuple[str, bool]] = []  # the folders that lead here, and whether a link did
    levels: list[Iterator[os.DirEntry[str] | Fault]] = []

    def enter(path: str, by_link: bool = False) -> None:
        with os.scandir(path) as listed:
            entries = sorted(listed, key=lambda entry: entry.name)
        signs = {entry.name for entry in entries if entry.name in (PARTS, STATE)}
        if levels and PARTS in signs:
            skipped.add(path, OUTPUT, suffix=FOLDER)
            return
        above.append((path, by_link))
        levels.append(iter(of_data_set(path, entries, skipped) if STATE in signs else entries))

    enter(folder)
    while levels:
        entry = next(levels[-1], None)
        if entry is None:
            levels.pop()
            above.pop()
        elif isinstance(entry, Fault):
            yield entry
        elif not is_folder(entry):
            if is_wanted(entry, skipped):
                yield entry.path
        else:
            try:
                if not is_output(entry, output) and is_walked(entry, above, skipped):
                    enter(entry.path, entry.is_symlink())
            except OSError as error:
                yield Fault(entry.path, str(error))


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def is_wanted(entry: os.DirEntry[str], skipped: Skipped) -> bool:
    """Whether a file's name says that it is an image or a collection; of a pipe or a broken link reading tells more."""
    suffix = suffix_of(entry.name)
    if not entry.name.startswith(".") and (suffix in SUFFIXES or entry.name.lower().endswith(CONTAINERS)):
        return True
    skipped.add(entry.path, why_not(entry), suffix=suffix)
    return False


def why_not(entry: os.DirEntry[str]) -> str:
    if entry.name.startswith("."):
        return HIDDEN
    try:
        if entry.is_file():
            return NO_IMAGE
        entry.stat()
        return SPECIAL
    except OSError:
        return BROKEN


def is_walked(entry: os.DirEntry[str], above: list[tuple[str, bool]], skipped: Skipped) -> bool:
    if passed := reason_of_parts((entry.name,)):
        skipped.add(entry.path, passed, suffix=FOLDER)
    elif (entry.is_symlink() or any(by_link for _, by_link in above)) and is_one_of(entry, above):
        skipped.add(entry.path, LOOP, suffix=FOLDER)
    else:
        return True
    return False


def is_one_of(entry: os.DirEntry[str], above: list[tuple[str, bool]]) -> bool:
    here = os.stat(entry.path)
    return any(os.path.samestat(here, os.stat(path)) for path, _ in above)


def reason_of_parts(folders: tuple[str, ...] | list[str]) -> str:
    """Why what lies in folders of these names is passed over, or ""."""
    for name in folders:
        if name.startswith(".") and name not in (".", ".."):
            return HIDDEN
        if name.lower() in CACHES:
            return CACHE
    return ""


def is_output(entry: os.DirEntry[str], output: os.stat_result | None) -> bool:
    """Asks the file system only where the number of the inode may be the output's."""
    may_be = output is not None and (entry.is_symlink() or entry.inode() == output.st_ino)
    return may_be and output is not None and os.path.samestat(entry.stat(), output)


def of_data_set(folder: str, entries: list[os.DirEntry[str]], skipped: Skipped) -> Iterator[os.DirEntry[str] | Fault]:
    """The entries without Arrow files that are not of the data set whose state lies beside them: a map's caches."""
    try:
        wanted = saved_files(os.path.join(folder, STATE))
    except ValueError as error:
        yield Fault(folder, str(error))
        return
    if wanted is not None:
        for name in sorted(wanted - {entry.name for entry in entries}):
            yield Fault(os.path.join(folder, name), f"{STATE} names it, but it is not there")
    for entry in entries:
        if wanted is not None and suffix_of(entry.name) == ARROW and entry.name not in wanted:
            skipped.add(entry.path, STALE)
        else:
            yield entry
