#!/usr/bin/env bash
# torch 2.13.0 with onnxscript 0.7.2: torch.onnx.export(dynamo=True) cannot convert F.scaled_dot_product_attention of q, k, v
# in three dimensions [heads, length, head_dim], which torch and torch.export take: it asserts four. With a dimension of
# one in front, the same attention converts, and onnxruntime computes it.
#
# Exit code: 0 as described, 1 otherwise. Installs what is of another version in a folder that is removed at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if ! python3 -c 'import torch, onnxscript, onnxruntime, onnx; assert torch.__version__.startswith("2.13.0") and onnxscript.__version__.startswith("0.7.2")' 2>/dev/null; then
    python3 -m pip install --quiet --target "$folder" torch==2.13.0 numpy onnx onnxruntime onnxscript==0.7.2
    export PYTHONPATH="$folder"
fi
cd "$folder"
python3 - <<'PYTHON' 2>/dev/null
import sys

import onnxruntime
import onnxscript
import torch
import torch.nn.functional as F


class Attention(torch.nn.Module):
    def __init__(self, lead):
        super().__init__()
        self.lead = lead

    def forward(self, q, k, v):
        q, k, v = (x[None] if self.lead else x for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return out[0] if self.lead else out


def error(lead):
    """Of onnxruntime's answer; or why there is none."""
    torch.manual_seed(0)
    inputs = tuple(torch.randn(2, 7, 8) for _ in range(3))
    module = Attention(lead).eval()
    expected = torch.export.export(module, inputs).module()(*inputs)
    try:
        torch.onnx.export(module, inputs, "attention.onnx", dynamo=True, verbose=False, input_names=["q", "k", "v"])
    except Exception as error:
        causes = []
        while error is not None:
            causes.append(str(error))
            error = error.__cause__ or error.__context__
        return "only 4D" if any("only 4D" in cause for cause in causes) else causes[-1]
    run = onnxruntime.InferenceSession("attention.onnx", providers=["CPUExecutionProvider"]).run
    (found,) = run(None, {name: x.numpy() for name, x in zip("qkv", inputs)})
    return float((torch.from_numpy(found) - expected).abs().max())


three, four = error(lead=False), error(lead=True)
print(torch.__version__, "onnxscript", onnxscript.__version__, "| three dimensions:", three, "| four: error", four)
as_described = three == "only 4D" and isinstance(four, float) and four < 1e-5
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
PYTHON
