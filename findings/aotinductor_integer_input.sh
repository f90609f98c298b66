#!/usr/bin/env bash
# torch 2.13.0 (CPU): a program with an integer among its inputs, exported with Dim.DYNAMIC for it, runs for any number; but
# AOTInductor cannot compile it: torch._inductor.aoti_compile_and_package raises, as the integer has no value there
# (aten::arange, "found NoneType"). The same number as the length of a tensor compiles, and runs for any length.
#
# Exit code: 0 as described, 1 otherwise. Installs torch 2.13.0, if it is another, in a folder that is removed at the end.
# Needs a C++ compiler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if ! python3 -c 'import torch; assert torch.__version__.startswith("2.13.0")' 2>/dev/null; then
    python3 -m pip install --quiet --target "$folder" torch==2.13.0 numpy
    export PYTHONPATH="$folder"
fi
cd "$folder"
python3 - <<'PYTHON' 2>/dev/null
import sys

import torch
from torch.export import Dim, export


class Counted(torch.nn.Module):
    def forward(self, x, n):
        return x.sum() + torch.arange(n).sum()


class Measured(torch.nn.Module):
    def forward(self, x, rows):
        return x.sum() + torch.arange(rows.shape[0]).sum()


def compiled(program, name):
    try:
        package = torch._inductor.aoti_compile_and_package(program, package_path=f"{name}.pt2")
    except Exception as error:
        return str(error).strip().splitlines()[-1] if "NoneType" not in str(error) else "found NoneType"
    return torch._inductor.aoti_load_package(package)


x = torch.ones(3)
counted = export(Counted(), (x, 5), dynamic_shapes=(None, Dim.DYNAMIC))
measured = export(Measured(), (x, torch.zeros(5)), dynamic_shapes=(None, {0: Dim.DYNAMIC}))
runs = [float(counted.module()(x, n)) for n in (4, 9)], [float(measured.module()(x, torch.zeros(n))) for n in (4, 9)]
by_number, by_length = compiled(counted, "counted"), compiled(measured, "measured")
print(torch.__version__, "exported programs:", *runs, "| AOTInductor, an integer:", by_number)
results = [float(by_length(x, torch.zeros(n))) for n in (4, 9)]
print("AOTInductor, a length:", results)
as_described = runs == ([9.0, 39.0],) * 2 and results == [9.0, 39.0] and by_number == "found NoneType"
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
PYTHON
