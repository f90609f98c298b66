"""Which shard an input is in: those that are there and still true keep theirs, the others share new ones."""

from __future__ import annotations

from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from siglip2_packed.collection.identity import lost, same
from siglip2_packed.collection.parts import Row, part_numbers, read_part
from siglip2_packed.collection.shards import Output
from siglip2_packed.collection.sources import Inputs

Range = tuple[int, int]
"""Inputs `start` to `stop`."""


class Share(NamedTuple):
    """One of several runs that make a collection between them, number `place` of `of`, counted from 0."""

    place: int = 0
    of: int = 1

    def __str__(self) -> str:
        return f"{self.place}/{self.of}"

    def folder(self, out: Path) -> Path:
        return out / f"share-{self.place:05d}-of-{self.of:05d}"

    def numbers(self, inputs: int, shard_size: int) -> range:
        """The shards that it makes."""
        return range(self.place, -(-inputs // shard_size), self.of)


class Plan(NamedTuple):
    owner: np.ndarray
    """`[inputs]` int32: the shard of each."""
    line: np.ndarray
    """`[inputs]` int32: its place among the shard's inputs."""
    to_make: list[int]
    """Shards that are not there, in the order of their inputs."""
    stale: list[int]
    """Parts that are there and vouch for nothing."""
    changed: list[str]
    """Inputs that are in another state than when they were encoded."""
    retried: dict[int, list[str]]
    """Inputs that could not be read and are tried again, by the shard they were in."""
    done: int = 0
    """Inputs that need nothing any more, of those that are this run's."""

    def ranges(self, numbers: list[int]) -> list[Range]:
        """The inputs of these shards, in order."""
        chosen = np.flatnonzero(np.isin(self.owner, numbers))
        if not len(chosen):
            return []
        runs = np.split(chosen, np.flatnonzero(np.diff(chosen) != 1) + 1)
        return [(int(run[0]), int(run[-1]) + 1) for run in runs]


def make_plan(output: Output, inputs: Inputs, shard_size: int, retry_errors: bool = False) -> Plan:
    """Reads the parts that are there; changes nothing.

    Args:
        retry_errors: no part that holds an error stays.

    Raises:
        ValueError: there are features of inputs that are not among these, or cannot be found now.
    """
    owner, line = np.full(len(inputs), -1, np.int32), np.zeros(len(inputs), np.int32)
    stale, changed, gone, away = [], [], [], []
    retried: dict[int, list[str]] = {}
    numbers = part_numbers(output)
    known = Known(inputs) if numbers else None
    for number in numbers:
        rows = read_part(output, number)
        if rows is None or known is None:
            stale.append(number)
            continue
        found = known.find(rows)
        there = found >= 0
        # what could not be read may have become something else: a tar file that was empty, a folder that was closed
        gone += [row.input for row, known_now in zip(rows, there) if not (known_now or row.error)]
        pairs = [(row, place) for row, place in zip(rows, found.tolist()) if place >= 0]
        others, lacking = unlike(inputs, pairs)
        again = [row.input for row, _ in pairs if row.error and retry_errors]
        away += lacking
        if others or again:
            changed += others
            retried |= {number: again} if again else {}
            stale.append(number)
            continue
        owner[found[there]], line[found[there]] = number, np.flatnonzero(there)
    refuse(gone, "the inputs do not name (any more)")
    refuse(away, "cannot be found now")

    todo, taken = np.flatnonzero(owner < 0), {*numbers} - {*stale}
    free = (number for number in count() if number not in taken)
    to_make = list(islice(free, -(-len(todo) // shard_size)))
    order = np.arange(len(todo))
    owner[todo] = np.array(to_make, np.int32)[order // shard_size]
    line[todo] = order % shard_size
    return Plan(owner, line, to_make, stale, changed, retried, len(inputs) - len(todo))


def unlike(inputs: Inputs, pairs: list[tuple[Row, int]]) -> tuple[list[str], list[str]]:
    """Inputs of rows, and of these places, that are in another state than they were, by name; and those of them that
    have features and are not there: nothing would come in their place."""
    others = [(row, place) for row, place in pairs if not same(row.stamp, inputs.stamp(place))]
    away = [row.input for row, place in others if not row.error and lost(row.stamp, inputs.stamp(place))]
    return [row.input for row, _ in others], away


def refuse(names: list[str], why: str) -> None:
    if names:
        raise ValueError(f"it has features of {listed(names)}, which {why}")


def in_turn(inputs: int, shard_size: int) -> tuple[np.ndarray, np.ndarray]:
    """`owner` and `line` of a run that was never stopped."""
    number, line = np.divmod(np.arange(inputs, dtype=np.int32), np.int32(shard_size))
    return number, line


def share_plan(output: Output, inputs: Inputs, shard_size: int, retry_errors: bool, share: Share) -> Plan:
    """That of a share, which makes every `of`-th shard of a run that was never stopped. Changes nothing.

    Raises:
        ValueError: there are features of inputs that cannot be found now.
    """
    owner, line = in_turn(len(inputs), shard_size)
    stale, changed, away = [], [], []
    retried: dict[int, list[str]] = {}
    own, names = share.numbers(len(inputs), shard_size), [*inputs.names()]
    for number in part_numbers(output):
        rows, first = read_part(output, number), number * shard_size
        if number not in own or not rows or [row.input for row in rows] != names[first : first + shard_size]:
            stale.append(number)
            continue
        others, lacking = unlike(inputs, [(row, place) for place, row in enumerate(rows, first)])
        again = [row.input for row in rows if row.error and retry_errors]
        away += lacking
        if others or again:
            changed += others
            retried |= {number: again} if again else {}
            stale.append(number)
    refuse(away, "cannot be found now")
    there = {*part_numbers(output)} - {*stale}
    done = int(np.isin(owner, [*there]).sum())
    return Plan(owner, line, [number for number in own if number not in there], stale, changed, retried, done)


class Known:
    """Finds inputs by their names. One that is named twice is found twice."""

    def __init__(self, inputs: Inputs):
        names = list(inputs.names())
        self.next: dict[str, int] = {}
        self.after = np.full(len(names), -1, np.int32)  # the next of the same name
        for place in range(len(names) - 1, -1, -1):
            self.after[place] = self.next.get(names[place], -1)
            self.next[names[place]] = place

    def find(self, rows: list[Row]) -> np.ndarray:
        """`[rows]`: the input of each, -1 where there is none of that name left."""
        places = np.full(len(rows), -1, np.int64)
        for i, row in enumerate(rows):
            places[i] = place = self.next.get(row.input, -1)
            if place >= 0:
                self.next[row.input] = int(self.after[place])
        return places


def listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
