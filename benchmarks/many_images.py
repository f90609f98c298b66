"""100,000 small images: how long they take to list, and what `encode` takes of memory; so400m's weights: to be known.

    python benchmarks/many_images.py                                  # ten minutes on two cores
    python benchmarks/many_images.py --beside OLD=path/to/older/tree  # in turn with another tree

Everything is measured in processes of their own: peak memory is the resident set's, of `encode` with a tiny model that
writes pooled vectors. A list is timed within its process, imports apart.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from siglip2_packed.measure import Rows, cpu_name
from siglip2_packed.random_checkpoint import save_random_checkpoint

ROOT = Path(__file__).parent.parent
LIST = """
import sys, time
try:
    from siglip2_packed.collection.sources import find_inputs
except ImportError:  # before there were folders
    from siglip2_packed.sources import find_inputs
start = time.perf_counter()
count = len(find_inputs([sys.argv[1]]))
print(count, time.perf_counter() - start)
"""
DIGEST = """
import sys, time
from siglip2_packed import Siglip2PackedVisionModel
from siglip2_packed.collection.decode import cores
from siglip2_packed.collection.identity import weights_digest
state = Siglip2PackedVisionModel.from_pretrained(sys.argv[1], dtype=sys.argv[2]).state_dict()
start = time.perf_counter()
weights_digest(state, cores())
print(len(state), time.perf_counter() - start)
"""


def python(tree: Path, *arguments: str) -> tuple[str, float, float]:
    """What a process prints, its seconds, and the most memory it held, in GiB."""
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    printed = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{tree}: {arguments[:3]} ended with status {status}")
    return printed, time.perf_counter() - start, usage.ru_maxrss / 2**20


def seconds(tree: Path, code: str, *arguments: str) -> float:
    return float(python(tree, "-c", code, *arguments)[0].split()[-1])


def draw(folder: Path, count: int) -> None:
    """JPEGs of 32x32 to 48x40 pixels; equal ones share their bytes, not their names."""
    folder.mkdir()
    numbers = np.random.default_rng(0)
    drawn = []
    for height, width in ((32, 32), (48, 32), (32, 48), (48, 40)):
        file = folder.parent / f"{height}x{width}.jpg"
        Image.fromarray(numbers.integers(0, 256, (height, width, 3), np.uint8)).save(file)
        drawn.append(file.read_bytes())
    for number in range(count):
        (folder / f"{number:06d}.jpg").write_bytes(drawn[number % len(drawn)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000, help="files, and members of a tar (100000)")
    parser.add_argument("--repeats", type=int, default=3, help="lists of each kind (3)")
    parser.add_argument("--beside", metavar="NAME=TREE", help="another tree, measured in turn")
    parser.add_argument("--out", type=Path, help="CSV file (default: results/many_images_<cpu>.csv beside this script)")
    args = parser.parse_args()
    trees = {"siglip2_packed": ROOT}
    if args.beside:
        name, _, tree = args.beside.partition("=")
        trees[f"siglip2_packed:{name}"] = Path(tree).resolve()
    rows = Rows("many_images", cpu_name())

    def add(provider: str, workload: str, metric: str, values, unit: str, dtype: str = "") -> None:
        row = rows.add(provider, workload, "load", dtype, metric, values, unit)
        print(f"{provider:24} {workload:20} {metric:12} {float(row['p50']):10.3f} {unit}", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        many, few, tar = place / "many", place / "few", place / "many.tar"
        draw(many, args.images), draw(few, min(1000, args.images))
        with tarfile.open(tar, "w") as file:
            file.add(many, "many")
        for kind, path in (("folder", many), ("tar", tar)):
            times = {name: [] for name in trees}
            for _ in range(args.repeats):
                for name, tree in trees.items():
                    times[name].append(1e3 * seconds(tree, LIST, str(path)))
            for name, values in times.items():
                add(name, f"list_{kind}{args.images}", "time", values, "ms")
        ckpt = str(save_random_checkpoint(place / "tiny", "tiny"))
        flags = ["--ckpt", ckpt, "--device", "cpu", "--pooled", "--no-patches"]
        for folder, count in ((few, min(1000, args.images)), (many, args.images)):
            for name, tree in trees.items():
                out = place / "out"
                _, took, peak = python(tree, "-m", "siglip2_packed", "encode", str(folder), *flags, "--out", str(out))
                shutil.rmtree(out)
                add(name, f"encode{count}", "peak_memory", peak, "GiB", "float32")
                add(name, f"encode{count}", "time", 1e3 * took, "ms", "float32")
        ckpt = str(save_random_checkpoint(place / "so400m", "so400m"))
        for dtype in ("float32", "bfloat16"):
            times = [1e3 * seconds(ROOT, DIGEST, ckpt, dtype) for _ in range(args.repeats)]
            add("siglip2_packed", "digest_so400m", "time", times, "ms", dtype)
    path = args.out or ROOT / "benchmarks" / "results" / f"many_images_{cpu_name()}.csv"
    rows.write(path)
    print(f"{len(rows.rows)} rows -> {path}")


if __name__ == "__main__":
    main()
