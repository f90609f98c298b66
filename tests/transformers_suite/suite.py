"""transformers' own tests of a model, on `Siglip2PackedVisionModel`. `run.py` fetches them and starts this file."""

import unittest

import torch
from transformers import Siglip2VisionConfig
from transformers_tests.test_modeling_common import ModelTesterMixin

from siglip2_packed import Siglip2PackedVisionModel

GRIDS = [(1, 2, 3), (1, 3, 5), (2, 2, 2), (1, 4, 4), (1, 1, 6), (1, 5, 1), (1, 3, 3)]


class ModelTester:
    """What the tests ask of a model's tester: a small configuration, and a pack of images of several sizes."""

    is_training = True
    batch_size = len(GRIDS)
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    seq_length = sum(t * h * w for t, h, w in GRIDS)

    def get_config(self):
        return Siglip2VisionConfig(
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_patches=16,
            patch_size=2,
            num_channels=3,
        )

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(0)
        pixel_values = torch.rand(self.seq_length, 12, generator=generator)
        return self.get_config(), {"pixel_values": pixel_values, "grid_thw": torch.tensor(GRIDS)}


class TestSiglip2PackedVisionModel(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (Siglip2PackedVisionModel,)
    additional_model_inputs = ["grid_thw"]
    has_attentions = False  # varlen attention never forms the weights
    test_resize_embeddings = False
    test_missing_keys = True

    def setUp(self):
        self.model_tester = ModelTester()
