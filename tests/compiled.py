"""Compiles the products of `ops.linear` for cards that need not be here: `python compiled.py 80 90` prints, as JSON, a
row for each tile: capability, rows and columns, bytes of shared memory, and the tensor cores' instructions; for 90 one
more for the largest and the smallest tile of the Hopper product, where there is Gluon.
"""

import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from siglip2_packed.ops import linear
from siglip2_packed.ops.linear.triton import GROUP, STEP, product_kernel
from siglip2_packed.ops.runtime.choice import HOPPER_TILES, Card, HopperTile, ProductTile, product_tiles


def compiled(capability: int, tile: ProductTile) -> list:
    """With all that an epilogue may have, of a contraction with a rest."""
    names = product_kernel.arg_names
    constants = dict(D=200, F=136, BIAS=True, ADD=True, GELU=2, STEP=STEP, GROUP=GROUP, PRECISION="tf32")
    constants |= dict(ROWS=tile.rows, COLUMNS=tile.columns)
    types = dict.fromkeys(("x", "weight", "bias", "out", "active"), "*bf16") | {"T": "i32"}
    source = ASTSource(
        product_kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind == "*bf16"},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return row(source, capability, tile, options)


def compiled_for_hopper(tile: HopperTile) -> list:
    """The sum, which takes the most registers; with a half of a tile, where it has halves."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from siglip2_packed.ops.linear import hopper

    names, D, F = hopper.product_kernel.arg_names, 200, 320
    constants = dict(zip(names[7:], (D, F, *hopper._cut(tile, F)))) | {"bias": None, "active": None}
    rows, columns = ([height, 64] for height in tile)
    boxes = {"x": rows, "weight": columns, "added": rows, "out": rows}
    types = {name: f"tensordesc<bf16{box},{hopper.TILE.value!r}>" for name, box in boxes.items()} | {"T": "i32"}
    source = GluonASTSource(
        hopper.product_kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {},
    )
    return row(source, 90, tile, {"num_warps": 4, "maxnreg": hopper.MAX_REGISTERS})


def row(source: ASTSource, capability: int, tile: ProductTile | HopperTile, options: dict) -> list:
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    instructions = sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S+", kernel.asm["ptx"])))
    return [capability, tile.rows, tile.columns, kernel.metadata.shared, instructions]


if __name__ == "__main__":
    cards = [Card("cuda", int(argument), 132) for argument in sys.argv[1:]]
    rows = [compiled(card.capability, tile) for card in cards for tile in product_tiles(card)]
    hopper = any(card.capability == 90 for card in cards) and linear.LINEAR.missing("invariant_hopper") is None
    rows += [compiled_for_hopper(tile) for tile in HOPPER_TILES[::3]] if hopper else []
    print(json.dumps(rows))
