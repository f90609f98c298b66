"""LLaVA's callers of the tower, as they are and with the changed lines."""

import numpy as np
import pytest
import torch
from llava_reference import close, raster, reference
from PIL import Image
from torch import nn

from siglip2_packed import encode_images, pad


def dataset(processor, sizes):
    """As LLaVA's data code: `[1, N, P]` of each image, its grid, and its patch positions."""
    rng = np.random.default_rng(0)
    images, grids = [], []
    for height, width in sizes:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        images.append(processor.preprocess(image, return_tensors="pt", do_resize=False)["pixel_values"])
        grids.append([1, height // 4, width // 4])
    return images, torch.tensor(grids), [raster(grid) for grid in grids]


def test_the_callers_as_they_are(tower):
    """Images of as many patches: concatenated, encoded, projected, split, flattened."""
    projector = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8))
    images, grid_thw, positions = dataset(tower.image_processor, [(24, 16), (16, 24)])
    features = projector(tower(torch.cat(images, dim=0), grid_thw=grid_thw, patch_positions=positions))
    split = [x.flatten(0, 1) for x in torch.split(features, [1, 1])]
    assert [x.shape for x in split] == [(24, 8), (24, 8)]
    for ours, theirs in zip(encode_images(tower, projector, images, grid_thw, positions), split):
        close(ours, theirs)
    text_only = tower(torch.zeros(1, 14, 48), grid_thw=torch.tensor([[[1, 2, 7]]]), patch_positions=[None])
    assert text_only.shape == (1, 14, 64)


def test_images_of_any_size_with_the_changed_lines(checkpoint, tower):
    """Sizes differ, and an image below the budget of 16 comes padded."""
    projector = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8))
    images, grid_thw, positions = dataset(tower.image_processor, [(24, 16), (8, 20), (52, 12), (4, 4)])
    counts = [24, 10, 39, 1]
    assert [x.shape[1] for x in images] == [24, 16, 39, 16]
    real = torch.cat([x[0, :n] for x, n in zip(images, counts)])
    expected = projector(reference(checkpoint("tiny"), pad(real, grid_thw))[0].float())
    for given in (positions, None):
        features = encode_images(tower, projector, images, grid_thw, given)
        assert [x.shape for x in features] == [(n, 8) for n in counts]
        close(torch.cat(features), expected)
    torch.cat(features).square().sum().backward()
    assert all(p.grad is not None for p in (*tower.parameters(), *projector.parameters()))
    with pytest.raises(ValueError, match="12 rows of 24"):
        encode_images(tower, nn.Unflatten(0, (12, 2)), images[:1], grid_thw[:1])


def test_video_frames_pool_on_the_square_of_the_budget(tower):
    """LLaVA's `get_2dPool` views `[F, N, D]` as `num_patches_per_side` squared."""
    frames = [Image.new("RGB", (40, 40), (i, 2 * i, 99)) for i in range(3)]
    pixel_values = tower.image_processor.preprocess(frames, return_tensors="pt")["pixel_values"]
    side = tower.num_patches_per_side
    assert tower(pixel_values).view(3, side, side, -1).shape == (3, 4, 4, 64)
