#!/usr/bin/env bash
# transformers 5.24.0: the vision towers of Idefics2, Idefics3 and SmolVLM put a patch's fraction of the image, i * (1 / h) in
# float32, into a bucket of the position table of G rows, whose bounds are multiples of 1 / G in float32. Row i belongs to
# entry floor(i * G / h); where its fraction is a bound, it may get the entry before that one: in 673 of the pairs of h and G
# up to 128, at 121 sides G, at 53 of them in images of the table's own size (h = G = 25: 10 rows of 25). Idefics2's own table
# (G = 70) has such rows at h = 25, 49, 50 and 55. Prints at which sizes of some tables.
#
# Exit code: 0 as described, 1 otherwise. Installs transformers 5.24.0 and torch 2.13.0, if transformers is another, in a
# folder that is removed at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if ! python3 -c 'import transformers, torch; assert transformers.__version__ == "5.24.0"' 2>/dev/null; then
    python3 -m pip install --quiet --target "$folder" transformers==5.24.0 torch==2.13.0
    export PYTHONPATH="$folder"
fi
cd "$folder"
python3 - <<'PYTHON' 2>/dev/null
import sys

import torch
import transformers
from transformers import Idefics2Config, Idefics3Config, SmolVLMConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

MOST = 128
EMBEDDINGS = {
    Idefics2VisionEmbeddings: Idefics2Config,
    Idefics3VisionEmbeddings: Idefics3Config,
    SmolVLMVisionEmbeddings: SmolVLMConfig,
}


def made(embeddings, side):
    """With a table of side x side, and patches of one pixel."""
    shape = dict(hidden_size=2, num_attention_heads=1, num_channels=1, image_size=side, patch_size=1)
    return embeddings(EMBEDDINGS[embeddings](vision_config=shape).vision_config)


def too_low(embeddings, h):
    """By how many entries, for each row of an image of h rows."""
    read, side = [], embeddings.num_patches_per_side
    handle = embeddings.position_embedding.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    embeddings(torch.zeros(1, 1, h, 1), torch.ones(1, h, 1, dtype=torch.bool))
    handle.remove()
    return [i * side // h - entry for i, entry in enumerate((read[0].flatten() // side).tolist())]


torch.set_num_threads(1)
print("transformers", transformers.__version__, "torch", torch.__version__)
with torch.no_grad():
    alike = [sum(too_low(made(embeddings, 25), 25)) for embeddings in EMBEDDINGS]
    print("rows of 25 too low in a table of 25:", *alike)
    pairs, sides = {}, range(1, MOST + 1)
    for side in sides:
        embeddings = made(Idefics3VisionEmbeddings, side)
        pairs |= {(side, h): rows for h in range(1, MOST + 1) if any(rows := too_low(embeddings, h))}
heights = {side: [h for other, h in pairs if other == side] for side in sides}
own = [side for side in sides if side in heights[side]]
print(f"{len(pairs)} pairs, {sum(map(bool, heights.values()))} of {MOST} tables, {len(own)} at their own size")
for side in (25, 26, 27, 32, 70):
    print(f"a table of {side} rows: images of {heights[side]} rows")
described = (
    alike == [10, 10, 10]
    and len(pairs) == 673
    and sum(map(bool, heights.values())) == 121
    and heights[70][:4] == [25, 49, 50, 55]
    and {x for rows in pairs.values() for x in rows} == {0, 1}
)
sys.exit(not described)
PYTHON
