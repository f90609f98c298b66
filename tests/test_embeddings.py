"""The position table is resized as a whole, however it lies in memory, and whoever has wrapped its lookups."""

import pytest
import torch
from torch import nn

from siglip2_packed import Siglip2PackedVisionModel

GRIDS = [(1, 13, 19), (1, 8, 32), (1, 2, 3), (1, 4, 4)]


@pytest.fixture
def model(checkpoint):
    return Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))


@pytest.mark.parametrize(
    "lay",
    [
        lambda table: table.t().contiguous().t(),
        lambda table: torch.stack([table, table], -1)[..., 0],
        lambda table: torch.cat([table, table], 1)[:, :64],
    ],
    ids=["transposed", "every second", "a part of wider rows"],
)
def test_a_table_of_any_strides(model, patches, lay):
    x = patches(GRIDS)
    expected = model(x, GRIDS).last_hidden_state
    gradient = torch.autograd.grad(expected.sin().sum(), model.embeddings.position_embedding.weight)[0]
    laid = lay(model.embeddings.position_embedding.weight.detach())
    assert not laid.is_contiguous()
    model.embeddings.position_embedding.weight = nn.Parameter(laid)
    out = model(x, GRIDS).last_hidden_state
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(out.sin().sum(), model.embeddings.position_embedding.weight)[0], gradient
    )
    with torch.no_grad():
        torch.testing.assert_close(model(x, GRIDS).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_lora_on_the_table_is_refused_until_it_is_merged(model, patches):
    peft = pytest.importorskip("peft")
    x = patches(GRIDS)
    before = model(x, GRIDS).last_hidden_state
    config = peft.LoraConfig(target_modules=["position_embedding", "q_proj"], r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"position_embedding is Embedding of an adapter.*modules_to_save"):
            wrapped(x, GRIDS)
        with wrapped.disable_adapter():
            torch.testing.assert_close(wrapped(x, GRIDS).last_hidden_state, before)
        wrapped.merge_adapter()
        merged = wrapped(x, GRIDS).last_hidden_state
        wrapped.unmerge_adapter()
    torch.testing.assert_close(wrapped.merge_and_unload()(x, GRIDS).last_hidden_state, merged)


def test_the_table_trains_beside_lora(model, patches):
    peft = pytest.importorskip("peft")
    x = patches(GRIDS)
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["position_embedding"])
    wrapped = peft.get_peft_model(model, config)
    out = wrapped(x, GRIDS).last_hidden_state
    out.sin().sum().backward()
    trained = wrapped.base_model.model.embeddings.position_embedding.modules_to_save.default.weight
    assert trained.grad.abs().sum() > 0
    with torch.no_grad():
        trained.add_(1)
    assert not torch.allclose(wrapped(x, GRIDS).last_hidden_state, out)
    with wrapped.disable_adapter():
        torch.testing.assert_close(wrapped(x, GRIDS).last_hidden_state, out)
    merged = wrapped(x, GRIDS).last_hidden_state
    torch.testing.assert_close(wrapped.merge_and_unload()(x, GRIDS).last_hidden_state, merged)


def test_a_quantised_table_is_looked_up_whole(model, patches):
    """As a quantiser of embeddings leaves it: bytes, and a module that knows what they stand for."""

    class Bytes(nn.Module):
        def __init__(self, table):
            super().__init__()
            self.scale = table.abs().amax() / 127
            self.register_buffer("weight", (table / self.scale).round().to(torch.int8))
            self.num_embeddings = len(table)

        def forward(self, index):
            return self.weight[index] * self.scale

    x = patches(GRIDS)
    expected = model(x, GRIDS).last_hidden_state
    model.embeddings.position_embedding = Bytes(model.embeddings.position_embedding.weight.detach())
    torch.testing.assert_close(model(x, GRIDS).last_hidden_state, expected, atol=0.1, rtol=0.1)
