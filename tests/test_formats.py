"""What is decoded: every format that Pillow reads by itself, by content; never a program started on a file's bytes."""

import io
import os
import socket
import stat
import subprocess
import threading

import numpy as np
import pytest
from PIL import Image
from pixels import encode, processor, rgb, same

from siglip2_packed.data import image_grid, image_grids
from siglip2_packed.formats import DECODED, NO_IMAGES, REFUSED, SUFFIXES, decoders, is_image_name, open_regular

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n0 0 20 20 rectfill\n%%EOF\n"
FTYP = b"\0\0\0\x18ftyp%s\0\0\0\0mif1heic" + b"\0" * 64
READS_WRITES = ["AVIF", "BLP", "BMP", "DIB", "GIF", "ICNS", "ICO", "IM", "JPEG", "JPEG2000", "MSP", "PCX", "PNG", "PPM"]
READS_WRITES += ["QOI", "SGI", "SPIDER", "TGA", "TIFF", "WEBP", "XBM", "MPO", "DDS"]


def test_the_table_holds_all_that_pillow_knows():
    Image.init()
    known = {*DECODED, *REFUSED, *NO_IMAGES, "MIC"}
    assert set(Image.OPEN) <= known
    for suffix, name in Image.registered_extensions().items():
        if name in DECODED:
            assert suffix in SUFFIXES
    assert {".eps", ".ps", ".wmf", ".emf", ".heic", ".hif", ".mpo", ".jfif", ".jpe", ".tga", ".pgm"} <= SUFFIXES
    assert not {"", ".", ".txt", ".json", ".mpg", ".h5", ".pdf", ".svg"} & SUFFIXES
    assert is_image_name("a/b.JPE") and not is_image_name("jpg") and not is_image_name(".jpg")
    assert not set(decoders()) & {*REFUSED, *NO_IMAGES}


@pytest.mark.parametrize("kind", READS_WRITES)
def test_every_format_that_pillow_writes_is_read(kind, tmp_path):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip("this Pillow does not write it")
    square = kind in ("ICNS", "ICO")
    image = Image.fromarray(rgb(64, 64) if square else rgb(24, 40))
    if kind in ("MSP", "XBM"):
        image = image.convert("1")
    if kind in ("SPIDER", "GIF", "BLP"):
        image = image.convert({"SPIDER": "F", "GIF": "P", "BLP": "P"}[kind])
    data = encode(image, kind, **({"append_images": [image]} if kind == "MPO" else {}))
    path = tmp_path / "misnamed.jpg"
    path.write_bytes(data)
    with Image.open(io.BytesIO(data)) as expected:
        expected.load()
        packed = processor(expected.copy())
    for form in (path, str(path), data, io.BytesIO(data), f"file://{path}"):
        same(processor(form), packed)
    assert image_grid(data, processor) == tuple(packed["grid_thw"][0].tolist())


