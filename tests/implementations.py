"""What tests of operations on rows share: the implementations, on which device, in which dtypes, how exact."""

import pytest
import torch

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted")
DEVICES = [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]
NAMES = ["eager", "triton"]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
"""Those that kernels take; bfloat16's is not interpreted."""
IN_DTYPES = [
    ("eager", torch.float64),
    *[(name, dtype) for name in NAMES for dtype in (torch.float32, torch.float16)],
    *[pytest.param(name, torch.bfloat16, marks=pytest.mark.gpu) for name in NAMES],
]
SHAPES = [(1, 8), (5, 64), (13, 72), (3, 1152), (37, 200)]
BOUND = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def draw(device, dtype, *shapes):
    generator = torch.Generator().manual_seed(0)
    return [(3 * torch.randn(shape, generator=generator, device="cpu") + 1).to(device, dtype) for shape in shapes]
