"""Inputs in order, whatever holds them; damage costs what it hits and is named."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from siglip2_packed.collection.sources import find_inputs


def png(seed=0, size=(6, 9)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def read(paths, start=0, stop=None, **kwargs):
    inputs = find_inputs(paths, **kwargs)
    found = list(inputs.read(start, len(inputs) if stop is None else stop))
    assert [item.ordinal for item in found] == list(range(start, start + len(found)))
    return [(item.name, str(item.entry) if isinstance(item.entry, ValueError) else item.entry) for item in found]


def add(tar, name, data, **fields):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def shard(tmp_path):
    """A WebDataset shard: keys with an image, a caption and a label each; a long name, a folder and a link."""
    path = tmp_path / "shard-000.tar"
    with tarfile.open(path, "w") as tar:
        for key in ("000", "001", "x" * 200, "002"):
            add(tar, f"{key}.jpg", png(len(key)))
            add(tar, f"{key}.txt", b"a caption")
            add(tar, f"{key}.cls", b"7")
        add(tar, "folder.png", b"", type=tarfile.DIRTYPE)
        add(tar, "link.png", b"", type=tarfile.SYMTYPE, linkname="000.jpg")
    return path


def test_files_and_folders(tmp_path):
    names = ["b/c.JPG", "a.png", "b/d/e.webp", "b-c.gif", "notes.txt", "b/x.json"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    absent, folder = str(tmp_path / "absent.jpg"), [str(tmp_path / n) for n in ("a.png", "b/c.JPG", "b/d/e.webp")]
    folder.append(str(tmp_path / "b-c.gif"))
    assert read([absent, tmp_path, absent]) == [(name, name) for name in (absent, *folder, absent)]
    assert read([tmp_path], but=tmp_path / "b") == [(name, name) for name in (folder[0], folder[3])]


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff\xe9.png"
    with open(name, "wb") as file:
        file.write(png())
    assert read([tmp_path]) == [(os.fsdecode(name),) * 2]
    (tmp_path / "list.txt").write_bytes(name + b"\n")
    assert read([tmp_path / "list.txt"]) == [(os.fsdecode(name),) * 2]


def test_lists(tmp_path, monkeypatch, shard):
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "a b.png").touch()
    text = "\ufeffone.jpg\r\n\n  \n two.png\ndeeper\nshard-000.tar\n#three.bmp"
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    expected = ["one.jpg", " two.png", "deeper/a b.png"]
    assert [name for name, _ in read(["list.txt"])][:3] == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    names = [name for name, _ in read(["-"])]
    assert names[:3] == expected
    assert names[3] == "shard-000.tar#000.jpg"
    assert names[-1] == "#three.bmp"
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"no images in 'empty.txt'"):
        find_inputs(["one.jpg", "empty.txt"])
    with pytest.raises(FileNotFoundError):
        find_inputs(["absent.txt"])


def test_tar_members(shard):
    keys = ["000", "001", "x" * 200, "002"]
    expected = [(f"{shard}#{key}.jpg", png(len(key))) for key in keys]
    found = read([shard])
    assert found[:4] == expected
    assert found[4] == (f"{shard}#link.png", "a link or a special file, not an image")
    assert len(found) == 5
    assert read([shard, shard], 3, 8) == [*found[3:], *found[:3]]


@pytest.mark.parametrize("fmt", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tar_formats_are_not_taken_for_damage(tmp_path, fmt):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=fmt, pax_headers={"comment": "git archive writes one"}) as tar:
        add(tar, "é" * 40 + ".png", png(1))
        add(tar, "b.png", png(2), mtime=0.5)
    with open(path, "ab") as file, open(path, "rb") as again:
        file.write(again.read())  # joined, with padding in between
    assert [source for _, source in read([path])] == [png(1), png(2)] * 2


def test_a_damaged_tar_header_costs_its_member(shard):
    data = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        start, stop = tar.getmember("001.jpg").offset, tar.getmember("001.txt").offset
    data[start + 150] ^= 0xFF  # in the checksum
    shard.write_bytes(data)
    whole, damaged = read([shard])[0], read([shard])[1]
    assert whole == (f"{shard}#000.jpg", png(3))
    assert damaged == (f"{shard}#bytes {start} to {stop}", "damaged tar headers: what they described is lost")
    assert [name.rpartition("#")[2] for name, _ in read([shard])[2:]] == ["x" * 200 + ".jpg", "002.jpg", "link.png"]


@pytest.mark.parametrize("cut", ["data", "header"])
def test_a_tar_that_ends_too_soon(shard, cut):
    with tarfile.open(shard) as tar:
        member = tar.getmember("002.jpg")
        end = member.offset_data + 10 if cut == "data" else member.offset + 100
    shard.write_bytes(shard.read_bytes()[:end])
    found = read([shard])
    assert [source for _, source in found[:3]] == [png(3), png(3), png(200)]
    assert len(found) == 4
    if cut == "data":
        assert found[3] == (f"{shard}#002.jpg", f"the tar file ends after 10 of its {member.size} bytes")
    else:
        assert "damaged tar headers" in found[3][1]


def test_what_is_no_tar(tmp_path):
    (tmp_path / "text.tar").write_text("not a tar file " * 100)
    (tmp_path / "zero.tar").touch()
    assert [reason.split(":")[0] for _, reason in read([tmp_path])] == [
        "damaged tar headers",
        "an empty file, not a tar file",
    ]
    (tmp_path / "text.tar.gz").touch()
    (tmp_path / "list.txt").write_text(f"a.png\n{tmp_path / 'text.tar.gz'}\n")
    for path in (tmp_path / "text.tar.gz", tmp_path / "list.txt"):
        with pytest.raises(ValueError, match="is compressed"):
            find_inputs([path])
    for name in ("absent.tar", "absent", "absent/"):
        with pytest.raises(FileNotFoundError, match="absent"):
            find_inputs([tmp_path / name])


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz", "zip"])
def test_a_compressed_file_that_is_called_tar(tmp_path, mode):
    path = tmp_path / "a.tar"
    if mode == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.png", png())
    else:
        with tarfile.open(path, mode) as tar:
            add(tar, "a.png", png())
    with pytest.raises(ValueError, match=r"a\.tar is compressed: decompress it"):
        find_inputs([path])
    (tmp_path / "b.png").write_bytes(png())
    [(_, reason), (name, _)] = read([tmp_path])
    assert "is compressed: decompress it" in reason and name == str(tmp_path / "b.png")


def test_what_a_walk_cannot_use_is_named_and_costs_nothing_else(tmp_path, monkeypatch):
    for name in ("closed/a.png", "open/b.png", "z.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "open" / "a.tar.gz").touch()
    scandir = os.scandir

    def guarded(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    found = read([tmp_path])
    assert [os.path.relpath(name, tmp_path) for name, _ in found] == ["closed", "open/a.tar.gz", "open/b.png", "z.png"]
    assert "Permission denied" in found[0][1]
    assert "is compressed" in found[1][1]
    with pytest.raises(PermissionError):
        find_inputs([tmp_path / "closed"])
    (tmp_path / "open" / "b.png").unlink()
    with pytest.raises(ValueError, match="is compressed"):
        find_inputs([tmp_path / "open"])


def test_a_part_without_images_hides_nothing_behind_it(tmp_path):
    for name in ("a.png", "c.png"):
        (tmp_path / name).touch()
    tarfile.open(tmp_path / "b.tar", "w").close()
    assert [name for name, _ in read([tmp_path])] == [str(tmp_path / "a.png"), str(tmp_path / "c.png")]


def test_outputs_are_not_walked(tmp_path):
    for folder in ("", "before", "before/.parts", "now"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "a.png").touch()
    assert [name for name, _ in read([tmp_path], but=tmp_path / "now")] == [str(tmp_path / "a.png")]
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (tmp_path, tmp_path / "link"):
        with pytest.raises(ValueError, match="is a folder of inputs"):
            find_inputs([path], but=tmp_path)


def test_a_tar_that_is_gone_when_it_is_read(shard):
    [tar] = find_inputs([shard]).parts
    shard.unlink()
    reasons = list(map(str, tar.read(0, 5)))
    assert all(f"{shard} cannot be read" in reason for reason in reasons[:4]) and "a link" in reasons[4]
    os.mkfifo(shard)
    assert "a pipe, not a regular file" in str(next(tar.read(0, 1)))


def resized(path, name, size):
    """Gives a member a header with another size, and the checksum that makes it good."""
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = tar.getmember(name).offset
    data[start + 124 : start + 136] = size
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)
    return start


@pytest.mark.parametrize("size", [b"\xff" * 8 + b"\0" * 4, b"\x80" + b"\x7f" * 11, b"\x80" + b"\0" * 3 + b"\x7f" * 8])
@pytest.mark.parametrize("name", ["001.jpg", "001.txt"])
def test_absurd_sizes_in_a_tar(shard, name, size):
    """Negative, beyond what Python can seek to, and as much as it just can: what is lost is named."""
    resized(shard, name, size)
    found = read([shard])
    *whole, (lost, reason) = found
    assert [source for _, source in whole] == [png(3)] * (2 if name == "001.txt" else 1)
    if size[0] == 0xFF:
        assert "damaged tar headers" in reason
    else:
        assert (lost, "ends after" in reason) == (f"{shard}#{name}", True)


def test_an_absurd_size_in_a_global_header(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", pax_headers={"comment": "git archive writes one"}) as tar:
        add(tar, "a.png", png())
    data = bytearray(path.read_bytes())
    data[124:136], data[148:156] = b"\x80" + b"\x7f" * 11, b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    assert [reason.split(":")[0] for _, reason in read([path])] == ["damaged tar headers"]


@pytest.mark.parametrize("missing", [1, 500])
def test_a_tar_cut_in_what_fills_a_block(shard, missing):
    with tarfile.open(shard) as tar:
        first = next(member for member in tar if member.isreg())
    os.truncate(shard, first.offset_data + -(-first.size // 512) * 512 - min(missing, -first.size % 512))
    found = read([shard])
    assert found[-1][0].startswith(f"{shard}#bytes ") and "ends within a block" in str(found[-1][1])


def test_a_tar_cut_in_what_is_no_image(shard):
    with tarfile.open(shard) as tar:
        member = tar.getmember("001.txt")
    shard.write_bytes(shard.read_bytes()[: member.offset_data + 3])
    assert read([shard])[2:] == [(f"{shard}#001.txt", "the tar file ends after 3 of its 9 bytes")]


@pytest.mark.skipif(not shutil.which("tar"), reason="GNU tar makes them")
@pytest.mark.parametrize("form", ["gnu", "posix --sparse-version=0.0", "posix --sparse-version=0.1", "posix"])
def test_sparse_members_are_read_and_hide_nothing(form, tmp_path):
    picture = png(5, (40, 40))
    with open(tmp_path / "b.png", "wb") as file:
        file.write(picture)
        for place in range(1, 9):  # more pieces than a header holds
            file.seek(place << 17)
            file.write(bytes([place]) * 700)
        file.truncate(3 << 20)
    for name in ("a.png", "c.png"):
        (tmp_path / name).write_bytes(png())
    path = tmp_path / "x.tar"
    command = ["tar", "-S", *f"--format={form}".split(), "-cf", path, "a.png", "b.png", "c.png"]
    if subprocess.run(command, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("not GNU tar")
    if path.stat().st_size > 1 << 20:
        pytest.skip("the file system keeps no holes")
    found = read([path])
    assert [name.rpartition("#")[2] for name, _ in found] == ["a.png", "b.png", "c.png"]
    assert [entry for _, entry in found] == [(tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png")]


def test_a_sparse_member_that_claims_a_terabyte(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "a.png", b"x" * 512, pax_headers={"GNU.sparse.map": "0,512", "GNU.sparse.size": str(1 << 40)})
        add(tar, "b.png", b"x" * 512, pax_headers={"GNU.sparse.map": "512,512", "GNU.sparse.size": "600"})
        add(tar, "c.png", png())
    found = [entry for _, entry in read([path])]
    assert found == [
        f"a sparse file of {1 << 40} bytes, not an image",
        "a sparse file whose map does not fit its size",
        png(),
    ]


pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
IMAGES = [png(seed) for seed in range(150)]


def write(path, columns, **kwargs):
    pq.write_table(pa.table(columns), path, **kwargs)
    return path


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_parquet_bytes(tmp_path, kind):
    values = [*IMAGES[:70], None, *IMAGES[71:]]
    columns = {"id": list(range(150)), "caption": ["image"] * 150, "jpg": pa.array(values, kind)}
    path = write(tmp_path / "a.parquet", columns, row_group_size=40)
    found = read([path])
    assert found[70] == (f"{path}#70", "null: the row has no image")
    assert [source for _, source in found[:70] + found[71:]] == IMAGES[:70] + IMAGES[71:]
    assert read([path], 35, 125) == found[35:125]
    assert read([path], 80, 81) == found[80:81]


def test_parquet_of_hugging_face_datasets(tmp_path):
    (tmp_path / "beside.png").write_bytes(png())
    values = [{"bytes": IMAGES[0], "path": "a.jpg"}, {"bytes": None, "path": "beside.png"}, None]
    values += [{"bytes": None, "path": None}, {"bytes": None, "path": "/elsewhere/b.jpg"}]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    path = write(tmp_path / "a.parquet", {"label": [1] * 5, "image": pa.array(values, kind)})
    null = "null: the row has no image"
    expected = [IMAGES[0], str(tmp_path / "beside.png"), null, null, "/elsewhere/b.jpg"]
    assert [source for _, source in read([path])] == expected


def test_parquet_of_paths_and_columns_to_choose(tmp_path):
    path = write(tmp_path / "a.parquet", {"caption": ["x"], "file_name": ["b.jpg"], "n": [1]})
    assert read([path]) == [(f"{path}#0", str(tmp_path / "b.jpg"))]  # where it is to be, which is not there yet
    assert read([path], column="caption") == [(f"{path}#0", str(tmp_path / "x"))]
    for column in ("n", "absent"):
        with pytest.raises(
            ValueError, match=f"--column '{column}' must hold bytes.*it has caption .string., file_name"
        ):
            find_inputs([path], column)
    several = write(tmp_path / "b.parquet", {"left": [b"1"], "right": [b"2"]})
    with pytest.raises(ValueError, match="2 columns that may hold images: choose with --column"):
        find_inputs([several])
    assert read([several], column="right") == [(f"{several}#0", b"2")]
    with pytest.raises(ValueError, match=r"no image column.*n \(int64\)"):
        find_inputs([write(tmp_path / "c.parquet", {"n": [1]})])


def test_damaged_parquet(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": IMAGES}, row_group_size=50, use_dictionary=False)
    metadata = pq.ParquetFile(path).metadata
    data = bytearray(path.read_bytes())
    start = metadata.row_group(1).column(0).data_page_offset
    data[start : start + 64] = b"\xff" * 64
    path.write_bytes(data)
    found = read([path])
    assert [source for _, source in found[:50] + found[100:]] == IMAGES[:50] + IMAGES[100:]
    assert all("row group 1 cannot be read" in source for _, source in found[50:100])
    text = tmp_path / "b.parquet"
    text.write_text("not a Parquet file")
    [(name, reason)] = read([text])
    assert name == f"{text}#0"
    assert "not a Parquet file that can be read" in reason
    with pytest.raises(FileNotFoundError):
        find_inputs([tmp_path / "absent.parquet"])


def test_standard_input_that_is_closed(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ValueError, match="standard input is closed"):
        find_inputs(["-"])
