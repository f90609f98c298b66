"""What the processor does not take is an error that names the image and what was expected."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from pixels import processor, reference, rgb


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
