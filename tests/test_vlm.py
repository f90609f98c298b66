"""`replace_vision_tower`: the same numbers out of other people's models, the same parameters in them."""

import copy

import pytest
import torch
import transformers
from conftest import SIDE_OF_ONE
from test_parity import EXACT_POSITIONS
from vlm_models import GRIDS, MODELS, ODD, images, lfm2_vl, packed_tower, sample, siglip2, tower, vision

from siglip2_packed.vlm import replace_vision_tower, restore_vision_tower

BOUND = 2e-5
"""Relative, in float32; the padded model does not agree with itself any better."""


def relative(found, expected):
    """NaN is not below any bound."""
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def gradients(model, batch):
    """Of all logits, each with a weight of its own."""
    model.zero_grad()
    out = model(**batch)
    logits = out.logits_per_image if hasattr(out, "logits_per_image") else out.logits
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits).sin()
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_gradients(found, expected):
    assert found.keys() == expected.keys() and found
    largest = max(g.norm() for g in expected.values())
    for name, gradient in expected.items():
        ours, error = found[name], (found[name] - gradient).norm()
        rounding = max(ours.norm(), gradient.norm()) <= 1e-7 * largest  # of what is zero: a bias of k, say
        assert rounding or error <= BOUND * max(gradient.norm(), 1e-3 * largest), name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [None, 300], ids=["longest", "padded further"])
def test_logits_and_all_gradients_are_those_of_the_model(name, rows):
    model = MODELS[name]()
    batch = sample(model, GRIDS if name == "LFM2-VL" else ODD, rows=rows)
    logits, expected = gradients(model, batch)
    (replaced,) = replace_vision_tower(model).values()
    assert packed_tower(model) is replaced
    again, found = gradients(model, batch)
    assert relative(again, logits) <= BOUND
    check_gradients(found, expected)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("shape", ["tiny", "tiny72"])
def test_the_tower_gives_what_its_caller_reads(shape, head):
    model = siglip2(shape=shape) if head else lfm2_vl(shape=shape)
    grids = ODD + (SIDE_OF_ONE if EXACT_POSITIONS else [])
    batch = images(grids, rows=280)
    with torch.no_grad():
        expected = vision(model, batch, output_hidden_states=True)
        replace_vision_tower(model)
        out = vision(model, batch, output_hidden_states=True)
    real = batch["pixel_attention_mask"].bool()
    theirs = expected.hidden_states or out.hidden_states  # transformers 4 has none of a tower within Siglip2Model
    assert len(out.hidden_states) == len(theirs) == 1 + model.config.vision_config.num_hidden_layers
    for found, state in zip([out.last_hidden_state, *out.hidden_states], [expected.last_hidden_state, *theirs]):
        assert found.shape == state.shape == (len(grids), 280, state.shape[2])
        assert (found[real] - state[real]).abs().max() <= 2e-5
        assert not found[~real].any()
    if head:
        assert (out.pooler_output - expected.pooler_output).abs().max() <= 2e-5
    else:
        assert out.pooler_output is expected.pooler_output is None
        out.pooler_output = expected.pooler_output  # LFM2-VL puts its own there


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_the_same_objects_in_the_same_order(name):
    model = MODELS[name]()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 != 0)
    original = next(m for m in model.modules() if hasattr(m, "post_layernorm"))
    original.train()
    original.encoder.layers[1].eval()
    before = [(key, id(p), p.requires_grad, p.data_ptr()) for key, p in model.named_parameters()]
    modes = {key: m.training for key, m in model.named_modules()}
    names = list(dict(model.named_modules())), list(model.state_dict())
    replace_vision_tower(model)
    assert [(key, id(p), p.requires_grad, p.data_ptr()) for key, p in model.named_parameters()] == before
    assert {key: m.training for key, m in model.named_modules()} == modes
    assert (list(dict(model.named_modules())), list(model.state_dict())) == names
    assert not any(p.is_meta for p in model.parameters())


