"""The whole model through Triton's kernels, interpreted, as a Hopper card's rules choose them."""

import pytest
import torch

from siglip2_packed import PackedPatches, Siglip2PackedVisionModel
from siglip2_packed.ops import positions
from siglip2_packed.ops.attention.kernels import kernels
from siglip2_packed.ops.runtime import check
from siglip2_packed.ops.runtime.check import relative_error
from siglip2_packed.ops.runtime.choice import Card

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted")
GRIDS = [(1, 10, 13), (2, 1, 2), (1, 1, 1)]  # a segment beyond 128 rows: shorter ones' backward is Triton's alone
HOPPER = Card("cuda", 90, 1)


def run(model, packed):
    """Features without gradients, with them, pooled, and gradients of all parameters."""
    model.zero_grad()
    with torch.no_grad():
        inferred = model(**packed).last_hidden_state
    out = model(**packed)
    (out.last_hidden_state.float().square().mean() + out.pooler_output.float().mean()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return inferred, out.last_hidden_state.detach(), out.pooler_output.detach(), gradients


def test_features_and_gradients_are_those_of_torch(checkpoint, patches, forced, monkeypatch):
    """In float16: Hopper's kernels are refused, as a CPU is none, and Triton's run."""
    packed = PackedPatches(patches(GRIDS), GRIDS)
    exact = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny72"), dtype=torch.float64)
    *expected, expected_gradients = run(exact, packed)
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny72"), dtype=torch.float16)
    *by_torch, torch_gradients = run(model, packed)
    monkeypatch.setattr(positions, "GRIDS", GRIDS)  # theirs are compared in test_functions.py
    forced(card=HOPPER)
    *found, gradients = run(model, packed)

    for ours, theirs, ref in zip(found, by_torch, expected, strict=True):
        assert relative_error(ours, ref) <= 1.2 * relative_error(theirs, ref)
    ours, theirs = (
        torch.stack([(grads[name].double() - ref).norm() for name, ref in expected_gradients.items()])
        for grads in (gradients, torch_gradients)
    )
    assert ours.norm() <= 1.2 * theirs.norm()  # NaN fails

    right = {what.split(" (")[0] for (what, _), verdict in check._verdicts.items() if verdict.right}
    assert right >= {
        "attention.forward",
        "attention.backward",
        "norm.layer_norm",
        "norm.add_layer_norm",
        "norm.layer_norm_backward_",
        "mlp.linear_gelu_backward",
        "pool.attention_pool",
        "positions.add_positions",
    }
    refused = {what.split(" for")[0] for (what, _), verdict in check._verdicts.items() if not verdict.right}
    assert refused == {"attention.forward (hopper)", "attention.backward (hopper)"}
    chosen = kernels(torch.device("cpu"), torch.float16, (135, 2, 72), 4, 130, gradients=True)
    assert [name for name, _ in chosen.launches] == ["triton", "triton"]
