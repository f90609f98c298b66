"""`siglip2-packed merge`: one run of the shares that `encode --shard` wrote, as if it had never been divided."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from siglip2_packed.collection.lock import Lock, lock_of
from siglip2_packed.collection.shares import merge_shares


def run(args: argparse.Namespace) -> int:
    folders = [*map(Path, args.folders)]
    if args.out is None and len(folders) > 1:
        raise ValueError("several folders of shares: say where the whole is to be written (--out)")
    out = Path(args.out or args.folders[0])
    lock = Lock(lock_of(out, one_file=False))
    try:
        lock.take()
        counts = merge_shares(folders, out, lock.held)
    finally:
        lock.release()
    print(f"wrote {out}: {counts.read} images, {counts.patches} patches")
    if counts.failed:
        print(f"{counts.failed} images could not be read: see {out / 'errors.csv'}", file=sys.stderr)
    return int(counts.failed > 0 and not counts.read)
