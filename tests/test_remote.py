"""Inputs by URL: what is encoded is what lies there, in the order of a folder's; and what goes wrong is said."""

import builtins
import http.server
import io
import itertools
import os
import re
import shutil
import tarfile
import threading
import time
from pathlib import Path

import pytest
from encode_runs import image_bytes, run, table

from siglip2_packed import load_features, remote
from siglip2_packed.cli import main
from siglip2_packed.collection import sources as sources_module
from siglip2_packed.collection.features import EncodedImage
from siglip2_packed.collection.identity import same
from siglip2_packed.collection.run import kept_rows
from siglip2_packed.collection.sources import find_again, find_inputs

fsspec = pytest.importorskip("fsspec")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

FLAGS = ["--pooled", "--no-patches", "--shard-size", "3"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder of images, a tar file, tables, a list, and what is none of these."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "b" / ".hidden").mkdir(parents=True)
    for i, name in enumerate(["b/2.png", "b/10.png", "a.png", "b/.hidden/x.png", "b/ü #1.png"]):
        (folder / name).write_bytes(image_bytes(i, (20 + i, 30)))
    (folder / "b" / "notes.md").write_text("no image")
    with tarfile.open(folder / "c.tar", "w") as tar:
        for i in range(5):
            for name, data in ((f"{i}.png", image_bytes(i, (20, 21 + i))), (f"{i}.txt", f"caption {i}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    rows = pa.table({"image": [image_bytes(i, (30, 20 + i)) for i in range(7)], "id": range(7)})
    pq.write_table(rows, folder / "d.parquet", row_group_size=3)
    with pa.ipc.new_file(str(folder / "e.arrow"), rows.schema) as writer:
        writer.write_table(rows, max_chunksize=4)
    return folder


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Gives parts of files, as Python's own server does not; fails where it is told to."""

    ranges, broken = True, set()
    until_drop = to_drop = 0
    """Parts that are given whole, before as many of which only half comes."""

    def do_GET(self):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if path.name in self.broken:
            self.send_error(500)
        elif wanted and path.is_file() and self.ranges:
            data = path.read_bytes()
            start, stop = int(wanted[1]), int(wanted[2] or len(data)) + 1
            self.send_response(206)
            part = data[start:stop]
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            handler = type(self)
            handler.until_drop -= 1
            dropped = -handler.to_drop <= handler.until_drop < 0
            self.wfile.write(part[: len(part) // 2] if dropped else part)
            self.close_connection = True
        else:
            super().do_GET()

    def end_headers(self):
        if not self.ranges:
            self.send_header("Accept-Ranges", "none")
        super().end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(site, tmp_path):
    """(URL, its folder, its handler) of a copy of the site."""
    pytest.importorskip("aiohttp")
    folder = shutil.copytree(site, tmp_path / "served")

    class Handler(Ranges):
        broken = set()

        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", folder, Handler
        server.shutdown()


@pytest.fixture
def memory(site):
    system = fsspec.filesystem("memory")
    system.put(f"{site}/", "/site/", recursive=True)
    yield "memory://site"
    system.rm("/site", recursive=True)


def content(inputs):
    return [item.entry if isinstance(item.entry, (bytes, ValueError)) else Path(item.entry).read_bytes()
            for item in inputs.read(0, len(inputs))]  # fmt: skip


def names(inputs, base):
    assert all(name.startswith(str(base)) for name in inputs.names())
    return [name[len(str(base)) :] for name in inputs.names()]


def test_a_folder_in_memory(memory, site):
    """All that a local folder gives, in its order; what is passed over is counted alike."""
    ours, theirs = find_inputs([memory]), find_inputs([site])
    assert content(ours) == content(theirs) and len(ours) == 23
    assert [name.partition("site")[2] for name in ours.names()] == names(theirs, site)
    assert {**ours.skipped.counts} == {(".png", "hidden"): 1, (".md", "no image type"): 1, (".txt", "no image type"): 5}
    assert content(find_inputs([f"{memory}/b/"])) == content(find_inputs([site / "b"]))


def test_http(server, site):
    url, folder, _ = server
    theirs = find_inputs([site])
    ours = find_inputs([f"{url}/"])
    assert sorted(map(str, content(ours))) == sorted(map(str, content(theirs)))
    for name in ("a.png", "c.tar", "d.parquet", "e.arrow"):
        ours, theirs = find_inputs([f"{url}/{name}?key=a.b"]), find_inputs([site / name])
        assert content(ours) == content(theirs)
        assert names(ours, f"{url}/{name}?key=a.b") == names(theirs, site / name)
        for start, stop in ((1, 3), (4, 5)):
            assert [x.entry for x in ours.read(start, stop)] == content(ours)[start:stop]
    (folder / "list.txt").write_text(f"{url}/a.png\n{site / 'a.png'}\n{url}/b/2.png\n{url}/gone.png\n")
    found = content(find_inputs([f"{url}/list.txt"]))
    assert found[:3] == [(site / name).read_bytes() for name in ("a.png", "a.png", "b/2.png")]
    assert str(found[3]) == f"{url}/gone.png: not found"


def test_encoded_by_url(server, site, checkpoint, tmp_path, capsys):
    """Features and columns as from files; `--resume` knows what has changed; search shows what lies there."""
    url, folder, _ = server
    argv = [*FLAGS, "--keep", "id"]
    assert run(checkpoint, f"{url}/d.parquet", tmp_path / "out", *argv) == 0
    assert run(checkpoint, site / "d.parquet", tmp_path / "local", *argv) == 0
    ours, theirs = load_features(tmp_path / "out"), load_features(tmp_path / "local")
    assert ours.pooled.allclose(theirs.pooled, atol=1e-5) and ours.columns.equals(theirs.columns)
    out = tmp_path / "files"
    sources = tmp_path / "list.txt"
    sources.write_text("".join(f"{url}/{name}\n" for name in ("b/2.png", "a.png", "c.tar")))
    assert run(checkpoint, sources, out, *FLAGS) == 0
    before = load_features(out)
    vectors, stamp = before.pooled.clone(), before.stamp(1)
    assert find_again(f"{url}/c.tar#1.png", before.stamp(3)) == image_bytes(1, (20, 22))
    assert find_again(f"{url}/a.png", stamp) == (site / "a.png").read_bytes()
    (folder / "a.png").write_bytes(image_bytes(77, (40, 40)))
    capsys.readouterr()
    assert run(checkpoint, sources, out, *FLAGS, "--resume") == 0
    assert f"changed since they were encoded, encoded again: {url}/a.png\n" in capsys.readouterr().err
    after = load_features(out)
    moved = [not a.allclose(b, atol=1e-4) for a, b in zip(vectors, after.pooled)]
    assert moved == [False, True, *[False] * 5]
    sources_module._inputs_of.cache_clear()
    with pytest.raises(ValueError, match="changed since"):
        find_again(f"{url}/a.png", stamp)


@pytest.mark.parametrize("how", ["one file", "the server"])
def test_features_of_urls_that_are_away_are_not_given_up(site, checkpoint, tmp_path, capsys, how):
    pytest.importorskip("aiohttp")
    folder, out, sources = shutil.copytree(site, tmp_path / "served"), tmp_path / "out", tmp_path / "list.txt"
    handler = type(
        "Handler", (Ranges,), {"__init__": lambda self, *args: Ranges.__init__(self, *args, directory=folder)}
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        sources.write_text(f"{url}/a.png\n{url}/b/2.png\n")
        assert run(checkpoint, sources, out, *FLAGS) == 0
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        if how == "one file":
            (folder / "a.png").unlink()
        else:
            server.shutdown()
            server.server_close()
        remote.forget_states()
        assert run(checkpoint, sources, out, *FLAGS, "--resume") == 2
        lacking = f"{url}/a.png" if how == "one file" else f"{url}/a.png, {url}/b/2.png"
        assert f"it has features of {lacking}, which cannot be found now" in capsys.readouterr().err
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        server.shutdown()


def test_what_cannot_be_had_costs_its_inputs(server, checkpoint, tmp_path):
    url, folder, handler = server
    handler.broken.add("2.png")
    (folder / "b" / "3.png").write_bytes(b"")
    assert run(checkpoint, f"{url}/b/", tmp_path / "out", *FLAGS) == 0
    errors = {row["input"].rpartition("/")[2]: row["reason"] for row in table(tmp_path / "out" / "errors.csv")}
    assert errors.keys() == {"2.png", "3.png"} and errors["2.png"].startswith(f"{url}/b/2.png: 500")
    assert len(load_features(tmp_path / "out")) == 2


def test_a_state_that_cannot_be_told_vouches_for_nothing(memory, monkeypatch, tmp_path):
    """One file that nobody may ask about keeps no list from being read, and no row of it is believed later."""
    real = remote.state

    def forbidden(url):
        if url.endswith("a.png"):
            raise PermissionError(f"{url}: forbidden")
        return real(url)

    monkeypatch.setattr(remote, "state", forbidden)
    (tmp_path / "list.txt").write_text(f"{memory}/a.png\n{memory}/b/2.png\n")
    inputs = find_inputs([tmp_path / "list.txt"])
    assert [same(inputs.stamp(i), inputs.stamp(i)) for i in range(2)] == [False, True]
    assert all(isinstance(entry, bytes) for entry in content(inputs))


def test_a_server_that_tells_nothing_of_a_file(memory, site, monkeypatch, tmp_path):
    """Neither its size nor when it was written: what was read there may be something else by now."""
    real = fsspec.filesystem("memory").info
    monkeypatch.setattr(
        fsspec.implementations.memory.MemoryFileSystem, "info", lambda self, path: {"type": real(path)["type"]}
    )
    (tmp_path / "list.txt").write_text(f"{memory}/a.png\n")
    for path in (f"{memory}/a.png", tmp_path / "list.txt"):
        inputs = find_inputs([path])
        assert content(inputs) == [(site / "a.png").read_bytes()]
        assert not same(inputs.stamp(0), inputs.stamp(0))
    assert remote.state(f"{memory}/a.png") == ""


def test_what_is_kept_is_of_the_state_that_was_encoded(memory, site):
    """Of an object that is replaced before its columns are read, whose state was asked for a moment ago."""
    inputs = find_inputs([f"{memory}/d.parquet"], keep=["id"])
    images = [EncodedImage(item.ordinal, item.name, stamp=item.stamp) for item in inputs.read(0, 3)]
    assert kept_rows(inputs, images)[1]["id"].to_pylist() == [0, 1, 2]
    rows = pa.table({"image": [b""] * 7, "id": range(7, 14)})
    pq.write_table(rows, "/site/d.parquet", filesystem=fsspec.filesystem("memory"))
    inputs.parts[0]._last = None, None  # of the shard before
    told, columns = kept_rows(inputs, images)
    assert len(columns) == 0 and all("d.parquet has changed" in image.error for image in told)


def test_an_image_whose_url_has_no_suffix(server, site):
    url, folder, _ = server
    (folder / "image").write_bytes((site / "a.png").read_bytes())
    assert content(find_inputs([f"{url}/image?id=3"])) == [(site / "a.png").read_bytes()]


def test_a_tar_that_goes_away_while_it_is_read(server):
    url, _, handler = server
    inputs = find_inputs([f"{url}/c.tar"])
    handler.broken.add("c.tar")
    assert all(isinstance(entry, ValueError) and url in str(entry) for entry in content(inputs))


def test_a_dropped_connection_costs_nothing(server, site, monkeypatch):
    """While members are found, or read by somebody who takes longer than the thread that reads ahead."""
    url, _, handler = server
    monkeypatch.setattr(remote, "BLOCK", 1024)
    names, expected = ("c.tar", "d.parquet", "e.arrow"), {}
    for name in names:
        expected[name] = content(find_inputs([site / name]))
        for whole in (1, 3, 5):
            handler.until_drop, handler.to_drop = whole, 1
            inputs = find_inputs([f"{url}/{name}"])
            assert handler.until_drop < 0 and content(inputs) == expected[name]
            handler.until_drop = whole
            found = [(item.entry, time.sleep(0.02))[0] for item in inputs.read(0, len(inputs))]
            assert found == expected[name]


def test_an_image_is_asked_for_twice(memory, site, monkeypatch):
    kind, tries = type(fsspec.filesystem("memory")), []
    real = kind.cat_file

    def dropped(self, path, *args, **how):
        tries.append(path)
        if path.endswith("2.png") or (path.endswith("a.png") and tries.count(path) == 1):
            raise OSError("dropped")
        return real(self, path, *args, **how)

    inputs = find_inputs([f"{memory}/a.png", f"{memory}/b/2.png", f"{memory}/b/10.png"])
    monkeypatch.setattr(kind, "cat_file", dropped)
    first, second, third = content(inputs)
    assert [first, third] == [(site / name).read_bytes() for name in ("a.png", "b/10.png")]
    assert str(second) == f"{memory}/b/2.png: dropped" and len(tries) == 5


@pytest.mark.parametrize("name", ["c.tar", "e.arrow"])
def test_inputs_that_cannot_be_listed_are_no_damage(server, site, monkeypatch, name):
    """One error in the place of all inputs that lie behind it would be believed."""
    url, _, handler = server
    monkeypatch.setattr(remote, "BLOCK", 1024)
    refused = []
    for whole, handler.to_drop in itertools.product((1, 3), (2, 3, 4, 5, 1000)):
        handler.until_drop = whole
        try:
            inputs = find_inputs([f"{url}/{name}"])
        except OSError as error:
            refused.append(str(error))
        else:
            handler.to_drop = 0
            assert content(inputs) == content(find_inputs([site / name]))
    assert len(refused) >= 5 and all(reason.startswith(f"{url}/{name}: Response payload") for reason in refused)
    handler.until_drop = 3
    inputs = find_inputs([f"{url}/"])
    assert next(str(item.entry) for item in inputs.read(0, len(inputs)) if name in item.name).startswith(url)


def test_a_server_without_ranges(server):
    url, _, handler = server
    handler.ranges = False
    assert content(find_inputs([f"{url}/a.png"]))  # whole files it gives
    for name in ("c.tar", "d.parquet"):
        with pytest.raises(OSError, match=rf"{url}/{name}: the server gives no parts of a file"):
            find_inputs([f"{url}/{name}"])


REFUSED = {
    "s3://bucket/a.png": r"s3://bucket/a\.png: .*pip install s3fs",
    "gs://bucket/": r"gs://bucket/: .*pip install gcsfs",
    "nonsense://x/a.png": r"nonsense://x/a\.png: .*[Pp]rotocol not known",
    "memory://nowhere/a.png": r"memory://nowhere/a\.png: not found",
    "http://127.0.0.1:9/a.tar": r"http://127\.0\.0\.1:9/a\.tar: not found",
    "memory://nowhere/": r"memory://nowhere/: not found|no images in 'memory://nowhere/'",
}


@pytest.mark.parametrize("url", REFUSED)
def test_refused_before_anything_is_loaded(url, tmp_path, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] in ("s3fs", "gcsfs"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert run(lambda: "no such checkpoint", url, tmp_path / "out", *FLAGS) == 2
    err = capsys.readouterr().err
    assert re.search(REFUSED[url], err) and "Traceback" not in err, err
    assert not (tmp_path / "out").exists()


def test_names_that_fsspec_takes_for_a_chain(memory):
    """It would read what is called as their first part does."""
    fsspec.filesystem("memory").pipe("/site/a.png::b.png", image_bytes(7, (9, 9)))
    inputs = find_inputs([memory])
    assert names(inputs, memory)[:2] == ["/a.png", "/a.png::b.png"]
    first, second = itertools.islice((item.entry for item in inputs.read(0, 2)), 2)
    assert isinstance(first, bytes) and "chain of file systems" in str(second)
    for url in ("zip://a.png::/tmp/a.zip", "zip://::/tmp/a.zip"):
        with pytest.raises(OSError, match=rf"{url}: .*chain of file systems, which is not read"):
            find_inputs([url])


def test_a_folder_keeps_all_of_its_url(site, memory):
    """The host, say, which the path on it does not tell."""

    class Hosted(type(fsspec.filesystem("memory"))):
        protocol = "hosted"

        @classmethod
        def _strip_protocol(cls, path):
            assert not path.startswith("hosted://") or path.startswith("hosted://host:8020/"), path
            return "/" + path.removeprefix("hosted://host:8020").strip("/")

    fsspec.register_implementation("hosted", Hosted, clobber=True)
    there = names(find_inputs([site / "b"]), site)
    for base in ("hosted://host:8020/site", f"local://{site}", memory):
        inputs = find_inputs([f"{base}/b/"])
        assert names(inputs, base) == there
        assert content(inputs) == content(find_inputs([site / "b"]))
    whole = find_inputs(["memory://"])
    assert "memory:///site/a.png" in whole.names()


def test_without_fsspec(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(
        ImportError, match=r"memory://x/a\.png: it needs fsspec \(pip install 'siglip2-packed\[remote\]'"
    ):
        find_inputs(["memory://x/a.png"])


def test_features_go_to_a_folder(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["encode", str(photos), "--ckpt", "c", "--out", "s3://bucket/out"]) == 2
    assert "--out 's3://bucket/out' is a URL" in capsys.readouterr().err and not os.listdir(tmp_path)


def test_files_are_read_ahead(memory, monkeypatch):
    """Thirty-two of them before the first is used up, and no more; in their order, whichever comes first."""
    system = fsspec.filesystem("memory")
    for number in range(100):
        system.pipe(f"/site/many/{number}", str(number).encode())
    read, real = [], remote._read

    def counted(url):
        read.append(url)
        time.sleep(0.01 * url.endswith("0"))
        return real(url)

    monkeypatch.setattr(remote, "_read", counted)
    items = remote.read_urls([f"{memory}/many/{number}" for number in range(100)])
    assert next(items) == b"0" and 1 < len(read) <= remote.AT_ONCE
    assert [*items] == [str(number).encode() for number in range(1, 100)]
