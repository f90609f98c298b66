"""`siglip2-packed encode-text`: what the text tower says of texts, to be compared with the pooled vectors of images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from siglip2_packed.collection.shards import check_replaced, replacing
from siglip2_packed.flags import pick_device
from siglip2_packed.zero_shot import check_texts, load_text_tower

BATCH = 64
"""Texts that are encoded at a time."""


def run(args: argparse.Namespace) -> int:
    """Writes `pooled [M, D]` float32, a row a text, and the texts as JSON in the metadata."""
    out, texts = Path(args.out), args.texts
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {args.out!r} must end in .safetensors")
    check_replaced(out, "texts")
    check_texts(texts)
    tower = load_text_tower(args.ckpt, pick_device(args.device))
    batches = [texts[begin : begin + BATCH] for begin in range(0, len(texts), BATCH)]
    vectors = torch.cat([tower.embed(batch).cpu() for batch in batches])
    if args.normalize:
        vectors = F.normalize(vectors, dim=1)
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {"texts": texts, "ckpt": args.ckpt, "normalize": args.normalize}
    with replacing(out) as path:
        save_file({"pooled": vectors}, path, {name: json.dumps(value) for name, value in about.items()})
    print(f"wrote {out}: {len(texts)} texts, {vectors.shape[1]} numbers each")
    return 0
