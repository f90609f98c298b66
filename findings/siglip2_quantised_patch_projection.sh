#!/usr/bin/env bash
# transformers 5.24.0 with bitsandbytes 0.50.2, 4 bit: Siglip2VisionModel quantised with its patch projection included (no
# module skipped) computes other features, without a word: the embeddings cast pixels to the dtype of the projection's
# weight, which is uint8 by then, so that hardly anything is left of normalised pixels, which lie between -1 and 1. With
# patch_embedding among llm_int8_skip_modules the features are right to 4 bits.
#
# Exit code: 0 as described, 1 otherwise. Installs what is of another version in a folder that is removed at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if ! python3 -c 'import transformers as t, bitsandbytes as b, torch, accelerate; assert (t.__version__, b.__version__) == ("5.24.0", "0.50.2")' 2>/dev/null; then
    python3 -m pip install --quiet --target "$folder" transformers==5.24.0 bitsandbytes==0.50.2 torch==2.13.0 accelerate
    export PYTHONPATH="$folder"
fi
cd "$folder"
python3 - "$folder" <<'PYTHON' 2>/dev/null
import sys

import bitsandbytes
import torch
import transformers
from transformers import BitsAndBytesConfig, Siglip2VisionConfig, Siglip2VisionModel

folder = sys.argv[1] + "/checkpoint"
torch.manual_seed(0)
shape = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2)
model = Siglip2VisionModel(Siglip2VisionConfig(**shape, patch_size=16, num_patches=256)).eval()
model.save_pretrained(folder)
pixels = dict(
    pixel_values=torch.rand(1, 12, 768) * 2 - 1,
    pixel_attention_mask=torch.ones(1, 12, dtype=torch.int32),
    spatial_shapes=torch.tensor([[3, 4]]),
)


def error(skipped):
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=skipped)
    quantised = Siglip2VisionModel.from_pretrained(folder, quantization_config=how, dtype=torch.float32, device_map="cpu")
    with torch.no_grad():
        expected = model(**pixels).last_hidden_state
        found = quantised(**pixels).last_hidden_state.float()
    return ((found - expected).norm() / expected.norm()).item()


all_of_it, but_for_patches = error(["none"]), error(["patch_embedding"])
versions = f"transformers {transformers.__version__}, bitsandbytes {bitsandbytes.__version__}"
print(f"{versions}: relative error {all_of_it:.2f}, with patch_embedding skipped {but_for_patches:.3f}")
sys.exit(not (all_of_it > 0.8 > 0.3 > but_for_patches))
PYTHON
