"""A replaced tower among hooks, device maps, copies, compilers and engines."""

import copy
import pickle

import accelerate
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from vlm_models import (
    BOUND,
    GRIDS,
    MODELS,
    ODD,
    check,
    classifier,
    images,
    lfm2_vl,
    packed_tower,
    relative,
    sample,
    siglip2,
    step,
    vision,
)

from siglip2_packed.vlm import replace_vision_tower, restore_vision_tower

# hooks


def test_hooks_on_the_tower_see_what_they_saw():
    model, seen = classifier(), []
    original = next(m for m in model.modules() if hasattr(m, "post_layernorm"))
    batch = images(ODD)
    handles = [
        original.register_forward_pre_hook(lambda module, args, kwargs: seen.append("pre"), with_kwargs=True),
        original.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state.shape)),
        original.register_full_backward_hook(lambda *args: seen.append("backward")),
        original.register_state_dict_post_hook(lambda *args: seen.append("state")),
        original.register_load_state_dict_pre_hook(lambda *args: seen.append("load")),
    ]

    def run():
        seen.clear()
        vision(model, batch).last_hidden_state.sum().backward()
        model.load_state_dict(model.state_dict())
        return list(seen)

    expected = run()
    assert {"pre", (3, 256, 64), "state", "load"} <= set(expected)
    replace_vision_tower(model)
    assert run() == expected
    handles[0].remove()
    packed_tower(model).register_forward_hook(lambda *args: seen.append("later"))
    changed = run()
    assert "pre" not in changed and changed.count("later") == 1
    restore_vision_tower(model)
    assert run() == changed


def test_hooks_on_what_computes_with_weights_see_packed_rows():
    model, seen = classifier(), []
    fc1 = next(m for m in model.modules() if hasattr(m, "post_layernorm")).encoder.layers[1].mlp.fc1
    handle = fc1.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    replace_vision_tower(model)
    vision(model, images(ODD))
    handle.remove()
    vision(model, images(ODD))
    assert seen == [(sum(h * w for _, h, w in ODD), 128)]


# places


UNITS = ["Siglip2VisionEmbeddings", "Siglip2EncoderLayer", "Siglip2MultiheadAttentionPoolingHead"]
PACKED_UNITS = ["Siglip2PackedEmbeddings", "Siglip2PackedEncoderLayer", "Siglip2PackedPoolingHead"]


def test_offloaded_weights_come_and_go():
    theirs, before, after = classifier(), classifier(), classifier()
    batch, cpu = images(ODD), torch.device("cpu")
    with torch.no_grad():
        expected = theirs(**batch).logits
        accelerate.cpu_offload(before, cpu, preload_module_classes=UNITS)
        assert relative(before(**batch).logits, expected) <= BOUND
        replace_vision_tower(before)
        replace_vision_tower(after)
        accelerate.cpu_offload(after, cpu, preload_module_classes=PACKED_UNITS)
        for model in (before, after):
            for swap in (lambda model: None, restore_vision_tower, replace_vision_tower):
                swap(model)
                assert all(p.is_meta for p in model.parameters())
                assert relative(model(**batch).logits, expected) <= BOUND
                assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("later", [False, True], ids=["before", "after"])
def test_a_device_map(tmp_path, later):
    """Some layers on disk; the tower's own hook, and those of layers, move inputs and weights."""
    theirs = siglip2()
    theirs.save_pretrained(tmp_path)
    batch = sample(theirs, ODD)
    places = {name: "cpu" for name, m in theirs.vision_model.named_children()}
    places = {f"vision_model.{name}": "cpu" for name in places if name != "encoder"}
    places |= {f"vision_model.encoder.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    places |= dict.fromkeys(["text_model", "logit_scale", "logit_bias"], "cpu")
    with torch.no_grad():
        expected = theirs(**batch).logits_per_image
        if later:
            model = type(theirs).from_pretrained(tmp_path)
            replace_vision_tower(model)
            accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / "disk")
        else:
            model = type(theirs).from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "disk")
            replace_vision_tower(model)
        layers = packed_tower(model).encoder.layers
        assert layers[1].mlp.fc1.weight.is_meta and not layers[0].mlp.fc1.weight.is_meta
        for _ in range(2):
            assert relative(model(**batch).logits_per_image, expected) <= BOUND
        restore_vision_tower(model)
        assert relative(model(**batch).logits_per_image, expected) <= BOUND


def test_layers_are_not_split_by_a_map_that_is_made_later():
    model = siglip2()
    replace_vision_tower(model)
    inside = getattr(model, "_get_no_split_modules", lambda device_map: model._no_split_modules)("auto")
    assert set(PACKED_UNITS) <= set(inside)


