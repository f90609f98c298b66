"""What comes out, and where metadata lies, does not depend on what the caller has set around a call."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint as checkpointed

from siglip2_packed import (
    PackedPatches,
    SigLip2NaflexVisionTower,
    Siglip2PackedImageProcessor,
    Siglip2PackedVisionModel,
    convert_to_packing_format,
    pack,
    pad,
    unpack,
)
from siglip2_packed.data import collate, image_grids
from siglip2_packed.ops.positions import eager, places
from siglip2_packed.ops.runtime import check

GRIDS = [(1, 13, 19), (1, 8, 32), (2, 2, 3)]


@contextlib.contextmanager
def setting(set_it, value, before):
    set_it(value)
    try:
        yield
    finally:
        set_it(before)


def default_device():
    return setting(torch.set_default_device, "meta", None)


def default_dtype(dtype):
    return lambda: setting(torch.set_default_dtype, dtype, torch.float32)


@contextlib.contextmanager
def deterministic(warn_only=False):
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS = {
    "device": lambda: torch.device("meta"),
    "default device": default_device,
    "float64": default_dtype(torch.float64),
    "bfloat16": default_dtype(torch.bfloat16),
    "inference mode": torch.inference_mode,
    "deterministic": deterministic,
    "deterministic, warned": lambda: deterministic(True),
    "saved-tensor hooks": lambda: torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x),
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
}


@pytest.fixture
def fresh(forced):
    """Nothing was checked, chosen or made before."""
    forced()
    eager._plan.cache_clear()
    places._places.cache_clear()


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_host_metadata_is_the_hosts(checkpoint, name, fresh):
    """Of processor, pack, pad, unpack, collate, image_grids and the LLaVA tower's inputs."""
    folder, rng = str(checkpoint("tiny")), np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((50, 70), (13, 90))]
    processor = Siglip2PackedImageProcessor.from_pretrained(folder)
    tower = SigLip2NaflexVisionTower(folder, SimpleNamespace())
    positions = torch.tensor([[[0, 0, 0], [0, 1, 2], [0, 2, 1]]])
    rows = torch.randn(3, 48)

    def everything():
        packed = processor(images)
        padded = pad(packed)
        features, mask = unpack(packed["pixel_values"], packed["grid_thw"], padded=True)
        nothing = torch.zeros(0, 48, dtype=torch.float32, device="cpu")
        made = [
            packed, padded, pack(**padded), collate([processor(images[:1]), processor(images[1:])]),
            PackedPatches(nothing, []), tower.image_processor.preprocess(images),
            {
                "features": features, "mask": mask, "grids": image_grids(images, processor),
                "cut": convert_to_packing_format(rows.view(1, 3, 4, 12), 4)[1],
                "tower": tower({"pixel_values": features, "spatial_shapes": padded["spatial_shapes"]}),
                "sparse": tower([rows], [(1, 3, 4)], [positions])[0],
                "whole": tower(images=padded, grid_thw=packed["grid_thw"], patch_positions=[None, None]),
                "text": tower(nothing, np.zeros((0, 3), dtype=np.int64)),
                "raw": tower(torch.from_numpy(np.stack(images[:1])).permute(0, 3, 1, 2)),
            },
        ]  # fmt: skip
        assert tower([], np.zeros((0, 3), dtype=np.int64)) == []
        return [dict(some.items()) for some in made]

    with SURROUNDINGS[name]():
        found = everything()
    for some, right in zip(found, everything(), strict=True):
        for key, x in right.items():
            if isinstance(x, torch.Tensor):
                assert some[key].device.type == "cpu" and some[key].dtype == x.dtype, key
                torch.testing.assert_close(some[key], x, atol=1e-5, rtol=1e-5)
            else:
                assert some[key] == x and type(some[key]) is type(x)


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_the_first_forward(checkpoint, patches, name, fresh):
    model, x = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny")), patches(GRIDS)
    with SURROUNDINGS[name]():
        first = model(x, GRIDS)
    again = model(x, GRIDS)
    for key in ("last_hidden_state", "pooler_output"):
        assert first[key].device.type == "cpu" and first[key].dtype == torch.float32
        torch.testing.assert_close(first[key].detach(), again[key].detach(), atol=1e-5, rtol=1e-5)
    (again.last_hidden_state.sum() + again.pooler_output.sum()).backward()
    assert check._verdicts and all(verdict.right for verdict in check._verdicts.values())


