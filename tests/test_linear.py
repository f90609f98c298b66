"""Products of rows with a weight: every implementation against float64; the invariant ones, whose rows do not depend on
each other, by every tile.
"""

import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from implementations import INTERPRETED

import kernels_ref
from siglip2_packed.measure import relative_error
from siglip2_packed.ops import linear, mlp
from siglip2_packed.ops.runtime import check, choice
from siglip2_packed.ops.runtime.check import Refused
from siglip2_packed.ops.runtime.choice import Card

OURS = "invariant"
BOUND = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
GPU = pytest.mark.gpu
IMPLEMENTATIONS = [
    pytest.param(OURS, "cpu", marks=INTERPRETED),
    pytest.param(OURS, "cuda", marks=GPU),
    pytest.param("invariant_hopper", "cuda", marks=GPU),
]
IN_DTYPES = [
    *[pytest.param("eager", "cpu", dtype) for dtype in (torch.float32, torch.float16)],
    *[pytest.param("eager", "cuda", dtype, marks=GPU) for dtype in choice.HALF],
    *[pytest.param(OURS, "cpu", dtype, marks=INTERPRETED) for dtype in (torch.float32, torch.float16)],
    *[pytest.param(name, "cuda", dtype, marks=GPU) for name in (OURS, "invariant_hopper") for dtype in choice.HALF],
]
HOPPER = Card("cuda", 90, 132)
FUNCTIONS = {"linear": linear.LINEAR, "add": linear.ADD_PRODUCT, "gelu": mlp.LINEAR_GELU, "keep": mlp.LINEAR_GELU_KEEP}
TILES = {OURS: choice.product_tiles(HOPPER), "invariant_hopper": choice.hopper_tiles(HOPPER)}


def arguments(T, D, F, dtype, device="cpu"):
    """Rows, weight, bias, and what is added to."""
    generator = torch.Generator().manual_seed(T)
    x, weight, bias, total = (torch.randn(s, generator=generator) for s in ((T, D), (F, D), (F,), (T, F)))
    return [y.to(device, dtype) for y in (x, weight * D**-0.5, bias, total)]


def call(what, x, weight, bias, total, implementation=OURS, **how):
    function = FUNCTIONS[what].of(implementation)
    if what == "add":
        total = total.clone()
        assert function(total, x, weight, **how) is total
        return [total]
    found = function(x, weight, bias, **how)
    return list(found) if what == "keep" else [found]


@pytest.fixture
def _present(request):
    if request.getfixturevalue("name") == "invariant_hopper":
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs compute capability 9.0")
        if reason := linear.LINEAR.missing("invariant_hopper"):
            pytest.skip(reason)


def exactly(what, x, weight, bias, total):
    x, weight, bias, total = (y.double() for y in (x, weight, bias, total))
    wide = x @ weight.t() + (total if what == "add" else bias)
    active = kernels_ref.ops.gelu_tanh(wide)
    return {"gelu": [active], "keep": [wide, active]}.get(what, [wide])


@pytest.mark.usefixtures("_present", "poisoned")
@pytest.mark.parametrize(("name", "device", "dtype"), IN_DTYPES)
@pytest.mark.parametrize("what", FUNCTIONS)
@pytest.mark.parametrize(("T", "D", "F"), [(13, 200, 72), (1, 40, 8), (70, 64, 130)])
def test_products(name, what, device, dtype, T, D, F):
    if name == "invariant_hopper" and F % 8:
        F += 6
    given = arguments(T, D, F, dtype, device)
    kept = [y.clone() for y in given]
    found = call(what, *given, implementation=name)
    for result, exact in zip(found, exactly(what, *given), strict=True):
        assert result.dtype == dtype and relative_error(result, exact) <= BOUND[dtype]
    assert all(map(torch.equal, given, kept))


