"""Columns of every kind that tables keep images in, and what Hugging Face datasets saves."""

import json
import os

import pytest
from test_sources import IMAGES, png, read

from siglip2_packed.collection.sources import find_inputs

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def save(table, path, rows=3):
    """As Parquet of small row groups, or as an Arrow stream or file of small batches."""
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows)
        return path
    new = pa.ipc.new_file if path.name.startswith("file") else pa.ipc.new_stream
    with new(str(path), table.schema) as writer:
        for batch in table.to_batches(max_chunksize=rows):
            writer.write_batch(batch)
    return path


FILES = ["a.parquet", "stream.arrow", "file.arrow"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.dictionary(pa.int32(), pa.binary()),
        pa.dictionary(pa.int8(), pa.large_binary()),
        pa.struct({"bytes": pa.large_binary(), "path": pa.large_string()}),
        pa.struct({"bytes": pa.binary_view(), "path": pa.string_view()}),
    ],
    ids=str,
)
def test_columns_of_bytes(file, kind, tmp_path):
    values = [IMAGES[0], IMAGES[1], None, IMAGES[1], IMAGES[2], IMAGES[0], IMAGES[3]]
    rows = values
    if pa.types.is_struct(kind):
        rows = [value and {"bytes": value, "path": "x.png"} for value in values]
    array = pa.array(rows, kind)
    table = pa.table({"id": pa.array([bytes(16)] * 7, pa.binary(16)), "jpg": array, "caption": ["image"] * 7})
    views = pa.types.is_struct(kind) and kind[0].type == pa.binary_view()  # pyarrow does not slice these for Parquet
    path = save(table, tmp_path / file, rows=9 if views else 3)
    found = read([path])
    assert [entry for _, entry in found] == [value or "null: the row has no image" for value in values]
    assert [name for name, _ in found] == [f"{path}#{row}" for row in range(7)]
    for start, stop in ((0, 1), (2, 6), (4, 5), (6, 7), (3, 3)):
        assert read([path], start, stop) == found[start:stop]


@pytest.mark.parametrize("file", FILES)
def test_bytes_of_one_length(file, tmp_path):
    size = max(map(len, IMAGES[:3]))
    values = [image.ljust(size, b"\0") for image in IMAGES[:3]]
    columns = {"digest": pa.array([bytes(32)] * 3, pa.binary(32)), "x": pa.array(values, pa.binary(size))}
    path = save(pa.table(columns), tmp_path / file)
    assert [entry for _, entry in read([path])] == values
    inside = pa.array([{"bytes": value} for value in values], pa.struct({"bytes": pa.binary(size)}))
    path = save(pa.table({"image": inside}), tmp_path / f"file{file}")
    assert [entry for _, entry in read([path])] == values


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_columns_of_paths(file, kind, tmp_path):
    (tmp_path / "b ä.png").write_bytes(png())
    values = ["b ä.png", f"file://{tmp_path}/b%20%C3%A4.png", None, "/elsewhere/c.jpg", "file://host/a.png", "s3://b/a"]
    path = save(pa.table({"text": ["t"] * 6, "image_path": pa.array(values, kind)}), tmp_path / file)
    entries = [entry for _, entry in read([path])]
    here = str(tmp_path / "b ä.png")
    assert entries[:4] == [here, here, "null: the row has no image", "/elsewhere/c.jpg"]
    assert "file of another machine, 'host'" in entries[4] and "is a URL: download it" in entries[5]


@pytest.mark.parametrize("file", FILES)
def test_a_path_that_is_no_utf_8_costs_its_row(file, tmp_path):
    paths = pa.array([b"a.png", b"\xff.png", b"c.png", b"d.png"])
    for column in (paths.view(pa.string()), pa.ListArray.from_arrays([0, 1, 2, 3, 4], paths.view(pa.string()))):
        found = [entry for _, entry in read([save(pa.table({"path": column}), tmp_path / file)])]
        assert found[:1] + found[2:] == [str(tmp_path / name) for name in ("a.png", "c.png", "d.png")]
        assert "'utf-8' codec can't decode byte 0xff" in found[1]


def test_run_ends_and_lists_of_lists(tmp_path):
    ends = pa.RunEndEncodedArray.from_arrays(pa.array([2, 3], pa.int32()), pa.array(IMAGES[:2], pa.binary()))
    path = save(pa.table({"image": ends}), tmp_path / "a.arrow")
    assert [entry for _, entry in read([path])] == [IMAGES[0], IMAGES[0], IMAGES[1]]
    nested = save(pa.table({"images": [[[IMAGES[0]]]]}), tmp_path / "b.arrow")
    with pytest.raises(ValueError, match=r"no image column: .*images .list<item: list"):
        find_inputs([nested])


