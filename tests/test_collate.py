"""Items of a data set -> one pack: that of the processor on all images, with other fields along."""

import numpy as np
import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from siglip2_packed import PackedPatches, Siglip2PackedImageProcessor
from siglip2_packed.data import collate


@pytest.fixture(scope="module")
def photos():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (*size, 3), dtype=np.uint8) for size in [(50, 70), (13, 200), (64, 64), (9, 5)]]


def test_collate_equals_the_processor_on_all_images(photos):
    processor = Siglip2PackedImageProcessor(patch_size=4, max_num_patches=64)
    together = processor(photos)
    packs = [processor(photo) for photo in photos]
    pairs = [(pack["pixel_values"], pack["grid_thw"]) for pack in packs]
    triples = [(pack["pixel_values"], tuple(pack["grid_thw"][0].tolist())) for pack in packs]
    named = [dict(pixel_values=rows, grid_thw=grid) for rows, grid in pairs]
    for items in (packs, pairs, triples, named):
        packed = collate(items)
        assert isinstance(packed, PackedPatches)
        assert list(packed) == list(together)
        for key in ("pixel_values", "grid_thw", "cu_seqlens"):
            assert torch.equal(packed[key], together[key]) and packed[key].dtype == together[key].dtype
        assert packed["max_seqlen"] == together["max_seqlen"] and type(packed["max_seqlen"]) is int
        assert packed.kept == [0, 1, 2, 3]


def test_collate_takes_other_fields_along(photos):
    processor = Siglip2PackedImageProcessor(patch_size=4, max_num_patches=64)
    items = [
        {**processor(photo), "label": i, "box": torch.ones(4) * i, "name": f"{i}"} for i, photo in enumerate(photos)
    ]
    packed = collate(items)
    assert packed["label"].tolist() == [0, 1, 2, 3]
    assert packed["box"].shape == (4, 4) and packed["name"] == ["0", "1", "2", "3"]
    moved = packed.to(torch.bfloat16)
    assert moved["pixel_values"].dtype == torch.bfloat16
    assert moved["box"].dtype == torch.float32 and moved["label"].dtype == torch.int64
    assert packed.to("meta")["label"].device.type == "meta"
    assert packed["cu_seqlens"].device.type == "cpu"


def test_collate_of_videos_and_of_skipped_images():
    frames = torch.randn(12 + 5, 48)
    joint = [PackedPatches(frames[:12], [(3, 2, 2)], "joint"), PackedPatches(frames[12:], [(1, 1, 5)], "joint")]
    assert collate(joint, temporal="joint")["cu_seqlens"].tolist() == [0, 12, 17]
    with pytest.raises(ValueError, match="item 0: its cu_seqlens are not those of temporal='frames'"):
        collate(joint)
    nothing, one = PackedPatches(torch.zeros(0, 48), []), PackedPatches(frames[:6], [(1, 2, 3)])
    packed = collate([nothing, one, nothing])
    assert packed.kept == [1] and packed["grid_thw"].tolist() == [[1, 2, 3]]
    assert collate([nothing])["pixel_values"].shape == (0, 48)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "empty list"),
        (
            [(torch.ones(6, 3), (1, 2, 3)), (torch.ones(5, 3), (1, 2, 3))],
            "item 1: grid_thw covers 6 patches.*has 5 rows",
        ),
        # these would cancel out
        (
            [(torch.ones(5, 3), (1, 2, 3)), (torch.ones(7, 3), (1, 2, 3))],
            "item 0: grid_thw covers 6 patches.*has 5 rows",
        ),
        ([(torch.ones(6, 3), (1, 2, 3)), (torch.ones(6, 4), (1, 2, 3))], r"item 1: pixel_values must be \[T, 3\]"),
        ([(torch.ones(6, 3).int(), (1, 2, 3))], "item 0.*floating"),
        ([{"pixel_values": torch.ones(6, 3)}], "item 0: pixel_values and grid_thw are needed"),
        ([torch.ones(6, 3)], "item 0"),
        ([(torch.ones(6, 3), (1, 2, 3)), None], "item 1"),
        (
            [{"pixel_values": torch.ones(1, 3), "grid_thw": (1, 1, 1), **more} for more in ({"label": 1}, {})],
            "item 1: its fields are",
        ),
    ],
)
def test_collate_names_the_item_that_does_not_fit(items, message):
    with pytest.raises(ValueError, match=message):
        collate(items)


def test_dataloader_pins_patches_and_other_fields_not_the_metadata(monkeypatch):
    """What DataLoader(pin_memory=True) does with a batch, without a device: the tensors that would be pinned."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    packed = collate([dict(pixel_values=torch.ones(6, 3), grid_thw=(1, 2, 3), label=torch.ones(2))])
    rows, label = packed["pixel_values"], packed["label"]
    result = pin_memory(packed)
    assert isinstance(result, PackedPatches)
    assert [tensor is expected for tensor, expected in zip(pinned, (rows, label), strict=True)] == [True, True]
    assert result["pixel_values"] is not rows and result["label"] is not label


def test_what_is_on_a_device_is_not_pinned(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pytest.fail(f"pinned on {tensor.device}"))
    packed = PackedPatches(torch.zeros(6, 48), [(1, 2, 3)])
    packed["pixel_values"] = packed["pixel_values"].to("meta")
    assert packed.pin_memory()["pixel_values"].is_meta
