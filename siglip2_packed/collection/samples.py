"""What lies beside the images of a WebDataset tar: the other members of a sample, and the fields of its JSON.

A sample is a run of members whose names are alike up to the first dot of the last part: `a/7.jpg`, `a/7.txt`,
`a/7.json`. What is kept of it is a member by its suffix (`txt`, `cls`), or else a field of `.json`. `cls` and the like
are integers where all are (`007` is none), else text; text is UTF-8; other members are bytes.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

from siglip2_packed.collection.parquet import common_type, import_pyarrow
from siglip2_packed.formats import SUFFIXES

TEXT = frozenset("txt text transcript caption json jsn html htm xml csv md".split())
NUMBERS = frozenset("cls cls2 class count index inx id".split())
"""Suffixes that WebDataset reads as integers."""
JSON = "json"
BATCH = 1000
"""JSON members whose types are found at a time."""
INTEGER = re.compile(rb"0|-?[1-9]\d{0,18}").fullmatch
Place = tuple[int, int]
"""(offset, bytes) of a member."""


class Samples:
    """Members that are wanted, by sample; those that images belong to are numbered as they come."""

    def __init__(self, path: str, names: Sequence[str]):
        self.path, self.names = path, names
        self.of: list[dict[str, Place]] = []
        self.fields: set[str] = set()
        """Names that are fields of `.json`."""
        self.kinds: dict[str, Any] = {}
        self.key, self.seen = "", set[str]()

    def add(self, name: str, place: Place | None) -> bool:
        """Whether the member is kept and no image. A suffix that comes again begins another sample.

        Args:
            place: None of a member that is stored in several places, which can be kept only as an image.
        """
        key, suffix = split(name)
        if not suffix or key.endswith("/") or not key:  # hidden, or without a suffix: of no sample
            return False
        if not self.of or key != self.key or suffix in self.seen:
            self.key, self.seen = key, set()
            self.of.append({})
        self.seen.add(suffix)
        if place is not None and (suffix in self.names or (suffix == JSON and self.names)):
            self.of[-1][suffix] = place
            return f".{last_of(suffix)}" not in SUFFIXES
        return False

    def unused(self) -> int:
        """How many `.json` there are, if nothing of them is kept."""
        kept = JSON in self.names or self.fields & {*self.kinds}
        return 0 if kept else sum(JSON in sample for sample in self.of)

    @property
    def number(self) -> int:
        """Of the sample that the last member belongs to."""
        return len(self.of) - 1

    def find_types(self, file: Callable[[], IO[bytes]], used: Sequence[int]) -> Counter[str]:
        """Reads what tells types: JSON, if fields of it are asked for, and integers. How often which name is not there.

        Args:
            used: the sample of each image.

        Raises:
            ValueError: a field that has values of several types.
        """
        pa = import_pyarrow()
        there = Counter(suffix for sample in used for suffix in self.of[sample])
        self.fields = {name for name in self.names if not there[name]}
        with file() as opened:
            self.kinds = {
                name: pa.string() if last_of(name) in TEXT | NUMBERS else pa.binary()
                for name in self.names
                if name not in self.fields
            }
            for name in self.kinds:
                if last_of(name) in NUMBERS and all(
                    integer(content(opened, self.of[sample][name])) is not None
                    for sample in used
                    if name in self.of[sample]
                ):
                    self.kinds[name] = pa.int64()
            if self.fields:
                self.kinds |= self._field_types(opened, used, there)
        return Counter({name: len(used) - there[name] for name in self.names if there[name] < len(used)})

    def _field_types(self, file: IO[bytes], used: Sequence[int], there: Counter[str]) -> dict[str, Any]:
        pa = import_pyarrow()
        found: dict[str, Any] = {}
        for begin in range(0, len(used), BATCH):
            objects = [self._json(file, sample) for sample in used[begin : begin + BATCH]]
            for name in sorted(self.fields):
                values = [row[name] for row in objects if row.get(name) is not None]
                there[name] += len(values)
                if not any(name in row for row in objects):
                    continue
                try:
                    found[name] = common_type(found.get(name, pa.null()), pa.array(values).type)
                except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
                    raise ValueError(
                        f"--keep {name!r}: no type holds its values in the .json of {self.path} ({error}): keep "
                        "`json`, their text"
                    ) from error
        return found

    def _json(self, file: IO[bytes], sample: int) -> dict[str, Any]:
        """The object in a sample's `.json`; nothing if there is none that can be read."""
        place = self.of[sample].get(JSON)
        try:
            found = json.loads(content(file, place)) if place else {}
        except (ValueError, RecursionError):
            found = {}
        return found if isinstance(found, dict) else {}

    def column(self, file: IO[bytes], name: str, samples: Iterable[int]) -> Any:
        """Values of a name, null where a sample has none or it is not what its suffix says."""
        pa = import_pyarrow()
        kind = self.kinds.get(name, pa.null())
        return pa.array(self._values(file, name, kind, samples), kind)

    def _values(self, file: IO[bytes], name: str, kind: Any, samples: Iterable[int]) -> Iterator[Any]:
        pa = import_pyarrow()
        for sample in samples:
            place = self.of[sample].get(name)
            if name in self.fields:
                yield self._json(file, sample).get(name)
            elif place is None:
                yield None
            elif kind == pa.int64():
                yield integer(content(file, place))
            elif kind == pa.string():
                yield text(content(file, place), f"{self.path}: .{name} at byte {place[0]}")
            else:
                yield content(file, place)


def split(name: str) -> tuple[str, str]:
    """`a.b/7.left.JPG` -> `a.b/7`, `left.jpg`."""
    folder, slash, last = name.rpartition("/")
    key, _, suffix = last.partition(".")
    return folder + slash + key, suffix.lower()


def last_of(name: str) -> str:
    return name.rpartition(".")[2].lower()


def content(file: IO[bytes], place: Place) -> bytes:
    file.seek(place[0])
    return file.read(place[1])


def integer(data: bytes) -> int | None:
    """Of 64 bits, written as integers are: `007` is a name."""
    written = data.strip()
    if not INTEGER(written) or not -(1 << 63) <= int(written) < 1 << 63:
        return None
    return int(written)


def text(data: bytes, what: str) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        print(f"{what} is not UTF-8: null", file=sys.stderr)
        return None
