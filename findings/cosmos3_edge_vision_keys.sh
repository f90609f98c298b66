#!/usr/bin/env bash
# transformers 5.24.0: save_pretrained of a Cosmos3 Edge model renames keys of its vision tower, too. The renaming of
# conversion_mapping.py is meant for the text model's layers, and its comment says that "visual/projector tensors already
# use their native module names"; but its patterns (.self_attn.to_q. for .self_attn.q_proj., .mlp.up_proj. for .mlp.fc1.)
# are not bound to those. In the file, q_proj, k_proj, v_proj, fc1 and fc2 of model.visual are to_q, to_k, to_v, up_proj and
# down_proj, out_proj stays out_proj. The model's own from_pretrained turns them back. Who reads the tower by the names of
# its modules misses ten tensors of sixteen in each layer, and load_state_dict(strict=False) leaves them as they were
# initialised. The tower saved by itself keeps its names. Prints what a reader by names misses.
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

import transformers
from safetensors.torch import load_file
from transformers import Cosmos3EdgeConfig, Cosmos3EdgeForConditionalGeneration

PREFIX = "model.visual."
text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
text |= dict(head_dim=16, vocab_size=70)
text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
vision = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, patch_size=4, num_patches=16)
config = Cosmos3EdgeConfig(text_config=text, vision_config=vision, projector_hidden_size=48)
model = Cosmos3EdgeForConditionalGeneration(config)
tower = model.model.visual
model.save_pretrained("model")
tower.save_pretrained("tower")

saved = load_file("model/model.safetensors")
found = {key.removeprefix(PREFIX): x for key, x in saved.items() if key.startswith(PREFIX)}
missing, unexpected = tower.load_state_dict(found, strict=False)
_, info = Cosmos3EdgeForConditionalGeneration.from_pretrained("model", output_loading_info=True)
turned_back = not info["missing_keys"] and not info["unexpected_keys"]
print("transformers", transformers.__version__)
print("modules:", *sorted(missing))
print("in the file:", *sorted(unexpected))
print("the model reads its own file:", turned_back)

LAYER = "encoder.layers.0."
NAMES = {
    "self_attn.q_proj": "self_attn.to_q",
    "self_attn.k_proj": "self_attn.to_k",
    "self_attn.v_proj": "self_attn.to_v",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
}
described = (
    turned_back
    and set(missing) == {f"{LAYER}{name}.{kind}" for name in NAMES for kind in ("weight", "bias")}
    and set(unexpected) == {f"{LAYER}{name}.{kind}" for name in NAMES.values() for kind in ("weight", "bias")}
    and load_file("tower/model.safetensors").keys() == tower.state_dict().keys()
)
sys.exit(not described)
PYTHON
