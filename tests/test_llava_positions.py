"""The LLaVA tower with patch positions: rows find their place, and positions that do not fit are refused."""

import pytest
import torch
from llava_reference import (
    COUNTS,
    EXACT_POSITIONS,
    GRIDS,
    close,
    close_gradients,
    noisy_batch,
    raster,
    reference,
    weight_of,
)
from torch import nn

from siglip2_packed import PackedPatches, encode_images


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
