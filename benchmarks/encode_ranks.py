r"""`siglip2-packed encode` on one rank and on several: rate, efficiency, and that they write the same index and rows.

    python benchmarks/encode_ranks.py --decode gpu              # so400m on the GPUs there are, up to two
    python benchmarks/encode_ranks.py --ranks 1 2 4 8 --decode gpu
    python benchmarks/encode_ranks.py --shape tiny --images 400 --distinct 100 --shard-size 20    # on a CPU

bulk.py's JPEGs, the distinct ones under several names. A rank's rate is that of its shards behind the first one, by the
times at which they were on the disk: starting up, which a long run forgets, is left out. `whole_run` is the rate with
it, from start to end of the command. Efficiency is the rate over ranks times that of one.

Ranks make other packs of the images than one alone. So rows agree within what bfloat16 comes to, and to the bit with
--batch-invariant; anything else, and an index that differs, stops the benchmark. Rows go to
results/encode_ranks_<card>.csv.
"""

import argparse
import csv
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from bulk import make_folder
from safetensors.torch import load_file

from siglip2_packed.measure import Rows, card_name, cpu_name, relative_error
from siglip2_packed.random_checkpoint import SHAPES, save_random_checkpoint

ROUNDING = 1e-2  # relative error of bfloat16's rows in other packs; of float32's a thousandth of it


def repeated(folder: Path, distinct: list[str], images: int) -> Path:
    """`images` files in a folder, links to the distinct ones in turn."""
    folder.mkdir()
    for number, file in zip(range(images), itertools.cycle(distinct)):
        os.link(file, folder / f"{number:06d}.jpg")
    return folder


def encode(folder: Path, out: Path, ckpt: Path, ranks: int, args, *flags: str) -> float:
    """-> seconds of the whole command."""
    chosen = ["--decode", args.decode, "--dtype", args.dtype, "--shard-size", str(args.shard_size)]
    command = [str(folder), "--out", str(out), "--ckpt", str(ckpt), "--pooled", "--no-patches", *chosen, *flags]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    begin = time.perf_counter()
    subprocess.run([*launch, "-m", "siglip2_packed", "encode", *command], check=True)
    return time.perf_counter() - begin


def rate(out: Path, ranks: int) -> float:
    """Images a second of all ranks, each behind its first shard.

    Raises:
        ValueError: a rank with less than two shards.
    """
    parts = sorted((out / ".parts").glob("*.csv"))
    found = [(part.stat().st_mtime, len(list(csv.reader(part.open()))) - 1) for part in parts]
    total = 0.0
    for rank in range(ranks):
        of_rank = sorted(found[rank::ranks])
        if len(of_rank) < 2:
            raise ValueError(f"rank {rank} has {len(of_rank)} shards: a smaller --shard-size, or more images")
        total += sum(images for _, images in of_rank[1:]) / (of_rank[-1][0] - of_rank[0][0])
    return total


def rows_of(out: Path) -> torch.Tensor:
    """`[N, D]` pooled vectors in the order of the index."""
    shards = {shard.name: load_file(shard)["pooled"] for shard in out.glob("shard-*.safetensors")}
    with (out / "index.csv").open(newline="") as file:
        return torch.stack([shards[row["shard"]][int(row["row"])] for row in csv.DictReader(file)])


def main(argv=None) -> None:
    cards = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000, help="files of the collection (20000)")
    parser.add_argument("--distinct", type=int, default=5000, help="JPEGs that are made for it (5000)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="(1 2)")
    parser.add_argument("--decode", choices=["exact", "scaled", "gpu"], default="exact", help="as encode's (exact)")
    parser.add_argument("--shape", choices=list(SHAPES), default="so400m", help="of the model (so400m)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="(bfloat16 on a GPU, else float32)")
    parser.add_argument("--shard-size", type=int, default=500, help="inputs of a shard (500)")
    parser.add_argument("--invariant", choices=["yes", "no", "both"], help="--batch-invariant (both on a GPU, else no)")
    parser.add_argument("--ckpt", type=Path, help="a checkpoint of this shape; random weights where it is left out")
    parser.add_argument("--out", type=Path, help="CSV file (results/encode_ranks_<card>.csv beside this script)")
    args = parser.parse_args(argv)
    if args.ranks[0] != 1:
        parser.error(f"--ranks {args.ranks}: the first is 1, to which the others are compared")
    args.dtype = args.dtype or ("bfloat16" if cards else "float32")
    machine = card_name() if cards else cpu_name()
    rows = Rows("encode_ranks", torch.cuda.get_device_name() if cards else machine)
    path = args.out or Path(__file__).parent / "results" / f"encode_ranks_{machine}.csv"
    runs = {"yes": [True], "no": [False], "both": [False, True]}[args.invariant or ("both" if cards else "no")]

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        ckpt = args.ckpt or save_random_checkpoint(root / "ckpt", args.shape)
        folder = repeated(root / "jpegs", make_folder(root / "distinct", args.distinct, 0), args.images)
        for invariant in runs:
            alone: dict = {}
            for ranks in args.ranks:
                out = root / f"out{ranks}{'_invariant' * invariant}"
                seconds = encode(folder, out, ckpt, ranks, args, *["--batch-invariant"] * invariant)
                found = {"index": (out / "index.csv").read_bytes(), "rows": rows_of(out), "rate": rate(out, ranks)}
                alone = alone or found
                workload = f"jpegs{args.images}_{args.decode}{'_invariant' * invariant}_ranks{ranks}"

                def add(metric: str, value: float, unit: str, workload=workload) -> None:
                    rows.add("siglip2_packed", workload, "encode", args.dtype, metric, value, unit)
                    print(f"{workload:40} {metric:16} {value:10.6g} {unit}", flush=True)

                error = check(found, alone, args.dtype, invariant)
                add("images_per_s", found["rate"], "1/s")
                add("whole_run", args.images / seconds, "1/s")
                if ranks > 1:
                    add("efficiency", found["rate"] / ranks / alone["rate"], "")
                    add("relative_error", error, "")
                rows.write(path)
    print(f"{len(rows.rows)} rows -> {path}")


def check(found: dict, alone: dict, dtype: str, invariant: bool) -> float:
    """-> relative error of the rows against those of one rank. Exits where they are not the same collection."""
    if found["index"] != alone["index"]:
        raise SystemExit("another index than on one rank: nothing is reported")
    error = relative_error(found["rows"], alone["rows"])
    bound = 0.0 if invariant else ROUNDING if dtype == "bfloat16" else ROUNDING / 1000
    if not error <= bound:
        raise SystemExit(f"rows differ from those of one rank by {error:.2g}, at most {bound:g}: nothing is reported")
    return error


if __name__ == "__main__":
    main()
