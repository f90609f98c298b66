"""Two source trees of this package beside each other on one machine: same bits, speed, work of the host, first step.

    python benchmarks/compare_trees.py bits --old cfe958a       # CPU; about two minutes on two cores
    python benchmarks/compare_trees.py speed --old DIR          # CUDA; rows to results/compare_trees_<card>.csv
    python benchmarks/compare_trees.py speed --old DIR --workloads pack1x256    # also old, beside new in CUDA graphs
    python benchmarks/compare_trees.py host --old DIR           # CUDA; fails if a count has grown
    python benchmarks/compare_trees.py start --old DIR          # CUDA; cold and warm Triton cache, fresh processes

`--old` is a folder, whose name the rows give, or a commit of this repository. Each tree computes in a process of its
own (`tree_worker.py`) and, but for bits, one at a time. With `--device cpu --shape tiny` all of it runs without a GPU.
"""

import argparse
import contextlib
import datetime
import io
import multiprocessing
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # not an installed one

import torch
from transformers.utils import logging

from siglip2_packed import measure
from siglip2_packed.random_checkpoint import SHAPES, save_random_checkpoint
from siglip2_packed.workloads import SMALL_PACKS, WORKLOADS, grids

OURS = "siglip2_packed"
CASES = ("inference", "training", "token features", "select_layer=-2", "checkpointing", "last layer trained")
BOUND = 0.05
"""Relative error, in bfloat16, beyond which trees do not compute the same and nothing is timed."""


class Tree(NamedTuple):
    name: str
    """As the rows have it; empty for the new tree."""
    folder: Path


