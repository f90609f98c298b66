"""SigLIP's, Idefics2's and SmolVLM's towers, replaced, among adapters, compilers, checkpointing and data parallel."""

import pytest
import torch
import torch.distributed as dist
from relative_models import EXACT_BUCKETS, SIDE, made, pictures, tower, vlm
from test_relatives_replaced import batch
from test_vlm_adapters import adapted
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from vlm_models import check, packed_tower, relative

from siglip2_packed.vlm import replace_vision_tower, restore_vision_tower

BOUND = 1e-5
TARGETS = r".*vision_model.*(q_proj|v_proj|fc1|patch_embedding)"
MODELS = [
    pytest.param(name, marks=pytest.mark.skipif(bucketed and not EXACT_BUCKETS, reason="refused with transformers 4"))
    for name, bucketed in [("siglip", False), ("idefics2", True), ("smolvlm", True)]
]
later = pytest.mark.parametrize("later", [False, True], ids=["before", "after"])
"""Whether the tower is replaced in a model that has been changed already."""


def logits(model, given):
    out = model(**given)
    return out.logits_per_image if hasattr(out, "logits_per_image") else out["logits"]


def step(model, given):
    """Logits, and the gradients of what learns, by its name in the model that transformers made."""
    model.zero_grad()
    out = logits(model, given)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), {name.removeprefix("module.").removeprefix("_orig_mod."): x for name, x in found.items()}


def model_and_batch(name):
    model, _ = vlm(name)
    return model, batch(name, model)


@later
@pytest.mark.parametrize("name", MODELS)
def test_adapters(name, later):
    (theirs, given), (model, _) = (model_and_batch(name) for _ in range(2))
    theirs = adapted(theirs, target_modules=TARGETS)
    expected = step(theirs, given)
    if not later:
        replace_vision_tower(model)
    ours = adapted(model, target_modules=TARGETS)
    if later:
        replace_vision_tower(ours)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert any("patch_embedding.lora_A" in name for name in expected[1])
    check(step(ours, given), expected, BOUND)
    assert relative(logits(ours.merge_and_unload(), given), expected[0]) <= BOUND
    restore_vision_tower(model)
    assert relative(logits(model, given), expected[0]) <= BOUND


class Around(nn.Module):
    """The least of a model: its tower and a head."""

    def __init__(self, name):
        super().__init__()
        self.tower = tower(name, num_hidden_layers=1)
        self.head = made(lambda: nn.Linear(64, 3))

    def forward(self, **given):
        return {"logits": self.head(self.tower(**given).last_hidden_state.mean(1))}


@later
@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_model(name, later):
    theirs, model = (Around(name) for _ in range(2))
    given = {"pixel_values": torch.cat(pictures([(SIDE, SIDE)] * 3))}
    expected = step(theirs, given)
    if not later:
        replace_vision_tower(model)
    compiled = torch.compile(model, backend="aot_eager")
    if later:
        compiled(**given)
        replace_vision_tower(model)
    check(step(compiled, given), expected, BOUND)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_trains(name, reentrant):
    (theirs, given), (model, _) = (model_and_batch(name) for _ in range(2))
    expected = step(theirs.train(), given)
    replace_vision_tower(model)
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    packed_tower(model).encoder.layers[1].mlp.fc1.register_forward_hook(lambda *args: calls.append(1))
    check(step(model, given), expected, BOUND)
    assert len(calls) == 2


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@later
@pytest.mark.parametrize("name", MODELS)
def test_ddp(group, name, later):
    (theirs, given), (model, _) = (model_and_batch(name) for _ in range(2))
    expected = step(theirs, given)
    if not later:
        replace_vision_tower(model)
    parallel = DistributedDataParallel(model)
    if later:
        replace_vision_tower(parallel)
    for _ in range(2):
        check(step(parallel, given), expected, BOUND)
