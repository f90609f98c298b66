"""`--resume` where inputs could not be read: tried again when asked for, and never in the way of the rest."""

import io
import json
import os
import shutil
import tarfile
from types import SimpleNamespace as Some

import pytest
from encode_runs import GOOD, SETTINGS, check, run, table
from safetensors.torch import load_file
from test_index_is_true import check as check_numbers
from test_index_is_true import encode, folder, write  # noqa: F401

from siglip2_packed.collection import run as run_module
from siglip2_packed.collection.sources import find_inputs
from siglip2_packed.encode import verdict
from siglip2_packed.preprocess import Siglip2PackedImageProcessor


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, text in members:
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))


def numbers(out):
    """(input, feature) of every row, in order."""
    for row in table(out / "index.csv"):
        yield row["input"].split("/")[-1], load_file(out / row["shard"])["pooled"][int(row["row"])][0].item()


def test_errors_are_tried_again_when_asked_for(checkpoint, photos, expected, tmp_path, monkeypatch, capsys):
    """As where a share was away: the files are as they were."""
    read, away = Siglip2PackedImageProcessor.read, ["03.png", "10.png"]

    def fails(self, source):
        if os.path.basename(source) in away:
            raise OSError(5, "Input/output error")
        return read(self, source)

    monkeypatch.setattr(Siglip2PackedImageProcessor, "read", fails)
    out, there = tmp_path / "out", [name for name in GOOD if name not in away]
    good = [photos / name for name in GOOD]
    assert run(checkpoint, good, out, *SETTINGS) == 0
    monkeypatch.setattr(Siglip2PackedImageProcessor, "read", read)
    assert run(checkpoint, good, out, *SETTINGS, "--resume") == 0
    check(out, expected, there, bad=away)
    kept = (out / "shard-00001.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert run(checkpoint, good, out, *SETTINGS, "--resume", "--retry-errors") == 0
    assert (
        f"tried again: 2 inputs that could not be read: {good[3]}, {good[10]}; and what else is in 2 shards: "
        "shard-00000.safetensors, shard-00002.safetensors\n"
    ) in capsys.readouterr().err
    check(out, expected, GOOD, bad=[])
    assert kept == (out / "shard-00001.safetensors").stat().st_mtime_ns
    assert run(checkpoint, good, out, *SETTINGS, "--retry-errors") == 2
    assert "--retry-errors goes with --resume" in capsys.readouterr().err


def test_a_killed_retry_goes_on(folder, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    encode(folder, out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "write_part", None)
        with pytest.raises(TypeError):
            encode(folder, out, retry_errors=True)
    assert not (out / "index.csv").exists()  # the shard it named is being written
    encode(folder, out)
    check_numbers(folder, out)


def test_members_of_one_name(tmp_path):
    """As `tar -r` and WebDataset leave them: the row of one is never taken for the other's."""
    tar, out = tmp_path / "a.tar", tmp_path / "out"
    members = [("x.jpg", "1"), ("y.jpg", "2"), ("z.jpg", "3"), ("x.jpg", "4"), ("v.jpg", "5")]
    write_tar(tar, members)
    expected = [(f"a.tar#{name}", float(text)) for name, text in members]
    encode(None, out, paths=[tar])
    for _ in range(2):
        assert list(numbers(out)) == expected
        (out / "shard-00000.safetensors").unlink()
        encode(None, out, paths=[tar])


@pytest.mark.parametrize("members", [1, 2])
def test_an_empty_tar_that_is_filled(folder, tmp_path, members):  # noqa: F811
    """What it was called, which had no row, is no input any more."""
    out = tmp_path / "out"
    (folder / "a.tar").touch()
    encode(folder, out)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    write_tar(folder / "a.tar", [(f"{i}.jpg", str(7 + i)) for i in range(members)])
    for _ in range(2):
        encode(folder, out)
        assert list(numbers(out))[-members:] == [(f"a.tar#{i}.jpg", 7.0 + i) for i in range(members)]
        assert len(table(out / "index.csv")) == 7 + members and len(table(out / "errors.csv")) == 1
        assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_broken_files_that_are_deleted(folder, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    encode(folder, out)
    (folder / "40.png").unlink()
    encode(folder, out)
    check_numbers(folder, out)
    (folder / "50.png").unlink()
    with pytest.raises(ValueError, match="has features of .*50.png, which"):
        encode(folder, out)


def test_images_that_come_to_lie_beside_their_table(folder, tmp_path):  # noqa: F811
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    paths, out = [tmp_path / "a.parquet"], tmp_path / "out"
    pq.write_table(pa.table({"image": ["x.jpg", "y.jpg"]}), paths[0])
    write(tmp_path, "y.jpg", 5)
    encode(None, out, paths=paths)
    write(tmp_path, "x.jpg", 7)
    encode(None, out, paths=paths)
    assert list(numbers(out)) == [("a.parquet#0", 7.0), ("a.parquet#1", 5.0)]


def test_images_as_text_in_a_table(folder, tmp_path):  # noqa: F811
    """base64 in a column of text is a path too long; the run comes to its end."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"image": ["A" * 200_000, "y.jpg"]}), tmp_path / "a.parquet")
    (tmp_path / "list.txt").write_text(f"{'B' * 200_000}\n{folder / '00.png'}\n")
    write(tmp_path, "y.jpg", 5)
    for _ in range(2):
        encode(None, tmp_path / "out", paths=[tmp_path / "a.parquet", tmp_path / "list.txt"])
        assert list(numbers(tmp_path / "out")) == [("a.parquet#1", 5.0), ("00.png", 100.0)]
    assert max(path.stat().st_size for path in (tmp_path / "out" / ".parts").iterdir()) < 210_000  # the list's line


@pytest.mark.parametrize("data", ["a.jpg\n".encode("utf-16"), b"a.jpg\0b.jpg\0"])
def test_lists_that_are_none(tmp_path, data):
    (tmp_path / "list.txt").write_bytes(data)
    with pytest.raises(ValueError, match="list.txt holds zero bytes"):
        find_inputs([tmp_path / "list.txt"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": None, "weights": "1"}, "has weights those of None"),
        ({"dtype": "float99"}, "has dtype float99, this one float32"),
        ({"dtype": ["float32"]}, "has dtype ['float32'], this one float32"),
        ({"save_dtype": 3}, "has save_dtype 3, this one float32"),
    ],
)
def test_a_run_json_that_was_edited(checkpoint, photos, finished, tmp_path, capsys, change, message):
    finished = shutil.copytree(finished, tmp_path / "out")
    settings = json.loads((finished / "run.json").read_text()) | change
    settings = {name: value for name, value in settings.items() if value is not None}
    (finished / "run.json").write_text(json.dumps(settings))
    assert run(checkpoint, photos, finished, *SETTINGS, "--resume") == 2
    assert message in capsys.readouterr().err


def test_a_run_json_that_nests_too_deep(folder, tmp_path):  # noqa: F811
    encode(folder, tmp_path / "out")
    (tmp_path / "out" / "run.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="is not a run.json"):
        encode(folder, tmp_path / "out")


def test_copies_among_the_parts_are_nothing(folder, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    encode(folder, out)
    (out / ".parts" / "0.csv").write_bytes((out / ".parts" / "00000.csv").read_bytes())
    encode(folder, out)
    check_numbers(folder, out)


@pytest.mark.parametrize(("failed", "total", "share"), [(29, 100, 0.29), (7, 100, 0.07), (58, 200, 0.29)])
def test_a_share_of_errors_is_not_more_than_itself(failed, total, share):
    args = Some(strict=False, max_errors=share)
    assert verdict(Some(failed=failed, read=total - failed), args) == 0
    assert verdict(Some(failed=failed + 1, read=total - failed - 1), args) == 1
