"""Packs to features on the host: counted, of the right image, and nothing left behind by a run that stops early."""

import multiprocessing
import os
import threading
import time

import numpy as np
import pytest
import torch
from encode_runs import image_bytes, inputs

from siglip2_packed import Siglip2PackedImageProcessor, Siglip2PackedVisionModel, preprocess
from siglip2_packed.collection import DECODE_IN
from siglip2_packed.collection.decode import (
    DecodedImage,
    decode,
    decoding_pool,
    packs,
    read_image,
)
from siglip2_packed.collection.features import Meter, StrictError, encode, launch, taken_apart


@pytest.fixture
def tower(checkpoint):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint()).eval()
    return model, Siglip2PackedImageProcessor.from_pretrained(checkpoint())


@pytest.fixture
def pool():
    with decoding_pool(torch.device("cpu"), Siglip2PackedImageProcessor(), 2) as threads:
        yield threads


def test_normalize_is_the_processors_arithmetic(photos):
    for settings in ({}, {"image_mean": (0.1, 0.2, 0.3), "image_std": (0.9, 0.8, 0.7)}, {"do_normalize": False}):
        processor = Siglip2PackedImageProcessor(patch_size=4, max_num_patches=30, **settings)
        patches, (h, w) = processor.read(photos / "07.png")
        packed = processor([photos / "07.png"])
        assert [1, h, w] == packed["grid_thw"][0].tolist()
        assert torch.equal(processor.normalize(torch.from_numpy(patches)), packed["pixel_values"])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_normalize_takes_levels_in_any_order_of_memory_and_nothing_else(device):
    processor = Siglip2PackedImageProcessor(patch_size=1)
    by_columns = torch.zeros(3, 9, dtype=torch.uint8, device=device).t()
    found = processor.normalize(by_columns)
    assert found.shape == (9, 3) and found.dtype == torch.float32
    assert processor.normalize(by_columns[:0]).shape == (0, 3)
    with pytest.raises(ValueError, match="patches must be uint8, as read\\(\\) gives them, got torch.float32"):
        processor.normalize(found)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_level_is_normalised_wherever_it_is_first(device):
    """What becomes of the levels is kept: from within inference mode, beside another default device and dtype."""
    levels = torch.arange(256, dtype=torch.uint8).repeat_interleave(48).view(-1, 48)
    mean, std = np.float32([0.48145466, 0.4578275, 0.40821073]), np.float32([0.26862954, 0.26130258, 0.27577711])
    expected = ((levels.numpy() * (1 / 255)).astype(np.float32).reshape(-1, 3) - mean) / std
    processor = Siglip2PackedImageProcessor(image_mean=mean.tolist(), image_std=std.tolist(), patch_size=4)
    preprocess._levels.cache_clear()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode():
            first = processor.normalize(levels.to(device))
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for found in (first, processor.normalize(levels.to(device).t().contiguous().t())):
        assert found.dtype == torch.float32 and found.shape == levels.shape
        assert np.array_equal(found.cpu().numpy().reshape(-1, 3), expected)


def test_features_can_be_trained_on(tower, pool):
    model, processor = tower
    [row] = encode(model, processor, inputs(image_bytes(0, (9, 20))), pool)
    weights = torch.ones(64, requires_grad=True)
    (row.patches @ weights).sum().backward()
    torch.testing.assert_close(weights.grad, row.patches.sum(dim=0))


