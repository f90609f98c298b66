"""`siglip2-packed zero-shot`: how well each label describes an image, by the checkpoint's own text tower.

Images go through the packed model, texts through transformers' `Siglip2TextModel` and the checkpoint's tokenizer. A
label's score is `sigmoid(exp(logit_scale) * cosine + logit_bias)`, each on its own: they do not sum to one.

Shapes: N images, M texts, D hidden size of the vision tower (and projection size of the text tower).
"""

from __future__ import annotations

import argparse
import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.utils import logging

from siglip2_packed.collection.sources import image_files
from siglip2_packed.files import find_file
from siglip2_packed.flags import DTYPES, pick_device, write_json
from siglip2_packed.modeling import Siglip2PackedVisionModel
from siglip2_packed.preprocess import Siglip2PackedImageProcessor
from siglip2_packed.weights import read_tensors

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model")


@dataclass(frozen=True)
class TextTower:
    model: Any
    """`transformers.Siglip2TextModel`"""
    tokenizer: Any
    logit_scale: float
    logit_bias: float

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """M texts -> `[M, D]`.

        As the checkpoints were trained: in lower case (transformers' tokenizer does it in 5.x only), and always as long
        as the position table, because what is pooled is the last position, padding or not. Warns of texts that are
        longer, of which only the beginning counts.
        """
        lower, most = [text.lower() for text in texts], self.model.config.max_position_embeddings
        tokens = self.tokenizer(lower, padding="max_length", max_length=most, truncation=True, return_tensors="pt")
        whole = self.tokenizer(lower, verbose=False)["input_ids"]
        longer = [text for text, ids in zip(texts, whole) if len(ids) > most]
        if longer:
            begins = f"{longer[0][:40]!r} ..."
            warnings.warn(f"longer than the {most} tokens of the text tower, cut off there: {begins}", stacklevel=3)
        return self.model(**tokens.to(self.model.device)).pooler_output


def load_text_tower(ckpt: str, device: torch.device, dtype: torch.dtype = torch.float32) -> TextTower:
    """The text side of a full SigLIP2 checkpoint.

    Raises:
        ValueError: no text tower, or an incomplete one; names what is missing.
        FileNotFoundError: no tokenizer.
    """
    logits = read_tensors(ckpt, ("logit_scale", "logit_bias"))
    heads = read_tensors(ckpt, ("text_model.head.weight",))
    missing = ["text_model.*"] * (not heads) + [name for name in ("logit_scale", "logit_bias") if name not in logits]
    if missing:
        raise ValueError(f"{ckpt!r} cannot score text: {', '.join(missing)} missing; a full checkpoint is needed")
    if not any(find_file(ckpt, name) for name in TOKENIZER_FILES):
        raise FileNotFoundError(f"{ckpt!r} has a text tower but no tokenizer (no {' or '.join(TOKENIZER_FILES)})")
    with _without_load_report():
        config: Any = transformers.Siglip2Config.from_pretrained(ckpt).text_config
        loaded: Any = transformers.Siglip2TextModel.from_pretrained(
            ckpt, config=config, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
    model, info = loaded
    absent = sorted(str(key) for key in {*info["missing_keys"], *info["mismatched_keys"]})
    if absent:
        raise ValueError(f"{ckpt!r}: {len(absent)} tensors of the text tower are missing: {', '.join(absent[:4])}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ckpt)
    scale, bias = (float(logits[name].float().squeeze()) for name in ("logit_scale", "logit_bias"))
    return TextTower(model.to(device).eval(), tokenizer, scale, bias)


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """`[N, D]` and `[M, D]` -> `[N, M]`, in float32."""
    return F.normalize(images.float(), dim=1) @ F.normalize(texts.float(), dim=1).T


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """transformers would list every tensor of the vision tower as unexpected; what is missing is looked at here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def check_texts(texts: Sequence[str]) -> None:
    """Raises ValueError for what no tokenizer reads."""
    for text in texts:
        if text != text.encode("utf-8", "replace").decode():
            raise ValueError(f"{text!r} is not UTF-8, which the tokenizer reads")


def run(args: argparse.Namespace) -> int:
    if "{}" not in args.template:
        raise ValueError(f"--template {args.template!r} has no {{}} for the label to go")
    texts = [args.template.replace("{}", label) for label in args.labels]
    check_texts(texts)
    files = image_files(args.images)
    device, dtype = pick_device(args.device), DTYPES[args.dtype]

    tower = load_text_tower(args.ckpt, device, dtype)
    limit = {} if args.max_num_patches is None else {"max_num_patches": args.max_num_patches}
    processor = Siglip2PackedImageProcessor.from_pretrained(args.ckpt, **limit)
    model: Any = Siglip2PackedVisionModel.from_pretrained(
        args.ckpt, dtype=dtype, attn_implementation=args.attn_implementation
    )
    model.to(device).eval()
    text_embeds, images = tower.embed(texts), []
    for file in files:
        packed = processor(str(file))
        with torch.inference_mode():
            cosine = cosines(model(**packed.to(device)).pooler_output, text_embeds)[0]
        logit = cosine * math.exp(tower.logit_scale) + tower.logit_bias
        numbers = zip(args.labels, texts, logit.sigmoid().tolist(), logit.tolist(), cosine.tolist())
        image = {"file": str(file).encode("utf-8", "replace").decode(), "grid": packed["grid_thw"][0, 1:].tolist()}
        image["scores"] = [dict(zip(("label", "text", "score", "logit", "cosine"), row)) for row in numbers]
        print_scores(image)
        images.append(image)
    if args.json:
        write_json(args.json, {"ckpt": args.ckpt, "template": args.template, "dtype": args.dtype, "images": images})
    return 0


def print_scores(image: dict[str, Any]) -> None:
    """A table, the best label first."""
    h, w = image["grid"]
    width = max(len("label"), *(len(row["label"]) for row in image["scores"]))
    print(f"\n{image['file']}, {h}x{w} patches\n  {'label':<{width}} {'score':>8} {'cosine':>8}")
    for row in sorted(image["scores"], key=lambda row: -row["score"]):
        print(f"  {row['label']:<{width}} {row['score']:8.4f} {row['cosine']:8.4f}")
