"""The flags of the commands, and what commands have in common: dtypes, devices, JSON reports.

A command's module is imported when the command runs, not to print its help: nothing here imports torch before it is
asked for something of torch's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siglip2_packed.collection import DECODE_IN, FORMATS
from siglip2_packed.workloads import DEFAULT_PROVIDERS, PROVIDERS, SHAPES, WORKLOADS

if TYPE_CHECKING:
    import torch

ATTN_IMPLEMENTATIONS = (
    "auto",
    "eager",
    "sdpa",
    "triton",
    "torch_varlen",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
)
"""Those of `ops.attention`, which imports torch."""
DECODE = ("exact", "scaled", "gpu")
"""Those of `formats`, which imports Pillow."""
DOCTOR_SHAPES = ("base", "so400m")
ENCODE_EPILOG = """
In folders and tar files images are {suffixes} (HEIC and
HEIF: pip install 'siglip2-packed[heif]'); what a file holds decides how it is read, and one that is named, or listed,
is read whatever its suffix. PostScript, metafiles and what else would take another program to draw are errors. Links to
folders are followed. Hidden files and folders, companions of macOS and thumbnail folders are passed over. All that is
passed over is counted, by suffix and reason, in skipped.csv. Tables hold images, paths or lists of them in a column;
a folder that save_to_disk of Hugging Face datasets wrote is read as it is.
"""


class _Dtypes(Mapping[str, "torch.dtype"]):
    names = ("float32", "bfloat16", "float16")

    def __getitem__(self, name: str) -> torch.dtype:
        import torch

        if name not in self.names:
            raise KeyError(name)
        return getattr(torch, name)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


DTYPES = _Dtypes()
"""torch's, by name."""


