"""Host tensors reach a device without the host waiting; what a GPU shows of it is in test_cuda.py."""

import pytest
import torch

from siglip2_packed.ops.positions import Places, eager
from siglip2_packed.ops.runtime import transfer
from siglip2_packed.ops.segments import Segments


@pytest.fixture
def moved(monkeypatch):
    """(bytes, pinned) of each tensor that goes to a GPU, which there need not be."""
    seen, to = [], torch.Tensor.to
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: setattr(x, "pinned", True) or x)

    def run(x, *args, **kwargs):
        if args and torch.device("cuda") == args[0]:
            assert kwargs == {"non_blocking": True}
            seen.append((x.nbytes, hasattr(x, "pinned")))
            return x.clone()
        return to(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", run)
    return seen


def test_what_cuda_would_wait_for_is_pinned(moved, monkeypatch):
    cuda = torch.device("cuda")
    for numbers in (1, 2**14 - 1, 2**14, 2**15):
        transfer.to_device(torch.zeros(numbers, dtype=torch.int32), cuda)
    assert moved == [(4, False), (2**16 - 4, False), (2**16, True), (2**17, True)]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    transfer.to_device(torch.zeros(2**15, dtype=torch.int32), cuda)
    assert moved[-1] == (2**17, False)
    moved.clear()
    for device in ("cpu", "meta"):
        assert transfer.to_device(torch.zeros(2**15), torch.device(device)).device.type == device
    assert moved == []


def test_the_metadata_of_a_large_pack_are(moved):
    grids = [(1, 13, 19), *[(1, 16, 16)] * 70]
    Places(grids).on(torch.device("cuda"))
    Segments([1] * 20000, "cuda")
    assert all(pinned for _, pinned in moved) and len(moved) == 2
    order, back = Segments([2, 1] * 5000, "cuda").by_length
    assert moved[2:] == [(4 * 10001, False), (8 * 15000, True), (8 * 15000, True)]
    assert torch.equal(order[back], torch.arange(15000))


def test_so_are_those_of_the_position_table(monkeypatch):
    sent = []
    monkeypatch.setattr(eager, "to_device", lambda x, device: sent.append(x.nbytes) or x)
    eager.resize_positions(torch.randn(256, 8), [(1, 13, 19 + i) for i in range(20)] + [(1, 16, 16)] * 30)
    assert len(sent) == 7 and sum(size >= transfer.STAGED for size in sent) >= 2
