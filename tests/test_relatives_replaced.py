"""`replace_vision_tower` in models around SigLIP's fixed-size tower, Idefics2's and 3's, and SmolVLM's."""

import copy

import pytest
import torch
from relative_models import EXACT_BUCKETS, SIDE, TOWERS, VLMS, framed, pictures, run, tower, vlm
from test_relatives import packed
from torch import nn

from siglip2_packed.measure import relative_error
from siglip2_packed.vlm import replace_vision_tower, restore_vision_tower

BOUND = 1e-5
BUCKETED = ["idefics2", "idefics3", "smolvlm"]
SIZES = [(13, 19), (8, 32), (3, 5)]
MODELS = [
    pytest.param(name, marks=pytest.mark.skipif(bucketed and not EXACT_BUCKETS, reason="refused with transformers 4"))
    for name, bucketed in [(name, name in BUCKETED) for name in VLMS if name != "lfm2_vl"]
]


def batch(name, model):
    """Two pictures for the model, or three of several sizes: pixels and, where it has a language model, its words."""
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    pixels = torch.cat(pictures([(side, side)] * 2))
    words = torch.arange(3, 9)
    if name == "siglip":
        return {"pixel_values": pixels, "input_ids": words[None].expand(2, -1)}
    tokens = {"paligemma": 98, "gemma3": 32, "llava_onevision": 0, "idefics2": 12, "idefics3": 32, "smolvlm": 32}[name]
    more = {}
    if name == "idefics2":
        pixels, mask = framed(SIZES)
        pixels, more["pixel_attention_mask"] = pixels[None], mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[None]
    if name in ("idefics3", "smolvlm"):
        pixels = pixels[None]
        more["pixel_attention_mask"] = torch.ones(1, 2, 4 * side, 4 * side, dtype=torch.bool)
    if name == "gemma3":
        more["token_type_ids"] = None
    ids = torch.cat([words[:3], torch.full((tokens,), 60), words[3:]])[None]
    if name == "gemma3":
        more["token_type_ids"] = (ids == 60).long()
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


def outcome(name, model, grad=True):
    """What the model gives, and the gradients of all that leads to it."""
    model.zero_grad()
    given = batch(name, model)
    if name == "llava_onevision":
        out = model.model.get_image_features(
            given["pixel_values"][:, None], image_sizes=torch.tensor([[28, 28]] * 2), batch_num_images=[2],
            vision_feature_layer=-2, vision_feature_select_strategy="full",
        )  # fmt: skip
        out = getattr(out, "pooler_output", out)
        out = torch.cat([x.flatten(0, -2) for x in out])
    else:
        out = model(**given)
        out = out.logits_per_image if name == "siglip" else out.logits
    if not grad:
        return out.detach()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    return out.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_the_model_gives_the_same(name):
    model, original = vlm(name)
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    parameters = [(key, id(p), tuple(p.shape)) for key, p in model.named_parameters()]
    expected, gradients = outcome(name, model)
    ((path, ours),) = replace_vision_tower(model).items()
    assert modules[path] is original and model.get_submodule(path) is ours
    assert [(key, id(p), tuple(p.shape)) for key, p in model.named_parameters()] == parameters
    assert list(model.state_dict()) == list(state) and list(dict(model.named_modules())) == list(modules)
    found, ours_gradients = outcome(name, model)
    assert relative_error(found, expected) <= BOUND
    assert ours_gradients.keys() == gradients.keys()
    largest = max(g.norm() for g in gradients.values())
    for key, gradient in gradients.items():
        if "k_proj.bias" not in key and "in_proj_bias" not in key:
            error = (ours_gradients[key] - gradient).norm()
            assert error <= BOUND * max(gradient.norm(), 1e-3 * largest), key
    restored = restore_vision_tower(model)
    assert restored[path] is original and all(modules[key] is m for key, m in model.named_modules())
    assert torch.equal(outcome(name, model, grad=False), expected)


@pytest.mark.parametrize("name", MODELS)
def test_what_moves_with_the_model_comes_back_with_it(name):
    """Buffers that no file holds, too."""
    model, _ = vlm(name)
    replace_vision_tower(model)
    model.to("meta")
    restore_vision_tower(model)
    assert all(x.is_meta for x in [*model.parameters(), *_vision(model).buffers()])


def _vision(model):
    return next(m for m in model.modules() if hasattr(m, "post_layernorm"))


