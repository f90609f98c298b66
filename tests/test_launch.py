"""How kernels are launched: which compiled one, and from which memory."""

import gc
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from siglip2_packed.ops.runtime import launch as launching
from siglip2_packed.ops.runtime.launch import readable


@pytest.fixture
def launched(monkeypatch):
    """`launched(kernel, tensors, constants, **options)` -> which of the kernels compiled so far ran."""
    compiled, ran = [], []

    class Kernel:
        def warmup(self, *args, grid, **options):
            compiled.append(args)
            return SimpleNamespace(run=len(compiled), function=None, packed_metadata=None)

    monkeypatch.setattr(launching, "INTERPRETED", False)
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(launching, "run_compiled", lambda kernel, *args: ran.append(kernel.launch))
    kernels = Kernel(), Kernel()

    def run(kernel, tensors, constants, **options):
        launching.launch(kernels[kernel], (1, 1, 1), tensors, (5,), constants, **({"num_warps": 1} | options))
        return ran[-1]

    return run


def test_a_compiled_kernel_is_looked_for_once(launched):
    """For each device, dtypes, alignment and constexprs; misaligned tensors never get an aligned kernel."""
    x = torch.zeros(9)
    ran = [
        launched(0, (x, x), (8, True)),
        launched(0, (x[4:], x), (8, True)),  # 16 bytes on: the same
        launched(0, (x, x.half()), (8, True)),
        launched(0, (x, x), (8, False)),
        launched(1, (x, x), (8, True)),
        launched(0, (x, x[1:]), (8, True)),  # misaligned
        launched(0, (x, x[1:]), (8, True)),
        launched(0, (x, x), (8, True)),
    ]
    assert ran == [1, 1, 2, 3, 4, 5, 6, 1]
    x = torch.zeros(9, dtype=torch.int8)
    assert (
        launched(0, (x[1:],), (8,)) == 7 and launched(0, (x,), (8,)) == 8
    )  # nor is theirs remembered for aligned ones


def test_options_are_part_of_what_is_looked_for(launched):
    x = torch.zeros(9)
    options = {}, {"num_stages": 2}, {"num_stages": 3}
    assert [launched(0, (x,), (9,), **some) for some in options * 2] == [1, 2, 3] * 2


def test_readable_rows_are_taken_as_they_lie():
    x = torch.randn(6, 24, 40)
    for rows in (
        x,
        x[:, 0],
        x[:, :, :16],
        x[:, :, 8:32],
        x[::2],
        x[0, 0],
        x[:0],
        x[:, :, 1:9],  # whole pieces from where they begin; `launch` looks where that is
        x[0, :1].expand(5, 40),  # one row for all
    ):
        assert readable(rows)[0] is rows
    for rows in (
        x.transpose(1, 2),
        x[:, :, ::2],
        torch.randn(6, 20)[:, :16],  # every second row begins between pieces of 16 bytes
        torch.randn(20)[::2],
    ):
        (copy,) = readable(rows)
        assert copy is not rows and copy.is_contiguous() and copy.data_ptr() % 16 == 0 and torch.equal(copy, rows)


def test_tensors_that_are_not_on_one_cuda_device_are_refused(launched):
    """Kernels get places in memory, which tell nothing of the device."""
    x = torch.zeros(9)
    with pytest.raises(ValueError, match="one device, got .'cpu', 'meta'."):
        launched(0, (x, x.to("meta")), (8,))


def test_launches_are_for_cuda_devices():
    x = torch.zeros(9)
    with pytest.raises(ValueError, match="CUDA devices"):
        launching.run_compiled(None, (1, 1, 1), x.get_device(), (x.data_ptr(),))


@pytest.mark.parametrize("scratch", [0, 8])
def test_what_triton_compiled_is_kept(monkeypatch, scratch):
    """Else it may be unloaded, and another kernel may have the same id, when its function is launched again."""

    class Run:
        global_scratch_size, profile_scratch_size, launch = scratch, 0, print

        def __call__(self, *given):
            self.launch(*given)

    monkeypatch.setattr(launching, "INTERPRETED", False)
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(launching, "run_compiled", lambda *args: None)
    compiled = type("Compiled", (), {"run": Run(), "function": 7, "packed_metadata": (4, 1, 0)})()
    kernel = SimpleNamespace(warmup=partial(lambda held, *args, **options: held, compiled))
    there = weakref.ref(compiled)
    launching.launch(kernel, (1, 1, 1), (torch.zeros(8),), (), ())
    (found,) = launching._compiled.values()
    assert (found.launch is print) == (scratch == 0)
    del compiled, kernel, found
    gc.collect()
    assert there() is not None