def whole(text: str) -> int:
    """`1000000`, `1_000_000`, `1e6`."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(number)


def later(module: str) -> Callable[[argparse.Namespace], int]:
    """`run` of a module that is not imported yet."""
    return lambda args: importlib.import_module(f"siglip2_packed.{module}").run(args)


def add_model_flags(
    parser: argparse.ArgumentParser,
    ckpt: str = "checkpoint: a folder or a hub id",
    dtype: str = "dtype to compute in",
    default: str = "float32",
) -> None:
    """--ckpt, --device, --dtype, --max-num-patches, --attn-implementation.

    Args:
        default: the dtype; anything that is none says how the command chooses, which then finds None.
    """
    parser.add_argument("--ckpt", required=True, type=given, help=ckpt)
    parser.add_argument("--device", help="device to run on (cuda if there is one, else cpu)")
    chosen = default if default in DTYPES else None
    parser.add_argument("--dtype", choices=list(DTYPES), default=chosen, help=f"{dtype} ({default})")
    parser.add_argument("--max-num-patches", type=int, metavar="N", help="most patches per image (the checkpoint's)")
    parser.add_argument("--attn-implementation", choices=ATTN_IMPLEMENTATIONS, default="auto", help="backend (auto)")


def align(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser, dtype="dtype of our model")
    add = parser.add_argument
    add("--batch-size", type=int, default=2, metavar="N", help="random images of one size (2)")
    add("--image-size", type=image_size, default="224", metavar="SIZE", help="224 or 208x304 (224)")
    add("--threshold", type=float, default=0.99, help="smallest cosine of any token (0.99)")
    add("--use-real-images", action="store_true", help="photographs that come with scikit-image")
    add("--images", nargs="+", metavar="PATH", help="your own images or folders of them")
    add("--gradients", action="store_true",
        help="also of every parameter, beside transformers in the same dtype, against it in float32")  # fmt: skip
    add("--decode", choices=DECODE[1:],
        help="also features of JPEG files decoded so, in float32, against those of their exact pixels")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of the random images and of the loss (0)")
    add("--verbose", action="store_true", help="every comparison; without it a line a kind, and all that failed")
    add("--json", type=new_file, metavar="FILE", help="also write everything to this file")
    parser.set_defaults(run=later("align"))


BENCH_EPILOG = """
Providers: siglip2_packed is this package, plain, compiled, in CUDA graphs (:cudagraph, :batch_invariant, :fp8).
transformers_sdpa_padded, timm_naflexvit (pip install 'siglip2-packed[timm]') and seed_padded compute padded batches;
transformers_cosmos3_edge is packed too; gemm_chain is the matrix products of a forward alone. What a provider is not
made for, or cannot do here, is said with the reason.
"""


def bench(parser: argparse.ArgumentParser) -> None:
    parser.epilog = BENCH_EPILOG
    add = parser.add_argument
    add("--ckpt", help="checkpoint to read; without it random weights of --shape")
    add("--shape", choices=list(SHAPES), help="size of random weights (so400m; base on a CPU)")
    add("--workloads", nargs="+", choices=list(WORKLOADS), default=["uniform256", "mixed"], metavar="NAME",
        help=f"of {', '.join(WORKLOADS)} (uniform256 mixed)")  # fmt: skip
    add("--images", type=int, help="images of each workload (as the workload says; on a CPU what fits 512 patches)")
    add("--providers", nargs="+", choices=list(PROVIDERS), default=list(DEFAULT_PROVIDERS), metavar="NAME",
        help=f"of {', '.join(PROVIDERS)} ({' '.join(DEFAULT_PROVIDERS)})")  # fmt: skip
    add("--modes", nargs="+", choices=["forward", "train"],
        help="inference, and forward with backward (both; forward on a CPU)")  # fmt: skip
    add("--device", help="where to run (cuda if there is one, else cpu)")
    add("--dtype", choices=list(DTYPES), help="bfloat16 on CUDA, else float32")
    add("--rounds", type=int, help="rounds of at least three samples of each provider (5; 1 on a CPU)")
    add("--out", type=new_file, metavar="FILE", help="CSV to write the rows to")
    parser.set_defaults(run=later("bench"))


def doctor(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", help="device to check (cuda if there is one, else cpu)")
    add("--dtypes", nargs="+", choices=list(DTYPES), help="dtypes to check (bfloat16 on CUDA, else float32)")
    add("--shapes", nargs="+", choices=DOCTOR_SHAPES, default=["so400m"], help="sizes of the model (so400m)")
    add("--patches", nargs="+", type=int, default=(256, 1024, 4096), metavar="T",
        help="patches of the packs to show (256 1024 4096)")  # fmt: skip
    add("--image-patches", type=int, default=256, metavar="N", help="most patches per image of these packs (256)")
    add("--attn-implementation", choices=ATTN_IMPLEMENTATIONS, default="auto", help="backend (auto)")
    add("--verbose", action="store_true", help="every implementation, with its errors or why it cannot run here")
    add("--json", type=new_file, metavar="FILE", help="also write everything to this file")
    parser.set_defaults(run=later("doctor"))


def encode(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    from siglip2_packed.formats import DECODED

    suffixes = " ".join(f".{suffix}" for suffix in " ".join(DECODED.values()).split())
    parser.epilog = ENCODE_EPILOG.format(suffixes=suffixes)
    add(
        "images",
        nargs="+",
        metavar="INPUT",
        help="files, folders, lists (.txt, - for stdin), .tar, .parquet, .arrow; or their URLs",
    )
    add("--out", required=True, type=given, metavar="DIR", help="folder to write shards to; or one .safetensors file")
    add_model_flags(parser, dtype="dtype to compute and save", default="bfloat16 on CUDA, else float32")
    add("--pooled", action="store_true", help="also the pooling head's vector of each image")
    add("--normalize", action="store_true", help="pooled vectors of unit length, as search takes them")
    add("--patches", action=argparse.BooleanOptionalAction, default=True, help="the features of all patches (yes)")
    add("--format", choices=FORMATS, default="safetensors", help="what a shard is (safetensors)")
    add("--shard-size", type=int, metavar="N",
        help="inputs per shard (1024, 8192 with --no-patches; fewer where ranks would be idle)")  # fmt: skip
    add("--shard", type=share, default=(0, 1), metavar="I/N",
        help="only share I of N, counted from 0, in a folder of its own below DIR; merge makes one of all")  # fmt: skip
    add("--resume", action="store_true", help="go on with the run in DIR, if there is one, also with more inputs")
    add("--retry-errors", action="store_true",
        help="with --resume: try again what could not be read (a share was away, a decoder came since)")  # fmt: skip
    add("--strict", action="store_true", help="stop at the first image that cannot be read, and exit with 1")
    add("--max-errors", type=most_errors, metavar="N", help="exit with 1 if more (10, 1%%) cannot be read")
    add("--column", metavar="NAME", help="image column of Parquet files (the one there is)")
    add("--keep", nargs="+", default=[], metavar="NAME",
        help="columns of tables, members (txt, cls) or JSON fields of tar samples to carry into the index")  # fmt: skip
    add("--decode", choices=DECODE, help="JPEG files: Pillow's pixels, at a scale of their own, or by nvJPEG (exact)")
    add("--workers", type=int, metavar="N", help="decoding threads or processes (one per core)")
    add("--decode-in", choices=DECODE_IN, help="decode in threads or processes (processes beside a GPU, else threads)")
    add("--save-dtype", choices=list(DTYPES), help="dtype to save (as --dtype; float32 where there is no bfloat16)")
    add("--patch-budget", type=int, metavar="N", help="most patches per pack (16384; on a CPU 2048)")
    add("--batch-invariant", action="store_true",
        help="the same features to the bit, whatever shares an image's pack (on CUDA; slower)")  # fmt: skip
    parser.set_defaults(run=later("encode"))


def encode_text(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("texts", nargs="+", metavar="TEXT", help="texts, a vector each")
    add("--ckpt", required=True, type=given, help="full checkpoint, with text tower and tokenizer: folder or hub id")
    add("--out", required=True, type=new_file, metavar="FILE", help=".safetensors file to write")
    add("--normalize", action="store_true", help="vectors of unit length")
    add("--device", help="device to run on (cuda if there is one, else cpu)")
    parser.set_defaults(run=later("encode_text"))


def merge(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folders", nargs="+", type=given, metavar="DIR", help="what encode --shard was given as --out, or shares in it")
    add("--out", type=given, metavar="DIR", help="folder of the whole (DIR, if there is one)")
    parser.set_defaults(run=later("merge"))


def plan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--images", type=whole, required=True, metavar="N", help="images of the collection: 1000000, or 1e6")
    add("--max-num-patches", type=int, metavar="N", help="most patches per image (the checkpoint's, or the shape's)")
    add("--ckpt", type=given, help="checkpoint: a folder or a hub id; without it random weights of --shape")
    add("--shape", choices=list(SHAPES), default="so400m", help="size of random weights (so400m)")
    add("--sample", nargs="+", metavar="PATH", help="images, or folders of them, that stand for all (a JPEG made here)")
    add("--device", help="device to run on (cuda if there is one, else cpu)")
    add("--dtype", choices=list(DTYPES), help="dtype to compute and save (bfloat16 on CUDA, else float32)")
    add("--seconds", type=float, default=10, help="how long to measure (10)")
    add("--json", type=new_file, metavar="FILE", help="also write everything to this file")
    parser.set_defaults(run=later("plan"))


def random_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="where to write it; made if it does not exist")
    parser.add_argument("--shape", choices=list(SHAPES), default="base", help="size of the vision tower (base)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (0)")
    parser.add_argument("--full", action="store_true", help="with text tower and tokenizer, as those on the hub")
    parser.set_defaults(run=later("random_checkpoint"))


def search(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("features", metavar="DIR", help="what encode --pooled has written")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--text", type=given, help="words; the checkpoint has to have a text tower and a tokenizer")
    asked.add_argument("--image", type=given, metavar="FILE", help="an image, of the collection or not")
    add("--ckpt", type=given, help="checkpoint that encode was given: a folder or a hub id (as run.json says)")
    add("--top", type=int, default=20, metavar="N", help="how many images (20)")
    add("--html", metavar="FILE", help="also write a contact sheet: thumbnails and cosines on one page")
    add("--device", help="device to run on (cuda if there is one, else cpu)")
    parser.set_defaults(run=later("search"))


def show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="files, or folders to walk for images")
    add_model_flags(parser, dtype="dtype of the model")
    add = parser.add_argument
    add("--use-real-images", action="store_true", help="three photographs that come with scikit-image")
    add("--out", metavar="FILE", help="draw the panels here: .png, .pdf or .svg")
    add("--html", metavar="FILE", help="write a page in which patches can be clicked")
    add("--patch", type=patch, metavar="ROW,COL", help="cosines to this patch (the most attended)")
    add("--pca", choices=["together", "image"], default="together",
        help="principal components of all images, so that colours compare, or of each (together)")  # fmt: skip
    add("--against", metavar="MODEL", help="where it differs: padded, transformers or a checkpoint")
    parser.set_defaults(run=later("show"))


def zero_shot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, or folders to walk for images")
    parser.add_argument("--labels", nargs="+", required=True, metavar="LABEL", help="what might be in the images")
    add_model_flags(parser, ckpt="full checkpoint, with text tower and tokenizer: folder or hub id")
    parser.add_argument("--template", default="This is a photo of {}.",
                        help="text of a label ('This is a photo of {}.'; '{}' for itself)")  # fmt: skip
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write the scores to this file")
    parser.set_defaults(run=later("zero_shot"))


def given(text: str) -> str:
    """Not empty, as a variable of the shell is that was never set: it would be the working folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def new_file(text: str) -> str:
    """One that can be written, as far as can be said before anything is computed."""
    path = Path(text)
    there = next((one for one in (path, *path.parents) if one.exists()), path)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder")
    if not os.access(there, os.W_OK) or (there != path and not there.is_dir()):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return text