@pytest.mark.parametrize("kept", [["patches"], ["pooled"], ["patches", "pooled"]], ids="-".join)
@pytest.mark.parametrize("wrong", [0, 2, 5], ids=str)
def test_what_is_not_finite_is_the_image_with_that_row(kept, wrong):
    """Images of 2, 1 and 3 patches; `wrong` is a row of theirs."""
    images = [DecodedImage(7 + i, f"{i}", (1, length)) for i, length in enumerate((2, 1, 3))]
    patches, pooled = torch.arange(12.0).view(6, 2), torch.arange(6.0).view(3, 2)
    whose = [0, 0, 1, 2, 2, 2][wrong]
    finite = {"finite_patches": torch.arange(6) != wrong, "finite_pooled": torch.arange(3) != whose}
    found = list(taken_apart({"patches": patches, "pooled": pooled} | finite, kept, images, torch.float16))
    assert [(image.ordinal, bool(image.error)) for image in found] == [(7 + i, i == whose) for i in range(3)]
    for i, (image, rows) in enumerate(zip(found, patches.split([2, 1, 3]))):
        expected = {"patches": rows, "pooled": pooled[i]}
        for name in ("patches", "pooled"):
            there = getattr(image, name)
            assert (there is None) == (i == whose or name not in kept)
            assert there is None or torch.equal(there, expected[name])


def test_the_meter(tower, pool):
    model, processor = tower
    meter = Meter(20)
    sources = [image_bytes(i, (8, 8)) for i in range(5)]
    flags = {"pooled": True, "patches": False, "patch_budget": 20, "workers": 2}
    rows = list(encode(model, processor, inputs(*sources, b"", *sources), pool, **flags, meter=meter))
    assert [row.ordinal for row in rows if row.error] == [5]
    assert (meter.images, meter.patches, meter.packs) == (10, 160, 10)
    assert 0 < meter.busy <= meter.seconds
    assert "packs 80% full" in str(meter)


def test_encode_refuses_processors_that_do_not_resize(tower, pool):
    model, processor = tower
    processor.do_resize = False
    with pytest.raises(ValueError, match="encode resizes and rescales"):
        list(encode(model, processor, inputs(image_bytes(0, (8, 8))), pool))


@pytest.mark.parametrize("how", ["closed", "strict", "model"])
def test_places_come_back_from_a_run_that_stops_early(tower, monkeypatch, how):
    def refuse(**_):
        raise ValueError

    model, processor = tower
    sources = [b"" if i == 150 else image_bytes(i, (40, 40)) for i in range(300)]
    with decoding_pool(torch.device("cpu"), processor, 2, "processes") as pool:
        places = len(pool.shelf.free)
        if how == "closed":
            images = decode(inputs(*sources), processor, pool, 2)
            next(images)
            images.close()
        else:
            error = StrictError if how == "strict" else ValueError
            if how == "model":
                monkeypatch.setattr(model, "forward", refuse)
            with pytest.raises(error):
                list(encode(model, processor, inputs(*sources), pool, patch_budget=160, workers=2, strict=True))
        pool.submit(os.getpid).result()
        begin = time.monotonic()
        while len(pool.shelf.free) < places and time.monotonic() < begin + 30:
            time.sleep(0.05)
        assert sorted(pool.shelf.free) == list(range(places))


@pytest.mark.parametrize("decode_in", DECODE_IN)
def test_a_consumer_that_stops_early_leaves_no_thread_and_no_process(tower, decode_in):
    model, processor = tower
    threads, children = threading.active_count(), set(multiprocessing.active_children())
    with decoding_pool(model.device, processor, 2, decode_in) as pool:
        rows = encode(model, processor, inputs(*[image_bytes(0, (8, 8))] * 300), pool, patch_budget=16, workers=2)
        next(rows)
        rows.close()
    assert threading.active_count() <= threads
    assert set(multiprocessing.active_children()) <= children


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [["pooled"], ["pooled", "patches"]])
def test_packs_are_launched_without_a_sync(checkpoint, kept):
    """Nothing waits for the device but the fetch of the pack before."""
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("base"), dtype=torch.bfloat16).to("cuda").eval()
    processor = Siglip2PackedImageProcessor.from_pretrained(checkpoint("base"))
    images = [read_image(processor, i, "", image_bytes(i, (40, 30 + i))) for i in range(4)]
    with torch.no_grad():
        for attempt in range(2):
            pack = next(packs(images, 16384, 64, pin_memory=True))
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if attempt else "default")
            try:
                finish = launch(model, processor, pack, "pooled" in kept, "patches" in kept, Meter(16384))
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert len(finish()) == 4