def test_no_column_that_could_be_chosen(tmp_path):
    inner = {"image": {"bytes": IMAGES[0], "path": "a"}}
    for name, values in (("sample", [inner]), ("pixels", [[[1, 2], [3, 4]]]), ("image", pa.array([None], pa.null()))):
        path = save(pa.table({name: values}), tmp_path / f"{name}.parquet")
        with pytest.raises(ValueError, match="no image column: none holds bytes, paths or .* it has") as error:
            find_inputs([path])
        assert "--column" not in str(error.value)


@pytest.mark.parametrize("file", FILES)
def test_columns_of_one_name(tmp_path, file):
    twice = pa.table([pa.array(IMAGES[:2]), pa.array(IMAGES[2:4])], names=["image", "image"])
    path = save(twice, tmp_path / file)
    for column in (None, "image"):
        with pytest.raises(ValueError, match="2 columns that are called 'image'"):
            find_inputs([path], column)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", ["a:b", "file:c", os.fsdecode(b"\xff"), "two\nlines"], ids=ascii)
def test_folders_of_any_name(tmp_path, monkeypatch, file, name):
    """Also by a relative path, which pyarrow would take for a URL."""
    monkeypatch.chdir(tmp_path)
    os.mkdir(name)
    save(pa.table({"image": IMAGES[:4]}), tmp_path / file)
    os.rename(file, f"{name}/{file}")
    assert read([f"{name}/{file}"]) == [(f"{name}/{file}#{row}", IMAGES[row]) for row in range(4)]


def test_lists_beside_a_column_that_is_called_like_a_field(tmp_path):
    columns = {"image.path": ["x", "y"], "image": [IMAGES[:2], IMAGES[2:3]]}
    path = save(pa.table(columns), tmp_path / "a.parquet")
    assert [entry for _, entry in read([path])] == IMAGES[:3]


@pytest.mark.parametrize("file", FILES)
def test_a_column_of_nulls_that_is_asked_for(tmp_path, file):
    path = save(pa.table({"image": pa.array([None] * 4, pa.null()), "mask": IMAGES[:4]}), tmp_path / file)
    assert read([path], column="image") == [(f"{path}#{row}", "null: the row has no image") for row in range(4)]


LISTS = [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 2)]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("of", LISTS, ids=["list", "large_list", "fixed_size_list"])
@pytest.mark.parametrize("kind", [IMAGE, pa.binary()], ids=["struct", "binary"])
def test_lists_of_images(file, of, kind, tmp_path):
    def item(seed):
        return {"bytes": IMAGES[seed], "path": None} if kind == IMAGE else IMAGES[seed]

    lengths = [2, 2, 2, 2, 2] if of is LISTS[2] else [2, 0, 3, 0, 1]
    counter = iter(range(10))
    rows = [[item(next(counter)) for _ in range(length)] for length in lengths]
    rows[0][1] = None
    if of is not LISTS[2]:
        rows[3] = None
    path = save(pa.table({"images": pa.array(rows, of(kind)), "texts": [["a"]] * 5}), tmp_path / file, rows=2)
    found = read([path])
    assert [name for name, _ in found] == [f"{path}#{row}.{k}" for row, n in enumerate(lengths) for k in range(n)]
    assert found[1][1] == "null: the row has no image"
    total = sum(lengths)
    assert [entry for _, entry in found[:1] + found[2:]] == [IMAGES[0], *IMAGES[2:total]]
    for start, stop in ((1, 2), (2, 5), (0, 4), (5, 6), (total, total)):
        assert read([path], start, stop) == found[start:stop]
    empty = {(path.suffix, "rows without images"): 2} if 0 in lengths else {}
    assert dict(find_inputs([path]).skipped.counts) == empty


def test_lists_of_paths(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    path = save(pa.table({"image_files": [["a.png", "/x.png"], [], ["file:///y.png"]]}), tmp_path / "a.parquet")
    assert read([path]) == [
        (f"{path}#0.0", str(tmp_path / "a.png")),
        (f"{path}#0.1", "/x.png"),
        (f"{path}#2.0", "/y.png"),
    ]


def test_a_damaged_row_group_of_lists_costs_its_rows(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"images": [[IMAGES[i], IMAGES[i + 1]] for i in range(9)]})
    pq.write_table(table, path, row_group_size=3, use_dictionary=False)
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 64] = b"\xff" * 64
    path.write_bytes(data)
    found = read([path])
    assert [entry for _, entry in found[:6]] == [IMAGES[k] for i in range(3) for k in (i, i + 1)]
    assert [name.rpartition("#")[2] for name, _ in found[6:9]] == ["3.0", "4.0", "5.0"]
    assert all("row group 1 cannot be read" in entry for _, entry in found[6:9])
    assert [entry for _, entry in found[9:]] == [IMAGES[k] for i in range(6, 9) for k in (i, i + 1)]


