"""What `replace_vision_tower` and its tower refuse, by name, and that nothing has changed then."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from vlm_models import ODD, images, lfm2_vl, packed_tower, siglip2, tower, vision

from siglip2_packed import Siglip2PackedVisionModel
from siglip2_packed.attention import requested_attention
from siglip2_packed.vlm import TOWERS, replace_vision_tower, restore_vision_tower

SMALL = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32)


def layer(model, number=1):
    return encoder(model).layers[number]


def encoder(model):
    return next(m for m in model.modules() if hasattr(m, "post_layernorm")).encoder


def test_models_without_such_a_tower_are_told_what_they_have():
    with pytest.raises(
        ValueError, match="Linear has no .* of transformers, nor any other module that is called vision"
    ):
        replace_vision_tower(nn.Linear(2, 2))
    clip = nn.ModuleDict({"tower": CLIPVisionModel(CLIPVisionConfig(**SMALL))})
    with pytest.raises(ValueError, match=r"ModuleDict has no Siglip2Vision.*, but tower is a CLIPVisionModel$"):
        replace_vision_tower(clip)
    with pytest.raises(ValueError, match=r", but it is a CLIPVisionModel$"):
        replace_vision_tower(clip["tower"])
    if not any(kind.__name__.startswith("SiglipVision") for kind in TOWERS):
        with pytest.raises(ValueError, match="but it is a SiglipVisionModel"):
            replace_vision_tower(SiglipVisionModel(SiglipVisionConfig(**SMALL)))
    model = lfm2_vl()
    replace_vision_tower(model)
    with pytest.raises(ValueError, match=r"vision_tower.* is packed already"):
        replace_vision_tower(model)
    with pytest.raises(ValueError, match="^the model is packed already$"):
        replace_vision_tower(
            Siglip2PackedVisionModel(Siglip2VisionConfig(**{k: v for k, v in SMALL.items() if k != "image_size"}))
        )


def test_a_tower_of_another_class_is_not_taken_for_one():
    class Changed(type(next(m for m in tower().modules() if hasattr(m, "post_layernorm")))):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    with pytest.raises(ValueError, match="a Changed"):
        replace_vision_tower(nn.ModuleDict({"vision_tower": Changed(tower().config)}))


def hook(model):
    layer(model).register_forward_hook(print)
    return r"encoder.layers.1 has a hook, print, which would see other tensors"


def backward_hook(model):
    layer(model).self_attn.register_full_backward_hook(lambda *args: None)
    return r"encoder.layers.1.self_attn has a hook, backward_hook.*lambda"


def state_hook(model):
    encoder(model).register_load_state_dict_pre_hook(lambda *args: None)
    return "encoder has a hook"


def own_forward(model):
    layer(model).mlp.forward = lambda hidden_states: hidden_states
    return "encoder.layers.1.mlp has a forward of its own"


def compiled_layer(model):
    layer(model).compile(backend="eager")
    return "encoder.layers.1 has a forward of its own, or is compiled"


def compiled_tower(model):
    parent = model.vision_model if hasattr(model.vision_model, "_modules") else model
    model.vision_model = torch.compile(parent, backend="eager")
    return "vision_model.* is compiled by itself"


def wrapped(model):
    encoder(model).layers[1] = checkpoint_wrapper(layer(model))
    return "encoder.layers.1 is a CheckpointWrapper, expected a Siglip2EncoderLayer"


def another_class(model):
    class Changed(type(layer(model))):
        pass

    layer(model).__class__ = Changed
    return "encoder.layers.1 is a Changed"


def more_modules(model):
    layer(model).adapter = nn.Linear(64, 64)
    return r"encoder.layers.1: modules are \['adapter', 'layer_norm1'.*expected"


def more_parameters(model):
    layer(model).scale = nn.Parameter(torch.ones(64))
    return r"encoder.layers.1: parameters are \['scale'\], expected \[\]"


def pruned(model):
    from torch.nn.utils import prune

    prune.random_unstructured(model.vision_model.head.attention, "in_proj_weight", 0.1)
    return "head.attention has a hook"


def no_bias(model):
    model.vision_model.head.attention.in_proj_bias = None
    return r"head.attention: parameters are \['in_proj_weight'\], expected"


def other_computation(model):
    model.config.vision_config.use_rope = True
    return "use_rope is True, which this model does not implement"


def dropout(model):
    model.config.vision_config.attention_dropout = 0.1
    return "attention_dropout 0.1 is not supported"


def dropout_of_one(model):
    layer(model).self_attn.dropout = 0.1
    return r"encoder.layers.1.self_attn.dropout is 0.1, expected 0"


def another_scale(model):
    layer(model).self_attn.scale *= 2
    return r"encoder.layers.1.self_attn.scale is 0.5, expected 0.25"


def another_table(model):
    model.vision_model.embeddings.position_embedding = nn.Embedding(81, 64)
    return r"position_embedding has 81 entries, its configuration says 16"


def unknown_attention(model):
    model.config.vision_config._attn_implementation_internal = "flex_attention"
    return "unknown attn_implementation 'flex_attention'"


CHANGES = [
    hook, backward_hook, state_hook, own_forward, compiled_layer, compiled_tower, wrapped, another_class, more_modules,
    more_parameters, pruned, no_bias, other_computation, dropout, dropout_of_one,
    another_scale, another_table, unknown_attention,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_cannot_be_carried_over_is_named_and_stays(change):
    model = nn.ModuleDict({"untouched": lfm2_vl(), "other": siglip2()})
    message = change(model["other"])
    before = [(name, id(module)) for name, module in model.named_modules()]
    config = model["untouched"].config.vision_config
    with pytest.raises(ValueError, match=message):
        replace_vision_tower(model)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert type(config._attn_implementation) is str


@pytest.mark.parametrize("change", [hook, own_forward, wrapped, more_modules], ids=lambda change: change.__name__)
def test_nor_is_it_given_back(change):
    model = siglip2()
    replace_vision_tower(model)
    packed = packed_tower(model)
    message = change(model)
    with pytest.raises(ValueError, match=message.replace("Siglip2EncoderLayer", "Siglip2PackedEncoderLayer")):
        restore_vision_tower(model)
    assert packed_tower(model) is packed


def test_towers_before_one_that_is_not_given_back_stay_as_they_were():
    model = nn.ModuleDict({"first": lfm2_vl(), "other": siglip2()})
    first, _ = replace_vision_tower(model).values()
    hook(model["other"])
    with pytest.raises(ValueError, match="has a hook"):
        restore_vision_tower(model)
    assert requested_attention(first.config) == "auto"


def test_what_transformers_captures_outputs_with_is_no_reason():
    model = siglip2()
    batch = images(ODD)
    vision(model, batch, output_hidden_states=True)
    lfm = lfm2_vl()
    vision(lfm, batch, output_hidden_states=True)  # transformers 4 leaves a forward on each layer
    for each in (model, lfm):
        replace_vision_tower(each)
        restore_vision_tower(each)


BATCHES = {
    "a mask that marks more": (
        lambda b: b["pixel_attention_mask"][0].fill_(1),
        "image 0: pixel_attention_mask marks 256",
    ),
    "a mask that marks fewer": (lambda b: b["pixel_attention_mask"][2, 34].zero_(), "image 2: .* marks 34 rows.* 35"),
    "a mask with a gap": (lambda b: b["pixel_attention_mask"][1, 3].zero_(), "image 1: .* marks 255 rows"),
    "no mask": (lambda b: b.pop("pixel_attention_mask"), "image 0: without pixel_attention_mask all 256 rows"),
    "a mask of other sizes": (
        lambda b: b.update(pixel_attention_mask=b["pixel_attention_mask"][:, :250]),
        r"pixel_attention_mask \[3, 250\] needs a padded batch",
    ),
    "shapes beyond the rows": (lambda b: b["spatial_shapes"][1].fill_(17), "image 1"),
    "shapes of nothing": (lambda b: b["spatial_shapes"][1, 0].zero_(), "must all be at least 1"),
    "no shapes": (lambda b: b.pop("spatial_shapes"), "spatial_shapes are missing"),
    "floating shapes": (lambda b: b.update(spatial_shapes=b["spatial_shapes"].float()), "must hold integers"),
    "too few shapes": (lambda b: b.update(spatial_shapes=b["spatial_shapes"][:2]), "there are 3 images"),
    "a pack": (lambda b: b.update(pixel_values=b["pixel_values"][0]), r"must be \[N, max, P\], got \[256, 48\]"),
    "integers": (lambda b: b.update(pixel_values=b["pixel_values"].long()), "must be floating"),
    "other patches": (lambda b: b.update(pixel_values=b["pixel_values"][..., :12]), "12"),
    "attentions": (lambda b: b.update(output_attentions=True), "never forms the weights"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_that_contradict_themselves(name):
    model = siglip2()
    replace_vision_tower(model)
    change, message = BATCHES[name]
    batch = images(ODD)
    change(batch)
    with pytest.raises(ValueError, match=message):
        model.vision_model(**batch)


def test_masks_of_any_kind_and_none_for_images_that_fill_their_rows():
    model = siglip2()
    replace_vision_tower(model)
    batch = images(ODD)
    expected = model.vision_model(**batch)
    mask = batch.pop("pixel_attention_mask")
    for given in (mask.bool(), mask.float(), mask.numpy(), mask.tolist()):
        assert torch.equal(
            model.vision_model(**batch, pixel_attention_mask=given).pooler_output, expected.pooler_output
        )
    square = images([(1, 4, 6), (1, 8, 3)])
    expected = model.vision_model(**square)
    del square["pixel_attention_mask"]
    assert torch.equal(model.vision_model(**square).last_hidden_state, expected.last_hidden_state)
    shapes = square.pop("spatial_shapes").tolist()
    assert torch.equal(model.vision_model(**square, spatial_shapes=shapes)[1], expected.pooler_output)


def test_a_version_4_wrapper_stays():
    if type(next(m for m in tower().modules() if hasattr(m, "post_layernorm"))) is Siglip2VisionModel:
        pytest.skip("transformers 5 has no module around the tower")
    model = lfm2_vl()
    wrapper = model.model.vision_tower
    replace_vision_tower(model)
    assert model.model.vision_tower is wrapper and wrapper.vision_model is packed_tower(model)
    assert wrapper.get_input_embeddings() is wrapper.vision_model.embeddings.patch_embedding
