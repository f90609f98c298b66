"""Other people's training loops on packs of a budget: every epoch another order, each image once, on whatever rank;
stopped anywhere and resumed, the same batches as without the stop. A toy model, which notes what it is given."""

import contextlib
import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration
from documents import example
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import ModelOutput

from siglip2_packed.data import PatchBudgetBatchSampler, collate

LENGTHS = np.random.default_rng(0).integers(1, 100, 150).tolist()
BUDGET = 120  # orders of these come to 70 to 76 packs


class Indices(Dataset):
    """Item i is image i: all its patches hold i."""

    def __len__(self):
        return len(LENGTHS)

    def __getitem__(self, i):
        return torch.full((LENGTHS[i], 3), float(i)), (1, 1, LENGTHS[i])


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def images_of(pixel_values, cu_seqlens):
    return [int(image) for image in pixel_values[cu_seqlens[:-1].long(), 0]]


@dataclass
class Output(ModelOutput):
    loss: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None


class Notes(torch.nn.Module):
    """A parameter, and the images of each batch it was trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.batches = []

    def forward(self, pixel_values, cu_seqlens, **rest):
        self.batches.append(images_of(pixel_values, cu_seqlens))
        features = (self.weight * pixel_values / len(LENGTHS) - 0.5).square()
        return Output(loss=features.mean(), last_hidden_state=features)


def make_loader(loader=DataLoader, workers=0, **sampling):
    sampler = PatchBudgetBatchSampler(LENGTHS, BUDGET, **sampling)
    forked = dict(multiprocessing_context="fork") if workers else {}
    return sampler, loader(Indices(), batch_sampler=sampler, collate_fn=collate, num_workers=workers, **forked)


def epochs_of(count, ranks=1, rank=0, **sampling):
    """What training on `rank` has to see."""
    sampler = PatchBudgetBatchSampler(LENGTHS, BUDGET, num_replicas=ranks, rank=rank, **sampling)
    epochs = []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    return epochs


@pytest.fixture(scope="module")
def expected():
    """Of one rank: three epochs of one length, each another."""
    epochs = epochs_of(3)
    assert len({len(epoch) for epoch in epochs}) == 1
    assert len({str(epoch) for epoch in epochs}) == 3
    for epoch in epochs:
        assert sorted(flat(epoch)) == list(range(len(LENGTHS)))
    return epochs


# --- transformers' Trainer


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


class SetEpoch(TrainerCallback):
    def __init__(self, sampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch))


class PackTrainer(Trainer):
    prepared = False

    def get_train_dataloader(self):
        sampler, loader = make_loader(seed=4)
        if self.prepared:
            return self.accelerator.prepare(loader)
        self.add_callback(SetEpoch(sampler))
        return loader


class PreparedTrainer(PackTrainer):
    prepared = True


def with_trainer(trainer, output, stop=None, resume=False, accumulated=1):
    """-> the batches that were trained on."""
    model = Notes()
    arguments = TrainingArguments(
        output, use_cpu=True, num_train_epochs=3, gradient_accumulation_steps=accumulated, save_strategy="no",
        save_only_model=True, report_to="none", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    run = trainer(model=model, args=arguments, train_dataset=Indices(), callbacks=[StopAt(stop)])
    run.train(resume_from_checkpoint=resume)
    return model.batches


@pytest.mark.parametrize("accumulated", [1, 4])
@pytest.mark.parametrize("trainer", [PackTrainer, PreparedTrainer])
def test_trainer_stopped_and_resumed_sees_the_same_batches(tmp_path, trainer, accumulated):
    expected = epochs_of(3, seed=4)
    steps = -(-len(expected[0]) // accumulated)
    whole = flat(expected)
    for stop in (steps + 2 * steps // 3, 2 * steps):  # 1.67 epochs, and an end of an epoch
        first = with_trainer(trainer, str(tmp_path), stop=stop, accumulated=accumulated)
        rest = with_trainer(trainer, str(tmp_path), resume=True, accumulated=accumulated)
        assert first == whole[: len(first)] and len(first) < len(whole)
        assert rest == whole[len(first) :]


def test_trainer_on_two_ranks_resumes_with_each_rank_s_batches(ranks, tmp_path):
    expected = [flat(epochs_of(3, ranks=2, rank=rank, seed=4)) for rank in (0, 1)]
    stop = len(expected[0]) // 3 + 20
    for trainer in (PackTrainer, PreparedTrainer):
        first = ranks(with_trainer, trainer, str(tmp_path), stop=stop)
        rest = ranks(with_trainer, trainer, str(tmp_path), resume=True)
        for rank in (0, 1):
            assert first[rank] == expected[rank][:stop]
            assert rest[rank] == expected[rank][stop:]


# --- accelerate


def accelerator(**kwargs):
    """What a fresh process has."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True, **kwargs)


