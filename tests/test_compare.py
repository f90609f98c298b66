"""Rows of a comparison: what passes, what fails, and which image and token are named."""

import math

import numpy as np
import pytest
import torch

from siglip2_packed.inspection.compare import bounds, compare, measure

GRIDS = [(2, 3), (1, 4)]
NAMES = ["a.png", "b.png"]


def rows_of(rows, seed=0, features=5):
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))


def compare_pair(ours, reference, **kwargs):
    return compare(ours, reference, NAMES, GRIDS, stage="layer 1", **kwargs)


def test_equal_tensors_pass():
    row = compare_pair(rows_of(10), rows_of(10))
    assert row.passed
    assert (row.max_abs, row.relative_error) == (0, 0)
    assert row.min_cosine == pytest.approx(1)


def test_the_numbers_are_those_of_their_definitions():
    ours, reference = rows_of(10), rows_of(10, seed=1)
    row = compare_pair(ours, reference)
    x, ref = ours.double().numpy(), reference.double().numpy()
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(x, ref)]
    assert row.max_abs == pytest.approx(np.abs(x - ref).max())
    assert row.relative_error == pytest.approx(np.linalg.norm(x - ref) / np.linalg.norm(ref))
    assert row.min_cosine == pytest.approx(min(cosines))
    assert row.mean_cosine == pytest.approx(np.mean(cosines))
    assert not row.passed


def test_names_the_worst_image_and_token():
    ours, reference = rows_of(10), rows_of(10)
    ours[4] += 1
    row = compare_pair(ours, reference)
    assert (row.image, row.token, row.position, row.passed) == ("a.png", 4, (1, 1), False)
    ours[8] += 2
    row = compare_pair(ours, reference)
    assert (row.image, row.token, row.position) == ("b.png", 2, (0, 2))


def test_pooled_rows_are_images():
    ours, reference = rows_of(2), rows_of(2)
    ours[1] += 1
    row = compare(ours, reference, NAMES, GRIDS, stage="pooled")
    assert (row.image, row.token, row.passed) == ("b.png", None, False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["ours", "reference", "both"])
def test_non_finite_values_fail(value, where):
    ours, reference = rows_of(10), rows_of(10)
    if where != "reference":
        ours[7, 2] = value
    if where != "ours":
        reference[7, 2] = value
    row = compare_pair(ours, reference)
    assert not row.passed
    assert "non-finite" in row.note
    assert (row.image, row.token, row.position) == ("b.png", 1, (0, 1))


def test_non_finite_baseline_fails():
    baseline = measure(torch.full((10, 5), math.nan), rows_of(10))
    row = compare_pair(rows_of(10), rows_of(10), dtype=torch.float16, baseline=baseline)
    assert not row.passed
    assert "non-finite" in row.note


@pytest.mark.parametrize(
    ("ours", "reference", "images", "message"),
    [
        (rows_of(0), rows_of(0), 0, "empty comparison: 0 images"),
        (rows_of(10, features=0), rows_of(10, features=0), 2, "empty comparison"),
        (rows_of(10), rows_of(9), 2, "shapes differ"),
        (rows_of(10), rows_of(1), 2, "shapes differ"),  # would broadcast
        (rows_of(9), rows_of(9), 2, "9 rows, the grids cover 10"),
        (None, rows_of(10), 2, "this model has no layer 1"),
        (rows_of(10), None, 2, "the reference has no layer 1"),
    ],
)
def test_nothing_to_compare_fails(ours, reference, images, message):
    row = compare(ours, reference, NAMES[:images], GRIDS[:images], stage="layer 1")
    assert not row.passed
    assert message in row.note


def test_each_measure_alone_can_fail_a_row():
    reference = torch.ones(10, 1000)
    reference[1::2] = -1
    one_value = reference.clone()
    one_value[0, 0] += 2e-4
    assert "max abs" in compare_pair(one_value, reference).note
    everywhere = reference * (1 + 3e-5)
    assert "relative" in compare_pair(everywhere, reference).note
    one_row = reference.clone()
    reference[9], one_row[9] = 1e-4, 1e-4
    one_row[9, :500] *= 1.01
    row = compare_pair(one_row, reference)
    assert row.note.startswith("cosine")
    assert not row.passed


def test_rows_of_zeros():
    """One that is right is right; all of them are no comparison."""
    zeros, some = torch.zeros(10, 5), rows_of(10)
    some[3] = 0
    assert compare_pair(some, some.clone()).passed
    assert not compare_pair(zeros, zeros).passed
    assert not compare_pair(rows_of(10), zeros).passed
    assert not compare_pair(zeros, rows_of(10)).passed


@pytest.mark.parametrize(
    ("features", "reason"),
    [
        (torch.zeros(10, 5), "every feature is 0"),
        (-torch.zeros(10, 5), "every feature is -0"),
        (torch.full((10, 5), 0.5), "every feature is 0.5"),
        (rows_of(1).expand(10, 5), "all patches of an image have the same features"),
        (rows_of(2).repeat_interleave(torch.tensor([6, 4]), dim=0), "all patches of an image have the same features"),
    ],
)
def test_a_comparison_of_nothing_fails(features, reason):
    row = compare_pair(features, features.clone())
    assert not row.passed and row.note == f"nothing to compare: in the reference {reason}"
    assert row.severity == math.inf


def test_features_that_may_be_alike_pass():
    """Those of two images that are the same, of images of one patch, and pixels of one colour."""
    pooled = rows_of(1).expand(2, 5)
    assert compare(pooled, pooled, NAMES, GRIDS, stage="pooled").passed
    single = rows_of(2)
    assert compare(single, single, NAMES, [(1, 1), (1, 1)], stage="layer 1").passed
    white = torch.ones(10, 48)
    assert compare(white, white, NAMES, GRIDS, stage="patches").passed
    assert not compare(pooled * 0, pooled * 0, NAMES, GRIDS, stage="pooled").passed


def test_bounds_follow_scale_depth_and_threshold():
    unit = torch.ones(4, 4)
    assert bounds(unit, torch.float32, 0, 0.99) == pytest.approx((1e-4, 1e-5, 1 - 1e-6), rel=1e-9)
    assert bounds(unit * 7, torch.float32, 24, 0.99)[:2] == pytest.approx((7e-4, 5e-5))
    assert bounds(unit * 0.01, torch.float32, 0, 0.99)[0] == pytest.approx(1e-4)
    assert bounds(unit, torch.float32, 0, 1.0)[2] == 1.0
    assert bounds(unit, torch.bfloat16, 0, 0.97)[2] == 0.97


def test_half_precision_is_held_to_the_error_of_transformers():
    reference = rows_of(10, features=2000)
    noise = 5e-3 * rows_of(10, seed=3, features=2000)
    baseline = measure(reference + noise, reference)
    kwargs = {"dtype": torch.bfloat16, "baseline": baseline, "depth": 12}
    assert compare_pair(reference + noise, reference, **kwargs).passed
    row = compare_pair(reference + 1.3 * noise, reference, **kwargs)
    assert not row.passed
    assert "relative" in row.note
