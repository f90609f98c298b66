"""A run over a folder, and what its files vouch for.

    settings  ->  plan: what is there, what is missing  ->  encoded images  ->  shards, parts  ->  index.csv, errors.csv

An index never names a row that was not computed from that input, those settings and those weights. What each file
says, in the order in which they come into being:

    .run.lock       Somebody writes here (lock.py). Before all else; the death of its holder opens it.
    run.json        What all rows have in common: settings, versions, a digest of all bytes of the weights. Its own
                    digest is the run's. Once no part is there that it does not account for.
    shard-*         Nothing by itself. Once the part of this number that was there is gone.
    .parts/*.csv    The shard's files are whole (size, checksum of both ends) and hold, in this order, these inputs in
                    this state (size and modification time), computed by the run of this digest. After its shard.
    index.parquet   With --keep: index.csv, and what is kept. After the last part, before errors.csv and index.csv.
    errors.csv      The inputs without a row, and why. When every input is in a part.
    index.csv       The row of every other input. Last of all that is believed.
    skipped.csv     What was passed over to find the inputs. Nothing depends on it.

Every file is written under another name, brought to the disk and renamed. A kill between any two steps leaves shards
without a part, or files of other names, which are nothing yet: they are written again or swept away; parts, which vouch
for what is there; and an index that is true or missing: it goes before any shard that it names is touched.

`--resume` believes run.json and the parts. It refuses another run (settings, versions, weights that differ, inputs that
are gone or in another order, files that cannot be found for now) and says which. It encodes what no part vouches for:
shards lost or torn, inputs that are new, and inputs that have changed, which it names, with the rest of their shard.
That an input could not be read is vouched for like a row, and only `--retry-errors` has it tried again, with the rest
of its shard; if it is gone, nothing was lost with it. A folder without run.json trusts no part; if it holds files of
our names it is not written to.

Under torchrun rank 0 holds the lock, plans and writes the tables. Rank r of w makes the missing shards r, r + w, ...

D hidden size.
"""

from __future__ import annotations

import contextlib
import csv
import gc
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from siglip2_packed.collection import FORMATS
from siglip2_packed.collection.decode import ahead
from siglip2_packed.collection.features import EncodedImage
from siglip2_packed.collection.identity import flat, run_digest
from siglip2_packed.collection.kept import cast
from siglip2_packed.collection.parquet import import_pyarrow, one_line
from siglip2_packed.collection.parts import Row, part_numbers, read_part, recorded, write_part
from siglip2_packed.collection.plan import Plan, Range, Share, listed, make_plan, share_plan
from siglip2_packed.collection.ranks import Ranks
from siglip2_packed.collection.shards import (
    Counts,
    Output,
    in_order,
    input_column,
    read_table,
    replacing,
    sweep,
    tensor_names,
    write_shard,
)
from siglip2_packed.collection.sources import Inputs, changed
from siglip2_packed.remote import forget_states

Encode = Callable[[list[Range], int], Iterator[EncodedImage]]
"""(ranges, how many inputs are done already) -> the inputs of these ranges, encoded."""
ALONE, WHOLE = Ranks(), Share()
RECORD = 2
"""Of run.json and the parts. The first recorded neither versions nor states of inputs."""


