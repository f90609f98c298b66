"""`siglip2-packed encode` over a folder as cameras and systems leave it: all images, and a count of the rest."""

import io
import os

import numpy as np
import pytest
from encode_runs import image_bytes, run, table
from PIL import Image

from siglip2_packed.cli import main


def camera_roll(folder):
    heif = pytest.importorskip("pillow_heif")
    (folder / "album").mkdir()
    kinds = {"a.avif": "AVIF", "b.jfif": "JPEG", "c.tga": "TGA", "d.jp2": "JPEG2000", "e.pgm": "PPM", "f.JPE": "JPEG"}
    for seed, (name, kind) in enumerate(kinds.items()):
        (folder / name).write_bytes(image_bytes(seed, (24, 40), kind))
    file = io.BytesIO()
    heif.from_pillow(Image.fromarray(np.full((64, 96, 3), 90, np.uint8))).save(file)
    (folder / "album" / "IMG_1.HEIC").write_bytes(file.getvalue())
    (folder / "album" / "IMG_2.jpg").write_bytes(file.getvalue())  # renamed
    (folder / "g.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    os.mkfifo(folder / "h.png")
    for name in ("._a.jpg", ".DS_Store", "a.json", "b.json", "film.mov"):
        (folder / name).write_bytes(b"x")
    (folder / "link").symlink_to("album")
    return [*kinds, "album/IMG_1.HEIC", "album/IMG_2.jpg", "link/IMG_1.HEIC", "link/IMG_2.jpg"]


def test_a_folder_as_cameras_and_systems_leave_it(checkpoint, tmp_path, capsys):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    good = camera_roll(photos)
    assert run(checkpoint, photos, out, "--pooled", "--no-patches") in (0, 1)
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "passed over: 2 .json, 1 .mov (no image type), 2 (hidden)"
    assert sorted(os.path.relpath(row["input"], photos) for row in table(out / "index.csv")) == sorted(good)
    errors = {os.path.basename(row["input"]): row["reason"] for row in table(out / "errors.csv")}
    assert sorted(errors) == ["g.jpg", "h.png"]
    assert "EPS is not decoded" in errors["g.jpg"] and errors["h.png"] == "a pipe, not a regular file"
    assert [(row["suffix"], row["reason"], row["count"]) for row in table(out / "skipped.csv")] == [
        ("", "hidden", "1"),
        (".jpg", "hidden", "1"),
        (".json", "no image type", "2"),
        (".mov", "no image type", "1"),
    ]
    assert {row["example"] for row in table(out / "skipped.csv")} >= {str(photos / "film.mov"), str(photos / "._a.jpg")}


def test_nothing_passed_over_and_one_file(checkpoint, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(image_bytes(0, (9, 20)))
    assert run(checkpoint, tmp_path / "photos", tmp_path / "out") == 0
    assert table(tmp_path / "out" / "skipped.csv") == []
    assert "passed over" not in capsys.readouterr().out
    (tmp_path / "photos" / "a.txt").touch()
    assert run(checkpoint, tmp_path / "photos", tmp_path / "out", "--resume") == 0
    assert len(table(tmp_path / "out" / "skipped.csv")) == 1
    assert run(checkpoint, tmp_path / "photos", tmp_path / "one.safetensors") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "passed over: 1 .txt (no image type)"
    assert not list(tmp_path.glob("*.csv"))


def test_help_names_the_formats(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["encode", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for word in (".jpg", ".avif", ".heic", ".tga", "siglip2-packed[heif]", ".parquet", ".arrow", "skipped.csv"):
        assert word in said
