"""The LLaVA tower beside the padded transformers model: input forms, layers, weights that stay, training, callers."""

import copy
import shutil
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import SIDE_OF_ONE
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, Siglip2ImageProcessor, Siglip2VisionModel

import kernels_ref
from siglip2_packed import (
    PackedPatches,
    SigLip2NaflexVisionTower,
    Siglip2PackedVisionModel,
    encode_images,
    pad,
)
from siglip2_packed.preprocess import resized_grid

# 4.57 resizes positions with F.interpolate, whose CPU kernel is wrong at output width 1
EXACT_POSITIONS = int(transformers.__version__.split(".")[0]) >= 5
GRIDS = [(1, 13, 19), (1, 8, 32), (1, 2, 3), (1, 7, 5)] + (SIDE_OF_ONE if EXACT_POSITIONS else [])
COUNTS = [h * w for _, h, w in GRIDS]
SAME = [(1, 4, 6), (1, 8, 3), (1, 6, 4)]  # 24 rows each
INNER = "vision_tower.vision_tower."


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


@pytest.fixture(scope="module")
def padded_reference(checkpoint):
    @lru_cache
    def run(shape):
        x = torch.randn(sum(COUNTS), 48, generator=torch.Generator().manual_seed(0))
        return (x, *reference(checkpoint(shape), pad(x, GRIDS)))

    return run


@pytest.fixture
def tower(checkpoint):
    return SigLip2NaflexVisionTower(str(checkpoint("tiny")), args())


# input forms


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


# patch positions


def raster(grid, t=0):
    h, w = torch.meshgrid(torch.arange(grid[1]), torch.arange(grid[2]), indexing="ij")
    return torch.stack([torch.full_like(h, t), h, w], dim=-1).reshape(1, -1, 3)


def sparse_video(folder, patches, video, kept):
    """Some patches of each frame in a random order, their positions, and, in the order of `reference`, the order back.

    Reference: transformers on whole frames, the absent patches masked out.
    """
    t, h, w = video
    generator = torch.Generator().manual_seed(0)
    frames = patches([video], seed=7).view(t, h * w, 48)
    keep = torch.stack([torch.randperm(h * w, generator=generator) < count for count in kept])
    times = [9, 0, 40]  # frames' numbers in the original video
    positions = torch.cat([raster(video, time)[:, chosen] for time, chosen in zip(times, keep)], dim=1)
    batch = {"pixel_values": frames, "pixel_attention_mask": keep.int(), "spatial_shapes": torch.tensor([(h, w)] * t)}
    shuffle = torch.randperm(sum(kept), generator=generator)
    return frames[keep][shuffle], positions[:, shuffle], torch.argsort(shuffle), reference(folder, batch)


def test_positions_that_the_grid_implies_change_nothing(tower, patches):
    """What LLaVA's data code passes with every image."""
    x, each = patches(GRIDS), [raster(grid) for grid in GRIDS]
    joined = [torch.cat(each[:2], dim=1), each[2], None, torch.cat([*each[4:]], dim=1)] if EXACT_POSITIONS else []
    with torch.no_grad():
        expected = tower(x, grid_thw=GRIDS)
        for given in (
            [None],
            each,
            torch.cat(each, dim=1),
            [torch.cat(each, dim=1)],
            [*each[:2], None, *each[3:]],
            joined or None,  # one entry a sample; a sample of text alone has none, for its one dummy image
        ):
            assert torch.equal(tower(x, grid_thw=GRIDS, patch_positions=given), expected)
        batch = noisy_batch(x, GRIDS)["pixel_values"]
        assert torch.equal(torch.cat(encode_images(tower, nn.Identity(), batch, GRIDS, each)), expected)
        # and patches in another order find their place, each in its own image
        flipped = [positions.flip(1) for positions in each]
        rows = torch.cat([image.flip(0) for image in x.split(COUNTS)])
        back = torch.cat([image.flip(0) for image in expected.split(COUNTS)])
        for given in (flipped, torch.cat(flipped, dim=1)):
            close(tower(rows, GRIDS, given), back)


