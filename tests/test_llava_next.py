"""LLaVA-NeXT's own code, LLaVA-OneVision's, on our tower: its builder, model, data code and training's switches.

    git clone https://github.com/LLaVA-VL/LLaVA-NeXT && LLAVA_NEXT=LLaVA-NeXT python -m pytest tests/test_llava_next.py

What its towers give is computed by its own `SigLipVisionModel`: at the size of the position table, a NaFlex checkpoint
is a fixed-size one, its patch projection a convolution.
"""

import importlib
import os
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from llava_reference import close
from PIL import Image
from torch import nn
from transformers import PretrainedConfig, Siglip2VisionModel

from siglip2_packed import SigLipVisionTower

CLONE = os.environ.get("LLAVA_NEXT", "")
pytestmark = pytest.mark.skipif(not CLONE, reason="LLAVA_NEXT names no clone of LLaVA-VL/LLaVA-NeXT")
OTHERS = {  # parts that ask for packages or for an old transformers, and their names
    "multimodal_encoder.imagebind": ["ImageBindWrapper"],
    "multimodal_encoder.open_clip_encoder": ["OpenCLIPVisionTower"],
    "multimodal_encoder.hf_vision": ["HFVisionTower"],
    "multimodal_encoder.mlcd_encoder": ["MLCDVisionTower", "MLCDVisionTowerS2"],
    "multimodal_resampler.qformer": ["Qformer"],
}


@pytest.fixture(scope="module")
def llava():
    """Its modules, by their names; `builder` is as it is with the one import changed."""
    if not (Path(CLONE) / "llava/model/llava_arch.py").exists():
        pytest.fail(f"LLAVA_NEXT={CLONE} holds no llava/model/llava_arch.py")
    before = set(sys.modules)
    package = sys.modules["llava"] = ModuleType("llava")
    package.__path__ = [str(Path(CLONE) / "llava")]  # without what its __init__ imports
    model = sys.modules["llava.model"] = ModuleType("llava.model")
    model.__path__ = [str(Path(CLONE) / "llava/model")]
    for name, classes in OTHERS.items():
        module = sys.modules[f"llava.model.{name}"] = ModuleType(name)
        vars(module).update(dict.fromkeys(classes))
    found = SimpleNamespace(
        mm_utils=importlib.import_module("llava.mm_utils"),
        builder=importlib.import_module("llava.model.multimodal_encoder.builder"),
        siglip=importlib.import_module("llava.model.multimodal_encoder.siglip_encoder"),
        qwen=importlib.import_module("llava.model.language_model.llava_qwen"),
    )
    # a folder goes to CLIP's tower there, a hub id that holds "siglip" to this one
    found.builder.os = SimpleNamespace(path=SimpleNamespace(exists=lambda _: False))
    found.qwen.LlavaQwenConfig.__setattr__ = keep_rope_parameters
    yield found
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "llava":
            del sys.modules[name]


def keep_rope_parameters(config, name, value):
    """Their model sets `rope_scaling` to None, with which transformers 5 makes no Qwen2."""
    if (name, value) != ("rope_scaling", None) or not hasattr(config, "rope_parameters"):
        PretrainedConfig.__setattr__(config, name, value)


@pytest.fixture
def folder(checkpoint, tmp_path):
    (tmp_path / "siglip2").symlink_to(checkpoint("tiny"))
    return str(tmp_path / "siglip2")


def make(llava, folder, monkeypatch, **fields):
    monkeypatch.setattr(llava.builder, "SigLipVisionTower", SigLipVisionTower)
    torch.manual_seed(0)
    config = llava.qwen.LlavaQwenConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, mm_vision_tower=folder, mm_hidden_size=64, mm_patch_merge_type="spatial_unpad",
        image_aspect_ratio="anyres_max_9", image_grid_pinpoints=[[32, 16], [16, 32], [32, 32], [48, 16]],
        mm_spatial_pool_mode="bilinear", mm_newline_position="grid", add_faster_video=False, tie_word_embeddings=False,
        **{"mm_projector_type": "mlp2x_gelu", **fields},
    )  # fmt: skip
    model = llava.qwen.LlavaQwenForCausalLM(config)
    nn.init.normal_(model.model.image_newline)
    return model


class Theirs(nn.Module):
    """Features as their tower gives them, by their model, without the assertion of 729 tokens."""

    num_patches_per_side, image_size = 4, 16

    def __init__(self, llava, folder):
        super().__init__()
        naflex = Siglip2VisionModel.from_pretrained(folder)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
        self.vision_tower = llava.siglip.SigLipVisionModel(
            llava.siglip.SigLipVisionConfig(**sizes, image_size=16, patch_size=4)
        )
        state = {f"vision_model.{key.removeprefix('vision_model.')}": x for key, x in naflex.state_dict().items()}
        name = "vision_model.embeddings.patch_embedding.weight"
        state[name] = state[name].view(64, 4, 4, 3).permute(0, 3, 1, 2)
        missing = self.vision_tower.load_state_dict(state, strict=False).missing_keys
        assert all("position_ids" in key for key in missing)
        del self.vision_tower.vision_model.encoder.layers[-1:]
        self.vision_tower.vision_model.head = nn.Identity()

    def forward(self, images):
        return self.vision_tower(images, output_hidden_states=True).hidden_states[-1]


