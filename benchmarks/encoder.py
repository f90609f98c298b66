"""The encoder beside its peers on every large workload: `siglip2-packed bench` with all providers, rows kept.

    python benchmarks/encoder.py              # about seven minutes on an H200

Prints lines as they come; the book's table and plot are made from the rows by readme_tables.py. Flags of the command
(`siglip2-packed bench --help`) may follow and replace those set here.
"""

import sys
from pathlib import Path

import torch

from siglip2_packed import cli
from siglip2_packed.bench import PROVIDERS, card_name
from siglip2_packed.workloads import SMALL_PACKS, WORKLOADS

if __name__ == "__main__":
    card = card_name() if torch.cuda.is_available() else "cpu"
    out = Path(__file__).parent / "results" / f"encoder_{card}.csv"
    workloads = [name for name in WORKLOADS if name not in SMALL_PACKS]  # those: small_packs.py
    flags = ["bench", "--workloads", *workloads, "--providers", *PROVIDERS, "--out", str(out), *sys.argv[1:]]
    sys.exit(cli.main(flags))