@pytest.mark.parametrize("form", ["packed", "batch", "list", "encode_images", "codec"])
def test_a_sparse_video_takes_the_positions_of_its_patches(checkpoint, tower, patches, form):
    """Features and gradients, those of the position table included, for rows in any order.

    `codec`: the patches fill two images of the frames' size, so a frame may begin in one and end in the other.
    """
    video, image, grids = (3, 5, 7), patches([(1, 4, 3)]), [(3, 5, 7), (1, 4, 3)]
    kept = (20, 30, 20) if form == "codec" else (20, 35, 3)
    rows, positions, back, (expected, gradients) = sparse_video(checkpoint("tiny"), patches, video, kept)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            if form == "packed":
                features = tower(rows, [video], patch_positions=positions)
            elif form == "batch":
                features = tower(rows[None], [video], patch_positions=positions)[0]
            elif form == "codec":
                images = [*rows.view(2, 1, 35, 48), image[None]]
                *both, other = tower(images, [(1, 5, 7), (1, 5, 7), (1, 4, 3)], [positions, None])
                features = torch.cat(both, dim=1)[0]
            else:
                call = tower if form == "list" else lambda *given: encode_images(tower, nn.Identity(), *given)
                features, other = call([rows, image], grids, [positions, None])
            close(features[back], expected)
    if form not in ("packed", "batch"):
        close(other.view(12, 64), tower(image, [(1, 4, 3)]).detach())
    (features[back] * weight_of(expected)).sum().backward()
    close_gradients(tower, gradients)


def test_frames_are_told_apart_by_t(tower, patches):
    x, grid = patches([(2, 4, 6)]), [(2, 4, 6)]
    at = lambda *times: torch.cat([raster((1, 4, 6), t) for t in times], dim=1)  # noqa: E731
    with torch.no_grad():
        apart, together = (tower(x, grid, patch_positions=at(*times)) for times in ((0, 5), (5, 5)))
        assert torch.equal(apart, tower(x, grid))
        close(together, tower(PackedPatches(x, grid, temporal="joint")))


