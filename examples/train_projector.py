"""Train a small projector on frozen features: photographs in folders, a folder a class.

    python examples/train_projector.py photos/ --ckpt CKPT --out projector.pt

The tower runs once. Its token features stay packed `[T, D]` in memory, and only the projector learns.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from siglip2_packed import Siglip2PackedImageProcessor, Siglip2PackedVisionModel, unpack

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folders of photographs")
    parser.add_argument("--ckpt", default="google/siglip2-so400m-patch16-naflex", help="folder or hub id")
    parser.add_argument("--out", type=Path, default=Path("projector.pt"), help="where the weights go")
    parser.add_argument("--width", type=int, default=256, help="of the projector (256)")
    parser.add_argument("--steps", type=int, default=100, help="steps over all photographs (100)")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float32
    processor = Siglip2PackedImageProcessor.from_pretrained(args.ckpt)
    tower = Siglip2PackedVisionModel.from_pretrained(args.ckpt, select_layer=-2, dtype=dtype).to(device).eval()

    files = sorted(file for file in args.folder.glob("*/*") if file.suffix.lower() in SUFFIXES)
    classes = sorted({file.parent.name for file in files})
    if len(classes) < 2:
        raise SystemExit(f"{args.folder} holds {len(classes)} folders of photographs: two or more are needed")
    labels = torch.tensor([classes.index(file.parent.name) for file in files], device=device)

    packed = processor(files)
    with torch.inference_mode():
        frozen = tower(**packed.to(device)).last_hidden_state.float()  # [T, D]
    frozen = frozen.clone()  # of a tensor that autograd may keep

    torch.manual_seed(0)
    projector = nn.Sequential(nn.Linear(frozen.shape[1], args.width), nn.GELU(), nn.Linear(args.width, len(classes)))
    projector.to(device)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3)
    for step in range(1, args.steps + 1):
        rows = projector(frozen)  # every patch for itself
        logits = torch.stack([image.mean(dim=0) for image in unpack(rows, packed["grid_thw"])])
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step == args.steps:
            right = int((logits.argmax(dim=1) == labels).sum())
            print(f"step {step}: loss {loss.item():.3f}, {right} of {len(files)} training photographs right")
    torch.save({"classes": classes, "state": projector.state_dict()}, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
