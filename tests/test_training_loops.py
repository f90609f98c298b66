"""Other people's training loops on packs of a budget: every epoch another order, each image once, on whatever rank;
stopped anywhere and resumed, the same batches as without the stop. A toy model, which notes what it is given."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from siglip2_packed.data import PatchBudgetBatchSampler, collate

LENGTHS = np.random.default_rng(0).integers(1, 100, 150).tolist()
BUDGET = 120  # orders of these come to 70 to 76 packs


class Indices(Dataset):
    """Item i is image i: all its patches hold i."""

    def __len__(self):
        return len(LENGTHS)

    def __getitem__(self, i):
        return torch.full((LENGTHS[i], 3), float(i)), (1, 1, LENGTHS[i])


def images_of(pixel_values, cu_seqlens):
    return [int(image) for image in pixel_values[cu_seqlens[:-1].long(), 0]]


class Notes(torch.nn.Module):
    """A parameter, and the images of each batch it was trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.batches = []

    def forward(self, pixel_values, cu_seqlens, **rest):
        self.batches.append(images_of(pixel_values, cu_seqlens))
        return {"loss": self.weight * pixel_values.mean()}


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
        assert sorted(sum(epoch, [])) == list(range(len(LENGTHS)))
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
    whole = sum(expected, [])
    for stop in (steps + 2 * steps // 3, 2 * steps):  # 1.67 epochs, and an end of an epoch
        first = with_trainer(trainer, str(tmp_path), stop=stop, accumulated=accumulated)
        rest = with_trainer(trainer, str(tmp_path), resume=True, accumulated=accumulated)
        assert first == whole[: len(first)] and len(first) < len(whole)
        assert rest == whole[len(first) :]


def test_trainer_on_two_ranks_resumes_with_each_rank_s_batches(ranks, tmp_path):
    expected = [sum(epochs_of(3, ranks=2, rank=rank, seed=4), []) for rank in (0, 1)]
    stop = len(expected[0]) // 3 + 20
    for trainer in (PackTrainer, PreparedTrainer):
        first = ranks(with_trainer, trainer, str(tmp_path), stop=stop)
        rest = ranks(with_trainer, trainer, str(tmp_path), resume=True)
        for rank in (0, 1):
            assert first[rank] == expected[rank][:stop]
            assert rest[rank] == expected[rank][stop:]
