"""A pack's numbers, whatever they come as; and those that are wrong, found before anything of their size is made."""

import tracemalloc

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from siglip2_packed import PackedPatches, Siglip2PackedVisionModel, pack, pad, unpack
from siglip2_packed.layout import host_grids, integers

SIZES = np.array([(4, 3), (7, 5), (9, 1)])
"""(w, h), as PIL says them."""
GRIDS = [(1, 3, 4), (1, 5, 7), (1, 1, 9)]
ROWS = 56
HUGE = [(10**9, 1, 1)], [(1, 10**9, 1)], [(1, 31623, 31623)], [(10**6, 10**6, 10**6)]


def readonly(array):
    array = array.copy()
    array.flags.writeable = False
    return array


GRID = np.array(GRIDS)
FORMS = {
    "turned round": np.flip(np.array([(w, h, t) for t, h, w in GRIDS]), axis=1),
    "every other row": np.repeat(GRID, 2, axis=0)[::2],
    "backwards": GRID[::-1].copy()[::-1],
    "transposed": GRID.T.copy().T,
    "big-endian": GRID.astype(">i4"),
    "big-endian, 8 bytes": GRID.astype(">i8"),
    "read-only": readonly(GRID),
    **{name: GRID.astype(name) for name in ("uint8", "int8", "uint16", "int16", "uint32", "uint64")},
    "numpy integers": [tuple(map(np.int32, grid)) for grid in GRIDS],
    "rows of tensors": [torch.tensor(grid) for grid in GRIDS],
    "columns of a tensor": torch.tensor([(w, h, t) for t, h, w in GRIDS]).flip(1),
    "part of a tensor": torch.tensor(GRIDS).repeat_interleave(2, 0)[::2],
    **{f"{dtype}": torch.tensor(GRIDS).to(dtype) for dtype in (torch.uint8, torch.uint16, torch.uint32, torch.int16)},
}


@pytest.mark.parametrize("form", FORMS)
def test_integers_of_any_layout_byte_order_and_width(form):
    grid = FORMS[form]
    assert host_grids(grid) == GRIDS
    found = integers(grid, "grid_thw")
    assert found.dtype == torch.int64 and found.tolist() == [list(grid) for grid in GRIDS]
    packed = PackedPatches(torch.randn(ROWS, 48), grid)
    assert packed["grid_thw"].tolist() == found.tolist()
    assert [len(x) for x in unpack(packed["pixel_values"], grid)] == [12, 35, 9]


def test_sizes_as_pil_says_them(patches):
    rows = patches(GRIDS)
    padded = pad(PackedPatches(rows, GRIDS))
    mask = np.asarray(padded["pixel_attention_mask"])
    for shapes in (SIZES[:, ::-1], SIZES[:, ::-1].astype(">u2"), torch.tensor(SIZES).flip(1).to(torch.uint16)):
        for marks in (mask, mask[:, ::-1].copy()[:, ::-1], mask.astype(bool), mask.astype(">i8"), mask.tolist()):
            again = pack(padded["pixel_values"], spatial_shapes=shapes, pixel_attention_mask=marks)
            assert torch.equal(again["pixel_values"], rows) and again["grid_thw"].tolist() == GRID.tolist()


def test_offsets_and_positions_of_any_form(checkpoint, patches):
    model, x = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), vision_use_head=False), patches(GRIDS)
    order = np.concatenate([np.arange(12)[::-1], 12 + np.arange(35)[::-1], 47 + np.arange(9)[::-1]])
    offsets = np.array([0, 12, 47, 56])
    expected = model(x, GRIDS).last_hidden_state[order.copy()]
    for ids in (order, order.astype(">u2"), order.tolist(), torch.from_numpy(order.astype(np.uint8))):
        for ends in (offsets.astype("uint32"), np.flip(offsets[::-1].copy()), offsets.tolist(), offsets.astype(">i2")):
            out = model(x[order.copy()], GRIDS, cu_seqlens=ends, position_ids=ids).last_hidden_state
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="segment 1 has -8 rows"):
        model(x, GRIDS, cu_seqlens=np.array([0, 20, 12, 56], dtype=np.uint32))


