"""What the LLaVA tower is held against: the padded transformers model in float64, and every form of one input."""

from types import SimpleNamespace

import torch
import transformers
from conftest import SIDE_OF_ONE
from torch import nn
from transformers import Siglip2VisionModel

from siglip2_packed import PackedPatches, encode_images, pad

# 4.57 resizes positions with F.interpolate, whose CPU kernel is wrong at output width 1
EXACT_POSITIONS = int(transformers.__version__.split(".")[0]) >= 5
GRIDS = [(1, 13, 19), (1, 8, 32), (1, 2, 3), (1, 7, 5)] + (SIDE_OF_ONE if EXACT_POSITIONS else [])
COUNTS = [h * w for _, h, w in GRIDS]
SAME = [(1, 4, 6), (1, 8, 3), (1, 6, 4)]  # 24 rows each


def args(**fields):
    return SimpleNamespace(**fields)


def close(ours, theirs, bound=4e-6):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= bound * max(1, theirs.abs().max())


def close_gradients(tower, expected):
    for name, parameter in tower.vision_tower.named_parameters():
        # a bias of k moves all scores of a query alike: its gradient is zero but for rounding
        scale = expected[name.replace("k_proj.bias", "k_proj.weight")].norm()
        assert (parameter.grad - expected[name]).norm() <= 1e-5 * scale, name


def noisy_batch(pixel_values, grids, width=None):
    """transformers' padded batch, whose padding rows are noise that must not matter."""
    batch = pad(pixel_values, grids, max_num_patches=width)
    noise = torch.randn(batch["pixel_values"].shape, generator=torch.Generator().manual_seed(9))
    batch["pixel_values"] = torch.where(batch["pixel_attention_mask"].bool()[..., None], batch["pixel_values"], noise)
    return batch


def reference(folder, batch, layer=-2):
    """`[T, D]` of the padded transformers model in float64, and its gradients for the loss `(features * W).sum()`."""
    model = Siglip2VisionModel.from_pretrained(folder).double()
    states = model(**{**batch, "pixel_values": batch["pixel_values"].double()}, output_hidden_states=True).hidden_states
    features = states[layer][batch["pixel_attention_mask"].bool()]
    (features * weight_of(features)).sum().backward()
    gradients = {name.removeprefix("vision_model."): p.grad for name, p in model.named_parameters()}
    return features.detach(), gradients


def weight_of(features):
    return torch.randn(features.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


FORMS = "packed pack batch mapping numpy unmasked flat nested over encode_images".split()


def run_form(tower, form, x, grids):
    """Features of one form, checked for that form, as `[T, D]`."""
    counts = [t * h * w for t, h, w in grids]
    batch, grid = noisy_batch(x, grids), torch.tensor(grids)
    images = {
        "packed": x,
        "pack": PackedPatches(x, grids),
        "batch": batch["pixel_values"],
        "mapping": batch,
        "numpy": {**batch, "pixel_attention_mask": batch["pixel_attention_mask"].numpy()},
        "unmasked": {key: batch[key] for key in ("pixel_values", "spatial_shapes")},
        "flat": list(x.split(counts)),
        "nested": [image[None] for image in x.split(counts)],
        "over": [image[None] for image in batch["pixel_values"]],
        "encode_images": batch["pixel_values"],
    }[form]
    if form == "encode_images":
        features = encode_images(tower, nn.Identity(), images, grid)
        assert [len(image) for image in features] == counts
        return torch.cat(features)
    features = tower(images) if form in ("pack", "mapping", "numpy", "unmasked") else tower(images, grid_thw=grid)
    if form in ("packed", "pack"):
        return features
    if form in ("flat", "nested", "over"):
        assert [image.shape[:-1] for image in features] == [image.shape[:-1] for image in images]
        images = [image.flatten(0, -2) for image in features]
    else:
        assert features.shape == (*batch["pixel_values"].shape[:2], tower.hidden_size)
        images = features
    assert not any(image[count:].any() for image, count in zip(images, counts))
    return torch.cat([image[:count] for image, count in zip(images, counts)])


def raster(grid, t=0):
    h, w = torch.meshgrid(torch.arange(grid[1]), torch.arange(grid[2]), indexing="ij")
    return torch.stack([torch.full_like(h, t), h, w], dim=-1).reshape(1, -1, 3)
