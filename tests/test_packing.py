import copy
import pickle

import numpy as np
import pytest
import torch
import transformers

from siglip2_packed import PackedPatches, convert_to_packing_format, pack, pad, unpack
from siglip2_packed.packing import cumulative, make_layout

GRIDS = [(1, 3, 4), (1, 5, 7), (1, 1, 9)]
ROWS = 12 + 35 + 9


def packed(grids=GRIDS, temporal="frames"):
    return PackedPatches(torch.randn(sum(t * h * w for t, h, w in grids), 48), grids, temporal)


def test_metadata_of_a_pack():
    pack_ = packed([(1, 3, 4), (2, 5, 7)])
    assert list(pack_) == ["pixel_values", "grid_thw", "cu_seqlens", "max_seqlen"]
    assert pack_["grid_thw"].tolist() == [[1, 3, 4], [2, 5, 7]]
    assert pack_["grid_thw"].dtype == torch.int64
    assert pack_["cu_seqlens"].tolist() == [0, 12, 47, 82]
    assert pack_["cu_seqlens"].dtype == torch.int32
    assert pack_["max_seqlen"] == 35
    assert type(pack_["max_seqlen"]) is int
    assert pack_.num_images == 2


def test_a_pack_holds_as_many_patches_as_int32_counts():
    with pytest.raises(ValueError, match="at most 2147483647 patches"):
        cumulative([2**30, 2**30])