# copies, compilers, checkpointing, engines


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_have_their_own(make):
    model = lfm2_vl()
    batch = sample(model)
    replace_vision_tower(model)
    expected = model(**batch).logits
    other = make(model)
    with torch.no_grad():
        for parameter in packed_tower(model).parameters():
            parameter.zero_()
    assert torch.equal(other(**batch).logits, expected)
    assert packed_tower(other).config is other.config.vision_config
    restore_vision_tower(other)
    assert relative(other(**batch).logits, expected) <= BOUND


def test_the_model_compiles():
    theirs, ours = classifier(), classifier()
    batch = images(ODD)
    expected = step(theirs, batch)
    replace_vision_tower(ours)
    compiled = torch.compile(ours, backend="aot_eager")
    logits, gradients = step(compiled, batch)
    check((logits, {name.removeprefix("_orig_mod."): g for name, g in gradients.items()}), expected)
    later = torch.compile(classifier(), backend="aot_eager")
    later(**batch)
    replace_vision_tower(later)
    assert relative(later(**batch).logits, expected[0]) <= BOUND


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("later", [False, True], ids=["before", "after"])
def test_checkpointing_by_the_model_around(reentrant, later):
    theirs, ours = lfm2_vl().train(), lfm2_vl().train()
    batch = sample(theirs)
    expected = step(theirs, batch)
    if later:
        replace_vision_tower(ours)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if not later:
        replace_vision_tower(ours)
    assert all(layer.gradient_checkpointing for layer in packed_tower(ours).encoder.layers)
    calls = []
    packed_tower(ours).encoder.layers[1].mlp.fc1.register_forward_hook(lambda *args: calls.append(1))
    check(step(ours, batch), expected)
    assert len(calls) == 2
    restore_vision_tower(ours)
    ours.gradient_checkpointing_disable()
    check(step(ours, batch), expected, 1e-6)


def test_a_frozen_tower_learns_nothing_and_keeps_nothing():
    theirs, ours = lfm2_vl().train(), lfm2_vl().train()
    for model in (theirs, ours):
        model.model.vision_tower.requires_grad_(False)
    batch = sample(theirs)
    expected = step(theirs, batch)
    replace_vision_tower(ours)
    ours.enable_input_require_grads()
    check(step(ours, batch), expected)
    assert not packed_tower(ours)(**images(GRIDS)).last_hidden_state.requires_grad


def test_a_step_of_trainer(tmp_path):
    def train(model):
        batch = images(ODD)
        rows = [{key: value[i] for key, value in batch.items()} | {"labels": torch.tensor(i)} for i in range(len(ODD))]
        arguments = TrainingArguments(
            tmp_path, use_cpu=True, optim="sgd", learning_rate=0.1, max_steps=2, per_device_train_batch_size=3,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, {name: p.detach() for name, p in model.named_parameters()}

    model = classifier()
    replace_vision_tower(model)
    losses, found = train(model)
    e_losses, expected = train(classifier())
    assert losses == pytest.approx(e_losses, rel=1e-4)
    for name, parameter in expected.items():
        assert relative(found[name], parameter) <= BOUND, name


def test_in_cuda_graphs(world):
    import graphed

    model = siglip2(shape=world.shape).to(world.device, world.dtype)
    batch = {key: value.to(world.device) for key, value in images(ODD).items()}
    replace_vision_tower(model)
    expected = vision(model, batch)
    packed = packed_tower(model)
    restore_vision_tower(model)
    replace_vision_tower(model, cuda_graphs=True)
    assert packed_tower(model) is not packed
    for _ in range(2):
        out = vision(model, batch)
        assert relative(out.last_hidden_state, expected.last_hidden_state) <= world.noise
        assert relative(out.pooler_output, expected.pooler_output) <= world.noise
        out.pooler_output.sum().backward()
    assert len(graphed.graphs_of(packed_tower(model))) == 1
    assert packed_tower(model).head.probe.grad.abs().sum() > 0


@pytest.mark.parametrize("name", MODELS)
def test_layers_and_norms_that_were_taken_out(name):
    def cut(model):
        original = next(m for m in model.modules() if hasattr(m, "post_layernorm"))
        del original.encoder.layers[-1]
        original.post_layernorm = nn.Identity()
        return model

    theirs, ours = cut(MODELS[name]()), cut(MODELS[name]())
    with torch.no_grad():
        expected = theirs(**sample(theirs, GRIDS))
        replace_vision_tower(ours)
        found = ours(**sample(ours, GRIDS))
    assert len(packed_tower(ours).encoder.layers) == 2
    assert relative(found[0], expected[0]) <= BOUND
