"""`encode --keep`: columns of tables and members of tar samples beside the features, of their types and their rows."""

import datetime
import decimal
import io
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from encode_runs import image_bytes, run, table
from test_encode_ranks import ranks
from test_index_is_true import restore, states

from siglip2_packed import load_features
from siglip2_packed.collection import FORMATS, shards
from siglip2_packed.collection import run as collection_run
from siglip2_packed.collection.shards import replacing
from siglip2_packed.collection.sources import find_inputs

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

FLAGS = ["--pooled", "--no-patches", "--shard-size", "3"]
UTC = datetime.timezone.utc
COLUMNS = {
    "id": pa.array([7, 6, 5, 4, 3, 2, 1], pa.uint64()),
    "caption": ["a", None, "ü", "", 'x"y', "l\nb", "007"],
    "day": [datetime.date(2020, 2, day) for day in range(23, 30)],
    "at": pa.array([datetime.datetime(2020, 1, 1, i, tzinfo=UTC) for i in range(7)], pa.timestamp("ns", "UTC")),
    "tags": [["a"], [], None, ["b", None], ["d"], ["e"], ["f"]],
    "about": [{"k": i, "of": [str(i)]} if i else None for i in range(7)],
    "price": pa.array([decimal.Decimal(i) / 4 for i in range(7)], pa.decimal128(8, 3)),
    "kind": pa.array(list("abcabca")).dictionary_encode(),
    "ok": [True, None, False, True, None, True, False],
    "a.b": pa.array(range(7), pa.float16()),
    "view": pa.array(list("tuvwxyz"), pa.string_view()),
    "void": pa.nulls(7),
}
BROKEN = 4
KEPT = [f"--keep={name}" for name in COLUMNS]


@pytest.fixture(scope="module")
def images():
    found = [image_bytes(i, (20 + i, 30)) for i in range(7)]
    found[BROKEN] = b"none"
    return found


@pytest.fixture(scope="module")
def parquet(tmp_path_factory, images):
    path = tmp_path_factory.mktemp("table") / "a.parquet"
    pq.write_table(pa.table({"image": images, **COLUMNS}), path, row_group_size=2)
    return path


def expected():
    """All columns, less the row whose image is none, with plain types."""
    kinds = {"kind": pa.string(), "view": pa.string()}
    columns = pa.table(COLUMNS)
    for name, kind in kinds.items():
        place = columns.column_names.index(name)
        columns = columns.set_column(place, name, columns[name].cast(kind))
    return columns.take([i for i in range(7) if i != BROKEN])


def keep(*names):
    return ["--keep", *names]


