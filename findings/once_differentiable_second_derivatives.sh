#!/usr/bin/env bash
# torch 2.13.0: a Function whose backward is torch.autograd.function.once_differentiable is said to raise where a second
# derivative goes through it. torch.autograd.functional.hessian gives zeros for it instead, without a word, where the
# gradient that comes in does not depend on the input (a sum is the last step).
#
# Exit code: 0 as described, 1 otherwise. Installs torch 2.13.0, if it is another, in a folder that is removed at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if ! python3 -c 'import torch; assert torch.__version__.startswith("2.13.0")' 2>/dev/null; then
    python3 -m pip install --quiet --target "$folder" torch==2.13.0 numpy
    export PYTHONPATH="$folder"
fi
cd "$folder"
python3 - <<'PYTHON'
import sys

import torch
from torch.autograd.function import once_differentiable


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


x = torch.tensor([1.0, 2.0], dtype=torch.float64)
found = torch.autograd.functional.hessian(lambda x: Cube.apply(x).sum(), x)
right = torch.autograd.functional.hessian(lambda x: (x**3).sum(), x)
print("torch", torch.__version__, "hessian of the sum of cubes at 1, 2:", found.diag().tolist(), "right:", right.diag().tolist())
sys.exit(not (found == 0).all() or not torch.equal(right.diag(), 6 * x))
PYTHON