@contextlib.contextmanager
def imports_spared() -> Iterator[None]:
    """By the collector of garbage, which has all threads wait while it looks through what there is: 0.2 s."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@imports_spared()
def to_folder(
    folder: Path,
    inputs: Inputs,
    settings: dict[str, Any],
    encode: Encode,
    empty: dict[str, Tensor],
    *,
    resume: bool = False,
    retry_errors: bool = False,
    ranks: Ranks = ALONE,
    held: Callable[[], None] = lambda: None,
    share: Share = WHOLE,
) -> Counts:
    """Writes this rank's shards; rank 0, the tables. Every rank returns the counts of all.

    Args:
        settings: `shard_size`, `format`, and all else that makes a run another one: they become run.json.
        resume: go on with the run that is in the folder, if there is one.
        retry_errors: with the inputs that could not be read, too.
        empty: what is kept, `patches [0, D]` and `pooled [0, D]`, in the dtype to save.
        held: raises OSError if the folder is somebody else's by now, see lock.py.
        share: makes only its shards, and no tables: `shares.merge_shares` does.

    Raises:
        ValueError: the folder holds another run, or ranks were asked for different ones.
    """
    settings = complete(settings, inputs)
    settings["share"] = str(share) if share.of > 1 else None
    ranks.agree(settings)
    keep = inputs.schema is not None
    output = Output(folder, settings["format"], tensor_names(empty), run_digest(settings), held, keep)
    plan = ranks.first(lambda: start(output, inputs, settings, resume, retry_errors, share))
    write_missing(output, inputs, plan, plan.to_make[ranks.rank :: ranks.world], encode, empty)
    ranks.wait()
    if share.of > 1:
        own = share.numbers(len(inputs), settings["shard_size"])
        return ranks.first(lambda: counted(row for number in own for row in rows_of(output, number)))
    return ranks.first(lambda: merge(output, plan, inputs.schema))


def complete(settings: dict[str, Any], inputs: Inputs) -> dict[str, Any]:
    """As run.json holds them."""
    about = {"record": RECORD, "inputs": len(inputs), "names": inputs.fingerprint()}
    return json.loads(json.dumps({**about, **settings}))


def start(
    output: Output, inputs: Inputs, settings: dict[str, Any], resume: bool, retry_errors: bool, share: Share
) -> Plan:
    """Leaves nothing in the folder that this run does not vouch for; then run.json."""
    check_run(output.folder, settings, resume, inputs)
    file = output.folder / "run.json"

    def planned(retry_errors: bool) -> Plan:
        size = settings["shard_size"]
        if share.of > 1:
            return share_plan(output, inputs, size, retry_errors, share)
        return make_plan(output, inputs, size, retry_errors)

    if file.exists():
        try:
            plan = planned(retry_errors)
        except ValueError as error:
            raise ValueError(f"--resume: the run in {str(output.folder)!r} cannot go on: {error}") from None
        if plan.changed:
            print(f"changed since they were encoded, encoded again: {listed(plan.changed)}", file=sys.stderr)
        if plan.retried:
            again, where = list(chain.from_iterable(plan.retried.values())), [*map(output.shard, plan.retried)]
            print(f"tried again: {len(again)} inputs that could not be read: {listed(again)}; and what else is in "
                  f"{len(where)} shards: {listed(where)}", file=sys.stderr)  # fmt: skip
    output.parts.mkdir(parents=True, exist_ok=True)
    for folder in (output.folder, output.parts):
        sweep(folder)
    if file.exists():
        forget(output, plan)
    else:
        for number in part_numbers(output):
            output.part(number).unlink(missing_ok=True)
        plan = planned(False)
    write_run(output, settings)
    return plan


def write_run(output: Output, settings: dict[str, Any]) -> None:
    with replacing(output.folder / "run.json", output.held) as path:
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def forget(output: Output, plan: Plan) -> None:
    """Takes away parts that are not true, and before them an index that names a shard which will be another."""
    index, errors = output.folder / "index.csv", output.folder / "errors.csv"
    if plan.stale or shards_in(index) & {*plan.to_make}:
        index.unlink(missing_ok=True)
        output.index_table.unlink(missing_ok=True)
        errors.unlink(missing_ok=True)
    for number in plan.stale:
        output.part(number).unlink(missing_ok=True)
        for path in output.files(number):
            path.unlink(missing_ok=True)


def shards_in(index: Path) -> set[int]:
    """Numbers of all shards that are named anywhere in it, whatever state it is in."""
    return set(map(int, re.findall(rb"shard-(\d+)", index.read_bytes()))) if index.exists() else set()


def write_missing(
    output: Output, inputs: Inputs, plan: Plan, numbers: list[int], encode: Encode, empty: dict[str, Tensor]
) -> None:
    """The shards of these numbers, by a thread behind the model."""
    images: Any = encode(plan.ranges(numbers), plan.done)
    made = gather(images, plan)
    jobs = ((partial(write, output, inputs, number, some, empty), None) for number, some in made)
    with contextlib.closing(images), ThreadPoolExecutor(1) as writer:  # a shard that cannot be written ends them, too
        for _ in ahead(jobs, writer, depth=2):
            pass


def write(output: Output, inputs: Inputs, number: int, images: list[EncodedImage], empty: dict[str, Tensor]) -> None:
    images, columns = kept_rows(inputs, images) if output.keep else (images, None)
    write_shard(output, number, images, empty, columns)
    write_part(output, number, images)


def kept_rows(inputs: Inputs, images: list[EncodedImage]) -> tuple[list[EncodedImage], Any]:
    """The images, and of those that were read what is kept, a row each; an image whose row cannot be had is an error.

    Damage costs the images it hits, and a row of features never stands beside another input's values.
    """
    pa = import_pyarrow()
    told, tables = [*images], [inputs.schema.empty_table()]
    good = [i for i, image in enumerate(images) if not image.error]
    for part, places, run in inputs.places([images[i].ordinal for i in good]):
        try:
            table = cast(part.columns(places, inputs.schema.names), inputs.schema)
            forget_states()  # a URL's is asked for again, after its values were read
            if change := changed(part):
                raise ValueError(change)
        except (pa.ArrowException, OSError, ValueError) as error:
            for i in run.tolist():
                image = images[good[i]]
                told[good[i]] = image._replace(patches=None, pooled=None, error=one_line(f"--keep: {error}"))
        else:
            assert len(table) == len(places)
            tables.append(table)
    return told, pa.concat_tables(tables).combine_chunks()  # a shard is one record batch


def gather(images: Iterable[EncodedImage], plan: Plan) -> Iterator[tuple[int, list[EncodedImage]]]:
    """(number, its images in input order) of each shard, once the last of its inputs has come."""
    sizes = np.bincount(plan.owner)
    waiting: dict[int, list[EncodedImage]] = {}
    for image in images:
        number = int(plan.owner[image.ordinal])
        shard = waiting.setdefault(number, [])
        shard.append(image)
        if len(shard) == sizes[number]:
            yield number, in_order(waiting.pop(number))
    assert not waiting, f"shards {sorted(waiting)} never got all of their inputs"


def merge(output: Output, plan: Plan, schema: Any = None) -> Counts:
    """Parts -> errors.csv and index.csv, in input order; with a schema index.parquet."""
    if schema is not None:
        write_index(output, plan, schema)
    with contextlib.ExitStack() as stack:
        # left in turn: index.csv, which says that all is there, is renamed last
        index_path, errors_path = (
            stack.enter_context(replacing(output.folder / name, output.held)) for name in ("index.csv", "errors.csv")
        )
        index_file, errors_file = (stack.enter_context(open_csv(path, "w")) for path in (index_path, errors_path))
        index, errors = csv.writer(index_file), csv.writer(errors_file)
        index.writerow(("input", "shard", "row", "grid"))
        errors.writerow(("input", "reason"))

        def written() -> Iterator[Row]:
            for number, row in in_input_order(output, plan):
                if row.error:
                    errors.writerow((row.input, row.error))
                else:
                    index.writerow((row.input, output.shard(number), row.row, row.grid))
                yield row

        return counted(written())


def counted(rows: Iterable[Row]) -> Counts:
    failed = read = patches = 0
    for row in rows:
        if row.error:
            failed += 1
        else:
            read += 1
            patches += patches_of(row.grid)
    return Counts(failed, read, patches)


@lru_cache
def patches_of(grid: str) -> int:
    """`"1x16x12"` -> 192."""
    return math.prod(map(int, grid.split("x")))


def in_input_order(output: Output, plan: Plan) -> Iterator[tuple[int, Row]]:
    """(shard, row of its part) of every input. A part is in memory from its first to its last."""
    left = np.bincount(plan.owner)
    parts: dict[int, list[Row]] = {}
    for number, line in zip(integers(plan.owner), integers(plan.line)):
        if number not in parts:
            parts[number] = rows_of(output, number)
        yield number, parts[number][line]
        left[number] -= 1
        if not left[number]:
            del parts[number]


def integers(array: np.ndarray) -> Iterator[int]:
    """Python's, of which an array's iterator makes one at a time, and slowly."""
    for begin in range(0, len(array), 1 << 16):
        yield from array[begin : begin + (1 << 16)].tolist()


def write_index(output: Output, plan: Plan, schema: Any) -> None:
    """index.parquet: the columns of index.csv, then what is kept."""
    pa = import_pyarrow()
    ours = [("input", pa.string()), ("shard", pa.string()), ("row", pa.int64()), ("grid", pa.string())]
    found = pa.schema([*ours, *schema])
    with (
        replacing(output.index_table, output.held) as path,
        path.open("wb") as file,
        pa.parquet.ParquetWriter(file, found) as writer,
    ):
        rows = ((number, row) for number, row in in_input_order(output, plan) if not row.error)
        for number, some in groupby(rows, key=lambda one: one[0]):
            of_shard = [row for _, row in some]
            shard = [output.shard(number)] * len(of_shard)
            columns = pa.table({"shard": shard, "row": [int(row.row) for row in of_shard],
                                "grid": [row.grid for row in of_shard]})  # fmt: skip
            kept = read_table(output.columns(number), schema.names).take(columns["row"])
            for name in schema.names:
                columns = columns.append_column(name, kept[name])
            writer.write_table(input_column([row.input for row in of_shard], columns).cast(found))


def rows_of(output: Output, number: int) -> list[Row]:
    rows = read_part(output, number)
    if rows is None:
        raise OSError(f"{output.part(number)} or its shard was changed while the run went on: --resume makes it again")
    return rows


def read_run(folder: Path) -> dict[str, Any]:
    """run.json, or nothing. Raises ValueError if it is none."""
    file = folder / "run.json"
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("inputs"), int):
            raise ValueError("it does not hold an object with a number of inputs")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not a run.json that can be read ({error}): write elsewhere") from None
    return found


def check_run(folder: Path, settings: dict[str, Any], resume: bool, inputs: Inputs | None = None) -> None:
    """Raises ValueError if the folder holds what this run does not go on with: another run, or other files.

    Args:
        settings: those that are known; one that is not there is not compared.
        inputs: those of the settings.
    """
    before = read_run(folder)
    if not before:
        check_names(folder)
        return
    where = f"the run in {str(folder)!r}"
    if not resume:
        raise ValueError(f"{str(folder)!r} holds a run: go on with it (--resume), remove it or write elsewhere")
    if before.get("record") != RECORD:
        raise ValueError(
            f"--resume: {where} is of another version of siglip2-packed. It does not record the size and modification "
            "time of its inputs, all bytes of its weights and the versions of Pillow, torch and transformers, so "
            "nothing can be added to it. Its index.csv and shards stay as they are: write elsewhere"
        )
    ours, theirs = dict(flat(settings)), dict(flat(before))
    if theirs.get("share") and inputs and ours["names"] != theirs["names"]:
        raise ValueError(
            f"--resume: {where} is share {theirs['share']} of {theirs['inputs']} inputs, these are {len(inputs)} or "
            "have other names: all shares are of the same. Merge them, and go on with the whole, without --shard"
        )
    unlike = [name for name in ours if name != "checkpoint" and ours[name] != theirs.get(name)]
    gone = ""
    if inputs and "names" in unlike:
        there = set(inputs.names())
        lost = [row for row in recorded(folder) if row.input not in there]
        if any(row.error for row in lost):
            # an error is no loss; whether features are gone with it the plan will tell
            unlike = [name for name in unlike if name not in ("inputs", "names")]
        elif lost:
            gone = f"; not among the inputs any more: {listed([row.input for row in lost])}"
    said = [difference(name, ours, theirs) for name in unlike]
    if any(said):
        raise ValueError(f"--resume: {where} has {'; '.join(filter(None, said))}{gone}")


def difference(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """ "dtype float32, this one bfloat16". Nothing for inputs that are only more than there were: see `make_plan`."""
    mine, other = ours[name], theirs.get(name)
    if name == "weights":
        mine, other = f"others, of {ours['checkpoint']}", f"those of {theirs.get('checkpoint')}"
    if name == "inputs" and mine > other:
        return ""
    if name == "names":
        if ours["inputs"] != theirs["inputs"]:
            return ""
        mine, other = "the same number under other names or in another order", f"{theirs['inputs']} inputs"
    return f"{name} {other}, this one {mine}"


def check_names(folder: Path) -> None:
    """Raises ValueError for files that this run would write over and that no run.json accounts for."""
    ours = re.compile(rf"(?:index|errors|skipped)\.csv|index\.parquet|shard-\d{{5,}}\.(?:.+\.)?(?:{'|'.join(FORMATS)})")
    found = sorted(path.name for path in folder.iterdir() if ours.fullmatch(path.name)) if folder.is_dir() else []
    if found:
        raise ValueError(
            f"{str(folder)!r} holds {listed(found)}, but no run.json that says what they are: remove them, or write "
            "elsewhere"
        )


def open_csv(path: Path, mode: str):
    # names that are not UTF-8 come and go as they are
    return open(path, mode, newline="", encoding="utf-8", errors="surrogateescape")
