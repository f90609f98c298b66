"""Inputs decoded ahead of the model: in order, each once, in packs within the budget, in memory that comes back."""

import gc
import itertools
import multiprocessing
import os
import threading
import time

import numpy as np
import pytest
import torch
from encode_runs import image_bytes, inputs, start

from siglip2_packed import Siglip2PackedImageProcessor
from siglip2_packed.collection import DECODE_IN
from siglip2_packed.collection.decode import (
    IMAGES_PER_JOB,
    JOBS_PER_WORKER,
    PACKS_READY,
    DecodedImage,
    DecodingProcesses,
    Shelf,
    decode,
    decoding_pool,
    most_ahead,
    packs,
    read_image,
    window,
)


@pytest.fixture
def processor(checkpoint):
    return Siglip2PackedImageProcessor.from_pretrained(checkpoint())


@pytest.mark.parametrize("decode_in", DECODE_IN)
def test_images_are_decoded_in_their_order(processor, decode_in):
    sources = [image_bytes(0, (400, 300) if i % 8 == 0 else (4, 4)) for i in range(40)]
    with decoding_pool(torch.device("cpu"), processor, 2, decode_in) as pool:
        assert [image.ordinal for image in decode(inputs(*sources), processor, pool, 1)] == list(range(40))


def test_whatever_an_image_provokes_is_its_error(processor, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(processor, "read", fail)
    assert read_image(processor, 3, "a", "a.png").error == "MemoryError"


def test_packs_hold_every_image_once_and_their_own_rows():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 18, 3000).tolist()
    images = [DecodedImage(i, "", (1, n), np.full((n, 3), i % 256, np.uint8)) for i, n in enumerate(lengths)]
    images[100:100] = [DecodedImage(3000, "", error="broken")]
    images.append(DecodedImage(3001, "", error="broken"))
    found = list(packs(images, 40, 64))
    assert sorted(image.ordinal for pack in found for image in (*pack.images, *pack.failed)) == list(range(3002))
    for pack in found:
        rows = [image.ordinal % 256 for image in pack.images for _ in range(image.length)]
        assert pack.patches[:, :1].flatten().tolist() == rows
        assert len(rows) <= 40
        assert all(image.patches is None for image in pack.images)
    assert sum(lengths) / (40 * len(found)) > 0.97
    assert [[image.ordinal for image in pack.failed] for pack in packs(images[-1:], 40, 64)] == [[3001]]
    assert list(packs([], 40, 64)) == []


def test_images_are_decoded_no_further_ahead_than_the_window():
    asked = itertools.count()
    images = (DecodedImage(next(asked), "", (1, 10), np.zeros((10, 3), np.uint8)) for _ in range(1000))
    next(packs(images, 40, 64))
    assert next(asked) <= 64 + 4


def test_inputs_are_read_by_a_thread_of_their_own_and_not_far_ahead(processor):
    threads = []

    def reading():
        for item in inputs(*[image_bytes(0, (4, 4))] * 200):
            threads.append(threading.get_ident())
            yield item

    for how, jobs in (("gpu", 2), ("exact", 2 * JOBS_PER_WORKER)):
        processor.decode = how
        with decoding_pool(torch.device("cpu"), processor, 2) as pool:
            images = decode(reading(), processor, pool, 2)
            next(images)
            time.sleep(0.2)
            files, _ = most_ahead(processor, 2, 2048, how == "gpu")
            assert len(threads) <= (jobs + 3) * IMAGES_PER_JOB <= files + IMAGES_PER_JOB
            images.close()
        assert threads and threading.get_ident() not in threads
        threads.clear()