def photos(*sizes):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def test_images_are_theirs(llava, folder):
    tower = SigLipVisionTower(folder, image_size=24)
    theirs = llava.siglip.SigLipImageProcessor(size=(24, 24), crop_size={"height": 24, "width": 24}, resample=2)
    images = photos((30, 77), (24, 24), (9, 5))
    for given in (images, images[0], np.stack([np.asarray(images[0])] * 2)):
        expected = theirs.preprocess(given, return_tensors="pt")["pixel_values"]
        found = tower.image_processor.preprocess(given, return_tensors="pt")["pixel_values"]
        assert found.shape == expected.shape == (len(expected), 3, 24, 24)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for size in (224, 384):  # with a range of grids their code asks for one of a few sizes
        processor = SigLipVisionTower(folder, image_size=size, delay_load=True).image_processor
        tiles = llava.mm_utils.process_anyres_image(images[0], processor, "(1x1),...,(2x2)")
        assert tiles.shape == (2, 3, size, size)


def test_logits_and_gradients_are_those_of_their_tower(llava, folder, monkeypatch):
    """A tall, a wide and a small image in tiles, one alone, a video, and a sample of text."""
    vlm = make(llava, folder, monkeypatch)
    tower = vlm.get_vision_tower()
    tower.requires_grad_(True)
    images = llava.mm_utils.process_images(photos((50, 20), (16, 47), (7, 7)), tower.image_processor, vlm.config)
    crop = tower.image_processor.crop_size
    images += [torch.randn(3, 16, 16), torch.randn(5, 3, 16, 16), torch.zeros(1, 3, crop["height"], crop["width"])]
    sizes = [(20, 50), (47, 16), (7, 7), (16, 16), (16, 16), (16, 16)]
    kinds = ["image"] * 4 + ["video", "text"]
    ids = torch.tensor([[1, 2, llava.mm_utils.IMAGE_TOKEN_INDEX, 3]] * 5 + [[1, 2, 4, 3]])
    inputs = {"images": images, "image_sizes": sizes, "modalities": kinds, "labels": ids}
    results = []
    for each in (tower, Theirs(llava, folder)):
        vlm.model.vision_tower = each
        out = vlm(input_ids=ids, **inputs)
        (out.logits.square().sum() + out.loss).backward()
        inner = each.vision_tower
        results.append((out.logits.detach(), {k.removeprefix("vision_model."): p for k, p in inner.named_parameters()}))
    (ours, mine), (expected, theirs) = results
    close(ours, expected)
    for name, parameter in mine.items():
        found, wanted = parameter.grad, theirs[name].grad
        if name == "embeddings.patch_embedding.weight":
            wanted = wanted.permute(0, 2, 3, 1).flatten(1)
        scale = theirs[name.replace("k_proj.bias", "k_proj.weight")].grad.norm()
        assert (found - wanted).norm() <= 1e-5 * scale, name
    assert len(mine) == 3 + 2 * 16


def test_their_pooling_projector_reads_the_size_of_config(llava, folder, monkeypatch):
    vlm = make(llava, folder, monkeypatch, mm_projector_type="pooler")
    assert vlm.encode_images(torch.randn(2, 3, 16, 16)).shape == (2, 4, 32)


def test_another_size_in_the_builder(llava, folder, monkeypatch):
    monkeypatch.setattr(llava.builder, "SigLipVisionTower", partial(SigLipVisionTower, image_size=24))
    tower = llava.builder.build_vision_tower(SimpleNamespace(mm_vision_tower=folder), delay_load=True)
    assert (tower.num_patches, tower.num_patches_per_side, tower.image_size) == (36, 6, 24) and not tower.is_loaded


@pytest.mark.parametrize("tunable", [None, "mm_vision_tower,mm_mlp_adapter", "mm_mlp_adapter"])
def test_a_model_that_gets_its_tower_in_training_and_is_read_again(llava, folder, monkeypatch, tmp_path, tunable):
    vlm = make(llava, folder, monkeypatch)
    del vlm.model.vision_tower, vlm.model.mm_projector
    args = SimpleNamespace(
        vision_tower=folder, mm_vision_select_layer=-2, mm_vision_select_feature="patch", add_faster_video=False,
        pretrain_mm_mlp_adapter=None, mm_patch_merge_type="spatial_unpad", mm_tunable_parts=tunable,
        mm_projector_type="mlp2x_gelu",
    )  # fmt: skip
    for _ in range(2):  # the second time `load_model` finds a tower
        vlm.model.initialize_vision_modules(args)
    tower = vlm.get_vision_tower()
    assert vlm.config.mm_hidden_size == 64 and not any(p.requires_grad for p in tower.parameters())
    vlm.config.mm_tunable_parts = tunable
    for name, parameter in vlm.named_parameters():
        if "vision_tower" in name and tunable and "mm_vision_tower" in tunable:
            parameter.requires_grad_(True)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter += 0.1
    vlm.save_pretrained(tmp_path)
    again = llava.qwen.LlavaQwenForCausalLM.from_pretrained(tmp_path)
    again.get_vision_tower().load_model(device_map="cpu")
    assert again.get_vision_tower().is_loaded
    expected = tower.state_dict()
    found = again.get_vision_tower().state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