def test_the_first_forward_under_autocast(checkpoint, patches, fresh):
    model, x = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny")), patches(GRIDS)
    with torch.autocast("cpu", torch.bfloat16):
        first = model(x, GRIDS).last_hidden_state
    assert check._verdicts and all(verdict.right for verdict in check._verdicts.values())
    torch.testing.assert_close(first, model(x, GRIDS).last_hidden_state, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_first_forward_of_a_llava_tower_may_be_within_a_checkpoint(checkpoint, patches, fresh, reentrant):
    tower = SigLip2NaflexVisionTower(str(checkpoint("tiny")), SimpleNamespace())
    x = patches(GRIDS).requires_grad_()

    def gradients(run):
        tower.zero_grad()
        out = run(lambda x: tower([*x.split([247, 256, 12])], GRIDS)[2], x)
        out.square().sum().backward()
        return [out.detach(), *(p.grad for p in tower.parameters())]

    found = gradients(lambda *args: checkpointed(*args, use_reentrant=reentrant))
    assert check._verdicts and all(verdict.right for verdict in check._verdicts.values())
    for a, b in zip(found, gradients(lambda run, x: run(x)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("build_within", [False, True])
def test_fake_tensors_go_through_and_leave_nothing_behind(checkpoint, patches, fresh, build_within):
    """What is kept from one call to the next is no tensor of theirs."""
    model, x = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny")), patches(GRIDS)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        faked = Siglip2PackedVisionModel(model.config) if build_within else model
        out = faked(mode.from_tensor(x), GRIDS)
        assert out.last_hidden_state.shape == (515, 64) and out.pooler_output.shape == (3, 64)
    assert model(x, GRIDS).pooler_output.isfinite().all()
    assert all(verdict.right for verdict in check._verdicts.values())


@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
def test_a_model_on_the_meta_device_says_shapes(checkpoint, patches, fresh, caplog, backend):
    """Nothing can be compared there, and nothing is."""
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), attn_implementation=backend).to("meta")
    out = model(**PackedPatches(patches(GRIDS), GRIDS).to("meta"))
    assert out.last_hidden_state.is_meta and out.pooler_output.shape == (3, 64)
    (out.last_hidden_state.sum() + out.pooler_output.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not check._verdicts and not caplog.records


# torch.func


@pytest.fixture
def called(checkpoint, patches):
    """(x, loss of parameters, loss of pixels, parameters) of a model in float64."""
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), dtype=torch.float64)
    x = patches(GRIDS).double()

    def loss(out):
        return out.last_hidden_state.square().mean() + out.pooler_output.sin().sum()

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return x, lambda p: loss(functional_call(model, p, (x, GRIDS))), lambda x: loss(model(x, GRIDS)), parameters


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_grad_of_parameters_and_of_pixels(called, backend, monkeypatch):
    x, of_parameters, of_pixels, parameters = called
    found = torch.func.grad(of_parameters)(parameters)
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    of_parameters(leaves).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(found[name], leaf.grad, atol=1e-8, rtol=1e-5, msg=name)
    pixels = x.clone().requires_grad_()
    of_pixels(pixels).backward()
    torch.testing.assert_close(torch.func.grad(of_pixels)(x), pixels.grad, atol=1e-8, rtol=1e-5)
    each = torch.func.vmap(torch.func.grad(of_pixels))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(each[0], pixels.grad, atol=1e-8, rtol=1e-5)


def test_jvp_is_the_derivative(called):
    x, of_parameters, of_pixels, parameters = called
    for function, at in ((of_pixels, x), (of_parameters, parameters)):
        along = torch.utils._pytree.tree_map(torch.ones_like, at)
        value, derivative = torch.func.jvp(function, (at,), (along,))
        gradient = torch.utils._pytree.tree_leaves(torch.func.grad(function)(at))
        torch.testing.assert_close(derivative, sum(g.sum() for g in gradient), atol=1e-10, rtol=1e-8)
        assert torch.isfinite(value)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_tangents_go_through(checkpoint, patches, trusted, monkeypatch, own, recorded):
    """Those of forward-mode AD, in training and in inference, also where own kernels would run, as on CUDA."""
    from siglip2_packed import modeling
    from siglip2_packed.ops.attention import VarlenAttention

    model, x = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny")), patches(GRIDS)
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    _, expected = torch.func.jvp(lambda x: model(x, GRIDS).pooler_output, (x,), (along,))
    if own:
        trusted(pool=["triton"], norm=["triton"], positions=["triton"])
        monkeypatch.setattr(modeling, "for_pack", lambda segments, *args: VarlenAttention(segments, "triton", "sdpa"))
    with forward_ad.dual_level(), torch.set_grad_enabled(recorded):
        _, found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, along), GRIDS).pooler_output)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_second_derivatives_are_right_or_refused(checkpoint, patches):
    """torch's own `once_differentiable` lets those of `torch.autograd.functional` be zeros."""
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), dtype=torch.float64)
    x = patches([(1, 1, 2)]).double()
    for loss in (torch.sum, lambda pooled: pooled.sin().sum()):
        of_pixels = lambda x: loss(model(x, [(1, 1, 2)]).pooler_output)  # noqa: E731
        along = torch.ones_like(x) * 1e-5
        gradient = torch.func.grad(of_pixels)
        expected = (gradient(x + along) - gradient(x - along)) / 2e-5
        found = torch.func.hessian(of_pixels)(x).sum((-1, -2))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
        with pytest.raises(RuntimeError, match="differentiable once by torch.autograd"):
            torch.autograd.functional.hessian(of_pixels, x)
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(of_pixels(leaf), leaf, create_graph=True)
        torch.testing.assert_close(first.detach(), gradient(x))
        with pytest.raises(RuntimeError, match="differentiable once by torch.autograd"):
            first.square().sum().backward()


def test_a_graph_of_gradients_may_be_asked_for_within_a_checkpoint(checkpoint, patches):
    """Whose saved tensors are unpacked once."""
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny")).train()
    gradients = []
    for create_graph in (False, True):
        model.gradient_checkpointing_enable()
        model(patches([(1, 2, 3)]), [(1, 2, 3)]).pooler_output.sin().sum().backward(create_graph=create_graph)
        gradients.append([p.grad.detach().clone() for p in model.parameters()])
        model.zero_grad()
    torch.testing.assert_close(*gradients)


def test_what_has_no_rules_for_them_is_left_for_torchs(checkpoint, patches, trusted, monkeypatch):
    """Own kernels and other packages' attention, as on CUDA."""
    from siglip2_packed import modeling
    from siglip2_packed.ops.attention import VarlenAttention

    model, x = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny")), patches(GRIDS)
    expected = torch.func.grad(lambda x: model(x, GRIDS).pooler_output.sum())(x)
    trusted(pool=["triton"], norm=["triton"])
    monkeypatch.setattr(modeling, "for_pack", lambda segments, *args: VarlenAttention(segments, "triton", "sdpa"))
    found = torch.func.grad(lambda x: model(x, GRIDS).pooler_output.sum())(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.func.jvp(lambda x: model(x, GRIDS).pooler_output, (x,), (x,))