def write_tar(path, samples):
    """Of `[{suffix: bytes}, ...]`, or of names as they are."""
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for suffix, data in sample.items():
                member = tarfile.TarInfo(suffix if "/" in suffix else f"d.x/{number:03d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("fmt", FORMATS)
def test_columns_of_a_table(checkpoint, parquet, tmp_path, fmt):
    """In every format of a shard, with ranges that begin within row groups: types, nulls and rows."""
    assert run(checkpoint, parquet, tmp_path, *FLAGS, *keep(*COLUMNS), "--format", fmt) == 0
    features, truth = load_features(tmp_path), expected()
    assert features.pooled.shape == (6, 64) and features.pooled.isfinite().all()
    assert features.columns.schema.equals(truth.schema)
    assert features.columns.equals(truth)
    index = pq.read_table(tmp_path / "index.parquet")
    assert index.column_names == ["input", "shard", "row", "grid", *COLUMNS]
    assert index.select([0, 1, 2, 3]).to_pylist() == [
        {**row, "row": int(row["row"])} for row in table(tmp_path / "index.csv")
    ]
    assert table(tmp_path / "errors.csv")[0]["input"] == f"{parquet}#{BROKEN}"
    beside = "columns.parquet" if fmt in ("safetensors", "npy") else fmt
    rows = []
    for number in range(3):
        path = tmp_path / f"shard-{number:05d}.{beside}"
        shard = pq.read_table(path) if path.suffix == ".parquet" else pa.ipc.open_file(path).read_all()
        assert shard.column_names[0] == "input"
        rows.append(shard.select([*COLUMNS]))
    assert pa.concat_tables(rows).equals(truth)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_folder_whose_name_looks_like_a_url(checkpoint, parquet, tmp_path, monkeypatch, fmt):
    monkeypatch.chdir(tmp_path)
    assert run(checkpoint, parquet, "a:b", *FLAGS, *keep(*COLUMNS), "--format", fmt) == 0
    features = load_features("a:b")
    assert features.columns.equals(expected())
    assert features.pooled.shape == (6, 64) and features.pooled.isfinite().all()


@pytest.mark.parametrize("name", ["s.arrow", "l.parquet"])
def test_arrow_and_lists_of_images(checkpoint, images, tmp_path, name):
    """Of a list each image has its row's values; an empty list has none."""
    good = [image for image in images if image != b"none"]
    path, rows = tmp_path / name, [good[:2], [], good[2:5], [good[5]]]
    made = pa.table({"images": rows, "id": ["p", "q", None, "s"]})
    if name == "s.arrow":
        with pa.ipc.new_stream(str(path), made.schema) as writer:
            for batch in made.to_batches(max_chunksize=1):
                writer.write_batch(batch)
    else:
        pq.write_table(made, path, row_group_size=2)
    out = tmp_path / "out"
    assert run(checkpoint, path, out, "--pooled", "--no-patches", "--shard-size", "4", *keep("id")) == 0
    assert load_features(out).columns["id"].to_pylist() == ["p", "p", None, None, None, "s"]


def samples(images):
    """Members before and after the image, two images in one, missing and damaged ones, a JSON list."""
    return [
        {"txt": b"zero", "jpg": images[0], "json": b'{"id": 1, "score": 1, "sub": {"a": []}}', "cls": b"3\n"},
        {"json": b'{"id": 2, "score": 0.5}', "cls": b"-4", "png": images[1], "mask.png": images[2]},
        {"jpg": images[3], "txt": b"\xff\xfe", "json": b"[1]", "cls": b"5"},
        {
            "jpg": images[5],
            "txt": "dreí".encode(),
            "json": b'{"id": 9, "sub": {"a": ["x"], "b": null}}',
            "npy": b"\0\1",
        },
    ]


@pytest.mark.parametrize("fmt", ["safetensors", "parquet"])
def test_members_and_fields_of_samples(checkpoint, images, tmp_path, capfd, fmt):
    path = write_tar(tmp_path / "a.tar", samples(images))
    out, names = tmp_path / "out", ["txt", "cls", "id", "score", "sub", "npy", "json"]
    assert run(checkpoint, path, out, *FLAGS, *keep(*names), "--format", fmt) == 0
    kept = load_features(out).columns
    kinds = [pa.string(), pa.int64(), pa.int64(), pa.float64(), None, pa.binary(), pa.string()]
    for field, name, kind in zip(kept.schema, names, kinds):
        assert field.name == name and (kind is None or field.type == kind)
    found = kept.to_pydict()
    assert found.pop("json")[2] == '{"id": 2, "score": 0.5}'
    assert found == {
        "txt": ["zero", None, None, None, "dreí"],
        "cls": [3, -4, -4, 5, None],
        "id": [1, 2, 2, None, 9],
        "score": [1.0, 0.5, 0.5, None, None],
        "sub": [{"a": [], "b": None}, None, None, None, {"a": ["x"], "b": None}],
        "npy": [None, None, None, None, b"\0\1"],
    }
    said = capfd.readouterr().err
    assert "cls of 1, id of 1, npy of 4, score of 2, sub of 3, txt of 2 of 5 images" in said
    assert ".txt at byte" in said and "is not UTF-8: null" in said
    assert not table(out / "skipped.csv")


def test_what_is_not_kept_of_a_tar_is_passed_over(checkpoint, images, tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(images))
    assert run(checkpoint, path, tmp_path / "out", *FLAGS, *keep("txt")) == 0
    skipped = {row["suffix"]: int(row["count"]) for row in table(tmp_path / "out" / "skipped.csv")}
    assert skipped == {".cls": 3, ".json": 4, ".npy": 1}


def test_each_image_has_what_is_of_its_sample(checkpoint, images, tmp_path):
    """Also one that is stored with holes, and among the companions that macOS puts before each member."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(3):
            names = {"png": images[number], "txt": str(number).encode()}
            for suffix, data in names.items() if number else reversed(names.items()):
                last = f"{number}.{suffix}"
                for name, stored in ((f"d/._{last}", b"x"), ("d/README", b"x"), (f"d/{last}", data)):
                    member = tarfile.TarInfo(name)
                    member.size = len(stored)
                    if name == "d/1.png":
                        member.pax_headers = {"GNU.sparse.map": f"0,{len(data)}", "GNU.sparse.size": str(len(data))}
                    tar.addfile(member, io.BytesIO(stored))
    assert run(checkpoint, tmp_path / "a.tar", tmp_path / "out", *FLAGS, *keep("txt")) == 0
    features = load_features(tmp_path / "out")
    assert [name[-5:] for name in features.names] == ["0.png", "1.png", "2.png"]
    assert features.columns["txt"].to_pylist() == ["0", "1", "2"]


@pytest.mark.parametrize("words", [("cat", "7"), ("007", "8"), ("1_0", "1"), (str(2**63), "-1"), ("", "3")])
def test_what_is_no_integer_stays_text(images, tmp_path, words):
    """And a name that comes twice in a tar: each image has what lies beside it."""
    again = [{"d/1.jpg": images[0], "d/1.cls": word.encode()} for word in words]
    [tar] = find_inputs([write_tar(tmp_path / "a.tar", again)], keep=["cls"]).parts
    assert tar.columns(np.arange(2), ["cls"])["cls"].to_pylist() == [*words]


REFUSED = {
    ("absent",): "--keep 'absent': .*a.parquet has no columns of that name; it has image, id",
    ("Grid",): "encode has a column of that name itself",
    ("id", "ID"): "--keep names 'ID' twice",
    ("empty",): "a type that Parquet does not hold",
}


@pytest.mark.parametrize("names", REFUSED, ids=str)
def test_refused_before_anything_is_loaded(images, tmp_path, capsys, names):
    pq_table = pa.table({"image": images, "id": range(7)})
    path = tmp_path / "a.parquet"
    pq.write_table(pq_table, path)
    if names == ("empty",):
        path = tmp_path / "a.arrow"
        with pa.ipc.new_file(str(path), pa.schema([("image", pa.binary()), ("empty", pa.struct([]))])) as writer:
            writer.write_table(pa.table({"image": images, "empty": pa.array([{}] * 7, pa.struct([]))}))
    assert run(lambda: "no such checkpoint", path, tmp_path / "out", *FLAGS, *keep(*names)) == 2
    assert re.search(REFUSED[names], capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_sources_that_do_not_fit_together(images, photos, tmp_path):
    pq.write_table(pa.table({"image": images, "id": range(7)}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": images, "id": list("abcdefg")}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"image": images, "id": pa.nulls(7)}), tmp_path / "c.parquet")
    mixed = write_tar(
        tmp_path / "m.tar", [{"png": images[0], "json": b'{"x": 1}'}, {"png": images[1], "json": b'{"x": "a"}'}]
    )
    with pytest.raises(ValueError, match=r"'id': int64 in .*a\.parquet, string in .*b\.parquet"):
        find_inputs([tmp_path / "a.parquet", tmp_path / "b.parquet"], keep=["id"])
    for name, kind in (("price", pa.decimal128(20, 2)), ("weight", pa.float64())):
        pq.write_table(pa.table({"image": images[:1], "price": pa.array([1], kind)}), tmp_path / f"{name}.parquet")
    for files in (["price", "weight"], ["weight", "price"]):  # a float would not hold all digits
        with pytest.raises(ValueError, match=r"'price': .*decimal128.*: no type holds both"):
            find_inputs([tmp_path / f"{name}.parquet" for name in files], keep=["price"])
    digits = pa.table({"image": images[:1], "id": [decimal.Decimal("1.5")]})
    pq.write_table(digits, tmp_path / "digits.parquet")
    with pytest.raises(ValueError, match=r"'id': int64 in .*a\.parquet cannot be brought to decimal128\(19, 1\)"):
        find_inputs([tmp_path / "a.parquet", tmp_path / "digits.parquet"], keep=["id"])
    with pytest.raises(ValueError, match=r"'x': no type holds its values in the \.json of .*m\.tar"):
        find_inputs([mixed], keep=["x"])
    half = write_tar(tmp_path / "h.tar", [{"png": images[0], "json": b'{"x": "\\ud800"}'}])
    with pytest.raises(ValueError, match=r"'x': no type holds its values in the \.json of .*h\.tar.*surrogates"):
        find_inputs([half], keep=["x"])
    with pytest.raises(ValueError, match=r"no sample of .*m\.tar has it"):
        find_inputs([mixed], keep=["y"])
    with pytest.raises(ValueError, match=r"00\.png stands for itself"):
        find_inputs([tmp_path / "a.parquet", photos / "00.png"], keep=["id"])


ONE, TWO = {"png": image_bytes(0, (20, 20))}, {"png": image_bytes(1, (20, 20))}


def test_the_wider_type_is_that_of_both(checkpoint, images, tmp_path):
    """Between tables and tar files, and in every order; classes that are words in one of them are text in all."""
    pq.write_table(pa.table({"image": images[:2], "id": pa.nulls(2)}), tmp_path / "void.parquet")
    pq.write_table(pa.table({"image": images[:2], "id": pa.array([-1, 2], pa.int16())}), tmp_path / "small.parquet")
    write_tar(tmp_path / "big.tar", [{**ONE, "json": b'{"id": 4294967296}'}, {**TWO, "json": b'{"id": null}'}])
    write_tar(tmp_path / "half.tar", [{**ONE, "json": b'{"id": 0.5}'}])
    write_tar(tmp_path / "number.tar", [{**ONE, "cls": b"-7\n"}])
    write_tar(tmp_path / "word.tar", [{**ONE, "cls": b"007"}])

    def kept(name, *files):
        out = tmp_path / f"of {files}"
        assert run(checkpoint, [tmp_path / file for file in files], out, *FLAGS, *keep(name)) == 0
        return load_features(out).columns[name]

    found = kept("id", "void.parquet", "small.parquet", "big.tar")
    assert found.type == pa.int64() and found.to_pylist() == [None, None, -1, 2, 2**32, None]
    found = kept("id", "half.tar", "small.parquet")
    assert found.type == pa.float64() and found.to_pylist() == [0.5, -1, 2]
    assert kept("cls", "number.tar", "word.tar").to_pylist() == ["-7", "007"]
    assert kept("cls", "word.tar", "number.tar").to_pylist() == ["007", "-7"]


def test_resume(checkpoint, parquet, images, tmp_path, capsys):
    """Goes on with the same columns, in shards that were lost and of inputs that came; with others it refuses."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    argv = ["--pooled", "--no-patches", "--shard-size", "5", *keep("id", "caption")]
    kinds = {"id": pa.array(range(7), pa.uint64()), "caption": list("abcdefg")}
    second, third = tmp_path / "b.parquet", tmp_path / "c.parquet"
    for path in (second, third):
        pq.write_table(pa.table({"image": images, **kinds}), path)
    assert run(checkpoint, [parquet, third], out, *argv) == 0
    assert run(checkpoint, parquet, out, *FLAGS, "--resume") == 2
    assert run(checkpoint, parquet, out, *FLAGS, *keep("id"), "--resume") == 2
    assert "keep [['id', 'uint64'], ['caption', 'string']], this one [['id', 'uint64']]" in capsys.readouterr().err
    (out / "shard-00002.columns.parquet").write_bytes(b"torn")
    sources = [parquet, second, third]  # a shard's rows now lie on both sides of another's
    assert run(checkpoint, sources, out, *argv, "--resume") == 0
    assert run(checkpoint, sources, whole, *argv) == 0
    assert load_features(out).columns.equals(load_features(whole).columns)
    assert load_features(out).names == load_features(whole).names


@pytest.mark.parametrize("damage", ["changed", "unreadable"])
def test_values_that_cannot_be_had_cost_their_images(checkpoint, parquet, tmp_path, monkeypatch, damage):
    """Never another row's, or another state's, beside a feature."""
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet.read_bytes())
    before = collection_run.cast
    calls = []

    def spoil(columns, schema):
        calls.append(1)
        if len(calls) == 2:
            if damage == "unreadable":
                raise OSError("damaged")
            os.utime(path, ns=(1, 1))
        return before(columns, schema)

    monkeypatch.setattr(collection_run, "cast", spoil)
    assert run(checkpoint, path, tmp_path / "out", *FLAGS, *keep("id")) == 0
    errors = [row["reason"] for row in table(tmp_path / "out" / "errors.csv")]
    good = [7, 6, 5] + ([1] if damage == "unreadable" else [])
    assert load_features(tmp_path / "out").columns["id"].to_pylist() == good
    assert sum("--keep: " in reason and ("damaged" in reason or "has changed" in reason) for reason in errors) >= 2


