"""`siglip2-packed search`: the images of a collection that are nearest to words or to an image, by cosine.

    query [D]  ->  blocks of vectors, exactly, one after the other  ->  the best so far  ->  table, contact sheet

The query is made as the vectors were: the same weights, dtype and preprocessing. Memory is that of a block.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import Any

import PIL
import torch
from torch import Tensor

from siglip2_packed.collection.decode import cores
from siglip2_packed.collection.identity import tower, weights_digest
from siglip2_packed.collection.load import Features, load_features
from siglip2_packed.collection.sources import find_again
from siglip2_packed.flags import DTYPES, pick_device
from siglip2_packed.inspection.sheet import Picture, printable, thumbnail, write_sheet
from siglip2_packed.modeling import Siglip2PackedVisionModel
from siglip2_packed.preprocess import Siglip2PackedImageProcessor
from siglip2_packed.processor_files import SETTINGS
from siglip2_packed.show import output_path
from siglip2_packed.zero_shot import check_texts, cosines, load_text_tower

WIDEST = 80
"""Characters that are shown of a value beside a name."""


def run(args: argparse.Namespace) -> int:
    if args.top < 1:
        raise ValueError(f"--top must be at least 1, got {args.top}")
    html = args.html and output_path("--html", args.html, (".html", ".htm"))
    check_texts([args.text] if args.text else [])
    features = load_features(args.features)
    features.require("pooled")
    ckpt, device = args.ckpt or features.run["checkpoint"], pick_device(args.device)

    model = model_of(features, ckpt)
    query = of_image(features, model.to(device), args.image) if args.image else of_text(ckpt, args.text, device)
    found = nearest(features, query, args.top, device)

    kept = features.columns.take([image for _, image in found]).to_pylist() if features.run.get("keep") else []
    beside = [["" if value is None else shortened(str(value)) for value in row.values()] for row in kept] or [[]] * len(
        found
    )
    print("  ".join(["rank  cosine  input", *map(printable, kept[0] if kept else ())]))
    for rank, ((score, image), values) in enumerate(zip(found, beside), 1):
        print("  ".join([f"{rank:4d}  {score:6.3f}", *map(printable, [features.names[image], *values])]))
    if html:
        asked = f"like {args.image}" if args.image else f"“{args.text}”"
        about = f"{len(found)} of {len(features)} images of {args.features}, {ckpt}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of files that are read all the same
            pictures = [
                picture(features, *one)._replace(beside=" · ".join(values)) for one, values in zip(found, beside)
            ]
        write_sheet(html, asked, about, pictures)
        gone = sum(not shown.jpeg for shown in pictures)
        print(f"wrote {html}" + (f"; {gone} of {len(pictures)} images could not be shown" if gone else ""))
    return 0


def shortened(text: str) -> str:
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def model_of(features: Features, ckpt: str) -> Any:
    """The model that made the vectors. Raises ValueError if the checkpoint is another."""
    run = features.run
    model: Any = Siglip2PackedVisionModel.from_pretrained(ckpt, dtype=DTYPES[run["dtype"]])
    if tower(model.config) != run["tower"] or weights_digest(model.state_dict(), cores()) != run["weights"]:
        raise ValueError(
            f"the features are of {run['checkpoint']!r}, whose configuration or weights are not those of {ckpt!r}: a "
            "cosine between the two would mean nothing. Give the checkpoint that encode was given"
        )
    return model.eval()


@torch.inference_mode()
def of_image(features: Features, model: Any, image: str) -> Tensor:
    """An image -> `[1, D]`, preprocessed as those of the run were."""
    run = features.run
    if run["versions"]["pillow"] != PIL.__version__:
        print(
            f"the collection's pixels are those of Pillow {run['versions']['pillow']}, the query's of "
            f"{PIL.__version__}: of JPEG files and tall images they may differ",
            file=sys.stderr,
        )
    decode = "exact" if run["decode"] == "gpu" else run["decode"]
    processor = Siglip2PackedImageProcessor.from_dict({name: run[name] for name in SETTINGS}, decode=decode)
    return model(**processor(image).to(model.device)).pooler_output


def of_text(ckpt: str, text: str, device: torch.device) -> Tensor:
    """Words -> `[1, D]`."""
    return load_text_tower(ckpt, device).embed([text])


def nearest(features: Features, query: Tensor, top: int, device: torch.device) -> list[tuple[float, int]]:
    """(cosine, which image) of the best, the best first, those alike in their order.

    Args:
        query: `[1, D]`
        top: how many, or all there are.

    Raises:
        ValueError: no pooled vectors, or of another width.
    """
    best, places = torch.empty(0, device=device), torch.empty(0, dtype=torch.int64, device=device)
    for images, vectors in features.blocks():
        if vectors.shape[1] != query.shape[1]:
            raise ValueError(f"the collection's vectors have {vectors.shape[1]} numbers, the query {query.shape[1]}")
        scores = cosines(vectors.to(device), query.to(device))[:, 0]
        best, places = torch.cat([best, scores]), torch.cat([places, images.to(device)])
        best, chosen = best.topk(min(top, len(best)))
        places = places[chosen]
    return sorted(zip(best.tolist(), places.tolist()), key=lambda one: (-one[0], one[1]))


def picture(features: Features, score: float, image: int) -> Picture:
    """An image as the sheet shows it, if it is still the one that was encoded."""
    name = features.names[image]
    try:
        entry = find_again(name, features.stamp(image), features.run["column"])
        return Picture(name, score, thumbnail(entry), "")
    except (ValueError, OSError, ImportError) as error:
        return Picture(name, score, b"", str(error))
