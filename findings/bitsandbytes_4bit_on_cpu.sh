#!/usr/bin/env bash
# bitsandbytes 0.50.2, on a CPU with AVX512-BF16: Linear4bit re-packs its weights at the first inference, for good. Then
# a state dict has the scales (absmax) of an unnested layer transposed, so that what is read again is another layer,
# without a word; the layer cannot be trained; and widths that are no multiples of 64 fail at once.
# siglip2_packed/quantized.py keeps the layers of its towers from doing it.
#
# Exit code: 0 as described, 1 otherwise, 3 on another CPU. Installs bitsandbytes 0.50.2, if it is another, in a folder
# that is removed at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if ! python3 -c 'import bitsandbytes as b; assert b.__version__ == "0.50.2"' 2>/dev/null; then
    python3 -m pip install --quiet --target "$folder" bitsandbytes==0.50.2
    export PYTHONPATH="$folder"
fi
cd "$folder"
python3 - <<'PYTHON'
import sys

import bitsandbytes as bnb
import torch


def layer(width_in=192, width_out=128):
    torch.manual_seed(0)
    made = bnb.nn.Linear4bit(width_in, width_out, compute_dtype=torch.float32, quant_type="nf4")
    made.weight = bnb.nn.Params4bit(torch.randn(width_out, width_in), False, compress_statistics=False, quant_type="nf4")
    return made.to("cpu").eval()


def saved(of):
    """The weight that is read again from a state dict."""
    state = of.state_dict()
    parts = {name: tensor for name, tensor in state.items() if name.startswith("weight.")}
    read = bnb.nn.Params4bit.from_prequantized(state["weight"], parts, device="cpu")
    return bnb.functional.dequantize_4bit(read.data, read.quant_state)


if not layer().support_avx512bf16_for_cpu:
    print("needs a CPU with AVX512-BF16")
    sys.exit(3)
x, before, used = torch.randn(3, 192), saved(layer()), layer()
with torch.no_grad():
    used(x)
error = ((saved(used) - before).norm() / before.norm()).item()
print(f"bitsandbytes {bnb.__version__}: relative error of a weight that is saved after inference {error:.2f}")
expected = error > 0.05

used = layer()
with torch.no_grad():
    used(x)
try:
    used.train()(x.requires_grad_()).sum().backward()
    print("trained after inference: works")
    expected = False
except RuntimeError as reason:
    print("trained after inference:", reason)
try:
    with torch.no_grad():
        layer(208)(torch.randn(3, 208))
    print("width 208: works")
    expected = False
except RuntimeError as reason:
    print("width 208:", reason)
sys.exit(not expected)
PYTHON
