#!/usr/bin/env bash
# transformers 5.24.0 with accelerate 1.15.0: LFM2-VL cannot be sharded by FSDP with accelerate's default layers to wrap. Those
# are the model's _no_split_modules, which has those of all models inside, and SigLIP2's vision tower brings those of
# SigLIP2 as a whole: Siglip2TextEmbeddings, which no LFM2-VL has, and the pooling head's, which it has only with
# vision_use_head. "Could not find the transformer layer class" is what FSDP1 and FSDP2 both raise; which class it names
# changes from run to run, as they are a set. With fsdp_transformer_layer_cls_to_wrap, the model's own named, it works.
#
# Exit code: 0 as described, 1 otherwise. Installs both and torch 2.13.0, if one of both is another, in a folder that is
# removed at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if ! python3 -c 'import transformers as t, accelerate as a, torch; assert (t.__version__, a.__version__) == ("5.24.0", "1.15.0")' 2>/dev/null; then
    python3 -m pip install --quiet --target "$folder" transformers==5.24.0 accelerate==1.15.0 torch==2.13.0
    export PYTHONPATH="$folder"
fi
cd "$folder"
python3 - <<'PYTHON' 2>/dev/null
import sys

import accelerate
import transformers
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration

text = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
text |= dict(vocab_size=64, layer_types=["conv", "full_attention"])
vision = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, patch_size=4)


def refusal(model, version, layers=None):
    """What accelerate says of the layers to wrap, None if it takes them."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=layers
    )
    try:
        plugin.set_auto_wrap_policy(model) if version == 1 else fsdp2_prepare_auto_wrap_policy(plugin, model)
    except ValueError as error:
        return str(error)


print("transformers", transformers.__version__, "accelerate", accelerate.__version__)
described = True
for head in (False, True):
    config = Lfm2VlConfig(text_config=text, vision_config=dict(vision, num_patches=16, vision_use_head=head))
    model = Lfm2VlForConditionalGeneration(config)
    absent = model._no_split_modules - {type(module).__name__ for module in model.modules()}
    print(f"vision_use_head={head}: _no_split_modules that the model lacks: {sorted(absent)}")
    described &= absent == {"Siglip2TextEmbeddings"} | (set() if head else {"Siglip2MultiheadAttentionPoolingHead"})
    for version in (1, 2):
        default, named = refusal(model, version), refusal(model, version, ["Lfm2DecoderLayer", "Siglip2EncoderLayer"])
        print(f"  FSDP{version}: {default}", "" if named else "By name: works.")
        described &= any(f"layer class {name} in the model" in str(default) for name in absent) and named is None
sys.exit(not described)
PYTHON
