"""Compiles the product of `ops.linear` for cards that need not be here: `python compiled.py 80 90` prints, as JSON, a
row for each tile: capability, rows and columns, bytes of shared memory, and the tensor cores' instructions.
"""

import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from siglip2_packed.ops.linear.triton import GROUP, STEP, product_kernel
from siglip2_packed.ops.runtime.choice import Card, ProductTile, product_tiles


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
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    instructions = sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S+", kernel.asm["ptx"])))
    return [capability, tile.rows, tile.columns, kernel.metadata.shared, instructions]


if __name__ == "__main__":
    cards = [Card("cuda", int(argument), 132) for argument in sys.argv[1:]]
    print(json.dumps([compiled(card.capability, tile) for card in cards for tile in product_tiles(card)]))
