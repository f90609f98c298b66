"""Patch features as a picture: the first three principal components as red, green and blue.

    python examples/patch_colours.py cat.jpg receipt.png --ckpt CKPT

Components are of all images together: a colour means the same in each. `siglip2-packed show` does more.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from siglip2_packed import Siglip2PackedImageProcessor, Siglip2PackedVisionModel, unpack


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, help="photographs")
    parser.add_argument("--ckpt", default="google/siglip2-so400m-patch16-naflex", help="folder or hub id")
    parser.add_argument("--max-num-patches", type=int, default=1024, help="patches an image (1024)")
    parser.add_argument("--out", type=Path, default=Path("colours"), help="folder for the pictures")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float32
    processor = Siglip2PackedImageProcessor.from_pretrained(args.ckpt, max_num_patches=args.max_num_patches)
    model = Siglip2PackedVisionModel.from_pretrained(args.ckpt, vision_use_head=False, dtype=dtype).to(device).eval()
    packed = processor(args.images)
    with torch.inference_mode():
        features = model(**packed.to(device)).last_hidden_state.float().cpu()  # [T, D]

    centred = features - features.mean(dim=0)
    _, _, directions = torch.pca_lowrank(centred, q=3, center=False)
    components = centred @ directions  # [T, 3]
    low, high = components.quantile(0.02, dim=0), components.quantile(0.98, dim=0)
    colours = ((components - low) / (high - low)).clamp(0, 1).mul(255).byte()

    args.out.mkdir(exist_ok=True)
    grids = packed["grid_thw"].tolist()
    for file, (_, h, w), rows in zip(args.images, grids, unpack(colours, grids)):
        picture = Image.fromarray(np.asarray(rows.view(h, w, 3)))
        picture.resize((w * 16, h * 16), Image.Resampling.NEAREST).save(args.out / f"{file.stem}.png")
        print(f"wrote {args.out / f'{file.stem}.png'}: {h}x{w} patches")


if __name__ == "__main__":
    main()
