"""The processor's pixels, sizes, inputs and errors, against transformers' PIL-backed processor where there is one."""

import importlib.util
import io
import json
import math
import pickle
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from siglip2_packed.packing import PackedPatches
from siglip2_packed.preprocess import Siglip2PackedImageProcessor, resized_grid

try:  # transformers 5
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil as Reference
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches
except ImportError:
    from transformers.models.siglip2.image_processing_siglip2 import Siglip2ImageProcessor as Reference
    from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

V5 = Reference.__name__.endswith("Pil")
PHOTOGRAPHS = [
    *("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "camera.png"),
    *("logo.png", "horse.png", "no_time_for_that_tiny.gif", "page.png", "multipage.tif"),
]

processor = Siglip2PackedImageProcessor()


def photograph(name):
    skimage = importlib.util.find_spec("skimage")
    if skimage is None:
        pytest.skip("scikit-image's photographs are not installed")
    return Path(skimage.submodule_search_locations[0]) / "data" / name


def reference(image, **settings):
    """transformers' patches without the padding, and their (h, w)."""
    batch = Reference(**settings)(image, return_tensors="pt")
    h, w = batch["spatial_shapes"][0].tolist()
    return batch["pixel_values"][0, : h * w].float(), (h, w)


def rgb(height, width, seed=0):
    """uint8 noise that holds every level: a wrong rounding of any of them shows."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels.reshape(-1)[:256] = np.arange(256)
    return pixels


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def same(a, b):
    assert a["grid_thw"].tolist() == b["grid_thw"].tolist()
    assert torch.isfinite(a["pixel_values"]).all()
    assert torch.equal(a["pixel_values"], b["pixel_values"])


# Sizes


@pytest.mark.parametrize(
    ("height", "width", "budget", "expected"),
    [
        (639, 31, 64, (32, 2)),
        (639, 31, 256, (64, 4)),
        (639, 31, 1024, (145, 7)),
        (1, 100_000, 256, (1, 256)),
        (100_000, 1, 256, (256, 1)),
        (1, 100_000, 1, (1, 1)),
        (480, 640, 1, (1, 1)),
        (480, 640, 256, (14, 18)),
        (3024, 4032, 256, (14, 18)),
        (512, 512, 256, (16, 16)),
        (60, 100, 256, (12, 20)),
        (40, 20, 256, (22, 11)),
        (1, 1, 256, (7, 7)),  # enlarged 100 times at most
        (1, 10**9, 1, (1, 1)),
        (10**8, 10**9, 10, (1, 10)),
    ],
)
def test_size_table(height, width, budget, expected):
    assert resized_grid(height, width, 16, budget) == expected
    assert math.prod(expected) <= budget


def test_sizes_equal_transformers():
    draw = random.Random(0)
    for _ in range(2000):
        height, width = (int(math.exp(draw.uniform(0, 10))) for _ in range(2))
        patch_size, budget = draw.choice([4, 14, 16, 32]), int(math.exp(draw.uniform(0, 8)))
        h, w = resized_grid(height, width, patch_size, budget)
        theirs = get_image_size_for_max_num_patches(height, width, patch_size, budget)
        assert (h * patch_size, w * patch_size) == theirs, (height, width, patch_size, budget)
        assert h * w <= budget


@pytest.mark.parametrize("budget", [0, -1, 256.0, "256", None, True])
def test_budget_must_be_a_positive_integer(budget):
    with pytest.raises(ValueError, match="max_num_patches must be a positive integer, got "):
        resized_grid(480, 640, 16, budget)
    if budget is not None:
        with pytest.raises(ValueError, match="max_num_patches must be a positive integer, got "):
            processor(rgb(16, 16), max_num_patches=budget)
    assert resized_grid(480, 640, 16, np.int64(256)) == (14, 18)


# Pixels


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_equal_transformers(name):
    image = Image.open(photograph(name)).convert("RGB")
    for settings in ({}, {"max_num_patches": 61}):
        expected, grid = reference(image, **settings)
        packed = Siglip2PackedImageProcessor(**settings)(photograph(name))
        assert packed["grid_thw"].tolist() == [[1, *grid]]
        assert packed["pixel_values"].dtype == torch.float32
        assert torch.isfinite(expected).all()
        assert torch.equal(packed["pixel_values"], expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.7, 0.8, 0.9], "rescale_factor": 1 / 127.5},
        {"image_mean": [0.4, 0.4, 0.4], "image_std": [1, 1, 1], "patch_size": 14, "max_num_patches": 100},
        {"resample": 3},
        {"resample": 0},
        {"do_normalize": False},
    ],
)
def test_settings_equal_transformers(settings):
    image = Image.fromarray(rgb(70, 110))
    expected, _ = reference(image, **settings)
    assert torch.equal(Siglip2PackedImageProcessor(**settings)(image)["pixel_values"], expected)
    assert torch.equal(processor(image, **settings)["pixel_values"], expected)  # for this call only
    assert processor.to_dict() == Siglip2PackedImageProcessor().to_dict()


def test_mean_and_std_may_be_numbers():
    image = rgb(30, 50)
    same(processor(image, image_mean=0.3, image_std=[0.6]), processor(image, image_mean=[0.3] * 3, image_std=[0.6] * 3))


@pytest.mark.parametrize("do_resize", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_unit_floats_equal_transformers_without_rescale(do_resize, dtype):
    image = np.random.default_rng(0).random((48, 80, 3)).astype(dtype)
    settings = {"do_rescale": False, "do_resize": do_resize}
    expected, grid = reference(image, **settings)
    packed = processor(image, **settings)
    assert packed["grid_thw"].tolist() == [[1, *grid]]
    if dtype == np.float32 or do_resize:
        assert torch.equal(packed["pixel_values"], expected)
    else:  # theirs normalises in float64
        assert (packed["pixel_values"] - expected).abs().max() < 1e-6
    same(processor(image), processor(image, do_rescale=False))


def test_patch_layout():
    """Raster order, each patch (py, px, c), c fastest."""
    image = np.random.default_rng(0).random((32, 48, 3)).astype(np.float32)
    packed = processor(image, do_resize=False, do_normalize=False)
    for n, (i, j) in enumerate((i, j) for i in range(2) for j in range(3)):
        patch = image[16 * i : 16 * i + 16, 16 * j : 16 * j + 16]
        assert np.array_equal(packed["pixel_values"][n].numpy().reshape(16, 16, 3), patch)


def test_stretched_never_padded():
    large, small = rgb(302, 403), rgb(60, 100)
    packed = processor([large, small])
    assert isinstance(packed, PackedPatches)
    assert packed["grid_thw"].tolist() == [[1, 14, 18], [1, 12, 20]]
    assert packed["pixel_values"].shape == (14 * 18 + 12 * 20, 768)
    assert packed["cu_seqlens"].tolist() == [0, 252, 492]
    assert packed["max_seqlen"] == 252
    for rows, image in zip(packed["pixel_values"].split([252, 240]), (large, small)):
        assert torch.equal(rows, reference(Image.fromarray(image))[0])


# Forms of one image


def forms(pixels, folder):
    image = Image.fromarray(pixels)
    path = folder / "image.png"
    image.save(path)
    chw = torch.from_numpy(pixels).permute(2, 0, 1)
    return {
        "PIL": image,
        "path": path,
        "str": str(path),
        "bytes": path.read_bytes(),
        "bytearray": bytearray(path.read_bytes()),
        "BytesIO": io.BytesIO(path.read_bytes()),
        "uint8 hwc": pixels,
        "uint8 hwc fortran": np.asfortranarray(pixels),
        "uint8 chw": pixels.transpose(2, 0, 1),
        "uint16": pixels.astype(np.uint16) * 257,
        "uint16 big-endian": (pixels.astype(np.uint16) * 257).astype(">u2"),
        "int64": pixels.astype(np.int64),
        "int32 of 16 bits": pixels.astype(np.int32) * 257,
        "float32 of 8 bits": pixels.astype(np.float32),
        "float64 / 255": pixels / 255,
        "float32 / 255": (pixels / 255).astype(np.float32),
        "float32 * (1 / 255)": pixels.astype(np.float32) * np.float32(1 / 255),
        "float16 / 255": (pixels / 255).astype(np.float16),
        "tensor uint8": chw,
        "tensor float": chw / 255,
        "tensor requires_grad": (chw / 255).requires_grad_(),
        "tensor half": (chw / 255).half(),
        "tensor bfloat16": (chw / 255).bfloat16(),
        "tensor bfloat16 of 8 bits": chw.bfloat16(),
        "tensor hwc": chw.permute(1, 2, 0),
        "rgba": np.dstack([pixels, pixels[:, :, 0]]),
        "rgba float": np.dstack([pixels, pixels[:, :, 0]]) / 255,
        "rgba chw": np.dstack([pixels, pixels[:, :, 0]]).transpose(2, 0, 1),
    }


def test_every_form_gives_the_same_patches(tmp_path):
    pixels = rgb(23, 37)
    expected, (h, w) = reference(Image.fromarray(pixels))
    every = forms(pixels, tmp_path)
    for name, form in every.items():
        packed = processor(form)
        assert packed["grid_thw"].tolist() == [[1, h, w]], name
        assert torch.equal(packed["pixel_values"], expected), name
    packed = processor(list(every.values()))
    for rows, name in zip(packed["pixel_values"].split(h * w), every, strict=True):
        assert torch.equal(rows, expected), name
    with (tmp_path / "image.png").open("rb") as file:
        file.read(5)
        same(processor([file, file]), processor([pixels, pixels]))


def test_every_form_of_grey_and_black_and_white():
    grey = rgb(23, 37)[:, :, 0]
    expected = processor(np.dstack([grey] * 3))
    for form in (grey, grey[None], grey[:, :, None], torch.from_numpy(grey), grey / 255, Image.fromarray(grey)):
        same(processor(form), expected)
    mask = grey > 127
    for form in (mask, torch.from_numpy(mask), mask.astype(np.float32), Image.fromarray(mask)):
        same(processor(form), processor(mask.astype(np.uint8) * 255))


def test_16_bits_are_rounded_to_8():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values / 257).astype(np.uint8)
    same(processor(values), processor(expected))
    same(processor(Image.fromarray(values)), processor(expected))
    same(processor(Image.fromarray(values.astype(np.int32))), processor(expected))
    same(processor(encode(Image.fromarray(values))), processor(expected))


def test_unresized_8_bit_floats_equal_transformers():
    image = np.random.default_rng(0).uniform(0, 255, (32, 48, 3)).astype(np.float32)
    expected, _ = reference(image, do_resize=False)
    assert torch.equal(processor(image, do_resize=False)["pixel_values"], expected)


MODES = ["1", "L", "LA", "La", "P", "P+tRNS", "RGB", "RGB+tRNS", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]


def in_mode(mode, size=(64, 48)):
    image = Image.fromarray(rgb(size[1], size[0]))
    alpha = image.getchannel(0)
    if mode == "P+tRNS":
        image = image.quantize(16)
        image.info["transparency"] = 3
    elif mode == "RGB+tRNS":
        image.info["transparency"] = image.getpixel((5, 5))
    elif mode in ("LA", "La", "RGBA", "RGBa"):
        image = image.convert(mode.upper())
        image.putalpha(alpha)
        image = image.convert(mode)
    elif mode == "LAB":
        image = Image.fromarray(np.asarray(image), mode="RGB")
        image = Image.merge("LAB", image.split())
    else:
        image = image.convert(mode)
    assert image.mode == mode.split("+")[0]
    return image


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated", "ignore:Palette images")
def test_modes_as_pillow_converts_them(mode):
    image = in_mode(mode)
    converted = (image.convert("LA") if mode == "La" else image).convert("RGB")
    packed = processor(image)
    assert packed["grid_thw"].tolist() == [[1, 14, 18]]
    assert torch.equal(packed["pixel_values"], reference(converted)[0])
    if not mode.startswith("RGB") or mode in ("RGBA", "RGBa", "RGBX"):
        with pytest.raises(ValueError, match=rf"image 1: mode {mode.split('+')[0]} is not RGB"):
            processor([in_mode("RGB"), image], do_convert_rgb=False)


@pytest.mark.parametrize("mode", ["I", "F", "I;16", "I;16B"])
def test_wide_modes_follow_the_array_rules(mode):
    levels = rgb(48, 64)[:, :, 0]
    if mode.startswith("I;16"):
        wide = (levels.astype(np.uint16) * 257).astype(">u2" if mode == "I;16B" else "<u2")
        image = Image.frombytes(mode, (64, 48), wide.tobytes())
    else:
        image = Image.fromarray(levels).convert(mode)
    assert image.mode == mode
    same(processor(image), processor(levels))
    with pytest.raises(ValueError, match=rf"image 0: mode {mode} is not RGB"):
        processor(image, do_convert_rgb=False)


def test_order_of_a_mixed_batch_is_irrelevant():
    images = [in_mode(mode, (64 + i, 48)) for i, mode in enumerate(("RGB", "L", "RGBA", "CMYK", "1", "I", "F"))]
    alone = [processor(image)["pixel_values"] for image in images]
    for order in ([0, 1, 2, 3, 4, 5, 6], [6, 1, 4, 0, 5, 3, 2]):
        rows = processor([images[i] for i in order])["pixel_values"]
        assert torch.equal(rows, torch.cat([alone[i] for i in order]))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P+tRNS", "RGB+tRNS", "La", "CMYK"])
def test_transparency_over_white(mode):
    image = in_mode(mode)
    if mode == "La":
        image = image.convert("LA")
    rgba = np.asarray(image.convert("RGBA"), dtype=np.float64)
    alpha = rgba[:, :, 3:] / 255
    composite = np.rint(rgba[:, :, :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    packed = processor(in_mode(mode), do_convert_rgb=True)
    same(packed, processor(composite))
    assert torch.equal(packed["pixel_values"], processor(image)["pixel_values"]) == (mode == "CMYK")
    if V5:
        assert torch.equal(packed["pixel_values"], reference(image, do_convert_rgb=True)[0])
    if mode == "RGBA":
        array = np.asarray(image)
        same(processor(array, do_convert_rgb=True), packed)
        same(processor(array.transpose(2, 0, 1) / 255, do_convert_rgb=True), packed)
        unresized = processor((array / 255).astype(np.float32), do_convert_rgb=True, do_resize=False)
        eight_bit = processor(composite, do_resize=False)
        assert (unresized["pixel_values"] - eight_bit["pixel_values"]).abs().max() <= 1.01 / 255


def test_channel_axis():
    for shape in ([3, 20, 3], [1, 4, 4], [3, 3, 3], [4, 30, 1]):
        array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        with pytest.raises(ValueError, match=r"image 0: shape .* pass input_data_format="):
            processor(array)
        first = processor(array, input_data_format="channels_first")
        last = processor(array, input_data_format="channels_last")
        assert first["grid_thw"].tolist()[0][1:] == list(resized_grid(shape[1], shape[2], 16, 256))
        assert last["grid_thw"].tolist()[0][1:] == list(resized_grid(shape[0], shape[1], 16, 256))
        same(last, processor(array.transpose(2, 0, 1), input_data_format="channels_first"))


# Errors


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((48, 64, 3), np.float32) - 0.5, r"float32 pixels in \[-0.5, -0.5\]; expected \[0, 1\] or \[0, 255\]"),
        (np.full((4, 5), 255.5), r"float64 pixels in \[255.5, 255.5\]"),
        (np.array([[0.5, np.nan]]), r"float64 pixels in \[nan, nan\]"),
        (np.array([[0.5, np.inf]]), r"float64 pixels in \[0.5, inf\]"),
        (torch.tensor([[-1.0, 1.0]]).bfloat16(), r"bfloat16 pixels in \[-1, 1\].* x / 2 \+ 0.5"),
        (np.array([[0, -1]]), r"int64 pixels in \[-1, 0\]; expected 8 bits \[0, 255\] or 16 bits"),
        (np.array([[0, 65536]]), r"int64 pixels in \[0, 65536\]"),
        (Image.new("F", (4, 4), -2.0), r"float32 pixels in \[-2, -2\]"),
        (np.zeros((4, 5), complex), "dtype complex128"),
        (np.array([[None]]), "dtype object"),
        (np.zeros((20, 30, 2), np.uint8), r"shape \[20, 30, 2\] has no channel axis"),
        (np.zeros((0, 30, 3), np.uint8), r"got shape \[0, 30, 3\]"),
        (np.zeros(7, np.uint8), r"got shape \[7\]"),
        (np.uint8(3), r"got shape \[\]"),
        (None, "got NoneType"),
        ({"bytes": b""}, "got dict"),
        (7, "got int"),
        ("https://example.com/a.jpg", "is a URL: download it"),
        ("missing.jpg", "FileNotFoundError"),
        (io.StringIO("text"), "TypeError"),
    ],
)
def test_unusable_image_is_named(image, message):
    good = rgb(20, 30)
    with pytest.raises(ValueError, match=r"^image 2( \('missing.jpg'\)| \('https.*'\))?: .*" + message):
        processor([good, good, image])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (rgb(16, 16), r"uint8 pixels in \[0, 255\]"),
        (Image.fromarray(rgb(16, 16)), r"mode RGB \(uint8\) pixels in \[0, 255\]"),
        (rgb(16, 16).astype(np.float32), r"float32 pixels in \[0, 255\]"),
        (np.full((16, 16), 9), r"int64 pixels in \[9, 9\]"),
        (np.ones((16, 16), bool), r"bool pixels in \[1, 1\]"),
    ],
)
def test_without_rescale_only_unit_floats(image, message):
    good = np.ones((16, 16, 3), np.float32)
    for do_resize in (True, False):
        with pytest.raises(
            ValueError, match=r"image 1: do_rescale=False takes floating pixels in \[0, 1\], got " + message
        ):
            processor([good, image], do_rescale=False, do_resize=do_resize)


def test_without_resize():
    packed = processor(rgb(512, 640), do_resize=False)
    assert packed["grid_thw"].tolist() == [[1, 32, 40]]  # every patch, whatever the budget
    assert packed["pixel_values"].shape == (1280, 768)
    small = rgb(48, 64)
    assert torch.equal(processor(small, do_resize=False)["pixel_values"], reference(small, do_resize=False)[0])
    with pytest.raises(ValueError, match=r"image 1: 50x64 \(height x width\) is not a multiple of patch_size 16"):
        processor([small, rgb(50, 64)], do_resize=False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"patch_size": 0}, ValueError, "patch_size must be a positive integer, got 0"),
        ({"num_threads": 0}, ValueError, "num_threads"),
        ({"image_mean": [0.5, 0.5]}, ValueError, "image_mean must be 1 or 3"),
        ({"image_std": [0.5, 0, 0.5]}, ValueError, "image_std must not hold 0"),
        ({"image_std": float("nan")}, ValueError, "image_std must be 1 or 3 finite"),
        ({"resample": 17}, ValueError, "17"),
        ({"input_data_format": "hwc"}, ValueError, "channels_first"),
        ({"on_error": "ignore"}, ValueError, "'raise' or 'skip'"),
        ({"return_tensors": "np"}, ValueError, "None or 'pt'"),
        ({"padding": True}, TypeError, "padding"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        processor(rgb(16, 16), **arguments)


# Files


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


# Batches, videos


@pytest.mark.parametrize("images", [None, [], (), iter([])])
def test_empty(images):
    packed = processor(images)
    assert packed["pixel_values"].shape == (0, 768)
    assert packed["pixel_values"].dtype == torch.float32
    assert packed["grid_thw"].shape == (0, 3)
    assert packed["cu_seqlens"].tolist() == [0]
    assert processor(images, patch_size=14)["pixel_values"].shape == (0, 588)


def test_4d_is_a_batch_of_images():
    batch = np.stack([rgb(20, 30, seed) for seed in range(3)])
    expected = processor(list(batch))
    assert expected["grid_thw"].shape == (3, 3)
    for form in (
        batch,
        torch.from_numpy(batch),
        batch.transpose(0, 3, 1, 2),
        torch.from_numpy(batch) / 255,
        iter(batch),
    ):
        same(processor(form), expected)


def test_videos():
    clip = np.stack([rgb(20, 30, seed) for seed in range(5)])
    other = clip[:2, :, :18]
    still = rgb(40, 20)
    expected = processor(list(clip), max_num_patches=100)
    h, w = resized_grid(20, 30, 16, 100)
    pil = [Image.fromarray(frame) for frame in clip]
    for form in (
        clip,
        torch.from_numpy(clip),
        clip.transpose(0, 3, 1, 2),
        list(clip),
        pil,
        [clip],
        [pil],
        clip[None],
        iter(pil),
    ):
        packed = processor(videos=form, max_num_patches=100)
        assert packed["grid_thw"].tolist() == [[5, h, w]]
        assert torch.equal(packed["pixel_values"], expected["pixel_values"])
        assert packed["cu_seqlens"].tolist() == [h * w * i for i in range(6)]
    packed = processor([still, clip, pil], videos=[other])
    assert packed["grid_thw"].tolist() == [[1, 22, 11], [5, 13, 19], [5, 13, 19], [2, 17, 15]]
    assert packed.kept == [0, 1, 2, 3]
    alone = [processor(still), processor(videos=clip), processor(videos=pil), processor(videos=other)]
    assert torch.equal(packed["pixel_values"], torch.cat([each["pixel_values"] for each in alone]))
    assert processor(videos=[])["grid_thw"].shape == (0, 3)


def test_video_has_one_scale():
    clip = np.stack([rgb(20, 30), np.full((20, 30, 3), 1, np.uint8), rgb(20, 30, 1)])
    for dtype in (np.float32, np.int32):
        for form in (clip.astype(dtype), list(clip.astype(dtype)), torch.from_numpy(clip.astype(dtype))):
            same(processor(videos=form), processor(videos=clip))
    dark = clip.astype(np.int32) * 257
    dark[1] = 200
    same(
        processor(videos=dark),
        processor(videos=[dark[0].astype(np.uint16), dark[1].astype(np.uint16), dark[2].astype(np.uint16)]),
    )
    nan = clip / 255
    nan[1, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"video 0, frame 0: float64 pixels in \[nan, nan\]"):
        processor(videos=nan)


@pytest.mark.parametrize(
    ("images", "videos", "message"),
    [
        (
            [rgb(20, 30), [rgb(20, 30), rgb(20, 30, 1), rgb(30, 20)]],
            None,
            "image 1, frame 2: 30x20 .* frame 0 is 20x30",
        ),
        (None, [[rgb(20, 30)], [rgb(20, 30), rgb(21, 30)]], "video 1, frame 1: 21x30 .* frame 0 is 20x30"),
        ([[rgb(20, 30), b"x"]], None, "image 0, frame 1: not an image"),
        ([[]], None, "image 0: a video needs at least one frame"),
        (None, [[rgb(20, 30)], rgb(20, 30)], "mixes whole videos and single frames"),
        (None, rgb(20, 30), r"videos must be a 4-D array .* got shape \[20, 30, 3\]"),
        (None, "clip.mp4", "videos must be a 4-D array .* got str"),
    ],
)
def test_wrong_videos(images, videos, message):
    with pytest.raises(ValueError, match=message):
        processor(images, videos)


def test_video_with_a_broken_frame_is_left_out_whole():
    clip = [rgb(20, 30, seed) for seed in range(3)]
    with pytest.warns(UserWarning, match="left out 2 of 4"):
        packed = processor([[*clip, b"x"], clip], [[clip[0], rgb(10, 10)], clip], on_error="skip")
    assert packed.kept == [1, 3]
    assert [index for index, _, _ in packed.skipped] == [0, 2]
    same(packed, processor([clip, clip]))


def test_threads_change_nothing(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.fromarray(rgb(60, 90)).save(path)
    lazy = Image.open(path)  # not decoded yet, and asked for many times
    images = [rgb(20 + i, 60 - i, i) for i in range(20)] + [path, lazy, lazy, lazy, lazy, path.read_bytes()]
    expected = processor(images, num_threads=1)
    for num_threads in (2, 8, None):
        same(processor(images, num_threads=num_threads) if num_threads else processor(images), expected)


def test_in_a_data_loader():
    images = [rgb(20 + i, 30, i) for i in range(4)]
    loader = torch.utils.data.DataLoader(images, batch_size=2, collate_fn=processor, num_workers=1)
    for packed, pair in zip(loader, (images[:2], images[2:]), strict=True):
        same(packed, processor(pair))
    same(pickle.loads(pickle.dumps(processor))(images), processor(images))


# Configuration files


def test_save_and_load(tmp_path):
    settings = {
        "max_num_patches": 100,
        "patch_size": 14,
        "image_mean": [0.1, 0.2, 0.3],
        "do_convert_rgb": True,
        "resample": 3,
    }
    saved = Siglip2PackedImageProcessor(**settings)
    saved.save_pretrained(tmp_path / "new")
    assert Siglip2PackedImageProcessor.from_pretrained(tmp_path / "new").to_dict() == saved.to_dict()
    assert Siglip2PackedImageProcessor.from_pretrained(str(tmp_path / "new"), max_num_patches=7).max_num_patches == 7

    image = Image.fromarray(rgb(70, 110))
    theirs = Reference.from_pretrained(tmp_path / "new")
    rows = theirs(image, return_tensors="pt")
    assert torch.equal(rows["pixel_values"][0][rows["pixel_attention_mask"][0] == 1], saved(image)["pixel_values"])
    assert (
        json.loads((tmp_path / "new" / "preprocessor_config.json").read_text())["image_processor_type"]
        == "Siglip2ImageProcessor"
    )

    theirs.save_pretrained(tmp_path / "theirs")
    assert Siglip2PackedImageProcessor.from_pretrained(tmp_path / "theirs").to_dict() == saved.to_dict()


def test_config_files(tmp_path):
    load = Siglip2PackedImageProcessor.from_pretrained
    with pytest.raises(OSError, match=rf"{tmp_path} holds no preprocessor_config.json"):
        load(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "Siglip2Processor"}))
    with pytest.raises(OSError, match="holds no preprocessor_config"):
        load(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"patch_size": 4, "size": None, "unknown": 1}))
    assert (load(tmp_path).patch_size, load(tmp_path).max_num_patches) == (4, 256)
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": {"patch_size": 8, "image_mean": None}})
    )
    assert (load(tmp_path).patch_size, load(tmp_path).image_mean) == (8, (0.5, 0.5, 0.5))
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(OSError, match=r"processor_config\.json is not a JSON file"):
        load(tmp_path)
    with pytest.raises(OSError, match="is not a folder"):
        load(tmp_path / "missing")
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(TypeError, match="padding"):
        load(tmp_path, padding=True)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "SiglipImageProcessor", "size": {}})
    )
    with pytest.raises(ValueError, match="SiglipImageProcessor: a fixed-resolution SigLIP"):
        load(tmp_path)
    with pytest.raises(OSError, match="nobody/nothing"):
        load("nobody/nothing", local_files_only=True)


def test_preprocess_is_the_call():
    image = rgb(20, 30)
    same(processor.preprocess(image, return_tensors="pt"), processor(image))
    assert "siglip" in type(processor).__name__.lower()
    assert "max_num_patches=256" in repr(processor)
