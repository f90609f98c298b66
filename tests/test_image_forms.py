"""One image in every form, mode, scale and channel order gives the same patches."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from pixels import V5, encode, processor, reference, rgb, same

from siglip2_packed.preprocess import resized_grid


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
