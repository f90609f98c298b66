"""Shares of a run (`encode --shard 3/64`), each in a folder of its own  ->  the folder that one run would have written.

Every share has the run.json of the whole, and the shards and parts of it that are its own, under the numbers that they
have there. So nothing is made here but index.csv, index.parquet and errors.csv; shards are linked, or copied where they
cannot be, and vouched for by their parts, as in any run. The shares stay as they are.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from siglip2_packed.collection.identity import flat, run_digest
from siglip2_packed.collection.parts import part_numbers, read_part
from siglip2_packed.collection.plan import Plan, Share, in_turn, listed
from siglip2_packed.collection.run import check_names, merge, read_run, write_run
from siglip2_packed.collection.shards import Counts, Output, read_table, replacing, sweep, tensor_names

FOLDER = re.compile(r"share-(\d{5,})-of-(\d{5,})")
DIFFER = ("share", "checkpoint")
"""Settings in which shares of one run may be unlike."""


def merge_shares(folders: Sequence[Path], out: Path, held: Callable[[], None]) -> Counts:
    """Makes `out` the folder of the whole; nothing is written before all shares were found complete and alike.

    Args:
        folders: shares, or what holds them.
        held: raises OSError if `out` is somebody else's by now, see lock.py.

    Raises:
        ValueError: shares that are missing, not finished, of different settings or there twice; `out` has another run.
    """
    shares = find_shares(folders)
    settings = {**common_settings(shares), "share": None}
    there = [output_of(folder, settings) for _, folder in sorted(shares.items())]
    size, inputs = settings["shard_size"], settings["inputs"]
    check_complete(shares, there, settings)
    whole = output_of(out, settings, held)
    before = read_run(out)
    if not before:
        check_names(out)
    elif unlike := difference(before, settings, but=("checkpoint",)):
        raise ValueError(f"{str(out)!r} holds another run, with {unlike}: write elsewhere")

    whole.parts.mkdir(parents=True, exist_ok=True)
    for folder in (whole.folder, whole.parts):
        sweep(folder)
    if not before:
        for number in part_numbers(whole):
            whole.part(number).unlink()
        write_run(whole, settings)
    for number in range(-(-inputs // size)):
        bring_shard(there[number % len(there)], whole, number)
    if (skipped := there[0].folder / "skipped.csv").exists():  # a share that was killed behind its last shard has none
        bring(skipped, out / "skipped.csv", held)
    names = [name for name, _ in settings["keep"]]
    schema = read_table(whole.columns(0), names).schema if names else None
    return merge(whole, Plan(*in_turn(inputs, size), [], [], [], {}), schema)


def find_shares(folders: Iterable[Path]) -> dict[Share, Path]:
    """All shares of one run. Raises ValueError where one is missing, there twice, or of another number of shares."""
    found: dict[Share, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"no such folder: {str(folder)!r}")
        for path in [folder] if FOLDER.fullmatch(folder.resolve().name) else sorted(folder.iterdir()):
            if (match := FOLDER.fullmatch(path.resolve().name)) and path.is_dir():
                share = Share(*map(int, match.groups()))
                if not path.samefile(found.setdefault(share, path)):
                    raise ValueError(f"share {share} is there twice: {str(found[share])!r} and {str(path)!r}")
    if not found:
        raise ValueError(f"no shares in {', '.join(map(str, folders))}: encode --shard makes folders share-...-of-...")
    first, *_ = found
    if strange := next((share for share in found if share.of != first.of), None):
        raise ValueError(f"shares of different runs: {str(found[first])!r} and {str(found[strange])!r}")
    begun = {share: folder for share, folder in found.items() if read_run(folder)}
    missing = [str(share) for share in (Share(i, first.of) for i in range(first.of)) if share not in begun]
    if missing:
        raise ValueError(f"{len(missing)} of {first.of} shares are missing: {listed(missing)}")
    return begun


def common_settings(shares: dict[Share, Path]) -> dict[str, Any]:
    """run.json of them all. Raises ValueError where they differ."""
    first = min(shares)
    settings = read_run(shares[first])
    for share, folder in shares.items():
        if found := difference(read_run(folder), settings, but=DIFFER):
            raise ValueError(f"share {share} has {found} in share {first}: shares of one run are of the same settings")
    return settings


def difference(one: dict[str, Any], other: dict[str, Any], but: Sequence[str]) -> str:
    """ "dtype float32, bfloat16", the first's before the second's; nothing where they are alike."""
    ours, theirs = dict(flat(one)), dict(flat(other))
    names = sorted(name for name in {*ours, *theirs} - {*but} if ours.get(name) != theirs.get(name))
    return "; ".join(f"{name} {ours.get(name)}, which is {theirs.get(name)}" for name in names)


def output_of(folder: Path, settings: dict[str, Any], held: Callable[[], None] = lambda: None) -> Output:
    kept, keep = tensor_names(settings["kept"]), bool(settings["keep"])
    return Output(folder, settings["format"], kept, run_digest(settings), held, keep)


def check_complete(shares: dict[Share, Path], there: Sequence[Output], settings: dict[str, Any]) -> None:
    """Raises ValueError for shares whose shards are not all there, or that do not hold the inputs of the whole."""
    size, inputs = settings["shard_size"], settings["inputs"]
    names, lacking = hashlib.sha256(), dict[int, int]()
    for number in range(-(-inputs // size)):
        rows = read_part(there[number % len(there)], number)
        if rows is None:
            lacking[number % len(there)] = lacking.get(number % len(there), 0) + 1
        for row in rows or ():
            names.update(os.fsencode(row.input) + b"\0")
    if lacking:
        of = [f"{share} ({lacking[share.place]} shards)" for share in sorted(shares) if share.place in lacking]
        raise ValueError(f"shares are not finished: {listed(of)}. Run them again with --resume")
    if names.hexdigest()[:32] != settings["names"]:
        raise ValueError("the shares' inputs are not those that their run.json tells of: encode them again")


def bring_shard(source: Output, target: Output, number: int) -> None:
    """Files first, then the part that vouches for them, unless that is there; before all an index of another goes."""
    part = source.part(number).read_bytes()
    if target.part(number).exists():
        if target.part(number).read_bytes() == part and read_part(target, number) is not None:
            return
        for stale in ("index.csv", "index.parquet", "errors.csv"):
            (target.folder / stale).unlink(missing_ok=True)
        target.part(number).unlink()
    for ours, theirs in zip(target.files(number), source.files(number)):
        bring(theirs, ours, target.held)
    with replacing(target.part(number), target.held) as path:
        path.write_bytes(part)


def bring(source: Path, target: Path, held: Callable[[], None]) -> None:
    """Another name for the same file, or a copy."""
    with replacing(target, held) as path:
        path.unlink()
        try:
            os.link(source, path)
        except OSError:
            shutil.copyfile(source, path)
