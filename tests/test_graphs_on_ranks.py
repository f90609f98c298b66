"""CUDA graphs under DDP, FSDP and DeepSpeed, on two ranks: as one rank trains, with the graphs or without."""

from functools import partial

import pytest
import recorded_graphs
import torch
import torch.utils.checkpoint
from graphed import (
    BUSY,
)
from implementations import INTERPRETED
from ranks import NO_IMAGES, TOKENS, UNEVEN, Task, pack, parameters_of, train, train_alone
from ranks import check as ranks_check
from test_engines import ZERO3, deepspeed_losses
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from siglip2_packed import Siglip2PackedVisionModel
from siglip2_packed.encoder import Siglip2PackedEncoderLayer
from siglip2_packed.graphs import Graphs
from siglip2_packed.ops.runtime import choice
from siglip2_packed.ops.runtime.check import Verdict
from siglip2_packed.parallel import apply_fsdp

TRAINING = {
    "tokens": TOKENS,
    "pooled": dict(pooled=True),
    "second to last layer": dict(select_layer=-2),
    "checkpointing": dict(TOKENS, checkpointing=True),
    "called twice": dict(TOKENS, calls=2),
    "last layer": dict(TOKENS, trains="last layer"),
    "frozen": dict(TOKENS, trains="nothing"),
}


def in_recorded_graphs(train, *args, **kwargs):
    """On a rank: what it returns, whether graphs were replayed, and the reasons why packs ran without."""
    with pytest.MonkeyPatch.context() as patch, choice.forced(positions=["triton"], pool=["triton"]):
        reasons, replays, replay = set(), [], recorded_graphs.Recorded.replay
        patch.setattr(choice.Function, "verdict", lambda *args: Verdict({"out": 0.0}, {"out": 0.0}))
        patch.setattr(Graphs, "_say", lambda self, reason: reasons.add(reason))
        patch.setattr(recorded_graphs.Recorded, "replay", lambda self: replays.append(self) or replay(self))
        recorded_graphs.install(patch)
        return train(*args, cuda_graphs=[300, 600], **kwargs), bool(replays), reasons


def ddp(task):
    return nn.parallel.DistributedDataParallel(task)


def fsdp2(task):
    apply_fsdp(task.model, param_dtype=None, reduce_dtype=None)
    return fully_shard(task)


@INTERPRETED
@pytest.mark.parametrize("images", [UNEVEN, NO_IMAGES], ids=["uneven", "no images on a rank"])
@pytest.mark.parametrize("training", TRAINING)
def test_two_ranks_of_ddp_train_as_one(ranks, checkpoint, training, images):
    folder, kwargs = checkpoint("tiny"), TRAINING[training]
    results, replayed, reasons = zip(*ranks(in_recorded_graphs, train, ddp, folder, images, **kwargs))
    ranks_check(results, train_alone(folder, **kwargs))
    assert replayed == (True, images is UNEVEN)
    assert reasons[0] == ({BUSY} if training == "called twice" else set())


@INTERPRETED
def test_sharded_models_run_without_graphs(ranks, checkpoint):
    results, replayed, reasons = zip(*ranks(in_recorded_graphs, train, fsdp2, checkpoint("tiny"), UNEVEN, **TOKENS))
    ranks_check(results, train_alone(checkpoint("tiny"), **TOKENS))
    assert not any(replayed)
    for (reason,) in reasons:
        assert reason.startswith("encoder.layers.0.") and reason.endswith(" is DTensor, sharded or quantised")


def settled(train, *args):
    """On a rank: as on a device, where a forward joins projections."""
    run = Siglip2PackedVisionModel._features
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Siglip2PackedVisionModel, "_features", lambda self, *args: self._settle() or run(self, *args))
        return train(*args, **TOKENS)


@INTERPRETED
@pytest.mark.parametrize("engine", [fsdp2, fully_shard, ddp])
def test_engines_train_as_one_where_a_forward_joins_projections(ranks, checkpoint, engine):
    """A model within FSDP2's root alone has whole parameters in its forward, in memory that FSDP2 gathers into."""
    ranks_check(ranks(settled, train, engine, checkpoint("tiny"), UNEVEN), train_alone(checkpoint("tiny"), **TOKENS))


@INTERPRETED
def test_models_that_are_sharded_from_around_run_without_graphs(ranks, checkpoint):
    """Their weights are freed and gathered anew between forward and backward."""
    folder = checkpoint("tiny")
    results, replayed, reasons = zip(*ranks(in_recorded_graphs, train, fully_shard, folder, UNEVEN, **TOKENS))
    ranks_check(results, train_alone(folder, **TOKENS))
    assert not any(replayed)
    assert reasons == ({"FSDPTask, of which this model is a part, gathers its weights in each call"},) * 2


def fsdp1(folder, original, whole, **kwargs):
    """What a step gives without gradients, in graphs if that can be, and as ever."""
    found = []
    for settings in (kwargs, {}):
        policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={Siglip2PackedEncoderLayer})
        task = FullyShardedDataParallel(
            Task(folder, **TOKENS, **settings),
            auto_wrap_policy=None if whole else policy,
            use_orig_params=original,
            device_id=torch.device("cpu"),
        )
        with torch.no_grad():
            found += [task(pack(UNEVEN[dist.get_rank()]))[0].item() for _ in range(2)]
    return found


@INTERPRETED
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("original", [False, True])
def test_fsdp1_infers_without_graphs(ranks, checkpoint, original, whole):
    results, replayed, reasons = zip(*ranks(in_recorded_graphs, fsdp1, checkpoint("tiny"), original, whole))
    assert not any(replayed)
    assert all(len(set(result)) == 1 for result in results)
    assert all("FSDP" in reason or "Fully" in reason for said in reasons for reason in said) and all(reasons)


def zero(stage, folder, **kwargs):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first
    task = Task(folder, **kwargs)
    return deepspeed_losses(task, {**ZERO3, "zero_optimization": {"stage": stage}}), parameters_of(task)


@INTERPRETED
@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_of_deepspeed_zero_train_as_one(ranks, checkpoint, stage):
    pytest.importorskip("deepspeed")
    results, replayed, reasons = zip(*ranks(in_recorded_graphs, zero, stage, checkpoint("tiny"), **TOKENS))
    ranks_check(results, train_alone(checkpoint("tiny"), **TOKENS))
    assert all(replayed) and not any(reasons)
