"""Which layer's features the LLaVA tower gives, how many, and what it says of itself (V4, V5)."""

import shutil

import numpy as np
import pytest
import torch
from llava_reference import FORMS, SAME, args, close, reference, run_form
from PIL import Image
from torch import nn
from transformers import Siglip2ImageProcessor, Siglip2VisionModel

from siglip2_packed import SigLip2NaflexVisionTower, Siglip2PackedVisionModel, encode_images, pad
from siglip2_packed.preprocess import resized_grid


@pytest.mark.parametrize("layer", [-1, -2, -3, -4, 0, 1, 2, 3])
def test_select_layer_in_every_form(checkpoint, patches, layer):
    x, tower = patches(SAME), SigLip2NaflexVisionTower(checkpoint("tiny"), args(mm_vision_select_layer=layer))
    expected, _ = reference(checkpoint("tiny"), pad(x, SAME), layer)
    for form in FORMS:
        close(run_form(tower, form, x, SAME), expected)
    tower(x, SAME).sum().backward()
    assert all(p.grad is not None for p in tower.parameters())


def test_minus_two_is_minus_one_of_a_model_without_its_last_layer(checkpoint, patches, tmp_path):
    Siglip2VisionModel.from_pretrained(checkpoint("tiny"), num_hidden_layers=2).save_pretrained(tmp_path)
    x = patches(SAME)
    full = SigLip2NaflexVisionTower(checkpoint("tiny"), args(mm_vision_select_layer=-2))
    last = SigLip2NaflexVisionTower(tmp_path, args(mm_vision_select_layer=-1))
    assert torch.equal(full(x, SAME), last(x, SAME))


@pytest.mark.parametrize("delay_load", [False, True])
def test_impossible_selections_are_refused_at_construction(checkpoint, delay_load):
    for layer in (99, 4, -5, "-2", 1.5):
        with pytest.raises(ValueError, match="select_layer"):
            SigLip2NaflexVisionTower(checkpoint("tiny"), args(mm_vision_select_layer=layer), delay_load=delay_load)
    with pytest.raises(ValueError, match="cls_patch"):
        SigLip2NaflexVisionTower(checkpoint("tiny"), args(mm_vision_select_feature="cls_patch"), delay_load=delay_load)
    for given, layer in ((args(mm_vision_select_layer=None), -2), (None, -2), ({"mm_vision_select_layer": -1}, -1)):
        assert SigLip2NaflexVisionTower(checkpoint("tiny"), given, delay_load=delay_load).select_layer == layer


def test_token_counts_of_fifty_sizes(tower):
    """V5: predicted, preprocessed and encoded."""
    rng = np.random.default_rng(0)
    sizes = [(639, 31), (31, 639), (1, 1), (1, 3000), *rng.integers(1, 700, (46, 2)).tolist()]
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for height, width in sizes]
    batch = tower.image_processor.preprocess(images, return_tensors="pt", max_num_patches=64)
    grids = [resized_grid(height, width, 4, 64) for height, width in sizes]
    assert batch["pixel_values"].shape[:2] == (50, 64) and batch["spatial_shapes"].tolist() == [[*hw] for hw in grids]
    with torch.no_grad():
        features, padded = encode_images(tower, nn.Identity(), batch), tower(batch)
    assert [len(x) for x in features] == [h * w for h, w in grids]
    assert padded.abs().sum(-1).count_nonzero(dim=1).tolist() == [h * w for h, w in grids]


def test_preprocess_pads_to_the_budget_and_drops_nothing(checkpoint, tower):
    processor = tower.image_processor
    assert "siglip" in type(processor).__name__.lower() and "siglip" in str(processor).lower()
    theirs = Siglip2ImageProcessor.from_pretrained(checkpoint("tiny"))
    rng = np.random.default_rng(0)
    for height, width in ((12, 20), (16, 16), (40, 24)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        got = processor.preprocess(image, return_tensors="pt", do_resize=False)
        count = height // 4 * (width // 4)
        assert got["pixel_values"].shape == (1, max(16, count), 48) and got["pixel_values"].dtype == torch.float32
        assert not got["pixel_values"][:, count:].any()
        expected = theirs.preprocess(image, return_tensors="pt", do_resize=False, max_num_patches=max(16, count))
        torch.testing.assert_close(got["pixel_values"], expected["pixel_values"], atol=1e-6, rtol=0)
        for key in ("pixel_attention_mask", "spatial_shapes"):
            assert got[key].tolist() == expected[key].tolist()
    with pytest.raises(ValueError, match="13x20"):
        processor.preprocess(Image.new("RGB", (20, 13)), return_tensors="pt", do_resize=False)


def test_properties_come_from_the_checkpoint(checkpoint, tower):
    assert tower.is_loaded and tower.vision_tower_name == str(checkpoint("tiny"))
    assert isinstance(tower.vision_tower, Siglip2PackedVisionModel)
    assert (tower.hidden_size, tower.config.num_hidden_layers, tower.config.intermediate_size) == (64, 3, 128)
    assert (tower.num_patches, tower.num_patches_per_side, tower.image_size) == (16, 4, 16)
    assert (tower.dtype, tower.device) == (torch.float32, torch.device("cpu"))
    assert torch.equal(tower.dummy_feature, torch.zeros(1, 64))
    tower.to(torch.bfloat16)
    assert {x.dtype for x in tower.state_dict().values()} == {tower.dummy_feature.dtype} == {torch.bfloat16}
    assert tower(torch.randn(6, 48), [(1, 2, 3)]).dtype == torch.bfloat16
    tower.image_processor.max_num_patches = 250
    assert tower.num_patches == 250
    for name in ("num_patches_per_side", "image_size"):
        with pytest.raises(ValueError, match="250"):
            getattr(tower, name)


def test_a_folder_by_any_name_and_without_a_preprocessor_configuration(checkpoint, tmp_path):
    folder = tmp_path / "clip_vs_siglip2_naflex"
    shutil.copytree(checkpoint("tiny"), folder)
    (folder / "preprocessor_config.json").unlink()
    tower = SigLip2NaflexVisionTower(folder, args())
    assert (tower.image_processor.patch_size, tower.num_patches) == (4, 16)
    (folder / "model.safetensors").unlink()
    tower = SigLip2NaflexVisionTower(folder, args(), delay_load=True)
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        tower.load_model()
    (folder / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="clip"):
        SigLip2NaflexVisionTower(folder, args(), delay_load=True)
