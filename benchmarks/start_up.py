"""How long `import siglip2_packed`, `siglip2-packed --version` and help take, in processes of their own.

    python benchmarks/start_up.py                                  # seconds
    python benchmarks/start_up.py --beside OLD=path/to/older/tree  # in turn with another tree

Files are in the page cache from a first run, which is not counted.
"""

import argparse
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from siglip2_packed.measure import Rows, cpu_name, in_turn

ROOT = Path(__file__).parent.parent
CALLS = {
    "import": ["-c", "import siglip2_packed"],
    "version": ["-m", "siglip2_packed", "--version"],
    "help": ["-m", "siglip2_packed", "--help"],
    "align_help": ["-m", "siglip2_packed", "align", "--help"],
    "encode_help": ["-m", "siglip2_packed", "encode", "--help"],
}


def call(tree: Path, arguments: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each (7)")
    parser.add_argument("--beside", metavar="NAME=TREE", help="another tree, timed in turn")
    parser.add_argument("--out", type=Path, help="CSV file (default: results/start_up_<cpu>.csv beside this script)")
    args = parser.parse_args()
    trees = {"siglip2_packed": ROOT}
    if args.beside:
        name, _, tree = args.beside.partition("=")
        trees[f"siglip2_packed:{name}"] = Path(tree).resolve()
    rows = Rows("start_up", cpu_name())
    for workload, arguments in CALLS.items():
        times = in_turn({name: partial(call, tree, arguments) for name, tree in trees.items()}, args.repeats)
        for name, ms in times.items():
            row = rows.add(name, workload, "load", "", "time", ms, "ms")
            print(f"{workload:12} {name:24} {float(row['p50']):8.0f} ms", flush=True)
    path = args.out or ROOT / "benchmarks" / "results" / f"start_up_{cpu_name()}.csv"
    rows.write(path)
    print(f"{len(rows.rows)} rows -> {path}")


if __name__ == "__main__":
    main()
