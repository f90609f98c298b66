"""Draws what `views.py` computes: panels with matplotlib, and a page in which patches can be clicked.

The page is `page.html` filled in. It is one file: images and numbers inside, a little JavaScript, nothing fetched.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from siglip2_packed.inspection.views import View
from siglip2_packed.version import __version__

PANEL_SUFFIXES = (".png", ".pdf", ".svg")
# nine stops of matplotlib's magma and viridis, for the page as well
HEAT = "#000004 #1d1147 #51127c #822681 #b73779 #e75263 #fc8961 #fec488 #fcfdbf".split()
COSINE = "#440154 #472d7b #3b528b #2c728e #21918c #28ae80 #5ec962 #addc30 #fde725".split()

# inches
WIDTH, TALLEST, GAP, MARGIN, TITLE, FOOTER = 2.8, 4.2, 0.18, 0.25, 0.42, 0.52


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("--out needs matplotlib: pip install 'siglip2-packed[show]'") from error


class Sheet:
    """A matplotlib figure of columns, measured in inches from the top left."""

    def __init__(self, columns: int, height: float):
        from matplotlib.figure import Figure

        self.lefts = [MARGIN + column * (WIDTH + GAP) for column in range(columns)]
        self.width, self.height = self.lefts[-1] + WIDTH + MARGIN, height
        self.figure = Figure(figsize=(self.width, height), facecolor="white")

    def axes(self, x: float, y: float, w: float, h: float) -> Any:
        box = (x / self.width, 1 - (y + h) / self.height, w / self.width, h / self.height)
        axes = self.figure.add_axes(box, xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_visible(False)
        return axes

    def write(self, x: float, y: float, text: str, **style: Any) -> None:
        # a name between dollar signs is not mathematics
        style = {"fontsize": 8, "color": "#666666", "ha": "center", "va": "center", "parse_math": False, **style}
        self.figure.text(x / self.width, 1 - y / self.height, text, **style)


def draw_panel(views: Sequence[View], path: Path) -> None:
    """A row an image: the image at its grid, PCA, attention, cosines and, if compared, the differences."""
    titles = ["image and patches", "principal components", "pooling attention", "cosine to the marked patch"]
    compared = views[0].difference
    if compared is not None:
        titles += ["relative error", "1 − cosine"]
    heights = [min(WIDTH * h / w, TALLEST) for h, w in (view.grid for view in views)]
    sheet = Sheet(len(titles), MARGIN + TITLE + sum(heights) + FOOTER * len(views))
    for left, title in zip(sheet.lefts, titles):
        sheet.write(left + WIDTH / 2, MARGIN + 0.1, title, fontsize=10, color="black")
    if compared is not None:
        for left in sheet.lefts[4:]:
            sheet.write(left + WIDTH / 2, MARGIN + 0.29, f"to {_short(compared.against)}")
    top = MARGIN + TITLE
    for view, tall in zip(views, heights):
        _draw_row(sheet, view, top, tall)
        top += tall + FOOTER
    sheet.figure.savefig(path, dpi=150)


def _draw_row(sheet: Sheet, view: View, top: float, tall: float) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    heat, cosine = (LinearSegmentedColormap.from_list("", stops, 256) for stops in (HEAT, COSINE))
    h, w = view.grid
    wide, below = tall * w / h, top + tall + 0.14

    def panel(left: float, image: Any, caption: str = "", **style: Any) -> Any:
        axes = sheet.axes(left + (WIDTH - wide) / 2, top, wide, tall)
        axes.imshow(image, extent=(0, w, h, 0), aspect="auto", interpolation="nearest", **style)
        sheet.write(left + WIDTH / 2, below, caption)
        return axes

    def scaled(left: float, values: Tensor, colours: Any, low: float, high: float, label: Callable) -> Any:
        """A map with its scale under it."""
        strip = sheet.axes(left + WIDTH / 4, below - 0.035, WIDTH / 2, 0.07)
        strip.imshow(np.linspace(0, 1, 256)[None], aspect="auto", cmap=colours)
        sheet.write(left + WIDTH / 4 - 0.07, below, label(low), ha="right")
        sheet.write(left + WIDTH * 3 / 4 + 0.07, below, label(high), ha="left")
        return panel(left, values.numpy(), cmap=colours, vmin=low, vmax=high)

    image = panel(sheet.lefts[0], view.pixels, f"{view.name}, {h}×{w} patches")
    image.hlines(range(1, h), 0, w, color="white", lw=0.4, alpha=0.35)
    image.vlines(range(1, w), 0, h, color="white", lw=0.4, alpha=0.35)

    panel(sheet.lefts[1], view.colours.numpy(), view.variance)

    if view.attention is None:
        panel(sheet.lefts[2], np.full((1, 1, 3), 0.95), "no pooling head")
    else:
        mean = view.attention.mean(dim=0)
        scaled(sheet.lefts[2], mean, heat, float(mean.min()), float(mean.max()), lambda x: f"{100 * x:.2g}%")

    near = view.cosines[view.patch[0] * w + view.patch[1]].view(h, w)
    mapped = scaled(sheet.lefts[3], near, cosine, float(near.min()), 1, lambda x: f"{x:.2f}")
    for axes in (image, mapped):
        _mark(axes, *view.patch)

    if view.difference is not None:
        for left, values in zip(sheet.lefts[4:], (view.difference.relative, view.difference.cosine)):
            scaled(left, values, heat, 0, float(values.max()), lambda x: f"{x:.1e}" if x else "0")


def _mark(axes: Any, row: int, column: int) -> None:
    """White in black: seen on any colour."""
    for width, colour in ((2.6, "black"), (1.3, "white")):
        xs, ys = (column, column + 1, column + 1, column, column), (row, row, row + 1, row + 1, row)
        axes.plot(xs, ys, color=colour, lw=width, solid_joinstyle="miter", clip_on=False)


def write_html(views: Sequence[View], path: Path, subtitle: str) -> None:
    """The same as a page: a click chooses the patch that cosines are shown to, heads can be looked at one by one."""
    found = {"heat": HEAT, "cosine": COSINE, "views": [_data(view) for view in views]}
    data = json.dumps(found, allow_nan=False).replace("<", "\\u003c")  # a name must not end the script
    fill = {"SUBTITLE": html.escape(f"{subtitle}; siglip2-packed {__version__}"), '"DATA"': data}
    page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    page = re.sub("|".join(fill), lambda word: fill[word[0]], page)  # at once: what is filled in may hold either word
    path.write_text(page, encoding="utf-8")


def _data(view: View) -> dict[str, Any]:
    h, w = view.grid
    jpeg = io.BytesIO()
    Image.fromarray(view.pixels).save(jpeg, "JPEG", quality=92, subsampling=0)
    cosine = view.cosines.numpy()[np.triu_indices(h * w)]
    low = float(cosine.min())
    levels = (cosine - low) / max(1 - low, 1e-6) * 255
    found: dict[str, Any] = {
        "name": view.name,
        "grid": [h, w],
        "chosen": view.patch[0] * w + view.patch[1],
        "image": f"data:image/jpeg;base64,{_base64(jpeg.getvalue())}",
        "colours": _base64((view.colours.numpy() * 255).round().astype(np.uint8)),
        "variance": view.variance,
        "low": low,
        "cosines": _base64(levels.round().clip(0, 255).astype(np.uint8)),
        "attention": None,
        "difference": None,
    }
    if view.attention is not None:
        heads = [view.attention.mean(dim=0), *view.attention]
        found["attention"] = [_base64(head.numpy().astype("<f4")) for head in heads]
    if view.difference is not None:
        found["difference"] = {
            "against": _short(view.difference.against),
            "relative": _base64(view.difference.relative.numpy().astype("<f4")),
            "cosine": _base64(view.difference.cosine.numpy().astype("<f4")),
        }
    return found


def _short(model: str) -> str:
    """A checkpoint's folder or name."""
    return Path(model).name or model


def _base64(values: Any) -> str:
    return base64.b64encode(values if isinstance(values, bytes) else values.tobytes()).decode()
