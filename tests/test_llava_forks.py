"""The fixed-size tower, as LLaVA-NeXT, LLaVA-OneVision, Bunny and LLaVA-MORE build and call theirs."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from llava_reference import args, close, close_gradients, reference, weight_of
from PIL import Image
from torch import nn

from siglip2_packed import (
    PackedPatches,
    SigLip2NaflexVisionTower,
    SigLipImageProcessor,
    SigLipVisionTower,
    encode_images,
    pad,
)

SIZES = [8, 12, 16, 24, 52]  # pixels; the position table is 4 x 4 patches of 4


def squares(count, size, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def patches_of(images, p=4):
    """`[B, C, S, S]` -> `[T, P]`, each (py, px, c)."""
    columns = F.unfold(images, p, stride=p).mT.unflatten(2, (3, p, p))
    return columns.permute(0, 1, 3, 4, 2).flatten(2).flatten(0, 1)


def expected_of(folder, images, layer=-2):
    side = images.shape[-1] // 4
    batch = pad(patches_of(images), [(1, side, side)] * len(images))
    features, gradients = reference(folder, batch, layer)
    return features.view(len(images), side * side, -1), gradients


@pytest.mark.parametrize("size", SIZES)
def test_features_and_gradients_in_every_form(checkpoint, size):
    folder, images = checkpoint("tiny"), squares(3, size)
    tower = SigLipVisionTower(folder, args(), image_size=size).requires_grad_(True)
    expected, gradients = expected_of(folder, images)
    features = tower(images)
    (features.flatten(0, 1) * weight_of(expected.flatten(0, 1))).sum().backward()
    close(features, expected)
    close_gradients(tower, gradients)
    listed = tower(list(images))
    assert [x.shape for x in listed] == [(1, (size // 4) ** 2, 64)] * 3
    close(torch.cat(listed), expected)
    close(torch.stack(encode_images(tower, nn.Identity(), images)), expected)


@pytest.mark.parametrize("layer", [-1, -2, 0, 3])
def test_select_layer_decides(checkpoint, layer):
    tower = SigLipVisionTower(checkpoint("tiny"), args(mm_vision_select_layer=layer))
    close(tower(squares(2, 16)), expected_of(checkpoint("tiny"), squares(2, 16), layer)[0])


def test_no_images_and_the_dtype_of_images(checkpoint):
    tower = SigLipVisionTower(checkpoint("tiny")).to(torch.bfloat16).requires_grad_(True)
    empty = tower(squares(0, 16))
    assert empty.shape == (0, 16, 64) and empty.requires_grad and tower([]) == []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert tower(squares(2, 16).to(dtype)).dtype == tower(list(squares(2, 16).to(dtype)))[0].dtype == dtype


@pytest.mark.parametrize("build", ["NeXT", "Bunny", "positional"])
def test_what_callers_read(checkpoint, build):
    folder = str(checkpoint("tiny"))
    tower = {
        "NeXT": lambda: SigLipVisionTower(folder, vision_tower_cfg=args(), delay_load=False, image_size=24),
        "Bunny": lambda: SigLipVisionTower(folder, args=args(mm_vision_select_layer=-1), image_size=24),
        "positional": lambda: SigLipVisionTower(folder, args(), False, 24),
    }[build]()
    assert tower.select_layer == (-1 if build == "Bunny" else -2)
    assert tower.is_loaded and tower.vision_tower_name == folder and tower.hidden_size == 64
    assert (tower.num_patches, tower.num_patches_per_side, tower.image_size) == (36, 6, 24)
    assert (tower.config.image_size, tower.config.patch_size, tower.config.hidden_size) == (24, 4, 64)
    processor, inner = tower.image_processor, tower.vision_tower
    assert processor.crop_size["height"] == processor.crop_size["width"] == processor.size["shortest_edge"] == 24
    assert tuple(int(x * 255) for x in processor.image_mean) == (127, 127, 127)
    assert torch.equal(tower.dummy_feature, torch.zeros(1, 64))
    tower.load_model(device_map="cpu")
    assert tower.vision_tower is inner


def test_the_size_is_the_budget_of_the_checkpoint_unless_it_is_said(checkpoint, tmp_path):
    folder = tmp_path / "siglip2"
    shutil.copytree(checkpoint("tiny"), folder)
    path = folder / "preprocessor_config.json"
    fields = json.loads(path.read_text())
    for budget, size in ((16, 16), (49, 28), (1, 4)):
        path.write_text(json.dumps({**fields, "max_num_patches": budget, "do_resize": False}))
        tower = SigLipVisionTower(folder, delay_load=True)
        made = tower.image_processor(Image.new("RGB", (9, 5)))["pixel_values"]
        assert tower.image_size == size and made.shape == (1, 3, size, size)
    path.write_text(json.dumps({**fields, "max_num_patches": 50}))
    for delay_load in (False, True):
        with pytest.raises(ValueError, match="needs a square of patches, and max_num_patches is 50: pass image_size"):
            SigLipVisionTower(folder, delay_load=delay_load)
        with pytest.raises(ValueError, match="image_size 30 is not a multiple of patch_size 4"):
            SigLipVisionTower(folder, delay_load=delay_load, image_size=30)
        for wrong in (0, -4, 16.0, True):
            with pytest.raises(ValueError, match="image_size must be a positive integer"):
                SigLipVisionTower(folder, delay_load=delay_load, image_size=wrong)
    assert SigLipVisionTower(folder, delay_load=True, image_size=24).num_patches == 36


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (squares(2, 12), r"\[2, 3, 12, 12\]"),
        (torch.zeros(2, 3, 8, 32), r"\[2, 3, 8, 32\]"),  # as many patches as a square's
        (squares(2, 16)[0], r"\[3, 16, 16\]"),
        (squares(2, 16)[None], r"\[1, 2, 3, 16, 16\]"),
        (torch.zeros(2, 16, 48), r"\[2, 16, 48\]"),
        (torch.zeros(2, 1, 16, 16), r"\[2, 1, 16, 16\]"),
        ([squares(1, 16)[0], squares(1, 12)[0]], r"a list with \[3, 12, 12\]"),
        ([squares(2, 16)], r"a list with \[2, 3, 16, 16\]"),
        ([np.zeros((3, 16, 16))], "a list with ndarray"),
        (PackedPatches(torch.zeros(16, 48), [(1, 4, 4)]), "PackedPatches"),
        ({"pixel_values": squares(1, 16)}, "dict"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_square_of_the_tower_is_refused(checkpoint, images, found):
    tower = SigLipVisionTower(checkpoint("tiny"))
    with pytest.raises(ValueError, match=rf"takes a tensor \[B, 3, 16, 16\].*got {found}: .*SigLip2NaflexVisionTower"):
        tower(images)


def test_other_inputs_are_refused(checkpoint):
    tower = SigLipVisionTower(checkpoint("tiny"))
    with pytest.raises(ValueError, match="normalised pixels.*uint8"):
        tower(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="4x4 patches, without grid_thw"):
        encode_images(tower, nn.Identity(), squares(1, 16), torch.tensor([[1, 2, 4]]))
    with pytest.raises(RuntimeError, match="load_model"):
        SigLipVisionTower(checkpoint("tiny"), delay_load=True)(squares(1, 16))
    with pytest.raises(ValueError, match="cls_patch"):
        SigLipVisionTower(checkpoint("tiny"), args(mm_vision_select_feature="cls_patch"))


# images


@pytest.mark.parametrize("size", SIZES)
def test_the_processor_makes_squares(checkpoint, size):
    processor = SigLipVisionTower(checkpoint("tiny"), delay_load=True, image_size=size).image_processor
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((13, 76), (40, 1), (size, size))]
    images = [Image.fromarray(array) for array in arrays]
    resized = [np.asarray(x.resize((size, size), Image.Resampling.BILINEAR), dtype=np.float64) for x in images]
    expected = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 127.5 - 1
    for call in (processor, processor.preprocess):
        for given in (images, arrays):
            found = call(given, return_tensors="pt")["pixel_values"]
            assert found.dtype == torch.float32 and found.is_contiguous()
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
        assert torch.equal(call(images[0])["pixel_values"], found[:1])
    frames = np.stack([arrays[0], arrays[0][::-1]])
    found = processor.preprocess(frames, return_tensors="pt")["pixel_values"]
    assert found.shape == (2, 3, size, size) and not torch.equal(found[0], found[1])
    with pytest.raises(ValueError, match="image 1"):
        processor([images[0], b"no image"])


def test_the_processor_alone_says_what_it_needs():
    assert SigLipImageProcessor(patch_size=16, max_num_patches=576).size["height"] == 384
    with pytest.raises(ValueError, match="max_num_patches is 250"):
        SigLipImageProcessor(max_num_patches=250)(Image.new("RGB", (20, 20)))
    with pytest.raises(TypeError):
        SigLipImageProcessor()(Image.new("RGB", (20, 20)), max_num_patches=16)


# weights


@pytest.mark.parametrize("delay_load", [False, True])
def test_weights_begin_frozen_and_are_then_the_callers(checkpoint, delay_load):
    tower = SigLipVisionTower(checkpoint("tiny"), delay_load=delay_load)
    tower.load_model()
    assert not any(p.requires_grad for p in tower.parameters())
    tower(squares(1, 16))
    tower.train()
    tower.load_model()
    assert not any(p.requires_grad for p in tower.parameters())
    tower = SigLipVisionTower(checkpoint("tiny"), delay_load=delay_load).requires_grad_(True)
    tower.load_model()
    assert all(p.requires_grad for p in tower.parameters())


@pytest.mark.parametrize("trained", [{"unfreeze_mm_vision_tower": True}, {"mm_tunable_parts": "mm_vision_tower"}])
def test_a_tower_that_is_trained_is_never_delayed(checkpoint, trained):
    assert SigLipVisionTower(checkpoint("tiny"), args(**trained), delay_load=True).is_loaded
    assert not SigLipVisionTower(checkpoint("tiny"), args(), delay_load=True).is_loaded


@pytest.mark.parametrize("prefix", ["vision_tower.", "vision_tower.vision_model."])
def test_a_state_dict_decides(checkpoint, prefix):
    source = SigLip2NaflexVisionTower(checkpoint("tiny"), args())
    state = {prefix + name: x + 0.1 for name, x in source.vision_tower.state_dict().items()}
    tower = SigLipVisionTower(checkpoint("tiny"), delay_load=True, image_size=24)
    tower.load_state_dict(state)
    tower.load_model()
    for name, x in tower.vision_tower.state_dict().items():
        assert torch.equal(x, source.vision_tower.state_dict()[name] + 0.1)


# callers


def test_tiles_of_a_large_image_lie_where_they_were_cut(checkpoint):
    """`anyres`: a picture of 2 x 3 tiles; features of a tile do not know of the others, and stand in its place."""
    tower = SigLipVisionTower(checkpoint("tiny"), image_size=24)
    picture = squares(1, 72)[0, :, :48]
    tiles = picture.unflatten(2, (3, 24)).unflatten(1, (2, 24)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    side = tower.num_patches_per_side
    features = tower(tiles).view(2, 3, side, side, -1).permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)
    assert features.shape == (2 * side, 3 * side, 64)
    expected, _ = expected_of(checkpoint("tiny"), picture[None, :, 24:, 24:48])
    close(features[side:, side : 2 * side].flatten(0, 1), expected[0])
