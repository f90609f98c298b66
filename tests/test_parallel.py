"""Training on two ranks is training on one: DDP, FSDP, tensor parallelism, checkpoints, with awkward packs."""

import contextlib
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from ranks import IMAGES, NO_IMAGES, TOKENS, UNEVEN, Task, check, pack, parameters_of, steps, train, train_alone
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel

from siglip2_packed import Siglip2PackedVisionModel
from siglip2_packed.encoder import Siglip2PackedEncoderLayer
from siglip2_packed.parallel import apply_fsdp, apply_tensor_parallel, mean_over_ranks


def ddp(task):
    return DistributedDataParallel(task)


def fsdp2(task):
    apply_fsdp(task.model, param_dtype=None, reduce_dtype=None)
    return fully_shard(task)


def fsdp2_in_larger_units(task):
    apply_fsdp(task.model, param_dtype=None, reduce_dtype=None, layers_per_unit=2)
    states = [fully_shard.state(layer) for layer in task.model.encoder.layers]
    assert states[0] is states[1] not in states[2:]
    return fully_shard(task)


TRAINING = {
    "tokens": TOKENS,
    "pooled": dict(pooled=True),
    "second to last layer": dict(select_layer=-2),
    "embeddings alone": dict(select_layer=0),
    "checkpointing": dict(TOKENS, checkpointing=True),
    "called twice": dict(TOKENS, calls=2),
    "called twice, checkpointing": dict(TOKENS, calls=2, checkpointing=True),
    "last layer": dict(TOKENS, trains="last layer"),
    "last layer, checkpointing": dict(TOKENS, trains="last layer", checkpointing=True),
    "frozen": dict(TOKENS, trains="nothing"),
    "LLaVA": dict(llava=True, calls=2, checkpointing=True),
    "LLaVA, frozen": dict(llava=True, trains="nothing"),
}


@pytest.mark.parametrize("images", [UNEVEN, NO_IMAGES], ids=["uneven", "no images on a rank"])
@pytest.mark.parametrize("training", TRAINING)
@pytest.mark.parametrize("engine", [ddp, fsdp2])
def test_two_ranks_train_as_one(ranks, checkpoint, engine, training, images):
    folder, kwargs = checkpoint("tiny"), TRAINING[training]
    check(ranks(train, engine, folder, images, **kwargs), train_alone(folder, **kwargs))


@pytest.mark.parametrize("training", ["pooled", "called twice, checkpointing", "last layer", "LLaVA"])
def test_units_of_several_layers_train_as_one(ranks, checkpoint, training):
    folder, kwargs = checkpoint("tiny"), TRAINING[training]
    check(ranks(train, fsdp2_in_larger_units, folder, NO_IMAGES, **kwargs), train_alone(folder, **kwargs))


def warned(folder, images, steps=1, **kwargs):
    """What a rank says in its first steps under DDP, and whether ranks have the same parameters after one."""
    find = kwargs.pop("find_unused_parameters", False)
    task = Task(folder, **kwargs)
    model = DistributedDataParallel(task, find_unused_parameters=find)
    packed = pack(images[dist.get_rank()])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(steps):
            with contextlib.nullcontext() if step == steps - 1 else model.no_sync():
                mean_over_ranks(*model(packed)).backward()
    said = [str(warning.message) for warning in said if "DistributedDataParallel waits" in str(warning.message)]
    return said, torch.cat([p.grad.flatten() for p in task.parameters() if p.grad is not None]).numpy()


@pytest.mark.parametrize("images", [UNEVEN, NO_IMAGES], ids=["uneven", "no images on a rank"])
def test_an_idle_head_under_ddp_is_said_in_the_step_that_goes_wrong(ranks, checkpoint, images):
    results = ranks(warned, checkpoint("tiny"), images)
    assert np.abs(results[0][1] - results[1][1]).max() > 0  # what goes wrong
    for said, _ in results:
        assert len(said) == 1
        assert "head.probe, head.attention.in_proj_weight and" in said[0] and "vision_use_head=False" in said[0]


@pytest.mark.parametrize("images", [UNEVEN, NO_IMAGES], ids=["uneven", "no images on a rank"])
@pytest.mark.parametrize(
    "kwargs",
    [
        TOKENS,
        dict(pooled=True),
        dict(pooled=True, checkpointing=True),
        dict(pooled=True, calls=2),
        dict(pooled=True, steps=2),
        dict(trains="nothing"),
        dict(trains="last layer"),
        dict(select_layer=-2),
        dict(find_unused_parameters=True),
    ],
    ids=str,
)
def test_nothing_is_said_where_ddp_averages(ranks, checkpoint, images, kwargs):
    results = ranks(warned, checkpoint("tiny"), images, **kwargs)
    assert [said for said, _ in results] == [[], []]
    assert np.array_equal(results[0][1], results[1][1])