@pytest.mark.usefixtures("_present", "poisoned")
@pytest.mark.parametrize(("name", "device"), IMPLEMENTATIONS)
@pytest.mark.parametrize("what", FUNCTIONS)
@pytest.mark.parametrize("number", range(4))
def test_a_row_does_not_depend_on_the_others(number, what, name, device):
    """Nor on the tile, nor on where in it the row lies; neighbours may be NaN."""
    tile = TILES[name][number]
    x, weight, bias, total = arguments(150, 136, 72, torch.float16, device)
    expected = call(what, x, weight, bias, total, name)
    for rows in (slice(0, 1), slice(67, 68), slice(40, 130)):
        found = call(what, x[rows], weight, bias, total[rows], name, tile=tile)
        assert all(map(torch.equal, found, [y[rows] for y in expected]))
    x[:40] = total[130:] = math.nan
    found = call(what, x, weight, bias, total, name, tile=tile)
    assert all(torch.equal(y[40:130], z[40:130]) for y, z in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("_present", "poisoned")
@pytest.mark.parametrize("name", ["invariant_hopper"])
@pytest.mark.parametrize("dtype", choice.HALF, ids=str)
@pytest.mark.parametrize(("what", "D", "F"), [("linear", 1152, 3456), ("add", 4304, 1152), ("keep", 1152, 4304)])
def test_tile_after_tile_on_few_blocks_and_on_all(name, what, D, F, dtype):
    """Halves of tiles and rests of the contraction among them, again and again."""
    x, weight, bias, total = arguments(4096 + 37, D, F, dtype, "cuda")
    expected = call(what, x, weight, bias, total, name)
    for result, exact in zip(expected, exactly(what, x, weight, bias, total), strict=True):
        assert relative_error(result, exact) <= BOUND[dtype]
    for tile in TILES[name]:
        for blocks in (0, 0, 0, 7):
            found = call(what, x, weight, bias, total, name, tile=tile, blocks=blocks)
            assert all(map(torch.equal, found, expected))


@pytest.mark.usefixtures("_present", "poisoned")
@pytest.mark.parametrize(("name", "device"), IMPLEMENTATIONS)
def test_rows_weights_and_biases_lie_anywhere(name, device):
    given = x, weight, bias, total = arguments(30, 72, 40, torch.float16, device)
    expected = [call(what, *given, name) for what in FUNCTIONS]

    def apart(y):
        return torch.stack((y, y + 1), -1)[..., 0]

    for others in ((apart(x), weight, bias), (x, apart(weight), bias), (x, weight, apart(bias))):
        for what, same in zip(FUNCTIONS, expected):
            assert all(map(torch.equal, call(what, *others, total, name), same))
    turned = total.t().contiguous().t()
    assert linear.ADD_PRODUCT.of(name)(turned, x, weight) is turned and torch.equal(turned, expected[1][0])
    around = torch.full((50 * 40 + 4,), 7.0, dtype=torch.float16, device=device)
    for first in (0, 4):  # and between multiples of 16 bytes
        place = around[first:][: 30 * 40].view(30, 40)
        linear.LINEAR.of(name)(x, weight, bias, place)
        assert torch.equal(place, expected[0][0]) and (around[first + 30 * 40 :] == 7).all()


ANYWHERE = sorted(linear.INVARIANT)
"""What is said before anything is launched."""


def skip_if_missing(name):
    if reason := linear.LINEAR.missing(name):
        pytest.skip(reason)


@pytest.mark.parametrize("name", ANYWHERE)
def test_no_rows(name):
    skip_if_missing(name)
    x, weight, bias, total = arguments(0, 72, 40, torch.float16)
    assert [y.shape for what in FUNCTIONS for y in call(what, x, weight, bias, total, name)] == [(0, 40)] * 5


@pytest.mark.parametrize("name", ANYWHERE)
def test_widths_that_do_not_fit_each_other_are_an_error(name):
    skip_if_missing(name)
    x, weight, bias, total = arguments(5, 72, 40, torch.float16)
    for what in FUNCTIONS:
        with pytest.raises(ValueError, match=r"a weight \[40, 64\] does not take rows \[5, 72\] to \[5, 40\]"):
            call(what, x, weight[:, :64], bias, total, name)
    with pytest.raises(ValueError, match=r"\[5, 40\]"):
        call("add", x, weight[:32], bias, total, name)


def test_the_copy_engine_takes_columns_by_eights():
    skip_if_missing("invariant_hopper")
    x, weight, bias, total = arguments(5, 72, 40, torch.float16)
    with pytest.raises(ValueError, match=r"columns by eights, got a weight \[36, 72\]"):
        call("linear", x, weight[:36], bias[:36], total[:, :36], "invariant_hopper")


@INTERPRETED
def test_differentiable_once(trusted):
    trusted(card=Card("cuda", 80, 108))
    x, weight, bias, total = (y.requires_grad_() for y in arguments(5, 72, 40, torch.float16))
    found = torch.autograd.grad((linear.linear(x, weight, bias) * total).sum(), (x, weight, bias))
    expected = torch.autograd.grad((torch.nn.functional.linear(x, weight, bias) * total).sum(), (x, weight, bias))
    assert all(relative_error(y, z) <= 1e-3 for y, z in zip(found, expected, strict=True))


@pytest.mark.parametrize("choose", [choice.product_tile, choice.hopper_tile])
@pytest.mark.parametrize("rows", [1, 256, 300, 4096, 16384])
@pytest.mark.parametrize("columns", [1152, 3456, 4304])
def test_few_rows_have_small_tiles(rows, columns, choose):
    """As many as there are multiprocessors, or as a card has room for; no sixth of it idle where there are many."""
    tile = choose(HOPPER, rows, columns)
    tiles = -(-rows // tile.rows) * -(-columns // tile.columns)
    if rows >= 16384:
        turns = -(-tiles // HOPPER.multiprocessors)
        assert rows * columns >= 0.8 * turns * HOPPER.multiprocessors * tile.rows * tile.columns
    if rows <= 256:
        assert tile.rows == 64 or tiles >= 64


# What the self-check says


@INTERPRETED
def test_a_product_is_refused_that_a_tile_changes(forced, monkeypatch):
    """As one that sums in another order where rows are few."""
    from siglip2_packed.ops.linear import triton

    right = triton.linear

    @functools.wraps(right)
    def by_tile(x, weight, bias, place=None, tile=None):
        if tile.columns > 64:
            return right(x, weight, bias, place, tile)
        half = x.shape[1] // 2
        out = right(x[:, half:], weight[:, half:], bias, place, tile)
        return triton.add_product_(out, x[:, :half], weight[:, :half], tile)

    forced(card=HOPPER)
    where = torch.device("cpu"), torch.float16
    assert choice.require(linear.LINEAR, (OURS,), *where, 72, 40) is right
    monkeypatch.setattr(triton, "linear", by_tile)
    with pytest.raises(
        Refused, match=r"linear.linear \(invariant\) failed its self-check: .* does not give the bits of"
    ):
        choice.require(linear.LINEAR, (OURS,), *where, 144, 40)


@INTERPRETED
def test_a_wrong_product_is_refused(forced, monkeypatch):
    from siglip2_packed.ops.linear import triton

    forced(card=HOPPER)
    monkeypatch.setattr(triton, "linear_gelu", lambda x, weight, bias, place=None: 1.1 * (x @ weight.t()))
    with pytest.raises(Refused, match="failed its self-check: active"):
        choice.require(mlp.LINEAR_GELU, (OURS,), torch.device("cpu"), torch.float16, 72, 40)


@pytest.fixture
def verdicts(forced, monkeypatch):
    """`verdicts(invariant_hopper=False)`: what self-checks say on a Hopper card; None where nothing can be checked."""
    forced(card=HOPPER)

    def say(**right):
        results = {True: check.Verdict({"out": 0.0}, {"out": 0.0}), False: check.Verdict({"out": 1.0}, {"out": 0.0})}
        monkeypatch.setattr(choice.Function, "verdict", lambda self, name, *args: results.get(right.get(name, True)))
        choice.forget()

    return say


def taken(dtype=torch.float16, D=72, F=40):
    device = torch.device("cpu")
    order = choice.invariant_products(choice.card(device), dtype, D, F)
    return choice.require(linear.LINEAR, order, device, dtype, D, F)


def test_hopper_has_products_of_its_own(verdicts):
    """Where columns come by eights, for any number of rows."""
    skip_if_missing("invariant_hopper")
    hopper, triton = (linear.LINEAR.of(name) for name in ("invariant_hopper", OURS))
    verdicts()
    assert taken() is hopper and taken(F=44) is taken(D=76) is triton
    with pytest.raises(Refused, match=r"linear.linear has no kernel for float32 on cpu"):
        taken(torch.float32)


def test_a_product_that_is_wrong_or_missing_on_hopper_is_tritons_and_no_other(verdicts, monkeypatch, caplog):
    verdicts(invariant_hopper=False)
    assert taken() is linear.LINEAR.of(OURS)
    verdicts(invariant_hopper=False, invariant=False)
    with pytest.raises(Refused, match=r"\(invariant_hopper\) .*; \(invariant\) failed its self-check: out 1.0e\+00"):
        taken()
    verdicts()
    monkeypatch.setitem(linear.MODULES, "invariant_hopper", "siglip2_packed.ops.linear.nowhere")
    choice.say_once.cache_clear()
    assert taken() is linear.LINEAR.of(OURS)
    assert "linear.linear: siglip2_packed.ops.linear.nowhere.linear cannot be imported" in caplog.text


def test_what_cannot_be_checked_now_is_not_replaced(verdicts):
    """Its results, later on, would be others."""
    skip_if_missing("invariant_hopper")
    verdicts(invariant_hopper=None)
    with pytest.raises(Refused, match=r"\(invariant_hopper\) has not been checked yet"):
        taken()


@pytest.mark.parametrize("tile", choice.HOPPER_TILES, ids=str)
def test_a_tile_fits_into_shared_memory(tile):
    """With slots enough to bring some while others are multiplied; whole tiles and halves are all of the columns."""
    skip_if_missing("invariant_hopper")
    from siglip2_packed.ops.linear import hopper

    for F in (8, 136, 264, 1152, 3456, 4304):
        rows, columns, whole, group, slots = hopper._cut(tile, F)
        assert (rows, columns) == tile and rows * columns <= 128 * 128 and group >= 8
        assert 2 * (64 * slots * (rows + columns) + 2 * rows * columns) <= 226 * 1024 and slots >= 4
        assert whole * columns >= F or (whole and whole * columns < F <= whole * columns + columns // 2)


# Compiled


def test_tiles_of_a_card_take_the_same_instructions():
    """But for how many columns one has: the contraction's order within it follows its k. All fit shared memory."""
    script = Path(__file__).parent / "compiled.py"
    run = subprocess.run(
        [sys.executable, script, "80", "90"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads(run.stdout.splitlines()[-1])
    by_hopper = [] if linear.LINEAR.missing("invariant_hopper") else [90] * 2
    assert [capability for capability, *_ in rows] == [80] * 3 + [90] * 4 + by_hopper
    for number, (capability, tile_rows, columns, shared, instructions) in enumerate(rows):
        assert shared <= (227 if columns > 128 or number >= 7 else 99) * 1024, (capability, tile_rows, columns)
        kinds = {re.sub(r"m64n\d+k16", "m64nNk16", name) for name in instructions}
        assert (
            kinds
            == {
                80: {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"},
                90: {"wgmma.mma_async.sync.aligned.m64nNk16.f32.bf16.bf16"},
            }[capability]
        )
