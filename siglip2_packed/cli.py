"""The command line: `siglip2-packed align | bench | encode | doctor | random-checkpoint | show | zero-shot`.

A command is a row of `COMMANDS`. Its function is imported only when it is the one asked for; it declares the flags and
sets `run`, which takes the parsed arguments and returns the exit code. 0: all well, 1: the command ran and has bad
news (a comparison failed, an image could not be read), 2: it could not run, for the reason on stderr, 130: Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from safetensors import SafetensorError

# Huge pages for large CPU tensors. Every layer allocates its activations anew, and in pages of 4 KiB the page faults
# cost more than some of the ops. torch reads it once, when it first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

COMMANDS = (
    ("align", "compare with transformers and the padded reference", "siglip2_packed.align:configure"),
    ("bench", "time this encoder beside transformers and others", "siglip2_packed.bench:configure"),
    ("encode", "write the features of images, or of whole collections", "siglip2_packed.encode:configure"),
    ("doctor", "attention backends of this machine and their errors", "siglip2_packed.doctor:configure"),
    ("random-checkpoint", "write a checkpoint of random weights", "siglip2_packed.cli:configure_random_checkpoint"),
    ("show", "draw what the features see, and where two models differ", "siglip2_packed.show:configure"),
    ("zero-shot", "score labels for images with the text tower", "siglip2_packed.zero_shot:configure"),
)
USER_ERRORS = (ValueError, OSError, ImportError, SafetensorError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code. Raises SystemExit for --help and for flags that do not parse."""
    argv = [dashed(word) for word in (sys.argv[1:] if argv is None else argv)]
    parser = argparse.ArgumentParser(prog="siglip2-packed", description="SigLIP2 NaFlex on packed patches")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    if chosen == "encode":  # a model's threads that spin while they wait take the cores that decode its next images
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name, help_line, target in COMMANDS:
        command = commands.add_parser(name, help=help_line, description=help_line)
        if name == chosen:
            module, function = target.split(":")
            getattr(importlib.import_module(module), function)(command)
    args = parser.parse_args(argv)

    if args.version:
        from siglip2_packed.version import __version__

        print(f"siglip2-packed {__version__}")
        return 0
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    quieten_transformers()
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(f"\nsiglip2-packed {args.command}: interrupted", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        print(f"siglip2-packed {args.command}: error: {error}", file=sys.stderr)
        return 2


def dashed(word: str) -> str:
    """`--batch_size=2` -> `--batch-size=2`: both spellings of every flag."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def quieten_transformers() -> None:
    """No progress bars and load reports between the lines of a command. Errors still come through."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def configure_random_checkpoint(parser: argparse.ArgumentParser) -> None:
    from siglip2_packed.random_checkpoint import SHAPES

    parser.add_argument("folder", metavar="DIR", help="where to write it; made if it does not exist")
    parser.add_argument("--shape", choices=list(SHAPES), default="base", help="size of the vision tower (base)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (0)")
    parser.add_argument("--full", action="store_true", help="with a text tower, as the checkpoints on the hub")
    parser.set_defaults(run=run_random_checkpoint)


def run_random_checkpoint(args: argparse.Namespace) -> int:
    from siglip2_packed.random_checkpoint import save_random_checkpoint

    folder = save_random_checkpoint(args.folder, args.shape, seed=args.seed, full=args.full)
    print(f"wrote {folder}: {args.shape}, seed {args.seed}, random weights")
    return 0
