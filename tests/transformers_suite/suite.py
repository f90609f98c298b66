"""transformers' own tests of a model, on `Siglip2PackedVisionModel`. `run.py` fetches them and starts this file."""

import unittest

import torch
from transformers import Siglip2VisionConfig
from transformers.testing_utils import torch_device
from transformers_tests.test_modeling_common import ModelTesterMixin

from siglip2_packed import Siglip2PackedVisionModel

SIZES = [(1, 2, 3), (1, 3, 5), (2, 2, 2), (1, 4, 4), (1, 1, 6), (1, 5, 1), (1, 3, 3)]
ALIKE = [(1, 3, 4)] * len(SIZES)


class WithLoss(Siglip2PackedVisionModel):
    """What is trained has a loss."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.loss = output.last_hidden_state.square().mean() + output.pooler_output.square().mean()
        return output


class OfOneImage(Siglip2PackedVisionModel):
    """All rows are those of one image, for tests that take as many rows as they please."""

    def forward(self, pixel_values, output_hidden_states=None):
        return super().forward(pixel_values, [(1, 1, len(pixel_values))], output_hidden_states=output_hidden_states)


class ModelTester:
    """What the tests ask of a model's tester: a small configuration, and a pack."""

    is_training = True
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32

    def __init__(self, grids):
        self.grids, self.batch_size = grids, len(grids)
        self.seq_length = sum(t * h * w for t, h, w in grids)

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
        pixel_values = torch.rand(self.seq_length, 12, generator=torch.Generator().manual_seed(0))
        inputs = {"pixel_values": pixel_values, "grid_thw": torch.tensor(self.grids)}
        return self.get_config(), {name: x.to(torch_device) for name, x in inputs.items()}


class TestSiglip2PackedVisionModel(ModelTesterMixin, unittest.TestCase):
    test_resize_embeddings = test_pruning = test_head_masking = False

    def setUp(self):
        """A test that takes the first rows of a batch as its first image is given images of one size."""
        self.model_tester = ModelTester(ALIKE if "batching" in self._testMethodName else SIZES)

    @property
    def all_model_classes(self):
        name = self._testMethodName
        trained = name.startswith("test_training")
        return (WithLoss if trained else OfOneImage if "matches_sdpa" in name else Siglip2PackedVisionModel,)

    @property
    def has_attentions(self):
        """There is attention; the weights, which some tests ask for, are never formed."""
        asked = "output_attentions", "test_attention_outputs", "retain_grad", "outputs_equivalence"
        return not any(name in self._testMethodName for name in asked)
