"""`siglip2-packed encode --out DIR`: every row is the model's of that image alone, in any format, dtype, collection."""

import tarfile
from pathlib import Path

import pytest
from encode_runs import BAD, GOOD, check, load, run, table

from siglip2_packed import capture
from siglip2_packed.collection import DECODE_IN, FORMATS


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("kept", [("patches", "pooled"), ("patches",), ("pooled",)])
def test_every_row_is_the_models(checkpoint, photos, expected, tmp_path, capsys, fmt, kept):
    if fmt in ("parquet", "arrow"):
        pytest.importorskip("pyarrow")
    flags = ["--pooled"] * ("pooled" in kept) + ["--no-patches"] * ("patches" not in kept)
    out = tmp_path / "made" / "features"
    assert run(checkpoint, photos, out, "--format", fmt, "--shard-size", "6", "--patch-budget", "40", *flags) == 0
    check(out, expected, GOOD, fmt, kept)
    shown = capsys.readouterr()
    assert all(f"{photos / name}" in shown.err for name in BAD)
    assert "4 of 15 images could not be read" in shown.err
    patches = sum(len(tokens) for tokens, _, _ in expected.values())
    assert f"11 images, {patches} patches (float32 on cpu)" in shown.out
    assert "images/s" in shown.out


@pytest.mark.parametrize("fmt", ["safetensors", "npy"])
@pytest.mark.parametrize(("dtype", "save"), [("bfloat16", None), ("float32", "float16"), ("bfloat16", "float16")])
def test_dtypes(checkpoint, photos, expected, tmp_path, fmt, dtype, save):
    flags = ["--pooled", "--format", fmt, "--dtype", dtype, *(["--save-dtype", save] if save else [])]
    assert run(checkpoint, photos, tmp_path / "out", *flags) == 0
    check(tmp_path / "out", expected, GOOD, fmt, tolerance=2e-3 if dtype == "float32" else 0.2)
    [shard] = {row["shard"] for row in table(tmp_path / "out" / "index.csv")}
    wanted = save or ("float32" if fmt == "npy" else "bfloat16")
    tensors = load(tmp_path / "out", fmt, shard)
    assert str(tensors["patches"].dtype) == str(tensors["pooled"].dtype) == f"torch.{wanted}"


def test_half_precision_parquet(checkpoint, photos, expected, tmp_path):
    pytest.importorskip("pyarrow")
    flags = ["--pooled", "--format", "parquet", "--save-dtype", "float16"]
    assert run(checkpoint, photos, tmp_path / "out", *flags) == 0
    check(tmp_path / "out", expected, GOOD, "parquet", tolerance=2e-3)


@pytest.mark.parametrize("decode_in", DECODE_IN)
def test_collections_of_every_kind(checkpoint, photos, expected, tmp_path, decode_in):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = sorted([*GOOD, *BAD])
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for name in names:
            tar.add(photos / name, name)
    files = [(photos / name).read_bytes() for name in names]
    pq.write_table(pa.table({"image": [*files, None], "name": [*names, "null"]}), tmp_path / "c.parquet")
    (tmp_path / "a.txt").write_text("".join(f"{photos / name}\n" for name in names))
    inputs = [tmp_path / name for name in ("a.txt", "b.tar", "c.parquet")]
    out = tmp_path / "out"
    flags = ["--pooled", "--shard-size", "7", "--patch-budget", "50", "--decode-in", decode_in]
    assert run(checkpoint, inputs, out, *flags) == 0
    rows = [f"{tmp_path / 'c.parquet'}#{i}" for i in range(16)]
    features = expected | {Path(row).name: expected[name] for row, name in zip(rows, names) if name in GOOD}
    members = {name: f"b.tar#{name}" for name in names}
    features |= {members[name]: expected[name] for name in GOOD}
    good = [*GOOD, *(members[n] for n in GOOD), *(Path(row).name for row, n in zip(rows, names) if n in GOOD)]
    bad = [*BAD, *(members[n] for n in BAD), *(Path(row).name for row, n in zip(rows, names) if n in BAD)]
    check(out, features, good, bad=[*bad, "c.parquet#15"])
    assert table(out / "errors.csv")[-1]["reason"] == "null: the row has no image"


def test_the_output_is_not_an_input(checkpoint, photos, expected, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "00.png").write_bytes((photos / "00.png").read_bytes())
    out = tmp_path / "in" / "out"
    out.mkdir()
    (out / "preview.png").write_bytes((photos / "01.png").read_bytes())
    for _ in range(2):
        assert run(checkpoint, tmp_path / "in", out, "--resume") == 0
        check(out, expected, ["00.png"], kept=["patches"], bad=[])


def test_shards_can_be_read_by_whom_other_files_can(finished):
    modes = {path.stat().st_mode for path in finished.rglob("*") if path.is_file()}
    assert modes == {(finished / "run.json").stat().st_mode}
    assert len(list(finished.glob("shard-*"))) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [40, 16384])
def test_cuda(checkpoint, photos, expected, tmp_path, budget):
    """Page-locked copies beside the next forward bring back the features of the right pack."""
    flags = ["--device", "cuda", "--dtype", "float32", "--pooled", "--patch-budget", str(budget), "--shard-size", "6"]
    assert run(checkpoint, [photos] * 5, tmp_path / "out", *flags) == 0
    check(tmp_path / "out", expected, GOOD * 5, tolerance=1e-4, bad=BAD * 5)


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [40, 300])
def test_half_precision_is_replayed_from_cuda_graphs(checkpoint, photos, expected, tmp_path, monkeypatch, budget):
    """Of packs whose features are fetched while the next is replayed, each row of the right image; the last, a small
    one, is not worth a graph."""
    replays, replay = [], capture.InferenceGraph.__call__

    def counted(self, *pack):
        replays.append(len(self.inputs.pixel_values))
        return replay(self, *pack)

    monkeypatch.setattr(capture.InferenceGraph, "__call__", counted)
    flags = ["--device", "cuda", "--dtype", "float16", "--pooled", "--patch-budget", str(budget), "--shard-size", "6"]
    assert run(checkpoint, [photos] * 5, tmp_path / "out", *flags) == 0
    check(tmp_path / "out", expected, GOOD * 5, tolerance=2e-2, bad=BAD * 5)
    assert len(replays) > 1 and {*replays} == {budget}