def test_an_index_of_another_state_is_an_error(checkpoint, parquet, tmp_path):
    assert run(checkpoint, parquet, tmp_path, *FLAGS, *keep("id")) == 0
    found = pq.read_table(tmp_path / "index.parquet")
    with replacing(tmp_path / "index.parquet") as path:
        pq.write_table(found.take(np.arange(len(found))[::-1].copy()), path)
    with pytest.raises(ValueError, match="not as index.csv says"):
        load_features(tmp_path).columns  # noqa: B018


def test_without_keep_there_are_no_columns(finished):
    with pytest.raises(ValueError, match="without --keep"):
        load_features(finished).columns  # noqa: B018
    assert not (finished / "index.parquet").exists()
    assert json.loads((finished / "run.json").read_text())["keep"] == []


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_shard_without_an_image(checkpoint, tmp_path, fmt):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [b"no", b"no", image_bytes(0, (20, 20))], "tags": [["a"], ["b"], ["c"]]}), path)
    argv = ["--pooled", "--no-patches", "--shard-size", "2", "--format", fmt]
    assert run(checkpoint, path, tmp_path / "out", *argv, *keep("tags")) == 0
    features = load_features(tmp_path / "out")
    assert features.columns["tags"].to_pylist() == [["c"]] and features.pooled.isfinite().all()


