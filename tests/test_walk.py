"""A folder is read whole, links and all; what is passed over is counted and said."""

import contextlib
import csv
import io
import os
import socket
import tarfile
import threading

import pytest
from test_sources import add, png, read

from siglip2_packed.collection.sources import find_inputs, image_files
from siglip2_packed.collection.walk import Skipped


def make(folder, *names, data=b"x"):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def names(folder, **kwargs):
    return [os.path.relpath(name, folder) for name, _ in read([folder], **kwargs)]


def counts(*paths, **kwargs):
    return dict(find_inputs(paths, **kwargs).skipped.counts)


def test_every_suffix_of_an_image_is_an_input_and_the_rest_is_counted(tmp_path):
    images = "a.avif b.jfif c.jpe d.jp2 e.tga f.pgm g.ico h.HEIC i.heif j.psd k.eps l.wmf m.mpo n.JPG o.hif".split()
    make(
        tmp_path, *images, "x.json", "y.json", "deep/z.TXT", "README", "film.mp4", "film.mpg", "f.h5", "k.svg", "z.zip"
    )
    assert names(tmp_path) == images
    none = "no image type"
    expected = {".json": 2, ".txt": 1, "": 1, ".mp4": 1, ".mpg": 1, ".h5": 1, ".svg": 1, ".zip": 1}
    inputs = find_inputs([tmp_path])
    assert dict(inputs.skipped.counts) == {(suffix, none): count for suffix, count in expected.items()}
    rows = list(csv.reader(io.StringIO(inputs.skipped.table())))
    assert rows[0] == ["suffix", "reason", "count", "example"]
    assert [".json", none, "2", str(tmp_path / "x.json")] in rows
    assert str(inputs.skipped).startswith("2 .json, 1 without suffix, 1 .h5, ")
    assert counts(tmp_path, tmp_path)[".json", none] == 4


def test_tar_members_are_sorted_out_as_files_are(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("./0.heic", "0.json", "0.cls", "__MACOSX/._0.jpg", "__MACOSX/0.jpg", "._0.jpg", ".hidden/0.jpg"):
            add(tar, name, png())
        for name in ("a/@eaDir/0.jpg/SYNOPHOTO.jpg", "../b/1.jfif", "c/2.AVIF", "lost+found", "c/._2.AVIF"):
            add(tar, name, png())
    assert [name.rpartition("#")[2] for name, _ in read([path])] == ["./0.heic", "../b/1.jfif", "c/2.AVIF"]
    none, cache = "no image type", "thumbnails, bins and snapshots"
    assert counts(path) == {
        (".json", none): 1,
        (".cls", none): 1,
        ("", none): 1,
        (".jpg", cache): 3,
        (".jpg", "hidden"): 2,
        (".avif", "hidden"): 1,
    }
    empty = tmp_path / "b.tar"
    with tarfile.open(empty, "w") as tar:
        add(tar, "a.json", b"{}")
    with pytest.raises(ValueError, match=r"no images in '.*b.tar'; it holds 1 .json \(no image type\)"):
        find_inputs([empty])


def test_companions_hidden_folders_and_caches_are_passed_over(tmp_path):
    caches = [
        "@eaDir/a.jpg",
        "x/@EADIR/a.jpg",
        "#recycle/a.jpg",
        "$RECYCLE.BIN/a.jpg",
        "__MACOSX/a.jpg",
        "lost+found/a",
    ]
    hidden = [".ipynb_checkpoints/a.png", ".thumbnails/a.png", ".Trash-1000/a.png", "x/.git/a.png", "._x.jpg", ".b.jpg"]
    make(tmp_path, "x.jpg", "x/y.jpg", "Thumbs.db", "recycle/a.jpg", *caches, *hidden)
    assert names(tmp_path) == ["recycle/a.jpg", "x/y.jpg", "x.jpg"]
    assert counts(tmp_path) == {
        ("/", "thumbnails, bins and snapshots"): 6,
        ("/", "hidden"): 4,
        (".jpg", "hidden"): 2,
        (".db", "no image type"): 1,
    }
    # what somebody names is meant
    assert names(tmp_path / ".thumbnails") == ["a.png"]
    assert names(tmp_path / "@eaDir") == ["a.jpg"]
    assert [name for name, _ in read([tmp_path / "._x.jpg"])] == [str(tmp_path / "._x.jpg")]
    (tmp_path / "list.txt").write_text(f"{tmp_path / '.b.jpg'}\n{tmp_path / '.thumbnails'}\n")
    assert [os.path.basename(name) for name, _ in read([tmp_path / "list.txt"])] == [".b.jpg", "a.png"]


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    album, photos = tmp_path / "album", tmp_path / "photos"
    make(photos, "a.jpg", "deep/b.jpg")
    make(album, "own.jpg")
    (album / "link").symlink_to(photos, target_is_directory=True)
    (album / "other").symlink_to("../photos/deep")
    (album / "z.jpg").symlink_to(photos / "a.jpg")
    expected = ["link/a.jpg", "link/deep/b.jpg", "other/b.jpg", "own.jpg", "z.jpg"]
    assert names(album) == expected
    assert counts(album) == {}
    (album / "self").symlink_to(".")
    (photos / "deep" / "up").symlink_to(album)
    (photos / "deep" / "here").symlink_to("../../photos")
    (tmp_path / "album" / "ring").symlink_to("ring")
    (album / "gone").symlink_to("absent")
    (album / "gone.jpg").symlink_to("absent.jpg")
    expected += ["gone.jpg", "other/here/a.jpg"]
    assert names(album) == sorted(expected, key=lambda name: name.split("/"))
    reasons = {reason for _, reason in counts(album)}
    assert reasons == {"links to a folder they lie in", "links to what is not there"}
    assert counts(album)["", "links to what is not there"] == 2  # gone and ring


def test_the_output_is_not_an_input_through_a_link_either(tmp_path):
    make(tmp_path, "photos/a.jpg", "out/b.jpg", "old/.parts/0.csv", "old/c.jpg")
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "out")
    assert names(tmp_path / "photos", but=tmp_path / "out") == ["a.jpg"]
    assert names(tmp_path, but=tmp_path / "out") == ["photos/a.jpg"]
    assert counts(tmp_path, but=tmp_path / "out") == {("/", "features of an earlier run"): 1}


