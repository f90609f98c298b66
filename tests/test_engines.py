"""The tower in other people's training loops, on two ranks: transformers' Trainer with accelerate, DeepSpeed ZeRO-3."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import TOKENS, UNEVEN, Task, check, pack, parameters_of, train_alone
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from siglip2_packed.data import PatchBudgetBatchSampler, collate
from siglip2_packed.parallel import mean_over_ranks

ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def partitioned(make):
    """What transformers builds and loads under ZeRO-3: a part of every parameter on each rank."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first
    keeps = HfDeepSpeedConfig(ZERO3)
    module = make()
    del keeps
    return module


def whole(module):
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        return parameters_of(module)


def zero3(folder, **kwargs):
    task = partitioned(lambda: Task(folder, **kwargs))
    assert all(p.numel() == 0 and p.ds_tensor.numel() <= -(-p.ds_numel // 2) for p in task.tower.parameters())
    return deepspeed_losses(task, ZERO3), whole(task)


def deepspeed_losses(task, config):
    """Of two steps."""
    import deepspeed

    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.3)
    engine, *_ = deepspeed.initialize(model=task, optimizer=optimizer, config=config)
    losses = []
    for _ in range(2):
        loss = mean_over_ranks(*engine(pack(UNEVEN[dist.get_rank()])))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "kwargs",
    [TOKENS, dict(TOKENS, checkpointing=True), dict(TOKENS, trains="last layer"), dict(llava=True, calls=2)],
    ids=["tokens", "checkpointing", "last layer", "LLaVA, called twice"],
)
def test_deepspeed_zero3_trains_as_one_process(ranks, checkpoint, kwargs):
    pytest.importorskip("deepspeed")
    results = ranks(zero3, checkpoint("tiny"), **kwargs)
    check(results, train_alone(checkpoint("tiny"), **kwargs))


def load_vlm(folder, **kwargs):
    from test_llava_weights import Vlm

    vlm = partitioned(lambda: Vlm.from_pretrained(folder, **kwargs))
    assert vlm.vision_tower.is_loaded
    return whole(vlm.vision_tower)


@pytest.mark.parametrize("delay_load", [True, False])
@pytest.mark.parametrize("tower_saved", [True, False])
def test_a_vlm_loaded_under_zero3_keeps_its_tower(ranks, checkpoint, tmp_path, tower_saved, delay_load):
    """Its own if its checkpoint has one, else the base: never random, never the base over its own."""
    pytest.importorskip("deepspeed")
    from test_llava_weights import Vlm, VlmConfig

    base = str(checkpoint("tiny"))
    vlm = Vlm(VlmConfig(base if tower_saved else None))
    if tower_saved:
        with torch.no_grad():
            for parameter in vlm.parameters():
                parameter.add_(0.1)
    vlm.save_pretrained(tmp_path)
    expected = parameters_of((vlm if tower_saved else Vlm(VlmConfig(base))).vision_tower)
    for loaded in ranks(load_vlm, str(tmp_path), mm_vision_tower=base, delay_load=delay_load):
        assert loaded.keys() == expected.keys()
        for name, value in expected.items():
            assert np.array_equal(loaded[name], value), name


SHUFFLED = [(1, 13, 19), (1, 7, 1), (1, 3, 4), (1, 8, 32), (1, 2, 3), (1, 5, 5), (1, 16, 4), (1, 1, 9)]
BUDGET = 300


class Loss(Task):
    """What Trainer calls: batch in, loss out."""

    def forward(self, **packed):
        return {"loss": mean_over_ranks(*super().forward(packed))}

    def gradient_checkpointing_enable(self, **kwargs):
        self.tower.gradient_checkpointing_enable(**kwargs)


class PackTrainer(Trainer):
    """Batches of a sampler that shards by itself: accelerate must not do it again."""

    def get_train_dataloader(self):
        sampler = PatchBudgetBatchSampler([h * w for _, h, w in SHUFFLED], BUDGET, seed=1)
        self.add_callback(SetEpoch(sampler))
        return DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=collate)


class SetEpoch(TrainerCallback):
    def __init__(self, sampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch))


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return len(SHUFFLED)

    def __getitem__(self, index):
        return pack([SHUFFLED[index]])


def with_trainer(folder, output, checkpointing):
    task = Loss(folder, **TOKENS)
    arguments = TrainingArguments(
        output, use_cpu=True, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0,
        num_train_epochs=2, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        ddp_find_unused_parameters=False, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    trainer = PackTrainer(model=task, args=arguments, train_dataset=Images())
    trainer.train()
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, parameters_of(task)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_on_packs_of_a_budget(ranks, checkpoint, tmp_path, checkpointing):
    folder = checkpoint("tiny")
    results = ranks(with_trainer, folder, str(tmp_path), checkpointing)

    task = Task(folder, dtype=torch.float64, **TOKENS).double()
    start = parameters_of(task)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    plans = [
        PatchBudgetBatchSampler([h * w for _, h, w in SHUFFLED], BUDGET, seed=1, num_replicas=2, rank=r) for r in (0, 1)
    ]
    losses = []
    for epoch in range(2):
        for plan in plans:
            plan.set_epoch(epoch)
        for batches in zip(*plans):
            total, count = task(pack([SHUFFLED[i] for batch in batches for i in batch]).to(torch.float64))
            loss = total / count
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert len(losses) > 3
    check(
        [(np.array(logged), parameters) for logged, parameters in results[:1]],
        (start, losses, parameters_of(task)),
        1e-4,
    )
    for name, value in results[0][1].items():
        assert np.array_equal(value, results[1][1][name]), name
