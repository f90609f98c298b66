"""Batches by patch budget: every image once, ranks of even cost, an epoch that can be gone on with anywhere."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from siglip2_packed import batch_sampler
from siglip2_packed.data import SO400M_COST, PatchBudgetBatchSampler, collate, fill_packs
from siglip2_packed.workloads import grids


def sizes(workload="mixed", images=1000, seed=0):
    return np.array([t * h * w for t, h, w in grids(workload, images=images, seed=seed)])


def samplers(lengths, budget, world, **arguments):
    return [PatchBudgetBatchSampler(lengths, budget, num_replicas=world, rank=r, **arguments) for r in range(world)]


def epoch_of(lengths, budget, world, **arguments):
    """For each rank, its batches."""
    ranks = samplers(lengths, budget, world, **arguments)
    batches = [list(sampler) for sampler in ranks]
    assert [len(b) for b in batches] == [len(sampler) for sampler in ranks]
    return batches


# --- every image once


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 23, 101, 500])
@pytest.mark.parametrize(("budget", "max_images"), [(1024, None), (4096, None), (4096, 3)])
def test_every_image_once_on_equally_many_batches(count, world, drop_last, shuffle, budget, max_images):
    lengths = sizes(images=count, seed=count)
    batches = epoch_of(lengths, budget, world, drop_last=drop_last, shuffle=shuffle, max_images=max_images, seed=3)
    assert len({len(of_rank) for of_rank in batches}) == 1
    packs = [pack for of_rank in batches for pack in of_rank]
    assert all(pack and lengths[pack].sum() <= budget and len(pack) <= (max_images or count) for pack in packs)
    assert all(len(set(pack)) == len(pack) and all(type(i) is int for i in pack) for pack in packs)

    seen = Counter(i for pack in packs for i in pack)
    extra = sum(seen.values()) - count
    if drop_last:
        assert max(seen.values(), default=1) == 1
        assert 0 <= -extra < world
    else:
        assert set(seen) == set(range(count))
        assert 0 <= extra < world
    if extra:  # no batch with two images was spared
        assert max(map(len, packs), default=1) == 1


def test_repeated_and_dropped_images_are_as_few_as_possible():
    full = [10] * 5  # one a pack: two ranks need six packs, or leave one image out
    assert Counter(i for r in epoch_of(full, 10, 2) for p in r for i in p).total() == 6
    assert Counter(i for r in epoch_of(full, 10, 2, drop_last=True) for p in r for i in p).total() == 4
    # packs of 1, 1, 1 and 2 images on three ranks: the pair is not the one to leave out
    assert Counter(i for r in epoch_of([10, 10, 10, 3, 3], 10, 3, drop_last=True) for p in r for i in p).total() == 4
    # two ranks, one pack would hold all: it is divided, nothing is repeated or dropped, in either mode
    for drop_last in (True, False):
        assert sorted(i for r in epoch_of([3, 3], 10, 2, drop_last=drop_last) for p in r for i in p) == [0, 1]
    # fewer images than ranks
    assert [len(r) for r in epoch_of([3] * 3, 10, 8)] == [1] * 8
    assert sorted(Counter(i for r in epoch_of([3] * 3, 10, 8) for p in r for i in p).values()) == [2, 3, 3]
    assert [len(r) for r in epoch_of([3] * 3, 10, 8, drop_last=True)] == [0] * 8


def test_an_empty_data_set_has_no_batches():
    for empty in ([], np.zeros(0, np.int64), torch.zeros(0, 3, dtype=torch.int64)):
        sampler = PatchBudgetBatchSampler(empty, 10)
        assert len(sampler) == 0 and list(sampler) == []
        assert sampler.utilisation == 1.0
        assert list(DataLoader([], batch_sampler=sampler, collate_fn=collate)) == []


# --- order


def test_an_epoch_follows_from_seed_and_epoch():
    lengths = sizes(images=300)
    first, again, other = (
        samplers(lengths, 4096, 1)[0],
        samplers(lengths, 4096, 1)[0],
        samplers(lengths, 4096, 1, seed=1)[0],
    )
    assert list(first) == list(again) == list(first) != list(other)
    epoch0 = list(first)
    first.set_epoch(1)
    assert list(first) != epoch0
    again.set_epoch(1)
    assert list(first) == list(again)
    first.set_epoch(0)
    assert list(first) == epoch0


@pytest.mark.parametrize(
    ("world", "drop_last", "high"), [(1, False, 100), (2, False, 100), (3, True, 121), (8, True, 60)]
)
def test_every_epoch_has_as_many_batches_and_every_image(world, drop_last, high):
    """Orders of these images come to different numbers of packs: an engine that counts steps would lose some."""
    lengths = np.random.default_rng(1).integers(min(high // 2, 30), high, 200)
    ranks = samplers(lengths, 120, world, drop_last=drop_last)
    packs, orders = set(), set()
    for epoch in range(20):
        for sampler in ranks:
            sampler.set_epoch(epoch)
        batches = [list(sampler) for sampler in ranks]
        packs |= {len(of_rank) for of_rank in batches}
        orders.add(str(batches))
        seen = Counter(i for of_rank in batches for pack in of_rank for i in pack)
        assert max(seen.values()) == 1 and len(seen) > len(lengths) - (world if drop_last else 1)
        assert all(pack and lengths[pack].sum() <= 120 for of_rank in batches for pack in of_rank)
    assert len(packs) == 1
    assert len(orders) == 20


def test_an_epoch_that_fits_in_no_order_takes_the_packs_of_the_first(monkeypatch):
    lengths = np.random.default_rng(0).integers(1, 100, 300)
    sampler = PatchBudgetBatchSampler(lengths, 120)
    first = list(sampler)
    monkeypatch.setattr(batch_sampler, "ORDERS", 1)
    epochs = []
    for epoch in range(1, 8):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert {len(epoch) for epoch in epochs} == {len(first)}
    again = [sorted(map(sorted, epoch)) == sorted(map(sorted, first)) for epoch in epochs]
    assert any(again) and not all(again)
    assert first not in epochs  # in another order of steps


def test_ranks_need_not_talk_and_do_not_always_get_the_same_share():
    lengths = sizes(images=2000)
    batches = epoch_of(lengths, 4096, 4)
    cost = np.array([[cost_of(lengths, pack) for pack in of_rank] for of_rank in batches])
    assert set(cost.argmax(axis=0).tolist()) == {0, 1, 2, 3}


def test_packs_are_mixtures_and_unshuffled_ones_follow_the_data_set():
    lengths = sizes(images=2000)
    share = lengths.mean()
    means = [lengths[pack].mean() for pack in epoch_of(lengths, 16384, 1)[0]]
    assert np.std(means) < 0.5 * share  # sorted by size, it would be about the spread of the images, 0.9 of the mean
    firsts = [pack[0] for pack in epoch_of(lengths, 4096, 1, shuffle=False)[0][1:-2]]
    assert firsts[0] < firsts[-1] and sorted(firsts) == firsts


def test_fill_packs_takes_the_next_and_then_the_largest_that_fit():
    assert list(fill_packs([5, 5, 3, 4, 1, 2], 8)) == [[0, 2], [1, 5, 4], [3]]
    assert list(fill_packs([5, 5, 3, 4, 1, 2], 8, window=2)) == [[0, 2], [1, 4], [3, 5]]
    assert list(fill_packs([5, 5, 3, 4, 1, 2], 8, window=1)) == [[0], [1, 2], [3, 4, 5]]
    assert list(fill_packs([1] * 5, 8, max_images=2)) == [[0, 1], [2, 3], [4]]
    assert list(fill_packs([], 8)) == []


# --- utilisation and balance


def cost_of(lengths, pack):
    a, b = SO400M_COST
    return sum(a * n + b * n * n for n in lengths[pack].tolist())


@pytest.mark.parametrize("images", [1000, 5000])
@pytest.mark.parametrize("budget", [4096, 8192, 16384])
@pytest.mark.parametrize("world", [1, 2, 8])
def test_utilisation_of_mixed_sizes(budget, images, world):
    for seed in range(3):
        lengths = sizes(images=images, seed=seed)
        sampler = PatchBudgetBatchSampler(lengths, budget, num_replicas=world, rank=0, seed=seed)
        total = lengths.sum()
        assert sampler.utilisation == pytest.approx(total / (budget * world * len(sampler)))
        # no packing has fewer steps than this; with few steps, the last one's rest is what is left of the 5%
        least = -(-total // (budget * world))
        assert sampler.utilisation >= 0.95 or len(sampler) == least
        assert len(sampler) <= least + max(1, 0.02 * least)
        fills = np.sort([lengths[pack].sum() / budget for pack in fill_packs(lengths.tolist(), budget)])
        assert fills[1:].mean() >= 0.98  # every pack but the last


def test_utilisation_of_mixed_sizes_is_95_percent():
    for budget, seed in itertools.product([4096, 8192, 16384], range(5)):
        sampler = PatchBudgetBatchSampler(sizes(images=1000, seed=seed), budget, seed=seed)
        assert sampler.utilisation >= 0.95


@pytest.mark.parametrize("budget", [4096, 16384])
@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_have_about_the_same_cost_in_every_step(world, budget):
    for seed in range(3):
        lengths = sizes(images=5000, seed=seed)
        batches = epoch_of(lengths, budget, world, seed=seed)
        cost = np.array([[cost_of(lengths, pack) for pack in of_rank] for of_rank in batches])
        imbalance = np.sort(cost.max(axis=0) / cost.mean(axis=0))
        assert imbalance.mean() <= 1.01
        assert imbalance[:-2].max() <= 1.03
        assert imbalance.max() <= 1.15  # one of the two steps that share the rest


def test_the_quadratic_term_counts():
    """Packs of one 64x64 image and of 16 16x16 images have as many patches, not the same cost."""
    lengths = np.array([4096] * 8 + [256] * 128)
    batches = epoch_of(lengths, 4096, 2)
    for step in zip(*batches):
        assert len({len(pack) for pack in step}) == 1
    linear = [epoch_of(lengths, 4096, 2, seed=seed, cost=(1, 0)) for seed in range(4)]
    assert any(len({len(pack) for pack in step}) > 1 for batches in linear for step in zip(*batches))


@pytest.mark.parametrize(
    ("cost", "high", "seed"),
    [((0.1, 0.3), 5, 36), ((0.1, 0), 10, 42), ((0.7, 0.1), 5, 167), ((1e-300, 0), 5, 0), ((1e308, 0), 5, 0)],
)
def test_evening_costs_that_are_no_whole_numbers_comes_to_an_end(cost, high, seed):
    """Their sums in floating point gave an image to and fro for ever, in the first three."""
    lengths = np.random.default_rng(seed).integers(1, high, 24)
    steps = zip(*epoch_of(lengths, 40, 8, cost=cost))
    assert sorted(i for step in steps for pack in step for i in pack) == list(range(24))


def test_evening_the_cost_keeps_to_the_budget():
    lengths = np.array([3000, 1096] + [256] * 16)
    for (pack,) in epoch_of(lengths, 4096, 2, cost=(0, 1), shuffle=False):
        assert lengths[pack].sum() == 4096


def test_frames_of_a_video_are_segments():
    videos = PatchBudgetBatchSampler([(4, 8, 8), (1, 16, 16)], 256, cost=(0, 1))
    assert videos._costs == [4 * 64**2, 256**2]
    assert sorted(map(sorted, videos)) == [[0], [1]]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "uint64"])
def test_small_integers_do_not_overflow(dtype):
    for sizes in ([(1, 13, 100), (1, 16, 16), (1, 100, 120)], [100, 120]):
        small, plain = (PatchBudgetBatchSampler(np.array(sizes, dt), 20000) for dt in (dtype, np.int64))
        assert (small._lengths, small._costs) == (plain._lengths, plain._costs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(lengths=[5, 11, 3], budget=10), "image 1 has 11 patches, the budget of a batch is 10"),
        (dict(lengths=[(1, 3, 3), (2, 2, 3)], budget=10), "image 1 has 12 patches, the budget of a batch is 10"),
        (dict(lengths=[5, 0], budget=10), "image 1 has 0 patches"),
        (dict(lengths=[(1, 2, 2), (0, 0, 0)], budget=10), "image 1 has 0 patches"),
        (dict(lengths=[(-1, -2, 2)], budget=10), "image 0"),
        (dict(lengths=[1.0, 2.0], budget=10), "must be integers"),
        (dict(lengths=[(1, 2)], budget=10), r"int64 \[1, 2\]"),
        (dict(lengths=[1], budget=0), "budget must be at least 1, got 0"),
        (dict(lengths=[1], budget=1, max_images=0), "max_images must be at least 1, got 0"),
        (dict(lengths=[1], budget=1, num_replicas=2, rank=2), r"within 0..1, got 2"),
        (dict(lengths=[1], budget=1, cost=(0, 0)), "cost"),
        (dict(lengths=[(1, -2, -2)], budget=10), r"image 0 has the grid \(1, -2, -2\)"),
        (dict(lengths=[(1, 2**40, 2**40)], budget=10), f"image 0 has {2**80} patches"),
        (dict(lengths=np.array([3, 2**63], np.uint64), budget=10), f"image 1 has {2**63} patches"),
        (dict(lengths=[True, True], budget=10), "must be integers"),
        (dict(lengths=["3"], budget=10), "must be integers"),
        (dict(lengths=[float("nan")], budget=10), "must be integers"),
        (dict(lengths=None, budget=10), "must be integers"),
        (dict(lengths=[[(1, 2, 2)]], budget=10), "must be integers"),
        (dict(lengths=[1], budget=1, rank=3), r"within 0..0, got 3"),
    ],
)
def test_errors_name_the_image_and_both_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        PatchBudgetBatchSampler(**arguments)


@pytest.mark.parametrize("value", [1.5, 2.0, "2", True, np.True_, float("nan"), [1], -1, np.int64(-3)])
@pytest.mark.parametrize("name", ["budget", "max_images", "window", "seed", "num_replicas", "rank"])
def test_numbers_are_whole_and_not_negative(name, value):
    arguments = {"lengths": [1], "budget": 4, **({"num_replicas": 2} if name == "rank" else {}), name: value}
    with pytest.raises(ValueError, match=f"{name} must be") as error:
        PatchBudgetBatchSampler(**arguments)
    assert str(value).strip("[]") in str(error.value)


@pytest.mark.parametrize(
    "cost",
    [
        (float("nan"), 1),
        (1, float("nan")),
        (float("inf"), 1),
        (-1, 2),
        (1,),
        (1, 2, 3),
        "12",
        ("1", "2"),
        3,
        None,
        (True, 1),
    ],
)
def test_a_cost_is_two_finite_numbers(cost):
    with pytest.raises(ValueError, match="cost must be two numbers") as error:
        PatchBudgetBatchSampler([1], 4, cost=cost)
    assert repr(cost) in str(error.value)


@pytest.mark.parametrize("name", ["shuffle", "drop_last"])
def test_switches_are_true_or_false(name):
    for value in ("False", None, 0.5):
        with pytest.raises(ValueError, match=f"{name} must be True or False, got {value!r}"):
            PatchBudgetBatchSampler([1], 4, **{name: value})


def test_whole_numbers_of_every_kind():
    sampler = PatchBudgetBatchSampler([1] * 9, np.int32(4), max_images=torch.tensor(2), cost=(np.float32(1), 0))
    sampler.set_epoch(np.int64(2))
    assert list(sampler) and all(len(pack) <= 2 for pack in sampler)


def test_epochs_and_batches_that_are_none():
    sampler = PatchBudgetBatchSampler([1] * 9, 2)
    for epoch in (1.67, "1", -1, True, None):
        with pytest.raises(ValueError, match=f"epoch must be .*{epoch}"):
            sampler.set_epoch(epoch)
    for batch in (-1, 1.0, True, 99):
        with pytest.raises(ValueError, match=f"batch .*{batch}"):
            sampler.state_dict(batch=batch)
    state = sampler.state_dict(batch=3)
    for wrong in (dict(batch=-1), dict(batch=99), dict(epoch=-2), dict(epoch=0.5), dict(batches="5")):
        with pytest.raises(ValueError, match=str(*wrong.values())):
            sampler.load_state_dict({**state, **wrong})
    with pytest.raises(ValueError, match="epoch 0 of the state has 7 batches, here 5"):
        sampler.load_state_dict({**state, "batches": 7})
    with pytest.raises(ValueError, match="without batches, cost"):
        sampler.load_state_dict({name: value for name, value in state.items() if name not in ("batches", "cost")})
    with pytest.raises(ValueError, match="num_replicas is 8 and torch.distributed does not run: give a rank"):
        list(PatchBudgetBatchSampler([1] * 9, 2, num_replicas=8))


def test_an_epoch_before_that_of_a_loaded_state_is_refused():
    """A loop that begins with epoch 0 would lose the state without a word."""
    sampler = PatchBudgetBatchSampler([1] * 9, 2)
    sampler.load_state_dict({**sampler.state_dict(batch=3), "epoch": 2})
    with pytest.raises(ValueError, match=r"set_epoch\(0\) would lose the state that was loaded, batch 3 of epoch 2"):
        sampler.set_epoch(0)
    assert len(list(sampler)) == len(sampler) - 3
    sampler.set_epoch(0)
    assert len(list(sampler)) == len(sampler)


@pytest.mark.parametrize("length", [0, -1, 9])
def test_a_length_that_fits_no_pack_is_an_error_not_an_end(length):
    with pytest.raises(ValueError, match=f"image 1 has {length} patches, a pack holds 1 to 8"):
        list(fill_packs([3, length, 4], 8))
    for name in ("budget", "max_images", "window"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            list(fill_packs([3], **{"budget": 8, name: 0}))


# --- resuming


class Indices(Dataset):
    """Item i is image i: all its patches hold i."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        return torch.full((int(self.lengths[i]), 3), float(i)), (1, 1, int(self.lengths[i]))