@pytest.mark.parametrize("how", ["exact", "gpu"])
def test_no_more_patches_are_ahead_than_said(processor, how):
    """Those that are decoded, in the window and in packs, at once."""
    processor.decode = how
    budget = 20 * processor.max_num_patches
    longest = np.zeros((processor.max_num_patches, 3 * processor.patch_size**2), np.uint8)
    given = itertools.count()

    def images():
        for i in range(1000):
            next(given)
            yield DecodedImage(i, "", (processor.max_num_patches, 1), longest)

    made = packs(images(), budget, window(processor, budget))
    next(made)
    _, most = most_ahead(processor, 1, budget, how == "gpu")
    assert (next(given) + (PACKS_READY + 1) * budget // processor.max_num_patches) * longest.nbytes <= most


@pytest.mark.parametrize("places", [0, 1, 3, 24])
@pytest.mark.parametrize("kept", [0, 1000])
def test_patches_come_by_shared_memory_while_there_is_room(processor, places, kept):
    """Each image's own, whether a consumer drops them or keeps views of all; a place is free when nobody has it."""
    job = IMAGES_PER_JOB * processor.max_num_patches * 3 * processor.patch_size**2
    sources = [b"" if i % 10 == 3 else image_bytes(i, (8 + i % 5, 9)) for i in range(60)]
    expected = [read_image(processor, *item) for item in inputs(*sources)]
    with DecodingProcesses(2, Shelf(places, job)) as pool:
        memory, found, shared = np.frombuffer(pool.shelf.memory, np.uint8), [], 0
        for image in decode(inputs(*sources), processor, pool, 1):
            assert image._replace(patches=None) == expected[image.ordinal]._replace(patches=None)
            if image.patches is not None:
                shared += np.shares_memory(image.patches, memory)
                found.append((image.ordinal, image.patches[:, :]))
            del found[: len(found) - kept], image
        del memory
        assert all(np.array_equal(patches, expected[i].patches) for i, patches in found)
        good, in_jobs = 54, sum(1 for i in range(min(60, 8 * places)) if i % 10 != 3)
        assert len(found) == min(kept, good)
        assert shared == in_jobs if kept else (shared > 0) == (places > 0)
        found.clear()
        assert sorted(pool.shelf.free) == list(range(places))


def test_patches_larger_than_a_place_come_all_the_same(processor):
    sources = [image_bytes(i, (8, 9)) for i in range(20)]
    expected = [read_image(processor, *item).patches for item in inputs(*sources)]
    with DecodingProcesses(1, Shelf(2, sum(map(np.size, expected[:3])))) as pool:
        memory = np.frombuffer(pool.shelf.memory, np.uint8)
        images = list(decode(inputs(*sources), processor, pool, 1))
        assert [np.shares_memory(image.patches, memory) for image in images[:8]] == [True] * 3 + [False] * 5
        assert all(np.array_equal(image.patches, patches) for image, patches in zip(images, expected, strict=True))


def test_the_shelf_has_room_for_all_that_wait(processor):
    sources = [image_bytes(i, (16, 16)) for i in range(200)]
    with decoding_pool(torch.device("cpu"), processor, 2, "processes", patch_budget=640) as pool:
        assert pool.shelf.size == IMAGES_PER_JOB * processor.max_num_patches * 3 * processor.patch_size**2
        memory = np.frombuffer(pool.shelf.memory, np.uint8)
        images = list(decode(inputs(*sources), processor, pool, 2))
        assert all(np.shares_memory(image.patches, memory) for image in images)
        del images
        filled = packs(decode(inputs(*sources), processor, pool, 2), 640, 80)
        ends = [len(next(filled).images) for _ in range(5)]
        assert sum(ends) == 200 and len(pool.shelf.free) == len(memory) // pool.shelf.size


def test_decoding_processes_collect_no_garbage_of_their_parent():
    """It would copy the parent's memory, page by page, in each of them."""
    with decoding_pool(torch.device("cpu"), Siglip2PackedImageProcessor(), 1, "processes") as pool:
        assert pool.submit(gc.get_freeze_count).result() > 10_000


def decode_and_wait(held):
    pool = decoding_pool(torch.device("cpu"), Siglip2PackedImageProcessor(), 2, "processes")
    assert pool.submit(os.getpid).result() != os.getpid()
    held.send("ready")
    time.sleep(600)


def test_decoding_processes_end_with_their_parent():
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = start(decode_and_wait, theirs)
    theirs.close()
    assert ours.poll(60)
    assert ours.recv() == "ready"
    process.kill()
    assert ours.poll(30)
    with pytest.raises(EOFError):  # the end that all of them held is closed
        ours.recv()
