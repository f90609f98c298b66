"""A contact sheet: pictures and what there is to say of each, as one HTML file that fetches nothing."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from siglip2_packed.images import Source, read_rgb
from siglip2_packed.version import __version__

SIDE = 256
"""Pixels of a thumbnail's longer side."""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; color: #222; margin: 2em auto; padding: 0 1.5em; max-width: 1500px; }}
h1 {{ font-size: 1.3em; margin: 0; }}
p {{ margin: .3em 0 1.5em; color: #666; }}
main {{ display: grid; gap: 18px; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }}
figure {{ margin: 0; }}
.frame {{ height: 200px; background: #f2f2f2; display: flex; align-items: center; justify-content: center; }}
.frame img {{ max-width: 100%; max-height: 100%; }}
.frame span {{ padding: 1em; color: #777; overflow-wrap: anywhere; }}
figcaption {{ font-size: 12px; overflow-wrap: anywhere; }}
b {{ font-variant-numeric: tabular-nums; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{about}</p>
<main>
{figures}
</main>
</body>
</html>
"""
FIGURE = '<figure><div class="frame">{shown}</div><figcaption><b>{score:.3f}</b> {name}{beside}</figcaption></figure>'


class Picture(NamedTuple):
    name: str
    score: float
    jpeg: bytes
    """A thumbnail, or nothing."""
    missing: str
    """Why there is none."""
    beside: str = ""
    """What else there is to say of it."""


def thumbnail(source: Source) -> bytes:
    """JPEG of an image of any kind, of at most 256x256 pixels. Raises ValueError for what is none."""
    image: Any = read_rgb(source)[0]  # floating pixels come as 8 bits, too
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


def write_sheet(path: Path, title: str, about: str, pictures: Sequence[Picture]) -> None:
    figures = [
        FIGURE.format(shown=_shown(one), score=one.score, name=_escaped(one.name), beside=_line(one.beside))
        for one in pictures
    ]
    about = f"{about}; siglip2-packed {__version__}"
    page = PAGE.format(title=_escaped(title), about=_escaped(about), figures="\n".join(figures))
    path.write_text(page, encoding="utf-8")


def printable(text: str) -> str:
    """What is no character to be seen (line breaks, escapes of a terminal, single bytes) as Python writes it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _shown(picture: Picture) -> str:
    if not picture.jpeg:
        return f"<span>{_escaped(picture.missing)}</span>"
    data = base64.b64encode(picture.jpeg).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{_escaped(picture.name)}">'


def _line(text: str) -> str:
    return f"<br>{_escaped(text)}" if text else ""


def _escaped(text: str) -> str:
    return html.escape(printable(text))
