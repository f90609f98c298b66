"""Search your photographs by an example or by words.

    python examples/search_photos.py photos/ --ckpt CKPT --like cat.jpg
    python examples/search_photos.py photos/ --ckpt CKPT --text "a cat on a sofa"

For more than a few thousand use `siglip2-packed encode`, which goes on where it was stopped.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from siglip2_packed import Siglip2PackedImageProcessor, Siglip2PackedVisionModel
from siglip2_packed.zero_shot import load_text_tower

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


@torch.inference_mode()
def embed(files, processor, model, on_error="raise", batch=32):
    """N files -> `[N, D]` unit vectors, and the files that could be read."""
    vectors, read = [], []
    for start in range(0, len(files), batch):
        some = files[start : start + batch]
        packed = processor(some, on_error=on_error)
        read += [some[i] for i in packed.kept]
        vectors.append(model(**packed.to(model.device)).pooler_output.float())
    return F.normalize(torch.cat(vectors), dim=1), read


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="photographs, searched with all folders inside")
    parser.add_argument("--ckpt", default="google/siglip2-so400m-patch16-naflex", help="folder or hub id")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--like", type=Path, help="a photograph")
    wanted.add_argument("--text", help="words")
    parser.add_argument("--top", type=int, default=5, help="how many to show (5)")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    processor = Siglip2PackedImageProcessor.from_pretrained(args.ckpt)
    model = Siglip2PackedVisionModel.from_pretrained(args.ckpt, dtype=dtype).to(device).eval()

    files = sorted(file for file in args.folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise SystemExit(f"no photographs in {args.folder}")
    vectors, files = embed(files, processor, model, on_error="skip")
    if args.like:
        query, _ = embed([args.like], processor, model)
    else:
        query = F.normalize(load_text_tower(args.ckpt, device, dtype).embed([args.text]).float(), dim=1)
    scores = (vectors @ query.T)[:, 0]
    for i in scores.argsort(descending=True)[: args.top].tolist():
        print(f"{scores[i]:.3f}  {files[i]}")


if __name__ == "__main__":
    main()