@pytest.mark.parametrize("name", MODELS)
def test_files_of_a_replaced_model_are_the_models(name, tmp_path):
    model, _ = vlm(name)
    expected, before = outcome(name, model, grad=False), model.state_dict()
    replace_vision_tower(model)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(x, before[key]) for key, x in again.state_dict().items())
    again.eval()
    replace_vision_tower(again)
    assert relative_error(outcome(name, again, grad=False), expected) <= BOUND


def replaced(name, **more):
    """A tower of transformers' by itself, and ours in its place."""
    original = tower(name, **more)
    expected = copy.deepcopy(original)
    holder = nn.ModuleDict({"tower": original})
    (ours,) = replace_vision_tower(holder).values()
    return expected, ours


@pytest.mark.parametrize("size", [(13, 19), (8, 32), (1, 40), (SIDE, SIDE)])
def test_positions_are_interpolated_where_the_caller_asks(size):
    expected, ours = replaced("siglip")
    (image,) = pictures([size])
    theirs = run(expected, image)
    out = ours(image, interpolate_pos_encoding=True, output_hidden_states=True)
    assert relative_error(out.last_hidden_state, theirs.last_hidden_state) <= BOUND
    assert relative_error(out.pooler_output, theirs.pooler_output) <= BOUND
    states = expected(image, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
    assert len(out.hidden_states) == len(states) == 4
    assert all(relative_error(a, b) <= BOUND for a, b in zip(out.hidden_states, states))
    if size != (SIDE, SIDE):
        with pytest.raises(ValueError, match=r"patches, the position table 7x7: pass interpolate_pos_encoding=True"):
            ours(image)


@pytest.mark.skipif(not EXACT_BUCKETS, reason="refused with transformers 4")
@pytest.mark.parametrize("name", BUCKETED)
@pytest.mark.parametrize("size", [(13, 19), (8, 32), (1, 40), (SIDE, SIDE), (14, 14)])
def test_images_of_any_size_in_buckets(name, size):
    expected, ours = replaced(name)
    (image,) = pictures([size])
    theirs = run(expected, image).last_hidden_state
    assert relative_error(ours(image).last_hidden_state, theirs) <= BOUND
    mask = torch.ones(1, *size, dtype=torch.bool)
    assert relative_error(ours(image, patch_attention_mask=mask).last_hidden_state, theirs) <= BOUND


@pytest.mark.parametrize("name", TOWERS)
def test_edges_that_are_no_whole_patch_and_no_images(name):
    if name != "siglip" and not EXACT_BUCKETS:
        pytest.skip("refused with transformers 4")
    expected, ours = replaced(name)
    image = torch.cat(pictures([(SIDE, SIDE)] * 3))
    out = ours(torch.nn.functional.pad(image, (0, 3, 0, 2))).last_hidden_state
    assert relative_error(out, torch.cat([run(expected, x, False).last_hidden_state for x in image.split(1)])) <= BOUND
    nothing = ours(image[:0])
    assert nothing.last_hidden_state.shape == (0, SIDE**2, 64)
    nothing.last_hidden_state.sum().backward()
    assert all(p.grad is not None for key, p in ours.named_parameters() if not key.startswith("head."))
    pack = packed(pictures([(13, 19), (SIDE, SIDE), (3, 5)]))
    assert ours(**pack).last_hidden_state.shape == (13 * 19 + SIDE**2 + 15, 64)


@pytest.mark.skipif(not EXACT_BUCKETS, reason="refused with transformers 4")
def test_a_mask_that_leaves_out_patches_is_refused():
    """Idefics3's connector joins the rows beyond an image with its own; zeros there would change what it gives."""
    _, ours = replaced("idefics3")
    images, mask = torch.cat(pictures([(8, 8)] * 2)), torch.ones(2, 8, 8, dtype=torch.bool)
    mask[1, 6:] = False
    with pytest.raises(ValueError, match="image 1 has 48 of 64 patches.*do_image_splitting=True"):
        ours(images, patch_attention_mask=mask)
    with pytest.raises(ValueError, match=r"patch_attention_mask is \[2, 8, 7\], pixel_values have \[2, 8, 8\] patches"):
        ours(images, patch_attention_mask=mask[:, :, :7])


@pytest.mark.skipif(not EXACT_BUCKETS, reason="refused with transformers 4")
@pytest.mark.parametrize("sizes", [SIZES, [(1, 40), (9, 1), (7, 7)], [(3, 5)] * 3], ids=str)
def test_padding_is_left_out(sizes):
    """Images of several sizes in a frame, each of them alone in transformers; NaN around them is not read."""
    expected, ours = replaced("idefics2")
    images, mask = framed(sizes)
    theirs = expected(images, patch_attention_mask=mask, output_hidden_states=True)
    pixels = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    images = images.masked_fill(~pixels, torch.nan).requires_grad_()
    out = ours(images, patch_attention_mask=mask, output_hidden_states=True)
    found = [out.last_hidden_state, *out.hidden_states]
    for x, reference in zip(found, [theirs.last_hidden_state, *theirs.hidden_states], strict=True):
        assert x.shape == (3, mask[0].numel(), 64) and (x[~mask.flatten(1)] == 0).all()
        assert relative_error(x[mask.flatten(1)], reference[mask.flatten(1)]) <= BOUND
    for x, picture, own in zip(out.last_hidden_state, pictures(sizes), mask):
        assert relative_error(x[own.flatten()], run(expected, picture).last_hidden_state[0]) <= BOUND
    out.last_hidden_state.sum().backward()
    assert (images.grad.masked_select(~pixels) == 0).all() and images.grad.masked_select(pixels).all()


@pytest.mark.skipif(not EXACT_BUCKETS, reason="refused with transformers 4")
def test_padding_elsewhere_is_refused():
    _, ours = replaced("idefics2")
    images, mask = framed([(8, 8), (6, 5)])
    hole, moved, empty = mask.clone(), mask.clone(), mask.clone()
    hole[1, 2, 3], moved[1, 2, 3], moved[1, 7, 7], empty[1] = False, False, True, False
    for wrong, count in [(mask.flip(1), 30), (mask.flip(2), 30), (hole, 29), (moved, 30), (empty, 0)]:
        with pytest.raises(ValueError, match=f"the {count} patches of image 1 are no rectangle at the top left"):
            ours(images, patch_attention_mask=wrong)


@pytest.mark.skipif(EXACT_BUCKETS, reason="right in transformers 5")
@pytest.mark.parametrize("name", BUCKETED)
def test_buckets_of_transformers_4_are_refused(name):
    with pytest.raises(ValueError, match="one entry of the position table too low.*take transformers 5"):
        replaced(name)


def test_hooks_and_adapters_on_the_convolution_run():
    expected, ours = replaced("siglip")
    (image,) = pictures([(SIDE, SIDE)])
    seen = []
    handle = ours.embeddings.patch_embedding.register_forward_hook(lambda m, x, out: seen.append(out.shape))
    assert relative_error(ours(image).last_hidden_state, run(expected, image, False).last_hidden_state) <= BOUND
    assert seen == [(49, 64, 1, 1)]
    handle.remove()
    ours(image)
    assert len(seen) == 1


def test_a_frozen_tower_that_is_made_to_require_gradients_keeps_nothing():
    """As PEFT does with gradient checkpointing, before or after the tower was replaced."""
    expected, ours = replaced("siglip")
    ours.requires_grad_(False)
    ours.enable_input_require_grads()
    (image,) = pictures([(SIDE, SIDE)])
    out = ours(image).last_hidden_state
    assert not out.requires_grad and relative_error(out, run(expected, image, False).last_hidden_state) <= BOUND


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_that_the_model_turned_on_before(name, reentrant):
    """transformers 5 then makes the embeddings of all that is inside require gradients."""
    model, _ = vlm(name)
    expected, gradients = outcome(name, model.train())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    hooks = [len(module._forward_hooks) for module in model.modules()]
    ((_, ours),) = replace_vision_tower(model).items()
    calls = []
    handle = ours.encoder.layers[0].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    found, ours_gradients = outcome(name, model)
    handle.remove()
    assert len(calls) == 2 and relative_error(found, expected) <= BOUND
    largest = max(g.norm() for g in gradients.values())
    assert ours_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert (ours_gradients[key] - gradient).norm() <= 3e-5 * max(gradient.norm(), 1e-2 * largest), key
    restore_vision_tower(model)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("shape", [(1, 1, 28, 28), (1, 4, 28, 28), (1, 3, 3, 28), (3, 28, 28)])
def test_what_is_no_image_of_the_towers_is_told_as_it_came(shape):
    _, ours = replaced("siglip")
    with pytest.raises(ValueError, match=rf"must be \[N, 3, H, W\] of at least 4x4 pixels, got \[{str(shape)[1:-1]}\]"):
        ours(torch.zeros(shape))


def test_nothing_is_made_on_the_images_device(monkeypatch):
    """Which would wait for all that it has to do."""
    _, ours = replaced("siglip")
    (image,) = pictures([(SIDE, SIDE)])
    monkeypatch.setattr(torch, "tensor", None)
    ours(image)