def test_pipes_sockets_and_devices(tmp_path):
    make(tmp_path, "a.jpg", "list.txt", data=png())
    for name in ("b.jpg", "c.tar", "d.parquet", "e.arrow", "f"):
        os.mkfifo(tmp_path / name)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "g"))
    (tmp_path / "h.png").symlink_to("/dev/zero")
    (tmp_path / "list.txt").write_text("\n".join(str(tmp_path / name) for name in ("b.jpg", "c.tar", "f", "g")))
    found = []
    pipes = [tmp_path / name for name in ("b.jpg", "c.tar", "d.parquet", "f", "g")]
    jobs = [threading.Thread(target=lambda: found.extend(read([tmp_path, *pipes, tmp_path / "list.txt"])), daemon=True)]
    jobs[0].start()
    jobs[0].join(20)
    assert [os.path.basename(name) for name, _ in found] == [
        *("a.jpg", "b.jpg", "c.tar", "d.parquet", "e.arrow", "h.png"),
        *("b.jpg", "c.tar", "d.parquet", "f", "g"),
        *("b.jpg", "c.tar", "f", "g"),
    ]
    assert counts(tmp_path) == {("", "pipes, sockets and devices"): 2, (".txt", "no image type"): 1}
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match=r"pipe.txt is a pipe, not a regular file: have it come through `-`"):
        find_inputs([tmp_path / "pipe.txt"])


def test_order_is_that_of_the_paths_whatever_the_file_system_says(tmp_path, monkeypatch):
    given = ["b/a.jpg", "b-c.jpg", "B.jpg", "a/z.jpg", "a.jpg", "b/a/x.jpg", "é.jpg", "10.jpg", "9.jpg"]
    make(tmp_path, *given)
    scandir = os.scandir

    def backwards(path):
        return contextlib.nullcontext(sorted(scandir(path), key=lambda entry: entry.name, reverse=True))

    expected = sorted(given, key=lambda name: name.split("/"))
    assert names(tmp_path) == expected
    monkeypatch.setattr(os, "scandir", backwards)
    assert names(tmp_path) == expected


def test_counts_stay_bounded(tmp_path):
    skipped, odd = Skipped(), Skipped()
    for i in range(5000):
        skipped.add(f"a.{i}", "no image type")
    assert len(skipped.counts) <= Skipped.MOST + 1
    assert sum(skipped.counts.values()) == 5000
    assert skipped.counts["*", "no image type"] == 4000
    assert len(str(skipped)) < 300
    for name in ("a/St. Petersburg 2019", "b.\udcff", "c.\n", "d.verylongsuffixindeed"):
        odd.add(name, "no image type")
    assert odd.counts == {("", "no image type"): 4}
    assert str(odd) == "4 without suffix (no image type)"
    again = Skipped()
    again.update(skipped)
    assert again.counts == skipped.counts
    assert not Skipped() and skipped


def test_commands_that_take_folders_say_it_too(tmp_path, capsys):
    make(tmp_path, "a.jpg", "b.json", "c.tar", ".d.jpg")
    assert image_files([tmp_path]) == [tmp_path / "a.jpg"]
    err = capsys.readouterr().err
    assert err == "passed over: 1 .json (no image type), 1 (collections, which encode reads), 1 (hidden)\n"
    assert image_files([tmp_path / "b.json"]) == [tmp_path / "b.json"]  # named: content decides
    assert capsys.readouterr().err == ""
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="no images in '.*nothing'. `siglip2-packed encode --help` lists"):
        image_files([tmp_path / "nothing"])
