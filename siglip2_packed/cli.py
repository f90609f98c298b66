"""The command line: `siglip2-packed align | bench | encode | doctor | random-checkpoint | encode-text | merge |
plan | search | show | zero-shot`.

A command is a row of `COMMANDS`. Its function declares the flags and sets `run`, which takes the parsed arguments and
returns the exit code. 0: all well, 1: the command ran and has bad news (a comparison failed, an image could not be
read), 2: it could not run, for the reason on stderr, 130: Ctrl-C, 141: whoever read the output has left, 143: SIGTERM.
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import importlib
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

# Huge pages for large CPU tensors. Every layer allocates its activations anew, and in pages of 4 KiB the page faults
# cost more than some of the ops. torch reads it once, when it first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

COMMANDS = (
    ("align", "compare with transformers and the padded reference", "siglip2_packed.flags:align"),
    ("bench", "time this encoder beside transformers and others", "siglip2_packed.flags:bench"),
    ("encode", "write the features of images, or of whole collections", "siglip2_packed.flags:encode"),
    ("doctor", "what runs on this machine, and whether it was found right", "siglip2_packed.flags:doctor"),
    ("random-checkpoint", "write a checkpoint of random weights", "siglip2_packed.flags:random_checkpoint"),
    ("encode-text", "write the text tower's vectors of texts", "siglip2_packed.flags:encode_text"),
    ("merge", "make one run of shares that encode --shard wrote", "siglip2_packed.flags:merge"),
    ("plan", "hours, disk and memory that a collection takes here", "siglip2_packed.flags:plan"),
    ("search", "find the images nearest to words or to an image", "siglip2_packed.flags:search"),
    ("show", "draw what the features see, and where two models differ", "siglip2_packed.flags:show"),
    ("zero-shot", "score labels for images with the text tower", "siglip2_packed.flags:zero_shot"),
)
ORDERLY = ("encode", "merge")
"""Commands that have something to put away when they are stopped: processes, temporary files, the lock of a folder."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, for a command that is stopped as by Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code. Raises SystemExit for --help and for flags that do not parse.

    Without `argv` the process is the command's own, and signals are, too.
    """
    signals = Signals() if argv is None else None
    argv = [dashed(word) for word in (sys.argv[1:] if argv is None else argv)]
    name = next((word for word in argv if not word.startswith("-")), "")
    program = f"siglip2-packed {name}".rstrip()
    try:
        with flushed():
            return command(argv, name, signals)
    except Terminated:
        say(f"\n{program}: terminated")
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        say(f"\n{program}: interrupted")
        return 128 + signal.SIGINT
    except BrokenPipeError as error:
        if not closed():
            say(f"{program}: error: {error}")
            return 2
        return 141  # as of a program that SIGPIPE ends
    except Exception as error:
        if not of_the_user(error):
            raise
        say(f"{program}: error: {error}")
        return 2
    finally:
        if signals is not None:
            signals.done()


def command(argv: Sequence[str], chosen: str, signals: Signals | None) -> int:
    parser = argparse.ArgumentParser(prog="siglip2-packed", description="SigLIP2 NaFlex on packed patches")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    if chosen == "encode":  # a model's threads that spin while they wait take the cores that decode its next images
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name, help_line, target in COMMANDS:
        one = commands.add_parser(name, help=help_line, description=help_line)
        if name == chosen:
            module, function = target.split(":")
            getattr(importlib.import_module(module), function)(one)
    args = parser.parse_args(argv)

    if args.version:
        from siglip2_packed.version import __version__

        print(f"siglip2-packed {__version__}")
        return 0
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    quieten_transformers()
    if signals is not None:
        signals.orderly = args.command in ORDERLY
    return args.run(args)


class Signals:
    """SIGINT and SIGTERM end the process at once, with a line and no traceback.

    An exception would be one only where Python code happens to run: libraries that are being imported turn it into
    other errors, threads and finalizers print it. A command of `ORDERLY` gets the first signal as an exception, once
    its imports are done.
    """

    def __init__(self) -> None:
        self.orderly, self.owner = False, os.getpid()
        self.report, sys.unraisablehook = sys.unraisablehook, self.lost
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, a shell's background job
                signal.signal(number, self.received)

    def received(self, number: int, _: object) -> None:
        if os.getpid() != self.owner:  # a process forked from this one: its parent speaks
            os._exit(128 + number)
        if self.orderly:
            self.orderly = False
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        words = "interrupted" if number == signal.SIGINT else "terminated"
        stop(f"\nsiglip2-packed {' '.join(sys.argv[1:2])}".rstrip() + f": {words}\n", 128 + number)

    def lost(self, what: Any) -> None:
        """A finalizer that ran just then has swallowed the exception: the signal comes again."""
        if os.getpid() != self.owner or not isinstance(what.exc_value, KeyboardInterrupt):
            self.report(what)
            return
        number = signal.SIGTERM if isinstance(what.exc_value, Terminated) else signal.SIGINT
        _thread.start_new_thread(self.again, (number,))  # a Thread's start would wait here, where it is swallowed, too

    def again(self, number: int) -> None:
        time.sleep(0.1)
        self.orderly = True
        os.kill(self.owner, number)

    def done(self) -> None:
        """The command has said its last word: what Python still tears down is not worth a traceback."""
        self.orderly = False
        if signal.getsignal(signal.SIGINT) == self.received:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def stop(line: str, code: int) -> NoReturn:
    with contextlib.suppress(Exception):  # the signal may have come in the middle of a print
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, line.encode("utf-8", "replace"))
    os._exit(code)


@contextlib.contextmanager
def flushed():
    """What is printed is out, or has failed, before the exit code is decided.

    A name that the terminal's encoding lacks is escaped meanwhile: it must not fail a run that is done.
    """
    stream: Any = sys.stdout
    strict = getattr(stream, "errors", "") == "strict" and hasattr(stream, "reconfigure")
    if strict:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        if sys.stdout is not None:  # started with it closed
            sys.stdout.flush()
        if strict:
            stream.reconfigure(errors="strict")


def closed() -> bool:
    """Whether it is standard output or error that nobody reads any more; what is left in them is then let go."""
    found = False
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            asked = select.poll()
            asked.register(stream.fileno(), 0)
            if any(event & select.POLLERR for _, event in asked.poll(0)):
                found = True
                silence(stream)
    return found


def silence(stream) -> None:
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # a full disk: said above
        silence(sys.stdout)


def of_the_user(error: Exception) -> bool:
    """Whether the message is all there is to say: wrong input, files, missing packages."""
    safetensors = sys.modules.get("safetensors")
    broken = (safetensors.SafetensorError,) if safetensors else ()
    return isinstance(error, (ValueError, OSError, ImportError, *broken))


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
