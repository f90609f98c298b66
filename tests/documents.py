"""The code blocks of README.md and docs/, and a folder in which they run as they are written."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from siglip2_packed import random_checkpoint

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
README = ROOT / "README.md"
PAGES = [README, *DOCS]
HUB_ID = "google/siglip2-so400m-patch16-naflex"
FENCE = re.compile(
    r"^(?:<!-- (?P<note>[^\n]*?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
NOT_RUN = "not run: "


class Block(NamedTuple):
    language: str
    code: str
    note: str
    """The comment before it: `not run: ` and why, or the name that a test of its own knows it by."""


def blocks(page: Path) -> list[Block]:
    """Those of a page, in order."""
    return [Block(m["language"], m["code"], m["note"] or "") for m in FENCE.finditer(page.read_text())]


def example(name: str) -> str:
    """The code of the block that is called so, in whatever page it is."""
    (found,) = (block.code for page in PAGES for block in blocks(page) if block.note == name)
    return found


def named() -> dict[str, str]:
    """The code of blocks that have a name, in Python."""
    found = [block for page in PAGES for block in blocks(page)]
    return {x.note: x.code for x in found if x.language == "python" and x.note and not x.note.startswith(NOT_RUN)}


def commands(code: str) -> list[list[str]]:
    """The arguments of each `siglip2-packed` line."""
    lines = [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()]
    for line in filter(None, lines):
        assert line[0] == "siglip2-packed", f"{line}: say `{NOT_RUN}` and why before the block"
    return [line[1:] for line in lines if line]


def furnish(folder: Path) -> None:
    """A checkpoint where examples expect it, by the name of the hub's or `CKPT`, and photographs beside it."""
    shape = {**random_checkpoint.SHAPES["tiny"], "patch_size": 16, "num_patches": 256}
    random_checkpoint.SHAPES["tiny16"] = shape
    try:
        random_checkpoint.save_random_checkpoint(folder / HUB_ID, "tiny16", full=True)
    finally:
        del random_checkpoint.SHAPES["tiny16"]
    (folder / "CKPT").symlink_to(folder / HUB_ID)
    (folder / "photos").mkdir()
    sizes = {"cat.jpg": (60, 90), "receipt.png": (130, 40), "photos/a.jpg": (50, 70), "photos/b.jpg": (80, 48)}
    for seed, (name, size) in enumerate(sizes.items()):
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