@pytest.mark.parametrize("file", FILES)
def test_a_table_that_became_a_pipe_or_is_gone(file, tmp_path):
    path = save(pa.table({"image": IMAGES[:4]}), tmp_path / file)
    [table] = find_inputs([path]).parts
    path.unlink()
    assert all("cannot be read" in str(entry) for entry in table.read(0, 4))
    os.mkfifo(path)
    assert ["a pipe, not a regular file" in str(entry) for entry in table.read(0, 4)] == [True] * 4


def save_to_disk(folder, table, shards=2):
    """The files that Hugging Face datasets' `save_to_disk` writes."""
    folder.mkdir(parents=True)
    rows = -(-len(table) // shards)
    files = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    features = {"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    for i, name in enumerate(files):
        save(table.slice(i * rows, rows), folder / name)
    state = {"_data_files": [{"filename": name} for name in files], "_fingerprint": "1", "_format_columns": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return files


def hugging_face(values):
    rows = [{"bytes": value, "path": None} for value in values]
    return pa.table({"image": pa.array(rows, IMAGE), "label": list(range(len(values)))})


def test_a_saved_data_set(tmp_path):
    files = save_to_disk(tmp_path / "ds", hugging_face(IMAGES[:7]))
    save(hugging_face(IMAGES[50:52]), tmp_path / "ds" / "cache-0123.arrow")
    found = read([tmp_path / "ds"])
    assert [entry for _, entry in found] == IMAGES[:7]
    assert [os.path.basename(name) for name, _ in found][3:5] == [f"{files[0]}#3", f"{files[1]}#0"]
    counts = dict(find_inputs([tmp_path / "ds"]).skipped.counts)
    assert counts == {(".arrow", "not of the data set that lies there"): 1, (".json", "no image type"): 2}
    (tmp_path / "ds" / files[1]).unlink()
    assert "state.json names it, but it is not there" in [entry for _, entry in read([tmp_path / "ds"])]


def test_a_saved_data_set_with_splits(tmp_path):
    save_to_disk(tmp_path / "ds" / "train", hugging_face(IMAGES[:3]), 1)
    save_to_disk(tmp_path / "ds" / "test", hugging_face(IMAGES[3:5]), 1)
    (tmp_path / "ds" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    found = read([tmp_path / "ds"])
    assert [entry for _, entry in found] == [*IMAGES[3:5], *IMAGES[:3]]
    assert [entry for _, entry in read([tmp_path / "ds" / "train"])] == IMAGES[:3]


def test_a_selection_of_a_saved_data_set_is_not_taken_for_all_of_it(tmp_path):
    save_to_disk(tmp_path / "ds", hugging_face(IMAGES[:3]), 1)
    state = json.loads((tmp_path / "ds" / "state.json").read_text())
    (tmp_path / "ds" / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(ValueError, match="flatten_indices"):
        find_inputs([tmp_path / "ds"])


def test_damaged_arrow_files(tmp_path):
    path = save(pa.table({"image": IMAGES[:60]}), tmp_path / "stream.arrow", rows=10)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    found = read([path])
    *whole, (name, reason) = found
    assert [entry for _, entry in whole] == IMAGES[: len(whole)] and len(whole) in (10, 20, 30)
    assert name == f"{path}#{len(whole)}" and f"rows from {len(whole)} on cannot be read" in reason
    for content in (b"", b"ARROW1", b"ARROW1\0\0 rubbish" * 9, b"rubbish" * 99):
        (tmp_path / "b.arrow").write_bytes(content)
        [(name, reason)] = read([tmp_path / "b.arrow"])
        assert name.endswith("b.arrow#0") and "not an Arrow file that can be read" in reason
    with pytest.raises(FileNotFoundError):
        find_inputs([tmp_path / "absent.arrow"])


def test_a_folder_with_tables_is_read_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png())
    save(hugging_face(IMAGES[:2]), tmp_path / "b.parquet")
    save(hugging_face(IMAGES[:2]), tmp_path / "c.arrow")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    found = read([tmp_path])
    assert found[0][1] == str(tmp_path / "a.png")
    assert all("pip install 'siglip2-packed[parquet]'" in entry for _, entry in found[1:]) and len(found) == 3
    with pytest.raises(ImportError, match="parquet"):
        find_inputs([tmp_path / "b.parquet"])
