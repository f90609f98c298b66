"""A replaced tower in a model that two ranks train: as one process trains the model that transformers made."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import parameters_of
from test_engines import ZERO3, partitioned, whole
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import Siglip2ForImageClassification, Siglip2Model
from vlm_models import classifier, images, packed_tower, siglip2

from siglip2_packed.encoder import Siglip2PackedEncoderLayer
from siglip2_packed.vlm import replace_vision_tower, restore_vision_tower

pytestmark = pytest.mark.slow
GRIDS = [(1, 13, 19), (1, 2, 3), (1, 8, 32), (1, 7, 5)]


class Pooled(Siglip2Model):
    """Learns from what the head pools."""

    def forward(self, labels, **batch):
        logits = super().forward(**batch, input_ids=torch.arange(3, 35).view(2, 16)).logits_per_image
        return SimpleNamespace(loss=(logits * torch.stack([labels.cos(), labels.sin()], 1)).mean())


def make(swapped=True, head=False):
    model = siglip2(Pooled).train() if head else classifier(vision_use_head=False).train()
    if swapped:
        replace_vision_tower(model)
    return model


def batch_of(rank):
    """Two of the four images, padded to the longer."""
    grids = GRIDS[2 * rank : 2 * rank + 2] if rank is not None else GRIDS
    whole = images(GRIDS)
    first = 0 if rank is None else 2 * rank
    batch = {name: x[first : first + len(grids)] for name, x in whole.items()}
    longest = int(batch["pixel_attention_mask"].sum(1).max())
    batch = {name: x if name == "spatial_shapes" else x[:, :longest] for name, x in batch.items()}
    return batch | {"labels": torch.arange(first, first + len(grids)) % 3}


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def steps(model, batch, optimizer=None):
    optimizer = optimizer or sgd(model)
    losses = []
    for _ in range(2):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, parameters_of(model)


@functools.cache
def alone(head):
    """transformers' model, in float64."""
    model = make(swapped=False, head=head).double()
    start = parameters_of(model)
    batch = batch_of(None)
    return start, *steps(model, batch | {"pixel_values": batch["pixel_values"].double()})


def check(results, head=False):
    start, losses, parameters = alone(head)
    np.testing.assert_allclose(np.mean([losses for losses, _ in results], axis=0), losses, rtol=1e-5)
    largest = max(np.linalg.norm(parameters[name] - start[name]) for name in parameters)
    for _, ours in results:
        assert ours.keys() == parameters.keys()
        for name, value in ours.items():
            moved = np.linalg.norm(parameters[name] - start[name])
            error = np.linalg.norm(value - parameters[name])
            assert error <= 2e-5 * max(moved, 1e-2 * largest) + 1.2e-7 * np.linalg.norm(value), name


def ddp(later):
    model = DistributedDataParallel(make(swapped=not later))
    if later:
        replace_vision_tower(model)
    return steps(model, batch_of(dist.get_rank()))


@pytest.mark.parametrize("later", [False, True], ids=["before DDP", "within DDP"])
def test_ddp(ranks, later):
    check(ranks(ddp, later))


def fsdp2(head):
    model = make(head=head)
    for layer in packed_tower(model).encoder.layers:
        fully_shard(layer)
    fully_shard(model)
    results = steps(model, batch_of(dist.get_rank()))
    return results, refusal(restore_vision_tower, model)


def refusal(function, *args):
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return ""


def fsdp2_before():
    found = []
    for layered in (False, True):
        model = make(swapped=False)
        original = next(m for m in model.modules() if hasattr(m, "post_layernorm"))
        for layer in original.encoder.layers if layered else ():
            fully_shard(layer)
        fully_shard(model)
        found.append(refusal(replace_vision_tower, model))
    return found


@pytest.mark.parametrize("head", [False, True])
def test_fsdp2(ranks, head):
    results = ranks(fsdp2, head)
    check([trained for trained, _ in results], head)
    for message in [message for _, message in results] + ranks(fsdp2_before)[0]:
        assert "is a DTensor, and FSDP2 or tensor parallel knows its module: shard the model later" in message


def fsdp1(later):
    model = make(swapped=not later)
    policy = None if later else ModuleWrapPolicy({Siglip2PackedEncoderLayer})
    model = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    if later:
        return refusal(replace_vision_tower, model)
    return steps(model, batch_of(dist.get_rank())), refusal(restore_vision_tower, model)


def test_fsdp1(ranks):
    results = ranks(fsdp1, False)
    check([trained for trained, _ in results])
    for message in [message for _, message in results] + ranks(fsdp1, True):
        assert "is sharded by FSDP1, which knows the tower's modules: shard it later" in message


ZERO2 = {**ZERO3, "zero_optimization": {"stage": 2}}


def zero(folder, stage, later, kind=Siglip2ForImageClassification):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first
    config = ZERO3 if stage == 3 else ZERO2
    load = functools.partial(kind.from_pretrained, folder)
    model = (partitioned(load) if stage == 3 else load()).train()
    if not later:
        replace_vision_tower(model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=config)
    if later and stage == 3:
        return refusal(replace_vision_tower, engine)
    if later:
        replace_vision_tower(engine)
    losses = []
    for _ in range(2):
        loss = engine(**batch_of(dist.get_rank())).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses, whole(model) if stage == 3 else parameters_of(model)


@pytest.fixture
def saved(tmp_path):
    pytest.importorskip("deepspeed")
    make(swapped=False).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero(ranks, saved, stage):
    check(ranks(zero, saved, stage, False))


def test_zero3_of_a_tower_with_a_head(ranks, tmp_path, saved):
    make(swapped=False, head=True).save_pretrained(tmp_path / "pooled")
    check(ranks(zero, str(tmp_path / "pooled"), 3, False, Pooled), head=True)


def test_within_a_deepspeed_engine(ranks, saved):
    check(ranks(zero, saved, 2, True))
    for message in ranks(zero, saved, 3, True):
        assert "has a hook" in message
