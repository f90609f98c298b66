"""The processor's sizes, pixels and configuration files are those of transformers' PIL-backed processor."""

import importlib.util
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pixels import Reference, get_image_size_for_max_num_patches, processor, reference, rgb, same

from siglip2_packed.packing import PackedPatches
from siglip2_packed.preprocess import Siglip2PackedImageProcessor, resized_grid

PHOTOGRAPHS = [
    *("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "camera.png"),
    *("logo.png", "horse.png", "no_time_for_that_tiny.gif", "page.png", "multipage.tif"),
]


def photograph(name):
    skimage = importlib.util.find_spec("skimage")
    if skimage is None:
        pytest.skip("scikit-image's photographs are not installed")
    return Path(skimage.submodule_search_locations[0]) / "data" / name


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
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"patch_size": 4, "size": None, "unknown": 0}))
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
