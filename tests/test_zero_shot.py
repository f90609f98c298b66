"""`siglip2-packed zero-shot` against transformers' own full model, texts and images padded."""

import json
import logging
import math
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from siglip2_packed import Siglip2PackedImageProcessor, cli, zero_shot
from siglip2_packed.random_checkpoint import SHAPES, randomize

LABELS = ["cat", "a cup of coffee", "the moon over a very wide field"]
SIZES = [(64, 64), (40, 150), (200, 30), (12, 300)]


def save_tokenizer(folder, names=("input_ids",)):
    """Gemma's in small: byte fallback, spaces as ▁, <eos> behind every text, padding to the right."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    alphabet = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=310, special_tokens=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["a photo of a cat", "coffee in a cup", "the moon, the wide field"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = dict(tokenizer_class="GemmaTokenizer", padding_side="right", model_input_names=list(names))
    config |= dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), special))
    config |= dict(add_bos_token=False, add_eos_token=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A full checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("full")
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text |= dict(vocab_size=save_tokenizer(folder), projection_size=64, max_position_embeddings=64)
    model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=dict(SHAPES["tiny"])))
    randomize(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        # texts that differ, and scores in the middle: the last position sees words more than where they stand
        model.text_model.embeddings.position_embedding.weight.mul_(0.1)
        model.logit_scale.fill_(math.log(30))
        model.logit_bias.fill_(5.0)
    model.save_pretrained(folder)
    Siglip2PackedImageProcessor(patch_size=4, max_num_patches=40).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{h}x{w}.png" for h, w in SIZES]
    for colour, (path, (h, w)) in enumerate(zip(paths, SIZES)):
        image = np.random.default_rng(colour).integers(0, 256, (h, w, 3), dtype=np.uint8)
        image[..., colour % 3] //= 1 + 3 * colour
        Image.fromarray(image).save(path)
    return paths


def run(ckpt, files, out, *flags):
    argv = ["zero-shot", *map(str, files), "--ckpt", str(ckpt), "--json", str(out), "--device", "cpu", *flags]
    code = cli.main(argv)
    return code, json.loads(out.read_text()) if out.exists() else None


def expected(ckpt, files, texts):
    """Scores `[N, M]` of `transformers.Siglip2Model`, on a padded batch."""
    kind = getattr(transformers, "Siglip2ImageProcessorPil", None) or transformers.Siglip2ImageProcessor
    images = kind.from_pretrained(ckpt)([Image.open(file) for file in files], return_tensors="pt")
    tokens = transformers.AutoTokenizer.from_pretrained(ckpt)(
        texts, padding="max_length", max_length=64, truncation=True, return_tensors="pt"
    )
    with torch.inference_mode():
        model = transformers.Siglip2Model.from_pretrained(ckpt, attn_implementation="eager").eval()
        return model(**images, **tokens).logits_per_image.sigmoid()


@pytest.mark.parametrize("names", [("input_ids",), ("input_ids", "attention_mask")])
def test_scores_are_those_of_transformers(full, files, tmp_path, names):
    ckpt = shutil.copytree(full, tmp_path / "ckpt")
    save_tokenizer(ckpt, names)
    code, written = run(ckpt, files, tmp_path / "scores.json", "--labels", *LABELS)
    assert code == 0
    scores = torch.tensor([[row["score"] for row in image["scores"]] for image in written["images"]])
    theirs = expected(ckpt, files, [f"this is a photo of {label}." for label in LABELS])
    assert scores.shape == theirs.shape == (len(SIZES), len(LABELS))
    assert theirs.std() > 0.02 and theirs.std(dim=1).min() > 1e-3  # images and labels tell apart
    assert (scores - theirs).abs().max() < 1e-4
    assert len({tuple(image["grid"]) for image in written["images"]}) == len(SIZES)


def test_labels_are_read_in_lower_case(full, files, tmp_path):
    _, lower = run(full, files[:1], tmp_path / "lower.json", "--labels", *LABELS)
    _, upper = run(full, files[:1], tmp_path / "upper.json", "--labels", *map(str.upper, LABELS))
    scores = [[row["score"] for row in written["images"][0]["scores"]] for written in (lower, upper)]
    assert scores[0] == scores[1]
    assert upper["images"][0]["scores"][0]["label"] == "CAT"


def test_template(full, files, tmp_path):
    _, plain = run(full, files[:1], tmp_path / "a.json", "--labels", "This is a photo of cat.", "--template", "{}")
    _, default = run(full, files[:1], tmp_path / "b.json", "--labels", "cat")
    assert (
        plain["images"][0]["scores"][0]["text"]
        == default["images"][0]["scores"][0]["text"]
        == "This is a photo of cat."
    )
    assert plain["images"][0]["scores"][0]["score"] == default["images"][0]["scores"][0]["score"]


def test_table_has_the_best_label_first(full, files, capsys):
    assert cli.main(["zero-shot", str(files[1]), "--ckpt", str(full), "--device", "cpu", "--labels", *LABELS]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert "40x150.png, 3x12 patches" in lines[0]
    assert lines[1].split() == ["label", "score", "cosine"]
    scores = [float(line.split()[-2]) for line in lines[2:]]
    assert len(scores) == len(LABELS) and scores == sorted(scores, reverse=True)


def test_long_texts_are_cut_and_named(full, recwarn):
    tower = zero_shot.load_text_tower(str(full), torch.device("cpu"))
    recwarn.clear()
    tower.embed(["moon"])
    assert not recwarn.list
    with pytest.warns(UserWarning, match="longer than the [0-9]+ tokens of the text tower, cut off there: 'moon moon"):
        embeds = tower.embed(["moon " * 500, "moon"])
    assert embeds.shape == (2, 64) and embeds.isfinite().all()


def test_tensors_of_the_vision_tower_are_no_news(full):
    said = []
    handler = logging.Handler()
    handler.emit = said.append
    verbosity = transformers.utils.logging.get_verbosity()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        zero_shot.load_text_tower(str(full), torch.device("cpu"))
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in said] == []
    assert transformers.utils.logging.get_verbosity() == verbosity


def without(full, folder, prefix):
    ckpt = shutil.copytree(full, folder / "ckpt")
    state = load_file(ckpt / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    assert len(kept) < len(state)
    save_file(kept, ckpt / "model.safetensors", {"format": "pt"})
    return ckpt


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("text_model.", ["text_model.*"]),
        ("logit_", ["logit_scale", "logit_bias"]),
        ("text_model.encoder.layers.1", ["text_model.encoder.layers.1", "encoder.layers.1"]),
        ("vision_model.head", ["no pooling head"]),
    ],
)
def test_what_is_missing_is_named(full, files, tmp_path, capsys, prefix, words):
    code, _ = run(without(full, tmp_path, prefix), files[:1], tmp_path / "x.json", "--labels", "cat")
    err = capsys.readouterr().err
    assert code == 2 and any(word in err for word in words), err


def test_vision_only_checkpoint(checkpoint, files, tmp_path, capsys):
    assert run(checkpoint("tiny"), files[:1], tmp_path / "x.json", "--labels", "cat")[0] == 2
    assert "text_model.*, logit_scale, logit_bias missing" in capsys.readouterr().err


def test_no_tokenizer(checkpoint, files, tmp_path, capsys):
    ckpt = shutil.copytree(checkpoint("tiny", full=True), tmp_path / "ckpt")
    (ckpt / "tokenizer.json").unlink()
    assert run(ckpt, files[:1], tmp_path / "x.json", "--labels", "cat")[0] == 2
    assert "no tokenizer" in capsys.readouterr().err


def test_a_random_checkpoint_can_be_tried(checkpoint, files, tmp_path):
    """Its toy tokenizer is transformers' to load, knows every letter, and its ids are those of the text tower."""
    ckpt = checkpoint("tiny", full=True)
    labels = ["cat", "dog", "Übergröße 猫 \U0001f431"]
    code, written = run(ckpt, files[:2], tmp_path / "scores.json", "--labels", *labels)
    assert code == 0
    scores = torch.tensor([[row["score"] for row in image["scores"]] for image in written["images"]])
    assert (scores - expected(ckpt, files[:2], [f"this is a photo of {x}.".lower() for x in labels])).abs().max() < 1e-4
    assert scores.diff(dim=1).abs().min() > 1e-4  # seen in a table of four digits
    tokenizer = transformers.AutoTokenizer.from_pretrained(ckpt)
    config = transformers.Siglip2Config.from_pretrained(ckpt).text_config
    assert config.vocab_size == len(tokenizer) and config.max_position_embeddings == tokenizer.model_max_length == 64
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.decode(tokenizer("a 猫, ß")["input_ids"], skip_special_tokens=True) == "a 猫, ß"
    ids = tokenizer("a cat", padding="max_length", max_length=64)["input_ids"]
    assert len(ids) == 64 and ids[-1] == 0 and 3 not in ids and 1 in ids
    assert isinstance(transformers.AutoProcessor.from_pretrained(ckpt), transformers.Siglip2Processor)


def test_template_without_a_place(full, files, tmp_path, capsys):
    assert run(full, files[:1], tmp_path / "x.json", "--labels", "cat", "--template", "a photo")[0] == 2
    assert "'a photo'" in capsys.readouterr().err


def test_labels_that_are_no_text(full, files, tmp_path, capsys):
    assert run(full, files[:1], tmp_path / "x.json", "--labels", "cat", "caf\udce9")[0] == 2
    assert "'This is a photo of caf\\udce9.' is not UTF-8" in capsys.readouterr().err


def test_unreadable_image(full, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert run(full, [tmp_path / "broken.png"], tmp_path / "x.json", "--labels", "cat")[0] == 2
    assert "broken.png" in capsys.readouterr().err
