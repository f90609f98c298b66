"""Names of attention backends that only this package knows stay within it: what leaves a model works elsewhere."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModel, LlavaConfig, PreTrainedModel, Siglip2VisionConfig, Siglip2VisionModel

from siglip2_packed import Siglip2PackedVisionModel
from siglip2_packed.attention import requested_attention
from siglip2_packed.random_checkpoint import SHAPES

GRIDS = [(1, 13, 19), (1, 2, 3)]
TINY = SHAPES["tiny"]


@pytest.mark.parametrize("given", [None, "sdpa", "eager"])
def test_the_callers_configuration_is_left_alone(given):
    config = Siglip2VisionConfig(**TINY, select_layer=-2)
    config._attn_implementation = given
    before = copy.deepcopy(config.__dict__)
    model = Siglip2PackedVisionModel(config)
    assert config.__dict__ == before
    model.set_attn_implementation("eager")
    model.config.output_hidden_states = True
    assert config.__dict__ == before


@pytest.mark.parametrize("name", [None, "auto", "triton", "torch_varlen", "sdpa", "eager"])
def test_what_leaves_the_model_is_known_to_transformers(checkpoint, name):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), attn_implementation=name)
    requested = name or "auto"
    for config in (model.config, copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
        assert config._attn_implementation in ("sdpa", "eager")
        assert requested_attention(config) == requested
        assert isinstance(AutoModel.from_config(config), Siglip2VisionModel)
        assert Siglip2VisionModel(config).config._attn_implementation in ("sdpa", "eager")
        assert requested_attention(Siglip2PackedVisionModel(config).config) == requested
        loaded = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"), config=config)
        assert requested_attention(loaded.config) == requested


def test_names_are_set_and_taken_back(checkpoint, patches):
    model = Siglip2PackedVisionModel.from_pretrained(checkpoint("tiny"))
    expected = model(patches(GRIDS), GRIDS).last_hidden_state
    for given, name in (
        ("sdpa", "sdpa"),
        ("auto", "auto"),
        ({"": "eager"}, "eager"),
        ({"text_config": "sdpa"}, "eager"),
    ):
        model.set_attn_implementation(given)
        assert requested_attention(model.config) == name
        torch.testing.assert_close(model(patches(GRIDS), GRIDS).last_hidden_state, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="unknown attn_implementation 'flash'"):
        model.set_attn_implementation({"": "flash"})
    assert requested_attention(model.config) == "eager"


class Around(PreTrainedModel):
    """A VLM with the tower inside, which has `vision_config` as its configuration."""

    config_class = LlavaConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.vision_tower = Siglip2PackedVisionModel(config.vision_config)
        self.projector = nn.Linear(64, 8)
        self.post_init()


def test_a_model_around_the_tower_sets_its_backend():
    vlm = Around(LlavaConfig(vision_config=Siglip2VisionConfig(**TINY)))
    assert requested_attention(vlm.vision_tower.config) == "auto"
    vlm.set_attn_implementation("sdpa")  # also where that is what others see in place of "auto"
    assert requested_attention(vlm.vision_tower.config) == "sdpa"
    vlm.vision_tower(torch.randn(253, 48), GRIDS)
    vlm.set_attn_implementation("eager")
    assert requested_attention(vlm.vision_tower.config) == "eager"
