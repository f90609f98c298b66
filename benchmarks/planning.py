"""What an image of a size costs: one alone, and a pack full of it. The table for planning is made of the rows.

    python benchmarks/planning.py             # so400m, bfloat16; two minutes on an H200
    python benchmarks/planning.py --quick     # a few tiny ones, anywhere: whether it runs

Forward and training (forward and backward) in bfloat16, forward in float8, one image also in CUDA graphs. Features are
compared with transformers in float32 before anything is timed, and memory is a step's peak with the weights, without an
optimizer. Rows go to results/planning_<card>.csv.

Shapes: T patches, P patch_dim.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers.utils import logging

from siglip2_packed import bench
from siglip2_packed.measure import Rows, card_name, cpu_name
from siglip2_packed.packing import PackedPatches
from siglip2_packed.peers import Padded
from siglip2_packed.preprocess import Siglip2PackedImageProcessor
from siglip2_packed.workloads import SHAPES, Grid

OURS, GRAPHS, FP8 = PROVIDERS = ("siglip2_packed", "siglip2_packed:cudagraph", "siglip2_packed:fp8")
SIZES = {
    (256, 256): (256,),
    (3024, 4032): (256, 1024, 4096),
    (1024, 1024): (4096,),
    (768, 768): (2304,),
    (512, 512): (1024,),
    (384, 384): (576,),
    (224, 224): (196,),
}
"""Height and width of an image -> budgets: those that leave a square as it is, and usual ones for a photograph."""
PACK = 16384
"""Patches, as `encode` fills them."""


def workloads(pack: int) -> Iterator[tuple[str, list[Grid]]]:
    """`4032x3024_max256_grid14x18_images1`, width first, as cameras say it; and the images' grids.

    Images that do not fit into the pack twice are left out.
    """
    for (height, width), budgets in SIZES.items():
        for budget in budgets:
            h, w = Siglip2PackedImageProcessor(patch_size=16, max_num_patches=budget).grid(height, width)
            for images in (1, pack // (h * w)) if 2 * h * w <= pack else ():
                yield f"{width}x{height}_max{budget}_grid{h}x{w}_images{images}", [(1, h, w)] * images


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="so400m", help="of the weights (so400m)")
    parser.add_argument("--pack", type=int, default=PACK, help=f"patches of a full pack, at least 512 ({PACK})")
    parser.add_argument("--rounds", type=int, default=2, help="in each everything is timed, for a quarter second (2)")
    parser.add_argument("--quick", action="store_true", help="--shape tiny --pack 512 --rounds 1")
    parser.add_argument("--out", type=Path, help="CSV file (results/planning_<card>.csv beside this script)")
    args = parser.parse_args(argv)
    if args.quick:
        args.shape, args.pack, args.rounds = "tiny", 512, 1
    if args.pack < 512 or args.rounds < 1:
        parser.error(f"--pack must be at least 512 and --rounds at least 1, got {args.pack} and {args.rounds}")

    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    rows = Rows("planning", torch.cuda.get_device_name() if cuda else cpu_name())
    path = args.out or Path(__file__).parent / "results" / f"planning_{card_name() if cuda else cpu_name()}.csv"
    config, state = bench.weights(None, args.shape, device)
    exact = Padded(config, state, device, torch.float32)
    args.providers, args.workloads = PROVIDERS, ["all"]
    providers = bench.build(rows, args, config, state, device, dtype)
    patches = torch.randn(args.pack, config.patch_size**2 * config.num_channels).to(dtype)
    right = True
    for workload, grids in workloads(args.pack):
        packed = PackedPatches(patches[: sum(h * w for _, h, w in grids)], grids).to(device)
        some = {key: provider for key, provider in providers.items() if key != GRAPHS or len(grids) == 1}
        ready, good = bench.check(rows, exact, workload, packed, some, dtype)
        good &= bench.time_in_turn(rows, config, workload, packed, ready, ["forward", "train"], dtype, args.rounds)
        if FP8 in ready:  # as it is called without graphs, whose memory stays theirs
            provider, inputs = ready[FP8]
            with torch.no_grad():
                memory = bench.peak_memory(provider, lambda: provider.model(**inputs))
            rows.add(FP8, workload, "forward", bench.dtype_name(dtype), "peak_memory", memory / 2**30, "GiB")
        right &= good
        rows.write(path)  # after every workload: a run that is stopped has kept its rows
    print(f"{len(rows.rows)} rows -> {path}")
    return 0 if right else 1


if __name__ == "__main__":
    logging.disable_progress_bar()
    sys.exit(main())
