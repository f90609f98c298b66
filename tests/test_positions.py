"""Positions: antialiased bilinear resize of the table, exact, differentiable, without a loop over images."""

import functools

import pytest
import torch
import torch.nn.functional as F
from implementations import DEVICES, IN_DTYPES, INTERPRETED, NAMES, draw
from torch.utils.flop_counter import FlopCounterMode

import kernels_ref
from siglip2_packed import Siglip2PackedVisionModel
from siglip2_packed.measure import relative_error
from siglip2_packed.ops import positions
from siglip2_packed.ops.positions import ADD_POSITIONS, Places, add_positions, eager
from siglip2_packed.ops.positions.eager import resize_positions
from siglip2_packed.ops.runtime.check import Refused

GRIDS = [(13, 19), (19, 13), (8, 32), (1, 256), (256, 1), (7, 1), (1, 1), (24, 42), (16, 16), (3, 5), (15, 17)]


def table(side=16, dim=24, seed=0, dtype=torch.float32):
    return torch.randn(side * side, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("grid", GRIDS)
def test_one_grid_matches_the_reference(grid):
    expected = kernels_ref.resize_positions(table(dtype=torch.float64), *grid)
    torch.testing.assert_close(resize_positions(table(), [(1, *grid)]).double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if min(grid) > 1])
def test_one_grid_matches_interpolate(grid):
    square = table(dtype=torch.float64).view(1, 16, 16, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bilinear", align_corners=False, antialias=True)
    expected = resized[0].permute(1, 2, 0).flatten(0, 1)
    torch.testing.assert_close(resize_positions(table(), [(1, *grid)]).double(), expected, atol=2e-6, rtol=0)


def test_swapped_sides_differ():
    a, b = resize_positions(table(), [(1, 13, 19)]), resize_positions(table(), [(1, 19, 13)])
    assert (a - b).abs().max() > 0.1


def test_identity_is_bit_exact_at_the_tables_own_size():
    assert torch.equal(resize_positions(table(), [(1, 16, 16)]), table())
    assert torch.equal(resize_positions(table(side=27), [(1, 27, 27)]), table(side=27))


def test_a_pack_is_its_images_in_order_and_frames_share_positions():
    grids = [(1, 13, 19), (2, 3, 5), (1, 16, 16), (1, 3, 5), (1, 13, 19), (3, 1, 9)]
    alone = [resize_positions(table(), [(1, h, w)]) for t, h, w in grids for _ in range(t)]
    assert torch.equal(resize_positions(table(), grids), torch.cat(alone))


def test_gradient_of_the_table_matches_the_reference():
    grids = [(1, 13, 19), (1, 8, 32), (2, 3, 5), (1, 1, 256), (1, 7, 1)]
    ours, ref = table().requires_grad_(), table(dtype=torch.float64).requires_grad_()
    out = resize_positions(ours, grids)
    expected = torch.cat([kernels_ref.resize_positions(ref, h, w) for t, h, w in grids for _ in range(t)])
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(grad)
    expected.backward(grad.double())
    assert (ours.grad.double() - ref.grad).norm() / ref.grad.norm() < 1e-6


def test_computed_in_float32_whatever_the_tables_dtype():
    low = table(dtype=torch.bfloat16)
    out = resize_positions(low, [(1, 13, 19)])
    assert out.dtype == torch.float32
    assert torch.equal(out, resize_positions(low.float(), [(1, 13, 19)]))


def test_empty_pack_stays_attached():
    weight = table().requires_grad_()
    out = resize_positions(weight, [])
    assert out.shape == (0, 24)
    out.sum().backward()
    assert weight.grad.abs().sum() == 0


def test_work_follows_distinct_grids(monkeypatch):
    """1000 images of two sizes: the sums are computed for two."""
    rows = []
    weighted_sums = eager._weighted_sums
    monkeypatch.setattr(eager, "_weighted_sums", lambda t, p: rows.append(len(p.offsets)) or weighted_sums(t, p))
    resize_positions(table(), [(1, 3, 5), (1, 5, 4)] * 500)
    assert rows == [3 + 5, 15 + 20]


# Added to the patches, by every implementation

PACK = [(1, 13, 19), (1, 8, 32), (2, 2, 3), (1, 16, 16), (1, 7, 1), (1, 1, 20), (1, 40, 2)]
IDENTITY = slice(13 * 19 + 256 + 12, 13 * 19 + 512 + 12)
FEW = [(1, 5, 3), (2, 2, 7), (1, 4, 4), (1, 1, 6), (1, 9, 1)]  # of a table of 4x4
FEW_ROWS = sum(t * h * w for t, h, w in FEW)
ADD_BOUND = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # resized in float32


def exactly(x, table, grids):
    exact = table.double().cpu()
    resized = torch.cat([kernels_ref.resize_positions(exact, h, w) for t, h, w in grids for _ in range(t)])
    return x.double() + resized.to(x.device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "dtype"), IN_DTYPES)
def test_added_to_patches(name, dtype, device):
    x, table = draw(device, dtype, (FEW_ROWS, 72), (16, 72))
    out = ADD_POSITIONS.of(name)(x, table, Places(FEW), dtype)
    assert out.dtype == dtype and relative_error(out, exactly(x, table, FEW)) <= ADD_BOUND[dtype]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("D", [72, pytest.param(1152, marks=pytest.mark.gpu)])