def test_positions_that_do_not_fit_are_refused(tower, patches):
    grids = [(1, 4, 6), (1, 3, 5)]
    x, first, second = patches(grids), raster(grids[0]), raster(grids[1])
    outside = first.clone()
    outside[0, 3, 2] = 6
    for positions, message in (
        (first, r"1 entries of \[24\] rows, the 2 images have \[24, 15\] patches"),
        ([first, second, None], r"3 entries of \[24, 15, None\] rows, the 2 images"),
        (torch.cat([first, second, second], dim=1), r"1 entries of \[54\] rows"),
        ([first, first], r"image 1: patch_positions has 24 rows, the grid \(1, 3, 5\) covers 15"),
        ([first[:, :20], second], "35 rows, images 39"),
        ([outside, second], r"image 0: .* from \[0, 0\] to \[3, 6\], the grid is 4 x 6"),
        ([outside - 1, second], r"image 0: .* from \[-1, -1\]"),
        ([first.float(), second], "float32"),
        ([first[..., :2], second], r"\[0\] must be .* got \[1, 24, 2\]"),
        ([first, second.expand(2, -1, -1)], r"\[1\] must be .* got \[2, 15, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            tower(x, grids, patch_positions=positions)
    with pytest.raises(ValueError, match="20 rows, the grid .* covers 24 patches, and there are 24 rows"):
        tower(x[:24][None], grids[:1], patch_positions=first[:, :20])
    with pytest.raises(ValueError, match="cu_seqlens"):
        tower(PackedPatches(x, grids), patch_positions=[first, second])


# layers (V4), features (V5)


@pytest.mark.parametrize("layer", [-1, -2, -3, -4, 0, 1, 2, 3])
def test_select_layer_in_every_form(checkpoint, patches, layer):
    x, tower = patches(SAME), SigLip2NaflexVisionTower(checkpoint("tiny"), args(mm_vision_select_layer=layer))
    expected, _ = reference(checkpoint("tiny"), pad(x, SAME), layer)
    for form in FORMS:
        close(run_form(tower, form, x, SAME), expected)
    tower(x, SAME).sum().backward()
    assert all(p.grad is not None for p in tower.parameters())


def test_minus_two_is_minus_one_of_a_model_without_its_last_layer(checkpoint, patches, tmp_path):
    Siglip2VisionModel.from_pretrained(checkpoint("tiny"), num_hidden_layers=2).save_pretrained(tmp_path)
    x = patches(SAME)
    full = SigLip2NaflexVisionTower(checkpoint("tiny"), args(mm_vision_select_layer=-2))
    last = SigLip2NaflexVisionTower(tmp_path, args(mm_vision_select_layer=-1))
    assert torch.equal(full(x, SAME), last(x, SAME))


@pytest.mark.parametrize("delay_load", [False, True])
def test_impossible_selections_are_refused_at_construction(checkpoint, delay_load):
    for layer in (99, 4, -5, "-2", 1.5):
        with pytest.raises(ValueError, match="select_layer"):
            SigLip2NaflexVisionTower(checkpoint("tiny"), args(mm_vision_select_layer=layer), delay_load=delay_load)
    with pytest.raises(ValueError, match="cls_patch"):
        SigLip2NaflexVisionTower(checkpoint("tiny"), args(mm_vision_select_feature="cls_patch"), delay_load=delay_load)
    for given, layer in ((args(mm_vision_select_layer=None), -2), (None, -2), ({"mm_vision_select_layer": -1}, -1)):
        assert SigLip2NaflexVisionTower(checkpoint("tiny"), given, delay_load=delay_load).select_layer == layer


def test_token_counts_of_fifty_sizes(tower):
    """V5: predicted, preprocessed and encoded."""
    rng = np.random.default_rng(0)
    sizes = [(639, 31), (31, 639), (1, 1), (1, 3000), *rng.integers(1, 700, (46, 2)).tolist()]
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for height, width in sizes]
    batch = tower.image_processor.preprocess(images, return_tensors="pt", max_num_patches=64)
    grids = [resized_grid(height, width, 4, 64) for height, width in sizes]
    assert batch["pixel_values"].shape[:2] == (50, 64) and batch["spatial_shapes"].tolist() == [[*hw] for hw in grids]
    with torch.no_grad():
        features, padded = encode_images(tower, nn.Identity(), batch), tower(batch)
    assert [len(x) for x in features] == [h * w for h, w in grids]
    assert padded.abs().sum(-1).count_nonzero(dim=1).tolist() == [h * w for h, w in grids]


def test_preprocess_pads_to_the_budget_and_drops_nothing(checkpoint, tower):
    processor = tower.image_processor
    assert "siglip" in type(processor).__name__.lower() and "siglip" in str(processor).lower()
    theirs = Siglip2ImageProcessor.from_pretrained(checkpoint("tiny"))
    rng = np.random.default_rng(0)
    for height, width in ((12, 20), (16, 16), (40, 24)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        got = processor.preprocess(image, return_tensors="pt", do_resize=False)
        count = height // 4 * (width // 4)
        assert got["pixel_values"].shape == (1, max(16, count), 48) and got["pixel_values"].dtype == torch.float32
        assert not got["pixel_values"][:, count:].any()
        expected = theirs.preprocess(image, return_tensors="pt", do_resize=False, max_num_patches=max(16, count))
        torch.testing.assert_close(got["pixel_values"], expected["pixel_values"], atol=1e-6, rtol=0)
        for key in ("pixel_attention_mask", "spatial_shapes"):
            assert got[key].tolist() == expected[key].tolist()
    with pytest.raises(ValueError, match="13x20"):
        processor.preprocess(Image.new("RGB", (20, 13)), return_tensors="pt", do_resize=False)


# properties


def test_properties_come_from_the_checkpoint(checkpoint, tower):
    assert tower.is_loaded and tower.vision_tower_name == str(checkpoint("tiny"))
    assert isinstance(tower.vision_tower, Siglip2PackedVisionModel)
    assert (tower.hidden_size, tower.config.num_hidden_layers, tower.config.intermediate_size) == (64, 3, 128)
    assert (tower.num_patches, tower.num_patches_per_side, tower.image_size) == (16, 4, 16)
    assert (tower.dtype, tower.device) == (torch.float32, torch.device("cpu"))
    assert torch.equal(tower.dummy_feature, torch.zeros(1, 64))
    tower.to(torch.bfloat16)
    assert {x.dtype for x in tower.state_dict().values()} == {tower.dummy_feature.dtype} == {torch.bfloat16}
    assert tower(torch.randn(6, 48), [(1, 2, 3)]).dtype == torch.bfloat16
    tower.image_processor.max_num_patches = 250
    assert tower.num_patches == 250
    for name in ("num_patches_per_side", "image_size"):
        with pytest.raises(ValueError, match="250"):
            getattr(tower, name)


def test_a_folder_by_any_name_and_without_a_preprocessor_configuration(checkpoint, tmp_path):
    folder = tmp_path / "clip_vs_siglip2_naflex"
    shutil.copytree(checkpoint("tiny"), folder)
    (folder / "preprocessor_config.json").unlink()
    tower = SigLip2NaflexVisionTower(folder, args())
    assert (tower.image_processor.patch_size, tower.num_patches) == (4, 16)
    (folder / "model.safetensors").unlink()
    tower = SigLip2NaflexVisionTower(folder, args(), delay_load=True)
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        tower.load_model()
    (folder / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="clip"):
        SigLip2NaflexVisionTower(folder, args(), delay_load=True)


# weights that stay (V1)


def weights_of(tower):
    return {name: p.detach().clone() for name, p in tower.vision_tower.named_parameters()}


def assert_weights(tower, expected):
    """Also after `load_model()`, which LLaVA calls at every turn."""
    for _ in range(2):
        assert tower.is_loaded
        found = weights_of(tower)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        inner = tower.vision_tower
        tower.load_model(device_map="cpu")
        assert tower.vision_tower is inner


def tuned(tower):
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter += 0.1
    return tower


class VlmConfig(PretrainedConfig):
    model_type = "llava_of_this_test"

    def __init__(self, mm_vision_tower=None, delay_load=False, **kwargs):
        self.mm_vision_tower, self.delay_load = mm_vision_tower, delay_load
        super().__init__(**kwargs)


class Vlm(PreTrainedModel):
    """The parts of a LLaVA model that matter here."""

    config_class = VlmConfig
    supports_gradient_checkpointing = True

    def __init__(self, config):
        super().__init__(config)
        if config.mm_vision_tower is not None:
            self.vision_tower = SigLip2NaflexVisionTower(config.mm_vision_tower, config, delay_load=config.delay_load)
        self.mm_projector = nn.Linear(64, 8)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)


@pytest.fixture
def vlm(checkpoint):
    return Vlm(VlmConfig(str(checkpoint("tiny"))))


@pytest.fixture
def saved(vlm, tmp_path):
    """A saved VLM with a tuned tower, whose configuration still names the base: (folder, its tower's weights)."""
    tuned(vlm.vision_tower)
    vlm.save_pretrained(tmp_path / "vlm")
    return tmp_path / "vlm", weights_of(vlm.vision_tower)


def test_a_delayed_tower_has_its_configuration_and_no_weights(checkpoint, tower, patches):
    delayed = SigLip2NaflexVisionTower(checkpoint("tiny"), args(mm_tunable_parts=None), delay_load=True)
    assert not delayed.is_loaded and not list(delayed.parameters())
    assert (delayed.hidden_size, delayed.config.hidden_size, delayed.image_processor.patch_size) == (64, 64, 4)
    for use in (lambda: delayed(patches(SAME), SAME), lambda: delayed.device, lambda: delayed.dummy_feature):
        with pytest.raises(RuntimeError, match="load_model"):
            use()
    delayed.load_model()
    assert_weights(delayed, weights_of(tower))
    assert_weights(tuned(delayed), {name: p + 0.1 for name, p in weights_of(tower).items()})
    for fields in ({"unfreeze_mm_vision_tower": True}, {"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter"}):
        assert SigLip2NaflexVisionTower(checkpoint("tiny"), args(**fields), delay_load=True).is_loaded


@pytest.mark.parametrize("delay_load", [True, False])
@pytest.mark.parametrize("written_by", ["ours", "the original", "another select layer", "part"])
def test_a_state_dict_decides(checkpoint, delay_load, written_by):
    layer = -1 if written_by == "another select layer" else -2
    source = SigLip2NaflexVisionTower(checkpoint("tiny"), args(mm_vision_select_layer=layer))
    expected = weights_of(source)
    expected |= {name: p for name, p in weights_of(tuned(source)).items() if written_by != "part" or "mlp" in name}
    state = {f"vision_tower.{name}": tensor for name, tensor in expected.items()}
    if written_by == "part":
        state = {name: tensor for name, tensor in state.items() if "mlp" in name}
    if written_by == "the original":  # which has all layers
        state = {key.replace("vision_tower.", "vision_tower.vision_model."): tensor for key, tensor in state.items()}
        for name in ("encoder.layers.2.mlp.fc1.bias", "post_layernorm.weight", "head.probe"):
            state[f"vision_tower.vision_model.{name}"] = torch.zeros(1)
    tower = SigLip2NaflexVisionTower(checkpoint("tiny"), args(), delay_load=delay_load)
    holder = nn.ModuleDict({"vision_tower": tower})
    holder.load_state_dict({f"vision_tower.{key}": x for key, x in state.items()}, strict=written_by != "part")
    assert_weights(tower, {name: p for name, p in expected.items() if not name.startswith("encoder.layers.2.")})


def test_a_state_dict_of_other_things(checkpoint, tower):
    delayed = SigLip2NaflexVisionTower(checkpoint("tiny"), args(), delay_load=True)
    nn.ModuleDict({"tower": delayed, "projector": nn.Linear(1, 1, bias=False)}).load_state_dict(
        {"projector.weight": torch.ones(1, 1)}
    )
    assert not delayed.is_loaded
    with pytest.raises(RuntimeError, match="lora_A"):
        tower.load_state_dict({**tower.state_dict(), "vision_tower.encoder.lora_A.weight": torch.ones(1)})


@pytest.mark.parametrize("delay_load", [True, False])
def test_from_pretrained_of_a_vlm_gives_the_vlms_tower(saved, delay_load):
    folder, expected = saved
    assert_weights(Vlm.from_pretrained(folder, delay_load=delay_load).vision_tower, expected)
    tower = Vlm.from_pretrained(folder, delay_load=delay_load, dtype=torch.bfloat16).vision_tower
    assert_weights(tower, {name: p.bfloat16() for name, p in expected.items()})


@pytest.mark.parametrize("delay_load", [True, False])
def test_from_pretrained_of_a_vlm_without_tower_weights_gives_the_base(tower, tmp_path, delay_load, caplog):
    """Newer transformers leave uninitialised memory in modules they have no weights for."""
    Vlm(VlmConfig()).save_pretrained(tmp_path)
    vlm = Vlm.from_pretrained(tmp_path, mm_vision_tower=tower.vision_tower_name, delay_load=delay_load)
    assert_weights(vlm.vision_tower, weights_of(tower))
    assert "35 of 35 weights" in caplog.text


def test_from_pretrained_of_a_vlm_with_half_a_tower_or_the_originals_names(tower, saved, caplog):
    folder, expected = saved
    state = load_file(folder / "model.safetensors")
    name = "encoder.layers.0.mlp.fc1.bias"
    half = {key: tensor for key, tensor in state.items() if key != INNER + name}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    assert_weights(Vlm.from_pretrained(folder).vision_tower, {**expected, name: weights_of(tower)[name]})
    original = {key.replace(INNER, INNER + "vision_model."): tensor for key, tensor in state.items()}
    save_file(original, folder / "model.safetensors", metadata={"format": "pt"})
    mapping = {f"{INNER}vision_model.": INNER}
    assert_weights(Vlm.from_pretrained(folder, key_mapping=mapping).vision_tower, expected)
    caplog.clear()
    Vlm.from_pretrained(folder)
    assert "key_mapping" in caplog.text


def test_offloaded_weights_are_loaded_weights(vlm, patches):
    """accelerate keeps them elsewhere and the parameters on the meta device."""
    accelerate = pytest.importorskip("accelerate")
    inner = tuned(vlm.vision_tower).vision_tower
    expected = vlm.vision_tower(patches(SAME), SAME)
    units = inner._no_split_modules
    accelerate.cpu_offload(vlm, execution_device=torch.device("cpu"), preload_module_classes=units)
    assert next(inner.parameters()).is_meta
    vlm.vision_tower.load_model()
    assert vlm.vision_tower.vision_tower is inner
    assert torch.equal(vlm.vision_tower(patches(SAME), SAME), expected)


def test_the_tower_copies_and_pickles(checkpoint, tower, patches, tmp_path):
    x = patches(SAME)
    torch.save(tower, tmp_path / "tower.pt")
    delayed = copy.deepcopy(SigLip2NaflexVisionTower(checkpoint("tiny"), args(), delay_load=True))
    delayed.load_state_dict(tower.state_dict())
    for other in (copy.deepcopy(tower), torch.load(tmp_path / "tower.pt", weights_only=False), delayed):
        assert torch.equal(other(x, SAME), tower(x, SAME))


def test_a_tower_built_on_the_meta_device_says_that_it_has_no_weights(checkpoint, tower, patches):
    x = patches(SAME)
    with torch.device("meta"):
        built = SigLip2NaflexVisionTower(checkpoint("tiny"), args(), delay_load=True)
    built.load_model()
    with pytest.raises(RuntimeError, match="meta device and no weights came"):
        built(x, SAME)
    built.load_state_dict(tower.state_dict(), assign=True)
    assert torch.equal(built(x, SAME), tower(x, SAME))


# whose choices: requires_grad, mode, names (V2, V3, T4, T9)


@pytest.mark.parametrize("delay_load", [False, True])
def test_requires_grad_and_mode_are_the_users(checkpoint, patches, delay_load):
    tower = SigLip2NaflexVisionTower(checkpoint("tiny"), args(), delay_load=delay_load)
    assert delay_load or (tower.training and tower.vision_tower.training)  # as any new module
    tower.requires_grad_(False)
    nn.ModuleList([tower]).eval()
    tower.load_model()
    assert not tower.vision_tower.training
    for mode in (False, True):
        tower.train(mode)
        tower.load_model()
        tower(patches(SAME), SAME)
        _ = tower.dtype, tower.dummy_feature, tower.num_patches, tower.config
        assert tower.vision_tower.training is mode
        assert not any(p.requires_grad for p in tower.parameters())
    tower.requires_grad_(True)
    tower.vision_tower.embeddings.requires_grad_(False)
    tower.load_model()
    assert [p.requires_grad for p in tower.vision_tower.embeddings.parameters()] == [False] * 3
    assert all(p.requires_grad for p in tower.vision_tower.encoder.parameters())


def test_the_tower_learns_at_its_own_rate(vlm, patches):
    """T9: groups by the keywords of LLaVA's trainer. AdamW's first step is the rate itself."""
    vlm.double()
    names = [name for name, _ in vlm.named_parameters()]
    assert f"{INNER}encoder.layers.0.self_attn.q_proj.weight" in names
    assert sum(name.startswith(INNER) for name in names) == 35 and len(names) == 37
    rates = {"vision_tower": 2e-6, "mm_projector": 1e-5}
    groups = [{"params": [p for n, p in vlm.named_parameters() if key in n], "lr": lr} for key, lr in rates.items()]
    assert sum(len(group["params"]) for group in groups) == len(names)
    optimizer = torch.optim.AdamW(groups, eps=1e-30, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in vlm.named_parameters()}
    vlm.mm_projector(vlm.vision_tower(patches(SAME), SAME)).square().sum().backward()
    optimizer.step()
    for name, parameter in vlm.named_parameters():
        step = (before[name] - parameter).abs().max().item()
        assert step == pytest.approx(rates[name.split(".")[0]], rel=1e-3), name


def test_lora_can_leave_the_tower_out(vlm):
    """V2."""
    peft = pytest.importorskip("peft")
    vlm.language_model = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 8)})
    for exclude, in_tower in ((None, True), (r".*vision_tower.*", False)):
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], exclude_modules=exclude)
        model = peft.get_peft_model(copy.deepcopy(vlm), config)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert names and any(".vision_tower." in name for name in names) == in_tower


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "nonreentrant", "reentrant"])
@pytest.mark.parametrize("part", ["all", "last layer", "lora"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_every_trainable_parameter_gets_a_gradient(vlm, patches, part, checkpointing, mode):
    """T4. `reentrant` is what transformers 4's `gradient_checkpointing_enable()` of a VLM chooses."""
    tower = vlm.vision_tower
    if part == "last layer":
        tower.requires_grad_(False)
        tower.vision_tower.encoder.layers[-1].requires_grad_(True)
    elif part == "lora":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        tower.vision_tower = peft.get_peft_model(tower.vision_tower, config).base_model.model
    if checkpointing is not None:
        vlm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        layers = tower.vision_tower.encoder.layers
        assert not any(layer._gradient_checkpointing_func.keywords["use_reentrant"] for layer in layers)
    getattr(vlm, mode)()
    x = patches(SAME)
    (tower(x, SAME).square().mean() + tower(x[:24], SAME[:1]).mean()).backward()  # twice a step
    for name, parameter in tower.named_parameters():
        assert bool(parameter.grad is not None and parameter.grad.any()) == parameter.requires_grad, name


# callers


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