def most_errors(text: str) -> int | float:
    """A count (`10`), or a share of all (`1%`, `0.01`)."""
    try:
        value: int | float = int(text) if text.isdecimal() else float(text.rstrip("%")) / (100 if "%" in text else 1)
    except ValueError:
        value = math.nan
    if not (isinstance(value, int) or 0 <= value <= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a count (10) nor a share (1%)")
    return value


def share(text: str) -> tuple[int, int]:
    """`3/64` -> (3, 64), the fourth."""
    index, slash, of = text.partition("/")
    if not (slash and index.isdecimal() and of.isdecimal() and int(of) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a share such as 3/64")
    if int(index) >= int(of):
        raise argparse.ArgumentTypeError(f"{text!r}: shares count from 0, the last is {int(of) - 1}/{int(of)}")
    return int(index), int(of)


def image_size(text: str) -> tuple[int, int]:
    """`224` or `208x304` (height x width) -> (height, width)."""
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) > 2 or min(sides) < 1:
        raise ValueError(text)
    return sides[0], sides[-1]


def patch(text: str) -> tuple[int, int]:
    """`3,5` -> (3, 5), row and column."""
    row, column = text.split(",")
    return int(row), int(column)


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or CUDA where there is one. ValueError if it is not there."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # the meta device has tensors, but no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # no such name or device
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def write_json(path: str, report: Any) -> None:
    """Writes a report, NaN and infinities as null: JSON has none."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(_finite(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
