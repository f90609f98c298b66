"""Files as they are met: turned, of several frames, broken; skipped or named."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps
from pixels import encode, processor, rgb, same


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(rgb(20, 40)), "JPEG", exif=exif)
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    expected = processor(np.asarray(ImageOps.exif_transpose(Image.open(path))))
    for form in (path, str(path), data, io.BytesIO(data), Image.open(path)):
        packed = processor(form)
        same(packed, expected)
        assert packed["grid_thw"].tolist() == [[1, 22, 11] if orientation >= 5 else [1, 11, 22]]
    upright = Image.open(path)
    processor(upright)
    assert upright.size == (40, 20)  # the caller's image is not turned
    tiff = encode(Image.fromarray(rgb(20, 40)), "TIFF", tiffinfo={0x0112: orientation})
    same(processor(tiff), processor(np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(tiff))))))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1"]
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_corrupt_exif_counts_as_none(exif):
    image = Image.fromarray(rgb(20, 40))
    same(processor(encode(image, "PNG", exif=exif)), processor(image))


def broken_files(folder):
    jpeg = encode(Image.fromarray(rgb(60, 80)), "JPEG")
    contents = {
        "half.jpg": jpeg[: len(jpeg) // 2],
        "empty.jpg": b"",
        "text.jpg": b"not an image",
        "header.png": b"\x89PNG",
    }
    contents["bomb.png"] = encode(Image.new("1", (70, 60)))
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in contents] + [folder, folder / "missing.png"]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("num_threads", [1, 4])
def test_broken_files(tmp_path, monkeypatch, num_threads):
    good = [Image.fromarray(rgb(20 + i, 30)) for i in range(8)]
    broken = broken_files(tmp_path)
    for limit in (4000, 1000):  # Pillow itself warns at 4200 pixels, and raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for path in broken:
            with pytest.raises(ValueError, match=rf"^image 4 \('.*{path.name}'\): ") as caught:
                processor([*good[:4], path, *good[4:]], num_threads=num_threads)
            assert caught.value.__cause__ is not None
        with pytest.raises(ValueError, match=f"MAX_IMAGE_PIXELS = {limit}"):
            processor(tmp_path / "bomb.png")

    mixed = [*good[:4], *broken, *good[4:]]
    with pytest.warns(UserWarning, match="left out 7 of 15 images") as caught:
        packed = processor(mixed, on_error="skip", num_threads=num_threads)
    assert len([w for w in caught if w.category is UserWarning]) == 1
    same(packed, processor(good))
    assert packed.kept == [0, 1, 2, 3, 11, 12, 13, 14]
    assert [index for index, _, _ in packed.skipped] == [4, 5, 6, 7, 8, 9, 10]
    assert [name for _, name, _ in packed.skipped] == [str(path) for path in broken]
    assert all(reason for _, _, reason in packed.skipped)

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # the user lifted it
    assert processor(tmp_path / "bomb.png")["grid_thw"].shape == (1, 3)


def test_skipping_everything_leaves_an_empty_pack():
    with pytest.warns(UserWarning, match="left out 2 of 2"):
        packed = processor([b"", b"x"], on_error="skip")
    assert packed["pixel_values"].shape == (0, 768)
    assert packed.kept == []


def test_nothing_skipped_nothing_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = processor([rgb(20, 30)] * 2, on_error="skip")
    assert (packed.kept, packed.skipped) == ([0, 1], [])


def test_pillow_limits_are_left_alone():
    assert Image.MAX_IMAGE_PIXELS == 1024 * 1024 * 1024 // 4 // 3
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_first_frame_of_several(kind):
    frames = [Image.fromarray(rgb(20, 30, seed)).quantize(8).convert("RGB") for seed in range(3)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    same(processor(data), processor(frames[0]))
