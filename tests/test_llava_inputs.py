"""The LLaVA tower beside the padded transformers model: input forms, videos, padding, errors."""

from functools import lru_cache

import pytest
import torch
from conftest import SIDE_OF_ONE
from llava_reference import (
    COUNTS,
    FORMS,
    GRIDS,
    SAME,
    args,
    close,
    close_gradients,
    noisy_batch,
    reference,
    run_form,
    weight_of,
)
from PIL import Image
from torch import nn
from transformers import Siglip2ImageProcessor

import kernels_ref
from siglip2_packed import PackedPatches, SigLip2NaflexVisionTower, encode_images, pad


@pytest.fixture(scope="module")
def padded_reference(checkpoint):
    @lru_cache
    def run(shape):
        x = torch.randn(sum(COUNTS), 48, generator=torch.Generator().manual_seed(0))
        return (x, *reference(checkpoint(shape), pad(x, GRIDS)))

    return run


@pytest.mark.parametrize(("shape", "form"), [("tiny72", "packed"), *(("tiny", form) for form in FORMS)])
def test_features_and_gradients_match_transformers(checkpoint, padded_reference, shape, form):
    x, expected, gradients = padded_reference(shape)
    tower = SigLip2NaflexVisionTower(checkpoint(shape), args())
    features = run_form(tower, form, x, GRIDS)
    close(features, expected)
    (features * weight_of(features)).sum().backward()
    close_gradients(tower, gradients)
    with torch.no_grad():
        close(run_form(tower, form, x, GRIDS), expected)


@pytest.mark.parametrize("temporal", ["frames", "joint"])
def test_videos_match_the_reference(checkpoint, tower, patches, temporal):
    grids = [(3, 4, 6), (1, 13, 19), (2, 1, 9), *SIDE_OF_ONE]
    x, ref = patches(grids), kernels_ref.Siglip2Naflex(checkpoint("tiny"), device="cpu", dtype=torch.float64)
    grid = torch.tensor(grids)
    with torch.no_grad():
        kwargs = {"temporal": temporal, "output_hidden_states": True}
        states = kernels_ref.packed_encoder(ref.state, ref.config, x.double(), grid, **kwargs).hidden_states
        pack = PackedPatches(x, grids, temporal=temporal)
        close(tower(pack), states[-2])
        close(torch.cat(encode_images(tower, nn.Identity(), pack)), states[-2])
        if temporal == "frames":
            close(tower(x, grid), states[-2])
            close(tower(x[None, :72], grid[:1])[0], states[-2][:72])


def test_a_batch_of_equal_row_counts(tower, patches):
    x = patches(SAME)
    with torch.no_grad():
        expected = tower(x, SAME)
        features = tower(x.view(3, 24, 48), grid_thw=torch.tensor(SAME))
        of_text = tower(x.view(3, 24, 48), grid_thw=torch.tensor(SAME)[:, None])  # as samples of text alone have it
        groups = tower([x[:24], x[24:].view(2, 24, 48)], grid_thw=SAME)
    assert torch.equal(features.flatten(0, 1), expected) and torch.equal(of_text, features)
    assert [group.shape for group in groups] == [(24, 64), (2, 24, 64)]
    assert torch.equal(torch.cat([groups[0], groups[1].flatten(0, 1)]), expected)


def test_padding_costs_nothing(tower, patches):
    """Rows that the grid does not name never reach the model, whatever they hold."""
    seen = []
    tower.vision_tower.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    batch = noisy_batch(patches(SAME), SAME, width=100)
    batch["pixel_values"][:, 24:] = float("nan")
    features = tower(batch["pixel_values"], grid_thw=SAME)
    features.sum().backward()
    assert features.isfinite().all() and all(p.grad.isfinite().all() for p in tower.parameters())
    tower([image[None] for image in batch["pixel_values"]], grid_thw=SAME)
    tower(batch)
    encode_images(tower, nn.Identity(), batch["pixel_values"], SAME)
    assert seen == [72] * 4


