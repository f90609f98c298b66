#!/usr/bin/env bash
# torch 2.13.0 with onnxscript 0.7.2 and onnxruntime 1.32.0, and openvino 2026.4.1: F.interpolate by a scale_factor, with antialias, is
# another resize once it is exported. torch samples at steps of 1 / scale_factor (unless recompute_scale_factor=True); both exporters
# keep the sizes alone, so that the steps are input / output: where the scaled size is no whole number, and is rounded down, every row
# but the first is taken from elsewhere, without a word. Without antialias both keep the factor. A whole number (16 x 0.5) is right.
#
# Prints relative errors on noise of 16x24 (seen: 0.69 bilinear and 0.73 bicubic by 0.7, to 11x16; else below 2e-6), and by how many of
# the input's columns the resize by 0.7 is off (seen: 1.0 at the right edge, of 24).
#
# Exit code: 0 as described, 1 otherwise. Installs what is of another version in a folder that is removed at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
site="$folder/site"
if ! python3 -c 'import torch, onnx, onnxscript as s, onnxruntime as o; assert (torch.__version__.split("+")[0], s.__version__, o.__version__) == ("2.13.0", "0.7.2", "1.32.0")' 2>/dev/null; then
    python3 -m pip install --quiet --target "$site" torch==2.13.0 onnxscript==0.7.2 onnxruntime==1.32.0 onnx==1.23.2 numpy
fi
if ! python3 -c 'import openvino as o; assert o.__version__.startswith("2026.4.1")' 2>/dev/null; then
    python3 -m pip install --quiet --no-deps --target "$folder/openvino" openvino==2026.4.1 openvino-telemetry
fi
export PYTHONPATH="$folder/openvino:$site"
cd "$folder"
python3 -W ignore - 2>/dev/null <<'PYTHON'
import sys

import onnxruntime
import openvino
import torch
import torch.nn.functional as F
from torch import nn


class Resize(nn.Module):
    def __init__(self, factor, **how):
        super().__init__()
        self.how = dict(scale_factor=factor, align_corners=False) | how

    def forward(self, x):
        return F.interpolate(x, **self.how)


def with_onnx(module, x):
    torch.onnx.export(module, (x,), "resize.onnx", dynamo=True, input_names=["x"], verbose=False)
    session = onnxruntime.InferenceSession("resize.onnx", providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def with_openvino(module, x):
    program = openvino.convert_model(module, example_input=x)
    return torch.from_numpy(openvino.compile_model(program, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0])


def relative(found, right):
    return ((found - right).norm() / right.norm()).item()


noise = torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
exporters = {"torch.onnx": with_onnx, "openvino": with_openvino}
wrong, right = {}, {}
for exporter, export in exporters.items():
    for mode in ("bilinear", "bicubic"):
        for to, factor, how in (
            (wrong, 0.7, dict(antialias=True)),
            (wrong, 1.7, dict(antialias=True)),
            (right, 0.5, dict(antialias=True)),
            (right, 0.7, dict(antialias=False)),
            (right, 0.7, dict(antialias=True, recompute_scale_factor=True)),
        ):
            module = Resize(factor, mode=mode, **how)
            to[f"{exporter}, {mode} by {factor}, {how}"] = relative(export(module, noise), module(noise))
for name, value in (wrong | right).items():
    print(f"{name}: {value:.1e}")

column = torch.arange(24.0).expand(1, 1, 16, 24).contiguous()  # a pixel's value is its column
module = Resize(0.7, mode="bilinear", antialias=True)
moved = {exporter: (export(module, column) - module(column)).abs().amax().item() for exporter, export in exporters.items()}
print("columns moved by up to", moved)
sys.exit(min(moved.values()) < 0.9 or not min(wrong.values()) > 0.1 > 1e-4 > max(right.values()))
PYTHON
