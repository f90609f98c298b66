import io
import itertools
import random
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.pin_memory import pin_memory

from siglip2_packed import PackedPatches, Siglip2PackedImageProcessor
from siglip2_packed.data import SO400M_COST, PatchBudgetBatchSampler, collate, fill_packs, image_grid, image_grids
from siglip2_packed.workloads import grids

ORIENTATION = 0x0112


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
    ],
)
def test_errors_name_the_image_and_both_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        PatchBudgetBatchSampler(**arguments)


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


# --- lengths from headers


def encoded(size, form="JPEG", orientation=None, mode="RGB", **options):
    file = io.BytesIO()
    exif = Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    Image.new(mode, size, 90).save(file, form, **options)
    return file.getvalue()


def processor_grid(processor, source):
    return tuple(processor(source)["grid_thw"][0].tolist())


def test_header_grids_equal_the_processors_over_random_sizes(tmp_path):
    rng = random.Random(0)
    processor = Siglip2PackedImageProcessor(patch_size=16, max_num_patches=64)
    files = []
    for i, size in enumerate(
        [(31, 639), (639, 31), (1, 1), (1, 300), (300, 1)]
        + [(rng.randint(1, 400), rng.randint(1, 400)) for _ in range(235)]
    ):
        path = tmp_path / f"{i}"
        form = ("JPEG", "PNG", "WEBP")[i % 3]
        path.write_bytes(encoded(size, form, orientation=(None, 1, 2, 3, 4, 5, 6, 7, 8)[i // 3 % 9], mode="RGB"))
        files.append(path)
    found = image_grids(files, processor)
    expected = torch.cat([processor([file])["grid_thw"] for file in files])
    assert found.dtype == torch.int64 and found.shape == (240, 3)
    assert torch.equal(found, expected)
    assert (found[:, 1] != found[:, 2]).sum() > 200


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [None, *range(0, 10)])
def test_header_grids_honour_the_orientation(form, orientation):
    processor = Siglip2PackedImageProcessor(patch_size=16, max_num_patches=256)
    source = encoded((40, 20), form, orientation)
    expected = processor_grid(processor, source)
    assert expected == ((1, 22, 11) if orientation in (5, 6, 7, 8) else (1, 11, 22))
    assert image_grid(source, processor) == expected
    assert image_grid(Image.open(io.BytesIO(source)), processor) == expected
    assert image_grid(io.BytesIO(source), processor) == expected


@pytest.mark.parametrize("form", ["BMP", "GIF", "ICO", "PPM", "TGA", "JPEG2000", "MPO"])
def test_header_grids_of_other_formats(form):
    processor = Siglip2PackedImageProcessor(patch_size=4, max_num_patches=64)
    source = encoded((48, 20), form)
    assert image_grid(source, processor) == processor_grid(processor, source)


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_png_orientation_in_any_place():
    processor = Siglip2PackedImageProcessor(patch_size=16, max_num_patches=64)
    plain = encoded((40, 20), "PNG")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x tiff:Orientation="6"/>'
    blocks = [png_chunk(b"eXIf", exif.tobytes()[6:]), png_chunk(b"iTXt", xmp)]
    after_header, end = 8 + 25, len(plain) - 12
    for block, place in itertools.product(blocks, (after_header, end)):
        source = plain[:place] + block + plain[place:]
        assert image_grid(source, processor) == processor_grid(processor, source) == (1, 10, 5), (block, place)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_header_grids_decode_nothing(form, monkeypatch):
    processor = Siglip2PackedImageProcessor(patch_size=16, max_num_patches=64)
    sources = [encoded((300, 200), form), encoded((300, 200), form, 6) if form in ("JPEG", "PNG", "WEBP") else None]
    sources = [source for source in sources if source]
    expected = [processor_grid(processor, source) for source in sources]

    def refuse(image):
        raise AssertionError("decoded")

    for name in ("PIL.ImageFile.ImageFile", "PIL.WebPImagePlugin.WebPImageFile", "PIL.Image.Image"):
        monkeypatch.setattr(f"{name}.load", refuse)
    assert [image_grid(source, processor) for source in sources] == expected


def test_header_grids_of_damaged_files(tmp_path):
    processor = Siglip2PackedImageProcessor(max_num_patches=64)
    good = encoded((640, 480))
    sources = {"good.jpg": good, "text.jpg": b"not an image", "empty.jpg": b"", "cut.jpg": good[: len(good) // 2]}
    files = [tmp_path / name for name in sources]
    for file, content in zip(files, sources.values()):
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"image 1 \('.*text.jpg'\): not an image"):
        image_grids(files, processor)
    with pytest.warns(UserWarning, match="2 of 4 images have no grid; the first is image 1"):
        found = image_grids(files, processor, on_error="skip")
    assert found.prod(dim=1).gt(0).tolist() == [True, False, False, True]
    assert tuple(found[0].tolist()) == processor_grid(processor, files[0])
    with pytest.raises(ValueError, match="image 0.*No such file"):
        image_grids([tmp_path / "absent.jpg"], processor)
    with pytest.raises(ValueError, match="on_error"):
        image_grids([], processor, on_error="ignore")
    assert image_grids([], processor).shape == (0, 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_header_grids_keep_to_pillows_limit_and_to_do_resize(monkeypatch):
    fixed = Siglip2PackedImageProcessor(do_resize=False)
    assert image_grid(encoded((64, 48), "PNG"), fixed) == (1, 3, 4)
    with pytest.raises(ValueError, match="50x64 .height x width. is not a multiple of patch_size 16"):
        image_grid(encoded((64, 50), "PNG"), fixed)
    assert image_grid(np.zeros((48, 64, 3), np.uint8), fixed) == (1, 3, 4)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 - 1)
    with pytest.raises(ValueError, match="MAX_IMAGE_PIXELS = 3071"):
        image_grid(encoded((64, 48), "PNG"), fixed)


# --- collate


@pytest.fixture(scope="module")
def photos():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (*size, 3), dtype=np.uint8) for size in [(50, 70), (13, 200), (64, 64), (9, 5)]]


def test_collate_equals_the_processor_on_all_images(photos):
    processor = Siglip2PackedImageProcessor(patch_size=4, max_num_patches=64)
    together = processor(photos)
    packs = [processor(photo) for photo in photos]
    pairs = [(pack["pixel_values"], pack["grid_thw"]) for pack in packs]
    triples = [(pack["pixel_values"], tuple(pack["grid_thw"][0].tolist())) for pack in packs]
    named = [dict(pixel_values=rows, grid_thw=grid) for rows, grid in pairs]
    for items in (packs, pairs, triples, named):
        packed = collate(items)
        assert isinstance(packed, PackedPatches)
        assert list(packed) == list(together)
        for key in ("pixel_values", "grid_thw", "cu_seqlens"):
            assert torch.equal(packed[key], together[key]) and packed[key].dtype == together[key].dtype
        assert packed["max_seqlen"] == together["max_seqlen"] and type(packed["max_seqlen"]) is int
        assert packed.kept == [0, 1, 2, 3]


def test_collate_takes_other_fields_along(photos):
    processor = Siglip2PackedImageProcessor(patch_size=4, max_num_patches=64)
    items = [
        {**processor(photo), "label": i, "box": torch.ones(4) * i, "name": f"{i}"} for i, photo in enumerate(photos)
    ]
    packed = collate(items)
    assert packed["label"].tolist() == [0, 1, 2, 3]
    assert packed["box"].shape == (4, 4) and packed["name"] == ["0", "1", "2", "3"]
    moved = packed.to(torch.bfloat16)
    assert moved["pixel_values"].dtype == torch.bfloat16
    assert moved["box"].dtype == torch.float32 and moved["label"].dtype == torch.int64
    assert packed.to("meta")["label"].device.type == "meta"
    assert packed["cu_seqlens"].device.type == "cpu"


def test_collate_of_videos_and_of_skipped_images():
    frames = torch.randn(12 + 5, 48)
    joint = [PackedPatches(frames[:12], [(3, 2, 2)], "joint"), PackedPatches(frames[12:], [(1, 1, 5)], "joint")]
    assert collate(joint, temporal="joint")["cu_seqlens"].tolist() == [0, 12, 17]
    with pytest.raises(ValueError, match="item 0: its cu_seqlens are not those of temporal='frames'"):
        collate(joint)
    nothing, one = PackedPatches(torch.zeros(0, 48), []), PackedPatches(frames[:6], [(1, 2, 3)])
    packed = collate([nothing, one, nothing])
    assert packed.kept == [1] and packed["grid_thw"].tolist() == [[1, 2, 3]]
    assert collate([nothing])["pixel_values"].shape == (0, 48)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "empty list"),
        (
            [(torch.ones(6, 3), (1, 2, 3)), (torch.ones(5, 3), (1, 2, 3))],
            "item 1: grid_thw covers 6 patches.*has 5 rows",
        ),
        # these would cancel out
        (
            [(torch.ones(5, 3), (1, 2, 3)), (torch.ones(7, 3), (1, 2, 3))],
            "item 0: grid_thw covers 6 patches.*has 5 rows",
        ),
        ([(torch.ones(6, 3), (1, 2, 3)), (torch.ones(6, 4), (1, 2, 3))], r"item 1: pixel_values must be \[T, 3\]"),
        ([(torch.ones(6, 3).int(), (1, 2, 3))], "item 0.*floating"),
        ([{"pixel_values": torch.ones(6, 3)}], "item 0: pixel_values and grid_thw are needed"),
        ([torch.ones(6, 3)], "item 0"),
        ([(torch.ones(6, 3), (1, 2, 3)), None], "item 1"),
        (
            [{"pixel_values": torch.ones(1, 3), "grid_thw": (1, 1, 1), **more} for more in ({"label": 1}, {})],
            "item 1: its fields are",
        ),
    ],
)
def test_collate_names_the_item_that_does_not_fit(items, message):
    with pytest.raises(ValueError, match=message):
        collate(items)


def test_dataloader_pins_patches_and_other_fields_not_the_metadata(monkeypatch):
    """What DataLoader(pin_memory=True) does with a batch, without a device: the tensors that would be pinned."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    packed = collate([dict(pixel_values=torch.ones(6, 3), grid_thw=(1, 2, 3), label=torch.ones(2))])
    rows, label = packed["pixel_values"], packed["label"]
    result = pin_memory(packed)
    assert isinstance(result, PackedPatches)
    assert [tensor is expected for tensor, expected in zip(pinned, (rows, label), strict=True)] == [True, True]
    assert result["pixel_values"] is not rows and result["label"] is not label


@pytest.mark.gpu
def test_dataloader_with_pinned_memory():
    lengths = sizes(images=20) // 16 + 1
    sampler = PatchBudgetBatchSampler(lengths, 128)
    loader = DataLoader(Indices(lengths), batch_sampler=sampler, collate_fn=collate, num_workers=1, pin_memory=True)
    for packed in loader:
        assert packed["pixel_values"].is_pinned() and not packed["cu_seqlens"].is_pinned()
        assert packed.to("cuda", non_blocking=True)["pixel_values"].is_cuda
