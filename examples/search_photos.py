"""Search your photographs by one of them or by words, once they are encoded:

    siglip2-packed encode photos/ --ckpt CKPT --out features/ --pooled --no-patches
    python examples/search_photos.py features/ --ckpt CKPT --like photos/cat.jpg
    python examples/search_photos.py features/ --ckpt CKPT --text "a cat on a sofa"

`siglip2-packed search` does the same for collections larger than memory, and makes sure that the checkpoint is theirs.
"""

import argparse

import torch
import torch.nn.functional as F

from siglip2_packed import load_features
from siglip2_packed.zero_shot import load_text_tower


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", help="the folder that encode wrote")
    parser.add_argument("--ckpt", default="google/siglip2-so400m-patch16-naflex", help="folder or hub id")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--like", help="one of the photographs")
    wanted.add_argument("--text", help="words")
    parser.add_argument("--top", type=int, default=5, help="how many to show (5)")
    args = parser.parse_args()

    features = load_features(args.features)
    vectors = F.normalize(features.pooled.float(), dim=1)
    if args.like:
        query = vectors[features.index(args.like)]
    else:
        query = F.normalize(load_text_tower(args.ckpt, torch.device("cpu")).embed([args.text])[0], dim=0)
    scores = vectors @ query
    for i in scores.argsort(descending=True)[: args.top].tolist():
        print(f"{scores[i]:.3f}  {features.names[i]}")


if __name__ == "__main__":
    main()