def fsdp1(task):
    """Partly frozen units need `use_orig_params`, which the optimizer then sees; else all are flat."""
    mixed = len({p.requires_grad for p in task.parameters()}) == 2
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={Siglip2PackedEncoderLayer})
    return FullyShardedDataParallel(task, auto_wrap_policy=policy, use_orig_params=mixed, device_id=torch.device("cpu"))


@pytest.mark.parametrize("training", ["tokens", "last layer, checkpointing", "frozen"])
def test_fsdp1_trains_as_one(ranks, checkpoint, training):
    folder, kwargs = checkpoint("tiny"), TRAINING[training]
    check(ranks(train, fsdp1, folder, NO_IMAGES, **kwargs), train_alone(folder, **kwargs))


def mixed_precision(folder, images, **kwargs):
    task = Task(folder, **kwargs)
    fully_shard(apply_fsdp(task.tower) and task)
    seen = set()
    task.tower.encoder.layers[0].register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    losses, parameters = steps(task, pack(images[dist.get_rank()]), mean_over_ranks)
    return losses, parameters, seen, {x.dtype for x in (*task.parameters(), *task.buffers())}


class InBfloat16(torch.nn.Module):
    """Mixed precision on one rank."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, packed):
        cast = {name: parameter.bfloat16() for name, parameter in self.module.named_parameters()}
        return torch.func.functional_call(self.module, cast, (packed,))


@pytest.mark.parametrize("images", [UNEVEN, NO_IMAGES], ids=["uneven", "no images on a rank"])
def test_mixed_precision_computes_in_bfloat16_and_keeps_float32(ranks, checkpoint, images):
    results = ranks(mixed_precision, checkpoint("tiny"), images, **TOKENS)
    for _, _, computed, kept in results:
        assert computed == {torch.bfloat16}
        assert kept == {torch.float32}
    _, _, exact = train_alone(checkpoint("tiny"), **TOKENS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as on the ranks: the CPU's LayerNorm sums gradients in bfloat16, a thread a part
    alone = InBfloat16(Task(checkpoint("tiny"), **TOKENS))
    _, on_one_rank = steps(alone, pack(IMAGES), lambda total, count: total / count)
    torch.set_num_threads(threads)

    def error(parameters):
        return np.sqrt(sum(np.square(parameters[name] - exact[name]).sum() for name in exact))

    assert 0 < error(results[0][1]) <= 1.3 * error(on_one_rank)


def means():
    """Losses of packs of 1 and 3 terms: over both ranks, over a group of one, and of empty packs on both."""
    rank = dist.get_rank()
    groups = [dist.new_group([member]) for member in (0, 1)]
    total, count = torch.tensor(6.0 * (rank + 1)), 1 + 2 * rank
    means = mean_over_ranks(total, count), mean_over_ranks(total, count, groups[rank])
    return [mean.item() for mean in (*means, mean_over_ranks(torch.zeros(()), 0))]


def test_a_loss_is_the_mean_over_the_terms_of_its_ranks(ranks):
    assert ranks(means) == [[3.0, 6.0, 0.0], [6.0, 4.0, 0.0]]


def tensor_parallel(folder, **kwargs):
    task = Task(folder, **kwargs)
    apply_tensor_parallel(task.tower, init_device_mesh("cpu", (2,)))
    assert task.tower.encoder.layers[0].mlp.fc1.weight.to_local().shape[0] == task.tower.config.intermediate_size // 2
    return steps(task, pack(IMAGES), lambda total, count: total / count)


@pytest.mark.parametrize("training", ["tokens", "pooled", "checkpointing"])
@pytest.mark.parametrize("shape", ["tiny", "tiny72"])
def test_tensor_parallel_layers_compute_and_train_as_whole_ones(ranks, checkpoint, shape, training):
    folder, kwargs = checkpoint(shape), TRAINING[training]
    check(ranks(tensor_parallel, folder, **kwargs), train_alone(folder, **kwargs))


def test_heads_that_ranks_do_not_divide(checkpoint):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))
    with pytest.raises(ValueError, match="4 heads cannot be split over 3 ranks"):
        apply_tensor_parallel(model, SimpleNamespace(size=lambda: 3, ndim=1))
    with pytest.raises(ValueError, match="a mesh of one dimension, got 2"):
        apply_tensor_parallel(model, SimpleNamespace(size=lambda: 2, ndim=2))


def test_recipes_say_what_they_take(checkpoint):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))
    for recipe in (apply_fsdp, lambda module: apply_tensor_parallel(module, SimpleNamespace(size=lambda: 2, ndim=1))):
        with pytest.raises(ValueError, match=r"Linear has no encoder\.layers"):
            recipe(torch.nn.Linear(2, 2))
    for dtype in ("bfloat16", torch.int64):
        for name in ("param_dtype", "reduce_dtype"):
            with pytest.raises(ValueError, match=f"{name} must be a floating torch.dtype or None, got {dtype!r}"):
                apply_fsdp(model, **{name: dtype})
    for number in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"layers_per_unit must be .*{number}"):
            apply_fsdp(model, layers_per_unit=number)


@pytest.mark.parametrize("count", [-1, 1.5, True, float("nan"), "3", None])
def test_a_count_of_terms_is_a_whole_number(count):
    with pytest.raises(ValueError, match=f"count must be .*{count}"):
        mean_over_ranks(torch.tensor(1.0), count)


def test_a_loss_without_a_process_group():
    counts = {2: 3, 3: np.int64(2), 1: torch.tensor(6), 6: 0}
    for mean, count in counts.items():
        assert mean_over_ranks(torch.tensor(6.0), count) == mean
    for total in (torch.ones(2), torch.tensor(3)):
        with pytest.raises(ValueError, match="total must be the sum of the terms"):
            mean_over_ranks(total, 2)


def lora(folder, images):
    task = Task(folder, **TOKENS)
    config = LoraConfig(target_modules=["q_proj", "v_proj", "fc1"], r=4, init_lora_weights="gaussian")
    task.tower = get_peft_model(task.tower, config)
    losses, parameters = steps(DistributedDataParallel(task), pack(images[dist.get_rank()]), mean_over_ranks)
    trained = {name for name, parameter in task.tower.named_parameters() if parameter.requires_grad}
    task.eval()
    with torch.no_grad():
        adapted = task.tower(**pack(IMAGES)).last_hidden_state
        merged = task.tower.merge_and_unload()
        assert type(merged) is Siglip2PackedVisionModel
        after = merged(**pack(IMAGES)).last_hidden_state
    return losses, parameters, trained, (adapted.numpy(), after.numpy())


def test_lora_under_ddp_and_merged(ranks, checkpoint):
    folder = checkpoint("tiny")
    results = ranks(lora, folder, UNEVEN)
    with torch.no_grad():
        base = Siglip2PackedVisionModel.from_pretrained(folder)(**pack(IMAGES)).last_hidden_state
    start = parameters_of(Task(folder, **TOKENS))
    assert np.mean([losses[1] for losses, *_ in results]) < np.mean([losses[0] for losses, *_ in results])
    for _, parameters, trained, (adapted, merged) in results:
        assert len(trained) == 3 * 3 * 2
        assert all("lora_" in name for name in trained)
        for name, value in start.items():
            if name.startswith("tower"):  # q_proj.weight is now q_proj.base_layer.weight
                plain = {
                    n.replace("base_model.model.", "").replace("base_layer.", ""): v for n, v in parameters.items()
                }
                assert np.array_equal(plain[name], value), name
        np.testing.assert_allclose(merged, adapted, atol=1e-5)
        assert np.abs(adapted - base.numpy()).max() > 1e-3
    for name, value in results[0][1].items():
        np.testing.assert_array_equal(value, results[1][1][name])


def optimizer_of(task):
    return torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-2)


def train_and_save(folder, ckpt, sharded, count):
    """Trains with AdamW on all ranks, saves after `count` steps, goes on for as many -> parameters at the end."""
    task = fsdp2(Task(folder, **TOKENS)) if sharded else Task(folder, **TOKENS)
    optimizer = optimizer_of(task)
    for step in range(2 * count):
        if step == count:
            model_state, optimizer_state = get_state_dict(task, optimizer)
            dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=ckpt, no_dist=not sharded)
        adam_step(task, optimizer, sharded)
    return parameters_of(task)


def resume(folder, ckpt, sharded, count):
    """Loads into a model of other weights and goes on -> parameters at the end."""
    task = Task(folder, **TOKENS)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(1.0)
    task = fsdp2(task) if sharded else task
    optimizer = optimizer_of(task)
    model_state, optimizer_state = get_state_dict(task, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=ckpt, no_dist=not sharded)
    set_state_dict(task, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for _ in range(count):
        adam_step(task, optimizer, sharded)
    return parameters_of(task)


def adam_step(task, optimizer, sharded):
    if sharded:
        loss = mean_over_ranks(*task(pack(UNEVEN[dist.get_rank()])))
    else:
        total, count = task(pack(IMAGES))
        loss = total / count
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("first", ["two ranks", "one"])
def test_a_checkpoint_resumes_at_another_world_size(ranks, checkpoint, tmp_path, first):
    folder, two = checkpoint("tiny"), first == "two ranks"
    if two:
        expected = ranks(train_and_save, folder, str(tmp_path), True, 2)[0]
        resumed = resume(folder, str(tmp_path), False, 2)
    else:
        expected = train_and_save(folder, str(tmp_path), False, 2)
        resumed = ranks(resume, folder, str(tmp_path), True, 2)[1]
    assert resumed.keys() == expected.keys()
    for name, value in expected.items():
        if "k_proj.bias" not in name:  # its gradient is rounding, which Adam scales to full steps
            np.testing.assert_allclose(resumed[name], value, atol=2e-4, err_msg=name)