@pytest.fixture
def no_programs(monkeypatch):
    def start(*args, **kwargs):
        raise AssertionError(f"started {args}")

    for name in ("Popen", "call", "check_call", "check_output", "run"):
        monkeypatch.setattr(subprocess, name, start)
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (EPS, "EPS"),
        (b"\xc5\xd0\xd3\xc6" + b"\x1e\0\0\0" + len(EPS).to_bytes(4, "little") + b"\0" * 18 + EPS, "EPS"),
        (b"\xd7\xcd\xc6\x9a\0\0" + b"\0" * 90, "WMF"),
        (b"\1\0\0\0" + b"\0" * 36 + b" EMF" + b"\0" * 90, "WMF"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 90, "FPX"),
        (b"\x1c\3\x14\0\1\0" + b"\x1c\x08\x0a\0\x20" + EPS, "IPTC"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 90, "HDF5"),
        (b"\0\0\1\xb3" + b"\0" * 90, "MPEG"),
        (b"GRIB\0\0\0\1" + b"\0" * 90, "GRIB"),
        (b"BUFR" + b"\0" * 90, "BUFR"),
        (b"%PDF-1.4\n", "PDF"),
        (b"<?xml version='1.0'?>\n<svg/>", "SVG"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_another_program_would_read_is_an_error_that_names_it(data, name, tmp_path, no_programs):
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    for form in (path, data, io.BytesIO(data)):
        with pytest.raises(ValueError, match=rf"^image 0.*\b{name}\b"):
            processor(form)
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            image_grids([form], processor)


def test_heic_through_the_extra(tmp_path, monkeypatch):
    heif = pytest.importorskip("pillow_heif")
    assert is_image_name("IMG_1.HEIC")
    pixels = Image.fromarray(np.repeat(np.repeat(rgb(16, 24), 4, 0), 4, 1))
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    heif.from_pillow(pixels).save(file, quality=-1, chroma=444)
    heif.from_pillow(pixels).save(tmp_path / "turned.jpg", quality=-1, chroma=444, exif=exif.tobytes())
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    expected = heif.open_heif(file.getvalue()).to_pillow()
    same(processor(file.getvalue()), processor(expected.convert("RGB")))
    h, w = processor(expected)["grid_thw"][0, 1:].tolist()
    assert image_grid(file.getvalue(), processor) == (1, h, w)
    assert processor(tmp_path / "turned.jpg")["grid_thw"].tolist() == [[1, w, h]]
    with pytest.raises(ValueError, match="cut short"):
        processor(file.getvalue()[:40])


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"hevc", b"mif1", b"msf1"])
def test_heic_without_the_extra(brand, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    with pytest.raises(ValueError, match=r"HEIF: no decoder.*siglip2-packed\[heif\]"):
        processor(FTYP % brand)


def test_avif_without_a_decoder(monkeypatch):
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(ValueError, match=r"AVIF: no decoder.*Pillow 11.3"):
        processor(FTYP % b"avif")


def in_time(function, *args):
    """What the function raises or returns, within seconds: a read of a pipe waits for ever."""
    found = []

    def call():
        try:
            found.append(function(*args))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(20)
    assert found, "it waits"
    return found[0]


def test_what_is_no_regular_file(tmp_path):
    pipe, link, unix = tmp_path / "pipe.jpg", tmp_path / "link.png", tmp_path / "socket.jpg"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(unix))
    for path, kind in (
        (pipe, "pipe"),
        (link, "pipe"),
        (unix, "socket"),
        ("/dev/null", "device"),
        ("/dev/zero", "device"),
    ):
        for function in (processor, lambda path: image_grid(path, processor), open_regular):
            error = in_time(function, path)
            assert isinstance(error, ValueError) and f"a {kind}, not a regular file" in str(error)
    (tmp_path / "lost.jpg").symlink_to(tmp_path / "absent.jpg")
    assert "a link to what is not there" in str(in_time(processor, tmp_path / "lost.jpg"))


def test_paths_as_urls(tmp_path):
    path = tmp_path / "a b#c%41.png"
    path.write_bytes(encode(Image.fromarray(rgb(20, 30))))
    quoted = str(path).replace("%", "%25").replace(" ", "%20").replace("#", "%23")
    for form in (f"file://{path}", f"file://{quoted}", f"FILE://localhost{quoted}"):
        same(processor(form), processor(path))
    with pytest.raises(ValueError, match="another machine, 'host'"):
        processor("file://host/a.png")
    for url in ("http://x/a.png", "s3://bucket/a.png"):
        with pytest.raises(ValueError, match="is a URL: download it"):
            processor(url)


def test_a_file_is_closed_again(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(Image.fromarray(rgb(20, 30))))
    (tmp_path / "b.png").write_bytes(b"rubbish")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        processor(path)
        with pytest.raises(ValueError, match="cannot|can identify"):
            processor(tmp_path / "b.png")
    assert len(os.listdir("/proc/self/fd")) == before
    with open_regular(path) as file:
        assert stat.S_ISREG(os.fstat(file.fileno()).st_mode)
