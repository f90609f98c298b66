#!/usr/bin/env bash
# torch 2.13.0 and 2.14.1, on the CPU: F.interpolate(antialias=True), bilinear and bicubic, float32 and float64, to an output of
# width 1 and another height than the input's gives every row the values of the first, without a word. Right are: the same image
# on its side (height 1), first the height and then the width, channels_last with several channels, and a width of 2. Prints each
# row's largest difference to what is right, by a matrix product with the triangle's weights, and the differences of those.
#
# Exit code: 0 as described, 1 otherwise. Installs torch 2.13.0, if it is none of these, in a folder that is removed at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if ! python3 -c 'import torch; assert torch.__version__.split("+")[0] in ("2.13.0", "2.14.1")' 2>/dev/null; then
    python3 -m pip install --quiet --target "$folder" torch==2.13.0 numpy
    export PYTHONPATH="$folder"
fi
cd "$folder"
python3 - <<'PYTHON'
import sys

import torch
import torch.nn.functional as F


def weights(n, out):
    """`[out, n]`: a triangle of n / out pixels to each side of a row's middle, where the image shrinks."""
    middle = (torch.arange(out, dtype=torch.float64)[:, None] + 0.5) * n / out
    triangle = (1 - (torch.arange(n) + 0.5 - middle).abs() / max(n / out, 1)).clamp(min=0)
    return triangle / triangle.sum(dim=1, keepdim=True)


def resized(x, size, mode="bilinear"):
    return F.interpolate(x, size=size, mode=mode, antialias=True)


torch.manual_seed(0)
x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
right = torch.einsum("ai,ncij,bj->ncab", weights(16, 5), x, weights(16, 1))
found = resized(x, (5, 1))
rows = (found - right).abs().amax(dim=(0, 1, 3)).tolist()
good = {
    "on its side": (resized(x.mT, (1, 5)).mT - right).abs().max().item(),
    "in two steps": (resized(resized(x, (5, 16)), (5, 1)) - right).abs().max().item(),
    "channels_last": (resized(x.contiguous(memory_format=torch.channels_last), (5, 1)) - right).abs().max().item(),
    "width 2": (resized(x, (5, 2)) - torch.einsum("ai,ncij,bj->ncab", weights(16, 5), x, weights(16, 2))).abs().max().item(),
}
cubic = (resized(x.float(), (5, 1), "bicubic") - resized(x.float().mT, (1, 5), "bicubic").mT).abs().amax(dim=(0, 1, 3)).tolist()
print("torch", torch.__version__, "16x16 to 5x1")
print("bilinear, rows:", *(f"{error:.1e}" for error in rows))
print("bicubic, rows: ", *(f"{error:.1e}" for error in cubic))
print("right:", *(f"{name} {error:.1e}" for name, error in good.items()))
described = torch.equal(found, found[:, :, :1].expand_as(found))
described &= rows[0] < 1e-9 and min(rows[1:]) > 0.05 and cubic[0] < 1e-5 and min(cubic[1:]) > 0.05 and max(good.values()) < 1e-9
sys.exit(not described)
PYTHON