def test_added_to_the_patches_of_a_pack(name, D, device):
    x, table = draw(device, torch.float32, (sum(t * h * w for t, h, w in PACK), D), (256, D))
    out = ADD_POSITIONS.of(name)(x, table, Places(PACK), torch.float32)
    assert (out - exactly(x, table, PACK)).abs().max() <= 1e-5
    assert torch.equal(out[IDENTITY], x[IDENTITY] + table)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_no_patches_and_strided_ones(name, device):
    add = functools.partial(ADD_POSITIONS.of(name), dtype=torch.float32)
    x, table = draw(device, torch.float32, (FEW_ROWS, 72), (16, 72))
    assert add(x[:0], table, Places([])).shape == (0, 72)
    expected = add(x, table, Places(FEW))
    assert torch.equal(add(torch.cat((x, x), 1)[:, 72:], table, Places(FEW)), expected)
    assert torch.equal(add(x, torch.cat((table, table), 1)[:, 72:], Places(FEW)), expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_no_image_become_zeros_where_only_the_device_knows(device):
    """As a CUDA graph's buffers have them: nothing of them reaches the rows of images, whatever they hold."""
    x, table = draw(device, torch.float32, (FEW_ROWS + 3, 72), (16, 72))
    x[FEW_ROWS:] = float("nan")
    images, image_of_row = Places(FEW).on(torch.device(device))
    places = Places.on_device(images.view(-1, 3), F.pad(image_of_row, (0, 3), value=-1))
    out = ADD_POSITIONS.of("triton")(x, table, places, torch.float32)
    assert (out[:FEW_ROWS] - exactly(x[:FEW_ROWS], table, FEW)).abs().max() <= 1e-5
    assert (out[FEW_ROWS:] == 0).all()
    with pytest.raises(Refused, match="only the device knows"):
        ADD_POSITIONS.of("eager")(x, table, places, torch.float32)


def test_places_of_rows():
    images, image_of_row = Places([(2, 1, 2), (1, 3, 1)]).on(torch.device("cpu"))
    assert images.tolist() == [0, 1, 2, 4, 3, 1] and image_of_row.tolist() == [0] * 4 + [1] * 3
    assert images.dtype == image_of_row.dtype == torch.int32
    assert [x.shape for x in Places([]).on(torch.device("cpu"))] == [(0,), (0,)]


@INTERPRETED
def test_a_kernel_adds_what_nobody_follows(trusted, monkeypatch):
    """Gradients, modes, rows out of order and a stream of another dtype are the torch path's, whatever is forced."""
    trusted(positions=["triton"])
    kernel = positions.ADD_POSITIONS.of("triton")
    ran, grids = [], [(1, 3, 4)]
    monkeypatch.setattr(
        "siglip2_packed.ops.positions.triton.add_positions", lambda *x: ran.append(len(x[0])) or kernel(*x)
    )
    x, weight = draw("cpu", torch.float32, (12, 8), (16, 8))
    expected = eager.add_positions(x, weight, Places(grids), torch.float32)

    def calls(*given, dtype=torch.float32):
        ran.clear()
        assert relative_error(add_positions(*given, dtype).float(), expected) <= 1e-2
        return ran.count(12)

    with torch.no_grad():
        assert calls(x, weight, Places(grids)) == 1
        assert calls(x, weight, Places(grids, torch.arange(12))) == 0
        assert calls(x, weight.bfloat16(), Places(grids)) == 0
        assert calls(x, weight, Places(grids), dtype=torch.bfloat16) == 0
        assert calls(x.bfloat16(), weight, Places(grids)) == 0
        with FlopCounterMode(display=False):
            assert calls(x, weight, Places(grids)) == 0
    assert calls(x, weight, Places(grids)) == 0


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("dtype", "of_table", "autocast", "of_result"),
    [
        (torch.bfloat16, torch.float32, False, torch.bfloat16),
        (torch.float32, torch.bfloat16, False, torch.float32),
        (torch.bfloat16, torch.bfloat16, False, torch.bfloat16),
        (torch.float32, torch.float32, True, torch.float32),
        (torch.bfloat16, torch.float32, True, torch.bfloat16),
    ],
)
def test_positions_are_cast_to_the_patch_weights_dtype(
    checkpoint, patches, dtype, of_table, autocast, of_result, gradients
):
    """Resized in float32 whatever the table's dtype, rounded once, then added: the result is the weights'."""
    embeddings = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), dtype=dtype).embeddings
    embeddings.position_embedding.to(of_table)
    grids = [(1, 5, 3), (2, 2, 7)]
    pixels = patches(grids)
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = embeddings(pixels, Places(grids))
        embedded = embeddings.patch_embedding(pixels.to(dtype))
    table = embeddings.position_embedding.weight
    expected = embedded + resize_positions(table, grids).to(embeddings.patch_embedding.weight.dtype)
    assert table.dtype == of_table and out.dtype == expected.dtype == of_result
    assert torch.equal(out, expected) and out.requires_grad == gradients
    if gradients:
        out.float().sum().backward()
        assert table.grad.dtype == of_table and table.grad.abs().sum() > 0
