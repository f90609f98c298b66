"""Put the packed tower into a model you did not write, and see that it says the same.

    python examples/swap_tower.py cat.jpg receipt.png --ckpt CKPT

Here it is transformers' `Siglip2Model`. The line is the same in LFM2-VL, PaliGemma, Gemma 3, LLaVA-OneVision, Idefics
and SmolVLM: `replace_vision_tower(model)`, before you shard or compile.
"""

import argparse
import time

import torch
from PIL import Image
from transformers import AutoModel, Siglip2ImageProcessor

from siglip2_packed import replace_vision_tower, restore_vision_tower


@torch.inference_mode()
def pooled(model, batch):
    """`[N, D]`, whatever the version of transformers calls it."""
    out = model.get_image_features(**batch)
    return getattr(out, "pooler_output", out)


def seconds(function, *args):
    function(*args)
    begin = time.perf_counter()
    result = function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", help="photographs, better of different shapes")
    parser.add_argument("--ckpt", default="google/siglip2-so400m-patch16-naflex", help="folder or hub id")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float32
    model = AutoModel.from_pretrained(args.ckpt, dtype=dtype).to(device).eval()
    images = [Image.open(file).convert("RGB") for file in args.images]
    batch = Siglip2ImageProcessor.from_pretrained(args.ckpt)(images, return_tensors="pt").to(device)

    before, theirs = seconds(pooled, model, batch)
    for name, tower in replace_vision_tower(model).items():
        print(f"{name} is a {type(tower).__name__} now")
    after, ours = seconds(pooled, model, batch)
    print(f"one call: {before * 1e3:.1f} ms before, {after * 1e3:.1f} ms after")
    print(f"largest difference: {(ours - theirs).abs().max().item():.1e}")

    restore_vision_tower(model)  # the original modules, with the weights of now
    print(f"put back: {torch.equal(pooled(model, batch), theirs)}")


if __name__ == "__main__":
    main()
