"""What is carried beside the features (`--keep id caption`): columns of tables, members and JSON fields of tar samples.

Types are found before anything is encoded, and are the same in every shard and in index.parquet. Values are read once
more, when a shard is written: only these columns, only of the images that were read (`run.kept_rows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from siglip2_packed.collection.parquet import cast, common_type, import_pyarrow, plain
from siglip2_packed.collection.tar import Tar

OURS = ("input", "shard", "row", "grid", "grid_thw", "pooled", "patches", "offsets")
"""Names that encode's own columns have."""


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for names that cannot be kept, ImportError without pyarrow."""
    for name in names:
        if name.lower() in OURS:  # DuckDB's names have no case
            raise ValueError(f"--keep {name!r}: encode has a column of that name itself ({', '.join(OURS)}): rename it")
    twice = [name for i, name in enumerate(names) if name.lower() in [other.lower() for other in names[:i]]]
    if twice:
        raise ValueError(f"--keep names {twice[0]!r} twice (as DuckDB reads it, which does not tell cases apart)")
    if names:
        import_pyarrow()


def kept_schema(parts: Sequence[Any], names: Sequence[str]) -> Any:
    """pyarrow's schema of these columns of all parts of the inputs.

    Raises:
        ValueError: inputs that have none of that name, types that no other holds both of, or one no Parquet file holds.
    """
    pa = import_pyarrow()
    found: dict[str, tuple[Any, Any]] = {}
    for part in parts:
        for name, kind in part.types(names).items():
            before, first = found.get(name, (pa.null(), part))
            try:
                found[name] = common_type(before, plain(kind)), first if pa.types.is_null(kind) else part
            except pa.ArrowException:
                if not (is_written(first, name) and is_written(part, name)):
                    there = f"{before} in {first.path}, {kind} in {part.path}"
                    raise ValueError(f"--keep {name!r}: {there}: no type holds both") from None
                found[name] = pa.string(), part
    absent = [name for name in names if name not in found]
    if absent:
        raise ValueError(f"--keep {absent[0]!r}: {none_has(parts)}")
    schema = pa.schema([(name, found[name][0]) for name in names])
    for part in parts:
        for name, kind in part.types(names).items():
            try:  # of no row it would not be
                cast(pa.table({name: pa.nulls(1, kind)}), pa.schema([schema.field(name)]))
            except pa.ArrowException as error:
                there = f"{kind} in {part.path} cannot be brought to {schema.field(name).type}"
                raise ValueError(f"--keep {name!r}: {there}, which holds those of all inputs: {error}") from error
    try:
        written = pa.BufferOutputStream()
        pa.parquet.write_table(schema.empty_table(), written)
    except pa.ArrowException as error:
        raise ValueError(f"--keep: a type that Parquet does not hold: {error}") from error
    return pa.parquet.read_schema(pa.BufferReader(written.getvalue()))  # elements are called as Parquet calls them


def is_written(part: Any, name: str) -> bool:
    """Whether its values are text, or integers that can be written as they were: members of a tar file."""
    return isinstance(part, Tar) and name not in part.samples.fields


def none_has(parts: Sequence[Any]) -> str:
    others = " or the others" * (len(parts) > 1)
    return (
        f"no sample of {parts[0].path}{others} has it, as a member beside an image (txt, cls) or a field of its .json"
    )