def test_raw_images_go_through_the_processor(checkpoint, tower):
    images = torch.randint(0, 256, (2, 3, 52, 31), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = Siglip2ImageProcessor.from_pretrained(checkpoint("tiny"))
    batch = theirs([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images], return_tensors="pt")
    h, w = batch["spatial_shapes"][0].tolist()
    assert h * w < 16
    expected, _ = reference(checkpoint("tiny"), batch)
    with torch.no_grad():
        features, *sizes = tower(images, return_spatial_dims=True)
        assert sizes == [h, w] and features.shape == (2, h * w, 64)
        # pixels of transformers 5's processor are rounded elsewhere
        close(features.flatten(0, 1), expected, 0.02)
        assert torch.equal(features, tower(images / 255))
        assert torch.equal(features, tower(images, grid_thw=[(1, h, w)] * 2))
        assert torch.equal(features, tower(tower.image_processor(list(images))).view_as(features))
    with pytest.raises(ValueError, match=rf"\(1, {w}, {h}\).*\(1, {h}, {w}\)"):
        tower(images, grid_thw=[(1, w, h)] * 2)


def test_spatial_dims_and_images_without_a_grid(tower, patches):
    """LLaVA's spatial-merge projector asks for sizes and gives none."""
    x = patches(SAME)
    features, h, w = tower(x[:24][None], grid_thw=SAME[:1], return_spatial_dims=True)
    assert (features.shape, h, w) == ((1, 24, 64), 4, 6)
    features, h, w = tower(x.view(3, 24, 48), grid_thw=torch.tensor(SAME), return_spatial_dims=True)
    assert (features.shape, h, w) == ((3, 24, 64), [4, 8, 6], [6, 3, 4])
    _, h, w = tower(tower.pack(x.view(3, 24, 48), SAME), return_spatial_dims=True)
    assert (h, w) == ([4, 8, 6], [6, 3, 4])
    x = patches([(2, 4, 4)]).view(2, 16, 48)
    features, h, w = tower(x, return_spatial_dims=True)
    assert (h, w) == (4, 4)
    assert torch.equal(features, tower(x, grid_thw=[(1, 4, 4)] * 2))
    assert tower(torch.zeros(1, 16, 48)).isfinite().all()
    x[1, 13:] = 0
    for images, message in (
        (x, "image 1 looks padded"),
        (x[:, :15], "15 patches, not a square"),
        (x[0], "grid_thw is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            tower(images)


def test_empty_batches_stay_attached(tower):
    for images, shape in ((torch.zeros(0, 48), (0, 64)), (torch.zeros(0, 24, 48), (0, 24, 64))):
        features = tower(images, grid_thw=torch.zeros(0, 3, dtype=torch.int64), patch_positions=[])
        assert features.shape == shape
        features.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in tower.parameters())
        tower.zero_grad()
    assert tower([], grid_thw=torch.zeros(0, 3, dtype=torch.int64)) == []
    assert tower(torch.zeros(0, 3, 8, 8, dtype=torch.uint8)).shape == (0, 0, 64)
    assert encode_images(tower, nn.Linear(64, 8), torch.zeros(0, 48), []) == []


def test_bad_input_names_both_numbers(tower, patches):
    x = patches([(1, 3, 5)])
    shapes = {"pixel_values": x[None], "spatial_shapes": [(3, 5)]}
    for images, grid, message in (
        (x, [(1, 3, 4)], "covers 12 patches, pixel_values has 15 rows"),
        (x[None], [(1, 4, 4)], "covers 16 patches, it has 15 rows"),
        ([x], [(1, 4, 4)], "covers 16 patches, it has 15 rows"),
        ([x, x], [(1, 3, 5)], "2 images, but grid_thw has 1 rows"),
        (x[None], [(1, 3, 5)] * 2, "1 images, but grid_thw has 2 rows"),
        (x[None], [(1, 0, 5)], "at least 1"),
        (x[None], [(3, 5)], r"\[1, 2\]"),
        (x[None], torch.tensor([[1.0, 3, 5]]), "float32"),
        (x[None, :, :40], [(1, 3, 5)], r"\[T, 48\], got \[15, 40\]"),
        ([x, x[:, :40]], [(1, 3, 5)] * 2, "patch_dim 40, image 0 has 48"),
        (x[None].int(), [(1, 3, 5)], "int32"),
        ([x, x.int()], [(1, 3, 5)] * 2, "image 1.*int32"),
        ([x.numpy()], [(1, 3, 5)], "ndarray"),
        (x.numpy(), [(1, 3, 5)], "ndarray"),
        (x[0], [(1, 3, 5)], r"\[48\]"),
        ({"pixel_values": x[None]}, None, "spatial_shapes"),
        (shapes, [(1, 5, 3)], r"\(1, 5, 3\)"),
        ({**shapes, "spatial_shapes": [(1, 3, 5)]}, None, r"\[1, 3\]"),
        ({**shapes, "spatial_shapes": [(3, 4)], "pixel_attention_mask": torch.ones(1, 15)}, None, "15 rows.* first 12"),
    ):
        with pytest.raises(ValueError, match=message):
            tower(images, grid_thw=grid)
    with pytest.raises(ValueError, match="patch_positions must hold integers"):
        tower(x, grid_thw=[(1, 3, 5)], patch_positions="raster")
    with pytest.raises(TypeError):
        tower(x, grid_thw=[(1, 3, 5)], num_frames=3)
