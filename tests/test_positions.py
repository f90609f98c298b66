"""Positions: antialiased bilinear resize of the table, exact, differentiable, without a loop over images."""

import pytest
import torch
import torch.nn.functional as F

import kernels_ref
from siglip2_packed.ops import positions
from siglip2_packed.ops.positions import resize_positions

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
    weighted_sums = positions._weighted_sums
    monkeypatch.setattr(positions, "_weighted_sums", lambda t, p: rows.append(len(p.offsets)) or weighted_sums(t, p))
    resize_positions(table(), [(1, 3, 5), (1, 5, 4)] * 500)
    assert rows == [3 + 5, 15 + 20]
