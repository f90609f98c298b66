"""What transformers, PEFT and VLMs call on the model, and what inspects or copies it."""

import copy
import inspect
import io
import pickle
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from transformers import PretrainedConfig, PreTrainedModel, pipeline

from siglip2_packed import Siglip2PackedImageProcessor, Siglip2PackedVisionModel

GRIDS = [(1, 13, 19), (1, 8, 32), (2, 2, 3)]


@pytest.fixture
def model(checkpoint):
    return Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))


class Vlm(PreTrainedModel):
    """A tower and what learns above it."""

    config_class = PretrainedConfig
    supports_gradient_checkpointing = True

    def __init__(self, tower):
        super().__init__(PretrainedConfig())
        self.tower, self.tokens = tower, nn.Embedding(5, 64)
        self.post_init()

    def get_input_embeddings(self):
        return self.tokens

    def forward(self, pixel_values, grid_thw):
        return self.tower(pixel_values, grid_thw).last_hidden_state * self.tokens(torch.zeros(1, dtype=torch.long))


def saved_bytes(run):
    """What autograd keeps, parameters left out."""
    sizes = []

    def keep(x):
        if not isinstance(x, nn.Parameter):
            sizes.append(x.nbytes)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = run()
    return sum(sizes), out


def require_grads(vlm):
    """As transformers 5 does it in a VLM, on every model in it; 4.57's does it on the VLM's own."""
    vlm.enable_input_require_grads()
    if not vlm.tower.get_input_embeddings()._forward_hooks:
        vlm.tower.enable_input_require_grads()
    assert vlm.tower.get_input_embeddings()._forward_hooks


def test_a_frozen_tower_in_a_vlm_keeps_no_activations(model, patches):
    vlm, x = Vlm(model), patches(GRIDS)
    model.requires_grad_(False)
    expected, features = saved_bytes(lambda: vlm(x, GRIDS))
    require_grads(vlm)
    kept, again = saved_bytes(lambda: vlm(x, GRIDS))
    assert kept == expected <= features.nbytes + 64 * 4
    torch.testing.assert_close(again, features)
    assert not model(x, GRIDS).last_hidden_state.requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_trained_above_frozen_layers_learns_with_that_hook(model, patches, reentrant):
    vlm, x = Vlm(model.train()), patches(GRIDS)
    model.requires_grad_(False)
    model.encoder.layers[1].requires_grad_(True)
    vlm(x, GRIDS).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in vlm.named_parameters() if p.grad is not None}
    vlm.zero_grad()
    require_grads(vlm)
    vlm.gradient_checkpointing_enable({"use_reentrant": reentrant})
    vlm(x, GRIDS).square().mean().backward()
    found = {name: p.grad for name, p in vlm.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and any("layers.1" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_nor_is_it_in_vain_for_layers_that_somebody_checkpoints_reentrantly(model, patches):
    model.train().requires_grad_(False)
    model.encoder.layers[1].requires_grad_(True)
    for i, layer in enumerate(model.encoder.layers):
        model.encoder.layers[i] = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.REENTRANT)
    model.enable_input_require_grads()
    model(patches(GRIDS), GRIDS).last_hidden_state.square().mean().backward()
    assert all(p.grad is not None for p in model.encoder.layers[1].parameters())


def test_a_callers_own_hook_on_the_embedding_is_obeyed(model, patches):
    """Grad-CAM asks for the gradient of what the embedding gives."""
    kept = []
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, x, out: kept.append(out.requires_grad_()))
    model(patches(GRIDS), GRIDS).last_hidden_state.square().sum().backward()
    assert kept[0].grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["gradient_checkpointing_enable", "activation_checkpointing_enable"])
@pytest.mark.parametrize("given", [(), ({"use_reentrant": True},), ({"use_reentrant": False},)])
def test_checkpointing_by_both_names_without_a_warning(model, name, given):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(model, name)(*given)
    assert all(layer.gradient_checkpointing for layer in model.encoder.layers)
    for layer in model.encoder.layers:
        assert layer._gradient_checkpointing_func.keywords["use_reentrant"] is False


def test_options_of_newer_checkpointing_are_passed_on(model, patches):
    if "every_n_layers" not in inspect.signature(PreTrainedModel._set_gradient_checkpointing).parameters:
        pytest.skip("transformers 5.24 has them")
    model.train().activation_checkpointing_enable(every_n_layers=2, offload=False)
    assert [layer.gradient_checkpointing for layer in model.encoder.layers] == [True, False, True]
    model(patches(GRIDS), GRIDS).last_hidden_state.sum().backward()


def test_a_layer_has_no_checkpointing_function_until_one_is_set(model):
    layer = model.encoder.layers[0]
    for module in (layer, model.encoder, model.head, model.embeddings):
        assert not hasattr(module, "_gradient_checkpointing_func")
        inspect.getmembers(module)
    with pytest.raises(AttributeError, match="_gradient_checkpointing_func"):
        _ = layer._gradient_checkpointing_func
    layer._gradient_checkpointing_func = partial(torch_checkpoint, use_reentrant=True)
    assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": False}
    del layer._gradient_checkpointing_func
    assert not hasattr(layer, "_gradient_checkpointing_func")
    with pytest.raises(AttributeError):
        del layer._gradient_checkpointing_func
    layer._gradient_checkpointing_func = torch_checkpoint  # no partial: as it is
    assert layer._gradient_checkpointing_func is torch_checkpoint


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch_save]


@pytest.mark.parametrize("make", COPIES, ids=["copy", "deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_copies_compute_the_same(model, patches, make, checkpointing):
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    expected = model(patches(GRIDS), GRIDS).last_hidden_state
    other = make(model)
    out = other(patches(GRIDS), GRIDS).last_hidden_state
    assert torch.equal(out, expected)
    out.sum().backward()
    for layer in other.encoder.layers:
        assert hasattr(layer, "_gradient_checkpointing_func") is checkpointing


def test_the_input_embedding_can_be_set(model, patches):
    wider = nn.Linear(48, 64)
    model.set_input_embeddings(wider)
    assert model.get_input_embeddings() is model.embeddings.patch_embedding is wider
    assert model(patches(GRIDS), GRIDS).last_hidden_state.shape == (515, 64)


def test_a_pipeline_gives_the_models_features(checkpoint, model):
    processor = Siglip2PackedImageProcessor.from_pretrained(checkpoint("tiny"))
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (50 + i, 70, 3), dtype=np.uint8)) for i in range(4)]
    with torch.no_grad():
        expected = [model(**processor([image])) for image in images]

    def run(*args, batch_size=1, **kwargs):
        pipe = pipeline("image-feature-extraction", model=model, image_processor=processor, batch_size=batch_size)
        return pipe(*args, **kwargs)

    for features, out in zip(run(images), expected):
        assert np.allclose(features, out.last_hidden_state)
    assert np.allclose(run(images[0], pool=True), expected[0].pooler_output)
    for given in (images, images[:1]):  # a batch's features would be taken apart as those of a padded one
        for pool in (False, True):
            with pytest.raises(ValueError, match="Pack them.*batch_size=1"):
                run(given, batch_size=3, pool=pool)
