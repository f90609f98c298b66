"""The processor's files are as those of transformers' classes; another's, or wrong values, are refused by name."""

import json
import math

import pytest
import torch
import transformers
from checkpoint_copies import copy_with
from huggingface_hub import HfApi
from pixels import rgb

from siglip2_packed import SigLip2NaflexVisionTower, Siglip2PackedImageProcessor

SETTINGS = {"patch_size": 14, "max_num_patches": 100, "image_mean": [0.1, 0.2, 0.3], "do_convert_rgb": True}


def write(folder, **config):
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


def from_file(folder, **config):
    return Siglip2PackedImageProcessor.from_pretrained(write(folder, **config))


def from_dict(folder, **config):
    return Siglip2PackedImageProcessor.from_dict(config)


def from_json_file(folder, **config):
    return Siglip2PackedImageProcessor.from_json_file(write(folder, **config) / "preprocessor_config.json")


READERS = pytest.mark.parametrize("read", [from_file, from_dict, from_json_file])


@READERS
@pytest.mark.parametrize(
    "kind",
    [
        "CLIPImageProcessor",
        "CLIPFeatureExtractor",
        "Qwen2VLImageProcessor",
        "Qwen2VLImageProcessorFast",
        "Lfm2VlImageProcessorFast",
        "ViTImageProcessor",
    ],
)
def test_another_models_processor_is_refused(tmp_path, read, kind):
    name = "feature_extractor_type" if "Feature" in kind else "image_processor_type"
    with pytest.raises(ValueError, match=f"image_processor_type is {kind}, .*expected Siglip2ImageProcessor"):
        read(tmp_path, **{name: kind}, patch_size=16)


