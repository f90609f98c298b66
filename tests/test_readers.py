"""What pandas, polars, DuckDB, Hugging Face datasets and NumPy read of shards: every dtype, every type that is kept.

Shards are written from numbers made here; each reader has to bring back these, not what another one says.
"""

import datetime
import decimal

import numpy as np
import pytest
import torch
from documents import example

from siglip2_packed.collection import FORMATS
from siglip2_packed.collection.features import EncodedImage
from siglip2_packed.collection.shards import Output, tensor_names, write_shard

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

D = 5
GRIDS = [(1, 3), (2, 2), (4, 1)]
UTC = datetime.timezone.utc
KEPT = {
    "id": pa.array([2**63 + 1, None, 0], pa.uint64()),
    "caption": ["ü\n", "", None],
    "day": [datetime.date(1969, 12, 31), None, datetime.date(2024, 2, 29)],
    "at": pa.array([datetime.datetime(2024, 1, 1, i, tzinfo=UTC) for i in range(3)], pa.timestamp("us", "UTC")),
    "tags": [["a", None], [], None],
    "about": [{"n": 1, "of": [1.5]}, {"n": None, "of": []}, None],
    "price": pa.array([decimal.Decimal("0.125"), None, decimal.Decimal("-7")], pa.decimal128(8, 3)),
    "ok": [True, None, False],
    "raw": [b"\0\xff", b"", None],
}
ROWS = pa.table(KEPT).to_pylist()
SAVED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def features(dtype):
    """pooled `[N, D]`, patches of each image, in a dtype that was computed in."""
    numbers = torch.Generator().manual_seed(3)
    return [
        (torch.randn(D, generator=numbers).to(dtype), torch.randn(h * w, D, generator=numbers).to(dtype))
        for h, w in GRIDS
    ]


@pytest.fixture(params=SAVED)
def made(request, tmp_path):
    """`made(fmt)` -> (file or stem of a shard, pooled `[N, D]` and patches as float32 NumPy arrays)."""
    dtype = SAVED[request.param]

    def make(fmt):
        saved = torch.float32 if dtype == torch.bfloat16 and fmt != "safetensors" else dtype
        empty = {name: torch.zeros(0, D, dtype=saved) for name in ("patches", "pooled")}
        output = Output(tmp_path, fmt, tensor_names(empty), "", keep=True)
        found = features(dtype)
        images = [
            EncodedImage(i, f"{i}.png", grid, patches, pooled)
            for i, (grid, (pooled, patches)) in enumerate(zip(GRIDS, found))
        ]
        write_shard(output, 0, images, empty, pa.table(KEPT))
        pooled, patches = zip(*found)
        truth = torch.stack(pooled).float().numpy(), [x.float().numpy() for x in patches]
        return tmp_path / output.shard(0), *truth

    make.half = dtype == torch.float16
    return make


def same(found, truth):
    """To the bit, whatever holds the numbers."""
    found = np.array([np.asarray(row, np.float32) for row in found])
    assert found.shape == truth.shape and (found == truth).all()


def same_rows(rows):
    for row, truth in zip(rows, ROWS, strict=True):
        assert {name: row[name] for name in truth} == truth


def test_pandas(made):
    pd = pytest.importorskip("pandas")
    path, pooled, patches = made("parquet")
    frame = pd.read_parquet(path)
    same(frame["pooled"], pooled)
    assert frame["pooled"][0].dtype == ("float16" if made.half else "float32")
    for found, truth in zip(frame["patches"], patches, strict=True):
        same(found, truth)
    assert np.stack(frame["grid_thw"]).tolist() == [[1, *grid] for grid in GRIDS]
    typed = pd.read_parquet(path, dtype_backend="pyarrow")  # without it pandas makes floats of integers beside a null
    assert typed["id"].dtype == "uint64[pyarrow]" and typed["id"].tolist()[0] == 2**63 + 1
    same_rows(pa.Table.from_pandas(typed).to_pylist())


@pytest.mark.parametrize("fmt", ["parquet", "arrow"])
def test_polars(made, fmt):
    pl = pytest.importorskip("polars")
    path, pooled, patches = made(fmt)
    frame = (pl.read_parquet if fmt == "parquet" else pl.read_ipc)(path)
    found = frame["pooled"].to_numpy()
    assert found.dtype == ("float16" if made.half else "float32")
    same(found, pooled)
    for found, truth in zip(frame["patches"].to_list(), patches, strict=True):
        same(found, truth)
    assert frame["grid_thw"].to_list() == [[1, *grid] for grid in GRIDS]
    assert frame.schema["id"] == pl.UInt64 and frame.schema["price"] == pl.Decimal(8, 3)
    same_rows(frame.to_dicts())


def test_duckdb(made):
    duckdb = pytest.importorskip("duckdb")
    path, pooled, patches = made("parquet")
    with duckdb.connect() as base:
        base.execute("SET TimeZone = 'UTC'")
        asked = base.execute("SELECT * FROM read_parquet(?) WHERE grid_thw[2] > 0", [str(path)])
        names = [name for name, *_ in asked.description]
        rows = [dict(zip(names, row)) for row in asked.fetchall()]
        kinds = dict(
            base.execute(
                "SELECT column_name, column_type FROM (DESCRIBE SELECT * FROM read_parquet(?))", [str(path)]
            ).fetchall()
        )
    same([row["pooled"] for row in rows], pooled)
    for row, truth in zip(rows, patches, strict=True):
        same(row["patches"], truth)
    assert kinds["pooled"] == "FLOAT[]" and kinds["patches"] == "FLOAT[][]" and kinds["grid_thw"] == "BIGINT[]"
    assert kinds["id"] == "UBIGINT" and kinds["price"] == "DECIMAL(8,3)" and kinds["day"] == "DATE"
    same_rows([{**row, "at": row["at"].astimezone(UTC)} for row in rows])


@pytest.mark.parametrize("fmt", ["parquet", "arrow"])
def test_datasets(made, fmt, tmp_path):
    datasets = pytest.importorskip("datasets")
    path, pooled, patches = made(fmt)
    found = datasets.load_dataset(fmt, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert found.features["pooled"].feature.dtype == ("float16" if made.half else "float32")
    assert found.features["pooled"].length == D and found.features["id"].dtype == "uint64"
    same(found.with_format("numpy")["pooled"][:], pooled)
    for row, truth in zip(found["patches"], patches, strict=True):
        same(row, truth)
    same_rows([*found])


@pytest.mark.parametrize("fmt", FORMATS)
def test_numpy(made, fmt):
    """Of npy `np.load`, of safetensors the lines that the docs have; neither needs a package of ours."""
    path, pooled, patches = made(fmt)
    if fmt == "npy":
        assert np.load(f"{path}.pooled.npy").dtype == ("float16" if made.half else "float32")
        same(np.load(f"{path}.pooled.npy"), pooled)
        same(np.load(f"{path}.patches.npy"), np.concatenate(patches))
    elif fmt == "safetensors":
        scope = {}
        exec(example("safetensors in NumPy"), scope)
        same(scope["tensors"](path)["pooled"], pooled)
        same(scope["tensors"](path)["patches"], np.concatenate(patches))
        assert scope["tensors"](path)["offsets"].tolist() == [0, 3, 7, 11]
    if fmt in ("npy", "safetensors"):
        same_rows(pq.read_table(path.with_name("shard-00000.columns.parquet")).to_pylist())
