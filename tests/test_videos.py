"""Batches and videos: how entries become rows and segments, in threads and loaders too."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pixels import processor, rgb, same

from siglip2_packed.preprocess import resized_grid


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
        (None, "photo.jpg", "videos must be a 4-D array .* got str"),
        (None, "clip.mp4", "'clip.mp4' is a video file, which is not decoded here: read its frames .* videos=.frames."),
        (None, ["clip.mp4"], "'clip.mp4' is a video file"),
        (None, [[rgb(20, 30)], [Path("a/B.MOV")]], "'a/B.MOV' is a video file"),
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