def test_an_optimiser_of_before_goes_on():
    def train(swaps):
        model = lfm2_vl().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(3):
            if step == 1 and swaps:
                replace_vision_tower(model)
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
                optimizer.load_state_dict(state)
            if step == 2 and swaps:
                restore_vision_tower(model)
            model(**sample(model, seed=step), labels=sample(model)["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: p.detach() for name, p in model.named_parameters()}

    expected, found = train(False), train(True)
    for name, parameter in expected.items():
        if "k_proj.bias" not in name:  # whose gradient is rounding, of which Adam makes whole steps
            assert relative(found[name], parameter) <= 1e-3, name


@pytest.mark.parametrize("name", MODELS)
def test_restore_gives_the_very_modules_back(name):
    model = MODELS[name]()
    modules = dict(model.named_modules())
    batch = sample(model, GRIDS)
    replaced = replace_vision_tower(model)
    packed = dict(model.named_modules())
    assert {key for key, m in modules.items() if packed[key] is not m} != set()
    model.train().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    parameters = {key: (id(p), p.dtype) for key, p in model.named_parameters()}
    expected, _ = gradients(model, {key: x.double() if x.is_floating_point() else x for key, x in batch.items()})
    model.zero_grad()
    assert restore_vision_tower(model).keys() == replaced.keys()
    found = dict(model.named_modules())
    assert found.keys() == modules.keys() and all(found[key] is m for key, m in modules.items())
    assert {key: (id(p), p.dtype) for key, p in model.named_parameters()} == parameters
    assert all(m.training for m in model.modules())
    again, _ = gradients(model, {key: x.double() if x.is_floating_point() else x for key, x in batch.items()})
    assert relative(again, expected) <= 1e-6
    with pytest.raises(ValueError, match="was replaced"):
        restore_vision_tower(model)


def test_a_tower_by_itself_is_returned():
    model = tower()
    batch = images(ODD)
    expected = model(**batch)
    (name, packed), *others = replace_vision_tower(model).items()
    assert not others and name in ("", "vision_model")
    out = packed(**batch)
    real = batch["pixel_attention_mask"].bool()
    assert (out.last_hidden_state - expected.last_hidden_state)[real].abs().max() <= 2e-5
    assert (out.pooler_output - expected.pooler_output).abs().max() <= 2e-5
    (original,) = restore_vision_tower(packed).values()
    assert type(original).__name__ in ("Siglip2VisionModel", "Siglip2VisionTransformer")


def test_the_original_still_computes_beside_it():
    model = siglip2()
    original, batch = model.vision_model, images(ODD)
    expected = vision(model, batch).pooler_output
    replace_vision_tower(model)
    model.double().float()
    assert packed_tower(model).original == (original,)
    model.vision_model = original
    assert torch.equal(vision(model, batch).pooler_output, expected)


def test_a_pack_comes_back_as_a_pack():
    from siglip2_packed import PackedPatches, Siglip2PackedVisionModel

    model = siglip2()
    replace_vision_tower(model)
    rows = images(ODD)["pixel_values"][images(ODD)["pixel_attention_mask"].bool()]
    out = model.vision_model(**PackedPatches(rows, ODD))
    assert out.last_hidden_state.shape == (sum(h * w for _, h, w in ODD), 64)
    own = Siglip2PackedVisionModel(model.config.vision_config)
    own.load_state_dict(model.vision_model.state_dict())
    assert torch.equal(out.last_hidden_state, own.eval()(**PackedPatches(rows, ODD)).last_hidden_state)
    padded = model.vision_model(**images(ODD)).last_hidden_state[images(ODD)["pixel_attention_mask"].bool()]
    assert torch.equal(padded, out.last_hidden_state)


def test_generate_gives_the_same_tokens():
    model = lfm2_vl()
    batch = sample(model)
    expected = model.generate(**batch, max_new_tokens=12, do_sample=False)
    replace_vision_tower(model)
    assert torch.equal(model.generate(**batch, max_new_tokens=12, do_sample=False), expected)


def test_two_towers_in_one_model_are_both_replaced_and_a_shared_one_everywhere():
    first, second = siglip2(), lfm2_vl()
    both = torch.nn.ModuleDict({"one": first, "two": second, "again": first.vision_model})
    places = replace_vision_tower(both)
    assert [name.split(".")[0] for name in places] == ["one", "two"]
    assert both["again"] is both["one"].vision_model is places["one.vision_model"]
    restore_vision_tower(both)
    assert both["again"] is both["one"].vision_model is not places["one.vision_model"]


@pytest.mark.parametrize("name", MODELS)
def test_no_images(name):
    model = MODELS[name]()
    replace_vision_tower(model)
    packed = packed_tower(model).train()
    empty = images([])
    out = packed(torch.zeros(0, 16, 48), torch.zeros(0, 16, dtype=torch.long), torch.zeros(0, 2, dtype=torch.long))
    assert out.last_hidden_state.shape == (0, 16, 64)
    out.last_hidden_state.sum().backward()  # a rank without images
    assert all(p.grad is not None for p in packed.encoder.parameters())
    assert packed(**empty, output_hidden_states=True).hidden_states[1].shape == (0, 0, 64)
    if hasattr(packed, "head"):
        assert out.pooler_output.shape == (0, 64)


def test_which_hidden_states():
    model = siglip2()
    replace_vision_tower(model)
    batch = images(ODD)
    states = model.vision_model(**batch, output_hidden_states=True).hidden_states
    for asked, wanted in ((0, {0}), (-1, {3}), ([1, -2], {1, 2}), ([7], set())):
        out = model.vision_model(**batch, output_hidden_states=asked).hidden_states
        assert {i for i, state in enumerate(out) if state is not None} == wanted
        assert all(torch.equal(out[i], states[i]) for i in wanted)
    assert model.vision_model(**batch, output_hidden_states=False).hidden_states is None
    model.config.vision_config.output_hidden_states = True
    assert len(model.vision_model(**batch).hidden_states) == 4
    tuples = model.vision_model(**batch, return_dict=False)
    assert isinstance(tuples, tuple) and len(tuples) == 3


def test_autocast():
    model = siglip2()
    batch = images(ODD)
    real = batch["pixel_attention_mask"].bool()
    with torch.no_grad():
        exact = vision(model, batch).last_hidden_state[real]
        with torch.autocast("cpu", torch.bfloat16):
            theirs = vision(model, batch).last_hidden_state[real]
            replace_vision_tower(model)
            ours = vision(model, batch).last_hidden_state[real]
    assert relative(ours, exact) <= 1.1 * relative(theirs, exact)


def test_the_configuration_is_shared_and_holds_names_that_transformers_knows():
    model = lfm2_vl()
    config = model.config.vision_config
    before = config.to_dict()
    replace_vision_tower(model)
    packed = packed_tower(model)
    assert packed.config is config is model.model.config.vision_config
    assert config._attn_implementation == "sdpa" and config._attn_implementation.requested == "auto"
    packed.set_attn_implementation("eager")
    assert config._attn_implementation == "eager"
    packed.set_attn_implementation("auto")
    type(model)._from_config(copy.deepcopy(model.config))  # by name, in transformers
    model.set_attn_implementation("eager")
    assert config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")  # now somebody has asked for it
    assert type(config._attn_implementation) is str
    packed.set_attn_implementation("auto")
    restore_vision_tower(model)
    assert type(config._attn_implementation) is str and config._attn_implementation == "sdpa"
    assert config.to_dict() == before


def test_attention_of_the_model_around_that_the_tower_does_not_have():
    """flex_attention is for the language model: the tower goes on as it was, also where it was set by name."""
    model = lfm2_vl()
    replace_vision_tower(model)
    batch, config = images(ODD), model.config.vision_config
    before = vision(model, batch).last_hidden_state
    for name in ("auto", "eager"):
        packed_tower(model).set_attn_implementation(name)
        model.set_attn_implementation("flex_attention")
        assert model.config.text_config._attn_implementation == "flex_attention"
        assert relative(vision(model, batch).last_hidden_state, before) < BOUND
        if transformers.__version__ >= "5":  # 4 asks the module around the tower
            assert getattr(config._attn_implementation, "requested", config._attn_implementation) == name
    with pytest.raises(ValueError, match="unknown attn_implementation 'fast'"):
        packed_tower(model).get_correct_attn_implementation("fast")


@pytest.mark.parametrize("name", MODELS)
def test_saved_files_are_those_of_before(name, tmp_path):
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "before")
    replace_vision_tower(model)
    model.save_pretrained(tmp_path / "after")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "after" / file).read_bytes() == (tmp_path / "before" / file).read_bytes()
    again, info = type(model).from_pretrained(tmp_path / "after", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    replace_vision_tower(again)
    batch = sample(model, GRIDS)
    assert torch.equal(gradients(again, batch)[0], gradients(model, batch)[0])