class Worker:
    """A process that computes with a tree."""

    def __init__(self, tree: Tree, **environment: str):
        self.tree = tree
        self.connection, theirs = multiprocessing.Pipe()
        path = os.pathsep.join([str(tree.folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, str(ROOT / "benchmarks" / "tree_worker.py"), str(theirs.fileno())]
        variables = os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore::FutureWarning"} | environment
        self.process = subprocess.Popen(command, env=variables, pass_fds=[theirs.fileno()])
        theirs.close()
        if Path(self.ask("where")) != tree.folder / "siglip2_packed":
            raise SystemExit(f"imported from {self.ask('where')}, not {tree.folder}")

    def send(self, command: str, **arguments: Any) -> None:
        self.connection.send((command, arguments))

    def receive(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            raise SystemExit(f"{self.tree.folder}: its process ended, see above") from None

    def ask(self, command: str, **arguments: Any) -> Any:
        self.send(command, **arguments)
        return self.receive()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        self.connection.close()
        self.process.wait()


@contextlib.contextmanager
def old_tree(name: str) -> Iterator[Tree]:
    """A folder, or a commit, which is written to a temporary one."""
    folder = Path(name).resolve()
    if folder.is_dir():
        yield Tree(folder.name, folder)
        return
    archive = subprocess.run(["git", "archive", name], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        raise SystemExit(f"{name}: neither a folder nor a commit: {archive.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory() as temporary:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(temporary, filter="data")
        yield Tree(name, Path(temporary).resolve())


@contextlib.contextmanager
def trees(args: argparse.Namespace) -> Iterator[tuple[Tree, Tree]]:
    """Old and new."""
    with old_tree(args.old) as old:
        yield old, Tree("", args.new.resolve())


@contextlib.contextmanager
def checkpoint(shape: str, layers: int | None) -> Iterator[str]:
    """A folder with random weights, of fewer layers if so wished; both trees read it."""
    SHAPES["chosen"] = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    with tempfile.TemporaryDirectory() as folder:
        yield str(save_random_checkpoint(folder, "chosen"))


class Rows(measure.Rows):
    """Rows that name their tree; no git where the device is."""

    def __init__(self, bench: str, args: argparse.Namespace):
        self.rows, self.args = [], args
        card = torch.cuda.get_device_name() if args.device == "cuda" else measure.cpu_name()
        self.common = {"bench": bench, "card": card, "commit": "", "date": datetime.date.today().isoformat()}
        self.common |= {name: measure.version(name) for name in ("torch", "triton", "transformers")}
        name = measure.card_name() if args.device == "cuda" else card
        self.path = args.out or ROOT / "benchmarks" / "results" / f"{bench}_{name}.csv"

    def add_for(self, tree: Tree, variant: str, workload: str, mode: str, metric: str, values, unit: str) -> None:
        provider = OURS + variant + (f"@{tree.name}" if tree.name else "")
        row = self.add(provider, workload, mode, self.args.dtype, metric, values, unit)
        row["commit"] = tree.name or self.args.commit


def bits(args: argparse.Namespace) -> int:
    print(f"{'case':32} tensors  old {args.old}, new {args.new}")
    wrong = compared = 0
    with trees(args) as (old, new), Worker(old) as a, Worker(new) as b:

        def case(label: str, command: str, **arguments: Any) -> None:
            nonlocal wrong, compared
            for worker in (a, b):
                worker.send(command, threads=args.threads, **arguments)
            theirs, ours = a.receive(), b.receive()
            differ = sorted(x for x in theirs.keys() | ours.keys() if theirs.get(x, "-") != ours.get(x, "-"))
            count = sum(theirs[x] is not None for x in theirs.keys() & ours.keys())
            wrong, compared = wrong + bool(differ or not count), compared + count
            shown = ", ".join(differ[:4]) + (", ..." if len(differ) > 4 else "")
            verdict = f"{len(differ)} DIFFER: {shown}" if differ else "PASS" if count else "NOTHING COMPARED"
            print(f"{label:32} {count:7}  {verdict}", flush=True)

        case("processor, pack, unpack", "pixel_bits")
        for shape in args.shapes:
            layers = args.layers if shape == "base" else None
            with checkpoint(shape, layers) as ckpt:
                for name in CASES:
                    images = grids("mixed")[: args.images]
                    case(f"{shape}: {name}", "model_bits", case=name, ckpt=ckpt, grids=images)
    print(f"{compared} tensors compared, {f'{wrong} cases DIFFER' if wrong else 'bit for bit the same'}")
    return 1 if wrong or not compared else 0


def loaded(worker: Worker, ckpt: str, args: argparse.Namespace) -> Worker:
    worker.ask("load", ckpt=ckpt, device=args.device, dtype=args.dtype)
    return worker


def same_answers(a: Worker, b: Worker) -> str:
    """How far the new tree's features and gradients are from the old one's; the end, if too far."""
    with tempfile.TemporaryDirectory() as folder:
        a.ask("keep", path=f"{folder}/kept")
        found = b.ask("compare", path=f"{folder}/kept")
    if found["same"] == found["tensors"]:
        return "bit-equal"
    text = ", ".join(f"{kind} {error:.1e}" for kind, error in found["errors"].items())
    if not all(error <= BOUND for error in found["errors"].values()):
        raise SystemExit(f"relative errors {text} between the trees: nothing timed")
    return f"{text}; {found['same']} of {found['tensors']} tensors bit-equal"


def speed(args: argparse.Namespace) -> int:
    rows = Rows("compare_trees", args)
    cases = [(workload, mode, mode) for workload in args.workloads for mode in ("forward", "train")]
    if args.device == "cuda":
        cases.append(("single256", "cudagraph", "cudagraph"))
        cases += [(workload, "train", "cudagraph_train") for workload in args.workloads if workload in SMALL_PACKS]
    with (
        trees(args) as (old, new),
        checkpoint(args.shape, args.layers) as ckpt,
        Worker(old) as a,
        Worker(new) as b,
    ):
        for worker in (a, b):
            loaded(worker, ckpt, args)
        print(f"{'workload':11} {'step':15} {'old':>9} {'new':>9} ms  new/old (p20 to p80 of rounds)     between trees")
        for workload, before, step in cases:
            a.ask("prepare", grids=grids(workload), mode=before)
            b.ask("prepare", grids=grids(workload), mode=step)
            answers = same_answers(a, b)
            for worker in (a, b):
                worker.ask("settle")
            times: dict[Tree, list[float]] = {old: [], new: []}
            medians: dict[Tree, list[float]] = {old: [], new: []}
            for round_ in range(args.rounds):
                for worker in (a, b) if round_ % 2 == 0 else (b, a):
                    block = worker.ask("sample")
                    times[worker.tree] += block
                    medians[worker.tree].append(statistics.median(block))
            variant = ":cudagraph" if step.startswith("cudagraph") else ""
            mode = "train" if step.endswith("train") else "forward"
            for tree in (old, new) if before == step else (new,):  # training as it is has its rows
                rows.add_for(tree, variant, workload, mode, "time", times[tree], "ms")
            ratios = [y / x for x, y in zip(medians[old], medians[new])]
            rows.add_for(new, variant, workload, mode, "ratio", ratios, "x")
            rows.write(rows.path)  # after every case: a run that is stopped has kept its rows
            theirs, ours = (statistics.median(times[tree]) for tree in (old, new))
            low, high = (float(rows.rows[-1][x]) for x in ("p20", "p80"))
            line = f"{theirs:9.3f} {ours:9.3f}     {ours / theirs:.3f} ({low:.3f} to {high:.3f})"
            print(f"{workload:11} {step:15} {line:56} {answers}", flush=True)
    print(f"{len(rows.rows)} rows -> {rows.path}")
    return 0


def host(args: argparse.Namespace) -> int:
    grown = False
    with trees(args) as (old, new), checkpoint(args.shape, args.layers) as ckpt:
        counts: dict[str, dict[Tree, int]] = {}
        for tree in (old, new):
            with Worker(tree) as worker:
                loaded(worker, ckpt, args)
                for workload in args.workloads:
                    for mode in ("forward", "train"):
                        worker.ask("prepare", grids=grids(workload), mode=mode)
                        for what, count in worker.ask("host").items():
                            counts.setdefault(f"{workload:11} {mode:8} {what:16}", {})[tree] = count
    print(f"{'workload':11} {'step':8} {'count':16} {'old':>9} {'new':>9}")
    for label, count in counts.items():
        before, after = count[old], count[new]
        if not min(before, after) and "copies" not in label:
            raise SystemExit(f"{label.strip()}: nothing counted")
        grown |= after > before
        print(f"{label} {before:9} {after:9}{'  MORE' if after > before else ''}")
    return int(grown)


def start(args: argparse.Namespace) -> int:
    rows = Rows("compare_trees_start", args)
    print(f"{'workload':11} {'cache':5} {'end of first':12} {'old':>16} {'new':>16} s, of each process")
    with trees(args) as (old, new), checkpoint(args.shape, args.layers) as ckpt:
        for workload in args.workloads:
            images = grids(workload, images=4 if workload == "uniform256" else None)
            seconds: dict[tuple, list[float]] = defaultdict(list)
            for sample in range(args.samples):
                for tree in (old, new) if sample % 2 == 0 else (new, old):
                    with tempfile.TemporaryDirectory() as cache:
                        for state in ("cold", "warm"):
                            with loaded(Worker(tree, TRITON_CACHE_DIR=cache), ckpt, args) as worker:
                                for mode, value in worker.ask("start", grids=images).items():
                                    seconds[state, mode, tree].append(value)
            for state in ("cold", "warm"):
                for mode in ("forward", "train"):
                    for tree in (old, new):
                        values = seconds[state, mode, tree]
                        rows.add_for(tree, "", workload, mode, f"start_{state}", values, "s")
                    texts = [" ".join(f"{x:.2f}" for x in seconds[state, mode, tree]) for tree in (old, new)]
                    print(f"{workload:11} {state:5} {mode:12} {texts[0]:>16} {texts[1]:>16}", flush=True)
            rows.write(rows.path)
    print(f"{len(rows.rows)} rows -> {rows.path}")
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for run, text, workloads, layers in (
        (bits, "features, gradients and pixels, bit for bit", None, 2),
        (speed, "time of steps, in turn", ["uniform256", "mixed", "video"], None),
        (host, "launches, allocations and Python calls of a warm step", ["single256", "uniform256"], None),
        (start, "seconds to the first step of a fresh process", ["uniform256", "mixed"], 4),
    ):
        command = commands.add_parser(run.__name__, help=text, description=text)
        command.set_defaults(run=run)
        command.add_argument("--old", required=True, help="the tree to compare with: a folder or a commit")
        command.add_argument("--new", type=Path, default=ROOT, help="the tree to compare (this script's own)")
        if run is bits:
            command.add_argument("--shapes", nargs="+", default=["tiny", "base"], help="of the weights (tiny base)")
            command.add_argument("--layers", type=int, default=layers, help=f"layers of base ({layers}; it has 12)")
            command.add_argument("--images", type=int, default=20, help="images of workload mixed (20)")
            command.add_argument("--threads", type=int, default=1, help="threads of each tree; both run at once (1; of "
                                 "more, the sums of the position table's gradient come in any order)")  # fmt: skip
            continue
        command.add_argument("--workloads", nargs="*", choices=list(WORKLOADS), default=workloads, metavar="NAME",
                             help=f"of {', '.join(WORKLOADS)} ({' '.join(workloads)})")  # fmt: skip
        command.add_argument("--device", choices=["cuda", "cpu"], default=device, help="cuda if there is one")
        command.add_argument("--dtype", help="bfloat16 on CUDA, else float32")
        command.add_argument("--shape", choices=list(SHAPES), default="so400m", help="of the weights (so400m)")
        command.add_argument("--layers", type=int, default=layers, help=f"of the encoder ({layers or 'all'})")
        if run is not host:
            command.add_argument("--commit", default="", help="the new tree's commit, for the rows")
            command.add_argument("--out", type=Path, help="CSV to write (results/compare_trees..._<card>.csv)")
        if run is speed:
            command.add_argument("--rounds", type=int, default=5, help="rounds, in each both trees in turn (5)")
        if run is start:
            command.add_argument("--samples", type=int, default=2, help="fresh processes of each tree and cache (2)")
    return parser


if __name__ == "__main__":
    logging.disable_progress_bar()
    args = parser().parse_args()
    if args.run is not bits:
        args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    sys.exit(args.run(args))
