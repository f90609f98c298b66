"""`encode` on all GPUs of a host beside one of them, on the JPEGs of bulk.py.

    torchrun --nproc-per-node 2 benchmarks/bulk_ranks.py        # so400m in bfloat16, 256 patches, --decode gpu
    torchrun --nproc-per-node 2 benchmarks/bulk_ranks.py --device cpu --decode exact --images 200 --repeat 1

In each round the first rank encodes alone, with all cores, while the others wait; then all do, each with its share of
the cores. The first round, over the JPEGs once, does not count. The vectors of both ways are compared before anything
is reported. Rows go to results/bulk_<card>.csv.
"""

import argparse
import tempfile
from pathlib import Path

import bulk
import torch
import transformers

from siglip2_packed import Siglip2PackedImageProcessor
from siglip2_packed.collection.ranks import Ranks
from siglip2_packed.collection.run import ALONE
from siglip2_packed.encode import local_device
from siglip2_packed.flags import DTYPES
from siglip2_packed.measure import Rows, card_name, cpu_name, relative_error
from siglip2_packed.random_checkpoint import SHAPES, save_random_checkpoint


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="JPEGs in the folder (5000)")
    parser.add_argument("--repeat", type=int, default=4, help="each is encoded so many times (4)")
    parser.add_argument("--folder", type=Path, help="where they are kept (a temporary folder)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="where the model runs (cuda)")
    parser.add_argument("--shape", choices=list(SHAPES), help="model (so400m; tiny on a cpu)")
    parser.add_argument("--max-num-patches", type=int, default=256, help="patches of an image (256)")
    parser.add_argument("--decode", choices=["exact", "scaled", "gpu"], default="gpu", help="see encode (gpu)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the JPEGs (0)")
    parser.add_argument("--out", type=Path, help="CSV file (results/bulk_<card>.csv beside this script)")
    args = parser.parse_args(argv)
    ranks = Ranks.of_torchrun()
    ranks.join()
    local_device(args.device)
    transformers.utils.logging.disable_progress_bar()
    cuda = args.device == "cuda"
    dtype = "bfloat16" if cuda else "float32"

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(ranks.first(lambda: temporary))

        def prepare():
            ckpt = str(save_random_checkpoint(folder / "ckpt", args.shape or ("so400m" if cuda else "tiny")))
            processor = Siglip2PackedImageProcessor.from_pretrained(ckpt, max_num_patches=args.max_num_patches)
            processor.save_pretrained(ckpt)
            return bulk.make_folder(args.folder or folder / "jpegs", args.images, args.seed), ckpt

        files, ckpt = ranks.first(prepare)
        rounds = []
        for repeat in [1] + [args.repeat] * args.repeats:
            found = []
            for some in (ALONE, ranks):
                if some is ranks or ranks.rank == 0:
                    flags = args.device, DTYPES[dtype], args.decode, some
                    found.append(bulk.ours(files * repeat, ckpt, *flags))
                ranks.wait()
            rounds.append(found)
            if ranks.rank == 0:
                alone, together = found
                error = relative_error(*(torch.from_numpy(x["pooled"]) for x in (together, alone)))
                if not error <= (2e-2 if cuda else 1e-5):
                    raise SystemExit(f"{ranks.world} ranks' vectors differ by {error:.3g}: nothing is reported")
                speeds = [repeat * args.images / x["seconds"] for x in found]
                print(f"one rank {speeds[0]:.1f}/s   {ranks.world} ranks {speeds[1]:.1f}/s   {error:.1e}", flush=True)
        ranks.leave()
        if ranks.rank:
            return

    machine = card_name() if cuda else cpu_name()
    rows = Rows("bulk", torch.cuda.get_device_name() if cuda else machine)
    workload = f"jpegs{args.images}x{args.repeat}_max{args.max_num_patches}_ranks{ranks.world}"  # bulk.py's rows stay
    provider = bulk.OURS + ("" if args.decode == "exact" else f":{args.decode}")
    images, timed = args.repeat * args.images, [[x["seconds"] for x in found] for found in rounds[1:]]
    for name, way in ((provider, 0), (f"{provider}@{ranks.world}ranks", 1)):
        rows.add(name, workload, "encode", dtype, "images_per_s", [images / x[way] for x in timed], "1/s")
    speedups = [alone / together for alone, together in timed]
    rows.add(f"{provider}@{ranks.world}ranks", workload, "encode", dtype, "speedup_over_one_rank", speedups, "x")
    for row in rows.rows:
        print(f"{row['provider']:28} {row['metric']:22} {row['p50']:>10} {row['unit']}")
    path = args.out or Path(__file__).parent / "results" / f"bulk_{machine}.csv"
    rows.write(path, replacing=["workload", "dtype", "provider"])
    print(f"{len(rows.rows)} rows -> {path}")


if __name__ == "__main__":
    main()