def readme_with_accelerate(epochs):
    """The README's text -> batches and weight."""
    accelerator()
    model = Notes()
    _, loader = make_loader(seed=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scope = dict(model=model, optimizer=optimizer, loader=loader, epochs=epochs, loss_terms=lambda features: features)
    exec(example("accelerate example"), scope)
    return model.batches, model.weight.tolist()


def trained_alone(plans, accumulated=2):
    """The weight after steps on the batches of all ranks at once. `plans`: for each rank, its epochs."""
    model = Notes()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in zip(*plans):
        steps = list(zip(*epoch))
        for k, batches in enumerate(steps, start=1):
            packed = collate([Indices()[i] for i in flat(batches)])
            (model(**packed)["last_hidden_state"].mean() / accumulated).backward()
            if k % accumulated == 0 or k == len(steps):
                optimizer.step()
                optimizer.zero_grad()
    return model.weight.tolist()


def test_accelerate_as_the_readme_has_it(expected):
    batches, weight = readme_with_accelerate(2)
    plan = epochs_of(2, seed=4)
    assert batches == flat(plan)
    assert weight == pytest.approx(trained_alone([plan]), rel=1e-7)


def test_accelerate_on_two_ranks_as_the_readme_has_it(ranks):
    results = ranks(readme_with_accelerate, 2)
    plans = [epochs_of(2, ranks=2, rank=rank, seed=4) for rank in (0, 1)]
    assert [batches for batches, _ in results] == [flat(plan) for plan in plans]
    for _, weight in results:
        assert weight == pytest.approx(trained_alone(plans), rel=1e-7)


def taken(loader):
    return [images_of(packed["pixel_values"], packed["cu_seqlens"]) for packed in loader]


def message(function):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        function()
    return str(error.value)


def prepared_loaders():
    """On a rank: the batches of two epochs under every setting, resumed in the second, and what is refused."""
    rank, found = dist.get_rank(), {}
    arguments = {
        "": {},
        "given": dict(num_replicas=2, rank=rank),
        "uneven": dict(even_batches=False, use_seedable_sampler=True),
        "stateful": dict(use_stateful_dataloader=True),
    }
    for name, given in arguments.items():
        sampling = {key: given.pop(key) for key in ("num_replicas", "rank") if key in given}
        run = accelerator(dataloader_config=DataLoaderConfiguration(**given))
        _, loader = make_loader(seed=4, **sampling)
        loader = run.prepare(loader)
        found[name] = [taken(loader), taken(loader)], len(loader)

    run = accelerator()
    for resume in ("skip", "state"):
        sampler, loader = make_loader(seed=4)
        loader = run.prepare(loader)
        if resume == "state":
            sampler.load_state_dict({**sampler.state_dict(batch=7), "epoch": 1})
            found["state lost"] = message(lambda: next(iter(loader)))
        loader.set_epoch(1)
        found[resume] = taken(run.skip_first_batches(loader, 7) if resume == "skip" else loader)

    _, loader = make_loader(seed=4)
    found["skipped before"] = message(lambda: taken(run.prepare(run.skip_first_batches(loader, 7))))
    _, loader = make_loader(num_replicas=1, rank=0)
    found["one replica"] = message(lambda: taken(run.prepare(loader)))
    run = accelerator(dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
    _, loader = make_loader()
    found["dispatched"] = message(lambda: len(run.prepare(loader)))
    return found


def test_loaders_that_accelerate_prepared_give_each_rank_its_own_batches(ranks):
    for rank, found in enumerate(ranks(prepared_loaders)):
        plan = epochs_of(2, ranks=2, rank=rank, seed=4)
        for name in ("", "given", "uneven", "stateful"):
            assert found[name] == (plan, len(plan[0])), name
        assert found["skip"] == found["state"] == plan[1][7:]
        assert "set_epoch(0) would lose the state that was loaded, batch 7 of epoch 1" in found["state lost"]
        assert "SkipBatchSampler hides the sampler from accelerate" in found["skipped before"]
        assert "2 processes, the sampler has num_replicas 1: give it num_replicas=2" in found["one replica"]
        assert "dispatch_batches" in found["dispatched"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_prepared_loader_with_workers(rank):
    accelerator()
    _, loader = make_loader(seed=4, workers=2, num_replicas=2, rank=0)
    loader = prepare_data_loader(loader, num_processes=2, process_index=rank)
    assert [taken(loader), taken(loader)] == epochs_of(2, ranks=2, rank=rank, seed=4)


def late():
    """A sampler made before its process group, as on one rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        sampler = PatchBudgetBatchSampler(LENGTHS, BUDGET, seed=4)
        assert len(sampler) == len(epochs_of(1, seed=4)[0])
    return list(sampler)


def test_the_process_group_may_be_started_after_the_sampler_is_made(ranks):
    assert ranks(late) == [epochs_of(1, ranks=2, rank=rank, seed=4)[0] for rank in (0, 1)]


# --- Lightning


class Stop(Exception):
    pass


def readme_with_lightning(folder, stop=None, ckpt_path=None, name="pytorch_lightning", **trainer):
    """The README's text -> batches."""
    lightning = pytest.importorskip(name)
    model = Notes()
    sampler, _ = make_loader(seed=4)
    lines = example("lightning example").replace("num_workers=8, pin_memory=True", "")
    head, fit = lines.replace("import pytorch_lightning as pl", f"import {name} as pl").split("trainer = ")

    class Save(lightning.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == stop:
                trainer.save_checkpoint(f"{folder}/stopped.ckpt")
                raise Stop

    settings = dict(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder,
        **{"devices": 1, "use_distributed_sampler": False, **trainer},
    )  # fmt: skip
    assert "use_distributed_sampler=False" in fit
    fit = fit.replace("use_distributed_sampler=False", "callbacks=[Save()], **settings")
    fit = fit.replace("loader)", "loader, ckpt_path=ckpt_path)")
    scope = dict(
        torch=torch, model=model, dataset=Indices(), sampler=sampler, collate=collate, epochs=3, settings=settings,
        loss_terms=lambda features: features, ckpt_path=ckpt_path, Save=Save,
    )  # fmt: skip
    with contextlib.suppress(Stop):
        exec(f"{head}trainer = {fit}", scope)
    return model.batches


@pytest.mark.parametrize("name", ["pytorch_lightning", "lightning.pytorch"])
def test_lightning_as_the_readme_has_it(tmp_path, name):
    plan = flat(epochs_of(3, seed=4))
    assert readme_with_lightning(str(tmp_path), name=name) == plan
    stop = len(plan) // 3 + 20
    for stop in (len(plan) // 3 + 20, len(plan) // 3):
        assert readme_with_lightning(str(tmp_path), stop=stop, name=name) == plan[:stop]
        assert readme_with_lightning(str(tmp_path), ckpt_path=f"{tmp_path}/stopped.ckpt", name=name) == plan[stop:]


def lightning_on_a_rank(folder, **trainer):
    environment = pytest.importorskip("pytorch_lightning.plugins.environments").TorchElasticEnvironment()
    # torchrun's ranks, of a group that runs already
    return readme_with_lightning(folder, devices=2, strategy="ddp", plugins=[environment], **trainer)


def unless_told_not_to_shard(folder):
    with pytest.raises(TypeError) as error:
        lightning_on_a_rank(folder, use_distributed_sampler=True)
    return str(error.value)


def test_lightning_on_two_ranks(ranks, tmp_path):
    pytest.importorskip("pytorch_lightning")
    batches = ranks(lightning_on_a_rank, str(tmp_path))
    assert batches == [flat(epochs_of(3, ranks=2, rank=rank, seed=4)) for rank in (0, 1)]
    for text in ranks(unless_told_not_to_shard, str(tmp_path)):
        assert "Trainer(use_distributed_sampler=False)" in text