@READERS
@pytest.mark.parametrize(
    "fields",
    [
        {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}},
        {"crop_size": 224},
        {"size": {"height": 384, "width": 384}},
        {"size": {"shortest_edge": 3136, "longest_edge": 12845056}},
        {"min_pixels": 3136},
        {"merge_size": 2},
        {"temporal_patch_size": 2},
        {"do_image_splitting": True, "max_tiles": 10},
        {"max_tiles": 10},
        {"downsample_factor": 2},
        {"do_pan_and_scan": True},
        {"rescale_offset": True},
        {"include_top": True},
        {"do_flip_channel_order": True},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_setting_of_other_pixels_is_refused_by_name(tmp_path, read, fields):
    with pytest.raises(ValueError, match=f": {next(iter(fields))} is "):
        read(tmp_path, image_processor_type="Siglip2ImageProcessor", **fields)


@READERS
def test_what_is_off_or_idle_is_read(tmp_path, read, recwarn):
    """As transformers' fast processors write all of their fields."""
    off = {"do_center_crop": False, "crop_size": {"height": 224}, "size": None, "do_image_splitting": False}
    off |= {"max_tiles": 10, "merge_size": 1, "do_pan_and_scan": None, "downsample_factor": 1}
    idle = {"data_format": "channels_first", "default_to_square": True, "processor_class": "Siglip2Processor"}
    idle |= {"do_pad": True, "device": None, "image_processor_type": "Siglip2ImageProcessorFast", "_note": "x"}
    assert read(tmp_path, **SETTINGS, **off, **idle).to_dict() == Siglip2PackedImageProcessor(**SETTINGS).to_dict()
    assert not recwarn.list


@READERS
def test_what_is_not_known_is_named(tmp_path, read):
    with pytest.warns(UserWarning, match="not known, and passed over: colour_jitter, sharpen"):
        read(tmp_path, colour_jitter=0.3, sharpen=True, blur=False)


WRONG = [
    ("patch_size", "16"),
    ("patch_size", 0),
    ("patch_size", 16.0),
    ("patch_size", {"height": 16, "width": 16}),
    ("max_num_patches", True),
    ("max_num_patches", -1),
    ("rescale_factor", 0),
    ("rescale_factor", "0.0039"),
    ("rescale_factor", math.nan),
    ("rescale_factor", -1),
    ("image_mean", "0.5"),
    ("image_mean", ["0.5", "0.5", "0.5"]),
    ("image_mean", [0.5, math.nan, 0.5]),
    ("image_mean", {"r": 0.5}),
    ("image_std", [0.5, 0, 0.5]),
    ("image_std", [0.5, -0.5, 0.5]),
    ("image_std", math.inf),
    ("do_resize", "false"),
    ("do_rescale", 1),
    ("do_normalize", []),
    ("do_convert_rgb", "yes"),
    ("resample", "bilinear"),
    ("resample", 17),
    ("resample", True),
    ("resample", 2.0),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_values_are_refused_with_file_and_field(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must") as plain:
        Siglip2PackedImageProcessor(**{name: value})
    for read in (from_file, from_json_file):
        with pytest.raises(ValueError, match=rf"preprocessor_config.json: {name} must") as error:
            read(tmp_path, **{name: value})
        assert str(tmp_path) in str(error.value)
    assert repr(value)[:9] in str(plain.value) or name == "image_std"


def test_a_value_that_is_replaced_may_be_wrong(tmp_path):
    write(tmp_path, patch_size="16")
    assert Siglip2PackedImageProcessor.from_pretrained(tmp_path, patch_size=8).patch_size == 8


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("preprocessor_config.json", "[1]", "preprocessor_config.json holds list, expected an object"),
        ("preprocessor_config.json", "null", "preprocessor_config.json holds NoneType, expected an object"),
        ("processor_config.json", '{"image_processor": 3}', "processor_config.json: image_processor is 3, expected"),
    ],
)
def test_what_is_no_object_is_named(tmp_path, file, content, message):
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        Siglip2PackedImageProcessor.from_pretrained(tmp_path)


def test_a_llava_tower_does_not_take_another_processor(checkpoint, tmp_path):
    path = write(copy_with(checkpoint("tiny"), tmp_path / "x"), image_processor_type="CLIPImageProcessor")
    with pytest.raises(ValueError, match="CLIPImageProcessor"):
        SigLip2NaflexVisionTower(str(path), delay_load=True)


def test_dict_and_json_go_both_ways(tmp_path):
    processor = Siglip2PackedImageProcessor(**SETTINGS, num_threads=2)
    for again in (
        Siglip2PackedImageProcessor.from_dict(processor.to_dict()),
        Siglip2PackedImageProcessor.from_dict(json.loads(processor.to_json_string())),
    ):
        assert again.to_dict() == processor.to_dict()
    processor.to_json_file(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == processor.to_json_string()
    assert Siglip2PackedImageProcessor.from_json_file(str(tmp_path / "a.json")).to_dict() == processor.to_dict()
    assert processor.save_pretrained(tmp_path / "new") == [str(tmp_path / "new" / "preprocessor_config.json")]

    given = processor.to_dict()
    changed, unused = Siglip2PackedImageProcessor.from_dict(given, patch_size=8, flavour=1, return_unused_kwargs=True)
    assert (changed.patch_size, unused) == (8, {"flavour": 1})
    assert given == processor.to_dict()
    with pytest.raises(TypeError, match="flavour"):
        Siglip2PackedImageProcessor.from_dict(given, flavour=1)


def test_transformers_reads_the_dict_and_gives_one_that_is_read():
    theirs = transformers.Siglip2ImageProcessor
    processor = Siglip2PackedImageProcessor(patch_size=8, max_num_patches=64)
    theirs = theirs.from_dict(processor.to_dict())
    assert Siglip2PackedImageProcessor.from_dict(theirs.to_dict()).to_dict() == processor.to_dict()
    image = rgb(70, 110)
    rows = theirs(image, return_tensors="pt")
    assert torch.equal(rows["pixel_values"][0][rows["pixel_attention_mask"][0] == 1], processor(image)["pixel_values"])


def test_push_to_hub_uploads_the_file(tmp_path, monkeypatch):
    pushed = []

    def create_repo(self, repo_id, **kwargs):
        return type("Url", (), {"repo_id": f"me/{repo_id}"})

    def create_commit(self, repo_id, operations, **kwargs):
        pushed.append((repo_id, {operation.path_in_repo for operation in operations}))

    for target in (HfApi, transformers.utils.hub):
        for function in (create_repo, create_commit):
            if hasattr(target, function.__name__):
                bound = function if target is HfApi else lambda *args, f=function, **kwargs: f(None, *args, **kwargs)
                monkeypatch.setattr(target, function.__name__, bound)
    card = type("Card", (), {"save": lambda self, path: None})
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *args, **kwargs: card())
    processor = Siglip2PackedImageProcessor()
    processor.push_to_hub("mine")
    processor.save_pretrained(tmp_path / "folder", push_to_hub=True)
    assert [repo for repo, _ in pushed] == ["me/mine", "me/folder"]
    assert all("preprocessor_config.json" in files for _, files in pushed)
