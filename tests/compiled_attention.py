"""Compiles the attention kernels for Hopper, for a card that need not be here, as their own functions launch them:
`python compiled_attention.py 72` prints, as JSON, a row a kernel: its name, bytes of shared memory, threads, registers
of the launch, and what it has of the tensor cores' and the copy engine's instructions.
"""

import json
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget

from siglip2_packed.ops.attention import hopper_backward, hopper_forward, hopper_one_pass, hopper_sums
from siglip2_packed.ops.runtime import hopper

INSTRUCTIONS = r"wgmma\.mma_async\S+?\.(m64n\d+k16)\S+|(cp\.reduce\.async\.bulk|cp\.async\.bulk)\.tensor"
rows = []


class NoDriver:
    """What Triton asks of one to compile."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


class Compiler:
    """Stands in for `Launcher`."""

    def __init__(self, kernel, arguments, tiles, **options):
        described = list(arguments)
        for i, (x, tile) in enumerate(zip(arguments, tiles)):
            if x is not None and tile is not None:
                described[i] = hopper._described(hopper.TensorDescriptor, x, tile)
        compiled = kernel.warmup(*described, grid=(1,), **options)
        found = {next(filter(None, groups)) for groups in re.findall(INSTRUCTIONS, compiled.asm["ptx"])}
        metadata = compiled.metadata
        rows.append((kernel.__name__, metadata.shared, metadata.num_warps * 32, options["maxnreg"], sorted(found)))

    def __call__(self, grid, arguments):
        """Nothing is launched."""


def compile_all(K: int) -> None:
    for module in (hopper_forward, hopper_backward, hopper_one_pass):
        module.Launcher, module.work_counter = Compiler, lambda device: (torch.zeros(1, dtype=torch.int32), 0)
    hopper_sums.launch = lambda *arguments, **options: None
    qkv, gradients = torch.zeros(2, 512, 3, 2, K, dtype=torch.bfloat16)
    q, k, v = qkv.unbind(1)
    grad = torch.zeros(512, 2, K, dtype=torch.bfloat16)
    low, lse, cu_seqlens = torch.zeros(grad.shape, dtype=torch.int8), torch.zeros(2, 512), torch.tensor([0, 512]).int()
    pack = cu_seqlens, 512, K**-0.5
    hopper_forward.forward(2, q, k, v, grad, None, lse, *pack)
    hopper_forward.forward(2, q, k, v, grad, low, lse, *pack)
    for module in (hopper_backward, hopper_one_pass):
        module.backward(2, grad, q, k, v, grad, low, lse, *gradients.unbind(1), *pack)


if __name__ == "__main__":
    triton.runtime.driver.set_active(NoDriver())
    compile_all(int(sys.argv[1]))
    print(json.dumps(rows))
