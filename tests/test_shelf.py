"""Memory that decoding workers share: its places, and when its pages are locked for a card."""

import contextlib
import gc
import logging
import mmap
import time
import weakref

import numpy as np
import pytest
import torch
from encode_runs import image_bytes, inputs

from siglip2_packed import Siglip2PackedImageProcessor, card
from siglip2_packed.collection import DECODE_IN
from siglip2_packed.collection.decode import IMAGE_SHARED, IMAGES_PER_JOB, decode, decoding_pool
from siglip2_packed.collection.shelf import MOST_SHARED, PORTABLE, Room, Shelf

CUDA = torch.device("cuda", 1)


def test_a_shelf_takes_no_more_than_is_to_be_had(monkeypatch):
    def map_at_most(bytes_):
        def mapped(_, size):
            if size > bytes_:
                raise OSError(12, "Cannot allocate memory")
            return bytearray(1)

        monkeypatch.setattr(mmap, "mmap", mapped)

    map_at_most(MOST_SHARED)
    assert len(Shelf(10**9, 3 << 20).free) == MOST_SHARED // (3 << 20)
    map_at_most(999)
    assert len(Shelf(9, 100).free) == 9
    assert not Shelf(10, 100).free


def test_a_room_is_filled_from_its_beginning():
    memory = np.zeros(10, np.uint8)
    room = Room(memory)
    taken = room.take(4)
    taken[:] = 7
    assert room.put(taken.reshape(2, 2)) == slice(0, 4)  # it is there
    assert room.put(b"abc") == slice(4, 7) and bytes(memory) == b"\7\7\7\7abc\0\0\0"
    assert (room.put(None), room.put(b""), room.put(b"abcd"), room.take(4)) == (None,) * 4
    assert room.put(np.arange(3, dtype=np.uint8)) == slice(7, 10) and room.take(0).size == 0


@pytest.mark.parametrize("workers", [1, 16, 64, 200])
def test_every_job_for_a_card_has_a_place(monkeypatch, workers):
    """Smaller, where there are many workers."""
    made = []
    monkeypatch.setattr("siglip2_packed.collection.decode.DecodingProcesses", lambda workers, shelf: made.append(shelf))
    monkeypatch.setattr("siglip2_packed.collection.decode.Shelf", lambda *given: given)
    processor = Siglip2PackedImageProcessor(max_num_patches=256)
    decoding_pool(CUDA, processor, workers)
    [(places, size)] = made
    assert places > 3 * workers and places * size <= MOST_SHARED
    assert size == min(IMAGES_PER_JOB * IMAGE_SHARED, MOST_SHARED // places) >= IMAGES_PER_JOB * 256 * 768
    monkeypatch.setattr(card, "pillow_order", lambda resample: None)  # the host resizes
    decoding_pool(CUDA, processor, workers)
    assert made[1] == (3 * workers + 64, IMAGES_PER_JOB * 256 * 768)


class Cudart:
    """What is locked now, by address."""

    def __init__(self, error=0):
        self.error, self.locked, self.calls = error, {}, 0

    def cudaHostRegister(self, place, size, flags):
        assert flags == PORTABLE
        self.calls += 1
        if not self.error:
            assert place not in self.locked
            self.locked[place] = size
        return self.error

    def cudaHostUnregister(self, place):
        del self.locked[place]


@pytest.fixture
def cudart(monkeypatch):
    found = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    devices = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: devices.append(device) or contextlib.nullcontext())
    yield found
    assert set(devices) <= {CUDA}


def settled(condition):
    """Whether it comes true, once the thread that locks pages is through."""
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    return condition()


def test_pages_are_unlocked_before_they_are_unmapped(cudart):
    """A pool that nobody shuts down, as an actor's: what is mapped at its address afterwards is not its memory."""
    shelf = Shelf(3, 4096)
    shelf.lock_pages(CUDA)
    shelf.lock_pages(CUDA)
    assert settled(lambda: cudart.locked)
    gone = weakref.ref(shelf.memory)
    unlock, mapped = cudart.cudaHostUnregister, []
    cudart.cudaHostUnregister = lambda place: mapped.append(gone() is not None) or unlock(place)
    view = shelf.lend(1)
    del shelf
    assert settled(lambda: mapped == [True]) and cudart.calls == 1 and not cudart.locked
    view[:] = 1  # which its owner still has
    del view
    assert settled(lambda: gone() is None)


@pytest.mark.parametrize("decode_in", DECODE_IN)
@pytest.mark.parametrize("end", ["shutdown", "interrupted", "dropped"])
def test_a_pool_that_ends_unlocks_its_pages(cudart, monkeypatch, decode_in, end):
    processor = Siglip2PackedImageProcessor(patch_size=4, max_num_patches=16)
    monkeypatch.setattr("siglip2_packed.collection.shelf.MOST_SHARED", 1 << 24)
    monkeypatch.setattr("siglip2_packed.collection.decode.MOST_SHARED", 1 << 24)
    pool = decoding_pool(CUDA, processor, 1, decode_in)
    pool.shelf.lock_pages(CUDA)
    assert settled(lambda: cudart.locked)
    assert [image.name for image in decode(inputs(image_bytes(0, (9, 7))), processor, pool, 1, True)] == ["image 0"]
    if end == "interrupted":
        kind = type(pool).__mro__[1]
        whole = kind.shutdown
        monkeypatch.setattr(kind, "shutdown", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pool.shutdown()
        assert not cudart.locked
        monkeypatch.setattr(kind, "shutdown", whole)
    if end != "dropped":
        pool.shutdown()
        assert not cudart.locked
    del pool
    assert settled(lambda: not cudart.locked) and cudart.calls == 1


def test_pages_that_cannot_be_locked_are_said(cudart, caplog):
    cudart.error = 2
    with caplog.at_level(logging.WARNING):
        shelf = Shelf(3, 4096)
        shelf.lock_pages(CUDA)
        shelf.unlock()
    assert caplog.text.count("12288 bytes cannot be page-locked (2): the host copies pixels to cuda:1") == 1


def test_a_shelf_without_places_is_not_locked(cudart):
    Shelf(0, 1).lock_pages(CUDA)
    assert cudart.calls == 0


@pytest.mark.gpu
def test_pools_one_after_the_other_have_their_own_pixels():
    """At the same address, perhaps: dropped, or shut down."""
    from siglip2_packed.collection.cut import cut

    device, processor = torch.device("cuda", 0), Siglip2PackedImageProcessor(max_num_patches=64)
    for round_ in range(6):
        files = [image_bytes(100 * round_ + i, (300, 400)) for i in range(24)]
        pool = decoding_pool(device, processor, 2)
        pool.shelf.lock_pages(device)
        found = cut(decode(inputs(*files), processor, pool, 2, True), processor, processor.on_card(device))
        for image, data in zip(found, files, strict=True):
            assert np.array_equal(image.patches.cpu(), processor.read(data)[0]), (round_, image.ordinal)
        if round_ % 2:
            pool.shutdown()
        del pool, found, image
        gc.collect()
