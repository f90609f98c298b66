"""Draws what `show.py` computes: panels with matplotlib, and a page in which patches can be clicked.

The page is one file: images and numbers inside, a little JavaScript, nothing fetched.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from siglip2_packed.version import __version__

if TYPE_CHECKING:
    from siglip2_packed.show import View

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

    panel(sheet.lefts[1], view.colours.numpy(), f"{view.explained:.0%} of the variance")

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
    fill = {"SUBTITLE": html.escape(f"{subtitle}; siglip2-packed {__version__}"), "DATA": data}
    page = re.sub("|".join(fill), lambda word: fill[word[0]], PAGE)  # at once: what is filled in may hold either word
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
        "explained": view.explained,
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


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>SigLIP2 features</title>
<style>
body { font: 14px/1.4 system-ui, sans-serif; color: #222; margin: 2em auto; padding: 0 1.5em; max-width: 1500px; }
h1 { font-size: 1.3em; margin: 0; }
h2 { font-size: 1em; margin: 2.2em 0 .6em; }
p { margin: .3em 0; color: #666; }
section { outline: none; }
.row { display: grid; gap: 10px 18px; grid-template-columns: repeat(var(--panels), minmax(0, var(--column))); }
@media (max-width: 1000px) { .row { grid-template-columns: repeat(2, minmax(0, var(--column))); } }
figure { margin: 0; font-size: 13px; }
figcaption { display: flex; justify-content: space-between; height: 2.2em; align-items: center; white-space: nowrap; }
.title { overflow: hidden; text-overflow: ellipsis; }
.frame { position: relative; max-width: var(--width); aspect-ratio: var(--w) / var(--h); }
.frame { background: #f2f2f2; cursor: crosshair; }
.frame > * { position: absolute; left: 0; top: 0; width: 100%; height: 100%; box-sizing: border-box; }
canvas { image-rendering: pixelated; }
.map { opacity: var(--opacity, 1); }
.lines { background-image: linear-gradient(to right, #fff4 1px, transparent 1px),
  linear-gradient(#fff4 1px, transparent 1px); background-size: calc(100% / var(--w)) calc(100% / var(--h)); }
.frame > .mark, .frame > .hover { width: calc(100% / var(--w)); height: calc(100% / var(--h)); z-index: 1;
  pointer-events: none; }
.mark { border: 2px solid white; outline: 1px solid black; }
.hover { border: 1px solid white; outline: 1px solid #0008; visibility: hidden; }
.scale { display: flex; align-items: center; gap: 8px; height: 2em; color: #777; white-space: nowrap; font-size: 12px; }
.bar { flex: 1; height: 7px; }
.value { margin-left: auto; color: #222; font-weight: 600; font-variant-numeric: tabular-nums; }
input { vertical-align: middle; }
</style>
</head>
<body>
<h1>SigLIP2 features, patch by patch</h1>
<p>SUBTITLE</p>
<p>Click a patch, or move with the arrow keys: cosines are to the marked one.
<label>Maps over the image <input type="range" min="0" max="1" step="0.05" value="1" id="opacity"></label></p>
<script type="application/json" id="data">DATA</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const floats = text => new Float32Array(bytes(text).buffer);
const rgb = stops => stops.map(s => [1, 3, 5].map(k => parseInt(s.slice(k, k + 2), 16)));
const heat = rgb(data.heat), viridis = rgb(data.cosine);

function colour(stops, x) {
  const at = Math.min(Math.max(x, 0), 1) * (stops.length - 1), k = Math.min(Math.floor(at), stops.length - 2);
  return stops[k].map((c, i) => c + (at - k) * (stops[k + 1][i] - c));
}

function element(parent, tag, name, text) {
  const made = parent.appendChild(document.createElement(tag));
  if (name) made.className = name;
  if (text) made.textContent = text;
  return made;
}

function show(view) {
  const [h, w] = view.grid, T = h * w, shown = [];
  const section = element(document.body, "section");
  section.tabIndex = 0;
  element(section, "h2", "", `${view.name}, ${h}×${w} patches`);
  const row = element(section, "div", "row");
  row.style.setProperty("--w", w);
  row.style.setProperty("--h", h);
  row.style.setProperty("--panels", view.difference ? 6 : 4);
  const width = Math.min(270, 450 * w / h);
  row.style.setProperty("--width", `${width}px`);
  row.style.setProperty("--column", `${Math.max(width, 200)}px`);

  // A panel: title, a frame over the image, and below it a scale and the value under the pointer
  function panel(title) {
    const figure = element(row, "figure"), caption = element(figure, "figcaption");
    element(caption, "span", "title", title).title = title;
    const frame = element(figure, "div", "frame"), image = element(frame, "img");
    image.src = view.image;
    image.alt = view.name;
    const made = { caption, frame, scale: element(figure, "div", "scale"), read: () => "" };
    shown.push(made);
    return made;
  }

  function canvas(frame, pixel) {
    const made = frame.querySelector("canvas") || element(frame, "canvas", "map");
    made.width = w;
    made.height = h;
    const pixels = new ImageData(w, h);
    for (let i = 0; i < T; i++) pixels.data.set([...pixel(i), 255], 4 * i);
    made.getContext("2d").putImageData(pixels, 0, 0);
  }

  function map(made, values, stops, low, high, label) {
    canvas(made.frame, i => colour(stops, (values[i] - low) / (high - low || 1)));
    made.scale.textContent = "";  // the head or the patch has changed
    element(made.scale, "span", "", label(low));
    const ramp = stops.map(s => `rgb(${s})`).join();
    element(made.scale, "span", "bar").style.background = `linear-gradient(to right, ${ramp})`;
    element(made.scale, "span", "", label(high));
    made.read = i => label(values[i]);
  }

  const image = panel("image and patches");
  element(image.frame, "div", "lines");
  image.read = i => `row ${Math.floor(i / w)}, column ${i % w}`;

  const painted = bytes(view.colours), components = panel("principal components");
  canvas(components.frame, i => painted.subarray(3 * i, 3 * i + 3));
  components.scale.textContent = `${Math.round(100 * view.explained)}% of the variance`;

  const attention = panel("pooling attention");
  if (view.attention) {
    const choice = element(attention.caption, "select");
    view.attention.forEach((_, k) => element(choice, "option", "", k ? `head ${k - 1}` : "mean"));
    choice.onchange = () => {
      const values = floats(view.attention[choice.selectedIndex]);
      map(attention, values, heat, Math.min(...values), Math.max(...values), x => `${(100 * x).toPrecision(2)}%`);
      mark();
    };
    choice.onchange();
  } else {
    attention.frame.textContent = "";
    attention.scale.textContent = "no pooling head";
  }

  // The upper triangle of [T, T], row after row, from its least value to 1 in 256 levels
  const levels = bytes(view.cosines), cosine = panel("cosine to the marked patch");
  const between = (i, j) => {
    const [a, b] = i < j ? [i, j] : [j, i];
    return view.low + (1 - view.low) * levels[a * T - a * (a - 1) / 2 + b - a] / 255;
  };

  for (const [key, title] of [["relative", "relative error to"], ["cosine", "1 − cosine to"]]) {
    if (!view.difference) break;
    const values = floats(view.difference[key]);
    const label = x => x ? x.toExponential(1) : "0";
    map(panel(`${title} ${view.difference.against}`), values, heat, 0, Math.max(...values), label);
  }

  for (const made of shown) {
    made.hover = element(made.frame, "div", "hover");
    made.mark = element(made.frame, "div", "mark");
  }
  let chosen = view.chosen;
  const place = (box, i) => {
    box.style.left = `${100 * (i % w) / w}%`;
    box.style.top = `${100 * Math.floor(i / w) / h}%`;
  };

  function choose(i) {
    chosen = i;
    const values = Float32Array.from({ length: T }, (_, j) => between(i, j));
    map(cosine, values, viridis, Math.min(...values), 1, x => x.toFixed(2));
    mark();
  }

  // Boxes and values: of the patch under the pointer, or else of the marked one
  function mark(under) {
    for (const made of shown) {
      if (!made.mark) return;
      place(made.mark, chosen);
      place(made.hover, under ?? chosen);
      made.hover.style.visibility = under === undefined ? "hidden" : "visible";
      const value = made.scale.querySelector(".value") || element(made.scale, "span", "value");
      value.textContent = made.read(under ?? chosen);
    }
  }

  for (const { frame } of shown) {
    const patch = event => {
      const box = frame.getBoundingClientRect();
      const column = Math.floor((event.clientX - box.left) / box.width * w);
      const line = Math.floor((event.clientY - box.top) / box.height * h);
      return Math.min(Math.max(line, 0), h - 1) * w + Math.min(Math.max(column, 0), w - 1);
    };
    frame.onpointermove = event => mark(patch(event));
    frame.onpointerleave = () => mark();
    frame.onclick = event => choose(patch(event));
  }
  section.onkeydown = event => {
    const row = Math.floor(chosen / w), column = chosen % w;
    const moves = { ArrowUp: row > 0 && -w, ArrowDown: row < h - 1 && w,
                    ArrowLeft: column > 0 && -1, ArrowRight: column < w - 1 && 1 };
    if (event.target.tagName === "SELECT" || !(event.key in moves)) return;
    event.preventDefault();
    choose(chosen + Number(moves[event.key]));
  };
  choose(chosen);
}

data.views.forEach(show);
const opacity = document.getElementById("opacity");
opacity.oninput = () => document.body.style.setProperty("--opacity", opacity.value);
</script>
</body>
</html>
"""
