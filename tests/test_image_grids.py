"""Grids from file headers: those of the processor, whatever the format and orientation, without decoding."""

import io
import itertools
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from siglip2_packed import Siglip2PackedImageProcessor
from siglip2_packed.data import image_grid, image_grids

ORIENTATION = 0x0112


def encoded(size, form="JPEG", orientation=None, mode="RGB", **options):
    file = io.BytesIO()
    exif = Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    Image.new(mode, size, 90).save(file, form, **options)
    return file.getvalue()


def processor_grid(processor, source):
    return tuple(processor(source)["grid_thw"][0].tolist())


def test_header_grids_equal_the_processors_over_random_sizes(tmp_path):
    rng = random.Random(0)
    processor = Siglip2PackedImageProcessor(patch_size=16, max_num_patches=64)
    files = []
    for i, size in enumerate(
        [(31, 639), (639, 31), (1, 1), (1, 300), (300, 1)]
        + [(rng.randint(1, 400), rng.randint(1, 400)) for _ in range(235)]
    ):
        path = tmp_path / f"{i}"
        form = ("JPEG", "PNG", "WEBP")[i % 3]
        path.write_bytes(encoded(size, form, orientation=(None, 1, 2, 3, 4, 5, 6, 7, 8)[i // 3 % 9], mode="RGB"))
        files.append(path)
    found = image_grids(files, processor)
    expected = torch.cat([processor([file])["grid_thw"] for file in files])
    assert found.dtype == torch.int64 and found.shape == (240, 3)
    assert torch.equal(found, expected)
    assert (found[:, 1] != found[:, 2]).sum() > 200


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [None, *range(0, 10)])
def test_header_grids_honour_the_orientation(form, orientation):
    processor = Siglip2PackedImageProcessor(patch_size=16, max_num_patches=256)
    source = encoded((40, 20), form, orientation)
    expected = processor_grid(processor, source)
    assert expected == ((1, 22, 11) if orientation in (5, 6, 7, 8) else (1, 11, 22))
    assert image_grid(source, processor) == expected
    assert image_grid(Image.open(io.BytesIO(source)), processor) == expected
    assert image_grid(io.BytesIO(source), processor) == expected


@pytest.mark.parametrize("form", ["BMP", "GIF", "ICO", "PPM", "TGA", "JPEG2000", "MPO"])
def test_header_grids_of_other_formats(form):
    processor = Siglip2PackedImageProcessor(patch_size=4, max_num_patches=64)
    source = encoded((48, 20), form)
    assert image_grid(source, processor) == processor_grid(processor, source)


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_png_orientation_in_any_place():
    processor = Siglip2PackedImageProcessor(patch_size=16, max_num_patches=64)
    plain = encoded((40, 20), "PNG")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x tiff:Orientation="6"/>'
    blocks = [png_chunk(b"eXIf", exif.tobytes()[6:]), png_chunk(b"iTXt", xmp)]
    after_header, end = 8 + 25, len(plain) - 12
    for block, place in itertools.product(blocks, (after_header, end)):
        source = plain[:place] + block + plain[place:]
        assert image_grid(source, processor) == processor_grid(processor, source) == (1, 10, 5), (block, place)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_header_grids_decode_nothing(form, monkeypatch):
    processor = Siglip2PackedImageProcessor(patch_size=16, max_num_patches=64)
    sources = [encoded((300, 200), form), encoded((300, 200), form, 6) if form in ("JPEG", "PNG", "WEBP") else None]
    sources = [source for source in sources if source]
    expected = [processor_grid(processor, source) for source in sources]

    def refuse(image):
        raise AssertionError("decoded")

    for name in ("PIL.ImageFile.ImageFile", "PIL.WebPImagePlugin.WebPImageFile", "PIL.Image.Image"):
        monkeypatch.setattr(f"{name}.load", refuse)
    assert [image_grid(source, processor) for source in sources] == expected


def test_header_grids_of_damaged_files(tmp_path):
    processor = Siglip2PackedImageProcessor(max_num_patches=64)
    good = encoded((640, 480))
    sources = {"good.jpg": good, "text.jpg": b"not an image", "empty.jpg": b"", "cut.jpg": good[: len(good) // 2]}
    files = [tmp_path / name for name in sources]
    for file, content in zip(files, sources.values()):
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"image 1 \('.*text.jpg'\): not an image"):
        image_grids(files, processor)
    with pytest.warns(UserWarning, match="2 of 4 images have no grid; the first is image 1"):
        found = image_grids(files, processor, on_error="skip")
    assert found.prod(dim=1).gt(0).tolist() == [True, False, False, True]
    assert tuple(found[0].tolist()) == processor_grid(processor, files[0])
    with pytest.raises(ValueError, match="image 0.*No such file"):
        image_grids([tmp_path / "absent.jpg"], processor)
    with pytest.raises(ValueError, match="on_error"):
        image_grids([], processor, on_error="ignore")
    assert image_grids([], processor).shape == (0, 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_header_grids_keep_to_pillows_limit_and_to_do_resize(monkeypatch):
    fixed = Siglip2PackedImageProcessor(do_resize=False)
    assert image_grid(encoded((64, 48), "PNG"), fixed) == (1, 3, 4)
    with pytest.raises(ValueError, match="50x64 .height x width. is not a multiple of patch_size 16"):
        image_grid(encoded((64, 50), "PNG"), fixed)
    assert image_grid(np.zeros((48, 64, 3), np.uint8), fixed) == (1, 3, 4)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 - 1)
    with pytest.raises(ValueError, match="MAX_IMAGE_PIXELS = 3071"):
        image_grid(encoded((64, 48), "PNG"), fixed)


@pytest.mark.parametrize("one", ["cat.jpg", Path("cat.jpg"), b"bytes"])
def test_one_image_is_no_list(one):
    with pytest.raises(ValueError, match="sources must be a list of images, got one"):
        image_grids(one, Siglip2PackedImageProcessor())


@pytest.mark.parametrize("threads", [0, -1, 1.5, True])
def test_threads_are_a_whole_number(threads):
    with pytest.raises(ValueError, match=f"num_threads must be .*{threads}"):
        image_grids([], Siglip2PackedImageProcessor(), num_threads=threads)
