"""Products of rows with a weight: every implementation against float64; the invariant one, whose rows do not depend on
each other, by every tile.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from implementations import DEVICES, INTERPRETED

import kernels_ref
from siglip2_packed.measure import relative_error
from siglip2_packed.ops import linear, mlp
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.check import Refused
from siglip2_packed.ops.runtime.choice import Card

OURS = "invariant"
BOUND = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
DTYPES = [
    pytest.param(torch.float32, marks=INTERPRETED),
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]
HOPPER = Card("cuda", 90, 132)
FUNCTIONS = {"linear": linear.LINEAR, "add": linear.ADD_PRODUCT, "gelu": mlp.LINEAR_GELU, "keep": mlp.LINEAR_GELU_KEEP}
TILES = {f"{tile.rows}x{tile.columns}": tile for tile in choice.product_tiles(HOPPER)}


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


def exactly(what, x, weight, bias, total):
    x, weight, bias, total = (y.double() for y in (x, weight, bias, total))
    wide = x @ weight.t() + (total if what == "add" else bias)
    active = kernels_ref.ops.gelu_tanh(wide)
    return {"gelu": [active], "keep": [wide, active]}.get(what, [wide])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", FUNCTIONS)
@pytest.mark.parametrize(("T", "D", "F"), [(13, 200, 72), (1, 40, 8), (70, 64, 130)])
def test_products(what, device, dtype, T, D, F):
    given = arguments(T, D, F, dtype, device)
    kept = [y.clone() for y in given]
    for implementation in ("eager", OURS):
        found = call(what, *given, implementation=implementation)
        for result, exact in zip(found, exactly(what, *given), strict=True):
            assert result.dtype == dtype and relative_error(result, exact) <= BOUND[dtype], implementation
    assert all(map(torch.equal, given, kept))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("what", FUNCTIONS)
@pytest.mark.parametrize("tile", TILES)
def test_a_row_does_not_depend_on_the_others(tile, what, device):
    """Nor on the tile, nor on where in it the row lies; neighbours may be NaN."""
    x, weight, bias, total = arguments(150, 136, 72, torch.float16, device)
    expected = call(what, x, weight, bias, total)
    for rows in (slice(0, 1), slice(67, 68), slice(40, 130)):
        found = call(what, x[rows], weight, bias, total[rows], tile=TILES[tile])
        assert all(map(torch.equal, found, [y[rows] for y in expected]))
    x[:40] = total[130:] = math.nan
    found = call(what, x, weight, bias, total, tile=TILES[tile])
    assert all(torch.equal(y[40:130], z[40:130]) for y, z in zip(found, expected, strict=True))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
def test_rows_weights_and_biases_lie_anywhere(device):
    given = x, weight, bias, total = arguments(30, 72, 40, torch.float16, device)
    expected = [call(what, *given) for what in FUNCTIONS]

    def apart(y):
        return torch.stack((y, y + 1), -1)[..., 0]

    for others in ((apart(x), weight, bias), (x, apart(weight), bias), (x, weight, apart(bias))):
        for what, same in zip(FUNCTIONS, expected):
            assert all(map(torch.equal, call(what, *others, total), same))
    turned = total.t().contiguous().t()
    assert linear.ADD_PRODUCT.of(OURS)(turned, x, weight) is turned and torch.equal(turned, expected[1][0])
    around = torch.full((50, 40), 7.0, dtype=torch.float16, device=device)
    linear.LINEAR.of(OURS)(x, weight, bias, around[:30])
    assert torch.equal(around[:30], expected[0][0]) and (around[30:] == 7).all()


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device):
    x, weight, bias, total = arguments(0, 72, 40, torch.float16, device)
    assert [y.shape for what in FUNCTIONS for y in call(what, x, weight, bias, total)] == [(0, 40)] * 5


def test_widths_that_do_not_fit_each_other_are_an_error():
    x, weight, bias, total = arguments(5, 72, 40, torch.float16)
    for what in FUNCTIONS:
        with pytest.raises(ValueError, match=r"a weight \[40, 64\] does not take rows \[5, 72\] to \[5, 40\]"):
            call(what, x, weight[:, :64], bias, total)
    with pytest.raises(ValueError, match=r"\[5, 40\]"):
        call("add", x, weight[:32], bias, total)


@INTERPRETED
def test_differentiable_once(trusted):
    trusted(card=Card("cuda", 80, 108))
    x, weight, bias, total = (y.requires_grad_() for y in arguments(5, 72, 40, torch.float16))
    found = torch.autograd.grad((linear.linear(x, weight, bias) * total).sum(), (x, weight, bias))
    expected = torch.autograd.grad((torch.nn.functional.linear(x, weight, bias) * total).sum(), (x, weight, bias))
    assert all(relative_error(y, z) <= 1e-3 for y, z in zip(found, expected, strict=True))


@pytest.mark.parametrize("rows", [1, 256, 300, 4096, 16384])
@pytest.mark.parametrize("columns", [1152, 3456, 4304])
def test_few_rows_have_small_tiles(rows, columns):
    """As many as there are multiprocessors, or as a card has room for; no sixth of it idle where there are many."""
    tile = choice.product_tile(HOPPER, rows, columns)
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
    assert [capability for capability, *_ in rows] == [80] * 3 + [90] * 4
    for capability, tile_rows, columns, shared, instructions in rows:
        assert shared <= (227 if columns > 128 else 99) * 1024, (capability, tile_rows, columns)
        kinds = {re.sub(r"m64n\d+k16", "m64nNk16", name) for name in instructions}
        assert (
            kinds
            == {
                80: {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"},
                90: {"wgmma.mma_async.sync.aligned.m64nNk16.f32.bf16.bf16"},
            }[capability]
        )