def delivered(loader):
    return [[int(image) for image in packed["pixel_values"][packed["cu_seqlens"][:-1].long(), 0]] for packed in loader]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_resuming_at_every_batch_equals_the_uninterrupted_run(workers, world):
    lengths = [n // 16 + 1 for n in sizes(images=40).tolist()]
    rank = world - 1

    def loader(**sampling):
        sampler = PatchBudgetBatchSampler(lengths, 128, num_replicas=world, rank=rank, seed=5)
        prefetch = dict(prefetch_factor=3, multiprocessing_context="fork") if workers else {}
        return sampler, DataLoader(
            Indices(lengths), batch_sampler=sampler, collate_fn=collate, num_workers=workers, **prefetch
        )

    sampler, batches = loader()
    expected = {}
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        expected[epoch] = delivered(batches)
    assert expected[0] != expected[1]

    for done in range(len(expected[0]) + 1):
        sampler, batches = loader()
        running = iter(batches)
        for _ in range(done):
            next(running)
        state = sampler.state_dict(batch=done)  # prefetching has asked for more than was delivered
        if workers and 0 < done < len(expected[0]):
            assert sampler.state_dict()["batch"] > done
        del running

        sampler, batches = loader()
        sampler.load_state_dict(state)
        sampler.set_epoch(0)
        assert delivered(batches) == expected[0][done:]
        sampler.set_epoch(1)
        assert delivered(batches) == expected[1]


def test_state_without_workers_counts_what_was_handed_out_and_survives_a_second_interruption():
    lengths = sizes(images=300)
    sampler = PatchBudgetBatchSampler(lengths, 4096)
    sampler.set_epoch(2)
    expected = list(sampler)
    part = list(itertools.islice(sampler, 5))
    state = sampler.state_dict()
    assert (state["epoch"], state["batch"]) == (2, 5)

    sampler = PatchBudgetBatchSampler(lengths, 4096)
    sampler.load_state_dict(state)
    assert sampler.state_dict() == state
    part += itertools.islice(sampler, 3)
    state = sampler.state_dict()
    assert state["batch"] == 8

    sampler = PatchBudgetBatchSampler(torch.as_tensor(lengths), 4096)
    sampler.load_state_dict(state)
    assert part + list(sampler) == expected
    assert sampler.state_dict()["batch"] == len(expected)
    assert list(sampler) == expected  # an iteration after that is whole
    sampler.load_state_dict(state)
    sampler.set_epoch(3)  # another epoch begins at its beginning
    assert sampler.state_dict()["batch"] == 0
    assert len(list(sampler)) == len(sampler)
    sampler.set_epoch(2)
    over = sampler.state_dict(batch=len(sampler))
    sampler.set_epoch(3)
    sampler.load_state_dict(over)  # as StatefulDataLoader does, after set_epoch: what is over takes nothing back
    assert sampler.state_dict()["epoch"] == 3 and len(list(sampler)) == len(sampler)


def test_a_state_of_another_run_is_refused_with_both_numbers():
    lengths = sizes(images=50)
    state = PatchBudgetBatchSampler(lengths, 4096, num_replicas=2, rank=0).state_dict()
    PatchBudgetBatchSampler(lengths, 4096, num_replicas=2, rank=1).load_state_dict(state)
    for other, message in [
        (PatchBudgetBatchSampler(lengths, 4096), "num_replicas 2, this one has 1"),
        (PatchBudgetBatchSampler(lengths, 8192, num_replicas=2, rank=0), "budget 4096, this one has 8192"),
        (PatchBudgetBatchSampler(lengths[1:], 4096, num_replicas=2, rank=0), "images 50, this one has 49"),
        (PatchBudgetBatchSampler(lengths[::-1], 4096, num_replicas=2, rank=0), "lengths_crc32"),
        (PatchBudgetBatchSampler(lengths, 4096, num_replicas=2, rank=0, seed=1), "seed 0, this one has 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="batch is 99, epoch 0 has"):
        PatchBudgetBatchSampler(lengths, 4096).state_dict(batch=99)


@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_dataloader_resumes_without_being_told(workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    lengths = [n // 16 + 1 for n in sizes(images=40).tolist()]

    def loader(epoch):
        sampler = PatchBudgetBatchSampler(lengths, 128, seed=5)
        sampler.set_epoch(epoch)
        return sampler, stateful(Indices(lengths), batch_sampler=sampler, collate_fn=collate, num_workers=workers)

    epochs = [delivered(loader(epoch)[1]) for epoch in (0, 1)]
    for done in (0, 1, 4, len(epochs[0])):
        _, batches = loader(0)
        assert len(list(zip(range(done), batches))) == done
        state = batches.state_dict()
        _, batches = loader(0)
        batches.load_state_dict(state)
        assert delivered(batches) == epochs[0][done:]

    _, batches = loader(0)
    assert delivered(batches) == epochs[0]
    state = batches.state_dict()
    _, batches = loader(1)  # the next epoch, before the state of the one that is over arrives
    batches.load_state_dict(state)
    assert delivered(batches) == epochs[1]


@pytest.mark.gpu
def test_dataloader_with_pinned_memory():
    lengths = sizes(images=20) // 16 + 1
    sampler = PatchBudgetBatchSampler(lengths, 128)
    loader = DataLoader(Indices(lengths), batch_sampler=sampler, collate_fn=collate, num_workers=1, pin_memory=True)
    for packed in loader:
        assert packed["pixel_values"].is_pinned() and not packed["cu_seqlens"].is_pinned()
        assert packed.to("cuda", non_blocking=True)["pixel_values"].is_cuda
