"""Descriptors of tiles: what Triton would give a kernel, encoded once for a place in memory, shape and strides."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from siglip2_packed.ops.runtime.check import missing

if reason := missing("siglip2_packed.ops.runtime.hopper"):
    pytest.skip(reason, allow_module_level=True)

from triton.backends.nvidia import driver
from triton.experimental.gluon import language as gl

from siglip2_packed.ops.runtime import hopper

TILES = hopper.Tiles([64, 64], gl.NVMMASharedLayout(128, 16, 2))
SIGNATURE = {"x": "tensordesc<fp16[64, 64]>", "none": "constexpr", "y": "tensordesc<fp16[64, 64]>", "out": "*fp16"}


class Triton:
    """Its launcher as it is, around a kernel that notes what it gets and an encoding that is counted."""

    def __init__(self):
        self.encoded, self.given = [], []
        same = {"swizzle": 3, "elem_size": 2, "elem_type": 6, "block_size": [64, 64], "fp4_padded": False}
        self.metadata = SimpleNamespace(tensordesc_meta=[same, copy.deepcopy(same)])
        self.run = object.__new__(driver.CudaLauncher)
        sizes = dict.fromkeys(("global_scratch_size", "profile_scratch_size"), 0)
        aligned = dict.fromkeys(("global_scratch_align", "profile_scratch_align"), 1)
        others = {"num_ctas": 1, "gsan_enabled": False, "arg_annotations": [], "kernel_signature": b""}
        vars(self.run).update(launch_cooperative_grid=False, launch_pdl=False, **sizes, **aligned, **others)
        self.run.launch = driver.wrap_handle_tensordesc(self.note, SIGNATURE, self.metadata.tensordesc_meta)
        self.function, self.packed_metadata = 7, (4, 1, 0)

    def note(self, *arguments):
        *first, last = arguments
        spread = [*first, *last] if isinstance(last, (tuple, list)) else arguments  # from Triton 3.7 on, and before
        self.given.append([x.data_ptr() if isinstance(x, torch.Tensor) else x for x in spread])

    def encode(self, *description):
        self.encoded.append(repr(description))
        return "encoded", self.encoded[-1]

    def warmup(self, *arguments, grid, num_warps):
        return self


@pytest.fixture
def triton(monkeypatch):
    triton = Triton()
    utils = SimpleNamespace(fill_tma_descriptor=triton.encode, fill_tma_descriptor_tiled=triton.encode)
    active = SimpleNamespace(active=SimpleNamespace(utils=utils))
    monkeypatch.setattr(driver.triton.runtime, "driver", active)
    monkeypatch.setattr(hopper.Descriptors, "kinds", {})
    return triton


@pytest.fixture
def launch(triton, monkeypatch):
    """`launch(x, y, out)` by a launcher, after which `triton.given` has what the kernel got."""

    def run(compiled, grid, device, arguments):
        assert compiled.launch == triton.note or not hopper._past_encoding(compiled.launch)
        compiled.launch(*grid, 5, *compiled.fixed, *(arguments if compiled.spread else [arguments]))

    monkeypatch.setattr(hopper, "run_compiled", run)
    made = {}

    def launch(x, y, out):
        arguments = x, None, y, out
        launcher = made.setdefault(0, hopper.Launcher(triton, arguments, (TILES, None, TILES), num_warps=4))
        launcher((1, 1, 1), arguments)

    return launch


def rows(T, D=128):
    return torch.zeros(T, D, dtype=torch.float16)


def test_a_kernel_gets_what_triton_would_give_it(triton, launch):
    x, y, out = rows(13), rows(19, 256)[:, 64:192], rows(3)
    launch(x, y, out)
    described = [hopper._described(hopper.TensorDescriptor, z, TILES) for z in (x, y)]
    triton.run(1, 1, 1, 5, 7, (4, 1, 0), None, None, None, described[0], None, described[1], out)
    ours, theirs = triton.given
    assert ours == theirs and out.data_ptr() in ours and len(ours) > 10


def test_a_descriptor_is_encoded_once_for_a_place_shape_and_strides(triton, launch):
    memory = rows(64)
    for x in (memory, memory[:13], memory[8:21], memory.view(128, 64), memory[:13, :64]) * 3:
        launch(x, x, memory)
    assert len(triton.encoded) == len(set(triton.encoded)) == 5
    assert len({repr(x) for x in triton.given}) == 5


def test_memory_is_not_kept_for_a_descriptor_of_it(triton, launch):
    x = rows(64)
    launch(x, x, x)
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert triton.encoded and gone() is None


def test_descriptors_that_are_kept_do_not_grow_without_end(triton, launch, monkeypatch):
    monkeypatch.setattr(hopper.Descriptors, "MOST", 8)
    memory = rows(64)
    for T in range(1, 40):
        launch(memory[:T], memory, memory)
        (table,) = hopper.Descriptors.kinds.values()
        assert len(table) <= 8
        assert triton.given[-1].count(T) >= 1


def test_without_triton_s_step_descriptors_are_triton_s_to_encode(triton, launch, monkeypatch):
    """Where it is another than those of 3.6 to 3.9."""
    monkeypatch.setattr(hopper, "_past_encoding", lambda run: None)
    x = rows(13)
    launch(x, x, x)
    launch(x, x, x)
    assert len(triton.encoded) == 4 and triton.given[0] == triton.given[1]


def test_tensors_on_several_devices_are_refused(launch):
    launch(rows(13), rows(13), rows(13))
    elsewhere = SimpleNamespace(get_device=lambda: 1, device="cuda:1")
    with pytest.raises(ValueError, match="one device, got cpu and cuda:1"):
        launch(rows(13), rows(13), elsewhere)