@pytest.mark.parametrize(
    ("grid", "got"),
    [
        (GRID.astype(">f4"), ">f4"), (GRID.astype(bool), "bool"), (GRID * 1j, "complex"),
        (np.array([["1", "3", "4"]]), "U1"), (np.array([[1, 3, 2**63]], dtype=np.uint64), "uint64"),
        ([torch.ones(3), torch.ones(3)], "float32"), ([torch.ones(3).int(), torch.ones(2).int()], "3.*2"),
    ],
)  # fmt: skip
def test_what_are_no_integers(grid, got):
    with pytest.raises(ValueError, match=f"grid_thw must hold integers, got.*{got}"):
        host_grids(grid)


def test_a_tensor_that_is_not_dense():
    nested = torch.nested.nested_tensor([torch.tensor([1, 2, 3])], layout=torch.jagged)
    for grid in (nested, torch.tensor([[1, 2, 3]]).to_sparse()):
        with pytest.raises(ValueError, match="grid_thw must be a dense tensor, got torch"):
            host_grids(grid)


@pytest.fixture
def small():
    """Nothing of the size of a grid that is not there is made."""
    tracemalloc.start()
    yield
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize("grid", HUGE, ids=str)
def test_counts_are_compared_before_anything_is_made(checkpoint, grid, small):
    rows, count = torch.randn(12, 48), int(np.prod(np.array(grid, dtype=object)))
    message = f"covers {count} patches, (pixel_values|hidden_states) has 12 rows"
    padded = {"pixel_values": rows[None], "spatial_shapes": [grid[0][1:]], "pixel_attention_mask": torch.ones(1, 12)}
    for call in (
        lambda: PackedPatches(rows, grid),
        lambda: PackedPatches(rows, grid, "joint"),
        lambda: unpack(rows, grid),
        lambda: unpack(rows, grid, padded=True),
        lambda: pad(rows, grid),
        lambda: pad({"pixel_values": rows, "grid_thw": torch.tensor(grid)}),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=rf"covers {count} patches, got \[12, 48\]"):
        pack([rows], grid)
    if grid[0][0] == 1:
        with pytest.raises(ValueError, match=rf"covers {count} patches, got \[12, 48\]"):
            pack(padded)