def test_joint_segments_cover_all_frames():
    assert packed([(3, 2, 2), (1, 1, 5)], "joint")["cu_seqlens"].tolist() == [0, 12, 17]
    assert pack([torch.randn(12, 48)], [(3, 2, 2)], temporal="joint")["max_seqlen"] == 12
    with pytest.raises(ValueError, match="temporal"):
        packed(temporal="video")


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([[1, 3, 4]], "covers 12 patches, pixel_values has 15 rows"),
        ([[1, 4, 4]], "covers 16 patches, pixel_values has 15 rows"),
        ([[1, 0, 16]], r"grid_thw\[0\] is \(1, 0, 16\)"),
        ([[1, 3, 5], [1, -1, 2]], r"grid_thw\[1\] is \(1, -1, 2\)"),
        ([[3, 5]], r"got \[1, 2\].*need t = 1"),
        ([1, 3, 5], r"got shape \[3\]"),
        ([[[1, 3, 5]]], "got shape"),
        ([[1.0, 3.0, 5.0]], "must hold integers"),
        (torch.tensor([[True, True, True]]), "must hold integers"),
        ([(1, None, 7)], "grid_thw must hold integers"),
        ([(1, 3, 5), (1, 2)], "grid_thw must hold integers"),
        ("abc", "grid_thw must hold integers"),
        ([[1, 2**70, 1]], "grid_thw must hold integers"),
    ],
)
def test_wrong_grids_are_errors_that_name_both_numbers(grid, message):
    with pytest.raises(ValueError, match=message):
        PackedPatches(torch.randn(15, 48), grid)


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (torch.randn(3, 5, 48), "through pack first"),
        (torch.randn(1, 3, 16, 16), "convert_to_packing_format"),
        (torch.zeros(15, 48, dtype=torch.uint8), "floating"),
        (torch.zeros(15, 48, dtype=torch.int64), "floating"),
        (np.zeros((15, 48), np.float32), "must be a tensor"),
    ],
)
def test_wrong_patches_are_errors(pixel_values, message):
    with pytest.raises(ValueError, match=message):
        PackedPatches(pixel_values, [[1, 3, 5]])


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 12, 50], "ends at 50, grid_thw covers 56"),
        ([0, 12, 12, 56], "segment 1 has 0 rows"),
        ([0, 20, 12, 56], "segment 1 has -8 rows"),
        ([3, 12, 56], "begin with 0"),
    ],
)
def test_wrong_offsets_are_errors(cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        make_layout(GRIDS, cu_seqlens=torch.tensor(cu_seqlens))


def test_max_seqlen_below_the_longest_is_an_error():
    assert make_layout(GRIDS, max_seqlen=64).max_seqlen == 35
    with pytest.raises(ValueError, match="max_seqlen is 34, the longest segment has 35"):
        make_layout(GRIDS, max_seqlen=34)


def test_to_casts_patches_and_leaves_metadata_on_the_host():
    pack_ = packed().to(torch.bfloat16)
    assert pack_["pixel_values"].dtype == torch.bfloat16
    assert pack_["grid_thw"].dtype == torch.int64
    assert packed().to("meta")["grid_thw"].device.type == "cpu"


def test_trainers_and_loaders_can_rebuild_a_pack():
    pack_ = packed()
    for clone in (type(pack_)(dict(pack_)), copy.copy(pack_), pickle.loads(pickle.dumps(pack_))):
        assert isinstance(clone, PackedPatches)
        assert torch.equal(clone["pixel_values"], pack_["pixel_values"])
        assert clone["max_seqlen"] == 35
    assert pickle.loads(pickle.dumps(pack_)).kept == [0, 1, 2]


def test_conversion_is_transformers_patch_layout():
    images = torch.randn(2, 3, 8, 12)
    patches, grid_thw = convert_to_packing_format(images, 4)
    expected = [transformers_patches(image.numpy(), 4) for image in images]
    assert torch.equal(patches, torch.from_numpy(np.concatenate(expected)))
    assert grid_thw.tolist() == [[1, 2, 3], [1, 2, 3]]
    with pytest.raises(ValueError, match="8x12 is not a multiple of patch_size 5"):
        convert_to_packing_format(images, 5)


def transformers_patches(image, patch_size):
    """`[C, H, W]`, as 5.x cuts it; 4.57 wants the channels last."""
    if int(transformers.__version__.split(".")[0]) >= 5:
        from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

        return convert_image_to_patches(image, patch_size)
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    return convert_image_to_patches(image.transpose(1, 2, 0), patch_size)


def test_list_pack_padded_round_trips():
    pack_ = packed()
    images = unpack(pack_["pixel_values"], GRIDS)
    assert [x.shape[0] for x in images] == [12, 35, 9]
    assert torch.equal(pack(images, GRIDS)["pixel_values"], pack_["pixel_values"])

    padded = pad(pack_, max_num_patches=40)
    assert padded["pixel_values"].shape == (3, 40, 48)
    assert padded["pixel_attention_mask"].sum(1).tolist() == [12, 35, 9]
    assert padded["spatial_shapes"].tolist() == [[3, 4], [5, 7], [1, 9]]
    assert padded["pixel_values"][0, 12:].abs().sum() == 0
    again = pack(padded)
    assert torch.equal(again["pixel_values"], pack_["pixel_values"])
    assert again["grid_thw"].tolist() == pack_["grid_thw"].tolist()

    features, mask = unpack(pack_["pixel_values"], GRIDS, padded=True)
    assert torch.equal(features[mask], pack_["pixel_values"])
    assert mask.sum(1).tolist() == [12, 35, 9]


def test_a_pack_whose_frames_attend_to_each_other_is_not_padded_without_a_word():
    x, grid = torch.randn(14, 48), [(2, 2, 3), (1, 1, 2)]
    joint = PackedPatches(x, grid, temporal="joint")
    for packed in (joint, dict(joint), PackedPatches(x, grid) | {"cu_seqlens": torch.tensor([0, 12, 14])}):
        with pytest.raises(ValueError, match="cu_seqlens are not its frames"):
            pad(packed)
    images = PackedPatches(x, [(1, 2, 6), (1, 1, 2)], temporal="joint")
    assert pad(images)["spatial_shapes"].tolist() == [[2, 6], [1, 2]]
    assert torch.equal(pad(x, grid)["pixel_values"], pad(PackedPatches(x, grid))["pixel_values"])


def test_frames_become_rows_of_the_padded_batch():
    pack_ = packed([(2, 3, 4), (1, 1, 2)])
    padded = pad(pack_)
    assert padded["spatial_shapes"].tolist() == [[3, 4], [3, 4], [1, 2]]
    assert torch.equal(padded["pixel_values"][1], pack_["pixel_values"][12:24])


def test_wrong_round_trips_are_errors():
    pack_ = packed()
    padded = pad(pack_)
    mask = padded["pixel_attention_mask"].clone()
    mask[0, 12] = 1
    with pytest.raises(ValueError, match="image 0: pixel_attention_mask marks 13 rows, the grid covers the first 12"):
        pack(padded["pixel_values"], spatial_shapes=padded["spatial_shapes"], pixel_attention_mask=mask)
    with pytest.raises(ValueError, match="covers 12 patches, got"):
        pack([torch.randn(13, 48)], [(1, 3, 4)])
    with pytest.raises(ValueError, match="2 images, the grid 1"):
        pack([torch.randn(12, 48)] * 2, [(1, 3, 4)])
    with pytest.raises(ValueError, match="image 1: pixel_values must be floating.*int64"):
        pack([torch.zeros(6, 48), torch.zeros(6, 48, dtype=torch.int64)], [(1, 2, 3)] * 2)
    with pytest.raises(ValueError, match="image 1: patch_dim 40, image 0 has 48"):
        pack([torch.randn(12, 48), torch.randn(12, 40)], [(1, 3, 4)] * 2)
    with pytest.raises(ValueError, match="image 0: patches must be a tensor"):
        pack([np.zeros((12, 48))], [(1, 3, 4)])
    with pytest.raises(ValueError, match="needs the keys cu_seqlens, grid_thw, max_seqlen too"):
        PackedPatches({"pixel_values": torch.zeros(1, 48)})
    with pytest.raises(ValueError, match="patch_size must be a positive integer, got 0"):
        convert_to_packing_format(torch.zeros(1, 3, 8, 8), 0)
    with pytest.raises(ValueError, match="exactly one"):
        pack([torch.randn(12, 48)])
    with pytest.raises(ValueError, match="max_num_patches is 34, the longest image has 35"):
        pad(pack_, max_num_patches=34)
    with pytest.raises(ValueError, match="covers 12 patches, hidden_states has 13"):
        unpack(torch.randn(13, 4), [(1, 3, 4)])


def test_empty_packs():
    empty = PackedPatches(torch.zeros(0, 48), [])
    assert empty["grid_thw"].shape == (0, 3)
    assert empty["cu_seqlens"].tolist() == [0]
    assert empty["max_seqlen"] == 0
    assert unpack(torch.zeros(0, 8), []) == []
    features, mask = unpack(torch.zeros(0, 8), torch.zeros(0, 3, dtype=torch.long), padded=True)
    assert features.shape == (0, 0, 8)
    assert mask.shape == (0, 0)
    assert pad(empty)["pixel_values"].shape == (0, 0, 48)


@pytest.mark.parametrize(
    ("grids", "temporal", "expected"),
    [
        ([(1, 26, 39), (1, 33, 30)], "frames", "2 images, 2004 patches, longest 1014"),
        ([(1, 1, 1)], "frames", "1 image, 1 patch, longest 1"),
        ([(1, 13, 19), (3, 4, 6), (2, 1, 256)], "frames", "1 image, 2 videos of 5 frames, 831 patches, longest 256"),
        ([(3, 4, 6)], "joint", "1 video of 3 frames, 72 patches, longest 72"),
        ([], "frames", "0 images, 0 patches"),
    ],
)
def test_a_pack_says_what_it_holds_in_a_line(patches, grids, temporal, expected):
    packed = PackedPatches(patches(grids), grids, temporal)
    assert repr(packed) == str(packed) == f"PackedPatches: {expected}"
    packed["labels"] = torch.zeros(len(grids))
    assert repr(packed) == f"PackedPatches: {expected}, labels"
    assert repr(PackedPatches(dict(packed))) == repr(packed)


def test_packs_joined_key_by_key_have_a_repr(patches):
    packed = PackedPatches(patches([(1, 2, 3)]), [[1, 2, 3]])
    joined = torch.utils.data.default_collate([packed, packed])
    assert repr(joined) == "PackedPatches: pixel_values, grid_thw, cu_seqlens, max_seqlen"


def test_a_pack_that_was_taken_apart_has_a_repr(patches):
    packed = PackedPatches(patches([(1, 2, 3)]), [(1, 2, 3)])
    packed["grid_thw"] = packed["grid_thw"].to("meta")
    assert repr(packed) == "PackedPatches: pixel_values, grid_thw, cu_seqlens, max_seqlen"
    del packed["grid_thw"]
    assert repr(packed) == "PackedPatches: pixel_values, cu_seqlens, max_seqlen"
