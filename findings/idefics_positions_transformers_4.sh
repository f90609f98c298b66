#!/usr/bin/env bash
# transformers 4.57.6: in float32, the vision towers of Idefics2, Idefics3 and SmolVLM give every row and column of patches
# but the first the position before its own, in images of the position table's size: a patch's fraction of the image is
# multiplied by 1 - 1e-6 before it is put into a bucket, and so falls below each bound that it meets. The last row and the
# last column of the table are never read. In bfloat16 that factor is 1, and the positions are right: features of the same
# weights in both differ by more than half of their norm, where images that meet no bound differ by rounding.
# Prints the positions of a column of patches and both differences. transformers 5 is right at this size, in every dtype.
#
# Exit code: 0 as described, 1 otherwise. Installs transformers 4.57.6 and torch 2.13.0, if they are others, in a folder that
# is removed at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if ! python3 -c 'import transformers, torch; assert transformers.__version__ == "4.57.6"' 2>/dev/null; then
    python3 -m pip install --quiet --target "$folder" transformers==4.57.6 torch==2.13.0
    export PYTHONPATH="$folder"
fi
cd "$folder"
python3 - <<'PYTHON' 2>/dev/null
import copy
import sys

import torch
import transformers
from transformers import Idefics2Config, Idefics3Config, SmolVLMConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

SIDE = 32  # patches, as in SmolVLM's 512 pixels
TOWERS = {
    Idefics2VisionTransformer: Idefics2Config,
    Idefics3VisionTransformer: Idefics3Config,
    SmolVLMVisionTransformer: SmolVLMConfig,
}


def positions(model, dtype):
    """Rows of the table that the image's rows of patches read."""
    embeddings, read = copy.deepcopy(model).to(dtype).embeddings, []
    embeddings.position_embedding.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    embeddings(torch.zeros(1, 3, 16 * SIDE, 16 * SIDE, dtype=dtype), torch.ones(1, SIDE, SIDE, dtype=torch.bool))
    return read[0].view(SIDE, SIDE)[:, 0].div(SIDE, rounding_mode="floor").tolist()


def difference(model, h, w):
    """Of features in bfloat16 from those in float32, relative."""
    image = torch.randn(1, 3, 16 * h, 16 * w)
    found = [copy.deepcopy(model).to(d)(image.to(d)).last_hidden_state.float() for d in (torch.float32, torch.bfloat16)]
    return ((found[1] - found[0]).norm() / found[0].norm()).item()


right = list(range(SIDE))
described = True
print("transformers", transformers.__version__, "torch", torch.__version__)
with torch.no_grad():
    for tower, config in TOWERS.items():
        torch.manual_seed(0)
        shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
        vision = config(vision_config=dict(**shape, image_size=16 * SIDE, patch_size=16)).vision_config
        model = tower(vision).eval()
        torch.nn.init.normal_(model.embeddings.position_embedding.weight)
        single, half = positions(model, torch.float32), positions(model, torch.bfloat16)
        own, other = difference(model, SIDE, SIDE), difference(model, 5, 3)
        print(f"{tower.__name__}: float32 {single[:4]}..{single[-1]}, bfloat16 {half[:4]}..{half[-1]};", end=" ")
        print(f"features differ by {own:.2f} at {SIDE}x{SIDE} patches, by {other:.3f} at 5x3")
        described &= single == [0, *right[:-1]] and half == right and own > 0.5 and other < 0.02
sys.exit(not described)
PYTHON
