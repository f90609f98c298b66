#!/usr/bin/env bash
# accelerate 1.15.0 (torch 2.13.0, safetensors 0.8.0): `save_model` and `save_state` keep one of several parameters that
# lie in one storage, also where they do not overlap.
#
# q, k and v of an attention that lie side by side, so that one product reads all three, are three parameters with three
# values. `torch.save` writes all of them, safetensors' own `save_model` raises; accelerate writes q and leaves k and v
# out, with a log line that this should be OK. Prints what is in each file.
#
# Exit code: 0 as described, 1 otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0 safetensors==0.8.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_model
from torch import nn

attention = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in ("q", "k", "v")})
weights = [attention[name].weight for name in ("q", "k", "v")]
for weight, part in zip(weights, torch.cat([w.detach() for w in weights]).chunk(3)):
    weight.data = part
accelerator = Accelerator(cpu=True)
accelerator.save_model(attention, "model")
accelerator.prepare(attention)
accelerator.save_state("state")
try:
    save_model(attention, "safetensors.safetensors")
    refused = False
except RuntimeError as error:
    refused = True
    print("safetensors save_model:", str(error)[:90])
found = {
    "accelerate save_model": sorted(load_file("model/model.safetensors")),
    "accelerate save_state": sorted(load_file("state/model.safetensors")),
}
for what, names in found.items():
    print(f"{what}: {', '.join(names)}")
raise SystemExit(not refused or any(names != ["q.weight"] for names in found.values()))
PY