@pytest.mark.parametrize("grid", HUGE, ids=str)
def test_the_models_compare_them_too(checkpoint, tower, grid):
    rows, count = torch.randn(12, 48), int(np.prod(np.array(grid, dtype=object)))
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), vision_use_head=False)
    sparse = {"cu_seqlens": [0, 12], "position_ids": list(range(12))}
    tracemalloc.start()
    for given in ({}, {"temporal": "joint"}, {"cu_seqlens": [0, 12]}, sparse):
        with pytest.raises(ValueError, match=f"covers {count} patches, pixel_values has 12 rows"):
            model(rows, grid, **given)
    positions, (_, h, w) = torch.zeros(1, 12, 3, dtype=torch.long), grid[0]
    for images in (rows, [rows], rows[None]):
        for given in (None, [None, None], [None], *[[positions]] * (h * w > 1)):  # twelve of many frames of one patch
            with pytest.raises(ValueError, match=f"{count}|{h * w}|patch_positions has"):
                tower(images, grid, given)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_sparse_video_may_choose_among_many_frames(checkpoint):
    """What is made follows the rows and the distinct frames, not the rows times all that the grid covers."""
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), vision_use_head=False)
    x, grid = torch.randn(6, 48), [(10**5, 1, 6)]
    ids = 6 * np.array([0, 17, 10**5 - 1, 5, 3, 9]) + np.arange(6)
    with torch.no_grad():
        out = model(x, grid, cu_seqlens=[0, 6], position_ids=ids).last_hidden_state
        torch.testing.assert_close(out, model(x, [(1, 1, 6)]).last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"position_ids": 5}, r"position_ids has shape \[\], pixel_values has 12 rows"),
        ({"position_ids": torch.tensor(5)}, r"position_ids has shape \[\]"),
        ({"position_ids": "abc"}, "position_ids must hold integers"),
        ({"position_ids": [0.5] * 12}, "position_ids must hold integers, got float64"),
        ({"position_ids": torch.arange(12, device="meta")}, r"position_ids \[12\] is a meta tensor without numbers"),
        ({"position_ids": []}, r"position_ids has shape \[0\]"),
        ({"max_seqlen": torch.tensor([1, 2])}, r"max_seqlen must be an integer, got tensor\(\[1, 2\]\)"),
        ({"max_seqlen": torch.tensor(12.0)}, "max_seqlen must be an integer, got tensor"),
        ({"max_seqlen": torch.tensor(True)}, "max_seqlen must be an integer"),
        ({"max_seqlen": torch.tensor(12, device="meta")}, "max_seqlen must be an integer"),
        ({"max_seqlen": True}, "max_seqlen must be an integer, got True"),
        ({"max_seqlen": 12.0}, "max_seqlen must be an integer, got 12.0"),
        ({"max_seqlen": "12"}, "max_seqlen must be an integer, got '12'"),
        ({"max_seqlen": np.array([12, 12])}, "max_seqlen must be an integer"),
        ({"temporal": []}, r"temporal must be one of .*, got \[\]"),
        ({"temporal": ""}, "temporal must be one of .*, got ''"),
        ({"temporal": 0}, "temporal must be one of .*, got 0"),
        ({"temporal": ["joint"]}, "temporal must be one of"),
        ({"cu_seqlens": 12}, r"cu_seqlens must be \[S\+1\] offsets.*shape \[\]"),
        ({"cu_seqlens": torch.tensor([0, 12], device="meta")}, r"cu_seqlens \[2\] is a meta tensor without numbers"),
        ({"cu_seqlens": [0.0, 12.0]}, "cu_seqlens must hold integers"),
        ({"grid_thw": torch.ones(1, 3, dtype=torch.long, device="meta")}, r"grid_thw \[1, 3\] is a meta tensor"),
        ({"grid_thw": 12}, r"got shape \[\]"),
        ({"grid_thw": None}, "grid_thw must hold integers"),
    ],
)
def test_arguments_that_are_nothing_of_the_kind(checkpoint, given, message):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), vision_use_head=False)
    given = {"grid_thw": [(1, 3, 4)], **given}
    if "position_ids" in given:
        given["cu_seqlens"] = [0, 12]
    with pytest.raises(ValueError, match=message):
        model(torch.randn(12, 48), **given)


def test_meta_patches_need_a_model_on_the_meta_device(checkpoint):
    model, rows = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny")), torch.zeros(12, 48, device="meta")
    with pytest.raises(ValueError, match=r"pixel_values \[12, 48\] is a meta tensor without numbers"):
        model(rows, [(1, 3, 4)])
    assert model.to("meta")(rows, [(1, 3, 4)]).pooler_output.shape == (1, 64)


def test_zero_dimensional_integers_are_integers(checkpoint, patches):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))
    for longest in (12, np.int64(12), torch.tensor(12), torch.tensor(12, dtype=torch.int32)):
        assert model(patches([(1, 3, 4)]), [(1, 3, 4)], max_seqlen=longest).pooler_output.shape == (1, 64)


def test_tensors_without_numbers_in_pack_unpack_and_pad():
    rows, grid = torch.randn(12, 48), torch.ones(1, 3, dtype=torch.long, device="meta")
    with FakeTensorMode() as mode:
        fake = torch.ones(1, 3, dtype=torch.long)
    assert fake.fake_mode is mode
    for given in (grid, fake):
        for call in (PackedPatches, unpack, pad, lambda rows, grid: pack([rows], grid)):
            with pytest.raises(ValueError, match=r"grid_thw \[1, 3\] is a .* tensor without numbers"):
                call(rows, given)
    mask = torch.ones(1, 12, device="meta")
    with pytest.raises(ValueError, match=r"pixel_attention_mask \[1, 12\] is a meta tensor"):
        pack(rows[None], [(1, 3, 4)], pixel_attention_mask=mask)


@pytest.mark.parametrize("call", [pack, pad, PackedPatches])
@pytest.mark.parametrize("given", [5, "abc", None, np.zeros((12, 48), np.float32)])
def test_patches_that_are_none(call, given):
    with pytest.raises(ValueError, match="pixel_values"):
        call(given, [(1, 3, 4)])
