#!/usr/bin/env bash
# torch 2.11.0 (CUDA 13.0, cuDNN 9.19) on a Hopper card, bfloat16: gradients of F.scaled_dot_product_attention are wrong,
# without a word, where q, k, v (and so the output) lie as [batch, length, heads, head_dim] and the gradient of the output
# comes contiguous as [batch, heads, length, head_dim]. The output is right; dq, dk and dv have relative errors above 1.
# It is cuDNN's backward, which the default takes first on Hopper; flash, efficient and math are right on the same input,
# and so is cuDNN once the gradient lies as the output does.
#
# Exit code: 0 as described, 1 otherwise, 3 without a Hopper card. Installs torch 2.11.0, if it is another, in a folder
# that is removed at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if ! python3 -c 'import torch; assert torch.__version__.startswith("2.11.0")' 2>/dev/null; then
    python3 -m pip install --quiet --target "$folder" torch==2.11.0 numpy
    export PYTHONPATH="$folder"
fi
cd "$folder"
python3 - <<'PYTHON'
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    print("needs a CUDA device of compute capability 9.0")
    sys.exit(3)
print(torch.__version__, "cuDNN", torch.backends.cudnn.version(), torch.cuda.get_device_name())
torch.manual_seed(0)
q, k, v = (torch.randn(8, 256, 4, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
as_output = torch.randn(8, 256, 4, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
inputs = [x.double().requires_grad_() for x in (q, k, v)]
exact = (inputs[0] @ inputs[1].mT / 8).softmax(-1) @ inputs[2]
exact = [exact.detach(), *torch.autograd.grad(exact, inputs, as_output.double())]


def errors(grad, backend=None):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    if backend is None:
        out = F.scaled_dot_product_attention(*inputs)
    else:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*inputs)
    results = [out.detach(), *torch.autograd.grad(out, inputs, grad)]
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(results, exact)]


expected = True
for layout, grad in (("as the output", as_output), ("heads first", as_output.contiguous())):
    for name in ("default", "CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        found = errors(grad, getattr(SDPBackend, name, None))
        print(f"gradient {layout:14} {name:20} out, dq, dk, dv:", *(f"{x:.1e}" for x in found))
        wrong = layout == "heads first" and name in ("default", "CUDNN_ATTENTION")
        expected &= found[0] < 0.01 and all(x > 0.5 if wrong else x < 0.01 for x in found[1:])
print("as described" if expected else "CHANGED")
sys.exit(not expected)
PYTHON
