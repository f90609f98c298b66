"""What a step costs the host, counted: Python calls, allocations, descriptors."""

import collections
import sys

import pytest
import torch
from transformers import Siglip2VisionConfig

from siglip2_packed import Siglip2PackedVisionModel
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.check import missing
from siglip2_packed.workloads import SHAPES

LAYERS = SHAPES["so400m"]["num_hidden_layers"]
GRIDS = [(1, 13, 19), (1, 8, 32), (1, 7, 1)]


@pytest.fixture
def made():
    """`made(grids, device, layers)` -> a tower of layers of head_dim 72, and a pack for it."""

    def make(grids, device="cpu", layers=LAYERS):
        config = Siglip2VisionConfig(**SHAPES["tiny72"] | {"num_hidden_layers": layers}, vision_use_head=False)
        model = Siglip2PackedVisionModel(config).to(device, torch.float32 if device == "cpu" else torch.bfloat16)
        rows = torch.randn(sum(h * w for _, h, w in grids), 48, generator=torch.Generator().manual_seed(0))
        return model, (rows.to(device), torch.tensor(grids))

    return make


def infer(model, pack):
    with torch.no_grad():
        return model(*pack)


def train(model, pack):
    model(*pack).last_hidden_state.sum().backward()
    model.zero_grad()


def python_calls(step, *args):
    """Of a warm step, in the thread that makes it."""
    for _ in range(2):
        step(*args)
    count = 0

    def note(frame, event, arg):
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        step(*args)
    finally:
        sys.setprofile(before)
    return count


def test_looking_at_a_layer_s_weights_takes_few_calls(made):
    model, _ = made(GRIDS)
    with torch.no_grad():
        assert len(model.encoder.plain_weights(torch.zeros(1, 144))) == LAYERS
        assert python_calls(model.encoder.plain_weights, torch.zeros(1, 144)) <= 9 * LAYERS


@pytest.mark.gpu
def test_a_forward_takes_few_allocations_and_python_calls(made):
    model, pack = made([(1, 16, 16)], "cuda")
    infer(model, pack)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    infer(model, pack)
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    assert 0 < allocations <= 30
    assert 0 < python_calls(infer, model, pack) <= 1500


@pytest.fixture
def encoded(monkeypatch):
    """How often each descriptor of tiles was encoded, by place, shape, strides and what else it tells."""
    if torch.cuda.get_device_capability() != (9, 0) or missing("siglip2_packed.ops.runtime.hopper"):
        pytest.skip("needs compute capability 9.0 and Gluon")
    from siglip2_packed.ops.runtime import hopper

    encode, counted = hopper.driver.make_tensordesc_arg, collections.Counter()

    def count(x, metadata, *launch):
        counted[x.base.data_ptr(), tuple(x.shape), tuple(x.strides), repr(metadata)] += 1
        return encode(x, metadata, *launch)

    monkeypatch.setattr(hopper.driver, "make_tensordesc_arg", count)
    for descriptors in hopper.Descriptors.kinds.values():
        descriptors.clear()
    return counted


@pytest.mark.gpu
@pytest.mark.parametrize("step", [infer, train])
def test_no_descriptor_is_encoded_twice(made, encoded, step):
    with choice.forced(card=choice.card(torch.device("cuda", 0))._replace(multiprocessors=0)):  # long packs' kernels
        model, pack = made([(1, 24, 42), (1, 13, 19)], "cuda", layers=3)
        for _ in range(3):
            step(model, pack)
    assert len(encoded) >= 6 and set(encoded.values()) == {1}