def test_a_kill_at_any_step(checkpoint, parquet, tmp_path, monkeypatch):
    """What is there then is no collection, or a true one; a resumed run makes of it what one run makes."""
    monkeypatch.setattr(shards, "_sync", lambda path: None)
    argv, out = [*FLAGS, "--format", "npy", *keep("id", "caption")], tmp_path / "out"
    out.mkdir()
    found = states(out, lambda: run(checkpoint, parquet, out, *argv))
    truth = expected().select(["id", "caption"])
    assert len(found) > 30
    for state in [*found[5:-8:9], *found[-8:]]:
        restore(out, state)
        if (out / "index.csv").exists():
            assert load_features(out).columns.equals(truth)
        assert run(checkpoint, parquet, out, *argv, "--resume") == 0
        assert load_features(out).columns.equals(truth)
        assert not list(out.rglob("*.tmp"))
    (out / "shard-00001.columns.parquet").unlink()  # the old table goes before it is made again
    (out / "index.parquet").write_bytes(b"of before")
    for state in states(out, lambda: run(checkpoint, parquet, out, *argv, "--resume"))[-25:]:
        table = state.get(Path("index.parquet"), b"")
        assert table != b"of before" or Path("shard-00001.columns.parquet") not in state


def test_ranks(checkpoint, parquet, tmp_path):
    """Two processes under torchrun carry what one does."""
    argv = ["encode", str(parquet), "--ckpt", str(checkpoint()), "--device", "cpu", *FLAGS, *keep(*COLUMNS)]
    processes = ranks([*argv, "--out", str(tmp_path / "out")], 2, tmp_path)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert load_features(tmp_path / "out").columns.equals(expected())
